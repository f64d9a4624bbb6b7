//! A job's run: its tasks and committers, and one loop that takes every event of theirs, in order.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use floodmark_dataflow::task::{Command, Commands, TaskEvent};
use floodmark_snapshot::{Disposition, Env, Epoch, Error, OperatorSnapshot, OperatorUid, Result, restore::Rejected};
use futures::future::join_all;
use tokio::sync::{mpsc, watch};

use crate::{
    Controls, JobPhase, Outcome, Progress, RunError, RunSpec, Summary,
    committers::{self, CommitterHandle, CommitterId, CommitterReport},
    deploy::{self, SinkPart},
    shell::Shell,
    starting::{self, Ready, Start},
    tasks::{self, Ended, SubtaskId, TaskReport},
};

/// How long tasks may take to end after they were told to.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything that can happen to a running job.
pub(crate) enum Event {
    Task(TaskReport),
    Committer(CommitterReport),
    /// What a subtask handed over at a barrier is durable, or is not.
    Uploaded {
        epoch: Epoch,
        subtask: SubtaskId,
        outcome: Result<Vec<(OperatorUid, OperatorSnapshot)>>,
    },
    /// Records that a sink has staged can't be kept.
    StagingFailed(Error),
    /// The savepoints of a checkpoint are copied, or have failed.
    Exported(Epoch),
}

pub(crate) type Events = mpsc::UnboundedSender<Event>;

/// See [`crate::run`].
pub(crate) async fn run(
    spec: RunSpec,
    env: Env,
    controls: Controls,
    progress: Arc<Progress>,
) -> Result<Summary, RunError> {
    let (spec, mut controls) = (Arc::new(spec), controls);
    let metrics = deploy::register(&spec.graph, spec.parallelism, &progress);
    let mut damaged = Vec::new();
    loop {
        let ready = match starting::start(&spec, &env, &metrics, &damaged).await? {
            Start::Ready(ready) => *ready,
            Start::AlreadyFinished(epoch) => {
                progress.phase(JobPhase::Done);
                let (outcome, progress) = (Outcome::AlreadyFinished, progress.view());
                return Ok(Summary { outcome, progress, last_epoch: Some(epoch) });
            }
        };
        if let Some(epoch) = ready.restored {
            progress.restored_from(epoch);
        }
        match attempt(&spec, &env, &mut controls, &progress, ready).await? {
            Attempted::Ended(summary) => return Ok(summary),
            // Nothing has been snapshotted or committed: the next older checkpoint is as good as if it had been chosen first.
            Attempted::Damaged(rejected) => {
                progress.phase(JobPhase::Restoring);
                damaged.push(rejected);
            }
        }
    }
}

/// What an attempt came to.
enum Attempted {
    Ended(Summary),
    /// The snapshot that it started from turned out to be damaged before all of it was there.
    Damaged(Rejected),
}

async fn attempt(
    spec: &Arc<RunSpec>,
    env: &Env,
    controls: &mut Controls,
    progress: &Arc<Progress>,
    ready: Ready,
) -> Result<Attempted, RunError> {
    let Ready { tasks, committers, log, state, restored } = ready;
    let mut running = Running::new(spec, env, progress);
    for committing in committers {
        let to = running.sender.clone();
        let report = Box::new(move |report| drop(to.send(Event::Committer(report))));
        let id = committing.id.clone();
        let last = state.last_epoch;
        let handle = committers::start(committing.id, committing.committer, last, committing.restored, env, report);
        running.committers.insert(id, handle.map_err(RunError::Failed)?);
    }
    for deployed in tasks {
        let (id, commands, to) = (deployed.id, deployed.task.commands(), running.sender.clone());
        let report = move |report| drop(to.send(Event::Task(report)));
        let gone = tasks::start(id, deployed.name, deployed.task, deployed.signal, env, report);
        let gone = Some(gone.map_err(RunError::Failed)?);
        let task = RunningTask { commands, source: deployed.source, sinks: deployed.sinks, gone, ended: false };
        running.tasks.insert(id, task);
        if let Some(slices) = deployed.slices {
            running.arriving.insert(id);
            env.runtime.spawn(Box::pin(slices.run()));
        }
    }
    running.begin_committing();
    progress.phase(JobPhase::Running);
    let outcome = match log {
        Some(log) => Shell::new(&running, log, state, restored).run(&mut running, controls).await,
        None => running.without_snapshots(controls).await.map(|outcome| (outcome, None)),
    };
    let damage = running.damage.take().zip(restored);
    match (running.end(outcome).await, damage) {
        (Ok(summary), _) => Ok(Attempted::Ended(summary)),
        (Err(_), Some((reason, epoch))) => Ok(Attempted::Damaged(Rejected { epoch, reason })),
        (Err(error), None) => Err(error),
    }
}

/// A task that runs.
pub(crate) struct RunningTask {
    pub(crate) commands: Commands,
    /// Whether it heads a source.
    pub(crate) source: bool,
    pub(crate) sinks: Vec<SinkPart>,
    gone: Option<Ended>,
    ended: bool,
}

/// A job whose tasks run.
pub(crate) struct Running {
    pub(crate) spec: Arc<RunSpec>,
    pub(crate) env: Env,
    pub(crate) progress: Arc<Progress>,
    pub(crate) sender: Events,
    pub(crate) events: mpsc::UnboundedReceiver<Event>,
    pub(crate) tasks: BTreeMap<SubtaskId, RunningTask>,
    pub(crate) committers: BTreeMap<CommitterId, CommitterHandle>,
    /// The subtasks whose state is not all there yet.
    arriving: BTreeSet<SubtaskId>,
    /// Why one of them has failed, if it is that the snapshot is damaged.
    damage: Option<String>,
}

impl Running {
    fn new(spec: &Arc<RunSpec>, env: &Env, progress: &Arc<Progress>) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let (spec, env, progress) = (spec.clone(), env.clone(), progress.clone());
        Self {
            spec,
            env,
            progress,
            sender,
            events,
            tasks: BTreeMap::new(),
            committers: BTreeMap::new(),
            arriving: BTreeSet::new(),
            damage: None,
        }
    }

    async fn end(mut self, outcome: Result<(Outcome, Option<Epoch>)>) -> Result<Summary, RunError> {
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
    async fn without_snapshots(&mut self, controls: &mut Controls) -> Result<Outcome> {
        let mut outcome = Outcome::Finished;
        while self.tasks.values().any(|t| !t.ended) {
            tokio::select! {
                biased;
                () = stopped(&mut controls.stop), if outcome == Outcome::Finished => {
                    outcome = Outcome::Stopped;
                    self.progress.phase(JobPhase::Stopping);
                    self.tell_all(Command::Cancel);
                }
                Some(request) = controls.savepoints.recv() => {
                    // One that no longer listens has no need of the answer.
                    let _ = request.reply.send(Err("the job takes no snapshots: spec.checkpoints.mode is Disabled".to_owned()));
                }
                event = self.events.recv() => self.plain_event(event)?,
            }
        }
        Ok(outcome)
    }

    /// Takes an event that means the same with and without snapshots.
    ///
    /// # Errors
    /// If the event is a failure.
    pub(crate) fn plain_event(&mut self, event: Option<Event>) -> Result<()> {
        match event {
            Some(Event::Task(TaskReport::Failed(id, error))) => Err(self.task_failed(id, error)),
            Some(Event::Task(TaskReport::Event(id, TaskEvent::Restored))) => {
                self.arriving.remove(&id);
                self.begin_committing();
                Ok(())
            }
            Some(Event::Task(TaskReport::Event(id, TaskEvent::Ended))) => {
                self.ended(id);
                Ok(())
            }
            Some(Event::Committer(CommitterReport::Failed(id, error))) => Err(error.context(format!("sink {id}"))),
            Some(Event::StagingFailed(error)) => Err(error.context("keep staged records")),
            Some(
                Event::Task(TaskReport::Event(_, _))
                | Event::Committer(_)
                | Event::Uploaded { .. }
                | Event::Exported(_),
            ) => Ok(()),
            None => Err(Error::abort("internal error: the job's events have ended")),
        }
    }

    fn ended(&mut self, id: SubtaskId) {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.ended = true;
        }
    }

    /// Lets the committers begin if all state is there. Not before: should the snapshot be damaged, what it holds staged is
    /// not to be written, because an older one stands in for it.
    fn begin_committing(&self) {
        if self.arriving.is_empty() {
            self.committers.values().for_each(CommitterHandle::begin);
        }
    }

    fn task_failed(&mut self, id: SubtaskId, error: Error) -> Error {
        self.ended(id);
        if self.arriving.contains(&id) && error.disposition() == Disposition::Corrupt {
            self.damage = Some(error.to_string());
        }
        error.context(format!("task {}.{} failed", id.task, id.index))
    }

    /// Sends a command to every task.
    pub(crate) fn tell_all(&self, command: Command) {
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

/// Returns when the job shall stop.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A sender that is gone will never ask for a stop.
    if stop.wait_for(|s| *s).await.is_err() {
        std::future::pending::<()>().await;
    }
}
