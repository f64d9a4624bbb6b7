//! A job in several processes: `floodmark coordinator` and `floodmark worker`, each where it is told to be.
//!
//! Whoever starts them ends and restarts them. Each has a log of its own for each start.

use std::{net::Ipv4Addr, path::PathBuf};

use anyhow::{Result, anyhow};
use floodmark_link::tls::{Authority, CERTIFICATE_LIFETIME, Role, Subject};
use floodmark_snapshot::{Env, JobId};

use crate::job::{Job, Run};

/// Where the coordinator listens, of any host.
const COORDINATOR_PORT: u16 = 7_400;
/// Where workers listen.
const WORKER_PORT: u16 = 7_401;

/// Where a process runs.
#[derive(Clone, Debug)]
pub struct Site {
    /// The words of a program that starts it there; empty for right here.
    pub prefix: Vec<String>,
    /// The address by which the others reach it.
    pub host: Ipv4Addr,
    /// The port at which it listens.
    pub port: u16,
}

impl Site {
    /// For a coordinator in a place with an address of its own.
    #[must_use]
    pub fn coordinator(prefix: Vec<String>, host: Ipv4Addr) -> Self {
        Self { prefix, host, port: COORDINATOR_PORT }
    }

    /// For a worker likewise.
    #[must_use]
    pub fn worker(prefix: Vec<String>, host: Ipv4Addr) -> Self {
        Self { prefix, host, port: WORKER_PORT }
    }

    /// Right here, at any port that is free.
    #[must_use]
    pub fn here() -> Self {
        Self { prefix: Vec::new(), host: Ipv4Addr::LOCALHOST, port: 0 }
    }

    /// `host:port`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// The identities of a job's processes.
#[derive(Clone, Debug)]
pub struct Identities {
    folder: PathBuf,
}

impl Identities {
    /// Makes certificates for the job's coordinators and workers, in folders of `folder`.
    ///
    /// # Errors
    /// When they can't be made or written.
    pub fn issue(job: &Job, folder: PathBuf) -> Result<Self> {
        let authority = Authority::new(Env::system().clock).map_err(|e| anyhow!("{e}"))?;
        for role in [Role::Coordinator, Role::Worker] {
            let id = JobId { namespace: "default".into(), name: job.name.clone(), uid: "local".into() };
            let issued = authority.issue(&Subject { job: id, role }, CERTIFICATE_LIFETIME);
            let issued = issued.map_err(|e| anyhow!("{e}"))?;
            issued.write(&folder.join(role.to_string())).map_err(|e| anyhow!("{e}"))?;
        }
        Ok(Self { folder })
    }

    fn of(&self, role: Role) -> String {
        self.folder.join(role.to_string()).display().to_string()
    }

    /// Starts a coordinator of the job. `name` is for its log.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start_coordinator(&self, job: &Job, name: &str, at: &Site) -> Result<Run> {
        self.start_coordinator_with(job, name, at, &[])
    }

    /// As [`Identities::start_coordinator`], with further words.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start_coordinator_with(&self, job: &Job, name: &str, at: &Site, more: &[&str]) -> Result<Run> {
        let (listen, identity) = (at.endpoint(), self.of(Role::Coordinator));
        let words = [
            "coordinator",
            "JOB",
            "--listen",
            &listen,
            "--identity",
            &identity,
            "--storage",
            "STORAGE",
            "--output",
            "json",
        ];
        job.start_under(&at.prefix, name, &[&words[..], more].concat())
    }

    /// Starts a worker with so many slots for the coordinator at `of`. `name` is for its log.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start_worker(&self, job: &Job, name: &str, at: &Site, of: &Site, slots: u32) -> Result<Run> {
        self.start_worker_of(job, name, at, &of.endpoint(), slots)
    }

    /// As [`Identities::start_worker`], for a coordinator wherever the value of `--coordinator` says.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start_worker_of(&self, job: &Job, name: &str, at: &Site, of: &str, slots: u32) -> Result<Run> {
        let (listen, identity, slots) = (at.endpoint(), self.of(Role::Worker), slots.to_string());
        let places = ["--coordinator", of, "--listen", &listen];
        let more = ["--identity", &identity, "--slots", &slots, "--storage", "STORAGE"];
        job.start_under(&at.prefix, name, &[&["worker", "JOB"], &places[..], &more].concat())
    }
}
