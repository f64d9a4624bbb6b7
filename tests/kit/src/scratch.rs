//! Folders for one test each, that are gone with it.
//!
//! Invariant: all are in one folder, and a process of its own removes that one when this process ends, in whatever way: a test
//! that is interrupted or killed leaves nothing behind.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

/// Waits for the end of a pipe that only this process holds. What an interrupt at the terminal ends is not the guard. Jobs
/// that are being killed may still write, so a folder may not be empty at first.
const GUARD: &str =
    r#"trap '' INT TERM HUP; read -r _; for pause in 0 0.2 1 3; do sleep $pause; rm -rf "$0" && exit; done"#;

static ROOT: Mutex<Option<Root>> = Mutex::new(None);

struct Root {
    folder: PathBuf,
    /// Holds the pipe.
    _guard: Child,
}

/// An empty folder, removed when dropped.
///
/// # Errors
/// When it can't be made, or there is no `sh`.
pub fn folder() -> Result<TempDir> {
    let mut root = ROOT.lock().unwrap_or_else(PoisonError::into_inner);
    let root = match &mut *root {
        Some(root) => root,
        none => none.insert(Root::new()?),
    };
    tempfile::tempdir_in(&root.folder).with_context(|| format!("create a folder in {}", root.folder.display()))
}

impl Root {
    fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("floodmark-test-").tempdir()?;
        let guard = Command::new("sh")
            .args(["-c", GUARD])
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start sh")?;
        Ok(Self { folder: folder.keep(), _guard: guard })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_empty_and_gone_when_dropped() -> Result<()> {
        let (one, other) = (folder()?, folder()?);
        assert_ne!(one.path(), other.path());
        assert_eq!(one.path().parent(), other.path().parent());
        assert_eq!(std::fs::read_dir(one.path())?.count(), 0);
        let path = one.path().to_owned();
        drop(one);
        assert!(!path.exists() && other.path().exists());
        Ok(())
    }
}
