//! A job's life as its user sees it: deployed, changed, scaled, suspended, deleted; and what is refused.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use floodmark_tests::kubernetes::{holds, reason};
use serde_json::{Value, json};

use crate::{operator::Operator, stage::Stage, text};

/// Another plan with the same state: the copies are filtered by what always holds.
fn filtered(sql: &str, by: &str) -> String {
    let changed = sql.replace("placed_at FROM orders;", &format!("placed_at FROM orders WHERE {by};"));
    assert_ne!(changed, sql);
    changed
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_job_is_applied_runs_and_writes_what_it_should() -> Result<()> {
    let mut stage = Stage::new("e2e-deploy")?;
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
    let selector = "--field-selector=type=Warning,involvedObject.kind=StreamJob";
    let warnings = stage.namespace.kubectl(&["get", "events", selector, "-o", "name"])?;
    ensure!(warnings.is_empty(), "nothing was wrong: {}", stage.namespace.describe());
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn changed_sql_is_taken_up_behind_a_savepoint() -> Result<()> {
    let mut stage = Stage::flowing("e2e-upgrade")?;
    stage.edit(&json!({"sql": filtered(&stage.sql(), "amount > 0")}))?;
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
fn who_waits_for_ready_waits_for_what_was_applied_last() -> Result<()> {
    let mut stage = Stage::new("e2e-wait")?;
    stage.deploy(&json!({}))?;
    let job = format!("streamjob/{}", stage.name);
    for nonce in 1..=3 {
        stage.edit(&json!({"restartNonce": nonce}))?;
        stage.namespace.kubectl(&["wait", &job, "--for=condition=Ready", "--timeout=120s"])?;
        let job = stage.look()?;
        ensure!(job["status"]["restartNonce"] == nonce && job["status"]["run"]["number"] == nonce + 1, "{job:#}");
    }
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_spec_that_changes_during_an_upgrade_is_taken_up_too() -> Result<()> {
    let mut stage = Stage::flowing("e2e-midway")?;
    let mut last = String::new();
    for (step, by) in [("Preparing", "amount > 0"), ("Starting", "amount > -1"), ("", "amount > -2")] {
        last = filtered(&stage.sql(), by);
        stage.edit(&json!({ "sql": last }))?;
        if !step.is_empty() {
            stage.until(step, |job| text(job, "/status/operation/step") == step)?;
        }
    }
    let job = stage.ready()?;
    let revision = format!("{}-{}", stage.name, text(&job, "/status/run/revision"));
    let revision = stage.namespace.get("controllerrevision", &revision)?;
    ensure!(revision.to_string().contains("amount > -2"), "another revision runs: {revision:#}");
    ensure!(last.contains("amount > -2"));
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_job_that_has_failed_is_upgraded_from_its_last_checkpoint() -> Result<()> {
    let mut stage = Stage::new("e2e-failed")?;
    // It fails at an order that is not worth anything.
    let fails =
        stage.sql().replace("SELECT shop, amount, placed_at", "SELECT shop, amount / amount * amount, placed_at");
    ensure!(fails != stage.sql());
    stage.deploy(&json!({ "sql": fails }))?;
    stage.flows()?;
    let worthless = r#"{"shop":"worthless","amount":0,"placed_at":"2026-01-01 00:00:00.000"}"#;
    stage.scenario.broker.produce_values(&stage.scenario.topic("orders"), 0, [worthless])?;
    let job = stage.until("failed", |job| text(job, "/status/state") == "Failed")?;
    ensure!(holds(&job, "Stalled") && reason(&job, "Stalled").1.contains("zero"), "{job:#}");
    let sql =
        filtered(&stage.sql(), "amount > 0").replace("FROM orders GROUP BY", "FROM orders WHERE amount > 0 GROUP BY");
    // It can't take a savepoint, and no other way is taken unasked.
    stage.edit(&json!({ "sql": sql }))?;
    let job = stage.until("stalled", |job| holds(job, "Stalled"))?;
    println!("with mode Savepoint: {:?}", reason(&job, "Stalled"));
    ensure!(job["status"]["run"]["number"] == 1, "{job:#}");
    stage.edit(&json!({"upgrade": {"mode": "LastCheckpoint"}}))?;
    let job = stage.ready()?;
    ensure!(text(&job, "/status/restoredFrom/mode") == "LastCheckpoint", "{job:#}");
    ensure!(job["status"]["restoredFrom"]["epoch"].as_u64() > Some(0), "{job:#}");
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn kubectl_scale_keeps_the_pods() -> Result<()> {
    let mut stage = Stage::flowing("e2e-rescale")?;
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
    let mut stage = Stage::alone("e2e-suspend")?;
    stage.deploy(&json!({}))?;
    stage.flows()?;
    stage.edit(&json!({"desiredState": "Suspended"}))?;
    let job = stage.until("suspended", |job| text(job, "/status/state") == "Suspended")?;
    ensure!(text(&job, "/status/suspendedWith").starts_with("suspend-1-"), "{job:#}");
    ensure!(holds(&stage.ready()?, "Ready"), "it is as it shall be");
    stage.until_no_pods()?;
    Operator::of(&stage.namespace.cluster).restart()?;
    stage.edit(&json!({"desiredState": "Running"}))?;
    stage.ready()?;
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn what_can_not_run_is_refused_or_rolled_back_and_the_output_is_exact() -> Result<()> {
    let mut stage = Stage::flowing("e2e-rollback")?;
    let sql = stage.sql();
    let workers = stage.pods("worker")?;
    // SQL that is wrong is not even taken.
    let wrong =
        stage.edit(&json!({"sql": sql.replace("SELECT shop, amount, placed_at", "SELECT shop, mount, placed_at")}));
    let wrong = wrong.expect_err("wrong SQL was taken").to_string();
    ensure!(wrong.contains("spec.sql: line 4, column 33: unknown column 'mount'"), "{wrong}");
    // An image that is not there: the old pods are not touched.
    stage.edit(&json!({"image": "floodmark.invalid/none:1"}))?;
    let job = stage.until("stalled", |job| holds(job, "Stalled"))?;
    ensure!(reason(&job, "Stalled").0 == "ImageNotPulled", "{job:#}");
    ensure!(holds(&job, "Running") && stage.pods("worker")? == workers, "{job:#}");
    stage.edit(&json!({"image": null}))?;
    stage.ready()?;
    // State that does not fit: what was a greatest amount would be a least one.
    stage.edit(&json!({"sql": sql.replace("max(amount)", "min(amount)")}))?;
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
fn a_deleted_job_leaves_its_checkpoints_or_none() -> Result<()> {
    let mut stage = Stage::new("e2e-delete")?;
    let job = stage.deploy(&json!({}))?;
    let uid = text(&job, "/metadata/uid").to_owned();
    stage.flows()?;
    stage.delete()?;
    let kept = stage.store.objects().join(stage.name).join(stage.name).join(stage.name).join(&uid);
    ensure!(kept.join("log").is_dir(), "{} is not there", kept.display());
    // Another job of that name goes on from where the first one was.
    let from = format!("{}/{}/{}/{uid}", stage.storage(), stage.name, stage.name);
    stage.deploy(&json!({"restore": {"from": from}, "checkpoints": {"onDelete": "Delete"}}))?;
    stage.flows()?;
    let uid = text(&stage.look()?, "/metadata/uid").to_owned();
    let gone = kept.with_file_name(uid);
    ensure!(gone.join("log").is_dir(), "{} is not there", gone.display());
    stage.finish()?;
    stage.delete()?;
    ensure!(kept.join("log").is_dir() && !gone.join("log").exists(), "{} is still there", gone.display());
    // Deleted before anything was done, and with its namespace.
    stage.namespace.apply(&stage.job(&json!({})))?;
    stage.delete()?;
    stage.namespace.apply(&stage.job(&json!({})))?;
    std::thread::sleep(Duration::from_secs(2));
    stage.namespace.cluster.kubectl(&["delete", "namespace", stage.name, "--timeout=120s"])?;
    Ok(())
}
