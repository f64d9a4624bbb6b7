//! The job whose workers die: its processes, servers, input and checkpoint log.
//!
//! Event number `n` goes to partition `n % PARTITIONS`, at offset `n / PARTITIONS`: so the positions in a checkpoint tell which events
//! it holds. Invariant: nothing outlives the owner.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use floodmark_testkit::{Kafka, S3, scratch};
use floodmark_tests::{
    cluster::{Identities, Site},
    events::Draw,
    feeder::Writer,
    job::{CheckpointLog, Job, Run},
};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::{Args, Storage, WORKERS, watch::Watch};
use crate::backend::Backend;

const NAME: &str = "totals";
const EVENTS: &str = "events";
/// Of the topic of events, and of that of totals.
const PARTITIONS: u64 = 3;
/// Bytes of checkpoint files for each key, about.
const KEY_BYTES: u64 = 64;
/// State this much smaller than asked for is refused, per cent.
const SMALLER_MAX: u64 = 25;
/// How long anything but a recovery may take.
const PATIENCE: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(50);
/// Events are written in bursts of this many a second.
const BURSTS: u64 = 100;
/// What a coordinator says of a worker that has come, and of where the job runs.
const COME: &str = " has come: ";
const PLACED: &str = "slices run on ";

/// See the header of this file.
pub(super) struct World {
    /// From when on the state has been built up: what a reader has not read yet by then would come late.
    watch: Option<Watch>,
    feeder: Feeder,
    workers: BTreeMap<u32, Run>,
    coordinator: Run,
    identities: Identities,
    listen: Site,
    job: Job,
    keys: u64,
    state_mb: u64,
    started: u32,
    killed: usize,
    store: Option<S3>,
    kafka: Kafka,
    // Goes last.
    _folder: TempDir,
}

impl World {
    /// Runs a job until it has a checkpoint with all its state.
    pub(super) fn build(args: &Args, backend: Backend) -> Result<Self> {
        let kafka = Kafka::start().context("start a Kafka broker")?;
        for topic in [EVENTS, NAME] {
            kafka.create_topic(topic, PARTITIONS as usize, &[])?;
        }
        let store = (args.storage == Storage::S3).then(S3::start).transpose().context("start an S3 server")?;
        let folder = scratch::folder("recovery-")?;
        let mut job = Job::new(folder.path(), NAME, sql(&kafka.bootstrap()));
        (job.parallelism, job.interval) = (WORKERS, args.interval.clone());
        job.spec = format!("  state:\n    backend: {backend}\n");
        for variable in ["TMPDIR", "XDG_RUNTIME_DIR"] {
            job.env.insert(variable.to_owned(), folder.path().display().to_string());
        }
        if let Some(store) = &store {
            job.storage = format!("s3://{}/jobs", store.bucket());
            job.env.extend(store.env().into_iter().map(|(name, value)| (name.to_owned(), value)));
        }
        let keys = args.state_mb * 1_000_000 / KEY_BYTES;
        let writer = Writer::new(&kafka.bootstrap(), EVENTS)?;
        // Every key once.
        (0..keys).try_for_each(|n| write(&writer, n, n))?;
        writer.flush()?;

        let identities = Identities::issue(&job, folder.path().join("identities"))?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let listen = Site { prefix: Vec::new(), host: Ipv4Addr::LOCALHOST, port };
        let coordinator = identities.start_coordinator(&job, "coordinator", &listen)?;
        let mut world = Self {
            watch: None,
            feeder: Feeder::none(),
            workers: BTreeMap::new(),
            coordinator,
            identities,
            listen,
            job,
            keys,
            state_mb: args.state_mb,
            started: 0,
            killed: 0,
            store,
            kafka,
            _folder: folder,
        };
        for _ in 0..WORKERS + u32::from(args.spare) {
            world.replace()?;
        }
        world.until("it had every key", |world| {
            let newest = world.checkpoints()?.newest();
            let all = |c: &Checkpoint| (0..world.keys).rev().take(PARTITIONS as usize).all(|n| c.holds(n));
            Ok(newest.is_some_and(|c| all(&c) && world.committed() >= c.epoch))
        })?;
        let bytes = world.state_bytes()?;
        ensure!(
            bytes * 100 >= world.state_mb * 1_000_000 * (100 - SMALLER_MAX),
            "its checkpoint has {bytes} bytes of state, and {} MB were asked for",
            world.state_mb
        );
        world.watch = Some(Watch::start(&world.kafka.bootstrap(), NAME, PARTITIONS as i32, "newest")?);
        world.feeder = Feeder::start(writer, world.keys, args.rate);
        Ok(world)
    }

    fn until(&mut self, what: &str, mut holds: impl FnMut(&mut Self) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        // A log may be read in the middle of a change.
        while !holds(self).unwrap_or(false) {
            ensure!(self.coordinator.is_running()?, "the coordinator ended before {what}; {}", self.logs());
            ensure!(start.elapsed() < PATIENCE, "not {what} within {PATIENCE:?}; {}", self.logs());
            sleep(POLL);
        }
        Ok(())
    }

    /// Starts another worker, and waits until the coordinator has it.
    pub(super) fn replace(&mut self) -> Result<()> {
        self.started += 1;
        let at = Site { prefix: Vec::new(), host: Ipv4Addr::LOCALHOST, port: 0 };
        let name = format!("worker-{}", self.started);
        let mut run = Some(self.identities.start_worker(&self.job, &name, &at, &self.listen, 1)?);
        self.until("a worker came", |world| {
            let log = world.coordinator.log();
            let mut come = log.lines().filter_map(|line| worker_id(line.split_once(COME)?.0));
            if let (Some(id), true) = (come.nth(world.started as usize - 1), run.is_some()) {
                world.workers.extend(run.take().map(|run| (id, run)));
            }
            Ok(run.is_none())
        })
    }

    /// Kills a worker that has a part of the job: each time that of another part.
    pub(super) fn kill(&mut self) -> Result<()> {
        let log = self.coordinator.log();
        let placed = log.lines().rev().find_map(|line| Some(line.split_once(PLACED)?.1));
        let placed: Vec<u32> = placed.into_iter().flat_map(|p| p.split(", ")).filter_map(worker_id).collect();
        ensure!(!placed.is_empty(), "the coordinator does not say where the job runs; {}", self.logs());
        let victim = placed[self.killed % placed.len()];
        self.killed += 1;
        let run = self.workers.remove(&victim).with_context(|| format!("worker {victim} was not started here"))?;
        run.signal(Signal::SIGKILL)
    }

    /// Waits until the job has completed so many checkpoints more.
    pub(super) fn calm(&mut self, checkpoints: usize) -> Result<()> {
        let epoch = |world: &Self| Ok::<_, anyhow::Error>(world.checkpoints()?.newest().map_or(0, |c| c.epoch));
        let mut seen = epoch(self).unwrap_or(0);
        for _ in 0..checkpoints {
            self.until("a checkpoint was complete", |world| Ok(epoch(world)? > seen))?;
            seen = epoch(self).unwrap_or(seen);
        }
        Ok(())
    }

    /// The newest checkpoint whose output is visible, as far as the log says.
    fn committed(&self) -> u64 {
        CheckpointLog::read(&self.log_folder()).map_or(0, |log| log.last_committed())
    }

    /// Bytes of state files that the newest checkpoint names.
    pub(super) fn state_bytes(&self) -> Result<u64> {
        Ok(self.checkpoints()?.newest().map_or(0, |c| c.state_bytes))
    }

    /// When output was first seen, after `start`, of an event that a checkpoint does not hold.
    pub(super) fn first_beyond(&self, checkpoint: &Checkpoint, start: Instant) -> Option<Instant> {
        self.watch.as_ref()?.first_since(start, |n| !checkpoint.holds(n))
    }

    /// What the log has now.
    pub(super) fn checkpoints(&self) -> Result<Checkpoints> {
        Ok(Checkpoints::of(&CheckpointLog::read(&self.log_folder())?))
    }

    fn log_folder(&self) -> PathBuf {
        match &self.store {
            Some(store) => store.objects().join("jobs/default").join(NAME).join("local/log"),
            None => self.job.checkpoint_folder().join("log"),
        }
    }

    /// What the coordinator has said of late.
    pub(super) fn logs(&self) -> String {
        let log = self.coordinator.log();
        let lines: Vec<&str> = log.lines().rev().take(40).collect();
        format!("the coordinator's log:\n{}", lines.into_iter().rev().collect::<Vec<_>>().join("\n"))
    }

    /// Ends everything; an input that could not be written spoils what was measured.
    pub(super) fn end(mut self) -> Result<()> {
        self.feeder.finish()
    }
}

/// The number in `worker 7` at the end of some text.
fn worker_id(text: &str) -> Option<u32> {
    text.rsplit_once("worker ")?.1.trim().parse().ok()
}

fn sql(bootstrap: &str) -> String {
    let options = |connector: &str, topic: &str, more: &str| {
        format!(
            "'connector' = '{connector}', 'topic' = '{topic}', 'properties.bootstrap.servers' = '{bootstrap}', {more}"
        )
    };
    format!(
        "CREATE TABLE {EVENTS} (n BIGINT, k BIGINT) WITH ({});
CREATE TABLE {NAME} (k BIGINT, rows_so_far BIGINT, newest BIGINT, oldest BIGINT, total BIGINT, mean BIGINT,
  PRIMARY KEY (k) NOT ENFORCED) WITH ({});
INSERT INTO {NAME} SELECT k, count(*), max(n), min(n), sum(n), avg(n) FROM {EVENTS} GROUP BY k;",
        options("kafka", EVENTS, "'format' = 'json', 'scan.startup.mode' = 'earliest-offset'"),
        options("upsert-kafka", NAME, "'key.format' = 'json', 'value.format' = 'json'"),
    )
}

fn write(writer: &Writer, n: u64, key: u64) -> Result<()> {
    writer.write((n % PARTITIONS) as i32, format!("{{\"n\":{n},\"k\":{key}}}").as_bytes())
}

/// Writes events of random keys at a steady rate.
struct Feeder {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Feeder {
    fn none() -> Self {
        Self { stop: Arc::default(), thread: None }
    }

    /// Goes on with event number `keys`.
    fn start(writer: Writer, keys: u64, rate: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = stop.clone();
            move || {
                let (mut draw, mut n, start) = (Draw::new(11), keys, Instant::now());
                while !stop.load(Ordering::Relaxed) {
                    let due = keys + (start.elapsed().as_secs_f64() * rate as f64) as u64;
                    while n < due {
                        write(&writer, n, draw.below(keys))?;
                        n += 1;
                    }
                    sleep(Duration::from_millis(1_000 / BURSTS));
                }
                writer.flush()
            }
        });
        Self { stop, thread: Some(thread) }
    }

    fn finish(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the feeder panicked"))?.context("write events"),
            None => Ok(()),
        }
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        // What went wrong with it is told only by who asks for it.
        let _ = self.finish();
    }
}

/// A completed checkpoint, as the log has it.
#[derive(Clone, Debug)]
pub(super) struct Checkpoint {
    pub(super) epoch: u64,
    pub(super) attempt: u64,
    pub(super) triggered_at_ms: i64,
    pub(super) written_at_ms: i64,
    state_bytes: u64,
    /// The next offset of each partition.
    positions: BTreeMap<u64, u64>,
}

impl Checkpoint {
    fn of(entry: &Value) -> Option<Self> {
        let manifest = entry["event"].get("manifest")?;
        let operators = manifest["operators"].as_object()?;
        let shards = operators.values().filter_map(|o| o["shards"].as_array()).flatten();
        let state = shards.filter(|s| !s["keyGroups"].is_null()).filter_map(|s| s["size"].as_u64());
        let splits = operators.values().filter_map(|o| o["splits"].as_array()).flatten();
        let position = |split: &Value| {
            let partition = split["split"].as_str()?.rsplit('-').next()?.parse().ok()?;
            Some((partition, split["position"]["offset"].as_u64()?))
        };
        Some(Self {
            epoch: manifest["epoch"].as_u64()?,
            attempt: manifest["attempt"].as_u64()?,
            triggered_at_ms: manifest["triggeredAtMs"].as_i64()?,
            written_at_ms: entry["writtenAtMs"].as_i64()?,
            state_bytes: state.sum(),
            positions: splits.filter_map(position).collect(),
        })
    }

    /// Whether event `n` is in it.
    pub(super) fn holds(&self, n: u64) -> bool {
        self.positions.get(&(n % PARTITIONS)).is_some_and(|next| n / PARTITIONS < *next)
    }
}

/// What a checkpoint log has, oldest first.
#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    completed: Vec<Checkpoint>,
    /// Attempts, and when they were opened.
    opened: BTreeMap<u64, i64>,
}

impl Checkpoints {
    fn of(log: &CheckpointLog) -> Self {
        let mut all = Self::default();
        for (_, entry) in &log.entries {
            match entry["event"]["type"].as_str() {
                Some("completed") => all.completed.extend(Checkpoint::of(entry)),
                Some("opened") => all.opened.extend(entry["attempt"].as_u64().zip(entry["writtenAtMs"].as_i64())),
                Some(_) | None => {}
            }
        }
        all
    }

    pub(super) fn newest(&self) -> Option<Checkpoint> {
        self.completed.last().cloned()
    }

    pub(super) fn newest_of(&self, attempt: u64) -> Option<Checkpoint> {
        self.completed.iter().rfind(|c| c.attempt == attempt).cloned()
    }

    /// The first of a later attempt.
    pub(super) fn first_after(&self, attempt: u64) -> Option<&Checkpoint> {
        self.completed.iter().find(|c| c.attempt > attempt)
    }

    /// When the attempt that went on was opened.
    pub(super) fn opened_after(&self, attempt: u64) -> Option<i64> {
        let next = self.first_after(attempt)?.attempt;
        self.opened.get(&next).copied()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_checkpoint_holds_the_events_before_its_positions() {
        let splits = json!([{ "split": "events-0", "position": { "offset": 2 } }, { "split": "events-1", "position": { "offset": 1 } }]);
        let shards = json!([{ "keyGroups": [0, 3], "size": 7 }, { "keyGroups": null, "size": 5 }]);
        let operators = json!({ "source:events": { "splits": splits }, "totals": { "shards": shards } });
        let manifest = json!({ "epoch": 4, "attempt": 2, "triggeredAtMs": 5, "operators": operators });
        let completed = json!({ "writtenAtMs": 9, "event": { "type": "completed", "manifest": manifest } });
        let opened = json!({ "writtenAtMs": 3, "attempt": 2, "event": { "type": "opened" } });
        let entries = [opened, completed].map(|entry| (PathBuf::new(), entry)).into();
        let checkpoints = Checkpoints::of(&CheckpointLog { entries });
        let first = checkpoints.first_after(1).unwrap();
        assert_eq!([0, 3, 6, 1, 4, 2].map(|n| first.holds(n)), [true, true, false, true, false, false]);
        assert_eq!((first.state_bytes, checkpoints.opened_after(1)), (7, Some(3)));
        assert!(checkpoints.first_after(2).is_none() && checkpoints.newest_of(1).is_none());
    }

    #[test]
    fn a_worker_is_known_by_its_number() {
        assert_eq!(worker_id("2026-11-21T17:00:00Z  INFO worker 12"), Some(12));
        assert_eq!(["worker 1", "worker 3"].map(worker_id), [Some(1), Some(3)]);
        assert_eq!(worker_id("a worker"), None);
    }
}
