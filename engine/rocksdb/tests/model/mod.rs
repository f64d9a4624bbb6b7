//! The vocabulary of the tests: a layout, a state that is checked against a map, and a folder of shards in memory.

#![allow(clippy::unwrap_used, reason = "tests say what failed by panicking")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use arrow::{
    array::{ArrayRef, AsArray, BinaryArray, Int64Array},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
    record_batch::RecordBatch,
};
use bytes::Bytes;
use floodmark_snapshot::{
    Env, Epoch, KeyGroupRange, Result, Shard, ShardKind, TimestampMs, coordination::Barrier, manifest::hash_hex,
};
use floodmark_state::{
    Column, ColumnType, KeyedState, Layout, NO_SLOT, RestoredShard, RowKeys, RowShape, Rows, StateBackend,
    StateSnapshot, StateSpec, Table, ValueShape,
};

/// Number of key groups.
pub(crate) const GROUPS: u16 = 16;

/// Keys of 8 bytes; a number and some bytes are kept.
pub(crate) struct Pairs;

/// The hash of a key.
pub(crate) fn hash(key: u64) -> u64 {
    key.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (key >> 7)
}

/// A key as an Arrow row of one number.
fn encoded(key: u64) -> [u8; 9] {
    let mut bytes = [1; 9];
    bytes[1..].copy_from_slice(&(key ^ 1 << 63).to_be_bytes());
    bytes
}

/// The key that was [`encoded`].
fn decoded(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[1..].try_into().unwrap()) ^ 1 << 63
}

impl Layout for Pairs {
    fn types(&self) -> Vec<ColumnType> {
        vec![ColumnType::Long, ColumnType::Bytes]
    }

    fn schema(&self) -> SchemaRef {
        let field = |name, data_type, null| Field::new(name, data_type, null);
        Arc::new(Schema::new(vec![
            field("$namespace", DataType::Int64, false),
            field("key", DataType::Int64, false),
            field("count", DataType::Int64, true),
            field("text", DataType::Binary, true),
        ]))
    }

    fn encode(&self, namespace: i64, rows: &Rows, slots: &[u32]) -> Result<RecordBatch> {
        let key = |slot: &u32| decoded(rows.key(*slot)) as i64;
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from_value(namespace, slots.len())),
            Arc::new(slots.iter().map(key).collect::<Int64Array>()),
            Arc::new(slots.iter().map(|s| rows.long(*s as usize, 0)).collect::<Int64Array>()),
            Arc::new(slots.iter().map(|s| rows.bytes(*s as usize, 1)).collect::<BinaryArray>()),
        ];
        Ok(RecordBatch::try_new(self.schema(), columns).unwrap())
    }

    fn decode(&self, batch: &RecordBatch) -> Result<RowKeys> {
        let namespaces = batch.column_by_name("$namespace").unwrap().as_primitive::<Int64Type>();
        let keys = batch.column_by_name("key").unwrap().as_primitive::<Int64Type>();
        let mut places = RowKeys::default();
        for (namespace, key) in namespaces.values().iter().zip(keys.values()) {
            places.push(*namespace, hash(*key as u64), &encoded(*key as u64));
        }
        Ok(places)
    }

    fn hashes(&self, keys: &[&[u8]]) -> Result<Vec<u64>> {
        Ok(keys.iter().map(|key| hash(decoded(key))).collect())
    }

    fn fill(&self, batch: &RecordBatch, table: &mut Table, slots: &[u32]) -> Result<()> {
        let counts = batch.column_by_name("count").unwrap().as_primitive::<Int64Type>();
        let texts = batch.column_by_name("text").unwrap().as_binary::<i32>();
        for (row, slot) in slots.iter().enumerate() {
            put(table, *slot, counts.iter().nth(row).unwrap(), texts.iter().nth(row).unwrap());
        }
        Ok(())
    }

    fn shape(&self) -> Option<RowShape> {
        Some(RowShape { namespace: true, keys: 1, values: vec![ValueShape::Value, ValueShape::Value] })
    }
}

fn put(table: &mut Table, slot: u32, count: Option<i64>, text: Option<&[u8]>) {
    table.write_runs(&[slot], 0, |column, rows, _| {
        if let Column::Long(values) = column {
            values[rows[0] as usize] = count;
        }
    });
    table.write_runs(&[slot], 1, |column, rows, _| {
        if let Column::Bytes(values) = column {
            values[rows[0] as usize] = text.map(Into::into);
        }
    });
}

/// What a row holds.
pub(crate) type Row = (i64, Vec<u8>);
/// What a state should hold: rows by namespace and key.
pub(crate) type Model = BTreeMap<(i64, u64), Row>;

/// A spec of one subtask's state.
pub(crate) fn spec(index: u32, parallelism: u32, ttl: Option<Duration>, env: &Env) -> StateSpec {
    StateSpec {
        name: String::new(),
        layout: Arc::new(Pairs),
        subtask: index,
        key_groups: KeyGroupRange::of_subtask(index, parallelism, GROUPS),
        max_parallelism: GROUPS,
        ttl,
        reuse_restored: true,
        env: env.clone(),
    }
}

/// All subtasks of a state, used as one.
pub(crate) struct States {
    pub(crate) states: Vec<Box<dyn KeyedState>>,
}

impl States {
    pub(crate) fn open(backend: &dyn StateBackend, parallelism: u32, ttl: Option<Duration>, env: &Env) -> Self {
        let open = |index| backend.keyed(spec(index, parallelism, ttl, env)).unwrap();
        Self { states: (0..parallelism).map(open).collect() }
    }

    fn split(&self, keys: &[u64]) -> Vec<Vec<u64>> {
        let parallelism = self.states.len() as u32;
        let mut split = vec![Vec::new(); self.states.len()];
        for key in keys {
            let group = floodmark_snapshot::KeyGroup::of(hash(*key), GROUPS);
            split[group.subtask(parallelism, GROUPS) as usize].push(*key);
        }
        split
    }

    /// Adds 1 to the count of each key, and makes its text `text`. Answers the keys that were new.
    pub(crate) fn add(&mut self, namespace: i64, keys: &[u64], text: &[u8]) -> Vec<u64> {
        let mut new = Vec::new();
        for (index, keys) in self.split(keys).into_iter().enumerate().filter(|(_, keys)| !keys.is_empty()) {
            let state = &mut self.states[index];
            let hashes: Vec<u64> = keys.iter().map(|k| hash(*k)).collect();
            let encoded: Vec<[u8; 9]> = keys.iter().map(|k| encoded(*k)).collect();
            let slots = state.slots(namespace, &hashes, &encoded.iter().map(|k| &k[..]).collect::<Vec<_>>()).unwrap();
            let table = state.table(namespace);
            for slot in &slots.at {
                let count = table.rows().long(*slot as usize, 0).unwrap_or(0);
                put(table, *slot, Some(count + 1), Some(text));
            }
            new.extend(slots.new.iter().map(|slot| decoded(table.rows().key(*slot))));
        }
        new
    }

    /// What the rows of these keys hold.
    pub(crate) fn read(&mut self, namespace: i64, keys: &[u64]) -> BTreeMap<u64, Option<Row>> {
        let mut all = BTreeMap::new();
        for (index, keys) in self.split(keys).into_iter().enumerate() {
            let state = &mut self.states[index];
            let slots = find(&mut **state, namespace, &keys);
            let rows = state.table(namespace).rows();
            for (key, slot) in keys.iter().zip(slots) {
                all.insert(*key, (slot != NO_SLOT).then(|| row(rows, slot)));
            }
        }
        all
    }

    pub(crate) fn remove(&mut self, namespace: i64, keys: &[u64]) {
        for (index, keys) in self.split(keys).into_iter().enumerate() {
            let state = &mut self.states[index];
            let mut slots = find(&mut **state, namespace, &keys);
            slots.retain(|s| *s != NO_SLOT);
            slots.sort_unstable();
            slots.dedup();
            state.remove(namespace, &slots).unwrap();
        }
    }

    pub(crate) fn drop_namespace(&mut self, namespace: i64) {
        self.states.iter_mut().for_each(|s| s.drop_namespace(namespace).unwrap());
    }

    /// Everything there is.
    pub(crate) fn all(&mut self) -> Model {
        let mut all = Model::new();
        for state in &mut self.states {
            for namespace in state.namespaces(i64::MIN..=i64::MAX) {
                let mut show = |rows: &Rows, slots: &[u32]| {
                    for slot in slots {
                        let key = decoded(rows.key(*slot));
                        assert!(all.insert((namespace, key), row(rows, *slot)).is_none(), "{key} is shown twice");
                    }
                    Ok(())
                };
                state.scan(namespace, &mut show).unwrap();
            }
        }
        all
    }

    pub(crate) fn rows(&self) -> u64 {
        self.states.iter().map(|s| s.size().0).sum()
    }

    /// The synchronous part of a snapshot.
    pub(crate) fn snapshot(&mut self, barrier: &Barrier, watermark: Option<TimestampMs>) -> Vec<StateSnapshot> {
        self.states.iter_mut().map(|s| s.snapshot(barrier, &watermark.into()).unwrap()).collect()
    }

    pub(crate) fn completed(&mut self, epoch: u64) {
        self.states.iter_mut().for_each(|s| s.completed(Epoch(epoch)).unwrap());
    }

    pub(crate) fn aborted(&mut self, epoch: u64) {
        self.states.iter_mut().for_each(|s| s.aborted(Epoch(epoch)).unwrap());
    }

    /// Takes a checkpoint, uploads and completes it.
    pub(crate) fn checkpoint(&mut self, store: &mut Store, epoch: u64) -> Vec<Shard> {
        let snapshots = self.snapshot(&Barrier::checkpoint(Epoch(epoch)), None);
        let shards = store.upload(epoch, snapshots).unwrap();
        self.completed(epoch);
        shards
    }

    /// Restores from shards, as the worker would hand them out.
    pub(crate) fn restore(&mut self, store: &Store, shards: &[Shard], parallelism: u32) -> Result<Option<TimestampMs>> {
        let count = self.states.len() as u32;
        let mut least = None;
        for (index, state) in self.states.iter_mut().enumerate() {
            let groups = KeyGroupRange::of_subtask(index as u32, count, GROUPS);
            for shard in shards.iter().filter(|s| s.key_groups.is_none_or(|g| g.overlaps(&groups))) {
                assert!(shard.subtask < parallelism);
                state.restore(&RestoredShard::new(shard.clone(), store.files[&shard.path].clone()))?;
            }
            least = state.restored()?.min();
        }
        Ok(least)
    }
}

fn find(state: &mut dyn KeyedState, namespace: i64, keys: &[u64]) -> Vec<u32> {
    let hashes: Vec<u64> = keys.iter().map(|k| hash(*k)).collect();
    let encoded: Vec<[u8; 9]> = keys.iter().map(|k| encoded(*k)).collect();
    state.find(namespace, &hashes, &encoded.iter().map(|k| &k[..]).collect::<Vec<_>>()).unwrap()
}

fn row(rows: &Rows, slot: u32) -> Row {
    (rows.long(slot as usize, 0).unwrap(), rows.bytes(slot as usize, 1).unwrap().to_vec())
}

/// Where shards are uploaded to.
#[derive(Default)]
pub(crate) struct Store {
    pub(crate) files: BTreeMap<String, Bytes>,
    /// Bytes uploaded so far.
    pub(crate) uploaded: u64,
}

impl Store {
    /// Uploads what snapshots have pending.
    pub(crate) fn upload(&mut self, epoch: u64, snapshots: Vec<StateSnapshot>) -> Result<Vec<Shard>> {
        let mut shards = Vec::new();
        for (subtask, snapshot) in snapshots.into_iter().enumerate() {
            let StateSnapshot { reused, pending } = snapshot.expanded()?;
            shards.extend(reused);
            for shard in pending {
                let bytes = (shard.encode)()?;
                let path = format!("{epoch}-{}", self.files.len());
                let written = Shard {
                    size: bytes.len() as u64,
                    hash: hash_hex(&bytes),
                    subtask: subtask as u32,
                    key_groups: shard.key_groups,
                    rows: shard.rows,
                    layer: shard.layer,
                    name: shard.name,
                    ..Shard::new(path.clone(), shard.kind)
                };
                self.uploaded += bytes.len() as u64;
                self.files.insert(path, bytes);
                if let Some(uploaded) = shard.uploaded {
                    uploaded(&written);
                }
                shards.push(written);
            }
        }
        Ok(shards)
    }

    /// Deletes all files that none of these name.
    pub(crate) fn keep(&mut self, shards: &[&[Shard]]) {
        let named: Vec<&str> = shards.iter().flat_map(|s| s.iter()).map(|s| s.path.as_str()).collect();
        self.files.retain(|path, _| named.contains(&path.as_str()));
    }
}

/// A savepoint's barrier.
pub(crate) fn whole(epoch: u64) -> Barrier {
    Barrier { whole: true, ..Barrier::checkpoint(Epoch(epoch)) }
}

/// Counts shards of a kind.
pub(crate) fn of_kind(shards: &[Shard], kind: ShardKind) -> usize {
    shards.iter().filter(|s| s.kind == kind).count()
}

/// Numbers that look random, the same for the same seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)) * u128::from(bound)) >> 64) as u64
    }
}
