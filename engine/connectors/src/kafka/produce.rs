//! Producing: records go into the library's queue, which is bounded, and are waited for.

use std::time::Duration;

use floodmark_snapshot::{Env, Error, Result};
use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseProducer, BaseRecord, Producer},
};

use super::{
    client::{Watch, failed},
    cluster::Cluster,
    record::Record,
};

/// How long to serve the library's events at once while waiting for it.
const SERVE: Duration = Duration::from_millis(5);

/// A producer with the settings that every sink wants.
pub(super) fn producer(cluster: &Cluster, fixed: &[(&str, &str)]) -> Result<BaseProducer<Watch>> {
    let defaults = [
        // The Java client's partitioner: both put a key into the same partition.
        ("partitioner", "murmur2_random"),
        ("queue.buffering.max.messages", "200000"),
        ("queue.buffering.max.kbytes", "131072"),
    ];
    let always = [
        ("enable.idempotence", "true"),
        ("acks", "all"),
        ("delivery.report.only.error", "true"),
        ("allow.auto.create.topics", "false"),
    ];
    let fixed: Vec<_> = always.iter().chain(fixed).copied().collect();
    let mut config = cluster.config(&defaults, &fixed)?;
    // A consumer's settings, of a table that is read as well as written.
    config.remove("group.id");
    config.remove("isolation.level");
    config.create("set up a Kafka producer; check options 'properties.*'")
}

/// Puts a record into the queue; waits, up to `until` (of `env`'s monotonic clock), while the queue is full.
pub(super) fn send(
    producer: &BaseProducer<Watch>,
    topic: &str,
    partition: Option<i32>,
    (key, value): Record<'_>,
    env: &Env,
    until: Duration,
) -> Result<(), KafkaError> {
    let mut record = BaseRecord::<[u8], [u8]>::to(topic);
    record.key = key;
    record.payload = value;
    record.partition = partition;
    loop {
        match producer.send(record) {
            Ok(()) => return Ok(()),
            Err((error, back)) => {
                let full = error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull);
                if !full || env.clock.monotonic() > until {
                    return Err(error);
                }
                if let Some(error) = producer.context().failed_delivery() {
                    return Err(error);
                }
                record = back;
                producer.poll(SERVE);
            }
        }
    }
}

/// Waits until every record in the queue is with the brokers, up to `until`.
pub(super) fn settle(producer: &BaseProducer<Watch>, env: &Env, until: Duration) -> Result<(), KafkaError> {
    loop {
        let left = producer.in_flight_count();
        if let Some(error) = producer.context().failed_delivery() {
            return Err(error);
        }
        if left == 0 {
            return Ok(());
        }
        if env.clock.monotonic() > until {
            return Err(KafkaError::Flush(RDKafkaErrorCode::OperationTimedOut));
        }
        producer.poll(SERVE);
    }
}

/// What an error of a transactional producer means: somebody newer holds the identity, or it is worth another try with a
/// new producer.
pub(super) fn judged(producer: &BaseProducer<Watch>, what: &str, error: &KafkaError) -> Error {
    let codes = [error.rdkafka_error_code(), producer.client().fatal_error().map(|f| f.0)];
    let fenced = |code: &RDKafkaErrorCode| {
        matches!(
            code,
            RDKafkaErrorCode::Fenced | RDKafkaErrorCode::ProducerFenced | RDKafkaErrorCode::InvalidProducerEpoch
        )
    };
    if codes.iter().flatten().any(fenced) {
        return Error::fenced(format!("{what}: a newer run of this job has taken over its output ({error})"));
    }
    failed(what, error)
}
