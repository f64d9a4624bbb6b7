//! Snapshots of a state: what happens at the barrier, and what happens later elsewhere.
//!
//! At the barrier, dirty rows are frozen where they are (pointers are cloned) and a job is handed over. The database's thread
//! writes them, and takes a checkpoint: hard links to all data files, so that a compaction takes none away. Only then is it
//! known which files there are; those that the newest completed checkpoint has are named again, the others are uploaded.
//! A whole snapshot is read out of such a checkpoint into the neutral format.
//! Invariant: a checkpoint's folder lives until the last of its files has been read or the snapshot has been dropped.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
};

use bytes::Bytes;
use floodmark_snapshot::{Epoch, Error, KeyGroup, KeyGroupRange, Result, ShardKind, coordination::Barrier};
use floodmark_state::{KeyGroupWatermarks, PendingShard, StateSnapshot, StateSpec};
use rocksdb::{DB, WriteBatch};

use crate::{
    Process,
    database::{self, LiveFile},
    folder::{Folder, failed},
    key,
    lineage::Lineage,
    meta::{self, DataFile, Meta, Span},
    neutral,
    row::Form,
    space::Frozen,
    state::State,
    stored::Stored,
};

/// Frozen rows are written in batches of this many bytes.
const BATCH_BYTES: usize = 1 << 20;

/// A checkpoint on the local disk.
struct Taken {
    folder: Folder,
    /// What is known of data files, some of them of this checkpoint.
    files: Vec<LiveFile>,
}

/// What a checkpoint is about, beside the rows.
struct About {
    epoch: Epoch,
    spec: StateSpec,
    form: Form,
    watermarks: KeyGroupWatermarks,
    namespaces: BTreeMap<i64, Stored>,
}

/// The lineage, whatever became of the thread that last held it.
pub(crate) fn lock(lineage: &Mutex<Lineage>) -> MutexGuard<'_, Lineage> {
    lineage.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The synchronous part of a snapshot.
pub(crate) fn take(state: &mut State, barrier: &Barrier, watermarks: &KeyGroupWatermarks) -> Result<StateSnapshot> {
    state.outgoing.send(&state.database)?;
    let job = state.outgoing.next();
    let mut frozen = Vec::new();
    let max_parallelism = state.spec.max_parallelism;
    for (namespace, space) in &mut state.spaces {
        frozen.extend(space.freeze(job, max_parallelism).map(|rows| (*namespace, rows)));
    }
    let place = state.database.checkpoint_place();
    let (say, taken) = mpsc::sync_channel(1);
    let form = state.form.clone();
    let shared = state.process.clone();
    let process = shared.clone();
    let write_out = move |db: &DB| {
        write_rows(db, &form, max_parallelism, frozen)?;
        let (folder, files) = database::checkpoint(db, place, &process.shared)?;
        // Nobody listens if the checkpoint was given up meanwhile; the folder goes then.
        let _ = say.send(Taken { folder, files });
        Ok(())
    };
    state.outgoing.send_job(&state.database, Box::new(write_out))?;
    debug_assert!(state.spaces.values().all(|space| space.stored.rows() == space.rows()), "a row is not written");
    state.frozen = job;
    let about = About {
        epoch: barrier.epoch,
        spec: state.spec.clone(),
        form: state.form.clone(),
        watermarks: watermarks.clone(),
        // The database is about to have all rows.
        namespaces: state.spaces.iter().map(|(namespace, space)| (*namespace, space.stored.clone())).collect(),
    };
    // The database's folder, in which that of the checkpoint is, must not go before it.
    let database_folder = state.database.folder().clone();
    let taken = move || {
        let taken = taken.recv();
        taken.map_err(|_| Error::abort("the database was closed before its checkpoint was taken"))
    };
    if barrier.whole {
        let About { spec, form, watermarks, .. } = about;
        let shard_bytes = state.process.shard_bytes;
        let expand = move || {
            let folders = (taken()?.folder, database_folder, shared);
            let source = neutral::Source::open(folders, spec, form, watermarks)?;
            Ok(StateSnapshot::of(source.shards(shard_bytes)?))
        };
        return Ok(StateSnapshot::of(vec![PendingShard::standing_for(ShardKind::Keyed, Box::new(expand))]));
    }
    let lineage = state.lineage.clone();
    lock(&lineage).begin(barrier.epoch);
    let expand = move || name_files(&about, taken()?, (database_folder, shared), &lineage);
    Ok(StateSnapshot::of(vec![PendingShard::standing_for(ShardKind::RocksDb, Box::new(expand))]))
}

/// Writes rows as they were at a barrier.
fn write_rows(db: &DB, form: &Form, max_parallelism: u16, frozen: Vec<(i64, Frozen)>) -> Result<()> {
    let mut batch = WriteBatch::default();
    let (mut key, mut value) = (Vec::new(), Vec::new());
    for (namespace, Frozen { rows, slots, written }) in frozen {
        for (at, slot) in slots.iter().enumerate() {
            let (chunk, row) = rows.read(*slot as usize);
            key.clear();
            value.clear();
            key::write(&mut key, KeyGroup::of(chunk.hash(row), max_parallelism), namespace, chunk.key(row));
            form.write(chunk, row, written.get(at).copied().unwrap_or(0), &mut value);
            batch.put(&key, &value);
            if batch.size_in_bytes() >= BATCH_BYTES {
                database::write(db, std::mem::take(&mut batch))?;
            }
        }
    }
    database::write(db, batch)
}

/// Finds out of which shards a checkpoint consists.
fn name_files(
    about: &About,
    taken: Taken,
    around: (Arc<Folder>, Arc<Process>),
    lineage: &Arc<Mutex<Lineage>>,
) -> Result<StateSnapshot> {
    let known: BTreeMap<&str, &LiveFile> = taken.files.iter().map(|f| (f.name.as_str(), f)).collect();
    let (names, manifest) = list(taken.folder.path())?;
    // The folders go when the last file has been read: first the checkpoint's own.
    let folder = Arc::new((taken.folder, around));
    let mut snapshot = StateSnapshot::default();
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        let shard_name = shard_name(&about.spec, &name);
        let path = folder.0.path().join(&name);
        let file = match lock(lineage).checked(&name) {
            Some(file) => file,
            None => DataFile::of(&name, &fs::read(&path).map_err(|e| failed("read", &path, &e))?),
        };
        let live = known.get(name.as_str());
        let span = live.map(|live| span(live, about.spec.key_groups));
        files.push(DataFile { span, ..file.clone() });
        let mut under_way = lock(lineage);
        under_way.check(&file);
        if let Some(shard) = under_way.reuse(about.epoch, &shard_name) {
            snapshot.reused.push(shard);
            continue;
        }
        let (rows, folder, lineage, epoch) =
            (live.map_or(0, |f| f.entries), folder.clone(), lineage.clone(), about.epoch);
        let encode = move || read_again(&folder.0.path().join(&file.name), &file);
        snapshot.pending.push(PendingShard {
            name: Some(shard_name),
            file: Some(path),
            uploaded: Some(Box::new(move |shard| lock(&lineage).uploaded(epoch, shard))),
            // Who needs none of its key groups does without the file.
            ..PendingShard::new(
                ShardKind::RocksDb,
                Some(span.map_or(about.spec.key_groups, |s| s.key_groups)),
                rows,
                Box::new(encode),
            )
        });
    }
    lock(lineage).keep_checked(&files);
    let path = folder.0.path().join(&manifest);
    let manifest_bytes = fs::read(&path).map_err(|e| failed("read", &path, &e))?.into();
    let meta = Meta {
        manifest,
        manifest_bytes,
        files,
        watermarks: about.watermarks.clone(),
        columns: columns(&about.spec, &about.form),
        timed: about.form.timed,
        namespaces: about.namespaces.clone(),
        shape: about.spec.layout.shape().map(|shape| (shape, about.spec.layout.schema())),
    };
    let bytes = meta.encode()?;
    snapshot.pending.push(PendingShard {
        name: Some(shard_name(&about.spec, meta::NAME)),
        ..PendingShard::new(ShardKind::RocksDb, Some(about.spec.key_groups), 0, Box::new(move || Ok(bytes)))
    });
    Ok(snapshot)
}

/// Where a file stands, and which of a subtask's key groups it may have rows of: one at least, so that it goes to somebody.
fn span(file: &LiveFile, all: KeyGroupRange) -> Span {
    let within = |group: KeyGroup| group.clamp(all.first, all.last);
    let of = file.key_groups.unwrap_or(all);
    Span { level: file.level, key_groups: KeyGroupRange { first: within(of.first), last: within(of.last) } }
}

/// What rows consist of, in words: rows of anything else can't be read as these.
pub(crate) fn columns(spec: &StateSpec, form: &Form) -> Vec<String> {
    let schema = spec.layout.schema();
    let travelling = schema.fields().iter().map(|f| format!("{}: {}", f.name(), f.data_type()));
    travelling.chain(form.types.iter().map(|t| format!("{t:?}"))).collect()
}

/// The name by which a snapshot knows a file of a state.
pub(crate) fn shard_name(spec: &StateSpec, file: &str) -> String {
    match spec.shard_name() {
        Some(state) => format!("{state}/{file}"),
        None => file.to_owned(),
    }
}

/// The data files of a checkpoint, in order, and its manifest.
fn list(folder: &Path) -> Result<(Vec<String>, String)> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.map_err(|e| failed("list folder", folder, &e))?;
    let names = entries.into_iter().filter_map(|e| e.file_name().into_string().ok());
    let (mut files, others): (Vec<String>, Vec<String>) = names.partition(|n| DataFile::is_name(n));
    files.sort_unstable();
    let manifest = others.into_iter().find(|n| n.starts_with("MANIFEST-"));
    let manifest =
        manifest.ok_or_else(|| Error::abort(format!("the checkpoint in {} has no manifest", folder.display())))?;
    Ok((files, manifest))
}

/// Reads a file for its upload: it must still be what its checksum was computed of.
fn read_again(path: &Path, file: &DataFile) -> Result<Bytes> {
    let bytes: Bytes = fs::read(path).map_err(|e| failed("read", path, &e))?.into();
    file.verify(&bytes)?;
    Ok(bytes)
}
