//! What a running job shows of itself: counters per operator and the last checkpoint. Written by the coordinator's shell and
//! the tasks, read by whoever displays it; no decision rests on it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering};

use floodmark_dataflow::{OperatorMetrics, metrics::read};
use floodmark_snapshot::{Epoch, OperatorUid, TimestampMs};

/// Where a job's life stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobPhase {
    /// Reading the checkpoint log and the newest intact checkpoint.
    Restoring,
    /// Tasks run.
    Running,
    /// The last checkpoint is under way; sources have stopped.
    Stopping,
    /// All done.
    Done,
}

/// A completed checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointStatus {
    /// Its number.
    pub epoch: Epoch,
    /// Wall-clock time of its trigger, milliseconds since the Unix epoch.
    pub triggered_at_ms: i64,
    /// From the trigger to the last acknowledgement, milliseconds.
    pub duration_ms: u64,
    /// Bytes of all its shards.
    pub size: u64,
}

/// Checkpoints of this run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointCounts {
    /// Completed.
    pub completed: u64,
    /// Failed or timed out.
    pub failed: u64,
    /// Given up because a later one was complete before them: nothing is wrong with that.
    pub overtaken: u64,
    /// The newest completed one.
    pub last: Option<CheckpointStatus>,
}

/// Counters of one operator, summed over its subtasks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperatorStatus {
    /// Stable identity: `source:bid`, `sink:hot_items`, `hot_items/window-aggregate-1`.
    pub uid: OperatorUid,
    /// `kafka source`, `window aggregate`, …
    pub kind: String,
    /// Rows in, out; bytes read or written; late rows; bad records.
    pub rows_in: u64,
    /// Rows that left the operator (for a sink: rows written).
    pub rows_out: u64,
    /// Encoded bytes read or written.
    pub bytes: u64,
    /// Rows that came after their window had closed.
    pub late: u64,
    /// Records that could not be decoded.
    pub bad: u64,
    /// Keys in state.
    pub state_rows: u64,
    /// The least watermark of its subtasks; `None` before the first.
    pub watermark: Option<TimestampMs>,
}

/// A moment's view of a job.
#[derive(Clone, Debug)]
pub struct ProgressView {
    /// Where its life stands.
    pub phase: JobPhase,
    /// The checkpoint that it started from.
    pub restored_from: Option<Epoch>,
    /// Its checkpoints.
    pub checkpoints: CheckpointCounts,
    /// Its operators, in the order of the graph.
    pub operators: Vec<OperatorStatus>,
}

struct OperatorEntry {
    uid: OperatorUid,
    kind: String,
    subtasks: Vec<Arc<OperatorMetrics>>,
}

struct State {
    phase: JobPhase,
    restored_from: Option<Epoch>,
    checkpoints: CheckpointCounts,
    operators: Vec<OperatorEntry>,
}

/// The job's progress, shared between the worker and a display.
pub struct Progress(Mutex<State>);

impl Default for Progress {
    fn default() -> Self {
        Self(Mutex::new(State {
            phase: JobPhase::Restoring,
            restored_from: None,
            checkpoints: CheckpointCounts::default(),
            operators: Vec::new(),
        }))
    }
}

impl Progress {
    /// The job as it is now.
    #[must_use]
    pub fn view(&self) -> ProgressView {
        let state = self.lock();
        ProgressView {
            phase: state.phase,
            restored_from: state.restored_from,
            checkpoints: state.checkpoints,
            operators: state.operators.iter().map(OperatorEntry::status).collect(),
        }
    }

    /// Registers an operator and makes the counters of its subtasks.
    pub(crate) fn register(&self, uid: &OperatorUid, kind: &str, subtasks: u32) -> Vec<Arc<OperatorMetrics>> {
        let subtasks: Vec<_> = (0..subtasks).map(|_| Arc::new(OperatorMetrics::default())).collect();
        let entry = OperatorEntry { uid: uid.clone(), kind: kind.to_owned(), subtasks: subtasks.clone() };
        self.lock().operators.push(entry);
        subtasks
    }

    pub(crate) fn phase(&self, phase: JobPhase) {
        self.lock().phase = phase;
    }

    pub(crate) fn restored_from(&self, epoch: Epoch) {
        self.lock().restored_from = Some(epoch);
    }

    pub(crate) fn completed(&self, checkpoint: CheckpointStatus) {
        let counts = &mut self.lock().checkpoints;
        counts.completed += 1;
        counts.last = Some(checkpoint);
    }

    pub(crate) fn failed(&self) {
        self.lock().checkpoints.failed += 1;
    }

    pub(crate) fn overtaken(&self) {
        self.lock().checkpoints.overtaken += 1;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OperatorEntry {
    fn status(&self) -> OperatorStatus {
        let sum = |f: fn(&OperatorMetrics) -> u64| self.subtasks.iter().map(|m| f(m)).sum();
        let watermark = self.subtasks.iter().map(|m| m.watermark.load(Ordering::Relaxed)).min();
        OperatorStatus {
            uid: self.uid.clone(),
            kind: self.kind.clone(),
            rows_in: sum(|m| read(&m.rows_in)),
            rows_out: sum(|m| read(&m.rows_out)),
            bytes: sum(|m| read(&m.bytes)),
            late: sum(|m| read(&m.late)),
            bad: sum(|m| read(&m.bad)),
            state_rows: sum(|m| read(&m.state_rows)),
            watermark: watermark.filter(|w| *w != i64::MIN),
        }
    }
}
