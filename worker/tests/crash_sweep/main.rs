//! The whole worker in one process, crashed at every effect that it has on the outside: before it, and after it with the
//! reply lost. Whatever the crash, the next run must bring the output to what it is without one: nothing lost, nothing
//! repeated, nothing out of order.
//!
//! Threads run as they please, so a run is not repeatable step by step; the points of the crash are, and they cover all.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test")]

mod jobs;
mod world;

use std::{sync::Arc, time::Duration};

use floodmark_snapshot::{Env, JobId, restore::Reference};
use floodmark_worker::{CheckpointMode, CheckpointSettings, Outcome, Progress, RunSpec, Summary, run};
use tokio::{runtime::Runtime, sync::watch};

use crate::{
    jobs::Job,
    world::{Connection, Crash, World},
};

/// A run without an end by then hangs.
const RUN_MAX: Duration = Duration::from_secs(30);
/// Runs after a crash that may crash again, at most.
const RUNS_MAX: usize = 4;

fn spec(job: Job, connection: &Arc<Connection>, parallelism: u32) -> RunSpec {
    RunSpec {
        job: JobId { namespace: "test".into(), name: "sweep".into(), uid: "1".into() },
        graph: job.graph(connection),
        parallelism,
        max_parallelism: 16,
        state: Default::default(),
        checkpoints: CheckpointSettings {
            mode: CheckpointMode::ExactlyOnce,
            interval: Duration::from_millis(2),
            timeout: Duration::from_secs(10),
            min_pause: Duration::ZERO,
            tolerable_failures: 0,
            retain: 2,
            ..CheckpointSettings::default()
        },
        storage: connection.clone(),
        restore: Reference::Latest,
        initial: None,
        allow_dropped_state: false,
        holder: "test:1".into(),
    }
}

/// Runs a process to its end, or until its connection is cut: then it is gone, whatever it was about to do.
fn process(runtime: &Runtime, job: Job, connection: &Arc<Connection>, parallelism: u32) -> Result<Summary, String> {
    let (_keep, stop) = watch::channel(false);
    runtime.block_on(async {
        let run = run(spec(job, connection, parallelism), Env::system(), stop, Arc::new(Progress::default()));
        tokio::select! {
            ended = tokio::time::timeout(RUN_MAX, run) => match ended {
                Ok(ended) => ended.map_err(|e| e.to_string()),
                Err(_) => panic!("{job:?} hangs"),
            },
            () = connection.cut() => Err("cut".to_owned()),
        }
    })
}

/// Runs processes until one gets to the end; `crashes` are those of the first, the second, …
fn sweep_one(runtime: &Runtime, job: Job, crashes: &[Crash], parallelism: impl Fn(usize) -> u32) {
    let world = World::new();
    for attempt in 0..=RUNS_MAX {
        let connection = world.connect(crashes.get(attempt).copied());
        match process(runtime, job, &connection, parallelism(attempt)) {
            Ok(summary) => {
                assert!(matches!(summary.outcome, Outcome::Finished | Outcome::AlreadyFinished), "{summary:?}");
                let faults = job.faults(&world.topic.records());
                assert!(faults.is_empty(), "{job:?} crashed at {crashes:?}: {faults}");
                return;
            }
            Err(error) => assert!(connection.is_cut(), "{job:?} crashed at {crashes:?}: failed by itself: {error}"),
        }
    }
    panic!("{job:?} crashed at {crashes:?}: no end after {RUNS_MAX} runs");
}

/// How many effects a run without a crash has.
fn effects(runtime: &Runtime, job: Job) -> u64 {
    let world = World::new();
    let connection = world.connect(None);
    let summary = process(runtime, job, &connection, 2).unwrap();
    assert_eq!(summary.outcome, Outcome::Finished);
    assert!(summary.last_epoch.unwrap().0 >= 5, "too few checkpoints to sweep: {:?}", summary.last_epoch);
    assert_eq!(job.faults(&world.topic.records()), "");
    connection.effects()
}

fn sweep(job: Job) {
    let runtime = Runtime::new().unwrap();
    let effects = effects(&runtime, job);
    for effect in 0..effects {
        for after in [false, true] {
            sweep_one(&runtime, job, &[Crash { effect, after }], |_| 2);
        }
    }
    eprintln!("{job:?}: crashed at each of {effects} effects, before and after");
}

#[test]
fn a_stateless_job_survives_a_crash_at_every_effect() {
    sweep(Job::Stateless);
}

#[test]
fn a_keyed_job_survives_a_crash_at_every_effect() {
    sweep(Job::Counted);
}

#[test]
fn a_job_of_two_speeds_survives_a_crash_at_every_effect() {
    sweep(Job::TwoSpeeds);
}

#[test]
fn crashes_in_a_row_and_a_change_of_parallelism_are_survived() {
    let runtime = Runtime::new().unwrap();
    let mut random = 0x9E37_79B9_7F4A_7C15_u64;
    let mut below = |n: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % n
    };
    for _ in 0..60 {
        let job = Job::ALL[below(3) as usize];
        let crashes: Vec<Crash> =
            (0..below(4) + 1).map(|_| Crash { effect: below(60), after: below(2) == 0 }).collect();
        let widths: Vec<u32> = (0..=RUNS_MAX).map(|_| [1, 2, 3, 4][below(4) as usize]).collect();
        eprintln!("{job:?} {crashes:?} at parallelism {widths:?}");
        sweep_one(&runtime, job, &crashes, |attempt| widths[attempt]);
    }
}
