//! A chain of operators: what one emits, the next takes, in one call.

use std::sync::{Arc, atomic::Ordering};

use floodmark_snapshot::{Epoch, OperatorUid, Result, StateSchema, TimestampMs};

use super::OperatorPart;
use crate::{Barrier, Batch, Operator, OperatorMetrics, Output, Port, RestoredShard, StateSnapshot, metrics::add};

/// An operator in its chain.
pub struct ChainedOperator {
    /// Its identity.
    pub uid: OperatorUid,
    /// What it is, in words.
    pub kind: String,
    /// The types of its state; `None` if it keeps none.
    pub state_schema: Option<StateSchema>,
    /// The operator.
    pub operator: Box<dyn Operator>,
    /// Its counters.
    pub metrics: Arc<OperatorMetrics>,
}

/// Takes what leaves the chain.
type Leave<'a> = &'a mut dyn FnMut(Batch) -> Result<()>;

pub(super) struct Chain {
    operators: Vec<ChainedOperator>,
    output: Output,
}

impl Chain {
    pub(super) fn new(operators: Vec<ChainedOperator>) -> Self {
        Self { operators, output: Output::default() }
    }

    /// The first operator.
    pub(super) fn first(&self) -> Option<&ChainedOperator> {
        self.operators.first()
    }

    /// Hands the first operator a slice of its state; the last one completes it.
    pub(super) fn restore_first(&mut self, shards: Vec<RestoredShard>, last: bool) -> Result<()> {
        let Some(first) = self.operators.first_mut() else { return Ok(()) };
        let operator = &mut first.operator;
        let taken = operator.restore(shards).and_then(|()| if last { operator.restored() } else { operator.arrived() });
        taken.map_err(|e| e.context(format!("restore {}", first.uid)))
    }

    /// A batch comes into `port` of the first operator.
    pub(super) fn process(&mut self, port: Port, batch: Batch, leave: Leave<'_>) -> Result<()> {
        self.run(0, port, vec![batch], leave)
    }

    /// Event time advances, operator by operator: what one emits reaches the next before the watermark does.
    pub(super) fn watermark(&mut self, watermark: TimestampMs, leave: Leave<'_>) -> Result<()> {
        for i in 0..self.operators.len() {
            let operator = &mut self.operators[i];
            operator.metrics.watermark.store(watermark, Ordering::Relaxed);
            let done = operator.operator.on_watermark(watermark, &mut self.output);
            done.map_err(|e| e.context(&operator.uid))?;
            self.pass_on(i, leave)?;
        }
        Ok(())
    }

    /// Everything buffered goes out, because a barrier or the end comes next.
    pub(super) fn flush(&mut self, leave: Leave<'_>) -> Result<()> {
        for i in 0..self.operators.len() {
            let operator = &mut self.operators[i];
            operator.operator.flush(&mut self.output).map_err(|e| e.context(&operator.uid))?;
            self.pass_on(i, leave)?;
        }
        Ok(())
    }

    pub(super) fn snapshot(
        &mut self,
        barrier: &Barrier,
        parallelism: u32,
        parts: &mut Vec<OperatorPart>,
    ) -> Result<()> {
        for operator in &mut self.operators {
            let StateSnapshot { reused, pending } =
                operator.operator.snapshot(barrier).map_err(|e| e.context(&operator.uid))?;
            let (rows, bytes) = operator.operator.state_size();
            operator.metrics.state_rows.store(rows, Ordering::Relaxed);
            operator.metrics.state_bytes.store(bytes, Ordering::Relaxed);
            if operator.state_schema.is_some() || !pending.is_empty() {
                parts.push(OperatorPart {
                    uid: operator.uid.clone(),
                    kind: operator.kind.clone(),
                    schema: operator.state_schema.clone().unwrap_or_default(),
                    parallelism,
                    splits: Vec::new(),
                    reused,
                    shards: pending,
                });
            }
        }
        Ok(())
    }

    pub(super) fn completed(&mut self, epoch: Epoch) -> Result<()> {
        self.operators.iter_mut().try_for_each(|o| o.operator.on_completed(epoch).map_err(|e| e.context(&o.uid)))
    }

    pub(super) fn aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.operators.iter_mut().try_for_each(|o| o.operator.on_aborted(epoch).map_err(|e| e.context(&o.uid)))
    }

    /// What operator `i` has just emitted goes through the operators behind it.
    fn pass_on(&mut self, i: usize, leave: Leave<'_>) -> Result<()> {
        let batches = self.output.take();
        if batches.is_empty() {
            return Ok(());
        }
        add(&self.operators[i].metrics.rows_out, rows(&batches));
        self.run(i + 1, 0, batches, leave)
    }

    fn run(&mut self, start: usize, port: Port, mut batches: Vec<Batch>, leave: Leave<'_>) -> Result<()> {
        for (i, operator) in self.operators.iter_mut().enumerate().skip(start) {
            add(&operator.metrics.rows_in, rows(&batches));
            let port = if i == start { port } else { 0 };
            for batch in batches {
                operator.operator.process(port, batch, &mut self.output).map_err(|e| e.context(&operator.uid))?;
            }
            batches = self.output.take();
            if batches.is_empty() {
                return Ok(());
            }
            add(&operator.metrics.rows_out, rows(&batches));
        }
        batches.into_iter().try_for_each(leave)
    }
}

fn rows(batches: &[Batch]) -> u64 {
    batches.iter().map(|b| b.len() as u64).sum()
}
