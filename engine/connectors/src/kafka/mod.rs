//! `'connector' = 'kafka'` and `'upsert-kafka'`: partitions read by explicit assignment, and a sink whose output becomes
//! visible in one transaction per checkpoint, together with a marker that tells a successor how far it came.
//!
//! [`cluster`] and [`client`] are what is shared; [`start`] and [`source`] read; [`record`], [`produce`], [`sink`] and [`committer`] write.

mod client;
mod cluster;
mod committer;
mod produce;
pub mod record;
mod sink;
mod source;
mod start;

use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use floodmark_dataflow::{
    connector::{Connector, PlanContext, SinkInput, TableDef, TableError},
    sink::SinkNode,
    source::SourceFactory,
};

use self::{
    cluster::{Cluster, PROPERTIES},
    sink::KafkaSink,
    source::KafkaSource,
    start::{START_OPTIONS, Start},
};
use crate::{
    format::{BadRecords, FORMAT_OPTIONS, Format},
    options::Options,
};

/// Options of a topic that is written to; a source knows them too, so that one declaration serves both.
const SINK_OPTIONS: [&str; 7] = [
    "value.format",
    "key.format",
    "key.fields",
    "sink.delivery-guarantee",
    "sink.transactional-id-prefix",
    "sink.commit-topic",
    "sink.transaction-timeout",
];

/// See the header of this file.
pub struct Kafka {
    /// Named `upsert-kafka`: each row replaces the one with the same key.
    pub upsert: bool,
}

fn known() -> Vec<&'static str> {
    let own = ["topic", "properties.bootstrap.servers", "properties.group.id"];
    let all = own.into_iter().chain(START_OPTIONS).chain(SINK_OPTIONS);
    all.chain(FORMAT_OPTIONS).chain(BadRecords::OPTIONS).filter(|o| *o != "csv.header").collect()
}

fn format_of(options: &Options<'_>) -> Result<Format, TableError> {
    Format::of(options, if options.get("value.format").is_some() { "value.format" } else { "format" })
}

impl Connector for Kafka {
    fn name(&self) -> &'static str {
        if self.upsert { "upsert-kafka" } else { "kafka" }
    }

    fn source(
        &self,
        table: &TableDef,
        projection: &SchemaRef,
        context: &PlanContext,
    ) -> Result<Arc<dyn SourceFactory>, TableError> {
        if self.upsert {
            let message = "connector 'upsert-kafka' can be written to, not read from; read its topic with 'kafka'";
            return Err(TableError::table(message));
        }
        let options = Options::new(table, &known(), &[PROPERTIES])?;
        let format = format_of(&options)?;
        format.check_read(&table.schema, projection)?;
        let mut topics: Vec<String> =
            options.required("topic")?.split(';').map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()).collect();
        topics.dedup();
        let job = &context.job;
        let group = options.text("properties.group.id").map(str::to_owned);
        Ok(Arc::new(KafkaSource {
            cluster: Cluster::of(&options, table)?,
            topics,
            start: Start::of(&options)?,
            bounded: options.choice("scan.bounded.mode", &[("unbounded", false), ("latest-offset", true)])?,
            group: group.unwrap_or_else(|| format!("floodmark-{}-{}", job.namespace, job.name)),
            format,
            bad: BadRecords::of(&options)?,
            declared: table.schema.clone(),
            projection: projection.clone(),
        }))
    }

    fn sink(&self, table: &TableDef, input: &SinkInput, context: &PlanContext) -> Result<SinkNode, TableError> {
        let options = Options::new(table, &known(), &[PROPERTIES])?;
        let format = format_of(&options)?;
        Ok(Arc::new(KafkaSink::of(self.name(), table, input, context, &options, format)?))
    }
}
