//! A connector whose rows stand in its declaration, and a driver that runs a graph to its end.

use std::{collections::HashMap, io::Cursor, sync::Arc, time::Duration};

use arrow::{
    datatypes::{DataType, SchemaRef},
    json::ReaderBuilder,
    record_batch::RecordBatch,
    util::display::{ArrayFormatter, FormatOptions},
};
use floodmark_dataflow::{
    Barrier, Batch, JobGraph, Operator, Output, PendingShard, Port, ROW_KIND, RestoredShard, RowKind, SubtaskContext,
    TaskId, WATERMARK_MAX,
    connector::{Connector, Connectors, Guarantee, PlanContext, SinkInput, TableDef, TableError},
    graph::NodeKind,
    sink::{Committer, SinkFactory, SinkNode},
    source::{Polled, Source, SourceFactory},
};
use floodmark_snapshot::{Env, Epoch, Error, JobId, KeyGroupRange, Result, Shard, SplitState, TimestampMs};
use floodmark_state::{StateSettings, shard::Reader};

use super::shaped::ShapedHeap;
use crate::{PlanOptions, SqlError, plan};

/// `'connector' = 'rows', 'rows' = '…'`: JSON rows, a line each. As a sink: takes anything.
struct Rows;

impl Connector for Rows {
    fn name(&self) -> &'static str {
        "rows"
    }

    fn source(
        &self,
        table: &TableDef,
        projection: &SchemaRef,
        _: &PlanContext,
    ) -> Result<Arc<dyn SourceFactory>, TableError> {
        let rows = table.options.get("rows").map_or(String::new(), |o| o.value.clone());
        Ok(Arc::new(RowsFactory { rows, schema: projection.clone() }))
    }

    fn sink(&self, table: &TableDef, input: &SinkInput, _: &PlanContext) -> Result<SinkNode, TableError> {
        if input.changelog && table.primary_key.is_empty() && table.options.contains_key("insert-only") {
            return Err(TableError::table("updates need a PRIMARY KEY"));
        }
        Ok(Arc::new(RowsSink))
    }
}

struct RowsFactory {
    rows: String,
    schema: SchemaRef,
}

impl SourceFactory for RowsFactory {
    fn kind(&self) -> String {
        "rows source".into()
    }

    fn bounded(&self) -> bool {
        true
    }

    fn splits(&self, _: &[SplitState]) -> Result<Vec<SplitState>> {
        Ok(Vec::new())
    }

    fn open(&self, _: Vec<SplitState>, _: &SubtaskContext) -> Result<Box<dyn Source>> {
        let lines: Vec<String> = self.rows.lines().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).collect();
        let batches = lines.chunks(2).map(|two| decode(&self.schema, &two.join("\n"))).collect();
        Ok(Box::new(RowsSource(batches)))
    }
}

fn decode(schema: &SchemaRef, rows: &str) -> RecordBatch {
    if schema.fields().is_empty() {
        return crate::operators::partial::batch(schema, Vec::new(), rows.lines().count()).unwrap();
    }
    ReaderBuilder::new(schema.clone()).build(Cursor::new(rows)).unwrap().next().unwrap().unwrap()
}

struct RowsSource(std::collections::VecDeque<RecordBatch>);

impl Source for RowsSource {
    fn poll(&mut self, _: Duration) -> Result<Polled> {
        Ok(self.0.pop_front().map_or(Polled::Exhausted, |rows| Polled::Batch { split: 0, rows }))
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        Ok(Vec::new())
    }
}

struct RowsSink;

impl SinkFactory for RowsSink {
    fn kind(&self) -> String {
        "rows sink".into()
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn create(&self, _: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Err(Error::abort("the driver takes the rows itself"))
    }

    fn committer(&self, _: u32, _: &str) -> Result<Option<Box<dyn Committer>>> {
        Ok(None)
    }

    fn visible(&self, _: u32, _: &str) -> Result<Option<Epoch>> {
        Ok(None)
    }
}

/// Plans with the connector `rows`.
pub(super) fn planned(sql: &str) -> Result<JobGraph, SqlError> {
    let connectors = Connectors::default().with(Arc::new(Rows));
    let job = JobId { namespace: "test".into(), name: "test".into(), uid: "test".into() };
    let context = PlanContext { job, guarantee: Guarantee::ExactlyOnce };
    plan(sql, &PlanOptions { context, connectors: &connectors })
}

/// Of the one subtask of a task.
pub(super) fn context() -> SubtaskContext {
    context_of(0, 1)
}

pub(super) fn context_of(index: u32, parallelism: u32) -> SubtaskContext {
    SubtaskContext {
        index,
        parallelism,
        max_parallelism: 128,
        key_groups: KeyGroupRange::of_subtask(index, parallelism, 128),
        metrics: Arc::default(),
        state: StateSettings { backend: Arc::new(ShapedHeap), ..StateSettings::default() },
        env: Env::system(),
    }
}

/// Runs a graph, everything in the order of its tasks.
struct Driver {
    graph: JobGraph,
    operators: Vec<Vec<Option<Box<dyn Operator>>>>,
    /// Watermark of each task's inputs, by edge.
    watermarks: HashMap<(usize, usize, Port), TimestampMs>,
    rows: Vec<String>,
    /// Of all operators.
    context: SubtaskContext,
}

impl Driver {
    fn new(graph: JobGraph) -> Self {
        let context = context();
        let made = |node: &floodmark_dataflow::Node| match &node.node {
            NodeKind::Operator(factory) => Some(factory.create(&context).unwrap()),
            NodeKind::Source(_) | NodeKind::Sink(_) => None,
        };
        let operators = graph.vertices.iter().map(|v| v.chain.iter().map(made).collect()).collect();
        Self { graph, operators, watermarks: HashMap::new(), rows: Vec::new(), context }
    }

    /// A batch for the operator at `at` of a task.
    fn process(&mut self, task: usize, at: usize, port: Port, batch: Batch) {
        if batch.is_empty() {
            return;
        }
        let Some(node) = self.graph.vertices[task].chain.get(at) else { return self.route(task, batch) };
        if matches!(node.node, NodeKind::Sink(_)) {
            return self.rows.extend(show(&node.uid.0, &batch.rows));
        }
        let mut out = Output::default();
        self.operators[task][at].as_mut().unwrap().process(port, batch, &mut out).unwrap();
        out.take().into_iter().for_each(|batch| self.process(task, at + 1, 0, batch));
    }

    fn route(&mut self, task: usize, batch: Batch) {
        for edge in self.graph.edges.clone().into_iter().filter(|e| e.from == TaskId(task)) {
            self.process(edge.to.0, 0, edge.port, batch.clone());
        }
    }

    fn watermark(&mut self, task: usize, watermark: TimestampMs) {
        self.each(task, |operator, out| operator.on_watermark(watermark, out).unwrap());
        for edge in self.graph.edges.clone().into_iter().filter(|e| e.from == TaskId(task)) {
            self.watermarks.insert((edge.to.0, task, edge.port), watermark);
            let inputs = self.graph.edges.iter().filter(|e| e.to == edge.to);
            let least = inputs
                .map(|e| self.watermarks.get(&(e.to.0, e.from.0, e.port)).copied().unwrap_or(i64::MIN))
                .min()
                .unwrap_or(i64::MIN);
            if least == watermark {
                self.watermark(edge.to.0, least);
            }
        }
    }

    fn each(&mut self, task: usize, call: impl Fn(&mut dyn Operator, &mut Output)) {
        for at in 0..self.operators[task].len() {
            let mut out = Output::default();
            if let Some(operator) = &mut self.operators[task][at] {
                call(&mut **operator, &mut out);
            }
            out.take().into_iter().for_each(|batch| self.process(task, at + 1, 0, batch));
        }
    }

    /// A snapshot of all, and a new driver restored from it.
    fn restored(mut self) -> Self {
        for task in 0..self.operators.len() {
            self.each(task, |operator, out| operator.flush(out).unwrap());
        }
        let mut next = Self::new(self.graph.clone());
        for task in 0..self.operators.len() {
            for at in 0..self.operators[task].len() {
                let Some(operator) = &mut self.operators[task][at] else { continue };
                let shards = shards_of(&mut **operator, 0);
                if !shards.is_empty() {
                    assert!(self.graph.vertices[task].chain[at].state_schema.is_some(), "state without a schema");
                    let next = next.operators[task][at].as_mut().unwrap();
                    next.restore(shards).unwrap();
                    next.restored().unwrap();
                }
            }
        }
        next.watermarks = self.watermarks;
        next.rows = self.rows;
        next
    }

    /// Reads all rows, without the watermark that ends them.
    fn read_all(&mut self) {
        for task in 0..self.graph.vertices.len() {
            let NodeKind::Source(node) = self.graph.vertices[task].chain[0].node.clone() else { continue };
            let mut reader = node.factory.open(Vec::new(), &context()).unwrap();
            while let Polled::Batch { rows, .. } = reader.poll(Duration::ZERO).unwrap() {
                let rows = node.compute.as_ref().map_or_else(|| rows.clone(), |c| c(rows.clone()).unwrap());
                self.process(task, 1, 0, Batch::new(rows));
            }
        }
        for task in 0..self.operators.len() {
            self.each(task, |operator, out| operator.flush(out).unwrap());
        }
    }

    fn run(mut self, restore: bool) -> Vec<String> {
        let mut sources: Vec<_> = (0..self.graph.vertices.len())
            .filter_map(|task| match &self.graph.vertices[task].chain[0].node {
                NodeKind::Source(source) => {
                    let reader = source.factory.open(Vec::new(), &context()).unwrap();
                    Some((task, source.clone(), reader, i64::MIN))
                }
                NodeKind::Operator(_) | NodeKind::Sink(_) => None,
            })
            .collect();
        while !sources.is_empty() {
            let mut left = Vec::new();
            for (task, node, mut reader, mut reached) in sources {
                match reader.poll(Duration::ZERO).unwrap() {
                    Polled::Batch { rows, .. } => {
                        let rows = node.compute.as_ref().map_or_else(|| rows.clone(), |c| c(rows.clone()).unwrap());
                        let time = node.watermark.as_ref().and_then(|w| (w.event_time)(&rows).unwrap());
                        self.process(task, 1, 0, Batch::new(rows));
                        if let Some(time) = time.filter(|t| *t > reached) {
                            reached = time;
                            self.watermark(task, time);
                        }
                        left.push((task, node, reader, reached));
                    }
                    _ => self.watermark(task, WATERMARK_MAX),
                }
                if restore {
                    self = self.restored();
                }
            }
            sources = left;
        }
        for task in 0..self.operators.len() {
            self.each(task, |operator, out| operator.flush(out).unwrap());
        }
        self.rows
    }
}

/// What a snapshot of an operator of subtask `subtask` holds.
pub(super) fn shards_of(operator: &mut dyn Operator, subtask: u32) -> Vec<RestoredShard> {
    let shard = |pending: PendingShard| {
        let PendingShard { kind, key_groups, rows, layer, name, encode, .. } = pending;
        let bytes = encode().unwrap();
        let shard = Shard { size: bytes.len() as u64, subtask, key_groups, rows, layer, name, ..Shard::new("", kind) };
        RestoredShard::new(shard, bytes)
    };
    operator.snapshot(&Barrier::checkpoint(Epoch(1))).unwrap().pending.into_iter().map(shard).collect()
}

/// The rows of an operator's state, in no order.
fn kept(operator: &mut dyn Operator, subtask: u32) -> Vec<String> {
    let all = KeyGroupRange::of_subtask(0, 1, 128);
    let rows = |shard: RestoredShard| {
        let file = shard.file().unwrap();
        let blocks = Reader::verified(file).unwrap();
        let batches: Vec<Vec<RecordBatch>> = blocks.blocks(file, all).collect::<Result<_>>().unwrap();
        batches.concat().iter().flat_map(|rows| show("state", rows)).collect::<Vec<_>>()
    };
    shards_of(operator, subtask).into_iter().flat_map(rows).collect()
}

/// Reads all rows, then restores every operator that keeps state at `parallelism`, and back at one. However many share the
/// state, they must hold the same rows together, and emit the same at the end of time.
pub(super) fn check_rescaled(sql: &str, parallelism: u32) {
    let graph = planned(sql).unwrap_or_else(|e| panic!("{e}"));
    let mut driver = Driver::new(graph.clone());
    driver.read_all();
    let mut stateful = 0;
    for (task, vertex) in graph.vertices.iter().enumerate() {
        for (at, node) in vertex.chain.iter().enumerate().filter(|(_, n)| n.state_schema.is_some()) {
            let NodeKind::Operator(factory) = &node.node else { continue };
            let shards = shards_of(&mut **driver.operators[task][at].as_mut().unwrap(), 0);
            let restored = |shards: &[RestoredShard], of: u32| -> Vec<Box<dyn Operator>> {
                let one = |index| {
                    let mut operator = factory.create(&context_of(index, of)).unwrap();
                    operator.restore(shards.to_vec()).unwrap();
                    operator.restored().unwrap();
                    operator
                };
                (0..of).map(one).collect()
            };
            let mut many = restored(&shards, parallelism);
            assert!(
                many.iter().filter(|o| o.state_size().0 > 0).count() > 1,
                "the keys of {} share a subtask",
                node.uid
            );
            let shards: Vec<RestoredShard> =
                (0..).zip(&mut many).flat_map(|(index, o)| shards_of(&mut **o, index)).collect();
            let ends = [many, restored(&shards, 1)].map(|operators| {
                let rows: u64 = operators.iter().map(|o| o.state_size().0).sum();
                let mut emitted = Vec::new();
                for (subtask, mut operator) in (0..).zip(operators) {
                    emitted.extend(kept(&mut *operator, subtask));
                    let mut out = Output::default();
                    operator.on_watermark(WATERMARK_MAX, &mut out).unwrap();
                    emitted.extend(out.take().iter().flat_map(|b| show("row", &b.rows)));
                }
                emitted.sort();
                (rows, emitted)
            });
            assert_eq!(ends[0], ends[1], "{}", node.uid);
            assert!(ends[0].0 > 0, "{} has no state to share", node.uid);
            stateful += 1;
        }
    }
    assert!(stateful > 0, "nothing keeps state");
}

/// Rows as text: `sink +I values`.
pub(super) fn show(sink: &str, rows: &RecordBatch) -> Vec<String> {
    let options = FormatOptions::new().with_null("null").with_timestamp_format(Some("%H:%M:%S%.3f"));
    let name = sink.trim_start_matches("sink:");
    let schema = rows.schema();
    let changelog = schema.fields().last().is_some_and(|f| f.name() == ROW_KIND && *f.data_type() == DataType::Int8);
    let columns = rows.num_columns() - usize::from(changelog);
    (0..rows.num_rows())
        .map(|row| {
            let value = |c: usize| ArrayFormatter::try_new(rows.column(c), &options).unwrap().value(row).to_string();
            let kind = if changelog {
                RowKind::from_i8(
                    arrow::array::AsArray::as_primitive::<arrow::datatypes::Int8Type>(rows.column(columns)).value(row),
                )
                .symbol()
            } else {
                "+I"
            };
            format!("{name} {kind} {}", (0..columns).map(value).collect::<Vec<_>>().join(" "))
        })
        .collect()
}

/// Runs a job and compares its rows, in any order (sorted), with those expected. Both straight on, and restored from a
/// snapshot after every batch.
pub(super) fn check(sql: &str, expected: &[&str]) {
    for restore in [false, true] {
        let graph = planned(sql).unwrap_or_else(|e| panic!("{e}"));
        let mut rows = Driver::new(graph).run(restore);
        rows.sort();
        let mut expected: Vec<String> = expected.iter().map(|r| (*r).to_owned()).collect();
        expected.sort();
        assert_eq!(rows, expected, "restored: {restore}\n{}", planned(sql).unwrap());
    }
}

/// As [`check`], but without a restore in between, and the order counts.
pub(super) fn check_in_order(sql: &str, expected: &[&str]) {
    let graph = planned(sql).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(Driver::new(graph).run(false), expected);
}

/// What became of a job, run straight on.
pub(super) struct Run {
    /// The rows of all sinks.
    pub(super) rows: Vec<String>,
    /// Rows that operators left out because of their time.
    pub(super) late: u64,
}

impl Run {
    pub(super) fn of(sql: &str) -> Self {
        let driver = Driver::new(planned(sql).unwrap_or_else(|e| panic!("{e}")));
        let metrics = driver.context.metrics.clone();
        let rows = driver.run(false);
        Self { rows, late: metrics.late.load(std::sync::atomic::Ordering::Relaxed) }
    }
}
