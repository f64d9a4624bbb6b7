//! Runs the whole real worker (coordinator, tasks, uploads, committers, log, retention, restore) in a deterministic
//! simulation: one thread, a virtual clock, a seeded scheduler, and a storage and a Kafka-like log that fail in every way.
//!
//! A seed is a whole life of a job: what it computes, at which parallelism, which faults strike how often, when processes
//! die, stand still, are cut off or are taken over. Once the faults cease, the job must finish within a bounded time, and
//! what a committed reader sees must be what the input ledger says ([`oracle`] knows nothing of checkpoints). [`monitor`]
//! watches, at every change of the storage and the broker, what must hold at each moment.
//!
//! A process is a job as a whole, or its coordinator: then workers are processes of their own ([`crew`]), on a network that delays,
//! cuts and breaks what goes over it.
//!
//! [`simulate`] runs one seed; the same seed gives the same run, event for event. The scheduler runs one step of a task or a
//! committer at a time and is never interrupted inside of one: what real threads could do to each other *within* a step is
//! not simulated (they share nothing but channels).
//!
//! That the oracle can fail is shown by [`Mutation`]s: defects planted at the simulator's side of the seams.

mod broker;
mod crew;
mod executor;
mod inputs;
mod jobs;
mod ledger;
mod life;
mod monitor;
mod operators;
mod oracle;
mod plan;
mod process;
mod random;
mod sink;
mod sql;
mod state;
mod topology;
mod trace;
mod world;

use std::{collections::BTreeMap, time::Duration};

pub use crate::{crew::FIRST_WORKER, topology::Topology, world::Crash};
use crate::{life::Life, plan::Plan};

/// A defect that seeds must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A commit does not look at the marker: after a lost reply it writes again.
    MarkerIgnored,
    /// A create of an entry that exists is taken for a success: a coordinator that was taken over goes on.
    ZombieAccepted,
    /// A restore skips what the second subtask wrote.
    ShardSkipped,
    /// A file goes before the log has released it.
    DeletedEarly,
    /// A source goes on one record further than its position says.
    PositionAhead,
    /// Who writes takes the producer over first: nobody is fenced.
    FencingOff,
    /// Whoever takes a checkpoint of another job over does not ask what is visible of it.
    VisibleUnasked,
    /// Nobody ever looks for orphans.
    NeverSwept,
    /// A process looks for orphans when it starts, and never again.
    SweptOnce,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::MarkerIgnored,
        Self::ZombieAccepted,
        Self::ShardSkipped,
        Self::DeletedEarly,
        Self::PositionAhead,
        Self::FencingOff,
        Self::VisibleUnasked,
        Self::NeverSwept,
        Self::SweptOnce,
    ];
}

/// What a run is to be, besides its seed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Print what happens.
    pub trace: bool,
    /// Plant this defect.
    pub mutation: Option<Mutation>,
    /// No faults, and of the actions only those that a person might take: savepoints, rescales and stops. Then no checkpoint may fail.
    pub calm: bool,
    /// Of all topologies just this one.
    pub topology: Option<Topology>,
    /// Keyed state is kept in RocksDB, on a real disk. Its threads are not the simulator's: the same seed need not give the same
    /// run, and a run is slow.
    pub rocksdb: bool,
    /// In a run that crashes ([`crash`]), the parallelism changes twice on the way.
    pub rescales: bool,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What the seed means, in words.
    pub plan: String,
    /// What is wrong; empty if nothing is.
    pub violations: Vec<String>,
    /// How often what happened: faults by kind, checkpoints, restores.
    pub counts: BTreeMap<&'static str, u64>,
    /// Steps of all futures, tasks and committers.
    pub polls: u64,
    /// Virtual time that has passed.
    pub lasted: Duration,
    /// Equal if and only if (but for hash collisions) two runs were the same, event for event.
    pub digest: u64,
    /// Changes that each process made to storage and broker.
    pub effects: BTreeMap<u32, u64>,
    /// What a committed reader sees.
    pub output: Vec<String>,
}

/// Runs what a seed means.
#[must_use]
pub fn simulate(seed: u64, options: Options) -> Report {
    let plan = Plan::draw(seed, options.topology);
    let plan = if options.calm { plan.calm() } else { plan };
    Life::new(if options.rocksdb { plan.in_rocksdb() } else { plan }, options, None).run()
}

/// Runs a topology without faults, but for a crash of one process; with so many workers beside the coordinator.
#[must_use]
pub fn crash(topology: Topology, workers: u32, seed: u64, crash: Option<Crash>, options: Options) -> Report {
    let plan = Plan::for_sweep(topology, workers, seed);
    let plan = if options.rescales { plan.rescaled() } else { plan };
    Life::new(if options.rocksdb { plan.in_rocksdb() } else { plan }, options, crash).run()
}
