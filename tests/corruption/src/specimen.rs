//! The storage that is damaged: what the job had written when it was cut off.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use floodmark_snapshot::{
    Epoch, Manifest, ShardKind,
    log::{self, Event, JobFolder},
    savepoint,
};
use floodmark_state::StateBackend;

use crate::{
    run::{End, Left, Reins, Start, job_id, run},
    world::{Objects, Topic},
};

/// The savepoint's name.
pub const SAVEPOINT: &str = "kept";
/// Checkpoints that are committed.
const COMMITTED: usize = 3;
/// Checkpoints that are complete only.
const UNCOMMITTED: usize = 3;

/// What a log says has been done.
struct Done {
    completed: usize,
    committed: usize,
}

/// Runs a process from nothing until `gone` says that it is; asked whenever there are more
/// files or fewer, or more output.
fn cut_off(start: &Start, mut gone: impl FnMut(&mut Reins, &Objects, Done) -> bool) -> Left {
    let mut seen = (usize::MAX, 0);
    let watch = |reins: &mut Reins| {
        let objects = reins.storage.objects();
        let now = (objects.len(), reins.topic.lock().markers.values().map(|m| m.0).sum());
        if std::mem::replace(&mut seen, now) == now {
            return false;
        }
        let entries = entries(&objects);
        let count = |of: fn(&Event) -> bool| entries.iter().filter(|e| of(&e.event)).count();
        let completed = count(|e| matches!(e, Event::Completed { .. }));
        let committed = count(|e| matches!(e, Event::Committed { .. }));
        gone(reins, &objects, Done { completed, committed })
    };
    let left = run(start, Objects::new(), Topic::default(), watch);
    assert!(matches!(left.end, End::CutOff), "the specimen's job was not cut off: {:?}, {:?}", left.end, left.warnings);
    left
}

/// What a job had written when it was cut off, and what that means.
#[derive(Clone, Debug)]
pub struct Specimen {
    /// The storage.
    pub objects: Objects,
    /// The topic.
    pub topic: Topic,
    /// The log's entries in order.
    pub entries: Vec<log::Entry>,
    /// Its checkpoints that a restore may use, oldest first.
    pub retained: Vec<Manifest>,
    /// What is visible of them.
    pub committed: Epoch,
    /// The savepoint's manifest; shards' paths are relative to the savepoint's folder.
    pub savepoint: Manifest,
    /// The topic when it was complete.
    pub savepoint_topic: Topic,
}

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// An entry of the log, by number.
    Entry(u64),
    /// A shard of checkpoints.
    Shard(String),
    /// A file in `blobs/` that no checkpoint of the log names.
    Orphan,
    /// `_manifest.json` of the savepoint.
    SavepointManifest,
    /// A shard of the savepoint.
    SavepointShard(String),
}

impl Role {
    /// The same for all files of a kind.
    #[must_use]
    pub fn kind(&self) -> String {
        match self {
            Self::Entry(_) => "log entry".to_owned(),
            Self::Shard(kind) => format!("{kind} shard"),
            Self::Orphan => "orphan".to_owned(),
            Self::SavepointManifest => "savepoint manifest".to_owned(),
            Self::SavepointShard(kind) => format!("savepoint's {kind} shard"),
        }
    }
}

impl Specimen {
    /// Runs the job and cuts it off: at its end some checkpoints are committed, and later ones are complete only. The savepoint
    /// is one of the same job, of another of its lives.
    ///
    /// # Panics
    /// When the job does not get there: a defect.
    #[must_use]
    pub fn make(backend: &Arc<dyn StateBackend>) -> Self {
        let start =
            Start { interval: Duration::from_micros(4000), pauses: 16, lag: 5, process: 1, ..Start::again(backend) };
        let mut asked = false;
        let saving = cut_off(&start, |reins, objects, done| {
            if done.completed >= COMMITTED && !asked {
                reins.savepoint(SAVEPOINT);
                asked = true;
            }
            objects.contains_key(&savepoint_manifest())
        });
        let mut left = cut_off(&start, |reins, _, done| {
            reins.topic.lock().out_of_reach = done.committed >= COMMITTED;
            done.completed >= done.committed + UNCOMMITTED && done.committed >= COMMITTED
        });
        left.topic.out_of_reach = false;
        let savepoint = savepoint::folder(&JobFolder::of(&job_id()), SAVEPOINT);
        left.objects.extend(saving.objects.into_iter().filter(|(path, _)| path.starts_with(&savepoint)));
        // What a worker leaves that dies in the middle of an upload.
        let folder = JobFolder::of(&job_id());
        let lost = left.objects.iter().find(|(path, _)| path.contains("/blobs/")).map(|(_, bytes)| bytes.clone());
        left.objects.insert(folder.path("blobs/1/2-01LOST0000000000000000000.state"), lost.unwrap_or_default());
        Self::of(left.objects, left.topic, saving.topic)
    }

    /// The same job at another moment: everything that is complete is visible, and the log does not say so of the last
    /// checkpoint yet.
    ///
    /// # Panics
    /// When the job does not get there: a defect.
    #[must_use]
    pub fn visible_and_not_said(backend: &Arc<dyn StateBackend>) -> Self {
        let start =
            Start { interval: Duration::from_micros(4000), pauses: 16, lag: 5, process: 1, ..Start::again(backend) };
        let left = cut_off(&start, |reins, _, done| {
            let markers: Vec<Epoch> = reins.topic.lock().markers.values().copied().collect();
            let visible =
                markers.len() == start.parallelism as usize && markers.iter().all(|m| m.0 == done.completed as u64);
            done.completed > COMMITTED && visible && done.committed < done.completed
        });
        let made = Self::make(backend);
        let savepoint = savepoint::folder(&JobFolder::of(&job_id()), SAVEPOINT);
        let kept = made.objects.into_iter().filter(|(path, _)| path.starts_with(&savepoint));
        Self::of(left.objects.into_iter().chain(kept).collect(), left.topic, made.savepoint_topic)
    }

    /// What this storage and topic mean.
    ///
    /// # Panics
    /// When they are not intact.
    #[must_use]
    pub fn of(objects: Objects, topic: Topic, savepoint_topic: Topic) -> Self {
        let entries = entries(&objects);
        let mut state = log::LogState::default();
        entries.iter().for_each(|e| state.apply(e.seq, Ok(e.clone())));
        let sealed = &objects[&savepoint_manifest()];
        let savepoint: savepoint::Savepoint =
            floodmark_snapshot::sealed::open("savepoint", "savepoint", sealed).expect("an intact savepoint");
        let retained = state.retained.into_iter().map(|r| r.manifest).collect();
        Self {
            objects,
            topic,
            entries,
            retained,
            committed: state.committed,
            savepoint: savepoint.manifest,
            savepoint_topic,
        }
    }

    /// What each file is.
    ///
    /// # Panics
    /// When a file is none of what a job writes.
    #[must_use]
    pub fn roles(&self) -> BTreeMap<String, Role> {
        let folder = JobFolder::of(&job_id());
        let kinds = |manifests: &[&Manifest]| -> BTreeMap<String, String> {
            let shards = manifests.iter().flat_map(|m| m.shards());
            shards.map(|s| (s.path.clone(), format!("{:?}", s.kind))).collect()
        };
        let shards = kinds(&self.retained.iter().collect::<Vec<_>>());
        let copies = kinds(&[&self.savepoint]);
        let role = |path: &str| {
            let inside = folder.relative(path)?;
            if let Some(name) = inside.strip_prefix("log/") {
                return name.strip_suffix(".json")?.parse().ok().map(Role::Entry);
            }
            if let Some(name) = inside.strip_prefix(&format!("savepoints/{SAVEPOINT}/")) {
                if name == savepoint::MANIFEST_FILE {
                    return Some(Role::SavepointManifest);
                }
                return copies.get(name).cloned().map(Role::SavepointShard);
            }
            inside.starts_with("blobs/").then(|| shards.get(inside).cloned().map_or(Role::Orphan, Role::Shard))
        };
        let named = |path: &String| (path.clone(), role(path).unwrap_or_else(|| panic!("what is {path}?")));
        self.objects.keys().map(named).collect()
    }

    /// Whether the specimen holds what it is there for. Answers what is missing.
    #[must_use]
    pub fn lacks(&self) -> Vec<&'static str> {
        let newest: Vec<_> = self.retained.last().into_iter().flat_map(|m| m.shards()).collect();
        let has = |kind: ShardKind| newest.iter().any(|s| s.kind == kind);
        let uncommitted = self.retained.iter().filter(|m| m.epoch > self.committed).count();
        let keyed = has(ShardKind::RocksDb) || newest.iter().any(|s| s.kind == ShardKind::Keyed && s.layer > 0);
        let wanted = [
            (keyed, "keyed state in two layers"),
            (has(ShardKind::Union), "operator state"),
            (has(ShardKind::Channel), "rows in flight"),
            (has(ShardKind::Staged), "staged output"),
            (self.retained.len() >= 4, "retained checkpoints"),
            (uncommitted >= 2, "uncommitted checkpoints"),
            (self.retained.iter().any(|m| m.epoch <= self.committed), "a committed checkpoint"),
            (!self.topic.records.is_empty(), "committed output"),
            (self.retained.iter().all(|m| m.operators.values().any(|o| !o.splits.is_empty())), "positions"),
        ];
        wanted.into_iter().filter(|(there, _)| !there).map(|(_, what)| what).collect()
    }
}

/// The path of the savepoint's manifest.
#[must_use]
pub fn savepoint_manifest() -> String {
    format!("{}/{}", savepoint::folder(&JobFolder::of(&job_id()), SAVEPOINT), savepoint::MANIFEST_FILE)
}

/// The log's entries in order.
///
/// # Panics
/// When one is damaged.
#[must_use]
pub fn entries(objects: &Objects) -> Vec<log::Entry> {
    let folder = JobFolder::of(&job_id()).path("log/");
    let files = objects.range(folder.clone()..).take_while(|(path, _)| path.starts_with(&folder));
    files.map(|(_, bytes)| log::decode(bytes).expect("an intact log")).collect()
}
