//! Jobs as graphs of batch-wise operators: the traits that operators, sources and sinks implement, and the tasks that drive
//! them.
//!
//! [`operator`], [`source`], [`sink`] and [`connector`] are the contracts. [`graph`] says which operators a job has and how
//! they are joined; [`task`] runs one subtask of it as a state machine with a `step`; [`channel`] carries frames between
//! subtasks. Nothing in here starts a thread, reads a clock or touches a network: the `worker` crate does.
//!
//! Invariant: no record that came after barrier *n* on a channel is in snapshot *n* (exactly-once mode).

pub mod arrival;
pub mod channel;
pub mod connector;
pub mod exchange;
pub mod frame;
pub mod graph;
pub mod hash;
pub mod inflight;
pub mod metrics;
pub mod operator;
pub mod sink;
pub mod source;
pub mod task;
pub mod variables;
pub mod watermark;

pub use frame::{Barrier, BarrierKind, Batch, Frame, ROW_KIND, RowKind, WATERMARK_MAX, WATERMARK_MIN};
pub use graph::{Edge, Exchange, JobGraph, Node, TaskId, Vertex, takers};
pub use metrics::OperatorMetrics;
pub use operator::{
    Operator, OperatorFactory, Output, PendingShard, Port, RestoredShard, StateSettings, StateSnapshot, SubtaskContext,
};
