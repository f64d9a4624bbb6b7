//! Deduplication: what is kept, what is told of it, how it is planned, and what is refused.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use arrow::{
    array::{ArrayRef, Int64Array, StringArray, TimestampMillisecondArray},
    record_batch::RecordBatch,
};
use expect_test::{Expect, expect};
use floodmark_dataflow::{Batch, Operator, Output, SubtaskContext, graph::NodeKind};
use floodmark_snapshot::env::Clock;

use super::{
    harness::{Run, check, check_in_order, check_rescaled, context, planned, shards_of, show},
    results::Random,
};
use crate::plan::row_number::DEDUPLICATION;

/// Two rows are a batch.
const T: &str = r#"
CREATE TABLE t (k BIGINT, v STRING, at TIMESTAMP(3), WATERMARK FOR at AS at) WITH ('connector' = 'rows', 'rows' = '
    {"k": 1, "v": "a", "at": "2026-01-01T00:00:10"}
    {"k": 2, "v": "b", "at": "2026-01-01T00:00:10"}
    {"k": 1, "v": "c", "at": "2026-01-01T00:00:12"}
    {"k": 1, "v": "d", "at": "2026-01-01T00:00:11"}
    {"k": 2, "v": "e", "at": "2026-01-01T00:00:10"}
    {"k": 1, "v": "f", "at": "2026-01-01T00:00:12"}
    {"k": 2, "v": null, "at": "2026-01-01T00:00:05"}
    {"k": 3, "v": "no time", "at": null}
    {"k": 1, "v": "i", "at": "2026-01-01T00:00:01"}
    {"k": 1, "v": "j", "at": "2026-01-01T00:00:01"}
');
CREATE TABLE o (k BIGINT, v STRING, PRIMARY KEY (k) NOT ENFORCED) WITH ('connector' = 'rows');
CREATE TABLE log (k BIGINT, v STRING, at TIMESTAMP(3)) WITH ('connector' = 'rows');
"#;

const LAST: &str = "(SELECT *, ROW_NUMBER() OVER (PARTITION BY k ORDER BY at DESC) AS rn FROM t)";
const FIRST: &str = "(SELECT *, ROW_NUMBER() OVER (PARTITION BY k ORDER BY at) AS rn FROM t)";

#[test]
fn the_last_row_is_replaced_by_one_of_the_same_time_or_later() {
    let sql = format!("{T} INSERT INTO o SELECT k, v FROM {LAST} WHERE rn = 1");
    let expected = ["o +I 1 a", "o +I 2 b", "o +U 1 c", "o +U 2 e", "o +U 1 f"];
    check_in_order(&sql, &expected);
    check(&sql, &expected);
}

#[test]
fn the_first_row_is_replaced_only_by_an_earlier_one() {
    let sql = format!("{T} INSERT INTO o SELECT k, v FROM {FIRST} WHERE rn = 1");
    let expected = ["o +I 1 a", "o +I 2 b", "o +U 2 null", "o +U 1 i"];
    check_in_order(&sql, &expected);
    check(&sql, &expected);
}

#[test]
fn without_a_key_the_sink_is_told_the_row_before() {
    let sql = format!("{T} INSERT INTO log SELECT k, v, at FROM {LAST} WHERE rn = 1");
    let expected = [
        "log +I 1 a 00:00:10.000",
        "log +I 2 b 00:00:10.000",
        "log -U 1 a 00:00:10.000",
        "log +U 1 c 00:00:12.000",
        "log -U 2 b 00:00:10.000",
        "log +U 2 e 00:00:10.000",
        "log -U 1 c 00:00:12.000",
        "log +U 1 f 00:00:12.000",
    ];
    check_in_order(&sql, &expected);
    check(&sql, &expected);
}

#[test]
fn rows_without_a_time_are_left_out_and_counted() {
    let run = Run::of(&format!("{T} INSERT INTO o SELECT k, v FROM {LAST} WHERE rn = 1"));
    assert!(run.rows.iter().all(|row| !row.contains("no time")), "{:?}", run.rows);
    assert_eq!(run.late, 1);
}

#[test]
fn the_number_one_may_be_asked_for_in_many_ways() {
    for condition in ["rn = 1", "rn <= 1", "rn < 2", "1 = rn", "1 >= rn", "2 > rn", "rn < 1 + 1", "rn = CAST(1 AS INT)"]
    {
        let expected = ["o +I 1 a", "o +I 2 b", "o +U 1 c", "o +U 2 e", "o +U 1 f"];
        check_in_order(&format!("{T} INSERT INTO o SELECT k, v FROM {LAST} WHERE {condition}"), &expected);
        check_in_order(
            &format!(
                "{T} CREATE VIEW numbered AS SELECT v AS w, k AS j, ROW_NUMBER() OVER (PARTITION BY k ORDER BY at DESC) AS rn FROM t;
                 CREATE VIEW kept (a, b) AS WITH n AS (SELECT j, w, rn FROM numbered AS x) SELECT j, w FROM n AS y WHERE {condition};
                 INSERT INTO o SELECT z.a, z.b FROM kept AS z"
            ),
            &expected,
        );
    }
}

#[test]
fn other_conditions_take_rows_back() {
    check_in_order(
        &format!("{T} INSERT INTO o SELECT k, v FROM {LAST} WHERE rn = 1 AND v <> 'c'"),
        &["o +I 1 a", "o +I 2 b", "o -U 1 a", "o -U 2 b", "o +U 2 e", "o +U 1 f"],
    );
    check_in_order(
        &format!("{T} INSERT INTO o SELECT k, v FROM {LAST} WHERE k = 2 AND rn = 1"),
        &["o +I 2 b", "o +U 2 e"],
    );
}

#[test]
fn a_key_may_have_any_number_of_columns() {
    check_in_order(
        &format!(
            "{T} CREATE TABLE one (k BIGINT) WITH ('connector' = 'rows');
             INSERT INTO one SELECT k FROM (SELECT k, ROW_NUMBER() OVER (ORDER BY at) AS rn FROM t) WHERE rn = 1"
        ),
        &["one +I 1", "one -U 1", "one +U 2", "one -U 2", "one +U 1"],
    );
    check_in_order(
        &format!(
            "{T} CREATE TABLE two (k BIGINT, v STRING, at TIMESTAMP(3), PRIMARY KEY (v, k) NOT ENFORCED) WITH ('connector' = 'rows');
             INSERT INTO two SELECT k, v, at FROM
             (SELECT *, ROW_NUMBER() OVER (PARTITION BY k, v ORDER BY at) AS rn FROM t WHERE k = 2) WHERE rn = 1"
        ),
        &["two +I 2 b 00:00:10.000", "two +I 2 e 00:00:10.000", "two +I 2 null 00:00:05.000"],
    );
}

#[test]
fn all_types_are_kept() {
    check_in_order(
        r#"CREATE TABLE n (k DECIMAL(10, 2), l ARRAY<INT>, r ROW<x INT, y STRING>, b BOOLEAN, d DATE, at TIMESTAMP(6), WATERMARK FOR at AS at)
           WITH ('connector' = 'rows', 'rows' = '
             {"k": "1.5", "l": [1, null], "r": {"x": 1, "y": "p"}, "b": true, "d": "2026-01-01", "at": "2026-01-01T00:00:00.000001"}
             {"k": "2.5", "l": null, "r": null, "b": null, "d": null, "at": "2026-01-01T00:00:00.000001"}
             {"k": "1.5", "l": [], "r": {"x": null, "y": null}, "b": false, "d": null, "at": "2026-01-01T00:00:00.000002"}
             {"k": "2.5", "l": [7], "r": {"x": 2, "y": ""}, "b": true, "d": "1969-12-31", "at": "2026-01-01T00:00:00.000000"}
           ');
           CREATE TABLE p (k DECIMAL(10, 2), l ARRAY<INT>, r ROW<x INT, y STRING>, b BOOLEAN, d DATE) WITH ('connector' = 'rows');
           INSERT INTO p SELECT k, l, r, b, d FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY k ORDER BY at DESC) AS rn FROM n) WHERE rn <= 1"#,
        &[
            "p +I 1.50 [1, null] {x: 1, y: p} true 2026-01-01",
            "p +I 2.50 null null null null",
            "p -U 1.50 [1, null] {x: 1, y: p} true 2026-01-01",
            "p +U 1.50 [] {x: null, y: null} false null",
        ],
    );
}

#[test]
fn the_last_window_of_each_key_is_found() {
    check(
        &format!(
            "{T} INSERT INTO log SELECT k, CAST(n AS STRING), window_time FROM
             (SELECT *, ROW_NUMBER() OVER (PARTITION BY k ORDER BY window_time DESC) AS rn FROM
              (SELECT k, count(*) AS n, window_start, window_end, window_time
               FROM TABLE(TUMBLE(TABLE t, DESCRIPTOR(at), INTERVAL '2' SECOND))
               WHERE v IS NOT NULL GROUP BY k, window_start, window_end, window_time))
             WHERE rn = 1"
        ),
        // Only the end of the input lets the window of 12 s fire.
        &["log +I 1 2 00:00:11.999", "log +I 2 1 00:00:11.999", "log -U 1 2 00:00:11.999", "log +U 1 2 00:00:13.999"],
    );
}

#[test]
fn maps_and_bytes_and_times_of_day_are_kept() {
    check_in_order(
        r#"CREATE TABLE n (k BIGINT, m MAP<STRING, INT>, y BYTES, c TIME, at TIMESTAMP(3), WATERMARK FOR at AS at)
           WITH ('connector' = 'rows', 'rows' = '
             {"k": 1, "m": {"a": 1, "b": null}, "y": "00ff", "c": "01:02:03", "at": "2026-01-01T00:00:01"}
             {"k": 2, "m": {}, "y": "", "c": null, "at": "2026-01-01T00:00:01"}
             {"k": 1, "m": null, "y": null, "c": null, "at": "2026-01-01T00:00:02"}
             {"k": 2, "m": null, "y": null, "c": null, "at": "2026-01-01T00:00:02"}
           ');
           CREATE TABLE p (k BIGINT, m MAP<STRING, INT>, y BYTES, c TIME) WITH ('connector' = 'rows');
           INSERT INTO p SELECT k, m, y, c FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY k ORDER BY at DESC) AS rn FROM n) WHERE rn <= 1"#,
        &[
            "p +I 1 {a: 1, b: null} 00ff 01:02:03",
            "p +I 2 {}  null",
            "p -U 1 {a: 1, b: null} 00ff 01:02:03",
            "p +U 1 null null null",
            "p -U 2 {}  null",
            "p +U 2 null null null",
        ],
    );
}

#[test]
fn two_sinks_share_one_deduplication() {
    check_in_order(
        &format!(
            "{T} CREATE VIEW last AS SELECT k, v, at FROM {LAST} WHERE rn = 1;
             INSERT INTO o SELECT k, v FROM last WHERE k = 2; INSERT INTO log SELECT k, v, at FROM last WHERE k = 2"
        ),
        &[
            "o +I 2 b",
            "log +I 2 b 00:00:10.000",
            "o -U 2 b",
            "o +U 2 e",
            "log -U 2 b 00:00:10.000",
            "log +U 2 e 00:00:10.000",
        ],
    );
}

fn check_plan(rest: &str, expected: Expect) {
    let graph = planned(&format!("{T}{rest}")).unwrap_or_else(|e| panic!("{e}"));
    expected.assert_eq(&graph.to_string());
}

#[test]
fn only_columns_that_are_wanted_are_kept() {
    check_plan(
        &format!("INSERT INTO o SELECT k, v FROM {LAST} WHERE rn = 1"),
        expect![[r#"
        task 0
          rows source t(k, v, at)  [source:t]
          local deduplicate by [k]: last by at  [o/local-deduplicate-1]
        task 1
          <- task 0 (hash of columns [0]) into input 0
          deduplicate by [k]: last by at  [o/deduplicate-1]
          project t.k, t.v  [o/project-1]
          rows sink o(k, v) (updates)  [sink:o]
    "#]],
    );
    check_plan(
        "INSERT INTO o (k) SELECT u.k FROM (SELECT k, v, at AS time, ROW_NUMBER() OVER (PARTITION BY k ORDER BY at) AS rn FROM t) AS u WHERE rn = 1 AND u.time IS NOT NULL",
        expect![[r#"
            task 0
              rows source t(k, at)  [source:t]
              local deduplicate by [k]: first by at  [o/local-deduplicate-1]
            task 1
              <- task 0 (hash of columns [0]) into input 0
              deduplicate by [k]: first by at  [o/deduplicate-1]
              filter t.at IS NOT NULL  [o/filter-1]
              project t.k  [o/project-1]
              project u.k, NULL AS v  [o/project-2]
              rows sink o(k, v) (updates)  [sink:o]
        "#]],
    );
}

#[test]
fn numbers_that_nobody_reads_are_not_computed() {
    check_plan(
        &format!("INSERT INTO log SELECT k, v, at FROM {LAST}"),
        expect![[r#"
        task 0
          rows source t(k, v, at)  [source:t]
          rows sink log(k, v, at)  [sink:log]
    "#]],
    );
}

#[test]
fn the_state_says_what_it_is() {
    let graph = planned(&format!("{T} INSERT INTO o SELECT k, v FROM {LAST} WHERE rn = 1")).unwrap();
    let schemas: Vec<String> =
        graph.nodes().filter_map(|(_, n)| n.state_schema.as_ref()).map(ToString::to_string).collect();
    assert_eq!(schemas, ["last rows by at by (k Int64): at Timestamp(ms), v Utf8"]);
}

#[test]
fn kept_rows_are_shared_out_by_key_group_and_put_together_again() {
    let rows: String = (0..60)
        .map(|k| format!("{{\"k\": {}, \"v\": \"{k}\", \"at\": \"2026-01-01T00:00:{k:02}\"}}\n", k % 40))
        .collect();
    let sql = format!(
        "CREATE TABLE t (k BIGINT, v STRING, at TIMESTAMP(3), WATERMARK FOR at AS at) WITH ('connector' = 'rows', 'rows' = '{rows}');
         CREATE TABLE o (k BIGINT, v STRING, PRIMARY KEY (k) NOT ENFORCED) WITH ('connector' = 'rows');
         INSERT INTO o SELECT k, v FROM {LAST} WHERE rn = 1"
    );
    check_rescaled(&sql, 3);
}

/// What deduplication means, row by row; the changes of a batch (two rows) to one key are one.
#[test]
fn random_rows_agree_with_the_definition() {
    for seed in 1..=60_u64 {
        let mut random = Random(seed * 0x9E37_79B9);
        let last = random.below(2) == 0;
        let (keys, times) = (1 + random.below(4), 1 + random.below(12));
        let mut rows = String::new();
        let mut kept: BTreeMap<i64, (i64, i64)> = BTreeMap::new();
        let mut expected = Vec::new();
        for batch in 0..20 {
            let before = kept.clone();
            for value in [batch * 2, batch * 2 + 1] {
                let (key, time) = (random.below(keys), random.below(times));
                if random.below(10) == 0 {
                    rows += &format!("{{\"k\": {key}, \"v\": \"{value}\"}}\n");
                    continue;
                }
                rows += &format!("{{\"k\": {key}, \"v\": \"{value}\", \"at\": \"2026-01-01T00:00:{time:02}\"}}\n");
                let better = |(old, _): &(i64, i64)| if last { time >= *old } else { time < *old };
                if kept.get(&key).is_none_or(better) {
                    kept.insert(key, (time, value));
                }
            }
            for (key, (time, value)) in &kept {
                let row = |time: &i64, value: &i64| format!("{key} {value} 00:00:{time:02}.000");
                match before.get(key) {
                    Some(old) if *old == (*time, *value) => {}
                    Some((old_time, old)) => {
                        expected.push(format!("log -U {}", row(old_time, old)));
                        expected.push(format!("log +U {}", row(time, value)));
                    }
                    None => expected.push(format!("log +I {}", row(time, value))),
                }
            }
        }
        let order = if last { "DESC" } else { "ASC" };
        eprintln!("seed {seed}: {order}, {keys} keys, {times} times");
        check(
            &format!(
                "CREATE TABLE t (k BIGINT, v STRING, at TIMESTAMP(3), WATERMARK FOR at AS at) WITH ('connector' = 'rows', 'rows' = '{rows}');
                 CREATE TABLE log (k BIGINT, v STRING, at TIMESTAMP(3)) WITH ('connector' = 'rows');
                 INSERT INTO log SELECT k, v, at FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY k ORDER BY at {order}) AS rn FROM t) WHERE rn <= 1"
            ),
            &expected.iter().map(String::as_str).collect::<Vec<_>>(),
        );
    }
}

/// `rest` begins on line 16. The help that most refusals give is `[help]`.
#[track_caller]
fn refused(rest: &str, expected: &str) {
    let error = match planned(&format!("{}\n{rest}", T.trim_end())) {
        Ok(graph) => panic!("planned:\n{graph}"),
        Err(error) => error,
    };
    let text = error.to_string();
    let first = text.lines().next().unwrap().replace(DEDUPLICATION, "[help]");
    assert_eq!(first, expected, "{text}");
}

#[test]
fn other_uses_of_over_are_refused() {
    let over = |call: &str, expected: &str| {
        refused(&format!("INSERT INTO log (k) SELECT k FROM (SELECT k, {call} AS rn FROM t) WHERE rn = 1"), expected);
    };
    over(
        "sum(k) OVER (PARTITION BY v)",
        "line 16, column 46: OVER is not supported; use TUMBLE or HOP windows with GROUP BY",
    );
    over(
        "rank() OVER (PARTITION BY k ORDER BY at)",
        "line 16, column 46: OVER is not supported; use TUMBLE or HOP windows with GROUP BY",
    );
    over("ROW_NUMBER()", "line 16, column 46: ROW_NUMBER without OVER is not supported; [help]");
    over(
        "ROW_NUMBER() OVER (PARTITION BY k)",
        "line 16, column 46: ROW_NUMBER without ORDER BY is not supported; [help]",
    );
    over("ROW_NUMBER() OVER w", "line 16, column 64: OVER with a name is not supported; [help]");
    over(
        "ROW_NUMBER() OVER (PARTITION BY k ORDER BY at, v)",
        "line 16, column 93: ROW_NUMBER by more than one column is not supported; [help]",
    );
    over(
        "ROW_NUMBER() OVER (PARTITION BY k ORDER BY at ROWS BETWEEN 1 PRECEDING AND CURRENT ROW)",
        "line 16, column 46: ROW_NUMBER with a frame is not supported; [help]",
    );
    over(
        "ROW_NUMBER() OVER (PARTITION BY k ORDER BY v)",
        "line 16, column 46: ROW_NUMBER needs event time to order by: 'v' is not; declare WATERMARK FOR the column in its table, pass it on as it is, and write ORDER BY column or ORDER BY column DESC",
    );
    over(
        "ROW_NUMBER() OVER (PARTITION BY k ORDER BY CAST(at AS DATE))",
        "line 16, column 46: ROW_NUMBER needs event time to order by: an expression is not; declare WATERMARK FOR the column in its table, pass it on as it is, and write ORDER BY column or ORDER BY column DESC",
    );
    over(
        "ROW_NUMBER() OVER (PARTITION BY k + 1 ORDER BY at)",
        "line 16, column 46: PARTITION BY of an expression is not supported; name its value in the inner query, and PARTITION BY that column",
    );
    over(
        "1 + ROW_NUMBER() OVER (PARTITION BY k ORDER BY at)",
        "line 16, column 50: ROW_NUMBER is compared with something else than 1; [help]",
    );
    over(
        "ROW_NUMBER(k) OVER (PARTITION BY k ORDER BY at)",
        "line 16, column 46: ROW_NUMBER of a value is not supported; [help]",
    );
    refused(
        "INSERT INTO log (k) SELECT k FROM t QUALIFY ROW_NUMBER() OVER (PARTITION BY k ORDER BY at) = 1",
        "line 16, column 45: QUALIFY is not supported; [help]",
    );
}

#[test]
fn row_numbers_are_for_one_comparison_only() {
    let filtered = |condition: &str, expected: &str| {
        refused(&format!("INSERT INTO log (k) SELECT k FROM {LAST} WHERE {condition}"), expected);
    };
    filtered(
        "rn <= 3",
        "line 16, column 46: only the first row of each key can be kept; more (top-n) is not supported; compare the row number with 1",
    );
    filtered(
        "rn = 2",
        "line 16, column 46: only the first row of each key can be kept; more (top-n) is not supported; compare the row number with 1",
    );
    filtered(
        "rn > 1",
        "line 16, column 46: only the first row of each key can be kept; more (top-n) is not supported; compare the row number with 1",
    );
    filtered("rn = k", "line 16, column 46: ROW_NUMBER is compared with something else than 1; [help]");
    filtered("rn = 1 OR k = 2", "line 16, column 46: ROW_NUMBER is compared with something else than 1; [help]");
    filtered("rn <= 1 AND rn >= 1", "line 16, column 46: ROW_NUMBER is compared more than once; [help]");
    refused(
        &format!("INSERT INTO log (k, v) SELECT rn, v FROM {LAST} WHERE rn = 1"),
        "line 16, column 53: the row number itself can't be selected: of the rows kept it is 1; name the columns that you want instead of *",
    );
    refused(
        &format!("INSERT INTO log (k, v) SELECT rn, v FROM {LAST}"),
        "line 16, column 53: ROW_NUMBER that no condition compares with 1 is not supported; [help]",
    );
    refused(
        &format!("INSERT INTO log (k, v) SELECT k + rn, v FROM {LAST} WHERE rn = 1"),
        "line 16, column 57: the row number itself can't be selected: of the rows kept it is 1; name the columns that you want instead of *",
    );
    refused(
        "INSERT INTO log (k, v) SELECT k, v FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY k ORDER BY at) AS r1, ROW_NUMBER() OVER (PARTITION BY v ORDER BY at) AS r2 FROM t) WHERE r1 = 1 AND r2 = 1",
        "line 16, column 52: ROW_NUMBER that no condition compares with 1 is not supported; [help]",
    );
}

#[test]
fn updates_are_not_built_upon() {
    let last = format!("CREATE VIEW last AS SELECT k, v, at FROM {LAST} WHERE rn = 1;");
    let refused = |rest: &str, expected: &str| refused(&format!("{last}\nINSERT INTO log (k) {rest}"), expected);
    refused(
        "SELECT count(*) FROM last GROUP BY v",
        "line 17, column 1: an aggregate (GROUP BY or DISTINCT) over a query that updates its rows is not supported; aggregate windows instead, or write the inner result to a table of its own",
    );
    refused(
        "SELECT DISTINCT k FROM last",
        "line 17, column 1: an aggregate (GROUP BY or DISTINCT) over a query that updates its rows is not supported; aggregate windows instead, or write the inner result to a table of its own",
    );
    refused(
        "SELECT k FROM last UNION ALL SELECT k FROM t",
        "line 17, column 1: UNION ALL of a query that updates its rows is not supported",
    );
    refused(
        "SELECT count(*) FROM TABLE(TUMBLE(TABLE last, DESCRIPTOR(at), INTERVAL '1' SECOND)) GROUP BY window_end",
        "line 17, column 42: windows of a query that updates its rows are not supported",
    );
    refused(
        "SELECT k FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY v ORDER BY at) AS rn FROM last) WHERE rn = 1",
        "line 17, column 46: deduplication of a query that updates its rows is not supported; deduplicate the rows of a table first",
    );
    refused(
        "SELECT a.k FROM last AS a JOIN last AS b ON a.k = b.k",
        "line 17, column 52: a JOIN with a query that updates its rows is not supported; join two windowed queries on the equality of their window_start and window_end",
    );
}

#[test]
fn what_is_deduplicated_must_be_rows_of_a_stream() {
    refused(
        "INSERT INTO log (k) SELECT k FROM (SELECT k, ROW_NUMBER() OVER (PARTITION BY k ORDER BY at DESC) AS rn FROM (SELECT k, max(at) AS at FROM t GROUP BY k)) WHERE rn = 1",
        "line 16, column 46: deduplication of a query that updates its rows is not supported; deduplicate the rows of a table first",
    );
    refused(
        "INSERT INTO log (k) SELECT k FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY window_start, window_end, k ORDER BY at DESC) AS rn FROM TABLE(TUMBLE(TABLE t, DESCRIPTOR(at), INTERVAL '10' SECOND))) WHERE rn = 1",
        "line 16, column 46: deduplication within windows is not supported; deduplicate the rows of a table, by columns of its own",
    );
    refused(
        &format!("INSERT INTO o SELECT k + 1, v FROM {LAST} WHERE rn = 1"),
        "line 16, column 1: the query updates rows, but not all of their key goes into table 'o'; insert all columns of the GROUP BY (or PARTITION BY), and make them the PRIMARY KEY",
    );
    refused(
        "CREATE TABLE by_v (k BIGINT, v STRING, PRIMARY KEY (v) NOT ENFORCED) WITH ('connector' = 'rows'); INSERT INTO by_v SELECT k, v FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY k ORDER BY at DESC) AS rn FROM t) WHERE rn = 1",
        "line 16, column 99: the query updates rows by (k), but the primary key of table 'by_v' is (v); declare PRIMARY KEY (k) NOT ENFORCED",
    );
}

/// A clock that stands still until it is set.
struct SetClock(AtomicI64);

impl Clock for SetClock {
    fn wall_ms(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}

/// The deduplication of a job, by itself.
fn deduplicate(sql: &str, context: &SubtaskContext) -> Box<dyn Operator> {
    let graph = planned(sql).unwrap_or_else(|e| panic!("{e}"));
    let (_, node) = graph.nodes().find(|(_, n)| n.state_schema.is_some()).unwrap();
    let NodeKind::Operator(factory) = &node.node else { panic!("{} is no operator", node.uid) };
    factory.create(context).unwrap()
}

/// What an operator makes of one row of columns `k`, `at` (seconds) and, if there is one, `v`.
fn fed(operator: &mut dyn Operator, k: i64, v: Option<&str>, at: i64) -> Vec<String> {
    let mut columns: Vec<(&str, ArrayRef)> = vec![("k", Arc::new(Int64Array::from(vec![k])))];
    columns.extend(v.map(|v| ("v", Arc::new(StringArray::from(vec![v])) as ArrayRef)));
    columns.push(("at", Arc::new(TimestampMillisecondArray::from(vec![at * 1000]))));
    let rows = RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, c)| (name, c, true))).unwrap();
    let mut out = Output::default();
    operator.process(0, Batch::new(rows), &mut out).unwrap();
    out.take().iter().flat_map(|b| show("o", &b.rows)).collect()
}

#[test]
fn a_column_that_is_new_is_null_in_rows_kept_before() {
    let kept = |columns: &str| format!("{T} INSERT INTO log ({columns}) SELECT {columns} FROM {LAST} WHERE rn = 1");
    let mut old = deduplicate(&kept("k, at"), &context());
    assert_eq!(fed(&mut *old, 1, None, 10), ["o +I 1 00:00:10.000"]);
    let mut new = deduplicate(&kept("k, v, at"), &context());
    new.restore(shards_of(&mut *old, 0)).unwrap();
    new.restored().unwrap();
    assert_eq!(fed(&mut *new, 1, Some("too old"), 9), [""; 0]);
    assert_eq!(fed(&mut *new, 1, Some("b"), 11), ["o -U 1 null 00:00:10.000", "o +U 1 b 00:00:11.000"]);
    // And one that is gone is skipped.
    let mut newer = deduplicate(&kept("k, at"), &context());
    newer.restore(shards_of(&mut *new, 0)).unwrap();
    newer.restored().unwrap();
    assert_eq!(fed(&mut *newer, 1, None, 12), ["o -U 1 00:00:11.000", "o +U 1 00:00:12.000"]);
}

#[test]
fn keys_that_nothing_happens_to_are_forgotten_in_time() {
    let clock = Arc::new(SetClock(AtomicI64::new(0)));
    let mut context = context();
    context.env.clock = clock.clone();
    context.state.ttl = Some(Duration::from_secs(60));
    let mut operator = deduplicate(&format!("{T} INSERT INTO o SELECT k, v FROM {LAST} WHERE rn = 1"), &context);
    let mut at = |second: i64, k: i64, v: &str, time: i64| {
        clock.0.store(second * 1000, Ordering::Relaxed);
        fed(&mut *operator, k, Some(v), time)
    };
    assert_eq!(at(0, 1, "a", 10), ["o +I 1 a 00:00:10.000"]);
    assert_eq!(at(50, 1, "too old", 5), [""; 0]);
    assert_eq!(at(100, 1, "too old, and the key is still there", 5), [""; 0]);
    assert_eq!(at(100, 2, "b", 5), ["o +I 2 b 00:00:05.000"]);
    assert_eq!(at(161, 1, "new again", 5), ["o +I 1 new again 00:00:05.000"]);
    assert_eq!(at(161, 1, "c", 5), ["o +U 1 c 00:00:05.000"]);
}
