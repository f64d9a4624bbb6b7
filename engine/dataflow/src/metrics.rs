//! Counters that an operator keeps while it runs, and what its task spends its time on; read by whoever shows progress.
//!
//! Invariant: measuring costs a task one reading of the clock per step, whatever the number of rows.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use floodmark_snapshot::env::Clock;
use serde::{Deserialize, Serialize};

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

/// Shares are of the time since one to two times this long ago.
pub const SHARES_OVER: Duration = Duration::from_secs(2);

/// What a task's time goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spent {
    /// It works.
    Busy,
    /// It waits for input, or for state that is on its way.
    Idle,
    /// It waits for room in an output.
    BackPressured,
}

/// What a task's time has gone to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Times {
    /// See [`Spent::Busy`].
    pub busy: Duration,
    /// See [`Spent::Idle`].
    pub idle: Duration,
    /// See [`Spent::BackPressured`].
    pub back_pressured: Duration,
}

impl Times {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.busy + self.idle + self.back_pressured
    }

    /// Adds another task's.
    pub fn add(&mut self, other: &Self) {
        self.busy += other.busy;
        self.idle += other.idle;
        self.back_pressured += other.back_pressured;
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            busy: self.busy.saturating_sub(before.busy),
            idle: self.idle.saturating_sub(before.idle),
            back_pressured: self.back_pressured.saturating_sub(before.back_pressured),
        }
    }

    fn charge(&mut self, spent: Spent, time: Duration) {
        match spent {
            Spent::Busy => self.busy += time,
            Spent::Idle => self.idle += time,
            Spent::BackPressured => self.back_pressured += time,
        }
    }
}

/// What a task spends its time on. Written by the task, at most a few times per step; read at any time.
pub struct TaskMetrics {
    clock: Arc<dyn Clock>,
    ledger: Mutex<Ledger>,
}

#[derive(Debug)]
struct Ledger {
    /// Up to when time is charged.
    charged_to: Duration,
    /// What the time since then will be charged to.
    spent: Spent,
    times: Times,
    /// What it was when shares were last begun anew, and the time before that.
    young: Times,
    old: Times,
    young_since: Duration,
}

impl std::fmt::Debug for TaskMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TaskMetrics").field("ledger", &*self.lock()).finish_non_exhaustive()
    }
}

impl TaskMetrics {
    /// Of a task that is there from now on, and waits to be run.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let now = clock.monotonic();
        let (times, spent) = (Times::default(), Spent::Idle);
        let ledger = Ledger { charged_to: now, spent, times, young: times, old: times, young_since: now };
        Self { clock, ledger: Mutex::new(ledger) }
    }

    /// It is `now`, and from now on time is spent on this.
    pub(crate) fn turn(&self, now: Duration, spent: Spent) {
        let mut ledger = self.lock();
        ledger.charge(now);
        ledger.spent = spent;
    }

    /// All the time since the last turn is spent on this: what only the end of a step tells.
    pub(crate) fn call_it(&self, spent: Spent) {
        self.lock().spent = spent;
    }

    /// What the time has gone to since the task is there; and lately, see [`SHARES_OVER`].
    #[must_use]
    pub fn read(&self) -> (Times, Times) {
        let now = self.clock.monotonic();
        let mut ledger = self.lock();
        // A wait is charged as it goes on, and once: what is read never goes back.
        ledger.charge(now);
        (ledger.times, ledger.times.since(&ledger.old))
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    fn charge(&mut self, now: Duration) {
        // The reader's reading of the clock may be older than the task's.
        let time = now.saturating_sub(self.charged_to);
        self.times.charge(self.spent, time);
        self.charged_to = self.charged_to.max(now);
        if self.charged_to.saturating_sub(self.young_since) >= SHARES_OVER {
            self.old = std::mem::replace(&mut self.young, self.times);
            self.young_since = self.charged_to;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A clock that goes on when it is told to.
    #[derive(Default)]
    pub(crate) struct ByHand(pub(crate) Mutex<Duration>);

    impl Clock for ByHand {
        fn wall_ms(&self) -> i64 {
            0
        }

        fn monotonic(&self) -> Duration {
            *self.0.lock().unwrap()
        }
    }

    fn times(busy: u32, idle: u32, back_pressured: u32) -> Times {
        Times { busy: MS * busy, idle: MS * idle, back_pressured: MS * back_pressured }
    }

    #[test]
    fn all_time_is_charged_once_also_what_is_read_while_it_passes() {
        let clock = Arc::new(ByHand::default());
        let metrics = TaskMetrics::new(clock.clone());
        metrics.turn(MS * 5, Spent::Busy);
        metrics.turn(MS * 8, Spent::BackPressured);
        *clock.0.lock().unwrap() = MS * 10;
        assert_eq!(metrics.read().0, times(3, 5, 2));
        *clock.0.lock().unwrap() = MS * 11;
        assert_eq!(metrics.read().0, times(3, 5, 3));
        // The task has read the clock before the reader has, and says so after it.
        metrics.turn(MS * 10, Spent::Busy);
        metrics.turn(MS * 15, Spent::Busy);
        metrics.call_it(Spent::Idle);
        *clock.0.lock().unwrap() = MS * 20;
        assert_eq!(metrics.read().0, times(7, 10, 3));
    }

    #[test]
    fn shares_are_of_the_last_seconds() {
        let clock = Arc::new(ByHand::default());
        let metrics = TaskMetrics::new(clock.clone());
        let window = u32::try_from(SHARES_OVER.as_millis()).unwrap();
        let mut now = Duration::ZERO;
        for spent in [Spent::Busy, Spent::Idle, Spent::BackPressured] {
            for _ in 0..10 * window {
                metrics.turn(now, spent);
                now += MS;
            }
            *clock.0.lock().unwrap() = now;
            metrics.turn(now, spent);
            let (_, lately) = metrics.read();
            let (all, mut this) = (lately.total(), Times::default());
            this.charge(spent, all);
            assert_eq!(lately, this, "nothing else lately");
            assert!((SHARES_OVER..=2 * SHARES_OVER).contains(&all), "{all:?}");
        }
        assert_eq!(metrics.read().0, times(10 * window, 10 * window, 10 * window));
    }
}
