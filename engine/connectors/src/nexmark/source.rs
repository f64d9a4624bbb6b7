//! Reads Nexmark events: builds just the columns that are asked for.

use std::{sync::Arc, time::Duration};

use arrow::{
    array::{
        ArrayRef, Int32Array, Int64Array, RecordBatch, RecordBatchOptions, StringBuilder, StructArray,
        TimestampMillisecondArray,
    },
    buffer::NullBuffer,
    datatypes::{DataType, Field, SchemaRef},
};
use floodmark_dataflow::{
    SubtaskContext,
    source::{Polled, Source, SourceFactory},
};
use floodmark_snapshot::{Error, Result, SplitState};
use serde_json::json;

use super::{Event, Generator};
use crate::{format::BATCH_ROWS, pace::Pace};

/// Stripes of the event numbers; more subtasks than this find nothing to do.
const STRIPES: u64 = 32;

pub(super) struct NexmarkSource {
    pub(super) generator: Generator,
    pub(super) events: Option<u64>,
    pub(super) rate: Option<f64>,
    pub(super) schema: SchemaRef,
}

impl SourceFactory for NexmarkSource {
    fn kind(&self) -> String {
        "nexmark source".to_owned()
    }

    fn bounded(&self) -> bool {
        self.events.is_some()
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
        let stripes: Vec<Stripe> =
            splits.iter().map(|s| Ok(Stripe { next: next(s)?, finished: s.finished })).collect::<Result<_>>()?;
        let share = splits.len() as f64 / STRIPES as f64;
        Ok(Box::new(Reader {
            generator: self.generator,
            events: self.events.unwrap_or(u64::MAX),
            schema: self.schema.clone(),
            pace: Pace::new(context.env.clock.clone(), self.rate.map(|r| r * share)),
            splits,
            stripes,
        }))
    }
}

struct Stripe {
    next: u64,
    finished: bool,
}

struct Reader {
    generator: Generator,
    events: u64,
    schema: SchemaRef,
    pace: Pace,
    splits: Vec<SplitState>,
    stripes: Vec<Stripe>,
}

impl Source for Reader {
    fn poll(&mut self, wait: Duration) -> Result<Polled> {
        // The stripe that is furthest behind goes next, so that event time advances evenly.
        let open = self.stripes.iter().enumerate().filter(|(_, s)| !s.finished);
        let Some((split, _)) = open.min_by_key(|(_, s)| s.next) else { return Ok(Polled::Exhausted) };
        let stripe = &mut self.stripes[split];
        let left = self.events.saturating_sub(stripe.next).div_ceil(STRIPES);
        if left == 0 {
            stripe.finished = true;
            return Ok(Polled::SplitFinished { split });
        }
        let rows = self.pace.allowed(left.min(BATCH_ROWS as u64), wait);
        if rows == 0 {
            return Ok(Polled::Pending);
        }
        let numbers: Vec<u64> = (0..rows).map(|i| stripe.next + i * STRIPES).collect();
        stripe.next += rows * STRIPES;
        self.pace.took(rows);
        Ok(Polled::Batch { split, rows: rows_of(&self.generator, &numbers, &self.schema)? })
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        let now = self.splits.iter().zip(&self.stripes).map(|(split, stripe)| SplitState {
            split: split.split.clone(),
            position: json!({ "next": stripe.next }),
            watermark: None,
            finished: stripe.finished,
        });
        Ok(now.collect())
    }
}

fn rows_of(generator: &Generator, numbers: &[u64], schema: &SchemaRef) -> Result<RecordBatch> {
    let columns = schema.fields().iter().map(|field| match field.data_type() {
        DataType::Struct(fields) => {
            let kind = match field.name().as_str() {
                "person" => Event::Person,
                "auction" => Event::Auction,
                _ => Event::Bid,
            };
            let valid: NullBuffer = numbers.iter().map(|n| generator.kind(*n) == kind).collect();
            let children = fields.iter().map(|f| column(generator, numbers, f, kind)).collect();
            let array = StructArray::try_new_with_length(fields.clone(), children, Some(valid), numbers.len());
            array.map(|a| Arc::new(a) as ArrayRef)
        }
        _ => Ok(Arc::new(numbers.iter().map(|n| generator.kind(*n) as i32).collect::<Int32Array>()) as ArrayRef),
    });
    let failed = |e| Error::abort(format!("build events: {e}"));
    let columns = columns.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    let options = RecordBatchOptions::new().with_row_count(Some(numbers.len()));
    RecordBatch::try_new_with_options(schema.clone(), columns, &options).map_err(failed)
}

fn column(generator: &Generator, numbers: &[u64], field: &Field, kind: Event) -> ArrayRef {
    let name = field.name().as_str();
    let of_kind = |n: &u64| generator.kind(*n) == kind;
    match field.data_type() {
        DataType::Int64 => {
            let value = |n: &u64| of_kind(n).then(|| generator.integer(*n, name)).flatten();
            Arc::new(numbers.iter().map(value).collect::<Int64Array>())
        }
        DataType::Timestamp(_, _) => {
            let value = |n: &u64| of_kind(n).then(|| generator.timestamp(*n, name)).flatten();
            Arc::new(numbers.iter().map(value).collect::<TimestampMillisecondArray>())
        }
        _ => {
            let mut builder = StringBuilder::with_capacity(numbers.len(), numbers.len() * 16);
            let mut text = String::new();
            for n in numbers {
                text.clear();
                if of_kind(n) && generator.text(*n, name, &mut text) {
                    builder.append_value(&text);
                } else {
                    builder.append_null();
                }
            }
            Arc::new(builder.finish())
        }
    }
}
