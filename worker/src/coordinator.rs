//! Carries out what the coordination machine decides: one loop that takes every event of the job, in order.
//!
//! Invariant: nothing is announced, committed or deleted before the log entry that allows it is durable.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use floodmark_dataflow::task::{Command, Commands, OperatorPart, TaskEvent};
use floodmark_snapshot::{
    Env, Epoch, Error, OperatorSnapshot, OperatorUid, Result, Step,
    coordination::{self, Coordinator, Decision, End, Participants, Schedule, StartingPoint, Subtask, Time},
    log::{CheckpointLog, Event as LogEvent, JobFolder, LogState, Retained},
    restore::Restored,
    retention,
};
use futures::future::join_all;
use tokio::sync::{mpsc, watch};

use crate::{
    CheckpointMode, CheckpointStatus, JobPhase, Outcome, Progress, RunError, RunSpec, Summary,
    committers::{self, CommitterHandle, CommitterId, CommitterReport, Staged},
    deploy::{self, Deployed},
    restoring,
    tasks::{self, Ended, SubtaskId, TaskReport},
    upload::Uploader,
};

/// How long tasks may take to end after they were told to.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything that can happen to a running job.
enum Event {
    Task(TaskReport),
    Committer(CommitterReport),
    Uploaded { epoch: Epoch, subtask: SubtaskId, outcome: Result<Vec<(OperatorUid, OperatorSnapshot)>> },
}

type Events = mpsc::UnboundedSender<Event>;

/// See [`crate::run`].
pub(crate) async fn run(
    spec: RunSpec,
    env: Env,
    stop: watch::Receiver<bool>,
    progress: Arc<Progress>,
) -> Result<Summary, RunError> {
    let spec = Arc::new(spec);
    let mut start = Start { log: None, state: LogState::default(), restored: None };
    if spec.checkpoints.mode != CheckpointMode::Disabled {
        start = open(&spec, &env).await?;
        if let (Some(epoch), None) = (start.state.finished, start.log.as_ref()) {
            progress.phase(JobPhase::Done);
            return Ok(Summary {
                outcome: Outcome::AlreadyFinished,
                progress: progress.view(),
                last_epoch: Some(epoch),
            });
        }
    }
    if let Some(restored) = &start.restored {
        progress.restored_from(restored.manifest.epoch);
    }
    let running = deploy_all(&spec, &env, &start, &progress).await?;
    progress.phase(JobPhase::Running);
    running.run(start, stop).await
}

/// What a run starts with.
struct Start {
    /// `None` without snapshots, and for a job that has finished.
    log: Option<CheckpointLog>,
    state: LogState,
    restored: Option<Restored>,
}

async fn open(spec: &RunSpec, env: &Env) -> Result<Start, RunError> {
    let storage_error = |e: Error| match e.disposition() {
        floodmark_snapshot::Disposition::Fenced => RunError::Fenced(e),
        _ => RunError::Storage(e),
    };
    floodmark_snapshot::storage::check_writable(&*spec.storage, env).await.map_err(storage_error)?;
    let folder = JobFolder::of(&spec.job);
    if spec.restore == crate::RestoreMode::Latest {
        let state = floodmark_snapshot::log::read(&*spec.storage, &folder).await.map_err(storage_error)?;
        if state.finished.is_some() {
            return Ok(Start { log: None, state, restored: None });
        }
    }
    let opened = CheckpointLog::open(spec.storage.clone(), env.clone(), &spec.job, &spec.holder).await;
    let (mut log, state) = opened.map_err(storage_error)?;
    let restored = restoring::restore(spec, &spec.storage, &mut log, &state).await.map_err(storage_error)?;
    Ok(Start { log: Some(log), state, restored })
}

async fn deploy_all(
    spec: &Arc<RunSpec>,
    env: &Env,
    start: &Start,
    progress: &Arc<Progress>,
) -> Result<Running, RunError> {
    let (graph_spec, restored) = (spec.clone(), start.restored.clone());
    let splits = env
        .blocking("a connector", move || deploy::connect(&graph_spec.graph, restored.as_ref()))
        .await
        .and_then(|splits| splits)
        .map_err(RunError::Connector)?;
    let (sender, events) = mpsc::unbounded_channel();
    let restored = start.restored.as_ref();
    let mut handles = BTreeMap::new();
    if let Some(log) = &start.log {
        let committed = start.state.committed;
        let all = deploy::committers(&spec.graph, spec.parallelism, log.history(), restored, committed)
            .map_err(RunError::Connector)?;
        for committing in all {
            let to = sender.clone();
            let report = Box::new(move |report| drop(to.send(Event::Committer(report))));
            let id = committing.id.clone();
            let handle = committers::start(committing.id, committing.committer, committing.restored, env, report);
            handles.insert(id, handle.map_err(RunError::Failed)?);
        }
    }
    let deployed = deploy::tasks(spec, env, &splits, restored, progress).map_err(RunError::failed)?;
    let mut tasks = BTreeMap::new();
    for Deployed { id, name, task, signal, source, sinks } in deployed {
        let commands = task.commands();
        let to = sender.clone();
        let gone = tasks::start(id, name, task, signal, env, move |report| drop(to.send(Event::Task(report))))
            .map_err(RunError::Failed)?;
        tasks.insert(id, RunningTask { commands, source, sinks, gone: Some(gone), ended: false });
    }
    Ok(Running {
        spec: spec.clone(),
        env: env.clone(),
        progress: progress.clone(),
        sender,
        events,
        tasks,
        committers: handles,
    })
}

struct RunningTask {
    commands: Commands,
    source: bool,
    sinks: Vec<OperatorUid>,
    gone: Option<Ended>,
    ended: bool,
}

/// A job whose tasks run.
struct Running {
    spec: Arc<RunSpec>,
    env: Env,
    progress: Arc<Progress>,
    sender: Events,
    events: mpsc::UnboundedReceiver<Event>,
    tasks: BTreeMap<SubtaskId, RunningTask>,
    committers: BTreeMap<CommitterId, CommitterHandle>,
}

impl Running {
    async fn run(mut self, start: Start, stop: watch::Receiver<bool>) -> Result<Summary, RunError> {
        let outcome = match start.log {
            Some(log) => {
                let shell = Shell::new(&self, log, start.state, start.restored.as_ref());
                shell.run(&mut self, stop).await
            }
            None => self.without_snapshots(stop).await.map(|outcome| (outcome, None)),
        };
        match outcome {
            Ok((outcome, last_epoch)) => {
                self.wait_for_tasks().await.map_err(RunError::failed)?;
                self.progress.phase(JobPhase::Done);
                Ok(Summary { outcome, progress: self.progress.view(), last_epoch })
            }
            Err(error) => {
                self.tell_all(Command::Cancel);
                let _ = self.wait_for_tasks().await;
                Err(RunError::failed(error))
            }
        }
    }

    /// Runs until every task has ended by itself.
    async fn without_snapshots(&mut self, mut stop: watch::Receiver<bool>) -> Result<Outcome> {
        let mut outcome = Outcome::Finished;
        while self.tasks.values().any(|t| !t.ended) {
            tokio::select! {
                biased;
                () = stopped(&mut stop), if outcome == Outcome::Finished => {
                    outcome = Outcome::Stopped;
                    self.progress.phase(JobPhase::Stopping);
                    self.tell_all(Command::Cancel);
                }
                event = self.events.recv() => self.plain_event(event)?,
            }
        }
        Ok(outcome)
    }

    fn plain_event(&mut self, event: Option<Event>) -> Result<()> {
        match event {
            Some(Event::Task(TaskReport::Failed(id, error))) => Err(self.task_failed(id, error)),
            Some(Event::Task(TaskReport::Event(id, TaskEvent::Ended))) => {
                self.ended(id);
                Ok(())
            }
            Some(Event::Committer(CommitterReport::Failed(id, error))) => Err(error.context(format!("sink {id}"))),
            Some(Event::Task(TaskReport::Event(_, _)) | Event::Committer(_) | Event::Uploaded { .. }) => Ok(()),
            None => Err(Error::abort("internal error: the job's events have ended")),
        }
    }

    fn ended(&mut self, id: SubtaskId) {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.ended = true;
        }
    }

    fn task_failed(&mut self, id: SubtaskId, error: Error) -> Error {
        self.ended(id);
        error.context(format!("task {}.{} failed", id.task, id.index))
    }

    fn tell_all(&self, command: Command) {
        self.tasks.values().for_each(|t| t.commands.send(command));
    }

    /// Waits for the tasks' ends, for a bounded time.
    async fn wait_for_tasks(&mut self) -> Result<()> {
        let gone = join_all(self.tasks.values_mut().filter_map(|t| t.gone.take()));
        tokio::select! {
            biased;
            _ = gone => Ok(()),
            () = self.env.runtime.sleep(CANCEL_TIMEOUT) => {
                Err(Error::abort(format!("tasks did not end within {} s", CANCEL_TIMEOUT.as_secs())))
            }
        }
    }
}

/// However a run is left, its threads end.
impl Drop for Running {
    fn drop(&mut self) {
        self.tell_all(Command::Cancel);
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A sender that is gone will never ask for a stop.
    if stop.wait_for(|s| *s).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// The I/O around the coordination machine.
struct Shell {
    machine: Coordinator,
    log: CheckpointLog,
    state: LogState,
    uploader: Arc<Uploader>,
    numbers: HashMap<CommitterId, usize>,
}

impl Shell {
    fn new(running: &Running, log: CheckpointLog, mut state: LogState, restored: Option<&Restored>) -> Self {
        let spec = &running.spec;
        let subtask = |id: &SubtaskId| Subtask { task: id.task.0, index: id.index };
        let numbers: HashMap<_, _> = running.committers.keys().cloned().zip(0..).collect();
        let who = Participants {
            subtasks: running.tasks.keys().map(subtask).collect(),
            sources: running.tasks.iter().filter(|(_, t)| t.source).map(|(id, _)| subtask(id)).collect(),
            committers: numbers.values().copied().collect::<BTreeSet<usize>>(),
            job: spec.job.clone(),
            generation: log.generation(),
            attempt: log.attempt(),
            max_parallelism: spec.max_parallelism,
            plan: spec.graph.fingerprint.clone(),
        };
        let settings = &spec.checkpoints;
        let schedule = Schedule {
            interval: settings.interval,
            timeout: settings.timeout,
            min_pause: settings.min_pause,
            tolerable_failures: settings.tolerable_failures,
            max_concurrent: 1,
            unaligned_after: None,
        };
        let epoch = restored.map(|r| r.manifest.epoch);
        let start = StartingPoint { restored: epoch, last_epoch: state.last_epoch };
        // From here on the state is this reign's: what the restore gave up is no candidate any more.
        let keep = |r: &Retained| epoch.is_some_and(|e| r.manifest.epoch <= e);
        let (kept, abandoned): (Vec<_>, Vec<_>) = std::mem::take(&mut state.retained).into_iter().partition(keep);
        state.retained = kept;
        state.abandoned.extend(abandoned);
        let uploader = Arc::new(Uploader {
            storage: spec.storage.clone(),
            env: running.env.clone(),
            folder: log.folder().clone(),
            blobs: JobFolder::blobs(log.attempt()),
        });
        let machine = Coordinator::new(schedule, who, start, now(&running.env));
        Self { machine, log, state, uploader, numbers }
    }

    async fn run(mut self, running: &mut Running, mut stop: watch::Receiver<bool>) -> Result<(Outcome, Option<Epoch>)> {
        self.sweep_orphans(running);
        let mut stopping = false;
        let mut pending = vec![coordination::Event::Tick];
        loop {
            while let Some(event) = pending.pop() {
                let decisions = self.machine.step(event, now(&running.env));
                for decision in decisions {
                    match self.carry_out(decision, running).await? {
                        After::GoOn => {}
                        After::Tell(event) => pending.push(event),
                        After::End(outcome) => return Ok((outcome, Some(self.state.last_epoch))),
                    }
                }
            }
            let deadline = self.machine.deadline().map(|d| d.saturating_sub(running.env.clock.monotonic()));
            // Rare things first: a stream of events holds up neither a deadline nor a stop.
            tokio::select! {
                biased;
                () = pause(deadline, &running.env) => pending.push(coordination::Event::Tick),
                () = stopped(&mut stop), if !stopping => {
                    stopping = true;
                    tracing::info!("stopping with a last checkpoint");
                    pending.push(coordination::Event::StopRequested);
                }
                event = running.events.recv() => pending.extend(self.event(event, running)?),
            }
        }
    }

    /// What an event of the job means to the machine.
    fn event(&self, event: Option<Event>, running: &mut Running) -> Result<Option<coordination::Event>> {
        match event {
            Some(Event::Task(TaskReport::Event(id, TaskEvent::Snapshot { barrier, parts }))) => {
                self.upload(id, barrier.epoch, parts, running);
                Ok(None)
            }
            Some(Event::Task(TaskReport::Event(id, TaskEvent::Exhausted))) => {
                Ok(Some(coordination::Event::Exhausted(Subtask { task: id.task.0, index: id.index })))
            }
            Some(Event::Uploaded { epoch, subtask: id, outcome }) => {
                let subtask = Subtask { task: id.task.0, index: id.index };
                Ok(Some(match outcome {
                    Ok(parts) => {
                        let sinks = running.tasks.get(&id).map_or(&[][..], |t| &t.sinks);
                        for uid in sinks {
                            let committer = CommitterId { uid: uid.clone(), index: id.index };
                            let handle = running.committers.get(&committer);
                            if let Some(handle) = handle.filter(|h| !h.staged().up_to(epoch).is_empty()) {
                                handle.staged_at(epoch);
                            }
                        }
                        coordination::Event::Acknowledged { epoch, subtask, parts }
                    }
                    Err(error) => coordination::Event::Declined { epoch, subtask, reason: error.to_string() },
                }))
            }
            Some(Event::Committer(CommitterReport::Committed(id, epoch))) => {
                Ok(self.numbers.get(&id).map(|n| coordination::Event::Committed { committer: *n, epoch }))
            }
            other => running.plain_event(other).map(|()| None),
        }
    }

    fn upload(&self, id: SubtaskId, epoch: Epoch, parts: Vec<OperatorPart>, running: &Running) {
        let sinks = running.tasks.get(&id).map_or(&[][..], |t| &t.sinks);
        let staged: HashMap<OperatorUid, Staged> = sinks
            .iter()
            .filter_map(|uid| {
                let handle = running.committers.get(&CommitterId { uid: uid.clone(), index: id.index })?;
                Some((uid.clone(), handle.staged().clone()))
            })
            .collect();
        let (uploader, events) = (self.uploader.clone(), running.sender.clone());
        running.env.runtime.spawn(Box::pin(async move {
            let outcome = uploader.upload(epoch, id.index, parts, &staged).await;
            // Nobody listens any more once the job has ended.
            let _ = events.send(Event::Uploaded { epoch, subtask: id, outcome });
        }));
    }

    async fn carry_out(&mut self, decision: Decision, running: &mut Running) -> Result<After> {
        tracing::debug!("{decision}");
        match decision {
            Decision::Trigger(barrier) => {
                if barrier.stops() {
                    running.progress.phase(JobPhase::Stopping);
                }
                running.tasks.values().filter(|t| t.source).for_each(|t| t.commands.send(Command::Trigger(barrier)));
            }
            Decision::Append(event) => {
                self.append(event, running).await?;
                return Ok(After::Tell(coordination::Event::Appended));
            }
            Decision::Announce(epoch) => {
                running.committers.values().for_each(|c| c.completed(epoch));
                running.tell_all(Command::Completed(epoch));
            }
            Decision::Abort { epoch, reason, orphans } => {
                tracing::warn!(checkpoint = %epoch, %reason, "checkpoint aborted");
                running.progress.failed();
                running.tell_all(Command::Abort(epoch));
                let (storage, folder) = (running.spec.storage.clone(), self.log.folder().clone());
                let delete = async move { retention::delete(&*storage, &folder, orphans).await };
                running.env.runtime.spawn(Box::pin(delete));
            }
            Decision::Settled(_) => self.release(running).await?,
            Decision::Discard(orphans) => {
                let (storage, folder) = (running.spec.storage.clone(), self.log.folder().clone());
                let delete = async move { retention::delete(&*storage, &folder, orphans).await };
                running.env.runtime.spawn(Box::pin(delete));
            }
            // Asked for by nobody yet.
            Decision::Unalign(_) | Decision::Export { .. } | Decision::Refuse { .. } => {}
            Decision::Fail(cause) => return Err(Error::abort(cause)),
            Decision::Done(End::Finished) => return Ok(After::End(Outcome::Finished)),
            Decision::Done(End::Stopped) => return Ok(After::End(Outcome::Stopped)),
        }
        Ok(After::GoOn)
    }

    async fn append(&mut self, event: LogEvent, running: &Running) -> Result<()> {
        let probe = &running.env.probe;
        if let LogEvent::Completed { manifest } = &event {
            probe.reached(Step::BeforeLogEntry, manifest.epoch);
        }
        let seq = self.log.append(event.clone()).await?;
        match event {
            LogEvent::Completed { manifest } => {
                probe.reached(Step::AfterLogEntry, manifest.epoch);
                let status = CheckpointStatus {
                    epoch: manifest.epoch,
                    triggered_at_ms: manifest.triggered_at_ms,
                    duration_ms: manifest.duration_ms,
                    size: manifest.size(),
                };
                tracing::debug!(checkpoint = %status.epoch, ms = status.duration_ms, bytes = status.size, "checkpoint completed");
                running.progress.completed(status);
                self.state.last_epoch = manifest.epoch;
                self.state.retained.push(Retained { seq, manifest: *manifest });
            }
            LogEvent::Committed { epoch } => {
                probe.reached(Step::AfterCommittedEntry, epoch);
                self.state.committed = epoch;
            }
            LogEvent::Opened
            | LogEvent::Restored { .. }
            | LogEvent::Released { .. }
            | LogEvent::Finished { .. }
            | LogEvent::Stopped { .. } => {}
        }
        Ok(())
    }

    /// Gives up checkpoints past the newest few, and deletes what nothing names any more, off this loop.
    async fn release(&mut self, running: &Running) -> Result<()> {
        let Some(release) = retention::release(&self.state, running.spec.checkpoints.retain) else { return Ok(()) };
        self.append(release.event(), running).await?;
        self.state.retained.retain(|r| !release.epochs.contains(&r.manifest.epoch));
        self.state.abandoned.retain(|r| !release.epochs.contains(&r.manifest.epoch));
        let (storage, folder) = (running.spec.storage.clone(), self.log.folder().clone());
        running.env.runtime.spawn(Box::pin(async move {
            retention::delete(&*storage, &folder, release.blobs).await;
            if let Err(error) = retention::trim(&*storage, &folder, release.oldest_seq).await {
                tracing::warn!(%error, "could not trim the checkpoint log; left for the next release");
            }
        }));
        Ok(())
    }

    /// Deletes what earlier attempts uploaded and no checkpoint names. Their coordinators are fenced.
    fn sweep_orphans(&self, running: &Running) {
        let (storage, folder) = (running.spec.storage.clone(), self.log.folder().clone());
        let (state, attempt) = (self.state.clone(), self.log.attempt());
        running.env.runtime.spawn(Box::pin(async move {
            match storage.list(&folder.path("blobs"), None).await {
                Ok(listed) => {
                    let listed: Vec<_> =
                        listed.iter().filter_map(|o| folder.relative(&o.path)).map(str::to_owned).collect();
                    retention::delete(&*storage, &folder, retention::orphans(&listed, &state, attempt)).await;
                }
                Err(error) => tracing::warn!(%error, "could not look for orphaned files; left for the next start"),
            }
        }));
    }
}

/// What follows from a decision that was carried out.
enum After {
    GoOn,
    Tell(coordination::Event),
    End(Outcome),
}

fn now(env: &Env) -> Time {
    Time { monotonic: env.clock.monotonic(), wall_ms: env.clock.wall_ms() }
}

async fn pause(duration: Option<Duration>, env: &Env) {
    match duration {
        Some(duration) => env.runtime.sleep(duration).await,
        None => std::future::pending().await,
    }
}
