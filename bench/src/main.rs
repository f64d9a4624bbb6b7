//! `make bench`: what an event costs, from Kafka JSON to nowhere, in CPU-seconds per million.
//!
//! A real broker gets a topic of Nexmark events, which each query then reads from beginning to end, bounded, with checkpoints
//! every 10 seconds, as a process of its own. What is counted is that process's user and system time, as it says itself and
//! as the operating system says. CPU-seconds hold on a busy machine; the wall clock does not.

#![allow(clippy::disallowed_methods, reason = "a benchmark measures real time")]

mod flink;
mod load;
mod measure;
mod queries;

use std::{process::ExitCode, time::Instant};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use floodmark_testkit::Kafka;
use serde_json::json;

use crate::{
    measure::{Measured, Setting},
    queries::Query,
};

const TOPIC: &str = "nexmark";
const PARTITIONS: i32 = 4;

/// Measures CPU-seconds per million events.
#[derive(Debug, Parser)]
struct Args {
    /// Events in the topic
    #[arg(long, default_value_t = 10_000_000)]
    events: u64,
    /// Runs of each query
    #[arg(long, default_value_t = 3)]
    repeat: u32,
    /// Queries to run, such as q0,q5
    #[arg(long, value_delimiter = ',', default_values_t = [Query::Q0, Query::Q5])]
    queries: Vec<Query>,
    /// Parallel subtasks
    #[arg(long, default_value_t = 2)]
    parallelism: u32,
    /// From checkpoint to checkpoint; several, such as 1s,1h, are compared
    #[arg(long, value_delimiter = ',', default_values_t = ["10s".to_owned()])]
    interval: Vec<String>,
    /// What keeps state; several, such as heap,rocksdb, are compared
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Backend::Heap])]
    backend: Vec<Backend>,
    /// Fail if a query's median is above its mark
    #[arg(long)]
    assert: bool,
    /// Run this system too, on the same topic and queries
    #[arg(long)]
    peer: Option<Peer>,
}

/// What keeps state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// Memory
    Heap,
    /// RocksDB on local disk, with hot keys in memory
    #[value(name = "rocksdb")]
    RocksDb,
}

/// As manifests have it.
impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Heap => "Heap",
            Self::RocksDb => "RocksDB",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// Apache Flink, as bench/peers/flink/setup.sh has fetched it
    Flink,
}

fn main() -> ExitCode {
    match bench(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// False if a mark was asked for and missed.
fn bench(args: &Args) -> Result<bool> {
    ensure!(args.events > 0 && args.repeat > 0, "--events and --repeat must be at least 1");
    let kafka = Kafka::start().context("start a Kafka broker")?;
    let start = Instant::now();
    eprintln!("loading {} events into a topic with {PARTITIONS} partitions", args.events);
    let bytes = load::load(&kafka, TOPIC, PARTITIONS, args.events)?;
    eprintln!("loaded {:.0} MB in {:.0} s", bytes as f64 / 1e6, start.elapsed().as_secs_f64());
    let mut all = Vec::new();
    // What is compared runs in turn, so that a busy moment of the machine hits all alike.
    for query in &args.queries {
        for run in 1..=args.repeat {
            for (backend, interval) in args.backend.iter().flat_map(|b| args.interval.iter().map(move |i| (*b, i))) {
                let setting = Setting { query: *query, backend, interval };
                let measured = measure::floodmark(&kafka.bootstrap(), TOPIC, &setting, args)?;
                tell(&measured, run);
                all.push(measured);
            }
        }
    }
    if args.peer == Some(Peer::Flink) {
        let flink = flink::Flink::start(args.parallelism)?;
        for query in &args.queries {
            for run in 1..=args.repeat {
                let measured = flink.run(&kafka.bootstrap(), TOPIC, *query, args.events, &args.interval[0])?;
                tell(&measured, run);
                all.push(measured);
            }
        }
    }
    Ok(table(&all, args))
}

/// One JSON line per run on standard output.
fn tell(measured: &Measured, run: u32) {
    println!(
        "{}",
        json!({
            "system": measured.system, "query": measured.query.name(), "setting": measured.setting, "run": run,
            "events": measured.events,
            "cpuSeconds": round(measured.cpu_seconds), "cpuSecondsOfSystem": measured.cpu_seconds_of_system.map(round),
            "cpuSecondsPerMillion": round(measured.per_million()), "wallSeconds": round(measured.wall_seconds),
            "checkpoints": measured.checkpoints, "load": measured.load,
        })
    );
}

fn round(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}

/// Prints a line per system and query; false if `--assert` is given and a mark is missed.
fn table(all: &[Measured], args: &Args) -> bool {
    eprintln!(
        "\n{} Nexmark events, Kafka JSON -> blackhole, parallelism {}, median of {}",
        args.events, args.parallelism, args.repeat
    );
    eprintln!(
        "{:<10} {:<6} {:<24} {:>18} {:>11} {:>10} {:>8} {:>6}",
        "system", "query", "state, checkpoints", "CPU-s per million", "(range)", "events/s", "of first", "mark"
    );
    let mut kept = true;
    let mut groups: Vec<(&str, Query, &str)> = Vec::new();
    for measured in all {
        let group = (measured.system, measured.query, measured.setting.as_str());
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    let mut first: Option<(Query, f64)> = None;
    for (system, query, setting) in groups {
        let runs: Vec<_> =
            all.iter().filter(|m| (m.system, m.query, m.setting.as_str()) == (system, query, setting)).collect();
        let mut costs: Vec<f64> = runs.iter().map(|m| m.per_million()).collect();
        costs.sort_by(f64::total_cmp);
        let median = costs[costs.len() / 2];
        let range = format!("{:.2}-{:.2}", costs[0], costs[costs.len() - 1]);
        let mut rates: Vec<f64> = runs.iter().map(|m| m.events as f64 / m.wall_seconds).collect();
        rates.sort_by(f64::total_cmp);
        let rate = rates[rates.len() / 2];
        // How much of the throughput of the query's first setting is left.
        let of_first = match first {
            Some((of, base)) if of == query => format!("{:.1} %", rate / base * 100.0),
            Some(_) | None => {
                first = Some((query, rate));
                String::new()
            }
        };
        let own = system == measure::FLOODMARK;
        let mark = query.mark().filter(|_| own);
        let missed = mark.is_some_and(|m| median > m);
        kept &= !missed;
        let verdict = mark.map_or_else(String::new, |m| format!("{m:.1}{}", if missed { " missed" } else { " kept" }));
        eprintln!(
            "{system:<10} {:<6} {setting:<24} {median:>18.2} {range:>11} {rate:>10.0} {of_first:>8} {verdict:>6}",
            query.name()
        );
    }
    kept || !args.assert
}
