//! The readers of everything that is stored, each with what must hold of it for any bytes: it answers or it refuses, and what
//! it accepts means the same once it is written again. Fuzz targets run them (`make fuzz`), and so do ordinary tests over the
//! corpus and random bytes.
//!
//! Checksums keep random bytes away from what is behind them, so each harness comes in two forms: over the bytes as they are,
//! and over a file that is made of them with its checksums right.

use std::sync::Arc;

use arrow::{
    array::{ArrayRef, Int64Array, StringArray},
    record_batch::RecordBatch,
};
use bytes::Bytes;
use floodmark_connectors::kafka::record::{put, stage, unstage};
use floodmark_crds::StreamJob;
use floodmark_dataflow::{
    RestoredShard,
    inflight::{self, InputChannel},
};
use floodmark_snapshot::{
    Disposition, Error, KeyGroup, KeyGroupRange, Result, Shard, ShardKind,
    block::{BLOCK_OVERHEAD, BlockWriter, read_blocks, read_trailer},
    log::{self, Entry, LogState},
    restore::Reference,
    savepoint::Savepoint,
    sealed,
};
use floodmark_state::{
    Dealing, OperatorState,
    shard::{FOOTER_LEN, Opened, Reader},
};

/// A harness: takes any bytes, and panics if something does not hold.
pub type Harness = fn(&[u8]);

/// All harnesses, by the names of their fuzz targets.
pub const ALL: [(&str, Harness); 11] = [
    ("block_file", block_file),
    ("log_entries", log_entries),
    ("log_fold", log_fold),
    ("savepoint_manifest", savepoint_manifest),
    ("state_file", state_file),
    ("rows_in_flight", rows_in_flight),
    ("staged_lines", staged_lines),
    ("staged_records", staged_records),
    ("lists", lists),
    ("reference", reference),
    ("stream_job", stream_job),
];

/// The kinds of state files, of files of rows in flight, and of lists.
const STATE: &str = "state";
const ROWS: &str = "rows";
const LIST: &str = "list";

fn all_groups() -> KeyGroupRange {
    KeyGroupRange { first: KeyGroup(0), last: KeyGroup(u16::MAX) }
}

/// Readers turn a panic of Arrow's decoder into an error; a fuzzer's hook would end the process before they can. A panic that
/// nobody catches still ends it.
pub fn let_panics_be_caught() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| std::panic::set_hook(Box::new(|_| {})));
}

/// A part of the input: its first byte is the part's length, in sixteenths of what follows.
fn split(data: &[u8]) -> (&[u8], &[u8]) {
    match data.split_first() {
        Some((share, rest)) => rest.split_at(rest.len() * usize::from(share % 17) / 16),
        None => (data, data),
    }
}

/// Parts of the input, at most `max`.
fn parts(mut data: &[u8], max: usize) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    while !data.is_empty() && parts.len() < max {
        let (part, rest) = split(data);
        parts.push(part);
        data = rest;
    }
    parts
}

/// A file of blocks.
fn framed(kind: &str, payloads: &[&[u8]]) -> Bytes {
    let mut writer = BlockWriter::new(kind);
    for payload in payloads {
        writer.push(payload).expect("inputs are far below the limit of a block");
    }
    writer.finish()
}

/// Whatever a reader of blocks accepts is exactly what the writer writes; whatever the writer writes is accepted.
pub fn block_file(data: &[u8]) {
    for kind in [STATE, ROWS, "", "staged-records"] {
        if let Ok(blocks) = read_blocks(kind, &Bytes::copy_from_slice(data)) {
            assert_eq!(
                framed(kind, &blocks.iter().map(AsRef::as_ref).collect::<Vec<_>>()),
                data,
                "accepted as {kind:?}"
            );
        }
        // The end of a file, read alone.
        if read_trailer(kind, &Bytes::copy_from_slice(data)).is_ok() {
            assert_eq!(data.len(), 12);
        }
    }
    let parts = parts(data, 16);
    let file = framed(STATE, &parts);
    assert_eq!(read_blocks(STATE, &file).expect("what was written"), parts);
    if let Some(at) = data.first().map(|b| usize::from(*b) * file.len() / 256) {
        let mut bad = file.to_vec();
        bad[at] ^= 0x10;
        assert!(read_blocks(STATE, &bad.into()).is_err(), "a changed byte");
        assert!(read_blocks(STATE, &file.slice(..at)).is_err(), "a cut file");
    }
    assert!(read_blocks(ROWS, &file).is_err(), "another kind");
}

/// The bytes of a file whose body is `body`, with the right checksum.
fn seal_raw(key: &str, body: &[u8]) -> Vec<u8> {
    let crc = crc32c::crc32c(body);
    [format!("{{\"format\":1,\"crc32c\":\"{crc:08x}\",\"{key}\":").as_bytes(), body, b"}\n"].concat()
}

/// Log entries: raw, and with the checksum right. What is accepted is accepted again as it is written, and is the same.
pub fn log_entries(data: &[u8]) {
    for bytes in [data.to_vec(), seal_raw("entry", data)] {
        let Ok(entry) = log::decode(&bytes) else { continue };
        let again = log::encode(&entry).expect("an entry that was read can be written");
        assert_eq!(log::decode(&again).expect("what was written"), entry);
    }
}

/// A log of any entries in any order: the fold takes them, its numbers never go back, and no checkpoint is there twice.
pub fn log_fold(data: &[u8]) {
    let mut state = LogState::default();
    for (seq, part) in parts(data, 64).into_iter().enumerate() {
        let before = state.clone();
        let entry: Result<Entry> = log::decode(&seal_raw("entry", part));
        // Most entries are to be taken, wherever they say that they stand.
        let entry = entry.map(|e| if part.len() % 8 == 0 { e } else { Entry { seq: seq as u64, ..e } });
        state.apply(seq as u64, entry);
        assert!(state.next_seq == seq as u64 + 1, "the next number");
        assert!(state.generation >= before.generation && state.attempt >= before.attempt, "numbers go back");
        assert!(state.last_epoch >= before.last_epoch && state.committed >= before.committed, "epochs go back");
    }
    // What the fold holds can be asked for, and given up.
    for retain in [1, 3] {
        if let Some(release) = floodmark_snapshot::retention::release(&state, retain, std::iter::empty()) {
            assert!(!release.epochs.is_empty(), "a release of nothing");
        }
    }
}

/// The manifest of a savepoint, raw and with its checksum right.
pub fn savepoint_manifest(data: &[u8]) {
    for bytes in [data.to_vec(), seal_raw("savepoint", data)] {
        let read: Result<Savepoint> = sealed::open("savepoint", "savepoint manifest", &bytes);
        let Ok(savepoint) = read else { continue };
        let again = sealed::seal("savepoint", &savepoint).expect("a savepoint that was read can be written");
        let read: Savepoint = sealed::open("savepoint", "savepoint manifest", &again).expect("what was written");
        assert_eq!(read, savepoint);
        // Whatever the numbers are, adding them up does no harm.
        let _ = floodmark_snapshot::restore::check_format(&savepoint.manifest);
    }
}

/// Reads all of a state file, as a whole and in parts: what the parts accept the whole has, if it accepts anything.
fn read_state(file: &Bytes) {
    let tail = file.slice(file.len().saturating_sub(FOOTER_LEN)..);
    for tail in [tail, file.clone()] {
        if let Ok(Opened::More { from }) = Reader::open(file.len() as u64, &tail) {
            assert!(from < file.len() as u64, "the index begins at byte {from} of {}", file.len());
        }
    }
    let Ok(reader) = Reader::whole(file) else {
        assert!(Reader::verified(file).is_err(), "a file that can't be opened is verified");
        return;
    };
    let rows = |reader: &Reader| -> Result<Vec<RecordBatch>> {
        let blocks: Result<Vec<Vec<RecordBatch>>> = reader.blocks(file, all_groups()).collect();
        Ok(blocks?.into_iter().flatten().collect())
    };
    let (_, ranges) = (reader.rows(), reader.ranges(all_groups()));
    if let (Ok(verified), Ok(found)) = (Reader::verified(file), rows(&reader)) {
        let blocks: Vec<(usize, Bytes)> = ranges
            .iter()
            .map(|(block, range)| (*block, file.slice(range.start as usize..range.end as usize)))
            .collect();
        let part = Arc::new(verified).part(&blocks).expect("all blocks of a verified file");
        let again: Result<Vec<Vec<RecordBatch>>> = part.blocks(all_groups()).map(|(_, batches)| batches).collect();
        assert_eq!(again.expect("rows that were read").into_iter().flatten().collect::<Vec<_>>(), found);
    }
}

/// State files: raw bytes; any index and rows in a right frame; and any rows behind a right index.
pub fn state_file(data: &[u8]) {
    read_state(&Bytes::copy_from_slice(data));
    let (index, rows) = split(data);
    let parts = parts(rows, 4);
    // A right frame and footer around any index.
    let mut writer = BlockWriter::new(STATE);
    let mut places = Vec::new();
    for part in &parts {
        let offset = writer.len();
        writer.push(part).expect("a small block");
        places.push((offset, writer.len() - offset, writer.last_crc()));
    }
    let finish = |mut writer: BlockWriter, index: &[u8]| {
        let offset = writer.len() as u64;
        writer.push(index).expect("a small block");
        let length = writer.len() as u64 - offset;
        writer.push(&[offset.to_le_bytes(), length.to_le_bytes()].concat()).expect("a small block");
        writer.finish()
    };
    let mut other = BlockWriter::new(STATE);
    parts.iter().for_each(|part| other.push(part).expect("a small block"));
    read_state(&finish(other, index));
    // A right index, too.
    let place = |(i, (offset, length, crc)): (usize, &(usize, usize, u32))| {
        format!("{{\"first\":{i},\"last\":{i},\"offset\":{offset},\"length\":{length},\"rows\":1,\"crc\":{crc}}}")
    };
    let places: Vec<String> = places.iter().enumerate().map(place).collect();
    let header = "{\"format\":2,\"watermark\":null,\"layer\":0,\"columns\":[]}";
    let index = format!("{{\"header\":{header},\"blocks\":[{}]}}", places.join(","));
    read_state(&finish(writer, index.as_bytes()));
    // Rows that Arrow wrote, with one byte changed behind the checksum.
    let mut stream = stream_of(data);
    if let (Some(byte), true) = (data.first(), data.len() >= 4) {
        let at = u16::from_le_bytes([data[1], data[2]]) as usize % stream.len();
        stream[at] ^= *byte;
        let mut writer = BlockWriter::new(STATE);
        writer.push(&stream).expect("a small block");
        let (length, crc) = (writer.len() - 11, writer.last_crc());
        let index = format!(
            "{{\"header\":{header},\"blocks\":[{{\"first\":0,\"last\":9,\"offset\":11,\"length\":{length},\"rows\":1,\"crc\":{crc}}}]}}"
        );
        read_state(&finish(writer, index.as_bytes()));
    }
}

/// An Arrow stream of rows made of these bytes.
fn stream_of(data: &[u8]) -> Vec<u8> {
    let numbers: Int64Array = data.iter().take(32).map(|b| Some(i64::from(*b)).filter(|n| n % 3 > 0)).collect();
    let texts: StringArray = data.iter().take(32).map(|b| Some(format!("text {b}"))).collect();
    let columns = [("n", Arc::new(numbers) as ArrayRef), ("t", Arc::new(texts) as ArrayRef)];
    let rows = RecordBatch::try_from_iter(columns).expect("columns of one length");
    let mut writer = arrow::ipc::writer::StreamWriter::try_new(Vec::new(), &rows.schema()).expect("a vector takes it");
    writer.write(&rows).expect("a vector takes it");
    writer.into_inner().expect("a vector takes it")
}

/// Takes rows in flight in as a restore does.
fn share(file: Bytes, hashed: bool) {
    for (index, parallelism) in [(0, 1), (1, 3)] {
        let groups = KeyGroupRange::of_subtask(index, parallelism, 16);
        let input = InputChannel { key_groups: hashed.then_some(groups), ..InputChannel::to_port(0) };
        let shard =
            Shard { key_groups: hashed.then(all_groups), subtask: index, ..Shard::new("rows", ShardKind::Channel) };
        let shard = RestoredShard::new(shard, file.clone());
        let Ok(rows) = inflight::share(&[shard], &[input], index, parallelism, 16) else { continue };
        for row in rows {
            assert_eq!(row.port, 0);
            if let Some(hashes) = &row.batch.hashes {
                assert_eq!(hashes.len(), row.batch.len());
                assert!(hashes.iter().all(|h| groups.contains(KeyGroup::of(*h, 16))), "a row of somebody else's");
            }
        }
    }
}

/// Files of rows in flight: raw bytes; any header and rows in a right frame; and any rows behind a right header.
pub fn rows_in_flight(data: &[u8]) {
    share(Bytes::copy_from_slice(data), true);
    let blocks = parts(data, 4);
    share(framed(ROWS, &blocks), true);
    for hashed in [true, false] {
        let header = format!("{{\"format\":1,\"input\":\"0\",\"port\":0,\"hashed\":{hashed}}}");
        let whole: Vec<&[u8]> = std::iter::once(header.as_bytes()).chain(blocks.iter().copied()).collect();
        share(framed(ROWS, &whole), hashed);
        let mut stream = stream_of(data);
        if data.len() >= 4 {
            let at = u16::from_le_bytes([data[1], data[2]]) as usize % stream.len();
            stream[at] ^= data[0];
        }
        share(framed(ROWS, &[header.as_bytes(), &stream]), hashed);
    }
}

/// Staged lines, as the sink of files and the job of this crate have them: blocks, whose bytes come out as they went in.
pub fn staged_lines(data: &[u8]) {
    const STAGED: &str = crate::world::STAGED;
    let lines = |blocks: &[Bytes]| blocks.concat();
    if let Ok(blocks) = read_blocks(STAGED, &Bytes::copy_from_slice(data)) {
        assert!(lines(&blocks).len() + blocks.len() * BLOCK_OVERHEAD < data.len());
    }
    let parts = parts(data, 8);
    let read = read_blocks(STAGED, &framed(STAGED, &parts)).expect("what was written");
    assert_eq!(lines(&read), parts.concat());
    let back = std::str::from_utf8(data).map(|text| text.lines().count());
    let forth = std::str::from_utf8(&lines(&read)).map(|text| text.lines().count());
    // A file is cut into parts anywhere, so only whole inputs are compared.
    if parts.concat() == data {
        assert_eq!(back, forth);
    }
}

/// Staged records, as the sink of Kafka has them. Whatever its committer takes is what somebody staged, record by record.
pub fn staged_records(data: &[u8]) {
    const STAGED: &str = "staged-records";
    let read = |file: &Bytes| -> Result<Vec<u8>> {
        let mut again = Vec::new();
        unstage(file, |(key, value)| put(&mut again, key, value))?;
        Ok(again)
    };
    let raw = Bytes::copy_from_slice(data);
    if let Ok(again) = read(&raw) {
        assert_eq!(again, read_blocks(STAGED, &raw).expect("a file that was accepted").concat());
    }
    // Any bytes behind right checksums.
    let parts = parts(data, 8);
    match read(&framed(STAGED, &parts)) {
        Ok(again) => assert_eq!(again, parts.concat()),
        Err(error) => assert_eq!(error.disposition(), Disposition::Corrupt, "{error}"),
    }
    // Right records: keys and values of any bytes, and some without.
    let (mut block, mut ends) = (Vec::new(), Vec::new());
    for pair in parts.chunks(2) {
        let (key, value) = (pair[0], pair.get(1).copied());
        put(&mut block, Some(key).filter(|k| k.first() != Some(&0)), value).expect("a short record");
        ends.push(block.len());
    }
    let half = block.len() / 2;
    let file = stage([block.as_slice()]).expect("a small block");
    assert_eq!(read(&file).expect("what was staged"), block);
    // A block ends with a record.
    let two = stage([&block[..half], &block[half..]]).expect("small blocks");
    assert_eq!(read(&two).is_ok(), half == 0 || ends.contains(&half), "cut at {half}, records end at {ends:?}");
}

/// Lists of operators: elements come out as they went in, and are dealt out so that none is lost or there twice.
pub fn lists(data: &[u8]) {
    let shard = |kind: ShardKind, subtask: u32, bytes: Bytes| {
        let shard = Shard { subtask, name: Some("list".to_owned()), ..Shard::new("list", kind) };
        RestoredShard::new(shard, bytes)
    };
    let restored = |dealing: Dealing, kind: ShardKind, index: u32, files: &[Bytes]| -> Result<Vec<Bytes>> {
        let mut list = OperatorState::new(dealing, "list", index, 3);
        for (subtask, file) in (0..).zip(files) {
            list.restore(&shard(kind, subtask, file.clone()))?;
        }
        list.restored();
        Ok(list.elements)
    };
    let raw = [Bytes::copy_from_slice(data)];
    if let Ok(elements) = restored(Dealing::Union, ShardKind::Union, 0, &raw) {
        assert_eq!(framed(LIST, &elements.iter().map(AsRef::as_ref).collect::<Vec<_>>()), data);
    }
    let parts = parts(data, 12);
    let (one, other) = parts.split_at(parts.len() / 2);
    let files = [framed(LIST, one), framed(LIST, other)];
    let all = restored(Dealing::Union, ShardKind::Union, 1, &files).expect("what was written");
    assert_eq!(all, parts);
    let mut dealt: Vec<Bytes> = Vec::new();
    for index in 0..3 {
        dealt.extend(restored(Dealing::Split, ShardKind::Split, index, &files).expect("what was written"));
    }
    dealt.sort();
    let mut wanted = parts;
    wanted.sort_unstable();
    assert_eq!(dealt, wanted);
}

/// Names of snapshots: one that is understood is written so that it is understood the same.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let parsed: Result<Reference, Error> = text.parse();
    match parsed {
        Ok(reference) => {
            let again: Reference = reference.to_string().parse().expect("the name of a reference names it");
            assert_eq!(again, reference, "from {text:?}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Manifests of jobs: whatever is refused is refused with words.
pub fn stream_job(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for text in [text.to_owned(), format!("{STREAM_JOB}{}", text.replace('\n', "\n  "))] {
        match StreamJob::from_yaml(&text, "job.yaml") {
            Ok(job) => {
                let again = serde_json::to_string(&job).expect("a job that was read can be written");
                let read = StreamJob::from_yaml(&again, "job.json").expect("what was written");
                assert_eq!(serde_json::to_string(&read).expect("as above"), again);
            }
            Err(error) => assert!(!error.problems.is_empty(), "refused without a word"),
        }
    }
}

/// The beginning of a manifest: fields of its spec follow.
const STREAM_JOB: &str = "apiVersion: floodmark.io/v1alpha1\nkind: StreamJob\nmetadata: {name: a}\nspec:\n  ";
