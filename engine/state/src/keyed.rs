//! The contract of keyed state, whatever keeps it: rows of typed columns by namespace and key.
//!
//! A *namespace* (`i64`) is what a windowed operator keeps its slices by (their end), a timer's time, and 0 otherwise. Within
//! one, a row has a key: bytes that are equal exactly if the keys are, and never leave the process, and a hash, which says to
//! which key group the row belongs. What leaves the process are record batches: the operator's [`Layout`] makes them of rows
//! and takes them back, by the names of their columns.
//!
//! A back end hands out *slots* of an in-memory [`Table`], so that operators compute on columns: on the heap the table is all
//! there is; a back end with a database behind it keeps there the rows that were wanted of late.
//!
//! Invariants: a snapshot holds exactly the rows at its barrier; restored from
//! the shards of any completed checkpoint, at any parallelism, the rows are those again; nothing of an aborted checkpoint is
//! ever named again.

use std::{fmt, ops::RangeInclusive, sync::Arc, time::Duration};

use arrow::{datatypes::SchemaRef, record_batch::RecordBatch};
use floodmark_snapshot::{Env, Epoch, KeyGroup, KeyGroupRange, Result, Shard, ShardKind, coordination::Barrier};

use crate::{
    heap::Heap,
    shape::RowShape,
    snapshot::{RestoredShard, StateSnapshot},
    table::{ColumnType, Rows, Table},
    watermarks::KeyGroupWatermarks,
};

/// No slot: what [`KeyedState::find`] says of a key that has no row.
pub const NO_SLOT: u32 = u32::MAX;

/// What keeps the keyed state of a job.
pub trait StateBackend: Send + Sync {
    /// Its name, as manifests and messages have it: `heap`, `rocksdb`.
    fn name(&self) -> &'static str;

    /// Empty state of one operator and subtask.
    ///
    /// # Errors
    /// When the back end can't be set up.
    fn keyed(&self, spec: StateSpec) -> Result<Box<dyn KeyedState>>;
}

/// Which state, and where.
#[derive(Clone)]
pub struct StateSpec {
    /// Tells the states of one operator apart; empty if it has one only. Letters, digits and `-`. See [`StateSpec::holds`].
    pub name: String,
    /// Columns, and how they travel.
    pub layout: Arc<dyn Layout>,
    /// Index of the subtask.
    pub subtask: u32,
    /// The key groups that the subtask owns.
    pub key_groups: KeyGroupRange,
    /// Number of key groups.
    pub max_parallelism: u16,
    /// How long a row is kept after it was last written (brought in by [`KeyedState::slots`]). Then it is not seen any more,
    /// and removed by and by.
    pub ttl: Option<Duration>,
    /// Whether checkpoints may go on from the shards that are restored, because the job owns them.
    pub reuse_restored: bool,
    /// Time and names.
    pub env: Env,
}

impl StateSpec {
    /// Whether the key with this hash belongs to the subtask.
    #[inline]
    #[must_use]
    pub fn owns(&self, hash: u64) -> bool {
        self.key_groups.contains(KeyGroup::of(hash, self.max_parallelism))
    }

    /// The name of a neutral shard of this state.
    #[must_use]
    pub fn shard_name(&self) -> Option<String> {
        (!self.name.is_empty()).then(|| self.name.clone())
    }

    /// Whether a shard is of this state. See [`holds`].
    #[must_use]
    pub fn holds(&self, shard: &Shard) -> bool {
        holds(&self.name, shard)
    }
}

/// Whether a shard of an operator is of its keyed state of this name: the shard's name is the state's, or for
/// [`ShardKind::RocksDb`] begins with it and `/`. The shards of a nameless state have no name, and its files names without `/`.
#[must_use]
pub fn holds(state: &str, shard: &Shard) -> bool {
    let name = shard.name.as_deref().unwrap_or_default();
    match shard.kind {
        ShardKind::Keyed => name == state,
        ShardKind::RocksDb => name.rsplit_once('/').map_or("", |(of, _)| of) == state,
        ShardKind::Split | ShardKind::Union | ShardKind::Broadcast | ShardKind::Channel | ShardKind::Staged => false,
    }
}

/// What the rows of a state are, in memory and on their way. Implemented by operators.
pub trait Layout: Send + Sync {
    /// The columns of the tables.
    fn types(&self) -> Vec<ColumnType>;

    /// The columns of rows that leave the process: the namespace if there are several, the key, what is kept. Names are
    /// unique, stay the same over versions, and don't begin with `$$`.
    fn schema(&self) -> SchemaRef;

    /// Rows of one namespace, as [`Layout::schema`] says, in the order of `slots`.
    ///
    /// # Errors
    /// When a value can't be encoded.
    fn encode(&self, namespace: i64, rows: &Rows, slots: &[u32]) -> Result<RecordBatch>;

    /// Where the rows of a batch belong. The batch was encoded by this or another version of the operator: columns are found
    /// by name.
    ///
    /// # Errors
    /// When a column that makes up the key is missing or of another type.
    fn decode(&self, batch: &RecordBatch) -> Result<RowKeys>;

    /// The hashes of keys by their bytes: what [`Layout::decode`] says of them, and who calls [`KeyedState::slots`]. Back
    /// ends need not store what can be told so.
    ///
    /// # Errors
    /// When bytes are none of a key.
    fn hashes(&self, keys: &[&[u8]]) -> Result<Vec<u64>>;

    /// Puts rows of a batch into rows of a table that hold nothing but nulls: row `i` of `batch` into `slots[i]`. A column
    /// that the batch lacks stays null; one that is not known any more is skipped.
    ///
    /// # Errors
    /// When a column is of another type.
    fn fill(&self, batch: &RecordBatch, table: &mut Table, slots: &[u32]) -> Result<()>;

    /// What [`Layout::encode`] does, in words that another program can follow. Without them, files of a back end that hold rows
    /// as they are in memory can be read by the operator alone.
    fn shape(&self) -> Option<RowShape> {
        None
    }
}

/// The places of some rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowKeys {
    /// The namespace of each row.
    pub namespaces: Vec<i64>,
    /// The hash of each row.
    pub hashes: Vec<u64>,
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl RowKeys {
    /// Adds a row.
    pub fn push(&mut self, namespace: i64, hash: u64, key: &[u8]) {
        self.namespaces.push(namespace);
        self.hashes.push(hash);
        self.bytes.extend_from_slice(key);
        self.ends.push(self.bytes.len());
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// The key of a row.
    #[must_use]
    pub fn key(&self, row: usize) -> &[u8] {
        let start = if row == 0 { 0 } else { self.ends[row - 1] };
        &self.bytes[start..self.ends[row]]
    }
}

/// Where rows were brought to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    /// The slot of each key that was asked for, in order.
    pub at: Vec<u32>,
    /// Those of rows that are new (all their columns are null), each once, in the order of their first key.
    pub new: Vec<u32>,
}

/// Keyed state of one operator and subtask.
///
/// Calls come from one thread at a time. Slots stand for the rows of one namespace, until the next call of
/// [`KeyedState::slots`], [`KeyedState::find`], [`KeyedState::remove`], [`KeyedState::scan`] or [`KeyedState::snapshot`].
pub trait KeyedState: Send {
    /// Brings the rows of these keys into the table of `namespace`, to be written; a key without one gets a row of nulls.
    /// The keys need not be distinct. Counts as a write for TTL.
    ///
    /// # Errors
    /// When rows can't be read from where they are kept.
    fn slots(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<Slots>;

    /// The slots of these keys, to be read or removed, or [`NO_SLOT`]. Creates nothing.
    ///
    /// # Errors
    /// As [`KeyedState::slots`].
    fn find(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<Vec<u32>>;

    /// The table that slots of `namespace` point into. (That of a namespace without rows has none.)
    fn table(&mut self, namespace: i64) -> &mut Table;

    /// Removes the rows in these slots, distinct ones.
    ///
    /// # Errors
    /// When the back end can't.
    fn remove(&mut self, namespace: i64, slots: &[u32]) -> Result<()>;

    /// The least namespace that has rows.
    fn first_namespace(&self) -> Option<i64>;

    /// The namespaces in a range that have rows, in order.
    fn namespaces(&self, range: RangeInclusive<i64>) -> Vec<i64>;

    /// Removes all rows of a namespace.
    ///
    /// # Errors
    /// When the back end can't.
    fn drop_namespace(&mut self, namespace: i64) -> Result<()>;

    /// Shows all rows of a namespace, a page of bounded size at a time, in no order: the rows in `slots` of `Rows`. Counts
    /// neither as a read nor as a write for caching and TTL.
    ///
    /// # Errors
    /// When rows can't be read, and those of `page`.
    fn scan(&mut self, namespace: i64, page: &mut dyn FnMut(&Rows, &[u32]) -> Result<()>) -> Result<()>;

    /// The synchronous part of a snapshot; see `dataflow::Operator::snapshot`. `watermarks` are the operator's, and come back
    /// from [`KeyedState::restored`]. If the barrier asks for a whole snapshot, it is shards of layer 0 in the neutral
    /// format ([`crate::shard`]), in the order of their key groups, which cover all of the subtask's; one key group may be in
    /// several. What later checkpoints reuse is as if it had not been.
    ///
    /// # Errors
    /// When the back end can't.
    fn snapshot(&mut self, barrier: &Barrier, watermarks: &KeyGroupWatermarks) -> Result<StateSnapshot>;

    /// Takes in a shard of this state ([`StateSpec::holds`]), before anything else; rows of others' key groups are passed
    /// over. The shards of one earlier subtask come in the order of their layers.
    ///
    /// # Errors
    /// `Corrupt` if it is damaged; `Abort` if it is of a kind or of types that this back end and layout can't take.
    fn restore(&mut self, shard: &RestoredShard) -> Result<()>;

    /// Takes in several shards, as [`KeyedState::restore`] would one by one; a back end may find a faster way if it has all
    /// layers at once.
    ///
    /// # Errors
    /// As [`KeyedState::restore`].
    fn restore_together(&mut self, shards: &[RestoredShard]) -> Result<()> {
        shards.iter().try_for_each(|shard| self.restore(shard))
    }

    /// Whether the state can be used before all of it is there. Then shards in the neutral format may come in slices of key groups
    /// ([`RestoredShard::slice`]), in ascending order: for each, all shards (a cut may be without rows), by earlier subtask and
    /// layer, then [`KeyedState::arrived`] or, behind the last, [`KeyedState::restored`]. In between, rows of the key groups that are
    /// there may be read, written and removed; all other calls wait. Such rows count as changed since what is restored.
    fn restores_by_key_group(&self) -> bool {
        false
    }

    /// A slice has been taken in. Answers the watermarks of the key groups that are there, as [`KeyedState::restored`] does.
    ///
    /// # Errors
    /// As [`KeyedState::restored`].
    fn arrived(&mut self) -> Result<KeyGroupWatermarks> {
        Ok(KeyGroupWatermarks::default())
    }

    /// All shards have been taken in. Answers, for each key group of the subtask, the watermark of the earlier subtask that
    /// owned it, as of that one's last layer; none if it had none. (Behind aligned barriers all have the same.)
    ///
    /// # Errors
    /// When the shards don't make up a state.
    fn restored(&mut self) -> Result<KeyGroupWatermarks>;

    /// Checkpoint `epoch` is complete and durable: its shards may be named again. Epochs come in any order, also of
    /// checkpoints that this state had no part in.
    ///
    /// # Errors
    /// When the back end can't.
    fn completed(&mut self, epoch: Epoch) -> Result<()>;

    /// Checkpoint `epoch` has been given up: nothing that it uploaded may be named again.
    ///
    /// # Errors
    /// When the back end can't.
    fn aborted(&mut self, epoch: Epoch) -> Result<()>;

    /// (rows, bytes) at present, about.
    fn size(&self) -> (u64, u64);
}

/// How a subtask keeps its state.
#[derive(Clone)]
pub struct StateSettings {
    /// What keeps keyed state.
    pub backend: Arc<dyn StateBackend>,
    /// How long operators without windows keep a key that nothing happens to.
    pub ttl: Option<Duration>,
    /// See [`StateSpec::reuse_restored`].
    pub reuse_restored: bool,
}

impl Default for StateSettings {
    fn default() -> Self {
        Self { backend: Arc::new(Heap), ttl: None, reuse_restored: false }
    }
}

impl fmt::Debug for StateSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateSettings")
            .field("backend", &self.backend.name())
            .field("ttl", &self.ttl)
            .field("reuse_restored", &self.reuse_restored)
            .finish()
    }
}
