//! What is said of an object that somebody applies: that it is refused, and why, or nothing. Plans the SQL; asks nobody.
//!
//! Invariant: what can't be judged (an object of another version, a plan that takes too long) is let through: the definitions' own rules
//! hold, and the controller looks at each job before it does anything.

use floodmark_admission::Planned;
use floodmark_crds::{RunStatus, Savepoint, StreamJob, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, value::RawValue};

use crate::{
    objects::{Defaults, check_storage, run_objects},
    revision, savepoints,
};

/// What an API server asks.
#[derive(Deserialize)]
pub(super) struct Review {
    pub(super) request: Request,
}

/// See [`Review`].
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Request {
    /// By which the answer is told from others.
    pub(super) uid: String,
    pub(super) kind: Kind,
    object: Option<Box<RawValue>>,
    old_object: Option<Box<RawValue>>,
}

/// See [`Review`].
#[derive(Deserialize)]
pub(super) struct Kind {
    pub(super) kind: String,
}

/// The answer.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Reviewed {
    api_version: &'static str,
    kind: &'static str,
    response: Json,
}

impl Reviewed {
    pub(super) fn new(uid: &str, refused: Option<&str>) -> Self {
        let mut response = serde_json::json!({"uid": uid, "allowed": refused.is_none()});
        if let Some(why) = refused {
            response["status"] =
                serde_json::json!({"status": "Failure", "message": why, "reason": "Invalid", "code": 422});
        }
        Self { api_version: "admission.k8s.io/v1", kind: "AdmissionReview", response }
    }
}

/// Why an object is refused, if it is. Takes as long as planning does.
pub(super) fn refusal(request: &Request, defaults: &Defaults, now: Timestamp) -> Option<String> {
    match request.kind.kind.as_str() {
        "StreamJob" => job_refusal(read(&request.object)?, read(&request.old_object), defaults),
        "Savepoint" => {
            let savepoint: Savepoint = read(&request.object)?;
            let why = savepoints::due(savepoint.spec.schedule.as_ref()?, now).err()?;
            Some(format!("spec.schedule: {why}"))
        }
        _ => None,
    }
}

/// What can't be read is for the definitions to refuse.
fn read<T: for<'a> Deserialize<'a>>(object: &Option<Box<RawValue>>) -> Option<T> {
    serde_json::from_str(object.as_ref()?.get()).ok()
}

fn job_refusal(job: StreamJob, before: Option<StreamJob>, defaults: &Defaults) -> Option<String> {
    if job.metadata.deletion_timestamp.is_some() {
        return None;
    }
    // What runs already may be stopped or rescaled, whatever this version thinks of it.
    let same = |before: &StreamJob| {
        revision::name(&before.spec) == revision::name(&job.spec) && before.spec.restore.from == job.spec.restore.from
    };
    if before.as_ref().is_some_and(same) {
        return None;
    }
    let planned = match Planned::of(&job) {
        Ok(planned) => planned,
        Err(error) => return Some(error.to_string()),
    };
    if let Err(error) = planned.initial() {
        return Some(error.to_string());
    }
    let run = RunStatus { number: 1, parallelism: job.spec.parallelism, ..RunStatus::default() };
    let objects = run_objects(&job, &job.spec, &run, defaults);
    let checked = objects.and_then(|objects| check_storage(&job.spec, &objects));
    checked.err().map(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use serde_json::json;

    use super::*;

    const SQL: &str = "CREATE TABLE n (i BIGINT) WITH ('connector' = 'datagen');
CREATE TABLE o (i BIGINT) WITH ('connector' = 'blackhole');
INSERT INTO o SELECT i FROM n;";

    fn ask(kind: &str, object: Json, before: Option<Json>) -> String {
        let request =
            json!({"uid": "7", "kind": {"group": "floodmark.io", "kind": kind}, "object": object, "oldObject": before});
        let request: Request = serde_json::from_str(&request.to_string()).unwrap();
        refusal(&request, &Defaults::default(), Timestamp::from_millis(0)).unwrap_or_else(|| "let through".into())
    }

    fn job(mut spec: Json) -> Json {
        let storage = json!({"storage": "s3://b/c"});
        spec.as_object_mut().unwrap().entry("checkpoints").or_insert(storage);
        json!({"apiVersion": "floodmark.io/v1alpha1", "kind": "StreamJob", "metadata": {"name": "a", "namespace": "shop"}, "spec": spec})
    }

    fn check(spec: Json, says: Expect) {
        says.assert_eq(&ask("StreamJob", job(spec), None));
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        check(json!({"sql": SQL}), expect!["let through"]);
        check(
            json!({"sql": SQL.replace("SELECT i", "SELECT j")}),
            expect![[r#"
                spec.sql: line 3, column 22: unknown column 'j'; there is: i
                  3 | INSERT INTO o SELECT j FROM n;
                    |                      ^"#]],
        );
        check(
            json!({"sql": SQL, "parallelism": 300}),
            expect!["spec.parallelism: 300 exceeds maxParallelism, which is 128"],
        );
        check(
            json!({"sql": SQL, "restore": {"from": "two words"}}),
            expect![
                "spec.restore.from: 'two words' names no snapshot: write latest, none, the number of a checkpoint, the name of a savepoint, or a location (with at least one '/')"
            ],
        );
        check(
            json!({"sql": SQL, "worker": {"podTemplate": {"spec": {"containers": 3}}}}),
            expect!["spec.worker.podTemplate.spec.containers: invalid type: integer `3`, expected a sequence"],
        );
        check(
            json!({"sql": SQL, "checkpoints": {}}),
            expect![
                "spec.checkpoints.storage: is needed in a cluster, where what a pod keeps for itself is lost with it; name a bucket, as in s3://bucket/folder, or set spec.checkpoints.mode to Disabled"
            ],
        );
        let savepoint = |schedule: &str| {
            let spec = json!({"job": "a", "schedule": schedule});
            ask("Savepoint", json!({"metadata": {"name": "s"}, "spec": spec}), None)
        };
        assert_eq!(savepoint("0 3 * * *"), "let through");
        assert!(savepoint("0 3 * * 9").starts_with("spec.schedule: '0 3 * * 9' is no schedule"));
    }

    #[test]
    fn what_can_not_be_judged_or_runs_already_is_let_through() {
        let wrong = SQL.replace("SELECT i", "SELECT j");
        let before = job(json!({"sql": wrong}));
        for after in [json!({"sql": wrong, "desiredState": "Suspended"}), json!({"sql": wrong, "parallelism": 3})] {
            assert_eq!(ask("StreamJob", job(after), Some(before.clone())), "let through");
        }
        let mut leaving = job(json!({"sql": wrong}));
        leaving["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z".into();
        assert_eq!(ask("StreamJob", leaving, None), "let through");
        assert_eq!(ask("StreamJob", job(json!({"sql": 7})), None), "let through", "the definition refuses it");
        assert_eq!(ask("Pod", json!({}), None), "let through");
    }
}
