//! What the code that reads a file says of its bytes, without a job around it.

use std::sync::Arc;

use bytes::Bytes;
use floodmark_snapshot::{
    Disposition, Epoch, Error, Manifest, Result, Shard, ShardKind,
    block::read_blocks,
    log,
    restore::Snapshot,
    savepoint::{MANIFEST_FILE, Savepoint},
    sealed,
};
use floodmark_state::shard::Reader;
use futures::executor::block_on;

use crate::{
    specimen::{Role, Specimen},
    world::{MapStorage, Objects, STAGED},
};

/// Where a shard that is read alone stands in its storage.
const ALONE: &str = "shard";

/// Reads a file as whoever needs it does, and answers what was wrong with it. An orphan is read by nobody. Unless the bytes are
/// those of another file (`replaced`), a file with checksums of its own must be found out without the manifest, too.
///
/// # Panics
/// When what is wrong is not said to be damage, or the file is not named.
#[must_use]
pub fn damage_of(specimen: &Specimen, path: &str, role: &Role, bytes: &Bytes, replaced: bool) -> Option<Error> {
    let found = match role {
        Role::Orphan => None,
        Role::Entry(_) => log::decode(bytes).err(),
        Role::SavepointManifest => {
            let read: Result<Savepoint> = sealed::open("savepoint", MANIFEST_FILE, bytes);
            read.err()
        }
        Role::Shard(_) | Role::SavepointShard(_) => {
            let mut manifests = specimen.retained.iter().chain([&specimen.savepoint]);
            let shard = manifests.find_map(|m| m.shards().find(|s| path.ends_with(&s.path)))?;
            verify(shard, bytes, replaced)
        }
    };
    if let Some(error) = &found {
        assert_eq!(error.disposition(), Disposition::Corrupt, "{path}: {error}");
    }
    found
}

/// What verifying a checkpoint of just this shard says; as `floodmark checkpoints verify` does, and a restore.
fn verify(shard: &Shard, bytes: &Bytes, replaced: bool) -> Option<Error> {
    let alone = Shard { path: ALONE.to_owned(), ..shard.clone() };
    let storage = MapStorage::of(Objects::from([(ALONE.to_owned(), bytes.clone())]));
    let mut manifest = Manifest::new(crate::run::job_id(), Epoch(1));
    manifest.operators.entry("one".into()).or_default().shards.push(alone.clone());
    let snapshot = Snapshot::new(Arc::new(manifest), storage, "");
    let verified = block_on(snapshot.verify()).expect("a storage in memory can be read");
    let read = block_on(snapshot.read(&alone)).err();
    assert_eq!(verified.len(), usize::from(read.is_some()), "verifying and reading disagree on {}", shard.path);
    if let Some(error) = &read {
        assert!(error.to_string().contains(ALONE), "{error}");
        assert!(replaced || opened(shard.kind, bytes).is_none_or(|opened| opened.is_err()), "{}: {error}", shard.path);
    }
    read
}

/// Whether the file itself says that it is intact; `None` for one that can't tell.
fn opened(kind: ShardKind, bytes: &Bytes) -> Option<Result<()>> {
    match kind {
        ShardKind::Keyed => Some(Reader::verified(bytes).map(drop)),
        ShardKind::Channel => Some(read_blocks("rows", bytes).map(drop)),
        ShardKind::Staged => Some(read_blocks(STAGED, bytes).map(drop)),
        ShardKind::RocksDb | ShardKind::Split | ShardKind::Union | ShardKind::Broadcast => None,
    }
}
