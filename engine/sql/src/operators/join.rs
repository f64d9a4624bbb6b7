//! Inner join of two windowed inputs: rows of the same window and key, once the window is over.
//!
//! Keeps the rows of open windows; a window is joined and dropped when the watermark passes its end. Rows of a window that
//! is over are late: dropped and counted. After a restore, windows may be over in some key groups and not in others.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hasher},
    sync::Arc,
};

use arrow::{
    array::{Array, ArrayRef, AsArray, Int64Array, UInt32Array},
    compute::{concat_batches, filter_record_batch, take_record_batch},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef, TimestampMillisecondType},
    record_batch::RecordBatch,
};
use datafusion_physical_expr::PhysicalExpr;
use floodmark_dataflow::{
    Barrier, Batch, Operator, OperatorFactory, Output, Port, RestoredShard, StateSnapshot, SubtaskContext,
    WATERMARK_MIN, hash::hash_keys, metrics::add,
};
use floodmark_snapshot::{Epoch, Error, KeyGroup, Result, TimestampMs};
use floodmark_state::{
    Column, ColumnType, KeyGroupWatermarks, KeyedState, Layout, RowKeys, RowShape, Rows, Table, ValueShape, holds,
};
use hashbrown::HashMap;

use super::{
    arrow_failed, evaluate,
    key::{KeyCodec, Keys},
    partial::{BATCH_ROWS_MAX, batch, column_of, keys_of_slots, present, unique},
};

/// The names of the states of both sides.
const SIDES: [&str; 2] = ["left", "right"];

/// One input of a join.
#[derive(Clone)]
pub(crate) struct JoinSide {
    pub(crate) schema: SchemaRef,
    /// The columns compared, pairwise with the other side's: what the input is exchanged by.
    pub(crate) keys: Vec<usize>,
    /// The column of the window's end.
    pub(crate) window_end: usize,
}

impl JoinSide {
    fn key_arrays(&self, rows: &RecordBatch) -> Vec<ArrayRef> {
        self.keys.iter().map(|k| rows.column(*k).clone()).collect()
    }
}

/// What a window join does.
#[derive(Clone)]
pub(crate) struct WindowJoin {
    pub(crate) sides: [JoinSide; 2],
    /// Over the output's rows.
    pub(crate) residual: Option<Arc<dyn PhysicalExpr>>,
    /// Columns of the left side, then those of the right.
    pub(crate) schema: SchemaRef,
}

impl WindowJoin {
    /// The types of the state, as text.
    pub(crate) fn state_schema(&self) -> String {
        let side = |side: &JoinSide| {
            let columns: Vec<_> =
                side.schema.fields().iter().map(|f| format!("{} {}", f.name(), f.data_type())).collect();
            format!("({}) by {:?}", columns.join(", "), side.keys)
        };
        format!("window join {} and {}", side(&self.sides[0]), side(&self.sides[1]))
    }
}

impl OperatorFactory for WindowJoin {
    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok(Box::new(JoinOperator {
            spec: self.clone(),
            context: context.clone(),
            sides: [
                SideState::new(&self.sides[0], SIDES[0], context)?,
                SideState::new(&self.sides[1], SIDES[1], context)?,
            ],
            reached: WATERMARK_MIN.into(),
        }))
    }
}

struct JoinOperator {
    spec: WindowJoin,
    context: SubtaskContext,
    sides: [SideState; 2],
    /// How far event time has come: the subtask's watermark, and key groups that were further before a restore.
    reached: KeyGroupWatermarks,
}

/// The rows of one side, in the namespaces of their windows' ends.
struct SideState {
    layout: Arc<SideLayout>,
    state: Box<dyn KeyedState>,
}

impl SideState {
    fn new(side: &JoinSide, name: &str, context: &SubtaskContext) -> Result<Self> {
        let layout = Arc::new(SideLayout::new(side, context.max_parallelism)?);
        Ok(Self { state: context.keyed(name, layout.clone(), None)?, layout })
    }

    fn add(&mut self, window_end: TimestampMs, rows: &RecordBatch) -> Result<()> {
        let (keys, hashes) = self.layout.places(rows.columns())?;
        let slots = self.state.slots(window_end, &hashes, &keys.all(rows.num_rows()))?;
        self.state.table(window_end).write_runs(&slots.at, 0, |column, rows, _| {
            if let Column::Long(counts) = column {
                rows.iter().for_each(|row| counts[*row as usize] = Some(counts[*row as usize].unwrap_or(0) + 1));
            }
        });
        Ok(())
    }

    /// The rows of a window.
    fn rows(&mut self, window_end: TimestampMs) -> Result<RecordBatch> {
        let layout = &self.layout;
        let mut batches = Vec::new();
        self.state.scan(window_end, &mut |rows, slots| {
            let columns = keys_of_slots(&layout.codec, rows, slots)?;
            let mut each = batch(&layout.side.schema, columns, slots.len())?;
            let counts: Vec<i64> = slots.iter().map(|slot| rows.long(*slot as usize, 0).unwrap_or(0)).collect();
            if counts.iter().any(|count| *count != 1) {
                let repeated = counts.iter().zip(0_u32..).flat_map(|(count, row)| (0..*count).map(move |_| row));
                each = take_record_batch(&each, &repeated.collect::<UInt32Array>()).map_err(arrow_failed)?;
            }
            batches.push(each);
            Ok(())
        })?;
        concat_batches(&layout.side.schema, &batches).map_err(arrow_failed)
    }
}

/// How rows of a side are kept: equal rows of a window are one, with their number. So the key is the whole row; its hash
/// belongs to the key group of the columns compared.
struct SideLayout {
    side: JoinSide,
    schema: SchemaRef,
    codec: KeyCodec,
    max_parallelism: u16,
}

impl SideLayout {
    fn new(side: &JoinSide, max_parallelism: u16) -> Result<Self> {
        let long = |name: &str| Arc::new(Field::new(name, DataType::Int64, false));
        let columns = side.schema.fields().iter().cloned();
        let schema = unique([long("$window_end")].into_iter().chain(columns).chain([long("$count")]));
        let codec = KeyCodec::of_types(side.schema.fields().iter().map(|f| f.data_type().clone()))?;
        Ok(Self { side: side.clone(), schema: Arc::new(Schema::new(schema)), codec, max_parallelism })
    }

    /// The keys and hashes of rows.
    fn places(&self, columns: &[ArrayRef]) -> Result<(Keys, Vec<u64>)> {
        let rows = columns.first().map_or(0, |c| c.len());
        let keys = self.codec.encode(columns)?;
        let hashes = self.hashes_of(columns, &keys.all(rows))?;
        Ok((keys, hashes))
    }

    /// The hashes of rows with these columns, whose keys these are.
    fn hashes_of(&self, columns: &[ArrayRef], keys: &[&[u8]]) -> Result<Vec<u64>> {
        let compared: Vec<ArrayRef> = self.side.keys.iter().map(|k| columns[*k].clone()).collect();
        let max = u64::from(self.max_parallelism);
        let hashes = hash_keys(&compared, keys.len())?.into_iter().zip(keys).map(|(hash, key)| {
            let mut hasher = DefaultHasher::new();
            hasher.write(key);
            let of_row = hasher.finish() >> 1;
            of_row - of_row % max + hash % max
        });
        Ok(hashes.collect())
    }

    fn column(&self, batch: &RecordBatch, at: usize) -> Result<ArrayRef> {
        let field = &self.schema.fields()[at];
        present(column_of(batch, field)?, field)
    }
}

impl Layout for SideLayout {
    fn types(&self) -> Vec<ColumnType> {
        vec![ColumnType::Long]
    }

    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn encode(&self, namespace: i64, rows: &Rows, slots: &[u32]) -> Result<RecordBatch> {
        let mut columns: Vec<ArrayRef> = vec![Arc::new(Int64Array::from_value(namespace, slots.len()))];
        columns.extend(keys_of_slots(&self.codec, rows, slots)?);
        let count = |slot: &u32| rows.long(*slot as usize, 0).unwrap_or(0);
        columns.push(Arc::new(Int64Array::from_iter_values(slots.iter().map(count))));
        batch(&self.schema, columns, slots.len())
    }

    fn decode(&self, batch: &RecordBatch) -> Result<RowKeys> {
        let last = self.schema.fields().len() - 1;
        let columns: Vec<ArrayRef> = (1..last).map(|at| self.column(batch, at)).collect::<Result<_>>()?;
        let (keys, hashes) = self.places(&columns)?;
        let ends = self.column(batch, 0)?;
        let mut found = RowKeys::default();
        for ((row, hash), end) in hashes.into_iter().enumerate().zip(ends.as_primitive::<Int64Type>().values()) {
            found.push(*end, hash, keys.get(row));
        }
        Ok(found)
    }

    fn hashes(&self, keys: &[&[u8]]) -> Result<Vec<u64>> {
        self.hashes_of(&self.codec.decode(keys.iter().copied())?, keys)
    }

    fn fill(&self, batch: &RecordBatch, table: &mut Table, slots: &[u32]) -> Result<()> {
        let counts = self.column(batch, self.schema.fields().len() - 1)?;
        let counts = counts.as_primitive::<Int64Type>().values();
        table.write_runs(slots, 0, |column, rows, at| {
            if let Column::Long(values) = column {
                rows.iter().zip(&counts[at..]).for_each(|(row, count)| values[*row as usize] = Some(*count));
            }
        });
        Ok(())
    }

    fn shape(&self) -> Option<RowShape> {
        Some(RowShape { namespace: true, keys: self.side.schema.fields().len(), values: vec![ValueShape::Count] })
    }
}

impl JoinOperator {
    fn add(&mut self, port: Port, rows: &RecordBatch) -> Result<()> {
        let side = &self.spec.sides[port];
        let ends = rows.column(side.window_end).as_primitive::<TimestampMillisecondType>();
        let hashes = match self.reached.is_even() {
            true => None,
            false => Some(hash_keys(&side.key_arrays(rows), rows.num_rows())?),
        };
        let max_parallelism = self.context.max_parallelism;
        let reached = |row: usize| match &hashes {
            None => self.reached.min(),
            Some(hashes) => self.reached.of(KeyGroup::of(hashes[row], max_parallelism)),
        };
        let mut by_window: BTreeMap<TimestampMs, Vec<u32>> = BTreeMap::new();
        for (row, end) in ends.iter().enumerate() {
            match end {
                Some(end) if Some(end - 1) > reached(row) => by_window.entry(end).or_default().push(row as u32),
                _ => add(&self.context.metrics.late, 1),
            }
        }
        for (end, taken) in by_window {
            let rows = if taken.len() == rows.num_rows() {
                rows.clone()
            } else {
                take_record_batch(rows, &UInt32Array::from(taken)).map_err(arrow_failed)?
            };
            self.sides[port].add(end, &rows)?;
        }
        Ok(())
    }

    fn join(&mut self, window_end: TimestampMs, out: &mut Output) -> Result<()> {
        if self.sides.iter().any(|side| side.state.namespaces(window_end..=window_end).is_empty()) {
            return Ok(());
        }
        let (left_rows, right_rows) = (self.sides[0].rows(window_end)?, self.sides[1].rows(window_end)?);
        let [left, right] = &self.spec.sides;
        let codec = KeyCodec::of_types(left.keys.iter().map(|k| left.schema.field(*k).data_type().clone()))?;
        let keys = |side: &JoinSide, rows: &RecordBatch| {
            let columns = side.key_arrays(rows);
            // Null equals nothing.
            let known: Vec<bool> = (0..rows.num_rows()).map(|row| columns.iter().all(|c| c.is_valid(row))).collect();
            codec.encode(&columns).map(|keys| (keys, known))
        };
        let (right_keys, right_known) = keys(right, &right_rows)?;
        let mut by_key: HashMap<&[u8], Vec<u32>> = HashMap::new();
        for row in (0..right_rows.num_rows()).filter(|row| right_known[*row]) {
            by_key.entry(right_keys.get(row)).or_default().push(row as u32);
        }
        let (left_keys, left_known) = keys(left, &left_rows)?;
        let (mut lefts, mut rights) = (Vec::new(), Vec::new());
        for row in (0..left_rows.num_rows()).filter(|row| left_known[*row]) {
            for other in by_key.get(left_keys.get(row)).into_iter().flatten() {
                lefts.push(row as u32);
                rights.push(*other);
                if lefts.len() == BATCH_ROWS_MAX {
                    self.emit(&left_rows, &right_rows, &mut lefts, &mut rights, out)?;
                }
            }
        }
        self.emit(&left_rows, &right_rows, &mut lefts, &mut rights, out)
    }

    fn emit(
        &self,
        left: &RecordBatch,
        right: &RecordBatch,
        lefts: &mut Vec<u32>,
        rights: &mut Vec<u32>,
        out: &mut Output,
    ) -> Result<()> {
        let (lefts, rights) = (UInt32Array::from(std::mem::take(lefts)), UInt32Array::from(std::mem::take(rights)));
        let left = take_record_batch(left, &lefts).map_err(arrow_failed)?;
        let right = take_record_batch(right, &rights).map_err(arrow_failed)?;
        let columns = left.columns().iter().chain(right.columns()).cloned().collect();
        let mut rows = batch(&self.spec.schema, columns, lefts.len())?;
        if let Some(residual) = &self.spec.residual {
            let mask = evaluate(residual, &rows)?;
            rows = filter_record_batch(&rows, mask.as_boolean()).map_err(arrow_failed)?;
        }
        out.emit(Batch::new(rows));
        Ok(())
    }

    /// Takes over how far event time had come, as the states of both sides say.
    fn reach(&mut self, said: impl Fn(&mut dyn KeyedState) -> Result<KeyGroupWatermarks>) -> Result<()> {
        let [left, right] = &mut self.sides;
        self.reached = said(&mut *left.state)?;
        self.reached.merge(&said(&mut *right.state)?, self.context.key_groups);
        self.reached.raise(WATERMARK_MIN);
        Ok(())
    }

    fn first_window(&self) -> Option<TimestampMs> {
        self.sides.iter().filter_map(|side| side.state.first_namespace()).min()
    }
}

impl Operator for JoinOperator {
    fn process(&mut self, port: Port, batch: Batch, _: &mut Output) -> Result<()> {
        self.add(port, &batch.rows)
    }

    fn on_watermark(&mut self, watermark: TimestampMs, out: &mut Output) -> Result<()> {
        if Some(watermark) <= self.reached.min() {
            // After a restore, an input that was idle holds event time back anew; what has fired does not fire again.
            return Ok(());
        }
        while let Some(end) = self.first_window().filter(|end| *end - 1 <= watermark) {
            self.join(end, out)?;
            self.sides.iter_mut().try_for_each(|side| side.state.drop_namespace(end))?;
        }
        self.reached.raise(watermark);
        Ok(())
    }

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        let mut snapshot = StateSnapshot::default();
        for side in &mut self.sides {
            snapshot.append(side.state.snapshot(barrier, &self.reached)?);
        }
        Ok(snapshot)
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        let mut of_sides = SIDES.map(|_| Vec::new());
        for restored in shards {
            let of = SIDES.iter().position(|name| holds(name, &restored.shard));
            let side = of.and_then(|at| of_sides.get_mut(at)).ok_or_else(|| {
                Error::corrupt(format!("shard {} is of neither input of a join", restored.shard.path))
            })?;
            side.push(restored);
        }
        self.sides.iter_mut().zip(&of_sides).try_for_each(|(side, shards)| side.state.restore_together(shards))
    }

    fn restores_by_key_group(&self) -> bool {
        self.sides.iter().all(|side| side.state.restores_by_key_group())
    }

    fn arrived(&mut self) -> Result<()> {
        self.reach(|state| state.arrived())
    }

    fn restored(&mut self) -> Result<()> {
        self.reach(|state| state.restored())
    }

    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        self.sides.iter_mut().try_for_each(|side| side.state.completed(epoch))
    }

    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.sides.iter_mut().try_for_each(|side| side.state.aborted(epoch))
    }

    fn state_size(&self) -> (u64, u64) {
        let sizes = self.sides.iter().map(|side| side.state.size());
        sizes.fold((0, 0), |(rows, bytes), (r, b)| (rows + r, bytes + b))
    }
}
