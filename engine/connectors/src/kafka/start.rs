//! Where reading begins and ends: turns `scan.startup.*`, `scan.bounded.mode` and restored positions into offsets that do not
//! move.

use std::collections::BTreeMap;

use floodmark_dataflow::connector::TableError;
use floodmark_snapshot::{Error, Result, SplitState};
use serde_json::json;

use super::client::Lookup;
use crate::options::Options;

pub(super) const START_OPTIONS: [&str; 4] =
    ["scan.startup.mode", "scan.startup.timestamp-millis", "scan.startup.specific-offsets", "scan.bounded.mode"];

/// Where a partition without a restored position begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Start {
    Earliest,
    Latest,
    Timestamp(i64),
    /// By partition; partitions that are not named begin at their earliest offset.
    Offsets(BTreeMap<i32, i64>),
}

impl Start {
    pub(super) fn of(options: &Options<'_>) -> Result<Self, TableError> {
        let modes = [("earliest-offset", 0), ("latest-offset", 1), ("timestamp", 2), ("specific-offsets", 3)];
        let missing =
            |name: &str| TableError::table(format!("option '{name}' is missing: 'scan.startup.mode' asks for it"));
        match options.choice("scan.startup.mode", &modes)? {
            0 => Ok(Self::Earliest),
            1 => Ok(Self::Latest),
            2 => {
                let name = "scan.startup.timestamp-millis";
                let time = options.parsed(name, "a time in milliseconds since 1970")?;
                Ok(Self::Timestamp(time.ok_or_else(|| missing(name))?))
            }
            _ => {
                let name = "scan.startup.specific-offsets";
                let option = options.get(name).ok_or_else(|| missing(name))?;
                specific(&option.value).map(Self::Offsets).ok_or_else(|| {
                    let message = format!(
                        "option '{name}': '{}' is not a list such as 'partition:0,offset:42;partition:1,offset:300'",
                        option.value
                    );
                    TableError::option(option, message)
                })
            }
        }
    }

    /// The splits of a topic as it is now, each with the offset to go on or to begin with.
    pub(super) fn splits(
        &self,
        lookup: &Lookup,
        topic: &str,
        bounded: bool,
        restored: &[SplitState],
    ) -> Result<Vec<SplitState>> {
        let partitions = lookup.partitions(topic)?;
        let mine = |s: &&SplitState| s.split.rsplit_once('-').is_some_and(|(t, _)| t == topic);
        let known: Vec<&SplitState> = restored.iter().filter(mine).collect();
        let name = |partition: i32| format!("{topic}-{partition}");
        if let Some(gone) = known.iter().find(|k| partitions.iter().all(|p| name(*p) != k.split)) {
            return Err(Error::abort(format!(
                "partition {} is gone: topic '{topic}' was deleted and created again since the snapshot",
                gone.split
            )));
        }
        let mut splits = Vec::new();
        for partition in partitions {
            let (low, high) = lookup.offsets(topic, partition)?;
            let before = known.iter().find(|k| k.split == name(partition));
            let (offset, end, finished) = match before {
                Some(state) => {
                    let (offset, end) = position_of(state)?;
                    let finished = state.finished && bounded;
                    if !finished {
                        check_kept(topic, partition, offset, low, high)?;
                    }
                    (offset, end, finished)
                }
                // A partition that was added since: whatever is in it is new.
                None if !known.is_empty() => (low, None, false),
                None => (self.offset(lookup, topic, partition, low, high)?, None, false),
            };
            let position = if bounded {
                json!({ "offset": offset, "end": end.unwrap_or(high) })
            } else {
                json!({ "offset": offset })
            };
            let watermark = before.and_then(|b| b.watermark);
            splits.push(SplitState { split: name(partition), position, watermark, finished });
        }
        Ok(splits)
    }

    fn offset(&self, lookup: &Lookup, topic: &str, partition: i32, low: i64, high: i64) -> Result<i64> {
        match self {
            Self::Earliest => Ok(low),
            Self::Latest => Ok(high),
            Self::Timestamp(time) => Ok(lookup.offset_at(topic, partition, *time)?.unwrap_or(high)),
            Self::Offsets(offsets) => match offsets.get(&partition) {
                None => Ok(low),
                Some(offset) if (low..=high).contains(offset) => Ok(*offset),
                Some(offset) => Err(Error::abort(format!(
                    "option 'scan.startup.specific-offsets': {topic}-{partition} has offsets {low} to {high}, not {offset}"
                ))),
            },
        }
    }
}

fn specific(text: &str) -> Option<BTreeMap<i32, i64>> {
    let one = |part: &str| {
        let (partition, offset) = part.trim().split_once(',')?;
        let partition = partition.trim().strip_prefix("partition:")?.trim().parse().ok()?;
        let offset = offset.trim().strip_prefix("offset:")?.trim().parse().ok()?;
        Some((partition, offset))
    };
    text.split(';').filter(|part| !part.trim().is_empty()).map(one).collect()
}

/// The next offset of a position, and the end of a bounded read.
pub(super) fn position_of(split: &SplitState) -> Result<(i64, Option<i64>)> {
    let offset = split.position["offset"].as_i64();
    let offset =
        offset.ok_or_else(|| Error::abort(format!("partition {} has no offset: {}", split.split, split.position)))?;
    Ok((offset, split.position["end"].as_i64()))
}

/// Refuses a position whose records are gone: to go on elsewhere would lose some without a word.
pub(super) fn check_kept(topic: &str, partition: i32, offset: i64, low: i64, high: i64) -> Result<()> {
    if offset < low {
        return Err(Error::abort(format!(
            "records are lost: {topic}-{partition} is to be read from offset {offset} on, but its retention has deleted \
             everything before {low}; keep records longer than a job may stand still"
        )));
    }
    if offset > high {
        return Err(Error::abort(format!(
            "{topic}-{partition} is to be read from offset {offset} on, but ends at {high}: \
             the topic was cut, or deleted and created again, since the snapshot"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specific_offsets_are_read() {
        let two = BTreeMap::from([(0, 42), (1, 300)]);
        assert_eq!(specific("partition:0,offset:42;partition:1,offset:300"), Some(two.clone()));
        assert_eq!(specific(" partition:0, offset:42 ; partition:1, offset:300 ;"), Some(two));
        assert_eq!(specific("0:42"), None);
    }

    #[test]
    fn lost_records_are_an_error() {
        assert!(check_kept("t", 0, 5, 5, 5).is_ok());
        let lost = check_kept("t", 0, 4, 5, 9).unwrap_err().to_string();
        assert!(lost.starts_with("records are lost: t-0 is to be read from offset 4"), "{lost}");
        assert!(check_kept("t", 0, 10, 5, 9).is_err());
    }
}
