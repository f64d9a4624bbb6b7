//! Inner join of two windowed inputs: rows of the same window and key, once the window is over.
//!
//! Keeps the rows of open windows; a window is joined and dropped when the watermark passes its end. Rows of a window that
//! is over are late: dropped and counted.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, BooleanArray, UInt32Array},
    compute::{concat_batches, filter_record_batch, take_record_batch},
    datatypes::{SchemaRef, TimestampMillisecondType},
    record_batch::RecordBatch,
};
use datafusion_physical_expr::PhysicalExpr;
use floodmark_dataflow::{
    Barrier, Batch, Operator, OperatorFactory, Output, PendingShard, Port, RestoredShard, StateSnapshot,
    SubtaskContext, WATERMARK_MIN, hash::hash_keys, metrics::add,
};
use floodmark_snapshot::{Error, Result, ShardKind, TimestampMs};
use floodmark_state::shard;
use hashbrown::HashMap;

use super::{
    arrow_failed, evaluate,
    key::KeyCodec,
    partial::{BATCH_ROWS_MAX, batch},
};

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
            windows: BTreeMap::new(),
            watermark: WATERMARK_MIN,
        }))
    }
}

struct JoinOperator {
    spec: WindowJoin,
    context: SubtaskContext,
    /// Rows of each side by window end.
    windows: BTreeMap<TimestampMs, [Vec<RecordBatch>; 2]>,
    watermark: TimestampMs,
}

impl JoinOperator {
    fn add(&mut self, port: Port, rows: &RecordBatch) -> Result<()> {
        let ends = rows.column(self.spec.sides[port].window_end).as_primitive::<TimestampMillisecondType>();
        let mut by_window: BTreeMap<TimestampMs, Vec<u32>> = BTreeMap::new();
        for (row, end) in ends.iter().enumerate() {
            match end {
                Some(end) if end - 1 > self.watermark => by_window.entry(end).or_default().push(row as u32),
                _ => add(&self.context.metrics.late, 1),
            }
        }
        for (end, taken) in by_window {
            let rows = if taken.len() == rows.num_rows() {
                rows.clone()
            } else {
                take_record_batch(rows, &UInt32Array::from(taken)).map_err(arrow_failed)?
            };
            self.windows.entry(end).or_default()[port].push(rows);
        }
        Ok(())
    }

    fn join(&self, inputs: &[Vec<RecordBatch>; 2], out: &mut Output) -> Result<()> {
        if inputs.iter().any(Vec::is_empty) {
            return Ok(());
        }
        let [left, right] = &self.spec.sides;
        let rows =
            |side: &JoinSide, batches: &[RecordBatch]| concat_batches(&side.schema, batches).map_err(arrow_failed);
        let (left_rows, right_rows) = (rows(left, &inputs[0])?, rows(right, &inputs[1])?);
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

    /// The rows of a restored batch that are of this subtask's key groups.
    fn mine(&self, side: &JoinSide, rows: &RecordBatch) -> Result<RecordBatch> {
        let hashes = hash_keys(&side.key_arrays(rows), rows.num_rows())?;
        let mask: BooleanArray = hashes.into_iter().map(|h| Some(self.context.owns(h))).collect();
        filter_record_batch(rows, &mask).map_err(arrow_failed)
    }
}

impl Operator for JoinOperator {
    fn process(&mut self, port: Port, batch: Batch, _: &mut Output) -> Result<()> {
        self.add(port, &batch.rows)
    }

    fn on_watermark(&mut self, watermark: TimestampMs, out: &mut Output) -> Result<()> {
        while let Some((end, _)) = self.windows.first_key_value() {
            if *end - 1 > watermark {
                break;
            }
            if let Some((_, inputs)) = self.windows.pop_first() {
                self.join(&inputs, out)?;
            }
        }
        self.watermark = watermark;
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let watermark = self.watermark;
        let shard = |port: Port| {
            let batches: Vec<RecordBatch> = self.windows.values().flat_map(|w| w[port].iter().cloned()).collect();
            let schema = self.spec.sides[port].schema.clone();
            let rows = batches.iter().map(|b| b.num_rows() as u64).sum();
            let encode = Box::new(move || {
                let header = shard::Header { input: port as u32, ..shard::Header::new(Some(watermark)) };
                shard::write(&header, &schema, &batches)
            });
            PendingShard::new(ShardKind::Keyed, Some(self.context.key_groups), rows, encode)
        };
        Ok(StateSnapshot::of(vec![shard(0), shard(1)]))
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        let mut watermark: Option<TimestampMs> = None;
        for restored in &shards {
            let (header, batches) = shard::read(&restored.bytes)?;
            let of_shard = header.watermark.unwrap_or(WATERMARK_MIN);
            watermark = Some(watermark.map_or(of_shard, |w| w.min(of_shard)));
            let port = header.input as usize;
            let side = self
                .spec
                .sides
                .get(port)
                .cloned()
                .ok_or_else(|| Error::corrupt(format!("state of input {port} of a join of two inputs")))?;
            for rows in batches {
                let rows = self.mine(&side, &rows)?;
                // The watermark is still the least: nothing restored is late.
                self.add(port, &rows)?;
            }
        }
        self.watermark = watermark.unwrap_or(WATERMARK_MIN);
        Ok(())
    }

    fn state_size(&self) -> (u64, u64) {
        let batches = self.windows.values().flatten().flatten();
        batches.fold((0, 0), |(rows, bytes), b| (rows + b.num_rows() as u64, bytes + b.get_array_memory_size() as u64))
    }
}
