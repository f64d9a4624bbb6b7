//! What it costs to read Nexmark events from Kafka: CPU-seconds per million events of this process, for the source as a whole
//! (fetch, decode the columns of Nexmark q0) and for the client library alone.
//!
//! `cargo run --release -p floodmark-connectors --example kafka_source_bench [EVENTS]`
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a measurement")]

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use floodmark_connectors::{
    kafka::Kafka as Connector,
    nexmark::{self, Generator},
};
use floodmark_dataflow::{
    OperatorMetrics, SubtaskContext,
    connector::{Connector as _, Guarantee, Location, OptionValue, PlanContext, TableDef},
    source::Polled,
};
use floodmark_snapshot::{Env, JobId, KeyGroup, KeyGroupRange};
use floodmark_testkit::Kafka;
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
};

const PARTITIONS: u64 = 4;

fn main() {
    let events: u64 = std::env::args().nth(1).map_or(2_000_000, |n| n.parse().unwrap());
    let kafka = Kafka::start().unwrap();
    kafka.create_topic("nexmark", PARTITIONS as usize, &[]).unwrap();
    let generator = Generator { events_per_second: 10_000, ..Generator::default() };
    let mut bytes = 0;
    for partition in 0..PARTITIONS {
        let values = (partition..events).step_by(PARTITIONS as usize).map(|n| {
            let mut json = Vec::new();
            generator.write_json(n, &mut json);
            bytes += json.len();
            json
        });
        kafka.produce_values("nexmark", partition as i32, values).unwrap();
    }
    println!("{events} events of {} bytes", bytes as u64 / events);
    for round in 0..2 {
        report(round, "client", events, || client(&kafka));
        report(round, "source", events, || source(&kafka));
    }
}

fn report(round: u32, what: &str, events: u64, run: impl FnOnce() -> u64) {
    let (cpu, start) = (cpu_seconds(), Instant::now());
    let rows = run();
    let (cpu, wall) = (cpu_seconds() - cpu, start.elapsed().as_secs_f64());
    let millions = events as f64 / 1e6;
    println!(
        "{round} {what}: {rows} rows, {:.2} CPU-s per million, {:.2} s per million",
        cpu / millions,
        wall / millions
    );
}

/// User and system time of this process.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // Ticks, of which there are 100 a second.
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

fn client(kafka: &Kafka) -> u64 {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.bootstrap())
        .set("group.id", "bench")
        .set("enable.partition.eof", "true")
        .set("enable.auto.commit", "false")
        .create()
        .unwrap();
    let mut assignment = TopicPartitionList::new();
    for partition in 0..PARTITIONS as i32 {
        assignment.add_partition_offset("nexmark", partition, Offset::Beginning).unwrap();
    }
    consumer.assign(&assignment).unwrap();
    let (mut rows, mut ends) = (0, 0);
    while ends < PARTITIONS {
        match consumer.poll(Duration::from_millis(10)) {
            Some(Ok(message)) => rows += u64::from(message.payload().is_some()),
            Some(Err(KafkaError::PartitionEOF(_))) => ends += 1,
            Some(Err(error)) => panic!("{error}"),
            None => {}
        }
    }
    rows
}

fn source(kafka: &Kafka) -> u64 {
    let option = |v: &str| OptionValue::parse(v, Location::default()).unwrap();
    let servers = kafka.bootstrap();
    let options = [
        ("topic", "nexmark"),
        ("properties.bootstrap.servers", &servers),
        ("format", "json"),
        ("scan.bounded.mode", "latest-offset"),
    ];
    let table = TableDef {
        name: "nexmark".into(),
        schema: Arc::new(nexmark::schema()),
        primary_key: Vec::new(),
        options: options.iter().map(|(k, v)| ((*k).to_owned(), option(v))).collect::<BTreeMap<_, _>>(),
        location: Location::default(),
    };
    let job = JobId { namespace: "default".into(), name: "bench".into(), uid: "local".into() };
    let plan = PlanContext { job, guarantee: Guarantee::None };
    let factory = Connector { upsert: false }.source(&table, &q0(), &plan).unwrap();
    let context = SubtaskContext {
        index: 0,
        parallelism: 1,
        max_parallelism: 1,
        key_groups: KeyGroupRange { first: KeyGroup(0), last: KeyGroup(0) },
        metrics: Arc::new(OperatorMetrics::default()),
        state: floodmark_dataflow::StateSettings::default(),
        env: Env::system(),
    };
    let mut source = factory.open(factory.splits(&[]).unwrap(), &context).unwrap();
    let (mut rows, mut batches) = (0, 0_u64);
    loop {
        match source.poll(Duration::from_millis(10)).unwrap() {
            Polled::Batch { rows: batch, .. } => {
                rows += batch.num_rows() as u64;
                batches += 1;
            }
            Polled::Exhausted => break,
            Polled::SplitFinished { .. } | Polled::Pending => {}
        }
    }
    println!("  {} rows a batch", rows / batches.max(1));
    rows
}

/// The columns that q0 needs: the event's type, and five fields of a bid.
fn q0() -> SchemaRef {
    let schema = nexmark::schema();
    let bid = schema.field_with_name("bid").unwrap();
    let DataType::Struct(fields) = bid.data_type() else { panic!("bid is a row") };
    let wanted = ["auction", "bidder", "price", "dateTime", "extra"];
    let fields: Fields = fields.iter().filter(|f| wanted.contains(&f.name().as_str())).cloned().collect();
    let event_type = schema.field_with_name("event_type").unwrap().clone();
    Arc::new(Schema::new(vec![event_type, Field::new("bid", DataType::Struct(fields), true)]))
}
