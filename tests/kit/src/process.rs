//! Server processes: found, started on free ports, watched while they start, and ended by their id.

use std::{
    fs::File,
    net::{IpAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::scratch::Watched;

/// Longest that a server may take to start, or to end when asked to.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);

/// How a server is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Asked to, with SIGTERM: it puts its things in order.
    Terminate,
    /// With SIGKILL, as in a crash.
    Kill,
}

/// A place in the cache that `setup.sh` has filled.
pub(crate) fn cached(name: &str) -> Result<PathBuf> {
    let cache = match (std::env::var_os("FLOODMARK_CACHE"), std::env::var_os("HOME")) {
        (Some(cache), _) => PathBuf::from(cache),
        (None, Some(home)) => Path::new(&home).join(".cache/floodmark"),
        (None, None) => bail!("neither FLOODMARK_CACHE nor HOME is set"),
    };
    let path = cache.join(name);
    if !path.exists() {
        bail!("{} is not there: run scripts/setup-test.sh (make test does)", path.display());
    }
    Ok(path)
}

/// A port of this host's address that nobody listens on at this moment.
pub(crate) fn free_port(host: IpAddr) -> Result<u16> {
    let listener = TcpListener::bind((host, 0)).context("find a free port")?;
    Ok(listener.local_addr()?.port())
}

/// A running server. Killed when dropped, or when this process ends in whatever way.
pub(crate) struct Server {
    name: String,
    child: Child,
    /// Until it has ended.
    watched: Option<Watched>,
    log: PathBuf,
}

impl Server {
    /// Starts the command with its output in the file `log` of its folder, and waits until `ready`.
    pub(crate) fn start(mut command: Command, folder: &Path, ready: impl Fn() -> bool) -> Result<Self> {
        let log = folder.join("log");
        let name = command.get_program().to_string_lossy().into_owned();
        let output = File::options().create(true).append(true).open(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        let watched = Some(Watched::new(child.id())?);
        let mut server = Self { name, child, watched, log };
        let start = Instant::now();
        while !ready() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{} ended with {status}: {}", server.name, server.tail());
            }
            if start.elapsed() > PATIENCE {
                bail!("{} is not ready after {PATIENCE:?}: {}", server.name, server.tail());
            }
            std::thread::sleep(PAUSE);
        }
        Ok(server)
    }

    /// Ends it, and waits until it has.
    pub(crate) fn stop(&mut self, how: Stop) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            self.watched = None;
            return Ok(());
        }
        let signal = match how {
            Stop::Terminate => Signal::SIGTERM,
            Stop::Kill => Signal::SIGKILL,
        };
        self.signal(signal)?;
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            if start.elapsed() > PATIENCE {
                bail!("{} has not ended {PATIENCE:?} after {signal}", self.name);
            }
            std::thread::sleep(PAUSE);
        }
        self.watched = None;
        Ok(())
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    fn tail(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(20).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
