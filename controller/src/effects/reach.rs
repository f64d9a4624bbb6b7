//! Reaches what is outside of the cluster's API: coordinators over HTTP, storage with the credentials of the job.
//!
//! What this process can't see it does not judge: a folder that only the job's pods have, a bucket that only they may read. There the
//! SQL is planned, and the rest is left to the job itself.

use std::{
    collections::VecDeque,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use floodmark_admission::{
    Extent, Planned, Removal, RequestError, StorageError, Verdict, Wanted, check_state, job_id, remove_job,
    remove_savepoint, savepoint,
};
use floodmark_crds::StreamJob;
use floodmark_snapshot::{
    Env,
    restore::Reference,
    storage::{self, Storage},
};
use futures::future::{Either, select};
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::Value as Json;
use tokio::net::TcpStream;

use super::outside::{Access, Order, Outside, Removed, Reply, SavepointFound};
use crate::{lifecycle::Answer, objects::MANAGER, revision};

/// Plans that are remembered: an answer that nobody knew is asked for again.
const PLANS_MAX: usize = 16;
/// How long a coordinator may take to accept a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Longest answer of a coordinator that is believed, bytes.
const ANSWER_MAX: usize = 1 << 20;
/// Steps of a removal in one call. Each removes some hundreds of files.
const STEPS_MAX: usize = 20;

/// See the header of this file.
pub struct Reach {
    env: Env,
    plans: Mutex<VecDeque<Plan>>,
}

/// What was planned, and what came of it: a plan, or why there is none.
type Plan = (String, Result<Arc<Planned>, String>);

/// A storage, as far as this process can see it.
enum Place {
    Open(Arc<dyn Storage>),
    /// It can't look inside: why.
    Hidden(String),
}

impl Reach {
    /// Reaches out from this process.
    #[must_use]
    pub fn new(env: Env) -> Self {
        Self { env, plans: Mutex::default() }
    }

    /// Plans a job off the caller's loop; why not, if it can't be.
    async fn plan(&self, job: &StreamJob) -> Result<Arc<Planned>, String> {
        let uid = job.metadata.uid.as_deref().unwrap_or_default();
        let restore_from = job.spec.restore.from.as_deref().unwrap_or_default();
        let parallelism = job.spec.parallelism;
        let key = format!("{uid} {} {parallelism} {restore_from}", revision::name(&job.spec));
        let known = self.plans().iter().find(|(k, _)| *k == key).map(|(_, planned)| planned.clone());
        if let Some(planned) = known {
            return planned;
        }
        let of = job.clone();
        let planned = self.env.blocking("planning a job", move || Planned::of(&of)).await;
        let planned = match planned {
            Ok(Ok(planned)) => Ok(Arc::new(planned)),
            Ok(Err(refused)) => Err(refused.to_string()),
            Err(panicked) => return Err(panicked.to_string()),
        };
        let mut plans = self.plans();
        if plans.len() >= PLANS_MAX {
            plans.pop_front();
        }
        plans.push_back((key, planned.clone()));
        planned
    }

    fn plans(&self) -> MutexGuard<'_, VecDeque<Plan>> {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens a storage, if this process can see it at all.
fn place(access: &Access) -> Result<Place, StorageError> {
    let hidden = |why: &str| Ok(Place::Hidden(why.to_owned()));
    let Some(location) = &access.location else {
        return hidden("the job keeps its checkpoints in its pods (spec.checkpoints.storage is not given)");
    };
    let local = location.strip_prefix("file://").unwrap_or(location);
    let opened = if location.starts_with("memory:") {
        return hidden("the job keeps its checkpoints in memory");
    } else if !local.contains("://") {
        if !Path::new(local).is_dir() {
            return hidden("the job keeps its checkpoints in a folder that only its pods can see");
        }
        storage::open_existing(location)
    } else if let Some(credentials) = &access.credentials {
        storage::open_with(location, credentials)
    } else {
        // Its own, if it has any, are not for whoever may write StreamJobs.
        return hidden("the controller has no credentials for it (spec.checkpoints.credentials names none)");
    };
    opened.map(Place::Open).map_err(StorageError)
}

/// Whether a snapshot that is named lies where this process may look with the job's credentials. A folder is perhaps one of the pods.
fn is_seen(reference: Option<&Reference>, storage: &Arc<dyn Storage>) -> bool {
    match reference {
        Some(Reference::Location(location)) => {
            let inside = location.strip_prefix(&storage.describe()).is_some_and(|rest| rest.starts_with('/'));
            inside || location.starts_with("s3://")
        }
        _ => true,
    }
}

#[async_trait]
impl Outside for Reach {
    async fn fits(&self, job: &StreamJob, restore: &str, access: &Access) -> Answer {
        let planned = match self.plan(job).await {
            Ok(planned) => planned,
            Err(why) => return Answer::No(why),
        };
        let words = restore.parse::<Reference>().map_err(|e| e.to_string());
        let (restore, initial) = match (words, planned.initial()) {
            (Ok(restore), Ok(initial)) => (restore, initial),
            (Err(why), _) => return Answer::No(why),
            (_, Err(why)) => return Answer::No(why.to_string()),
        };
        let storage = match place(access) {
            Ok(Place::Open(storage)) => storage,
            Ok(Place::Hidden(_)) => return Answer::Yes,
            Err(error) => return unknown(&error),
        };
        if !is_seen(Some(&restore), &storage) || !is_seen(initial.as_ref(), &storage) {
            return Answer::Yes;
        }
        match check_state(&planned, &storage, &Wanted::Start { restore, initial }).await {
            Ok(Verdict::Admitted(_)) => Answer::Yes,
            Ok(Verdict::Refused(refusal)) => Answer::No(refusal.reason),
            Err(error) => unknown(&error),
        }
    }

    async fn savepoint(&self, job: &StreamJob, name: &str, access: &Access) -> Result<Option<SavepointFound>, String> {
        let storage = match place(access) {
            Ok(Place::Open(storage)) => storage,
            Ok(Place::Hidden(why)) => return Err(why),
            Err(error) => return Err(error.to_string()),
        };
        let found = savepoint(&job_id(job), &storage, name).await.map_err(|e| e.to_string())?;
        Ok(found.map(|s| SavepointFound {
            location: s.location,
            epoch: s.epoch.0,
            size: s.size,
            created_at_ms: s.created_at_ms,
        }))
    }

    async fn remove_state(&self, job: &StreamJob, access: &Access) -> Removed {
        self.remove(job, None, access).await
    }

    async fn remove_savepoint(&self, job: &StreamJob, name: &str, access: &Access) -> Removed {
        self.remove(job, Some(name), access).await
    }

    async fn order(&self, order: Order) -> Reply {
        let (to, path, within) = (order.to.clone(), order.path, order.within);
        let asked = std::pin::pin!(self.exchange(order));
        match select(asked, self.env.runtime.sleep(within)).await {
            Either::Left((reply, _)) => reply,
            Either::Right(_) => {
                Reply::Lost(format!("the coordinator at {to} has not answered {path} within {within:?}"))
            }
        }
    }
}

impl Reach {
    /// Removes a savepoint of a job, or all that is no savepoint, step by step.
    async fn remove(&self, job: &StreamJob, name: Option<&str>, access: &Access) -> Removed {
        let storage = match place(access) {
            Ok(Place::Open(storage)) => storage,
            Ok(Place::Hidden(why)) => return Removed::OutOfReach(why),
            Err(error) => return not_removed(&error),
        };
        let (id, extent) = (job_id(job), Extent::AllButSavepoints);
        let mut removed = 0;
        for _ in 0..STEPS_MAX {
            let step = match name {
                Some(name) => remove_savepoint(&id, &storage, name).await,
                None => remove_job(&id, &storage, &self.env, MANAGER, extent).await.map_err(RequestError::Storage),
            };
            match step {
                Ok(Removal::Done { .. }) => return Removed::All,
                Ok(Removal::More { files }) => removed += files,
                Err(RequestError::Refused(why)) => return Removed::Refused(why),
                Err(RequestError::Storage(error)) => return not_removed(&error),
            }
        }
        Removed::NotYet(format!("{removed} files are removed so far"))
    }

    async fn exchange(&self, order: Order) -> Reply {
        let Order { to, token, path, body, .. } = order;
        let lost =
            |what: &str, why: &dyn std::fmt::Display| Reply::Lost(format!("{what} the coordinator at {to}: {why}"));
        let connect = std::pin::pin!(TcpStream::connect(&to));
        let stream = match select(connect, self.env.runtime.sleep(CONNECT_WITHIN)).await {
            Either::Left((Ok(stream), _)) => stream,
            Either::Left((Err(error), _)) => return lost("reach", &error),
            Either::Right(_) => return lost("reach", &format_args!("no connection within {CONNECT_WITHIN:?}")),
        };
        let request = Request::post(path)
            .header(header::HOST, &to)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .body(Full::new(Bytes::from(body.to_string())));
        let request = match request {
            Ok(request) => request,
            // The error does not hold the token.
            Err(error) => return lost("write to", &error),
        };
        let (mut sender, connection) = match http1::handshake(TokioIo::new(stream)).await {
            Ok(both) => both,
            Err(error) => return lost("reach", &error),
        };
        let exchange = async {
            let answer = sender.send_request(request).await.map_err(|e| e.to_string())?;
            let status = answer.status();
            let bytes = Limited::new(answer.into_body(), ANSWER_MAX).collect().await.map_err(|e| e.to_string())?;
            Ok::<_, String>((status, bytes.to_bytes()))
        };
        let exchange = std::pin::pin!(exchange);
        let answered = match select(exchange, connection).await {
            Either::Left((answered, _)) => answered,
            // What has come by then is still to be read.
            Either::Right((_, exchange)) => exchange.await,
        };
        match answered {
            Ok((status, bytes)) => understood(status, &bytes),
            Err(why) => lost("hear from", &why),
        }
    }
}

/// What a coordinator's answer comes to: see the worker's interface for the codes.
fn understood(status: StatusCode, bytes: &[u8]) -> Reply {
    let body: Json = serde_json::from_slice(bytes).unwrap_or(Json::Null);
    if status.is_success() {
        return Reply::Done(body);
    }
    let why = body.get("error").and_then(Json::as_str).map_or_else(|| format!("status {status}"), str::to_owned);
    match status {
        // The job refuses what it was asked.
        StatusCode::BAD_REQUEST | StatusCode::CONFLICT | StatusCode::UNPROCESSABLE_ENTITY => Reply::Refused(why),
        // It has ended, or something is in the way.
        _ => Reply::Lost(why),
    }
}

fn not_removed(error: &StorageError) -> Removed {
    let why = error.to_string();
    if error.may_pass() { Removed::NotYet(why) } else { Removed::Refused(why) }
}

fn unknown(error: &StorageError) -> Answer {
    Answer::Unknown(error.to_string())
}
