//! What is known of a job before anything of it runs: what it does, whether the state that it is to start from fits, and what of
//! it is in storage. The command line asks as well as the controller in a cluster.
//!
//! [`planned`] makes a dataflow of a manifest; [`history`] reads what a job has left in storage; [`state`] holds one against the
//! other; [`savepoints`] and [`removal`] look after what outlives a job's processes.
//!
//! Boundary: reads storage, and deletes there what it is told to. Never runs a job, connects to a source or sink, or reads the
//! clock. Invariant: what somebody must mend (a refusal) is never taken for what may mend itself (a storage that can't be read).

pub mod history;
pub mod planned;
pub mod removal;
pub mod savepoints;
pub mod state;

use floodmark_snapshot::{Disposition, Error};

pub use self::{
    history::{Checkpoint, History},
    planned::{PlanError, Planned, job_id},
    removal::{Extent, Removal, remove_job},
    savepoints::{SavepointInfo, remove_savepoint, savepoint},
    state::{Refusal, Start, Verdict, Wanted, check_state, check_state_at},
};

/// A storage that could not be read or written: nothing is known, and the same call may succeed later.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StorageError(pub Error);

impl StorageError {
    /// Whether it may go away by itself. Otherwise the location, the credentials or what they allow must change first.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        self.0.disposition() == Disposition::Retry
    }
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// It can't be done as it was asked for: why, and what to do.
    #[error("{0}")]
    Refused(String),
    /// The storage could not be read or written: try again.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl RequestError {
    /// An error of looking something up: what can't be read for now is the storage's, all else is wrong with what was asked for.
    fn of(error: Error) -> Self {
        match error.disposition() {
            Disposition::Retry => Self::Storage(StorageError(error)),
            Disposition::Abort | Disposition::Corrupt | Disposition::Fenced => Self::Refused(error.to_string()),
        }
    }
}

#[cfg(test)]
mod testing;
