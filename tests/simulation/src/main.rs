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
use floodmark_simulation::{Options, Report, simulate};
use floodmark_snapshot::Env;

/// Failing seeds that are told; the search goes on no further.
const FAILURES_MAX: usize = 10;

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
        Some(seed) => one(seed, arguments.trace, arguments.calm),
        None => many(&arguments),
    }
}

fn one(seed: u64, trace: bool, calm: bool) -> ExitCode {
    if trace {
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
            .without_time()
            .with_ansi(false)
            .with_writer(std::io::stdout);
        subscriber.init();
    }
    let report = simulate(seed, Options { trace, calm, mutation: None });
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
                    let report = simulate(seed, Options { calm: arguments.calm, ..Options::default() });
                    let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
                    take(&mut total, report);
                    stop.fetch_or(total.failed.len() >= FAILURES_MAX, Ordering::Relaxed);
                    if total.runs.is_multiple_of(100) {
                        eprint!("\r{} of {} seeds, {} failed ", total.runs, arguments.seeds, total.failed.len());
                        let _ = std::io::stderr().flush();
                    }
                }
            });
        }
    });
    let total = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    eprintln!();
    summary(&total, clock.monotonic(), if arguments.calm { " --calm" } else { "" })
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

fn summary(total: &Total, took: Duration, calm: &str) -> ExitCode {
    for (what, count) in &total.counts {
        println!("{count:>12} {what}");
    }
    println!(
        "{} runs, {} million steps, {:.1} hours of virtual time, in {:.1} s",
        total.runs,
        total.polls / 1_000_000,
        total.lasted.as_secs_f64() / 3600.0,
        took.as_secs_f64()
    );
    for report in &total.failed {
        println!("\nFAILED. To see how: cargo run -p floodmark-simulation -- --seed {}{calm} --trace", report.seed);
        print(report);
    }
    if total.failed.is_empty() {
        println!("nothing wrong");
        return ExitCode::SUCCESS;
    }
    ExitCode::FAILURE
}
