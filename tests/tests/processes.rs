//! A job whose coordinators and workers are processes of their own: coordinators that take over from one another, and other
//! parallelisms while rows flow. Needs no server.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use floodmark_connectors::nexmark::{Event, Generator};
use floodmark_testkit::scratch;
use floodmark_tests::{
    cluster::{Identities, Site},
    compare::{Column, Row, multiset, row_of_json},
    events::NEXMARK_COLUMNS,
    job::{Ended, Job, PATIENCE, Run, lines_of},
    oracle::bids_per_auction,
};
use nix::sys::signal::Signal;

const WINDOW_MS: i64 = 10_000;
/// From the end of one coordinator to the next one's first output, at most: far more than it takes on a machine with nothing
/// else to do.
const TAKEOVER_MAX: Duration = Duration::from_secs(30);
/// Exit code of a process whose job another runs.
const FENCED: i32 = 3;

/// Bids per auction and window, and every bid above a price, over so many events that come at a rate.
fn job(folder: &Path, events: u64, rate: u64) -> Job {
    let path = |table: &str| folder.join(table).display().to_string();
    let sql = format!(
        "CREATE TABLE nexmark ({NEXMARK_COLUMNS})
  WITH ('connector' = 'nexmark', 'events' = '{events}', 'event-rate' = '1000', 'rate' = '{rate}');
CREATE VIEW bid AS SELECT bid.auction, bid.price, `dateTime` FROM nexmark WHERE event_type = 2;
CREATE TABLE busy (window_end TIMESTAMP(3), auction BIGINT, bids BIGINT, highest BIGINT)
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json');
CREATE TABLE large (auction BIGINT, price BIGINT, at TIMESTAMP(3))
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json');
INSERT INTO busy SELECT window_end, auction, count(*), max(price)
  FROM TABLE(TUMBLE(TABLE bid, DESCRIPTOR(`dateTime`), INTERVAL '10' SECOND)) GROUP BY window_start, window_end, auction;
INSERT INTO large SELECT auction, price, `dateTime` FROM bid WHERE price > 10000000;",
        path("busy"),
        path("large")
    );
    Job::new(folder, "bids", sql)
}

/// Whether the output is exactly what the events make.
fn check(folder: &Path, events: u64) -> Result<()> {
    let rows = |table: &str, columns: &[Column]| -> Result<Vec<Row>> {
        lines_of(&folder.join(table))?.iter().map(|line| row_of_json(line.as_bytes(), columns)).collect()
    };
    let generator = Generator { events_per_second: 1_000, ..Generator::default() };
    let busy = [Column::Time("window_end"), Column::Plain("auction"), Column::Plain("bids"), Column::Plain("highest")];
    multiset(bids_per_auction(generator, events, WINDOW_MS)?, rows("busy", &busy)?)?;
    let large = |n: u64| -> Option<Row> {
        let price = generator.integer(n, "price").filter(|_| generator.kind(n) == Event::Bid)?;
        let row = [generator.integer(n, "auction")?.to_string(), price.to_string(), generator.time_ms(n).to_string()];
        (price > 10_000_000).then(|| row.to_vec())
    };
    let columns = [Column::Plain("auction"), Column::Plain("price"), Column::Time("at")];
    let found = multiset((0..events).filter_map(large), rows("large", &columns)?)?;
    ensure!(found > 100, "only {found} rows: too few to prove anything");
    Ok(())
}

/// The processes of one job.
struct Crew {
    folder: PathBuf,
    job: Job,
    identities: Identities,
    lock: String,
    workers: Vec<Run>,
    started: u32,
}

impl Crew {
    fn new(folder: &Path, job: Job) -> Result<Self> {
        let identities = Identities::issue(&job, folder.join("identities"))?;
        let lock = folder.join("lock").display().to_string();
        Ok(Self { folder: folder.to_owned(), job, identities, lock, workers: Vec::new(), started: 0 })
    }

    fn name(&mut self, role: &str) -> String {
        self.started += 1;
        format!("{role}-{}", self.started)
    }

    fn coordinator(&mut self) -> Result<Run> {
        let name = self.name("coordinator");
        self.identities.start_coordinator_with(&self.job, &name, &Site::here(), &["--standby-lock", &self.lock])
    }

    fn worker(&mut self, slots: u32) -> Result<()> {
        let (name, of) = (self.name("worker"), format!("@{}", self.lock));
        self.workers.push(self.identities.start_worker_of(&self.job, &name, &Site::here(), &of, slots)?);
        Ok(())
    }

    /// Bytes of output that can be seen.
    fn seen(&self) -> u64 {
        ["busy", "large"].into_iter().map(|table| bytes_in(&self.folder.join(table))).sum()
    }

    /// Waits for output that could not be seen before. Answers how long.
    fn new_output(&self, run: &mut Run) -> Result<Duration> {
        let (begun, before) = (Instant::now(), self.seen());
        run.until("new output", PATIENCE, || Ok(self.seen() > before))?;
        Ok(begun.elapsed())
    }

    fn rescale(&self, parallelism: u32) -> Result<Ended> {
        self.job.command(&["rescale", "JOB", &parallelism.to_string(), "--storage", "STORAGE"])
    }

    /// What the newest checkpoint says of a chosen parallelism.
    fn chosen(&self) -> Result<Option<u64>> {
        let log = self.job.log()?;
        let (_, manifest) = log.completed().next_back().context("there is no checkpoint")?;
        Ok(manifest["rescaled"]["to"].as_u64())
    }

    fn dismiss(self) -> Result<()> {
        for worker in self.workers {
            worker.signal(Signal::SIGTERM)?;
            let ended = worker.wait(PATIENCE)?;
            ensure!(ended.code == Some(0) && !ended.log.contains("panicked"), "a worker has failed: {ended}");
        }
        Ok(())
    }
}

fn bytes_in(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let published = files.filter(|f| !f.file_name().to_string_lossy().starts_with('.'));
    published.filter_map(|f| f.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum()
}

/// Waits until a process has logged these words.
fn says(run: &mut Run, words: &str) -> Result<()> {
    let begun = Instant::now();
    while !run.log().contains(words) {
        ensure!(run.is_running()?, "it ended before it said '{words}':\n{}", run.log());
        ensure!(begun.elapsed() < PATIENCE, "it does not say '{words}':\n{}", run.log());
        sleep(Duration::from_millis(10));
    }
    Ok(())
}

const LEADS: &str = "listening for workers";
const STANDS_BY: &str = "standing by";

#[test]
fn a_coordinator_that_dies_again_and_again_is_replaced_by_the_one_that_stands_by() -> Result<()> {
    let folder = scratch::folder("processes-")?;
    let events = 500_000;
    let mut crew = Crew::new(folder.path(), job(folder.path(), events, 15_000))?;
    let mut leader = crew.coordinator()?;
    says(&mut leader, LEADS)?;
    crew.worker(2)?;
    crew.worker(2)?;
    let mut took = Vec::new();
    for _ in 0..5 {
        let mut next = crew.coordinator()?;
        says(&mut next, STANDS_BY)?;
        crew.new_output(&mut leader)?;
        leader.kill()?;
        took.push(crew.new_output(&mut next)?);
        leader = next;
    }
    let mut idle = crew.coordinator()?;
    says(&mut idle, STANDS_BY)?;
    leader.wait(PATIENCE)?.ok("finished")?;
    idle.wait(PATIENCE)?.ok("alreadyFinished")?;
    took.sort();
    println!("from a coordinator's end to new output: {took:.2?}");
    ensure!(took.iter().all(|t| *t <= TAKEOVER_MAX), "{took:?}");
    crew.dismiss()?;
    check(folder.path(), events)
}

#[test]
fn a_coordinator_that_stood_still_finds_itself_replaced_and_writes_nothing_more() -> Result<()> {
    let folder = scratch::folder("processes-")?;
    let events = 300_000;
    let mut crew = Crew::new(folder.path(), job(folder.path(), events, 15_000))?;
    let mut old = crew.coordinator()?;
    says(&mut old, LEADS)?;
    crew.worker(2)?;
    crew.worker(2)?;
    let mut new = crew.coordinator()?;
    says(&mut new, STANDS_BY)?;
    crew.new_output(&mut old)?;
    old.signal(Signal::SIGSTOP)?;
    says(&mut new, LEADS)?;
    crew.new_output(&mut new)?;
    old.signal(Signal::SIGCONT)?;
    let ended = old.wait(PATIENCE)?;
    ended.refused(FENCED, &["this process", "is fenced", "it writes nothing more"])?;
    new.wait(PATIENCE)?.ok("finished")?;
    crew.dismiss()?;
    check(folder.path(), events)
}

#[test]
fn a_job_that_is_stopped_is_not_taken_over() -> Result<()> {
    let folder = scratch::folder("processes-")?;
    let events = 100_000_000;
    let mut crew = Crew::new(folder.path(), job(folder.path(), events, 15_000))?;
    let mut leader = crew.coordinator()?;
    says(&mut leader, LEADS)?;
    crew.worker(2)?;
    let mut idle = crew.coordinator()?;
    says(&mut idle, STANDS_BY)?;
    crew.new_output(&mut leader)?;
    leader.signal(Signal::SIGTERM)?;
    let stopped = leader.wait(PATIENCE)?.ok("stopped")?.checkpoints.last_epoch;
    let ended = idle.wait(PATIENCE)?;
    assert_eq!(ended.ok("stopped")?.checkpoints.last_epoch, stopped);
    crew.dismiss()
}

#[test]
fn a_job_is_rescaled_while_rows_flow_and_a_worker_dies() -> Result<()> {
    let folder = scratch::folder("processes-")?;
    let events = 600_000;
    let mut crew = Crew::new(folder.path(), job(folder.path(), events, 15_000))?;
    let mut leader = crew.coordinator()?;
    says(&mut leader, LEADS)?;
    for _ in 0..3 {
        crew.worker(2)?;
    }
    crew.new_output(&mut leader)?;
    for to in [4, 3] {
        let begun = Instant::now();
        crew.rescale(to)?.said()?;
        println!(
            "rescaled to {to} in {:.2?}, new output after {:.2?} more",
            begun.elapsed(),
            crew.new_output(&mut leader)?
        );
        assert_eq!(crew.chosen()?, Some(u64::from(to)));
    }
    // What was chosen outlasts the coordinator.
    let mut next = crew.coordinator()?;
    says(&mut next, STANDS_BY)?;
    leader.kill()?;
    crew.new_output(&mut next)?;
    assert_eq!(crew.chosen()?, Some(3));
    // A worker dies on the way: the job runs on all the same, and the asker is told at which parallelism.
    let asked = crew.job.start_command(&["rescale", "JOB", "2", "--storage", "STORAGE"])?;
    crew.workers.remove(0).kill()?;
    let answer = asked.wait(PATIENCE)?;
    crew.new_output(&mut next)?;
    let chosen = crew.chosen()?;
    match answer.code {
        Some(0) => assert_eq!(chosen, None, "back at the manifest's: {answer}"),
        _ => {
            answer.refused(1, &["the job is at parallelism 3"])?;
            assert_eq!(chosen, Some(3));
        }
    }
    // One that can't be changes nothing.
    crew.rescale(1_000)?.refused(1, &["at most 128"])?;
    next.wait(PATIENCE)?.ok("finished")?;
    crew.dismiss()?;
    check(folder.path(), events)
}

fn distinct(workers: &[String]) -> usize {
    workers.iter().collect::<BTreeSet<_>>().len()
}

#[test]
fn subtasks_move_to_a_worker_that_comes_in_place_of_a_lost_one() -> Result<()> {
    let folder = scratch::folder("processes-")?;
    let events = 600_000;
    let mut job = job(folder.path(), events, 15_000);
    job.parallelism = 4;
    let mut crew = Crew::new(folder.path(), job)?;
    let mut leader = crew.coordinator()?;
    says(&mut leader, LEADS)?;
    crew.worker(2)?;
    crew.worker(2)?;
    crew.new_output(&mut leader)?;
    assert_eq!(distinct(&leader.placement()), 2);
    // Without a spare, who is left runs everything.
    crew.workers.remove(0).kill()?;
    crew.new_output(&mut leader)?;
    let crowded = leader.placement();
    assert_eq!((crowded.len(), distinct(&crowded)), (4, 1), "{crowded:?}");
    crew.worker(2)?;
    says(&mut leader, "subtasks have moved to free slots")?;
    let evened = leader.placement();
    let stayed = evened.iter().zip(&crowded).filter(|(now, before)| now == before).count();
    assert_eq!((distinct(&evened), stayed), (2, 2), "{evened:?} after {crowded:?}");
    println!("new output {:.2?} after they have moved", crew.new_output(&mut leader)?);
    leader.wait(PATIENCE)?.ok("finished")?;
    crew.dismiss()?;
    check(folder.path(), events)
}
