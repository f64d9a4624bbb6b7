//! Deals the batches of a subtask out to the subtasks of the next task.
//!
//! A router never blocks: what a full channel refuses waits in the router, and the task takes no new input meanwhile. When a
//! barrier overtakes, what waits before it goes past the channel's bound: that is what one input gave rise to, and what the
//! chain held back until the barrier. The task then takes no new input before there is room again, however many barriers
//! overtake: so a channel exceeds its bound by that much at most.
//! Invariant: the frames of one target arrive in the order in which they were routed.

use std::collections::VecDeque;

use floodmark_snapshot::{Epoch, Error, KeyGroup, Result};

use crate::{
    Batch, Exchange, Frame,
    channel::{Refused, Sender},
    hash::hash_keys,
};

/// One out-edge of one subtask.
#[derive(Debug)]
pub struct Router {
    exchange: Exchange,
    max_parallelism: u16,
    targets: Vec<Target>,
    next: usize,
}

#[derive(Debug)]
struct Target {
    sender: Sender,
    waiting: VecDeque<Frame>,
    /// Frames went past the channel's bound, and since then it has not been seen with room.
    past_bound: bool,
}

impl Router {
    /// A router to these channels: of all subtasks of the next task, in order; for [`Exchange::Forward`] just the one.
    #[must_use]
    pub fn new(exchange: Exchange, max_parallelism: u16, senders: Vec<Sender>) -> Self {
        let target = |sender| Target { sender, waiting: VecDeque::new(), past_bound: false };
        Self { exchange, max_parallelism, targets: senders.into_iter().map(target).collect(), next: 0 }
    }

    /// Routes a batch.
    ///
    /// # Errors
    /// When a key column can't be hashed.
    pub fn batch(&mut self, batch: Batch) -> Result<()> {
        match &self.exchange {
            Exchange::Forward => self.push(0, batch),
            Exchange::Rebalance => {
                self.next = (self.next + 1) % self.targets.len().max(1);
                self.push(self.next, batch);
            }
            Exchange::Hash(columns) => {
                let keys: Vec<_> = columns.iter().map(|c| batch.rows.column(*c).clone()).collect();
                let hashes = hash_keys(&keys, batch.len())?;
                self.by_key(Batch { rows: batch.rows, hashes: Some(hashes.into()) })?;
            }
        }
        Ok(())
    }

    /// Sends a frame without rows to all targets.
    pub fn broadcast(&mut self, frame: &Frame) {
        for target in &mut self.targets {
            target.waiting.push_back(frame.clone());
        }
    }

    /// Sends what waits, as far as there is room. True if nothing waits any more, and no channel is past its bound.
    ///
    /// # Errors
    /// When a receiver is gone: its task has failed.
    pub fn flush(&mut self) -> Result<bool> {
        let mut empty = true;
        for target in &mut self.targets {
            target.past_bound = target.past_bound && !target.sender.has_room().map_err(|_| gone())?;
            empty &= !target.past_bound;
            while let Some(frame) = target.waiting.pop_front() {
                match target.sender.try_send(frame) {
                    Ok(()) => {}
                    Err(Refused::Full(frame)) => {
                        target.waiting.push_front(frame);
                        empty = false;
                        break;
                    }
                    Err(Refused::Closed) => return Err(gone()),
                }
            }
        }
        Ok(empty)
    }

    /// If the barrier of `epoch` still waits here, sends it and what waits before it, whether there is room or not, and lets
    /// the receivers know that it overtakes; also if it waits in the channel, from where a receiver in another process does
    /// not see it. A forward exchange stays in order: see [`InputChannel::in_order`].
    ///
    /// [`InputChannel::in_order`]: crate::inflight::InputChannel::in_order
    ///
    /// # Errors
    /// When a receiver is gone: its task has failed.
    pub fn overtake(&mut self, epoch: Epoch) -> Result<()> {
        if self.exchange == Exchange::Forward {
            return Ok(());
        }
        for target in &mut self.targets {
            let is_it = |f: &Frame| matches!(f, Frame::Barrier(b) if b.epoch == epoch && b.may_overtake());
            let Some(at) = target.waiting.iter().position(is_it) else {
                target.sender.overtake(epoch);
                continue;
            };
            for frame in target.waiting.drain(..=at) {
                let frame = match frame {
                    Frame::Barrier(barrier) if barrier.epoch == epoch => Frame::Overtaking(barrier),
                    other => other,
                };
                target.sender.send_past_bound(frame).map_err(|_| gone())?;
            }
            target.past_bound = true;
        }
        Ok(())
    }

    fn push(&mut self, target: usize, batch: Batch) {
        self.targets[target].waiting.push_back(Frame::Batch(batch));
    }

    /// Deals rows with their hashes out.
    fn by_key(&mut self, batch: Batch) -> Result<()> {
        let targets = self.targets.len();
        if targets == 1 {
            self.push(0, batch);
            return Ok(());
        }
        let owner =
            |hash: u64| KeyGroup::of(hash, self.max_parallelism).subtask(targets as u32, self.max_parallelism) as usize;
        // A counting sort of the row numbers by target: one permutation, then one gather per target.
        let owners: Vec<u16> = batch.hashes.iter().flat_map(|h| h.iter()).map(|h| owner(*h) as u16).collect();
        let mut ends = vec![0_usize; targets];
        for target in &owners {
            ends[usize::from(*target)] += 1;
        }
        let mut total = 0;
        for end in &mut ends {
            total += *end;
            *end = total - *end;
        }
        let starts = ends.clone();
        let mut order = vec![0_u32; owners.len()];
        for (row, target) in owners.iter().enumerate() {
            let at = &mut ends[usize::from(*target)];
            order[*at] = row as u32;
            *at += 1;
        }
        for target in 0..targets {
            let rows = &order[starts[target]..ends[target]];
            if rows.is_empty() {
                continue;
            }
            let part = batch.take(rows.to_vec())?;
            self.push(target, part);
        }
        Ok(())
    }
}

fn gone() -> Error {
    Error::retry("a downstream task is gone")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::{
        array::{AsArray, Int64Array},
        datatypes::Int64Type,
        record_batch::RecordBatch,
    };

    use super::*;
    use crate::{
        Barrier,
        channel::{Inbox, Signal},
    };

    #[test]
    fn each_key_goes_to_the_owner_of_its_key_group_with_its_hash_and_in_order() {
        let signal = Arc::new(Signal::default());
        let mut inboxes: Vec<_> = (0..3).map(|_| Inbox::new(signal.clone())).collect();
        let senders = inboxes.iter_mut().map(|i| i.channel(signal.clone())).collect();
        let mut router = Router::new(Exchange::Hash(vec![0]), 128, senders);
        let column = Arc::new((0..1000_i64).collect::<Int64Array>());
        router.batch(Batch::new(RecordBatch::try_from_iter([("k", column as _)]).unwrap())).unwrap();
        assert!(router.flush().unwrap());
        let mut seen = 0;
        for (index, inbox) in inboxes.iter_mut().enumerate() {
            let Some((_, Frame::Batch(batch))) = inbox.try_recv(|_| false) else { panic!("no rows for {index}") };
            let hashes = batch.hashes.clone().unwrap();
            assert_eq!(hash_keys(batch.rows.columns(), batch.len()).unwrap(), hashes.to_vec());
            assert!(hashes.iter().all(|h| KeyGroup::of(*h, 128).subtask(3, 128) as usize == index));
            assert!(batch.rows.column(0).as_primitive::<Int64Type>().values().is_sorted());
            seen += batch.len();
        }
        assert_eq!(seen, 1000);
    }

    fn rows(n: usize) -> Batch {
        let column = Arc::new(Int64Array::from(vec![7; n]));
        Batch::new(RecordBatch::try_from_iter([("k", column as _)]).unwrap())
    }

    #[test]
    fn an_overtaking_barrier_takes_what_waits_before_it_along_and_nothing_else() {
        let signal = Arc::new(Signal::default());
        let mut inbox = Inbox::bounded(signal.clone(), 1);
        let mut router = Router::new(Exchange::Rebalance, 128, vec![inbox.channel(signal)]);
        router.batch(rows(1)).unwrap();
        router.batch(rows(2)).unwrap();
        router.broadcast(&Frame::Barrier(Barrier::checkpoint(Epoch(1))));
        router.batch(rows(3)).unwrap();
        assert!(!router.flush().unwrap(), "one batch fills the channel");
        router.overtake(Epoch(2)).unwrap();
        assert!(inbox.waiting_barriers().is_empty(), "another barrier");
        router.overtake(Epoch(1)).unwrap();
        let waiting = inbox.waiting_barriers();
        assert_eq!((waiting.len(), waiting[0].overtaking), (1, Epoch(1)));
        let ahead: Vec<_> = inbox.take_barrier(0, Epoch(1)).iter().map(Batch::len).collect();
        assert_eq!(ahead, [1, 2]);
        assert!(!router.flush().unwrap(), "back-pressure goes on behind the barrier");
        let sizes = std::iter::from_fn(|| match inbox.try_recv(|_| false) {
            Some((_, Frame::Batch(batch))) => Some(batch.len()),
            _ => None,
        });
        assert_eq!(sizes.collect::<Vec<_>>(), [1, 2], "the rows are still to be processed");
        assert!(router.flush().unwrap());
    }

    #[test]
    fn however_many_barriers_overtake_a_channel_exceeds_its_bound_once() {
        let (reader, writer) = (Arc::new(Signal::default()), Arc::new(Signal::default()));
        let mut inbox = Inbox::bounded(reader, 1);
        let mut router = Router::new(Exchange::Rebalance, 128, vec![inbox.channel(writer)]);
        let mut sent = 0;
        for epoch in 1..=9 {
            if router.flush().unwrap() {
                router.batch(rows(1)).unwrap();
                router.batch(rows(1)).unwrap();
                sent += 2;
            }
            router.broadcast(&Frame::Barrier(Barrier::checkpoint(Epoch(epoch))));
            router.overtake(Epoch(epoch)).unwrap();
            inbox.take_barrier(0, Epoch(epoch));
        }
        assert_eq!(sent, 2);
        while inbox.try_recv(|_| false).is_some() {}
        assert!(router.flush().unwrap(), "there is room again");
    }

    #[test]
    fn nothing_overtakes_on_a_forward_exchange_and_no_savepoint_anywhere() {
        let signal = Arc::new(Signal::default());
        for (exchange, whole) in [(Exchange::Forward, false), (Exchange::Rebalance, true)] {
            let mut inbox = Inbox::bounded(signal.clone(), 1);
            let mut router = Router::new(exchange, 128, vec![inbox.channel(signal.clone())]);
            router.batch(rows(1)).unwrap();
            router.broadcast(&Frame::Barrier(Barrier { whole, ..Barrier::checkpoint(Epoch(1)) }));
            router.flush().unwrap();
            router.overtake(Epoch(1)).unwrap();
            assert!(inbox.waiting_barriers().is_empty());
        }
    }
}
