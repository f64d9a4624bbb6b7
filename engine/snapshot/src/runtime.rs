//! The seam to whatever runs the process: threads and a tokio runtime in production, a seeded scheduler in the simulator.
//!
//! Two kinds of work exist. *Futures* are the coordinator's shell and its uploads. *Machines* are what owns a thread in
//! production (a task, a committer): they do a bounded amount of work per [`Machine::step`] and park on a [`Signal`].
//!
//! Invariant: nothing in here decides anything; a runtime may run what is ready in any order.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::sync::oneshot;

use crate::{Env, Error, Result, env::spawn_thread};

/// Runs what a process consists of. Calls come once per start of something, never per record.
pub trait Runtime: Send + Sync {
    /// Runs a future to its end, beside the caller.
    fn spawn(&self, work: BoxFuture<'static, ()>);

    /// Runs work that may block or take long, where it holds up no future.
    fn blocking(&self, work: Box<dyn FnOnce() + Send>);

    /// Completes after this long.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;

    /// Drives a machine until it is done. `name` is for people: `task 2.0`.
    ///
    /// # Errors
    /// When it can't be started (the operating system refuses another thread).
    fn drive(&self, name: String, machine: Box<dyn Machine>) -> Result<()>;
}

/// What a step of a machine came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There may be more to do at once.
    Ready,
    /// Nothing can be done until the signal is notified, or for this long.
    Waiting {
        /// See above.
        until: Option<Duration>,
    },
    /// The machine has ended.
    Done,
}

/// What owns a thread in production.
pub trait Machine: Send {
    /// Does a bounded amount of work.
    fn step(&mut self) -> Turn;

    /// What wakes the machine.
    fn signal(&self) -> &Arc<Signal>;

    /// A step has panicked: says so to whoever listens. No other step follows.
    fn panicked(&mut self, what: &str);

    /// Steps until it is done: the loop of a thread. Not to be overridden; it is here so that its calls are direct.
    fn run(&mut self) {
        loop {
            match self.step() {
                Turn::Ready => {}
                Turn::Waiting { until } => self.signal().wait(until),
                Turn::Done => return,
            }
        }
    }
}

/// Runs part of a machine. A panic is a defect of ours; it must still end the job with a message rather than leave it
/// hanging. `None` if there was one.
pub fn guarded<T>(machine: &mut dyn Machine, part: impl FnOnce(&mut dyn Machine) -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(|| part(&mut *machine))) {
        Ok(done) => Some(done),
        Err(panic) => {
            let what = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("unknown cause");
            machine.panicked(what);
            None
        }
    }
}

#[derive(Default)]
struct Notice {
    given: bool,
    /// Of the future that waits, if a future does.
    waker: Option<Waker>,
}

/// Wakes one machine. A notification that comes before the wait is not lost.
#[derive(Default)]
pub struct Signal {
    notice: Mutex<Notice>,
    wake: Condvar,
}

impl fmt::Debug for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signal").field("given", &self.lock().given).finish_non_exhaustive()
    }
}

impl Signal {
    /// Wakes whoever waits, or the next who will.
    pub fn notify(&self) {
        let mut notice = self.lock();
        if !notice.given {
            notice.given = true;
            let waker = notice.waker.take();
            self.wake.notify_one();
            drop(notice);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    /// Waits for a notification, at most `timeout`; blocks the thread.
    pub fn wait(&self, timeout: Option<Duration>) {
        let notice = self.lock();
        let mut notice = match timeout {
            Some(timeout) => {
                let waited = self.wake.wait_timeout_while(notice, timeout, |n| !n.given);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.wake.wait_while(notice, |n| !n.given).unwrap_or_else(PoisonError::into_inner),
        };
        notice.given = false;
    }

    /// Waits for a notification without blocking the thread. The last caller's waker is the one that is woken.
    pub fn poll_wait(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut notice = self.lock();
        if notice.given {
            notice.given = false;
            return Poll::Ready(());
        }
        notice.waker = Some(context.waker().clone());
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, Notice> {
        self.notice.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Env {
    /// Runs work that may block or take long off the caller's loop, and answers with what came of it.
    ///
    /// # Errors
    /// When the work panicked; `what` says what it was.
    pub async fn blocking<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let (sender, done) = oneshot::channel();
        self.runtime.blocking(Box::new(move || drop(sender.send(work()))));
        done.await.map_err(|_| Error::abort(format!("internal error: {what} panicked")))
    }
}

/// A thread for each machine; futures on the tokio runtime that the caller is in.
pub(crate) struct SystemRuntime;

impl Runtime for SystemRuntime {
    #[allow(clippy::disallowed_methods, reason = "this is the seam that the ban points to")]
    fn spawn(&self, work: BoxFuture<'static, ()>) {
        drop(tokio::spawn(work));
    }

    fn blocking(&self, work: Box<dyn FnOnce() + Send>) {
        drop(tokio::task::spawn_blocking(work));
    }

    #[allow(clippy::disallowed_methods, reason = "this is the seam that the ban points to")]
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }

    fn drive(&self, name: String, mut machine: Box<dyn Machine>) -> Result<()> {
        spawn_thread(name, move || guarded(&mut *machine, |m| m.run())).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notification_before_the_wait_is_not_lost_to_threads_or_futures() {
        let signal = Signal::default();
        signal.notify();
        signal.wait(None);
        let mut context = Context::from_waker(Waker::noop());
        assert!(signal.poll_wait(&mut context).is_pending());
        signal.notify();
        assert!(signal.poll_wait(&mut context).is_ready());
        assert!(signal.poll_wait(&mut context).is_pending());
    }

    struct Breaks(Arc<Signal>, Arc<Mutex<String>>);

    impl Machine for Breaks {
        fn step(&mut self) -> Turn {
            panic!("at {}", 7)
        }

        fn signal(&self) -> &Arc<Signal> {
            &self.0
        }

        fn panicked(&mut self, what: &str) {
            self.1.lock().unwrap().push_str(what);
        }
    }

    #[test]
    fn a_machine_that_panics_is_told_so() {
        let told = Arc::default();
        let mut machine = Breaks(Arc::default(), Arc::clone(&told));
        assert_eq!(guarded(&mut machine, |m| m.run()), None);
        assert_eq!(*told.lock().unwrap(), "at 7");
    }
}
