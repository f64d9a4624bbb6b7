//! The frame around everything that is stored: lengths and checksums that are verified before anything is decoded.
//!
//! A file is a header, blocks, and a trailer. Every byte is covered: the header by its own comparison, each block by a
//! CRC32C over its number, length and payload, the file as a whole by a trailer that counts the blocks. So a flipped bit, a
//! cut (also between two blocks), and blocks that were swapped, repeated or taken from another kind of file are all found.
//!
//! ```text
//! file    = "FLMK" version:u8 kind_len:u8 kind:bytes  block*  trailer
//! block   = len:u32 crc:u32 payload          crc over (number:u32 len:u32 payload)
//! trailer = 0xffffffff:u32 blocks:u32 crc:u32   crc over (kind, 0xffffffff, blocks)
//! ```
//! Integers are little-endian. Pure.

use bytes::{BufMut, Bytes, BytesMut};

use crate::{Error, Result};

const MAGIC: &[u8; 4] = b"FLMK";
const VERSION: u8 = 1;
const TRAILER_MARK: u32 = u32::MAX;
/// Longest payload of one block, bytes. A reader refuses more before it believes a damaged length.
pub const BLOCK_LEN_MAX: usize = 1 << 30;
/// Bytes of a block besides its payload.
pub const BLOCK_OVERHEAD: usize = 8;
/// Bytes of the trailer.
pub const TRAILER_LEN: usize = 12;

/// Writes a file of blocks.
#[derive(Debug)]
pub struct BlockWriter {
    kind: Vec<u8>,
    out: BytesMut,
    blocks: u32,
    last_crc: u32,
}

impl BlockWriter {
    /// A file of this kind (at most 255 bytes: `state`, `staged-json`); a reader must ask for the same.
    #[must_use]
    pub fn new(kind: &str) -> Self {
        let kind = kind.as_bytes()[..kind.len().min(255)].to_vec();
        let mut out = BytesMut::new();
        out.put_slice(MAGIC);
        out.put_u8(VERSION);
        out.put_u8(kind.len() as u8);
        out.put_slice(&kind);
        Self { kind, out, blocks: 0, last_crc: 0 }
    }

    /// Appends a block.
    ///
    /// # Errors
    /// When the payload is longer than [`BLOCK_LEN_MAX`].
    pub fn push(&mut self, payload: &[u8]) -> Result<()> {
        if payload.len() > BLOCK_LEN_MAX {
            return Err(Error::abort(format!(
                "a block of {} bytes is over the limit of {BLOCK_LEN_MAX}",
                payload.len()
            )));
        }
        let len = payload.len() as u32;
        self.out.reserve(payload.len() + 8);
        self.out.put_u32_le(len);
        self.last_crc = block_crc(self.blocks, len, payload);
        self.out.put_u32_le(self.last_crc);
        self.out.put_slice(payload);
        self.blocks += 1;
        Ok(())
    }

    /// Bytes written so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// The checksum of the last block, for an index of blocks.
    #[must_use]
    pub fn last_crc(&self) -> u32 {
        self.last_crc
    }

    /// Whether no block has been written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The whole file.
    #[must_use]
    pub fn finish(mut self) -> Bytes {
        self.out.put_u32_le(TRAILER_MARK);
        self.out.put_u32_le(self.blocks);
        self.out.put_u32_le(trailer_crc(&self.kind, self.blocks));
        self.out.freeze()
    }
}

/// Verifies a whole file of this kind and answers with its blocks, without copying them.
///
/// # Errors
/// `Corrupt` if the file is not, byte for byte, what a [`BlockWriter`] wrote.
pub fn read_blocks(kind: &str, file: &Bytes) -> Result<Vec<Bytes>> {
    let mut at = header(kind, file)?;
    let mut blocks = Vec::new();
    loop {
        let number = blocks.len() as u32;
        let len = u32_at(file, at).ok_or_else(|| truncated(at))?;
        if len == TRAILER_MARK {
            let (count, crc) = u32_at(file, at + 4).zip(u32_at(file, at + 8)).ok_or_else(|| truncated(at))?;
            if count != number || crc != trailer_crc(kind.as_bytes(), count) {
                return Err(Error::corrupt(format!("trailer at byte {at} does not fit {number} blocks")));
            }
            if at + 12 != file.len() {
                return Err(Error::corrupt(format!("{} bytes after the trailer", file.len() - at - 12)));
            }
            return Ok(blocks);
        }
        let crc = u32_at(file, at + 4).ok_or_else(|| truncated(at))?;
        let start = at + 8;
        let end = start + len as usize;
        if len as usize > BLOCK_LEN_MAX || end > file.len() {
            return Err(truncated(at));
        }
        let payload = file.slice(start..end);
        if block_crc(number, len, &payload) != crc {
            return Err(Error::corrupt(format!("checksum mismatch in block {number} at byte {at}")));
        }
        blocks.push(payload);
        at = end;
    }
}

/// Verifies one block that was read by itself: `frame` is block `number` of its file, from its length to its payload's end.
/// Answers with the payload.
///
/// # Errors
/// `Corrupt` if it is not.
pub fn read_block(number: u32, frame: &Bytes) -> Result<Bytes> {
    let head = u32_at(frame, 0).zip(u32_at(frame, 4));
    let (len, crc) = head.ok_or_else(|| Error::corrupt(format!("block {number} is cut")))?;
    let payload = frame.slice(BLOCK_OVERHEAD..);
    if payload.len() != len as usize || block_crc(number, len, &payload) != crc {
        return Err(Error::corrupt(format!("checksum mismatch in block {number}")));
    }
    Ok(payload)
}

/// Verifies the trailer, the last [`TRAILER_LEN`] bytes of a file of this kind. Answers with the number of blocks.
///
/// # Errors
/// `Corrupt` if it is not one.
pub fn read_trailer(kind: &str, trailer: &Bytes) -> Result<u32> {
    let fields = u32_at(trailer, 0).zip(u32_at(trailer, 4)).zip(u32_at(trailer, 8));
    match fields {
        Some(((TRAILER_MARK, blocks), crc))
            if crc == trailer_crc(kind.as_bytes(), blocks) && trailer.len() == TRAILER_LEN =>
        {
            Ok(blocks)
        }
        _ => Err(Error::corrupt(format!("not the end of a file of kind '{kind}'"))),
    }
}

fn header(kind: &str, file: &Bytes) -> Result<usize> {
    let end = 6 + kind.len();
    if file.len() < end {
        return Err(truncated(0));
    }
    if &file[..4] != MAGIC {
        return Err(Error::corrupt("not a Floodmark file"));
    }
    if file[4] != VERSION {
        return Err(Error::corrupt(format!("format version {} (this program reads {VERSION})", file[4])));
    }
    if usize::from(file[5]) != kind.len() || &file[6..end] != kind.as_bytes() {
        return Err(Error::corrupt(format!("not a file of kind '{kind}'")));
    }
    Ok(end)
}

fn truncated(at: usize) -> Error {
    Error::corrupt(format!("file ends inside the block at byte {at}"))
}

fn u32_at(file: &Bytes, at: usize) -> Option<u32> {
    file.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn block_crc(number: u32, len: u32, payload: &[u8]) -> u32 {
    let head = [number.to_le_bytes(), len.to_le_bytes()].concat();
    crc32c::crc32c_append(crc32c::crc32c(&head), payload)
}

fn trailer_crc(kind: &[u8], blocks: u32) -> u32 {
    let crc = crc32c::crc32c_append(crc32c::crc32c(kind), &TRAILER_MARK.to_le_bytes());
    crc32c::crc32c_append(crc, &blocks.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Bytes {
        let mut writer = BlockWriter::new("state");
        for payload in [b"first".as_slice(), b"", b"second block"] {
            writer.push(payload).unwrap();
        }
        writer.finish()
    }

    #[test]
    fn blocks_come_back_as_they_were_written() {
        let blocks = read_blocks("state", &sample()).unwrap();
        assert_eq!(blocks, [b"first".as_slice(), b"", b"second block"]);
        assert!(read_blocks("state", &BlockWriter::new("state").finish()).unwrap().is_empty());
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = sample();
        for byte in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.to_vec();
                bad[byte] ^= 1 << bit;
                let error = read_blocks("state", &bad.into()).expect_err("a flipped bit");
                assert_eq!(error.disposition(), crate::Disposition::Corrupt, "byte {byte} bit {bit}: {error}");
            }
        }
    }

    #[test]
    fn every_cut_and_every_tail_is_found() {
        let good = sample();
        for len in 0..good.len() {
            read_blocks("state", &good.slice(..len)).expect_err("a cut file");
        }
        read_blocks("state", &[good.as_ref(), b"\0"].concat().into()).expect_err("a longer file");
    }

    #[test]
    fn swapped_blocks_and_another_kind_are_found() {
        let mut one = BlockWriter::new("state");
        one.push(b"aaaa").unwrap();
        one.push(b"bbbb").unwrap();
        let file = one.finish();
        let (head, block) = (11, 12);
        let swapped = [
            &file[..head],
            &file[head + block..head + 2 * block],
            &file[head..head + block],
            &file[head + 2 * block..],
        ];
        read_blocks("state", &swapped.concat().into()).expect_err("swapped blocks");
        read_blocks("staged", &file).expect_err("another kind");
    }
}
