//! Frames as packets.
//!
//! Rows travel as Arrow IPC messages: the schema once and again when it changes, dictionaries when they change, the rest a
//! message per batch, whose buffers are those of the batch's arrays. Hashes of keys are one more column, the last. A batch
//! that is large is cut, never between the two halves of an update. Everything else is in the metadata.
//!
//! ```text
//! kind 1 schema, 2 dictionary: header and body are Arrow's
//! kind 3 rows:                 hashed: u8; header and body are Arrow's
//! kind 4 watermark:            time: i64
//! kind 5 barrier, 6 overtaking barrier: epoch: u64, kind: u8, whole: u8
//! kind 7 idle, 8 end
//! kind 9 grant, back:          bytes that have left the inbox, in all: u64
//! ```

use std::{
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use arrow::{
    array::{Array, ArrayRef, AsArray, RecordBatch, RecordBatchOptions, UInt64Array},
    buffer::{Buffer, ScalarBuffer},
    datatypes::{DataType, Field, Int8Type, Schema, SchemaRef, UInt64Type},
    error::ArrowError,
    ipc::{
        Message, MessageHeader,
        convert::fb_to_schema,
        reader::{read_dictionary, read_record_batch},
        root_as_message,
        writer::StreamEncoder,
    },
};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use floodmark_dataflow::{Barrier, BarrierKind, Batch, Frame, ROW_KIND, RowKind, inflight::HASH};
use floodmark_snapshot::{Epoch, Error, Result};

use crate::{
    envelope::{Opened, Opener, Sealer},
    transport::Packet,
};

const SCHEMA: u8 = 1;
const DICTIONARY: u8 = 2;
const ROWS: u8 = 3;
const WATERMARK: u8 = 4;
const BARRIER: u8 = 5;
const OVERTAKING: u8 = 6;
const IDLE: u8 = 7;
const END: u8 = 8;
const GRANT: u8 = 9;

/// Bytes of rows that go in one packet, if they can be cut.
pub(super) const ROWS_BYTES_MAX: usize = 8 << 20;
/// Bytes before the header of an Arrow IPC message in a stream: a marker and the header's length.
const IPC_PREFIX: usize = 8;

/// Of one channel, at the sender's end.
#[derive(Default)]
pub(super) struct FrameEncoder {
    sealer: Sealer,
    layout: Option<Layout>,
}

/// What the batches that were sent last look like.
struct Layout {
    schema: SchemaRef,
    hashed: bool,
    /// The schema on the way: with a column for the hashes, if there are any.
    wire: SchemaRef,
    stream: StreamEncoder,
}

impl FrameEncoder {
    /// Appends the packets that a frame becomes.
    ///
    /// # Errors
    /// `Abort` when rows can't be written, or a single one is too large.
    pub(super) fn encode(&mut self, frame: Frame, out: &mut VecDeque<Packet>) -> Result<()> {
        let (kind, fields) = match frame {
            Frame::Batch(batch) => return self.rows(batch, out),
            Frame::Watermark(time) => (WATERMARK, time.to_le_bytes().to_vec()),
            Frame::Barrier(barrier) => (BARRIER, put_barrier(barrier)),
            Frame::Overtaking(barrier) => (OVERTAKING, put_barrier(barrier)),
            Frame::Idle => (IDLE, Vec::new()),
            Frame::End => (END, Vec::new()),
        };
        out.push_back(self.sealer.seal(kind, &fields, Bytes::new(), Vec::new())?);
        Ok(())
    }

    fn rows(&mut self, batch: Batch, out: &mut VecDeque<Packet>) -> Result<()> {
        let weight = batch.weight();
        if weight > ROWS_BYTES_MAX
            && let Some(at) = middle(&batch.rows)
        {
            let (first, second) = (part(&batch, 0, at), part(&batch, at, batch.len() - at));
            // Unless most of it is what all rows share.
            if first.weight() + second.weight() < weight + weight / 2 {
                self.rows(first, out)?;
                return self.rows(second, out);
            }
        }
        let buffers = self.buffers(&batch).map_err(|e| Error::abort(format!("write rows for another process: {e}")))?;
        let hashed = u8::from(batch.hashes.is_some());
        let mut pieces = Pieces(buffers.into_iter().map(|b| Bytes::from_owner(Held(b))).collect());
        while let Some(prefix) = pieces.take_whole(IPC_PREFIX) {
            let length = prefix.get(4..).map_or(0, |mut bytes| bytes.get_u32_le());
            let header = pieces.take_whole(length as usize).ok_or_else(cut_off)?;
            let (message_kind, body_length) = {
                let message = root_as_message(&header).map_err(|_| cut_off())?;
                (message.header_type(), usize::try_from(message.bodyLength()).map_err(|_| cut_off())?)
            };
            let body = pieces.take(body_length).ok_or_else(cut_off)?;
            let (kind, fields): (u8, &[u8]) = match message_kind {
                MessageHeader::Schema => (SCHEMA, &[]),
                MessageHeader::DictionaryBatch => (DICTIONARY, &[]),
                _ => (ROWS, &[hashed]),
            };
            out.push_back(self.sealer.seal(kind, fields, header, body)?);
        }
        Ok(())
    }

    /// The batch as messages of an Arrow IPC stream: the arrays' own buffers, and what is between them.
    fn buffers(&mut self, batch: &Batch) -> Result<Vec<Buffer>, ArrowError> {
        let schema = batch.rows.schema_ref();
        let fits =
            |l: &Layout| l.hashed == batch.hashes.is_some() && (Arc::ptr_eq(&l.schema, schema) || l.schema == *schema);
        let layout = match self.layout.take_if(|l| fits(l)) {
            Some(layout) => self.layout.insert(layout),
            None => self.layout.insert(Layout::new(schema.clone(), batch.hashes.is_some())?),
        };
        let Some(hashes) = &batch.hashes else { return layout.stream.encode(&batch.rows) };
        let mut columns = batch.rows.columns().to_vec();
        columns.push(Arc::new(UInt64Array::new(ScalarBuffer::from(hashes.to_vec()), None)));
        layout.stream.encode(&RecordBatch::try_new(layout.wire.clone(), columns)?)
    }
}

impl Layout {
    fn new(schema: SchemaRef, hashed: bool) -> Result<Self, ArrowError> {
        let wire = if hashed {
            let mut fields = schema.fields().to_vec();
            fields.push(Arc::new(Field::new(HASH, DataType::UInt64, false)));
            Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()))
        } else {
            schema.clone()
        };
        let stream = StreamEncoder::try_new(&wire)?;
        Ok(Self { schema, hashed, wire, stream })
    }
}

/// Seals a grant: so many bytes have left the inbox, in all.
pub(super) fn grant(sealer: &mut Sealer, total: u64) -> Result<Packet> {
    sealer.seal(GRANT, &total.to_le_bytes(), Bytes::new(), Vec::new())
}

/// Reads what [`grant`] wrote.
pub(super) fn read_grant(opener: &mut Opener, packet: Packet) -> Result<u64> {
    match opener.open(packet)? {
        Opened { kind: GRANT, mut fields, .. } => fields.try_get_u64_le().map_err(|_| short()),
        Opened { kind, .. } => Err(unknown(kind)),
    }
}

/// Where to cut rows in two: not between the halves of an update.
fn middle(rows: &RecordBatch) -> Option<usize> {
    let mut at = rows.num_rows() / 2;
    let last = rows.num_columns().checked_sub(1)?;
    if rows.schema_ref().field(last).name() == ROW_KIND
        && let Some(kinds) = rows.column(last).as_primitive_opt::<Int8Type>()
        && at > 0
        && kinds.value(at - 1) == RowKind::UpdateBefore as i8
    {
        at += 1;
    }
    (at > 0 && at < rows.num_rows()).then_some(at)
}

fn part(batch: &Batch, from: usize, rows: usize) -> Batch {
    let hashes = batch.hashes.as_ref().and_then(|h| h.get(from..from + rows)).map(Into::into);
    Batch { rows: batch.rows.slice(from, rows), hashes }
}

fn put_barrier(barrier: Barrier) -> Vec<u8> {
    let mut fields = Vec::with_capacity(10);
    fields.put_u64_le(barrier.epoch.0);
    fields.put_u8(match barrier.kind {
        BarrierKind::Checkpoint => 0,
        BarrierKind::Stop => 1,
        BarrierKind::Drain => 2,
    });
    fields.put_u8(u8::from(barrier.whole));
    fields
}

fn take_barrier(mut fields: Bytes) -> Result<Barrier> {
    let epoch = Epoch(fields.try_get_u64_le().map_err(|_| short())?);
    let kind = match fields.try_get_u8() {
        Ok(0) => BarrierKind::Checkpoint,
        Ok(1) => BarrierKind::Stop,
        Ok(2) => BarrierKind::Drain,
        _ => return Err(short()),
    };
    let whole = match fields.try_get_u8() {
        Ok(flag @ 0..=1) => flag == 1,
        _ => return Err(short()),
    };
    Ok(Barrier { epoch, kind, whole })
}

/// Keeps a buffer for the bytes that point into it.
struct Held(Buffer);

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

/// Bytes in pieces, from which some are taken.
struct Pieces(VecDeque<Bytes>);

impl Pieces {
    /// The next bytes, in pieces as they are; `None` if there are not as many.
    fn take(&mut self, mut length: usize) -> Option<Vec<Bytes>> {
        let mut taken = Vec::with_capacity(self.0.len());
        while length > 0 {
            let piece = self.0.front_mut()?;
            let part = piece.split_to(length.min(piece.len()));
            if piece.is_empty() {
                self.0.pop_front();
            }
            length -= part.len();
            if !part.is_empty() {
                taken.push(part);
            }
        }
        Some(taken)
    }

    /// The next bytes in one piece. Only for what is small.
    fn take_whole(&mut self, length: usize) -> Option<Bytes> {
        let mut pieces = self.take(length)?;
        if pieces.len() == 1 {
            return pieces.pop();
        }
        let mut whole = BytesMut::with_capacity(length);
        pieces.iter().for_each(|piece| whole.extend_from_slice(piece));
        Some(whole.freeze())
    }
}

/// Of one channel, at the receiver's end.
#[derive(Default)]
pub(super) struct FrameDecoder {
    opener: Opener,
    /// Of the rows on the way, and of those that come out if hashes go with them.
    schemas: Option<(SchemaRef, SchemaRef)>,
    dictionaries: HashMap<i64, ArrayRef>,
}

impl FrameDecoder {
    /// The frame that a packet is, unless it only prepares for others.
    ///
    /// # Errors
    /// `Corrupt` when it is not what was sent.
    pub(super) fn decode(&mut self, packet: Packet) -> Result<Option<Frame>> {
        let mut opened = self.opener.open(packet)?;
        let frame = match opened.kind {
            SCHEMA | DICTIONARY | ROWS => {
                // The checksum vouches for the bytes; what is left is a sender of another version, and Arrow's defects.
                let decoded = catch_unwind(AssertUnwindSafe(|| self.arrow(&opened)));
                let decoded = decoded.unwrap_or_else(|_| Err(ArrowError::IpcError("the decoder panicked".into())));
                return decoded.map_err(|e| Error::corrupt(format!("read rows of another process: {e}")));
            }
            WATERMARK => Frame::Watermark(opened.fields.try_get_i64_le().map_err(|_| short())?),
            BARRIER => Frame::Barrier(take_barrier(opened.fields)?),
            OVERTAKING => Frame::Overtaking(take_barrier(opened.fields)?),
            IDLE => Frame::Idle,
            END => Frame::End,
            other => return Err(unknown(other)),
        };
        Ok(Some(frame))
    }

    fn arrow(&mut self, opened: &Opened) -> Result<Option<Frame>, ArrowError> {
        let message = root_as_message(&opened.header).map_err(|e| ArrowError::IpcError(e.to_string()))?;
        let missing = |what: &str| ArrowError::IpcError(format!("no {what} in the message"));
        if opened.kind == SCHEMA {
            let wire = fb_to_schema(message.header_as_schema().ok_or_else(|| missing("schema"))?);
            let mut fields = wire.fields().to_vec();
            fields.pop();
            let plain = Schema::new_with_metadata(fields, wire.metadata().clone());
            self.schemas = Some((Arc::new(wire), Arc::new(plain)));
            self.dictionaries.clear();
            return Ok(None);
        }
        let (wire, plain) = self.schemas.as_ref().ok_or_else(|| missing("schema before rows"))?;
        let body = Buffer::from(opened.body.clone());
        if opened.kind == DICTIONARY {
            let dictionary = message.header_as_dictionary_batch().ok_or_else(|| missing("dictionary"))?;
            read_dictionary(&body, dictionary, wire, &mut self.dictionaries, &message.version())?;
            return Ok(None);
        }
        let rows = self.read_rows(&message, &body, wire)?;
        match &opened.fields[..] {
            [0] => Ok(Some(Frame::Batch(Batch::new(rows)))),
            [1] => without_hashes(&rows, plain).map(|batch| Some(Frame::Batch(batch))),
            _ => Err(missing("word about hashes")),
        }
    }

    fn read_rows(&self, message: &Message<'_>, body: &Buffer, schema: &SchemaRef) -> Result<RecordBatch, ArrowError> {
        let header = message.header_as_record_batch();
        let header = header.ok_or_else(|| ArrowError::IpcError("no rows in the message".into()))?;
        read_record_batch(body, header, schema.clone(), &self.dictionaries, None, &message.version())
    }
}

/// Takes the hashes out of the last column.
fn without_hashes(rows: &RecordBatch, schema: &SchemaRef) -> Result<Batch, ArrowError> {
    let Some((hashes, columns)) = rows.columns().split_last() else {
        return Err(ArrowError::IpcError("no column of hashes".into()));
    };
    let hashes = hashes
        .as_primitive_opt::<UInt64Type>()
        .filter(|h| h.null_count() == 0)
        .ok_or_else(|| ArrowError::IpcError("the last column holds no hashes".into()))?;
    let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    let hashes = Arc::from(&hashes.values()[..]);
    let rows = RecordBatch::try_new_with_options(schema.clone(), columns.to_vec(), &options)?;
    Ok(Batch { rows, hashes: Some(hashes) })
}

fn short() -> Error {
    Error::corrupt("a frame is not what a sender writes")
}

fn unknown(kind: u8) -> Error {
    Error::corrupt(format!("a frame of kind {kind} is not known here"))
}

fn cut_off() -> Error {
    Error::abort("internal error: an Arrow message ends early")
}

#[cfg(test)]
mod tests {
    use arrow::{
        array::{DictionaryArray, Int8Array, Int64Array, ListArray, StringArray, StructArray},
        datatypes::Int32Type,
    };

    use super::*;

    fn through(frames: impl IntoIterator<Item = Frame>) -> (Vec<Frame>, Vec<u8>) {
        let (mut encoder, mut decoder, mut packets) =
            (FrameEncoder::default(), FrameDecoder::default(), VecDeque::new());
        frames.into_iter().for_each(|frame| encoder.encode(frame, &mut packets).unwrap());
        let kinds = packets.iter().map(|p| p.metadata[4]).collect();
        (packets.into_iter().filter_map(|p| decoder.decode(p).unwrap()).collect(), kinds)
    }

    fn same(a: &Frame, b: &Frame) -> bool {
        match (a, b) {
            (Frame::Batch(a), Frame::Batch(b)) => a.rows == b.rows && a.hashes == b.hashes,
            _ => format!("{a:?}") == format!("{b:?}"),
        }
    }

    fn numbers(rows: std::ops::Range<i64>) -> RecordBatch {
        RecordBatch::try_from_iter([("n", Arc::new(rows.collect::<Int64Array>()) as ArrayRef)]).unwrap()
    }

    #[test]
    fn frames_without_rows_arrive_with_all_their_fields() {
        let kinds = [BarrierKind::Checkpoint, BarrierKind::Stop, BarrierKind::Drain];
        let barriers = kinds
            .into_iter()
            .flat_map(|kind| [false, true].map(|whole| Barrier { epoch: Epoch(u64::MAX - 7), kind, whole }));
        let mut frames: Vec<Frame> = barriers.flat_map(|b| [Frame::Barrier(b), Frame::Overtaking(b)]).collect();
        frames.extend([Frame::Watermark(i64::MIN / 4), Frame::Watermark(-1), Frame::Idle, Frame::End]);
        let (arrived, _) = through(frames.clone());
        assert_eq!(arrived.len(), frames.len());
        assert!(arrived.iter().zip(&frames).all(|(a, b)| same(a, b)), "{arrived:?}");
    }

    #[test]
    fn rows_of_any_type_arrive_with_their_hashes_and_the_schema_goes_once() {
        let words: DictionaryArray<Int32Type> = ["x", "y", "x"].into_iter().collect();
        let lists = ListArray::from_iter_primitive::<arrow::datatypes::Int64Type, _, _>([
            Some(vec![Some(1), None]),
            None,
            Some(vec![]),
        ]);
        let texts = Arc::new(StringArray::from(vec![Some("a"), None, Some("ccc")])) as ArrayRef;
        let nested = StructArray::try_from(vec![("t", texts.clone())]).unwrap();
        let rows = RecordBatch::try_from_iter([
            ("w", Arc::new(words) as ArrayRef),
            ("l", Arc::new(lists) as _),
            ("t", texts),
            ("s", Arc::new(nested) as _),
        ])
        .unwrap();
        let hashed = Batch { rows: rows.clone(), hashes: Some(vec![1, u64::MAX, 3].into()) };
        let frames = [hashed.clone(), hashed.clone(), part(&hashed, 1, 2)].map(Frame::Batch);
        let (arrived, kinds) = through(frames.clone());
        assert_eq!(kinds, [SCHEMA, DICTIONARY, ROWS, ROWS, ROWS]);
        assert!(arrived.iter().zip(&frames).all(|(a, b)| same(a, b)), "{arrived:?}");
        let Frame::Batch(last) = &arrived[2] else { panic!() };
        assert_eq!((last.len(), last.hashes.as_deref()), (2, Some(&[u64::MAX, 3][..])));
    }

    #[test]
    fn a_schema_that_changes_goes_again() {
        let plain = Frame::Batch(Batch::new(numbers(0..3)));
        let hashed = Frame::Batch(Batch { rows: numbers(0..3), hashes: Some(vec![7, 8, 9].into()) });
        let other = RecordBatch::try_from_iter([("m", Arc::new(Int64Array::from(vec![1])) as ArrayRef)]).unwrap();
        let frames = [plain.clone(), plain.clone(), hashed.clone(), Frame::Batch(Batch::new(other)), plain];
        let (arrived, kinds) = through(frames.clone());
        assert_eq!(kinds, [SCHEMA, ROWS, ROWS, SCHEMA, ROWS, SCHEMA, ROWS, SCHEMA, ROWS]);
        assert!(arrived.iter().zip(&frames).all(|(a, b)| same(a, b)));
    }

    #[test]
    fn dictionaries_that_change_arrive_as_they_were_with_each_batch() {
        let words = |words: &[&str]| {
            let words: DictionaryArray<Int32Type> = words.iter().copied().collect();
            Frame::Batch(Batch::new(RecordBatch::try_from_iter([("w", Arc::new(words) as ArrayRef)]).unwrap()))
        };
        let frames = [words(&["a", "b"]), words(&["a", "b"]), words(&["c"]), words(&["a", "b", "c"])];
        let (arrived, _) = through(frames.clone());
        assert_eq!(arrived.len(), 4);
        assert!(arrived.iter().zip(&frames).all(|(a, b)| same(a, b)), "{arrived:?}");
    }

    #[test]
    fn large_batches_are_cut_but_no_update_is_torn() {
        let rows = ROWS_BYTES_MAX as i64 / 8 * 3;
        // `UpdateBefore` at odd rows: every even cut would tear one.
        let kinds: Int8Array = (0..rows).map(|r| if r == 0 || r == rows - 1 { 0 } else { 2 - (r % 2) as i8 }).collect();
        let numbers = Arc::new((0..rows).collect::<Int64Array>()) as ArrayRef;
        let whole = RecordBatch::try_from_iter([("n", numbers), (ROW_KIND, Arc::new(kinds) as _)]).unwrap();
        let hashes: Arc<[u64]> = (0..rows as u64).collect();
        let (arrived, _) = through([Frame::Batch(Batch { rows: whole.clone(), hashes: Some(hashes) })]);
        assert!(arrived.len() > 3, "{}", arrived.len());
        let mut next = 0;
        for frame in &arrived {
            let Frame::Batch(batch) = frame else { panic!() };
            assert!(batch.weight() <= ROWS_BYTES_MAX + 64);
            assert_eq!(batch.rows, whole.slice(next, batch.len()));
            assert_eq!(batch.hashes.as_ref().unwrap().first(), Some(&(next as u64)));
            next += batch.len();
            let last = batch.rows.column(1).as_primitive::<Int8Type>().value(batch.len() - 1);
            assert_ne!(last, RowKind::UpdateBefore as i8);
        }
        assert_eq!(next, whole.num_rows());
    }

    #[test]
    fn rows_leave_without_a_copy() {
        let rows = numbers(0..1000);
        let values = rows.column(0).to_data().buffers()[0].as_ptr();
        let mut packets = VecDeque::new();
        FrameEncoder::default().encode(Frame::Batch(Batch::new(rows)), &mut packets).unwrap();
        assert!(packets[1].body.iter().any(|piece| piece.as_ptr() == values));
    }

    #[test]
    fn rows_arrive_without_a_copy_where_they_lie_as_their_type_needs_and_texts_always() {
        let texts: StringArray = (0..100).map(|n| Some(format!("number {n}"))).collect();
        let numbers = Arc::new((0..100).collect::<Int64Array>()) as ArrayRef;
        let rows = RecordBatch::try_from_iter([("n", numbers), ("t", Arc::new(texts) as _)]).unwrap();
        let mut packets = VecDeque::new();
        FrameEncoder::default().encode(Frame::Batch(Batch::new(rows.clone())), &mut packets).unwrap();
        let [schema, sent] = <[Packet; 2]>::try_from(Vec::from(packets)).unwrap();
        let body = sent.clone().into_body();
        for shift in 0..16 {
            let mut room = vec![0; body.len() + 64];
            let from = room.as_ptr().align_offset(64) + shift;
            room[from..from + body.len()].copy_from_slice(&body);
            let here = Bytes::from(room).slice(from..from + body.len());
            let mut decoder = FrameDecoder::default();
            decoder.decode(schema.clone()).unwrap();
            let packet = Packet { body: vec![here.clone()], ..sent.clone() };
            let Some(Frame::Batch(batch)) = decoder.decode(packet).unwrap() else { panic!() };
            assert_eq!(batch.rows, rows);
            let is_there = |column: usize, buffer: usize| {
                let data = batch.rows.column(column).to_data();
                here.as_ptr_range().contains(&data.buffers()[buffer].as_ptr())
            };
            assert_eq!(
                [is_there(0, 0), is_there(1, 0), is_there(1, 1)],
                [shift % 8 == 0, shift % 4 == 0, true],
                "{shift}"
            );
        }
    }

    #[test]
    fn whatever_a_packet_holds_it_makes_no_decoder_panic() {
        let mut packets = VecDeque::new();
        let rows = Batch { rows: numbers(0..40), hashes: Some((0..40).collect()) };
        FrameEncoder::default().encode(Frame::Batch(rows), &mut packets).unwrap();
        let parts: Vec<_> = packets.into_iter().map(|p| (p.metadata[4], p.header.clone(), p.into_body())).collect();
        let mut refused = 0;
        for bit in 0..parts[1].1.len() * 8 {
            let mut damaged = parts[1].1.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // Sealed as a sender would who writes nonsense.
            let (mut sealer, mut decoder) = (Sealer::default(), FrameDecoder::default());
            let schema = sealer.seal(SCHEMA, &[], parts[0].1.clone(), vec![]).unwrap();
            assert!(decoder.decode(schema).unwrap().is_none());
            let rows = sealer.seal(ROWS, &[1], damaged.into(), vec![parts[1].2.clone()]).unwrap();
            refused += usize::from(decoder.decode(rows).is_err());
        }
        assert!(refused > 0);
    }
}
