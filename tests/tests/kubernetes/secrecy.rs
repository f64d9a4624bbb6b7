//! Who may do what, and what nobody gets to see.

use std::path::Path;

use anyhow::{Result, ensure};
use floodmark_tests::kubernetes::{holds, reason};
use serde_json::json;

use crate::{
    operator::{CONTROLLER, NAMESPACE, Operator, ask_pod},
    stage::Stage,
    text,
};

/// A secret that must turn up nowhere.
const CANARY: &str = "canary-8d1f02c7e6";

#[test]
#[ignore = "needs a cluster: make e2e"]
fn secrets_turn_up_nowhere_and_rights_are_the_least() -> Result<()> {
    let mut stage = Stage::new("e2e-secrets")?;
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "broker"}, "stringData": {"password": CANARY},
    });
    stage.namespace.apply(&secret)?;
    // The broker asks for none; it is handed over all the same.
    let sql = stage
        .sql()
        .replace("'format' = 'json')", "'format' = 'json', 'properties.sasl.password' = '${BROKER_PASSWORD}')");
    ensure!(sql != stage.sql());
    let from =
        json!([{"name": "BROKER_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "broker", "key": "password"}}}]);
    stage.deploy(&json!({"sql": sql, "env": from}))?;
    stage.flows()?;
    super::savepoints::ask(&stage, "held", &json!({}))?;
    super::savepoints::complete(&stage, "held")?;
    // A failure, and an upgrade that is refused, to have them told.
    let (worker, _) = stage.pods("worker")?.remove(0);
    stage.kill(&worker)?;
    stage.flows()?;
    stage.edit(&json!({"sql": sql.replace("max(amount)", "min(amount)")}))?;
    stage.until("stalled", |job| holds(job, "Stalled"))?;
    stage.edit(&json!({"sql": sql}))?;
    stage.ready()?;

    let encoded = |secret: &str, key: &str| -> Result<String> {
        let secret = stage.namespace.get("secret", secret)?;
        Ok(text(&secret, &format!("/data/{key}")).to_owned())
    };
    let encoded = [encoded("broker", "password")?, encoded("storage", "AWS_SECRET_ACCESS_KEY")?];
    ensure!(encoded.iter().all(|secret| secret.len() > 8));
    let hidden: Vec<_> = [CANARY.to_owned(), stage.store.secret().to_owned()].into_iter().chain(encoded).collect();
    let tells = |what: &str, bytes: &[u8]| {
        ensure!(!hidden.iter().any(|secret| contains(bytes, secret.as_bytes())), "{what} tells a secret");
        Ok(())
    };
    ensure!(tells("this", format!("a {CANARY}").as_bytes()).is_err(), "secrets would not be found");
    let kinds = stage.namespace.cluster.kubectl(&["api-resources", "--namespaced", "--verbs=list", "-o", "name"])?;
    let kinds: Vec<_> = kinds.lines().filter(|k| *k != "secrets").collect();
    ensure!(kinds.len() > 20, "{kinds:?}");
    tells("an object", stage.namespace.kubectl(&["get", &kinds.join(","), "-o", "yaml"])?.as_bytes())?;
    for pod in stage.namespace.list("pods", "floodmark.io/job")? {
        tells("a log", stage.namespace.kubectl(&["logs", text(&pod, "/metadata/name")])?.as_bytes())?;
        let metrics = ask_pod(&stage.namespace, text(&pod, "/metadata/name"), "/metrics")?;
        tells("metrics", metrics.as_bytes())?;
    }
    let operator = Operator::of(&stage.namespace.cluster);
    for pod in operator.pods()? {
        tells("the controller's log", operator.namespace.kubectl(&["logs", &pod])?.as_bytes())?;
    }
    let files = each_file(&stage.store.objects(), &mut |path, bytes| tells(&path.display().to_string(), bytes))?;
    ensure!(files > 10, "{files} files in the storage");
    rights(&stage)?;
    stage.finish()
}

/// What the accounts of the controller and of a job may do, and what not.
fn rights(stage: &Stage) -> Result<()> {
    let controller = format!("system:serviceaccount:{NAMESPACE}:{CONTROLLER}");
    let job = format!("system:serviceaccount:{0}:{0}", stage.name);
    let lease = format!("leases/{}", stage.name);
    for (who, may, what) in [
        (&controller, true, ["get", "secrets"]),
        (&controller, false, ["list", "secrets"]),
        (&controller, false, ["watch", "secrets"]),
        (&controller, false, ["delete", "namespaces"]),
        (&controller, false, ["get", "nodes"]),
        (&controller, false, ["create", "pods"]),
        (&controller, false, ["create", "clusterrolebindings"]),
        (&controller, false, ["escalate", "roles"]),
        (&controller, false, ["delete", "streamjobs"]),
        (&job, true, ["patch", &lease]),
        (&job, false, ["patch", "leases/another"]),
        (&job, false, ["list", "leases"]),
        (&job, false, ["get", "secrets"]),
        (&job, false, ["get", "pods"]),
        (&job, false, ["get", "streamjobs"]),
    ] {
        let asked = ["auth", "can-i", what[0], what[1], "--as", who];
        // It answers by its exit code, too.
        let answer = stage.namespace.kubectl(&asked).is_ok();
        ensure!(answer == may, "{who}: {} {}", what[0], what[1]);
    }
    for worker in stage.namespace.list("pods", "floodmark.io/role=worker")? {
        ensure!(!worker["spec"].to_string().contains("serviceAccountToken"), "a worker has a token: {worker:#}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn pods_that_the_namespace_does_not_allow_are_told() -> Result<()> {
    let mut stage = Stage::flowing("e2e-restricted")?;
    // The namespace enforces the profile *restricted*, which what runs keeps to.
    stage.edit(&json!({"worker": {"podTemplate": {"spec": {"hostNetwork": true}}}}))?;
    let job = stage.until("stalled", |job| holds(job, "Stalled"))?;
    ensure!(reason(&job, "Stalled").1.contains("PodSecurity") && holds(&job, "Running"), "{job:#}");
    stage.edit(&json!({"worker": {"podTemplate": null}}))?;
    stage.ready()?;
    stage.finish()
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

fn each_file(folder: &Path, look: &mut impl FnMut(&Path, &[u8]) -> Result<()>) -> Result<usize> {
    let mut files = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files += each_file(&entry.path(), look)?;
        } else {
            // The job may remove one meanwhile.
            if let Ok(bytes) = std::fs::read(entry.path()) {
                look(&entry.path(), &bytes)?;
                files += 1;
            }
        }
    }
    Ok(files)
}
