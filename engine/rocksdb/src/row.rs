//! A row's value in the database: small, and quick to take apart. Pure.
//!
//! ```text
//! value  = version: u8 = 2, written: i64, widths: a nibble per column with the first one low, the columns
//! width  = bytes of a column's number: 0 to 13; 14 stands for 16, 15 for a column that is null
//! number = Long and Wide: zigzag; Double: its bits, the highest byte first; Bytes: how many there are, which then follow
//! ```
//! Integers are little-endian, numbers without their zeros at the end. `written` is the wall-clock time of the last write in
//! milliseconds if the state has a time to live, and missing otherwise. Which columns there are is told once for all rows
//! ([`crate::meta`]), and the key's hash nowhere: the operator knows it by the key ([`floodmark_state::Layout::hashes`]).
//!
//! Rows of version 1, which earlier programs wrote, are read as well:
//!
//! ```text
//! value  = version: u8 = 1, hash: u64, written: i64, nulls: a bit per column, columns that are not null
//! Long   = zigzag varint        Double = u64        Wide = zigzag varint of 128 bits        Bytes = varint length, bytes
//! ```

use floodmark_snapshot::{Error, Result};
use floodmark_state::{Chunk, Column, ColumnType, Table};

const VERSION: u8 = 2;
/// Its rows have a hash, and columns of their own.
const EARLIER: u8 = 1;
/// The width of a number that takes 16 bytes.
const WHOLE: u8 = 14;
/// The width of a column that is null.
const NULL: u8 = 15;

/// How rows of one state look.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    pub(crate) types: Vec<ColumnType>,
    /// Whether rows say when they were written.
    pub(crate) timed: bool,
}

/// A row's value, as far as all have the same in common.
struct Parts<'a> {
    version: u8,
    /// The hash that earlier programs wrote; empty in rows of this one.
    hash: &'a [u8],
    /// 0 if rows don't say.
    written: i64,
    columns: &'a [u8],
}

impl Form {
    /// Appends the value of a row.
    pub(crate) fn write(&self, chunk: &Chunk, row: usize, written: i64, out: &mut Vec<u8>) {
        out.push(VERSION);
        self.write_time(written, out);
        let widths = out.len();
        out.resize(widths + self.types.len().div_ceil(2), 0);
        for (at, column) in chunk.columns.iter().enumerate() {
            let width = match column {
                Column::Long(values) => values[row].map(|v| put(zigzag(i128::from(v)), out)),
                Column::Double(values) => values[row].map(|v| put(u128::from(v.to_bits().swap_bytes()), out)),
                Column::Wide(values) => values[row].map(|v| put(zigzag(v), out)),
                Column::Bytes(values) => values[row].as_ref().map(|bytes| {
                    let width = put(bytes.len() as u128, out);
                    out.extend_from_slice(bytes);
                    width
                }),
            };
            out[widths + at / 2] |= width.unwrap_or(NULL) << (at % 2 * 4);
        }
    }

    /// Wall-clock time of the last write, milliseconds; 0 if rows don't say.
    ///
    /// # Errors
    /// `Corrupt` if it is not there.
    pub(crate) fn written(&self, value: &[u8]) -> Result<i64> {
        self.split(value).map(|parts| parts.written).ok_or_else(damaged)
    }

    /// Reads the columns into a row of a table that is all null. Answers when the row was written.
    ///
    /// # Errors
    /// `Corrupt` if the value is none of this form.
    pub(crate) fn read(&self, value: &[u8], table: &mut Table, slot: u32) -> Result<i64> {
        let parts = self.split(value).ok_or_else(damaged)?;
        let put = |at: usize, value: Value<'_>| {
            table.write_runs(&[slot], at, |column, rows, _| value.put(column, rows[0] as usize));
        };
        let columns = parts.columns;
        let read = if parts.version == EARLIER { self.take_earlier(columns, put) } else { self.take(columns, put) };
        read.map(|()| parts.written).ok_or_else(damaged)
    }

    fn take<'a>(&self, columns: &'a [u8], mut put: impl FnMut(usize, Value<'a>)) -> Option<()> {
        let (widths, mut rest) = columns.split_at_checked(self.types.len().div_ceil(2))?;
        for (at, column_type) in self.types.iter().enumerate() {
            let width = widths[at / 2] >> (at % 2 * 4) & 0xf;
            if width == NULL {
                continue;
            }
            let number = take(width, &mut rest)?;
            let value = match column_type {
                ColumnType::Long => Value::Long(i64::try_from(unzigzag(number)).ok()?),
                ColumnType::Double => Value::Double(f64::from_bits(u64::try_from(number).ok()?.swap_bytes())),
                ColumnType::Wide => Value::Wide(unzigzag(number)),
                ColumnType::Bytes => Value::Bytes(take_bytes(number, &mut rest)?),
            };
            put(at, value);
        }
        rest.is_empty().then_some(())
    }

    fn take_earlier<'a>(&self, columns: &'a [u8], mut put: impl FnMut(usize, Value<'a>)) -> Option<()> {
        let (nulls, mut rest) = columns.split_at_checked(self.types.len().div_ceil(8))?;
        for (at, column_type) in self.types.iter().enumerate() {
            if nulls[at / 8] & (1 << (at % 8)) != 0 {
                continue;
            }
            let value = match column_type {
                ColumnType::Long => Value::Long(i64::try_from(unzigzag(take_varint(&mut rest)?)).ok()?),
                ColumnType::Double => {
                    let (bits, after) = rest.split_first_chunk()?;
                    rest = after;
                    Value::Double(f64::from_le_bytes(*bits))
                }
                ColumnType::Wide => Value::Wide(unzigzag(take_varint(&mut rest)?)),
                ColumnType::Bytes => Value::Bytes(take_bytes(take_varint(&mut rest)?, &mut rest)?),
            };
            put(at, value);
        }
        rest.is_empty().then_some(())
    }

    /// Rewrites a value of this form in another, which differs at most in whether rows say when they were written.
    ///
    /// # Errors
    /// `Corrupt` if the value is none of this form.
    pub(crate) fn convert(&self, value: &[u8], to: &Self, now: i64, out: &mut Vec<u8>) -> Result<()> {
        let Parts { version, hash, written, columns } = self.split(value).ok_or_else(damaged)?;
        out.clear();
        out.push(version);
        out.extend_from_slice(hash);
        to.write_time(if self.timed { written } else { now }, out);
        out.extend_from_slice(columns);
        Ok(())
    }

    fn write_time(&self, written: i64, out: &mut Vec<u8>) {
        if self.timed {
            out.extend_from_slice(&written.to_le_bytes());
        }
    }

    fn split<'a>(&self, value: &'a [u8]) -> Option<Parts<'a>> {
        let (version, rest) = value.split_first()?;
        let (hash, rest) = match *version {
            VERSION => rest.split_at(0),
            EARLIER => rest.split_at_checked(8)?,
            _ => return None,
        };
        let (written, columns) = match self.timed {
            true => rest.split_first_chunk().map(|(w, rest)| (i64::from_le_bytes(*w), rest))?,
            false => (0, rest),
        };
        Some(Parts { version: *version, hash, written, columns })
    }
}

fn damaged() -> Error {
    Error::corrupt("a row of the database is not in the form in which rows are written")
}

#[derive(Clone, Copy)]
enum Value<'a> {
    Long(i64),
    Double(f64),
    Wide(i128),
    Bytes(&'a [u8]),
}

impl Value<'_> {
    fn put(self, column: &mut Column, row: usize) {
        match (self, column) {
            (Self::Long(v), Column::Long(values)) => values[row] = Some(v),
            (Self::Double(v), Column::Double(values)) => values[row] = Some(v),
            (Self::Wide(v), Column::Wide(values)) => values[row] = Some(v),
            (Self::Bytes(v), Column::Bytes(values)) => values[row] = Some(v.into()),
            // Tables are made of the types by which values were taken.
            (Self::Long(_) | Self::Double(_) | Self::Wide(_) | Self::Bytes(_), _) => {}
        }
    }
}

fn zigzag(v: i128) -> u128 {
    ((v << 1) ^ (v >> 127)) as u128
}

fn unzigzag(v: u128) -> i128 {
    ((v >> 1) as i128) ^ -((v & 1) as i128)
}

/// Appends a number, and answers its width.
fn put(number: u128, out: &mut Vec<u8>) -> u8 {
    let bytes = 16 - number.leading_zeros() as usize / 8;
    let (width, bytes) = if bytes < usize::from(WHOLE) { (bytes as u8, bytes) } else { (WHOLE, 16) };
    out.extend_from_slice(&number.to_le_bytes()[..bytes]);
    width
}

/// Takes a number of this width.
fn take(width: u8, from: &mut &[u8]) -> Option<u128> {
    let (bytes, rest) = from.split_at_checked(if width == WHOLE { 16 } else { usize::from(width) })?;
    *from = rest;
    let mut number = [0; 16];
    number[..bytes.len()].copy_from_slice(bytes);
    Some(u128::from_le_bytes(number))
}

fn take_bytes<'a>(length: u128, from: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (bytes, rest) = from.split_at_checked(usize::try_from(length).ok()?)?;
    *from = rest;
    Some(bytes)
}

/// Appends a number, seven bits a byte, the least first.
pub(crate) fn varint(mut v: u128, out: &mut Vec<u8>) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

pub(crate) fn take_varint(from: &mut &[u8]) -> Option<u128> {
    let mut v: u128 = 0;
    for shift in (0..128).step_by(7) {
        let (byte, rest) = from.split_first()?;
        *from = rest;
        v |= u128::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(v);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    type Values<'a> = (Option<i64>, Option<f64>, Option<i128>, Option<&'a [u8]>);

    fn form(timed: bool) -> Form {
        Form { types: vec![ColumnType::Long, ColumnType::Double, ColumnType::Wide, ColumnType::Bytes], timed }
    }

    fn table(rows: &[Values<'_>]) -> Table {
        let mut table = Table::new(form(false).types);
        for (at, (long, double, wide, bytes)) in rows.iter().enumerate() {
            let (slot, _) = table.slot(at as u64 * 77, &at.to_le_bytes());
            table.write_runs(&[slot], 0, |c, r, _| long.iter().for_each(|v| Value::Long(*v).put(c, r[0] as usize)));
            table.write_runs(&[slot], 1, |c, r, _| double.iter().for_each(|v| Value::Double(*v).put(c, r[0] as usize)));
            table.write_runs(&[slot], 2, |c, r, _| wide.iter().for_each(|v| Value::Wide(*v).put(c, r[0] as usize)));
            table.write_runs(&[slot], 3, |c, r, _| bytes.iter().for_each(|v| Value::Bytes(v).put(c, r[0] as usize)));
        }
        table
    }

    fn written(form: &Form, table: &Table, slot: u32) -> Vec<u8> {
        let (chunk, row) = table.rows().read(slot as usize);
        let mut out = Vec::new();
        form.write(chunk, row, 1234, &mut out);
        out
    }

    #[test]
    fn rows_come_back_as_they_were_and_cut_ones_are_refused() {
        let rows: &[Values<'_>] = &[
            (None, None, None, None),
            (Some(0), Some(-0.0), Some(0), Some(b"")),
            (Some(i64::MIN), Some(f64::MAX), Some(i128::MIN), Some(b"some bytes")),
            (Some(i64::MAX), Some(f64::MIN_POSITIVE), Some(i128::MAX), None),
            (Some(-1), None, Some(-1), Some(&[0xff; 300])),
            (Some(1 << 40), Some(1.0), Some(1 << 102), Some(b"x")),
            (Some(77), Some(f64::NAN), Some(1 << 103), None),
        ];
        let source = table(rows);
        for timed in [false, true] {
            let form = form(timed);
            for slot in 0..rows.len() as u32 {
                let value = written(&form, &source, slot);
                let mut back = Table::new(form.types.clone());
                let (at, _) = back.slot(slot as u64 * 77, &(slot as usize).to_le_bytes());
                let then = form.read(&value, &mut back, at).unwrap();
                assert_eq!(then, if timed { 1234 } else { 0 });
                assert_eq!(form.written(&value).unwrap(), then);
                assert_eq!(written(&form, &back, at), value);
                for cut in 0..value.len() {
                    let mut table = Table::new(form.types.clone());
                    table.slot(1, b"");
                    form.read(&value[..cut], &mut table, 0).expect_err("a cut row");
                }
                let mut table = Table::new(form.types.clone());
                table.slot(1, b"");
                form.read(&[value.as_slice(), b"x"].concat(), &mut table, 0).expect_err("a longer row");
            }
        }
    }

    #[test]
    fn a_row_takes_what_its_numbers_need() {
        let rows: &[Values<'_>] = &[
            (Some(0), Some(0.0), Some(0), Some(b"")),
            (Some(-128), Some(2.0), None, Some(b"abc")),
            (None, None, None, None),
        ];
        let source = table(rows);
        let lengths = [0, 1, 2].map(|slot| written(&form(false), &source, slot).len());
        // The version, and two widths a byte.
        assert_eq!(lengths, [3, 3 + 1 + 1 + (1 + 3), 3]);
    }

    #[test]
    fn rows_of_earlier_programs_are_read_and_converted() {
        let (hash, time) = (99_u64.to_le_bytes(), 1234_i64.to_le_bytes());
        let columns = [&[0b0100_u8, 0x97, 0x01][..], &2.5_f64.to_le_bytes(), &[3], b"abc"].concat();
        let plain = [&[1_u8][..], &hash, &columns].concat();
        let timed = [&[1_u8][..], &hash, &time, &columns].concat();
        let read = |form: &Form, value: &[u8]| {
            let mut table = Table::new(form.types.clone());
            let (slot, _) = table.slot(99, b"k");
            form.read(value, &mut table, slot).map(|then| (then, written(&self::form(false), &table, slot)))
        };
        let same = written(&form(false), &table(&[(Some(-76), Some(2.5), None, Some(b"abc"))]), 0);
        assert_eq!(read(&form(false), &plain).unwrap(), (0, same.clone()));
        assert_eq!(read(&form(true), &timed).unwrap(), (1234, same));
        let mut out = Vec::new();
        form(false).convert(&plain, &form(true), 1234, &mut out).unwrap();
        assert_eq!(out, timed);
        form(true).convert(&timed, &form(false), 0, &mut out).unwrap();
        assert_eq!(out, plain);
        for cut in 0..plain.len() {
            read(&form(false), &plain[..cut]).unwrap_err();
        }
        read(&form(false), &[&[3], &plain[1..]].concat()).unwrap_err();
    }
}
