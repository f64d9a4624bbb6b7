//! What a snapshot of state consists of before it is written, and after it has been read back. Pure data.

use std::{fmt, path::PathBuf};

use bytes::Bytes;
use floodmark_snapshot::{Error, KeyGroupRange, Result, Shard, ShardKind};

use crate::shard::Part;

/// The state of one operator at a barrier: fixed, but not all of it written yet.
#[derive(Debug, Default)]
pub struct StateSnapshot {
    /// Shards that an earlier, completed checkpoint has uploaded, and that still stand.
    pub reused: Vec<Shard>,
    /// Shards to be written.
    pub pending: Vec<PendingShard>,
}

impl StateSnapshot {
    /// A snapshot of which everything is to be written.
    #[must_use]
    pub fn of(pending: Vec<PendingShard>) -> Self {
        Self { reused: Vec::new(), pending }
    }

    /// The same with every shard that stands for others replaced by those. Waits for the back end: never on the task's
    /// thread.
    ///
    /// # Errors
    /// When the back end failed to write what the snapshot consists of.
    pub fn expanded(self) -> Result<Self> {
        let mut all = Self { reused: self.reused, pending: Vec::with_capacity(self.pending.len()) };
        for mut shard in self.pending {
            match shard.expand.take() {
                // Once is enough: what shards stand for are shards that stand for themselves.
                Some(expand) => all.append(expand()?),
                None => all.pending.push(shard),
            }
        }
        Ok(all)
    }

    /// Adds another state of the same operator.
    pub fn append(&mut self, mut other: Self) {
        self.reused.append(&mut other.reused);
        self.pending.append(&mut other.pending);
    }
}

/// Encodes a shard's bytes. Runs off the task's thread.
pub type Encode = Box<dyn FnOnce() -> Result<Bytes> + Send>;
/// Is told what the manifest will say of a shard, once it is durable. Runs off the task's thread.
pub type Uploaded = Box<dyn FnOnce(&Shard) + Send>;
/// Finds out which shards a pending one stands for. Runs off the task's thread, and may wait.
pub type Expand = Box<dyn FnOnce() -> Result<StateSnapshot> + Send>;

/// A shard that a snapshot has fixed but not yet written.
pub struct PendingShard {
    /// What it holds.
    pub kind: ShardKind,
    /// The key groups of a keyed shard.
    pub key_groups: Option<KeyGroupRange>,
    /// Rows (keys or records) in it; of a layer above 0, which is counted when it is written, as many as there may be.
    pub rows: u64,
    /// See [`Shard::layer`].
    pub layer: u32,
    /// See [`Shard::name`].
    pub name: Option<String>,
    /// Makes the bytes: framed by [`floodmark_snapshot::block`].
    pub encode: Encode,
    /// A local file with just the bytes that `encode` makes, if there is one. It never changes, and is there until `encode` is
    /// called or dropped: who wants to keep it gives it another name before.
    pub file: Option<PathBuf>,
    /// Who wants to know of the upload: a back end that will name the shard again.
    pub uploaded: Option<Uploaded>,
    /// If there is one, this stands for several shards (any number) that the back end can name only once it has written
    /// them: they take its place, and `encode` is not called. See [`StateSnapshot::expanded`].
    pub expand: Option<Expand>,
}

impl PendingShard {
    /// A shard of layer 0, without a name, that nobody names again.
    #[must_use]
    pub fn new(kind: ShardKind, key_groups: Option<KeyGroupRange>, rows: u64, encode: Encode) -> Self {
        Self { kind, key_groups, rows, layer: 0, name: None, encode, file: None, uploaded: None, expand: None }
    }

    /// Stands for the shards that `expand` will name.
    #[must_use]
    pub fn standing_for(kind: ShardKind, expand: Expand) -> Self {
        let encode = || Err(Error::abort("a shard that stands for others was encoded itself"));
        Self { expand: Some(expand), ..Self::new(kind, None, 0, Box::new(encode)) }
    }
}

impl fmt::Debug for PendingShard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingShard").field("kind", &self.kind).field("rows", &self.rows).finish_non_exhaustive()
    }
}

/// What has been read of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// All of its file, size and hash verified.
    File(Bytes),
    /// Of a keyed one what is needed, verified.
    Part(Part),
}

impl Content {
    /// Bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        match self {
            Self::File(bytes) => bytes.len(),
            Self::Part(part) => part.size(),
        }
    }
}

/// A shard read back.
#[derive(Clone, Debug)]
pub struct RestoredShard {
    /// What the manifest says of it.
    pub shard: Shard,
    /// What has been read of it.
    pub content: Content,
    /// If it comes slice by slice ([`crate::KeyedState::restores_by_key_group`]): the key groups of the present slice. Rows of
    /// others may be among the bytes; they are those of another slice.
    pub slice: Option<KeyGroupRange>,
}

impl RestoredShard {
    /// A shard that comes in one piece: the bytes of its file.
    #[must_use]
    pub fn new(shard: Shard, bytes: Bytes) -> Self {
        Self::of(shard, Content::File(bytes))
    }

    /// A shard, or what is needed of it, that does not come in slices.
    #[must_use]
    pub fn of(shard: Shard, content: Content) -> Self {
        Self { shard, content, slice: None }
    }

    /// All of its file, for who reads no parts.
    ///
    /// # Errors
    /// `Abort` if there is only a part: none is made of shards that are not keyed.
    pub fn file(&self) -> Result<&Bytes> {
        match &self.content {
            Content::File(bytes) => Ok(bytes),
            Content::Part(_) => {
                Err(Error::abort(format!("internal error: only a part of shard {} was read", self.shard.path)))
            }
        }
    }
}
