//! `restore`: from the start of a process to the first row that it writes behind a restore, and where the time goes.
//!
//! `job` is the job and the run that builds its state up; `start` starts it once more and looks on; `decode` takes state over in this
//! process, without reading it, to tell the back end's share.

mod decode;
mod job;
mod start;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde_json::json;

use self::{
    job::{Built, Snapshot},
    start::{Measured, Start},
};
use crate::{
    backend::Backend,
    report::{Figure, Report, Spread, load_average, rounded},
    rows::check_sizes,
};

const RESTORE: &str = "restore";
/// From the start of the process to the first row, at most, seconds.
const GOAL_SECONDS: f64 = 1.0;
/// Subtasks of the run that builds the state up.
const PARALLELISM: u32 = 2;

pub(crate) const ABOUT: &str = "\
From the start of a process to its first output behind a restore, in seconds.

A job (GROUP BY over --keys keys, parallelism 2, its checkpoints in local files) runs until it has state for every key, takes a
savepoint, and is stopped with a last checkpoint. Then it is started from one of the two, as a new process, at parallelism 2 and 3,
--repeat times each, and ended with SIGKILL. Told is the median (and the range) from the start of the process to the first row on its
standard output, whose values show that the state is back; goal: at most 1 s. Its parts: until the checkpoint log is open (process,
manifest, plan, storage), until tasks run, until the first row. Also: CPU-seconds until then, memory then and at most (MiB), and when
the first checkpoint of the new process is complete, for which all state must have come (checkpoints begin 1 s after the start).
'nothing' starts without a snapshot: what a process takes anyhow. Files are in the page cache.
'in process' takes the same number of keys over from memory, on two threads: decoding and indexing, without reading and
verifying files.";

/// See [`ABOUT`].
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keys in the state
    #[arg(long, default_value_t = 5_000_000)]
    keys: u64,
    /// Starts of each kind
    #[arg(long, default_value_t = 5)]
    repeat: u32,
    /// What is started from
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [From::Nothing, From::Checkpoint, From::Savepoint])]
    from: Vec<From>,
    /// Parallelism of the job that restores
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3])]
    to: Vec<u32>,
    /// What keeps state
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Backend::Heap, Backend::RocksDb])]
    backend: Vec<Backend>,
    /// From checkpoint to checkpoint while state is built up: the shorter, the more files make up the last one
    #[arg(long, default_value = "1s")]
    interval: String,
    /// Rows per second that the job reads once it has been started again
    #[arg(long, default_value_t = 200_000)]
    rate: u64,
}

/// What a job is started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum From {
    /// Without state
    Nothing,
    /// Its last checkpoint, in the back end's own format
    Checkpoint,
    /// A savepoint, in the format that all back ends share
    Savepoint,
}

impl std::fmt::Display for From {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Checkpoint => "checkpoint",
            Self::Savepoint => "savepoint",
        })
    }
}

impl Args {
    pub(crate) fn moderate() -> Self {
        Self {
            keys: 5_000_000,
            repeat: 3,
            from: vec![From::Checkpoint],
            to: vec![2, 3],
            backend: vec![Backend::Heap, Backend::RocksDb],
            interval: "1s".to_owned(),
            rate: 200_000,
        }
    }
}

pub(crate) fn bench(args: &Args, report: &mut Report) -> Result<()> {
    check_sizes(args.keys, args.repeat)?;
    ensure!(args.repeat > 0 && args.rate > 0, "--repeat and --rate must be at least 1");
    for backend in &args.backend {
        processes(args, *backend, report).with_context(|| format!("measure {RESTORE} with {backend}"))?;
        decode::bench(*backend, args.keys, args.repeat, report)?;
    }
    Ok(())
}

fn processes(args: &Args, backend: Backend, report: &mut Report) -> Result<()> {
    report.doing(&format!("{RESTORE}: building up {} keys with {backend}", args.keys));
    let built = Built::new(args.keys, backend, &args.interval)?;
    for (from, snapshot) in [(From::Checkpoint, &built.checkpoint), (From::Savepoint, &built.savepoint)] {
        let setting = format!("{backend}, {from}");
        report.run(json!({
            "figure": RESTORE, "setting": setting, "files": snapshot.files, "bytes": snapshot.bytes, "layers": snapshot.layers,
        }));
    }
    for from in &args.from {
        for to in &args.to {
            let setting = match from {
                From::Nothing => format!("{backend}, {from}, {to} subtasks"),
                From::Checkpoint => built.words(*from, &built.checkpoint, *to),
                From::Savepoint => built.words(*from, &built.savepoint, *to),
            };
            report.doing(&format!("{RESTORE}: {setting}"));
            let mut all = Vec::new();
            for run in 1..=args.repeat {
                let load = load_average();
                let measured = start(&built, *from, *to, args.rate).with_context(|| format!("start {run}"))?;
                report.run(json!({
                    "figure": RESTORE, "setting": setting, "run": run, "load": load,
                    "logOpen": rounded(measured.log_open), "tasksRun": measured.tasks_run.map(rounded),
                    "firstRow": rounded(measured.first_row), "firstCheckpoint": rounded(measured.first_checkpoint),
                    "cpuSeconds": rounded(measured.cpu_seconds),
                    "resident": measured.resident, "residentMost": measured.resident_most,
                }));
                all.push(measured);
            }
            figures(report, &setting, *from, &all);
        }
    }
    Ok(())
}

impl Built {
    /// What is restored how.
    fn words(&self, from: From, snapshot: &Snapshot, to: u32) -> String {
        let Self { backend, keys, .. } = self;
        format!("{backend}, {keys} keys, {from} of {} files, {PARALLELISM} -> {to}", snapshot.files)
    }
}

fn start(built: &Built, from: From, to: u32, rate: u64) -> Result<Measured> {
    let (job, restore) = match from {
        From::Nothing => (built.anew(to, rate)?, None),
        From::Checkpoint => (built.again(to, rate)?, None),
        From::Savepoint => (built.anew(to, rate)?, Some(built.savepoint.location.as_str())),
    };
    Start { job: &job.job, folder: job.folder.path(), restore, restores: from != From::Nothing }.measure()
}

fn figures(report: &mut Report, setting: &str, from: From, all: &[Measured]) {
    let mut add = |what: &str, of: &dyn Fn(&Measured) -> Option<f64>, unit: &'static str, goal: Option<f64>| {
        if let Some(values) = Spread::of(all.iter().filter_map(of)) {
            report.add(Figure::median(RESTORE, setting, what, &values, unit).at_most(goal));
        }
    };
    let goal = (from != From::Nothing).then_some(GOAL_SECONDS);
    add("start to first row", &|m| Some(m.first_row), "s", goal);
    add("  start to log open", &|m| Some(m.log_open), "s", None);
    add("  log open to tasks run", &|m| Some(m.tasks_run? - m.log_open), "s", None);
    add("  tasks run to first row", &|m| Some(m.first_row - m.tasks_run?), "s", None);
    add("CPU until first row", &|m| Some(m.cpu_seconds), "CPU-s", None);
    add("start to first checkpoint complete", &|m| Some(m.first_checkpoint), "s", None);
    add("memory at first row", &|m| Some(mib(m.resident)), "MiB", None);
    add("memory at most", &|m| Some(mib(m.resident_most)), "MiB", None);
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
