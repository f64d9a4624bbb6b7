//! Channels between two processes over real sockets.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait for real, and fail by panic")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use arrow::array::{ArrayRef, DictionaryArray, Int64Array, RecordBatch, StringArray};
use floodmark_dataflow::{
    Barrier, BarrierKind, Batch, Frame,
    channel::{CHANNEL_BYTES_MAX, Refused},
};
use floodmark_link::{
    exchange::WINDOW_BYTES,
    tls::{CERTIFICATE_LIFETIME, Role},
    transport::grpc::{GrpcTransport, Settings},
};
use floodmark_snapshot::{Env, Epoch};

mod common;
use common::{PATIENCE, Proxy, Worker, authority, channel, settled, subject, transport};

/// Rows of eight bytes, a batch of 64 KiB.
const ROWS: i64 = 8 << 10;

fn rows(from: i64, count: i64) -> Frame {
    let numbers: Int64Array = (from..from + count).collect();
    Frame::Batch(Batch::new(RecordBatch::try_from_iter([("n", Arc::new(numbers) as ArrayRef)]).unwrap()))
}

async fn two() -> (Worker, Worker) {
    let authority = authority();
    let [one, two] = [0; 2].map(|_| transport(&authority, Role::Worker));
    (Worker::start(one).await, Worker::start(two).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_frame_arrives_as_it_was_sent() {
    let (one, two) = two().await;
    let mut reader = two.expect(channel(0));
    let writer = one.connect(channel(0), &two.listening.endpoint());
    let words: DictionaryArray<arrow::datatypes::Int32Type> = ["x", "y", "x", "z"].into_iter().collect();
    let texts = StringArray::from(vec![Some("a"), None, Some("a longer text than the others"), Some("")]);
    let batch = Batch {
        rows: RecordBatch::try_from_iter([("w", Arc::new(words) as ArrayRef), ("t", Arc::new(texts) as _)]).unwrap(),
        hashes: Some(vec![1, 2, u64::MAX, 4].into()),
    };
    let barrier = Barrier { epoch: Epoch(7), kind: BarrierKind::Drain, whole: true };
    let frames = [
        Frame::Idle,
        Frame::Batch(batch.clone()),
        Frame::Watermark(-5),
        Frame::Barrier(barrier),
        Frame::Batch(Batch::new(batch.rows.slice(1, 2))),
        Frame::Overtaking(Barrier::checkpoint(Epoch(8))),
        Frame::End,
    ];
    for frame in frames.clone() {
        writer.send(frame).await.unwrap();
    }
    for frame in frames {
        match (reader.recv().await, frame) {
            (Frame::Batch(a), Frame::Batch(b)) => assert_eq!((a.rows, a.hashes), (b.rows, b.hashes)),
            (a, b) => assert_eq!(format!("{a:?}"), format!("{b:?}")),
        }
    }
    drop(reader);
    settled("the channel is closed", || writer.sender.has_room().is_err()).await;
    assert_eq!((one.lost(), two.lost()), (vec![], vec![]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_stands_still_holds_no_more_than_its_bound_and_up_no_other() {
    let (one, two) = two().await;
    let mut stalled = two.expect(channel(0));
    let mut fast = two.expect(channel(1));
    let at = two.listening.endpoint();
    let (to_stalled, to_fast) = (one.connect(channel(0), &at), one.connect(channel(1), &at));
    let frame = rows(0, ROWS);
    let sent = to_stalled.fill(&frame).await;
    let (bytes, bound) = (sent * ROWS as usize * 8, CHANNEL_BYTES_MAX + WINDOW_BYTES);
    assert!(bytes > bound / 2 && bytes <= bound + 2 * (66 << 10), "{bytes} of {bound}");
    // Far more than any window of HTTP/2.
    let count = (256 << 20) / (ROWS * 8);
    let send = async {
        for number in 0..count {
            to_fast.send(rows(number, ROWS)).await.unwrap();
        }
    };
    let recv = async {
        for number in 0..count {
            let batch = fast.rows().await;
            assert_eq!(batch.rows.column(0).len() as i64, ROWS, "batch {number}");
        }
    };
    tokio::time::timeout(PATIENCE * 3, async { tokio::join!(send, recv) }).await.expect("the fast one is not held up");
    assert!(matches!(to_stalled.sender.try_send(Frame::Idle), Err(Refused::Full(_))), "the other still stands");
    for _ in 0..sent {
        stalled.rows().await;
    }
    // Leave for the last quarter of the window is given with what comes next.
    let again = to_stalled.fill(&frame).await;
    assert!((sent - 5..=sent).contains(&again), "{again} after {sent}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_channels_share_a_connection_and_all_that_stand_still_hold_up_none() {
    let (one, two) = two().await;
    let at = two.listening.endpoint();
    let mut readers: Vec<_> = (0..250).map(|number| two.expect(channel(number))).collect();
    let writers: Vec<_> = (0..250).map(|number| one.connect(channel(number), &at)).collect();
    // All but the last are full: as much as the connection's window.
    let frame = rows(0, 16 * ROWS);
    for writer in &writers[..249] {
        for _ in 0..1000 {
            if writer.sender.try_send(frame.clone()).is_err() {
                break;
            }
        }
    }
    settled("the stalled ones have sent what they may", || {
        writers[..249].iter().all(|w| w.sender.try_send(frame.clone()).is_err())
    })
    .await;
    let send = async {
        for number in 0..100 {
            writers[249].send(rows(number, ROWS)).await.unwrap();
        }
    };
    let recv = async {
        for _ in 0..100 {
            readers[249].rows().await;
        }
    };
    tokio::join!(send, recv);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overtaking_barrier_passes_though_nobody_reads() {
    let (one, two) = two().await;
    let mut reader = two.expect(channel(0));
    let writer = one.connect(channel(0), &two.listening.endpoint());
    let sent = writer.fill(&rows(0, ROWS)).await;
    writer.sender.send_past_bound(Frame::Barrier(Barrier::checkpoint(Epoch(1)))).unwrap();
    writer.sender.overtake(Epoch(1));
    settled("the barrier is there", || !reader.inbox.waiting_barriers().is_empty()).await;
    assert_eq!(reader.inbox.take_barrier(0, Epoch(1)).len(), sent);
    assert!(!writer.sender.has_room().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_connection_is_found_by_pings_and_loses_its_channels_at_both_ends() {
    let authority = authority();
    let quick = Settings {
        ping_interval: Duration::from_millis(200),
        ping_timeout: Duration::from_millis(400),
        ..Settings::default()
    };
    let transport = || {
        let identity = authority.identity(&subject("a", Role::Worker), CERTIFICATE_LIFETIME).unwrap();
        GrpcTransport::new(Env::system(), Arc::new(Arc::new(identity)), quick)
    };
    let (one, two) = (Worker::start(transport()).await, Worker::start(transport()).await);
    let proxy = Proxy::before(two.listening.endpoint()).await;
    let mut readers: Vec<_> = (0..3).map(|number| two.expect(channel(number))).collect();
    let writers: Vec<_> = (0..3).map(|number| one.connect(channel(number), &proxy.endpoint)).collect();
    for (writer, reader) in writers.iter().zip(&mut readers) {
        writer.send(rows(0, 1)).await.unwrap();
        reader.rows().await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((one.lost(), two.lost()), (vec![], vec![]), "idle is not lost");
    proxy.stop();
    let cut = Instant::now();
    settled("all are lost at both ends", || one.lost().len() == 3 && two.lost().len() == 3).await;
    assert!(cut.elapsed() < Duration::from_secs(3), "{:?}", cut.elapsed());
    for writer in &writers {
        assert!(matches!(writer.sender.try_send(Frame::Idle), Err(Refused::Closed)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_shuts_down_says_so_and_is_reached_again_when_another_takes_its_place() {
    let authority = authority();
    let one = Worker::start(transport(&authority, Role::Worker)).await;
    let two = Worker::start(transport(&authority, Role::Worker)).await;
    let mut reader = two.expect(channel(0));
    let writer = one.connect(channel(0), &two.listening.endpoint());
    writer.send(rows(0, 1)).await.unwrap();
    reader.rows().await;
    let begun = Instant::now();
    two.listening.close().await;
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    settled("the sender is told", || !one.lost().is_empty()).await;
    assert!(one.lost()[0].reason.contains("shutting down"), "{:?}", one.lost());
    assert!(matches!(writer.sender.try_send(Frame::Idle), Err(Refused::Closed)));

    // The connection that was there is no more; nobody has to know.
    let three = Worker::start(transport(&authority, Role::Worker)).await;
    let next = floodmark_link::exchange::ChannelId { attempt: common::ATTEMPT.next(), ..channel(0) };
    for worker in [&one, &three] {
        worker.exchange.begin(next.attempt).unwrap();
    }
    let mut reader = three.expect(next);
    let writer = one.connect(next, &three.listening.endpoint());
    writer.send(rows(0, 1)).await.unwrap();
    reader.rows().await;
}
