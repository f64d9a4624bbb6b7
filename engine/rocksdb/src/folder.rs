//! The local folders in which databases live: made afresh, removed when nobody needs them, and cleared of what a killed process
//! has left behind. No RocksDB in here.
//!
//! A process works in a folder of its own inside the given one, and holds a lock in it: a folder whose lock can be had belongs
//! to nobody. Invariant: nothing that another living process uses is removed.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use floodmark_snapshot::{Env, Error, Result};

/// The file in a process's folder that it holds locked.
const LOCK: &str = "lock";
/// The file that a process holds locked while it makes its folder.
const GATE: &str = ".gate";

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

/// A process's own folder, locked for as long as this lives.
#[derive(Debug)]
pub(crate) struct WorkFolder {
    // Removed before the lock is given back.
    folder: Folder,
    _lock: File,
}

impl WorkFolder {
    /// Makes a folder of our own inside `root`, and removes those whose owners have died.
    pub(crate) fn open(root: &Path, env: &Env) -> Result<Self> {
        fs::create_dir_all(root).map_err(|e| failed("create folder", root, &e))?;
        // One process at a time: nobody takes a folder for left behind that is just being made.
        let gate = locked(&root.join(GATE))?;
        remove_leftovers(root)?;
        let folder = Folder::create(root.join(env.ids.ulid()))?;
        let lock = locked(&folder.path().join(LOCK))?;
        drop(gate);
        Ok(Self { folder, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Makes a file if there is none, and waits for its lock.
fn locked(path: &Path) -> Result<File> {
    let file = File::create(path).map_err(|e| failed("create", path, &e))?;
    file.lock().map_err(|e| failed("lock", path, &e))?;
    Ok(file)
}

fn remove_leftovers(root: &Path) -> Result<()> {
    let entries = fs::read_dir(root).map_err(|e| failed("list folder", root, &e))?;
    for entry in entries {
        let path = entry.map_err(|e| failed("list folder", root, &e))?.path();
        let at = path.join(LOCK);
        // What has no lock is not of this kind.
        let Ok(lock) = File::open(&at) else { continue };
        if lock.try_lock().is_ok() {
            let _ = fs::remove_dir_all(&path);
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_process_s_folder_is_removed_and_a_living_one_s_is_not() {
        let root = tempfile::tempdir().unwrap();
        let env = Env::system();
        let living = WorkFolder::open(root.path(), &env).unwrap();
        let dead = root.path().join("01DEAD");
        fs::create_dir_all(dead.join("database")).unwrap();
        fs::write(dead.join(LOCK), "").unwrap();
        let foreign = root.path().join("somebody-else-s");
        fs::create_dir(&foreign).unwrap();
        let next = WorkFolder::open(root.path(), &env).unwrap();
        assert!(living.path().exists() && next.path().exists() && foreign.exists());
        assert!(!dead.exists());
        let path = next.path().to_owned();
        drop(next);
        assert!(!path.exists());
    }
}
