//! The contract of a source: splits that can be read from a position.

use std::{sync::Arc, time::Duration};

use arrow::record_batch::RecordBatch;
use floodmark_snapshot::{Epoch, Result, SplitState, TimestampMs};

use crate::SubtaskContext;

/// What a poll brought.
#[derive(Debug)]
pub enum Polled {
    /// Rows of one split, in its order. `split` indexes the splits that [`SourceFactory::open`] was given.
    Batch {
        /// Index of the split.
        split: usize,
        /// The rows, in the schema that the source was made for. May be empty: progress without rows (all were skipped).
        rows: RecordBatch,
    },
    /// A bounded split has been read to its end: it holds no watermark back any more.
    SplitFinished {
        /// Index of the split.
        split: usize,
    },
    /// Nothing for now.
    Pending,
    /// All splits of this subtask are finished; there will be no more. Also for a subtask without splits of a bounded source.
    Exhausted,
}

/// Reads the splits of one subtask.
pub trait Source: Send {
    /// Brings the next rows; waits at most `wait` for them. Sources that have rows at once never wait.
    fn poll(&mut self, wait: Duration) -> Result<Polled>;

    /// A barrier is about to pass: makes durable what was put aside (dead letters) of everything returned so far.
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    /// Where each split of this subtask stands, silent and finished ones included: everything that `poll` has returned is
    /// before the position, nothing else is. `watermark` may be left `None`: the task fills it in. The splits that `open` was
    /// given come first, in their order; those that the source has found since follow.
    fn positions(&self) -> Result<Vec<SplitState>>;

    /// Checkpoint `epoch`, which held these positions, is complete: for monitoring only (a consumer group's offsets).
    fn on_completed(&mut self, epoch: Epoch, positions: &[SplitState]) -> Result<()> {
        let _ = (epoch, positions);
        Ok(())
    }
}

/// Makes the sources of a table, one per subtask.
pub trait SourceFactory: Send + Sync {
    /// `kafka source`, `files source`, …
    fn kind(&self) -> String;

    /// Whether the input ends.
    fn bounded(&self) -> bool;

    /// Looks up the splits as they are now, each with the position where a job without state begins, resolved to something
    /// that does not move (an offset, never "latest"). Blocking; bounded in time; its errors name the topic, path or broker.
    ///
    /// `restored` are the splits that a snapshot holds: connectors decide what a split means that is new, or gone, since.
    /// The answer lists every split to read, with the restored position where there is one.
    fn splits(&self, restored: &[SplitState]) -> Result<Vec<SplitState>>;

    /// Opens a reader for a subtask's share of the splits (may be empty).
    fn open(&self, splits: Vec<SplitState>, context: &SubtaskContext) -> Result<Box<dyn Source>>;
}

/// Tells the event time of a batch of source rows: the greatest value of the watermark expression, `None` if all are null.
pub type EventTime = Arc<dyn Fn(&RecordBatch) -> Result<Option<TimestampMs>> + Send + Sync>;

/// Turns the rows that a connector reads into the table's rows: computed columns. Stateless.
pub type Compute = Arc<dyn Fn(RecordBatch) -> Result<RecordBatch> + Send + Sync>;

/// How a source's watermarks come about.
#[derive(Clone)]
pub struct WatermarkSpec {
    /// The watermark that a batch of (computed) rows stands for.
    pub event_time: EventTime,
    /// A split that brings nothing for this long holds the watermark back no more; `None` waits for ever.
    pub idle_timeout: Option<Duration>,
}

/// A source as it stands at the head of a task's chain.
#[derive(Clone)]
pub struct SourceNode {
    /// Makes the readers.
    pub factory: Arc<dyn SourceFactory>,
    /// Computed columns, if the table has any.
    pub compute: Option<Compute>,
    /// Watermarks, if the table has them.
    pub watermark: Option<WatermarkSpec>,
}
