//! Runs seeds: one with a trace, or many on all cores with a summary.

use std::{
    collections::BTreeMap,
    io::Write as _,
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use clap::Parser;
use floodmark_simulation::{Options, Report, Topology, simulate};
use floodmark_snapshot::Env;
use tracing_subscriber::{Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// Failing seeds that are told; the search goes on no further.
const FAILURES_MAX: usize = 10;

/// Seeds from one word of progress to the next.
const PROGRESS_EVERY: u64 = 100;

/// Simulates jobs whose storage, broker and processes fail.
#[derive(Parser)]
struct Arguments {
    /// Run this seed alone.
    #[arg(long)]
    seed: Option<u64>,
    /// Print what happens (with --seed).
    #[arg(long)]
    trace: bool,
    /// Without faults: only with savepoints and stops.
    #[arg(long)]
    calm: bool,
    /// Of all topologies just this one.
    #[arg(long, value_parser = topology)]
    topology: Option<Topology>,
    /// Keep keyed state in RocksDB, on a real disk: slow, and the same seed need not give the same run.
    #[arg(long)]
    rocksdb: bool,
    /// Run this many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Threads; all cores if 0.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

fn topology(name: &str) -> Result<Topology, String> {
    let known = || Topology::ALL.map(|t| t.to_string()).join(", ");
    let found = Topology::ALL.into_iter().find(|t| t.to_string().eq_ignore_ascii_case(name));
    found.ok_or_else(|| format!("there is no such topology; there is: {}", known()))
}

impl Arguments {
    fn options(&self) -> Options {
        let Self { trace, calm, topology, rocksdb, .. } = *self;
        Options { trace: trace && self.seed.is_some(), calm, topology, rocksdb, mutation: None, rescales: false }
    }

    /// The command that runs a seed again.
    fn command(&self, seed: u64) -> String {
        let mut command = format!("cargo run -p floodmark-simulation -- --seed {seed}");
        if self.calm {
            command += " --calm";
        }
        if let Some(topology) = self.topology {
            command += &format!(" --topology {topology}");
        }
        if self.rocksdb {
            command += " --rocksdb";
        }
        command + " --trace"
    }
}

#[derive(Default)]
struct Total {
    runs: u64,
    polls: u64,
    lasted: Duration,
    counts: BTreeMap<&'static str, u64>,
    failed: Vec<Report>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.seed {
        Some(seed) => one(seed, arguments.options()),
        None => many(&arguments),
    }
}

fn one(seed: u64, options: Options) -> ExitCode {
    if options.trace {
        // What libraries say of their insides is of no interest.
        let ours = tracing_subscriber::filter::filter_fn(|of| of.target().starts_with("floodmark"));
        let lines = tracing_subscriber::fmt::layer().without_time().with_ansi(false).with_writer(std::io::stdout);
        tracing_subscriber::registry().with(lines.with_filter(ours)).init();
    }
    let report = simulate(seed, options);
    print(&report);
    for (what, count) in &report.counts {
        println!("{count:>9} {what}");
    }
    println!("{} steps, {:?} of virtual time, digest {:016x}", report.polls, report.lasted, report.digest);
    if report.violations.is_empty() {
        println!("seed {seed}: nothing wrong");
        return ExitCode::SUCCESS;
    }
    ExitCode::FAILURE
}

fn print(report: &Report) {
    println!("{}", report.plan.trim_end());
    for violation in &report.violations {
        println!("WRONG: {violation}");
    }
}

fn many(arguments: &Arguments) -> ExitCode {
    let clock = Env::system().clock;
    let (next, stop) = (AtomicU64::new(arguments.from), AtomicBool::new(false));
    let total = Mutex::new(Total::default());
    let end = arguments.from + arguments.seeds;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if arguments.threads == 0 { cores } else { arguments.threads };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let report = simulate(seed, arguments.options());
                    let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
                    take(&mut total, report);
                    stop.fetch_or(total.failed.len() >= FAILURES_MAX, Ordering::Relaxed);
                    if total.runs.is_multiple_of(PROGRESS_EVERY) {
                        let rate = total.runs as f64 / clock.monotonic().as_secs_f64().max(0.001);
                        let failed = total.failed.len();
                        eprint!(
                            "\r{} of {} seeds, {rate:.0} per second, {failed} failed ",
                            total.runs, arguments.seeds
                        );
                        let _ = std::io::stderr().flush();
                    }
                }
            });
        }
    });
    let total = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    eprintln!();
    summary(&total, clock.monotonic(), arguments)
}

fn take(total: &mut Total, report: Report) {
    total.runs += 1;
    total.polls += report.polls;
    total.lasted += report.lasted;
    for (what, count) in &report.counts {
        *total.counts.entry(what).or_default() += count;
    }
    if !report.violations.is_empty() {
        total.failed.push(report);
    }
}

fn summary(total: &Total, took: Duration, arguments: &Arguments) -> ExitCode {
    for (what, count) in &total.counts {
        println!("{count:>12} {what}");
    }
    println!(
        "{} runs, {} million steps, {:.1} hours of virtual time, in {:.1} s: {:.0} runs per second",
        total.runs,
        total.polls / 1_000_000,
        total.lasted.as_secs_f64() / 3600.0,
        took.as_secs_f64(),
        total.runs as f64 / took.as_secs_f64().max(0.001)
    );
    for report in &total.failed {
        println!("\nFAILED. To see how: {}", arguments.command(report.seed));
        print(report);
    }
    if total.failed.is_empty() {
        println!("nothing wrong");
        return ExitCode::SUCCESS;
    }
    ExitCode::FAILURE
}
