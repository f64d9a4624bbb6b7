//! State of operators: what keeps it, how it is snapshotted, and the files that snapshots of it become.
//!
//! [`keyed`] is the contract of keyed state, and [`snapshot`] what a snapshot is before it is written. [`table`] keeps a row of
//! accumulator columns per key in memory: a barrier clones the pointers to its chunks. [`shard`] is the file format, neutral to
//! back ends: Arrow IPC ([`ipc`]) in checksummed blocks; [`neutral`] is how rows get into it and out; [`shape`] how
//! rows look to a program without their operator. [`heap`] is the back end that keeps
//! all in memory; [`conformance`] is what it and every other passes. [`watermarks`] says how far event time had come in the key
//! groups that are restored. [`timers`] and [`list`] are built on these;
//! [`whole`] makes checkpoints of any back end share no files.
//!
//! Invariant: a snapshot never changes once taken, whatever is written afterwards.

pub mod conformance;
pub mod heap;
pub mod ipc;
pub mod keyed;
pub mod list;
pub mod neutral;
pub mod shape;
pub mod shard;
pub mod snapshot;
pub mod table;
pub mod timers;
pub mod watermarks;
pub mod whole;

pub use heap::Heap;
pub use keyed::{KeyedState, Layout, NO_SLOT, RowKeys, Slots, StateBackend, StateSettings, StateSpec, holds};
pub use list::{Dealing, OperatorState};
pub use shape::{RowShape, ValueShape};
pub use snapshot::{Content, Encode, Expand, PendingShard, RestoredShard, StateSnapshot, Uploaded};
pub use table::{Chunk, Column, ColumnType, Rows, Table};
pub use timers::Timers;
pub use watermarks::KeyGroupWatermarks;
pub use whole::Whole;
