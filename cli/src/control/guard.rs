//! Who may change a job over TCP: whoever has the token that is in a file. Reads are open to all who reach the socket.
//!
//! Invariants: without a token nothing is changed; the token is compared in constant time, and never logged.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Extension, Router,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::Response,
};
use floodmark_snapshot::Env;
use floodmark_worker::api::refuse;
use subtle::ConstantTimeEq;
use tokio::sync::watch;

use crate::args::HttpArgs;

/// A file above this is taken for a mistake, bytes.
const TOKEN_MAX: u64 = 4096;

/// Whether a connection has been trusted with a change: then it may last.
#[derive(Clone, Default)]
pub(super) struct Trusted(Arc<AtomicBool>);

impl Trusted {
    pub(super) fn is(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Lets everybody read, and only those change something who have the token in the file that the arguments name. It is read anew
/// for each, so that it can be replaced while the job runs.
pub(crate) fn guarded(router: Router, args: &HttpArgs, env: &Env) -> Router {
    let guarding = Guard { file: args.http_token_file.clone(), env: env.clone() };
    router.layer(from_fn_with_state(Arc::new(guarding), guard))
}

/// Lets nobody change anything as long as another process runs the job.
pub(crate) fn while_leading(router: Router, leads: watch::Receiver<bool>) -> Router {
    router.layer(from_fn_with_state(leads, changes_while_leading))
}

async fn changes_while_leading(State(leads): State<watch::Receiver<bool>>, request: Request, next: Next) -> Response {
    if !*leads.borrow() && !matches!(*request.method(), Method::GET | Method::HEAD) {
        let message = "this process stands by for another, which runs the job: ask that one";
        return refuse(StatusCode::SERVICE_UNAVAILABLE, message);
    }
    next.run(request).await
}

struct Guard {
    file: Option<PathBuf>,
    env: Env,
}

async fn guard(
    State(guard): State<Arc<Guard>>,
    Extension(trusted): Extension<Trusted>,
    request: Request,
    next: Next,
) -> Response {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        if let Err(refused) = guard.admit(request.headers()).await {
            return refused;
        }
        trusted.0.store(true, Ordering::Relaxed);
    }
    next.run(request).await
}

impl Guard {
    async fn admit(&self, headers: &HeaderMap) -> Result<(), Response> {
        let Some(file) = self.file.clone() else {
            let message = "nothing can be changed over TCP, because this process was started without --http-token-file: \
                           give it a file with a token, or ask through the job's Unix socket (floodmark savepoint, \
                           rescale, status)";
            return Err(refuse(StatusCode::FORBIDDEN, message));
        };
        let Some(theirs) = bearer(headers) else {
            return Err(unauthorized("a change needs the header 'Authorization: Bearer TOKEN'"));
        };
        let path = file.clone();
        let ours = self.env.blocking("reading the token", move || token(&path)).await;
        let ours = ours.map_err(|e| e.to_string()).and_then(|read| read.map_err(|e| e.to_string()));
        let ours = ours.map_err(|error| {
            tracing::warn!(file = %file.display(), %error, "a change over TCP is refused: the token can't be read");
            let message = "the token of this process can't be read, so nothing can be changed: see its log";
            refuse(StatusCode::INTERNAL_SERVER_ERROR, message)
        })?;
        if bool::from(theirs.as_bytes().ct_eq(ours.as_bytes())) {
            return Ok(());
        }
        Err(unauthorized("the token is not the one that this process was given"))
    }
}

/// The token that somebody shows.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn unauthorized(error: &str) -> Response {
    let mut refused = refuse(StatusCode::UNAUTHORIZED, error);
    refused.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    refused
}

/// The token in a file: what it holds, without space around it.
///
/// # Errors
/// When it can't be read, or holds nothing that could be sent as a token.
pub(crate) fn token(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(file)?.take(TOKEN_MAX + 1).read_to_string(&mut text)?;
    if read as u64 > TOKEN_MAX {
        return Err(io::Error::other(format!("it is longer than {TOKEN_MAX} bytes")));
    }
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(io::Error::other("it does not hold a token: one word of visible ASCII characters"));
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use axum::{
        body::Body,
        routing::{get, post},
    };
    use tower::ServiceExt;

    use super::*;

    async fn status(file: Option<&Path>, method: &str, authorization: Option<&str>) -> u16 {
        let router = Router::new().route("/", get(async || "told").merge(post(async || "changed")));
        let args = HttpArgs { listen_http: None, http_token_file: file.map(Path::to_owned) };
        let router = guarded(router, &args, &Env::system()).layer(Extension(Trusted::default()));
        let request = Request::builder().method(method).uri("/");
        let request = authorization.into_iter().fold(request, |r, a| r.header("authorization", a));
        let answer = router.oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let status = answer.status().as_u16();
        assert_eq!(status == 401, answer.headers().contains_key("www-authenticate"));
        status
    }

    #[tokio::test]
    async fn reads_are_open_and_changes_need_the_token() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, " geheim-1\n").unwrap();
        for method in ["GET", "HEAD"] {
            assert_eq!(status(None, method, None).await, 200);
            assert_eq!(status(Some(&file), method, None).await, 200);
        }
        assert_eq!(status(None, "POST", Some("Bearer geheim-1")).await, 403);
        for wrong in [
            None,
            Some("geheim-1"),
            Some("Basic geheim-1"),
            Some("Bearer geheim-2"),
            Some("Bearer geheim-11"),
            Some("Bearer "),
        ] {
            assert_eq!(status(Some(&file), "POST", wrong).await, 401, "{wrong:?}");
            assert_eq!(status(Some(&file), "DELETE", wrong).await, 401, "{wrong:?}");
        }
        assert_eq!(status(Some(&file), "POST", Some("Bearer geheim-1")).await, 200);
        assert_eq!(status(Some(&file), "POST", Some("bearer  geheim-1")).await, 200);
        // It is replaced while the process runs.
        std::fs::write(&file, "geheim-2").unwrap();
        assert_eq!(status(Some(&file), "POST", Some("Bearer geheim-1")).await, 401);
        assert_eq!(status(Some(&file), "POST", Some("Bearer geheim-2")).await, 200);
        for unusable in ["", " \n", "two words", "ü", &"x".repeat(5_000)] {
            std::fs::write(&file, unusable).unwrap();
            assert_eq!(status(Some(&file), "POST", Some(&format!("Bearer {}", "x".repeat(5_000)))).await, 500);
            assert_eq!(status(Some(&file), "POST", Some("Bearer ")).await, 500, "an empty token lets nobody in");
        }
        std::fs::remove_file(&file).unwrap();
        assert_eq!(status(Some(&file), "POST", Some("Bearer geheim-2")).await, 500);
    }
}
