//! What must hold at every step, kept apart from the code under test: it sees only what reaches the storage and the broker.
//!
//! An entry of the log *counts* if nothing lay behind it when it was created; the model here is built of those alone, and
//! knows which checkpoints exist, which are committed and which files each needs.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use floodmark_snapshot::{
    Attempt, Epoch, Generation, Manifest, OperatorUid, ShardKind,
    log::{self, Event},
    manifest::{ShardStatus, hash_hex},
};

use crate::{broker::Broker, executor::Pid, jobs::FOLDER, plan::CHECKPOINTS_TO_CLEAN_UP};

/// Violations that are worth reading.
const VIOLATIONS_MAX: usize = 8;

/// How often what happened.
pub(crate) type Counts = BTreeMap<&'static str, u64>;

/// See the header of this file.
#[derive(Default)]
pub(crate) struct Monitor {
    /// What is wrong, in the order in which it was found.
    pub(crate) violations: Vec<String>,
    pub(crate) counts: Counts,
    generation: Generation,
    attempt: Attempt,
    last_epoch: Epoch,
    pub(crate) committed: Epoch,
    oldest_seq: u64,
    next_seq: u64,
    /// Whether it was ever said that the job is finished.
    finished: bool,
    /// Checkpoints in a row of one process, without faults.
    undisturbed: u32,
    /// Files that no checkpoint named when those began.
    unnamed: BTreeSet<String>,
    /// Checkpoints that exist: completed, and not released.
    live: BTreeMap<Epoch, Manifest>,
    /// Snapshots from elsewhere that the job went on from, and still counts on.
    adopted: BTreeSet<Epoch>,
    /// Files of savepoints that somebody was told of.
    savepoints: BTreeSet<String>,
    /// Every epoch that was ever completed.
    completed: BTreeSet<Epoch>,
}

impl Monitor {
    pub(crate) fn violation(&mut self, what: String) {
        if self.violations.len() < VIOLATIONS_MAX {
            self.violations.push(what);
        }
    }

    pub(crate) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Paths from the storage's root that a checkpoint needs.
    pub(crate) fn named(&self) -> BTreeSet<String> {
        self.live.values().flat_map(Manifest::shards).map(|s| format!("{FOLDER}/{}", s.path)).collect()
    }

    pub(crate) fn was_completed(&self, epoch: Epoch) -> bool {
        self.completed.contains(&epoch)
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.finished
    }

    /// An object was created that was not there before.
    pub(crate) fn created(
        &mut self,
        path: &str,
        bytes: &Bytes,
        objects: &BTreeMap<String, Bytes>,
        broker: &Broker,
        rough: bool,
    ) {
        let Some(name) = path.strip_prefix(FOLDER).and_then(|p| p.strip_prefix("/log/")) else { return };
        let Ok(seq) = name.trim_end_matches(".json").parse::<u64>() else {
            return self.violation(format!("a file in the log's folder that is no entry: {path}"));
        };
        if seq < self.next_seq {
            // Its writer slept past a trim. Whether it notices is seen in what it does next.
            return self.count("stray log entries");
        }
        let entry = match log::decode(bytes) {
            Ok(entry) => entry,
            Err(error) => return self.violation(format!("log entry {seq} can't be read: {error}")),
        };
        if seq != self.next_seq || entry.seq != seq {
            self.violation(format!("log entry {} at {seq}, where {} was next", entry.seq, self.next_seq));
        }
        self.next_seq = seq + 1;
        let opens = entry.event == Event::Opened;
        let grows = entry.generation > self.generation && entry.attempt > self.attempt;
        let same = entry.generation == self.generation && entry.attempt == self.attempt;
        if if opens { !grows } else { !same } {
            self.violation(format!(
                "entry {seq} ({:?}) of generation {} and attempt {} came when generation {} and attempt {} reigned",
                entry.event, entry.generation, entry.attempt, self.generation, self.attempt
            ));
        }
        (self.generation, self.attempt) = (entry.generation, entry.attempt);
        let completes = matches!(entry.event, Event::Completed { .. });
        self.event(seq, entry.event, objects, broker);
        if opens || rough {
            self.undisturbed = 0;
        } else if completes {
            self.cleaned_up(objects);
        }
    }

    /// Whether what nobody names is gone in time.
    fn cleaned_up(&mut self, objects: &BTreeMap<String, Bytes>) {
        self.undisturbed += 1;
        let named = self.named();
        let left = |path: &&String| path.contains("/blobs/") && !named.contains(*path);
        if self.undisturbed == 1 {
            self.unnamed = objects.keys().filter(left).cloned().collect();
        }
        if self.undisturbed == CHECKPOINTS_TO_CLEAN_UP {
            self.count("times that all orphans had to be gone");
            let left: Vec<&String> = self.unnamed.iter().filter(|p| objects.contains_key(*p)).filter(left).collect();
            if !left.is_empty() {
                let left = format!("{left:?}");
                self.violation(format!("{CHECKPOINTS_TO_CLEAN_UP} checkpoints later nobody has deleted {left}"));
            }
        }
    }

    fn event(&mut self, seq: u64, event: Event, objects: &BTreeMap<String, Bytes>, broker: &Broker) {
        match event {
            Event::Opened => {}
            Event::Restored { .. } => self.count("restores from an older checkpoint"),
            Event::Completed { manifest } => {
                self.count("checkpoints completed");
                if manifest.epoch <= self.last_epoch {
                    self.violation(format!("checkpoint {} completed after {}", manifest.epoch, self.last_epoch));
                }
                self.last_epoch = manifest.epoch;
                for shard in manifest.shards() {
                    if shard.status == ShardStatus::Reused {
                        self.count("shards named again");
                    }
                    match objects.get(&format!("{FOLDER}/{}", shard.path)) {
                        Some(bytes) if hash_hex(bytes) == shard.hash && bytes.len() as u64 == shard.size => {}
                        Some(_) => self.violation(format!(
                            "checkpoint {} names {}, whose bytes are others",
                            manifest.epoch, shard.path
                        )),
                        None => self.violation(format!(
                            "checkpoint {} names {}, which is not there",
                            manifest.epoch, shard.path
                        )),
                    }
                }
                self.completed.insert(manifest.epoch);
                self.live.insert(manifest.epoch, *manifest);
            }
            Event::Committed { epoch } => self.committed_entry(epoch, broker),
            Event::Released { epochs, oldest_seq } => {
                self.count("releases");
                self.live.retain(|e, _| !epochs.contains(e));
                self.adopted.retain(|e| !epochs.contains(e));
                if self.live.is_empty() && self.adopted.is_empty() {
                    self.violation(format!("entry {seq} releases the last checkpoint"));
                }
                if oldest_seq < self.oldest_seq {
                    self.violation(format!("entry {seq} takes the log's start back to {oldest_seq}"));
                }
                self.oldest_seq = oldest_seq;
            }
            Event::Finished { epoch } => {
                self.finished = true;
                if self.committed < epoch && broker.stages() {
                    self.violation(format!("finished at checkpoint {epoch}, committed to {}", self.committed));
                }
            }
            Event::Stopped { .. } => self.count("stops with a last checkpoint"),
            Event::Adopted { manifest, .. } => {
                self.count("starts from a savepoint");
                if manifest.epoch <= self.last_epoch {
                    self.violation(format!("savepoint adopted as {} after {}", manifest.epoch, self.last_epoch));
                }
                self.last_epoch = manifest.epoch;
                self.completed.insert(manifest.epoch);
                self.adopted.insert(manifest.epoch);
            }
        }
    }

    fn committed_entry(&mut self, epoch: Epoch, broker: &Broker) {
        if epoch < self.committed || !self.completed.contains(&epoch) {
            self.violation(format!("committed {epoch} is said after {}", self.committed));
        }
        self.committed = epoch;
        let Some(manifest) = self.live.get(&epoch) else { return };
        let staged = |uid: &OperatorUid| uid.clone();
        let missing: Vec<String> = manifest
            .operators
            .iter()
            .flat_map(|(uid, o)| o.shards.iter().map(move |s| (staged(uid), s)))
            .filter(|(_, s)| s.kind == ShardKind::Staged && s.rows > 0)
            // Records of an earlier barrier may have been written with an earlier marker.
            .filter(|(uid, s)| broker.marker(&uid.0, s.subtask) < Some(s.epoch.unwrap_or(epoch)))
            .map(|(uid, s)| format!("committed {epoch} is said, but {uid}[{}] has not written it", s.subtask))
            .collect();
        missing.into_iter().for_each(|m| self.violation(m));
    }

    /// Somebody was told that this savepoint is complete and durable.
    pub(crate) fn savepoint(&mut self, name: &str, objects: &BTreeMap<String, Bytes>) {
        self.count("savepoints made");
        let folder = format!("{FOLDER}/savepoints/{name}/");
        let files: Vec<String> = objects.keys().filter(|p| p.starts_with(&folder)).cloned().collect();
        if !files.iter().any(|f| f.ends_with("_manifest.json")) {
            self.violation(format!("savepoint {name} was said to be there, and has no manifest: {files:?}"));
        }
        self.savepoints.extend(files);
    }

    /// Files of savepoints that are no longer there.
    pub(crate) fn lost_savepoints(&self, objects: &BTreeMap<String, Bytes>) -> Vec<String> {
        self.savepoints.iter().filter(|f| !objects.contains_key(*f)).cloned().collect()
    }

    /// An object is about to be deleted.
    pub(crate) fn deleting(&mut self, path: &str, by: Pid) {
        if self.savepoints.contains(path) {
            return self.violation(format!("process {by} deletes {path}, which belongs to a savepoint"));
        }
        let Some(relative) = path.strip_prefix(FOLDER).and_then(|p| p.strip_prefix('/')) else { return };
        if let Some(name) = relative.strip_prefix("log/") {
            let seq: u64 = name.trim_end_matches(".json").parse().unwrap_or(u64::MAX);
            if seq >= self.oldest_seq {
                self.violation(format!(
                    "process {by} deletes log entry {seq}, and the oldest kept is {}",
                    self.oldest_seq
                ));
            }
            return;
        }
        let owner = self.live.values().find(|m| m.shards().any(|s| s.path == relative));
        if let Some(epoch) = owner.map(|m| m.epoch) {
            self.violation(format!("process {by} deletes {relative}, which checkpoint {epoch} needs"));
        }
    }

    /// An object that is there already is written again.
    pub(crate) fn overwriting(&mut self, path: &str, same: bool, by: Pid) {
        if !same {
            self.violation(format!("process {by} overwrites {path} with other bytes"));
        }
    }
}
