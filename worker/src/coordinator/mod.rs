//! The coordinator's side of a job: attempts, one after the other, each with one loop that takes every event, in order.

mod assignment;
mod crew;
mod joining;
mod restarts;
mod shell;
mod starting;

use std::{collections::BTreeSet, sync::Arc};

use floodmark_dataflow::{TaskId, graph::NodeKind, task::Command};
use floodmark_snapshot::{Disposition, Env, Epoch, Error, Generation, Result, restore::Rejected};
use tokio::sync::watch;

pub(crate) use self::{crew::Crew, joining::listen};
pub use self::{restarts::RestartStrategy, starting::takers};
use self::{
    restarts::{Restarts, Verdict},
    shell::Shell,
    starting::{Ready, Start},
};
use crate::{
    Controls, JobPhase, Outcome, Progress, RunError, RunSpec, Summary,
    words::{CommitterId, FromWorker, SubtaskId, ToWorker},
};

/// See [`crate::run`].
pub(crate) async fn run(
    spec: Arc<RunSpec>,
    env: Env,
    mut controls: Controls,
    progress: Arc<Progress>,
    mut crew: Crew,
) -> Result<Summary, RunError> {
    let (mut damaged, mut restarts) = (Vec::new(), Restarts::new(spec.restarts.clone()));
    // Who has taken the job over since then keeps it.
    let mut held = None;
    let mut first = true;
    loop {
        let completed = progress.view().checkpoints.completed;
        let attempted = attempt(&spec, &env, &mut controls, &progress, &mut crew, &damaged, &mut held).await;
        let error = match attempted {
            Ok(Attempted::Ended(summary)) => return Ok(summary),
            // Nothing has been snapshotted or committed: the next older checkpoint is as good as if it had been chosen first.
            Ok(Attempted::Damaged(rejected)) => {
                progress.phase(JobPhase::Restoring);
                damaged.push(rejected);
                continue;
            }
            Ok(Attempted::TakenOver(error)) if restarts.taken_over(env.clock.monotonic()) => {
                RunError::Failed(Error::retry(error.cause().to_string()))
            }
            Ok(Attempted::TakenOver(error)) => error,
            // What is wrong before anything has run is for whoever has started the job.
            Err(error @ (RunError::Connector(_) | RunError::Storage(_))) if first => return Err(error),
            Err(error) => error,
        };
        first = false;
        if progress.view().checkpoints.completed > completed {
            restarts.progressed();
        }
        let disposition = error.cause().disposition();
        match restarts.failed(disposition, env.clock.monotonic()) {
            Verdict::GiveUp(reason) => {
                tracing::debug!(%error, "no other attempt: {reason}");
                return Err(error);
            }
            Verdict::Again(delay) => {
                progress.phase(JobPhase::Restoring);
                tracing::warn!(%error, "the attempt has failed; the next begins in {delay:?}");
                tokio::select! {
                    biased;
                    // Whoever stops a job that does not run is told why it does not.
                    () = stopped(&mut controls.stop) => return Err(error),
                    () = env.runtime.sleep(delay) => {}
                }
            }
        }
    }
}

/// What an attempt came to.
enum Attempted {
    Ended(Summary),
    /// The snapshot that it started from turned out to be damaged before all of it was there.
    Damaged(Rejected),
    /// Somebody has taken over outputs. That may be what is left of an earlier attempt, on a worker that was cut off for a while:
    /// who runs the job only the log says, when the next attempt opens it.
    TakenOver(RunError),
}

async fn attempt(
    spec: &Arc<RunSpec>,
    env: &Env,
    controls: &mut Controls,
    progress: &Arc<Progress>,
    crew: &mut Crew,
    damaged: &[Rejected],
    held: &mut Option<Generation>,
) -> Result<Attempted, RunError> {
    crew.assemble(spec.parallelism).await.map_err(RunError::Failed)?;
    let started = starting::start(spec, env, crew, damaged, held).await;
    let Ready { built, log, state, note, restored } = match started {
        Ok(Start::Ready(ready)) => *ready,
        Ok(Start::AlreadyFinished(epoch)) => {
            progress.phase(JobPhase::Done);
            let (outcome, progress) = (Outcome::AlreadyFinished, progress.view());
            return Ok(Attempted::Ended(Summary { outcome, progress, last_epoch: Some(epoch) }));
        }
        Err(error) => {
            // Some may have built their part.
            let _ = crew.end(true).await;
            return Err(error);
        }
    };
    if let Some(epoch) = restored {
        progress.restored_from(epoch);
    }
    let mut running = Running {
        spec: spec.clone(),
        env: env.clone(),
        progress: progress.clone(),
        unended: subtasks(spec).collect(),
        committers: built.committers,
        arriving: built.arriving,
        damage: None,
        taken_over: false,
        crew,
    };
    let outcome = match log {
        Some(log) => Shell::new(&running, log, state, note, restored).run(&mut running, controls).await,
        None => running.without_snapshots(controls).await.map(|outcome| (outcome, None)),
    };
    let (damage, taken_over) = (running.damage.take().zip(restored), running.taken_over);
    match (running.end(outcome).await, damage) {
        (Ok(summary), _) => Ok(Attempted::Ended(summary)),
        (Err(_), Some((reason, epoch))) => Ok(Attempted::Damaged(Rejected { epoch, reason })),
        (Err(error), None) if taken_over => Ok(Attempted::TakenOver(error)),
        (Err(error), None) => Err(error),
    }
}

/// All subtasks of a job.
fn subtasks(spec: &RunSpec) -> impl Iterator<Item = SubtaskId> {
    let of_task =
        |task: TaskId| (0..spec.graph.width(task, spec.parallelism)).map(move |index| SubtaskId { task, index });
    (0..spec.graph.vertices.len()).map(TaskId).flat_map(of_task)
}

/// Whether a task begins with a source.
fn heads_source(spec: &RunSpec, task: TaskId) -> bool {
    let first = spec.graph.vertices.get(task.0).and_then(|v| v.chain.first());
    first.is_some_and(|node| matches!(node.node, NodeKind::Source(_)))
}

/// A job whose tasks run.
struct Running<'a> {
    spec: Arc<RunSpec>,
    env: Env,
    progress: Arc<Progress>,
    crew: &'a mut Crew,
    /// The subtasks that have not sent their last frame.
    unended: BTreeSet<SubtaskId>,
    committers: BTreeSet<CommitterId>,
    /// The subtasks whose state is not all there yet.
    arriving: BTreeSet<SubtaskId>,
    /// Why the attempt has failed, if it is that its snapshot is damaged.
    damage: Option<String>,
    /// Whether it has failed because somebody has taken over an output.
    taken_over: bool,
}

impl Running<'_> {
    async fn end(self, outcome: Result<(Outcome, Option<Epoch>)>) -> Result<Summary, RunError> {
        let left = self.crew.end(outcome.is_err()).await;
        match outcome {
            Ok((outcome, last_epoch)) => {
                left.map_err(RunError::failed)?;
                self.progress.phase(JobPhase::Done);
                Ok(Summary { outcome, progress: self.progress.view(), last_epoch })
            }
            Err(error) => Err(RunError::failed(error)),
        }
    }

    /// Runs until every task has ended by itself.
    async fn without_snapshots(&mut self, controls: &mut Controls) -> Result<Outcome> {
        let mut outcome = Outcome::Finished;
        self.run();
        self.commit();
        while !self.unended.is_empty() {
            tokio::select! {
                biased;
                () = stopped(&mut controls.stop), if outcome == Outcome::Finished => {
                    outcome = Outcome::Stopped;
                    self.progress.phase(JobPhase::Stopping);
                    self.tell(Command::Cancel);
                }
                Some(request) = controls.savepoints.recv() => {
                    // One that no longer listens has no need of the answer.
                    let _ = request.reply.send(Err("the job takes no snapshots: spec.checkpoints.mode is Disabled".to_owned()));
                }
                event = self.crew.next() => self.plain_event(event?)?,
            }
        }
        Ok(outcome)
    }

    /// Takes an event that means the same with and without snapshots.
    ///
    /// # Errors
    /// If the event is a failure.
    fn plain_event(&mut self, event: FromWorker) -> Result<()> {
        match event {
            FromWorker::Failed { error, damaged } => {
                if damaged {
                    self.damage = Some(error.to_string());
                }
                self.taken_over = error.disposition() == Disposition::Fenced;
                return Err(error);
            }
            FromWorker::Restored(id) => {
                self.arriving.remove(&id);
            }
            FromWorker::Ended(id) => {
                self.unended.remove(&id);
            }
            FromWorker::Gone(_) => return Err(Error::abort("internal error: the job's worker has ended")),
            FromWorker::Built(_)
            | FromWorker::NotBuilt(_)
            | FromWorker::Acknowledged { .. }
            | FromWorker::Declined { .. }
            | FromWorker::Exhausted(_)
            | FromWorker::Counted(_)
            | FromWorker::Committed(..) => {}
        }
        Ok(())
    }

    /// Lets what is built run.
    fn run(&self) {
        self.crew.tell(ToWorker::Run);
        self.progress.phase(JobPhase::Running);
    }

    /// Lets the committers begin. Not before all state is there: should the snapshot be damaged, what it holds staged is not to
    /// be written, because it is no start, or an older one stands in for it.
    fn commit(&self) {
        self.crew.tell(ToWorker::Commit);
    }

    /// To the tasks and committers that it concerns.
    fn tell(&self, command: Command) {
        self.crew.tell(ToWorker::Tell(command));
    }
}

/// Returns when the job shall stop.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A sender that is gone will never ask for a stop.
    if stop.wait_for(|s| *s).await.is_err() {
        std::future::pending::<()>().await;
    }
}
