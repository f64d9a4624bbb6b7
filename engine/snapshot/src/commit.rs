//! The commit of one sink subtask: when its staged records are written, and what a failure means. A pure state machine.
//!
//! Invariants: nothing is written before the checkpoint that holds it is durable; everything staged up to an epoch becomes
//! visible at once, together with the marker of that epoch; after a failure nothing is written again before the marker has
//! been read, because the transaction that seemed to fail may have been committed.

use std::{collections::BTreeSet, fmt, time::Duration};

use crate::{Disposition, Epoch, Error};

/// Attempts of one open or one commit before the job fails.
pub const ATTEMPTS_MAX: u32 = 100;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// What the machine is told.
#[derive(Debug)]
pub enum Event {
    /// The committer has its identity. Everything staged up to `marker` is visible already.
    Opened {
        /// The marker that was found.
        marker: Option<Epoch>,
    },
    /// A barrier has handed over records of this epoch.
    Staged(Epoch),
    /// The checkpoint of this epoch is complete and durable.
    Completed(Epoch),
    /// The transaction of this epoch is committed.
    Written(Epoch),
    /// An open or a write failed.
    Failed(Error),
    /// The delay of the last `Wait` has passed.
    Waited,
}

/// What the machine wants done.
#[derive(Debug)]
pub enum Effect {
    /// Take over the identity and read the marker.
    Open,
    /// Write everything staged above one epoch (from the first, if `None`) and up to another, in one transaction with the
    /// marker of the latter.
    Write {
        /// What is visible already.
        above: Option<Epoch>,
        /// What the marker will say.
        up_to: Epoch,
    },
    /// Everything staged up to this epoch is visible: say so, and drop it.
    Confirm(Epoch),
    /// Wait, then say [`Event::Waited`].
    Wait(Duration),
    /// The committer can't go on.
    Stop(Error),
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("open"),
            Self::Write { above: None, up_to } => write!(f, "write ..{up_to}"),
            Self::Write { above: Some(above), up_to } => write!(f, "write {above}..{up_to}"),
            Self::Confirm(epoch) => write!(f, "confirm {epoch}"),
            Self::Wait(delay) => write!(f, "wait {} ms", delay.as_millis()),
            Self::Stop(error) => write!(f, "stop: {error}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// Being opened.
    Opening,
    /// Open, and at rest.
    Open,
    /// A transaction is under way.
    Writing(Epoch),
    /// Broken; to be opened again after a pause.
    Waiting,
    /// Given up.
    Stopped,
}

/// The machine.
#[derive(Debug)]
pub struct CommitMachine {
    link: Link,
    /// Everything staged up to here is visible: the newest marker.
    visible: Option<Epoch>,
    /// The epochs with staged records that are not visible yet.
    staged: BTreeSet<Epoch>,
    /// The newest completed epoch that has not been confirmed.
    completed: Option<Epoch>,
    failures: u32,
}

impl CommitMachine {
    /// A machine whose first effect is [`Effect::Open`]. `restored` is the checkpoint that the job starts from, and the epochs
    /// of the staged records of this committer that it holds.
    #[must_use]
    pub fn new(restored: Option<(Epoch, BTreeSet<Epoch>)>) -> (Self, Effect) {
        let (completed, staged) = restored.map_or((None, BTreeSet::new()), |(epoch, staged)| (Some(epoch), staged));
        (Self { link: Link::Opening, visible: None, staged, completed, failures: 0 }, Effect::Open)
    }

    /// Takes an event, and answers with what follows.
    pub fn step(&mut self, event: Event) -> Option<Effect> {
        match event {
            Event::Opened { marker } => {
                self.link = Link::Open;
                // A committer that can't tell says nothing; what this machine has seen still holds.
                self.visible = marker.max(self.visible);
                self.drop_visible();
                self.next()
            }
            Event::Staged(epoch) => {
                self.staged.insert(epoch);
                None
            }
            Event::Completed(epoch) => {
                self.completed = Some(epoch.max(self.completed.unwrap_or_default()));
                self.next()
            }
            Event::Written(epoch) => {
                self.failures = 0;
                self.link = Link::Open;
                self.visible = Some(epoch).max(self.visible);
                self.drop_visible();
                self.next()
            }
            Event::Failed(error) => Some(self.failed(error)),
            Event::Waited => (self.link == Link::Waiting).then(|| {
                self.link = Link::Opening;
                Effect::Open
            }),
        }
    }

    /// What is to be done at rest.
    fn next(&mut self) -> Option<Effect> {
        let epoch = self.completed.filter(|_| self.link == Link::Open)?;
        if self.staged.first().is_some_and(|staged| *staged <= epoch) {
            self.link = Link::Writing(epoch);
            return Some(Effect::Write { above: self.visible, up_to: epoch });
        }
        self.completed = None;
        Some(Effect::Confirm(epoch))
    }

    /// A marker covers all epochs up to its own, also aborted ones: their records went with it.
    fn drop_visible(&mut self) {
        self.staged.retain(|staged| Some(*staged) > self.visible);
    }

    fn failed(&mut self, error: Error) -> Effect {
        self.failures += 1;
        match error.disposition() {
            Disposition::Retry if self.failures < ATTEMPTS_MAX => {
                self.link = Link::Waiting;
                let doubled = BACKOFF_FIRST * 2_u32.pow((self.failures - 1).min(10));
                Effect::Wait(doubled.min(BACKOFF_MAX))
            }
            Disposition::Retry => {
                self.link = Link::Stopped;
                Effect::Stop(error.context(format!("gave up after {ATTEMPTS_MAX} attempts")))
            }
            Disposition::Abort | Disposition::Fenced | Disposition::Corrupt => {
                self.link = Link::Stopped;
                Effect::Stop(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    /// `restored` is a checkpoint and the epochs staged in it. Events: `opened [marker]`, `staged 1`, `completed 1`, `written 1`, `retry`, `fenced`, `waited`.
    fn check(restored: Option<(u64, &[u64])>, events: &[&str], expected: Expect) {
        let epochs = |staged: &[u64]| staged.iter().map(|e| Epoch(*e)).collect();
        let (mut machine, first) = CommitMachine::new(restored.map(|(e, staged)| (Epoch(e), epochs(staged))));
        let mut line = first.to_string();
        for event in events {
            let words: Vec<&str> = event.split(' ').collect();
            let epoch = words.get(1).map(|n| Epoch(n.parse().unwrap()));
            let effect = machine.step(match words[0] {
                "opened" => Event::Opened { marker: epoch },
                "staged" => Event::Staged(epoch.unwrap()),
                "completed" => Event::Completed(epoch.unwrap()),
                "written" => Event::Written(epoch.unwrap()),
                "retry" => Event::Failed(Error::retry("timed out")),
                "fenced" => Event::Failed(Error::fenced("newer producer")),
                "waited" => Event::Waited,
                other => panic!("{other}"),
            });
            line += &format!("; {event} -> {}", effect.map_or("-".into(), |e| e.to_string()));
        }
        expected.assert_eq(&line);
    }

    #[test]
    fn staged_records_are_written_once_their_checkpoint_is_complete() {
        check(
            None,
            &["opened", "staged 1", "completed 1", "written 1", "staged 2"],
            expect![
                "open; opened -> -; staged 1 -> -; completed 1 -> write ..1; written 1 -> confirm 1; staged 2 -> -"
            ],
        );
    }

    #[test]
    fn an_epoch_without_records_is_confirmed_without_a_transaction() {
        check(None, &["opened", "completed 1"], expect!["open; opened -> -; completed 1 -> confirm 1"]);
    }

    #[test]
    fn records_of_an_aborted_epoch_go_with_the_next() {
        check(
            None,
            &["opened", "staged 1", "staged 2", "completed 2", "written 2"],
            expect![
                "open; opened -> -; staged 1 -> -; staged 2 -> -; completed 2 -> write ..2; written 2 -> confirm 2"
            ],
        );
    }

    #[test]
    fn after_a_crash_the_marker_decides_whether_to_write_again() {
        check(
            Some((5, &[5])),
            &["opened 4", "written 5"],
            expect!["open; opened 4 -> write 4..5; written 5 -> confirm 5"],
        );
        check(Some((5, &[5])), &["opened 5"], expect!["open; opened 5 -> confirm 5"]);
        check(Some((5, &[5])), &["opened 6"], expect!["open; opened 6 -> confirm 5"]);
        check(Some((5, &[5])), &["opened"], expect!["open; opened -> write ..5"]);
        check(Some((5, &[])), &["opened 4"], expect!["open; opened 4 -> confirm 5"]);
    }

    #[test]
    fn after_an_uncertain_failure_the_marker_is_read_before_writing_again() {
        check(
            None,
            &["opened", "staged 3", "completed 3", "retry", "waited", "opened 3"],
            expect![
                "open; opened -> -; staged 3 -> -; completed 3 -> write ..3; retry -> wait 100 ms; waited -> open; opened 3 -> confirm 3"
            ],
        );
        check(
            None,
            &["opened", "staged 3", "completed 3", "retry", "waited", "retry", "waited", "opened 2"],
            expect![
                "open; opened -> -; staged 3 -> -; completed 3 -> write ..3; retry -> wait 100 ms; waited -> open; retry -> wait 200 ms; waited -> open; opened 2 -> write 2..3"
            ],
        );
    }

    #[test]
    fn completion_while_the_link_is_broken_is_not_forgotten() {
        check(
            None,
            &["retry", "staged 1", "completed 1", "waited", "opened", "written 1"],
            expect![
                "open; retry -> wait 100 ms; staged 1 -> -; completed 1 -> -; waited -> open; opened -> write ..1; written 1 -> confirm 1"
            ],
        );
    }

    #[test]
    fn a_fenced_committer_stops() {
        check(
            None,
            &["opened", "staged 1", "completed 1", "fenced", "completed 2", "waited"],
            expect![
                "open; opened -> -; staged 1 -> -; completed 1 -> write ..1; fenced -> stop: newer producer; completed 2 -> -; waited -> -"
            ],
        );
    }

    #[test]
    fn a_restored_checkpoint_may_hold_records_of_several_epochs_of_which_some_are_visible() {
        check(
            Some((5, &[3, 4, 5])),
            &["opened 3", "written 5"],
            expect!["open; opened 3 -> write 3..5; written 5 -> confirm 5"],
        );
        check(Some((5, &[3, 4])), &["opened 4"], expect!["open; opened 4 -> confirm 5"]);
    }

    #[test]
    fn checkpoints_that_complete_while_one_is_written_follow_in_one_transaction() {
        check(
            None,
            &[
                "opened",
                "staged 1",
                "completed 1",
                "staged 2",
                "completed 2",
                "staged 3",
                "completed 3",
                "written 1",
                "written 3",
            ],
            expect![
                "open; opened -> -; staged 1 -> -; completed 1 -> write ..1; staged 2 -> -; completed 2 -> -; staged 3 -> -; completed 3 -> -; written 1 -> write 1..3; written 3 -> confirm 3"
            ],
        );
    }
}
