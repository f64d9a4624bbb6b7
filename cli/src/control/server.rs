//! Answers who asks a job, on its Unix socket and over TCP, for as long as the job runs. A job whose socket can't be made runs
//! on without.
//!
//! Invariant: connections are bounded in number, and each in what it sends before it is answered.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::PermissionsExt,
    time::Duration,
};

use axum::{Extension, Router};
use floodmark_snapshot::Env;
use futures::{StreamExt, stream::FuturesUnordered};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::watch,
};

use super::{Place, guard::Trusted};

/// Connections served at the same time on one socket; more wait to be accepted.
const CONNECTIONS_MAX: usize = 32;
/// From one look at whether another process still has the socket to the next.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// How long the answers to the last requests may take once the job has ended.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// How long a connection may take to say what it wants.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection over TCP may last that is not trusted with a change.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a request's head.
const HEAD_MAX: usize = 16 << 10;
/// Lines of a request's head.
const HEADERS_MAX: usize = 64;
/// After a failed accept (too many open files): the next would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves `router` at `place` until `ended` turns true, and then until the last answers are out.
pub(crate) async fn serve(router: Router, place: &Place, env: &Env, mut ended: watch::Receiver<bool>) {
    let listen = async {
        let mut told = false;
        loop {
            match Listening::start(place) {
                Ok(Some(listening)) => return Some(listening),
                Ok(None) if !told => {
                    tracing::warn!(
                        "another process on this machine runs this job: it is the one that answers floodmark savepoint"
                    );
                    told = true;
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(socket = %place.socket().display(), %error, "floodmark savepoint can't reach this job");
                    return None;
                }
            }
            env.runtime.sleep(TRY_AGAIN).await;
        }
    };
    let listening = tokio::select! {
        biased;
        () = turned(&mut ended) => return,
        listening = listen => listening,
    };
    let Some(Listening { listener, place, _lock }) = listening else { return };
    // Before the lock goes back: nobody else's socket is removed.
    let end = || drop(fs::remove_file(place.socket()));
    answer_all(listener, &router, env, ended, end).await;
}

/// Serves `router` to whoever connects to `listener`, if there is one, until `ended` turns true, and then until the last answers
/// are out. It lets through whatever the router does: see [`super::guarded`].
pub(crate) async fn serve_tcp(router: Router, listener: Option<TcpListener>, env: &Env, ended: watch::Receiver<bool>) {
    if let Some(listener) = listener {
        answer_all(listener, &router, env, ended, || {}).await;
    }
}

/// Where connections come from.
trait Accept {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin;

    /// How long one may last that is not trusted with a change.
    const TIMEOUT: Option<Duration>;

    /// The next.
    async fn accept(&self) -> io::Result<Self::Stream>;
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    /// Who may open the socket is trusted.
    const TIMEOUT: Option<Duration> = None;

    async fn accept(&self) -> io::Result<UnixStream> {
        Self::accept(self).await.map(|(stream, _)| stream)
    }
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    const TIMEOUT: Option<Duration> = Some(CONNECTION_TIMEOUT);

    async fn accept(&self) -> io::Result<TcpStream> {
        Self::accept(self).await.map(|(stream, _)| stream)
    }
}

async fn answer_all<A: Accept>(
    listener: A,
    router: &Router,
    env: &Env,
    mut ended: watch::Receiver<bool>,
    end: impl FnOnce(),
) {
    let mut connections = FuturesUnordered::new();
    loop {
        tokio::select! {
            biased;
            () = turned(&mut ended) => break,
            Some(()) = connections.next(), if !connections.is_empty() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok(stream) => connections.push(answer(router.clone(), stream, A::TIMEOUT, env)),
                Err(error) => {
                    tracing::warn!(%error, "accept a connection of somebody who asks the job");
                    env.runtime.sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    end();
    drop(listener);
    tokio::select! {
        biased;
        () = async { while connections.next().await.is_some() {} } => {}
        () = env.runtime.sleep(LAST_ANSWERS) => {}
    }
}

/// Returns when the job has ended. A sender that is gone has ended too.
async fn turned(ended: &mut watch::Receiver<bool>) {
    let _ = ended.wait_for(|e| *e).await;
}

/// Answers one request. A client that breaks off has had its answer, or wants none.
async fn answer(router: Router, stream: impl AsyncRead + AsyncWrite + Unpin, timeout: Option<Duration>, env: &Env) {
    let trusted = Trusted::default();
    let router = router.layer(Extension(trusted.clone()));
    let mut http = http1::Builder::new();
    // Half-closed connections stay: a request is carried out although its asker has gone.
    http.keep_alive(false).half_close(true).timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    http.max_buf_size(HEAD_MAX).max_headers(HEADERS_MAX);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    let out_of_time = async {
        match timeout {
            Some(timeout) => env.runtime.sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let served = tokio::select! {
        biased;
        served = &mut connection => served,
        () = out_of_time => {
            if !trusted.is() {
                return tracing::debug!("a connection of somebody who asks the job took too long");
            }
            // A change takes as long as it takes.
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection of somebody who asks the job broke off");
    }
}

/// A socket, and the lock that makes it this process's.
struct Listening<'a> {
    listener: UnixListener,
    place: &'a Place,
    _lock: File,
}

impl<'a> Listening<'a> {
    /// `None` if another process listens there.
    fn start(place: &'a Place) -> io::Result<Option<Self>> {
        place.prepare()?;
        let lock = File::options().create(true).write(true).truncate(false).open(place.lock())?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let socket = place.socket();
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(&socket)?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o600))?;
        Ok(Some(Self { listener, place, _lock: lock }))
    }
}
