//! Listens on a job's socket for as long as the job runs. A job whose socket can't be made runs on without.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::PermissionsExt,
    time::Duration,
};

use axum::Router;
use floodmark_snapshot::Env;
use futures::{StreamExt, stream::FuturesUnordered};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
};

use super::Place;

/// Connections served at the same time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 32;
/// From one look at whether another process still has the socket to the next.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// How long the answers to the last requests may take once the job has ended.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// How long a connection may take to say what it wants.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
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
    let mut connections = FuturesUnordered::new();
    loop {
        tokio::select! {
            biased;
            () = turned(&mut ended) => break,
            Some(()) = connections.next(), if !connections.is_empty() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, _)) => connections.push(answer(router.clone(), stream)),
                Err(error) => {
                    tracing::warn!(%error, "accept a connection on the job's socket");
                    env.runtime.sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    // Before the lock goes back: nobody else's socket is removed.
    let _ = fs::remove_file(place.socket());
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
async fn answer(router: Router, stream: UnixStream) {
    let mut http = http1::Builder::new();
    // Half-closed connections stay: a request is carried out although its asker has gone.
    http.keep_alive(false).half_close(true).timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await {
        tracing::debug!(%error, "a connection on the job's socket broke off");
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
