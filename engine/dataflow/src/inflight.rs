//! Rows in flight: what an unaligned barrier has overtaken, as it is kept in a snapshot and dealt out at a restore.
//!
//! A task that snapshots before all barriers have come keeps the rows that were on their way to it, input by input
//! ([`ShardKind::Channel`]). After a restore it processes them before anything that its channels bring ([`share`]): rows of a
//! hash exchange go to the owners of their keys; rows of any other to the subtask with their old one's index modulo the new
//! parallelism. Invariants: every row goes to exactly one subtask; rows that came over one channel stay in their order.
//!
//! ```text
//! file   = a file of checksummed blocks (floodmark_snapshot::block), kind "rows"
//! blocks = header (JSON), then Arrow IPC streams: successive batches of one schema share one
//! ```
//! Rows of a hash exchange carry the hash of their key in a last column, [`HASH`]. Pure.

use std::sync::Arc;

use arrow::{
    array::{ArrayRef, AsArray, BooleanArray, UInt64Array},
    compute::filter_record_batch,
    datatypes::{DataType, Field, Schema, UInt64Type},
    error::ArrowError,
    ipc::writer::StreamWriter,
    record_batch::RecordBatch,
};
use bytes::Bytes;
use floodmark_snapshot::{
    Error, KeyGroup, KeyGroupRange, Result, Shard, ShardKind,
    block::{BlockWriter, read_blocks},
};
use floodmark_state::ipc;
use serde::{Deserialize, Serialize};

use crate::{Batch, Exchange, JobGraph, PendingShard, Port, RestoredShard};

/// Name of the column that holds the hash of a row's key in a file of rows in flight: `UInt64`, always the last.
pub const HASH: &str = "$hash";

const KIND: &str = "rows";
const FORMAT: u32 = 1;

/// One of the channels that lead to a subtask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputChannel {
    /// The port of the task's first operator that it leads to.
    pub port: Port,
    /// The name of the input that it belongs to, stable as long as the job is the same: see [`input_name`].
    pub input: Arc<str>,
    /// The key groups of the receiver, if the rows come over a hash exchange.
    pub key_groups: Option<KeyGroupRange>,
    /// Whether barriers never overtake rows on it. So it is on a forward exchange: what is behind its rows is known only to
    /// the subtask that sent them, so at another parallelism rows in flight could be passed by later ones of the same key.
    pub in_order: bool,
}

impl InputChannel {
    /// The channels of edge number `edge` of the graph that lead to a subtask which owns `key_groups` are all alike: this.
    #[must_use]
    pub fn of_edge(graph: &JobGraph, edge: usize, key_groups: KeyGroupRange) -> Self {
        let exchange = graph.edges.get(edge).map(|e| &e.exchange);
        Self {
            port: graph.edges.get(edge).map_or(0, |e| e.port),
            input: input_name(graph, edge).into(),
            key_groups: matches!(exchange, Some(Exchange::Hash(_))).then_some(key_groups),
            in_order: matches!(exchange, Some(Exchange::Forward)),
        }
    }

    /// A channel to this port whose rows come without keys: for tests, and for tasks that take no snapshots.
    #[must_use]
    pub fn to_port(port: Port) -> Self {
        Self { port, input: format!("{port}").into(), key_groups: None, in_order: false }
    }
}

/// The name of an input of a task: the operator that the rows come from, and the port that they go to.
#[must_use]
pub fn input_name(graph: &JobGraph, edge: usize) -> String {
    let Some(edge) = graph.edges.get(edge) else { return String::new() };
    let from = graph.vertices.get(edge.from.0).and_then(|v| v.chain.last());
    format!("{} to {}", from.map_or("", |n| &n.uid.0), edge.port)
}

/// Rows that were in flight at the snapshot that a task starts from.
#[derive(Clone, Debug)]
pub struct InFlight {
    /// The name of the input that they came over.
    pub input: Arc<str>,
    /// The port of the first operator that they go to.
    pub port: Port,
    /// The rows; with hashes if they came over a hash exchange.
    pub batch: Batch,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Header {
    format: u32,
    input: String,
    port: Port,
    /// Whether the last column is [`HASH`].
    hashed: bool,
}

/// The shard that rows in flight over one input become. Pointers are cloned here; encoding happens later.
#[must_use]
pub(crate) fn pending(
    input: &Arc<str>,
    port: Port,
    key_groups: Option<KeyGroupRange>,
    batches: Vec<Batch>,
) -> PendingShard {
    let rows = batches.iter().map(|b| b.len() as u64).sum();
    let name = input.clone();
    let encode = move || encode(&name, port, key_groups.is_some(), &batches);
    PendingShard {
        name: Some(input.to_string()),
        ..PendingShard::new(ShardKind::Channel, key_groups, rows, Box::new(encode))
    }
}

/// Whether subtask `index` of `parallelism` needs the bytes of this shard for its [`share`].
#[must_use]
pub fn concerns(shard: &Shard, index: u32, parallelism: u32, max_parallelism: u16) -> bool {
    shard.kind == ShardKind::Channel
        && match shard.key_groups {
            Some(groups) => groups.overlaps(&KeyGroupRange::of_subtask(index, parallelism, max_parallelism)),
            None => shard.subtask % parallelism == index,
        }
}

/// The rows in flight that subtask `index` of `parallelism` starts with, for [`SubtaskSpec::replay`]: its share of the
/// [`ShardKind::Channel`] shards of all earlier subtasks of its task, which are listed under the uid of the task's first
/// operator. Other shards, and those that do not concern it, may be among them. `inputs` are the subtask's channels.
///
/// [`SubtaskSpec::replay`]: crate::task::SubtaskSpec::replay
///
/// # Errors
/// `Corrupt` if a shard is not, byte for byte, what was written; `Abort` if its rows came over an input that is no more.
pub fn share(
    shards: &[RestoredShard],
    inputs: &[InputChannel],
    index: u32,
    parallelism: u32,
    max_parallelism: u16,
) -> Result<Vec<InFlight>> {
    let mut mine: Vec<&RestoredShard> =
        shards.iter().filter(|s| concerns(&s.shard, index, parallelism, max_parallelism)).collect();
    mine.sort_by_key(|s| (s.shard.subtask, s.shard.name.clone(), s.shard.path.clone()));
    let owned = KeyGroupRange::of_subtask(index, parallelism, max_parallelism);
    let mut replay = Vec::new();
    for restored in mine {
        let shard = &restored.shard;
        let (header, batches) =
            decode(restored.file()?).map_err(|e| e.context(format!("read shard {}", shard.path)))?;
        let known = inputs.iter().find(|i| *i.input == *header.input && i.key_groups.is_some() == header.hashed);
        let Some(known) = known.filter(|i| i.port == header.port) else {
            return Err(Error::abort(format!(
                "the checkpoint holds {} rows that were on their way ({}), and the job has no such input any more; \
                 before changing the job like that, stop it with a savepoint, which leaves no rows on their way",
                shard.rows, header.input
            )));
        };
        for rows in batches {
            let batch = if header.hashed { of_groups(rows, owned, max_parallelism)? } else { Batch::new(rows) };
            if !batch.is_empty() {
                replay.push(InFlight { input: known.input.clone(), port: known.port, batch });
            }
        }
    }
    Ok(replay)
}

fn encode(input: &str, port: Port, hashed: bool, batches: &[Batch]) -> Result<Bytes> {
    let failed = |e: ArrowError| Error::abort(format!("encode rows in flight: {e}"));
    let mut blocks = BlockWriter::new(KIND);
    let header = Header { format: FORMAT, input: input.to_owned(), port, hashed };
    let header = serde_json::to_vec(&header).map_err(|e| Error::abort(format!("encode rows in flight: {e}")))?;
    blocks.push(&header)?;
    let rows = batches.iter().map(|b| if hashed { with_hashes(b) } else { Ok(b.rows.clone()) });
    let rows: Vec<RecordBatch> = rows.collect::<Result<_>>()?;
    for alike in rows.chunk_by(|a, b| a.schema_ref() == b.schema_ref()) {
        let Some(first) = alike.first() else { continue };
        let mut writer = StreamWriter::try_new(Vec::new(), first.schema_ref()).map_err(failed)?;
        for rows in alike {
            writer.write(rows).map_err(failed)?;
        }
        blocks.push(&writer.into_inner().map_err(failed)?)?;
    }
    Ok(blocks.finish())
}

fn with_hashes(batch: &Batch) -> Result<RecordBatch> {
    let hashes = batch.hashes.as_ref().filter(|h| h.len() == batch.len());
    let hashes = hashes
        .ok_or_else(|| Error::abort("internal error: rows of a hash exchange came without the hashes of keys"))?;
    let schema = batch.rows.schema();
    let mut fields: Vec<Arc<Field>> = schema.fields().iter().cloned().collect();
    fields.push(Arc::new(Field::new(HASH, DataType::UInt64, false)));
    let mut columns = batch.rows.columns().to_vec();
    columns.push(Arc::new(UInt64Array::from_iter_values(hashes.iter().copied())) as ArrayRef);
    RecordBatch::try_new(Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone())), columns)
        .map_err(|e| Error::abort(format!("encode rows in flight: {e}")))
}

fn decode(file: &Bytes) -> Result<(Header, Vec<RecordBatch>)> {
    let blocks = read_blocks(KIND, file)?;
    let Some((header, streams)) = blocks.split_first() else {
        return Err(Error::corrupt("a file of rows in flight has no header"));
    };
    let header: Header =
        serde_json::from_slice(header).map_err(|e| Error::corrupt(format!("header of rows in flight: {e}")))?;
    if header.format != FORMAT {
        return Err(Error::abort(format!("rows in flight of format {} (this program reads {FORMAT})", header.format)));
    }
    let mut batches = Vec::new();
    for stream in streams {
        batches.extend(ipc::read("rows in flight", stream)?);
    }
    Ok((header, batches))
}

/// The rows whose keys are in `owned`, with their hashes.
fn of_groups(rows: RecordBatch, owned: KeyGroupRange, max_parallelism: u16) -> Result<Batch> {
    let no_hashes = || Error::corrupt(format!("rows in flight have no column {HASH}"));
    let last = rows.num_columns().checked_sub(1).ok_or_else(no_hashes)?;
    let hashes = rows.column(last).as_primitive_opt::<UInt64Type>().ok_or_else(no_hashes)?.clone();
    if rows.schema().field(last).name() != HASH {
        return Err(no_hashes());
    }
    let wanted: Vec<bool> = hashes.values().iter().map(|h| owned.contains(KeyGroup::of(*h, max_parallelism))).collect();
    let failed = |e: ArrowError| Error::corrupt(format!("rows in flight: {e}"));
    let mut plain = rows;
    plain.remove_column(last);
    let plain = filter_record_batch(&plain, &BooleanArray::from(wanted.clone())).map_err(failed)?;
    let hashes = hashes.values().iter().zip(&wanted).filter(|(_, wanted)| **wanted).map(|(hash, _)| *hash).collect();
    Ok(Batch { rows: plain, hashes: Some(hashes) })
}

#[cfg(test)]
mod tests {
    use arrow::{
        array::{Int64Array, StringArray},
        datatypes::Int64Type,
    };

    use super::*;
    use crate::hash::hash_keys;

    fn hashed(keys: impl IntoIterator<Item = i64>) -> Batch {
        let column: ArrayRef = Arc::new(keys.into_iter().collect::<Int64Array>());
        let hashes = hash_keys(std::slice::from_ref(&column), column.len()).unwrap();
        Batch { rows: RecordBatch::try_from_iter([("k", column)]).unwrap(), hashes: Some(hashes.into()) }
    }

    fn shard(pending: PendingShard, subtask: u32) -> RestoredShard {
        let PendingShard { kind, key_groups, rows, name, encode, .. } = pending;
        let shard = Shard { subtask, key_groups, rows, name, ..Shard::new(format!("{subtask}"), kind) };
        RestoredShard::new(shard, encode().unwrap())
    }

    fn input(name: &str, groups: Option<KeyGroupRange>) -> InputChannel {
        InputChannel { port: 1, input: name.into(), key_groups: groups, in_order: false }
    }

    fn keys(replay: &[InFlight]) -> Vec<i64> {
        replay.iter().flat_map(|r| r.batch.rows.column(0).as_primitive::<Int64Type>().values().to_vec()).collect()
    }

    #[test]
    fn rows_of_a_hash_exchange_go_once_to_the_owners_of_their_keys_at_any_parallelism() {
        let old = 3;
        for new in 1..=5 {
            let mut shards = Vec::new();
            for subtask in 0..old {
                let groups = KeyGroupRange::of_subtask(subtask, old, 128);
                let all = hashed(0..300);
                let mine: Vec<i64> = (0..300)
                    .filter(|k| groups.contains(KeyGroup::of(all.hashes.as_ref().unwrap()[*k as usize], 128)))
                    .collect();
                let batches = mine.chunks(7).map(|c| hashed(c.iter().copied())).collect();
                shards.push(shard(pending(&"up to 1".into(), 1, Some(groups), batches), subtask));
            }
            let mut seen = Vec::new();
            for index in 0..new {
                let owned = KeyGroupRange::of_subtask(index, new, 128);
                let inputs = [input("other", None), input("up to 1", Some(owned))];
                let replay = share(&shards, &inputs, index, new, 128).unwrap();
                for rows in &replay {
                    assert_eq!((rows.port, &*rows.input), (1, "up to 1"));
                    let expected = hash_keys(rows.batch.rows.columns(), rows.batch.len()).unwrap();
                    assert_eq!(rows.batch.hashes.as_deref(), Some(&expected[..]));
                    assert!(expected.iter().all(|h| owned.contains(KeyGroup::of(*h, 128))));
                }
                seen.extend(keys(&replay));
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..300).collect::<Vec<_>>(), "parallelism {new}");
        }
    }

    #[test]
    fn rows_without_keys_stay_together_and_in_order() {
        let of = |subtask: i64| (0..3).map(|i| Batch::new(hashed([subtask * 10 + i]).rows)).collect();
        let shards: Vec<_> = (0..4).map(|s| shard(pending(&"up to 1".into(), 1, None, of(i64::from(s))), s)).collect();
        let shares: Vec<_> =
            (0..3).map(|i| keys(&share(&shards, &[input("up to 1", None)], i, 3, 128).unwrap())).collect();
        assert_eq!(shares, [vec![0, 1, 2, 30, 31, 32], vec![10, 11, 12], vec![20, 21, 22]]);
    }

    #[test]
    fn batches_of_different_layouts_come_back_as_they_were() {
        let text = |s: &str| {
            Batch::new(RecordBatch::try_from_iter([("t", Arc::new(StringArray::from(vec![s])) as ArrayRef)]).unwrap())
        };
        let batches = vec![text("a"), Batch::new(hashed([1]).rows), text("b"), text("c")];
        let shards = [shard(pending(&"i".into(), 1, None, batches.clone()), 0)];
        let replay = share(&shards, &[input("i", None)], 0, 1, 128).unwrap();
        let rows: Vec<_> = replay.into_iter().map(|r| r.batch.rows).collect();
        assert_eq!(rows, batches.into_iter().map(|b| b.rows).collect::<Vec<_>>());
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_found() {
        let groups = KeyGroupRange::of_subtask(0, 1, 128);
        let good = shard(pending(&"i".into(), 1, Some(groups), vec![hashed(0..20)]), 0);
        let file = good.file().unwrap();
        let read = |bytes: Bytes| {
            let bad = RestoredShard::new(good.shard.clone(), bytes);
            share(&[bad], &[input("i", Some(groups))], 0, 1, 128)
        };
        assert_eq!(keys(&read(file.clone()).unwrap()), (0..20).collect::<Vec<_>>());
        for at in 0..file.len() {
            let mut bad = file.to_vec();
            bad[at] ^= 0x10;
            read(bad.into()).expect_err("a flipped byte");
            read(file.slice(..at)).expect_err("a cut file");
        }
    }

    /// What the golden file holds: two batches of one layout and one of another.
    fn golden() -> RestoredShard {
        let text: ArrayRef = Arc::new(StringArray::from(vec!["a", "flood"]));
        let texts = Batch {
            hashes: Some(hash_keys(std::slice::from_ref(&text), 2).unwrap().into()),
            rows: RecordBatch::try_from_iter([("t", text)]).unwrap(),
        };
        let groups = KeyGroupRange::of_subtask(0, 1, 128);
        shard(pending(&"up to 1".into(), 1, Some(groups), vec![hashed(0..5), hashed(5..7), texts]), 0)
    }

    #[test]
    fn a_file_that_the_first_version_wrote_can_be_read() {
        let file = Bytes::from_static(include_bytes!("../tests/golden/in-flight-1.rows"));
        let groups = KeyGroupRange::of_subtask(0, 1, 128);
        let read = |bytes| {
            let shards = [RestoredShard::new(golden().shard, bytes)];
            let replay = share(&shards, &[input("up to 1", Some(groups))], 0, 1, 128).unwrap();
            replay.into_iter().map(|r| (r.batch.rows, r.batch.hashes.unwrap().to_vec())).collect::<Vec<_>>()
        };
        let rows = read(file);
        assert_eq!((rows.len(), rows), (3, read(golden().file().unwrap().clone())));
    }

    #[test]
    #[ignore = "writes the golden file of a new format"]
    fn write_the_golden_file() {
        let path = format!("{}/tests/golden/in-flight-{FORMAT}.rows", env!("CARGO_MANIFEST_DIR"));
        std::fs::write(path, golden().file().unwrap()).unwrap();
    }

    #[test]
    fn rows_of_an_input_that_is_no_more_are_refused() {
        let shards = [shard(pending(&"gone to 1".into(), 1, None, vec![Batch::new(hashed([1]).rows)]), 0)];
        let error = share(&shards, &[input("up to 1", None)], 0, 1, 128).unwrap_err().to_string();
        assert!(error.contains("1 rows that were on their way (gone to 1)") && error.contains("savepoint"), "{error}");
    }
}
