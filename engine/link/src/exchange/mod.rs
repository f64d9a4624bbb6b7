//! What tasks send each other from process to process: one stream per channel, opened by the sender's process.
//!
//! To the tasks a remote channel looks like a local one. The sending task puts frames into a queue that a pump empties
//! ([`Exchange::connect`]); at the other end a pump fills the receiving task's inbox ([`Exchange::expect`]). Between them the
//! receiver gives leave in bytes, as its inbox drains.
//!
//! **What a channel holds at most.** Its queue at the sender: [`CHANNEL_BYTES_MAX`] and one frame. On its way and in the
//! inbox together: [`WINDOW_BYTES`] and one frame. A barrier that overtakes moves what is in the queue over to the inbox, and
//! the queue's bound counts it until it is drained: so the sum stays the same, but for what the router sends past the bound
//! (see [`floodmark_dataflow::exchange`]). Bytes are counted as they are on the wire; in the inbox they can take up to twice
//! as many, for columns that did not lie in the message as their type needs are copied, and the message stays with the rest.
//! Streams are apart: a channel that stands still stops no other.
//!
//! Invariants: frames arrive in the order in which they were sent, each once, or the channel is lost; only those of the
//! attempt that is under way arrive.
//!
//! [`CHANNEL_BYTES_MAX`]: floodmark_dataflow::channel::CHANNEL_BYTES_MAX

use std::{
    collections::{HashMap, HashSet},
    fmt,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use floodmark_dataflow::channel::{CHANNEL_BYTES_MAX, Inbox, Sender, Signal};
use floodmark_snapshot::{Attempt, Disposition, Env, Error, Result};
use futures::{
    FutureExt,
    future::{AbortHandle, Abortable},
};
use serde::{Deserialize, Serialize};

use crate::{
    tls::Role,
    transport::{Acceptor, Endpoint, Opening, Peer, Pipe, Transport, require},
};

mod receiving;
mod sending;
#[cfg(test)]
mod tests;
mod wire;

use receiving::Receiving;
use sending::{Ended, Sending};

/// What exchange streams are opened for: this word, then the channel.
pub const PURPOSE: &str = "exchange";
/// Bytes that may be on their way and in the receiver's inbox, of one channel.
pub const WINDOW_BYTES: usize = CHANNEL_BYTES_MAX;
/// Bytes that must have left the inbox before leave for them is given.
const GRANT_BYTES_MIN: usize = WINDOW_BYTES / 4;
/// How long a sender tries to open its stream: the receiver may be about to begin the attempt.
const OPEN_PATIENCE: Duration = Duration::from_secs(10);
/// How long it waits after the first try; twice as long after each other, up to the last.
const OPEN_RETRY: Duration = Duration::from_millis(10);
const OPEN_RETRY_MAX: Duration = Duration::from_millis(200);

/// A channel between two subtasks, in one run of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ChannelId {
    /// The run.
    pub attempt: Attempt,
    /// The edge's number in the graph.
    pub edge: u32,
    /// Index of the subtask that sends.
    pub from: u32,
    /// Index of the subtask that receives.
    pub to: u32,
}

impl fmt::Display for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.attempt, self.edge, self.from, self.to)
    }
}

impl FromStr for ChannelId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::abort(format!("not a channel: {text:?}"));
        let mut parts = text.split(' ');
        let mut number = || parts.next().ok_or_else(bad);
        let id = Self {
            attempt: Attempt(number()?.parse().map_err(|_| bad())?),
            edge: number()?.parse().map_err(|_| bad())?,
            from: number()?.parse().map_err(|_| bad())?,
            to: number()?.parse().map_err(|_| bad())?,
        };
        if parts.next().is_some() { Err(bad()) } else { Ok(id) }
    }
}

/// A channel that broke before its end: the attempt can't go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostChannel {
    /// Which.
    pub channel: ChannelId,
    /// Why.
    pub reason: String,
}

/// Is told of channels that are lost, at either end; not of those of an attempt that this process has stopped. When a whole
/// process goes, that is many calls: it must not block.
pub type OnLost = Arc<dyn Fn(LostChannel) + Send + Sync>;

/// The remote channels of a process: an [`Acceptor`] for streams of [`PURPOSE`].
pub struct Exchange {
    env: Env,
    transport: Arc<dyn Transport>,
    on_lost: OnLost,
    registry: Mutex<Registry>,
}

#[derive(Default)]
struct Registry {
    /// The newest attempt that was begun.
    attempt: Option<Attempt>,
    stopped: bool,
    /// Where the channels lead that have not been connected.
    expected: HashMap<ChannelId, Sender>,
    connected: HashSet<ChannelId>,
    pumps: Vec<AbortHandle>,
}

impl Registry {
    /// Whether the attempt is under way. Others that are older will never be again.
    fn admit(&self, attempt: Attempt) -> Result<()> {
        match self.attempt {
            Some(current) if attempt < current || (attempt == current && self.stopped) => {
                Err(Error::fenced(format!("attempt {attempt} is over")))
            }
            Some(current) if attempt == current => Ok(()),
            _ => Err(Error::retry(format!("attempt {attempt} has not begun here"))),
        }
    }

    fn stop(&mut self) {
        self.stopped = true;
        self.expected.clear();
        self.connected.clear();
        self.pumps.drain(..).for_each(|pump| pump.abort());
    }

    /// The work, which stops with the attempt.
    fn stoppable<F: Future>(&mut self, work: F) -> Abortable<F> {
        let (handle, registration) = AbortHandle::new_pair();
        self.pumps.push(handle);
        Abortable::new(work, registration)
    }
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange").field("attempt", &self.registry().attempt).finish_non_exhaustive()
    }
}

impl Exchange {
    /// Without channels.
    #[must_use]
    pub fn new(env: Env, transport: Arc<dyn Transport>, on_lost: OnLost) -> Arc<Self> {
        Arc::new(Self { env, transport, on_lost, registry: Mutex::default() })
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on this attempt is under way. Channels of an earlier one are closed, and nothing of it arrives any more.
    ///
    /// # Errors
    /// `Fenced` if this or a later attempt has been begun before.
    pub fn begin(&self, attempt: Attempt) -> Result<()> {
        let mut registry = self.registry();
        if let Some(current) = registry.attempt
            && attempt <= current
        {
            return Err(Error::fenced(format!("begin attempt {attempt}: attempt {current} has begun")));
        }
        registry.stop();
        *registry = Registry { attempt: Some(attempt), ..Registry::default() };
        Ok(())
    }

    /// Closes the channels of this attempt: tasks that send find their receivers gone. Nobody is told of a lost channel here;
    /// at the other ends they are lost, unless the attempt is stopped there too.
    pub fn stop(&self, attempt: Attempt) {
        let mut registry = self.registry();
        if registry.attempt == Some(attempt) {
            registry.stop();
        }
    }

    /// Lets a task of another process send into a channel of an inbox. The sender that comes from the inbox must have a
    /// signal of its own: it wakes the pump.
    ///
    /// # Errors
    /// `Fenced` or `Retry` when the channel's attempt is not under way; `Abort` when the channel is known already.
    pub fn expect(&self, channel: ChannelId, into: Sender) -> Result<()> {
        let mut registry = self.registry();
        registry.admit(channel.attempt)?;
        if registry.connected.contains(&channel) || registry.expected.contains_key(&channel) {
            return Err(Error::abort(format!("channel {channel} is expected twice")));
        }
        registry.expected.insert(channel, into);
        Ok(())
    }

    /// A channel to a task of another process. It takes frames at once; they go out when the stream is open. `task` wakes the
    /// task that sends.
    ///
    /// # Errors
    /// `Fenced` or `Retry` when the channel's attempt is not under way.
    pub fn connect(self: &Arc<Self>, channel: ChannelId, to: Endpoint, task: Arc<Signal>) -> Result<Sender> {
        let mut registry = self.registry();
        registry.admit(channel.attempt)?;
        let signal = Arc::new(Signal::default());
        let mut inbox = Inbox::new(signal.clone());
        let sender = inbox.channel(task);
        let exchange = self.clone();
        let pump = registry.stoppable(async move {
            let ended = match exchange.open(channel, &to).await {
                Ok(pipe) => Sending::new(inbox, signal, pipe).run().await,
                Err(error) => {
                    drop(inbox);
                    Err(error)
                }
            };
            let what = || format!("to subtask {} at {to}", channel.to);
            match ended {
                Ok(Ended::Complete) => {}
                Ok(Ended::Early) => exchange.lost(channel, format!("{}: the receiver has gone", what())),
                Err(error) => exchange.lost(channel, format!("{}: {error}", what())),
            }
        });
        self.env.runtime.spawn(Box::pin(pump.map(|_| ())));
        Ok(sender)
    }

    /// Opens a channel's stream; waits a while for a receiver that is not ready.
    async fn open(&self, channel: ChannelId, to: &Endpoint) -> Result<Pipe> {
        let started = self.env.clock.monotonic();
        let mut wait = OPEN_RETRY;
        loop {
            let opening = Opening { purpose: format!("{PURPOSE} {channel}"), hello: Bytes::new() };
            let error = match self.transport.open(to, Role::Worker, opening).await {
                Ok(pipe) => return Ok(pipe),
                Err(error) => error,
            };
            let waited = self.env.clock.monotonic().saturating_sub(started);
            if error.disposition() != Disposition::Retry || waited >= OPEN_PATIENCE {
                return Err(error);
            }
            self.env.runtime.sleep(wait).await;
            wait = (wait * 2).min(OPEN_RETRY_MAX);
        }
    }

    fn lost(&self, channel: ChannelId, reason: String) {
        if self.registry().admit(channel.attempt).is_err() {
            return;
        }
        (self.on_lost)(LostChannel { channel, reason });
    }
}

impl Acceptor for Arc<Exchange> {
    fn accept(&self, peer: Peer, opening: Opening, pipe: Pipe) -> Result<()> {
        require(&peer, Role::Worker, PURPOSE)?;
        let channel = opening.purpose.strip_prefix(PURPOSE).unwrap_or_default().trim_start();
        let channel: ChannelId = channel.parse()?;
        let mut registry = self.registry();
        registry.admit(channel.attempt)?;
        if registry.connected.contains(&channel) {
            return Err(Error::abort(format!("channel {channel} is connected already")));
        }
        let Some(into) = registry.expected.remove(&channel) else {
            return Err(Error::retry(format!("channel {channel} is not expected here")));
        };
        registry.connected.insert(channel);
        let exchange = self.clone();
        let pump = registry.stoppable(async move {
            if let Err(error) = Receiving::new(into, pipe).run().await {
                exchange.lost(channel, format!("from subtask {} ({peer}): {error}", channel.from));
            }
        });
        self.env.runtime.spawn(Box::pin(pump.map(|_| ())));
        Ok(())
    }
}
