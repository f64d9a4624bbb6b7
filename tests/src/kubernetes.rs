//! A Kubernetes cluster as its users see it: through `kubectl`. Which one, the environment says (`tests/cluster/README.md`).

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::IpAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

/// From one look to the next.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long a job may take to come up, go through an upgrade, or go: this machine does other work, too.
pub const PATIENCE: Duration = Duration::from_secs(180);
/// Lines of logs that a failure shows of each pod.
const LOG_LINES: &str = "--tail=40";

/// A cluster that somebody has brought up, with the operator in it.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// The address of this machine for pods.
    pub host: IpAddr,
    kubectl: PathBuf,
}

impl Cluster {
    /// The one that the environment names.
    ///
    /// # Errors
    /// When it names none.
    pub fn of_environment() -> Result<Self> {
        let needs = "these tests need a cluster: run them with `make e2e`";
        let host = std::env::var("FLOODMARK_CLUSTER_HOST").context(needs)?;
        std::env::var("KUBECONFIG").context(needs)?;
        let bin = std::env::var_os("FLOODMARK_CLUSTER_BIN").map(PathBuf::from);
        let kubectl = bin.map_or_else(|| PathBuf::from("kubectl"), |bin| bin.join("kubectl"));
        Ok(Self { host: host.parse().context("FLOODMARK_CLUSTER_HOST")?, kubectl })
    }

    /// What `kubectl` answers.
    ///
    /// # Errors
    /// What it says on standard error.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.run(arguments, None)
    }

    fn run(&self, arguments: &[&str], input: Option<&str>) -> Result<String> {
        let mut command = Command::new(&self.kubectl);
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = command.spawn().with_context(|| format!("start {}", self.kubectl.display()))?;
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            stdin.write_all(input.as_bytes())?;
        }
        let ended = child.wait_with_output()?;
        let error = String::from_utf8_lossy(&ended.stderr);
        ensure!(ended.status.success(), "kubectl {}: {}", arguments.join(" "), error.trim());
        Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
    }

    /// A new namespace with this name, where pods must keep to the *restricted* profile.
    ///
    /// # Errors
    /// The cluster's.
    pub fn namespace(&self, name: &str) -> Result<Namespace> {
        let namespace = Namespace { cluster: self.clone(), name: name.to_owned(), stays: false };
        let object = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {
                "pod-security.kubernetes.io/enforce": "restricted",
                "pod-security.kubernetes.io/warn": "restricted",
            }},
        });
        self.kubectl(&["delete", "namespace", name, "--ignore-not-found", "--timeout=120s"])?;
        self.run(&["apply", "-f", "-"], Some(&object.to_string()))?;
        Ok(namespace)
    }

    /// What `kubectl` writes from now on, a line each, with the time at which it was there; `kubectl` ends when this is dropped.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn follow(&self, arguments: &[&str]) -> Result<Following> {
        let mut command = Command::new(&self.kubectl);
        let mut child = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take().context("no output")?;
        let lines = Arc::<Mutex<Vec<_>>>::default();
        let of_thread = lines.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(std::io::Result::ok) {
                of_thread.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), line));
            }
        });
        Ok(Following { child, lines })
    }

    /// A namespace that is there already, and stays.
    #[must_use]
    pub fn existing(&self, name: &str) -> Namespace {
        Namespace { cluster: self.clone(), name: name.to_owned(), stays: true }
    }
}

/// See [`Cluster::follow`].
pub struct Following {
    child: Child,
    lines: Arc<Mutex<Vec<(Instant, String)>>>,
}

impl Following {
    /// The lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<(Instant, String)> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A namespace of a test. Dropped, it goes, with all that is in it.
#[derive(Debug)]
pub struct Namespace {
    /// Where it is.
    pub cluster: Cluster,
    /// Its name.
    pub name: String,
    stays: bool,
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        if std::thread::panicking() {
            println!("{}", self.describe());
            if std::env::var_os("FLOODMARK_KEEP").is_some() {
                return;
            }
        }
        // Nobody waits for it but who makes it anew.
        let _ = self.cluster.kubectl(&["delete", "namespace", &self.name, "--wait=false"]);
    }
}

impl Namespace {
    /// What `kubectl` answers, in this namespace.
    ///
    /// # Errors
    /// What it says on standard error.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.cluster.kubectl(&[&["--namespace", &self.name], arguments].concat())
    }

    /// `kubectl apply`.
    ///
    /// # Errors
    /// Why it was refused.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let arguments = ["--namespace", &self.name, "apply", "-f", "-"];
        self.cluster.run(&arguments, Some(&object.to_string())).map(drop)
    }

    /// `kubectl apply` of an object that is not stored, and refused also for fields which its definition does not have.
    ///
    /// # Errors
    /// Why it would be refused.
    pub fn try_out(&self, object: &Value) -> Result<()> {
        let arguments = ["--namespace", &self.name, "apply", "--validate=strict", "--dry-run=server", "-f", "-"];
        self.cluster.run(&arguments, Some(&object.to_string())).map(drop)
    }

    /// Merges fields into an object.
    ///
    /// # Errors
    /// Why it was refused.
    pub fn patch(&self, kind: &str, name: &str, fields: &Value) -> Result<()> {
        self.kubectl(&["patch", kind, name, "--type=merge", "-p", &fields.to_string()]).map(drop)
    }

    /// The object; `Null` if there is none.
    ///
    /// # Errors
    /// The cluster's.
    pub fn get(&self, kind: &str, name: &str) -> Result<Value> {
        let text = self.kubectl(&["get", kind, name, "--ignore-not-found", "-o", "json"])?;
        if text.trim().is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&text)?) }
    }

    /// The objects with these labels; all, if none are given.
    ///
    /// # Errors
    /// The cluster's.
    pub fn list(&self, kind: &str, labels: &str) -> Result<Vec<Value>> {
        let text = self.kubectl(&["get", kind, "-l", labels, "-o", "json"])?;
        let list: Value = serde_json::from_str(&text)?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// Waits until there is something.
    ///
    /// # Errors
    /// When that takes too long, with what there is in the namespace; and those of `look`.
    pub fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            ensure!(Instant::now() < end, "not within {PATIENCE:?}: {what}\n{}", self.describe());
            sleep(LOOK_EVERY);
        }
    }

    /// Waits until an object is as it shall be.
    ///
    /// # Errors
    /// See [`Self::wait`].
    pub fn until(&self, kind: &str, name: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
        self.wait(&format!("{kind} {name} is {what}"), || Ok(Some(self.get(kind, name)?).filter(&holds)))
    }

    /// Pods, events and the ends of logs, for people who look into a failure.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = String::new();
        let mut add = |arguments: &[&str]| {
            text += &self.kubectl(arguments).unwrap_or_else(|e| format!("{e:#}\n"));
        };
        add(&["get", "streamjobs,savepoints,deployments,pods,leases", "-o", "wide"]);
        let statuses = "{range .items[*]}{.kind} {.metadata.name}: {.status}{\"\\n\"}{end}";
        add(&["get", "streamjobs,savepoints", "-o", &format!("jsonpath={statuses}")]);
        add(&["get", "events", "--sort-by=.lastTimestamp"]);
        let pods = self.list("pods", "").unwrap_or_default();
        for pod in pods.iter().filter_map(|p| p["metadata"]["name"].as_str()) {
            text += &format!("--- {pod}\n");
            text += &self.kubectl(&["logs", pod, LOG_LINES]).unwrap_or_else(|e| format!("{e:#}\n"));
        }
        text
    }
}

/// Whether a condition of an object holds, of this generation of its spec.
#[must_use]
pub fn holds(object: &Value, condition: &str) -> bool {
    let current = object["status"]["observedGeneration"] == object["metadata"]["generation"];
    let conditions = object["status"]["conditions"].as_array();
    let holds = |c: &Value| c["type"] == condition && c["status"] == "True";
    current && conditions.is_some_and(|all| all.iter().any(holds))
}

/// Why a condition is as it is.
#[must_use]
pub fn reason<'a>(object: &'a Value, condition: &str) -> (&'a str, &'a str) {
    let conditions = object["status"]["conditions"].as_array();
    let found = conditions.and_then(|all| all.iter().find(|c| c["type"] == condition));
    let text = |field: &str| found.and_then(|c| c[field].as_str()).unwrap_or_default();
    (text("reason"), text("message"))
}
