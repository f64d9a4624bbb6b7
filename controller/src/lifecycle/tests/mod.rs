//! The machine in a world where things go wrong.

mod world;

use floodmark_crds::{DeletionPolicy, DesiredState, JobState, UpgradeMode};
use kube::ResourceExt as _;

use self::world::World;

fn running(sql: &str) -> World {
    let mut world = World::new(7, sql);
    world.settle();
    assert!(world.is("Ready"), "{:#?}", world.status());
    world
}

#[test]
fn a_job_is_deployed_and_a_second_pass_does_nothing() {
    let mut world = running("ok 1");
    assert_eq!((world.leads(), world.run_numbers()), (Some("ok 1"), vec![1]));
    let writes = world.writes;
    for _ in 0..5 {
        assert!(!world.pass());
    }
    assert_eq!(world.writes, writes);
    assert_eq!(world.status().state, JobState::Running);
}

#[test]
fn an_upgrade_stops_with_a_savepoint_and_goes_on_from_it() {
    let mut world = running("ok 1");
    world.edit(|spec| spec.sql = "ok 2".to_owned());
    assert!(!world.is("Ready"), "a Ready of the generation before is stale");
    world.settle();
    assert!(world.is("Ready"));
    assert_eq!((world.leads(), world.run_numbers()), (Some("ok 2"), vec![2]));
    let restored = world.status().restored_from.unwrap();
    assert!(restored.source.starts_with("savepoint upgrade-2-"), "{restored:?}");
    assert_eq!(restored.mode, UpgradeMode::Savepoint);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_stops() {
    for sql in ["unfit 2", "badsql 2", "noimage 2"] {
        let mut world = running("ok 1");
        world.edit(|spec| spec.sql = sql.to_owned());
        let before = world.starts.len();
        for _ in 0..400 {
            while world.pass() {}
            world.tick();
            assert_eq!(world.leads(), Some("ok 1"), "{sql}\n{}", world.tail());
        }
        assert!(world.is("Stalled") && !world.is("Ready"), "{sql}");
        assert_eq!((world.starts.len(), world.run_numbers()), (before, vec![1]), "{sql}");
        // What is wanted after all is what runs: nothing has to be done.
        world.edit(|spec| spec.sql = "ok 1".to_owned());
        world.settle();
        assert!(world.is("Ready"), "{:#?}", world.status());
        assert_eq!(world.run_numbers(), vec![1]);
    }
}

#[test]
fn what_fails_is_rolled_back_and_tried_again_only_when_told_to() {
    for sql in ["crash 2", "fatal 2"] {
        for mode in [UpgradeMode::Savepoint, UpgradeMode::LastCheckpoint, UpgradeMode::Stateless] {
            let mut world = running("ok 1");
            world.edit(|spec| {
                spec.sql = sql.to_owned();
                spec.upgrade.mode = mode;
            });
            world.settle();
            assert!(world.is("Stalled") && world.is("Running"), "{sql} {mode:?}: {:#?}", world.status());
            assert_eq!(world.leads(), Some("ok 1"));
            assert_eq!(world.status().refused.unwrap().reason, "RolledBack");
            let (run, words, _) = world.starts.last().unwrap().clone();
            assert_eq!((run, world.run_numbers()), (3, vec![3]));
            match mode {
                UpgradeMode::Stateless => assert!(words.parse::<u64>().is_ok(), "{words}"),
                UpgradeMode::Savepoint | UpgradeMode::LastCheckpoint => assert_eq!(words, "latest"),
            }
            world.edit(|spec| spec.restart_nonce = Some(1));
            world.settle();
            assert_eq!(world.run_numbers(), vec![5], "it was tried once more");
            world.edit(|spec| spec.sql = "ok 3".to_owned());
            world.settle();
            assert!(world.is("Ready"));
        }
    }
}

#[test]
fn a_crash_looping_job_is_upgraded_from_its_last_checkpoint_when_told_to() {
    let mut world = running("ok 1");
    // It can't take a savepoint any more.
    world.edit(|spec| spec.sql = "ok 2".to_owned());
    world.faults = 0;
    for _ in 0..300 {
        world.kill_leader();
        while world.pass() {}
        world.tick();
    }
    assert!(world.starts.iter().all(|(_, words, _)| words == "latest"));
    let message = world.status().operation.map_or_else(|| world.status().refused.unwrap().message, |o| o.message);
    assert!(message.contains("does not run") || message.contains("LastCheckpoint"), "{message}");
    world.edit(|spec| spec.upgrade.mode = UpgradeMode::LastCheckpoint);
    world.settle();
    assert!(world.is("Ready"), "{:#?}", world.status());
    assert_eq!(world.leads(), Some("ok 2"));
    assert_eq!(world.status().restored_from.unwrap().mode, UpgradeMode::LastCheckpoint);
}

#[test]
fn a_rescale_keeps_the_run() {
    let mut world = running("ok 1");
    for parallelism in [4, 1, 3] {
        world.edit(|spec| spec.parallelism = parallelism);
        world.settle();
        assert!(world.is("Ready"), "{:#?}", world.status());
        assert_eq!((world.status().parallelism, world.run_numbers()), (parallelism, vec![1]));
    }
}

#[test]
fn a_suspended_job_goes_on_where_it_stopped() {
    let mut world = running("ok 1");
    world.edit(|spec| spec.desired_state = DesiredState::Suspended);
    world.settle();
    assert_eq!((world.status().state, world.run_numbers(), world.holder), (JobState::Suspended, vec![], None));
    let epoch = world.epoch;
    world.edit(|spec| {
        spec.desired_state = DesiredState::Running;
        spec.sql = "ok 2".to_owned();
        spec.parallelism = 5;
    });
    world.settle();
    assert_eq!((world.leads(), world.starts.last().unwrap()), (Some("ok 2"), &(2, "latest".to_owned(), epoch)));
    assert_eq!(world.status().parallelism, 5);
}

#[test]
fn a_deleted_job_leaves_what_it_shall_leave() {
    for (policy, deleted) in [(DeletionPolicy::Retain, false), (DeletionPolicy::Delete, true)] {
        let mut world = running("ok 1");
        world.edit(|spec| spec.checkpoints.on_delete = policy);
        world.delete();
        world.settle();
        assert!(world.gone && world.run_numbers().is_empty());
        assert_eq!(world.state_deleted, deleted);
    }
}

#[test]
fn a_job_deleted_before_anything_was_done_is_gone() {
    let mut world = World::new(1, "ok 1");
    world.delete();
    assert!(world.gone && !world.pass());
    let mut world = World::new(1, "ok 1");
    world.pass();
    assert_eq!(world.job.finalizers().len(), 1);
    world.delete();
    world.settle();
    assert!(world.gone);
}

#[test]
fn a_job_whose_status_is_lost_is_known_again() {
    let mut world = running("ok 1");
    world.edit(|spec| spec.restart_nonce = Some(3));
    world.settle();
    let starts = world.starts.clone();
    world.lose_status();
    world.settle();
    assert!(world.is("Ready"), "{:#?}", world.status());
    assert_eq!(world.starts, starts, "nothing was started again");
    world.lose_status();
    world.lose_lease();
    world.settle();
    assert!(world.is("Ready"), "{:#?}", world.status());
    assert_eq!(world.starts, starts);
}

#[test]
fn state_that_the_spec_names_is_restored_once() {
    let mut world = running("ok 1");
    world.edit(|spec| {
        spec.restore.from = Some("s3://there/savepoint".to_owned());
        spec.restore.nonce = Some(1);
    });
    world.settle();
    assert_eq!(world.starts.last().unwrap().1, "s3://there/savepoint");
    world.edit(|spec| spec.sql = "ok 2".to_owned());
    world.settle();
    assert_eq!(world.starts.last().unwrap().1, "latest");
    assert!(world.is("Ready"));
}

/// Random edits, crashes, lost replies and conflicts; then quiet.
fn life(seed: u64) {
    let kinds = ["ok", "ok", "ok", "unfit", "badsql", "noimage", "crash", "fatal"];
    let mut world = World::new(seed, "ok 0");
    world.faults = 4 + world.random.below(30);
    let mut deleted = false;
    let mut losable = world.random.one_in(3);
    for step in 0..world.random.below(300) {
        for _ in 0..=world.random.below(4) {
            world.pass();
        }
        world.tick();
        if !world.random.one_in(12) {
            continue;
        }
        match world.random.below(12) {
            0..=3 => {
                let kind = kinds[usize::try_from(world.random.below(8)).unwrap()];
                let sql = format!("{kind} {step}");
                world.edit(|spec| spec.sql = sql);
            }
            4 => {
                let parallelism = 1 + u32::try_from(world.random.below(6)).unwrap();
                world.edit(|spec| spec.parallelism = parallelism);
            }
            5 => {
                let suspended = world.random.one_in(2);
                let state = if suspended { DesiredState::Suspended } else { DesiredState::Running };
                world.edit(|spec| spec.desired_state = state);
            }
            6 => world.edit(|spec| spec.restart_nonce = Some(spec.restart_nonce.unwrap_or(0) + 1)),
            7 => {
                let modes = [UpgradeMode::Savepoint, UpgradeMode::LastCheckpoint, UpgradeMode::Stateless];
                let mode = modes[usize::try_from(world.random.below(3)).unwrap()];
                world.edit(|spec| spec.upgrade.mode = mode);
            }
            8 => world.kill_leader(),
            9 => world.kill_controller(),
            10 if losable => {
                losable = false;
                world.lose_status();
            }
            11 if world.random.one_in(6) => {
                deleted = true;
                world.delete();
                break;
            }
            _ => {}
        }
    }
    world.faults = 0;
    world.settle();
    let tail = world.tail();
    if deleted {
        assert!(world.gone && world.run_numbers().is_empty(), "{tail}");
        return;
    }
    let spec = world.job.spec.clone();
    let suspended = spec.desired_state == DesiredState::Suspended;
    if suspended {
        assert!(world.is("Ready") || world.is("Stalled"), "{tail}");
    } else if spec.sql.starts_with("ok") {
        assert!(world.is("Ready"), "{:#?}\n{tail}", world.status());
        assert_eq!(world.leads(), Some(spec.sql.as_str()), "{tail}");
        assert_eq!(world.report().unwrap().parallelism, spec.parallelism, "{tail}");
    } else {
        assert!(!world.is("Ready") || world.leads() == Some(spec.sql.as_str()), "{tail}");
    }
    let run = world.status().run.map(|r| r.number);
    assert_eq!(world.run_numbers(), run.into_iter().collect::<Vec<_>>(), "orphans\n{tail}");
    // Its newest checkpoint may be due to be told.
    world.pass();
    for _ in 0..3 {
        let writes = world.writes;
        assert!(!world.pass() && world.writes == writes, "a second pass writes\n{}", world.tail());
    }
}

#[test]
fn random_lives_come_to_rest_as_the_spec_says() {
    let lives = std::env::var("LIVES").ok().and_then(|n| n.parse().ok()).unwrap_or(1_000);
    let first = std::env::var("LIFE").ok().and_then(|n| n.parse().ok());
    for seed in first.map_or(0..lives, |seed| seed..seed + 1) {
        let lived = std::panic::catch_unwind(|| life(seed));
        assert!(lived.is_ok(), "seed {seed}");
    }
}
