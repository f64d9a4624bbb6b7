//! Figures of state in RocksDB beside state on the heap: batches that read, change and write rows, the pause at a barrier, what
//! a checkpoint uploads, how long a restore takes.
//!
//! `cargo run --release -p floodmark-rocksdb --example rocksdb_figures -- [KEYS] [CACHE MiB] [heap | rocksdb]`, by default 5,000,000
//! keys, 256 MiB and both.
//! Keys have 16 bytes, rows 8 columns of 8 bytes; batches have 4,096 keys, uniform or skewed (Zipf-like).

use std::{path::Path, sync::Arc, time::Duration};

use arrow::{
    array::{ArrayRef, AsArray, FixedSizeBinaryArray, Int64Array},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
    record_batch::RecordBatch,
};
use bytes::Bytes;
use floodmark_rocksdb::{RocksDb, Settings};
use floodmark_snapshot::{Env, Epoch, KeyGroupRange, Result, Shard, coordination::Barrier};
use floodmark_state::{
    Column, ColumnType, Heap, KeyGroupWatermarks, KeyedState, Layout, RestoredShard, RowKeys, Rows, StateBackend,
    StateSnapshot, StateSpec, Table,
};

const BATCH: usize = 4096;
const COLUMNS: usize = 8;
const GROUPS: u16 = 128;
/// Batches of which each spread of times is told, at least.
const BATCHES_TIMED: usize = 2_000;

struct Counters;

fn encoded(key: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&key.to_be_bytes());
    bytes[8..].copy_from_slice(&hash(key).to_be_bytes());
    bytes
}

fn hash(key: u64) -> u64 {
    let mixed = (key ^ (key >> 31)).wrapping_mul(0x7FB5_D329_728E_A185);
    (mixed ^ (mixed >> 27)).wrapping_mul(0x81DA_DEF4_BC2D_D44D) ^ (mixed >> 33)
}

impl Layout for Counters {
    fn types(&self) -> Vec<ColumnType> {
        vec![ColumnType::Long; COLUMNS]
    }

    fn schema(&self) -> SchemaRef {
        let counts = (0..COLUMNS).map(|i| Field::new(format!("count{i}"), DataType::Int64, true));
        Arc::new(Schema::new(
            [Field::new("key", DataType::FixedSizeBinary(16), false)].into_iter().chain(counts).collect::<Vec<_>>(),
        ))
    }

    fn encode(&self, _: i64, rows: &Rows, slots: &[u32]) -> Result<RecordBatch> {
        let keys = FixedSizeBinaryArray::try_from_iter(slots.iter().map(|s| rows.key(*s))).expect("keys of 16 bytes");
        let counts = (0..COLUMNS)
            .map(|c| -> ArrayRef { Arc::new(slots.iter().map(|s| rows.long(*s as usize, c)).collect::<Int64Array>()) });
        let columns = [Arc::new(keys) as ArrayRef].into_iter().chain(counts).collect();
        Ok(RecordBatch::try_new(self.schema(), columns).expect("columns of the schema"))
    }

    fn decode(&self, batch: &RecordBatch) -> Result<RowKeys> {
        let keys = batch.column(0).as_fixed_size_binary();
        let mut places = RowKeys::default();
        for key in keys.iter().flatten() {
            places.push(0, u64::from_be_bytes(key[8..].try_into().expect("8 bytes")), key);
        }
        Ok(places)
    }

    fn fill(&self, batch: &RecordBatch, table: &mut Table, slots: &[u32]) -> Result<()> {
        for column in 0..COLUMNS {
            let counts = batch.column(column + 1).as_primitive::<Int64Type>();
            table.write_runs(slots, column, |values, rows, at| {
                if let Column::Long(values) = values {
                    rows.iter().enumerate().for_each(|(i, row)| values[*row as usize] = Some(counts.value(at + i)));
                }
            });
        }
        Ok(())
    }
}

fn spec(env: &Env, index: u32, parallelism: u32) -> StateSpec {
    StateSpec {
        name: String::new(),
        layout: Arc::new(Counters),
        subtask: index,
        key_groups: KeyGroupRange::of_subtask(index, parallelism, GROUPS),
        max_parallelism: GROUPS,
        ttl: None,
        reuse_restored: true,
        env: env.clone(),
    }
}

/// One batch: every row of these keys is read, changed and written.
fn change(state: &mut dyn KeyedState, keys: &[u64]) {
    let hashes: Vec<u64> = keys.iter().map(|k| hash(*k)).collect();
    let bytes: Vec<[u8; 16]> = keys.iter().map(|k| encoded(*k)).collect();
    let refs: Vec<&[u8]> = bytes.iter().map(|k| &k[..]).collect();
    let slots = state.slots(0, &hashes, &refs).expect("slots");
    let table = state.table(0);
    for column in 0..COLUMNS {
        table.write_runs(&slots.at, column, |values, rows, _| {
            if let Column::Long(values) = values {
                rows.iter().for_each(|row| {
                    values[*row as usize] = Some(values[*row as usize].unwrap_or(0) + 1 + column as i64)
                });
            }
        });
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)) * u128::from(bound)) >> 64) as u64
    }

    /// Small numbers far more often than large ones: about 80 % of the draws fall on 3 % of the keys.
    fn skewed(&mut self, bound: u64) -> u64 {
        let unit = self.below(1 << 53) as f64 / (1_u64 << 53) as f64;
        ((bound as f64).powf(unit) - 1.0) as u64 * 2_654_435_761 % bound
    }
}

/// Of how long something took: the middle, and what is rarely surpassed.
fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    format!(
        "p50 {:.2}, p99 {:.1}, p99.9 {:.1}, most {:.1} ms of {}",
        at(0.5),
        at(0.99),
        at(0.999),
        at(1.0),
        times.len()
    )
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) / 1024
}

struct Run<'a> {
    env: &'a Env,
    name: &'a str,
    keys: u64,
}

impl Run<'_> {
    /// As `timed`, without the time in which others had the processor.
    fn net<T>(&self, work: impl FnOnce() -> T) -> (T, Duration) {
        let waited = || {
            let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
            text.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        let before: u64 = waited();
        let (done, took) = self.timed(work);
        (done, took.saturating_sub(Duration::from_nanos(waited().saturating_sub(before))))
    }

    fn timed<T>(&self, work: impl FnOnce() -> T) -> (T, Duration) {
        let start = self.env.clock.monotonic();
        let done = work();
        (done, self.env.clock.monotonic() - start)
    }

    fn say(&self, what: &str, figure: String) {
        println!("{:<8} {what:<52} {figure}", self.name);
    }

    fn rate(&self, what: &str, rows: u64, took: Duration) {
        self.say(what, format!("{:.0} k rows/s ({:.1} s)", rows as f64 / took.as_secs_f64() / 1e3, took.as_secs_f64()));
    }

    fn upload(&self, snapshot: StateSnapshot) -> (Vec<(Shard, Bytes)>, usize) {
        let snapshot = snapshot.expanded().expect("a snapshot");
        let reused = snapshot.reused.len();
        let mut all: Vec<(Shard, Bytes)> = Vec::new();
        for (at, shard) in snapshot.pending.into_iter().enumerate() {
            let bytes = (shard.encode)().expect("a shard");
            let written = Shard {
                size: bytes.len() as u64,
                key_groups: shard.key_groups,
                name: shard.name,
                rows: shard.rows,
                layer: shard.layer,
                ..Shard::new(format!("{at}"), shard.kind)
            };
            shard.uploaded.into_iter().for_each(|uploaded| uploaded(&written));
            all.push((written, bytes));
        }
        (all, reused)
    }

    fn all(&self, backend: &dyn StateBackend) {
        let mut state = backend.keyed(spec(self.env, 0, 1)).expect("state");
        let mut random = Random(42);
        let order: Vec<u64> = (0..self.keys).collect();
        let ((), took) = self.timed(|| order.chunks(BATCH).for_each(|keys| change(&mut *state, keys)));
        self.rate("new keys", self.keys, took);
        let rounds = (2_000_000 / BATCH) as u64;
        for (what, keys) in
            [("changes, uniform over all", self.keys), ("changes, uniform over 200,000 keys", 200_000.min(self.keys))]
        {
            for warm in [true, false] {
                let ((), took) = self.timed(|| {
                    for _ in 0..rounds {
                        let keys: Vec<u64> = (0..BATCH).map(|_| random.below(keys)).collect();
                        change(&mut *state, &keys);
                    }
                });
                if !warm {
                    self.rate(what, rounds * BATCH as u64, took);
                }
            }
        }
        for warm in [true, false] {
            let ((), took) = self.timed(|| {
                for _ in 0..rounds {
                    let keys: Vec<u64> = (0..BATCH).map(|_| random.skewed(self.keys)).collect();
                    change(&mut *state, &keys);
                }
            });
            if !warm {
                self.rate("changes, skewed", rounds * BATCH as u64, took);
            }
        }
        self.say("memory", format!("{} MiB", resident_mib()));
        let first = self.checkpoints(&mut *state, &mut random);
        self.batches(&mut *state, &mut random);
        drop(state);
        self.restores(backend, &first);
    }

    /// A first checkpoint, and ten after changes of 1 % each. Answers the first.
    fn checkpoints(&self, state: &mut dyn KeyedState, random: &mut Random) -> Vec<(Shard, Bytes)> {
        let mut first = Vec::new();
        for epoch in 1..=11 {
            let (snapshot, pause) = self.timed(|| {
                state.snapshot(&Barrier::checkpoint(Epoch(epoch)), &KeyGroupWatermarks::default()).expect("a snapshot")
            });
            let (shards, reused) = self.upload(snapshot);
            state.completed(Epoch(epoch)).expect("completed");
            let bytes: usize = shards.iter().map(|(_, b)| b.len()).sum();
            self.say(
                &format!("checkpoint {epoch}"),
                format!(
                    "pause {:.2} ms, {:.1} MB in {} files ({reused} reused)",
                    pause.as_secs_f64() * 1e3,
                    bytes as f64 / 1e6,
                    shards.len(),
                ),
            );
            for _ in 0..(self.keys as usize / 100).div_ceil(BATCH) {
                let keys: Vec<u64> = (0..BATCH).map(|_| random.below(self.keys)).collect();
                change(state, &keys);
            }
            if epoch == 1 {
                first = shards;
            }
        }
        first
    }

    /// How long batches take while checkpoints are made, and while none is: for keys that are in memory, and for any.
    fn batches(&self, state: &mut dyn KeyedState, random: &mut Random) {
        let mut epoch = 100;
        for (what, keys, size) in [
            ("batches of 4,096 of 200,000 keys", 200_000.min(self.keys), BATCH),
            ("batches of 256 of all keys", self.keys, 256),
        ] {
            let mut run = |state: &mut dyn KeyedState| {
                let keys: Vec<u64> = (0..size).map(|_| random.below(keys)).collect();
                self.net(|| change(state, &keys)).1
            };
            let quiet: Vec<Duration> = (0..BATCHES_TIMED).map(|_| run(state)).collect();
            let mut busy = Vec::new();
            while busy.len() < BATCHES_TIMED {
                epoch += 1;
                let snapshot = state
                    .snapshot(&Barrier::checkpoint(Epoch(epoch)), &KeyGroupWatermarks::default())
                    .expect("a snapshot");
                std::thread::scope(|threads| {
                    let upload = threads.spawn(|| drop(self.upload(snapshot)));
                    // Some more after the upload: what it has put off comes then.
                    let mut more = 8;
                    while more > 0 {
                        busy.push(run(state));
                        more -= u32::from(upload.is_finished());
                    }
                });
                state.completed(Epoch(epoch)).expect("completed");
            }
            self.say(what, format!("{}; without checkpoints {}", spread(busy), spread(quiet)));
        }
    }

    fn restores(&self, backend: &dyn StateBackend, shards: &[(Shard, Bytes)]) {
        for parallelism in [1, 3] {
            let mut slowest = Duration::ZERO;
            for index in 0..parallelism {
                let mut state = backend.keyed(spec(self.env, index, parallelism)).expect("state");
                let mine = KeyGroupRange::of_subtask(index, parallelism, GROUPS);
                let ((), took) = self.timed(|| {
                    // As a worker does: what has none of its key groups it doesn't read.
                    for (shard, bytes) in shards.iter().filter(|(s, _)| s.key_groups.is_none_or(|g| g.overlaps(&mine)))
                    {
                        let restored = RestoredShard::new(shard.clone(), bytes.clone());
                        state.restore(&restored).expect("a shard");
                    }
                    state.restored().expect("a state");
                });
                slowest = slowest.max(took);
            }
            self.say(
                &format!("restore 1 -> {parallelism}, slowest subtask"),
                format!("{:.2} s", slowest.as_secs_f64()),
            );
        }
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let mut number = |default: u64| args.next().and_then(|a| a.parse().ok()).unwrap_or(default);
    let (keys, cache) = (number(5_000_000), number(256));
    let only = args.next();
    let env = Env::system();
    let folder = Path::new("target").join("rocksdb-figures");
    let settings = Settings { cache_bytes: (cache as usize) << 20, ..Settings::new(&folder) };
    let backend = RocksDb::open(&settings, &env).expect("a work folder");
    println!("{keys} keys, cache of {cache} MiB");
    let backends: [(&str, &dyn StateBackend); 2] = [("rocksdb", &backend), ("heap", &Heap)];
    for (name, each) in backends.into_iter().filter(|(name, _)| only.as_ref().is_none_or(|only| only == name)) {
        Run { env: &env, name, keys }.all(each);
    }
    drop(backend);
    let _ = std::fs::remove_dir_all(folder);
}
