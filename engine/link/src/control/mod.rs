//! What a coordinator and its workers tell each other: one stream per worker, opened by the worker.
//!
//! Messages are JSON, each in one packet. They arrive in order, each once, or the connection is lost: then the receiver says
//! why, and nothing comes after it. Both ends send heartbeats; whoever hears nothing for the timeout has lost the other. The
//! room knows nothing of what the messages mean.
//!
//! Invariants: [`ControlSender::send`] never waits; every queue is bounded, and one that overflows loses the connection.

use std::{
    fmt,
    marker::PhantomData,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use floodmark_snapshot::{Env, Error, Result};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::mpsc;

use crate::{
    tls::Role,
    transport::{Acceptor, Endpoint, Opening, Peer, Pipe, Transport, require},
};

mod pump;
#[cfg(test)]
mod tests;

/// What control streams are opened for.
pub const PURPOSE: &str = "control";
/// Bytes of a message.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Messages that wait in one direction of one connection, at either end.
pub const QUEUE_MAX: usize = 4096;
/// Bytes of the messages that wait.
pub const QUEUE_BYTES_MAX: usize = 64 << 20;
/// Connections that wait to be looked at.
const ACCEPTED_MAX: usize = 256;

/// How silence is told from loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// How often each end says that it is there, if it has nothing else to say.
    pub interval: Duration,
    /// How long a peer may be silent. More than an interval.
    pub timeout: Duration,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self { interval: Duration::from_secs(1), timeout: Duration::from_secs(3) }
    }
}

/// The connection is no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Why.
    pub reason: String,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Lost {}

enum Item {
    Message(Bytes),
    /// The last.
    Goodbye(String),
}

/// What both ends of the handles and the pump know of a connection.
#[derive(Default)]
struct Connection {
    lost: Mutex<Option<Lost>>,
    outgoing_bytes: AtomicUsize,
    incoming_bytes: AtomicUsize,
    /// Tells the pump that a sender has lost the connection.
    given_up: tokio::sync::Notify,
}

impl Connection {
    /// The first reason counts.
    fn lose(&self, reason: impl Into<String>) -> Lost {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.get_or_insert_with(|| Lost { reason: reason.into() }).clone()
    }

    fn lost(&self) -> Option<Lost> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Sends messages. The connection lives as long as one of its senders does.
pub struct ControlSender<M> {
    connection: Arc<Connection>,
    queue: mpsc::Sender<Item>,
    message: PhantomData<fn(M)>,
}

impl<M> Clone for ControlSender<M> {
    fn clone(&self) -> Self {
        Self { connection: self.connection.clone(), queue: self.queue.clone(), message: PhantomData }
    }
}

impl<M> fmt::Debug for ControlSender<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlSender").field("lost", &self.connection.lost()).finish_non_exhaustive()
    }
}

impl<M: Serialize> ControlSender<M> {
    /// Sends a message, without waiting. That it is taken does not mean that it arrives.
    ///
    /// # Errors
    /// `Abort` when the message can't be written as JSON or is longer than [`MESSAGE_BYTES_MAX`]: the connection goes on
    /// without it. `Retry` when the connection is lost; also when too much waits, for then it is lost now.
    pub fn send(&self, message: &M) -> Result<()> {
        let bytes = serde_json::to_vec(message).map_err(|e| Error::abort(format!("write a control message: {e}")))?;
        let length = bytes.len();
        if length > MESSAGE_BYTES_MAX {
            return Err(Error::abort(format!(
                "send a control message of {length} bytes: no more than {MESSAGE_BYTES_MAX} can be"
            )));
        }
        if let Some(lost) = self.connection.lost() {
            return Err(Error::retry(lost.reason));
        }
        let waiting = self.connection.outgoing_bytes.fetch_add(length, Ordering::Relaxed) + length;
        if waiting > QUEUE_BYTES_MAX || self.queue.try_send(Item::Message(bytes.into())).is_err() {
            let lost = self.connection.lose("the peer takes messages too slowly: too many wait to be sent");
            self.connection.given_up.notify_one();
            return Err(Error::retry(lost.reason));
        }
        Ok(())
    }
}

impl<M> ControlSender<M> {
    /// Ends the connection once what was sent before has gone out. The peer is told the reason.
    pub fn close(&self, reason: &str) {
        if self.queue.try_send(Item::Goodbye(reason.to_owned())).is_err() {
            self.connection.lose("closed");
            self.connection.given_up.notify_one();
        }
    }
}

/// Receives messages.
pub struct ControlReceiver<M> {
    connection: Arc<Connection>,
    queue: mpsc::Receiver<Bytes>,
    message: PhantomData<fn() -> M>,
}

impl<M> fmt::Debug for ControlReceiver<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlReceiver").field("lost", &self.connection.lost()).finish_non_exhaustive()
    }
}

impl<M: DeserializeOwned> ControlReceiver<M> {
    /// The next message. Can be dropped while it waits, without loss.
    ///
    /// # Errors
    /// [`Lost`], once all that arrived before has been taken; and from then on always.
    pub async fn recv(&mut self) -> Result<M, Lost> {
        let gone = || self.connection.lost().unwrap_or_else(|| Lost { reason: "the connection has ended".into() });
        let Some(bytes) = self.queue.recv().await else { return Err(gone()) };
        self.connection.incoming_bytes.fetch_sub(bytes.len(), Ordering::Relaxed);
        serde_json::from_slice(&bytes).map_err(|e| {
            let lost = self.connection.lose(format!("the peer sends what this process does not understand: {e}"));
            self.connection.given_up.notify_one();
            self.queue.close();
            while self.queue.try_recv().is_ok() {}
            lost
        })
    }
}

/// Puts both handles before a stream, and starts what drives it.
fn start<Out, In>(env: &Env, pipe: Pipe, heartbeat: Heartbeat) -> (ControlSender<Out>, ControlReceiver<In>) {
    let connection = Arc::new(Connection::default());
    let (to_send, queue) = mpsc::channel(QUEUE_MAX);
    let (arrived, received) = mpsc::channel(QUEUE_MAX);
    let pump = pump::Pump::new(env.clone(), connection.clone(), pipe, heartbeat, queue, arrived);
    env.runtime.spawn(Box::pin(pump.run()));
    (
        ControlSender { connection: connection.clone(), queue: to_send, message: PhantomData },
        ControlReceiver { connection, queue: received, message: PhantomData },
    )
}

/// The worker's side.
pub struct ControlClient {
    env: Env,
    transport: Arc<dyn Transport>,
    heartbeat: Heartbeat,
}

impl fmt::Debug for ControlClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlClient").field("heartbeat", &self.heartbeat).finish_non_exhaustive()
    }
}

impl ControlClient {
    /// For connections over this transport.
    #[must_use]
    pub fn new(env: Env, transport: Arc<dyn Transport>, heartbeat: Heartbeat) -> Self {
        Self { env, transport, heartbeat }
    }

    /// Connects to the coordinator and introduces this process with `hello`.
    ///
    /// # Errors
    /// `Retry` when the coordinator can't be reached; `Abort` when either end refuses the other.
    pub async fn connect<H, Up, Down>(
        &self,
        coordinator: &Endpoint,
        hello: &H,
    ) -> Result<(ControlSender<Up>, ControlReceiver<Down>)>
    where
        H: Serialize + Sync,
    {
        let hello = serde_json::to_vec(hello).map_err(|e| Error::abort(format!("write a hello: {e}")))?;
        let opening = Opening { purpose: PURPOSE.into(), hello: hello.into() };
        let pipe = self.transport.open(coordinator, Role::Coordinator, opening).await?;
        Ok(start(&self.env, pipe, self.heartbeat))
    }
}

/// A worker that has connected.
#[derive(Debug)]
pub struct Accepted<H, Up, Down> {
    /// Who it is, as its certificate says.
    pub peer: Peer,
    /// How it introduced itself.
    pub hello: H,
    /// To the worker.
    pub sender: ControlSender<Down>,
    /// From the worker.
    pub receiver: ControlReceiver<Up>,
}

/// The coordinator's side: an [`Acceptor`] for streams of [`PURPOSE`].
pub struct ControlServer<H, Up, Down> {
    env: Env,
    heartbeat: Heartbeat,
    accepted: mpsc::Sender<Accepted<H, Up, Down>>,
}

impl<H, Up, Down> fmt::Debug for ControlServer<H, Up, Down> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlServer").field("heartbeat", &self.heartbeat).finish_non_exhaustive()
    }
}

impl<H, Up, Down> ControlServer<H, Up, Down> {
    /// The acceptor, and the workers as they come.
    #[must_use]
    pub fn new(env: Env, heartbeat: Heartbeat) -> (Arc<Self>, mpsc::Receiver<Accepted<H, Up, Down>>) {
        let (accepted, workers) = mpsc::channel(ACCEPTED_MAX);
        (Arc::new(Self { env, heartbeat, accepted }), workers)
    }
}

impl<H, Up, Down> Acceptor for ControlServer<H, Up, Down>
where
    H: DeserializeOwned + Send + 'static,
    Up: 'static,
    Down: 'static,
{
    fn accept(&self, peer: Peer, opening: Opening, pipe: Pipe) -> Result<()> {
        require(&peer, Role::Worker, "control")?;
        let hello = serde_json::from_slice(&opening.hello)
            .map_err(|e| Error::abort(format!("control: the coordinator does not understand the hello: {e}")))?;
        let place = self
            .accepted
            .try_reserve()
            .map_err(|_| Error::retry("control: the coordinator is shutting down, or too many connect at once"))?;
        let (sender, receiver) = start(&self.env, pipe, self.heartbeat);
        place.send(Accepted { peer, hello, sender, receiver });
        Ok(())
    }
}
