//! Reads rows in Arrow's stream format, from bytes whose checksum has been verified.
//!
//! Invariant: whatever the bytes are, they neither end the process nor take more memory than a small multiple of their own
//! number. A checksum proves that bytes are what was written, not that what was written is sound; and Arrow's readers panic on
//! some bytes, and allocate as much as a message says it is long. So everything is decoded out of the bytes that are there
//! (a message that claims more of them is an unfinished one), and a panic is an error here.

use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow::{buffer::Buffer, error::ArrowError, ipc::reader::StreamDecoder, record_batch::RecordBatch};
use bytes::Bytes;
use floodmark_snapshot::{Error, Result};

/// Rows of one batch. Columns without bytes (nulls, or none at all) can claim any number of rows, and whoever goes over them
/// would never come to an end.
const ROWS_MAX: usize = 1 << 26;

/// The batches of one stream, which ends with the bytes. `what` names it in errors. The batches keep the bytes alive.
///
/// # Errors
/// `Corrupt` if they are no such stream.
pub fn read(what: &str, stream: &Bytes) -> Result<Vec<RecordBatch>> {
    match catch_unwind(AssertUnwindSafe(|| decode(stream))) {
        Ok(Ok(batches)) => Ok(batches),
        Ok(Err(error)) => Err(Error::corrupt(format!("{what}: {error}"))),
        Err(_) => Err(Error::corrupt(format!("{what} can't be decoded"))),
    }
}

fn decode(stream: &Bytes) -> Result<Vec<RecordBatch>, ArrowError> {
    let mut decoder = StreamDecoder::new();
    let mut rest = Buffer::from(stream.clone());
    let mut batches = Vec::new();
    while let Some(batch) = decoder.decode(&mut rest)? {
        if batch.num_rows() > ROWS_MAX {
            return Err(ArrowError::IpcError(format!("a batch of {} rows", batch.num_rows())));
        }
        batches.push(batch);
    }
    decoder.finish()?;
    match decoder.schema() {
        Some(_) => Ok(batches),
        None => Err(ArrowError::IpcError("no schema".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::{
        array::{ArrayRef, Int64Array, NullArray, RecordBatchOptions, StringArray},
        datatypes::Schema,
        ipc::writer::StreamWriter,
    };
    use floodmark_snapshot::Disposition;

    use super::*;

    fn written(batches: &[RecordBatch]) -> Bytes {
        let mut writer = StreamWriter::try_new(Vec::new(), &batches[0].schema()).unwrap();
        batches.iter().for_each(|batch| writer.write(batch).unwrap());
        writer.into_inner().unwrap().into()
    }

    fn rows(n: i64) -> RecordBatch {
        let numbers: ArrayRef = Arc::new((0..n).map(|i| Some(i).filter(|i| i % 3 > 0)).collect::<Int64Array>());
        let texts: ArrayRef = Arc::new((0..n).map(|i| Some(format!("text {i}"))).collect::<StringArray>());
        RecordBatch::try_from_iter([("n", numbers), ("t", texts)]).unwrap()
    }

    /// Rows that have no bytes at all.
    fn bare(n: usize) -> [RecordBatch; 2] {
        let options = RecordBatchOptions::new().with_row_count(Some(n));
        let nulls: ArrayRef = Arc::new(NullArray::new(n));
        let none = RecordBatch::try_new_with_options(Arc::new(Schema::empty()), Vec::new(), &options);
        [RecordBatch::try_from_iter([("nothing", nulls)]).unwrap(), none.unwrap()]
    }

    #[test]
    fn what_was_written_is_read_wherever_it_lies_in_memory() {
        let [nulls, none] = bare(7);
        for batches in [vec![rows(40)], vec![rows(3), rows(3).slice(0, 0), rows(5)], vec![nulls], vec![none]] {
            let stream = written(&batches);
            for shift in 0..9 {
                let file: Bytes = [vec![0; shift], stream.to_vec()].concat().into();
                assert_eq!(read("rows", &file.slice(shift..)).unwrap(), batches, "shifted by {shift}");
            }
        }
        let empty = StreamWriter::try_new(Vec::new(), &rows(1).schema()).unwrap().into_inner().unwrap();
        assert_eq!(read("rows", &empty.into()).unwrap(), []);
    }

    #[test]
    fn a_stream_that_is_cut_or_goes_on_is_found() {
        let stream = written(&[rows(5), rows(6)]);
        // The last 8 bytes say that it ends; without them, it ends with the bytes.
        for len in (0..stream.len() - 8).chain(stream.len() - 7..stream.len()) {
            let found = read("rows", &stream.slice(..len));
            let whole = found.as_ref().is_ok_and(|batches| batches == &[rows(5)]);
            assert!(whole || found.is_err_and(|e| e.disposition() == Disposition::Corrupt), "cut at {len}");
        }
        assert!(read("rows", &[stream.to_vec(), vec![1]].concat().into()).is_err());
    }

    #[test]
    fn a_claim_of_more_than_there_is_takes_no_memory() {
        let stream = written(&[rows(5)]);
        let numbers = (0..stream.len() / 4).map(|i| i * 4);
        // Every number of the stream that may be a length, one at a time, is made huge.
        for at in numbers {
            for huge in [u32::MAX - 1, i32::MAX as u32, 1 << 30] {
                let mut claims = stream.to_vec();
                claims[at..at + 4].copy_from_slice(&huge.to_le_bytes());
                if let Ok(batches) = read("rows", &claims.into()) {
                    assert!(batches.iter().all(|b| b.num_rows() <= ROWS_MAX), "at {at}");
                }
            }
        }
        for batch in bare(ROWS_MAX + 1) {
            let error = read("rows", &written(&[batch])).unwrap_err();
            assert_eq!(error.to_string(), "rows: Ipc error: a batch of 67108865 rows");
        }
    }

    #[test]
    fn no_changed_byte_ends_the_process() {
        let stream = written(&[rows(9)]);
        let mut refused = 0;
        for at in 0..stream.len() {
            for flip in [1_u8, 0x80, 0xff] {
                let mut bad = stream.to_vec();
                bad[at] ^= flip;
                refused += u32::from(read("rows", &bad.into()).is_err());
            }
        }
        assert!(refused > 100, "{refused}");
    }
}
