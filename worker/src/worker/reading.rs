//! Reads what a subtask needs of a shard: all of it, or the blocks that hold its key groups; from the local copy if there is one that
//! can be used, else from the storage.
//!
//! Invariant: every byte that is handed over has been verified. A whole file by its hash; a part by the hash of the file's
//! end, the index that this covers, and the checksums of the blocks that the index names.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use floodmark_snapshot::{
    Env, Error, KeyGroupRange, Result, Shard, ShardKind,
    manifest::{TAIL_HASHED, hash_hex, tail_hash},
    restore::Snapshot,
};
use floodmark_state::{
    Content,
    shard::{Opened, Part, Reader, TAIL_LEN},
};
use futures::{StreamExt, TryStreamExt, stream};

use super::copies::{Copy, LocalCopies};

/// Shards below this are read whole, bytes: one request costs more.
const READ_WHOLE_MAX: u64 = 1 << 20;
/// Ranges of one shard read at the same time.
const RANGES_IN_FLIGHT_MAX: usize = 8;
const _: () = assert!(TAIL_LEN >= TAIL_HASHED, "the first read covers the end's hash");

/// A snapshot's files, and where there may be copies of them.
#[derive(Clone)]
pub(super) struct Files {
    pub(super) snapshot: Snapshot,
    pub(super) env: Env,
    /// Only of a snapshot that is the job's own.
    pub(super) copies: Option<Arc<LocalCopies>>,
}

impl Files {
    /// All of a shard.
    ///
    /// # Errors
    /// `Corrupt` if it is damaged in the storage.
    pub(super) async fn read(&self, shard: &Shard) -> Result<Bytes> {
        let Some(copies) = &self.copies else { return self.snapshot.read(shard).await };
        if let Some(copy) = copies.find(&self.env, shard) {
            match copy.read().await {
                Ok(bytes) if bytes.len() as u64 == shard.size && hash_hex(&bytes) == shard.hash => {
                    copies.used();
                    return Ok(bytes);
                }
                Ok(_) => copies.unusable(&self.env, shard, &Error::corrupt("it is not what was written")),
                Err(error) => copies.unusable(&self.env, shard, &error),
            }
        }
        let bytes = self.snapshot.read(shard).await?;
        // The next attempt may begin from it, too.
        copies.write(&self.env, self.snapshot.manifest.epoch, &shard.path, bytes.clone()).await;
        Ok(bytes)
    }

    /// All of a shard, or of a keyed one a part with at least the rows of `owned`.
    ///
    /// # Errors
    /// `Corrupt` if it is damaged in the storage.
    pub(super) async fn read_of(&self, shard: &Shard, owned: KeyGroupRange) -> Result<Content> {
        let all = shard.cut_from.or(shard.key_groups);
        if all.is_none_or(|g| owned.first <= g.first && g.last <= owned.last) {
            return self.read(shard).await.map(Content::File);
        }
        Parts::open(self, shard).await?.read(self, owned).await
    }

    async fn index(&self, shard: &Shard, hash: &str) -> Result<Reader> {
        if let Some(copies) = &self.copies
            && let Some(copy) = copies.find(&self.env, shard)
        {
            match index(&Place::Copy(&copy), shard, hash).await {
                Ok(reader) => {
                    copies.used();
                    return Ok(reader);
                }
                Err(error) => copies.unusable(&self.env, shard, &error),
            }
        }
        index(&Place::Storage(&self.snapshot), shard, hash).await
    }

    async fn part(&self, shard: &Shard, reader: &Arc<Reader>, key_groups: KeyGroupRange) -> Result<Part> {
        if let Some(copies) = &self.copies
            && let Some(copy) = copies.find(&self.env, shard)
        {
            match part(&Place::Copy(&copy), shard, reader, key_groups).await {
                Ok(part) => {
                    copies.used();
                    return Ok(part);
                }
                Err(error) => copies.unusable(&self.env, shard, &error),
            }
        }
        part(&Place::Storage(&self.snapshot), shard, reader, key_groups).await
    }
}

/// Where parts of a shard are read from.
enum Place<'a> {
    Copy(&'a Copy),
    Storage(&'a Snapshot),
}

impl Place<'_> {
    async fn read(&self, shard: &Shard, from: u64, to: u64) -> Result<Bytes> {
        match self {
            Self::Copy(copy) => copy.read_range(from, to).await,
            Self::Storage(snapshot) => snapshot.read_range(shard, from, to).await,
        }
    }
}

/// A shard that is read part by part.
pub(super) struct Parts {
    pub(super) shard: Shard,
    source: Source,
}

enum Source {
    Whole(Bytes),
    /// What is where in the file.
    Indexed(Arc<Reader>),
}

impl Parts {
    /// Reads what all parts need: the index, or a small file as a whole.
    ///
    /// # Errors
    /// `Corrupt` if the shard is damaged.
    pub(super) async fn open(files: &Files, shard: &Shard) -> Result<Self> {
        let source = match &shard.tail {
            Some(tail) if shard.kind == ShardKind::Keyed && shard.size > READ_WHOLE_MAX => {
                Source::Indexed(files.index(shard, tail).await.map_err(|e| of(shard, e))?.into())
            }
            Some(_) | None => Source::Whole(files.read(shard).await?),
        };
        Ok(Self { shard: shard.clone(), source })
    }

    /// Reads at least the rows of `key_groups`.
    ///
    /// # Errors
    /// `Corrupt` if the shard is damaged there.
    pub(super) async fn read(&self, files: &Files, key_groups: KeyGroupRange) -> Result<Content> {
        match &self.source {
            Source::Whole(bytes) => Ok(Content::File(bytes.clone())),
            Source::Indexed(reader) => {
                // Of a shard that is cut nobody wants the rest.
                let own = self.shard.key_groups.map_or(Some(key_groups), |own| own.common(&key_groups));
                let part = match own {
                    Some(own) => files.part(&self.shard, reader, own).await,
                    None => reader.part(&[]),
                };
                part.map(Content::Part).map_err(|e| of(&self.shard, e))
            }
        }
    }
}

fn of(shard: &Shard, error: Error) -> Error {
    error.context(format!("shard {}", shard.path))
}

async fn index(place: &Place<'_>, shard: &Shard, hash: &str) -> Result<Reader> {
    let mut from = shard.size.saturating_sub(TAIL_LEN as u64);
    loop {
        let tail = place.read(shard, from, shard.size).await?;
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

async fn part(place: &Place<'_>, shard: &Shard, reader: &Arc<Reader>, key_groups: KeyGroupRange) -> Result<Part> {
    let runs = runs(reader.ranges(key_groups));
    let read: Vec<Vec<(usize, Bytes)>> = stream::iter(runs)
        .map(|(range, blocks)| async move {
            let bytes = place.read(shard, range.start, range.end).await?;
            let at = |r: &Range<u64>| (r.start - range.start) as usize..(r.end - range.start) as usize;
            Ok::<_, Error>(blocks.iter().map(|(block, r)| (*block, bytes.slice(at(r)))).collect())
        })
        .buffered(RANGES_IN_FLIGHT_MAX)
        .try_collect()
        .await?;
    let blocks: Vec<(usize, Bytes)> = read.into_iter().flatten().collect();
    reader.part(&blocks)
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
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    use arrow::{array::Int64Array, record_batch::RecordBatch};
    use floodmark_snapshot::{
        Disposition, Epoch, JobId, KeyGroup, Manifest,
        manifest::hash_hex,
        storage::{self, Storage},
    };
    use floodmark_state::shard::{Header, Writer};

    use super::*;
    use crate::CopyUses;

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

    async fn stored(bytes: &Bytes) -> (Arc<dyn Storage>, Files, Shard) {
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
        let snapshot = Snapshot::new(Arc::new(manifest), storage.clone(), "");
        (storage, Files { snapshot, env: Env::system(), copies: None }, shard)
    }

    #[tokio::test]
    async fn a_subtask_gets_the_rows_of_its_key_groups_and_little_else() {
        let bytes = file(0);
        let (_, files, shard) = stored(&bytes).await;
        for (first, last) in [(0, 0), (3, 7), (15, 15), (0, 14)] {
            let owned = range(first, last);
            let part = files.read_of(&shard, owned).await.unwrap();
            assert_eq!(rows(&part), usize::from(last - first + 1) * 20_000, "{owned}");
            assert!(part.size() < bytes.len() * usize::from(last - first + 2) / usize::from(GROUPS), "{owned}");
        }
        let all = files.read_of(&shard, range(0, GROUPS - 1)).await.unwrap();
        assert_eq!(all, Content::File(bytes), "all of it, as it is");
    }

    /// How many rows a part has, whatever their key groups.
    fn rows(part: &Content) -> usize {
        let Content::Part(part) = part else { panic!("it is all of a file") };
        part.blocks(range(0, GROUPS - 1)).flat_map(|(_, rows)| rows.unwrap()).map(|rows| rows.num_rows()).sum()
    }

    #[tokio::test]
    async fn of_a_shard_that_is_cut_nothing_is_read_but_its_own_key_groups() {
        let bytes = file(0);
        let (_, files, shard) = stored(&bytes).await;
        let cut = shard.cut_to(range(4, 7)).unwrap();
        for (owned, groups) in [(range(0, GROUPS - 2), 4), (range(6, 9), 2), (range(0, 3), 0), (range(9, 12), 0)] {
            let parts = Parts::open(&files, &cut).await.unwrap();
            let part = parts.read(&files, owned).await.unwrap();
            assert_eq!(rows(&part), groups * 20_000, "{owned}");
            assert_eq!(files.read_of(&cut, owned).await.unwrap(), part, "{owned}");
        }
        assert_eq!(
            files.read_of(&cut, range(0, GROUPS - 1)).await.unwrap(),
            Content::File(bytes),
            "who has all key groups reads it as it is"
        );
    }

    #[tokio::test]
    async fn damage_in_a_part_and_a_file_in_the_place_of_another_are_found() {
        let bytes = file(0);
        let (storage, files, shard) = stored(&bytes).await;
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
            let error = files.read_of(&shard, owned).await.unwrap_err();
            assert_eq!(error.disposition(), Disposition::Corrupt, "byte {at}: {error}");
        }
        // The index has numbers in plain words, so not every other file is as long.
        let other = (1..50).map(file).find(|other| other.len() == bytes.len()).unwrap();
        storage.put("a.state", other).await.unwrap();
        let error = files.read_of(&shard, owned).await.unwrap_err().to_string();
        assert_eq!(error, "shard a.state: its end is not what was written");
    }

    /// Copies in a folder of their own, with one of this shard.
    async fn copied(files: &mut Files, root: &Path, shard: &Shard, bytes: &Bytes) -> Arc<LocalCopies> {
        let copies = Arc::new(LocalCopies::open(root, u64::MAX, &files.env).unwrap());
        copies.write(&files.env, Epoch(1), &shard.path, bytes.clone()).await;
        files.copies = Some(copies.clone());
        copies
    }

    /// The files in all folders of processes, but for their locks.
    fn copies_in(root: &Path) -> Vec<PathBuf> {
        let folders = fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir());
        let files = folders.flat_map(|f| fs::read_dir(f).unwrap()).map(|e| e.unwrap().path());
        files.filter(|f| f.file_name().unwrap() != "lock").collect()
    }

    #[tokio::test]
    async fn a_copy_stands_in_for_the_storage() {
        let (bytes, root) = (file(0), tempfile::tempdir().unwrap());
        let (storage, mut files, shard) = stored(&bytes).await;
        let from_storage = files.read_of(&shard, range(3, 4)).await.unwrap();
        let copies = copied(&mut files, root.path(), &shard, &bytes).await;
        storage.delete("a.state").await.unwrap();
        assert_eq!(files.read_of(&shard, range(3, 4)).await.unwrap(), from_storage);
        assert_eq!(files.read_of(&shard, range(0, GROUPS - 1)).await.unwrap(), Content::File(bytes));
        assert_eq!(copies.uses(), CopyUses { hits: 3, misses: 0, unusable: 0 }, "index, blocks, all");
        let longer = Shard { size: shard.size + 1, ..shard.clone() };
        let other = Shard { hash: hash_hex(b"another"), ..shard };
        for shard in [longer, other] {
            let error = files.read_of(&shard, range(0, GROUPS - 1)).await.unwrap_err();
            assert_eq!(error.disposition(), Disposition::Corrupt, "it is missing in the storage");
        }
    }

    #[tokio::test]
    async fn a_copy_that_is_damaged_or_gone_is_passed_over() {
        let bytes = file(0);
        let block = Reader::whole(&bytes).unwrap().ranges(range(3, 4))[0].1.start as usize + 100;
        type Damage<'a> = (&'a str, &'a dyn Fn(&Path));
        let damages: [Damage<'_>; 4] = [
            ("a block", &|copy| flip(copy, block)),
            ("the end", &|copy| flip(copy, bytes.len() - 3)),
            ("cut", &|copy| fs::write(copy, &bytes[..bytes.len() / 2]).unwrap()),
            ("gone", &|copy| fs::remove_file(copy).unwrap()),
        ];
        for (what, damage) in damages {
            for owned in [range(3, 4), range(0, GROUPS - 1)] {
                let (_, mut files, shard) = stored(&bytes).await;
                let expected = files.read_of(&shard, owned).await.unwrap();
                let root = tempfile::tempdir().unwrap();
                let copies = copied(&mut files, root.path(), &shard, &bytes).await;
                damage(&copies_in(root.path())[0]);
                assert_eq!(files.read_of(&shard, owned).await.unwrap(), expected, "{what}, {owned}");
                assert_eq!(copies.uses().unusable, 1, "{what}, {owned}");
                assert_eq!(files.read_of(&shard, owned).await.unwrap(), expected, "{what}, {owned}");
                assert_eq!(copies.uses().unusable, 1, "it is tried once: {what}, {owned}");
            }
        }
    }

    fn flip(path: &Path, at: usize) {
        let mut bytes = fs::read(path).unwrap();
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    }

    #[tokio::test]
    async fn a_process_uses_no_copies_but_its_own_and_keeps_what_it_has_read() {
        let (bytes, root) = (file(0), tempfile::tempdir().unwrap());
        let (storage, mut files, shard) = stored(&bytes).await;
        let others = copied(&mut files, root.path(), &shard, &bytes).await;
        let own = Arc::new(LocalCopies::open(root.path(), u64::MAX, &files.env).unwrap());
        files.copies = Some(own.clone());
        files.read_of(&shard, range(0, GROUPS - 1)).await.unwrap();
        assert_eq!(own.uses(), CopyUses { hits: 0, misses: 1, unusable: 0 });
        storage.delete("a.state").await.unwrap();
        let again = files.read_of(&shard, range(0, GROUPS - 1)).await.unwrap();
        assert_eq!(again, Content::File(bytes), "kept when it was read");
        assert_eq!(own.uses(), CopyUses { hits: 1, misses: 1, unusable: 0 });
        assert_eq!((others.uses(), copies_in(root.path()).len()), (CopyUses::default(), 2));
        drop((files, own, others));
        assert_eq!(copies_in(root.path()).len(), 0, "copies go with the process");
    }
}
