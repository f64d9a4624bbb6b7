//! Deals the batches of a subtask out to the subtasks of the next task.
//!
//! A router never blocks: what a full channel refuses waits in the router, and the task takes no new input meanwhile.
//! Invariant: the frames of one target arrive in the order in which they were routed.

use std::{collections::VecDeque, sync::Arc};

use arrow::{array::UInt32Array, compute::take_record_batch};
use floodmark_snapshot::{Error, KeyGroup, Result};

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
}

impl Router {
    /// A router to these channels: of all subtasks of the next task, in order; for [`Exchange::Forward`] just the one.
    #[must_use]
    pub fn new(exchange: Exchange, max_parallelism: u16, senders: Vec<Sender>) -> Self {
        let target = |sender| Target { sender, waiting: VecDeque::new() };
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
                self.by_key(batch, hashes)?;
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

    /// Sends what waits, as far as there is room. True if nothing waits any more.
    ///
    /// # Errors
    /// When a receiver is gone: its task has failed.
    pub fn flush(&mut self) -> Result<bool> {
        let mut empty = true;
        for target in &mut self.targets {
            while let Some(frame) = target.waiting.pop_front() {
                match target.sender.try_send(frame) {
                    Ok(()) => {}
                    Err(Refused::Full(frame)) => {
                        target.waiting.push_front(frame);
                        empty = false;
                        break;
                    }
                    Err(Refused::Closed) => return Err(Error::retry("a downstream task is gone")),
                }
            }
        }
        Ok(empty)
    }

    fn push(&mut self, target: usize, batch: Batch) {
        self.targets[target].waiting.push_back(Frame::Batch(batch));
    }

    fn by_key(&mut self, batch: Batch, hashes: Vec<u64>) -> Result<()> {
        let targets = self.targets.len();
        if targets == 1 {
            self.push(0, Batch { rows: batch.rows, hashes: Some(hashes.into()) });
            return Ok(());
        }
        let owner =
            |hash: u64| KeyGroup::of(hash, self.max_parallelism).subtask(targets as u32, self.max_parallelism) as usize;
        // A counting sort of the row numbers by target: one permutation, then one gather per target.
        let owners: Vec<u16> = hashes.iter().map(|h| owner(*h) as u16).collect();
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
            let hashes: Arc<[u64]> = rows.iter().map(|r| hashes[*r as usize]).collect();
            let rows = take_record_batch(&batch.rows, &UInt32Array::from(rows.to_vec()))
                .map_err(|e| Error::abort(format!("deal rows out: {e}")))?;
            self.push(target, Batch { rows, hashes: Some(hashes) });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use arrow::{
        array::{AsArray, Int64Array},
        datatypes::Int64Type,
        record_batch::RecordBatch,
    };

    use super::*;
    use crate::channel::{Inbox, Signal};

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
}
