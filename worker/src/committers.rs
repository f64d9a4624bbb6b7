//! Committers: one thread for each sink subtask that stages its output, so that a transaction never holds up the data.
//!
//! The decisions are [`CommitMachine`]'s; this file keeps the staged bytes, calls the [`Committer`], and waits out its
//! retries. Invariant: bytes are dropped only once a commit that holds them is confirmed.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::Duration,
};

use bytes::Bytes;
use floodmark_dataflow::sink::Committer;
use floodmark_snapshot::{
    Disposition, Env, Epoch, Error, OperatorUid, Result, Step,
    commit::{CommitMachine, Effect, Event},
    env::spawn_thread,
};

/// Which committer: a sink, and the subtask whose identity it writes under.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct CommitterId {
    /// The sink.
    pub(crate) uid: OperatorUid,
    /// The subtask.
    pub(crate) index: u32,
}

impl std::fmt::Display for CommitterId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}[{}]", self.uid, self.index)
    }
}

/// What a committer's thread tells the coordinator.
pub(crate) type Report = Box<dyn Fn(CommitterReport) + Send>;

/// See [`Report`].
#[derive(Debug)]
pub(crate) enum CommitterReport {
    /// Everything staged up to `epoch` is visible.
    Committed(CommitterId, Epoch),
    /// It can't go on.
    Failed(CommitterId, Error),
}

/// Records that a sink has staged and whose commit is not confirmed, by epoch.
#[derive(Clone, Default)]
pub(crate) struct Staged(Arc<Mutex<BTreeMap<Epoch, Vec<Bytes>>>>);

impl Staged {
    /// Keeps what the barrier of `epoch` handed over.
    pub(crate) fn add(&self, epoch: Epoch, records: Bytes) {
        self.lock().entry(epoch).or_default().push(records);
    }

    /// Everything not yet confirmed, of epochs up to `epoch`, in order.
    pub(crate) fn up_to(&self, epoch: Epoch) -> Vec<Bytes> {
        self.lock().range(..=epoch).flat_map(|(_, records)| records.iter().cloned()).collect()
    }

    fn confirm(&self, epoch: Epoch) {
        let mut staged = self.lock();
        *staged = staged.split_off(&epoch.next());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Epoch, Vec<Bytes>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A committer's thread, as the rest of the worker holds it. Dropping it ends the thread after what it is doing.
pub(crate) struct CommitterHandle {
    events: Sender<Event>,
    staged: Staged,
}

impl CommitterHandle {
    /// Tells the machine of an event; one that comes after the thread has failed is dropped, its failure was reported.
    pub(crate) fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// The records that wait for a commit.
    pub(crate) fn staged(&self) -> Staged {
        self.staged.clone()
    }
}

/// Starts the thread: it opens the committer, commits what `restored` says is pending, and then follows the events.
pub(crate) fn start(
    id: CommitterId,
    committer: Box<dyn Committer>,
    restored: Option<(Epoch, Vec<Bytes>)>,
    env: Env,
    report: Report,
) -> Result<CommitterHandle> {
    let (events, inbox) = mpsc::channel();
    let staged = Staged::default();
    let restored = restored.map(|(epoch, records)| {
        let count = records.len();
        for shard in records {
            staged.add(epoch, shard);
        }
        (epoch, count)
    });
    let thread = CommitterThread {
        name: id.to_string(),
        id,
        committer,
        machine: CommitMachine::new(),
        staged: staged.clone(),
        env,
        report,
        inbox,
    };
    spawn_thread(format!("commit {}", thread.name), move || thread.run(restored))?;
    Ok(CommitterHandle { events, staged })
}

struct CommitterThread {
    id: CommitterId,
    name: String,
    committer: Box<dyn Committer>,
    machine: CommitMachine,
    staged: Staged,
    env: Env,
    report: Report,
    inbox: Receiver<Event>,
}
