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

/// A staged shard: its rows and its bytes.
pub(crate) type StagedShard = (u64, Bytes);

/// Records that a sink has staged and whose commit is not confirmed, by epoch.
#[derive(Clone, Default)]
pub(crate) struct Staged(Arc<Mutex<BTreeMap<Epoch, Vec<StagedShard>>>>);

impl Staged {
    /// Keeps what the barrier of `epoch` handed over.
    pub(crate) fn add(&self, epoch: Epoch, shard: StagedShard) {
        self.lock().entry(epoch).or_default().push(shard);
    }

    /// Everything not yet confirmed, of epochs up to `epoch`, in order.
    pub(crate) fn up_to(&self, epoch: Epoch) -> Vec<StagedShard> {
        self.lock().range(..=epoch).flat_map(|(_, records)| records.iter().cloned()).collect()
    }

    fn confirm(&self, epoch: Epoch) {
        let mut staged = self.lock();
        *staged = staged.split_off(&epoch.next());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Epoch, Vec<StagedShard>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A committer's thread, as the rest of the worker holds it. Dropping it ends the thread after what it is doing.
pub(crate) struct CommitterHandle {
    events: Sender<Event>,
    staged: Staged,
}

impl CommitterHandle {
    /// A barrier's records are in [`CommitterHandle::staged`], and durable.
    pub(crate) fn staged_at(&self, epoch: Epoch) {
        self.send(Event::Staged(epoch));
    }

    /// A checkpoint is complete: what was staged up to it is to be made visible.
    pub(crate) fn completed(&self, epoch: Epoch) {
        self.send(Event::Completed(epoch));
    }

    /// The records that wait for a commit.
    pub(crate) fn staged(&self) -> &Staged {
        &self.staged
    }

    /// An event that comes after the thread has failed is dropped: its failure was reported.
    fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }
}

/// Starts the thread: it opens the committer, commits what `restored` says is pending, and then follows the events.
pub(crate) fn start(
    id: CommitterId,
    committer: Box<dyn Committer>,
    restored: Option<(Epoch, Vec<StagedShard>)>,
    env: Env,
    report: Report,
) -> Result<CommitterHandle> {
    let (events, inbox) = mpsc::channel();
    let staged = Staged::default();
    let pending = restored.as_ref().map(|(epoch, shards)| (*epoch, !shards.is_empty()));
    if let Some((epoch, shards)) = restored {
        shards.into_iter().for_each(|shard| staged.add(epoch, shard));
    }
    let (machine, first) = CommitMachine::new(pending);
    let name = format!("commit {id}");
    let thread = CommitterThread { id, committer, machine, staged: staged.clone(), env, report, inbox };
    spawn_thread(name, move || thread.run(first))?;
    Ok(CommitterHandle { events, staged })
}

struct CommitterThread {
    id: CommitterId,
    committer: Box<dyn Committer>,
    machine: CommitMachine,
    staged: Staged,
    env: Env,
    report: Report,
    inbox: Receiver<Event>,
}

impl CommitterThread {
    fn run(mut self, first: Effect) {
        let mut effect = Some(first);
        loop {
            while let Some(now) = effect {
                let Some(event) = self.carry_out(now) else { return };
                effect = event.and_then(|e| self.machine.step(e));
            }
            match self.inbox.recv() {
                Ok(event) => effect = self.machine.step(event),
                Err(_) => return,
            }
        }
    }

    /// Carries an effect out, and answers with what came of it. `None` ends the thread.
    fn carry_out(&mut self, effect: Effect) -> Option<Option<Event>> {
        match effect {
            Effect::Open => Some(Some(match self.committer.open() {
                Ok(marker) => Event::Opened { marker },
                Err(error) => self.failed("open", error),
            })),
            Effect::Write(epoch) => {
                let staged: Vec<Bytes> = self.staged.up_to(epoch).into_iter().map(|s| s.1).collect();
                let probe = self.env.probe.clone();
                Some(Some(match self.committer.commit(epoch, &staged, &|step: Step| probe.reached(step, epoch)) {
                    Ok(()) => Event::Written(epoch),
                    Err(error) => self.failed("commit", error),
                }))
            }
            Effect::Confirm(epoch) => {
                self.staged.confirm(epoch);
                (self.report)(CommitterReport::Committed(self.id.clone(), epoch));
                Some(None)
            }
            Effect::Wait(delay) => self.wait(delay).then_some(Some(Event::Waited)),
            Effect::Stop(error) => {
                (self.report)(CommitterReport::Failed(self.id.clone(), error));
                None
            }
        }
    }

    fn failed(&self, what: &str, error: Error) -> Event {
        if error.disposition() == Disposition::Retry {
            tracing::warn!(committer = %self.id, %error, "{what} failed; trying again");
        }
        Event::Failed(error.context(what))
    }

    /// Waits out a delay, taking in what is said meanwhile (none of it leads to an effect while the link is down). False if
    /// nobody listens any more.
    fn wait(&mut self, delay: Duration) -> bool {
        let end = self.env.clock.monotonic() + delay;
        loop {
            let left = end.saturating_sub(self.env.clock.monotonic());
            match self.inbox.recv_timeout(left) {
                Ok(event) => {
                    let effect = self.machine.step(event);
                    debug_assert!(effect.is_none(), "no effect while waiting");
                }
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }
}
