//! What sources, sinks and committers share of the client library: its configuration, its log and errors, and look-ups that
//! are bounded in time and whose errors name the broker and the topic.
//!
//! No message, log line or error of this file shows a password or a key.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use floodmark_dataflow::connector::TableError;
use floodmark_snapshot::{
    Env, Error, Result,
    env::{sleep, spawn_thread},
};
use rdkafka::{
    ClientConfig, ClientContext, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    metadata::Metadata,
    producer::{DeliveryResult, ProducerContext},
    topic_partition_list::Offset,
};

use crate::options::Options;

/// Prefix of options that go to the client library as they are.
pub(super) const PROPERTIES: &str = "properties.";
/// How long a look-up goes on asking a broker that doesn't answer, how long it waits for one answer, and between two tries.
const LOOKUP_MAX: Duration = Duration::from_secs(7);
const LOOKUP_STEP: Duration = Duration::from_secs(2);
const LOOKUP_PAUSE: Duration = Duration::from_millis(50);
/// Events that a client is asked for at once to learn why it has no connection.
const EVENTS_MAX: usize = 100;

/// Settings of the Java client that mean something else here, or nothing.
const IGNORED: [&str; 12] = [
    "key.deserializer",
    "value.deserializer",
    "key.serializer",
    "value.serializer",
    "auto.offset.reset",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.partition.eof",
    "max.poll.records",
    "max.block.ms",
    "buffer.memory",
    "partition.discovery.interval.ms",
];
/// Settings of the Java client that have another name here.
const RENAMED: [(&str, &str); 2] =
    [("fetch.max.wait.ms", "fetch.wait.max.ms"), ("max.request.size", "message.max.bytes")];
/// Settings that have no counterpart, and what to use instead.
const REFUSED: [(&str, &str); 5] = [
    ("transactional.id", "set 'sink.transactional-id-prefix'"),
    ("transaction.timeout.ms", "set 'sink.transaction-timeout'"),
    ("ssl.truststore.location", "give a PEM file in 'properties.ssl.ca.location'"),
    ("ssl.truststore.password", "give a PEM file in 'properties.ssl.ca.location'"),
    ("ssl.truststore.type", "give a PEM file in 'properties.ssl.ca.location'"),
];

/// How to reach a cluster: the table's `properties.*`, checked.
#[derive(Clone)]
pub(super) struct Cluster {
    servers: String,
    properties: BTreeMap<String, String>,
}

impl Cluster {
    /// Reads and checks `properties.*`.
    pub(super) fn of(
        options: &Options<'_>,
        all: &BTreeMap<String, floodmark_dataflow::connector::OptionValue>,
    ) -> Result<Self, TableError> {
        let servers = options.required("properties.bootstrap.servers")?.to_owned();
        let mut properties = BTreeMap::new();
        for (option, given) in all {
            let Some(name) = option.strip_prefix(PROPERTIES) else { continue };
            if IGNORED.contains(&name) {
                tracing::warn!("option '{option}' ({}) has no effect here", given.location);
                continue;
            }
            if let Some((_, instead)) = REFUSED.iter().find(|r| r.0 == name) {
                return Err(TableError::option(given, format!("option '{option}' has no effect here: {instead}")));
            }
            if name == "sasl.jaas.config" {
                let (user, password) = jaas(&given.value).ok_or_else(|| {
                    let message = format!(
                        "option '{option}' has no username and password; \
                         set 'properties.sasl.username' and 'properties.sasl.password'"
                    );
                    TableError::option(given, message)
                })?;
                properties.insert("sasl.username".to_owned(), user);
                properties.insert("sasl.password".to_owned(), password);
                continue;
            }
            let name = RENAMED.iter().find(|r| r.0 == name).map_or(name, |r| r.1);
            let mut alone = ClientConfig::new();
            if let Err(error) = alone.set(name, given.value.as_str()).create_native_config() {
                let why = match error {
                    KafkaError::ClientConfig(..) if secret(name) => "its value is refused".to_owned(),
                    KafkaError::ClientConfig(_, why, ..) => why,
                    other => other.to_string(),
                };
                return Err(TableError::option(given, format!("option '{option}': {}", why.trim())));
            }
            properties.insert(name.to_owned(), given.value.clone());
        }
        Ok(Self { servers, properties })
    }

    /// Where the brokers are, as the user wrote it.
    pub(super) fn servers(&self) -> &str {
        &self.servers
    }

    /// What the user has set a property to.
    fn property(&self, name: &str) -> Option<&str> {
        self.properties.get(name).map(String::as_str)
    }

    /// What a reader may see: committed records, unless the user has said otherwise.
    pub(super) fn isolation(&self) -> &str {
        self.property("isolation.level").unwrap_or("read_committed")
    }

    /// A configuration: `defaults`, over them what the user wrote, and over that what correctness depends on.
    pub(super) fn config(&self, defaults: &[(&str, &str)], fixed: &[(&str, &str)]) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set_log_level(RDKafkaLogLevel::Warning);
        // A broker that was away is wanted back at once: the library would wait up to ten seconds between two tries.
        config.set("reconnect.backoff.max.ms", "1000");
        for (name, value) in defaults {
            config.set(*name, *value);
        }
        for (name, value) in &self.properties {
            config.set(name, value);
        }
        for (name, value) in fixed {
            config.set(*name, *value);
        }
        config
    }
}

/// Whether a setting's value must not be shown.
fn secret(name: &str) -> bool {
    ["password", "key", "secret", "jaas", "token"].iter().any(|word| name.contains(word))
}

/// User and password of the Java client's login line.
fn jaas(text: &str) -> Option<(String, String)> {
    let value = |name: &str| {
        let rest = text[text.find(name)? + name.len()..].trim_start().strip_prefix('=')?.trim_start();
        let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let rest = &rest[1..];
        Some(rest[..rest.find(quote)?].to_owned())
    };
    Some((value("username")?, value("password")?))
}

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
#[derive(Default)]
pub(super) struct Watch {
    /// Why there is no connection, as last heard.
    reason: Mutex<Option<String>>,
    refusal: Mutex<Option<String>>,
    delivery: Mutex<Option<KafkaError>>,
}

impl Watch {
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
        tracing::debug!(?level, facility, "kafka: {message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // The library counts and times its repetitions: without that, a repetition is the same text.
        let short = reason.split(" (after ").next().unwrap_or(reason).to_owned();
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
        let mut config = cluster.config(&[], &[("allow.auto.create.topics", "false"), ("isolation.level", isolation)]);
        // Without a group there is one queue, on which the client says why it fails.
        config.remove("group.id");
        let consumer = config
            .create_with_context(Watch::default())
            .map_err(|e| failed("set up a Kafka client; check options 'properties.*'", &e))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_java_login_line_is_understood() {
        let line = "org.apache.kafka.common.security.plain.PlainLoginModule required username=\"joe\" password = 's3';";
        assert_eq!(jaas(line), Some(("joe".to_owned(), "s3".to_owned())));
        assert_eq!(jaas("KerberosLoginModule required"), None);
    }
}
