//! Which checkpoint a job starts from, and whether its state fits the job.
//!
//! A checkpoint is used only if every shard that somebody takes over is as it was written. One that is damaged is passed over
//! with its reason, and the next older is tried; a job with a past never silently starts from nothing.

mod origin;
mod plan;
mod reference;
mod source;

use std::{fmt::Write as _, sync::Arc};

pub use self::{
    origin::{Origin, StartId},
    plan::{Fate, Line, StatePlan, Taker},
    reference::{Found, Reference, Scope, Visible, at, find, located},
    source::Snapshot,
};
use crate::{
    Disposition, Epoch, Error, JobId, Manifest, Result,
    log::{JobFolder, LogState, Retained},
    manifest::MANIFEST_FORMAT,
    storage::Storage,
};

/// A checkpoint that was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its number.
    pub epoch: Epoch,
    /// Why.
    pub reason: String,
}

/// A checkpoint that a job may start from.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// It.
    pub snapshot: Snapshot,
    /// Whether its files are the job's own: then later checkpoints may name them again, and retention deletes them.
    pub owned: bool,
}

/// The checkpoints that a job may start from, newest first.
///
/// # Errors
/// When one belongs to another job or has a format that this program can't read; when the place of one can't be opened.
pub fn candidates(storage: &Arc<dyn Storage>, job: &JobId, state: &LogState) -> Result<Vec<Candidate>> {
    let folder = JobFolder::of(job);
    let candidate = |retained: &Retained| {
        let manifest = &retained.manifest;
        let owned = retained.from.is_none();
        if owned && manifest.job != *job {
            return Err(Error::abort(format!("it belongs to job {}, not to {job}", manifest.job)));
        }
        check_format(manifest)?;
        let found = reference::own_checkpoint(storage, &folder, retained, state)?;
        Ok(Candidate { snapshot: found.snapshot, owned })
    };
    let named = |r: &Retained| candidate(r).map_err(|e| e.context(format!("restore checkpoint {}", r.manifest.epoch)));
    state.retained.iter().rev().map(named).collect()
}

/// Whether this program can read a manifest.
///
/// # Errors
/// Says which formats it reads.
pub fn check_format(manifest: &Manifest) -> Result<()> {
    let format = manifest.format;
    if (1..=MANIFEST_FORMAT).contains(&format) {
        return Ok(());
    }
    Err(Error::abort(format!("its format is {format}, and this program reads 1 to {MANIFEST_FORMAT}")))
}

/// Starts from the first candidate whose files are intact: `start` reads and takes over what it needs, and fails as `Corrupt`
/// if something is damaged. Answers with what `start` answered, and with the candidates passed over.
///
/// # Errors
/// Any other error of `start`.
pub async fn first_intact<T>(
    candidates: Vec<Candidate>,
    mut start: impl AsyncFnMut(&Candidate) -> Result<T>,
) -> Result<(Option<(Candidate, T)>, Vec<Rejected>)> {
    let mut rejected = Vec::new();
    for candidate in candidates {
        let epoch = candidate.snapshot.manifest.epoch;
        match start(&candidate).await {
            Ok(started) => return Ok((Some((candidate, started)), rejected)),
            Err(error) if error.disposition() == Disposition::Corrupt => {
                rejected.push(Rejected { epoch, reason: error.to_string() });
            }
            Err(error) => return Err(error.context(format!("restore checkpoint {epoch}"))),
        }
    }
    Ok((None, rejected))
}

/// Why a job that has a past can't start: nothing of it is intact. `None` if it has no past.
#[must_use]
pub fn nothing_intact(storage: &dyn Storage, job: &JobId, state: &LogState, rejected: &[Rejected]) -> Option<Error> {
    if rejected.is_empty() && state.damaged.is_empty() {
        return None;
    }
    let mut reasons = String::new();
    for Rejected { epoch, reason } in rejected {
        let _ = write!(reasons, "; checkpoint {epoch}: {reason}");
    }
    for damaged in &state.damaged {
        let _ = write!(reasons, "; log entry {}: {}", damaged.seq, damaged.reason);
    }
    Some(Error::corrupt(format!(
        "no checkpoint of {job} in {} is intact, and the job does not start from nothing unless told to (--restore none; in a cluster, upgrade mode Stateless){reasons}",
        storage.describe()
    )))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        KeyGroup, KeyGroupRange, OperatorSnapshot, Shard, ShardKind,
        log::{Damaged, Event},
        manifest::hash_hex,
        savepoint, storage,
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
        let mut manifest = Manifest::new(job(), Epoch(epoch));
        manifest.operators.insert("hot/window-1".into(), operator);
        Retained { seq: epoch, manifest, from: None }
    }

    async fn three() -> (Arc<dyn Storage>, LogState) {
        let storage = storage::open("memory://").unwrap();
        let mut retained = Vec::new();
        for epoch in 1..=3 {
            retained.push(checkpoint(&*storage, epoch).await);
        }
        (storage, LogState { retained, ..LogState::default() })
    }

    /// The epoch that the job starts from, and the reasons why newer ones are passed over.
    async fn restore(storage: &Arc<dyn Storage>, state: &LogState) -> Result<(Option<Epoch>, Vec<Rejected>)> {
        let intact = async |candidate: &Candidate| match candidate.snapshot.verify().await?.pop() {
            Some(damage) => Err(damage),
            None => Ok(()),
        };
        let (started, rejected) = first_intact(candidates(storage, &job(), state)?, intact).await?;
        let epoch = started.map(|(candidate, ())| candidate.snapshot.manifest.epoch);
        match nothing_intact(&**storage, &job(), state, &rejected) {
            Some(error) if epoch.is_none() => Err(error),
            Some(_) | None => Ok((epoch, rejected)),
        }
    }

    #[tokio::test]
    async fn a_damaged_checkpoint_is_passed_over_with_its_reason() {
        let (storage, state) = three().await;
        let path = JobFolder::of(&job()).path("blobs/1/3.state");
        for damage in [b"state of epoch 4".as_slice(), b"state of"] {
            storage.put(&path, Bytes::from_static(damage)).await.unwrap();
            let (epoch, rejected) = restore(&storage, &state).await.unwrap();
            assert_eq!((epoch, rejected[0].epoch), (Some(Epoch(2)), Epoch(3)));
            assert!(rejected[0].reason.starts_with("shard blobs/1/3.state"), "{rejected:?}");
        }
    }

    #[tokio::test]
    async fn a_job_with_a_past_never_starts_from_nothing_by_itself() {
        let (storage, state) = three().await;
        for epoch in 1..=3 {
            storage.delete(&JobFolder::of(&job()).path(&format!("blobs/1/{epoch}.state"))).await.unwrap();
        }
        let error = restore(&storage, &state).await.unwrap_err().to_string();
        assert!(
            error.contains(
                "(--restore none; in a cluster, upgrade mode Stateless); checkpoint 3: shard blobs/1/3.state is missing"
            ),
            "{error}"
        );
        let damaged = vec![Damaged { seq: 4, reason: "checksum mismatch".into() }];
        let state = LogState { damaged, ..LogState::default() };
        assert!(restore(&storage, &state).await.is_err());
        assert!(restore(&storage, &LogState::default()).await.unwrap().0.is_none());
    }

    #[tokio::test]
    async fn a_checkpoint_of_another_job_is_refused() {
        let (storage, mut state) = three().await;
        state.retained[2].manifest.job.name = "other".into();
        let error = restore(&storage, &state).await.unwrap_err().to_string();
        assert_eq!(error, "restore checkpoint 3: it belongs to job default/other/local, not to default/j/local");
    }

    fn found(reference: &str, error: &str, result: &Result<Found>) {
        let message = result.as_ref().err().map_or("no error".to_owned(), ToString::to_string);
        assert!(message.contains(error), "{reference}: {message}");
    }

    #[tokio::test]
    async fn a_savepoint_outlives_its_job_and_is_restored_from_wherever_it_is_moved() {
        let folder = tempfile::tempdir().unwrap();
        let storage = storage::open(folder.path().to_str().unwrap()).unwrap();
        let mut retained = checkpoint(&*storage, 7).await;
        let operator = retained.manifest.operators.values_mut().next().unwrap();
        let staged = Shard { epoch: Some(Epoch(7)), ..Shard::new("blobs/1/gone.staged", ShardKind::Staged) };
        operator.shards.push(staged);
        let snapshot = Snapshot::new(retained.manifest.into(), storage.clone(), JobFolder::of(&job()).root());
        let export = |name: &'static str| {
            let (snapshot, storage) = (snapshot.clone(), storage.clone());
            async move { savepoint::export(&snapshot, &storage, &JobFolder::of(&job()), name, 5).await }
        };
        let location = export("before-upgrade").await.unwrap();
        assert!(location.ends_with("default/j/local/savepoints/before-upgrade"), "{location}");
        assert!(export("before-upgrade").await.unwrap_err().to_string().contains("already"));
        assert!(export("7").await.unwrap_err().to_string().contains("can't be a savepoint's name"));
        storage.delete(&JobFolder::of(&job()).path("blobs/1/7.state")).await.unwrap();
        assert!(export("too-late").await.unwrap_err().to_string().contains("blobs/1/7.state is missing"));

        let elsewhere = tempfile::tempdir().unwrap();
        let moved = elsewhere.path().join("kept");
        std::fs::rename(&location, &moved).unwrap();
        let found = at(moved.to_str().unwrap()).await.unwrap();
        assert!(found.snapshot.verify().await.unwrap().is_empty());
        assert_eq!(found.snapshot.manifest.shards().count(), 1, "what was staged is visible, and not in it");
        assert_eq!(found.adopted_as(Epoch(12), &Visible::new()).epoch, Epoch(12));
        for name in ["7.state", savepoint::MANIFEST_FILE] {
            let path = moved.join(name);
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[3] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            let damage = match at(moved.to_str().unwrap()).await {
                Ok(found) => found.snapshot.verify().await.unwrap().pop().unwrap(),
                Err(error) => error,
            };
            assert_eq!(damage.disposition(), Disposition::Corrupt, "{name}");
            bytes[3] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
        }
    }

    #[tokio::test]
    async fn a_file_of_which_there_are_two_parts_is_copied_and_verified_once() {
        let storage = storage::open("memory://").unwrap();
        let mut retained = checkpoint(&*storage, 7).await;
        let operator = retained.manifest.operators.values_mut().next().unwrap();
        let range = |first, last| KeyGroupRange { first: KeyGroup(first), last: KeyGroup(last) };
        let whole = Shard { key_groups: Some(range(0, 7)), ..operator.shards[0].clone() };
        let parts = [(0, range(0, 3)), (1, range(4, 7))];
        let parts = parts.map(|(subtask, own)| Shard { subtask, ..whole.cut_to(own).unwrap() });
        operator.shards = parts.to_vec();
        retained.manifest.format = crate::manifest::format_of(parts.iter());
        let folder = JobFolder::of(&job());
        let snapshot = Snapshot::new(retained.manifest.into(), storage.clone(), folder.root());
        savepoint::export(&snapshot, &storage, &folder, "parts", 1).await.unwrap();
        let listed = storage.list(&folder.path("savepoints/parts"), None).await.unwrap();
        assert_eq!(listed.len(), 2, "one file, and the manifest: {listed:?}");
        let state = LogState::default();
        let scope = Scope { storage: &storage, job: &job(), state: &state };
        let found = find(&"parts".parse().unwrap(), scope).await.unwrap();
        check_format(&found.snapshot.manifest).unwrap();
        let shards: Vec<_> =
            found.snapshot.manifest.shards().map(|s| (s.subtask, s.path.as_str(), s.key_groups)).collect();
        assert_eq!(shards, [(0, "7.state", Some(range(0, 3))), (1, "7.state", Some(range(4, 7)))]);
        assert!(found.snapshot.verify().await.unwrap().is_empty());
        storage.put(&folder.path("savepoints/parts/7.state"), Bytes::from_static(b"else")).await.unwrap();
        assert_eq!(found.snapshot.verify().await.unwrap().len(), 1, "one file is damaged");
        let later = Manifest { format: MANIFEST_FORMAT + 1, ..(*found.snapshot.manifest).clone() };
        let error = check_format(&later).unwrap_err();
        assert_eq!(
            (error.disposition(), &*error.to_string()),
            (Disposition::Abort, "its format is 3, and this program reads 1 to 2")
        );
    }

    #[tokio::test]
    async fn a_snapshot_is_found_by_each_of_its_names_and_what_is_not_there_is_said_with_what_is() {
        let folder = tempfile::tempdir().unwrap();
        let storage = storage::open(folder.path().to_str().unwrap()).unwrap();
        let (mut log, _) =
            crate::log::CheckpointLog::open(storage.clone(), crate::Env::system(), &job(), "t").await.unwrap();
        for epoch in [3, 4] {
            let manifest = Box::new(checkpoint(&*storage, epoch).await.manifest);
            log.append(Event::Completed { manifest }).await.unwrap();
        }
        let state = crate::log::read(&*storage, log.folder()).await.unwrap();
        let scope = Scope { storage: &storage, job: &job(), state: &state };
        let look = async |name: &str| find(&name.parse()?, scope).await;
        let newest = look("latest").await.unwrap();
        savepoint::export(&newest.snapshot, &storage, log.folder(), "kept", 1).await.unwrap();
        let base = format!("{}/default/j/local", folder.path().display());
        let entry = format!("{base}/log/{:020}.json", 1);
        let cases = [
            ("3", 3, true),
            ("latest", 4, true),
            ("kept", 4, false),
            (&entry, 3, true),
            (&base, 4, true),
            (&format!("{base}/savepoints/kept/"), 4, false),
        ];
        for (name, epoch, own) in cases {
            let found = look(name).await.unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!((found.snapshot.manifest.epoch, found.own), (Epoch(epoch), own), "{name}");
            assert!(found.snapshot.verify().await.unwrap().is_empty(), "{name}");
        }
        let refused = [
            ("5", "has no checkpoint 5; there is: 3, 4"),
            ("other", "no savepoint 'other'; there is: kept"),
            ("a b", "names no snapshot"),
            ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
            (&format!("{base}/blobs"), "there is no snapshot at"),
            (&format!("{base}/log/{:020}.json", 0), "no completed checkpoint"),
        ];
        for (name, error) in refused {
            found(name, error, &look(name).await);
        }
    }

    #[tokio::test]
    async fn output_that_another_job_has_not_committed_is_staged_anew_under_an_epoch_of_this_one() {
        let storage = storage::open("memory://").unwrap();
        let mut retained = checkpoint(&*storage, 9).await;
        let operator = retained.manifest.operators.values_mut().next().unwrap();
        let staged = |epoch| Shard { epoch: Some(Epoch(epoch)), ..Shard::new(format!("{epoch}"), ShardKind::Staged) };
        let of = |shard: Shard, subtask| Shard { subtask, ..shard };
        operator.shards.extend([staged(7), staged(8), staged(9), of(staged(9), 1)]);
        let uid = retained.manifest.operators.keys().next().unwrap().clone();
        let snapshot = Snapshot::new(retained.manifest.into(), storage, "");
        let found = Found { snapshot, own: false, committed: Epoch(7), history: "h".into() };
        assert_eq!(found.staging(), [(uid.clone(), 0), (uid.clone(), 1)].into());
        let left = |visible: &Visible| {
            let adopted = found.adopted_as(Epoch(3), visible);
            let staged: Vec<_> = adopted.shards().filter(|s| s.kind == ShardKind::Staged).cloned().collect();
            assert!(staged.iter().all(|s| s.epoch == Some(Epoch(3))));
            staged.into_iter().map(|s| (s.path, s.subtask)).collect::<Vec<_>>()
        };
        assert_eq!(left(&Visible::new()), [("8".to_owned(), 0), ("9".to_owned(), 0), ("9".to_owned(), 1)]);
        // Its log does not say so, but what it wrote does.
        assert_eq!(left(&[((uid.clone(), 0), Epoch(8))].into()), [("9".to_owned(), 0), ("9".to_owned(), 1)]);
        assert_eq!(left(&[((uid.clone(), 0), Epoch(9))].into()), [("9".to_owned(), 1)]);
        assert_eq!(left(&[((uid, 1), Epoch(6))].into()).len(), 3, "less than the log says");
    }
}
