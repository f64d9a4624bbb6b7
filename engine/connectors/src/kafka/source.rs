//! Reads partitions, each by explicit assignment. A split is a partition, `<topic>-<partition>`; its position is the offset of
//! the next record.
//!
//! The library fetches ahead; a poll drains what has come, gathers it per partition, and hands it on a batch at a time.
//! Invariant: a split's position moves only when a batch is handed on, never when it is gathered. The library never resets a
//! position by itself: offsets that retention has deleted are an error.

use std::{collections::VecDeque, time::Duration};

use arrow::{datatypes::SchemaRef, record_batch::RecordBatch};
use floodmark_dataflow::{
    SubtaskContext,
    metrics::add,
    source::{Polled, Source, SourceFactory},
};
use floodmark_snapshot::{Epoch, Error, Result, SplitState, env::sleep};
use rdkafka::{
    Message, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
    topic_partition_list::Offset,
};
use serde_json::json;

use super::{
    client::{Lookup, Watch, denied, drop_aside, failed},
    cluster::Cluster,
    start::{Start, position_of},
};
use crate::format::{BATCH_ROWS, BadRecords, Decoder, Format, Place, bad::BadRecordHandler};

/// Bytes that are gathered, over all partitions, before batches are handed on.
const GATHERED_MAX: usize = 8 << 20;
/// Bytes that a record counts for beyond its value: bounds how many are gathered.
const RECORD_OVERHEAD: usize = 64;

/// A client that has brought nothing for so long is asked whether it still reaches the brokers, and how long it may take to answer.
const SILENCE: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_millis(500);

/// Fetching: large answers, and a queue deep enough to decode from while the next answer travels, but bounded.
const FETCH: [(&str, &str); 6] = [
    ("fetch.message.max.bytes", "4194304"),
    ("fetch.max.bytes", "33554432"),
    ("queued.min.messages", "100000"),
    ("queued.max.messages.kbytes", "65536"),
    // The default leaves a consumer that had a full queue idle for a second.
    ("fetch.queue.backoff.ms", "10"),
    ("isolation.level", "read_committed"),
];

pub(super) struct KafkaSource {
    pub(super) cluster: Cluster,
    pub(super) topics: Vec<String>,
    pub(super) start: Start,
    pub(super) bounded: bool,
    pub(super) group: String,
    pub(super) format: Format,
    pub(super) bad: BadRecords,
    pub(super) declared: SchemaRef,
    pub(super) projection: SchemaRef,
}

impl SourceFactory for KafkaSource {
    fn kind(&self) -> String {
        "kafka source".to_owned()
    }

    fn bounded(&self) -> bool {
        self.bounded
    }

    fn splits(&self, restored: &[SplitState]) -> Result<Vec<SplitState>> {
        let lookup = Lookup::new(&self.cluster, self.cluster.isolation())?;
        let mut splits = Vec::new();
        for topic in &self.topics {
            splits.extend(self.start.splits(&lookup, topic, self.bounded, restored)?);
        }
        Ok(splits)
    }

    fn open(&self, splits: Vec<SplitState>, context: &SubtaskContext) -> Result<Box<dyn Source>> {
        let mut reader = Reader {
            splits: Vec::new(),
            topics: Vec::new(),
            turn: 0,
            gathered: 0,
            over: VecDeque::new(),
            bad: self.bad.open(&context.env, context.metrics.clone())?,
            clients: Clients { cluster: self.cluster.clone(), group: self.group.clone(), bounded: self.bounded },
            context: context.clone(),
        };
        for split in splits {
            let decoder = self.format.decoder(&self.declared, &self.projection)?;
            reader.add(split, decoder)?;
        }
        for topic in &mut reader.topics {
            topic.consumer = Some(reader.clients.open(&topic.name, &reader.splits)?);
        }
        Ok(Box::new(reader))
    }
}

/// Makes the clients of a reader.
struct Clients {
    cluster: Cluster,
    group: String,
    bounded: bool,
}

impl Clients {
    /// One that goes on reading a topic behind what has been gathered.
    fn open(&self, topic: &str, splits: &[Split]) -> Result<BaseConsumer<Watch>> {
        let end = if self.bounded { "true" } else { "false" };
        let fixed = [
            ("group.id", self.group.as_str()),
            ("auto.offset.reset", "error"),
            ("enable.auto.commit", "false"),
            ("enable.auto.offset.store", "false"),
            ("enable.partition.eof", end),
            ("allow.auto.create.topics", "false"),
        ];
        let what = format!("read topic '{topic}'");
        let read = |e: KafkaError| failed(&what, &e);
        let consumer: BaseConsumer<Watch> = self.cluster.config(&FETCH, &fixed)?.create(&what)?;
        let mut assignment = TopicPartitionList::new();
        for split in splits.iter().filter(|s| s.topic == topic && !s.finished) {
            let from = Offset::Offset(split.gathered_to);
            assignment.add_partition_offset(topic, split.partition, from).map_err(read)?;
        }
        consumer.assign(&assignment).map_err(read)?;
        Ok(consumer)
    }
}

/// One partition.
struct Split {
    topic: String,
    partition: i32,
    /// Offset after the last record that has been handed on.
    next: i64,
    /// Offset after the last record that has been gathered.
    gathered_to: i64,
    /// Where a bounded read ends.
    end: Option<i64>,
    /// The end has been reached, and told.
    finished: bool,
    /// The end has been reached; what is gathered goes first.
    at_end: bool,
    decoder: Decoder,
    /// Offsets of the records that the decoder holds.
    offsets: Vec<i64>,
}

/// The partitions of one topic, read by one client: errors name a partition by its number only.
struct Topic {
    name: String,
    /// Index of the split of each partition.
    splits: Vec<Option<usize>>,
    /// When its client last showed that it reaches the brokers.
    heard: Duration,
    consumer: Option<BaseConsumer<Watch>>,
}

impl Drop for Topic {
    fn drop(&mut self) {
        self.consumer.take().into_iter().for_each(drop_aside);
    }
}

struct Reader {
    splits: Vec<Split>,
    topics: Vec<Topic>,
    turn: usize,
    /// Bytes gathered.
    gathered: usize,
    /// Splits that have something to hand on: rows, or the news of their end.
    over: VecDeque<usize>,
    bad: BadRecordHandler,
    clients: Clients,
    context: SubtaskContext,
}

impl Source for Reader {
    fn poll(&mut self, wait: Duration) -> Result<Polled> {
        if self.over.is_empty() {
            if self.clients.bounded && self.splits.iter().all(|s| s.finished) {
                return Ok(Polled::Exhausted);
            }
            self.gather(wait)?;
        }
        while let Some(i) = self.over.pop_front() {
            if !self.splits[i].decoder.is_empty() || self.splits[i].gathered_to > self.splits[i].next {
                if self.splits[i].at_end {
                    self.over.push_front(i);
                }
                let rows = self.hand_on(i)?;
                return Ok(Polled::Batch { split: i, rows });
            }
            if self.splits[i].at_end && !self.splits[i].finished {
                self.finish(i);
                return Ok(Polled::SplitFinished { split: i });
            }
        }
        Ok(Polled::Pending)
    }

    fn flush(&mut self) -> Result<()> {
        self.bad.flush()
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        let now = self.splits.iter().map(|split| SplitState {
            split: format!("{}-{}", split.topic, split.partition),
            position: match split.end {
                None => json!({ "offset": split.next }),
                Some(end) => json!({ "offset": split.next, "end": end }),
            },
            watermark: None,
            finished: split.finished,
        });
        Ok(now.collect())
    }

    /// Tells the consumer group, for those who watch its lag. Nothing reads it back.
    fn on_completed(&mut self, _: Epoch, positions: &[SplitState]) -> Result<()> {
        for topic in &self.topics {
            let mut offsets = TopicPartitionList::new();
            for (split, state) in self.splits.iter().zip(positions).filter(|(s, _)| s.topic == topic.name) {
                let (offset, _) = position_of(state)?;
                // An offset that can't be represented is none that was read.
                let _ = offsets.add_partition_offset(&split.topic, split.partition, Offset::Offset(offset));
            }
            if let Some(Err(error)) = topic.consumer.as_ref().map(|c| c.commit(&offsets, CommitMode::Async)) {
                tracing::debug!(%error, topic = topic.name, "could not tell the consumer group its offsets");
            }
        }
        Ok(())
    }
}

impl Reader {
    fn add(&mut self, state: SplitState, decoder: Decoder) -> Result<()> {
        let (next, end) = position_of(&state)?;
        let unknown = || Error::abort(format!("'{}' is not the name of a partition", state.split));
        let (topic, partition) = state.split.rsplit_once('-').ok_or_else(unknown)?;
        let partition: i32 = partition.parse().map_err(|_| unknown())?;
        let slot = usize::try_from(partition).map_err(|_| unknown())?;
        let index = self.splits.len();
        let at = self.topics.iter().position(|t| t.name == topic).unwrap_or_else(|| {
            let heard = self.context.env.clock.monotonic();
            self.topics.push(Topic { name: topic.to_owned(), splits: Vec::new(), heard, consumer: None });
            self.topics.len() - 1
        });
        let slots = &mut self.topics[at].splits;
        if slots.len() <= slot {
            slots.resize(slot + 1, None);
        }
        slots[slot] = Some(index);
        let at_end = end.is_some_and(|end| next >= end);
        if at_end && !state.finished {
            self.over.push_back(index);
        }
        self.splits.push(Split {
            topic: topic.to_owned(),
            partition,
            next,
            gathered_to: next,
            end,
            finished: state.finished,
            at_end: at_end || state.finished,
            decoder,
            offsets: Vec::new(),
        });
        Ok(())
    }

    /// Takes what the library has fetched, until a batch is full or there is nothing for now.
    fn gather(&mut self, wait: Duration) -> Result<()> {
        if self.topics.is_empty() {
            sleep(wait);
            return Ok(());
        }
        let topics = self.topics.len();
        let mut silent = 0;
        let mut wait = wait / topics as u32;
        // Each topic has its turn; the wait is for the case that none has anything.
        while silent < topics && !self.is_full() {
            let t = self.turn % topics;
            if self.drain(t, wait)? {
                silent = 0;
                wait = Duration::ZERO;
            } else {
                silent += 1;
                self.see_to_client(t)?;
                if self.gathered > 0 || !self.over.is_empty() {
                    wait = Duration::ZERO;
                }
            }
            self.turn = (t + 1) % topics;
        }
        self.gathered = 0;
        let Self { splits, over, .. } = self;
        for (i, split) in splits.iter().enumerate() {
            if split.gathered_to > split.next && !over.contains(&i) {
                over.push_back(i);
            }
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.gathered >= GATHERED_MAX || self.splits.iter().any(|s| s.decoder.len() >= BATCH_ROWS)
    }

    /// Takes what one topic's client has; false if it had nothing. Stops when a batch is full.
    fn drain(&mut self, t: usize, wait: Duration) -> Result<bool> {
        let Self { topics, splits, over, gathered, context, .. } = self;
        let topic = &topics[t];
        let Some(consumer) = &topic.consumer else { return Ok(false) };
        let (mut any, mut wait, mut bytes, mut weight) = (false, wait, 0, 0);
        let mut failure = None;
        while let Some(polled) = consumer.poll(wait) {
            wait = Duration::ZERO;
            any = true;
            match polled {
                Ok(message) => {
                    let Some(i) = slot(topic, message.partition()) else { continue };
                    let split = &mut splits[i];
                    let length = take(split, &message);
                    bytes += length;
                    weight += length + RECORD_OVERHEAD;
                    if split.at_end && !split.finished && !over.contains(&i) {
                        over.push_back(i);
                    }
                    if split.decoder.len() >= BATCH_ROWS || *gathered + weight >= GATHERED_MAX {
                        break;
                    }
                }
                Err(KafkaError::PartitionEOF(partition)) => {
                    let Some(i) = slot(topic, partition) else { continue };
                    // The end was looked up before: the log can only have grown since. What is missing up to it are
                    // markers of transactions, which are no records.
                    if splits[i].end.is_some() && !splits[i].finished {
                        splits[i].at_end = true;
                        if !over.contains(&i) {
                            over.push_back(i);
                        }
                    }
                }
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        *gathered += weight;
        if any {
            topics[t].heard = context.env.clock.monotonic();
        }
        add(&context.metrics.bytes, bytes as u64);
        match failure {
            Some(error) => self.failure(t, &error).map(|()| true),
            None => Ok(any),
        }
    }

    /// Replaces the client of a topic if it no longer reaches the brokers. The library does come back from brokers that are away,
    /// but not from a cluster that has listed none for a moment: then it drops all that it knew, and neither asks again nor
    /// says so (issue 5301 of librdkafka).
    fn see_to_client(&mut self, t: usize) -> Result<()> {
        let Self { topics, splits, clients, context, .. } = self;
        let topic = &mut topics[t];
        let now = context.env.clock.monotonic();
        let over = topic.splits.iter().flatten().all(|i| splits[*i].finished);
        if over || now.saturating_sub(topic.heard) < SILENCE {
            return Ok(());
        }
        let Some(consumer) = &topic.consumer else { return Ok(()) };
        let reached = consumer.fetch_metadata(Some(&topic.name), ANSWER).is_ok_and(|m| !m.brokers().is_empty());
        if !reached {
            let servers = clients.cluster.servers();
            tracing::warn!(topic = topic.name, "no answer from the brokers at {servers}; a new client goes on asking");
            let new = clients.open(&topic.name, splits)?;
            topic.consumer.replace(new).into_iter().for_each(drop_aside);
        }
        topic.heard = context.env.clock.monotonic();
        Ok(())
    }

    /// Whether an error ends the job, and with which words. The library itself goes on after all others.
    fn failure(&self, t: usize, error: &KafkaError) -> Result<()> {
        let topic = &self.topics[t].name;
        let cluster = &self.clients.cluster;
        let servers = cluster.servers();
        match error.rdkafka_error_code() {
            Some(
                RDKafkaErrorCode::AutoOffsetReset
                | RDKafkaErrorCode::OffsetOutOfRange
                | RDKafkaErrorCode::LogTruncation,
            ) => {
                let lookup = Lookup::new(cluster, cluster.isolation())?;
                for split in self.splits.iter().filter(|s| s.topic == *topic && !s.finished) {
                    let (low, high) = lookup.offsets(topic, split.partition)?;
                    super::start::check_kept(topic, split.partition, split.gathered_to, low, high)?;
                }
                Err(Error::abort(format!("read topic '{topic}': {error}: records are gone before they were read")))
            }
            Some(
                RDKafkaErrorCode::UnknownTopicOrPartition
                | RDKafkaErrorCode::UnknownTopic
                | RDKafkaErrorCode::UnknownPartition,
            ) => {
                // A broker that is starting may say so too.
                if Lookup::new(cluster, cluster.isolation())?.is_gone(topic) {
                    return Err(Error::abort(format!("topic '{topic}' at {servers} was deleted while it was read")));
                }
                tracing::warn!(topic, %error, "reading goes on when the topic is there again");
                Ok(())
            }
            Some(code) if denied(code) => Err(Error::abort(format!(
                "the Kafka broker at {servers} refuses to let us read topic '{topic}': {error}"
            ))),
            _ if matches!(error, KafkaError::MessageConsumptionFatal(_)) => {
                Err(Error::abort(format!("read topic '{topic}': {error}")))
            }
            _ => {
                tracing::debug!(topic, %error, "reading goes on when the brokers are back");
                Ok(())
            }
        }
    }

    fn hand_on(&mut self, i: usize) -> Result<RecordBatch> {
        let split = &mut self.splits[i];
        let mut malformed = Vec::new();
        let rows = split.decoder.finish(&mut malformed)?;
        if !malformed.is_empty() {
            let place = |record: usize| Place {
                split: format!("{}-{}", split.topic, split.partition),
                offset: split.offsets[record],
            };
            self.bad.take(malformed, place)?;
        }
        split.offsets.clear();
        split.next = split.gathered_to;
        Ok(rows)
    }

    fn finish(&mut self, i: usize) {
        let split = &mut self.splits[i];
        split.finished = true;
        if let Some(end) = split.end {
            split.next = split.next.max(end);
            split.gathered_to = split.next;
        }
        let consumer = self.topics.iter().find(|t| t.name == split.topic).and_then(|t| t.consumer.as_ref());
        let mut partition = TopicPartitionList::new();
        partition.add_partition(&split.topic, split.partition);
        // To go on fetching would cost, not hurt.
        if let Some(Err(error)) = consumer.map(|c| c.pause(&partition)) {
            tracing::debug!(%error, "could not pause a partition that has been read to its end");
        }
    }
}

fn slot(topic: &Topic, partition: i32) -> Option<usize> {
    topic.splits.get(usize::try_from(partition).ok()?).copied().flatten()
}

/// Gathers a record; answers with its length in bytes.
fn take(split: &mut Split, message: &BorrowedMessage<'_>) -> usize {
    let offset = message.offset();
    if split.at_end || split.end.is_some_and(|end| offset >= end) {
        split.at_end = true;
        return 0;
    }
    split.gathered_to = offset + 1;
    split.at_end = split.end.is_some_and(|end| offset + 1 >= end);
    // A record without a value is a deletion in a compacted topic: no row.
    let Some(payload) = message.payload() else { return 0 };
    split.decoder.push(payload);
    split.offsets.push(offset);
    payload.len()
}
