//! Operators of our own, small enough that the oracle's answer is easy to see.

use std::sync::Arc;

use arrow::{
    array::{ArrayRef, AsArray, Int64Array},
    datatypes::Int64Type,
    record_batch::RecordBatch,
};
use floodmark_dataflow::{
    Barrier, Batch, Operator, OperatorFactory, Output, Port, RestoredShard, StateSnapshot, SubtaskContext,
};
use floodmark_snapshot::{Epoch, Error, Result, TimestampMs};

use crate::{
    process::Process,
    state::{Entry, Keyed},
};

/// Length of a window, milliseconds.
pub(crate) const WINDOW_MS: i64 = 500;

/// How to make an operator.
pub(crate) type Make = Arc<dyn OperatorFactory>;

/// Counts the rows of each key: emits key, count and id of every row.
pub(crate) fn counter(process: Arc<Process>) -> Make {
    Arc::new(move |context: &SubtaskContext| -> Result<Box<dyn Operator>> {
        Ok(Box::new(Counter { counts: Keyed::new(context, &process)? }))
    })
}

/// Counts and sums the values of each key and window of event time: emits them when the window is over.
pub(crate) fn windows(process: Arc<Process>) -> Make {
    Arc::new(move |context: &SubtaskContext| -> Result<Box<dyn Operator>> {
        Ok(Box::new(Windows {
            sums: Keyed::new(context, &process)?,
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
        let ones: Vec<Entry> = keys.values().iter().map(|key| (*key, 0, 1, 0)).collect();
        let counts = self.counts.add(&ones)?.into_iter().map(|(count, _)| count).collect();
        emit(out, vec![("key", keys.values().to_vec()), ("count", counts), ("id", ids.values().to_vec())])
    }

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        self.counts.snapshot(barrier)
    }

    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        self.counts.completed(epoch)
    }

    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.counts.aborted(epoch)
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        self.counts.restore(shards)
    }

    fn restored(&mut self) -> Result<()> {
        self.counts.restored()
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
        let mut added: Vec<Entry> = Vec::with_capacity(batch.len());
        for row in 0..batch.len() {
            let window = times.value(row).div_euclid(WINDOW_MS) * WINDOW_MS;
            if window + WINDOW_MS - 1 <= self.passed {
                self.process.world.violation(format!(
                    "a row of window {window} comes after watermark {}, and no row is late in this job",
                    self.passed
                ));
            }
            added.push((keys.value(row), window, 1, values.value(row)));
        }
        self.sums.add(&added).map(drop)
    }

    fn on_watermark(&mut self, watermark: TimestampMs, out: &mut Output) -> Result<()> {
        self.passed = watermark;
        let fired = self.sums.take_up_to(watermark.saturating_sub(WINDOW_MS - 1))?;
        if fired.is_empty() {
            return Ok(());
        }
        let of = |pick: fn(&Entry) -> i64| fired.iter().map(pick).collect::<Vec<_>>();
        // A window's id tells it apart from all others: the funnel counts behind it.
        let ids = fired.iter().map(|(key, window, ..)| key * 1_000_000_000 + window).collect();
        emit(
            out,
            vec![
                ("key", of(|f| f.0)),
                ("window", of(|f| f.1)),
                ("count", of(|f| f.2)),
                ("sum", of(|f| f.3)),
                ("id", ids),
            ],
        )
    }

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        self.sums.snapshot(barrier)
    }

    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        self.sums.completed(epoch)
    }

    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.sums.aborted(epoch)
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        self.sums.restore(shards)
    }

    fn restored(&mut self) -> Result<()> {
        self.sums.restored()
    }
}
