//! Queries of Nexmark, as they stand in Flink's dialect: they plan unchanged, and read no more than they need.

use expect_test::{Expect, expect};

use super::harness::{check, planned};

const TABLES: &str = r#"
CREATE TABLE nexmark (event_type INT,
 person ROW<id BIGINT, name STRING, emailAddress STRING, creditCard STRING, city STRING, state STRING, `dateTime` TIMESTAMP(3), extra STRING>,
 auction ROW<id BIGINT, itemName STRING, description STRING, initialBid BIGINT, reserve BIGINT, `dateTime` TIMESTAMP(3), expires TIMESTAMP(3), seller BIGINT, category BIGINT, extra STRING>,
 bid ROW<auction BIGINT, bidder BIGINT, price BIGINT, channel STRING, url STRING, `dateTime` TIMESTAMP(3), extra STRING>,
 `dateTime` AS CASE WHEN event_type = 0 THEN person.`dateTime` WHEN event_type = 1 THEN auction.`dateTime` ELSE bid.`dateTime` END,
 WATERMARK FOR `dateTime` AS `dateTime` - INTERVAL '4' SECOND)
 WITH ('connector' = 'rows', 'rows' = 'ROWS');
CREATE VIEW person AS SELECT person.id, person.name, person.emailAddress, person.creditCard, person.city, person.state, `dateTime`, person.extra FROM nexmark WHERE event_type = 0;
CREATE VIEW auction AS SELECT auction.id, auction.itemName, auction.description, auction.initialBid, auction.reserve, `dateTime`, auction.expires, auction.seller, auction.category, auction.extra FROM nexmark WHERE event_type = 1;
CREATE VIEW bid AS SELECT bid.auction, bid.bidder, bid.price, bid.channel, bid.url, `dateTime`, bid.extra FROM nexmark WHERE event_type = 2;
"#;

const Q5: &str = "
CREATE TABLE snk (auction BIGINT, num BIGINT) WITH ('connector' = 'rows');
INSERT INTO snk
SELECT AuctionBids.auction, AuctionBids.num
FROM (SELECT auction, count(*) AS num, window_start AS starttime, window_end AS endtime
      FROM TABLE(HOP(TABLE bid, DESCRIPTOR(`dateTime`), INTERVAL '2' SECOND, INTERVAL '10' SECOND))
      GROUP BY auction, window_start, window_end) AS AuctionBids
JOIN (SELECT max(CountBids.num) AS maxn, CountBids.starttime, CountBids.endtime
      FROM (SELECT count(*) AS num, window_start AS starttime, window_end AS endtime
            FROM TABLE(HOP(TABLE bid, DESCRIPTOR(`dateTime`), INTERVAL '2' SECOND, INTERVAL '10' SECOND))
            GROUP BY auction, window_start, window_end) AS CountBids
      GROUP BY CountBids.starttime, CountBids.endtime) AS MaxBids
ON AuctionBids.starttime = MaxBids.starttime AND AuctionBids.endtime = MaxBids.endtime AND AuctionBids.num >= MaxBids.maxn";

fn check_plan(query: &str, expected: Expect) {
    let graph = planned(&format!("{TABLES}{query}")).unwrap_or_else(|e| panic!("{e}"));
    expected.assert_eq(&graph.to_string());
}

#[test]
fn q0_reads_the_fields_of_bids_only() {
    check_plan(
        "CREATE TABLE snk (auction BIGINT, bidder BIGINT, price BIGINT, `dateTime` TIMESTAMP(3), extra STRING) WITH ('connector' = 'rows');
         INSERT INTO snk SELECT auction, bidder, price, `dateTime`, extra FROM bid",
        expect![[r#"
            task 0
              rows source nexmark(event_type, person<dateTime>, auction<dateTime>, bid<auction, bidder, price, dateTime, extra>)  [source:nexmark]
              filter nexmark.event_type = 2, project nexmark.bid.auction, nexmark.bid.bidder, nexmark.bid.price, nexmark.dateTime, nexmark.bid.extra  [snk/project-1]
              rows sink snk(auction, bidder, price, dateTime, extra)  [sink:snk]
        "#]],
    );
}

#[test]
fn q5_counts_bids_once() {
    check_plan(
        Q5,
        expect![[r#"
            task 0
              rows source nexmark(event_type, person<dateTime>, auction<dateTime>, bid<auction, dateTime>), watermark for dateTime as nexmark.dateTime - INTERVAL 4 s  [source:nexmark]
              filter nexmark.event_type = 2, project nexmark.bid.auction, nexmark.dateTime  [snk/project-1]
              local aggregate HOP(2 s, 10 s) by [auction]: count(*)  [snk/local-aggregate-1]
            task 1
              <- task 0 (hash of columns [1]) into input 0
              window aggregate HOP(2 s, 10 s) by [auction]: count(*)  [snk/window-aggregate-1]
            task 2
              <- task 1 (forward) into input 0
              project auction, count(*) AS num, window_start AS starttime, window_end AS endtime  [snk/project-2]
            task 3
              <- task 1 (forward) into input 0
              project count(*) AS num, window_start AS starttime, window_end AS endtime  [snk/project-3]
              local aggregate of the same window by []: max(CountBids.num)  [snk/local-aggregate-2]
            task 4
              <- task 3 (hash of columns []) into input 0
              window aggregate of the same window by []: max(CountBids.num)  [snk/window-aggregate-2]
              project max(CountBids.num) AS maxn, CountBids.starttime, CountBids.endtime  [snk/project-4]
            task 5
              <- task 2 (hash of columns [2, 3]) into input 0
              <- task 4 (hash of columns [1, 2]) into input 1
              window join on AuctionBids.starttime = MaxBids.starttime, AuctionBids.endtime = MaxBids.endtime, AuctionBids.num >= MaxBids.maxn  [snk/window-join-1]
              project AuctionBids.auction, AuctionBids.num  [snk/project-5]
              rows sink snk(auction, num)  [sink:snk]
        "#]],
    );
}

#[test]
fn q1_q2_and_q17_plan() {
    let plans = |query: &str| {
        planned(&format!("{TABLES}{query}")).unwrap_or_else(|e| panic!("{query}\n{e}"));
    };
    plans(
        "CREATE TABLE snk (auction BIGINT, bidder BIGINT, price DECIMAL(23, 3), `dateTime` TIMESTAMP(3), extra STRING) WITH ('connector' = 'rows');
         INSERT INTO snk SELECT auction, bidder, 0.908 * price AS price, `dateTime`, extra FROM bid",
    );
    plans(
        "CREATE TABLE snk (auction BIGINT, price BIGINT) WITH ('connector' = 'rows');
         INSERT INTO snk SELECT auction, price FROM bid WHERE MOD(auction, 123) = 0",
    );
    plans(
        "CREATE TABLE snk (auction BIGINT, `day` STRING, t1 BIGINT, a1 BIGINT, b1 BIGINT, c1 BIGINT, mn BIGINT, mx BIGINT, av BIGINT, sm BIGINT, PRIMARY KEY (auction, `day`) NOT ENFORCED) WITH ('connector' = 'rows');
         INSERT INTO snk SELECT auction, DATE_FORMAT(`dateTime`, 'yyyy-MM-dd') AS `day`, count(*) AS t1, count(*) filter (where price < 10000) AS a1, count(*) filter (where price >= 10000 and price < 1000000) AS b1, count(*) filter (where price >= 1000000) AS c1, min(price), max(price), avg(price), sum(price) FROM bid GROUP BY auction, DATE_FORMAT(`dateTime`, 'yyyy-MM-dd')",
    );
    plans(
        "CREATE TABLE snk (id BIGINT, name STRING, stime TIMESTAMP(3)) WITH ('connector' = 'rows');
         INSERT INTO snk SELECT P.id, P.name, P.starttime FROM (SELECT id, name, window_start AS starttime, window_end AS endtime FROM TABLE(TUMBLE(TABLE person, DESCRIPTOR(`dateTime`), INTERVAL '10' SECOND)) GROUP BY id, name, window_start, window_end) P JOIN (SELECT seller, window_start AS starttime, window_end AS endtime FROM TABLE(TUMBLE(TABLE auction, DESCRIPTOR(`dateTime`), INTERVAL '10' SECOND)) GROUP BY seller, window_start, window_end) A ON P.id = A.seller AND P.starttime = A.starttime AND P.endtime = A.endtime",
    );
}

const Q18: &str = "
CREATE TABLE snk (auction BIGINT, bidder BIGINT, price BIGINT, channel STRING, url STRING, `dateTime` TIMESTAMP(3), extra STRING, PRIMARY KEY (bidder, auction) NOT ENFORCED) WITH ('connector' = 'rows');
INSERT INTO snk SELECT auction, bidder, price, channel, url, `dateTime`, extra
FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY bidder, auction ORDER BY `dateTime` DESC) AS rank_number FROM bid)
WHERE rank_number <= 1";

#[test]
fn q18_keeps_a_row_for_each_bidder_and_auction() {
    check_plan(
        Q18,
        expect![[r#"
        task 0
          rows source nexmark(event_type, person<dateTime>, auction<dateTime>, bid<auction, bidder, price, channel, url, dateTime, extra>)  [source:nexmark]
          filter nexmark.event_type = 2, project nexmark.bid.auction, nexmark.bid.bidder, nexmark.bid.price, nexmark.bid.channel, nexmark.bid.url, nexmark.dateTime, nexmark.bid.extra  [snk/project-1]
          local deduplicate by [bidder, auction]: last by dateTime  [snk/local-deduplicate-1]
        task 1
          <- task 0 (hash of columns [1, 0]) into input 0
          deduplicate by [bidder, auction]: last by dateTime  [snk/deduplicate-1]
          rows sink snk(auction, bidder, price, channel, url, dateTime, extra) (updates)  [sink:snk]
    "#]],
    );
}

#[test]
fn the_last_bid_of_each_bidder_on_each_auction_is_found() {
    let bid = |auction: u32, bidder: u32, price: u32, second: u32| {
        format!(
            "{{\"event_type\": 2, \"bid\": {{\"auction\": {auction}, \"bidder\": {bidder}, \"price\": {price}, \"channel\": \"c\", \"url\": \"u{price}\", \"dateTime\": \"2026-01-01T00:00:{second:02}\"}}}}\n"
        )
    };
    let person = "{\"event_type\": 0, \"person\": {\"id\": 1, \"dateTime\": \"2026-01-01T00:00:59\"}}\n";
    let rows =
        [bid(1, 7, 100, 5), bid(1, 8, 90, 4), bid(1, 7, 50, 6), person.to_owned(), bid(1, 8, 95, 3), bid(2, 7, 10, 1)];
    check(
        &format!("{TABLES}{Q18}").replace("ROWS", &rows.concat()),
        &[
            "snk +I 1 7 100 c u100 00:00:05.000 null",
            "snk +I 1 8 90 c u90 00:00:04.000 null",
            "snk +U 1 7 50 c u50 00:00:06.000 null",
            "snk +I 2 7 10 c u10 00:00:01.000 null",
        ],
    );
}

#[test]
fn the_hottest_item_of_each_window_is_found() {
    let bid = |auction: u32, second: u32| {
        format!(
            "{{\"event_type\": 2, \"bid\": {{\"auction\": {auction}, \"dateTime\": \"2026-01-01T00:00:{second:02}\"}}}}\n"
        )
    };
    let rows: String =
        [(1, 1), (1, 2), (2, 3), (2, 3), (2, 8), (1, 9), (3, 11), (3, 13)].iter().map(|(a, s)| bid(*a, *s)).collect();
    let sql = format!("{TABLES}{Q5}").replace("ROWS", &rows);
    // Windows end every 2 s, from 2 s to 22 s.
    check(
        &sql,
        &[
            "snk +I 1 1", // until 2 s
            "snk +I 1 2",
            "snk +I 2 2", // 4 s
            "snk +I 1 2",
            "snk +I 2 2", // 6 s
            "snk +I 1 2",
            "snk +I 2 2", // 8 s
            "snk +I 1 3",
            "snk +I 2 3", // 10 s
            "snk +I 2 3", // 12 s
            "snk +I 3 2",
            "snk +I 3 2",
            "snk +I 3 2",
            "snk +I 3 2", // 14 to 20 s
            "snk +I 3 1", // 22 s
        ],
    );
}
