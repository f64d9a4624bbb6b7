//! `'connector' = 'nexmark'`: the auction events of the Nexmark benchmark, the same for the same seed.
//!
//! Event *n* is a pure function of the seed and *n*, field by field, so that only the fields a job needs are made. Splits
//! are stripes of the event numbers: any parallelism brings the same events.

mod generator;
mod rows;

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef, TimeUnit};
use floodmark_dataflow::{
    connector::{Connector, PlanContext, SinkInput, TableDef, TableError},
    sink::SinkNode,
    source::SourceFactory,
};

pub use self::generator::{Event, Generator};
use crate::{options::Options, stripes::Generated};

/// See the header of this file.
pub struct Nexmark;

/// The columns that a `nexmark` table may declare: `event_type` (0 person, 1 auction, 2 bid) and a struct for each kind.
#[must_use]
pub fn schema() -> Schema {
    let field = |name: &str, data_type: DataType| Field::new(name, data_type, true);
    let (int, text, time) = (DataType::Int64, DataType::Utf8, DataType::Timestamp(TimeUnit::Millisecond, None));
    let row = |name: &str, fields: Vec<Field>| field(name, DataType::Struct(Fields::from(fields)));
    Schema::new(vec![
        field("event_type", DataType::Int32),
        row(
            "person",
            vec![
                field("id", int.clone()),
                field("name", text.clone()),
                field("emailAddress", text.clone()),
                field("creditCard", text.clone()),
                field("city", text.clone()),
                field("state", text.clone()),
                field("dateTime", time.clone()),
                field("extra", text.clone()),
            ],
        ),
        row(
            "auction",
            vec![
                field("id", int.clone()),
                field("itemName", text.clone()),
                field("description", text.clone()),
                field("initialBid", int.clone()),
                field("reserve", int.clone()),
                field("dateTime", time.clone()),
                field("expires", time.clone()),
                field("seller", int.clone()),
                field("category", int.clone()),
                field("extra", text.clone()),
            ],
        ),
        row(
            "bid",
            vec![
                field("auction", int.clone()),
                field("bidder", int.clone()),
                field("price", int),
                field("channel", text.clone()),
                field("url", text.clone()),
                field("dateTime", time),
                field("extra", text),
            ],
        ),
    ])
}

impl Connector for Nexmark {
    fn name(&self) -> &'static str {
        "nexmark"
    }

    fn source(
        &self,
        table: &TableDef,
        projection: &SchemaRef,
        _: &PlanContext,
    ) -> Result<Arc<dyn SourceFactory>, TableError> {
        let options = Options::new(table, &["seed", "events", "rate", "event-rate", "start"], &[])?;
        check_columns(&table.schema)?;
        let generator = Generator {
            seed: options.parsed("seed", "a number")?.unwrap_or(42),
            events_per_second: options.parsed("event-rate", "a number")?.unwrap_or(10_000).max(1),
            start_ms: options.parsed("start", "milliseconds since 1970")?.unwrap_or(Generator::default().start_ms),
        };
        let schema = projection.clone();
        Ok(Arc::new(Generated {
            kind: "nexmark source",
            rows: options.parsed("events", "a number")?,
            rate: options.rate("rate")?,
            make: Arc::new(move |numbers| rows::rows_of(&generator, numbers, &schema)),
        }))
    }

    fn sink(&self, _: &TableDef, _: &SinkInput, _: &PlanContext) -> Result<SinkNode, TableError> {
        Err(TableError::table("connector 'nexmark' can be read from, not written to"))
    }

    fn fixed_schema(&self) -> Option<Schema> {
        Some(schema())
    }
}

fn check_columns(declared: &SchemaRef) -> Result<(), TableError> {
    let known = schema();
    for field in declared.fields() {
        let Ok(expected) = known.field_with_name(field.name()) else {
            return Err(TableError::table(format!(
                "column '{}' is not one of Nexmark's: event_type, person, auction, bid",
                field.name()
            )));
        };
        let fits = match (field.data_type(), expected.data_type()) {
            (DataType::Struct(declared), DataType::Struct(all)) => {
                declared.iter().all(|d| all.iter().any(|f| f.name() == d.name() && f.data_type() == d.data_type()))
            }
            (declared, expected) => declared == expected,
        };
        if !fits {
            return Err(TableError::table(format!(
                "column '{}' is declared as {}, but Nexmark's is {}",
                field.name(),
                field.data_type(),
                expected.data_type()
            )));
        }
    }
    Ok(())
}
