//! A row's value in the database: small, and quick to take apart. Pure.
//!
//! ```text
//! value  = version: u8, hash: u64, written: i64, nulls: a bit per column, columns that are not null
//! Long   = zigzag varint        Double = u64        Wide = zigzag varint of 128 bits        Bytes = varint length, bytes
//! ```
//! Fixed integers are little-endian. `written` is the wall-clock time of the last write in milliseconds if the state has a time
//! to live, and missing otherwise. Which columns there are is told once for all rows ([`crate::meta`]).

use floodmark_snapshot::{Error, Result};
use floodmark_state::{Chunk, Column, ColumnType, Table};

const VERSION: u8 = 1;

/// How rows of one state look.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    pub(crate) types: Vec<ColumnType>,
    /// Whether rows say when they were written.
    pub(crate) timed: bool,
}

/// What comes before the columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// The hash of the key.
    pub(crate) hash: u64,
    /// Wall-clock time of the last write, milliseconds; 0 if rows don't say.
    pub(crate) written: i64,
}

impl Form {
    /// Appends the value of a row.
    pub(crate) fn write(&self, chunk: &Chunk, row: usize, written: i64, out: &mut Vec<u8>) {
        self.write_head(Head { hash: chunk.hash(row), written }, out);
        let nulls = out.len();
        out.resize(nulls + self.types.len().div_ceil(8), 0);
        for (at, column) in chunk.columns.iter().enumerate() {
            let there = match column {
                Column::Long(values) => values[row].map(|v| varint(zigzag(i128::from(v)), out)).is_some(),
                Column::Double(values) => values[row].map(|v| out.extend_from_slice(&v.to_le_bytes())).is_some(),
                Column::Wide(values) => values[row].map(|v| varint(zigzag(v), out)).is_some(),
                Column::Bytes(values) => match &values[row] {
                    Some(bytes) => {
                        varint(bytes.len() as u128, out);
                        out.extend_from_slice(bytes);
                        true
                    }
                    None => false,
                },
            };
            if !there {
                out[nulls + at / 8] |= 1 << (at % 8);
            }
        }
    }

    /// Reads what comes before the columns.
    ///
    /// # Errors
    /// `Corrupt` if it is not there.
    pub(crate) fn head(&self, value: &[u8]) -> Result<Head> {
        self.split(value).map(|(head, _)| head).ok_or_else(damaged)
    }

    /// Reads the columns into a row of a table that is all null.
    ///
    /// # Errors
    /// `Corrupt` if the value is none of this form.
    pub(crate) fn read(&self, value: &[u8], table: &mut Table, slot: u32) -> Result<Head> {
        let (head, rest) = self.split(value).ok_or_else(damaged)?;
        let (nulls, mut rest) = rest.split_at_checked(self.types.len().div_ceil(8)).ok_or_else(damaged)?;
        for (at, column_type) in self.types.iter().enumerate() {
            if nulls[at / 8] & (1 << (at % 8)) != 0 {
                continue;
            }
            let value = Value::take(*column_type, &mut rest).ok_or_else(damaged)?;
            table.write_runs(&[slot], at, |column, rows, _| value.put(column, rows[0] as usize));
        }
        if rest.is_empty() { Ok(head) } else { Err(damaged()) }
    }

    /// Rewrites a value of this form in another, which differs at most in whether rows say when they were written.
    ///
    /// # Errors
    /// `Corrupt` if the value is none of this form.
    pub(crate) fn convert(&self, value: &[u8], to: &Self, now: i64, out: &mut Vec<u8>) -> Result<()> {
        let (head, columns) = self.split(value).ok_or_else(damaged)?;
        out.clear();
        to.write_head(Head { written: if self.timed { head.written } else { now }, ..head }, out);
        out.extend_from_slice(columns);
        Ok(())
    }

    fn write_head(&self, head: Head, out: &mut Vec<u8>) {
        out.push(VERSION);
        out.extend_from_slice(&head.hash.to_le_bytes());
        if self.timed {
            out.extend_from_slice(&head.written.to_le_bytes());
        }
    }

    fn split<'a>(&self, value: &'a [u8]) -> Option<(Head, &'a [u8])> {
        let (VERSION, rest) = value.split_first().map(|(v, rest)| (*v, rest))? else { return None };
        let (hash, rest) = rest.split_first_chunk::<8>()?;
        let (written, rest) = match self.timed {
            true => rest.split_first_chunk::<8>().map(|(w, rest)| (i64::from_le_bytes(*w), rest))?,
            false => (0, rest),
        };
        Some((Head { hash: u64::from_le_bytes(*hash), written }, rest))
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

impl<'a> Value<'a> {
    fn take(column_type: ColumnType, from: &mut &'a [u8]) -> Option<Self> {
        Some(match column_type {
            ColumnType::Long => Self::Long(i64::try_from(unzigzag(take_varint(from)?)).ok()?),
            ColumnType::Double => {
                let (bytes, rest) = from.split_first_chunk::<8>()?;
                *from = rest;
                Self::Double(f64::from_le_bytes(*bytes))
            }
            ColumnType::Wide => Self::Wide(unzigzag(take_varint(from)?)),
            ColumnType::Bytes => {
                let len = usize::try_from(take_varint(from)?).ok()?;
                let (bytes, rest) = from.split_at_checked(len)?;
                *from = rest;
                Self::Bytes(bytes)
            }
        })
    }

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
        ];
        let source = table(rows);
        for timed in [false, true] {
            let form = form(timed);
            for slot in 0..rows.len() as u32 {
                let value = written(&form, &source, slot);
                let mut back = Table::new(form.types.clone());
                let (at, _) = back.slot(slot as u64 * 77, &(slot as usize).to_le_bytes());
                let head = form.read(&value, &mut back, at).unwrap();
                assert_eq!(head, Head { hash: u64::from(slot) * 77, written: if timed { 1234 } else { 0 } });
                assert_eq!(form.head(&value).unwrap(), head);
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
}
