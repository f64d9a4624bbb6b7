//! The input of a task that other tasks feed: its channels, how their barriers are aligned, and the snapshots that still
//! collect rows in flight.
//!
//! Rows in flight stay where they are and are processed as usual; a snapshot keeps clones, which share the rows' memory.
//! Bounded: [`CHANNEL_STATE_BYTES_MAX`] for each snapshot.

use std::collections::VecDeque;

use floodmark_snapshot::{
    Epoch,
    alignment::{Aligner, Alignment, AlignmentMode},
};

use super::OperatorPart;
use crate::{
    Barrier, Batch, Frame, PendingShard, Port,
    channel::Inbox,
    inflight::{self, InFlight, InputChannel},
    watermark::InputWatermarks,
};

/// Bytes of rows in flight that one task keeps for one snapshot. With more it declines the checkpoint: the rows are in memory
/// until they are uploaded, and so many mean that a barrier is held up somewhere upstream.
pub const CHANNEL_STATE_BYTES_MAX: usize = 256 << 20;

/// See the header of this file.
pub(super) struct ChannelHead {
    pub(super) inbox: Inbox,
    inputs: Vec<InputChannel>,
    pub(super) aligner: Aligner,
    pub(super) watermarks: InputWatermarks,
    /// Rows in flight of the restored snapshot, still to be processed.
    replay: VecDeque<InFlight>,
    /// Snapshots that are taken and not complete, oldest first. As many as the aligner has rounds.
    taken: VecDeque<Taken>,
    pub(super) state_bytes_max: usize,
}

/// A snapshot of this task that has been taken.
struct Taken {
    barrier: Barrier,
    parts: Vec<OperatorPart>,
    /// What was left of the replay.
    replay: Vec<InFlight>,
    /// The rows in flight, channel by channel.
    rows: Vec<Vec<Batch>>,
    bytes: usize,
    /// Until the barrier has come on all channels, or the epoch is given up.
    collects: bool,
}

/// A barrier that is received ahead of the rows before it.
pub(super) struct Early {
    pub(super) channel: usize,
    pub(super) barrier: Barrier,
    rows: Vec<Batch>,
}

/// A snapshot's part of this task.
pub(super) struct Report {
    pub(super) barrier: Barrier,
    pub(super) parts: Vec<OperatorPart>,
    /// To be listed under the task's first operator.
    pub(super) in_flight: Vec<PendingShard>,
}

impl ChannelHead {
    pub(super) fn new(inbox: Inbox, inputs: Vec<InputChannel>, mode: AlignmentMode, replay: Vec<InFlight>) -> Self {
        let channels = inbox.channels();
        let in_order = (0..channels).map(|c| inputs.get(c).is_some_and(|i| i.in_order)).collect();
        Self {
            inbox,
            inputs,
            aligner: Aligner::with_order(in_order, mode),
            watermarks: InputWatermarks::new(channels),
            replay: replay.into(),
            taken: VecDeque::new(),
            state_bytes_max: CHANNEL_STATE_BYTES_MAX,
        }
    }

    /// The next rows of the replay.
    pub(super) fn replay(&mut self) -> Option<InFlight> {
        self.replay.pop_front()
    }

    /// The next frame of a channel that is not blocked.
    pub(super) fn next(&mut self) -> Option<(usize, Frame)> {
        let aligner = &self.aligner;
        self.inbox.try_recv(|c| aligner.is_blocked(c))
    }

    /// Whether rows are to be processed though output waits for room: see [`Aligner::is_hurried`]. Bounded by what is before
    /// the barrier that is waited for.
    pub(super) fn hurries(&self) -> bool {
        (0..self.inputs.len()).any(|c| self.aligner.is_hurried(c))
    }

    /// The next frame of a channel that is hurried.
    pub(super) fn next_hurried(&mut self) -> Option<(usize, Frame)> {
        let aligner = &self.aligner;
        self.inbox.try_recv(|c| !aligner.is_hurried(c))
    }

    pub(super) fn port(&self, channel: usize) -> Port {
        self.inputs.get(channel).map_or(0, |i| i.port)
    }

    /// Takes notice of barriers that came overtaking.
    pub(super) fn notice(&mut self) -> Vec<Alignment> {
        match self.inbox.waiting_barriers().iter().map(|w| w.overtaking).max() {
            Some(overtaking) => self.aligner.unalign(overtaking),
            None => Vec::new(),
        }
    }

    /// Takes a barrier out of a queue that is to be received ahead of the rows before it, if there is one: the oldest.
    pub(super) fn early(&mut self) -> Option<Early> {
        let waiting = self.inbox.waiting_barriers();
        let early = waiting.iter().filter_map(|w| Some((self.aligner.early(w.channel, &w.barriers)?, w.channel)));
        let (barrier, channel) = early.min_by_key(|(barrier, _)| barrier.epoch)?;
        Some(Early { channel, barrier, rows: self.inbox.take_barrier(channel, barrier.epoch) })
    }

    /// The snapshot of this barrier has been taken: from now on it collects.
    pub(super) fn taken(&mut self, barrier: Barrier, parts: Vec<OperatorPart>) {
        let replay: Vec<InFlight> = self.replay.iter().cloned().collect();
        let bytes = replay.iter().map(|r| r.batch.weight()).sum();
        let rows = vec![Vec::new(); self.inbox.channels()];
        self.taken.push_back(Taken { barrier, parts, replay, rows, bytes, collects: true });
    }

    /// Rows of `channel` are about to be processed: the snapshots that collect them keep them.
    pub(super) fn collect(&mut self, channel: usize, batch: &Batch) {
        for epoch in self.aligner.collecting(channel) {
            if let Some(taken) = self.taken.iter_mut().find(|t| t.barrier.epoch == epoch) {
                taken.keep(channel, [batch.clone()]);
            }
        }
    }

    /// If the snapshot of a barrier received early is taken, the rows that were before it belong to it.
    pub(super) fn collect_early(&mut self, early: &mut Early) {
        if let Some(taken) = self.taken.iter_mut().find(|t| t.barrier.epoch == early.barrier.epoch) {
            taken.keep(early.channel, early.rows.drain(..));
        }
    }

    /// A snapshot that has collected more than it may.
    pub(super) fn overfull(&self) -> Option<Epoch> {
        self.taken.iter().find(|t| t.bytes > self.state_bytes_max).map(|t| t.barrier.epoch)
    }

    /// Ends the collecting of a snapshot: complete, or else without the rows in flight.
    pub(super) fn finish(&mut self, epoch: Epoch, complete: bool) {
        if let Some(taken) = self.taken.iter_mut().find(|t| t.barrier.epoch == epoch) {
            taken.collects = false;
            if !complete {
                taken.replay.clear();
                taken.rows.clear();
                taken.bytes = 0;
            }
        }
    }

    /// The oldest snapshot, if it collects no more: they are handed over in their order, also those that are given up,
    /// because what sinks have staged counts from barrier to barrier.
    pub(super) fn report(&mut self) -> Option<Report> {
        let Taken { barrier, parts, replay, rows, .. } = self.taken.pop_front_if(|t| !t.collects)?;
        Some(Report { barrier, parts, in_flight: self.in_flight(replay, rows) })
    }

    /// One shard for each input that had rows in flight; within it, what was left of a replay comes first.
    fn in_flight(&self, replay: Vec<InFlight>, rows: Vec<Vec<Batch>>) -> Vec<PendingShard> {
        let mut by_input: Vec<(&InputChannel, Vec<Batch>)> = Vec::new();
        let left = replay.into_iter().filter_map(|r| {
            let of = self.inputs.iter().find(|i| i.input == r.input && i.port == r.port)?;
            Some((of, vec![r.batch]))
        });
        for (of, rows) in left.chain(self.inputs.iter().zip(rows)) {
            match by_input.iter_mut().find(|(known, _)| known.input == of.input && known.port == of.port) {
                Some((_, batches)) => batches.extend(rows),
                None => by_input.push((of, rows)),
            }
        }
        by_input
            .into_iter()
            .filter(|(_, rows)| !rows.is_empty())
            .map(|(of, rows)| inflight::pending(&of.input, of.port, of.key_groups, rows))
            .collect()
    }
}

impl Taken {
    fn keep(&mut self, channel: usize, batches: impl IntoIterator<Item = Batch>) {
        if let Some(rows) = self.rows.get_mut(channel) {
            for batch in batches {
                self.bytes += batch.weight();
                rows.push(batch);
            }
        }
    }
}
