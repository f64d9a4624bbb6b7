//! An API server in memory, as far as the controller can tell: versions, conflicts, generations, finalizers, owners, server-side apply by
//! one manager, label selectors, metadata-only requests, watches that go on from a version. Requests can be made to be the last ones.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
};

use futures::{
    FutureExt as _, StreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Bytes, Frame};
use kube::client::Body;
use serde_json::{Map, Value as Json, json};
use tokio::sync::{Notify, mpsc};

/// The namespace that tests use.
pub(super) const NAMESPACE: &str = "shop";

/// Where an object is: resource, namespace, name.
pub(super) type Place = (String, String, String);
type Answer = StreamBody<BoxStream<'static, Result<Frame<Bytes>, Infallible>>>;

/// When the process that asks dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Crash {
    /// This write, counted from 0, never reaches the server.
    Before(usize),
    /// It is carried out, and the answer never comes.
    After(usize),
}

#[derive(Default)]
pub(super) struct State {
    pub(super) objects: BTreeMap<Place, Json>,
    /// What each was last applied as.
    applied: HashMap<Place, Json>,
    version: u64,
    uids: u64,
    /// All that has happened: version, resource, namespace, type of event, object.
    history: Vec<(u64, String, String, &'static str, Json)>,
    watchers: Vec<Watcher>,
    /// Writes that were carried out: `patch deployments shop/a`.
    pub(super) writes: Vec<String>,
    /// Writes that were asked for.
    asked: usize,
    /// The namespace of the tests is being removed: nothing new may be in it.
    pub(super) terminating: bool,
    crash: Option<Crash>,
}

struct Watcher {
    resource: String,
    namespace: Option<String>,
    label: Option<String>,
    metadata: bool,
    events: mpsc::UnboundedSender<Bytes>,
}

/// See the header of this file.
#[derive(Clone, Default)]
pub(super) struct Server {
    state: Arc<Mutex<State>>,
    pub(super) crashed: Arc<Notify>,
}

/// A request's path and query.
#[derive(Debug)]
struct Target {
    resource: String,
    namespace: String,
    name: Option<String>,
    part: Option<String>,
    query: HashMap<String, String>,
    group_version: String,
}

struct Refused(u16, &'static str, String);

impl Server {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The process dies at this write, counted from now.
    pub(super) fn crash_at(&self, crash: Option<Crash>) {
        let mut state = self.state();
        (state.asked, state.crash) = (0, crash);
    }

    async fn answer(self, request: Request<Body>) -> Response<Answer> {
        let (parts, body) = request.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let target = Target::of(&parts.uri);
        let header = |name: &str| parts.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        let (metadata, content) = (header("accept").contains("PartialObjectMetadata"), header("content-type"));
        if parts.method == Method::GET && target.query.get("watch").is_some_and(|w| w == "true") {
            return self.watch(&target, metadata);
        }
        let body: Json = serde_json::from_slice(&bytes).unwrap_or(Json::Null);
        let writes = parts.method != Method::GET;
        let crash = if writes { self.state().next_crash() } else { None };
        if let Some(Crash::Before(_)) = crash {
            self.crashed.notify_one();
            return std::future::pending().await;
        }
        let answered = self.state().serve(&parts.method, &target, body, &content);
        if crash.is_some() {
            self.crashed.notify_one();
            return std::future::pending().await;
        }
        match answered {
            Ok(json) if metadata => respond(200, &stripped_all(json)),
            Ok(json) => respond(200, &json),
            Err(Refused(code, reason, message)) => respond(
                code,
                &json!({
                    "apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": code,
                    "details": {"causes": [{"reason": reason}]},
                }),
            ),
        }
    }

    fn watch(&self, target: &Target, metadata: bool) -> Response<Answer> {
        let mut state = self.state();
        let (events, queue) = mpsc::unbounded_channel();
        let namespace = (!target.namespace.is_empty()).then(|| target.namespace.clone());
        let label = target.query.get("labelSelector").cloned();
        let watcher = Watcher { resource: target.resource.clone(), namespace, label, metadata, events };
        let from: u64 = target.query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
        for (version, resource, namespace, kind, object) in &state.history {
            if *version > from {
                watcher.tell(resource, namespace, kind, object);
            }
        }
        state.watchers.push(watcher);
        let lines = stream::unfold(queue, |mut queue| async { queue.recv().await.map(|line| (line, queue)) });
        let body = StreamBody::new(lines.map(|line| Ok(Frame::data(line))).boxed());
        Response::builder().status(200).header("content-type", "application/json").body(body).unwrap()
    }
}

impl Watcher {
    fn tell(&self, resource: &str, namespace: &str, kind: &str, object: &Json) {
        let here = self.resource == resource && self.namespace.as_deref().is_none_or(|n| n == namespace);
        if here && selected(object, self.label.as_deref()) {
            let object = if self.metadata { stripped(object) } else { object.clone() };
            let line = json!({"type": kind, "object": object}).to_string() + "\n";
            let _ = self.events.send(Bytes::from(line));
        }
    }
}

fn selected(object: &Json, label: Option<&str>) -> bool {
    let Some(label) = label else { return true };
    // Only whether there is one.
    assert!(!label.contains(['=', ',', '!']), "{label}");
    object["metadata"]["labels"].get(label).is_some()
}

fn stripped(object: &Json) -> Json {
    json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": object["metadata"]})
}

fn stripped_all(json: Json) -> Json {
    match json.get("items").and_then(Json::as_array) {
        Some(items) => json!({
            "apiVersion": "meta.k8s.io/v1",
            "kind": "PartialObjectMetadataList",
            "metadata": json["metadata"],
            "items": items.iter().map(stripped).collect::<Vec<_>>(),
        }),
        None => stripped(&json),
    }
}

fn respond(code: u16, json: &Json) -> Response<Answer> {
    let bytes = Bytes::from(json.to_string());
    let body = StreamBody::new(stream::once(async { Ok(Frame::data(bytes)) }).boxed());
    Response::builder().status(code).header("content-type", "application/json").body(body).unwrap()
}

impl Target {
    fn of(uri: &http::Uri) -> Self {
        let mut parts: Vec<&str> = uri.path().split('/').filter(|p| !p.is_empty()).collect();
        let group = if parts[0] == "api" { 2 } else { 3 };
        let group_version = parts[1..group].join("/");
        parts.drain(..group);
        let mut namespace = String::new();
        if parts[0] == "namespaces" && parts.len() > 2 {
            namespace = parts[1].to_owned();
            parts.drain(..2);
        }
        let part = |i: usize| parts.get(i).map(|p| (*p).to_owned());
        let query = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        let decoded = |text: &str| text.replace("%2F", "/").replace("%3D", "=");
        let query = query.map(|(key, value)| (key.to_owned(), decoded(value))).collect();
        Self { resource: parts[0].to_owned(), namespace, name: part(1), part: part(2), query, group_version }
    }
}

impl State {
    pub(super) fn get(&self, resource: &str, name: &str) -> Option<&Json> {
        self.objects.get(&place(resource, name))
    }

    /// Names of the objects of a resource.
    pub(super) fn names(&self, resource: &str) -> Vec<String> {
        self.objects.keys().filter(|(r, _, _)| r == resource).map(|(_, _, name)| name.clone()).collect()
    }

    fn next_crash(&mut self) -> Option<Crash> {
        let n = self.asked;
        self.asked += 1;
        self.crash.filter(|crash| matches!(crash, Crash::Before(at) | Crash::After(at) if *at == n))
    }

    fn serve(&mut self, method: &Method, target: &Target, body: Json, content: &str) -> Result<Json, Refused> {
        let Some(name) = target.name.clone().or_else(|| body["metadata"]["name"].as_str().map(str::to_owned)) else {
            return Ok(self.list(target));
        };
        let place = (target.resource.clone(), target.namespace.clone(), name);
        let found = || Refused(404, "NotFound", format!("{} {} not found", place.0, place.2));
        let present = self.objects.get(&place).cloned();
        if method == Method::GET {
            return present.ok_or_else(found);
        }
        let done = match *method {
            Method::POST if present.is_some() => {
                return Err(Refused(409, "AlreadyExists", format!("{} {} already exists", place.0, place.2)));
            }
            Method::POST if self.terminating && place.1 == NAMESPACE => {
                return Err(Refused(403, "NamespaceTerminating", "the namespace is being terminated".to_owned()));
            }
            Method::POST => self.put(&place, None, typed(body, &target.group_version)),
            Method::PUT => {
                let present = present.ok_or_else(found)?;
                check_version(&present, &body)?;
                let mut next = present.clone();
                if target.part.as_deref() == Some("status") {
                    next["status"] = body["status"].clone();
                } else {
                    for (key, value) in body.as_object().cloned().unwrap_or_default() {
                        next[key] = value;
                    }
                }
                self.put(&place, Some(present), next)
            }
            Method::PATCH if content.contains("apply-patch") => {
                let before = self.applied.insert(place.clone(), body.clone()).unwrap_or(Json::Null);
                let mut next = present.clone().unwrap_or(json!({}));
                drop_applied(&mut next, &before, &body);
                merge(&mut next, &body, false);
                self.put(&place, present, next)
            }
            Method::PATCH => {
                let present = present.ok_or_else(found)?;
                check_version(&present, &body)?;
                let mut next = present.clone();
                merge(&mut next, &body, true);
                self.put(&place, Some(present), next)
            }
            Method::DELETE => {
                let present = present.ok_or_else(found)?;
                let uid = &body["preconditions"]["uid"];
                if !uid.is_null() && *uid != present["metadata"]["uid"] {
                    return Err(Refused(409, "Conflict", "another uid".to_owned()));
                }
                self.delete(&place);
                present
            }
            _ => return Err(Refused(405, "MethodNotAllowed", method.to_string())),
        };
        let part = target.part.as_ref().map(|p| format!("/{p}")).unwrap_or_default();
        self.writes.push(format!("{} {}{part} {}", method.as_str().to_lowercase(), place.0, place.2));
        Ok(done)
    }

    fn list(&self, target: &Target) -> Json {
        let label = target.query.get("labelSelector").map(String::as_str);
        let here = |(resource, namespace, _): &Place| {
            *resource == target.resource && (target.namespace.is_empty() || *namespace == target.namespace)
        };
        let items = self.objects.iter().filter(|(place, object)| here(place) && selected(object, label));
        let items: Vec<&Json> = items.map(|(_, object)| object).collect();
        json!({
            "apiVersion": target.group_version,
            "kind": "List",
            "metadata": {"resourceVersion": self.version.to_string()},
            "items": items,
        })
    }

    /// Stores an object, if it is another than before.
    pub(super) fn put(&mut self, place: &Place, before: Option<Json>, mut next: Json) -> Json {
        let meta = object(&mut next, "metadata");
        meta.insert("namespace".to_owned(), place.1.clone().into());
        meta.insert("name".to_owned(), place.2.clone().into());
        if let Some(before) = &before {
            for fixed in ["uid", "creationTimestamp", "generation", "resourceVersion", "deletionTimestamp"] {
                match before["metadata"].get(fixed) {
                    Some(value) => drop(meta.insert(fixed.to_owned(), value.clone())),
                    None => drop(meta.remove(fixed)),
                }
            }
            if *before == next {
                return next;
            }
            if before["spec"] != next["spec"] {
                let generation = before["metadata"]["generation"].as_i64().unwrap_or(1);
                next["metadata"]["generation"] = (generation + 1).into();
            }
        } else {
            self.uids += 1;
            meta.insert("uid".to_owned(), format!("uid-{}", self.uids).into());
            meta.insert("generation".to_owned(), 1.into());
            meta.insert("creationTimestamp".to_owned(), "2026-11-21T10:00:00Z".into());
        }
        self.version += 1;
        next["metadata"]["resourceVersion"] = self.version.to_string().into();
        let leaves = next["metadata"].get("deletionTimestamp").is_some();
        if leaves && next["metadata"]["finalizers"].as_array().is_none_or(Vec::is_empty) {
            self.remove(place, next.clone());
            return next;
        }
        let kind = if before.is_some() { "MODIFIED" } else { "ADDED" };
        self.objects.insert(place.clone(), next.clone());
        self.happened(place, kind, next.clone());
        next
    }

    /// Deletes an object, or marks it to be.
    pub(super) fn delete(&mut self, place: &Place) {
        let Some(mut object) = self.objects.get(place).cloned() else { return };
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        if object["metadata"]["finalizers"].as_array().is_none_or(Vec::is_empty) {
            return self.remove(place, object);
        }
        if object["metadata"].get("deletionTimestamp").is_none() {
            object["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z".into();
            self.objects.insert(place.clone(), object.clone());
            self.happened(place, "MODIFIED", object);
        }
    }

    fn remove(&mut self, place: &Place, object: Json) {
        self.objects.remove(place);
        self.applied.remove(place);
        let uid = object["metadata"]["uid"].clone();
        self.happened(place, "DELETED", object);
        let owned = |object: &Json| {
            object["metadata"]["ownerReferences"].as_array().into_iter().flatten().any(|owner| owner["uid"] == uid)
        };
        let others: Vec<Place> = self.objects.iter().filter(|(_, o)| owned(o)).map(|(p, _)| p.clone()).collect();
        others.iter().for_each(|other| self.delete(other));
    }

    fn happened(&mut self, place: &Place, kind: &'static str, object: Json) {
        self.watchers.retain(|w| !w.events.is_closed());
        self.watchers.iter().for_each(|w| w.tell(&place.0, &place.1, kind, &object));
        self.history.push((self.version, place.0.clone(), place.1.clone(), kind, object));
    }
}

/// An object of the namespace that tests use.
pub(super) fn place(resource: &str, name: &str) -> Place {
    (resource.to_owned(), NAMESPACE.to_owned(), name.to_owned())
}

fn object<'a>(json: &'a mut Json, field: &str) -> &'a mut Map<String, Json> {
    if !json[field].is_object() {
        json[field] = json!({});
    }
    json[field].as_object_mut().unwrap()
}

/// As the server keeps it.
fn typed(mut body: Json, group_version: &str) -> Json {
    body["apiVersion"] = group_version.into();
    if let Some(texts) = body.as_object_mut().unwrap().remove("stringData") {
        let texts: BTreeMap<String, String> = serde_json::from_value(texts).unwrap();
        let data = texts.into_iter().map(|(key, text)| (key, k8s_openapi::ByteString(text.into_bytes())));
        body["data"] = serde_json::to_value(data.collect::<BTreeMap<_, _>>()).unwrap();
    }
    body
}

fn check_version(present: &Json, body: &Json) -> Result<(), Refused> {
    let version = &body["metadata"]["resourceVersion"];
    if version.is_null() || *version == present["metadata"]["resourceVersion"] {
        return Ok(());
    }
    Err(Refused(409, "Conflict", "the object has been modified".to_owned()))
}

/// Merges maps; in a merge patch null removes.
fn merge(into: &mut Json, from: &Json, nulls_remove: bool) {
    let Some(fields) = from.as_object() else {
        *into = from.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, value) in fields {
        if nulls_remove && value.is_null() {
            into.as_object_mut().unwrap().remove(key);
        } else {
            merge(&mut into[key], value, nulls_remove);
        }
    }
}

/// Takes out what was applied before, and is not any more.
fn drop_applied(object: &mut Json, before: &Json, now: &Json) {
    let (Some(fields), Some(before)) = (object.as_object_mut(), before.as_object()) else { return };
    for (key, value) in before {
        match now.get(key) {
            None => drop(fields.remove(key)),
            Some(now) => {
                if let Some(field) = fields.get_mut(key) {
                    drop_applied(field, value, now);
                }
            }
        }
    }
}

impl tower::Service<Request<Body>> for Server {
    type Response = Response<Answer>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        self.clone().answer(request).map(Ok).boxed()
    }
}
