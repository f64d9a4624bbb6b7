//! A back end whose checkpoints name no file of an earlier one: for who would rather write more than have checkpoints share
//! files.

use std::{ops::RangeInclusive, sync::Arc};

use floodmark_snapshot::{Epoch, Result, coordination::Barrier};

use crate::{
    keyed::{KeyedState, Slots, StateBackend, StateSpec},
    snapshot::{RestoredShard, StateSnapshot},
    table::{Rows, Table},
    watermarks::KeyGroupWatermarks,
};

/// See the header of this file.
pub struct Whole(pub Arc<dyn StateBackend>);

impl StateBackend for Whole {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn keyed(&self, spec: StateSpec) -> Result<Box<dyn KeyedState>> {
        Ok(Box::new(WholeState(self.0.keyed(StateSpec { reuse_restored: false, ..spec })?)))
    }
}

struct WholeState(Box<dyn KeyedState>);

impl KeyedState for WholeState {
    fn slots(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<Slots> {
        self.0.slots(namespace, hashes, keys)
    }

    fn find(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<Vec<u32>> {
        self.0.find(namespace, hashes, keys)
    }

    fn table(&mut self, namespace: i64) -> &mut Table {
        self.0.table(namespace)
    }

    fn remove(&mut self, namespace: i64, slots: &[u32]) -> Result<()> {
        self.0.remove(namespace, slots)
    }

    fn first_namespace(&self) -> Option<i64> {
        self.0.first_namespace()
    }

    fn namespaces(&self, range: RangeInclusive<i64>) -> Vec<i64> {
        self.0.namespaces(range)
    }

    fn drop_namespace(&mut self, namespace: i64) -> Result<()> {
        self.0.drop_namespace(namespace)
    }

    fn scan(&mut self, namespace: i64, page: &mut dyn FnMut(&Rows, &[u32]) -> Result<()>) -> Result<()> {
        self.0.scan(namespace, page)
    }

    fn snapshot(&mut self, barrier: &Barrier, watermarks: &KeyGroupWatermarks) -> Result<StateSnapshot> {
        self.0.snapshot(barrier, watermarks)
    }

    fn restore(&mut self, shard: &RestoredShard) -> Result<()> {
        self.0.restore(shard)
    }

    fn restore_together(&mut self, shards: &[RestoredShard]) -> Result<()> {
        self.0.restore_together(shards)
    }

    fn restores_by_key_group(&self) -> bool {
        self.0.restores_by_key_group()
    }

    fn arrived(&mut self) -> Result<KeyGroupWatermarks> {
        self.0.arrived()
    }

    fn restored(&mut self) -> Result<KeyGroupWatermarks> {
        self.0.restored()
    }

    /// What is durable is as good as given up to the back end: it names none of it again.
    fn completed(&mut self, epoch: Epoch) -> Result<()> {
        self.0.aborted(epoch)
    }

    fn aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.0.aborted(epoch)
    }

    fn size(&self) -> (u64, u64) {
        self.0.size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Heap, conformance};

    fn whole() -> Arc<dyn StateBackend> {
        Arc::new(Whole(Arc::new(Heap)))
    }

    #[test]
    fn snapshots_and_restores_are_those_of_the_back_end() {
        conformance::a_snapshot_holds_the_rows_at_its_barrier(&whole);
        conformance::checkpoints_end_in_any_order(&whole);
        conformance::an_aborted_checkpoint_is_never_named_again(&whole);
    }

    #[test]
    #[should_panic(expected = "bytes for 1 % of")]
    fn a_checkpoint_after_a_small_change_is_as_large_as_the_state() {
        conformance::a_small_change_makes_a_small_checkpoint(&whole);
    }
}
