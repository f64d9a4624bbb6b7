//! What the jobs in SQL owe. A row that may have been late, because its own partition was already past its window before it, may
//! be counted or not; any other must be.

use std::collections::{BTreeMap, BTreeSet};

use super::{Due, Inputs, Record, Row, exactly_once, in_order, records};
use crate::{
    sql::{JOIN_WINDOW_MS, WINDOW_MS},
    topology::Topology,
};

/// Of so many rows that may be late, every choice is looked at; of more, only how little and how much they may come to.
const CHOICES_OF_MAX: usize = 14;
/// Kinds of rows, as numbers.
const INSERTED: i64 = 0;
const UPDATED: i64 = 2;

/// The values of the rows of one key and window.
#[derive(Clone, Debug, Default)]
struct Members {
    sure: Vec<i64>,
    /// These may have been late.
    unsure: Vec<i64>,
}

impl Members {
    /// Whether this many rows may have come to this sum.
    fn may_be(&self, count: i64, sum: i64) -> bool {
        let (count, sum) = (count - self.sure.len() as i64, sum - self.sure.iter().sum::<i64>());
        let Ok(count) = usize::try_from(count) else { return false };
        if count > self.unsure.len() || (count == 0 && self.sure.is_empty()) {
            return false;
        }
        if self.unsure.len() > CHOICES_OF_MAX {
            let mut values = self.unsure.clone();
            values.sort_unstable();
            let least: i64 = values.iter().take(count).sum();
            let most: i64 = values.iter().rev().take(count).sum();
            return (least..=most).contains(&sum);
        }
        (0..1_u32 << self.unsure.len()).filter(|choice| choice.count_ones() as usize == count).any(|choice| {
            let chosen = self.unsure.iter().enumerate().filter(|(at, _)| choice >> at & 1 == 1);
            chosen.map(|(_, value)| value).sum::<i64>() == sum
        })
    }
}

/// Key and start of a window.
type Place = (i64, i64);

fn window(record: &Record, length_ms: i64) -> Place {
    (record.key, record.time.div_euclid(length_ms) * length_ms)
}

/// Each record of a topic, and whether it may have been late for its window.
fn punctuality<'a>(due: &'a Due<'_>, topic: usize, length_ms: i64) -> impl Iterator<Item = (&'a Record, bool)> {
    due.inputs.topic(topic).iter().flat_map(move |partition| {
        let mut greatest = i64::MIN / 2;
        partition.iter().map(move |record| {
            let end = window(record, length_ms).1 + length_ms;
            let late = greatest - due.delay_ms >= end - 1;
            greatest = greatest.max(record.time);
            (record, late)
        })
    })
}

fn members(due: &Due<'_>, length_ms: i64) -> BTreeMap<Place, Members> {
    let mut all: BTreeMap<Place, Members> = BTreeMap::new();
    for (record, late) in punctuality(due, 0, length_ms) {
        let members = all.entry(window(record, length_ms)).or_default();
        if late { members.unsure.push(record.value) } else { members.sure.push(record.value) }
    }
    all
}

/// Rows of key, window, count and sum.
pub(super) fn windows(due: &Due<'_>, rows: &[Row]) -> Vec<String> {
    let expected = members(due, WINDOW_MS);
    let mut faults = Vec::new();
    let mut found = BTreeSet::new();
    for row in rows {
        let [key, window, count, sum] = row[..] else {
            faults.push(format!("not a window: {row:?}"));
            continue;
        };
        if !found.insert((key, window)) {
            faults.push(format!("key {key} window {window} came twice"));
        }
        match expected.get(&(key, window)) {
            Some(members) if members.may_be(count, sum) => {}
            Some(members) => faults.push(format!("key {key} window {window}: {count} rows, sum {sum}, of {members:?}")),
            None => faults.push(format!("key {key} window {window} was never due")),
        }
    }
    let lost = expected.iter().filter(|(at, members)| !members.sure.is_empty() && !found.contains(at));
    faults.extend(lost.map(|(at, _)| format!("key {} window {} is lost", at.0, at.1)));
    faults.extend(in_order(rows.iter().filter(|r| r.len() == 4).map(|r| ((r[0], 0), r[1]))));
    faults
}

/// The rows of the slow topic that must have met the windows of the fast one, by their ids.
fn met(due: &Due<'_>, fast: &BTreeMap<Place, Members>) -> BTreeSet<i64> {
    let sure = punctuality(due, 1, JOIN_WINDOW_MS).filter(|(_, late)| !late).map(|(record, _)| record);
    let meets = |r: &&Record| fast.get(&window(r, JOIN_WINDOW_MS)).is_some_and(|members| !members.sure.is_empty());
    sure.filter(meets).map(|r| r.id).collect()
}

/// Rows of key, window, the fast topic's count and sum in it, and the id of the slow topic's row.
pub(super) fn join(due: &Due<'_>, rows: &[Row]) -> Vec<String> {
    let fast = members(due, JOIN_WINDOW_MS);
    let slow: BTreeMap<i64, &Record> = records(due.inputs, &[1]).map(|r| (r.id, r)).collect();
    let mut faults = Vec::new();
    let mut sums: BTreeMap<Place, (i64, i64)> = BTreeMap::new();
    let mut found = BTreeSet::new();
    for row in rows {
        let [key, start, count, sum, id] = row[..] else {
            faults.push(format!("not a pair: {row:?}"));
            continue;
        };
        let place = (key, start);
        if !found.insert(id) {
            faults.push(format!("{id} came twice"));
        }
        if slow.get(&id).is_none_or(|r| window(r, JOIN_WINDOW_MS) != place) {
            faults.push(format!("{id} is not of key {key} and window {start}"));
        }
        if *sums.entry(place).or_insert((count, sum)) != (count, sum) {
            faults.push(format!("key {key} window {start}: {count} rows, sum {sum}, and before {:?}", sums[&place]));
        }
        if fast.get(&place).is_none_or(|members| !members.may_be(count, sum)) {
            faults.push(format!("key {key} window {start}: {count} rows, sum {sum}, of {:?}", fast.get(&place)));
        }
    }
    let due = met(due, &fast);
    faults.extend(due.difference(&found).map(|id| format!("{id} is lost")));
    faults
}

/// Count, sum and greatest id of each key.
fn totals_due(inputs: &Inputs) -> BTreeMap<i64, (i64, i64, i64)> {
    let mut totals: BTreeMap<i64, (i64, i64, i64)> = BTreeMap::new();
    for record in records(inputs, &[0]) {
        let (count, sum, newest) = totals.entry(record.key).or_insert((0, 0, i64::MIN));
        (*count, *sum, *newest) = (*count + 1, *sum + record.value, record.id.max(*newest));
    }
    totals
}

/// Upserts of key, count, sum and greatest id: counts grow, and the last row of a key has it all.
pub(super) fn totals(inputs: &Inputs, rows: &[Row]) -> Vec<String> {
    let mut last: BTreeMap<i64, (i64, i64, i64)> = BTreeMap::new();
    let mut faults = Vec::new();
    for row in rows {
        let [key, count, sum, newest, kind] = row[..] else {
            faults.push(format!("not a total: {row:?}"));
            continue;
        };
        let before = last.insert(key, (count, sum, newest));
        if before.is_some_and(|(n, _, id)| n >= count || id > newest) {
            faults.push(format!("key {key}: {:?} came after {before:?}", (count, sum, newest)));
        }
        faults.extend(of_kind(key, before.is_none(), kind));
    }
    let due = totals_due(inputs);
    for (key, total) in &due {
        if last.get(key) != Some(total) {
            faults.push(format!("key {key}: {:?} in the end instead of {total:?}", last.get(key)));
        }
    }
    faults.extend(last.keys().filter(|key| !due.contains_key(key)).map(|key| format!("key {key} was never put in")));
    faults
}

/// The first row of a key is inserted, all others update it.
fn of_kind(key: i64, first: bool, kind: i64) -> Option<String> {
    let due = if first { INSERTED } else { UPDATED };
    (kind != due).then(|| format!("key {key}: a row of kind {kind} instead of {due}"))
}

/// The greatest time of each key, or the least.
fn times_due(due: &Due<'_>) -> BTreeMap<i64, i64> {
    let better = |a: i64, b: i64| if due.topology == Topology::SqlLast { a.max(b) } else { a.min(b) };
    let mut times: BTreeMap<i64, i64> = BTreeMap::new();
    for record in records(due.inputs, &[0]) {
        times.entry(record.key).and_modify(|t| *t = better(*t, record.time)).or_insert(record.time);
    }
    times
}

/// Upserts of records: each is a record as it was put in, and comes once; times go one way, up to the last of each key.
pub(super) fn ranked(due: &Due<'_>, rows: &[Row]) -> Vec<String> {
    let known: BTreeMap<i64, [i64; 4]> =
        records(due.inputs, &[0]).map(|r| (r.id, [r.key, r.time, r.value, r.id])).collect();
    let mut last: BTreeMap<i64, i64> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut faults = Vec::new();
    for row in rows {
        let [key, time, _, id, kind] = row[..] else {
            faults.push(format!("not a record: {row:?}"));
            continue;
        };
        if known.get(&id).is_none_or(|record| record[..] != row[..4]) {
            faults.push(format!("{row:?} was put in otherwise"));
        }
        if !seen.insert(id) {
            faults.push(format!("{id} came twice"));
        }
        let before = last.insert(key, time);
        let in_order = |t: i64| if due.topology == Topology::SqlLast { t <= time } else { t > time };
        if !before.is_none_or(in_order) {
            faults.push(format!("key {key}: time {time} came after {before:?}"));
        }
        faults.extend(of_kind(key, before.is_none(), kind));
    }
    for (key, time) in times_due(due) {
        if last.get(&key) != Some(&time) {
            faults.push(format!("key {key}: time {:?} in the end instead of {time}", last.get(&key)));
        }
    }
    faults
}

fn pairs(inputs: &Inputs) -> BTreeSet<(i64, i64)> {
    records(inputs, &[0]).map(|r| (r.key, r.value % 10)).collect()
}

/// Rows of key and value: each pair once.
pub(super) fn distinct(inputs: &Inputs, rows: &[Row]) -> Vec<String> {
    let number = |key: i64, value: i64| key * 10 + value;
    let due = pairs(inputs).into_iter().map(|(key, value)| number(key, value)).collect();
    let mut faults: Vec<String> =
        rows.iter().filter(|r| r.len() != 2).map(|row| format!("not a pair: {row:?}")).collect();
    faults.extend(exactly_once(&due, rows.iter().filter(|r| r.len() == 2).map(|r| number(r[0], r[1]))));
    faults
}

/// What a job that runs at least once has lost.
pub(super) fn lost(due: &Due<'_>, rows: &[Row]) -> Vec<String> {
    let there = |test: &dyn Fn(&Row) -> bool| rows.iter().any(test);
    match due.topology {
        Topology::SqlWindows => {
            let sure = members(due, WINDOW_MS).into_iter().map(|(at, members)| (at, members.sure.len() as i64));
            let lost = sure
                .filter(|(_, n)| *n > 0)
                .filter(|(at, n)| !there(&|r| r.len() == 4 && (r[0], r[1]) == *at && r[2] >= *n));
            lost.map(|((key, window), n)| format!("key {key} window {window} with {n} rows is lost")).collect()
        }
        Topology::SqlJoin => {
            let met = met(due, &members(due, JOIN_WINDOW_MS));
            met.into_iter().filter(|id| !there(&|r| r.last() == Some(id))).map(|id| format!("{id} is lost")).collect()
        }
        Topology::SqlTotals => {
            let lost = totals_due(due.inputs).into_iter();
            let lost = lost.filter(|(key, (n, ..))| !there(&|r| r.len() == 5 && r[0] == *key && r[1] >= *n));
            lost.map(|(key, (n, ..))| format!("key {key} with {n} rows is lost")).collect()
        }
        Topology::SqlLast | Topology::SqlFirst => {
            let lost = times_due(due).into_iter();
            let lost = lost.filter(|(key, time)| !there(&|r| r.len() == 5 && r[0] == *key && r[1] == *time));
            lost.map(|(key, time)| format!("key {key} at {time} is lost")).collect()
        }
        Topology::SqlDistinct => {
            let lost = pairs(due.inputs).into_iter().filter(|(key, value)| !there(&|r| r[..] == [*key, *value]));
            lost.map(|(key, value)| format!("key {key} with {value} is lost")).collect()
        }
        Topology::Pipe | Topology::Windows | Topology::TwoSpeeds | Topology::Rebalanced | Topology::Funnel => {
            Vec::new()
        }
    }
}
