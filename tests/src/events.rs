//! Input of the recovery tests: orders of shops, each a pure function of a seed and its number.
//!
//! A shop's orders all go to one partition, in the order of their numbers; their times go forward with a jitter that is
//! shorter than the watermark's delay in [`TABLE_COLUMNS`], so no order is ever late.

use anyhow::{Context as _, Result};
use chrono::{DateTime, NaiveDateTime};

/// Columns of a table that reads orders, and its watermark.
pub const TABLE_COLUMNS: &str = "shop STRING, amount BIGINT, placed_at TIMESTAMP(3),
  WATERMARK FOR placed_at AS placed_at - INTERVAL '4' SECOND";
/// Columns of a `nexmark` table, and its watermark.
pub const NEXMARK_COLUMNS: &str = "event_type INT,
  person ROW<id BIGINT, name STRING, emailAddress STRING, creditCard STRING, city STRING, state STRING,
    `dateTime` TIMESTAMP(3), extra STRING>,
  auction ROW<id BIGINT, itemName STRING, description STRING, initialBid BIGINT, reserve BIGINT,
    `dateTime` TIMESTAMP(3), expires TIMESTAMP(3), seller BIGINT, category BIGINT, extra STRING>,
  bid ROW<auction BIGINT, bidder BIGINT, price BIGINT, channel STRING, url STRING, `dateTime` TIMESTAMP(3), extra STRING>,
  `dateTime` AS CASE WHEN event_type = 0 THEN person.`dateTime`
                     WHEN event_type = 1 THEN auction.`dateTime` ELSE bid.`dateTime` END,
  WATERMARK FOR `dateTime` AS `dateTime` - INTERVAL '4' SECOND";
/// Nexmark's query 5 behind its `SELECT` list: columns `auction`, `num`, `starttime` and `endtime` of `AuctionBids`.
pub const HOT_ITEMS: &str = "FROM (
  SELECT auction, count(*) AS num, window_start AS starttime, window_end AS endtime
  FROM TABLE(HOP(TABLE bid, DESCRIPTOR(`dateTime`), INTERVAL '2' SECOND, INTERVAL '10' SECOND))
  GROUP BY auction, window_start, window_end
) AS AuctionBids
JOIN (
  SELECT max(CountBids.num) AS maxn, CountBids.starttime, CountBids.endtime
  FROM (
    SELECT count(*) AS num, window_start AS starttime, window_end AS endtime
    FROM TABLE(HOP(TABLE bid, DESCRIPTOR(`dateTime`), INTERVAL '2' SECOND, INTERVAL '10' SECOND))
    GROUP BY auction, window_start, window_end
  ) AS CountBids
  GROUP BY CountBids.starttime, CountBids.endtime
) AS MaxBids
ON AuctionBids.starttime = MaxBids.starttime AND AuctionBids.endtime = MaxBids.endtime
  AND AuctionBids.num >= MaxBids.maxn";
/// How far an order's time may lie behind its number's, milliseconds. Less than the watermark's delay.
const JITTER_MS: u64 = 2_000;
/// 2026-01-01 00:00:00 UTC.
const START_MS: i64 = 1_767_225_600_000;
const AMOUNT_MAX: u64 = 10_000;

/// Makes orders.
#[derive(Clone, Copy, Debug)]
pub struct Orders {
    /// Equal seeds make equal orders.
    pub seed: u64,
    /// Number of shops.
    pub shops: u64,
    /// Orders per second of event time.
    pub per_second: u64,
}

/// One order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Number of the shop.
    pub shop: u64,
    /// Turnover, from 1.
    pub amount: i64,
    /// Event time, milliseconds since the Unix epoch.
    pub time_ms: i64,
}

impl Default for Orders {
    fn default() -> Self {
        Self { seed: 7, shops: 300, per_second: 1_000 }
    }
}

impl Orders {
    /// Order `n`.
    #[must_use]
    pub fn order(&self, n: u64) -> Order {
        let mut draw = Draw::new(self.seed ^ n.wrapping_mul(0x2545_F491_4F6C_DD1D));
        // The square favours the first shops: keys are as uneven as in life.
        let (a, b) = (draw.below(self.shops), draw.below(self.shops));
        let time_ms = START_MS + (n * 1_000 / self.per_second) as i64 + JITTER_MS as i64 - draw.below(JITTER_MS) as i64;
        Order { shop: a * b / self.shops.max(1), amount: 1 + draw.below(AMOUNT_MAX) as i64, time_ms }
    }

    /// The first `count` orders.
    pub fn first(self, count: u64) -> impl Iterator<Item = Order> {
        (0..count).map(move |n| self.order(n))
    }
}

impl Order {
    /// The shop's name.
    #[must_use]
    pub fn shop_name(&self) -> String {
        format!("shop-{:04}", self.shop)
    }

    /// The partition, of `partitions`, that holds all orders of this shop.
    #[must_use]
    pub fn partition(&self, partitions: i32) -> i32 {
        (self.shop % partitions.unsigned_abs() as u64) as i32
    }

    /// The order as one JSON object.
    #[must_use]
    pub fn json(&self) -> String {
        format!(
            "{{\"shop\":\"{}\",\"amount\":{},\"placed_at\":\"{}\"}}",
            self.shop_name(),
            self.amount,
            timestamp(self.time_ms)
        )
    }
}

/// A timestamp as records write it: `2026-01-31 23:59:59.123`.
#[must_use]
pub fn timestamp(ms: i64) -> String {
    DateTime::from_timestamp_millis(ms)
        .map_or_else(|| format!("<{ms} ms is no date>"), |t| t.naive_utc().format("%Y-%m-%d %H:%M:%S%.3f").to_string())
}

/// Reads a timestamp that a sink wrote; milliseconds since the Unix epoch.
///
/// # Errors
/// When it is none.
pub fn parse_timestamp(text: &str) -> Result<i64> {
    let plain = text.trim_end_matches('Z').replace('T', " ");
    let time = NaiveDateTime::parse_from_str(&plain, "%Y-%m-%d %H:%M:%S%.f");
    Ok(time.with_context(|| format!("'{text}' is not a timestamp"))?.and_utc().timestamp_millis())
}

/// A small source of numbers that are the same for the same seed.
#[derive(Clone, Copy, Debug)]
pub struct Draw(u64);

impl Draw {
    /// Starts from a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, from 0 to `n - 1`; 0 if `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((u128::from(z ^ (z >> 31)) * u128::from(n)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_orders() {
        let orders = Orders::default();
        let some: Vec<_> = orders.first(1_000).collect();
        assert_eq!(some, orders.first(1_000).collect::<Vec<_>>());
        assert_ne!(some, Orders { seed: 8, ..orders }.first(1_000).collect::<Vec<_>>());
        assert!(some.iter().all(|o| o.shop < orders.shops && o.amount >= 1));
    }

    #[test]
    fn no_order_is_older_than_the_watermark_of_those_before_it() {
        let mut greatest = 0;
        for order in Orders::default().first(100_000) {
            assert!(order.time_ms > greatest - 4_000);
            greatest = greatest.max(order.time_ms);
        }
    }

    #[test]
    fn a_timestamp_is_read_as_it_was_written() {
        let ms = START_MS + 86_400_000 * 400 + 12_345_678;
        assert_eq!(parse_timestamp(&timestamp(ms)).unwrap(), ms);
        assert_eq!(parse_timestamp("2026-01-01 00:00:10").unwrap(), START_MS + 10_000);
        assert_eq!(parse_timestamp("2026-01-01T00:00:10.5Z").unwrap(), START_MS + 10_500);
        assert!(parse_timestamp("yesterday").is_err());
    }
}
