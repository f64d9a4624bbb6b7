//! What the job's output must be, counted from the events alone, and what is wrong with what was found.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use crate::connectors::{EVENTS, field};

/// From one window to the next.
const STEP_MS: i64 = 5_000;

/// The lines of each table, in the order in which they were written.
pub(crate) type Lines = BTreeMap<String, Vec<String>>;

fn events(delivery: i64) -> impl Iterator<Item = i64> {
    (0..EVENTS).filter(move |n| field(*n, "delivery") == delivery)
}

/// Orders or deliveries by end of window and shop. A window is `size` long, and one begins every [`STEP_MS`].
fn windows(delivery: i64, size: i64) -> BTreeMap<(i64, i64), Vec<i64>> {
    let mut windows: BTreeMap<_, Vec<i64>> = BTreeMap::new();
    for n in events(delivery) {
        let first = (field(n, "at") / STEP_MS + 1) * STEP_MS;
        for end in (first..first + size).step_by(STEP_MS as usize) {
            windows.entry((end, field(n, "shop"))).or_default().push(n);
        }
    }
    windows
}

/// The lines that are only ever added.
fn appended() -> Lines {
    let sums = windows(0, 2 * STEP_MS).into_iter().map(|((end, shop), orders)| {
        let amounts: Vec<i64> = orders.iter().map(|n| field(*n, "amount")).collect();
        let (sum, largest, least) = (amounts.iter().sum::<i64>(), amounts.iter().max(), amounts.iter().min());
        format!("+I {end} {shop} {} {sum} {} {}", amounts.len(), largest.unwrap(), least.unwrap())
    });
    let deliveries = windows(1, STEP_MS);
    let matched = windows(0, STEP_MS).into_iter().flat_map(|((end, shop), orders)| {
        let delivered = deliveries.get(&(end, shop)).cloned().unwrap_or_default();
        let pairs = orders.into_iter().flat_map(move |o| delivered.clone().into_iter().map(move |d| (o, d)));
        pairs.map(move |(o, d)| format!("+I {end} {shop} {o} {d}"))
    });
    Lines::from([("sums".to_owned(), sums.collect()), ("matched".to_owned(), matched.collect())])
}

/// The last line of each shop, in the tables whose rows are replaced.
fn replaced() -> BTreeMap<String, BTreeMap<String, String>> {
    let (mut latest, mut totals) = (BTreeMap::new(), BTreeMap::new());
    for n in events(0) {
        let (shop, at) = (field(n, "shop"), field(n, "at"));
        let newest = latest.entry(shop).or_insert((at, n));
        *newest = (*newest).max((at, n));
        let (count, sum) = totals.entry(shop).or_insert((0_i64, 0_i64));
        (*count, *sum) = (*count + 1, *sum + field(n, "amount"));
    }
    let latest =
        latest.into_iter().map(|(shop, (at, n))| (shop.to_string(), format!("{n} {} {at}", field(n, "amount"))));
    let totals = totals
        .into_iter()
        .map(|(shop, (count, sum))| (shop.to_string(), format!("{count} {sum} {}", sum as f64 / count as f64)));
    BTreeMap::from([("latest".to_owned(), latest.collect()), ("totals".to_owned(), totals.collect())])
}

/// What is wrong with all that was ever written; empty if nothing is.
pub(crate) fn faults(found: &Lines) -> String {
    let mut faults = String::new();
    let tables: BTreeSet<&str> = ["sums", "matched", "latest", "totals"].into();
    if found.keys().map(String::as_str).collect::<BTreeSet<_>>() != tables {
        let _ = write!(faults, "tables {:?}; ", found.keys());
    }
    for (table, mut wanted) in appended() {
        let mut lines = found.get(&table).cloned().unwrap_or_default();
        wanted.sort();
        lines.sort();
        if lines != wanted {
            let too_few: Vec<_> = wanted.iter().filter(|l| !lines.contains(l)).collect();
            let too_many: Vec<_> = lines.iter().filter(|l| !wanted.contains(l)).collect();
            let (has, needs) = (lines.len(), wanted.len());
            let _ = write!(faults, "{table}: {has} lines instead of {needs}, without {too_few:?}, with {too_many:?}; ");
        }
    }
    for (table, wanted) in replaced() {
        let lines = found.get(&table).map_or(&[][..], Vec::as_slice);
        let mut rows: BTreeMap<String, String> = BTreeMap::new();
        for line in lines {
            faults += &replace(&table, line, &mut rows);
        }
        if rows != wanted {
            let _ = write!(faults, "{table}: {rows:?} instead of {wanted:?}; ");
        }
    }
    faults
}

/// Takes a line of a table whose rows are replaced: what grows with each (the count, the time) must grow.
fn replace(table: &str, line: &str, rows: &mut BTreeMap<String, String>) -> String {
    let parts: Vec<&str> = line.splitn(3, ' ').collect();
    let &[kind, shop, row] = parts.as_slice() else { return format!("{table}: '{line}'; ") };
    let grows = |row: &str| {
        let mut numbers = row.split(' ').map(|n| n.parse::<f64>().unwrap_or(f64::NAN));
        if table == "totals" { numbers.next() } else { numbers.next_back() }
    };
    let before = rows.insert(shop.to_owned(), row.to_owned());
    let expected = if before.is_none() { "+I" } else { "+U" };
    match before.as_deref().map_or(Some(0.0), grows).zip(grows(row)) {
        Some((before, now)) if before < now && kind == expected => String::new(),
        _ => format!("{table}: '{line}' behind {before:?}; "),
    }
}
