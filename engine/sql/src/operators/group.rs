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
use floodmark_snapshot::Result;
use floodmark_state::Table;

use super::{
    arrow_failed,
    key::KeyCodec,
    partial::{Grouping, batch, keys_of_slots},
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
            table: Table::new(self.grouping.column_types()),
            context: context.clone(),
            spec: self.clone(),
        }))
    }
}

struct GroupOperator {
    spec: GroupAggregate,
    codec: KeyCodec,
    /// Compares results.
    results: KeyCodec,
    table: Table,
    context: SubtaskContext,
}

impl GroupOperator {
    fn results(&self, slots: &[u32]) -> Result<Vec<ArrayRef>> {
        let rows = self.table.rows();
        self.spec.grouping.placed().map(|(at, call)| call.results(rows, at, slots)).collect()
    }

    /// Emits `count` rows: the keys of `slots[key[i]]` with result `result[i]` of `old ++ new`.
    fn emit(&self, slots: &[u32], results: &[ArrayRef], changes: &Changes, out: &mut Output) -> Result<()> {
        if changes.kinds.is_empty() {
            return Ok(());
        }
        let keys = keys_of_slots(&self.codec, self.table.rows(), slots)?;
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
        let known = self.table.len() as u32;
        let slots: Vec<u32> = hashes.iter().enumerate().map(|(row, h)| self.table.slot(*h, keys.get(row)).0).collect();
        let mut touched = slots.clone();
        touched.sort_unstable();
        touched.dedup();
        // Slots are dense and never given back, so those of new keys come last.
        let old = &touched[..touched.partition_point(|slot| *slot < known)];
        let before = self.results(old)?;
        self.spec.grouping.merge(&mut self.table, &slots, rows)?;
        let after = self.results(&touched)?;
        let (old_rows, new_rows) = (self.results.encode(&before)?, self.results.encode(&after)?);
        let mut changes = Changes::default();
        for key in 0..touched.len() {
            let new = old.len() + key;
            if key >= old.len() {
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

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        Ok(StateSnapshot::of(vec![self.spec.grouping.pending(
            vec![(None, self.table.snapshot())],
            None,
            &self.context,
        )]))
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        let (mut tables, _) = self.spec.grouping.restore(&shards, &self.context)?;
        if let Some(table) = tables.remove(&0) {
            self.table = table;
        }
        Ok(())
    }

    fn state_size(&self) -> (u64, u64) {
        (self.table.len() as u64, self.table.bytes() as u64)
    }
}
