//! The worker's side: runs the subtasks that the coordinator deploys, and makes durable what they hand over.
//!
//! One loop takes every order and every event of tasks, committers and uploads, in order. It never waits for storage: builds
//! and uploads run beside it. When its coordinator is gone, everything that it runs ends.

mod committers;
mod copies;
mod deploy;
mod process;
mod reading;
mod slices;
mod tasks;
mod upload;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use floodmark_dataflow::task::{Command, Commands, OperatorPart, TaskEvent};
use floodmark_link::exchange::Exchange;
use floodmark_snapshot::{Disposition, Env, Epoch, Error, OperatorSnapshot, OperatorUid, Result, log::JobFolder};
use futures::future::{BoxFuture, join_all};
use tokio::sync::{mpsc, oneshot};

pub use self::copies::{CopyUses, LOCAL_COPIES_BYTES_MAX, LocalCopies};
pub(crate) use self::process::serve;
use self::{
    committers::{CommitterHandle, CommitterReport, Staged},
    deploy::{SinkPart, Work},
    tasks::{Ended, TaskReport},
    upload::{Turn, Uploader},
};
use crate::{
    RunSpec, WorkerPhase,
    progress::Counters,
    words::{Built, CommitterId, FromWorker, NotBuilt, SubtaskId, ToWorker},
};

/// How long tasks may take to end after they were told to.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);
/// Aborted checkpoints that are remembered, so that nothing is uploaded for them.
const ABORTS_REMEMBERED_MAX: usize = 64;

/// Where reports go. A coordinator that is gone has no need of them.
pub(crate) type Reports = Box<dyn Fn(FromWorker) + Send + Sync>;
/// Where orders come from.
pub(crate) type Orders = mpsc::UnboundedReceiver<ToWorker>;

/// Runs what the coordinator says, until it says nothing any more.
pub(crate) async fn run(
    spec: Arc<RunSpec>,
    env: Env,
    counters: Arc<Counters>,
    exchange: Option<Arc<Exchange>>,
    mut orders: Orders,
    reports: Reports,
) {
    let here = Here { spec, env, counters, exchange, reports: Arc::new(reports) };
    let mut stage = Stage::Idle;
    loop {
        here.counters.enter(stage.phase());
        // Orders first: an end is not to wait behind what ends.
        tokio::select! {
            biased;
            order = orders.recv() => match order {
                Some(order) => stage = stage.order(order, &here).await,
                // Without a coordinator nothing that runs is of any use: dropping it ends it.
                None => return,
            },
            event = stage.next() => stage = stage.event(event, &here.reports),
        }
    }
}

/// What a worker has whatever it runs.
#[derive(Clone)]
struct Here {
    spec: Arc<RunSpec>,
    env: Env,
    counters: Arc<Counters>,
    /// The way to other workers.
    exchange: Option<Arc<Exchange>>,
    reports: Arc<Reports>,
}

/// Dropped, the channels to and from other workers are closed with it.
struct Channels(Option<(Arc<Exchange>, floodmark_snapshot::Attempt)>);

impl Drop for Channels {
    fn drop(&mut self) {
        if let Some((exchange, attempt)) = self.0.take() {
            exchange.stop(attempt);
        }
    }
}

/// How far the attempt is on this worker.
enum Stage {
    Idle,
    /// Until it is built.
    Building(BoxFuture<'static, Result<Work, NotBuilt>>),
    Built(Box<Work>),
    Running(Box<Attempt>),
}

/// What a stage comes to by itself.
enum Next {
    Built(Result<Work, NotBuilt>),
    Event(Event),
}

impl Stage {
    fn phase(&self) -> WorkerPhase {
        match self {
            Self::Idle => WorkerPhase::Waiting,
            Self::Building(_) | Self::Built(_) => WorkerPhase::Building,
            Self::Running(attempt) => {
                WorkerPhase::Running { restoring: attempt.tasks.values().filter(|t| t.arriving).count() }
            }
        }
    }

    async fn next(&mut self) -> Next {
        match self {
            Self::Building(build) => Next::Built(build.await),
            Self::Running(attempt) => match attempt.events.recv().await {
                Some(event) => Next::Event(event),
                // Not as long as the attempt itself holds a sender.
                None => std::future::pending().await,
            },
            Self::Idle | Self::Built(_) => std::future::pending().await,
        }
    }

    fn event(mut self, next: Next, reports: &Arc<Reports>) -> Self {
        let report = match next {
            Next::Event(event) => {
                if let Self::Running(attempt) = &mut self {
                    attempt.event(event);
                }
                return self;
            }
            Next::Built(Ok(work)) => {
                tracing::debug!("all that is to run here is built");
                let report = FromWorker::Built(Built {
                    committers: work.committers.iter().map(|c| c.id.clone()).collect(),
                    arriving: work.tasks.iter().filter(|t| t.slices.is_some()).map(|t| t.id).collect(),
                });
                self = Self::Built(Box::new(work));
                report
            }
            Next::Built(Err(why)) => {
                self = Self::Idle;
                FromWorker::NotBuilt(why)
            }
        };
        reports(report);
        self
    }

    async fn order(self, order: ToWorker, here: &Here) -> Self {
        match (order, self) {
            (ToWorker::Deploy(deployment), before) => {
                drop(before);
                let build = deploy::build(here.clone(), *deployment);
                Self::Building(Box::pin(build))
            }
            (ToWorker::Run, Self::Built(work)) => match Attempt::start(here, *work) {
                Ok(attempt) => Self::Running(Box::new(attempt)),
                Err(error) => {
                    (here.reports)(FromWorker::Failed { error, damaged: false });
                    Self::Idle
                }
            },
            (ToWorker::Commit, Self::Running(attempt)) => {
                attempt.committers.values().for_each(CommitterHandle::begin);
                Self::Running(attempt)
            }
            (ToWorker::Tell(command), Self::Running(mut attempt)) => {
                attempt.tell(command);
                Self::Running(attempt)
            }
            (ToWorker::End { cancel }, before) => {
                let error = match before {
                    Self::Running(attempt) => attempt.end(cancel).await,
                    Self::Idle | Self::Building(_) | Self::Built(_) => None,
                };
                if here.exchange.is_some() {
                    (here.reports)(FromWorker::Counted(here.counters.here()));
                }
                here.counters.end();
                (here.reports)(FromWorker::Gone(error));
                Self::Idle
            }
            // For what could not be started, and is reported.
            (ToWorker::Run | ToWorker::Commit | ToWorker::Tell(_), stage) => stage,
        }
    }
}

/// What happens to what runs here.
enum Event {
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
}

/// A task that runs.
struct RunningTask {
    commands: Commands,
    /// Whether it heads a source.
    source: bool,
    sinks: Vec<SinkPart>,
    /// Whether not all of its state is there.
    arriving: bool,
    gone: Option<Ended>,
    /// Says when the records of its last barrier are kept.
    turn: Option<oneshot::Receiver<()>>,
}

/// A worker's share of an attempt that runs.
struct Attempt {
    env: Env,
    reports: Arc<Reports>,
    sender: mpsc::UnboundedSender<Event>,
    events: mpsc::UnboundedReceiver<Event>,
    tasks: BTreeMap<SubtaskId, RunningTask>,
    committers: BTreeMap<CommitterId, CommitterHandle>,
    uploader: Arc<Uploader>,
    /// Checkpoints that have been given up, newest last.
    aborted: VecDeque<Epoch>,
    _channels: Channels,
}

impl Attempt {
    fn start(here: &Here, work: Work) -> Result<Self> {
        let Work { attempt, last_epoch, tasks, committers, channels } = work;
        let Here { spec, env, reports, .. } = here;
        let (sender, events) = mpsc::unbounded_channel();
        let folder = JobFolder::of(&spec.job);
        let copies = spec.copies.clone();
        let uploader = Uploader { storage: spec.storage.clone(), env: env.clone(), folder, attempt, copies };
        let mut this = Self {
            env: env.clone(),
            reports: reports.clone(),
            sender,
            events,
            tasks: BTreeMap::new(),
            committers: BTreeMap::new(),
            uploader: Arc::new(uploader),
            aborted: VecDeque::new(),
            _channels: channels,
        };
        for committing in committers {
            let to = this.sender.clone();
            let report = Box::new(move |report| drop(to.send(Event::Committer(report))));
            let id = committing.id.clone();
            let handle =
                committers::start(committing.id, committing.committer, last_epoch, committing.restored, env, report)?;
            this.committers.insert(id, handle);
        }
        for deployed in tasks {
            let (id, commands, to) = (deployed.id, deployed.task.commands(), this.sender.clone());
            let report = move |report| drop(to.send(Event::Task(report)));
            let gone = tasks::start(id, deployed.task, deployed.signal, env, report)?;
            let task = RunningTask {
                commands,
                source: deployed.source,
                sinks: deployed.sinks,
                arriving: deployed.slices.is_some(),
                gone: Some(gone),
                turn: None,
            };
            this.tasks.insert(id, task);
            if let Some(slices) = deployed.slices {
                env.runtime.spawn(Box::pin(slices.run()));
            }
        }
        Ok(this)
    }

    fn report(&self, report: FromWorker) {
        (self.reports)(report);
    }

    fn fail(&self, error: Error) {
        self.report(FromWorker::Failed { error, damaged: false });
    }

    fn tell(&mut self, command: Command) {
        match command {
            Command::Trigger(_) => {
                return self.tasks.values().filter(|t| t.source).for_each(|t| t.commands.send(command));
            }
            Command::Completed(epoch) => {
                self.committers.values().for_each(|c| c.completed(epoch));
                if let Some(copies) = &self.uploader.copies {
                    copies.completed(&self.env, epoch);
                }
            }
            Command::Abort(epoch) => {
                if let Some(copies) = &self.uploader.copies {
                    copies.aborted(&self.env, epoch);
                }
                self.aborted.push_back(epoch);
                if self.aborted.len() > ABORTS_REMEMBERED_MAX {
                    self.aborted.pop_front();
                }
            }
            Command::Unalign(_) | Command::Cancel => {}
        }
        self.tasks.values().for_each(|t| t.commands.send(command));
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Task(TaskReport::Event(id, event)) => self.task_event(id, event),
            Event::Task(TaskReport::Failed(id, error)) => {
                let arriving = self.tasks.get(&id).is_some_and(|t| t.arriving);
                let damaged = arriving && error.disposition() == Disposition::Corrupt;
                let error = error.context(format!("task {id} failed"));
                self.report(FromWorker::Failed { error, damaged });
            }
            Event::Committer(CommitterReport::Committed(id, epoch)) => self.report(FromWorker::Committed(id, epoch)),
            Event::Committer(CommitterReport::Failed(id, error)) => self.fail(error.context(format!("sink {id}"))),
            Event::StagingFailed(error) => self.fail(error.context("keep staged records")),
            Event::Uploaded { epoch, subtask, outcome } => self.uploaded(epoch, subtask, outcome),
        }
    }

    fn task_event(&mut self, id: SubtaskId, event: TaskEvent) {
        match event {
            TaskEvent::Snapshot { barrier, parts } => self.upload(id, barrier.epoch, parts),
            TaskEvent::Declined { epoch, reason } => self.report(FromWorker::Declined { epoch, subtask: id, reason }),
            TaskEvent::Restored => {
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.arriving = false;
                }
                tracing::debug!("all state of subtask {id} is there");
                self.report(FromWorker::Restored(id));
            }
            TaskEvent::Exhausted => self.report(FromWorker::Exhausted(id)),
            TaskEvent::Ended => self.report(FromWorker::Ended(id)),
        }
    }

    fn upload(&mut self, id: SubtaskId, epoch: Epoch, mut parts: Vec<OperatorPart>) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let mut staged: HashMap<OperatorUid, Staged> = HashMap::new();
        for sink in &task.sinks {
            let committer = CommitterId { uid: sink.uid.clone(), index: id.index };
            let Some(handle) = self.committers.get(&committer) else { continue };
            staged.insert(sink.uid.clone(), handle.staged().clone());
            // A sink without new records may still hold older ones.
            if parts.iter().all(|p| p.uid != sink.uid) {
                parts.push(OperatorPart {
                    uid: sink.uid.clone(),
                    kind: sink.kind.clone(),
                    schema: Default::default(),
                    parallelism: sink.parallelism,
                    splits: Vec::new(),
                    reused: Vec::new(),
                    shards: Vec::new(),
                });
            }
        }
        let turn = Turn::after(&mut task.turn);
        let (uploader, events) = (self.uploader.clone(), self.sender.clone());
        let wanted = !self.aborted.contains(&epoch);
        self.env.runtime.spawn(Box::pin(async move {
            let event = match uploader.stage(epoch, &mut parts, &staged, turn).await {
                Err(error) => Event::StagingFailed(error),
                // One that has been given up meanwhile needs no files.
                Ok(()) if !wanted => return,
                Ok(()) => {
                    let outcome = uploader.upload(epoch, id.index, parts, &staged).await;
                    Event::Uploaded { epoch, subtask: id, outcome }
                }
            };
            // Nobody listens any more once the attempt has ended.
            let _ = events.send(event);
        }));
    }

    fn uploaded(&self, epoch: Epoch, id: SubtaskId, outcome: Result<Vec<(OperatorUid, OperatorSnapshot)>>) {
        for sink in self.tasks.get(&id).map_or(&[][..], |t| &t.sinks) {
            let committer = CommitterId { uid: sink.uid.clone(), index: id.index };
            if let Some(handle) = self.committers.get(&committer) {
                handle.staged().up_to(epoch).iter().for_each(|(staged, _)| handle.staged_at(*staged));
            }
        }
        self.report(match outcome {
            Ok(parts) => FromWorker::Acknowledged { epoch, subtask: id, parts },
            Err(error) => FromWorker::Declined { epoch, subtask: id, reason: error.to_string() },
        });
    }

    /// Waits for the tasks' ends, for a bounded time.
    async fn end(mut self, cancel: bool) -> Option<Error> {
        if cancel {
            self.tell(Command::Cancel);
        }
        let gone = join_all(self.tasks.values_mut().filter_map(|t| t.gone.take()));
        tokio::select! {
            biased;
            _ = gone => None,
            () = self.env.runtime.sleep(CANCEL_TIMEOUT) => {
                Some(Error::abort(format!("tasks did not end within {} s", CANCEL_TIMEOUT.as_secs())))
            }
        }
    }
}

/// However an attempt is left, its threads end.
impl Drop for Attempt {
    fn drop(&mut self) {
        self.tell(Command::Cancel);
    }
}
