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
            // What fails is a time too long for a `Duration`; one that has passed is no wait.
            sleep(Duration::try_from_secs_f64(next.max(0.0)).map_or(wait, |d| d.min(wait)));
        }
        let due = due();
        if due < worth { 0 } else { due.min(wanted) }
    }

    /// So many rows have been made.
    pub(crate) fn took(&mut self, rows: u64) {
        self.taken += rows;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use floodmark_snapshot::Env;

    use super::*;

    #[derive(Default)]
    struct Hand(AtomicU64);

    impl Clock for Hand {
        fn wall_ms(&self) -> i64 {
            0
        }

        fn monotonic(&self) -> Duration {
            Duration::from_millis(self.0.load(Ordering::Relaxed))
        }
    }

    /// What is allowed at each of these times (ms), if all that is allowed is taken.
    fn check(rate: f64, wanted: u64, times: &[u64], expected: &[u64]) {
        let clock = Arc::new(Hand::default());
        let mut pace = Pace::new(clock.clone(), Some(rate));
        let allowed = times.iter().map(|ms| {
            clock.0.store(*ms, Ordering::Relaxed);
            let rows = pace.allowed(wanted, Duration::ZERO);
            pace.took(rows);
            rows
        });
        assert_eq!(allowed.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn rows_are_held_back_until_they_are_worth_a_batch() {
        check(100_000.0, 8192, &[0, 1, 9, 10, 19, 20, 35], &[0, 0, 0, 1000, 0, 1000, 1500]);
        check(10.0, 8192, &[50, 100, 150, 400], &[0, 1, 0, 3]);
        check(0.5, 8192, &[1999, 2000, 3000], &[0, 1, 0]);
    }

    #[test]
    fn a_batch_is_no_more_than_what_is_wanted() {
        check(100_000.0, 3, &[0, 1, 1], &[0, 3, 3]);
        check(10_000_000.0, 8192, &[1000, 1000], &[8192, 8192]);
    }

    #[test]
    fn a_paced_source_waits_instead_of_asking_again_and_again() {
        let clock = Env::system().clock;
        for rate in [1e5, 1.0, 1e-300] {
            let mut pace = Pace::new(clock.clone(), Some(rate));
            let start = clock.monotonic();
            let mut asked = 0;
            while clock.monotonic() - start < Duration::from_millis(200) {
                asked += 1;
                let rows = pace.allowed(8192, Duration::from_millis(10));
                pace.took(rows);
            }
            // A wait that ends a moment too early is asked for once more.
            assert!(asked <= 45, "{asked} times at {rate} a second");
            let due = (clock.monotonic() - start).as_secs_f64() * rate;
            assert!(pace.taken as f64 <= due + 1.0, "{} rows at {rate} a second", pace.taken);
        }
    }
}
