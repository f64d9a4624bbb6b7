//! Control connections over real sockets: what is lost, when, and why.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait for real, and fail by panic")]

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use floodmark_link::{
    control::{Accepted, ControlClient, ControlReceiver, ControlSender, ControlServer, Heartbeat, MESSAGE_BYTES_MAX},
    tls::{Authority, CERTIFICATE_LIFETIME, Folder, Role},
    transport::{
        Endpoint, Listening, Transport,
        grpc::{GrpcTransport, Settings},
    },
};
use floodmark_snapshot::Env;

mod common;
use common::{LOOPBACK, PATIENCE, Proxy, authority, subject, transport};

type Server = ControlServer<String, String, String>;
type Connected = Accepted<String, String, String>;

struct Coordinator {
    authority: Authority,
    listening: Box<dyn Listening>,
    accepted: tokio::sync::mpsc::Receiver<Connected>,
}

impl Coordinator {
    async fn start(heartbeat: Heartbeat) -> Self {
        let authority = authority();
        let (server, accepted) = Server::new(Env::system(), heartbeat);
        let listening = transport(&authority, Role::Coordinator).listen(&LOOPBACK.into(), server).await.unwrap();
        Self { authority, listening, accepted }
    }

    async fn accept(&mut self) -> Connected {
        tokio::time::timeout(PATIENCE, self.accepted.recv()).await.expect("a worker comes").unwrap()
    }

    async fn worker(&self, at: &Endpoint, heartbeat: Heartbeat) -> (ControlSender<String>, ControlReceiver<String>) {
        let transport = Arc::new(transport(&self.authority, Role::Worker));
        ControlClient::new(Env::system(), transport, heartbeat).connect(at, &"hello").await.unwrap()
    }
}

#[tokio::test]
async fn messages_of_any_size_arrive_in_order_both_ways() {
    let mut coordinator = Coordinator::start(Heartbeat::default()).await;
    let at = coordinator.listening.endpoint();
    assert!(!at.0.ends_with(":0"), "{at}");
    let (up, mut down) = coordinator.worker(&at, Heartbeat::default()).await;
    let mut accepted = coordinator.accept().await;
    assert_eq!(accepted.hello, "hello");
    assert_eq!(accepted.peer.subject, subject("a", Role::Worker));
    let sizes = [0, 1, 100, 70_000, MESSAGE_BYTES_MAX - 2, 3];
    for size in sizes {
        up.send(&"u".repeat(size)).unwrap();
        accepted.sender.send(&"d".repeat(size)).unwrap();
    }
    for size in sizes {
        assert_eq!(accepted.receiver.recv().await.map(|m| m.len()), Ok(size));
        assert_eq!(down.recv().await.map(|m| m.len()), Ok(size));
    }
    up.close("done");
    assert!(accepted.receiver.recv().await.unwrap_err().reason.contains("done"));
}

#[tokio::test]
async fn a_cut_connection_is_found_by_heartbeat_at_both_ends() {
    let heartbeat = Heartbeat { interval: Duration::from_millis(100), timeout: Duration::from_millis(500) };
    let mut coordinator = Coordinator::start(heartbeat).await;
    let proxy = Proxy::before(coordinator.listening.endpoint()).await;
    let (up, mut down) = coordinator.worker(&proxy.endpoint, heartbeat).await;
    let mut accepted = coordinator.accept().await;
    up.send(&"before".to_owned()).unwrap();
    assert_eq!(accepted.receiver.recv().await.as_deref(), Ok("before"));
    tokio::time::sleep(heartbeat.timeout * 2).await;
    proxy.stop();
    let cut = Instant::now();
    up.send(&"after".to_owned()).unwrap();
    for lost in [accepted.receiver.recv().await.unwrap_err(), down.recv().await.unwrap_err()] {
        assert!(lost.reason.contains("silent"), "{lost}");
        let after = cut.elapsed();
        assert!(after >= heartbeat.timeout - heartbeat.interval && after < heartbeat.timeout * 10, "{after:?}");
    }
}

#[tokio::test]
async fn a_coordinator_that_closes_is_seen_at_once() {
    let mut coordinator = Coordinator::start(Heartbeat::default()).await;
    let (_up, mut down) = coordinator.worker(&coordinator.listening.endpoint(), Heartbeat::default()).await;
    let _accepted = coordinator.accept().await;
    let begun = Instant::now();
    coordinator.listening.close().await;
    let lost = down.recv().await.unwrap_err();
    assert!(lost.reason.contains("shutting down"), "{lost}");
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    assert!(tokio::net::TcpStream::connect(&coordinator.listening.endpoint().0).await.is_err(), "it listens no more");
}

const CHILD: &str = "FLOODMARK_LINK_TEST_CHILD";

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[tokio::test]
async fn a_killed_worker_is_seen_at_once() {
    let mut coordinator = Coordinator::start(Heartbeat::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let issued = coordinator.authority.issue(&subject("a", Role::Worker), CERTIFICATE_LIFETIME).unwrap();
    issued.write(folder.path()).unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_worker_that_is_killed", "--nocapture"])
        .env(CHILD, format!("{} {}", coordinator.listening.endpoint(), folder.path().display()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut child = Killed(child);
    let mut accepted = coordinator.accept().await;
    assert_eq!(accepted.receiver.recv().await.as_deref(), Ok("here"));
    child.0.kill().unwrap();
    let killed = Instant::now();
    let lost = accepted.receiver.recv().await.unwrap_err();
    // Also a connection that is reset is broken; either is said once.
    let cause = lost.reason.strip_prefix("the connection is broken: ").unwrap();
    assert!(!cause.contains("source:") && !cause.contains("https:"), "{lost}");
    assert!(killed.elapsed() < Heartbeat::default().timeout / 2, "long before silence tells: {:?}", killed.elapsed());
}

/// Not a test by itself: what [`a_killed_worker_is_seen_at_once`] runs in a process of its own.
#[tokio::test]
async fn the_worker_that_is_killed() {
    let Ok(told) = std::env::var(CHILD) else { return };
    let (at, folder) = told.split_once(' ').unwrap();
    let source = Arc::new(Folder(PathBuf::from(folder)));
    let transport = Arc::new(GrpcTransport::new(Env::system(), source, Settings::default()));
    let client = ControlClient::new(Env::system(), transport, Heartbeat::default());
    let (up, mut down) = client.connect::<_, String, String>(&at.into(), &"hello").await.unwrap();
    up.send(&"here".to_owned()).unwrap();
    drop(down.recv().await);
}
