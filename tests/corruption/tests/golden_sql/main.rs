//! Golden files of a SQL job: what an earlier version's operators wrote must be restored by this one, and lead to the right
//! output.
//!
//! `tests/golden-sql/<set>/` is the manifest of a job, its whole storage when it was cut off, and what it had made visible by
//! then. The job has windowed aggregates, a join of windows, a running aggregate and deduplication; see the README there.

#![allow(clippy::unwrap_used, reason = "a test")]

mod answer;
mod connectors;

use std::{collections::BTreeSet, fs, path::Path, sync::Arc, time::Duration};

use floodmark_corruption::{
    run::{End, Left, Reins, Start, job_id, run_graph},
    set::{self, STORAGE},
    specimen::{SAVEPOINT, entries, savepoint_manifest},
    world::{MapStorage, Objects, SharedTopic, Topic},
};
use floodmark_crds::StreamJob;
use floodmark_dataflow::{
    JobGraph,
    connector::{Guarantee, PlanContext},
};
use floodmark_rocksdb::{RocksDb, Settings};
use floodmark_snapshot::{
    Env, Epoch, JobId, Manifest, ShardKind,
    log::{Event, JobFolder, LogState},
    restore::Reference,
    savepoint::{self, Savepoint},
    sealed,
};
use floodmark_state::{Heap, StateBackend};
use floodmark_worker::{Outcome, RunError};
use serde_json::json;

use crate::{
    answer::Lines,
    connectors::{Topics, connectors, topics_of},
};

const SETS: &str = "golden-sql";
const MANIFEST: &str = "job.yaml";
const TOPICS: &str = "topics.json";
const TABLES: [&str; 4] = ["sums", "matched", "latest", "totals"];
/// What to do if a set can't be read any more.
const ADVICE: &str = "This version's operators can't take up what an earlier one's wrote, so an upgrade would lose jobs' state. \
                      If their state (or its schema, or a uid, or the plan's fingerprint) was not meant to change, undo that; \
                      if it was, read the old one too, and write a new set: see tests/golden-sql/README.md.";
/// The job of a new set.
const JOB: &str = include_str!("job.yaml");
/// Checkpoints that a new set has committed, and that are complete only.
const COMMITTED: usize = 3;
const UNCOMMITTED: usize = 3;

/// What keeps the state of a set's job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    Heap,
    RocksDb,
}

impl Backend {
    /// It, and the folder that it needs as long as it is there.
    fn open(self) -> (Arc<dyn StateBackend>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let backend: Arc<dyn StateBackend> = match self {
            Self::Heap => Arc::new(Heap),
            Self::RocksDb => {
                let settings =
                    Settings { memtable_bytes: 4 << 20, block_cache_bytes: 1 << 20, ..Settings::new(folder.path()) };
                Arc::new(RocksDb::open(&settings, &Env::system()).unwrap())
            }
        };
        (backend, folder)
    }

    /// The kind of the shards that its checkpoints consist of.
    fn kind(self) -> ShardKind {
        match self {
            Self::Heap => ShardKind::Keyed,
            Self::RocksDb => ShardKind::RocksDb,
        }
    }
}

fn plan(manifest: &StreamJob, job: &JobId, topics: &Topics, pauses: u32) -> JobGraph {
    let connectors = connectors(topics, pauses);
    let context = PlanContext { job: job.clone(), guarantee: Guarantee::ExactlyOnce };
    let options = floodmark_sql::PlanOptions { context, connectors: &connectors };
    floodmark_sql::plan(&manifest.spec.sql, &options).unwrap()
}

/// Runs a process of the job.
fn run(
    manifest: &StreamJob,
    start: &Start,
    objects: Objects,
    topics: &Topics,
    watch: impl FnMut(&mut Reins) -> bool,
) -> Left {
    let graph = plan(manifest, &start.job, topics, start.pauses);
    run_graph(start, graph, MapStorage::of(objects), SharedTopic::default(), watch)
}

fn none() -> Topics {
    TABLES.iter().map(|table| ((*table).to_owned(), SharedTopic::default())).collect()
}

/// The same topics, for a run of their own.
fn copied(topics: &Topics) -> Topics {
    topics.iter().map(|(table, topic)| (table.clone(), SharedTopic::of(topic.lock().clone()))).collect()
}

fn lines(topics: &Topics, up_to: Option<Epoch>) -> Lines {
    let of = |topic: &Topic| {
        let wanted = topic.records.iter().filter(|(epoch, _)| up_to.is_none_or(|e| *epoch <= e));
        wanted.map(|(_, line)| line.clone()).collect::<Vec<_>>()
    };
    topics.iter().map(|(table, topic)| (table.clone(), of(&topic.lock()))).collect()
}

/// A set, as it is read.
struct Set {
    manifest: StreamJob,
    objects: Objects,
    topics: Topics,
    at_savepoint: Topics,
}

impl Set {
    fn read(folder: &Path) -> Self {
        let manifest = StreamJob::from_yaml(&fs::read_to_string(folder.join(MANIFEST)).unwrap(), MANIFEST).unwrap();
        let topics: serde_json::Value = serde_json::from_slice(&fs::read(folder.join(TOPICS)).unwrap()).unwrap();
        let (topics, at_savepoint) = (topics_of(&topics["atTheEnd"]), topics_of(&topics["atTheSavepoint"]));
        Self { manifest, objects: set::read(folder).unwrap(), topics, at_savepoint }
    }

    fn log(&self) -> LogState {
        let mut state = LogState::default();
        entries(&self.objects).into_iter().for_each(|e| state.apply(e.seq, Ok(e)));
        state
    }

    fn savepoint(&self) -> Manifest {
        let sealed = &self.objects[&savepoint_manifest()];
        let savepoint: Savepoint = sealed::open("savepoint", "savepoint", sealed).unwrap();
        savepoint.manifest
    }

    /// What kept its state: checkpoints of a back end are taken up by the same.
    fn backend(&self) -> Backend {
        let newest = self.log().retained.last().unwrap().manifest.clone();
        if newest.shards().any(|s| s.kind == ShardKind::RocksDb) { Backend::RocksDb } else { Backend::Heap }
    }

    /// What it ought to hold, and does not.
    fn lacks(&self) -> Vec<String> {
        let (state, backend) = (self.log(), self.backend());
        let newest = &state.retained.last().unwrap().manifest;
        let kinds: BTreeSet<&str> = newest.operators.values().map(|o| o.kind.as_str()).collect();
        let shards = |kind: ShardKind| newest.shards().filter(move |s| s.kind == kind && s.rows > 0).count();
        let keyed = |m: &Manifest, kind: &str, of: ShardKind| {
            let mut operators = m.operators.values().filter(|o| o.kind == kind);
            operators.any(|o| o.shards.iter().any(|s| s.kind == of && s.rows > 0))
        };
        // Files that an earlier checkpoint has brought.
        let path = |path: &str| newest.shards().any(|s| s.path == path);
        let again = state.retained.iter().rev().skip(1).any(|r| r.manifest.shards().any(|s| path(&s.path)));
        let mut lacks = Vec::new();
        let mut want = |there: bool, what: &str| {
            if !there {
                lacks.push(what.to_owned())
            }
        };
        let stateful = ["window aggregate", "window join", "deduplicate", "group aggregate"];
        for kind in stateful {
            let there = keyed(newest, kind, backend.kind());
            want(there, &format!("state of a {kind} in the newest checkpoint; there is: {kinds:?}"));
            want(keyed(&self.savepoint(), kind, ShardKind::Keyed), &format!("state of a {kind} in the savepoint"));
        }
        let layers = newest.shards().any(|s| s.kind == ShardKind::Keyed && s.layer > 0);
        want(layers || backend == Backend::RocksDb, "state in layers");
        want(again, "files that it has in common with an earlier checkpoint");
        want(shards(ShardKind::Channel) > 0, "rows in flight");
        want(shards(ShardKind::Staged) > 0, "staged output");
        want(newest.operators.values().any(|o| o.splits.iter().any(|s| s.watermark.is_some())), "watermarks");
        let uncommitted = state.retained.iter().filter(|r| r.manifest.epoch > state.committed).count();
        want(uncommitted >= UNCOMMITTED, "uncommitted checkpoints");
        for (table, topic) in &self.topics {
            want(!topic.lock().records.is_empty(), &format!("committed output in {table}"));
        }
        lacks
    }
}

fn sets() -> Vec<(String, Set)> {
    let sets = set::all(SETS).unwrap();
    assert!(!sets.is_empty(), "there is no set");
    sets.into_iter().map(|(name, folder)| (name, Set::read(&folder))).collect()
}

fn finished(left: &Left, what: &str) {
    match &left.end {
        End::Ended(Ok(summary)) if summary.outcome == Outcome::Finished && left.warnings.is_empty() => {}
        other => panic!("{what}: {other:?}; {:?}\n{ADVICE}", left.warnings),
    }
}

#[test]
fn checkpoints_of_earlier_versions_are_taken_up_at_any_parallelism() {
    for (name, set) in sets() {
        assert_eq!(set.lacks(), Vec::<String>::new(), "{name}");
        let (backend, _folder) = set.backend().open();
        for parallelism in 1..=4 {
            let topics = copied(&set.topics);
            let start = Start { parallelism, ..Start::again(&backend) };
            let left = run(&set.manifest, &start, set.objects.clone(), &topics, |_| false);
            let what = format!("{name} at parallelism {parallelism}");
            finished(&left, &what);
            let faults = answer::faults(&lines(&topics, None));
            assert!(faults.is_empty(), "{what}: {faults}\n{ADVICE}");
        }
    }
}

#[test]
fn older_checkpoints_of_earlier_versions_are_taken_up_when_they_are_named() {
    for (name, set) in sets() {
        let state = set.log();
        let older: Vec<Epoch> =
            state.retained.iter().map(|r| r.manifest.epoch).filter(|e| *e >= state.committed).collect();
        assert!(older.len() > UNCOMMITTED, "{name}: {older:?}");
        let (backend, _folder) = set.backend().open();
        for epoch in older {
            let topics = copied(&set.topics);
            let start = Start { restore: Reference::Checkpoint(epoch), ..Start::again(&backend) };
            let left = run(&set.manifest, &start, set.objects.clone(), &topics, |_| false);
            let ended = matches!(&left.end, End::Ended(Ok(summary)) if summary.progress.restored_from == Some(epoch));
            assert!(ended, "{name}, {epoch}: {:?}; {:?}\n{ADVICE}", left.end, left.warnings);
            let faults = answer::faults(&lines(&topics, None));
            assert!(faults.is_empty(), "{name}, {epoch}: {faults}\n{ADVICE}");
        }
    }
}

#[test]
fn rows_in_flight_are_refused_in_another_plan_and_nothing_is_written() {
    for (name, mut set) in sets() {
        set.manifest.spec.sql = set.manifest.spec.sql.replace("WHERE n = 1;", "WHERE n = 1 AND amount >= 0;");
        let topics = copied(&set.topics);
        let (backend, _folder) = set.backend().open();
        let left = run(&set.manifest, &Start::again(&backend), set.objects.clone(), &topics, |_| false);
        let End::Ended(Err(RunError::Storage(error))) = &left.end else { panic!("{name}: {:?}", left.end) };
        let error = error.to_string();
        assert!(error.contains("rows that were on their way between operators"), "{name}: {error}");
        assert!(error.contains("stop it with a savepoint"), "{name}: {error}");
        assert_eq!(lines(&topics, None), lines(&set.topics, None), "{name}: refused, and wrote");
    }
}

/// Takes the savepoints up in another job, which has written nothing yet.
fn in_another_job(parallelisms: std::ops::RangeInclusive<u32>, backend: Backend) {
    let (backend, _folder) = backend.open();
    for (name, folder) in set::all(SETS).unwrap() {
        let set = Set::read(&folder);
        let location = folder.join(STORAGE).join("t/job/1/savepoints").join(SAVEPOINT);
        for parallelism in parallelisms.clone() {
            let job = JobId { namespace: "t".into(), name: "other".into(), uid: "2".into() };
            let restore = Reference::Location(location.to_str().unwrap().to_owned());
            let start = Start { job, parallelism, restore, ..Start::again(&backend) };
            let topics = none();
            let left = run(&set.manifest, &start, Objects::new(), &topics, |_| false);
            let what = format!("the savepoint of {name} at parallelism {parallelism}");
            finished(&left, &what);
            // What the first job had made visible when it was taken, and what the other has added.
            let mut all = lines(&set.at_savepoint, Some(set.savepoint().epoch));
            lines(&topics, None).into_iter().for_each(|(table, more)| all.entry(table).or_default().extend(more));
            let faults = answer::faults(&all);
            assert!(faults.is_empty(), "{what}: {faults}\n{ADVICE}");
        }
    }
}

#[test]
fn savepoints_of_earlier_versions_are_taken_up_by_other_jobs() {
    in_another_job(1..=4, Backend::Heap);
}

#[test]
fn savepoints_of_earlier_versions_are_taken_up_by_rocksdb() {
    in_another_job(1..=3, Backend::RocksDb);
}

#[test]
fn a_run_without_a_restore_has_the_same_answer() {
    for (name, set) in sets() {
        let topics = none();
        let (backend, _folder) = set.backend().open();
        let left = run(&set.manifest, &Start::again(&backend), Objects::new(), &topics, |_| false);
        finished(&left, &name);
        assert_eq!(answer::faults(&lines(&topics, None)), "", "{name}");
    }
}

/// Runs the new set's job from nothing, until `gone` says so of its checkpoints, completed and committed.
fn cut_off(
    manifest: &StreamJob,
    backend: Backend,
    interval: Duration,
    topics: &Topics,
    mut gone: impl FnMut(&mut Reins, usize, usize) -> bool,
) -> Objects {
    let (backend, _folder) = backend.open();
    let start = Start { interval, pauses: 40, lag: 4, process: 1, ..Start::again(&backend) };
    let mut seen = 0;
    let left = run(manifest, &start, Objects::new(), topics, |reins| {
        let objects = reins.storage.objects();
        if std::mem::replace(&mut seen, objects.len()) == objects.len() {
            return false;
        }
        let entries = entries(&objects);
        let completed = entries.iter().filter(|e| matches!(e.event, Event::Completed { .. })).count();
        let committed = entries.iter().filter(|e| matches!(e.event, Event::Committed { .. })).count();
        gone(reins, completed, committed)
    });
    assert!(matches!(left.end, End::CutOff), "the job was not cut off: {:?}, {:?}", left.end, left.warnings);
    left.objects
}

/// What the job has left when it is cut off; and a savepoint of another life of it.
fn made(manifest: &StreamJob, backend: Backend, interval: Duration) -> Set {
    let (at_savepoint, mut asked) = (none(), false);
    let saving = cut_off(manifest, backend, interval, &at_savepoint, |reins, completed, _| {
        if completed >= COMMITTED && !asked {
            reins.savepoint(SAVEPOINT);
            asked = true;
        }
        reins.storage.objects().contains_key(&savepoint_manifest())
    });
    let topics = none();
    let mut objects = cut_off(manifest, backend, interval, &topics, |_, completed, committed| {
        let enough = committed >= COMMITTED;
        topics.values().for_each(|topic| topic.lock().out_of_reach = enough);
        enough && completed >= committed + UNCOMMITTED
    });
    topics.values().for_each(|topic| topic.lock().out_of_reach = false);
    let savepoint = savepoint::folder(&JobFolder::of(&job_id()), SAVEPOINT);
    objects.extend(saving.into_iter().filter(|(path, _)| path.starts_with(&savepoint)));
    Set { manifest: manifest.clone(), objects, topics, at_savepoint }
}

fn json_of(topics: &Topics) -> serde_json::Value {
    topics.iter().map(|(table, topic)| (table.clone(), topic.lock().to_json())).collect()
}

#[test]
#[ignore = "writes a new set, named by FLOODMARK_GOLDEN, when the state of operators or the heap has changed on purpose"]
fn write_a_golden_set() {
    write_set(Backend::Heap);
}

#[test]
#[ignore = "writes a new set, named by FLOODMARK_GOLDEN, when what RocksDB's files hold has changed on purpose"]
fn write_a_golden_set_of_rocksdb() {
    write_set(Backend::RocksDb);
}

fn write_set(backend: Backend) {
    let name = std::env::var("FLOODMARK_GOLDEN").expect("FLOODMARK_GOLDEN names the set");
    let folder = set::new(SETS, &name).unwrap();
    let manifest = StreamJob::from_yaml(JOB, MANIFEST).unwrap();

    // Where checkpoints fall decides what is in them.
    let intervals = (20..80).map(|n| Duration::from_micros(1_000 * n));
    let lacking = |interval: Duration| {
        let set = made(&manifest, backend, interval);
        let lacks = set.lacks();
        eprintln!("a checkpoint every {interval:?} lacks {lacks:?}");
        (set, lacks)
    };
    let set = intervals.map(lacking).find_map(|(set, lacks)| lacks.is_empty().then_some(set));
    let set = set.expect("some interval leads to a set that has everything");

    set::write(&folder, &set.objects).unwrap();
    let topics = json!({ "atTheEnd": json_of(&set.topics), "atTheSavepoint": json_of(&set.at_savepoint) });
    fs::write(folder.join(TOPICS), serde_json::to_vec(&topics).unwrap()).unwrap();
    fs::write(folder.join(MANIFEST), JOB).unwrap();
}
