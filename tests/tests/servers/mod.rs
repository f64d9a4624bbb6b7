//! The servers that the tests of one executable share. They run as long as one of the tests does.

#![allow(dead_code, reason = "not every executable needs both servers")]
#![allow(unreachable_pub, reason = "each executable has its own copy of this module")]

pub mod orders;
pub mod world;

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use anyhow::Result;
use floodmark_testkit::{Kafka, S3};

static KAFKA: Mutex<Weak<Kafka>> = Mutex::new(Weak::new());
static STORE: Mutex<Weak<S3>> = Mutex::new(Weak::new());

/// The shared broker.
pub fn kafka() -> Result<Arc<Kafka>> {
    kafka_at(Ipv4Addr::LOCALHOST.into())
}

/// The shared broker, at an address of this machine; all of an executable's tests name the same.
pub fn kafka_at(host: IpAddr) -> Result<Arc<Kafka>> {
    shared(&KAFKA, || Kafka::start_at(host))
}

/// The shared S3 server.
pub fn s3() -> Result<Arc<S3>> {
    s3_at(Ipv4Addr::LOCALHOST.into())
}

/// The shared S3 server, at an address of this machine; all of an executable's tests name the same.
pub fn s3_at(host: IpAddr) -> Result<Arc<S3>> {
    shared(&STORE, || S3::start_at(host))
}

/// A location in a server's bucket.
pub fn location(store: &S3, folder: &str) -> String {
    format!("s3://{}/{folder}", store.bucket())
}

/// A static would never be dropped, and its server never end: so it only holds on weakly.
fn shared<T>(server: &Mutex<Weak<T>>, start: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
    let mut server = server.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(running) = server.upgrade() {
        return Ok(running);
    }
    let started = Arc::new(start()?);
    *server = Arc::downgrade(&started);
    Ok(started)
}
