//! The file that a subtask's state becomes: a header, then Arrow IPC, each in a checksummed block.
//!
//! Checksums are verified before anything is decoded, because Arrow IPC alone accepts damaged bytes; and should its decoder
//! panic all the same, that is an error here, not the end of the process.

use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow::{
    datatypes::SchemaRef,
    ipc::{reader::StreamReader, writer::StreamWriter},
    record_batch::RecordBatch,
};
use bytes::Bytes;
use floodmark_snapshot::{
    Error, Result, TimestampMs,
    block::{BlockWriter, read_blocks},
};
use serde::{Deserialize, Serialize};

const KIND: &str = "state";
const FORMAT: u32 = 1;

/// What stands at the head of a state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Header {
    /// Version of the layout.
    pub format: u32,
    /// The operator's watermark at the barrier, if it keeps one.
    pub watermark: Option<TimestampMs>,
    /// Which of the operator's inputs the rows came from; 0 if it keeps them apart no more, or has one.
    pub input: u32,
}

impl Header {
    /// A header of the present format.
    #[must_use]
    pub fn new(watermark: Option<TimestampMs>) -> Self {
        Self { format: FORMAT, watermark, input: 0 }
    }
}

/// Writes a state file.
///
/// # Errors
/// When the rows can't be written as Arrow IPC.
pub fn write(header: &Header, schema: &SchemaRef, batches: &[RecordBatch]) -> Result<Bytes> {
    let failed = |e: arrow::error::ArrowError| Error::abort(format!("encode state: {e}"));
    let mut blocks = BlockWriter::new(KIND);
    let header = serde_json::to_vec(header).map_err(|e| Error::abort(format!("encode state: {e}")))?;
    blocks.push(&header)?;
    let mut writer = StreamWriter::try_new(Vec::new(), schema).map_err(failed)?;
    for batch in batches {
        writer.write(batch).map_err(failed)?;
    }
    blocks.push(&writer.into_inner().map_err(failed)?)?;
    Ok(blocks.finish())
}

/// Reads a state file.
///
/// # Errors
/// `Corrupt` if it is not, byte for byte, what [`write()`] wrote.
pub fn read(file: &Bytes) -> Result<(Header, Vec<RecordBatch>)> {
    let blocks = read_blocks(KIND, file)?;
    let [header, rows] = blocks.as_slice() else {
        return Err(Error::corrupt(format!("a state file has {} blocks instead of 2", blocks.len())));
    };
    let header: Header =
        serde_json::from_slice(header).map_err(|e| Error::corrupt(format!("header of a state file: {e}")))?;
    if header.format != FORMAT {
        return Err(Error::abort(format!("state file of format {} (this program reads {FORMAT})", header.format)));
    }
    let decode = || StreamReader::try_new(rows.as_ref(), None)?.collect::<Result<Vec<_>, _>>();
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(Ok(batches)) => Ok((header, batches)),
        Ok(Err(error)) => Err(Error::corrupt(format!("rows of a state file: {error}"))),
        Err(_) => Err(Error::corrupt("rows of a state file can't be decoded")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::Int64Array;

    use super::*;

    #[test]
    fn state_comes_back_and_every_flipped_byte_is_found() {
        let column = Arc::new((0..20_i64).collect::<Int64Array>());
        let rows = RecordBatch::try_from_iter([("n", column as _)]).unwrap();
        let header = Header::new(Some(7));
        let file = write(&header, &rows.schema(), std::slice::from_ref(&rows)).unwrap();
        assert_eq!(read(&file).unwrap(), (header, vec![rows]));
        for at in 0..file.len() {
            let mut bad = file.to_vec();
            bad[at] ^= 0x10;
            assert!(read(&bad.into()).is_err(), "byte {at}");
        }
    }
}
