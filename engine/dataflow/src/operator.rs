//! The contract of an operator: synchronous, batch-wise, and unaware of threads, channels and the network.

use std::{sync::Arc, time::Duration};

use floodmark_snapshot::{Env, Epoch, KeyGroup, KeyGroupRange, Result, TimestampMs};
pub use floodmark_state::{Encode, PendingShard, RestoredShard, StateSettings, StateSnapshot, Uploaded};
use floodmark_state::{KeyedState, Layout, StateSpec};

use crate::{Barrier, Batch, OperatorMetrics};

/// Index of an operator's input: 0 for one input; 0 and 1 for the left and right side of a join.
pub type Port = usize;

/// Where an operator puts the batches that it emits, in order. Empty batches are dropped.
#[derive(Debug, Default)]
pub struct Output {
    batches: Vec<Batch>,
}

impl Output {
    /// Emits a batch downstream.
    pub fn emit(&mut self, batch: Batch) {
        if !batch.is_empty() {
            self.batches.push(batch);
        }
    }

    /// Takes what has been emitted so far.
    pub fn take(&mut self) -> Vec<Batch> {
        std::mem::take(&mut self.batches)
    }
}

/// One operator of one subtask.
///
/// Calls come from one thread at a time, in the order of the stream. An error ends the attempt.
pub trait Operator: Send {
    /// Takes a batch of input `port` (never empty).
    fn process(&mut self, port: Port, batch: Batch, out: &mut Output) -> Result<()>;

    /// Event time has reached `watermark` on all inputs (strictly growing). The watermark itself travels on behind what is
    /// emitted here.
    fn on_watermark(&mut self, watermark: TimestampMs, out: &mut Output) -> Result<()> {
        let _ = (watermark, out);
        Ok(())
    }

    /// The barrier of `epoch` is about to pass: emit whatever must be downstream before it (a pre-shuffle aggregate's
    /// buffer, for one). Also called before the stream's end.
    fn flush(&mut self, out: &mut Output) -> Result<()> {
        let _ = out;
        Ok(())
    }

    /// The synchronous part of a snapshot: clone pointers, not data. Encoding happens later, off this thread, in
    /// [`PendingShard::encode`]. `flush` has run just before. If the barrier asks for a whole snapshot, nothing may be reused,
    /// and keyed state comes as [`floodmark_snapshot::ShardKind::Keyed`].
    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        let _ = barrier;
        Ok(StateSnapshot::default())
    }

    /// Takes over state before the first batch, a few shards at a time. They are the shards of this operator uid that concern
    /// this subtask (rows outside of its key groups must be ignored), from any earlier parallelism; those of one earlier
    /// subtask come in the order of their layers. [`Operator::restored`] follows.
    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        let _ = shards;
        Ok(())
    }

    /// Whether rows may come when only the state of their key groups is there: then [`Operator::restore`] gets all that there
    /// is of some key groups (cuts of the shards), then [`Operator::arrived`] is called, then rows of these and earlier key
    /// groups may come, then the next key groups, and in the end [`Operator::restored`]. Until then come no watermark, barrier
    /// or flush.
    fn restores_by_key_group(&self) -> bool {
        false
    }

    /// The state of some key groups has been handed over. See [`Operator::restores_by_key_group`].
    fn arrived(&mut self) -> Result<()> {
        Ok(())
    }

    /// All state has been handed to [`Operator::restore`]. Called before the first batch if there was any.
    fn restored(&mut self) -> Result<()> {
        Ok(())
    }

    /// Checkpoint `epoch` is complete and durable.
    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        let _ = epoch;
        Ok(())
    }

    /// Checkpoint `epoch` has been given up: what it uploaded is deleted, and nothing may name it again.
    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        let _ = epoch;
        Ok(())
    }

    /// State kept at present: (rows, bytes), for metrics.
    fn state_size(&self) -> (u64, u64) {
        (0, 0)
    }
}

/// What an operator learns about its place when it is made.
#[derive(Clone)]
pub struct SubtaskContext {
    /// This subtask's index, `0..parallelism`.
    pub index: u32,
    /// Number of subtasks of the task.
    pub parallelism: u32,
    /// Number of key groups.
    pub max_parallelism: u16,
    /// The key groups that this subtask owns.
    pub key_groups: KeyGroupRange,
    /// This operator's counters.
    pub metrics: Arc<OperatorMetrics>,
    /// How keyed state is kept.
    pub state: StateSettings,
    /// Time, names, probe.
    pub env: Env,
}

impl SubtaskContext {
    /// Empty keyed state of this subtask: `name` tells the states of one operator apart, and is empty if there is one only. Rows
    /// that nothing has been written to for `ttl` go.
    ///
    /// # Errors
    /// When the back end can't be set up.
    pub fn keyed(&self, name: &str, layout: Arc<dyn Layout>, ttl: Option<Duration>) -> Result<Box<dyn KeyedState>> {
        self.state.backend.keyed(StateSpec {
            name: name.to_owned(),
            layout,
            subtask: self.index,
            key_groups: self.key_groups,
            max_parallelism: self.max_parallelism,
            ttl,
            reuse_restored: self.state.reuse_restored,
            env: self.env.clone(),
        })
    }

    /// Whether the key with this hash is this subtask's.
    #[must_use]
    pub fn owns(&self, hash: u64) -> bool {
        self.key_groups.contains(KeyGroup::of(hash, self.max_parallelism))
    }
}

/// Makes the operators of a node, one per subtask.
pub trait OperatorFactory: Send + Sync {
    /// A new operator for this subtask, with empty state.
    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>>;
}

impl<F> OperatorFactory for F
where
    F: Fn(&SubtaskContext) -> Result<Box<dyn Operator>> + Send + Sync,
{
    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        self(context)
    }
}
