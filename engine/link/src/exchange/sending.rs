//! The pump at the sender's end of a channel: from the queue that the task fills to the stream.
//!
//! It sends as long as the receiver has given leave for at least a byte. When a barrier that overtakes is in the queue,
//! everything up to it goes out at once; what that takes beyond the leave counts against the queue's bound until the
//! receiver has caught up, so that barrier after barrier can't carry more and more away.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll},
};

use floodmark_dataflow::{
    Frame,
    channel::{Inbox, Signal},
};
use floodmark_snapshot::{Epoch, Error, Result};
use futures::StreamExt;

use super::{
    WINDOW_BYTES,
    wire::{FrameEncoder, read_grant},
};
use crate::{
    envelope::Opener,
    transport::{Incoming, Outgoing, Packet, Pipe},
};

/// Frames that are dealt with in one go before others get their turn.
const FRAMES_PER_POLL: usize = 32;

/// Why a pump has ended, if not by an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Everything has been sent, and the receiver has gone.
    Complete,
    /// The receiver has gone before.
    Early,
}

pub(super) struct Sending {
    inbox: Inbox,
    signal: Arc<Signal>,
    outgoing: Box<dyn Outgoing>,
    incoming: Incoming,
    encoder: FrameEncoder,
    opener: Opener,
    /// What the last frame became, as far as it has not been sent.
    packets: VecDeque<Packet>,
    sent: u64,
    granted: u64,
    owed: usize,
    ended: bool,
}

impl Sending {
    /// Sends what comes into the only channel of `inbox`, whose signal this is.
    pub(super) fn new(inbox: Inbox, signal: Arc<Signal>, pipe: Pipe) -> Self {
        Self {
            inbox,
            signal,
            outgoing: pipe.outgoing,
            incoming: pipe.incoming,
            encoder: FrameEncoder::default(),
            opener: Opener::default(),
            packets: VecDeque::new(),
            sent: 0,
            granted: 0,
            owed: 0,
            ended: false,
        }
    }

    pub(super) async fn run(mut self) -> Result<Ended> {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Ended>> {
        for _ in 0..FRAMES_PER_POLL {
            while let Poll::Ready(packet) = self.incoming.poll_next_unpin(context) {
                match packet {
                    Some(packet) => {
                        if let Err(error) = packet.and_then(|packet| self.grant(packet)) {
                            // Once all is sent, how the stream ends says nothing.
                            return Poll::Ready(if self.ended { Ok(Ended::Complete) } else { Err(error) });
                        }
                    }
                    None => return Poll::Ready(Ok(if self.ended { Ended::Complete } else { Ended::Early })),
                }
            }
            match self.poll_packets(context) {
                Poll::Ready(Ok(())) => {}
                // What the receiver has to say comes on the other direction of the stream.
                Poll::Ready(Err(_)) | Poll::Pending => return Poll::Pending,
            }
            if let Some(frame) = self.next() {
                self.ended = matches!(frame, Frame::End);
                if let Err(error) = self.encoder.encode(frame, &mut self.packets) {
                    return Poll::Ready(Err(error));
                }
                let weight: usize = self.packets.iter().map(Packet::weight).sum();
                self.sent += weight as u64;
                self.account();
            } else if self.signal.poll_wait(context).is_pending() {
                return Poll::Pending;
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// Sends what the last frame became.
    fn poll_packets(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        while !self.packets.is_empty() {
            match self.outgoing.poll_ready(context) {
                Poll::Ready(Ok(())) => {}
                other => return other,
            }
            if let Some(packet) = self.packets.pop_front()
                && let Err(error) = self.outgoing.send(packet)
            {
                return Poll::Ready(Err(error));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// The next frame that may go out.
    fn next(&mut self) -> Option<Frame> {
        let leave = self.sent < self.granted + WINDOW_BYTES as u64;
        let may = leave || self.inbox.waiting_barriers().iter().any(|w| w.overtaking > Epoch::default());
        if !may || self.ended {
            return None;
        }
        self.inbox.try_recv(|_| false).map(|(_, frame)| frame)
    }

    fn grant(&mut self, packet: Packet) -> Result<()> {
        let total = read_grant(&mut self.opener, packet)?;
        if total < self.granted || total > self.sent {
            return Err(Error::corrupt(format!("the receiver has taken {total} bytes of {}", self.sent)));
        }
        self.granted = total;
        self.account();
        Ok(())
    }

    /// Lets the queue know what is on its way without leave.
    fn account(&mut self) {
        let owed = self.sent.saturating_sub(self.granted + WINDOW_BYTES as u64) as usize;
        if owed != self.owed {
            self.owed = owed;
            self.inbox.owe(0, owed);
        }
    }
}
