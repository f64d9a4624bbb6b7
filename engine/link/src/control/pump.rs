//! Drives one control connection: queues to packets, packets to queues, heartbeats by the clock.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use floodmark_snapshot::{Env, Result};
use futures::{FutureExt, StreamExt, future::BoxFuture};
use tokio::sync::mpsc;

use super::{Connection, Heartbeat, Item, QUEUE_BYTES_MAX};
use crate::{
    envelope::{Opener, Sealer},
    transport::{Incoming, Outgoing, Packet, Pipe},
};

const MESSAGE: u8 = 1;
const HEARTBEAT: u8 = 2;
const GOODBYE: u8 = 3;
/// Packets that are dealt with in one go before others get their turn.
const PACKETS_PER_POLL: usize = 64;
/// The pump looks at the clock at least once per interval; if it did not for so many, the process was stopped.
const STOPPED_INTERVALS: u32 = 2;

pub(super) struct Pump {
    env: Env,
    connection: Arc<Connection>,
    heartbeat: Heartbeat,
    outgoing: Box<dyn Outgoing>,
    incoming: Incoming,
    sealer: Sealer,
    opener: Opener,
    /// What is to be sent; `None` after the goodbye.
    queue: Option<mpsc::Receiver<Item>>,
    arrived: mpsc::Sender<Bytes>,
    heard: Duration,
    spoke: Duration,
    /// When the clock was last looked at.
    looked: Duration,
    /// Completes when it is time to speak, or to give up.
    timer: Option<BoxFuture<'static, ()>>,
}

/// Why the pump has ended.
type Reason = String;

impl Pump {
    pub(super) fn new(
        env: Env,
        connection: Arc<Connection>,
        pipe: Pipe,
        heartbeat: Heartbeat,
        queue: mpsc::Receiver<Item>,
        arrived: mpsc::Sender<Bytes>,
    ) -> Self {
        let now = env.clock.monotonic();
        Self {
            env,
            connection,
            heartbeat,
            outgoing: pipe.outgoing,
            incoming: pipe.incoming,
            sealer: Sealer::default(),
            opener: Opener::default(),
            queue: Some(queue),
            arrived,
            heard: now,
            spoke: now,
            looked: now,
            timer: None,
        }
    }

    pub(super) async fn run(mut self) {
        let connection = self.connection.clone();
        let reason = {
            let mut given_up = std::pin::pin!(connection.given_up.notified());
            std::future::poll_fn(|context| {
                if given_up.as_mut().poll(context).is_ready() {
                    return Poll::Ready("given up".to_owned());
                }
                self.poll(context)
            })
            .await
        };
        // Before the queues close, so that whoever finds them closed finds the reason.
        connection.lose(reason);
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Reason> {
        for _ in 0..PACKETS_PER_POLL {
            // What has come is taken before the clock is looked at: whoever can be heard is not lost.
            if let Poll::Ready(packet) = self.incoming.poll_next_unpin(context) {
                if let Some(reason) = self.take(packet) {
                    return Poll::Ready(reason);
                }
                continue;
            }
            match self.poll_send(context) {
                Poll::Ready(Ok(true)) => continue,
                Poll::Ready(Ok(false)) | Poll::Pending => {}
                Poll::Ready(Err(reason)) => return Poll::Ready(reason),
            }
            match self.poll_timer(context) {
                Poll::Ready(Some(reason)) => return Poll::Ready(reason),
                Poll::Ready(None) => {}
                Poll::Pending => return Poll::Pending,
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// Deals with what came. Answers with why the connection is lost, if it is.
    fn take(&mut self, packet: Option<Result<Packet>>) -> Option<Reason> {
        let opened = match packet {
            Some(Ok(packet)) => self.opener.open(packet),
            Some(Err(error)) => Err(error),
            None if self.queue.is_none() => return Some("closed".into()),
            None => return Some("the peer has gone without a word".into()),
        };
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => return Some(error.to_string()),
        };
        self.heard = self.env.clock.monotonic();
        match opened.kind {
            HEARTBEAT => None,
            MESSAGE => {
                let length = opened.body.len();
                let waiting = self.connection.incoming_bytes.fetch_add(length, Ordering::Relaxed) + length;
                if self.arrived.is_closed() {
                    return Some("nobody receives any more".into());
                }
                let taken = waiting <= QUEUE_BYTES_MAX && self.arrived.try_send(opened.body).is_ok();
                (!taken).then(|| "this process takes messages too slowly: too many wait to be received".into())
            }
            GOODBYE => Some(format!("the peer has closed the connection: {}", String::from_utf8_lossy(&opened.body))),
            other => Some(format!("the peer sends what this process does not understand: a message of kind {other}")),
        }
    }

    /// Sends one thing, if there is one and room for it. True if it did.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<Result<bool, Reason>> {
        let Some(queue) = &mut self.queue else { return Poll::Ready(Ok(false)) };
        match self.outgoing.poll_ready(context) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error.to_string())),
            Poll::Ready(Ok(())) => {}
        }
        let due = self.env.clock.monotonic() >= self.spoke + self.heartbeat.interval;
        let (kind, body) = match queue.poll_recv(context) {
            Poll::Ready(Some(Item::Message(body))) => {
                self.connection.outgoing_bytes.fetch_sub(body.len(), Ordering::Relaxed);
                (MESSAGE, body)
            }
            Poll::Ready(Some(Item::Goodbye(reason))) => (GOODBYE, Bytes::from(reason)),
            Poll::Ready(None) => (GOODBYE, Bytes::from_static(b"nobody sends any more")),
            Poll::Pending if due => (HEARTBEAT, Bytes::new()),
            Poll::Pending => return Poll::Ready(Ok(false)),
        };
        let body = if body.is_empty() { Vec::new() } else { vec![body] };
        let sent = self.sealer.seal(kind, &[], Bytes::new(), body).and_then(|packet| self.outgoing.send(packet));
        if let Err(error) = sent {
            return Poll::Ready(Err(error.to_string()));
        }
        self.spoke = self.env.clock.monotonic();
        if kind == GOODBYE {
            // The peer ends the stream when it has read that; until then it must not break off.
            self.queue = None;
        }
        Poll::Ready(Ok(true))
    }

    /// Ready with nothing when it is time to speak, or with a reason when the peer has been silent for too long.
    fn poll_timer(&mut self, context: &mut Context<'_>) -> Poll<Option<Reason>> {
        let now = self.env.clock.monotonic();
        // Whoever was stopped itself for a while has heard nobody meanwhile. What waits for it comes within an interval.
        if now.saturating_sub(self.looked) >= self.heartbeat.interval * STOPPED_INTERVALS {
            self.heard = self.heard.max((now + self.heartbeat.interval).saturating_sub(self.heartbeat.timeout));
        }
        self.looked = now;
        let silence = now.saturating_sub(self.heard);
        if silence >= self.heartbeat.timeout {
            return Poll::Ready(Some(format!("the peer has been silent for {silence:.1?}")));
        }
        if self.timer.is_none() {
            let speak = (self.spoke + self.heartbeat.interval).saturating_sub(now);
            // Time to speak, but no room or nothing to say it with: an interval later again.
            let speak = if speak.is_zero() { self.heartbeat.interval } else { speak };
            let wait = speak.min(self.heartbeat.timeout - silence);
            self.timer = Some(self.env.runtime.sleep(wait));
        }
        match self.timer.as_mut().map(|timer| Pin::new(timer).poll_unpin(context)) {
            Some(Poll::Pending) => Poll::Pending,
            Some(Poll::Ready(())) | None => {
                self.timer = None;
                Poll::Ready(None)
            }
        }
    }
}
