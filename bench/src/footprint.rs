//! `floodmark-bench footprint`: what a coordinator and a worker take that have nothing to do.
//!
//! Read from `/proc`: what is resident, which part of that could not be dropped, and which part is used at all.

use std::{
    fs,
    net::Ipv4Addr,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use floodmark_tests::{
    cluster::{Identities, Site},
    job::{Job, PATIENCE, Run},
};
use serde_json::json;

use crate::report::{Figure, Report, Spread, rounded};

pub(crate) const ABOUT: &str = "\
Starts `floodmark coordinator` and one `floodmark worker` with a small job between files: a windowed aggregate whose input stands still \
after 1,000 rows, with a checkpoint each second on local disk, on the heap. Fifty seconds after its first checkpoint, which is forty after \
the processes have given code back that only their start used, it reads, from /proc, what is resident of either process: `resident` counts every page in memory, also those of the program's own file, which the system maps 16 \
at a time and drops when memory is short; `proportional` divides what processes share; `not in a file` is what can't be dropped: the heap, \
stacks, and relocated data. `in use` are the pages that the process has touched within the last ten seconds.";

const OF: &str = "footprint";
/// From the first checkpoint to where touched pages are counted from, and from there to the measurement.
const SETTLES_FOR: Duration = Duration::from_secs(40);
const COUNTS_FOR: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);
/// Bytes: what a process may take.
const GOAL_MB: f64 = 40.0;
const ROWS: u32 = 1_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Runs; the middle one is told
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
}

impl Args {
    /// What a run without a command takes.
    pub(crate) fn moderate() -> Self {
        Self { repeat: 3 }
    }
}

/// What a process takes, MB of 1,000,000 bytes.
#[derive(Clone, Copy, Debug)]
struct Memory {
    resident: f64,
    proportional: f64,
    /// Of what is resident, what is not in a file.
    anonymous: f64,
    /// Touched since [`forget_use`].
    in_use: f64,
    threads: f64,
}

/// Begins to count anew which pages a process touches.
fn forget_use(run: &Run) -> Result<()> {
    const ALL_PAGES: &str = "1";
    fs::write(format!("/proc/{}/clear_refs", run.pid()), ALL_PAGES).context("forget which pages were touched")
}

impl Memory {
    fn of(run: &Run) -> Result<Self> {
        let pid = run.pid();
        let read =
            |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).with_context(|| format!("read {name}"));
        let (rollup, status) = (read("smaps_rollup")?, read("status")?);
        let field = |text: &str, name: &str| -> Result<f64> {
            let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
            let number = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
            number.with_context(|| format!("no {name} of process {pid}"))
        };
        let mb = |name: &str| Ok::<_, anyhow::Error>(field(&rollup, name)? * 1024.0 / 1e6);
        Ok(Self {
            resident: mb("Rss")?,
            proportional: mb("Pss")?,
            anonymous: mb("Anonymous")?,
            in_use: mb("Referenced")?,
            threads: field(&status, "Threads")?,
        })
    }
}

pub(crate) fn bench(args: &Args, report: &mut Report) -> Result<()> {
    let mut measured = Vec::new();
    for number in 1..=args.repeat {
        report.doing(&format!("footprint: run {number} of {}", args.repeat));
        let [coordinator, worker] = measure()?;
        for (name, memory) in [("coordinator", &coordinator), ("worker", &worker)] {
            report.run(json!({
                "footprint": name, "residentMb": rounded(memory.resident), "proportionalMb": rounded(memory.proportional),
                "anonymousMb": rounded(memory.anonymous), "inUseMb": rounded(memory.in_use), "threads": memory.threads,
            }));
        }
        measured.push([coordinator, worker]);
    }
    for (n, name) in ["coordinator", "worker"].into_iter().enumerate() {
        let spread = |of: fn(&Memory) -> f64| Spread::of(measured.iter().map(|m| of(&m[n])));
        for (what, values, goal) in [
            ("resident", spread(|m| m.resident), Some(GOAL_MB)),
            ("proportional", spread(|m| m.proportional), None),
            ("not in a file", spread(|m| m.anonymous), None),
            ("in use", spread(|m| m.in_use), None),
        ] {
            if let Some(values) = values {
                report.add(Figure::median(OF, name, what, &values, "MB").at_most(goal));
            }
        }
    }
    Ok(())
}

/// A coordinator and its worker, at rest.
fn measure() -> Result<[Memory; 2]> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    fs::create_dir_all(path("orders"))?;
    let line = |n: u32| {
        format!("{{\"shop\":\"shop-{}\",\"amount\":{n},\"placed_at\":\"2026-01-01 00:00:{:02}\"}}\n", n % 100, n % 60)
    };
    fs::write(path("orders/1.json"), (0..ROWS).map(line).collect::<String>())?;
    let sql = format!(
        "CREATE TABLE orders (shop STRING, amount BIGINT, placed_at TIMESTAMP(3),
  WATERMARK FOR placed_at AS placed_at - INTERVAL '4' SECOND)
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json', 'mode' = 'following');
CREATE TABLE turnover (window_start TIMESTAMP(3), shop STRING, orders BIGINT, amount BIGINT)
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json');
INSERT INTO turnover SELECT window_start, shop, count(*), sum(amount)
  FROM TABLE(TUMBLE(TABLE orders, DESCRIPTOR(placed_at), INTERVAL '10' SECOND)) GROUP BY window_start, window_end, shop;",
        path("orders").display(),
        path("turnover").display()
    );
    let mut job = Job::new(folder.path(), "footprint", sql);
    job.parallelism = 1;
    let identities = Identities::issue(&job, path("identities"))?;
    let at = |port| Site { prefix: Vec::new(), host: Ipv4Addr::LOCALHOST, port };
    let site = at(free_port()?);
    let mut coordinator = identities.start_coordinator(&job, "coordinator", &site)?;
    let mut worker = identities.start_worker(&job, "worker", &at(0), &site, 1)?;
    coordinator.until("a checkpoint", PATIENCE, || Ok(job.log()?.last_epoch() > 0))?;
    rest(&mut coordinator, &mut worker, SETTLES_FOR)?;
    for run in [&coordinator, &worker] {
        forget_use(run)?;
    }
    rest(&mut coordinator, &mut worker, COUNTS_FOR)?;
    Ok([Memory::of(&coordinator)?, Memory::of(&worker)?])
}

/// Lets time pass while both run.
fn rest(coordinator: &mut Run, worker: &mut Run, time: Duration) -> Result<()> {
    let until = Instant::now() + time;
    while Instant::now() < until {
        ensure!(
            coordinator.is_running()? && worker.is_running()?,
            "a process has ended:\n{}{}",
            coordinator.log(),
            worker.log()
        );
        sleep(POLL);
    }
    Ok(())
}

/// A port that nobody listens on at this moment.
fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    Ok(listener.local_addr()?.port())
}
