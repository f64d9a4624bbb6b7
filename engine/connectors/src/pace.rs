//! Keeps a generator to a rate.

use std::{sync::Arc, time::Duration};

use floodmark_snapshot::{Clock, env::sleep};

/// Batches that a paced generator makes, about.
const BATCHES_PER_SECOND: f64 = 100.0;

/// Allows so many rows a second, counted from its making.
pub(crate) struct Pace {
    clock: Arc<dyn Clock>,
    start: Duration,
    rows_per_second: Option<f64>,
    taken: u64,
}

impl Pace {
    /// `None` is flat out.
    pub(crate) fn new(clock: Arc<dyn Clock>, rows_per_second: Option<f64>) -> Self {
        let start = clock.monotonic();
        Self { clock, start, rows_per_second, taken: 0 }
    }

    /// How many rows may be made now, at most `wanted`. Waits up to `wait` until they are worth a batch: a row at a time
    /// would cost more than the rows themselves.
    pub(crate) fn allowed(&self, wanted: u64, wait: Duration) -> u64 {
        let Some(rate) = self.rows_per_second else { return wanted };
        let now = || (self.clock.monotonic() - self.start).as_secs_f64();
        let due = || ((now() * rate) as u64).saturating_sub(self.taken);
        let worth = ((rate / BATCHES_PER_SECOND) as u64).clamp(1, wanted.max(1));
        if due() < worth {
            let next = (self.taken + worth) as f64 / rate - now();
            sleep(Duration::try_from_secs_f64(next).unwrap_or_default().min(wait));
        }
        let due = due();
        if due < worth { 0 } else { due.min(wanted) }
    }

    /// So many rows have been made.
    pub(crate) fn took(&mut self, rows: u64) {
        self.taken += rows;
    }
}
