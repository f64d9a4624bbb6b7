//! Figures of the heap back end: `cargo run --release -p floodmark-state --example heap_figures [keys]`.
//!
//! State of 16-byte keys with 64-byte values. Tells the pause at a barrier (the snapshot, and the first batch of 1,000 random
//! writes behind it), how fast batches are while it is encoded, the bytes of an incremental checkpoint after changes to 1 % of the keys, the time
//! of a restore by two threads, and the memory per key.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement")]

use std::{sync::Arc, time::Duration};

use arrow::{
    array::{Array, ArrayRef, AsArray, BinaryArray, Int64Array},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
    record_batch::RecordBatch,
};
use floodmark_snapshot::{
    Env, Epoch, KeyGroupRange, Result, Shard, ShardKind, coordination::Barrier, env::spawn_thread,
};
use floodmark_state::{
    Column, ColumnType, Heap, KeyGroupWatermarks, KeyedState, Layout, RestoredShard, RowKeys, Rows, StateBackend,
    StateSnapshot, StateSpec, Table,
};

const MAX_PARALLELISM: u16 = 128;
const BATCH: u64 = 1000;

struct Values;

fn key(n: u64) -> [u8; 16] {
    let mut key = [b'k'; 16];
    key[8..].copy_from_slice(&n.to_be_bytes());
    key
}

fn hash(n: u64) -> u64 {
    let mixed = (n ^ 0x243F_6A88_85A3_08D3).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed ^ (mixed >> 31)).wrapping_mul(0xE703_7ED1_A0B4_28DB) ^ mixed.rotate_left(17)
}

impl Layout for Values {
    fn types(&self) -> Vec<ColumnType> {
        vec![ColumnType::Bytes]
    }

    fn schema(&self) -> SchemaRef {
        let low = Field::new("key", DataType::Int64, false);
        let prefix = Field::new("prefix", DataType::Int64, false);
        Arc::new(Schema::new(vec![prefix, low, Field::new("value", DataType::Binary, true)]))
    }

    fn encode(&self, _: i64, rows: &Rows, slots: &[u32]) -> Result<RecordBatch> {
        let half = |at: usize| -> ArrayRef {
            let of = |slot: &u32| i64::from_be_bytes(rows.key(*slot)[at..at + 8].try_into().unwrap());
            Arc::new(Int64Array::from_iter_values(slots.iter().map(of)))
        };
        let values: BinaryArray = slots.iter().map(|slot| rows.bytes(*slot as usize, 0)).collect();
        Ok(RecordBatch::try_new(self.schema(), vec![half(0), half(8), Arc::new(values)]).unwrap())
    }

    fn decode(&self, batch: &RecordBatch) -> Result<RowKeys> {
        let mut keys = RowKeys::default();
        for n in batch.column(1).as_primitive::<Int64Type>().values() {
            keys.push(0, hash(*n as u64), &key(*n as u64));
        }
        Ok(keys)
    }

    fn fill(&self, batch: &RecordBatch, table: &mut Table, slots: &[u32]) -> Result<()> {
        let from = batch.column(2).as_binary::<i32>();
        table.write_runs(slots, 0, |column, rows, at| {
            if let Column::Bytes(values) = column {
                for (n, row) in rows.iter().enumerate() {
                    values[*row as usize] = from.is_valid(at + n).then(|| from.value(at + n).into());
                }
            }
        });
        Ok(())
    }
}

struct Bench {
    env: Env,
    state: Box<dyn KeyedState>,
    random: u64,
    keys: u64,
}

fn state(env: &Env, index: u32, parallelism: u32) -> Box<dyn KeyedState> {
    let spec = StateSpec {
        name: String::new(),
        layout: Arc::new(Values),
        subtask: index,
        key_groups: KeyGroupRange::of_subtask(index, parallelism, MAX_PARALLELISM),
        max_parallelism: MAX_PARALLELISM,
        ttl: None,
        reuse_restored: true,
        env: env.clone(),
    };
    Heap.keyed(spec).unwrap()
}

impl Bench {
    /// Writes a batch of keys and tells how long it took.
    fn write(&mut self, numbers: impl Iterator<Item = u64>, value: u8) -> Duration {
        let numbers: Vec<u64> = numbers.collect();
        let keys: Vec<[u8; 16]> = numbers.iter().map(|n| key(*n)).collect();
        let keys: Vec<&[u8]> = keys.iter().map(<[u8; 16]>::as_slice).collect();
        let hashes: Vec<u64> = numbers.iter().map(|n| hash(*n)).collect();
        let start = self.env.clock.monotonic();
        let slots = self.state.slots(0, &hashes, &keys).unwrap();
        self.state.table(0).write_runs(&slots.at, 0, |column, rows, _| {
            if let Column::Bytes(values) = column {
                for row in rows {
                    match &mut values[*row as usize] {
                        Some(old) => old.fill(value),
                        empty => *empty = Some([value; 64].into()),
                    }
                }
            }
        });
        self.env.clock.monotonic() - start
    }

    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % self.keys
    }

    fn write_random(&mut self, value: u8) -> Duration {
        let numbers: Vec<u64> = (0..BATCH).map(|_| self.random()).collect();
        self.write(numbers.into_iter(), value)
    }
}

/// Encodes the shard that a snapshot is to write. Answers with it and the time it took.
fn encoded(env: &Env, snapshot: StateSnapshot, epoch: u64) -> (RestoredShard, Duration) {
    let start = env.clock.monotonic();
    let pending = snapshot.pending.into_iter().next().unwrap();
    let bytes = (pending.encode)().unwrap();
    let mut shard = Shard::new(format!("{epoch}"), ShardKind::Keyed);
    (shard.size, shard.rows, shard.layer) = (bytes.len() as u64, pending.rows, pending.layer);
    shard.key_groups = pending.key_groups;
    pending.uploaded.unwrap()(&shard);
    (RestoredShard::new(shard, bytes), env.clock.monotonic() - start)
}

fn spread(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |share: usize| times[(times.len() - 1) * share / 100];
    format!("median {:.2?}, 90 % {:.2?}, 99 % {:.2?}, greatest {:.2?}", at(50), at(90), at(99), at(100))
}

/// CPU time of the process so far: on a shared machine the figure that holds.
fn cpu_ms() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()) * 10
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn main() {
    let keys: u64 = std::env::args().nth(1).map_or(5_000_000, |n| n.parse().unwrap());
    let env = Env::system();
    let before = resident();
    let mut bench = Bench { env: env.clone(), state: state(&env, 0, 1), random: 7, keys };
    let start = env.clock.monotonic();
    for b in 0..keys.div_ceil(BATCH) {
        bench.write(b * BATCH..((b + 1) * BATCH).min(keys), 1);
    }
    let took = env.clock.monotonic() - start;
    println!("{keys} keys written in {took:.2?}; {} bytes resident per key", (resident() - before) / keys);
    let quiet: Vec<Duration> = (0..1000).map(|_| bench.write_random(2)).collect();
    println!("a batch of {BATCH} random writes without a snapshot: {}", spread(quiet));

    let (mut pauses, mut barriers, mut behind, mut files) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for epoch in 1..=100 {
        let start = env.clock.monotonic();
        let snapshot =
            bench.state.snapshot(&Barrier::checkpoint(Epoch(epoch)), &KeyGroupWatermarks::default()).unwrap();
        let barrier = env.clock.monotonic() - start;
        let first = bench.write_random(3);
        let of_thread = env.clone();
        let encoder = spawn_thread("encode".into(), move || encoded(&of_thread, snapshot, epoch)).unwrap();
        pauses.push(barrier + first);
        behind.extend((1..50).map(|_| bench.write_random(3)));
        barriers.push(barrier);
        let (file, took) = encoder.join().unwrap();
        if epoch <= 2 {
            println!("checkpoint {epoch}: {} MB encoded in {took:.2?}", file.bytes.len() / 1_000_000);
        }
        bench.state.completed(Epoch(epoch)).unwrap();
        files.push(file);
    }
    println!("barrier: {}", spread(barriers));
    println!("barrier and the first batch behind it: {}", spread(pauses));
    println!("later batches, with the snapshot still held or just gone: {}", spread(behind));
    let held: u64 = files.iter().map(|f| f.bytes.len() as u64).sum();
    println!("{} bytes resident per key after 100 checkpoints of 1 % each", (resident() - before - held) / keys);

    let changed: std::collections::BTreeSet<u64> = (0..keys / 100).map(|_| bench.random()).collect();
    let snapshot = bench.state.snapshot(&Barrier::checkpoint(Epoch(130)), &KeyGroupWatermarks::default()).unwrap();
    files.push(encoded(&env, snapshot, 130).0);
    bench.state.completed(Epoch(130)).unwrap();
    let all: Vec<u64> = changed.iter().copied().collect();
    for some in all.chunks(BATCH as usize) {
        bench.write(some.iter().copied(), 9);
    }
    let snapshot = bench.state.snapshot(&Barrier::checkpoint(Epoch(131)), &KeyGroupWatermarks::default()).unwrap();
    let named: Vec<String> = snapshot.reused.iter().map(|s| s.path.clone()).collect();
    files.push(encoded(&env, snapshot, 131).0);
    let (bytes, state_bytes) = (files[files.len() - 1].bytes.len(), changed.len() * 80);
    println!(
        "incremental: {} keys changed, {bytes} bytes for {state_bytes} of state: {:.3} times; {} layers",
        changed.len(),
        bytes as f64 / state_bytes as f64,
        named.len() + 1
    );
    drop(bench);

    let last = files.len() - 1;
    files = files
        .into_iter()
        .enumerate()
        .filter(|(i, f)| *i == last || named.contains(&f.shard.path))
        .map(|f| f.1)
        .collect();
    let files = Arc::new(files);
    let (start, cpu_before) = (env.clock.monotonic(), cpu_ms());
    let restore = |index: u32| {
        let (env, files) = (env.clone(), files.clone());
        let restore = move || {
            let mut state = state(&env, index, 2);
            state.restore_together(&files).unwrap();
            state.restored().unwrap();
            state
        };
        spawn_thread(format!("restore {index}"), restore).unwrap()
    };
    let states: Vec<_> = [restore(0), restore(1)].into_iter().map(|t| t.join().unwrap()).collect();
    let took = env.clock.monotonic() - start;
    let rows: u64 = states.iter().map(|s| s.size().0).sum();
    println!(
        "restored {rows} keys from {} layers on 2 threads in {took:.2?}, {} ms of CPU",
        files.len(),
        cpu_ms() - cpu_before
    );
}
