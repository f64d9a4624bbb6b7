//! State on the heap that checks, at every snapshot, that what its layout tells of its shape makes the same columns as the layout
//! does, and in every call that keys have the hashes that the layout tells. So every test of results also holds operators to
//! their word.

use std::{ops::RangeInclusive, sync::Arc};

use floodmark_snapshot::{Epoch, Result, coordination::Barrier};
use floodmark_state::{
    Heap, KeyGroupWatermarks, KeyedState, Layout, RestoredShard, Rows, Slots, StateBackend, StateSnapshot, StateSpec,
    Table, shape::Shaped,
};

/// See the header of this file.
pub(super) struct ShapedHeap;

impl StateBackend for ShapedHeap {
    fn name(&self) -> &'static str {
        Heap.name()
    }

    fn keyed(&self, spec: StateSpec) -> Result<Box<dyn KeyedState>> {
        let layout = spec.layout.clone();
        let shape = layout.shape().expect("a layout of SQL tells its shape");
        let shaped = Shaped::new(layout.schema(), shape)?;
        Ok(Box::new(Checked { state: Heap.keyed(spec)?, layout, shaped }))
    }
}

struct Checked {
    state: Box<dyn KeyedState>,
    layout: Arc<dyn Layout>,
    shaped: Shaped,
}

impl KeyedState for Checked {
    fn slots(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<Slots> {
        assert_eq!(self.layout.hashes(keys)?, hashes);
        self.state.slots(namespace, hashes, keys)
    }

    fn find(&mut self, namespace: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<Vec<u32>> {
        assert_eq!(self.layout.hashes(keys)?, hashes);
        self.state.find(namespace, hashes, keys)
    }

    fn table(&mut self, namespace: i64) -> &mut Table {
        self.state.table(namespace)
    }

    fn remove(&mut self, namespace: i64, slots: &[u32]) -> Result<()> {
        self.state.remove(namespace, slots)
    }

    fn first_namespace(&self) -> Option<i64> {
        self.state.first_namespace()
    }

    fn namespaces(&self, range: RangeInclusive<i64>) -> Vec<i64> {
        self.state.namespaces(range)
    }

    fn drop_namespace(&mut self, namespace: i64) -> Result<()> {
        self.state.drop_namespace(namespace)
    }

    fn scan(&mut self, namespace: i64, page: &mut dyn FnMut(&Rows, &[u32]) -> Result<()>) -> Result<()> {
        self.state.scan(namespace, page)
    }

    fn snapshot(&mut self, barrier: &Barrier, watermarks: &KeyGroupWatermarks) -> Result<StateSnapshot> {
        for namespace in self.state.namespaces(i64::MIN..=i64::MAX) {
            let (layout, shaped) = (&self.layout, &self.shaped);
            self.state.scan(namespace, &mut |rows, slots| {
                assert_eq!(shaped.encode(namespace, rows, slots)?, layout.encode(namespace, rows, slots)?);
                Ok(())
            })?;
        }
        self.state.snapshot(barrier, watermarks)
    }

    fn restore(&mut self, shard: &RestoredShard) -> Result<()> {
        self.state.restore(shard)
    }

    fn restores_by_key_group(&self) -> bool {
        self.state.restores_by_key_group()
    }

    fn arrived(&mut self) -> Result<KeyGroupWatermarks> {
        self.state.arrived()
    }

    fn restored(&mut self) -> Result<KeyGroupWatermarks> {
        self.state.restored()
    }

    fn completed(&mut self, epoch: Epoch) -> Result<()> {
        self.state.completed(epoch)
    }

    fn aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.state.aborted(epoch)
    }

    fn size(&self) -> (u64, u64) {
        self.state.size()
    }
}
