//! The files of one earlier subtask's state, gathered from a snapshot: a database as it was at a barrier.
//!
//! Who wants some of its key groups only needs the files that have any of them: the others are taken out of the database's own
//! list before it is opened ([`crate::manifest`]).
//! Invariant: RocksDB sees a file only once all its bytes have been found to be those that were uploaded.

use std::{collections::HashMap, fs, path::PathBuf};

use bytes::Bytes;
use floodmark_snapshot::{Error, KeyGroupRange, Result, Shard};

use crate::{
    folder::{Folder, failed},
    manifest,
    meta::{self, DataFile, Meta},
};

/// Files that have come so far.
pub(crate) struct Piece {
    folder: Folder,
    key_groups: Option<KeyGroupRange>,
    meta: Option<Meta>,
    files: HashMap<String, DataFile>,
    shards: Vec<Shard>,
}

/// A piece that RocksDB may open: all that is needed is there.
pub(crate) struct Checked {
    pub(crate) folder: Folder,
    /// The key groups of which it has rows. In its files there may be rows of others: they are nobody's.
    pub(crate) key_groups: KeyGroupRange,
    pub(crate) meta: Meta,
    pub(crate) shards: Vec<Shard>,
    /// Whether all of its files are there.
    pub(crate) whole: bool,
}

/// The name of a database's file, of the name by which a snapshot knows it.
pub(crate) fn file_name(shard: &Shard) -> &str {
    let name = shard.name.as_deref().unwrap_or_default();
    name.rsplit_once('/').map_or(name, |(_, file)| file)
}

impl Piece {
    /// Nothing yet, and a folder for it.
    pub(crate) fn new(place: PathBuf) -> Result<Self> {
        let folder = Folder::create(place)?;
        Ok(Self { folder, key_groups: None, meta: None, files: HashMap::new(), shards: Vec::new() })
    }

    /// Takes in a file.
    pub(crate) fn take(&mut self, shard: &Shard, bytes: &Bytes) -> Result<()> {
        let name = file_name(shard);
        if name == meta::NAME {
            self.key_groups = shard.key_groups;
            self.meta = Some(Meta::decode(bytes)?);
            return Ok(());
        }
        if !DataFile::is_name(name) {
            return Err(Error::corrupt(format!("'{name}' is no data file of RocksDB")));
        }
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).map_err(|e| failed("write", &path, &e))?;
        self.files.insert(name.to_owned(), DataFile::of(name, bytes));
        self.shards.push(shard.clone());
        Ok(())
    }

    /// Checks that everything is there that has rows of the key groups wanted, and makes it a database.
    pub(crate) fn complete(self, wanted: KeyGroupRange) -> Result<Checked> {
        let Self { folder, key_groups, meta, files, shards } = self;
        let meta = meta.ok_or_else(|| Error::corrupt(format!("there is no {} among its files", meta::NAME)))?;
        let mut left_out = Vec::new();
        for file in &meta.files {
            match (files.get(&file.name), &file.span) {
                (Some(found), _) if (found.size, found.crc) == (file.size, file.crc) => {}
                (Some(found), _) => {
                    let (found, size) = (found.size, file.size);
                    return Err(Error::corrupt(format!(
                        "data file {}: its {found} bytes are not the {size} that were written",
                        file.name
                    )));
                }
                (None, Some(span)) if !span.key_groups.overlaps(&wanted) => left_out.push((span.level, file.number()?)),
                (None, _) => return Err(Error::corrupt(format!("data file {} is missing", file.name))),
            }
        }
        let manifest_bytes = manifest::without(&meta.manifest_bytes, &left_out);
        let current = format!("{}\n", meta.manifest);
        for (name, bytes) in [(meta.manifest.as_str(), &manifest_bytes[..]), ("CURRENT", current.as_bytes())] {
            let path = folder.path().join(name);
            fs::write(&path, bytes).map_err(|e| failed("write", &path, &e))?;
        }
        // Without a range of its own it has been taken by whoever came first: all of it may be wanted.
        let key_groups = key_groups.unwrap_or(wanted);
        Ok(Checked { folder, key_groups, meta, shards, whole: left_out.is_empty() })
    }
}
