//! Local copies of the files that this process has uploaded: what it reads back after another process has died, without asking the
//! storage for it.
//!
//! They lie in a folder of the process's own, and go with it. [`Index`] decides, purely, which are kept: those that the newest
//! complete checkpoint names, and checkpoints since. What no longer fits is not kept, the newest first: what is there stays.
//! Invariant: a copy is of use to the object of that very path only, is verified as that one would be, and is never missed:
//! whoever can't use it reads the storage.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use floodmark_snapshot::{Env, Epoch, Error, Manifest, Result, Shard, WorkFolder};

/// Bytes of copies that a process keeps, unless it is told otherwise.
pub const LOCAL_COPIES_BYTES_MAX: u64 = 8 << 30;

/// Where a process keeps local copies.
#[derive(Debug)]
pub struct LocalCopies {
    folder: WorkFolder,
    index: Mutex<Index>,
    counts: Counts,
}

/// What has been read where, since the process has begun.
#[derive(Debug, Default)]
struct Counts {
    hits: AtomicU64,
    misses: AtomicU64,
    unusable: AtomicU64,
}

/// See [`LocalCopies::uses`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyUses {
    /// Reads that a copy has answered.
    pub hits: u64,
    /// Reads that went to the storage because there was no copy.
    pub misses: u64,
    /// Reads that went to the storage because the copy could not be used.
    pub unusable: u64,
}

impl LocalCopies {
    /// Makes a folder of the process's own inside `root`, for copies of so many bytes.
    ///
    /// # Errors
    /// `Abort` if the folder can't be made.
    pub fn open(root: &Path, bytes_max: u64, env: &Env) -> Result<Self> {
        let folder = WorkFolder::open(root, env).map_err(|e| e.context("keep local copies of state"))?;
        Ok(Self { folder, index: Mutex::new(Index { bytes_max, ..Index::default() }), counts: Counts::default() })
    }

    /// How they have been of use so far.
    #[must_use]
    pub fn uses(&self) -> CopyUses {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        CopyUses { hits: of(&self.counts.hits), misses: of(&self.counts.misses), unusable: of(&self.counts.unusable) }
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, file: u64) -> PathBuf {
        self.folder.path().join(file.to_string())
    }

    /// Keeps a file that checkpoint `epoch` names `path`: by another name, if it can have one here. False if it is not kept.
    pub(super) async fn link(self: &Arc<Self>, env: &Env, epoch: Epoch, path: &str, file: PathBuf) -> bool {
        let Ok(size) = fs::metadata(&file).map(|m| m.len()) else { return false };
        self.make(env, epoch, path, size, move |to| fs::hard_link(&file, to)).await
    }

    /// Keeps the bytes that checkpoint `epoch` names `path`.
    pub(super) async fn write(self: &Arc<Self>, env: &Env, epoch: Epoch, path: &str, bytes: Bytes) {
        // Not synchronised: whoever could read it after a crash of the system will have begun anew, with a folder of its own.
        self.make(env, epoch, path, bytes.len() as u64, move |to| fs::write(to, &bytes)).await;
    }

    async fn make(
        self: &Arc<Self>,
        env: &Env,
        epoch: Epoch,
        path: &str,
        size: u64,
        make: impl FnOnce(&Path) -> std::io::Result<()> + Send + 'static,
    ) -> bool {
        let Some(file) = self.lock().begin(epoch, path, size) else { return false };
        let to = self.place(file);
        let made = env.blocking("keeping a local copy", move || make(&to)).await;
        let made = made.and_then(|made| made.map_err(|e| Error::abort(e.to_string())));
        let kept = made.is_ok();
        if let Err(error) = made {
            tracing::debug!(%path, %error, "no local copy");
        }
        let gone = self.lock().end(path, file, kept);
        self.remove(env, gone);
        kept
    }

    /// Checkpoint `epoch` names `path`, which an earlier one has uploaded.
    pub(super) fn named_again(&self, epoch: Epoch, path: &str) {
        self.lock().name(epoch, path);
    }

    /// Checkpoint `epoch` is complete: who begins anew begins from it, or from a later one.
    pub(super) fn completed(&self, env: &Env, epoch: Epoch) {
        let gone = self.lock().completed(epoch);
        self.remove(env, gone);
    }

    /// Checkpoint `epoch` is given up.
    pub(super) fn aborted(&self, env: &Env, epoch: Epoch) {
        let gone = self.lock().aborted(epoch);
        self.remove(env, gone);
    }

    /// An attempt begins from this checkpoint, one of the job's own.
    pub(super) fn restored(&self, env: &Env, manifest: &Manifest) {
        let gone = self.lock().restored(manifest.epoch, manifest.shards().map(|s| s.path.clone()).collect());
        self.remove(env, gone);
    }

    /// Removes files that nothing leads to any more.
    fn remove(&self, env: &Env, gone: Vec<u64>) {
        if gone.is_empty() {
            return;
        }
        let places: Vec<PathBuf> = gone.into_iter().map(|file| self.place(file)).collect();
        // What can't be removed goes with the folder.
        env.runtime.blocking(Box::new(move || places.iter().for_each(|place| drop(fs::remove_file(place)))));
    }

    /// The copy of a shard, if there is one of its size.
    pub(super) fn find(&self, env: &Env, shard: &Shard) -> Option<Copy> {
        let file = self.lock().find(&shard.path, shard.size);
        if file.is_none() {
            self.counts.misses.fetch_add(1, Ordering::Relaxed);
        }
        Some(Copy { place: self.place(file?), env: env.clone() })
    }

    /// A copy has been read and verified.
    pub(super) fn used(&self) {
        self.counts.hits.fetch_add(1, Ordering::Relaxed);
    }

    /// The copy of a shard can't be used.
    pub(super) fn unusable(&self, env: &Env, shard: &Shard, why: &Error) {
        tracing::debug!(path = %shard.path, %why, "the local copy can't be used; reading the storage");
        self.counts.unusable.fetch_add(1, Ordering::Relaxed);
        let gone = self.lock().forget(&shard.path);
        self.remove(env, gone);
    }
}

/// A copy that may be read. Nothing of it is verified here.
pub(super) struct Copy {
    place: PathBuf,
    env: Env,
}

impl Copy {
    /// All of it.
    pub(super) async fn read(&self) -> Result<Bytes> {
        let place = self.place.clone();
        let read = self.env.blocking("reading a local copy", move || fs::read(place)).await?;
        read.map(Bytes::from).map_err(|e| unreadable(&e))
    }

    /// Bytes `from..to` of it.
    pub(super) async fn read_range(&self, from: u64, to: u64) -> Result<Bytes> {
        let place = self.place.clone();
        let read = move || {
            let mut file = fs::File::open(place)?;
            file.seek(SeekFrom::Start(from))?;
            let len = to.saturating_sub(from);
            let mut bytes = Vec::with_capacity(len as usize);
            match file.take(len).read_to_end(&mut bytes)? as u64 == len {
                true => Ok(bytes),
                false => Err(std::io::ErrorKind::UnexpectedEof.into()),
            }
        };
        self.env.blocking("reading a local copy", read).await?.map(Bytes::from).map_err(|e| unreadable(&e))
    }
}

fn unreadable(error: &std::io::Error) -> Error {
    Error::corrupt(format!("read a local copy: {error}"))
}

/// Which copies there are, and what for. No I/O: files go by their numbers.
#[derive(Debug, Default)]
struct Index {
    bytes_max: u64,
    /// Of all copies, those that are being made too.
    bytes: u64,
    files: u64,
    copies: HashMap<String, Kept>,
    /// What checkpoints name, from the newest complete one on.
    named: BTreeMap<Epoch, HashSet<String>>,
    newest: Epoch,
}

#[derive(Debug)]
struct Kept {
    file: u64,
    size: u64,
    /// Whether all of it is there.
    whole: bool,
}

impl Index {
    /// Makes room for a copy, if there is any, and numbers its file.
    fn begin(&mut self, epoch: Epoch, path: &str, size: u64) -> Option<u64> {
        if epoch < self.newest || self.copies.contains_key(path) || size > self.bytes_max.saturating_sub(self.bytes) {
            return None;
        }
        self.files += 1;
        self.bytes += size;
        self.copies.insert(path.to_owned(), Kept { file: self.files, size, whole: false });
        self.named.entry(epoch).or_default().insert(path.to_owned());
        Some(self.files)
    }

    /// A file is there, or is not. Answers with what is to be removed.
    fn end(&mut self, path: &str, file: u64, made: bool) -> Vec<u64> {
        match self.copies.get_mut(path).filter(|kept| kept.file == file) {
            Some(kept) if made => {
                kept.whole = true;
                Vec::new()
            }
            Some(_) => self.forget(path),
            // Given up meanwhile.
            None => vec![file],
        }
    }

    fn name(&mut self, epoch: Epoch, path: &str) {
        if epoch >= self.newest && self.copies.contains_key(path) {
            self.named.entry(epoch).or_default().insert(path.to_owned());
        }
    }

    fn completed(&mut self, epoch: Epoch) -> Vec<u64> {
        self.newest = self.newest.max(epoch);
        self.named = self.named.split_off(&self.newest);
        self.sweep()
    }

    fn aborted(&mut self, epoch: Epoch) -> Vec<u64> {
        if epoch == self.newest {
            return Vec::new();
        }
        self.named.remove(&epoch);
        self.sweep()
    }

    /// Numbers begin again behind `epoch`: what later ones were named before is of no use.
    fn restored(&mut self, epoch: Epoch, paths: HashSet<String>) -> Vec<u64> {
        self.newest = epoch;
        self.named = BTreeMap::from([(epoch, paths)]);
        self.sweep()
    }

    /// Gives up what nothing names.
    fn sweep(&mut self) -> Vec<u64> {
        let (named, mut gone) = (&self.named, Vec::new());
        let bytes = &mut self.bytes;
        self.copies.retain(|path, kept| {
            let stays = named.values().any(|paths| paths.contains(path));
            if !stays {
                *bytes -= kept.size;
                // One that is being made is removed when it is there.
                gone.extend(kept.whole.then_some(kept.file));
            }
            stays
        });
        gone
    }

    fn forget(&mut self, path: &str) -> Vec<u64> {
        let kept = self.copies.remove(path);
        self.bytes -= kept.as_ref().map_or(0, |kept| kept.size);
        kept.into_iter().map(|kept| kept.file).collect()
    }

    fn find(&self, path: &str, size: u64) -> Option<u64> {
        self.copies.get(path).filter(|kept| kept.whole && kept.size == size).map(|kept| kept.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 10;

    /// Runs steps over an index with room for three copies, and answers with the paths that it has then: `keep 2 a` (checkpoint 2
    /// uploads a), `again 2 a`, `complete 2`, `abort 2`, `restore 2 a b`.
    fn check(steps: &str, expected: &str) {
        let mut index = Index { bytes_max: 3 * SIZE, ..Index::default() };
        let mut files = HashSet::new();
        for step in steps.split(", ") {
            let words: Vec<&str> = step.split(' ').collect();
            let epoch = Epoch(words[1].parse().unwrap());
            let gone = match words[0] {
                "keep" => match index.begin(epoch, words[2], SIZE) {
                    Some(file) => {
                        files.insert(file);
                        index.end(words[2], file, true)
                    }
                    None => Vec::new(),
                },
                "again" => {
                    index.name(epoch, words[2]);
                    Vec::new()
                }
                "complete" => index.completed(epoch),
                "abort" => index.aborted(epoch),
                "restore" => index.restored(epoch, words[2..].iter().map(|p| (*p).to_owned()).collect()),
                other => panic!("{other}"),
            };
            for file in gone {
                assert!(files.remove(&file), "{steps}: file {file} is removed once");
            }
            assert!(index.bytes <= index.bytes_max);
        }
        let mut kept: Vec<&str> = index.copies.keys().map(String::as_str).collect();
        kept.sort_unstable();
        assert_eq!(kept.join(" "), expected, "{steps}");
        assert_eq!((index.bytes, files.len()), (kept.len() as u64 * SIZE, kept.len()), "{steps}");
        assert!(kept.iter().all(|path| index.find(path, SIZE).is_some() && index.find(path, SIZE + 1).is_none()));
    }

    #[test]
    fn what_the_newest_complete_checkpoint_and_later_ones_name_is_kept() {
        check("keep 1 a, complete 1, again 2 a, keep 2 b, complete 2", "a b");
        check("keep 1 a, complete 1, keep 2 b, complete 2", "b");
        check("keep 1 a, complete 1, keep 2 b", "a b");
        check("keep 1 a, keep 2 b, complete 2, keep 1 c", "b");
        check("keep 1 a, complete 1, again 2 a, keep 2 b, abort 2", "a");
        check("keep 1 a, complete 1, abort 1", "a");
    }

    #[test]
    fn what_does_not_fit_is_not_kept_and_what_is_there_stays() {
        check("keep 1 a, keep 1 b, keep 1 c, keep 1 d", "a b c");
        check("keep 1 a, keep 1 b, complete 1, keep 2 c, keep 2 d, complete 2, keep 3 e", "c e");
        let mut index = Index { bytes_max: SIZE, ..Index::default() };
        assert_eq!((index.begin(Epoch(1), "a", SIZE + 1), index.bytes), (None, 0));
    }

    #[test]
    fn an_attempt_keeps_what_it_begins_from_and_no_more() {
        check("keep 4 a, complete 4, keep 5 b, restore 4 a x", "a");
        check("keep 4 a, complete 4, keep 5 b, restore 4 a x, keep 5 c", "a c");
        check("keep 4 a, complete 4, again 5 a, keep 5 b, complete 5, restore 4 a x", "a");
        check("keep 4 a, complete 4, restore 3 x", "");
    }

    #[test]
    fn a_copy_that_is_given_up_while_it_is_made_is_removed_then() {
        let mut index = Index { bytes_max: SIZE, ..Index::default() };
        let file = index.begin(Epoch(1), "a", SIZE).unwrap();
        assert_eq!(index.find("a", SIZE), None, "not all of it is there");
        assert_eq!((index.completed(Epoch(2)), index.bytes), (Vec::new(), 0));
        assert_eq!(index.end("a", file, true), [file]);
        let file = index.begin(Epoch(2), "b", SIZE).unwrap();
        assert_eq!((index.end("b", file, false), index.bytes), (vec![file], 0));
    }
}
