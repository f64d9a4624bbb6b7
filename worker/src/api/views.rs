//! What the interface speaks, in JSON: answers and orders. Pure data, made from a view of the job's progress.

use floodmark_dataflow::{Exchange, JobGraph, WATERMARK_MAX, graph::Parallelism};
use floodmark_snapshot::{Epoch, OperatorUid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    CheckpointRecord, CheckpointState, CheckpointStatus, OperatorStatus, ProgressView, TaskStatus, WorkerPhase,
};

/// The answer to `GET /job`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobView {
    /// `namespace/name/uid`.
    pub job: String,
    /// `restoring`, `running`, `stopping` or `done`.
    pub phase: String,
    /// Whether it runs and all its state is there.
    pub ready: bool,
    /// Who runs it: `host:pid`.
    pub holder: String,
    /// Subtasks per task.
    pub parallelism: u32,
    /// The greatest parallelism that it can be given: the number of its key groups.
    pub max_parallelism: u16,
    /// The number of the attempt that runs, or ran last; null before the first, and for jobs without snapshots.
    pub attempt: Option<u64>,
    /// Attempts of this process that have failed and were followed by another.
    pub restarts: u64,
    /// How the last of them failed.
    pub last_failure: Option<FailureView>,
    /// The checkpoint that the attempt has started from.
    #[schemars(with = "Option<u64>")]
    pub restored_from: Option<Epoch>,
    /// Its checkpoints since this process runs it.
    pub checkpoints: CheckpointsView,
}

/// How an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailureView {
    /// Why.
    pub cause: String,
    /// When, milliseconds since the Unix epoch.
    pub at_ms: i64,
}

/// The checkpoints of one run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointsView {
    /// Completed.
    pub completed: u64,
    /// Failed or timed out.
    pub failed: u64,
    /// Given up because a later one was complete before them.
    #[serde(default)]
    pub overtaken: u64,
    /// The newest completed one.
    pub last: Option<CheckpointView>,
}

/// A completed checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointView {
    /// Its number.
    #[schemars(with = "u64")]
    pub epoch: Epoch,
    /// Wall-clock time of its trigger, milliseconds since the Unix epoch.
    pub triggered_at_ms: i64,
    /// From the trigger to the last acknowledgement, milliseconds.
    pub duration_ms: u64,
    /// Bytes of all its shards.
    pub size: u64,
}

impl From<CheckpointStatus> for CheckpointView {
    fn from(status: CheckpointStatus) -> Self {
        let CheckpointStatus { epoch, triggered_at_ms, duration_ms, size } = status;
        Self { epoch, triggered_at_ms, duration_ms, size }
    }
}

/// The answer to `GET /checkpoints`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointHistory {
    /// The last ones that were triggered, newest first; no more than a few dozen are remembered.
    pub checkpoints: Vec<CheckpointEntry>,
}

/// A checkpoint that was triggered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointEntry {
    /// Its number.
    #[schemars(with = "u64")]
    pub epoch: Epoch,
    /// What it was for.
    pub kind: CheckpointKind,
    /// What became of it.
    pub state: CheckpointOutcome,
    /// Wall-clock time of its trigger, milliseconds since the Unix epoch.
    pub triggered_at_ms: i64,
    /// From the trigger until it was complete or given up, milliseconds; null if it is under way.
    pub duration_ms: Option<u64>,
    /// Bytes of all its shards, if it is complete.
    pub size: Option<u64>,
    /// Whether its barriers have overtaken rows in flight.
    pub unaligned: bool,
    /// Why it was given up, if it was.
    pub reason: Option<String>,
}

/// What a checkpoint was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum CheckpointKind {
    /// To recover.
    Checkpoint,
    /// Somebody has asked for a savepoint.
    Savepoint,
    /// The last before its tasks end: the job stops, or goes on at another parallelism.
    Last,
}

/// What became of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum CheckpointOutcome {
    /// Nothing yet.
    UnderWay,
    /// It is durable.
    Completed,
    /// It failed or timed out.
    Failed,
    /// A later one was complete before it.
    Overtaken,
}

impl From<CheckpointRecord> for CheckpointEntry {
    fn from(record: CheckpointRecord) -> Self {
        let CheckpointRecord { barrier, triggered_at_ms, unaligned, .. } = record;
        let kind = match (barrier.whole, barrier.stops()) {
            (true, _) => CheckpointKind::Savepoint,
            (false, true) => CheckpointKind::Last,
            (false, false) => CheckpointKind::Checkpoint,
        };
        let (state, duration_ms, size, reason) = match record.state {
            CheckpointState::UnderWay => (CheckpointOutcome::UnderWay, None, None, None),
            CheckpointState::Completed { duration_ms, size } => {
                (CheckpointOutcome::Completed, Some(duration_ms), Some(size), None)
            }
            CheckpointState::Failed { duration_ms, reason } => {
                (CheckpointOutcome::Failed, Some(duration_ms), None, Some(reason))
            }
            CheckpointState::Overtaken { duration_ms, reason } => {
                (CheckpointOutcome::Overtaken, Some(duration_ms), None, Some(reason))
            }
        };
        Self { epoch: barrier.epoch, kind, state, triggered_at_ms, duration_ms, size, unaligned, reason }
    }
}

/// The answer to `GET /job/graph`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GraphView {
    /// The tasks: rows go from lower to higher ones.
    pub tasks: Vec<TaskView>,
    /// How rows go from task to task.
    pub edges: Vec<EdgeView>,
}

/// A chain of operators that one thread runs per subtask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TaskView {
    /// Its index.
    pub id: usize,
    /// Number of its subtasks.
    pub parallelism: u32,
    /// What their time goes to lately; null if none runs.
    pub shares: Option<SharesView>,
    /// The operators, in the order in which rows pass them.
    pub operators: Vec<OperatorView>,
}

/// Parts of a task's time over the last seconds, the mean over its subtasks; together 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SharesView {
    /// It works.
    pub busy: f64,
    /// It waits for input.
    pub idle: f64,
    /// It waits for room in an output.
    pub back_pressured: f64,
}

/// An operator, and what its subtasks have counted since this process runs the job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OperatorView {
    /// Stable identity: `source:bid`, `sink:hot_items`, `hot_items/window-aggregate-1`.
    #[schemars(with = "String")]
    pub uid: OperatorUid,
    /// `kafka source`, `window aggregate`, …
    pub kind: String,
    /// What it does.
    pub description: String,
    /// Rows that came in.
    pub rows_in: u64,
    /// Rows that went out; of a sink, rows written.
    pub rows_out: u64,
    /// Encoded bytes read by a source or written by a sink.
    pub bytes: u64,
    /// Rows that came after their window had closed.
    pub late: u64,
    /// Records that could not be decoded.
    pub bad: u64,
    /// Keys in state at the last checkpoint.
    pub state_rows: u64,
    /// Bytes of state at the last checkpoint.
    pub state_bytes: u64,
    /// The least watermark of its subtasks, milliseconds since the Unix epoch; null before the first and after the last.
    pub watermark_ms: Option<i64>,
    /// Whether event time has come to its end.
    pub input_ended: bool,
}

/// Rows go from each subtask of one task to subtasks of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EdgeView {
    /// From this task.
    pub from: usize,
    /// To this one.
    pub to: usize,
    /// Into this input of its first operator.
    pub input: usize,
    /// How they are dealt out.
    pub exchange: ExchangeView,
}

/// How rows are dealt out to subtasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ExchangeView {
    /// Subtask i to subtask i.
    Forward,
    /// By key.
    Hash,
    /// In turn.
    Rebalance,
}

/// A graph without what it takes to run it.
#[derive(Clone, Debug, Default)]
pub struct Outline {
    tasks: Vec<TaskOutline>,
    edges: Vec<EdgeView>,
}

#[derive(Clone, Debug)]
struct TaskOutline {
    parallelism: Parallelism,
    operators: Vec<(OperatorStatus, String)>,
}

impl Outline {
    /// Of this graph.
    #[must_use]
    pub fn of(graph: &JobGraph) -> Self {
        let tasks = graph.vertices.iter().map(|vertex| TaskOutline {
            parallelism: vertex.parallelism,
            operators: vertex
                .chain
                .iter()
                .map(|n| (OperatorStatus::new(&n.uid, &n.kind), n.description.clone()))
                .collect(),
        });
        let edges = graph.edges.iter().map(|edge| EdgeView {
            from: edge.from.0,
            to: edge.to.0,
            input: edge.port,
            exchange: match edge.exchange {
                Exchange::Forward => ExchangeView::Forward,
                Exchange::Hash(_) => ExchangeView::Hash,
                Exchange::Rebalance => ExchangeView::Rebalance,
            },
        });
        Self { tasks: tasks.collect(), edges: edges.collect() }
    }

    /// A task of two operators, and one behind it that has one subtask.
    #[cfg(test)]
    pub(super) fn example() -> Self {
        let operator = |uid: &str| (OperatorStatus::new(&uid.into(), "x"), format!("does {uid}"));
        let task = |parallelism, operators: Vec<_>| TaskOutline { parallelism, operators };
        Self {
            tasks: vec![
                task(Parallelism::Job, vec![operator("source:a"), operator("calc")]),
                task(Parallelism::One, vec![operator("sink:\"b\"")]),
            ],
            edges: vec![EdgeView { from: 0, to: 1, input: 0, exchange: ExchangeView::Hash }],
        }
    }

    /// Every operator with its task and what it has counted, in the order of the graph.
    pub(super) fn operators<'a>(
        &'a self,
        view: &'a ProgressView,
    ) -> impl Iterator<Item = (usize, &'a OperatorStatus, &'a str)> {
        let counted =
            |nothing: &'a OperatorStatus| view.operators.iter().find(|o| o.uid == nothing.uid).unwrap_or(nothing);
        let of_task = move |(t, task): (usize, &'a TaskOutline)| {
            task.operators.iter().map(move |(nothing, what)| (t, counted(nothing), what.as_str()))
        };
        self.tasks.iter().enumerate().flat_map(of_task)
    }

    /// Every task with what its time goes to.
    pub(super) fn tasks(&self, view: &ProgressView) -> Vec<TaskStatus> {
        let counted = |task| view.tasks.iter().find(|t| t.task == task).copied();
        (0..self.tasks.len()).map(|task| counted(task).unwrap_or(TaskStatus { task, ..Default::default() })).collect()
    }

    /// With what is counted, in a job of this parallelism.
    pub(super) fn view(&self, view: &ProgressView, parallelism: u32) -> GraphView {
        let mut tasks: Vec<TaskView> = self
            .tasks(view)
            .into_iter()
            .zip(&self.tasks)
            .map(|(status, outline)| TaskView {
                id: status.task,
                parallelism: match outline.parallelism {
                    Parallelism::Job => parallelism,
                    Parallelism::One => 1,
                },
                shares: (status.subtasks > 0).then_some(SharesView {
                    busy: status.lately.busy,
                    idle: status.lately.idle,
                    back_pressured: status.lately.back_pressured,
                }),
                operators: Vec::new(),
            })
            .collect();
        for (task, status, description) in self.operators(view) {
            tasks[task].operators.push(OperatorView::of(status, description));
        }
        GraphView { tasks, edges: self.edges.clone() }
    }
}

impl OperatorView {
    fn of(status: &OperatorStatus, description: &str) -> Self {
        let status = status.clone();
        Self {
            uid: status.uid,
            kind: status.kind,
            description: description.to_owned(),
            rows_in: status.rows_in,
            rows_out: status.rows_out,
            bytes: status.bytes,
            late: status.late,
            bad: status.bad,
            state_rows: status.state_rows,
            state_bytes: status.state_bytes,
            watermark_ms: status.watermark.filter(|w| *w < WATERMARK_MAX),
            input_ended: status.watermark.is_some_and(|w| w >= WATERMARK_MAX),
        }
    }
}

/// The answer to `GET /healthz` and `GET /readyz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HealthView {
    /// Of a job: `restoring`, `running`, `stopping` or `done`; of a worker: `looking` (for its coordinator), `waiting` (for
    /// something to run), `building` or `running`.
    pub phase: String,
    /// Whether it runs with all its state there; of a worker, whether it does what its coordinator says.
    pub ready: bool,
    /// Subtasks whose state is not all there yet.
    pub restoring: usize,
}

impl From<&ProgressView> for HealthView {
    fn from(view: &ProgressView) -> Self {
        Self { phase: view.phase.name().to_owned(), ready: view.is_ready(), restoring: view.attempt.restoring }
    }
}

impl From<WorkerPhase> for HealthView {
    fn from(phase: WorkerPhase) -> Self {
        let (name, ready, restoring) = match phase {
            WorkerPhase::Looking => ("looking", false, 0),
            WorkerPhase::Waiting => ("waiting", true, 0),
            WorkerPhase::Building => ("building", false, 0),
            WorkerPhase::Running { restoring } => ("running", restoring == 0, restoring),
        };
        Self { phase: name.to_owned(), ready, restoring }
    }
}

/// What a job does once a savepoint has been taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Then {
    /// It goes on.
    #[default]
    Continue,
    /// It stops; whoever restores the savepoint goes on from there.
    Stop,
    /// It stops after event time has gone to its end: open windows fire.
    Drain,
}

/// The body of `POST /savepoints`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SavepointOrder {
    /// The savepoint's name, unique in the job.
    pub name: String,
    /// What the job does then.
    #[serde(default)]
    pub then: Then,
}

/// A savepoint that was made: the answer to `POST /savepoints`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SavepointView {
    /// Its folder, as it is given to a restore.
    pub location: String,
    /// The checkpoint that it is a copy of.
    #[schemars(with = "u64")]
    pub epoch: Epoch,
    /// Bytes of its shards.
    pub size: u64,
}

/// The body of `POST /rescale`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RescaleOrder {
    /// Subtasks per task from then on: at least 1, at most the job's `maxParallelism`.
    pub parallelism: u32,
}

/// A job that runs at another parallelism: the answer to `POST /rescale`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RescaledView {
    /// Subtasks per task before.
    pub from: u32,
    /// Subtasks per task now.
    pub to: u32,
    /// The checkpoint that it went on from; null if nothing had to change.
    #[schemars(with = "Option<u64>")]
    pub epoch: Option<Epoch>,
}

/// The body of `POST /stop`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StopOrder {
    /// The name of a savepoint to stop with. Without, the job stops with a last checkpoint, as on SIGTERM.
    #[serde(default)]
    pub savepoint: Option<String>,
    /// Stop after event time has gone to its end: open windows fire. With a savepoint only.
    #[serde(default)]
    pub drain: bool,
}

/// A job that stops: the answer to `POST /stop`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StopView {
    /// What it stops with; null if it is a last checkpoint, which may not be complete yet.
    pub savepoint: Option<SavepointView>,
}

/// Why a request failed: the body of every other answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorView {
    /// What failed, why, and what to do.
    pub error: String,
}
