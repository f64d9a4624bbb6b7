//! The seam to what is outside of the cluster's API: coordinators of jobs, and the storage that jobs keep their snapshots in.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use floodmark_crds::StreamJob;
use floodmark_snapshot::storage::Credentials;
use serde_json::Value as Json;

use crate::lifecycle::Answer;

/// A storage, and what it is reached with. Does not show that.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// `spec.checkpoints.storage`; none: jobs keep what they have in their pods.
    pub location: Option<String>,
    /// The job's; none if it names none.
    pub credentials: Option<Credentials>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("location", &self.location).finish_non_exhaustive()
    }
}

/// A savepoint that is in storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavepointFound {
    /// For `spec.restore.from`.
    pub location: String,
    /// The checkpoint that it is a copy of.
    pub epoch: u64,
    /// Bytes.
    pub size: u64,
    /// When it was complete, milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

/// An order to the coordinator of a job.
#[derive(Clone, PartialEq)]
pub struct Order {
    /// Where it answers: `host:port`.
    pub to: String,
    /// What lets it obey.
    pub token: String,
    /// `/stop`, `/rescale` or `/savepoints`.
    pub path: &'static str,
    /// The order's fields.
    pub body: Json,
    /// How long it may take.
    pub within: Duration,
}

impl fmt::Debug for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { to, path, body, within, .. } = self;
        f.debug_struct("Order")
            .field("to", to)
            .field("path", path)
            .field("body", body)
            .field("within", within)
            .finish_non_exhaustive()
    }
}

/// What comes of an order.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// It is carried out.
    Done(Json),
    /// The job refuses, and says why.
    Refused(String),
    /// Nobody knows whether it is, or will be: why.
    Lost(String),
}

/// What a removal has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removed {
    /// Nothing is left.
    All,
    /// This process can't reach it, and will not: why.
    OutOfReach(String),
    /// It can't be removed unless somebody changes something: why.
    Refused(String),
    /// There is more, or the storage does not answer: ask again.
    NotYet(String),
}

/// See the header of this file.
#[async_trait]
pub trait Outside: Send + Sync {
    /// Whether a job can be planned, and started from these words: `latest`, `none`, the name of a savepoint, the number of a
    /// checkpoint, or a location.
    async fn fits(&self, job: &StreamJob, restore: &str, access: &Access) -> Answer;

    /// Looks up a savepoint of a job by its name in storage.
    ///
    /// # Errors
    /// When nobody can say whether there is one, for people.
    async fn savepoint(&self, job: &StreamJob, name: &str, access: &Access) -> Result<Option<SavepointFound>, String>;

    /// Removes the job's checkpoints, but not its savepoints. Bounded: what is left is removed by the next call.
    async fn remove_state(&self, job: &StreamJob, access: &Access) -> Removed;

    /// Removes a savepoint. Bounded, as above.
    async fn remove_savepoint(&self, job: &StreamJob, name: &str, access: &Access) -> Removed;

    /// Gives an order to the coordinator of a job.
    async fn order(&self, order: Order) -> Reply;
}
