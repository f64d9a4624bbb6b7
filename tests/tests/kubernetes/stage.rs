//! A job in a namespace of its own: orders come in through Kafka, and what goes out is held against an answer computed without
//! the engine.

use std::{
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use floodmark_testkit::S3;
use floodmark_tests::{
    compare::{Row, multiset},
    events::{Order, Orders},
    feeder::Feeder,
    follower::Follower,
    kubernetes::{Cluster, Namespace, holds},
    oracle::Repeats,
};
use serde_json::{Value, json};

use crate::{
    servers::{self, orders::Scenario},
    text,
};

/// Orders that come each second, and in all if nobody ends them.
const PER_SECOND: u64 = 1_500;
const ORDERS_MAX: u64 = 900_000;
/// Of the topic that is followed.
const COPIES_PARTITIONS: i32 = 2;

/// Held for writing by those who take away what others need: the controller, a node.
static CLUSTER: RwLock<()> = RwLock::new(());

/// Who else may use the cluster while a scenario does.
pub(crate) enum Turn {
    /// All that do no harm to others.
    Shared(#[expect(dead_code, reason = "held until it is dropped")] RwLockReadGuard<'static, ()>),
    /// Nobody.
    Alone(#[expect(dead_code, reason = "held until it is dropped")] RwLockWriteGuard<'static, ()>),
}

impl Turn {
    /// Waits for those who want the cluster for themselves.
    pub(crate) fn shared() -> Self {
        Self::Shared(CLUSTER.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for everybody.
    pub(crate) fn alone() -> Self {
        Self::Alone(CLUSTER.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// See the header of this file.
pub(crate) struct Stage {
    pub(crate) namespace: Namespace,
    pub(crate) scenario: Scenario,
    pub(crate) store: Arc<S3>,
    /// Of the job, its namespace and its topics.
    pub(crate) name: &'static str,
    orders: Orders,
    feeder: Option<Feeder>,
    follower: Follower,
    _turn: Turn,
}

impl Stage {
    /// A namespace, topics into which orders come from now on, and a Secret to reach the shared storage with.
    pub(crate) fn new(name: &'static str) -> Result<Self> {
        Self::on(name, Turn::shared(), servers::s3_at(Cluster::of_environment()?.host)?)
    }

    /// The same, with the job as it is by itself: it is ready, and its output goes on.
    pub(crate) fn flowing(name: &'static str) -> Result<Self> {
        let stage = Self::new(name)?;
        stage.deploy(&json!({}))?;
        stage.flows()?;
        Ok(stage)
    }

    /// The same, with the cluster for itself.
    pub(crate) fn alone(name: &'static str) -> Result<Self> {
        let turn = Turn::alone();
        Self::on(name, turn, servers::s3_at(Cluster::of_environment()?.host)?)
    }

    /// The same, with a storage of its own.
    pub(crate) fn with_storage(name: &'static str) -> Result<Self> {
        Self::on(name, Turn::shared(), Arc::new(S3::start_at(Cluster::of_environment()?.host)?))
    }

    /// Both.
    pub(crate) fn alone_with_storage(name: &'static str) -> Result<Self> {
        let turn = Turn::alone();
        Self::on(name, turn, Arc::new(S3::start_at(Cluster::of_environment()?.host)?))
    }

    fn on(name: &'static str, turn: Turn, store: Arc<S3>) -> Result<Self> {
        let cluster = Cluster::of_environment()?;
        let scenario = Scenario::on(servers::kafka_at(cluster.host)?, name)?;
        let namespace = cluster.namespace(name)?;
        let keys = store.env().into_iter().map(|(k, v)| (k.to_owned(), json!(v)));
        namespace.apply(&json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "storage"},
            "stringData": keys.collect::<serde_json::Map<_, _>>(),
        }))?;
        let orders = Orders::default();
        let feeder = Some(scenario.feeder(orders, ORDERS_MAX, PER_SECOND)?);
        let follower = Follower::start(&scenario.broker.bootstrap(), &scenario.topic("copies"), COPIES_PARTITIONS)?;
        Ok(Self { namespace, scenario, store, name, orders, feeder, follower, _turn: turn })
    }

    /// Every order copied, and a running total per shop: state that shows each record lost or repeated.
    pub(crate) fn sql(&self) -> String {
        self.scenario.source("") + &self.scenario.copies() + &self.scenario.unwindowed()
    }

    /// Where the job's checkpoints are.
    pub(crate) fn storage(&self) -> String {
        servers::location(&self.store, self.name)
    }

    /// The job, with `more` merged into its spec.
    pub(crate) fn job(&self, more: &Value) -> Value {
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
    pub(crate) fn deploy(&self, more: &Value) -> Result<Value> {
        self.namespace.apply(&self.job(more))?;
        self.ready()
    }

    /// Waits until the present spec of the job is ready.
    pub(crate) fn ready(&self) -> Result<Value> {
        self.until("ready", |job| holds(job, "Ready"))
    }

    /// Waits until the job is as it shall be.
    pub(crate) fn until(&self, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
        self.namespace.until("streamjob", self.name, what, holds)
    }

    /// Merges fields into the job's spec.
    pub(crate) fn edit(&self, spec: &Value) -> Result<()> {
        self.namespace.patch("streamjob", self.name, &json!({"spec": spec}))
    }

    /// The job as it stands.
    pub(crate) fn look(&self) -> Result<Value> {
        self.namespace.get("streamjob", self.name)
    }

    /// Deletes the job, and waits until it is gone.
    pub(crate) fn delete(&self) -> Result<()> {
        self.namespace.kubectl(&["delete", "streamjob", self.name, "--timeout=120s"]).map(drop)
    }

    /// Pods of the job in this role, `coordinator` or `worker`: name and node of each that is not on its way out.
    pub(crate) fn pods(&self, role: &str) -> Result<Vec<(String, String)>> {
        let pods = self.namespace.list("pods", &format!("floodmark.io/role={role}"))?;
        let there = pods.iter().filter(|p| p["metadata"]["deletionTimestamp"].is_null());
        Ok(there.map(|p| (text(p, "/metadata/name").to_owned(), text(p, "/spec/nodeName").to_owned())).collect())
    }

    /// Takes a pod away as if its machine had been.
    pub(crate) fn kill(&self, pod: &str) -> Result<()> {
        self.namespace.kubectl(&["delete", "pod", pod, "--grace-period=0", "--force"]).map(drop)
    }

    /// Waits until the job has no pods left.
    pub(crate) fn until_no_pods(&self) -> Result<()> {
        let look = || Ok(self.namespace.list("pods", "floodmark.io/job")?.is_empty().then_some(()));
        self.namespace.wait("there are no pods", look)
    }

    /// Orders that the job has copied so that everybody sees them.
    pub(crate) fn copied(&self) -> u64 {
        self.follower.count()
    }

    /// Waits until an order is copied that has not been written yet.
    pub(crate) fn flows(&self) -> Result<Duration> {
        let (start, sent) = (Instant::now(), self.feeder.as_ref().map_or(0, Feeder::sent));
        self.namespace.wait("output goes on", || Ok((self.copied() > sent).then_some(())))?;
        Ok(start.elapsed())
    }

    /// The longest time without output that then lasted or has begun since.
    pub(crate) fn longest_pause(&self, since: Instant) -> Duration {
        self.follower.longest_silence(since)
    }

    /// Ends the input, waits until all of it is copied, and checks all output.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.finish_with(Repeats::Refused)
    }

    /// The same; with [`Repeats::Allowed`] no more than that nothing is missing.
    pub(crate) fn finish_with(&mut self, repeats: Repeats) -> Result<()> {
        let count = self.feeder.take().context("the input has ended before")?.end()?;
        let mut expected: Vec<Row> = self.orders.first(count).map(copy_of).collect();
        if repeats == Repeats::Allowed {
            distinct(&mut expected);
        }
        let copied = self.namespace.wait(&format!("all {count} orders are copied"), || {
            if self.copied() < count {
                return Ok(None);
            }
            if repeats == Repeats::Refused {
                // What would be repeated would come with the next checkpoint.
                sleep(Duration::from_secs(3));
                return self.scenario.copied().map(Some);
            }
            let mut copied = self.scenario.copied()?;
            distinct(&mut copied);
            Ok((copied.len() >= expected.len()).then_some(copied))
        })?;
        let rows = multiset(expected, copied)?;
        println!("{}: {rows} copied rows are exact", self.name);
        self.scenario.check_totals(self.orders.first(count), repeats).context(self.name)
    }
}

fn distinct(rows: &mut Vec<Row>) {
    rows.sort();
    rows.dedup();
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
