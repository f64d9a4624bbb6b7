//! The seam to the network: streams of packets between two processes of a job.
//!
//! [`Transport`] opens streams and listens for them, [`Acceptor`] decides about those that come in, [`Outgoing`] and
//! [`Incoming`] are the two ends of a stream. Control and exchange are built on these alone. [`grpc`] is the real one;
//! [`memory`] is for the simulator and for tests, with cuts, delays and duplicates.
//!
//! What a transport promises: the packets of a stream arrive in order, each once, or the stream ends. Whoever relies on that
//! checks it all the same ([`crate::envelope`]). It does not promise to notice that a peer is silent.

use std::{
    fmt,
    task::{Context, Poll},
};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use floodmark_snapshot::{Error, Result};
use futures::stream::BoxStream;
use std::sync::Arc;

use crate::tls::{Role, Subject};

pub mod grpc;
pub mod memory;

/// Bytes that a packet may have. A longer one is refused at both ends.
pub const PACKET_BYTES_MAX: usize = 64 << 20;

/// What travels on a stream at once: one `FlightData`.
#[derive(Clone, Debug, Default)]
pub struct Packet {
    /// What the packet is: see [`crate::envelope`]. Becomes `app_metadata`.
    pub metadata: Bytes,
    /// The header of an Arrow IPC message; else empty. Becomes `data_header`.
    pub header: Bytes,
    /// The body, in pieces that have not been copied together. Becomes `data_body`.
    pub body: Vec<Bytes>,
}

impl Packet {
    /// Bytes of all its parts: what it weighs on a channel, the same at both ends.
    #[must_use]
    pub fn weight(&self) -> usize {
        self.metadata.len() + self.header.len() + self.body.iter().map(Bytes::len).sum::<usize>()
    }

    /// The body in one piece: a copy only if it came in several.
    #[must_use]
    pub fn into_body(mut self) -> Bytes {
        if self.body.len() == 1 {
            return self.body.pop().unwrap_or_default();
        }
        let mut whole = BytesMut::with_capacity(self.body.iter().map(Bytes::len).sum());
        self.body.iter().for_each(|piece| whole.extend_from_slice(piece));
        whole.freeze()
    }
}

/// Where a process listens: `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Endpoint(pub String);

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Endpoint {
    fn from(endpoint: &str) -> Self {
        Self(endpoint.to_owned())
    }
}

/// Who is at the other end, as its certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Job and role.
    pub subject: Subject,
    /// Where it is, for people.
    pub address: String,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.subject.role, self.address)
    }
}

/// What a stream is opened for.
#[derive(Clone, Debug)]
pub struct Opening {
    /// `control`, or `exchange` with a channel: the descriptor's command. The first word tells who accepts it.
    pub purpose: String,
    /// What goes along with it.
    pub hello: Bytes,
}

/// The end of a stream into which packets go. Dropping it ends the stream in order: what was sent arrives, as long as the
/// other direction of the stream is not dropped with it.
pub trait Outgoing: Send {
    /// Ready when a packet can be sent.
    ///
    /// # Errors
    /// When the stream is broken or the peer has ended it.
    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<()>>;

    /// Sends a packet. Only after [`Outgoing::poll_ready`], once.
    ///
    /// # Errors
    /// See there.
    fn send(&mut self, packet: Packet) -> Result<()>;
}

/// The end of a stream from which packets come: an error if it breaks, nothing more after it or when the peer has ended it.
pub type Incoming = BoxStream<'static, Result<Packet>>;

/// Both directions of a stream.
pub struct Pipe {
    /// To the peer.
    pub outgoing: Box<dyn Outgoing>,
    /// From the peer.
    pub incoming: Incoming,
}

impl fmt::Debug for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pipe")
    }
}

/// Decides about streams that others open.
pub trait Acceptor: Send + Sync {
    /// Takes the stream, or refuses it: then the peer is told why. Must not block.
    ///
    /// # Errors
    /// Why the stream is refused. What the peer is to do about it goes along.
    fn accept(&self, peer: Peer, opening: Opening, pipe: Pipe) -> Result<()>;
}

/// A process that listens. Streams that were accepted live on their own, until [`Listening::close`].
#[async_trait]
pub trait Listening: Send + Sync {
    /// Where it really listens.
    fn endpoint(&self) -> Endpoint;

    /// Takes no more streams, ends those that others opened, and waits until that is done.
    async fn close(&self);
}

/// A process's way to the others of its job.
#[async_trait]
pub trait Transport: Send + Sync {
    /// Opens a stream to a process that must have this role.
    ///
    /// # Errors
    /// `Retry` when it can't be reached or is not ready, `Abort` when either end refuses the other; else what the acceptor
    /// said.
    async fn open(&self, to: &Endpoint, role: Role, opening: Opening) -> Result<Pipe>;

    /// Listens; port 0 stands for any that is free.
    ///
    /// # Errors
    /// `Abort` when it can't.
    async fn listen(&self, at: &Endpoint, acceptor: Arc<dyn Acceptor>) -> Result<Box<dyn Listening>>;
}

/// The acceptors of a process, by the first word of what a stream is opened for.
#[derive(Default)]
pub struct Acceptors(Vec<(&'static str, Arc<dyn Acceptor>)>);

impl Acceptors {
    /// With one more. `word` is [`crate::control::PURPOSE`] or [`crate::exchange::PURPOSE`].
    #[must_use]
    pub fn with(mut self, word: &'static str, acceptor: Arc<dyn Acceptor>) -> Self {
        self.0.push((word, acceptor));
        self
    }
}

impl Acceptor for Acceptors {
    fn accept(&self, peer: Peer, opening: Opening, pipe: Pipe) -> Result<()> {
        let word = opening.purpose.split(' ').next().unwrap_or_default();
        match self.0.iter().find(|(w, _)| *w == word) {
            Some((_, acceptor)) => acceptor.accept(peer, opening, pipe),
            None => Err(Error::abort(format!("this process takes no streams for {word:?}"))),
        }
    }
}

/// Refuses a peer whose role is another.
pub(crate) fn require(peer: &Peer, role: Role, what: &str) -> Result<()> {
    if peer.subject.role == role {
        return Ok(());
    }
    Err(Error::abort(format!("{what}: the peer is a {}, but must be a {role}", peer.subject)))
}
