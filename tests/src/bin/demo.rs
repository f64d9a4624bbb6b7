//! `make demo`: a Nexmark job is killed with -9 half-way, several times, and its output compared with the same query
//! computed by SQLite. Ends with a verdict; exit code 1 if a single row differs.

#![allow(clippy::disallowed_methods, reason = "the demo runs a real process in real time")]

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use floodmark_connectors::nexmark::Generator;
use floodmark_tests::{
    compare::{Column, multiset, row_of_json},
    events::{Draw, HOT_ITEMS, NEXMARK_COLUMNS},
    job::{Ended, Job, Run, Summary, lines_of},
    oracle,
};

/// People, auctions and bids.
const EVENTS: u64 = 3_000_000;
/// Events per second of real time: the job lasts long enough to be killed half-way.
const RATE: u64 = 150_000;
/// Events per second of event time: 6000 seconds in all, 3000 windows.
const EVENT_RATE: u64 = 500;
const KILLS: u32 = 3;
/// Checkpoints that must complete between a start and the next kill.
const CHECKPOINTS_BETWEEN_KILLS: u64 = 2;
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    match demo() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("\nthe demo could not be carried out: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<bool> {
    let clock = Instant::now();
    let folder = fresh_folder()?;
    say(&clock, &format!("hot items of {} Nexmark events, exactly once, in {}", thousands(EVENTS), folder.display()));
    let output = folder.join("hot-items");
    let job = Job::new(&folder, "hot-items", sql(&output));
    let mut deaths = Vec::new();
    for number in 1..=KILLS {
        deaths.push(run_and_kill(&job, number, &clock)?);
    }
    say(&clock, "started again, now left alone");
    let last = watch_to_the_end(&job, &clock)?;
    let summary = last.ok("finished")?;
    say(&clock, &format!("finished; it had started from checkpoint {}", number(last.restored_from())));
    say(&clock, "computing the same query with SQLite from the same events");
    let generator = Generator { events_per_second: EVENT_RATE, ..Generator::default() };
    let (bids, expected) = oracle::hot_items(generator, EVENTS)?;
    let columns = [Column::Plain("auction"), Column::Plain("num"), Column::Time("window_end")];
    let lines = lines_of(&output)?;
    let written = lines.iter().map(|line| row_of_json(line.as_bytes(), &columns)).collect::<Result<Vec<_>>>()?;
    ensure!(!expected.is_empty(), "the query has no answer: there is nothing to compare");
    let compared = multiset(expected, written);
    report(&clock, &folder, bids, &deaths, &last, summary);
    match compared {
        Ok(rows) => {
            println!("\nVERDICT: exact. All {} rows are as they should be: none lost, none repeated.", thousands(rows));
            Ok(true)
        }
        Err(difference) => {
            println!("\nVERDICT: WRONG. {difference}");
            Ok(false)
        }
    }
}

/// An empty folder under the system's folder for temporary files; that of an earlier demo is removed.
fn fresh_folder() -> Result<PathBuf> {
    let folder = std::env::temp_dir().join("floodmark-demo");
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("remove the earlier demo's folder {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    Ok(folder)
}

/// Nexmark's query 5, with the window's end as a third column.
fn sql(output: &Path) -> String {
    format!(
        "CREATE TABLE nexmark ({NEXMARK_COLUMNS}) WITH ('connector' = 'nexmark', 'events' = '{EVENTS}', 'rate' = '{RATE}', 'event-rate' = '{EVENT_RATE}');

CREATE VIEW bid AS
SELECT bid.auction, bid.bidder, bid.price, bid.channel, bid.url, `dateTime`, bid.extra FROM nexmark WHERE event_type = 2;

CREATE TABLE hot_items (auction BIGINT, num BIGINT, window_end TIMESTAMP(3))
WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json');

INSERT INTO hot_items
SELECT AuctionBids.auction, AuctionBids.num, AuctionBids.endtime
{HOT_ITEMS};",
        output.display()
    )
}

/// Starts the job, waits until it is some checkpoints further, and kills it at an odd moment.
fn run_and_kill(job: &Job, number_of_kill: u32, clock: &Instant) -> Result<Ended> {
    let before = job.log()?.last_epoch();
    let mut run = job.start()?;
    let from =
        if before == 0 { "started".to_owned() } else { format!("started again; checkpoint {before} is the newest") };
    say(clock, &from);
    follow(job, &mut run, clock, |epoch| epoch >= before + CHECKPOINTS_BETWEEN_KILLS)?;
    sleep(Duration::from_millis(100 + Draw::new(number_of_kill.into()).below(800)));
    let pid = run.pid();
    let ended = run.kill()?;
    say(clock, &format!("kill -9 {pid}  (kill {number_of_kill} of {KILLS})"));
    Ok(ended)
}

fn watch_to_the_end(job: &Job, clock: &Instant) -> Result<Ended> {
    let mut run = job.start()?;
    let started = Instant::now();
    let mut seen = 0;
    while run.is_running()? && started.elapsed() < PATIENCE {
        seen = tell_checkpoint(job, seen, clock)?;
        sleep(Duration::from_millis(50));
    }
    run.wait(Duration::from_secs(1))
}

/// Tells of checkpoints until one satisfies `enough`.
fn follow(job: &Job, run: &mut Run, clock: &Instant, enough: impl Fn(u64) -> bool) -> Result<()> {
    let mut seen = job.log()?.last_epoch();
    run.until("a checkpoint was complete", PATIENCE, || {
        seen = tell_checkpoint(job, seen, clock)?;
        Ok(enough(seen))
    })
}

/// Says so if there is a newer checkpoint than `seen`; answers with the newest.
fn tell_checkpoint(job: &Job, seen: u64, clock: &Instant) -> Result<u64> {
    let log = job.log()?;
    let newest = log.last_epoch();
    if newest > seen {
        // The 32 splits are stripes of the events' numbers; each position is the stripe's next number.
        let positions = log.positions("nexmark");
        let next: u64 = positions.values().filter_map(|p| p["next"].as_u64()).sum();
        let events = next / positions.len().max(1) as u64;
        say(clock, &format!("checkpoint {newest}: {} of {} events", thousands(events.min(EVENTS)), thousands(EVENTS)));
    }
    Ok(newest.max(seen))
}

fn report(clock: &Instant, folder: &Path, bids: u64, deaths: &[Ended], last: &Ended, summary: &Summary) {
    let starts = deaths.iter().chain([last]).filter_map(Ended::restored_from);
    let epochs: Vec<String> = starts.map(|e| e.to_string()).collect();
    println!();
    println!("  events         {} ({} bids)", thousands(EVENTS), thousands(bids));
    println!("  kill -9        {} times", deaths.len());
    println!("  resumed from   checkpoints {}", epochs.join(", "));
    println!("  checkpoints    up to {}", number(summary.checkpoints.last_epoch));
    println!("  late rows      {}", summary.late);
    println!("  time           {:.0} s", clock.elapsed().as_secs_f64());
    println!("  look around    {} (job, logs, checkpoints and output)", folder.display());
}

fn say(clock: &Instant, what: &str) {
    println!("[{:5.1} s] {what}", clock.elapsed().as_secs_f64());
    // Progress that can't be shown is no reason to stop.
    let _ = std::io::stdout().flush();
}

fn number(epoch: Option<u64>) -> String {
    epoch.map_or_else(|| "none".to_owned(), |e| e.to_string())
}

fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
