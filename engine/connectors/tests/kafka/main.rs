//! The Kafka connector against a real broker.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    missing_docs,
    reason = "a test waits for a real server in real time"
)]

mod between;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex, OnceLock},
    thread,
    time::{Duration, Instant},
};

use arrow::{
    array::{Array, AsArray, Int8Array, Int64Array, RecordBatch, StringArray},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
};
use bytes::Bytes;
use floodmark_connectors::kafka::Kafka as Connector;
use floodmark_dataflow::{
    Barrier, Batch, Operator, OperatorMetrics, Output, ROW_KIND, SubtaskContext,
    connector::{Connector as _, Guarantee, Location, OptionValue, PlanContext, SinkInput, TableDef, TableError},
    metrics::read,
    sink::{Committer, SinkFactory},
    source::{Polled, Source, SourceFactory},
};
use floodmark_snapshot::{Disposition, Env, Epoch, JobId, KeyGroup, KeyGroupRange, Result, SplitState, Step};
use floodmark_testkit::{Isolation, Kafka, Stop, unkeyed};

use between::Between;

const PATIENCE: Duration = Duration::from_secs(30);

/// One broker for all tests that leave it alone; each test has topics of its own.
fn broker() -> &'static Kafka {
    static BROKER: OnceLock<Kafka> = OnceLock::new();
    BROKER.get_or_init(|| Kafka::start().unwrap())
}

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![Field::new("k", DataType::Int64, true), Field::new("v", DataType::Utf8, true)]))
}

fn table(servers: &str, topic: &str, key: &[&str], options: &[(&str, &str)]) -> TableDef {
    let value = |v: &str| OptionValue::parse(v, Location { line: 1, column: 1 }).unwrap();
    let own = [("topic", topic), ("properties.bootstrap.servers", servers), ("format", "json")];
    TableDef {
        name: format!("table_{topic}"),
        schema: schema(),
        primary_key: key.iter().map(|k| (*k).to_owned()).collect(),
        options: own.iter().chain(options).map(|(k, v)| ((*k).to_owned(), value(v))).collect::<BTreeMap<_, _>>(),
        location: Location::default(),
    }
}

fn plan(guarantee: Guarantee) -> PlanContext {
    let job = JobId { namespace: "default".into(), name: "job".into(), uid: "local".into() };
    PlanContext { job, guarantee }
}

fn subtask() -> SubtaskContext {
    SubtaskContext {
        index: 0,
        parallelism: 1,
        max_parallelism: 1,
        key_groups: KeyGroupRange { first: KeyGroup(0), last: KeyGroup(0) },
        metrics: Arc::new(OperatorMetrics::default()),
        state: floodmark_dataflow::StateSettings::default(),
        env: Env::system(),
    }
}

fn source_at(servers: &str, topic: &str, options: &[(&str, &str)]) -> Arc<dyn SourceFactory> {
    let table = table(servers, topic, &[], options);
    Connector { upsert: false }.source(&table, &schema(), &plan(Guarantee::ExactlyOnce)).unwrap()
}

fn source(topic: &str, options: &[(&str, &str)]) -> Arc<dyn SourceFactory> {
    source_at(&broker().bootstrap(), topic, options)
}

/// Polls until `rows` values of column `k` are there, by split; then on for a moment, so that one too many would show.
fn take(source: &mut Box<dyn Source>, rows: usize) -> Vec<(usize, i64)> {
    let (mut taken, start) = (Vec::new(), Instant::now());
    let mut quiet = None;
    loop {
        match source.poll(Duration::from_millis(10)).unwrap() {
            Polled::Batch { split, rows } => {
                let k = rows.column(0).as_primitive::<Int64Type>();
                taken.extend(k.values().iter().map(|k| (split, *k)));
            }
            Polled::Exhausted => return taken,
            Polled::SplitFinished { .. } | Polled::Pending => {}
        }
        assert!(start.elapsed() < PATIENCE, "{} of {rows} rows came", taken.len());
        if taken.len() >= rows && quiet.get_or_insert_with(Instant::now).elapsed() > Duration::from_millis(150) {
            return taken;
        }
    }
}

fn numbers(range: std::ops::Range<i64>) -> Vec<String> {
    range.map(|k| format!("{{\"k\":{k},\"v\":\"value {k}\"}}")).collect()
}

fn positions(splits: &[SplitState]) -> Vec<String> {
    splits.iter().map(|s| format!("{} {}", s.split, s.position)).collect()
}

#[test]
fn every_partition_keeps_its_position_over_restarts_the_silent_ones_too() {
    let topic = "silent";
    broker().create_topic(topic, 3, &[]).unwrap();
    broker().produce_values(topic, 2, numbers(0..5)).unwrap();
    let factory = source(topic, &[("scan.startup.mode", "latest-offset")]);
    let mut splits = factory.splits(&[]).unwrap();
    broker().produce_values(topic, 0, numbers(10..20)).unwrap();
    for restart in 0..3 {
        let mut reader = factory.open(factory.splits(&splits).unwrap(), &subtask()).unwrap();
        take(&mut reader, if restart == 0 { 10 } else { 0 });
        splits = reader.positions().unwrap();
    }
    let silent = ["silent-0 {\"offset\":10}", "silent-1 {\"offset\":0}", "silent-2 {\"offset\":5}"];
    assert_eq!(positions(&splits), silent);
    broker().produce_values(topic, 1, numbers(30..32)).unwrap();
    broker().produce_values(topic, 2, numbers(40..42)).unwrap();
    let mut reader = factory.open(factory.splits(&splits).unwrap(), &subtask()).unwrap();
    let mut rows = take(&mut reader, 4);
    rows.sort_unstable();
    assert_eq!(rows, [(1, 30), (1, 31), (2, 40), (2, 41)]);
}

#[test]
fn positions_cover_just_what_was_handed_on() {
    let topic = "cover";
    broker().create_topic(topic, 2, &[]).unwrap();
    for partition in 0..2 {
        broker().produce_values(topic, partition, numbers(0..20_000)).unwrap();
    }
    let factory = source(topic, &[]);
    let mut splits = factory.splits(&[]).unwrap();
    let mut rows = [Vec::new(), Vec::new()];
    let start = Instant::now();
    // A restart after every second batch.
    while rows.iter().any(|r| r.len() < 20_000) {
        let mut reader = factory.open(factory.splits(&splits).unwrap(), &subtask()).unwrap();
        let mut batches = 0;
        while batches < 2 && rows.iter().any(|r| r.len() < 20_000) {
            if let Polled::Batch { split, rows: batch } = reader.poll(Duration::from_millis(10)).unwrap() {
                rows[split].extend_from_slice(batch.column(0).as_primitive::<Int64Type>().values());
                batches += 1;
            }
            assert!(start.elapsed() < PATIENCE);
        }
        splits = reader.positions().unwrap();
    }
    let all: Vec<i64> = (0..20_000).collect();
    assert!(rows.iter().all(|r| *r == all));
}

#[test]
fn a_bounded_read_ends_behind_the_markers_of_transactions() {
    let topic = "bounded";
    broker().create_topic(topic, 3, &[]).unwrap();
    broker().transaction(topic, 0, unkeyed(numbers(0..10))).unwrap().commit().unwrap();
    broker().transaction(topic, 0, unkeyed(numbers(10..20))).unwrap().abort().unwrap();
    broker().produce_values(topic, 1, numbers(20..25)).unwrap();
    let factory = source(topic, &[("scan.bounded.mode", "latest-offset")]);
    assert!(factory.bounded());
    let splits = factory.splits(&[]).unwrap();
    broker().produce_values(topic, 1, numbers(90..99)).unwrap();
    let mut reader = factory.open(splits, &subtask()).unwrap();
    let mut rows = take(&mut reader, usize::MAX);
    rows.sort_unstable();
    let expected: Vec<(usize, i64)> = (0..10).map(|k| (0, k)).chain((20..25).map(|k| (1, k))).collect();
    assert_eq!(rows, expected);
    let ended = reader.positions().unwrap();
    assert!(ended.iter().all(|s| s.finished), "{ended:?}");
    let mut again = factory.open(factory.splits(&ended).unwrap(), &subtask()).unwrap();
    assert!(matches!(again.poll(Duration::ZERO).unwrap(), Polled::Exhausted));
}

#[test]
fn several_topics_are_read_as_one_table() {
    for (topic, range) in [("several-a", 0..3), ("several-b", 10..13)] {
        broker().create_topic(topic, 1, &[]).unwrap();
        broker().produce_values(topic, 0, numbers(range)).unwrap();
    }
    let factory = source("several-a;several-b", &[("scan.bounded.mode", "latest-offset")]);
    let mut reader = factory.open(factory.splits(&[]).unwrap(), &subtask()).unwrap();
    let mut rows = take(&mut reader, usize::MAX);
    rows.sort_unstable();
    assert_eq!(rows, [(0, 0), (0, 1), (0, 2), (1, 10), (1, 11), (1, 12)]);
    let ended = ["several-a-0 {\"offset\":3,\"end\":3}", "several-b-0 {\"offset\":3,\"end\":3}"];
    assert_eq!(positions(&reader.positions().unwrap()), ended);
}

#[test]
fn reading_starts_where_the_table_says() {
    let topic = "starts";
    broker().create_topic(topic, 1, &[]).unwrap();
    broker().produce_values(topic, 0, numbers(0..3)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let now = Env::system().clock.wall_ms().to_string();
    std::thread::sleep(Duration::from_millis(20));
    broker().produce_values(topic, 0, numbers(3..6)).unwrap();
    let check = |options: &[(&str, &str)], offset: i64| {
        let splits = source(topic, options).splits(&[]).unwrap();
        assert_eq!(positions(&splits), [format!("starts-0 {{\"offset\":{offset}}}")], "{options:?}");
    };
    check(&[], 0);
    check(&[("scan.startup.mode", "latest-offset")], 6);
    check(&[("scan.startup.mode", "timestamp"), ("scan.startup.timestamp-millis", &now)], 3);
    check(&[("scan.startup.mode", "timestamp"), ("scan.startup.timestamp-millis", "99999999999999")], 6);
    let specific =
        [("scan.startup.mode", "specific-offsets"), ("scan.startup.specific-offsets", "partition:0,offset:4")];
    check(&specific, 4);
}

#[test]
fn records_that_retention_has_deleted_are_an_error() {
    let topic = "deleted";
    broker().create_topic(topic, 1, &[]).unwrap();
    broker().produce_values(topic, 0, numbers(0..10)).unwrap();
    let factory = source(topic, &[]);
    let splits = factory.splits(&[]).unwrap();
    broker().delete_records(topic, 0, 5).unwrap();
    let expected = "records are lost: deleted-0 is to be read from offset 0 on, but its retention has deleted everything \
                    before 5";
    let error = factory.splits(&splits).unwrap_err().to_string();
    assert!(error.starts_with(expected), "{error}");
    // Deleted between the look-up and the reading.
    let mut reader = factory.open(splits, &subtask()).unwrap();
    let start = Instant::now();
    let error = loop {
        match reader.poll(Duration::from_millis(10)) {
            Err(error) => break error.to_string(),
            Ok(polled) => assert!(matches!(polled, Polled::Pending), "{polled:?}"),
        }
        assert!(start.elapsed() < PATIENCE);
    };
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn a_topic_that_is_missing_is_named_with_the_nearest() {
    broker().create_topic("auction-events", 1, &[]).unwrap();
    let error = source("auction-event", &[]).splits(&[]).unwrap_err();
    let servers = broker().bootstrap();
    let expected = format!("there is no topic 'auction-event' at {servers}; did you mean 'auction-events'?");
    assert_eq!((error.to_string(), error.disposition()), (expected, Disposition::Abort));
    let sink = sink(&broker().bootstrap(), "auction-event", &[], &[], Guarantee::AtLeastOnce).unwrap();
    assert!(sink.check().unwrap_err().to_string().contains("did you mean 'auction-events'?"));
}

#[test]
fn a_broker_that_cannot_be_reached_is_named_within_ten_seconds() {
    let start = Instant::now();
    let error = source_at("127.0.0.1:1", "t", &[]).splits(&[]).unwrap_err().to_string();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert!(error.contains("no answer from the Kafka broker at 127.0.0.1:1 within"), "{error}");
    assert!(error.contains("Connection refused"), "{error}");
}

#[test]
fn a_malformed_record_is_named_by_its_partition_and_offset() {
    let topic = "malformed";
    broker().create_topic(topic, 1, &[]).unwrap();
    broker().produce_values(topic, 0, ["{\"k\":1}", "{\"k\":", "{\"k\":3}"]).unwrap();
    broker().produce(topic, 0, [(Some("deleted"), None::<&str>)]).unwrap();
    broker().produce_values(topic, 0, ["{\"k\":4}"]).unwrap();
    let open = |policy: &str| {
        let factory = source(topic, &[("bad-records", policy)]);
        let context = subtask();
        (factory.open(factory.splits(&[]).unwrap(), &context).unwrap(), context)
    };
    let (mut failing, _) = open("fail");
    let start = Instant::now();
    let error = loop {
        match failing.poll(Duration::from_millis(10)) {
            Err(error) => break error.to_string(),
            Ok(_) => assert!(start.elapsed() < PATIENCE),
        }
    };
    assert!(error.starts_with("malformed record at malformed-0@1: "), "{error}");
    let (mut skipping, context) = open("skip");
    assert_eq!(take(&mut skipping, 3), [(0, 1), (0, 3), (0, 4)]);
    assert_eq!(read(&context.metrics.bad), 1);
    assert_eq!(positions(&skipping.positions().unwrap()), ["malformed-0 {\"offset\":5}"]);
}

#[test]
fn the_consumer_group_is_told_of_completed_positions() {
    let topic = "group";
    broker().create_topic(topic, 2, &[]).unwrap();
    broker().produce_values(topic, 1, numbers(0..7)).unwrap();
    let factory = source(topic, &[("properties.group.id", "watched")]);
    let mut reader = factory.open(factory.splits(&[]).unwrap(), &subtask()).unwrap();
    take(&mut reader, 7);
    let positions = reader.positions().unwrap();
    reader.on_completed(Epoch(1), &positions).unwrap();
    let start = Instant::now();
    while broker().group_offsets("watched", topic, 2).unwrap() != [Some(0), Some(7)] {
        reader.poll(Duration::from_millis(10)).unwrap();
        assert!(start.elapsed() < PATIENCE);
    }
}

fn sink(
    servers: &str,
    topic: &str,
    key: &[&str],
    options: &[(&str, &str)],
    guarantee: Guarantee,
) -> Result<Arc<dyn SinkFactory>, TableError> {
    let table = table(servers, topic, key, options);
    let input = SinkInput { schema: schema(), changelog: false };
    Connector { upsert: false }.sink(&table, &input, &plan(guarantee))
}

fn exactly_once(servers: &str, topic: &str) -> Arc<dyn SinkFactory> {
    let commits = format!("{topic}-commits");
    let sink = sink(servers, topic, &[], &[("sink.commit-topic", &commits)], Guarantee::ExactlyOnce).unwrap();
    sink.check().unwrap();
    sink
}

fn rows(range: std::ops::Range<i64>) -> Batch {
    let k = Int64Array::from_iter_values(range.clone());
    let v = StringArray::from_iter_values(range.map(|k| format!("value {k}")));
    Batch::new(RecordBatch::try_new(schema(), vec![Arc::new(k), Arc::new(v)]).unwrap())
}

fn stage(sink: &Arc<dyn SinkFactory>, batches: Vec<Batch>) -> Vec<Bytes> {
    let mut operator = sink.create(&subtask()).unwrap();
    stage_with(&mut operator, batches)
}

fn stage_with(operator: &mut Box<dyn Operator>, batches: Vec<Batch>) -> Vec<Bytes> {
    let mut out = Output::default();
    for batch in batches {
        operator.process(0, batch, &mut out).unwrap();
    }
    operator.flush(&mut out).unwrap();
    operator
        .snapshot(&Barrier::checkpoint(Epoch(1)))
        .unwrap()
        .pending
        .into_iter()
        .map(|shard| (shard.encode)().unwrap())
        .collect()
}

fn committer(sink: &Arc<dyn SinkFactory>) -> Box<dyn Committer> {
    sink.committer(0, "history").unwrap().unwrap()
}

/// The committed values of `k`, sorted.
fn output(kafka: &Kafka, topic: &str) -> Vec<i64> {
    let records = kafka.read_committed(topic).unwrap();
    let number = |text: &str| text.split([':', ',']).nth(1).unwrap().parse().unwrap();
    let mut found: Vec<i64> = records.iter().map(|r| number(r.text())).collect();
    found.sort_unstable();
    found
}

fn is(range: std::ops::Range<i64>) -> Vec<i64> {
    range.collect()
}

#[test]
fn a_successor_learns_from_the_marker_what_is_committed() {
    let topic = "marker";
    broker().create_topic(topic, 2, &[]).unwrap();
    let sink = exactly_once(&broker().bootstrap(), topic);
    let steps = Mutex::new(Vec::new());
    let mut first = committer(&sink);
    assert_eq!(first.open().unwrap(), None);
    first.commit(Epoch(1), &stage(&sink, vec![rows(0..10)]), &|s| steps.lock().unwrap().push(s)).unwrap();
    assert_eq!(*steps.lock().unwrap(), [Step::BeforeTransaction, Step::InTransaction, Step::AfterTransaction]);
    assert_eq!(output(broker(), topic), is(0..10));
    // Nothing staged at 2; two barriers' records are committed at 4.
    let mut staged = stage(&sink, vec![rows(10..11), rows(11..15)]);
    staged.extend(stage(&sink, vec![rows(15..20)]));
    first.commit(Epoch(4), &staged, &|_| {}).unwrap();
    assert_eq!(first.open().unwrap(), Some(Epoch(4)));
    let mut second = committer(&sink);
    assert_eq!(second.open().unwrap(), Some(Epoch(4)));
    assert_eq!(output(broker(), topic), is(0..20));
    // Other subtasks and other histories have markers of their own.
    assert_eq!(sink.committer(1, "history").unwrap().unwrap().open().unwrap(), None);
    let mut fresh = sink.committer(0, "another history").unwrap().unwrap();
    assert_eq!(fresh.open().unwrap(), None);
    fresh.commit(Epoch(1), &stage(&sink, vec![rows(20..21)]), &|_| {}).unwrap();
    assert_eq!(fresh.open().unwrap(), Some(Epoch(1)));
}

#[test]
fn another_job_learns_from_the_marker_what_is_committed() {
    let topic = "others-marker";
    broker().create_topic(topic, 1, &[]).unwrap();
    let of = |prefix: &str| {
        let options = [("sink.commit-topic", "others-commits"), ("sink.transactional-id-prefix", prefix)];
        sink(&broker().bootstrap(), topic, &[], &options, Guarantee::ExactlyOnce).unwrap()
    };
    let (sink, other) = (of("first"), of("second"));
    let mut first = sink.committer(1, "of others").unwrap().unwrap();
    first.open().unwrap();
    first.commit(Epoch(3), &stage(&sink, vec![rows(0..10)]), &|_| {}).unwrap();
    first.commit(Epoch(7), &stage(&sink, vec![rows(10..20)]), &|_| {}).unwrap();
    let visible = |index, history| other.visible(index, history).unwrap();
    assert_eq!(visible(1, "of others"), Some(Epoch(7)));
    assert_eq!((visible(0, "of others"), visible(1, "of nobody")), (None, None));
    // Who asks takes nothing over.
    first.commit(Epoch(8), &stage(&sink, vec![rows(20..30)]), &|_| {}).unwrap();
    assert_eq!((visible(1, "of others"), output(broker(), topic)), (Some(Epoch(8)), is(0..30)));
    // What is under way is waited for.
    let (asked, answer) = (other.clone(), Mutex::new(None));
    let ask = |step: Step| {
        if step == Step::InTransaction {
            let asked = asked.clone();
            *answer.lock().unwrap() = Some(thread::spawn(move || asked.visible(1, "of others").unwrap()));
            thread::sleep(Duration::from_millis(500));
        }
    };
    first.commit(Epoch(9), &stage(&sink, vec![rows(30..40)]), &ask).unwrap();
    assert_eq!(answer.into_inner().unwrap().unwrap().join().unwrap(), Some(Epoch(9)));
}

#[test]
fn a_zombie_in_its_transaction_is_fenced_and_its_records_are_never_seen() {
    let topic = "zombie";
    broker().create_topic(topic, 1, &[]).unwrap();
    let sink = exactly_once(&broker().bootstrap(), topic);
    let staged = stage(&sink, vec![rows(0..100)]);
    let mut zombie = committer(&sink);
    zombie.open().unwrap();
    let mut successor = committer(&sink);
    let overtaking = Mutex::new(&mut successor);
    let error = zombie.commit(Epoch(1), &staged, &|step| {
        if step == Step::InTransaction {
            assert_eq!(overtaking.lock().unwrap().open().unwrap(), None);
        }
    });
    let error = error.unwrap_err();
    assert_eq!(error.disposition(), Disposition::Fenced, "{error}");
    assert_eq!(output(broker(), topic), is(0..0));
    assert_eq!(broker().read(topic, Isolation::Uncommitted).unwrap().len(), 100);
    successor.commit(Epoch(1), &staged, &|_| {}).unwrap();
    assert_eq!(output(broker(), topic), is(0..100));
    // One that was overtaken while it was at rest, too.
    let mut third = committer(&sink);
    assert_eq!(third.open().unwrap(), Some(Epoch(1)));
    let error = successor.commit(Epoch(2), &staged, &|_| {}).unwrap_err();
    assert_eq!(error.disposition(), Disposition::Fenced, "{error}");
    assert_eq!(output(broker(), topic), is(0..100));
    let open = broker().open_transactions().unwrap();
    assert!(open.iter().all(|id| !id.contains(topic)), "{open:?}");
}

#[test]
fn a_commit_whose_process_died_in_the_transaction_is_repeated_whole() {
    let topic = "died";
    broker().create_topic(topic, 1, &[]).unwrap();
    let sink = exactly_once(&broker().bootstrap(), topic);
    let staged = stage(&sink, vec![rows(0..50)]);
    let mut first = committer(&sink);
    first.open().unwrap();
    let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = first.commit(Epoch(1), &staged, &|step| assert_ne!(step, Step::InTransaction, "dies here"));
    }));
    assert!(died.is_err());
    let mut second = committer(&sink);
    assert_eq!(second.open().unwrap(), None);
    second.commit(Epoch(1), &staged, &|_| {}).unwrap();
    assert_eq!(output(broker(), topic), is(0..50));
}

#[test]
fn the_marker_is_found_behind_the_open_transaction_of_somebody_else() {
    let topic = "behind";
    broker().create_topic(topic, 1, &[]).unwrap();
    let sink = exactly_once(&broker().bootstrap(), topic);
    let mut first = committer(&sink);
    assert_eq!(first.open().unwrap(), None);
    let foreign = broker().transaction("behind-commits", 0, [(Some("foreign"), Some("not ours"))]).unwrap();
    first.commit(Epoch(7), &stage(&sink, vec![rows(0..1)]), &|_| {}).unwrap();
    // Its marker can't be seen while the other transaction, which began before it, is open: this waits for that.
    let mut second = committer(&sink);
    let opened = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(2500));
            foreign.abort().unwrap();
        });
        second.open()
    });
    assert_eq!(opened.unwrap(), Some(Epoch(7)));
}

#[test]
fn a_marker_topic_that_expires_is_refused() {
    broker().create_topic("expires", 1, &[]).unwrap();
    broker().create_topic("expires-commits", 1, &[("cleanup.policy", "delete")]).unwrap();
    let options = [("sink.commit-topic", "expires-commits")];
    let sink = sink(&broker().bootstrap(), "expires", &[], &options, Guarantee::ExactlyOnce).unwrap();
    let error = sink.check().unwrap_err().to_string();
    assert!(error.starts_with("topic 'expires-commits' has cleanup.policy 'delete'"), "{error}");
}

#[test]
fn upserts_and_tombstones_are_written_under_their_key() {
    let topic = "upserts";
    broker().create_topic(topic, 3, &[]).unwrap();
    let mut fields = schema().fields().to_vec();
    fields.push(Arc::new(Field::new(ROW_KIND, DataType::Int8, false)));
    let input = SinkInput { schema: Arc::new(Schema::new(fields)), changelog: true };
    let declared = table(&broker().bootstrap(), topic, &["k"], &[]);
    let sink = Connector { upsert: true }.sink(&declared, &input, &plan(Guarantee::AtLeastOnce)).unwrap();
    sink.check().unwrap();
    let batch = |rows: &[(i8, i64, &str)]| {
        let columns: Vec<Arc<dyn Array>> = vec![
            Arc::new(rows.iter().map(|r| r.1).collect::<Int64Array>()),
            Arc::new(rows.iter().map(|r| Some(r.2)).collect::<StringArray>()),
            Arc::new(rows.iter().map(|r| r.0).collect::<Int8Array>()),
        ];
        Batch::new(RecordBatch::try_new(input.schema.clone(), columns).unwrap())
    };
    let batches = vec![
        batch(&[(0, 1, "a"), (0, 2, "b"), (1, 1, "a"), (2, 1, "aa")]),
        batch(&[(3, 2, "b")]),
        batch(&[(1, 1, "aa"), (2, 1, "aaa")]),
    ];
    assert!(stage(&sink, batches).is_empty(), "written as they go");
    let records = broker().read_committed(topic).unwrap();
    let of = |key: &str| -> Vec<String> {
        let mine = records.iter().filter(|r| r.key.as_deref() == Some(key.as_bytes()));
        mine.map(|r| r.value.as_ref().map_or("gone".into(), |_| r.text().to_owned())).collect()
    };
    assert_eq!(of("{\"k\":1}"), ["{\"k\":1,\"v\":\"aa\"}", "{\"k\":1,\"v\":\"aaa\"}"]);
    assert_eq!(of("{\"k\":2}"), ["{\"k\":2,\"v\":\"b\"}", "gone"]);
    assert_eq!(records.len(), 4);
}

#[test]
fn keys_go_to_the_partitions_that_the_java_client_chooses() {
    let topic = "partitions";
    broker().create_topic(topic, 5, &[]).unwrap();
    let sink = sink(&broker().bootstrap(), topic, &["k"], &[], Guarantee::AtLeastOnce).unwrap();
    stage(&sink, vec![rows(0..200)]);
    let records = broker().read_committed(topic).unwrap();
    assert_eq!(records.len(), 200);
    for record in records {
        let hash = murmur2(record.key.as_deref().unwrap());
        assert_eq!(record.partition, ((hash & 0x7fff_ffff) % 5) as i32);
    }
}

/// The hash of the Java client's default partitioner, after its public description (MurmurHash2, seed 0x9747b28c).
fn murmur2(data: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let mix = |k: u32| {
        let k = k.wrapping_mul(M);
        (k ^ (k >> 24)).wrapping_mul(M)
    };
    let mut h = 0x9747_b28c ^ data.len() as u32;
    let chunks = data.chunks_exact(4);
    let tail = chunks.remainder();
    for chunk in chunks {
        h = h.wrapping_mul(M) ^ mix(u32::from_le_bytes(chunk.try_into().unwrap()));
    }
    if !tail.is_empty() {
        let last = tail.iter().enumerate().fold(0, |sum, (i, b)| sum | (u32::from(*b) << (8 * i)));
        h = (h ^ last).wrapping_mul(M);
    }
    h = (h ^ (h >> 13)).wrapping_mul(M);
    h ^ (h >> 15)
}

#[test]
fn a_broker_that_restarts_is_survived() {
    let mut kafka = Kafka::start_to_crash(Ipv4Addr::LOCALHOST.into()).unwrap();
    let (input, topic, direct) = ("restart-in", "restart-out", "restart-direct");
    for topic in [input, topic, direct] {
        kafka.create_topic(topic, 1, &[]).unwrap();
    }
    let servers = kafka.bootstrap();
    let factory = source_at(&servers, input, &[]);
    let mut reader = factory.open(factory.splits(&[]).unwrap(), &subtask()).unwrap();
    kafka.produce_values(input, 0, numbers(0..10)).unwrap();
    assert_eq!(take(&mut reader, 10).len(), 10);
    let written = sink(&servers, direct, &[], &[], Guarantee::AtLeastOnce).unwrap();
    let mut operator = written.create(&subtask()).unwrap();
    stage_with(&mut operator, vec![rows(0..10)]);

    // The committer is in its transaction when the broker dies.
    let sink = exactly_once(&servers, topic);
    let staged = stage(&sink, vec![rows(0..100)]);
    let mut committer = committer(&sink);
    committer.open().unwrap();
    let restarting = Mutex::new(&mut kafka);
    let mut result = committer.commit(Epoch(1), &staged, &|step| {
        if step == Step::InTransaction {
            restarting.lock().unwrap().restart(Stop::Kill).unwrap();
        }
    });
    let start = Instant::now();
    while let Err(error) = result {
        assert_eq!(error.disposition(), Disposition::Retry, "{error}");
        assert!(start.elapsed() < 2 * PATIENCE, "{error}");
        result = match committer.open() {
            Ok(Some(Epoch(1))) => Ok(()),
            Ok(_) => committer.commit(Epoch(1), &staged, &|_| {}),
            Err(error) => Err(error),
        };
    }
    assert_eq!(output(&kafka, topic), is(0..100));
    assert!(kafka.open_transactions().unwrap().is_empty());

    // The others just go on.
    kafka.produce_values(input, 0, numbers(10..15)).unwrap();
    assert_eq!(take(&mut reader, 5).iter().map(|r| r.1).collect::<Vec<_>>(), is(10..15));
    stage_with(&mut operator, vec![rows(10..20)]);
    let mut found = output(&kafka, direct);
    found.dedup();
    assert_eq!(found, is(0..20));
}

#[test]
fn a_cluster_that_lists_no_brokers_for_a_moment_is_survived() {
    let topic = "nobody";
    // The more there is to take in of an answer, the surer the client has dropped its brokers before it is through with it.
    broker().create_topic(topic, 40, &[]).unwrap();
    let between = Between::start(&broker().bootstrap()).unwrap();
    // So that it asks soon.
    let often = [("properties.topic.metadata.refresh.interval.ms", "200")];
    let factory = source_at(&between.address(), topic, &often);
    let mut reader = factory.open(factory.splits(&[]).unwrap(), &subtask()).unwrap();
    broker().produce_values(topic, 0, numbers(0..10)).unwrap();
    assert_eq!(take(&mut reader, 10).len(), 10);
    between.hide();
    let start = Instant::now();
    while between.hidden() == 0 {
        assert!(start.elapsed() < PATIENCE, "nobody asked");
        reader.poll(Duration::from_millis(10)).unwrap();
    }
    between.show();
    broker().produce_values(topic, 0, numbers(10..15)).unwrap();
    assert_eq!(take(&mut reader, 5).iter().map(|r| r.1).collect::<Vec<_>>(), is(10..15));
}

#[test]
fn declarations_that_cannot_work_are_refused_at_planning() {
    let check = |upsert: bool, changelog: bool, options: &[(&str, &str)], guarantee, expected: &str| {
        let table = table("nowhere:9092", "t", &[], options);
        let input = SinkInput { schema: schema(), changelog };
        let error = Connector { upsert }.sink(&table, &input, &plan(guarantee)).err().unwrap();
        assert!(error.message.starts_with(expected), "{}", error.message);
    };
    let none = Guarantee::None;
    check(false, true, &[], none, "a key is needed, because the query updates rows it has written");
    check(true, false, &[], none, "a key is needed, because 'upsert-kafka' replaces rows");
    let guarantee = [("sink.delivery-guarantee", "exactly-once")];
    check(false, false, &guarantee, Guarantee::AtLeastOnce, "option 'sink.delivery-guarantee': 'exactly-once' needs");
    check(false, false, &[("key.fields", "x")], none, "there is no column 'x' for the key");
    check(false, false, &[("format", "csv")], none, "only format 'json' can be written");
    check(false, false, &[("properties.lingr.ms", "1")], none, "option 'properties.lingr.ms': No such configuration");
    let secret = [("properties.sasl.password", "hunter2"), ("properties.security.protocol", "telepathy")];
    let table = table("nowhere:9092", "t", &[], &secret);
    let error = Connector { upsert: false }.source(&table, &schema(), &plan(none)).err().unwrap();
    assert!(error.message.starts_with("option 'properties.security.protocol': "), "{}", error.message);
    assert!(!error.message.contains("hunter2"));
}
