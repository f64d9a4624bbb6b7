//! Which checkpoint a job starts from, and whether its state fits the job.
//!
//! A checkpoint is used only after every shard has been read back and its size and hash verified. One that is damaged is
//! passed over with its reason, and the next older is tried; a job with a past never silently starts from nothing.

use std::{collections::HashMap, fmt::Write as _, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use crate::{
    Context, Disposition, Epoch, Error, JobId, KeyGroupRange, Manifest, OperatorSnapshot, OperatorUid, Result, Shard,
    ShardKind, StateSchema,
    log::{JobFolder, LogState},
    manifest::{MANIFEST_FORMAT, hash_hex},
    schema::Evolution,
    storage::Storage,
};

/// Shards read at the same time.
const READS_IN_FLIGHT_MAX: usize = 16;

/// A checkpoint that was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its number.
    pub epoch: Epoch,
    /// Why.
    pub reason: String,
}

/// A verified checkpoint, in memory.
#[derive(Clone, Debug)]
pub struct Restored {
    /// What it consists of.
    pub manifest: Arc<Manifest>,
    /// The bytes of its shards, by path.
    pub shards: HashMap<String, Bytes>,
    /// Newer ones that were passed over, newest first.
    pub rejected: Vec<Rejected>,
}

impl Restored {
    /// The snapshot of an operator, if it has one.
    #[must_use]
    pub fn operator(&self, uid: &OperatorUid) -> Option<&OperatorSnapshot> {
        self.manifest.operators.get(uid)
    }

    /// The keyed shards of `uid` that overlap `range`, with their bytes.
    #[must_use]
    pub fn keyed(&self, uid: &OperatorUid, range: KeyGroupRange) -> Vec<(Shard, Bytes)> {
        let wanted = |s: &&Shard| s.kind == ShardKind::Keyed && s.key_groups.is_none_or(|g| g.overlaps(&range));
        self.shards_of(uid, wanted)
    }

    /// The records that subtask `index` of sink `uid` had staged, with their bytes.
    #[must_use]
    pub fn staged(&self, uid: &OperatorUid, index: u32) -> Vec<(Shard, Bytes)> {
        self.shards_of(uid, |s: &&Shard| s.kind == ShardKind::Staged && s.subtask == index)
    }

    fn shards_of(&self, uid: &OperatorUid, wanted: impl Fn(&&Shard) -> bool) -> Vec<(Shard, Bytes)> {
        let shards = self.operator(uid).into_iter().flat_map(|o| &o.shards).filter(wanted);
        shards.filter_map(|s| self.shards.get(&s.path).map(|bytes| (s.clone(), bytes.clone()))).collect()
    }
}

/// Reads the newest checkpoint that is complete and intact. `None` if the job has no past.
///
/// # Errors
/// When the job has a past but no checkpoint is intact; when the newest intact one belongs to another job; when the storage
/// can't be read.
pub async fn newest_intact(
    storage: &dyn Storage,
    folder: &JobFolder,
    job: &JobId,
    state: &LogState,
) -> Result<Option<Restored>> {
    let mut rejected = Vec::new();
    for candidate in state.retained.iter().rev() {
        let manifest = &candidate.manifest;
        match load(storage, folder, job, manifest).await {
            Ok(shards) => return Ok(Some(Restored { manifest: Arc::new(manifest.clone()), shards, rejected })),
            Err(error) if error.disposition() == Disposition::Corrupt => {
                rejected.push(Rejected { epoch: manifest.epoch, reason: error.to_string() });
            }
            Err(error) => return Err(error.context(format!("restore checkpoint {}", manifest.epoch))),
        }
    }
    if rejected.is_empty() && state.damaged.is_empty() {
        return Ok(None);
    }
    let mut reasons = String::new();
    for Rejected { epoch, reason } in &rejected {
        let _ = write!(reasons, "; checkpoint {epoch}: {reason}");
    }
    for damaged in &state.damaged {
        let _ = write!(reasons, "; log entry {}: {}", damaged.seq, damaged.reason);
    }
    Err(Error::corrupt(format!(
        "no checkpoint of {job} in {} is intact, and the job does not start from nothing unless told to (--restore none){reasons}",
        storage.describe()
    )))
}

async fn load(
    storage: &dyn Storage,
    folder: &JobFolder,
    job: &JobId,
    manifest: &Manifest,
) -> Result<HashMap<String, Bytes>> {
    if manifest.job != *job {
        return Err(Error::abort(format!("it belongs to job {}, not to {job}", manifest.job)));
    }
    if manifest.format != MANIFEST_FORMAT {
        return Err(Error::abort(format!(
            "its format is {}, and this program reads {MANIFEST_FORMAT}",
            manifest.format
        )));
    }
    stream::iter(manifest.shards())
        .map(|shard| async move { Ok((shard.path.clone(), read_shard(storage, folder, shard).await?)) })
        .buffer_unordered(READS_IN_FLIGHT_MAX)
        .try_collect()
        .await
}

/// Reads every shard that a manifest names and says what is wrong with each that is not as it was written.
///
/// # Errors
/// When the storage can't be read; damage is no error here.
pub async fn verify(storage: &dyn Storage, folder: &JobFolder, manifest: &Manifest) -> Result<Vec<Error>> {
    let read: Vec<Result<Bytes>> = stream::iter(manifest.shards())
        .map(|s| read_shard(storage, folder, s))
        .buffered(READS_IN_FLIGHT_MAX)
        .collect()
        .await;
    let mut damage = Vec::new();
    for error in read.into_iter().filter_map(Result::err) {
        if error.disposition() != Disposition::Corrupt {
            return Err(error);
        }
        damage.push(error);
    }
    Ok(damage)
}

async fn read_shard(storage: &dyn Storage, folder: &JobFolder, shard: &Shard) -> Result<Bytes> {
    let path = &shard.path;
    let bytes = storage.get(&folder.path(path)).await.context_with(|| format!("read shard {path}"))?;
    let bytes = bytes.ok_or_else(|| Error::corrupt(format!("shard {path} is missing")))?;
    if bytes.len() as u64 != shard.size {
        return Err(Error::corrupt(format!("shard {path} has {} bytes instead of {}", bytes.len(), shard.size)));
    }
    let hash = hash_hex(&bytes);
    if hash != shard.hash {
        return Err(Error::corrupt(format!("shard {path} is damaged: its hash is {hash} instead of {}", shard.hash)));
    }
    Ok(bytes)
}

/// An operator of the new plan, as far as its state goes.
#[derive(Clone, Debug)]
pub struct Taker {
    /// Its identity.
    pub uid: OperatorUid,
    /// What it is, in words.
    pub kind: String,
    /// The types of its state; `None` if it keeps none.
    pub schema: Option<StateSchema>,
}

/// Checks that the state of a snapshot fits the plan: everything in it has a taker of the same kind and schema.
///
/// # Errors
/// Names every operator whose state does not fit, why, and what to do.
pub fn check_fits(
    manifest: &Manifest,
    takers: &[Taker],
    max_parallelism: u16,
    allow_dropped_state: bool,
) -> Result<()> {
    let mut problems = Vec::new();
    if manifest.max_parallelism != max_parallelism {
        problems.push(format!(
            "maxParallelism is {max_parallelism}, but its keys were dealt out for {}: it can't change in a job's life",
            manifest.max_parallelism
        ));
    }
    for (uid, snapshot) in &manifest.operators {
        match takers.iter().find(|t| t.uid == *uid) {
            Some(Taker { kind, schema: Some(schema), .. }) if *kind == snapshot.kind => {
                let Evolution { added: _, dropped, mut refused } = snapshot.schema.evolve(schema);
                if !dropped.is_empty() && !allow_dropped_state {
                    refused.push(format!(
                        "{} is kept no more; to give it up set spec.restore.allowDroppedState: true",
                        dropped.join(", ")
                    ));
                }
                problems.extend(refused.into_iter().map(|reason| format!("{uid}: {reason}")));
            }
            Some(Taker { kind, .. }) if *kind != snapshot.kind => {
                problems.push(format!("{uid} was a {} and is now a {kind}", snapshot.kind));
            }
            Some(_) if allow_dropped_state => {}
            Some(_) => problems
                .push(format!("{uid} keeps no state any more; to give it up set spec.restore.allowDroppedState: true")),
            None if allow_dropped_state => {}
            None => problems.push(format!(
                "{uid} ({}) has state, but the job has no such operator any more; to give the state up set \
                 spec.restore.allowDroppedState: true",
                snapshot.kind
            )),
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::abort(format!(
        "checkpoint {} of {} does not fit this job (to start without state use --restore none): {}",
        manifest.epoch,
        manifest.job,
        problems.join("; ")
    )))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        Attempt, Generation,
        log::{Damaged, Retained},
        storage,
    };

    fn job() -> JobId {
        JobId { namespace: "default".into(), name: "j".into(), uid: "local".into() }
    }

    async fn checkpoint(storage: &dyn Storage, epoch: u64) -> Retained {
        let bytes = Bytes::from(format!("state of epoch {epoch}"));
        let path = format!("blobs/1/{epoch}.state");
        storage.put(&JobFolder::of(&job()).path(&path), bytes.clone()).await.unwrap();
        let shard =
            Shard { size: bytes.len() as u64, hash: hash_hex(&bytes), rows: 1, ..Shard::new(path, ShardKind::Keyed) };
        let operator = OperatorSnapshot {
            kind: "window aggregate".into(),
            schema: "count".into(),
            parallelism: 1,
            splits: Vec::new(),
            shards: vec![shard],
        };
        let manifest = Manifest {
            format: MANIFEST_FORMAT,
            job: job(),
            epoch: Epoch(epoch),
            generation: Generation(1),
            attempt: Attempt(1),
            triggered_at_ms: 0,
            duration_ms: 0,
            max_parallelism: 128,
            plan: String::new(),
            end_of_input: false,
            operators: BTreeMap::from([("hot/window-1".into(), operator)]),
        };
        Retained { seq: epoch, manifest }
    }

    async fn three() -> (Arc<dyn Storage>, LogState) {
        let storage = storage::open("memory://").unwrap();
        let mut retained = Vec::new();
        for epoch in 1..=3 {
            retained.push(checkpoint(&*storage, epoch).await);
        }
        (storage, LogState { retained, ..LogState::default() })
    }

    async fn restore(storage: &dyn Storage, state: &LogState) -> Result<Option<Restored>> {
        newest_intact(storage, &JobFolder::of(&job()), &job(), state).await
    }

    #[tokio::test]
    async fn a_damaged_checkpoint_is_passed_over_with_its_reason() {
        let (storage, state) = three().await;
        let path = JobFolder::of(&job()).path("blobs/1/3.state");
        for damage in [b"state of epoch 4".as_slice(), b"state of"] {
            storage.put(&path, Bytes::from_static(damage)).await.unwrap();
            let restored = restore(&*storage, &state).await.unwrap().unwrap();
            assert_eq!(restored.manifest.epoch, Epoch(2));
            assert_eq!(restored.rejected[0].epoch, Epoch(3));
            assert!(restored.rejected[0].reason.starts_with("shard blobs/1/3.state"), "{:?}", restored.rejected);
            let mut damaged = Vec::new();
            for retained in &state.retained {
                let damage = verify(&*storage, &JobFolder::of(&job()), &retained.manifest).await.unwrap();
                damaged.extend(damage.iter().map(|_| retained.manifest.epoch.0));
            }
            assert_eq!(damaged, [3]);
        }
    }

    #[tokio::test]
    async fn a_job_with_a_past_never_starts_from_nothing_by_itself() {
        let (storage, state) = three().await;
        for epoch in 1..=3 {
            storage.delete(&JobFolder::of(&job()).path(&format!("blobs/1/{epoch}.state"))).await.unwrap();
        }
        let error = restore(&*storage, &state).await.unwrap_err().to_string();
        assert!(error.contains("(--restore none); checkpoint 3: shard blobs/1/3.state is missing"), "{error}");
        let damaged = vec![Damaged { seq: 4, reason: "checksum mismatch".into() }];
        let state = LogState { damaged, ..LogState::default() };
        assert!(restore(&*storage, &state).await.is_err());
        assert!(restore(&*storage, &LogState::default()).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_checkpoint_of_another_job_is_refused() {
        let (storage, mut state) = three().await;
        state.retained[2].manifest.job.name = "other".into();
        let error = restore(&*storage, &state).await.unwrap_err().to_string();
        assert_eq!(error, "restore checkpoint 3: it belongs to job default/other/local, not to default/j/local");
    }

    #[tokio::test]
    async fn state_that_does_not_fit_is_refused_by_name() {
        let manifest = three().await.1.retained.remove(0).manifest;
        let taker = |uid: &str, schema: &str| Taker {
            uid: uid.into(),
            kind: "window aggregate".into(),
            schema: Some(schema.into()),
        };
        let check = |takers: &[Taker], max, allow| check_fits(&manifest, takers, max, allow).map_err(|e| e.to_string());
        assert_eq!(check(&[taker("hot/window-1", "count"), taker("new", "x")], 128, false), Ok(()));
        assert_eq!(check(&[], 128, true), Ok(()));
        let refused = |takers: &[Taker], max| check(takers, max, false).unwrap_err();
        assert!(
            refused(&[], 128).contains("hot/window-1 (window aggregate) has state, but the job has no such operator")
        );
        assert!(
            refused(&[taker("hot/window-1", "sum")], 128).contains("hot/window-1: it was [count] and is now [sum]")
        );
        assert!(refused(&[taker("hot/window-1", "count")], 64).contains("maxParallelism is 64, but"));
    }
}
