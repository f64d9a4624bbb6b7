//! Rows in the format that any back end reads ([`floodmark_state::neutral`]): out of a checkpoint, and through the cache in again.

use std::path::Path;

use bytes::Bytes;
use floodmark_snapshot::{Error, KeyGroup, KeyGroupRange, Result};
use floodmark_state::{
    KeyGroupWatermarks, KeyedState, NO_SLOT, RestoredShard, RowKeys, Rows, StateSpec,
    neutral::{PAGE_ROWS, Page as NeutralPage, Pages, RowWriter},
    shard::Header,
};

use crate::{
    database, key,
    options::Shared,
    row::Form,
    state::{Page, State},
};

/// Reads all rows of a checkpoint out into one shard.
pub(crate) fn write(
    shared: &Shared,
    place: &Path,
    spec: &StateSpec,
    form: &Form,
    watermarks: &KeyGroupWatermarks,
) -> Result<Bytes> {
    let db = database::open_to_read(shared, place)?;
    let mut page = Page::new(form.clone());
    let mut writer = RowWriter::new(spec, Header::new(None).at(watermarks), page.written());
    let mut at = None;
    let mut turn = |page: &mut Page, at: Option<(KeyGroup, i64)>| {
        let Some((group, namespace)) = at else { return Ok(()) };
        page.turn(&mut |rows, slots| writer.push(group, namespace, rows, slots, false))
    };
    let (start, end) = (key::group_start(spec.key_groups.first), key::group_end(spec.key_groups.last));
    database::scan(&db, &start, end, |row_key, value| {
        let (group, namespace, row_key) = key::parse(row_key)
            .ok_or_else(|| Error::corrupt("a key of the database is not in the form in which keys are written"))?;
        if at.is_some_and(|at| at != (group, namespace)) || page.len() >= PAGE_ROWS {
            turn(&mut page, at)?;
        }
        at = Some((group, namespace));
        page.add(form.head(value)?, row_key, value)?;
        Ok(true)
    })?;
    turn(&mut page, at)?;
    writer.finish()
}

/// Takes in a neutral shard.
pub(crate) fn take_in(state: &mut State, shard: &RestoredShard) -> Result<()> {
    let spec = state.spec.clone();
    let pages = Pages::open(&spec, shard)?;
    let header = pages.header();
    let of = &shard.shard;
    state.restoring.watermarks.shard(of.subtask, of.layer, of.key_groups, header.watermarks()?);
    let theirs = of.key_groups.unwrap_or(spec.key_groups);
    for namespace in &header.dropped {
        state.drop_part(*namespace, theirs)?;
    }
    pages.each(|page| state.take_page(&page))
}

fn picked<'a>(keys: &'a RowKeys, rows: &[u32]) -> (Vec<u64>, Vec<&'a [u8]>) {
    (
        rows.iter().map(|row| keys.hashes[*row as usize]).collect(),
        rows.iter().map(|row| keys.key(*row as usize)).collect(),
    )
}

impl State {
    fn take_page(&mut self, page: &NeutralPage) -> Result<()> {
        for (namespace, rows) in page.by_namespace(true) {
            let (hashes, keys) = picked(&page.keys, &rows);
            self.remove_keys(namespace, &hashes, &keys)?;
        }
        let now = self.now();
        for (namespace, mut rows) in page.by_namespace(false) {
            if let Some(written) = &page.written {
                rows.retain(|row| !self.expired(written.value(*row as usize), now));
            }
            self.put_rows(namespace, page, &rows)?;
        }
        Ok(())
    }

    fn put_rows(&mut self, namespace: i64, page: &NeutralPage, rows: &[u32]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let layout = self.spec.layout.clone();
        let (hashes, keys) = picked(&page.keys, rows);
        let slots = self.slots(namespace, &hashes, &keys)?;
        let table = self.table(namespace);
        // A layer replaces rows of those below; new ones are null already.
        if slots.new.len() < slots.at.len() {
            slots.at.iter().for_each(|slot| table.clear(*slot));
        }
        layout.fill(&page.taken(rows)?, table, &slots.at)?;
        if let Some(written) = &page.written
            && let Some(cache) = self.spaces.get_mut(&namespace).and_then(|s| s.cache.as_mut())
        {
            slots.at.iter().zip(rows).for_each(|(slot, row)| cache.set_written(*slot, written.value(*row as usize)));
        }
        Ok(())
    }

    /// Removes the rows of these keys, if there are any.
    fn remove_keys(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<()> {
        let mut slots = self.find(namespace, hashes, keys)?;
        slots.retain(|slot| *slot != NO_SLOT);
        slots.sort_unstable();
        slots.dedup();
        self.remove(namespace, &slots)
    }

    /// Drops what a namespace has in these key groups: what one earlier subtask had.
    fn drop_part(&mut self, namespace: i64, groups: KeyGroupRange) -> Result<()> {
        let mine = self.spec.key_groups;
        if groups.first <= mine.first && mine.last <= groups.last {
            return self.drop_namespace(namespace);
        }
        let mut over = RowKeys::default();
        let max_parallelism = self.spec.max_parallelism;
        self.scan(namespace, &mut |rows: &Rows, slots: &[u32]| {
            let theirs = slots.iter().filter(|s| groups.contains(KeyGroup::of(rows.hash(**s), max_parallelism)));
            theirs.for_each(|slot| over.push(namespace, rows.hash(*slot), rows.key(*slot)));
            Ok(())
        })?;
        let all: Vec<u32> = (0..over.len() as u32).collect();
        for rows in all.chunks(PAGE_ROWS) {
            let (hashes, keys) = picked(&over, rows);
            self.remove_keys(namespace, &hashes, &keys)?;
        }
        Ok(())
    }
}
