//! Keyed state on the heap: a table per namespace, and checkpoints that hold what has changed.
//!
//! A barrier clones pointers ([`Table::snapshot`]) and begins a new interval. What a checkpoint writes is decided by
//! [`lineage`]: everything, or the rows written and the keys removed since the last *completed* checkpoint, as one more layer
//! on top of its layers, which are named again. So a checkpoint that fails costs nothing: the next one has its changes too.
//!
//! Invariant: the layers that a checkpoint names, applied in order, give the rows at its barrier.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    sync::{Arc, Mutex, PoisonError},
};

use floodmark_snapshot::{Epoch, Result, ShardKind, coordination::Barrier};

use self::{
    lineage::{Lineage, Part, Restored, Restoring},
    removals::Removals,
};
use crate::{
    keyed::{KeyedState, NO_SLOT, Slots, StateBackend, StateSpec},
    neutral::PAGE_ROWS,
    snapshot::{PendingShard, RestoredShard, StateSnapshot},
    table::{Column, ColumnType, Rows, Table},
    watermarks::KeyGroupWatermarks,
};

mod encode;
mod lineage;
mod removals;
mod restoring;

/// Rows looked at for their age at each call of [`KeyedState::slots`], in a state with a TTL.
const SWEEP_ROWS: usize = 64;
/// Removals remembered between checkpoints, at least; more, if there are more rows. Beyond, a checkpoint writes everything.
const REMOVALS_MAX: usize = 1 << 16;

/// The back end that keeps all state in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heap;

impl StateBackend for Heap {
    fn name(&self) -> &'static str {
        "heap"
    }

    fn keyed(&self, spec: StateSpec) -> Result<Box<dyn KeyedState>> {
        Ok(Box::new(HeapState::new(spec)))
    }
}

/// When rows are too old to be seen.
#[derive(Clone, Copy)]
struct Expiry {
    ttl_ms: i64,
    /// The table column of the time of the last write.
    column: usize,
}

impl Expiry {
    fn is_over(self, written: Option<i64>, now: i64) -> bool {
        written.is_some_and(|written| now.saturating_sub(written) > self.ttl_ms)
    }
}

struct HeapState {
    spec: StateSpec,
    types: Vec<ColumnType>,
    expiry: Option<Expiry>,
    /// None is empty.
    tables: BTreeMap<i64, Table>,
    /// What the namespaces without rows have.
    none: Table,
    /// Number of the present interval: barriers end them.
    interval: u32,
    removals: Removals,
    lineage: Lineage,
    restoring: Restoring,
    /// Where the search for old rows goes on.
    swept: (i64, u32),
}

impl HeapState {
    fn new(spec: StateSpec) -> Self {
        let mut types = spec.layout.types();
        let expiry = spec.ttl.map(|ttl| {
            types.push(ColumnType::Long);
            Expiry { ttl_ms: i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX), column: types.len() - 1 }
        });
        Self {
            none: Table::new(types.clone()),
            types,
            expiry,
            spec,
            tables: BTreeMap::new(),
            interval: 1,
            removals: Removals::default(),
            lineage: Lineage::default(),
            restoring: Restoring::default(),
            swept: (0, 0),
        }
    }

    fn table_of(&mut self, namespace: i64) -> &mut Table {
        let (types, interval) = (&self.types, self.interval);
        self.tables.entry(namespace).or_insert_with(|| {
            let mut table = Table::new(types.clone());
            table.begin(interval);
            table
        })
    }

    /// Begins an interval, unless it has begun.
    fn begin(&mut self, interval: u32) {
        if interval > self.interval {
            self.interval = interval;
            for table in self.tables.values_mut() {
                table.begin(interval);
            }
        }
    }

    fn rows(&self) -> usize {
        self.tables.values().map(Table::len).sum()
    }

    /// Removes a few rows that are too old, if any are.
    fn sweep(&mut self, expiry: Expiry, now: i64) -> Result<()> {
        let (namespace, after) = self.swept;
        let next = self.tables.range(namespace..).next().or_else(|| self.tables.iter().next());
        let Some((at, table)) = next else { return Ok(()) };
        let at = *at;
        let first = if at == namespace { after } else { 0 };
        let slots: Vec<u32> = table.rows().slots_from(first).take(SWEEP_ROWS).collect();
        self.swept = match slots.last() {
            Some(last) => (at, last + 1),
            None => (at.wrapping_add(1), 0),
        };
        let old = |slot: &u32| expiry.is_over(table.rows().long(*slot as usize, expiry.column), now);
        let old: Vec<u32> = slots.into_iter().filter(old).collect();
        if old.is_empty() { Ok(()) } else { self.remove(at, &old) }
    }

    /// Whether a checkpoint may want to know of removals.
    fn remembers(&self) -> bool {
        !self.lineage.is_empty() || self.restoring.builds()
    }

    /// Forgets removals if there are too many.
    fn bound_removals(&mut self) {
        if self.removals.len() > REMOVALS_MAX && self.removals.len() > self.rows() {
            self.lineage = Lineage::default();
            self.restoring.part();
            self.removals = Removals::default();
        }
    }

    fn find_all(&self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Vec<u32> {
        let Some(table) = self.tables.get(&namespace) else { return vec![NO_SLOT; keys.len()] };
        hashes.iter().zip(keys).map(|(hash, key)| table.find(*hash, key).unwrap_or(NO_SLOT)).collect()
    }

    fn vacate(&mut self, namespace: i64, slots: &[u32]) {
        if let Some(table) = self.tables.get_mut(&namespace) {
            slots.iter().for_each(|slot| table.remove(*slot));
            if table.is_empty() {
                self.tables.remove(&namespace);
            }
        }
    }

    fn now(&self) -> i64 {
        if self.expiry.is_some() { self.spec.env.clock.wall_ms() } else { 0 }
    }
}

impl KeyedState for HeapState {
    fn slots(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<Slots> {
        let now = self.now();
        let expiry = self.expiry;
        if let Some(expiry) = expiry {
            self.sweep(expiry, now)?;
        }
        let mut slots = Slots { at: Vec::with_capacity(keys.len()), new: Vec::new() };
        if keys.is_empty() {
            return Ok(slots);
        }
        let table = self.table_of(namespace);
        // What writes behind a barrier have scattered, later ones bring together again.
        table.compact(2 * keys.len());
        for (hash, key) in hashes.iter().zip(keys) {
            let (slot, new) = table.slot(*hash, key);
            slots.at.push(slot);
            if new {
                slots.new.push(slot);
            }
            if let Some(expiry) = expiry {
                let over = expiry.is_over(table.rows().long(slot as usize, expiry.column), now);
                if over {
                    table.clear(slot);
                    slots.new.push(slot);
                }
                if new || over {
                    write_times(table, &[slot], expiry.column, now);
                }
            }
        }
        if let Some(expiry) = expiry {
            write_times(table, &slots.at, expiry.column, now);
        }
        Ok(slots)
    }

    fn find(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<Vec<u32>> {
        let mut slots = self.find_all(namespace, hashes, keys);
        if let (Some(expiry), Some(table)) = (self.expiry, self.tables.get(&namespace)) {
            let now = self.now();
            for slot in slots.iter_mut().filter(|s| **s != NO_SLOT) {
                if expiry.is_over(table.rows().long(*slot as usize, expiry.column), now) {
                    *slot = NO_SLOT;
                }
            }
        }
        Ok(slots)
    }

    fn table(&mut self, namespace: i64) -> &mut Table {
        self.tables.get_mut(&namespace).unwrap_or(&mut self.none)
    }

    fn remove(&mut self, namespace: i64, slots: &[u32]) -> Result<()> {
        if self.remembers()
            && let Some(table) = self.tables.get(&namespace)
        {
            for slot in slots {
                let rows = table.rows();
                self.removals.key(namespace, rows.hash(*slot), rows.key(*slot));
            }
        }
        self.vacate(namespace, slots);
        self.bound_removals();
        Ok(())
    }

    fn first_namespace(&self) -> Option<i64> {
        self.tables.first_key_value().map(|(namespace, _)| *namespace)
    }

    fn namespaces(&self, range: RangeInclusive<i64>) -> Vec<i64> {
        if range.is_empty() { Vec::new() } else { self.tables.range(range).map(|(namespace, _)| *namespace).collect() }
    }

    fn drop_namespace(&mut self, namespace: i64) -> Result<()> {
        if self.tables.remove(&namespace).is_some() && self.remembers() {
            self.removals.namespace(namespace);
            self.bound_removals();
        }
        Ok(())
    }

    fn scan(&mut self, namespace: i64, page: &mut dyn FnMut(&Rows, &[u32]) -> Result<()>) -> Result<()> {
        let now = self.now();
        let Some(table) = self.tables.get(&namespace) else { return Ok(()) };
        let rows = table.rows();
        for mut slots in rows.pages(PAGE_ROWS) {
            if let Some(expiry) = self.expiry {
                slots.retain(|slot| !expiry.is_over(rows.long(*slot as usize, expiry.column), now));
            }
            if !slots.is_empty() {
                page(rows, &slots)?;
            }
        }
        Ok(())
    }

    fn snapshot(&mut self, barrier: &Barrier, watermarks: &KeyGroupWatermarks) -> Result<StateSnapshot> {
        let ended = self.interval;
        self.interval += 1;
        let rows: Vec<(i64, Rows)> = self.tables.iter_mut().map(|(n, table)| (*n, table.snapshot())).collect();
        let written: u64 = self.tables.values_mut().map(|table| table.begin(self.interval)).sum();
        let removed = self.removals.end(ended);
        let live: u64 = rows.iter().map(|(_, rows)| rows.len() as u64).sum();
        let Part { kept, since, changed } = if barrier.whole {
            self.lineage.note(ended, written + removed);
            Part { kept: Vec::new(), since: None, changed: live }
        } else {
            self.lineage.plan(ended, written + removed, live, watermarks, barrier.stops())
        };
        let reused = kept.iter().map(|layer| layer.shard.clone()).collect();
        // Above all that are kept.
        let layer = kept.iter().map(|layer| layer.shard.layer + 1).max().unwrap_or(0);
        if since == Some(ended) {
            self.lineage.under_way(barrier.epoch, ended, watermarks.clone(), kept, None);
            return Ok(StateSnapshot { reused, pending: Vec::new() });
        }
        let job = encode::Job {
            spec: self.spec.clone(),
            written: self.expiry.map(|e| e.column),
            watermarks: watermarks.clone(),
            layer,
            rows,
            since,
            removals: since.map_or_else(Vec::new, |since| self.removals.since(since)),
        };
        let mut pending =
            PendingShard::new(ShardKind::Keyed, Some(self.spec.key_groups), changed, Box::new(move || job.run()));
        pending.layer = layer;
        pending.name = self.spec.shard_name();
        if !barrier.whole {
            let uploaded = Arc::new(Mutex::new(None));
            self.lineage.under_way(barrier.epoch, ended, watermarks.clone(), kept, Some(uploaded.clone()));
            pending.uploaded = Some(Box::new(move |shard| {
                *uploaded.lock().unwrap_or_else(PoisonError::into_inner) = Some(shard.clone());
            }));
        }
        Ok(StateSnapshot { reused, pending: vec![pending] })
    }

    fn restore(&mut self, shard: &RestoredShard) -> Result<()> {
        self.take_in(shard)
    }

    fn restore_together(&mut self, shards: &[RestoredShard]) -> Result<()> {
        self.take_in_together(shards)
    }

    fn restores_by_key_group(&self) -> bool {
        true
    }

    fn arrived(&mut self) -> Result<KeyGroupWatermarks> {
        Ok(self.restoring.watermarks(&self.spec))
    }

    fn restored(&mut self) -> Result<KeyGroupWatermarks> {
        let Restored { watermarks, lineage, removals } = std::mem::take(&mut self.restoring).finish(&self.spec);
        self.tables.retain(|_, table| !table.is_empty());
        self.lineage = lineage;
        match self.lineage.is_empty() {
            true => self.removals = Removals::default(),
            false => self.removals.follow(removals),
        }
        Ok(watermarks)
    }

    fn completed(&mut self, epoch: Epoch) -> Result<()> {
        if let Some(oldest) = self.lineage.completed(epoch) {
            self.removals.forget(oldest);
        }
        Ok(())
    }

    fn aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.lineage.aborted(epoch);
        Ok(())
    }

    fn size(&self) -> (u64, u64) {
        (self.rows() as u64, self.tables.values().map(Table::bytes).sum::<usize>() as u64)
    }
}

fn write_times(table: &mut Table, slots: &[u32], column: usize, now: i64) {
    table.write_runs(slots, column, |column, rows, _| {
        if let Column::Long(values) = column {
            rows.iter().for_each(|row| values[*row as usize] = Some(now));
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::Heap;
    use crate::StateBackend;

    fn heap() -> Arc<dyn StateBackend> {
        Arc::new(Heap)
    }

    crate::keyed_state_suite!(heap);

    #[test]
    fn key_groups_that_move_are_named_again() {
        crate::conformance::key_groups_that_move_are_named_again(&heap);
    }
}
