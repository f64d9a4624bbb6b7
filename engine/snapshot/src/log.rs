//! The checkpoint log: the one truth of a job, in its object store.
//!
//! A log is a run of small JSON files, `log/00000000000000000042.json`, each made by create-if-absent. Where a job stands is
//! a pure fold over them ([`LogState`]). A coordinator begins its reign by appending `Opened`; whoever then tries to append
//! the same number loses the create, reads who won, and stops.
//!
//! Old entries are trimmed, so a coordinator that slept for long might create a number that was taken once and is free
//! again. Therefore an append counts only if a listing made *after* the create shows nothing behind the entry; and readers
//! take only the newest unbroken run of numbers, from the number on that the newest `Released` names. Such a stray entry is
//! thus seen by its writer as a lost race, and by nobody else at all.
//!
//! Every byte of an entry is covered (see [`sealed`]). An entry that is damaged keeps its number. Because it may have been an `Opened` or a `Completed`, the numbers derived from the log (generation, attempt,
//! epoch) skip what it may have used: they never go back.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use crate::{
    Attempt, Context, Disposition, Env, Epoch, Error, Generation, JobId, Manifest, Result,
    manifest::Rescaled,
    sealed,
    storage::{PutNew, Storage},
};

/// Attempts of an append after the first: minutes of an unreachable storage, during which the job goes on.
const APPEND_RETRIES_MAX: u32 = 100;
const APPEND_BACKOFF_FIRST: Duration = Duration::from_millis(100);
const APPEND_BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Coordinators that may race for the same number before an open gives up.
const OPEN_RACES_MAX: usize = 64;
/// Entries read at the same time.
const READS_IN_FLIGHT_MAX: usize = 16;

/// A job's folder in its storage: `<namespace>/<name>/<uid>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobFolder(String);

impl JobFolder {
    /// The folder of this job.
    #[must_use]
    pub fn of(job: &JobId) -> Self {
        Self(format!("{}/{}/{}", job.namespace, job.name, job.uid))
    }

    /// The path, from the storage's root, of something in the folder.
    #[must_use]
    pub fn path(&self, relative: &str) -> String {
        if self.0.is_empty() { relative.to_owned() } else { format!("{}/{relative}", self.0) }
    }

    /// The folder, from the storage's root.
    #[must_use]
    pub fn root(&self) -> &str {
        &self.0
    }

    /// A path from the storage's root, relative to the job's folder.
    #[must_use]
    pub fn relative<'a>(&self, path: &'a str) -> Option<&'a str> {
        if self.0.is_empty() {
            return Some(path);
        }
        path.strip_prefix(&self.0)?.strip_prefix('/')
    }

    fn entry(&self, seq: u64) -> String {
        self.path(&format!("log/{seq:020}.json"))
    }
}

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", deny_unknown_fields)]
pub enum Event {
    /// A coordinator begins its reign. Nothing runs yet: a job that has finished stays so until an entry says from where it runs
    /// again.
    Opened,
    /// The job went on from this checkpoint although there were newer ones (they were damaged, or somebody asked) or may have been
    /// (behind it the log is damaged), or from nothing. Checkpoints newer than it are no candidates any more.
    Restored {
        /// The checkpoint; `None` for a start without state.
        epoch: Option<Epoch>,
        /// The name that somebody asked for; `None` if the job came to it by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        asked: Option<String>,
    },
    /// The job went on from a snapshot that is not its own: a savepoint, or another job's checkpoint. Its own checkpoints are no
    /// candidates any more. The files stay where they are, and are never deleted by this job.
    Adopted {
        /// Where the files are: shards' paths are relative to it.
        from: String,
        /// The name that somebody asked for.
        asked: String,
        /// The snapshot, under a fresh epoch of this job.
        manifest: Box<Manifest>,
    },
    /// A checkpoint is complete: all its shards are durable.
    Completed {
        /// What it consists of.
        manifest: Box<Manifest>,
    },
    /// Everything that sinks staged up to this epoch is visible.
    Committed {
        /// The epoch.
        epoch: Epoch,
    },
    /// These checkpoints are no longer kept; their files may be deleted from now on.
    Released {
        /// The checkpoints.
        epochs: Vec<Epoch>,
        /// Entries before this number may be deleted too, and count no more.
        #[serde(rename = "oldestSeq")]
        oldest_seq: u64,
    },
    /// All inputs have ended and everything is committed.
    Finished {
        /// The last checkpoint.
        epoch: Epoch,
    },
    /// The job stopped when asked to.
    Stopped {
        /// The last checkpoint.
        epoch: Epoch,
    },
}

/// By how much the epochs go on behind an entry that can't be read: more than checkpoints are ever aborted in a row. A sink
/// that met an epoch for the second time would take it for committed, and lose it.
const EPOCHS_SKIPPED_PER_DAMAGE: u64 = 1 << 20;

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entry {
    /// Its number, from 0; also its file's name.
    pub seq: u64,
    /// Identity of the log: the same in all its entries. Markers that sinks leave elsewhere carry it.
    pub history: String,
    /// Reign of the writer.
    pub generation: Generation,
    /// Attempt of the job's tasks.
    pub attempt: Attempt,
    /// Makes two writers' entries differ in their bytes.
    pub nonce: String,
    /// Wall clock of the writer, milliseconds since the Unix epoch.
    pub written_at_ms: i64,
    /// The writer: `host:pid`.
    pub holder: String,
    /// What it says.
    pub event: Event,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "entry {} of generation {}, written by {}", self.seq, self.generation, self.holder)
    }
}

/// The bytes of an entry's file.
///
/// # Errors
/// When the entry can't be written as JSON; it always can.
pub fn encode(entry: &Entry) -> Result<Bytes> {
    sealed::seal("entry", entry)
}

/// Verifies and decodes an entry's file.
///
/// # Errors
/// `Corrupt` if a single byte is not as [`encode`] wrote it; `Abort` if a later version of this program has written it.
pub fn decode(bytes: &[u8]) -> Result<Entry> {
    sealed::open("entry", "log entry", bytes)
}

/// A checkpoint that the log still holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Retained {
    /// Number of its entry.
    pub seq: u64,
    /// What it consists of.
    pub manifest: Manifest,
    /// Where its files are, if they are not this job's: see [`Event::Adopted`].
    pub from: Option<String>,
}

/// An entry that can't be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// Its number.
    pub seq: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// Where a job stands: the fold of its log.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogState {
    /// Number of the next entry.
    pub next_seq: u64,
    /// The log's identity; empty for a log without a readable entry.
    pub history: String,
    /// The newest reign.
    pub generation: Generation,
    /// The newest attempt.
    pub attempt: Attempt,
    /// Candidates for a restore, oldest first.
    pub retained: Vec<Retained>,
    /// Checkpoints that are kept in storage but are no candidates: a restore went back behind them.
    pub abandoned: Vec<Retained>,
    /// The greatest epoch that may ever have been completed; new ones begin after it.
    pub last_epoch: Epoch,
    /// The greatest epoch that sinks have made visible.
    pub committed: Epoch,
    /// Set if the job has finished; cleared when it runs again.
    pub finished: Option<Epoch>,
    /// What somebody last asked the job to start from, as it was named.
    pub asked: Option<String>,
    /// The parallelism that somebody has chosen for the running job; `None` if it is the spec's.
    pub rescaled: Option<Rescaled>,
    /// Set if the job was stopped; cleared when somebody runs it again.
    pub stopped: Option<Epoch>,
    /// Entries that can't be read.
    pub damaged: Vec<Damaged>,
}

impl LogState {
    /// Takes the next entry into account.
    pub fn apply(&mut self, seq: u64, entry: Result<Entry>) {
        self.next_seq = seq + 1;
        let entry = match entry {
            Ok(entry) if entry.seq == seq => entry,
            Ok(entry) => {
                return self.damage(seq, format!("file {seq} holds entry {}", entry.seq));
            }
            Err(error) => return self.damage(seq, error.to_string()),
        };
        self.generation = self.generation.max(entry.generation);
        self.attempt = self.attempt.max(entry.attempt);
        self.history = entry.history;
        self.take(seq, entry.event);
    }

    /// Takes what the next readable entry says into account.
    pub fn take(&mut self, seq: u64, event: Event) {
        self.next_seq = seq + 1;
        if matches!(event, Event::Restored { .. } | Event::Adopted { .. } | Event::Completed { .. }) {
            self.finished = None;
        }
        match event {
            Event::Opened => self.stopped = None,
            Event::Restored { epoch, asked } => {
                self.abandon_after(epoch);
                if let Some(epoch) = epoch {
                    self.revive(epoch);
                }
                self.asked = asked.or(self.asked.take());
            }
            Event::Adopted { from, asked, manifest } => {
                self.abandon_after(None);
                self.asked = Some(asked);
                self.last_epoch = self.last_epoch.max(manifest.epoch);
                self.retained.push(Retained { seq, manifest: *manifest, from: Some(from) });
            }
            Event::Completed { manifest } => {
                self.asked = manifest.origin.clone();
                self.rescaled = manifest.rescaled;
                self.last_epoch = self.last_epoch.max(manifest.epoch);
                self.retained.push(Retained { seq, manifest: *manifest, from: None });
            }
            Event::Committed { epoch } => self.committed = self.committed.max(epoch),
            Event::Released { epochs, oldest_seq } => {
                self.retained.retain(|r| !epochs.contains(&r.manifest.epoch));
                self.abandoned.retain(|r| !epochs.contains(&r.manifest.epoch));
                self.damaged.retain(|d| d.seq >= oldest_seq);
            }
            Event::Finished { epoch } => self.finished = Some(epoch),
            Event::Stopped { epoch } => self.stopped = Some(epoch),
        }
    }

    /// Checkpoints after `epoch` (all, if `None`) are no candidates any more.
    pub fn abandon_after(&mut self, epoch: Option<Epoch>) {
        let keep = |r: &Retained| epoch.is_some_and(|e| r.manifest.epoch <= e);
        let (kept, abandoned) = std::mem::take(&mut self.retained).into_iter().partition(keep);
        self.retained = kept;
        self.abandoned.extend(abandoned);
    }

    /// A checkpoint that had been given up is a candidate again, if it is still there.
    fn revive(&mut self, epoch: Epoch) {
        if self.retained.iter().all(|r| r.manifest.epoch != epoch)
            && let Some(at) = self.abandoned.iter().rposition(|r| r.manifest.epoch == epoch)
        {
            self.retained.push(self.abandoned.remove(at));
        }
    }

    fn damage(&mut self, seq: u64, reason: String) {
        // It may have been anything: see the header of this file.
        self.generation = self.generation.next();
        self.attempt = self.attempt.next();
        // Aborted checkpoints leave no entry, so the epoch of a lost one may be further on than the next.
        self.last_epoch = Epoch(self.last_epoch.0 + EPOCHS_SKIPPED_PER_DAMAGE);
        self.damaged.push(Damaged { seq, reason });
    }

    /// Whether the job has run before, as far as the log knows.
    #[must_use]
    pub fn has_history(&self) -> bool {
        !self.retained.is_empty() || !self.damaged.is_empty() || !self.abandoned.is_empty()
    }
}

/// Reads a job's log, changing nothing.
///
/// # Errors
/// When the storage can't be read; `Abort` if a later version of this program has written an entry. Damaged entries are no error: see
/// [`LogState::damaged`].
pub async fn read(storage: &dyn Storage, folder: &JobFolder) -> Result<LogState> {
    read_folder(storage, folder.root()).await
}

/// As [`read`], for a job's folder wherever it is; empty if it is the storage's root.
///
/// # Errors
/// See [`read`].
pub async fn read_folder(storage: &dyn Storage, root: &str) -> Result<LogState> {
    let folder = &JobFolder(root.to_owned());
    let listed = storage.list(&folder.path("log"), None).await.context_with(|| "read checkpoint log")?;
    let numbers = listed.iter().filter_map(|o| number_of(&o.path));
    let run = newest_run(numbers.collect());
    let entries: Vec<(u64, Result<Entry>)> = stream::iter(run)
        .map(|seq| async move {
            // An entry that vanishes between listing and reading was trimmed by a newer coordinator.
            let bytes = storage.get(&folder.entry(seq)).await?;
            Ok::<_, Error>((seq, bytes.ok_or_else(|| Error::corrupt("log entry is missing")).and_then(|b| decode(&b))))
        })
        .buffered(READS_IN_FLIGHT_MAX)
        .try_collect()
        .await
        .context_with(|| "read checkpoint log")?;
    fold(entries)
}

/// The last entry of a job's log, and its number; `None` if there is none.
///
/// # Errors
/// When the storage can't be read. An entry that is damaged is an error in the answer.
pub async fn last(storage: &dyn Storage, folder: &JobFolder) -> Result<Option<(u64, Result<Entry>)>> {
    let listed = storage.list(&folder.path("log"), None).await.context_with(|| "read checkpoint log")?;
    let Some(seq) = listed.iter().filter_map(|o| number_of(&o.path)).max() else { return Ok(None) };
    let bytes = storage.get(&folder.entry(seq)).await.context_with(|| "read checkpoint log")?;
    Ok(bytes.map(|bytes| (seq, decode(&bytes))))
}

fn number_of(path: &str) -> Option<u64> {
    let name = path.rsplit('/').next()?.strip_suffix(".json")?;
    (name.len() == 20).then(|| name.parse().ok())?
}

/// The longest run of successive numbers that ends with the greatest.
fn newest_run(mut numbers: Vec<u64>) -> Vec<u64> {
    numbers.sort_unstable();
    let start = (1..numbers.len()).rev().find(|i| numbers[i - 1] + 1 != numbers[*i]).unwrap_or(0);
    numbers.split_off(start.min(numbers.len()))
}

fn fold(entries: Vec<(u64, Result<Entry>)>) -> Result<LogState> {
    let released = |e: &(u64, Result<Entry>)| match &e.1 {
        Ok(Entry { event: Event::Released { oldest_seq, .. }, .. }) => Some(*oldest_seq),
        Ok(_) | Err(_) => None,
    };
    let oldest = entries.iter().filter_map(released).max().unwrap_or(0);
    let mut state = LogState::default();
    // Entries are deleted only once a later one says so: what else is missing before the first is lost.
    if let Some((first, _)) = entries.first().filter(|(first, _)| *first > oldest) {
        state.damage(first - 1, "the entry is missing, and so is whatever came before it".to_owned());
    }
    for (seq, entry) in entries.into_iter().filter(|(seq, _)| *seq >= oldest) {
        match entry {
            // Not to be taken for damage: nobody may go on from what is older.
            Err(error) if error.disposition() != Disposition::Corrupt => {
                return Err(error.context(format!("read entry {seq} of the checkpoint log")));
            }
            entry => state.apply(seq, entry),
        }
    }
    Ok(state)
}

/// The log as its present coordinator writes it.
pub struct CheckpointLog {
    storage: Arc<dyn Storage>,
    env: Env,
    folder: JobFolder,
    holder: String,
    history: String,
    generation: Generation,
    attempt: Attempt,
    next_seq: u64,
}

impl CheckpointLog {
    /// Reads the log and begins a new reign and a new attempt. The state that is answered is that of before.
    ///
    /// # Errors
    /// When the storage can't be read or written.
    pub async fn open(storage: Arc<dyn Storage>, env: Env, job: &JobId, holder: &str) -> Result<(Self, LogState)> {
        Self::open_after(None, storage, env, job, holder).await
    }

    /// As [`CheckpointLog::open`], for a process that has run the job before: `held` is its last reign. Without one, it is the
    /// same.
    ///
    /// # Errors
    /// As [`CheckpointLog::open`]; `Fenced` if another process has begun a reign since. It does not take the job back.
    pub async fn open_after(
        held: Option<Generation>,
        storage: Arc<dyn Storage>,
        env: Env,
        job: &JobId,
        holder: &str,
    ) -> Result<(Self, LogState)> {
        let folder = JobFolder::of(job);
        for _ in 0..OPEN_RACES_MAX {
            let state = read(&*storage, &folder).await?;
            let mut log = Self {
                storage: storage.clone(),
                history: if state.history.is_empty() { env.ids.ulid() } else { state.history.clone() },
                env: env.clone(),
                folder: folder.clone(),
                holder: holder.to_owned(),
                generation: state.generation.next(),
                attempt: state.attempt.next(),
                next_seq: state.next_seq,
            };
            if let Some(held) = held.filter(|held| *held != state.generation) {
                log.generation = held;
                return Err(log.fenced().await);
            }
            let (path, bytes) = log.encode_next(Event::Opened)?;
            if log.create(&path, bytes).await?.is_some() {
                return Ok((log, state));
            }
        }
        Err(Error::retry(format!("open checkpoint log: lost {OPEN_RACES_MAX} races in a row to other coordinators")))
    }

    /// Appends an entry; answers with its number. When this returns, the entry is durable and this reign was the newest.
    ///
    /// A storage that fails for now is tried again with the very same bytes: the entry of an attempt whose reply was lost is
    /// recognised as this coordinator's own.
    ///
    /// # Errors
    /// `Fenced`, naming the newer coordinator, if there is one; otherwise when the storage can't be written for long.
    pub async fn append(&mut self, event: Event) -> Result<u64> {
        let (path, bytes) = self.encode_next(event)?;
        let mut failures = 0;
        let created = loop {
            match self.create(&path, bytes.clone()).await {
                Err(error) if error.disposition() == Disposition::Retry && failures < APPEND_RETRIES_MAX => {
                    tracing::warn!(%error, "the checkpoint log can't be written; trying again");
                    let doubled = APPEND_BACKOFF_FIRST * 2_u32.pow(failures.min(10));
                    self.env.runtime.sleep(doubled.min(APPEND_BACKOFF_MAX)).await;
                    failures += 1;
                }
                other => break other?,
            }
        };
        match created {
            Some(seq) => Ok(seq),
            None => Err(self.fenced().await),
        }
    }

    /// As [`CheckpointLog::append`], of a caller that tries again by itself: a storage that fails for now is an error at once.
    ///
    /// # Errors
    /// As [`CheckpointLog::append`]; then the entry may be there all the same, and this log must be opened anew.
    pub async fn append_once(&mut self, event: Event) -> Result<u64> {
        let (path, bytes) = self.encode_next(event)?;
        match self.create(&path, bytes).await? {
            Some(seq) => Ok(seq),
            None => Err(self.fenced().await),
        }
    }

    /// The number of the entry that is appended next.
    #[must_use]
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The reign of this coordinator.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The attempt of this coordinator's tasks.
    #[must_use]
    pub fn attempt(&self) -> Attempt {
        self.attempt
    }

    /// Identity of the log.
    #[must_use]
    pub fn history(&self) -> &str {
        &self.history
    }

    /// The job's folder.
    #[must_use]
    pub fn folder(&self) -> &JobFolder {
        &self.folder
    }

    /// The path and the bytes of the next entry.
    fn encode_next(&self, event: Event) -> Result<(String, Bytes)> {
        let entry = Entry {
            seq: self.next_seq,
            history: self.history.clone(),
            generation: self.generation,
            attempt: self.attempt,
            nonce: self.env.ids.ulid(),
            written_at_ms: self.env.clock.wall_ms(),
            holder: self.holder.clone(),
            event,
        };
        Ok((self.folder.entry(self.next_seq), encode(&entry)?))
    }

    /// Creates the next entry. `None` if somebody else has appended.
    async fn create(&mut self, path: &str, bytes: Bytes) -> Result<Option<u64>> {
        let created = self.storage.put_new(path, bytes).await.context_with(|| "append to checkpoint log")?;
        if created == PutNew::Exists {
            return Ok(None);
        }
        let behind =
            self.storage.list(&self.folder.path("log"), Some(path)).await.context_with(|| "check the log's end")?;
        if !behind.is_empty() {
            return Ok(None);
        }
        let seq = self.next_seq;
        self.next_seq += 1;
        Ok(Some(seq))
    }

    async fn fenced(&self) -> Error {
        let winner = match read(&*self.storage, &self.folder).await {
            Ok(state) if state.next_seq > 0 => self.last_entry(state.next_seq - 1).await,
            Ok(_) | Err(_) => None,
        };
        let winner = winner
            .map_or_else(|| "a newer process".to_owned(), |w| format!("{} (generation {})", w.holder, w.generation));
        Error::fenced(format!(
            "this process (generation {}) is fenced: {winner} has taken the job over; it writes nothing more",
            self.generation
        ))
    }

    async fn last_entry(&self, seq: u64) -> Option<Entry> {
        let bytes = self.storage.get(&self.folder.entry(seq)).await.ok()??;
        decode(&bytes).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::storage::{self, ObjectInfo};

    fn job() -> JobId {
        JobId { namespace: "default".into(), name: "j".into(), uid: "local".into() }
    }

    /// Loses replies: of every four calls that write or list, two fail, one of them after its effect.
    struct Flaky {
        storage: Arc<dyn Storage>,
        calls: AtomicUsize,
    }

    impl Flaky {
        async fn call<T>(&self, effect: impl Future<Output = Result<T>>) -> Result<T> {
            let lost = || Error::retry("connection lost");
            match self.calls.fetch_add(1, Ordering::SeqCst) % 4 {
                0 => Err(lost()),
                1 => effect.await.and(Err(lost())),
                _ => effect.await,
            }
        }
    }

    #[async_trait::async_trait]
    impl Storage for Flaky {
        async fn put_new(&self, path: &str, bytes: Bytes) -> Result<PutNew> {
            self.call(self.storage.put_new(path, bytes)).await
        }

        async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
            self.storage.put(path, bytes).await
        }

        async fn get(&self, path: &str) -> Result<Option<Bytes>> {
            self.storage.get(path).await
        }

        async fn get_range(&self, path: &str, from: u64, to: u64) -> Result<Option<Bytes>> {
            self.storage.get_range(path, from, to).await
        }

        async fn size(&self, path: &str) -> Result<Option<u64>> {
            self.storage.size(path).await
        }

        async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>> {
            self.call(self.storage.list(prefix, start_after)).await
        }

        async fn delete(&self, path: &str) -> Result<()> {
            self.storage.delete(path).await
        }

        fn describe(&self) -> String {
            "flaky".to_owned()
        }
    }

    #[tokio::test]
    async fn an_append_whose_reply_is_lost_is_made_once_and_fences_nobody() {
        let storage = storage::open("memory://").unwrap();
        let (mut log, _) = CheckpointLog::open(storage.clone(), Env::system(), &job(), "a:1").await.unwrap();
        log.storage = Arc::new(Flaky { storage: storage.clone(), calls: AtomicUsize::new(0) });
        for epoch in 1..=5 {
            assert_eq!(log.append(Event::Completed { manifest: manifest(epoch) }).await.unwrap(), epoch);
        }
        let state = read(&*storage, log.folder()).await.unwrap();
        assert_eq!(state.retained.iter().map(|r| r.manifest.epoch.0).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        let newer = CheckpointLog::open(storage, Env::system(), &job(), "b:2").await.unwrap();
        let fenced = log.append(Event::Committed { epoch: Epoch(5) }).await.unwrap_err();
        assert_eq!((fenced.disposition(), newer.0.generation()), (Disposition::Fenced, Generation(2)));
    }

    fn manifest(epoch: u64) -> Box<Manifest> {
        Box::new(Manifest { duration_ms: 1, max_parallelism: 128, ..Manifest::new(job(), Epoch(epoch)) })
    }

    fn epochs(retained: &[Retained]) -> Vec<u64> {
        retained.iter().map(|r| r.manifest.epoch.0).collect()
    }

    async fn open(storage: &Arc<dyn Storage>, holder: &str) -> (CheckpointLog, LogState) {
        CheckpointLog::open(storage.clone(), Env::system(), &job(), holder).await.unwrap()
    }

    #[tokio::test]
    async fn a_new_reign_sees_what_the_old_one_completed() {
        let storage = storage::open("memory://").unwrap();
        let (mut first, state) = open(&storage, "a:1").await;
        assert!(!state.has_history());
        for epoch in 1..=3 {
            first.append(Event::Completed { manifest: manifest(epoch) }).await.unwrap();
            first.append(Event::Committed { epoch: Epoch(epoch) }).await.unwrap();
        }
        first.append(Event::Released { epochs: vec![Epoch(1)], oldest_seq: 3 }).await.unwrap();
        let (second, state) = open(&storage, "b:2").await;
        assert_eq!(epochs(&state.retained), [2, 3]);
        assert_eq!((state.last_epoch, state.committed, state.finished), (Epoch(3), Epoch(3), None));
        assert_eq!((second.generation(), second.attempt()), (Generation(2), Attempt(2)));
        assert_eq!(second.history(), first.history());
    }

    #[test]
    fn a_finished_job_stays_finished_until_an_entry_says_from_where_it_runs_again() {
        let finished = [Event::Opened, Event::Completed { manifest: manifest(1) }, Event::Finished { epoch: Epoch(1) }];
        let restored = |epoch| Event::Restored { epoch, asked: None };
        let adopted = Event::Adopted { from: "/a".into(), asked: "/a".into(), manifest: manifest(2) };
        let stays = Some(Epoch(1));
        for (behind, expected) in [
            (vec![], stays),
            (vec![Event::Opened], stays),
            (vec![Event::Opened, Event::Opened], stays),
            (vec![Event::Opened, restored(None)], None),
            (vec![Event::Opened, restored(Some(Epoch(1)))], None),
            (vec![Event::Opened, adopted], None),
            (vec![Event::Opened, Event::Completed { manifest: manifest(2) }], None),
        ] {
            let mut state = LogState::default();
            let events = finished.iter().cloned().chain(behind.clone());
            events.zip(0..).for_each(|(event, seq)| state.take(seq, event));
            assert_eq!(state.finished, expected, "{behind:?}");
        }
    }

    #[test]
    fn a_chosen_parallelism_is_what_the_newest_checkpoint_says_and_a_stop_holds_until_the_next_reign() {
        let chosen = Rescaled { spec: 2, to: 4 };
        let rescaled = |epoch| Box::new(Manifest { rescaled: Some(chosen), ..*manifest(epoch) });
        let mut state = LogState::default();
        let mut then = |event| {
            let seq = state.next_seq;
            state.take(seq, event);
            (state.rescaled, state.stopped)
        };
        assert_eq!(then(Event::Opened), (None, None));
        assert_eq!(then(Event::Completed { manifest: rescaled(1) }), (Some(chosen), None));
        assert_eq!(then(Event::Released { epochs: vec![Epoch(1)], oldest_seq: 2 }), (Some(chosen), None));
        assert_eq!(then(Event::Stopped { epoch: Epoch(1) }), (Some(chosen), Some(Epoch(1))));
        assert_eq!(then(Event::Opened), (Some(chosen), None));
        // Another job's choice is not this one's.
        let adopted = Event::Adopted { from: "/a".into(), asked: "/a".into(), manifest: manifest(2) };
        assert_eq!(then(adopted), (Some(chosen), None));
        assert_eq!(then(Event::Completed { manifest: manifest(3) }), (None, None));
    }

    #[tokio::test]
    async fn the_older_of_two_coordinators_is_fenced_and_told_by_whom() {
        let storage = storage::open("memory://").unwrap();
        let (mut old, _) = open(&storage, "old:1").await;
        let (mut new, _) = open(&storage, "new:2").await;
        let error = old.append(Event::Completed { manifest: manifest(1) }).await.unwrap_err();
        assert_eq!(error.disposition(), Disposition::Fenced);
        assert!(error.to_string().contains("new:2 (generation 2) has taken the job over"), "{error}");
        new.append(Event::Completed { manifest: manifest(1) }).await.unwrap();
    }

    #[tokio::test]
    async fn a_coordinator_that_begins_anew_does_not_take_the_job_back() {
        let storage = storage::open("memory://").unwrap();
        let again = async |held: &CheckpointLog| {
            let held = Some(held.generation());
            CheckpointLog::open_after(held, storage.clone(), Env::system(), &job(), "old:1").await
        };
        let (first, _) = open(&storage, "old:1").await;
        let (second, _) = again(&first).await.unwrap();
        assert_eq!(second.generation(), Generation(2));
        let (mut new, _) = open(&storage, "new:2").await;
        let error = again(&second).await.err().unwrap();
        assert_eq!(error.disposition(), Disposition::Fenced);
        assert!(error.to_string().contains("new:2 (generation 3) has taken the job over"), "{error}");
        new.append(Event::Completed { manifest: manifest(1) }).await.unwrap();
    }

    #[tokio::test]
    async fn a_sleeper_that_creates_a_trimmed_number_is_fenced_and_its_entry_is_ignored() {
        let storage = storage::open("memory://").unwrap();
        let (mut sleeper, _) = open(&storage, "sleeper:1").await;
        let (mut new, _) = open(&storage, "new:2").await;
        for epoch in 1..=4 {
            new.append(Event::Completed { manifest: manifest(epoch) }).await.unwrap();
        }
        new.append(Event::Released { epochs: vec![Epoch(1)], oldest_seq: 3 }).await.unwrap();
        // The new coordinator trims what counts no more, the sleeper's next number (1) and its neighbour (2) among it;
        // or, at worst, exactly up to it.
        for trimmed in [vec![0, 1, 2], vec![0, 1]] {
            for seq in &trimmed {
                storage.delete(&new.folder().entry(*seq)).await.unwrap();
            }
            let error = sleeper.append(Event::Completed { manifest: manifest(77) }).await.unwrap_err();
            assert_eq!(error.disposition(), Disposition::Fenced);
            let state = read(&*storage, new.folder()).await.unwrap();
            assert_eq!(epochs(&state.retained), [2, 3, 4]);
            storage.put(&new.folder().entry(2), Bytes::from_static(b"back")).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_restore_that_went_back_abandons_what_was_newer() {
        let storage = storage::open("memory://").unwrap();
        let (mut log, _) = open(&storage, "a:1").await;
        for epoch in 1..=3 {
            log.append(Event::Completed { manifest: manifest(epoch) }).await.unwrap();
        }
        log.append(Event::Restored { epoch: Some(Epoch(2)), asked: None }).await.unwrap();
        log.append(Event::Completed { manifest: manifest(4) }).await.unwrap();
        let state = read(&*storage, log.folder()).await.unwrap();
        assert_eq!((epochs(&state.retained), epochs(&state.abandoned)), (vec![1, 2, 4], vec![3]));
        log.append(Event::Restored { epoch: None, asked: None }).await.unwrap();
        let state = read(&*storage, log.folder()).await.unwrap();
        assert!(state.retained.is_empty() && state.has_history());
        assert_eq!(state.last_epoch, Epoch(4));
    }

    #[tokio::test]
    async fn a_damaged_entry_costs_only_itself_and_numbers_never_go_back() {
        let storage = storage::open("memory://").unwrap();
        let (mut log, _) = open(&storage, "a:1").await;
        for epoch in 1..=3 {
            log.append(Event::Completed { manifest: manifest(epoch) }).await.unwrap();
        }
        for seq in 0..=3 {
            let path = log.folder().entry(seq);
            let good = storage.get(&path).await.unwrap().unwrap();
            let mut bad = good.to_vec();
            bad[40] ^= 1;
            storage.put(&path, bad.into()).await.unwrap();
            let state = read(&*storage, log.folder()).await.unwrap();
            assert_eq!(state.damaged.len(), 1, "{seq}");
            assert!(state.generation >= Generation(1) && state.last_epoch >= Epoch(3) && state.next_seq == 4, "{seq}");
            assert_eq!(state.retained.len(), if seq == 0 { 3 } else { 2 }, "{seq}");
            storage.put(&path, good).await.unwrap();
        }
    }

    #[tokio::test]
    async fn an_entry_of_a_later_version_is_no_damage_and_nobody_goes_on_without_it() {
        let storage = storage::open("memory://").unwrap();
        let (mut log, _) = open(&storage, "a:1").await;
        for epoch in 1..=3 {
            log.append(Event::Completed { manifest: manifest(epoch) }).await.unwrap();
        }
        let path = log.folder().entry(3);
        let later: Entry = decode(&storage.get(&path).await.unwrap().unwrap()).unwrap();
        let mut later = serde_json::to_value(later).unwrap();
        later["event"]["manifest"]["unheardOf"] = true.into();
        storage.put(&path, sealed::seal("entry", &later).unwrap()).await.unwrap();
        let error = CheckpointLog::open(storage.clone(), Env::system(), &job(), "b:2").await.err().unwrap();
        assert_eq!(error.disposition(), Disposition::Abort);
        let error = error.to_string();
        assert!(error.starts_with("read entry 3 of the checkpoint log: log entry is not damaged"), "{error}");
        assert!(error.contains("`unheardOf`") && error.contains("a later version"), "{error}");
        assert_eq!(storage.list(&log.folder().path("log"), None).await.unwrap().len(), 4, "nothing is written");
        // What counts no more may be anything.
        log.append(Event::Completed { manifest: manifest(4) }).await.unwrap();
        log.append(Event::Released { epochs: vec![Epoch(1), Epoch(2), Epoch(3)], oldest_seq: 4 }).await.unwrap();
        assert_eq!(epochs(&read(&*storage, log.folder()).await.unwrap().retained), [4]);
    }

    #[tokio::test]
    async fn an_entry_that_is_missing_is_damage_and_one_that_was_trimmed_is_not() {
        let storage = storage::open("memory://").unwrap();
        let (mut log, _) = open(&storage, "a:1").await;
        for epoch in 1..=3 {
            log.append(Event::Completed { manifest: manifest(epoch) }).await.unwrap();
        }
        let path = log.folder().entry(2);
        let kept = storage.get(&path).await.unwrap().unwrap();
        storage.delete(&path).await.unwrap();
        let state = read(&*storage, log.folder()).await.unwrap();
        assert_eq!((state.damaged.len(), state.damaged[0].seq), (1, 2), "{:?}", state.damaged);
        assert!(state.has_history() && state.last_epoch >= Epoch(1 << 20), "{state:?}");
        storage.put(&path, kept).await.unwrap();
        log.append(Event::Released { epochs: vec![Epoch(1)], oldest_seq: 2 }).await.unwrap();
        for seq in 0..2 {
            storage.delete(&log.folder().entry(seq)).await.unwrap();
        }
        assert_eq!(read(&*storage, log.folder()).await.unwrap().damaged, []);
    }

    #[test]
    fn every_flipped_byte_of_an_entry_is_found() {
        let entry = Entry {
            seq: 7,
            history: "h".into(),
            generation: Generation(1),
            attempt: Attempt(2),
            nonce: "n".into(),
            written_at_ms: 5,
            holder: "host:1".into(),
            event: Event::Completed { manifest: manifest(3) },
        };
        let good = encode(&entry).unwrap();
        assert_eq!(decode(&good).unwrap(), entry);
        for at in 0..good.len() {
            for flip in [1_u8, 0x20, 0x80] {
                let mut bad = good.to_vec();
                bad[at] ^= flip;
                assert!(decode(&bad).is_err(), "byte {at} ^ {flip}");
            }
            assert!(decode(&good[..at]).is_err(), "cut at {at}");
        }
    }
}
