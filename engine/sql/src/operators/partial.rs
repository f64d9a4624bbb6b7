//! Partial aggregates as batches: what goes over the exchange between the two halves, and into snapshots.
//!
//! Layout: `[$slice_end timestamp(ms), if windowed] ++ keys ++ state columns of each call`. Neutral to the back end: any
//! parallelism and any later table layout can read it.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{
    array::{ArrayRef, AsArray, TimestampMillisecondArray, UInt32Array},
    datatypes::{DataType, Field, FieldRef, Schema, SchemaRef, TimeUnit, TimestampMillisecondType},
    record_batch::RecordBatch,
};
use floodmark_dataflow::{Batch, PendingShard, RestoredShard, SubtaskContext, hash::hash_keys};
use floodmark_snapshot::{Result, ShardKind, StateColumn, StateSchema, TimestampMs};
use floodmark_state::{ColumnType, Rows, Table, shard};

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
        Arc::new(Schema::new(slice.into_iter().chain(self.keys.iter().cloned()).chain(states).collect::<Vec<_>>()))
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
        let states = self.calls.iter().flat_map(Call::state_fields);
        StateSchema {
            form: form.to_owned(),
            keys: self.keys.iter().map(column).collect(),
            values: states.map(column).collect(),
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
        let codec = KeyCodec::new(&self.keys)?;
        let schema = self.partial_schema();
        let mut batches = Vec::new();
        for start in (0..rows.len()).step_by(BATCH_ROWS_MAX) {
            let slots: Vec<u32> = (start as u32..rows.len().min(start + BATCH_ROWS_MAX) as u32).collect();
            let mut columns: Vec<ArrayRef> = Vec::with_capacity(schema.fields().len());
            if let Some(end) = slice_end {
                columns.push(Arc::new(TimestampMillisecondArray::from_value(end, slots.len())));
            }
            columns.extend(keys_of_slots(&codec, rows, &slots)?);
            for (at, call) in self.placed() {
                columns.extend(call.states(rows, at, &slots)?);
            }
            batches.push(batch(&schema, columns, slots.len())?);
        }
        Ok(batches)
    }

    /// What a snapshot hands over of these tables (by slice end; one under `None` if not windowed).
    pub(crate) fn pending(
        &self,
        tables: Vec<(Option<TimestampMs>, Rows)>,
        watermark: Option<TimestampMs>,
        context: &SubtaskContext,
    ) -> PendingShard {
        let grouping = self.clone();
        let rows = tables.iter().map(|(_, rows)| rows.len() as u64).sum();
        let encode = Box::new(move || {
            let mut batches = Vec::new();
            for (slice_end, rows) in &tables {
                batches.extend(grouping.encode(*slice_end, rows)?);
            }
            shard::write(&shard::Header::new(watermark), &grouping.partial_schema(), &batches)
        });
        PendingShard::new(ShardKind::Keyed, Some(context.key_groups), rows, encode)
    }

    /// Reads shards back: the tables by slice end (0 if not windowed) with just this subtask's key groups, and the least
    /// watermark of all shards. (Behind aligned barriers all have the same; otherwise the least one loses nothing.)
    pub(crate) fn restore(
        &self,
        shards: &[RestoredShard],
        context: &SubtaskContext,
    ) -> Result<(BTreeMap<TimestampMs, Table>, Option<TimestampMs>)> {
        let codec = KeyCodec::new(&self.keys)?;
        let mut tables: BTreeMap<TimestampMs, Table> = BTreeMap::new();
        let mut watermark = None;
        for restored in shards {
            let (header, batches) = shard::read(&restored.bytes)?;
            watermark = match (watermark, header.watermark) {
                (Some(a), Some(b)) => Some(std::cmp::min::<TimestampMs>(a, b)),
                (a, b) => a.or(b),
            };
            for rows in batches {
                let (keys, hashes) =
                    (self.keys_of(&codec, &rows)?, hash_keys(&self.key_arrays(&rows), rows.num_rows())?);
                let ends =
                    self.windowed.then(|| rows.column(0).as_primitive::<TimestampMillisecondType>().values().clone());
                let mine = |row: &usize| context.owns(hashes[*row]);
                let mut by_slice: BTreeMap<TimestampMs, (Vec<u32>, Vec<u32>)> = BTreeMap::new();
                for row in (0..rows.num_rows()).filter(mine) {
                    let end = ends.as_ref().map_or(0, |e| e[row]);
                    let table = tables.entry(end).or_insert_with(|| Table::new(self.column_types()));
                    let (slots, taken) = by_slice.entry(end).or_default();
                    slots.push(table.slot(hashes[row], keys.get(row)).0);
                    taken.push(row as u32);
                }
                for (end, (slots, taken)) in by_slice {
                    let rows =
                        arrow::compute::take_record_batch(&rows, &UInt32Array::from(taken)).map_err(arrow_failed)?;
                    if let Some(table) = tables.get_mut(&end) {
                        self.merge(table, &slots, &rows)?;
                    }
                }
            }
        }
        Ok((tables, watermark))
    }
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
