//! Keeps a generator to a rate.

use std::{sync::Arc, time::Duration};

use floodmark_snapshot::{Clock, env::sleep};

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

    /// How many rows may be made now, at most `wanted`. Waits up to `wait` if there are none.
    pub(crate) fn allowed(&self, wanted: u64, wait: Duration) -> u64 {
        let Some(rate) = self.rows_per_second else { return wanted };
        let due = || ((self.clock.monotonic() - self.start).as_secs_f64() * rate) as u64;
        if due() <= self.taken {
            let next = Duration::from_secs_f64((self.taken + 1) as f64 / rate) + self.start;
            sleep(next.saturating_sub(self.clock.monotonic()).min(wait));
        }
        due().saturating_sub(self.taken).min(wanted)
    }

    /// So many rows have been made.
    pub(crate) fn took(&mut self, rows: u64) {
        self.taken += rows;
    }
}
