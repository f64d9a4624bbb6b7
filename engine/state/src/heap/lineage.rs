//! Which layers a checkpoint consists of: those of the last completed one, and what has changed since. Pure.
//!
//! When key groups have moved, a subtask goes on from the parts of others' layers that have its key groups: then there are several
//! layers of one number, of different key groups, and the first checkpoint writes a layer above all of them.
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

/// Layers of a checkpoint, at most. Then the upper ones become one: see [`standing`].
const LAYERS_MAX: usize = 16;
/// Layers beyond those that the last checkpoint of an attempt and the first of the next may have: output waits for these, and whoever
/// brings layers together writes much.
const LAYERS_IN_HASTE: usize = 4;
/// Shards of all layers, at most: each layer may come from several earlier subtasks. Then the same is done.
const SHARDS_MAX: usize = 64;
/// Shards of the lowest layer, at most. Then everything is written anew.
const LOWEST_MAX: usize = 16;
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
    /// Whether the last layer has not all key groups, so that nobody would know the watermarks of the others by it.
    uneven: bool,
    /// Whether no checkpoint is complete since a restore.
    fresh: bool,
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

    /// What a checkpoint at the end of `interval`, in which so many rows `changed`, consists of. `ends` says whether tasks end
    /// behind it.
    pub(super) fn plan(
        &mut self,
        interval: u32,
        changed: u64,
        rows: u64,
        watermarks: &KeyGroupWatermarks,
        ends: bool,
    ) -> Part {
        let haste = ends || self.fresh;
        self.note(interval, changed);
        let whole = Part { kept: Vec::new(), since: None, changed: rows };
        let (Some(first), Some(last)) = (self.base.first(), self.base.last()) else { return whole };
        let lowest = &self.base[..self.base.iter().take_while(|layer| layer.interval == first.interval).count()];
        let size = |layers: &[Layer]| layers.iter().map(|layer| layer.shard.own_size()).sum::<u64>();
        let lowest_rows: u64 = lowest.iter().map(|layer| layer.shard.rows).sum();
        let state = size(lowest).saturating_mul(rows) / lowest_rows.max(1);
        let waste_max = if haste { WASTE_MAX + 1 } else { WASTE_MAX };
        if size(&self.base) > waste_max * state + WASTE_FREE || lowest.len() > LOWEST_MAX {
            return whole;
        }
        let layers: Vec<&[Layer]> = self.base.chunk_by(|a, b| a.interval == b.interval).collect();
        let layers_max = if haste { LAYERS_MAX + LAYERS_IN_HASTE } else { LAYERS_MAX };
        let full = layers.len() >= layers_max || self.base.len() >= SHARDS_MAX;
        let standing = || standing(&layers.iter().map(|layer| size(layer)).collect::<Vec<_>>());
        let shards = || layers[..standing()].iter().map(|layer| layer.len()).sum::<usize>();
        let kept = match full.then(shards) {
            None => &self.base[..],
            Some(shards) if shards < SHARDS_MAX => &self.base[..shards],
            Some(_) => lowest,
        };
        let since = kept.last().map_or(last.interval, |layer| layer.interval);
        let changed: u64 = self.changes.iter().filter(|(at, _)| *at > since).map(|(_, n)| n).sum();
        // Without changes, also of watermarks, the layers stand as they are.
        let same = changed == 0 && *watermarks == self.watermarks && kept.len() == self.base.len() && !self.uneven;
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
        self.fresh = false;
        let mut base = kept;
        if let Some(uploaded) = uploaded {
            let uploaded = uploaded.lock().unwrap_or_else(PoisonError::into_inner).take()?;
            base.push(Layer { shard: Shard { status: ShardStatus::Reused, ..uploaded }, interval });
            self.uneven = false;
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

/// How many of the lowest layers of these sizes, one at least, stay as they are when those above become one: the lowest, and those that are larger
/// than all above them together. So what is large is seldom written again.
fn standing(sizes: &[u64]) -> usize {
    let Some((top, below)) = sizes.split_last() else { return 1 };
    let (mut stand, mut above) = (below.len().max(1), *top);
    while stand > 1 && below[stand - 1] <= above {
        stand -= 1;
        above = above.saturating_add(below[stand]);
    }
    stand
}

/// What the shards of a restore say, until all are there.
#[derive(Debug, Default)]
pub(super) struct Restoring {
    /// The earlier subtasks.
    subtasks: BTreeSet<u32>,
    watermarks: RestoredWatermarks,
    /// Each shard once, however many slices it comes in.
    seen: Vec<Seen>,
    /// Of each the part in the key groups of the subtask.
    layers: Vec<Layer>,
    /// The slice that came first; all of the state, if it comes in one.
    first_slice: Option<Option<KeyGroupRange>>,
    /// Why checkpoints can't go on from these shards.
    foreign: bool,
    removals: Removals,
    removals_of: u32,
    interval: u32,
}

/// Which shard it is: one file may be several.
#[derive(Debug, PartialEq)]
struct Seen {
    path: String,
    subtask: u32,
    layer: u32,
    key_groups: Option<KeyGroupRange>,
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
        let Shard { subtask, layer, key_groups, .. } = *shard;
        let seen = Seen { path: shard.path.clone(), subtask, layer, key_groups };
        if self.seen.contains(&seen) {
            return Ok(false);
        }
        self.seen.push(seen);
        self.subtasks.insert(shard.subtask);
        self.watermarks.shard(shard.subtask, shard.layer, shard.key_groups, header.watermarks()?);
        // Of a shard that is not in every slice, nobody knows whether rows written meanwhile are newer.
        let late = restored.slice != *self.first_slice.get_or_insert(restored.slice);
        // Namespaces go for all key groups of a subtask, or for none.
        let dropped_elsewhere =
            |own: &Shard| own.key_groups != Some(spec.key_groups) && !header.dropped.is_empty() && shard.layer > 0;
        let own = shard.cut_to(spec.key_groups);
        self.foreign |= late
            || !spec.reuse_restored
            || !same_columns
            || shard.key_groups.is_none()
            || own.as_ref().is_some_and(dropped_elsewhere);
        self.interval = self.interval.max(shard.layer);
        if let Some(own) = own {
            let reused = Shard { status: ShardStatus::Reused, ..own };
            self.layers.push(Layer { shard: reused, interval: shard.layer });
        }
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
            let base = joined(self.layers);
            let lowest = base.first().map_or(0, |layer| layer.interval);
            let above = base.iter().filter(|layer| layer.interval > lowest);
            let changes = above.map(|layer| (layer.interval, layer.shard.rows)).collect();
            let uneven = base.last().is_some_and(|last| last.shard.key_groups != Some(spec.key_groups));
            let (watermarks, under_way) = (watermarks.clone(), BTreeMap::new());
            (Lineage { base, watermarks, under_way, changes, uneven, fresh: true }, self.removals)
        };
        Restored { watermarks, lineage, removals }
    }
}

/// The layers in their order. Parts of a file that lie next to each other become one: so a file that was cut becomes whole again
/// when its key groups come together, and there are not more and more parts of fewer and fewer key groups.
fn joined(mut layers: Vec<Layer>) -> Vec<Layer> {
    let first = |shard: &Shard| shard.key_groups.map(|groups| groups.first);
    layers.sort_by(|a, b| {
        let of = |layer: &Layer| (layer.interval, first(&layer.shard));
        (of(a), &a.shard.path).cmp(&(of(b), &b.shard.path))
    });
    let mut joined: Vec<Layer> = Vec::with_capacity(layers.len());
    for layer in layers {
        let last = joined.last_mut().filter(|last| last.interval == layer.interval);
        match last.and_then(|last| Some((last.shard.joined(&layer.shard)?, last))) {
            Some((both, last)) => last.shard = both,
            None => joined.push(layer),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_that_are_larger_than_all_above_them_stand() {
        for (sizes, expected) in [
            (&[100, 1, 1, 1][..], 1),
            (&[100, 90, 1, 1, 1], 2),
            (&[10, 900, 1, 1], 2),
            (&[100, 90, 40, 20, 20], 2),
            (&[100, 80, 40, 20, 20], 1),
            (&[100, 90, 30, 20, 9], 4),
            (&[1, 1], 1),
            (&[5], 1),
        ] {
            assert_eq!(standing(sizes), expected, "{sizes:?}");
        }
    }
}
