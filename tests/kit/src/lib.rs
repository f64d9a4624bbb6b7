//! Real servers for tests: a Kafka broker ([`Kafka`]) and an S3 server ([`S3`]), each a process of its own, on the loopback
//! interface unless told otherwise, with its data in a folder that goes when it goes. And a real network ([`Network`]) between
//! places from which the rest can be cut off.
//!
//! `setup.sh` brings what they consist of into the cache (`$FLOODMARK_CACHE`, by default `~/.cache/floodmark`). Nothing here is
//! a stand-in: what a test shows, it shows of the real thing.

#![allow(clippy::disallowed_methods, reason = "tests wait for real servers in real time")]

mod kafka;
mod network;
mod process;
mod s3;
pub mod scratch;

pub use kafka::{Isolation, Kafka, Record, Transaction, unkeyed};
pub use network::{Cut, Network, Place};
pub use process::Stop;
pub use s3::S3;
