//! The parts that read bytes of strangers, with bytes nobody would send: the bodies of `tests/fuzz/`, driven by a seeded mutation
//! of its corpus. `cargo fuzz` does the same for as long as one likes (`tests/fuzz/README.md`). `PGFLIP_FUZZ` inputs each, and
//! `PGFLIP_SEED` for the same ones again.

use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::common::{seed, size};

#[path = "fuzz/bodies.rs"]
mod bodies;

/// Inputs a body, beside the corpus itself.
const INPUTS: usize = 3_000;
/// Longest input.
const LONGEST: usize = 12 << 10;
/// What such bytes are made of: messages' types and lengths, what settings are looked for in, SCRAM's attributes.
const WORDS: [&[u8]; 40] = [
    b"\0",
    b"\0\0\0\x04",
    b"\0\0\0\x05",
    b"\0\0\0\x10",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"Z\0\0\0\x05I",
    b"S\0\0\0\x04",
    b"H\0\0\0\x04",
    b"X\0\0\0\x04",
    b"Q\0\0\0\x0fset a.b = 1\0",
    b"P\0\0\0\x0c\0select\0",
    b"1\0\0\0\x04",
    b"C\0\0\0\x0bLISTEN\0",
    b"C\0\0\0\x10DISCARD ALL\0",
    b"G\0\0\0\x07\0\0\0",
    b"E\0\0\0\x05\0",
    b"A\0\0\0\x0c\x01\x02\x03\x04a\0b\0",
    b"S\0\0\0\x15client_encoding\0X\0",
    b"SET ",
    b"reset ",
    b"local ",
    b"set_config(",
    b"'app.x'",
    b"\"app\".",
    b"app.tenant",
    b"/*",
    b"*/",
    b"--",
    b"\n",
    b"::text",
    b"$1",
    b", ",
    b"\0\0\0\x0aapp.tenant",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"r=",
    b",p=",
    b"i=999999999",
    b"\0\x03\0\0user\0app\0\0",
    b"                ",
];

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fuzz/corpus")
        .join(name);
    let files = std::fs::read_dir(&directory).expect("a corpus");
    let mut paths: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{name}: nothing is kept");
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Some edits to one of them.
fn mutated(corpus: &[Vec<u8>], random: &mut StdRng) -> Vec<u8> {
    let pick = |random: &mut StdRng| corpus[random.random_range(0..corpus.len())].clone();
    let mut bytes = pick(random);
    for _ in 0..random.random_range(1..6) {
        let at = random.random_range(0..=bytes.len());
        let end = (at + random.random_range(0..40)).min(bytes.len());
        match random.random_range(0..7) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..end)),
            2 => bytes[at..end].iter_mut().for_each(|byte| *byte = random.random()),
            3 => {
                let piece = bytes[at..end].to_vec();
                let times = random.random_range(1..20);
                drop(bytes.splice(at..at, piece.repeat(times)));
            }
            4 => {
                let other = pick(random);
                let from = random.random_range(0..=other.len());
                drop(bytes.splice(at..end, other[from..].iter().copied()));
            }
            _ => {
                let word = WORDS[random.random_range(0..WORDS.len())];
                let to = if random.random() { at } else { end };
                drop(bytes.splice(at..to, word.iter().copied()));
            }
        }
    }
    bytes.truncate(LONGEST);
    bytes
}

#[test]
fn no_bytes_of_a_stranger_are_read_in_two_ways_or_make_pgflip_panic() {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    for (name, body) in bodies::BODIES {
        let corpus = corpus(name);
        let check = |input: &[u8]| {
            if std::panic::catch_unwind(|| body(input)).is_err() {
                let path = std::env::temp_dir().join(format!("pgflip-fuzz-{name}"));
                std::fs::write(&path, input).unwrap();
                panic!(
                    "{name}: PGFLIP_SEED={seed}, {} bytes, kept in {}: {input:?}",
                    input.len(),
                    path.display()
                );
            }
        };
        corpus.iter().for_each(|input| check(input));
        for _ in 0..size("PGFLIP_FUZZ", INPUTS) {
            check(&mutated(&corpus, &mut random));
        }
    }
}
