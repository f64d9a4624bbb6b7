//! What jobs and storage have been asked, and what came of it. Pure; `answering` asks.
//!
//! Invariant: of one question of a job one asking is under way at most, and an answer is kept as long as the recorded operation
//! may need it, and no longer.

use std::collections::{BTreeMap, HashMap};

use floodmark_crds::{StreamJob, Timestamp};
use kube::ResourceExt as _;

use crate::lifecycle::{Answer, Asked, Question, awaited};

/// Questions and answers by the uid of the job that they are about.
#[derive(Debug, Default)]
pub(super) struct Questions(HashMap<String, OfJob>);

#[derive(Debug, Default)]
struct OfJob {
    /// When the operation was begun that the answers are for.
    operation: Option<Timestamp>,
    asked: BTreeMap<Question, Asked>,
}

impl Questions {
    /// What has been asked about a job.
    pub(super) fn of(&self, job: &StreamJob) -> BTreeMap<Question, Asked> {
        let of = job.uid().and_then(|uid| self.0.get(&uid));
        of.map(|of| of.asked.clone()).unwrap_or_default()
    }

    /// Notes that a question is asked; answers whether it is to be asked, and is not already.
    pub(super) fn begin(&mut self, uid: &str, question: &Question) -> bool {
        let asked = &mut self.0.entry(uid.to_owned()).or_default().asked;
        let begun = asked.get(question) != Some(&Asked::UnderWay);
        if begun {
            asked.insert(question.clone(), Asked::UnderWay);
        }
        begun
    }

    /// Notes what came of it, if anybody still wants to know.
    pub(super) fn end(&mut self, uid: &str, question: &Question, answer: Answer, now: Timestamp) {
        if let Some(asked) = self.0.get_mut(uid).and_then(|of| of.asked.get_mut(question)) {
            *asked = Asked::Answered(answer, now);
        }
    }

    /// Forgets answers that what is recorded of a job does not need any more. What is under way stays until it is answered.
    pub(super) fn tidy(&mut self, job: &StreamJob) {
        let Some(uid) = job.uid() else { return };
        let operation = job.status.as_ref().and_then(|s| s.operation.as_ref()).map(|o| o.started_at);
        let of = self.0.entry(uid.clone()).or_default();
        let same = of.operation == operation;
        of.operation = operation;
        of.asked.retain(|question, state| *state == Asked::UnderWay || same && is_needed(job, question));
        if of.asked.is_empty() && operation.is_none() {
            self.0.remove(&uid);
        }
    }

    /// Forgets all about a job that is gone.
    pub(super) fn forget(&mut self, uid: &str) {
        self.0.remove(uid);
    }
}

fn is_needed(job: &StreamJob, question: &Question) -> bool {
    match question {
        Question::DeleteState => job.metadata.deletion_timestamp.is_some(),
        _ => job.status.as_ref().and_then(awaited).is_some_and(|awaited| awaited == *question),
    }
}

#[cfg(test)]
mod tests {
    use floodmark_crds::{Operation, OperationKind, RunStatus, Step, StreamJobStatus, UpgradeMode};

    use super::*;

    fn job(started_ms: Option<i64>, savepoint: &str) -> StreamJob {
        let spec = serde_yaml::from_str("sql: a").unwrap();
        let mut job = StreamJob::new("a", spec);
        job.metadata.uid = Some("1".into());
        let operation = started_ms.map(|ms| Operation {
            kind: OperationKind::Suspend,
            step: Step::Stopping,
            started_at: Timestamp::from_millis(ms),
            since: Timestamp::from_millis(ms),
            generation: 1,
            from: Some(RunStatus { number: 3, ..RunStatus::default() }),
            to: None,
            mode: UpgradeMode::Savepoint,
            savepoint: Some(savepoint.to_owned()),
            failures: 0,
            message: String::new(),
        });
        job.status = Some(StreamJobStatus { operation, ..StreamJobStatus::default() });
        job
    }

    #[test]
    fn answers_are_kept_as_long_as_the_operation_that_asked_needs_them() {
        let now = Timestamp::from_millis(9);
        let stop = |name: &str| Question::StopWithSavepoint { run: 3, name: name.to_owned() };
        let mut questions = Questions::default();
        questions.tidy(&job(Some(1), "a"));
        assert!(questions.begin("1", &stop("a")));
        assert!(!questions.begin("1", &stop("a")), "it is under way");
        questions.end("1", &stop("a"), Answer::Yes, now);
        questions.tidy(&job(Some(1), "a"));
        assert_eq!(questions.of(&job(None, "")), [(stop("a"), Asked::Answered(Answer::Yes, now))].into());
        questions.tidy(&job(Some(2), "a"));
        assert_eq!(questions.of(&job(None, "")), BTreeMap::new(), "another operation asks anew");
        assert!(questions.begin("1", &stop("b")));
        questions.tidy(&job(Some(2), "a"));
        questions.tidy(&job(None, ""));
        assert_eq!(questions.of(&job(None, "")), [(stop("b"), Asked::UnderWay)].into());
        questions.end("1", &stop("b"), Answer::Yes, now);
        questions.tidy(&job(None, ""));
        assert!(questions.0.is_empty());
    }
}
