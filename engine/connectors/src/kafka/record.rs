//! Rows to records (a key, a value, or a value's absence: a tombstone), and records to staged files and back. Pure.
//!
//! A changelog becomes upserts: of the rows of one key in a batch only the last counts, and is the key's new value, or a
//! tombstone if the row is gone.
//!
//! ```text
//! file   = a file of checksummed blocks (floodmark_snapshot::block), kind "staged-records"
//! block  = record*
//! record = key_len:i32 value_len:i32 key value      little-endian; a length of -1 stands for null
//! ```

use std::collections::HashMap;

use arrow::{
    array::{Array, AsArray, BooleanArray},
    compute::filter_record_batch,
    datatypes::Int8Type,
    record_batch::RecordBatch,
};
use bytes::Bytes;
use floodmark_dataflow::RowKind;
use floodmark_snapshot::{
    Error, Result,
    block::{BlockWriter, read_blocks},
};

use crate::format::Format;

/// The kind of the framed file that staged records are in.
const STAGED: &str = "staged-records";
const NULL: i32 = -1;

/// How the rows of a sink become records.
#[derive(Clone, Debug)]
pub(super) struct Encoder {
    pub(super) format: Format,
    /// Columns of the value: all of the table's.
    pub(super) value: Vec<usize>,
    /// Columns of the key; none for records without one.
    pub(super) key: Vec<usize>,
    /// The row-kind column of a changelog.
    pub(super) kind: Option<usize>,
}

impl Encoder {
    /// Appends the records of a batch to `out`; answers with their number.
    pub(super) fn encode(&self, rows: &RecordBatch, out: &mut Vec<u8>) -> Result<u64> {
        let keys = if self.key.is_empty() { None } else { Some(self.lines(rows, &self.key)?) };
        let Some(kind) = self.kind else {
            let values = self.lines(rows, &self.value)?;
            for row in 0..rows.num_rows() {
                put(out, keys.as_ref().map(|k| k.get(row)), Some(values.get(row)))?;
            }
            return Ok(rows.num_rows() as u64);
        };
        let keys = keys.ok_or_else(|| Error::abort("a changelog needs a key"))?;
        let kinds = rows.column(kind).as_primitive_opt::<Int8Type>();
        let kinds = kinds.ok_or_else(|| Error::abort("the row kinds of a changelog are not of type Int8"))?;
        let last: HashMap<&[u8], usize> = (0..rows.num_rows()).map(|row| (keys.get(row), row)).collect();
        let counts = |row: usize| last.get(keys.get(row)) == Some(&row);
        let there = |row: usize| {
            let kind = if kinds.is_null(row) { RowKind::Insert } else { RowKind::from_i8(kinds.value(row)) };
            matches!(kind, RowKind::Insert | RowKind::UpdateAfter)
        };
        let upserts: BooleanArray = (0..rows.num_rows()).map(|row| Some(counts(row) && there(row))).collect();
        let upserted = filter_record_batch(rows, &upserts).map_err(|e| Error::abort(format!("filter rows: {e}")))?;
        let values = self.lines(&upserted, &self.value)?;
        let mut value = 0;
        for row in (0..rows.num_rows()).filter(|row| counts(*row)) {
            if upserts.value(row) {
                put(out, Some(keys.get(row)), Some(values.get(value)))?;
                value += 1;
            } else {
                put(out, Some(keys.get(row)), None)?;
            }
        }
        Ok(last.len() as u64)
    }

    fn lines(&self, rows: &RecordBatch, columns: &[usize]) -> Result<Lines> {
        let rows = rows.project(columns).map_err(|e| Error::abort(format!("choose columns: {e}")))?;
        let mut text = Vec::new();
        if rows.num_rows() > 0 {
            self.format.encode(&rows, &mut text)?;
        }
        let ends: Vec<usize> = text.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(i, _)| i).collect();
        if ends.len() != rows.num_rows() {
            return Err(Error::abort(format!("{} rows became {} records", rows.num_rows(), ends.len())));
        }
        Ok(Lines { text, ends })
    }
}

/// Encoded rows, a line each.
struct Lines {
    text: Vec<u8>,
    ends: Vec<usize>,
}

impl Lines {
    fn get(&self, row: usize) -> &[u8] {
        let start = if row == 0 { 0 } else { self.ends[row - 1] + 1 };
        &self.text[start..self.ends[row]]
    }
}

/// Appends a record to a block.
///
/// # Errors
/// When key or value are over 2 GiB long.
pub fn put(out: &mut Vec<u8>, key: Option<&[u8]>, value: Option<&[u8]>) -> Result<()> {
    for part in [key, value] {
        let len = match part {
            None => NULL,
            Some(part) => i32::try_from(part.len()).map_err(|_| Error::abort("a record is over 2 GiB long"))?,
        };
        out.extend_from_slice(&len.to_le_bytes());
    }
    out.extend_from_slice(key.unwrap_or_default());
    out.extend_from_slice(value.unwrap_or_default());
    Ok(())
}

/// The file that blocks of records are staged in.
///
/// # Errors
/// When a block is too long.
pub fn stage<'a>(blocks: impl IntoIterator<Item = &'a [u8]>) -> Result<Bytes> {
    let mut file = BlockWriter::new(STAGED);
    blocks.into_iter().filter(|block| !block.is_empty()).try_for_each(|block| file.push(block))?;
    Ok(file.finish())
}

/// Hands over the records of a staged file, in order. The whole file is verified before the first.
///
/// # Errors
/// `Corrupt` if it is not what [`stage`] has written; whatever `take` fails with.
pub fn unstage(file: &Bytes, mut take: impl FnMut(Record<'_>) -> Result<()>) -> Result<()> {
    for block in read_blocks(STAGED, file)? {
        for record in Records(&block) {
            take(record?)?;
        }
    }
    Ok(())
}

/// A record: key and value.
pub type Record<'a> = (Option<&'a [u8]>, Option<&'a [u8]>);

/// Reads records back, one after the other.
pub(super) struct Records<'a>(pub(super) &'a [u8]);

impl<'a> Records<'a> {
    fn length(&mut self) -> Option<Option<usize>> {
        let (head, rest) = self.0.split_first_chunk::<4>()?;
        self.0 = rest;
        match i32::from_le_bytes(*head) {
            NULL => Some(None),
            length => usize::try_from(length).ok().map(Some),
        }
    }

    fn part(&mut self, length: Option<usize>) -> Option<Option<&'a [u8]>> {
        let Some(length) = length else { return Some(None) };
        let (part, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(Some(part))
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let mut read = || {
            let (key, value) = (self.length()?, self.length()?);
            Some((self.part(key)?, self.part(value)?))
        };
        let record = read();
        if record.is_none() {
            self.0 = &[];
        }
        Some(record.ok_or_else(|| Error::corrupt("staged records end inside a record")))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Int8Array, Int64Array, StringArray};
    use expect_test::{Expect, expect};
    use floodmark_snapshot::Disposition;

    use super::*;

    /// Rows as `(kind, k, v)`.
    fn check(key: &[usize], changelog: bool, rows: &[(i8, i64, &str)], expected: Expect) {
        let batch = RecordBatch::try_from_iter([
            ("k", Arc::new(rows.iter().map(|r| r.1).collect::<Int64Array>()) as Arc<dyn Array>),
            ("v", Arc::new(rows.iter().map(|r| Some(r.2)).collect::<StringArray>())),
            ("$kind", Arc::new(rows.iter().map(|r| r.0).collect::<Int8Array>())),
        ])
        .unwrap();
        let kind = changelog.then_some(2);
        let encoder = Encoder { format: Format::Json, value: vec![0, 1], key: key.to_vec(), kind };
        let mut out = Vec::new();
        let count = encoder.encode(&batch, &mut out).unwrap();
        let text = |part: Option<&[u8]>| part.map_or("null".to_owned(), |p| String::from_utf8(p.to_vec()).unwrap());
        let lines: Vec<String> =
            Records(&out).map(|r| r.unwrap()).map(|(key, value)| format!("{} -> {}", text(key), text(value))).collect();
        assert_eq!(lines.len() as u64, count);
        expected.assert_eq(&lines.join("\n"));
    }

    #[test]
    fn insertions_are_written_one_by_one() {
        check(
            &[],
            false,
            &[(0, 1, "a"), (0, 1, "line\nbreak")],
            expect![[r#"
                null -> {"k":1,"v":"a"}
                null -> {"k":1,"v":"line\nbreak"}"#]],
        );
    }

    #[test]
    fn the_last_row_of_a_key_in_a_batch_wins() {
        check(
            &[0],
            true,
            &[(0, 1, "a"), (0, 2, "b"), (1, 1, "a"), (2, 1, "c"), (3, 2, "b"), (0, 3, "d"), (1, 4, "e")],
            expect![[r#"
                {"k":1} -> {"k":1,"v":"c"}
                {"k":2} -> null
                {"k":3} -> {"k":3,"v":"d"}
                {"k":4} -> null"#]],
        );
    }

    #[test]
    fn a_staged_file_gives_its_records_back_in_order_and_of_a_damaged_one_none() {
        let records: [Record<'_>; 5] =
            [(None, Some(b"a")), (Some(b"k"), None), (None, None), (Some(b""), Some(b"")), (Some(b"k"), Some(b"v"))];
        let mut blocks = vec![Vec::new(); 3];
        records.iter().zip([0, 0, 2, 2, 2]).for_each(|((k, v), block)| put(&mut blocks[block], *k, *v).unwrap());
        let file = stage(blocks.iter().map(Vec::as_slice)).unwrap();
        let read = |file: &Bytes| {
            let (owned, mut found) = (|part: Option<&[u8]>| part.map(<[u8]>::to_vec), Vec::new());
            let outcome = unstage(file, |(key, value)| {
                found.push((owned(key), owned(value)));
                Ok(())
            });
            (outcome.map_err(|e| e.disposition()), found)
        };
        let owned = |part: Option<&[u8]>| part.map(<[u8]>::to_vec);
        assert_eq!(read(&file), (Ok(()), records.iter().map(|(k, v)| (owned(*k), owned(*v))).collect()));
        for at in 0..file.len() {
            let mut bad = file.to_vec();
            bad[at] ^= 4;
            for bad in [bad.into(), file.slice(..at)] {
                assert_eq!(read(&bad), (Err(Disposition::Corrupt), Vec::new()), "byte {at}");
            }
        }
    }

    #[test]
    fn every_cut_is_found() {
        let mut out = Vec::new();
        put(&mut out, Some(b"key"), Some(b"value")).unwrap();
        assert_eq!(Records(&out).map(|r| r.unwrap()).collect::<Vec<_>>(), [(Some(&b"key"[..]), Some(&b"value"[..]))]);
        for len in 1..out.len() {
            assert!(Records(&out[..len]).next().unwrap().is_err(), "cut at {len}");
        }
    }
}
