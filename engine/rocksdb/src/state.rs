//! Keyed state: a write-back cache of rows over a database.
//!
//! Rows that are wanted are brought into tables in memory ([`crate::space`]); what is changed there is handed over to the
//! database's thread when its room is needed ([`crate::eviction`]) and at a barrier ([`crate::checkpoint`]). The task's thread
//! never writes. Invariant: a row is in memory, or the database has it as it is; nothing leaves memory before that.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    sync::{Arc, Mutex},
};

use floodmark_snapshot::{Epoch, KeyGroup, Result, coordination::Barrier};
use floodmark_state::{
    Column, ColumnType, KeyGroupWatermarks, KeyedState, NO_SLOT, RestoredShard, Rows, Slots, StateSnapshot, StateSpec,
    Table,
};

use crate::{
    Process, Share, checkpoint,
    database::{Database, Strings},
    eviction::Clock,
    key,
    lineage::Lineage,
    neutral::not_ours,
    outgoing::Outgoing,
    restoring::Restoring,
    row::Form,
    space::{Cache, Space},
    stored::{self, Stored},
};

/// Rows of a page of a scan.
const PAGE_ROWS: usize = 4096;
/// Rows of a dropped namespace that are removed one by one if all of them are in memory; more go by ranges.
const SINGLE_REMOVALS_MAX: u64 = 4096;

/// See the header of this file.
pub(crate) struct State {
    pub(crate) spec: StateSpec,
    pub(crate) form: Form,
    pub(crate) process: Arc<Process>,
    pub(crate) share: Share,
    pub(crate) database: Database,
    pub(crate) lineage: Arc<Mutex<Lineage>>,
    pub(crate) spaces: BTreeMap<i64, Space>,
    pub(crate) outgoing: Outgoing,
    pub(crate) clock: Clock,
    /// About how many bytes all spaces take in memory.
    pub(crate) cached_bytes: usize,
    /// The last job that holds on to rows in tables.
    pub(crate) frozen: u64,
    pub(crate) restoring: Restoring,
    /// What a namespace without rows shows.
    nothing: Table,
    keys: Strings,
    order: Vec<u32>,
}

impl State {
    pub(crate) fn new(spec: StateSpec, process: Arc<Process>) -> Result<Self> {
        let form = Form { types: spec.layout.types(), timed: spec.ttl.is_some() };
        let folder = process.database_folder(&spec)?;
        let database = Database::new(process.clone(), spec.subtask.to_string(), folder);
        Ok(Self {
            nothing: Table::new(form.types.clone()),
            form,
            share: process.share(),
            process,
            database,
            lineage: Arc::default(),
            spaces: BTreeMap::new(),
            outgoing: Outgoing::default(),
            clock: Clock::default(),
            cached_bytes: 0,
            frozen: 0,
            restoring: Restoring::default(),
            keys: Strings::default(),
            order: Vec::new(),
            spec,
        })
    }

    /// The wall clock, if rows have a time to live.
    pub(crate) fn now(&self) -> i64 {
        if self.form.timed { self.spec.env.clock.wall_ms() } else { 0 }
    }

    /// Whether a row that was written then is not to be seen any more.
    pub(crate) fn expired(&self, written: i64, now: i64) -> bool {
        self.spec.ttl.is_some_and(|ttl| now.saturating_sub(written) > ttl.as_millis() as i64)
    }

    pub(crate) fn group(&self, hash: u64) -> KeyGroup {
        KeyGroup::of(hash, self.spec.max_parallelism)
    }

    /// The key groups of this subtask.
    pub(crate) fn groups(&self) -> impl Iterator<Item = KeyGroup> + use<> {
        let range = self.spec.key_groups;
        (range.first.0..=range.last.0).map(KeyGroup)
    }

    /// Counts a space anew.
    pub(crate) fn account(&mut self, namespace: i64) {
        let Some(space) = self.spaces.get_mut(&namespace) else { return };
        if let Some(cache) = space.cache.as_mut().filter(|c| c.needs_measure()) {
            cache.measure();
        }
        if space.cache.as_ref().is_some_and(|c| c.is_empty()) {
            space.cache = None;
        }
        let bytes = space.bytes();
        self.cached_bytes = (self.cached_bytes + bytes).saturating_sub(space.counted);
        space.counted = bytes;
        if space.rows() == 0 {
            self.forget(namespace);
        }
    }

    fn forget(&mut self, namespace: i64) -> Option<Space> {
        let space = self.spaces.remove(&namespace)?;
        self.cached_bytes = self.cached_bytes.saturating_sub(space.counted);
        Some(space)
    }

    /// What comes first in every call: slots that were handed out may become void now.
    /// The call is about so many keys.
    fn begin(&mut self, keys: usize) -> Result<()> {
        self.outgoing.catch_up(&self.database)?;
        self.make_room(keys)?;
        self.sweep()
    }

    /// Waits until the database may be read about this namespace.
    fn settle(&mut self, namespace: i64) -> Result<()> {
        match self.outgoing.dropping(namespace) {
            Some(job) => self.outgoing.wait(&self.database, job),
            None => Ok(()),
        }
    }

    /// Looks up, in the database, the keys at the places `absent`, in the order of keys there. Calls `take` for each with
    /// its place and what was found.
    fn look_up(
        &mut self,
        namespace: i64,
        hashes: &[u64],
        keys: &[&[u8]],
        absent: &[u32],
        mut take: impl FnMut(&mut Cache, &Form, usize, Option<&[u8]>) -> Result<()>,
    ) -> Result<()> {
        self.settle(namespace)?;
        self.keys.clear();
        for at in absent {
            let (hash, key) = (hashes[*at as usize], keys[*at as usize]);
            let group = self.group(hash);
            self.keys.push(|out| key::write(out, group, namespace, key));
        }
        let list = &self.keys;
        self.order.clear();
        self.order.extend((0..absent.len() as u32).filter(|at| !self.outgoing.is_gone(list.get(*at as usize))));
        self.order.sort_unstable_by(|a, b| list.get(*a as usize).cmp(list.get(*b as usize)));
        let Some(cache) = self.spaces.get_mut(&namespace).map(|space| space.cache(&self.form)) else { return Ok(()) };
        for (at, found) in self.order.iter().zip(self.database.get(list, &self.order)?) {
            take(cache, &self.form, absent[*at as usize] as usize, found?.as_deref())?;
        }
        Ok(())
    }

    /// A space and its cache, ready to hand out slots.
    fn space(&mut self, namespace: i64) -> (&mut Cache, bool) {
        let frozen = self.frozen > self.outgoing.done();
        let space = Self::space_of(&mut self.spaces, &self.spec, namespace);
        let complete = space.complete();
        let cache = space.cache(&self.form);
        cache.frozen = frozen;
        (cache, complete)
    }

    /// A space, made if there is none.
    fn space_of<'a>(spaces: &'a mut BTreeMap<i64, Space>, spec: &StateSpec, namespace: i64) -> &'a mut Space {
        let few = stored::is_few(spaces.len(), spec.key_groups);
        spaces.entry(namespace).or_insert_with(|| Space::new(few))
    }

    /// The database has these rows from now on.
    pub(crate) fn add_stored(&mut self, counts: &BTreeMap<i64, Stored>) {
        for (namespace, rows) in counts.iter().filter(|(_, stored)| stored.rows() > 0) {
            Self::space_of(&mut self.spaces, &self.spec, *namespace).stored.add_all(rows);
            self.account(*namespace);
        }
    }
}

impl KeyedState for State {
    fn slots(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<Slots> {
        self.begin(keys.len())?;
        let now = self.now();
        let ttl = self.spec.ttl.map(|ttl| ttl.as_millis() as i64);
        let (cache, complete) = self.space(namespace);
        let mut at = Vec::with_capacity(keys.len());
        let (mut new, mut absent) = (Vec::new(), Vec::new());
        for (row, (hash, key)) in hashes.iter().zip(keys).enumerate() {
            let (slot, was_absent) = cache.slot(*hash, key);
            if was_absent {
                match complete {
                    true => new.push((row, slot)),
                    false => absent.push(row as u32),
                }
            } else if ttl.is_some_and(|ttl| now.saturating_sub(cache.written(slot)) > ttl) {
                cache.table.clear(slot);
                new.push((row, slot));
            }
            cache.touch(slot);
            cache.set_written(slot, now);
            at.push(slot);
        }
        if !absent.is_empty() {
            let mut found_rows = vec![false; keys.len()];
            self.look_up(namespace, hashes, keys, &absent, |cache, form, row, found| {
                let Some(value) = found else { return Ok(()) };
                let slot = at[row];
                cache.loaded(slot);
                let written = form.written(value)?;
                if ttl.is_none_or(|ttl| now.saturating_sub(written) <= ttl) {
                    form.read(value, &mut cache.table, slot)?;
                    found_rows[row] = true;
                }
                Ok(())
            })?;
            new.extend(absent.iter().map(|r| *r as usize).filter(|r| !found_rows[*r]).map(|r| (r, at[r])));
            new.sort_unstable();
        }
        self.account(namespace);
        Ok(Slots { at, new: new.into_iter().map(|(_, slot)| slot).collect() })
    }

    fn find(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<Vec<u32>> {
        self.begin(keys.len())?;
        if !self.spaces.contains_key(&namespace) {
            return Ok(vec![NO_SLOT; keys.len()]);
        }
        let now = self.now();
        let ttl = self.spec.ttl.map(|ttl| ttl.as_millis() as i64);
        let fresh = |written: i64| ttl.is_none_or(|ttl| now.saturating_sub(written) <= ttl);
        let (cache, complete) = self.space(namespace);
        let mut at = vec![NO_SLOT; keys.len()];
        let mut absent = Vec::new();
        for (row, (hash, key)) in hashes.iter().zip(keys).enumerate() {
            match cache.find(*hash, key) {
                Some(slot) if fresh(cache.written(slot)) => at[row] = slot,
                Some(_) => {}
                None if complete => {}
                None => absent.push(row as u32),
            }
        }
        if !absent.is_empty() {
            self.look_up(namespace, hashes, keys, &absent, |cache, form, row, found| {
                let Some(value) = found else { return Ok(()) };
                let written = form.written(value)?;
                if !fresh(written) {
                    return Ok(());
                }
                let (slot, new) = cache.slot(hashes[row], keys[row]);
                if new {
                    cache.loaded(slot);
                    form.read(value, &mut cache.table, slot)?;
                    cache.set_written(slot, written);
                }
                at[row] = slot;
                Ok(())
            })?;
        }
        self.account(namespace);
        Ok(at)
    }

    fn table(&mut self, namespace: i64) -> &mut Table {
        match self.spaces.get_mut(&namespace).and_then(|space| space.cache.as_mut()) {
            Some(cache) => &mut cache.table,
            None => &mut self.nothing,
        }
    }

    fn remove(&mut self, namespace: i64, slots: &[u32]) -> Result<()> {
        self.outgoing.catch_up(&self.database)?;
        for slot in slots {
            self.remove_row(namespace, *slot);
        }
        self.outgoing.send_full(&self.database)?;
        self.account(namespace);
        Ok(())
    }

    fn first_namespace(&self) -> Option<i64> {
        self.spaces.keys().next().copied()
    }

    fn namespaces(&self, range: RangeInclusive<i64>) -> Vec<i64> {
        if range.is_empty() {
            return Vec::new();
        }
        self.spaces.range(range).map(|(namespace, _)| *namespace).collect()
    }

    fn drop_namespace(&mut self, namespace: i64) -> Result<()> {
        self.outgoing.catch_up(&self.database)?;
        let Some(space) = self.forget(namespace) else { return Ok(()) };
        if space.complete() && space.stored.rows() <= SINGLE_REMOVALS_MAX {
            let mut bytes = Vec::new();
            for cache in space.cache.iter() {
                for slot in cache.used().filter(|slot| cache.is_stored(*slot)) {
                    self.key_of(namespace, cache.table.rows(), slot, &mut bytes);
                    self.outgoing.delete(&bytes);
                }
            }
        } else {
            for group in self.groups() {
                self.outgoing.delete_range(namespace, &key::first(group, namespace), &key::end(group, namespace));
            }
        }
        self.outgoing.send_full(&self.database)
    }

    fn scan(&mut self, namespace: i64, page: &mut dyn FnMut(&Rows, &[u32]) -> Result<()>) -> Result<()> {
        self.outgoing.catch_up(&self.database)?;
        self.settle(namespace)?;
        let now = self.now();
        let Some(space) = self.spaces.get(&namespace) else { return Ok(()) };
        if let Some(cache) = &space.cache {
            let slots: Vec<u32> = cache.used().filter(|slot| !self.expired(cache.written(*slot), now)).collect();
            for slots in slots.chunks(PAGE_ROWS) {
                page(cache.table.rows(), slots)?;
            }
        }
        if space.complete() {
            return Ok(());
        }
        let (mut keys, mut values, mut rest) = (Strings::default(), Strings::default(), Page::new(self.form.clone()));
        let mut turn = |keys: &mut Strings, values: &mut Strings| {
            let hashes = self.hashes(keys)?;
            for (hash, (key, value)) in hashes.into_iter().zip(keys.iter().zip(values.iter())) {
                if !space.cache.as_ref().is_some_and(|c| c.holds(hash, key)) {
                    rest.add_hashed(hash, key, value)?;
                }
            }
            keys.clear();
            values.clear();
            rest.turn(page)
        };
        for group in self.groups() {
            let (start, end) = (key::first(group, namespace), key::end(group, namespace));
            self.database.scan(&start, end, |key, value| {
                let (_, _, row_key) = key::parse(key).ok_or_else(not_ours)?;
                if !self.outgoing.is_gone(key) && !self.expired(self.form.written(value)?, now) {
                    keys.push(|out| out.extend_from_slice(row_key));
                    values.push(|out| out.extend_from_slice(value));
                    if keys.len() >= PAGE_ROWS {
                        turn(&mut keys, &mut values)?;
                    }
                }
                Ok(true)
            })?;
        }
        turn(&mut keys, &mut values)
    }

    fn snapshot(&mut self, barrier: &Barrier, watermarks: &KeyGroupWatermarks) -> Result<StateSnapshot> {
        self.outgoing.catch_up(&self.database)?;
        checkpoint::take(self, barrier, watermarks)
    }

    fn restore(&mut self, shard: &RestoredShard) -> Result<()> {
        self.take_in(shard)
    }

    /// Neutral rows can come so; files of a database come as a whole.
    fn restores_by_key_group(&self) -> bool {
        true
    }

    fn arrived(&mut self) -> Result<KeyGroupWatermarks> {
        Ok(self.restoring.watermarks.within(self.spec.key_groups))
    }

    fn restored(&mut self) -> Result<KeyGroupWatermarks> {
        self.finish_restore()
    }

    fn completed(&mut self, epoch: Epoch) -> Result<()> {
        checkpoint::lock(&self.lineage).completed(epoch);
        Ok(())
    }

    fn aborted(&mut self, epoch: Epoch) -> Result<()> {
        checkpoint::lock(&self.lineage).aborted(epoch);
        Ok(())
    }

    fn size(&self) -> (u64, u64) {
        let rows = self.spaces.values().map(Space::rows).sum();
        (rows, self.cached_bytes as u64 + self.database.file_bytes())
    }
}

impl State {
    /// The hashes of keys.
    pub(crate) fn hashes(&self, keys: &Strings) -> Result<Vec<u64>> {
        self.spec.layout.hashes(&keys.iter().collect::<Vec<_>>())
    }

    /// The database's key of a cached row.
    pub(crate) fn key_of(&self, namespace: i64, rows: &Rows, slot: u32, out: &mut Vec<u8>) {
        out.clear();
        let (chunk, row) = rows.read(slot as usize);
        key::write(out, self.group(chunk.hash(row)), namespace, chunk.key(row));
    }

    /// Removes a cached row, here and in the database.
    pub(crate) fn remove_row(&mut self, namespace: i64, slot: u32) {
        let mut bytes = Vec::new();
        let Some(cache) = self.spaces.get(&namespace).and_then(|s| s.cache.as_ref()).filter(|c| c.has(slot)) else {
            return;
        };
        let stored = cache.is_stored(slot).then(|| self.group(cache.table.rows().hash(slot)));
        if stored.is_some() {
            self.key_of(namespace, cache.table.rows(), slot, &mut bytes);
            self.outgoing.delete(&bytes);
        }
        let Some(space) = self.spaces.get_mut(&namespace) else { return };
        if let Some(cache) = &mut space.cache {
            cache.remove(slot);
        }
        if let Some(group) = stored {
            space.stored.remove(group);
        }
    }
}

/// Rows from the database on their way to somebody who looks at them once.
pub(crate) struct Page {
    form: Form,
    /// The columns of rows, and behind them, if rows say so, when they were written.
    types: Vec<ColumnType>,
    table: Table,
    slots: Vec<u32>,
}

impl Page {
    pub(crate) fn new(form: Form) -> Self {
        let types: Vec<_> = form.types.iter().copied().chain(form.timed.then_some(ColumnType::Long)).collect();
        Self { table: Table::new(types.clone()), types, form, slots: Vec::new() }
    }

    /// Adds a row whose hash nobody asks for: a number stands for it.
    pub(crate) fn add(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.add_hashed(self.slots.len() as u64, key, value)
    }

    /// Adds a row.
    pub(crate) fn add_hashed(&mut self, hash: u64, key: &[u8], value: &[u8]) -> Result<()> {
        let (slot, _) = self.table.slot(hash, key);
        let then = self.form.read(value, &mut self.table, slot)?;
        if let Some(written) = self.written() {
            self.table.write_runs(&[slot], written, |column, rows, _| {
                if let Column::Long(values) = column {
                    values[rows[0] as usize] = Some(then);
                }
            });
        }
        self.slots.push(slot);
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The column that says when a row was written, if rows say so.
    pub(crate) fn written(&self) -> Option<usize> {
        self.form.timed.then_some(self.form.types.len())
    }

    /// Shows what there is, if anything, and begins an empty page.
    pub(crate) fn turn(&mut self, show: &mut dyn FnMut(&Rows, &[u32]) -> Result<()>) -> Result<()> {
        if !self.slots.is_empty() {
            show(self.table.rows(), &self.slots)?;
            self.table = Table::new(self.types.clone());
            self.slots.clear();
        }
        Ok(())
    }
}
