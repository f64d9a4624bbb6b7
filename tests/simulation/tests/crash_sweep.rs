//! A job crashed at every effect that it has on the outside: before it, and after it with the reply lost. Whatever the crash,
//! the next process must bring the output to what it is without one: nothing lost, nothing repeated, nothing out of order.

use floodmark_simulation::{Crash, FIRST_WORKER, Options, Topology, crash};

const SEED: u64 = 1;

fn sweep(topology: Topology) {
    sweep_of(topology, 0, 1, Options::default());
}

/// Crashes one process, of a job with so many worker processes, at each of its effects.
fn sweep_of(topology: Topology, workers: u32, process: u32, options: Options) {
    let calm = crash(topology, workers, SEED, None, options);
    assert!(calm.violations.is_empty(), "{topology:?} without a crash: {:#?}", calm.violations);
    assert!(calm.counts["checkpoints completed"] >= 5, "too few checkpoints to sweep: {:?}", calm.counts);
    let effects = calm.effects.get(&process).copied().unwrap_or(0);
    // Workers share what one process would do alone.
    let least = if workers == 0 { 30 } else { 15 };
    assert!(effects > least, "too few effects to sweep: {:?}", calm.effects);
    for effect in 0..effects {
        for after in [false, true] {
            let at = Crash { process, effect, after };
            let report = crash(topology, workers, SEED, Some(at), options);
            assert!(report.violations.is_empty(), "{topology:?} crashed at {at:?}: {:#?}", report.violations);
            assert_eq!(report.counts["crashes"], 1, "{topology:?} did not crash at {at:?}");
        }
    }
    println!("{topology:?}: process {process} crashed at each of {effects} effects, before and after");
}

fn sweep_rescales(topology: Topology, workers: u32, process: u32) {
    let options = Options { rescales: true, ..Options::default() };
    let calm = crash(topology, workers, SEED, None, options);
    assert_eq!(calm.counts["rescales"], 2, "{topology:?}: {:?}", calm.counts);
    sweep_of(topology, workers, process, options);
}

#[test]
fn a_job_that_is_rescaled_survives_a_crash_at_every_effect() {
    sweep_rescales(Topology::Pipe, 0, 1);
    sweep_rescales(Topology::Funnel, 0, 1);
}

#[test]
fn a_windowed_job_that_is_rescaled_survives_a_crash_at_every_effect() {
    sweep_rescales(Topology::Windows, 0, 1);
    sweep_rescales(Topology::SqlWindows, 0, 1);
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

#[test]
fn a_job_of_three_processes_survives_a_crash_of_its_coordinator_at_every_effect() {
    sweep_of(Topology::Windows, 2, 1, Options::default());
    sweep_of(Topology::SqlTotals, 2, 1, Options::default());
}

#[test]
fn a_job_of_three_processes_survives_a_crash_of_a_worker_at_every_effect() {
    sweep_of(Topology::Windows, 2, FIRST_WORKER, Options::default());
    sweep_of(Topology::SqlTotals, 2, FIRST_WORKER, Options::default());
}

#[test]
fn a_job_of_three_processes_that_is_rescaled_survives_a_crash_of_any_at_every_effect() {
    sweep_rescales(Topology::Windows, 2, 1);
    sweep_rescales(Topology::Windows, 2, FIRST_WORKER + 1);
}
