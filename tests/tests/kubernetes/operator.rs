//! The controller, the chart and the nodes, as the administrator of a cluster sees them.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use floodmark_tests::kubernetes::{Cluster, Namespace};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::text;

/// Where `make e2e` has installed the chart, and under which name.
pub(crate) const NAMESPACE: &str = "floodmark-system";
pub(crate) const RELEASE: &str = "floodmark";
/// Of the controller: its Deployment, Lease and ServiceAccount.
pub(crate) const CONTROLLER: &str = "floodmark-controller";
const PODS: &str = "app.kubernetes.io/name=floodmark-controller";

/// See the header of this file.
pub(crate) struct Operator {
    pub(crate) namespace: Namespace,
}

impl Operator {
    pub(crate) fn of(cluster: &Cluster) -> Self {
        Self { namespace: cluster.existing(NAMESPACE) }
    }

    /// Pods of the controller that are not on their way out.
    pub(crate) fn pods(&self) -> Result<Vec<String>> {
        let pods = self.namespace.list("pods", PODS)?;
        let there = pods.iter().filter(|p| p["metadata"]["deletionTimestamp"].is_null());
        Ok(there.map(|p| text(p, "/metadata/name").to_owned()).collect())
    }

    /// The pod that leads.
    pub(crate) fn leader(&self) -> Result<String> {
        let lease = self.namespace.get("lease", CONTROLLER)?;
        Ok(text(&lease, "/spec/holderIdentity").to_owned())
    }

    /// So many pods, all of them ready. With none, all are gone.
    pub(crate) fn scale(&self, replicas: usize) -> Result<()> {
        self.roll_out(&["scale", &format!("--replicas={replicas}")])?;
        let look = || Ok((self.namespace.list("pods", PODS)?.len() == replicas).then_some(()));
        self.namespace.wait("there are as many controllers as there shall be", look)
    }

    /// Other pods in place of those that there are.
    pub(crate) fn restart(&self) -> Result<()> {
        self.roll_out(&["rollout", "restart"])
    }

    /// Changes the controller's Deployment, and waits until its pods are as it says.
    fn roll_out(&self, order: &[&str]) -> Result<()> {
        let deployment = format!("deployment/{CONTROLLER}");
        self.namespace.kubectl(&[order, &[&deployment]].concat())?;
        self.namespace.kubectl(&["rollout", "status", &deployment, "--timeout=120s"]).map(drop)
    }

    /// What the leader counts of itself.
    pub(crate) fn metrics(&self) -> Result<String> {
        ask_pod(&self.namespace, &self.leader()?, "/metrics")
    }

    /// Upgrades the chart's release, with values beyond those that it has.
    pub(crate) fn upgrade(&self, values: &[&str]) -> Result<()> {
        let bin = std::env::var_os("FLOODMARK_CLUSTER_BIN").unwrap_or_default();
        let mut helm = Command::new(Path::new(&bin).join("helm"));
        let chart = repository().join("charts/floodmark");
        helm.args(["upgrade", RELEASE]).arg(chart).args(["--namespace", NAMESPACE, "--wait", "--timeout=120s"]);
        helm.args(["--reset-values", "--set", "clusterWide=true"]);
        for value in values {
            helm.args(["--set", value]);
        }
        let ended = helm.output().context("start helm")?;
        ensure!(ended.status.success(), "helm upgrade: {}", String::from_utf8_lossy(&ended.stderr));
        Ok(())
    }
}

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Has a node stopped or started, by the script that has brought the cluster up.
pub(crate) fn node(order: &str, node: &str) -> Result<()> {
    let script = std::env::var_os("FLOODMARK_CLUSTER_SCRIPT")
        .context("FLOODMARK_CLUSTER_SCRIPT names none: this scenario needs a cluster of `make cluster`")?;
    let ended = Command::new(&script).args(["node", order, node]).output().context("start the cluster's script")?;
    ensure!(ended.status.success(), "node {order} {node}: {}", String::from_utf8_lossy(&ended.stderr));
    Ok(())
}

/// Which nodes run the control plane, as far as the cluster shows them.
pub(crate) fn control_plane(namespace: &Namespace) -> Result<Vec<String>> {
    let nodes = namespace.list("nodes", "node-role.kubernetes.io/control-plane")?;
    Ok(nodes.iter().map(|n| text(n, "/metadata/name").to_owned()).collect())
}

/// What a pod answers over HTTP to this path, asked through the API server. Where policies are enforced that is a stranger at a
/// job's door, and at the controller's: one more policy in the namespace lets it in.
pub(crate) fn ask_pod(namespace: &Namespace, pod: &str, path: &str) -> Result<String> {
    let nodes = namespace.list("nodes", "")?;
    let addresses = nodes.iter().flat_map(|n| n.pointer("/status/addresses").and_then(Value::as_array)).flatten();
    let internal = addresses.filter(|a| text(a, "/type") == "InternalIP").map(|a| text(a, "/address"));
    let host = |ip: &str| json!({"ipBlock": {"cidr": format!("{ip}/{}", if ip.contains(':') { 128 } else { 32 })}});
    namespace.apply(&json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "api-servers-may-ask"},
        "spec": {
            "podSelector": {},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": internal.map(host).collect::<Vec<_>>(), "ports": [{"port": 8080}]}],
        },
    }))?;
    let place = format!("/api/v1/namespaces/{}/pods/{pod}:8080/proxy{path}", namespace.name);
    let mut refused = None;
    let ask = || Ok(namespace.cluster.kubectl(&["get", "--raw", &place]).map_err(|e| refused = Some(e)).ok());
    // A policy holds a moment after it was written.
    namespace.wait("a pod answers the API server", ask).map_err(|e| refused.unwrap_or(e))
}

/// Sends a signal to the process of a pod, which must run on this machine, as all of `make cluster` do.
pub(crate) fn signal(pod: &str, signal: Signal) -> Result<()> {
    let named = format!("POD_NAME={pod}");
    for process in std::fs::read_dir("/proc")? {
        let process = process?;
        let Ok(pid) = process.file_name().to_string_lossy().parse() else { continue };
        // Of a process that is not ours, or has just ended.
        let Ok(environment) = std::fs::read(process.path().join("environ")) else { continue };
        if environment.split(|byte| *byte == 0).any(|variable| variable == named.as_bytes()) {
            return Ok(kill(Pid::from_raw(pid), signal)?);
        }
    }
    bail!("no process of this machine is that of pod {pod}: this scenario needs a cluster of `make cluster`, and root")
}

/// A counter or gauge in the text format of Prometheus, summed over those of its labels that are asked for.
pub(crate) fn metric(text: &str, name: &str, wanted: impl Fn(&str) -> bool) -> f64 {
    let lines =
        text.lines().filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && wanted(l));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// When which pods were started how often: what changes if any of them is.
pub(crate) fn lives(pods: &[Value]) -> Vec<String> {
    let life = |p: &Value| {
        let restarts = p.pointer("/status/containerStatuses/0/restartCount");
        format!("{} {} {restarts:?}", text(p, "/metadata/name"), text(p, "/metadata/uid"))
    };
    let mut lives: Vec<_> = pods.iter().map(life).collect();
    lives.sort();
    lives
}
