//! Drives tasks, channels and barriers through random schedules, crashes and restores, and compares what comes out with what
//! went in. A failing seed is printed; `FLOODMARK_SEED=<seed> cargo test -p floodmark-dataflow --test simulation <test>` runs
//! it alone, and `FLOODMARK_SEEDS=100000` so many of each.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod job;
mod operators;
mod run;
mod scenarios;
