//! A table of accumulators by key, in chunks behind `Arc`. Pure: no I/O.
//!
//! A row has a number (its slot) as long as nobody asks for it anew; a chunk holds [`CHUNK_ROWS`] slots. A snapshot is
//! O(chunks): it clones the pointers. While somebody holds a snapshot, a row of it that is about to be written is *moved*: to a
//! chunk that nobody else holds, so that a write after a barrier costs one row, not a chunk. The places that are left behind
//! are filled again from the end of the table once the snapshot is gone ([`Table::compact`]).
//!
//! Every row says in which interval it was last written (its *stamp*, a number that the owner sets), and every chunk the
//! greatest stamp of its rows: what has changed since some barrier is found without looking at all rows.
//!
//! An index finds the slot of a key. What costs time there is memory that is far away, so a restore has many keys looked up at
//! once ([`Table::load`]).

use std::{collections::VecDeque, sync::Arc};

use hashbrown::{HashTable, hash_table::Entry};

pub use self::chunk::{Chunk, Column, ColumnType};

mod chunk;

/// Slots of a chunk.
pub const CHUNK_ROWS: usize = 1024;
const WORDS: usize = CHUNK_ROWS / 64;
/// Places in chunks that snapshots hold, before such chunks are copied to get at the places: one in this many rows.
const LIMBO_SHARE: usize = 4;
/// Chunks looked at to tell how many bytes a table has.
const CHUNKS_SAMPLED: usize = 32;

/// Where the index looks for a key. The lowest bits of the hashes are much alike: they say the key group, of which a subtask
/// has some only, and rows are restored group by group.
#[inline]
fn spread(hash: u64) -> u64 {
    hash.rotate_right(20)
}

/// Which slots of a chunk are in use.
type Live = [u64; WORDS];

/// Rows as they are, or were at one moment: what a [`Table`] keeps, and what a snapshot of it holds on to.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    chunks: Vec<Arc<Chunk>>,
    live: Vec<Live>,
    rows: usize,
}

impl Rows {
    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// The slots that have a row, in order.
    pub fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.chunks.len()).flat_map(|chunk| self.slots_of(chunk))
    }

    /// Of [`Rows::slots`], those from this one on.
    pub fn slots_from(&self, first: u32) -> impl Iterator<Item = u32> + '_ {
        (first as usize / CHUNK_ROWS..self.chunks.len())
            .flat_map(|chunk| self.slots_of(chunk))
            .filter(move |slot| *slot >= first)
    }

    /// Of [`Rows::slots`], those whose row was written in an interval after `stamp`.
    pub fn changed_since(&self, stamp: u32) -> impl Iterator<Item = u32> + '_ {
        let chunks = (0..self.chunks.len()).filter(move |chunk| self.chunks[*chunk].newest() > stamp);
        chunks.flat_map(|chunk| self.slots_of(chunk)).filter(move |slot| self.stamp(*slot) > stamp)
    }

    /// The slots that have a row, at most `rows` of them at a time.
    pub fn pages(&self, rows: usize) -> impl Iterator<Item = Vec<u32>> + '_ {
        let mut slots = self.slots();
        std::iter::from_fn(move || Some(slots.by_ref().take(rows).collect::<Vec<_>>()).filter(|page| !page.is_empty()))
    }

    fn slots_of(&self, chunk: usize) -> impl Iterator<Item = u32> + '_ {
        let bits = move |(word, bits): (usize, &u64)| {
            let first = (chunk * CHUNK_ROWS + word * 64) as u32;
            let left = std::iter::successors(Some(*bits), |left| Some(left & left.wrapping_sub(1)));
            left.take_while(|left| *left != 0).map(move |left| first + left.trailing_zeros())
        };
        self.live[chunk].iter().enumerate().flat_map(bits)
    }

    /// The chunk of a slot, and the row in it.
    #[inline]
    #[must_use]
    pub fn read(&self, slot: usize) -> (&Chunk, usize) {
        (&self.chunks[slot / CHUNK_ROWS], slot % CHUNK_ROWS)
    }

    /// Whether the row in a slot is that of a key.
    #[inline]
    fn is(&self, slot: u32, hash: u64, key: &[u8]) -> bool {
        let (chunk, row) = self.read(slot as usize);
        chunk.hash(row) == hash && chunk.key(row) == key
    }

    /// The hash of the key of a row.
    #[inline]
    #[must_use]
    pub fn hash(&self, slot: u32) -> u64 {
        let (chunk, row) = self.read(slot as usize);
        chunk.hash(row)
    }

    /// The encoded key of a row.
    #[inline]
    #[must_use]
    pub fn key(&self, slot: u32) -> &[u8] {
        let (chunk, row) = self.read(slot as usize);
        chunk.key(row)
    }

    /// The interval in which a row was last written.
    #[inline]
    #[must_use]
    pub fn stamp(&self, slot: u32) -> u32 {
        let (chunk, row) = self.read(slot as usize);
        chunk.stamp(row)
    }

    /// A value of a [`ColumnType::Long`] column.
    #[inline]
    #[must_use]
    pub fn long(&self, slot: usize, column: usize) -> Option<i64> {
        let (chunk, row) = self.read(slot);
        match &chunk.columns[column] {
            Column::Long(values) => values[row],
            Column::Double(_) | Column::Wide(_) | Column::Bytes(_) => None,
        }
    }

    /// A value of a [`ColumnType::Bytes`] column.
    #[inline]
    #[must_use]
    pub fn bytes(&self, slot: usize, column: usize) -> Option<&[u8]> {
        let (chunk, row) = self.read(slot);
        match &chunk.columns[column] {
            Column::Bytes(values) => values[row].as_deref(),
            Column::Long(_) | Column::Double(_) | Column::Wide(_) => None,
        }
    }
}

/// The table. See the header of this file.
#[derive(Debug)]
pub struct Table {
    types: Vec<ColumnType>,
    index: HashTable<u32>,
    rows: Rows,
    stamp: u32,
    /// Rows written for the first time since [`Table::begin`].
    written: u64,
    /// Places in chunks that nobody else holds. Some may be used again already, or gone: see [`is_vacant`].
    free: Vec<u32>,
    /// Places in chunks that a snapshot held when they were left.
    limbo: VecDeque<u32>,
}

impl Table {
    /// An empty table with these columns, in interval 0.
    #[must_use]
    pub fn new(types: Vec<ColumnType>) -> Self {
        Self {
            types,
            index: HashTable::new(),
            rows: Rows::default(),
            stamp: 0,
            written: 0,
            free: Vec::new(),
            limbo: VecDeque::new(),
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.rows
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// About how many bytes the rows take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let chunks = &self.rows.chunks;
        let step = chunks.len().div_ceil(CHUNKS_SAMPLED).max(1);
        let sampled = chunks.iter().step_by(step);
        let bytes: usize = sampled.clone().map(|c| c.bytes()).sum();
        bytes * chunks.len() / sampled.len().max(1) + self.index.capacity() * 5
    }

    /// Makes room for this many more keys in the index.
    pub fn reserve(&mut self, keys: usize) {
        let rows = &self.rows;
        self.index.reserve(keys, |slot| spread(rows.hash(*slot)));
    }

    /// Begins an interval: rows written from now on bear this stamp, which must be greater than those before. Answers how
    /// many rows were written in the one that ends.
    pub fn begin(&mut self, stamp: u32) -> u64 {
        self.stamp = stamp;
        std::mem::take(&mut self.written)
    }

    /// The slot of a key whose row will be written; a new key gets a row of nulls. True if it is new. The slots of other keys
    /// stay as they are.
    #[inline]
    pub fn slot(&mut self, hash: u64, key: &[u8]) -> (u32, bool) {
        let Some(slot) = self.find(hash, key) else {
            let slot = self.free_place().unwrap_or_else(|| self.next_place());
            self.place(slot, hash, key, self.stamp);
            self.written += 1;
            let rows = &self.rows;
            self.index.insert_unique(spread(hash), slot, |slot| spread(rows.hash(*slot)));
            return (slot, true);
        };
        let chunk = slot as usize / CHUNK_ROWS;
        // The last chunk is copied at the first write into it, so a row of it stays where it is.
        if Arc::strong_count(&self.rows.chunks[chunk]) > 1 && chunk + 1 < self.rows.chunks.len() {
            return (self.displace(slot), false);
        }
        (slot, false)
    }

    /// The slot of a key, if it has a row. To be read: a write to it may copy a chunk.
    #[inline]
    #[must_use]
    pub fn find(&self, hash: u64, key: &[u8]) -> Option<u32> {
        self.index.find(spread(hash), |slot| self.rows.is(*slot, hash, key)).copied()
    }

    /// The slots of some keys that are about to get other rows: all columns are null.
    pub fn load(&mut self, hashes: &[u64], keys: &[&[u8]]) -> Vec<u32> {
        // First all are looked up, so that the memory of one is fetched while that of others is waited for.
        let found: Vec<Option<u32>> = hashes.iter().zip(keys).map(|(hash, key)| self.find(*hash, key)).collect();
        let mut known: Vec<u32> = found.iter().copied().flatten().collect();
        if known.is_empty() {
            return self.add(hashes, keys);
        }
        known.sort_unstable();
        self.clear_all(&known);
        let new = (0..keys.len()).filter(|row| found[*row].is_none());
        let (new_hashes, new_keys): (Vec<u64>, Vec<&[u8]>) = new.map(|row| (hashes[row], keys[row])).unzip();
        let mut new = self.add(&new_hashes, &new_keys).into_iter();
        found.into_iter().filter_map(|slot| slot.or_else(|| new.next())).collect()
    }

    /// The slots of new rows of nulls, for keys that have none.
    pub fn add(&mut self, hashes: &[u64], keys: &[&[u8]]) -> Vec<u32> {
        self.reserve(hashes.len());
        let first = self.append(hashes, keys);
        let places = hashes.iter().zip(keys).zip(first..);
        let mut slots = Vec::with_capacity(keys.len());
        for ((hash, key), place) in places {
            let rows = &self.rows;
            let entry = self.index.entry(spread(*hash), |s| rows.is(*s, *hash, key), |s| spread(rows.hash(*s)));
            slots.push(match entry {
                Entry::Vacant(entry) => *entry.insert(place).get(),
                Entry::Occupied(entry) => {
                    let had = *entry.get();
                    self.vacate(place);
                    had
                }
            });
        }
        slots
    }

    /// Adds rows of nulls behind the last place, and answers with the first of theirs, of which they have consecutive ones.
    /// The index does not know of them yet.
    fn append(&mut self, hashes: &[u64], keys: &[&[u8]]) -> u32 {
        let first = self.next_place();
        let mut at = 0;
        while at < hashes.len() {
            let slot = self.next_place() as usize;
            let (chunk, row) = (slot / CHUNK_ROWS, slot % CHUNK_ROWS);
            let rows = (CHUNK_ROWS - row).min(hashes.len() - at);
            Arc::make_mut(&mut self.rows.chunks[chunk]).extend(
                &hashes[at..at + rows],
                &keys[at..at + rows],
                self.stamp,
            );
            (row..row + rows).for_each(|row| self.rows.live[chunk][row / 64] |= 1 << (row % 64));
            at += rows;
        }
        self.rows.rows += hashes.len();
        self.written += hashes.len() as u64;
        first
    }

    /// What `write` writes was written in an earlier interval: it bears that stamp, and does not count for this one.
    pub fn in_interval<T>(&mut self, stamp: u32, write: impl FnOnce(&mut Self) -> T) -> T {
        let (present, written) = (std::mem::replace(&mut self.stamp, stamp), self.written);
        let done = write(self);
        (self.stamp, self.written) = (present, written);
        done
    }

    /// Removes the row in a slot. Its place may be used again.
    pub fn remove(&mut self, slot: u32) {
        if let Ok(entry) = self.index.find_entry(spread(self.rows.hash(slot)), |other| *other == slot) {
            entry.remove();
            self.vacate(slot);
        }
    }

    /// Makes all columns of a row null. The key stays, and the row counts as written.
    pub fn clear(&mut self, slot: u32) {
        self.clear_all(&[slot]);
    }

    /// As [`Table::clear`].
    fn clear_all(&mut self, slots: &[u32]) {
        for column in 0..self.types.len() {
            self.write_runs(slots, column, |column, rows, _| rows.iter().for_each(|row| column.clear(*row as usize)));
        }
    }

    /// Moves a row out of a chunk that a snapshot holds.
    fn displace(&mut self, slot: u32) -> u32 {
        let to = self.free_place().unwrap_or_else(|| self.next_place());
        self.relocate(slot, to);
        to
    }

    /// Moves a row to a place in another chunk.
    fn relocate(&mut self, slot: u32, to: u32) {
        let from = self.rows.chunks[slot as usize / CHUNK_ROWS].clone();
        let row = slot as usize % CHUNK_ROWS;
        self.place(to, from.hash(row), from.key(row), from.stamp(row));
        let chunk = Arc::make_mut(&mut self.rows.chunks[to as usize / CHUNK_ROWS]);
        for (column, from) in chunk.columns.iter_mut().zip(&from.columns) {
            column.copy(to as usize % CHUNK_ROWS, from, row);
        }
        if let Some(entry) = self.index.find_mut(spread(from.hash(row)), |other| *other == slot) {
            *entry = to;
        }
        drop(from);
        self.vacate(slot);
    }

    /// Moves at most so many rows from the end of the table to places that writes behind a barrier have left, if no snapshot
    /// holds these any more. Slots change.
    pub fn compact(&mut self, rows: usize) {
        for _ in 0..rows {
            let Some(last) = self.rows.chunks.len().checked_sub(1) else { return };
            if self.free.is_empty() && self.limbo.is_empty() || Arc::strong_count(&self.rows.chunks[last]) > 1 {
                return;
            }
            let words = self.rows.live[last].iter().enumerate().rev();
            let Some((word, bits)) = words.map(|(word, bits)| (word, *bits)).find(|(_, bits)| *bits != 0) else {
                self.rows.chunks.pop();
                self.rows.live.pop();
                continue;
            };
            let row = word * 64 + 63 - bits.leading_zeros() as usize;
            let Some(place) = self.free.pop().or_else(|| self.limbo_place()) else { return };
            if self.is_vacant(place) && (place as usize) < last * CHUNK_ROWS {
                self.relocate((last * CHUNK_ROWS + row) as u32, place);
            }
        }
    }

    /// Makes a place the row of a key, with nulls. Nobody else holds its chunk.
    fn place(&mut self, slot: u32, hash: u64, key: &[u8], stamp: u32) {
        let (chunk, row) = (slot as usize / CHUNK_ROWS, slot as usize % CHUNK_ROWS);
        Arc::make_mut(&mut self.rows.chunks[chunk]).place(row, hash, key, stamp);
        self.rows.live[chunk][row / 64] |= 1 << (row % 64);
        self.rows.rows += 1;
    }

    fn is_vacant(&self, slot: u32) -> bool {
        is_vacant(&self.rows, slot)
    }

    fn free_place(&mut self) -> Option<u32> {
        while let Some(slot) = self.free.pop() {
            if self.is_vacant(slot) {
                return Some(slot);
            }
        }
        while let Some(slot) = self.limbo_place() {
            if self.is_vacant(slot) {
                return Some(slot);
            }
        }
        // Too many places wait for snapshots to end: copying a chunk makes all of its places good.
        if self.limbo.len() <= self.rows.rows / LIMBO_SHARE + CHUNK_ROWS {
            return None;
        }
        let slot = std::iter::from_fn(|| self.limbo.pop_front()).find(|slot| is_vacant(&self.rows, *slot))?;
        let chunk = slot as usize / CHUNK_ROWS;
        let rows = Arc::make_mut(&mut self.rows.chunks[chunk]).len();
        let first = (chunk * CHUNK_ROWS) as u32;
        let vacant: Vec<u32> = (first..first + rows as u32).filter(|s| *s != slot && self.is_vacant(*s)).collect();
        self.free.extend(vacant);
        Some(slot)
    }

    /// The next of the places that were left, if no snapshot holds its chunk any more. It may be used again already.
    fn limbo_place(&mut self) -> Option<u32> {
        let slot = self.limbo.pop_front()?;
        match self.rows.chunks.get(slot as usize / CHUNK_ROWS) {
            Some(chunk) if Arc::strong_count(chunk) > 1 => {
                self.limbo.push_back(slot);
                None
            }
            Some(_) => Some(slot),
            None => None,
        }
    }

    /// The place behind the last.
    fn next_place(&mut self) -> u32 {
        if self.rows.chunks.last().is_none_or(|last| last.len() == CHUNK_ROWS) {
            self.rows.chunks.push(Arc::new(Chunk::new(&self.types)));
            self.rows.live.push([0; WORDS]);
        }
        let full = (self.rows.chunks.len() - 1) * CHUNK_ROWS;
        (full + self.rows.chunks.last().map_or(0, |last| last.len())) as u32
    }

    fn vacate(&mut self, slot: u32) {
        let (chunk, row) = (slot as usize / CHUNK_ROWS, slot as usize % CHUNK_ROWS);
        self.rows.live[chunk][row / 64] &= !(1 << (row % 64));
        self.rows.rows -= 1;
        match Arc::get_mut(&mut self.rows.chunks[chunk]) {
            Some(chunk) => {
                // Long values go at once, not when the place is used again.
                chunk.columns.iter_mut().for_each(|c| c.clear(row));
                self.free.push(slot);
            }
            None => self.limbo.push_back(slot),
        }
    }

    /// Calls `write(column, rows, at)` for each run of slots that lie in one chunk, in order: `rows` are the run's rows in
    /// the chunk's `column`, and `at` is where the run begins in `slots`. Copies a chunk if a snapshot holds it.
    pub fn write_runs(&mut self, slots: &[u32], column: usize, mut write: impl FnMut(&mut Column, &[u32], usize)) {
        const MASK: u32 = CHUNK_ROWS as u32 - 1;
        let mut rows: Vec<u32> = Vec::with_capacity(slots.len().min(CHUNK_ROWS));
        let mut at = 0;
        while let Some(first) = slots.get(at) {
            let chunk = *first as usize / CHUNK_ROWS;
            let run = slots[at..].iter().take_while(|s| **s as usize / CHUNK_ROWS == chunk);
            rows.clear();
            rows.extend(run.map(|s| s & MASK));
            let chunk = Arc::make_mut(&mut self.rows.chunks[chunk]);
            self.written += chunk.stamp_all(&rows, self.stamp);
            write(&mut chunk.columns[column], &rows, at);
            at += rows.len();
        }
    }

    /// The rows as they are.
    #[must_use]
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// The rows as they are now, for as long as anybody wants them.
    #[must_use]
    pub fn snapshot(&mut self) -> Rows {
        self.limbo.extend(self.free.drain(..));
        self.rows.clone()
    }
}

/// Whether a place that was left is still there, and not used again.
fn is_vacant(rows: &Rows, slot: u32) -> bool {
    let (chunk, row) = (slot as usize / CHUNK_ROWS, slot as usize % CHUNK_ROWS);
    rows.chunks.get(chunk).is_some_and(|c| row < c.len()) && rows.live[chunk][row / 64] & 1 << (row % 64) == 0
}

#[cfg(test)]
mod tests;
