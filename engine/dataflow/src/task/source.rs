//! The head of a task that reads a source: computed columns, event time, and the positions that its snapshots hold.

use std::{collections::VecDeque, time::Duration};

use arrow::record_batch::RecordBatch;
use floodmark_snapshot::{Epoch, Error, Result, SplitState, StateSchema, alignment::EPOCHS_IN_FLIGHT_MAX};

use super::{OperatorPart, SourceInput};
use crate::{metrics::add, watermark::SplitWatermarks};

/// See the header of this file.
pub(super) struct SourceHead {
    pub(super) spec: SourceInput,
    pub(super) watermarks: SplitWatermarks,
    pub(super) exhausted: bool,
    /// Nothing came of the last poll.
    pub(super) waits: bool,
    /// The positions of the checkpoints under way.
    positions: VecDeque<(Epoch, Vec<SplitState>)>,
}

impl SourceHead {
    pub(super) fn new(spec: SourceInput, now: Duration) -> Self {
        let restored = spec.splits.iter().map(|s| (s.watermark, s.finished));
        let idle_timeout = spec.watermark.as_ref().and_then(|w| w.idle_timeout);
        let watermarks = SplitWatermarks::new(restored, idle_timeout, now);
        Self { spec, watermarks, exhausted: false, waits: false, positions: VecDeque::new() }
    }

    /// Computed columns, counters and event time of a batch of `split`.
    pub(super) fn take(&mut self, split: usize, rows: RecordBatch, now: Duration) -> Result<RecordBatch> {
        let spec = &self.spec;
        let rows = match &spec.compute {
            Some(compute) if rows.num_rows() > 0 => compute(rows)?,
            Some(_) | None => rows,
        };
        if rows.num_rows() > 0 {
            add(&spec.metrics.rows_out, rows.num_rows() as u64);
            if let Some(watermark) = &spec.watermark {
                self.watermarks.rows(split, (watermark.event_time)(&rows)?, now);
            }
        }
        Ok(rows)
    }

    pub(super) fn snapshot(&mut self, epoch: Epoch, parallelism: u32) -> Result<OperatorPart> {
        self.spec.source.flush().map_err(|e| e.context(&self.spec.uid))?;
        let mut splits = self.spec.source.positions().map_err(|e| e.context(&self.spec.uid))?;
        if splits.len() < self.spec.splits.len() {
            return Err(Error::abort(format!(
                "internal error: {} told {} positions of {} splits",
                self.spec.uid,
                splits.len(),
                self.spec.splits.len()
            )));
        }
        for (i, split) in splits.iter_mut().enumerate() {
            split.watermark = self.watermarks.of(i);
        }
        self.positions.push_back((epoch, splits.clone()));
        if self.positions.len() > EPOCHS_IN_FLIGHT_MAX {
            self.positions.pop_front();
        }
        Ok(OperatorPart {
            uid: self.spec.uid.clone(),
            kind: self.spec.kind.clone(),
            schema: StateSchema::default(),
            parallelism,
            splits,
            reused: Vec::new(),
            shards: Vec::new(),
        })
    }

    /// Checkpoint `epoch` is complete: the source learns its positions, and those before it are forgotten.
    pub(super) fn completed(&mut self, epoch: Epoch) -> Result<()> {
        while let Some((of, positions)) = self.positions.front() {
            if *of > epoch {
                break;
            }
            if *of == epoch {
                self.spec.source.on_completed(epoch, positions)?;
            }
            self.positions.pop_front();
        }
        Ok(())
    }

    /// Checkpoint `epoch` is given up.
    pub(super) fn aborted(&mut self, epoch: Epoch) {
        self.positions.retain(|(of, _)| *of != epoch);
    }
}
