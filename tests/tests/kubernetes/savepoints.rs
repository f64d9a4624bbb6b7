//! Savepoints that objects ask for: once, on a schedule, kept and disposed of.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use floodmark_tests::kubernetes::holds;
use serde_json::{Value, json};

use crate::{stage::Stage, text};

/// Asks for a savepoint of the stage's job.
pub(crate) fn ask(stage: &Stage, name: &str, more: &Value) -> Result<()> {
    let mut object = json!({
        "apiVersion": "floodmark.io/v1alpha1", "kind": "Savepoint",
        "metadata": {"name": name}, "spec": {"job": stage.name},
    });
    let fields = more.as_object().into_iter().flatten();
    fields.for_each(|(field, value)| object["spec"][field] = value.clone());
    stage.namespace.apply(&object)
}

/// Waits until a savepoint is complete, and says where it is: in words for `restore.from`, and on disk.
pub(crate) fn complete(stage: &Stage, name: &str) -> Result<(String, PathBuf)> {
    let savepoint = stage.namespace.until("savepoint", name, "complete", |s| holds(s, "Ready"))?;
    let location = text(&savepoint, "/status/location").to_owned();
    ensure!(text(&savepoint, "/status/state") == "Completed", "{savepoint:#}");
    ensure!(savepoint["status"]["size"].as_u64() > Some(0), "{savepoint:#}");
    let bucket = format!("s3://{}/", stage.store.bucket());
    let folder = location.strip_prefix(&bucket).unwrap_or_default();
    let folder = stage.store.objects().join(folder);
    ensure!(folder.is_dir(), "{location} is not in the storage");
    Ok((location, folder))
}

fn delete(stage: &Stage, name: &str) -> Result<()> {
    stage.namespace.kubectl(&["delete", "savepoint", name, "--timeout=60s"]).map(drop)
}

/// The savepoints that a schedule has made, oldest first.
fn made_by(stage: &Stage, schedule: &str) -> Result<Vec<String>> {
    let all = stage.namespace.list("savepoints", "")?;
    let of_schedule = |s: &&Value| text(s, "/metadata/ownerReferences/0/name") == schedule;
    let mut names: Vec<_> = all.iter().filter(of_schedule).map(|s| text(s, "/metadata/name").to_owned()).collect();
    names.sort();
    Ok(names)
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn savepoints_are_taken_once_and_on_a_schedule_kept_and_disposed_of() -> Result<()> {
    let mut stage = Stage::new("e2e-savepoints")?;
    stage.deploy(&json!({"checkpoints": {"onDelete": "Delete"}}))?;
    stage.flows()?;
    ask(&stage, "each-minute", &json!({"schedule": "* * * * *", "retain": 1, "onDelete": "Delete"}))?;
    ask(&stage, "kept", &json!({}))?;
    ask(&stage, "disposed", &json!({"onDelete": "Delete"}))?;
    let (_, kept) = complete(&stage, "kept")?;
    let (_, disposed) = complete(&stage, "disposed")?;
    // The first of the schedule stays as long as the job names it, although one alone is kept.
    let look = || Ok(made_by(&stage, "each-minute")?.into_iter().next());
    let first = stage.namespace.wait("the schedule has made one", look)?;
    let (named, first_folder) = complete(&stage, &first)?;
    stage.edit(&json!({"restore": {"from": named}}))?;
    let look = || Ok(made_by(&stage, "each-minute")?.into_iter().nth(1));
    let second = stage.namespace.wait("the schedule has made another", look)?;
    let (_, second_folder) = complete(&stage, &second)?;
    stage.flows()?;
    ensure!(made_by(&stage, "each-minute")?.contains(&first) && first_folder.is_dir(), "{first} is named, and gone");
    stage.edit(&json!({"restore": {"from": null}}))?;
    stage.namespace.wait("what nobody names any more is gone", || {
        Ok((!made_by(&stage, "each-minute")?.contains(&first)).then_some(()))
    })?;
    ensure!(!first_folder.exists(), "{} is still there", first_folder.display());
    let newest = made_by(&stage, "each-minute")?.pop().unwrap_or_default();
    let (_, newest_folder) = complete(&stage, &newest)?;
    // Without the job they can be disposed of as well.
    stage.finish()?;
    stage.delete()?;
    ensure!(kept.is_dir() && disposed.is_dir(), "savepoints go with nobody");
    delete(&stage, "kept")?;
    delete(&stage, "disposed")?;
    delete(&stage, "each-minute")?;
    stage
        .namespace
        .wait("the schedule's own are gone", || Ok(made_by(&stage, "each-minute")?.is_empty().then_some(())))?;
    ensure!(kept.is_dir(), "onDelete: Retain keeps {}", kept.display());
    ensure!(
        !disposed.exists() && !second_folder.exists() && !newest_folder.exists(),
        "onDelete: Delete leaves nothing"
    );
    Ok(())
}
