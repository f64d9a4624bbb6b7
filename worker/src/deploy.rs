//! Builds what an attempt consists of: the tasks with their channels and restored state, and the committers.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use floodmark_dataflow::{
    Exchange, JobGraph, Node, OperatorMetrics, RestoredShard, SubtaskContext, TaskId,
    channel::{Inbox, Sender, Signal},
    exchange::Router,
    graph::{NodeKind, Parallelism},
    inflight::InputChannel,
    source::SourceNode,
    task::{ChainedOperator, SourceInput, SubtaskSpec, Task, TaskInput},
};
use floodmark_snapshot::{
    Env, Epoch, Error, KeyGroupRange, OperatorUid, Result, SplitState, alignment::AlignmentMode, restore::Restored,
};

use crate::{
    CheckpointMode, Progress, RunSpec,
    committers::{CommitterId, StagedShard},
    tasks::SubtaskId,
};

/// A task ready to be driven.
pub(crate) struct Deployed {
    pub(crate) id: SubtaskId,
    pub(crate) name: String,
    pub(crate) task: Task,
    pub(crate) signal: Arc<Signal>,
    /// Whether it heads a source.
    pub(crate) source: bool,
    /// Its sinks' operators.
    pub(crate) sinks: Vec<OperatorUid>,
}

/// A committer to be started.
pub(crate) struct Committing {
    pub(crate) id: CommitterId,
    pub(crate) committer: Box<dyn floodmark_dataflow::sink::Committer>,
    pub(crate) restored: Option<(Epoch, Vec<StagedShard>)>,
}

/// Looks up every source's splits, and checks every sink, before anything runs. Blocking.
pub(crate) fn connect(graph: &JobGraph, restored: Option<&Restored>) -> Result<HashMap<OperatorUid, Vec<SplitState>>> {
    let mut splits = HashMap::new();
    for (_, node) in graph.nodes() {
        match &node.node {
            NodeKind::Source(source) => {
                let known = restored.and_then(|r| r.operator(&node.uid)).map_or(&[][..], |o| &o.splits);
                let found = source.factory.splits(known).map_err(|e| e.context(&node.uid))?;
                splits.insert(node.uid.clone(), found);
            }
            NodeKind::Sink(sink) => sink.check().map_err(|e| e.context(&node.uid))?,
            NodeKind::Operator(_) => {}
        }
    }
    Ok(splits)
}

/// The committers of all sinks: of the present subtasks, and of earlier ones whose records are still to be committed.
/// Everything up to epoch `committed` is known to be.
///
/// # Errors
/// When the checkpoint holds records of a sink that no longer commits any: they would be lost.
pub(crate) fn committers(
    graph: &JobGraph,
    parallelism: u32,
    history: &str,
    restored: Option<&Restored>,
    committed: Epoch,
) -> Result<Vec<Committing>> {
    let mut all = Vec::new();
    for (task, node) in graph.nodes() {
        let NodeKind::Sink(sink) = &node.node else { continue };
        let present = 0..width(graph, task, parallelism);
        let earlier =
            restored.and_then(|r| r.operator(&node.uid)).into_iter().flat_map(|o| &o.shards).map(|s| s.subtask);
        for index in present.chain(earlier).collect::<BTreeSet<u32>>() {
            let Some(committer) = sink.committer(index, history).map_err(|e| e.context(&node.uid))? else {
                let left = restored
                    .filter(|r| r.manifest.epoch > committed)
                    .map_or(0, |r| r.staged(&node.uid, index).iter().map(|(shard, _)| shard.rows).sum());
                if left == 0 {
                    continue;
                }
                return Err(Error::abort(format!(
                    "{}: the checkpoint holds {left} records that are not written yet, and the sink no longer writes \
                     exactly once; run the job as it was once more, and stop it with Ctrl-C, before changing that",
                    node.uid
                )));
            };
            let restored = restored.map(|r| {
                let shards = r.staged(&node.uid, index).into_iter().map(|(shard, bytes)| (shard.rows, bytes));
                (r.manifest.epoch, shards.collect())
            });
            all.push(Committing { id: CommitterId { uid: node.uid.clone(), index }, committer, restored });
        }
    }
    Ok(all)
}

fn width(graph: &JobGraph, task: TaskId, parallelism: u32) -> u32 {
    match graph.vertices[task.0].parallelism {
        Parallelism::Job => parallelism,
        Parallelism::One => 1,
    }
}

/// Builds all tasks of a job.
pub(crate) fn tasks(
    spec: &RunSpec,
    env: &Env,
    splits: &HashMap<OperatorUid, Vec<SplitState>>,
    restored: Option<&Restored>,
    progress: &Progress,
) -> Result<Vec<Deployed>> {
    let graph = &spec.graph;
    let mut wiring = wire(graph, spec.parallelism, spec.max_parallelism);
    let mut deployed = Vec::new();
    for (t, vertex) in graph.vertices.iter().enumerate() {
        let parallelism = width(graph, TaskId(t), spec.parallelism);
        let metrics: Vec<_> = vertex.chain.iter().map(|n| progress.register(&n.uid, &n.kind, parallelism)).collect();
        for index in 0..parallelism {
            let of_node = |n: usize| metrics[n][index as usize].clone();
            let builder = Builder { spec, env, splits, restored, index, parallelism };
            let ends =
                wiring.remove(&(t, index)).ok_or_else(|| Error::abort("internal error: a subtask without wiring"))?;
            deployed.push(builder.build(TaskId(t), &vertex.chain, of_node, ends)?);
        }
    }
    Ok(deployed)
}

/// The channels of one subtask.
struct Ends {
    signal: Arc<Signal>,
    inbox: Inbox,
    channels: Vec<InputChannel>,
    outputs: Vec<Router>,
}

fn wire(graph: &JobGraph, parallelism: u32, max_parallelism: u16) -> HashMap<(usize, u32), Ends> {
    let mut all: HashMap<(usize, u32), Ends> = HashMap::new();
    for t in 0..graph.vertices.len() {
        for index in 0..width(graph, TaskId(t), parallelism) {
            let signal = Arc::new(Signal::default());
            let inbox = Inbox::new(signal.clone());
            all.insert((t, index), Ends { signal, inbox, channels: Vec::new(), outputs: Vec::new() });
        }
    }
    for (number, edge) in graph.edges.iter().enumerate() {
        for from in 0..width(graph, edge.from, parallelism) {
            let signal = all[&(edge.from.0, from)].signal.clone();
            let targets = match edge.exchange {
                Exchange::Forward => from..from + 1,
                Exchange::Hash(_) | Exchange::Rebalance => 0..width(graph, edge.to, parallelism),
            };
            let mut senders: Vec<Sender> = Vec::new();
            for to in targets {
                let owned = KeyGroupRange::of_subtask(to, width(graph, edge.to, parallelism), max_parallelism);
                if let Some(ends) = all.get_mut(&(edge.to.0, to)) {
                    ends.channels.push(InputChannel::of_edge(graph, number, owned));
                    senders.push(ends.inbox.channel(signal.clone()));
                }
            }
            if let Some(ends) = all.get_mut(&(edge.from.0, from)) {
                ends.outputs.push(Router::new(edge.exchange.clone(), max_parallelism, senders));
            }
        }
    }
    all
}

struct Builder<'a> {
    spec: &'a RunSpec,
    env: &'a Env,
    splits: &'a HashMap<OperatorUid, Vec<SplitState>>,
    restored: Option<&'a Restored>,
    index: u32,
    parallelism: u32,
}

impl Builder<'_> {
    fn build(
        &self,
        id: TaskId,
        nodes: &[Node],
        metrics: impl Fn(usize) -> Arc<OperatorMetrics>,
        ends: Ends,
    ) -> Result<Deployed> {
        let mut chain = Vec::new();
        let mut source = None;
        let mut sinks = Vec::new();
        for (n, node) in nodes.iter().enumerate() {
            let context = self.context(metrics(n));
            let operator = match &node.node {
                NodeKind::Source(head) => {
                    source = Some(self.source(node, head, &context)?);
                    continue;
                }
                NodeKind::Operator(factory) => factory.create(&context),
                NodeKind::Sink(sink) => {
                    sinks.push(node.uid.clone());
                    sink.create(&context)
                }
            };
            let mut operator = operator.map_err(|e| e.context(&node.uid))?;
            if let Some(restored) = self.restored.filter(|_| node.state_schema.is_some()) {
                let shards = restored.keyed(&node.uid, context.key_groups);
                let shards = shards.into_iter().map(|(shard, bytes)| RestoredShard { shard, bytes }).collect();
                operator.restore(shards).map_err(|e| e.context(format!("restore {}", node.uid)))?;
            }
            chain.push(ChainedOperator {
                uid: node.uid.clone(),
                kind: node.kind.clone(),
                state_schema: node.state_schema.clone(),
                operator,
                metrics: context.metrics,
            });
        }
        let heads_source = source.is_some();
        let input = match source {
            Some(source) => TaskInput::Source(source),
            None => TaskInput::Channels(ends.inbox, ends.channels),
        };
        let snapshots = match self.spec.checkpoints.mode {
            CheckpointMode::ExactlyOnce => Some(AlignmentMode::ExactlyOnce),
            CheckpointMode::AtLeastOnce => Some(AlignmentMode::AtLeastOnce),
            CheckpointMode::Disabled => None,
        };
        let spec = SubtaskSpec {
            index: self.index,
            parallelism: self.parallelism,
            input,
            replay: Vec::new(),
            chain,
            outputs: ends.outputs,
            snapshots,
            signal: ends.signal.clone(),
        };
        Ok(Deployed {
            id: SubtaskId { task: id, index: self.index },
            name: format!("task {id}.{}", self.index),
            task: Task::new(spec, self.env.clone()),
            signal: ends.signal,
            source: heads_source,
            sinks,
        })
    }

    fn context(&self, metrics: Arc<OperatorMetrics>) -> SubtaskContext {
        SubtaskContext {
            index: self.index,
            parallelism: self.parallelism,
            max_parallelism: self.spec.max_parallelism,
            key_groups: KeyGroupRange::of_subtask(self.index, self.parallelism, self.spec.max_parallelism),
            metrics,
            env: self.env.clone(),
        }
    }

    fn source(&self, node: &Node, head: &SourceNode, context: &SubtaskContext) -> Result<SourceInput> {
        // Splits are dealt out in turn: each subtask's share differs by one at most.
        let all = self.splits.get(&node.uid).map_or(&[][..], Vec::as_slice);
        let mine = all.iter().skip(self.index as usize).step_by(self.parallelism as usize);
        let splits: Vec<SplitState> = mine.cloned().collect();
        let source = head.factory.open(splits.clone(), context).map_err(|e| e.context(&node.uid))?;
        Ok(SourceInput {
            uid: node.uid.clone(),
            kind: node.kind.clone(),
            source,
            compute: head.compute.clone(),
            watermark: head.watermark.clone(),
            splits,
            metrics: context.metrics.clone(),
        })
    }
}
