//! Savepoints: snapshots in a folder of their own, with copies of all their files. Nothing else needs to exist for them to be
//! restored, and no job deletes them.
//!
//! A savepoint is there once its `_manifest.json` is, which is written last. It holds no staged output: that has been
//! committed by the job it comes from.

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, Manifest, Result, Shard, ShardKind,
    log::JobFolder,
    manifest::ShardStatus,
    restore::Snapshot,
    sealed,
    storage::{PutNew, Storage},
};

/// The file that makes a folder a savepoint.
pub const MANIFEST_FILE: &str = "_manifest.json";
/// Files copied at the same time.
const COPIES_IN_FLIGHT_MAX: usize = 8;
/// Longest name, bytes.
const NAME_LENGTH_MAX: usize = 63;

/// The body of `_manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Savepoint {
    /// Its name, unique in its job.
    pub name: String,
    /// Wall-clock time at which it was complete, milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// What it consists of. Shards' paths are relative to the savepoint's folder.
    pub manifest: Manifest,
}

/// Whether a name can be a savepoint's.
///
/// # Errors
/// Says what names look like.
pub fn check_name(name: &str) -> Result<()> {
    let valid = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_' || b == b'.';
    let numeric = name.bytes().all(|b| b.is_ascii_digit());
    let reserved = matches!(name, "latest" | "none") || name.starts_with('.');
    if name.is_empty() || name.len() > NAME_LENGTH_MAX || !name.bytes().all(valid) || numeric || reserved {
        return Err(Error::abort(format!(
            "'{name}' can't be a savepoint's name: use at most {NAME_LENGTH_MAX} letters, digits, '-', '_' and '.', not only \
             digits, not 'latest' or 'none'"
        )));
    }
    Ok(())
}

/// The folder of a job's savepoint, from the storage's root.
#[must_use]
pub fn folder(job: &JobFolder, name: &str) -> String {
    job.path(&format!("savepoints/{name}"))
}

/// Makes a savepoint of a snapshot whose staged output is visible. Answers with its location.
///
/// # Errors
/// When there is one of that name already, a file of the snapshot is gone, or the storage can't be written. What was copied by
/// then is left behind, and written over by the next attempt.
pub async fn export(
    snapshot: &Snapshot,
    storage: &Arc<dyn Storage>,
    job: &JobFolder,
    name: &str,
    created_at_ms: i64,
) -> Result<String> {
    check_name(name)?;
    let folder = folder(job, name);
    let manifest_path = format!("{folder}/{MANIFEST_FILE}");
    let taken = || Error::abort(format!("there is a savepoint '{name}' already; choose another name"));
    if self::exists(&**storage, job, name).await? {
        return Err(taken());
    }
    let mut manifest = (*snapshot.manifest).clone();
    for operator in manifest.operators.values_mut() {
        operator.shards.retain(|s| s.kind != ShardKind::Staged);
    }
    // A file of which there are several parts is copied once, as a whole.
    let copies: Vec<(Shard, String)> =
        manifest.files().map(|shard| (shard.clone(), format!("{folder}/{}", file_name(&shard.path)))).collect();
    for shard in manifest.operators.values_mut().flat_map(|o| &mut o.shards) {
        shard.path = file_name(&shard.path).to_owned();
        shard.status = ShardStatus::Uploaded;
    }
    stream::iter(copies)
        .map(|(shard, to)| async move {
            let (_, from) = snapshot.place(&shard);
            match storage.copy(&from, &to).await? {
                true => Ok(()),
                false => Err(Error::corrupt(format!("shard {} is missing", shard.path))),
            }
        })
        .buffer_unordered(COPIES_IN_FLIGHT_MAX)
        .try_collect::<()>()
        .await
        .context_with(|| format!("copy files to savepoint '{name}'"))?;
    let savepoint = Savepoint { name: name.to_owned(), created_at_ms, manifest };
    match storage.put_new(&manifest_path, sealed::seal("savepoint", &savepoint)?).await? {
        PutNew::Created => Ok(format!("{}/{folder}", storage.describe())),
        PutNew::Exists => Err(taken()),
    }
}

/// Whether a job has a savepoint of this name, intact or not.
///
/// # Errors
/// When the storage can't be read.
pub async fn exists(storage: &dyn Storage, job: &JobFolder, name: &str) -> Result<bool> {
    let path = format!("{}/{MANIFEST_FILE}", folder(job, name));
    Ok(storage.size(&path).await.context_with(|| "look for savepoint")?.is_some())
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Reads the savepoint in a folder (from the storage's root; may be empty). `None` if there is none.
///
/// # Errors
/// `Corrupt` if its manifest is damaged; when the storage can't be read.
pub async fn read(storage: &dyn Storage, folder: &str) -> Result<Option<Savepoint>> {
    let path = if folder.is_empty() { MANIFEST_FILE.to_owned() } else { format!("{folder}/{MANIFEST_FILE}") };
    let bytes = storage.get(&path).await.context_with(|| "read savepoint")?;
    bytes.map(|bytes| sealed::open("savepoint", &format!("savepoint manifest {path}"), &bytes)).transpose()
}

/// Names of a job's savepoints, sorted.
///
/// # Errors
/// When the storage can't be listed.
pub async fn list(storage: &dyn Storage, job: &JobFolder) -> Result<Vec<String>> {
    let listed = storage.list(&job.path("savepoints"), None).await.context_with(|| "list savepoints")?;
    let name = |path: &str| {
        let inside = job.relative(path)?.strip_prefix("savepoints/")?;
        inside.strip_suffix(MANIFEST_FILE)?.strip_suffix('/').map(str::to_owned)
    };
    Ok(listed.iter().filter_map(|o| name(&o.path)).collect())
}

/// Deletes a savepoint: its manifest first, so that no half of it can be taken for a whole. False if there is none.
///
/// # Errors
/// When the storage can't be written.
pub async fn delete(storage: &dyn Storage, job: &JobFolder, name: &str) -> Result<bool> {
    check_name(name)?;
    let folder = folder(job, name);
    let files = storage.list(&folder, None).await?;
    let manifest = format!("{folder}/{MANIFEST_FILE}");
    if files.is_empty() {
        return Ok(false);
    }
    storage.delete(&manifest).await?;
    let others = files.into_iter().filter(|o| o.path != manifest);
    stream::iter(others)
        .map(|object| async move { storage.delete(&object.path).await })
        .buffer_unordered(COPIES_IN_FLIGHT_MAX)
        .try_collect::<()>()
        .await?;
    Ok(true)
}
