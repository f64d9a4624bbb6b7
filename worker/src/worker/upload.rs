//! Makes what a subtask handed over at a barrier durable: encode off the task's thread, upload, report.
//!
//! Invariants: an acknowledgement names only shards whose upload has been confirmed, and every record that a sink has staged
//! and not seen committed is in it. Staged records are kept in the order of their barriers, whatever becomes of the
//! checkpoints.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use floodmark_dataflow::{PendingShard, StateSnapshot, task::OperatorPart};
use floodmark_snapshot::{
    Attempt, Context, Env, Epoch, OperatorSnapshot, OperatorUid, Result, Shard, ShardKind, Step,
    log::JobFolder,
    manifest::{ShardStatus, hash_hex, tail_hash},
    retention,
    storage::Storage,
};
use futures::{StreamExt, stream};
use tokio::sync::oneshot;

use super::committers::{Staged, StagedShard};

/// Shards of one subtask that are encoded and uploaded at the same time.
const UPLOADS_IN_FLIGHT_MAX: usize = 4;

/// Uploads shards into the folder of one attempt.
pub(super) struct Uploader {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) env: Env,
    /// The job's folder.
    pub(super) folder: JobFolder,
    /// Names the folder of this attempt's blobs.
    pub(super) attempt: Attempt,
}

/// The snapshots of one subtask keep their records one after the other: each has its turn when the one before has had its.
#[derive(Default)]
pub(super) struct Turn {
    before: Option<oneshot::Receiver<()>>,
    done: Option<oneshot::Sender<()>>,
}

impl Turn {
    /// The turn after `last`, which from now on is this one.
    pub(super) fn after(last: &mut Option<oneshot::Receiver<()>>) -> Self {
        let (done, next) = oneshot::channel();
        Self { before: last.replace(next), done: Some(done) }
    }

    async fn come(&mut self) {
        if let Some(before) = self.before.take() {
            // One that ended without a word has failed, and with it the job.
            let _ = before.await;
        }
    }

    fn pass_on(&mut self) {
        if let Some(done) = self.done.take() {
            let _ = done.send(());
        }
    }
}

impl Uploader {
    /// Keeps the records that the sinks of a subtask staged at a barrier, behind those of the barriers before it.
    ///
    /// `staged` has, for each sink of this subtask that commits, the records that it holds uncommitted.
    ///
    /// # Errors
    /// When the records can't be encoded: the job must not go on without them.
    pub(super) async fn stage(
        &self,
        epoch: Epoch,
        parts: &mut [OperatorPart],
        staged: &HashMap<OperatorUid, Staged>,
        mut turn: Turn,
    ) -> Result<()> {
        turn.come().await;
        for part in parts {
            let Some(staged) = staged.get(&part.uid) else { continue };
            let (new, others) = std::mem::take(&mut part.shards).into_iter().partition(|s| s.kind == ShardKind::Staged);
            part.shards = others;
            let new: Vec<PendingShard> = new;
            for shard in new.into_iter().filter(|s| s.rows > 0) {
                let rows = shard.rows;
                let bytes = self.env.blocking("encoding records", shard.encode).await??;
                staged.add(epoch, (rows, bytes));
            }
        }
        turn.pass_on();
        Ok(())
    }

    /// Uploads the parts of subtask `subtask`, and the records that its sinks hold staged: a checkpoint must hold whatever its
    /// commit will have to write. Answers with what the manifest will say of each operator. What was written before a failure
    /// is deleted.
    pub(super) async fn upload(
        &self,
        epoch: Epoch,
        subtask: u32,
        parts: Vec<OperatorPart>,
        staged: &HashMap<OperatorUid, Staged>,
    ) -> Result<Vec<(OperatorUid, OperatorSnapshot)>> {
        self.env.probe.reached(Step::BeforeUpload, epoch);
        let written = Written { uploader: self, epoch, subtask, paths: Mutex::default() };
        let mut acknowledged = Vec::with_capacity(parts.len());
        for part in parts {
            let uid = part.uid.clone();
            let held = staged.get(&uid).map_or_else(Vec::new, |s| s.up_to(epoch));
            match written.part(part, held).await {
                Ok(snapshot) => acknowledged.push((uid, snapshot)),
                Err(error) => {
                    let orphans = written.paths.into_inner().unwrap_or_else(PoisonError::into_inner);
                    retention::delete(&*self.storage, &self.folder, orphans).await;
                    return Err(error.context(format!("upload state of {uid}")));
                }
            }
        }
        self.env.probe.reached(Step::AfterUpload, epoch);
        Ok(acknowledged)
    }
}

/// What one checkpoint of one subtask has written.
struct Written<'a> {
    uploader: &'a Uploader,
    epoch: Epoch,
    subtask: u32,
    /// Files that may exist.
    paths: Mutex<Vec<String>>,
}

impl Written<'_> {
    /// Writes an operator's shards, and the records that it holds staged.
    async fn part(&self, part: OperatorPart, held: Vec<(Epoch, StagedShard)>) -> Result<OperatorSnapshot> {
        let OperatorPart { uid: _, kind, schema, parallelism, splits, reused, shards: pending } = part;
        // A back end may know only now what the snapshot consists of.
        let snapshot = StateSnapshot { reused, pending };
        let expand = move || snapshot.expanded();
        let StateSnapshot { reused, pending } = self.uploader.env.blocking("writing out state", expand).await??;
        // Its number may have been another when it wrote them: what it names now is its own, and is read before what it adds.
        let again = |s: Shard| Shard { status: ShardStatus::Reused, subtask: self.subtask, ..s };
        let mut shards: Vec<Shard> = reused.into_iter().map(again).collect();
        let puts = pending.into_iter().map(|shard| self.pending(shard));
        // All are waited for, also past a failure: what is deleted then must not appear later.
        let written: Vec<Result<Shard>> = stream::iter(puts).buffered(UPLOADS_IN_FLIGHT_MAX).collect().await;
        let puts = held.into_iter().map(|(epoch, (rows, bytes))| {
            self.put(Shard { rows, epoch: Some(epoch), ..Shard::new("", ShardKind::Staged) }, bytes)
        });
        let staged: Vec<Result<Shard>> = stream::iter(puts).buffered(UPLOADS_IN_FLIGHT_MAX).collect().await;
        for shard in written.into_iter().chain(staged) {
            shards.push(shard?);
        }
        Ok(OperatorSnapshot { kind, schema, parallelism, splits, shards })
    }

    async fn pending(&self, shard: PendingShard) -> Result<Shard> {
        let PendingShard { kind, key_groups, rows, layer, name, encode, uploaded, .. } = shard;
        let bytes = self.uploader.env.blocking("encoding a shard", encode).await??;
        let shard = Shard { key_groups, rows, layer, name, ..Shard::new("", kind) };
        let shard = self.put(shard, bytes).await?;
        if let Some(uploaded) = uploaded {
            uploaded(&shard);
        }
        Ok(shard)
    }

    async fn put(&self, shard: Shard, bytes: Bytes) -> Result<Shard> {
        let Uploader { storage, env, folder, attempt } = self.uploader;
        let ending = match shard.kind {
            ShardKind::Keyed => "state",
            ShardKind::RocksDb => "sst",
            ShardKind::Split | ShardKind::Union | ShardKind::Broadcast => "list",
            ShardKind::Channel => "rows",
            ShardKind::Staged => "staged",
        };
        let path = retention::blob_path(*attempt, self.epoch, &env.ids.ulid(), ending);
        self.paths.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
        let (size, hash) = (bytes.len() as u64, hash_hex(&bytes));
        let tail = (shard.kind == ShardKind::Keyed).then(|| tail_hash(&bytes));
        storage.put(&folder.path(&path), bytes).await.context_with(|| "write a shard")?;
        Ok(Shard { size, hash, tail, path, subtask: self.subtask, ..shard })
    }
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::{JobId, storage};

    use super::*;

    #[tokio::test]
    async fn what_a_subtask_names_again_is_its_own_although_another_number_wrote_it() {
        let job = JobId { namespace: "n".into(), name: "j".into(), uid: "u".into() };
        let uploader = Uploader {
            storage: storage::open("memory://").unwrap(),
            env: Env::system(),
            folder: JobFolder::of(&job),
            attempt: Attempt(2),
        };
        let encode = || Ok(Bytes::from_static(b"newer"));
        let part = OperatorPart {
            uid: "counts".into(),
            kind: "counter".to_owned(),
            schema: Default::default(),
            parallelism: 4,
            splits: Vec::new(),
            reused: vec![Shard { subtask: 2, ..Shard::new("blobs/1/1-a.state", ShardKind::Keyed) }],
            shards: vec![PendingShard { layer: 1, ..PendingShard::new(ShardKind::Keyed, None, 1, Box::new(encode)) }],
        };
        let parts = uploader.upload(Epoch(7), 3, vec![part], &HashMap::new()).await.unwrap();
        let shards: Vec<_> = parts[0].1.shards.iter().map(|s| (s.subtask, s.layer, s.status)).collect();
        assert_eq!(shards, [(3, 0, ShardStatus::Reused), (3, 1, ShardStatus::Uploaded)]);
    }
}
