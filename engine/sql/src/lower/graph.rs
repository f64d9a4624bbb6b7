//! Operators as a plan names them, and how they become a job's graph: chains of what needs no exchange, one task each.

use std::{collections::HashMap, sync::Arc};

use floodmark_dataflow::{
    Edge, Exchange, JobGraph, Node, OperatorFactory, TaskId, Vertex,
    graph::{NodeKind, Parallelism},
};
use floodmark_snapshot::{OperatorUid, StateSchema};
use xxhash_rust::xxh3::xxh3_64;

/// Index of an operator.
pub(super) type OpId = usize;

/// An input of an operator: rows of any number of others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Input {
    pub(super) from: Vec<OpId>,
    pub(super) exchange: Exchange,
}

impl Input {
    pub(super) fn forward(from: &[OpId]) -> Self {
        Self { from: from.to_vec(), exchange: Exchange::Forward }
    }

    pub(super) fn hash(from: &[OpId], columns: Vec<usize>) -> Self {
        Self { from: from.to_vec(), exchange: Exchange::Hash(columns) }
    }
}

/// What an operator is made by.
pub(super) enum Made {
    By(NodeKind),
    /// By a factory that yet has to be told whether the rows before updates are needed: that is known once all consumers
    /// are.
    Updating {
        emit_before: bool,
        factory: Box<dyn FnOnce(bool) -> Arc<dyn OperatorFactory>>,
    },
}

impl Made {
    /// By what `factory` makes of whether the rows before updates are needed.
    pub(super) fn updating<F: OperatorFactory + 'static>(factory: impl FnOnce(bool) -> F + 'static) -> Self {
        Self::Updating { emit_before: false, factory: Box::new(|before| Arc::new(factory(before))) }
    }
}

/// An operator.
pub(super) struct Op {
    pub(super) uid: String,
    pub(super) kind: String,
    pub(super) description: String,
    pub(super) state_schema: Option<StateSchema>,
    pub(super) made: Made,
    pub(super) inputs: Vec<Input>,
}

/// All operators of a job, in topological order.
#[derive(Default)]
pub(super) struct Ops {
    ops: Vec<Op>,
    /// Equal operators over equal inputs are one.
    known: HashMap<String, OpId>,
    counted: HashMap<String, usize>,
}

impl Ops {
    /// Adds an operator, unless there is an equal one: of the same kind and description over the same inputs. Its uid is
    /// `<target>/<kind>-<n>`.
    pub(super) fn add(
        &mut self,
        target: &str,
        kind: &str,
        (identity, description): (&str, String),
        inputs: Vec<Input>,
        state_schema: Option<StateSchema>,
        made: Made,
    ) -> OpId {
        let key = format!("{kind} {identity} {inputs:?}");
        if let Some(id) = self.known.get(&key) {
            return *id;
        }
        let uid = self.number(&format!("{target}/{}", kind.replace(' ', "-")));
        let id = self.push(Op { uid, kind: kind.to_owned(), description, state_schema, made, inputs });
        self.known.insert(key, id);
        id
    }

    fn number(&mut self, name: &str) -> String {
        let count = self.counted.entry(name.to_owned()).or_default();
        *count += 1;
        format!("{name}-{count}")
    }

    pub(super) fn push(&mut self, op: Op) -> OpId {
        self.ops.push(op);
        self.ops.len() - 1
    }

    /// A consumer needs the rows before updates.
    pub(super) fn need_before(&mut self, origins: &[OpId]) {
        for origin in origins {
            if let Made::Updating { emit_before, .. } = &mut self.ops[*origin].made {
                *emit_before = true;
            }
        }
    }

    /// Chains what can be, and numbers the tasks.
    pub(super) fn into_graph(self) -> JobGraph {
        let mut consumers = vec![0_usize; self.ops.len()];
        for from in self.ops.iter().flat_map(|op| &op.inputs).flat_map(|i| &i.from) {
            consumers[*from] += 1;
        }
        let mut graph = JobGraph::default();
        let mut task_of: Vec<TaskId> = Vec::with_capacity(self.ops.len());
        for op in self.ops {
            let node = Node {
                uid: OperatorUid(op.uid),
                kind: op.kind,
                description: op.description,
                state_schema: op.state_schema,
                node: match op.made {
                    Made::By(node) => node,
                    Made::Updating { emit_before, factory } => NodeKind::Operator(factory(emit_before)),
                },
            };
            let chained = match op.inputs.as_slice() {
                [Input { from, exchange: Exchange::Forward }] => match from.as_slice() {
                    [only] if consumers[*only] == 1 => Some(task_of[*only]),
                    _ => None,
                },
                _ => None,
            };
            if let Some(task) = chained {
                graph.vertices[task.0].chain.push(node);
                task_of.push(task);
                continue;
            }
            let task = TaskId(graph.vertices.len());
            for (port, input) in op.inputs.iter().enumerate() {
                for from in &input.from {
                    let exchange = input.exchange.clone();
                    graph.edges.push(Edge { from: task_of[*from], to: task, port, exchange });
                }
            }
            graph.vertices.push(Vertex { chain: vec![node], parallelism: Parallelism::Job });
            task_of.push(task);
        }
        graph.fingerprint = format!("{:016x}", xxh3_64(graph.to_string().as_bytes()));
        graph
    }
}
