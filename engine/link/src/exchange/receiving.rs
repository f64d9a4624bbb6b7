//! The pump at the receiver's end of a channel: from the stream into the task's inbox.
//!
//! It takes whatever comes at once, so a task that does not read holds up nobody else's frames, and gives leave for as much
//! as has left the inbox. Invariant: without barriers that overtake, the inbox holds no more than [`WINDOW_BYTES`] and one
//! frame.
//!
//! [`WINDOW_BYTES`]: super::WINDOW_BYTES

use std::task::{Context, Poll};

use floodmark_dataflow::{Frame, channel::Sender};
use floodmark_snapshot::{Error, Result};
use futures::StreamExt;

use super::{
    GRANT_BYTES_MIN,
    sending::Ended,
    wire::{self, FrameDecoder},
};
use crate::{
    envelope::Sealer,
    transport::{Incoming, Outgoing, Packet, Pipe},
};

/// Packets that are dealt with in one go before others get their turn.
const PACKETS_PER_POLL: usize = 32;

pub(super) struct Receiving {
    into: Sender,
    outgoing: Box<dyn Outgoing>,
    incoming: Incoming,
    decoder: FrameDecoder,
    sealer: Sealer,
    received: usize,
    granted: usize,
    ended: bool,
}

impl Receiving {
    pub(super) fn new(into: Sender, pipe: Pipe) -> Self {
        Self {
            into,
            outgoing: pipe.outgoing,
            incoming: pipe.incoming,
            decoder: FrameDecoder::default(),
            sealer: Sealer::default(),
            received: 0,
            granted: 0,
            ended: false,
        }
    }

    pub(super) async fn run(mut self) -> Result<Ended> {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    fn gone(&self) -> Poll<Result<Ended>> {
        Poll::Ready(Ok(if self.ended { Ended::Complete } else { Ended::Early }))
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Ended>> {
        for _ in 0..PACKETS_PER_POLL {
            match self.incoming.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(packet))) => match self.take(packet) {
                    Ok(true) => continue,
                    Ok(false) => return self.gone(),
                    Err(error) => return Poll::Ready(Err(error)),
                },
                // Nothing is missing.
                Poll::Ready(_) if self.ended => return self.gone(),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => return Poll::Ready(Err(Error::retry("the sender has gone before the end"))),
                Poll::Pending => {}
            }
            match self.poll_grant(context) {
                // The task has gone: nobody needs the rest.
                Poll::Ready(Ok(false)) => return self.gone(),
                Poll::Ready(Ok(true)) => continue,
                Poll::Ready(Err(_)) | Poll::Pending => {}
            }
            if self.into.signal().poll_wait(context).is_pending() {
                return Poll::Pending;
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// Puts a packet's frame into the inbox. False if the task has gone.
    fn take(&mut self, packet: Packet) -> Result<bool> {
        let weight = packet.weight();
        let frame = self.decoder.decode(packet)?;
        if self.ended {
            return Err(Error::corrupt("something came after the end"));
        }
        self.received += weight;
        let Some(frame) = frame else { return Ok(true) };
        self.ended = matches!(frame, Frame::End);
        Ok(self.into.send_weighing(frame, weight).is_ok())
    }

    /// Gives leave for what has left the inbox, when it is enough. Ready with false if the task has gone; pending when there
    /// is nothing to give: then the channel's signal tells.
    fn poll_grant(&mut self, context: &mut Context<'_>) -> Poll<Result<bool>> {
        // Less than this is left once enough has gone.
        let below = (self.received - self.granted + 1).saturating_sub(GRANT_BYTES_MIN);
        let Ok(held) = self.into.watch(below) else { return Poll::Ready(Ok(false)) };
        if held >= below {
            return Poll::Pending;
        }
        match self.outgoing.poll_ready(context) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        }
        let drained = self.received - held;
        let packet = wire::grant(&mut self.sealer, drained as u64)?;
        self.outgoing.send(packet)?;
        self.granted = drained;
        Poll::Ready(Ok(true))
    }
}
