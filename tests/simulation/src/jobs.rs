//! What a process is told to run, and where its job's things are.

use std::sync::Arc;

use floodmark_rocksdb::{RocksDb, Settings};
use floodmark_snapshot::{
    JobId, Result,
    restore::{Reference, StartId},
};
use floodmark_state::{Heap, StateBackend, Whole};
use floodmark_worker::{CheckpointSettings, RunSpec};

use crate::{plan::Keeper, process::Process, world::Client};

/// What the storage calls itself.
pub(crate) const STORAGE: &str = "sim://storage";
/// Where people move savepoints to.
pub(crate) const ELSEWHERE: &str = "elsewhere/";

/// A job, by its number in the life: the next one takes over what the one before has left.
pub(crate) fn job(number: u32) -> JobId {
    JobId { namespace: "sim".into(), name: "job".into(), uid: number.to_string() }
}

/// A job's folder in the storage.
pub(crate) fn folder(number: u32) -> String {
    format!("sim/job/{number}")
}

/// What a process shall start from.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    /// See [`RunSpec::restore`].
    pub(crate) restore: Reference,
    /// See [`RunSpec::initial`].
    pub(crate) initial: Option<Reference>,
}

/// What process number `start` is told to run.
pub(crate) fn spec(process: &Arc<Process>, start: usize, from: Start) -> Result<RunSpec> {
    let plan = &process.world.plan;
    let settings = &plan.checkpoints;
    let parallelism = plan.parallelism[start.min(plan.parallelism.len() - 1)];
    Ok(RunSpec {
        job: job(process.job),
        graph: plan.topology.graph(process)?,
        parallelism: parallelism.min(u32::from(plan.max_parallelism)),
        max_parallelism: plan.max_parallelism,
        state: floodmark_state::StateSettings { backend: backend(process)?, ..Default::default() },
        checkpoints: CheckpointSettings {
            mode: settings.mode,
            interval: settings.interval,
            timeout: settings.timeout,
            min_pause: settings.min_pause,
            tolerable_failures: settings.tolerable_failures,
            retain: settings.retain,
            max_concurrent: settings.max_concurrent,
            unaligned_after: settings.unaligned_after,
        },
        storage: Arc::new(Client::of(process)),
        restore: from.restore,
        initial: from.initial,
        // All processes of a life are one run: what it is told to begin at counts once.
        start: StartId::Run(1),
        slice_bytes: plan.slice_bytes,
        channel_bytes: plan.channel_bytes,
        restarts: plan.restarts.clone(),
        allow_dropped_state: false,
        holder: format!("process:{}", process.pid),
        copies: None,
    })
}

/// Rows in memory of all databases of a process, bytes: little, so that rows go to the database and come back.
const CACHE_BYTES: usize = 16 << 10;
/// Of RocksDB, bytes.
const BUFFER_BYTES: usize = 1 << 20;

fn backend(process: &Arc<Process>) -> Result<Arc<dyn StateBackend>> {
    let plan = &process.world.plan;
    let keeper: Arc<dyn StateBackend> = match (plan.keeper, process.world.work_folder()) {
        (Keeper::RocksDb, Some(folder)) => {
            let sizes = Settings { cache_bytes: CACHE_BYTES, ..Settings::new(folder) };
            let settings = Settings { block_cache_bytes: BUFFER_BYTES, memtable_bytes: BUFFER_BYTES, ..sizes };
            Arc::new(RocksDb::open(&settings, &process.env())?)
        }
        (Keeper::Own | Keeper::Heap | Keeper::RocksDb, _) => Arc::new(Heap),
    };
    Ok(if plan.incremental { keeper } else { Arc::new(Whole(keeper)) })
}
