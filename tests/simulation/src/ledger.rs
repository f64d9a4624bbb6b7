//! What the log of one job says, and what must hold of it at every step.
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

use crate::{
    broker::Broker,
    executor::Pid,
    jobs::{STORAGE, folder},
    monitor::Notes,
    plan::CHECKPOINTS_TO_CLEAN_UP,
};

/// All objects of the storage.
pub(crate) type Objects = BTreeMap<String, Bytes>;

/// See the header of this file.
#[derive(Default)]
pub(crate) struct Ledger {
    /// The job's folder.
    folder: String,
    /// Names the log for markers.
    history: String,
    generation: Generation,
    attempt: Attempt,
    last_epoch: Epoch,
    committed: Epoch,
    oldest_seq: u64,
    next_seq: u64,
    /// Whether it was ever said that the job is finished.
    pub(crate) finished: bool,
    /// Files that no checkpoint names: how many checkpoints in a row of one process, without faults, each has outlasted
    /// since it came, or since it was last named.
    unnamed: BTreeMap<String, u32>,
    /// Checkpoints that exist: completed, and not released.
    live: BTreeMap<Epoch, Manifest>,
    /// Snapshots from elsewhere that the job went on from and still counts on, with their files.
    adopted: BTreeMap<Epoch, Vec<String>>,
    /// Every epoch that was ever completed.
    completed: BTreeSet<Epoch>,
}

/// What there was when something happened.
pub(crate) struct Seen<'a> {
    pub(crate) objects: &'a Objects,
    pub(crate) broker: &'a Broker,
    /// Whether faults still strike.
    pub(crate) rough: bool,
}

impl Ledger {
    /// Of the job with this number.
    pub(crate) fn new(job: u32) -> Self {
        Self { folder: folder(job), ..Self::default() }
    }

    /// Paths from the storage's root that a checkpoint needs.
    pub(crate) fn named(&self) -> BTreeSet<String> {
        let own = self.live.values().flat_map(Manifest::shards).map(|s| format!("{}/{}", self.folder, s.path));
        own.chain(self.adopted.values().flatten().cloned()).collect()
    }

    pub(crate) fn was_completed(&self, epoch: Epoch) -> bool {
        self.completed.contains(&epoch)
    }

    /// All files that the job's checkpoints may name, whether or not one does.
    fn files<'a>(&self, objects: &'a Objects) -> impl Iterator<Item = &'a String> + use<'a> {
        let folder = format!("{}/blobs/", self.folder);
        objects.range(folder.clone()..).map(|(path, _)| path).take_while(move |path| path.starts_with(&folder))
    }

    /// Of [`Ledger::files`], how many no checkpoint names.
    pub(crate) fn orphans(&self, objects: &Objects) -> usize {
        let named = self.named();
        self.files(objects).filter(|path| !named.contains(*path)).count()
    }

    /// The newest checkpoint's entry in the log, by its path from the storage's root; if it is newer than any that was adopted.
    pub(crate) fn newest_entry(&self, objects: &Objects) -> Option<String> {
        let newest = self.live.keys().next_back().filter(|own| self.adopted.keys().next_back() < Some(*own))?;
        let folder = format!("{}/log/", self.folder);
        let completes = |bytes: &Bytes| match log::decode(bytes).map(|entry| entry.event) {
            Ok(Event::Completed { manifest }) => manifest.epoch == *newest,
            Ok(_) | Err(_) => false,
        };
        let entries = objects.range(folder.clone()..).take_while(|(path, _)| path.starts_with(&folder));
        entries.filter(|(_, bytes)| completes(bytes)).map(|(path, _)| path.clone()).last()
    }

    /// An object was created that was not there before.
    ///
    /// `relative` is its path in the job's folder.
    pub(crate) fn created(&mut self, relative: &str, bytes: &Bytes, seen: Seen<'_>, notes: &mut Notes) {
        let Some(name) = relative.strip_prefix("log/") else { return };
        let Ok(seq) = name.trim_end_matches(".json").parse::<u64>() else {
            return notes.violation(format!("a file in the log's folder that is no entry: {relative}"));
        };
        if seq < self.next_seq {
            // Its writer slept past a trim. Whether it notices is seen in what it does next.
            return notes.count("stray log entries");
        }
        let entry = match log::decode(bytes) {
            Ok(entry) => entry,
            Err(error) => return notes.violation(format!("log entry {seq} can't be read: {error}")),
        };
        if seq != self.next_seq || entry.seq != seq {
            notes.violation(format!("log entry {} at {seq}, where {} was next", entry.seq, self.next_seq));
        }
        self.next_seq = seq + 1;
        let opens = entry.event == Event::Opened;
        let grows = entry.generation > self.generation && entry.attempt > self.attempt;
        let same = entry.generation == self.generation && entry.attempt == self.attempt;
        if if opens { !grows } else { !same } {
            notes.violation(format!(
                "entry {seq} ({:?}) of generation {} and attempt {} came when generation {} and attempt {} reigned",
                entry.event, entry.generation, entry.attempt, self.generation, self.attempt
            ));
        }
        (self.generation, self.attempt) = (entry.generation, entry.attempt);
        self.history = entry.history;
        let completes = matches!(entry.event, Event::Completed { .. });
        self.event(seq, entry.event, &seen, notes);
        if opens || seen.rough {
            self.unnamed.clear();
        } else if completes {
            self.cleaned_up(seen.objects, notes);
        }
    }

    /// Whether what nobody names is gone in time.
    fn cleaned_up(&mut self, objects: &Objects, notes: &mut Notes) {
        let named = self.named();
        let before = std::mem::take(&mut self.unnamed);
        let unnamed = self.files(objects).filter(|path| !named.contains(*path));
        self.unnamed = unnamed.map(|path| (path.clone(), before.get(path).map_or(0, |n| n + 1))).collect();
        let old = |(_, checkpoints): &(&String, &u32)| **checkpoints >= CHECKPOINTS_TO_CLEAN_UP;
        let left: Vec<&String> = self.unnamed.iter().filter(old).map(|(path, _)| path).collect();
        if !left.is_empty() {
            let left = format!("{left:?}");
            notes.violation(format!("{CHECKPOINTS_TO_CLEAN_UP} checkpoints later nobody has deleted {left}"));
        }
    }

    fn event(&mut self, seq: u64, event: Event, seen: &Seen<'_>, notes: &mut Notes) {
        match event {
            Event::Opened => {}
            Event::Restored { asked: Some(_), .. } => notes.count("starts from a checkpoint by name"),
            Event::Restored { epoch, asked: None } => {
                notes.violation(format!("restored checkpoint {epoch:?} instead of the newest, and nothing is damaged"));
            }
            Event::Completed { manifest } => {
                notes.count("checkpoints completed");
                if manifest.epoch <= self.last_epoch {
                    notes.violation(format!("checkpoint {} completed after {}", manifest.epoch, self.last_epoch));
                }
                self.last_epoch = manifest.epoch;
                for shard in manifest.shards() {
                    if shard.status == ShardStatus::Reused {
                        notes.count("shards named again");
                        if shard.cut_from.is_some() {
                            notes.count("parts of files named");
                        }
                    }
                    match seen.objects.get(&format!("{}/{}", self.folder, shard.path)) {
                        Some(bytes) if hash_hex(bytes) == shard.hash && bytes.len() as u64 == shard.size => {}
                        Some(_) => notes.violation(format!(
                            "checkpoint {} names {}, whose bytes are others",
                            manifest.epoch, shard.path
                        )),
                        None => notes.violation(format!(
                            "checkpoint {} names {}, which is not there",
                            manifest.epoch, shard.path
                        )),
                    }
                }
                self.completed.insert(manifest.epoch);
                self.live.insert(manifest.epoch, *manifest);
            }
            Event::Committed { epoch } => self.committed_entry(epoch, seen.broker, notes),
            Event::Released { epochs, oldest_seq } => {
                notes.count("releases");
                self.live.retain(|e, _| !epochs.contains(e));
                self.adopted.retain(|e, _| !epochs.contains(e));
                if self.live.is_empty() && self.adopted.is_empty() {
                    notes.violation(format!("entry {seq} releases the last checkpoint"));
                }
                if oldest_seq < self.oldest_seq {
                    notes.violation(format!("entry {seq} takes the log's start back to {oldest_seq}"));
                }
                self.oldest_seq = oldest_seq;
            }
            Event::Finished { epoch } => {
                self.finished = true;
                if self.committed < epoch && seen.broker.stages() {
                    notes.violation(format!("finished at checkpoint {epoch}, committed to {}", self.committed));
                }
            }
            Event::Stopped { .. } => notes.count("stops with a last checkpoint"),
            Event::Adopted { from, manifest, .. } => {
                notes.count("snapshots adopted");
                let root = from.strip_prefix(STORAGE).unwrap_or(&from).trim_start_matches('/');
                let files: Vec<String> = manifest.shards().map(|s| format!("{root}/{}", s.path)).collect();
                for missing in files.iter().filter(|f| !seen.objects.contains_key(*f)) {
                    notes.violation(format!("{missing} is adopted, and is not there"));
                }
                if manifest.epoch <= self.last_epoch {
                    notes.violation(format!("savepoint adopted as {} after {}", manifest.epoch, self.last_epoch));
                }
                self.last_epoch = manifest.epoch;
                self.completed.insert(manifest.epoch);
                self.adopted.insert(manifest.epoch, files);
            }
        }
    }

    fn committed_entry(&mut self, epoch: Epoch, broker: &Broker, notes: &mut Notes) {
        if epoch < self.committed || !self.completed.contains(&epoch) {
            notes.violation(format!("committed {epoch} is said after {}", self.committed));
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
            .filter(|(uid, s)| broker.marker_in(&uid.0, s.subtask, &self.history) < Some(s.epoch.unwrap_or(epoch)))
            .map(|(uid, s)| format!("committed {epoch} is said, but {uid}[{}] has not written it", s.subtask))
            .collect();
        missing.into_iter().for_each(|m| notes.violation(m));
    }

    /// A file of the job's folder is about to be deleted.
    pub(crate) fn deleting(&mut self, relative: &str, by: Pid, notes: &mut Notes) {
        if self.unnamed.remove(&format!("{}/{relative}", self.folder)).is_some_and(|checkpoints| checkpoints > 0) {
            notes.count("orphans deleted in time");
        }
        if let Some(name) = relative.strip_prefix("log/") {
            let seq: u64 = name.trim_end_matches(".json").parse().unwrap_or(u64::MAX);
            if seq >= self.oldest_seq {
                notes.violation(format!(
                    "process {by} deletes log entry {seq}, and the oldest kept is {}",
                    self.oldest_seq
                ));
            }
            return;
        }
        let owner = self.live.values().find(|m| m.shards().any(|s| s.path == relative));
        if let Some(epoch) = owner.map(|m| m.epoch) {
            notes.violation(format!("process {by} deletes {relative}, which checkpoint {epoch} needs"));
        }
    }
}
