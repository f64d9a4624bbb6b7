//! State of operators: what keeps it, how it is snapshotted, and the files that snapshots of it become.
//!
//! [`keyed`] is the contract of keyed state, and [`snapshot`] what a snapshot is before it is written. [`table`] keeps a row of
//! accumulator columns per key in memory: a barrier clones the pointers to its chunks. [`shard`] is the file format, neutral to
//! back ends: Arrow IPC in checksummed blocks.
//!
//! Invariant: a snapshot never changes once taken, whatever is written afterwards.

pub mod conformance;
pub mod heap;
pub mod keyed;
pub mod neutral;
pub mod shard;
pub mod snapshot;
pub mod table;

pub use heap::Heap;
pub use keyed::{KeyedState, Layout, NO_SLOT, RowKeys, Slots, StateBackend, StateSettings, StateSpec, holds};
pub use snapshot::{Encode, Expand, PendingShard, RestoredShard, StateSnapshot, Uploaded};
pub use table::{Chunk, Column, ColumnType, Rows, Table};
