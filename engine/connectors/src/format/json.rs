//! JSON: one object per record, fields by name. Nulls are written; timestamps as `2026-01-31 23:59:59.123`.

use std::sync::Arc;

use arrow::{
    datatypes::SchemaRef,
    json::{
        ReaderBuilder, WriterBuilder,
        reader::Decoder,
        writer::{LineDelimited, Writer},
    },
    record_batch::RecordBatch,
};
use floodmark_snapshot::{Error, Result};

use super::Bulk;

/// Rows that the decoder takes before it wants to be emptied: more than a batch ever has.
const DECODER_ROWS_MAX: usize = 1 << 20;

pub(super) struct JsonBulk {
    schema: SchemaRef,
    decoder: Decoder,
}

impl JsonBulk {
    pub(super) fn new(schema: SchemaRef) -> Result<Self> {
        Ok(Self { decoder: decoder(&schema)?, schema })
    }

    fn try_decode(&mut self, records: &mut dyn Iterator<Item = &[u8]>) -> Result<RecordBatch, String> {
        for (i, record) in records.enumerate() {
            let fail = |e: arrow::error::ArrowError| plain(&e.to_string());
            self.decoder.decode(record).map_err(fail)?;
            if self.decoder.has_partial_record() {
                return Err("ends before its object does".to_owned());
            }
            if self.decoder.len() != i + 1 {
                return Err(match self.decoder.len().checked_sub(i) {
                    Some(0) | None => "is empty".to_owned(),
                    Some(n) => format!("holds {n} values instead of one"),
                });
            }
        }
        let rows = self.decoder.flush().map_err(|e| plain(&e.to_string()))?;
        Ok(rows.unwrap_or_else(|| RecordBatch::new_empty(self.schema.clone())))
    }
}

impl Bulk for JsonBulk {
    fn decode(&mut self, records: &mut dyn Iterator<Item = &[u8]>) -> Result<RecordBatch, String> {
        let rows = self.try_decode(records);
        if rows.is_err() {
            // It may have kept part of the record at fault.
            self.decoder = decoder(&self.schema).map_err(|e| e.to_string())?;
        }
        rows
    }
}

fn decoder(schema: &SchemaRef) -> Result<Decoder> {
    ReaderBuilder::new(schema.clone())
        .with_batch_size(DECODER_ROWS_MAX)
        .build_decoder()
        .map_err(|e| Error::abort(format!("read JSON into these columns: {e}")))
}

/// The library's message without its own category.
fn plain(message: &str) -> String {
    message.strip_prefix("Json error: ").unwrap_or(message).to_owned()
}

pub(super) fn encode(rows: &RecordBatch, out: &mut Vec<u8>) -> Result<()> {
    let failed = |e| Error::abort(format!("write JSON: {e}"));
    let format: Arc<str> = "%Y-%m-%d %H:%M:%S%.f".into();
    let builder = WriterBuilder::new().with_explicit_nulls(true).with_timestamp_format(format.to_string());
    let mut writer: Writer<_, LineDelimited> = builder.build(out);
    writer.write(rows).map_err(failed)?;
    writer.finish().map_err(failed)
}
