//! Makes staged records visible exactly once, however long that takes.
//!
//! A commit is one short transaction of all records and a marker: the epoch, under this committer's transactional id, in a
//! compacted topic. To open is to fence: it makes the broker refuse every earlier holder of the id and abort what it left
//! open, and only then reads the marker, which therefore can't change behind our back. So a commit is repeated exactly if it
//! has not happened.
//!
//! The marker's topic is shared, and what a reader of committed records sees of it ends at the first open transaction of
//! *anybody*. So the read waits until that bound has passed the end that the topic had after the fencing: reading less could
//! miss the own marker, and repeat a commit.

use std::{fmt, time::Duration};

use bytes::Bytes;
use floodmark_dataflow::sink::Committer;
use floodmark_snapshot::{Env, Epoch, Error, Result, Step, env::sleep};
use rdkafka::{
    Message, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseProducer, Producer},
    topic_partition_list::Offset,
};
use serde_json::{Value, json};

use super::{
    client::{LOOKUP_STEP, Lookup, Watch, drop_aside, failed},
    cluster::Cluster,
    produce::{judged, producer, send, settle},
    record::unstage,
};

/// Longest that one call waits for brokers. What takes longer is an error to retry.
const OPEN_MAX: Duration = Duration::from_secs(15);
/// How many answers of brokers without an id a new client waits for.
const INTRODUCTIONS_MAX: usize = 5;
/// Longest that the reading of markers waits for others' open transactions, before it is retried.
pub(super) const MARKERS_MAX: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);
/// Markers are all in one partition, so that reading them is one read.
const MARKER_PARTITION: i32 = 0;
const REPLICAS_MAX: usize = 3;

/// Whose markers are meant.
pub(super) enum Whose {
    /// Those of this transactional id.
    Id(String),
    /// Those of the id that ends so.
    IdEnding(String),
}

impl Whose {
    fn is(&self, id: &[u8]) -> bool {
        match self {
            Self::Id(own) => id == own.as_bytes(),
            Self::IdEnding(end) => id.ends_with(end.as_bytes()),
        }
    }
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(f, "'{id}'"),
            Self::IdEnding(end) => write!(f, "'…{end}'"),
        }
    }
}

/// The markers of one committer in their topic.
pub(super) struct Markers {
    cluster: Cluster,
    topic: String,
    whose: Whose,
    history: String,
    env: Env,
    /// The last one of this history below `read_to`.
    pub(super) newest: Option<Epoch>,
    read_to: i64,
}

impl Markers {
    pub(super) fn new(cluster: Cluster, topic: String, whose: Whose, history: String) -> Self {
        Self { cluster, topic, whose, history, env: Env::system(), newest: None, read_to: 0 }
    }

    /// Reads on to the end that the topic has now. Waits so long for transactions that are open there.
    pub(super) fn read(&mut self, patience: Duration) -> Result<()> {
        let what = format!("read the commit marker of {} in topic '{}'", self.whose, self.topic);
        let end = Lookup::new(&self.cluster, "read_uncommitted")?.offsets(&self.topic, MARKER_PARTITION)?.1;
        let until = self.env.clock.monotonic() + patience;
        let committed = Lookup::new(&self.cluster, "read_committed")?;
        let low = loop {
            let (low, stable) = committed.offsets(&self.topic, MARKER_PARTITION)?;
            if stable >= end {
                break low;
            }
            if self.env.clock.monotonic() > until {
                return Err(Error::retry(format!(
                    "{what}: another transaction on that topic is still open; it ends with its owner's restart or its timeout"
                )));
            }
            sleep(PAUSE);
        };
        let from = self.read_to.max(low);
        if from < end {
            self.read_from(&what, from, end)?;
        }
        self.read_to = end;
        Ok(())
    }

    fn read_from(&mut self, what: &str, from: i64, end: i64) -> Result<()> {
        let fixed = [
            ("group.id", "floodmark-markers"),
            ("isolation.level", "read_committed"),
            ("auto.offset.reset", "error"),
            ("enable.auto.commit", "false"),
            ("enable.auto.offset.store", "false"),
            ("enable.partition.eof", "true"),
        ];
        let defaults = [("fetch.message.max.bytes", "8388608"), ("fetch.wait.max.ms", "20")];
        let consumer: BaseConsumer<Watch> = self.cluster.config(&defaults, &fixed)?.create(what)?;
        let mut assignment = TopicPartitionList::new();
        assignment
            .add_partition_offset(&self.topic, MARKER_PARTITION, Offset::Offset(from))
            .and_then(|()| consumer.assign(&assignment))
            .map_err(|e| failed(what, &e))?;
        let read = self.follow(&consumer, what, end);
        drop_aside(consumer);
        read
    }

    /// Takes in the markers that come before `end`.
    fn follow(&mut self, consumer: &BaseConsumer<Watch>, what: &str, end: i64) -> Result<()> {
        let mut until = self.env.clock.monotonic() + MARKERS_MAX;
        let mut last_error = None;
        loop {
            match consumer.poll(PAUSE) {
                Some(Ok(message)) => {
                    until = self.env.clock.monotonic() + MARKERS_MAX;
                    if message.key().is_some_and(|id| self.whose.is(id)) {
                        self.found(message.payload().unwrap_or_default());
                    }
                    if message.offset() + 1 >= end {
                        return Ok(());
                    }
                }
                // What a reader of committed records may see reached `end` before: so this is the end, or past it.
                Some(Err(KafkaError::PartitionEOF(_))) => return Ok(()),
                Some(Err(error)) => last_error = Some(failed(what, &error)),
                None if self.env.clock.monotonic() > until => {
                    return Err(last_error.unwrap_or_else(|| Error::retry(format!("{what}: no answer"))));
                }
                None => {}
            }
        }
    }

    fn found(&mut self, marker: &[u8]) {
        let marker: Value = serde_json::from_slice(marker).unwrap_or_default();
        if marker["history"].as_str() == Some(self.history.as_str()) {
            self.newest = marker["epoch"].as_u64().map(Epoch);
        }
    }
}

/// See the header of this file.
pub(super) struct KafkaCommitter {
    pub(super) topic: String,
    /// Its transactional id.
    pub(super) id: String,
    pub(super) timeout: Duration,
    /// Those of its id.
    pub(super) markers: Markers,
    /// `None` as long as it is not open.
    pub(super) producer: Option<BaseProducer<Watch>>,
}

impl KafkaCommitter {
    fn write(&self, producer: &BaseProducer<Watch>, epoch: Epoch, staged: &[Bytes], until: Duration) -> Result<()> {
        let wrong = |error: &KafkaError| judged(producer, &format!("write to topic '{}'", self.topic), error);
        for file in staged {
            unstage(file, |record| {
                send(producer, &self.topic, None, record, &self.markers.env, until).map_err(|e| wrong(&e))
            })?;
        }
        let marker = json!({ "epoch": epoch, "history": self.markers.history }).to_string();
        let marker = (Some(self.id.as_bytes()), Some(marker.as_bytes()));
        send(producer, &self.markers.topic, Some(MARKER_PARTITION), marker, &self.markers.env, until)
            .map_err(|e| wrong(&e))?;
        settle(producer, &self.markers.env, until).map_err(|e| wrong(&e))
    }

    fn transaction(
        &self,
        producer: &BaseProducer<Watch>,
        epoch: Epoch,
        staged: &[Bytes],
        step: &dyn Fn(Step),
    ) -> Result<()> {
        let start = self.markers.env.clock.monotonic();
        step(Step::BeforeTransaction);
        let result = producer
            .begin_transaction()
            .map_err(|e| judged(producer, "begin a transaction", &e))
            .and_then(|()| self.write(producer, epoch, staged, start + self.timeout))
            .and_then(|()| {
                step(Step::InTransaction);
                let left = (start + self.timeout).saturating_sub(self.markers.env.clock.monotonic()).max(OPEN_MAX);
                let commit = producer.commit_transaction(left);
                commit.map_err(|e| judged(producer, &format!("commit epoch {epoch}"), &e))
            });
        if result.is_ok() {
            step(Step::AfterTransaction);
        }
        // A broker ends a transaction that takes too long in the way it fences: then nobody newer need be there.
        let slow = self.markers.env.clock.monotonic().saturating_sub(start) >= self.timeout;
        result.map_err(|error| match error.disposition() {
            floodmark_snapshot::Disposition::Fenced if slow => Error::retry(format!(
                "the transaction of epoch {epoch} took longer than {} s (option 'sink.transaction-timeout'): {error}",
                self.timeout.as_secs()
            )),
            _ => error,
        })
    }
}

impl Committer for KafkaCommitter {
    fn open(&mut self) -> Result<Option<Epoch>> {
        // Whatever the last producer left open is aborted by the next.
        self.producer = None;
        ensure_commit_topic(&self.markers.cluster, &self.markers.topic)?;
        let timeout = self.timeout.as_millis().to_string();
        let fixed = [("transactional.id", self.id.as_str()), ("transaction.timeout.ms", timeout.as_str())];
        let producer = producer(&self.markers.cluster, &fixed)?;
        until_connected(&producer, &self.markers.topic);
        if let Err(error) = producer.init_transactions(OPEN_MAX) {
            let what = format!("take over transactional id '{}' at {}", self.id, self.markers.cluster.servers());
            // Two that open at once fence each other: only a transaction that is refused proves that somebody is newer.
            return Err(failed(what, &error));
        }
        self.markers.read(MARKERS_MAX)?;
        self.producer = Some(producer);
        Ok(self.markers.newest)
    }

    fn commit(&mut self, epoch: Epoch, staged: &[Bytes], step: &dyn Fn(Step)) -> Result<()> {
        let producer = self.producer.take().ok_or_else(|| Error::retry("the committer is not open"))?;
        // On any error the producer is gone for good: its state may differ from the broker's.
        self.transaction(&producer, epoch, staged, step)?;
        self.producer = Some(producer);
        Ok(())
    }
}

/// Waits until a broker answers under its own id, for as long as some answer comes: where none is connected, the library tries
/// again to take over a transactional id only after half a second. The connection by which it finds the brokers does not
/// count, and is closed. What is wrong is left to that request to say.
fn until_connected(producer: &BaseProducer<Watch>, topic: &str) {
    for _ in 0..INTRODUCTIONS_MAX {
        match producer.client().fetch_metadata(Some(topic), LOOKUP_STEP) {
            Ok(answer) if answer.orig_broker_id() < 0 => {}
            Ok(_) | Err(_) => return,
        }
    }
}

/// Creates the topic of the markers if it is not there, and refuses one whose records expire.
pub(super) fn ensure_commit_topic(cluster: &Cluster, topic: &str) -> Result<()> {
    let lookup = Lookup::new(cluster, "read_uncommitted")?;
    if lookup.partitions_if_any(topic)?.is_some() {
        return Ok(());
    }
    let what = format!("create topic '{topic}' for commit markers");
    let admin: AdminClient<Watch> = cluster.config(&[], &[])?.create(&what)?;
    let replicas = i32::try_from(lookup.brokers()?.clamp(1, REPLICAS_MAX)).unwrap_or(1);
    let new = NewTopic::new(topic, 1, TopicReplication::Fixed(replicas))
        .set("cleanup.policy", "compact")
        // Small segments are compacted soon, so that a start reads little.
        .set("segment.bytes", "4194304")
        .set("segment.ms", "3600000")
        .set("min.cleanable.dirty.ratio", "0.1");
    let options = AdminOptions::new().operation_timeout(Some(OPEN_MAX)).request_timeout(Some(OPEN_MAX));
    let created = crate::files::blocking()?.block_on(admin.create_topics(&[new], &options));
    match created.map_err(|e| failed(&what, &e))?.into_iter().next() {
        Some(Err((_, code))) if code != RDKafkaErrorCode::TopicAlreadyExists => {
            Err(failed(what, &KafkaError::AdminOp(code)))
        }
        _ => lookup.until_there(topic),
    }
}

/// Refuses a marker topic whose records expire: a marker that is gone would make its commit be repeated.
pub(super) fn check_commit_topic(cluster: &Cluster, topic: &str) -> Result<()> {
    let what = format!("look up the settings of topic '{topic}'");
    let admin: AdminClient<Watch> = cluster.config(&[], &[])?.create(&what)?;
    let options = AdminOptions::new().operation_timeout(Some(OPEN_MAX)).request_timeout(Some(OPEN_MAX));
    let described =
        crate::files::blocking()?.block_on(admin.describe_configs([&ResourceSpecifier::Topic(topic)], &options));
    let described = described.map_err(|e| failed(&what, &e))?;
    let Some(Ok(settings)) = described.into_iter().next() else {
        tracing::warn!(topic, "could not check that the topic of commit markers is compacted");
        return Ok(());
    };
    let policy = settings.get("cleanup.policy").and_then(|p| p.value.as_deref()).unwrap_or("compact");
    if policy != "compact" {
        return Err(Error::abort(format!(
            "topic '{topic}' has cleanup.policy '{policy}': commit markers in it would expire; \
             set it to 'compact', or name another topic in option 'sink.commit-topic'"
        )));
    }
    Ok(())
}
