//! Rows in the format that any back end reads ([`floodmark_state::neutral`]): out of a checkpoint, and in again. Rows that
//! don't fit into memory go to files that the database takes in; others, and layers that replace some, go through the cache.

use std::sync::Arc;

use bytes::Bytes;
use floodmark_snapshot::{Error, KeyGroup, KeyGroupRange, Result, ShardKind};
use floodmark_state::{
    KeyGroupWatermarks, KeyedState, NO_SLOT, PendingShard, RestoredShard, RowKeys, Rows, StateSpec, Table,
    neutral::{PAGE_ROWS, Page as NeutralPage, Pages, RowWriter},
    shard::Header,
};

use rocksdb::DB;

use crate::{
    Process, database,
    files::Files,
    folder::Folder,
    key, options,
    row::Form,
    state::{Page, State},
};

/// A neutral shard has rows of about this many bytes: an upload holds as much of it in memory as of a data file.
pub(crate) const SHARD_BYTES: u64 = options::FILE_BYTES;
/// What a value of a row takes beside its bytes in the database, at most, about.
const VALUE_BYTES: u64 = 8;

/// A checkpoint whose rows are read out.
pub(crate) struct Source {
    // Closed before its folder goes.
    db: DB,
    spec: StateSpec,
    form: Form,
    watermarks: KeyGroupWatermarks,
    /// The checkpoint's folder, and what must outlive it.
    _folders: (Folder, Arc<Folder>, Arc<Process>),
}

/// Rows that become one shard: those between two keys of the database.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    key_groups: KeyGroupRange,
    start: Vec<u8>,
    end: Vec<u8>,
    rows: u64,
}

impl Source {
    /// Opens a checkpoint: its folder, that of the database, and what else it needs.
    pub(crate) fn open(
        folders: (Folder, Arc<Folder>, Arc<Process>),
        spec: StateSpec,
        form: Form,
        watermarks: KeyGroupWatermarks,
    ) -> Result<Self> {
        let db = database::open_to_read(&folders.2.shared, folders.0.path())?;
        Ok(Self { db, spec, form, watermarks, _folders: folders })
    }

    /// All rows, as shards of bounded size, each made when it is asked for.
    pub(crate) fn shards(self, shard_bytes: u64) -> Result<Vec<PendingShard>> {
        let parts = self.parts(shard_bytes)?;
        let source = Arc::new(self);
        let pending = |part: Part| {
            let source = source.clone();
            let (key_groups, rows, name) = (Some(part.key_groups), part.rows, source.spec.shard_name());
            let encode = Box::new(move || source.write(&part));
            PendingShard { name, ..PendingShard::new(ShardKind::Keyed, key_groups, rows, encode) }
        };
        Ok(parts.into_iter().map(pending).collect())
    }

    /// Cuts the rows, also inside of a key group. Together the parts cover all key groups of the subtask, those without rows
    /// too.
    fn parts(&self, shard_bytes: u64) -> Result<Vec<Part>> {
        let all = self.spec.key_groups;
        let columns = self.form.types.len() as u64;
        let (mut parts, mut bytes, mut last) = (Vec::new(), 0, all.first);
        let (start, end) = (key::group_start(all.first), key::group_end(all.last));
        let mut part = Part { key_groups: all, start: start.clone(), end: end.clone(), rows: 0 };
        database::scan(&self.db, &start, end, |row_key, value| {
            let (group, _, _) = key::parse(row_key).ok_or_else(not_ours)?;
            let row = (row_key.len() + value.len()) as u64 + columns * VALUE_BYTES;
            if part.rows > 0 && bytes + row > shard_bytes {
                let first = if group == last { group } else { KeyGroup(last.0 + 1) };
                let next = Part {
                    key_groups: KeyGroupRange { first, ..all },
                    start: row_key.to_vec(),
                    rows: 0,
                    ..part.clone()
                };
                let done = std::mem::replace(&mut part, next);
                let key_groups = KeyGroupRange { last, ..done.key_groups };
                parts.push(Part { key_groups, end: row_key.to_vec(), ..done });
                bytes = 0;
            }
            part.rows += 1;
            bytes += row;
            last = group;
            Ok(true)
        })?;
        parts.push(part);
        Ok(parts)
    }

    /// Reads a part out.
    fn write(&self, part: &Part) -> Result<Bytes> {
        let mut page = Page::new(self.form.clone());
        let header = Header::new(None).at(&self.watermarks.within(part.key_groups));
        let mut writer = RowWriter::new(&self.spec, header, page.written());
        let mut at = None;
        let mut turn = |page: &mut Page, at: Option<(KeyGroup, i64)>| {
            let Some((group, namespace)) = at else { return Ok(()) };
            page.turn(&mut |rows, slots| writer.push(group, namespace, rows, slots, false))
        };
        database::scan(&self.db, &part.start, part.end.clone(), |row_key, value| {
            let (group, namespace, row_key) = key::parse(row_key).ok_or_else(not_ours)?;
            if at.is_some_and(|at| at != (group, namespace)) || page.len() >= PAGE_ROWS {
                turn(&mut page, at)?;
            }
            at = Some((group, namespace));
            page.add(row_key, value)?;
            Ok(true)
        })?;
        turn(&mut page, at)?;
        writer.finish()
    }
}

/// A key that is none of ours.
pub(crate) fn not_ours() -> Error {
    Error::corrupt("a key of the database is not in the form in which keys are written")
}

/// Takes in a neutral shard.
pub(crate) fn take_in(state: &mut State, shard: &RestoredShard) -> Result<()> {
    let spec = state.spec.clone();
    let pages = Pages::open(&spec, shard)?;
    let header = pages.header();
    let of = &shard.shard;
    state.restoring.watermarks.shard(of.subtask, of.layer, of.key_groups, header.watermarks()?);
    let theirs = of.key_groups.unwrap_or(spec.key_groups);
    let of_slice = shard.slice.unwrap_or(spec.key_groups);
    let Some(theirs) = theirs.common(&of_slice) else { return Ok(()) };
    // What fits stays in memory, with room for others.
    let fits = state.cached_bytes + shard.content.size() <= state.share.bytes() / 2;
    if of.layer == 0 && !fits {
        let mut files = Files::new(state);
        pages.each(|page| state.write_page(&page, &mut files))?;
        return state.ingest(files);
    }
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

    /// Writes rows to files. Nothing is below them.
    fn write_page(&self, page: &NeutralPage, files: &mut Files) -> Result<()> {
        let now = self.now();
        let written = |row: u32| page.written.as_ref().map_or(now, |w| w.value(row as usize));
        for (namespace, mut rows) in page.by_namespace(false) {
            rows.retain(|row| !self.expired(written(*row), now));
            let (hashes, keys) = picked(&page.keys, &rows);
            let mut table = Table::new(self.form.types.clone());
            let slots = table.add(&hashes, &keys);
            self.spec.layout.fill(&page.taken(&rows)?, &mut table, &slots)?;
            for (at, slot) in slots.iter().enumerate() {
                let (chunk, place) = table.rows().read(*slot as usize);
                let group = self.group(hashes[at]);
                files.put(
                    (group, namespace),
                    |out| key::write(out, group, namespace, keys[at]),
                    |out| {
                        self.form.write(chunk, place, written(rows[at]), out);
                        Ok(())
                    },
                )?;
            }
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
