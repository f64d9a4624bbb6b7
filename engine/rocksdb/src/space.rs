//! One namespace: how many rows it has, and those of them that are in memory. No I/O.
//!
//! A cached row is *stored* if the database has a row of this key (or will have, by a job that has been handed over), and
//! *dirty* if that is not the row as it is here. Invariant: while all stored rows of a namespace are cached, a key that is not
//! in the cache is new, and nobody needs to ask the database.

use floodmark_snapshot::KeyGroup;
use floodmark_state::{ColumnType, Rows, Table};

use crate::{row::Form, stored::Stored};

/// The slot holds a row.
const USED: u8 = 1;
/// Wanted since the clock's hand passed.
const WANTED: u8 = 2;
/// The database has, or is to have, a row of this key.
const STORED: u8 = 4;
/// Changed since it was last handed over to be written.
const DIRTY: u8 = 8;

/// What a namespace takes in memory beside its rows, bytes.
const SPACE_BYTES: usize = 120;
/// What a cache takes beside its rows, bytes.
const CACHE_BYTES: usize = 1 << 10;
/// Once so many rows were written, the cache's size is measured anew.
const WRITES_PER_MEASURE: usize = 1 << 14;

/// See the header of this file.
#[derive(Debug)]
pub(crate) struct Space {
    /// Keys that the database has, or is to have.
    pub(crate) stored: Stored,
    /// The rows in memory, if there are any. Boxed: there may be a great many namespaces of one row.
    pub(crate) cache: Option<Box<Cache>>,
    /// What it is counted as at present, bytes.
    pub(crate) counted: usize,
}

impl Space {
    /// Without rows. Those of each key group are counted if that is wanted.
    pub(crate) fn new(by_group: bool) -> Self {
        Self { stored: Stored::none(by_group), cache: None, counted: 0 }
    }

    /// Number of rows.
    pub(crate) fn rows(&self) -> u64 {
        self.stored.rows() + self.cache.as_ref().map_or(0, |c| c.used - c.stored)
    }

    /// Whether every stored row is in memory.
    pub(crate) fn complete(&self) -> bool {
        self.stored.rows() == self.cache.as_ref().map_or(0, |c| c.stored)
    }

    /// The cache, made if there is none.
    pub(crate) fn cache(&mut self, form: &Form) -> &mut Cache {
        self.cache.get_or_insert_with(|| Box::new(Cache::new(&form.types, form.timed)))
    }

    /// About how many bytes it takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        SPACE_BYTES + self.stored.bytes() + self.cache.as_ref().map_or(0, |c| c.bytes())
    }

    /// Hands over all dirty rows in job `job`, if there are any.
    pub(crate) fn freeze(&mut self, job: u64, max_parallelism: u16) -> Option<Frozen> {
        let Self { stored, cache, .. } = self;
        cache.as_mut()?.freeze(job, |hash| stored.add(KeyGroup::of(hash, max_parallelism), 1))
    }
}

/// Rows of one namespace in memory.
#[derive(Debug)]
pub(crate) struct Cache {
    /// Where slots point into.
    pub(crate) table: Table,
    flags: Vec<u8>,
    /// By slot: the job that writes the row as it was when it was last handed over; 0 if none does.
    jobs: Vec<u64>,
    /// By slot: when the row was last written, wall-clock milliseconds. Empty if rows have no time to live.
    written: Vec<i64>,
    timed: bool,
    /// Whether a job may still hold the rows as they were: one that is written to moves to another slot then.
    pub(crate) frozen: bool,
    /// Rows.
    used: u64,
    /// Rows that are stored.
    stored: u64,
    /// As measured: bytes, and the slots that they are for, used ones or not.
    measured: (usize, usize),
    writes: usize,
}

impl Cache {
    fn new(types: &[ColumnType], timed: bool) -> Self {
        Self {
            table: Table::new(types.to_vec()),
            flags: Vec::new(),
            jobs: Vec::new(),
            written: Vec::new(),
            timed,
            frozen: false,
            used: 0,
            stored: 0,
            measured: (0, 0),
            writes: 0,
        }
    }

    /// A row for this key. True if there was none: it is then all null, neither stored nor dirty.
    pub(crate) fn slot(&mut self, hash: u64, key: &[u8]) -> (u32, bool) {
        let before = if self.frozen { self.table.find(hash, key) } else { None };
        let (slot, new) = self.table.slot(hash, key);
        let at = slot as usize;
        if at >= self.flags.len() {
            self.flags.resize(at + 1, 0);
            self.jobs.resize(at + 1, 0);
            if self.timed {
                self.written.resize(at + 1, 0);
            }
        }
        if new {
            self.flags[at] = USED;
            self.jobs[at] = 0;
            self.used += 1;
        } else {
            if let Some(before) = before.filter(|before| *before != slot) {
                self.moved(before as usize, at);
            }
            self.flags[at] |= WANTED;
        }
        (slot, new)
    }

    fn moved(&mut self, from: usize, to: usize) {
        self.flags[to] = std::mem::take(&mut self.flags[from]);
        self.jobs[to] = self.jobs[from];
        if self.timed {
            self.written[to] = self.written[from];
        }
    }

    /// The row of this key, if it is here.
    pub(crate) fn find(&mut self, hash: u64, key: &[u8]) -> Option<u32> {
        let slot = self.table.find(hash, key)?;
        self.flags[slot as usize] |= WANTED;
        Some(slot)
    }

    /// Whether a row of this key is here. Not counted as wanting it.
    pub(crate) fn holds(&self, hash: u64, key: &[u8]) -> bool {
        self.table.find(hash, key).is_some()
    }

    /// The row is going to be changed.
    pub(crate) fn touch(&mut self, slot: u32) {
        self.flags[slot as usize] |= DIRTY;
        self.writes += 1;
    }

    /// The row has just been brought in from the database.
    pub(crate) fn loaded(&mut self, slot: u32) {
        self.flags[slot as usize] |= STORED;
        self.stored += 1;
    }

    /// The row as it is has been handed over in job `job`. True if the database did not have its key before.
    pub(crate) fn handed_over(&mut self, slot: u32, job: u64) -> bool {
        let at = slot as usize;
        let new = self.flags[at] & STORED == 0;
        self.flags[at] = self.flags[at] & !DIRTY | STORED;
        self.jobs[at] = job;
        self.stored += u64::from(new);
        new
    }

    /// Takes a row out of memory. True if it is stored.
    pub(crate) fn remove(&mut self, slot: u32) -> bool {
        let at = slot as usize;
        let stored = self.flags[at] & STORED != 0;
        self.flags[at] = 0;
        self.used -= 1;
        self.stored -= u64::from(stored);
        self.table.remove(slot);
        stored
    }

    /// When the row was last written.
    pub(crate) fn written(&self, slot: u32) -> i64 {
        self.written.get(slot as usize).copied().unwrap_or(0)
    }

    /// Notes when the row was last written, if rows have a time to live.
    pub(crate) fn set_written(&mut self, slot: u32, at_ms: i64) {
        if let Some(written) = self.written.get_mut(slot as usize) {
            *written = at_ms;
        }
    }

    /// Whether there is a row in this slot.
    pub(crate) fn has(&self, slot: u32) -> bool {
        self.flags.get(slot as usize).is_some_and(|flags| flags & USED != 0)
    }

    /// Whether the row was wanted since the clock's hand passed.
    pub(crate) fn is_wanted(&self, slot: u32) -> bool {
        self.flags[slot as usize] & WANTED != 0
    }

    pub(crate) fn is_stored(&self, slot: u32) -> bool {
        self.flags[slot as usize] & STORED != 0
    }

    pub(crate) fn is_dirty(&self, slot: u32) -> bool {
        self.flags[slot as usize] & DIRTY != 0
    }

    /// Whether the database has the row as it is, once `done` jobs are done.
    pub(crate) fn is_clean(&self, slot: u32, done: u64) -> bool {
        !self.is_dirty(slot) && self.jobs[slot as usize] <= done
    }

    /// Gives a row its second chance: true if it was wanted since the last time.
    pub(crate) fn spare(&mut self, slot: u32) -> bool {
        let flags = &mut self.flags[slot as usize];
        let wanted = *flags & WANTED != 0;
        *flags &= !WANTED;
        wanted
    }

    /// Slots there are, used ones or not.
    pub(crate) fn slots(&self) -> u32 {
        self.flags.len() as u32
    }

    /// The slots of all rows.
    pub(crate) fn used(&self) -> impl Iterator<Item = u32> {
        self.flags.iter().enumerate().filter(|(_, f)| **f & USED != 0).map(|(at, _)| at as u32)
    }

    /// Hands over all dirty rows in job `job`. Calls `new` with the hash of each key that the database did not have before.
    fn freeze(&mut self, job: u64, mut new: impl FnMut(u64)) -> Option<Frozen> {
        let (rows, mut slots) = (self.table.rows(), Vec::new());
        for (slot, (flags, job_of)) in self.flags.iter_mut().zip(&mut self.jobs).enumerate() {
            if *flags & DIRTY != 0 {
                if *flags & STORED == 0 {
                    let (chunk, row) = rows.read(slot);
                    new(chunk.hash(row));
                    self.stored += 1;
                }
                *flags = *flags & !DIRTY | STORED;
                *job_of = job;
                slots.push(slot as u32);
            }
        }
        if slots.is_empty() {
            return None;
        }
        let written = if self.timed { slots.iter().map(|s| self.written(*s)).collect() } else { Vec::new() };
        Some(Frozen { rows: self.table.snapshot(), slots, written })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// About how many bytes it takes.
    pub(crate) fn bytes(&self) -> usize {
        CACHE_BYTES + self.used as usize * self.row_bytes()
    }

    /// About how many bytes a row takes. (Places of rows that have left are used again: they count no more.)
    pub(crate) fn row_bytes(&self) -> usize {
        let (bytes, slots) = self.measured;
        if slots == 0 { 64 } else { bytes.div_ceil(slots) }
    }

    /// Whether the answer of [`Cache::bytes`] may be far off.
    pub(crate) fn needs_measure(&self) -> bool {
        let (_, slots) = self.measured;
        self.writes >= WRITES_PER_MEASURE || self.flags.len() > 2 * slots
    }

    /// Measures anew.
    pub(crate) fn measure(&mut self) {
        let flags = self.flags.capacity() + 8 * (self.jobs.capacity() + self.written.capacity());
        self.measured = (self.table.bytes() + flags, self.flags.len());
        self.writes = 0;
    }
}

/// Rows that do not change any more.
#[derive(Debug)]
pub(crate) struct Frozen {
    pub(crate) rows: Rows,
    pub(crate) slots: Vec<u32>,
    /// When each of the slots was written; empty if rows have no time to live.
    pub(crate) written: Vec<i64>,
}
