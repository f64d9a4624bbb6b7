//! Random lives of jobs: five hundred seeds, each with faults of its own. `make simulate SEEDS=100000` runs more.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use floodmark_simulation::{Options, Report, simulate};

const SEEDS: u64 = 500;
const THREADS: usize = 2;

/// Runs seeds on a few threads, and gives each report to `look`.
fn run(seeds: u64, options: Options, look: impl Fn(Report) + Sync) {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|s| *s < seeds) {
                    look(simulate(seed, options));
                }
            });
        }
    });
}

#[test]
fn no_seed_breaks_a_promise_and_together_they_meet_every_kind_of_fault() {
    let seen: Mutex<BTreeMap<&str, u64>> = Mutex::default();
    run(SEEDS, Options::default(), |report| {
        assert!(
            report.violations.is_empty(),
            "{}{:#?}\nto see how: cargo run -p floodmark-simulation -- --seed {} --trace",
            report.plan,
            report.violations,
            report.seed
        );
        for (what, count) in report.counts {
            *seen.lock().unwrap().entry(what).or_default() += count;
        }
    });
    let seen = seen.into_inner().unwrap();
    for what in [
        "broker replies lost",
        "broker requests fenced",
        "broker requests refused",
        "clock jumps",
        "commits late",
        "connections severed",
        "crashes",
        "jobs taken over by another",
        "log races",
        "look-ups failed",
        "orphans deleted in time",
        "partitions",
        "parts of files named",
        "pauses",
        "releases",
        "rescales",
        "rescales refused",
        "runs that failed",
        "runs that were fenced",
        "runs that stopped",
        "savepoints made",
        "savepoints moved",
        "shards named again",
        "snapshots adopted",
        "source polls failed",
        "storage replies lost",
        "storage requests lost",
        "storage requests refused",
        "storage requests slow",
        "takeovers",
        "takeovers of a paused process",
        "takeovers of a process cut off",
        "transactions left open",
        "workers apart",
        "workers cut off",
        "workers paused",
        "workers started",
        "workers unheard of by their coordinator",
    ] {
        assert!(seen.get(what).is_some_and(|n| *n > 0), "no {what} in {SEEDS} seeds: {seen:#?}");
    }
}

#[test]
fn without_faults_no_checkpoint_and_no_run_fails() {
    run(SEEDS / 2, Options { calm: true, ..Options::default() }, |report| {
        let seed = report.seed;
        assert!(
            report.violations.is_empty(),
            "{}{:#?}\nto see how: cargo run -p floodmark-simulation -- --seed {seed} --calm --trace",
            report.plan,
            report.violations
        );
    });
}

#[test]
fn the_same_seed_gives_the_same_run_event_for_event() {
    run(40, Options::default(), |report| {
        let again = simulate(report.seed, Options::default());
        assert_eq!((report.digest, report.polls, report.lasted), (again.digest, again.polls, again.lasted));
        assert_eq!(report.output, again.output);
        assert_eq!(report.counts, again.counts);
    });
}

/// Fewer, for they open databases on a real disk.
const SEEDS_IN_ROCKSDB: u64 = 40;

#[test]
fn with_state_in_rocksdb_no_seed_breaks_a_promise() {
    run(SEEDS_IN_ROCKSDB, Options { rocksdb: true, ..Options::default() }, |report| {
        assert!(
            report.violations.is_empty(),
            "{}{:#?}\nto see how: cargo run -p floodmark-simulation -- --seed {} --rocksdb --trace",
            report.plan,
            report.violations,
            report.seed
        );
    });
}
