//! Many jobs, of which nothing runs: what they cost the controller.

use std::{
    collections::HashMap,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use floodmark_tests::kubernetes::Cluster;
use serde_json::{Value, json};

use crate::{
    operator::{Operator, metric},
    stage::Turn,
};

const JOBS: usize = 500;
/// Changes whose answers are waited for.
const CHANGES: usize = 200;
/// How long nothing is changed, and nothing may be written.
const QUIET: Duration = Duration::from_secs(20);

/// Name, generation, and the generation that the status is about.
const SEEN: &str = r#"jsonpath={.metadata.name} {.metadata.generation} {.status.observedGeneration}{"\n"}"#;
const ALL_SEEN: &str =
    r#"jsonpath={range .items[*]}{.metadata.name} {.metadata.generation} {.status.observedGeneration}{"\n"}{end}"#;

fn job(n: usize) -> Value {
    let sql = format!(
        "CREATE TABLE n (i BIGINT) WITH ('connector' = 'datagen');
CREATE TABLE o (i BIGINT, j BIGINT) WITH ('connector' = 'blackhole');
INSERT INTO o SELECT i, i + {n} FROM n;"
    );
    json!({
        "apiVersion": "floodmark.io/v1alpha1", "kind": "StreamJob",
        "metadata": {"name": format!("job-{n:03}")},
        "spec": {"sql": sql, "desiredState": "Suspended", "checkpoints": {"storage": "s3://nowhere/at-all"}},
    })
}

/// Of a line of [`SEEN`]: name, generation, and whether the status is about it.
fn parse(line: &str) -> Option<(&str, u64, bool)> {
    let mut words = line.split(' ');
    let (name, generation) = (words.next()?, words.next()?.parse().ok()?);
    Some((name, generation, words.next()?.parse() == Ok(generation)))
}

/// Requests that change something, but for those by which the controller keeps its own Lease.
fn writes(metrics: &str) -> f64 {
    let writes = |line: &str| {
        !["get", "list", "watch"].iter().any(|verb| line.contains(&format!("verb=\"{verb}\"")))
            && !line.contains("\"leases\"")
    };
    metric(metrics, "floodmark_controller_api_requests_total", writes)
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn hundreds_of_jobs_cost_little_memory_and_nothing_while_nothing_changes() -> Result<()> {
    let _turn = Turn::alone();
    let cluster = Cluster::of_environment()?;
    let namespace = cluster.namespace("e2e-many")?;
    let operator = Operator::of(&cluster);
    // A fresh process, so that its memory is that of these jobs.
    operator.restart()?;
    let start = Instant::now();
    let all: Vec<_> = (0..JOBS).map(job).collect();
    namespace.apply(&json!({"apiVersion": "v1", "kind": "List", "items": all}))?;
    println!("{JOBS} jobs are applied after {:.1} s", start.elapsed().as_secs_f64());
    namespace.wait("all jobs are seen", || {
        let seen = namespace.kubectl(&["get", "streamjobs", "-o", ALL_SEEN])?;
        Ok((seen.lines().filter_map(parse).filter(|(_, _, seen)| *seen).count() == JOBS).then_some(()))
    })?;
    println!("all have a status after {:.1} s", start.elapsed().as_secs_f64());
    // Each of them has objects, too, which are made one after the other.
    let mut written = -1.0;
    let before = namespace.wait("the controller has come to rest", || {
        let metrics = operator.metrics()?;
        let before = std::mem::replace(&mut written, writes(&metrics));
        sleep(Duration::from_secs(3));
        Ok((written == before).then_some(metrics))
    })?;
    println!("all have their objects after {:.1} s", start.elapsed().as_secs_f64());
    sleep(QUIET);
    let after = operator.metrics()?;
    ensure!(writes(&after) == writes(&before), "{} writes while nothing changed", writes(&after) - writes(&before));
    let passes = |text: &str| metric(text, "floodmark_controller_passes_total", |_| true);
    let passed = passes(&after) - passes(&before);
    ensure!(passed <= JOBS as f64, "{passed} passes in {QUIET:?} while nothing changed");

    let following = cluster.follow(&["-n", &namespace.name, "get", "streamjobs", "--watch-only", "-o", SEEN])?;
    sleep(Duration::from_secs(1));
    for n in 0..CHANGES {
        namespace.patch("streamjob", &format!("job-{n:03}"), &json!({"spec": {"upgrade": {"timeout": "77s"}}}))?;
    }
    let mut waits: Vec<Duration> = namespace.wait("all changes are answered", || {
        let lines = following.lines();
        let (mut changed, mut answered) = (HashMap::new(), HashMap::new());
        for (at, (name, generation, seen)) in lines.iter().filter_map(|(at, line)| Some((*at, parse(line)?))) {
            changed.entry((name, generation)).or_insert(at);
            if seen {
                answered.entry((name, generation)).or_insert(at);
            }
        }
        let waits = answered.iter().map(|(of, at)| *at - changed[of]).collect::<Vec<_>>();
        Ok((waits.len() >= CHANGES).then_some(waits))
    })?;
    waits.sort();
    let at = |share: f64| waits[((waits.len() - 1) as f64 * share).round() as usize];
    println!("from a change to its answer: median {:?}, 99 % {:?}, worst {:?}", at(0.5), at(0.99), at(1.0));
    let memory = metric(&operator.metrics()?, "process_resident_memory_bytes", |_| true);
    println!("the controller's memory: {:.1} MB", memory / 1e6);
    ensure!(memory > 0.0, "it tells nothing of its memory");
    let names = namespace.kubectl(&["get", "pods", "-o", "name"])?;
    ensure!(names.is_empty(), "{names}");
    waits.first().context("no change")?;
    // The next scenario is to have the machine for itself; and they must all go.
    let start = Instant::now();
    cluster.kubectl(&["delete", "namespace", &namespace.name, "--timeout=300s"])?;
    println!("all are gone after {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}
