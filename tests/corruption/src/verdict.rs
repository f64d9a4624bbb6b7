//! What must come of a damage, and whether it did. The answers come from what the files are and from the numbers that the
//! source brings; nothing of the engine that decides or reads has a part in them.

use std::{collections::BTreeMap, fmt::Write as _};

use floodmark_snapshot::{Epoch, Manifest, log::Event};
use floodmark_worker::{Outcome, RunError};

use crate::{
    damage::Damage,
    job::{KEYS, ROWS, SPLITS, key_of},
    run::{End, Left},
    specimen::{Role, Specimen},
};

/// What must come of a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The job goes on from this checkpoint.
    From {
        /// Which.
        epoch: Epoch,
        /// What the job must have said, if it must have noticed the damage.
        says: Option<String>,
        /// In which class the case is counted.
        class: &'static str,
    },
    /// It refuses to start, and says this.
    Refused {
        /// What its error names.
        says: String,
    },
}

impl Expected {
    /// The class that the case is counted in.
    #[must_use]
    pub fn class(&self) -> &'static str {
        match self {
            Self::From { class, .. } => class,
            Self::Refused { .. } => REFUSED,
        }
    }
}

/// The start is refused.
pub const REFUSED: &str = "refused: no checkpoint is intact without the file";
/// An older checkpoint is used.
pub const FELL_BACK: &str = "fell back to an older checkpoint";
/// The newest checkpoint is used, and the job says what is damaged.
pub const PASSED_OVER: &str = "said, and went on from the newest checkpoint, which does not need the entry";
/// Nobody reads an orphan.
pub const ORPHAN: &str = "harmless: an orphan, which nobody reads";
/// The job starts from a checkpoint.
pub const SAVEPOINTS: &str = "harmless: a file of the savepoint, and the job starts from a checkpoint";
/// The newest checkpoint does not name the file.
pub const OLDER: &str = "harmless: a file of older checkpoints only, and the newest is intact";
/// The log has given the entry up.
pub const SUPERSEDED: &str = "harmless: an entry that a later one has released";
/// A log that ends earlier is a log of an earlier moment.
pub const LAST_ENTRY: &str = "harmless: without its last entry, the log is that of a moment before";

/// What must come of this damage if the job starts from its newest checkpoint.
#[must_use]
pub fn expected(specimen: &Specimen, path: &str, role: &Role, damage: &Damage) -> Expected {
    let newest = |skip: &dyn Fn(&Manifest) -> bool| specimen.retained.iter().rev().find(|m| !skip(m)).map(|m| m.epoch);
    let unharmed =
        |class| Expected::From { epoch: specimen.retained[specimen.retained.len() - 1].epoch, says: None, class };
    let from = |found: Option<Epoch>, says: String, refusing: String, class| match found {
        Some(epoch) => Expected::From { epoch, says: Some(says), class },
        None => Expected::Refused { says: refusing },
    };
    match role {
        Role::Orphan => unharmed(ORPHAN),
        Role::SavepointManifest | Role::SavepointShard(_) => unharmed(SAVEPOINTS),
        Role::Shard(_) => {
            let names = |m: &Manifest| m.shards().any(|s| path.ends_with(&s.path));
            if !names(&specimen.retained[specimen.retained.len() - 1]) {
                return unharmed(OLDER);
            }
            let relative = path.split_once("/blobs/").map_or(path, |(_, file)| file);
            let says = format!("blobs/{relative}");
            from(newest(&names), says.clone(), says, FELL_BACK)
        }
        Role::Entry(seq) => {
            let released = specimen.entries.iter().filter(|e| e.seq != *seq).filter_map(|e| match &e.event {
                Event::Released { oldest_seq, .. } => Some(*oldest_seq),
                _ => None,
            });
            if released.max().is_some_and(|oldest| *seq < oldest) {
                return unharmed(SUPERSEDED);
            }
            let holds = specimen.entries.iter().find(|e| e.seq == *seq).and_then(|e| match &e.event {
                Event::Completed { manifest } => Some(manifest.epoch),
                _ => None,
            });
            let epoch = newest(&|m: &Manifest| Some(m.epoch) == holds);
            let last = specimen.entries.last().is_some_and(|e| e.seq == *seq);
            if last && *damage == Damage::Removed {
                return Expected::From { epoch: epoch.unwrap_or_default(), says: None, class: LAST_ENTRY };
            }
            // What lies before a gap in the log can't be told from what was never there.
            let epoch = if *damage == Damage::Removed { epoch.filter(|e| after(specimen, *seq, *e)) } else { epoch };
            let newest = specimen.retained.last().map(|m| m.epoch);
            let class = if epoch == newest { PASSED_OVER } else { FELL_BACK };
            from(epoch, format!("entry={seq} "), format!("log entry {seq}: "), class)
        }
    }
}

/// Whether the entry of a checkpoint comes after this one.
fn after(specimen: &Specimen, seq: u64, epoch: Epoch) -> bool {
    specimen.entries.iter().any(|e| match &e.event {
        Event::Completed { manifest } => manifest.epoch == epoch && e.seq > seq,
        _ => false,
    })
}

/// What is wrong with the outcome of a start, in words; empty if nothing is.
#[must_use]
pub fn faults(specimen: &Specimen, expected: &Expected, left: &Left) -> String {
    let ended = match &left.end {
        End::Ended(ended) => ended,
        other => return format!("{other:?}"),
    };
    match (expected, ended) {
        (Expected::Refused { says }, Err(RunError::Storage(error))) => {
            let error = error.to_string();
            if !error.contains(says) {
                return format!("refused without a word of '{says}': {error}");
            }
            if left.topic.records != specimen.topic.records { "refused, and wrote".to_owned() } else { String::new() }
        }
        (Expected::From { epoch, says, .. }, Ok(summary)) => {
            if summary.outcome != Outcome::Finished || summary.progress.restored_from != Some(*epoch) {
                let from = summary.progress.restored_from;
                return format!("{:?} from {from:?} instead of {epoch}; {:?}", summary.outcome, left.warnings);
            }
            let said = |what: &str| left.warnings.iter().any(|w| w.contains(what));
            match says {
                Some(says) if !said(says) => return format!("not a word of '{says}': {:?}", left.warnings),
                None if !left.warnings.is_empty() => return format!("warned for nothing: {:?}", left.warnings),
                Some(_) | None => {}
            }
            if *epoch < specimen.committed && !said("a second time") {
                return format!("from {epoch}, behind what is committed, without a warning: {:?}", left.warnings);
            }
            output_faults(specimen, &left.topic.records, *epoch, true)
        }
        (_, ended) => format!("expected {expected:?}, and it ended as {ended:?}; {:?}", left.warnings),
    }
}

/// What is wrong with the topic after the job has gone on from a checkpoint to its end: the specimen's records, and then each
/// key's counts from what that checkpoint (or, if more is visible, the topic) held of it. `same_topic` is false if the topic
/// was empty at the start.
#[must_use]
pub fn output_faults(specimen: &Specimen, records: &[(Epoch, String)], from: Epoch, same_topic: bool) -> String {
    let mut wanted: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    let before: Vec<(Epoch, i64, i64)> = parse(&specimen.topic.records);
    let mut held: BTreeMap<i64, i64> = BTreeMap::new();
    for (epoch, key, count) in &before {
        if same_topic {
            wanted.entry(*key).or_default().push(*count);
        }
        if *epoch <= from {
            *held.entry(*key).or_default() += 1;
        }
    }
    let mut rows: BTreeMap<i64, i64> = BTreeMap::new();
    for split in 0..SPLITS {
        (0..ROWS).for_each(|number| *rows.entry(key_of(split, number)).or_default() += 1);
    }
    assert_eq!(rows.len() as i64, KEYS, "every key has rows");
    for (key, rows) in rows {
        wanted.entry(key).or_default().extend(held.get(&key).copied().unwrap_or(0) + 1..=rows);
    }
    let mut found: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    parse(records).into_iter().for_each(|(_, key, count)| found.entry(key).or_default().push(count));
    let mut faults = String::new();
    for (key, wanted) in &wanted {
        let found = found.remove(key).unwrap_or_default();
        if found != *wanted {
            let _ = write!(faults, "key {key}: {found:?} instead of {wanted:?}; ");
        }
    }
    if !found.is_empty() {
        let _ = write!(faults, "keys that there are not: {found:?}");
    }
    faults
}

fn parse(records: &[(Epoch, String)]) -> Vec<(Epoch, i64, i64)> {
    let number = |text: &str| text.parse().unwrap_or(i64::MIN);
    let parse = |(epoch, line): &(Epoch, String)| {
        let (key, count) = line.split_once(' ').unwrap_or((line, ""));
        (*epoch, number(key), number(count))
    };
    records.iter().map(parse).collect()
}

/// Cases by what they came to.
#[derive(Debug, Default)]
pub struct Tally(BTreeMap<String, u64>);

impl Tally {
    /// Counts a case.
    pub fn count(&mut self, class: &str) {
        *self.0.entry(class.to_owned()).or_default() += 1;
    }

    /// All cases.
    #[must_use]
    pub fn cases(&self) -> u64 {
        self.0.values().sum()
    }

    /// Cases of a class.
    #[must_use]
    pub fn of(&self, class: &str) -> u64 {
        self.0.get(class).copied().unwrap_or(0)
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|(class, count)| writeln!(f, "{count:>8}  {class}"))
    }
}
