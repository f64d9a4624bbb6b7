//! What operators have counted and what tasks spend their time on: in this process, and as other workers tell it.
//!
//! Counts go on from attempt to attempt; what is of the moment (state, watermarks, shares) is of the present attempt only.
//! Invariant: what a worker has counted is added once, also after it is lost.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use floodmark_dataflow::{
    JobGraph, Node, OperatorMetrics, TaskId, Vertex,
    metrics::{TaskMetrics, Times, read},
};
use floodmark_snapshot::{OperatorUid, TimestampMs};
use serde::{Deserialize, Serialize};

use super::WorkerPhase;
use crate::words::{SubtaskId, WorkerId};

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
    /// Keys in state, at the last barrier.
    pub state_rows: u64,
    /// Bytes of state, at the last barrier.
    pub state_bytes: u64,
    /// The least watermark of its subtasks; `None` before the first.
    pub watermark: Option<TimestampMs>,
}

/// What parts of a task's time go to; together 1, or all 0 before any time has passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shares {
    /// It works.
    pub busy: f64,
    /// It waits for input.
    pub idle: f64,
    /// It waits for room in an output.
    pub back_pressured: f64,
}

/// What one task spends its time on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TaskStatus {
    /// Which.
    pub task: TaskIndex,
    /// Subtasks of it that run.
    pub subtasks: u32,
    /// What the time of all its subtasks has gone to, earlier attempts included.
    pub spent: Times,
    /// What it goes to lately ([`SHARES_OVER`](floodmark_dataflow::metrics::SHARES_OVER)): the mean over the subtasks that run.
    pub lately: Shares,
}

/// Index of a task in its graph.
pub type TaskIndex = usize;

/// All that is counted, somewhere.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counted {
    /// In the order of the graph, as far as it is known here.
    pub(crate) operators: Vec<OperatorStatus>,
    /// By their index.
    pub(crate) tasks: Vec<TaskStatus>,
}

/// The counters of the subtasks that run in this process, and what others have told of theirs.
#[derive(Default)]
pub(crate) struct Counters {
    here: Mutex<Here>,
    /// What each other worker said last. Those that are gone have counted, too.
    elsewhere: Mutex<BTreeMap<WorkerId, Counted>>,
}

/// Counters by task, then by its node, then by subtask.
pub(crate) type Metrics = Vec<Vec<Vec<Arc<OperatorMetrics>>>>;

#[derive(Default)]
struct Here {
    phase: WorkerPhase,
    operators: Vec<OperatorEntry>,
    tasks: Vec<TaskEntry>,
}

struct OperatorEntry {
    /// What earlier attempts have counted.
    before: OperatorStatus,
    /// Those of the present attempt that run here.
    subtasks: Vec<Arc<OperatorMetrics>>,
}

#[derive(Default)]
struct TaskEntry {
    before: Times,
    subtasks: Vec<Arc<TaskMetrics>>,
}

impl Counters {
    /// Makes the counters of an attempt, which go on from those of the attempts before. `here` tells the subtasks that run in
    /// this process.
    pub(crate) fn begin(&self, graph: &JobGraph, parallelism: u32, here: impl Fn(SubtaskId) -> bool) -> Metrics {
        let mut this = self.lock();
        this.end();
        let mut before = std::mem::take(&mut this.operators);
        let mut of_node = |task: TaskId, node: &Node| {
            let all: Vec<_> =
                (0..graph.width(task, parallelism)).map(|_| Arc::new(OperatorMetrics::default())).collect();
            let mine = all.iter().zip(0..).filter(|(_, index)| here(SubtaskId { task, index: *index }));
            let subtasks = mine.map(|(metrics, _)| metrics.clone()).collect();
            let known = before.iter().position(|b| b.before.uid == node.uid).map(|at| before.swap_remove(at).before);
            let before = known.unwrap_or_else(|| OperatorStatus::new(&node.uid, &node.kind));
            this.operators.push(OperatorEntry { before, subtasks });
            all
        };
        let of_task = |(t, vertex): (usize, &Vertex)| vertex.chain.iter().map(|n| of_node(TaskId(t), n)).collect();
        graph.vertices.iter().enumerate().map(of_task).collect()
    }

    /// A subtask of the attempt is there, and this is what it spends its time on.
    pub(crate) fn runs(&self, id: SubtaskId, metrics: Arc<TaskMetrics>) {
        let tasks = &mut self.lock().tasks;
        if tasks.len() <= id.task.0 {
            tasks.resize_with(id.task.0 + 1, TaskEntry::default);
        }
        tasks[id.task.0].subtasks.push(metrics);
    }

    /// Nothing of the attempt runs here any more: what it has counted stays.
    pub(crate) fn end(&self) {
        self.lock().end();
    }

    /// Forgets what was counted here: it was told to a coordinator that is lost, and may have added it up.
    pub(crate) fn reset(&self) {
        *self.lock() = Here::default();
    }

    /// How far this process is as a worker.
    pub(crate) fn enter(&self, phase: WorkerPhase) {
        self.lock().phase = phase;
    }

    /// See [`Counters::enter`].
    pub(crate) fn phase(&self) -> WorkerPhase {
        self.lock().phase
    }

    /// What has been counted in this process.
    pub(crate) fn here(&self) -> Counted {
        let here = self.lock();
        Counted {
            operators: here.operators.iter().map(OperatorEntry::status).collect(),
            tasks: here.tasks.iter().enumerate().map(|(task, entry)| entry.status(task)).collect(),
        }
    }

    /// What another worker has counted.
    pub(crate) fn told(&self, worker: WorkerId, counted: Counted) {
        self.lock_elsewhere().insert(worker, counted);
    }

    /// Another worker is gone. What it has counted stays.
    pub(crate) fn lost(&self, worker: WorkerId) {
        if let Some(counted) = self.lock_elsewhere().get_mut(&worker) {
            counted.operators.iter_mut().for_each(OperatorStatus::end);
            counted.tasks.iter_mut().for_each(TaskStatus::end);
        }
    }

    /// What has been counted everywhere.
    pub(super) fn view(&self) -> Counted {
        let mut all = self.here();
        for counted in self.lock_elsewhere().values() {
            all.add(counted);
        }
        all
    }

    fn lock(&self) -> MutexGuard<'_, Here> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_elsewhere(&self) -> MutexGuard<'_, BTreeMap<WorkerId, Counted>> {
        self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Here {
    fn end(&mut self) {
        for operator in &mut self.operators {
            operator.before = operator.status();
            operator.before.end();
            operator.subtasks.clear();
        }
        for task in &mut self.tasks {
            task.before = task.status(0).spent;
            task.subtasks.clear();
        }
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
            status.state_bytes += read(&metrics.state_bytes);
        }
        let watermark = self.subtasks.iter().map(|m| m.watermark.load(Ordering::Relaxed)).min();
        OperatorStatus { watermark: watermark.filter(|w| *w != i64::MIN), ..status }
    }
}

impl TaskEntry {
    fn status(&self, task: TaskIndex) -> TaskStatus {
        let mut status = TaskStatus { task, spent: self.before, ..TaskStatus::default() };
        for metrics in &self.subtasks {
            let (times, lately) = metrics.read();
            status.spent.add(&times);
            status.add_shares(1, &Shares::of(&lately));
        }
        status
    }
}

impl Shares {
    fn of(times: &Times) -> Self {
        let total = times.total().as_secs_f64();
        if total == 0.0 {
            return Self::default();
        }
        Self {
            busy: times.busy.as_secs_f64() / total,
            idle: times.idle.as_secs_f64() / total,
            back_pressured: times.back_pressured.as_secs_f64() / total,
        }
    }
}

impl TaskStatus {
    /// Subtasks that spend their time so, each, are added.
    fn add_shares(&mut self, subtasks: u32, lately: &Shares) {
        let (ours, theirs) = (f64::from(self.subtasks), f64::from(subtasks));
        if subtasks > 0 {
            let mean = |a: f64, b: f64| (a * ours + b * theirs) / (ours + theirs);
            self.lately.busy = mean(self.lately.busy, lately.busy);
            self.lately.idle = mean(self.lately.idle, lately.idle);
            self.lately.back_pressured = mean(self.lately.back_pressured, lately.back_pressured);
            self.subtasks += subtasks;
        }
    }

    /// What is of the moment is over.
    fn end(&mut self) {
        (self.subtasks, self.lately) = (0, Shares::default());
    }
}

impl OperatorStatus {
    /// Of an operator that has done nothing.
    #[must_use]
    pub fn new(uid: &OperatorUid, kind: &str) -> Self {
        Self {
            uid: uid.clone(),
            kind: kind.to_owned(),
            rows_in: 0,
            rows_out: 0,
            bytes: 0,
            late: 0,
            bad: 0,
            state_rows: 0,
            state_bytes: 0,
            watermark: None,
        }
    }

    /// Adds what another worker has counted for the same operator.
    fn add(&mut self, other: &Self) {
        self.rows_in += other.rows_in;
        self.rows_out += other.rows_out;
        self.bytes += other.bytes;
        self.late += other.late;
        self.bad += other.bad;
        self.state_rows += other.state_rows;
        self.state_bytes += other.state_bytes;
        self.watermark = [self.watermark, other.watermark].into_iter().flatten().min();
    }

    /// What is of the moment is over.
    fn end(&mut self) {
        (self.state_rows, self.state_bytes, self.watermark) = (0, 0, None);
    }
}

impl Counted {
    fn add(&mut self, other: &Self) {
        for theirs in &other.operators {
            match self.operators.iter_mut().find(|ours| ours.uid == theirs.uid) {
                Some(ours) => ours.add(theirs),
                None => self.operators.push(theirs.clone()),
            }
        }
        for theirs in &other.tasks {
            match self.tasks.iter_mut().find(|ours| ours.task == theirs.task) {
                Some(ours) => {
                    ours.spent.add(&theirs.spent);
                    ours.add_shares(theirs.subtasks, &theirs.lately);
                }
                None => self.tasks.push(*theirs),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn operator(rows_in: u64, state_rows: u64, watermark: Option<i64>) -> OperatorStatus {
        OperatorStatus { rows_in, state_rows, watermark, ..OperatorStatus::new(&"a".into(), "a") }
    }

    fn task(subtasks: u32, busy: f64, idle: f64, seconds: u64) -> TaskStatus {
        let spent = Times { busy: Duration::from_secs(seconds), ..Times::default() };
        let lately = Shares { busy, idle, back_pressured: 1.0 - busy - idle };
        TaskStatus { task: 3, subtasks, spent, lately }
    }

    #[test]
    fn workers_counts_are_summed_and_shares_are_means_over_subtasks() {
        let counters = Counters::default();
        let counted = |operator, task| Counted { operators: vec![operator], tasks: vec![task] };
        counters.told(WorkerId(1), counted(operator(5, 10, Some(70)), task(1, 1.0, 0.0, 9)));
        counters.told(WorkerId(2), counted(operator(6, 20, Some(60)), task(3, 0.0, 0.5, 1)));
        let all = counters.view();
        assert_eq!(all.operators, [operator(11, 30, Some(60))]);
        assert_eq!(all.tasks, [task(4, 0.25, 0.375, 10)]);
        counters.told(WorkerId(1), counted(operator(7, 10, Some(71)), task(1, 1.0, 0.0, 11)));
        counters.lost(WorkerId(2));
        let left = counters.view();
        assert_eq!(left.operators, [operator(13, 10, Some(71))], "what is lost has counted, but holds nothing back");
        assert_eq!(left.tasks, [task(1, 1.0, 0.0, 12)]);
        counters.lost(WorkerId(1));
        assert_eq!(counters.view().tasks[0].lately, Shares::default());
    }

    #[test]
    fn shares_add_up_to_one_once_time_has_passed() {
        assert_eq!(Shares::of(&Times::default()), Shares::default());
        let times = |busy, idle, back_pressured| Times {
            busy: Duration::from_millis(busy),
            idle: Duration::from_millis(idle),
            back_pressured: Duration::from_millis(back_pressured),
        };
        let mut status = TaskStatus::default();
        for lately in [times(1, 0, 0), times(1, 2, 3), times(7, 0, 90)] {
            status.add_shares(1, &Shares::of(&lately));
        }
        let Shares { busy, idle, back_pressured } = status.lately;
        assert!((busy + idle + back_pressured - 1.0).abs() < 1e-9, "{:?}", status.lately);
        assert!((idle - (2.0 / 6.0) / 3.0).abs() < 1e-9);
    }

    #[test]
    fn counts_go_on_from_attempt_to_attempt_and_end_with_their_coordinator() {
        let counters = Counters::default();
        let clock = floodmark_snapshot::Env::system().clock;
        let id = SubtaskId { task: TaskId(1), index: 0 };
        for attempt in 1..=3 {
            counters.begin(&JobGraph::default(), 1, |_| true);
            counters.runs(id, Arc::new(TaskMetrics::new(clock.clone())));
            while counters.here().tasks[1].spent.idle < Duration::from_millis(attempt) {}
            assert_eq!(counters.here().tasks.iter().map(|t| t.subtasks).collect::<Vec<_>>(), [0, 1]);
            counters.end();
            let left = counters.here().tasks[1];
            assert!(left.subtasks == 0 && left.spent.idle >= Duration::from_millis(attempt));
        }
        counters.reset();
        assert_eq!(counters.here(), Counted::default());
    }
}
