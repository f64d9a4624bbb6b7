//! A job's snapshots, as its log and its folder have them, and how a person's words lead to one of them. Reads only: a job
//! that runs meanwhile does not notice.

use std::sync::Arc;

use floodmark_snapshot::{
    Epoch, Error, JobId,
    log::{self, JobFolder, LogState, Retained},
    restore::{self, Found, Reference, Scope},
    storage::Storage,
};

use crate::StorageError;

/// See the header of this file.
pub struct History {
    /// Whose.
    pub job: JobId,
    /// Where its snapshots are.
    pub storage: Arc<dyn Storage>,
    /// Its folder there.
    pub folder: JobFolder,
    /// Its log; entries that are damaged are named in it.
    pub state: LogState,
}

/// A completed checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its number.
    pub epoch: Epoch,
    /// When it was triggered, milliseconds since the Unix epoch.
    pub triggered_at_ms: i64,
    /// From then to the last acknowledgement, milliseconds.
    pub duration_ms: u64,
    /// Bytes of all its shards.
    pub size: u64,
    /// Where it is, as `--restore` and `spec.restore.from` take it.
    pub location: String,
    /// Whether the job has not taken it itself, but taken it over under this number: a savepoint, or another job's checkpoint.
    pub adopted: bool,
}

impl History {
    /// Reads a job's history; that of a job that never ran is empty.
    ///
    /// # Errors
    /// When the storage can't be read.
    pub async fn read(job: JobId, storage: Arc<dyn Storage>) -> Result<Self, StorageError> {
        let folder = JobFolder::of(&job);
        let state = log::read(&*storage, &folder).await.map_err(StorageError)?;
        Ok(Self { job, storage, folder, state })
    }

    /// Finds a snapshot by the words that `--restore` takes.
    ///
    /// # Errors
    /// When there is no such snapshot, saying what there is; when it is damaged or can't be read.
    pub async fn find(&self, reference: &Reference) -> Result<Found, Error> {
        let scope = Scope { storage: &self.storage, job: &self.job, state: &self.state };
        restore::find(reference, scope).await
    }

    /// The checkpoint that the job would go on from; `None` if there is none.
    #[must_use]
    pub fn newest(&self) -> Option<Checkpoint> {
        self.state.retained.last().map(|r| self.checkpoint(r))
    }

    /// All that the job can go on from, oldest first.
    pub fn retained(&self) -> impl Iterator<Item = Checkpoint> {
        self.state.retained.iter().map(|r| self.checkpoint(r))
    }

    fn checkpoint(&self, retained: &Retained) -> Checkpoint {
        let manifest = &retained.manifest;
        Checkpoint {
            epoch: manifest.epoch,
            triggered_at_ms: manifest.triggered_at_ms,
            duration_ms: manifest.duration_ms,
            size: manifest.size(),
            location: retained.from.clone().unwrap_or_else(|| self.locate_entry(retained.seq)),
            adopted: retained.from.is_some(),
        }
    }

    /// Where something in the job's folder is, as a location.
    #[must_use]
    pub fn locate(&self, relative: &str) -> String {
        format!("{}/{}", self.storage.describe(), self.folder.path(relative))
    }

    /// The same for the checkpoint of a log entry.
    #[must_use]
    pub fn locate_entry(&self, seq: u64) -> String {
        self.locate(&entry_path(seq))
    }
}

/// The path of a log entry in its job's folder.
#[must_use]
pub fn entry_path(seq: u64) -> String {
    format!("log/{seq:020}.json")
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::{Manifest, log::Event, storage};

    use super::*;
    use crate::testing::{Flaky, append, planned};

    #[tokio::test]
    async fn the_newest_checkpoint_is_told_with_all_that_are_kept_and_what_is_damaged() {
        let storage = storage::open("memory://").unwrap();
        let job = planned().id;
        let read = async || History::read(job.clone(), storage.clone()).await.unwrap();
        assert_eq!((read().await.newest(), read().await.retained().count()), (None, 0));
        let completed = |epoch| {
            let mut manifest = crate::testing::snapshot(&planned(), epoch);
            (manifest.triggered_at_ms, manifest.duration_ms) = (1_000 * epoch as i64, 7);
            Event::Completed { manifest: Box::new(manifest) }
        };
        append(&storage, &job, (1..=3).map(completed).collect()).await;
        let history = read().await;
        let newest = Checkpoint {
            epoch: Epoch(3),
            triggered_at_ms: 3_000,
            duration_ms: 7,
            size: 12,
            location: format!("{}/{}", storage.describe(), "default/sums/local/log/00000000000000000003.json"),
            adopted: false,
        };
        assert_eq!(history.newest(), Some(newest));
        assert_eq!(history.retained().map(|c| c.epoch.0).collect::<Vec<_>>(), [1, 2, 3]);
        let path = history.folder.path(&entry_path(2));
        storage.put(&path, "{}".into()).await.unwrap();
        let history = read().await;
        assert_eq!(history.retained().map(|c| c.epoch.0).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(history.state.damaged.iter().map(|d| d.seq).collect::<Vec<_>>(), [2]);
        let manifest = Box::new(Manifest::new(job.clone(), Epoch(9)));
        let adopted = Event::Adopted { from: "/kept/base".into(), asked: "/kept/base".into(), manifest };
        append(&storage, &job, vec![adopted]).await;
        let newest = read().await.newest().unwrap();
        assert_eq!((newest.epoch, newest.location.as_str(), newest.adopted), (Epoch(9), "/kept/base", true));
    }

    #[tokio::test]
    async fn a_storage_that_is_down_is_no_empty_history() {
        let storage = Flaky::down(storage::open("memory://").unwrap());
        let error = History::read(planned().id, storage).await.err().unwrap();
        assert!(error.may_pass(), "{error}");
    }
}
