//! `pause`: how long a barrier holds a task up. In this process, on one state; encoding goes on in another thread meanwhile, as
//! in a job.

use anyhow::{Context as _, Result, anyhow};
use floodmark_snapshot::{Env, env::spawn_thread};
use floodmark_testkit::scratch;
use serde_json::json;

use crate::{
    backend::Backend,
    report::{Figure, Report, Spread, rounded},
    rows::{Filled, Random, Took, Values, check_sizes, resident, timed},
};

const PAUSE: &str = "pause";
/// What a barrier may hold a task up at most, milliseconds, in 99 of 100 cases.
const GOAL_MS: f64 = 5.0;
/// Keys of a batch.
const BATCH: usize = 1_000;
/// Batches between two barriers, at least.
const BATCHES_BETWEEN: u32 = 50;
/// Batches behind the end of the writing that still count as being beside it: what it has put off comes then.
const BATCHES_AFTER: u32 = 8;
/// Batches for the rates, and without a checkpoint.
const BATCHES_QUIET: usize = 1_000;
/// Keys that stay in memory with any back end.
const HOT_KEYS: u64 = 200_000;

pub(crate) const ABOUT: &str = "\
How long a barrier holds a task up, in milliseconds.

One state of --keys keys (16 bytes each, with 64 bytes of values) in this process takes batches of 1,000 random keys, each of
which reads, changes and writes its rows. Between batches comes a barrier: the snapshot is taken, and encoded by another thread
while batches go on. The pause is the time of the snapshot, and what the first batch behind it, which pays for what the snapshot
holds, takes beyond the usual (the median without a checkpoint). Goal: 99 of 100 pauses are at most 5 ms. Also told: the barrier
alone; batches with and without a checkpoint under way; each also without the time in which this thread waited for a processor (on
a busy machine that is what counts); the rates of filling and of changing all and hot keys, thousands of rows per second; memory,
bytes per key.";

/// See [`ABOUT`].
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keys in the state
    #[arg(long, default_value_t = 5_000_000)]
    keys: u64,
    /// Checkpoints of each back end
    #[arg(long, default_value_t = 200)]
    checkpoints: u32,
    /// What keeps state
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Backend::Heap, Backend::RocksDb])]
    backend: Vec<Backend>,
    /// What the values are
    #[arg(long, value_enum, default_value_t = Values::Numbers)]
    values: Values,
}

impl Args {
    pub(crate) fn moderate() -> Self {
        Self {
            keys: 5_000_000,
            checkpoints: 50,
            backend: vec![Backend::Heap, Backend::RocksDb],
            values: Values::Numbers,
        }
    }
}

pub(crate) fn bench(args: &Args, report: &mut Report) -> Result<()> {
    check_sizes(args.keys, args.checkpoints)?;
    for backend in &args.backend {
        one(args, *backend, report).with_context(|| format!("measure {PAUSE} with {backend}"))?;
    }
    Ok(())
}

fn one(args: &Args, backend: Backend, report: &mut Report) -> Result<()> {
    let setting = format!("{backend}, {} keys", args.keys);
    report.doing(&format!("{PAUSE}: {setting} of {}, {} checkpoints", args.values, args.checkpoints));
    let (env, folder) = (Env::system(), scratch::folder("pause-")?);
    let opened = backend.open(folder.path(), &env)?;
    let before = resident();
    let mut filled = Filled::empty(&*opened, &env, args.values, args.keys, (0, 1))?;
    let took = filled.fill()?;
    let rate = |rows: f64, took: Took| rows / took.net.as_secs_f64() / 1e3;
    let add = |report: &mut Report, what: &str, value: f64, unit: &'static str| {
        report.add(Figure::new(PAUSE, &setting, what, value, unit));
    };
    add(report, "new keys", rate(args.keys as f64, took), "k rows/s");
    add(report, "memory", resident().saturating_sub(before) as f64 / args.keys as f64, "bytes/key");

    let mut random = Random::new(7);
    let mut usual = Took::default();
    for (what, keys) in [("hot keys", HOT_KEYS.min(args.keys)), ("all keys", args.keys)] {
        let quiet = quiet(&mut filled, &mut random, keys)?;
        let all = quiet.iter().copied().fold(Took::default(), Took::and);
        add(report, &format!("changes of {what}"), rate((quiet.len() * BATCH) as f64, all), "k rows/s");
        spread(report, &setting, &format!("batch of {what}"), &quiet, None);
        usual = Took::median(&quiet);
    }
    let measured = checkpoints(&mut filled, &mut random, args.checkpoints)?;
    let pauses = measured.barriers.iter().zip(&measured.firsts);
    let pauses: Vec<Took> = pauses.map(|(barrier, first)| barrier.and(first.beyond(usual))).collect();
    spread(report, &setting, "barrier", &measured.barriers, None);
    spread(report, &setting, "pause", &pauses, Some(GOAL_MS));
    spread(report, &setting, "first batch behind a barrier", &measured.firsts, None);
    spread(report, &setting, "batch while it is written", &measured.behind, None);
    let middle = |values: &[f64]| Spread::of(values.iter().copied()).map_or(0.0, |s| s.at(0.5));
    report.run(json!({
        "figure": PAUSE, "setting": setting, "checkpoints": args.checkpoints,
        "megabytes": rounded(middle(&measured.megabytes)), "writeSeconds": rounded(middle(&measured.seconds)),
        "batchesBehind": measured.behind.len(), "bytesResident": resident().saturating_sub(before),
    }));
    Ok(())
}

/// Batches without a checkpoint.
fn quiet(filled: &mut Filled, random: &mut Random, keys: u64) -> Result<Vec<Took>> {
    // What is kept in memory comes there first.
    for _ in 0..BATCHES_QUIET {
        filled.change_random(random, BATCH, keys)?;
    }
    (0..BATCHES_QUIET).map(|_| filled.change_random(random, BATCH, keys)).collect()
}

#[derive(Default)]
struct Measured {
    barriers: Vec<Took>,
    /// The first batch behind each.
    firsts: Vec<Took>,
    behind: Vec<Took>,
    /// What each checkpoint wrote, and how long that took.
    megabytes: Vec<f64>,
    seconds: Vec<f64>,
}

fn checkpoints(filled: &mut Filled, random: &mut Random, count: u32) -> Result<Measured> {
    let mut measured = Measured::default();
    // The first one writes everything; it is no rule.
    filled.checkpoint()?;
    for _ in 0..count {
        for _ in 0..BATCHES_BETWEEN {
            filled.change_random(random, BATCH, filled.keys)?;
        }
        let (under_way, barrier) = filled.barrier()?;
        // A started thread is no part of the pause: a job has one at hand.
        let writer = spawn_thread("writer".into(), move || timed(|| under_way.write().map(|w| w.bytes)))?;
        let first = filled.change_random(random, BATCH, filled.keys)?;
        measured.barriers.push(barrier);
        measured.firsts.push(first);
        let mut more = BATCHES_AFTER;
        while more > 0 {
            more -= u32::from(writer.is_finished());
            measured.behind.push(filled.change_random(random, BATCH, filled.keys)?);
        }
        let (bytes, took) = writer.join().map_err(|_| anyhow!("a writer panicked"))?;
        measured.megabytes.push(bytes? as f64 / 1e6);
        measured.seconds.push(took.wall.as_secs_f64());
        filled.completed()?;
    }
    Ok(measured)
}

/// The middle, the 99th of a hundred and the longest, by the clock, and the 99th net of waiting; a goal is the 99th's.
fn spread(report: &mut Report, setting: &str, what: &str, took: &[Took], goal: Option<f64>) {
    let (Some(wall), Some(net)) =
        (Spread::of(took.iter().map(|t| t.ms())), Spread::of(took.iter().map(|t| t.net_ms())))
    else {
        return;
    };
    report.add(Figure::median(PAUSE, setting, format!("{what}, median of {}", took.len()), &wall, "ms"));
    report.add(Figure::new(PAUSE, setting, format!("{what}, 99 %"), wall.at(0.99), "ms").at_most(goal));
    let what = format!("{what}, 99 %, without waiting for a processor");
    report.add(Figure::new(PAUSE, setting, what, net.at(0.99), "ms").at_most(goal));
}
