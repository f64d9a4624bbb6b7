//! The job's control interface: what it is doing, and savepoints on demand, over HTTP. No socket here: whoever runs the job
//! serves the [`router`], and decides who may ask.
//!
//! Invariant: a request that has been taken in is carried out, also if its asker goes away before the answer.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State, rejection::JsonRejection},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use floodmark_snapshot::{Epoch, JobId, coordination::BarrierKind, log::JobFolder, savepoint, storage::Storage};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::{CheckpointCounts, CheckpointStatus, JobPhase, Progress, Requests, SavepointRequest};

/// Longest body of a request, bytes.
const BODY_MAX: usize = 16 << 10;

/// A job that can be asked.
pub struct JobApi {
    /// Which.
    pub job: JobId,
    /// Who runs it: `host:pid`.
    pub holder: String,
    /// What it shows of itself.
    pub progress: Arc<Progress>,
    /// Where it listens.
    pub requests: Requests,
    /// Where its snapshots are.
    pub storage: Arc<dyn Storage>,
}

/// The answer to `GET /job`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobView {
    /// `namespace/name/uid`.
    pub job: String,
    /// `restoring`, `running`, `stopping` or `done`.
    pub phase: String,
    /// Who runs it: `host:pid`.
    pub holder: String,
    /// The checkpoint that it started from.
    pub restored_from: Option<Epoch>,
    /// Its checkpoints since then.
    pub checkpoints: CheckpointsView,
}

/// The checkpoints of one run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointsView {
    /// Completed.
    pub completed: u64,
    /// Failed or timed out.
    pub failed: u64,
    /// Given up because a later one was complete before them.
    #[serde(default)]
    pub overtaken: u64,
    /// The newest completed one.
    pub last: Option<CheckpointView>,
}

/// A completed checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointView {
    /// Its number.
    pub epoch: Epoch,
    /// Wall-clock time of its trigger, milliseconds since the Unix epoch.
    pub triggered_at_ms: i64,
    /// From the trigger to the last acknowledgement, milliseconds.
    pub duration_ms: u64,
    /// Bytes of all its shards.
    pub size: u64,
}

/// What a job does once a savepoint has been taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Then {
    /// It goes on.
    #[default]
    Continue,
    /// It stops; whoever restores the savepoint goes on from there.
    Stop,
    /// It stops after event time has gone to its end: open windows fire.
    Drain,
}

/// The body of `POST /savepoints`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SavepointOrder {
    /// The savepoint's name, unique in the job.
    pub name: String,
    /// What the job does then.
    #[serde(default)]
    pub then: Then,
}

/// A savepoint that was made: the answer to `POST /savepoints`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SavepointView {
    /// Its folder, as it is given to a restore.
    pub location: String,
    /// The checkpoint that it is a copy of.
    pub epoch: Epoch,
    /// Bytes of its shards.
    pub size: u64,
}

/// Why a request failed: the body of every other answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorView {
    /// What failed, why, and what to do.
    pub error: String,
}

/// The interface: `GET /job` and `POST /savepoints`. A savepoint is answered when it is complete: 400 if the request can't be
/// read or the name can't be one, 409 if the job has a savepoint of that name or takes none, 503 if it has ended.
pub fn router(api: JobApi) -> Router {
    Router::new()
        .route("/job", get(job))
        .route("/savepoints", post(take_savepoint))
        .fallback(async || refuse(StatusCode::NOT_FOUND, "there is GET /job and POST /savepoints"))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(Arc::new(api))
}

async fn job(State(api): State<Arc<JobApi>>) -> Json<JobView> {
    let view = api.progress.view();
    let phase = match view.phase {
        JobPhase::Restoring => "restoring",
        JobPhase::Running => "running",
        JobPhase::Stopping => "stopping",
        JobPhase::Done => "done",
    };
    let checkpoint = |c: CheckpointStatus| CheckpointView {
        epoch: c.epoch,
        triggered_at_ms: c.triggered_at_ms,
        duration_ms: c.duration_ms,
        size: c.size,
    };
    let CheckpointCounts { completed, failed, overtaken, last } = view.checkpoints;
    let checkpoints = CheckpointsView { completed, failed, overtaken, last: last.map(checkpoint) };
    Json(JobView {
        job: api.job.to_string(),
        phase: phase.to_owned(),
        holder: api.holder.clone(),
        restored_from: view.restored_from,
        checkpoints,
    })
}

async fn take_savepoint(
    State(api): State<Arc<JobApi>>,
    order: Result<Json<SavepointOrder>, JsonRejection>,
) -> Result<Json<SavepointView>, Response> {
    let Json(SavepointOrder { name, then }) = order.map_err(|e| refuse(e.status(), &e.body_text()))?;
    savepoint::check_name(&name).map_err(|e| refuse(StatusCode::BAD_REQUEST, &e.to_string()))?;
    // Found out now, before a job that shall stop has stopped.
    let exists = savepoint::exists(&*api.storage, &JobFolder::of(&api.job), &name).await;
    if exists.map_err(|e| refuse(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()))? {
        let message = format!("there is a savepoint '{name}' already; choose another name");
        return Err(refuse(StatusCode::CONFLICT, &message));
    }
    let then = match then {
        Then::Continue => BarrierKind::Checkpoint,
        Then::Stop => BarrierKind::Stop,
        Then::Drain => BarrierKind::Drain,
    };
    let ended = || refuse(StatusCode::SERVICE_UNAVAILABLE, "the job ended before it took the savepoint");
    let (reply, answer) = oneshot::channel();
    api.requests.savepoints.send(SavepointRequest { name, then, reply }).await.map_err(|_| ended())?;
    let made = answer.await.map_err(|_| ended())?.map_err(|reason| refuse(StatusCode::CONFLICT, &reason))?;
    Ok(Json(SavepointView { location: made.location, epoch: made.epoch, size: made.size }))
}

fn refuse(status: StatusCode, error: &str) -> Response {
    (status, Json(ErrorView { error: error.to_owned() })).into_response()
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, http::Request};
    use floodmark_snapshot::storage;
    use http_body_util::BodyExt;
    use serde_json::{Value, json};
    use tokio::sync::{mpsc, watch};
    use tower::ServiceExt;

    use super::*;
    use crate::{Controls, SavepointMade};

    fn api() -> (Router, mpsc::Receiver<SavepointRequest>) {
        let (controls, requests) = Controls::new(watch::channel(false).1);
        let job = JobId { namespace: "default".into(), name: "hot".into(), uid: "local".into() };
        let storage = storage::open("memory://").unwrap();
        let api = JobApi { job, holder: "here:1".into(), progress: Arc::default(), requests, storage };
        (router(api), controls.savepoints)
    }

    async fn ask(router: Router, method: &str, path: &str, body: String) -> (u16, Value) {
        let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
        let answer = router.oneshot(request.body(Body::from(body)).unwrap()).await.unwrap();
        let status = answer.status().as_u16();
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap())
    }

    /// What is answered to an order for a savepoint if the job answers `made` to what it is asked.
    async fn order(body: Value, made: Result<SavepointMade, String>) -> (u16, Value, BarrierKind) {
        let (router, mut requests) = api();
        let job = async {
            let request = requests.recv().await.unwrap();
            request.reply.send(made).unwrap();
            request.then
        };
        let ((status, answer), then) = tokio::join!(ask(router, "POST", "/savepoints", body.to_string()), job);
        (status, answer, then)
    }

    #[tokio::test]
    async fn a_job_tells_where_it_stands() {
        let (router, _requests) = api();
        let (status, view) = ask(router, "GET", "/job", String::new()).await;
        assert_eq!((status, &view["job"], &view["phase"]), (200, &json!("default/hot/local"), &json!("restoring")));
        assert_eq!(view["checkpoints"], json!({ "completed": 0, "failed": 0, "overtaken": 0, "last": null }));
    }

    #[tokio::test]
    async fn a_savepoint_is_answered_when_it_is_complete_or_refused() {
        let made = SavepointMade { location: "/s/a".into(), epoch: Epoch(7), size: 12 };
        let (status, answer, then) = order(json!({ "name": "a" }), Ok(made.clone())).await;
        assert_eq!((status, then), (200, BarrierKind::Checkpoint));
        assert_eq!(answer, json!({ "location": "/s/a", "epoch": 7, "size": 12 }));
        let (_, _, then) = order(json!({ "name": "a", "then": "Drain" }), Ok(made)).await;
        assert_eq!(then, BarrierKind::Drain);
        let (status, answer, _) = order(json!({ "name": "a", "then": "Stop" }), Err("busy".into())).await;
        assert_eq!((status, answer), (409, json!({ "error": "busy" })));
    }

    #[tokio::test]
    async fn what_is_no_order_never_reaches_the_job() {
        let long = "x".repeat(BODY_MAX + 1);
        for (body, expected) in [
            (json!({ "name": "a/b" }).to_string(), 400),
            (json!({ "name": "latest" }).to_string(), 400),
            (json!({ "name": "a", "then": "Explode" }).to_string(), 422),
            (json!({ "name": "a", "stop": true }).to_string(), 422),
            ("{".to_owned(), 400),
            (json!({ "name": long }).to_string(), 413),
        ] {
            let (router, mut requests) = api();
            let (status, answer) = ask(router, "POST", "/savepoints", body.clone()).await;
            assert_eq!(status, expected, "{body}: {answer}");
            assert!(answer["error"].is_string(), "{answer}");
            assert!(requests.try_recv().is_err());
        }
        let (router, requests) = api();
        drop(requests);
        let (status, _) = ask(router, "POST", "/savepoints", json!({ "name": "a" }).to_string()).await;
        assert_eq!(status, 503);
    }

    #[tokio::test]
    async fn a_name_that_is_taken_is_refused_before_anything_stops() {
        let (mut controls, requests) = Controls::new(watch::channel(false).1);
        let job = JobId { namespace: "default".into(), name: "hot".into(), uid: "local".into() };
        let storage = storage::open("memory://").unwrap();
        let manifest = format!("{}/{}", savepoint::folder(&JobFolder::of(&job), "a"), savepoint::MANIFEST_FILE);
        storage.put(&manifest, "{}".into()).await.unwrap();
        let api = JobApi { job, holder: "here:1".into(), progress: Arc::default(), requests, storage };
        let body = json!({ "name": "a", "then": "Stop" }).to_string();
        let (status, answer) = ask(router(api), "POST", "/savepoints", body).await;
        assert_eq!(status, 409, "{answer}");
        assert!(controls.savepoints.try_recv().is_err());
    }
}
