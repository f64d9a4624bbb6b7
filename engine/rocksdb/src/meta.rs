//! What a checkpoint says beside its data files: which they are, and how to open them. A small file in checksummed blocks.
//!
//! ```text
//! block 0   Head as JSON
//! block 1   RocksDB's MANIFEST
//! block 2   live namespaces: (namespace: i64, rows: u64)*, little-endian, sorted
//! block 3   the columns that rows become outside of the process, as an Arrow IPC stream without rows; if a shape is told
//! last      the rows of each key group, by namespace in the order of block 2 ([`Stored::write`]); if `byGroup`
//! ```
//! Invariant: every byte of every file of a checkpoint is covered by a checksum that is compared before RocksDB sees it.

use std::collections::BTreeMap;

use arrow::{datatypes::SchemaRef, ipc::writer::StreamWriter, record_batch::RecordBatch};
use bytes::Bytes;
use floodmark_snapshot::{
    Error, KeyGroupRange, Result, TimestampMs,
    block::{BlockWriter, read_blocks},
};
use floodmark_state::{KeyGroupWatermarks, RowShape, ipc, watermarks::Ahead};
use serde::{Deserialize, Serialize};

use crate::stored::Stored;

const KIND: &str = "rocksdb";
const FORMAT: u32 = 1;
/// The name by which a snapshot knows this file among the database's.
pub(crate) const NAME: &str = "META";

/// A data file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct DataFile {
    /// Its name in the database: `000042.sst`.
    pub(crate) name: String,
    /// Bytes.
    pub(crate) size: u64,
    /// CRC32C of all its bytes.
    pub(crate) crc: u32,
    /// What the database says of it; missing in files of earlier programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) span: Option<Span>,
}

/// Where a data file stands in its database, and what it may have rows of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Span {
    /// Its level.
    pub(crate) level: u32,
    /// From its first row's to its last one's, among those of its subtask.
    pub(crate) key_groups: KeyGroupRange,
}

impl DataFile {
    /// A file with these bytes.
    pub(crate) fn of(name: &str, bytes: &[u8]) -> Self {
        Self { name: name.to_owned(), size: bytes.len() as u64, crc: crc32c::crc32c(bytes), span: None }
    }

    /// The number by which the database knows it.
    ///
    /// # Errors
    /// `Corrupt` if its name has none.
    pub(crate) fn number(&self) -> Result<u64> {
        let number = self.name.strip_suffix(".sst").and_then(|n| n.parse().ok());
        number.ok_or_else(|| Error::corrupt(format!("'{}' is no data file of RocksDB", self.name)))
    }

    /// Checks that these are the file's bytes.
    ///
    /// # Errors
    /// `Corrupt` if they are not.
    pub(crate) fn verify(&self, bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 == self.size && crc32c::crc32c(bytes) == self.crc {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "data file {}: its {} bytes are not those that were written",
            self.name,
            bytes.len()
        )))
    }

    /// Whether a name that was read somewhere is that of a data file. Nothing else may become a path.
    pub(crate) fn is_name(name: &str) -> bool {
        name.strip_suffix(".sst")
            .is_some_and(|n| !n.is_empty() && n.len() <= 20 && n.bytes().all(|b| b.is_ascii_digit()))
    }
}

/// What encodes keys: files hold them as they were in memory, and a program that encodes them otherwise can't find them again.
pub(crate) fn key_encoding() -> String {
    format!("arrow-row {}", arrow::ARROW_VERSION.split('.').next().unwrap_or_default())
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Head {
    format: u32,
    manifest: String,
    files: Vec<DataFile>,
    keys: String,
    watermark: Option<TimestampMs>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ahead: Vec<Ahead>,
    columns: Vec<String>,
    timed: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shape: Option<RowShape>,
    /// Missing in files of earlier programs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    by_group: bool,
}

/// See the header of this file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Meta {
    /// Name of RocksDB's manifest: `MANIFEST-000005`.
    pub(crate) manifest: String,
    /// What is in it.
    pub(crate) manifest_bytes: Bytes,
    /// The data files.
    pub(crate) files: Vec<DataFile>,
    /// The operator's watermarks at the barrier, if it keeps any.
    pub(crate) watermarks: KeyGroupWatermarks,
    /// What rows consist of, in words.
    pub(crate) columns: Vec<String>,
    /// Whether rows say when they were written.
    pub(crate) timed: bool,
    /// Rows by namespace. Key groups are told if that is known of each namespace.
    pub(crate) namespaces: BTreeMap<i64, Stored>,
    /// How rows become columns, and which, if the operator tells.
    pub(crate) shape: Option<(RowShape, SchemaRef)>,
}

impl Meta {
    /// The file.
    pub(crate) fn encode(&self) -> Result<Bytes> {
        let by_group = self.namespaces.values().all(Stored::is_by_group);
        let head = Head {
            format: FORMAT,
            manifest: self.manifest.clone(),
            files: self.files.clone(),
            keys: key_encoding(),
            watermark: self.watermarks.min(),
            ahead: self.watermarks.ahead().to_vec(),
            columns: self.columns.clone(),
            timed: self.timed,
            shape: self.shape.as_ref().map(|(shape, _)| shape.clone()),
            by_group,
        };
        let head = serde_json::to_vec(&head).map_err(|e| Error::abort(format!("encode a checkpoint's files: {e}")))?;
        let mut blocks = BlockWriter::new(KIND);
        blocks.push(&head)?;
        blocks.push(&self.manifest_bytes)?;
        let namespaces: Vec<u8> =
            self.namespaces.iter().flat_map(|(n, s)| [n.to_le_bytes(), s.rows().to_le_bytes()].concat()).collect();
        blocks.push(&namespaces)?;
        if let Some((_, schema)) = &self.shape {
            blocks.push(&schema_bytes(schema)?)?;
        }
        if by_group {
            let mut numbers = Vec::new();
            self.namespaces.values().for_each(|stored| stored.write(&mut numbers));
            blocks.push(&numbers)?;
        }
        Ok(blocks.finish())
    }

    /// Reads a file back.
    ///
    /// # Errors
    /// `Corrupt` if it is not what [`Meta::encode`] wrote.
    pub(crate) fn decode(file: &Bytes) -> Result<Self> {
        let blocks = read_blocks(KIND, file)?;
        let [head, manifest_bytes, namespaces, others @ ..] = blocks.as_slice() else {
            return Err(Error::corrupt(format!("{} blocks instead of 3 at least", blocks.len())));
        };
        let head: Head = serde_json::from_slice(head).map_err(|e| Error::corrupt(format!("header: {e}")))?;
        if head.format != FORMAT {
            return Err(Error::abort(format!(
                "files of format {} (this program reads {FORMAT}); take a savepoint with the program that wrote them",
                head.format
            )));
        }
        if head.keys != key_encoding() {
            return Err(Error::abort(format!(
                "keys are encoded as {} (this program: {}); take a savepoint with the program that wrote them",
                head.keys,
                key_encoding()
            )));
        }
        let digits = head.manifest.strip_prefix("MANIFEST-").unwrap_or_default();
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Error::corrupt(format!("'{}' is no manifest of RocksDB", head.manifest)));
        }
        if let Some(file) = head.files.iter().find(|f| !DataFile::is_name(&f.name)) {
            return Err(Error::corrupt(format!("'{}' is no data file of RocksDB", file.name)));
        }
        let (schema, numbers) = match (&head.shape, head.by_group, others) {
            (None, false, []) => (None, None),
            (None, true, [numbers]) => (None, Some(numbers)),
            (Some(_), false, [schema]) => (Some(schema), None),
            (Some(_), true, [schema, numbers]) => (Some(schema), Some(numbers)),
            (_, _, others) => {
                return Err(Error::corrupt(format!(
                    "{} blocks more than 3, which the header does not tell of",
                    others.len()
                )));
            }
        };
        let (pairs, rest) = namespaces.as_chunks::<16>();
        if !rest.is_empty() {
            return Err(Error::corrupt("the list of namespaces is cut"));
        }
        let pair = |p: &[u8; 16]| {
            let (n, rows) = p.split_at(8);
            let number = |b: &[u8]| b.iter().rev().fold(0_u64, |n, b| n << 8 | u64::from(*b));
            (number(n) as i64, number(rows))
        };
        let namespaces = match numbers {
            None => pairs.iter().map(pair).map(|(n, rows)| (n, Stored::of_any_group(rows))).collect(),
            Some(numbers) => {
                let mut rest = &numbers[..];
                let read = |(n, rows)| Ok((n, Stored::read(rows, &mut rest)?));
                let namespaces = pairs.iter().map(pair).map(read).collect::<Result<_>>()?;
                if !rest.is_empty() {
                    return Err(Error::corrupt("there are rows of key groups of no namespace"));
                }
                namespaces
            }
        };
        let shape = match (head.shape, schema) {
            (Some(shape), Some(schema)) => Some((shape, schema_of(schema)?)),
            _ => None,
        };
        Ok(Self {
            manifest: head.manifest,
            manifest_bytes: manifest_bytes.clone(),
            files: head.files,
            watermarks: KeyGroupWatermarks::of_file(head.watermark, &head.ahead)?,
            columns: head.columns,
            timed: head.timed,
            namespaces,
            shape,
        })
    }
}

fn schema_bytes(schema: &SchemaRef) -> Result<Vec<u8>> {
    let write = || {
        let mut stream = StreamWriter::try_new(Vec::new(), schema)?;
        stream.write(&RecordBatch::new_empty(schema.clone()))?;
        stream.into_inner()
    };
    write().map_err(|e| Error::abort(format!("encode a state's columns: {e}")))
}

fn schema_of(bytes: &Bytes) -> Result<SchemaRef> {
    match ipc::read("a state's columns", bytes)?.as_slice() {
        [one] => Ok(one.schema()),
        _ => Err(Error::corrupt("a state's columns are no single batch")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::datatypes::{DataType, Field, Schema};
    use floodmark_snapshot::{Disposition, KeyGroup, KeyGroupRange};

    use super::*;

    #[test]
    fn it_comes_back_and_every_flipped_byte_and_cut_is_found() {
        let mut watermarks = KeyGroupWatermarks::from(5);
        let key_groups = KeyGroupRange { first: KeyGroup(3), last: KeyGroup(7) };
        watermarks.merge(&9.into(), key_groups);
        let schema = Arc::new(Schema::new(vec![Field::new("key", DataType::Utf8, false)]));
        let shape = RowShape { namespace: false, keys: 1, values: Vec::new() };
        let meta = Meta {
            manifest: "MANIFEST-000005".to_owned(),
            manifest_bytes: Bytes::from_static(b"edits"),
            files: vec![
                DataFile { name: "000042.sst".to_owned(), size: 7, crc: 3, span: None },
                DataFile { name: "000043.sst".to_owned(), size: 7, crc: 3, span: Some(Span { level: 6, key_groups }) },
            ],
            watermarks,
            columns: vec!["n: Int64".to_owned()],
            timed: true,
            namespaces: [(i64::MIN, 1), (-1, 2), (7, u64::MAX)].map(|(n, rows)| (n, Stored::of_any_group(rows))).into(),
            shape: None,
        };
        assert_eq!(Meta::decode(&meta.encode().unwrap()).unwrap(), meta);
        let meta = Meta { shape: Some((shape, schema)), ..meta };
        assert_eq!(Meta::decode(&meta.encode().unwrap()).unwrap(), meta);
        let by_group = |(namespace, groups): (i64, &[u16])| {
            let mut stored = Stored::none(true);
            groups.iter().for_each(|group| stored.add(KeyGroup(*group), 300));
            (namespace, stored)
        };
        let namespaces = [(i64::MIN, &[3][..]), (-1, &[]), (7, &[3, 4, 7])].map(by_group);
        let meta = Meta { namespaces: namespaces.into(), ..meta };
        let shapeless = Meta { shape: None, ..meta.clone() };
        assert_eq!(Meta::decode(&shapeless.encode().unwrap()).unwrap(), shapeless);
        let file = meta.encode().unwrap();
        assert_eq!(Meta::decode(&file).unwrap(), meta);
        for at in 0..file.len() {
            let mut bad = file.to_vec();
            bad[at] ^= 0x10;
            assert_eq!(Meta::decode(&bad.into()).unwrap_err().disposition(), Disposition::Corrupt, "byte {at}");
            assert_eq!(Meta::decode(&file.slice(..at)).unwrap_err().disposition(), Disposition::Corrupt, "cut {at}");
        }
    }

    #[test]
    fn only_names_of_data_files_become_paths() {
        assert!(DataFile::is_name("000042.sst"));
        for name in ["", ".sst", "../000042.sst", "a.sst", "000042.SST", "MANIFEST-000005"] {
            assert!(!DataFile::is_name(name), "{name}");
        }
    }
}
