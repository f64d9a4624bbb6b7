//! The operator on a real cluster: `make e2e`. Each job's output is held against an independent answer.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use floodmark_tests::kubernetes::{holds, reason};
use serde_json::{Value, json};

mod servers;
mod stage;

use stage::Stage;

/// Orders of a scenario, and how many come a second: for about half a minute, and the rest at its end.
const ORDERS: u64 = 60_000;
const PER_SECOND: u64 = 1_500;

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_job_is_applied_runs_and_writes_what_it_should() -> Result<()> {
    let mut stage = Stage::new("e2e-deploy")?;
    stage.feed(ORDERS, PER_SECOND)?;
    let start = Instant::now();
    let job = stage.deploy(&json!({}))?;
    println!("ready {:.1} s after it was applied", start.elapsed().as_secs_f64());
    ensure!(text(&job, "/status/state") == "Running" && job["status"]["parallelism"] == 2, "{job:#}");
    stage.flows()?;
    // Printer columns and the scale subresource.
    let shown = stage.namespace.kubectl(&["get", "streamjob", stage.name])?;
    ensure!(shown.contains("Running") && shown.contains("ExactlyOnce"), "{shown}");
    let scale = stage.namespace.kubectl(&["get", "streamjob", stage.name, "--subresource=scale", "-o", "json"])?;
    let scale: Value = serde_json::from_str(&scale)?;
    ensure!(scale["spec"]["replicas"] == 2 && scale["status"]["replicas"] == 2, "{scale:#}");
    ensure!(text(&scale, "/status/selector").contains("floodmark.io/role=worker"), "{scale:#}");
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn changed_sql_is_taken_up_behind_a_savepoint() -> Result<()> {
    let mut stage = Stage::new("e2e-upgrade")?;
    stage.feed(ORDERS, PER_SECOND)?;
    stage.deploy(&json!({}))?;
    stage.flows()?;
    // The copies are filtered by what always holds: another plan, with the same state.
    let sql = stage.sql().replace("placed_at FROM orders;", "placed_at FROM orders WHERE amount > 0;");
    ensure!(sql != stage.sql());
    stage.edit(&json!({"sql": sql}))?;
    let job = stage.look()?;
    ensure!(!holds(&job, "Ready"), "a Ready of the generation before is stale: {job:#}");
    let job = stage.ready()?;
    ensure!(text(&job, "/status/restoredFrom/mode") == "Savepoint", "{job:#}");
    ensure!(text(&job, "/status/restoredFrom/source").starts_with("savepoint upgrade-2-"), "{job:#}");
    ensure!(job["status"]["run"]["number"] == 2, "{job:#}");
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn kubectl_scale_keeps_the_pods() -> Result<()> {
    let mut stage = Stage::new("e2e-rescale")?;
    stage.feed(ORDERS, PER_SECOND)?;
    stage.deploy(&json!({}))?;
    stage.flows()?;
    let (coordinators, workers) = (stage.pods("coordinator")?, stage.pods("worker")?);
    for parallelism in [4, 3, 1] {
        let replicas = format!("--replicas={parallelism}");
        stage.namespace.kubectl(&["scale", "streamjob", stage.name, &replicas])?;
        let job = stage.ready()?;
        ensure!(job["status"]["parallelism"] == parallelism, "{job:#}");
        ensure!(job["status"]["run"]["number"] == 1, "the run is kept: {job:#}");
        stage.flows()?;
    }
    ensure!(stage.pods("coordinator")? == coordinators, "the coordinator is kept");
    ensure!(stage.pods("worker")?.len() == workers.len(), "{:?}", stage.pods("worker")?);
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_suspended_job_goes_on_where_it_stopped() -> Result<()> {
    let mut stage = Stage::new("e2e-suspend")?;
    stage.feed(ORDERS, PER_SECOND)?;
    stage.deploy(&json!({}))?;
    stage.flows()?;
    stage.edit(&json!({"desiredState": "Suspended"}))?;
    let job = stage.until("suspended", |job| text(job, "/status/state") == "Suspended")?;
    ensure!(text(&job, "/status/suspendedWith").starts_with("suspend-1-"), "{job:#}");
    stage.until_no_pods()?;
    stage.edit(&json!({"desiredState": "Running"}))?;
    stage.ready()?;
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn what_can_not_run_is_refused_or_rolled_back_and_the_output_is_exact() -> Result<()> {
    let mut stage = Stage::new("e2e-rollback")?;
    stage.feed(ORDERS, PER_SECOND)?;
    stage.deploy(&json!({}))?;
    stage.flows()?;
    let sql = stage.sql();
    // An image that is not there: the old pods are not touched.
    let workers = stage.pods("worker")?;
    stage.edit(&json!({"image": "floodmark.invalid/none:1"}))?;
    let job = stage.until("stalled", |job| holds(job, "Stalled"))?;
    ensure!(reason(&job, "Stalled").0 == "ImageNotPulled", "{job:#}");
    ensure!(holds(&job, "Running") && stage.pods("worker")? == workers, "{job:#}");
    stage.edit(&json!({"image": null}))?;
    stage.ready()?;
    // State that does not fit: the keys of an aggregate change.
    stage.edit(&json!({"sql": sql.replace("GROUP BY shop", "GROUP BY shop, amount")}))?;
    let job = stage.until("stalled", |job| holds(job, "Stalled"))?;
    ensure!(reason(&job, "Stalled").0 == "DoesNotFit", "{job:#}");
    ensure!(stage.pods("worker")? == workers, "{job:#}");
    // SQL that fails at run time, after the old one has stopped: back from the same savepoint.
    let fails = sql.replace("SELECT shop, amount, placed_at", "SELECT shop, amount / (amount - amount), placed_at");
    ensure!(fails != sql);
    stage.edit(&json!({"sql": fails}))?;
    let job = stage.until("rolled back", |job| holds(job, "Stalled") && holds(job, "Running"))?;
    ensure!(reason(&job, "Stalled").0 == "RolledBack", "{job:#}");
    ensure!(reason(&job, "Stalled").1.contains("zero"), "{job:#}");
    stage.flows()?;
    stage.edit(&json!({"sql": sql}))?;
    stage.ready()?;
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn lost_pods_cost_seconds_and_no_record() -> Result<()> {
    let mut stage = Stage::new("e2e-pods")?;
    stage.feed(ORDERS, PER_SECOND)?;
    stage.deploy(&json!({"worker": {"slots": 1}, "coordinator": {"standby": true}}))?;
    stage.flows()?;
    for role in ["worker", "coordinator", "worker"] {
        let (pod, _) = stage.pods(role)?.remove(0);
        stage.namespace.kubectl(&["delete", "pod", &pod, "--grace-period=0", "--force"])?;
        let start = Instant::now();
        stage.flows()?;
        println!("{role} killed: output again after {:.1} s", start.elapsed().as_secs_f64());
    }
    stage.ready()?;
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn what_only_coordinates_can_be_lost() -> Result<()> {
    let mut stage = Stage::new("e2e-lost")?;
    stage.feed(ORDERS, PER_SECOND)?;
    stage.deploy(&json!({}))?;
    stage.flows()?;
    stage.namespace.kubectl(&["delete", "lease,configmap,service", "-l", "floodmark.io/job"])?;
    let nothing = json!({"status": null}).to_string();
    let patch = ["patch", "streamjob", stage.name, "--subresource=status", "--type=merge", "-p", &nothing];
    stage.namespace.kubectl(&patch)?;
    let job = stage.ready()?;
    ensure!(job["status"]["run"]["number"] == 1, "nothing was started again: {job:#}");
    stage.flows()?;
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_deleted_job_leaves_its_checkpoints_or_none() -> Result<()> {
    let mut stage = Stage::new("e2e-delete")?;
    stage.feed(ORDERS, PER_SECOND)?;
    let job = stage.deploy(&json!({}))?;
    let uid = text(&job, "/metadata/uid").to_owned();
    stage.flows()?;
    stage.namespace.kubectl(&["delete", "streamjob", stage.name, "--timeout=60s"])?;
    let kept = stage.store.objects().join(stage.name).join(stage.name).join(stage.name).join(&uid);
    ensure!(kept.join("log").is_dir(), "{} is not there", kept.display());
    // Another job of that name goes on from where the first one was.
    let from = format!("{}/{}/{}/{uid}", stage.storage(), stage.name, stage.name);
    stage.deploy(&json!({"restore": {"from": from}, "checkpoints": {"onDelete": "Delete"}}))?;
    stage.finish()?;
    let uid = text(&stage.look()?, "/metadata/uid").to_owned();
    stage.namespace.kubectl(&["delete", "streamjob", stage.name, "--timeout=60s"])?;
    let gone = kept.with_file_name(uid);
    ensure!(kept.join("log").is_dir() && !gone.join("log").exists(), "{} is still there", gone.display());
    // Deleted before anything was done, and with its namespace.
    stage.namespace.apply(&stage.job(&json!({})))?;
    stage.namespace.kubectl(&["delete", "streamjob", stage.name, "--timeout=60s"])?;
    stage.namespace.apply(&stage.job(&json!({})))?;
    std::thread::sleep(Duration::from_secs(2));
    stage.namespace.cluster.kubectl(&["delete", "namespace", stage.name, "--timeout=120s"])?;
    Ok(())
}
