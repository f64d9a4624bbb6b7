//! The machine, driven by hand.

use expect_test::{Expect, expect};

use super::*;
use crate::{Attempt, Generation, JobId, ShardKind};

const A: Subtask = Subtask { task: 0, index: 0 };
const B: Subtask = Subtask { task: 1, index: 0 };

const SECOND: Duration = Duration::from_secs(1);
const SCHEDULE: Schedule = Schedule {
    interval: Duration::from_secs(10),
    timeout: Duration::from_secs(60),
    min_pause: Duration::from_secs(2),
    tolerable_failures: 1,
    max_concurrent: 1,
    unaligned_after: None,
};
/// Two checkpoints at once.
const PIPELINED: Schedule = Schedule { min_pause: Duration::ZERO, max_concurrent: 2, ..SCHEDULE };

fn machine(committers: &[usize], start: StartingPoint) -> Coordinator {
    scheduled(SCHEDULE, committers, start)
}

fn scheduled(schedule: Schedule, committers: &[usize], start: StartingPoint) -> Coordinator {
    let who = Participants {
        subtasks: [A, B].into(),
        sources: [A].into(),
        committers: committers.iter().copied().collect(),
        job: JobId { namespace: "n".into(), name: "j".into(), uid: "u".into() },
        generation: Generation(1),
        attempt: Attempt(1),
        max_parallelism: 128,
        plan: "p".into(),
        origin: None,
        rescaled: None,
    };
    Coordinator::new(schedule, who, start, Time::default())
}

fn parts(epoch: u64, subtask: Subtask) -> Vec<(OperatorUid, OperatorSnapshot)> {
    let shard = Shard { subtask: subtask.index, ..Shard::new(format!("{epoch}-{subtask}"), ShardKind::Keyed) };
    vec![("op".into(), OperatorSnapshot { shards: vec![shard], ..OperatorSnapshot::default() })]
}

/// Events: `tick`, `restored`, `ack a 1`, `decline b 1`, `exhausted`, `appended`, `committed <committer> <epoch>`, `stop`, `rescale`, `move`, `savepoint 7`
/// (`and stop`, `and drain`), `exported 1`; `@12 tick` sets the clock to 12 s first.
fn check(mut machine: Coordinator, events: &[&str], expected: Expect) {
    let mut now = Time::default();
    let mut lines = String::new();
    for line in events {
        let mut words: Vec<&str> = line.split(' ').collect();
        if let Some(seconds) = words[0].strip_prefix('@') {
            now.monotonic = SECOND.mul_f64(seconds.parse().unwrap());
            words.remove(0);
        }
        let subtask = |name: &str| if name == "a" { A } else { B };
        let epoch = |number: &str| Epoch(number.parse().unwrap());
        let event = match words[..] {
            ["tick"] => Event::Tick,
            ["restored"] => Event::Restored,
            ["ack", who, n] => {
                Event::Acknowledged { epoch: epoch(n), subtask: subtask(who), parts: parts(epoch(n).0, subtask(who)) }
            }
            ["decline", who, n] => {
                Event::Declined { epoch: epoch(n), subtask: subtask(who), reason: "disk full".into() }
            }
            ["exhausted"] => Event::Exhausted(A),
            ["appended"] => Event::Appended,
            ["committed", who, n] => Event::Committed { committer: who.parse().unwrap(), epoch: epoch(n) },
            ["stop"] => Event::StopRequested,
            ["rescale"] => Event::RescaleRequested { rescaled: Some(Rescaled { spec: 1, to: 2 }), prepared: false },
            ["move"] => Event::RescaleRequested { rescaled: None, prepared: true },
            ["savepoint", id, ref then @ ..] => Event::SavepointRequested {
                id: SavepointId(id.parse().unwrap()),
                then: match then {
                    [] => BarrierKind::Checkpoint,
                    ["and", "stop"] => BarrierKind::Stop,
                    ["and", "drain"] => BarrierKind::Drain,
                    _ => panic!("{line}"),
                },
            },
            ["exported", n] => Event::Exported(epoch(n)),
            _ => panic!("{line}"),
        };
        let decisions: Vec<_> = machine.step(event, now).iter().map(ToString::to_string).collect();
        lines += &format!("{line} -> {}\n", decisions.join("; "));
    }
    expected.assert_eq(&lines);
}

#[test]
fn a_checkpoint_completes_once_all_have_acknowledged_and_is_then_announced() {
    check(
        machine(&[], StartingPoint::default()),
        &["@9 tick", "@10 tick", "ack a 1", "ack a 1", "@11 ack b 1", "appended", "@19 tick", "@20 tick"],
        expect![[r#"
            @9 tick -> 
            @10 tick -> trigger 1
            ack a 1 -> 
            ack a 1 -> 
            @11 ack b 1 -> append completed 1
            appended -> announce 1; settled 1
            @19 tick -> 
            @20 tick -> trigger 2
        "#]],
    );
}

#[test]
fn the_next_epoch_waits_until_every_sink_has_committed() {
    check(
        machine(&[7, 8], StartingPoint::default()),
        &[
            "@10 tick",
            "ack a 1",
            "ack b 1",
            "appended",
            "committed 7 1",
            "@30 tick",
            "committed 8 1",
            "appended",
            "@32 tick",
        ],
        expect![[r#"
            @10 tick -> trigger 1
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1
            committed 7 1 -> 
            @30 tick -> 
            committed 8 1 -> append committed 1
            appended -> settled 1
            @32 tick -> trigger 2
        "#]],
    );
}

#[test]
fn what_a_restored_checkpoint_staged_is_committed_before_anything_is_triggered() {
    let start = StartingPoint { restored: Some(Epoch(5)), last_epoch: Epoch(9) };
    check(
        machine(&[7], start),
        &["@50 tick", "committed 7 4", "committed 7 5", "appended", "@52 tick"],
        expect![[r#"
            @50 tick -> 
            committed 7 4 -> 
            committed 7 5 -> append committed 5
            appended -> settled 5
            @52 tick -> trigger 10
        "#]],
    );
    check(
        scheduled(PIPELINED, &[7, 8], start),
        &["@50 tick", "committed 7 5", "@51 tick", "committed 8 5", "appended", "@61 tick"],
        expect![[r#"
            @50 tick -> 
            committed 7 5 -> 
            @51 tick -> 
            committed 8 5 -> append committed 5
            appended -> settled 5; trigger 10
            @61 tick -> trigger 11
        "#]],
    );
}

#[test]
fn what_has_waited_since_before_a_restore_waits_for_no_interval() {
    let start = StartingPoint { restored: Some(Epoch(5)), last_epoch: Epoch(9) };
    check(
        scheduled(PIPELINED, &[7], start),
        &["@1 tick", "@1.5 restored", "committed 7 5", "appended", "@11 tick", "@11.5 tick"],
        expect![[r#"
            @1 tick -> 
            @1.5 restored -> 
            committed 7 5 -> append committed 5
            appended -> settled 5; trigger 10
            @11 tick -> 
            @11.5 tick -> trigger 11
        "#]],
    );
    check(
        machine(&[7], start),
        &["committed 7 5", "appended", "@1 tick", "restored", "@2 tick"],
        expect![[r#"
            committed 7 5 -> append committed 5
            appended -> settled 5
            @1 tick -> 
            restored -> 
            @2 tick -> trigger 10
        "#]],
    );
    check(
        machine(&[], start),
        &["@1 restored", "@9 tick", "@10 tick"],
        expect![[r#"
            @1 restored -> 
            @9 tick -> 
            @10 tick -> trigger 10
        "#]],
    );
}

#[test]
fn the_end_of_all_input_brings_a_last_checkpoint_and_then_the_end() {
    check(
        machine(&[7], StartingPoint::default()),
        &["@3 exhausted", "ack a 1", "ack b 1", "appended", "committed 7 1", "appended", "appended"],
        expect![[r#"
            @3 exhausted -> trigger 1 and stop
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1
            committed 7 1 -> append committed 1
            appended -> settled 1; append finished 1
            appended -> done: finished
        "#]],
    );
}

#[test]
fn a_stop_waits_for_the_checkpoint_under_way() {
    check(
        machine(&[], StartingPoint::default()),
        &["@10 tick", "stop", "ack a 1", "ack b 1", "appended", "ack a 2", "ack b 2", "appended", "appended"],
        expect![[r#"
            @10 tick -> trigger 1
            stop -> 
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1; settled 1; trigger 2 and stop
            ack a 2 -> 
            ack b 2 -> append completed 2
            appended -> announce 2; settled 2; append stopped 2
            appended -> done: stopped
        "#]],
    );
}

#[test]
fn an_aborted_epoch_is_never_used_again_and_its_late_acknowledgements_are_ignored() {
    check(
        machine(&[], StartingPoint::default()),
        &["@10 tick", "ack a 1", "decline b 1", "decline a 1", "ack b 1", "@20 tick", "ack b 1", "@80 tick"],
        expect![[r#"
            @10 tick -> trigger 1
            ack a 1 -> 
            decline b 1 -> abort 1 (declined by 1.0: disk full), delete ["1-0.0"]
            decline a 1 -> 
            ack b 1 -> delete ["1-1.0"]
            @20 tick -> trigger 2
            ack b 1 -> 
            @80 tick -> abort 2 (timed out after 60 s, 2 of 2 subtasks missing), delete []; fail: checkpoint 2 failed, the 2. in a row (tolerable: 1): timed out after 60 s, 2 of 2 subtasks missing
        "#]],
    );
}

#[test]
fn a_failed_last_checkpoint_fails_the_job() {
    check(
        machine(&[], StartingPoint::default()),
        &["stop", "decline a 1"],
        expect![[r#"
        stop -> trigger 1 and stop
        decline a 1 -> abort 1 (declined by 0.0: disk full), delete []; fail: the last checkpoint (1) failed: declined by 0.0: disk full
    "#]],
    );
}

#[test]
fn a_job_that_can_not_stop_with_a_savepoint_goes_on() {
    check(
        machine(&[], StartingPoint::default()),
        &["savepoint 5 and stop", "decline a 1"],
        expect![[r#"
            savepoint 5 and stop -> trigger 1 for a savepoint and stop
            decline a 1 -> abort 1 (declined by 0.0: disk full), delete []; refuse savepoint 5: declined by 0.0: disk full; restart: the last checkpoint (1) failed: declined by 0.0: disk full
        "#]],
    );
}

#[test]
fn two_checkpoints_may_be_under_way_and_complete_in_order() {
    check(
        scheduled(PIPELINED, &[], StartingPoint::default()),
        &["@10 tick", "@20 tick", "@30 tick", "ack a 2", "ack a 1", "ack b 1", "appended", "ack b 2", "appended"],
        expect![[r#"
            @10 tick -> trigger 1
            @20 tick -> trigger 2
            @30 tick -> 
            ack a 2 -> 
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1; settled 1; trigger 3
            ack b 2 -> append completed 2
            appended -> announce 2; settled 2
        "#]],
    );
}

#[test]
fn a_checkpoint_that_a_later_one_overtakes_is_given_up_and_counts_not_as_failed() {
    check(
        scheduled(Schedule { tolerable_failures: 0, ..PIPELINED }, &[], StartingPoint::default()),
        &["@10 tick", "ack a 1", "@20 tick", "ack a 2", "ack b 2", "appended", "ack b 1", "ack b 1"],
        expect![[r#"
            @10 tick -> trigger 1
            ack a 1 -> 
            @20 tick -> trigger 2
            ack a 2 -> 
            ack b 2 -> give up 1 (overtaken by checkpoint 2), delete ["1-0.0"]; append completed 2
            appended -> announce 2; settled 2
            ack b 1 -> delete ["1-1.0"]
            ack b 1 -> 
        "#]],
    );
}

#[test]
fn an_uncommitted_checkpoint_counts_as_under_way_and_one_confirmation_may_settle_several() {
    check(
        scheduled(PIPELINED, &[7, 8], StartingPoint::default()),
        &[
            "@10 tick",
            "ack a 1",
            "ack b 1",
            "appended",
            "@20 tick",
            "committed 7 1",
            "@30 tick",
            "ack a 2",
            "ack b 2",
            "appended",
            "@40 tick",
            "committed 7 2",
            "committed 8 2",
            "appended",
            "committed 8 1",
        ],
        expect![[r#"
            @10 tick -> trigger 1
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1
            @20 tick -> trigger 2
            committed 7 1 -> 
            @30 tick -> 
            ack a 2 -> 
            ack b 2 -> append completed 2
            appended -> announce 2
            @40 tick -> 
            committed 7 2 -> 
            committed 8 2 -> append committed 2
            appended -> settled 1; settled 2; trigger 3
            committed 8 1 -> 
        "#]],
    );
}

#[test]
fn a_slow_checkpoint_goes_on_unaligned_once_and_only_if_it_is_an_ordinary_one() {
    let schedule = Schedule { unaligned_after: Some(3 * SECOND), ..SCHEDULE };
    check(
        scheduled(schedule, &[], StartingPoint::default()),
        &["@10 tick", "@12 tick", "@13 tick", "@14 tick", "ack a 1", "ack b 1", "appended", "savepoint 1", "@30 tick"],
        expect![[r#"
            @10 tick -> trigger 1
            @12 tick -> 
            @13 tick -> unalign 1
            @14 tick -> 
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1; settled 1
            savepoint 1 -> trigger 2 for a savepoint
            @30 tick -> 
        "#]],
    );
    check(
        scheduled(Schedule { unaligned_after: Some(Duration::ZERO), ..SCHEDULE }, &[], StartingPoint::default()),
        &["@10 tick", "@11 tick"],
        expect![[r#"
            @10 tick -> trigger 1; unalign 1
            @11 tick -> 
        "#]],
    );
}

#[test]
fn a_savepoint_is_taken_at_once_committed_and_then_exported() {
    check(
        machine(&[7], StartingPoint::default()),
        &[
            "@1 savepoint 5",
            "savepoint 6",
            "ack a 1",
            "ack b 1",
            "appended",
            "committed 7 1",
            "appended",
            "exported 1",
            "ack a 2",
            "ack b 2",
            "appended",
            "committed 7 2",
            "appended",
            "exported 2",
            "@11 tick",
        ],
        expect![[r#"
            @1 savepoint 5 -> trigger 1 for a savepoint
            savepoint 6 -> 
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1
            committed 7 1 -> append committed 1
            appended -> export 1 for savepoint 5; settled 1; trigger 2 for a savepoint
            exported 1 -> 
            ack a 2 -> 
            ack b 2 -> append completed 2
            appended -> announce 2
            committed 7 2 -> append committed 2
            appended -> export 2 for savepoint 6; settled 2
            exported 2 -> 
            @11 tick -> trigger 3
        "#]],
    );
}

#[test]
fn a_savepoint_waits_for_the_checkpoint_under_way() {
    check(
        machine(&[], StartingPoint::default()),
        &["@10 tick", "savepoint 5", "savepoint 6", "ack a 1", "ack b 1", "appended", "@20 tick"],
        expect![[r#"
            @10 tick -> trigger 1
            savepoint 5 -> 
            savepoint 6 -> 
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1; settled 1; trigger 2 for a savepoint
            @20 tick -> 
        "#]],
    );
}

#[test]
fn a_job_that_stops_with_a_savepoint_ends_when_it_is_exported() {
    check(
        machine(&[7], StartingPoint::default()),
        &[
            "savepoint 5 and drain",
            "ack a 1",
            "savepoint 6",
            "ack b 1",
            "appended",
            "savepoint 7",
            "committed 7 1",
            "appended",
            "exported 1",
            "appended",
        ],
        expect![[r#"
            savepoint 5 and drain -> trigger 1 for a savepoint, drain and stop
            ack a 1 -> 
            savepoint 6 -> refuse savepoint 6: the job is ending already
            ack b 1 -> append completed 1
            appended -> announce 1
            savepoint 7 -> refuse savepoint 7: the job is ending already
            committed 7 1 -> append committed 1
            appended -> export 1 for savepoint 5; settled 1
            exported 1 -> append stopped 1
            appended -> done: stopped
        "#]],
    );
}

#[test]
fn a_savepoint_that_fails_is_refused_and_fails_no_job() {
    check(
        scheduled(Schedule { tolerable_failures: 0, ..SCHEDULE }, &[], StartingPoint::default()),
        &["savepoint 5", "decline a 1", "ack b 1", "@10 tick", "ack a 2"],
        expect![[r#"
            savepoint 5 -> trigger 1 for a savepoint
            decline a 1 -> abort 1 (declined by 0.0: disk full), delete []; refuse savepoint 5: declined by 0.0: disk full
            ack b 1 -> delete ["1-1.0"]
            @10 tick -> trigger 2
            ack a 2 -> 
        "#]],
    );
}

#[test]
fn a_savepoint_wanted_at_the_end_of_all_input_is_the_last_checkpoint() {
    check(
        machine(&[], StartingPoint::default()),
        &[
            "@10 tick",
            "exhausted",
            "savepoint 5",
            "ack a 1",
            "ack b 1",
            "appended",
            "ack a 2",
            "ack b 2",
            "appended",
            "exported 2",
            "appended",
        ],
        expect![[r#"
            @10 tick -> trigger 1
            exhausted -> 
            savepoint 5 -> 
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1; settled 1; trigger 2 for a savepoint and stop
            ack a 2 -> 
            ack b 2 -> append completed 2
            appended -> announce 2; export 2 for savepoint 5; settled 2
            exported 2 -> append finished 2
            appended -> done: finished
        "#]],
    );
}

#[test]
fn files_that_come_late_for_an_aborted_checkpoint_are_deleted_once() {
    check(
        machine(&[], StartingPoint::default()),
        &["@10 tick", "ack a 1", "@70 tick", "ack b 1", "ack b 1", "ack a 1"],
        expect![[r#"
            @10 tick -> trigger 1
            ack a 1 -> 
            @70 tick -> abort 1 (timed out after 60 s, 1 of 2 subtasks missing), delete ["1-0.0"]
            ack b 1 -> delete ["1-1.0"]
            ack b 1 -> 
            ack a 1 -> 
        "#]],
    );
}

#[test]
fn deadlines_are_those_of_triggers_timeouts_and_overtaking() {
    let mut machine = scheduled(Schedule { unaligned_after: Some(SECOND), ..SCHEDULE }, &[], StartingPoint::default());
    let at = |seconds: u32| Time { monotonic: seconds * SECOND, wall_ms: 0 };
    assert_eq!(machine.deadline(), Some(10 * SECOND));
    machine.step(Event::Tick, at(10));
    assert_eq!(machine.deadline(), Some(11 * SECOND));
    machine.step(Event::Tick, at(11));
    assert_eq!(machine.deadline(), Some(70 * SECOND));
    machine.step(Event::Tick, at(70));
    assert_eq!(machine.deadline(), Some(72 * SECOND), "the least pause after the abort");
}

#[test]
fn behind_a_savepoint_checkpoints_go_on_from_the_one_before_it_whose_files_are_kept() {
    let mut machine = machine(&[], StartingPoint::default());
    let mut now = Time::default();
    let mut step = |machine: &mut Coordinator, seconds: u32, event| {
        now.monotonic = SECOND * seconds;
        drop(machine.step(event, now));
    };
    let complete = |machine: &mut Coordinator, seconds, epoch, step: &mut dyn FnMut(&mut Coordinator, u32, Event)| {
        for subtask in [A, B] {
            step(machine, seconds, Event::Acknowledged { epoch: Epoch(epoch), subtask, parts: parts(epoch, subtask) });
        }
        step(machine, seconds, Event::Appended);
    };
    step(&mut machine, 10, Event::Tick);
    complete(&mut machine, 11, 1, &mut step);
    step(&mut machine, 12, Event::SavepointRequested { id: SavepointId(7), then: BarrierKind::Checkpoint });
    complete(&mut machine, 13, 2, &mut step);
    step(&mut machine, 14, Event::Exported(Epoch(2)));
    assert!(machine.pinned().any(|e| e == Epoch(1)), "{machine:?}");
    step(&mut machine, 30, Event::Tick);
    assert_eq!(machine.base(Epoch(3)), Some(Epoch(1)));
    complete(&mut machine, 31, 3, &mut step);
    assert_eq!(machine.pinned().collect::<Vec<_>>(), [Epoch(3)]);
}

#[test]
fn all_that_a_checkpoint_under_way_may_name_again_stays() {
    let mut machine = scheduled(PIPELINED, &[], StartingPoint::default());
    let at = |seconds: u32| Time { monotonic: seconds * SECOND, wall_ms: 0 };
    let acknowledged = |epoch, subtask| Event::Acknowledged { epoch: Epoch(epoch), subtask, parts: Vec::new() };
    machine.step(Event::Tick, at(10));
    machine.step(Event::Tick, at(20));
    machine.step(acknowledged(1, A), at(21));
    machine.step(acknowledged(1, B), at(21));
    machine.step(Event::Appended, at(21));
    // Checkpoint 2 went out before any was complete, and its tasks may have heard of checkpoint 1 since.
    assert_eq!(machine.base(Epoch(2)), Some(Epoch(0)));
    assert_eq!(machine.pinned().min(), Some(Epoch(0)));
    machine.step(acknowledged(2, A), at(22));
    machine.step(acknowledged(2, B), at(22));
    machine.step(Event::Appended, at(22));
    assert_eq!((machine.base(Epoch(2)), machine.pinned().min()), (None, Some(Epoch(2))));
}

#[test]
fn a_rescale_takes_a_checkpoint_while_the_job_runs_and_another_to_end_the_attempt() {
    check(
        machine(&[7], StartingPoint::default()),
        &[
            "rescale",
            "ack a 1",
            "ack b 1",
            "appended",
            "committed 7 1",
            "appended",
            "ack a 2",
            "@30 tick",
            "ack b 2",
            "appended",
            "committed 7 2",
            "appended",
        ],
        expect![[r#"
            rescale -> trigger 1
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1
            committed 7 1 -> append committed 1
            appended -> settled 1; trigger 2 and stop
            ack a 2 -> 
            @30 tick -> 
            ack b 2 -> append completed 2
            appended -> announce 2
            committed 7 2 -> append committed 2
            appended -> settled 2; done: rescaled
        "#]],
    );
}

#[test]
fn the_last_checkpoint_before_a_rescale_says_at_which_parallelism_the_job_goes_on() {
    let chosen = |machine: &mut Coordinator, epoch: u64| {
        let mut said = None;
        for subtask in [A, B] {
            let event = Event::Acknowledged { epoch: Epoch(epoch), subtask, parts: Vec::new() };
            for decision in machine.step(event, Time::default()) {
                if let Decision::Append(LogEvent::Completed { manifest }) = decision {
                    said = Some(manifest.rescaled);
                }
            }
        }
        machine.step(Event::Appended, Time::default());
        said.unwrap()
    };
    let to = Some(Rescaled { spec: 1, to: 2 });
    let mut machine = machine(&[], StartingPoint::default());
    machine.who.rescaled = Some(Rescaled { spec: 1, to: 3 });
    machine.step(Event::RescaleRequested { rescaled: to, prepared: false }, Time::default());
    assert_eq!(chosen(&mut machine, 1), machine.who.rescaled);
    assert_eq!(chosen(&mut machine, 2), to);
}

#[test]
fn a_rescale_waits_for_what_is_under_way_and_behind_savepoints() {
    check(
        scheduled(PIPELINED, &[], StartingPoint::default()),
        &[
            "@10 tick",
            "savepoint 5",
            "rescale",
            "@20 tick",
            "ack a 1",
            "ack b 1",
            "appended",
            "ack a 2",
            "ack b 2",
            "appended",
            "ack a 3",
            "ack b 3",
            "appended",
            "@40 tick",
            "exported 2",
        ],
        expect![[r#"
            @10 tick -> trigger 1
            savepoint 5 -> 
            rescale -> 
            @20 tick -> 
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1; settled 1; trigger 2 for a savepoint
            ack a 2 -> 
            ack b 2 -> append completed 2
            appended -> announce 2; export 2 for savepoint 5; settled 2; trigger 3
            ack a 3 -> 
            ack b 3 -> append completed 3
            appended -> announce 3; settled 3
            @40 tick -> 
            exported 2 -> trigger 4 and stop
        "#]],
    );
}

#[test]
fn what_moves_right_behind_a_checkpoint_needs_no_other_before_the_last() {
    check(
        machine(&[], StartingPoint::default()),
        &["move", "ack a 1", "ack b 1", "appended"],
        expect![[r#"
        move -> trigger 1 and stop
        ack a 1 -> 
        ack b 1 -> append completed 1
        appended -> announce 1; settled 1; done: rescaled
    "#]],
    );
}

#[test]
fn a_rescale_whose_first_checkpoint_fails_leaves_the_attempt_and_one_whose_last_fails_leaves_the_job() {
    check(
        scheduled(Schedule { tolerable_failures: 0, ..SCHEDULE }, &[], StartingPoint::default()),
        &["rescale", "decline a 1", "@10 tick", "ack a 2", "ack b 2", "appended", "move", "decline b 3", "@60 tick"],
        expect![[r#"
            rescale -> trigger 1
            decline a 1 -> abort 1 (declined by 0.0: disk full), delete []; no rescale: the checkpoint before a rescale (1) failed: declined by 0.0: disk full
            @10 tick -> trigger 2
            ack a 2 -> 
            ack b 2 -> append completed 2
            appended -> announce 2; settled 2
            move -> trigger 3 and stop
            decline b 3 -> abort 3 (declined by 1.0: disk full), delete []; restart: the last checkpoint before a rescale (3) failed: declined by 1.0: disk full
            @60 tick -> 
        "#]],
    );
}

#[test]
fn a_job_that_ends_is_not_rescaled() {
    check(
        machine(&[], StartingPoint::default()),
        &["rescale", "stop", "ack a 1", "ack b 1", "appended", "rescale"],
        expect![[r#"
            rescale -> trigger 1
            stop -> no rescale: it is ending
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1; settled 1; trigger 2 and stop
            rescale -> no rescale: it is ending
        "#]],
    );
    check(
        machine(&[], StartingPoint::default()),
        &["rescale", "exhausted", "ack a 1", "ack b 1", "appended", "move"],
        expect![[r#"
            rescale -> trigger 1
            exhausted -> no rescale: it is ending
            ack a 1 -> 
            ack b 1 -> append completed 1
            appended -> announce 1; settled 1; trigger 2 and stop
            move -> no rescale: it is ending
        "#]],
    );
}

#[test]
fn a_stop_behind_the_last_barrier_of_a_rescale_is_for_the_next_attempt() {
    check(
        machine(&[], StartingPoint::default()),
        &["move", "stop", "ack a 1", "ack b 1", "appended"],
        expect![[r#"
        move -> trigger 1 and stop
        stop -> 
        ack a 1 -> 
        ack b 1 -> append completed 1
        appended -> announce 1; settled 1; done: rescaled
    "#]],
    );
}
