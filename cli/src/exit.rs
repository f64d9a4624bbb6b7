//! How the process may end. Callers and tests tell failures apart by these codes, so they are stable.

use std::{fmt::Display, process::ExitCode};

/// Why the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done, or stopped when asked to.
    Done,
    /// The job failed.
    JobFailed,
    /// Usage, manifest, SQL, or a table that can't be used as declared.
    BadInput,
    /// A newer process has taken the job over.
    Fenced,
    /// The storage, or what it holds, doesn't allow a start.
    Storage,
    /// A second Ctrl-C.
    Interrupted,
}

impl Exit {
    /// The process's exit code.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::JobFailed => 1,
            Self::BadInput => 2,
            Self::Fenced => 3,
            Self::Storage => 4,
            Self::Interrupted => 130,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// A failure on its way to `main`, which prints it.
#[derive(Debug)]
pub(crate) struct Failure {
    /// How the process ends for it.
    pub(crate) exit: Exit,
    /// What failed, where, and what to do.
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Display) -> Self {
        Self { exit, message: message.to_string() }
    }

    /// Bad input: the user's to mend.
    pub(crate) fn input(message: impl Display) -> Self {
        Self::new(Exit::BadInput, message)
    }
}
