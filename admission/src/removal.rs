//! Removes what a job has left in storage, in steps that are bounded, may break off anywhere, and can be done again.
//!
//! Invariant: the log says that every checkpoint is given up before the first file goes, so that a removal that has broken off
//! leaves a job without a past, never one that is damaged; and whoever still runs the job is fenced by then.

use std::sync::Arc;

use floodmark_snapshot::{
    Env, JobId,
    log::{self, CheckpointLog, Entry, Event, JobFolder},
    savepoint::MANIFEST_FILE,
    storage::{ObjectInfo, Storage},
};
use futures::{StreamExt, TryStreamExt, stream};

use crate::{StorageError, history::entry_path};

/// Files that one step removes.
pub const FILES_PER_STEP_MAX: usize = 500;
/// Files deleted at the same time.
const DELETES_IN_FLIGHT_MAX: usize = 16;

/// What of a job is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Checkpoints and the log. Savepoints stay: each is complete in itself.
    AllButSavepoints,
    /// Savepoints, too.
    Everything,
}

/// What a step of a removal has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// There may be more: call it again.
    More {
        /// Files that this step has removed.
        files: usize,
    },
    /// Nothing is left.
    Done {
        /// Files that this step has removed.
        files: usize,
    },
}

impl Removal {
    pub(crate) fn of(files: usize, more: bool) -> Self {
        if more { Self::More { files } } else { Self::Done { files } }
    }
}

/// Removes files of a job that nobody runs any more: call it until it answers that nothing is left. `holder` is who removes it,
/// for readers of the log.
///
/// # Errors
/// When the storage can't be read or written. The same call goes on where this one has ended.
pub async fn remove_job(
    job: &JobId,
    storage: &Arc<dyn Storage>,
    env: &Env,
    holder: &str,
    extent: Extent,
) -> Result<Removal, StorageError> {
    let folder = JobFolder::of(job);
    let last = give_up(job, storage, env, holder, &folder).await?;
    let mut step = Step { storage: &**storage, folder: &folder, left: FILES_PER_STEP_MAX };
    step.remove("blobs").await?;
    if extent == Extent::Everything {
        step.remove("savepoints").await?;
    }
    if let Some(last) = last {
        step.trim(last).await?;
    }
    step.remove_strays(extent).await?;
    Ok(Removal::of(FILES_PER_STEP_MAX - step.left, step.left == 0))
}

/// Makes sure that the log ends with an entry that gives everything up; answers with its number, or `None` if there is no log.
async fn give_up(
    job: &JobId,
    storage: &Arc<dyn Storage>,
    env: &Env,
    holder: &str,
    folder: &JobFolder,
) -> Result<Option<u64>, StorageError> {
    match log::last(&**storage, folder).await.map_err(StorageError)? {
        None => return Ok(None),
        Some((seq, Ok(entry))) if gives_all_up(&entry) => return Ok(Some(seq)),
        Some(_) => {}
    }
    let opened = CheckpointLog::open(storage.clone(), env.clone(), job, holder).await;
    let (mut log, state) = opened.map_err(StorageError)?;
    let epochs = state.retained.iter().chain(&state.abandoned).map(|r| r.manifest.epoch).collect();
    // From its own entry on.
    let event = Event::Released { epochs, oldest_seq: log.next_seq() };
    log.append_once(event).await.map(Some).map_err(StorageError)
}

/// Whether nothing before an entry counts any more. A coordinator's release never goes so far: it keeps a checkpoint.
fn gives_all_up(entry: &Entry) -> bool {
    matches!(&entry.event, Event::Released { oldest_seq, .. } if *oldest_seq == entry.seq)
}

struct Step<'a> {
    storage: &'a dyn Storage,
    folder: &'a JobFolder,
    /// Files that this step may still remove; with none left, nothing more is done.
    left: usize,
}

impl Step<'_> {
    /// Removes what is in a folder of the job's.
    async fn remove(&mut self, inside: &str) -> Result<(), StorageError> {
        let listed = match self.left {
            0 => return Ok(()),
            left => self.storage.list_some(&self.folder.path(inside), left).await.map_err(StorageError)?,
        };
        for manifest in self.savepoint_manifests(&listed) {
            self.storage.delete(&manifest).await.map_err(StorageError)?;
        }
        self.remove_listed(&listed).await
    }

    /// The manifests of the savepoints that files belong to: they go before anything that they name.
    fn savepoint_manifests(&self, listed: &[ObjectInfo]) -> Vec<String> {
        let manifest = |file: &ObjectInfo| {
            let name = self.folder.relative(&file.path)?.strip_prefix("savepoints/")?.split('/').next()?;
            Some(self.folder.path(&format!("savepoints/{name}/{MANIFEST_FILE}")))
        };
        let mut manifests: Vec<String> = listed.iter().filter_map(manifest).collect();
        manifests.dedup();
        manifests
    }

    /// Removes the log but for its last entry, and that once it is alone.
    async fn trim(&mut self, last: u64) -> Result<(), StorageError> {
        if self.left == 0 {
            return Ok(());
        }
        let last = self.folder.path(&entry_path(last));
        // One more, because the last may be among them.
        let listed = self.storage.list_some(&self.folder.path("log"), self.left + 1).await.map_err(StorageError)?;
        let (last, mut others): (Vec<_>, Vec<_>) = listed.into_iter().partition(|o| o.path == last);
        others.truncate(self.left);
        self.remove_listed(&others).await?;
        match self.left {
            0 => Ok(()),
            _ => self.remove_listed(&last).await,
        }
    }

    /// Removes what is in the job's folder for no reason that is known.
    async fn remove_strays(&mut self, extent: Extent) -> Result<(), StorageError> {
        if self.left == 0 {
            return Ok(());
        }
        let mut strays = self.storage.list(self.folder.root(), None).await.map_err(StorageError)?;
        let savepoints = self.folder.path("savepoints/");
        strays.retain(|o| extent == Extent::Everything || !o.path.starts_with(&savepoints));
        strays.truncate(self.left);
        self.remove_listed(&strays).await
    }

    async fn remove_listed(&mut self, files: &[ObjectInfo]) -> Result<(), StorageError> {
        remove_files(self.storage, files).await?;
        self.left = self.left.saturating_sub(files.len());
        Ok(())
    }
}

/// Deletes files; the first that can't be ends it.
pub(crate) async fn remove_files(storage: &dyn Storage, files: &[ObjectInfo]) -> Result<(), StorageError> {
    // Made outside of the stream, so that the whole can be sent between threads.
    let deletes: Vec<_> = files.iter().map(|o| storage.delete(&o.path)).collect();
    let deletes = stream::iter(deletes).buffer_unordered(DELETES_IN_FLIGHT_MAX);
    deletes.try_collect::<()>().await.map_err(StorageError)
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::{restore::Snapshot, savepoint, storage};

    use super::*;
    use crate::{
        History,
        testing::{Flaky, append, planned, snapshot, with_files},
    };

    /// A storage in which the job has checkpoints with files and two savepoints, and another job has a file.
    async fn with_job(location: &str) -> Arc<dyn Storage> {
        let storage = storage::open(location).unwrap();
        let (job, folder) = (planned().id, JobFolder::of(&planned().id));
        for epoch in 1..=3 {
            let manifest = with_files(&storage, folder.root(), snapshot(&planned(), epoch)).await;
            let retained = Snapshot::new(manifest.clone().into(), storage.clone(), folder.root());
            append(&storage, &job, vec![Event::Completed { manifest: Box::new(manifest) }]).await;
            if epoch < 3 {
                savepoint::export(&retained, &storage, &folder, &format!("s{epoch}"), 1).await.unwrap();
            }
        }
        storage.put(&folder.path("odd"), "?".into()).await.unwrap();
        storage.put("default/other/local/blobs/1/a", "theirs".into()).await.unwrap();
        storage
    }

    async fn step(storage: &Arc<dyn Storage>, extent: Extent) -> Result<Removal, StorageError> {
        remove_job(&planned().id, storage, &Env::system(), "test:1", extent).await
    }

    async fn files(storage: &dyn Storage) -> Vec<String> {
        storage.list("", None).await.unwrap().into_iter().map(|o| o.path).collect()
    }

    #[tokio::test]
    async fn everything_of_the_job_goes_and_nothing_of_another_however_often() {
        let folder = tempfile::tempdir().unwrap();
        for location in ["memory://", folder.path().to_str().unwrap()] {
            let storage = with_job(location).await;
            let before = files(&*storage).await.len();
            // Its opening and its release of everything are files, too.
            assert_eq!(step(&storage, Extent::Everything).await.unwrap(), Removal::Done { files: before - 1 + 2 });
            assert_eq!(files(&*storage).await, ["default/other/local/blobs/1/a"]);
            assert_eq!(step(&storage, Extent::Everything).await.unwrap(), Removal::Done { files: 0 });
        }
    }

    #[tokio::test]
    async fn savepoints_stay_if_they_are_to_and_are_whole() {
        let folder = tempfile::tempdir().unwrap();
        for location in ["memory://", folder.path().to_str().unwrap()] {
            let storage = with_job(location).await;
            while step(&storage, Extent::AllButSavepoints).await.unwrap() != (Removal::Done { files: 0 }) {}
            let left = files(&*storage).await;
            let inside = |path: &String| path.starts_with("default/sums/local/savepoints/s");
            assert!(left.iter().filter(|p| !inside(p)).eq(["default/other/local/blobs/1/a"]), "{left:?}");
            let history = History::read(planned().id, storage.clone()).await.unwrap();
            assert!(!history.state.has_history());
            for name in ["s1", "s2"] {
                let found = history.find(&name.parse().unwrap()).await.unwrap();
                assert!(found.snapshot.verify().await.unwrap().is_empty(), "{name}");
            }
        }
    }

    #[tokio::test]
    async fn a_step_removes_so_many_files_and_no_more() {
        let storage = with_job("memory://").await;
        let more = FILES_PER_STEP_MAX * 2 + 10;
        for file in 0..more {
            storage.put(&format!("default/sums/local/blobs/7/{file}"), "x".into()).await.unwrap();
        }
        let mut removed = Vec::new();
        while removed.last() != Some(&0) {
            let before = files(&*storage).await.len();
            let (Removal::More { files: now } | Removal::Done { files: now }) =
                step(&storage, Extent::Everything).await.unwrap();
            let opened = if removed.is_empty() { 2 } else { 0 };
            assert_eq!(before + opened - files(&*storage).await.len(), now);
            removed.push(now);
        }
        assert_eq!(removed[..2], [FILES_PER_STEP_MAX; 2]);
        assert_eq!(files(&*storage).await, ["default/other/local/blobs/1/a"]);
    }

    #[tokio::test]
    async fn a_removal_that_breaks_off_anywhere_leaves_a_job_without_a_past_and_goes_on() {
        for extent in [Extent::AllButSavepoints, Extent::Everything] {
            for calls in 0.. {
                let storage = with_job("memory://").await;
                let broke_off = step(&Flaky::after(storage.clone(), calls), extent).await;
                let history = History::read(planned().id, storage.clone()).await.unwrap();
                assert!(history.state.damaged.is_empty(), "{extent:?}, call {calls}: {:?}", history.state.damaged);
                for checkpoint in history.retained() {
                    let found = history.find(&checkpoint.epoch.to_string().parse().unwrap()).await.unwrap();
                    assert!(
                        found.snapshot.verify().await.unwrap().is_empty(),
                        "{extent:?}, call {calls}: {checkpoint:?}"
                    );
                }
                for name in ["s1", "s2"] {
                    if let Ok(found) = history.find(&name.parse().unwrap()).await {
                        assert!(found.snapshot.verify().await.unwrap().is_empty(), "{extent:?}, call {calls}: {name}");
                    }
                }
                if let Err(error) = &broke_off {
                    assert!(error.may_pass(), "{error}");
                }
                while step(&storage, extent).await.unwrap() != (Removal::Done { files: 0 }) {}
                let savepoints = files(&*storage).await.iter().any(|p| p.contains("/savepoints/"));
                assert_eq!(savepoints, extent == Extent::AllButSavepoints);
                assert!(!files(&*storage).await.iter().any(|p| p.starts_with("default/sums/local/log")));
                if broke_off.is_ok() {
                    assert!(calls > 10);
                    break;
                }
            }
        }
    }

    #[tokio::test]
    async fn whoever_still_runs_the_job_is_fenced_before_a_file_goes() {
        for calls in 0.. {
            let storage = with_job("memory://").await;
            let opened = CheckpointLog::open(storage.clone(), Env::system(), &planned().id, "zombie:1").await;
            let (mut zombie, _) = opened.unwrap();
            let before = files(&*storage).await.len();
            let _ = step(&Flaky::after(storage.clone(), calls), Extent::Everything).await;
            let (_, last) = log::last(&*storage, zombie.folder()).await.unwrap().unwrap();
            if !gives_all_up(&last.unwrap()) {
                continue;
            }
            // It broke off right behind its release.
            assert_eq!(files(&*storage).await.len(), before + 2);
            let manifest = Box::new(snapshot(&planned(), 9));
            let error = zombie.append(Event::Completed { manifest }).await.unwrap_err();
            assert_eq!(error.disposition(), floodmark_snapshot::Disposition::Fenced);
            break;
        }
    }
}
