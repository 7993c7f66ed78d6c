//! `pgflip demo`, and what it shares with the tests: throwaway servers.

pub mod cluster;
