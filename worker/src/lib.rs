//! The process that runs a job: the shells around the engine's pure machines, with their threads, uploads and timers.
//!
//! [`run`] is coordinator and worker in one process; [`words`] is what the two tell each other. The coordinator picks the
//! snapshot to start from (`coordinator/starting`), has workers build the job with its state, and carries out what
//! [`floodmark_snapshot::coordination`] decides (`coordinator/shell`). A worker builds tasks (`worker/deploy`), lets the runtime
//! drive them and the committers, and makes durable what they hand over (`worker/upload`). [`leadership`] decides which of
//! several coordinators runs the job. `control` is how others ask for things, and [`api`] the same over HTTP.
//!
//! Invariant: a task never waits for storage; whatever it hands over at a barrier is encoded and uploaded elsewhere.

pub mod api;
mod control;
mod coordinator;
pub mod leadership;
mod progress;
mod words;
mod worker;

use std::{sync::Arc, time::Duration};

use floodmark_dataflow::JobGraph;
pub use floodmark_link as link;
use floodmark_link::{
    control::Heartbeat,
    transport::{Endpoint, Listening, Transport},
};
use floodmark_snapshot::{
    Disposition, Env, Epoch, Error, JobId,
    restore::{Reference, StartId},
    storage::Storage,
};
use floodmark_state::StateSettings;
use tokio::sync::{mpsc, watch};

use crate::{
    coordinator::GivenUp,
    leadership::{Ending, Leadership, Lease, Whereabouts},
};
pub use control::{Controls, Requests, RescaleRequest, Rescaled, SavepointMade, SavepointRequest};
pub use coordinator::RestartStrategy;
pub use progress::{
    AttemptStatus, CHECKPOINTS_REMEMBERED_MAX, CheckpointCounts, CheckpointRecord, CheckpointState, CheckpointStatus,
    FailureStatus, JobPhase, OperatorStatus, Progress, ProgressView, Shares, TaskIndex, TaskStatus, WorkerPhase,
};
pub use worker::{CopyUses, LOCAL_COPIES_BYTES_MAX, LocalCopies};

/// How a job takes its snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointMode {
    /// Aligned barriers.
    ExactlyOnce,
    /// Barriers without alignment.
    AtLeastOnce,
    /// No snapshots: a restart begins at the sources' start positions.
    Disabled,
}

/// A job's checkpoint settings.
#[derive(Clone, Debug)]
pub struct CheckpointSettings {
    /// See [`CheckpointMode`].
    pub mode: CheckpointMode,
    /// From one trigger to the next.
    pub interval: Duration,
    /// A checkpoint that takes longer is aborted.
    pub timeout: Duration,
    /// Least time from the end of one checkpoint to the start of the next.
    pub min_pause: Duration,
    /// Failed checkpoints in a row before the job fails.
    pub tolerable_failures: u32,
    /// Newest completed checkpoints to keep; at least 1.
    pub retain: usize,
    /// Checkpoints that may be under way or uncommitted at the same time; at least 1.
    pub max_concurrent: usize,
    /// A checkpoint that is not complete after this long goes on unaligned; `None` if it never does.
    pub unaligned_after: Option<Duration>,
}

/// Every 10 s, exactly once; as a manifest that says nothing has it.
impl Default for CheckpointSettings {
    fn default() -> Self {
        Self {
            mode: CheckpointMode::ExactlyOnce,
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(600),
            min_pause: Duration::ZERO,
            tolerable_failures: 3,
            retain: 3,
            max_concurrent: 1,
            unaligned_after: None,
        }
    }
}

/// State that a subtask takes over in one go before it goes on with the rows of its key groups: large enough for few requests,
/// and small enough to be there in a moment.
pub const SLICE_BYTES: u64 = 8 << 20;

/// Everything that [`run`] needs to know.
pub struct RunSpec {
    /// Whose state it is.
    pub job: JobId,
    /// What to run.
    pub graph: JobGraph,
    /// Subtasks per task.
    pub parallelism: u32,
    /// Number of key groups; fixed for the job's life.
    pub max_parallelism: u16,
    /// How operators keep their state; whether restored files may be named again is the worker's to say.
    pub state: StateSettings,
    /// How to take snapshots.
    pub checkpoints: CheckpointSettings,
    /// Where to keep them.
    pub storage: Arc<dyn Storage>,
    /// What to start from.
    pub restore: Reference,
    /// What to start from if it is [`Reference::Latest`] and the job has no past.
    pub initial: Option<Reference>,
    /// Which start this is: it begins at `restore` once, and goes on after that.
    pub start: StartId,
    /// Bytes of state files that a subtask takes over at a time, about: [`SLICE_BYTES`].
    pub slice_bytes: u64,
    /// Bytes that a channel between subtasks holds before its sender waits:
    /// [`CHANNEL_BYTES_MAX`](floodmark_dataflow::channel::CHANNEL_BYTES_MAX).
    pub channel_bytes: usize,
    /// What to do when the job fails for a reason that it may not meet again.
    pub restarts: RestartStrategy,
    /// Whether state may be dropped that no operator of the graph takes.
    pub allow_dropped_state: bool,
    /// Who runs it, for the log's readers: `host:pid`.
    pub holder: String,
    /// Where this process keeps copies of what it uploads, if it does: see [`LocalCopies`].
    pub copies: Option<Arc<LocalCopies>>,
}

/// How a run ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All inputs have ended and everything is committed.
    Finished,
    /// Stopped when asked to, with a last checkpoint (unless snapshots are disabled).
    Stopped,
    /// An earlier run had finished the job: nothing was done.
    AlreadyFinished,
}

/// What a run did.
#[derive(Clone, Debug)]
pub struct Summary {
    /// How it ended.
    pub outcome: Outcome,
    /// Its counters at the end.
    pub progress: Box<ProgressView>,
    /// The newest durable checkpoint, this run's or an earlier one's.
    pub last_epoch: Option<Epoch>,
}

/// How a run failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A source or sink can't be used as declared: found before anything ran.
    #[error("{0}")]
    Connector(Error),
    /// The storage can't be used, or its checkpoints don't allow a start: found before anything ran.
    #[error("{0}")]
    Storage(Error),
    /// The job failed while it ran.
    #[error("{0}")]
    Failed(Error),
    /// A newer process has taken the job over; this one wrote nothing more.
    #[error("{0}")]
    Fenced(Error),
}

impl RunError {
    /// What has failed.
    #[must_use]
    pub fn cause(&self) -> &Error {
        match self {
            Self::Connector(error) | Self::Storage(error) | Self::Failed(error) | Self::Fenced(error) => error,
        }
    }

    fn failed(error: Error) -> Self {
        match error.disposition() {
            Disposition::Fenced => Self::Fenced(error),
            Disposition::Retry | Disposition::Abort | Disposition::Corrupt => Self::Failed(error),
        }
    }
}

/// A process's way to the others of its job.
#[derive(Clone)]
pub struct Network {
    /// Carries streams.
    pub transport: Arc<dyn Transport>,
    /// Where this process listens; port 0 stands for any that is free.
    pub listen: Endpoint,
    /// How silence is told from loss.
    pub heartbeat: Heartbeat,
}

/// Runs a job on workers of other processes, which connect to this one. `listening` is told where.
///
/// # Errors
/// See [`RunError`].
pub async fn coordinate(
    spec: RunSpec,
    env: Env,
    controls: impl Into<Controls>,
    progress: Arc<Progress>,
    network: Network,
    listening: impl FnOnce(&Endpoint),
) -> Result<Summary, RunError> {
    let spec = Arc::new(spec);
    let (crew, listener) = listen(&spec, &env, &progress, &network).await?;
    listening(&listener.endpoint());
    let outcome = coordinator::run(spec, env, controls.into(), progress, crew, false).await;
    listener.close().await;
    Ok(outcome?)
}

/// How a process stands for election.
pub struct Candidacy<'a> {
    /// Who elects it.
    pub leadership: &'a dyn Leadership,
    /// Turns true when it shall leave the job to others, as it is.
    pub hand_over: watch::Receiver<bool>,
}

/// How long somebody who ends may take to say so.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// As [`coordinate`], once this process leads; before that it holds everything ready. If the one that led until then has
/// stopped the job, there is nothing to do. `listening` is told where when it leads. `None` if others go on with the job, or
/// this process has never led.
///
/// When the run has ended, it may be that the process stays until it shall hand over: see [`Lease::end`].
///
/// # Errors
/// See [`RunError`]; [`RunError::Fenced`] when it does not lead any more.
pub async fn stand_by(
    spec: RunSpec,
    env: Env,
    controls: impl Into<Controls>,
    progress: Arc<Progress>,
    network: Network,
    candidacy: Candidacy<'_>,
    listening: impl FnOnce(&Endpoint),
) -> Result<Option<Summary>, RunError> {
    let (spec, mut controls) = (Arc::new(spec), controls.into());
    let Candidacy { leadership, mut hand_over } = candidacy;
    progress.waiting(true);
    let mut lease = tokio::select! {
        biased;
        () = coordinator::stopped(&mut hand_over) => return Ok(None),
        () = coordinator::stopped(&mut controls.stop) => {
            progress.phase(JobPhase::Done);
            let progress = Box::new(progress.view());
            return Ok(Some(Summary { outcome: Outcome::Stopped, progress, last_epoch: None }));
        }
        lease = leadership.acquire() => lease.map_err(RunError::Failed)?,
    };
    if lease.waited() {
        tracing::info!("this process leads now");
    }
    let led =
        lead(spec, env.clone(), controls, progress.clone(), network, &mut *lease, (&mut hand_over, listening)).await;
    let (ending, led) = match led {
        Led::Ended(Ok(summary)) => {
            let ending = match summary.outcome {
                Outcome::Stopped => Ending::Stopped,
                Outcome::Finished | Outcome::AlreadyFinished => Ending::Finished,
            };
            (ending, Ok(Some(summary)))
        }
        Led::Ended(Err(GivenUp { error, for_good })) => {
            let for_good = for_good && error.cause().disposition() != Disposition::Fenced;
            let cause = error.to_string();
            (if for_good { Ending::Failed(cause) } else { Ending::Broken(cause) }, Err(error))
        }
        Led::HandedOver => (Ending::HandedOver, Ok(None)),
        Led::Lost(reason) => {
            let error =
                format!("this process is fenced: it does not lead any more, for {reason}; it writes nothing more");
            return Err(RunError::Fenced(Error::fenced(error)));
        }
    };
    progress.phase(JobPhase::Done);
    let enough = async {
        if ending.is_for_good() {
            coordinator::stopped(&mut hand_over).await;
        }
        env.runtime.sleep(LAST_WORDS).await;
    };
    let stays = tokio::select! {
        biased;
        stays = lease.end(&ending) => stays,
        () = enough => false,
    };
    if stays {
        match &led {
            Ok(_) => tracing::info!("the run has ended; this process stays until it is told to end"),
            Err(error) => tracing::error!(%error, "the run has failed; this process stays until it is told to end"),
        }
        coordinator::stopped(&mut hand_over).await;
    }
    led
}

/// What the time as the leader has come to.
enum Led {
    Ended(Result<Summary, GivenUp>),
    HandedOver,
    /// Another leads: why that is thought.
    Lost(String),
}

/// Runs the job for as long as this process leads. When this returns, nothing of it runs here.
async fn lead(
    spec: Arc<RunSpec>,
    env: Env,
    controls: Controls,
    progress: Arc<Progress>,
    network: Network,
    lease: &mut dyn Lease,
    (hand_over, listening): (&mut watch::Receiver<bool>, impl FnOnce(&Endpoint)),
) -> Led {
    let broken = |error| Led::Ended(Err(GivenUp { error, for_good: false }));
    let (crew, listener) = match listen(&spec, &env, &progress, &network).await {
        Ok(listens) => listens,
        Err(error) => return broken(error),
    };
    if let Err(error) = lease.announce(&listener.endpoint()).await {
        return broken(RunError::Failed(error));
    }
    listening(&listener.endpoint());
    let waited = lease.waited();
    let led = tokio::select! {
        biased;
        ended = coordinator::run(spec, env, controls, progress, crew, waited) => Led::Ended(ended),
        () = coordinator::stopped(hand_over) => Led::HandedOver,
        reason = lease.lost() => Led::Lost(reason),
    };
    listener.close().await;
    led
}

/// Has this process listen for workers.
async fn listen(
    spec: &Arc<RunSpec>,
    env: &Env,
    progress: &Progress,
    network: &Network,
) -> Result<(coordinator::Crew, Box<dyn Listening>), RunError> {
    let (news, from_workers) = mpsc::unbounded_channel();
    let plan = spec.graph.fingerprint.clone();
    let listener = coordinator::listen(network, env, plan, news).await.map_err(RunError::Failed)?;
    Ok((coordinator::Crew::new(env, progress.counters.clone(), from_workers), listener))
}

/// Runs subtasks of a job for whoever coordinates it, until `stop`. `progress` shows this process's share.
///
/// # Errors
/// When the process can't listen, or the coordinator will never take it.
pub async fn serve(
    spec: RunSpec,
    env: Env,
    network: Network,
    coordinator: impl Into<Whereabouts>,
    slots: u32,
    stop: watch::Receiver<bool>,
    progress: Arc<Progress>,
) -> Result<(), Error> {
    worker::serve(Arc::new(spec), env, network, coordinator.into(), slots, stop, progress).await
}

/// Runs a job to its end, until `controls` say that it shall stop, or until it fails. With [`Env::system`] it needs a
/// multi-threaded tokio runtime around it.
///
/// # Errors
/// See [`RunError`].
pub async fn run(
    spec: RunSpec,
    env: Env,
    controls: impl Into<Controls>,
    progress: Arc<Progress>,
) -> Result<Summary, RunError> {
    let spec = Arc::new(spec);
    let crew = coordinator::Crew::local(&spec, &env, progress.counters.clone());
    Ok(coordinator::run(spec, env, controls.into(), progress, crew, false).await?)
}
