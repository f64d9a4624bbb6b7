//! Windowed aggregate: the keyed half. Keeps slices (panes), not a group per overlapping window.
//!
//! A window of `size` that begins every `slide` is a run of slices of gcd(size, slide). A row counts in one slice; a window's
//! result merges its slices when the watermark passes its end. Invariant: a window fires once, in the order of window ends,
//! and a slice is dropped when its last window has fired.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{
    array::{ArrayRef, AsArray, TimestampMillisecondArray, UInt32Array},
    compute::take_record_batch,
    datatypes::{Int64Type, SchemaRef, TimestampMillisecondType},
    record_batch::RecordBatch,
};
use floodmark_dataflow::{
    Barrier, Batch, Operator, OperatorFactory, Output, Port, RestoredShard, StateSnapshot, SubtaskContext,
    WATERMARK_MAX, WATERMARK_MIN, metrics::add,
};
use floodmark_snapshot::{Error, Result, TimestampMs};
use floodmark_state::{Rows, Table};

use super::{
    key::KeyCodec,
    partial::{BATCH_ROWS_MAX, Grouping, batch, keys_of_slots},
};

/// How event time is cut into windows, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Windows {
    /// Length of a window.
    pub(crate) size: i64,
    /// From the beginning of one window to that of the next.
    pub(crate) slide: i64,
    /// Where a window begins, counted from the epoch.
    pub(crate) offset: i64,
}

impl Windows {
    /// Length of a slice.
    pub(crate) fn slice(self) -> i64 {
        let (mut a, mut b) = (self.size, self.slide);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    }

    /// The end of the slice that holds `time`.
    pub(crate) fn slice_end(self, time: TimestampMs) -> TimestampMs {
        let slice = self.slice();
        // Arithmetic stays clear of overflow.
        let time = time.clamp(WATERMARK_MIN, WATERMARK_MAX);
        (time - self.offset).div_euclid(slice) * slice + slice + self.offset
    }

    /// The first window end at or after the end of a slice.
    fn first_end(self, slice_end: TimestampMs) -> TimestampMs {
        let phase = self.offset + self.size;
        let past = (slice_end - phase).rem_euclid(self.slide);
        if past == 0 { slice_end } else { slice_end - past + self.slide }
    }

    /// The end of the last window that holds a slice. Before [`Windows::first_end`] if no window holds it.
    fn last_end(self, slice_end: TimestampMs) -> TimestampMs {
        let end = slice_end - self.slice() + self.size;
        end - (end - self.offset - self.size).rem_euclid(self.slide)
    }

    /// The ends of the windows that hold `time`.
    pub(crate) fn ends(self, time: TimestampMs) -> impl Iterator<Item = TimestampMs> {
        let slice_end = self.slice_end(time);
        let last = self.last_end(slice_end);
        std::iter::successors(Some(self.first_end(slice_end)), move |end| Some(end + self.slide))
            .take_while(move |end| *end <= last)
    }
}

/// How rows find their slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slicing {
    /// By their time.
    Windows(Windows),
    /// They carry the end of their window already; windows have this size.
    Attached(i64),
}

impl Slicing {
    /// The slice of a row, from its time or window end.
    pub(crate) fn slice_end(self, time: TimestampMs) -> TimestampMs {
        match self {
            Self::Windows(windows) => windows.slice_end(time),
            Self::Attached(_) => time,
        }
    }

    fn first_end(self, slice_end: TimestampMs) -> TimestampMs {
        match self {
            Self::Windows(windows) => windows.first_end(slice_end),
            Self::Attached(_) => slice_end,
        }
    }

    fn last_end(self, slice_end: TimestampMs) -> TimestampMs {
        match self {
            Self::Windows(windows) => windows.last_end(slice_end),
            Self::Attached(_) => slice_end,
        }
    }

    fn next_end(self, end: TimestampMs) -> TimestampMs {
        match self {
            Self::Windows(windows) => windows.first_end(end + 1),
            Self::Attached(_) => end + 1,
        }
    }

    fn size(self) -> i64 {
        match self {
            Self::Windows(windows) => windows.size,
            Self::Attached(size) => size,
        }
    }
}

/// A column of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutputColumn {
    Key(usize),
    WindowStart,
    WindowEnd,
    /// The last millisecond of the window.
    WindowTime,
    Call(usize),
}

/// What a windowed aggregate does.
#[derive(Clone)]
pub(crate) struct WindowAggregate {
    pub(crate) grouping: Grouping,
    pub(crate) slicing: Slicing,
    pub(crate) output: Vec<OutputColumn>,
    pub(crate) schema: SchemaRef,
}

impl OperatorFactory for WindowAggregate {
    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok(Box::new(WindowOperator {
            codec: KeyCodec::new(&self.grouping.keys)?,
            spec: self.clone(),
            context: context.clone(),
            slices: BTreeMap::new(),
            watermark: WATERMARK_MIN,
        }))
    }
}

struct WindowOperator {
    spec: WindowAggregate,
    codec: KeyCodec,
    context: SubtaskContext,
    slices: BTreeMap<TimestampMs, Table>,
    watermark: TimestampMs,
}

impl WindowOperator {
    /// Whether the last window that holds a slice has fired.
    fn over(&self, slice_end: TimestampMs) -> bool {
        self.spec.slicing.last_end(slice_end) - 1 <= self.watermark
    }

    fn slice(&mut self, end: TimestampMs, rows: &RecordBatch, hashes: &[u64]) -> Result<()> {
        let slicing = self.spec.slicing;
        if slicing.first_end(end) > slicing.last_end(end) {
            return Ok(()); // between windows
        }
        if self.over(end) {
            let late = rows.columns().last().map_or(0, |n| n.as_primitive::<Int64Type>().values().iter().sum());
            add(&self.context.metrics.late, late.max(0) as u64);
            return Ok(());
        }
        let grouping = &self.spec.grouping;
        let table = self.slices.entry(end).or_insert_with(|| Table::new(grouping.column_types()));
        let keys = grouping.keys_of(&self.codec, rows)?;
        let slots: Vec<u32> = hashes.iter().enumerate().map(|(row, h)| table.slot(*h, keys.get(row)).0).collect();
        grouping.merge(table, &slots, rows)
    }

    fn fire(&self, end: TimestampMs, out: &mut Output) -> Result<()> {
        let size = self.spec.slicing.size();
        let mut slices = match self.spec.slicing {
            Slicing::Windows(_) => self.slices.range(end - size + 1..=end),
            Slicing::Attached(_) => self.slices.range(end..=end),
        };
        let grouping = &self.spec.grouping;
        match (slices.next(), slices.next()) {
            (None, _) => Ok(()),
            (Some((_, only)), None) => self.emit(end, only.rows(), out),
            (Some(first), Some(second)) => {
                let mut merged = Table::new(grouping.column_types());
                for (slice_end, table) in [first, second].into_iter().chain(slices) {
                    let rows = table.rows();
                    let mut slots = Vec::with_capacity(rows.len());
                    for chunk in rows.chunks() {
                        slots.extend((0..chunk.len()).map(|row| merged.slot(chunk.hash(row), chunk.key(row)).0));
                    }
                    let all: Vec<u32> = (0..rows.len() as u32).collect();
                    for (at, call) in grouping.placed() {
                        call.merge(&mut merged, at, &slots, &call.states(rows, at, &all)?)
                            .map_err(|e| e.context(format!("slice {slice_end}")))?;
                    }
                }
                self.emit(end, merged.rows(), out)
            }
        }
    }

    fn emit(&self, end: TimestampMs, rows: &Rows, out: &mut Output) -> Result<()> {
        let WindowAggregate { grouping, slicing, output, schema } = &self.spec;
        for start in (0..rows.len()).step_by(BATCH_ROWS_MAX) {
            let slots: Vec<u32> = (start as u32..rows.len().min(start + BATCH_ROWS_MAX) as u32).collect();
            let keys = keys_of_slots(&self.codec, rows, &slots)?;
            let calls: Vec<ArrayRef> =
                grouping.placed().map(|(at, call)| call.results(rows, at, &slots)).collect::<Result<_>>()?;
            let time = |t: TimestampMs| Arc::new(TimestampMillisecondArray::from_value(t, slots.len())) as ArrayRef;
            let columns = output
                .iter()
                .map(|column| match column {
                    OutputColumn::Key(i) => keys[*i].clone(),
                    OutputColumn::WindowStart => time(end - slicing.size()),
                    OutputColumn::WindowEnd => time(end),
                    OutputColumn::WindowTime => time(end - 1),
                    OutputColumn::Call(i) => calls[*i].clone(),
                })
                .collect();
            out.emit(Batch::new(batch(schema, columns, slots.len())?));
        }
        Ok(())
    }
}

impl Operator for WindowOperator {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        let rows = &batch.rows;
        let hashes = self.spec.grouping.hashes_of(&batch)?;
        let ends = rows.column(0).as_primitive::<TimestampMillisecondType>().values();
        let Some(first) = ends.first().copied() else { return Ok(()) };
        if ends.iter().all(|end| *end == first) {
            return self.slice(first, rows, &hashes);
        }
        let mut by_slice: BTreeMap<TimestampMs, Vec<u32>> = BTreeMap::new();
        for (row, end) in ends.iter().enumerate() {
            by_slice.entry(*end).or_default().push(row as u32);
        }
        for (end, taken) in by_slice {
            let hashes: Vec<u64> = taken.iter().map(|row| hashes[*row as usize]).collect();
            let rows = take_record_batch(rows, &UInt32Array::from(taken)).map_err(super::arrow_failed)?;
            self.slice(end, &rows, &hashes)?;
        }
        Ok(())
    }

    fn on_watermark(&mut self, watermark: TimestampMs, out: &mut Output) -> Result<()> {
        let slicing = self.spec.slicing;
        // All windows that end here or before have fired.
        let mut fired = self.watermark.saturating_add(1);
        while let Some((slice, _)) = self.slices.first_key_value() {
            let slice = *slice;
            let end = slicing.first_end(slice).max(slicing.next_end(fired));
            if end > slicing.last_end(slice) {
                self.slices.pop_first();
                continue;
            }
            if end - 1 > watermark {
                break;
            }
            self.fire(end, out)?;
            fired = end;
        }
        self.watermark = watermark;
        while let Some((slice, _)) = self.slices.first_key_value() {
            if !self.over(*slice) {
                break;
            }
            self.slices.pop_first();
        }
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let tables = self.slices.iter().map(|(end, table)| (Some(*end), table.snapshot())).collect();
        Ok(StateSnapshot::of(vec![self.spec.grouping.pending(tables, Some(self.watermark), &self.context)]))
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        if !self.slices.is_empty() {
            return Err(Error::abort("state is restored before the first row"));
        }
        let (slices, watermark) = self.spec.grouping.restore(&shards, &self.context)?;
        self.slices = slices;
        self.watermark = watermark.unwrap_or(WATERMARK_MIN);
        Ok(())
    }

    fn state_size(&self) -> (u64, u64) {
        let size = |(rows, bytes), table: &Table| (rows + table.len() as u64, bytes + table.bytes() as u64);
        self.slices.values().fold((0, 0), size)
    }
}
