//! Operators of the simulated jobs, small enough that the oracle's answer is easy to see: they keep their state by key, in
//! shards of JSON, and trust nobody to have given them only what is theirs.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{
    array::{ArrayRef, AsArray, Int64Array},
    datatypes::Int64Type,
    record_batch::RecordBatch,
};
use floodmark_dataflow::{
    Barrier, Batch, Operator, OperatorFactory, Output, PendingShard, Port, RestoredShard, StateSnapshot,
    SubtaskContext, hash::hash_keys,
};
use floodmark_snapshot::{Error, Result, ShardKind, TimestampMs};

use crate::{Mutation, process::Process};

/// Length of a window, milliseconds.
pub(crate) const WINDOW_MS: i64 = 500;

/// How to make an operator.
pub(crate) type Make = Arc<dyn OperatorFactory>;

/// Counts the rows of each key: emits key, count and id of every row.
pub(crate) fn counter(process: Arc<Process>) -> Make {
    Arc::new(move |context: &SubtaskContext| -> Result<Box<dyn Operator>> {
        Ok(Box::new(Counter { counts: Keyed::new(context, &process) }))
    })
}

/// Counts and sums the values of each key and window of event time: emits them when the window is over.
pub(crate) fn windows(process: Arc<Process>) -> Make {
    Arc::new(move |context: &SubtaskContext| -> Result<Box<dyn Operator>> {
        Ok(Box::new(Windows {
            sums: Keyed::new(context, &process),
            passed: TimestampMs::MIN,
            process: process.clone(),
        }))
    })
}

/// Passes on what comes.
pub(crate) fn forward() -> Make {
    Arc::new(|_: &SubtaskContext| -> Result<Box<dyn Operator>> { Ok(Box::new(Forward)) })
}

struct Forward;

impl Operator for Forward {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        out.emit(Batch::new(batch.rows));
        Ok(())
    }
}

/// State by key and a second number, of two numbers each.
struct Keyed {
    rows: BTreeMap<(i64, i64), (i64, i64)>,
    context: SubtaskContext,
    process: Arc<Process>,
}

impl Keyed {
    fn new(context: &SubtaskContext, process: &Arc<Process>) -> Self {
        Self { rows: BTreeMap::new(), context: context.clone(), process: process.clone() }
    }

    fn owns(&self, key: i64) -> Result<bool> {
        let hash = hash_keys(&[Arc::new(Int64Array::from(vec![key])) as ArrayRef], 1)?;
        Ok(hash.first().is_some_and(|h| self.context.owns(*h)))
    }

    fn snapshot(&self) -> StateSnapshot {
        let rows: Vec<_> = self.rows.iter().map(|((a, b), (c, d))| (*a, *b, *c, *d)).collect();
        let (count, groups) = (rows.len() as u64, Some(self.context.key_groups));
        let encode = Box::new(move || {
            serde_json::to_vec(&rows).map(Into::into).map_err(|e| Error::abort(format!("encode state: {e}")))
        });
        StateSnapshot::of(vec![PendingShard::new(ShardKind::Keyed, groups, count, encode)])
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        let skips = self.process.world.mutation == Some(Mutation::ShardSkipped);
        for shard in shards.into_iter().filter(|s| !(skips && s.shard.subtask == 1)) {
            let rows: Vec<(i64, i64, i64, i64)> =
                serde_json::from_slice(&shard.bytes).map_err(|e| Error::corrupt(format!("state: {e}")))?;
            for (a, b, c, d) in rows {
                if self.owns(a)? && self.rows.insert((a, b), (c, d)).is_some() {
                    self.process.world.violation(format!("key {a} {b} stands in two shards"));
                }
            }
        }
        Ok(())
    }
}

fn column(batch: &Batch, name: &str) -> Result<Int64Array> {
    let column = batch.rows.column_by_name(name);
    column
        .map(|c| c.as_primitive::<Int64Type>().clone())
        .ok_or_else(|| Error::abort(format!("rows have no column {name}")))
}

fn emit(out: &mut Output, columns: Vec<(&str, Vec<i64>)>) -> Result<()> {
    let columns = columns.into_iter().map(|(name, values)| (name, Arc::new(Int64Array::from(values)) as ArrayRef));
    let rows = RecordBatch::try_from_iter(columns).map_err(|e| Error::abort(format!("make rows: {e}")))?;
    out.emit(Batch::new(rows));
    Ok(())
}

struct Counter {
    counts: Keyed,
}

impl Operator for Counter {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        let (keys, ids) = (column(&batch, "key")?, column(&batch, "id")?);
        let mut counts = Vec::with_capacity(keys.len());
        for key in keys.values() {
            let (count, _) = self.counts.rows.entry((*key, 0)).or_default();
            *count += 1;
            counts.push(*count);
        }
        emit(out, vec![("key", keys.values().to_vec()), ("count", counts), ("id", ids.values().to_vec())])
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        Ok(self.counts.snapshot())
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        self.counts.restore(shards)
    }
}

struct Windows {
    sums: Keyed,
    /// The last watermark.
    passed: TimestampMs,
    process: Arc<Process>,
}

impl Operator for Windows {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        let (keys, times, values) = (column(&batch, "key")?, column(&batch, "time")?, column(&batch, "value")?);
        for row in 0..batch.len() {
            let window = times.value(row).div_euclid(WINDOW_MS) * WINDOW_MS;
            if window + WINDOW_MS - 1 <= self.passed {
                self.process.world.violation(format!(
                    "a row of window {window} comes after watermark {}, and no row is late in this job",
                    self.passed
                ));
            }
            let (count, sum) = self.sums.rows.entry((keys.value(row), window)).or_default();
            *count += 1;
            *sum += values.value(row);
        }
        Ok(())
    }

    fn on_watermark(&mut self, watermark: TimestampMs, out: &mut Output) -> Result<()> {
        self.passed = watermark;
        let over = |window: i64| window + WINDOW_MS - 1 <= watermark;
        let mut fired: Vec<_> =
            self.sums.rows.iter().filter(|((_, w), _)| over(*w)).map(|((k, w), (c, s))| (*w, *k, *c, *s)).collect();
        if fired.is_empty() {
            return Ok(());
        }
        self.sums.rows.retain(|(_, window), _| !over(*window));
        fired.sort_unstable();
        let of = |pick: fn(&(i64, i64, i64, i64)) -> i64| fired.iter().map(pick).collect::<Vec<_>>();
        // A window's id tells it apart from all others: the funnel counts behind it.
        let ids = fired.iter().map(|(window, key, ..)| key * 1_000_000_000 + window).collect();
        emit(
            out,
            vec![
                ("key", of(|f| f.1)),
                ("window", of(|f| f.0)),
                ("count", of(|f| f.2)),
                ("sum", of(|f| f.3)),
                ("id", ids),
            ],
        )
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        Ok(self.sums.snapshot())
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        self.sums.restore(shards)
    }
}
