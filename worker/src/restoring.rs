//! From a log to a place to start: picks the checkpoint, checks that it fits, and says what it means for the output.

use std::sync::Arc;

use floodmark_dataflow::{JobGraph, graph::NodeKind};
use floodmark_snapshot::{
    Epoch, Manifest, Result, ShardKind,
    log::{CheckpointLog, Event, LogState},
    restore::{Restored, Taker, check_fits, newest_intact},
    storage::Storage,
};

use crate::{RestoreMode, RunSpec};

/// Reads the checkpoint that the job starts from, and notes in the log if that is not the newest.
pub(crate) async fn restore(
    spec: &RunSpec,
    storage: &Arc<dyn Storage>,
    log: &mut CheckpointLog,
    state: &LogState,
) -> Result<Option<Restored>> {
    for damaged in &state.damaged {
        tracing::warn!(entry = damaged.seq, reason = %damaged.reason, "checkpoint log entry is damaged and counts for nothing");
    }
    if spec.restore == RestoreMode::None {
        if state.has_history() {
            tracing::warn!("starting from nothing, as told to; earlier checkpoints are given up");
            log.append(Event::Restored { epoch: None }).await?;
        }
        return Ok(None);
    }
    let Some(restored) = newest_intact(&**storage, log.folder(), &spec.job, state).await? else {
        return Ok(None);
    };
    let epoch = restored.manifest.epoch;
    for rejected in &restored.rejected {
        tracing::error!(checkpoint = %rejected.epoch, reason = %rejected.reason, "checkpoint is damaged and passed over");
    }
    let fit = without_committed_output(&restored.manifest, state.committed);
    check_fits(&fit, &takers(&spec.graph), spec.max_parallelism, spec.allow_dropped_state)?;
    if restored.rejected.is_empty() && state.damaged.is_empty() {
        tracing::info!(checkpoint = %epoch, "restored the newest checkpoint");
    } else {
        tracing::warn!(checkpoint = %epoch, "restored an older checkpoint, because a newer one is damaged");
        if state.committed > epoch || !state.damaged.is_empty() {
            tracing::warn!(
                from = %epoch,
                "output after checkpoint {epoch} may have been committed already, and will then be written a second time"
            );
        }
        log.append(Event::Restored { epoch: Some(epoch) }).await?;
    }
    Ok(Some(restored))
}

/// What is staged and committed needs no taker: a sink may leave the job without its state being "dropped".
fn without_committed_output(manifest: &Manifest, committed: Epoch) -> Manifest {
    let mut manifest = manifest.clone();
    if committed >= manifest.epoch {
        manifest.operators.retain(|_, operator| {
            operator.shards.iter().any(|s| s.kind != ShardKind::Staged) || operator.shards.is_empty()
        });
    }
    manifest
}

fn takers(graph: &JobGraph) -> Vec<Taker> {
    let taker = |node: &floodmark_dataflow::Node| {
        let schema = match &node.node {
            NodeKind::Operator(_) => node.state_schema.clone(),
            NodeKind::Source(_) | NodeKind::Sink(_) => Some(node.state_schema.clone().unwrap_or_default()),
        };
        Taker { uid: node.uid.clone(), kind: node.kind.clone(), schema }
    };
    graph.nodes().map(|(_, node)| taker(node)).collect()
}
