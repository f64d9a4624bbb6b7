//! How long a job with much state shows no output: printed, for comparison with others. Nothing fails because it is slow.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use crate::stage::Stage;

/// Keys of state, of about 40 bytes each in a checkpoint: 100 MB.
const KEYS: u64 = 2_500_000;
/// How often each is measured.
const TIMES: u64 = 5;

fn print(what: &str, mut pauses: Vec<Duration>) {
    pauses.sort();
    let seconds: Vec<_> = pauses.iter().map(|p| format!("{:.1}", p.as_secs_f64())).collect();
    println!("{what}: longest time without output, seconds, sorted: {}", seconds.join(" "));
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn pauses_of_upgrades_and_rescales_with_a_hundred_megabytes_of_state() -> Result<()> {
    let mut stage = Stage::alone("e2e-figures")?;
    let filler = format!(
        "CREATE TABLE keys (k BIGINT) WITH ('connector' = 'datagen', 'fields.k.kind' = 'sequence', 'rows' = '{KEYS}');
CREATE TABLE nowhere (k BIGINT, n BIGINT, a BIGINT, b BIGINT, c BIGINT, PRIMARY KEY (k) NOT ENFORCED) WITH ('connector' = 'blackhole');
INSERT INTO nowhere SELECT k, count(*), sum(k * 7919), max(k * 104729), min(k * 1299709) FROM keys GROUP BY k;\n"
    );
    stage.deploy(&json!({"sql": stage.sql() + &filler}))?;
    let job =
        stage.until("full of state", |job| job["status"]["lastCheckpoint"]["size"].as_u64() > Some(95_000_000))?;
    println!("state: {} MB", job["status"]["lastCheckpoint"]["size"].as_u64().unwrap_or(0) / 1_000_000);
    stage.flows()?;
    let quiet = Instant::now();
    std::thread::sleep(Duration::from_secs(10));
    print("nothing happens", vec![stage.longest_pause(quiet)]);
    let (mut upgrades, mut rescales) = (Vec::new(), Vec::new());
    for nonce in 1..=TIMES {
        let start = Instant::now();
        stage.edit(&json!({"restartNonce": nonce}))?;
        let job = stage.ready()?;
        ensure!(job["status"]["run"]["number"] == nonce + 1, "{job:#}");
        stage.flows()?;
        upgrades.push(stage.longest_pause(start));
    }
    for parallelism in (0..TIMES).map(|n| [3, 2][n as usize % 2]) {
        let start = Instant::now();
        stage.namespace.kubectl(&["scale", "streamjob", stage.name, &format!("--replicas={parallelism}")])?;
        stage.ready()?;
        stage.flows()?;
        rescales.push(stage.longest_pause(start));
    }
    print("upgrade behind a savepoint", upgrades);
    print("rescale", rescales);
    stage.finish()
}
