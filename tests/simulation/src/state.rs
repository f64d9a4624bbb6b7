//! State by key and a second number, of two numbers each: kept by ourselves, in shards of JSON that trust nobody to have given
//! them only what is theirs, or by one of the engine's back ends.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use arrow::{
    array::{ArrayRef, AsArray, Int64Array},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
    record_batch::RecordBatch,
};
use floodmark_dataflow::{Barrier, PendingShard, RestoredShard, StateSnapshot, SubtaskContext, hash::hash_keys};
use floodmark_snapshot::{Epoch, Error, Result, Shard, ShardKind};
use floodmark_state::{
    Column, ColumnType, KeyGroupWatermarks, KeyedState, Layout, NO_SLOT, RowKeys, Rows, Table, Timers, holds,
};

use crate::{Mutation, plan::Keeper, process::Process};

/// Shards that a snapshot may consist of per subtask: past that, all is written anew.
const LAYERS_MAX: usize = 4;

/// What is added to a row, or a row: key, second number, and two numbers.
pub(crate) type Entry = (i64, i64, i64, i64);

/// State of an operator.
pub(crate) enum Keyed {
    /// See the header of this file.
    Own(Box<Own>),
    /// See the header of this file.
    Engine(Box<Engine>),
}

impl Keyed {
    /// Empty state, kept as the plan wants it.
    pub(crate) fn new(context: &SubtaskContext, process: &Arc<Process>) -> Result<Self> {
        Ok(match process.world.plan.keeper {
            Keeper::Own => Self::Own(Box::new(Own::new(context, process))),
            Keeper::Heap | Keeper::RocksDb => Self::Engine(Box::new(Engine::new(context, process)?)),
        })
    }

    /// Adds to rows, in this order. Answers with each row behind its addition.
    pub(crate) fn add(&mut self, entries: &[Entry]) -> Result<Vec<(i64, i64)>> {
        match self {
            Self::Own(own) => Ok(own.add(entries)),
            Self::Engine(engine) => engine.add(entries),
        }
    }

    /// Takes out all rows whose second number is at most `last`, ordered by it, then by key.
    pub(crate) fn take_up_to(&mut self, last: i64) -> Result<Vec<Entry>> {
        let mut taken = match self {
            Self::Own(own) => own.take_up_to(last),
            Self::Engine(engine) => engine.take_up_to(last)?,
        };
        taken.sort_unstable_by_key(|(key, second, ..)| (*second, *key));
        Ok(taken)
    }

    pub(crate) fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        match self {
            Self::Own(own) => Ok(own.snapshot(barrier)),
            Self::Engine(engine) => engine.snapshot(barrier),
        }
    }

    pub(crate) fn completed(&mut self, epoch: Epoch) -> Result<()> {
        match self {
            Self::Own(own) => {
                own.completed(epoch);
                Ok(())
            }
            Self::Engine(engine) => engine.each(|state| state.completed(epoch)),
        }
    }

    pub(crate) fn aborted(&mut self, epoch: Epoch) -> Result<()> {
        match self {
            Self::Own(own) => {
                own.aborted(epoch);
                Ok(())
            }
            Self::Engine(engine) => engine.each(|state| state.aborted(epoch)),
        }
    }

    pub(crate) fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        match self {
            Self::Own(own) => own.restore(shards),
            Self::Engine(engine) => engine.restore(&shards),
        }
    }

    pub(crate) fn restored(&mut self) -> Result<()> {
        match self {
            Self::Own(_) => Ok(()),
            Self::Engine(engine) => engine.each(|state| state.restored().map(drop)),
        }
    }
}

fn hashes(keys: impl Iterator<Item = i64>) -> Result<Vec<u64>> {
    let keys: Int64Array = keys.collect();
    let rows = arrow::array::Array::len(&keys);
    hash_keys(&[Arc::new(keys) as ArrayRef], rows)
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

/// Kept by ourselves. If the plan wants it, a snapshot writes only what has changed since the last completed one, and names that
/// one's shards again.
pub(crate) struct Own {
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

impl Own {
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

    fn add(&mut self, entries: &[Entry]) -> Vec<(i64, i64)> {
        let mut after = Vec::with_capacity(entries.len());
        for (key, second, a, b) in entries {
            self.changed.insert((*key, *second), self.barrier);
            let row = self.rows.entry((*key, *second)).or_default();
            *row = (row.0 + a, row.1 + b);
            after.push(*row);
        }
        after
    }

    fn take_up_to(&mut self, last: i64) -> Vec<Entry> {
        let over = self.rows.iter().filter(|((_, second), _)| *second <= last);
        let taken: Vec<Entry> = over.map(|((key, second), (a, b))| (*key, *second, *a, *b)).collect();
        for (key, second, ..) in &taken {
            self.changed.insert((*key, *second), self.barrier);
            self.rows.remove(&(*key, *second));
        }
        taken
    }

    fn owns(&self, key: i64) -> Result<bool> {
        Ok(hashes(std::iter::once(key))?.first().is_some_and(|h| self.context.owns(*h)))
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
                serde_json::from_slice(shard.file()?).map_err(|e| Error::corrupt(format!("state: {e}")))?;
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

/// Kept by one of the engine's back ends: rows by their second number and key, and a timer for each row, by which those whose time
/// has come are found.
pub(crate) struct Engine {
    rows: Box<dyn KeyedState>,
    timers: Timers,
}

/// The names of the states.
const ROWS: &str = "rows";
const TIMERS: &str = "timers";

impl Engine {
    fn new(context: &SubtaskContext, process: &Arc<Process>) -> Result<Self> {
        let skips = process.world.mutation == Some(Mutation::ShardSkipped);
        let keyed = |name: &str, columns| context.keyed(name, Arc::new(Numbers { columns, skips }), None);
        Ok(Self { rows: keyed(ROWS, 2)?, timers: Timers::new(keyed(TIMERS, 0)?) })
    }

    fn each(&mut self, mut call: impl FnMut(&mut dyn KeyedState) -> Result<()>) -> Result<()> {
        call(&mut *self.rows)?;
        call(self.timers.state())
    }

    fn add(&mut self, entries: &[Entry]) -> Result<Vec<(i64, i64)>> {
        let hashes = hashes(entries.iter().map(|e| e.0))?;
        let mut after = Vec::with_capacity(entries.len());
        for ((key, second, a, b), hash) in entries.iter().zip(hashes) {
            let bytes = key.to_be_bytes();
            let slots = self.rows.slots(*second, &[hash], &[&bytes])?;
            let table = self.rows.table(*second);
            let before = read(table.rows(), slots.at[0]);
            let row = (before.0 + a, before.1 + b);
            for (column, value) in [row.0, row.1].into_iter().enumerate() {
                table.write_runs(&slots.at, column, |column, rows, _| set(column, rows, &[value]));
            }
            self.timers.set(*second, &[hash], &[&bytes])?;
            after.push(row);
        }
        Ok(after)
    }

    fn take_up_to(&mut self, last: i64) -> Result<Vec<Entry>> {
        let mut taken = Vec::new();
        while let Some((second, keys)) = self.timers.due(last)? {
            for at in 0..keys.len() {
                let slots = self.rows.find(second, &[keys.hashes[at]], &[keys.key(at)])?;
                let row = slots.first().filter(|slot| **slot != NO_SLOT);
                let slot = *row.ok_or_else(|| Error::abort(format!("a timer of {second} without its row")))?;
                let (a, b) = read(self.rows.table(second).rows(), slot);
                taken.push((number(keys.key(at))?, second, a, b));
                self.rows.remove(second, &[slot])?;
            }
        }
        match self.rows.first_namespace().filter(|first| *first <= last) {
            Some(left) => Err(Error::abort(format!("a row of {left} without its timer"))),
            None => Ok(taken),
        }
    }

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        let mut snapshot = StateSnapshot::default();
        self.each(|state| {
            snapshot.append(state.snapshot(barrier, &KeyGroupWatermarks::default())?);
            Ok(())
        })?;
        Ok(snapshot)
    }

    fn restore(&mut self, shards: &[RestoredShard]) -> Result<()> {
        for restored in shards {
            match [ROWS, TIMERS].map(|name| holds(name, &restored.shard)) {
                [true, _] => self.rows.restore(restored)?,
                [_, true] => self.timers.state().restore(restored)?,
                [false, false] => {
                    return Err(Error::corrupt(format!("shard {} is of no state", restored.shard.path)));
                }
            }
        }
        Ok(())
    }
}

fn read(rows: &Rows, slot: u32) -> (i64, i64) {
    let at = |column| rows.long(slot as usize, column).unwrap_or_default();
    (at(0), at(1))
}

fn set(column: &mut Column, rows: &[u32], values: &[i64]) {
    if let Column::Long(column) = column {
        rows.iter().zip(values).for_each(|(row, value)| column[*row as usize] = Some(*value));
    }
}

fn number(key: &[u8]) -> Result<i64> {
    key.try_into().map(i64::from_be_bytes).map_err(|_| Error::abort("a key that is no number"))
}

/// Some columns of numbers, by a number as key.
struct Numbers {
    columns: usize,
    /// See [`Mutation::ShardSkipped`]: what lies in a file is lost.
    skips: bool,
}

const COLUMNS: [&str; 2] = ["a", "b"];

impl Layout for Numbers {
    fn types(&self) -> Vec<ColumnType> {
        vec![ColumnType::Long; self.columns]
    }

    fn schema(&self) -> SchemaRef {
        let names = ["second", "key"].into_iter().chain(COLUMNS.into_iter().take(self.columns));
        Arc::new(Schema::new(names.map(|name| Field::new(name, DataType::Int64, true)).collect::<Vec<_>>()))
    }

    fn encode(&self, namespace: i64, rows: &Rows, slots: &[u32]) -> Result<RecordBatch> {
        let keys: Vec<i64> = slots.iter().map(|slot| number(rows.key(*slot))).collect::<Result<_>>()?;
        let mut columns = vec![Int64Array::from_value(namespace, slots.len()), Int64Array::from(keys)];
        for column in 0..self.columns {
            columns.push(slots.iter().map(|slot| rows.long(*slot as usize, column)).collect());
        }
        let columns = columns.into_iter().map(|c| Arc::new(c) as ArrayRef).collect();
        RecordBatch::try_new(self.schema(), columns).map_err(|e| Error::abort(format!("encode state: {e}")))
    }

    fn decode(&self, batch: &RecordBatch) -> Result<RowKeys> {
        let (seconds, keys) = (longs(batch, "second")?, longs(batch, "key")?);
        let hashes = hashes(keys.values().iter().copied())?;
        let mut found = RowKeys::default();
        for (row, hash) in hashes.into_iter().enumerate() {
            found.push(seconds.value(row), hash, &keys.value(row).to_be_bytes());
        }
        Ok(found)
    }

    fn hashes(&self, keys: &[&[u8]]) -> Result<Vec<u64>> {
        hashes(keys.iter().map(|key| number(key)).collect::<Result<Vec<_>>>()?.into_iter())
    }

    fn fill(&self, batch: &RecordBatch, table: &mut Table, slots: &[u32]) -> Result<()> {
        for (at, name) in COLUMNS.into_iter().enumerate().take(self.columns).filter(|_| !self.skips) {
            let values = longs(batch, name)?;
            table.write_runs(slots, at, |column, rows, first| set(column, rows, &values.values()[first..]));
        }
        Ok(())
    }
}

fn longs(batch: &RecordBatch, name: &str) -> Result<Int64Array> {
    let column = batch.column_by_name(name).and_then(|c| c.as_primitive_opt::<Int64Type>());
    column.cloned().ok_or_else(|| Error::corrupt(format!("state without a column {name}")))
}
