//! The jobs that are simulated: their graphs, and the sink that stages lines and commits them to the broker.

use std::{sync::Arc, time::Duration};

use arrow::{array::AsArray, datatypes::Int64Type, record_batch::RecordBatch};
use bytes::Bytes;
use floodmark_dataflow::{
    Barrier, Batch, Edge, Exchange, JobGraph, Node, Operator, Output, PendingShard, Port, StateSnapshot,
    SubtaskContext, TaskId, Vertex,
    graph::{NodeKind, Parallelism},
    sink::{Committer, SinkFactory},
    source::{SourceNode, WatermarkSpec},
};
use floodmark_snapshot::restore::Reference;
use floodmark_snapshot::{Epoch, Error, JobId, Result, ShardKind, Step};
use floodmark_worker::{CheckpointMode, CheckpointSettings, RunSpec};

use crate::{
    Mutation,
    broker::{ProducerId, Refusal},
    inputs::{DISORDER_MS, Topic},
    operators,
    process::Process,
    world::{Client, Strike},
};

/// The job's folder in the storage.
pub(crate) const FOLDER: &str = "sim/job/1";

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

impl Topology {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Pipe, Self::Windows, Self::TwoSpeeds, Self::Rebalanced, Self::Funnel];

    /// Whether results depend on event time.
    pub(crate) fn has_windows(self) -> bool {
        matches!(self, Self::Windows | Self::Funnel)
    }

    fn graph(self, process: &Arc<Process>) -> JobGraph {
        let node = |uid: &str, state: Option<&str>, node: NodeKind| Node {
            uid: uid.into(),
            kind: uid.trim_end_matches(char::is_numeric).to_owned(),
            description: uid.to_owned(),
            state_schema: state.map(Into::into),
            node,
        };
        let source = |topic: usize| {
            let factory = Arc::new(Topic { process: process.clone(), topic });
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
        let sink = || node("sink", None, NodeKind::Sink(Arc::new(Sink(process.clone()))));
        let vertex = |chain: Vec<Node>| Vertex { chain, parallelism: Parallelism::Job };
        let edge = |from, to, exchange| Edge { from: TaskId(from), to: TaskId(to), port: 0, exchange };
        let hash = || Exchange::Hash(vec![0]);
        let (vertices, edges) = match self {
            Self::Pipe => (vec![vertex(vec![source(0), sink()])], vec![]),
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
        };
        JobGraph { vertices, edges, fingerprint: format!("{self:?}") }
    }
}

/// What process number `start` is told to run.
pub(crate) fn spec(process: &Arc<Process>, start: usize, restore: Reference) -> RunSpec {
    let plan = &process.world.plan;
    let settings = &plan.checkpoints;
    let parallelism = plan.parallelism[start.min(plan.parallelism.len() - 1)];
    RunSpec {
        job: JobId { namespace: "sim".into(), name: "job".into(), uid: "1".into() },
        graph: plan.topology.graph(process),
        parallelism: parallelism.min(u32::from(plan.max_parallelism)),
        max_parallelism: plan.max_parallelism,
        state: Default::default(),
        checkpoints: CheckpointSettings {
            mode: if settings.exactly_once { CheckpointMode::ExactlyOnce } else { CheckpointMode::AtLeastOnce },
            interval: settings.interval,
            timeout: settings.timeout,
            min_pause: settings.min_pause,
            tolerable_failures: settings.tolerable_failures,
            retain: settings.retain,
            max_concurrent: settings.max_concurrent,
            unaligned_after: settings.unaligned_after,
        },
        storage: Arc::new(Client { world: process.world.clone(), pid: process.pid }),
        restore,
        initial: None,
        slice_bytes: 512,
        allow_dropped_state: false,
        holder: format!("process:{}", process.pid),
    }
}

struct Sink(Arc<Process>);

impl SinkFactory for Sink {
    fn kind(&self) -> String {
        "simulated sink".to_owned()
    }

    fn check(&self) -> Result<()> {
        self.0.look_up()
    }

    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        if !self.0.world.plan.checkpoints.exactly_once {
            return Ok(Box::new(Write { process: self.0.clone(), lines: String::new() }));
        }
        Ok(Box::new(Stage { process: self.0.clone(), index: context.index, lines: String::new() }))
    }

    fn committer(&self, index: u32, history: &str) -> Result<Option<Box<dyn Committer>>> {
        if !self.0.world.plan.checkpoints.exactly_once {
            return Ok(None);
        }
        let id = ("sink".to_owned(), index);
        Ok(Some(Box::new(Producer { process: self.0.clone(), id, history: history.to_owned(), epoch: 0 })))
    }
}

/// A line per row: its columns.
fn add_lines(to: &mut String, batch: &Batch) {
    let columns: Vec<_> = batch.rows.columns().iter().map(|c| c.as_primitive::<Int64Type>()).collect();
    for row in 0..batch.len() {
        let fields: Vec<String> = columns.iter().map(|c| c.value(row).to_string()).collect();
        *to += &fields.join(" ");
        to.push('\n');
    }
}

/// Writes what comes, at the latest when a barrier passes: at least once.
struct Write {
    process: Arc<Process>,
    lines: String,
}

impl Operator for Write {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        add_lines(&mut self.lines, &batch);
        Ok(())
    }

    fn flush(&mut self, _: &mut Output) -> Result<()> {
        if self.lines.is_empty() {
            return Ok(());
        }
        self.process.look_up()?;
        let lines = std::mem::take(&mut self.lines);
        self.process.world.broker().append(lines.lines().map(str::to_owned).collect());
        Ok(())
    }
}

/// Stages what comes.
struct Stage {
    process: Arc<Process>,
    index: u32,
    lines: String,
}

impl Operator for Stage {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        add_lines(&mut self.lines, &batch);
        Ok(())
    }

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        let staged = Bytes::from(std::mem::take(&mut self.lines));
        let world = &self.process.world;
        world
            .trace
            .line(self.process.pid, || format!("sink[{}] stages at {barrier}: {:?}", self.index, lines(&staged)));
        let rows = staged.iter().filter(|b| **b == b'\n').count() as u64;
        Ok(StateSnapshot::of(vec![PendingShard::new(ShardKind::Staged, None, rows, Box::new(|| Ok(staged)))]))
    }
}

/// Writes to the broker under the identity of one subtask.
struct Producer {
    process: Arc<Process>,
    id: ProducerId,
    history: String,
    /// The producer's epoch at the broker, by which it fences.
    epoch: u64,
}

impl Producer {
    fn lost<T>(&self, what: &str) -> Result<T> {
        Err(Error::retry(format!("{what}: no reply")))
    }

    fn refused(&self, refusal: Refusal) -> Error {
        match refusal {
            Refusal::Fenced => {
                Error::fenced(format!("{}[{}]: a newer producer has this identity", self.id.0, self.id.1))
            }
            Refusal::NoTransaction => Error::retry("the transaction is over"),
        }
    }
}

impl Committer for Producer {
    fn open(&mut self) -> Result<Option<Epoch>> {
        let world = self.process.world.clone();
        self.process.reach("open")?;
        self.process.block(world.random(|r| r.spread(Duration::from_micros(200), Duration::from_millis(20))));
        let strike = world.strike(self.process.pid);
        if strike == Strike::Before {
            return self.lost("open");
        }
        self.epoch = world.broker().init(&self.id);
        world.trace.line(self.process.pid, || format!("{:?} takes the producer over as {}", self.id, self.epoch));
        if strike == Strike::After || world.strikes("broker replies lost", |f| f.broker_reply_lost) {
            return self.lost("open");
        }
        let marker = world.broker().marker_of(&self.id, &self.history);
        Ok(if world.mutation == Some(Mutation::MarkerIgnored) { None } else { marker })
    }

    fn commit(&mut self, epoch: Epoch, staged: &[Bytes], step: &dyn Fn(Step)) -> Result<()> {
        let world = self.process.world.clone();
        step(Step::BeforeTransaction);
        self.process.reach("commit")?;
        self.process.block(world.random(|r| r.spread(Duration::from_micros(300), Duration::from_millis(40))));
        if world.strike(self.process.pid) == Strike::Before {
            return self.lost("write");
        }
        if world.mutation == Some(Mutation::FencingOff) {
            self.epoch = world.broker().init(&self.id);
        }
        let records: Vec<String> = staged.iter().flat_map(lines).collect();
        world.trace.line(self.process.pid, || format!("{:?} writes for {epoch}: {records:?}", self.id));
        let written = world.broker().write(&self.id, self.epoch, records);
        let transaction = written.map_err(|r| self.refused(r))?;
        let (at, id) = (world.clone(), self.id.clone());
        world.core.after(world.plan.transaction_timeout, move || at.broker().time_out(&id, transaction));
        step(Step::InTransaction);
        if self.process.is_dead() || world.strikes("transactions left open", |f| f.transaction_left_open) {
            return self.lost("commit");
        }
        if world.strikes("commits late", |f| f.commit_late) {
            let delay = world.random(|r| r.spread(Duration::from_millis(10), Duration::from_secs(10)));
            let (at, pid, id, own, history) =
                (world.clone(), self.process.pid, self.id.clone(), self.epoch, self.history.clone());
            world.core.after(delay, move || {
                let done = at.broker().commit(&id, own, transaction, (history, epoch));
                at.trace.line(pid, || format!("{id:?} commits {epoch} late: {done:?}"));
                check(&at, epoch, done);
            });
            return self.lost("commit");
        }
        let strike = world.strike(self.process.pid);
        if strike == Strike::Before {
            return self.lost("commit");
        }
        let done = world.broker().commit(&self.id, self.epoch, transaction, (self.history.clone(), epoch));
        world.trace.line(self.process.pid, || format!("{:?} commits {epoch}: {done:?}", self.id));
        check(&world, epoch, done);
        done.map_err(|r| self.refused(r))?;
        step(Step::AfterTransaction);
        if strike == Strike::After || world.strikes("broker replies lost", |f| f.broker_reply_lost) {
            return self.lost("commit");
        }
        Ok(())
    }
}

/// What is visible must be in a checkpoint that exists.
fn check(world: &crate::world::World, epoch: Epoch, done: Result<(), Refusal>) {
    if done.is_ok() {
        let completed = {
            let mut monitor = world.monitor();
            monitor.count("transactions committed");
            monitor.was_completed(epoch)
        };
        if !completed {
            world.violation(format!("records of checkpoint {epoch} are visible, and it is not completed"));
        }
    }
}

fn lines(bytes: &Bytes) -> Vec<String> {
    String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect()
}
