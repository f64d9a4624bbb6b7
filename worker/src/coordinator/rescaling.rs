//! A change of the number of subtasks, or of where they run, with the processes kept: who has asked, and what is answered.
//!
//! Invariant: an asker is told once, and the truth: at which parallelism the job runs then.

use floodmark_snapshot::Epoch;

use crate::{RescaleRequest, Rescaled};

/// See the header of this file. Dropped, it leaves its asker with a job that has ended.
pub(super) struct Rescaling {
    /// `None` if the coordinator moves subtasks by itself.
    asked: Option<RescaleRequest>,
    /// Subtasks per task before.
    from: u32,
    /// Subtasks per task afterwards.
    to: u32,
    /// Whether some are known to share a slot then.
    pub(super) crowded: bool,
    /// Why it may not have come to that.
    failure: Option<String>,
}

impl Rescaling {
    /// What somebody asks for; `None` if it is answered already. `most` is the number of key groups.
    pub(super) fn asked(request: RescaleRequest, from: u32, most: u16, crowded: impl Fn(u32) -> bool) -> Option<Self> {
        let to = request.parallelism;
        if !(1..=u32::from(most)).contains(&to) {
            let reason =
                format!("parallelism {to} is not possible: it is at least 1 and at most {most} (maxParallelism)");
            answer(request, Err(reason));
            return None;
        }
        if to == from {
            answer(request, Ok(Rescaled { from, to, epoch: None }));
            return None;
        }
        let crowded = crowded(to);
        tracing::info!("rescaling from {from} to {to}{}", if crowded { "; some share a slot then" } else { "" });
        Some(Self { asked: Some(request), from, to, crowded, failure: None })
    }

    /// Subtasks move to workers with free slots.
    pub(super) fn to_free_slots(parallelism: u32) -> Self {
        Self { asked: None, from: parallelism, to: parallelism, crowded: false, failure: None }
    }

    /// Subtasks per task afterwards.
    pub(super) fn to(&self) -> u32 {
        self.to
    }

    /// The attempt has failed before the next one ran.
    pub(super) fn failed(&mut self, why: String) {
        self.failure.get_or_insert(why);
    }

    /// The job runs on as it is.
    pub(super) fn stays(mut self, why: String) {
        self.failed(why);
        let at = self.from;
        self.runs(at, None);
    }

    /// The job runs again.
    pub(super) fn runs(self, at: u32, epoch: Option<Epoch>) {
        let Self { asked, from, to, failure, .. } = self;
        let outcome = match failure {
            // Also if something has failed on the way.
            _ if at == to && asked.is_some() => Ok(Rescaled { from, to, epoch }),
            None if at == to => Ok(Rescaled { from, to, epoch }),
            why => {
                let why = why.unwrap_or_else(|| "somebody else has changed it".to_owned());
                Err(format!("the job is at parallelism {at}: {why}"))
            }
        };
        match &outcome {
            Ok(_) if from == to => tracing::info!("subtasks have moved to free slots"),
            Ok(_) => tracing::info!("rescaled from {from} to {to}"),
            Err(why) if from == to => tracing::warn!("subtasks have not moved to free slots; {why}"),
            Err(why) => tracing::warn!("not rescaled from {from} to {to}; {why}"),
        }
        if let Some(request) = asked {
            answer(request, outcome);
        }
    }
}

/// One that no longer listens has no need of the answer.
pub(super) fn answer(request: RescaleRequest, outcome: Result<Rescaled, String>) {
    let _ = request.reply.send(outcome);
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    fn asked(from: u32, to: u32) -> (Option<Rescaling>, oneshot::Receiver<Result<Rescaled, String>>) {
        let (reply, told) = oneshot::channel();
        (Rescaling::asked(RescaleRequest { parallelism: to, reply }, from, 16, |_| false), told)
    }

    #[test]
    fn what_can_not_be_or_is_already_is_answered_at_once() {
        for to in [0, 17] {
            let (rescaling, mut told) = asked(2, to);
            assert!(rescaling.is_none());
            let why = told.try_recv().unwrap().unwrap_err();
            assert!(why.contains("at least 1 and at most 16"), "{why}");
        }
        let (rescaling, mut told) = asked(2, 2);
        assert!(rescaling.is_none());
        assert_eq!(told.try_recv().unwrap(), Ok(Rescaled { from: 2, to: 2, epoch: None }));
    }

    #[test]
    fn the_asker_is_told_what_the_job_has_come_to() {
        let (rescaling, mut told) = asked(2, 4);
        rescaling.unwrap().runs(4, Some(Epoch(7)));
        assert_eq!(told.try_recv().unwrap(), Ok(Rescaled { from: 2, to: 4, epoch: Some(Epoch(7)) }));

        let (rescaling, mut told) = asked(2, 4);
        rescaling.unwrap().stays("disk full".to_owned());
        assert_eq!(told.try_recv().unwrap(), Err("the job is at parallelism 2: disk full".to_owned()));

        // A worker is lost before the last checkpoint, or behind it.
        for (at, expected) in [(2, Err("the job is at parallelism 2: worker 1 is lost".to_owned())), (4, Ok(4))] {
            let (rescaling, mut told) = asked(2, 4);
            let mut rescaling = rescaling.unwrap();
            rescaling.failed("worker 1 is lost".to_owned());
            rescaling.failed("and another".to_owned());
            rescaling.runs(at, Some(Epoch(7)));
            assert_eq!(told.try_recv().unwrap().map(|r| r.to), expected);
        }
    }
}
