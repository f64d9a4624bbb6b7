//! Makes what a subtask handed over at a barrier durable: encode off the task's thread, upload, report.
//!
//! Invariant: an acknowledgement names only shards whose upload has been confirmed, and every record that a sink has staged
//! and not seen committed is in it.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use floodmark_dataflow::{PendingShard, operator::Uploaded, task::OperatorPart};
use floodmark_snapshot::{
    Env, Epoch, Error, OperatorSnapshot, OperatorUid, Result, Shard, ShardKind, Step,
    log::JobFolder,
    manifest::{ShardStatus, hash_hex},
    storage::Storage,
};
use futures::{StreamExt, TryStreamExt, stream};

use crate::committers::Staged;

/// Shards of one subtask that are encoded and uploaded at the same time.
const UPLOADS_IN_FLIGHT_MAX: usize = 4;

/// Uploads shards into the folder of one attempt.
pub(crate) struct Uploader {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) env: Env,
    /// The job's folder.
    pub(crate) folder: JobFolder,
    /// Folder of this attempt's blobs, relative to the job's: `blobs/3`.
    pub(crate) blobs: String,
}

/// A shard ready to be written: what the manifest will say of it, but for its path.
struct Encoded {
    shard: Shard,
    bytes: Bytes,
    uploaded: Option<Uploaded>,
}

impl Uploader {
    /// Uploads the parts of subtask `subtask` and answers with what the manifest will say of each operator.
    ///
    /// `staged` has, for each sink of this subtask that commits, the records that it still holds uncommitted.
    pub(crate) async fn upload(
        &self,
        epoch: Epoch,
        subtask: u32,
        parts: Vec<OperatorPart>,
        staged: &HashMap<OperatorUid, Staged>,
    ) -> Result<Vec<(OperatorUid, OperatorSnapshot)>> {
        self.env.probe.reached(Step::BeforeUpload, epoch);
        let mut acknowledged = Vec::with_capacity(parts.len());
        for part in parts {
            let mut encoded = Vec::with_capacity(part.shards.len());
            for shard in part.shards {
                encoded.push(encode(shard, &self.env).await?);
            }
            if let Some(staged) = staged.get(&part.uid) {
                encoded = restage(encoded, staged, epoch);
            }
            let shards = stream::iter(encoded.into_iter().map(|shard| self.put(subtask, shard)))
                .buffered(UPLOADS_IN_FLIGHT_MAX)
                .try_collect()
                .await
                .map_err(|e: Error| e.context(format!("upload state of {}", part.uid)))?;
            let mut shards: Vec<Shard> = shards;
            shards.splice(0..0, part.reused.into_iter().map(|s| Shard { status: ShardStatus::Reused, ..s }));
            let snapshot = OperatorSnapshot {
                kind: part.kind,
                schema: part.schema,
                parallelism: part.parallelism,
                splits: part.splits,
                shards,
            };
            acknowledged.push((part.uid, snapshot));
        }
        self.env.probe.reached(Step::AfterUpload, epoch);
        Ok(acknowledged)
    }

    async fn put(&self, subtask: u32, encoded: Encoded) -> Result<Shard> {
        let Encoded { shard, bytes, uploaded } = encoded;
        let ending = match shard.kind {
            ShardKind::Keyed => "state",
            ShardKind::RocksDb => "sst",
            ShardKind::Split | ShardKind::Union | ShardKind::Broadcast => "list",
            ShardKind::Channel => "rows",
            ShardKind::Staged => "staged",
        };
        let path = format!("{}/{}.{ending}", self.blobs, self.env.ids.ulid());
        let shard = Shard { size: bytes.len() as u64, hash: hash_hex(&bytes), path, subtask, ..shard };
        self.storage.put(&self.folder.path(&shard.path), bytes).await?;
        if let Some(uploaded) = uploaded {
            uploaded(&shard);
        }
        Ok(shard)
    }
}

async fn encode(shard: PendingShard, env: &Env) -> Result<Encoded> {
    let PendingShard { kind, key_groups, rows, layer, name, encode, uploaded } = shard;
    let bytes = env.blocking("encoding a shard", encode).await??;
    Ok(Encoded { shard: Shard { key_groups, rows, layer, name, ..Shard::new("", kind) }, bytes, uploaded })
}

/// Adds this epoch's staged records to those that an aborted epoch left uncommitted, and answers with all of them: a
/// checkpoint must hold whatever its commit will have to write.
fn restage(encoded: Vec<Encoded>, staged: &Staged, epoch: Epoch) -> Vec<Encoded> {
    let (new, mut others): (Vec<_>, Vec<_>) = encoded.into_iter().partition(|e| e.shard.kind == ShardKind::Staged);
    for Encoded { shard, bytes, .. } in new {
        if shard.rows > 0 {
            staged.add(epoch, (shard.rows, bytes));
        }
    }
    others.extend(staged.up_to(epoch).into_iter().map(|(rows, bytes)| Encoded {
        shard: Shard { rows, ..Shard::new("", ShardKind::Staged) },
        bytes,
        uploaded: None,
    }));
    others
}
