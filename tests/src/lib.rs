//! What the whole-system tests are made of: the program as a child process, input with seeds, answers that are computed
//! without the engine, and comparisons that show what differs.
//!
//! Boundary: nothing here links the engine's operators, planner or protocol. What is shared with the product is the Nexmark
//! generator (input), the names of the protocol's steps (where to crash), and the authority that makes certificates.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

pub mod chaos;
pub mod cluster;
pub mod compare;
pub mod events;
pub mod feeder;
pub mod follower;
pub mod job;
pub mod kubernetes;
pub mod oracle;
