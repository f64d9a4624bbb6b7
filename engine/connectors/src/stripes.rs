//! What generators have in common: numbered rows, in stripes that subtasks share, at a rate.
//!
//! Row `n` is in stripe `n mod 32`, and the stripe's position is its next number: so the same rows come whatever the
//! parallelism, and a restart goes on where it was.

use std::{sync::Arc, time::Duration};

use arrow::record_batch::RecordBatch;
use floodmark_dataflow::{
    SubtaskContext,
    source::{Polled, Source, SourceFactory},
};
use floodmark_snapshot::{Error, Result, SplitState};
use serde_json::json;

use crate::{format::BATCH_ROWS, pace::Pace};

/// Stripes of the numbers; more subtasks than this find nothing to do.
const STRIPES: u64 = 32;

/// Makes the rows of these numbers.
pub(crate) type Make = Arc<dyn Fn(&[u64]) -> Result<RecordBatch> + Send + Sync>;

/// Rows made from their numbers.
pub(crate) struct Generated {
    /// `nexmark source`.
    pub(crate) kind: &'static str,
    /// How many rows there are; `None` never ends.
    pub(crate) rows: Option<u64>,
    /// Rows per second, over all subtasks; `None` is flat out.
    pub(crate) rate: Option<f64>,
    /// Makes the rows.
    pub(crate) make: Make,
}

impl SourceFactory for Generated {
    fn kind(&self) -> String {
        self.kind.to_owned()
    }

    fn bounded(&self) -> bool {
        self.rows.is_some()
    }

    fn splits(&self, restored: &[SplitState]) -> Result<Vec<SplitState>> {
        let fresh = |stripe: u64| SplitState {
            split: format!("stripe-{stripe:02}"),
            position: json!({ "next": stripe }),
            watermark: None,
            finished: false,
        };
        let known = |split: SplitState| restored.iter().find(|r| r.split == split.split).cloned().unwrap_or(split);
        Ok((0..STRIPES).map(|stripe| known(fresh(stripe))).collect())
    }

    fn open(&self, splits: Vec<SplitState>, context: &SubtaskContext) -> Result<Box<dyn Source>> {
        let next = |split: &SplitState| {
            let next = split.position["next"].as_u64();
            next.ok_or_else(|| Error::abort(format!("{} has no position: {}", split.split, split.position)))
        };
        let share = splits.len() as f64 / STRIPES as f64;
        Ok(Box::new(Reader {
            make: self.make.clone(),
            rows: self.rows.unwrap_or(u64::MAX),
            next: splits.iter().map(next).collect::<Result<_>>()?,
            pace: Pace::new(context.env.clock.clone(), self.rate.map(|r| r * share)),
            splits,
        }))
    }
}

struct Reader {
    make: Make,
    rows: u64,
    /// The next number of each split.
    next: Vec<u64>,
    pace: Pace,
    splits: Vec<SplitState>,
}

impl Source for Reader {
    fn poll(&mut self, wait: Duration) -> Result<Polled> {
        // The stripe that is furthest behind goes next, so that event time advances evenly.
        let open = (0..self.splits.len()).filter(|i| !self.splits[*i].finished);
        let Some(split) = open.min_by_key(|i| self.next[*i]) else { return Ok(Polled::Exhausted) };
        let left = self.rows.saturating_sub(self.next[split]).div_ceil(STRIPES);
        if left == 0 {
            self.splits[split].finished = true;
            return Ok(Polled::SplitFinished { split });
        }
        let rows = self.pace.allowed(left.min(BATCH_ROWS as u64), wait);
        if rows == 0 {
            return Ok(Polled::Pending);
        }
        let first = self.next[split];
        let numbers: Vec<u64> = (0..rows).map(|i| first + i * STRIPES).collect();
        self.next[split] += rows * STRIPES;
        self.pace.took(rows);
        Ok(Polled::Batch { split, rows: (self.make)(&numbers)? })
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        let now = self.splits.iter().zip(&self.next);
        Ok(now.map(|(split, next)| SplitState { position: json!({ "next": next }), ..split.clone() }).collect())
    }
}
