//! The servers behave as the tests that use them expect.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use std::{
    io::Read as _,
    net::UdpSocket,
    process::{Command, Stdio},
    time::Duration,
};

use floodmark_testkit::{Cut, Isolation, Kafka, Network, Place, S3, Stop, unkeyed};

#[test]
fn a_broker_keeps_its_data_over_a_crash_and_hides_what_is_not_committed() {
    let mut kafka = Kafka::start_to_crash(std::net::Ipv4Addr::LOCALHOST.into()).unwrap();
    kafka.create_topic("t", 2, &[]).unwrap();
    kafka.produce("t", 1, [(Some("k"), Some("v")), (None, None)]).unwrap();
    kafka.transaction("t", 0, unkeyed(["committed"])).unwrap().commit().unwrap();
    kafka.transaction("t", 0, unkeyed(["aborted"])).unwrap().abort().unwrap();
    let open = kafka.transaction("t", 0, unkeyed(["open"])).unwrap();
    assert_eq!(kafka.open_transactions().unwrap().len(), 1);
    kafka.restart(Stop::Kill).unwrap();
    let committed = kafka.read_committed("t").unwrap();
    assert_eq!(committed.len(), 3);
    assert_eq!(committed[0].text(), "committed");
    assert_eq!((committed[1].partition, committed[1].offset, committed[1].key.as_deref()), (1, 0, Some(&b"k"[..])));
    assert_eq!(committed[2].value, None);
    assert_eq!(kafka.read("t", Isolation::Uncommitted).unwrap().len(), 5);
    open.abort().unwrap();
    assert!(kafka.open_transactions().unwrap().is_empty());
}

#[test]
fn an_s3_server_starts_and_answers() {
    let mut s3 = S3::start().unwrap();
    let address = s3.endpoint().trim_start_matches("http://").to_owned();
    assert!(std::net::TcpStream::connect(&address).is_ok());
    s3.restart(Stop::Terminate).unwrap();
    assert!(std::net::TcpStream::connect(&address).is_ok());
    assert!(s3.objects().is_dir());
}

/// Whether a packet from a place reaches a listener of the test within half a second.
fn reaches(place: &Place, listener: &UdpSocket, word: &str) -> bool {
    let prefix = place.prefix();
    let to = listener.local_addr().unwrap();
    let send = format!("printf %s {word} > /dev/udp/{}/{}", to.ip(), to.port());
    // What the packet filter swallows on the way out is an error to the sender.
    let _ =
        Command::new(&prefix[0]).args(&prefix[1..]).args(["bash", "-c", &send]).stderr(Stdio::null()).status().unwrap();
    let mut arrived = [0; 64];
    // What was sent before may come late.
    loop {
        match listener.recv(&mut arrived) {
            Ok(n) if &arrived[..n] == word.as_bytes() => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

#[test]
fn places_on_a_network_are_cut_off_and_healed_and_nothing_stays_behind() {
    let network = Network::lay().unwrap();
    let [one, other] = [(); 2].map(|()| network.place().unwrap());
    let listeners = [0, 1].map(|n| UdpSocket::bind((network.server(n), 0)).unwrap());
    for listener in &listeners {
        listener.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    }
    let reached = |place: &Place, word: &str| listeners.each_ref().map(|l| reaches(place, l, word));
    assert_eq!(reached(&one, "whole"), [true, true]);
    for (round, (cut, from, expected)) in [
        (Cut::Cable, None, [false, false]),
        (Cut::Both, None, [false, false]),
        (Cut::Out, Some(1), [true, false]),
        (Cut::In, None, [true, true]),
    ]
    .into_iter()
    .enumerate()
    {
        let word = |what: &str| format!("{what}-{round}");
        let from: Vec<_> = from.map(|n| network.server(n)).into_iter().collect();
        // Where the other end is must be known before packets in one direction are lost.
        reached(&one, &word("before"));
        one.cut(cut, &from).unwrap();
        assert_eq!(reached(&one, &word("cut")), expected, "{cut} from {from:?}");
        assert_eq!(reached(&other, &word("other")), [true, true], "{cut} cuts another place");
        one.heal().unwrap();
        // A cable that is in again is noticed after a moment.
        assert!((0..10).any(|_| reached(&one, &word("healed")) == [true, true]), "after {cut}");
    }
    let prefix = one.prefix();
    let mut sleeper = Command::new(&prefix[0]);
    sleeper.args(&prefix[1..]).args(["sh", "-c", "echo there; exec sleep 60"]).stdout(Stdio::piped());
    let mut sleeper = sleeper.spawn().unwrap();
    // Before it is in the place, it is none of the place's.
    let mut there = [0; 5];
    sleeper.stdout.take().unwrap().read_exact(&mut there).unwrap();
    drop((one, other, network));
    assert!(!sleeper.wait().unwrap().success(), "a process has outlived its place");
    let left = |words: &[&str]| {
        let listed = Command::new("ip").args(words).output().unwrap();
        let pid = std::process::id().to_string();
        String::from_utf8_lossy(&listed.stdout).lines().filter(|l| l.contains(&pid)).count()
    };
    assert_eq!((left(&["netns", "list"]), left(&["-o", "link"])), (0, 0));
}
