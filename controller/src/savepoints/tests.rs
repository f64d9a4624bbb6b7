//! Savepoints in a small world: their job, their storage, and a controller that dies.

use floodmark_crds::ConditionStatus;
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff};

use super::*;

const START: i64 = 1_795_000_000_000;
const HOUR: i64 = 3_600_000;

struct World {
    seen: Seen,
    /// Names of savepoints in storage.
    stored: BTreeSet<String>,
    gone: bool,
}

fn object(name: &str, spec: serde_json::Value) -> Savepoint {
    let object = serde_json::json!({
        "apiVersion": "floodmark.io/v1alpha1", "kind": "Savepoint",
        "metadata": {"name": name, "uid": format!("{name}-0123-4567"), "generation": 1}, "spec": spec,
    });
    serde_json::from_value(object).unwrap()
}

impl World {
    fn new(spec: serde_json::Value) -> Self {
        let job =
            JobSeen { running: Some(3), storage: StorageStatus { location: "s3://a".into(), ..Default::default() } };
        let savepoint = object("nightly", spec);
        let due = savepoint.spec.schedule.is_some().then(|| Ok(Timestamp::from_millis(START + HOUR)));
        let seen = Seen {
            savepoint,
            job: Some(job),
            due,
            children: Vec::new(),
            needed: BTreeSet::new(),
            answers: BTreeMap::new(),
            now: Timestamp::from_millis(START),
        };
        Self { seen, stored: BTreeSet::new(), gone: false }
    }

    fn delete(&mut self) {
        let at = jiff::Timestamp::from_millisecond(self.seen.now.millis()).unwrap();
        self.seen.savepoint.metadata.deletion_timestamp = Some(Time(at));
    }

    /// Passes until nothing is to be done at this moment; `answer` answers what is asked.
    fn settle(&mut self, mut answer: impl FnMut(&Question) -> Option<Answer>) {
        for _ in 0..50 {
            let plan = decide(&self.seen);
            let busy = plan.status.is_some() || !plan.actions.is_empty();
            if let Some(status) = plan.status {
                assert!(plan.actions.is_empty());
                self.seen.savepoint.status = Some(*status);
            }
            for action in plan.actions {
                match action {
                    Action::AddFinalizer => self.seen.savepoint.metadata.finalizers = Some(vec![FINALIZER.into()]),
                    Action::RemoveFinalizer => {
                        self.gone = true;
                        return;
                    }
                    Action::Create { name } => {
                        self.seen.children.push(object(&name, serde_json::json!({"job": "hot"})));
                        // The schedule goes on from what it has recorded.
                        self.seen.due = Some(Ok(Timestamp::from_millis(START + HOUR)));
                    }
                    Action::Delete { name } => self.seen.children.retain(|c| c.name_any() != name),
                    Action::Ask(question) => {
                        let asked = match answer(&question) {
                            Some(answer) => Asked::Answered(answer, self.seen.now),
                            None => Asked::UnderWay,
                        };
                        self.seen.answers.insert(question, asked);
                    }
                }
            }
            if !busy {
                return;
            }
        }
        panic!("it does not come to rest: {:#?}", self.seen.savepoint.status);
    }

    fn status(&self) -> SavepointStatus {
        self.seen.savepoint.status.clone().unwrap()
    }

    fn is(&self, kind: &str) -> bool {
        self.status().conditions.iter().any(|c| c.kind == kind && c.status == ConditionStatus::True)
    }
}

fn taken(_: &Question) -> Option<Answer> {
    Some(Answer::Taken { location: "s3://a/savepoints/x".into(), epoch: 7, size: 100 })
}

#[test]
fn a_savepoint_is_named_before_it_is_asked_for_and_taken_once() {
    let mut world = World::new(serde_json::json!({"job": "hot"}));
    world.settle(|_| None);
    let status = world.status();
    assert_eq!((status.state, status.name.as_deref()), (SavepointState::InProgress, Some("nightly-nightly-")));
    // The controller dies and asks again, under the same name.
    world.seen.answers.clear();
    let mut asked = Vec::new();
    world.settle(|question| {
        asked.push(question.clone());
        taken(question)
    });
    assert_eq!(asked, [Question::Take { run: 3, name: "nightly-nightly-".into(), attempt: 0 }]);
    let status = world.status();
    assert_eq!((status.state, status.epoch, status.size), (SavepointState::Completed, Some(7), Some(100)));
    assert!(world.is("Ready") && !world.is("Reconciling") && !world.is("Stalled"));
    assert_eq!(decide(&world.seen), Plan::default(), "a second pass does nothing");
}

#[test]
fn a_job_that_does_not_run_is_waited_for() {
    let mut world = World::new(serde_json::json!({"job": "hot"}));
    let job = world.seen.job.take();
    world.settle(taken);
    assert!(world.is("Reconciling") && world.status().name.is_none());
    world.seen.job = Some(JobSeen { running: None, ..job.clone().unwrap() });
    world.settle(taken);
    assert!(world.is("Reconciling") && world.status().name.is_none());
    world.seen.job = job;
    world.settle(taken);
    assert!(world.is("Ready"));
}

#[test]
fn one_that_fails_is_tried_again_and_then_no_more() {
    let mut world = World::new(serde_json::json!({"job": "hot"}));
    let mut tries = 0;
    for _ in 0..10 {
        world.settle(|_| {
            tries += 1;
            Some(Answer::Failed("the storage is full".into()))
        });
        world.seen.now = world.seen.now.plus(AGAIN);
    }
    assert_eq!((tries, world.status().state), (FAILURES_MAX, SavepointState::Failed));
    assert!(world.is("Stalled") && !world.is("Reconciling"));
    // What nobody knows is asked for as long as it takes.
    let mut world = World::new(serde_json::json!({"job": "hot"}));
    for _ in 0..10 {
        world.settle(|_| Some(Answer::Unknown("nobody answers".into())));
        world.seen.now = world.seen.now.plus(AGAIN);
    }
    assert_eq!(world.status().state, SavepointState::InProgress);
    world.settle(taken);
    assert!(world.is("Ready"));
}

#[test]
fn a_schedule_makes_one_when_it_is_due_and_keeps_the_newest() {
    let mut world = World::new(serde_json::json!({"job": "hot", "schedule": "0 * * * *", "retain": 2}));
    world.settle(|_| None);
    assert_eq!(world.status().next, Some(Timestamp::from_millis(START + HOUR)));
    assert_eq!(decide(&world.seen).wake, world.status().next);
    // It comes late by two: one is made.
    world.seen.now = Timestamp::from_millis(START + 3 * HOUR);
    for _ in 0..2 {
        world.settle(|_| None);
        if world.status().time == Some(world.seen.now) {
            world.seen.due = Some(Ok(Timestamp::from_millis(START + 4 * HOUR)));
        }
    }
    assert_eq!(world.seen.children.len(), 1);
    assert_eq!(world.status().next, Some(Timestamp::from_millis(START + 4 * HOUR)));
    let mut complete = |name: &str, state| {
        let mut child = object(name, serde_json::json!({"job": "hot"}));
        child.status = Some(SavepointStatus { state, location: Some(format!("s3://{name}")), ..Default::default() });
        world.seen.children.push(child);
    };
    for name in ["nightly-1", "nightly-2", "nightly-3", "nightly-4"] {
        complete(name, SavepointState::Completed);
    }
    complete("nightly-0", SavepointState::InProgress);
    world.seen.needed.insert("s3://nightly-1".into());
    world.settle(|_| None);
    let left: BTreeSet<_> = world.seen.children.iter().map(kube::ResourceExt::name_any).collect();
    let kept = ["nightly-0", "nightly-1", "nightly-3", "nightly-4"];
    assert!(kept.iter().all(|name| left.contains(*name)) && !left.contains("nightly-2"), "{left:?}");
    // It goes when no job names it any more, long before the next one is due.
    assert_eq!(decide(&world.seen).wake, Some(world.seen.now.plus(LOOK_AGAIN)));
    world.seen.needed.clear();
    world.seen.now = world.seen.now.plus(LOOK_AGAIN);
    world.settle(|_| None);
    assert!(!world.seen.children.iter().any(|c| c.name_any() == "nightly-1"));
    assert_eq!(decide(&world.seen).wake, world.status().next);
    // Shortly before the next one there is no earlier look.
    world.seen.needed.insert("nightly-4".into());
    world.seen.savepoint.spec.retain = 0;
    world.seen.now = Timestamp::from_millis(START + 4 * HOUR - 1_000);
    world.settle(|_| None);
    assert_eq!(decide(&world.seen).wake, world.status().next);
}

#[test]
fn a_schedule_that_can_not_be_read_is_told() {
    let mut world = World::new(serde_json::json!({"job": "hot", "schedule": "every day"}));
    world.seen.due = Some(Err("expected five fields".into()));
    world.settle(|_| None);
    assert!(world.is("Stalled"));
}

#[test]
fn a_deleted_savepoint_leaves_its_files_or_takes_them_along() {
    for (policy, removed) in [("Retain", 0), ("Delete", 1)] {
        let mut world = World::new(serde_json::json!({"job": "hot", "onDelete": policy}));
        world.settle(taken);
        world.stored.insert(world.status().name.unwrap());
        // No job is needed for that.
        world.seen.job = None;
        world.delete();
        let mut asked = 0;
        world.settle(|question| {
            assert!(matches!(question, Question::Remove { .. }));
            asked += 1;
            Some(Answer::Removed)
        });
        assert_eq!((world.gone, asked), (true, removed), "{policy}");
    }
    // A storage that is down does not keep it for ever.
    let mut world = World::new(serde_json::json!({"job": "hot", "onDelete": "Delete"}));
    world.settle(taken);
    world.delete();
    for _ in 0..200 {
        if world.gone {
            return;
        }
        world.settle(|_| Some(Answer::Unknown("nobody answers".into())));
        world.seen.now = world.seen.now.plus(AGAIN);
    }
    panic!("it is still there");
}
