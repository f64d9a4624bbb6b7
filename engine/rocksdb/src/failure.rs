//! RocksDB's errors in our words: damage is damage, anything else ends the attempt.

use floodmark_snapshot::{Disposition, Error};
use rocksdb::ErrorKind;

/// An error that a call to RocksDB came back with: what was being done, and what it means.
pub(crate) fn failed(action: &str, error: &rocksdb::Error) -> Error {
    let disposition = match error.kind() {
        ErrorKind::Corruption => Disposition::Corrupt,
        ErrorKind::NotFound
        | ErrorKind::NotSupported
        | ErrorKind::InvalidArgument
        | ErrorKind::IOError
        | ErrorKind::MergeInProgress
        | ErrorKind::Incomplete
        | ErrorKind::ShutdownInProgress
        | ErrorKind::TimedOut
        | ErrorKind::Aborted
        | ErrorKind::Busy
        | ErrorKind::Expired
        | ErrorKind::TryAgain
        | ErrorKind::CompactionTooLarge
        | ErrorKind::ColumnFamilyDropped
        | ErrorKind::Unknown => Disposition::Abort,
    };
    Error::new(disposition, format!("{action}: RocksDB: {error}"))
}
