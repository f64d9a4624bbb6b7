//! CSV: one line per record, columns by place. An empty field is null.

use arrow::{
    csv::{ReaderBuilder, WriterBuilder, reader::Decoder},
    datatypes::SchemaRef,
    record_batch::RecordBatch,
};
use floodmark_snapshot::{Error, Result};

use super::{BATCH_ROWS, Bulk};

/// Records that are decoded together at most: more than a source gathers.
const TOGETHER_MAX: usize = 2 * BATCH_ROWS;
/// Room for a record that is decoded alone, and for one that it must not hold.
const ALONE_MAX: usize = 2;

/// What some programs put before the first line of a file.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

pub(super) struct CsvBulk {
    together: Lines,
    alone: Lines,
}

impl CsvBulk {
    pub(super) fn new(declared: &SchemaRef, projection: &SchemaRef, delimiter: u8) -> Result<Self> {
        let index = |name: &str| declared.index_of(name).map_err(|e| Error::abort(format!("read CSV: {e}")));
        let columns = projection.fields().iter().map(|f| index(f.name())).collect::<Result<Vec<_>>>()?;
        let lines = |room| Lines::new(declared.clone(), columns.clone(), projection.clone(), delimiter, room);
        Ok(Self { together: lines(TOGETHER_MAX), alone: lines(ALONE_MAX) })
    }
}

impl Bulk for CsvBulk {
    fn decode(&mut self, records: &mut dyn Iterator<Item = &[u8]>) -> Result<RecordBatch, String> {
        self.together.decode(records)
    }

    // In small room, because each record that is refused costs a new decoder.
    fn decode_alone(&mut self, record: &[u8]) -> Result<RecordBatch, String> {
        self.alone.decode(&mut std::iter::once(record))
    }
}

/// A decoder that is between two records, and empty, whenever it is called.
struct Lines {
    declared: SchemaRef,
    columns: Vec<usize>,
    projection: SchemaRef,
    delimiter: u8,
    room: usize,
    decoder: Decoder,
}

impl Lines {
    fn new(declared: SchemaRef, columns: Vec<usize>, projection: SchemaRef, delimiter: u8, room: usize) -> Self {
        let decoder = decoder(&declared, &columns, delimiter, room);
        Self { declared, columns, projection, delimiter, room, decoder }
    }

    fn decode(&mut self, records: &mut dyn Iterator<Item = &[u8]>) -> Result<RecordBatch, String> {
        let rows = self.try_decode(records);
        if rows.is_err() {
            self.decoder = decoder(&self.declared, &self.columns, self.delimiter, self.room);
        }
        rows
    }

    fn try_decode(&mut self, records: &mut dyn Iterator<Item = &[u8]>) -> Result<RecordBatch, String> {
        let plain = |e: arrow::error::ArrowError| {
            let text = e.to_string();
            // The line that the library counts is within this batch: it would mislead.
            let text = text.split(" at line").next().unwrap_or(&text);
            match text.split_once(" for line ") {
                Some((what, rest)) => format!("{what}{}", rest.trim_start_matches(|c: char| c.is_ascii_digit())),
                None => text.to_owned(),
            }
        };
        for (before, record) in records.enumerate() {
            let mut rest = record;
            // The library drops one from what it reads first, whichever record that is.
            while let Some(marked) = rest.strip_prefix(BYTE_ORDER_MARK) {
                rest = marked;
            }
            check_breaks(rest, self.delimiter)?;
            while !rest.is_empty() {
                let used = self.decoder.decode(rest).map_err(plain)?;
                if used == 0 {
                    return Err(format!("comes behind {} others in one batch", self.room));
                }
                rest = &rest[used..];
            }
            self.decoder.decode(b"\n").map_err(plain)?;
            // One that leaves a quote open would take the next for its own.
            if self.room - self.decoder.capacity() != before + 1 {
                return Err("is empty, or has a quote that is never closed".to_owned());
            }
        }
        let rows = self.decoder.flush().map_err(plain)?;
        Ok(rows.unwrap_or_else(|| RecordBatch::new_empty(self.projection.clone())))
    }
}

/// Refuses a record with a line break that is not within quotes: it holds several lines. What begins after such a break may
/// be left open, and would not be missed when lines are counted.
fn check_breaks(record: &[u8], delimiter: u8) -> Result<(), String> {
    let is_break = |byte: &u8| matches!(byte, b'\r' | b'\n');
    let Some(first) = record.iter().position(|b| !is_break(b)) else { return Ok(()) };
    let last = record.iter().rposition(|b| !is_break(b)).unwrap_or(first);
    let line = &record[first..=last];
    if !line.iter().any(is_break) {
        return Ok(());
    }
    let mut place = Quotes::FieldStart;
    for byte in line {
        place = match (place, *byte) {
            (Quotes::FieldStart, b'"') | (Quotes::MaybeClosed, b'"') => Quotes::Within,
            (Quotes::Within, b'"') => Quotes::MaybeClosed,
            (Quotes::Within, _) => Quotes::Within,
            (_, b'\r' | b'\n') => return Err("holds several lines instead of one".to_owned()),
            (_, byte) if byte == delimiter => Quotes::FieldStart,
            (_, _) => Quotes::Outside,
        };
    }
    if place == Quotes::Within { Err("has a quote that is never closed".to_owned()) } else { Ok(()) }
}

/// Where a byte of a record is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Quotes {
    FieldStart,
    Outside,
    Within,
    /// After a quote within quotes: the end of them, or the first half of a quote that is meant.
    MaybeClosed,
}

fn decoder(declared: &SchemaRef, columns: &[usize], delimiter: u8, room: usize) -> Decoder {
    ReaderBuilder::new(declared.clone())
        .with_header(false)
        .with_delimiter(delimiter)
        .with_batch_size(room)
        .with_projection(columns.to_vec())
        .build_decoder()
}

pub(super) fn encode(rows: &RecordBatch, delimiter: u8, out: &mut Vec<u8>) -> Result<()> {
    let mut writer = WriterBuilder::new()
        .with_header(false)
        .with_delimiter(delimiter)
        .with_timestamp_format("%Y-%m-%d %H:%M:%S%.f".to_owned())
        .build(out);
    writer.write(rows).map_err(|e| Error::abort(format!("write CSV: {e}")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::{
        array::AsArray,
        compute::concat_batches,
        datatypes::{DataType, Field, Int64Type, Schema},
    };

    use expect_test::{Expect, expect};

    use super::SchemaRef;
    use crate::format::{Format, Malformed};

    fn two_columns() -> SchemaRef {
        Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false), Field::new("s", DataType::Utf8, true)]))
    }

    /// The rows that are decoded, and the records that are not.
    fn check(records: &[&str], expected: &Expect) {
        let mut decoder =
            Format::Csv { delimiter: b',', header: false }.decoder(&two_columns(), &two_columns()).unwrap();
        records.iter().for_each(|r| decoder.push(r.as_bytes()));
        let mut malformed = Vec::new();
        let rows = decoder.finish(&mut malformed).unwrap();
        let numbers = rows.column(0).as_primitive::<Int64Type>().values();
        let texts: Vec<_> = rows.column(1).as_string::<i32>().iter().map(Option::unwrap_or_default).collect();
        let mut shown: Vec<_> = numbers.iter().zip(texts).map(|(n, s)| format!("row {n} {s:?}")).collect();
        let bad = |m: &Malformed| format!("bad {:?}: {}", String::from_utf8_lossy(&m.bytes), m.reason);
        shown.extend(malformed.iter().map(bad));
        expected.assert_eq(&(shown.join("\n") + "\n"));
    }

    #[test]
    fn an_open_quote_takes_nothing_with_it() {
        check(
            &["0,ok", "1,\"a", "2,x", "3,y"],
            &expect![[r#"
            row 0 "ok"
            row 2 "x"
            row 3 "y"
            bad "1,\"a": is empty, or has a quote that is never closed
        "#]],
        );
        check(
            &["x,y", "1,\"a", "b\"", "2,\"\""],
            &expect![[r#"
                row 2 ""
                bad "x,y": Parser error: Error while parsing value 'x' as type 'Int64' for column 0
                bad "1,\"a": is empty, or has a quote that is never closed
                bad "b\"": Csv error: incorrect number of fields, expected 2 got 1
            "#]],
        );
        check(
            &["7,a\r\"b", "0,ok", "7,a\n\"", "\",5"],
            &expect![[r#"
            row 0 "ok"
            bad "7,a\r\"b": holds several lines instead of one
            bad "7,a\n\"": holds several lines instead of one
            bad "\",5": is empty, or has a quote that is never closed
        "#]],
        );
    }

    #[test]
    fn line_breaks_within_quotes_and_around_a_record_belong_to_it() {
        check(
            &["1,\"a\r\nb\"", "2,\"\"\"\n\"\"\"", "\n3,c\r\n", "4,\"d\" e"],
            &expect![[r#"
            row 1 "a\r\nb"
            row 2 "\"\n\""
            row 3 "c"
            row 4 "d e"
        "#]],
        );
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_record_whatever_else_is_bad() {
        check(
            &["\u{feff}1,a", "x", "\u{feff}\u{feff}2,b"],
            &expect![[r#"
                row 1 "a"
                row 2 "b"
                bad "x": Csv error: incorrect number of fields, expected 2 got 1
            "#]],
        );
    }

    #[test]
    fn every_good_line_comes_once_whatever_the_bad_ones_look_like() {
        let bad = [
            "1,\"a",
            "b\"",
            "",
            "x,y",
            "1,2,3",
            "\"",
            "7,a\r8,b",
            "7,a\r\"b",
            "7,a\n\"",
            "\",5",
            "1",
            "99999999999999999999,a",
        ];
        let schema = two_columns();
        let mut random = 0x2545_F491_4F6C_DD1D_u64;
        let mut below = |n: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % n
        };
        for _ in 0..300 {
            let mut decoder = Format::Csv { delimiter: b',', header: false }.decoder(&schema, &schema).unwrap();
            for _ in 0..2 {
                let (mut good, mut wrong) = (Vec::new(), 0);
                for n in 0..below(12) as i64 {
                    if below(3) == 0 {
                        decoder.push(bad[below(bad.len() as u64) as usize].as_bytes());
                        wrong += 1;
                    } else {
                        decoder.push(format!("{n},\"t, {n}\"").as_bytes());
                        good.push(n);
                    }
                }
                let mut malformed = Vec::new();
                let rows = decoder.finish(&mut malformed).unwrap();
                assert_eq!(rows.column(0).as_primitive::<Int64Type>().values(), good.as_slice());
                let shown: Vec<_> = malformed.iter().map(|m| String::from_utf8_lossy(&m.bytes)).collect();
                assert_eq!(malformed.len(), wrong, "{shown:?}");
            }
        }
    }

    #[test]
    fn records_give_together_what_each_gives_alone() {
        let pieces = ["\"", "\"\"", ",", "\r", "\n", "1", "23", "a", "\u{feff}", "\u{e9}", "4,b"];
        let mut random = 0x9E37_79B9_7F4A_7C15_u64;
        let mut below = |n: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % n as u64) as usize
        };
        let fresh = || Format::Csv { delimiter: b',', header: false }.decoder(&two_columns(), &two_columns()).unwrap();
        for _ in 0..300 {
            let (mut together, mut alone, mut bad) = (fresh(), Vec::new(), Vec::new());
            for n in 0..8 {
                let wild: String = (0..below(7)).map(|_| pieces[below(pieces.len())]).collect();
                let record = if below(3) == 0 { format!("{n},good") } else { wild };
                together.push(record.as_bytes());
                let mut one = fresh();
                one.push(record.as_bytes());
                let rows = one.finish(&mut bad).unwrap();
                assert!(!record.ends_with("good") || rows.num_rows() == 1, "{record:?}");
                alone.push(rows);
            }
            let mut malformed = Vec::new();
            let rows = together.finish(&mut malformed).unwrap();
            assert_eq!(rows, concat_batches(&two_columns(), &alone).unwrap());
            let reasons =
                |all: &[Malformed]| all.iter().map(|m| (m.bytes.clone(), m.reason.clone())).collect::<Vec<_>>();
            assert_eq!(reasons(&malformed), reasons(&bad));
        }
    }
}
