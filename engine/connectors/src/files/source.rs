//! Reads lines from files. A split is a file; its position is the offset of the first byte that has not been read.
//!
//! Invariant: `positions` is always at the start of a line.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arrow::datatypes::SchemaRef;
use floodmark_dataflow::{
    SubtaskContext,
    metrics::add,
    source::{Polled, Source, SourceFactory},
};
use floodmark_snapshot::{
    Env, Error, Result, SplitState,
    env::sleep,
    storage::{self, ObjectInfo, Storage},
};
use serde_json::json;
use xxhash_rust::xxh3::xxh3_64;

use super::{Blocking, blocking};
use crate::format::{BATCH_ROWS, BadRecords, Decoder, Format, Place, bad::BadRecordHandler};

/// Bytes read at once.
const CHUNK: u64 = 1 << 20;
/// Longest line, bytes: what a reader holds before it gives up on finding the line's end.
const LINE_MAX: usize = 64 << 20;

pub(super) struct FilesSource {
    pub(super) path: String,
    pub(super) format: Format,
    pub(super) bad: BadRecords,
    /// `Some(poll interval)` to follow growing files and new ones.
    pub(super) following: Option<Duration>,
    pub(super) declared: SchemaRef,
    pub(super) projection: SchemaRef,
    /// Names of all files that some subtask reads.
    pub(super) known: Arc<Mutex<BTreeSet<String>>>,
}

/// The folder that a path is in or names, and which of its files are meant.
struct Location {
    storage: Arc<dyn Storage>,
    file: Option<String>,
}

impl FilesSource {
    fn place(&self) -> Result<Location> {
        let path = self.path.strip_prefix("file://").unwrap_or(&self.path);
        let remote = path.contains("://");
        let is_file =
            if remote { !path.ends_with('/') && has_ending(path) } else { std::path::Path::new(path).is_file() };
        if !remote && !std::path::Path::new(path).exists() {
            return Err(Error::abort(format!("there is no file or folder {path}; check option 'path'")));
        }
        match path.rsplit_once('/').filter(|_| is_file) {
            Some((folder, name)) => Ok(Location {
                storage: storage::open(if folder.is_empty() { "/" } else { folder })?,
                file: Some(name.to_owned()),
            }),
            None if is_file => Ok(Location { storage: storage::open(".")?, file: Some(path.to_owned()) }),
            None => Ok(Location { storage: storage::open(path)?, file: None }),
        }
    }
}

fn has_ending(path: &str) -> bool {
    path.rsplit('/').next().is_some_and(|name| name.contains('.'))
}

impl Location {
    async fn list(&self) -> Result<Vec<ObjectInfo>> {
        let all = self.storage.list("", None).await?;
        let wanted = |o: &ObjectInfo| match &self.file {
            Some(name) => o.path == *name,
            // Hidden files are somebody's half-written ones.
            None => !o.path.rsplit('/').next().is_some_and(|name| name.starts_with(['.', '_'])),
        };
        Ok(all.into_iter().filter(wanted).collect())
    }
}

fn fresh(file: &ObjectInfo) -> SplitState {
    SplitState { split: file.path.clone(), position: json!({ "offset": 0 }), watermark: None, finished: false }
}

impl SourceFactory for FilesSource {
    fn kind(&self) -> String {
        "files source".to_owned()
    }

    fn bounded(&self) -> bool {
        self.following.is_none()
    }

    fn splits(&self, restored: &[SplitState]) -> Result<Vec<SplitState>> {
        let files = blocking()?.block_on(self.place()?.list())?;
        let mut splits = restored.to_vec();
        for split in restored {
            let offset = offset_of(split)?;
            match files.iter().find(|f| f.path == split.split) {
                Some(file) if file.size >= offset => {}
                Some(file) => {
                    return Err(Error::abort(format!(
                        "file {} has {} bytes, but {offset} had been read: it was replaced or cut",
                        split.split, file.size
                    )));
                }
                None if split.finished => {}
                None => {
                    return Err(Error::abort(format!("file {} is gone before it was read to its end", split.split)));
                }
            }
        }
        let new = files.iter().filter(|f| restored.iter().all(|r| r.split != f.path));
        splits.extend(new.map(fresh));
        if splits.is_empty() && self.following.is_none() {
            return Err(Error::abort(format!("there are no files in {}; check option 'path'", self.path)));
        }
        let names = splits.iter().map(|s| s.split.clone()).collect();
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = names;
        Ok(splits)
    }

    fn open(&self, splits: Vec<SplitState>, context: &SubtaskContext) -> Result<Box<dyn Source>> {
        let files = splits.iter().map(File::at).collect::<Result<Vec<_>>>()?;
        Ok(Box::new(Reader {
            place: self.place()?,
            runtime: blocking()?,
            decoder: self.format.decoder(&self.declared, &self.projection)?,
            starts: Vec::new(),
            bad: self.bad.open(&context.env, context.metrics.clone())?,
            header: matches!(self.format, Format::Csv { header: true, .. }),
            following: self.following,
            files,
            turn: 0,
            next_list: Duration::ZERO,
            known: self.known.clone(),
            env: context.env.clone(),
            context: context.clone(),
        }))
    }
}

fn offset_of(split: &SplitState) -> Result<u64> {
    let offset = split.position["offset"].as_u64();
    offset.ok_or_else(|| Error::abort(format!("{} has no position: {}", split.split, split.position)))
}

struct File {
    name: String,
    /// Start of the first line that has not been taken.
    offset: u64,
    /// Bytes from `offset` on that have been read.
    ahead: Vec<u8>,
    /// Nothing more was there at the last look.
    drained: bool,
    finished: bool,
}

impl File {
    fn at(split: &SplitState) -> Result<Self> {
        let (name, offset) = (split.split.clone(), offset_of(split)?);
        Ok(Self { name, offset, ahead: Vec::new(), drained: false, finished: split.finished })
    }
}

struct Reader {
    place: Location,
    runtime: Blocking,
    decoder: Decoder,
    /// Offsets of the lines that the decoder holds.
    starts: Vec<u64>,
    bad: BadRecordHandler,
    header: bool,
    following: Option<Duration>,
    files: Vec<File>,
    turn: usize,
    next_list: Duration,
    known: Arc<Mutex<BTreeSet<String>>>,
    env: Env,
    context: SubtaskContext,
}

impl Source for Reader {
    fn poll(&mut self, wait: Duration) -> Result<Polled> {
        if let Some(interval) = self.following {
            self.look_again(interval)?;
        }
        if self.files.iter().all(|f| f.finished) && self.following.is_none() {
            return Ok(Polled::Exhausted);
        }
        for step in 0..self.files.len() {
            let i = (self.turn + step) % self.files.len();
            if self.files[i].finished || self.files[i].drained {
                continue;
            }
            self.turn = i + 1;
            return self.read(i);
        }
        sleep(wait);
        Ok(Polled::Pending)
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        let now = self.files.iter().map(|file| SplitState {
            split: file.name.clone(),
            position: json!({ "offset": file.offset }),
            watermark: None,
            finished: file.finished,
        });
        Ok(now.collect())
    }

    fn flush(&mut self) -> Result<()> {
        self.bad.flush()
    }
}

impl Reader {
    /// Takes up new files, and looks at all for new bytes, once per interval.
    fn look_again(&mut self, interval: Duration) -> Result<()> {
        let now = self.env.clock.monotonic();
        if now < self.next_list {
            return Ok(());
        }
        self.next_list = now + interval;
        let listed = self.runtime.block_on(self.place.list())?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for file in listed {
            if let Some(mine) = self.files.iter_mut().find(|f| f.name == file.path) {
                mine.drained = false;
                continue;
            }
            // Every subtask finds the same new files; a name's hash says whose it is.
            let owner = xxh3_64(file.path.as_bytes()) % u64::from(self.context.parallelism);
            if owner == u64::from(self.context.index) && known.insert(file.path.clone()) {
                self.files.push(File::at(&fresh(&file))?);
            }
        }
        Ok(())
    }

    fn read(&mut self, i: usize) -> Result<Polled> {
        let file = &mut self.files[i];
        let from = file.offset + file.ahead.len() as u64;
        let size = self.runtime.block_on(self.place.storage.size(&file.name))?;
        let size =
            size.ok_or_else(|| Error::abort(format!("file {} is gone before it was read to its end", file.name)))?;
        if size < from {
            return Err(Error::abort(format!("file {} has shrunk to {size} bytes while it was read", file.name)));
        }
        let to = size.min(from + CHUNK);
        if to > from {
            let read = self.runtime.block_on(self.place.storage.get_range(&file.name, from, to))?;
            let read = read.ok_or_else(|| Error::abort(format!("file {} is gone", file.name)))?;
            add(&self.context.metrics.bytes, read.len() as u64);
            file.ahead.extend_from_slice(&read);
        }
        let at_end = to == size;
        let taken = self.take_lines(i, at_end && self.following.is_none());
        let file = &mut self.files[i];
        if taken == 0 && at_end {
            if self.following.is_none() {
                file.finished = true;
                return Ok(Polled::SplitFinished { split: i });
            }
            file.drained = true;
            return Ok(Polled::Pending);
        }
        if taken == 0 && file.ahead.len() > LINE_MAX {
            return Err(Error::abort(format!(
                "file {}: the line at byte {} is over {LINE_MAX} bytes long",
                file.name, file.offset
            )));
        }
        let mut malformed = Vec::new();
        let rows = self.decoder.finish(&mut malformed)?;
        let starts = std::mem::take(&mut self.starts);
        let split = self.files[i].name.clone();
        self.bad.take(malformed, |record| Place { split: split.clone(), offset: starts[record] as i64 })?;
        Ok(Polled::Batch { split: i, rows })
    }
}

impl Reader {
    /// Gives whole lines to the decoder; answers with how many lines were used up, blank ones and a header included.
    /// `last` takes a line without a newline too.
    fn take_lines(&mut self, i: usize, last: bool) -> usize {
        let file = &mut self.files[i];
        let (mut used, mut lines) = (0, 0);
        while self.starts.len() < BATCH_ROWS {
            let rest = &file.ahead[used..];
            let (line, next) = match rest.iter().position(|b| *b == b'\n') {
                Some(end) => (&rest[..end], used + end + 1),
                None if last && !rest.is_empty() => (rest, file.ahead.len()),
                None => break,
            };
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let start = file.offset + used as u64;
            if !(line.is_empty() || (self.header && start == 0)) {
                self.decoder.push(line);
                self.starts.push(start);
            }
            used = next;
            lines += 1;
        }
        file.ahead.drain(..used);
        file.offset += used as u64;
        lines
    }
}

#[cfg(test)]
mod tests {
    use arrow::{
        array::AsArray,
        datatypes::{DataType, Field, Int64Type, Schema},
    };
    use floodmark_dataflow::{
        OperatorMetrics,
        connector::{OptionValue, TableDef},
    };
    use floodmark_snapshot::KeyGroupRange;

    use super::*;
    use crate::options::Options;

    fn context() -> SubtaskContext {
        SubtaskContext {
            index: 0,
            parallelism: 1,
            max_parallelism: 128,
            key_groups: KeyGroupRange::of_subtask(0, 1, 128),
            metrics: Arc::new(OperatorMetrics::default()),
            state: floodmark_dataflow::StateSettings::default(),
            env: Env::system(),
        }
    }

    fn source(path: &str, format: Format, following: bool, bad: &[(&str, &str)]) -> FilesSource {
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, true)]));
        let value = |v: &str| OptionValue::parse(v, Default::default()).unwrap();
        let table = TableDef {
            name: "t".into(),
            schema: schema.clone(),
            primary_key: Vec::new(),
            options: bad.iter().map(|(k, v)| ((*k).to_owned(), value(v))).collect(),
            location: Default::default(),
        };
        FilesSource {
            path: path.to_owned(),
            format,
            bad: BadRecords::of(&Options::new(&table, &BadRecords::OPTIONS, &[]).unwrap()).unwrap(),
            following: following.then_some(Duration::from_millis(1)),
            declared: schema.clone(),
            projection: schema,
            known: Arc::default(),
        }
    }

    /// Reads until there is nothing more, or `stop` batches have come; answers with the numbers and the positions.
    fn read(source: &FilesSource, from: &[SplitState], stop: usize) -> Result<(Vec<i64>, Vec<SplitState>)> {
        let mut reader = source.open(source.splits(from)?, &context())?;
        let (mut numbers, mut batches, mut pending) = (Vec::new(), 0, 0);
        while batches < stop && pending < 20 {
            match reader.poll(Duration::from_millis(1))? {
                Polled::Batch { rows, .. } => {
                    numbers.extend_from_slice(rows.column(0).as_primitive::<Int64Type>().values());
                    batches += 1;
                }
                Polled::SplitFinished { .. } => {}
                Polled::Pending => pending += 1,
                Polled::Exhausted => break,
            }
        }
        reader.flush()?;
        Ok((numbers, reader.positions()?))
    }

    #[test]
    fn a_reader_goes_on_where_another_left_off() {
        let folder = tempfile::tempdir().unwrap();
        let lines: String = (0..20_000).map(|n| format!("{{\"n\":{n}}}\r\n")).collect();
        std::fs::write(folder.path().join("a.ndjson"), lines.trim_end()).unwrap();
        std::fs::write(folder.path().join("b.ndjson"), "\n{\"n\":7}\n").unwrap();
        let source = source(folder.path().to_str().unwrap(), Format::Json, false, &[]);
        let mut all = Vec::new();
        let mut positions = Vec::new();
        loop {
            let (numbers, now) = read(&source, &positions, 1).unwrap();
            all.extend(numbers);
            positions = now;
            if positions.iter().all(|p| p.finished) {
                break;
            }
        }
        all.sort_unstable();
        let mut expected: Vec<i64> = (0..20_000).chain([7]).collect();
        expected.sort_unstable();
        assert_eq!(all, expected);
    }

    #[test]
    fn a_followed_file_brings_what_is_appended_and_half_a_line_waits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.ndjson");
        std::fs::write(&path, "{\"n\":1}\n{\"n\":").unwrap();
        let source = source(folder.path().to_str().unwrap(), Format::Json, true, &[]);
        let (numbers, positions) = read(&source, &[], 10).unwrap();
        assert_eq!((numbers, positions[0].position["offset"].as_u64()), (vec![1], Some(8)));
        std::fs::write(&path, "{\"n\":1}\n{\"n\":2}\n").unwrap();
        std::fs::write(folder.path().join("new.ndjson"), "{\"n\":3}\n").unwrap();
        let (mut numbers, _) = read(&source, &positions, 10).unwrap();
        numbers.sort_unstable();
        assert_eq!(numbers, [2, 3]);
    }

    #[test]
    fn malformed_records_fail_are_skipped_or_are_kept_aside() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("in.ndjson");
        let bad = "{\"n\":1}\n{\"n\":\"x\"}\n{\"n\":2\nnull\n{\"n\":3}{\"n\":4}\n{\"n\":5}\n";
        std::fs::write(&file, bad).unwrap();
        let path = file.to_str().unwrap();
        let error = read(&source(path, Format::Json, false, &[]), &[], 10).unwrap_err().to_string();
        assert!(error.starts_with("malformed record at in.ndjson@8: "), "{error}");
        let skip = source(path, Format::Json, false, &[("bad-records", "skip")]);
        assert_eq!(read(&skip, &[], 10).unwrap().0, [1, 5]);
        let letters = folder.path().join("letters");
        let policy = [("bad-records", "dead-letter"), ("bad-records.path", letters.to_str().unwrap())];
        assert_eq!(read(&source(path, Format::Json, false, &policy), &[], 10).unwrap().0, [1, 5]);
        let written = std::fs::read_dir(&letters).unwrap().next().unwrap().unwrap().path();
        assert_eq!(std::fs::read_to_string(written).unwrap().lines().count(), 4);
    }

    #[test]
    fn csv_has_a_header_and_bad_lines_too() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("in.csv");
        std::fs::write(&file, "n\n1\nx\n\n3").unwrap();
        let format = Format::Csv { delimiter: b',', header: true };
        let source = source(file.to_str().unwrap(), format, false, &[("bad-records", "skip")]);
        assert_eq!(read(&source, &[], 10).unwrap().0, [1, 3]);
    }

    #[test]
    fn a_file_that_shrank_or_is_missing_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("in.ndjson");
        let source = source(file.to_str().unwrap(), Format::Json, false, &[]);
        assert!(source.splits(&[]).unwrap_err().to_string().starts_with("there is no file or folder"));
        std::fs::write(&file, "{\"n\":1}\n").unwrap();
        let (_, positions) = read(&source, &[], 10).unwrap();
        std::fs::write(&file, "{}\n").unwrap();
        assert!(source.splits(&positions).unwrap_err().to_string().contains("it was replaced or cut"));
    }
}
