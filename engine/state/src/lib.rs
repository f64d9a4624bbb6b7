//! Keyed state on the heap: tables of rows in chunks, copied on write, and the files that snapshots of them become.
//!
//! [`table`] keeps a row of accumulator columns per key. A barrier clones the pointers to its chunks; the first write after it
//! copies just the chunk that it touches. [`shard`] is the file format: Arrow IPC in checksummed blocks.
//!
//! Invariant: a snapshot never changes once taken, whatever is written afterwards.

pub mod shard;
pub mod table;

pub use table::{Chunk, Column, ColumnType, Rows, Table};
