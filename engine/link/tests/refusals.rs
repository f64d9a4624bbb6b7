//! Who is let in over a real socket, and what the others are told.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait for real, and fail by panic")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use floodmark_link::{
    control::{self, ControlClient, ControlServer, Heartbeat},
    tls::{Authority, CERTIFICATE_LIFETIME, Folder, Identity, Role},
    transport::{
        Acceptors, Endpoint, Listening, Opening, Transport,
        grpc::{GrpcTransport, Settings},
    },
};
use floodmark_snapshot::{Disposition, Env, Error, env::Clock};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsConnector;

mod common;
use common::{LOOPBACK, authority, settled, subject, transport, transport_of};

type Server = ControlServer<String, u64, u64>;

/// A coordinator, and why it refused whom.
struct Coordinator {
    listening: Box<dyn Listening>,
    refused: Arc<Mutex<Vec<String>>>,
    _accepted: tokio::sync::mpsc::Receiver<control::Accepted<String, u64, u64>>,
}

impl Coordinator {
    async fn start(transport: GrpcTransport) -> Self {
        let refused: Arc<Mutex<Vec<String>>> = Arc::default();
        let told = refused.clone();
        let tell = move |_: &str, error: &Error| told.lock().unwrap().push(error.to_string());
        let (server, accepted) = Server::new(Env::system(), Heartbeat::default());
        let acceptors = Acceptors::default().with(control::PURPOSE, server);
        let transport = transport.on_refused(Arc::new(tell));
        let listening = transport.listen(&LOOPBACK.into(), Arc::new(acceptors)).await.unwrap();
        Self { listening, refused, _accepted: accepted }
    }

    async fn refused(&self, why: &str) {
        let said = || self.refused.lock().unwrap().iter().any(|r| r.contains(why));
        settled(&format!("{why:?} in {:?}", self.refused), said).await;
    }
}

async fn connect(transport: GrpcTransport, to: &Endpoint) -> Result<(), Error> {
    let client = ControlClient::new(Env::system(), Arc::new(transport), Heartbeat::default());
    client.connect::<_, u64, u64>(to, &"hello").await.map(drop)
}

/// The error of a client that is refused for good.
async fn refusal(transport: GrpcTransport, to: &Endpoint) -> String {
    let error = connect(transport, to).await.unwrap_err();
    assert_eq!(error.disposition(), Disposition::Abort, "{error}");
    error.to_string()
}

/// A clock that is wrong by so many days.
struct Days(i64);

impl Clock for Days {
    fn wall_ms(&self) -> i64 {
        Env::system().clock.wall_ms() + self.0 * 24 * 3_600_000
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}

#[tokio::test]
async fn a_worker_of_the_job_is_let_in() {
    let authority = authority();
    let coordinator = Coordinator::start(transport(&authority, Role::Coordinator)).await;
    connect(transport(&authority, Role::Worker), &coordinator.listening.endpoint()).await.unwrap();
    assert!(coordinator.refused.lock().unwrap().is_empty());
}

#[tokio::test]
async fn plaintext_is_refused_by_who_listens_and_who_connects() {
    let authority = authority();
    let coordinator = Coordinator::start(transport(&authority, Role::Coordinator)).await;
    let mut plain = TcpStream::connect(&coordinator.listening.endpoint().0).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // An alert, or nothing: no HTTP/2.
    drop(plain.read_to_end(&mut answer).await);
    assert!(answer.len() <= 7, "{answer:?}");
    coordinator.refused("does not speak TLS").await;

    let listener = TcpListener::bind(LOOPBACK).await.unwrap();
    let at = Endpoint(listener.local_addr().unwrap().to_string());
    let serve = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        // HTTP/2's first frame, settings.
        stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        drop(stream.read(&mut [0; 1024]).await);
    });
    let refused = refusal(transport(&authority, Role::Worker), &at).await;
    assert!(refused.contains("does not speak TLS") && refused.contains(&at.0), "{refused}");
    serve.await.unwrap();
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused() {
    let (ours, theirs) = (authority(), authority());
    let coordinator = Coordinator::start(transport(&ours, Role::Coordinator)).await;
    let refused = refusal(transport(&theirs, Role::Worker), &coordinator.listening.endpoint()).await;
    assert!(refused.contains("the peer's certificate is refused"), "{refused}");
    // One who trusts both, but has a certificate of the other.
    let careless = Careless::new(&theirs, "a", Role::Worker);
    careless.connect(&coordinator.listening.endpoint()).await;
    coordinator.refused("certificate is refused").await;
}

#[tokio::test]
async fn a_certificate_of_another_job_is_refused_though_the_authority_is_the_same() {
    let authority = authority();
    let coordinator = Coordinator::start(transport(&authority, Role::Coordinator)).await;
    let other = authority.identity(&subject("b", Role::Worker), CERTIFICATE_LIFETIME).unwrap();
    let refused = refusal(transport_of(other), &coordinator.listening.endpoint()).await;
    assert!(refused.contains("the peer is a coordinator of job default/a/local"), "{refused}");
    assert!(refused.contains("belongs to job default/b/local"), "{refused}");
    Careless::new(&authority, "b", Role::Worker).connect(&coordinator.listening.endpoint()).await;
    coordinator.refused("the peer is a worker of job default/b/local").await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused_by_who_listens_and_who_connects() {
    let now = authority();
    let coordinator = Coordinator::start(transport(&now, Role::Coordinator)).await;
    // What a clock of the day before yesterday has issued for a day.
    let stale = Stale::new();
    let expired = Coordinator::start(transport_of(stale.identity(Role::Coordinator))).await;
    let good = transport_of(stale.fresh(Role::Worker));
    let refused = refusal(good, &expired.listening.endpoint()).await;
    assert!(refused.contains("expired"), "{refused}");

    let fresh = Coordinator::start(transport_of(stale.fresh(Role::Coordinator))).await;
    drop(connect(transport_of(stale.identity(Role::Worker)), &fresh.listening.endpoint()).await.unwrap_err());
    fresh.refused("expired").await;
    drop(coordinator);
}

/// One authority, whose certificates can be issued with a clock that is two days late.
struct Stale(Authority, Arc<Moving>);

struct Moving(std::sync::atomic::AtomicI64);

impl Clock for Moving {
    fn wall_ms(&self) -> i64 {
        Days(self.0.load(std::sync::atomic::Ordering::Relaxed)).wall_ms()
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}

impl Stale {
    fn new() -> Self {
        let clock = Arc::new(Moving((-2).into()));
        Self(Authority::new(clock.clone()).unwrap(), clock)
    }

    fn issue(&self, days: i64, role: Role) -> Identity {
        self.1.0.store(days, std::sync::atomic::Ordering::Relaxed);
        self.0.identity(&subject("a", role), CERTIFICATE_LIFETIME).unwrap()
    }

    fn identity(&self, role: Role) -> Identity {
        self.issue(-2, role)
    }

    fn fresh(&self, role: Role) -> Identity {
        self.issue(0, role)
    }
}

#[tokio::test]
async fn a_certificate_that_is_not_yet_in_force_is_refused() {
    let stale = Stale::new();
    let coordinator = Coordinator::start(transport_of(stale.issue(3, Role::Coordinator))).await;
    let refused = refusal(transport_of(stale.fresh(Role::Worker)), &coordinator.listening.endpoint()).await;
    assert!(refused.contains("not valid yet"), "{refused}");
}

#[tokio::test]
async fn a_worker_can_not_act_as_coordinator_nor_a_coordinator_as_worker() {
    let authority = authority();
    let worker = Coordinator::start(transport(&authority, Role::Worker)).await;
    let refused = refusal(transport(&authority, Role::Worker), &worker.listening.endpoint()).await;
    assert!(refused.contains("the peer is a worker of job") && refused.contains("must be a coordinator"), "{refused}");

    let coordinator = Coordinator::start(transport(&authority, Role::Coordinator)).await;
    let refused = refusal(transport(&authority, Role::Coordinator), &coordinator.listening.endpoint()).await;
    assert!(refused.contains("the peer is a coordinator of job") && refused.contains("must be a worker"), "{refused}");
}

#[tokio::test]
async fn who_shows_no_certificate_is_refused() {
    let authority = authority();
    let coordinator = Coordinator::start(transport(&authority, Role::Coordinator)).await;
    Careless::anonymous().connect(&coordinator.listening.endpoint()).await;
    coordinator.refused("shows no certificate").await;
}

#[tokio::test]
async fn a_stream_for_what_nobody_takes_is_refused_and_the_connection_goes_on() {
    let authority = authority();
    let coordinator = Coordinator::start(transport(&authority, Role::Coordinator)).await;
    let worker = transport(&authority, Role::Worker);
    let opening = Opening { purpose: "gossip 7".into(), hello: Default::default() };
    let refused = worker.open(&coordinator.listening.endpoint(), Role::Coordinator, opening).await.unwrap_err();
    assert!(refused.to_string().contains("takes no streams for \"gossip\""), "{refused}");
    assert_eq!(refused.disposition(), Disposition::Abort);
    connect(worker, &coordinator.listening.endpoint()).await.unwrap();
}

#[tokio::test]
async fn rotated_files_count_from_the_next_connection_on() {
    let stale = Stale::new();
    let coordinator = Coordinator::start(transport_of(stale.fresh(Role::Coordinator))).await;
    let folder = tempfile::tempdir().unwrap();
    let worker = subject("a", Role::Worker);
    let issue = |days| {
        stale.1.0.store(days, std::sync::atomic::Ordering::Relaxed);
        stale.0.issue(&worker, CERTIFICATE_LIFETIME).unwrap().write(folder.path()).unwrap();
    };
    let client = || {
        let source = Arc::new(Folder(folder.path().to_owned()));
        GrpcTransport::new(Env::system(), source, Settings::default())
    };
    let transport = Arc::new(client());
    let connect = || async {
        let client = ControlClient::new(Env::system(), transport.clone(), Heartbeat::default());
        client.connect::<_, u64, u64>(&coordinator.listening.endpoint(), &"hello").await
    };
    issue(-2);
    connect().await.map(drop).unwrap_err();
    coordinator.refused("expired").await;
    issue(0);
    connect().await.unwrap();
}

#[tokio::test]
async fn who_connects_and_says_nothing_keeps_nobody_out() {
    let authority = authority();
    let coordinator = Coordinator::start(transport(&authority, Role::Coordinator)).await;
    let at = coordinator.listening.endpoint();
    let mut silent = Vec::new();
    for _ in 0..32 {
        silent.push(TcpStream::connect(&at.0).await.unwrap());
    }
    connect(transport(&authority, Role::Worker), &at).await.unwrap();
    coordinator.refused("could not finish the TLS handshake within").await;
    for mut stream in silent {
        let ended = tokio::time::timeout(common::PATIENCE, stream.read(&mut [0; 16])).await.expect("it is dropped");
        assert!(matches!(ended, Ok(0) | Err(_)));
    }
}

/// A client that trusts everybody.
struct Careless(ClientConfig);

#[derive(Debug)]
struct TrustsAll;

impl ServerCertVerifier for TrustsAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

impl Careless {
    fn new(authority: &Authority, job: &str, role: Role) -> Self {
        let issued = authority.issue(&subject(job, role), CERTIFICATE_LIFETIME).unwrap();
        let chain = vec![CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
        Self(Self::builder().with_client_auth_cert(chain, key).unwrap())
    }

    fn anonymous() -> Self {
        Self(Self::builder().with_no_client_auth())
    }

    fn builder() -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
        ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TrustsAll))
    }

    /// Connects as far as it is let. It must not get a single byte of HTTP/2.
    async fn connect(self, to: &Endpoint) {
        let mut config = self.0;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let stream = TcpStream::connect(&to.0).await.unwrap();
        let name = ServerName::try_from("floodmark").unwrap();
        let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, stream).await else { return };
        let read = tokio::time::timeout(common::PATIENCE, stream.read(&mut [0; 64])).await.expect("it is dropped");
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
}
