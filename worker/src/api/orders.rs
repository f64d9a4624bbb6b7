//! What changes a job: savepoints, another parallelism, a stop. Each order goes to the loop that runs the job, and the answer
//! comes from there.
//!
//! Invariant: what can't be carried out is refused before anything of it is.

use std::sync::Arc;

use axum::{
    Json,
    extract::{State, rejection::JsonRejection},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use floodmark_snapshot::{coordination::BarrierKind, log::JobFolder, savepoint};
use tokio::sync::oneshot;

use super::{
    JobApi, refuse,
    views::{RescaleOrder, RescaledView, SavepointOrder, SavepointView, StopOrder, StopView, Then},
};
use crate::{RescaleRequest, SavepointRequest};

type Asked = State<Arc<JobApi>>;
type Body<T> = Result<T, JsonRejection>;

pub(super) async fn take_savepoint(
    State(api): Asked,
    order: Body<Json<SavepointOrder>>,
) -> Result<Json<SavepointView>, Response> {
    let Json(order) = order.map_err(|e| unread(&e))?;
    savepoint_of(&api, order).await.map(Json)
}

async fn savepoint_of(api: &JobApi, order: SavepointOrder) -> Result<SavepointView, Response> {
    let SavepointOrder { name, then } = order;
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
    Ok(SavepointView { location: made.location, epoch: made.epoch, size: made.size })
}

pub(super) async fn rescale(
    State(api): Asked,
    order: Body<Json<RescaleOrder>>,
) -> Result<Json<RescaledView>, Response> {
    let Json(RescaleOrder { parallelism }) = order.map_err(|e| unread(&e))?;
    let max = u32::from(api.max_parallelism);
    if !(1..=max).contains(&parallelism) {
        let message = format!(
            "parallelism {parallelism} can't be: it is at least 1 and at most {max}, which is this job's maxParallelism"
        );
        return Err(refuse(StatusCode::BAD_REQUEST, &message));
    }
    let ended = || refuse(StatusCode::SERVICE_UNAVAILABLE, "the job ended before it was rescaled");
    let (reply, answer) = oneshot::channel();
    api.requests.rescales.send(RescaleRequest { parallelism, reply }).await.map_err(|_| ended())?;
    let done = answer.await.map_err(|_| ended())?.map_err(|reason| refuse(StatusCode::CONFLICT, &reason))?;
    Ok(Json(RescaledView { from: done.from, to: done.to, epoch: done.epoch }))
}

pub(super) async fn stop(State(api): Asked, order: Body<Option<Json<StopOrder>>>) -> Result<Response, Response> {
    let StopOrder { savepoint, drain } = order.map_err(|e| unread(&e))?.map(|Json(order)| order).unwrap_or_default();
    match savepoint {
        Some(name) => {
            let then = if drain { Then::Drain } else { Then::Stop };
            let made = savepoint_of(&api, SavepointOrder { name, then }).await?;
            Ok(Json(StopView { savepoint: Some(made) }).into_response())
        }
        None if drain => {
            let message =
                "a job drains with a savepoint only: name it, as in {\"savepoint\": \"last\", \"drain\": true}";
            Err(refuse(StatusCode::BAD_REQUEST, message))
        }
        None if api.requests.savepoints.is_closed() => {
            Err(refuse(StatusCode::SERVICE_UNAVAILABLE, "the job has ended already"))
        }
        None => {
            tracing::info!("asked to stop");
            api.stop.send_replace(true);
            Ok((StatusCode::ACCEPTED, Json(StopView { savepoint: None })).into_response())
        }
    }
}

fn unread(rejection: &JsonRejection) -> Response {
    refuse(rejection.status(), &rejection.body_text())
}
