//! The fuzz targets' harnesses over the corpus and over random bytes, so that they are run, and right, without a fuzzer.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::Path;

use floodmark_corruption::decoders::{ALL, Harness};

/// Random inputs for each harness.
const INPUTS: u64 = 150;
/// Longest of them, bytes.
const LENGTH_MAX: u64 = 400;

/// A generator of the xorshift family: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Runs a harness over its corpus, over each file of it with a byte changed, and over random bytes. Answers how many inputs.
fn run(name: &str, harness: Harness) -> usize {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    let mut inputs: Vec<Vec<u8>> = vec![Vec::new()];
    let mut files: Vec<_> =
        std::fs::read_dir(&folder).map(|all| all.map(|f| f.unwrap().path()).collect()).unwrap_or_default();
    files.sort();
    inputs.extend(files.iter().map(|file| std::fs::read(file).unwrap()));
    let mut random = Random(name.bytes().fold(0x9E37_79B9_7F4A_7C15, |h, b| h.rotate_left(9) ^ u64::from(b)));
    for seed in inputs.clone().into_iter().filter(|s| !s.is_empty()) {
        for _ in 0..8 {
            let mut changed = seed.clone();
            let at = random.next() as usize % changed.len();
            changed[at] ^= random.next() as u8;
            inputs.push(changed);
        }
    }
    for _ in 0..INPUTS {
        let length = random.next() % LENGTH_MAX;
        inputs.push((0..length).map(|_| random.next() as u8).collect());
    }
    inputs.iter().for_each(|input| harness(input));
    inputs.len()
}

#[test]
fn harnesses_hold_over_the_corpus_and_random_bytes() {
    for (name, harness) in ALL {
        eprintln!("{name}: {} inputs", run(name, harness));
    }
}

#[test]
fn every_harness_has_a_fuzz_target_and_every_target_a_harness() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/fuzz_targets");
    let mut targets: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|f| f.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    targets.sort();
    let mut harnesses: Vec<&str> = ALL.iter().map(|(name, _)| *name).collect();
    harnesses.sort_unstable();
    assert_eq!(targets, harnesses);
}
