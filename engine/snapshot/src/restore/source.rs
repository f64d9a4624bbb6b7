//! A snapshot that can be read: what it consists of, and where its files are. Every byte is verified on its way in.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, stream};

use crate::{Context, Disposition, Error, Manifest, Result, Shard, manifest::hash_hex, storage::Storage};

/// Shards read at the same time.
const READS_IN_FLIGHT_MAX: usize = 16;

/// See the header of this file.
#[derive(Clone)]
pub struct Snapshot {
    /// What it consists of.
    pub manifest: Arc<Manifest>,
    /// Where the files are: paths of shards are relative to `root` in it.
    storage: Arc<dyn Storage>,
    root: String,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "checkpoint {} of {} in {}", self.manifest.epoch, self.manifest.job, self.location())
    }
}

impl Snapshot {
    /// A snapshot whose shards lie under the folder `root` of the storage.
    #[must_use]
    pub fn new(manifest: Arc<Manifest>, storage: Arc<dyn Storage>, root: impl Into<String>) -> Self {
        Self { manifest, storage, root: root.into() }
    }

    /// The same files under another manifest, whose shards' paths are relative to the same folder.
    #[must_use]
    pub fn with_manifest(&self, manifest: Manifest) -> Self {
        Self { manifest: Arc::new(manifest), storage: self.storage.clone(), root: self.root.clone() }
    }

    /// The folder that the shards' paths are relative to, as a location that can be opened again.
    #[must_use]
    pub fn location(&self) -> String {
        if self.root.is_empty() {
            self.storage.describe()
        } else {
            format!("{}/{}", self.storage.describe(), self.root)
        }
    }

    /// Where a shard is: its storage, and its path there.
    #[must_use]
    pub fn place(&self, shard: &Shard) -> (&Arc<dyn Storage>, String) {
        let path = if self.root.is_empty() { shard.path.clone() } else { format!("{}/{}", self.root, shard.path) };
        (&self.storage, path)
    }

    /// Reads a whole shard.
    ///
    /// # Errors
    /// `Corrupt` if it is missing, or not as it was written.
    pub async fn read(&self, shard: &Shard) -> Result<Bytes> {
        let (storage, path) = self.place(shard);
        let bytes = storage.get(&path).await.context_with(|| format!("read shard {}", shard.path))?;
        let bytes = bytes.ok_or_else(|| missing(shard))?;
        if bytes.len() as u64 != shard.size {
            let (path, size) = (&shard.path, shard.size);
            return Err(Error::corrupt(format!("shard {path} has {} bytes instead of {size}", bytes.len())));
        }
        let hash = hash_hex(&bytes);
        if hash != shard.hash {
            let (path, wanted) = (&shard.path, &shard.hash);
            return Err(Error::corrupt(format!("shard {path} is damaged: its hash is {hash} instead of {wanted}")));
        }
        Ok(bytes)
    }

    /// Reads bytes `from..to` of a shard. Nothing is verified but their number: the reader knows the checksums of blocks.
    ///
    /// # Errors
    /// `Corrupt` if the shard is missing or too short.
    pub async fn read_range(&self, shard: &Shard, from: u64, to: u64) -> Result<Bytes> {
        let (storage, path) = self.place(shard);
        let bytes = storage.get_range(&path, from, to).await.context_with(|| format!("read shard {}", shard.path))?;
        let bytes = bytes.ok_or_else(|| missing(shard))?;
        if bytes.len() as u64 != to - from {
            return Err(Error::corrupt(format!("shard {} ends before byte {to}", shard.path)));
        }
        Ok(bytes)
    }

    /// Reads every file and says what is wrong with each that is not as it was written.
    ///
    /// # Errors
    /// When the storage can't be read; damage is no error here.
    pub async fn verify(&self) -> Result<Vec<Error>> {
        let read: Vec<Result<Bytes>> =
            stream::iter(self.manifest.files()).map(|s| self.read(s)).buffered(READS_IN_FLIGHT_MAX).collect().await;
        let mut damage = Vec::new();
        for error in read.into_iter().filter_map(Result::err) {
            if error.disposition() != Disposition::Corrupt {
                return Err(error);
            }
            damage.push(error);
        }
        Ok(damage)
    }
}

fn missing(shard: &Shard) -> Error {
    Error::corrupt(format!("shard {} is missing", shard.path))
}
