//! How others steer a running job: ask it to stop, or for savepoints.

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

/// Where a job listens.
pub struct Controls {
    /// Turns true when the job shall stop with a last checkpoint.
    pub stop: watch::Receiver<bool>,
    /// Savepoints asked for.
    pub savepoints: mpsc::Receiver<SavepointRequest>,
}

impl Controls {
    /// Controls, and what steers them.
    #[must_use]
    pub fn new(stop: watch::Receiver<bool>) -> (Self, mpsc::Sender<SavepointRequest>) {
        let (sender, savepoints) = mpsc::channel(REQUESTS_MAX);
        (Self { stop, savepoints }, sender)
    }
}

/// Only a stop can be asked for.
impl From<watch::Receiver<bool>> for Controls {
    fn from(stop: watch::Receiver<bool>) -> Self {
        Self::new(stop).0
    }
}
