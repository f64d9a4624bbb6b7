//! The coordinator's side of a job: attempts, one after the other, each with one loop that takes every event, in order.

mod assignment;
mod crew;
mod joining;
mod rescaling;
mod restarts;
mod shell;
mod starting;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use floodmark_dataflow::{TaskId, graph::NodeKind, task::Command};
use floodmark_snapshot::{Disposition, Env, Epoch, Error, Generation, Result, log::CheckpointLog, restore::Rejected};
use tokio::sync::watch;

pub use self::restarts::RestartStrategy;
pub(crate) use self::{crew::Crew, joining::listen};
use self::{
    rescaling::Rescaling,
    restarts::{Restarts, Verdict},
    shell::Shell,
    starting::{Look, Ready, Start},
};
use crate::{
    Controls, JobPhase, Outcome, Progress, RunError, RunSpec, Summary,
    words::{CommitterId, FromWorker, SubtaskId, ToWorker},
};

/// How long a lost worker's replacement is waited for before those that are left take over its part.
const REPLACEMENT_PATIENCE: Duration = Duration::from_millis(500);
/// The same for a coordinator that begins to run a job which has run before: its workers find it one after the other.
const TAKEOVER_PATIENCE: Duration = Duration::from_secs(3);

/// See [`crate::run`]. `stood_by`: another process has run the job until now; if that one has stopped it, it stays so.
pub(crate) async fn run(
    spec: Arc<RunSpec>,
    env: Env,
    mut controls: Controls,
    progress: Arc<Progress>,
    mut crew: Crew,
    stood_by: bool,
) -> Result<Summary, GivenUp> {
    let mut restarts = Restarts::new(spec.restarts.clone());
    let mut job = Job {
        spec,
        env,
        progress,
        stood_by,
        damaged: Vec::new(),
        held: None,
        next: Next { parallelism: 0, crowd_after: None },
        rescaling: None,
    };
    let mut first = true;
    loop {
        let completed = job.progress.view().checkpoints.completed;
        let error = match job.attempt(&mut controls, &mut crew).await {
            Ok(Attempted::Ended(summary)) => return Ok(summary),
            Ok(Attempted::Again) => {
                job.progress.phase(JobPhase::Restoring);
                first = false;
                continue;
            }
            // Nothing has been snapshotted or committed: the next older checkpoint is as good as if it had been chosen first.
            Ok(Attempted::Damaged(rejected)) => {
                job.progress.phase(JobPhase::Restoring);
                job.damaged.push(rejected);
                continue;
            }
            Ok(Attempted::TakenOver(error)) if restarts.taken_over(job.env.clock.monotonic()) => {
                RunError::Failed(Error::retry(error.cause().to_string()))
            }
            Ok(Attempted::TakenOver(error)) => error,
            // What is wrong before anything has run is for whoever has started the job.
            Err(error @ (RunError::Connector(_) | RunError::Storage(_))) if first => {
                let for_good = error.cause().disposition() != Disposition::Retry;
                return Err(GivenUp { error, for_good });
            }
            Err(error) => error,
        };
        first = false;
        if let Some(rescaling) = &mut job.rescaling {
            rescaling.failed(error.to_string());
        }
        if job.progress.view().checkpoints.completed > completed {
            restarts.progressed();
        }
        let disposition = error.cause().disposition();
        match restarts.failed(disposition, job.env.clock.monotonic()) {
            Verdict::GiveUp(reason) => {
                job.progress.attempt_failed(error.to_string(), job.env.clock.wall_ms(), false);
                tracing::debug!(%error, "no other attempt: {reason}");
                return Err(GivenUp { error, for_good: true });
            }
            Verdict::Again(delay) => {
                job.progress.attempt_failed(error.to_string(), job.env.clock.wall_ms(), true);
                let when = if delay.is_zero() { "at once".to_owned() } else { format!("in {delay:?}") };
                tracing::warn!(%error, "the attempt has failed; the next begins {when}");
                tokio::select! {
                    biased;
                    // Whoever stops a job that does not run is told why it does not.
                    () = stopped(&mut controls.stop) => return Err(GivenUp { error, for_good: true }),
                    () = job.env.runtime.sleep(delay) => {}
                }
            }
        }
    }
}

/// A job that has failed.
pub(crate) struct GivenUp {
    pub(crate) error: RunError,
    /// Whether it would do so again, as far as is known: it is not worth another start as it is.
    pub(crate) for_good: bool,
}

impl From<GivenUp> for RunError {
    fn from(given_up: GivenUp) -> Self {
        given_up.error
    }
}

/// What an attempt came to.
enum Attempted {
    Ended(Summary),
    /// The job goes on at once.
    Again,
    /// The snapshot that it started from turned out to be damaged before all of it was there.
    Damaged(Rejected),
    /// Somebody has taken over outputs. That may be what is left of an earlier attempt, on a worker that was cut off for a while:
    /// who runs the job only the log says, when the next attempt opens it.
    TakenOver(RunError),
}

/// How the tasks of an attempt came to their end, if not by a failure.
enum Ended {
    /// The job has ended, with this as its newest checkpoint.
    Job(Outcome, Option<Epoch>),
    /// Behind a checkpoint that the next attempt goes on from.
    Rescaled,
    /// The sources have, behind a checkpoint that has failed.
    Unfinished,
}

/// How the next attempt is placed.
#[derive(Clone, Copy)]
struct Next {
    /// Subtasks per task.
    parallelism: u32,
    /// See [`Crew::assemble`].
    crowd_after: Option<Duration>,
}

/// A job, over its attempts.
struct Job {
    spec: Arc<RunSpec>,
    env: Env,
    progress: Arc<Progress>,
    /// Whether another process has run the job until now.
    stood_by: bool,
    /// Checkpoints that this process has found damaged, and passes over.
    damaged: Vec<Rejected>,
    /// The newest reign of this process: who has taken the job over since then keeps it.
    held: Option<Generation>,
    next: Next,
    /// The rescale that the next attempt is for.
    rescaling: Option<Rescaling>,
}

impl Job {
    async fn attempt(&mut self, controls: &mut Controls, crew: &mut Crew) -> Result<Attempted, RunError> {
        if self.held.is_none()
            && let Some((outcome, epoch)) = self.look().await?
        {
            return Ok(self.nothing_to_do(outcome, epoch));
        }
        let Next { parallelism, crowd_after } = self.next;
        self.progress.waiting(true);
        crew.assemble(parallelism, crowd_after).await.map_err(RunError::Failed)?;
        self.progress.waiting(false);
        self.next.crowd_after = Some(REPLACEMENT_PATIENCE);
        let started = starting::start(&self.spec, &self.env, crew, &self.damaged, &mut self.held).await;
        let Ready { built, log, state, note, restored, fallback } = match started {
            Ok(Start::Ready(ready)) => *ready,
            Ok(Start::AlreadyFinished(epoch)) => return Ok(self.nothing_to_do(Outcome::AlreadyFinished, epoch)),
            Err(error) => {
                // Some may have built their part.
                let _ = crew.end(true).await;
                return Err(error);
            }
        };
        if let Some(epoch) = restored {
            self.progress.restored_from(epoch, fallback);
        }
        let attempt = log.as_ref().map(CheckpointLog::attempt);
        self.progress.begins(attempt, crew.parallelism(), built.arriving.len());
        let mut running = Running {
            spec: self.spec.clone(),
            env: self.env.clone(),
            progress: self.progress.clone(),
            unended: subtasks(&self.spec, crew.parallelism()).collect(),
            committers: built.committers,
            arriving: built.arriving,
            damage: None,
            taken_over: false,
            crew,
        };
        let ended = match log {
            Some(log) => {
                let mut shell = Shell::new(&running, log, state, note, restored, self.rescaling.take());
                let ended = shell.run(&mut running, controls).await;
                let (state, rescaling) = shell.left(&ended);
                let crowded = rescaling.as_ref().is_some_and(|r| r.crowded);
                let patience = if crowded { Duration::ZERO } else { REPLACEMENT_PATIENCE };
                let parallelism = starting::parallelism(&self.spec, &state);
                self.next = Next { parallelism, crowd_after: Some(patience) };
                self.rescaling = rescaling;
                ended
            }
            None => running.without_snapshots(controls).await.map(|outcome| Ended::Job(outcome, None)),
        };
        let (damage, taken_over) = (running.damage.take().zip(restored), running.taken_over);
        match (running.end(ended).await, damage) {
            (Err(_), Some((reason, epoch))) => Ok(Attempted::Damaged(Rejected { epoch, reason })),
            (Err(error), None) if taken_over => Ok(Attempted::TakenOver(error)),
            (attempted, _) => attempted,
        }
    }

    /// Finds out where the job stands. Answers if there is nothing to do.
    async fn look(&mut self) -> Result<Option<(Outcome, Epoch)>, RunError> {
        Ok(match starting::look(&self.spec, &self.env).await? {
            Look::At { parallelism, has_history, stopped } => {
                let crowd_after = has_history.then_some(TAKEOVER_PATIENCE);
                self.next = Next { parallelism, crowd_after };
                stopped.filter(|_| self.stood_by).map(|epoch| (Outcome::Stopped, epoch))
            }
            Look::AlreadyFinished(epoch) => Some((Outcome::AlreadyFinished, epoch)),
        })
    }

    fn nothing_to_do(&self, outcome: Outcome, epoch: Epoch) -> Attempted {
        self.progress.phase(JobPhase::Done);
        Attempted::Ended(Summary { outcome, progress: Box::new(self.progress.view()), last_epoch: Some(epoch) })
    }
}

/// All subtasks of a job.
fn subtasks(spec: &RunSpec, parallelism: u32) -> impl Iterator<Item = SubtaskId> {
    let of_task =
        move |task: TaskId| (0..spec.graph.width(task, parallelism)).map(move |index| SubtaskId { task, index });
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
    async fn end(self, ended: Result<Ended>) -> Result<Attempted, RunError> {
        let cancel = !matches!(ended, Ok(Ended::Job(..) | Ended::Rescaled));
        let left = self.crew.end(cancel).await;
        match ended {
            Ok(Ended::Job(outcome, last_epoch)) => {
                left.map_err(RunError::failed)?;
                self.progress.phase(JobPhase::Done);
                Ok(Attempted::Ended(Summary { outcome, progress: Box::new(self.progress.view()), last_epoch }))
            }
            // What may be left is fenced by the next attempt, as behind a failure.
            Ok(Ended::Rescaled) => {
                self.crew.even_out();
                Ok(Attempted::Again)
            }
            Ok(Ended::Unfinished) => Ok(Attempted::Again),
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
                Some(request) = controls.rescales.recv() => {
                    let reason = "the job takes no snapshots (spec.checkpoints.mode is Disabled): stop it, and start it anew";
                    rescaling::answer(request, Err(reason.to_owned()));
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
                self.progress.restoring(self.arriving.len());
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
