//! Aligns the barriers of a task's input channels. Pure: no I/O, no clock.
//!
//! Asynchronous barrier snapshotting (Carbone et al. 2015): once the barrier of an epoch has come on one channel, that
//! channel is blocked until it has come on all, and then the task takes its snapshot. Invariant (exactly-once mode): no
//! record that came after barrier *n* on a channel is processed before snapshot *n* is taken. In at-least-once mode nothing
//! is blocked, so a snapshot may hold records that a replay will bring again.

use crate::Epoch;

/// Whether channels wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AlignmentMode {
    /// A channel whose barrier has come is blocked until all have.
    ExactlyOnce,
    /// No channel is ever blocked.
    AtLeastOnce,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Channel {
    /// The newest barrier that came on it.
    Open(Epoch),
    /// Counts as aligned for every epoch.
    Ended,
}

/// The aligner of one subtask.
#[derive(Debug)]
pub struct Aligner {
    mode: AlignmentMode,
    channels: Vec<Channel>,
    /// The epoch under alignment.
    current: Option<Epoch>,
    /// Epochs up to here are complete or given up: their barriers are swallowed.
    settled: Epoch,
}

impl Aligner {
    /// An aligner of `channels` input channels.
    #[must_use]
    pub fn new(channels: usize, mode: AlignmentMode) -> Self {
        Self { mode, channels: vec![Channel::Open(Epoch(0)); channels], current: None, settled: Epoch(0) }
    }

    /// The barrier of `epoch` has come on `channel`. Answers with the epoch whose alignment that completes: the caller takes
    /// the snapshot before it takes anything more from any channel.
    ///
    /// A newer epoch's barrier gives up the alignment of an older one: its checkpoint has been aborted.
    pub fn barrier(&mut self, channel: usize, epoch: Epoch) -> Option<Epoch> {
        if let Some(Channel::Open(seen)) = self.channels.get_mut(channel) {
            *seen = epoch.max(*seen);
        }
        if epoch <= self.settled {
            return None;
        }
        if let Some(current) = self.current.filter(|c| *c < epoch) {
            self.settled = current;
        }
        self.current = Some(epoch.max(self.current.unwrap_or_default()));
        self.complete()
    }

    /// Nothing more comes on `channel`. Answers like [`Aligner::barrier`].
    pub fn ended(&mut self, channel: usize) -> Option<Epoch> {
        if let Some(state) = self.channels.get_mut(channel) {
            *state = Channel::Ended;
        }
        self.complete()
    }

    /// The checkpoint `epoch` has been aborted: stops waiting for its barriers, swallows those still to come.
    pub fn abort(&mut self, epoch: Epoch) {
        if epoch > self.settled {
            self.settled = epoch;
            self.current = self.current.filter(|c| *c > epoch);
        }
    }

    /// Whether nothing may be taken from `channel` for now.
    #[inline]
    #[must_use]
    pub fn is_blocked(&self, channel: usize) -> bool {
        match (self.mode, self.current) {
            (AlignmentMode::AtLeastOnce, _) | (_, None) => false,
            (AlignmentMode::ExactlyOnce, Some(current)) => {
                matches!(self.channels.get(channel), Some(Channel::Open(seen)) if *seen >= current)
            }
        }
    }

    /// The epoch under alignment, if any.
    #[must_use]
    pub fn aligning(&self) -> Option<Epoch> {
        self.current
    }

    /// Whether every channel has ended.
    #[must_use]
    pub fn all_ended(&self) -> bool {
        self.channels.iter().all(|c| *c == Channel::Ended)
    }

    fn complete(&mut self) -> Option<Epoch> {
        let current = self.current?;
        let aligned = self.channels.iter().all(|c| match c {
            Channel::Open(seen) => *seen >= current,
            Channel::Ended => true,
        });
        if !aligned {
            return None;
        }
        self.settled = current;
        self.current = None;
        Some(current)
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    /// Plays `b<channel> <epoch>`, `end<channel>`, `abort <epoch>` and prints what each led to, with the blocked channels.
    fn check(channels: usize, mode: AlignmentMode, events: &[&str], expected: Expect) {
        let mut aligner = Aligner::new(channels, mode);
        let mut lines = String::new();
        for event in events {
            let number = |s: &str| s.trim().parse::<u64>().unwrap();
            let done = if let Some(rest) = event.strip_prefix("abort") {
                aligner.abort(Epoch(number(rest)));
                None
            } else if let Some(rest) = event.strip_prefix("end") {
                aligner.ended(number(rest) as usize)
            } else {
                let (channel, epoch) = event[1..].split_once(' ').unwrap();
                aligner.barrier(number(channel) as usize, Epoch(number(epoch)))
            };
            let blocked: Vec<_> = (0..channels).filter(|c| aligner.is_blocked(*c)).collect();
            let done = done.map_or(String::new(), |e| format!(" snapshot {e}"));
            lines += &format!("{event}:{done} blocked {blocked:?}\n");
        }
        expected.assert_eq(&lines);
    }

    #[test]
    fn a_channel_is_blocked_until_the_barrier_has_come_on_all() {
        check(
            3,
            AlignmentMode::ExactlyOnce,
            &["b0 1", "b2 1", "b1 1", "b1 2", "b0 2", "b2 2"],
            expect![[r#"
            b0 1: blocked [0]
            b2 1: blocked [0, 2]
            b1 1: snapshot 1 blocked []
            b1 2: blocked [1]
            b0 2: blocked [0, 1]
            b2 2: snapshot 2 blocked []
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
            b1 1: snapshot 1 blocked []
        "#]],
        );
    }

    #[test]
    fn a_single_channel_never_blocks() {
        check(
            1,
            AlignmentMode::ExactlyOnce,
            &["b0 1", "b0 2"],
            expect![[r#"
            b0 1: snapshot 1 blocked []
            b0 2: snapshot 2 blocked []
        "#]],
        );
    }

    #[test]
    fn an_ended_channel_counts_as_aligned() {
        check(
            2,
            AlignmentMode::ExactlyOnce,
            &["b0 1", "end1", "b0 2"],
            expect![[r#"
            b0 1: blocked [0]
            end1: snapshot 1 blocked []
            b0 2: snapshot 2 blocked []
        "#]],
        );
    }

    #[test]
    fn a_newer_barrier_gives_up_an_older_alignment() {
        check(
            2,
            AlignmentMode::ExactlyOnce,
            &["b0 1", "b1 2", "b0 2", "b1 1"],
            expect![[r#"
            b0 1: blocked [0]
            b1 2: blocked [1]
            b0 2: snapshot 2 blocked []
            b1 1: blocked []
        "#]],
        );
    }

    #[test]
    fn an_abort_unblocks_and_swallows_late_barriers() {
        check(
            2,
            AlignmentMode::ExactlyOnce,
            &["b0 1", "abort 1", "b1 1", "b1 2", "b0 2"],
            expect![[r#"
            b0 1: blocked [0]
            abort 1: blocked []
            b1 1: blocked []
            b1 2: blocked [1]
            b0 2: snapshot 2 blocked []
        "#]],
        );
    }
}
