//! The job whose workers die, or that is rescaled: its processes, servers, input and checkpoint log.
//!
//! Event number `n` goes to partition `n % PARTITIONS`, at offset `n / PARTITIONS`: so the positions in a checkpoint tell which events
//! it holds; and the totals are known without a look at any of it. Invariant: nothing outlives the owner.

use std::{
    collections::{BTreeMap, HashMap},
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

use super::{Storage, watch::Watch};
use crate::backend::Backend;

const NAME: &str = "totals";
const EVENTS: &str = "events";
/// Of the topic of events, and of that of totals.
const PARTITIONS: u64 = 3;
/// Bytes of checkpoint files for each key, about, without its text.
const KEY_BYTES: u64 = 64;
/// State this much smaller than asked for is refused, per cent.
const SMALLER_MAX: u64 = 25;
/// How long anything but a recovery may take.
const PATIENCE: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(50);
/// Of the keys of events behind the first ones.
const KEYS_SEED: u64 = 11;
/// Events are written in bursts of this many a second.
const BURSTS: u64 = 100;
/// What a coordinator says of a worker that has come.
const COME: &str = " has come: ";
/// What one says that does not lead.
const STANDS_BY: &str = "standing by";

/// What there shall be.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) backend: Backend,
    /// Of all state, in checkpoint files, about.
    pub(crate) state_mb: u64,
    /// Characters of text that the state keeps for each key.
    pub(crate) text: usize,
    pub(crate) parallelism: u32,
    pub(crate) workers: u32,
    /// Of each worker.
    pub(crate) slots: u32,
    pub(crate) storage: Storage,
    /// From checkpoint to checkpoint.
    pub(crate) interval: String,
    /// Events a second.
    pub(crate) rate: u64,
    /// Whether output becomes visible once per checkpoint, in transactions; else at once.
    pub(crate) exactly_once: bool,
    /// Whether another coordinator stands by.
    pub(crate) standby: bool,
}

/// See the header of this file.
pub(crate) struct World {
    /// From when on the state has been built up: what a reader has not read yet by then would come late.
    watch: Option<Watch>,
    feeder: Feeder,
    workers: BTreeMap<u32, Run>,
    coordinator: Run,
    standby: Option<Run>,
    identities: Identities,
    /// Where the coordinator listens, as workers are told; `@` and a file if there may be another, who writes that there.
    listen: String,
    job: Job,
    keys: u64,
    setup: Setup,
    started: u32,
    killed: usize,
    store: Option<S3>,
    kafka: Kafka,
    // Goes last.
    _folder: TempDir,
}

impl World {
    /// Runs a job until it has a checkpoint with all its state.
    pub(crate) fn build(setup: Setup) -> Result<Self> {
        let kafka = Kafka::start().context("start a Kafka broker")?;
        for topic in [EVENTS, NAME] {
            kafka.create_topic(topic, PARTITIONS as usize, &[])?;
        }
        let store = (setup.storage == Storage::S3).then(S3::start).transpose().context("start an S3 server")?;
        let folder = scratch::folder("recovery-")?;
        let mut job = Job::new(folder.path(), NAME, sql(&kafka.bootstrap(), &setup));
        (job.parallelism, job.interval) = (setup.parallelism, setup.interval.clone());
        job.spec = format!("  state:\n    backend: {}\n", setup.backend);
        for variable in ["TMPDIR", "XDG_RUNTIME_DIR"] {
            job.env.insert(variable.to_owned(), folder.path().display().to_string());
        }
        if let Some(store) = &store {
            job.storage = format!("s3://{}/jobs", store.bucket());
            job.env.extend(store.env().into_iter().map(|(name, value)| (name.to_owned(), value)));
        }
        let keys = setup.state_mb * 1_000_000 / (KEY_BYTES + setup.text as u64);
        let writer = Writer::new(&kafka.bootstrap(), EVENTS)?;
        let mut events = Events { writer, texts: Draw::new(13), text: setup.text };
        // Every key once.
        (0..keys).try_for_each(|n| events.write(n, n))?;
        events.writer.flush()?;

        let identities = Identities::issue(&job, folder.path().join("identities"))?;
        let (coordinator, listen) = if setup.standby {
            let lock = folder.path().join("lock").display().to_string();
            (start_with_lock(&identities, &job, 1, &lock)?, format!("@{lock}"))
        } else {
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
            let at = Site { prefix: Vec::new(), host: Ipv4Addr::LOCALHOST, port };
            (identities.start_coordinator(&job, "coordinator", &at)?, at.endpoint())
        };
        let mut world = Self {
            watch: None,
            feeder: Feeder::none(),
            workers: BTreeMap::new(),
            coordinator,
            standby: None,
            identities,
            listen,
            job,
            keys,
            setup,
            started: 0,
            killed: 0,
            store,
            kafka,
            _folder: folder,
        };
        for _ in 0..world.setup.workers {
            world.add_worker()?;
        }
        if world.setup.standby {
            world.add_standby()?;
        }
        world.until("it had every key", |world| {
            let newest = world.checkpoints()?.newest();
            let all = |c: &Checkpoint| (0..world.keys).rev().take(PARTITIONS as usize).all(|n| c.holds(n));
            Ok(newest.is_some_and(|c| all(&c) && world.is_visible(&c)))
        })?;
        let bytes = world.state_bytes()?;
        ensure!(
            bytes * 100 >= world.setup.state_mb * 1_000_000 * (100 - SMALLER_MAX),
            "its checkpoint has {bytes} bytes of state, and {} MB were asked for",
            world.setup.state_mb
        );
        world.watch = Some(Watch::start(&world.kafka.bootstrap(), NAME, PARTITIONS as i32, "newest")?);
        world.feeder = Feeder::start(events, world.keys, world.setup.rate);
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
    pub(crate) fn add_worker(&mut self) -> Result<()> {
        self.started += 1;
        let name = format!("worker-{}", self.started);
        let (at, slots) = (Site::here(), self.setup.slots);
        let mut run = Some(self.identities.start_worker_of(&self.job, &name, &at, &self.listen, slots)?);
        self.until("a worker came", |world| {
            let log = world.coordinator.log();
            let mut come = log.lines().filter_map(|line| worker_id(line.split_once(COME)?.0));
            if let (Some(id), true) = (come.nth(world.started as usize - 1), run.is_some()) {
                world.workers.extend(run.take().map(|run| (id, run)));
            }
            Ok(run.is_none())
        })
    }

    /// Starts another coordinator, and waits until it stands by.
    pub(crate) fn add_standby(&mut self) -> Result<()> {
        let lock = self.listen.strip_prefix('@').context("the coordinator has no lock")?;
        // The first of all leads, and each that was killed did.
        let standby = start_with_lock(&self.identities, &self.job, self.killed + 2, lock)?;
        self.until("another coordinator stood by", |_| Ok(standby.log().contains(STANDS_BY)))?;
        self.standby = Some(standby);
        Ok(())
    }

    /// Kills the coordinator that leads; the one that stands by is the job's from now on.
    pub(crate) fn kill_coordinator(&mut self) -> Result<()> {
        let next = self.standby.take().context("no coordinator stands by")?;
        self.killed += 1;
        std::mem::replace(&mut self.coordinator, next).signal(Signal::SIGKILL)
    }

    /// Kills a worker that has a part of the job: each time that of another part.
    pub(crate) fn kill_worker(&mut self) -> Result<()> {
        let placed: Vec<u32> = self.coordinator.placement().iter().filter_map(|worker| worker_id(worker)).collect();
        ensure!(!placed.is_empty(), "the coordinator does not say where the job runs; {}", self.logs());
        let victim = placed[self.killed % placed.len()];
        self.killed += 1;
        let run = self.workers.remove(&victim).with_context(|| format!("worker {victim} was not started here"))?;
        run.signal(Signal::SIGKILL)
    }

    /// Waits until the job has completed so many checkpoints more.
    pub(crate) fn calm(&mut self, checkpoints: usize) -> Result<()> {
        let epoch = |world: &Self| Ok::<_, anyhow::Error>(world.checkpoints()?.newest().map_or(0, |c| c.epoch));
        let mut seen = epoch(self).unwrap_or(0);
        for _ in 0..checkpoints {
            self.until("a checkpoint was complete", |world| Ok(epoch(world)? > seen))?;
            seen = epoch(self).unwrap_or(seen);
        }
        Ok(())
    }

    /// Whether a checkpoint's output is visible, as far as the log says.
    fn is_visible(&self, checkpoint: &Checkpoint) -> bool {
        let committed = || CheckpointLog::read(&self.log_folder()).map_or(0, |log| log.last_committed());
        // What is written at once is there before the checkpoint is.
        !self.setup.exactly_once || committed() >= checkpoint.epoch
    }

    /// Bytes of state files that the newest checkpoint names.
    pub(crate) fn state_bytes(&self) -> Result<u64> {
        Ok(self.checkpoints()?.newest().map_or(0, |c| c.state_bytes))
    }

    /// When output was first seen, after `start`, of an event that a checkpoint does not hold.
    pub(crate) fn first_beyond(&self, checkpoint: &Checkpoint, start: Instant) -> Option<Instant> {
        self.watch.as_ref()?.first_since(start, |n| !checkpoint.holds(n))
    }

    /// When each record of output after `start` was seen, and the event that it tells of.
    pub(crate) fn seen_since(&self, start: Instant) -> Vec<(Instant, u64)> {
        self.watch.as_ref().map_or_else(Vec::new, |watch| watch.since(start))
    }

    /// What the log has now.
    pub(crate) fn checkpoints(&self) -> Result<Checkpoints> {
        Ok(Checkpoints::of(&CheckpointLog::read(&self.log_folder())?))
    }

    fn log_folder(&self) -> PathBuf {
        match &self.store {
            Some(store) => store.objects().join("jobs/default").join(NAME).join("local/log"),
            None => self.job.checkpoint_folder().join("log"),
        }
    }

    /// What the coordinator has said of late.
    pub(crate) fn logs(&self) -> String {
        let log = self.coordinator.log();
        let lines: Vec<&str> = log.lines().rev().take(40).collect();
        format!("the coordinator's log:\n{}", lines.into_iter().rev().collect::<Vec<_>>().join("\n"))
    }

    /// Runs `floodmark` with these words, in which `JOB` stands for the manifest and `STORAGE` for the storage.
    pub(crate) fn command(&self, words: &[&str]) -> Result<()> {
        self.job.command(words)?.said().map(drop)
    }

    /// Ends everything; an input that could not be written spoils what was measured.
    pub(crate) fn end(mut self) -> Result<()> {
        self.feeder.finish().map(drop)
    }

    /// Ends the input, waits until all that came of it is visible, and compares it with totals that are computed here; then ends
    /// everything. Answers with the number of keys and of events.
    pub(crate) fn end_exactly(mut self) -> Result<(u64, u64)> {
        let events = self.feeder.finish()?;
        self.until("all output was visible", |world| {
            let newest = world.checkpoints()?.newest();
            let all = |c: &Checkpoint| (0..events).rev().take(PARTITIONS as usize).all(|n| c.holds(n));
            Ok(newest.is_some_and(|c| all(&c) && world.is_visible(&c)))
        })?;
        let mut seen: HashMap<u64, Totals> = HashMap::new();
        for record in self.kafka.read_committed(NAME)? {
            let value: Value = serde_json::from_str(record.text()).context("read an output record")?;
            let (key, totals) =
                Totals::of(&value, self.setup.text).with_context(|| format!("a record of output: {value}"))?;
            // A key's rows are in one partition, in their order: none comes twice, and none is followed by an older one.
            if let Some(before) = seen.insert(key, totals) {
                ensure!(before.rows < totals.rows, "{value} comes after {before:?}");
            }
        }
        let expected = Totals::all(self.keys, events);
        ensure!(seen.len() == expected.len(), "there are totals of {} keys, not of {}", seen.len(), expected.len());
        for (key, expected) in (0..).zip(&expected) {
            let seen = seen.get(&key);
            ensure!(seen == Some(expected), "the totals of key {key} are {seen:?}, not {expected:?}");
        }
        Ok((self.keys, events))
    }
}

/// What there is to know of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Totals {
    rows: u64,
    newest: u64,
    oldest: u64,
    sum: u64,
}

impl Totals {
    /// Of each key, after so many events.
    fn all(keys: u64, events: u64) -> Vec<Self> {
        let mut all: Vec<Self> = (0..keys).map(|n| Self { rows: 1, newest: n, oldest: n, sum: n }).collect();
        let mut draw = Draw::new(KEYS_SEED);
        for n in keys..events {
            let of = &mut all[draw.below(keys) as usize];
            *of = Self { rows: of.rows + 1, newest: n, oldest: of.oldest, sum: of.sum + n };
        }
        all
    }

    /// Of the key that a record of output names. The mean and the length of the text must be what follows from the rest.
    fn of(value: &Value, text: usize) -> Option<(u64, Self)> {
        let number = |name: &str| value[name].as_u64();
        let (rows, sum) = (number("rows_so_far")?, number("total")?);
        let fits = number("mean")? == sum / rows.max(1) && (text == 0 || number("width")? == text as u64);
        let totals = Self { rows, newest: number("newest")?, oldest: number("oldest")?, sum };
        fits.then_some((number("k")?, totals))
    }
}

/// Starts a coordinator that leads only while it holds this lock.
fn start_with_lock(identities: &Identities, job: &Job, number: usize, lock: &str) -> Result<Run> {
    let name = format!("coordinator-{number}");
    identities.start_coordinator_with(job, &name, &Site::here(), &["--standby-lock", lock])
}

/// The number in `worker 7` at the end of some text.
fn worker_id(text: &str) -> Option<u32> {
    text.rsplit_once("worker ")?.1.trim().parse().ok()
}

fn sql(bootstrap: &str, setup: &Setup) -> String {
    let options = |connector: &str, topic: &str, more: &str| {
        format!(
            "'connector' = '{connector}', 'topic' = '{topic}', 'properties.bootstrap.servers' = '{bootstrap}', {more}"
        )
    };
    // Text is kept, and only its length is written: it is to weigh on the state, not on the output.
    let [of_events, of_totals, kept] =
        if setup.text > 0 { [", p STRING", ", width BIGINT", ", CHAR_LENGTH(max(p))"] } else { [""; 3] };
    let guarantee = if setup.exactly_once { "exactly-once" } else { "at-least-once" };
    format!(
        "CREATE TABLE {EVENTS} (n BIGINT, k BIGINT{of_events}) WITH ({});
CREATE TABLE {NAME} (k BIGINT, rows_so_far BIGINT, newest BIGINT, oldest BIGINT, total BIGINT, mean BIGINT{of_totals},
  PRIMARY KEY (k) NOT ENFORCED) WITH ({});
INSERT INTO {NAME} SELECT k, count(*), max(n), min(n), sum(n), avg(n){kept} FROM {EVENTS} GROUP BY k;",
        options("kafka", EVENTS, "'format' = 'json', 'scan.startup.mode' = 'earliest-offset'"),
        options("upsert-kafka", NAME, &format!("'sink.delivery-guarantee' = '{guarantee}'")),
    )
}

/// Writes events, each with a text of its own if they have any.
struct Events {
    writer: Writer,
    texts: Draw,
    text: usize,
}

impl Events {
    fn write(&mut self, n: u64, key: u64) -> Result<()> {
        /// Of these texts consist: a power of two of them.
        const LETTERS: &[u8; 64] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_";
        let partition = (n % PARTITIONS) as i32;
        if self.text == 0 {
            return self.writer.write(partition, format!("{{\"n\":{n},\"k\":{key}}}").as_bytes());
        }
        let mut event = format!("{{\"n\":{n},\"k\":{key},\"p\":\"");
        let end = event.len() + self.text;
        while event.len() < end {
            let mut bits = self.texts.below(u64::MAX);
            for _ in 0..(end - event.len()).min(10) {
                event.push(char::from(LETTERS[(bits % 64) as usize]));
                bits /= 64;
            }
        }
        event.push_str("\"}");
        self.writer.write(partition, event.as_bytes())
    }
}

/// Writes events of random keys at a steady rate.
struct Feeder {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<u64>>>,
}

impl Feeder {
    fn none() -> Self {
        Self { stop: Arc::default(), thread: None }
    }

    /// Goes on with event number `keys`.
    fn start(mut events: Events, keys: u64, rate: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = stop.clone();
            move || {
                let (mut draw, mut n, start) = (Draw::new(KEYS_SEED), keys, Instant::now());
                while !stop.load(Ordering::Relaxed) {
                    let due = keys + (start.elapsed().as_secs_f64() * rate as f64) as u64;
                    while n < due {
                        events.write(n, draw.below(keys))?;
                        n += 1;
                    }
                    sleep(Duration::from_millis(1_000 / BURSTS));
                }
                events.writer.flush().map(|()| n)
            }
        });
        Self { stop, thread: Some(thread) }
    }

    /// Answers with the number of events there are; 0 if none were written here.
    fn finish(&mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the feeder panicked"))?.context("write events"),
            None => Ok(0),
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
pub(crate) struct Checkpoint {
    pub(crate) epoch: u64,
    pub(crate) attempt: u64,
    pub(crate) triggered_at_ms: i64,
    pub(crate) written_at_ms: i64,
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
    pub(crate) fn holds(&self, n: u64) -> bool {
        self.positions.get(&(n % PARTITIONS)).is_some_and(|next| n / PARTITIONS < *next)
    }
}

/// What a checkpoint log has, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints {
    completed: Vec<Checkpoint>,
    /// Attempts, and when they were opened.
    opened: BTreeMap<u64, i64>,
    /// Checkpoints, and when all their output was known to be visible.
    committed: BTreeMap<u64, i64>,
}

impl Checkpoints {
    fn of(log: &CheckpointLog) -> Self {
        let mut all = Self::default();
        for (_, entry) in &log.entries {
            match entry["event"]["type"].as_str() {
                Some("completed") => all.completed.extend(Checkpoint::of(entry)),
                // An attempt that begins from it says it once more.
                Some("committed") => {
                    if let Some((epoch, at)) = entry["event"]["epoch"].as_u64().zip(entry["writtenAtMs"].as_i64()) {
                        all.committed.entry(epoch).or_insert(at);
                    }
                }
                Some("opened") => all.opened.extend(entry["attempt"].as_u64().zip(entry["writtenAtMs"].as_i64())),
                Some(_) | None => {}
            }
        }
        all
    }

    pub(crate) fn newest(&self) -> Option<Checkpoint> {
        self.completed.last().cloned()
    }

    pub(crate) fn newest_of(&self, attempt: u64) -> Option<Checkpoint> {
        self.completed.iter().rfind(|c| c.attempt == attempt).cloned()
    }

    /// The first of a later attempt.
    pub(crate) fn first_after(&self, attempt: u64) -> Option<&Checkpoint> {
        self.completed.iter().find(|c| c.attempt > attempt)
    }

    /// When the output of this checkpoint was known to be visible.
    pub(crate) fn committed_at(&self, epoch: u64) -> Option<i64> {
        self.committed.get(&epoch).copied()
    }

    /// When the attempt that went on was opened.
    pub(crate) fn opened_after(&self, attempt: u64) -> Option<i64> {
        let next = self.first_after(attempt)?.attempt;
        self.opened.get(&next).copied()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn totals_are_those_of_the_events_and_of_each_record_must_fit() {
        let (keys, events) = (10, 1_000);
        let all = Totals::all(keys, events);
        assert_eq!((all.len() as u64, all.iter().map(|t| t.rows).sum::<u64>()), (keys, events));
        assert_eq!(all.iter().map(|t| t.sum).sum::<u64>(), (0..events).sum::<u64>());
        assert_eq!(all.iter().map(|t| t.newest).max(), Some(events - 1));
        let record = |mean: u64, width: u64| json!({ "k": 3, "rows_so_far": 2, "newest": 9, "oldest": 3, "total": 13, "mean": mean, "width": width });
        let totals = Totals { rows: 2, newest: 9, oldest: 3, sum: 13 };
        assert_eq!(Totals::of(&record(6, 40), 40), Some((3, totals)));
        assert_eq!(Totals::of(&record(6, 0), 0), Some((3, totals)));
        assert_eq!([Totals::of(&record(7, 40), 40), Totals::of(&record(6, 39), 40)], [None, None]);
    }

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
