//! The jobs that are simulated: their graphs. Some consist of small operators of our own (`operators`), some are planned from
//! SQL (`sql`).

use std::{fmt, sync::Arc};

use arrow::{array::AsArray, datatypes::Int64Type, record_batch::RecordBatch};
use floodmark_dataflow::{
    Edge, Exchange, JobGraph, Node, TaskId, Vertex,
    graph::{NodeKind, Parallelism},
    source::{SourceNode, WatermarkSpec},
};
use floodmark_snapshot::Result;

use crate::{
    inputs::{Columns, DISORDER_MS, Topic},
    operators,
    process::Process,
    sink::Sink,
    sql,
};

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topology {
    /// Source and sink in one chain.
    Pipe,
    /// Sums per key and window of event time, behind a shuffle.
    Windows,
    /// Records of a fast and a slow topic, counted per key by one operator.
    TwoSpeeds,
    /// Dealt out in turn first, then counted per key.
    Rebalanced,
    /// Windows whose results a second shuffle brings together in one subtask.
    Funnel,
    /// SQL: a windowed aggregate in two halves. Rows may be late.
    SqlWindows,
    /// SQL: windows of a fast topic joined with the rows of a slow one. Rows may be late.
    SqlJoin,
    /// SQL: a running aggregate per key, as upserts.
    SqlTotals,
    /// SQL: the last row of each key by event time, as upserts.
    SqlLast,
    /// SQL: the first row of each key by event time, as upserts.
    SqlFirst,
    /// SQL: each pair of key and value once.
    SqlDistinct,
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl Topology {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Pipe,
        Self::Windows,
        Self::TwoSpeeds,
        Self::Rebalanced,
        Self::Funnel,
        Self::SqlWindows,
        Self::SqlJoin,
        Self::SqlTotals,
        Self::SqlLast,
        Self::SqlFirst,
        Self::SqlDistinct,
    ];

    /// Whether results depend on event time.
    pub(crate) fn has_windows(self) -> bool {
        matches!(self, Self::Windows | Self::Funnel | Self::SqlWindows | Self::SqlJoin)
    }

    /// Whether rows may come behind the watermark.
    pub(crate) fn takes_late_rows(self) -> bool {
        matches!(self, Self::SqlWindows | Self::SqlJoin)
    }

    /// Whether it is planned from SQL: then the engine's back ends keep its state.
    pub(crate) fn is_sql(self) -> bool {
        sql::text(self, DISORDER_MS).is_some()
    }

    pub(crate) fn graph(self, process: &Arc<Process>) -> Result<JobGraph> {
        match sql::graph(self, process) {
            Some(graph) => graph,
            None => Ok(self.own_graph(process)),
        }
    }

    fn own_graph(self, process: &Arc<Process>) -> JobGraph {
        let node = |uid: &str, state: Option<&str>, node: NodeKind| Node {
            uid: uid.into(),
            kind: uid.trim_end_matches(char::is_numeric).to_owned(),
            description: uid.to_owned(),
            state_schema: state.map(Into::into),
            node,
        };
        let source = |topic: usize| {
            let factory = Arc::new(Topic { process: process.clone(), topic, columns: Columns::all() });
            let event_time = Arc::new(|rows: &RecordBatch| {
                let times = rows.column_by_name("time").map(|c| c.as_primitive::<Int64Type>());
                Ok(times.and_then(arrow::compute::max).map(|t| t - DISORDER_MS - 1))
            });
            let watermark = Some(WatermarkSpec { event_time, idle_timeout: None });
            node(&format!("topic{topic}"), None, NodeKind::Source(SourceNode { factory, compute: None, watermark }))
        };
        let operator = |uid: &str, make: operators::Make| node(uid, Some(uid), NodeKind::Operator(make));
        let counter = || operator("counter", operators::counter(process.clone()));
        let windows = || operator("windows", operators::windows(process.clone()));
        let map = || node("map", None, NodeKind::Operator(operators::forward()));
        let sink = || {
            let sink = Sink { process: process.clone(), uid: "sink".to_owned() };
            node("sink", None, NodeKind::Sink(Arc::new(sink)))
        };
        let vertex = |chain: Vec<Node>| Vertex { chain, parallelism: Parallelism::Job };
        let edge = |from, to, exchange| Edge { from: TaskId(from), to: TaskId(to), port: 0, exchange };
        let hash = || Exchange::Hash(vec![0]);
        let (vertices, edges) = match self {
            Self::Windows => (vec![vertex(vec![source(0)]), vertex(vec![windows(), sink()])], vec![edge(0, 1, hash())]),
            Self::TwoSpeeds => (
                vec![vertex(vec![source(0)]), vertex(vec![source(1)]), vertex(vec![counter(), sink()])],
                vec![edge(0, 2, hash()), edge(1, 2, hash())],
            ),
            Self::Rebalanced => (
                vec![vertex(vec![source(0)]), vertex(vec![map()]), vertex(vec![counter(), sink()])],
                vec![edge(0, 1, Exchange::Rebalance), edge(1, 2, hash())],
            ),
            Self::Funnel => (
                vec![
                    vertex(vec![source(0)]),
                    vertex(vec![windows()]),
                    Vertex { chain: vec![counter(), sink()], parallelism: Parallelism::One },
                ],
                vec![edge(0, 1, hash()), edge(1, 2, hash())],
            ),
            Self::Pipe
            | Self::SqlWindows
            | Self::SqlJoin
            | Self::SqlTotals
            | Self::SqlLast
            | Self::SqlFirst
            | Self::SqlDistinct => (vec![vertex(vec![source(0), sink()])], vec![]),
        };
        JobGraph { vertices, edges, fingerprint: format!("{self:?}") }
    }
}
