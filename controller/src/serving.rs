//! What the controller answers over HTTP: whether it lives, whether it is ready, and what it counts.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;

use crate::metrics::{self, Metrics};

/// What is answered about.
#[derive(Clone)]
pub struct Told {
    /// Whether it can be relied on: it stands by, or has seen all there is.
    pub is_ready: Arc<dyn Fn() -> bool + Send + Sync>,
    /// Is called before its counts are told.
    pub before_metrics: Arc<dyn Fn() + Send + Sync>,
    /// What it counts.
    pub metrics: Arc<Metrics>,
}

/// Answers `GET /healthz`, `/readyz` and `/metrics`.
pub fn router(told: Told) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(counts))
        .with_state(told)
}

/// The same, at an address, until it is dropped.
///
/// # Errors
/// When the address can't be had.
pub async fn serve(at: SocketAddr, told: Told) -> std::io::Result<()> {
    let listener = TcpListener::bind(at).await?;
    axum::serve(listener, router(told)).await
}

async fn ready(State(told): State<Told>) -> Response {
    if (told.is_ready)() {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not all objects are seen yet\n").into_response()
    }
}

async fn counts(State(told): State<Told>) -> Response {
    (told.before_metrics)();
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], told.metrics.exposition() + &metrics::process()).into_response()
}
