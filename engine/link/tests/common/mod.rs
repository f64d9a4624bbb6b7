//! Processes of a job on loopback, and what stands between them.

#![allow(dead_code, unreachable_pub, reason = "not every test needs all of it")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait for real, and fail by panic")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use floodmark_dataflow::{
    Batch, Frame,
    channel::{Inbox, Refused, Sender, Signal},
};
use floodmark_link::{
    exchange::{self, ChannelId, Exchange, LostChannel},
    tls::{Authority, CERTIFICATE_LIFETIME, Identity, Role, Subject},
    transport::{
        Acceptors, Endpoint, Listening, Transport,
        grpc::{GrpcTransport, Settings},
    },
};
use floodmark_snapshot::{Attempt, Env, JobId};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

pub const LOOPBACK: &str = "127.0.0.1:0";
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn subject(name: &str, role: Role) -> Subject {
    Subject { job: JobId { namespace: "default".into(), name: name.into(), uid: "local".into() }, role }
}

pub fn authority() -> Authority {
    Authority::new(Env::system().clock).unwrap()
}

pub fn transport_of(identity: Identity) -> GrpcTransport {
    GrpcTransport::new(Env::system(), Arc::new(Arc::new(identity)), Settings::default())
}

pub fn transport(authority: &Authority, role: Role) -> GrpcTransport {
    transport_of(authority.identity(&subject("a", role), CERTIFICATE_LIFETIME).unwrap())
}

pub async fn settled(what: &str, mut is_so: impl FnMut() -> bool) {
    let waited = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waited).await.is_ok(), "it does not come about: {what}");
}

/// Stands between a client and a server, until it stops to: then it keeps both connections and moves nothing.
pub struct Proxy {
    pub endpoint: Endpoint,
    moves: watch::Sender<bool>,
}

impl Proxy {
    pub async fn before(server: Endpoint) -> Self {
        let listener = TcpListener::bind(LOOPBACK).await.unwrap();
        let endpoint = Endpoint(listener.local_addr().unwrap().to_string());
        let (moves, watch) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&server.0).await.unwrap();
                let ((client_reads, client_writes), (server_reads, server_writes)) =
                    (client.into_split(), server.into_split());
                tokio::spawn(forward(client_reads, server_writes, watch.clone()));
                tokio::spawn(forward(server_reads, client_writes, watch.clone()));
            }
        });
        Self { endpoint, moves }
    }

    pub fn stop(&self) {
        self.moves.send_replace(false);
    }
}

async fn forward(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut moves: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count) = from.read(&mut buffer).await {
        // Also the end of a connection does not pass.
        if moves.wait_for(|moves| *moves).await.is_err() || count == 0 || to.write_all(&buffer[..count]).await.is_err()
        {
            break;
        }
    }
}

/// A worker that takes part in the exchange.
pub struct Worker {
    pub exchange: Arc<Exchange>,
    pub losses: Arc<Mutex<Vec<LostChannel>>>,
    pub listening: Box<dyn Listening>,
}

pub const ATTEMPT: Attempt = Attempt(1);

impl Worker {
    pub async fn start(transport: GrpcTransport) -> Self {
        let transport: Arc<dyn Transport> = Arc::new(transport);
        let losses: Arc<Mutex<Vec<LostChannel>>> = Arc::default();
        let told = losses.clone();
        let exchange =
            Exchange::new(Env::system(), transport.clone(), Arc::new(move |lost| told.lock().unwrap().push(lost)));
        exchange.begin(ATTEMPT).unwrap();
        let acceptors = Acceptors::default().with(exchange::PURPOSE, Arc::new(exchange.clone()));
        let listening = transport.listen(&LOOPBACK.into(), Arc::new(acceptors)).await.unwrap();
        Self { exchange, losses, listening }
    }

    pub fn lost(&self) -> Vec<LostChannel> {
        self.losses.lock().unwrap().clone()
    }

    /// A channel to this worker, and who reads it.
    pub fn expect(&self, id: ChannelId) -> Reader {
        let signal = Arc::new(Signal::default());
        let mut inbox = Inbox::new(signal.clone());
        self.exchange.expect(id, inbox.channel(Arc::default())).unwrap();
        Reader { inbox, signal }
    }

    pub fn connect(&self, id: ChannelId, to: &Endpoint) -> Writer {
        let signal = Arc::new(Signal::default());
        Writer { sender: self.exchange.connect(id, to.clone(), signal.clone()).unwrap(), signal }
    }
}

pub fn channel(number: u32) -> ChannelId {
    ChannelId { attempt: ATTEMPT, edge: 0, from: number, to: 0 }
}

pub struct Reader {
    pub inbox: Inbox,
    signal: Arc<Signal>,
}

impl Reader {
    pub async fn recv(&mut self) -> Frame {
        let next = async {
            loop {
                match self.inbox.try_recv(|_| false) {
                    Some((_, frame)) => return frame,
                    None => std::future::poll_fn(|context| self.signal.poll_wait(context)).await,
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("a frame comes")
    }

    pub async fn rows(&mut self) -> Batch {
        match self.recv().await {
            Frame::Batch(batch) => batch,
            other => panic!("rows, not {other:?}"),
        }
    }
}

pub struct Writer {
    pub sender: Sender,
    signal: Arc<Signal>,
}

impl Writer {
    pub async fn send(&self, mut frame: Frame) -> Result<(), Refused> {
        loop {
            match self.sender.try_send(frame) {
                Err(Refused::Full(back)) => frame = back,
                other => return other,
            }
            std::future::poll_fn(|context| self.signal.poll_wait(context)).await;
        }
    }

    /// Sends this frame until there is no room for so long. Answers with how often.
    pub async fn fill(&self, frame: &Frame) -> usize {
        let mut sent = 0;
        while let Ok(done) = tokio::time::timeout(Duration::from_millis(500), self.send(frame.clone())).await {
            done.unwrap();
            sent += 1;
            assert!(sent < 10_000, "nothing holds the sender back");
        }
        sent
    }
}
