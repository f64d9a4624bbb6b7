//! The half of an aggregate before the exchange: combines rows of the same key (and slice), so that less travels.
//!
//! Keeps nothing across a barrier: everything is emitted in `flush`. Not windowed, it combines within one batch only, so
//! that results are not held back.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, TimestampMillisecondArray, UInt32Array},
    compute::{cast, filter, is_not_null, take},
    datatypes::{DataType, Field, Schema, SchemaRef, TimestampMillisecondType},
    record_batch::RecordBatch,
};
use datafusion_physical_expr::PhysicalExpr;
use floodmark_dataflow::{
    Batch, Operator, OperatorFactory, Output, Port, SubtaskContext, hash::hash_keys, metrics::add,
};
use floodmark_snapshot::{Result, TimestampMs};
use floodmark_state::{Column, ColumnType, Table};

use super::{
    arrow_failed, evaluate,
    key::KeyCodec,
    partial::{Grouping, batch, time_type},
    window::Slicing,
};

/// Groups held before they are emitted, at most.
const GROUPS_MAX: usize = 65_536;

/// The time (or window end) of a row, and how rows are sliced by it.
pub(crate) type Sliced = (Arc<dyn PhysicalExpr>, Slicing);

/// What a local aggregate does.
#[derive(Clone)]
pub(crate) struct LocalAggregate {
    pub(crate) grouping: Grouping,
    /// The keys, over the input's rows.
    pub(crate) keys: Vec<Arc<dyn PhysicalExpr>>,
    /// Time (or window end, if attached) of a row, and how it is sliced.
    pub(crate) slicing: Option<Sliced>,
}

impl LocalAggregate {
    /// What is emitted: partial batches and, if windowed, the number of rows behind each.
    pub(crate) fn schema(&self) -> SchemaRef {
        let partial = self.grouping.partial_schema();
        if self.slicing.is_none() {
            return partial;
        }
        let rows = Arc::new(Field::new("$rows", DataType::Int64, false));
        Arc::new(Schema::new(partial.fields().iter().cloned().chain([rows]).collect::<Vec<_>>()))
    }
}

impl OperatorFactory for LocalAggregate {
    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok(Box::new(LocalOperator {
            codec: KeyCodec::new(&self.grouping.keys)?,
            schema: self.schema(),
            context: context.clone(),
            spec: self.clone(),
            slices: BTreeMap::new(),
            groups: 0,
        }))
    }
}

struct LocalOperator {
    spec: LocalAggregate,
    codec: KeyCodec,
    schema: SchemaRef,
    context: SubtaskContext,
    /// By slice end; a single one under 0 if not windowed.
    slices: BTreeMap<TimestampMs, Table>,
    groups: usize,
}

/// A batch's columns, evaluated.
struct Input {
    keys: Vec<ArrayRef>,
    args: Vec<Vec<ArrayRef>>,
    masks: Vec<Option<BooleanArray>>,
    rows: usize,
}

impl Input {
    fn taken(&self, rows: &[u32]) -> Result<Self> {
        let indices = UInt32Array::from(rows.to_vec());
        let one = |column: &ArrayRef| take(column, &indices, None).map_err(arrow_failed);
        Ok(Self {
            keys: self.keys.iter().map(one).collect::<Result<_>>()?,
            args: self.args.iter().map(|a| a.iter().map(one).collect()).collect::<Result<_>>()?,
            masks: self
                .masks
                .iter()
                .map(|m| m.as_ref().map(|m| one(&(Arc::new(m.clone()) as ArrayRef)).map(|a| a.as_boolean().clone())))
                .map(Option::transpose)
                .collect::<Result<_>>()?,
            rows: rows.len(),
        })
    }
}

impl LocalOperator {
    fn input(&self, rows: &RecordBatch) -> Result<Input> {
        let calls = &self.spec.grouping.calls;
        let all = |exprs: &[Arc<dyn PhysicalExpr>]| exprs.iter().map(|e| evaluate(e, rows)).collect::<Result<Vec<_>>>();
        let mask = |filter: &Arc<dyn PhysicalExpr>| evaluate(filter, rows).map(|m| m.as_boolean().clone());
        Ok(Input {
            keys: all(&self.spec.keys)?,
            args: calls.iter().map(|c| all(&c.args)).collect::<Result<_>>()?,
            masks: calls.iter().map(|c| c.filter.as_ref().map(mask).transpose()).collect::<Result<_>>()?,
            rows: rows.num_rows(),
        })
    }

    fn update(&mut self, slice_end: TimestampMs, input: &Input) -> Result<()> {
        let grouping = &self.spec.grouping;
        let windowed = grouping.windowed;
        let table = self.slices.entry(slice_end).or_insert_with(|| {
            let counter = windowed.then_some(ColumnType::Long);
            Table::new(grouping.column_types().into_iter().chain(counter).collect())
        });
        let before = table.len();
        let keys = self.codec.encode(&input.keys)?;
        let hashes = hash_keys(&input.keys, input.rows)?;
        let slots: Vec<u32> = hashes.iter().enumerate().map(|(row, h)| table.slot(*h, keys.get(row)).0).collect();
        for (((at, call), args), mask) in grouping.placed().zip(&input.args).zip(&input.masks) {
            call.update(table, at, &slots, args, mask.as_ref())?;
        }
        if windowed {
            table.write_runs(&slots, grouping.column_types().len(), |column, rows, _| {
                if let Column::Long(counts) = column {
                    rows.iter().for_each(|r| counts[*r as usize] = Some(counts[*r as usize].unwrap_or(0) + 1));
                }
            });
        }
        self.groups += table.len() - before;
        Ok(())
    }

    fn emit(&mut self, slice_end: TimestampMs, table: &Table, out: &mut Output) -> Result<()> {
        self.groups -= table.len();
        let grouping = &self.spec.grouping;
        let end = grouping.windowed.then_some(slice_end);
        let counter = grouping.column_types().len();
        let mut slot = 0;
        for partial in grouping.encode(end, table.rows())? {
            let rows = partial.num_rows();
            let mut columns = partial.columns().to_vec();
            if grouping.windowed {
                let count = |slot: usize| table.rows().long(slot, counter).unwrap_or(0);
                columns.push(Arc::new((slot..slot + rows).map(count).collect::<Int64Array>()));
            }
            slot += rows;
            out.emit(Batch::new(batch(&self.schema, columns, rows)?));
        }
        Ok(())
    }
}

impl Operator for LocalOperator {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        let Some((time, slicing)) = &self.spec.slicing else {
            let input = self.input(&batch.rows)?;
            self.update(0, &input)?;
            return self.flush(out);
        };
        let slicing = *slicing;
        let mut rows = batch.rows;
        let mut times = cast(&evaluate(time, &rows)?, &time_type()).map_err(arrow_failed)?;
        if times.null_count() > 0 {
            // A row without a time belongs to no window: it counts as late.
            let known = is_not_null(&times).map_err(arrow_failed)?;
            add(&self.context.metrics.late, times.null_count() as u64);
            rows = arrow::compute::filter_record_batch(&rows, &known).map_err(arrow_failed)?;
            times = filter(&times, &known).map_err(arrow_failed)?;
        }
        if rows.num_rows() == 0 {
            return Ok(());
        }
        let input = self.input(&rows)?;
        let times: &TimestampMillisecondArray = times.as_primitive::<TimestampMillisecondType>();
        let least = times.values().iter().copied().min().unwrap_or(0);
        let most = times.values().iter().copied().max().unwrap_or(0);
        if slicing.slice_end(least) == slicing.slice_end(most) {
            self.update(slicing.slice_end(least), &input)?;
        } else {
            let mut by_slice: BTreeMap<TimestampMs, Vec<u32>> = BTreeMap::new();
            for (row, time) in times.values().iter().enumerate() {
                by_slice.entry(slicing.slice_end(*time)).or_default().push(row as u32);
            }
            for (end, taken) in by_slice {
                self.update(end, &input.taken(&taken)?)?;
            }
        }
        if self.groups > GROUPS_MAX {
            return self.flush(out);
        }
        Ok(())
    }

    fn on_watermark(&mut self, watermark: TimestampMs, out: &mut Output) -> Result<()> {
        while let Some((end, _)) = self.slices.first_key_value() {
            if *end - 1 > watermark {
                break;
            }
            if let Some((end, table)) = self.slices.pop_first() {
                self.emit(end, &table, out)?;
            }
        }
        Ok(())
    }

    fn flush(&mut self, out: &mut Output) -> Result<()> {
        while let Some((end, table)) = self.slices.pop_first() {
            self.emit(end, &table, out)?;
        }
        Ok(())
    }
}
