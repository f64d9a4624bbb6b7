//! The local folders in which databases live: made afresh in the process's own one, and removed when nobody needs them. No RocksDB
//! in here.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use floodmark_snapshot::{Error, Result};

/// A folder that is removed, with all that is in it, when its last owner drops it.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    /// Makes a folder that must not exist yet.
    pub(crate) fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).map_err(|e| failed("create folder", &path, &e))?;
        Ok(Self(path))
    }

    /// Takes over a folder that RocksDB makes at this path.
    pub(crate) fn adopt(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What can't be removed now is removed at the next start.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// An error of the file system, with the place and the action.
pub(crate) fn failed(action: &str, path: &Path, error: &io::Error) -> Error {
    let place = format!("{action} {}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::abort(format!("{place} (RocksDB needs room for about twice the state in its work folder)"))
        }
        _ => Error::abort(place),
    }
}
