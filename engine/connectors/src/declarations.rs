//! Tests of what connectors say to declarations that can't work: at planning, about the option or column at fault. The planner
//! puts the table's name before it, so no message does.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use expect_test::{Expect, expect};
use floodmark_dataflow::connector::{Guarantee, Location, OptionValue, PlanContext, SinkInput, TableDef, TableError};
use floodmark_snapshot::JobId;

use crate::all;

const ROW: &str = "position";

fn schema(columns: &[(&str, DataType)]) -> SchemaRef {
    Arc::new(Schema::new(columns.iter().map(|(n, t)| Field::new(*n, t.clone(), true)).collect::<Vec<_>>()))
}

fn nested() -> SchemaRef {
    let row = DataType::Struct(vec![Field::new("x", DataType::Int64, true)].into());
    schema(&[("id", DataType::Int64), (ROW, row)])
}

fn table(schema: &SchemaRef, options: &[(&str, &str)]) -> TableDef {
    let value = |v: &str| OptionValue::parse(v, Location { line: 3, column: 5 }).unwrap();
    TableDef {
        name: "orders".to_owned(),
        schema: schema.clone(),
        primary_key: Vec::new(),
        options: options.iter().map(|(k, v)| ((*k).to_owned(), value(v))).collect(),
        location: Location::default(),
    }
}

fn plan() -> PlanContext {
    let job = JobId { namespace: "default".into(), name: "job".into(), uid: "local".into() };
    PlanContext { job, guarantee: Guarantee::ExactlyOnce }
}

fn check(error: Option<TableError>, expected: &Expect) {
    let error = error.unwrap();
    assert!(!error.message.contains("orders"), "the planner names the table: {error}");
    let place = error.location.map_or_else(String::new, |l| format!("{}:{} ", l.line, l.column));
    expected.assert_eq(&format!("{place}{}", error.message));
}

fn read(connector: &str, schema: &SchemaRef, options: &[(&str, &str)], expected: &Expect) {
    let all = all();
    let table = table(schema, options);
    check(all.get(connector).unwrap().source(&table, schema, &plan()).err(), expected);
}

fn written(connector: &str, schema: &SchemaRef, changelog: bool, options: &[(&str, &str)], expected: &Expect) {
    let all = all();
    let input = SinkInput { schema: schema.clone(), changelog };
    check(all.get(connector).unwrap().sink(&table(schema, options), &input, &plan()).err(), expected);
}

#[test]
fn rates_are_above_0() {
    let n = schema(&[("n", DataType::Int64)]);
    read("datagen", &n, &[("rate", "0")], &expect!["3:5 option 'rate': '0' is not a number above 0"]);
    read("datagen", &n, &[("rate", "-1")], &expect!["3:5 option 'rate': '-1' is not a number above 0"]);
    let event = schema(&[("event_type", DataType::Int32)]);
    read("nexmark", &event, &[("rate", "0")], &expect!["3:5 option 'rate': '0' is not a number above 0"]);
    read("nexmark", &event, &[("rate", "-1")], &expect!["3:5 option 'rate': '-1' is not a number above 0"]);
    read("nexmark", &event, &[("rate", "NaN")], &expect!["3:5 option 'rate': 'NaN' is not a number above 0"]);
    read("nexmark", &event, &[("rate", "inf")], &expect!["3:5 option 'rate': 'inf' is not a number above 0"]);
}

#[test]
fn csv_holds_no_nested_columns() {
    let nested_column = expect!["column 'position' is nested, which a line of CSV can't hold; use format 'json'"];
    let files = [("path", "/nowhere"), ("format", "csv")];
    read("files", &nested(), &files, &nested_column);
    written("files", &nested(), false, &files, &nested_column);
    let topic = [("topic", "t"), ("properties.bootstrap.servers", "localhost:1"), ("value.format", "csv")];
    read("kafka", &nested(), &topic, &nested_column);
    written("kafka", &nested(), false, &topic, &expect!["only format 'json' can be written to Kafka"]);
}

#[test]
fn csv_of_bytes_is_not_read_unless_nobody_asks_for_them() {
    let bytes = schema(&[("id", DataType::Int64), ("photo", DataType::Binary)]);
    let files = [("path", "/nowhere"), ("format", "csv")];
    read(
        "files",
        &bytes,
        &files,
        &expect![
            "column 'photo' holds BYTES, which can't be read from CSV; declare it as STRING, or use format 'json'"
        ],
    );
    let all = all();
    let unread = all.get("files").unwrap().source(&table(&bytes, &files), &schema(&[("id", DataType::Int64)]), &plan());
    assert!(unread.is_ok());
}

#[test]
fn datagen_refuses_what_it_cannot_make() {
    read(
        "datagen",
        &schema(&[("at", DataType::Time32(TimeUnit::Millisecond))]),
        &[],
        &expect!["column 'at': datagen makes no values of type Time32(ms)"],
    );
    read(
        "datagen",
        &schema(&[("photo", DataType::Binary)]),
        &[],
        &expect!["column 'photo': datagen makes no values of type Binary"],
    );
    read(
        "datagen",
        &nested(),
        &[],
        &expect![[r#"column 'position': datagen makes no values of type Struct("x": Int64)"#]],
    );
}

#[test]
fn datagen_refuses_texts_that_fill_the_memory() {
    let text = schema(&[("s", DataType::Utf8)]);
    let expected = expect!["3:5 option 'fields.s.length': 100000 is more than 65536 characters"];
    read("datagen", &text, &[("fields.s.length", "100000")], &expected);
    let expected = expect!["3:5 option 'fields.s.length': '-1' is not a number of characters"];
    read("datagen", &text, &[("fields.s.length", "-1")], &expected);
}

#[test]
fn the_table_is_left_to_the_planner_to_name() {
    let n = schema(&[("n", DataType::Int64)]);
    written(
        "files",
        &n,
        true,
        &[("path", "/nowhere")],
        &expect![
            "connector 'files' takes insertions only, and the query updates rows it has written; \
             use connector 'upsert-kafka', or a windowed aggregate"
        ],
    );
    read(
        "upsert-kafka",
        &n,
        &[],
        &expect!["connector 'upsert-kafka' can be written to, not read from; read its topic with 'kafka'"],
    );
    let topic = [("topic", "t"), ("properties.bootstrap.servers", "localhost:1")];
    written(
        "kafka",
        &n,
        true,
        &topic,
        &expect![
            "a key is needed, because the query updates rows it has written: declare PRIMARY KEY (…) NOT ENFORCED"
        ],
    );
    let key = [topic[0], topic[1], ("key.fields", "m")];
    written("kafka", &n, false, &key, &expect!["3:5 there is no column 'm' for the key"]);
    written("datagen", &n, false, &[], &expect!["connector 'datagen' can be read from, not written to"]);
    read("blackhole", &n, &[], &expect!["connector 'blackhole' can be written to, not read from"]);
}

#[test]
fn variables_stand_only_where_their_values_do_not_show() {
    let n = schema(&[("n", DataType::Int64)]);
    let refused = |option| {
        format!(
            "3:5 option '{option}': a variable can't stand here, because the value shows in plans, checkpoints and errors; \
             variables are for options 'properties.*' (for a literal ${{ write $${{)"
        )
    };
    let all = all();
    let source = |connector: &str, options: &[(&str, &str)]| {
        let error = all.get(connector).unwrap().source(&table(&n, options), &n, &plan()).err().unwrap();
        format!("{}:{} {}", error.location.unwrap().line, error.location.unwrap().column, error.message)
    };
    assert_eq!(source("kafka", &[("topic", "${T}"), ("properties.bootstrap.servers", "b:1")]), refused("topic"));
    assert_eq!(source("files", &[("path", "s3://${BUCKET}/in")]), refused("path"));
    assert_eq!(source("datagen", &[("rate", "${R}")]), refused("rate"));
    assert_eq!(source("datagen", &[("fields.n.kind", "${K}")]), refused("fields.n.kind"));
    // Nothing of a property is known while the job is planned, but whether it is there.
    let topic = ("topic", "a$${b}");
    let servers = ("properties.bootstrap.servers", "${SERVERS}");
    let late = [topic, servers, ("properties.sasl.password", "${P}"), ("properties.acks", "${A}")];
    assert!(all.get("kafka").unwrap().source(&table(&n, &late), &n, &plan()).is_ok());
    assert_eq!(OptionValue::parse(topic.1, Location::default()).unwrap().value, "a${b}");
}
