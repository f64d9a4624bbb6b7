//! Who a process is, and who may talk to it: certificates of one job.
//!
//! A certificate carries its job and role as a URI: `floodmark://<namespace>/<name>/<uid>/<role>`. A peer must have one that
//! chains to the job's authority, is in force, names the same job, and a role that fits. Knows nothing of streams.
//!
//! Invariants: there is no connection without a certificate of the same job at both ends; no key is ever printed.

use std::fmt;

use floodmark_snapshot::{Error, JobId, Result};

mod authority;
mod config;
mod identity;

pub use authority::{AUTHORITY_LIFETIME, Authority, CERTIFICATE_LIFETIME, Issued};
pub use config::{client_config, peer_subject, server_config};
pub use identity::{Folder, Identity, IdentitySource};

const SCHEME: &str = "floodmark://";

/// What a process is to its job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Triggers and completes checkpoints.
    Coordinator,
    /// Runs subtasks.
    Worker,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
        })
    }
}

/// Whom a certificate is made out to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    /// The job.
    pub job: JobId,
    /// The process's part in it.
    pub role: Role,
}

impl Subject {
    /// The subject as it stands in a certificate.
    ///
    /// # Errors
    /// `Abort` when a part of the job's identity is empty or can't stand in a URI.
    pub fn to_uri(&self) -> Result<String> {
        for (what, part) in [("namespace", &self.job.namespace), ("name", &self.job.name), ("uid", &self.job.uid)] {
            if !is_plain(part) {
                return Err(Error::abort(format!(
                    "make a certificate: the job's {what} {part:?} may have letters, digits, '.', '_' and '-' only, \
                     and at least one"
                )));
            }
        }
        Ok(format!("{SCHEME}{}/{}", self.job, self.role))
    }

    /// Reads what [`Subject::to_uri`] wrote.
    #[must_use]
    pub fn from_uri(uri: &str) -> Option<Self> {
        let mut parts = uri.strip_prefix(SCHEME)?.split('/');
        let mut part = || parts.next().filter(|p| is_plain(p)).map(str::to_owned);
        let job = JobId { namespace: part()?, name: part()?, uid: part()? };
        let role = match part()?.as_str() {
            "coordinator" => Role::Coordinator,
            "worker" => Role::Worker,
            _ => return None,
        };
        parts.next().is_none().then_some(Self { job, role })
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of job {}", self.role, self.job)
    }
}

fn is_plain(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(name: &str, role: Role) -> Subject {
        Subject { job: JobId { namespace: "default".into(), name: name.into(), uid: "1-a".into() }, role }
    }

    #[test]
    fn a_subject_is_read_back_from_its_uri() {
        for role in [Role::Coordinator, Role::Worker] {
            let uri = subject("hot-items", role).to_uri().unwrap();
            assert_eq!(uri, format!("floodmark://default/hot-items/1-a/{role}"));
            assert_eq!(Subject::from_uri(&uri), Some(subject("hot-items", role)));
        }
    }

    #[test]
    fn no_name_can_be_mistaken_for_another_job_or_role() {
        for name in ["", "a/b", "a b", "a%2fb", "ä", "a/b/worker"] {
            assert!(subject(name, Role::Worker).to_uri().is_err(), "{name}");
        }
        for uri in [
            "floodmark://default/a/1/worker/x",
            "floodmark://default/a/1/Worker",
            "floodmark://default//1/worker",
            "floodmark://default/a/worker",
            "https://default/a/1/worker",
            "floodmark://default/a/1/",
        ] {
            assert_eq!(Subject::from_uri(uri), None, "{uri}");
        }
    }
}
