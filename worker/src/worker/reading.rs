//! Reads what a subtask needs of a shard: all of it, or the blocks that hold its key groups.
//!
//! Invariant: every byte that is handed over has been verified. A whole file by its hash; a part by the hash of the file's
//! end, the index that this covers, and the checksums of the blocks that the index names.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use floodmark_snapshot::{
    Error, KeyGroupRange, Result, Shard, ShardKind,
    manifest::{TAIL_HASHED, tail_hash},
    restore::Snapshot,
};
use floodmark_state::shard::{Opened, Reader, TAIL_LEN};
use futures::{StreamExt, TryStreamExt, stream};

/// Shards below this are read whole, bytes: one request costs more.
const READ_WHOLE_MAX: u64 = 1 << 20;
/// Ranges of one shard read at the same time.
const RANGES_IN_FLIGHT_MAX: usize = 8;
const _: () = assert!(TAIL_LEN >= TAIL_HASHED, "the first read covers the end's hash");

/// The bytes of a shard, or of a keyed one a file with at least the rows of `owned`.
pub(super) async fn read(snapshot: &Snapshot, shard: &Shard, owned: KeyGroupRange) -> Result<Bytes> {
    if shard.key_groups.is_none_or(|g| owned.first <= g.first && g.last <= owned.last) {
        return snapshot.read(shard).await;
    }
    Parts::open(snapshot, shard).await?.read(snapshot, owned).await
}

/// A shard that is read part by part.
pub(super) struct Parts {
    pub(super) shard: Shard,
    content: Content,
}

enum Content {
    Whole(Bytes),
    /// What is where in the file.
    Indexed(Reader),
}

impl Parts {
    /// Reads what all parts need: the index, or a small file as a whole.
    ///
    /// # Errors
    /// `Corrupt` if the shard is damaged.
    pub(super) async fn open(snapshot: &Snapshot, shard: &Shard) -> Result<Self> {
        let content = match &shard.tail {
            Some(tail) if shard.kind == ShardKind::Keyed && shard.size > READ_WHOLE_MAX => {
                Content::Indexed(index(snapshot, shard, tail).await.map_err(|e| of(shard, e))?)
            }
            Some(_) | None => Content::Whole(snapshot.read(shard).await?),
        };
        Ok(Self { shard: shard.clone(), content })
    }

    /// Reads a file with at least the rows of `key_groups`.
    ///
    /// # Errors
    /// `Corrupt` if the shard is damaged there.
    pub(super) async fn read(&self, snapshot: &Snapshot, key_groups: KeyGroupRange) -> Result<Bytes> {
        match &self.content {
            Content::Whole(bytes) => Ok(bytes.clone()),
            Content::Indexed(reader) => {
                cut(snapshot, &self.shard, reader, key_groups).await.map_err(|e| of(&self.shard, e))
            }
        }
    }
}

fn of(shard: &Shard, error: Error) -> Error {
    error.context(format!("shard {}", shard.path))
}

async fn index(snapshot: &Snapshot, shard: &Shard, hash: &str) -> Result<Reader> {
    let mut from = shard.size.saturating_sub(TAIL_LEN as u64);
    loop {
        let tail = snapshot.read_range(shard, from, shard.size).await?;
        if tail_hash(&tail) != hash {
            return Err(Error::corrupt("its end is not what was written"));
        }
        match Reader::open(shard.size, &tail)? {
            Opened::Ready(reader) => return Ok(reader),
            Opened::More { from: earlier } if earlier < from => from = earlier,
            Opened::More { .. } => return Err(Error::corrupt("its index has no beginning")),
        }
    }
}

async fn cut(snapshot: &Snapshot, shard: &Shard, reader: &Reader, key_groups: KeyGroupRange) -> Result<Bytes> {
    let runs = runs(reader.ranges(key_groups));
    let read: Vec<Vec<(usize, Bytes)>> = stream::iter(runs)
        .map(|(range, blocks)| async move {
            let bytes = snapshot.read_range(shard, range.start, range.end).await?;
            let at = |r: &Range<u64>| (r.start - range.start) as usize..(r.end - range.start) as usize;
            // Each block has its own allocation: a few wanted rows keep no long run alive.
            let own = |r: &Range<u64>| BytesMut::from(&bytes[at(r)]).freeze();
            Ok::<_, Error>(blocks.iter().map(|(block, r)| (*block, own(r))).collect())
        })
        .buffered(RANGES_IN_FLIGHT_MAX)
        .try_collect()
        .await?;
    let blocks: Vec<(usize, Bytes)> = read.into_iter().flatten().collect();
    reader.cut(&blocks)
}

/// Blocks that follow each other are read in one go.
type Run = (Range<u64>, Vec<(usize, Range<u64>)>);

fn runs(ranges: Vec<(usize, Range<u64>)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (block, range) in ranges {
        match runs.last_mut() {
            Some((run, blocks)) if run.end == range.start => {
                run.end = range.end;
                blocks.push((block, range));
            }
            Some(_) | None => runs.push((range.clone(), vec![(block, range)])),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::{array::Int64Array, record_batch::RecordBatch};
    use floodmark_snapshot::{
        Disposition, Epoch, JobId, KeyGroup, Manifest,
        manifest::hash_hex,
        storage::{self, Storage},
    };
    use floodmark_state::shard::{Header, Writer};

    use super::*;

    const GROUPS: u16 = 16;

    /// A state file with rows in each of 16 key groups.
    fn file(salt: i64) -> Bytes {
        let rows = |group: u16| {
            let numbers: Int64Array = (0..20_000).map(|n| i64::from(group) * 1_000_000 + n * 7 + salt).collect();
            RecordBatch::try_from_iter([("n", Arc::new(numbers) as _)]).unwrap()
        };
        let mut writer = Writer::new(Header::new(None).of(&rows(0).schema()));
        (0..GROUPS).for_each(|group| writer.push(KeyGroup(group), rows(group)).unwrap());
        writer.finish().unwrap()
    }

    fn range(first: u16, last: u16) -> KeyGroupRange {
        KeyGroupRange { first: KeyGroup(first), last: KeyGroup(last) }
    }

    async fn stored(bytes: &Bytes) -> (Arc<dyn Storage>, Snapshot, Shard) {
        let storage = storage::open("memory://").unwrap();
        storage.put("a.state", bytes.clone()).await.unwrap();
        let job = JobId { namespace: "n".into(), name: "j".into(), uid: "u".into() };
        let manifest = Manifest { max_parallelism: GROUPS, ..Manifest::new(job, Epoch(1)) };
        let shard = Shard {
            size: bytes.len() as u64,
            hash: hash_hex(bytes),
            tail: Some(tail_hash(bytes)),
            key_groups: Some(range(0, GROUPS - 1)),
            ..Shard::new("a.state", ShardKind::Keyed)
        };
        (storage.clone(), Snapshot::new(Arc::new(manifest), storage, ""), shard)
    }

    #[tokio::test]
    async fn a_subtask_gets_the_rows_of_its_key_groups_and_little_else() {
        let bytes = file(0);
        let (_, snapshot, shard) = stored(&bytes).await;
        for (first, last) in [(0, 0), (3, 7), (15, 15), (0, 14)] {
            let owned = range(first, last);
            let part = read(&snapshot, &shard, owned).await.unwrap();
            let reader = Reader::verified(&part).unwrap();
            assert_eq!(reader.rows(), u64::from(last - first + 1) * 20_000, "{owned}");
            assert!(part.len() < bytes.len() * usize::from(last - first + 2) / usize::from(GROUPS), "{owned}");
        }
        assert_eq!(read(&snapshot, &shard, range(0, GROUPS - 1)).await.unwrap(), bytes, "all of it, as it is");
    }

    #[tokio::test]
    async fn damage_in_a_part_and_a_file_in_the_place_of_another_are_found() {
        let bytes = file(0);
        let (storage, snapshot, shard) = stored(&bytes).await;
        let owned = range(3, 4);
        let reader = Reader::whole(&bytes).unwrap();
        let mut places: Vec<u64> = (bytes.len() as u64 - 400..bytes.len() as u64).collect();
        for (_, block) in reader.ranges(owned) {
            places.extend(block.step_by(9_973));
        }
        for at in places {
            let mut bad = bytes.to_vec();
            bad[at as usize] ^= 4;
            storage.put("a.state", bad.into()).await.unwrap();
            let error = read(&snapshot, &shard, owned).await.unwrap_err();
            assert_eq!(error.disposition(), Disposition::Corrupt, "byte {at}: {error}");
        }
        // The index has numbers in plain words, so not every other file is as long.
        let other = (1..50).map(file).find(|other| other.len() == bytes.len()).unwrap();
        storage.put("a.state", other).await.unwrap();
        let error = read(&snapshot, &shard, owned).await.unwrap_err().to_string();
        assert_eq!(error, "shard a.state: its end is not what was written");
    }
}
