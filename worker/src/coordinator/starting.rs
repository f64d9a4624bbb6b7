//! From a log to a job that is ready to run: picks the snapshot to start from, checks that it fits, has it read into new tasks,
//! and passes over one that turns out to be damaged.
//!
//! Invariant: the log says where the job goes on from before anything of it is snapshotted or committed, and says it of no
//! snapshot that has not been read to its end.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use floodmark_dataflow::{JobGraph, graph::NodeKind, takers};
use floodmark_snapshot::{
    Attempt, Disposition, Env, Epoch, Error, Generation, Manifest, OperatorUid, Result, SplitState,
    log::{self, CheckpointLog, Event, JobFolder, LogState},
    manifest::Rescaled,
    restore::{self, Candidate, Found, Origin, Reference, Rejected, Scope, StatePlan, Visible},
    storage,
};

use super::{Crew, TAKEOVER_PATIENCE};
use crate::{
    CheckpointMode, RunError, RunSpec,
    words::{Built, Deployment, NotBuilt, Restored, WorkerId},
};

/// A job that is ready to run.
pub(super) struct Ready {
    pub(super) built: Built,
    /// `None` without snapshots.
    pub(super) log: Option<CheckpointLog>,
    /// Where the job stands, this start included.
    pub(super) state: LogState,
    /// What the log must say of this start once all state is there; `state` knows it already.
    pub(super) note: Option<Event>,
    /// The checkpoint that it starts from, as the job's own log numbers it.
    pub(super) restored: Option<Epoch>,
    /// Why that is not the newest one, if it is not.
    pub(super) fallback: Option<String>,
}

/// Where a job stands before this process has done anything.
pub(super) enum Look {
    /// It can be started.
    At {
        /// Subtasks per task.
        parallelism: u32,
        /// Whether it has run before.
        has_history: bool,
        /// Its last checkpoint, if it was stopped and nobody has run it since.
        stopped: Option<Epoch>,
    },
    /// The job has finished before, at this checkpoint.
    AlreadyFinished(Epoch),
}

/// Looks at a job's storage and at its log, changing nothing there.
pub(super) async fn look(spec: &RunSpec, env: &Env) -> Result<Look, RunError> {
    if spec.checkpoints.mode == CheckpointMode::Disabled {
        return Ok(Look::At { parallelism: spec.parallelism, has_history: false, stopped: None });
    }
    storage::check_writable(&*spec.storage, env).await.map_err(storage_error)?;
    let state = log::read(&*spec.storage, &JobFolder::of(&spec.job)).await.map_err(storage_error)?;
    if let Some(epoch) = finished(spec, &state) {
        return Ok(Look::AlreadyFinished(epoch));
    }
    let parallelism = parallelism(spec, &state);
    Ok(Look::At { parallelism, has_history: state.has_history(), stopped: state.stopped })
}

/// What somebody has chosen for the running job, if that still holds.
pub(super) fn rescaled(spec: &RunSpec, state: &LogState) -> Option<Rescaled> {
    let possible = 1..=u32::from(spec.max_parallelism);
    state.rescaled.filter(|r| r.spec == spec.parallelism && possible.contains(&r.to))
}

/// Subtasks per task of the next attempt.
pub(super) fn parallelism(spec: &RunSpec, state: &LogState) -> u32 {
    rescaled(spec, state).map_or(spec.parallelism, |r| r.to)
}

/// What a start comes to.
pub(super) enum Start {
    Ready(Box<Ready>),
    /// The job has finished before, at this checkpoint.
    AlreadyFinished(Epoch),
}

/// Makes a job ready. `damaged` are checkpoints that this process has found damaged, and passes over; `held` is its last reign,
/// and becomes its new one.
pub(super) async fn start(
    spec: &Arc<RunSpec>,
    env: &Env,
    crew: &mut Crew,
    damaged: &[Rejected],
    held: &mut Option<Generation>,
) -> Result<Start, RunError> {
    if spec.checkpoints.mode == CheckpointMode::Disabled {
        let splits = connect(spec, env, None, true).await.map_err(RunError::Connector)?;
        let state = LogState::default();
        let deployment = Deployment {
            attempt: Attempt::default(),
            history: String::new(),
            last_epoch: state.last_epoch,
            restored: None,
            splits,
            placement: Vec::new(),
            endpoints: BTreeMap::new(),
            worker: WorkerId(0),
        };
        let built = crew.deploy(deployment).await.map_err(not_built)?;
        return Ok(Start::Ready(Box::new(Ready {
            built,
            log: None,
            state,
            note: None,
            restored: None,
            fallback: None,
        })));
    }
    let first = held.is_none();
    let opened = CheckpointLog::open_after(*held, spec.storage.clone(), env.clone(), &spec.job, &spec.holder).await;
    let (log, state) = opened.map_err(storage_error)?;
    *held = Some(log.generation());
    // Who ran the job may have finished it in between, or have changed its parallelism.
    if let Some(epoch) = finished(spec, &state) {
        return Ok(Start::AlreadyFinished(epoch));
    }
    let parallelism = parallelism(spec, &state);
    if parallelism != crew.parallelism() {
        crew.assemble(parallelism, Some(TAKEOVER_PATIENCE)).await.map_err(RunError::Failed)?;
    }
    let starter = Starter { spec, env, damaged, first, log, state };
    starter.start(crew).await.map(|ready| Start::Ready(Box::new(ready)))
}

/// At which checkpoint the job has finished, if it is asked for nothing but to go on.
fn finished(spec: &RunSpec, state: &LogState) -> Option<Epoch> {
    let origin = Origin::of_start(&spec.restore, spec.initial.as_ref(), &spec.start, state);
    state.finished.filter(|_| origin == Origin::Own)
}

fn storage_error(error: Error) -> RunError {
    match error.disposition() {
        Disposition::Fenced => RunError::Fenced(error),
        Disposition::Retry | Disposition::Abort | Disposition::Corrupt => RunError::Storage(error),
    }
}

struct Starter<'a> {
    spec: &'a Arc<RunSpec>,
    env: &'a Env,
    damaged: &'a [Rejected],
    /// Whether this process has not run the job before.
    first: bool,
    log: CheckpointLog,
    state: LogState,
}

/// What the job is started from.
struct Choice {
    /// In the order in which they are tried. Empty: from nothing.
    candidates: Vec<Candidate>,
    /// What the log must say of it, whichever candidate it is.
    note: Option<Event>,
    /// Whether older candidates stand in for a damaged one.
    fall_back: bool,
}

impl Starter<'_> {
    async fn start(self, crew: &mut Crew) -> Result<Ready, RunError> {
        for damaged in &self.state.damaged {
            tracing::warn!(entry = damaged.seq, reason = %damaged.reason, "checkpoint log entry is damaged and counts for nothing");
        }
        let choice = self.choose().await.map_err(storage_error)?;
        let Choice { candidates, note, fall_back } = choice;
        if candidates.is_empty() {
            if let Some(error) = fall_back.then(|| self.nothing_intact(&[])).flatten() {
                return Err(storage_error(error));
            }
            let built = self.build(crew, None).await.map_err(not_built)?;
            return Ok(self.ready(built, None, note, None));
        }
        // What is wrong elsewhere than in the checkpoint is wrong with the next one, too.
        let build = async |candidate: &Candidate| match self.build(&mut *crew, Some(candidate)).await {
            Ok(built) => Ok(Ok(built)),
            Err(NotBuilt::Snapshot(error)) => Err(error),
            Err(elsewhere) => Ok(Err(not_built(elsewhere))),
        };
        let known = |c: &Candidate| self.damaged.iter().any(|d| d.epoch == c.snapshot.manifest.epoch);
        let candidates = candidates.into_iter().filter(|c| !known(c)).collect();
        let (started, rejected) = restore::first_intact(candidates, build).await.map_err(storage_error)?;
        let rejected = [self.damaged, &rejected].concat();
        for rejected in &rejected {
            tracing::error!(checkpoint = %rejected.epoch, reason = %rejected.reason, "checkpoint is damaged and passed over");
        }
        let Some((candidate, built)) = started else {
            let nothing = self.nothing_intact(&rejected);
            return Err(storage_error(nothing.unwrap_or_else(|| Error::corrupt("no checkpoint is intact"))));
        };
        let (epoch, built) = (candidate.snapshot.manifest.epoch, built?);
        let fallback = note.is_none().then(|| self.fallback(epoch, &rejected)).flatten();
        let note = note.or_else(|| fallback.is_some().then_some(Event::Restored { epoch: Some(epoch), asked: None }));
        Ok(self.ready(built, Some(epoch), note, fallback))
    }

    async fn choose(&self) -> Result<Choice> {
        let Self { spec, state, .. } = self;
        match Origin::of_start(&spec.restore, spec.initial.as_ref(), &spec.start, state) {
            Origin::Own => {
                if state.asked == Some(spec.start.asked(&spec.restore)) {
                    tracing::info!("the job was started from {} before, and goes on from where it is", spec.restore);
                }
                let candidates = restore::candidates(&spec.storage, &spec.job, state)?;
                Ok(Choice { candidates, note: None, fall_back: true })
            }
            Origin::Nothing => {
                if state.has_history() {
                    tracing::warn!("starting from nothing, as told to; earlier checkpoints are given up");
                }
                // Also without a past: the next attempt is to go on from the checkpoints of this one.
                let note = Event::Restored { epoch: None, asked: Some(spec.start.asked(&Reference::Nothing)) };
                Ok(Choice { candidates: Vec::new(), note: Some(note), fall_back: false })
            }
            Origin::From(reference) => self.named(reference).await,
        }
    }

    /// A snapshot that somebody has named: no other stands in for it.
    async fn named(&self, reference: &Reference) -> Result<Choice> {
        let Self { spec, state, .. } = self;
        let asked = spec.start.asked(reference);
        let scope = Scope { storage: &spec.storage, job: &spec.job, state };
        let found = restore::find(reference, scope).await?;
        restore::check_format(&found.snapshot.manifest).map_err(|e| e.context(reference))?;
        let epoch = found.snapshot.manifest.epoch;
        let (candidate, note) = if found.own {
            let mut known = state.retained.iter().chain(&state.abandoned);
            let owned = known.any(|r| r.manifest.epoch == epoch && r.from.is_none());
            let note = Event::Restored { epoch: Some(epoch), asked: Some(asked) };
            (Candidate { snapshot: found.snapshot, owned }, note)
        } else {
            let visible = self.visible(&found).await?;
            // Of the job's own checkpoints [`Self::ready`] says it.
            if let Some(newer) = visible.values().copied().chain([found.committed]).max().filter(|v| *v > epoch) {
                tracing::warn!(
                    "output up to checkpoint {newer} is visible, and checkpoint {epoch} is older: what lies between is written again"
                );
            }
            let manifest = found.adopted_as(state.last_epoch.next(), &visible);
            let snapshot = found.snapshot.with_manifest(manifest.clone());
            let note = Event::Adopted { from: snapshot.location(), asked, manifest: Box::new(manifest) };
            (Candidate { snapshot, owned: false }, note)
        };
        Ok(Choice { candidates: vec![candidate], note: Some(note), fall_back: false })
    }

    /// What the sinks know to be visible of the output that another job's checkpoint holds.
    async fn visible(&self, found: &Found) -> Result<Visible> {
        let (spec, staging, history) = (self.spec.clone(), found.staging(), found.history.clone());
        let ask = move || {
            let mut visible = Visible::new();
            for (_, node) in spec.graph.nodes() {
                let NodeKind::Sink(sink) = &node.node else { continue };
                for (uid, index) in staging.iter().filter(|(uid, _)| *uid == node.uid) {
                    let epoch = sink.visible(*index, &history).map_err(|e| e.context(uid))?;
                    visible.extend(epoch.map(|epoch| ((uid.clone(), *index), epoch)));
                }
            }
            Ok(visible)
        };
        self.env.blocking("a connector", ask).await?
    }

    fn nothing_intact(&self, rejected: &[restore::Rejected]) -> Option<Error> {
        restore::nothing_intact(&*self.spec.storage, &self.spec.job, &self.state, rejected)
    }

    /// Why the job starts from this checkpoint of its own, if there are newer ones, or may be. The log must say it then.
    fn fallback(&self, epoch: Epoch, rejected: &[Rejected]) -> Option<String> {
        let own = self.state.retained.iter().rfind(|r| r.manifest.epoch == epoch);
        // Of what comes before a checkpoint in the log, nothing is newer.
        let behind = |seq: u64| own.is_none_or(|r| seq > r.seq);
        if let Some(newer) = rejected.iter().filter(|r| r.epoch > epoch).max_by_key(|r| r.epoch) {
            tracing::warn!(checkpoint = %epoch, "restored an older checkpoint, because a newer one is damaged");
            return Some(format!("checkpoint {} is damaged: {}", newer.epoch, newer.reason));
        }
        if let Some(entry) = self.state.damaged.iter().rfind(|d| behind(d.seq)) {
            tracing::warn!(
                checkpoint = %epoch,
                "restored the newest checkpoint that is known; what is damaged behind it in the log may have been a newer one"
            );
            let (seq, reason) = (entry.seq, &entry.reason);
            return Some(format!("entry {seq} of the log, which may have been of a newer one, is damaged: {reason}"));
        }
        tracing::info!(checkpoint = %epoch, "restored the newest checkpoint");
        None
    }

    async fn build(&self, crew: &mut Crew, candidate: Option<&Candidate>) -> Result<Built, NotBuilt> {
        let Self { spec, env, damaged: _, first, log, state } = self;
        let manifest = candidate.map(|c| c.snapshot.manifest.clone());
        if let Some(manifest) = &manifest {
            let (takers, plan) = (takers(&spec.graph), &spec.graph.fingerprint);
            let plan = StatePlan::new(manifest, &takers, plan, spec.max_parallelism, state.committed);
            plan.admit(spec.allow_dropped_state).map_err(NotBuilt::Snapshot)?;
        }
        let restored = candidate.map(|c| Restored {
            manifest: c.snapshot.manifest.clone(),
            location: c.snapshot.location(),
            owned: c.owned,
            committed: state.committed,
        });
        let splits =
            connect(spec, env, manifest, *first).await.map_err(NotBuilt::of_snapshot_or(NotBuilt::Connector))?;
        let deployment = Deployment {
            attempt: log.attempt(),
            history: log.history().to_owned(),
            last_epoch: state.last_epoch,
            restored,
            splits,
            placement: Vec::new(),
            endpoints: BTreeMap::new(),
            worker: WorkerId(0),
        };
        crew.deploy(deployment).await
    }

    /// What is built, and what the log must say of where the job goes on from.
    fn ready(mut self, built: Built, epoch: Option<Epoch>, note: Option<Event>, fallback: Option<String>) -> Ready {
        let committed = self.state.committed;
        let adopted = matches!(note, Some(Event::Adopted { .. }));
        if let Some(epoch) =
            epoch.filter(|e| note.is_some() && !adopted && (committed > *e || !self.state.damaged.is_empty()))
        {
            tracing::warn!(
                "output after checkpoint {epoch} may have been committed already, and will then be written a second time"
            );
        }
        if let Some(event) = &note {
            // Nobody else writes entries of this reign: the next is this one's.
            self.state.take(self.log.next_seq(), event.clone());
        }
        let Self { log, state, .. } = self;
        Ready { built, log: Some(log), state, note, restored: epoch, fallback }
    }
}

fn not_built(why: NotBuilt) -> RunError {
    match why {
        NotBuilt::Snapshot(error) => storage_error(error),
        NotBuilt::Connector(error) => RunError::Connector(error),
        NotBuilt::Task(error) => RunError::failed(error),
    }
}

async fn connect(
    spec: &Arc<RunSpec>,
    env: &Env,
    manifest: Option<Arc<Manifest>>,
    first: bool,
) -> Result<HashMap<OperatorUid, Vec<SplitState>>> {
    let spec = spec.clone();
    env.blocking("a connector", move || splits(&spec.graph, manifest.as_deref(), first)).await?
}

/// Looks up every source's splits before anything runs, and the first time checks every sink. Blocking.
fn splits(graph: &JobGraph, restored: Option<&Manifest>, first: bool) -> Result<HashMap<OperatorUid, Vec<SplitState>>> {
    let mut splits = HashMap::new();
    for (_, node) in graph.nodes() {
        match &node.node {
            NodeKind::Source(source) => {
                let known = restored.and_then(|r| r.operators.get(&node.uid)).map_or(&[][..], |o| &o.splits);
                let found = source.factory.splits(known).map_err(|e| e.context(&node.uid))?;
                splits.insert(node.uid.clone(), found);
            }
            NodeKind::Sink(sink) if first => sink.check().map_err(|e| e.context(&node.uid))?,
            NodeKind::Sink(_) | NodeKind::Operator(_) => {}
        }
    }
    Ok(splits)
}
