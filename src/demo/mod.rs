//! `pgflip demo`, and what it shares with the tests and the benchmark: throwaway servers, and an application that keeps
//! a ledger.

pub mod cluster;
pub mod ledger;
