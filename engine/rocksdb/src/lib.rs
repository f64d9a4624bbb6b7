//! Keyed state in RocksDB: larger than memory, and uploaded once.
#![allow(dead_code, reason = "the back end follows")]

mod failure;
mod folder;
mod key;
mod writer;
