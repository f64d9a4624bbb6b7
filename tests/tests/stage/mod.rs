//! A job in a namespace of its own: orders come in through Kafka, and what goes out is held against an answer computed without
//! the engine.

#![allow(unreachable_pub, reason = "a module of one executable")]

use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use floodmark_testkit::{Kafka, S3};
use floodmark_tests::{
    compare::{Row, multiset},
    events::{Order, Orders},
    feeder::Feeder,
    kubernetes::{Cluster, Namespace, PATIENCE, holds},
    oracle::Repeats,
};
use serde_json::{Value, json};

use super::servers::orders::Scenario;

static KAFKA: Mutex<Weak<Kafka>> = Mutex::new(Weak::new());
static STORE: Mutex<Weak<S3>> = Mutex::new(Weak::new());

/// From one look at the output to the next.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// See the header of this file.
pub struct Stage {
    pub namespace: Namespace,
    pub scenario: Scenario,
    pub store: Arc<S3>,
    /// Of the job, its namespace and its topics.
    pub name: &'static str,
    orders: Orders,
    count: u64,
    feeder: Option<Feeder>,
}

fn shared<T>(server: &Mutex<Weak<T>>, start: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
    let mut server = server.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(running) = server.upgrade() {
        return Ok(running);
    }
    let started = Arc::new(start()?);
    *server = Arc::downgrade(&started);
    Ok(started)
}

impl Stage {
    /// A namespace, topics, and a Secret to reach the storage with.
    pub fn new(name: &'static str) -> Result<Self> {
        let cluster = Cluster::of_environment()?;
        let store = shared(&STORE, || S3::start_at(cluster.host))?;
        Self::on(name, store)
    }

    /// The same with a storage of one's own.
    pub fn on(name: &'static str, store: Arc<S3>) -> Result<Self> {
        let cluster = Cluster::of_environment()?;
        let broker = shared(&KAFKA, || Kafka::start_at(cluster.host))?;
        let scenario = Scenario::on(broker, name)?;
        let namespace = cluster.namespace(name)?;
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "storage"},
            "stringData": store.env().into_iter().map(|(k, v)| (k.to_owned(), json!(v))).collect::<serde_json::Map<_, _>>(),
        });
        namespace.apply(&secret)?;
        Ok(Self { namespace, scenario, store, name, orders: Orders::default(), count: 0, feeder: None })
    }

    /// Every order copied, and a running total per shop: state that shows each record lost or repeated.
    pub fn sql(&self) -> String {
        self.scenario.source("") + &self.scenario.copies() + &self.scenario.unwindowed()
    }

    /// Where the job's checkpoints are.
    pub fn storage(&self) -> String {
        format!("s3://{}/{}", self.store.bucket(), self.name)
    }

    /// The job, with `more` merged into its spec.
    pub fn job(&self, more: &Value) -> Value {
        let mut job = json!({
            "apiVersion": "floodmark.io/v1alpha1", "kind": "StreamJob",
            "metadata": {"name": self.name},
            "spec": {
                "sql": self.sql(),
                "parallelism": 2,
                "maxParallelism": 16,
                "checkpoints": {
                    "storage": self.storage(), "interval": "1s", "credentials": {"secretName": "storage"},
                },
                "worker": {"slots": 2},
                "upgrade": {"timeout": "90s"},
            },
        });
        merge(&mut job["spec"], more);
        job
    }

    /// Applies the job and waits until it is ready.
    pub fn deploy(&self, more: &Value) -> Result<Value> {
        self.namespace.apply(&self.job(more))?;
        self.ready()
    }

    /// Waits until the present spec of the job is ready.
    pub fn ready(&self) -> Result<Value> {
        self.until("ready", |job| holds(job, "Ready"))
    }

    /// Waits until the job is as it shall be.
    pub fn until(&self, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
        self.namespace.until("streamjob", self.name, what, holds)
    }

    /// Merges fields into the job's spec.
    pub fn edit(&self, spec: &Value) -> Result<()> {
        self.namespace.patch("streamjob", self.name, &json!({"spec": spec}))
    }

    /// The job as it stands.
    pub fn look(&self) -> Result<Value> {
        self.namespace.get("streamjob", self.name)
    }

    /// Pods of the job in this role, `coordinator` or `worker`: name and node of each that is not on its way out.
    pub fn pods(&self, role: &str) -> Result<Vec<(String, String)>> {
        let pods = self.namespace.list("pods", &format!("floodmark.io/role={role}"))?;
        let there = pods.iter().filter(|p| p["metadata"]["deletionTimestamp"].is_null());
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        Ok(there.map(|p| (text(&p["metadata"]["name"]), text(&p["spec"]["nodeName"]))).collect())
    }

    /// Waits until the job has no pods left.
    pub fn until_no_pods(&self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !self.namespace.list("pods", "floodmark.io/job")?.is_empty() {
            ensure!(Instant::now() < end, "there are pods after {PATIENCE:?}\n{}", self.namespace.describe());
            sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Begins to write orders, so many a second; the last tenth when the input is to end.
    pub fn feed(&mut self, count: u64, per_second: u64) -> Result<()> {
        self.count = count;
        self.feeder = Some(self.scenario.feeder(self.orders, count, per_second)?);
        Ok(())
    }

    /// How many orders the job has copied so that everybody sees them.
    pub fn copied(&self) -> Result<usize> {
        Ok(self.scenario.broker.read_committed(&self.scenario.topic("copies"))?.len())
    }

    /// Waits until more orders have been copied than had been.
    pub fn flows(&self) -> Result<()> {
        let before = self.copied()?;
        let end = Instant::now() + PATIENCE;
        while self.copied()? <= before {
            ensure!(Instant::now() < end, "no output within {PATIENCE:?}\n{}", self.namespace.describe());
            sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Writes the rest of the orders, waits until all have been copied, and checks all output.
    pub fn finish(&mut self) -> Result<()> {
        self.feeder.take().context("nothing was fed")?.finish()?;
        let end = Instant::now() + PATIENCE;
        let wanted = usize::try_from(self.count)?;
        loop {
            let copied = self.copied()?;
            if copied >= wanted {
                break;
            }
            if Instant::now() > end {
                bail!("{copied} of {wanted} orders are copied after {PATIENCE:?}\n{}", self.namespace.describe());
            }
            sleep(LOOK_EVERY);
        }
        // What would be repeated would come with the next checkpoint.
        sleep(Duration::from_secs(3));
        let expected: Vec<Row> = self.orders.first(self.count).map(copy_of).collect();
        let rows = multiset(expected, self.scenario.copied()?)?;
        println!("{}: {rows} copied rows are exact", self.name);
        self.scenario.check_totals(self.orders.first(self.count), Repeats::Refused)
    }
}

fn copy_of(order: Order) -> Row {
    vec![order.shop_name(), order.amount.to_string(), order.time_ms.to_string()]
}

/// Puts fields into an object, those of objects in it one by one.
fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}
