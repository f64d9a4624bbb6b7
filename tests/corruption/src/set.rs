//! Sets of golden files on disk: the storage of a job as an earlier version left it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::world::Objects;

/// The folder of a set that holds the job's storage.
pub const STORAGE: &str = "storage";

/// The folders of all sets below a folder of this repository's tests, by name.
///
/// # Errors
/// When they can't be listed.
pub fn all(folder: &str) -> io::Result<Vec<(String, PathBuf)>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder);
    let mut sets = Vec::new();
    for entry in fs::read_dir(&root)? {
        let path = entry?.path();
        if let (true, Some(name)) = (path.is_dir(), path.file_name().and_then(|n| n.to_str())) {
            sets.push((name.to_owned(), path.clone()));
        }
    }
    sets.sort();
    Ok(sets)
}

/// The folder of a new set.
///
/// # Errors
/// If there is one of that name: sets are never changed.
pub fn new(folder: &str, name: &str) -> io::Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder).join(name);
    if path.exists() {
        return Err(io::Error::other(format!("there is a set '{name}' already: sets are never changed")));
    }
    Ok(path)
}

/// The storage of a set.
///
/// # Errors
/// When it can't be read.
pub fn read(set: &Path) -> io::Result<Objects> {
    let mut objects = Objects::new();
    gather(&set.join(STORAGE), "", &mut objects)?;
    Ok(objects)
}

fn gather(folder: &Path, prefix: &str, objects: &mut Objects) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).ok_or_else(|| io::Error::other("a name of no text"))?;
        if path.is_dir() {
            gather(&path, &format!("{prefix}{name}/"), objects)?;
        } else {
            objects.insert(format!("{prefix}{name}"), fs::read(&path)?.into());
        }
    }
    Ok(())
}

/// Writes the storage of a set.
///
/// # Errors
/// When it can't be written.
pub fn write(set: &Path, objects: &Objects) -> io::Result<()> {
    for (path, bytes) in objects {
        let path = set.join(STORAGE).join(path);
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(path, bytes)?;
    }
    Ok(())
}
