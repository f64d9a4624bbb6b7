//! A table of accumulators by key, in chunks behind `Arc`.
//!
//! Rows have dense numbers (slots), in the order of their first insertion; a chunk holds [`CHUNK_ROWS`] of them. A snapshot
//! is O(chunks): it clones the pointers. Pure: no I/O.

use std::sync::Arc;

use hashbrown::HashTable;

/// Rows of a chunk: what the first write after a barrier copies.
pub const CHUNK_ROWS: usize = 1024;

/// What a column of a table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColumnType {
    /// 64-bit integers, and all that maps onto them.
    Long,
    /// 64-bit floats.
    Double,
    /// 128-bit integers: decimals.
    Wide,
    /// Anything else, encoded.
    Bytes,
}

/// Values of one column in one chunk, by row; `None` is null.
#[derive(Clone, Debug)]
pub enum Column {
    /// See [`ColumnType::Long`].
    Long(Vec<Option<i64>>),
    /// See [`ColumnType::Double`].
    Double(Vec<Option<f64>>),
    /// See [`ColumnType::Wide`].
    Wide(Vec<Option<i128>>),
    /// See [`ColumnType::Bytes`].
    Bytes(Vec<Option<Box<[u8]>>>),
}

impl Column {
    fn new(column_type: ColumnType) -> Self {
        match column_type {
            ColumnType::Long => Self::Long(Vec::new()),
            ColumnType::Double => Self::Double(Vec::new()),
            ColumnType::Wide => Self::Wide(Vec::new()),
            ColumnType::Bytes => Self::Bytes(Vec::new()),
        }
    }

    fn push_null(&mut self) {
        match self {
            Self::Long(values) => values.push(None),
            Self::Double(values) => values.push(None),
            Self::Wide(values) => values.push(None),
            Self::Bytes(values) => values.push(None),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Long(values) => values.len() * size_of::<Option<i64>>(),
            Self::Double(values) => values.len() * size_of::<Option<f64>>(),
            Self::Wide(values) => values.len() * size_of::<Option<i128>>(),
            Self::Bytes(values) => values.iter().map(|v| 16 + v.as_ref().map_or(0, |b| b.len())).sum(),
        }
    }
}

/// Some rows of a table.
#[derive(Clone, Debug)]
pub struct Chunk {
    hashes: Vec<u64>,
    key_ends: Vec<u32>,
    key_bytes: Vec<u8>,
    /// The columns.
    pub columns: Vec<Column>,
}

impl Chunk {
    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// The hash of a row's key.
    #[must_use]
    pub fn hash(&self, row: usize) -> u64 {
        self.hashes[row]
    }

    /// A row's encoded key.
    #[must_use]
    pub fn key(&self, row: usize) -> &[u8] {
        let start = if row == 0 { 0 } else { self.key_ends[row - 1] as usize };
        &self.key_bytes[start..self.key_ends[row] as usize]
    }

    fn bytes(&self) -> usize {
        self.hashes.len() * 12 + self.key_bytes.len() + self.columns.iter().map(Column::bytes).sum::<usize>()
    }
}

/// Rows as they are, or were at one moment: what a [`Table`] keeps, and what a snapshot of it holds on to.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    chunks: Vec<Arc<Chunk>>,
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

    /// The chunk of a slot, and the row in it.
    #[inline]
    #[must_use]
    pub fn read(&self, slot: usize) -> (&Chunk, usize) {
        (&self.chunks[slot / CHUNK_ROWS], slot % CHUNK_ROWS)
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

    /// All rows, a chunk at a time.
    pub fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.chunks.iter().map(|c| &**c)
    }
}

/// The table. See the header of this file.
#[derive(Debug)]
pub struct Table {
    types: Vec<ColumnType>,
    index: HashTable<u32>,
    rows: Rows,
}

impl Table {
    /// An empty table with these columns.
    #[must_use]
    pub fn new(types: Vec<ColumnType>) -> Self {
        Self { types, index: HashTable::new(), rows: Rows::default() }
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
        self.rows.chunks().map(Chunk::bytes).sum::<usize>() + self.index.capacity() * 5
    }

    /// The slot of a key; a new key gets a row of nulls. True if it is new.
    #[inline]
    pub fn slot(&mut self, hash: u64, key: &[u8]) -> (u32, bool) {
        let rows = &self.rows;
        let equal = |slot: &u32| {
            let (chunk, row) = rows.read(*slot as usize);
            chunk.hashes[row] == hash && chunk.key(row) == key
        };
        if let Some(slot) = self.index.find(hash, equal) {
            return (*slot, false);
        }
        let slot = rows.rows as u32;
        self.index.insert_unique(hash, slot, |slot| {
            let (chunk, row) = rows.read(*slot as usize);
            chunk.hashes[row]
        });
        self.append(hash, key);
        (slot, true)
    }

    fn append(&mut self, hash: u64, key: &[u8]) {
        if self.rows.rows.is_multiple_of(CHUNK_ROWS) {
            let columns = self.types.iter().map(|t| Column::new(*t)).collect();
            let chunk = Chunk { hashes: Vec::new(), key_ends: Vec::new(), key_bytes: Vec::new(), columns };
            self.rows.chunks.push(Arc::new(chunk));
        }
        if let Some(last) = self.rows.chunks.last_mut() {
            let chunk = Arc::make_mut(last);
            chunk.hashes.push(hash);
            chunk.key_bytes.extend_from_slice(key);
            chunk.key_ends.push(chunk.key_bytes.len() as u32);
            chunk.columns.iter_mut().for_each(Column::push_null);
        }
        self.rows.rows += 1;
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
            write(&mut Arc::make_mut(&mut self.rows.chunks[chunk]).columns[column], &rows, at);
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
    pub fn snapshot(&self) -> Rows {
        self.rows.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(table: &mut Table, key: u64, n: i64) {
        let (slot, _) = table.slot(key.wrapping_mul(0x9E37_79B9_7F4A_7C15), &key.to_le_bytes());
        table.write_runs(&[slot], 0, |column, rows, _| {
            if let Column::Long(values) = column {
                let value = &mut values[rows[0] as usize];
                *value = Some(value.unwrap_or(0) + n);
            }
        });
    }

    fn sum(snapshot: &Rows) -> i64 {
        let value = |slot| match &snapshot.read(slot).0.columns[0] {
            Column::Long(values) => values[slot % CHUNK_ROWS].unwrap_or(0),
            Column::Double(_) | Column::Wide(_) | Column::Bytes(_) => 0,
        };
        (0..snapshot.len()).map(value).sum()
    }

    #[test]
    fn a_snapshot_does_not_change_and_only_touched_chunks_are_copied() {
        let mut table = Table::new(vec![ColumnType::Long]);
        for key in 0..5000 {
            add(&mut table, key, 1);
        }
        let before = table.snapshot();
        for key in 0..10 {
            add(&mut table, key, 100);
        }
        add(&mut table, 9999, 1);
        let after = table.snapshot();
        assert_eq!((before.len(), sum(&before)), (5000, 5000));
        assert_eq!((after.len(), sum(&after)), (5001, 6001));
        let shared = before.chunks.iter().zip(&after.chunks).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert_eq!((before.chunks.len(), shared), (5, 3), "the first chunk and the last were written");
    }

    #[test]
    fn equal_hashes_of_different_keys_have_rows_of_their_own() {
        let mut table = Table::new(vec![ColumnType::Long]);
        assert_eq!(table.slot(7, b"a"), (0, true));
        assert_eq!(table.slot(7, b"b"), (1, true));
        assert_eq!(table.slot(7, b"a"), (0, false));
        assert_eq!(table.rows().read(1).0.key(1), b"b");
    }
}
