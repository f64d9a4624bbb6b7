//! What is lost while a job runs: pods, nodes, objects, the storage, a checkpoint.

use std::{
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use floodmark_tests::{kubernetes::holds, oracle::Repeats};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::{operator, savepoints, stage::Stage, text};

#[test]
#[ignore = "needs a cluster: make e2e"]
fn lost_pods_cost_seconds_and_no_record() -> Result<()> {
    let mut stage = Stage::new("e2e-pods")?;
    stage.deploy(&json!({"worker": {"slots": 1}, "coordinator": {"standby": true}}))?;
    stage.flows()?;
    for role in ["worker", "coordinator", "worker"] {
        let (pod, _) = stage.pods(role)?.remove(0);
        stage.kill(&pod)?;
        println!("{role} killed: new output after {:.1} s", stage.flows()?.as_secs_f64());
    }
    stage.ready()?;
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn what_only_coordinates_can_be_lost() -> Result<()> {
    let mut stage = Stage::flowing("e2e-lost")?;
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
fn a_coordinator_that_dies_over_a_savepoint_takes_it_all_the_same() -> Result<()> {
    let mut stage = Stage::flowing("e2e-midsave")?;
    let (coordinator, _) = stage.pods("coordinator")?.remove(0);
    savepoints::ask(&stage, "midway", &json!({}))?;
    stage.namespace.until("savepoint", "midway", "asked for", |s| !text(s, "/status/name").is_empty())?;
    operator::signal(&coordinator, Signal::SIGKILL)?;
    savepoints::complete(&stage, "midway")?;
    stage.flows()?;
    stage.ready()?;
    stage.finish()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_storage_that_does_not_answer_is_waited_for() -> Result<()> {
    let mut stage = Stage::with_storage("e2e-storage")?;
    let job = stage.deploy(&json!({"checkpoints": {"onDelete": "Delete"}}))?;
    stage.flows()?;
    // During a savepoint.
    stage.store.stall()?;
    savepoints::ask(&stage, "slow", &json!({}))?;
    sleep(Duration::from_secs(10));
    stage.store.resume()?;
    savepoints::complete(&stage, "slow")?;
    stage.flows()?;
    stage.ready()?;
    stage.finish()?;
    // During deletion.
    let folder = stage.store.objects().join(stage.name).join(stage.name).join(stage.name);
    let folder = folder.join(text(&job, "/metadata/uid"));
    ensure!(folder.join("log").is_dir(), "{} is not there", folder.display());
    stage.store.stall()?;
    stage.namespace.kubectl(&["delete", "streamjob", stage.name, "--wait=false"])?;
    stage.until_no_pods()?;
    sleep(Duration::from_secs(5));
    let job = stage.look()?;
    ensure!(text(&job, "/status/state") == "Deleting", "it is gone, and its checkpoints are not: {job:#}");
    stage.store.resume()?;
    stage.delete()?;
    ensure!(!folder.join("log").exists(), "{} is still there", folder.display());
    Ok(())
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn an_older_checkpoint_is_used_where_the_newest_is_damaged_and_that_is_said() -> Result<()> {
    let mut stage = Stage::new("e2e-damage")?;
    stage.deploy(&json!({"checkpoints": {"interval": "8s"}}))?;
    stage.flows()?;
    stage.flows()?;
    // There are eight seconds to the next checkpoint.
    let (coordinator, _) = stage.pods("coordinator")?.remove(0);
    operator::signal(&coordinator, Signal::SIGKILL)?;
    for (worker, _) in stage.pods("worker")? {
        operator::signal(&worker, Signal::SIGKILL)?;
    }
    let folder = stage.store.objects().join(stage.name);
    let damaged = damage_newest(&folder)?;
    let name = damaged.file_name().context("no name")?.to_string_lossy().into_owned();
    let newest: u64 = name.split_once('-').context("a file of state begins with its epoch")?.0.parse()?;
    let job = stage.until("restored from an older checkpoint", |job| {
        holds(job, "Ready") && !text(job, "/status/restoredFrom/fallback").is_empty()
    })?;
    println!("epoch {newest} was damaged: {}", text(&job, "/status/restoredFrom/fallback"));
    ensure!(job["status"]["restoredFrom"]["epoch"].as_u64() < Some(newest), "{job:#}");
    stage.flows()?;
    // What the damaged checkpoint had committed is written again; nothing is missing.
    stage.finish_with(Repeats::Allowed)
}

/// Turns a bit in the file of state that was written last.
fn damage_newest(folder: &Path) -> Result<PathBuf> {
    let mut newest = None;
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if entry.path().extension().is_some_and(|e| e == "state") {
                newest = newest.max(Some((entry.metadata()?.modified()?, entry.path())));
            }
        }
    }
    let (_, path) = newest.context("there is no state")?;
    let mut bytes = std::fs::read(&path)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes)?;
    Ok(path)
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_node_that_is_drained_or_lost_costs_no_record() -> Result<()> {
    let mut stage = Stage::alone("e2e-nodes")?;
    stage.deploy(&json!({"worker": {"slots": 1}}))?;
    stage.flows()?;
    // Not the one of the control plane.
    let control_plane = operator::control_plane(&stage.namespace)?;
    let away = |stage: &Stage| -> Result<String> {
        let workers = stage.pods("worker")?;
        let other = workers.into_iter().find(|(_, node)| !control_plane.contains(node));
        Ok(other.context("all workers are on the node of the control plane")?.1)
    };
    let node = away(&stage)?;
    let drain = ["drain", &node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s"];
    stage.namespace.cluster.kubectl(&drain)?;
    println!("{node} drained: new output after {:.1} s more", stage.flows()?.as_secs_f64());
    ensure!(stage.pods("worker")?.iter().all(|(_, n)| *n != node), "{node} still has pods");
    stage.namespace.cluster.kubectl(&["uncordon", &node])?;
    stage.ready()?;
    let node = away(&stage)?;
    let coordinates = stage.pods("coordinator")?.iter().any(|(_, n)| *n == node);
    operator::node("stop", &node)?;
    let lost = stage.flows();
    let with = if coordinates { "the coordinator and a worker" } else { "a worker" };
    println!("{node} lost with {with}: new output after {:?}", lost.as_ref().map(Duration::as_secs));
    operator::node("start", &node)?;
    lost?;
    let place = format!("node/{node}");
    stage.namespace.cluster.kubectl(&["wait", &place, "--for=condition=Ready", "--timeout=120s"])?;
    stage.ready()?;
    stage.finish()
}
