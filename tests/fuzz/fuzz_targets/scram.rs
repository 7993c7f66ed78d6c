//! See `bodies.rs`.
#![no_main]
#![allow(dead_code, reason = "each target drives one of them")]

#[path = "../bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::scram(input));
