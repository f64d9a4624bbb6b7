//! Keyed state in this process, filled with made-up rows: what `pause`, `incremental` and the decoding half of `restore` drive.
//!
//! A row has a key of 16 bytes and values of 64, and none of it can be compressed: so bytes of checkpoints can be compared with
//! bytes of state. Batches read, change and write the rows of their keys, as an aggregate does.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use arrow::{
    array::{Array, ArrayRef, AsArray, BinaryArray, Int64Array},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
    record_batch::RecordBatch,
};
use clap::ValueEnum;
use floodmark_snapshot::{Env, Epoch, Error, KeyGroup, KeyGroupRange, Shard, coordination::Barrier};
use floodmark_state::{
    Column, ColumnType, KeyGroupWatermarks, KeyedState, Layout, RestoredShard, RowKeys, Rows, StateBackend,
    StateSnapshot, StateSpec, Table,
};

/// Bytes of a row: its key and its values.
pub(crate) const ROW_BYTES: u64 = 16 + 8 * NUMBERS as u64;
/// Numbers in a row.
const NUMBERS: usize = 8;
/// Key groups.
const GROUPS: u16 = 128;
/// Keys of a batch while state is filled.
const FILL_BATCH: u64 = 4_096;
/// What errors name.
const PLACE: &str = "rows of the benchmark";

/// What the 64 bytes of a row are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Values {
    /// Eight numbers, as aggregates keep them
    Numbers,
    /// One text
    Text,
}

impl std::fmt::Display for Values {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Numbers => "numbers",
            Self::Text => "text",
        })
    }
}

impl Layout for Values {
    fn types(&self) -> Vec<ColumnType> {
        match self {
            Self::Numbers => vec![ColumnType::Long; NUMBERS],
            Self::Text => vec![ColumnType::Bytes],
        }
    }

    fn schema(&self) -> SchemaRef {
        let keys = ["high", "low"].map(|name| Field::new(name, DataType::Int64, false));
        let values: Vec<Field> = match self {
            Self::Numbers => (0..NUMBERS).map(|n| Field::new(format!("value{n}"), DataType::Int64, true)).collect(),
            Self::Text => vec![Field::new("value", DataType::Binary, true)],
        };
        Arc::new(Schema::new(keys.into_iter().chain(values).collect::<Vec<_>>()))
    }

    fn encode(&self, _: i64, rows: &Rows, slots: &[u32]) -> floodmark_snapshot::Result<RecordBatch> {
        let half = |at: usize| -> ArrayRef {
            Arc::new(slots.iter().map(|s| half_of(rows.key(*s), at)).collect::<Int64Array>())
        };
        let number = |n: usize| -> ArrayRef {
            Arc::new(slots.iter().map(|s| rows.long(*s as usize, n)).collect::<Int64Array>())
        };
        let mut columns = vec![half(0), half(8)];
        match self {
            Self::Numbers => columns.extend((0..NUMBERS).map(number)),
            Self::Text => {
                let texts: BinaryArray = slots.iter().map(|s| rows.bytes(*s as usize, 0)).collect();
                columns.push(Arc::new(texts));
            }
        }
        RecordBatch::try_new(self.schema(), columns).map_err(|e| Error::abort(format!("{PLACE}: {e}")))
    }

    fn decode(&self, batch: &RecordBatch) -> floodmark_snapshot::Result<RowKeys> {
        let mut keys = RowKeys::default();
        for number in batch.column(1).as_primitive::<Int64Type>().values() {
            keys.push(0, hash(*number as u64), &key(*number as u64));
        }
        Ok(keys)
    }

    fn hashes(&self, keys: &[&[u8]]) -> floodmark_snapshot::Result<Vec<u64>> {
        Ok(keys.iter().map(|key| hash(half_of(key, 8) as u64)).collect())
    }

    fn fill(&self, batch: &RecordBatch, table: &mut Table, slots: &[u32]) -> floodmark_snapshot::Result<()> {
        match self {
            Self::Numbers => {
                for column in 0..NUMBERS {
                    let from = batch.column(2 + column).as_primitive::<Int64Type>();
                    table.write_runs(slots, column, |values, rows, at| {
                        if let Column::Long(values) = values {
                            rows.iter()
                                .enumerate()
                                .for_each(|(i, row)| values[*row as usize] = Some(from.value(at + i)));
                        }
                    });
                }
            }
            Self::Text => {
                let from = batch.column(2).as_binary::<i32>();
                table.write_runs(slots, 0, |values, rows, at| {
                    if let Column::Bytes(values) = values {
                        for (i, row) in rows.iter().enumerate() {
                            values[*row as usize] = from.is_valid(at + i).then(|| from.value(at + i).into());
                        }
                    }
                });
            }
        }
        Ok(())
    }
}

/// Eight bytes of a key; a key has sixteen.
fn half_of(key: &[u8], at: usize) -> i64 {
    key.get(at..at + 8).and_then(|half| half.try_into().ok()).map_or(0, i64::from_be_bytes)
}

fn key(number: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&mix(number).to_be_bytes());
    key[8..].copy_from_slice(&number.to_be_bytes());
    key
}

fn hash(number: u64) -> u64 {
    mix(number ^ 0x243F_6A88_85A3_08D3)
}

/// A bijection that looks random (the finalizer of SplitMix64).
fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ (n >> 31)
}

/// Random numbers, the same in each run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// Below `bound`, each alike.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// What a piece of work took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Took {
    /// By the clock.
    pub(crate) wall: Duration,
    /// The same without the time in which this thread was ready and others had the processors. As `wall` where the system
    /// does not tell.
    pub(crate) net: Duration,
}

impl Took {
    pub(crate) fn ms(self) -> f64 {
        self.wall.as_secs_f64() * 1e3
    }

    pub(crate) fn net_ms(self) -> f64 {
        self.net.as_secs_f64() * 1e3
    }

    pub(crate) fn and(self, then: Self) -> Self {
        Self { wall: self.wall + then.wall, net: self.net + then.net }
    }

    /// What is more than usual of it.
    pub(crate) fn beyond(self, usual: Self) -> Self {
        Self { wall: self.wall.saturating_sub(usual.wall), net: self.net.saturating_sub(usual.net) }
    }

    /// The middle ones of several.
    pub(crate) fn median(of: &[Self]) -> Self {
        let middle = |mut all: Vec<Duration>| {
            all.sort_unstable();
            all.get(all.len() / 2).copied().unwrap_or_default()
        };
        Self { wall: middle(of.iter().map(|t| t.wall).collect()), net: middle(of.iter().map(|t| t.net).collect()) }
    }
}

/// Does some work and says what it took.
pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> (T, Took) {
    let (waited, start) = (waited(), Instant::now());
    let done = work();
    let wall = start.elapsed();
    (done, Took { wall, net: wall.saturating_sub(self::waited().saturating_sub(waited)) })
}

/// How long this thread has waited for a processor so far.
fn waited() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(text.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0))
}

/// Bytes of memory that this process has.
pub(crate) fn resident() -> u64 {
    memory_of("self").map_or(0, |(now, _)| now)
}

/// Bytes of memory that a process has, and the most that it has had.
pub(crate) fn memory_of(pid: &str) -> Option<(u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    Some((field("VmRSS")? << 10, field("VmHWM")? << 10))
}

/// Seconds of user and system time of a process so far.
pub(crate) fn cpu_seconds_of(pid: &str) -> Option<f64> {
    /// What the system counts in, on every Linux that there is.
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |n: usize| fields.get(n)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / TICKS_PER_SECOND)
}

/// The state of one subtask, and what to fill it with.
pub(crate) struct Filled {
    state: Box<dyn KeyedState>,
    spec: StateSpec,
    values: Values,
    /// Keys are numbers below this.
    pub(crate) keys: u64,
    /// What the next value is made of.
    count: u64,
    epoch: Epoch,
}

impl Filled {
    /// Empty state of subtask `index` of `parallelism`, to be filled with its share of `keys` keys.
    pub(crate) fn empty(
        backend: &dyn StateBackend,
        env: &Env,
        values: Values,
        keys: u64,
        (index, parallelism): (u32, u32),
    ) -> Result<Self> {
        let spec = StateSpec {
            name: String::new(),
            layout: Arc::new(values),
            subtask: index,
            key_groups: KeyGroupRange::of_subtask(index, parallelism, GROUPS),
            max_parallelism: GROUPS,
            ttl: None,
            reuse_restored: true,
            env: env.clone(),
        };
        let state = backend.keyed(spec.clone())?;
        Ok(Self { state, spec, values, keys, count: 0, epoch: Epoch(0) })
    }

    /// Writes every key that it owns once.
    pub(crate) fn fill(&mut self) -> Result<Took> {
        let mut all = Took::default();
        for first in (0..self.keys).step_by(FILL_BATCH as usize) {
            let owned = |n: &u64| self.spec.key_groups.contains(KeyGroup::of(hash(*n), GROUPS));
            let numbers: Vec<u64> = (first..(first + FILL_BATCH).min(self.keys)).filter(owned).collect();
            all = all.and(self.change(&numbers)?);
        }
        Ok(all)
    }

    /// One batch: the rows of these keys are read, changed and written.
    pub(crate) fn change(&mut self, numbers: &[u64]) -> Result<Took> {
        let keys: Vec<[u8; 16]> = numbers.iter().map(|n| key(*n)).collect();
        let keys: Vec<&[u8]> = keys.iter().map(<[u8; 16]>::as_slice).collect();
        let hashes: Vec<u64> = numbers.iter().map(|n| hash(*n)).collect();
        self.count += 1;
        let (values, count) = (self.values, self.count);
        let (done, took) = timed(|| -> Result<()> {
            let slots = self.state.slots(0, &hashes, &keys)?;
            let table = self.state.table(0);
            let new = |row: u32, n: usize| mix(count << 24 ^ u64::from(row) << 4 ^ n as u64);
            match values {
                Values::Numbers => {
                    for n in 0..NUMBERS {
                        table.write_runs(&slots.at, n, |column, rows, _| {
                            if let Column::Long(values) = column {
                                for row in rows {
                                    let old = values[*row as usize].unwrap_or(0);
                                    values[*row as usize] = Some(old.wrapping_add(new(*row, n) as i64));
                                }
                            }
                        });
                    }
                }
                Values::Text => table.write_runs(&slots.at, 0, |column, rows, _| {
                    if let Column::Bytes(values) = column {
                        for row in rows {
                            let text = values[*row as usize].get_or_insert_with(|| [0; 8 * NUMBERS].into());
                            for (n, bytes) in text.chunks_exact_mut(8).enumerate() {
                                bytes.copy_from_slice(&new(*row, n).to_le_bytes());
                            }
                        }
                    }
                }),
            }
            Ok(())
        });
        done.map(|()| took)
    }

    /// Changes rows of `count` random keys below `keys`.
    pub(crate) fn change_random(&mut self, random: &mut Random, count: usize, keys: u64) -> Result<Took> {
        let numbers: Vec<u64> = (0..count).map(|_| random.below(keys)).collect();
        self.change(&numbers)
    }

    /// The synchronous part of the next checkpoint.
    pub(crate) fn barrier(&mut self) -> Result<(UnderWay, Took)> {
        self.epoch = self.epoch.next();
        let barrier = Barrier::checkpoint(self.epoch);
        let (snapshot, took) = timed(|| self.state.snapshot(&barrier, &KeyGroupWatermarks::default()));
        Ok((UnderWay { epoch: self.epoch, subtask: self.spec.subtask, snapshot: snapshot? }, took))
    }

    /// The last barrier's checkpoint is complete.
    pub(crate) fn completed(&mut self) -> Result<()> {
        Ok(self.state.completed(self.epoch)?)
    }

    /// A checkpoint from its barrier to its completion, with nothing between.
    pub(crate) fn checkpoint(&mut self) -> Result<Written> {
        let written = self.barrier()?.0.write()?;
        self.completed()?;
        Ok(written)
    }

    /// Takes over what some subtasks have written, so far as it owns it.
    pub(crate) fn restore(&mut self, shards: &[RestoredShard]) -> Result<()> {
        let overlaps = |s: &&RestoredShard| s.shard.key_groups.is_none_or(|g| g.overlaps(&self.spec.key_groups));
        for shard in shards.iter().filter(overlaps) {
            self.state.restore(shard)?;
        }
        self.state.restored()?;
        Ok(())
    }

    /// Rows at present.
    pub(crate) fn rows(&self) -> u64 {
        self.state.size().0
    }
}

/// A checkpoint behind its barrier.
pub(crate) struct UnderWay {
    epoch: Epoch,
    subtask: u32,
    snapshot: StateSnapshot,
}

/// What a checkpoint has written.
pub(crate) struct Written {
    /// Its own files: what it would have uploaded.
    pub(crate) shards: Vec<RestoredShard>,
    /// Bytes of those.
    pub(crate) bytes: u64,
    /// Files of earlier checkpoints that it names again.
    pub(crate) reused: usize,
}

impl UnderWay {
    /// Encodes what is to be uploaded. Not on the thread that writes the state.
    pub(crate) fn write(self) -> Result<Written> {
        let snapshot = self.snapshot.expanded()?;
        let mut written = Written { shards: Vec::new(), bytes: 0, reused: snapshot.reused.len() };
        for (n, pending) in snapshot.pending.into_iter().enumerate() {
            let bytes = (pending.encode)()?;
            let shard = Shard {
                size: bytes.len() as u64,
                subtask: self.subtask,
                key_groups: pending.key_groups,
                rows: pending.rows,
                layer: pending.layer,
                name: pending.name,
                ..Shard::new(format!("{}-{}-{n}", self.epoch.0, self.subtask), pending.kind)
            };
            if let Some(uploaded) = pending.uploaded {
                uploaded(&shard);
            }
            written.bytes += shard.size;
            written.shards.push(RestoredShard::new(shard, bytes));
        }
        Ok(written)
    }
}

/// Sizes that every figure of this kind asks for.
pub(crate) fn check_sizes(keys: u64, checkpoints: u32) -> Result<()> {
    ensure!(keys >= 100, "--keys must be at least 100");
    ensure!(checkpoints > 0, "--checkpoints must be at least 1");
    u32::try_from(keys).context("--keys must be below 4294967296")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use floodmark_state::Heap;

    use super::*;
    use crate::backend::Backend;

    /// All values of a state by key.
    fn all(filled: &mut Filled) -> std::collections::BTreeMap<Vec<u8>, Vec<u8>> {
        let values = filled.values;
        let mut found = std::collections::BTreeMap::new();
        filled
            .state
            .scan(0, &mut |rows, slots| {
                for slot in slots {
                    let value = match values {
                        Values::Numbers => {
                            (0..NUMBERS).flat_map(|n| rows.long(*slot as usize, n).unwrap_or(0).to_le_bytes()).collect()
                        }
                        Values::Text => rows.bytes(*slot as usize, 0).unwrap_or_default().to_vec(),
                    };
                    found.insert(rows.key(*slot).to_vec(), value);
                }
                Ok(())
            })
            .unwrap();
        found
    }

    #[test]
    fn what_two_subtasks_wrote_three_take_over() {
        const KEYS: u64 = 10_000;
        for backend in [Backend::Heap, Backend::RocksDb] {
            for values in [Values::Numbers, Values::Text] {
                let (env, folder) = (Env::system(), tempfile::tempdir().unwrap());
                let opened = backend.open(folder.path(), &env).unwrap();
                let (mut shards, mut before) = (Vec::new(), std::collections::BTreeMap::new());
                for index in 0..2 {
                    let mut filled = Filled::empty(&*opened, &env, values, KEYS, (index, 2)).unwrap();
                    filled.fill().unwrap();
                    shards.extend(filled.checkpoint().unwrap().shards);
                    let rows = all(&mut filled);
                    assert!(rows.values().all(|v| v.len() == 8 * NUMBERS && v.iter().any(|b| *b != 0)));
                    before.extend(rows);
                }
                assert_eq!(before.len() as u64, KEYS, "{backend}, {values}");
                let mut after = std::collections::BTreeMap::new();
                for index in 0..3 {
                    let mut filled = Filled::empty(&*opened, &env, values, KEYS, (index, 3)).unwrap();
                    filled.restore(&shards).unwrap();
                    after.extend(all(&mut filled));
                }
                assert!(before == after, "{backend}, {values}: rows have changed");
            }
        }
    }

    #[test]
    fn rows_can_not_be_compressed_much_and_the_second_checkpoint_has_only_changes() {
        let env = Env::system();
        let mut filled = Filled::empty(&Heap, &env, Values::Numbers, 50_000, (0, 1)).unwrap();
        filled.fill().unwrap();
        let whole = filled.checkpoint().unwrap();
        assert!(whole.bytes >= 50_000 * ROW_BYTES, "{} bytes", whole.bytes);
        filled.change(&(0..500).collect::<Vec<_>>()).unwrap();
        let changes = filled.checkpoint().unwrap();
        assert_eq!((changes.reused, changes.shards.len()), (1, 1));
        assert!((500 * ROW_BYTES..1_000 * ROW_BYTES).contains(&changes.bytes), "{} bytes", changes.bytes);
    }

    #[test]
    fn only_what_is_more_than_usual_counts_beyond_it() {
        let took = |wall: u64, net: u64| Took { wall: Duration::from_millis(wall), net: Duration::from_millis(net) };
        let usual = Took::median(&[took(9, 1), took(3, 2), took(5, 3)]);
        assert_eq!((usual.ms(), usual.net_ms()), (5.0, 2.0));
        let beyond = took(7, 1).beyond(usual);
        assert_eq!((beyond.ms(), beyond.net_ms()), (2.0, 0.0));
    }

    #[test]
    fn the_system_tells_time_and_memory_of_a_process() {
        let (now, most) = memory_of("self").unwrap();
        assert!(now > 1 << 20 && most >= now);
        let before = cpu_seconds_of("self").unwrap();
        let (_, took) = timed(|| (0..50_000_000_u64).fold(0, |sum, n| mix(sum ^ n)));
        assert!(took.net <= took.wall);
        assert!(cpu_seconds_of("self").unwrap() >= before);
    }
}
