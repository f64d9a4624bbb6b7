//! Which layers a checkpoint consists of: those of the last completed one, and what has changed since. Pure.
//!
//! Only completed checkpoints are built upon, so what an aborted one uploaded is never named again, and completions and aborts
//! may come in any order.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use floodmark_snapshot::{Epoch, Error, KeyGroupRange, Result, Shard, manifest::ShardStatus};

use super::removals::Removals;
use crate::{
    keyed::StateSpec,
    shard::Header,
    snapshot::RestoredShard,
    watermarks::{KeyGroupWatermarks, RestoredWatermarks},
};

/// Layers of a checkpoint, at most. Then those above the whole one become one.
const LAYERS_MAX: usize = 16;
/// How many times the size of the state its layers may have before everything is written anew.
const WASTE_MAX: u64 = 2;
/// Layers may waste this many bytes however small the state is.
const WASTE_FREE: u64 = 64 << 10;

/// A shard of a completed checkpoint.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) shard: Shard,
    /// It has the changes up to the end of this interval.
    pub(super) interval: u32,
}

/// A checkpoint that has been taken and is neither complete nor given up.
#[derive(Debug)]
struct UnderWay {
    interval: u32,
    watermarks: KeyGroupWatermarks,
    kept: Vec<Layer>,
    /// What it has written, once that is durable; `None` if it writes nothing.
    uploaded: Option<Arc<Mutex<Option<Shard>>>>,
}

/// What a checkpoint is to consist of.
#[derive(Debug)]
pub(super) struct Part {
    /// Layers named again.
    pub(super) kept: Vec<Layer>,
    /// Changes of later intervals are to be written; `None` for everything.
    pub(super) since: Option<u32>,
    /// Rows to be written, at most.
    pub(super) changed: u64,
}

/// The layers of the last completed checkpoint, and the checkpoints under way.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    base: Vec<Layer>,
    watermarks: KeyGroupWatermarks,
    under_way: BTreeMap<Epoch, UnderWay>,
    /// Rows written or removed in each interval since the first layer.
    changes: VecDeque<(u32, u64)>,
}

impl Lineage {
    /// Whether no checkpoint builds on an earlier one, or will.
    pub(super) fn is_empty(&self) -> bool {
        self.base.is_empty() && self.under_way.is_empty()
    }

    /// Takes note of the changes of an interval.
    pub(super) fn note(&mut self, interval: u32, changed: u64) {
        if changed > 0 {
            self.changes.push_back((interval, changed));
        }
    }

    /// What a checkpoint at the end of `interval`, in which so many rows `changed`, consists of.
    pub(super) fn plan(&mut self, interval: u32, changed: u64, rows: u64, watermarks: &KeyGroupWatermarks) -> Part {
        self.note(interval, changed);
        let whole = Part { kept: Vec::new(), since: None, changed: rows };
        let (Some(first), Some(last)) = (self.base.first(), self.base.last()) else { return whole };
        let size: u64 = self.base.iter().map(|layer| layer.shard.size).sum();
        let state = first.shard.size.saturating_mul(rows) / first.shard.rows.max(1);
        if size > WASTE_MAX * state + WASTE_FREE {
            return whole;
        }
        let kept = if self.base.len() >= LAYERS_MAX { &self.base[..1] } else { &self.base[..] };
        let since = kept.last().map_or(last.interval, |layer| layer.interval);
        let changed: u64 = self.changes.iter().filter(|(at, _)| *at > since).map(|(_, n)| n).sum();
        // Without changes, also of watermarks, the layers stand as they are.
        let same = changed == 0 && *watermarks == self.watermarks && kept.len() == self.base.len();
        let since = if same { interval } else { since };
        Part { kept: kept.to_vec(), since: Some(since), changed }
    }

    /// A checkpoint has been taken at the end of `interval`.
    pub(super) fn under_way(
        &mut self,
        epoch: Epoch,
        interval: u32,
        watermarks: KeyGroupWatermarks,
        kept: Vec<Layer>,
        uploaded: Option<Arc<Mutex<Option<Shard>>>>,
    ) {
        self.under_way.insert(epoch, UnderWay { interval, watermarks, kept, uploaded });
    }

    /// A checkpoint is complete. Answers the interval up to which nobody needs to know of removals any more.
    pub(super) fn completed(&mut self, epoch: Epoch) -> Option<u32> {
        let UnderWay { interval, watermarks, kept, uploaded } = self.under_way.remove(&epoch)?;
        if self.base.last().is_some_and(|last| last.interval >= interval) {
            return None; // a later one is complete already
        }
        let mut base = kept;
        if let Some(uploaded) = uploaded {
            let uploaded = uploaded.lock().unwrap_or_else(PoisonError::into_inner).take()?;
            base.push(Layer { shard: Shard { status: ShardStatus::Reused, ..uploaded }, interval });
        }
        self.base = base;
        self.watermarks = watermarks;
        self.under_way.retain(|_, other| other.interval > interval);
        let oldest = self.base.first()?.interval;
        self.changes.retain(|(at, _)| *at > oldest);
        // Those under way build on layers of their own.
        Some(self.under_way.values().filter_map(|u| u.kept.first()).map(|l| l.interval).fold(oldest, u32::min))
    }

    /// A checkpoint has been given up.
    pub(super) fn aborted(&mut self, epoch: Epoch) {
        self.under_way.remove(&epoch);
    }
}

/// What the shards of a restore say, until all are there.
#[derive(Debug, Default)]
pub(super) struct Restoring {
    /// The earlier subtasks.
    subtasks: BTreeSet<u32>,
    watermarks: RestoredWatermarks,
    /// Each shard once, however many slices it comes in.
    layers: Vec<Layer>,
    /// The slice that came first; all of the state, if it comes in one.
    first_slice: Option<Option<KeyGroupRange>>,
    /// Why checkpoints can't go on from these shards.
    foreign: bool,
    removals: Removals,
    removals_of: u32,
    interval: u32,
}

/// A restored state's past.
pub(super) struct Restored {
    pub(super) watermarks: KeyGroupWatermarks,
    pub(super) lineage: Lineage,
    pub(super) removals: Removals,
}

impl Restoring {
    /// A shard, or a slice of one, is taken in. Its layer is the interval in which its rows were written. True if nothing of it
    /// has been taken in before.
    pub(super) fn shard(
        &mut self,
        spec: &StateSpec,
        restored: &RestoredShard,
        header: &Header,
        same_columns: bool,
    ) -> Result<bool> {
        let shard = &restored.shard;
        if shard.layer > 0 && !self.subtasks.contains(&shard.subtask) {
            return Err(Error::corrupt(format!(
                "shard {} is layer {} of subtask {}, whose layer 0 is missing",
                shard.path, shard.layer, shard.subtask
            )));
        }
        let known = |l: &Layer| {
            let of = |s: &Shard| (s.subtask, s.layer, s.key_groups);
            of(&l.shard) == of(shard) && l.shard.path == shard.path
        };
        if self.layers.iter().any(known) {
            return Ok(false);
        }
        self.subtasks.insert(shard.subtask);
        self.watermarks.shard(shard.subtask, shard.layer, shard.key_groups, header.watermarks()?);
        // Of a shard that is not in every slice, nobody knows whether rows written meanwhile are newer.
        let late = restored.slice != *self.first_slice.get_or_insert(restored.slice);
        self.foreign |= late
            || !spec.reuse_restored
            || !same_columns
            || shard.key_groups != Some(spec.key_groups)
            || self.subtasks.len() > 1
            || shard.layer as usize != self.layers.len();
        self.interval = self.interval.max(shard.layer);
        let reused = Shard { status: ShardStatus::Reused, ..shard.clone() };
        self.layers.push(Layer { shard: reused, interval: shard.layer });
        if !self.foreign && shard.layer > 0 {
            self.removals_in(shard.layer);
            header.dropped.iter().for_each(|namespace| self.removals.namespace(*namespace));
        }
        Ok(true)
    }

    /// Keys that a layer removes.
    pub(super) fn removed(&mut self, layer: u32, namespace: i64, hashes: &[u64], keys: &[&[u8]]) {
        if !self.foreign {
            self.removals_in(layer);
            hashes.iter().zip(keys).for_each(|(hash, key)| self.removals.key(namespace, *hash, key));
        }
    }

    fn removals_in(&mut self, layer: u32) {
        if self.removals_of != layer {
            self.removals.end(self.removals_of);
            self.removals_of = layer;
        }
    }

    /// Whether the next checkpoint may build on these shards, as far as is known.
    pub(super) fn builds(&self) -> bool {
        !self.foreign && !self.layers.is_empty()
    }

    /// The next checkpoint can't build on these shards.
    pub(super) fn part(&mut self) {
        self.foreign = true;
    }

    /// The interval that begins behind the layers that are known.
    pub(super) fn interval(&self) -> u32 {
        self.interval + 1
    }

    /// What is known of event time.
    pub(super) fn watermarks(&self, spec: &StateSpec) -> KeyGroupWatermarks {
        self.watermarks.within(spec.key_groups)
    }

    /// All shards have been taken in.
    pub(super) fn finish(mut self, spec: &StateSpec) -> Restored {
        self.removals.end(self.removals_of);
        let watermarks = self.watermarks(spec);
        let (lineage, removals) = if self.foreign {
            (Lineage::default(), Removals::default())
        } else {
            let changes = self.layers.iter().skip(1).map(|l| (l.interval, l.shard.rows)).collect();
            let lineage =
                Lineage { base: self.layers, watermarks: watermarks.clone(), under_way: BTreeMap::new(), changes };
            (lineage, self.removals)
        };
        Restored { watermarks, lineage, removals }
    }
}
