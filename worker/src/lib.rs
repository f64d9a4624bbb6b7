//! The process that runs a job: the shells around the engine's pure machines, with their threads, uploads and timers.
//!
//! [`run`] is coordinator and worker in one process. `coordinator` carries out what
//! [`floodmark_snapshot::coordination`] decides; `deploy` builds tasks from a graph and a restored snapshot; `tasks` drives
//! each on a thread of its own; `upload` makes a subtask's state durable; `committers` make staged output visible.
//!
//! Invariant: a task never waits for storage; whatever it hands over at a barrier is encoded and uploaded elsewhere.

mod committers;
mod coordinator;
mod deploy;
mod progress;
mod restoring;
mod tasks;
mod upload;

use std::{sync::Arc, time::Duration};

use floodmark_dataflow::JobGraph;
use floodmark_snapshot::{Disposition, Env, Epoch, Error, JobId, storage::Storage};
use tokio::sync::watch;

pub use progress::{CheckpointCounts, CheckpointStatus, JobPhase, OperatorStatus, Progress, ProgressView};

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
}

/// What a job starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreMode {
    /// The newest complete and intact checkpoint, or nothing if there never was one.
    Latest,
    /// Nothing, even if there are checkpoints.
    None,
}

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
    /// How to take snapshots.
    pub checkpoints: CheckpointSettings,
    /// Where to keep them.
    pub storage: Arc<dyn Storage>,
    /// What to start from.
    pub restore: RestoreMode,
    /// Whether state may be dropped that no operator of the graph takes.
    pub allow_dropped_state: bool,
    /// Who runs it, for the log's readers: `host:pid`.
    pub holder: String,
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
    pub progress: ProgressView,
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
    fn failed(error: Error) -> Self {
        match error.disposition() {
            Disposition::Fenced => Self::Fenced(error),
            Disposition::Retry | Disposition::Abort | Disposition::Corrupt => Self::Failed(error),
        }
    }
}

/// Runs a job to its end, until `stop` turns true, or until it fails. Needs a multi-threaded tokio runtime around it.
///
/// # Errors
/// See [`RunError`].
pub async fn run(
    spec: RunSpec,
    env: Env,
    stop: watch::Receiver<bool>,
    progress: Arc<Progress>,
) -> Result<Summary, RunError> {
    coordinator::run(spec, env, stop, progress).await
}
