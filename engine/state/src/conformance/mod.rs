//! The suite that every state back end passes: random work against a map, and what the contract promises, case by case.
//!
//! `keyed_state_suite!(|| Arc::new(MyBackend::new()))` in a test module makes a test of each. A failing random run says its
//! seed, which [`random_work`] takes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc, reason = "these are tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use floodmark_snapshot::{
    Clock, Disposition, Env, Epoch, KeyGroup, KeyGroupRange, Shard, ShardKind, TimestampMs,
    coordination::{Barrier, BarrierKind},
    manifest::ShardStatus,
};

pub use self::layout::SuiteLayout;
use self::layout::{Value, hash, key, read, write};
use crate::{
    Content, KeyGroupWatermarks, KeyedState, NO_SLOT, PendingShard, RestoredShard, StateBackend, StateSnapshot,
    StateSpec,
    shard::{Part, Reader},
};

mod layout;

/// Key groups of the suite's jobs.
const MAX_PARALLELISM: u16 = 16;

/// Makes the back end under test.
pub type Make<'a> = &'a dyn Fn() -> Arc<dyn StateBackend>;

/// What a state should hold: values by namespace and key.
pub type Model = BTreeMap<(i64, i64), Value>;

/// Makes tests of the suite for a back end: `keyed_state_suite!(make)` with `make: fn() -> Arc<dyn StateBackend>`.
#[macro_export]
macro_rules! keyed_state_suite {
    ($make:expr) => {
        $crate::keyed_state_suite!(@tests $make,
            rows_are_found_removed_and_made_again
            namespaces_are_in_order_and_go_as_a_whole
            a_page_shows_every_row_once
            a_snapshot_holds_the_rows_at_its_barrier
            restoring_any_completed_checkpoint_gives_its_rows
            an_aborted_checkpoint_is_never_named_again
            checkpoints_end_in_any_order
            removed_rows_and_dropped_namespaces_stay_away
            a_small_change_makes_a_small_checkpoint
            a_whole_snapshot_changes_no_lineage
            keys_move_when_the_parallelism_changes
            a_restored_job_goes_on_from_its_own_shards
            watermarks_come_back_by_key_group
            rows_are_used_while_others_still_arrive
            rows_go_out_of_sight_when_they_are_old
            old_rows_stay_old_through_a_restore
            columns_come_and_go
            states_of_one_operator_keep_apart
            timers_come_due_once_and_in_order
            damage_is_told
            whole_snapshots_go_to_the_heap_and_back
        );
        #[test]
        fn random_work() {
            for seed in 0..12 {
                $crate::conformance::random_work(&$make, seed);
            }
        }
    };
    (@tests $make:expr, $($name:ident)*) => {
        $(#[test]
        fn $name() {
            $crate::conformance::$name(&$make);
        })*
    };
}

/// A clock that stands still until told.
#[derive(Debug, Default)]
pub struct SetClock(AtomicI64);

impl Clock for SetClock {
    fn wall_ms(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }

    fn monotonic(&self) -> Duration {
        Duration::from_millis(self.wall_ms().unsigned_abs())
    }
}

/// A small, seeded generator.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// A job with one operator: its subtasks' states, and the storage of their shards.
struct Job {
    backend: Arc<dyn StateBackend>,
    clock: Arc<SetClock>,
    layout: SuiteLayout,
    ttl: Option<Duration>,
    name: String,
    states: Vec<Box<dyn KeyedState>>,
    files: BTreeMap<String, RestoredShard>,
    epoch: u64,
    /// How often it has been restored.
    restores: usize,
    /// By subtask; none where there is none.
    watermarks: Vec<KeyGroupWatermarks>,
}

/// A checkpoint of all subtasks.
struct Taken {
    epoch: Epoch,
    snapshots: Vec<StateSnapshot>,
    model: Model,
}

/// A checkpoint whose files are written.
#[derive(Clone, Debug)]
struct Stored {
    epoch: Epoch,
    shards: Vec<Shard>,
    uploaded: Vec<String>,
    model: Model,
}

impl Stored {
    fn fresh_bytes(&self) -> u64 {
        self.shards.iter().filter(|s| self.uploaded.contains(&s.path)).map(|s| s.size).sum()
    }
}

impl Job {
    fn new(make: Make<'_>) -> Self {
        let mut job = Self {
            backend: make(),
            clock: Arc::default(),
            layout: SuiteLayout::new(&["n", "t"]),
            ttl: None,
            name: String::new(),
            states: Vec::new(),
            files: BTreeMap::new(),
            epoch: 0,
            restores: 0,
            watermarks: Vec::new(),
        };
        job.begin(1);
        job
    }

    fn spec(&self, index: u32, parallelism: u32, reuse_restored: bool) -> StateSpec {
        let clock = self.clock.clone();
        StateSpec {
            name: self.name.clone(),
            layout: Arc::new(self.layout.clone()),
            subtask: index,
            key_groups: KeyGroupRange::of_subtask(index, parallelism, MAX_PARALLELISM),
            max_parallelism: MAX_PARALLELISM,
            ttl: self.ttl,
            reuse_restored,
            env: Env { clock, ..Env::system() },
        }
    }

    /// Empty states.
    fn begin(&mut self, parallelism: u32) {
        self.states.clear();
        for index in 0..parallelism {
            let state = self.backend.keyed(self.spec(index, parallelism, true)).unwrap();
            self.states.push(state);
        }
    }

    fn owner(&mut self, k: i64) -> &mut dyn KeyedState {
        let parallelism = self.states.len() as u32;
        let group = KeyGroup::of(hash(k), MAX_PARALLELISM);
        &mut *self.states[group.subtask(parallelism, MAX_PARALLELISM) as usize]
    }

    /// Writes values; answers which keys were new.
    fn write(&mut self, namespace: i64, values: &[(i64, Value)]) -> BTreeSet<i64> {
        let mut new = BTreeSet::new();
        let parallelism = self.states.len() as u32;
        for index in 0..parallelism {
            let range = KeyGroupRange::of_subtask(index, parallelism, MAX_PARALLELISM);
            let mine = |k: i64| range.contains(KeyGroup::of(hash(k), MAX_PARALLELISM));
            let values: Vec<(i64, Value)> = values.iter().filter(|(k, _)| mine(*k)).cloned().collect();
            if !values.is_empty() {
                new.extend(write(&mut *self.states[index as usize], &self.layout, namespace, &values));
            }
        }
        new
    }

    /// Removes keys; answers which there were.
    fn remove(&mut self, namespace: i64, keys: &[i64]) -> BTreeSet<i64> {
        let mut removed = BTreeSet::new();
        for k in keys {
            let state = self.owner(*k);
            let found = state.find(namespace, &[hash(*k)], &[&key(*k)]).unwrap();
            if found[0] != NO_SLOT {
                state.remove(namespace, &found).unwrap();
                removed.insert(*k);
            }
        }
        removed
    }

    fn drop_namespace(&mut self, namespace: i64) {
        self.states.iter_mut().for_each(|s| s.drop_namespace(namespace).unwrap());
    }

    fn contents(&mut self) -> Model {
        let mut all = Model::new();
        for state in &mut self.states {
            for (at, value) in read(&mut **state, &self.layout) {
                assert!(all.insert(at, value).is_none(), "key {at:?} is there twice");
            }
        }
        all
    }

    fn take(&mut self, whole: bool) -> Taken {
        self.epoch += 1;
        let model = self.contents();
        let barrier = Barrier { epoch: Epoch(self.epoch), kind: BarrierKind::Checkpoint, whole };
        let none = KeyGroupWatermarks::default();
        let watermarks = self.watermarks.iter().chain(std::iter::repeat(&none));
        let states = self.states.iter_mut().zip(watermarks);
        let snapshots = states.map(|(state, watermarks)| state.snapshot(&barrier, watermarks).unwrap()).collect();
        Taken { epoch: Epoch(self.epoch), snapshots, model }
    }

    /// Writes the files of a checkpoint.
    fn store(&mut self, taken: Taken) -> Stored {
        let Taken { epoch, snapshots, model } = taken;
        let mut stored = Stored { epoch, shards: Vec::new(), uploaded: Vec::new(), model };
        for (subtask, snapshot) in snapshots.into_iter().enumerate() {
            let StateSnapshot { reused, pending } = snapshot.expanded().unwrap();
            for shard in reused {
                assert!(self.files.contains_key(&shard.path), "{} is named again, and is not there", shard.path);
                assert_eq!(shard.status, ShardStatus::Reused, "{shard:?}");
                // What is named again is the subtask's own, whoever wrote it.
                stored.shards.push(Shard { subtask: subtask as u32, ..shard });
            }
            for (at, pending) in pending.into_iter().enumerate() {
                let PendingShard { kind, key_groups, rows, layer, name, encode, uploaded, .. } = pending;
                let path = format!("{epoch}-{subtask}-{at}");
                let bytes = encode().unwrap();
                let size = bytes.len() as u64;
                let subtask = subtask as u32;
                let shard = Shard { size, subtask, key_groups, rows, layer, name, ..Shard::new(&*path, kind) };
                uploaded.into_iter().for_each(|uploaded| uploaded(&shard));
                self.files.insert(path.clone(), RestoredShard::new(shard.clone(), bytes));
                stored.uploaded.push(path);
                stored.shards.push(shard);
            }
        }
        stored
    }

    fn complete(&mut self, stored: &Stored) {
        self.states.iter_mut().for_each(|s| s.completed(stored.epoch).unwrap());
    }

    fn abort(&mut self, stored: &Stored) {
        self.states.iter_mut().for_each(|s| s.aborted(stored.epoch).unwrap());
        stored.uploaded.iter().for_each(|path| drop(self.files.remove(path)));
    }

    /// A completed checkpoint of what there is.
    fn checkpoint(&mut self) -> Stored {
        let taken = self.take(false);
        let stored = self.store(taken);
        self.complete(&stored);
        stored
    }

    fn savepoint(&mut self) -> Stored {
        let taken = self.take(true);
        let stored = self.store(taken);
        assert!(stored.shards.iter().all(|s| s.kind == ShardKind::Keyed && s.layer == 0), "{:?}", stored.shards);
        assert_eq!(stored.shards.len(), stored.uploaded.len(), "a whole snapshot names nothing again");
        stored
    }

    /// Starts anew from a checkpoint.
    fn restore(&mut self, stored: &Stored, parallelism: u32, reuse: bool) -> Vec<KeyGroupWatermarks> {
        self.states.clear();
        self.restores += 1;
        let mut watermarks = Vec::new();
        for index in 0..parallelism {
            let spec = self.spec(index, parallelism, reuse);
            let mut state = self.backend.keyed(spec.clone()).unwrap();
            let concerns = |s: &&Shard| spec.holds(s) && s.key_groups.is_none_or(|g| g.overlaps(&spec.key_groups));
            let mut shards: Vec<&Shard> = stored.shards.iter().filter(concerns).collect();
            shards.sort_by_key(|s| (s.subtask, s.layer));
            let files =
                shards.iter().map(|s| RestoredShard::new((*s).clone(), self.files[&s.path].file().unwrap().clone()));
            let files: Vec<RestoredShard> = files.collect();
            // In all the ways in which shards may come: one by one, together, some and then the others.
            let (one_by_one, together) = files.split_at(files.len() * (self.restores % 3) / 2);
            one_by_one.iter().for_each(|file| state.restore(file).unwrap());
            state.restore_together(together).unwrap();
            watermarks.push(state.restored().unwrap());
            self.states.push(state);
        }
        watermarks
    }

    /// Starts anew from a checkpoint, a few key groups at a time; works on those that are there, and on `model`, in between.
    fn restore_in_slices(&mut self, stored: &Stored, parallelism: u32, random: &mut Random, model: &mut Model) {
        self.begin(parallelism);
        for index in 0..parallelism {
            let spec = self.spec(index, parallelism, true);
            let mut shards: Vec<&Shard> = stored.shards.iter().filter(|s| spec.holds(s)).collect();
            shards.retain(|s| s.key_groups.is_none_or(|g| g.overlaps(&spec.key_groups)));
            shards.sort_by_key(|s| (s.subtask, s.layer));
            let (mut first, last) = (spec.key_groups.first.0, spec.key_groups.last.0);
            while first <= last {
                let slice = KeyGroupRange {
                    first: KeyGroup(first),
                    last: KeyGroup((first + random.below(4) as u16).min(last)),
                };
                first = slice.last.0 + 1;
                let mut part = |shard: &&Shard| {
                    let whole = self.files[&shard.path].file().unwrap();
                    let content = match random.below(3) {
                        0 => Content::File(whole.clone()),
                        _ => Content::Part(part_of(whole, slice)),
                    };
                    RestoredShard { slice: Some(slice), ..RestoredShard::of((*shard).clone(), content) }
                };
                let parts: Vec<RestoredShard> = shards.iter().map(&mut part).collect();
                match random.below(3) {
                    0 => parts.iter().for_each(|part| self.states[index as usize].restore(part).unwrap()),
                    _ => self.states[index as usize].restore_together(&parts).unwrap(),
                }
                if first <= last {
                    let watermarks = self.states[index as usize].arrived().unwrap();
                    let known = watermarks.of(slice.last);
                    assert!(shards.iter().all(|s| !s.key_groups.unwrap().contains(slice.last) || known.is_some()));
                    self.work_on(spec.key_groups.first.0..first, random, model);
                }
            }
            self.states[index as usize].restored().unwrap();
        }
    }

    /// Reads, writes and removes some rows of these key groups.
    fn work_on(&mut self, groups: std::ops::Range<u16>, random: &mut Random, model: &mut Model) {
        let there = |k: &i64| groups.contains(&KeyGroup::of(hash(*k), MAX_PARALLELISM).0);
        for namespace in 0..2 {
            let some = |random: &mut Random| -> BTreeSet<i64> {
                (0..40).map(|_| random.below(1700) as i64).filter(there).collect()
            };
            let written: Vec<(i64, Value)> =
                some(random).into_iter().map(|k| (k, value(random.below(1000) as i64))).collect();
            let new: BTreeSet<i64> =
                written.iter().map(|(k, _)| *k).filter(|k| !model.contains_key(&(namespace, *k))).collect();
            assert_eq!(self.write(namespace, &written), new);
            model.extend(written.into_iter().map(|(k, v)| ((namespace, k), v)));
            let removed: Vec<i64> = some(random).into_iter().collect();
            let had = removed.iter().copied().filter(|k| model.contains_key(&(namespace, *k))).collect();
            assert_eq!(self.remove(namespace, &removed), had);
            removed.iter().for_each(|k| drop(model.remove(&(namespace, *k))));
        }
    }

    /// What a fresh job would start from the checkpoint with.
    fn restored(&mut self, stored: &Stored, parallelism: u32) -> Model {
        self.restores += 1;
        let mut other = Self {
            backend: self.backend.clone(),
            clock: self.clock.clone(),
            layout: self.layout.clone(),
            name: self.name.clone(),
            files: self.files.clone(),
            states: Vec::new(),
            watermarks: Vec::new(),
            ..*self
        };
        other.restore(stored, parallelism, false);
        other.contents()
    }
}

/// A part of a neutral file with at least the rows of these key groups.
fn part_of(file: &Bytes, key_groups: KeyGroupRange) -> Part {
    let reader = Arc::new(Reader::whole(file).unwrap());
    let bytes = |(block, at): (usize, std::ops::Range<u64>)| (block, file.slice(at.start as usize..at.end as usize));
    let blocks: Vec<(usize, Bytes)> = reader.ranges(key_groups).into_iter().map(bytes).collect();
    reader.part(&blocks).unwrap()
}

fn value(n: i64) -> Value {
    Value { n: Some(n), t: (n % 3 != 0).then(|| format!("text {n}")) }
}

fn values(range: std::ops::Range<i64>) -> Vec<(i64, Value)> {
    range.map(|k| (k, value(k))).collect()
}

fn keys(set: &BTreeSet<i64>) -> Vec<i64> {
    set.iter().copied().collect()
}

/// New keys are told; a removed key is not found, and new when it comes again.
pub fn rows_are_found_removed_and_made_again(make: Make<'_>) {
    let mut job = Job::new(make);
    assert_eq!(keys(&job.write(0, &values(0..10))), (0..10).collect::<Vec<_>>());
    assert_eq!(keys(&job.write(0, &values(5..12))), [10, 11]);
    assert_eq!(keys(&job.remove(0, &[3, 4, 99])), [3, 4]);
    let found = job.owner(3).find(0, &[hash(3)], &[&key(3)]).unwrap();
    assert_eq!(found, [NO_SLOT]);
    assert!(job.contents().contains_key(&(0, 5)) && !job.contents().contains_key(&(0, 3)));
    let twice = [(3, value(1)), (3, value(2))];
    assert_eq!(keys(&job.write(0, &twice)), [3]);
    assert_eq!(job.contents()[&(0, 3)], value(2));
    assert_eq!(job.states[0].size().0, 11);
}

/// The least first, ranges in order, empty ones not there.
pub fn namespaces_are_in_order_and_go_as_a_whole(make: Make<'_>) {
    let mut job = Job::new(make);
    for namespace in [30, -5, 10, i64::MAX] {
        job.write(namespace, &values(0..3));
    }
    assert_eq!(job.states[0].first_namespace(), Some(-5));
    assert_eq!(job.states[0].namespaces(-5..=29), [-5, 10]);
    assert_eq!(job.states[0].namespaces(11..=29), [0_i64; 0]);
    job.drop_namespace(-5);
    job.remove(10, &[0, 1, 2]);
    assert_eq!(job.states[0].namespaces(i64::MIN..=i64::MAX), [30, i64::MAX]);
    assert_eq!(job.states[0].first_namespace(), Some(30));
    job.write(-5, &values(7..8));
    assert_eq!(job.contents().keys().filter(|(n, _)| *n == -5).count(), 1, "nothing of the earlier one");
}

/// Pages of a large namespace have each row once.
pub fn a_page_shows_every_row_once(make: Make<'_>) {
    let mut job = Job::new(make);
    job.write(0, &values(0..30_000));
    job.remove(0, &(0..30_000).step_by(3).collect::<Vec<_>>());
    let (mut pages, mut rows) = (0, 0);
    job.states[0]
        .scan(0, &mut |_, slots| {
            pages += 1;
            rows += slots.len();
            assert!(slots.len() <= 1 << 16, "a page has a bound");
            Ok(())
        })
        .unwrap();
    assert_eq!((rows, job.contents().len()), (20_000, 20_000));
    assert!(pages > 0);
}

/// Whatever is written between the barrier and the upload.
pub fn a_snapshot_holds_the_rows_at_its_barrier(make: Make<'_>) {
    let mut job = Job::new(make);
    job.write(0, &values(0..5000));
    job.write(7, &values(0..100));
    let taken = job.take(false);
    job.write(0, &(0..5000).map(|k| (k, value(-k))).collect::<Vec<_>>());
    job.remove(0, &(0..1000).collect::<Vec<_>>());
    job.drop_namespace(7);
    let stored = job.store(taken);
    job.complete(&stored);
    assert_eq!(stored.model.len(), 5100);
    assert_eq!(job.restored(&stored, 1), stored.model);
}

/// Also of those that are not the newest.
pub fn restoring_any_completed_checkpoint_gives_its_rows(make: Make<'_>) {
    let mut job = Job::new(make);
    let mut all = Vec::new();
    for round in 0..40_i64 {
        job.write(round % 3, &(0..50).map(|k| (k * 7 % 90 + round, value(round * 1000 + k))).collect::<Vec<_>>());
        job.remove(round % 3, &[round, round + 1]);
        if round % 11 == 10 {
            job.drop_namespace(1);
        }
        all.push(job.checkpoint());
    }
    for stored in &all {
        assert_eq!(job.restored(stored, 1), stored.model, "epoch {}", stored.epoch);
    }
}

/// Its changes are in the next one all the same.
pub fn an_aborted_checkpoint_is_never_named_again(make: Make<'_>) {
    let mut job = Job::new(make);
    job.write(0, &values(0..3000));
    job.checkpoint();
    for round in 0..5 {
        job.write(0, &[(round, value(round + 100)), (5000 + round, value(1))]);
        job.remove(0, &[2000 + round]);
        let taken = job.take(false);
        let stored = job.store(taken);
        job.abort(&stored);
    }
    let stored = job.checkpoint();
    assert_eq!(job.restored(&stored, 1), stored.model);
}

/// Several are under way at once.
pub fn checkpoints_end_in_any_order(make: Make<'_>) {
    let mut job = Job::new(make);
    job.write(0, &values(0..2000));
    job.checkpoint();
    let mut under_way = Vec::new();
    for round in 0..4 {
        job.write(0, &[(round, value(round + 100)), (5000 + round, value(1))]);
        job.remove(0, &[1000 + round]);
        under_way.push(job.take(false));
    }
    let mut stored: Vec<Stored> = [2, 0, 1, 0].map(|at| under_way.remove(at)).map(|taken| job.store(taken)).into();
    let aborted = stored.remove(1);
    job.abort(&aborted);
    for one in &stored {
        job.complete(one);
    }
    for one in stored.iter().chain([&job.checkpoint()]) {
        assert_eq!(job.restored(one, 1), one.model, "epoch {}", one.epoch);
    }
}

/// Not even after many checkpoints, and also if the namespace comes again.
pub fn removed_rows_and_dropped_namespaces_stay_away(make: Make<'_>) {
    let mut job = Job::new(make);
    job.write(0, &values(0..4000));
    job.write(1, &values(0..4000));
    job.checkpoint();
    job.remove(0, &(0..100).collect::<Vec<_>>());
    job.drop_namespace(1);
    job.write(1, &values(10..20));
    job.checkpoint();
    for round in 0..40 {
        job.write(0, &[(200 + round, value(round))]);
        let stored = job.checkpoint();
        let restored = job.restored(&stored, 1);
        assert_eq!(restored.len(), 3910, "epoch {}", stored.epoch);
        assert_eq!(restored, stored.model);
    }
}

/// What is written is in proportion to what has changed.
pub fn a_small_change_makes_a_small_checkpoint(make: Make<'_>) {
    let mut job = Job::new(make);
    let text = "sixty-four bytes of text that does not change much, over and ove";
    let row = |k: i64| (k, Value { n: Some(k), t: Some(format!("{text}{k}")) });
    job.write(0, &(0..50_000).map(row).collect::<Vec<_>>());
    let whole = job.checkpoint().fresh_bytes();
    job.write(0, &(0..500).map(|k| row(k * 97 % 50_000)).collect::<Vec<_>>());
    let small = job.checkpoint();
    assert!(small.fresh_bytes() < whole / 10, "{} bytes for 1 % of {whole}", small.fresh_bytes());
    assert_eq!(job.restored(&small, 1), small.model);
}

/// Checkpoints after it build on those before it.
pub fn a_whole_snapshot_changes_no_lineage(make: Make<'_>) {
    let mut job = Job::new(make);
    job.write(0, &values(0..5000));
    job.checkpoint();
    job.write(0, &[(1, value(11)), (6000, value(1))]);
    job.remove(0, &[7]);
    let savepoint = job.savepoint();
    assert_eq!(job.restored(&savepoint, 1), savepoint.model);
    // Its files may be moved away.
    savepoint.uploaded.iter().for_each(|path| drop(job.files.remove(path)));
    job.write(0, &[(2, value(12))]);
    let stored = job.checkpoint();
    assert_eq!(job.restored(&stored, 1), stored.model);
    job.complete(&savepoint);
    let stored = job.checkpoint();
    assert_eq!(job.restored(&stored, 1), stored.model);
}

/// 1 -> 3 -> 2, from checkpoints of several layers, and from savepoints.
pub fn keys_move_when_the_parallelism_changes(make: Make<'_>) {
    for whole in [false, true] {
        let mut job = Job::new(make);
        job.write(0, &values(0..2000));
        job.write(5, &values(100..200));
        for parallelism in [3, 2, 1, 4] {
            job.checkpoint();
            job.write(0, &[(i64::from(parallelism), value(-1)), (3000 + i64::from(parallelism), value(1))]);
            job.remove(0, &[500 + i64::from(parallelism)]);
            let stored = if whole { job.savepoint() } else { job.checkpoint() };
            job.restore(&stored, parallelism, true);
            assert_eq!(job.contents(), stored.model, "at {parallelism}");
        }
    }
}

/// Its first checkpoint is small already, and nothing comes back.
pub fn a_restored_job_goes_on_from_its_own_shards(make: Make<'_>) {
    let mut job = Job::new(make);
    job.write(0, &values(0..20_000));
    let whole = job.checkpoint().fresh_bytes();
    job.remove(0, &[1, 2, 3]);
    job.write(9, &values(0..10));
    job.checkpoint();
    job.drop_namespace(9);
    let stored = job.checkpoint();
    job.restore(&stored, 1, true);
    job.write(0, &[(5, value(55))]);
    let first = job.checkpoint();
    assert!(first.fresh_bytes() < whole / 4, "{} of {whole} bytes", first.fresh_bytes());
    for round in 0..40 {
        job.write(0, &[(round + 10, value(1))]);
        let stored = job.checkpoint();
        assert_eq!(job.restored(&stored, 2), stored.model, "epoch {}", stored.epoch);
    }
    // Shards of somebody else are never named.
    let stored = job.checkpoint();
    job.restore(&stored, 1, false);
    let stored = job.checkpoint();
    assert_eq!(stored.shards.len(), stored.uploaded.len());
    assert_eq!(job.restored(&stored, 1), stored.model);
}

/// When key groups move, the first checkpoint is small, too, and goes on from the parts of the files that have them. For back ends
/// that can do that.
pub fn key_groups_that_move_are_named_again(make: Make<'_>) {
    let mut job = Job::new(make);
    job.write(0, &values(0..6_000));
    job.write(3, &values(0..500));
    let whole = job.checkpoint().fresh_bytes();
    let mut stored = job.checkpoint();
    for (round, parallelism) in [2, 4, 3, 2, 4, 1, 3, 5, 1].into_iter().enumerate() {
        job.restore(&stored, parallelism, true);
        // Those that nothing was written to in between, too.
        if round % 3 > 0 {
            let round = round as i64;
            job.write(0, &(0..20).map(|k| (k * 270 + round, value(-round))).collect::<Vec<_>>());
            job.remove(0, &(0..20).map(|k| k * 240 + round).collect::<Vec<_>>());
        }
        for _ in 0..2 {
            stored = job.checkpoint();
            assert!(stored.fresh_bytes() < whole / 4, "-> {parallelism}: {} of {whole} bytes", stored.fresh_bytes());
            for other in [1, 2 + round as u32 % 3] {
                assert_eq!(job.restored(&stored, other), stored.model, "-> {parallelism} -> {other}");
            }
            let own: u64 = stored.shards.iter().map(Shard::own_size).sum();
            assert!(own < whole * 3, "-> {parallelism}: it has {own} bytes, all are {whole}");
            job.write(0, &[(7, value(7))]);
        }
    }
    // In the end so much has changed, and so many files are named, that all is written anew.
    let named = (0..60).map(|round| {
        job.write(0, &values(round * 90..round * 90 + 600));
        let stored = job.checkpoint();
        assert_eq!(job.restored(&stored, 2), stored.model, "round {round}");
        stored.shards.iter().filter(|s| s.cut_from.is_some()).count()
    });
    assert_eq!(named.last(), Some(0), "files from before the moves are named for ever");
    // What was cut is whole again when its key groups have come together.
    let stored = job.checkpoint();
    job.restore(&stored, 4, true);
    let cut = job.checkpoint();
    assert!(cut.shards.iter().any(|s| s.cut_from.is_some()));
    job.restore(&cut, 2, true);
    let halves = job.checkpoint();
    job.restore(&halves, 1, true);
    let together = job.checkpoint();
    let of = |stored: &Stored| stored.shards.iter().map(|s| (s.layer, s.path.clone())).collect::<BTreeSet<_>>();
    assert!(of(&together).is_superset(&of(&stored)), "{:?}", together.shards);
    let still = together.shards.iter().filter(|s| of(&stored).contains(&(s.layer, s.path.clone())));
    assert!(still.clone().all(|s| s.cut_from.is_none()), "{:?}", together.shards);
    assert_eq!(still.count(), stored.shards.len(), "each of them is there once");
    // Two subtasks' key groups come together, and no row changes: what each knew of event time is known still.
    let stored = job.checkpoint();
    job.restore(&stored, 2, true);
    job.watermarks = vec![KeyGroupWatermarks::from(100), KeyGroupWatermarks::from(200)];
    let mut stored = job.checkpoint();
    for _ in 0..3 {
        job.watermarks = job.restore(&stored, 1, true);
        let of = |group| job.watermarks[0].of(KeyGroup(group));
        assert_eq!((of(0), of(MAX_PARALLELISM - 1)), (Some(100), Some(200)));
        stored = job.checkpoint();
    }
}

/// Those of the last layer of each earlier subtask, whether or not rows changed; also of one restored just now.
pub fn watermarks_come_back_by_key_group(make: Make<'_>) {
    let mut job = Job::new(make);
    job.begin(2);
    job.write(0, &values(0..100));
    for said in [[None, None], [Some(10), None], [Some(30), Some(20)], [Some(15), Some(20)], [Some(20), Some(20)]] {
        job.watermarks = said.map(KeyGroupWatermarks::from).into();
        for stored in [job.checkpoint(), job.savepoint()] {
            for parallelism in [1, 2, 3] {
                let mut other = Job::new(make);
                (other.files, other.epoch) = (job.files.clone(), job.epoch);
                other.watermarks = other.restore(&stored, parallelism, true);
                check_watermarks(&other.watermarks, said);
                let again = other.checkpoint();
                other.watermarks = other.restore(&again, 2, false);
                check_watermarks(&other.watermarks, said);
            }
        }
    }
}

/// Key groups have what the one of two earlier subtasks said that owned them.
fn check_watermarks(of_subtasks: &[KeyGroupWatermarks], said: [Option<TimestampMs>; 2]) {
    let parallelism = of_subtasks.len() as u32;
    for (index, watermarks) in (0..).zip(of_subtasks) {
        let owned = KeyGroupRange::of_subtask(index, parallelism, MAX_PARALLELISM);
        let expected = |g: u16| said[KeyGroup(g).subtask(2, MAX_PARALLELISM) as usize];
        for group in owned.first.0..=owned.last.0 {
            let at = format!("key group {group} of subtask {index} of {parallelism}, {said:?}");
            assert_eq!(watermarks.of(KeyGroup(group)), expected(group), "{at}");
        }
        let all: BTreeSet<_> = (owned.first.0..=owned.last.0).map(expected).collect();
        assert_eq!((watermarks.is_even(), watermarks.min()), (all.len() == 1, *all.first().unwrap()), "{said:?}");
    }
}

/// A back end that restores key group by key group: rows of the key groups that are there are read, written and removed, and
/// the next checkpoints know it.
pub fn rows_are_used_while_others_still_arrive(make: Make<'_>) {
    let mut random = Random(11);
    for round in 0..24 {
        let mut job = Job::new(make);
        job.begin(1 + round % 2);
        if !job.states[0].restores_by_key_group() {
            return;
        }
        let of_subtask = |at: i64| KeyGroupWatermarks::from(100 + at);
        job.watermarks = (0..2).map(of_subtask).collect();
        job.write(0, &values(0..1500));
        job.write(1, &values(0..300));
        job.checkpoint();
        job.write(0, &(0..1500).step_by(7).map(|k| (k, value(k + 10_000))).collect::<Vec<_>>());
        job.remove(0, &(0..1500).step_by(11).collect::<Vec<_>>());
        job.drop_namespace(1);
        job.checkpoint();
        job.write(1, &values(100..200));
        job.write(0, &values(1400..1600));
        job.remove(1, &[150]);
        let mut stored = job.checkpoint();
        // Files of the back end's own come as a whole.
        let neutral = stored.shards.iter().all(|s| s.kind == ShardKind::Keyed);
        if round % 5 == 4 || !neutral {
            stored = job.savepoint();
        }
        let parallelism = 1 + (round / 2) % 3;
        let mut model = stored.model.clone();
        job.restore_in_slices(&stored, parallelism, &mut random, &mut model);
        assert_eq!(job.contents(), model, "round {round}");
        for change in 0..3 {
            job.write(0, &[(change, value(5)), (7000 + change, value(6))]);
            job.remove(0, &[1000 + change]);
            let next = job.checkpoint();
            let named: BTreeSet<(u32, &str)> = next.shards.iter().map(|s| (s.subtask, &*s.path)).collect();
            assert_eq!(named.len(), next.shards.len(), "no subtask names a shard twice: {:?}", next.shards);
            // Of two subtasks' layers one has dropped a namespace: not so the other's, on which the same subtask can't build.
            let together = (1 + round % 2, parallelism) == (2, 1) && round % 5 != 4;
            let again = next.uploaded.len() < next.shards.len();
            assert!(!neutral || again == (!together || change > 0), "round {round}: {:?}", next.shards);
            assert_eq!(job.restored(&next, 1 + round % 3), next.model, "round {round}");
        }
    }
}

/// Not read, not scanned, new when written; and in the end removed.
pub fn rows_go_out_of_sight_when_they_are_old(make: Make<'_>) {
    let mut job = Job::new(make);
    job.ttl = Some(Duration::from_millis(100));
    job.begin(1);
    job.write(0, &values(0..100));
    job.clock.0.store(60, Ordering::Relaxed);
    assert!(job.write(0, &values(0..50)).is_empty());
    job.clock.0.store(130, Ordering::Relaxed);
    assert_eq!(job.contents().len(), 50);
    assert_eq!(job.owner(70).find(0, &[hash(70)], &[&key(70)]).unwrap(), [NO_SLOT]);
    let row = [(70, Value { n: Some(1), t: None })];
    assert_eq!(keys(&job.write(0, &row)), [70]);
    assert_eq!(job.contents()[&(0, 70)], row[0].1);
    job.clock.0.store(1000, Ordering::Relaxed);
    assert_eq!(job.contents().len(), 0);
    for round in 0..200 {
        job.write(0, &[(10_000 + round % 3, value(1))]);
    }
    assert_eq!(job.contents().len(), 3);
    assert!(job.states[0].size().0 < 20, "{} rows are kept for 3", job.states[0].size().0);
}

/// The time of the last write travels with the row.
pub fn old_rows_stay_old_through_a_restore(make: Make<'_>) {
    let mut job = Job::new(make);
    job.ttl = Some(Duration::from_millis(100));
    job.begin(1);
    job.write(0, &values(0..100));
    job.checkpoint();
    job.clock.0.store(60, Ordering::Relaxed);
    job.write(0, &values(0..50));
    for whole in [false, true] {
        let stored = if whole { job.savepoint() } else { job.checkpoint() };
        for (now, rows, parallelism) in [(90, 100, 1), (130, 50, 3), (161, 0, 2)] {
            job.clock.0.store(now, Ordering::Relaxed);
            assert_eq!(job.restored(&stored, parallelism).len(), rows, "at {now}");
        }
        job.clock.0.store(60, Ordering::Relaxed);
    }
}

/// A new column begins empty, one that is gone is passed over, and does not come back.
pub fn columns_come_and_go(make: Make<'_>) {
    let mut job = Job::new(make);
    job.write(0, &values(0..100));
    job.checkpoint();
    job.write(0, &[(1, value(2))]);
    // A checkpoint of one's own back end may be of its own form: it is the savepoint that must be neutral.
    let stored = job.savepoint();
    job.layout = SuiteLayout::new(&["t"]);
    job.restore(&stored, 1, true);
    let expected = |of: &Model| of.iter().map(|(k, v)| (*k, Value { n: None, t: v.t.clone() })).collect::<Model>();
    assert_eq!(job.contents(), expected(&stored.model));
    job.write(0, &[(1, Value { n: None, t: Some("new".into()) })]);
    let stored = job.checkpoint();
    let stored = if stored.shards.iter().all(|s| s.kind == ShardKind::Keyed) { stored } else { job.savepoint() };
    job.layout = SuiteLayout::new(&["t", "n"]);
    job.restore(&stored, 2, true);
    assert_eq!(job.contents(), stored.model);
}

/// By their names.
pub fn states_of_one_operator_keep_apart(make: Make<'_>) {
    let mut job = Job::new(make);
    let stored: Vec<Stored> = ["left", "right"]
        .into_iter()
        .map(|name| {
            job.name = name.to_owned();
            job.begin(1);
            job.write(0, &values(0..name.len() as i64));
            job.checkpoint()
        })
        .collect();
    let shards = stored.iter().flat_map(|s| s.shards.clone()).collect();
    for (name, one) in ["left", "right"].into_iter().zip(&stored) {
        job.name = name.to_owned();
        let both = Stored { shards: Vec::clone(&shards), ..one.clone() };
        assert_eq!(job.restored(&both, 1), one.model);
    }
    let spec = job.spec(0, 1, false);
    assert!(stored[0].shards.iter().all(|s| !spec.holds(s)) && stored[1].shards.iter().all(|s| spec.holds(s)));
}

/// Also those that come to another subtask; not those cancelled.
pub fn timers_come_due_once_and_in_order(make: Make<'_>) {
    let mut job = Job::new(make);
    job.layout = SuiteLayout::new(&[]);
    job.begin(1);
    let mut timers = crate::Timers::new(job.states.remove(0));
    let mut random = Random(3);
    let mut expected: BTreeSet<(i64, i64)> = BTreeSet::new();
    for k in 0..500 {
        let time = random.below(40) as i64 * 100 - 1000;
        timers.set(time, &[hash(k), hash(k)], &[&key(k), &key(k)]).unwrap();
        expected.insert((time, k));
        if k % 5 == 0 {
            timers.cancel(time, &[hash(k), hash(k + 1)], &[&key(k), &key(k + 1)]).unwrap();
            expected.remove(&(time, k));
        }
    }
    let fire = |timers: &mut crate::Timers, now: i64| {
        let mut fired = Vec::new();
        while let Some((time, keys)) = timers.due(now).unwrap() {
            fired.extend((0..keys.len()).map(|row| (time, layout::number(keys.key(row)).unwrap())));
        }
        assert!(fired.is_sorted_by_key(|(time, _)| *time));
        fired
    };
    assert_eq!(timers.next(), expected.first().map(|(time, _)| *time));
    let mut fired = fire(&mut timers, 0);
    assert!(fired.iter().all(|(time, _)| *time <= 0) && !fired.is_empty());
    let snapshot = timers.state().snapshot(&Barrier::checkpoint(Epoch(1)), &KeyGroupWatermarks::default()).unwrap();
    let stored = job.store(Taken { epoch: Epoch(1), snapshots: vec![snapshot], model: Model::new() });
    job.restore(&stored, 3, true);
    for state in std::mem::take(&mut job.states) {
        let mut timers = crate::Timers::new(state);
        fired.extend(fire(&mut timers, 1000));
        fired.extend(fire(&mut timers, i64::MAX));
        assert_eq!(timers.next(), None);
    }
    assert_eq!(fired.len(), expected.len(), "each once");
    assert_eq!(fired.into_iter().collect::<BTreeSet<_>>(), expected);
}

/// A byte changed or cut off in any file of a whole snapshot: `Corrupt`, and no panic.
pub fn damage_is_told(make: Make<'_>) {
    let mut job = Job::new(make);
    job.write(0, &values(0..60));
    let stored = job.savepoint();
    for shard in &stored.shards {
        let good = job.files[&shard.path].file().unwrap().clone();
        // The first bytes say what kind of file it is; who opened it by its name needs them not.
        for at in (11..good.len()).step_by(3) {
            let mut flipped = good.to_vec();
            flipped[at] ^= 0x20;
            for bytes in [flipped.into(), good.slice(..at)] {
                let mut state = job.backend.keyed(job.spec(0, 1, false)).unwrap();
                let error = state.restore(&RestoredShard::new(shard.clone(), bytes)).unwrap_err();
                assert_eq!(error.disposition(), Disposition::Corrupt, "byte {at}: {error}");
            }
        }
    }
}

/// Neutral means neutral.
pub fn whole_snapshots_go_to_the_heap_and_back(make: Make<'_>) {
    let mut job = Job::new(make);
    job.begin(2);
    job.write(0, &values(0..3000));
    job.write(-7, &values(5..10));
    let stored = job.savepoint();
    let ours = job.backend.clone();
    job.backend = Arc::new(crate::Heap);
    job.restore(&stored, 3, true);
    assert_eq!(job.contents(), stored.model);
    job.write(0, &[(1, value(100))]);
    let stored = job.savepoint();
    job.backend = ours;
    job.restore(&stored, 1, true);
    assert_eq!(job.contents(), stored.model);
    let stored = job.checkpoint();
    assert_eq!(job.restored(&stored, 1), stored.model);
}

/// Random work, checkpoints that end in any order or not at all, crashes, rescales; against a map.
pub fn random_work(make: Make<'_>, seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1);
    let mut job = Job::new(make);
    let mut model = Model::new();
    let mut taken: Vec<Taken> = Vec::new();
    let mut stored: Vec<Stored> = Vec::new();
    let mut completed: Vec<Stored> = Vec::new();
    for step in 0..300 {
        let said = format!("seed {seed}, step {step}");
        let namespace = random.below(3) as i64 - 1;
        match random.below(20) {
            0..8 => {
                let count = 1 + random.below(120);
                let batch: Vec<(i64, Value)> =
                    (0..count).map(|_| (random.below(700) as i64, value(random.below(1 << 20) as i64))).collect();
                let new = job.write(namespace, &batch);
                let there = |k: &i64| model.contains_key(&(namespace, *k));
                let expected: BTreeSet<i64> = batch.iter().map(|(k, _)| *k).filter(|k| !there(k)).collect();
                assert_eq!(new, expected, "{said}");
                model.extend(batch.into_iter().map(|(k, v)| ((namespace, k), v)));
            }
            8 | 9 => {
                let keys: BTreeSet<i64> = (0..random.below(60)).map(|_| random.below(700) as i64).collect();
                let there = |k: &i64| model.contains_key(&(namespace, *k));
                let expected: BTreeSet<i64> = keys.iter().copied().filter(there).collect();
                assert_eq!(job.remove(namespace, &keys.into_iter().collect::<Vec<_>>()), expected, "{said}");
                model.retain(|(n, k), _| *n != namespace || !expected.contains(k));
            }
            10 => {
                job.drop_namespace(namespace);
                model.retain(|(n, _), _| *n != namespace);
            }
            11..14 if taken.len() < 3 => taken.push(job.take(false)),
            14 => {
                let savepoint = job.savepoint();
                let parallelism = 1 + random.below(3) as u32;
                assert_eq!(job.restored(&savepoint, parallelism), savepoint.model, "{said}");
            }
            15 | 16 if !taken.is_empty() => {
                let one = taken.swap_remove(random.below(taken.len() as u64) as usize);
                stored.push(job.store(one));
            }
            17 if !stored.is_empty() => {
                let one = stored.swap_remove(random.below(stored.len() as u64) as usize);
                if random.below(3) == 0 {
                    job.abort(&one);
                } else {
                    job.complete(&one);
                    assert_eq!(job.restored(&one, 1 + random.below(2) as u32), one.model, "{said}");
                    completed.push(one);
                }
            }
            18 if random.below(3) == 0 && !completed.is_empty() => {
                // A crash: back to the newest that is complete, at any parallelism.
                let newest = completed.iter().max_by_key(|c| c.epoch).cloned().unwrap();
                taken.clear();
                for one in std::mem::take(&mut stored) {
                    one.uploaded.iter().for_each(|path| drop(job.files.remove(path)));
                }
                let parallelism = 1 + random.below(3) as u32;
                job.restore(&newest, parallelism, random.below(4) > 0);
                model = newest.model.clone();
                completed = vec![newest];
            }
            _ => assert_eq!(job.contents(), model, "{said}"),
        }
    }
    assert_eq!(job.contents(), model, "seed {seed}");
}
