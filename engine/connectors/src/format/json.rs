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

use super::{Bulk, scan::Scanner};

/// Rows that the decoder takes before it wants to be emptied: more than a batch ever has.
const DECODER_ROWS_MAX: usize = 1 << 20;

/// Batches that the fast way may refuse though they are fine, before it is given up.
const REFUSALS_MAX: u32 = 3;

pub(super) struct JsonBulk {
    schema: SchemaRef,
    decoder: Decoder,
    /// The fast way, while it is worth trying.
    scanner: Option<Scanner>,
    refusals: u32,
}

impl JsonBulk {
    pub(super) fn new(schema: SchemaRef) -> Result<Self> {
        Ok(Self { decoder: decoder(&schema)?, scanner: Scanner::new(&schema), refusals: 0, schema })
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
    fn scan(&mut self, records: &mut dyn Iterator<Item = &[u8]>) -> Option<RecordBatch> {
        self.scanner.as_ref()?.decode(records)
    }

    fn scan_was_needless(&mut self) {
        self.refusals += 1;
        if self.refusals >= REFUSALS_MAX {
            self.scanner = None;
        }
    }

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
    let message = message.strip_prefix("Json error: ").unwrap_or(message);
    let missing = message.split_once("unmasked nulls in non-nullable StructArray child: Field { \"");
    match missing.and_then(|(_, rest)| rest.split('"').next()) {
        Some(column) => format!("column '{column}' is NOT NULL, and the record has no value for it"),
        None => message.to_owned(),
    }
}

pub(super) fn encode(rows: &RecordBatch, out: &mut Vec<u8>) -> Result<()> {
    let failed = |e| Error::abort(format!("write JSON: {e}"));
    let format: Arc<str> = "%Y-%m-%d %H:%M:%S%.f".into();
    let builder = WriterBuilder::new().with_explicit_nulls(true).with_timestamp_format(format.to_string());
    let mut writer: Writer<_, LineDelimited> = builder.build(out);
    writer.write(rows).map_err(failed)?;
    writer.finish().map_err(failed)
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::{DataType, Field, Fields, Schema, TimeUnit};

    use super::*;

    #[test]
    fn a_missing_value_of_a_column_that_is_not_null_is_told_by_its_name() {
        let schema = Arc::new(Schema::new(vec![Field::new("a", DataType::Int64, false)]));
        let mut decoder = JsonBulk::new(schema).unwrap();
        let decoded = decoder.decode(&mut std::iter::once(&b"{}"[..]));
        assert_eq!(decoded.unwrap_err(), "column 'a' is NOT NULL, and the record has no value for it");
    }

    fn schema() -> SchemaRef {
        let field = |name: &str, data_type: DataType| Field::new(name, data_type, true);
        let leaves = vec![
            field("a", DataType::Int64),
            field("b", DataType::Utf8),
            field("c", DataType::Timestamp(TimeUnit::Millisecond, None)),
            field("d", DataType::Float64),
            field("e", DataType::Boolean),
            field("f", DataType::Int32),
        ];
        let mut fields = leaves.clone();
        fields.push(field("s", DataType::Struct(Fields::from(leaves))));
        Arc::new(Schema::new(fields))
    }

    /// What the fast way takes, it decodes as the thorough one does; answers with whether it took the record.
    fn taken(record: &str) -> bool {
        let mut bulk = JsonBulk::new(schema()).unwrap();
        let fast = bulk.scan(&mut std::iter::once(record.as_bytes()));
        let thorough = bulk.decode(&mut std::iter::once(record.as_bytes()));
        if let Some(fast) = &fast {
            assert_eq!(Some(fast), thorough.as_ref().ok(), "{record}: {thorough:?}");
        }
        fast.is_some()
    }

    #[test]
    fn the_fast_way_takes_the_usual() {
        for record in [
            r#"{}"#,
            r#" { "a" : 1 , "b" : "x" } "#,
            r#"{"a":-12,"b":"","c":"2026-02-28 23:59:59.9","d":-1.5e3,"e":true,"f":-7,"s":{"a":1,"b":"y"}}"#,
            r#"{"b":"\u00fc\ud83d\ude00","x":"\u00FC"}"#,
            r#"{"s":{"f":2147483647,"x":{"a":[1,2,{"b":null}],"t":"\""}},"zzz":[],"e":false,"a":null}"#,
            r#"{"b":"quote \" backslash \\ newline \n ü","c":"1969-12-31T23:59:59.999Z","s":null}"#,
            r#"{"c":"2000-02-29 00:00:00","d":0,"s":{"c":"1900-03-01 00:00:00.123456"}}"#,
            r#"{"a":999999999999999999,"d":123456789.123456789,"unknown":-0.5E-3}"#,
        ] {
            assert!(taken(record), "{record}");
        }
    }

    #[test]
    fn the_fast_way_leaves_the_unusual_to_the_thorough() {
        for record in [
            "",
            "{",
            "nothing",
            r#"{"a":1}{"a":2}"#,
            r#"{"a":1,"a":2}"#,
            r#"{"a":01}"#,
            r#"{"a":1.0}"#,
            r#"{"a":"7"}"#,
            r#"{"a":9999999999999999999}"#,
            r#"{"f":2147483648}"#,
            r#"{"b":7}"#,
            r#"{"b":"\u00f"}"#,
            r#"{"x":"\ud83d"}"#,
            r#"{"c":"yesterday"}"#,
            r#"{"c":"2026-02-29 00:00:00"}"#,
            r#"{"c":"2026-02-28"}"#,
            r#"{"c":1700000000000}"#,
            r#"{"x":tru}"#,
            r#"{"x":1,}"#,
            r#"{"x":[1,]}"#,
            r#"{"x":-}"#,
            r#"{"x":"open}"#,
            r#"{"e":truest}"#,
            r#"{"s":[]}"#,
        ] {
            assert!(!taken(record), "{record}");
        }
    }

    #[test]
    fn every_cut_and_every_changed_byte_gives_the_same_answer_or_none() {
        let record =
            r#"{"a":-12,"b":"x\ny","c":"2026-12-31 23:59:59.9","d":1.5e3,"e":true,"u":[1,{"k":"v"}],"s":{"f":7}}"#;
        for len in 0..record.len() {
            assert!(!taken(&record[..len]), "cut at {len}");
        }
        for at in 0..record.len() {
            for byte in [b'"', b'\\', b'{', b'}', b',', b':', b'0', b'9', b'-', b'.', b'e', b'n', b' ', b'[', b'x'] {
                let mut changed = record.as_bytes().to_vec();
                changed[at] = byte;
                taken(std::str::from_utf8(&changed).unwrap());
            }
        }
    }
}
