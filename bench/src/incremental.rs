//! `incremental`: what a checkpoint uploads against what has changed since the one before. In this process, on one state.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use floodmark_snapshot::Env;
use floodmark_testkit::scratch;
use serde_json::json;

use crate::{
    backend::Backend,
    report::{Figure, Report, Spread, rounded},
    rows::{Filled, ROW_BYTES, Random, Values, check_sizes},
};

const INCREMENTAL: &str = "incremental";
/// Bytes of an incremental checkpoint for each byte of state that has changed, at most.
const GOAL: f64 = 1.3;
/// Keys of a batch.
const BATCH: usize = 1_000;

pub(crate) const ABOUT: &str = "\
Bytes of an incremental checkpoint for each byte of state that has changed.

One state of --keys keys (16 bytes each, with 64 bytes of values that can't be compressed) in this process. Between two
checkpoints the rows of so many random keys change (--changed, in per cent of all; a key that is drawn twice counts once). What
a checkpoint uploads is divided by 80 bytes for each changed row. Goal: at most 1.3, for the middle one of --checkpoints. The sum
is over all of them: now and then one brings layers or files together, and is larger.";

/// See [`ABOUT`].
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keys in the state
    #[arg(long, default_value_t = 5_000_000)]
    keys: u64,
    /// Keys that change from checkpoint to checkpoint, in per cent; several are measured one after the other
    #[arg(long, value_delimiter = ',', default_values_t = [0.1, 1.0, 10.0])]
    changed: Vec<f64>,
    /// Checkpoints of each back end and share
    #[arg(long, default_value_t = 40)]
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
            changed: vec![1.0],
            checkpoints: 10,
            backend: vec![Backend::Heap, Backend::RocksDb],
            values: Values::Numbers,
        }
    }
}

pub(crate) fn bench(args: &Args, report: &mut Report) -> Result<()> {
    check_sizes(args.keys, args.checkpoints)?;
    ensure!(args.changed.iter().all(|c| *c > 0.0 && *c <= 100.0), "--changed must be above 0 and at most 100");
    for backend in &args.backend {
        one(args, *backend, report).with_context(|| format!("measure {INCREMENTAL} with {backend}"))?;
    }
    Ok(())
}

fn one(args: &Args, backend: Backend, report: &mut Report) -> Result<()> {
    report.doing(&format!("{INCREMENTAL}: {backend}, {} keys of {}", args.keys, args.values));
    let (env, folder) = (Env::system(), scratch::folder("incremental-")?);
    let opened = backend.open(folder.path(), &env)?;
    let mut filled = Filled::empty(&*opened, &env, args.values, args.keys, (0, 1))?;
    filled.fill()?;
    filled.checkpoint()?;
    let mut random = Random::new(11);
    for percent in &args.changed {
        let setting = format!("{backend}, {} keys, {percent} % changed", args.keys);
        let count = ((args.keys as f64 * percent / 100.0) as u64).max(1);
        let (mut ratios, mut uploaded, mut changed) = (Vec::new(), 0, 0);
        for _ in 0..args.checkpoints {
            let numbers: BTreeSet<u64> = (0..count).map(|_| random.below(args.keys)).collect();
            let mut numbers: Vec<u64> = numbers.into_iter().collect();
            shuffle(&mut numbers, &mut random);
            for batch in numbers.chunks(BATCH) {
                filled.change(batch)?;
            }
            let written = filled.checkpoint()?;
            let bytes = numbers.len() as u64 * ROW_BYTES;
            report.run(json!({
                "figure": INCREMENTAL, "setting": setting, "changedRows": numbers.len(), "changedBytes": bytes,
                "bytes": written.bytes, "files": written.shards.len(), "reused": written.reused,
                "ratio": rounded(written.bytes as f64 / bytes as f64),
            }));
            ratios.push(written.bytes as f64 / bytes as f64);
            (uploaded, changed) = (uploaded + written.bytes, changed + bytes);
        }
        let ratios = Spread::of(ratios).context("no checkpoint")?;
        let what = format!("uploaded per changed byte, median of {}", args.checkpoints);
        report.add(Figure::median(INCREMENTAL, &setting, what, &ratios, "x").at_most(GOAL));
        let what = "uploaded per changed byte, in sum";
        report.add(Figure::new(INCREMENTAL, &setting, what, uploaded as f64 / changed as f64, "x"));
    }
    Ok(())
}

/// Into a random order: rows that change together need not lie together.
fn shuffle(numbers: &mut [u64], random: &mut Random) {
    for n in (1..numbers.len()).rev() {
        numbers.swap(n, random.below(n as u64 + 1) as usize);
    }
}
