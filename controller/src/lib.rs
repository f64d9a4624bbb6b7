//! The operator: brings about what StreamJobs and Savepoints say.
//!
//! [`lifecycle`] decides, [`objects`] writes down what the cluster is to hold; both are pure. [`effects`] sees and does.
//! [`election`] says which of several controllers does; [`webhook`] tells people at once what is wrong with what they apply.
//!
//! Invariant: what takes several steps is in a status before anything is done for it.

pub mod args;
pub mod effects;
pub mod election;
pub mod lifecycle;
pub mod metrics;
pub mod objects;
pub mod revision;
pub mod savepoints;
pub mod serving;
pub mod webhook;
