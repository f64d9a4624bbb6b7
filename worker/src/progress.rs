//! What a running job shows of itself: counters per operator and the last checkpoint. Written by the coordinator's shell and
//! the tasks, read by whoever displays it; no decision rests on it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use floodmark_dataflow::{JobGraph, Node, OperatorMetrics, TaskId, Vertex, metrics::read};
use floodmark_snapshot::{Epoch, OperatorUid, TimestampMs};
use serde::{Deserialize, Serialize};

use crate::words::{SubtaskId, WorkerId};

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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
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

/// The counters of the subtasks that run in this process, and what others have told of theirs.
#[derive(Default)]
pub(crate) struct Counters {
    here: Mutex<Vec<OperatorEntry>>,
    /// What each other worker said last. Those that are gone have counted, too.
    elsewhere: Mutex<BTreeMap<WorkerId, Vec<OperatorStatus>>>,
}

/// Counters by task, then by its node, then by subtask.
pub(crate) type Metrics = Vec<Vec<Vec<Arc<OperatorMetrics>>>>;

struct OperatorEntry {
    /// What earlier attempts have counted.
    before: OperatorStatus,
    /// Those of the present attempt that run here.
    subtasks: Vec<Arc<OperatorMetrics>>,
}

impl Counters {
    /// Makes the counters of an attempt, which go on from those of the attempts before. `here` tells the subtasks that run in
    /// this process.
    pub(crate) fn begin(&self, graph: &JobGraph, parallelism: u32, here: impl Fn(SubtaskId) -> bool) -> Metrics {
        let mut before = self.here();
        let mut entries = self.lock();
        entries.clear();
        let mut of_node = |task: TaskId, node: &Node| {
            let all: Vec<_> =
                (0..graph.width(task, parallelism)).map(|_| Arc::new(OperatorMetrics::default())).collect();
            let mine = all.iter().zip(0..).filter(|(_, index)| here(SubtaskId { task, index: *index }));
            let subtasks = mine.map(|(metrics, _)| metrics.clone()).collect();
            let known = before.iter().position(|b| b.uid == node.uid).map(|at| before.swap_remove(at));
            let before = known.unwrap_or_else(|| OperatorStatus::new(&node.uid, &node.kind));
            let before = OperatorStatus { state_rows: 0, watermark: None, ..before };
            entries.push(OperatorEntry { before, subtasks });
            all
        };
        let of_task = |(t, vertex): (usize, &Vertex)| vertex.chain.iter().map(|n| of_node(TaskId(t), n)).collect();
        graph.vertices.iter().enumerate().map(of_task).collect()
    }

    /// What has been counted in this process, by operator in the order of the graph.
    pub(crate) fn here(&self) -> Vec<OperatorStatus> {
        self.lock().iter().map(OperatorEntry::status).collect()
    }

    /// What another worker has counted.
    pub(crate) fn told(&self, worker: WorkerId, counted: Vec<OperatorStatus>) {
        self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner).insert(worker, counted);
    }

    /// What has been counted everywhere.
    fn view(&self) -> Vec<OperatorStatus> {
        let mut all = self.here();
        for counted in self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner).values() {
            for theirs in counted {
                match all.iter_mut().find(|ours| ours.uid == theirs.uid) {
                    Some(ours) => ours.add(theirs),
                    None => all.push(theirs.clone()),
                }
            }
        }
        all
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OperatorEntry>> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OperatorEntry {
    fn status(&self) -> OperatorStatus {
        let mut status = self.before.clone();
        for metrics in &self.subtasks {
            status.rows_in += read(&metrics.rows_in);
            status.rows_out += read(&metrics.rows_out);
            status.bytes += read(&metrics.bytes);
            status.late += read(&metrics.late);
            status.bad += read(&metrics.bad);
            status.state_rows += read(&metrics.state_rows);
        }
        let watermark = self.subtasks.iter().map(|m| m.watermark.load(Ordering::Relaxed)).min();
        OperatorStatus { watermark: watermark.filter(|w| *w != i64::MIN), ..status }
    }
}

impl OperatorStatus {
    /// Adds what another worker has counted for the same operator.
    fn add(&mut self, other: &Self) {
        self.rows_in += other.rows_in;
        self.rows_out += other.rows_out;
        self.bytes += other.bytes;
        self.late += other.late;
        self.bad += other.bad;
        self.state_rows += other.state_rows;
        self.watermark = [self.watermark, other.watermark].into_iter().flatten().min();
    }

    /// Of an operator that has done nothing.
    fn new(uid: &OperatorUid, kind: &str) -> Self {
        Self {
            uid: uid.clone(),
            kind: kind.to_owned(),
            rows_in: 0,
            rows_out: 0,
            bytes: 0,
            late: 0,
            bad: 0,
            state_rows: 0,
            watermark: None,
        }
    }
}

struct State {
    phase: JobPhase,
    restored_from: Option<Epoch>,
    checkpoints: CheckpointCounts,
}

/// The job's progress, shared between who runs it and a display.
pub struct Progress {
    state: Mutex<State>,
    /// Of the subtasks in this process.
    pub(crate) counters: Arc<Counters>,
}

impl Default for Progress {
    fn default() -> Self {
        let (phase, checkpoints) = (JobPhase::Restoring, CheckpointCounts::default());
        let state = State { phase, restored_from: None, checkpoints };
        Self { state: Mutex::new(state), counters: Arc::default() }
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
            operators: self.counters.view(),
        }
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
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
