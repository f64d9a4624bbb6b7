//! Keyed state in RocksDB: larger than memory, and uploaded once.
//!
//! [`RocksDb`] is a [`StateBackend`]. Each operator and subtask has a database of its own in a local folder that does not outlive
//! the process: what survives a crash are checkpoints. In front of it, the rows that were wanted of late are in memory, where
//! operators compute on them; in most batches nobody asks the database.
//!
//! | module | what it is |
//! | --- | --- |
//! | `state` | the contract's calls; look-ups |
//! | `space`, `eviction`, `stored` | rows in memory, which of them leave it, and how many there are elsewhere |
//! | `outgoing`, `writer`, `database` | what is on its way to the database; the thread that writes; the database |
//! | `checkpoint`, `lineage`, `meta` | snapshots: files, which of them are named again, what is said beside them |
//! | `restoring`, `piece`, `manifest` | starting from files, at any parallelism: no more of them than have rows that are wanted |
//! | `files` | many rows at once into a database |
//! | `neutral`, `reading` | rows in the format of all back ends; reading files without the job that wrote them |
//! | `key`, `row` | the encodings |
//! | `options`, `folder`, `failure` | RocksDB's settings; the local folder; errors |
//!
//! Invariants: a snapshot holds exactly the rows at its barrier, whatever is written while it is being made; memory is bounded
//! by the settings, whatever the state's size; no local file outlives the process, but for what a killed one leaves until the
//! next start.

mod checkpoint;
mod database;
mod eviction;
mod failure;
mod files;
mod folder;
mod key;
mod lineage;
mod manifest;
mod meta;
mod neutral;
mod options;
mod outgoing;
mod piece;
mod reading;
mod restoring;
mod row;
mod space;
mod state;
mod stored;
mod writer;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

pub use self::reading::StateFiles;
use floodmark_snapshot::{Env, Result, WorkFolder};
use floodmark_state::{KeyedState, StateBackend, StateSpec};

use crate::{folder::Folder, options::Shared, state::State};

/// Where databases are, and how much memory they may take.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The folder in which this process makes one of its own: on a local disk with room for about twice the state.
    pub folder: PathBuf,
    /// Rows in memory, of all databases together, bytes. Shared out evenly.
    pub cache_bytes: usize,
    /// Blocks of files in memory (indexes and filters among them), of all databases together, bytes.
    pub block_cache_bytes: usize,
    /// Rows that are written but not yet in files, of all databases together, bytes.
    pub memtable_bytes: usize,
    /// Data files are cut at this size, bytes, about. A few of them are in memory at a time while they are uploaded.
    pub file_bytes: u64,
    /// A whole snapshot is cut into shards of this many bytes, about. A few of them are in memory at a time.
    pub shard_bytes: u64,
}

impl Settings {
    /// Settings that fit a process of about 1 GiB.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            cache_bytes: 256 << 20,
            block_cache_bytes: 128 << 20,
            memtable_bytes: 64 << 20,
            file_bytes: options::FILE_BYTES,
            shard_bytes: neutral::SHARD_BYTES,
        }
    }
}

/// Keeps keyed state in RocksDB. One for a process.
pub struct RocksDb(Arc<Process>);

impl RocksDb {
    /// Makes the process's folder, and removes those that killed processes have left beside it.
    ///
    /// # Errors
    /// `Abort` if the folder can't be made.
    pub fn open(settings: &Settings, env: &Env) -> Result<Self> {
        let folder = WorkFolder::open(&settings.folder, env)?;
        Ok(Self(Arc::new(Process {
            shared: Shared::new(settings.block_cache_bytes, settings.memtable_bytes, settings.file_bytes),
            folder,
            cache_bytes: settings.cache_bytes,
            shard_bytes: settings.shard_bytes,
            databases: Arc::default(),
            named: AtomicUsize::new(0),
        })))
    }
}

impl StateBackend for RocksDb {
    fn name(&self) -> &'static str {
        "rocksdb"
    }

    fn keyed(&self, spec: StateSpec) -> Result<Box<dyn KeyedState>> {
        Ok(Box::new(State::new(spec, self.0.clone())?))
    }
}

/// What all databases of a process have in common.
struct Process {
    shared: Shared,
    folder: WorkFolder,
    cache_bytes: usize,
    shard_bytes: u64,
    /// Databases that are open.
    databases: Arc<AtomicUsize>,
    /// Folders that were made.
    named: AtomicUsize,
}

impl Process {
    /// A new folder for a database.
    fn database_folder(&self, spec: &StateSpec) -> Result<Folder> {
        let number = self.named.fetch_add(1, Ordering::Relaxed);
        Folder::create(self.folder.path().join(format!("{number}-{}", spec.subtask)))
    }

    /// Joins the sharing out of memory.
    fn share(&self) -> Share {
        self.databases.fetch_add(1, Ordering::Relaxed);
        Share { all_bytes: self.cache_bytes, databases: self.databases.clone() }
    }
}

/// One database's share of the memory for rows; given back when it is dropped.
struct Share {
    all_bytes: usize,
    databases: Arc<AtomicUsize>,
}

impl Share {
    /// Bytes at present.
    fn bytes(&self) -> usize {
        self.all_bytes / self.databases.load(Ordering::Relaxed).max(1)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.databases.fetch_sub(1, Ordering::Relaxed);
    }
}
