//! One error for the engine: what failed, why, and what is to be done about it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What an error means for whoever meets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Disposition {
    /// The same call may succeed later (a timeout, a server that restarts).
    Retry,
    /// The call can't succeed as it stands; the job fails with this cause.
    Abort,
    /// Somebody newer has taken over; this process must stop and write nothing more.
    Fenced,
    /// Stored bytes are not what was written.
    Corrupt,
}

/// An error of the engine.
///
/// `Display` prints the whole chain, outermost context first: `restore checkpoint 7: read shard x: checksum mismatch`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Error {
    disposition: Disposition,
    message: String,
}

/// Result with the engine's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with an explicit disposition.
    pub fn new(disposition: Disposition, message: impl Into<String>) -> Self {
        Self { disposition, message: message.into() }
    }

    /// A failure that a later call may not meet.
    pub fn retry(message: impl Into<String>) -> Self {
        Self::new(Disposition::Retry, message)
    }

    /// A failure that ends the job.
    pub fn abort(message: impl Into<String>) -> Self {
        Self::new(Disposition::Abort, message)
    }

    /// Somebody newer has taken over.
    pub fn fenced(message: impl Into<String>) -> Self {
        Self::new(Disposition::Fenced, message)
    }

    /// Stored bytes are damaged.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(Disposition::Corrupt, message)
    }

    /// What is to be done about it.
    #[must_use]
    pub fn disposition(&self) -> Disposition {
        self.disposition
    }

    /// The same error, with `context` (verb and object) before it.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Adds context to the error of a result.
pub trait Context<T> {
    /// Puts `context()` (verb and object: `read manifest`) before the message of an error.
    fn context_with<C: fmt::Display>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context_with<C: fmt::Display>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|e| e.context(context()))
    }
}
