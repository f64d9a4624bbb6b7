//! Event time by key group. Pure.
//!
//! Behind barriers that overtake, the subtasks of an operator have come differently far in one snapshot. When key groups move,
//! a subtask then owns some whose windows have fired and some whose windows have not: what is late is a question of the key
//! group, until the subtask's own watermark has passed all that was restored.
//!
//! Invariant: the watermark of a key group never falls, neither over time nor over restores.

use std::collections::BTreeMap;

use floodmark_snapshot::{Error, KeyGroup, KeyGroupRange, Result, TimestampMs};
use serde::{Deserialize, Serialize};

/// How far event time has come in each key group: a watermark that all have reached, and the key groups that are ahead of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyGroupWatermarks {
    least: Option<TimestampMs>,
    /// In order, no two with a key group in common, each above `least`; neighbours differ.
    ahead: Vec<Ahead>,
}

/// Key groups whose watermark is above the least one, as files have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ahead {
    /// The first of them.
    pub first: KeyGroup,
    /// The last of them, included.
    pub last: KeyGroup,
    /// Their watermark.
    pub watermark: TimestampMs,
}

impl From<Option<TimestampMs>> for KeyGroupWatermarks {
    /// The same for all key groups.
    fn from(watermark: Option<TimestampMs>) -> Self {
        Self { least: watermark, ahead: Vec::new() }
    }
}

impl From<TimestampMs> for KeyGroupWatermarks {
    /// The same for all key groups.
    fn from(watermark: TimestampMs) -> Self {
        Some(watermark).into()
    }
}

impl KeyGroupWatermarks {
    /// From what a file says.
    ///
    /// # Errors
    /// `Corrupt` if that is not what [`KeyGroupWatermarks::ahead`] answers.
    pub fn of_file(least: Option<TimestampMs>, ahead: &[Ahead]) -> Result<Self> {
        let ordered = ahead.is_sorted_by(|a, b| a.last < b.first);
        if !ordered || ahead.iter().any(|a| a.first > a.last || Some(a.watermark) <= least) {
            return Err(Error::corrupt("the watermarks of a state's key groups contradict each other"));
        }
        let mut watermarks = Self::from(least);
        ahead.iter().for_each(|a| watermarks.push(range(a.first, a.last), Some(a.watermark)));
        Ok(watermarks)
    }

    /// The watermark of a key group.
    #[must_use]
    pub fn of(&self, group: KeyGroup) -> Option<TimestampMs> {
        let at = self.ahead.partition_point(|a| a.last < group);
        self.ahead.get(at).filter(|a| a.first <= group).map_or(self.least, |a| Some(a.watermark))
    }

    /// What all key groups have reached.
    #[inline]
    #[must_use]
    pub fn min(&self) -> Option<TimestampMs> {
        self.least
    }

    /// What the furthest key groups have reached.
    #[must_use]
    pub fn max(&self) -> Option<TimestampMs> {
        self.ahead.iter().map(|a| a.watermark).max().or(self.least)
    }

    /// Whether all key groups have the same watermark.
    #[inline]
    #[must_use]
    pub fn is_even(&self) -> bool {
        self.ahead.is_empty()
    }

    /// The key groups above the least watermark.
    #[must_use]
    pub fn ahead(&self) -> &[Ahead] {
        &self.ahead
    }

    /// All key groups have reached this watermark.
    pub fn raise(&mut self, watermark: TimestampMs) {
        self.least = self.least.max(Some(watermark));
        self.ahead.retain(|a| Some(a.watermark) > self.least);
    }

    /// These key groups have reached what `other` says of them.
    pub fn merge(&mut self, other: &Self, groups: KeyGroupRange) {
        for (of_other, watermark) in other.runs(groups) {
            let mut merged = Self::from(self.least);
            for (run, had) in self.runs(ALL) {
                let (start, end) = bounds(run);
                let (from, to) = bounds(of_other);
                merged.push_bounds(start, end.min(from), had);
                merged.push_bounds(start.max(from), end.min(to), had.max(watermark));
                merged.push_bounds(start.max(to), end, had);
            }
            *self = merged;
        }
    }

    /// What is left to who owns these key groups: those of others count as the least of these.
    #[must_use]
    pub fn within(&self, groups: KeyGroupRange) -> Self {
        let runs = self.runs(groups);
        let mut within = Self::from(runs.iter().map(|(_, watermark)| *watermark).min().flatten());
        runs.into_iter().for_each(|(run, watermark)| within.push(run, watermark));
        within
    }

    /// A range, cut into runs of one watermark.
    fn runs(&self, groups: KeyGroupRange) -> Vec<(KeyGroupRange, Option<TimestampMs>)> {
        let (mut next, end) = bounds(groups);
        let mut runs = Vec::with_capacity(2 * self.ahead.len() + 1);
        let mut add = |start: u32, end: u32, watermark| {
            if start < end {
                runs.push((range(KeyGroup(start as u16), KeyGroup((end - 1) as u16)), watermark));
            }
        };
        for ahead in &self.ahead {
            let (from, to) = bounds(range(ahead.first, ahead.last));
            let (from, to) = (from.clamp(next, end), to.clamp(next, end));
            add(next, from, self.least);
            add(from, to, Some(ahead.watermark));
            next = to;
        }
        add(next, end, self.least);
        runs
    }

    fn push_bounds(&mut self, start: u32, end: u32, watermark: Option<TimestampMs>) {
        if start < end {
            self.push(range(KeyGroup(start as u16), KeyGroup((end - 1) as u16)), watermark);
        }
    }

    /// Adds a run behind all others.
    fn push(&mut self, run: KeyGroupRange, watermark: Option<TimestampMs>) {
        let Some(watermark) = watermark.filter(|w| Some(*w) > self.least) else { return };
        match self.ahead.last_mut() {
            Some(last) if last.watermark == watermark && bounds(range(last.first, last.last)).1 == bounds(run).0 => {
                last.last = run.last;
            }
            Some(_) | None => self.ahead.push(Ahead { first: run.first, last: run.last, watermark }),
        }
    }
}

const ALL: KeyGroupRange = KeyGroupRange { first: KeyGroup(0), last: KeyGroup(u16::MAX) };

fn range(first: KeyGroup, last: KeyGroup) -> KeyGroupRange {
    KeyGroupRange { first, last }
}

/// The first of a range, and the one behind its last.
fn bounds(groups: KeyGroupRange) -> (u32, u32) {
    (u32::from(groups.first.0), u32::from(groups.last.0) + 1)
}

/// What the shards of a restore say of event time: each key group has the watermark of the earlier subtask that owned it, as
/// of that subtask's last layer.
#[derive(Debug, Default)]
pub struct RestoredWatermarks {
    by_subtask: BTreeMap<u32, LastLayer>,
}

#[derive(Debug, Default)]
struct LastLayer {
    layer: u32,
    /// By the key groups of its shards.
    said: Vec<(KeyGroupRange, KeyGroupWatermarks)>,
}

impl RestoredWatermarks {
    /// A shard of an earlier subtask says this of its key groups; of all, if it has no range.
    pub fn shard(&mut self, subtask: u32, layer: u32, groups: Option<KeyGroupRange>, watermarks: KeyGroupWatermarks) {
        let groups = groups.unwrap_or(ALL);
        let last = self.by_subtask.entry(subtask).or_default();
        if layer < last.layer {
            return;
        }
        if layer > last.layer {
            *last = LastLayer { layer, said: Vec::new() };
        }
        last.said.retain(|(of, _)| *of != groups);
        last.said.push((groups, watermarks));
    }

    /// What that means for who owns these key groups.
    #[must_use]
    pub fn within(&self, owned: KeyGroupRange) -> KeyGroupWatermarks {
        let mut all = KeyGroupWatermarks::default();
        for (groups, watermarks) in self.by_subtask.values().flat_map(|last| &last.said) {
            if let Some(common) = groups.common(&owned) {
                all.merge(watermarks, common);
            }
        }
        all.within(owned)
    }
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::Disposition;

    use super::*;

    fn groups(first: u16, last: u16) -> KeyGroupRange {
        range(KeyGroup(first), KeyGroup(last))
    }

    fn ahead(first: u16, last: u16, watermark: TimestampMs) -> Ahead {
        Ahead { first: KeyGroup(first), last: KeyGroup(last), watermark }
    }

    #[test]
    fn all_key_groups_are_even_once_the_watermark_has_passed_them() {
        let mut watermarks = KeyGroupWatermarks::from(10);
        watermarks.merge(&30.into(), groups(4, 7));
        watermarks.merge(&20.into(), groups(8, 9));
        assert_eq!(watermarks.ahead(), [ahead(4, 7, 30), ahead(8, 9, 20)]);
        assert_eq!([3, 4, 7, 8, 9, 10].map(|g| watermarks.of(KeyGroup(g)).unwrap()), [10, 30, 30, 20, 20, 10]);
        assert_eq!((watermarks.min(), watermarks.max(), watermarks.is_even()), (Some(10), Some(30), false));
        watermarks.raise(5);
        assert_eq!(watermarks.min(), Some(10), "it never falls");
        watermarks.raise(20);
        assert_eq!((watermarks.min(), watermarks.ahead()), (Some(20), &[ahead(4, 7, 30)][..]));
        watermarks.raise(30);
        assert_eq!((watermarks.max(), watermarks.is_even()), (Some(30), true));
    }

    /// Random ranges, against one watermark per key group.
    #[test]
    fn it_is_a_map_from_key_groups_to_watermarks() {
        let mut random = 7_u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        for _ in 0..40 {
            let mut watermarks = KeyGroupWatermarks::default();
            let mut model = vec![None; 1 << 16];
            for _ in 0..next(12) {
                let (a, b) = (next(40), next(40));
                let ends = [0, 1, 2, 65_530, 65_535];
                let at = |n: u64| if n < 5 { ends[n as usize] } else { n as u16 };
                let (a, b) = (at(a).min(at(b)), at(a).max(at(b)));
                let watermark = next(5) as i64;
                if next(6) == 0 {
                    watermarks.raise(watermark);
                    model.iter_mut().for_each(|had| *had = (*had).max(Some(watermark)));
                } else {
                    watermarks.merge(&watermark.into(), groups(a, b));
                    model[a as usize..=b as usize].iter_mut().for_each(|had| *had = (*had).max(Some(watermark)));
                }
            }
            let of = |w: &KeyGroupWatermarks, g: usize| w.of(KeyGroup(g as u16));
            assert!((0..1 << 16).all(|g| of(&watermarks, g) == model[g]), "{watermarks:?}");
            assert_eq!(watermarks.max(), model.iter().copied().max().flatten());
            assert_eq!(KeyGroupWatermarks::of_file(watermarks.min(), watermarks.ahead()).unwrap(), watermarks);
            let (first, last) = (next(20) as u16, 20 + next(20) as u16);
            let within = watermarks.within(groups(first, last));
            let mine = usize::from(first)..=usize::from(last);
            assert!(mine.clone().all(|g| of(&within, g) == model[g]), "{within:?}");
            assert_eq!(within.min(), model[mine.clone()].iter().copied().min().flatten());
            assert_eq!(within.is_even(), model[mine.clone()].iter().all(|w| *w == model[*mine.start()]));
        }
    }

    #[test]
    fn each_key_group_has_what_the_last_layer_of_its_earlier_subtask_says() {
        let mut restored = RestoredWatermarks::default();
        restored.shard(0, 0, Some(groups(0, 63)), 90.into());
        restored.shard(0, 1, Some(groups(0, 63)), 50.into());
        restored.shard(1, 0, Some(groups(64, 127)), 100.into());
        restored.shard(1, 0, Some(groups(128, 130)), 120.into());
        restored.shard(0, 0, Some(groups(0, 63)), 70.into());
        let all = restored.within(groups(0, 130));
        assert_eq!((all.min(), all.ahead()), (Some(50), &[ahead(64, 127, 100), ahead(128, 130, 120)][..]));
        assert_eq!(restored.within(groups(3, 63)), 50.into());
        assert_eq!(restored.within(groups(64, 70)), 100.into());
        assert_eq!(restored.within(groups(130, 140)).min(), None, "nobody had key group 140");
        restored.shard(2, 0, None, 60.into());
        assert_eq!(restored.within(groups(3, 63)), 60.into());
    }

    #[test]
    fn what_contradicts_itself_in_a_file_is_refused() {
        for bad in [
            vec![ahead(5, 4, 30)],
            vec![ahead(0, 4, 10)],
            vec![ahead(0, 4, 30), ahead(4, 5, 40)],
            vec![ahead(3, 4, 30), ahead(0, 1, 40)],
        ] {
            let error = KeyGroupWatermarks::of_file(Some(10), &bad).unwrap_err();
            assert_eq!(error.disposition(), Disposition::Corrupt, "{bad:?}");
        }
    }
}
