//! Rows that a database takes in as files, which is several times quicker than writing them.
//!
//! Invariant: what is taken in is not in the database yet, and neither is anything that would hide it.

use std::path::PathBuf;

use floodmark_snapshot::{KeyGroup, Result};
use rocksdb::{DB, SstFileWriter};

use crate::{failure, options, state::State, stored::Counts};

/// Rows are written to files of about this many bytes.
const FILE_BYTES: usize = options::FILE_BYTES as usize;

/// Rows on their way to files.
pub(crate) struct Files {
    options: rocksdb::Options,
    folder: PathBuf,
    /// Keys and values of `rows`.
    bytes: Vec<u8>,
    rows: Vec<Row>,
    paths: Vec<PathBuf>,
    counts: Counts,
}

/// Where a row is among the bytes: its key, and behind that its value.
#[derive(Clone, Copy)]
struct Row {
    start: usize,
    value: usize,
    end: usize,
}

impl Files {
    /// Nothing yet, for the database of a state.
    pub(crate) fn new(state: &State) -> Self {
        Self {
            options: state.process.shared.files(),
            folder: state.database.folder().path().to_owned(),
            bytes: Vec::new(),
            rows: Vec::new(),
            paths: Vec::new(),
            counts: Counts::none(state.spec.key_groups),
        }
    }

    /// Adds a row of a key group and a namespace: the two write its key and its value behind what they are given.
    pub(crate) fn put(
        &mut self,
        (group, namespace): (KeyGroup, i64),
        key: impl FnOnce(&mut Vec<u8>),
        value: impl FnOnce(&mut Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        let start = self.bytes.len();
        key(&mut self.bytes);
        let at = self.bytes.len();
        value(&mut self.bytes)?;
        self.rows.push(Row { start, value: at, end: self.bytes.len() });
        self.counts.add(group, namespace);
        Ok(())
    }

    /// Writes a file if there is enough for one. The rows so far must have come in the order of their keys.
    pub(crate) fn cut_if_full(&mut self) -> Result<()> {
        if self.bytes.len() >= FILE_BYTES { self.cut() } else { Ok(()) }
    }

    /// Puts the rows that are in no file yet in the order of their keys.
    fn sort(&mut self) {
        let key = |row: &Row| &self.bytes[row.start..row.value];
        // Finds what is in order already, as rows are that have come out of a database.
        self.rows.sort_by(|a, b| key(a).cmp(key(b)));
    }

    fn cut(&mut self) -> Result<()> {
        let mut rest = &self.rows[..];
        while !rest.is_empty() {
            let mut bytes = 0;
            let full = |row: &Row| {
                bytes += row.end - row.start;
                bytes >= FILE_BYTES
            };
            let fit = rest.iter().position(full).map_or(rest.len(), |last| last + 1);
            let (rows, others) = rest.split_at(fit);
            rest = others;
            // A file that has been taken in is no longer here, so names need be new only among these.
            let path = self.folder.join(format!("import-{}.sst", self.paths.len()));
            let mut writer = SstFileWriter::create(&self.options);
            let mut write = || {
                writer.open(&path)?;
                let all = &self.bytes;
                rows.iter().try_for_each(|row| writer.put(&all[row.start..row.value], &all[row.value..row.end]))?;
                writer.finish()
            };
            write().map_err(|e| failure::failed("write rows to a file", &e))?;
            self.paths.push(path);
        }
        self.rows.clear();
        self.bytes.clear();
        Ok(())
    }
}

impl State {
    /// Takes rows in, in whatever order they have come since the last cut.
    pub(crate) fn ingest(&mut self, mut files: Files) -> Result<()> {
        files.sort();
        files.cut()?;
        let Files { paths, counts, .. } = files;
        if paths.is_empty() {
            return Ok(());
        }
        let ingest = move |db: &DB| {
            db.ingest_external_file_opts(&options::ingest(), paths).map_err(|e| failure::failed("take in files", &e))
        };
        self.outgoing.send_job(&self.database, Box::new(ingest))?;
        self.outgoing.wait(&self.database, self.outgoing.given())?;
        self.add_stored(&counts.finish());
        Ok(())
    }
}
