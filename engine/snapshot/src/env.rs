//! The seams through which the engine meets time, randomness, threads and crashes.
//!
//! Clippy bans the direct calls everywhere else (`clippy.toml`); this file is where production's versions live. A simulator
//! builds an [`Env`] of its own.

#![allow(clippy::disallowed_methods, reason = "this is the seam that the ban points to")]

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    Epoch, Error, Result,
    runtime::{Runtime, SystemRuntime},
};

/// Tells the time.
pub trait Clock: Send + Sync {
    /// Wall clock, milliseconds since the Unix epoch. For humans and names only: no protocol decision rests on it.
    fn wall_ms(&self) -> i64;
    /// Time since some fixed moment; never goes back.
    fn monotonic(&self) -> Duration;
}

/// Makes names that nobody else makes.
pub trait Ids: Send + Sync {
    /// A fresh ULID.
    fn ulid(&self) -> String;
}

/// A step of the protocol at which a test may want the process to die.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// A subtask's state is about to be uploaded.
    BeforeUpload,
    /// Every shard of a subtask is durable; the coordinator has not been told.
    AfterUpload,
    /// All acknowledgements are in; the log entry is about to be written.
    BeforeLogEntry,
    /// The `Completed` entry is durable; no sink knows.
    AfterLogEntry,
    /// A sink is about to open its transaction.
    BeforeTransaction,
    /// A sink's records are written, its transaction is still open.
    InTransaction,
    /// A sink's transaction is committed; the coordinator has not been told.
    AfterTransaction,
    /// The `Committed` entry is durable.
    AfterCommittedEntry,
}

impl Step {
    /// All steps, in the order of the protocol.
    pub const ALL: [Self; 8] = [
        Self::BeforeUpload,
        Self::AfterUpload,
        Self::BeforeLogEntry,
        Self::AfterLogEntry,
        Self::BeforeTransaction,
        Self::InTransaction,
        Self::AfterTransaction,
        Self::AfterCommittedEntry,
    ];

    /// The step's name: `after-log-entry`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::BeforeUpload => "before-upload",
            Self::AfterUpload => "after-upload",
            Self::BeforeLogEntry => "before-log-entry",
            Self::AfterLogEntry => "after-log-entry",
            Self::BeforeTransaction => "before-transaction",
            Self::InTransaction => "in-transaction",
            Self::AfterTransaction => "after-transaction",
            Self::AfterCommittedEntry => "after-committed-entry",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Watches the protocol's steps go by. Production's does nothing; a crash test's ends the process.
pub trait Probe: Send + Sync {
    /// The protocol has reached `step` of `epoch`.
    fn reached(&self, step: Step, epoch: Epoch);
}

struct NoProbe;

impl Probe for NoProbe {
    fn reached(&self, _: Step, _: Epoch) {}
}

/// What the engine takes from its surroundings.
#[derive(Clone)]
pub struct Env {
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Makes unique names.
    pub ids: Arc<dyn Ids>,
    /// Watches the protocol.
    pub probe: Arc<dyn Probe>,
    /// Runs what the process consists of.
    pub runtime: Arc<dyn Runtime>,
}

impl Env {
    /// The real clock and real randomness; threads, and the tokio runtime that the caller is in.
    #[must_use]
    pub fn system() -> Self {
        Self {
            clock: Arc::new(SystemClock { start: Instant::now() }),
            ids: Arc::new(SystemIds(Mutex::new(ulid::Generator::new()))),
            probe: Arc::new(NoProbe),
            runtime: Arc::new(SystemRuntime),
        }
    }

    /// The same surroundings with another probe.
    #[must_use]
    pub fn with_probe(mut self, probe: Arc<dyn Probe>) -> Self {
        self.probe = probe;
        self
    }
}

/// Starts a named thread: the one place where the engine does. What a simulator shall drive goes through
/// [`Runtime::drive`].
///
/// # Errors
/// When the operating system refuses another thread.
pub fn spawn_thread<T: Send + 'static>(
    name: String,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>> {
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(body)
        .map_err(|e| Error::abort(format!("start thread {name}: {e}")))
}

/// Blocks the calling thread. For back-off in shells; protocols take the time as an event.
pub fn sleep(duration: Duration) {
    std::thread::sleep(duration);
}

struct SystemClock {
    start: Instant,
}

impl Clock for SystemClock {
    fn wall_ms(&self) -> i64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}

struct SystemIds(Mutex<ulid::Generator>);

impl Ids for SystemIds {
    fn ulid(&self) -> String {
        let mut generator = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The generator overflows after 2^80 names in one millisecond.
        generator.generate().unwrap_or_else(|_| ulid::Ulid::generate()).to_string()
    }
}
