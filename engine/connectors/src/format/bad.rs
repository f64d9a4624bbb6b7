//! What becomes of malformed records: fail, skip, or keep aside as dead letters.
//!
//! Dead letters are written before the snapshot that has them behind it is acknowledged, so none is lost; a crash may bring
//! one a second time.

use std::{
    fmt::{self, Write as _},
    sync::Arc,
};

use bytes::Bytes;
use floodmark_dataflow::{OperatorMetrics, connector::TableError, metrics::add};
use floodmark_snapshot::{
    Env, Error, Result,
    storage::{self, Storage},
};
use serde_json::json;

use super::Malformed;
use crate::options::Options;

/// Options that [`BadRecords::of`] reads.
const POLICY: &str = "bad-records";
const FOLDER: &str = "bad-records.path";
/// Bytes of a record that an error message shows.
const SHOWN_MAX: usize = 120;
/// Dead letters that are held before they are written, bytes.
const HELD_MAX: usize = 1 << 20;

/// A record's place in its source.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) split: String,
    pub(crate) offset: i64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.split, self.offset)
    }
}

#[derive(Clone, Debug)]
enum Policy {
    Fail,
    Skip,
    DeadLetter(String),
}

/// A table's policy, as declared.
#[derive(Clone, Debug)]
pub(crate) struct BadRecords(Policy);

impl BadRecords {
    pub(crate) const OPTIONS: [&str; 2] = [POLICY, FOLDER];

    pub(crate) fn of(options: &Options<'_>) -> Result<Self, TableError> {
        let choice = options.choice(POLICY, &[("fail", 0), ("skip", 1), ("dead-letter", 2)])?;
        Ok(Self(match choice {
            0 => Policy::Fail,
            1 => Policy::Skip,
            _ => Policy::DeadLetter(options.required(FOLDER)?.to_owned()),
        }))
    }

    /// Opens the policy for one subtask.
    pub(crate) fn open(&self, env: &Env, metrics: Arc<OperatorMetrics>) -> Result<BadRecordHandler> {
        let letters = match &self.0 {
            Policy::Fail | Policy::Skip => None,
            Policy::DeadLetter(folder) => Some(storage::open(folder)?),
        };
        Ok(BadRecordHandler { policy: self.0.clone(), letters, held: String::new(), env: env.clone(), metrics })
    }
}

/// See [`BadRecords`].
pub(crate) struct BadRecordHandler {
    policy: Policy,
    letters: Option<Arc<dyn Storage>>,
    held: String,
    env: Env,
    metrics: Arc<OperatorMetrics>,
}

impl BadRecordHandler {
    /// Takes the malformed records of a batch; `place` tells where each was read.
    pub(crate) fn take(&mut self, malformed: Vec<Malformed>, place: impl Fn(usize) -> Place) -> Result<()> {
        add(&self.metrics.bad, malformed.len() as u64);
        for record in malformed {
            let place = place(record.record);
            match &self.policy {
                Policy::Fail => {
                    return Err(Error::abort(format!(
                        "malformed record at {place}: {} (record: {}); set 'bad-records' to 'skip' or 'dead-letter' to go on",
                        record.reason,
                        shown(&record.bytes)
                    )));
                }
                Policy::Skip => tracing::debug!(%place, reason = %record.reason, "skipped a malformed record"),
                Policy::DeadLetter(_) => {
                    let text = String::from_utf8_lossy(&record.bytes);
                    let letter = json!({
                        "split": place.split, "offset": place.offset, "reason": record.reason, "record": text,
                    });
                    let _ = writeln!(self.held, "{letter}");
                }
            }
        }
        if self.held.len() > HELD_MAX { self.flush() } else { Ok(()) }
    }

    /// Makes all dead letters so far durable.
    pub(crate) fn flush(&mut self) -> Result<()> {
        let Some(storage) = self.letters.as_ref().filter(|_| !self.held.is_empty()) else { return Ok(()) };
        let name = format!("dead-letters-{}.ndjson", self.env.ids.ulid());
        let letters = Bytes::from(std::mem::take(&mut self.held));
        crate::files::blocking()?.block_on(storage.put(&name, letters)).map_err(|e| e.context("write dead letters"))
    }
}

fn shown(record: &[u8]) -> String {
    let text = String::from_utf8_lossy(&record[..record.len().min(SHOWN_MAX)]);
    let dots = if record.len() > SHOWN_MAX { "…" } else { "" };
    // Quotes and backslashes stand as they are in the record; what a terminal would obey does not.
    let visible = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    format!("{}{dots}", text.chars().map(visible).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_shown_as_it_is_but_for_its_control_characters_and_its_excess() {
        assert_eq!(shown(br#"{"a":"x\y"}"#), r#"{"a":"x\y"}"#);
        assert_eq!(shown("naïve\t\u{1b}[31m".as_bytes()), "naïve\\t\\u{1b}[31m");
        assert_eq!(shown(&[b'y'; SHOWN_MAX + 1]), "y".repeat(SHOWN_MAX) + "…");
    }
}
