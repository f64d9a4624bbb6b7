//! What must not stay behind: folders for tests, the servers' processes, and networks.
//!
//! Invariant: all folders are in one, and a guard, a process of its own, ends the servers, takes the networks down and removes
//! that folder when this process ends, in whatever way: a test run that is interrupted or killed leaves nothing behind either.

use std::{
    io::Write as _,
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

/// Hears which processes start and end, by a pipe that only this process holds; when that closes, does its work. An interrupt at
/// the terminal must not end it. Whoever is being killed may still write for a moment, so it looks again.
const GUARD: &str = r#"
trap '' INT TERM HUP
pids=' '
namespaces=
links=
while read -r event pid; do
  case $event in
    started) pids="$pids$pid " ;;
    ended) pids="${pids%% $pid *} ${pids#* $pid }" ;;
    namespace) namespaces="$namespaces $pid" ;;
    link) links="$links $pid" ;;
  esac
done
for pid in $pids; do kill -9 "$pid"; done
for namespace in $namespaces; do
  for pid in $(ip netns pids "$namespace"); do kill -9 "$pid"; done
  ip netns del "$namespace"
done
for link in $links; do ip link del "$link"; done
for pause in 0 0.2 0.5 1 3; do
  sleep $pause
  alive=
  for pid in $pids; do kill -0 "$pid" && alive=yes; done
  rm -rf "$0"
  [ "$alive" ] || [ -e "$0" ] || exit 0
done
"#;

static GUARDED: Mutex<Option<Guarded>> = Mutex::new(None);

struct Guarded {
    root: PathBuf,
    guard: ChildStdin,
    /// Ends after this process.
    _process: Child,
}

/// An empty folder whose name begins with `prefix`; removed when dropped.
///
/// # Errors
/// When it can't be made, or there is no `sh`.
pub fn folder(prefix: &str) -> Result<TempDir> {
    with_guard(|guarded| {
        let within = tempfile::Builder::new().prefix(prefix).tempdir_in(&guarded.root);
        within.with_context(|| format!("create a folder in {}", guarded.root.display()))
    })
}

/// A process that the guard ends if this one can't. Drop it when the process has been waited for.
pub(crate) struct Watched(u32);

impl Watched {
    pub(crate) fn new(pid: u32) -> Result<Self> {
        with_guard(|guarded| writeln!(guarded.guard, "started {pid}").context("tell the guard"))?;
        Ok(Self(pid))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // A guard that is gone has nothing to end.
        let _ = with_guard(|guarded| writeln!(guarded.guard, "ended {}", self.0).context("tell the guard"));
    }
}

/// What of a network the guard takes down, if it is still there by then. Names are never used again.
pub(crate) enum Laid<'a> {
    /// A network namespace, with all processes in it.
    Namespace(&'a str),
    /// A network interface.
    Link(&'a str),
}

/// Tells the guard, before it is laid.
pub(crate) fn watch_network(laid: &Laid<'_>) -> Result<()> {
    let line = match laid {
        Laid::Namespace(name) => format!("namespace {name}"),
        Laid::Link(name) => format!("link {name}"),
    };
    with_guard(|guarded| writeln!(guarded.guard, "{line}").context("tell the guard"))
}

fn with_guard<T>(act: impl FnOnce(&mut Guarded) -> Result<T>) -> Result<T> {
    let mut guarded = GUARDED.lock().unwrap_or_else(PoisonError::into_inner);
    act(match &mut *guarded {
        Some(guarded) => guarded,
        none => none.insert(Guarded::new()?),
    })
}

impl Guarded {
    fn new() -> Result<Self> {
        let root = tempfile::Builder::new().prefix("floodmark-test-").tempdir()?;
        let mut process = Command::new("sh")
            .args(["-c", GUARD])
            .arg(root.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start sh")?;
        let guard = process.stdin.take().context("the guard has no pipe")?;
        Ok(Self { root: root.keep(), guard, _process: process })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_empty_and_gone_when_dropped() -> Result<()> {
        let (one, other) = (folder("one-")?, folder("other-")?);
        assert_eq!(one.path().parent(), other.path().parent());
        assert_eq!(std::fs::read_dir(one.path())?.count(), 0);
        let path = one.path().to_owned();
        drop(one);
        assert!(!path.exists() && other.path().exists());
        Ok(())
    }

    #[test]
    fn the_guard_ends_what_is_still_watched_and_removes_the_folder() -> Result<()> {
        let mut guarded = Guarded::new()?;
        let sleeper = || Command::new("sleep").arg("60").spawn();
        let (mut watched, mut ended) = (sleeper()?, sleeper()?);
        for (event, pid) in [("started", watched.id()), ("started", ended.id()), ("ended", ended.id())] {
            writeln!(guarded.guard, "{event} {pid}")?;
        }
        std::fs::write(guarded.root.join("file"), "")?;
        let Guarded { root, guard, mut _process } = guarded;
        drop(guard);
        assert!(!watched.wait()?.success());
        assert!(_process.wait()?.success());
        assert!(!root.exists());
        assert!(ended.try_wait()?.is_none(), "it has ended what it should not");
        ended.kill()?;
        ended.wait()?;
        Ok(())
    }
}
