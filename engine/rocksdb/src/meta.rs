//! What a checkpoint says beside its data files: which they are, and how to open them. A small file in checksummed blocks.
//!
//! ```text
//! block 0   Head as JSON
//! block 1   RocksDB's MANIFEST
//! block 2   live namespaces: (namespace: i64, rows: u64)*, little-endian, sorted
//! ```
//! Invariant: every byte of every file of a checkpoint is covered by a checksum that is compared before RocksDB sees it.

use std::collections::BTreeMap;

use bytes::Bytes;
use floodmark_snapshot::{
    Error, Result, TimestampMs,
    block::{BlockWriter, read_blocks},
};
use floodmark_state::{KeyGroupWatermarks, watermarks::Ahead};
use serde::{Deserialize, Serialize};

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
}

impl DataFile {
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
    /// Rows by namespace.
    pub(crate) namespaces: BTreeMap<i64, u64>,
}

impl Meta {
    /// The file.
    pub(crate) fn encode(&self) -> Result<Bytes> {
        let head = Head {
            format: FORMAT,
            manifest: self.manifest.clone(),
            files: self.files.clone(),
            keys: key_encoding(),
            watermark: self.watermarks.min(),
            ahead: self.watermarks.ahead().to_vec(),
            columns: self.columns.clone(),
            timed: self.timed,
        };
        let head = serde_json::to_vec(&head).map_err(|e| Error::abort(format!("encode a checkpoint's files: {e}")))?;
        let mut blocks = BlockWriter::new(KIND);
        blocks.push(&head)?;
        blocks.push(&self.manifest_bytes)?;
        let namespaces: Vec<u8> =
            self.namespaces.iter().flat_map(|(n, rows)| [n.to_le_bytes(), rows.to_le_bytes()].concat()).collect();
        blocks.push(&namespaces)?;
        Ok(blocks.finish())
    }

    /// Reads a file back.
    ///
    /// # Errors
    /// `Corrupt` if it is not what [`Meta::encode`] wrote.
    pub(crate) fn decode(file: &Bytes) -> Result<Self> {
        let blocks = read_blocks(KIND, file)?;
        let [head, manifest_bytes, namespaces] = blocks.as_slice() else {
            return Err(Error::corrupt(format!("{} blocks instead of 3", blocks.len())));
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
        let (pairs, rest) = namespaces.as_chunks::<16>();
        if !rest.is_empty() {
            return Err(Error::corrupt("the list of namespaces is cut"));
        }
        let pair = |p: &[u8; 16]| {
            let (n, rows) = p.split_at(8);
            let number = |b: &[u8]| b.iter().rev().fold(0_u64, |n, b| n << 8 | u64::from(*b));
            (number(n) as i64, number(rows))
        };
        Ok(Self {
            manifest: head.manifest,
            manifest_bytes: manifest_bytes.clone(),
            files: head.files,
            watermarks: KeyGroupWatermarks::of_file(head.watermark, &head.ahead)?,
            columns: head.columns,
            timed: head.timed,
            namespaces: pairs.iter().map(pair).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::{Disposition, KeyGroup, KeyGroupRange};

    use super::*;

    #[test]
    fn it_comes_back_and_every_flipped_byte_and_cut_is_found() {
        let mut watermarks = KeyGroupWatermarks::from(5);
        watermarks.merge(&9.into(), KeyGroupRange { first: KeyGroup(3), last: KeyGroup(7) });
        let meta = Meta {
            manifest: "MANIFEST-000005".to_owned(),
            manifest_bytes: Bytes::from_static(b"edits"),
            files: vec![DataFile { name: "000042.sst".to_owned(), size: 7, crc: 3 }],
            watermarks,
            columns: vec!["n: Int64".to_owned()],
            timed: true,
            namespaces: [(i64::MIN, 1), (-1, 2), (7, u64::MAX)].into(),
        };
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
