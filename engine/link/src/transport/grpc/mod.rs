//! Arrow Flight over mutual TLS: each stream is one `DoExchange`.
//!
//! Streams to workers share one connection per process and peer: HTTP/2 keeps them apart, and its windows are wider than what
//! the exchange has on its way, so none holds up another. Each stream to a coordinator has a connection of its own: rows never
//! delay a heartbeat. HTTP/2 pings find out about connections that lead nowhere.
//!
//! Needs the tokio runtime that [`Env::runtime`] spawns on; a simulator takes [`super::memory`] instead.

use std::{
    collections::HashMap,
    error::Error as StdError,
    fmt,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use async_trait::async_trait;
use floodmark_snapshot::{Disposition, Env, Error, Result, error::Context as _};
use futures::{
    StreamExt,
    channel::mpsc,
    future::{Either, select},
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint as HttpEndpoint},
};
use tower::service_fn;

use super::{Acceptor, Endpoint, Listening, Opening, Outgoing, PACKET_BYTES_MAX, Packet, Pipe, Transport};
use crate::tls::{IdentitySource, Role};

mod codec;
mod secure;
mod server;

use codec::{FRAMING_BYTES_MAX, FlightCodec, Outbound};
pub use secure::{Duplex, Handshake, MutualTls};

/// Bytes that HTTP/2 lets be on their way on one stream. Whoever receives takes all that comes at once: so it only has to
/// cover what the network holds, and nobody waits for a task here.
const STREAM_WINDOW: u32 = 4 << 20;
/// The same for a connection.
const CONNECTION_WINDOW: u32 = 64 << 20;
/// Bytes of a piece that HTTP/2 cuts messages into.
const HTTP_FRAME_BYTES: u32 = 256 << 10;
/// Streams that one peer may have open on a connection: a channel each.
const STREAMS_MAX: u32 = 1 << 16;
/// Packets that wait for HTTP/2 on a stream, besides the one that a sender always has room for.
const PACKETS_WAITING_MAX: usize = 1;
const PATH: &str = "/arrow.flight.protocol.FlightService/DoExchange";
/// The largest message, as gRPC counts.
const MESSAGE_BYTES_MAX: usize = PACKET_BYTES_MAX + FRAMING_BYTES_MAX;

/// How long the network may take for what.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// From the first packet of a connection to the end of the handshake.
    pub connect_timeout: Duration,
    /// From a stream's opening to the acceptor's answer.
    pub open_timeout: Duration,
    /// How often a connection is tried out with a ping.
    pub ping_interval: Duration,
    /// How long an answer to a ping may take before the connection counts as broken.
    pub ping_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(3),
            open_timeout: Duration::from_secs(3),
            ping_interval: Duration::from_secs(1),
            ping_timeout: Duration::from_secs(3),
        }
    }
}

/// Is told of each connection that was refused: from where, and why.
pub type OnRefused = Arc<dyn Fn(&str, &Error) + Send + Sync>;

type Connections = Arc<tokio::sync::Mutex<Option<Channel>>>;

/// See the module.
pub struct GrpcTransport {
    env: Env,
    handshake: Arc<dyn Handshake>,
    settings: Settings,
    on_refused: OnRefused,
    /// The connections to workers.
    connections: Mutex<HashMap<Endpoint, Connections>>,
}

impl fmt::Debug for GrpcTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrpcTransport").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl GrpcTransport {
    /// With mutual TLS.
    #[must_use]
    pub fn new(env: Env, identities: Arc<dyn IdentitySource>, settings: Settings) -> Self {
        let handshake = MutualTls { identities, clock: env.clock.clone() };
        Self::with_handshake(env, Arc::new(handshake), settings)
    }

    /// With another way to know who is at the other end: for measurements and tests.
    #[must_use]
    pub fn with_handshake(env: Env, handshake: Arc<dyn Handshake>, settings: Settings) -> Self {
        let on_refused: OnRefused = Arc::new(|from, error| tracing::warn!(peer = from, %error, "refused a connection"));
        Self { env, handshake, settings, on_refused, connections: Mutex::default() }
    }

    /// Tells somebody else than the log about refused connections.
    #[must_use]
    pub fn on_refused(mut self, on_refused: OnRefused) -> Self {
        self.on_refused = on_refused;
        self
    }

    /// Makes a connection: TCP, TLS, HTTP/2.
    async fn connect(&self, to: &Endpoint, role: Role) -> Result<Channel> {
        let connected = async {
            let stream = TcpStream::connect(&to.0).await.map_err(|e| Error::retry(e.to_string()))?;
            stream.set_nodelay(true).map_err(|e| Error::retry(e.to_string()))?;
            let (io, _) = self.handshake.connect(stream, role).await?;
            // The connection is made; should it break, nobody makes it again behind our back.
            let mut once = Some(TokioIo::new(io));
            let connector = service_fn(move |_| {
                let io = once.take().ok_or_else(|| std::io::Error::other("the connection is broken"));
                async move { io }
            });
            // TLS is ours, so HTTP/2 knows nothing of it.
            HttpEndpoint::from_shared(format!("http://{to}"))
                .map_err(|e| Error::abort(format!("not an address: {e}")))?
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_frame_size(HTTP_FRAME_BYTES)
                .http2_keep_alive_interval(self.settings.ping_interval)
                .keep_alive_timeout(self.settings.ping_timeout)
                .keep_alive_while_idle(true)
                .connect_with_connector(connector)
                .await
                .map_err(|e| Error::retry(with_causes(&e)))
        };
        let connected = within(&self.env, self.settings.connect_timeout, "connect", connected).await;
        connected.context_with(|| format!("connect to the {role} at {to}"))
    }

    /// Opens a stream on a connection.
    async fn open_on(&self, channel: Channel, opening: &Opening) -> Result<Pipe, Status> {
        let mut grpc = Grpc::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let (mut outgoing, packets) = mpsc::channel(PACKETS_WAITING_MAX);
        outgoing.try_send(Outbound::Opening(opening.clone())).map_err(|_| Status::internal("the stream is full"))?;
        let opened = async {
            grpc.ready().await.map_err(|e| Status::unavailable(with_causes(&e)))?;
            grpc.streaming(Request::new(packets), PathAndQuery::from_static(PATH), FlightCodec).await
        };
        let timeout = self.env.runtime.sleep(self.settings.open_timeout);
        match select(pin!(opened), timeout).await {
            Either::Left((response, _)) => {
                let incoming = response?.into_inner().map(|r| r.map(codec::packet).map_err(|s| error_of(&s))).boxed();
                Ok(Pipe { outgoing: Box::new(ClientEnd(outgoing)), incoming })
            }
            Either::Right(_) => Err(Status::unavailable(format!("no answer within {:?}", self.settings.open_timeout))),
        }
    }

    fn connection(&self, to: &Endpoint) -> Connections {
        let mut all = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(to.clone()).or_default().clone()
    }

    fn forget(&self, to: &Endpoint, connection: &Connections) {
        let mut all = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if all.get(to).is_some_and(|c| Arc::ptr_eq(c, connection)) {
            all.remove(to);
        }
    }

    /// Opens a stream on the connection that there is; makes one if there is none, or if it turns out to be broken.
    async fn open_shared(&self, to: &Endpoint, role: Role, opening: &Opening) -> Result<Pipe> {
        let connection = self.connection(to);
        let (channel, fresh) = {
            let mut there = connection.lock().await;
            match &*there {
                Some(channel) => (channel.clone(), false),
                None => (there.insert(self.connect(to, role).await?).clone(), true),
            }
        };
        let status = match self.open_on(channel, opening).await {
            Ok(pipe) => return Ok(pipe),
            Err(status) => status,
        };
        if !is_of_acceptor(&status) {
            self.forget(to, &connection);
            if !fresh {
                let again = self.connection(to);
                let mut there = again.lock().await;
                let channel = match &*there {
                    Some(channel) => channel.clone(),
                    None => there.insert(self.connect(to, role).await?).clone(),
                };
                drop(there);
                return self.open_on(channel, opening).await.map_err(|s| error_of(&s));
            }
        }
        Err(error_of(&status))
    }
}

#[async_trait]
impl Transport for GrpcTransport {
    async fn open(&self, to: &Endpoint, role: Role, opening: Opening) -> Result<Pipe> {
        let opened = match role {
            Role::Worker => self.open_shared(to, role, &opening).await,
            Role::Coordinator => {
                let channel = self.connect(to, role).await?;
                self.open_on(channel, &opening).await.map_err(|s| error_of(&s))
            }
        };
        opened.context_with(|| format!("open a stream for {} to the {role} at {to}", opening.purpose))
    }

    async fn listen(&self, at: &Endpoint, acceptor: Arc<dyn Acceptor>) -> Result<Box<dyn Listening>> {
        let on_refused = self.on_refused.clone();
        let server = server::listen(&self.env, at, self.handshake.clone(), acceptor, self.settings, on_refused);
        Ok(Box::new(server.await?))
    }
}

/// At the end that opened a stream.
struct ClientEnd(mpsc::Sender<Outbound>);

impl Outgoing for ClientEnd {
    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(ready!(self.0.poll_ready(context)).map_err(|_| ended()))
    }

    fn send(&mut self, packet: Packet) -> Result<()> {
        self.0.start_send(Outbound::Packet(packet)).map_err(|_| ended())
    }
}

fn ended() -> Error {
    Error::retry("the stream has ended")
}

async fn within<T>(env: &Env, timeout: Duration, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    match select(pin!(work), env.runtime.sleep(timeout)).await {
        Either::Left((done, _)) => done,
        Either::Right(_) => Err(Error::retry(format!("could not {what} within {timeout:?}"))),
    }
}

fn with_causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// How an acceptor's refusal travels.
const DISPOSITIONS: [(Disposition, Code); 4] = [
    (Disposition::Retry, Code::ResourceExhausted),
    (Disposition::Abort, Code::FailedPrecondition),
    (Disposition::Fenced, Code::Aborted),
    (Disposition::Corrupt, Code::DataLoss),
];

fn status_of(error: &Error) -> Status {
    let code = DISPOSITIONS.iter().find(|(d, _)| *d == error.disposition()).map_or(Code::Unknown, |(_, code)| *code);
    Status::new(code, error.to_string())
}

/// Whether the status is what an acceptor said, not what became of the connection.
fn is_of_acceptor(status: &Status) -> bool {
    DISPOSITIONS.iter().any(|(_, code)| *code == status.code())
}

fn error_of(status: &Status) -> Error {
    match DISPOSITIONS.iter().find(|(_, code)| *code == status.code()) {
        Some((disposition, _)) => Error::new(*disposition, status.message()),
        None => Error::retry(format!("the connection is broken: {}", why_broken(status))),
    }
}

/// What is at the bottom of it: what is above only repeats it.
fn why_broken(status: &Status) -> String {
    let mut bottom: &dyn StdError = status;
    while let Some(cause) = bottom.source() {
        bottom = cause;
    }
    let text = match bottom.downcast_ref::<Status>() {
        Some(status) => status.message().to_owned(),
        None => bottom.to_string(),
    };
    // A link to a library's manual helps nobody here.
    text.split_once(": https://").map_or(text.as_str(), |(text, _)| text).to_owned()
}
