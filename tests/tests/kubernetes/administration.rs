//! What befalls the controller: killed, doubled, replaced, upgraded, gone.

use std::{collections::BTreeSet, thread::sleep, time::Duration};

use anyhow::{Result, ensure};
use floodmark_tests::kubernetes::{Cluster, holds, reason};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    operator::{self, Operator},
    stage::{Stage, Turn},
    text,
};

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_controller_that_is_killed_at_every_step_of_an_upgrade_ends_it() -> Result<()> {
    let mut stage = Stage::alone_with_storage("e2e-steps")?;
    let operator = Operator::of(&stage.namespace.cluster);
    stage.deploy(&json!({}))?;
    stage.flows()?;
    let mut killed = BTreeSet::new();
    // Each round kills at the steps that no round before has met. One that was killed a moment ago may not be back yet.
    for round in 1..=6 {
        if !killed.contains("Checking") {
            // It looks into the storage, and is done with it in no time.
            stage.store.stall()?;
        }
        stage.edit(&json!({"restartNonce": round}))?;
        let mut lives = true;
        stage.namespace.wait("an upgrade is done", || {
            let job = stage.look()?;
            let step = text(&job, "/status/operation/step").to_owned();
            let again = step.is_empty() || killed.contains(&step);
            if again && lives && step == "Preparing" && !killed.contains("Stopping") {
                // The next step ends with a savepoint, which would be there in no time, too. A new controller would look into the
                // storage again before it goes on to that.
                stage.store.stall()?;
            }
            if !again && operator::signal(&operator.leader()?, Signal::SIGKILL).is_ok() {
                println!("killed at {step}");
                killed.insert(step);
                lives = false;
                stage.store.resume()?;
            }
            Ok(holds(&job, "Ready").then_some(()))
        })?;
        let job = stage.look()?;
        ensure!(job["status"]["restartNonce"] == round && job["status"]["run"]["number"] == round + 1, "{job:#}");
        if killed.len() == 4 {
            break;
        }
    }
    ensure!(killed.iter().map(String::as_str).eq(["Checking", "Preparing", "Starting", "Stopping"]), "{killed:?}");
    stage.flows()?;
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn another_controller_takes_over_and_the_old_one_does_no_harm() -> Result<()> {
    let mut stage = Stage::alone("e2e-zombie")?;
    let operator = Operator::of(&stage.namespace.cluster);
    stage.deploy(&json!({}))?;
    operator.scale(2)?;
    let old = operator.leader()?;
    // In the middle of an upgrade, of which it does not see the end.
    stage.edit(&json!({"restartNonce": 1}))?;
    stage.until("under way", |job| text(job, "/status/operation/step") == "Preparing")?;
    operator::signal(&old, Signal::SIGSTOP)?;
    let look = || Ok(Some(operator.leader()?).filter(|leader| !leader.is_empty() && *leader != old));
    let taken_over = stage.namespace.wait("another controller leads", look);
    let done = taken_over.and_then(|_| stage.ready());
    operator::signal(&old, Signal::SIGCONT)?;
    let job = done?;
    ensure!(job["status"]["run"]["number"] == 2, "{job:#}");
    // The one that wakes up has things to do that were done long ago.
    sleep(Duration::from_secs(10));
    stage.flows()?;
    let after = stage.look()?;
    ensure!(holds(&after, "Ready") && after["status"]["run"] == job["status"]["run"], "{after:#}");
    ensure!(operator.leader()? != old, "the old one leads again");
    operator.scale(1)?;
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn an_upgrade_of_the_controller_restarts_no_pod_of_a_job() -> Result<()> {
    let mut stage = Stage::alone("e2e-newer")?;
    let operator = Operator::of(&stage.namespace.cluster);
    stage.deploy(&json!({}))?;
    let pods = || stage.namespace.list("pods", "floodmark.io/job");
    let (before, controllers) = (operator::lives(&pods()?), operator.pods()?);
    // Jobs that name no image get another one from now on.
    operator.upgrade(&["jobs.image=floodmark.invalid/newer:1", "podAnnotations.version=newer"])?;
    let same: Vec<_> = operator.pods()?.into_iter().filter(|pod| controllers.contains(pod)).collect();
    ensure!(same.is_empty(), "controllers are replaced, but {same:?}");
    stage.flows()?;
    sleep(Duration::from_secs(5));
    ensure!(operator::lives(&pods()?) == before, "{before:?} became {:?}", operator::lives(&pods()?));
    // It goes on to look after the job.
    stage.namespace.kubectl(&["scale", "streamjob", stage.name, "--replicas=1"])?;
    stage.ready()?;
    ensure!(operator::lives(&pods()?) == before, "{before:?} became {:?}", operator::lives(&pods()?));
    operator.upgrade(&[])?;
    stage.finish()
}

const GENERATES: &str = "CREATE TABLE n (i BIGINT) WITH ('connector' = 'datagen');
CREATE TABLE o (i BIGINT) WITH ('connector' = 'blackhole');
INSERT INTO o SELECT i FROM n;";

fn job(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "floodmark.io/v1alpha1", "kind": "StreamJob", "metadata": {"name": name}, "spec": spec})
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn without_the_webhook_the_rules_of_the_definition_hold_and_the_status_tells_the_rest() -> Result<()> {
    let _turn = Turn::alone();
    let cluster = Cluster::of_environment()?;
    let namespace = cluster.namespace("e2e-rules")?;
    let operator = Operator::of(&cluster);
    let storage = json!({"storage": "s3://nowhere/at-all"});
    let wrong = job("wrong", json!({"sql": GENERATES.replace("SELECT i", "SELECT j"), "checkpoints": storage}));
    let refused = namespace.apply(&wrong).expect_err("wrong SQL was taken").to_string();
    ensure!(refused.contains("spec.sql: line 3, column 22: unknown column 'j'"), "{refused}");
    operator.scale(0)?;
    let rules = [
        (json!({"sql": " "}), "spec.sql"),
        (json!({"sql": GENERATES, "parallelism": 129}), "parallelism must not exceed maxParallelism"),
        (json!({"sql": GENERATES, "checkpoints": {"interval": "0s"}}), "interval must be longer than 0s"),
        (json!({"sql": GENERATES, "checkpoints": {"mode": "Sometimes"}}), "spec.checkpoints.mode"),
        (json!({"sql": GENERATES, "worker": {"slots": 0}}), "spec.worker.slots"),
        (json!({"sql": GENERATES, "paralelism": 2}), "paralelism"),
    ];
    for (spec, says) in rules {
        let refused = namespace.try_out(&job("rules", spec.clone())).expect_err("it was taken").to_string();
        ensure!(refused.contains(says), "{spec}: {refused}");
    }
    namespace.apply(&wrong)?;
    operator.scale(1)?;
    let told = namespace.until("streamjob", "wrong", "stalled", |job| holds(job, "Stalled"))?;
    ensure!(reason(&told, "Stalled").1.contains("line 3, column 22"), "{told:#}");
    let look = || Ok(namespace.try_out(&job("late", wrong["spec"].clone())).err().map(|error| error.to_string()));
    let refused = namespace.wait("the webhook answers again", look)?;
    ensure!(refused.contains("unknown column 'j'"), "{refused}");
    Ok(())
}
