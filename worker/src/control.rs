//! How others steer a running job: ask it to stop, for savepoints, or for another parallelism.

use floodmark_snapshot::{Epoch, coordination::BarrierKind};
use tokio::sync::{mpsc, oneshot, watch};

/// Requests that wait to be read, at most.
const REQUESTS_MAX: usize = 16;

/// Asks for a savepoint.
#[derive(Debug)]
pub struct SavepointRequest {
    /// Its name.
    pub name: String,
    /// What the job does behind its barrier.
    pub then: BarrierKind,
    /// Is told once: the savepoint, or why there is none.
    pub reply: oneshot::Sender<Result<SavepointMade, String>>,
}

/// A savepoint that is complete and durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavepointMade {
    /// Its folder, as it is given to a restore.
    pub location: String,
    /// The checkpoint that it is a copy of.
    pub epoch: Epoch,
    /// Bytes of its shards.
    pub size: u64,
}

/// Asks for another parallelism, with the job's processes kept.
#[derive(Debug)]
pub struct RescaleRequest {
    /// Subtasks per task from then on; at least 1 and at most the job's maximum.
    pub parallelism: u32,
    /// Is told once: what has been done, or why nothing has.
    pub reply: oneshot::Sender<Result<Rescaled, String>>,
}

/// A job that runs at another parallelism.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rescaled {
    /// Subtasks per task before.
    pub from: u32,
    /// Subtasks per task now.
    pub to: u32,
    /// The checkpoint that it went on from; `None` if nothing had to change.
    pub epoch: Option<Epoch>,
}

/// Where others ask. Closed once the job has ended.
#[derive(Clone, Debug)]
pub struct Requests {
    /// For savepoints.
    pub savepoints: mpsc::Sender<SavepointRequest>,
    /// For another parallelism.
    pub rescales: mpsc::Sender<RescaleRequest>,
}

/// Where a job listens.
pub struct Controls {
    /// Turns true when the job shall stop with a last checkpoint.
    pub stop: watch::Receiver<bool>,
    /// Savepoints asked for.
    pub savepoints: mpsc::Receiver<SavepointRequest>,
    /// Other parallelisms asked for.
    pub rescales: mpsc::Receiver<RescaleRequest>,
}

impl Controls {
    /// Controls, and what steers them.
    #[must_use]
    pub fn new(stop: watch::Receiver<bool>) -> (Self, Requests) {
        let (ask_savepoints, savepoints) = mpsc::channel(REQUESTS_MAX);
        let (ask_rescales, rescales) = mpsc::channel(REQUESTS_MAX);
        (Self { stop, savepoints, rescales }, Requests { savepoints: ask_savepoints, rescales: ask_rescales })
    }
}

/// Only a stop can be asked for.
impl From<watch::Receiver<bool>> for Controls {
    fn from(stop: watch::Receiver<bool>) -> Self {
        Self::new(stop).0
    }
}
