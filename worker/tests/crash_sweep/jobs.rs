//! Three small jobs, and what they must have written in the end.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use arrow::{
    array::{AsArray, Int64Array},
    datatypes::Int64Type,
    record_batch::RecordBatch,
};
use bytes::Bytes;
use floodmark_dataflow::{
    Barrier, Batch, Edge, Exchange, JobGraph, Node, Operator, Output, PendingShard, Port, RestoredShard, StateSnapshot,
    SubtaskContext, TaskId, Vertex,
    graph::{NodeKind, Parallelism},
    hash::hash_keys,
    sink::{Committer, SinkFactory},
    source::{Polled, Source, SourceFactory, SourceNode},
};
use floodmark_snapshot::{Error, Result, ShardKind, SplitState};
use serde_json::json;

use crate::world::{Connection, TopicCommitter};

/// Rows of each split.
pub(crate) const ROWS: i64 = 120;
/// Keys that rows are dealt out to.
const KEYS: i64 = 5;
const SPLITS: i64 = 3;

/// A topology to be swept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// Source and sink in one chain.
    Stateless,
    /// Numbers counted per key behind a shuffle.
    Counted,
    /// The same, of two sources of which one is ten times slower.
    TwoSpeeds,
}

impl Job {
    pub(crate) const ALL: [Self; 3] = [Self::Stateless, Self::Counted, Self::TwoSpeeds];

    pub(crate) fn graph(self, connection: &Arc<Connection>) -> JobGraph {
        let node = |uid: &str, state: Option<&str>, node: NodeKind| Node {
            uid: uid.into(),
            kind: uid.to_owned(),
            description: uid.to_owned(),
            state_schema: state.map(Into::into),
            node,
        };
        let source = |uid: &str, pause: u64, first: i64| {
            let factory = Arc::new(Numbers { pause: Duration::from_micros(pause), first });
            node(uid, None, NodeKind::Source(SourceNode { factory, compute: None, watermark: None }))
        };
        let counter = || {
            let make = |context: &SubtaskContext| -> Result<Box<dyn Operator>> {
                Ok(Box::new(Counter { counts: BTreeMap::new(), context: context.clone() }))
            };
            node("counter", Some("key, count"), NodeKind::Operator(Arc::new(make)))
        };
        let sink = || node("sink", None, NodeKind::Sink(Arc::new(TopicSink(connection.clone()))));
        let vertex = |chain: Vec<Node>| Vertex { chain, parallelism: Parallelism::Job };
        let edge = |from, to| Edge { from: TaskId(from), to: TaskId(to), port: 0, exchange: Exchange::Hash(vec![0]) };
        let (vertices, edges) = match self {
            Self::Stateless => (vec![vertex(vec![source("numbers", 150, 0), sink()])], vec![]),
            Self::Counted => {
                (vec![vertex(vec![source("numbers", 150, 0)]), vertex(vec![counter(), sink()])], vec![edge(0, 1)])
            }
            Self::TwoSpeeds => (
                vec![
                    vertex(vec![source("fast", 30, 0)]),
                    vertex(vec![source("slow", 300, 1_000_000)]),
                    vertex(vec![counter(), sink()]),
                ],
                vec![edge(0, 2), edge(1, 2)],
            ),
        };
        JobGraph { vertices, edges, fingerprint: format!("{self:?}") }
    }

    /// What is wrong with the topic, in words; empty if nothing is. Knows nothing of checkpoints: only what was put in.
    pub(crate) fn faults(self, records: &[String]) -> String {
        match self {
            Self::Stateless => {
                // Each split's numbers, once each and in their order.
                let mut next = BTreeMap::new();
                for record in records {
                    let number: i64 = record.parse().unwrap();
                    let expected = next.entry(number / ROWS).or_insert(number / ROWS * ROWS);
                    if number != *expected {
                        return format!("{number} came where {expected} was due");
                    }
                    *expected += 1;
                }
                missing(records.len() as i64, SPLITS * ROWS)
            }
            Self::Counted | Self::TwoSpeeds => {
                // Each key's counts 1, 2, 3, …: one lost, repeated or out of order breaks the row.
                let mut counts: BTreeMap<i64, i64> = BTreeMap::new();
                for record in records {
                    let (key, count) = record.split_once(' ').unwrap();
                    let last = counts.entry(key.parse().unwrap()).or_default();
                    if count.parse() != Ok(*last + 1) {
                        return format!("key {key}: {count} came after {last}");
                    }
                    *last += 1;
                }
                let sources = if self == Self::TwoSpeeds { 2 } else { 1 };
                missing(counts.values().sum(), sources * SPLITS * ROWS)
            }
        }
    }
}

fn missing(found: i64, expected: i64) -> String {
    if found == expected { String::new() } else { format!("{found} rows instead of {expected}") }
}

/// The numbers of some splits: split s has `first + s * ROWS ..`.
struct Numbers {
    pause: Duration,
    first: i64,
}

impl SourceFactory for Numbers {
    fn kind(&self) -> String {
        "numbers".to_owned()
    }

    fn bounded(&self) -> bool {
        true
    }

    fn splits(&self, restored: &[SplitState]) -> Result<Vec<SplitState>> {
        let split = |s: i64| SplitState {
            split: s.to_string(),
            position: json!(self.first + s * ROWS),
            watermark: None,
            finished: false,
        };
        Ok(if restored.is_empty() { (0..SPLITS).map(split).collect() } else { restored.to_vec() })
    }

    fn open(&self, splits: Vec<SplitState>, _: &SubtaskContext) -> Result<Box<dyn Source>> {
        Ok(Box::new(Reader { splits, turn: 0, pause: self.pause, first: self.first }))
    }
}

struct Reader {
    splits: Vec<SplitState>,
    turn: usize,
    pause: Duration,
    first: i64,
}

impl Source for Reader {
    #[allow(clippy::disallowed_methods, reason = "a test's source takes its time")]
    fn poll(&mut self, _: Duration) -> Result<Polled> {
        if self.splits.iter().all(|s| s.finished) {
            return Ok(Polled::Exhausted);
        }
        std::thread::sleep(self.pause);
        loop {
            self.turn = (self.turn + 1) % self.splits.len();
            if !self.splits[self.turn].finished {
                break;
            }
        }
        let state = &mut self.splits[self.turn];
        let next = state.position.as_i64().unwrap();
        let end = self.first + (state.split.parse::<i64>().unwrap() + 1) * ROWS;
        if next == end {
            state.finished = true;
            return Ok(Polled::SplitFinished { split: self.turn });
        }
        let to = (next + 3).min(end);
        state.position = json!(to);
        let keys: Int64Array = (next..to).map(|n| n % KEYS).collect();
        let numbers: Int64Array = (next..to).collect();
        let rows = RecordBatch::try_from_iter([("key", Arc::new(keys) as _), ("n", Arc::new(numbers) as _)]);
        Ok(Polled::Batch { split: self.turn, rows: rows.unwrap() })
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        Ok(self.splits.clone())
    }
}

/// Counts rows per key, and emits `key, count` for each row.
struct Counter {
    counts: BTreeMap<i64, i64>,
    context: SubtaskContext,
}

impl Operator for Counter {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        let keys = batch.rows.column(0).as_primitive::<Int64Type>().clone();
        let mut counts = Vec::with_capacity(keys.len());
        for key in keys.values() {
            let count = self.counts.entry(*key).or_default();
            *count += 1;
            counts.push(*count);
        }
        let columns = [("key", Arc::new(keys) as _), ("count", Arc::new(Int64Array::from(counts)) as _)];
        out.emit(Batch::new(RecordBatch::try_from_iter(columns).unwrap()));
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let counts: Vec<_> = self.counts.iter().map(|(k, c)| (*k, *c)).collect();
        let (rows, groups) = (counts.len() as u64, Some(self.context.key_groups));
        let encode = Box::new(move || Ok(serde_json::to_vec(&counts).unwrap().into()));
        Ok(StateSnapshot::of(vec![PendingShard::new(ShardKind::Keyed, groups, rows, encode)]))
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        for shard in shards {
            let counts: Vec<(i64, i64)> =
                serde_json::from_slice(&shard.bytes).map_err(|e| Error::corrupt(e.to_string()))?;
            for (key, count) in counts {
                let hash = hash_keys(&[Arc::new(Int64Array::from(vec![key]))], 1)?[0];
                if self.context.owns(hash) {
                    assert_eq!(self.counts.insert(key, count), None, "a key in two shards");
                }
            }
        }
        Ok(())
    }
}

struct TopicSink(Arc<Connection>);

impl SinkFactory for TopicSink {
    fn kind(&self) -> String {
        "topic sink".to_owned()
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn create(&self, _: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Stage(String::new())))
    }

    fn committer(&self, index: u32, _: &str) -> Result<Option<Box<dyn Committer>>> {
        Ok(Some(Box::new(TopicCommitter::new(self.0.clone(), index))))
    }
}

/// Stages a line per row: the number, or key and count.
struct Stage(String);

impl Operator for Stage {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        let column = |name: &str| batch.rows.column_by_name(name).map(|c| c.as_primitive::<Int64Type>());
        for row in 0..batch.len() {
            self.0 += &match (column("key"), column("n"), column("count")) {
                (Some(key), _, Some(count)) => format!("{} {}\n", key.value(row), count.value(row)),
                (_, Some(n), _) => format!("{}\n", n.value(row)),
                _ => unreachable!("rows have a number or a count"),
            };
        }
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let staged = Bytes::from(std::mem::take(&mut self.0));
        let rows = staged.iter().filter(|b| **b == b'\n').count() as u64;
        Ok(StateSnapshot::of(vec![PendingShard::new(ShardKind::Staged, None, rows, Box::new(|| Ok(staged)))]))
    }
}
