//! The contract of a sink that takes part in the commit: records are staged into the snapshot, and made visible after it.
//!
//! A sink's *operator* sits at the end of a chain. At a barrier it hands the records since the last one over as a shard of
//! kind [`ShardKind::Staged`](floodmark_snapshot::ShardKind::Staged) (its `encode` must give the same [`Bytes`] that the
//! committer understands). When the checkpoint is complete the worker gives those bytes to the sink's [`Committer`], on a
//! thread of its own. At a restore, the staged shards of the manifest go to the committer of the subtask that staged them.
//! Sinks without a committer write in `process`, and make it durable in `flush`: at-least-once.

use std::sync::Arc;

use bytes::Bytes;
use floodmark_snapshot::{Epoch, Result, Step};

use crate::{Operator, SubtaskContext};

/// Makes staged records visible, exactly once. Calls block; each is bounded in time.
///
/// After an error with disposition `Retry` the worker calls [`Committer::open`] again, then repeats what was under way.
pub trait Committer: Send {
    /// Takes over the identity of this sink's subtask: fences every earlier holder and aborts what it left open. Then tells
    /// the epoch up to which everything staged is visible already; `None` if none ever was, or if it can't be known because
    /// [`Committer::commit`] is idempotent anyway.
    fn open(&mut self) -> Result<Option<Epoch>>;

    /// Makes all of `staged` (in this order) visible, at once and together with the marker `epoch`. Calls `step` at
    /// [`Step::BeforeTransaction`], [`Step::InTransaction`] and [`Step::AfterTransaction`].
    fn commit(&mut self, epoch: Epoch, staged: &[Bytes], step: &dyn Fn(Step)) -> Result<()>;
}

/// Makes the operators and committers of a sink.
pub trait SinkFactory: Send + Sync {
    /// `kafka sink`, `files sink`, …
    fn kind(&self) -> String;

    /// Checks, before anything runs, that the sink can be written to: topic there, path writable. Blocking; bounded in time.
    fn check(&self) -> Result<()>;

    /// The operator that takes the rows.
    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>>;

    /// The committer of subtask `index`, or `None` for a sink that writes as it goes. `index` may be past the present
    /// parallelism: what an earlier, wider attempt staged is committed under its own identity.
    ///
    /// `history` names the checkpoint log that the epochs belong to. A marker of another history (the user has removed the
    /// job's storage, and epochs count from 1 again) counts for nothing.
    fn committer(&self, index: u32, history: &str) -> Result<Option<Box<dyn Committer>>>;

    /// Up to which epoch the output is visible that subtask `index` of this sink has staged in another job, whose checkpoint
    /// log is `history`; `None` if none of it is, or nothing is ever staged. A job that takes over a checkpoint of that one
    /// asks: what the other has made visible, and did not live to say in its log, must not be written again. Changes nothing.
    /// Blocking; bounded in time.
    fn visible(&self, index: u32, history: &str) -> Result<Option<Epoch>>;
}

/// A sink as it stands at the end of a task's chain.
pub type SinkNode = Arc<dyn SinkFactory>;
