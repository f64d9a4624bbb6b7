//! The snapshot protocol: what a consistent image of a job is, how one comes about, and how a job starts from one.
//!
//! The protocols in here ([`coordination`], [`alignment`], [`commit`], and the fold of the checkpoint [`log`]) are pure
//! state machines: events and the time go in, decisions come out. Input and output happen in thin shells around
//! [`storage::Storage`]. Nothing in this crate knows Arrow, SQL, Kafka or threads.
//!
//! Invariant of the crate: a checkpoint is used only if its log entry is durable and every shard that the entry names is
//! intact; nothing that a retained checkpoint names is ever deleted.

pub mod alignment;
pub mod block;
pub mod commit;
pub mod coordination;
pub mod env;
pub mod error;
pub mod ids;
pub mod log;
pub mod manifest;
pub mod restore;
pub mod retention;
pub mod runtime;
pub mod savepoint;
pub mod schema;
pub mod sealed;
pub mod storage;
pub mod work_folder;

pub use env::{Clock, Env, Ids, Probe, Step};
pub use error::{Context, Disposition, Error, Result};
pub use ids::{Attempt, Epoch, Generation, JobId, KeyGroup, KeyGroupRange, OperatorUid, TimestampMs};
pub use manifest::{Manifest, OperatorSnapshot, Shard, ShardKind, SplitState};
pub use schema::{StateColumn, StateSchema};
pub use work_folder::WorkFolder;
