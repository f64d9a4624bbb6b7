//! `recovery`: from the death of a worker, or of the coordinator, to the first output that the job makes visible after it, over real processes, a real Kafka
//! broker and a real S3 server.
//!
//! `world` is the job with its processes, servers and input; `watch` looks at its output as any reader does.

mod watch;
pub(crate) mod world;

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use floodmark_crds::HumanDuration;
use floodmark_tests::events::Draw;
use serde_json::json;

use self::world::{Setup, World};
use crate::{
    backend::Backend,
    report::{Figure, Report, Spread, load_average, rounded},
};

const RECOVERY: &str = "recovery";
/// Workers that have a part of the job; one of them dies.
const WORKERS: u32 = 3;
/// From the kill to the first new output, seconds, of a worker for which another stands by; of one for which none does, or of a
/// coordinator.
const GOAL_SPARE_SECONDS: f64 = 1.0;
const GOAL_SECONDS: f64 = 2.0;
/// How long a recovery may take before it counts for a hang.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the checkpoint log is looked at: only for its parts, the output has its own clock.
const POLL: Duration = Duration::from_millis(20);
/// Checkpoints that the job completes from one kill's recovery to the next kill.
const CALM_CHECKPOINTS: usize = 2;

pub(crate) const ABOUT: &str = "\
From `kill -9` of one of three workers, or of the coordinator, to the first new committed output, in seconds.

`floodmark coordinator` and three `floodmark worker` (one slot each) run GROUP BY over as many keys as make --state-mb of checkpoint
files, from Kafka JSON to exactly-once upserts in Kafka, on a real broker; checkpoints go to a real S3 server. --rate events a second
keep coming. At a random moment of the interval a worker that has a part of the job is killed. The figure is the time from then to the
moment at which a reader of committed records gets the first one that a checkpoint of the new attempt holds: output that was staged
before the kill, and is only made visible after it, does not count. Goal: median at most 2 s; with --spare (a fourth worker waits with
a free slot) at most 1 s. Another worker is started after each recovery. Parts: until the new attempt is in the checkpoint log (the
loss seen, the old attempt ended, workers placed), until its first checkpoint is triggered (state back, old output committed), until
that is complete, until its output is seen.

With --victim coordinator, the coordinator is killed each time, and another that stands by (--standby-lock) takes over; workers stay,
and what they have copies of is read from there. Goal: median at most 2 s.";

/// See [`ABOUT`].
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How often one is killed
    #[arg(long, default_value_t = 20)]
    kills: u32,
    /// What is killed
    #[arg(long, value_enum, default_value_t = Victim::Worker)]
    victim: Victim,
    /// Size of the state, MB of checkpoint files, about
    #[arg(long, default_value_t = 100)]
    state_mb: u64,
    /// Let a fourth worker wait with a free slot
    #[arg(long)]
    spare: bool,
    /// What keeps state
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Backend::Heap])]
    backend: Vec<Backend>,
    /// Where checkpoints are kept
    #[arg(long, value_enum, default_value_t = Storage::S3)]
    storage: Storage,
    /// From checkpoint to checkpoint
    #[arg(long, default_value = "1s")]
    interval: String,
    /// Events a second
    #[arg(long, default_value_t = 5_000)]
    rate: u64,
}

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Victim {
    /// One of the workers, in turn
    Worker,
    /// The coordinator that leads; another stands by
    Coordinator,
}

/// Where checkpoints are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Storage {
    /// In an S3 server of this machine
    S3,
    /// In local files
    Files,
}

impl std::fmt::Display for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::S3 => "S3",
            Self::Files => "files",
        })
    }
}

impl Args {
    pub(crate) fn moderate() -> Self {
        Self {
            kills: 5,
            victim: Victim::Worker,
            state_mb: 100,
            spare: true,
            backend: vec![Backend::Heap],
            storage: Storage::S3,
            interval: "1s".to_owned(),
            rate: 5_000,
        }
    }
}

pub(crate) fn bench(args: &Args, report: &mut Report) -> Result<()> {
    ensure!(args.kills > 0 && args.state_mb > 0 && args.rate > 0, "--kills, --state-mb and --rate must be at least 1");
    let interval: HumanDuration = args.interval.parse().with_context(|| format!("--interval {}", args.interval))?;
    for backend in &args.backend {
        let measured = kills(args, *backend, interval.get(), report);
        measured.with_context(|| format!("measure {RECOVERY} with {backend}"))?;
    }
    Ok(())
}

/// One recovery, seconds from the kill; the parts are those of the checkpoint log, by the wall clock.
#[derive(Clone, Debug)]
struct Measured {
    first_output: f64,
    opened: Option<f64>,
    triggered: Option<f64>,
    completed: Option<f64>,
}

fn kills(args: &Args, backend: Backend, interval: Duration, report: &mut Report) -> Result<()> {
    let spare = if args.spare { " + 1" } else { "" };
    let killed = match args.victim {
        Victim::Worker => "",
        Victim::Coordinator => "coordinator killed, ",
    };
    report.doing(&format!("{RECOVERY}: building up {} MB with {backend}", args.state_mb));
    let mut world = World::build(Setup {
        backend,
        state_mb: args.state_mb,
        text: 0,
        parallelism: WORKERS,
        workers: WORKERS + u32::from(args.spare),
        slots: 1,
        storage: args.storage,
        interval: args.interval.clone(),
        rate: args.rate,
        exactly_once: true,
        standby: args.victim == Victim::Coordinator,
    })?;
    let state_mb = world.state_bytes()? as f64 / 1e6;
    let Args { storage, rate, .. } = args;
    let setting =
        format!("{backend}, {killed}{WORKERS}{spare} workers, {state_mb:.0} MB in {storage}, {rate} events/s");
    report.doing(&format!("{RECOVERY}: {setting}"));
    let (mut draw, mut all) = (Draw::new(7), Vec::new());
    for kill in 1..=args.kills {
        world.calm(CALM_CHECKPOINTS)?;
        // Kills fall anywhere between two checkpoints.
        std::thread::sleep(interval.mul_f64(draw.below(1_000) as f64 / 1_000.0));
        let load = load_average();
        let measured = recovery(&mut world, args.victim).with_context(|| format!("kill {kill}"))?;
        report.run(json!({
            "figure": RECOVERY, "setting": setting, "kill": kill, "load": load,
            "firstOutput": rounded(measured.first_output), "opened": measured.opened.map(rounded),
            "triggered": measured.triggered.map(rounded), "completed": measured.completed.map(rounded),
        }));
        all.push(measured);
        match args.victim {
            Victim::Worker => world.add_worker()?,
            Victim::Coordinator => world.add_standby()?,
        }
    }
    let spared = args.spare && args.victim == Victim::Worker;
    figures(report, &setting, if spared { GOAL_SPARE_SECONDS } else { GOAL_SECONDS }, &all);
    world.end()
}

/// Kills one, and waits for output of the next attempt.
fn recovery(world: &mut World, victim: Victim) -> Result<Measured> {
    let mut old = world.checkpoints()?.newest().context("it has no checkpoint")?;
    let (wall, start) = (SystemTime::now(), Instant::now());
    match victim {
        Victim::Worker => world.kill_worker()?,
        Victim::Coordinator => world.kill_coordinator()?,
    }
    loop {
        ensure!(start.elapsed() < PATIENCE, "no new output within {PATIENCE:?}; {}", world.logs());
        std::thread::sleep(POLL);
        // It may be read in the middle of a change.
        let Ok(checkpoints) = world.checkpoints() else { continue };
        if let Some(newer) = checkpoints.newest_of(old.attempt) {
            old = newer;
        }
        let Some(first) = checkpoints.first_after(old.attempt) else { continue };
        let Some(seen) = world.first_beyond(&old, start) else { continue };
        let since = |ms: Option<i64>| ms.map(|ms| ms as f64 / 1e3 - epoch_seconds(wall));
        return Ok(Measured {
            first_output: seen.duration_since(start).as_secs_f64(),
            opened: since(checkpoints.opened_after(old.attempt)),
            triggered: since(Some(first.triggered_at_ms)),
            completed: since(Some(first.written_at_ms)),
        });
    }
}

fn epoch_seconds(wall: SystemTime) -> f64 {
    wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn figures(report: &mut Report, setting: &str, goal: f64, all: &[Measured]) {
    let mut add = |what: &str, of: &dyn Fn(&Measured) -> Option<f64>, goal: Option<f64>| {
        if let Some(values) = Spread::of(all.iter().filter_map(of)) {
            report.add(Figure::median(RECOVERY, setting, what, &values, "s").at_most(goal));
        }
    };
    add(&format!("kill to first new output, median of {}", all.len()), &|m| Some(m.first_output), Some(goal));
    add("  kill to new attempt in the log", &|m| m.opened, None);
    add("  new attempt to first trigger", &|m| Some(m.triggered? - m.opened?), None);
    add("  trigger to complete", &|m| Some(m.completed? - m.triggered?), None);
    add("  complete to output seen", &|m| Some(m.first_output - m.completed?), None);
    if let Some(values) = Spread::of(all.iter().map(|m| m.first_output)) {
        report.add(Figure::new(RECOVERY, setting, "kill to first new output, worst", values.at(1.0), "s"));
    }
}
