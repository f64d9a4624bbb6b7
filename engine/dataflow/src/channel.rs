//! Channels between subtasks: one queue per sender in the receiver's inbox, each bounded in bytes. Nothing blocks in here; a
//! thread that can't go on parks on its [`Signal`].
//!
//! A queue takes a frame as long as it holds less than its bound, so it exceeds it by one frame at most. Each channel has
//! its own bound: one that is blocked by alignment holds up no other. That bound is the back-pressure.
//!
//! Only what an overtaking barrier takes along goes past the bound. A receiver can take a barrier out of the middle of a
//! queue, with a copy of the rows before it; the rows stay, and are processed as usual.
//!
//! A channel between two processes is two of these, one at each end, with a pump between them. The pump at the receiver's end
//! puts in what comes, weighed as it was on the way ([`Sender::send_weighing`]), and looks at how much is left
//! ([`Sender::watch`]); the one at the sender's end says what is on its way without leave ([`Inbox::owe`]), so that the
//! sender waits for that too.

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
    /// Bytes that are not in the queue any more, and for which the sender must wait all the same.
    owed: usize,
    /// The barriers among the frames, oldest first, and whether they overtake: found without a search.
    barriers: VecDeque<(Barrier, bool)>,
    /// Set while the sender waits until the queue holds less than so many bytes.
    waiting: Option<(usize, Arc<Signal>)>,
}

impl Queue {
    /// What counts against the bound.
    fn held(&self) -> usize {
        self.bytes + self.owed
    }

    /// The sender to wake, if it waits for no less than what is there now.
    fn wake(&mut self) -> Option<Arc<Signal>> {
        let held = self.held();
        self.waiting.take_if(|(below, _)| held < *below).map(|(_, sender)| sender)
    }
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
        queues.push(Queue { frames: VecDeque::new(), bytes: 0, owed: 0, barriers: VecDeque::new(), waiting: None });
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
                let wake = queue.wake();
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
        let wake = queue.wake();
        drop(queues);
        if let Some(sender) = wake {
            sender.notify();
        }
        rows
    }

    /// Says that so many bytes which were taken from `channel` are to count against its bound for now, in place of what was
    /// said before.
    pub fn owe(&mut self, channel: usize, bytes: usize) {
        let mut queues = lock(&self.shared.queues);
        let Some(queue) = queues.get_mut(channel) else { return };
        queue.owed = bytes;
        let wake = queue.wake();
        drop(queues);
        if let Some(sender) = wake {
            sender.notify();
        }
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
            if let Some((_, sender)) = queue.waiting {
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
        if queue.held() >= self.shared.bound {
            queue.waiting = Some((self.shared.bound, self.signal.clone()));
            return Err(Refused::Full(frame));
        }
        let weight = weight(&frame);
        self.push(queue, frame, weight);
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
        let room = queue.held() < self.shared.bound;
        if !room {
            queue.waiting = Some((self.shared.bound, self.signal.clone()));
        }
        Ok(room)
    }

    /// Puts a frame into the channel, whether there is room or not. Only for what an overtaking barrier takes along.
    ///
    /// # Errors
    /// [`Refused::Closed`].
    pub fn send_past_bound(&self, frame: Frame) -> Result<(), Refused> {
        let weight = weight(&frame);
        self.send_weighing(frame, weight)
    }

    /// Puts a frame that weighs so many bytes into the channel, whether there is room or not. Only for who keeps a bound of
    /// its own: see [`Sender::watch`].
    ///
    /// # Errors
    /// [`Refused::Closed`].
    pub fn send_weighing(&self, frame: Frame, weight: usize) -> Result<(), Refused> {
        let mut queues = lock(&self.shared.queues);
        let Some(queue) = queues.get_mut(self.channel) else { return Err(Refused::Closed) };
        self.push(queue, frame, weight);
        drop(queues);
        self.shared.receiver.notify();
        Ok(())
    }

    /// Bytes that wait in the channel. If they are not less than `below`, the sender's signal is notified once they are; and
    /// when the receiver goes.
    ///
    /// # Errors
    /// [`Refused::Closed`].
    pub fn watch(&self, below: usize) -> Result<usize, Refused> {
        let mut queues = lock(&self.shared.queues);
        let Some(queue) = queues.get_mut(self.channel) else { return Err(Refused::Closed) };
        let held = queue.held();
        queue.waiting = (held >= below).then(|| (below, self.signal.clone()));
        Ok(held)
    }

    /// Lets the receiver know that the barrier of `epoch` overtakes, if it waits in the channel and may.
    pub fn overtake(&self, epoch: Epoch) {
        let mut queues = lock(&self.shared.queues);
        let Some(queue) = queues.get_mut(self.channel) else { return };
        let is_it = |b: &Barrier| b.epoch == epoch && b.may_overtake();
        let Some((_, overtakes @ false)) = queue.barriers.iter_mut().find(|(b, _)| is_it(b)) else { return };
        *overtakes = true;
        for (frame, _) in &mut queue.frames {
            if let Frame::Barrier(barrier) = *frame
                && is_it(&barrier)
            {
                *frame = Frame::Overtaking(barrier);
            }
        }
        drop(queues);
        self.shared.receiver.notify();
    }

    /// What wakes the sender.
    #[must_use]
    pub fn signal(&self) -> &Arc<Signal> {
        &self.signal
    }

    fn push(&self, queue: &mut Queue, frame: Frame, weight: usize) {
        match (&frame, queue.frames.back_mut()) {
            // Nothing lies between them: the later watermark says it all.
            (Frame::Watermark(_), Some((last @ Frame::Watermark(_), _))) => *last = frame,
            _ => {
                if let Some(barrier) = barrier_of(&frame) {
                    queue.barriers.push_back((barrier, matches!(frame, Frame::Overtaking(_))));
                    self.shared.barriers.fetch_add(1, Ordering::Relaxed);
                }
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
    fn a_barrier_that_waits_in_a_channel_can_be_told_to_overtake_if_it_may() {
        let signal = Arc::new(Signal::default());
        let mut inbox = Inbox::new(signal.clone());
        let sender = inbox.channel(Arc::default());
        sender.try_send(batch(1)).unwrap();
        sender.try_send(Frame::Barrier(Barrier { whole: true, ..Barrier::checkpoint(Epoch(1)) })).unwrap();
        sender.try_send(Frame::Barrier(Barrier::checkpoint(Epoch(2)))).unwrap();
        signal.wait(None);
        sender.overtake(Epoch(1));
        sender.overtake(Epoch(3));
        assert_eq!(inbox.waiting_barriers()[0].overtaking, Epoch(0));
        sender.overtake(Epoch(2));
        signal.wait(None);
        assert_eq!(inbox.waiting_barriers()[0].overtaking, Epoch(2));
        let frames: Vec<_> = std::iter::from_fn(|| inbox.try_recv(|_| false)).map(|(_, frame)| frame).collect();
        assert!(matches!(frames[..], [Frame::Batch(_), Frame::Barrier(_), Frame::Overtaking(_)]), "{frames:?}");
    }

    #[test]
    fn a_sender_waits_for_what_is_owed_as_for_what_is_there() {
        let writer = Arc::new(Signal::default());
        let mut inbox = Inbox::bounded(Arc::default(), 100);
        let sender = inbox.channel(writer.clone());
        inbox.owe(0, 99);
        sender.try_send(Frame::Idle).unwrap();
        assert!(matches!(sender.try_send(Frame::Idle), Err(Refused::Full(_))));
        assert!(inbox.try_recv(|_| false).is_some());
        writer.wait(None);
        inbox.owe(0, 100);
        assert!(!sender.has_room().unwrap());
        inbox.owe(0, 7);
        writer.wait(None);
        assert!(sender.has_room().unwrap());
    }

    #[test]
    fn who_keeps_a_bound_of_its_own_is_told_when_less_is_left_than_it_asked_for() {
        let writer = Arc::new(Signal::default());
        let mut inbox = Inbox::bounded(Arc::default(), 1);
        let sender = inbox.channel(writer.clone());
        for _ in 0..3 {
            sender.send_weighing(Frame::Idle, 1000).unwrap();
        }
        assert_eq!(sender.watch(1500).unwrap(), 3000);
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        inbox.try_recv(|_| false);
        assert!(writer.poll_wait(&mut context).is_pending(), "2000 are left");
        inbox.try_recv(|_| false);
        assert!(writer.poll_wait(&mut context).is_ready());
        assert_eq!(sender.watch(0).unwrap(), 1000);
        drop(inbox);
        assert!(writer.poll_wait(&mut context).is_ready(), "the receiver has gone");
        assert!(matches!(sender.watch(0), Err(Refused::Closed)));
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
