//! The suite that every state back end passes: with all rows in memory, and with hardly any.

use std::{path::Path, sync::Arc};

use floodmark_rocksdb::{RocksDb, Settings};
use floodmark_snapshot::{Env, Result};
use floodmark_state::{KeyedState, StateBackend, StateSpec};

/// A back end and its folder.
struct Kept(RocksDb, #[allow(dead_code, reason = "removed when it is dropped")] tempfile::TempDir);

impl StateBackend for Kept {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn keyed(&self, spec: StateSpec) -> Result<Box<dyn KeyedState>> {
        self.0.keyed(spec)
    }
}

fn make(cache_bytes: usize) -> Arc<dyn StateBackend> {
    // In memory where there is such a place, because RocksDB waits for the disk at each of many checkpoints.
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.expect("a folder");
    let settings = Settings { cache_bytes, ..Settings::new(folder.path()) };
    Arc::new(Kept(RocksDb::open(&settings, &Env::system()).expect("a back end"), folder))
}

mod in_memory {
    floodmark_state::keyed_state_suite!(|| super::make(64 << 20));
}

mod in_files {
    floodmark_state::keyed_state_suite!(|| super::make(8 << 10));
}
