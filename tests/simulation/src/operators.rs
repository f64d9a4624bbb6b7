//! Operators of the simulated jobs, small enough that the oracle's answer is easy to see: they keep their state by key, in
//! shards of JSON, and trust nobody to have given them only what is theirs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use arrow::{
    array::{ArrayRef, AsArray, Int64Array},
    datatypes::Int64Type,
    record_batch::RecordBatch,
};
use floodmark_dataflow::{
    Barrier, Batch, Operator, OperatorFactory, Output, PendingShard, Port, RestoredShard, StateSnapshot,
    SubtaskContext, hash::hash_keys,
};
use floodmark_snapshot::{Epoch, Error, Result, Shard, ShardKind, TimestampMs};

use crate::{Mutation, process::Process};

/// Length of a window, milliseconds.
pub(crate) const WINDOW_MS: i64 = 500;

/// Shards that a snapshot may consist of per subtask: past that, all is written anew.
const LAYERS_MAX: usize = 4;

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

/// Shards of a checkpoint that later ones may name again.
#[derive(Clone, Default)]
struct Base {
    /// The barrier up to which the shards hold what happened.
    epoch: Epoch,
    /// In the order of their layers.
    shards: Vec<Shard>,
}

/// A snapshot whose checkpoint is neither complete nor given up.
struct Taken {
    epoch: Epoch,
    reused: Vec<Shard>,
    /// The shard that it wrote, once that is durable.
    uploaded: Arc<Mutex<Option<Shard>>>,
}

/// A row on its way: key, second number, and the two numbers that are kept; nothing if the row is gone.
type Travelling = (i64, i64, Option<(i64, i64)>);

/// State by key and a second number, of two numbers each. If the plan wants it, a snapshot writes only what has changed since
/// the last completed one, and names that one's shards again.
struct Keyed {
    rows: BTreeMap<(i64, i64), (i64, i64)>,
    /// Behind which barrier a row was last changed or removed.
    changed: BTreeMap<(i64, i64), Epoch>,
    /// The last barrier.
    barrier: Epoch,
    base: Base,
    taken: Vec<Taken>,
    context: SubtaskContext,
    process: Arc<Process>,
}

impl Keyed {
    fn new(context: &SubtaskContext, process: &Arc<Process>) -> Self {
        Self {
            rows: BTreeMap::new(),
            changed: BTreeMap::new(),
            barrier: Epoch::default(),
            base: Base::default(),
            taken: Vec::new(),
            context: context.clone(),
            process: process.clone(),
        }
    }

    fn row(&mut self, key: i64, second: i64) -> &mut (i64, i64) {
        self.changed.insert((key, second), self.barrier);
        self.rows.entry((key, second)).or_default()
    }

    fn remove(&mut self, key: i64, second: i64) {
        self.changed.insert((key, second), self.barrier);
        self.rows.remove(&(key, second));
    }

    fn owns(&self, key: i64) -> Result<bool> {
        let hash = hash_keys(&[Arc::new(Int64Array::from(vec![key])) as ArrayRef], 1)?;
        Ok(hash.first().is_some_and(|h| self.context.owns(*h)))
    }

    fn snapshot(&mut self, barrier: &Barrier) -> StateSnapshot {
        let adds = self.process.world.plan.incremental
            && !barrier.whole
            && !self.base.shards.is_empty()
            && self.base.shards.len() < LAYERS_MAX;
        let reused = if adds { self.base.shards.clone() } else { Vec::new() };
        let since = self.base.epoch;
        let rows: Vec<Travelling> = if adds {
            let changed = self.changed.iter().filter(|(_, behind)| **behind >= since);
            changed.map(|(at, _)| (at.0, at.1, self.rows.get(at).copied())).collect()
        } else {
            self.rows.iter().map(|(at, row)| (at.0, at.1, Some(*row))).collect()
        };
        let (count, groups) = (rows.len() as u64, Some(self.context.key_groups));
        let encode = Box::new(move || {
            serde_json::to_vec(&rows).map(Into::into).map_err(|e| Error::abort(format!("encode state: {e}")))
        });
        let mut pending = PendingShard::new(ShardKind::Keyed, groups, count, encode);
        pending.layer = reused.len() as u32;
        if !barrier.whole {
            let uploaded: Arc<Mutex<Option<Shard>>> = Arc::default();
            let told = uploaded.clone();
            pending.uploaded =
                Some(Box::new(move |shard| *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(shard.clone())));
            self.taken.push(Taken { epoch: barrier.epoch, reused: reused.clone(), uploaded });
        }
        self.barrier = barrier.epoch;
        StateSnapshot { reused, pending: vec![pending] }
    }

    fn completed(&mut self, epoch: Epoch) {
        let Some(at) = self.taken.iter().position(|t| t.epoch == epoch) else { return };
        let taken = self.taken.remove(at);
        let uploaded = taken.uploaded.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(shard) = uploaded.filter(|_| epoch > self.base.epoch) {
            let shards = taken.reused.into_iter().chain([shard]).collect();
            self.base = Base { epoch, shards };
            self.changed.retain(|_, behind| *behind >= epoch);
        }
    }

    fn aborted(&mut self, epoch: Epoch) {
        self.taken.retain(|t| t.epoch != epoch);
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        let skips = self.process.world.mutation == Some(Mutation::ShardSkipped);
        for shard in shards.into_iter().filter(|s| !(skips && s.shard.subtask == 1)) {
            let rows: Vec<Travelling> =
                serde_json::from_slice(&shard.bytes).map_err(|e| Error::corrupt(format!("state: {e}")))?;
            for (key, second, row) in rows {
                if !self.owns(key)? {
                    continue;
                }
                let before = match row {
                    Some(row) => self.rows.insert((key, second), row),
                    None => self.rows.remove(&(key, second)),
                };
                if before.is_some() && shard.shard.layer == 0 {
                    self.process.world.violation(format!("key {key} {second} stands in two shards"));
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
            let (count, _) = self.counts.row(*key, 0);
            *count += 1;
            counts.push(*count);
        }
        emit(out, vec![("key", keys.values().to_vec()), ("count", counts), ("id", ids.values().to_vec())])
    }

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        Ok(self.counts.snapshot(barrier))
    }

    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        self.counts.completed(epoch);
        Ok(())
    }

    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.counts.aborted(epoch);
        Ok(())
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
            let (count, sum) = self.sums.row(keys.value(row), window);
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
        fired.sort_unstable();
        fired.iter().for_each(|(window, key, ..)| self.sums.remove(*key, *window));
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

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        Ok(self.sums.snapshot(barrier))
    }

    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        self.sums.completed(epoch);
        Ok(())
    }

    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.sums.aborted(epoch);
        Ok(())
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        self.sums.restore(shards)
    }
}
