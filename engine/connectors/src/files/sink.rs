//! Writes files: exactly once, staged with the checkpoint and published when it is complete; or as it goes.
//!
//! A published file's name is fixed by the log's history, the epoch and the subtask, and its bytes by the checkpoint: to
//! publish it twice changes nothing. Readers never see half a file.

use std::sync::Arc;

use bytes::Bytes;
use floodmark_dataflow::{
    Barrier, Batch, Operator, Output, PendingShard, Port, StateSnapshot, SubtaskContext,
    metrics::add,
    sink::{Committer, SinkFactory},
};
use floodmark_snapshot::{
    Env, Epoch, Result, ShardKind, Step,
    block::{BlockWriter, read_blocks},
    storage::{self, Storage},
};

use super::{Blocking, blocking};
use crate::format::Format;

const STAGED: &str = "staged-lines";
/// Without a commit a file is written once it has this many bytes, at every barrier, and at the end.
const FILE_BYTES_MAX: usize = 64 << 20;
/// Characters of the log's identity that go into a file's name.
const HISTORY_CHARS: usize = 10;

pub(super) struct FilesSink {
    pub(super) path: String,
    pub(super) format: Format,
    pub(super) columns: Vec<String>,
    pub(super) exactly_once: bool,
}

impl SinkFactory for FilesSink {
    fn kind(&self) -> String {
        "files sink".to_owned()
    }

    fn check(&self) -> Result<()> {
        let storage = storage::open(&self.path)?;
        blocking()?.block_on(storage::check_writable(&*storage, &Env::system()))
    }

    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        let direct = if self.exactly_once { None } else { Some((storage::open(&self.path)?, blocking()?)) };
        let header = match self.format {
            Format::Csv { header: true, delimiter } => {
                Some(self.columns.join(&char::from(delimiter).to_string()) + "\n")
            }
            Format::Csv { header: false, .. } | Format::Json => None,
        };
        Ok(Box::new(Lines { format: self.format, header, text: Vec::new(), rows: 0, direct, context: context.clone() }))
    }

    fn committer(&self, index: u32, history: &str) -> Result<Option<Box<dyn Committer>>> {
        if !self.exactly_once {
            return Ok(None);
        }
        Ok(Some(Box::new(Publish {
            storage: storage::open(&self.path)?,
            runtime: blocking()?,
            name: part(history, index),
            ending: self.format.ending(),
        })))
    }

    fn visible(&self, index: u32, history: &str) -> Result<Option<Epoch>> {
        if !self.exactly_once {
            return Ok(None);
        }
        let (storage, name) = (storage::open(&self.path)?, part(history, index));
        let files = blocking()?.block_on(storage.list("", Some(&name)))?;
        let epoch =
            |path: &str| path.strip_prefix(&name)?.strip_prefix('-')?.split('.').next()?.parse().ok().map(Epoch);
        Ok(files.iter().map_while(|file| epoch(&file.path)).last())
    }
}

/// How the names of a subtask's files begin; behind it comes the epoch.
fn part(history: &str, index: u32) -> String {
    // The end of a ULID is its random part.
    let history = &history[history.len().saturating_sub(HISTORY_CHARS)..];
    format!("part-{history}-{index:04}")
}

/// The sink's operator: gathers encoded lines.
struct Lines {
    format: Format,
    header: Option<String>,
    text: Vec<u8>,
    rows: u64,
    /// Where to write as it goes; `None` if a committer does.
    direct: Option<(Arc<dyn Storage>, Blocking)>,
    context: SubtaskContext,
}

impl Operator for Lines {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        if let (Some(header), true) = (&self.header, self.text.is_empty()) {
            self.text.extend_from_slice(header.as_bytes());
        }
        let before = self.text.len();
        self.format.encode(&batch.rows, &mut self.text)?;
        self.rows += batch.len() as u64;
        add(&self.context.metrics.rows_out, batch.len() as u64);
        add(&self.context.metrics.bytes, (self.text.len() - before) as u64);
        if self.text.len() > FILE_BYTES_MAX { self.write_directly() } else { Ok(()) }
    }

    fn flush(&mut self, _: &mut Output) -> Result<()> {
        self.write_directly()
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let rows = std::mem::take(&mut self.rows);
        let text = std::mem::take(&mut self.text);
        if rows == 0 {
            return Ok(StateSnapshot::default());
        }
        let encode = move || {
            let mut blocks = BlockWriter::new(STAGED);
            blocks.push(&text)?;
            Ok(blocks.finish())
        };
        Ok(StateSnapshot::of(vec![PendingShard::new(ShardKind::Staged, None, rows, Box::new(encode))]))
    }
}

impl Lines {
    fn write_directly(&mut self) -> Result<()> {
        let Some((storage, runtime)) = self.direct.as_ref().filter(|_| self.rows > 0) else { return Ok(()) };
        let name = format!("part-{}-{:04}.{}", self.context.env.ids.ulid(), self.context.index, self.format.ending());
        runtime.block_on(storage.put(&name, Bytes::from(std::mem::take(&mut self.text))))?;
        self.rows = 0;
        Ok(())
    }
}

/// Publishes staged lines.
struct Publish {
    storage: Arc<dyn Storage>,
    runtime: Blocking,
    name: String,
    ending: &'static str,
}

impl Committer for Publish {
    fn open(&mut self) -> Result<Option<Epoch>> {
        Ok(None)
    }

    fn commit(&mut self, epoch: Epoch, staged: &[Bytes], step: &dyn Fn(Step)) -> Result<()> {
        step(Step::BeforeTransaction);
        let mut lines = Vec::new();
        for shard in staged {
            for block in read_blocks(STAGED, shard)? {
                lines.extend_from_slice(&block);
            }
        }
        step(Step::InTransaction);
        let name = format!("{}-{:020}.{}", self.name, epoch.0, self.ending);
        self.runtime.block_on(self.storage.put(&name, Bytes::from(lines)))?;
        step(Step::AfterTransaction);
        Ok(())
    }
}
