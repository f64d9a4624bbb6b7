//! What the committed reader must have seen in the end, computed from the input ledger alone. Knows nothing of checkpoints.

mod sql;

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    inputs::{Inputs, PARTITION_STRIDE, Record},
    operators::WINDOW_MS,
    topology::Topology,
};

/// Faults of the output that are worth reading.
const FAULTS_MAX: usize = 5;

/// A row of the output.
type Row = Vec<i64>;

/// What the output is due to be.
pub(crate) struct Due<'a> {
    pub(crate) topology: Topology,
    pub(crate) inputs: &'a Inputs,
    /// See [`crate::plan::Plan::delay_ms`].
    pub(crate) delay_ms: i64,
}

impl Due<'_> {
    /// What is wrong with the output, in words; empty if nothing is.
    pub(crate) fn faults(&self, output: &[String]) -> Vec<String> {
        let (inputs, rows) = (self.inputs, &rows(output)[..]);
        worst(match self.topology {
            Topology::Pipe => pipe(inputs, rows),
            Topology::Windows => windows(inputs, rows),
            Topology::TwoSpeeds => counted(ids(inputs, &[0, 1]), rows, true),
            // A record that was dealt out in turn may be overtaken: only the counts are in order.
            Topology::Rebalanced => counted(ids(inputs, &[0]), rows, false),
            Topology::Funnel => funnel(inputs, rows),
            Topology::SqlWindows => sql::windows(self, rows),
            Topology::SqlJoin => sql::join(self, rows),
            Topology::SqlTotals => sql::totals(inputs, rows),
            Topology::SqlLast | Topology::SqlFirst => sql::ranked(self, rows),
            Topology::SqlDistinct => sql::distinct(inputs, rows),
        })
    }

    /// What is missing from the output of a job that runs at least once.
    pub(crate) fn lost(&self, output: &[String]) -> Vec<String> {
        let (inputs, rows) = (self.inputs, &rows(output)[..]);
        let due: BTreeSet<i64> = match self.topology {
            Topology::Windows | Topology::Funnel => {
                sums(inputs).into_keys().map(|(k, w)| k * 1_000_000_000 + w).collect()
            }
            Topology::TwoSpeeds => ids(inputs, &[0, 1]).into_keys().collect(),
            Topology::Pipe | Topology::Rebalanced => ids(inputs, &[0]).into_keys().collect(),
            Topology::SqlWindows
            | Topology::SqlJoin
            | Topology::SqlTotals
            | Topology::SqlLast
            | Topology::SqlFirst
            | Topology::SqlDistinct => return worst(sql::lost(self, rows)),
        };
        let seen: BTreeSet<i64> = rows.iter().filter_map(|r| r.last().copied()).collect();
        worst(due.difference(&seen).map(|id| format!("{id} is lost")).collect())
    }
}

fn worst(mut faults: Vec<String>) -> Vec<String> {
    if faults.len() > FAULTS_MAX {
        let more = faults.len() - FAULTS_MAX;
        faults.truncate(FAULTS_MAX);
        faults.push(format!("… and {more} more"));
    }
    faults
}

fn rows(output: &[String]) -> Vec<Row> {
    output.iter().map(|line| line.split(' ').map(|f| f.parse().unwrap_or(i64::MIN)).collect()).collect()
}

fn records<'a>(inputs: &'a Inputs, topics: &'a [usize]) -> impl Iterator<Item = &'a Record> {
    topics.iter().flat_map(|t| inputs.topic(*t)).flatten()
}

/// Key of each id.
fn ids(inputs: &Inputs, topics: &[usize]) -> BTreeMap<i64, i64> {
    records(inputs, topics).map(|r| (r.id, r.key)).collect()
}

/// Each id exactly once.
fn exactly_once(expected: &BTreeSet<i64>, found: impl Iterator<Item = i64>) -> Vec<String> {
    let mut seen: BTreeMap<i64, u64> = BTreeMap::new();
    found.for_each(|id| *seen.entry(id).or_default() += 1);
    let lost = expected.iter().filter(|id| !seen.contains_key(id)).map(|id| format!("{id} is lost"));
    let repeated = seen.iter().filter(|(_, n)| **n > 1).map(|(id, n)| format!("{id} came {n} times"));
    let invented = seen.keys().filter(|id| !expected.contains(id)).map(|id| format!("{id} was never put in"));
    lost.chain(repeated).chain(invented).collect()
}

/// In each line (by a number that tells them apart), places only grow.
fn in_order(rows: impl Iterator<Item = ((i64, i64), i64)>) -> Vec<String> {
    let mut last: BTreeMap<(i64, i64), i64> = BTreeMap::new();
    let mut faults = Vec::new();
    for (line, place) in rows {
        if last.insert(line, place).is_some_and(|before| before >= place) {
            faults.push(format!("{place} came out of its order in {line:?}"));
        }
    }
    faults
}

fn pipe(inputs: &Inputs, rows: &[Row]) -> Vec<String> {
    let expected: BTreeMap<i64, [i64; 4]> =
        records(inputs, &[0]).map(|r| (r.id, [r.key, r.time, r.value, r.id])).collect();
    let id = |row: &Row| row.last().copied().unwrap_or_default();
    let mut faults = exactly_once(&expected.keys().copied().collect(), rows.iter().map(id));
    faults.extend(in_order(rows.iter().map(|r| ((id(r) / PARTITION_STRIDE, 0), id(r)))));
    let changed = |row: &&Row| expected.get(&id(row)).is_some_and(|e| e[..] != row[..]);
    faults.extend(rows.iter().filter(changed).map(|r| format!("{r:?} was put in otherwise")));
    faults
}

/// Count and sum of each key and window.
fn sums(inputs: &Inputs) -> BTreeMap<(i64, i64), (i64, i64)> {
    let mut sums: BTreeMap<(i64, i64), (i64, i64)> = BTreeMap::new();
    for record in records(inputs, &[0]) {
        let window = record.time.div_euclid(WINDOW_MS) * WINDOW_MS;
        let (count, sum) = sums.entry((record.key, window)).or_default();
        *count += 1;
        *sum += record.value;
    }
    sums
}

fn windows(inputs: &Inputs, rows: &[Row]) -> Vec<String> {
    let expected = sums(inputs);
    let mut found: BTreeMap<(i64, i64), (i64, i64)> = BTreeMap::new();
    let mut faults = Vec::new();
    for row in rows {
        let [key, window, count, sum, _] = row[..] else {
            faults.push(format!("not a window: {row:?}"));
            continue;
        };
        if found.insert((key, window), (count, sum)).is_some() {
            faults.push(format!("key {key} window {window} came twice"));
        }
    }
    for (at, is) in &expected {
        match found.get(at) {
            Some(was) if was == is => {}
            Some(was) => faults.push(format!("key {} window {}: {was:?} instead of {is:?}", at.0, at.1)),
            None => faults.push(format!("key {} window {} is lost", at.0, at.1)),
        }
    }
    let invented = found.keys().filter(|at| !expected.contains_key(at));
    faults.extend(invented.map(|(key, window)| format!("key {key} window {window} was never due")));
    faults.extend(in_order(rows.iter().map(|r| ((r[0], 0), r[1]))));
    faults
}

/// Rows of key, count and id: each key's counts are 1, 2, 3, …; each id comes once, under its key.
fn counted(expected: BTreeMap<i64, i64>, rows: &[Row], ordered: bool) -> Vec<String> {
    let mut counts: BTreeMap<i64, i64> = BTreeMap::new();
    let mut faults = Vec::new();
    for row in rows {
        let [key, count, id] = row[..] else {
            faults.push(format!("not a count: {row:?}"));
            continue;
        };
        let last = counts.entry(key).or_default();
        if count != *last + 1 {
            faults.push(format!("key {key}: count {count} came after {last}"));
        }
        *last = count;
        if expected.get(&id).is_some_and(|k| *k != key) {
            faults.push(format!("{id} came under key {key}"));
        }
    }
    let id = |row: &Row| row.last().copied().unwrap_or_default();
    faults.extend(exactly_once(&expected.keys().copied().collect(), rows.iter().map(id)));
    if ordered {
        faults.extend(in_order(rows.iter().map(|r| ((id(r) / PARTITION_STRIDE, r[0]), id(r)))));
    }
    faults
}

fn funnel(inputs: &Inputs, rows: &[Row]) -> Vec<String> {
    let due = sums(inputs).into_keys().map(|(key, window)| (key * 1_000_000_000 + window, key)).collect();
    let mut faults = counted(due, rows, false);
    faults.extend(in_order(rows.iter().map(|r| ((r[0], 0), r[r.len() - 1]))));
    faults
}
