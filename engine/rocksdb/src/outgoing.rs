//! What the task's thread has decided to write and the database may not have yet.
//!
//! Until a removal has reached the database, a look-up there would still find the row: those keys are remembered here.
//! Invariant: batches and other jobs are handed over in the order in which they were decided on, and numbered in it.

use std::collections::{BTreeMap, HashSet, VecDeque};

use floodmark_snapshot::Result;
use rocksdb::WriteBatch;

use crate::{
    database::{Database, write_job},
    writer::Job,
};

/// A batch is handed over at this size, bytes.
const BATCH_BYTES: usize = 1 << 20;

type Keys = HashSet<Box<[u8]>>;

/// See the header of this file.
#[derive(Default)]
pub(crate) struct Outgoing {
    batch: WriteBatch,
    /// Jobs handed over, and of those, the ones that were done when we last looked.
    given: u64,
    done: u64,
    /// Keys whose removal is in `batch`, and in earlier ones.
    gone: Keys,
    leaving: VecDeque<(u64, Keys)>,
    /// Namespaces whose rows a job removes.
    dropping: BTreeMap<i64, u64>,
}

impl Outgoing {
    /// The number that the job with the present batch will have.
    pub(crate) fn next(&self) -> u64 {
        self.given + 1
    }

    /// The last job that was handed over.
    pub(crate) fn given(&self) -> u64 {
        self.given
    }

    /// Jobs that are done.
    pub(crate) fn done(&self) -> u64 {
        self.done
    }

    /// Adds a row.
    pub(crate) fn put(&mut self, key: &[u8], value: &[u8]) {
        self.batch.put(key, value);
    }

    /// Adds the removal of a row.
    pub(crate) fn delete(&mut self, key: &[u8]) {
        self.batch.delete(key);
        self.gone.insert(key.into());
    }

    /// Adds the removal of rows of a namespace.
    pub(crate) fn delete_range(&mut self, namespace: i64, from: &[u8], to: &[u8]) {
        self.batch.delete_range(from, to);
        self.dropping.insert(namespace, self.next());
    }

    /// Whether a row that the database may still have has been removed.
    pub(crate) fn is_gone(&self, key: &[u8]) -> bool {
        self.gone.contains(key) || self.leaving.iter().any(|(_, keys)| keys.contains(key))
    }

    /// The job that has to be done before this namespace may be read.
    pub(crate) fn dropping(&self, namespace: i64) -> Option<u64> {
        self.dropping.get(&namespace).copied()
    }

    /// Hands the batch over if it is large enough.
    pub(crate) fn send_full(&mut self, database: &Database) -> Result<()> {
        if self.batch.size_in_bytes() >= BATCH_BYTES { self.send(database) } else { Ok(()) }
    }

    /// Hands the batch over.
    pub(crate) fn send(&mut self, database: &Database) -> Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.batch);
        self.given = database.submit(write_job(batch))?;
        self.leaving.push_back((self.given, std::mem::take(&mut self.gone)));
        Ok(())
    }

    /// Hands the batch over, and another job behind it, which [`Outgoing::next`] has told the number of.
    pub(crate) fn send_job(&mut self, database: &Database, job: Job) -> Result<()> {
        self.send(database)?;
        self.given = database.submit(job)?;
        Ok(())
    }

    /// Looks how far the jobs have come.
    pub(crate) fn catch_up(&mut self, database: &Database) -> Result<()> {
        if self.done == self.given {
            return Ok(());
        }
        self.done = database.done()?;
        while self.leaving.front().is_some_and(|(job, _)| *job <= self.done) {
            self.leaving.pop_front();
        }
        let done = self.done;
        self.dropping.retain(|_, job| *job > done);
        Ok(())
    }

    /// Waits for a job that may not have been handed over yet.
    pub(crate) fn wait(&mut self, database: &Database, job: u64) -> Result<()> {
        if job > self.given {
            self.send(database)?;
        }
        database.wait(job)?;
        self.catch_up(database)
    }
}
