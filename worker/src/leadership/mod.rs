//! Which of several coordinators runs a job: the seam to whatever elects one.
//!
//! A lease keeps coordinators from fencing each other in turn, no more. It can be lost while it is held, and its holder may
//! learn of that late; renewals can be late as well. What keeps the job safe is its log: whoever opens it fences all others.
//!
//! Invariant: a process that knows that its lease is lost coordinates no more.

mod file;
mod kubernetes;
mod memory;

use std::path::PathBuf;

use async_trait::async_trait;
use floodmark_link::transport::Endpoint;
use floodmark_snapshot::{Error, Result};

pub use self::{
    file::FileLock,
    kubernetes::{Candidate, KubernetesLease, LeaseName, Rhythm},
    memory::Election,
};

/// A way to become the leader.
#[async_trait]
pub trait Leadership: Send + Sync {
    /// Waits until this process leads.
    ///
    /// # Errors
    /// When it never can.
    async fn acquire(&self) -> Result<Box<dyn Lease>>;
}

/// Leadership, for as long as it lasts. Dropped, it goes back as soon as it can without a word.
#[async_trait]
pub trait Lease: Send {
    /// Whether what this process is to run was run by another until now, or by an earlier one in its place, as far as it knows:
    /// if that one has stopped it, it stays so.
    fn waited(&self) -> bool;

    /// Tells whoever looks for the leader where it listens.
    ///
    /// # Errors
    /// When nobody could find it.
    async fn announce(&mut self, endpoint: &Endpoint) -> Result<()>;

    /// Renews the lease, and completes when it is lost: the reason. Can be dropped while it waits, and called again.
    async fn lost(&mut self) -> String;

    /// Tells how the run has ended, if there is anybody to tell, and gives the lease back. True if this process is to stay until
    /// it is told to end, because another would only be started in its place. Can be dropped while it waits.
    async fn end(&mut self, _: &Ending) -> bool {
        false
    }
}

/// How a run has ended in this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was stopped when asked to.
    Stopped,
    /// All inputs have ended, and everything is committed.
    Finished,
    /// It has failed, and would do so again: why.
    Failed(String),
    /// It has failed for a reason that may go away by itself: why.
    Broken(String),
    /// Another goes on with it.
    HandedOver,
}

impl Ending {
    /// Whether it is not to be started again.
    #[must_use]
    pub fn is_for_good(&self) -> bool {
        match self {
            Self::Stopped | Self::Finished | Self::Failed(_) => true,
            Self::Broken(_) | Self::HandedOver => false,
        }
    }
}

/// Endpoints that a worker may be given.
const ENDPOINTS_MAX: usize = 16;

/// Where a worker looks for its coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// At one of these.
    Endpoints(Vec<Endpoint>),
    /// Where the holder of this [`FileLock`] says.
    LockFile(PathBuf),
}

impl From<Endpoint> for Whereabouts {
    fn from(endpoint: Endpoint) -> Self {
        Self::Endpoints(vec![endpoint])
    }
}

/// `host:port`, several of them with commas between, or `@` and the path of a lock file.
impl std::str::FromStr for Whereabouts {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            let form = "host:port, several with commas between, or @ and the path of the coordinators' lock file";
            Error::abort(format!("'{text}' is no place of a coordinator: give {form}"))
        };
        if let Some(path) = text.strip_prefix('@') {
            return if path.is_empty() { Err(wrong()) } else { Ok(Self::LockFile(path.into())) };
        }
        let endpoints: Vec<&str> = text.split(',').map(str::trim).collect();
        if endpoints.len() > ENDPOINTS_MAX || endpoints.iter().any(|e| !e.contains(':')) {
            return Err(wrong());
        }
        Ok(Self::Endpoints(endpoints.into_iter().map(Endpoint::from).collect()))
    }
}

impl Whereabouts {
    /// Where to look for the coordinator at this look, of all from 0: each place has its turn. May read a file; blocking.
    ///
    /// # Errors
    /// `Retry` if nobody has said so yet.
    pub fn endpoint(&self, look: usize) -> Result<Endpoint> {
        match self {
            Self::Endpoints(all) => {
                let place = all.get(look % all.len().max(1)).cloned();
                place.ok_or_else(|| Error::abort("there is no place to look for a coordinator"))
            }
            Self::LockFile(path) => file::leader(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use floodmark_snapshot::Env;

    use super::*;

    #[test]
    fn whereabouts_are_endpoints_or_a_lock_file() {
        let endpoints = |all: &[&str]| Whereabouts::Endpoints(all.iter().map(|e| Endpoint::from(*e)).collect());
        assert_eq!("a:1".parse::<Whereabouts>().unwrap(), endpoints(&["a:1"]));
        assert_eq!("a:1, b:2".parse::<Whereabouts>().unwrap(), endpoints(&["a:1", "b:2"]));
        let in_turn: Vec<_> = (0..3).map(|look| endpoints(&["a:1", "b:2"]).endpoint(look).unwrap().0).collect();
        assert_eq!(in_turn, ["a:1", "b:2", "a:1"]);
        assert_eq!("@/x/lock".parse::<Whereabouts>().unwrap(), Whereabouts::LockFile("/x/lock".into()));
        for wrong in ["", "@", "a", "a:1,", &vec!["a:1"; 17].join(",")] {
            let error = wrong.parse::<Whereabouts>().unwrap_err().to_string();
            assert!(error.contains("is no place of a coordinator"), "{error}");
        }
    }

    /// What every election must do. `depose` takes leadership away from whoever has it.
    pub(super) async fn one_leads_at_a_time(candidates: [Arc<dyn Leadership>; 2], depose: impl AsyncFn()) {
        let [one, other] = candidates;
        let patience = Duration::from_secs(20);
        let soon = async |what: &str, lost: &mut Box<dyn Lease>| {
            let ended = tokio::time::timeout(patience, lost.lost()).await;
            ended.unwrap_or_else(|_| panic!("{what} is not lost"))
        };
        let first = one.acquire().await.unwrap();
        assert!(!first.waited());
        let mut next = other.acquire();
        tokio::time::timeout(Duration::from_millis(200), &mut next).await.err().expect("two lead at a time");
        drop(first);
        let mut second = tokio::time::timeout(patience, next).await.expect("the lease is free").unwrap();
        assert!(second.waited());
        second.announce(&Endpoint::from("b:2")).await.unwrap();
        depose().await;
        let reason = soon("the second's lease", &mut second).await;
        assert!(!reason.is_empty());
        // Its holder lets go of what it has not any more: the next one's is not touched.
        let mut third = tokio::time::timeout(patience, one.acquire()).await.expect("the lease is free").unwrap();
        drop(second);
        tokio::time::timeout(Duration::from_millis(200), other.acquire()).await.err().expect("two lead at a time");
        tokio::time::timeout(Duration::from_millis(200), third.lost()).await.expect_err("the third's lease is lost");
    }

    #[tokio::test]
    async fn one_leads_at_a_time_in_memory() {
        let election = Election::default();
        let candidates = [election.clone(), election.clone()].map(|e| Arc::new(e) as Arc<dyn Leadership>);
        one_leads_at_a_time(candidates, async || election.depose()).await;
    }

    #[tokio::test]
    async fn one_leads_at_a_time_by_a_lock_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let candidate = || Arc::new(FileLock::new(path.clone(), Env::system())) as Arc<dyn Leadership>;
        let depose = async || {
            let whereabouts = Whereabouts::LockFile(path.clone());
            assert_eq!(whereabouts.endpoint(7).unwrap(), Endpoint::from("b:2"));
            // Somebody removes the file.
            std::fs::remove_file(&path).unwrap();
            whereabouts.endpoint(8).unwrap_err();
        };
        one_leads_at_a_time([candidate(), candidate()], depose).await;
    }
}
