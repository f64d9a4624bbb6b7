//! How people name a snapshot, and how it is found: `latest`, `7`, the name of a savepoint, or a location.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
    sync::Arc,
};

use super::Snapshot;
use crate::{
    Epoch, Error, JobId, Manifest, OperatorUid, Result, Shard, ShardKind,
    log::{self, Event, JobFolder, LogState, Retained},
    savepoint,
    storage::{self, Storage},
};

/// What a person calls a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// `latest`: the newest complete and intact checkpoint of the job, or nothing if there never was one.
    Latest,
    /// `none`: no snapshot, even if there are some.
    Nothing,
    /// `7`: that checkpoint of the job.
    Checkpoint(Epoch),
    /// A savepoint of the job, by name.
    Savepoint(String),
    /// A savepoint's folder, a job's folder (its newest checkpoint), or a `Completed` entry of its log: a URL or a path.
    Location(String),
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "latest" => Ok(Self::Latest),
            "none" => Ok(Self::Nothing),
            _ if text.contains('/') => Ok(Self::Location(location(text))),
            _ if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
                let epoch = text.parse().map_err(|_| Error::abort(format!("{text} is too great for a checkpoint")))?;
                Ok(Self::Checkpoint(Epoch(epoch)))
            }
            _ => savepoint::check_name(text).map(|()| Self::Savepoint(text.to_owned())).map_err(|_| {
                Error::abort(format!(
                    "'{text}' names no snapshot: write latest, none, the number of a checkpoint, the name of a savepoint, or \
                     a location (with at least one '/')"
                ))
            }),
        }
    }
}

/// A location without slashes at its end, but with one at least: what is written of it is read as a location again.
fn location(text: &str) -> String {
    let trimmed = text.trim_end_matches('/');
    match trimmed {
        "" => "/".to_owned(),
        _ if trimmed.contains('/') => trimmed.to_owned(),
        _ if text.contains("://") => text.to_owned(),
        _ => format!("./{trimmed}"),
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Nothing => f.write_str("none"),
            Self::Checkpoint(epoch) => epoch.fmt(f),
            Self::Savepoint(name) => f.write_str(name),
            Self::Location(location) => f.write_str(location),
        }
    }
}

/// Up to which epoch of another job what its sinks' subtasks have staged is visible, whatever its log says.
pub type Visible = BTreeMap<(OperatorUid, u32), Epoch>;

/// A snapshot that was found under a name.
#[derive(Clone, Debug)]
pub struct Found {
    /// It.
    pub snapshot: Snapshot,
    /// Whether it is a checkpoint of the job's own log.
    pub own: bool,
    /// Output staged up to here is visible already, by the log that the snapshot comes from.
    pub committed: Epoch,
    /// That log: see [`LogState::history`].
    pub history: String,
}

impl Found {
    /// At which epoch a shard was staged; `None` if it is no output.
    fn staged_at(&self, shard: &Shard) -> Option<Epoch> {
        (shard.kind == ShardKind::Staged).then(|| shard.epoch.unwrap_or(self.snapshot.manifest.epoch))
    }

    /// The subtasks of sinks whose output the log does not say to be visible.
    #[must_use]
    pub fn staging(&self) -> BTreeSet<(OperatorUid, u32)> {
        let operators = self.snapshot.manifest.operators.iter();
        let shards = operators.flat_map(|(uid, operator)| operator.shards.iter().map(move |shard| (uid, shard)));
        let left = shards.filter(|(_, shard)| self.staged_at(shard) > Some(self.committed));
        left.map(|(uid, shard)| (uid.clone(), shard.subtask)).collect()
    }

    /// The manifest under which a job takes the snapshot over that is not its own: with an epoch of the job's, and without
    /// the output that is visible already. What is left is staged anew under that epoch, so that the job's own markers decide
    /// whether it must still be written.
    #[must_use]
    pub fn adopted_as(&self, epoch: Epoch, visible: &Visible) -> Manifest {
        let mut manifest = (*self.snapshot.manifest).clone();
        manifest.epoch = epoch;
        for (uid, operator) in &mut manifest.operators {
            let known = |subtask| visible.get(&(uid.clone(), subtask)).copied().unwrap_or_default();
            let left = |s: &Shard| self.staged_at(s).is_none_or(|at| at > known(s.subtask).max(self.committed));
            operator.shards.retain(left);
            for shard in operator.shards.iter_mut().filter(|s| s.kind == ShardKind::Staged) {
                shard.epoch = Some(epoch);
            }
        }
        manifest
    }
}

/// The job that a name is looked up for.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    /// Its storage.
    pub storage: &'a Arc<dyn Storage>,
    /// The job.
    pub job: &'a JobId,
    /// Its log.
    pub state: &'a LogState,
}

/// Finds what a name stands for; reads no shard.
///
/// # Errors
/// When there is no such snapshot, saying what there is; when its manifest or log is damaged.
pub async fn find(reference: &Reference, scope: Scope<'_>) -> Result<Found> {
    let Scope { storage, job, state } = scope;
    let folder = JobFolder::of(job);
    let own = |retained: &Retained| own_checkpoint(storage, &folder, retained, state);
    match reference {
        Reference::Nothing => Err(Error::abort("'none' names no snapshot")),
        Reference::Latest => match state.retained.last() {
            Some(newest) => own(newest),
            None => Err(Error::abort(format!("job {job} has no checkpoint in {}", storage.describe()))),
        },
        Reference::Checkpoint(epoch) => {
            let all = state.retained.iter().chain(&state.abandoned);
            match all.clone().find(|r| r.manifest.epoch == *epoch) {
                Some(found) => own(found),
                None => {
                    let known: Vec<String> = all.map(|r| r.manifest.epoch.to_string()).collect();
                    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                    Err(Error::abort(format!("job {job} has no checkpoint {epoch}; there is: {known}")))
                }
            }
        }
        Reference::Savepoint(name) => {
            let root = savepoint::folder(&folder, name);
            match savepoint::read(&**storage, &root).await? {
                Some(savepoint) => Ok(exported(storage.clone(), root, savepoint.manifest)),
                None => {
                    let known = savepoint::list(&**storage, &folder).await?;
                    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                    Err(Error::abort(format!("job {job} has no savepoint '{name}'; there is: {known}")))
                }
            }
        }
        Reference::Location(location) => {
            // What lies in the job's own storage is read by the client that is at hand.
            let found = match inside(storage, location) {
                Some(path) => within(storage.clone(), path, location).await?,
                None => look(location, |at| storage.open_other(at)).await?,
            };
            let same = |r: &&Retained| r.from.is_none() && r.manifest == *found.snapshot.manifest;
            match state.retained.iter().chain(&state.abandoned).find(same) {
                Some(own_checkpoint) => own(own_checkpoint),
                None => Ok(found),
            }
        }
    }
}

/// Finds the snapshot at a location, whoever's it is.
///
/// # Errors
/// When there is none, or it is damaged.
pub async fn at(location: &str) -> Result<Found> {
    look(location, storage::open_existing).await
}

async fn look(location: &str, open: impl Fn(&str) -> Result<Arc<dyn Storage>>) -> Result<Found> {
    match location.rsplit_once("/log/").filter(|(_, entry)| entry.ends_with(".json")) {
        Some((folder, entry)) => within(open(folder)?, &format!("log/{entry}"), location).await,
        None => within(open(location)?, "", location).await,
    }
}

/// Finds the snapshot at a path of a storage, which is called `location`.
async fn within(storage: Arc<dyn Storage>, path: &str, location: &str) -> Result<Found> {
    let log = path.starts_with("log/").then_some("").or_else(|| path.rsplit_once("/log/").map(|(folder, _)| folder));
    let entry_of = log.filter(|_| path.ends_with(".json"));
    let folder = entry_of.unwrap_or(path);
    let checkpoint = |manifest: Manifest, state: &LogState| Found {
        snapshot: Snapshot::new(Arc::new(manifest), storage.clone(), folder),
        own: false,
        committed: state.committed,
        history: state.history.clone(),
    };
    if entry_of.is_some() {
        let bytes = storage.get(path).await?.ok_or_else(|| Error::abort(format!("there is no {location}")))?;
        let entry = log::decode(&bytes).map_err(|e| e.context(location))?;
        let manifest = match entry.event {
            Event::Completed { manifest } => *manifest,
            _ => return Err(Error::abort(format!("{location} is an entry of a log, but no completed checkpoint"))),
        };
        return Ok(checkpoint(manifest, &log::read_folder(&*storage, folder).await?));
    }
    if let Some(savepoint) = savepoint::read(&*storage, folder).await? {
        return Ok(exported(storage, folder.to_owned(), savepoint.manifest));
    }
    let state = log::read_folder(&*storage, folder).await?;
    match state.retained.last() {
        Some(Retained { from: Some(from), .. }) => Err(Error::abort(format!(
            "the job at {location} has not completed a checkpoint of its own since it started from {from}; name that instead"
        ))),
        Some(newest) => Ok(checkpoint(newest.manifest.clone(), &state)),
        None => Err(Error::abort(format!(
            "there is no snapshot at {location}: name the folder of a savepoint (with {}), the folder of a job (with log/), \
             or an entry of its log",
            savepoint::MANIFEST_FILE
        ))),
    }
}

/// A savepoint: whatever its job staged is visible, and not in it.
fn exported(storage: Arc<dyn Storage>, root: String, manifest: Manifest) -> Found {
    let committed = manifest.epoch;
    Found { snapshot: Snapshot::new(Arc::new(manifest), storage, root), own: false, committed, history: String::new() }
}

/// The folder of the storage that a location names, if it is in that storage.
fn inside<'a>(storage: &Arc<dyn Storage>, location: &'a str) -> Option<&'a str> {
    location.strip_prefix(&storage.describe())?.strip_prefix('/')
}

/// A snapshot whose manifest is at hand, and whose shards' paths are relative to the folder `location`. What lies in `storage`
/// is read by that client.
///
/// # Errors
/// When the place can't be opened.
pub fn located(manifest: Arc<Manifest>, location: &str, storage: &Arc<dyn Storage>) -> Result<Snapshot> {
    if location == storage.describe() {
        return Ok(Snapshot::new(manifest, storage.clone(), ""));
    }
    match inside(storage, location) {
        Some(root) => Ok(Snapshot::new(manifest, storage.clone(), root)),
        None => Ok(Snapshot::new(manifest, storage.open_other(location)?, "")),
    }
}

/// A checkpoint that a job's log holds: the job's own, or one that it has adopted.
pub(super) fn own_checkpoint(
    storage: &Arc<dyn Storage>,
    folder: &JobFolder,
    retained: &Retained,
    state: &LogState,
) -> Result<Found> {
    let manifest = Arc::new(retained.manifest.clone());
    let snapshot = match &retained.from {
        Some(from) => located(manifest, from, storage)?,
        None => Snapshot::new(manifest, storage.clone(), folder.root()),
    };
    Ok(Found { snapshot, own: true, committed: state.committed, history: state.history.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_stays_one_when_it_is_written_and_read_again() {
        let cases = [
            ("s3://bucket/folder/", "s3://bucket/folder"),
            ("/a/b//", "/a/b"),
            ("kept/", "./kept"),
            ("/", "/"),
            ("//", "/"),
            ("./", "./."),
            ("file:///", "file:///"),
        ];
        for (text, location) in cases {
            let read: Reference = text.parse().unwrap();
            assert_eq!(read, Reference::Location(location.to_owned()));
            assert_eq!(read.to_string().parse::<Reference>().unwrap(), read, "{text}");
        }
    }
}
