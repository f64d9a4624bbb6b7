//! Nexmark events as rows: builds just the columns that are asked for.

use std::sync::Arc;

use arrow::{
    array::{
        ArrayRef, Int32Array, Int64Array, RecordBatch, RecordBatchOptions, StringBuilder, StructArray,
        TimestampMillisecondArray,
    },
    buffer::NullBuffer,
    datatypes::{DataType, Field, SchemaRef},
};
use floodmark_snapshot::{Error, Result};

use super::{Event, Generator};

pub(super) fn rows_of(generator: &Generator, numbers: &[u64], schema: &SchemaRef) -> Result<RecordBatch> {
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
