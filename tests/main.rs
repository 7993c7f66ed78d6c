//! Everything that is tested through real servers and the real program, in one test program: linking it is what costs.
#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, are tests")]

mod asleep;
mod attacked;
mod common;
mod drift;
mod drivers;
mod fleet;
mod flip_parts;
mod killed;
mod replication_pairs;
mod roles;
mod sabotage;
mod stragglers;
mod surface_cli;
mod there_and_back;
