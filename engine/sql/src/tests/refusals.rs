//! What is refused: each mistake and each construct that is not supported, with its place.

use super::harness::planned;

const TABLES: &str = "CREATE TABLE t (a BIGINT, b STRING, r ROW<x INT>, at TIMESTAMP(3), WATERMARK FOR at AS at) WITH ('connector' = 'rows');
CREATE TABLE o (a BIGINT, b STRING) WITH ('connector' = 'rows');
";

/// `rest` begins on line 3.
#[track_caller]
fn check(rest: &str, expected: &str) {
    let error = match planned(&format!("{TABLES}{rest}")) {
        Ok(graph) => panic!("planned:\n{graph}"),
        Err(error) => error,
    };
    let text = error.to_string();
    assert_eq!(text.lines().next().unwrap(), expected, "{text}");
}

#[test]
fn mistakes_are_told_with_their_place_and_the_nearest_name() {
    check(
        "INSERT INTO o SELEC a FROM t",
        "line 3, column 15: syntax error: expected SELECT, VALUES, or a subquery in the query body, found SELEC",
    );
    check("INSERT INTO o SELECT a, b FRM t", "line 3, column 31: syntax error: expected ; or the end, found t");
    check("INSERT INTO o SELECT a, bb FROM t", "line 3, column 25: unknown column 'bb'; did you mean 'b'?");
    check("INSERT INTO o SELECT a, r.xy FROM t", "line 3, column 27: unknown field 'xy'; did you mean 'x'?");
    check("INSERT INTO o SELECT a, b FROM tt", "line 3, column 32: unknown table 'tt'; did you mean 't'?");
    check("INSERT INTO oo SELECT a, b FROM t", "line 3, column 13: unknown table 'oo'; did you mean 'o'?");
    check(
        "INSERT INTO o SELECT a, uper(b) FROM t",
        "line 3, column 25: unknown function 'uper'; did you mean 'upper'?",
    );
    check("INSERT INTO o SELECT a FROM t", "line 3, column 1: the query has 1 column, table 'o' takes 2 (a, b)");
    check(
        "INSERT INTO o SELECT b, b FROM t",
        "line 3, column 1: column 'a' of table 'o' is BIGINT, the query gives STRING; write CAST(… AS BIGINT)",
    );
    check(
        "INSERT INTO o (a, c) SELECT a, b FROM t",
        "line 3, column 19: unknown column 'c' in table 'o'; there is: a, b",
    );
    check(
        "CREATE TABLE t (a INT) WITH ('connector' = 'rows')",
        "line 3, column 1: there is a table or view 't' already",
    );
    check(
        "CREATE TABLE u (a INT) WITH ('connector' = 'row')",
        "line 3, column 30: unknown connector 'row'; did you mean 'rows'?",
    );
    check(
        "CREATE TABLE u (a INT) WITH ('x' = 'y')",
        "line 3, column 1: table 'u' has no option 'connector'; there is: rows",
    );
    check(
        "CREATE TABLE u (a INTT) WITH ('connector' = 'rows')",
        "line 3, column 19: unknown type INTT; did you mean 'INT'?",
    );
    check("", "nothing is inserted anywhere: the job would do nothing; write INSERT INTO … SELECT …");
}

#[test]
fn the_line_at_fault_is_quoted() {
    let error = planned(&format!("{TABLES}INSERT INTO o\n  SELECT a, bb FROM t")).unwrap_err().to_string();
    assert_eq!(
        error,
        "line 4, column 13: unknown column 'bb'; did you mean 'b'?\n  4 |   SELECT a, bb FROM t\n    |             ^"
    );
}

#[test]
fn what_a_stream_cannot_do_is_refused_by_name() {
    let select = |rest: &str, expected: &str| check(&format!("INSERT INTO o SELECT {rest}"), expected);
    select("a, b FROM t ORDER BY a", "line 3, column 43: ORDER BY is not supported; a stream has no end to sort by");
    select("a, b FROM t LIMIT 3", "line 3, column 40: LIMIT or OFFSET is not supported; a stream has no first rows");
    select(
        "sum(a) OVER (ORDER BY a), b FROM t",
        "line 3, column 22: OVER is not supported; use TUMBLE or HOP windows with GROUP BY",
    );
    select(
        "t.a, u.b FROM t LEFT JOIN t AS u ON t.a = u.a",
        "line 3, column 48: LEFT JOIN is not supported; inner joins of windowed inputs are",
    );
    select(
        "a, b FROM t WHERE a IN (SELECT a FROM t)",
        "line 3, column 40: IN (subquery) is not supported; join instead",
    );
    select("a, b FROM t WHERE EXISTS (SELECT a FROM t)", "line 3, column 48: EXISTS is not supported; join instead");
    select(
        "a, (SELECT max(b) FROM t) FROM t",
        "line 3, column 26: a subquery in an expression is not supported; join instead",
    );
    select(
        "a, b FROM t UNION SELECT a, b FROM t",
        "line 3, column 40: UNION without ALL is not supported; write UNION ALL",
    );
    select("a, b FROM t INTERSECT SELECT a, b FROM t", "line 3, column 44: INTERSECT is not supported");
    select(
        "a, max(b) FROM t GROUP BY ROLLUP (a)",
        "line 3, column 56: ROLLUP is not supported; write one INSERT per grouping",
    );
    check(
        "DELETE FROM t",
        "line 3, column 1: DELETE is not supported; a job has CREATE TABLE, CREATE VIEW and INSERT INTO",
    );
    check("SET 'a' = 'b'", "line 3, column 1: SET is not supported; options of a job stand in its manifest");
    check(
        "SELECT a FROM t",
        "line 3, column 1: a query by itself has nowhere to put its result; write INSERT INTO … SELECT …; the connector 'print' shows rows",
    );
    select(
        "a, CAST(now() AS STRING) FROM t",
        "line 3, column 30: NOW gives another value each time it is called; after a crash the job would compute other rows than before; use a column of the data",
    );
    select(
        "a, b FROM TABLE(SESSION(TABLE t, DESCRIPTOR(at), INTERVAL '1' SECOND))",
        "line 3, column 32: SESSION windows are not supported yet; TUMBLE and HOP are",
    );
    select(
        "t.a, u.b FROM t JOIN t AS u ON t.a = u.a",
        "line 3, column 43: a JOIN of streams that are not joined on their windows is not supported; join two windowed queries on the equality of their window_start and window_end",
    );
}

#[test]
fn windows_need_a_watermark_and_a_size() {
    let windowed = |call: &str, expected: &str| {
        check(
            &format!("INSERT INTO o SELECT count(*), b FROM TABLE({call}) GROUP BY b, window_start, window_end"),
            expected,
        );
    };
    windowed(
        "TUMBLE(TABLE t, DESCRIPTOR(att), INTERVAL '1' SECOND)",
        "line 3, column 72: unknown column 'att' in 't'; did you mean 'at'?",
    );
    windowed(
        "TUMBLE(TABLE tt, DESCRIPTOR(at), INTERVAL '1' SECOND)",
        "line 3, column 58: unknown table 'tt'; did you mean 't'?",
    );
    windowed(
        "TUMBLE(TABLE t, DESCRIPTOR(at), INTERVAL '0' SECOND)",
        "line 3, column 77: the size of a window must be positive",
    );
    windowed("TUMBLE(TABLE t, DESCRIPTOR(at))", "line 3, column 39: TUMBLE needs a size");
    windowed(
        "TUMBLE(TABLE t, DESCRIPTOR(at), INTERVAL '1' MONTH)",
        "line 3, column 77: an interval of MONTH has no fixed length; use SECOND, MINUTE, HOUR or DAY",
    );
    check(
        "CREATE TABLE u (at TIMESTAMP(3)) WITH ('connector' = 'rows'); INSERT INTO o (a) SELECT count(*) FROM TABLE(TUMBLE(TABLE u, DESCRIPTOR(at), INTERVAL '1' SECOND)) GROUP BY window_end",
        "line 3, column 102: windows need event time: nothing tells how late 'at' can be; declare WATERMARK FOR `at` AS `at` - INTERVAL '5' SECOND in its table, and pass the column on as it is",
    );
}

#[test]
fn updates_need_a_sink_that_is_keyed_alike() {
    let keyed = "CREATE TABLE k (b STRING, n BIGINT, PRIMARY KEY (n) NOT ENFORCED) WITH ('connector' = 'rows');";
    check(
        &format!("{keyed} INSERT INTO k SELECT b, count(*) FROM t GROUP BY b"),
        "line 3, column 96: the query updates rows by (b), but the primary key of table 'k' is (n); declare PRIMARY KEY (b) NOT ENFORCED",
    );
    check(
        "CREATE VIEW v AS SELECT b, count(*) AS n FROM t GROUP BY b;
INSERT INTO o SELECT sum(n), 'x' FROM v",
        "line 4, column 1: an aggregate (GROUP BY or DISTINCT) over a query that updates its rows is not supported; aggregate windows instead, or write the inner result to a table of its own",
    );
    check(
        "CREATE TABLE i (n BIGINT) WITH ('connector' = 'rows', 'insert-only' = 'true'); INSERT INTO i SELECT count(*) FROM t",
        "line 3, column 80: table 'i': updates need a PRIMARY KEY",
    );
}

#[test]
fn what_would_fail_at_the_first_row_is_refused_before() {
    check(
        "INSERT INTO o (b) SELECT DATE_FORMAT(at, 'EEE') FROM t",
        "line 3, column 42: DATE_FORMAT does not know 'EEE' (it knows yyyy yy MM dd HH mm ss SSS)",
    );
    check(
        "INSERT INTO o (b) SELECT DATE_FORMAT(at, b) FROM t",
        "line 3, column 42: the pattern of DATE_FORMAT must be a literal",
    );
    check(
        "INSERT INTO o (a) SELECT avg(DISTINCT a) FROM t",
        "line 3, column 1: Error during planning: AVG(DISTINCT) of integers is not supported; cast the argument to DOUBLE",
    );
    check(
        "CREATE VIEW v AS SELECT a, b AS a FROM t; INSERT INTO o (a) SELECT a FROM v",
        "line 3, column 33: there is a column 'a' already; choose another name for this one",
    );
}
