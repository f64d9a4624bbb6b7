//! Jobs over orders in Kafka: their topics and SQL, and what their output must be.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context as _, Result};
use floodmark_testkit::{Kafka, scratch};
use floodmark_tests::{
    chaos::finish,
    compare::{Column, Row, multiset, row_of_json},
    events::{Order, Orders, TABLE_COLUMNS},
    feeder::Feeder,
    job::Job,
    oracle::{Repeats, RunningTotals, TURNOVER, Total, turnover},
};
use serde_json::Value;

use super::kafka;

/// More options of a source that ends at what there is when it starts.
pub const BOUNDED: &str = ", 'scan.bounded.mode' = 'latest-offset'";

/// Of the topic of orders.
pub const PARTITIONS: i32 = 4;
const WINDOW_MS: i64 = 10_000;

/// A job over orders in Kafka, with topics of its own.
pub struct Scenario {
    pub broker: Arc<Kafka>,
    pub folder: tempfile::TempDir,
    name: &'static str,
}

impl Scenario {
    /// With the shared broker.
    pub fn new(name: &'static str) -> Result<Self> {
        Self::on(kafka()?, name)
    }

    /// Creates the topics `<name>-orders`, `-turnover`, `-totals` and `-copies`.
    pub fn on(broker: Arc<Kafka>, name: &'static str) -> Result<Self> {
        for (table, partitions) in [("orders", PARTITIONS as usize), ("turnover", 2), ("totals", 3), ("copies", 2)] {
            broker.create_topic(&format!("{name}-{table}"), partitions, &[])?;
        }
        Ok(Self { broker, folder: scratch::folder("job-")?, name })
    }

    pub fn topic(&self, table: &str) -> String {
        format!("{}-{table}", self.name)
    }

    /// A `kafka` table's options; `more` begins with a comma.
    pub fn options(&self, connector: &str, table: &str, more: &str) -> String {
        format!(
            "('connector' = '{connector}', 'topic' = '{}', 'properties.bootstrap.servers' = '{}'{more})",
            self.topic(table),
            self.broker.bootstrap()
        )
    }

    pub fn source(&self, more: &str) -> String {
        format!(
            "CREATE TABLE orders ({TABLE_COLUMNS}) WITH {};\n",
            self.options("kafka", "orders", &format!(", 'format' = 'json'{more}"))
        )
    }

    /// Turnover per shop and window, appended.
    pub fn windowed(&self) -> String {
        format!(
            "CREATE TABLE turnover (window_start TIMESTAMP(3), shop STRING, orders BIGINT, amount BIGINT, largest BIGINT)
  WITH {};
INSERT INTO turnover SELECT window_start, shop, count(*), sum(amount), max(amount)
  FROM TABLE(TUMBLE(TABLE orders, DESCRIPTOR(placed_at), INTERVAL '10' SECOND)) GROUP BY window_start, window_end, shop;\n",
            self.options("kafka", "turnover", ", 'format' = 'json'")
        )
    }

    /// A running total per shop, upserted.
    pub fn unwindowed(&self) -> String {
        format!(
            "CREATE TABLE totals (shop STRING, orders BIGINT, amount BIGINT, largest BIGINT, PRIMARY KEY (shop) NOT ENFORCED)
  WITH {};
INSERT INTO totals SELECT shop, count(*), sum(amount), max(amount) FROM orders GROUP BY shop;\n",
            self.options("upsert-kafka", "totals", ", 'key.format' = 'json', 'value.format' = 'json'")
        )
    }

    /// Every order as it is.
    pub fn copies(&self) -> String {
        format!(
            "CREATE TABLE copies (shop STRING, amount BIGINT, placed_at TIMESTAMP(3)) WITH {};
INSERT INTO copies SELECT shop, amount, placed_at FROM orders;\n",
            self.options("kafka", "copies", ", 'format' = 'json'")
        )
    }

    pub fn job(&self, sql: String) -> Job {
        Job::new(self.folder.path(), self.name, sql)
    }

    /// The windowed and the upsert aggregate over one source, both in one job.
    pub fn both(&self, bounded: bool) -> String {
        let more = if bounded { BOUNDED } else { "" };
        self.source(more) + &self.windowed() + &self.unwindowed()
    }

    pub fn feeder(&self, orders: Orders, count: u64, per_second: u64) -> Result<Feeder> {
        Feeder::start(&self.broker.bootstrap(), &self.topic("orders"), PARTITIONS, orders, count, per_second)
    }

    /// Reads to the end of the input, and checks both outputs.
    pub fn finish_and_check(&self, job: &mut Job, orders: Orders, count: u64) -> Result<()> {
        job.sql = self.both(true);
        let ended = finish(job)?;
        let summary = ended.ok("finished")?;
        assert_eq!((summary.late, summary.bad), (0, 0));
        self.check_both(orders, count)
    }

    /// Checks both outputs of a job that has read all.
    pub fn check_both(&self, orders: Orders, count: u64) -> Result<()> {
        self.check_turnover(orders, count)?;
        self.check_totals(orders.first(count), Repeats::Refused)?;
        // Other tests use the same broker.
        let own = format!("floodmark.default.{}.", self.name);
        let open: Vec<_> = self.broker.open_transactions()?.into_iter().filter(|id| id.starts_with(&own)).collect();
        assert_eq!(open, Vec::<String>::new(), "transactions are left open");
        Ok(())
    }

    pub fn check_turnover(&self, orders: Orders, count: u64) -> Result<()> {
        let records = self.broker.read_committed(&self.topic("turnover"))?;
        let rows = records.iter().map(|r| row_of_json(r.value.as_deref().unwrap_or_default(), &TURNOVER));
        let rows = multiset(turnover(orders.first(count), WINDOW_MS)?, rows.collect::<Result<Vec<_>>>()?)?;
        println!("{}: {rows} windowed rows are exact", self.name);
        Ok(())
    }

    /// Records of a key are in one partition, so their offsets give their order.
    pub fn check_totals(&self, orders: impl Iterator<Item = Order>, repeats: Repeats) -> Result<()> {
        let mut records = self.broker.read_committed(&self.topic("totals"))?;
        records.sort_by_key(|r| (r.partition, r.offset));
        let mut homes: BTreeMap<String, i32> = BTreeMap::new();
        let mut totals = Vec::new();
        for record in &records {
            let value: Value = serde_json::from_slice(record.value.as_deref().context("a tombstone")?)?;
            let key: Value = serde_json::from_slice(record.key.as_deref().context("no key")?)?;
            let number = |column: &str| value[column].as_i64().with_context(|| format!("no {column} in {value}"));
            let shop = value["shop"].as_str().context("no shop")?.to_owned();
            assert_eq!(key["shop"].as_str(), Some(shop.as_str()), "key and value differ");
            let home = *homes.entry(shop.clone()).or_insert(record.partition);
            assert_eq!(home, record.partition, "{shop} is in two partitions");
            let orders = usize::try_from(number("orders")?)?;
            totals.push(Total { shop, orders, amount: number("amount")?, largest: number("largest")? });
        }
        let values = RunningTotals::new(orders).check(totals, repeats)?;
        println!("{}: {values} values of running totals are right", self.name);
        Ok(())
    }

    pub fn copied(&self) -> Result<Vec<Row>> {
        let columns = [Column::Plain("shop"), Column::Plain("amount"), Column::Time("placed_at")];
        let records = self.broker.read_committed(&self.topic("copies"))?;
        records.iter().map(|r| row_of_json(r.value.as_deref().unwrap_or_default(), &columns)).collect()
    }
}
