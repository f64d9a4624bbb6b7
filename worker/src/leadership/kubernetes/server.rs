//! An API server that keeps one Lease in memory, and answers over HTTP as a real one does: versions and conflicts, merge
//! patches, watches, and no more than the job's Role allows. Each client has a line of its own, which may be disturbed.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::{Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};
use floodmark_crds::{REPORT_ANNOTATION, RUN_ANNOTATION, Report};
use futures::stream;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Client;
use serde_json::{Value, json};
use tokio::sync::watch;

pub(super) const NAMESPACE: &str = "shop";
pub(super) const NAME: &str = "hot";

/// What a request meets with instead of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// An answer with this status; nothing is done.
    Status(u16),
    /// No answer; nothing is done.
    Hang,
    /// No answer, but it is done.
    LoseReply,
}

/// What disturbs the requests of a client.
#[derive(Clone, Debug, Default)]
pub(super) struct Line {
    faults: Arc<Mutex<VecDeque<Fault>>>,
    down: Arc<watch::Sender<bool>>,
}

impl Line {
    /// The next requests meet with these, one each.
    pub(super) fn disturb(&self, faults: impl IntoIterator<Item = Fault>) {
        lock(&self.faults).extend(faults);
    }

    /// How many of them are still to come.
    pub(super) fn undisturbed(&self) -> bool {
        lock(&self.faults).is_empty()
    }

    /// Nothing gets through, or everything again.
    pub(super) fn down(&self, down: bool) {
        self.down.send_replace(down);
    }
}

#[derive(Default)]
struct Store {
    object: Option<Value>,
    version: u64,
    /// Each change with its version.
    history: Vec<(u64, Value)>,
}

#[derive(Clone, Default)]
pub(super) struct ApiServer {
    store: Arc<Mutex<Store>>,
    changed: Arc<watch::Sender<u64>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ApiServer {
    /// One with the job's Lease, in which this run may lead.
    pub(super) fn with_run(run: u64) -> Self {
        let server = Self::default();
        server.create(run);
        server
    }

    pub(super) fn create(&self, run: u64) {
        let annotations = json!({ RUN_ANNOTATION: run.to_string() });
        let object = json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": { "name": NAME, "namespace": NAMESPACE, "annotations": annotations },
        });
        self.put("ADDED", object);
    }

    pub(super) fn delete(&self) {
        let object = lock(&self.store).object.take().unwrap();
        self.put("DELETED", object);
        lock(&self.store).object = None;
    }

    /// Somebody else changes it.
    pub(super) fn change(&self, change: Value) {
        let mut object = lock(&self.store).object.clone().unwrap();
        merge(&mut object, change);
        self.put("MODIFIED", object);
    }

    /// The controller lets another run lead.
    pub(super) fn allow(&self, run: u64) {
        self.change(json!({ "metadata": { "annotations": { RUN_ANNOTATION: run.to_string() } } }));
    }

    pub(super) fn lease(&self) -> Lease {
        serde_json::from_value(lock(&self.store).object.clone().unwrap()).unwrap()
    }

    pub(super) fn holder(&self) -> String {
        self.lease().spec.and_then(|s| s.holder_identity).unwrap_or_default()
    }

    pub(super) fn transitions(&self) -> i32 {
        self.lease().spec.and_then(|s| s.lease_transitions).unwrap_or_default()
    }

    pub(super) fn report(&self) -> Report {
        serde_json::from_str(&self.lease().metadata.annotations.unwrap()[REPORT_ANNOTATION]).unwrap()
    }

    /// All the reports that there have been, in order, each once.
    pub(super) fn reports(&self) -> Vec<Report> {
        let of = |(_, event): &(u64, Value)| {
            let text = event["object"]["metadata"]["annotations"][REPORT_ANNOTATION].as_str()?;
            Some(serde_json::from_str(text).unwrap())
        };
        let mut reports: Vec<Report> = lock(&self.store).history.iter().filter_map(of).collect();
        reports.dedup();
        reports
    }

    /// How often it has been changed.
    pub(super) fn version(&self) -> u64 {
        lock(&self.store).version
    }

    pub(super) fn client(&self, line: &Line) -> Client {
        Client::new(Router::new().fallback(serve).with_state((self.clone(), line.clone())), NAMESPACE)
    }

    fn put(&self, event: &str, mut object: Value) {
        let store = &mut *lock(&self.store);
        store.version += 1;
        object["metadata"]["resourceVersion"] = json!(store.version.to_string());
        store.history.push((store.version, json!({ "type": event, "object": object })));
        store.object = Some(object);
        self.changed.send_replace(store.version);
    }

    fn patch(&self, patch: Value) -> Response {
        let Some(mut object) = lock(&self.store).object.clone() else { return status(404, "leases \"hot\" not found") };
        let based_on = patch["metadata"]["resourceVersion"].clone();
        if !based_on.is_null() && based_on != object["metadata"]["resourceVersion"] {
            return status(409, "the object has been modified; please apply your changes to the latest version");
        }
        let before = object.clone();
        merge(&mut object, patch);
        let Ok(typed) = serde_json::from_value::<Lease>(object.clone()) else { return status(400, "not a Lease") };
        let spec = typed.spec.unwrap_or_default();
        if spec.lease_duration_seconds.is_some_and(|s| s <= 0) || spec.lease_transitions.is_some_and(|t| t < 0) {
            return status(422, "must be greater than 0");
        }
        if object != before {
            self.put("MODIFIED", object);
        }
        axum::Json(lock(&self.store).object.clone()).into_response()
    }

    /// All changes after this version, for as long as the line holds.
    fn watch(&self, after: u64, line: &Line) -> Response {
        let from = (self.clone(), after, self.changed.subscribe(), line.down.subscribe());
        let events = stream::unfold(from, async |(server, after, mut changed, mut down)| {
            loop {
                // What can't come through is not lost: it comes later.
                down.wait_for(|d| !*d).await.ok()?;
                changed.mark_unchanged();
                let next = lock(&server.store).history.iter().find(|(version, _)| *version > after).cloned();
                if let Some((version, event)) = next {
                    let line = Bytes::from(format!("{event}\n"));
                    return Some((Ok::<_, std::convert::Infallible>(line), (server, version, changed, down)));
                }
                changed.changed().await.ok()?;
            }
        });
        Body::from_stream(events).into_response()
    }
}

async fn serve(State((server, line)): State<(ApiServer, Line)>, request: Request) -> Response {
    let fault = lock(&line.faults).pop_front();
    let forever = async || std::future::pending::<Response>().await;
    match fault {
        _ if *line.down.borrow() => return forever().await,
        Some(Fault::Hang) => return forever().await,
        Some(Fault::Status(code)) => return status(code, "disturbed"),
        Some(Fault::LoseReply) | None => {}
    }
    let answer = answer(&server, &line, request).await;
    if fault.is_some() { forever().await } else { answer }
}

async fn answer(server: &ApiServer, line: &Line, request: Request) -> Response {
    let all = format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases");
    let (path, query) = (request.uri().path().to_owned(), request.uri().query().unwrap_or_default().to_owned());
    match *request.method() {
        Method::GET if path == format!("{all}/{NAME}") => match lock(&server.store).object.clone() {
            Some(object) => axum::Json(object).into_response(),
            None => status(404, "leases \"hot\" not found"),
        },
        Method::PATCH if path == format!("{all}/{NAME}") => {
            assert_eq!(request.headers()["content-type"], "application/merge-patch+json");
            let bytes = to_bytes(request.into_body(), 1 << 20).await.unwrap();
            server.patch(serde_json::from_slice(&bytes).unwrap())
        }
        // The Role names the Lease: only so it may be watched.
        Method::GET if path == all && query.contains(&format!("fieldSelector=metadata.name%3D{NAME}")) => {
            assert!(query.contains("watch=true"), "{query}");
            let version = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")).unwrap();
            server.watch(version.parse().unwrap(), line)
        }
        _ => status(403, &format!("{} {path} is forbidden", request.method())),
    }
}

fn status(code: u16, message: &str) -> Response {
    let body = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code });
    (StatusCode::from_u16(code).unwrap(), axum::Json(body)).into_response()
}

/// RFC 7386.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(&key);
        } else {
            merge(&mut target[key], value);
        }
    }
}
