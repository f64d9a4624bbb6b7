//! The state inside a snapshot as tables of an SQL database: one per operator with keyed state, and what the manifest says.
//!
//! SQLite does the querying, in a database that exists only while the command runs and spills to a temporary file. A table is
//! filled only if the query names it. Layers are merged on the way in, as a restore would: removals and dropped namespaces
//! of a layer first, then its rows.
//!
//! Invariant: every byte of a shard is verified before a row of it is shown; of a file that is cut, each row is shown once.

use std::collections::{BTreeMap, BTreeSet};

use arrow::{
    array::{Array, ArrayRef, AsArray, RecordBatch},
    datatypes::{
        DataType, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, TimestampMillisecondType,
        UInt8Type, UInt16Type, UInt32Type,
    },
    util::display::{ArrayFormatter, FormatOptions},
};
use floodmark_dataflow::hash::hash_keys;
use floodmark_rocksdb::StateFiles;
use floodmark_snapshot::{
    Env, Error, KeyGroup, KeyGroupRange, Manifest, OperatorUid, Result, Shard, ShardKind, StateColumn, StateSchema,
    restore::Snapshot,
};
use floodmark_state::shard::{FOOTER_LEN, Header, Opened, REMOVED, Reader, TAIL_LEN, WRITTEN};
use rusqlite::{Connection, ToSql, params, params_from_iter, types::Value};

/// Says which earlier subtask a row comes from: not part of the state, but layers are merged by it.
const SUBTASK: &str = "$subtask";
/// Columns that hold the namespace of a row: the end of a slice or window.
const NAMESPACES: [&str; 2] = ["$slice_end", "$window_end"];
/// Where files of RocksDB are put to be read, in the system's folder for temporary files.
const READ_FOLDER: &str = "floodmark-read";
/// How often a row of a join's side was there: what is kept, in a state all of whose other columns are the key.
const COUNT: &str = "$count";

/// The state of one operator: all of it, or a named part.
pub(super) struct StateTable {
    /// Its uid, and the name of the part if there are several.
    pub(super) name: String,
    uid: OperatorUid,
    shards: Vec<Shard>,
    schema: StateSchema,
}

impl StateTable {
    /// The tables of a snapshot, by name.
    pub(super) fn all(manifest: &Manifest) -> Vec<Self> {
        let mut tables: BTreeMap<String, Self> = BTreeMap::new();
        for (uid, operator) in &manifest.operators {
            for shard in &operator.shards {
                let part = match shard.kind {
                    ShardKind::Keyed => shard.name.clone(),
                    ShardKind::RocksDb => {
                        shard.name.as_deref().and_then(|n| n.rsplit_once('/')).map(|(part, _)| part.to_owned())
                    }
                    ShardKind::Split
                    | ShardKind::Union
                    | ShardKind::Broadcast
                    | ShardKind::Channel
                    | ShardKind::Staged => continue,
                };
                let name = part.map_or_else(|| uid.to_string(), |part| format!("{uid}/{part}"));
                let table = tables.entry(name.clone()).or_insert_with(|| Self {
                    name,
                    uid: uid.clone(),
                    shards: Vec::new(),
                    schema: operator.schema.clone(),
                });
                table.shards.push(shard.clone());
            }
        }
        let mut tables: Vec<Self> = tables.into_values().collect();
        // The layers of one subtask in their order.
        tables.iter_mut().for_each(|t| t.shards.sort_by_key(|s| (s.subtask, s.layer)));
        tables
    }

    /// Rows in its files; those that layers replace count more than once.
    pub(super) fn rows(&self) -> u64 {
        self.shards.iter().map(|s| s.rows).sum()
    }

    /// Its columns, from the head of one of its files, or from what stands beside them.
    pub(super) async fn columns(&self, snapshot: &Snapshot) -> Result<Vec<StateColumn>> {
        if let Some(told) = self.shards.iter().find(|s| s.kind == ShardKind::RocksDb && StateFiles::tells(s)) {
            let of_rows = StateFiles::columns(&snapshot.read(told).await?);
            return Ok(columns(&of_rows.map_err(|e| e.context(format!("read the state of {}", self.uid)))?));
        }
        match self.shards.first() {
            Some(shard) => Ok(columns(&head(snapshot, shard).await?.columns)),
            None => Ok(Vec::new()),
        }
    }
}

/// The columns of the rows themselves, and what is added for users.
fn columns(of_rows: &[StateColumn]) -> Vec<StateColumn> {
    let subtask = StateColumn { name: SUBTASK.to_owned(), data_type: "Int64".to_owned(), optional: false };
    of_rows.iter().cloned().chain([subtask]).collect()
}

/// The head of a shard, without its rows.
async fn head(snapshot: &Snapshot, shard: &Shard) -> Result<Header> {
    let mut from = shard.size.saturating_sub(TAIL_LEN.max(FOOTER_LEN) as u64);
    loop {
        let tail = snapshot.read_range(shard, from, shard.size).await?;
        match Reader::open(shard.size, &tail).map_err(|e| e.context(format!("read shard {}", shard.path)))? {
            Opened::Ready(reader) => return Ok(reader.header().clone()),
            Opened::More { from: earlier } if earlier < from => from = earlier,
            Opened::More { .. } => return Err(Error::corrupt(format!("shard {} has no index", shard.path))),
        }
    }
}

/// A database with what the manifest says, and the state of the tables whose names stand in `sql`.
pub(super) async fn load(snapshot: &Snapshot, sql: &str) -> Result<Connection> {
    // Without a name it is a temporary file, which goes when the connection does.
    let database = Connection::open("").map_err(failed)?;
    load_manifest(&database, &snapshot.manifest).map_err(failed)?;
    let sql = sql.to_lowercase();
    for table in StateTable::all(&snapshot.manifest) {
        if sql.contains(&table.name.to_lowercase()) {
            load_state(&database, snapshot, &table).await?;
        }
    }
    database.execute_batch("PRAGMA query_only = ON").map_err(failed)?;
    Ok(database)
}

fn failed(error: rusqlite::Error) -> Error {
    Error::abort(format!("SQL: {error}"))
}

fn load_manifest(database: &Connection, manifest: &Manifest) -> rusqlite::Result<()> {
    database.execute_batch(
        "CREATE TABLE operators (uid TEXT, kind TEXT, schema TEXT, parallelism INTEGER, rows INTEGER, bytes INTEGER, splits INTEGER);
         CREATE TABLE sources (uid TEXT, split TEXT, position TEXT, watermark TEXT, finished INTEGER);
         CREATE TABLE shards (uid TEXT, subtask INTEGER, kind TEXT, name TEXT, layer INTEGER, first_key_group INTEGER,
           last_key_group INTEGER, rows INTEGER, bytes INTEGER, path TEXT, hash TEXT);",
    )?;
    for (uid, operator) in &manifest.operators {
        let (rows, bytes): (Vec<i64>, Vec<i64>) =
            operator.shards.iter().map(|s| (s.rows as i64, s.own_size() as i64)).unzip();
        database.execute(
            "INSERT INTO operators VALUES (?, ?, ?, ?, ?, ?, ?)",
            params![
                uid.0,
                operator.kind,
                operator.schema.to_string(),
                operator.parallelism,
                rows.iter().sum::<i64>(),
                bytes.iter().sum::<i64>(),
                operator.splits.len() as i64
            ],
        )?;
        for split in &operator.splits {
            let watermark = split.watermark.and_then(chrono::DateTime::from_timestamp_millis);
            let watermark = watermark.map(|t| t.format("%Y-%m-%d %H:%M:%S%.3f").to_string());
            let values = params![uid.0, split.split, split.position.to_string(), watermark, split.finished];
            database.execute("INSERT INTO sources VALUES (?, ?, ?, ?, ?)", values)?;
        }
        for shard in &operator.shards {
            let kind = serde_json::to_value(shard.kind).ok().and_then(|k| k.as_str().map(str::to_owned));
            let (first, last) = shard.key_groups.map(|g| (g.first.0, g.last.0)).unzip();
            database.execute(
                "INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                params![
                    uid.0,
                    shard.subtask,
                    kind,
                    shard.name,
                    shard.layer,
                    first,
                    last,
                    shard.rows as i64,
                    shard.size as i64,
                    shard.path,
                    shard.hash
                ],
            )?;
        }
    }
    Ok(())
}

async fn load_state(database: &Connection, snapshot: &Snapshot, table: &StateTable) -> Result<()> {
    let mut loader: Option<Loader> = None;
    for shard in table.shards.iter().filter(|s| s.kind == ShardKind::Keyed) {
        let own = Own::of(shard, table, snapshot.manifest.max_parallelism)?;
        let file = snapshot.read(shard).await?;
        let reader = Reader::verified(&file).map_err(|e| e.context(format!("read shard {}", shard.path)))?;
        let header = reader.header();
        let loader = match &mut loader {
            Some(loader) => loader,
            None => loader.insert(Loader::create(database, table, &columns(&header.columns))?),
        };
        loader.widen(&columns(&header.columns))?;
        loader.drop_namespaces(shard.subtask, &header.dropped)?;
        // Removals apply before rows, wherever in the file they stand.
        for removed in [true, false] {
            if removed && shard.layer == 0 {
                continue;
            }
            for (block, place) in reader.ranges(own.key_groups) {
                for batch in reader.block(&file, block, place)? {
                    loader.take(shard, &own.rows(batch, reader.key_groups(block))?, removed)?;
                }
            }
        }
    }
    let files = table.shards.iter().filter(|s| s.kind == ShardKind::RocksDb).collect::<Vec<_>>();
    for files in files.chunk_by(|a, b| a.subtask == b.subtask) {
        let of_table = |e: Error| e.context(format!("read the state of {}", table.uid));
        // Of the files of one subtask at a time, one is in memory.
        let folder = std::env::temp_dir().join(READ_FOLDER);
        let mut piece = StateFiles::new(&folder, &Env::system()).map_err(of_table)?;
        let mut told = Vec::new();
        for shard in files {
            let file = snapshot.read(shard).await?;
            if StateFiles::tells(shard) {
                told = columns(&StateFiles::columns(&file).map_err(of_table)?);
            }
            piece.take(shard, &file).map_err(of_table)?;
        }
        let loader = match &mut loader {
            Some(loader) => loader,
            None => loader.insert(Loader::create(database, table, &told)?),
        };
        piece.each(&mut |batch| loader.take(files[0], &batch, false)).map_err(of_table)?;
    }
    Ok(())
}

/// Which rows of a file are a shard's: of one that is cut, those of some key groups.
struct Own<'a> {
    table: &'a StateTable,
    key_groups: KeyGroupRange,
    max_parallelism: u16,
}

impl<'a> Own<'a> {
    fn of(shard: &Shard, table: &'a StateTable, max_parallelism: u16) -> Result<Self> {
        let all = KeyGroupRange { first: KeyGroup(0), last: KeyGroup(u16::MAX) };
        let key_groups = match (shard.cut_from, shard.key_groups) {
            (None, _) => all,
            (Some(_), Some(own)) => own,
            (Some(_), None) => {
                return Err(Error::corrupt(format!(
                    "shard {} is a part of its file, and does not say which",
                    shard.path
                )));
            }
        };
        Ok(Self { table, key_groups, max_parallelism })
    }

    /// Those among the rows of a block, all of whose rows are `between` these key groups.
    ///
    /// The operator itself knows the key group of a row. It is found out here for operators that are dealt rows by the hash of their
    /// keys, and only if it proves to be that: then it is one of the block's, and the rows are in its order.
    fn rows(&self, batch: RecordBatch, between: KeyGroupRange) -> Result<RecordBatch> {
        let own = self.key_groups;
        if own.first <= between.first && between.last <= own.last {
            return Ok(batch);
        }
        let StateTable { schema, uid, .. } = self.table;
        let columns: Option<Vec<ArrayRef>> =
            schema.keys.iter().map(|key| batch.column_by_name(&key.name).cloned()).collect();
        let columns = columns.filter(|columns| !columns.is_empty());
        let hashes = columns.and_then(|columns| hash_keys(&columns, batch.num_rows()).ok()).unwrap_or_default();
        let groups: Vec<KeyGroup> = hashes.iter().map(|hash| KeyGroup::of(*hash, self.max_parallelism)).collect();
        let proved =
            groups.len() == batch.num_rows() && groups.is_sorted() && groups.iter().all(|g| between.contains(*g));
        if !proved {
            return Err(Error::abort(format!(
                "the checkpoint was taken after the job's parallelism had changed, and names parts of files of {uid} that only the \
                 operator can tell apart; take a savepoint (floodmark savepoint), and query that"
            )));
        }
        let from = groups.partition_point(|group| *group < own.first);
        let to = groups.partition_point(|group| *group <= own.last);
        Ok(batch.slice(from, to.saturating_sub(from)))
    }
}

/// Fills one table.
struct Loader<'a> {
    database: &'a Connection,
    name: String,
    columns: BTreeSet<String>,
    /// Columns that tell rows of one subtask apart, and of them the namespace.
    keys: Vec<String>,
    namespace: Option<(String, bool)>,
}

impl<'a> Loader<'a> {
    fn create(database: &'a Connection, table: &StateTable, columns: &[StateColumn]) -> Result<Self> {
        let first = columns.first().filter(|c| NAMESPACES.iter().any(|n| c.name.starts_with(n)));
        let namespace = first.map(|c| (c.name.clone(), c.data_type.starts_with("Timestamp")));
        let keyed: Vec<String> = if table.schema.keys.is_empty() {
            let kept = |c: &&StateColumn| !c.name.starts_with(COUNT) && c.name != SUBTASK;
            columns.iter().filter(kept).map(|c| c.name.clone()).collect()
        } else {
            let keys = table.schema.keys.iter().map(|c| c.name.clone());
            first.map(|c| c.name.clone()).into_iter().chain(keys).collect()
        };
        let loader = Self { database, name: quoted(&table.name), columns: BTreeSet::new(), keys: keyed, namespace };
        let list = columns.iter().map(|c| quoted(&c.name)).collect::<Vec<_>>().join(", ");
        database.execute_batch(&format!("CREATE TABLE {} ({list})", loader.name)).map_err(failed)?;
        let keys: Vec<String> = loader.keys.iter().map(|k| quoted(k)).chain([quoted(SUBTASK)]).collect();
        if table.shards.iter().any(|s| s.layer > 0) {
            let index = format!(
                "CREATE INDEX {} ON {} ({})",
                quoted(&format!("{}$keys", table.name)),
                loader.name,
                keys.join(", ")
            );
            database.execute_batch(&index).map_err(failed)?;
        }
        Ok(Self { columns: columns.iter().map(|c| c.name.clone()).collect(), ..loader })
    }

    /// Makes room for columns that only later layers have.
    fn widen(&mut self, columns: &[StateColumn]) -> Result<()> {
        for column in columns {
            if self.columns.insert(column.name.clone()) {
                let add = format!("ALTER TABLE {} ADD COLUMN {}", self.name, quoted(&column.name));
                self.database.execute_batch(&add).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn drop_namespaces(&self, subtask: u32, dropped: &[i64]) -> Result<()> {
        let Some((column, is_time)) = &self.namespace else { return Ok(()) };
        let delete = format!("DELETE FROM {} WHERE {} IS ? AND {} IS ?", self.name, quoted(column), quoted(SUBTASK));
        let mut delete = self.database.prepare(&delete).map_err(failed)?;
        for namespace in dropped {
            let namespace = if *is_time {
                let time: ArrayRef =
                    std::sync::Arc::new(arrow::array::TimestampMillisecondArray::from_value(*namespace, 1));
                value(&time, 0)?
            } else {
                Value::Integer(*namespace)
            };
            delete.execute(params![namespace, subtask]).map_err(failed)?;
        }
        Ok(())
    }

    /// Takes the rows of a batch in, or those removed out. A row of a layer replaces what the layers below have.
    fn take(&self, shard: &Shard, batch: &RecordBatch, removed: bool) -> Result<()> {
        let flags = batch.column_by_name(REMOVED).map(|c| c.as_boolean().clone());
        let rows: Vec<usize> =
            (0..batch.num_rows()).filter(|row| flags.as_ref().is_some_and(|f| f.value(*row)) == removed).collect();
        let schema = batch.schema();
        let kept: Vec<(usize, &str)> = (0..schema.fields().len())
            .map(|i| (i, schema.field(i).name().as_str()))
            .filter(|(_, name)| *name != REMOVED && *name != WRITTEN)
            .collect();
        let keys: Vec<usize> = self
            .keys
            .iter()
            .map(|key| {
                schema.index_of(key).map_err(|_| Error::corrupt(format!("shard {} has no column {key}", shard.path)))
            })
            .collect::<Result<_>>()?;
        if shard.layer > 0 {
            let same: String = self.keys.iter().map(|k| format!("{} IS ? AND ", quoted(k))).collect();
            let delete = format!("DELETE FROM {} WHERE {same}{} IS ?", self.name, quoted(SUBTASK));
            self.run(&delete, batch, &keys, &rows, shard.subtask)?;
        }
        if removed {
            return Ok(());
        }
        let names: Vec<String> = kept.iter().map(|(_, n)| quoted(n)).chain([quoted(SUBTASK)]).collect();
        let marks = vec!["?"; names.len()].join(", ");
        let insert = format!("INSERT INTO {} ({}) VALUES ({marks})", self.name, names.join(", "));
        let kept: Vec<usize> = kept.iter().map(|(i, _)| *i).collect();
        self.run(&insert, batch, &kept, &rows, shard.subtask)
    }

    /// Runs a statement once per row, with some of its columns and the subtask.
    fn run(&self, statement: &str, batch: &RecordBatch, columns: &[usize], rows: &[usize], subtask: u32) -> Result<()> {
        let transaction = self.database.unchecked_transaction().map_err(failed)?;
        let mut statement = self.database.prepare_cached(statement).map_err(failed)?;
        for row in rows {
            let mut values: Vec<Value> =
                columns.iter().map(|c| value(batch.column(*c), *row)).collect::<Result<_>>()?;
            values.push(Value::Integer(i64::from(subtask)));
            statement.execute(params_from_iter(values.iter().map(|v| v as &dyn ToSql))).map_err(failed)?;
        }
        drop(statement);
        transaction.commit().map_err(failed)
    }
}

/// A name as SQL takes it.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A value as SQLite has it: numbers as numbers, bytes as bytes, all else as people write it.
fn value(column: &ArrayRef, row: usize) -> Result<Value> {
    if column.is_null(row) {
        return Ok(Value::Null);
    }
    Ok(match column.data_type() {
        DataType::Int8 => Value::Integer(column.as_primitive::<Int8Type>().value(row).into()),
        DataType::Int16 => Value::Integer(column.as_primitive::<Int16Type>().value(row).into()),
        DataType::Int32 => Value::Integer(column.as_primitive::<Int32Type>().value(row).into()),
        DataType::Int64 => Value::Integer(column.as_primitive::<Int64Type>().value(row)),
        DataType::UInt8 => Value::Integer(column.as_primitive::<UInt8Type>().value(row).into()),
        DataType::UInt16 => Value::Integer(column.as_primitive::<UInt16Type>().value(row).into()),
        DataType::UInt32 => Value::Integer(column.as_primitive::<UInt32Type>().value(row).into()),
        DataType::Float32 => Value::Real(column.as_primitive::<Float32Type>().value(row).into()),
        DataType::Float64 => Value::Real(column.as_primitive::<Float64Type>().value(row)),
        DataType::Boolean => Value::Integer(column.as_boolean().value(row).into()),
        DataType::Binary => Value::Blob(column.as_binary::<i32>().value(row).to_vec()),
        DataType::Timestamp(arrow::datatypes::TimeUnit::Millisecond, None) => {
            let ms = column.as_primitive::<TimestampMillisecondType>().value(row);
            match chrono::DateTime::from_timestamp_millis(ms) {
                Some(time) => Value::Text(time.format("%Y-%m-%d %H:%M:%S%.3f").to_string()),
                None => Value::Integer(ms),
            }
        }
        _ => {
            let options = FormatOptions::default();
            let shown = |e: arrow::error::ArrowError| Error::corrupt(format!("show a value of state: {e}"));
            let text = ArrayFormatter::try_new(column, &options).and_then(|f| f.value(row).try_to_string());
            Value::Text(text.map_err(shown)?)
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::{
        array::{BooleanArray, Int64Array, StringArray, TimestampMillisecondArray},
        datatypes::{Field, Schema, TimeUnit},
    };
    use floodmark_snapshot::{Epoch, JobId, OperatorSnapshot, SplitState, manifest::hash_hex, storage};
    use floodmark_state::shard::Writer;

    use super::*;

    /// A row of state: end of its slice, shop, count; `None` for a shop that was removed.
    type Row<'a> = (i64, &'a str, Option<i64>);

    fn file(layer: u32, dropped: &[i64], rows: &[Row<'_>]) -> bytes::Bytes {
        let mut fields = vec![
            Field::new("$slice_end", DataType::Timestamp(TimeUnit::Millisecond, None), false),
            Field::new("shop", DataType::Utf8, true),
            Field::new("n", DataType::Int64, true),
        ];
        let inner = Arc::new(Schema::new(fields.clone()));
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(TimestampMillisecondArray::from_iter_values(rows.iter().map(|r| r.0))),
            Arc::new(rows.iter().map(|r| Some(r.1)).collect::<StringArray>()),
            Arc::new(rows.iter().map(|r| r.2).collect::<Int64Array>()),
        ];
        if layer > 0 {
            fields.push(Field::new(REMOVED, DataType::Boolean, false));
            columns.push(Arc::new(rows.iter().map(|r| Some(r.2.is_none())).collect::<BooleanArray>()));
        }
        let mut header = Header::new(None).of(&inner);
        (header.layer, header.dropped) = (layer, dropped.to_vec());
        let mut writer = Writer::new(header);
        let all = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap();
        let group = |row: &Row<'_>| KeyGroup(if row.1.len() > 1 { group_of(row.1) } else { 1 });
        let mut at = 0;
        for of_group in rows.chunk_by(|a, b| group(a) == group(b)) {
            writer.push(group(&of_group[0]), all.slice(at, of_group.len())).unwrap();
            at += of_group.len();
        }
        writer.finish().unwrap()
    }

    /// A snapshot of one operator whose shards are these: subtask, layer, dropped namespaces, rows.
    async fn snapshot(shards: &[(u32, u32, &[i64], &[Row<'_>])], kind: ShardKind) -> Snapshot {
        let storage = storage::open("memory://").unwrap();
        let column = |name: &str| StateColumn { name: name.into(), data_type: "Utf8".into(), optional: true };
        let mut operator = OperatorSnapshot {
            kind: "window aggregate".into(),
            schema: StateSchema { form: "f".into(), keys: vec![column("shop")], values: vec![column("n")] },
            parallelism: 2,
            splits: vec![SplitState {
                split: "bids-0".into(),
                position: serde_json::json!({ "offset": 7 }),
                watermark: Some(1_000),
                finished: false,
            }],
            shards: Vec::new(),
        };
        for (at, (subtask, layer, dropped, rows)) in shards.iter().enumerate() {
            let bytes = file(*layer, dropped, rows);
            let path = format!("blobs/1/{at}.state");
            let shard = Shard {
                size: bytes.len() as u64,
                hash: hash_hex(&bytes),
                rows: rows.len() as u64,
                subtask: *subtask,
                layer: *layer,
                ..Shard::new(path.clone(), kind)
            };
            storage.put(&path, bytes).await.unwrap();
            operator.shards.push(shard);
        }
        let job = JobId { namespace: "n".into(), name: "j".into(), uid: "u".into() };
        let mut manifest = Manifest::new(job, Epoch(1));
        manifest.operators.insert("hot/window-1".into(), operator);
        Snapshot::new(Arc::new(manifest), storage, "")
    }

    async fn ask(snapshot: &Snapshot, sql: &str) -> Vec<String> {
        let database = load(snapshot, sql).await.unwrap();
        let mut statement = database.prepare(sql).unwrap();
        let columns = statement.column_count();
        let text = |v: Value| match v {
            Value::Null => "-".to_owned(),
            Value::Integer(n) => n.to_string(),
            Value::Real(n) => n.to_string(),
            Value::Text(text) => text,
            Value::Blob(bytes) => format!("{bytes:?}"),
        };
        let row = |row: &rusqlite::Row<'_>| {
            (0..columns).map(|at| row.get(at).map(text)).collect::<Result<Vec<_>, _>>().map(|cells| cells.join(" "))
        };
        statement.query_map([], row).unwrap().map(Result::unwrap).collect()
    }

    const ALL: &str = r#"SELECT "$slice_end", shop, n, "$subtask" FROM "hot/window-1" ORDER BY 4, 1, 2"#;

    #[tokio::test]
    async fn a_later_layer_wins_and_what_it_removed_is_gone() {
        let snapshot = snapshot(
            &[
                (0, 2, &[], &[(20_000, "b", Some(7)), (20_000, "c", None)]),
                (0, 0, &[], &[(10_000, "a", Some(1)), (20_000, "b", Some(2)), (20_000, "c", Some(3))]),
                (0, 1, &[10_000], &[(20_000, "c", Some(30)), (30_000, "a", Some(4))]),
                (1, 0, &[], &[(10_000, "a", Some(100))]),
            ],
            ShardKind::Keyed,
        )
        .await;
        assert_eq!(
            ask(&snapshot, ALL).await,
            [
                "1970-01-01 00:00:20.000 b 7 0",
                "1970-01-01 00:00:30.000 a 4 0",
                "1970-01-01 00:00:10.000 a 100 1", // another subtask's: it has not dropped it
            ]
        );
    }

    #[tokio::test]
    async fn a_key_removed_and_written_again_in_one_layer_is_there() {
        let snapshot = snapshot(
            &[(0, 0, &[], &[(1, "a", Some(1))]), (0, 1, &[], &[(1, "a", Some(5)), (1, "a", None)])],
            ShardKind::Keyed,
        )
        .await;
        assert_eq!(ask(&snapshot, ALL).await, ["1970-01-01 00:00:00.001 a 5 0"]);
    }

    #[tokio::test]
    async fn the_manifest_is_there_as_tables() {
        let snapshot = snapshot(&[(0, 0, &[], &[(1, "a", Some(1))])], ShardKind::Keyed).await;
        assert_eq!(
            ask(&snapshot, "SELECT * FROM sources").await,
            [r#"hot/window-1 bids-0 {"offset":7} 1970-01-01 00:00:01.000 0"#]
        );
        assert_eq!(
            ask(&snapshot, "SELECT uid, kind, parallelism, rows, splits FROM operators").await,
            ["hot/window-1 window aggregate 2 1 1"]
        );
        assert_eq!(ask(&snapshot, "SELECT subtask, kind, layer, rows FROM shards").await, ["0 keyed 0 1"]);
        let table = &StateTable::all(&snapshot.manifest)[0];
        let columns: Vec<String> = table.columns(&snapshot).await.unwrap().into_iter().map(|c| c.name).collect();
        assert_eq!(columns, ["$slice_end", "shop", "n", "$subtask"]);
    }

    const GROUPS: u16 = 16;

    fn groups(first: u16, last: u16) -> KeyGroupRange {
        KeyGroupRange { first: KeyGroup(first), last: KeyGroup(last) }
    }

    /// The key group of a shop.
    fn group_of(shop: &str) -> u16 {
        let column: ArrayRef = Arc::new(StringArray::from(vec![shop]));
        KeyGroup::of(hash_keys(&[column], 1).unwrap()[0], GROUPS).0
    }

    /// A snapshot of two subtasks, which have the parts of the files of one before them up to a key group, and behind it; the
    /// second subtask has changed a shop since. Answers with the rows there should be, too.
    async fn cut_behind(last: u16) -> (Snapshot, Vec<String>) {
        let shops: Vec<String> = (0..60).map(|n| format!("shop{n}")).collect();
        let mut by_group: Vec<&str> = shops.iter().map(String::as_str).collect();
        by_group.sort_by_key(|shop| (group_of(shop), *shop));
        let lowest: Vec<Row<'_>> = by_group.iter().map(|shop| (20_000, *shop, Some(1))).collect();
        // Of a key group rows that were removed stand before others.
        let changes = |shop: &&str| shop.ends_with(['3', '7']);
        let mut above: Vec<Row<'_>> = by_group.iter().filter(|s| changes(s)).map(|s| (20_000, *s, Some(2))).collect();
        above.iter_mut().filter(|row| row.1.ends_with('7')).for_each(|row| row.2 = None);
        above.sort_by_key(|row| (group_of(row.1), row.2));
        let newest = by_group.iter().rfind(|s| group_of(s) > last && s.ends_with('1'));
        let newest: Vec<Row<'_>> = newest.into_iter().map(|s| (20_000, *s, Some(3))).collect();
        let files: [(u32, u32, &[i64], &[Row<'_>]); 3] =
            [(0, 0, &[], &lowest), (0, 1, &[], &above), (1, 2, &[], &newest)];
        let whole = snapshot(&files, ShardKind::Keyed).await;
        let mut manifest = (*whole.manifest).clone();
        manifest.max_parallelism = GROUPS;
        let operator = manifest.operators.values_mut().next().unwrap();
        let mut shards = Vec::new();
        for shard in &operator.shards {
            let all = Shard { key_groups: Some(groups(0, GROUPS - 1)), ..shard.clone() };
            let part = |subtask, own| all.cut_to(own).map(|part| Shard { subtask, ..part });
            match shard.layer {
                2 => shards.push(Shard { key_groups: Some(groups(last + 1, GROUPS - 1)), ..shard.clone() }),
                _ => shards
                    .extend([part(0, groups(0, last)), part(1, groups(last + 1, GROUPS - 1))].into_iter().flatten()),
            }
        }
        operator.shards = shards;
        let mut expected: Vec<String> = Vec::new();
        for shop in by_group.iter().filter(|shop| !shop.ends_with('7')) {
            let n = if newest.iter().any(|row| row.1 == *shop) {
                3
            } else if shop.ends_with('3') {
                2
            } else {
                1
            };
            expected.push(format!("{shop} {n} {}", u8::from(group_of(shop) > last)));
        }
        expected.sort();
        (whole.with_manifest(manifest), expected)
    }

    #[tokio::test]
    async fn of_files_that_are_cut_each_row_is_shown_once_by_whom_it_belongs_to() {
        for last in 0..GROUPS - 1 {
            let (cut, expected) = cut_behind(last).await;
            let rows = ask(&cut, r#"SELECT shop, n, "$subtask" FROM "hot/window-1" ORDER BY 1"#).await;
            let (mut rows, behind) = (rows, last + 1);
            rows.sort();
            assert_eq!(rows, expected, "cut between {last} and {behind}");
        }
        let (cut, _) = cut_behind(7).await;
        let sizes = ask(&cut, "SELECT sum(bytes) FROM operators").await;
        let files: u64 = cut.manifest.files().map(|s| s.size).sum();
        let sizes: u64 = sizes[0].parse().unwrap();
        assert!(
            (files - 2..=files).contains(&sizes),
            "both halves are as large as the whole, but for what is rounded off"
        );
    }

    #[tokio::test]
    async fn parts_of_files_that_only_their_operator_can_tell_apart_are_refused() {
        // By its name no shop belongs where the file has it.
        let whole = snapshot(&[(0, 0, &[], &[(1, "a", Some(1)), (1, "b", Some(2))])], ShardKind::Keyed).await;
        for without_keys in [false, true] {
            let mut manifest = (*whole.manifest).clone();
            manifest.max_parallelism = GROUPS;
            manifest.operators.values_mut().for_each(|o| {
                o.shards[0].key_groups = Some(groups(0, 15));
                o.shards[0] = o.shards[0].cut_to(groups(2, 15)).unwrap();
                if without_keys {
                    o.schema.keys.clear();
                }
            });
            let cut = whole.with_manifest(manifest);
            // Nothing of the block is in these key groups: nobody need know.
            assert_eq!(ask(&cut, ALL).await, Vec::<String>::new());
            let mut manifest = (*cut.manifest).clone();
            manifest.operators.values_mut().for_each(|o| o.shards[0].key_groups = Some(groups(1, 1)));
            let all = whole.with_manifest(manifest.clone());
            assert_eq!(ask(&all, ALL).await.len(), 2, "all of the block is");
        }
        let (cut, _) = cut_behind(7).await;
        let refused = |of: &dyn Fn(&mut OperatorSnapshot)| {
            let mut manifest = (*cut.manifest).clone();
            manifest.operators.values_mut().for_each(of);
            cut.with_manifest(manifest)
        };
        let unknown: [&dyn Fn(&mut OperatorSnapshot); 2] = [
            &|o| o.schema.keys.clear(),
            &|o| o.schema.keys[0].name = "n".into(), // another column than the one by which rows are dealt out
        ];
        for of in unknown {
            let snapshot = refused(of);
            let error = load(&snapshot, ALL).await.unwrap_err().to_string();
            assert!(error.contains("hot/window-1") && error.contains("take a savepoint"), "{error}");
            assert!(load(&snapshot, "SELECT * FROM sources").await.is_ok(), "the rest can be read");
        }
        let lost = refused(&|o| o.shards[0].key_groups = None);
        assert!(load(&lost, ALL).await.unwrap_err().to_string().contains("does not say which"));
    }

    #[tokio::test]
    async fn damage_and_files_that_are_none_of_rocksdb_are_refused_with_a_reason() {
        let damaged = snapshot(&[(0, 0, &[], &[(1, "a", Some(1))])], ShardKind::Keyed).await;
        let mut manifest = (*damaged.manifest).clone();
        manifest.operators.values_mut().for_each(|o| o.shards[0].hash = "0".repeat(32));
        let error = load(&damaged.with_manifest(manifest), ALL).await.unwrap_err().to_string();
        assert!(error.contains("is damaged"), "{error}");
        let native = snapshot(&[(0, 0, &[], &[(1, "a", Some(1))])], ShardKind::RocksDb).await;
        let error = load(&native, ALL).await.unwrap_err().to_string();
        assert!(
            error.contains("read the state of hot/window-1") && error.contains("no data file of RocksDB"),
            "{error}"
        );
        assert!(load(&native, "SELECT * FROM sources").await.is_ok(), "the rest can be read");
    }
}
