//! What jobs, their storage and their savepoints have been asked, and what came of it. Pure; `answering` asks.
//!
//! Invariant: of one question about an object one asking is under way at most, and an answer is kept as long as what is recorded of
//! the object may need it, and no longer.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use floodmark_crds::{Savepoint, StreamJob, Timestamp};
use kube::ResourceExt as _;

use crate::{
    lifecycle::{self, Asked, awaited},
    savepoints,
};

/// Questions about jobs.
pub(super) type JobQuestions = Questions<lifecycle::Question, lifecycle::Answer>;
/// Questions about Savepoints.
pub(super) type SavepointQuestions = Questions<savepoints::Question, savepoints::Answer>;

/// Questions and answers by the uid of the object that they are about.
#[derive(Debug)]
pub(super) struct Questions<Q, A>(HashMap<String, About<Q, A>>);

#[derive(Debug)]
struct About<Q, A> {
    /// When what the answers are for was begun.
    begun: Option<Timestamp>,
    /// What else the answers were given for.
    circumstances: Circumstances,
    asked: BTreeMap<Q, Asked<A>>,
    /// Of those that are under way, which were asked under other circumstances.
    outdated: BTreeSet<Q>,
}

/// What may turn an answer that nobody knew into another, and is not in the question: the generation of the spec, and where
/// `spec.restore.from` leads.
type Circumstances = (Option<i64>, Option<String>);

impl<Q, A> Default for Questions<Q, A> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<Q, A> Default for About<Q, A> {
    fn default() -> Self {
        Self { begun: None, circumstances: (None, None), asked: BTreeMap::new(), outdated: BTreeSet::new() }
    }
}

impl<Q: Clone + Ord, A: Clone + PartialEq> Questions<Q, A> {
    /// What has been asked about an object.
    pub(super) fn of(&self, uid: &str) -> BTreeMap<Q, Asked<A>> {
        self.0.get(uid).map(|about| about.asked.clone()).unwrap_or_default()
    }

    /// Notes that a question is asked; answers whether it is to be asked, and is not already.
    pub(super) fn begin(&mut self, uid: &str, question: &Q) -> bool {
        let asked = &mut self.0.entry(uid.to_owned()).or_default().asked;
        let begun = asked.get(question) != Some(&Asked::UnderWay);
        if begun {
            asked.insert(question.clone(), Asked::UnderWay);
        }
        begun
    }

    /// Notes what came of it, if anybody still wants to know.
    pub(super) fn end(&mut self, uid: &str, question: &Q, answer: A, now: Timestamp) {
        let Some(about) = self.0.get_mut(uid) else { return };
        if about.outdated.remove(question) {
            about.asked.remove(question);
        } else if let Some(asked) = about.asked.get_mut(question) {
            *asked = Asked::Answered(answer, now);
        }
    }

    /// Forgets all about an object that is gone.
    pub(super) fn forget(&mut self, uid: &str) {
        self.0.remove(uid);
    }

    /// Forgets answers that are not needed any more, and those that are for something begun at another time. What is under way stays
    /// until it is answered.
    fn tidy(&mut self, uid: &str, begun: Option<Timestamp>, is_needed: impl Fn(&Q) -> bool) {
        let about = self.0.entry(uid.to_owned()).or_default();
        let same = about.begun == begun;
        about.begun = begun;
        about.asked.retain(|question, state| *state == Asked::UnderWay || same && is_needed(question));
        if about.asked.is_empty() && begun.is_none() {
            self.0.remove(uid);
        }
    }
}

impl JobQuestions {
    /// Forgets what the recorded operation does not need, and what nobody knew as things were before. `restore_from` is where
    /// `spec.restore.from` leads.
    pub(super) fn tidy_job(&mut self, job: &StreamJob, restore_from: Option<&str>) {
        let status = job.status.as_ref();
        let begun = status.and_then(|s| s.operation.as_ref()).map(|o| o.started_at);
        self.tidy(&job.uid().unwrap_or_default(), begun, |question| match question {
            lifecycle::Question::DeleteState => job.metadata.deletion_timestamp.is_some(),
            _ => status.and_then(awaited).is_some_and(|awaited| awaited == *question),
        });
        let Some(about) = self.0.get_mut(&job.uid().unwrap_or_default()) else { return };
        let circumstances = (job.metadata.generation, restore_from.map(str::to_owned));
        if about.circumstances == circumstances {
            return;
        }
        about.circumstances = circumstances;
        about.asked.retain(|question, asked| {
            let fits = matches!(question, lifecycle::Question::Fits { .. });
            if fits && *asked == Asked::UnderWay {
                about.outdated.insert(question.clone());
            }
            !(fits && matches!(asked, Asked::Answered(lifecycle::Answer::Unknown(_), _)))
        });
    }
}

impl SavepointQuestions {
    /// Forgets what is not asked any more.
    pub(super) fn tidy_savepoint(&mut self, savepoint: &Savepoint) {
        let open = savepoints::is_open(savepoint);
        let failures = savepoint.status.as_ref().map_or(0, |s| s.failures);
        self.tidy(&savepoint.uid().unwrap_or_default(), None, |question| match question {
            savepoints::Question::Take { attempt, .. } => open && *attempt == failures,
            savepoints::Question::Remove { .. } => savepoint.metadata.deletion_timestamp.is_some(),
        });
    }
}

#[cfg(test)]
mod tests {
    use floodmark_crds::{Operation, OperationKind, RunStatus, Step, StreamJobStatus, UpgradeMode};

    use super::*;
    use crate::lifecycle::{Answer, Question};

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
        let mut questions = JobQuestions::default();
        questions.tidy_job(&job(Some(1), "a"), None);
        assert!(questions.begin("1", &stop("a")));
        assert!(!questions.begin("1", &stop("a")), "it is under way");
        questions.end("1", &stop("a"), Answer::Yes, now);
        questions.tidy_job(&job(Some(1), "a"), None);
        assert_eq!(questions.of("1"), [(stop("a"), Asked::Answered(Answer::Yes, now))].into());
        questions.tidy_job(&job(Some(2), "a"), None);
        assert_eq!(questions.of("1"), BTreeMap::new(), "another operation asks anew");
        assert!(questions.begin("1", &stop("b")));
        questions.tidy_job(&job(Some(2), "a"), None);
        questions.tidy_job(&job(None, ""), None);
        assert_eq!(questions.of("1"), [(stop("b"), Asked::UnderWay)].into());
        questions.end("1", &stop("b"), Answer::Yes, now);
        questions.tidy_job(&job(None, ""), None);
        assert!(questions.0.is_empty());
    }

    #[test]
    fn what_nobody_knew_is_forgotten_with_a_change_that_may_have_an_answer() {
        let now = Timestamp::from_millis(9);
        let mut job = job(Some(1), "a");
        let operation = job.status.as_mut().unwrap().operation.as_mut().unwrap();
        operation.step = Step::Checking;
        operation.to = Some(RunStatus { number: 4, revision: "r".into(), ..RunStatus::default() });
        job.metadata.generation = Some(1);
        let fits = Question::Fits { revision: "r".into(), restore: String::new() };
        let unknown = Answer::Unknown("no answer".into());
        let mut questions = JobQuestions::default();
        let asked = |questions: &JobQuestions| questions.of("1").get(&fits).cloned();
        // The answer, then a change, and the other way round.
        questions.tidy_job(&job, None);
        assert!(questions.begin("1", &fits));
        questions.end("1", &fits, unknown.clone(), now);
        questions.tidy_job(&job, None);
        assert_eq!(asked(&questions), Some(Asked::Answered(unknown.clone(), now)));
        job.metadata.generation = Some(2);
        questions.tidy_job(&job, None);
        assert_eq!(asked(&questions), None, "the spec has changed");
        assert!(questions.begin("1", &fits));
        questions.tidy_job(&job, Some("s3://a/savepoint"));
        assert!(!questions.begin("1", &fits), "one at a time");
        questions.end("1", &fits, unknown.clone(), now);
        assert_eq!(asked(&questions), None, "it was asked before the savepoint was there");
        assert!(questions.begin("1", &fits));
        questions.end("1", &fits, unknown.clone(), now);
        questions.tidy_job(&job, Some("s3://a/savepoint"));
        assert_eq!(asked(&questions), Some(Asked::Answered(unknown, now)));
        // What is known stays known.
        questions.end("1", &fits, Answer::Yes, now);
        job.metadata.generation = Some(3);
        questions.tidy_job(&job, None);
        assert_eq!(asked(&questions), Some(Asked::Answered(Answer::Yes, now)));
    }
}
