//! How a job that runs is reached: by this user's processes on this machine through a Unix socket per job and storage, in a
//! folder that nobody else may enter; by others over TCP, if the job was told to listen there, with a [`guard`] before whatever
//! changes something. What can be asked is [`floodmark_worker::api`].
//!
//! Invariant: at most one process at a time listens for a job; it holds the lock file beside the socket, which the system
//! gives back however the process ends.

mod client;
mod guard;
mod server;

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::PathBuf,
};

use floodmark_snapshot::JobId;
use nix::unistd::geteuid;
use tokio::net::TcpListener;
use xxhash_rust::xxh3::xxh3_64;

pub(crate) use self::{
    client::{Answer, ask, nobody_listens},
    guard::{guarded, while_leading},
    server::{serve, serve_tcp},
};
use crate::{
    args::HttpArgs,
    exit::{Exit, Failure},
};

/// Listens where the arguments say, if they do. Within a runtime.
///
/// # Errors
/// When it can't listen there, or the token can't be read.
pub(crate) async fn listen(args: &HttpArgs) -> Result<Option<TcpListener>, Failure> {
    let Some(address) = &args.listen_http else { return Ok(None) };
    if let Some(file) = &args.http_token_file {
        let unread = |e: io::Error| Failure::input(format!("--http-token-file {}: {e}", file.display()));
        guard::token(file).map_err(unread)?;
    }
    let failed = |e: io::Error| Failure::new(Exit::JobFailed, format!("--listen-http {address}: {e}"));
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let at = listener.local_addr().map_err(failed)?;
    tracing::info!("answering HTTP at http://{at}");
    Ok(Some(listener))
}

/// Where a job's process listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    folder: PathBuf,
    name: String,
}

impl Place {
    /// The place of a job whose snapshots are at `storage`.
    pub(crate) fn of(job: &JobId, storage: &str) -> Self {
        let storage = fs::canonicalize(storage.strip_prefix("file://").unwrap_or(storage))
            .map_or_else(|_| storage.to_owned(), |path| path.display().to_string());
        let name = format!("{:016x}", xxh3_64(format!("{job}\0{storage}").as_bytes()));
        Self { folder: folder(), name }
    }

    /// The socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join(format!("{}.sock", self.name))
    }

    fn lock(&self) -> PathBuf {
        self.folder.join(format!("{}.lock", self.name))
    }

    /// Makes the folder, unless it is there.
    ///
    /// # Errors
    /// When it belongs to somebody else, or lets others in.
    fn prepare(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let found = fs::symlink_metadata(&self.folder)?;
        if !found.is_dir() || found.uid() != geteuid().as_raw() || found.permissions().mode() & 0o077 != 0 {
            let message = format!("{} must be a folder of yours with mode 0700", self.folder.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        Ok(())
    }
}

/// The user's folder for sockets.
fn folder() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|f| f.is_absolute() && f.is_dir());
    match runtime {
        Some(folder) => folder.join("floodmark"),
        None => std::env::temp_dir().join(format!("floodmark-{}", geteuid())),
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use floodmark_snapshot::{Env, storage};
    use floodmark_worker::{
        Controls, Requests, SavepointMade,
        api::{JobApi, JobView, Outline, SavepointOrder, SavepointView, Then, router},
    };
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        sync::watch,
    };

    use super::*;

    fn job() -> JobId {
        JobId { namespace: "default".into(), name: "hot".into(), uid: "local".into() }
    }

    fn api(requests: Requests) -> JobApi {
        JobApi {
            job: job(),
            holder: "here:1".into(),
            graph: Outline::default(),
            parallelism: 1,
            max_parallelism: 128,
            progress: Arc::default(),
            requests,
            stop: watch::Sender::new(false),
            storage: storage::open("memory://").unwrap(),
        }
    }

    async fn view(place: &Place) -> Answer<JobView> {
        ask(place, "GET", "/job", None::<&()>).await.unwrap()
    }

    async fn until_it_listens(place: &Place) {
        for _ in 0..500 {
            if matches!(view(place).await, Answer::Is(_)) {
                return;
            }
            Env::system().runtime.sleep(Duration::from_millis(10)).await;
        }
        panic!("nobody listens at {place:?}");
    }

    #[test]
    fn each_job_and_storage_has_a_place_of_its_own_however_the_storage_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display().to_string();
        let place = Place::of(&job(), &path);
        assert_eq!(
            place,
            Place::of(&job(), &format!("file://{path}/../{}", folder.path().file_name().unwrap().display()))
        );
        assert_ne!(place, Place::of(&JobId { name: "cold".into(), ..job() }, &path));
        assert_ne!(place, Place::of(&job(), "s3://bucket/a"));
    }

    #[test]
    fn a_folder_that_others_may_enter_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place { folder: folder.path().join("a/b"), name: "x".into() };
        place.prepare().unwrap();
        assert_eq!(fs::metadata(&place.folder).unwrap().permissions().mode() & 0o777, 0o700);
        fs::set_permissions(&place.folder, fs::Permissions::from_mode(0o755)).unwrap();
        let error = place.prepare().unwrap_err().to_string();
        assert!(error.contains("must be a folder of yours with mode 0700"), "{error}");
    }

    #[tokio::test]
    async fn a_job_is_asked_through_its_socket_and_one_that_lives_is_not_pushed_aside() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place { folder: folder.path().join("sockets"), name: "x".into() };
        assert!(matches!(view(&place).await, Answer::NobodyListens));
        // What a process that died has left behind.
        place.prepare().unwrap();
        drop(std::os::unix::net::UnixListener::bind(place.socket()).unwrap());
        assert!(matches!(view(&place).await, Answer::NobodyListens));

        let (stop, stopped) = watch::channel(false);
        let (mut controls, requests) = Controls::new(stopped);
        let (end, ended) = watch::channel(false);
        let (end_other, other_ended) = watch::channel(false);
        let env = Env::system();
        let serving = serve(router(api(requests.clone())), &place, &env, ended);
        let other = serve(router(api(requests)), &place, &env, other_ended);
        let asking = async {
            until_it_listens(&place).await;
            assert_eq!(fs::metadata(place.socket()).unwrap().permissions().mode() & 0o777, 0o600);
            let order = SavepointOrder { name: "a".into(), then: Then::Stop };
            let asked = ask::<_, SavepointView>(&place, "POST", "/savepoints", Some(&order));
            let job = async {
                let request = controls.savepoints.recv().await.unwrap();
                // The job ends at once, and yet the answer arrives.
                end.send(true).unwrap();
                let made = SavepointMade { location: "/s/a".into(), epoch: Default::default(), size: 1 };
                request.reply.send(Ok(made)).unwrap();
            };
            let (answer, ()) = tokio::join!(asked, job);
            let Answer::Is(made) = answer.unwrap() else { panic!("refused") };
            assert_eq!(made.location, "/s/a");
            end_other.send(true).unwrap();
        };
        tokio::join!(serving, other, asking);
        assert!(!place.socket().exists());
        drop(stop);
    }

    /// What comes back on a connection on which this is sent.
    async fn send(address: std::net::SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // What the server has not read may make an error of the end.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn over_tcp_everybody_may_read_and_changes_need_the_token() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let args = HttpArgs { listen_http: Some("127.0.0.1:0".into()), http_token_file: Some(file.clone()) };
        assert_eq!(listen(&args).await.unwrap_err().exit, Exit::BadInput);
        fs::write(&file, "geheim").unwrap();
        let listener = listen(&args).await.unwrap().unwrap();
        let address = listener.local_addr().unwrap();
        let (mut controls, requests) = Controls::new(watch::channel(false).1);
        let (end, ended) = watch::channel(false);
        let env = Env::system();
        let serving = serve_tcp(guarded(router(api(requests)), &args, &env), Some(listener), &env, ended);
        let asking = async {
            let read = send(address, "GET /job HTTP/1.1\r\nhost: a\r\n\r\n").await;
            assert!(read.starts_with("HTTP/1.1 200 ") && read.contains("default/hot/local"), "{read}");
            let metrics = send(address, "GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n").await;
            assert!(metrics.contains("\nfloodmark_job_ready 0\n"), "{metrics}");
            let body = r#"{"name":"a"}"#;
            let order = |headers: &str| {
                format!(
                    "POST /savepoints HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n{headers}content-length: {}\r\n\r\n{body}",
                    body.len()
                )
            };
            for headers in ["", "authorization: Bearer another\r\n"] {
                let refused = send(address, &order(headers)).await;
                assert!(refused.starts_with("HTTP/1.1 401 "), "{refused}");
            }
            assert!(controls.savepoints.try_recv().is_err());
            let job = async {
                let request = controls.savepoints.recv().await.unwrap();
                let made = SavepointMade { location: "/s/a".into(), epoch: Default::default(), size: 1 };
                request.reply.send(Ok(made)).unwrap();
            };
            let order = order("authorization: Bearer geheim\r\n");
            let (made, ()) = tokio::join!(send(address, &order), job);
            assert!(made.starts_with("HTTP/1.1 200 ") && made.contains("/s/a"), "{made}");
            let many: String = (0..200).map(|n| format!("x-{n}: y\r\n")).collect();
            let long = format!("x: {}\r\n", "y".repeat(64 << 10));
            for headers in [many, long] {
                let refused = send(address, &format!("GET /job HTTP/1.1\r\nhost: a\r\n{headers}\r\n")).await;
                assert!(refused.starts_with("HTTP/1.1 431 "), "{refused}");
            }
            end.send(true).unwrap();
        };
        tokio::join!(serving, asking);
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn an_address_that_is_taken_is_named() {
        let first = listen(&HttpArgs { listen_http: Some("127.0.0.1:0".into()), http_token_file: None }).await;
        let taken = first.unwrap().unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let again = listen(&HttpArgs { listen_http: Some(address.clone()), http_token_file: None }).await;
        assert!(again.unwrap_err().message.contains(&format!("--listen-http {address}")));
    }
}
