//! The history of the job that a command line names, and how a person's words lead to a snapshot of it. Reads only: a job that
//! runs meanwhile does not notice.

use std::{ops::Deref, path::Path};

use floodmark_admission as admission;
use floodmark_snapshot::{
    JobId,
    restore::{self, Found, Reference},
    storage,
};

use crate::{
    exit::{Exit, Failure},
    job,
};

pub(crate) use admission::history::entry_path;

/// A job's history, and how its storage was named.
pub(crate) struct History {
    /// Where its snapshots are; absolute.
    pub(crate) location: String,
    read: admission::History,
}

impl Deref for History {
    type Target = admission::History;

    fn deref(&self) -> &Self::Target {
        &self.read
    }
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
        let read = admission::History::read(job, storage).await.map_err(unusable)?;
        Ok(Self { location, read })
    }

    /// Finds a snapshot by the words that `--restore` takes.
    pub(crate) async fn find(&self, reference: &Reference) -> Result<Found, Failure> {
        self.read.find(reference).await.map_err(unusable)
    }

    /// Why there is nothing to show.
    pub(crate) fn nothing(&self) -> Failure {
        Failure::new(Exit::Storage, format!("job {} has no checkpoints in {}", self.job, self.storage.describe()))
    }
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
