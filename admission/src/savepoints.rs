//! A job's savepoints: what is known of one, and its removal. They outlive the job: nothing but its name and its folder is needed.
//!
//! Invariant: nothing is removed that is not in the folder of a savepoint of that very job, and no half of one is left that
//! could be taken for a whole.

use std::sync::Arc;

use floodmark_snapshot::{
    Disposition, Epoch, Error, JobId,
    log::{self, JobFolder},
    savepoint::{self, MANIFEST_FILE},
    storage::Storage,
};

use crate::{
    RequestError, StorageError,
    removal::{FILES_PER_STEP_MAX, Removal, remove_files},
};

/// A savepoint that is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavepointInfo {
    /// Its name, unique in its job.
    pub name: String,
    /// Where it is, as `--restore` and `spec.restore.from` take it.
    pub location: String,
    /// The checkpoint that it is a copy of.
    pub epoch: Epoch,
    /// Bytes of all its shards.
    pub size: u64,
    /// When it was complete, milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

/// Looks a job's savepoint up by name; `None` if there is none, or none that is complete.
///
/// # Errors
/// `Refused` if there can be none of that name, or if its manifest is damaged; when the storage can't be read.
pub async fn savepoint(
    job: &JobId,
    storage: &Arc<dyn Storage>,
    name: &str,
) -> Result<Option<SavepointInfo>, RequestError> {
    savepoint::check_name(name).map_err(RequestError::of)?;
    let folder = savepoint::folder(&JobFolder::of(job), name);
    let found = savepoint::read(&**storage, &folder).await.map_err(|e| RequestError::of_storage(e, name))?;
    Ok(found.map(|found| SavepointInfo {
        name: name.to_owned(),
        location: format!("{}/{folder}", storage.describe()),
        epoch: found.manifest.epoch,
        size: found.manifest.size(),
        created_at_ms: found.created_at_ms,
    }))
}

/// The name of the savepoint of this job that is at a location.
///
/// # Errors
/// `Refused` if the location is that of anything else.
pub fn savepoint_name<'a>(job: &JobId, storage: &Arc<dyn Storage>, location: &'a str) -> Result<&'a str, RequestError> {
    let folder = format!("{}/{}/", storage.describe(), JobFolder::of(job).path("savepoints"));
    let name = location.trim_end_matches('/').strip_prefix(&folder);
    name.filter(|name| savepoint::check_name(name).is_ok())
        .ok_or_else(|| RequestError::Refused(format!("{location} is no savepoint of job {job}: those are in {folder}")))
}

/// Removes files of a job's savepoint: call it until it answers that nothing is left. One that is not there is removed already.
///
/// # Errors
/// `Refused` if there can be no savepoint of that name, if what is there is another job's, or if the job has started from it and
/// still needs its files; when the storage can't be read or written. Then the same call goes on where this one has ended.
pub async fn remove_savepoint(job: &JobId, storage: &Arc<dyn Storage>, name: &str) -> Result<Removal, RequestError> {
    savepoint::check_name(name).map_err(RequestError::of)?;
    let job_folder = JobFolder::of(job);
    let folder = savepoint::folder(&job_folder, name);
    match savepoint::read(&**storage, &folder).await {
        Ok(Some(found)) if found.manifest.job != *job => {
            return Err(RequestError::Refused(format!(
                "savepoint '{name}' in the folder of job {job} is one of job {}; it is left alone",
                found.manifest.job
            )));
        }
        Ok(Some(_)) => refuse_if_needed(job, storage, name, &folder).await?,
        Ok(None) => {}
        // Whatever it was, it is one no more.
        Err(error) if error.disposition() == Disposition::Corrupt => {}
        Err(error) => return Err(StorageError(error).into()),
    }
    // Without its manifest it is no savepoint any more.
    let manifest = format!("{folder}/{MANIFEST_FILE}");
    storage.delete(&manifest).await.map_err(StorageError)?;
    let files = storage.list_some(&folder, FILES_PER_STEP_MAX).await.map_err(StorageError)?;
    remove_files(&**storage, &files).await?;
    Ok(Removal::of(files.len(), files.len() == FILES_PER_STEP_MAX))
}

/// A job that has started from a savepoint reads its files at each restart, until it has released that checkpoint.
async fn refuse_if_needed(
    job: &JobId,
    storage: &Arc<dyn Storage>,
    name: &str,
    folder: &str,
) -> Result<(), RequestError> {
    let state = log::read(&**storage, &JobFolder::of(job)).await.map_err(StorageError)?;
    let location = format!("{}/{folder}", storage.describe());
    match state.retained.iter().find(|r| r.from.as_deref() == Some(location.as_str())) {
        Some(user) => Err(RequestError::Refused(format!(
            "job {job} started from savepoint '{name}' and still needs its files (as checkpoint {}); delete it once the job has \
             completed checkpoints of its own and released that one",
            user.manifest.epoch
        ))),
        None => Ok(()),
    }
}

impl RequestError {
    /// An error of reading a savepoint: one that is damaged is nobody's fault who asks, but does not mend itself.
    fn of_storage(error: Error, name: &str) -> Self {
        match error.disposition() {
            Disposition::Corrupt => Self::Refused(error.context(format!("savepoint '{name}'")).to_string()),
            Disposition::Retry | Disposition::Abort | Disposition::Fenced => Self::Storage(StorageError(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::{log::Event, restore::Snapshot, storage};

    use super::*;
    use crate::testing::{Flaky, append, planned, snapshot, with_files};

    fn job() -> JobId {
        planned().id
    }

    /// A storage in which the job has this savepoint.
    async fn with_savepoint(location: &str, name: &str) -> Arc<dyn Storage> {
        let storage = storage::open(location).unwrap();
        let folder = JobFolder::of(&job());
        let manifest = with_files(&storage, folder.root(), snapshot(&planned(), 7)).await;
        let snapshot = Snapshot::new(manifest.into(), storage.clone(), folder.root());
        savepoint::export(&snapshot, &storage, &folder, name, 5).await.unwrap();
        storage
    }

    async fn files(storage: &Arc<dyn Storage>) -> usize {
        storage.list(&JobFolder::of(&job()).path("savepoints"), None).await.unwrap().len()
    }

    #[tokio::test]
    async fn a_savepoint_is_told_removed_and_then_absent_however_often_it_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        for location in ["memory://", folder.path().to_str().unwrap()] {
            let storage = with_savepoint(location, "base").await;
            let info = savepoint(&job(), &storage, "base").await.unwrap().unwrap();
            assert!(info.location.ends_with("/default/sums/local/savepoints/base"), "{}", info.location);
            assert_eq!((info.epoch, info.created_at_ms, info.name.as_str()), (Epoch(7), 5, "base"));
            assert!(info.size > 0);
            assert_eq!(savepoint_name(&job(), &storage, &info.location).unwrap(), "base");
            assert!(files(&storage).await > 1);
            for _ in 0..2 {
                assert!(matches!(remove_savepoint(&job(), &storage, "base").await.unwrap(), Removal::Done { .. }));
                assert_eq!(savepoint(&job(), &storage, "base").await.unwrap(), None);
                assert_eq!(files(&storage).await, 0);
            }
        }
    }

    #[tokio::test]
    async fn what_is_no_savepoint_of_the_job_is_left_alone() {
        let storage = with_savepoint("memory://", "base").await;
        let before = files(&storage).await;
        for name in ["", "..", "../log", "base/x", "7", "latest"] {
            let refused = remove_savepoint(&job(), &storage, name).await;
            assert!(matches!(refused, Err(RequestError::Refused(_))), "{name}");
            assert!(matches!(savepoint(&job(), &storage, name).await, Err(RequestError::Refused(_))), "{name}");
        }
        let root = storage.describe();
        for location in [
            format!("{root}/default/sums/local"),
            format!("{root}/default/sums/local/savepoints"),
            format!("{root}/default/sums/local/savepoints/base/x"),
            format!("{root}/default/sums/local/savepoints/../log"),
            format!("{root}/default/other/local/savepoints/base"),
            "/elsewhere/default/sums/local/savepoints/base".to_owned(),
        ] {
            let refused = savepoint_name(&job(), &storage, &location);
            assert!(matches!(refused, Err(RequestError::Refused(_))), "{location}");
        }
        // One that somebody has copied there from another job.
        let other = JobId { name: "other".into(), ..job() };
        for file in storage.list("default/sums/local/savepoints/base", None).await.unwrap() {
            let to = file.path.replace("/sums/", "/other/");
            storage.copy(&file.path, &to).await.unwrap();
        }
        let refused = remove_savepoint(&other, &storage, "base").await.unwrap_err();
        assert!(refused.to_string().contains("is one of job default/sums/local"), "{refused}");
        assert_eq!(files(&storage).await, before);
    }

    #[tokio::test]
    async fn files_that_the_job_still_starts_from_are_refused() {
        let storage = with_savepoint("memory://", "base").await;
        let location = savepoint(&job(), &storage, "base").await.unwrap().unwrap().location;
        let manifest = Box::new(snapshot(&planned(), 8));
        append(&storage, &job(), vec![Event::Adopted { from: location, asked: "base".into(), manifest }]).await;
        let refused = remove_savepoint(&job(), &storage, "base").await.unwrap_err().to_string();
        assert!(refused.contains("still needs its files (as checkpoint 8)"), "{refused}");
        assert!(savepoint(&job(), &storage, "base").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn one_that_is_damaged_is_told_and_can_be_removed() {
        let storage = with_savepoint("memory://", "base").await;
        let manifest = format!("default/sums/local/savepoints/base/{MANIFEST_FILE}");
        storage.put(&manifest, "{}".into()).await.unwrap();
        let damaged = savepoint(&job(), &storage, "base").await.unwrap_err();
        assert!(matches!(&damaged, RequestError::Refused(why) if why.starts_with("savepoint 'base': ")), "{damaged}");
        remove_savepoint(&job(), &storage, "base").await.unwrap();
        assert_eq!(files(&storage).await, 0);
    }

    #[tokio::test]
    async fn a_removal_that_breaks_off_anywhere_leaves_no_half_and_goes_on() {
        for calls in 0.. {
            let storage = with_savepoint("memory://", "base").await;
            let flaky = Flaky::after(storage.clone(), calls);
            let broke_off = remove_savepoint(&job(), &flaky, "base").await;
            let whole = files(&storage).await;
            if savepoint(&job(), &storage, "base").await.unwrap().is_some() {
                assert_eq!(
                    whole,
                    files(&with_savepoint("memory://", "base").await).await,
                    "call {calls}: cut, but told as whole"
                );
            }
            if broke_off.is_ok() {
                assert!(calls > 3);
                break;
            }
            assert!(matches!(broke_off, Err(RequestError::Storage(ref e)) if e.may_pass()), "call {calls}");
            assert!(matches!(remove_savepoint(&job(), &storage, "base").await.unwrap(), Removal::Done { .. }));
            assert_eq!(files(&storage).await, 0, "call {calls}");
        }
    }
}
