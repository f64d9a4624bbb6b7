//! Builds a worker's share of an attempt: the tasks with their channels and restored state, and the committers.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use floodmark_dataflow::{
    Exchange, Node, Operator, OperatorMetrics, RestoredShard, SubtaskContext, TaskId, arrival,
    channel::{Inbox, Sender, Signal},
    exchange::Router,
    graph::NodeKind,
    inflight::{self, InFlight, InputChannel},
    source::SourceNode,
    task::{ChainedOperator, SourceInput, SubtaskSpec, Task, TaskInput},
};
use floodmark_link::{
    exchange::{ChannelId, Exchange as Remote},
    transport::Endpoint,
};
use floodmark_snapshot::{
    Attempt, Env, Epoch, Error, KeyGroupRange, OperatorUid, Result, Shard, ShardKind, SplitState,
    alignment::AlignmentMode, restore,
};
use floodmark_state::StateSettings;
use futures::{Stream, StreamExt, TryStreamExt, future::try_join_all, stream};

use super::{Channels, Here, committers::StagedShard, reading::Files, slices::Slices};
use crate::{
    CheckpointMode, RunSpec,
    progress::Metrics,
    words::{CommitterId, Deployment, NotBuilt, Restored, SubtaskId},
};

/// Shards of one operator and subtask that are read before they are taken over.
const READS_AHEAD_MAX: usize = 2;

/// A task ready to be driven.
pub(super) struct Deployed {
    pub(super) id: SubtaskId,
    pub(super) task: Task,
    pub(super) signal: Arc<Signal>,
    /// Whether it heads a source.
    pub(super) source: bool,
    /// Its sinks.
    pub(super) sinks: Vec<SinkPart>,
    /// State that is read while it runs.
    pub(super) slices: Option<Slices>,
}

/// What a manifest says of a sink's operator.
#[derive(Clone, Debug)]
pub(super) struct SinkPart {
    pub(super) uid: OperatorUid,
    pub(super) kind: String,
    pub(super) parallelism: u32,
}

/// A committer to be started.
pub(super) struct Committing {
    pub(super) id: CommitterId,
    pub(super) committer: Box<dyn floodmark_dataflow::sink::Committer>,
    pub(super) restored: Option<(Epoch, Vec<(Epoch, StagedShard)>)>,
}

/// What has been built, and waits for its start.
pub(super) struct Work {
    pub(super) attempt: Attempt,
    /// The greatest epoch that was ever used, as far as the log knows.
    pub(super) last_epoch: Epoch,
    pub(super) tasks: Vec<Deployed>,
    pub(super) committers: Vec<Committing>,
    pub(super) channels: Channels,
}

/// Builds everything that a deployment asks for.
pub(super) async fn build(here: Here, deployment: Deployment) -> Result<Work, NotBuilt> {
    let Here { spec, env, counters, exchange, .. } = here;
    if let Some(exchange) = &exchange {
        exchange.begin(deployment.attempt).map_err(NotBuilt::Task)?;
    }
    let channels = Channels(exchange.clone().map(|e| (e, deployment.attempt)));
    let restoring = match &deployment.restored {
        Some(restored) => Some(Restoring::of(restored, &spec, &env).map_err(NotBuilt::Snapshot)?),
        None => None,
    };
    let (exchange, restoring) = (exchange.as_ref(), restoring.as_ref());
    let building = Building { spec: &spec, env: &env, exchange, deployment: &deployment, restoring };
    let committers = building.committers().await;
    let committers = committers.map_err(NotBuilt::of_snapshot_or(NotBuilt::Connector))?;
    let metrics = counters.begin(&spec.graph, deployment.parallelism(), |subtask| deployment.is_here(subtask));
    let tasks = building.tasks(&metrics).await;
    let tasks = tasks.map_err(NotBuilt::of_snapshot_or(NotBuilt::Task))?;
    tasks.iter().for_each(|t| counters.runs(t.id, t.task.metrics()));
    Ok(Work { attempt: deployment.attempt, last_epoch: deployment.last_epoch, tasks, committers, channels })
}

/// The snapshot that an attempt starts from, at hand.
struct Restoring<'a> {
    said: &'a Restored,
    files: Files,
}

impl<'a> Restoring<'a> {
    fn of(said: &'a Restored, spec: &RunSpec, env: &Env) -> Result<Self> {
        let snapshot = restore::located(said.manifest.clone(), &said.location, &spec.storage)?;
        let copies = spec.copies.clone().filter(|_| said.owned);
        if let Some(copies) = &copies {
            copies.restored(env, &said.manifest);
        }
        Ok(Self { said, files: Files { snapshot, env: env.clone(), copies } })
    }

    fn shards_of(&self, uid: &OperatorUid) -> impl Iterator<Item = &Shard> {
        self.files.snapshot.manifest.operators.get(uid).into_iter().flat_map(|o| &o.shards)
    }

    /// Reads these shards, in their order; of keyed ones with much in them just what is in `owned`.
    fn read(&self, shards: Vec<&Shard>, owned: KeyGroupRange) -> impl Stream<Item = Result<RestoredShard>> {
        let files = &self.files;
        stream::iter(shards)
            .map(move |shard| async move {
                let content = files.read_of(shard, owned).await?;
                Ok(RestoredShard::of(shard.clone(), content))
            })
            .buffered(READS_AHEAD_MAX)
    }
}

/// What is built, and of what.
#[derive(Clone, Copy)]
struct Building<'a> {
    spec: &'a RunSpec,
    env: &'a Env,
    exchange: Option<&'a Arc<Remote>>,
    deployment: &'a Deployment,
    restoring: Option<&'a Restoring<'a>>,
}

impl Building<'_> {
    /// The committers of the sinks here: of the present subtasks, and of earlier ones whose records are still to be committed.
    ///
    /// # Errors
    /// When the checkpoint holds records of a sink that no longer commits any: they would be lost. `Corrupt` if some are damaged.
    async fn committers(self) -> Result<Vec<Committing>> {
        let Self { spec, deployment, restoring: restored, .. } = self;
        let graph = &spec.graph;
        let mut all = Vec::new();
        for (task, node) in graph.nodes() {
            let NodeKind::Sink(sink) = &node.node else { continue };
            let held = |index: u32| {
                let shards = restored.into_iter().flat_map(|r| r.shards_of(&node.uid));
                shards.filter(|s| s.kind == ShardKind::Staged && s.subtask == index).collect::<Vec<_>>()
            };
            let width = graph.width(task, deployment.parallelism());
            let earlier = restored.into_iter().flat_map(|r| r.shards_of(&node.uid)).map(|s| s.subtask);
            for index in (0..width).chain(earlier).collect::<BTreeSet<u32>>() {
                // Those of subtasks that are no more go to one that is.
                if !deployment.is_here(SubtaskId { task, index: index % width.max(1) }) {
                    continue;
                }
                let Some(committer) = sink.committer(index, &deployment.history).map_err(|e| e.context(&node.uid))?
                else {
                    let visible =
                        |s: &&&Shard| restored.is_some_and(|r| s.epoch.is_some_and(|e| e <= r.said.committed));
                    let left: u64 = held(index).iter().filter(|s| !visible(s)).map(|s| s.rows).sum();
                    if left == 0 {
                        continue;
                    }
                    return Err(Error::abort(format!(
                        "{}: the checkpoint holds {left} records that are not written yet, and the sink no longer writes \
                     exactly once; run the job as it was once more, and stop it with Ctrl-C, before changing that",
                        node.uid
                    )));
                };
                let id = CommitterId { uid: node.uid.clone(), index };
                let mut pending = None;
                if let Some(restored) = restored {
                    let (files, of) = (&restored.files, restored.said.manifest.epoch);
                    let staged = stream::iter(held(index).into_iter().cloned()).map(|shard: Shard| async move {
                        let bytes = files.read(&shard).await?;
                        Ok::<_, Error>((shard.epoch.unwrap_or(of), (shard.rows, bytes)))
                    });
                    pending = Some((of, staged.buffered(READS_AHEAD_MAX).try_collect().await?));
                }
                all.push(Committing { id, committer, restored: pending });
            }
        }
        Ok(all)
    }

    /// Builds the tasks, with their state. Subtasks take theirs over side by side.
    ///
    /// # Errors
    /// `Corrupt` if state is damaged.
    async fn tasks(self, metrics: &Metrics) -> Result<Vec<Deployed>> {
        let Self { spec, deployment, .. } = self;
        let graph = &spec.graph;
        let mut wiring = self.wire()?;
        let mut builds = Vec::new();
        for (t, vertex) in graph.vertices.iter().enumerate() {
            let parallelism = graph.width(TaskId(t), deployment.parallelism());
            for index in (0..parallelism).filter(|i| deployment.is_here(SubtaskId { task: TaskId(t), index: *i })) {
                let builder = Builder { of: self, metrics: &metrics[t], index, parallelism };
                let ends = wiring
                    .remove(&(t, index))
                    .ok_or_else(|| Error::abort("internal error: a subtask without wiring"))?;
                builds.push(builder.build(TaskId(t), &vertex.chain, ends));
            }
        }
        try_join_all(builds).await
    }
}

/// The channels of one subtask.
struct Ends {
    signal: Arc<Signal>,
    inbox: Inbox,
    channels: Vec<InputChannel>,
    outputs: Vec<Router>,
}

impl Building<'_> {
    /// The channels of all subtasks here.
    fn wire(self) -> Result<HashMap<(usize, u32), Ends>> {
        let Self { spec, deployment, .. } = self;
        let (graph, parallelism, max_parallelism) = (&spec.graph, deployment.parallelism(), spec.max_parallelism);
        let mut all: HashMap<(usize, u32), Ends> = HashMap::new();
        for t in 0..graph.vertices.len() {
            for index in 0..graph.width(TaskId(t), parallelism) {
                if deployment.is_here(SubtaskId { task: TaskId(t), index }) {
                    let signal = Arc::new(Signal::default());
                    let inbox = Inbox::bounded(signal.clone(), spec.channel_bytes);
                    all.insert((t, index), Ends { signal, inbox, channels: Vec::new(), outputs: Vec::new() });
                }
            }
        }
        for (number, edge) in graph.edges.iter().enumerate() {
            let width = graph.width(edge.to, parallelism);
            for from in 0..graph.width(edge.from, parallelism) {
                let signal = all.get(&(edge.from.0, from)).map(|ends| ends.signal.clone());
                let targets = match edge.exchange {
                    Exchange::Forward => from..from + 1,
                    Exchange::Hash(_) | Exchange::Rebalance => 0..width,
                };
                let mut senders: Vec<Sender> = Vec::new();
                for to in targets {
                    let receiver = all.get_mut(&(edge.to.0, to));
                    let id = self.channel(number, from, to);
                    match (&signal, receiver) {
                        (signal, Some(ends)) => {
                            let owned = KeyGroupRange::of_subtask(to, width, max_parallelism);
                            ends.channels.push(InputChannel::of_edge(graph, number, owned));
                            match signal {
                                Some(signal) => senders.push(ends.inbox.channel(signal.clone())),
                                None => self.others()?.expect(id, ends.inbox.channel(Arc::default()))?,
                            }
                        }
                        (Some(signal), None) => {
                            senders.push(self.others()?.connect(id, self.endpoint(to)?, signal.clone())?);
                        }
                        (None, None) => {}
                    }
                }
                if let Some(ends) = all.get_mut(&(edge.from.0, from)) {
                    ends.outputs.push(Router::new(edge.exchange.clone(), max_parallelism, senders));
                }
            }
        }
        Ok(all)
    }

    fn channel(self, edge: usize, from: u32, to: u32) -> ChannelId {
        ChannelId { attempt: self.deployment.attempt, edge: edge as u32, from, to }
    }

    fn others(&self) -> Result<&Arc<Remote>> {
        self.exchange.ok_or_else(|| Error::abort("internal error: a channel to another worker, and no way there"))
    }

    /// Where the subtasks of this index listen.
    fn endpoint(self, index: u32) -> Result<Endpoint> {
        let worker = self.deployment.placement.get(index as usize);
        let endpoint = worker.and_then(|w| self.deployment.endpoints.get(w));
        endpoint.cloned().ok_or_else(|| Error::retry(format!("nobody knows where subtask {index} runs")))
    }
}

/// The shards that a subtask with these key groups takes over for an operator, by earlier subtask and layer.
fn concerning<'a>(restored: &'a Restoring<'_>, node: &Node, owned: KeyGroupRange) -> Vec<&'a Shard> {
    if node.state_schema.is_none() {
        return Vec::new(); // what it no longer keeps has been given up
    }
    let concerns = |s: &&Shard| match s.kind {
        ShardKind::Keyed | ShardKind::RocksDb => s.key_groups.is_none_or(|g| g.overlaps(&owned)),
        ShardKind::Split | ShardKind::Union | ShardKind::Broadcast => true,
        ShardKind::Channel | ShardKind::Staged => false,
    };
    let mut shards: Vec<&Shard> = restored.shards_of(&node.uid).filter(concerns).collect();
    shards.sort_by_key(|s| (s.subtask, s.layer));
    shards
}

struct Builder<'a> {
    of: Building<'a>,
    /// Of this task's nodes, by subtask.
    metrics: &'a [Vec<Arc<OperatorMetrics>>],
    index: u32,
    parallelism: u32,
}

impl Builder<'_> {
    async fn build(self, id: TaskId, nodes: &[Node], ends: Ends) -> Result<Deployed> {
        let mut chain = Vec::new();
        let mut source = None;
        let mut sinks = Vec::new();
        let (mut arrivals, mut slices) = (None, None);
        for (n, node) in nodes.iter().enumerate() {
            let context = self.context(self.metrics[n][self.index as usize].clone());
            let operator = match &node.node {
                NodeKind::Source(head) => {
                    source = Some(self.source(node, head, &context)?);
                    continue;
                }
                NodeKind::Operator(factory) => factory.create(&context),
                NodeKind::Sink(sink) => {
                    let (uid, kind) = (node.uid.clone(), node.kind.clone());
                    sinks.push(SinkPart { uid, kind, parallelism: self.parallelism });
                    sink.create(&context)
                }
            };
            let mut operator = operator.map_err(|e| e.context(&node.uid))?;
            if let Some(restored) = self.of.restoring {
                let shards = concerning(restored, node, context.key_groups);
                let by_slices = chain.is_empty()
                    && source.is_none()
                    && !shards.is_empty()
                    && operator.restores_by_key_group()
                    && shards.iter().all(|s| s.kind == ShardKind::Keyed);
                if by_slices {
                    let (feed, arriving) =
                        arrival::arrivals(ends.signal.clone(), context.key_groups, context.max_parallelism);
                    arrivals = Some(arriving);
                    slices = Some(Slices {
                        files: restored.files.clone(),
                        shards: shards.into_iter().cloned().collect(),
                        owned: context.key_groups,
                        slice_bytes: self.of.spec.slice_bytes,
                        feed,
                    });
                } else if !shards.is_empty() {
                    operator = self.restore(restored, node, operator, shards, context.key_groups).await?;
                }
            }
            chain.push(ChainedOperator {
                uid: node.uid.clone(),
                kind: node.kind.clone(),
                state_schema: node.state_schema.clone(),
                operator,
                metrics: context.metrics,
            });
        }
        let replay = match (self.of.restoring, nodes.first()) {
            (Some(restored), Some(first)) => self.in_flight(restored, first, &ends.channels).await?,
            _ => Vec::new(),
        };
        let heads_source = source.is_some();
        let input = match source {
            Some(source) => TaskInput::Source(source),
            None => TaskInput::Channels(ends.inbox, ends.channels),
        };
        let snapshots = match self.of.spec.checkpoints.mode {
            CheckpointMode::ExactlyOnce => Some(AlignmentMode::ExactlyOnce),
            CheckpointMode::AtLeastOnce => Some(AlignmentMode::AtLeastOnce),
            CheckpointMode::Disabled => None,
        };
        let spec = SubtaskSpec {
            index: self.index,
            parallelism: self.parallelism,
            input,
            replay,
            arrivals,
            chain,
            outputs: ends.outputs,
            snapshots,
            signal: ends.signal.clone(),
        };
        Ok(Deployed {
            id: SubtaskId { task: id, index: self.index },
            task: Task::new(spec, self.of.env.clone()),
            signal: ends.signal,
            source: heads_source,
            sinks,
            slices,
        })
    }

    /// Hands an operator its state, a shard at a time, off this thread.
    async fn restore(
        &self,
        restored: &Restoring<'_>,
        node: &Node,
        mut operator: Box<dyn Operator>,
        shards: Vec<&Shard>,
        owned: KeyGroupRange,
    ) -> Result<Box<dyn Operator>> {
        let failed = |e: Error| e.context(format!("restore {}", node.uid));
        let mut read = std::pin::pin!(restored.read(shards, owned));
        while let Some(shard) = read.next().await {
            let shard = shard.map_err(failed)?;
            let take = move || operator.restore(vec![shard]).map(|()| operator);
            operator = self.of.env.blocking("restoring state", take).await.and_then(|o| o).map_err(failed)?;
        }
        let all = move || operator.restored().map(|()| operator);
        self.of.env.blocking("restoring state", all).await.and_then(|o| o).map_err(failed)
    }

    /// This subtask's share of the rows that were on their way to the task.
    async fn in_flight(
        &self,
        restored: &Restoring<'_>,
        first: &Node,
        channels: &[InputChannel],
    ) -> Result<Vec<InFlight>> {
        let (index, parallelism, max) = (self.index, self.parallelism, self.of.spec.max_parallelism);
        let owned = KeyGroupRange::of_subtask(index, parallelism, max);
        let concerns = |s: &&Shard| inflight::concerns(s, index, parallelism, max);
        let shards = restored.shards_of(&first.uid).filter(concerns).collect();
        let shards: Vec<RestoredShard> = restored.read(shards, owned).try_collect().await?;
        inflight::share(&shards, channels, index, parallelism, max).map_err(|e| e.context(&first.uid))
    }

    fn context(&self, metrics: Arc<OperatorMetrics>) -> SubtaskContext {
        SubtaskContext {
            index: self.index,
            parallelism: self.parallelism,
            max_parallelism: self.of.spec.max_parallelism,
            key_groups: KeyGroupRange::of_subtask(self.index, self.parallelism, self.of.spec.max_parallelism),
            metrics,
            state: StateSettings {
                reuse_restored: self.of.restoring.is_some_and(|r| r.said.owned),
                ..self.of.spec.state.clone()
            },
            env: self.of.env.clone(),
        }
    }

    fn source(&self, node: &Node, head: &SourceNode, context: &SubtaskContext) -> Result<SourceInput> {
        // Splits are dealt out in turn: each subtask's share differs by one at most.
        let all = self.of.deployment.splits.get(&node.uid).map_or(&[][..], Vec::as_slice);
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
