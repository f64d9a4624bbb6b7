#![allow(clippy::disallowed_methods, reason = "tests wait for real")]

use std::pin::pin;

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use floodmark_dataflow::{Barrier, Batch, Frame, channel::Refused};
use floodmark_snapshot::{Epoch, JobId};
use futures::future::{Either, select};

use super::*;
use crate::transport::memory::{Host, Network};

const ID: ChannelId = ChannelId { attempt: Attempt(3), edge: 1, from: 0, to: 2 };

type Losses = Arc<Mutex<Vec<LostChannel>>>;

struct Process {
    host: Arc<Host>,
    exchange: Arc<Exchange>,
    losses: Losses,
}

async fn process(network: &Arc<Network>, name: &str) -> Process {
    let host = network.host(name, Role::Worker);
    let losses = Losses::default();
    let told = losses.clone();
    let exchange = Exchange::new(Env::system(), host.clone(), Arc::new(move |lost| told.lock().unwrap().push(lost)));
    host.listen(&Endpoint::from(""), Arc::new(exchange.clone())).await.unwrap();
    Process { host, exchange, losses }
}

fn network() -> Arc<Network> {
    Network::new(Env::system(), JobId { namespace: "default".into(), name: "a".into(), uid: "local".into() })
}

struct Reader {
    inbox: Inbox,
    signal: Arc<Signal>,
}

impl Reader {
    fn new() -> Self {
        let signal = Arc::new(Signal::default());
        Self { inbox: Inbox::new(signal.clone()), signal }
    }

    /// Where a pump puts frames in.
    fn channel(&mut self) -> Sender {
        self.inbox.channel(Arc::default())
    }

    async fn recv(&mut self) -> Frame {
        loop {
            match self.inbox.try_recv(|_| false) {
                Some((_, frame)) => return frame,
                None => std::future::poll_fn(|context| self.signal.poll_wait(context)).await,
            }
        }
    }
}

struct Writer {
    sender: Sender,
    signal: Arc<Signal>,
}

impl Writer {
    fn connect(process: &Process, id: ChannelId, to: &str) -> Self {
        let signal = Arc::new(Signal::default());
        Self { sender: process.exchange.connect(id, to.into(), signal.clone()).unwrap(), signal }
    }

    async fn send(&self, mut frame: Frame) -> Result<(), Refused> {
        loop {
            match self.sender.try_send(frame) {
                Err(Refused::Full(back)) => frame = back,
                other => return other,
            }
            std::future::poll_fn(|context| self.signal.poll_wait(context)).await;
        }
    }

    /// Sends batches until there is no room for so long. Answers with how many there were.
    async fn fill(&self) -> usize {
        let mut sent = 0;
        loop {
            let pause = pin!(tokio::time::sleep(Duration::from_millis(300)));
            match select(pin!(self.send(rows(0, ROWS))), pause).await {
                Either::Left((done, _)) => done.unwrap(),
                Either::Right(_) => return sent,
            }
            sent += 1;
            assert!(sent < 10_000, "nothing holds the sender back");
        }
    }
}

/// Rows of a batch that weighs 64 KiB and a little.
const ROWS: i64 = 8 << 10;

fn rows(from: i64, count: i64) -> Frame {
    let numbers: Int64Array = (from..from + count).collect();
    Frame::Batch(Batch::new(RecordBatch::try_from_iter([("n", Arc::new(numbers) as ArrayRef)]).unwrap()))
}

async fn settled(what: impl Fn() -> bool) {
    for _ in 0..500 {
        if what() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it does not come about");
}

/// A channel from `one` to `two`.
async fn connected() -> (Arc<Network>, Process, Process, Writer, Reader) {
    let network = network();
    let (one, two) = (process(&network, "one").await, process(&network, "two").await);
    let mut reader = Reader::new();
    for process in [&one, &two] {
        process.exchange.begin(ID.attempt).unwrap();
    }
    two.exchange.expect(ID, reader.channel()).unwrap();
    let writer = Writer::connect(&one, ID, "two");
    (network, one, two, writer, reader)
}

#[test]
fn a_channel_is_read_back_from_its_text() {
    assert_eq!(ID.to_string().parse::<ChannelId>().unwrap(), ID);
    for text in ["", "1 2 3", "1 2 3 4 5", "1 2 3 x", "1  2 3 4", "-1 2 3 4", "1 2 3 4294967296"] {
        assert!(text.parse::<ChannelId>().is_err(), "{text:?}");
    }
}

#[tokio::test]
async fn frames_arrive_in_order_and_more_than_fit_wait() {
    let (_network, one, two, writer, mut reader) = connected().await;
    let send = async {
        for number in 0..200 {
            writer.send(rows(number * ROWS, ROWS)).await.unwrap();
            writer.send(Frame::Barrier(Barrier::checkpoint(Epoch(number as u64)))).await.unwrap();
        }
        writer.send(Frame::End).await.unwrap();
    };
    let recv = async {
        for number in 0..200 {
            let Frame::Batch(batch) = reader.recv().await else { panic!("rows {number}") };
            let Frame::Batch(expected) = rows(number * ROWS, ROWS) else { unreachable!() };
            assert_eq!(batch.rows, expected.rows);
            let Frame::Barrier(barrier) = reader.recv().await else { panic!("barrier {number}") };
            assert_eq!(barrier.epoch, Epoch(number as u64));
        }
        assert!(matches!(reader.recv().await, Frame::End));
    };
    futures::join!(send, recv);
    assert!(writer.sender.has_room().is_ok(), "as with a local channel, until the receiver goes");
    drop(reader);
    settled(|| writer.sender.has_room().is_err()).await;
    for process in [&one, &two] {
        assert_eq!(*process.losses.lock().unwrap(), []);
    }
}

#[tokio::test]
async fn a_receiver_that_does_not_read_holds_its_sender_back_at_the_bound() {
    let (_network, _one, _two, writer, mut reader) = connected().await;
    let sent = writer.fill().await;
    let bytes = sent * (ROWS as usize * 8);
    let bound = CHANNEL_BYTES_MAX + WINDOW_BYTES;
    assert!(bytes > bound / 2 && bytes <= bound + 2 * (66 << 10), "{bytes} of {bound}");
    for _ in 0..sent {
        assert!(matches!(reader.recv().await, Frame::Batch(_)));
    }
    // Leave for the last quarter of the window is given with what comes next.
    let again = writer.fill().await;
    assert!((sent - 5..=sent).contains(&again), "{again} after {sent}");
}

#[tokio::test]
async fn an_overtaking_barrier_brings_what_waits_before_it_though_the_receiver_does_not_read() {
    let (_network, _one, _two, writer, mut reader) = connected().await;
    let sent = writer.fill().await;
    writer.sender.send_past_bound(rows(0, 1)).unwrap();
    writer.sender.send_past_bound(Frame::Overtaking(Barrier::checkpoint(Epoch(1)))).unwrap();
    writer.sender.send_past_bound(rows(0, 2)).unwrap();
    settled(|| !reader.inbox.waiting_barriers().is_empty()).await;
    assert_eq!(reader.inbox.waiting_barriers()[0].overtaking, Epoch(1));
    let ahead = reader.inbox.take_barrier(0, Epoch(1));
    assert_eq!((ahead.len(), ahead.last().map(Batch::len)), (sent + 1, Some(1)), "all rows before the barrier");
    assert!(!writer.sender.has_room().unwrap(), "what went out without leave is still waited for");
    for _ in 0..=sent {
        assert!(matches!(reader.recv().await, Frame::Batch(_)));
    }
    let Frame::Batch(last) = reader.recv().await else { panic!("rows behind the barrier") };
    assert_eq!(last.len(), 2);
}

#[tokio::test]
async fn a_barrier_in_order_waits_with_the_rows_until_it_is_told_to_overtake() {
    let (_network, _one, _two, writer, mut reader) = connected().await;
    let sent = writer.fill().await;
    writer.sender.send_past_bound(Frame::Barrier(Barrier::checkpoint(Epoch(1)))).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(reader.inbox.waiting_barriers().is_empty(), "it waits in the queue at the sender");
    writer.sender.overtake(Epoch(1));
    settled(|| !reader.inbox.waiting_barriers().is_empty()).await;
    assert_eq!(reader.inbox.take_barrier(0, Epoch(1)).len(), sent);
}

#[tokio::test]
async fn however_many_barriers_overtake_a_channel_holds_no_more() {
    let (_network, _one, _two, writer, mut reader) = connected().await;
    let mut sent = writer.fill().await;
    let first = sent;
    for epoch in (1..=20).map(Epoch) {
        writer.sender.send_past_bound(Frame::Overtaking(Barrier::checkpoint(epoch))).unwrap();
        settled(|| !reader.inbox.waiting_barriers().is_empty()).await;
        assert_eq!(reader.inbox.take_barrier(0, epoch).len(), sent, "the rows are still there");
        while writer.sender.try_send(rows(0, ROWS)).is_ok() {
            sent += 1;
        }
    }
    assert!(sent <= first + 1, "{sent} after {first}");
    for _ in 0..sent {
        assert!(matches!(reader.recv().await, Frame::Batch(_)));
    }
    assert!(writer.fill().await > 0);
}

#[tokio::test]
async fn frames_of_other_attempts_and_channels_are_refused() {
    let (_network, one, two, _writer, mut reader) = connected().await;
    let two_endpoint = Endpoint::from("two");
    let open = |id: ChannelId| {
        let opening = Opening { purpose: format!("{PURPOSE} {id}"), hello: Bytes::new() };
        one.host.open(&two_endpoint, Role::Worker, opening)
    };
    settled(|| two.exchange.registry().connected.contains(&ID)).await;
    for (id, disposition, expected) in [
        (ChannelId { attempt: Attempt(2), ..ID }, Disposition::Fenced, "attempt 2 is over"),
        (ChannelId { attempt: Attempt(4), ..ID }, Disposition::Retry, "has not begun"),
        (ChannelId { to: 9, ..ID }, Disposition::Retry, "not expected"),
        (ID, Disposition::Abort, "connected already"),
    ] {
        let refused = open(id).await.unwrap_err();
        assert_eq!(refused.disposition(), disposition, "{refused}");
        assert!(refused.to_string().contains(expected), "{refused}");
    }
    let twice = two.exchange.expect(ID, reader.channel()).unwrap_err();
    assert!(twice.to_string().contains("twice"), "{twice}");
    two.exchange.stop(ID.attempt);
    assert_eq!(open(ID).await.unwrap_err().disposition(), Disposition::Fenced);
    assert_eq!(two.exchange.begin(ID.attempt).unwrap_err().disposition(), Disposition::Fenced);
}

#[tokio::test]
async fn a_sender_waits_for_a_receiver_that_has_not_begun() {
    let network = network();
    let (one, two) = (process(&network, "one").await, process(&network, "two").await);
    one.exchange.begin(ID.attempt).unwrap();
    let writer = Writer::connect(&one, ID, "two");
    writer.send(Frame::Watermark(7)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut reader = Reader::new();
    two.exchange.begin(ID.attempt).unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    two.exchange.expect(ID, reader.channel()).unwrap();
    assert!(matches!(reader.recv().await, Frame::Watermark(7)));
    assert_eq!(*one.losses.lock().unwrap(), []);
}

#[tokio::test]
async fn a_broken_stream_is_lost_at_both_ends_and_the_sender_finds_its_receiver_gone() {
    let (network, one, two, writer, mut reader) = connected().await;
    writer.send(rows(0, 1)).await.unwrap();
    assert!(matches!(reader.recv().await, Frame::Batch(_)));
    network.sever("one", "two");
    settled(|| matches!(writer.sender.try_send(Frame::Idle), Err(Refused::Closed))).await;
    for process in [&one, &two] {
        settled(|| process.losses.lock().unwrap().len() == 1).await;
        let lost = process.losses.lock().unwrap()[0].clone();
        assert_eq!(lost.channel, ID);
        assert!(lost.reason.contains("reset"), "{}", lost.reason);
    }
}

#[tokio::test]
async fn a_sender_that_waits_for_room_is_woken_when_its_receiver_dies() {
    let (_network, _one, two, writer, _reader) = connected().await;
    writer.fill().await;
    let waits = writer.send(Frame::Idle);
    two.host.kill();
    let closed = tokio::time::timeout(Duration::from_secs(5), waits).await.expect("it is woken");
    assert!(matches!(closed, Err(Refused::Closed)));
}

#[tokio::test]
async fn a_frame_that_arrives_twice_loses_the_channel() {
    let (network, _one, two, writer, mut reader) = connected().await;
    writer.send(rows(0, 1)).await.unwrap();
    assert!(matches!(reader.recv().await, Frame::Batch(_)));
    network.duplicate_next("one", "two");
    writer.send(rows(1, 2)).await.unwrap();
    settled(|| two.losses.lock().unwrap().len() == 1).await;
    assert!(two.losses.lock().unwrap()[0].reason.contains("was due"));
    assert!(matches!(reader.recv().await, Frame::Batch(batch) if batch.len() == 2));
    assert!(reader.inbox.try_recv(|_| false).is_none(), "once");
}

#[tokio::test]
async fn a_receiver_that_goes_closes_the_channel_and_a_stopped_attempt_loses_none() {
    let (_network, one, two, writer, reader) = connected().await;
    writer.send(rows(0, 1)).await.unwrap();
    settled(|| two.exchange.registry().connected.contains(&ID)).await;
    drop(reader);
    settled(|| matches!(writer.sender.try_send(Frame::Idle), Err(Refused::Closed))).await;
    settled(|| one.losses.lock().unwrap().iter().any(|l| l.reason.contains("the receiver has gone"))).await;
    assert_eq!(*two.losses.lock().unwrap(), []);

    let (_network, one, two, writer, _reader) = connected().await;
    settled(|| two.exchange.registry().connected.contains(&ID)).await;
    one.exchange.stop(ID.attempt);
    settled(|| matches!(writer.sender.try_send(Frame::Idle), Err(Refused::Closed))).await;
    settled(|| two.losses.lock().unwrap().len() == 1).await;
    assert_eq!(*one.losses.lock().unwrap(), []);
    assert!(one.exchange.connect(ID, "two".into(), Arc::default()).is_err());
}

#[tokio::test]
async fn a_new_attempt_closes_the_channels_of_the_old() {
    let (_network, one, two, writer, mut reader) = connected().await;
    settled(|| two.exchange.registry().connected.contains(&ID)).await;
    let next = ChannelId { attempt: ID.attempt.next(), ..ID };
    for process in [&one, &two] {
        process.exchange.begin(next.attempt).unwrap();
    }
    settled(|| matches!(writer.sender.try_send(Frame::Idle), Err(Refused::Closed))).await;
    let mut new = Reader::new();
    two.exchange.expect(next, new.channel()).unwrap();
    let writer = Writer::connect(&one, next, "two");
    writer.send(Frame::Watermark(1)).await.unwrap();
    assert!(matches!(new.recv().await, Frame::Watermark(1)));
    assert!(reader.inbox.try_recv(|_| false).is_none());
    assert!(one.losses.lock().unwrap().is_empty() && two.losses.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_cut_holds_frames_up_and_a_long_one_loses_the_channel() {
    let (network, one, two, writer, mut reader) = connected().await;
    writer.send(Frame::Watermark(1)).await.unwrap();
    assert!(matches!(reader.recv().await, Frame::Watermark(1)));
    network.cut("one", "two");
    writer.send(Frame::Watermark(2)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(reader.inbox.try_recv(|_| false).is_none());
    network.heal("one", "two");
    assert!(matches!(reader.recv().await, Frame::Watermark(2)));
    network.cut("one", "two");
    settled(|| [&one, &two].iter().all(|p| p.losses.lock().unwrap().len() == 1)).await;
}

#[tokio::test]
async fn slow_links_deliver_everything_late_and_in_order() {
    let (network, _one, _two, writer, mut reader) = connected().await;
    writer.send(Frame::Idle).await.unwrap();
    reader.recv().await;
    network.delay("one", "two", Duration::from_millis(100));
    let begin = Env::system();
    for number in 1..=20 {
        writer.send(rows(number, 1)).await.unwrap();
    }
    for number in 1..=20 {
        let Frame::Batch(batch) = reader.recv().await else { panic!() };
        let Frame::Batch(same) = rows(number, 1) else { unreachable!() };
        assert_eq!(batch.rows, same.rows);
    }
    assert!(begin.clock.monotonic() >= Duration::from_millis(100));
}
