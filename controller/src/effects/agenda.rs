//! Which job's turn it is: what is asked for soon, later, or again after a failure. Pure; the time comes in.
//!
//! Invariants: of one key only one pass is under way; what is asked for meanwhile is done after it; and passes are bounded.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    time::Duration,
};

/// Passes at the same time.
const PASSES_MAX: usize = 32;
/// From the first failure in a row to the next try; twice as long with each.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// No longer than this.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// How a pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Everything is done for now; look again at this time, if at any.
    Rest(Option<Duration>),
    /// Somebody else was faster: look again soon.
    Overtaken,
    /// Something failed: look again later.
    Failed,
    /// There is nothing of that name any more.
    Gone,
}

/// See the header of this file. Times are those of a clock that never goes back.
#[derive(Debug)]
pub(super) struct Agenda<K> {
    due: BTreeMap<(Duration, u64), K>,
    waiting: HashMap<K, (Duration, u64)>,
    /// What is under way, and when it was asked for again.
    busy: HashMap<K, Option<Duration>>,
    failures: HashMap<K, u32>,
    next: u64,
}

impl<K> Default for Agenda<K> {
    fn default() -> Self {
        Self { due: BTreeMap::new(), waiting: HashMap::new(), busy: HashMap::new(), failures: HashMap::new(), next: 0 }
    }
}

impl<K: Clone + Eq + Hash> Agenda<K> {
    /// Asks for a pass at this time at the latest.
    pub(super) fn ask(&mut self, key: K, at: Duration) {
        if let Some(again) = self.busy.get_mut(&key) {
            *again = Some(again.map_or(at, |a| a.min(at)));
            return;
        }
        if let Some(&place) = self.waiting.get(&key) {
            if place.0 <= at {
                return;
            }
            self.due.remove(&place);
        }
        let place = (at, self.next);
        self.next += 1;
        self.due.insert(place, key.clone());
        self.waiting.insert(key, place);
    }

    /// The next pass to begin, if one is due, and when it was.
    pub(super) fn take(&mut self, now: Duration) -> Option<(K, Duration)> {
        let (&place, _) =
            self.due.first_key_value().filter(|((at, _), _)| *at <= now && self.busy.len() < PASSES_MAX)?;
        let key = self.due.remove(&place)?;
        self.waiting.remove(&key);
        self.busy.insert(key.clone(), None);
        Some((key, place.0))
    }

    /// When the next pass is due that may begin then.
    pub(super) fn next_due(&self) -> Option<Duration> {
        self.due.first_key_value().filter(|_| self.busy.len() < PASSES_MAX).map(|((at, _), _)| *at)
    }

    /// A pass has ended.
    pub(super) fn done(&mut self, key: K, now: Duration, outcome: Outcome) {
        let again = self.busy.remove(&key).flatten();
        let later = match outcome {
            Outcome::Rest(wake) => {
                self.failures.remove(&key);
                wake
            }
            Outcome::Gone => {
                self.failures.remove(&key);
                None
            }
            Outcome::Overtaken => Some(now + RETRY_MIN),
            Outcome::Failed => {
                let failures = self.failures.entry(key.clone()).or_default();
                let wait = RETRY_MIN.saturating_mul(1 << (*failures).min(16)).min(RETRY_MAX);
                *failures = failures.saturating_add(1);
                Some(now + wait)
            }
        };
        if let Some(at) = again.into_iter().chain(later).min() {
            self.ask(key, at);
        }
    }

    /// How often in a row the passes of a key have failed.
    pub(super) fn failures(&self, key: &K) -> u32 {
        self.failures.get(key).copied().unwrap_or(0)
    }

    /// Keys that wait for their time to come, and that are under way.
    pub(super) fn depth(&self, now: Duration) -> (usize, usize) {
        (self.due.range(..=(now, u64::MAX)).count(), self.busy.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_earlier_time_counts_and_equal_ones_come_in_order() {
        let mut agenda = Agenda::default();
        agenda.ask("a", ms(50));
        agenda.ask("b", ms(10));
        agenda.ask("c", ms(10));
        agenda.ask("a", ms(5));
        agenda.ask("a", ms(70));
        assert_eq!(agenda.next_due(), Some(ms(5)));
        assert_eq!(agenda.take(ms(4)), None);
        let taken: Vec<_> = std::iter::from_fn(|| agenda.take(ms(90))).collect();
        assert_eq!(taken, [("a", ms(5)), ("b", ms(10)), ("c", ms(10))]);
    }

    #[test]
    fn what_is_asked_for_during_a_pass_comes_after_it_and_passes_are_bounded() {
        let mut agenda = Agenda::default();
        (0..=PASSES_MAX).for_each(|k| agenda.ask(k, ms(0)));
        for k in 0..PASSES_MAX {
            assert_eq!(agenda.take(ms(0)), Some((k, ms(0))));
        }
        assert_eq!((agenda.take(ms(9)), agenda.next_due()), (None, None), "none may begin");
        agenda.ask(3, ms(9));
        agenda.done(3, ms(5), Outcome::Rest(Some(ms(100))));
        assert_eq!(agenda.take(ms(9)), Some((PASSES_MAX, ms(0))));
        agenda.done(0, ms(9), Outcome::Gone);
        assert_eq!(agenda.take(ms(9)), Some((3, ms(9))));
        agenda.done(3, ms(9), Outcome::Rest(Some(ms(100))));
        assert_eq!(agenda.next_due(), Some(ms(100)));
    }

    #[test]
    fn failures_in_a_row_are_tried_again_slower_and_slower() {
        let mut agenda = Agenda::default();
        agenda.ask("a", ms(0));
        let mut waits = Vec::new();
        let mut now = ms(0);
        for _ in 0..12 {
            agenda.take(now).unwrap();
            agenda.done("a", now, Outcome::Failed);
            let due = agenda.next_due().unwrap();
            waits.push((due - now).as_millis());
            now = due;
        }
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000, 30000]);
        assert_eq!(agenda.failures(&"a"), 12);
        agenda.take(now).unwrap();
        agenda.done("a", now, Outcome::Rest(None));
        assert_eq!((agenda.failures(&"a"), agenda.next_due()), (0, None));
    }
}
