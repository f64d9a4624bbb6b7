//! Kills a job again and again, and lets it resume: at steps of the protocol, and at random moments.

use std::{fmt, thread::sleep, time::Duration};

use anyhow::{Context as _, Result, ensure};
use floodmark_snapshot::Step;

use crate::{
    events::Draw,
    job::{Ended, Job, PATIENCE},
};

/// A step must be reached within this time of a start.
const STEP_PATIENCE: Duration = Duration::from_secs(60);

/// When a process is to die.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kill {
    /// By its own hand, when the protocol reaches a step for the n-time: a value of `FLOODMARK_CRASH`.
    At(String),
    /// By SIGKILL, so long after its start.
    After(Duration),
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(point) => write!(f, "at {point}"),
            Self::After(time) => write!(f, "after {} ms", time.as_millis()),
        }
    }
}

/// A kill at each step of the protocol, the `time`-th time that it is reached (from 1).
#[must_use]
pub fn at_every_step(time: u64) -> Vec<Kill> {
    Step::ALL.iter().map(|step| Kill::At(format!("{step}:+{time}"))).collect()
}

/// `count` kills at moments up to `longest` after a start.
#[must_use]
pub fn at_random_moments(count: usize, longest: Duration, seed: u64) -> Vec<Kill> {
    let mut draw = Draw::new(seed);
    let longest = u64::try_from(longest.as_millis()).unwrap_or(u64::MAX);
    (0..count).map(|_| Kill::After(Duration::from_millis(100 + draw.below(longest)))).collect()
}

/// Puts kills in an order that a seed decides.
#[must_use]
pub fn shuffled(mut kills: Vec<Kill>, seed: u64) -> Vec<Kill> {
    let mut draw = Draw::new(seed);
    for i in (1..kills.len()).rev() {
        kills.swap(i, draw.below(i as u64 + 1) as usize);
    }
    kills
}

/// What came of the kills.
#[derive(Debug, Default)]
pub struct Deaths {
    /// Each process that was killed.
    pub killed: Vec<Ended>,
}

impl Deaths {
    /// How many processes were killed.
    #[must_use]
    pub fn count(&self) -> usize {
        self.killed.len()
    }

    /// Epochs of the checkpoints that the killed processes had started from.
    #[must_use]
    pub fn restored_from(&self) -> Vec<u64> {
        self.killed.iter().filter_map(Ended::restored_from).collect()
    }
}

/// Starts the job once for each kill, and sees it die so. `before` may change the job before each start; it is told the
/// number of the start, from 0.
///
/// # Errors
/// When a process ends in another way, or doesn't reach its step.
pub fn kill_again_and_again(
    job: &mut Job,
    kills: &[Kill],
    mut before: impl FnMut(usize, &mut Job) -> Result<()>,
) -> Result<Deaths> {
    let mut deaths = Deaths::default();
    for (number, kill) in kills.iter().enumerate() {
        before(number, job)?;
        let ended = match kill {
            Kill::At(point) => job.start_with(Some(point)).and_then(|run| run.wait(STEP_PATIENCE)),
            Kill::After(time) => job.start().and_then(|run| {
                sleep(*time);
                run.kill()
            }),
        };
        let ended = ended.with_context(|| format!("kill {number}, {kill}"))?;
        ensure!(ended.killed(), "kill {number}, {kill}: it was not killed but ended with {ended}");
        ensure!(!ended.log.contains("panicked"), "kill {number}, {kill}: something panicked: {ended}");
        deaths.killed.push(ended);
    }
    Ok(deaths)
}

/// Runs the job to its end after it has been killed.
///
/// # Errors
/// When it doesn't finish well.
pub fn finish(job: &Job) -> Result<Ended> {
    let ended = job.start()?.wait(PATIENCE)?;
    ended.ok("finished")?;
    Ok(ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_named_once_and_shuffling_keeps_all() {
        let kills = at_every_step(2);
        assert_eq!(kills.len(), Step::ALL.len());
        assert_eq!(kills[0], Kill::At("before-upload:+2".to_owned()));
        let shuffled = shuffled(kills.clone(), 3);
        assert_ne!(shuffled, kills);
        assert!(kills.iter().all(|k| shuffled.contains(k)));
        assert!(at_random_moments(9, Duration::from_secs(1), 1).iter().all(|k| matches!(k, Kill::After(_))));
    }
}
