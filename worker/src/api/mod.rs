//! A job's control interface: what it is doing, and orders to it, over HTTP; and what a worker tells of itself. No socket
//! here: whoever runs the job serves the [`router`], and decides who may ask.
//!
//! [`endpoints`] is the table of all there is; the router and its description ([`openapi()`]) are made of it. `views` has what
//! is spoken, `orders` what changes a job, `metrics` what Prometheus reads.
//!
//! Invariant: a request that has been taken in is carried out, also if its asker goes away before the answer.

mod exposition;
mod metrics;
mod openapi;
mod orders;
mod views;

use std::sync::{Arc, LazyLock};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use floodmark_snapshot::{JobId, storage::Storage};
use tokio::sync::watch;

use self::openapi::{Endpoint, describe, route};
pub use self::views::{
    CheckpointEntry, CheckpointHistory, CheckpointKind, CheckpointOutcome, CheckpointView, CheckpointsView, EdgeView,
    ErrorView, ExchangeView, FailureView, GraphView, HealthView, JobView, OperatorView, Outline, RescaleOrder,
    RescaledView, SavepointOrder, SavepointView, SharesView, StopOrder, StopView, TaskView, Then,
};
use crate::{CheckpointCounts, Progress, ProgressView, Requests};

/// Longest body of a request, bytes.
pub const BODY_MAX: usize = 16 << 10;

/// A job that can be asked.
pub struct JobApi {
    /// Which.
    pub job: JobId,
    /// Who runs it: `host:pid`.
    pub holder: String,
    /// What it does.
    pub graph: Outline,
    /// Subtasks per task before its first attempt.
    pub parallelism: u32,
    /// Number of key groups.
    pub max_parallelism: u16,
    /// What it shows of itself.
    pub progress: Arc<Progress>,
    /// Where it listens.
    pub requests: Requests,
    /// Turned true, it stops with a last checkpoint.
    pub stop: watch::Sender<bool>,
    /// Where its snapshots are.
    pub storage: Arc<dyn Storage>,
}

impl JobApi {
    fn parallelism(&self, view: &ProgressView) -> u32 {
        view.attempt.parallelism.unwrap_or(self.parallelism)
    }
}

/// A worker that can be asked.
pub struct WorkerApi {
    /// What the job does.
    pub graph: Outline,
    /// Slices that it runs side by side.
    pub slots: u32,
    /// What it shows of itself.
    pub progress: Arc<Progress>,
}

/// The interface of a job. Orders are answered when they are carried out.
pub fn router(api: JobApi) -> Router {
    finish(route(endpoints()), Arc::new(api))
}

/// The interface of a worker: its metrics and its health.
pub fn worker_router(api: WorkerApi) -> Router {
    let endpoints = vec![
        Endpoint::get("/metrics", "", get(async |State(api): State<Arc<WorkerApi>>| text(metrics::of_worker(&api)))),
        Endpoint::get(
            "/healthz",
            "",
            get(async |State(api): State<Arc<WorkerApi>>| Json(HealthView::from(api.progress.worker_phase()))),
        ),
        Endpoint::get(
            "/readyz",
            "",
            get(async |State(api): State<Arc<WorkerApi>>| ready(api.progress.worker_phase().into())),
        ),
    ];
    finish(route(endpoints), Arc::new(api))
}

fn finish<S: Clone + Send + Sync + 'static>(router: Router<S>, state: S) -> Router {
    router
        .fallback(async || refuse(StatusCode::NOT_FOUND, "there is no such thing here; see docs/api.md"))
        .method_not_allowed_fallback(async || {
            refuse(StatusCode::METHOD_NOT_ALLOWED, "GET tells, POST changes something; see docs/api.md")
        })
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(state)
}

/// The description of a job's interface: OpenAPI 3.1, as JSON.
#[must_use]
pub fn openapi() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| describe(&endpoints()));
    &TEXT
}

/// All there is to ask a job.
fn endpoints() -> Vec<Endpoint<Arc<JobApi>>> {
    let order = |endpoint: Endpoint<Arc<JobApi>>| {
        endpoint
            .answers::<ErrorView>(400, "The order can't be read, or can't be carried out by any job such as this.")
            .answers::<ErrorView>(401, "Over TCP: the token is missing or is another.")
            .answers::<ErrorView>(403, "Over TCP: nothing can be changed there, because no token was set up.")
            .answers::<ErrorView>(409, "The job refuses, and says why.")
            .answers::<ErrorView>(413, "The order is too long.")
            .answers::<ErrorView>(415, "The order is not said to be application/json.")
            .answers::<ErrorView>(422, "The order has other fields or values than it can have.")
            .answers::<ErrorView>(503, "The job has ended.")
    };
    vec![
        Endpoint::get("/job", "Where the job stands", get(job)).answers::<JobView>(200, "The job as it is now."),
        Endpoint::get("/job/graph", "Its tasks and operators, with what they count and spend time on", get(graph))
            .answers::<GraphView>(200, "The graph as it is now."),
        Endpoint::get("/checkpoints", "The last checkpoints, and what became of them", get(checkpoints))
            .answers::<CheckpointHistory>(200, "Newest first."),
        order(
            Endpoint::post("/savepoints", "Take a savepoint", post(orders::take_savepoint))
                .takes::<SavepointOrder>(false)
                .answers::<SavepointView>(200, "The savepoint is complete."),
        ),
        order(
            Endpoint::post("/rescale", "Go on at another parallelism", post(orders::rescale))
                .takes::<RescaleOrder>(false)
                .answers::<RescaledView>(200, "The job runs at that parallelism."),
        ),
        order(
            Endpoint::post("/stop", "Stop, with a savepoint or with a last checkpoint", post(orders::stop))
                .takes::<StopOrder>(true)
                .answers::<StopView>(200, "The savepoint is complete, and the job stops.")
                .answers::<StopView>(202, "The job takes a last checkpoint, then stops."),
        ),
        Endpoint::get("/metrics", "Metrics for Prometheus", get(scrape))
            .answers_text(200, "Prometheus' text format, version 0.0.4."),
        Endpoint::get("/healthz", "Whether the loop that runs the job turns", get(health))
            .answers::<HealthView>(200, "It does: it has answered this."),
        Endpoint::get("/readyz", "Whether the job runs with all its state there", get(readiness))
            .answers::<HealthView>(200, "It does.")
            .answers::<HealthView>(503, "It does not, or not yet."),
        Endpoint::get("/openapi.json", "This description", get(description))
            .answers::<serde_json::Value>(200, "OpenAPI 3.1."),
    ]
}

async fn job(State(api): State<Arc<JobApi>>) -> Json<JobView> {
    let view = api.progress.view();
    let CheckpointCounts { completed, failed, overtaken, last } = view.checkpoints;
    Json(JobView {
        job: api.job.to_string(),
        phase: view.phase.name().to_owned(),
        ready: view.is_ready(),
        holder: api.holder.clone(),
        parallelism: api.parallelism(&view),
        max_parallelism: api.max_parallelism,
        attempt: view.attempt.attempt.map(|a| a.0),
        restarts: view.attempt.restarts,
        last_failure: view.attempt.last_failure.map(|f| FailureView { cause: f.cause, at_ms: f.at_ms }),
        restored_from: view.restored_from,
        checkpoints: CheckpointsView { completed, failed, overtaken, last: last.map(CheckpointView::from) },
    })
}

async fn graph(State(api): State<Arc<JobApi>>) -> Json<GraphView> {
    let view = api.progress.view();
    Json(api.graph.view(&view, api.parallelism(&view)))
}

async fn checkpoints(State(api): State<Arc<JobApi>>) -> Json<CheckpointHistory> {
    let records = api.progress.checkpoints().into_iter().rev();
    Json(CheckpointHistory { checkpoints: records.map(CheckpointEntry::from).collect() })
}

async fn scrape(State(api): State<Arc<JobApi>>) -> Response {
    text(metrics::of_job(&api))
}

async fn health(State(api): State<Arc<JobApi>>) -> Json<HealthView> {
    Json(HealthView::from(&api.progress.view()))
}

async fn readiness(State(api): State<Arc<JobApi>>) -> Response {
    ready(HealthView::from(&api.progress.view()))
}

async fn description() -> Response {
    ([(CONTENT_TYPE, "application/json")], openapi()).into_response()
}

fn ready(health: HealthView) -> Response {
    let status = if health.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(health)).into_response()
}

fn text(metrics: String) -> Response {
    ([(CONTENT_TYPE, exposition::CONTENT_TYPE)], metrics).into_response()
}

/// Answers that a request is not carried out, and why.
#[must_use]
pub fn refuse(status: StatusCode, error: &str) -> Response {
    (status, Json(ErrorView { error: error.to_owned() })).into_response()
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, http::Request};
    use floodmark_dataflow::{JobGraph, WATERMARK_MAX};
    use floodmark_snapshot::{
        Attempt, Epoch,
        coordination::{Barrier, BarrierKind, Time},
        log::JobFolder,
        savepoint, storage,
    };
    use http_body_util::BodyExt;
    use serde_json::{Value, json};
    use tokio::sync::mpsc;
    use tower::ServiceExt;

    use super::*;
    use crate::{
        CheckpointStatus, Controls, JobPhase, OperatorStatus, RescaleRequest, Rescaled, SavepointMade,
        SavepointRequest, Shares, TaskStatus, WorkerPhase, progress::Counted, words::WorkerId,
    };

    fn api_of(requests: Requests, stop: watch::Sender<bool>) -> JobApi {
        JobApi {
            job: JobId { namespace: "default".into(), name: "hot".into(), uid: "local".into() },
            holder: "here:1".into(),
            graph: Outline::of(&JobGraph::default()),
            parallelism: 2,
            max_parallelism: 128,
            progress: Arc::default(),
            requests,
            stop,
            storage: storage::open("memory://").unwrap(),
        }
    }

    /// An interface, and where the job listens.
    fn served() -> (Router, Controls) {
        let (stop, stopped) = watch::channel(false);
        let (controls, requests) = Controls::new(stopped);
        (router(api_of(requests, stop)), controls)
    }

    fn api() -> (Router, mpsc::Receiver<SavepointRequest>) {
        let (router, controls) = served();
        (router, controls.savepoints)
    }

    async fn ask(router: Router, method: &str, path: &str, body: String) -> (u16, Value) {
        let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
        let answer = router.oneshot(request.body(Body::from(body)).unwrap()).await.unwrap();
        let status = answer.status().as_u16();
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap())
    }

    async fn read(router: Router, path: &str) -> String {
        let answer = router.oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(answer.headers()[CONTENT_TYPE], "text/plain; version=0.0.4; charset=utf-8");
        String::from_utf8(answer.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
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

    /// What is answered to an order for another parallelism.
    async fn rescale(n: u32, done: Result<Rescaled, String>) -> (u16, Value) {
        let (router, mut controls) = served();
        let job = async {
            let RescaleRequest { parallelism, reply } = controls.rescales.recv().await.unwrap();
            assert_eq!(parallelism, n);
            reply.send(done).unwrap();
        };
        tokio::join!(ask(router, "POST", "/rescale", json!({ "parallelism": n }).to_string()), job).0
    }

    /// A running job with a task of two operators and another behind it, some of it counted, and its interface.
    fn running() -> Router {
        let (stop, stopped) = watch::channel(false);
        let (_, requests) = Controls::new(stopped);
        let api = JobApi { graph: Outline::example(), ..api_of(requests, stop) };
        let progress = api.progress.clone();
        progress.begins(Some(Attempt(7)), 3, 0);
        progress.phase(JobPhase::Running);
        let at = |ms: u64| Time { monotonic: std::time::Duration::from_millis(ms), wall_ms: ms as i64 };
        progress.triggered(Barrier::checkpoint(Epoch(4)), at(1_000));
        progress.completed(CheckpointStatus { epoch: Epoch(4), triggered_at_ms: 1_000, duration_ms: 250, size: 99 });
        progress.triggered(Barrier { whole: true, ..Barrier::checkpoint(Epoch(5)) }, at(2_000));
        progress.aborted(Epoch(5), "timed out".into(), false, at(2_500));
        progress.triggered(Barrier { kind: BarrierKind::Stop, ..Barrier::checkpoint(Epoch(6)) }, at(3_000));
        let status = |uid: &str, n, watermark| OperatorStatus {
            rows_in: n,
            rows_out: n + 1,
            state_bytes: 5,
            watermark,
            ..OperatorStatus::new(&uid.into(), "x")
        };
        let operators = vec![status("source:a", 10, Some(1_500)), status("sink:\"b\"", 20, Some(WATERMARK_MAX))];
        let lately = Shares { busy: 0.5, idle: 0.25, back_pressured: 0.25 };
        let tasks = vec![TaskStatus { task: 1, subtasks: 3, lately, ..TaskStatus::default() }];
        progress.counters.told(WorkerId(1), Counted { operators, tasks });
        router(api)
    }

    #[tokio::test]
    async fn a_job_tells_where_it_stands() {
        let (router, _requests) = api();
        let (status, view) = ask(router, "GET", "/job", String::new()).await;
        assert_eq!((status, &view["job"], &view["phase"]), (200, &json!("default/hot/local"), &json!("restoring")));
        assert_eq!(view["checkpoints"], json!({ "completed": 0, "failed": 0, "overtaken": 0, "last": null }));
        assert_eq!((&view["parallelism"], &view["maxParallelism"]), (&json!(2), &json!(128)));
        let (_, view) = ask(running(), "GET", "/job", String::new()).await;
        assert_eq!((&view["parallelism"], &view["attempt"], &view["ready"]), (&json!(3), &json!(7), &json!(true)));
        assert_eq!((&view["restarts"], &view["lastFailure"]), (&json!(0), &json!(null)));
    }

    #[tokio::test]
    async fn the_graph_is_told_with_what_is_counted() {
        let (status, graph) = ask(running(), "GET", "/job/graph", String::new()).await;
        assert_eq!(status, 200);
        let [first, second] = &graph["tasks"].as_array().unwrap()[..] else { panic!("{graph}") };
        assert_eq!((&first["parallelism"], &second["parallelism"]), (&json!(3), &json!(1)));
        assert_eq!(first["shares"], json!(null), "nobody has told of it");
        assert_eq!(second["shares"], json!({ "busy": 0.5, "idle": 0.25, "backPressured": 0.25 }));
        assert_eq!(first["operators"].as_array().unwrap().len(), 2);
        let source = &first["operators"][0];
        assert_eq!(
            (&source["uid"], &source["rowsIn"], &source["rowsOut"]),
            (&json!("source:a"), &json!(10), &json!(11))
        );
        assert_eq!((&source["watermarkMs"], &source["inputEnded"]), (&json!(1_500), &json!(false)));
        assert_eq!(first["operators"][1]["rowsIn"], json!(0));
        let sink = &second["operators"][0];
        assert_eq!((&sink["watermarkMs"], &sink["inputEnded"]), (&json!(null), &json!(true)));
        assert_eq!(graph["edges"], json!([{ "from": 0, "to": 1, "input": 0, "exchange": "hash" }]));
    }

    #[tokio::test]
    async fn checkpoints_are_told_newest_first_with_what_became_of_them() {
        let (status, view) = ask(running(), "GET", "/checkpoints", String::new()).await;
        assert_eq!(status, 200);
        let told = |c: &Value| (c["epoch"].as_u64(), c["kind"].clone(), c["state"].clone(), c["durationMs"].as_u64());
        let all: Vec<_> = view["checkpoints"].as_array().unwrap().iter().map(told).collect();
        assert_eq!(
            all,
            [
                (Some(6), json!("last"), json!("underWay"), None),
                (Some(5), json!("savepoint"), json!("failed"), Some(500)),
                (Some(4), json!("checkpoint"), json!("completed"), Some(250)),
            ]
        );
        assert_eq!(view["checkpoints"][1]["reason"], json!("timed out"));
        assert_eq!(view["checkpoints"][2]["size"], json!(99));
    }

    /// Each sample of a text in Prometheus' format, after a check that it is in it.
    fn samples(text: &str) -> std::collections::BTreeMap<String, f64> {
        let (mut samples, mut family, mut seen) = (std::collections::BTreeMap::new(), String::new(), Vec::new());
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                family = help.split(' ').next().unwrap().to_owned();
                assert!(!seen.contains(&family), "{family} comes twice");
                seen.push(family.clone());
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert_eq!(name, family);
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            } else {
                let (sample, value) = line.rsplit_once(' ').unwrap();
                assert_eq!(sample.split('{').next().unwrap(), family);
                assert!(family.starts_with("floodmark_") && family.chars().all(|c| c.is_ascii_lowercase() || c == '_'));
                assert_eq!(sample.contains('{'), sample.ends_with("\"}"), "{line}");
                assert!(samples.insert(sample.to_owned(), value.parse().unwrap()).is_none(), "{sample} comes twice");
            }
        }
        samples
    }

    #[tokio::test]
    async fn metrics_are_in_prometheus_format() {
        let samples = samples(&read(running(), "/metrics").await);
        for (sample, value) in [
            ("floodmark_job_ready", 1.0),
            ("floodmark_job_phase{phase=\"running\"}", 1.0),
            ("floodmark_job_phase{phase=\"done\"}", 0.0),
            ("floodmark_job_attempt", 7.0),
            ("floodmark_checkpoints_total{state=\"failed\"}", 1.0),
            ("floodmark_checkpoints_under_way", 1.0),
            ("floodmark_last_checkpoint_duration_seconds", 0.25),
            ("floodmark_task_subtasks{task=\"1\"}", 3.0),
            ("floodmark_operator_rows_in_total{task=\"0\",operator=\"source:a\"}", 10.0),
            ("floodmark_operator_watermark_seconds{task=\"0\",operator=\"source:a\"}", 1.5),
            ("floodmark_operator_rows_out_total{task=\"1\",operator=\"sink:\\\"b\\\"\"}", 21.0),
            ("floodmark_operator_watermark_seconds{task=\"1\",operator=\"sink:\\\"b\\\"\"}", f64::INFINITY),
        ] {
            assert_eq!(samples.get(sample), Some(&value), "{sample} of {samples:#?}");
        }
    }

    #[tokio::test]
    async fn a_job_lives_while_it_answers_and_is_ready_once_all_its_state_is_there() {
        let (router, _requests) = api();
        let not_yet = json!({ "phase": "restoring", "ready": false, "restoring": 0 });
        assert_eq!(ask(router.clone(), "GET", "/healthz", String::new()).await, (200, not_yet.clone()));
        assert_eq!(ask(router, "GET", "/readyz", String::new()).await, (503, not_yet));
        let ready = json!({ "phase": "running", "ready": true, "restoring": 0 });
        assert_eq!(ask(running(), "GET", "/readyz", String::new()).await, (200, ready));
    }

    #[tokio::test]
    async fn a_worker_tells_of_its_share_and_whether_it_has_a_coordinator() {
        let progress = Arc::<Progress>::default();
        let api = || WorkerApi { graph: Outline::example(), slots: 2, progress: progress.clone() };
        let (status, health) = ask(worker_router(api()), "GET", "/readyz", String::new()).await;
        assert_eq!((status, &health["phase"]), (503, &json!("looking")));
        let phases = [(WorkerPhase::Waiting, 200), (WorkerPhase::Building, 503)];
        let running = [(1, 503), (0, 200)].map(|(restoring, status)| (WorkerPhase::Running { restoring }, status));
        for (phase, expected) in phases.into_iter().chain(running) {
            progress.counters.enter(phase);
            let (status, health) = ask(worker_router(api()), "GET", "/readyz", String::new()).await;
            assert_eq!((status, health["ready"] == json!(true)), (expected, expected == 200), "{phase:?}");
            assert_eq!(ask(worker_router(api()), "GET", "/healthz", String::new()).await.0, 200);
        }
        let samples = samples(&read(worker_router(api()), "/metrics").await);
        assert_eq!(samples["floodmark_worker_phase{phase=\"running\"}"], 1.0);
        assert_eq!(samples["floodmark_worker_operator_rows_in_total{task=\"0\",operator=\"source:a\"}"], 0.0);
        assert!(samples.keys().all(|name| name.starts_with("floodmark_worker_")), "{samples:?}");
        let (status, _) = ask(worker_router(api()), "POST", "/stop", "{}".to_owned()).await;
        assert_eq!(status, 404);
    }

    #[tokio::test]
    async fn another_parallelism_is_answered_when_the_job_runs_at_it_or_refused() {
        let done = Rescaled { from: 2, to: 4, epoch: Some(Epoch(9)) };
        assert_eq!(rescale(4, Ok(done)).await, (200, json!({ "from": 2, "to": 4, "epoch": 9 })));
        assert_eq!(rescale(128, Err("it stops".into())).await, (409, json!({ "error": "it stops" })));
        for (body, expected) in [
            (json!({ "parallelism": 0 }), 400),
            (json!({ "parallelism": 129 }), 400),
            (json!({ "parallelism": -1 }), 422),
            (json!({}), 422),
        ] {
            let (router, mut controls) = served();
            let (status, answer) = ask(router, "POST", "/rescale", body.to_string()).await;
            assert_eq!(status, expected, "{answer}");
            assert!(controls.rescales.try_recv().is_err());
        }
        let (router, controls) = served();
        drop(controls);
        assert_eq!(ask(router, "POST", "/rescale", json!({ "parallelism": 2 }).to_string()).await.0, 503);
    }

    #[tokio::test]
    async fn a_job_stops_with_a_last_checkpoint_or_with_a_savepoint() {
        let (router, controls) = served();
        let request = Request::post("/stop").body(Body::empty()).unwrap();
        assert_eq!(router.clone().oneshot(request).await.unwrap().status(), 202);
        assert!(*controls.stop.borrow());
        for (body, expected) in [(json!({ "drain": true }), 400), (json!({ "name": "a" }), 422)] {
            let (router, controls) = served();
            assert_eq!(ask(router, "POST", "/stop", body.to_string()).await.0, expected);
            assert!(!*controls.stop.borrow());
        }
        for (drain, expected) in [(false, BarrierKind::Stop), (true, BarrierKind::Drain)] {
            let (router, mut controls) = served();
            let job = async {
                let request = controls.savepoints.recv().await.unwrap();
                let made = SavepointMade { location: "/s/a".into(), epoch: Epoch(7), size: 12 };
                request.reply.send(Ok(made)).unwrap();
                request.then
            };
            let body = json!({ "savepoint": "a", "drain": drain }).to_string();
            let ((status, answer), then) = tokio::join!(ask(router, "POST", "/stop", body), job);
            assert_eq!((status, then), (200, expected));
            assert_eq!(answer["savepoint"]["location"], json!("/s/a"));
            assert!(!*controls.stop.borrow(), "the savepoint stops it");
        }
        let (router, controls) = served();
        drop(controls);
        assert_eq!(ask(router, "POST", "/stop", "{}".to_owned()).await.0, 503);
    }

    #[tokio::test]
    async fn what_is_not_there_is_refused_in_json() {
        for (method, path, expected) in
            [("GET", "/nothing", 404), ("POST", "/job", 405), ("GET", "/stop", 405), ("DELETE", "/checkpoints", 405)]
        {
            let (status, answer) = ask(api().0, method, path, String::new()).await;
            assert_eq!((status, answer["error"].is_string()), (expected, true), "{method} {path}");
        }
        let (status, all) = ask(api().0, "GET", "/openapi.json", String::new()).await;
        assert_eq!((status, &all["openapi"]), (200, &json!("3.1.0")));
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
        let (stop, stopped) = watch::channel(false);
        let (mut controls, requests) = Controls::new(stopped);
        let api = api_of(requests, stop);
        let manifest = format!("{}/{}", savepoint::folder(&JobFolder::of(&api.job), "a"), savepoint::MANIFEST_FILE);
        api.storage.put(&manifest, "{}".into()).await.unwrap();
        let router = router(api);
        for (path, body) in
            [("/savepoints", json!({ "name": "a", "then": "Stop" })), ("/stop", json!({ "savepoint": "a" }))]
        {
            let (status, answer) = ask(router.clone(), "POST", path, body.to_string()).await;
            assert_eq!(status, 409, "{answer}");
            assert!(controls.savepoints.try_recv().is_err());
        }
        assert!(!*controls.stop.borrow());
    }
}
