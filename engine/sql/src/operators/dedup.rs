//! Deduplication: of all rows of a key the first or the last by event time. Emits a changelog by that key.
//!
//! As Flink has it for event time: the last row is replaced by one of the same time or a later one, the first only by one of
//! an earlier time, which came out of order. A row without a time can be neither: it is left out and counted as late.
//!
//! Of a batch only the best row of each key goes further: over the exchange ([`LocalDeduplicate`], which keeps nothing), and to
//! the state. Invariant: a key's row in the state is the best of all that came.

use std::{fmt, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, Int8Array, Int64Array, UInt32Array, new_null_array},
    compute::{cast, concat, take},
    datatypes::{DataType, Field, FieldRef, Int64Type, Schema, SchemaRef},
    record_batch::RecordBatch,
};
use floodmark_dataflow::{
    Barrier, Batch, Operator, OperatorFactory, Output, Port, ROW_KIND, RestoredShard, RowKind, StateSnapshot,
    SubtaskContext, hash::hash_keys, metrics::add,
};
use floodmark_snapshot::{Epoch, Error, Result, StateColumn, StateSchema};
use floodmark_state::{
    Column, ColumnType, KeyGroupWatermarks, KeyedState, Layout, RowKeys, RowShape, Rows, Table, ValueShape,
};
use hashbrown::{HashTable, hash_table::Entry};

use super::{
    arrow_failed,
    key::{KeyCodec, Keys},
    partial::{batch, column_of, keys_of_slots, present, unique},
};

/// Table columns of a kept row: its time, in its own unit, and what is neither time nor key, encoded.
const TIME: usize = 0;
const VALUES: usize = 1;

/// Which row of a key is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    First,
    Last,
}

impl Keep {
    /// Whether a row that comes replaces the one kept so far.
    #[inline]
    fn replaces(self, new: i64, kept: i64) -> bool {
        match self {
            Self::First => new < kept,
            Self::Last => new >= kept,
        }
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::First => "first",
            Self::Last => "last",
        })
    }
}

/// What a deduplication does.
#[derive(Clone)]
pub(crate) struct Deduplicate {
    /// The columns of its rows, without a kind.
    pub(crate) input: SchemaRef,
    /// The key's columns: what rows are exchanged by.
    pub(crate) keys: Vec<usize>,
    /// The column of event time.
    pub(crate) time: usize,
    pub(crate) keep: Keep,
    /// Whether an update also tells the row as it was before. An upsert sink needs it not.
    pub(crate) emit_before: bool,
}

impl Deduplicate {
    fn field(&self, column: usize) -> &FieldRef {
        &self.input.fields()[column]
    }

    fn fields<'a>(&'a self, columns: &'a [usize]) -> impl Iterator<Item = FieldRef> + 'a {
        columns.iter().map(|c| self.field(*c).clone())
    }

    /// The columns that are neither key nor time.
    fn values(&self) -> Vec<usize> {
        (0..self.input.fields().len()).filter(|c| !self.keys.contains(c) && *c != self.time).collect()
    }

    /// The types of the state.
    pub(crate) fn state_schema(&self) -> StateSchema {
        let schema = KeptRows::schema_of(self);
        let column = |f: &FieldRef| StateColumn {
            name: f.name().clone(),
            data_type: f.data_type().to_string(),
            optional: f.is_nullable(),
        };
        let (keys, values) = schema.fields().split_at(self.keys.len());
        StateSchema {
            form: format!("{} rows by {}", self.keep, self.field(self.time).name()),
            keys: keys.iter().map(column).collect(),
            values: values.iter().map(column).collect(),
        }
    }

    /// The batch without rows that have no time, and the times of the others.
    fn timed(&self, batch: Batch, context: &SubtaskContext) -> Result<(Batch, Int64Array)> {
        let times = batch.rows.column(self.time);
        let unknown = times.null_count();
        if unknown == 0 {
            let times = cast(times, &DataType::Int64).map_err(arrow_failed)?;
            return Ok((batch, times.as_primitive::<Int64Type>().clone()));
        }
        add(&context.metrics.late, unknown as u64);
        let known: UInt32Array = (0..times.len() as u32).filter(|row| times.is_valid(*row as usize)).collect();
        self.timed(taken(&batch, known)?, context)
    }
}

/// Some rows of a batch, with their hashes.
fn taken(from: &Batch, rows: UInt32Array) -> Result<Batch> {
    let columns = from.rows.columns().iter().map(|c| take(c, &rows, None)).collect::<Result<_, _>>();
    let hashes = from.hashes.as_ref().map(|hashes| rows.values().iter().map(|row| hashes[*row as usize]).collect());
    Ok(Batch { rows: batch(from.rows.schema_ref(), columns.map_err(arrow_failed)?, rows.len())?, hashes })
}

/// Finds the best row of each key of a batch.
struct Best {
    spec: Deduplicate,
    codec: KeyCodec,
    /// Into `rows`; empty between batches.
    index: HashTable<u32>,
}

/// The best row of each key of a batch, in the order in which keys came first.
struct Found {
    keys: Keys,
    hashes: Arc<[u64]>,
    rows: Vec<u32>,
}

impl Best {
    fn new(spec: &Deduplicate) -> Result<Self> {
        let codec = KeyCodec::of_types(spec.fields(&spec.keys).map(|f| f.data_type().clone()))?;
        Ok(Self { spec: spec.clone(), codec, index: HashTable::new() })
    }

    fn of(&mut self, batch: &Batch, times: &Int64Array) -> Result<Found> {
        let columns: Vec<ArrayRef> = self.spec.keys.iter().map(|k| batch.rows.column(*k).clone()).collect();
        let keys = self.codec.encode(&columns)?;
        let hashes = match &batch.hashes {
            Some(hashes) => hashes.clone(),
            None => hash_keys(&columns, batch.len())?.into(),
        };
        let mut rows: Vec<u32> = Vec::with_capacity(batch.len());
        for row in 0..batch.len() {
            let same = |at: &u32| keys.get(rows[*at as usize] as usize) == keys.get(row);
            match self.index.entry(hashes[row], same, |at| hashes[rows[*at as usize] as usize]) {
                Entry::Vacant(entry) => {
                    entry.insert(rows.len() as u32);
                    rows.push(row as u32);
                }
                Entry::Occupied(entry) => {
                    let best = &mut rows[*entry.get() as usize];
                    if self.spec.keep.replaces(times.value(row), times.value(*best as usize)) {
                        *best = row as u32;
                    }
                }
            }
        }
        self.index.clear();
        Ok(Found { keys, hashes, rows })
    }
}

/// The half before the exchange: of each batch the best row of each key.
#[derive(Clone)]
pub(crate) struct LocalDeduplicate(pub(crate) Deduplicate);

impl OperatorFactory for LocalDeduplicate {
    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok(Box::new(LocalOperator { best: Best::new(&self.0)?, context: context.clone() }))
    }
}

struct LocalOperator {
    best: Best,
    context: SubtaskContext,
}

impl Operator for LocalOperator {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        let (batch, times) = self.best.spec.timed(batch, &self.context)?;
        let best = self.best.of(&batch, &times)?.rows;
        out.emit(if best.len() == batch.len() { batch } else { taken(&batch, best.into())? });
        Ok(())
    }
}

/// How kept rows look in memory and on their way.
struct KeptRows {
    schema: SchemaRef,
    keys: KeyCodec,
    key_count: usize,
    values: KeyCodec,
}

impl KeptRows {
    fn new(spec: &Deduplicate) -> Result<Self> {
        let values = spec.values();
        Ok(Self {
            schema: Self::schema_of(spec),
            keys: KeyCodec::of_types(spec.fields(&spec.keys).map(|f| f.data_type().clone()))?,
            key_count: spec.keys.len(),
            values: KeyCodec::of_types(spec.fields(&values).map(|f| f.data_type().clone()))?,
        })
    }

    /// Key, time, and the other columns.
    fn schema_of(spec: &Deduplicate) -> SchemaRef {
        let values = spec.values();
        let time = Arc::new(spec.field(spec.time).as_ref().clone().with_nullable(false));
        Arc::new(Schema::new(unique(spec.fields(&spec.keys).chain([time]).chain(spec.fields(&values)))))
    }

    /// A column of a restored batch that must be there.
    fn column(&self, batch: &RecordBatch, at: usize) -> Result<ArrayRef> {
        let field = &self.schema.fields()[at];
        present(column_of(batch, field)?, field)
    }

    /// The time and the other columns of kept rows.
    fn values_of(&self, rows: &Rows, slots: &[u32]) -> Result<(ArrayRef, Vec<ArrayRef>)> {
        let missing = || Error::abort("internal error: a row is kept without its values");
        let times: Int64Array = slots.iter().map(|slot| rows.long(*slot as usize, TIME)).collect();
        let times = cast(&times, self.schema.field(self.key_count).data_type()).map_err(arrow_failed)?;
        let encoded: Vec<&[u8]> =
            slots.iter().map(|slot| rows.bytes(*slot as usize, VALUES).ok_or_else(missing)).collect::<Result<_>>()?;
        Ok((times, self.values.decode(encoded.into_iter())?))
    }

    fn write(&self, table: &mut Table, slots: &[u32], times: &[i64], values: &[ArrayRef]) -> Result<()> {
        let encoded = self.values.encode(values)?;
        table.write_runs(slots, TIME, |column, rows, at| {
            if let Column::Long(kept) = column {
                rows.iter().zip(&times[at..]).for_each(|(row, time)| kept[*row as usize] = Some(*time));
            }
        });
        table.write_runs(slots, VALUES, |column, rows, at| {
            if let Column::Bytes(kept) = column {
                rows.iter().zip(at..).for_each(|(row, at)| kept[*row as usize] = Some(encoded.get(at).into()));
            }
        });
        Ok(())
    }
}

impl Layout for KeptRows {
    fn types(&self) -> Vec<ColumnType> {
        vec![ColumnType::Long, ColumnType::Bytes]
    }

    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn encode(&self, _: i64, rows: &Rows, slots: &[u32]) -> Result<RecordBatch> {
        let mut columns = keys_of_slots(&self.keys, rows, slots)?;
        let (time, values) = self.values_of(rows, slots)?;
        columns.push(time);
        columns.extend(values);
        batch(&self.schema, columns, slots.len())
    }

    fn decode(&self, batch: &RecordBatch) -> Result<RowKeys> {
        let columns = (0..self.key_count).map(|at| self.column(batch, at)).collect::<Result<Vec<_>>>()?;
        let (keys, hashes) = (self.keys.encode(&columns)?, hash_keys(&columns, batch.num_rows())?);
        let mut found = RowKeys::default();
        hashes.iter().enumerate().for_each(|(row, hash)| found.push(0, *hash, keys.get(row)));
        Ok(found)
    }

    fn hashes(&self, keys: &[&[u8]]) -> Result<Vec<u64>> {
        hash_keys(&self.keys.decode(keys.iter().copied())?, keys.len())
    }

    fn fill(&self, batch: &RecordBatch, table: &mut Table, slots: &[u32]) -> Result<()> {
        let times = cast(&self.column(batch, self.key_count)?, &DataType::Int64).map_err(arrow_failed)?;
        let values = self.schema.fields()[self.key_count + 1..]
            .iter()
            .map(|field| {
                let known = column_of(batch, field)?;
                Ok(known.unwrap_or_else(|| new_null_array(field.data_type(), batch.num_rows())))
            })
            .collect::<Result<Vec<_>>>()?;
        self.write(table, slots, times.as_primitive::<Int64Type>().values(), &values)
    }

    fn shape(&self) -> Option<RowShape> {
        let columns = self.schema.fields().len() - self.key_count - 1;
        let values = vec![ValueShape::Value, ValueShape::Row { columns, absent: None }];
        Some(RowShape { namespace: false, keys: self.key_count, values })
    }
}

impl OperatorFactory for Deduplicate {
    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        let layout = Arc::new(KeptRows::new(self)?);
        let kind = Arc::new(Field::new(ROW_KIND, DataType::Int8, false));
        let fields: Vec<FieldRef> = self.input.fields().iter().cloned().chain([kind]).collect();
        Ok(Box::new(DedupOperator {
            best: Best::new(self)?,
            values: self.values(),
            output: Arc::new(Schema::new(fields)),
            state: context.keyed("", layout.clone(), context.state.ttl)?,
            layout,
            context: context.clone(),
        }))
    }
}

struct DedupOperator {
    best: Best,
    /// The columns that are neither key nor time.
    values: Vec<usize>,
    output: SchemaRef,
    layout: Arc<KeptRows>,
    state: Box<dyn KeyedState>,
    context: SubtaskContext,
}

/// The rows of a batch that will be kept, and the slots for them.
#[derive(Default)]
struct Changes {
    rows: Vec<u32>,
    slots: Vec<u32>,
    times: Vec<i64>,
    /// Whether there was a row of the key before.
    updates: Vec<bool>,
}

impl DedupOperator {
    fn changes(&mut self, found: &Found, times: &Int64Array) -> Result<Changes> {
        let hashes: Vec<u64> = found.rows.iter().map(|row| found.hashes[*row as usize]).collect();
        let keys: Vec<&[u8]> = found.rows.iter().map(|row| found.keys.get(*row as usize)).collect();
        let slots = self.state.slots(0, &hashes, &keys)?.at;
        let kept = self.state.table(0).rows();
        let keep = self.best.spec.keep;
        let mut changes = Changes::default();
        for (row, slot) in found.rows.iter().zip(slots) {
            let (time, before) = (times.value(*row as usize), kept.long(slot as usize, TIME));
            if before.is_none_or(|before| keep.replaces(time, before)) {
                changes.rows.push(*row);
                changes.slots.push(slot);
                changes.times.push(time);
                changes.updates.push(before.is_some());
            }
        }
        Ok(changes)
    }

    /// The rows that are kept from now on, each behind the one that it replaces if that is wanted.
    fn emitted(&mut self, new: &RecordBatch, changes: &Changes) -> Result<RecordBatch> {
        let updated = |(at, update): (usize, &bool)| update.then_some(at as u32);
        let replaced: Vec<u32> = changes.updates.iter().enumerate().filter_map(updated).collect();
        let kinds = |kind: &bool| if *kind { RowKind::UpdateAfter } else { RowKind::Insert } as i8;
        let mut columns = new.columns().to_vec();
        if !self.best.spec.emit_before || replaced.is_empty() {
            columns.push(Arc::new(changes.updates.iter().map(kinds).collect::<Int8Array>()));
            return batch(&self.output, columns, new.num_rows());
        }
        let slots: Vec<u32> = replaced.iter().map(|at| changes.slots[*at as usize]).collect();
        let (time, values) = self.layout.values_of(self.state.table(0).rows(), &slots)?;
        let mut before = columns.clone();
        let at = UInt32Array::from(replaced);
        for key in &self.best.spec.keys {
            before[*key] = take(&columns[*key], &at, None).map_err(arrow_failed)?;
        }
        before[self.best.spec.time] = time;
        self.values.iter().zip(values).for_each(|(column, value)| before[*column] = value);
        let (mut order, mut all_kinds) = (Vec::new(), Vec::new());
        let mut next = new.num_rows() as u32;
        for (row, update) in changes.updates.iter().enumerate() {
            if *update {
                order.push(next);
                all_kinds.push(RowKind::UpdateBefore as i8);
                next += 1;
            }
            order.push(row as u32);
            all_kinds.push(kinds(update));
        }
        let order = UInt32Array::from(order);
        let both = |(new, before): (&ArrayRef, &ArrayRef)| {
            concat(&[new, before]).and_then(|all| take(&all, &order, None)).map_err(arrow_failed)
        };
        let mut columns = columns.iter().zip(&before).map(both).collect::<Result<Vec<_>>>()?;
        columns.push(Arc::new(Int8Array::from(all_kinds)));
        batch(&self.output, columns, order.len())
    }
}

impl Operator for DedupOperator {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        let (batch, times) = self.best.spec.timed(batch, &self.context)?;
        if batch.is_empty() {
            return Ok(());
        }
        let found = self.best.of(&batch, &times)?;
        let changes = self.changes(&found, &times)?;
        let new = if changes.rows.len() == batch.len() {
            batch.rows
        } else {
            taken(&batch, changes.rows.clone().into())?.rows
        };
        if new.num_rows() == 0 {
            return Ok(());
        }
        let emitted = self.emitted(&new, &changes)?;
        let values: Vec<ArrayRef> = self.values.iter().map(|c| new.column(*c).clone()).collect();
        self.layout.write(self.state.table(0), &changes.slots, &changes.times, &values)?;
        out.emit(Batch::new(emitted));
        Ok(())
    }

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        self.state.snapshot(barrier, &KeyGroupWatermarks::default())
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        self.state.restore_together(&shards)
    }

    fn restores_by_key_group(&self) -> bool {
        self.state.restores_by_key_group()
    }

    fn restored(&mut self) -> Result<()> {
        self.state.restored().map(drop)
    }

    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        self.state.completed(epoch)
    }

    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.state.aborted(epoch)
    }

    fn state_size(&self) -> (u64, u64) {
        self.state.size()
    }
}
