//! State in RocksDB against a map, with a cache so small that most rows are in the database.

#![allow(clippy::unwrap_used, reason = "tests say what failed by panicking")]

mod model;

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use arrow::{array::AsArray, datatypes::Int64Type};
use floodmark_rocksdb::{RocksDb, Settings, StateFiles};
use floodmark_snapshot::{
    Clock, Disposition, Env, Epoch, KeyGroup, KeyGroupRange, Shard, ShardKind,
    block::{BlockWriter, read_blocks},
    coordination::Barrier,
    env::sleep,
};
use floodmark_state::{Heap, StateBackend};
use model::{Model, Random, States, Store, of_kind, spec, whole};

fn backend(folder: &Path, cache_bytes: usize) -> RocksDb {
    let settings =
        Settings { cache_bytes, block_cache_bytes: 4 << 20, memtable_bytes: 2 << 20, ..Settings::new(folder) };
    RocksDb::open(&settings, &Env::system()).unwrap()
}

/// A folder for databases: in memory where there is such a place, because RocksDB waits for the disk at each of many checkpoints.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

/// A checkpoint that may be restored.
struct Saved {
    shards: Vec<Shard>,
    parallelism: u32,
    model: Model,
}

/// Random steps against a map: writes, reads, removals, dropped namespaces; checkpoints that are completed and aborted in any
/// order; savepoints; restores of the newest completed checkpoint at any parallelism.
fn random_steps(seed: u64, steps: u32, keys: u64, cache_bytes: usize) {
    let folder = scratch();
    let (env, mut random) = (Env::system(), Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1));
    let backend = backend(folder.path(), cache_bytes);
    let mut states = States::open(&backend, 1, None, &env);
    let (mut model, mut store, mut epoch) = (Model::new(), Store::default(), 0);
    let mut under_way: BTreeMap<u64, Saved> = BTreeMap::new();
    let mut newest: Option<(u64, Saved)> = None;
    for step in 0..steps {
        let namespace = random.below(4) as i64 - 1;
        let batch: Vec<u64> = (0..random.below(300)).map(|_| random.below(keys)).collect();
        match random.below(20) {
            0..8 => {
                let text = format!("{step}").repeat(random.below(8) as usize).into_bytes();
                let mut new = states.add(namespace, &batch, &text);
                let mut expected = Vec::new();
                for key in &batch {
                    let row = model.entry((namespace, *key)).or_insert_with(|| {
                        expected.push(*key);
                        (0, Vec::new())
                    });
                    *row = (row.0 + 1, text.clone());
                }
                new.sort_unstable();
                expected.sort_unstable();
                assert_eq!(new, expected, "seed {seed} step {step}: new keys");
            }
            8..11 => {
                for (key, row) in states.read(namespace, &batch) {
                    assert_eq!(
                        row.as_ref(),
                        model.get(&(namespace, key)),
                        "seed {seed} step {step}: {namespace}/{key}"
                    );
                }
            }
            11..13 => {
                states.remove(namespace, &batch);
                batch.iter().for_each(|key| drop(model.remove(&(namespace, *key))));
            }
            13 => {
                states.drop_namespace(namespace);
                model.retain(|(n, _), _| *n != namespace);
            }
            14..16 => {
                epoch += 1;
                let snapshots = states.snapshot(&Barrier::checkpoint(Epoch(epoch)), Some(epoch as i64));
                // What is written now is not in it.
                let saved = model.clone();
                states.add(7, &[1, 2, 3], b"later");
                for key in 1..=3 {
                    let row = model.entry((7, key)).or_default();
                    *row = (row.0 + 1, b"later".to_vec());
                }
                let shards = store.upload(epoch, snapshots).unwrap();
                let parallelism = states.states.len() as u32;
                under_way.insert(epoch, Saved { shards, parallelism, model: saved });
            }
            16 => {
                let Some(which) = under_way.keys().nth(random.below(under_way.len() as u64) as usize).copied() else {
                    continue;
                };
                let Some(saved) = under_way.remove(&which) else { continue };
                if random.below(3) == 0 {
                    states.aborted(which);
                } else {
                    states.completed(which);
                    if newest.as_ref().is_none_or(|(epoch, _)| *epoch < which) {
                        newest = Some((which, saved));
                    }
                }
                // Nothing but what is still wanted is kept.
                let wanted = newest.iter().map(|(_, s)| s).chain(under_way.values()).map(|s| s.shards.as_slice());
                store.keep(&wanted.collect::<Vec<_>>());
            }
            17 => assert_eq!(states.all(), model, "seed {seed} step {step}"),
            18 => {
                let parallelism = states.states.len() as u32;
                assert_eq!(counted(&states), expected(&model, parallelism), "seed {seed} step {step}");
                let namespaces: Vec<i64> =
                    model.keys().map(|(n, _)| *n).collect::<std::collections::BTreeSet<_>>().into_iter().collect();
                let firsts = states.states.iter().filter_map(|s| s.first_namespace()).min();
                assert_eq!(firsts, namespaces.first().copied(), "seed {seed} step {step}");
            }
            _ => {
                let parallelism = 1 + random.below(3) as u32;
                let Some((at, saved)) = &newest else { continue };
                under_way.clear();
                drop(std::mem::replace(&mut states, States::open(&backend, parallelism, None, &env)));
                let watermark = states.restore(&store, &saved.shards, saved.parallelism).unwrap();
                assert_eq!(watermark, Some(*at as i64));
                model = saved.model.clone();
                assert_eq!(counted(&states), expected(&model, parallelism), "seed {seed} step {step}");
                assert_eq!(
                    states.all(),
                    model,
                    "seed {seed} step {step}: restored {} -> {parallelism}",
                    saved.parallelism
                );
            }
        }
    }
    assert_eq!(states.all(), model, "seed {seed}: at the end");
}

#[test]
fn random_steps_agree_with_a_map() {
    for seed in 1..=12 {
        random_steps(seed, 200, 2_000, 64 << 10);
    }
    // All in memory, and hardly any.
    random_steps(100, 300, 500, 64 << 20);
    random_steps(101, 300, 20_000, 16 << 10);
}

#[test]
fn state_much_larger_than_memory_is_right_and_memory_bounded() {
    const KEYS: u64 = 200_000;
    const CACHE: usize = 2 << 20;
    let folder = scratch();
    let (env, backend) = (Env::system(), backend(folder.path(), CACHE));
    let mut states = States::open(&backend, 1, None, &env);
    let mut most = 0;
    for round in 0..3 {
        for start in (0..KEYS).step_by(1000) {
            let keys: Vec<u64> = (start..start + 1000).collect();
            let new = states.add(0, &keys, format!("text {round}, which is longer than some").as_bytes());
            assert_eq!(new.len(), if round == 0 { 1000 } else { 0 });
            most = most.max(states.states[0].table(0).bytes());
        }
    }
    assert!(most < CACHE * 2, "{most} bytes of rows in memory");
    assert_eq!(states.rows(), KEYS);
    let all = states.all();
    assert_eq!(all.len() as u64, KEYS);
    assert!(all.values().all(|row| *row == (3, b"text 2, which is longer than some".to_vec())));
}

#[test]
fn a_checkpoint_after_few_changes_uploads_little_and_leaves_no_local_files() {
    const KEYS: u64 = 100_000;
    const CHECKPOINTS: u64 = 12;
    let folder = scratch();
    let (env, backend) = (Env::system(), backend(folder.path(), 64 << 20));
    let (mut states, mut store) = (States::open(&backend, 1, None, &env), Store::default());
    let mut random = Random(7);
    for start in (0..KEYS).step_by(1000) {
        // Numbers that don't compress.
        let text = (0..16).flat_map(|_| random.below(u64::MAX).to_le_bytes()).collect::<Vec<_>>();
        states.add(0, &(start..start + 1000).collect::<Vec<_>>(), &text);
    }
    states.checkpoint(&mut store, 1);
    let (whole_bytes, mut named_again) = (store.uploaded, 0);
    for epoch in 2..2 + CHECKPOINTS {
        let keys: Vec<u64> = (0..KEYS / 100).map(|_| random.below(KEYS)).collect();
        states.add(0, &keys, b"changed");
        let shards = states.checkpoint(&mut store, epoch);
        named_again += shards.iter().filter(|s| !s.path.starts_with(&format!("{epoch}-"))).count();
    }
    // Files are merged now and then, all of them too; that is spread over many checkpoints.
    let uploaded = store.uploaded - whole_bytes;
    assert!(
        uploaded * 4 < whole_bytes * CHECKPOINTS,
        "{uploaded} bytes for {CHECKPOINTS} checkpoints of {whole_bytes} bytes, each after a change of 1 %"
    );
    assert!(named_again as u64 >= CHECKPOINTS, "{named_again} files were named again");
    let left: Vec<_> = walk(folder.path()).into_iter().filter(|p| p.contains("checkpoint-")).collect();
    assert_eq!(left, Vec::<String>::new(), "files of checkpoints that are done");
    drop(states);
    drop(backend);
    let left: Vec<_> = walk(folder.path()).into_iter().filter(|p| !p.ends_with(".gate")).collect();
    assert_eq!(left, Vec::<String>::new(), "files of a back end that is closed");
}

fn walk(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
        found.push(entry.display().to_string());
        if entry.is_dir() {
            found.extend(walk(&entry));
        }
    }
    found
}

#[test]
fn an_aborted_checkpoint_leaves_no_files_and_the_next_one_is_complete() {
    let folder = scratch();
    let (env, backend) = (Env::system(), backend(folder.path(), 1 << 20));
    let (mut states, mut store) = (States::open(&backend, 1, None, &env), Store::default());
    states.add(0, &(0..5000).collect::<Vec<_>>(), b"x");
    let snapshots = states.snapshot(&Barrier::checkpoint(Epoch(1)), None);
    states.aborted(1);
    drop(snapshots);
    let shards = states.checkpoint(&mut store, 2);
    let left: Vec<_> = walk(folder.path()).into_iter().filter(|p| p.contains("checkpoint-")).collect();
    assert_eq!(left, Vec::<String>::new());
    let model = states.all();
    let mut states = States::open(&backend, 1, None, &env);
    states.restore(&store, &shards, 1).unwrap();
    assert_eq!(states.all(), model);
}

#[test]
fn a_restored_checkpoint_is_gone_on_from_at_the_same_key_groups_only() {
    let folder = scratch();
    let (env, backend) = (Env::system(), backend(folder.path(), 1 << 20));
    let (mut states, mut store) = (States::open(&backend, 2, None, &env), Store::default());
    states.add(0, &(0..20_000).collect::<Vec<_>>(), b"x");
    let shards = states.checkpoint(&mut store, 1);
    for (parallelism, named_again) in [(2, true), (3, false)] {
        let mut states = States::open(&backend, parallelism, None, &env);
        states.restore(&store, &shards, 2).unwrap();
        states.add(0, &[1, 2, 3], b"y");
        let next = states.checkpoint(&mut store, 2);
        assert_eq!(next.iter().any(|s| s.path.starts_with("1-")), named_again, "parallelism {parallelism}");
        let model = states.all();
        let mut again = States::open(&backend, parallelism, None, &env);
        again.restore(&store, &next, parallelism).unwrap();
        assert_eq!(again.all(), model);
    }
}

#[test]
fn a_savepoint_is_neutral_and_changes_nothing_for_later_checkpoints() {
    let folder = scratch();
    let (env, backend) = (Env::system(), backend(folder.path(), 256 << 10));
    let (mut states, mut store) = (States::open(&backend, 1, None, &env), Store::default());
    states.add(3, &(0..20_000).collect::<Vec<_>>(), b"x");
    states.add(-3, &(0..1_000).collect::<Vec<_>>(), b"y");
    states.checkpoint(&mut store, 1);
    let snapshots = states.snapshot(&whole(2), Some(99));
    states.add(3, &[5], b"later");
    let savepoint = store.upload(2, snapshots).unwrap();
    states.completed(2);
    assert_eq!((savepoint.len(), of_kind(&savepoint, ShardKind::Keyed)), (1, 1));
    assert_eq!(savepoint[0].rows, 21_000);
    let third = states.checkpoint(&mut store, 3);
    assert!(
        third.iter().any(|s| s.path.starts_with("1-")),
        "files of the checkpoint before the savepoint are named again"
    );
    for parallelism in [1, 3] {
        let mut restored = States::open(&backend, parallelism, None, &env);
        assert_eq!(restored.restore(&store, &savepoint, 1).unwrap(), Some(99));
        assert_eq!(restored.rows(), 21_000);
        assert_eq!(restored.read(3, &[5])[&5], Some((1, b"x".to_vec())));
        restored.add(3, &[5], b"later");
        assert_eq!(restored.all(), states.all());
    }
}

#[test]
fn a_subtask_is_handed_only_the_files_that_have_its_key_groups() {
    const KEYS: u64 = 60_000;
    let folder = scratch();
    // Small files: a compaction cuts its output where they are full.
    let settings = Settings { memtable_bytes: 2 << 20, file_bytes: 128 << 10, ..Settings::new(folder.path()) };
    let (env, backend) = (Env::system(), RocksDb::open(&settings, &Env::system()).unwrap());
    let (mut states, mut store) = (States::open(&backend, 1, None, &env), Store::default());
    let (mut random, mut epoch) = (Random(11), 0);
    for round in 0..12 {
        for start in (0..KEYS).step_by(5_000) {
            let text = (0..4).flat_map(|_| random.below(u64::MAX).to_le_bytes()).collect::<Vec<_>>();
            states.add(round % 3, &(start..start + 5_000).collect::<Vec<_>>(), &text);
        }
        epoch += 1;
        states.checkpoint(&mut store, epoch);
    }
    states.remove(1, &(0..KEYS).step_by(2).collect::<Vec<_>>());
    states.drop_namespace(2);
    let bytes = |shards: &[Shard], groups: KeyGroupRange| -> u64 {
        shards.iter().filter(|s| s.key_groups.is_none_or(|g| g.overlaps(&groups))).map(|s| s.size).sum()
    };
    // What has been written last is in files of all key groups until the database gets to sorting it.
    let patience = env.clock.monotonic() + Duration::from_secs(60);
    let mut shards = loop {
        states.add(1, &[epoch], b"x");
        epoch += 1;
        let shards = states.checkpoint(&mut store, epoch);
        let all: u64 = shards.iter().map(|s| s.size).sum();
        let quarter = bytes(&shards, spec(1, 4, None, &env).key_groups);
        if quarter * 2 < all {
            break shards;
        }
        assert!(
            env.clock.monotonic() < patience,
            "{quarter} of {all} bytes for 4 of 16 key groups, {} files",
            shards.len()
        );
        sleep(Duration::from_millis(50));
    };
    let model = states.all();
    // There and back, over checkpoints of states that still have files with rows of others.
    let mut parallelism = 1;
    for next in [4, 3, 5, 2, 2, 1] {
        let mut restored = States::open(&backend, next, None, &env);
        restored.restore(&store, &shards, parallelism).unwrap();
        assert_eq!(restored.rows(), model.len() as u64, "{parallelism} -> {next}");
        assert_eq!(restored.all(), model, "{parallelism} -> {next}");
        epoch += 1;
        shards = restored.checkpoint(&mut store, epoch);
        parallelism = next;
    }
}

/// Of each subtask: how many rows it says it has, and its namespaces.
fn counted(states: &States) -> Vec<(u64, Vec<i64>)> {
    states.states.iter().map(|s| (s.size().0, s.namespaces(i64::MIN..=i64::MAX))).collect()
}

/// The same of a map.
fn expected(model: &Model, parallelism: u32) -> Vec<(u64, Vec<i64>)> {
    let of_subtask = |index| {
        let groups = KeyGroupRange::of_subtask(index, parallelism, model::GROUPS);
        let mine = |key: u64| groups.contains(KeyGroup::of(model::hash(key), model::GROUPS));
        let mut namespaces: Vec<i64> = model.keys().filter(|(_, key)| mine(*key)).map(|(n, _)| *n).collect();
        let rows = namespaces.len() as u64;
        namespaces.dedup();
        (rows, namespaces)
    };
    (0..parallelism).map(of_subtask).collect()
}

/// Makes of the file beside the data files what earlier programs wrote: it says nothing of key groups. Before, it does if `told`.
fn forget_groups(store: &mut Store, shards: &[Shard], told: bool) {
    for shard in shards.iter().filter(|s| StateFiles::tells(s)) {
        let blocks = read_blocks("rocksdb", &store.files[&shard.path]).unwrap();
        let mut head: serde_json::Value = serde_json::from_slice(&blocks[0]).unwrap();
        assert_eq!(head.as_object_mut().unwrap().remove("byGroup"), told.then_some(true.into()));
        if !told {
            continue;
        }
        let mut file = BlockWriter::new("rocksdb");
        file.push(&serde_json::to_vec(&head).unwrap()).unwrap();
        blocks[1..blocks.len() - 1].iter().for_each(|block| file.push(block).unwrap());
        store.files.insert(shard.path.clone(), file.finish());
    }
}

#[test]
fn rows_are_counted_right_from_parallelism_to_parallelism() {
    const KEYS: u64 = 30_000;
    for (earlier, cache_bytes) in [(false, 64 << 10), (true, 64 << 10), (false, 64 << 20)] {
        let folder = scratch();
        let (env, backend) = (Env::system(), backend(folder.path(), cache_bytes));
        let (mut store, mut random, mut parallelism) = (Store::default(), Random(5), 2);
        let mut states = States::open(&backend, parallelism, None, &env);
        let (mut model, mut told) = (Model::new(), true);
        for (epoch, next) in [(1, 3), (2, 2), (3, 2), (4, 5), (5, 3), (6, 1), (7, 3), (8, 2)] {
            for namespace in [-7, 0, 2] {
                let keys: Vec<u64> = (0..3_000).map(|_| random.below(KEYS)).collect();
                states.add(namespace, &keys, b"some text");
                for key in &keys {
                    let row = model.entry((namespace, *key)).or_default();
                    *row = (row.0 + 1, b"some text".to_vec());
                }
                let over: Vec<u64> = (0..1_000).map(|_| random.below(KEYS)).collect();
                states.remove(namespace, &over);
                over.iter().for_each(|key| drop(model.remove(&(namespace, *key))));
            }
            // One that only some subtasks have, and one that goes.
            states.add(epoch, &[random.below(KEYS)], b"one row");
            states
                .states
                .iter_mut()
                .for_each(|s| s.drop_namespace(if epoch % 2 == 0 { -7 } else { epoch - 1 }).unwrap());
            model = states.all();
            assert_eq!(counted(&states), expected(&model, parallelism), "before {epoch}");
            let shards = states.checkpoint(&mut store, epoch as u64);
            if earlier {
                forget_groups(&mut store, &shards, told);
                // Files that are taken as they are aren't read, and so stay uncounted.
                told = parallelism != next;
            }
            states = States::open(&backend, next, None, &env);
            states.restore(&store, &shards, parallelism).unwrap();
            assert_eq!(counted(&states), expected(&model, next), "{parallelism} -> {next}, earlier program: {earlier}");
            assert_eq!(states.all(), model, "{parallelism} -> {next}, earlier program: {earlier}");
            parallelism = next;
        }
    }
}

#[test]
fn a_restore_at_another_parallelism_goes_by_the_rows_that_the_checkpoint_tells() {
    let folder = scratch();
    let (env, backend) = (Env::system(), backend(folder.path(), 64 << 10));
    let (mut states, mut store) = (States::open(&backend, 2, None, &env), Store::default());
    states.add(3, &(0..10_000).collect::<Vec<_>>(), b"x");
    let shards = states.checkpoint(&mut store, 1);
    // The first key group of all, of the first subtask, is said to have as many rows as there are, and the others none.
    let told = shards.iter().find(|s| StateFiles::tells(s) && s.subtask == 0).unwrap();
    let mut blocks = read_blocks("rocksdb", &store.files[&told.path]).unwrap();
    let rows = u64::from_le_bytes(blocks[2][8..16].try_into().unwrap());
    assert!((4_000..6_000).contains(&rows), "{rows} rows");
    let groups = vec![1, 0, rows as u8 | 0x80, (rows >> 7) as u8];
    assert!(rows < 1 << 14, "two bytes of seven bits");
    *blocks.last_mut().unwrap() = groups.into();
    let mut file = BlockWriter::new("rocksdb");
    blocks.iter().for_each(|block| file.push(block).unwrap());
    store.files.insert(told.path.clone(), file.finish());
    let mut restored = States::open(&backend, 3, None, &env);
    restored.restore(&store, &shards, 2).unwrap();
    assert_eq!(restored.states[0].size().0, rows, "rows have been counted, not taken from the checkpoint");
    // Numbers that do not come to that of the namespace are refused.
    *blocks.last_mut().unwrap() = vec![1, 0, 7].into();
    let mut file = BlockWriter::new("rocksdb");
    blocks.iter().for_each(|block| file.push(block).unwrap());
    store.files.insert(told.path.clone(), file.finish());
    let error = States::open(&backend, 3, None, &env).restore(&store, &shards, 2).expect_err("other numbers");
    assert_eq!(error.disposition(), Disposition::Corrupt, "{error}");
}

#[test]
fn files_are_read_without_the_job_that_wrote_them() {
    let folder = scratch();
    let (env, backend) = (Env::system(), backend(folder.path(), 256 << 10));
    let (mut states, mut store) = (States::open(&backend, 1, None, &env), Store::default());
    states.add(-3, &(0..20_000).collect::<Vec<_>>(), b"x");
    states.add(5, &(0..10).collect::<Vec<_>>(), b"y");
    let before = states.checkpoint(&mut store, 1);
    // Restored by two, files have rows that are not theirs.
    let mut states = States::open(&backend, 2, None, &env);
    states.restore(&store, &before, 1).unwrap();
    states.remove(-3, &[7]);
    states.drop_namespace(5);
    states.add(-3, &[8], b"later");
    let shards = states.checkpoint(&mut store, 2);
    let mut found = Model::new();
    for subtask in 0..2 {
        let mut files = StateFiles::new(&folder.path().join("read"), &env).unwrap();
        let mine: Vec<&Shard> = shards.iter().filter(|s| s.subtask == subtask).collect();
        let told = mine.iter().find(|s| StateFiles::tells(s)).unwrap();
        let columns = StateFiles::columns(&store.files[&told.path]).unwrap();
        let names: Vec<&str> = columns.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["$namespace", "key", "count", "text"]);
        mine.iter().for_each(|shard| files.take(shard, &store.files[&shard.path]).unwrap());
        let mut show = |batch: arrow::record_batch::RecordBatch| {
            let longs = |at: usize| batch.column(at).as_primitive::<Int64Type>().values();
            for row in 0..batch.num_rows() {
                let text = batch.column(3).as_binary::<i32>().value(row).to_vec();
                let at = (longs(0)[row], longs(1)[row] as u64);
                assert!(found.insert(at, (longs(2)[row], text)).is_none(), "{at:?} is shown twice");
            }
            Ok(())
        };
        files.each(&mut show).unwrap();
    }
    assert_eq!(found, states.all());
    assert_eq!(found[&(-3, 8)], (2, b"later".to_vec()));
    let left: Vec<_> = walk(&folder.path().join("read")).into_iter().filter(|p| !p.ends_with(".gate")).collect();
    assert_eq!(left, Vec::<String>::new());
    // Without one of the files, or with a damaged one, nothing is shown.
    let mine: Vec<&Shard> = shards.iter().filter(|s| s.subtask == 1).collect();
    for missing in 0..mine.len() {
        let mut files = StateFiles::new(&folder.path().join("read"), &env).unwrap();
        let others = mine.iter().enumerate().filter(|(at, _)| *at != missing);
        others.for_each(|(_, shard)| files.take(shard, &store.files[&shard.path]).unwrap());
        let error = files.each(&mut |_| panic!("a row is shown")).unwrap_err();
        assert_eq!(error.disposition(), Disposition::Corrupt, "{error}");
    }
}

#[test]
fn a_large_savepoint_is_cut_into_shards_and_each_key_group_gets_its_rows() {
    const SHARD_BYTES: u64 = 64 << 10;
    let folder = scratch();
    let env = Env::system();
    let settings = Settings { cache_bytes: 256 << 10, shard_bytes: SHARD_BYTES, ..Settings::new(folder.path()) };
    let backend = RocksDb::open(&settings, &env).unwrap();
    let (mut states, mut store) = (States::open(&backend, 2, None, &env), Store::default());
    for namespace in [-1, 0, 7] {
        states.add(namespace, &(0..10_000).collect::<Vec<_>>(), format!("text of {namespace}").as_bytes());
    }
    let model = states.all();
    let snapshots = states.snapshot(&whole(1), Some(7));
    let savepoint = store.upload(1, snapshots).unwrap();
    assert_eq!(savepoint.iter().map(|s| s.rows).sum::<u64>(), 30_000);
    assert!(savepoint.len() > 20, "{} shards", savepoint.len());
    for shard in &savepoint {
        let (size, rows) = (shard.size, shard.rows);
        assert!(size < 2 * SHARD_BYTES, "a shard of {rows} rows has {size} bytes instead of {SHARD_BYTES}");
    }
    for subtask in 0..2 {
        // No key group is left out: the watermark is known of each.
        let groups: Vec<_> = savepoint.iter().filter(|s| s.subtask == subtask).filter_map(|s| s.key_groups).collect();
        let mine = spec(subtask, 2, None, &env).key_groups;
        assert_eq!((groups[0].first, groups[groups.len() - 1].last), (mine.first, mine.last));
        assert!(groups.windows(2).all(|g| g[0].last == g[1].first || g[0].last.0 + 1 == g[1].first.0), "{groups:?}");
        assert!(groups.windows(2).any(|g| g[0].last == g[1].first), "some key group is larger than a shard");
    }
    for to in [&Heap as &dyn StateBackend, &backend] {
        for parallelism in [1, 2, 3] {
            let mut restored = States::open(to, parallelism, None, &env);
            assert_eq!(restored.restore(&store, &savepoint, 2).unwrap(), Some(7));
            assert_eq!(restored.all(), model, "{} at {parallelism}", to.name());
        }
    }
}

#[test]
fn an_empty_savepoint_tells_the_watermark_all_the_same() {
    let folder = scratch();
    let (env, backend) = (Env::system(), backend(folder.path(), 256 << 10));
    let (mut states, mut store) = (States::open(&backend, 1, None, &env), Store::default());
    let snapshots = states.snapshot(&whole(1), Some(7));
    let savepoint = store.upload(1, snapshots).unwrap();
    assert_eq!((savepoint.len(), savepoint[0].rows), (1, 0));
    let mut restored = States::open(&backend, 2, None, &env);
    assert_eq!(restored.restore(&store, &savepoint, 1).unwrap(), Some(7));
}

#[test]
fn savepoints_go_from_either_back_end_to_the_other() {
    let folder = scratch();
    let env = Env::system();
    let rocksdb = backend(folder.path(), 64 << 10);
    for (from, to) in [(&Heap as &dyn StateBackend, &rocksdb as &dyn StateBackend), (&rocksdb, &Heap)] {
        let (mut states, mut store) = (States::open(from, 2, None, &env), Store::default());
        for namespace in [-5, 0, 5] {
            states.add(namespace, &(0..5_000).collect::<Vec<_>>(), b"x");
        }
        states.remove(0, &(0..100).collect::<Vec<_>>());
        states.drop_namespace(5);
        let snapshots = states.snapshot(&whole(1), Some(7));
        let savepoint = store.upload(1, snapshots).unwrap();
        for parallelism in [1, 2, 3] {
            let mut restored = States::open(to, parallelism, None, &env);
            assert_eq!(restored.restore(&store, &savepoint, 2).unwrap(), Some(7), "{} -> {}", from.name(), to.name());
            assert_eq!(restored.all(), states.all(), "{} -> {}", from.name(), to.name());
            assert_eq!(restored.rows(), 9_900);
        }
    }
}

#[test]
fn layers_of_the_heap_s_checkpoints_are_taken_in() {
    let folder = scratch();
    let (env, mut random) = (Env::system(), Random(3));
    let rocksdb = backend(folder.path(), 64 << 10);
    let (mut states, mut store) = (States::open(&Heap, 2, None, &env), Store::default());
    for epoch in 1..=12 {
        let batch: Vec<u64> = (0..200).map(|_| random.below(3_000)).collect();
        states.add(epoch % 3, &batch, format!("{epoch}").as_bytes());
        states.remove(epoch % 2, &batch[..50]);
        if epoch % 5 == 0 {
            states.drop_namespace(1);
            states.add(1, &batch[..5], b"anew");
        }
        let shards = states.checkpoint(&mut store, epoch as u64);
        for parallelism in [1, 2, 3] {
            let mut restored = States::open(&rocksdb, parallelism, None, &env);
            restored.restore(&store, &shards, 2).unwrap();
            assert_eq!(restored.all(), states.all(), "epoch {epoch}, parallelism {parallelism}");
        }
    }
}

#[test]
fn every_damaged_or_missing_file_is_corrupt_and_never_a_crash() {
    let folder = scratch();
    let (env, backend) = (Env::system(), backend(folder.path(), 1 << 20));
    let (mut states, mut store) = (States::open(&backend, 1, None, &env), Store::default());
    states.add(0, &(0..300).collect::<Vec<_>>(), b"some text");
    let shards = states.checkpoint(&mut store, 1);
    let restore = |store: &Store, shards: &[Shard]| {
        let mut states = States::open(&backend, 1, None, &env);
        states.restore(store, shards, 1).map(|_| states.all())
    };
    assert_eq!(restore(&store, &shards).unwrap(), states.all());
    for shard in &shards {
        let good = store.files[&shard.path].clone();
        for at in (0..good.len()).step_by(good.len().div_ceil(60)) {
            let mut bad = good.to_vec();
            bad[at] ^= 0x40;
            store.files.insert(shard.path.clone(), bad.into());
            let error = restore(&store, &shards).expect_err("a flipped byte");
            assert_eq!(error.disposition(), Disposition::Corrupt, "byte {at} of {:?}: {error}", shard.name);
            store.files.insert(shard.path.clone(), good.slice(..at));
            let error = restore(&store, &shards).expect_err("a cut file");
            assert_eq!(error.disposition(), Disposition::Corrupt, "{:?} cut at {at}: {error}", shard.name);
        }
        store.files.insert(shard.path.clone(), good);
        let others: Vec<Shard> = shards.iter().filter(|s| s.path != shard.path).cloned().collect();
        let error = restore(&store, &others).expect_err("a missing file");
        assert_eq!(error.disposition(), Disposition::Corrupt, "without {:?}: {error}", shard.name);
    }
    let mut outside = shards.clone();
    outside[0].name = Some("../outside.sst".to_owned());
    assert!(restore(&store, &outside).is_err());
    assert!(!walk(folder.path()).iter().any(|p| p.contains("outside")));
}

/// A clock that stands still until it is moved.
struct Hand(std::sync::atomic::AtomicI64);

impl Clock for Hand {
    fn wall_ms(&self) -> i64 {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn monotonic(&self) -> Duration {
        Duration::from_millis(self.wall_ms() as u64)
    }
}

#[test]
fn rows_whose_time_is_over_are_not_seen_and_go_by_and_by() {
    let folder = scratch();
    let clock = Arc::new(Hand(1_000_000.into()));
    let env = Env { clock: clock.clone(), ..Env::system() };
    let backend = backend(folder.path(), 128 << 10);
    let ttl = Some(Duration::from_secs(60));
    let (mut states, mut store) = (States::open(&backend, 1, ttl, &env), Store::default());
    let forward = |ms| clock.0.fetch_add(ms, std::sync::atomic::Ordering::Relaxed);
    states.add(0, &(0..10_000).collect::<Vec<_>>(), b"old");
    forward(40_000);
    let kept: Vec<u64> = (0..10_000).step_by(10).collect();
    states.add(0, &kept, b"new");
    let shards = states.checkpoint(&mut store, 1);
    forward(40_000);
    let mut restored = States::open(&backend, 3, ttl, &env);
    restored.restore(&store, &shards, 1).unwrap();
    for states in [&mut states, &mut restored] {
        assert_eq!(states.read(0, &[0, 1]), [(0, Some((2, b"new".to_vec()))), (1, None)].into());
        assert_eq!(states.all().len(), kept.len());
        assert_eq!(states.add(0, &[1], b"again"), [1]);
        assert_eq!(states.read(0, &[1])[&1], Some((1, b"again".to_vec())));
    }
    // Any traffic at all removes them.
    for _ in 0..2_000 {
        states.add(0, &[1], b"again");
    }
    assert_eq!(states.rows(), kept.len() as u64 + 1);
    // What has gone of those that were restored is no longer counted for their key groups.
    for _ in 0..2_000 {
        restored.add(0, &(0..40).map(|n| 10_000 + n).collect::<Vec<_>>(), b"again");
    }
    let rows = counted(&restored);
    assert_eq!(restored.all().len() as u64, rows.iter().map(|(rows, _)| rows).sum::<u64>());
    let shards = restored.checkpoint(&mut store, 2);
    for parallelism in [3, 2] {
        let mut again = States::open(&backend, parallelism, ttl, &env);
        again.restore(&store, &shards, 3).unwrap();
        assert_eq!(counted(&again), expected(&restored.all(), parallelism));
        assert_eq!(again.all(), restored.all());
    }
}

#[test]
fn a_state_of_other_columns_is_refused_with_what_to_do() {
    let folder = scratch();
    let (env, backend) = (Env::system(), backend(folder.path(), 1 << 20));
    let (mut states, mut store) = (States::open(&backend, 1, None, &env), Store::default());
    states.add(0, &[1], b"x");
    let shards = states.checkpoint(&mut store, 1);
    let mut other =
        backend.keyed(floodmark_state::StateSpec { layout: Arc::new(Fewer), ..spec(0, 1, None, &env) }).unwrap();
    for shard in &shards {
        let bytes = store.files[&shard.path].clone();
        other.restore(&floodmark_state::RestoredShard::new(shard.clone(), bytes)).unwrap();
    }
    let error = other.restored().expect_err("other columns").to_string();
    assert!(error.contains("text: Binary") && error.contains("start from a savepoint"), "{error}");
}

/// As [`model::Pairs`], without the bytes.
struct Fewer;

impl floodmark_state::Layout for Fewer {
    fn types(&self) -> Vec<floodmark_state::ColumnType> {
        vec![floodmark_state::ColumnType::Long]
    }

    fn schema(&self) -> arrow::datatypes::SchemaRef {
        Arc::new(model::Pairs.schema().project(&[0, 1, 2]).unwrap())
    }

    fn encode(
        &self,
        _: i64,
        _: &floodmark_state::Rows,
        _: &[u32],
    ) -> floodmark_snapshot::Result<arrow::record_batch::RecordBatch> {
        unreachable!("nothing is encoded")
    }

    fn decode(&self, _: &arrow::record_batch::RecordBatch) -> floodmark_snapshot::Result<floodmark_state::RowKeys> {
        unreachable!("nothing is decoded")
    }

    fn hashes(&self, keys: &[&[u8]]) -> floodmark_snapshot::Result<Vec<u64>> {
        model::Pairs.hashes(keys)
    }

    fn fill(
        &self,
        _: &arrow::record_batch::RecordBatch,
        _: &mut floodmark_state::Table,
        _: &[u32],
    ) -> floodmark_snapshot::Result<()> {
        unreachable!("nothing is filled")
    }
}
