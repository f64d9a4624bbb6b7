//! The streaming operators that a plan is made of. Synchronous, batch-wise, no I/O.
//!
//! Aggregates come in two halves: a [`local`] one that combines rows before the exchange and keeps nothing across a barrier,
//! and a keyed one behind it ([`window`] or [`group`]). Between the halves, and in snapshots, travel *partial* batches, whose
//! layout is [`partial`]'s.

use std::sync::Arc;

use arrow::{array::ArrayRef, record_batch::RecordBatch};
use datafusion_common::DataFusionError;
use datafusion_physical_expr::PhysicalExpr;
use floodmark_snapshot::{Error, Result};

pub(crate) mod aggregate;
pub(crate) mod assign;
pub(crate) mod calc;
pub(crate) mod dedup;
pub(crate) mod group;
pub(crate) mod join;
pub(crate) mod key;
pub(crate) mod local;
pub(crate) mod partial;
pub(crate) mod required;
pub(crate) mod window;

/// An expression over a batch, a value per row.
pub(crate) fn evaluate(expr: &Arc<dyn PhysicalExpr>, batch: &RecordBatch) -> Result<ArrayRef> {
    expr.evaluate(batch).and_then(|value| value.into_array(batch.num_rows())).map_err(|e| failed(&e))
}

/// An error of an expression: the row can't be computed, now or ever.
fn failed(error: &DataFusionError) -> Error {
    Error::abort(error.strip_backtrace())
}

fn arrow_failed(error: arrow::error::ArrowError) -> Error {
    Error::abort(error.to_string())
}
