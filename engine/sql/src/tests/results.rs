//! What queries yield.

use super::harness::{check, check_in_order, check_rescaled};

const BIDS: &str = r#"
    CREATE TABLE bid (
        auction BIGINT, price BIGINT, who STRING, at TIMESTAMP(3),
        double_price AS price * 2,
        WATERMARK FOR at AS at - INTERVAL '2' SECOND
    ) WITH ('connector' = 'rows', 'rows' = '
        {"auction": 1, "price": 10, "who": "a", "at": "2026-01-01T00:00:01"}
        {"auction": 2, "price": 20, "who": "b", "at": "2026-01-01T00:00:02"}
        {"auction": 1, "price": 30, "who": null, "at": "2026-01-01T00:00:03"}
        {"auction": 1, "price": null, "who": "a", "at": "2026-01-01T00:00:11"}
        {"auction": 2, "price": 50, "who": "c", "at": "2026-01-01T00:00:09"}
        {"auction": 3, "price": 60, "who": "a", "at": "2026-01-01T00:00:12"}
        {"auction": 1, "price": 70, "who": "late", "at": "2026-01-01T00:00:05"}
        {"auction": 1, "price": 80, "who": "b", "at": "2026-01-01T00:00:21"}
    ');
"#;

fn on_bids(rest: &str, expected: &[&str]) {
    check(&format!("{BIDS}{rest}"), expected);
}

#[test]
fn rows_are_filtered_and_projected_and_computed_columns_are_columns() {
    on_bids(
        "CREATE TABLE out (a BIGINT, p BIGINT, u STRING) WITH ('connector' = 'rows');
         INSERT INTO out SELECT auction, double_price + 1, upper(who) FROM bid WHERE price > 40",
        &["out +I 2 101 C", "out +I 3 121 A", "out +I 1 141 LATE", "out +I 1 161 B"],
    );
}

#[test]
fn tumbling_windows_fire_when_the_watermark_passes_and_late_rows_are_dropped() {
    on_bids(
        "CREATE TABLE out (a BIGINT, n BIGINT, s BIGINT, mx BIGINT, st TIMESTAMP(3), en TIMESTAMP(3)) WITH ('connector' = 'rows');
         INSERT INTO out
         SELECT auction, count(*), sum(price), max(price), window_start, window_end
         FROM TABLE(TUMBLE(TABLE bid, DESCRIPTOR(at), INTERVAL '10' SECOND))
         GROUP BY auction, window_start, window_end",
        &[
            "out +I 1 2 40 30 00:00:00.000 00:00:10.000",
            "out +I 2 2 70 50 00:00:00.000 00:00:10.000",
            "out +I 1 1 null null 00:00:10.000 00:00:20.000",
            "out +I 3 1 60 60 00:00:10.000 00:00:20.000",
            "out +I 1 1 80 80 00:00:20.000 00:00:30.000",
        ],
    );
}

#[test]
fn hopping_windows_overlap() {
    on_bids(
        "CREATE TABLE out (en TIMESTAMP(3), n BIGINT, av DOUBLE, ai BIGINT) WITH ('connector' = 'rows');
         INSERT INTO out
         SELECT window_end, count(price), avg(price * 1e0), avg(price)
         FROM TABLE(HOP(TABLE bid, DESCRIPTOR(at), INTERVAL '4' SECOND, INTERVAL '10' SECOND))
         GROUP BY window_start, window_end",
        &[
            "out +I 00:00:02.000 1 10.0 10",
            "out +I 00:00:06.000 3 20.0 20",
            "out +I 00:00:10.000 4 27.5 27",
            "out +I 00:00:14.000 3 60.0 60",
            "out +I 00:00:18.000 2 55.0 55",
            "out +I 00:00:22.000 2 70.0 70",
            "out +I 00:00:26.000 1 80.0 80",
            "out +I 00:00:30.000 1 80.0 80",
        ],
    );
}

#[test]
fn a_group_by_is_a_changelog() {
    check_in_order(
        &format!(
            "{BIDS} CREATE TABLE out (a BIGINT, n BIGINT, s BIGINT, PRIMARY KEY (a) NOT ENFORCED) WITH ('connector' = 'rows');
             INSERT INTO out SELECT auction, count(*), sum(price) FROM bid GROUP BY auction"
        ),
        &[
            "out +I 1 1 10",
            "out +I 2 1 20",
            "out +U 1 3 40",
            "out +U 2 2 70",
            "out +I 3 1 60",
            "out +U 1 5 190",
        ],
    );
}

#[test]
fn without_a_key_updates_tell_the_row_before() {
    check_in_order(
        &format!(
            "{BIDS} CREATE TABLE out (n BIGINT) WITH ('connector' = 'rows');
             INSERT INTO out SELECT count(*) FROM bid"
        ),
        &["out +I 2", "out -U 2", "out +U 4", "out -U 4", "out +U 6", "out -U 6", "out +U 8"],
    );
}

#[test]
fn having_takes_back_rows_that_pass_no_more() {
    on_bids(
        "CREATE TABLE out (a BIGINT, n BIGINT, PRIMARY KEY (a) NOT ENFORCED) WITH ('connector' = 'rows');
         INSERT INTO out SELECT auction, count(*) FROM bid GROUP BY auction HAVING count(*) < 3",
        // The third bid of auction 1 takes its row back when it comes: after a restore, or with it, in the same batch.
        &["out +I 1 1", "out +I 2 1", "out -U 1 1", "out -U 2 1", "out +U 2 2", "out +I 3 1"],
    );
}

#[test]
fn distinct_filters_and_any_aggregate_of_datafusion_work() {
    on_bids(
        "CREATE TABLE out (a BIGINT, w BIGINT, c BIGINT, m DOUBLE, d DOUBLE, b STRING) WITH ('connector' = 'rows');
         INSERT INTO out
         SELECT auction, count(DISTINCT who), count(*) FILTER (WHERE price >= 30), median(price),
                stddev_pop(price), min(who)
         FROM TABLE(TUMBLE(TABLE bid, DESCRIPTOR(at), INTERVAL '1' HOUR))
         GROUP BY auction, window_start, window_end",
        &["out +I 1 3 3 50.0 28.613807855648993 a", "out +I 2 2 1 35.0 15.0 b", "out +I 3 1 1 60.0 0.0 a"],
    );
}

#[test]
fn select_distinct_yields_each_row_once() {
    on_bids(
        "CREATE TABLE out (w STRING) WITH ('connector' = 'rows'); INSERT INTO out SELECT DISTINCT who FROM bid",
        &["out +I a", "out +I b", "out +I null", "out +I c", "out +I late"],
    );
}

#[test]
fn several_inserts_share_a_source_and_unions_meet() {
    on_bids(
        "CREATE TABLE one (a BIGINT) WITH ('connector' = 'rows');
         CREATE TABLE two (w STRING, n INT) WITH ('connector' = 'rows');
         CREATE VIEW cheap AS SELECT who, price FROM bid WHERE price < 30;
         EXECUTE STATEMENT SET BEGIN
         INSERT INTO one SELECT auction FROM bid WHERE auction = 3;
         INSERT INTO two SELECT who, 1 FROM cheap UNION ALL SELECT concat(who, '!'), 2 FROM bid WHERE price > 70;
         END;",
        &["one +I 3", "two +I a 1", "two +I b 1", "two +I b! 2"],
    );
}

#[test]
fn rows_can_carry_their_windows() {
    on_bids(
        "CREATE TABLE out (p BIGINT, en TIMESTAMP(3)) WITH ('connector' = 'rows');
         INSERT INTO out SELECT price, window_end
         FROM TABLE(HOP(DATA => TABLE bid, TIMECOL => DESCRIPTOR(at), SLIDE => INTERVAL '5' SECOND, SIZE => INTERVAL '10' SECOND))
         WHERE price > 70",
        &["out +I 80 00:00:25.000", "out +I 80 00:00:30.000"],
    );
}

#[test]
fn columns_left_out_are_null_and_types_widen() {
    on_bids(
        "CREATE TABLE out (a DOUBLE, b STRING, c DECIMAL(20, 2)) WITH ('connector' = 'rows');
         INSERT INTO out (c, a) SELECT price, auction FROM bid WHERE auction = 3",
        &["out +I 3.0 null 60.00"],
    );
}

#[test]
fn counting_needs_no_column_at_all() {
    check_in_order(
        "CREATE TABLE t (a INT) WITH ('connector' = 'rows', 'rows' = '{\"a\": 1}
         {\"a\": null}
         {\"a\": 3}');
         CREATE TABLE out (n BIGINT, PRIMARY KEY (n) NOT ENFORCED) WITH ('connector' = 'rows');
         CREATE TABLE log (n BIGINT) WITH ('connector' = 'rows');
         INSERT INTO log SELECT count(*) FROM t",
        &["log +I 2", "log -U 2", "log +U 3"],
    );
}

#[test]
fn flink_functions_have_their_names() {
    on_bids(
        "CREATE TABLE out (d STRING, m BIGINT, i STRING) WITH ('connector' = 'rows');
         INSERT INTO out SELECT DATE_FORMAT(at, 'yyyy-MM-dd HH:mm'), MOD(price, 7), IF(price > 50, 'high', 'low')
         FROM bid WHERE auction = 3",
        &["out +I 2026-01-01 00:00 4 high"],
    );
}

/// A generator that is the same everywhere (xorshift).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, n: i64) -> i64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as i64
    }
}

/// Windows of a row at `time`, by their definition: every `[start, start + size)` that holds it.
fn windows_of(time: i64, size: i64, slide: i64, offset: i64) -> impl Iterator<Item = i64> {
    // Windows are counted from 1970, times here from the beginning of 2026.
    const BEGINNING: i64 = 1_767_225_600;
    (time - size + 1..=time)
        .filter(move |start| (start + BEGINNING - offset).rem_euclid(slide) == 0)
        .map(move |start| start + size)
}

#[test]
fn random_windows_agree_with_their_definition() {
    for seed in 1..=60 {
        let mut random = Random(seed * 0x9E37_79B9);
        let (size, slide, offset) = (1 + random.below(9), 1 + random.below(12), random.below(5));
        let (delay, mut now) = (random.below(4), 100);
        let (mut rows, mut watermark) = (String::new(), i64::MIN);
        let mut counts: std::collections::BTreeMap<(i64, i64), i64> = std::collections::BTreeMap::new();
        for _ in 0..30 {
            let mut greatest = i64::MIN;
            // The test's source brings two rows at a time, then a watermark.
            for _ in 0..2 {
                now += random.below(3);
                let (time, key) = (now - random.below(6), random.below(3));
                rows += &format!("{{\"k\": {key}, \"at\": \"2026-01-01T00:{:02}:{:02}\"}}\n", time / 60, time % 60);
                greatest = greatest.max(time);
                // Whole seconds here, milliseconds there: a window has fired once the watermark is past its last one.
                for end in windows_of(time, size, slide, offset).filter(|end| watermark < *end * 1000 - 1) {
                    *counts.entry((end, key)).or_default() += 1;
                }
            }
            watermark = watermark.max((greatest - delay) * 1000);
        }
        let sql = format!(
            "CREATE TABLE t (k BIGINT, at TIMESTAMP(3), WATERMARK FOR at AS at - INTERVAL '{delay}' SECOND)
             WITH ('connector' = 'rows', 'rows' = '{rows}');
             CREATE TABLE out (k BIGINT, en TIMESTAMP(3), n BIGINT) WITH ('connector' = 'rows');
             INSERT INTO out SELECT k, window_end, count(*)
             FROM TABLE(HOP(TABLE t, DESCRIPTOR(at), INTERVAL '{slide}' SECOND, INTERVAL '{size}' SECOND, INTERVAL '{offset}' SECOND))
             GROUP BY k, window_start, window_end"
        );
        let expected: Vec<String> = counts
            .iter()
            .map(|((end, key), n)| format!("out +I {key} 00:{:02}:{:02}.000 {n}", end / 60, end % 60))
            .collect();
        eprintln!("seed {seed}: size {size}, slide {slide}, offset {offset}, delay {delay}");
        check(&sql, &expected.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

#[test]
fn state_is_shared_out_by_key_group_and_put_together_again() {
    let rows: String =
        (0..40).map(|k| format!("{{\"k\": {k}, \"at\": \"2026-01-01T00:00:{:02}\"}}\n", k % 30)).collect();
    let tables = format!(
        "CREATE TABLE t (k BIGINT, at TIMESTAMP(3), WATERMARK FOR at AS at) WITH ('connector' = 'rows', 'rows' = '{rows}');
         CREATE TABLE out (k BIGINT, n BIGINT, PRIMARY KEY (k) NOT ENFORCED) WITH ('connector' = 'rows');
         CREATE VIEW w AS SELECT k, window_end, count(*) AS n
         FROM TABLE(HOP(TABLE t, DESCRIPTOR(at), INTERVAL '2' SECOND, INTERVAL '6' SECOND)) GROUP BY k, window_start, window_end;"
    );
    check_rescaled(&format!("{tables} INSERT INTO out SELECT k, n FROM w"), 3);
    check_rescaled(&format!("{tables} INSERT INTO out SELECT k, count(*) FROM t GROUP BY k"), 4);
}

#[test]
fn any_aggregate_of_datafusion_updates_too() {
    check_in_order(
        &format!(
            "{BIDS} CREATE TABLE out (d BIGINT, m DOUBLE) WITH ('connector' = 'rows');
             INSERT INTO out SELECT count(DISTINCT auction), median(price) FROM bid"
        ),
        &[
            "out +I 2 15.0",
            "out -U 2 15.0",
            "out +U 2 20.0",
            "out -U 2 20.0",
            "out +U 3 30.0",
            "out -U 3 30.0",
            "out +U 3 50.0",
        ],
    );
}

#[test]
fn rows_of_the_same_window_are_joined() {
    on_bids(
        "CREATE TABLE out (a BIGINT, l BIGINT, r BIGINT) WITH ('connector' = 'rows');
         INSERT INTO out SELECT l.auction, l.price, r.price
         FROM TABLE(TUMBLE(TABLE bid, DESCRIPTOR(at), INTERVAL '10' SECOND)) l
         JOIN TABLE(TUMBLE(TABLE bid, DESCRIPTOR(at), INTERVAL '10' SECOND)) r
         ON l.window_start = r.window_start AND l.window_end = r.window_end AND l.auction = r.auction
         WHERE l.price < r.price",
        &["out +I 1 10 30", "out +I 2 20 50"],
    );
}

#[test]
fn substrings_are_those_of_sql() {
    on_bids(
        "CREATE TABLE out (s STRING) WITH ('connector' = 'rows');
         INSERT INTO out SELECT SUBSTRING(who, 1, 2) FROM bid WHERE price = 70",
        &["out +I la"],
    );
}
