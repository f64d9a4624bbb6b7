//! A job crashed at every effect that it has on the outside: before it, and after it with the reply lost. Whatever the crash,
//! the next process must bring the output to what it is without one: nothing lost, nothing repeated, nothing out of order.

use floodmark_simulation::{Crash, Options, Topology, crash};

const SEED: u64 = 1;

fn sweep(topology: Topology) {
    let calm = crash(topology, SEED, None, Options::default());
    assert!(calm.violations.is_empty(), "{topology:?} without a crash: {:#?}", calm.violations);
    assert!(calm.counts["checkpoints completed"] >= 5, "too few checkpoints to sweep: {:?}", calm.counts);
    assert!(calm.effects > 30, "too few effects to sweep: {}", calm.effects);
    for effect in 0..calm.effects {
        for after in [false, true] {
            let at = Crash { process: 1, effect, after };
            let report = crash(topology, SEED, Some(at), Options::default());
            assert!(report.violations.is_empty(), "{topology:?} crashed at {at:?}: {:#?}", report.violations);
            assert_eq!(report.counts["crashes"], 1, "{topology:?} did not crash at {at:?}");
        }
    }
    println!("{topology:?}: crashed at each of {} effects, before and after", calm.effects);
}

#[test]
fn a_stateless_job_survives_a_crash_at_every_effect() {
    sweep(Topology::Pipe);
}

#[test]
fn a_windowed_job_with_a_shuffle_survives_a_crash_at_every_effect() {
    sweep(Topology::Windows);
}

#[test]
fn a_job_of_two_speeds_survives_a_crash_at_every_effect() {
    sweep(Topology::TwoSpeeds);
}

#[test]
fn a_rebalanced_job_survives_a_crash_at_every_effect() {
    sweep(Topology::Rebalanced);
}

#[test]
fn a_job_of_three_tasks_survives_a_crash_at_every_effect() {
    sweep(Topology::Funnel);
}

#[test]
fn a_windowed_aggregate_in_sql_survives_a_crash_at_every_effect() {
    sweep(Topology::SqlWindows);
}

#[test]
fn a_join_in_sql_of_two_speeds_survives_a_crash_at_every_effect() {
    sweep(Topology::SqlJoin);
}

#[test]
fn a_running_aggregate_in_sql_survives_a_crash_at_every_effect() {
    sweep(Topology::SqlTotals);
}

#[test]
fn a_deduplication_in_sql_survives_a_crash_at_every_effect() {
    sweep(Topology::SqlLast);
}
