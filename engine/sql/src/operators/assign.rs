//! Gives each row its windows: one row per window that holds it, with the window's columns behind the row's own.

use std::sync::Arc;

use arrow::{
    array::{ArrayRef, AsArray, TimestampMillisecondArray, UInt32Array},
    compute::{cast, take_record_batch},
    datatypes::{SchemaRef, TimestampMillisecondType},
};
use floodmark_dataflow::{Batch, Operator, OperatorFactory, Output, Port, SubtaskContext, metrics::add};
use floodmark_snapshot::Result;

use super::{
    arrow_failed,
    partial::{batch, time_type},
    window::{OutputColumn, Windows},
};

/// What a window assigner does.
#[derive(Clone)]
pub(crate) struct WindowAssign {
    /// The column of the rows' time.
    pub(crate) time: usize,
    pub(crate) windows: Windows,
    /// Columns of the window that are wanted.
    pub(crate) columns: Vec<OutputColumn>,
    /// The input's columns, then those of the window.
    pub(crate) schema: SchemaRef,
}

impl OperatorFactory for WindowAssign {
    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok(Box::new(AssignOperator(self.clone(), context.clone())))
    }
}

struct AssignOperator(WindowAssign, SubtaskContext);

impl Operator for AssignOperator {
    fn process(&mut self, _: Port, input: Batch, out: &mut Output) -> Result<()> {
        let Self(WindowAssign { time, windows, columns, schema }, context) = self;
        let times = cast(input.rows.column(*time), &time_type()).map_err(arrow_failed)?;
        let times = times.as_primitive::<TimestampMillisecondType>();
        let mut rows = Vec::with_capacity(times.len());
        let mut ends = Vec::with_capacity(times.len());
        for (row, time) in times.iter().enumerate() {
            let before = ends.len();
            ends.extend(time.into_iter().flat_map(|t| windows.ends(t)));
            rows.resize(ends.len(), row as u32);
            if time.is_none() {
                debug_assert_eq!(before, ends.len());
                add(&context.metrics.late, 1);
            }
        }
        let taken = take_record_batch(&input.rows, &UInt32Array::from(rows)).map_err(arrow_failed)?;
        let shifted = |by: i64| -> ArrayRef {
            Arc::new(ends.iter().map(|end| Some(end + by)).collect::<TimestampMillisecondArray>())
        };
        let windows = columns.iter().map(|column| match column {
            OutputColumn::WindowStart => shifted(-windows.size),
            OutputColumn::WindowTime => shifted(-1),
            OutputColumn::WindowEnd | OutputColumn::Key(_) | OutputColumn::Call(_) => shifted(0),
        });
        let columns = taken.columns().iter().cloned().chain(windows).collect();
        out.emit(Batch::new(batch(schema, columns, ends.len())?));
        Ok(())
    }
}
