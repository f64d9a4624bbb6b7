//! A chunk of a table: some rows, as columns, and what there is to know of each. Pure.

use std::ops::Range;

use super::CHUNK_ROWS;

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
    pub(super) fn new(column_type: ColumnType) -> Self {
        match column_type {
            ColumnType::Long => Self::Long(Vec::new()),
            ColumnType::Double => Self::Double(Vec::new()),
            ColumnType::Wide => Self::Wide(Vec::new()),
            ColumnType::Bytes => Self::Bytes(Vec::new()),
        }
    }

    /// Makes a row null; the row behind the last is added.
    pub(super) fn clear(&mut self, row: usize) {
        match self {
            Self::Long(values) => put(values, row, None),
            Self::Double(values) => put(values, row, None),
            Self::Wide(values) => put(values, row, None),
            Self::Bytes(values) => put(values, row, None),
        }
    }

    /// Takes a row of another column of the same type over.
    pub(super) fn copy(&mut self, row: usize, from: &Self, from_row: usize) {
        match (self, from) {
            (Self::Long(to), Self::Long(from)) => to[row] = from[from_row],
            (Self::Double(to), Self::Double(from)) => to[row] = from[from_row],
            (Self::Wide(to), Self::Wide(from)) => to[row] = from[from_row],
            (Self::Bytes(to), Self::Bytes(from)) => to[row].clone_from(&from[from_row]),
            (Self::Long(_) | Self::Double(_) | Self::Wide(_) | Self::Bytes(_), _) => {}
        }
    }

    /// Adds rows of null.
    fn extend(&mut self, rows: usize) {
        match self {
            Self::Long(values) => values.resize(values.len() + rows, None),
            Self::Double(values) => values.resize(values.len() + rows, None),
            Self::Wide(values) => values.resize(values.len() + rows, None),
            Self::Bytes(values) => values.resize_with(values.len() + rows, || None),
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

fn put<T>(values: &mut Vec<T>, row: usize, value: T) {
    match values.get_mut(row) {
        Some(place) => *place = value,
        None => values.push(value),
    }
}

/// What a chunk knows of a row beside its columns. Together, because who looks for a key and then writes its row needs it all.
#[derive(Clone, Copy, Debug)]
struct Head {
    /// In halves, so that a head has no bytes to spare.
    hash: [u32; 2],
    stamp: u32,
    /// Where the key begins, and its length.
    key: (u32, u32),
}

impl Head {
    fn new(hash: u64, stamp: u32, start: usize, len: usize) -> Self {
        Self { hash: [(hash >> 32) as u32, hash as u32], stamp, key: (start as u32, len as u32) }
    }

    fn hash(self) -> u64 {
        u64::from(self.hash[0]) << 32 | u64::from(self.hash[1])
    }

    fn key(self) -> Range<usize> {
        self.key.0 as usize..self.key.0 as usize + self.key.1 as usize
    }
}

/// Some rows of a table.
#[derive(Clone, Debug)]
pub struct Chunk {
    heads: Vec<Head>,
    /// The greatest stamp, ever.
    newest: u32,
    key_bytes: Vec<u8>,
    /// Of `key_bytes`, those that belong to no key any more.
    key_waste: usize,
    /// The columns.
    pub columns: Vec<Column>,
}

impl Chunk {
    pub(super) fn new(types: &[ColumnType]) -> Self {
        Self {
            heads: Vec::new(),
            newest: 0,
            key_bytes: Vec::new(),
            key_waste: 0,
            columns: types.iter().map(|t| Column::new(*t)).collect(),
        }
    }

    /// Rows, also those that are not used any more.
    pub(super) fn len(&self) -> usize {
        self.heads.len()
    }

    /// The hash of a row's key.
    #[inline]
    #[must_use]
    pub fn hash(&self, row: usize) -> u64 {
        self.heads[row].hash()
    }

    /// A row's encoded key.
    #[inline]
    #[must_use]
    pub fn key(&self, row: usize) -> &[u8] {
        &self.key_bytes[self.heads[row].key()]
    }

    /// The interval in which a row was last written.
    #[inline]
    pub(super) fn stamp(&self, row: usize) -> u32 {
        self.heads[row].stamp
    }

    /// No row was written later than this.
    pub(super) fn newest(&self) -> u32 {
        self.newest
    }

    /// Rows are written in this interval. Answers how many were not before.
    #[inline]
    pub(super) fn stamp_all(&mut self, rows: &[u32], stamp: u32) -> u64 {
        self.newest = self.newest.max(stamp);
        let mut new = 0;
        for row in rows {
            let head = &mut self.heads[*row as usize];
            new += u64::from(head.stamp != stamp);
            head.stamp = stamp;
        }
        new
    }

    /// Makes a row, the next or one that is not used any more, that of a key; its columns are null.
    pub(super) fn place(&mut self, row: usize, hash: u64, key: &[u8], stamp: u32) {
        self.newest = self.newest.max(stamp);
        self.columns.iter_mut().for_each(|c| c.clear(row));
        let room = self.heads.get(row).map(|old| old.key());
        if let Some(room) = room.clone().filter(|room| room.len() >= key.len()) {
            self.key_bytes[room.start..room.start + key.len()].copy_from_slice(key);
            self.heads[row] = Head::new(hash, stamp, room.start, key.len());
            self.key_waste += room.len() - key.len();
            return;
        }
        self.key_waste += room.map_or(0, |room| room.len());
        put(&mut self.heads, row, Head::new(hash, stamp, self.key_bytes.len(), key.len()));
        self.key_bytes.extend_from_slice(key);
        if self.key_waste > self.key_bytes.len() / 2 {
            let mut kept = Vec::with_capacity(self.key_bytes.len() - self.key_waste);
            for head in &mut self.heads {
                let from = head.key();
                head.key.0 = kept.len() as u32;
                kept.extend_from_slice(&self.key_bytes[from]);
            }
            self.key_bytes = kept;
            self.key_waste = 0;
        }
        if row + 1 == CHUNK_ROWS && self.key_waste == 0 {
            self.key_bytes.shrink_to_fit();
        }
    }

    /// Adds rows of nulls behind the last.
    pub(super) fn extend(&mut self, hashes: &[u64], keys: &[&[u8]], stamp: u32) {
        self.newest = self.newest.max(stamp);
        self.heads.reserve(keys.len());
        self.key_bytes.reserve(keys.iter().map(|key| key.len()).sum());
        for (hash, key) in hashes.iter().zip(keys) {
            self.heads.push(Head::new(*hash, stamp, self.key_bytes.len(), key.len()));
            self.key_bytes.extend_from_slice(key);
        }
        if self.len() == CHUNK_ROWS {
            self.key_bytes.shrink_to_fit();
        }
        self.columns.iter_mut().for_each(|c| c.extend(keys.len()));
    }

    pub(super) fn bytes(&self) -> usize {
        let columns: usize = self.columns.iter().map(Column::bytes).sum();
        self.heads.len() * size_of::<Head>() + self.key_bytes.capacity() + columns
    }
}
