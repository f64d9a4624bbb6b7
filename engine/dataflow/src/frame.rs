//! What travels on a channel.

use std::sync::Arc;

use arrow::{
    array::{Array, UInt32Array},
    compute::take_record_batch,
    record_batch::RecordBatch,
};
pub use floodmark_snapshot::coordination::{Barrier, BarrierKind};
use floodmark_snapshot::{Error, Result, TimestampMs};

/// Name of the column that makes a stream a changelog: `Int8`, always the last column, values of [`RowKind`].
/// A stream without it holds insertions only.
pub const ROW_KIND: &str = "$kind";

/// Before the first event. Window arithmetic stays clear of overflow.
pub const WATERMARK_MIN: TimestampMs = i64::MIN / 4;
/// After the last event: what a source sends when its input has ended.
pub const WATERMARK_MAX: TimestampMs = i64::MAX / 4;

/// What a row of a changelog does to the result. An update is an `UpdateBefore` directly followed, in the same batch, by
/// its `UpdateAfter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i8)]
pub enum RowKind {
    /// `+I`: a new row.
    Insert = 0,
    /// `-U`: the row as it was before an update.
    UpdateBefore = 1,
    /// `+U`: the row as it is after an update.
    UpdateAfter = 2,
    /// `-D`: the row is gone.
    Delete = 3,
}

impl RowKind {
    /// The kind of a value of the [`ROW_KIND`] column; a value that is none counts as an insertion.
    #[must_use]
    pub fn from_i8(value: i8) -> Self {
        match value {
            1 => Self::UpdateBefore,
            2 => Self::UpdateAfter,
            3 => Self::Delete,
            _ => Self::Insert,
        }
    }

    /// `+I`, `-U`, `+U` or `-D`.
    #[must_use]
    pub fn symbol(self) -> &'static str {
        match self {
            Self::Insert => "+I",
            Self::UpdateBefore => "-U",
            Self::UpdateAfter => "+U",
            Self::Delete => "-D",
        }
    }
}

/// Rows on their way. Never empty on a channel.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The rows.
    pub rows: RecordBatch,
    /// The hash of each row's key, if the batch came over a hash exchange: computed once, used for routing, key group and
    /// probing. Only valid for the key of that exchange; an operator that changes the rows drops it.
    pub hashes: Option<Arc<[u64]>>,
}

impl Batch {
    /// Rows without key hashes.
    #[must_use]
    pub fn new(rows: RecordBatch) -> Self {
        Self { rows, hashes: None }
    }

    /// Some of the rows, by their numbers, with their hashes.
    ///
    /// # Errors
    /// When a number is none of a row.
    pub fn take(&self, rows: Vec<u32>) -> Result<Self> {
        let hashes =
            self.hashes.as_ref().map(|all| rows.iter().filter_map(|r| all.get(*r as usize)).copied().collect());
        let rows = take_record_batch(&self.rows, &UInt32Array::from(rows))
            .map_err(|e| Error::abort(format!("pick rows of a batch: {e}")))?;
        Ok(Self { rows, hashes })
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.num_rows()
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.num_rows() == 0
    }

    /// Bytes that the batch weighs on a channel: the part of the buffers that its rows use, not what they share.
    #[must_use]
    pub fn weight(&self) -> usize {
        let columns: usize = self
            .rows
            .columns()
            .iter()
            .map(|c| c.to_data().get_slice_memory_size().unwrap_or_else(|_| c.get_array_memory_size()))
            .sum();
        columns + self.hashes.as_ref().map_or(0, |h| h.len() * 8) + 64
    }
}

/// What travels on a channel, in order.
#[derive(Clone, Debug)]
pub enum Frame {
    /// Rows.
    Batch(Batch),
    /// No row at or before this time is expected any more.
    Watermark(TimestampMs),
    /// See [`Barrier`].
    Barrier(Barrier),
    /// A barrier that overtakes: the receiver looks out for it, and takes the rows before it into its snapshot.
    Overtaking(Barrier),
    /// The channel has no rows for now and holds no watermark back, until the next `Batch` or `Watermark`.
    Idle,
    /// Nothing comes after this.
    End,
}
