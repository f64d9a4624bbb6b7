//! Unwindowed aggregate: the keyed half. Emits a changelog: an insertion for a new key, an update when a result changes.

use std::sync::Arc;

use arrow::{
    array::{ArrayRef, Int8Array, UInt32Array},
    compute::{concat, take},
    datatypes::SchemaRef,
};
use floodmark_dataflow::{
    Barrier, Batch, Operator, OperatorFactory, Output, Port, RestoredShard, RowKind, StateSnapshot, SubtaskContext,
};
use floodmark_snapshot::{Epoch, Result};
use floodmark_state::{KeyGroupWatermarks, KeyedState, Rows};

use super::{
    arrow_failed,
    key::KeyCodec,
    partial::{Grouping, GroupingLayout, batch, keys_of_slots},
};

/// What a group aggregate does.
#[derive(Clone)]
pub(crate) struct GroupAggregate {
    pub(crate) grouping: Grouping,
    /// Keys, results and, if there are any results to change, the row kind.
    pub(crate) schema: SchemaRef,
    /// Whether an update also tells the row as it was before. An upsert sink needs it not.
    pub(crate) emit_before: bool,
}

impl OperatorFactory for GroupAggregate {
    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok(Box::new(GroupOperator {
            codec: KeyCodec::new(&self.grouping.keys)?,
            results: KeyCodec::of_types(self.grouping.calls.iter().map(|c| c.field().data_type().clone()))?,
            state: context.keyed("", GroupingLayout::new(&self.grouping)?, context.state.ttl)?,
            spec: self.clone(),
        }))
    }
}

struct GroupOperator {
    spec: GroupAggregate,
    codec: KeyCodec,
    /// Compares results.
    results: KeyCodec,
    state: Box<dyn KeyedState>,
}

impl GroupOperator {
    /// Emits `count` rows: the keys of `slots[key[i]]` with result `result[i]` of `old ++ new`.
    fn emit(&mut self, slots: &[u32], results: &[ArrayRef], changes: &Changes, out: &mut Output) -> Result<()> {
        if changes.kinds.is_empty() {
            return Ok(());
        }
        let keys = keys_of_slots(&self.codec, self.state.table(0).rows(), slots)?;
        let taken = |columns: &[ArrayRef], rows: &Vec<u32>| {
            let rows = UInt32Array::from(rows.clone());
            columns.iter().map(|c| take(c, &rows, None).map_err(arrow_failed)).collect::<Result<Vec<_>>>()
        };
        let mut columns = taken(&keys, &changes.keys)?;
        columns.extend(taken(results, &changes.results)?);
        if !self.spec.grouping.calls.is_empty() {
            columns.push(Arc::new(Int8Array::from(changes.kinds.clone())));
        }
        out.emit(Batch::new(batch(&self.spec.schema, columns, changes.kinds.len())?));
        Ok(())
    }
}

fn results(spec: &GroupAggregate, rows: &Rows, slots: &[u32]) -> Result<Vec<ArrayRef>> {
    spec.grouping.placed().map(|(at, call)| call.results(rows, at, slots)).collect()
}

#[derive(Default)]
struct Changes {
    keys: Vec<u32>,
    results: Vec<u32>,
    kinds: Vec<i8>,
}

impl Changes {
    fn push(&mut self, key: usize, result: usize, kind: RowKind) {
        self.keys.push(key as u32);
        self.results.push(result as u32);
        self.kinds.push(kind as i8);
    }
}

impl Operator for GroupOperator {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        let rows = &batch.rows;
        let keys = self.spec.grouping.keys_of(&self.codec, rows)?;
        let hashes = self.spec.grouping.hashes_of(&batch)?;
        let slots = self.state.slots(0, &hashes, &keys.all(rows.num_rows()))?;
        // Those of known keys, then those of new ones.
        let mut new = slots.new.clone();
        new.sort_unstable();
        let mut touched = slots.at.clone();
        touched.sort_unstable();
        touched.dedup();
        touched.retain(|slot| new.binary_search(slot).is_err());
        let known = touched.len();
        touched.extend(&slots.new);
        let before = results(&self.spec, self.state.table(0).rows(), &touched[..known])?;
        self.spec.grouping.merge(self.state.table(0), &slots.at, rows)?;
        let after = results(&self.spec, self.state.table(0).rows(), &touched)?;
        let (old_rows, new_rows) = (self.results.encode(&before)?, self.results.encode(&after)?);
        let mut changes = Changes::default();
        for key in 0..touched.len() {
            let new = known + key;
            if key >= known {
                changes.push(key, new, RowKind::Insert);
            } else if old_rows.get(key) != new_rows.get(key) {
                if self.spec.emit_before {
                    changes.push(key, key, RowKind::UpdateBefore);
                }
                changes.push(key, new, RowKind::UpdateAfter);
            }
        }
        let results: Vec<ArrayRef> =
            before.iter().zip(&after).map(|(b, a)| concat(&[b, a]).map_err(arrow_failed)).collect::<Result<_>>()?;
        self.emit(&touched, &results, &changes, out)
    }

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        self.state.snapshot(barrier, &KeyGroupWatermarks::default())
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        self.state.restore_together(&shards)
    }

    fn restores_by_key_group(&self) -> bool {
        self.state.restores_by_key_group()
    }

    fn restored(&mut self) -> Result<()> {
        self.state.restored().map(drop)
    }

    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        self.state.completed(epoch)
    }

    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.state.aborted(epoch)
    }

    fn state_size(&self) -> (u64, u64) {
        self.state.size()
    }
}
