//! The machine in a world where things go wrong.

mod world;

use floodmark_crds::{CheckpointMode, DeletionPolicy, DesiredState, JobState, Step, Timestamp, UpgradeMode};
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
    for sql in ["unfit 2", "badsql 2", "noimage 2", "badinput 2", "nobucket 2"] {
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
fn a_job_of_which_no_revision_fits_is_left_alone_and_says_so() {
    // What no longer fits runs for as long as nothing was saved.
    let mut world = running("unfit 1");
    world.edit(|spec| spec.sql = "ok 2".to_owned());
    world.stop();
    world.edit(|spec| spec.sql = "unfit 3".to_owned());
    world.settle();
    assert!(world.is("Stalled"), "{:#?}", world.status());
    let message = world.status().condition("Stalled").unwrap().message.clone();
    let why = "the key of the aggregate has changed";
    assert_eq!(message, format!("{why}; what ran before does not fit either: {why}"));
    assert!(world.status().last_run < 10, "it is not tried over and over: {}", world.tail());
    world.edit(|spec| spec.sql = "ok 4".to_owned());
    world.settle();
    assert_eq!((world.is("Ready"), world.leads()), (true, Some("ok 4")));
}

#[test]
fn a_run_has_the_pods_that_its_own_revision_asks_for() {
    let mut world = World::new(7, "ok 1");
    world.edit(|spec| {
        spec.parallelism = 4;
        spec.worker.spares = 1;
        spec.coordinator.standby = true;
    });
    world.settle();
    assert_eq!((world.run_numbers(), world.pods_of(1)), (vec![1], (2, 5)));
    // What is refused changes nothing of what runs.
    world.edit(|spec| {
        spec.sql = "unfit 2".to_owned();
        (spec.worker.slots, spec.worker.spares) = (4, 0);
        spec.coordinator.standby = false;
    });
    for _ in 0..100 {
        while world.pass() {}
        world.tick();
        assert_eq!((world.run_numbers(), world.pods_of(1)), (vec![1], (2, 5)), "{}", world.tail());
    }
    assert!(world.is("Stalled"));
    // What is rolled back has again what it had.
    world.edit(|spec| spec.sql = "crash 2".to_owned());
    world.settle();
    assert_eq!((world.leads(), world.run_numbers(), world.pods_of(4)), (Some("ok 1"), vec![4], (2, 5)));
    world.edit(|spec| spec.sql = "ok 3".to_owned());
    world.settle();
    assert_eq!((world.leads(), world.run_numbers(), world.pods_of(5)), (Some("ok 3"), vec![5], (1, 1)));
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
fn a_first_start_that_is_in_vain_is_told_at_once() {
    for (sql, reason) in [("badinput 1", "BadInput"), ("nobucket 1", "StorageUnusable")] {
        let mut world = World::new(7, sql);
        for _ in 0..30 {
            while world.pass() {}
            world.tick();
        }
        let status = world.status();
        let stalled = status.condition("Stalled").unwrap();
        assert!(world.is("Stalled"), "{status:#?}");
        assert_eq!(stalled.reason, reason);
        assert!(stalled.message.starts_with("pod of run 1: "), "{}", stalled.message);
        world.edit(|spec| spec.sql = "ok 2".to_owned());
        world.settle();
        assert!(world.is("Ready"), "{:#?}", world.status());
    }
}

#[test]
fn a_storage_that_is_out_of_reach_for_a_while_takes_no_upgrade_back() {
    let mut world = running("ok 1");
    world.edit(|spec| spec.sql = "ok 2".to_owned());
    let starting = |world: &World| world.status().operation.is_some_and(|o| o.step == Step::Starting);
    while !starting(&world) {
        world.pass();
        world.tick();
    }
    world.outage = true;
    // Two minutes.
    for _ in 0..170 {
        while world.pass() {}
        world.tick();
        assert!(starting(&world) && world.run_numbers().contains(&2), "{}", world.tail());
        assert!(!world.is("Stalled"), "{}", world.tail());
    }
    world.outage = false;
    world.settle();
    assert_eq!((world.is("Ready"), world.leads(), world.run_numbers()), (true, Some("ok 2"), vec![2]));
}

#[test]
fn a_check_that_nobody_can_make_is_tried_slower_and_slower_and_at_once_after_a_change() {
    let mut world = running("ok 1");
    world.hidden = true;
    world.edit(|spec| spec.sql = "ok 2".to_owned());
    world.asked.clear();
    let begun = world.now;
    let mut told = std::collections::BTreeSet::new();
    while world.now < begun + 600_000 {
        while world.pass() {}
        assert_eq!(world.leads(), Some("ok 1"));
        let soon = |at: Timestamp| at.millis() <= world.now + 60_000;
        assert!(world.is_asking() || world.wake.is_some_and(soon), "it is forgotten: {:?}", world.wake);
        told.extend(world.status().operation.map(|o| o.message).filter(|m| m.starts_with("since ")));
        world.tick();
    }
    let times: Vec<_> = world.asked.iter().map(|(at, _)| at - begun).collect();
    let gaps: Vec<_> = times.windows(2).map(|pair| (pair[1] - pair[0]) / 1_000).collect();
    assert!(gaps[0] < 8 && (60..70).contains(gaps.last().unwrap()), "{gaps:?}");
    assert!(gaps.windows(2).all(|pair| pair[1] >= pair[0].min(59)), "{gaps:?}");
    assert!((8..=16).contains(&times.len()), "{times:?}");
    let since = Timestamp::from_millis(begun);
    assert_eq!(Vec::from_iter(told), [format!("since {since} it is not known whether it fits: no answer")]);
    let events = |world: &World| world.trace.iter().filter(|line| line.trim().starts_with("NotChecked:")).count();
    assert_eq!(events(&world), 1, "{}", world.tail());
    // What the spec says now is asked at once.
    world.edit(|spec| spec.sql = "ok 3".to_owned());
    let before = world.asked.len();
    while world.pass() {}
    assert_eq!((world.asked.len(), world.asked.last().unwrap().0), (before + 1, world.now));
    world.hidden = false;
    world.settle();
    assert_eq!((world.is("Ready"), world.leads(), events(&world)), (true, Some("ok 3"), 1));
}

#[test]
fn without_a_savepoint_it_is_said_how_the_job_is() {
    for (fails, left) in [
        (true, "the job has failed: bad value. The job is left as it was, and does not run; to go on"),
        (false, "the job does not run. The job is left as it was, and does not run for now; to go on"),
    ] {
        let mut world = running("ok 1");
        world.edit(|spec| spec.sql = "ok 2".to_owned());
        let step = |world: &World| world.status().operation.map(|o| o.step);
        while step(&world) != Some(Step::Stopping) {
            world.pass();
            if step(&world) != Some(Step::Stopping) {
                world.tick();
            }
        }
        for _ in 0..1_000 {
            if fails {
                world.fail();
            } else {
                world.kill_leader();
            }
            while world.pass() {}
            world.tick();
            if world.status().refused.is_some() {
                break;
            }
        }
        let message = world.status().refused.unwrap().message;
        assert!(message.starts_with(&format!("there is no savepoint: {left}")), "{message}");
    }
}

#[test]
fn a_run_is_judged_by_how_its_own_revision_takes_checkpoints() {
    let without = |spec: &mut floodmark_crds::StreamJobSpec, mode| {
        spec.checkpoints.mode = mode;
        spec.upgrade.mode = UpgradeMode::Stateless;
    };
    for (first, second) in [
        (CheckpointMode::Disabled, CheckpointMode::ExactlyOnce),
        (CheckpointMode::ExactlyOnce, CheckpointMode::Disabled),
    ] {
        let mut world = World::new(7, "ok 1");
        world.edit(|spec| without(spec, first));
        world.settle();
        assert!(world.is("Ready"), "{:#?}", world.status());
        let epoch = world.epoch;
        assert_eq!(epoch > 0, first != CheckpointMode::Disabled);
        world.edit(|spec| {
            spec.sql = "crash 2".to_owned();
            without(spec, second);
        });
        while world.status().stable_run.is_none_or(|run| run.number != 3) {
            while world.pass() {}
            world.tick();
            assert!(world.status().condition("Stalled").unwrap().reason != "Timeout", "{}", world.tail());
        }
        assert_eq!((world.leads(), world.status().refused.unwrap().reason.as_str()), (Some("ok 1"), "RolledBack"));
        // One that takes checkpoints has shown that it works once it has taken one.
        assert_eq!(world.epoch > epoch, first != CheckpointMode::Disabled);
    }
}

#[test]
fn who_takes_no_checkpoints_is_told_how_to_upgrade_without_a_savepoint() {
    let mut world = World::new(7, "ok 1");
    world.edit(|spec| spec.checkpoints.mode = CheckpointMode::Disabled);
    world.settle();
    world.edit(|spec| {
        spec.sql = "ok 2".to_owned();
        spec.checkpoints.mode = CheckpointMode::ExactlyOnce;
    });
    world.settle();
    let refused = world.status().refused.unwrap();
    assert!(refused.message.contains("set spec.upgrade.mode to Stateless"), "{}", refused.message);
    assert_eq!(world.leads(), Some("ok 1"));
    world.edit(|spec| spec.upgrade.mode = UpgradeMode::Stateless);
    world.settle();
    assert_eq!((world.leads(), world.is("Ready")), (Some("ok 2"), true));
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
fn certificates_are_renewed_in_time_and_nothing_else_is_done() {
    let mut world = running("ok 1");
    let (writes, begun) = (world.writes, world.now);
    while world.now < begun + 4 * world::RENEWED_EVERY_MS {
        while world.pass() {}
        assert!(world.wake.is_some_and(|at| at.millis() <= world.now + world::RENEWED_EVERY_MS), "{:?}", world.wake);
        world.tick();
        // A newer checkpoint is told now and then, and nothing more.
        world.job.status.as_mut().unwrap().last_checkpoint = None;
    }
    assert_eq!((world.renewed, world.run_numbers(), world.leads()), (4, vec![1], Some("ok 1")), "{}", world.tail());
    assert!(world.starts.len() == 1 && world.writes >= writes + 4, "{}", world.tail());
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
    let kinds = ["ok", "ok", "ok", "ok", "unfit", "badsql", "noimage", "badinput", "nobucket", "crash", "fatal"];
    let mut world = World::new(seed, "ok 0");
    world.faults = 4 + world.random.below(30);
    let mut deleted = false;
    let mut losable = world.random.one_in(3);
    let mut unsaved = false;
    for step in 0..world.random.below(300) {
        for _ in 0..=world.random.below(4) {
            world.pass();
        }
        world.tick();
        if !world.random.one_in(12) {
            continue;
        }
        match world.random.below(14) {
            0 if world.random.one_in(2) => {
                let standby = world.random.one_in(2);
                let slots = 1 + u32::try_from(world.random.below(3)).unwrap();
                world.edit(|spec| (spec.coordinator.standby, spec.worker.slots) = (standby, slots));
            }
            0..=3 => {
                let kind = kinds[usize::try_from(world.random.below(11)).unwrap()];
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
            12 => world.hidden = world.random.one_in(2),
            13 => {
                let modes = [CheckpointMode::ExactlyOnce, CheckpointMode::AtLeastOnce, CheckpointMode::Disabled];
                let mode = modes[usize::try_from(world.random.below(3)).unwrap()];
                world.edit(|spec| spec.checkpoints.mode = mode);
                unsaved |= mode == CheckpointMode::Disabled;
            }
            11 if world.random.one_in(6) => {
                deleted = true;
                world.delete();
                break;
            }
            _ => {}
        }
    }
    (world.faults, world.hidden) = (0, false);
    world.settle();
    if !deleted && unsaved && world.status().refused.is_some() {
        // A job that takes no checkpoints is neither stopped with a savepoint nor rescaled; this it can always be told.
        world.edit(|spec| {
            spec.restart_nonce = Some(spec.restart_nonce.unwrap_or(0) + 1);
            spec.upgrade.mode = UpgradeMode::LastCheckpoint;
        });
        world.settle();
    }
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
