//! Counters that an operator keeps while it runs, read by whoever shows progress.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// Counters of one operator in one subtask. All relaxed: they tell how much, never when.
#[derive(Debug)]
pub struct OperatorMetrics {
    /// Rows that came in.
    pub rows_in: AtomicU64,
    /// Rows that went out. For a sink: rows written.
    pub rows_out: AtomicU64,
    /// Bytes read by a source or written by a sink, encoded.
    pub bytes: AtomicU64,
    /// Rows that came after their window had closed.
    pub late: AtomicU64,
    /// Records that could not be decoded, and were skipped or went to the dead letters.
    pub bad: AtomicU64,
    /// Keys in state.
    pub state_rows: AtomicU64,
    /// Bytes of state.
    pub state_bytes: AtomicU64,
    /// The last watermark, milliseconds since the epoch; `i64::MIN` before the first.
    pub watermark: AtomicI64,
}

impl Default for OperatorMetrics {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            rows_in: zero(),
            rows_out: zero(),
            bytes: zero(),
            late: zero(),
            bad: zero(),
            state_rows: zero(),
            state_bytes: zero(),
            watermark: AtomicI64::new(i64::MIN),
        }
    }
}

/// Adds to a counter.
pub fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Reads a counter.
#[must_use]
pub fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
