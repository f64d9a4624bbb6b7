//! Reads the rows of a snapshot's files without the job that wrote them: for who looks into a snapshot.
//!
//! One piece at a time lies in a folder of the file system's; of its rows, a page is in memory. Invariant: rows come out as they
//! would in the neutral format, and just those of the key groups that the files stand for.

use std::path::Path;

use arrow::record_batch::RecordBatch;
use bytes::Bytes;
use floodmark_snapshot::{Context, Env, Error, KeyGroup, KeyGroupRange, Result, Shard, StateColumn, WorkFolder};
use floodmark_state::{ColumnType, neutral::PAGE_ROWS, shape::Shaped, shard::columns_of};

use crate::{
    database, key,
    meta::{self, Meta},
    neutral,
    options::{FILE_BYTES, Shared},
    piece::{self, Checked, Piece},
    row::Form,
    state::Page,
};

/// What blocks of files may take in memory, bytes.
const BLOCK_CACHE_BYTES: usize = 8 << 20;
/// What rows that were not written to files may take: there are none.
const MEMTABLE_BYTES: usize = 1 << 20;

/// The files of one earlier subtask's state.
pub struct StateFiles {
    piece: Piece,
    shared: Shared,
    // Goes last.
    _work: WorkFolder,
}

impl StateFiles {
    /// None yet. They are put into a folder of their own inside of this one, which is made if need be, and which several
    /// processes may share.
    ///
    /// # Errors
    /// `Abort` if the folder can't be made.
    pub fn new(folder: &Path, env: &Env) -> Result<Self> {
        let work = WorkFolder::open(folder, env)?;
        let piece = Piece::new(work.path().join("piece"))?;
        Ok(Self { piece, shared: Shared::new(BLOCK_CACHE_BYTES, MEMTABLE_BYTES, FILE_BYTES), _work: work })
    }

    /// Whether a shard is the file that tells of the others.
    #[must_use]
    pub fn tells(shard: &Shard) -> bool {
        piece::file_name(shard) == meta::NAME
    }

    /// The columns of the rows, by the bytes of the file that [`StateFiles::tells`].
    ///
    /// # Errors
    /// `Corrupt` if it is damaged, `Abort` if it doesn't say.
    pub fn columns(bytes: &Bytes) -> Result<Vec<StateColumn>> {
        let meta = Meta::decode(bytes)?;
        let (_, schema) = meta.shape.as_ref().ok_or_else(shapeless)?;
        Ok(columns_of(schema))
    }

    /// Takes in a file, any of them first.
    ///
    /// # Errors
    /// `Corrupt` if it is damaged, `Abort` if it can't be put into the folder.
    pub fn take(&mut self, shard: &Shard, bytes: &Bytes) -> Result<()> {
        self.piece.take(shard, bytes).context_with(|| format!("read shard {}", shard.path))
    }

    /// Shows all rows, a page at a time, once all files are there.
    ///
    /// # Errors
    /// `Corrupt` if a file is missing or damaged, `Abort` if it doesn't say what its rows are; and those of `page`.
    pub fn each(self, page: &mut dyn FnMut(RecordBatch) -> Result<()>) -> Result<()> {
        let Self { piece, shared, _work: work } = self;
        let Checked { folder, key_groups, meta, .. } = piece.complete(ALL)?;
        let (shape, schema) = meta.shape.ok_or_else(shapeless)?;
        let types = meta.columns.get(schema.fields().len()..).unwrap_or_default();
        let types: Option<Vec<ColumnType>> = types.iter().map(|t| column_type(t)).collect();
        let types = types.ok_or_else(|| Error::corrupt("rows have columns of a type that there is not"))?;
        if types.len() != shape.values.len() {
            return Err(Error::corrupt("the columns of a state's rows are not those of its shape"));
        }
        let shaped = Shaped::new(schema, shape)?;
        let form = Form { types, timed: meta.timed };
        let db = database::open_to_read(&shared, folder.path())?;
        let (mut rows, mut at) = (Page::new(form), None);
        let mut turn = |rows: &mut Page, at: Option<i64>| match at {
            Some(namespace) => rows.turn(&mut |rows, slots| page(shaped.encode(namespace, rows, slots)?)),
            None => Ok(()),
        };
        let (start, end) = (key::group_start(key_groups.first), key::group_end(key_groups.last));
        database::scan(&db, &start, end, |row_key, value| {
            let (_, namespace, row_key) = key::parse(row_key).ok_or_else(neutral::not_ours)?;
            if at.is_some_and(|at| at != namespace) || rows.len() >= PAGE_ROWS {
                turn(&mut rows, at)?;
            }
            at = Some(namespace);
            rows.add(row_key, value).map(|()| true)
        })?;
        turn(&mut rows, at)?;
        // The database is closed before its folder goes.
        drop(db);
        drop((folder, work));
        Ok(())
    }
}

const ALL: KeyGroupRange = KeyGroupRange { first: KeyGroup(0), last: KeyGroup(u16::MAX) };

/// The column type of this name, as [`crate::checkpoint::columns`] writes it.
fn column_type(name: &str) -> Option<ColumnType> {
    let all = [ColumnType::Long, ColumnType::Double, ColumnType::Wide, ColumnType::Bytes];
    all.into_iter().find(|t| format!("{t:?}") == name)
}

fn shapeless() -> Error {
    Error::abort(
        "its files don't say what their rows are: an operator that doesn't tell, or an earlier program, wrote them; take a \
         savepoint (floodmark savepoint), and query that",
    )
}
