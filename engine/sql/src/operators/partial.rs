//! Partial aggregates as batches: what goes over the exchange between the two halves, and into snapshots.
//!
//! Layout: `[$slice_end timestamp(ms), if windowed] ++ keys ++ state columns of each call`. Neutral to the back end: any
//! parallelism and any later table layout can read it.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use arrow::{
    array::{ArrayRef, AsArray, TimestampMillisecondArray},
    datatypes::{DataType, Field, FieldRef, Schema, SchemaRef, TimeUnit, TimestampMillisecondType},
    record_batch::RecordBatch,
};
use floodmark_dataflow::{Batch, hash::hash_keys};
use floodmark_snapshot::{Error, Result, StateColumn, StateSchema, TimestampMs};
use floodmark_state::{ColumnType, Layout, RowKeys, RowShape, Rows, Table};

use super::{
    aggregate::Call,
    arrow_failed,
    key::{KeyCodec, Keys},
};

/// Rows of a batch that is emitted or snapshotted, at most.
pub(crate) const BATCH_ROWS_MAX: usize = 8192;

/// Event time, as window columns and slices have it.
pub(crate) fn time_type() -> DataType {
    DataType::Timestamp(TimeUnit::Millisecond, None)
}

/// Keys and calls of an aggregate: the layout of its tables and partial batches.
#[derive(Clone)]
pub(crate) struct Grouping {
    /// Key columns, without those of a window.
    pub(crate) keys: Vec<FieldRef>,
    /// The aggregates.
    pub(crate) calls: Vec<Call>,
    /// Whether partial batches carry the end of their slice.
    pub(crate) windowed: bool,
}

impl Grouping {
    /// Columns of a table of such groups.
    pub(crate) fn column_types(&self) -> Vec<ColumnType> {
        self.calls.iter().flat_map(|c| c.columns().iter().copied()).collect()
    }

    /// Each call with the first of its table columns.
    pub(crate) fn placed(&self) -> impl Iterator<Item = (usize, &Call)> {
        self.calls.iter().scan(0, |at, call| {
            let first = *at;
            *at += call.columns().len();
            Some((first, call))
        })
    }

    /// Columns of a partial batch.
    pub(crate) fn partial_schema(&self) -> SchemaRef {
        let slice = self.windowed.then(|| Arc::new(Field::new("$slice_end", time_type(), false)));
        let states = self.calls.iter().flat_map(|c| c.state_fields().iter().cloned());
        Arc::new(Schema::new(unique(slice.into_iter().chain(self.keys.iter().cloned()).chain(states))))
    }

    /// Positions of the keys in a partial batch: what it is exchanged by.
    pub(crate) fn key_columns(&self) -> Vec<usize> {
        let first = usize::from(self.windowed);
        (first..first + self.keys.len()).collect()
    }

    /// The types of the state.
    pub(crate) fn state_schema(&self, form: &str) -> StateSchema {
        let column = |f: &FieldRef| StateColumn {
            name: f.name().clone(),
            data_type: f.data_type().to_string(),
            optional: f.is_nullable(),
        };
        let schema = self.partial_schema();
        let (keys, values) = schema.fields()[usize::from(self.windowed)..].split_at(self.keys.len());
        StateSchema {
            form: form.to_owned(),
            keys: keys.iter().map(column).collect(),
            values: values.iter().map(column).collect(),
        }
    }

    /// The keys of a partial batch, as columns.
    fn key_arrays(&self, rows: &RecordBatch) -> Vec<ArrayRef> {
        self.key_columns().into_iter().map(|c| rows.column(c).clone()).collect()
    }

    /// The keys of a partial batch, encoded.
    pub(crate) fn keys_of(&self, codec: &KeyCodec, rows: &RecordBatch) -> Result<Keys> {
        codec.encode(&self.key_arrays(rows))
    }

    /// The hashes of the keys of a partial batch: those that came with it, if it came over an exchange.
    pub(crate) fn hashes_of(&self, batch: &Batch) -> Result<Arc<[u64]>> {
        match &batch.hashes {
            Some(hashes) => Ok(hashes.clone()),
            None => hash_keys(&self.key_arrays(&batch.rows), batch.len()).map(Arc::from),
        }
    }

    /// Merges the states of a partial batch into the slots of its rows.
    pub(crate) fn merge(&self, table: &mut Table, slots: &[u32], rows: &RecordBatch) -> Result<()> {
        let mut state = usize::from(self.windowed) + self.keys.len();
        for (at, call) in self.placed() {
            let columns = &rows.columns()[state..state + call.state_fields().len()];
            call.merge(table, at, slots, columns)?;
            state += columns.len();
        }
        Ok(())
    }

    /// The rows of a table as partial batches.
    pub(crate) fn encode(&self, slice_end: Option<TimestampMs>, rows: &Rows) -> Result<Vec<RecordBatch>> {
        let (codec, schema) = (KeyCodec::new(&self.keys)?, self.partial_schema());
        rows.pages(BATCH_ROWS_MAX).map(|slots| self.page(&schema, &codec, slice_end, rows, &slots)).collect()
    }

    /// Some rows of a table as a partial batch.
    fn page(
        &self,
        schema: &SchemaRef,
        codec: &KeyCodec,
        slice_end: Option<TimestampMs>,
        rows: &Rows,
        slots: &[u32],
    ) -> Result<RecordBatch> {
        let mut columns: Vec<ArrayRef> = Vec::with_capacity(schema.fields().len());
        if let Some(end) = slice_end {
            columns.push(Arc::new(TimestampMillisecondArray::from_value(end, slots.len())));
        }
        columns.extend(keys_of_slots(codec, rows, slots)?);
        for (at, call) in self.placed() {
            columns.extend(call.states(rows, at, slots)?);
        }
        batch(schema, columns, slots.len())
    }
}

/// How groups are kept and travel: as partial batches, found by the names of their columns.
pub(crate) struct GroupingLayout {
    grouping: Grouping,
    schema: SchemaRef,
    codec: KeyCodec,
}

impl GroupingLayout {
    pub(crate) fn new(grouping: &Grouping) -> Result<Arc<Self>> {
        let codec = KeyCodec::new(&grouping.keys)?;
        Ok(Arc::new(Self { grouping: grouping.clone(), schema: grouping.partial_schema(), codec }))
    }

    /// The columns of a restored batch that are those of the schema at `places`; `None` for those that it lacks.
    fn columns(&self, batch: &RecordBatch, places: Range<usize>) -> Result<Vec<Option<ArrayRef>>> {
        places.map(|place| column_of(batch, self.schema.field(place))).collect()
    }
}

impl Layout for GroupingLayout {
    fn types(&self) -> Vec<ColumnType> {
        self.grouping.column_types()
    }

    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn encode(&self, namespace: i64, rows: &Rows, slots: &[u32]) -> Result<RecordBatch> {
        self.grouping.page(&self.schema, &self.codec, self.grouping.windowed.then_some(namespace), rows, slots)
    }

    fn decode(&self, batch: &RecordBatch) -> Result<RowKeys> {
        let first = usize::from(self.grouping.windowed);
        let columns = self.columns(batch, 0..first + self.grouping.keys.len())?.into_iter().zip(self.schema.fields());
        let columns: Vec<ArrayRef> = columns.map(|(column, field)| present(column, field)).collect::<Result<_>>()?;
        let (slices, keys) = columns.split_at(first);
        let (encoded, hashes) = (self.codec.encode(keys)?, hash_keys(keys, batch.num_rows())?);
        let ends = slices.first().map(|c| c.as_primitive::<TimestampMillisecondType>().values().clone());
        let mut found = RowKeys::default();
        for (row, hash) in hashes.into_iter().enumerate() {
            found.push(ends.as_ref().map_or(0, |ends| ends[row]), hash, encoded.get(row));
        }
        Ok(found)
    }

    fn hashes(&self, keys: &[&[u8]]) -> Result<Vec<u64>> {
        hash_keys(&self.codec.decode(keys.iter().copied())?, keys.len())
    }

    fn fill(&self, batch: &RecordBatch, table: &mut Table, slots: &[u32]) -> Result<()> {
        let mut state = usize::from(self.grouping.windowed) + self.grouping.keys.len();
        for (at, call) in self.grouping.placed() {
            let end = state + call.state_fields().len();
            let fields = &self.schema.fields()[state..end];
            let columns = self.columns(batch, state..end)?;
            state = end;
            // A call that is new begins with nothing.
            if columns.iter().any(Option::is_some) {
                let columns = columns.into_iter().zip(fields);
                let columns: Vec<ArrayRef> = columns.map(|(c, field)| present(c, field)).collect::<Result<_>>()?;
                call.merge(table, at, slots, &columns)?;
            }
        }
        Ok(())
    }

    fn shape(&self) -> Option<RowShape> {
        let values: Vec<_> = self.grouping.calls.iter().map(Call::shape).collect::<Result<_>>().ok()?;
        let Grouping { keys, windowed, .. } = &self.grouping;
        Some(RowShape { namespace: *windowed, keys: keys.len(), values: values.concat() })
    }
}

/// The column of this name of a restored batch.
pub(crate) fn column_of(batch: &RecordBatch, field: &Field) -> Result<Option<ArrayRef>> {
    let Some(column) = batch.column_by_name(field.name()) else { return Ok(None) };
    if column.data_type() != field.data_type() {
        return Err(Error::abort(format!(
            "column '{}' of the state is {} and not {}",
            field.name(),
            column.data_type(),
            field.data_type()
        )));
    }
    Ok(Some(column.clone()))
}

/// A column that must be there.
pub(crate) fn present(column: Option<ArrayRef>, field: &FieldRef) -> Result<ArrayRef> {
    column.ok_or_else(|| Error::abort(format!("the state has no column '{}'", field.name())))
}

/// The same fields with names of their own: the second of a name is `name#2`.
pub(crate) fn unique(fields: impl IntoIterator<Item = FieldRef>) -> Vec<FieldRef> {
    let mut taken: BTreeMap<String, usize> = BTreeMap::new();
    let mut one = |field: FieldRef| {
        let count = taken.entry(field.name().clone()).or_default();
        *count += 1;
        match *count {
            1 => field,
            n => Arc::new(field.as_ref().clone().with_name(format!("{}#{n}", field.name()))),
        }
    };
    fields.into_iter().map(&mut one).collect()
}

/// The key columns of some rows of a table.
pub(crate) fn keys_of_slots(codec: &KeyCodec, rows: &Rows, slots: &[u32]) -> Result<Vec<ArrayRef>> {
    codec.decode(slots.iter().map(|slot| {
        let (chunk, row) = rows.read(*slot as usize);
        chunk.key(row)
    }))
}

/// A batch that may have no columns.
pub(crate) fn batch(schema: &SchemaRef, columns: Vec<ArrayRef>, rows: usize) -> Result<RecordBatch> {
    let options = arrow::record_batch::RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(schema.clone(), columns, &options).map_err(arrow_failed)
}
