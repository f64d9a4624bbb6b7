//! One run of one query, as a process of its own, and what it cost.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use floodmark_tests::job::Job;
use nix::sys::resource::{UsageWho, getrusage};

use super::queries::Query;
use crate::{backend::Backend, report::load_average};

/// Name of the system that is measured.
pub(crate) const FLOODMARK: &str = "floodmark";
/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(1_800);
/// What the process says of its time and what the operating system says may differ by this: its start and end, seconds.
const START_AND_END: f64 = 0.5;

/// What is run, and how.
pub(crate) struct Setting<'a> {
    pub(crate) query: Query,
    pub(crate) backend: Backend,
    /// From checkpoint to checkpoint.
    pub(crate) interval: &'a str,
}

/// What a run cost.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) system: &'static str,
    pub(crate) query: Query,
    /// How it was run, in words.
    pub(crate) setting: String,
    pub(crate) events: u64,
    /// User and system time of the process or processes under test.
    pub(crate) cpu_seconds: f64,
    /// The same as the operating system has it, where it was asked.
    pub(crate) cpu_seconds_of_system: Option<f64>,
    pub(crate) wall_seconds: f64,
    pub(crate) checkpoints: u64,
    /// The machine's load average at the start: others' work slows this one's down.
    pub(crate) load: f64,
}

impl Measured {
    /// CPU-seconds per million events.
    pub(crate) fn per_million(&self) -> f64 {
        self.cpu_seconds / self.events as f64 * 1e6
    }

    /// Events a second.
    pub(crate) fn per_second(&self) -> f64 {
        self.events as f64 / self.wall_seconds
    }
}

/// Runs a query with Floodmark.
pub(crate) fn floodmark(
    bootstrap: &str,
    topic: &str,
    setting: &Setting<'_>,
    parallelism: u32,
    events: u64,
) -> Result<Measured> {
    let Setting { query, backend, interval } = *setting;
    let folder = tempfile::tempdir()?;
    let sql: String = query.statements(bootstrap, topic).iter().map(|s| format!("{s};\n")).collect();
    let mut job = Job::new(folder.path(), query.name(), sql);
    job.parallelism = parallelism;
    interval.clone_into(&mut job.interval);
    job.spec = format!("  state:\n    backend: {backend}\n");
    let (load, before, start) = (load_average(), cpu_of_children()?, Instant::now());
    let ended = job.start()?.wait(PATIENCE)?;
    let (wall_seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_of_children()? - before);
    let summary = ended.ok("finished")?;
    let read = summary.rows_in.get("nexmark").copied().context("the summary does not count table nexmark")?;
    ensure!(read == events, "{} read {read} events instead of {}", query.name(), events);
    ensure!(
        (summary.cpu_seconds - cpu).abs() < START_AND_END + cpu * 0.05,
        "the process says it took {:.2} CPU-seconds, the operating system says {cpu:.2}",
        summary.cpu_seconds
    );
    Ok(Measured {
        system: FLOODMARK,
        query,
        setting: format!("{backend}, {interval}"),
        events,
        cpu_seconds: summary.cpu_seconds,
        cpu_seconds_of_system: Some(cpu),
        wall_seconds,
        checkpoints: summary.checkpoints.completed,
        load,
    })
}

/// User and system time of all children that have been waited for.
fn cpu_of_children() -> Result<f64> {
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("read resource usage")?;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}
