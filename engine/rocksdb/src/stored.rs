//! How many rows of a namespace the database has: in all, and, as long as that is few numbers, of each key group. Pure.
//!
//! A state that is restored from some of the key groups of another one goes by these numbers: it need not read rows in order to
//! count them. Who doesn't know them (there are too many, or an earlier program took the checkpoint) counts.
//! Invariant: the numbers of key groups, if they are known, come to the number of all, and none of them is 0.

use std::collections::BTreeMap;

use floodmark_snapshot::{Error, KeyGroup, KeyGroupRange, Result};

use crate::row::{take_varint, varint};

/// Numbers of key groups that a state keeps, of all its namespaces together, at most: they are in memory, and in every checkpoint.
const NUMBERS_MAX: usize = 1 << 15;

/// Whether the rows of each of these key groups may be counted in one more namespace than there are.
pub(crate) fn is_few(namespaces: usize, groups: KeyGroupRange) -> bool {
    let groups = usize::from(groups.last.0 - groups.first.0) + 1;
    (namespaces + 1) * groups <= NUMBERS_MAX
}

/// Rows that are counted as they are seen.
#[derive(Debug)]
pub(crate) struct Counts {
    groups: KeyGroupRange,
    namespaces: BTreeMap<i64, Stored>,
}

impl Counts {
    /// No rows of these key groups yet.
    pub(crate) fn none(groups: KeyGroupRange) -> Self {
        Self { groups, namespaces: BTreeMap::new() }
    }

    /// One more.
    pub(crate) fn add(&mut self, group: KeyGroup, namespace: i64) {
        let few = is_few(self.namespaces.len(), self.groups);
        self.namespaces.entry(namespace).or_insert_with(|| Stored::none(few)).add(group, 1);
    }

    /// By namespace.
    pub(crate) fn finish(self) -> BTreeMap<i64, Stored> {
        self.namespaces
    }
}

/// See the header of this file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    rows: u64,
    /// In order; without key groups that have no rows.
    by_group: Option<Vec<(KeyGroup, u64)>>,
}

impl Stored {
    /// No rows. From now on those of each key group are counted, too, if that is wanted.
    pub(crate) fn none(by_group: bool) -> Self {
        Self { rows: 0, by_group: by_group.then(Vec::new) }
    }

    /// So many rows, of whatever key groups.
    pub(crate) fn of_any_group(rows: u64) -> Self {
        Self { rows, by_group: None }
    }

    /// In all.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// Whether the rows of each key group are counted.
    pub(crate) fn is_by_group(&self) -> bool {
        self.by_group.is_some()
    }

    /// Rows of this key group have come.
    pub(crate) fn add(&mut self, group: KeyGroup, rows: u64) {
        if rows == 0 {
            return;
        }
        self.rows += rows;
        if let Some(groups) = &mut self.by_group {
            match groups.binary_search_by_key(&group, |(g, _)| *g) {
                Ok(at) => groups[at].1 += rows,
                Err(at) => groups.insert(at, (group, rows)),
            }
        }
    }

    /// A row of this key group has gone.
    pub(crate) fn remove(&mut self, group: KeyGroup) {
        self.rows = self.rows.saturating_sub(1);
        let Some(groups) = &mut self.by_group else { return };
        match groups.binary_search_by_key(&group, |(g, _)| *g) {
            Ok(at) if groups[at].1 > 1 => groups[at].1 -= 1,
            Ok(at) => drop(groups.remove(at)),
            // Nobody knew of that row: these numbers are good for nothing.
            Err(_) => self.by_group = None,
        }
    }

    /// All these have come.
    pub(crate) fn add_all(&mut self, others: &Self) {
        match &others.by_group {
            Some(groups) => groups.iter().for_each(|(group, rows)| self.add(*group, *rows)),
            None => *self = Self::of_any_group(self.rows + others.rows),
        }
    }

    /// Those of some key groups, if it is known how many those are.
    pub(crate) fn within(&self, wanted: KeyGroupRange) -> Option<Self> {
        let groups = self.by_group.as_ref()?.iter().filter(|(group, _)| wanted.contains(*group)).copied();
        let groups: Vec<_> = groups.collect();
        Some(Self { rows: groups.iter().map(|(_, rows)| rows).sum(), by_group: Some(groups) })
    }

    /// About how many bytes it takes beside itself.
    pub(crate) fn bytes(&self) -> usize {
        self.by_group.as_ref().map_or(0, |groups| groups.capacity() * size_of::<(KeyGroup, u64)>())
    }

    /// Appends the numbers of key groups, if they are known: how many there are, and for each how far it is from the one before
    /// and its rows, as varints.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let groups = self.by_group.as_deref().unwrap_or_default();
        varint(groups.len() as u128, out);
        let mut before = 0;
        for (KeyGroup(group), rows) in groups {
            varint(u128::from(group - before), out);
            varint(u128::from(*rows), out);
            before = *group;
        }
    }

    /// Reads numbers back for a namespace of so many rows.
    ///
    /// # Errors
    /// `Corrupt` if they are none that [`Stored::write`] wrote, or do not come to that.
    pub(crate) fn read(rows: u64, from: &mut &[u8]) -> Result<Self> {
        let groups =
            read_groups(from).ok_or_else(|| Error::corrupt("the rows of key groups are cut or out of order"))?;
        let sum = groups.iter().try_fold(0_u64, |sum, (_, rows)| sum.checked_add(*rows));
        if sum != Some(rows) {
            return Err(Error::corrupt(format!("the rows of key groups do not come to the {rows} of their namespace")));
        }
        Ok(Self { rows, by_group: Some(groups) })
    }
}

fn read_groups(from: &mut &[u8]) -> Option<Vec<(KeyGroup, u64)>> {
    let mut groups: Vec<(KeyGroup, u64)> = Vec::new();
    for _ in 0..take_varint(from)? {
        let step = u16::try_from(take_varint(from)?).ok()?;
        let group = match groups.last() {
            Some((KeyGroup(before), _)) => before.checked_add(step).filter(|_| step > 0)?,
            None => step,
        };
        let rows = u64::try_from(take_varint(from)?).ok().filter(|rows| *rows > 0)?;
        groups.push((KeyGroup(group), rows));
    }
    Some(groups)
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::Disposition;

    use super::*;

    fn stored(groups: &[(u16, u64)]) -> Stored {
        let mut stored = Stored::none(true);
        groups.iter().for_each(|(group, rows)| stored.add(KeyGroup(*group), *rows));
        stored
    }

    fn range(first: u16, last: u16) -> KeyGroupRange {
        KeyGroupRange { first: KeyGroup(first), last: KeyGroup(last) }
    }

    #[test]
    fn rows_of_key_groups_add_up_whatever_comes_and_goes() {
        let (mut stored, mut expected) = (Stored::none(true), BTreeMap::<u16, u64>::new());
        let mut state: u64 = 7;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let group = (state >> 33) as u16 % 20;
            let rows = expected.entry(group).or_default();
            if state >> 63 == 0 || *rows == 0 {
                stored.add(KeyGroup(group), 1);
                *rows += 1;
            } else {
                stored.remove(KeyGroup(group));
                *rows -= 1;
            }
        }
        let part = |of: KeyGroupRange| expected.range(of.first.0..=of.last.0).map(|(_, rows)| rows).sum::<u64>();
        for range in [range(0, 19), range(0, 0), range(3, 11), range(19, 500), range(20, 500)] {
            assert_eq!(stored.within(range).map(|s| s.rows()), Some(part(range)), "{range}");
        }
        assert_eq!(stored.within(range(0, u16::MAX)), Some(stored));
    }

    #[test]
    fn what_is_not_counted_by_key_group_stays_so() {
        let mut all = stored(&[(1, 5)]);
        all.add_all(&stored(&[(0, 2), (1, 3)]));
        assert_eq!(all, stored(&[(0, 2), (1, 8)]));
        all.add_all(&Stored::of_any_group(4));
        all.add(KeyGroup(1), 1);
        all.remove(KeyGroup(1));
        assert_eq!((all.rows(), all.within(range(0, 9))), (14, None));
        let mut never = Stored::none(false);
        never.add_all(&stored(&[(0, 2)]));
        assert_eq!((never.rows(), never.within(range(0, 9))), (2, None));
        // A row that nobody knew of shows that the others can't be trusted.
        let mut wrong = stored(&[(1, 5)]);
        wrong.remove(KeyGroup(2));
        assert_eq!(wrong.within(range(0, 9)), None);
    }

    #[test]
    fn numbers_are_kept_of_so_many_namespaces_that_there_is_a_bound() {
        let mut counts = Counts::none(range(0, 63));
        (0..1_000_i64).for_each(|namespace| (0..64).for_each(|group| counts.add(KeyGroup(group), namespace)));
        let all = counts.finish();
        assert!(all.values().all(|stored| stored.rows() == 64));
        assert_eq!(all.values().filter(|stored| stored.is_by_group()).count(), NUMBERS_MAX / 64);
        assert_eq!(
            all.values().filter_map(|stored| stored.by_group.as_ref()).map(Vec::len).sum::<usize>(),
            NUMBERS_MAX
        );
    }

    #[test]
    fn they_come_back_and_others_are_refused() {
        for groups in [&[][..], &[(0, 1)], &[(0, 1), (1, 300), (500, u64::MAX - 301)], &[(u16::MAX, 2)]] {
            let stored = stored(groups);
            let mut bytes = Vec::new();
            stored.write(&mut bytes);
            let mut rest = &bytes[..];
            assert_eq!((Stored::read(stored.rows(), &mut rest).unwrap(), rest), (stored.clone(), &[][..]));
            let refused = |rows: u64, mut bytes: &[u8]| Stored::read(rows, &mut bytes).unwrap_err().disposition();
            assert_eq!(refused(stored.rows() ^ 1, &bytes), Disposition::Corrupt);
            for cut in 0..bytes.len() {
                assert_eq!(refused(stored.rows(), &bytes[..cut]), Disposition::Corrupt, "{groups:?} cut at {cut}");
            }
        }
        for (bytes, what) in [
            (&[2, 4, 1, 0, 1][..], "the same key group twice"),
            (&[1, 0x80, 0x80, 4, 2], "a key group above all"),
            (&[2, 1, 2, 1, 0], "a key group without rows"),
        ] {
            assert!(Stored::read(2, &mut &bytes[..]).is_err(), "{what}");
        }
        let too_many = [2, 0, 1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
        assert!(Stored::read(0, &mut &too_many[..]).is_err(), "more rows than there are numbers");
    }
}
