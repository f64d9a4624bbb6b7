//! Writes what a snapshot has fixed, off the task's thread.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use floodmark_snapshot::{KeyGroup, Result};

use super::removals::Removed;
use crate::{
    keyed::StateSpec,
    neutral::RowWriter,
    shard::Header,
    table::{Rows, Table},
    watermarks::KeyGroupWatermarks,
};

/// A file to be written.
pub(super) struct Job {
    pub(super) spec: StateSpec,
    /// The table column of the time of the last write.
    pub(super) written: Option<usize>,
    pub(super) watermarks: KeyGroupWatermarks,
    pub(super) layer: u32,
    /// By namespace.
    pub(super) rows: Vec<(i64, Rows)>,
    /// Only rows of later intervals.
    pub(super) since: Option<u32>,
    pub(super) removals: Vec<Arc<Removed>>,
}

/// Rows of one key group and namespace.
struct Run<'a> {
    namespace: i64,
    rows: &'a Rows,
    removed: bool,
    slots: Vec<u32>,
}

impl Job {
    pub(super) fn run(self) -> Result<Bytes> {
        let mut dropped: Vec<i64> = self.removals.iter().flat_map(|r| &r.namespaces).copied().collect();
        dropped.sort_unstable();
        dropped.dedup();
        let header = Header { layer: self.layer, dropped, ..Header::new(None).at(&self.watermarks) };
        let mut writer = RowWriter::new(&self.spec, header, self.written);
        let removed = self.removed();
        for (group, runs) in self.by_group(&removed) {
            for run in runs {
                writer.push(group, run.namespace, run.rows, &run.slots, run.removed)?;
            }
        }
        writer.finish()
    }

    /// Tables of the keys removed.
    fn removed(&self) -> BTreeMap<i64, Table> {
        let mut tables: BTreeMap<i64, Table> = BTreeMap::new();
        let mut types = self.spec.layout.types();
        types.extend(self.written.map(|_| crate::ColumnType::Long));
        for keys in self.removals.iter().map(|r| &r.keys) {
            for row in 0..keys.len() {
                let table = tables.entry(keys.namespaces[row]).or_insert_with(|| Table::new(types.clone()));
                table.slot(keys.hashes[row], keys.key(row));
            }
        }
        tables
    }

    /// What to write, by key group; removals come before rows.
    fn by_group<'a>(&'a self, removed: &'a BTreeMap<i64, Table>) -> BTreeMap<KeyGroup, Vec<Run<'a>>> {
        let mut groups: BTreeMap<KeyGroup, Vec<Run<'a>>> = BTreeMap::new();
        let mut add = |namespace: i64, rows: &'a Rows, slots: &mut dyn Iterator<Item = u32>, removed: bool| {
            let first = self.spec.key_groups.first.0;
            let mut by_group: Vec<Vec<u32>> = Vec::new();
            for slot in slots {
                let group = KeyGroup::of(rows.hash(slot), self.spec.max_parallelism).0.saturating_sub(first);
                if by_group.len() <= usize::from(group) {
                    by_group.resize_with(usize::from(group) + 1, Vec::new);
                }
                by_group[usize::from(group)].push(slot);
            }
            for (at, slots) in by_group.into_iter().enumerate().filter(|(_, slots)| !slots.is_empty()) {
                groups.entry(KeyGroup(first + at as u16)).or_default().push(Run { namespace, rows, removed, slots });
            }
        };
        for (namespace, table) in removed {
            add(*namespace, table.rows(), &mut table.rows().slots(), true);
        }
        for (namespace, rows) in &self.rows {
            match self.since {
                Some(since) => add(*namespace, rows, &mut rows.changed_since(since), false),
                None => add(*namespace, rows, &mut rows.slots(), false),
            }
        }
        groups
    }
}
