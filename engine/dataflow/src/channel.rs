//! Channels between subtasks: one queue per sender in the receiver's inbox, each bounded in bytes. Nothing blocks in here; a
//! thread that can't go on parks on its [`Signal`].
//!
//! A queue takes a frame as long as it holds less than its bound, so it exceeds it by one frame at most. Each channel has
//! its own bound: one that is blocked by alignment holds up no other. That bound is the back-pressure.
//!
//! Only what an overtaking barrier takes along goes past the bound. A receiver can take a barrier out of the middle of a
//! queue, with a copy of the rows before it; the rows stay, and are processed as usual.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use floodmark_snapshot::Epoch;
pub use floodmark_snapshot::runtime::Signal;

use crate::{Barrier, Batch, Frame};

/// Bytes that a channel holds before its sender must wait.
pub const CHANNEL_BYTES_MAX: usize = 1 << 20;
/// What a frame without rows weighs, bytes.
const CONTROL_WEIGHT: usize = 64;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a frame was not taken.
#[derive(Debug)]
pub enum Refused {
    /// The queue is full. The sender's signal is notified when there is room.
    Full(Frame),
    /// The receiver is gone.
    Closed,
}

#[derive(Debug)]
struct Queue {
    frames: VecDeque<(Frame, usize)>,
    bytes: usize,
    /// The barriers among the frames, oldest first, and whether they overtake: found without a search.
    barriers: VecDeque<(Barrier, bool)>,
    /// Set while the sender waits for room.
    waiting: Option<Arc<Signal>>,
}

#[derive(Debug)]
struct Shared {
    queues: Mutex<Vec<Queue>>,
    /// Barriers in all queues: most of the time none, and then nobody has to look for them. Changes under the lock.
    barriers: AtomicUsize,
    /// Bytes that each queue holds before its sender must wait.
    bound: usize,
    receiver: Arc<Signal>,
}

/// The receiving end of all channels into a subtask.
#[derive(Debug)]
pub struct Inbox {
    shared: Arc<Shared>,
    /// Where the search for the next frame begins: channels take turns.
    next: usize,
    channels: usize,
}

/// The sending end of one channel.
#[derive(Debug)]
pub struct Sender {
    shared: Arc<Shared>,
    channel: usize,
    signal: Arc<Signal>,
}

impl Inbox {
    /// An inbox without channels. `signal` wakes the thread that reads it.
    #[must_use]
    pub fn new(signal: Arc<Signal>) -> Self {
        Self::bounded(signal, CHANNEL_BYTES_MAX)
    }

    /// As [`Inbox::new`], with a bound of each channel's own: the bytes that it holds before its sender must wait.
    #[must_use]
    pub fn bounded(signal: Arc<Signal>, bound: usize) -> Self {
        let shared = Shared { queues: Mutex::new(Vec::new()), barriers: AtomicUsize::new(0), bound, receiver: signal };
        Self { shared: Arc::new(shared), next: 0, channels: 0 }
    }

    /// Adds a channel, whose number is the count of those before it. `signal` wakes the sender's thread.
    pub fn channel(&mut self, signal: Arc<Signal>) -> Sender {
        let mut queues = lock(&self.shared.queues);
        queues.push(Queue { frames: VecDeque::new(), bytes: 0, barriers: VecDeque::new(), waiting: None });
        self.channels = queues.len();
        Sender { shared: self.shared.clone(), channel: self.channels - 1, signal }
    }

    /// Number of channels.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Takes the next frame of a channel that is not blocked, the channels in turn.
    pub fn try_recv(&mut self, blocked: impl Fn(usize) -> bool) -> Option<(usize, Frame)> {
        self.recv_if(|channel, _| !blocked(channel))
    }

    /// Takes the next rows of a channel that has no other frame before them, the channels in turn.
    pub fn try_recv_rows(&mut self) -> Option<(usize, Batch)> {
        match self.recv_if(|_, frame| matches!(frame, Frame::Batch(_)))? {
            (channel, Frame::Batch(batch)) => Some((channel, batch)),
            (_, Frame::Watermark(_) | Frame::Barrier(_) | Frame::Overtaking(_) | Frame::Idle | Frame::End) => None,
        }
    }

    /// Takes the first frame of the next channel where it is `wanted`.
    fn recv_if(&mut self, wanted: impl Fn(usize, &Frame) -> bool) -> Option<(usize, Frame)> {
        let mut queues = lock(&self.shared.queues);
        for step in 0..self.channels {
            let channel = (self.next + step) % self.channels;
            let queue = &mut queues[channel];
            if let Some((frame, weight)) = queue.frames.pop_front_if(|(frame, _)| wanted(channel, frame)) {
                queue.bytes -= weight;
                let wake = if queue.bytes < self.shared.bound { queue.waiting.take() } else { None };
                self.next = (channel + 1) % self.channels;
                if barrier_of(&frame).is_some() {
                    queue.barriers.pop_front();
                    self.shared.barriers.fetch_sub(1, Ordering::Relaxed);
                }
                drop(queues);
                if let Some(sender) = wake {
                    sender.notify();
                }
                return Some((channel, frame));
            }
        }
        None
    }

    /// The barriers that wait in the channels which hold any.
    #[must_use]
    pub fn waiting_barriers(&self) -> Vec<WaitingBarriers> {
        // A barrier that is pushed at this moment is seen at the next step: its sender notifies the signal after it.
        if self.shared.barriers.load(Ordering::Relaxed) == 0 {
            return Vec::new();
        }
        let mut all = Vec::new();
        for (channel, queue) in lock(&self.shared.queues).iter().enumerate() {
            if !queue.barriers.is_empty() {
                let overtaking = queue.barriers.iter().filter(|(_, overtakes)| *overtakes).map(|(b, _)| b.epoch).max();
                all.push(WaitingBarriers {
                    channel,
                    barriers: queue.barriers.iter().map(|(b, _)| *b).collect(),
                    overtaking: overtaking.unwrap_or_default(),
                });
            }
        }
        all
    }

    /// Takes the barrier of `epoch` out of the queue of `channel`, and answers with the rows before it, which stay there.
    pub fn take_barrier(&mut self, channel: usize, epoch: Epoch) -> Vec<Batch> {
        let mut queues = lock(&self.shared.queues);
        let Some(queue) = queues.get_mut(channel) else { return Vec::new() };
        let is_it = |(frame, _): &(Frame, usize)| barrier_of(frame).is_some_and(|b| b.epoch == epoch);
        let Some(at) = queue.frames.iter().position(is_it) else { return Vec::new() };
        if let Some((_, weight)) = queue.frames.remove(at) {
            queue.bytes -= weight;
            queue.barriers.retain(|(b, _)| b.epoch != epoch);
            self.shared.barriers.fetch_sub(1, Ordering::Relaxed);
        }
        let rows = queue.frames.iter().take(at).filter_map(|(frame, _)| match frame {
            Frame::Batch(batch) => Some(batch.clone()),
            Frame::Watermark(_) | Frame::Barrier(_) | Frame::Overtaking(_) | Frame::Idle | Frame::End => None,
        });
        let rows = rows.collect();
        let wake = if queue.bytes < self.shared.bound { queue.waiting.take() } else { None };
        drop(queues);
        if let Some(sender) = wake {
            sender.notify();
        }
        rows
    }
}

/// The barriers in the queue of one channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitingBarriers {
    /// The channel.
    pub channel: usize,
    /// The barriers, oldest first.
    pub barriers: Vec<Barrier>,
    /// The newest of them that is marked as overtaking; 0 if none is.
    pub overtaking: Epoch,
}

fn barrier_of(frame: &Frame) -> Option<Barrier> {
    match frame {
        Frame::Barrier(barrier) | Frame::Overtaking(barrier) => Some(*barrier),
        Frame::Batch(_) | Frame::Watermark(_) | Frame::Idle | Frame::End => None,
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        // Senders that wait for room find the channel closed.
        for queue in lock(&self.shared.queues).drain(..) {
            if let Some(sender) = queue.waiting {
                sender.notify();
            }
        }
    }
}

impl Sender {
    /// Puts a frame into the channel if there is room.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn try_send(&self, frame: Frame) -> Result<(), Refused> {
        let mut queues = lock(&self.shared.queues);
        let Some(queue) = queues.get_mut(self.channel) else { return Err(Refused::Closed) };
        if queue.bytes >= self.shared.bound {
            queue.waiting = Some(self.signal.clone());
            return Err(Refused::Full(frame));
        }
        self.push(queue, frame);
        drop(queues);
        self.shared.receiver.notify();
        Ok(())
    }

    /// Whether there is room. If not, the sender's signal is notified when there is.
    ///
    /// # Errors
    /// [`Refused::Closed`].
    pub fn has_room(&self) -> Result<bool, Refused> {
        let mut queues = lock(&self.shared.queues);
        let Some(queue) = queues.get_mut(self.channel) else { return Err(Refused::Closed) };
        let room = queue.bytes < self.shared.bound;
        if !room {
            queue.waiting = Some(self.signal.clone());
        }
        Ok(room)
    }

    /// Puts a frame into the channel, whether there is room or not. Only for what an overtaking barrier takes along.
    ///
    /// # Errors
    /// [`Refused::Closed`].
    pub fn send_past_bound(&self, frame: Frame) -> Result<(), Refused> {
        let mut queues = lock(&self.shared.queues);
        let Some(queue) = queues.get_mut(self.channel) else { return Err(Refused::Closed) };
        self.push(queue, frame);
        drop(queues);
        self.shared.receiver.notify();
        Ok(())
    }

    fn push(&self, queue: &mut Queue, frame: Frame) {
        match (&frame, queue.frames.back_mut()) {
            // Nothing lies between them: the later watermark says it all.
            (Frame::Watermark(_), Some((last @ Frame::Watermark(_), _))) => *last = frame,
            _ => {
                if let Some(barrier) = barrier_of(&frame) {
                    queue.barriers.push_back((barrier, matches!(frame, Frame::Overtaking(_))));
                    self.shared.barriers.fetch_add(1, Ordering::Relaxed);
                }
                let weight = weight(&frame);
                queue.bytes += weight;
                queue.frames.push_back((frame, weight));
            }
        }
    }
}

fn weight(frame: &Frame) -> usize {
    match frame {
        Frame::Batch(batch) => batch.weight(),
        Frame::Watermark(_) | Frame::Barrier(_) | Frame::Overtaking(_) | Frame::Idle | Frame::End => CONTROL_WEIGHT,
    }
}

#[cfg(test)]
mod tests {
    use arrow::{array::Int64Array, record_batch::RecordBatch};

    use super::*;

    fn batch(rows: usize) -> Frame {
        let column = Arc::new(Int64Array::from(vec![7; rows]));
        Frame::Batch(Batch::new(RecordBatch::try_from_iter([("v", column as _)]).unwrap()))
    }

    #[test]
    fn a_full_channel_refuses_until_it_is_read_and_then_wakes_its_sender() {
        let (reader, writer) = (Arc::new(Signal::default()), Arc::new(Signal::default()));
        let mut inbox = Inbox::new(reader);
        let sender = inbox.channel(writer.clone());
        sender.try_send(batch(CHANNEL_BYTES_MAX / 8)).unwrap();
        assert!(matches!(sender.try_send(Frame::Idle), Err(Refused::Full(Frame::Idle))));
        assert!(inbox.try_recv(|_| true).is_none(), "blocked");
        assert!(inbox.try_recv(|_| false).is_some());
        writer.wait(None);
        sender.try_send(Frame::Idle).unwrap();
        drop(inbox);
        assert!(matches!(sender.try_send(Frame::Idle), Err(Refused::Closed)));
    }

    #[test]
    fn channels_take_turns_and_a_blocked_one_holds_up_no_other() {
        let signal = Arc::new(Signal::default());
        let mut inbox = Inbox::new(signal.clone());
        let senders: Vec<_> = (0..3).map(|_| inbox.channel(signal.clone())).collect();
        for sender in &senders {
            sender.try_send(batch(1)).unwrap();
            sender.try_send(batch(1)).unwrap();
        }
        let mut order = Vec::new();
        while let Some((channel, _)) = inbox.try_recv(|c| c == 1) {
            order.push(channel);
        }
        assert_eq!(order, [0, 2, 0, 2]);
    }

    #[test]
    fn a_barrier_is_taken_out_of_the_middle_with_a_copy_of_the_rows_before_it() {
        let signal = Arc::new(Signal::default());
        let mut inbox = Inbox::bounded(signal.clone(), 1 << 20);
        let senders: Vec<_> = (0..2).map(|_| inbox.channel(signal.clone())).collect();
        let barrier = |epoch| Barrier::checkpoint(Epoch(epoch));
        for frame in [batch(1), Frame::Barrier(barrier(1)), Frame::Watermark(5), batch(2)] {
            senders[1].try_send(frame).unwrap();
        }
        senders[1].send_past_bound(Frame::Overtaking(barrier(2))).unwrap();
        senders[1].try_send(batch(3)).unwrap();
        let waiting = [WaitingBarriers { channel: 1, barriers: vec![barrier(1), barrier(2)], overtaking: Epoch(2) }];
        assert_eq!(inbox.waiting_barriers(), waiting);
        let sizes = |batches: Vec<Batch>| batches.iter().map(Batch::len).collect::<Vec<_>>();
        assert_eq!(sizes(inbox.take_barrier(1, Epoch(2))), [1, 2]);
        assert_eq!(sizes(inbox.take_barrier(1, Epoch(2))), [0; 0], "gone");
        let mut order = Vec::new();
        while let Some((_, frame)) = inbox.try_recv(|_| false) {
            order.push(match frame {
                Frame::Batch(batch) => batch.len().to_string(),
                other => format!("{other:?}").split(['(', ' ']).next().unwrap().to_owned(),
            });
        }
        assert_eq!(order, ["1", "Barrier", "Watermark", "2", "3"]);
        assert!(inbox.waiting_barriers().is_empty());
    }

    #[test]
    fn successive_watermarks_merge() {
        let signal = Arc::new(Signal::default());
        let mut inbox = Inbox::new(signal.clone());
        let sender = inbox.channel(signal);
        for watermark in 1..=3 {
            sender.try_send(Frame::Watermark(watermark)).unwrap();
        }
        assert!(matches!(inbox.try_recv(|_| false), Some((0, Frame::Watermark(3)))));
        assert!(inbox.try_recv(|_| false).is_none());
    }
}
