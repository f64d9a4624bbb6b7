//! The crash hook of recovery tests: `FLOODMARK_CRASH` names a step of the protocol at which this process kills itself.
//!
//! `<step>` is the first time that the step is reached, `<step>:<epoch>` the first time from that epoch on, `<step>:+<n>` the
//! n-th time. Death is by SIGKILL: nothing gets to clean up.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use floodmark_snapshot::{Env, Epoch, Probe, Step};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::exit::Failure;

/// The variable that arms the hook.
pub(crate) const VARIABLE: &str = "FLOODMARK_CRASH";

/// The surroundings with the hook in them, if the variable is set.
pub(crate) fn arm(env: Env) -> Result<Env, Failure> {
    match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => {
            let point = CrashPoint::parse(&text).map_err(|e| Failure::input(format!("{VARIABLE}='{text}': {e}")))?;
            Ok(env.with_probe(Arc::new(point)))
        }
        Ok(_) | Err(_) => Ok(env),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum When {
    /// The first time that the step is reached in this epoch or a later one.
    FromEpoch(Epoch),
    /// The n-th time that the step is reached, from 1.
    Time(u64),
}

#[derive(Debug)]
struct CrashPoint {
    step: Step,
    when: When,
    /// How often the step has been reached. Several subtasks reach it at once.
    reached: AtomicU64,
}

impl CrashPoint {
    fn parse(text: &str) -> Result<Self, String> {
        let (name, when) = text.split_once(':').unwrap_or((text, "+1"));
        let step = Step::ALL
            .into_iter()
            .find(|s| s.name() == name)
            .ok_or_else(|| format!("no step '{name}'; the steps are {}", Step::ALL.map(Step::name).join(", ")))?;
        let number = |digits: &str| {
            let usage = || format!("'{when}' is neither an epoch (7) nor a count from 1 (+3)");
            digits.parse::<u64>().ok().filter(|n| *n > 0).ok_or_else(usage)
        };
        let when = match when.strip_prefix('+') {
            Some(time) => When::Time(number(time)?),
            None => When::FromEpoch(Epoch(number(when)?)),
        };
        Ok(Self { step, when, reached: AtomicU64::new(0) })
    }

    /// Whether this is the moment.
    fn strikes(&self, step: Step, epoch: Epoch) -> bool {
        if step != self.step {
            return false;
        }
        let time = self.reached.fetch_add(1, Ordering::SeqCst) + 1;
        match self.when {
            When::FromEpoch(from) => epoch >= from,
            When::Time(n) => time == n,
        }
    }
}

impl Probe for CrashPoint {
    fn reached(&self, step: Step, epoch: Epoch) {
        if self.strikes(step, epoch) {
            eprintln!("{VARIABLE}: killing this process at {step} of epoch {epoch}");
            // It can only fail for a process that is not there.
            let _ = kill(Pid::this(), Signal::SIGKILL);
            // The signal may reach another thread first; this one must not go on with the protocol meanwhile.
            loop {
                std::thread::park();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The index, among these moments, at which the point strikes.
    fn strikes(point: &str, moments: &[(Step, u64)]) -> Option<usize> {
        let point = CrashPoint::parse(point).unwrap();
        moments.iter().position(|(step, epoch)| point.strikes(*step, Epoch(*epoch)))
    }

    #[test]
    fn a_point_strikes_at_its_step_epoch_or_time() {
        let moments = [
            (Step::BeforeUpload, 1),
            (Step::AfterUpload, 1),
            (Step::AfterUpload, 1),
            (Step::AfterLogEntry, 1),
            (Step::AfterUpload, 3),
        ];
        assert_eq!(strikes("after-upload", &moments), Some(1));
        assert_eq!(strikes("after-upload:+2", &moments), Some(2));
        assert_eq!(strikes("after-upload:2", &moments), Some(4));
        assert_eq!(strikes("after-log-entry:1", &moments), Some(3));
        assert_eq!(strikes("in-transaction", &moments), None);
        assert_eq!(strikes("after-upload:+4", &moments), None);
    }

    #[test]
    fn what_is_no_point_is_refused() {
        for text in
            ["after", "after-upload:", "after-upload:x", "after-upload:+0", "after-upload:0", "after-upload:+", ":1"]
        {
            assert!(CrashPoint::parse(text).is_err(), "{text}");
        }
        let message = CrashPoint::parse("upload").unwrap_err();
        assert!(message.starts_with("no step 'upload'; the steps are before-upload, after-upload,"), "{message}");
    }
}
