//! Brings the rows of shards in.
//!
//! Of shards that come together, the newest layer is taken first: the first row of a key stands, and what is below it is passed
//! over, so that nothing is written twice. Those that come one by one begin with the lowest, and their rows replace what is there.
//! Invariant: either way the rows are those of the layers applied from the bottom.

use std::collections::{BTreeMap, BTreeSet};

use floodmark_snapshot::{Error, KeyGroup, KeyGroupRange, Result, Shard};

use super::{Expiry, HeapState};
use crate::{
    keyed::{NO_SLOT, RowKeys, StateSpec},
    neutral::{Page, Pages},
    snapshot::RestoredShard,
    table::{Column, Table},
};

/// Rows for which room is made before they are there, at most.
const RESERVED_MAX: u64 = 1 << 26;

/// A shard whose header has been read.
struct Opened<'a> {
    shard: &'a RestoredShard,
    pages: Pages<'a>,
    /// Nothing of it has been taken in before.
    new: bool,
}

/// What layers above have done to rows of those below.
#[derive(Default)]
struct Above {
    dropped: BTreeSet<i64>,
    /// Keys without a row, by namespace.
    gone: BTreeMap<i64, Table>,
    /// Those of the present layer, whose own rows they don't hide.
    present: RowKeys,
}

impl Above {
    fn hides(&self, namespace: i64, hash: u64, key: &[u8]) -> bool {
        self.gone.get(&namespace).is_some_and(|gone| gone.find(hash, key).is_some())
    }

    /// The present layer is done.
    fn end(&mut self, dropped: &[i64]) {
        self.dropped.extend(dropped);
        let present = std::mem::take(&mut self.present);
        for row in 0..present.len() {
            let gone = self.gone.entry(present.namespaces[row]).or_insert_with(|| Table::new(Vec::new()));
            gone.slot(present.hashes[row], present.key(row));
        }
    }
}

impl HeapState {
    /// Takes in a shard that is above all that were taken in of its subtask.
    pub(super) fn take_in(&mut self, shard: &RestoredShard) -> Result<()> {
        let spec = self.spec.clone();
        let opened = self.open(&spec, shard)?;
        if shard.shard.layer > 0 {
            self.drop_parts(&opened);
        }
        let mut expected = if shard.shard.layer == 0 { self.expected(&opened) } else { 0 };
        self.take(&opened, &mut expected, None)
    }

    /// Takes in shards.
    pub(super) fn take_in_together(&mut self, shards: &[RestoredShard]) -> Result<()> {
        let spec = self.spec.clone();
        let mut by_subtask: BTreeMap<u32, Vec<&RestoredShard>> = BTreeMap::new();
        shards.iter().for_each(|shard| by_subtask.entry(shard.shard.subtask).or_default().push(shard));
        for mut layers in by_subtask.into_values() {
            layers.sort_by_key(|shard| shard.shard.layer);
            if !begins_anew(&layers, spec.key_groups) {
                // There may be rows that these replace.
                layers.into_iter().try_for_each(|shard| self.take_in(shard))?;
                continue;
            }
            let opened: Vec<Opened<'_>> =
                layers.into_iter().map(|shard| self.open(&spec, shard)).collect::<Result<_>>()?;
            let mut above = Above::default();
            let lowest = opened.iter().filter(|opened| opened.shard.shard.layer == 0);
            let mut expected = lowest.map(|lowest| self.expected(lowest)).sum();
            for layer in opened.iter().rev() {
                self.take(layer, &mut expected, Some(&mut above))?;
                above.end(&layer.pages.header().dropped);
            }
        }
        Ok(())
    }

    fn open<'a>(&mut self, spec: &'a StateSpec, shard: &'a RestoredShard) -> Result<Opened<'a>> {
        let pages = Pages::open(spec, shard)?;
        let (header, layer) = (pages.header(), shard.shard.layer);
        if header.layer != layer {
            return Err(Error::corrupt(format!(
                "shard {} is layer {} instead of {layer}",
                shard.shard.path, header.layer
            )));
        }
        let new = self.restoring.shard(spec, shard, header, pages.same_columns())?;
        self.begin(self.restoring.interval());
        Ok(Opened { shard, pages, new })
    }

    /// Drops, of the namespaces that a layer says, what the layers below had there.
    fn drop_parts(&mut self, opened: &Opened<'_>) {
        let owned = self.spec.key_groups;
        let of_shard = opened.shard.shard.key_groups.unwrap_or(owned);
        let of_slice = opened.shard.slice.unwrap_or(owned);
        for namespace in opened.pages.header().dropped.iter().copied().collect::<BTreeSet<i64>>() {
            let Some(table) = self.tables.get(&namespace) else { continue };
            let rows = table.rows();
            let of = |slot: &u32| {
                let group = KeyGroup::of(rows.hash(*slot), self.spec.max_parallelism);
                of_shard.contains(group) && of_slice.contains(group)
            };
            let slots: Vec<u32> = rows.slots().filter(of).collect();
            self.vacate(namespace, &slots);
        }
    }

    /// How many rows will come, about. The first slice tells for all: an index that grows is made anew from time to time.
    fn expected(&self, lowest: &Opened<'_>) -> usize {
        let all = if lowest.new { rows_of(&lowest.shard.shard, self.spec.key_groups) } else { 0 };
        all.max(lowest.pages.rows()).min(RESERVED_MAX) as usize
    }

    /// Takes the rows of a shard in: those that nothing `above` hides or, if what is below is there already, in its place. Makes
    /// room for those `expected` first, if they seem to be of one namespace.
    fn take(&mut self, opened: &Opened<'_>, expected: &mut usize, mut above: Option<&mut Above>) -> Result<()> {
        let layer = opened.shard.shard.layer;
        let now = self.now();
        opened.pages.each(|page| {
            if let [first, .., last] = page.keys.namespaces[..] {
                let rows = std::mem::take(expected);
                if rows > 0 && first == last {
                    self.table_of(first).reserve(rows);
                }
            }
            self.take_page(&page, layer, now, above.as_deref_mut())
        })
    }

    fn take_page(&mut self, page: &Page, layer: u32, now: i64, mut above: Option<&mut Above>) -> Result<()> {
        for (namespace, rows) in page.by_namespace(true) {
            let (hashes, keys) = places(page, &rows);
            self.restoring.removed(layer, namespace, &hashes, &keys);
            self.hide(namespace, &hashes, &keys, above.as_deref_mut());
        }
        let written = |row: u32| page.written.as_ref().map_or(now, |w| w.value(row as usize));
        for (namespace, mut rows) in page.by_namespace(false) {
            if let Some(expiry) = self.expiry {
                let (old, young) = rows.into_iter().partition(|row| expiry.is_over(Some(written(*row)), now));
                rows = young;
                if layer > 0 {
                    // A row that is too old stands for its key all the same.
                    let (hashes, keys) = places(page, &old);
                    self.hide(namespace, &hashes, &keys, above.as_deref_mut());
                }
            }
            match above.as_deref() {
                Some(above) => self.add_rows(page, namespace, rows, layer, above, written)?,
                None => self.put_rows(page, namespace, &rows, layer, written)?,
            }
        }
        Ok(())
    }

    /// Keys have no row in a layer: nor below.
    fn hide(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]], above: Option<&mut Above>) {
        match above {
            Some(above) => {
                hashes.iter().zip(keys).for_each(|(hash, key)| above.present.push(namespace, *hash, key));
            }
            None => {
                let mut slots = self.find_all(namespace, hashes, keys);
                slots.retain(|slot| *slot != NO_SLOT);
                self.vacate(namespace, &slots);
            }
        }
    }

    /// Puts rows in the place of those below.
    fn put_rows(
        &mut self,
        page: &Page,
        namespace: i64,
        rows: &[u32],
        layer: u32,
        written: impl Fn(u32) -> i64,
    ) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let (hashes, keys) = places(page, rows);
        self.fill(page, namespace, rows, layer, written, |table| table.load(&hashes, &keys))
    }

    /// Adds rows that are in no layer above.
    fn add_rows(
        &mut self,
        page: &Page,
        namespace: i64,
        mut rows: Vec<u32>,
        layer: u32,
        above: &Above,
        written: impl Fn(u32) -> i64,
    ) -> Result<()> {
        if above.dropped.contains(&namespace) {
            return Ok(());
        }
        if above.gone.contains_key(&namespace) {
            let keys = &page.keys;
            rows.retain(|row| !above.hides(namespace, keys.hashes[*row as usize], keys.key(*row as usize)));
        }
        let (mut hashes, mut keys) = places(page, &rows);
        // All are looked up before any is added, so that the memory of one is fetched while that of others is waited for.
        let found = self.find_all(namespace, &hashes, &keys);
        if found.iter().any(|slot| *slot != NO_SLOT) {
            let mut absent = found.iter().map(|slot| *slot == NO_SLOT);
            rows.retain(|_| absent.next().unwrap_or(false));
            (hashes, keys) = places(page, &rows);
        }
        if rows.is_empty() {
            return Ok(());
        }
        self.fill(page, namespace, &rows, layer, written, |table| table.add(&hashes, &keys))
    }

    /// Fills rows of nulls, whose slots `place` says, as of the interval of a layer.
    fn fill(
        &mut self,
        page: &Page,
        namespace: i64,
        rows: &[u32],
        layer: u32,
        written: impl Fn(u32) -> i64,
        place: impl FnOnce(&mut Table) -> Vec<u32>,
    ) -> Result<()> {
        let (layout, expiry) = (self.spec.layout.clone(), self.expiry);
        let taken = page.taken(rows)?;
        self.table_of(namespace).in_interval(layer, |table| {
            let slots = place(table);
            if let Some(Expiry { column, .. }) = expiry {
                table.write_runs(&slots, column, |column, places, at| {
                    if let Column::Long(values) = column {
                        let of_run = places.iter().zip(&rows[at..]);
                        of_run.for_each(|(place, row)| values[*place as usize] = Some(written(*row)));
                    }
                });
            }
            layout.fill(&taken, table, &slots)
        })
    }
}

/// Whether of each of these shards that is a layer above others, all that is below it is among them. They are in the order of
/// their layers.
fn begins_anew(layers: &[&RestoredShard], owned: KeyGroupRange) -> bool {
    let of = |shard: &Shard| shard.key_groups.unwrap_or(owned).common(&owned);
    let (lowest, above): (Vec<_>, Vec<_>) = layers.iter().map(|l| &l.shard).partition(|shard| shard.layer == 0);
    let mut there: Vec<KeyGroupRange> = lowest.into_iter().filter_map(of).collect();
    there.sort_by_key(|groups| groups.first);
    above.into_iter().filter_map(of).all(|groups| {
        // The first that is not known to be there.
        let mut next = u32::from(groups.first.0);
        for part in &there {
            if u32::from(part.first.0) <= next {
                next = next.max(u32::from(part.last.0) + 1);
            }
        }
        next > u32::from(groups.last.0)
    })
}

/// How many rows of a shard are in key groups, about.
fn rows_of(shard: &Shard, owned: KeyGroupRange) -> u64 {
    shard.cut_to(owned).map_or(0, |own| own.rows)
}

/// The hashes and keys of some rows of a page.
fn places<'a>(page: &'a Page, rows: &[u32]) -> (Vec<u64>, Vec<&'a [u8]>) {
    rows.iter().map(|row| (page.keys.hashes[*row as usize], page.keys.key(*row as usize))).unzip()
}
