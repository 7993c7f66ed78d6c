//! Everything that is tested through real servers and the real program, in one test program: linking it is what costs.

mod asleep;
mod attacked;
mod common;
mod drivers;
mod flip_parts;
mod killed;
mod replication_pairs;
mod sabotage;
mod stragglers;
mod surface_cli;
mod there_and_back;
