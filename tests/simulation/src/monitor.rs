//! What must hold at every step, kept apart from the code under test: it sees only what reaches the storage and the broker.
//! What each job's log says is in a [`Ledger`].

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use floodmark_snapshot::Epoch;
use floodmark_worker::CheckpointMode;

use crate::{
    broker::Broker,
    executor::Pid,
    jobs::{ELSEWHERE, folder},
    ledger::{Ledger, Objects, Seen},
};

/// Violations that are worth reading.
const VIOLATIONS_MAX: usize = 8;

/// How often what happened.
pub(crate) type Counts = BTreeMap<&'static str, u64>;

/// What is written down of a life.
#[derive(Default)]
pub(crate) struct Notes {
    /// What is wrong, in the order in which it was found.
    pub(crate) violations: Vec<String>,
    pub(crate) counts: Counts,
}

impl Notes {
    pub(crate) fn violation(&mut self, what: String) {
        if self.violations.len() < VIOLATIONS_MAX {
            self.violations.push(what);
        }
    }

    pub(crate) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }
}

/// See the header of this file.
#[derive(Default)]
pub(crate) struct Monitor {
    pub(crate) notes: Notes,
    /// By the numbers of the jobs.
    ledgers: BTreeMap<u32, Ledger>,
    /// Files of savepoints that somebody was told of.
    savepoints: BTreeSet<String>,
}

/// The number of the job whose folder a path is in, and the path in there.
fn place(path: &str) -> Option<(u32, &str)> {
    let (job, relative) = path.strip_prefix("sim/job/")?.split_once('/')?;
    Some((job.parse().ok()?, relative))
}

impl Monitor {
    pub(crate) fn violation(&mut self, what: String) {
        self.notes.violation(what);
    }

    pub(crate) fn count(&mut self, what: &'static str) {
        self.notes.count(what);
    }

    pub(crate) fn ledger(&mut self, job: u32) -> &mut Ledger {
        self.ledgers.entry(job).or_insert_with(|| Ledger::new(job))
    }

    /// Paths from the storage's root that a checkpoint of any job needs.
    pub(crate) fn named(&self) -> BTreeSet<String> {
        self.ledgers.values().flat_map(Ledger::named).collect()
    }

    /// Files that no checkpoint names.
    pub(crate) fn orphans(&self, objects: &Objects) -> usize {
        self.ledgers.values().map(|ledger| ledger.orphans(objects)).sum()
    }

    pub(crate) fn was_completed(&mut self, job: u32, epoch: Epoch) -> bool {
        self.ledger(job).was_completed(epoch)
    }

    /// An object is about to be written by a process of a job.
    pub(crate) fn writing(&mut self, path: &str, (by, job): (Pid, u32), mode: CheckpointMode) {
        self.count("objects written");
        let probe = path.starts_with(".writable-");
        if mode == CheckpointMode::Disabled {
            self.violation(format!("process {by} writes {path}, and takes no snapshots"));
        } else if !probe && place(path).is_none_or(|(of, _)| of != job) {
            self.violation(format!("process {by} of job {job} writes {path}, which is not its own"));
        }
    }

    /// An object was created that was not there before.
    pub(crate) fn created(&mut self, path: &str, bytes: &Bytes, objects: &Objects, broker: &Broker, rough: bool) {
        let Some((job, relative)) = place(path) else { return };
        let ledger = self.ledgers.entry(job).or_insert_with(|| Ledger::new(job));
        ledger.created(relative, bytes, Seen { objects, broker, rough }, &mut self.notes);
    }

    /// Somebody was told that this savepoint of a job is complete and durable.
    pub(crate) fn savepoint(&mut self, job: u32, name: &str, objects: &Objects) {
        self.count("savepoints made");
        let folder = format!("{}/savepoints/{name}/", folder(job));
        let files: Vec<String> = objects.keys().filter(|p| p.starts_with(&folder)).cloned().collect();
        if !files.iter().any(|f| f.ends_with("_manifest.json")) {
            self.violation(format!("savepoint {name} was said to be there, and has no manifest: {files:?}"));
        }
        self.savepoints.extend(files);
    }

    /// Somebody has moved a file of a savepoint.
    pub(crate) fn moved(&mut self, from: &str, to: &str) {
        self.savepoints.remove(from);
        self.savepoints.insert(to.to_owned());
    }

    /// Files of savepoints that are no longer there.
    pub(crate) fn lost_savepoints(&self, objects: &Objects) -> Vec<String> {
        self.savepoints.iter().filter(|f| !objects.contains_key(*f)).cloned().collect()
    }

    /// An object is about to be deleted by a process of a job.
    pub(crate) fn deleting(&mut self, path: &str, (by, job): (Pid, u32)) {
        if self.savepoints.contains(path) || path.starts_with(ELSEWHERE) {
            return self.violation(format!("process {by} deletes {path}, which belongs to a savepoint"));
        }
        let Some((of, relative)) = place(path) else { return };
        if of != job {
            return self.violation(format!("process {by} of job {job} deletes {path}, which is not its own"));
        }
        let ledger = self.ledgers.entry(of).or_insert_with(|| Ledger::new(of));
        ledger.deleting(relative, by, &mut self.notes);
    }

    /// An object that is there already is written again.
    pub(crate) fn overwriting(&mut self, path: &str, same: bool, by: Pid) {
        if !same {
            self.violation(format!("process {by} overwrites {path} with other bytes"));
        }
    }
}
