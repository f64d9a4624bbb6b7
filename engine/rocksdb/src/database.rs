//! One subtask's database: read on the task's thread, written on its own.

use std::{
    cell::OnceCell,
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use floodmark_snapshot::{KeyGroupRange, Result};
use rocksdb::{
    ColumnFamilyDescriptor, DB, DBPinnableSlice, DEFAULT_COLUMN_FAMILY_NAME, ReadOptions, WriteBatch,
    checkpoint::Checkpoint,
};

use crate::{
    Process,
    failure::failed,
    folder::Folder,
    key,
    options::{self, Shared},
    writer::{Job, Writer},
};

/// The place of the database in its folder.
pub(crate) const PLACE: &str = "database";

/// A data file as the database knows it.
#[derive(Clone, Debug)]
pub(crate) struct LiveFile {
    /// `000042.sst`
    pub(crate) name: String,
    /// Rows, removed and outdated ones too.
    pub(crate) entries: u64,
    /// Its level.
    pub(crate) level: u32,
    /// From its first key's key group to its last one's, if it has any.
    pub(crate) key_groups: Option<KeyGroupRange>,
}

/// Byte strings one behind the other: keys of a batch, or values of rows.
#[derive(Default)]
pub(crate) struct Strings {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Strings {
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    /// Adds one, which `write` appends to what it is given.
    pub(crate) fn push(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        write(&mut self.bytes);
        self.ends.push(self.bytes.len());
    }

    pub(crate) fn get(&self, at: usize) -> &[u8] {
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.bytes[start..self.ends[at]]
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|at| self.get(at))
    }
}

/// See the header of this file. Dropping it ends its thread and removes its folder.
///
/// It is opened when it is first needed: a state that is replaced by a restored one, or never outgrows its memory before it
/// ends, has no database.
pub(crate) struct Database {
    // Dropped before the folder.
    opened: OnceCell<Opened>,
    folder: Arc<Folder>,
    process: Arc<Process>,
    name: String,
    checkpoints: u64,
}

struct Opened {
    // Nobody writes any more when it is closed.
    writer: Writer,
    db: Arc<DB>,
}

impl Database {
    /// The database at [`PLACE`] in the folder, which may be missing: it is an empty one then.
    pub(crate) fn new(process: Arc<Process>, name: String, folder: Folder) -> Self {
        Self { opened: OnceCell::new(), folder: Arc::new(folder), process, name, checkpoints: 0 }
    }

    /// Opens it if it is not open yet.
    pub(crate) fn open(&self) -> Result<()> {
        self.opened().map(drop)
    }

    fn opened(&self) -> Result<&Opened> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened);
        }
        let db = Arc::new(open(&self.process.shared, &self.folder.path().join(PLACE))?);
        let writer = Writer::start(format!("rocksdb {}", self.name), db.clone())?;
        Ok(self.opened.get_or_init(|| Opened { writer, db }))
    }

    /// See [`Writer::submit`].
    pub(crate) fn submit(&self, job: Job) -> Result<u64> {
        self.opened()?.writer.submit(job)
    }

    /// See [`Writer::done`].
    pub(crate) fn done(&self) -> Result<u64> {
        self.opened.get().map_or(Ok(0), |opened| opened.writer.done())
    }

    /// See [`Writer::wait`].
    pub(crate) fn wait(&self, number: u64) -> Result<()> {
        self.opened()?.writer.wait(number)
    }

    /// Looks up the keys at these places of a list, which must be in the order of the keys.
    pub(crate) fn get<'a>(
        &'a self,
        keys: &Strings,
        sorted: &[u32],
    ) -> Result<impl Iterator<Item = Result<Option<DBPinnableSlice<'a>>>>> {
        let keys = sorted.iter().map(|at| keys.get(*at as usize));
        let db = &self.opened()?.db;
        let found = match db.cf_handle(DEFAULT_COLUMN_FAMILY_NAME) {
            Some(rows) => db.batched_multi_get_cf(rows, keys, true),
            // Every database has its default column family.
            None => Vec::new(),
        };
        Ok(found.into_iter().map(|found| found.map_err(|e| failed("read state", &e))))
    }

    /// Calls `take` for the rows from `start` on, as long as they are below `end` and it wants more.
    pub(crate) fn scan(
        &self,
        start: &[u8],
        end: Vec<u8>,
        take: impl FnMut(&[u8], &[u8]) -> Result<bool>,
    ) -> Result<()> {
        scan(&self.opened()?.db, start, end, take)
    }

    /// A new place for a checkpoint, in which nothing is yet.
    pub(crate) fn checkpoint_place(&mut self) -> PathBuf {
        self.checkpoints += 1;
        self.folder.path().join(format!("checkpoint-{}", self.checkpoints))
    }

    /// A place for files that are being made.
    pub(crate) fn folder(&self) -> &Arc<Folder> {
        &self.folder
    }

    /// Bytes in data files.
    pub(crate) fn file_bytes(&self) -> u64 {
        let bytes = |o: &Opened| o.db.property_int_value(rocksdb::properties::TOTAL_SST_FILES_SIZE).ok().flatten();
        self.opened.get().and_then(bytes).unwrap_or(0)
    }
}

/// Opens a database.
fn open(shared: &Shared, place: &Path) -> Result<DB> {
    let options = shared.database();
    let rows = ColumnFamilyDescriptor::new(DEFAULT_COLUMN_FAMILY_NAME, options.clone());
    DB::open_cf_descriptors(&options, place, [rows]).map_err(|e| failed("open database", &e))
}

/// Opens a checkpoint or a piece of one to be read: nothing in its folder changes.
pub(crate) fn open_to_read(shared: &Shared, place: &Path) -> Result<DB> {
    let options = shared.database();
    let rows = ColumnFamilyDescriptor::new(DEFAULT_COLUMN_FAMILY_NAME, options.clone());
    DB::open_cf_descriptors_read_only(&options, place, [rows], false).map_err(|e| failed("open a checkpoint", &e))
}

/// A job that writes a batch.
pub(crate) fn write_job(batch: WriteBatch) -> Job {
    Box::new(move |db| write(db, batch))
}

/// Writes a batch.
pub(crate) fn write(db: &DB, batch: WriteBatch) -> Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    db.write_opt(batch, &options::writes()).map_err(|e| failed("write state", &e))
}

/// Makes a checkpoint: all data files, hard-linked, and a manifest of its own. Rows in memory are written out first.
/// Answers with its files, and maybe others.
pub(crate) fn checkpoint(db: &DB, place: PathBuf, shared: &Shared) -> Result<(Folder, Vec<LiveFile>)> {
    let before = live_files(db)?;
    Checkpoint::new(db)
        .and_then(|c| c.create_checkpoint(&place))
        .map_err(|e| failed("take a checkpoint of the database", &e))?;
    let folder = Folder::adopt(place);
    let after = live_files(db)?;
    if settled(&before, &after) {
        return Ok((folder, after));
    }
    // A compaction has come in between: what the checkpoint has, it alone knows.
    let files = live_files(&open_to_read(shared, folder.path())?)?;
    Ok((folder, files))
}

/// Whether the files of a version between the two stand where the second says: none has gone, and what has come is where all
/// new rows come.
fn settled(before: &[LiveFile], after: &[LiveFile]) -> bool {
    let places = |files: &[LiveFile]| files.iter().map(|f| (f.name.clone(), f.level)).collect::<HashMap<_, _>>();
    let (before, after) = (places(before), places(after));
    before.iter().all(|(name, level)| after.get(name) == Some(level))
        && after.iter().all(|(name, level)| *level == 0 || before.contains_key(name))
}

fn live_files(db: &DB) -> Result<Vec<LiveFile>> {
    let files = db.live_files().map_err(|e| failed("list data files", &e))?;
    let live = |f: rocksdb::LiveFile| LiveFile {
        name: f.name.trim_start_matches('/').to_owned(),
        entries: f.num_entries,
        level: u32::try_from(f.level).unwrap_or(0),
        key_groups: f.start_key.zip(f.end_key).and_then(|(first, last)| {
            Some(KeyGroupRange { first: key::group_of(&first)?, last: key::group_up_to(&last)? })
        }),
    };
    Ok(files.into_iter().map(live).collect())
}

/// See [`Database::scan`].
pub(crate) fn scan(
    db: &DB,
    start: &[u8],
    end: Vec<u8>,
    mut take: impl FnMut(&[u8], &[u8]) -> Result<bool>,
) -> Result<()> {
    let mut options: ReadOptions = options::scan();
    options.set_iterate_upper_bound(end);
    let mut rows = db.raw_iterator_opt(options);
    rows.seek(start);
    while let Some((key, value)) = rows.item() {
        if !take(key, value)? {
            return Ok(());
        }
        rows.next();
    }
    rows.status().map_err(|e| failed("read state", &e))
}
