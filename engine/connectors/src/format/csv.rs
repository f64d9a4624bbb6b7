//! CSV: one line per record, columns by place. An empty field is null.

use arrow::{
    csv::{ReaderBuilder, WriterBuilder, reader::Decoder},
    datatypes::SchemaRef,
    record_batch::RecordBatch,
};
use floodmark_snapshot::{Error, Result};

use super::{BATCH_ROWS, Bulk};

/// Records that the decoder has room for: more than a source gathers. It clears that room for every batch.
const DECODER_ROWS_MAX: usize = 2 * BATCH_ROWS;

pub(super) struct CsvBulk {
    declared: SchemaRef,
    columns: Vec<usize>,
    projection: SchemaRef,
    delimiter: u8,
    decoder: Decoder,
}

impl CsvBulk {
    pub(super) fn new(declared: &SchemaRef, projection: &SchemaRef, delimiter: u8) -> Result<Self> {
        let index = |name: &str| declared.index_of(name).map_err(|e| Error::abort(format!("read CSV: {e}")));
        let columns = projection.fields().iter().map(|f| index(f.name())).collect::<Result<Vec<_>>>()?;
        let decoder = decoder(declared, &columns, delimiter);
        Ok(Self { declared: declared.clone(), columns, projection: projection.clone(), delimiter, decoder })
    }

    fn try_decode(&mut self, records: &mut dyn Iterator<Item = &[u8]>) -> Result<RecordBatch, String> {
        let plain = |e: arrow::error::ArrowError| {
            let text = e.to_string();
            // The place that the library counts is within this batch: it would mislead.
            text.split(" at line").next().unwrap_or(&text).to_owned()
        };
        for (before, record) in records.enumerate() {
            let mut rest = record;
            while !rest.is_empty() {
                let used = self.decoder.decode(rest).map_err(plain)?;
                if used == 0 {
                    return Err(format!("comes behind {DECODER_ROWS_MAX} others in one batch"));
                }
                rest = &rest[used..];
            }
            self.decoder.decode(b"\n").map_err(plain)?;
            // One that leaves a quote open would take the next for its own.
            match (DECODER_ROWS_MAX - self.decoder.capacity()).checked_sub(before) {
                Some(1) => {}
                Some(0) | None => return Err("is empty, or has a quote that is never closed".to_owned()),
                Some(n) => return Err(format!("holds {n} lines instead of one")),
            }
        }
        let rows = self.decoder.flush().map_err(plain)?;
        Ok(rows.unwrap_or_else(|| RecordBatch::new_empty(self.projection.clone())))
    }
}

impl Bulk for CsvBulk {
    fn decode(&mut self, records: &mut dyn Iterator<Item = &[u8]>) -> Result<RecordBatch, String> {
        let rows = self.try_decode(records);
        if rows.is_err() {
            self.decoder = decoder(&self.declared, &self.columns, self.delimiter);
        }
        rows
    }
}

fn decoder(declared: &SchemaRef, columns: &[usize], delimiter: u8) -> Decoder {
    ReaderBuilder::new(declared.clone())
        .with_header(false)
        .with_delimiter(delimiter)
        .with_batch_size(DECODER_ROWS_MAX)
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
        datatypes::{DataType, Field, Int64Type, Schema},
    };

    use crate::format::Format;

    #[test]
    fn every_good_line_comes_once_whatever_the_bad_ones_look_like() {
        let bad = ["1,\"a", "b\"", "", "x,y", "1,2,3", "\"", "7,a\r8,b", "1", "99999999999999999999,a"];
        let schema =
            Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false), Field::new("s", DataType::Utf8, true)]));
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
}
