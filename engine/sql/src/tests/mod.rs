//! SQL in, rows out: jobs over rows that stand in the test, run in one thread, with and without a restore in between.

mod dedup;
mod harness;
mod late;
mod nexmark;
mod plans;
mod refusals;
mod results;
mod shaped;
