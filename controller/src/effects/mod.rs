//! The controller's hands and eyes: sees what there is of each job, has [`lifecycle`](crate::lifecycle) decide, and does what the
//! plan says. Nothing is decided here.
//!
//! `watching` keeps the `cache` up to date; `agenda` says whose turn it is; a pass is: look (`observe`), decide, write the status or
//! `carry_out` the actions, and look again until there is nothing left to do. What takes longer is a question: `answering` asks it
//! beside the passes, through the seam [`Outside`], and the answer is another reason for a pass. People are told by `notes`.
//!
//! All of it is one future: whoever drops it has stopped the controller, wherever it was.
//!
//! Invariants: a pass never decides on less than this process has written (see `cache`); with nothing changed, nothing is written.

mod access;
mod agenda;
mod answering;
mod cache;
mod carry_out;
mod cluster;
mod notes;
mod observe;
mod outside;
mod pods;
mod questions;
mod reach;
mod saving;
#[cfg(test)]
mod tests;
mod watched;
mod watching;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use floodmark_crds::{DeletionPolicy, StreamJob, Timestamp};
use floodmark_snapshot::Env;
use futures::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, join_all},
    stream::FuturesUnordered,
};
use kube::{Client, ResourceExt as _};
use tokio::sync::{Semaphore, mpsc};

use self::{
    access::{Kept, secret_of},
    agenda::{Agenda, Outcome},
    answering::{Ask, LOOKUPS_MAX, ORDERS_MAX},
    cluster::{Cluster, EffectError},
    notes::{Counts, NOTES_MAX, NoteOf},
    questions::{JobQuestions, SavepointQuestions},
};
pub use self::{
    cache::{JobKey, SavepointKey},
    outside::{Access, Order, Outside, Removed, Reply, SavepointFound},
    reach::Reach,
};
use crate::{
    lifecycle::{Action, Note, decide},
    metrics::Metrics,
    objects::{Defaults, secret_name},
};

/// How long news are gathered before a pass: an update of a Deployment seldom comes alone.
const GATHER: Duration = Duration::from_millis(5);
/// Rounds of one pass. Each step of an operation is one; a plan that never comes to rest is a defect, and must not spin.
const ROUNDS_MAX: usize = 32;
/// Questions, and other turns, that wait to be taken up.
const ASKS_MAX: usize = 64;
/// After so many failures in a row people are told.
const FAILURES_TOLD: u32 = 3;

/// What the controller is told when it is started.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The namespaces whose jobs it looks after; all if none is named.
    pub namespaces: Vec<String>,
    /// What all jobs have in common.
    pub defaults: Defaults,
    /// By what name events say who has written them: the pod's.
    pub instance: String,
    /// How long the certificates of a run are in force: [`IDENTITY_LIFETIME`](crate::objects::IDENTITY_LIFETIME), usually.
    pub certificate_lifetime: Duration,
}

/// Whose turn it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Turn {
    Job(JobKey),
    Savepoint(SavepointKey),
}

/// See the header of this file.
pub struct Operator {
    cluster: Cluster,
    outside: Arc<dyn Outside>,
    defaults: Defaults,
    instance: String,
    certificate_lifetime: Duration,
    namespaces: Vec<String>,
    metrics: Arc<Metrics>,
    questions: Mutex<JobQuestions>,
    savepoint_questions: Mutex<SavepointQuestions>,
    kept: Mutex<Kept>,
    lookups: Semaphore,
    orders: Semaphore,
    asks: mpsc::Sender<Ask>,
    turns: mpsc::Sender<Turn>,
    notes: mpsc::Sender<NoteOf>,
    ready: AtomicBool,
    queues: Mutex<Option<Queues>>,
}

struct Queues {
    asks: mpsc::Receiver<Ask>,
    turns: mpsc::Receiver<Turn>,
    notes: mpsc::Receiver<NoteOf>,
}

/// How a pass ended.
struct Passed {
    turn: Turn,
    outcome: Outcome,
    /// Why it failed, if it did.
    why: Option<String>,
}

/// How a round of a pass ended.
enum Round {
    /// Something was done: look again.
    Again,
    /// There is nothing to do before this time, if ever.
    Rest(Option<Timestamp>),
    Gone,
}

impl Operator {
    /// A controller that looks after jobs once it [runs](Operator::run).
    #[must_use]
    pub fn new(
        client: Client,
        outside: Arc<dyn Outside>,
        settings: Settings,
        metrics: Arc<Metrics>,
        env: Env,
    ) -> Arc<Self> {
        let (asks, to_ask) = mpsc::channel(ASKS_MAX);
        let (turns, to_turn) = mpsc::channel(ASKS_MAX);
        let (notes, to_note) = mpsc::channel(NOTES_MAX);
        let Settings { namespaces, defaults, instance, certificate_lifetime } = settings;
        Arc::new(Self {
            cluster: Cluster::new(client, env, Arc::default()),
            outside,
            defaults,
            instance,
            certificate_lifetime,
            namespaces,
            metrics,
            questions: Mutex::default(),
            savepoint_questions: Mutex::default(),
            kept: Mutex::default(),
            lookups: Semaphore::new(LOOKUPS_MAX),
            orders: Semaphore::new(ORDERS_MAX),
            asks,
            turns,
            notes,
            ready: AtomicBool::new(false),
            queues: Mutex::new(Some(Queues { asks: to_ask, turns: to_turn, notes: to_note })),
        })
    }

    /// Whether all watches have told all there is.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Counts jobs by state, for the metrics.
    pub fn count_jobs(&self) {
        let mut states = BTreeMap::new();
        for job in self.cluster.cache().jobs() {
            let state = job.status.as_ref().map(|s| s.state).unwrap_or_default();
            *states.entry(format!("{state:?}")).or_default() += 1;
        }
        self.metrics.jobs(states);
    }

    fn questions(&self) -> MutexGuard<'_, JobQuestions> {
        self.questions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn savepoint_questions(&self) -> MutexGuard<'_, SavepointQuestions> {
        self.savepoint_questions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.cluster.env.clock.wall_ms())
    }

    fn monotonic(&self) -> Duration {
        self.cluster.env.clock.monotonic()
    }

    /// Looks after jobs until it is dropped. A second call does nothing.
    pub async fn run(self: Arc<Self>) {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Queues { mut asks, mut turns, mut notes }) = queues else { return };
        let watched = self.cluster.shared_cache();
        let (mut watches, mut unlisted) =
            watching::watches(&self.cluster.client, &self.namespaces, &watched, &self.metrics);
        let mut agenda = Agenda::default();
        let mut passes: FuturesUnordered<BoxFuture<'_, Passed>> = FuturesUnordered::new();
        let mut questions = FuturesUnordered::new();
        let note_writer = async {
            let mut counts = Counts::default();
            while let Some(note) = notes.recv().await {
                self.cluster.write_note(&note, &self.defaults.controller_namespace, &self.instance, &mut counts).await;
            }
        };
        let mut note_writer = std::pin::pin!(note_writer.fuse());
        loop {
            let now = self.monotonic();
            while unlisted == 0
                && let Some((turn, due)) = agenda.take(now)
            {
                self.metrics.waited(now.saturating_sub(due));
                passes.push(self.turn(turn).boxed());
            }
            let (due, busy) = agenda.depth(now);
            self.metrics.depth(due, busy);
            let next = agenda.next_due().filter(|_| unlisted == 0);
            let alarm = async {
                match next {
                    Some(at) => self.cluster.env.runtime.sleep(at.saturating_sub(now)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(news) = watches.next() => {
                    unlisted -= usize::from(news.listed);
                    if unlisted == 0 {
                        self.ready.store(true, Ordering::Relaxed);
                    }
                    let at = self.monotonic() + GATHER;
                    for turn in news.turns {
                        self.concerned(&turn).into_iter().for_each(|other| agenda.ask(other, at));
                        agenda.ask(turn, at);
                    }
                }
                Some(Passed { turn, outcome, why }) = passes.next() => {
                    agenda.done(turn.clone(), self.monotonic(), outcome);
                    if let Some(why) = why.filter(|_| agenda.failures(&turn) == FAILURES_TOLD) {
                        self.tell_failure(&turn, why);
                    }
                }
                Some(ask) = asks.recv() => questions.push(self.answer(ask)),
                Some(turn) = turns.recv() => agenda.ask(turn, self.monotonic()),
                Some(turn) = questions.next() => agenda.ask(turn, self.monotonic()),
                () = &mut note_writer => {}
                () = alarm => {}
            }
        }
    }

    /// Who else is concerned by news.
    fn concerned(&self, turn: &Turn) -> Vec<Turn> {
        let cache = self.cluster.cache();
        match turn {
            // Savepoints wait for it to run.
            Turn::Job(key) => cache.awaited_of(key).cloned().map(Turn::Savepoint).collect(),
            Turn::Savepoint(key) => {
                // The schedule that has made it, and jobs that wait for it.
                let savepoint = cache.savepoint(key);
                let owners = savepoint.iter().flat_map(|s| s.owner_references()).filter(|o| o.kind == "Savepoint");
                let owner = |name: &str| SavepointKey { namespace: key.namespace.clone(), name: name.to_owned() };
                let owners = owners.map(|o| Turn::Savepoint(owner(&o.name)));
                let here = cache.jobs().filter(|job| job.namespace().as_ref() == Some(&key.namespace));
                let waiting = here.filter(|job| job.spec.restore.from.as_ref() == Some(&key.name));
                owners.chain(waiting.map(|job| Turn::Job(JobKey::of(job)))).collect()
            }
        }
    }

    /// One pass.
    async fn turn(&self, turn: Turn) -> Passed {
        let (kind, result) = match &turn {
            Turn::Job(_) => ("StreamJob", self.pass(&turn).await),
            Turn::Savepoint(_) => ("Savepoint", self.pass(&turn).await),
        };
        let (name, outcome, why) = match result {
            Ok(Round::Gone) => ("done", Outcome::Gone, None),
            Ok(Round::Again) => ("failed", Outcome::Failed, Some("it does not come to rest".to_owned())),
            Ok(Round::Rest(wake)) => {
                // Clocks are read in whole milliseconds.
                let wait = wake.map(|at| at.since(self.now()) + Duration::from_millis(1));
                let at = wait.map(|wait| self.monotonic() + wait);
                ("done", Outcome::Rest(at), None)
            }
            Err(EffectError::Overtaken(_)) => ("overtaken", Outcome::Overtaken, None),
            Err(error) => ("failed", Outcome::Failed, Some(error.to_string())),
        };
        self.metrics.passed(kind, name);
        if let Some(why) = &why {
            tracing::warn!(?turn, %why, "a pass failed; it is tried again");
        }
        Passed { turn, outcome, why }
    }

    /// Rounds until there is nothing left to do.
    async fn pass(&self, turn: &Turn) -> Result<Round, EffectError> {
        for _ in 0..ROUNDS_MAX {
            let round = match turn {
                Turn::Job(key) => self.round(key).await?,
                Turn::Savepoint(key) => self.savepoint_round(key).await?,
            };
            match round {
                Round::Again => {}
                Round::Rest(_) | Round::Gone => return Ok(round),
            }
        }
        Ok(Round::Again)
    }

    /// One look, one decision, and what follows.
    async fn round(&self, key: &JobKey) -> Result<Round, EffectError> {
        let Some(job) = self.cluster.cache().job(key) else { return Ok(Round::Gone) };
        self.look_for_secrets(key, &job).await?;
        if job.spec.checkpoints.on_delete == DeletionPolicy::Delete {
            let leaving = job.metadata.deletion_timestamp.is_some();
            self.keep_access(&key.namespace, secret_of(&job), leaving).await;
        }
        let restore_from = self.restore_from(&job).location();
        let answers = {
            let mut questions = self.questions();
            questions.tidy_job(&job, restore_from.as_deref());
            questions.of(&job.uid().unwrap_or_default())
        };
        let now = self.now();
        let (seen, look_again) = {
            let cache = self.cluster.cache();
            let Some(known) = cache.known(key) else { return Ok(Round::Gone) };
            observe::seen(known, &job, restore_from, answers, &self.defaults, now)
        };
        let plan = decide(&seen);
        let JobKey { namespace, base } = key;
        let writes = plan.status.is_some();
        if let Some(status) = plan.status {
            let written = StreamJob { status: Some(*status), ..(*job).clone() };
            self.cluster.write_status(&written).await?;
        }
        for note in plan.notes {
            tracing::info!(%namespace, job = %base, "{}: {}", note.reason, note.message);
            self.note(&*job, note);
        }
        if writes {
            return Ok(Round::Again);
        }
        let mut again = false;
        for action in &plan.actions {
            tracing::info!(%namespace, job = %base, "{action}");
            self.carry_out(&job, action).await?;
            again |= !matches!(action, Action::Ask(_));
        }
        let wake = plan.wake.into_iter().chain(look_again).min();
        Ok(if again { Round::Again } else { Round::Rest(wake) })
    }

    /// Finds out whether runs have their Secrets, where that is not known.
    async fn look_for_secrets(&self, key: &JobKey, job: &StreamJob) -> Result<(), EffectError> {
        let unsure: Vec<u64> = {
            let cache = self.cluster.cache();
            let Some(known) = cache.known(key) else { return Ok(()) };
            known.runs().into_iter().filter(|run| !known.secrets.contains_key(run)).collect()
        };
        let looks = unsure.into_iter().map(|run| {
            let name = secret_name(job, run);
            async move { (run, self.cluster.look_for_secret(job, &name).await) }
        });
        for (run, seen) in join_all(looks).await {
            let seen = seen?;
            self.cluster.cache().put_secret(key, run, seen);
        }
        Ok(())
    }

    fn tell_failure(&self, turn: &Turn, why: String) {
        let note = Note { warning: true, reason: "NotCarriedOut", message: why };
        match turn {
            Turn::Job(key) => {
                let job = self.cluster.cache().job(key);
                job.iter().for_each(|job| self.note(&**job, note.clone()));
            }
            Turn::Savepoint(key) => {
                let savepoint = self.cluster.cache().savepoint(key);
                savepoint.iter().for_each(|savepoint| self.note(&**savepoint, note.clone()));
            }
        }
    }

    /// Tells people something, if there is room for it.
    fn note<K: kube::Resource<DynamicType = ()>>(&self, about: &K, note: Note) {
        if self.notes.try_send(NoteOf::new(about, note, self.now())).is_err() {
            tracing::warn!("too many events at a time: one is not written");
        }
    }
}
