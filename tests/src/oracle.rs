//! Answers computed without the engine: SQL in SQLite over the same input, and plain Rust where a sequence is judged.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use floodmark_connectors::nexmark::{Event, Generator};
use rusqlite::{Connection, params_from_iter, types::ValueRef};

use crate::{
    compare::{Column, Row},
    events::Order,
};

/// A database in memory that answers in rows of text.
pub struct Database(Connection);

impl Database {
    /// An empty one, after `schema` has been executed.
    ///
    /// # Errors
    /// SQLite's.
    pub fn new(schema: &str) -> Result<Self> {
        let database = Connection::open_in_memory().context("open SQLite")?;
        database.execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = MEMORY;")?;
        database.execute_batch(schema)?;
        Ok(Self(database))
    }

    /// Inserts rows of integers; `sql` is an `INSERT` with a parameter for each.
    ///
    /// # Errors
    /// SQLite's.
    pub fn load<const N: usize>(&mut self, sql: &str, rows: impl Iterator<Item = [i64; N]>) -> Result<u64> {
        let transaction = self.0.transaction()?;
        let mut loaded = 0;
        {
            let mut insert = transaction.prepare(sql)?;
            for row in rows {
                insert.execute(params_from_iter(row))?;
                loaded += 1;
            }
        }
        transaction.commit()?;
        Ok(loaded)
    }

    /// Executes statements.
    ///
    /// # Errors
    /// SQLite's.
    pub fn execute(&self, sql: &str) -> Result<()> {
        Ok(self.0.execute_batch(sql)?)
    }

    /// The rows of a query.
    ///
    /// # Errors
    /// SQLite's.
    pub fn rows(&self, sql: &str) -> Result<Vec<Row>> {
        let mut query = self.0.prepare(sql)?;
        let columns = query.column_count();
        let field = |value: ValueRef<'_>| match value {
            ValueRef::Null => "null".to_owned(),
            ValueRef::Integer(n) => n.to_string(),
            ValueRef::Real(n) => n.to_string(),
            ValueRef::Text(bytes) | ValueRef::Blob(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        };
        let rows = query.query_map([], |row| (0..columns).map(|i| row.get_ref(i).map(field)).collect())?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

/// Nexmark's query 5 over the first `events` events: rows of auction, bids, end of the window (milliseconds), for windows of
/// 10 seconds every 2 seconds. Also the number of bids.
///
/// # Errors
/// SQLite's.
pub fn hot_items(generator: Generator, events: u64) -> Result<(u64, Vec<Row>)> {
    let mut database = Database::new("CREATE TABLE bid (auction INTEGER, time INTEGER)")?;
    let bids = (0..events).filter(|n| generator.kind(*n) == Event::Bid);
    let bids = bids.filter_map(|n| Some([generator.integer(n, "auction")?, generator.timestamp(n, "dateTime")?]));
    let bids = database.load("INSERT INTO bid VALUES (?, ?)", bids)?;
    // A window is 5 slices of 2 seconds; it is named by its first.
    database.execute(
        "CREATE TABLE slice AS SELECT auction, time / 2000 AS slice, count(*) AS num FROM bid GROUP BY 1, 2;
         CREATE TABLE item AS
           SELECT auction, slice - i AS first, sum(num) AS num
           FROM slice, (SELECT 0 AS i UNION ALL SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3 UNION ALL SELECT 4)
           GROUP BY 1, 2;
         CREATE TABLE best AS SELECT first, max(num) AS num FROM item GROUP BY 1;",
    )?;
    let hot = "SELECT item.auction, item.num, item.first * 2000 + 10000
               FROM item JOIN best ON item.first = best.first WHERE item.num >= best.num";
    Ok((bids, database.rows(hot)?))
}

/// Nexmark bids in tumbling windows of `window_ms`: rows of end of the window (milliseconds), auction, bids, highest price.
///
/// # Errors
/// SQLite's.
pub fn bids_per_auction(generator: Generator, events: u64, window_ms: i64) -> Result<Vec<Row>> {
    let mut database = Database::new("CREATE TABLE bid (auction INTEGER, price INTEGER, time INTEGER)")?;
    let bid = |n| {
        Some([
            generator.integer(n, "auction")?,
            generator.integer(n, "price")?,
            generator.timestamp(n, "dateTime").filter(|_| generator.kind(n) == Event::Bid)?,
        ])
    };
    database.load("INSERT INTO bid VALUES (?, ?, ?)", (0..events).filter_map(bid))?;
    database.rows(&format!(
        "SELECT (time / {window_ms} + 1) * {window_ms}, auction, count(*), max(price) FROM bid GROUP BY 1, 2"
    ))
}

/// The columns of a table of windowed turnover, in the order in which [`turnover`] answers them.
pub const TURNOVER: [Column; 5] = [
    Column::Time("window_start"),
    Column::Plain("shop"),
    Column::Plain("orders"),
    Column::Plain("amount"),
    Column::Plain("largest"),
];

/// Orders in tumbling windows of `window_ms`: rows of start of the window (milliseconds), shop, orders, turnover, largest.
///
/// # Errors
/// SQLite's.
pub fn turnover(orders: impl Iterator<Item = Order>, window_ms: i64) -> Result<Vec<Row>> {
    let mut database = Database::new("CREATE TABLE orders (shop INTEGER, amount INTEGER, time INTEGER)")?;
    let rows = orders.map(|o| [o.shop as i64, o.amount, o.time_ms]);
    database.load("INSERT INTO orders VALUES (?, ?, ?)", rows)?;
    database.rows(&format!(
        "SELECT time / {window_ms} * {window_ms}, printf('shop-%04d', shop), count(*), sum(amount), max(amount)
         FROM orders GROUP BY 1, 2"
    ))
}

/// What a running total per shop may show: after its n-th order, exactly one sum and one maximum.
///
/// Because all orders of a shop are in one partition, each value that a job ever writes for a shop can be judged by itself.
pub struct RunningTotals {
    /// By shop: sum and maximum after each order.
    after: BTreeMap<String, Vec<(i64, i64)>>,
}

/// A value of the running total.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Total {
    /// Whose.
    pub shop: String,
    /// Number of orders.
    pub orders: usize,
    /// Their sum.
    pub amount: i64,
    /// The largest.
    pub largest: i64,
}

/// What an upsert stream has to say about the repetition of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeats {
    /// A key's count strictly grows: exactly once.
    Refused,
    /// It may go back, as it does after a crash without exactly-once.
    Allowed,
}

impl RunningTotals {
    /// The totals of these orders.
    #[must_use]
    pub fn new(orders: impl Iterator<Item = Order>) -> Self {
        let mut after: BTreeMap<String, Vec<(i64, i64)>> = BTreeMap::new();
        for order in orders {
            let of_shop = after.entry(order.shop_name()).or_default();
            let (sum, max) = of_shop.last().copied().unwrap_or((0, 0));
            of_shop.push((sum + order.amount, max.max(order.amount)));
        }
        Self { after }
    }

    /// Judges all values that were written, in the order in which each key's were. Answers with their number.
    ///
    /// # Errors
    /// The first value that is wrong, goes back or repeats; the first shop whose last value is not the final one.
    pub fn check(&self, written: impl IntoIterator<Item = Total>, repeats: Repeats) -> Result<u64> {
        let mut last: BTreeMap<String, usize> = BTreeMap::new();
        let mut values = 0;
        for total in written {
            values += 1;
            let of_shop = self.after.get(&total.shop).with_context(|| format!("there is no {}", total.shop))?;
            let right = total.orders.checked_sub(1).and_then(|i| of_shop.get(i));
            if right != Some(&(total.amount, total.largest)) {
                bail!("{total:?} was never true: after {} orders it is {right:?}", total.orders);
            }
            let before = last.insert(total.shop.clone(), total.orders).unwrap_or(0);
            if repeats == Repeats::Refused && total.orders <= before {
                bail!("{}: {} orders were written after {before} orders", total.shop, total.orders);
            }
        }
        for (shop, of_shop) in &self.after {
            let orders = last.get(shop).copied().unwrap_or(0);
            if orders != of_shop.len() {
                bail!("{shop}: the last value has {orders} orders instead of {}", of_shop.len());
            }
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compare::multiset, events::Orders};

    /// Query 5 word for word, without slices: slow, and plainly right.
    #[test]
    fn hot_items_by_slices_are_those_by_definition() {
        let generator = Generator { events_per_second: 100, ..Generator::default() };
        let events = 6_000;
        let mut windows: BTreeMap<i64, BTreeMap<i64, u64>> = BTreeMap::new();
        for n in (0..events).filter(|n| generator.kind(*n) == Event::Bid) {
            let (auction, time) = (generator.integer(n, "auction").unwrap(), generator.time_ms(n));
            let mut start = time / 2_000 * 2_000;
            while start + 10_000 > time {
                *windows.entry(start + 10_000).or_default().entry(auction).or_default() += 1;
                start -= 2_000;
            }
        }
        let expected = windows.iter().flat_map(|(end, items)| {
            let best = *items.values().max().unwrap();
            let hot = items.iter().filter(move |(_, num)| **num >= best);
            hot.map(|(auction, num)| vec![auction.to_string(), num.to_string(), end.to_string()])
        });
        let (bids, rows) = hot_items(generator, events).unwrap();
        assert_eq!(bids, events * 46 / 50);
        assert!(multiset(expected, rows).unwrap() > 30);
    }

    #[test]
    fn turnover_sums_to_the_whole() {
        let orders = Orders::default();
        let rows = turnover(orders.first(10_000), 1_000).unwrap();
        let sum = |i: usize| rows.iter().map(|r| r[i].parse::<i64>().unwrap()).sum::<i64>();
        assert_eq!(sum(2), 10_000);
        assert_eq!(sum(3), orders.first(10_000).map(|o| o.amount).sum::<i64>());
        assert!(rows.iter().all(|r| r[0].parse::<i64>().unwrap() % 1_000 == 0 && r[1].starts_with("shop-")));
    }

    fn all_values(orders: Orders, count: u64) -> Vec<Total> {
        let mut now: BTreeMap<u64, Total> = BTreeMap::new();
        let value = |o: Order| {
            let start = || Total { shop: o.shop_name(), orders: 0, amount: 0, largest: 0 };
            let total = now.entry(o.shop).or_insert_with(start);
            total.orders += 1;
            total.amount += o.amount;
            total.largest = total.largest.max(o.amount);
            total.clone()
        };
        orders.first(count).map(value).collect()
    }

    #[test]
    fn a_running_total_is_right_only_if_it_grows_and_ends_well() {
        let orders = Orders { shops: 5, ..Orders::default() };
        let totals = RunningTotals::new(orders.first(100));
        let written = all_values(orders, 100);
        assert_eq!(totals.check(written.clone(), Repeats::Refused).unwrap(), 100);
        let error = |written: Vec<Total>| totals.check(written, Repeats::Refused).unwrap_err().to_string();
        let mut repeated = written.clone();
        repeated.insert(50, written[49].clone());
        assert!(error(repeated.clone()).contains("were written after"));
        assert_eq!(totals.check(repeated, Repeats::Allowed).unwrap(), 101);
        let mut wrong = written.clone();
        wrong[30].amount += 1;
        assert!(error(wrong).contains("was never true"));
        assert!(error(written[..99].to_vec()).contains("the last value has"));
    }
}
