use expect_test::{Expect, expect};

use super::*;
use crate::coordination::BarrierKind;

/// Plays events and prints what each led to, the blocked channels, and those whose rows are collected, with the epochs.
///
/// `b<channel> <epoch>` is a barrier, `w<channel> <epoch>` one of a savepoint, `s<channel> <epoch>` one that stops the job;
/// `e<channel> <epoch> …` asks which of the waiting barriers is received early, and receives it; `end <channel>`,
/// `unalign <epoch>`, `abort <epoch>`.
fn play(mut aligner: Aligner, events: &[&str], expected: Expect) {
    let channels = aligner.channels.len();
    let mut lines = String::new();
    for event in events {
        let (what, epochs) = event.split_once(' ').unwrap();
        let numbers: Vec<u64> = epochs.split(' ').map(|n| n.parse().unwrap()).collect();
        let barrier = Barrier::checkpoint(Epoch(numbers[0]));
        let channel = || what[1..].parse::<usize>().unwrap();
        let steps = match (what, &what[..1]) {
            ("end", _) => aligner.ended(numbers[0] as usize),
            ("unalign", _) => aligner.unalign(Epoch(numbers[0])),
            ("abort", _) => aligner.abort(Epoch(numbers[0])),
            (_, "b") => aligner.barrier(channel(), barrier),
            (_, "w") => aligner.barrier(channel(), Barrier { whole: true, ..barrier }),
            (_, "s") => aligner.barrier(channel(), Barrier { kind: BarrierKind::Stop, ..barrier }),
            (_, "e") => {
                let waiting: Vec<_> = numbers.iter().map(|n| Barrier::checkpoint(Epoch(*n))).collect();
                let Some(early) = aligner.early(channel(), &waiting) else {
                    lines += &format!("{event}: waits\n");
                    continue;
                };
                aligner.barrier(channel(), early)
            }
            _ => panic!("{event}"),
        };
        lines += &format!("{event}:");
        for step in steps {
            lines += &match step {
                Alignment::Snapshot { barrier, overtakes: false } => format!(" snapshot {},", barrier.epoch),
                Alignment::Snapshot { barrier, overtakes: true } => format!(" snapshot {} overtaking,", barrier.epoch),
                Alignment::Complete(epoch) => format!(" complete {epoch},"),
                Alignment::GivenUp { epoch, cause } => format!(" give up {epoch} ({cause:?}),"),
            };
        }
        let blocked: Vec<_> = (0..channels).filter(|c| aligner.is_blocked(*c)).collect();
        lines += &format!(" blocked {blocked:?}");
        for channel in 0..channels {
            let epochs: Vec<_> = aligner.collecting(channel).map(|e| e.0).collect();
            if !epochs.is_empty() {
                lines += &format!(" collect {channel} for {epochs:?}");
            }
        }
        lines += "\n";
    }
    expected.assert_eq(&lines);
}

fn check(channels: usize, mode: AlignmentMode, events: &[&str], expected: Expect) {
    play(Aligner::new(channels, mode), events, expected);
}

fn exactly_once(channels: usize, events: &[&str], expected: Expect) {
    check(channels, AlignmentMode::ExactlyOnce, events, expected);
}

#[test]
fn a_channel_is_blocked_until_the_barrier_has_come_on_all() {
    exactly_once(
        3,
        &["b0 1", "b2 1", "b1 1", "b1 2", "b0 2", "b2 2"],
        expect![[r#"
        b0 1: blocked [0]
        b2 1: blocked [0, 2]
        b1 1: snapshot 1, complete 1, blocked []
        b1 2: blocked [1]
        b0 2: blocked [0, 1]
        b2 2: snapshot 2, complete 2, blocked []
    "#]],
    );
}

#[test]
fn at_least_once_blocks_nothing_and_snapshots_at_the_last_barrier() {
    check(
        2,
        AlignmentMode::AtLeastOnce,
        &["b0 1", "b1 1"],
        expect![[r#"
        b0 1: blocked []
        b1 1: snapshot 1, complete 1, blocked []
    "#]],
    );
}

#[test]
fn at_least_once_several_epochs_are_under_way_and_none_overtakes() {
    let events = ["b0 1", "b0 2", "unalign 2", "e1 1 2", "b1 1", "b1 2"];
    check(
        2,
        AlignmentMode::AtLeastOnce,
        &events,
        expect![[r#"
        b0 1: blocked []
        b0 2: blocked []
        unalign 2: blocked []
        e1 1 2: waits
        b1 1: snapshot 1, complete 1, blocked []
        b1 2: snapshot 2, complete 2, blocked []
    "#]],
    );
}

#[test]
fn a_single_channel_never_blocks() {
    exactly_once(
        1,
        &["b0 1", "b0 2"],
        expect![[r#"
        b0 1: snapshot 1, complete 1, blocked []
        b0 2: snapshot 2, complete 2, blocked []
    "#]],
    );
}

#[test]
fn an_ended_channel_counts_as_aligned() {
    exactly_once(
        2,
        &["b0 1", "end 1", "b0 2", "end 0"],
        expect![[r#"
        b0 1: blocked [0]
        end 1: snapshot 1, complete 1, blocked []
        b0 2: snapshot 2, complete 2, blocked []
        end 0: blocked []
    "#]],
    );
}

#[test]
fn a_newer_barrier_gives_up_an_older_epoch_that_has_not_come_on_its_channel() {
    exactly_once(
        2,
        &["b0 1", "b1 2", "b0 2", "b1 1"],
        expect![[r#"
        b0 1: blocked [0]
        b1 2: give up 1 (Skipped), blocked [1]
        b0 2: snapshot 2, complete 2, blocked []
        b1 1: blocked []
    "#]],
    );
}

#[test]
fn a_newer_barrier_leaves_an_older_epoch_alone_that_has_come_on_its_channel() {
    exactly_once(
        2,
        &["b0 1", "unalign 1", "b0 2", "b1 1", "b1 2"],
        expect![[r#"
        b0 1: blocked [0]
        unalign 1: snapshot 1 overtaking, blocked [] collect 1 for [1]
        b0 2: blocked [0] collect 1 for [1]
        b1 1: complete 1, blocked [0]
        b1 2: snapshot 2, complete 2, blocked []
    "#]],
    );
}

#[test]
fn an_abort_unblocks_and_swallows_late_barriers() {
    exactly_once(
        2,
        &["b0 1", "abort 1", "b1 1", "b1 2", "b0 2"],
        expect![[r#"
        b0 1: blocked [0]
        abort 1: give up 1 (Aborted), blocked []
        b1 1: blocked []
        b1 2: blocked [1]
        b0 2: snapshot 2, complete 2, blocked []
    "#]],
    );
}

#[test]
fn an_abort_before_the_first_barrier_swallows_all_of_them_and_no_others() {
    exactly_once(
        2,
        &["abort 2", "b0 1", "b1 1", "b0 2", "b1 2", "b0 3", "b1 3"],
        expect![[r#"
        abort 2: blocked []
        b0 1: blocked [0]
        b1 1: snapshot 1, complete 1, blocked []
        b0 2: blocked []
        b1 2: blocked []
        b0 3: blocked [0]
        b1 3: snapshot 3, complete 3, blocked []
    "#]],
    );
}

#[test]
fn an_abort_after_the_snapshot_changes_nothing() {
    exactly_once(
        2,
        &["b0 1", "b1 1", "abort 1", "b0 2", "b1 2"],
        expect![[r#"
        b0 1: blocked [0]
        b1 1: snapshot 1, complete 1, blocked []
        abort 1: blocked []
        b0 2: blocked [0]
        b1 2: snapshot 2, complete 2, blocked []
    "#]],
    );
}

#[test]
fn an_abort_of_an_overtaking_epoch_ends_its_collecting() {
    exactly_once(
        2,
        &["unalign 1", "b0 1", "abort 1", "b1 1", "b0 2", "b1 2"],
        expect![[r#"
        unalign 1: blocked []
        b0 1: snapshot 1 overtaking, blocked [] collect 1 for [1]
        abort 1: give up 1 (Aborted), blocked []
        b1 1: blocked []
        b0 2: blocked [0]
        b1 2: snapshot 2, complete 2, blocked []
    "#]],
    );
}

#[test]
fn an_unaligned_epoch_is_taken_at_the_first_barrier_and_collects_until_the_last() {
    exactly_once(
        3,
        &["unalign 1", "e1 1", "b0 1", "e2 1"],
        expect![[r#"
        unalign 1: blocked []
        e1 1: snapshot 1 overtaking, blocked [] collect 0 for [1] collect 2 for [1]
        b0 1: blocked [] collect 2 for [1]
        e2 1: complete 1, blocked []
    "#]],
    );
}

#[test]
fn an_epoch_switches_over_while_it_aligns() {
    exactly_once(
        3,
        &["b0 1", "e1 1", "unalign 1", "e1 1", "b2 1", "b0 2", "b1 2", "b2 2"],
        expect![[r#"
        b0 1: blocked [0]
        e1 1: waits
        unalign 1: snapshot 1 overtaking, blocked [] collect 1 for [1] collect 2 for [1]
        e1 1: blocked [] collect 2 for [1]
        b2 1: complete 1, blocked []
        b0 2: blocked [0]
        b1 2: blocked [0, 1]
        b2 2: snapshot 2, complete 2, blocked []
    "#]],
    );
}

#[test]
fn the_epoch_after_an_unaligned_one_begins_aligned() {
    exactly_once(
        2,
        &["unalign 1", "e0 1", "e0 2", "b0 2", "b1 1", "b1 2"],
        expect![[r#"
        unalign 1: blocked []
        e0 1: snapshot 1 overtaking, blocked [] collect 1 for [1]
        e0 2: waits
        b0 2: blocked [0] collect 1 for [1]
        b1 1: complete 1, blocked [0]
        b1 2: snapshot 2, complete 2, blocked []
    "#]],
    );
}

#[test]
fn to_unalign_an_epoch_unaligns_those_before_it() {
    exactly_once(
        2,
        &["b0 1", "unalign 2", "e1 1 2", "e1 2", "b0 2"],
        expect![[r#"
        b0 1: blocked [0]
        unalign 2: snapshot 1 overtaking, blocked [] collect 1 for [1]
        e1 1 2: complete 1, blocked []
        e1 2: snapshot 2 overtaking, blocked [] collect 0 for [2]
        b0 2: complete 2, blocked []
    "#]],
    );
}

#[test]
fn two_epochs_collect_at_the_same_time() {
    exactly_once(
        2,
        &["unalign 2", "e0 1 2", "e0 2", "b1 1", "b1 2"],
        expect![[r#"
        unalign 2: blocked []
        e0 1 2: snapshot 1 overtaking, blocked [] collect 1 for [1]
        e0 2: snapshot 2 overtaking, blocked [] collect 1 for [1, 2]
        b1 1: complete 1, blocked [] collect 1 for [2]
        b1 2: complete 2, blocked []
    "#]],
    );
}

#[test]
fn savepoints_and_last_barriers_are_never_overtaking_and_hold_later_ones_back() {
    exactly_once(
        2,
        &["unalign 9", "w0 1", "e1 2", "w1 1", "e1 2", "b0 2", "s0 3", "s1 3"],
        expect![[r#"
        unalign 9: blocked []
        w0 1: blocked [0]
        e1 2: waits
        w1 1: snapshot 1, complete 1, blocked []
        e1 2: snapshot 2 overtaking, blocked [] collect 0 for [2]
        b0 2: complete 2, blocked []
        s0 3: blocked [0]
        s1 3: snapshot 3, complete 3, blocked []
    "#]],
    );
}

#[test]
fn channels_in_order_are_waited_for_and_then_the_others_overtaken() {
    let aligner = || Aligner::with_order(vec![false, true, false], AlignmentMode::ExactlyOnce);
    play(
        aligner(),
        &["unalign 1", "e0 1", "b0 1", "e1 1", "b1 1", "e2 1"],
        expect![[r#"
        unalign 1: blocked []
        e0 1: waits
        b0 1: blocked [0]
        e1 1: waits
        b1 1: snapshot 1 overtaking, blocked [] collect 2 for [1]
        e2 1: complete 1, blocked []
    "#]],
    );
    play(
        aligner(),
        &["b1 1", "unalign 1", "end 1", "e2 2", "b0 1"],
        expect![[r#"
        b1 1: blocked [1]
        unalign 1: snapshot 1 overtaking, blocked [] collect 0 for [1] collect 2 for [1]
        end 1: blocked [] collect 0 for [1] collect 2 for [1]
        e2 2: waits
        b0 1: blocked [] collect 2 for [1]
    "#]],
    );
}

#[test]
fn the_end_of_a_channel_completes_what_collects_on_it() {
    exactly_once(
        2,
        &["unalign 1", "e0 1", "end 1", "end 0"],
        expect![[r#"
        unalign 1: blocked []
        e0 1: snapshot 1 overtaking, blocked [] collect 1 for [1]
        end 1: complete 1, blocked []
        end 0: blocked []
    "#]],
    );
}

#[test]
fn too_many_epochs_at_once_give_up_the_oldest() {
    let events: Vec<String> = (1..=9).map(|n| format!("b0 {n}")).collect();
    let events: Vec<&str> = events.iter().map(String::as_str).collect();
    check(
        2,
        AlignmentMode::AtLeastOnce,
        &[&events[..], &["b1 1", "b1 2"]].concat(),
        expect![[r#"
        b0 1: blocked []
        b0 2: blocked []
        b0 3: blocked []
        b0 4: blocked []
        b0 5: blocked []
        b0 6: blocked []
        b0 7: blocked []
        b0 8: blocked []
        b0 9: give up 1 (Crowded), blocked []
        b1 1: blocked []
        b1 2: snapshot 2, complete 2, blocked []
    "#]],
    );
}

#[test]
fn a_channel_in_order_is_hurried_from_the_command_until_its_barrier_has_come() {
    let mut aligner = Aligner::with_order(vec![false, true], AlignmentMode::ExactlyOnce);
    let hurried = |aligner: &Aligner| (aligner.is_hurried(0), aligner.is_hurried(1));
    aligner.barrier(0, Barrier::checkpoint(Epoch(1)));
    assert_eq!(hurried(&aligner), (false, false), "aligned");
    aligner.unalign(Epoch(1));
    assert_eq!(hurried(&aligner), (false, true));
    aligner.barrier(1, Barrier::checkpoint(Epoch(1)));
    assert_eq!(hurried(&aligner), (false, false));
    aligner.unalign(Epoch(2));
    assert_eq!(hurried(&aligner), (false, true), "the barrier is still to come");
    aligner.abort(Epoch(2));
    assert_eq!(hurried(&aligner), (false, false));
}
