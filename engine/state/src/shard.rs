//! The file that keyed state becomes, neutral to back ends: rows sorted by key group, in blocks that can be read alone.
//!
//! ```text
//! file   = block file ([`floodmark_snapshot::block`]) of: rows*, index, footer
//! rows   = an Arrow IPC stream; the rows of a few key groups, or of a part of one
//! index  = JSON: the header, and of each block of rows its key groups, place and checksum
//! footer = index offset:u64 index length:u64, little-endian; the file's last 36 bytes are this block and the trailer
//! ```
//! Who needs a few key groups only reads the end of the file ([`Reader::open`]), then just their blocks.
//!
//! A file of layer 0 has all rows. One above has those written since the layers below, keys removed since (rows whose
//! [`REMOVED`] is true) and namespaces dropped since (in the header): first the removals apply, then the rows.
//!
//! Checksums are verified before anything is decoded, because Arrow IPC alone accepts damaged bytes.

use std::{ops::Range, sync::Arc};

use arrow::{
    array::Array, compute::concat_batches, datatypes::SchemaRef, ipc::writer::StreamWriter, record_batch::RecordBatch,
};
use bytes::Bytes;
use floodmark_snapshot::{
    Error, KeyGroup, KeyGroupRange, Result, StateColumn, TimestampMs,
    block::{BLOCK_OVERHEAD, BlockWriter, TRAILER_LEN, read_block, read_blocks, read_trailer},
};
use serde::{Deserialize, Serialize};

use crate::{
    ipc,
    watermarks::{Ahead, KeyGroupWatermarks},
};

const KIND: &str = "state";
const FORMAT: u32 = 2;
/// Name of the column (`Boolean`) that says of a row of a layer above 0 that its key was removed.
pub const REMOVED: &str = "$$removed";
/// Name of the column (`Int64`, wall-clock milliseconds) that says when a row was last written; there if the state has a TTL.
pub const WRITTEN: &str = "$$written";
/// Bytes from which on a block of rows ends with its key group.
const BLOCK_BYTES: usize = 64 << 10;
/// Bytes from which on a block of rows ends anywhere.
const BLOCK_BYTES_MAX: usize = 1 << 20;
const FOOTER_PAYLOAD: usize = 16;
/// Bytes of the end of each file that say where the index is.
pub const FOOTER_LEN: usize = BLOCK_OVERHEAD + FOOTER_PAYLOAD + TRAILER_LEN;
/// How much of a file's end to read at first: mostly it holds the index.
pub const TAIL_LEN: usize = 64 << 10;

/// What a state file says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Header {
    /// Version of the layout.
    pub format: u32,
    /// The operator's watermark at the barrier, if it keeps one. Of key groups that are ahead of others, see `ahead`.
    pub watermark: Option<TimestampMs>,
    /// Key groups with a greater watermark: they came from a subtask that was further.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ahead: Vec<Ahead>,
    /// The layer; 0 is whole.
    #[serde(default)]
    pub layer: u32,
    /// Namespaces dropped since the layer below.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dropped: Vec<i64>,
    /// The columns of the rows.
    #[serde(default)]
    pub columns: Vec<StateColumn>,
}

impl Header {
    /// A header of the present format and layer 0.
    #[must_use]
    pub fn new(watermark: Option<TimestampMs>) -> Self {
        Self { format: FORMAT, watermark, ahead: Vec::new(), layer: 0, dropped: Vec::new(), columns: Vec::new() }
    }

    /// The same with the watermarks of the shard's key groups.
    #[must_use]
    pub fn at(self, watermarks: &KeyGroupWatermarks) -> Self {
        Self { watermark: watermarks.min(), ahead: watermarks.ahead().to_vec(), ..self }
    }

    /// The watermarks of the shard's key groups.
    ///
    /// # Errors
    /// `Corrupt` if they can't be those.
    pub fn watermarks(&self) -> Result<KeyGroupWatermarks> {
        KeyGroupWatermarks::of_file(self.watermark, &self.ahead)
    }

    /// The same for rows of this schema.
    #[must_use]
    pub fn of(self, schema: &SchemaRef) -> Self {
        Self { columns: columns_of(schema), ..self }
    }
}

/// The columns of a schema, in plain words.
#[must_use]
pub fn columns_of(schema: &SchemaRef) -> Vec<StateColumn> {
    let column = |f: &arrow::datatypes::FieldRef| StateColumn {
        name: f.name().clone(),
        data_type: f.data_type().to_string(),
        optional: f.is_nullable(),
    };
    schema.fields().iter().map(column).collect()
}

/// Where a block of rows stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Place {
    first: u16,
    last: u16,
    offset: u64,
    length: u64,
    rows: u64,
    crc: u32,
}

impl Place {
    fn key_groups(&self) -> KeyGroupRange {
        KeyGroupRange { first: KeyGroup(self.first), last: KeyGroup(self.last) }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Index {
    header: Header,
    blocks: Vec<Place>,
}

/// Writes a state file.
pub struct Writer {
    blocks: BlockWriter,
    index: Index,
    open: Vec<RecordBatch>,
    open_bytes: usize,
    groups: (u16, u16),
}

impl Writer {
    /// A file with this header.
    #[must_use]
    pub fn new(header: Header) -> Self {
        Self {
            blocks: BlockWriter::new(KIND),
            index: Index { header, blocks: Vec::new() },
            open: Vec::new(),
            open_bytes: 0,
            groups: (0, 0),
        }
    }

    /// Adds rows of one key group. Key groups come in order, and all batches have one schema.
    ///
    /// # Errors
    /// When the rows can't be written as Arrow IPC.
    pub fn push(&mut self, group: KeyGroup, rows: RecordBatch) -> Result<()> {
        if rows.num_rows() == 0 {
            return Ok(());
        }
        let ends = group.0 != self.groups.1 && self.open_bytes >= BLOCK_BYTES;
        if ends || self.open_bytes >= BLOCK_BYTES_MAX {
            self.close()?;
        }
        if self.open.is_empty() {
            self.groups.0 = group.0;
        }
        self.groups.1 = group.0;
        let weight = |c: &arrow::array::ArrayRef| c.to_data().get_slice_memory_size().unwrap_or(0);
        self.open_bytes += rows.columns().iter().map(weight).sum::<usize>();
        self.open.push(rows);
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        let Some(first) = self.open.first() else { return Ok(()) };
        let failed = |e: arrow::error::ArrowError| Error::abort(format!("encode state: {e}"));
        let schema = first.schema();
        let rows = match self.open.as_slice() {
            [only] => only.clone(),
            all => concat_batches(&schema, all).map_err(failed)?,
        };
        let mut stream = StreamWriter::try_new(Vec::with_capacity(self.open_bytes + 1024), &schema).map_err(failed)?;
        stream.write(&rows).map_err(failed)?;
        let payload = stream.into_inner().map_err(failed)?;
        let offset = self.blocks.len() as u64;
        self.blocks.push(&payload)?;
        self.index.blocks.push(Place {
            first: self.groups.0,
            last: self.groups.1,
            offset,
            length: self.blocks.len() as u64 - offset,
            rows: rows.num_rows() as u64,
            crc: self.blocks.last_crc(),
        });
        self.open.clear();
        self.open_bytes = 0;
        Ok(())
    }

    /// The whole file.
    ///
    /// # Errors
    /// As [`Writer::push`].
    pub fn finish(mut self) -> Result<Bytes> {
        self.close()?;
        let Self { mut blocks, index, .. } = self;
        let json = serde_json::to_vec(&index).map_err(|e| Error::abort(format!("encode state: {e}")))?;
        let offset = blocks.len() as u64;
        blocks.push(&json)?;
        let length = blocks.len() as u64 - offset;
        blocks.push(&[offset.to_le_bytes(), length.to_le_bytes()].concat())?;
        Ok(blocks.finish())
    }
}

/// What the end of a file came to.
#[derive(Debug)]
pub enum Opened {
    /// It can be read.
    Ready(Reader),
    /// The index begins further ahead: read from this offset to the end.
    More {
        /// In the file.
        from: u64,
    },
}

/// Reads a state file, or parts of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reader {
    header: Header,
    blocks: Vec<Place>,
}

impl Reader {
    /// Reads the end of a file of `size` bytes: `tail` are its last bytes, [`FOOTER_LEN`] at least (or all).
    ///
    /// # Errors
    /// `Corrupt` if that is not the end of a state file, `Abort` if it is of another format.
    pub fn open(size: u64, tail: &Bytes) -> Result<Opened> {
        let cut = || Error::corrupt("a state file is cut");
        let start = tail.len().checked_sub(FOOTER_LEN).ok_or_else(cut)?;
        let trailer = tail.len() - TRAILER_LEN;
        let blocks = read_trailer(KIND, &tail.slice(trailer..))?;
        let rows = blocks.checked_sub(2).ok_or_else(|| Error::corrupt("a state file without an index"))?;
        let footer = read_block(rows + 1, &tail.slice(start..trailer))?;
        let number = |at: usize| footer.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
        let (offset, length) = number(0).zip(number(8)).ok_or_else(cut)?;
        if offset.checked_add(length) != size.checked_sub(FOOTER_LEN as u64) {
            return Err(Error::corrupt(format!("the index of a state file of {size} bytes is elsewhere")));
        }
        let tail_start = size - tail.len() as u64;
        if offset < tail_start {
            return Ok(Opened::More { from: offset });
        }
        let index = read_block(rows, &tail.slice((offset - tail_start) as usize..start))?;
        let reader = Self::of_index(&index)?;
        if reader.blocks.len() != rows as usize {
            return Err(Error::corrupt(format!(
                "a state file of {rows} blocks has an index of {}",
                reader.blocks.len()
            )));
        }
        Ok(Opened::Ready(reader))
    }

    fn of_index(index: &[u8]) -> Result<Self> {
        // The format first: another one may look different.
        #[derive(Deserialize)]
        struct Version {
            header: Format,
        }
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let corrupt = |e: serde_json::Error| Error::corrupt(format!("index of a state file: {e}"));
        let version: Version = serde_json::from_slice(index).map_err(corrupt)?;
        if version.header.format != FORMAT {
            let format = version.header.format;
            return Err(Error::abort(format!("state file of format {format} (this program reads {FORMAT})")));
        }
        let Index { header, blocks } = serde_json::from_slice(index).map_err(corrupt)?;
        Ok(Self { header, blocks })
    }

    /// Reads a whole file in memory, and verifies every byte of it.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn verified(file: &Bytes) -> Result<Self> {
        let blocks = read_blocks(KIND, file)?;
        let reader = Self::whole(file)?;
        let mut end = (file.len() - FOOTER_LEN) as u64;
        for block in reader.blocks.iter().rev() {
            if block.offset.checked_add(block.length).is_none_or(|e| e > end) {
                return Err(Error::corrupt("the index of a state file does not fit its blocks"));
            }
            end = block.offset;
        }
        if blocks.len() != reader.blocks.len() + 2 {
            return Err(Error::corrupt("a state file has another number of blocks than its index"));
        }
        Ok(reader)
    }

    /// Reads a whole file in memory. Of its rows, those are verified that are decoded.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn whole(file: &Bytes) -> Result<Self> {
        match Self::open(file.len() as u64, file)? {
            Opened::Ready(reader) => Ok(reader),
            Opened::More { .. } => Err(Error::corrupt("a state file is cut")),
        }
    }

    /// What the file says of itself.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.blocks.iter().map(|b| b.rows).sum()
    }

    /// Number of rows in the blocks that have rows of these key groups.
    #[must_use]
    pub fn rows_of(&self, key_groups: KeyGroupRange) -> u64 {
        self.blocks.iter().filter(|b| b.key_groups().overlaps(&key_groups)).map(|b| b.rows).sum()
    }

    /// The blocks that have rows of these key groups, by number, and their bytes in the file. They may have rows of others.
    #[must_use]
    pub fn ranges(&self, key_groups: KeyGroupRange) -> Vec<(usize, Range<u64>)> {
        let wanted = self.blocks.iter().enumerate().filter(|(_, b)| b.key_groups().overlaps(&key_groups));
        wanted.map(|(i, b)| (i, b.offset..b.offset.saturating_add(b.length))).collect()
    }

    /// The rows of a block, from its bytes.
    ///
    /// # Errors
    /// `Corrupt` if they are not, byte for byte, what was written there.
    pub fn decode(&self, block: usize, bytes: &Bytes) -> Result<Vec<RecordBatch>> {
        decode(&self.verify(block, bytes)?)
    }

    fn verify(&self, block: usize, bytes: &Bytes) -> Result<Bytes> {
        let place =
            self.blocks.get(block).ok_or_else(|| Error::corrupt(format!("no block {block} in a state file")))?;
        let crc = bytes.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
        if crc != Some(place.crc) {
            return Err(Error::corrupt(format!("block {block} of a state file is not the one of its index")));
        }
        read_block(block as u32, bytes)
    }

    /// All rows of these key groups in a file in memory, a block at a time. Others may be among them.
    pub fn blocks<'a>(
        &'a self,
        file: &'a Bytes,
        key_groups: KeyGroupRange,
    ) -> impl Iterator<Item = Result<Vec<RecordBatch>>> + 'a {
        self.ranges(key_groups).into_iter().map(move |(block, place)| self.block(file, block, place))
    }

    /// The rows of a block of a file in memory. `place` is the one that [`Reader::ranges`] says.
    ///
    /// # Errors
    /// `Corrupt` if the file is damaged there.
    pub fn block(&self, file: &Bytes, block: usize, place: Range<u64>) -> Result<Vec<RecordBatch>> {
        let (start, end) = (place.start as usize, place.end as usize);
        if start > end || end > file.len() {
            return Err(Error::corrupt(format!("block {block} is outside of its state file")));
        }
        self.decode(block, &file.slice(start..end))
    }

    /// The key groups between which the rows of a block are; none after the last block.
    #[must_use]
    pub fn key_groups(&self, block: usize) -> KeyGroupRange {
        let none = KeyGroupRange { first: KeyGroup(u16::MAX), last: KeyGroup(0) };
        self.blocks.get(block).map_or(none, Place::key_groups)
    }

    /// Some of the blocks, by number, from their bytes, in order.
    ///
    /// # Errors
    /// `Corrupt` if they are not, byte for byte, what was written there.
    pub fn part(self: &Arc<Self>, blocks: &[(usize, Bytes)]) -> Result<Part> {
        let verified = blocks.iter().map(|(block, bytes)| Ok((*block, self.verify(*block, bytes)?)));
        Ok(Part { reader: self.clone(), blocks: verified.collect::<Result<_>>()? })
    }
}

fn decode(payload: &Bytes) -> Result<Vec<RecordBatch>> {
    ipc::read("rows of a state file", payload)
}

/// Some blocks of a state file, verified: for who needs a part of it only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    reader: Arc<Reader>,
    /// Their numbers and what is in them.
    blocks: Vec<(usize, Bytes)>,
}

impl Part {
    /// Of all of the file.
    #[must_use]
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// Bytes of the rows.
    #[must_use]
    pub fn size(&self) -> usize {
        self.blocks.iter().map(|(_, payload)| payload.len()).sum()
    }

    /// All rows of these key groups that it has, a block at a time, with the block's number. Others may be among them.
    pub fn blocks(&self, key_groups: KeyGroupRange) -> impl Iterator<Item = (usize, Result<Vec<RecordBatch>>)> {
        let wanted = self.blocks.iter().filter(move |(at, _)| self.reader.key_groups(*at).overlaps(&key_groups));
        wanted.map(|(at, payload)| (*at, decode(payload)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Int64Array, StringArray};
    use floodmark_snapshot::Disposition;

    use super::*;

    fn rows(group: u16, rows: i64) -> RecordBatch {
        let numbers = Arc::new((0..rows).map(|n| i64::from(group) * 1_000_000 + n).collect::<Int64Array>());
        let texts = Arc::new((0..rows).map(|n| Some(format!("text {n} of {group}"))).collect::<StringArray>());
        RecordBatch::try_from_iter([("n", numbers as _), ("t", texts as _)]).unwrap()
    }

    fn file(groups: &[(u16, i64)]) -> Bytes {
        let mut writer = Writer::new(Header::new(Some(7)).of(&rows(0, 1).schema()));
        for (group, n) in groups {
            writer.push(KeyGroup(*group), rows(*group, *n)).unwrap();
        }
        writer.finish().unwrap()
    }

    fn range(first: u16, last: u16) -> KeyGroupRange {
        KeyGroupRange { first: KeyGroup(first), last: KeyGroup(last) }
    }

    #[test]
    fn a_few_key_groups_are_read_without_the_rest() {
        let file = file(&(0..64).map(|g| (g, 800)).collect::<Vec<_>>());
        let size = file.len() as u64;
        let Opened::More { from } = Reader::open(size, &file.slice(file.len() - FOOTER_LEN..)).unwrap() else {
            panic!("the footer alone has no index");
        };
        let Opened::Ready(reader) = Reader::open(size, &file.slice(from as usize..)).unwrap() else { panic!() };
        assert_eq!((reader.rows(), reader.header().watermark), (64 * 800, Some(7)));
        let ranges = reader.ranges(range(10, 12));
        let bytes: u64 = ranges.iter().map(|(_, r)| r.end - r.start).sum();
        assert!(bytes < size / 8, "{bytes} of {size} bytes for 3 key groups of 64");
        let blocks: Vec<(usize, Bytes)> =
            ranges.iter().map(|(b, r)| (*b, file.slice(r.start as usize..r.end as usize))).collect();
        let read: Vec<RecordBatch> = blocks.iter().flat_map(|(b, bytes)| reader.decode(*b, bytes).unwrap()).collect();
        let all = concat_batches(&read[0].schema(), &read).unwrap();
        for group in 10..=12 {
            let wanted = rows(group, 800);
            let from = (0..all.num_rows()).find(|at| all.slice(*at, 1) == wanted.slice(0, 1)).unwrap();
            assert_eq!(all.slice(from, 800), wanted);
        }
        let part = Arc::new(reader).part(&blocks).unwrap();
        let rows = |key_groups| -> Vec<RecordBatch> {
            part.blocks(key_groups).flat_map(|(_, batches)| batches.unwrap()).collect()
        };
        assert_eq!((rows(range(0, 63)), rows(range(0, 5))), (read, Vec::new()));
        let mut damaged = blocks.clone();
        damaged[0].1 = blocks[0].1.slice(1..);
        assert_eq!(part.reader.part(&damaged).unwrap_err().disposition(), Disposition::Corrupt);
    }

    #[test]
    fn an_empty_state_is_a_file_too() {
        let file = file(&[]);
        let reader = Reader::verified(&file).unwrap();
        assert_eq!((reader.rows(), reader.ranges(range(0, 127)).len()), (0, 0));
    }

    /// What a reader says of damaged bytes: of the whole file, and of its parts read alone.
    fn damage(file: &Bytes) -> (Option<Disposition>, Option<Disposition>) {
        let parts = || -> Result<()> {
            let reader = Reader::whole(file)?;
            reader.blocks(file, range(0, u16::MAX)).collect::<Result<Vec<_>>>().map(drop)
        };
        let disposition = |r: Result<()>| r.err().map(|e| e.disposition());
        (disposition(Reader::verified(file).map(drop)), disposition(parts()))
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_found() {
        let good = file(&[(1, 20), (2, 30), (9, 2)]);
        assert_eq!(damage(&good), (None, None));
        let prefix = 11;
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] ^= 0x10;
            let (whole, parts) = damage(&bad.into());
            assert_eq!(whole, Some(Disposition::Corrupt), "byte {at}");
            assert!(at < prefix || parts == Some(Disposition::Corrupt), "byte {at}");
            let cut = damage(&good.slice(..at));
            assert_eq!(cut, (Some(Disposition::Corrupt), Some(Disposition::Corrupt)), "cut at {at}");
        }
    }

    #[test]
    fn blocks_of_another_file_are_found() {
        let (one, other) = (file(&[(1, 20)]), file(&[(2, 20)]));
        let reader = Reader::whole(&one).unwrap();
        let (block, place) = reader.ranges(range(0, 127)).remove(0);
        let bytes = other.slice(place.start as usize..place.end as usize);
        assert_eq!(reader.decode(block, &bytes).unwrap_err().disposition(), Disposition::Corrupt);
    }
}
