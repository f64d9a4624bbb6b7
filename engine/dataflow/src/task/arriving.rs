//! A task whose state is still arriving: rows of key groups that are there are processed, others wait.
//!
//! Until all of it is there, only rows are taken from the channels. A watermark, a barrier or an end stays in its channel, and
//! with it what is behind; so windows fire, and snapshots are taken, with all state in place, and the order of a channel is
//! kept. Rows that wait keep their order by key. Bounded: [`HELD_BYTES_MAX`] and one batch.

use floodmark_snapshot::{KeyGroup, Result};

use super::{Command, Input, Progress, Task, TaskEvent, channels::ChannelHead};
use crate::{
    Batch, Port,
    arrival::{Arrivals, Slice},
    inflight::InFlight,
};

/// Bytes of rows that wait for the state of their keys before no more are taken.
pub const HELD_BYTES_MAX: usize = 8 << 20;

/// See the header of this file.
pub(super) struct Arriving {
    arrivals: Arrivals,
    /// The first key group that is not there yet; `None` once all are.
    next: Option<KeyGroup>,
    /// Rows of key groups that are not there, in the order in which they came.
    held: Vec<(Port, Batch)>,
    held_bytes: usize,
    /// More is there than when `held` was gone through last.
    due: bool,
    /// Rows come before the next slice: else a reader that is faster than the task would keep them back to the end.
    rows_first: bool,
}

impl Arriving {
    pub(super) fn new(arrivals: Arrivals) -> Self {
        let next = Some(arrivals.owned.first);
        Self { arrivals, next, held: Vec::new(), held_bytes: 0, due: false, rows_first: false }
    }

    /// The rows whose state is there, and those that must wait.
    fn split(&self, batch: Batch) -> Result<(Option<Batch>, Option<Batch>)> {
        let Some(next) = self.next else { return Ok((Some(batch), None)) };
        // Without hashes nobody knows whose rows they are.
        let Some(hashes) = &batch.hashes else { return Ok((None, Some(batch))) };
        let (mut there, mut wait) = (Vec::new(), Vec::new());
        for (row, hash) in hashes.iter().enumerate() {
            if self.arrivals.group(*hash) < next { there.push(row as u32) } else { wait.push(row as u32) }
        }
        match (there.is_empty(), wait.is_empty()) {
            (_, true) => Ok((Some(batch), None)),
            (true, _) => Ok((None, Some(batch))),
            (false, false) => Ok((Some(batch.take(there)?), Some(batch.take(wait)?))),
        }
    }

    /// Keeps back what must wait, and answers with the rest.
    fn admit(&mut self, port: Port, batch: Batch) -> Result<Option<Batch>> {
        let (there, wait) = self.split(batch)?;
        if let Some(wait) = wait {
            self.held_bytes += wait.weight();
            self.held.push((port, wait));
        }
        Ok(there)
    }
}

impl Task {
    /// A step while state is arriving. `flushed`: no output waits for room.
    pub(super) fn step_arriving(&mut self, flushed: bool, events: &mut Vec<TaskEvent>) -> Result<Progress> {
        // Whatever else the task is told waits: it has let no barrier pass.
        if self.commands.cancelled() {
            return self.command(Command::Cancel, events);
        }
        let Some(arriving) = &mut self.arriving else { return Ok(Progress::Ready) };
        let rows_first = flushed && std::mem::take(&mut arriving.rows_first);
        if !rows_first
            && arriving.next.is_some()
            && let Some(slice) = arriving.arrivals.next()?
        {
            self.take_over(slice)?;
            return Ok(Progress::Ready);
        }
        if !flushed {
            return Ok(Progress::Waiting { until: None });
        }
        if std::mem::take(&mut arriving.due) {
            arriving.rows_first = rows_first;
            arriving.held_bytes = 0;
            for (port, batch) in std::mem::take(&mut arriving.held) {
                self.emit_or_hold(port, batch)?;
            }
            return Ok(Progress::Ready);
        }
        if arriving.next.is_none() {
            self.arriving = None;
            events.push(TaskEvent::Restored);
            return Ok(Progress::Ready);
        }
        let rows = match &mut self.input {
            Input::Channels(head) if arriving.held_bytes < HELD_BYTES_MAX => head.next_rows(),
            _ => None,
        };
        match rows {
            Some((port, batch)) => {
                self.emit_or_hold(port, batch)?;
                Ok(Progress::Ready)
            }
            // A slice may be there.
            None if rows_first => Ok(Progress::Ready),
            None => Ok(Progress::Waiting { until: None }),
        }
    }

    fn emit_or_hold(&mut self, port: Port, batch: Batch) -> Result<()> {
        let admitted = match &mut self.arriving {
            Some(arriving) => arriving.admit(port, batch)?,
            None => Some(batch),
        };
        admitted.map_or(Ok(()), |batch| self.emit(port, batch))
    }

    /// Takes over the state of some key groups.
    fn take_over(&mut self, slice: Slice) -> Result<()> {
        let Some(arriving) = &mut self.arriving else { return Ok(()) };
        let Slice { key_groups, shards } = slice;
        let last = arriving.arrivals.is_last(key_groups);
        self.chain.restore_first(shards, last)?;
        arriving.next = (!last).then_some(KeyGroup(key_groups.last.0 + 1));
        (arriving.due, arriving.rows_first) = (true, true);
        Ok(())
    }
}

impl ChannelHead {
    /// The next rows: what is left of the replay, then of a channel whose next frame is a batch.
    fn next_rows(&mut self) -> Option<(Port, Batch)> {
        if let Some(InFlight { port, batch, .. }) = self.replay() {
            return Some((port, batch));
        }
        let (channel, batch) = self.inbox.try_recv_rows()?;
        Some((self.port(channel), batch))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashMap,
        sync::{Arc, Mutex},
    };

    use arrow::{
        array::{ArrayRef, AsArray, Int64Array},
        datatypes::Int64Type,
        record_batch::RecordBatch,
    };
    use floodmark_snapshot::{
        Disposition, Env, Epoch, Error, KeyGroupRange, StateSchema, TimestampMs, alignment::AlignmentMode,
    };

    use super::*;
    use crate::{
        Barrier, Frame, Operator, Output, RestoredShard, StateSnapshot,
        arrival::{Feed, arrivals},
        channel::{Inbox, Sender, Signal},
        hash::hash_keys,
        inflight::InputChannel,
        task::{ChainedOperator, SubtaskSpec, TaskInput},
    };

    const GROUPS: u16 = 16;

    /// What an operator has seen, in order.
    #[derive(Debug, PartialEq)]
    enum Seen {
        Arrived(u16),
        Rows(Port, Vec<i64>),
        Watermark(TimestampMs),
        Snapshot,
    }

    type Story = Arc<Mutex<Vec<Seen>>>;

    /// Refuses rows whose key group is not there, and everything else before all is.
    struct Strict {
        there: u16,
        story: Story,
    }

    impl Strict {
        fn complete(&self) -> Result<()> {
            if self.there == GROUPS { Ok(()) } else { Err(Error::abort("not all is there")) }
        }

        fn note(&self, seen: Seen) {
            self.story.lock().unwrap().push(seen);
        }
    }

    impl Operator for Strict {
        fn process(&mut self, port: Port, batch: Batch, _: &mut Output) -> Result<()> {
            let mut groups = batch.hashes.iter().flat_map(|h| h.iter()).map(|h| KeyGroup::of(*h, GROUPS));
            if batch.hashes.is_none() {
                self.complete()?;
            } else if groups.any(|g| g.0 >= self.there) {
                return Err(Error::abort("rows came before their state"));
            }
            self.note(Seen::Rows(port, batch.rows.column(0).as_primitive::<Int64Type>().values().to_vec()));
            Ok(())
        }

        fn on_watermark(&mut self, watermark: TimestampMs, _: &mut Output) -> Result<()> {
            self.note(Seen::Watermark(watermark));
            self.complete()
        }

        fn flush(&mut self, _: &mut Output) -> Result<()> {
            self.complete()
        }

        fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
            self.note(Seen::Snapshot);
            self.complete().map(|()| StateSnapshot::default())
        }

        fn restores_by_key_group(&self) -> bool {
            true
        }

        fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
            assert!(shards.is_empty());
            Ok(())
        }

        fn arrived(&mut self) -> Result<()> {
            self.there += 4;
            self.note(Seen::Arrived(self.there));
            Ok(())
        }

        fn restored(&mut self) -> Result<()> {
            self.arrived()
        }
    }

    /// A task of two channels whose state comes in four slices.
    fn task(replay: Vec<InFlight>) -> (Task, Vec<Sender>, Feed, Story) {
        let (signal, story) = (Arc::new(Signal::default()), Story::default());
        let owned = KeyGroupRange { first: KeyGroup(0), last: KeyGroup(GROUPS - 1) };
        let (feed, arrivals) = arrivals(signal.clone(), owned, GROUPS);
        let mut inbox = Inbox::new(signal.clone());
        let senders = (0..2).map(|_| inbox.channel(signal.clone())).collect();
        let strict = ChainedOperator {
            uid: "strict".into(),
            kind: "strict".into(),
            state_schema: Some(StateSchema::default()),
            operator: Box::new(Strict { there: 0, story: story.clone() }),
            metrics: Arc::default(),
        };
        let spec = SubtaskSpec {
            index: 0,
            parallelism: 1,
            input: TaskInput::Channels(inbox, vec![InputChannel::to_port(0), InputChannel::to_port(1)]),
            replay,
            arrivals: Some(arrivals),
            chain: vec![strict],
            outputs: Vec::new(),
            snapshots: Some(AlignmentMode::ExactlyOnce),
            signal,
        };
        (Task::new(spec, Env::system()), senders, feed, story)
    }

    fn rows(keys: impl IntoIterator<Item = i64>) -> Batch {
        let column: ArrayRef = Arc::new(keys.into_iter().collect::<Int64Array>());
        let hashes = hash_keys(std::slice::from_ref(&column), column.len()).unwrap();
        Batch { rows: RecordBatch::try_from_iter([("k", column)]).unwrap(), hashes: Some(hashes.into()) }
    }

    fn group(key: i64) -> u16 {
        let column: ArrayRef = Arc::new(Int64Array::from(vec![key]));
        KeyGroup::of(hash_keys(&[column], 1).unwrap()[0], GROUPS).0
    }

    fn slice(number: u16) -> Result<Slice> {
        let key_groups = KeyGroupRange { first: KeyGroup(number * 4), last: KeyGroup(number * 4 + 3) };
        Ok(Slice { key_groups, shards: Vec::new() })
    }

    fn settle(task: &mut Task) -> Vec<TaskEvent> {
        let mut events = Vec::new();
        while task.step(&mut events).unwrap() == Progress::Ready {}
        events
    }

    /// The keys seen, in order, of each port.
    fn keys(story: &Story) -> HashMap<Port, Vec<i64>> {
        let mut all: HashMap<Port, Vec<i64>> = HashMap::new();
        for seen in &*story.lock().unwrap() {
            if let Seen::Rows(port, keys) = seen {
                all.entry(*port).or_default().extend(keys);
            }
        }
        all
    }

    #[test]
    fn rows_are_processed_as_soon_as_their_state_is_there_and_each_once() {
        let replayed = InFlight { input: "i".into(), port: 1, batch: rows(500..520) };
        let (mut task, senders, feed, story) = task(vec![replayed]);
        senders[0].try_send(Frame::Batch(rows(0..100))).unwrap();
        assert!(settle(&mut task).is_empty());
        assert!(story.lock().unwrap().is_empty(), "nothing is there");
        for number in 0..4 {
            feed.put(slice(number));
            let restored = settle(&mut task).iter().any(|e| matches!(e, TaskEvent::Restored));
            assert_eq!(restored, number == 3);
            senders[0].try_send(Frame::Batch(rows(100 + i64::from(number)..101 + i64::from(number)))).unwrap();
            settle(&mut task);
            let (there, sent) = (number * 4 + 4, 101 + i64::from(number));
            let seen = keys(&story);
            for (port, all) in [(0, 0..sent), (1, 500..520)] {
                let mut expected: Vec<i64> = all.filter(|k| group(*k) < there).collect();
                let mut seen = seen[&port].clone();
                seen.sort_unstable();
                expected.sort_unstable();
                assert_eq!(seen, expected, "port {port} with {there} key groups");
            }
        }
    }

    #[test]
    fn slices_that_are_all_there_keep_no_rows_back() {
        let (mut task, senders, feed, story) = task(Vec::new());
        (0..4).for_each(|number| feed.put(slice(number)));
        for n in 0..2 {
            senders[0].try_send(Frame::Batch(rows(n * 1000..n * 1000 + 100))).unwrap();
        }
        settle(&mut task);
        let story = story.lock().unwrap();
        let told: Vec<_> = story.iter().map(|s| if let Seen::Arrived(to) = s { *to } else { 0 }).collect();
        // A batch after each slice, of what has waited (after the first slice nothing has) and of what is new.
        assert_eq!(told, [4, 0, 8, 0, 0, 12, 0, 0, 16, 0, 0]);
    }

    #[test]
    fn the_rows_of_a_key_keep_their_order() {
        let (mut task, senders, feed, story) = task(Vec::new());
        // The same keys again and again; which of them came when is told by the order within the batch.
        let order = |n: i64| (0..40).map(move |k| (k * 7 + n) % 40);
        for n in 0..8 {
            senders[0].try_send(Frame::Batch(rows(order(n)))).unwrap();
            settle(&mut task);
            if n % 2 == 1 {
                feed.put(slice(n as u16 / 2));
                settle(&mut task);
            }
        }
        let seen = keys(&story).remove(&0).unwrap();
        for key in 0..40 {
            assert_eq!(seen.iter().filter(|k| **k == key).count(), 8);
        }
        // Within one key group, rows come as they were sent.
        let of_group = |keys: &[i64]| keys.iter().copied().filter(|k| group(*k) == 9).collect::<Vec<_>>();
        assert_eq!(of_group(&seen), of_group(&(0..8).flat_map(order).collect::<Vec<_>>()));
    }

    #[test]
    fn watermarks_and_barriers_wait_for_all_state_and_hold_up_their_channel_only() {
        let (mut task, senders, feed, story) = task(Vec::new());
        let barrier = Barrier::checkpoint(Epoch(1));
        for frame in [Frame::Watermark(7), Frame::Batch(rows(0..50)), Frame::Barrier(barrier)] {
            senders[0].try_send(frame).unwrap();
        }
        for frame in [Frame::Batch(rows(100..150)), Frame::Watermark(9), Frame::Barrier(barrier)] {
            senders[1].try_send(frame).unwrap();
        }
        (0..2).for_each(|n| feed.put(slice(n)));
        settle(&mut task);
        let seen = keys(&story);
        assert_eq!((seen.get(&0), seen[&1].len()), (None, (100..150).filter(|k| group(*k) < 8).count()));
        (2..4).for_each(|n| feed.put(slice(n)));
        let events = settle(&mut task);
        assert!(matches!(events[..], [TaskEvent::Restored, TaskEvent::Snapshot { .. }]), "{events:?}");
        let story = story.lock().unwrap();
        let at = |wanted: &dyn Fn(&Seen) -> bool| story.iter().position(wanted).unwrap();
        assert!(at(&|s| *s == Seen::Arrived(GROUPS)) < at(&|s| *s == Seen::Watermark(7)));
        assert_eq!(story.last(), Some(&Seen::Snapshot));
        drop(story);
    }

    #[test]
    fn rows_without_hashes_wait_for_everything_and_no_more_are_taken_than_the_bound() {
        let (mut task, senders, feed, story) = task(Vec::new());
        let large = rows((0..100_000).map(|_| 3));
        let mut sent = 0;
        while sent < 40 {
            let plain = Batch::new(large.rows.clone());
            if senders[0].try_send(Frame::Batch(plain)).is_err() {
                break;
            }
            sent += 1;
            settle(&mut task);
        }
        let held = sent * large.rows.get_array_memory_size();
        assert!((HELD_BYTES_MAX..2 * HELD_BYTES_MAX).contains(&held), "{held} bytes");
        assert!(story.lock().unwrap().is_empty());
        for number in 0..4 {
            feed.put(slice(number));
            settle(&mut task);
        }
        assert_eq!(keys(&story)[&0].len(), sent * 100_000);
    }

    #[test]
    fn a_task_can_be_cancelled_and_fails_with_the_reason_that_its_state_does_not_come() {
        let (mut task_0, _senders, feed, _) = task(Vec::new());
        task_0.commands().send(Command::Cancel);
        assert!(matches!(settle(&mut task_0)[..], [TaskEvent::Ended]));
        drop(task_0);
        assert!(feed.is_closed());
        let (mut task_1, _senders, feed, _) = task(Vec::new());
        feed.put(Err(Error::corrupt("shard x is damaged")));
        let error = task_1.step(&mut Vec::new()).unwrap_err();
        assert_eq!((error.disposition(), error.to_string()), (Disposition::Corrupt, "shard x is damaged".to_owned()));
    }
}
