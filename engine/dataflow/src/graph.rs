//! A job's dataflow: tasks, the operators chained in each, and the exchanges between them. Pure data.

use std::{fmt, sync::Arc};

use floodmark_snapshot::{OperatorUid, StateSchema, restore::Taker};
use serde::{Deserialize, Serialize};

use crate::{OperatorFactory, operator::Port, sink::SinkNode, source::SourceNode};

/// Index of a task in its graph. Tasks are in topological order: every edge goes from a lower to a higher id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskId(pub usize);

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How the rows of one task reach the subtasks of the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// Subtask i to subtask i. Both tasks have the same parallelism.
    Forward,
    /// To the owner of the key group of these columns' hash (see [`crate::hash`]). The batch that arrives carries the hashes.
    Hash(Vec<usize>),
    /// Batches in turn to all subtasks.
    Rebalance,
}

/// Number of subtasks of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parallelism {
    /// The job's.
    Job,
    /// Exactly one.
    One,
}

/// What a node of a chain is.
#[derive(Clone)]
pub enum NodeKind {
    /// The head of a source task.
    Source(SourceNode),
    /// Anything in between.
    Operator(Arc<dyn OperatorFactory>),
    /// The end of a chain that leaves the job.
    Sink(SinkNode),
}

/// One operator of a chain.
#[derive(Clone)]
pub struct Node {
    /// Stable identity; unique in the graph.
    pub uid: OperatorUid,
    /// What it is, in one or two words, without details: `window aggregate`.
    pub kind: String,
    /// What it does, for people: `window aggregate HOP(2 s, 10 s) by [auction]: count(*)`.
    pub description: String,
    /// The types of its state; `None` for an operator that keeps none.
    pub state_schema: Option<StateSchema>,
    /// How to make it.
    pub node: NodeKind,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.uid, self.description)
    }
}

/// A chain of operators that one thread runs per subtask.
#[derive(Clone, Debug)]
pub struct Vertex {
    /// The chain; never empty. A source can only be the first, a sink only the last. Only the first may have several ports.
    pub chain: Vec<Node>,
    /// Number of subtasks.
    pub parallelism: Parallelism,
}

/// Rows flow from each subtask of `from` to subtasks of `to`.
#[derive(Clone, Debug)]
pub struct Edge {
    /// Upstream task.
    pub from: TaskId,
    /// Downstream task.
    pub to: TaskId,
    /// Which input of the downstream task's first operator. Several edges may lead to one port (a union).
    pub port: Port,
    /// How rows are dealt out.
    pub exchange: Exchange,
}

/// A job's dataflow.
#[derive(Clone, Debug, Default)]
pub struct JobGraph {
    /// The tasks, in topological order.
    pub vertices: Vec<Vertex>,
    /// The exchanges.
    pub edges: Vec<Edge>,
    /// Fingerprint of the plan: equal text means an equal dataflow.
    pub fingerprint: String,
}

impl JobGraph {
    /// All nodes with the task that each is in.
    pub fn nodes(&self) -> impl Iterator<Item = (TaskId, &Node)> {
        self.vertices.iter().enumerate().flat_map(|(i, v)| v.chain.iter().map(move |n| (TaskId(i), n)))
    }

    /// Number of subtasks of a task, in a job of this parallelism.
    #[must_use]
    pub fn width(&self, task: TaskId, parallelism: u32) -> u32 {
        match self.vertices[task.0].parallelism {
            Parallelism::Job => parallelism,
            Parallelism::One => 1,
        }
    }

    /// Whether every source ends.
    #[must_use]
    pub fn bounded(&self) -> bool {
        self.nodes().all(|(_, n)| match &n.node {
            NodeKind::Source(s) => s.factory.bounded(),
            NodeKind::Operator(_) | NodeKind::Sink(_) => true,
        })
    }
}

/// The operators of a job, as far as their state goes: what a [`floodmark_snapshot::restore::StatePlan`] is made for.
#[must_use]
pub fn takers(graph: &JobGraph) -> Vec<Taker> {
    let taker = |node: &Node| {
        let schema = match &node.node {
            NodeKind::Source(_) => Some(node.state_schema.clone().unwrap_or_default()),
            NodeKind::Operator(_) | NodeKind::Sink(_) => node.state_schema.clone(),
        };
        Taker { uid: node.uid.clone(), kind: node.kind.clone(), schema }
    };
    graph.nodes().map(|(_, node)| taker(node)).collect()
}

/// The dataflow as text, a task per paragraph, for `floodmark check`.
impl fmt::Display for JobGraph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, vertex) in self.vertices.iter().enumerate() {
            let width = match vertex.parallelism {
                Parallelism::Job => "",
                Parallelism::One => " (parallelism 1)",
            };
            writeln!(f, "task {i}{width}")?;
            for edge in self.edges.iter().filter(|e| e.to == TaskId(i)) {
                let how = match &edge.exchange {
                    Exchange::Forward => "forward".to_owned(),
                    Exchange::Hash(columns) => format!("hash of columns {columns:?}"),
                    Exchange::Rebalance => "rebalance".to_owned(),
                };
                writeln!(f, "  <- task {} ({how}) into input {}", edge.from, edge.port)?;
            }
            for node in &vertex.chain {
                writeln!(f, "  {}  [{}]", node.description, node.uid)?;
            }
        }
        Ok(())
    }
}
