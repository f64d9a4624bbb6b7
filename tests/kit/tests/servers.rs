//! The servers behave as the tests that use them expect.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use floodmark_testkit::{Isolation, Kafka, S3, Stop, unkeyed};

#[test]
fn a_broker_keeps_its_data_over_a_crash_and_hides_what_is_not_committed() {
    let mut kafka = Kafka::start().unwrap();
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
