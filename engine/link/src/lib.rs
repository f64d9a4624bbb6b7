//! What travels between the processes of a job, and who may send it.
//!
//! [`tls`] says who a process is. [`transport`] is the seam to the network: Arrow Flight over mutual TLS, or memory for the
//! simulator. On it stand two rooms: [`control`], messages between a coordinator and its workers with heartbeats, and
//! [`exchange`], the frames of channels between tasks. Nothing in here knows of jobs' graphs, checkpoints or SQL.
//!
//! Invariants: nothing is exchanged with who has not shown a certificate of the same job; whatever arrives is what was sent,
//! in order, each once, or the stream is lost and says so; every queue is bounded.

pub mod control;
mod envelope;
pub mod exchange;
pub mod tls;
pub mod transport;
