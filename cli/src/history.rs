//! A job's snapshots, as its log and its folder have them, and how a person's words lead to one of them. Reads only: a job
//! that runs meanwhile does not notice.

use std::{path::Path, sync::Arc};

use floodmark_snapshot::{
    JobId,
    log::{self, JobFolder, LogState},
    restore::{self, Found, Reference, Scope},
    storage::{self, Storage},
};

use crate::{
    exit::{Exit, Failure},
    job,
};

/// See the header of this file.
pub(crate) struct History {
    /// Whose.
    pub(crate) job: JobId,
    /// Where its snapshots are; absolute.
    pub(crate) location: String,
    /// The same, opened.
    pub(crate) storage: Arc<dyn Storage>,
    /// Its folder there.
    pub(crate) folder: JobFolder,
    /// Its log.
    pub(crate) state: LogState,
}

impl History {
    /// Reads the history of the job of a manifest; that of a job that never ran is empty.
    ///
    /// # Errors
    /// When the manifest is bad; when the storage does not exist or can't be read.
    pub(crate) async fn read(manifest: &Path, storage: Option<&str>) -> Result<Self, Failure> {
        let (job, manifest) = job::identify(manifest)?;
        let location = job::storage(storage, &manifest)?;
        Self::of(job, location).await
    }

    /// As [`History::read`], of a job whose manifest has been read.
    pub(crate) async fn of(job: JobId, location: String) -> Result<Self, Failure> {
        let storage = storage::open_existing(&location).map_err(unusable)?;
        let folder = JobFolder::of(&job);
        let state = log::read(&*storage, &folder).await.map_err(unusable)?;
        Ok(Self { job, location, storage, folder, state })
    }

    /// Finds a snapshot by the words that `--restore` takes.
    pub(crate) async fn find(&self, reference: &Reference) -> Result<Found, Failure> {
        let scope = Scope { storage: &self.storage, job: &self.job, state: &self.state };
        restore::find(reference, scope).await.map_err(unusable)
    }

    /// Where something in the job's folder is, as a location.
    pub(crate) fn locate(&self, relative: &str) -> String {
        format!("{}/{}", self.storage.describe(), self.folder.path(relative))
    }

    /// The same for the checkpoint of a log entry.
    pub(crate) fn locate_entry(&self, seq: u64) -> String {
        self.locate(&entry_path(seq))
    }

    /// Why there is nothing to show.
    pub(crate) fn nothing(&self) -> Failure {
        Failure::new(Exit::Storage, format!("job {} has no checkpoints in {}", self.job, self.storage.describe()))
    }
}

/// The path of a log entry in its job's folder.
pub(crate) fn entry_path(seq: u64) -> String {
    format!("log/{seq:020}.json")
}

/// Finds the snapshot at a location, whoever's it is.
pub(crate) async fn find_at(location: &str) -> Result<Found, Failure> {
    let location = job::absolute(location.trim_end_matches('/'))?;
    restore::at(&location).await.map_err(unusable)
}

/// Whether a word on the command line is the location of a snapshot, not the file of a manifest: a URL, a folder, or an entry
/// of a log.
pub(crate) fn is_location(text: &Path) -> bool {
    let Some(words) = text.to_str() else { return text.is_dir() };
    words.contains("://") || text.is_dir() || (words.contains("/log/") && words.ends_with(".json"))
}

/// A failure to read the storage or what it holds.
pub(crate) fn unusable(error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Storage, error)
}
