//! Aligns the barriers of a task's input channels, or lets them overtake rows. Pure: no I/O, no clock.
//!
//! *Aligned* (asynchronous barrier snapshotting, Carbone et al. 2015): once the barrier of an epoch has come on one channel,
//! that channel is blocked until it has come on all, and then the task takes its snapshot.
//!
//! *Unaligned*: the task takes its snapshot as soon as it knows of the barrier, wherever that is. The rows that are before the
//! barrier on channels where it has not come are *collected* into the snapshot while they are processed, until it has come on
//! all. An epoch begins aligned, and [`Aligner::unalign`] switches it over. A barrier that must align, and a channel that is in
//! order, never switch: the snapshot then waits for these alone.
//!
//! Several epochs may be under way: a barrier behind another waits in its channel's queue while that aligns; while that one
//! only collects, it is received. Barriers come in order on each channel, so one that comes says that none older will come on
//! that channel: an older epoch that has not come on it was aborted upstream, and never completes.
//!
//! Invariants (exactly-once mode): no record that came after barrier *n* on a channel is processed before snapshot *n* is
//! taken; a record that came before it is in the snapshot's state, or else collected, never both. Snapshots are taken in the
//! order of their epochs. In at-least-once mode nothing is blocked, so a snapshot may hold records that a replay will bring
//! again.

use std::collections::{BTreeSet, VecDeque};

use crate::{Epoch, coordination::Barrier};

/// Epochs under way in one task. One more, and the oldest is given up.
pub const EPOCHS_IN_FLIGHT_MAX: usize = 8;
/// Aborted epochs whose barriers are still expected, that a task remembers.
pub const ABORTED_REMEMBERED_MAX: usize = 64;

/// Whether channels wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AlignmentMode {
    /// A channel whose barrier has come is blocked until the snapshot is taken.
    ExactlyOnce,
    /// No channel is ever blocked, and no barrier overtakes.
    AtLeastOnce,
}

/// What follows from an event, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alignment {
    /// Take the snapshot of this barrier before anything more is taken from any channel, and send the barrier on.
    Snapshot {
        /// The barrier.
        barrier: Barrier,
        /// Whether the barrier overtakes rows downstream, too.
        overtakes: bool,
    },
    /// The barrier has come on all channels: the snapshot is complete.
    Complete(Epoch),
    /// The epoch never completes here.
    GivenUp {
        /// Which.
        epoch: Epoch,
        /// Why.
        cause: GiveUp,
    },
}

/// Why an epoch never completes in a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveUp {
    /// Its checkpoint has been aborted.
    Aborted,
    /// A later barrier has come on a channel on which this one has not: whoever should have sent it had aborted it.
    Skipped,
    /// More than [`EPOCHS_IN_FLIGHT_MAX`] are under way.
    Crowded,
}

#[derive(Clone, Copy, Debug)]
struct Channel {
    /// Nothing more comes on it: it counts as aligned for every epoch.
    ended: bool,
    /// Barriers never overtake rows on it.
    in_order: bool,
}

/// An epoch under way.
#[derive(Debug)]
struct Round {
    barrier: Barrier,
    /// On which channels the barrier has come.
    come: Vec<bool>,
    /// Whether the snapshot is taken: then the round collects, and blocks no more.
    taken: bool,
}

/// The aligner of one subtask.
#[derive(Debug)]
pub struct Aligner {
    mode: AlignmentMode,
    channels: Vec<Channel>,
    /// Oldest first. Bounded by [`EPOCHS_IN_FLIGHT_MAX`].
    rounds: VecDeque<Round>,
    /// No epoch up to here begins any more: barriers that belong to no round are swallowed.
    begun: Epoch,
    /// Aborted epochs beyond `begun`.
    aborted: BTreeSet<Epoch>,
    /// Epochs up to here are unaligned, if they may be.
    unaligned_to: Epoch,
}

impl Aligner {
    /// An aligner of `channels` input channels.
    #[must_use]
    pub fn new(channels: usize, mode: AlignmentMode) -> Self {
        Self::with_order(vec![false; channels], mode)
    }

    /// An aligner of as many channels as `in_order` has elements: on those that are true, barriers never overtake rows.
    #[must_use]
    pub fn with_order(in_order: Vec<bool>, mode: AlignmentMode) -> Self {
        Self {
            mode,
            channels: in_order.into_iter().map(|in_order| Channel { ended: false, in_order }).collect(),
            rounds: VecDeque::new(),
            begun: Epoch(0),
            aborted: BTreeSet::new(),
            unaligned_to: Epoch(0),
        }
    }

    /// The barrier has come on `channel`: behind all rows before it, or ahead of them if [`Aligner::early`] said so.
    pub fn barrier(&mut self, channel: usize, barrier: Barrier) -> Vec<Alignment> {
        let mut steps = Vec::new();
        let epoch = barrier.epoch;
        let skipped = |r: &Round| r.barrier.epoch < epoch && r.come.get(channel) == Some(&false);
        self.give_up(skipped, GiveUp::Skipped, &mut steps);
        if !self.is_settled(epoch) {
            self.begin(barrier, &mut steps);
        }
        self.begun_to(epoch);
        let come = self.rounds.iter_mut().find(|r| r.barrier.epoch == epoch).and_then(|r| r.come.get_mut(channel));
        if let Some(come) = come {
            *come = true;
        }
        self.go_on(&mut steps);
        steps
    }

    /// Nothing more comes on `channel`.
    pub fn ended(&mut self, channel: usize) -> Vec<Alignment> {
        if let Some(state) = self.channels.get_mut(channel) {
            state.ended = true;
        }
        let mut steps = Vec::new();
        self.go_on(&mut steps);
        steps
    }

    /// The barriers up to `epoch` shall overtake rows, if they may. Has no effect in at-least-once mode.
    pub fn unalign(&mut self, epoch: Epoch) -> Vec<Alignment> {
        let mut steps = Vec::new();
        if self.mode == AlignmentMode::ExactlyOnce && epoch > self.unaligned_to {
            self.unaligned_to = epoch;
            self.go_on(&mut steps);
        }
        steps
    }

    /// The checkpoint `epoch` has been aborted: its barriers are waited for no more, and those still to come are swallowed.
    pub fn abort(&mut self, epoch: Epoch) -> Vec<Alignment> {
        let mut steps = Vec::new();
        self.give_up(|r| r.barrier.epoch == epoch, GiveUp::Aborted, &mut steps);
        if epoch > self.begun {
            self.aborted.insert(epoch);
            while self.aborted.len() > ABORTED_REMEMBERED_MAX {
                // So many in a row that never came: whatever is older will not come either.
                if let Some(oldest) = self.aborted.pop_first() {
                    self.begun_to(oldest);
                }
            }
        }
        self.go_on(&mut steps);
        steps
    }

    /// Which of the barriers that wait in the queue of `channel`, oldest first, is to be received now, ahead of the rows
    /// before it.
    #[must_use]
    pub fn early(&self, channel: usize, waiting: &[Barrier]) -> Option<Barrier> {
        if self.mode == AlignmentMode::AtLeastOnce || self.channels.get(channel).is_none_or(|c| c.in_order) {
            return None;
        }
        let next = waiting.iter().find(|b| !self.is_settled(b.epoch))?;
        let older_must_align =
            self.rounds.iter().any(|r| !r.taken && r.barrier.epoch < next.epoch && !r.barrier.may_overtake());
        if !self.is_unaligned(next) || older_must_align {
            return None;
        }
        let come = |channel: usize| self.round(next.epoch).is_some_and(|r| r.come.get(channel) == Some(&true));
        let taken = self.round(next.epoch).is_some_and(|r| r.taken);
        (taken || self.in_order_channels().all(come)).then_some(*next)
    }

    /// Whether nothing may be taken from `channel` for now.
    #[inline]
    #[must_use]
    pub fn is_blocked(&self, channel: usize) -> bool {
        self.mode == AlignmentMode::ExactlyOnce
            && self.rounds.iter().any(|r| !r.taken && r.come.get(channel) == Some(&true))
    }

    /// Whether the rows of `channel` are to be processed even while output waits for room: it is in order, and the snapshot of
    /// an unaligned epoch waits for its barrier. Room may depend on that very barrier, by way of a channel that is blocked
    /// further downstream.
    #[must_use]
    pub fn is_hurried(&self, channel: usize) -> bool {
        if !self.channels.get(channel).is_some_and(|c| c.in_order && !c.ended) || self.is_blocked(channel) {
            return false;
        }
        let to_come = self.unaligned_to > self.begun && !self.aborted.contains(&self.unaligned_to);
        let waits = |r: &Round| !r.taken && self.is_unaligned(&r.barrier) && r.come.get(channel) == Some(&false);
        to_come || self.rounds.iter().any(waits)
    }

    /// The epochs whose snapshots are taken, and into which the rows of `channel` are still collected.
    pub fn collecting(&self, channel: usize) -> impl Iterator<Item = Epoch> {
        let collects = move |r: &&Round| r.taken && r.come.get(channel) == Some(&false);
        self.rounds.iter().filter(collects).map(|r| r.barrier.epoch)
    }

    /// Whether every channel has ended.
    #[must_use]
    pub fn all_ended(&self) -> bool {
        self.channels.iter().all(|c| c.ended)
    }

    /// Whether a barrier is to overtake rows, as far as it is known by now.
    fn is_unaligned(&self, barrier: &Barrier) -> bool {
        self.mode == AlignmentMode::ExactlyOnce && barrier.may_overtake() && barrier.epoch <= self.unaligned_to
    }

    /// Whether the barriers of `epoch` mean nothing any more.
    fn is_settled(&self, epoch: Epoch) -> bool {
        (epoch <= self.begun && self.round(epoch).is_none()) || self.aborted.contains(&epoch)
    }

    fn round(&self, epoch: Epoch) -> Option<&Round> {
        self.rounds.iter().find(|r| r.barrier.epoch == epoch)
    }

    /// The channels whose barriers must be waited for in any case.
    fn in_order_channels(&self) -> impl Iterator<Item = usize> {
        self.channels.iter().enumerate().filter(|(_, c)| c.in_order && !c.ended).map(|(i, _)| i)
    }

    fn begin(&mut self, barrier: Barrier, steps: &mut Vec<Alignment>) {
        if self.round(barrier.epoch).is_some() {
            return;
        }
        if self.rounds.len() == EPOCHS_IN_FLIGHT_MAX {
            let oldest = self.rounds.front().map(|r| r.barrier.epoch);
            self.give_up(|r| Some(r.barrier.epoch) == oldest, GiveUp::Crowded, steps);
        }
        // Always the newest: an older one that is not there yet is settled.
        self.rounds.push_back(Round { barrier, come: vec![false; self.channels.len()], taken: false });
    }

    fn begun_to(&mut self, epoch: Epoch) {
        self.begun = self.begun.max(epoch);
        self.aborted.retain(|e| *e > self.begun);
    }

    fn give_up(&mut self, which: impl Fn(&Round) -> bool, cause: GiveUp, steps: &mut Vec<Alignment>) {
        self.rounds.retain(|round| {
            let over = which(round);
            if over {
                steps.push(Alignment::GivenUp { epoch: round.barrier.epoch, cause });
            }
            !over
        });
    }

    /// Takes the snapshots that can be taken, oldest first, and completes those whose barriers have come on all channels.
    fn go_on(&mut self, steps: &mut Vec<Alignment>) {
        let mut waits = false;
        let (channels, mode, unaligned_to) = (&self.channels, self.mode, self.unaligned_to);
        self.rounds.retain_mut(|round| {
            let has_come = |c: &Channel, come: &bool| c.ended || *come;
            let on_all = channels.iter().zip(&round.come).all(|(c, come)| has_come(c, come));
            let in_order = channels.iter().zip(&round.come).all(|(c, come)| !c.in_order || has_come(c, come));
            let overtakes = mode == AlignmentMode::ExactlyOnce
                && round.barrier.may_overtake()
                && round.barrier.epoch <= unaligned_to;
            if !round.taken && !waits && (on_all || (overtakes && in_order)) {
                round.taken = true;
                steps.push(Alignment::Snapshot { barrier: round.barrier, overtakes });
            }
            waits |= !round.taken;
            if round.taken && on_all {
                steps.push(Alignment::Complete(round.barrier.epoch));
                return false;
            }
            true
        });
    }
}

#[cfg(test)]
mod tests;
