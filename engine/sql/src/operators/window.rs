//! Windowed aggregate: the keyed half. Keeps slices (panes), not a group per overlapping window.
//!
//! A window of `size` that begins every `slide` is a run of slices of gcd(size, slide). A row counts in one slice; a window's
//! result merges its slices when the watermark passes its end. Invariant: a window of a key fires once, in the order of window
//! ends, and a slice is dropped when its last window has fired.
//!
//! After a restore, key groups may be ahead of the subtask's watermark: they came from a subtask that was further. Of these, a
//! window that has fired there does not fire again, and a row of it is late, until the watermark has passed them all.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

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
use floodmark_snapshot::{Epoch, KeyGroup, Result, TimestampMs};
use floodmark_state::{KeyGroupWatermarks, KeyedState, Rows, Table};

use super::{
    key::KeyCodec,
    partial::{BATCH_ROWS_MAX, Grouping, GroupingLayout, batch, keys_of_slots},
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
            state: context.keyed("", GroupingLayout::new(&self.grouping)?, None)?,
            reached: WATERMARK_MIN.into(),
        }))
    }
}

struct WindowOperator {
    spec: WindowAggregate,
    codec: KeyCodec,
    context: SubtaskContext,
    /// Slices, in the namespaces of their ends.
    state: Box<dyn KeyedState>,
    /// How far event time has come: the subtask's watermark, and key groups that were further before a restore.
    reached: KeyGroupWatermarks,
}

impl WindowOperator {
    /// What event time passes when the last window that holds a slice fires.
    fn over_at(&self, slice_end: TimestampMs) -> Option<TimestampMs> {
        Some(self.spec.slicing.last_end(slice_end) - 1)
    }

    fn slice(&mut self, end: TimestampMs, rows: &RecordBatch, hashes: &[u64]) -> Result<()> {
        let slicing = self.spec.slicing;
        if slicing.first_end(end) > slicing.last_end(end) {
            return Ok(()); // between windows
        }
        let over_at = self.over_at(end);
        if self.reached.min() >= over_at {
            self.count_late(rows);
            return Ok(());
        }
        if self.reached.is_even() || self.reached.max() < over_at {
            return self.merge(end, rows, hashes);
        }
        let is_late = |row: &u32| self.reached.of(self.group(hashes[*row as usize])) >= over_at;
        let (late, others): (Vec<u32>, Vec<u32>) = (0..hashes.len() as u32).partition(is_late);
        let hashes: Vec<u64> = others.iter().map(|row| hashes[*row as usize]).collect();
        let taken = |taken| take_record_batch(rows, &UInt32Array::from(taken)).map_err(super::arrow_failed);
        self.count_late(&taken(late)?);
        let others = taken(others)?;
        if hashes.is_empty() { Ok(()) } else { self.merge(end, &others, &hashes) }
    }

    fn group(&self, hash: u64) -> KeyGroup {
        KeyGroup::of(hash, self.context.max_parallelism)
    }

    fn count_late(&self, rows: &RecordBatch) {
        let late = rows.columns().last().map_or(0, |n| n.as_primitive::<Int64Type>().values().iter().sum());
        add(&self.context.metrics.late, late.max(0) as u64);
    }

    fn merge(&mut self, end: TimestampMs, rows: &RecordBatch, hashes: &[u64]) -> Result<()> {
        let grouping = &self.spec.grouping;
        let keys = grouping.keys_of(&self.codec, rows)?;
        let slots = self.state.slots(end, hashes, &keys.all(rows.num_rows()))?;
        grouping.merge(self.state.table(end), &slots.at, rows)
    }

    fn fire(&mut self, end: TimestampMs, out: &mut Output) -> Result<()> {
        let Self { spec, codec, state, reached, context } = self;
        let slices = match spec.slicing {
            Slicing::Windows(windows) => state.namespaces(end - windows.size + 1..=end),
            Slicing::Attached(_) => state.namespaces(end..=end),
        };
        let firing = Firing { reached, max_parallelism: context.max_parallelism, passes: end - 1 };
        if let [only] = slices.as_slice() {
            return state.scan(*only, &mut |rows, slots| {
                let slots = firing.of(rows, slots);
                slots.chunks(BATCH_ROWS_MAX).try_for_each(|slots| spec.emit(codec, end, rows, slots, out))
            });
        }
        let grouping = &spec.grouping;
        let mut merged = Table::new(grouping.column_types());
        for slice_end in slices {
            state.scan(slice_end, &mut |rows, slots| {
                let slots = firing.of(rows, slots);
                let to: Vec<u32> = slots.iter().map(|s| merged.slot(rows.hash(*s), rows.key(*s)).0).collect();
                for (at, call) in grouping.placed() {
                    call.merge(&mut merged, at, &to, &call.states(rows, at, &slots)?)
                        .map_err(|e| e.context(format!("slice {slice_end}")))?;
                }
                Ok(())
            })?;
        }
        merged.rows().pages(BATCH_ROWS_MAX).try_for_each(|slots| spec.emit(codec, end, merged.rows(), &slots, out))
    }
}

/// A window that fires: in which key groups it has not fired before.
struct Firing<'a> {
    reached: &'a KeyGroupWatermarks,
    max_parallelism: u16,
    /// What event time passes now.
    passes: TimestampMs,
}

impl Firing<'_> {
    /// Of some rows of a slice those that count.
    fn of<'s>(&self, rows: &Rows, slots: &'s [u32]) -> Cow<'s, [u32]> {
        if self.reached.max() < Some(self.passes) {
            return Cow::Borrowed(slots);
        }
        let group = |slot: u32| KeyGroup::of(rows.hash(slot), self.max_parallelism);
        slots.iter().copied().filter(|slot| self.reached.of(group(*slot)) < Some(self.passes)).collect()
    }
}

impl WindowAggregate {
    /// Emits the results of some rows, at most [`BATCH_ROWS_MAX`].
    fn emit(&self, codec: &KeyCodec, end: TimestampMs, rows: &Rows, slots: &[u32], out: &mut Output) -> Result<()> {
        let Self { grouping, slicing, output, schema } = self;
        let keys = keys_of_slots(codec, rows, slots)?;
        let calls: Vec<ArrayRef> =
            grouping.placed().map(|(at, call)| call.results(rows, at, slots)).collect::<Result<_>>()?;
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
        let before = self.reached.min().unwrap_or(WATERMARK_MIN);
        if watermark <= before {
            // After a restore, an input that was idle holds event time back anew; what has fired does not fire again.
            return Ok(());
        }
        let slicing = self.spec.slicing;
        // All windows that end here or before have fired.
        let mut fired = before.saturating_add(1);
        while let Some(slice) = self.state.first_namespace() {
            let end = slicing.first_end(slice).max(slicing.next_end(fired));
            if end > slicing.last_end(slice) {
                self.state.drop_namespace(slice)?;
                continue;
            }
            if end - 1 > watermark {
                break;
            }
            self.fire(end, out)?;
            fired = end;
        }
        self.reached.raise(watermark);
        while let Some(slice) = self.state.first_namespace().filter(|s| self.over_at(*s) <= Some(watermark)) {
            self.state.drop_namespace(slice)?;
        }
        Ok(())
    }

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        self.state.snapshot(barrier, &self.reached)
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        self.state.restore_together(&shards)
    }

    fn restores_by_key_group(&self) -> bool {
        self.state.restores_by_key_group()
    }

    fn arrived(&mut self) -> Result<()> {
        self.reached = self.state.arrived()?;
        self.reached.raise(WATERMARK_MIN);
        Ok(())
    }

    fn restored(&mut self) -> Result<()> {
        self.reached = self.state.restored()?;
        self.reached.raise(WATERMARK_MIN);
        Ok(())
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
