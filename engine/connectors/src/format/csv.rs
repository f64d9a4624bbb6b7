//! CSV: one line per record, columns by place. An empty field is null.

use arrow::{
    csv::{ReaderBuilder, WriterBuilder, reader::Decoder},
    datatypes::SchemaRef,
    record_batch::RecordBatch,
};
use floodmark_snapshot::{Error, Result};

use super::Bulk;

const DECODER_ROWS_MAX: usize = 1 << 20;

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
        for record in records {
            let mut rest = record;
            while !rest.is_empty() {
                let used = self.decoder.decode(rest).map_err(plain)?;
                rest = &rest[used..];
            }
            self.decoder.decode(b"\n").map_err(plain)?;
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
