//! Channels between subtasks: one queue per sender in the receiver's inbox, each bounded in bytes. Nothing blocks in here; a
//! thread that can't go on parks on its [`Signal`].
//!
//! A queue takes a frame as long as it holds less than its bound, so it exceeds it by one frame at most. Each channel has
//! its own bound: one that is blocked by alignment holds up no other. That bound is the back-pressure.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

pub use floodmark_snapshot::runtime::Signal;

use crate::Frame;

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
    /// Set while the sender waits for room.
    waiting: Option<Arc<Signal>>,
}

#[derive(Debug)]
struct Shared {
    queues: Mutex<Vec<Queue>>,
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
        Self { shared: Arc::new(Shared { queues: Mutex::new(Vec::new()), receiver: signal }), next: 0, channels: 0 }
    }

    /// Adds a channel, whose number is the count of those before it. `signal` wakes the sender's thread.
    pub fn channel(&mut self, signal: Arc<Signal>) -> Sender {
        let mut queues = lock(&self.shared.queues);
        queues.push(Queue { frames: VecDeque::new(), bytes: 0, waiting: None });
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
        let mut queues = lock(&self.shared.queues);
        for step in 0..self.channels {
            let channel = (self.next + step) % self.channels;
            if blocked(channel) {
                continue;
            }
            let queue = &mut queues[channel];
            if let Some((frame, weight)) = queue.frames.pop_front() {
                queue.bytes -= weight;
                let wake = if queue.bytes < CHANNEL_BYTES_MAX { queue.waiting.take() } else { None };
                self.next = (channel + 1) % self.channels;
                drop(queues);
                if let Some(sender) = wake {
                    sender.notify();
                }
                return Some((channel, frame));
            }
        }
        None
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
        if queue.bytes >= CHANNEL_BYTES_MAX {
            queue.waiting = Some(self.signal.clone());
            return Err(Refused::Full(frame));
        }
        match (&frame, queue.frames.back_mut()) {
            // Nothing lies between them: the later watermark says it all.
            (Frame::Watermark(_), Some((last @ Frame::Watermark(_), _))) => *last = frame,
            _ => {
                let weight = weight(&frame);
                queue.bytes += weight;
                queue.frames.push_back((frame, weight));
            }
        }
        drop(queues);
        self.shared.receiver.notify();
        Ok(())
    }
}

fn weight(frame: &Frame) -> usize {
    match frame {
        Frame::Batch(batch) => batch.weight(),
        Frame::Watermark(_) | Frame::Barrier(_) | Frame::Idle | Frame::End => CONTROL_WEIGHT,
    }
}

#[cfg(test)]
mod tests {
    use arrow::{array::Int64Array, record_batch::RecordBatch};

    use super::*;
    use crate::Batch;

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
