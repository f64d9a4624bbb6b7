//! Starts a state from the shards of a checkpoint.
//!
//! The files of one earlier subtask are a *piece*: a database as it was at the barrier. If it has exactly our key groups, it
//! becomes ours as it is; otherwise our rows are read out of the pieces in order, written to files and taken in as those.
//! Neutral rows go through the cache like any others.
//! Invariant: RocksDB sees a file only once all its bytes have been found to be those that were uploaded.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::PathBuf,
};

use floodmark_snapshot::{Context, Error, KeyGroupRange, Result, Shard, ShardKind};
use floodmark_state::{KeyGroupWatermarks, RestoredShard, watermarks::RestoredWatermarks};
use rocksdb::SstFileWriter;

use crate::{
    checkpoint,
    database::{self, Database, PLACE},
    failure,
    folder::{Folder, failed},
    key,
    lineage::Lineage,
    meta::{self, DataFile, Meta},
    neutral, options,
    row::Form,
    space::Space,
    state::State,
};

/// Imported rows are written to files of about this many bytes.
const IMPORT_FILE_BYTES: u64 = options::FILE_BYTES;

/// What has been taken in so far.
#[derive(Default)]
pub(crate) struct Restoring {
    pieces: BTreeMap<u32, Piece>,
    pub(crate) watermarks: RestoredWatermarks,
}

struct Piece {
    folder: Folder,
    key_groups: Option<KeyGroupRange>,
    meta: Option<Meta>,
    files: HashMap<String, DataFile>,
    shards: Vec<Shard>,
}

impl State {
    /// Takes in a shard.
    pub(crate) fn take_in(&mut self, shard: &RestoredShard) -> Result<()> {
        let taken = match shard.shard.kind {
            ShardKind::RocksDb => self.take_file(shard),
            ShardKind::Keyed => neutral::take_in(self, shard),
            ShardKind::Split | ShardKind::Union | ShardKind::Broadcast | ShardKind::Channel | ShardKind::Staged => {
                Err(Error::abort("it holds no keyed state"))
            }
        };
        taken.context_with(|| format!("restore {}", shard.shard.path))
    }

    fn take_file(&mut self, shard: &RestoredShard) -> Result<()> {
        let name = shard.shard.name.as_deref().unwrap_or_default();
        let name = name.rsplit_once('/').map_or(name, |(_, file)| file);
        let subtask = shard.shard.subtask;
        let at = self.database.folder().path().join(format!("piece-{subtask}"));
        let piece = match self.restoring.pieces.entry(subtask) {
            std::collections::btree_map::Entry::Occupied(piece) => piece.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => place.insert(Piece::new(at)?),
        };
        if name == meta::NAME {
            piece.key_groups = shard.shard.key_groups;
            piece.meta = Some(Meta::decode(&shard.bytes)?);
            return Ok(());
        }
        if !DataFile::is_name(name) {
            return Err(Error::corrupt(format!("'{name}' is no data file of RocksDB")));
        }
        let path = piece.folder.path().join(name);
        fs::write(&path, &shard.bytes).map_err(|e| failed("write", &path, &e))?;
        let (size, crc) = (shard.bytes.len() as u64, crc32c::crc32c(&shard.bytes));
        piece.files.insert(name.to_owned(), DataFile { name: name.to_owned(), size, crc });
        piece.shards.push(shard.shard.clone());
        Ok(())
    }

    /// Makes a state of what has been taken in.
    pub(crate) fn finish_restore(&mut self) -> Result<KeyGroupWatermarks> {
        let Restoring { mut pieces, mut watermarks } = std::mem::take(&mut self.restoring);
        let mut complete = Vec::with_capacity(pieces.len());
        while let Some((subtask, piece)) = pieces.pop_first() {
            let checked = piece.complete(self).context_with(|| format!("restore the files of subtask {subtask}"))?;
            watermarks.shard(subtask, 0, Some(checked.key_groups), checked.meta.watermarks.clone());
            complete.push(checked);
        }
        match <[Checked; 1]>::try_from(complete) {
            Ok([one]) if one.fits(self) => self.adopt(one)?,
            Ok(one) => one.into_iter().try_for_each(|piece| self.import(piece))?,
            Err(several) => several.into_iter().try_for_each(|piece| self.import(piece))?,
        }
        Ok(watermarks.within(self.spec.key_groups))
    }

    /// Goes on with a piece as it is.
    fn adopt(&mut self, piece: Checked) -> Result<()> {
        let Checked { folder: from, meta, shards, .. } = piece;
        let folder = self.process.database_folder(&self.spec)?;
        let place = folder.path().join(PLACE);
        fs::rename(from.path(), &place).map_err(|e| failed("rename to", &place, &e))?;
        self.database = Database::new(self.process.clone(), self.spec.subtask.to_string(), folder);
        self.database.open()?;
        self.outgoing = Default::default();
        self.frozen = 0;
        if self.spec.reuse_restored {
            let mut lineage = Lineage::restored(shards);
            meta.files.iter().for_each(|file| lineage.check(file));
            *checkpoint::lock(&self.lineage) = lineage;
        }
        for (namespace, rows) in meta.namespaces.into_iter().filter(|(_, rows)| *rows > 0) {
            self.spaces.insert(namespace, Space { stored: rows, ..Space::default() });
            self.account(namespace);
        }
        Ok(())
    }

    /// Takes our rows out of a piece.
    fn import(&mut self, piece: Checked) -> Result<()> {
        let Some(common) = common(piece.key_groups, self.spec.key_groups) else { return Ok(()) };
        let old = database::open_to_read(&self.process.shared, piece.folder.path())?;
        let mut files = Files::new(self.process.shared.files(), self.database.folder().path().to_owned());
        let (old_form, now) = (Form { types: self.form.types.clone(), timed: piece.meta.timed }, self.now());
        let mut counts: BTreeMap<i64, u64> = BTreeMap::new();
        let mut value = Vec::new();
        let (start, end) = (key::group_start(common.first), key::group_end(common.last));
        database::scan(&old, &start, end, |row_key, old_value| {
            let (_, namespace, _) = key::parse(row_key)
                .ok_or_else(|| Error::corrupt("a key of the database is not in the form in which keys are written"))?;
            *counts.entry(namespace).or_default() += 1;
            if old_form.timed == self.form.timed {
                files.put(row_key, old_value)?;
            } else {
                old_form.convert(old_value, &self.form, now, &mut value)?;
                files.put(row_key, &value)?;
            }
            Ok(true)
        })?;
        let paths = files.finish()?;
        let ingest = move |db: &rocksdb::DB| {
            if paths.is_empty() {
                return Ok(());
            }
            db.ingest_external_file_opts(&options::ingest(), paths).map_err(|e| failure::failed("take in files", &e))
        };
        self.outgoing.send_job(&self.database, Box::new(ingest))?;
        self.outgoing.wait(&self.database, self.outgoing.given())?;
        for (namespace, rows) in counts {
            self.spaces.entry(namespace).or_default().stored += rows;
            self.account(namespace);
        }
        Ok(())
    }
}

fn common(a: KeyGroupRange, b: KeyGroupRange) -> Option<KeyGroupRange> {
    a.overlaps(&b).then(|| KeyGroupRange { first: a.first.max(b.first), last: a.last.min(b.last) })
}

impl Piece {
    fn new(place: PathBuf) -> Result<Self> {
        let folder = Folder::create(place)?;
        Ok(Self { folder, key_groups: None, meta: None, files: HashMap::new(), shards: Vec::new() })
    }

    /// Checks that everything is there and of our shape, and makes it a database.
    fn complete(self, state: &State) -> Result<Checked> {
        let Self { folder, key_groups, meta, files, shards } = self;
        let meta = meta.ok_or_else(|| Error::corrupt(format!("there is no {} among its files", meta::NAME)))?;
        for file in &meta.files {
            match files.get(&file.name) {
                Some(found) if found == file => {}
                Some(found) => {
                    let (found, size) = (found.size, file.size);
                    return Err(Error::corrupt(format!(
                        "data file {}: its {found} bytes are not the {size} that were written",
                        file.name
                    )));
                }
                None => return Err(Error::corrupt(format!("data file {} is missing", file.name))),
            }
        }
        let ours = checkpoint::columns(&state.spec, &state.form);
        if meta.columns != ours {
            return Err(Error::abort(format!(
                "its rows consist of ({}), and now of ({}): RocksDB's files can't follow such a change; start from a savepoint, \
                 which can",
                meta.columns.join(", "),
                ours.join(", ")
            )));
        }
        for (name, bytes) in
            [(meta.manifest.as_str(), &meta.manifest_bytes[..]), ("CURRENT", format!("{}\n", meta.manifest).as_bytes())]
        {
            let path = folder.path().join(name);
            fs::write(&path, bytes).map_err(|e| failed("write", &path, &e))?;
        }
        // Without a range of its own it has been taken by whoever came first: all of it may be ours.
        let key_groups = key_groups.unwrap_or(state.spec.key_groups);
        Ok(Checked { folder, key_groups, meta, shards })
    }
}

/// A piece that RocksDB may open.
struct Checked {
    folder: Folder,
    key_groups: KeyGroupRange,
    meta: Meta,
    shards: Vec<Shard>,
}

impl Checked {
    /// Whether it is, as it is, what the state shall be.
    fn fits(&self, state: &State) -> bool {
        self.key_groups == state.spec.key_groups && self.meta.timed == state.form.timed && state.spaces.is_empty()
    }
}

/// Writes rows, in order, to files that a database can take in.
struct Files {
    options: rocksdb::Options,
    folder: PathBuf,
    rows: Vec<(Vec<u8>, Vec<u8>)>,
    bytes: u64,
    paths: Vec<PathBuf>,
}

impl Files {
    fn new(options: rocksdb::Options, folder: PathBuf) -> Self {
        Self { options, folder, rows: Vec::new(), bytes: 0, paths: Vec::new() }
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.rows.push((key.to_vec(), value.to_vec()));
        self.bytes += (key.len() + value.len()) as u64;
        if self.bytes >= IMPORT_FILE_BYTES { self.cut() } else { Ok(()) }
    }

    fn cut(&mut self) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        // A file that has been taken in is no longer here, so names need be new only among these.
        let path = self.folder.join(format!("import-{}.sst", self.paths.len()));
        let mut writer = SstFileWriter::create(&self.options);
        let mut write = || {
            writer.open(&path)?;
            self.rows.drain(..).try_for_each(|(key, value)| writer.put(key, value))?;
            writer.finish()
        };
        write().map_err(|e| failure::failed("write rows to a file", &e))?;
        drop(writer);
        self.bytes = 0;
        self.paths.push(path);
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<PathBuf>> {
        self.cut()?;
        Ok(self.paths)
    }
}
