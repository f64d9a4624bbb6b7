//! How queries become graphs.

use expect_test::{Expect, expect};

use super::harness::planned;

fn check(sql: &str, expected: Expect) {
    expected.assert_eq(&planned(sql).unwrap_or_else(|e| panic!("{e}")).to_string());
}

const T: &str =
    "CREATE TABLE t (a BIGINT, b STRING, at TIMESTAMP(3), WATERMARK FOR at AS at) WITH ('connector' = 'rows');";

#[test]
fn stateless_work_is_one_task() {
    check(
        &format!(
            "{T} CREATE TABLE o (b STRING) WITH ('connector' = 'rows'); INSERT INTO o SELECT b FROM t WHERE a > 1"
        ),
        expect![[r#"
            task 0
              rows source t(a, b)  [source:t]
              filter t.a > 1, project t.b  [o/project-1]
              rows sink o(b)  [sink:o]
        "#]],
    );
}

#[test]
fn a_group_by_is_combined_before_the_exchange() {
    check(
        &format!(
            "{T} CREATE TABLE o (b STRING, n BIGINT, PRIMARY KEY (b) NOT ENFORCED) WITH ('connector' = 'rows');
             INSERT INTO o SELECT b, count(*) FROM t GROUP BY b"
        ),
        expect![[r#"
            task 0
              rows source t(b)  [source:t]
              local aggregate by [b]: count(*)  [o/local-aggregate-1]
            task 1
              <- task 0 (hash of columns [0]) into input 0
              group aggregate by [b]: count(*)  [o/group-aggregate-1]
              project t.b, count(*) AS n  [o/project-1]
              rows sink o(b, n) (updates)  [sink:o]
        "#]],
    );
}

#[test]
fn uids_do_not_depend_on_other_inserts() {
    let one = format!(
        "{T} CREATE TABLE o (b STRING, n BIGINT, PRIMARY KEY (b) NOT ENFORCED) WITH ('connector' = 'rows');
         CREATE TABLE p (n BIGINT) WITH ('connector' = 'rows');
         INSERT INTO o SELECT b, count(*) FROM t GROUP BY b;"
    );
    let uids = |sql: &str| -> Vec<String> { planned(sql).unwrap().nodes().map(|(_, n)| n.uid.0.clone()).collect() };
    let two = uids(&format!("{one} INSERT INTO p SELECT sum(a) FROM t WHERE a > 2"));
    for uid in uids(&one) {
        assert!(two.contains(&uid), "{uid} is not in {two:?}");
    }
    let mut distinct = two.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), two.len());
}
