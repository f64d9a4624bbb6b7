//! The job: numbered rows of two splits, checked for gaps, counted per key behind a shuffle. Each row becomes a line `key
//! count`, so that a row that is lost, repeated or out of order breaks the counts of its key.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use arrow::{
    array::{ArrayRef, AsArray, Int64Array},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
    record_batch::RecordBatch,
};
use floodmark_dataflow::{
    Barrier, Batch, Edge, Exchange, JobGraph, Node, Operator, Output, PendingShard, Port, RestoredShard, StateSnapshot,
    SubtaskContext, TaskId, Vertex,
    graph::{NodeKind, Parallelism},
    hash::hash_keys,
    sink::{Committer, SinkFactory},
    source::{Polled, Source, SourceFactory, SourceNode},
};
use floodmark_snapshot::{Epoch, Error, Result, ShardKind, SplitState, block::BlockWriter};
use floodmark_state::{Column, ColumnType, KeyGroupWatermarks, KeyedState, Layout, RowKeys, Rows, Table};
use serde_json::json;

use crate::world::{STAGED, SharedTopic, Writer};

/// Rows of each split.
pub const ROWS: i64 = 150;
/// Keys that rows are dealt out to.
pub const KEYS: i64 = 7;
/// Splits of the source.
pub const SPLITS: i64 = 2;
/// Rows of a batch.
const BATCH: i64 = 4;

/// The key of a row.
#[must_use]
pub fn key_of(split: i64, number: i64) -> i64 {
    (number * 5 + split * 3) % KEYS
}

/// The job's graph; its output goes to this topic. Its source says `pauses` times that there is nothing before each batch.
#[must_use]
pub fn graph(topic: &SharedTopic, pauses: u32) -> JobGraph {
    let node = |uid: &str, state: Option<&str>, node: NodeKind| Node {
        uid: uid.into(),
        kind: uid.to_owned(),
        description: uid.to_owned(),
        state_schema: state.map(Into::into),
        node,
    };
    let numbers = SourceNode { factory: Arc::new(Numbers { pauses }), compute: None, watermark: None };
    let gaps = |_: &SubtaskContext| -> Result<Box<dyn Operator>> { Ok(Box::new(Gaps { last: BTreeMap::new() })) };
    let counts = |context: &SubtaskContext| -> Result<Box<dyn Operator>> {
        Ok(Box::new(Counts(context.keyed("", Arc::new(CountLayout), None)?)))
    };
    let vertex = |chain: Vec<Node>| Vertex { chain, parallelism: Parallelism::Job };
    JobGraph {
        vertices: vec![
            vertex(vec![
                node("numbers", None, NodeKind::Source(numbers)),
                node("gaps", Some("last number of each split"), NodeKind::Operator(Arc::new(gaps))),
            ]),
            vertex(vec![
                node("counts", Some("key, count"), NodeKind::Operator(Arc::new(counts))),
                node("topic", None, NodeKind::Sink(Arc::new(TopicSink(topic.clone())))),
            ]),
        ],
        edges: vec![Edge { from: TaskId(0), to: TaskId(1), port: 0, exchange: Exchange::Hash(vec![0]) }],
        fingerprint: "numbers counted per key".to_owned(),
    }
}

fn rows_of(columns: Vec<(&str, Vec<i64>)>) -> Result<RecordBatch> {
    let columns = columns.into_iter().map(|(name, values)| (name, Arc::new(Int64Array::from(values)) as ArrayRef));
    RecordBatch::try_from_iter(columns).map_err(|e| Error::abort(format!("make rows: {e}")))
}

fn column<'a>(rows: &'a RecordBatch, name: &str) -> Result<&'a Int64Array> {
    let column = rows.column_by_name(name).and_then(|c| c.as_primitive_opt::<Int64Type>());
    column.ok_or_else(|| Error::abort(format!("rows have no column {name}")))
}

struct Numbers {
    pauses: u32,
}

impl SourceFactory for Numbers {
    fn kind(&self) -> String {
        "numbers".to_owned()
    }

    fn bounded(&self) -> bool {
        true
    }

    fn splits(&self, restored: &[SplitState]) -> Result<Vec<SplitState>> {
        let fresh = |s: i64| SplitState { split: s.to_string(), position: json!(0), watermark: None, finished: false };
        Ok(if restored.is_empty() { (0..SPLITS).map(fresh).collect() } else { restored.to_vec() })
    }

    fn open(&self, splits: Vec<SplitState>, _: &SubtaskContext) -> Result<Box<dyn Source>> {
        Ok(Box::new(Reader { splits, turn: 0, pauses: self.pauses, paused: 0 }))
    }
}

struct Reader {
    splits: Vec<SplitState>,
    turn: usize,
    pauses: u32,
    paused: u32,
}

impl Source for Reader {
    fn poll(&mut self, _: Duration) -> Result<Polled> {
        let Some(ahead) = (1..=self.splits.len()).find(|i| {
            let split = (self.turn + i) % self.splits.len();
            !self.splits[split].finished
        }) else {
            return Ok(Polled::Exhausted);
        };
        if self.paused < self.pauses {
            self.paused += 1;
            return Ok(Polled::Pending);
        }
        self.paused = 0;
        self.turn = (self.turn + ahead) % self.splits.len();
        let state = &mut self.splits[self.turn];
        let damaged = || Error::corrupt("a position that is no number");
        let next = state.position.as_i64().filter(|n| (0..=ROWS).contains(n)).ok_or_else(damaged)?;
        let split: i64 = state.split.parse().map_err(|_| damaged())?;
        if next == ROWS {
            state.finished = true;
            return Ok(Polled::SplitFinished { split: self.turn });
        }
        let numbers: Vec<i64> = (next..(next + BATCH).min(ROWS)).collect();
        state.position = json!(next + numbers.len() as i64);
        let keys = numbers.iter().map(|n| key_of(split, *n)).collect();
        let splits = vec![split; numbers.len()];
        let rows = rows_of(vec![("key", keys), ("split", splits), ("number", numbers)])?;
        Ok(Polled::Batch { split: self.turn, rows })
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        Ok(self.splits.clone())
    }
}

/// Fails at a row that is not the next of its split. Keeps the last number of each split as a union list: wherever a split is
/// read after a restore, its last number is known.
struct Gaps {
    last: BTreeMap<i64, i64>,
}

impl Operator for Gaps {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        for (split, number) in
            column(&batch.rows, "split")?.values().iter().zip(column(&batch.rows, "number")?.values())
        {
            let last = self.last.entry(*split).or_insert(-1);
            if *number != *last + 1 {
                return Err(Error::abort(format!("split {split}: {number} came after {last}")));
            }
            *last = *number;
        }
        out.emit(batch);
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let list: Vec<(i64, i64)> = self.last.iter().map(|(s, n)| (*s, *n)).collect();
        let rows = list.len() as u64;
        let encode =
            move || serde_json::to_vec(&list).map(Into::into).map_err(|e| Error::abort(format!("encode list: {e}")));
        let mut shard = PendingShard::new(ShardKind::Union, None, rows, Box::new(encode));
        shard.name = Some("last".to_owned());
        Ok(StateSnapshot::of(vec![shard]))
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        for shard in shards {
            let list: Vec<(i64, i64)> =
                serde_json::from_slice(shard.file()?).map_err(|e| Error::corrupt(format!("list: {e}")))?;
            for (split, number) in list {
                let last = self.last.entry(split).or_insert(number);
                *last = number.max(*last);
            }
        }
        Ok(())
    }
}

struct CountLayout;

impl Layout for CountLayout {
    fn types(&self) -> Vec<ColumnType> {
        vec![ColumnType::Long]
    }

    fn schema(&self) -> SchemaRef {
        let field = |name: &str| Field::new(name, DataType::Int64, false);
        Arc::new(Schema::new(vec![field("key"), field("count")]))
    }

    fn encode(&self, _: i64, rows: &Rows, slots: &[u32]) -> Result<RecordBatch> {
        let key = |slot: &u32| rows.key(*slot).try_into().map(i64::from_le_bytes);
        let keys: Int64Array = slots.iter().filter_map(|slot| key(slot).ok()).collect();
        let counts: Int64Array = slots.iter().map(|slot| Some(rows.long(*slot as usize, 0).unwrap_or(0))).collect();
        RecordBatch::try_new(self.schema(), vec![Arc::new(keys), Arc::new(counts)])
            .map_err(|e| Error::abort(format!("encode counts: {e}")))
    }

    fn decode(&self, batch: &RecordBatch) -> Result<RowKeys> {
        let keys = column(batch, "key")?;
        let hashes = hash_keys(&[Arc::new(keys.clone()) as ArrayRef], keys.len())?;
        let mut all = RowKeys::default();
        keys.values().iter().zip(hashes).for_each(|(key, hash)| all.push(0, hash, &key.to_le_bytes()));
        Ok(all)
    }

    fn hashes(&self, keys: &[&[u8]]) -> Result<Vec<u64>> {
        let number = |key: &[u8]| key.try_into().map(i64::from_le_bytes);
        let numbers = keys.iter().map(|key| number(key).map_err(|_| Error::abort("a key that is no number")));
        let numbers = numbers.collect::<Result<Vec<_>>>()?;
        hash_keys(&[Arc::new(Int64Array::from(numbers)) as ArrayRef], keys.len())
    }

    fn fill(&self, batch: &RecordBatch, table: &mut Table, slots: &[u32]) -> Result<()> {
        let counts = column(batch, "count")?;
        table.write_runs(slots, 0, |to, places, first| {
            if let Column::Long(values) = to {
                places.iter().enumerate().for_each(|(i, at)| values[*at as usize] = Some(counts.value(first + i)));
            }
        });
        Ok(())
    }
}

/// Counts the rows of each key, and emits key and count for each row.
struct Counts(Box<dyn KeyedState>);

impl Operator for Counts {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        let keys = column(&batch.rows, "key")?.values().to_vec();
        let hashes = batch.hashes.ok_or_else(|| Error::abort("rows came without hashes"))?;
        let bytes: Vec<[u8; 8]> = keys.iter().map(|k| k.to_le_bytes()).collect();
        let slots = self.0.slots(0, &hashes, &bytes.iter().map(|b| &b[..]).collect::<Vec<_>>())?;
        let mut counts = Vec::with_capacity(keys.len());
        self.0.table(0).write_runs(&slots.at, 0, |to, places, _| {
            if let Column::Long(values) = to {
                for at in places {
                    let count = values[*at as usize].unwrap_or(0) + 1;
                    values[*at as usize] = Some(count);
                    counts.push(count);
                }
            }
        });
        out.emit(Batch::new(rows_of(vec![("key", keys), ("count", counts)])?));
        Ok(())
    }

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        self.0.snapshot(barrier, &KeyGroupWatermarks::default())
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        shards.iter().try_for_each(|shard| self.0.restore(shard))
    }

    fn restored(&mut self) -> Result<()> {
        self.0.restored().map(drop)
    }

    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        self.0.completed(epoch)
    }

    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.0.aborted(epoch)
    }
}

struct TopicSink(SharedTopic);

impl SinkFactory for TopicSink {
    fn kind(&self) -> String {
        "topic".to_owned()
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn create(&self, _: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Stage { lines: String::new(), rows: 0 }))
    }

    fn committer(&self, index: u32, history: &str) -> Result<Option<Box<dyn Committer>>> {
        Ok(Some(Box::new(Writer { topic: self.0.clone(), index, history: history.to_owned() })))
    }

    fn visible(&self, index: u32, history: &str) -> Result<Option<Epoch>> {
        Ok(self.0.lock().markers.get(&(history.to_owned(), index)).copied())
    }
}

/// Stages a line per row.
struct Stage {
    lines: String,
    rows: u64,
}

impl Operator for Stage {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        for (key, count) in column(&batch.rows, "key")?.values().iter().zip(column(&batch.rows, "count")?.values()) {
            self.lines += &format!("{key} {count}\n");
            self.rows += 1;
        }
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let (lines, rows) = (std::mem::take(&mut self.lines), std::mem::take(&mut self.rows));
        if rows == 0 {
            return Ok(StateSnapshot::default());
        }
        let encode = move || {
            let mut blocks = BlockWriter::new(STAGED);
            blocks.push(lines.as_bytes())?;
            Ok(blocks.finish())
        };
        Ok(StateSnapshot::of(vec![PendingShard::new(ShardKind::Staged, None, rows, Box::new(encode))]))
    }
}
