//! The operator: brings about what StreamJobs and Savepoints say.
//!
//! [`lifecycle`] decides, [`objects`] writes down what the cluster is to hold; both are pure.
//!
//! Invariant: what takes several steps is in a status before anything is done for it.

pub mod lifecycle;
pub mod objects;
pub mod revision;
pub mod savepoints;
