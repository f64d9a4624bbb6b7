//! `'connector' = 'datagen'`: made-up rows, the same for the same seed. Each column is a sequence or random within bounds.

use std::sync::Arc;

use arrow::{
    array::{ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch, RecordBatchOptions, StringArray},
    compute::cast,
    datatypes::{DataType, SchemaRef},
};
use floodmark_dataflow::{
    connector::{Connector, PlanContext, SinkInput, TableDef, TableError},
    sink::SinkNode,
    source::SourceFactory,
};
use floodmark_snapshot::{Error, Result};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{options::Options, stripes::Generated};

/// See the header of this file.
pub(crate) struct Datagen;

#[derive(Clone, Copy)]
enum Kind {
    Sequence { start: i64 },
    Random { min: f64, max: f64, length: usize },
}

struct Column {
    kind: Kind,
    seed: u64,
}

impl Connector for Datagen {
    fn name(&self) -> &'static str {
        "datagen"
    }

    fn source(
        &self,
        table: &TableDef,
        projection: &SchemaRef,
        _: &PlanContext,
    ) -> Result<Arc<dyn SourceFactory>, TableError> {
        let options = Options::new(table, &["seed", "rows", "rate"], &["fields."])?;
        for (name, option) in table.options.iter().filter(|o| o.0.starts_with("fields.")) {
            let known = table.schema.fields().iter().any(|f| {
                let rest = name.strip_prefix("fields.").and_then(|n| n.strip_prefix(f.name().as_str()));
                matches!(rest, Some(".kind" | ".start" | ".min" | ".max" | ".length"))
            });
            if !known {
                let message = format!(
                    "unknown option '{name}': a column's options are fields.<column>.kind, start, min, max and length"
                );
                return Err(TableError::option(option, message));
            }
        }
        let seed: u64 = options.parsed("seed", "a number")?.unwrap_or(42);
        let mut columns = Vec::new();
        for field in projection.fields() {
            let option = |name: &str| format!("fields.{}.{name}", field.name());
            let number = |name: &str, default: f64| Ok(options.parsed(&option(name), "a number")?.unwrap_or(default));
            let sequence = options.choice(&option("kind"), &[("random", false), ("sequence", true)])?;
            let kind = if sequence {
                Kind::Sequence { start: number("start", 0.0)? as i64 }
            } else {
                let (min, max) = (number("min", 0.0)?, number("max", greatest(field.data_type()))?);
                if min > max {
                    return Err(TableError::table(format!("column '{}': min {min} is above max {max}", field.name())));
                }
                let name = option("length");
                let length = options.parsed(&name, "a number of characters")?.unwrap_or(LENGTH);
                if let Some(option) = options.get(&name).filter(|_| length > LENGTH_MAX) {
                    let message = format!("option '{name}': {length} is more than {LENGTH_MAX} characters");
                    return Err(TableError::option(option, message));
                }
                Kind::Random { min, max, length }
            };
            check_type(field.name(), field.data_type())?;
            columns.push(Column { kind, seed: xxh3_64_with_seed(field.name().as_bytes(), seed) });
        }
        let schema = projection.clone();
        Ok(Arc::new(Generated {
            kind: "datagen source",
            rows: options.parsed("rows", "a number")?,
            rate: options.rate("rate")?,
            make: Arc::new(move |numbers| rows_of(&columns, numbers, &schema)),
        }))
    }

    fn sink(&self, _: &TableDef, _: &SinkInput, _: &PlanContext) -> Result<SinkNode, TableError> {
        Err(TableError::table("connector 'datagen' can be read from, not written to"))
    }
}

/// Characters of a random text if nobody says how many, and at most: a batch of them must fit into memory.
const LENGTH: usize = 16;
const LENGTH_MAX: usize = 1 << 16;

/// The greatest random value of types that can hold it.
const GREATEST: f64 = 1_000_000.0;

/// The greatest random value if nobody names one: what fits the type.
fn greatest(data_type: &DataType) -> f64 {
    match data_type {
        DataType::Int8 => f64::from(i8::MAX),
        DataType::Int16 => f64::from(i16::MAX),
        DataType::Decimal128(precision, scale) => {
            (10_f64.powi(i32::from(*precision) - i32::from(*scale)) - 1.0).min(GREATEST)
        }
        _ => GREATEST,
    }
}

fn check_type(name: &str, data_type: &DataType) -> Result<(), TableError> {
    let fine = data_type.is_numeric()
        || matches!(data_type, DataType::Boolean | DataType::Utf8 | DataType::Date32 | DataType::Timestamp(..));
    if fine {
        Ok(())
    } else {
        Err(TableError::table(format!("column '{name}': datagen makes no values of type {data_type}")))
    }
}

fn rows_of(columns: &[Column], numbers: &[u64], schema: &SchemaRef) -> Result<RecordBatch> {
    let failed = |e| Error::abort(format!("make rows: {e}"));
    let columns = schema.fields().iter().zip(columns);
    let columns = columns
        .map(|(field, column)| column.make(numbers, field.data_type()).map_err(failed))
        .collect::<Result<Vec<_>>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(numbers.len()));
    RecordBatch::try_new_with_options(schema.clone(), columns, &options).map_err(failed)
}

impl Column {
    fn make(&self, numbers: &[u64], data_type: &DataType) -> Result<ArrayRef, arrow::error::ArrowError> {
        let draw = |n: &u64| xxh3_64_with_seed(&n.to_le_bytes(), self.seed);
        let fraction = |n: &u64| (draw(n) >> 11) as f64 / (1_u64 << 53) as f64;
        let made: ArrayRef = match (self.kind, data_type) {
            (Kind::Sequence { start }, _) => {
                Arc::new(numbers.iter().map(|n| start.saturating_add(*n as i64)).collect::<Int64Array>())
            }
            (Kind::Random { .. }, DataType::Boolean) => {
                Arc::new(numbers.iter().map(|n| Some(draw(n) & 1 == 1)).collect::<BooleanArray>())
            }
            (Kind::Random { length, .. }, DataType::Utf8) => {
                let text = |n: &u64| {
                    let hex = format!("{:016x}", draw(n));
                    Some(hex.chars().cycle().take(length).collect::<String>())
                };
                Arc::new(numbers.iter().map(text).collect::<StringArray>())
            }
            (Kind::Random { min, max, .. }, other) if other.is_floating() => {
                Arc::new(numbers.iter().map(|n| min + fraction(n) * (max - min)).collect::<Float64Array>())
            }
            (Kind::Random { min, max, .. }, _) => {
                let value = |n: &u64| (min + fraction(n) * (max - min + 1.0)).floor().min(max) as i64;
                Arc::new(numbers.iter().map(value).collect::<Int64Array>())
            }
        };
        // Decimals and dates can't be cast from 64-bit integers in one step everywhere.
        match data_type {
            DataType::Date32 => cast(&cast(&made, &DataType::Int32)?, data_type),
            _ => cast(&made, data_type),
        }
    }
}

#[cfg(test)]
mod tests {
    use arrow::{array::Array as _, datatypes::TimeUnit};

    use super::*;

    #[test]
    fn every_type_is_made_by_default_without_nulls() {
        let types = [
            DataType::Int8,
            DataType::Int16,
            DataType::Int32,
            DataType::Int64,
            DataType::Float32,
            DataType::Float64,
            DataType::Decimal128(38, 0),
            DataType::Decimal128(10, 2),
            DataType::Decimal128(4, 1),
            DataType::Decimal128(3, 3),
            DataType::Utf8,
            DataType::Boolean,
            DataType::Date32,
            DataType::Timestamp(TimeUnit::Millisecond, None),
            DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        ];
        let numbers: Vec<u64> = (0..1000).collect();
        for data_type in types {
            check_type("c", &data_type).unwrap();
            let kind = Kind::Random { min: 0.0, max: greatest(&data_type), length: 16 };
            let made = Column { kind, seed: 7 }.make(&numbers, &data_type).unwrap();
            assert_eq!((made.data_type(), made.null_count()), (&data_type, 0));
        }
    }
}
