//! The input ledger: every record that will ever be read, known beforehand, and when it arrives.

use std::{sync::Arc, time::Duration};

use arrow::{
    array::{ArrayRef, Int64Array},
    compute::cast,
    datatypes::{DataType, Field, Schema, SchemaRef},
    record_batch::{RecordBatch, RecordBatchOptions},
};
use floodmark_dataflow::{
    SubtaskContext,
    source::{Polled, Source, SourceFactory},
};
use floodmark_snapshot::{Error, Result, SplitState};
use serde_json::json;

use crate::{Mutation, plan::Plan, process::Process, random::Random};

/// Records of one partition are numbered from a multiple of this.
pub(crate) const PARTITION_STRIDE: i64 = 1_000_000;
/// Event time runs ahead of, or behind, its partition's by at most this, milliseconds.
pub(crate) const DISORDER_MS: i64 = 700;

/// A record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    /// When it can first be read, virtual time.
    pub(crate) arrives: Duration,
    pub(crate) key: i64,
    /// Event time, milliseconds.
    pub(crate) time: i64,
    pub(crate) value: i64,
    /// Unique: tells partition and place.
    pub(crate) id: i64,
}

/// Partitions of up to two topics.
#[derive(Debug)]
pub(crate) struct Inputs(Vec<Vec<Vec<Record>>>);

impl Inputs {
    pub(crate) fn draw(plan: &Plan) -> Self {
        let random = &mut Random::new(plan.seed, 3);
        let topics = (0..2_i64).map(|topic| {
            // The second topic is slower: it has a tenth of the records over the same time.
            let records = if topic == 0 { plan.records } else { plan.records.div_ceil(10) };
            let partitions = if topic == 0 { plan.partitions } else { plan.partitions.div_ceil(2) };
            (0..partitions).map(|p| partition(plan, records, topic * 100 + p as i64, random)).collect()
        });
        Self(topics.collect())
    }

    pub(crate) fn topic(&self, topic: usize) -> &[Vec<Record>] {
        &self.0[topic]
    }
}

fn partition(plan: &Plan, records: usize, number: i64, random: &mut Random) -> Vec<Record> {
    let mut arrives: Vec<u64> = (0..records).map(|_| random.below(plan.arrival.as_nanos() as u64)).collect();
    arrives.sort_unstable();
    let record = |(place, arrives): (usize, u64)| Record {
        arrives: Duration::from_nanos(arrives),
        key: random.below(plan.keys as u64) as i64,
        time: place as i64 * 40 + random.below(DISORDER_MS as u64) as i64,
        value: random.below(1000) as i64,
        id: number * PARTITION_STRIDE + place as i64,
    };
    arrives.into_iter().enumerate().map(record).collect()
}

/// The columns of a record that somebody wants, each in the type in which he wants it.
#[derive(Clone)]
pub(crate) struct Columns(SchemaRef);

impl Columns {
    /// All of them, as numbers.
    pub(crate) fn all() -> Self {
        let fields = ["key", "time", "value", "id"].map(|name| Field::new(name, DataType::Int64, true));
        Self(Arc::new(Schema::new(fields.to_vec())))
    }

    pub(crate) fn of(schema: SchemaRef) -> Self {
        Self(schema)
    }

    fn rows(&self, records: &[Record]) -> Result<RecordBatch> {
        let column = |field: &Arc<Field>| -> Result<ArrayRef> {
            let number = match field.name().as_str() {
                "key" => |r: &Record| r.key,
                "time" => |r: &Record| r.time,
                "value" => |r: &Record| r.value,
                "id" => |r: &Record| r.id,
                other => return Err(Error::abort(format!("a record has no {other}"))),
            };
            let numbers: ArrayRef = Arc::new(records.iter().map(number).collect::<Int64Array>());
            match field.data_type() {
                DataType::Int64 => Ok(numbers),
                other => cast(&numbers, other).map_err(|e| Error::abort(format!("make rows: {e}"))),
            }
        };
        let columns = self.0.fields().iter().map(column).collect::<Result<_>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(records.len()));
        RecordBatch::try_new_with_options(self.0.clone(), columns, &options)
            .map_err(|e| Error::abort(format!("make rows: {e}")))
    }
}

/// A topic as a bounded source.
pub(crate) struct Topic {
    pub(crate) process: Arc<Process>,
    pub(crate) topic: usize,
    pub(crate) columns: Columns,
}

impl SourceFactory for Topic {
    fn kind(&self) -> String {
        "simulated source".to_owned()
    }

    fn bounded(&self) -> bool {
        true
    }

    fn splits(&self, restored: &[SplitState]) -> Result<Vec<SplitState>> {
        self.process.look_up()?;
        let partitions = self.process.world.inputs.topic(self.topic);
        let split = |number: usize| {
            let name = format!("{}-{number}", self.topic);
            let known = restored.iter().find(|s| s.split == name).cloned();
            known.unwrap_or(SplitState { split: name, position: json!(0), watermark: None, finished: false })
        };
        Ok((0..partitions.len()).map(split).collect())
    }

    fn open(&self, splits: Vec<SplitState>, context: &SubtaskContext) -> Result<Box<dyn Source>> {
        let number = |s: &SplitState| s.split.rsplit('-').next().and_then(|n| n.parse().ok());
        let partitions = splits.iter().filter_map(number).collect();
        let skips = self.process.world.mutation == Some(Mutation::PositionAhead);
        let next = |s: &SplitState| {
            let at = s.position.as_u64().unwrap_or_default() as usize;
            if skips && at > 0 { at + 1 } else { at }
        };
        Ok(Box::new(Reader {
            process: self.process.clone(),
            topic: self.topic,
            columns: self.columns.clone(),
            next: splits.iter().map(next).collect(),
            partitions,
            turn: context.index as usize,
            splits,
        }))
    }
}

struct Reader {
    process: Arc<Process>,
    topic: usize,
    columns: Columns,
    splits: Vec<SplitState>,
    /// The partition of each split.
    partitions: Vec<usize>,
    /// The next record of each split.
    next: Vec<usize>,
    turn: usize,
}

impl Source for Reader {
    fn poll(&mut self, wait: Duration) -> Result<Polled> {
        let world = self.process.world.clone();
        if world.strikes("source polls failed", |f| f.source_fails) {
            return Err(Error::retry("the simulated source fails"));
        }
        if self.splits.iter().all(|s| s.finished) {
            return Ok(Polled::Exhausted);
        }
        let now = world.core.now();
        for step in 0..self.splits.len() {
            let split = (self.turn + step) % self.splits.len();
            let records = &world.inputs.topic(self.topic)[self.partitions[split]];
            let from = self.next[split].min(records.len());
            let most = from + world.random(|r| r.between(1, 7)) as usize;
            let here = records[from..most.min(records.len())].iter().take_while(|r| r.arrives <= now).count();
            if here > 0 {
                self.turn = split + 1;
                self.next[split] = from + here;
                return Ok(Polled::Batch { split, rows: self.columns.rows(&records[from..from + here])? });
            }
            if from == records.len() && !self.splits[split].finished {
                self.splits[split].finished = true;
                return Ok(Polled::SplitFinished { split });
            }
        }
        self.process.block(wait);
        Ok(Polled::Pending)
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        let position = |(split, next): (&SplitState, &usize)| SplitState { position: json!(next), ..split.clone() };
        Ok(self.splits.iter().zip(&self.next).map(position).collect())
    }
}
