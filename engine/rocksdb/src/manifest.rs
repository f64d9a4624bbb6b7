//! Takes files out of the list that RocksDB keeps of a database's files, its MANIFEST, before it is opened. Pure.
//!
//! The list is a log of edits; one more that removes the files is what RocksDB itself would write had it dropped them:
//!
//! ```text
//! log     = blocks of 32 KiB; a record does not cross a block, what is left of one below a header's length is zeros
//! record  = masked CRC32C of kind and payload: u32, length: u16, kind: u8 (whole, first, middle, last), payload   little-endian
//! removal = 6, level: varint, number: varint
//! ```
//! Both have been as they are since LevelDB. What RocksDB can't read it refuses; nothing is lost by that.

use crate::row::varint;

const BLOCK: usize = 32 << 10;
const HEADER: usize = 7;
/// The edit that removes a file.
const REMOVED_FILE: u8 = 6;
/// The kinds of records, by whether the payload begins and ends in them.
const KINDS: [[u8; 2]; 2] = [[3, 4], [2, 1]];

/// The list without these files, given by their levels and numbers.
pub(crate) fn without(manifest: &[u8], files: &[(u32, u64)]) -> Vec<u8> {
    let mut log = manifest.to_vec();
    if files.is_empty() {
        return log;
    }
    let mut edit = Vec::with_capacity(files.len() * 8);
    for (level, number) in files {
        edit.push(REMOVED_FILE);
        varint(u128::from(*level), &mut edit);
        varint(u128::from(*number), &mut edit);
    }
    append(&mut log, &edit);
    log
}

fn append(log: &mut Vec<u8>, payload: &[u8]) {
    let (mut rest, mut begins) = (payload, true);
    loop {
        let mut left = BLOCK - log.len() % BLOCK;
        if left < HEADER {
            log.resize(log.len() + left, 0);
            left = BLOCK;
        }
        let (part, others) = rest.split_at(rest.len().min(left - HEADER));
        let kind = KINDS[usize::from(begins)][usize::from(others.is_empty())];
        let crc = crc32c::crc32c_append(crc32c::crc32c(&[kind]), part);
        log.extend_from_slice(&masked(crc).to_le_bytes());
        log.extend_from_slice(&(part.len() as u16).to_le_bytes());
        log.push(kind);
        log.extend_from_slice(part);
        (rest, begins) = (others, false);
        if rest.is_empty() {
            return;
        }
    }
}

/// A checksum as the log has it: not the plain one, which would be that of data with a checksum in it.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a log apart again.
    fn records(log: &[u8]) -> Vec<Vec<u8>> {
        let (mut at, mut open, mut inside, mut all) = (0, Vec::new(), false, Vec::new());
        while at < log.len() {
            if BLOCK - at % BLOCK < HEADER {
                at += BLOCK - at % BLOCK;
                continue;
            }
            let len = usize::from(u16::from_le_bytes([log[at + 4], log[at + 5]]));
            let (kind, part) = (log[at + 6], &log[at + HEADER..at + HEADER + len]);
            let crc = crc32c::crc32c(&log[at + 6..at + HEADER + len]);
            assert_eq!(log[at..at + 4], masked(crc).to_le_bytes());
            assert_eq!(matches!(kind, 1 | 2), !inside, "a record of kind {kind}");
            inside = matches!(kind, 2 | 3);
            open.extend_from_slice(part);
            if matches!(kind, 1 | 4) {
                all.push(std::mem::take(&mut open));
            }
            at += HEADER + len;
        }
        assert!(!inside);
        all
    }

    #[test]
    fn records_come_back_wherever_in_a_block_they_begin() {
        for before in [0, 1, BLOCK - 20, BLOCK - 3 * HEADER, BLOCK - 2 * HEADER, BLOCK - HEADER - 1, 3 * BLOCK] {
            for len in [1, 9, 100, BLOCK, 3 * BLOCK] {
                let (first, second) = (vec![1; before], vec![2; len]);
                let mut log = Vec::new();
                append(&mut log, &first);
                append(&mut log, &second);
                assert_eq!(records(&log), [first, second], "{before}, {len}");
            }
        }
    }

    #[test]
    fn a_removal_is_written_as_rocksdb_does() {
        assert_eq!(records(&without(&[], &[(0, 9), (6, 300)])), [[6, 0, 9, 6, 6, 0xac, 2]]);
        assert_eq!(without(b"as it is", &[]), b"as it is");
    }
}
