//! Reads the state of one operator and subtask slice by slice, while its task runs: see [`floodmark_dataflow::arrival`].

use std::future::poll_fn;

use floodmark_dataflow::{
    RestoredShard,
    arrival::{Feed, Slice},
};
use floodmark_snapshot::{KeyGroup, KeyGroupRange, Result, Shard};

use super::reading::{Files, Parts};

/// Where a subtask's state is read from, and where it goes.
pub(super) struct Slices {
    pub(super) files: Files,
    /// By earlier subtask and layer.
    pub(super) shards: Vec<Shard>,
    /// The key groups of the subtask.
    pub(super) owned: KeyGroupRange,
    /// Bytes of a slice, about.
    pub(super) slice_bytes: u64,
    pub(super) feed: Feed,
}

impl Slices {
    /// Reads everything, as fast as the task takes it.
    pub(super) async fn run(self) {
        let Self { files, shards, owned, slice_bytes, feed } = self;
        let mut parts = Vec::with_capacity(shards.len());
        for shard in &shards {
            match Parts::open(&files, shard).await {
                Ok(opened) => parts.push(opened),
                Err(error) => return feed.put(Err(error)),
            }
        }
        for key_groups in cut_into(owned, slices(&shards, owned, slice_bytes)) {
            poll_fn(|context| feed.poll_room(context)).await;
            if feed.is_closed() {
                return;
            }
            let slice = read(&files, &parts, key_groups).await;
            let failed = slice.is_err();
            feed.put(slice);
            if failed {
                return;
            }
        }
    }
}

async fn read(files: &Files, parts: &[Parts], key_groups: KeyGroupRange) -> Result<Slice> {
    let mut shards = Vec::new();
    for part in parts {
        // Also one without rows in it: what a shard says of its state is part of every slice.
        let content = part.read(files, key_groups).await?;
        shards.push(RestoredShard { slice: Some(key_groups), ..RestoredShard::of(part.shard.clone(), content) });
    }
    Ok(Slice { key_groups, shards })
}

/// How many slices these shards make, as far as they are the subtask's.
fn slices(shards: &[Shard], owned: KeyGroupRange, slice_bytes: u64) -> u64 {
    let bytes = |shard: &Shard| shard.cut_to(owned).map_or(shard.size, |own| own.own_size());
    shards.iter().map(bytes).sum::<u64>().div_ceil(slice_bytes.max(1)).clamp(1, owned.width())
}

/// Cuts a range into `n` of about the same width; `n` is no more than it has key groups.
fn cut_into(range: KeyGroupRange, n: u64) -> impl Iterator<Item = KeyGroupRange> {
    let (first, width) = (u64::from(range.first.0), u64::from(range.last.0 - range.first.0) + 1);
    let start = move |i: u64| (first + i * width / n) as u16;
    (0..n).map(move |i| KeyGroupRange { first: KeyGroup(start(i)), last: KeyGroup(start(i + 1) - 1) })
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::ShardKind;

    use super::*;

    fn range(first: u16, last: u16) -> KeyGroupRange {
        KeyGroupRange { first: KeyGroup(first), last: KeyGroup(last) }
    }

    #[test]
    fn slices_are_next_to_each_other_and_cover_all() {
        for (first, last) in [(0, 127), (5, 5), (64, 127), (0, 32_767)] {
            let width = u64::from(last - first) + 1;
            for n in [1, 2, 3, 7, 64, width].into_iter().filter(|n| *n <= width) {
                let slices: Vec<_> = cut_into(range(first, last), n).collect();
                assert_eq!(slices.len() as u64, n);
                assert_eq!((slices[0].first.0, slices[slices.len() - 1].last.0), (first, last));
                assert!(slices.iter().all(|s| s.first <= s.last));
                assert!(slices.windows(2).all(|w| w[1].first.0 == w[0].last.0 + 1), "{n} of {width}");
            }
        }
    }

    #[test]
    fn a_subtask_has_as_many_slices_as_its_share_of_the_files_needs() {
        let shard = |size, groups| Shard { size, key_groups: groups, ..Shard::new("a", ShardKind::Keyed) };
        let owned = range(0, 63);
        assert_eq!(slices(&[shard(0, None)], owned, 100), 1);
        assert_eq!(slices(&[shard(1_280, Some(range(0, 127)))], owned, 100), 7, "half of it");
        assert_eq!(slices(&[shard(1_280, Some(range(0, 63))), shard(20, None)], owned, 100), 13);
        assert_eq!(slices(&[shard(u64::MAX / 2, Some(range(0, 63)))], owned, 100), 64, "one key group at least");
        let cut = shard(1_280, Some(range(0, 127))).cut_to(range(32, 127)).unwrap();
        assert_eq!(slices(&[cut], owned, 100), 4, "a quarter of the file");
    }
}
