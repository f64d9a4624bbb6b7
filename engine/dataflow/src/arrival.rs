//! State that is still on its way when its task begins to run: slices of key groups, from whoever reads them to the task.
//!
//! Slices come in the order of their key groups, so one number says what is there. No more than [`SLICES_AHEAD_MAX`] wait, so
//! that a task which is slow to take state over does not have all of it in memory twice.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use floodmark_snapshot::{Error, KeyGroup, KeyGroupRange, Result, runtime::Signal};
use floodmark_state::RestoredShard;

/// Slices that are read and not yet taken over.
pub const SLICES_AHEAD_MAX: usize = 2;

/// All that a snapshot holds of some key groups for one operator and subtask.
#[derive(Clone, Debug)]
pub struct Slice {
    /// Which. The first slice begins with the subtask's first key group, the last ends with its last, and nothing is between.
    pub key_groups: KeyGroupRange,
    /// Cuts of the shards that have rows of them, by earlier subtask and layer.
    pub shards: Vec<RestoredShard>,
}

#[derive(Debug)]
struct Shared {
    slices: Mutex<VecDeque<Result<Slice>>>,
    /// Wakes the task.
    task: Arc<Signal>,
    /// Wakes the reader.
    room: Signal,
    /// The reader has gone.
    ended: AtomicBool,
    /// The task has gone.
    closed: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Result<Slice>>> {
        self.slices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reader's end.
#[derive(Debug)]
pub struct Feed(Arc<Shared>);

/// The task's end.
#[derive(Debug)]
pub struct Arrivals {
    shared: Arc<Shared>,
    /// The key groups of the subtask.
    pub(crate) owned: KeyGroupRange,
    /// Number of key groups.
    pub(crate) max_parallelism: u16,
}

/// The two ends. `task` wakes the task.
#[must_use]
pub fn arrivals(task: Arc<Signal>, owned: KeyGroupRange, max_parallelism: u16) -> (Feed, Arrivals) {
    let shared = Arc::new(Shared {
        slices: Mutex::default(),
        task,
        room: Signal::default(),
        ended: AtomicBool::new(false),
        closed: AtomicBool::new(false),
    });
    (Feed(shared.clone()), Arrivals { shared, owned, max_parallelism })
}

impl Feed {
    /// Ready when there is room for a slice, or the task has gone ([`Feed::is_closed`]).
    pub fn poll_room(&self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.is_closed() || self.0.lock().len() < SLICES_AHEAD_MAX {
                return Poll::Ready(());
            }
            // A notice may be an old one.
            if self.0.room.poll_wait(context).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// Hands over the next slice, or says why there is none: then the attempt fails.
    pub fn put(&self, slice: Result<Slice>) {
        self.0.lock().push_back(slice);
        self.0.task.notify();
    }

    /// Whether the task has gone: nobody takes slices any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
        self.0.task.notify();
    }
}

impl Arrivals {
    /// The next slice, if it is there.
    ///
    /// # Errors
    /// Why it will never be.
    pub(crate) fn next(&self) -> Result<Option<Slice>> {
        // Asked first: a reader that goes has put everything before.
        let ended = self.shared.ended.load(Ordering::Acquire);
        match self.shared.lock().pop_front() {
            Some(slice) => {
                self.shared.room.notify();
                slice.map(Some)
            }
            None if ended => Err(Error::abort("internal error: the reader of state has ended early")),
            None => Ok(None),
        }
    }

    /// Whether a slice ends with the last key group.
    pub(crate) fn is_last(&self, slice: KeyGroupRange) -> bool {
        slice.last >= self.owned.last
    }

    /// The key group of a key.
    pub(crate) fn group(&self, hash: u64) -> KeyGroup {
        KeyGroup::of(hash, self.max_parallelism)
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.room.notify();
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    fn slice(first: u16, last: u16) -> Slice {
        Slice { key_groups: KeyGroupRange { first: KeyGroup(first), last: KeyGroup(last) }, shards: Vec::new() }
    }

    #[test]
    fn a_reader_waits_for_room_and_learns_when_nobody_takes_slices_any_more() {
        let owned = KeyGroupRange { first: KeyGroup(0), last: KeyGroup(9) };
        let (feed, arrivals) = arrivals(Arc::default(), owned, 10);
        let mut context = Context::from_waker(Waker::noop());
        for n in 0..SLICES_AHEAD_MAX as u16 {
            assert!(feed.poll_room(&mut context).is_ready());
            feed.put(Ok(slice(n, n)));
        }
        assert!(feed.poll_room(&mut context).is_pending());
        assert_eq!(arrivals.next().unwrap().unwrap().key_groups.first, KeyGroup(0));
        assert!(feed.poll_room(&mut context).is_ready());
        feed.put(Ok(slice(2, 9)));
        assert!(feed.poll_room(&mut context).is_pending());
        drop(arrivals);
        assert!(feed.poll_room(&mut context).is_ready() && feed.is_closed());
    }

    #[test]
    fn a_reader_that_ends_early_is_an_error_and_not_a_wait_for_ever() {
        let owned = KeyGroupRange { first: KeyGroup(0), last: KeyGroup(9) };
        let (feed, arrivals) = arrivals(Arc::default(), owned, 10);
        feed.put(Ok(slice(0, 3)));
        drop(feed);
        assert!(arrivals.next().unwrap().is_some());
        assert!(arrivals.next().is_err());
    }
}
