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
use futures::{StreamExt, future::join, stream};
use tokio::sync::oneshot;

use super::{
    committers::{Staged, StagedShard},
    copies::LocalCopies,
};

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
    /// Where copies of what is uploaded are kept.
    pub(super) copies: Option<Arc<LocalCopies>>,
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
        if let Some(copies) = &self.uploader.copies {
            shards.iter().for_each(|shard| copies.named_again(self.epoch, &shard.path));
        }
        let puts = pending.into_iter().map(|shard| self.pending(shard));
        // All are waited for, also past a failure: what is deleted then must not appear later.
        let written: Vec<Result<Shard>> = stream::iter(puts).buffered(UPLOADS_IN_FLIGHT_MAX).collect().await;
        let puts = held.into_iter().map(|(epoch, (rows, bytes))| {
            let shard =
                Shard { rows, epoch: Some(epoch), ..Shard::new(self.path(ShardKind::Staged), ShardKind::Staged) };
            self.put(shard, bytes, false)
        });
        let staged: Vec<Result<Shard>> = stream::iter(puts).buffered(UPLOADS_IN_FLIGHT_MAX).collect().await;
        for shard in written.into_iter().chain(staged) {
            shards.push(shard?);
        }
        Ok(OperatorSnapshot { kind, schema, parallelism, splits, shards })
    }

    async fn pending(&self, shard: PendingShard) -> Result<Shard> {
        let PendingShard { kind, key_groups, rows, layer, name, encode, file, uploaded, .. } = shard;
        let Uploader { env, copies, .. } = self.uploader;
        let shard = Shard { key_groups, rows, layer, name, ..Shard::new(self.path(kind), kind) };
        let linked = match (copies, file) {
            (Some(copies), Some(file)) => copies.link(env, self.epoch, &shard.path, file).await,
            (Some(_), None) | (None, _) => false,
        };
        let bytes = env.blocking("encoding a shard", encode).await??;
        let shard = self.put(shard, bytes, linked).await?;
        if let Some(uploaded) = uploaded {
            uploaded(&shard);
        }
        Ok(shard)
    }

    /// A new path for a shard.
    fn path(&self, kind: ShardKind) -> String {
        let ending = match kind {
            ShardKind::Keyed => "state",
            ShardKind::RocksDb => "sst",
            ShardKind::Split | ShardKind::Union | ShardKind::Broadcast => "list",
            ShardKind::Channel => "rows",
            ShardKind::Staged => "staged",
        };
        retention::blob_path(self.uploader.attempt, self.epoch, &self.uploader.env.ids.ulid(), ending)
    }

    /// Uploads a shard to its path. `kept` says whether there is a local copy already.
    async fn put(&self, shard: Shard, bytes: Bytes, kept: bool) -> Result<Shard> {
        let Uploader { storage, env, folder, copies, .. } = self.uploader;
        self.paths.lock().unwrap_or_else(PoisonError::into_inner).push(shard.path.clone());
        let (size, hash) = (bytes.len() as u64, hash_hex(&bytes));
        let tail = (shard.kind == ShardKind::Keyed).then(|| tail_hash(&bytes));
        let (path, copied) = (folder.path(&shard.path), bytes.clone());
        let keep = async {
            match copies {
                Some(copies) if !kept => copies.write(env, self.epoch, &shard.path, copied).await,
                Some(_) | None => {}
            }
        };
        let (put, ()) = join(storage.put(&path, bytes), keep).await;
        put.context_with(|| "write a shard")?;
        Ok(Shard { size, hash, tail, subtask: self.subtask, ..shard })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

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
            copies: None,
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

    #[tokio::test]
    async fn what_is_uploaded_is_kept_here_until_no_checkpoint_names_it() {
        let (root, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let env = Env::system();
        let copies = Arc::new(LocalCopies::open(root.path(), 100, &env).unwrap());
        let job = JobId { namespace: "n".into(), name: "j".into(), uid: "u".into() };
        let uploader = Uploader {
            storage: storage::open("memory://").unwrap(),
            env: env.clone(),
            folder: JobFolder::of(&job),
            attempt: Attempt(1),
            copies: Some(copies.clone()),
        };
        let file = files.path().join("000001.sst");
        std::fs::write(&file, b"rows").unwrap();
        let part = |reused: Vec<Shard>, file: Option<&std::path::Path>| {
            let encode = || Ok(Bytes::from_static(b"rows"));
            let pending = PendingShard::new(ShardKind::Keyed, None, 1, Box::new(encode));
            OperatorPart {
                uid: "counts".into(),
                kind: "counter".to_owned(),
                schema: Default::default(),
                parallelism: 1,
                splits: Vec::new(),
                reused,
                shards: vec![PendingShard { file: file.map(Into::into), ..pending }],
            }
        };
        let upload = async |epoch, part| {
            let mut parts = uploader.upload(Epoch(epoch), 0, vec![part], &HashMap::new()).await.unwrap();
            parts.remove(0).1.shards
        };
        let first = upload(1, part(Vec::new(), Some(&file))).await;
        assert_eq!(std::fs::metadata(&file).unwrap().nlink(), 2, "by another name, not once more");
        copies.completed(&env, Epoch(1));
        let second = upload(2, part(first.clone(), None)).await;
        copies.completed(&env, Epoch(2));
        let found = |shards: &[Shard]| shards.iter().map(|s| copies.find(&env, s).is_some()).collect::<Vec<_>>();
        assert_eq!(found(&second), [true, true]);
        let third = upload(3, part(vec![second[1].clone()], None)).await;
        copies.completed(&env, Epoch(3));
        assert_eq!((found(&first), found(&third)), (vec![false], vec![true, true]));
    }
}
