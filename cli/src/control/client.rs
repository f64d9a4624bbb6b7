//! Asks a job that runs in another process.

use std::io;

use floodmark_snapshot::JobId;
use floodmark_worker::api::ErrorView;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, body::Bytes, client::conn::http1, header::CONTENT_TYPE};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::Place;
use crate::exit::{Exit, Failure};

/// Longest answer that is believed, bytes.
const ANSWER_MAX: usize = 1 << 20;

/// What comes of a question.
#[derive(Debug)]
pub(crate) enum Answer<T> {
    /// The answer.
    Is(T),
    /// The job refuses, and says why.
    Refused(String),
    /// No process of this user on this machine runs the job.
    NobodyListens,
}

/// Says that a job can't be asked, and what to do (`then`).
pub(crate) fn nobody_listens(job: &JobId, storage: &str, then: &str) -> Failure {
    let message = format!("no process of yours on this machine runs job {job} with its snapshots in {storage}; {then}");
    Failure::new(Exit::JobFailed, message)
}

/// Asks the job at `place`, and waits for the answer as long as it takes.
pub(crate) async fn ask<B: Serialize, T: DeserializeOwned>(
    place: &Place,
    method: &str,
    path: &str,
    body: Option<&B>,
) -> Result<Answer<T>, Failure> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Failure::new(Exit::JobFailed, format!("{what} the job's process (at {}): {error}", place.socket().display()))
    };
    let stream = match UnixStream::connect(place.socket()).await {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(Answer::NobodyListens);
        }
        Err(error) => return Err(failed("reach", &error)),
    };
    let body = body.map(serde_json::to_vec).transpose().map_err(|e| failed("write a request to", &e))?;
    let request = Request::builder().method(method).uri(path).header(CONTENT_TYPE, "application/json");
    let request = request.body(Full::new(Bytes::from(body.unwrap_or_default())));
    let request = request.map_err(|e| failed("write a request to", &e))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| failed("reach", &e))?;
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(|e| failed("lost", &e))?;
        let status = answer.status();
        let bytes = Limited::new(answer.into_body(), ANSWER_MAX).collect().await.map_err(|e| failed("lost", &e))?;
        Ok((status, bytes.to_bytes()))
    };
    tokio::pin!(exchange);
    let (status, bytes) = tokio::select! {
        answer = &mut exchange => answer,
        // What has come by then is still to be read.
        _ = connection => exchange.await,
    }?;
    if status.is_success() {
        let answer = serde_json::from_slice(&bytes).map_err(|e| failed("understand", &e))?;
        return Ok(Answer::Is(answer));
    }
    let refused = serde_json::from_slice::<ErrorView>(&bytes).map_or_else(|_| format!("status {status}"), |e| e.error);
    Ok(Answer::Refused(refused))
}
