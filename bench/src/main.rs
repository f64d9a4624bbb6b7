//! `make bench`: the figures that Floodmark is held to, each measured by one command, beside its goal.
//!
//! `throughput`, `restore`, `recovery`, `rescale` and `footprint` start real processes; `pause` and `incremental` drive a back end in this one,
//! `exchange` both ends of channels. Each figure is told
//! when it is known, and all of them at the end in one table, or as JSON. Nothing here is a test: a busy machine misses goals.
//! CPU-seconds hold on one; the wall clock does not.

#![allow(clippy::disallowed_methods, reason = "a benchmark measures real time")]

mod backend;
mod exchange;
mod footprint;
mod incremental;
mod pause;
mod recovery;
mod report;
mod rescale;
mod restore;
mod rows;
mod throughput;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use mimalloc::MiMalloc;

use crate::report::Report;

/// The one of `floodmark`: what is measured in this process is to cost what it costs there.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Measures what Floodmark is held to. Without a command: everything, in moderate sizes, in about ten minutes.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Write the figures, and what each run came to, into this file as JSON
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fail if a goal is missed
    #[arg(long, global = true)]
    assert: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What an event costs, from Kafka JSON to nowhere: CPU-seconds per million events, and events a second
    #[command(long_about = throughput::ABOUT)]
    Throughput(throughput::Args),
    /// How long a barrier holds a task up, and what the batches behind it take: milliseconds
    #[command(long_about = pause::ABOUT)]
    Pause(pause::Args),
    /// Bytes of an incremental checkpoint against the state that has changed
    #[command(long_about = incremental::ABOUT)]
    Incremental(incremental::Args),
    /// From the start of a process to its first output behind a restore: seconds
    #[command(long_about = restore::ABOUT)]
    Restore(restore::Args),
    /// What a channel between two processes carries and costs, and what one that stands still holds
    #[command(long_about = exchange::ABOUT)]
    Exchange(exchange::Args),
    /// Memory of a coordinator and a worker that have nothing to do: MB
    #[command(long_about = footprint::ABOUT)]
    Footprint(footprint::Args),
    /// From the death of a worker to the first new committed output: seconds
    #[command(long_about = recovery::ABOUT)]
    Recovery(recovery::Args),
    /// How long a job that is brought to another parallelism shows no output: seconds
    #[command(long_about = rescale::ABOUT)]
    Rescale(rescale::Args),
}

fn main() -> ExitCode {
    let args = Args::parse();
    match bench(&args) {
        Ok(report) if args.assert && !report.kept() => ExitCode::FAILURE,
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> Result<Report> {
    let mut report = Report::default();
    // What has been measured before something fails is worth telling.
    let measured = match &args.command {
        Some(Command::Throughput(args)) => throughput::bench(args, &mut report),
        Some(Command::Pause(args)) => pause::bench(args, &mut report),
        Some(Command::Incremental(args)) => incremental::bench(args, &mut report),
        Some(Command::Restore(args)) => restore::bench(args, &mut report),
        Some(Command::Exchange(args)) => exchange::bench(args, &mut report),
        Some(Command::Footprint(args)) => footprint::bench(args, &mut report),
        Some(Command::Recovery(args)) => recovery::bench(args, &mut report),
        Some(Command::Rescale(args)) => rescale::bench(args, &mut report),
        None => everything(&mut report),
    };
    print!("{}", report.table());
    if let Some(path) = &args.json {
        let text = format!("{:#}\n", report.json());
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    measured.map(|()| report)
}

fn everything(report: &mut Report) -> Result<()> {
    pause::bench(&pause::Args::moderate(), report)?;
    incremental::bench(&incremental::Args::moderate(), report)?;
    restore::bench(&restore::Args::moderate(), report)?;
    exchange::bench(&exchange::Args::moderate(), report)?;
    footprint::bench(&footprint::Args::moderate(), report)?;
    recovery::bench(&recovery::Args::moderate(), report)?;
    rescale::bench(&rescale::Args::moderate(), report)?;
    throughput::everything(report)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_declarations_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn sizes_of_a_run_without_a_command_are_what_the_commands_take() {
        let parsed = |words: &[&str]| Args::try_parse_from([&["floodmark-bench"], words].concat()).map(|a| a.command);
        let pause = match parsed(&["pause", "--checkpoints", "50"]) {
            Ok(Some(Command::Pause(args))) => args,
            other => panic!("{other:?}"),
        };
        assert_eq!(format!("{pause:?}"), format!("{:?}", pause::Args::moderate()));
        let incremental = match parsed(&["incremental", "--changed", "1", "--checkpoints", "10"]) {
            Ok(Some(Command::Incremental(args))) => args,
            other => panic!("{other:?}"),
        };
        assert_eq!(format!("{incremental:?}"), format!("{:?}", incremental::Args::moderate()));
        let restore = match parsed(&["restore", "--repeat", "3", "--from", "checkpoint"]) {
            Ok(Some(Command::Restore(args))) => args,
            other => panic!("{other:?}"),
        };
        assert_eq!(format!("{restore:?}"), format!("{:?}", restore::Args::moderate()));
        let exchange = match parsed(&["exchange", "--batches", "1000", "--repeat", "3"]) {
            Ok(Some(Command::Exchange(args))) => args,
            other => panic!("{other:?}"),
        };
        assert_eq!(format!("{exchange:?}"), format!("{:?}", exchange::Args::moderate()));
        let footprint = match parsed(&["footprint", "--repeat", "3"]) {
            Ok(Some(Command::Footprint(args))) => args,
            other => panic!("{other:?}"),
        };
        assert_eq!(format!("{footprint:?}"), format!("{:?}", footprint::Args::moderate()));
        let recovery = match parsed(&["recovery", "--kills", "5", "--spare"]) {
            Ok(Some(Command::Recovery(args))) => args,
            other => panic!("{other:?}"),
        };
        assert_eq!(format!("{recovery:?}"), format!("{:?}", recovery::Args::moderate()));
        let rescale = match parsed(&["rescale", "--repeat", "3"]) {
            Ok(Some(Command::Rescale(args))) => args,
            other => panic!("{other:?}"),
        };
        assert_eq!(format!("{rescale:?}"), format!("{:?}", rescale::Args::moderate()));
    }
}
