//! The oracle can fail: each defect that is planted at the simulator's side of the seams is found, and soon.

use floodmark_simulation::{Mutation, Options, simulate};

/// Seeds within which each defect must be found.
const SEEDS: u64 = 1000;

#[test]
fn every_planted_defect_is_found() {
    for mutation in Mutation::ALL {
        let options = Options { mutation: Some(mutation), ..Options::default() };
        // A seed that fails anyway shows nothing.
        let good = |seed: &u64| simulate(*seed, Options::default()).violations.is_empty();
        let found = (0..SEEDS).map(|s| simulate(s, options)).find(|r| !r.violations.is_empty() && good(&r.seed));
        let Some(found) = found else { panic!("{mutation:?} was not found by {SEEDS} seeds") };
        println!("{mutation:?}: found by seed {}: {}", found.seed, found.violations[0]);
    }
}
