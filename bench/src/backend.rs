//! The back ends that are compared: as words, as manifests have them, and opened in this process.

use std::{fmt, path::Path, sync::Arc};

use anyhow::Result;
use clap::ValueEnum;
use floodmark_rocksdb::{RocksDb, Settings};
use floodmark_snapshot::Env;
use floodmark_state::{Heap, StateBackend};

/// What keeps state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    /// Memory
    Heap,
    /// RocksDB on local disk, with hot keys in memory
    #[value(name = "rocksdb")]
    RocksDb,
}

/// As manifests have it.
impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Heap => "Heap",
            Self::RocksDb => "RocksDB",
        })
    }
}

impl Backend {
    /// Opens it in this process; RocksDB with its databases in `folder` and the memory that it has in a job.
    pub(crate) fn open(self, folder: &Path, env: &Env) -> Result<Arc<dyn StateBackend>> {
        Ok(match self {
            Self::Heap => Arc::new(Heap),
            Self::RocksDb => Arc::new(RocksDb::open(&Settings::new(folder), env)?),
        })
    }
}
