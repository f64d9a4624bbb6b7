//! Records to rows and rows to records: JSON and CSV, a batch at a time, and what becomes of records that are malformed.
//!
//! A record is one JSON object, or one CSV line. Decoding takes a whole batch of records at once; only if that fails are they
//! taken one by one, to find those at fault. Fields that the job does not need are never built.

pub(crate) mod bad;
mod csv;
mod json;
mod scan;

use arrow::{datatypes::SchemaRef, record_batch::RecordBatch};
use floodmark_dataflow::connector::TableError;
use floodmark_snapshot::{Error, Result};

pub(crate) use self::bad::{BadRecords, Place};
use crate::options::Options;

/// Rows that a source gathers before it hands a batch on.
pub const BATCH_ROWS: usize = 8192;

/// Options that [`Format::of`] reads.
pub(crate) const FORMAT_OPTIONS: [&str; 3] = ["format", "csv.delimiter", "csv.header"];

/// How records are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON object per record.
    Json,
    /// One line of comma-separated values per record.
    Csv {
        /// Between two values.
        delimiter: u8,
        /// Whether a file's first line names the columns.
        header: bool,
    },
}

impl Format {
    /// The format that a table names; `option` is `format`, or `value.format`.
    pub(crate) fn of(options: &Options<'_>, option: &str) -> Result<Self, TableError> {
        let delimiter = match options.text("csv.delimiter") {
            None => b',',
            Some(text) => match text.as_bytes() {
                [one] => *one,
                b"\\t" => b'\t',
                _ => {
                    let message = format!("option 'csv.delimiter': '{text}' is not one character");
                    return Err(options.get("csv.delimiter").map_or_else(
                        || TableError::table(message.clone()),
                        |o| TableError::option(o, message.clone()),
                    ));
                }
            },
        };
        let csv = Self::Csv { delimiter, header: options.flag("csv.header")? };
        options.choice(option, &[("json", Self::Json), ("ndjson", Self::Json), ("csv", csv)])
    }

    /// Whether records with columns of these types can be read, as far as `projection` asks for them.
    pub(crate) fn check_read(self, declared: &SchemaRef, projection: &SchemaRef) -> Result<(), TableError> {
        self.check(declared)?;
        match (self, projection.fields().iter().find(|f| f.data_type().is_binary())) {
            (Self::Csv { .. }, Some(field)) => Err(TableError::table(format!(
                "column '{}' holds BYTES, which can't be read from CSV; declare it as STRING, or use format 'json'",
                field.name()
            ))),
            (Self::Csv { .. } | Self::Json, _) => Ok(()),
        }
    }

    /// Whether records can hold columns of these types.
    pub(crate) fn check(self, schema: &SchemaRef) -> Result<(), TableError> {
        match (self, schema.fields().iter().find(|f| f.data_type().is_nested())) {
            (Self::Csv { .. }, Some(field)) => Err(TableError::table(format!(
                "column '{}' is nested, which a line of CSV can't hold; use format 'json'",
                field.name()
            ))),
            (Self::Csv { .. } | Self::Json, _) => Ok(()),
        }
    }

    /// The ending of a file's name.
    #[must_use]
    pub fn ending(self) -> &'static str {
        match self {
            Self::Json => "ndjson",
            Self::Csv { .. } => "csv",
        }
    }

    /// A decoder of records into `projection`. `declared` has all columns of a record, for formats that go by place.
    ///
    /// # Errors
    /// For a type that the format can't hold.
    pub fn decoder(self, declared: &SchemaRef, projection: &SchemaRef) -> Result<Decoder> {
        let bulk: Box<dyn Bulk> = match self {
            Self::Json => Box::new(json::JsonBulk::new(projection.clone())?),
            Self::Csv { delimiter, .. } => Box::new(csv::CsvBulk::new(declared, projection, delimiter)?),
        };
        Ok(Decoder { bulk, records: Records::default(), schema: projection.clone() })
    }

    /// Appends the rows to `out`, a record a line.
    ///
    /// # Errors
    /// For a type that the format can't hold.
    pub fn encode(self, rows: &RecordBatch, out: &mut Vec<u8>) -> Result<()> {
        match self {
            Self::Json => json::encode(rows, out),
            Self::Csv { delimiter, .. } => csv::encode(rows, delimiter, out),
        }
    }
}

/// Decodes a batch of records in one go, or says why not.
trait Bulk: Send {
    /// A faster way that may refuse records, without saying why: then [`Bulk::decode`] is to decide.
    fn scan(&mut self, records: &mut dyn Iterator<Item = &[u8]>) -> Option<RecordBatch> {
        let _ = records;
        None
    }

    /// `scan` has refused what `decode` then took.
    fn scan_was_needless(&mut self) {}

    fn decode(&mut self, records: &mut dyn Iterator<Item = &[u8]>) -> Result<RecordBatch, String>;

    /// [`Bulk::decode`] for one record. What it takes, `decode` must take together with others.
    fn decode_alone(&mut self, record: &[u8]) -> Result<RecordBatch, String> {
        self.decode(&mut std::iter::once(record))
    }
}

/// Records one after the other in one buffer.
#[derive(Default)]
struct Records {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Records {
    fn get(&self, i: usize) -> &[u8] {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.bytes[start..self.ends[i]]
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.ends.len()).map(|i| self.get(i))
    }
}

/// A record that can't be decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// Which of the records pushed since the last [`Decoder::finish`], from 0.
    pub record: usize,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What is wrong with it.
    pub reason: String,
}

/// Gathers records and decodes them together.
pub struct Decoder {
    bulk: Box<dyn Bulk>,
    records: Records,
    schema: SchemaRef,
}

impl Decoder {
    /// Adds a record.
    pub fn push(&mut self, record: &[u8]) {
        self.records.bytes.extend_from_slice(record);
        self.records.ends.push(self.records.bytes.len());
    }

    /// Records added since the last [`Decoder::finish`].
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.ends.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.ends.is_empty()
    }

    /// Decodes all records; those that are malformed are left out and told in `bad`.
    ///
    /// # Errors
    /// Only if records that are good one by one are not together: a defect.
    pub fn finish(&mut self, bad: &mut Vec<Malformed>) -> Result<RecordBatch> {
        if self.is_empty() {
            return Ok(RecordBatch::new_empty(self.schema.clone()));
        }
        let scanned = self.bulk.scan(&mut self.records.iter());
        let rows = match scanned {
            Some(rows) => Ok(rows),
            None => self.thoroughly(bad),
        };
        self.records.bytes.clear();
        self.records.ends.clear();
        rows
    }

    fn thoroughly(&mut self, bad: &mut Vec<Malformed>) -> Result<RecordBatch> {
        let together = self.bulk.decode(&mut self.records.iter());
        match together {
            Ok(rows) if rows.num_rows() == self.len() => {
                self.bulk.scan_was_needless();
                Ok(rows)
            }
            Ok(_) | Err(_) => self.one_by_one(bad),
        }
    }

    fn one_by_one(&mut self, bad: &mut Vec<Malformed>) -> Result<RecordBatch> {
        let mut good = Vec::new();
        for record in 0..self.len() {
            let bytes = self.records.get(record);
            let reason = match self.bulk.decode_alone(bytes) {
                Ok(rows) if rows.num_rows() == 1 => {
                    good.push(record);
                    continue;
                }
                Ok(rows) => format!("holds {} values instead of one", rows.num_rows()),
                Err(reason) => reason,
            };
            bad.push(Malformed { record, bytes: bytes.to_vec(), reason });
        }
        if good.is_empty() {
            return Ok(RecordBatch::new_empty(self.schema.clone()));
        }
        let decoded = self.bulk.decode(&mut good.iter().map(|i| self.records.get(*i)));
        decoded.map_err(|reason| Error::abort(format!("decode records: {reason}")))
    }
}
