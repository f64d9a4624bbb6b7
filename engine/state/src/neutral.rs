//! Rows of a state on their way into neutral files and out of them: what all back ends do alike. No I/O.
//!
//! A file ([`crate::shard`]) holds the columns of the operator's [`Layout`](crate::Layout), and behind them those of the state
//! itself: when a row was written, if there is a TTL, and in layers above 0 whether its key was removed.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, UInt32Array},
    compute::{filter_record_batch, take_record_batch},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
    record_batch::{RecordBatch, RecordBatchOptions},
};
use bytes::Bytes;
use floodmark_snapshot::{Error, KeyGroup, KeyGroupRange, Result, ShardKind, StateColumn};

use crate::{
    keyed::{RowKeys, StateSpec},
    shard::{Header, REMOVED, Reader, WRITTEN, Writer, columns_of},
    snapshot::{Content, RestoredShard},
    table::Rows,
};

/// Rows encoded at a time, at most.
pub const PAGE_ROWS: usize = 8192;

/// Writes the rows of a state as a neutral file. Rows come key group by key group.
pub struct RowWriter<'a> {
    spec: &'a StateSpec,
    schema: SchemaRef,
    layered: bool,
    /// The table column of the time of the last write, if the state has a TTL.
    written: Option<usize>,
    writer: Writer,
}

impl<'a> RowWriter<'a> {
    /// A file with this header; its columns are filled in. If the state has a TTL, column `written` of the tables is when a
    /// row was last written, wall-clock milliseconds.
    #[must_use]
    pub fn new(spec: &'a StateSpec, header: Header, written: Option<usize>) -> Self {
        let layered = header.layer > 0;
        let inner = spec.layout.schema();
        let mut fields: Vec<_> = inner.fields().iter().cloned().collect();
        if written.is_some() {
            fields.push(Arc::new(Field::new(WRITTEN, DataType::Int64, true)));
        }
        if layered {
            fields.push(Arc::new(Field::new(REMOVED, DataType::Boolean, false)));
        }
        let writer = Writer::new(header.of(&inner));
        Self { spec, schema: Arc::new(Schema::new(fields)), layered, written, writer }
    }

    /// Adds rows of one key group and namespace. Key groups come in order.
    ///
    /// # Errors
    /// When a value can't be encoded.
    pub fn push(&mut self, group: KeyGroup, namespace: i64, rows: &Rows, slots: &[u32], removed: bool) -> Result<()> {
        for slots in slots.chunks(PAGE_ROWS) {
            let batch = self.spec.layout.encode(namespace, rows, slots)?;
            if self.written.is_none() && !self.layered {
                self.writer.push(group, batch)?;
                continue;
            }
            let mut columns = batch.columns().to_vec();
            if let Some(written) = self.written {
                let times = slots.iter().map(|slot| rows.long(*slot as usize, written));
                columns.push(Arc::new(times.collect::<Int64Array>()));
            }
            if self.layered {
                columns.push(Arc::new(BooleanArray::from(vec![removed; slots.len()])));
            }
            let options = RecordBatchOptions::new().with_row_count(Some(slots.len()));
            let batch = RecordBatch::try_new_with_options(self.schema.clone(), columns, &options)
                .map_err(|e| Error::abort(format!("encode state: {e}")))?;
            self.writer.push(group, batch)?;
        }
        Ok(())
    }

    /// The whole file.
    ///
    /// # Errors
    /// When the rows can't be written as Arrow IPC.
    pub fn finish(self) -> Result<Bytes> {
        self.writer.finish()
    }
}

/// Some rows of a neutral file, all of them the subtask's own.
#[derive(Debug)]
pub struct Page {
    /// Where they belong.
    pub keys: RowKeys,
    /// For [`Layout::fill`](crate::Layout::fill).
    pub rows: RecordBatch,
    /// When each was last written, if the file says so, wall-clock milliseconds.
    pub written: Option<Int64Array>,
    /// Which stand for keys that were removed, in a layer above 0. These apply before the others of the page.
    pub removed: Option<BooleanArray>,
}

impl Page {
    /// The rows that are there (or those removed) by namespace.
    #[must_use]
    pub fn by_namespace(&self, removed: bool) -> BTreeMap<i64, Vec<u32>> {
        let mut all: BTreeMap<i64, Vec<u32>> = BTreeMap::new();
        if removed && self.removed.is_none() {
            return all;
        }
        let mut rows = (0_u32..).zip(&self.keys.namespaces).filter(|(row, _)| {
            // Without the column none is removed.
            self.removed.as_ref().is_some_and(|r| r.value(*row as usize)) == removed
        });
        // Neighbours mostly have the same namespace.
        let mut next = rows.next();
        while let Some((row, namespace)) = next {
            let of = all.entry(*namespace).or_default();
            of.push(row);
            next = loop {
                match rows.next() {
                    Some((row, same)) if same == namespace => of.push(row),
                    other => break other,
                }
            };
        }
        all
    }

    /// Some of the rows, for [`Layout::fill`](crate::Layout::fill).
    ///
    /// # Errors
    /// Never with rows of the page.
    pub fn taken(&self, rows: &[u32]) -> Result<RecordBatch> {
        if rows.len() == self.rows.num_rows() {
            return Ok(self.rows.clone());
        }
        take_record_batch(&self.rows, &UInt32Array::from(rows.to_vec())).map_err(undecodable)
    }
}

/// The rows of a neutral shard that belong to a subtask; of a slice, if the shard comes in slices.
pub struct Pages<'a> {
    spec: &'a StateSpec,
    content: &'a Content,
    reader: Cow<'a, Reader>,
    /// The key groups wanted: the subtask's, or those of a slice. No others than the shard's own: its file may have more.
    groups: Option<KeyGroupRange>,
}

impl<'a> Pages<'a> {
    /// Opens a shard.
    ///
    /// # Errors
    /// `Corrupt` if it is damaged, `Abort` if it is no neutral shard.
    pub fn open(spec: &'a StateSpec, shard: &'a RestoredShard) -> Result<Self> {
        if shard.shard.kind != ShardKind::Keyed {
            return Err(Error::abort(format!(
                "shard {} is state of another back end; start the job from a savepoint, which any back end reads, or with \
                 the back end that wrote the checkpoint",
                shard.shard.path
            )));
        }
        let wanted = shard.slice.unwrap_or(spec.key_groups);
        let groups = match (shard.shard.key_groups, shard.shard.cut_from) {
            (Some(own), _) => own.common(&wanted),
            (None, None) => Some(wanted),
            (None, Some(_)) => {
                let path = &shard.shard.path;
                return Err(Error::corrupt(format!("shard {path} is a part of its file, and does not say which")));
            }
        };
        let reader = match &shard.content {
            Content::File(bytes) => Cow::Owned(Reader::whole(bytes)?),
            Content::Part(part) => Cow::Borrowed(part.reader()),
        };
        Ok(Self { spec, content: &shard.content, reader, groups })
    }

    /// What the file says of itself.
    #[must_use]
    pub fn header(&self) -> &Header {
        self.reader.header()
    }

    /// Number of rows, about: others' may be counted too.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.groups.map_or(0, |groups| self.reader.rows_of(groups))
    }

    /// Whether the rows have the columns that the layout has now.
    #[must_use]
    pub fn same_columns(&self) -> bool {
        let now: Vec<StateColumn> = columns_of(&self.spec.layout.schema());
        self.header().columns == now
    }

    /// The rows, a page at a time.
    ///
    /// # Errors
    /// `Corrupt` if they are damaged, `Abort` if the layout can't take them; and those of `page`.
    pub fn each(&self, mut page: impl FnMut(Page) -> Result<()>) -> Result<()> {
        let Some(groups) = self.groups else { return Ok(()) };
        let mut of_block = |block: usize, batches: Vec<RecordBatch>| {
            let of = self.reader.key_groups(block);
            let foreign = of.first < groups.first || groups.last < of.last;
            batches.into_iter().try_for_each(|batch| page(self.page(batch, foreign.then_some(groups))?))
        };
        match self.content {
            Content::File(bytes) => {
                let mut places = self.reader.ranges(groups).into_iter();
                places.try_for_each(|(block, place)| of_block(block, self.reader.block(bytes, block, place)?))
            }
            Content::Part(part) => part.blocks(groups).try_for_each(|(block, batches)| of_block(block, batches?)),
        }
    }

    /// The rows of a block; `only` those of some key groups.
    fn page(&self, mut batch: RecordBatch, only: Option<KeyGroupRange>) -> Result<Page> {
        let mut keys = self.spec.layout.decode(&batch)?;
        if keys.len() != batch.num_rows() {
            return Err(Error::abort("internal error: a layout found another number of keys than rows"));
        }
        let wanted = |hash: &u64| only.is_none_or(|g| g.contains(KeyGroup::of(*hash, self.spec.max_parallelism)));
        if !keys.hashes.iter().all(wanted) {
            let mine: BooleanArray = keys.hashes.iter().map(|hash| Some(wanted(hash))).collect();
            batch = filter_record_batch(&batch, &mine).map_err(undecodable)?;
            let mut kept = RowKeys::default();
            for row in (0..keys.len()).filter(|row| mine.value(*row)) {
                kept.push(keys.namespaces[row], keys.hashes[row], keys.key(row));
            }
            keys = kept;
        }
        let column = |name: &str, data_type: &DataType| -> Result<Option<ArrayRef>> {
            let Some(column) = batch.column_by_name(name) else { return Ok(None) };
            if column.data_type() != data_type {
                return Err(Error::corrupt(format!("column {name} of a state file is {}", column.data_type())));
            }
            Ok(Some(column.clone()))
        };
        let written = column(WRITTEN, &DataType::Int64)?.map(|c| c.as_primitive::<Int64Type>().clone());
        let removed = column(REMOVED, &DataType::Boolean)?.map(|c| c.as_boolean().clone());
        Ok(Page { keys, rows: batch, written, removed })
    }
}

fn undecodable(error: arrow::error::ArrowError) -> Error {
    Error::abort(format!("restore rows: {error}"))
}
