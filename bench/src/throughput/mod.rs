//! `throughput`: what an event costs, from Kafka JSON to nowhere, in CPU-seconds per million, and how many come through a second.
//!
//! A real broker gets a topic of Nexmark events, which each query then reads from beginning to end, bounded, as a process of its
//! own. What is counted is that process's user and system time, as it says itself and as the operating system says.

mod flink;
mod load;
mod measure;
mod queries;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use floodmark_crds::HumanDuration;
use floodmark_testkit::Kafka;
use serde_json::json;

use self::{
    measure::{Measured, Setting},
    queries::Query,
};
use crate::{
    backend::Backend,
    report::{Figure, Report, Spread, rounded},
};

const THROUGHPUT: &str = "throughput";
const TOPIC: &str = "nexmark";
const PARTITIONS: i32 = 4;
/// Checkpoints at this interval shall cost little: per cent of the throughput without, at most.
const LOST_INTERVAL: Duration = Duration::from_secs(1);
const LOST_GOAL: f64 = 3.0;
/// How many times as much RocksDB may take as the heap, for queries whose state fits into memory.
const ROCKSDB_GOAL: f64 = 2.0;
const ROCKSDB_QUERIES: [Query; 2] = [Query::Q17, Query::Q18];

pub(crate) const ABOUT: &str = "\
What an event costs, in CPU-seconds per million events, and how many come through, in events a second.

A real Kafka broker gets --events Nexmark events as JSON, in 4 partitions; each query reads them all, into nothing, as a process of
its own. CPU-seconds are user and system time of that process from its start to its end. Goals: q0 at most 1.2, q5 at most 2.0.
Several --interval are compared with the longest one (per cent of throughput lost; goal at 1s: at most 3), and RocksDB with the
heap (times as much; goal for q17 and q18: at most 2). What is compared runs in turn; the figure is the median of the pairs, once
by CPU time, which holds on a busy machine, and once by the clock, which does not.";

/// See [`ABOUT`].
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
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
    /// Run this system too, on the same topic and queries
    #[arg(long)]
    peer: Option<Peer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// Apache Flink, as bench/peers/flink/setup.sh has fetched it
    Flink,
}

/// Events of a run without a command.
const EVENTS_MODERATE: u64 = 3_000_000;
/// Pairs that are compared in a run without a command.
const REPEAT_MODERATE: u32 = 3;

pub(crate) fn bench(args: &Args, report: &mut Report) -> Result<()> {
    ensure!(args.events > 0 && args.repeat > 0, "--events and --repeat must be at least 1");
    for interval in &args.interval {
        parsed(interval)?;
    }
    let source = Source::load(args.events, args.parallelism, report)?;
    let compared = Compared { queries: &args.queries, intervals: &args.interval, backends: &args.backend };
    source.compare(compared, args.repeat, report)?;
    if args.peer == Some(Peer::Flink) {
        source.flink(&args.queries, &args.interval[0], args.repeat, report)?;
    }
    Ok(())
}

/// All that has a goal, in moderate size.
pub(crate) fn everything(report: &mut Report) -> Result<()> {
    let source = Source::load(EVENTS_MODERATE, 2, report)?;
    let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
    let (usual, often) = (words(&["10s"]), words(&["1s", "1h"]));
    let heap = [Backend::Heap];
    let both = [Backend::Heap, Backend::RocksDb];
    for compared in [
        Compared { queries: &[Query::Q0], intervals: &usual, backends: &heap },
        Compared { queries: &[Query::Q5], intervals: &often, backends: &heap },
        Compared { queries: &ROCKSDB_QUERIES, intervals: &usual, backends: &both },
    ] {
        source.compare(compared, REPEAT_MODERATE, report)?;
    }
    Ok(())
}

fn parsed(interval: &str) -> Result<Duration> {
    let duration: HumanDuration = interval.parse().with_context(|| format!("--interval {interval}"))?;
    Ok(duration.get())
}

/// A topic full of events.
struct Source {
    kafka: Kafka,
    events: u64,
    parallelism: u32,
}

/// What is run in turn.
struct Compared<'a> {
    queries: &'a [Query],
    intervals: &'a [String],
    backends: &'a [Backend],
}

impl Source {
    fn load(events: u64, parallelism: u32, report: &Report) -> Result<Self> {
        let kafka = Kafka::start().context("start a Kafka broker")?;
        report.doing(&format!("{THROUGHPUT}: loading {events} events into a topic with {PARTITIONS} partitions"));
        let start = Instant::now();
        let bytes = load::load(&kafka, TOPIC, PARTITIONS, events)?;
        eprintln!("  {:.0} MB in {:.0} s", bytes as f64 / 1e6, start.elapsed().as_secs_f64());
        Ok(Self { kafka, events, parallelism })
    }

    fn compare(&self, compared: Compared<'_>, repeat: u32, report: &mut Report) -> Result<()> {
        let Compared { queries, intervals, backends } = compared;
        for query in queries {
            // What is compared runs in turn, so that a busy moment of the machine hits all alike.
            let mut settings: Vec<(Setting<'_>, Vec<Measured>)> = Vec::new();
            for backend in backends {
                for interval in intervals {
                    settings.push((Setting { query: *query, backend: *backend, interval }, Vec::new()));
                }
            }
            for run in 1..=repeat {
                for (setting, runs) in &mut settings {
                    let measured =
                        measure::floodmark(&self.kafka.bootstrap(), TOPIC, setting, self.parallelism, self.events)?;
                    tell(&measured, run, report);
                    runs.push(measured);
                }
            }
            for (setting, runs) in &settings {
                cost(runs, setting.query.mark(), report);
            }
            compare_intervals(&settings, report)?;
            compare_backends(&settings, report);
        }
        Ok(())
    }

    fn flink(&self, queries: &[Query], interval: &str, repeat: u32, report: &mut Report) -> Result<()> {
        let flink = flink::Flink::start(self.parallelism)?;
        for query in queries {
            let mut runs = Vec::new();
            for run in 1..=repeat {
                let measured = flink.run(&self.kafka.bootstrap(), TOPIC, *query, self.events, interval)?;
                tell(&measured, run, report);
                runs.push(measured);
            }
            cost(&runs, None, report);
        }
        Ok(())
    }
}

fn tell(measured: &Measured, run: u32, report: &mut Report) {
    report.run(json!({
        "figure": THROUGHPUT,
        "system": measured.system, "query": measured.query.name(), "setting": measured.setting, "run": run,
        "events": measured.events,
        "cpuSeconds": rounded(measured.cpu_seconds), "cpuSecondsOfSystem": measured.cpu_seconds_of_system.map(rounded),
        "cpuSecondsPerMillion": rounded(measured.per_million()), "wallSeconds": rounded(measured.wall_seconds),
        "checkpoints": measured.checkpoints, "load": measured.load,
    }));
}

/// What one setting's runs cost.
fn cost(runs: &[Measured], mark: Option<f64>, report: &mut Report) {
    let (Some(first), Some(costs), Some(rates)) = (
        runs.first(),
        Spread::of(runs.iter().map(Measured::per_million)),
        Spread::of(runs.iter().map(|m| m.per_second() / 1e3)),
    ) else {
        return;
    };
    let setting = format!("{}, {}, {}", first.system, first.query, first.setting);
    report.add(Figure::median(THROUGHPUT, &setting, "cost", &costs, "CPU-s per M events").at_most(mark));
    report.add(Figure::median(THROUGHPUT, &setting, "rate", &rates, "k events/s"));
}

/// How much of the throughput of the longest interval the others lose, a back end at a time.
fn compare_intervals(settings: &[(Setting<'_>, Vec<Measured>)], report: &mut Report) -> Result<()> {
    for (setting, runs) in settings {
        let mut base: Option<(Duration, &Setting<'_>, &[Measured])> = None;
        for (other, others) in settings.iter().filter(|(other, _)| other.backend == setting.backend) {
            let interval = parsed(other.interval)?;
            if base.is_none_or(|(longest, ..)| interval > longest) {
                base = Some((interval, other, others));
            }
        }
        let Some((_, base, bases)) = base.filter(|(_, base, _)| base.interval != setting.interval) else { continue };
        let goal = (parsed(setting.interval)? == LOST_INTERVAL).then_some(LOST_GOAL);
        let lost = |left: &dyn Fn(&Measured, &Measured) -> f64| {
            Spread::of(runs.iter().zip(bases).map(|(run, base)| 100.0 * (1.0 - left(run, base))))
        };
        let by_cpu = lost(&|run, base| base.cpu_seconds / run.cpu_seconds);
        let by_clock = lost(&|run, base| base.wall_seconds / run.wall_seconds);
        for (by, values) in [("CPU time", by_cpu), ("the clock", by_clock)] {
            let Some(values) = values else { continue };
            let what = format!("throughput lost against {}, by {by}", base.interval);
            let setting = format!("{}, {}, {}", setting.query, setting.backend, setting.interval);
            report.add(Figure::median(THROUGHPUT, setting, what, &values, "%").at_most(goal));
        }
    }
    Ok(())
}

/// How many times as much RocksDB takes as the heap.
fn compare_backends(settings: &[(Setting<'_>, Vec<Measured>)], report: &mut Report) {
    for (setting, runs) in settings.iter().filter(|(s, _)| s.backend == Backend::RocksDb) {
        let heap = settings.iter().find(|(s, _)| s.backend == Backend::Heap && s.interval == setting.interval);
        let Some((_, bases)) = heap else { continue };
        let goal = ROCKSDB_QUERIES.contains(&setting.query).then_some(ROCKSDB_GOAL);
        let pairs = || runs.iter().zip(bases);
        let by_cpu = Spread::of(pairs().map(|(run, base)| run.cpu_seconds / base.cpu_seconds));
        let by_clock = Spread::of(pairs().map(|(run, base)| run.wall_seconds / base.wall_seconds));
        for (by, values) in [("CPU time", by_cpu), ("the clock", by_clock)] {
            let Some(values) = values else { continue };
            let what = format!("RocksDB against heap, by {by}");
            let setting = format!("{}, {}", setting.query, setting.interval);
            report.add(Figure::median(THROUGHPUT, setting, what, &values, "x").at_most(goal));
        }
    }
}
