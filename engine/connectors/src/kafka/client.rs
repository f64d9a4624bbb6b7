//! What sources, sinks and committers share of the client library: its configuration, its log and errors, and look-ups that
//! are bounded in time and whose errors name the broker and the topic.
//!
//! No message, log line or error of this file shows a password or a key, nor what a variable stands for.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use floodmark_snapshot::{
    Env, Error, Result,
    env::{sleep, spawn_thread},
};
use rdkafka::{
    ClientContext, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    metadata::Metadata,
    producer::{DeliveryResult, ProducerContext},
    topic_partition_list::Offset,
};

use super::cluster::{Cluster, Hidden};

/// How long a look-up goes on asking a broker that doesn't answer, how long it waits for one answer, and between two tries.
const LOOKUP_MAX: Duration = Duration::from_secs(7);
pub(super) const LOOKUP_STEP: Duration = Duration::from_secs(2);
const LOOKUP_PAUSE: Duration = Duration::from_millis(50);
/// Events that a client is asked for at once to learn why it has no connection.
const EVENTS_MAX: usize = 100;

/// An error of the library, with what was attempted. What it means is for the caller to know: `Retry` by default.
pub(super) fn failed(what: impl std::fmt::Display, error: &KafkaError) -> Error {
    let message = format!("{what}: {error}");
    match error.rdkafka_error_code() {
        Some(code) if denied(code) => Error::abort(message),
        _ if matches!(error, KafkaError::ClientConfig(..) | KafkaError::ClientCreation(_)) => Error::abort(message),
        _ => Error::retry(message),
    }
}

/// Whether a broker has refused us, which waiting won't change.
pub(super) fn denied(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::Authentication
            | RDKafkaErrorCode::SaslAuthenticationFailed
            | RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed
            | RDKafkaErrorCode::TransactionalIdAuthorizationFailed
    )
}

/// Listens to a client: its log lines and errors go to ours; failed deliveries and refusals are remembered.
pub(super) struct Watch {
    hidden: Hidden,
    /// Why there is no connection, as last heard.
    reason: Mutex<Option<String>>,
    refusal: Mutex<Option<String>>,
    delivery: Mutex<Option<KafkaError>>,
}

impl Watch {
    /// Of a client that was set up with these values of variables.
    pub(super) fn new(hidden: Hidden) -> Self {
        Self { hidden, reason: Mutex::default(), refusal: Mutex::default(), delivery: Mutex::default() }
    }

    fn reason(&self) -> Option<String> {
        lock(&self.reason).clone()
    }

    fn refusal(&self) -> Option<String> {
        lock(&self.refusal).clone()
    }

    /// The first record that could not be delivered since the last call.
    pub(super) fn failed_delivery(&self) -> Option<KafkaError> {
        lock(&self.delivery).take()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ClientContext for Watch {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(?level, facility, "kafka: {}", self.hidden.hide(message));
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // The library counts and times its repetitions: without that, a repetition is the same text.
        let short = self.hidden.hide(reason.split(" (after ").next().unwrap_or(reason));
        if error.rdkafka_error_code().is_some_and(denied) {
            *lock(&self.refusal) = Some(short.clone());
        }
        // "All brokers are down" says less than what came before it.
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            return;
        }
        let mut last = lock(&self.reason);
        if last.as_ref() != Some(&short) {
            tracing::warn!("kafka: {short}");
            *last = Some(short);
        }
    }
}

impl ConsumerContext for Watch {
    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            tracing::debug!(%error, "could not tell the consumer group its offsets (it is for monitoring only)");
        }
    }
}

impl ProducerContext for Watch {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            lock(&self.delivery).get_or_insert_with(|| error.clone());
        }
    }
}

/// Drops a consumer that is member of a group, elsewhere: to leave it takes the library a tenth of a second, for which nothing is
/// to wait.
pub(super) fn drop_aside(consumer: BaseConsumer<Watch>) {
    // If there can be no other thread, it is dropped on this one.
    let _ = spawn_thread("kafka leave".to_owned(), move || drop(consumer));
}

/// A client that asks about topics and offsets.
pub(super) struct Lookup {
    consumer: BaseConsumer<Watch>,
    servers: String,
    env: Env,
}

impl Lookup {
    /// A client that reaches the brokers at the first question. With isolation `read_committed`, a partition ends before the
    /// first open transaction.
    pub(super) fn new(cluster: &Cluster, isolation: &str) -> Result<Self> {
        let mut config =
            cluster.config(&[], &[("allow.auto.create.topics", "false"), ("isolation.level", isolation)])?;
        // Without a group there is one queue, on which the client says why it fails.
        config.remove("group.id");
        let consumer = config.create("set up a Kafka client; check options 'properties.*'")?;
        Ok(Self { consumer, servers: cluster.servers().to_owned(), env: Env::system() })
    }

    /// Repeats a question until there is an answer, for a bounded time.
    fn ask<T>(&self, what: &str, question: impl Fn() -> KafkaResult<T>) -> Result<T> {
        let until = self.env.clock.monotonic() + LOOKUP_MAX;
        loop {
            let error = match question() {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            for _ in 0..EVENTS_MAX {
                // Answers nothing: it makes the client hand its errors to its `Watch`.
                let _ = self.consumer.poll(Duration::ZERO);
            }
            if let Some(refusal) = self.consumer.context().refusal() {
                return Err(Error::abort(format!(
                    "{what}: the Kafka broker at {} refuses us: {refusal}",
                    self.servers
                )));
            }
            if error.rdkafka_error_code().is_some_and(denied) {
                return Err(failed(what, &error));
            }
            if self.env.clock.monotonic() > until {
                let reason = self.consumer.context().reason().unwrap_or_else(|| error.to_string());
                return Err(Error::retry(format!(
                    "{what}: no answer from the Kafka broker at {} within {} s ({reason}); \
                     check option 'properties.bootstrap.servers'",
                    self.servers,
                    LOOKUP_MAX.as_secs()
                )));
            }
            sleep(LOOKUP_PAUSE);
        }
    }

    fn metadata(&self, what: &str, topic: Option<&str>) -> Result<Metadata> {
        self.ask(what, || self.consumer.fetch_metadata(topic, LOOKUP_STEP))
    }

    /// How many partitions a topic has; `None` if there is no such topic.
    pub(super) fn partitions_if_any(&self, topic: &str) -> Result<Option<Vec<i32>>> {
        let what = format!("look up topic '{topic}'");
        let metadata = self.ask(&what, || {
            let metadata = self.consumer.fetch_metadata(Some(topic), LOOKUP_STEP)?;
            let error = metadata.topics().first().and_then(|t| t.error()).map(RDKafkaErrorCode::from);
            match error {
                None | Some(RDKafkaErrorCode::UnknownTopicOrPartition) => Ok(metadata),
                Some(code) => Err(KafkaError::MetadataFetch(code)),
            }
        })?;
        let found = metadata.topics().iter().find(|t| t.name() == topic && t.error().is_none());
        Ok(found.map(|t| {
            let mut partitions: Vec<i32> = t.partitions().iter().map(|p| p.id()).collect();
            partitions.sort_unstable();
            partitions
        }))
    }

    /// The partitions of a topic, which must be there.
    pub(super) fn partitions(&self, topic: &str) -> Result<Vec<i32>> {
        if let Some(partitions) = self.partitions_if_any(topic)? {
            return Ok(partitions);
        }
        let all = self.metadata("list topics", None)?;
        let near = all
            .topics()
            .iter()
            .map(|t| (strsim::jaro(t.name(), topic), t.name()))
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .filter(|(likeness, _)| *likeness > 0.7);
        let hint = near.map_or_else(
            || "create it, or check option 'topic'".to_owned(),
            |(_, name)| format!("did you mean '{name}'?"),
        );
        Err(Error::abort(format!("there is no topic '{topic}' at {}; {hint}", self.servers)))
    }

    /// The first offset that is kept, and the one after the last that can be read.
    pub(super) fn offsets(&self, topic: &str, partition: i32) -> Result<(i64, i64)> {
        let what = format!("look up the offsets of {topic}-{partition}");
        self.ask(&what, || self.consumer.fetch_watermarks(topic, partition, LOOKUP_STEP))
    }

    /// The first offset at or after a time; `None` if there is none.
    pub(super) fn offset_at(&self, topic: &str, partition: i32, time_ms: i64) -> Result<Option<i64>> {
        let what = format!("look up the offset of {topic}-{partition} at {time_ms}");
        let found = self.ask(&what, || {
            let mut times = TopicPartitionList::new();
            times.add_partition_offset(topic, partition, Offset::Offset(time_ms))?;
            self.consumer.offsets_for_times(times, LOOKUP_STEP)
        })?;
        Ok(match found.find_partition(topic, partition).map(|p| p.offset()) {
            Some(Offset::Offset(offset)) => Some(offset),
            _ => None,
        })
    }

    /// Number of brokers.
    pub(super) fn brokers(&self) -> Result<usize> {
        Ok(self.metadata("list brokers", None)?.brokers().len())
    }

    /// Waits until a topic that was just created is known.
    pub(super) fn until_there(&self, topic: &str) -> Result<()> {
        let until = self.env.clock.monotonic() + LOOKUP_MAX;
        while self.partitions_if_any(topic)?.is_none() {
            if self.env.clock.monotonic() > until {
                return Err(Error::retry(format!(
                    "topic '{topic}' was created, but {} doesn't know it yet",
                    self.servers
                )));
            }
            sleep(LOOKUP_PAUSE);
        }
        Ok(())
    }

    /// Whether the topic is known to be gone; not being able to ask is not knowing.
    pub(super) fn is_gone(&self, topic: &str) -> bool {
        matches!(self.partitions_if_any(topic), Ok(None))
    }
}
