//! Writes to a topic: exactly once, staged with the checkpoint and committed when it is complete ([`super::committer`]); or at
//! least once, as the rows come.

use std::time::Duration;

use arrow::datatypes::SchemaRef;
use floodmark_dataflow::{
    Barrier, Batch, Operator, Output, PendingShard, Port, StateSnapshot, SubtaskContext,
    connector::{Guarantee, PlanContext, SinkInput, TableDef, TableError},
    metrics::add,
    sink::{Committer, SinkFactory},
};
use floodmark_snapshot::{Epoch, Error, Result, ShardKind};
use rdkafka::producer::{BaseProducer, Producer};

use super::{
    client::{Lookup, Watch, failed},
    cluster::Cluster,
    committer::{KafkaCommitter, MARKERS_MAX, Markers, Whose, check_commit_topic, ensure_commit_topic},
    produce::{producer, send, settle},
    record::{Encoder, Records, stage},
};
use crate::{format::Format, options::Options};

/// Staged records are put into blocks of about this many bytes.
const BLOCK_BYTES: usize = 4 << 20;
/// Longest that direct writing waits for the brokers; with a broker away for longer, the job fails and starts again.
const DELIVERY_MAX: Duration = Duration::from_secs(120);
/// Default of `sink.transaction-timeout`: an abandoned transaction holds up readers of committed records for this long, if
/// nobody takes over its identity before. Nothing is lost when a transaction times out.
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(120);
const COMMIT_TOPIC: &str = "floodmark-commits";

pub(super) struct KafkaSink {
    cluster: Cluster,
    kind: &'static str,
    topic: String,
    encoder: Encoder,
    /// `None` writes as it goes.
    exactly_once: Option<ExactlyOnce>,
}

struct ExactlyOnce {
    /// Transactional ids begin with this, and end with the [`identity`] of their subtask.
    prefix: String,
    table: String,
    commit_topic: String,
    timeout: Duration,
}

impl KafkaSink {
    pub(super) fn of(
        connector: &'static str,
        table: &TableDef,
        input: &SinkInput,
        context: &PlanContext,
        options: &Options<'_>,
        format: Format,
    ) -> Result<Self, TableError> {
        if format != Format::Json {
            return Err(TableError::table("only format 'json' can be written to Kafka"));
        }
        let topic = options.required("topic")?;
        if let Some(option) = options.get("topic").filter(|_| topic.contains(';')) {
            return Err(TableError::option(
                option,
                format!("option 'topic': '{topic}' are several; a sink writes to one"),
            ));
        }
        Ok(Self {
            cluster: Cluster::of(options, table)?,
            kind: if connector == "kafka" { "kafka sink" } else { "upsert-kafka sink" },
            topic: topic.to_owned(),
            encoder: encoder(connector, table, input, options, format)?,
            exactly_once: exactly_once(table, context, options)?,
        })
    }
}

fn encoder(
    connector: &str,
    table: &TableDef,
    input: &SinkInput,
    options: &Options<'_>,
    format: Format,
) -> Result<Encoder, TableError> {
    options.choice("key.format", &[("json", ())])?;
    let mut key = table.primary_key.clone();
    if let Some(option) = options.get("key.fields") {
        let fields: Vec<String> =
            option.value.split(';').map(|f| f.trim().to_owned()).filter(|f| !f.is_empty()).collect();
        if !key.is_empty() && key != fields {
            let message = "option 'key.fields': the key is the PRIMARY KEY's columns; drop one of the two";
            return Err(TableError::option(option, message));
        }
        key = fields;
    }
    if table.primary_key.is_empty() && (input.changelog || connector == "upsert-kafka") {
        let why =
            if input.changelog { "the query updates rows it has written" } else { "'upsert-kafka' replaces rows" };
        return Err(TableError::table(format!("a key is needed, because {why}: declare PRIMARY KEY (…) NOT ENFORCED")));
    }
    let column = |schema: &SchemaRef, name: &str| {
        schema.index_of(name).map_err(|_| {
            let message = format!("there is no column '{name}' for the key");
            options.get("key.fields").map_or_else(
                || TableError::table(message.clone()),
                |option| TableError::option(option, message.clone()),
            )
        })
    };
    let columns = input.schema.fields().len() - usize::from(input.changelog);
    Ok(Encoder {
        format,
        value: (0..columns).collect(),
        key: key.iter().map(|name| column(&table.schema, name)).collect::<Result<_, _>>()?,
        kind: input.changelog.then_some(columns),
    })
}

fn exactly_once(
    table: &TableDef,
    context: &PlanContext,
    options: &Options<'_>,
) -> Result<Option<ExactlyOnce>, TableError> {
    let able = context.guarantee == Guarantee::ExactlyOnce;
    let wanted = match options.get("sink.delivery-guarantee") {
        None => able,
        Some(option) => {
            let wanted =
                options.choice("sink.delivery-guarantee", &[("exactly-once", true), ("at-least-once", false)])?;
            if wanted && !able {
                let message = "option 'sink.delivery-guarantee': 'exactly-once' needs checkpoints in mode ExactlyOnce";
                return Err(TableError::option(option, message));
            }
            wanted
        }
    };
    let job = &context.job;
    let prefix = options.text("sink.transactional-id-prefix").map(str::to_owned);
    let prefix = prefix.unwrap_or_else(|| format!("floodmark.{}.{}.{}", job.namespace, job.name, job.uid));
    let timeout = options.duration("sink.transaction-timeout")?.unwrap_or(TRANSACTION_TIMEOUT);
    Ok(wanted.then(|| ExactlyOnce {
        prefix,
        table: table.name.clone(),
        commit_topic: options.text("sink.commit-topic").unwrap_or(COMMIT_TOPIC).to_owned(),
        timeout,
    }))
}

impl SinkFactory for KafkaSink {
    fn kind(&self) -> String {
        self.kind.to_owned()
    }

    fn check(&self) -> Result<()> {
        Lookup::new(&self.cluster, "read_committed")?.partitions(&self.topic)?;
        if let Some(exactly_once) = &self.exactly_once {
            ensure_commit_topic(&self.cluster, &exactly_once.commit_topic)?;
            check_commit_topic(&self.cluster, &exactly_once.commit_topic)?;
        }
        Ok(())
    }

    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        let (encoder, context) = (self.encoder.clone(), context.clone());
        if self.exactly_once.is_some() {
            return Ok(Box::new(Staging { encoder, full: Vec::new(), block: Vec::new(), records: 0, context }));
        }
        let timeout = DELIVERY_MAX.as_millis().to_string();
        let producer = producer(&self.cluster, &[("message.timeout.ms", timeout.as_str())])?;
        Ok(Box::new(Direct { encoder, producer, topic: self.topic.clone(), buffer: Vec::new(), context }))
    }

    fn committer(&self, index: u32, history: &str) -> Result<Option<Box<dyn Committer>>> {
        let Some(ExactlyOnce { prefix, table, commit_topic, timeout }) = &self.exactly_once else { return Ok(None) };
        let id = format!("{prefix}{}", identity(table, index));
        let markers = self.markers(commit_topic, Whose::Id(id.clone()), history);
        let (topic, timeout) = (self.topic.clone(), *timeout);
        Ok(Some(Box::new(KafkaCommitter { topic, id, timeout, markers, producer: None })))
    }

    fn visible(&self, index: u32, history: &str) -> Result<Option<Epoch>> {
        let Some(ExactlyOnce { table, commit_topic, timeout, .. }) = &self.exactly_once else { return Ok(None) };
        if Lookup::new(&self.cluster, "read_committed")?.partitions_if_any(commit_topic)?.is_none() {
            return Ok(None);
        }
        // By whatever prefix that job goes.
        let mut markers = self.markers(commit_topic, Whose::IdEnding(identity(table, index)), history);
        // If that job was killed in a transaction, nobody ends it before its time is over.
        markers.read(*timeout + MARKERS_MAX)?;
        Ok(markers.newest)
    }
}

impl KafkaSink {
    fn markers(&self, commit_topic: &str, whose: Whose, history: &str) -> Markers {
        Markers::new(self.cluster.clone(), commit_topic.to_owned(), whose, history.to_owned())
    }
}

/// The end of a transactional id: which subtask of which table.
fn identity(table: &str, index: u32) -> String {
    format!(".{table}.{index}")
}

/// The exactly-once sink's operator: keeps encoded records until the barrier takes them.
struct Staging {
    encoder: Encoder,
    full: Vec<Vec<u8>>,
    block: Vec<u8>,
    records: u64,
    context: SubtaskContext,
}

impl Operator for Staging {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        let before = self.block.len();
        let records = self.encoder.encode(&batch.rows, &mut self.block)?;
        self.records += records;
        add(&self.context.metrics.rows_out, records);
        add(&self.context.metrics.bytes, (self.block.len() - before) as u64);
        if self.block.len() >= BLOCK_BYTES {
            self.full.push(std::mem::take(&mut self.block));
        }
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let rows = std::mem::take(&mut self.records);
        let mut staged = std::mem::take(&mut self.full);
        staged.push(std::mem::take(&mut self.block));
        if rows == 0 {
            return Ok(StateSnapshot::default());
        }
        let encode = move || stage(staged.iter().map(Vec::as_slice));
        Ok(StateSnapshot::of(vec![PendingShard::new(ShardKind::Staged, None, rows, Box::new(encode))]))
    }
}

/// The at-least-once sink's operator: produces as rows come, and waits for the brokers at a barrier.
struct Direct {
    encoder: Encoder,
    producer: BaseProducer<Watch>,
    topic: String,
    buffer: Vec<u8>,
    context: SubtaskContext,
}

impl Operator for Direct {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        self.buffer.clear();
        let records = self.encoder.encode(&batch.rows, &mut self.buffer)?;
        let until = self.context.env.clock.monotonic() + DELIVERY_MAX;
        for record in Records(&self.buffer) {
            send(&self.producer, &self.topic, None, record?, &self.context.env, until).map_err(|e| self.wrong(&e))?;
        }
        self.producer.poll(Duration::ZERO);
        add(&self.context.metrics.rows_out, records);
        add(&self.context.metrics.bytes, self.buffer.len() as u64);
        self.producer.context().failed_delivery().map_or(Ok(()), |e| Err(self.wrong(&e)))
    }

    fn flush(&mut self, _: &mut Output) -> Result<()> {
        let until = self.context.env.clock.monotonic() + DELIVERY_MAX;
        settle(&self.producer, &self.context.env, until).map_err(|e| self.wrong(&e))
    }
}

impl Direct {
    fn wrong(&self, error: &rdkafka::error::KafkaError) -> Error {
        failed(format!("write to topic '{}'", self.topic), error)
    }
}
