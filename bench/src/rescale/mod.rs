//! `rescale`: how long a job that is brought to another parallelism shows no output, over real processes and a real Kafka broker. The
//! job and its surroundings are those of `recovery`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use floodmark_crds::HumanDuration;
use floodmark_tests::events::Draw;
use serde_json::json;

use crate::{
    backend::Backend,
    recovery::{
        Storage,
        world::{Setup, World},
    },
    report::{Figure, Report, Spread, load_average, rounded},
};

const RESCALE: &str = "rescale";
/// Processes that have a part of the job, each with room for [`SLOTS`] subtasks of each task.
const WORKERS: u32 = 2;
const SLOTS: u32 = 2;
/// Without new output, at most, seconds.
const GOAL_SECONDS: f64 = 2.0;
/// How long a rescale may take before it counts for a hang.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often the checkpoint log is looked at: only for the parts, the output has its own clock.
const POLL: Duration = Duration::from_millis(20);
/// Output is looked at from so long before an order on: it has begun its pause by then, or not.
const BEFORE: Duration = Duration::from_millis(1_500);
/// Checkpoints that the job completes between two rescales.
const CALM_CHECKPOINTS: usize = 3;

pub(crate) const ABOUT: &str = "\
Without new output while a job is brought to another parallelism, in seconds.

`floodmark coordinator` and two `floodmark worker` (two slots each) run GROUP BY over as many keys as make --state-mb of checkpoint
files, --text characters of them a key, from Kafka JSON to exactly-once upserts in Kafka, on a real broker; checkpoints go to local
files. --rate events a second keep coming. `floodmark rescale` brings the job from the first of --steps to the second, and so on, round
and round (of `2,4,3`: 2 -> 4, 4 -> 3, 3 -> 2), at random moments of the checkpoint interval. The pause is the longest time in which a
reader of committed records gets none, from the order on until the first one that tells of an event which the old attempt's last
checkpoint does not hold: that has gone through the new tasks, a checkpoint and a transaction. Between checkpoints there is none
either: told beside it is the median pause while nothing happens. Goal: at most 2 s, each time. In the end the input stops, and the
totals of all keys must be those of all events, and no record may have come twice. Parts: from the trigger of the last checkpoint,
behind which sources read no more, until that is complete, until the next attempt is in the log (output committed, tasks ended), until
its first checkpoint is triggered (deployed, all state back), until that is complete, until its output is seen.
With --delivery at-least-once rows become visible as they are processed: then it is the pause of the processing.";

/// See [`ABOUT`].
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Size of the state, MB of checkpoint files, about
    #[arg(long, default_value_t = 1_000)]
    state_mb: u64,
    /// Characters of text that the state has for each key
    #[arg(long, default_value_t = 500)]
    text: usize,
    /// The job's parallelisms, one after the other
    #[arg(long, value_delimiter = ',', default_values_t = [2, 4, 3])]
    steps: Vec<u32>,
    /// Rescales
    #[arg(long, default_value_t = 9)]
    repeat: u32,
    /// What keeps state
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Backend::Heap])]
    backend: Vec<Backend>,
    /// From checkpoint to checkpoint
    #[arg(long, default_value = "1s")]
    interval: String,
    /// Events a second
    #[arg(long, default_value_t = 5_000)]
    rate: u64,
    /// When output becomes visible
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Delivery::ExactlyOnce])]
    delivery: Vec<Delivery>,
}

/// When output becomes visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Delivery {
    /// Once per checkpoint, in transactions
    ExactlyOnce,
    /// At once
    AtLeastOnce,
}

impl std::fmt::Display for Delivery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ExactlyOnce => "exactly once",
            Self::AtLeastOnce => "at once",
        })
    }
}

impl Args {
    pub(crate) fn moderate() -> Self {
        Self {
            state_mb: 1_000,
            text: 500,
            steps: vec![2, 4, 3],
            repeat: 3,
            backend: vec![Backend::Heap],
            interval: "1s".to_owned(),
            rate: 5_000,
            delivery: vec![Delivery::ExactlyOnce],
        }
    }
}

pub(crate) fn bench(args: &Args, report: &mut Report) -> Result<()> {
    ensure!(
        args.repeat > 0 && args.state_mb > 0 && args.rate > 0,
        "--repeat, --state-mb and --rate must be at least 1"
    );
    ensure!(args.steps.len() > 1, "--steps needs two parallelisms at least");
    let changes = args.steps.iter().zip(args.steps.iter().cycle().skip(1)).all(|(from, to)| from != to);
    ensure!(changes && !args.steps.contains(&0), "--steps are parallelisms, each another than the one before");
    let interval: HumanDuration = args.interval.parse().with_context(|| format!("--interval {}", args.interval))?;
    for backend in &args.backend {
        for delivery in &args.delivery {
            let measured = rescales(args, *backend, *delivery, interval.get(), report);
            measured.with_context(|| format!("measure {RESCALE} with {backend}, {delivery}"))?;
        }
    }
    Ok(())
}

/// One rescale, seconds; the parts are those of the checkpoint log, by the wall clock.
#[derive(Clone, Debug)]
struct Measured {
    from: u32,
    to: u32,
    /// The longest, from the order to the first new row.
    pause: f64,
    /// From the last row of the old attempt to the first new one.
    between: f64,
    /// From the trigger of the old attempt's last checkpoint until that was complete.
    last: f64,
    /// Until its output was known to be visible, if the log was seen to say so.
    committed: Option<f64>,
    /// From then, or from its completion, until the new attempt was opened.
    ended: f64,
    /// Until its first checkpoint was triggered.
    restored: f64,
    /// Until that was complete.
    first: f64,
    /// From the order to its answer.
    answered: f64,
}

fn rescales(args: &Args, backend: Backend, delivery: Delivery, interval: Duration, report: &mut Report) -> Result<()> {
    report.doing(&format!("{RESCALE}: building up {} MB with {backend}", args.state_mb));
    let Args { state_mb, text, ref steps, repeat, rate, .. } = *args;
    let mut world = World::build(Setup {
        backend,
        state_mb,
        text,
        parallelism: steps[0],
        workers: WORKERS,
        slots: SLOTS,
        storage: Storage::Files,
        interval: args.interval.clone(),
        rate,
        standby: false,
        exactly_once: delivery == Delivery::ExactlyOnce,
    })?;
    let state_mb = world.state_bytes()? as f64 / 1e6;
    let setting = format!("{backend}, {WORKERS} workers, {state_mb:.0} MB in files, {rate} events/s, {delivery}");
    report.doing(&format!("{RESCALE}: {setting}"));
    world.calm(CALM_CHECKPOINTS)?;
    let usual = usual(&mut world)?;
    let (mut draw, mut all) = (Draw::new(5), Vec::new());
    let steps = steps.iter().zip(steps.iter().cycle().skip(1)).cycle();
    for (number, (from, to)) in (1..=repeat).zip(steps) {
        world.calm(CALM_CHECKPOINTS)?;
        // Orders come anywhere between two checkpoints.
        std::thread::sleep(interval.mul_f64(draw.below(1_000) as f64 / 1_000.0));
        let load = load_average();
        let measured = rescale(&world, *from, *to).with_context(|| format!("rescale {number}, {from} -> {to}"))?;
        report.run(json!({
            "figure": RESCALE, "setting": setting, "rescale": number, "from": from, "to": to, "load": load,
            "pause": rounded(measured.pause), "between": rounded(measured.between), "lastCheckpoint": rounded(measured.last),
            "committed": measured.committed.map(rounded), "ended": rounded(measured.ended),
            "restored": rounded(measured.restored), "firstCheckpoint": rounded(measured.first),
            "answered": rounded(measured.answered),
        }));
        all.push(measured);
    }
    figures(report, &setting, &all);
    if let Some(usual) = usual {
        report.add(Figure::median(RESCALE, &setting, "pause between checkpoints, nothing else happening", &usual, "s"));
    }
    report.doing(&format!("{RESCALE}: comparing the output"));
    let (keys, events) = world.end_exactly().context("compare the output with the events")?;
    report.run(json!({ "figure": RESCALE, "setting": setting, "exact": true, "keys": keys, "events": events }));
    Ok(())
}

/// Pauses in the output of some checkpoints, without a rescale.
fn usual(world: &mut World) -> Result<Option<Spread>> {
    /// Shorter ones are within the output of one checkpoint.
    const LEAST: Duration = Duration::from_millis(200);
    let start = Instant::now();
    world.calm(5)?;
    let seen = world.seen_since(start);
    let pauses = seen.windows(2).map(|w| w[1].0 - w[0].0).filter(|pause| *pause >= LEAST);
    // Output that comes at once has none.
    Ok(Spread::of(pauses.map(|pause| pause.as_secs_f64())))
}

/// Orders another parallelism, and waits for output of the next attempt.
fn rescale(world: &World, from: u32, to: u32) -> Result<Measured> {
    let mut old = world.checkpoints()?.newest().context("it has no checkpoint")?;
    let (start, parallelism) = (Instant::now(), to.to_string());
    // There was some output then.
    let before = start.checked_sub(BEFORE).unwrap_or(start);
    let words = ["rescale", "JOB", &parallelism, "--storage", "STORAGE"];
    std::thread::scope(|scope| {
        let order = scope.spawn(|| world.command(&words).map(|()| start.elapsed().as_secs_f64()));
        let mut committed = None;
        loop {
            ensure!(start.elapsed() < PATIENCE, "no new output within {PATIENCE:?}; {}", world.logs());
            std::thread::sleep(POLL);
            // It may be read in the middle of a change.
            let Ok(checkpoints) = world.checkpoints() else { continue };
            if let Some(newer) = checkpoints.newest_of(old.attempt) {
                old = newer;
            }
            committed = checkpoints.committed_at(old.epoch).or(committed);
            let (Some(first), Some(opened)) =
                (checkpoints.first_after(old.attempt), checkpoints.opened_after(old.attempt))
            else {
                continue;
            };
            let seen = world.seen_since(before);
            let Some(Pause { between, longest }) = pause(&seen, |n| old.holds(n)) else { continue };
            let seconds = |from: i64, to: i64| (to - from) as f64 / 1e3;
            return Ok(Measured {
                from,
                to,
                pause: longest.as_secs_f64(),
                between: between.as_secs_f64(),
                last: seconds(old.triggered_at_ms, old.written_at_ms),
                committed: committed.map(|at| seconds(old.written_at_ms, at)),
                ended: seconds(committed.unwrap_or(old.written_at_ms), opened),
                restored: seconds(opened, first.triggered_at_ms),
                first: seconds(first.triggered_at_ms, first.written_at_ms),
                answered: order.join().map_err(|_| anyhow::anyhow!("the order panicked"))??,
            });
        }
    })
}

/// Pauses in the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pause {
    /// From the last record of an old event to the first of a new one.
    between: Duration,
    /// The longest up to that one.
    longest: Duration,
}

/// `None` if no record of an event that is not `old` has come yet.
fn pause(seen: &[(Instant, u64)], old: impl Fn(u64) -> bool) -> Option<Pause> {
    let new = seen.iter().position(|(_, event)| !old(*event))?;
    let pauses = seen[..=new].windows(2).map(|w| w[1].0.duration_since(w[0].0));
    Some(Pause { between: pauses.clone().next_back()?, longest: pauses.max()? })
}

fn figures(report: &mut Report, setting: &str, all: &[Measured]) {
    let mut add = |what: &str, of: &dyn Fn(&Measured) -> Option<f64>| {
        if let Some(values) = Spread::of(all.iter().filter_map(of)) {
            report.add(Figure::median(RESCALE, setting, what, &values, "s"));
        }
    };
    let mut steps: Vec<(u32, u32)> = Vec::new();
    for measured in all {
        if !steps.contains(&(measured.from, measured.to)) {
            steps.push((measured.from, measured.to));
        }
    }
    add(&format!("pause, median of {}", all.len()), &|m| Some(m.pause));
    for (from, to) in steps {
        add(&format!("  {from} -> {to}"), &|m| (m.from == from && m.to == to).then_some(m.pause));
    }
    add("  between the old attempt's last row and the first new one", &|m| Some(m.between));
    add("  last checkpoint", &|m| Some(m.last));
    add("  complete to committed", &|m| m.committed);
    add("  committed to new attempt in the log", &|m| Some(m.ended));
    add("  new attempt to first trigger: all state is back", &|m| Some(m.restored));
    add("  first checkpoint", &|m| Some(m.first));
    add("order to answer", &|m| Some(m.answered));
    if let Some(values) = Spread::of(all.iter().map(|m| m.pause)) {
        report.add(Figure::new(RESCALE, setting, "pause, worst", values.at(1.0), "s").at_most(GOAL_SECONDS));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_lies_between_the_last_old_and_the_first_new_event() {
        let start = Instant::now();
        let at = |ms: u64, event: u64| (start + Duration::from_millis(ms), event);
        let seen = [at(100, 3), at(900, 7), at(2_400, 12), at(2_500, 2), at(2_600, 14)];
        let ms = Duration::from_millis;
        assert_eq!(pause(&seen, |n| n < 10), Some(Pause { between: ms(1_500), longest: ms(1_500) }));
        let slow = [at(100, 3), at(3_900, 7), at(4_400, 12)];
        assert_eq!(pause(&slow, |n| n < 10), Some(Pause { between: ms(500), longest: ms(3_800) }));
        assert_eq!(pause(&seen[..2], |n| n < 10), None, "there is nothing new yet");
        assert_eq!(pause(&seen[2..], |n| n < 10), None, "what came before was not seen");
    }
}
