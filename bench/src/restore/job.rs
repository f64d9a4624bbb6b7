//! The job whose state is restored: a GROUP BY over numbered keys, built up by one run and stopped.
//!
//! Invariant: what that run has written is never changed. Each later start gets a storage of its own, whose files are the same ones
//! by further names (hard links): checkpoint files are written once, and deleted by name.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use floodmark_testkit::scratch;
use floodmark_tests::job::Job;
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::PARALLELISM;
use crate::backend::Backend;

const NAME: &str = "totals";
const TABLE: &str = "numbers";
const SAVEPOINT: &str = "whole";
/// A run that has not built its state up by then hangs.
const PATIENCE: Duration = Duration::from_secs(900);

/// A job with state for every key, which does not run.
pub(super) struct Built {
    folder: TempDir,
    job: Job,
    pub(super) keys: u64,
    pub(super) backend: Backend,
    pub(super) checkpoint: Snapshot,
    pub(super) savepoint: Snapshot,
}

/// A snapshot's outside.
pub(super) struct Snapshot {
    pub(super) location: String,
    /// Files of keyed state.
    pub(super) files: usize,
    /// Bytes of those.
    pub(super) bytes: u64,
    /// The most layers that one subtask's state consists of.
    pub(super) layers: u64,
}

/// A job that is to be started once, in a folder of its own.
pub(super) struct Copy {
    pub(super) folder: TempDir,
    pub(super) job: Job,
}

impl Built {
    /// Runs a job until it has every key, and stops it with a savepoint and a checkpoint.
    pub(super) fn new(keys: u64, backend: Backend, interval: &str) -> Result<Self> {
        let folder = scratch::folder("restore-")?;
        let mut job = job(folder.path(), keys, backend, "blackhole", None);
        interval.clone_into(&mut job.interval);
        let mut run = job.start()?;
        run.until("it had every key", PATIENCE, || {
            let positions = job.log()?.positions(TABLE);
            let next = |position: &Value| position["next"].as_u64();
            Ok(!positions.is_empty() && positions.values().all(|p| next(p).is_some_and(|n| n >= keys)))
        })?;
        let words = ["savepoint", "JOB", SAVEPOINT, "--storage", "STORAGE"];
        let location = job.command(&words)?.said()?.to_owned();
        run.signal(Signal::SIGINT)?;
        run.wait(PATIENCE)?.ok("stopped")?;
        let log = job.log()?;
        let (path, manifest) = log.completed().next_back().context("it has no checkpoint")?;
        let checkpoint = Snapshot::new(path.display().to_string(), manifest, keys)?;
        let path = Path::new(&location).join("_manifest.json");
        let file = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let file: Value = serde_json::from_str(&file).with_context(|| format!("read {}", path.display()))?;
        let savepoint = Snapshot::new(location, &file["savepoint"]["manifest"], keys)?;
        Ok(Self { folder, job, keys, backend, checkpoint, savepoint })
    }

    /// The same job with all its checkpoints.
    pub(super) fn again(&self, parallelism: u32, rate: u64) -> Result<Copy> {
        let copy = self.anew(parallelism, rate)?;
        for part in ["log", "blobs"] {
            let to = copy.job.checkpoint_folder().join(part);
            link(&self.job.checkpoint_folder().join(part), &to)?;
        }
        Ok(copy)
    }

    /// The same job without a past.
    pub(super) fn anew(&self, parallelism: u32, rate: u64) -> Result<Copy> {
        let folder = tempfile::Builder::new().prefix("start-").tempdir_in(self.folder.path())?;
        let mut job = job(folder.path(), self.keys, self.backend, "print", Some(rate));
        job.parallelism = parallelism;
        Ok(Copy { folder, job })
    }
}

impl Snapshot {
    /// Looks at a manifest, and checks that it holds what it should: a figure of less state would be worth nothing.
    fn new(location: String, manifest: &Value, keys: u64) -> Result<Self> {
        let operators = manifest["operators"].as_object().with_context(|| format!("{location} has no operators"))?;
        let shards = operators.values().filter_map(|o| o["shards"].as_array()).flatten();
        let shards: Vec<&Value> = shards.filter(|s| !s["keyGroups"].is_null()).collect();
        let number = |shard: &Value, field: &str| shard[field].as_u64().unwrap_or(0);
        // Of its own files RocksDB does not always know how many rows they have; there the first row must do as a proof.
        if shards.iter().all(|s| s["kind"] == "keyed") {
            let rows: u64 = shards.iter().map(|s| number(s, "rows")).sum();
            ensure!(rows >= keys, "{location} has {rows} rows, too few for {keys} keys");
        }
        let layers = |subtask: u64| {
            let own = shards.iter().filter(|s| number(s, "subtask") == subtask);
            own.map(|s| number(s, "layer")).collect::<BTreeSet<_>>().len() as u64
        };
        Ok(Self {
            location,
            files: shards.len(),
            bytes: shards.iter().map(|s| number(s, "size")).sum(),
            layers: (0..u64::from(PARALLELISM)).map(layers).max().unwrap_or(0),
        })
    }
}

fn job(folder: &Path, keys: u64, backend: Backend, sink: &str, rate: Option<u64>) -> Job {
    let rate = rate.map_or_else(String::new, |rate| format!(", 'rate' = '{rate}'"));
    let sql = format!(
        "CREATE TABLE {TABLE} (n BIGINT, price BIGINT) WITH ('connector' = 'datagen', 'fields.n.kind' = 'sequence'{rate});
CREATE TABLE totals (item BIGINT, rows_so_far BIGINT, total BIGINT, least BIGINT, most BIGINT, mean BIGINT,
  PRIMARY KEY (item) NOT ENFORCED) WITH ('connector' = '{sink}');
INSERT INTO totals SELECT MOD(n, {keys}), count(*), sum(price), min(price), max(price), avg(price)
FROM {TABLE} GROUP BY MOD(n, {keys});"
    );
    let mut job = Job::new(folder, NAME, sql);
    job.parallelism = PARALLELISM;
    job.spec = format!("  state:\n    backend: {backend}\n");
    // Databases and sockets of its own, in the folder that goes in the end.
    for variable in ["TMPDIR", "XDG_RUNTIME_DIR"] {
        job.env.insert(variable.to_owned(), folder.display().to_string());
    }
    job
}

/// Gives all files of a folder further names in another one.
fn link(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("list {}", from.display()))? {
        let path = entry?.path();
        let name: PathBuf = path.file_name().map(PathBuf::from).unwrap_or_default();
        if path.is_dir() {
            link(&path, &to.join(name))?;
        } else {
            fs::hard_link(&path, to.join(name)).with_context(|| format!("link {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_snapshot_with_too_few_rows_is_refused() {
        let shard = |subtask: u32, layer: u32, rows: u64| json!({ "kind": "keyed", "keyGroups": { "first": 0, "last": 9 }, "subtask": subtask, "layer": layer, "rows": rows, "size": 100 });
        let shards = [shard(0, 0, 50), shard(1, 0, 40), shard(1, 1, 10), json!({ "path": "positions", "rows": 1_000 })];
        let manifest = json!({ "operators": { "totals/group-aggregate-1": { "shards": shards } } });
        let snapshot = Snapshot::new("there".to_owned(), &manifest, 100).unwrap();
        assert_eq!((snapshot.files, snapshot.bytes, snapshot.layers), (3, 300, 2));
        let error = Snapshot::new("there".to_owned(), &manifest, 101).err().unwrap().to_string();
        assert_eq!(error, "there has 100 rows, too few for 101 keys");
        let none = json!({ "operators": { "totals/group-aggregate-1": { "shards": [] } } });
        assert!(Snapshot::new("there".to_owned(), &none, 1).is_err());
    }

    #[test]
    fn a_copy_has_the_same_files_and_may_delete_them() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("1")).unwrap();
        fs::write(from.join("1/a.state"), "state").unwrap();
        link(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("1/a.state")).unwrap(), "state");
        fs::remove_file(to.join("1/a.state")).unwrap();
        assert_eq!(fs::read_to_string(from.join("1/a.state")).unwrap(), "state");
    }
}
