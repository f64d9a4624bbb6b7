//! A process's own folder on its local disk, inside one that it shares with others: made afresh, removed at its end, and cleared of
//! what killed processes have left behind.
//!
//! The process holds a lock in it: a folder whose lock can be had belongs to nobody. Invariant: nothing that another living
//! process uses is removed.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use crate::{Env, Error, Result};

/// The file in a process's folder that it holds locked.
const LOCK: &str = "lock";
/// The file that a process holds locked while it makes its folder.
const GATE: &str = ".gate";

/// A process's own folder, locked for as long as this lives, and removed then with all that is in it.
#[derive(Debug)]
pub struct WorkFolder {
    path: PathBuf,
    _lock: File,
}

impl WorkFolder {
    /// Makes a folder of our own inside `root`, and removes those whose owners have died.
    ///
    /// # Errors
    /// `Abort` if the folder can't be made.
    pub fn open(root: &Path, env: &Env) -> Result<Self> {
        fs::create_dir_all(root).map_err(|e| failed("create folder", root, &e))?;
        // One process at a time: nobody takes a folder for left behind that is just being made.
        let gate = locked(&root.join(GATE))?;
        remove_leftovers(root)?;
        let path = root.join(env.ids.ulid());
        fs::create_dir(&path).map_err(|e| failed("create folder", &path, &e))?;
        let lock = match locked(&path.join(LOCK)) {
            Ok(lock) => lock,
            Err(error) => {
                let _ = fs::remove_dir_all(&path);
                return Err(error);
            }
        };
        drop(gate);
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // Before the lock is given back. What can't be removed now is removed at the next start.
        let _ = fs::remove_dir_all(&self.path);
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

fn failed(action: &str, path: &Path, error: &io::Error) -> Error {
    Error::abort(format!("{action} {}: {error}", path.display()))
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
