#![allow(clippy::disallowed_methods, reason = "tests wait for real")]

use std::sync::atomic::AtomicU64;

use floodmark_snapshot::JobId;

use super::*;
use crate::transport::memory::Network;

const QUICK: Heartbeat = Heartbeat { interval: Duration::from_millis(50), timeout: Duration::from_millis(600) };
const SLOW: Heartbeat = Heartbeat { interval: Duration::from_secs(60), timeout: Duration::from_secs(180) };

type Server = ControlServer<String, u64, String>;
type Worker = (ControlSender<u64>, ControlReceiver<String>);

struct Pair {
    network: Arc<Network>,
    worker: Worker,
    accepted: Accepted<String, u64, String>,
}

async fn pair(workers: Heartbeat, coordinators: Heartbeat) -> Pair {
    let env = Env::system();
    let job = JobId { namespace: "default".into(), name: "a".into(), uid: "local".into() };
    let network = Network::new(env.clone(), job);
    let (server, mut accepted) = Server::new(env.clone(), coordinators);
    let coordinator = network.host("coordinator", Role::Coordinator);
    let listening = coordinator.listen(&Endpoint::from("coordinator"), server).await.unwrap();
    let client = ControlClient::new(env, network.host("worker", Role::Worker), workers);
    let worker = client.connect(&listening.endpoint(), &"hello").await.unwrap();
    let accepted = accepted.recv().await.unwrap();
    Pair { network, worker, accepted }
}

#[tokio::test]
async fn messages_arrive_in_order_both_ways_and_the_hello_with_the_name_of_the_peer() {
    let Pair { worker: (up, mut down), mut accepted, .. } = pair(QUICK, QUICK).await;
    assert_eq!((accepted.hello.as_str(), accepted.peer.address.as_str()), ("hello", "worker"));
    assert_eq!(accepted.peer.subject.role, Role::Worker);
    for number in 0..1000 {
        up.send(&number).unwrap();
        accepted.sender.send(&format!("no. {number}")).unwrap();
    }
    for number in 0..1000 {
        assert_eq!(accepted.receiver.recv().await, Ok(number));
        assert_eq!(down.recv().await, Ok(format!("no. {number}")));
    }
}

#[tokio::test]
async fn who_has_nothing_to_say_is_not_lost() {
    let Pair { worker: (up, mut down), mut accepted, .. } = pair(QUICK, QUICK).await;
    let quiet = tokio::time::timeout(QUICK.timeout * 3, async { tokio::join!(down.recv(), accepted.receiver.recv()) });
    assert!(quiet.await.is_err(), "both are still there");
    up.send(&7).unwrap();
    assert_eq!(accepted.receiver.recv().await, Ok(7));
}

#[tokio::test]
async fn a_silent_peer_is_lost_at_both_ends_and_nothing_comes_after() {
    let Pair { network, worker: (up, mut down), mut accepted } = pair(QUICK, QUICK).await;
    up.send(&1).unwrap();
    assert_eq!(accepted.receiver.recv().await, Ok(1));
    network.cut("worker", "coordinator");
    up.send(&2).unwrap();
    for lost in [accepted.receiver.recv().await.map(drop), down.recv().await.map(drop)] {
        assert!(lost.as_ref().is_err_and(|l| l.reason.contains("silent")), "{lost:?}");
    }
    network.heal("worker", "coordinator");
    tokio::time::sleep(QUICK.interval * 3).await;
    assert!(accepted.receiver.recv().await.is_err(), "message 2 has waited in the network");
    assert!(up.send(&3).is_err());
}

#[tokio::test]
async fn a_short_cut_delays_messages_and_loses_none() {
    let Pair { network, worker: (up, _down), mut accepted } = pair(QUICK, QUICK).await;
    network.cut("worker", "coordinator");
    up.send(&1).unwrap();
    tokio::time::sleep(QUICK.timeout / 4).await;
    network.heal("worker", "coordinator");
    assert_eq!(accepted.receiver.recv().await, Ok(1));
}

#[tokio::test]
async fn a_broken_stream_is_seen_at_once_after_what_came_before() {
    let Pair { network, worker: (up, mut down), mut accepted } = pair(SLOW, SLOW).await;
    up.send(&1).unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    network.sever("worker", "coordinator");
    let both = async { (accepted.receiver.recv().await, accepted.receiver.recv().await, down.recv().await) };
    let (first, second, other) = tokio::time::timeout(Duration::from_secs(5), both).await.expect("no heartbeat needed");
    assert_eq!(first, Ok(1));
    assert!(second.is_err_and(|l| l.reason.contains("reset")) && other.is_err());
}

#[tokio::test]
async fn a_message_that_arrives_twice_is_taken_once_and_loses_the_connection() {
    let Pair { network, worker: (up, _down), mut accepted } = pair(SLOW, SLOW).await;
    network.duplicate_next("worker", "coordinator");
    up.send(&1).unwrap();
    up.send(&2).unwrap();
    assert_eq!(accepted.receiver.recv().await, Ok(1));
    let lost = accepted.receiver.recv().await.unwrap_err();
    assert!(lost.reason.contains("was due"), "{lost}");
    assert_eq!(accepted.receiver.recv().await, Err(lost));
}

#[tokio::test]
async fn closing_sends_what_was_said_before_and_then_the_reason() {
    let Pair { worker: (up, mut down), mut accepted, .. } = pair(SLOW, SLOW).await;
    up.send(&1).unwrap();
    up.close("the worker shuts down");
    assert_eq!(accepted.receiver.recv().await, Ok(1));
    let lost = accepted.receiver.recv().await.unwrap_err();
    assert!(lost.reason.contains("the worker shuts down"), "{lost}");
    assert!(down.recv().await.is_err());
}

#[tokio::test]
async fn dropping_the_last_sender_ends_the_connection() {
    let Pair { worker: (up, _down), mut accepted, .. } = pair(SLOW, SLOW).await;
    let other = up.clone();
    drop(up);
    other.send(&1).unwrap();
    assert_eq!(accepted.receiver.recv().await, Ok(1));
    drop(other);
    assert!(accepted.receiver.recv().await.is_err());
}

#[tokio::test]
async fn sending_never_waits_and_too_much_that_waits_loses_the_connection() {
    let Pair { network, worker: (up, mut down), .. } = pair(SLOW, SLOW).await;
    network.cut("worker", "coordinator");
    let sent = (0..).take_while(|number| up.send(number).is_ok()).count();
    assert!((QUEUE_MAX..QUEUE_MAX + 16).contains(&sent), "{sent}");
    let lost = down.recv().await.unwrap_err();
    assert!(lost.reason.contains("too many wait to be sent"), "{lost}");
}

#[tokio::test]
async fn who_does_not_receive_loses_the_connection_and_keeps_what_came() {
    let Pair { worker: (_up, mut down), accepted, .. } = pair(SLOW, SLOW).await;
    let mut sent = 0;
    let text = "x".repeat(2 << 20);
    while accepted.sender.send(&text).is_ok() && sent < 1000 {
        sent += 1;
        tokio::task::yield_now().await;
    }
    // 2 MiB each: the bytes' bound is reached long before the messages'.
    let mut taken = 0;
    let lost = loop {
        match down.recv().await {
            Ok(_) => taken += 1,
            Err(lost) => break lost,
        }
    };
    assert!(taken * (2 << 20) <= QUEUE_BYTES_MAX && taken > 16, "{taken} of {sent}");
    assert!(lost.reason.contains("too many wait to be received"), "{lost}");
}

#[tokio::test]
async fn a_message_that_is_too_long_is_refused_and_the_connection_goes_on() {
    let Pair { worker: (_up, mut down), accepted, .. } = pair(SLOW, SLOW).await;
    let refused = accepted.sender.send(&"x".repeat(MESSAGE_BYTES_MAX)).unwrap_err();
    assert!(refused.to_string().contains(&MESSAGE_BYTES_MAX.to_string()), "{refused}");
    accepted.sender.send(&"short".to_owned()).unwrap();
    assert_eq!(down.recv().await, Ok("short".to_owned()));
}

#[tokio::test]
async fn what_is_not_understood_loses_the_connection() {
    let Pair { worker: (up, _down), mut accepted, .. } = pair(SLOW, SLOW).await;
    let strange =
        ControlSender::<&str> { connection: up.connection.clone(), queue: up.queue.clone(), message: PhantomData };
    strange.send(&"seven").unwrap();
    up.send(&8).unwrap();
    let lost = accepted.receiver.recv().await.unwrap_err();
    assert!(lost.reason.contains("does not understand"), "{lost}");
    assert_eq!(accepted.receiver.recv().await, Err(lost));
}

#[tokio::test]
async fn only_workers_are_let_in_and_only_to_a_coordinator() {
    let env = Env::system();
    let job = JobId { namespace: "default".into(), name: "a".into(), uid: "local".into() };
    let network = Network::new(env.clone(), job);
    let (server, _accepted) = Server::new(env.clone(), SLOW);
    let at = Endpoint::from("");
    let _one = network.host("coordinator", Role::Coordinator).listen(&at, server.clone()).await.unwrap();
    let _two = network.host("worker", Role::Worker).listen(&at, server).await.unwrap();
    for (from, role, to, expected) in [
        ("other", Role::Coordinator, "coordinator", "control: the peer is a coordinator"),
        ("other", Role::Worker, "worker", "must be a coordinator"),
    ] {
        let client = ControlClient::new(env.clone(), network.host(from, role), SLOW);
        let refused = client.connect::<_, u64, u64>(&to.into(), &"hello").await.unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
    }
}

/// Time that a test moves.
struct Moved(AtomicU64);

impl floodmark_snapshot::env::Clock for Moved {
    fn wall_ms(&self) -> i64 {
        0
    }

    fn monotonic(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

#[tokio::test]
async fn a_process_that_was_stopped_itself_first_listens_for_an_interval() {
    let clock = Arc::new(Moved(AtomicU64::new(0)));
    let env = Env { clock: clock.clone(), ..Env::system() };
    let job = JobId { namespace: "default".into(), name: "a".into(), uid: "local".into() };
    let network = Network::new(env.clone(), job);
    let (server, mut accepted) = Server::new(env.clone(), QUICK);
    let _listening = network.host("coordinator", Role::Coordinator).listen(&Endpoint::from(""), server).await.unwrap();
    let client = ControlClient::new(env, network.host("worker", Role::Worker), QUICK);
    let (up, _down): Worker = client.connect(&"coordinator".into(), &"hello").await.unwrap();
    let mut accepted = accepted.recv().await.unwrap();
    tokio::time::sleep(QUICK.interval * 2).await;
    clock.0.store(3_600_000, Ordering::Relaxed);
    tokio::time::sleep(QUICK.interval * 4).await;
    up.send(&1).unwrap();
    assert_eq!(accepted.receiver.recv().await, Ok(1), "an hour later");
}
