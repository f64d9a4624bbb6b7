//! Whether and when a job that has failed runs again. Pure: failures and the time come in, a verdict goes out.

use std::{collections::VecDeque, time::Duration};

use floodmark_snapshot::Disposition;

/// So many takeovers of outputs within [`TAKEOVERS_WITHIN`] may come from what is left of earlier attempts: each can come late
/// once. More come from somebody who writes under the same identity, and with whom this job would take turns for ever.
const TAKEOVERS_MAX: usize = 20;
const TAKEOVERS_WITHIN: Duration = Duration::from_secs(600);

/// What to do when an attempt fails for a reason that another attempt may not meet.
#[derive(Clone, Debug, PartialEq)]
pub enum RestartStrategy {
    /// The job fails.
    None,
    /// Another attempt after the same delay each time.
    FixedDelay {
        /// Failures in a row that are answered so; one after the last fails the job.
        attempts: u32,
        /// From the failure to the next attempt.
        delay: Duration,
    },
    /// Another attempt at once, and from the second failure on after a delay that grows from failure to failure.
    ExponentialDelay {
        /// The first delay, behind the second failure.
        initial: Duration,
        /// No delay is longer.
        max: Duration,
        /// After so long without a failure, and after a completed checkpoint, a failure counts as the first.
        reset_after: Duration,
    },
    /// Another attempt, unless failures come too close.
    FailureRate {
        /// Failures within `interval` that are answered so; one more fails the job.
        max: u32,
        /// See above.
        interval: Duration,
        /// From the failure to the next attempt.
        delay: Duration,
    },
}

/// Slower and slower, for ever: what a job is given that says nothing.
impl Default for RestartStrategy {
    fn default() -> Self {
        Self::ExponentialDelay {
            initial: Duration::from_millis(100),
            max: Duration::from_secs(60),
            reset_after: Duration::from_secs(600),
        }
    }
}

/// What follows from a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Another attempt after this long.
    Again(Duration),
    /// The job fails: why there is no other attempt.
    GiveUp(&'static str),
}

/// Counts a job's failures.
#[derive(Debug)]
pub(super) struct Restarts {
    strategy: RestartStrategy,
    /// When the last failures came, as many as the strategy asks for.
    failures: VecDeque<Duration>,
    in_a_row: u32,
    /// When outputs were taken over, of late.
    takeovers: VecDeque<Duration>,
}

impl Restarts {
    pub(super) fn new(strategy: RestartStrategy) -> Self {
        Self { strategy, failures: VecDeque::new(), in_a_row: 0, takeovers: VecDeque::new() }
    }

    /// A checkpoint is complete: what fails now is a new failure.
    pub(super) fn progressed(&mut self) {
        self.in_a_row = 0;
    }

    /// Outputs have been taken over at `now`. Whether that may have been an earlier attempt of this reign's.
    pub(super) fn taken_over(&mut self, now: Duration) -> bool {
        self.takeovers.push_back(now);
        self.takeovers.retain(|at| now.saturating_sub(*at) < TAKEOVERS_WITHIN);
        self.takeovers.len() <= TAKEOVERS_MAX
    }

    /// An attempt has failed at `now`, by the monotonic clock.
    pub(super) fn failed(&mut self, disposition: Disposition, now: Duration) -> Verdict {
        match disposition {
            Disposition::Retry | Disposition::Corrupt => {}
            Disposition::Abort => return Verdict::GiveUp("the same would happen again"),
            Disposition::Fenced => return Verdict::GiveUp("somebody newer runs the job"),
        }
        let last = self.failures.back().copied();
        self.in_a_row = self.in_a_row.saturating_add(1);
        match self.strategy {
            RestartStrategy::None => Verdict::GiveUp("the job asks for no restart"),
            RestartStrategy::FixedDelay { attempts, delay } => {
                if self.in_a_row > attempts {
                    return Verdict::GiveUp("it has failed as often in a row as its restart strategy allows");
                }
                Verdict::Again(delay)
            }
            RestartStrategy::ExponentialDelay { initial, max, reset_after } => {
                if last.is_some_and(|last| now.saturating_sub(last) >= reset_after) {
                    self.in_a_row = 1;
                }
                self.note(now, 1);
                // What fails once is mostly something that died. Behind the others, each delay is twice the one before.
                let Some(doublings) = self.in_a_row.checked_sub(2) else { return Verdict::Again(Duration::ZERO) };
                let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
                Verdict::Again(initial.saturating_mul(factor).min(max))
            }
            RestartStrategy::FailureRate { max, interval, delay } => {
                self.note(now, max as usize + 1);
                let close = self.failures.iter().filter(|at| now.saturating_sub(**at) < interval).count();
                if close > max as usize {
                    return Verdict::GiveUp(
                        "it has failed more often in a short time than its restart strategy allows",
                    );
                }
                Verdict::Again(delay)
            }
        }
    }

    fn note(&mut self, now: Duration, keep: usize) {
        self.failures.push_back(now);
        while self.failures.len() > keep {
            self.failures.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn failed(restarts: &mut Restarts, at: u32) -> Verdict {
        restarts.failed(Disposition::Retry, SECOND * at)
    }

    #[test]
    fn what_would_happen_again_is_not_tried_again() {
        let mut restarts = Restarts::new(RestartStrategy::default());
        for disposition in [Disposition::Abort, Disposition::Fenced] {
            assert!(matches!(restarts.failed(disposition, SECOND), Verdict::GiveUp(_)));
        }
        let mut none = Restarts::new(RestartStrategy::None);
        assert!(matches!(failed(&mut none, 1), Verdict::GiveUp(_)));
    }

    #[test]
    fn a_fixed_number_of_failures_in_a_row_is_allowed() {
        let mut restarts = Restarts::new(RestartStrategy::FixedDelay { attempts: 2, delay: SECOND });
        for _ in 0..3 {
            assert_eq!(failed(&mut restarts, 1), Verdict::Again(SECOND));
            assert_eq!(failed(&mut restarts, 2), Verdict::Again(SECOND));
            restarts.progressed();
        }
        failed(&mut restarts, 9);
        failed(&mut restarts, 9);
        assert!(matches!(failed(&mut restarts, 9), Verdict::GiveUp(_)));
    }

    #[test]
    fn delays_grow_to_their_bound_and_begin_anew_after_a_calm_time() {
        let (initial, max) = (SECOND, SECOND * 5);
        let strategy = RestartStrategy::ExponentialDelay { initial, max, reset_after: SECOND * 100 };
        let mut restarts = Restarts::new(strategy);
        let delays =
            |restarts: &mut Restarts, from: u32| (0..5).map(|n| failed(restarts, from + n)).collect::<Vec<_>>();
        let expected: Vec<_> = [0, 1, 2, 4, 5].into_iter().map(|n| Verdict::Again(SECOND * n)).collect();
        assert_eq!(delays(&mut restarts, 10), expected);
        assert_eq!(failed(&mut restarts, 113), Verdict::Again(max), "not calm for long enough");
        assert_eq!(delays(&mut restarts, 213), expected);
        restarts.progressed();
        assert_eq!(delays(&mut restarts, 218), expected);
        for _ in 0..3000 {
            assert_eq!(failed(&mut restarts, 300), Verdict::Again(max), "without an overflow");
        }
    }

    #[test]
    fn outputs_may_be_taken_over_now_and_then_but_not_for_ever() {
        let mut restarts = Restarts::new(RestartStrategy::default());
        assert!((0..100).all(|n| restarts.taken_over(SECOND * 60 * n)), "one a minute");
        let close = (0..100).filter(|n| restarts.taken_over(SECOND * (20_000 + n))).count();
        assert_eq!(close, TAKEOVERS_MAX, "one a second");
    }

    #[test]
    fn failures_may_come_at_a_rate() {
        let strategy = RestartStrategy::FailureRate { max: 3, interval: SECOND * 10, delay: SECOND };
        let mut restarts = Restarts::new(strategy);
        for at in (0..100).step_by(4) {
            assert_eq!(failed(&mut restarts, at), Verdict::Again(SECOND), "at {at}");
        }
        assert_eq!(failed(&mut restarts, 99), Verdict::Again(SECOND));
        assert!(matches!(failed(&mut restarts, 100), Verdict::GiveUp(_)));
    }
}
