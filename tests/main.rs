//! Everything that is tested through real servers and the real program, in one test program: linking it is what costs.
#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, are tests")]

mod asleep;
mod attacked;
mod commit_hangs;
mod common;
mod copy_ended;
mod drift;
mod drivers;
mod eased;
mod fleet;
mod flip_parts;
mod followed;
mod forced;
mod fuzzed;
mod instructions;
mod kept_connections;
mod killed;
mod many_flips;
mod pinned;
mod proxy;
mod replication_pairs;
mod restless;
mod resynced;
mod roles;
mod sabotage;
mod servers_killed;
mod soak;
mod stragglers;
mod surface_cli;
mod there_and_back;
mod told;
mod two_controllers;
mod type_oids;
mod verified;
