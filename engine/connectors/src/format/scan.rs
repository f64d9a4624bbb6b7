//! The fast way from JSON to columns: one pass over the bytes, straight into the columns that the job needs.
//!
//! It takes records of the usual shape only. Of anything else (an odd number, a date in another style, a field that comes
//! twice, text that is not JSON) it says nothing but that it doesn't take it: the thorough decoder then decides and explains.
//! Invariant: what this decodes, that one would decode to the same rows. Pure.

use std::sync::Arc;

use arrow::{
    array::{
        ArrayRef, BooleanArray, Float64Array, Int32Array, Int64Array, RecordBatchOptions, StringArray, StructArray,
        TimestampMillisecondArray,
    },
    buffer::{NullBuffer, OffsetBuffer},
    datatypes::{DataType, Fields, SchemaRef, TimeUnit},
    record_batch::RecordBatch,
};

/// Bytes that a text is expected to have.
const TEXT_BYTES: usize = 16;
/// Deepest nesting that is followed.
const DEPTH_MAX: usize = 32;

/// Decodes records of one schema.
pub(super) struct Scanner {
    schema: SchemaRef,
}

impl Scanner {
    /// `None` for a schema with columns of a type that is not for the fast way.
    pub(super) fn new(schema: &SchemaRef) -> Option<Self> {
        columns(schema.fields())?;
        Some(Self { schema: schema.clone() })
    }

    /// Decodes all records, or takes none of them.
    pub(super) fn decode<'r>(&self, records: impl Iterator<Item = &'r [u8]>) -> Option<RecordBatch> {
        let mut root = columns(self.schema.fields())?;
        let expected = records.size_hint().0;
        root.iter_mut().for_each(|c| c.reserve(expected));
        let mut rows = 0;
        for record in records {
            // The thorough decoder refuses what is not UTF-8, wherever it is.
            std::str::from_utf8(record).ok()?;
            let mut text = Text { bytes: record, at: 0 };
            text.space();
            text.object(&mut root, rows, 0)?;
            text.space();
            if text.at != record.len() {
                return None;
            }
            rows += 1;
        }
        let arrays = root.into_iter().map(Column::finish).collect::<Option<Vec<_>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        RecordBatch::try_new_with_options(self.schema.clone(), arrays, &options).ok()
    }
}

fn columns(fields: &Fields) -> Option<Vec<Column>> {
    fields.iter().map(|f| Column::new(f.name(), f.data_type(), f.is_nullable())).collect()
}

/// A column as it grows.
struct Column {
    name: Vec<u8>,
    valid: Vec<bool>,
    values: Values,
}

enum Values {
    Int32(Vec<i32>),
    Int64(Vec<i64>),
    Float64(Vec<f64>),
    Boolean(Vec<bool>),
    Millis(Vec<i64>),
    Utf8 { ends: Vec<i32>, bytes: Vec<u8> },
    Struct(Fields, Vec<Column>),
}

impl Column {
    fn new(name: &str, data_type: &DataType, nullable: bool) -> Option<Self> {
        let values = match data_type {
            DataType::Int32 => Values::Int32(Vec::new()),
            DataType::Int64 => Values::Int64(Vec::new()),
            DataType::Float64 => Values::Float64(Vec::new()),
            DataType::Boolean => Values::Boolean(Vec::new()),
            DataType::Timestamp(TimeUnit::Millisecond, None) => Values::Millis(Vec::new()),
            DataType::Utf8 => Values::Utf8 { ends: vec![0], bytes: Vec::new() },
            DataType::Struct(fields) if !fields.is_empty() => Values::Struct(fields.clone(), columns(fields)?),
            _ => return None,
        };
        nullable.then(|| Self { name: name.as_bytes().to_vec(), valid: Vec::new(), values })
    }

    fn reserve(&mut self, rows: usize) {
        self.valid.reserve(rows);
        match &mut self.values {
            Values::Int32(values) => values.reserve(rows),
            Values::Int64(values) | Values::Millis(values) => values.reserve(rows),
            Values::Float64(values) => values.reserve(rows),
            Values::Boolean(values) => values.reserve(rows),
            Values::Utf8 { ends, bytes } => {
                ends.reserve(rows);
                bytes.reserve(rows * TEXT_BYTES);
            }
            Values::Struct(_, children) => children.iter_mut().for_each(|c| c.reserve(rows)),
        }
    }

    fn null(&mut self) {
        self.valid.push(false);
        match &mut self.values {
            Values::Int32(values) => values.push(0),
            Values::Int64(values) | Values::Millis(values) => values.push(0),
            Values::Float64(values) => values.push(0.0),
            Values::Boolean(values) => values.push(false),
            Values::Utf8 { ends, bytes } => ends.push(bytes.len() as i32),
            Values::Struct(_, children) => children.iter_mut().for_each(Self::null),
        }
    }

    fn finish(self) -> Option<ArrayRef> {
        let nulls = self.valid.contains(&false).then(|| NullBuffer::from(self.valid));
        Some(match self.values {
            Values::Int32(values) => Arc::new(Int32Array::new(values.into(), nulls)),
            Values::Int64(values) => Arc::new(Int64Array::new(values.into(), nulls)),
            Values::Float64(values) => Arc::new(Float64Array::new(values.into(), nulls)),
            Values::Boolean(values) => Arc::new(BooleanArray::new(values.into(), nulls)),
            Values::Millis(values) => Arc::new(TimestampMillisecondArray::new(values.into(), nulls)),
            Values::Utf8 { ends, bytes } => {
                Arc::new(StringArray::try_new(OffsetBuffer::new(ends.into()), bytes.into(), nulls).ok()?)
            }
            Values::Struct(fields, children) => {
                let children = children.into_iter().map(Self::finish).collect::<Option<Vec<_>>>()?;
                Arc::new(StructArray::try_new(fields, children, nulls).ok()?)
            }
        })
    }
}

/// A record being read. Every method stands at the first byte of what it reads, and leaves behind the last; `None` is "not
/// taken".
struct Text<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Text<'a> {
    #[inline]
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    #[inline]
    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    #[inline]
    fn expect(&mut self, byte: u8) -> Option<()> {
        (self.peek() == Some(byte)).then(|| self.at += 1)
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        self.bytes[self.at..].starts_with(word).then(|| self.at += word.len())
    }

    /// An object into the columns of a struct, as their row `row`.
    fn object(&mut self, columns: &mut [Column], row: usize, depth: usize) -> Option<()> {
        self.expect(b'{')?;
        self.space();
        let (mut next, mut first) = (0, true);
        while self.peek()? != b'}' {
            if !first {
                self.expect(b',')?;
                self.space();
            }
            first = false;
            let (key, escaped) = self.string()?;
            if escaped {
                return None;
            }
            self.space();
            self.expect(b':')?;
            self.space();
            // Fields mostly come in the order of the columns.
            let found = (next..columns.len()).chain(0..next).find(|i| columns[*i].name == key);
            match found {
                Some(i) => {
                    let column = &mut columns[i];
                    // The second of two equal fields: which one counts is not for the fast way to say.
                    if column.valid.len() != row {
                        return None;
                    }
                    self.value(column, depth)?;
                    next = i + 1;
                }
                None => self.skip(depth)?,
            }
            self.space();
        }
        self.at += 1;
        for column in columns.iter_mut().filter(|c| c.valid.len() == row) {
            column.null();
        }
        Some(())
    }

    fn value(&mut self, column: &mut Column, depth: usize) -> Option<()> {
        if self.peek()? == b'n' {
            self.word(b"null")?;
            column.null();
            return Some(());
        }
        match &mut column.values {
            Values::Int32(values) => values.push(self.integer()?.try_into().ok()?),
            Values::Int64(values) => values.push(self.integer()?),
            Values::Float64(values) => {
                let number = self.number()?;
                values.push(std::str::from_utf8(number).ok()?.parse().ok()?);
            }
            Values::Boolean(values) => {
                let truth = self.peek()? == b't';
                self.word(if truth { b"true" } else { b"false" })?;
                values.push(truth);
            }
            Values::Millis(values) => {
                let (text, _) = self.string()?;
                values.push(millis(text)?);
            }
            Values::Utf8 { ends, bytes } => {
                let start = self.at;
                let (text, escaped) = self.string()?;
                if escaped {
                    let plain: String = serde_json::from_slice(&self.bytes[start..self.at]).ok()?;
                    bytes.extend_from_slice(plain.as_bytes());
                } else {
                    bytes.extend_from_slice(text);
                }
                ends.push(i32::try_from(bytes.len()).ok()?);
            }
            Values::Struct(_, children) => {
                let row = column.valid.len();
                if depth >= DEPTH_MAX {
                    return None;
                }
                self.object(children, row, depth + 1)?;
            }
        }
        column.valid.push(true);
        Some(())
    }

    /// What is between the quotes, and whether there are escapes in it.
    fn string(&mut self) -> Option<(&'a [u8], bool)> {
        self.expect(b'"')?;
        let start = self.at;
        let (mut escaped, mut coded) = (false, false);
        loop {
            self.at += quote_or_backslash(&self.bytes[self.at..])?;
            if self.bytes[self.at] == b'"' {
                break;
            }
            escaped = true;
            match self.bytes.get(self.at + 1)? {
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                b'u' => coded = true,
                _ => return None,
            }
            self.at += 2;
        }
        self.at += 1;
        if coded {
            // Not every four digits are a character.
            serde_json::from_slice::<String>(&self.bytes[start - 1..self.at]).ok()?;
        }
        Some((&self.bytes[start..self.at - 1], escaped))
    }

    /// An integer of at most 18 digits, which can't overflow.
    fn integer(&mut self) -> Option<i64> {
        let negative = self.peek()? == b'-';
        self.at += usize::from(negative);
        let start = self.at;
        let mut value = 0_i64;
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            if self.at - start == 18 {
                return None;
            }
            value = value * 10 + i64::from(digit - b'0');
            self.at += 1;
        }
        let digits = self.at - start;
        let zero_first = digits > 1 && self.bytes[start] == b'0';
        if digits == 0 || zero_first || matches!(self.peek(), Some(b'.' | b'e' | b'E')) {
            return None;
        }
        Some(if negative { -value } else { value })
    }

    fn digits(&mut self) -> Option<usize> {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        (self.at > start).then(|| self.at - start)
    }

    fn number(&mut self) -> Option<&'a [u8]> {
        let start = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        let zero_first = self.peek() == Some(b'0');
        if self.digits()? > 1 && zero_first {
            return None;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Some(&self.bytes[start..self.at])
    }

    /// Any value, of which nothing is needed but that it is one.
    fn skip(&mut self, depth: usize) -> Option<()> {
        if depth >= DEPTH_MAX {
            return None;
        }
        match self.peek()? {
            b'"' => self.string().map(|_| ()),
            b'n' => self.word(b"null"),
            b't' => self.word(b"true"),
            b'f' => self.word(b"false"),
            open @ (b'{' | b'[') => {
                self.at += 1;
                self.space();
                let close = if open == b'{' { b'}' } else { b']' };
                let mut first = true;
                while self.peek()? != close {
                    if !first {
                        self.expect(b',')?;
                        self.space();
                    }
                    first = false;
                    if open == b'{' {
                        self.string()?;
                        self.space();
                        self.expect(b':')?;
                        self.space();
                    }
                    self.skip(depth + 1)?;
                    self.space();
                }
                self.at += 1;
                Some(())
            }
            _ => self.number().map(|_| ()),
        }
    }
}

/// The place of the first `"` or `\`. Eight bytes at a time.
#[inline]
fn quote_or_backslash(bytes: &[u8]) -> Option<usize> {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGHS: u64 = 0x8080_8080_8080_8080;
    let mut at = 0;
    while let Some(chunk) = bytes.get(at..at + 8).and_then(|c| <[u8; 8]>::try_from(c).ok()) {
        let word = u64::from_le_bytes(chunk);
        // A byte that is zero after the XOR borrows from its high bit; the first that does is exact.
        let zero = |x: u64| x.wrapping_sub(ONES) & !x & HIGHS;
        let hits = zero(word ^ (ONES * b'"' as u64)) | zero(word ^ (ONES * b'\\' as u64));
        if hits != 0 {
            return Some(at + hits.trailing_zeros() as usize / 8);
        }
        at += 8;
    }
    bytes[at..].iter().position(|b| matches!(b, b'"' | b'\\')).map(|i| at + i)
}

/// `2026-01-31 23:59:59.123`, with a `T` for the space, a `Z` at the end and any fraction, or none.
fn millis(text: &[u8]) -> Option<i64> {
    let text = text.strip_suffix(b"Z").unwrap_or(text);
    let (head, fraction) = text.split_at_checked(19)?;
    let number = |range: std::ops::Range<usize>| {
        head[range].iter().try_fold(0_i64, |n, b| b.is_ascii_digit().then(|| n * 10 + i64::from(b - b'0')))
    };
    let shape = [(4, b'-'), (7, b'-'), (13, b':'), (16, b':')];
    if shape.iter().any(|(i, b)| head[*i] != *b) || !matches!(head[10], b' ' | b'T') {
        return None;
    }
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if !(1..=length).contains(&day) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let milli = match fraction {
        [] => 0,
        [b'.', digits @ ..] if (1..=9).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit) => {
            (0..3).fold(0, |n, i| n * 10 + digits.get(i).map_or(0, |b| i64::from(b - b'0')))
        }
        _ => return None,
    };
    // Days since 1970, in years that begin in March, so that a leap day is a year's last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let era = y.div_euclid(400);
    let of_era = y - era * 400;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + (153 * m + 2) / 5 + day - 1 - 719_468;
    Some(((days * 24 + hour) * 60 + minute) * 60_000 + second * 1000 + milli)
}
