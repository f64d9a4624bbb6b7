//! The one thread that writes to a database. The task's thread only reads: what it wants written it hands over as jobs.
//!
//! Jobs run in the order in which they came, so a checkpoint holds exactly what was handed over before it. Invariant: once a
//! job has failed, no later one runs, and its error comes out of the next call.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use floodmark_snapshot::{Disposition, Error, Result, env::spawn_thread};
use rocksdb::DB;

/// Jobs that wait or run, at most; who hands over another one waits. Enough that the task goes on while a checkpoint is taken.
const JOBS_MAX: usize = 16;

/// What the thread does at one time.
pub(crate) type Job = Box<dyn FnOnce(&DB) -> Result<()> + Send>;

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    /// Jobs handed over so far; the number of the last one.
    given: u64,
    /// Jobs done so far.
    done: u64,
    /// Why the thread has stopped.
    failed: Option<(Disposition, String)>,
    ending: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hands jobs to the thread.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread.
    pub(crate) fn start(name: String, db: Arc<DB>) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = spawn_thread(name, move || run(&theirs, &db))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Hands over a job, and answers with its number: the first is 1. Waits while [`JOBS_MAX`] are ahead of it.
    pub(crate) fn submit(&self, job: Job) -> Result<u64> {
        let mut state = self.shared.lock();
        while state.given - state.done >= JOBS_MAX as u64 && state.failed.is_none() {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        check(&state)?;
        state.waiting.push_back(job);
        state.given += 1;
        self.shared.changed.notify_all();
        Ok(state.given)
    }

    /// Jobs done so far: job n is done if this is at least n.
    pub(crate) fn done(&self) -> Result<u64> {
        let state = self.shared.lock();
        check(&state)?;
        Ok(state.done)
    }

    /// Waits until job `number` is done.
    pub(crate) fn wait(&self, number: u64) -> Result<()> {
        let mut state = self.shared.lock();
        while state.done < number && state.failed.is_none() {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        check(&state)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic in there is a defect that has already come out of a call.
            let _ = thread.join();
        }
    }
}

fn check(state: &State) -> Result<()> {
    match &state.failed {
        None => Ok(()),
        Some((disposition, cause)) => Err(Error::new(*disposition, format!("write state: {cause}"))),
    }
}

/// Does the jobs, those that wait when the end comes too: a checkpoint that is under way may still be wanted.
fn run(shared: &Shared, db: &DB) {
    let _stopped = Stopped(shared);
    loop {
        let mut state = shared.lock();
        let job = loop {
            if let Some(job) = state.waiting.pop_front() {
                break job;
            }
            if state.ending {
                return;
            }
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        let outcome = job(db);
        let mut state = shared.lock();
        match outcome {
            Ok(()) => state.done += 1,
            Err(error) => {
                state.failed = Some((error.disposition(), error.to_string()));
                state.waiting.clear();
                return;
            }
        }
        shared.changed.notify_all();
    }
}

/// Wakes whoever waits for the thread, also if it panics.
struct Stopped<'a>(&'a Shared);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        if !state.ending && state.failed.is_none() {
            state.failed = Some((Disposition::Abort, "the thread that writes has panicked".to_owned()));
        }
        drop(state);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn open() -> (tempfile::TempDir, Arc<DB>) {
        let folder = tempfile::tempdir().unwrap();
        let db = DB::open_default(folder.path()).unwrap();
        (folder, Arc::new(db))
    }

    #[test]
    fn jobs_run_in_order_and_those_that_wait_run_before_the_end() {
        let (_folder, db) = open();
        let last = Arc::new(AtomicU64::new(0));
        let writer = Writer::start("test".to_owned(), db).unwrap();
        for number in 1..=100 {
            let last = last.clone();
            let job = move |_: &DB| {
                assert_eq!(last.swap(number, Ordering::Relaxed), number - 1);
                Ok(())
            };
            assert_eq!(writer.submit(Box::new(job)).unwrap(), number);
        }
        writer.wait(50).unwrap();
        assert!(writer.done().unwrap() >= 50);
        drop(writer);
        assert_eq!(last.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn after_a_failure_no_job_runs_and_every_call_says_why() {
        let (_folder, db) = open();
        let writer = Writer::start("test".to_owned(), db).unwrap();
        let failing = writer.submit(Box::new(|_| Err(Error::corrupt("a damaged block")))).unwrap();
        let error = writer.wait(failing).expect_err("a failed job");
        assert_eq!(
            (error.disposition(), error.to_string().as_str()),
            (Disposition::Corrupt, "write state: a damaged block")
        );
        writer.done().expect_err("a failed job before");
        writer.submit(Box::new(|_| unreachable!("nothing runs any more"))).expect_err("a failed job before");
        let (_folder, db) = open();
        let writer = Writer::start("test".to_owned(), db).unwrap();
        let panicking = writer.submit(Box::new(|_| panic!("a defect"))).unwrap();
        assert!(writer.wait(panicking).expect_err("a panic").to_string().contains("panicked"));
    }
}
