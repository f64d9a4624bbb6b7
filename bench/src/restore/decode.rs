//! State taken over in this process, from memory, on two threads: what decoding and indexing alone cost.

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, ensure};
use floodmark_snapshot::{Env, env::spawn_thread};
use floodmark_testkit::scratch;
use serde_json::json;

use super::RESTORE;
use crate::{
    backend::Backend,
    report::{Figure, Report, Spread, rounded},
    rows::{Filled, Values, cpu_seconds_of, timed},
};

/// Threads, each of which takes over half of the keys.
const THREADS: u32 = 2;

pub(super) fn bench(backend: Backend, keys: u64, repeat: u32, report: &mut Report) -> Result<()> {
    let setting = format!("{backend}, {keys} keys, in process, {THREADS} -> {THREADS}");
    report.doing(&format!("{RESTORE}: {setting}"));
    let (env, folder) = (Env::system(), scratch::folder("decode-")?);
    let opened = backend.open(folder.path(), &env)?;
    let mut shards = Vec::new();
    for index in 0..THREADS {
        let mut filled = Filled::empty(&*opened, &env, Values::Numbers, keys, (index, THREADS))?;
        filled.fill()?;
        shards.extend(filled.checkpoint()?.shards);
    }
    let shards = Arc::new(shards);
    let (mut seconds, mut cpu) = (Vec::new(), Vec::new());
    for run in 1..=repeat {
        let before = cpu_seconds_of("self").unwrap_or(0.0);
        let (states, took) = timed(|| -> Result<Vec<Filled>> {
            let one = |index: u32| {
                let (opened, env, shards) = (opened.clone(), env.clone(), shards.clone());
                spawn_thread(format!("restore {index}"), move || -> Result<Filled> {
                    let mut state = Filled::empty(&*opened, &env, Values::Numbers, keys, (index, THREADS))?;
                    state.restore(&shards)?;
                    Ok(state)
                })
            };
            let threads: Vec<_> = (0..THREADS).map(one).collect::<Result<_, _>>()?;
            threads.into_iter().map(|t| t.join().map_err(|_| anyhow!("a restore panicked"))?).collect()
        });
        let cpu_seconds = cpu_seconds_of("self").unwrap_or(0.0) - before;
        let rows: u64 = states?.iter().map(Filled::rows).sum();
        ensure!(rows == keys, "{rows} rows came back of {keys}");
        let wall = took.wall.as_secs_f64();
        report.run(json!({
            "figure": RESTORE, "setting": setting, "run": run, "seconds": rounded(wall), "cpuSeconds": rounded(cpu_seconds),
        }));
        seconds.push(wall);
        cpu.push(cpu_seconds);
    }
    let seconds = Spread::of(seconds).context("no restore")?;
    report.add(Figure::median(RESTORE, &setting, "decoded and indexed", &seconds, "s"));
    let cpu = Spread::of(cpu).context("no restore")?;
    report.add(Figure::median(RESTORE, &setting, "CPU", &cpu, "CPU-s"));
    Ok(())
}
