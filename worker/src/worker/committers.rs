//! Committers: a machine for each sink subtask that stages its output, so that a transaction never holds up the data.
//!
//! The decisions are [`CommitMachine`]'s; this file keeps the staged bytes, calls the [`Committer`], and waits out its
//! retries. Invariant: bytes are dropped only once a commit that holds them is confirmed.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use floodmark_dataflow::sink::Committer;
use floodmark_snapshot::{
    Disposition, Env, Epoch, Error, Result, Step,
    commit::{CommitMachine, Effect, Event},
    runtime::{Machine, Signal, Turn},
};

use crate::words::CommitterId;

/// How a committer tells its worker.
pub(super) type Report = Box<dyn Fn(CommitterReport) + Send>;

/// See [`Report`].
#[derive(Debug)]
pub(super) enum CommitterReport {
    /// Everything staged up to `epoch` is visible.
    Committed(CommitterId, Epoch),
    /// It can't go on.
    Failed(CommitterId, Error),
}

/// A staged shard: its rows and its bytes.
pub(super) type StagedShard = (u64, Bytes);

/// Records that a sink has staged and whose commit is not confirmed, by epoch.
#[derive(Clone, Default)]
pub(super) struct Staged(Arc<Mutex<BTreeMap<Epoch, Vec<StagedShard>>>>);

impl Staged {
    /// Keeps what the barrier of `epoch` handed over.
    pub(super) fn add(&self, epoch: Epoch, shard: StagedShard) {
        self.lock().entry(epoch).or_default().push(shard);
    }

    /// Everything not yet confirmed, of epochs up to `epoch`, in order.
    pub(super) fn up_to(&self, epoch: Epoch) -> Vec<(Epoch, StagedShard)> {
        let all = self.lock();
        all.range(..=epoch).flat_map(|(e, records)| records.iter().map(|r| (*e, r.clone()))).collect()
    }

    fn confirm(&self, epoch: Epoch) {
        let mut staged = self.lock();
        *staged = staged.split_off(&epoch.next());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Epoch, Vec<StagedShard>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A committer, as the rest of the worker holds it. Dropping it ends the committer after what it is doing.
pub(super) struct CommitterHandle {
    mailbox: Arc<Mailbox>,
    staged: Staged,
}

impl CommitterHandle {
    /// The job's state is all there: the committer commits what the snapshot holds.
    pub(super) fn begin(&self) {
        self.mailbox.lock().begun = true;
        self.mailbox.signal.notify();
    }

    /// A barrier's records are in [`CommitterHandle::staged`], and durable.
    pub(super) fn staged_at(&self, epoch: Epoch) {
        self.mailbox.put(Event::Staged(epoch));
    }

    /// A checkpoint is complete: what was staged up to it is to be made visible.
    pub(super) fn completed(&self, epoch: Epoch) {
        self.mailbox.put(Event::Completed(epoch));
    }

    /// The records that wait for a commit.
    pub(super) fn staged(&self) -> &Staged {
        &self.staged
    }
}

impl Drop for CommitterHandle {
    fn drop(&mut self) {
        self.mailbox.lock().closed = true;
        self.mailbox.signal.notify();
    }
}

/// What a committer is told. Bounded by the coordinator: one event per subtask and checkpoint under way.
#[derive(Default)]
struct Mailbox {
    letters: Mutex<Letters>,
    signal: Arc<Signal>,
}

#[derive(Default)]
struct Letters {
    events: VecDeque<Event>,
    /// See [`CommitterHandle::begin`].
    begun: bool,
    /// Nobody will say anything more.
    closed: bool,
}

impl Mailbox {
    /// An event that comes after the committer has failed is never read: its failure was reported.
    fn put(&self, event: Event) {
        self.lock().events.push_back(event);
        self.signal.notify();
    }

    fn lock(&self) -> MutexGuard<'_, Letters> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts a committer. It opens, while the job's state comes; when it is told to [begin](CommitterHandle::begin), it commits what
/// `restored` says is pending, and then follows the events. `last_epoch` is the greatest that was ever used, as far as the log knows.
pub(super) fn start(
    id: CommitterId,
    committer: Box<dyn Committer>,
    last_epoch: Epoch,
    restored: Option<(Epoch, Vec<(Epoch, StagedShard)>)>,
    env: &Env,
    report: Report,
) -> Result<CommitterHandle> {
    let mailbox = Arc::new(Mailbox::default());
    let staged = Staged::default();
    let pending = restored.map(|(epoch, shards)| {
        let epochs = shards.iter().map(|(e, _)| *e).collect();
        shards.into_iter().for_each(|(epoch, shard)| staged.add(epoch, shard));
        (epoch, epochs)
    });
    let (machine, first) = CommitMachine::new(pending);
    let name = format!("commit {id}");
    let driven = Driven {
        id,
        committer,
        machine,
        staged: staged.clone(),
        env: env.clone(),
        report,
        mailbox: mailbox.clone(),
        unopened: Some(last_epoch),
        effect: Some(first),
        waits_until: None,
    };
    env.runtime.drive(name, Box::new(driven))?;
    Ok(CommitterHandle { mailbox, staged })
}

struct Driven {
    id: CommitterId,
    committer: Box<dyn Committer>,
    machine: CommitMachine,
    staged: Staged,
    env: Env,
    report: Report,
    mailbox: Arc<Mailbox>,
    /// Until the first open: the greatest epoch that the log knows of.
    unopened: Option<Epoch>,
    /// What is to be done next.
    effect: Option<Effect>,
    /// The end of the delay between two attempts, by the monotonic clock.
    waits_until: Option<Duration>,
}

impl Machine for Driven {
    /// Carries one effect out, or takes one event in.
    fn step(&mut self) -> Turn {
        let event = {
            let mut letters = self.mailbox.lock();
            // What is not done yet is another attempt's to do: to open now would take the output over from that one.
            if letters.closed {
                return Turn::Done;
            }
            // To open fences who came before, and makes nothing visible.
            if !letters.begun && !matches!(self.effect, Some(Effect::Open)) {
                return Turn::Waiting { until: None };
            }
            if self.effect.is_none() { letters.events.pop_front() } else { None }
        };
        if let Some(effect) = self.effect.take() {
            return self.carry_out(effect);
        }
        if let Some(event) = event {
            self.effect = self.machine.step(event);
            debug_assert!(self.effect.is_none() || self.waits_until.is_none(), "no effect while waiting");
            return Turn::Ready;
        }
        let Some(end) = self.waits_until else { return Turn::Waiting { until: None } };
        let left = end.saturating_sub(self.env.clock.monotonic());
        if !left.is_zero() {
            return Turn::Waiting { until: Some(left) };
        }
        self.waits_until = None;
        self.effect = self.machine.step(Event::Waited);
        Turn::Ready
    }

    fn signal(&self) -> &Arc<Signal> {
        &self.mailbox.signal
    }

    fn panicked(&mut self, what: &str) {
        let error = Error::abort(format!("internal error: committer panicked: {what}"));
        (self.report)(CommitterReport::Failed(self.id.clone(), error));
    }
}

impl Driven {
    fn carry_out(&mut self, effect: Effect) -> Turn {
        let event = match effect {
            Effect::Open => Some(match self.committer.open() {
                Ok(marker) => match self.unopened.take().zip(marker).filter(|(last, marker)| marker > last) {
                    // Records of this run would be taken for those that are visible, and lost.
                    Some((last, marker)) => Event::Failed(Error::corrupt(format!(
                        "output up to checkpoint {marker} is visible, and the checkpoint log knows of none after {last}: its \
                         newest entries are lost; bring them back, or remove the job's folder from the storage, so that the job \
                         begins anew and writes its output again"
                    ))),
                    None => {
                        tracing::debug!(committer = %self.id, "open");
                        Event::Opened { marker }
                    }
                },
                Err(error) => self.failed("open", error),
            }),
            Effect::Write { above, up_to } => {
                let held = self.staged.up_to(up_to).into_iter().filter(|(epoch, _)| Some(*epoch) > above);
                let staged: Vec<Bytes> = held.map(|(_, (_, bytes))| bytes).collect();
                let probe = self.env.probe.clone();
                Some(match self.committer.commit(up_to, &staged, &|step: Step| probe.reached(step, up_to)) {
                    Ok(()) => Event::Written(up_to),
                    Err(error) => self.failed("commit", error),
                })
            }
            Effect::Confirm(epoch) => {
                self.staged.confirm(epoch);
                (self.report)(CommitterReport::Committed(self.id.clone(), epoch));
                None
            }
            Effect::Wait(delay) => {
                self.waits_until = Some(self.env.clock.monotonic() + delay);
                None
            }
            Effect::Stop(error) => {
                (self.report)(CommitterReport::Failed(self.id.clone(), error));
                return Turn::Done;
            }
        };
        self.effect = event.and_then(|e| self.machine.step(e));
        Turn::Ready
    }

    fn failed(&self, what: &str, error: Error) -> Event {
        match error.disposition() {
            Disposition::Retry => tracing::warn!(committer = %self.id, %error, "{what} failed; trying again"),
            // The attempt may be over, and nobody else left to tell it to.
            Disposition::Fenced => tracing::warn!(committer = %self.id, %error, "{what} was refused"),
            Disposition::Abort | Disposition::Corrupt => {}
        }
        Event::Failed(error.context(what))
    }
}
