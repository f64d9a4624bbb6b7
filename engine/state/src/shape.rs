//! How rows of a state become columns, told so that a program can do it that does not have the operator. Pure.
//!
//! Rows leave a process through the operator's [`Layout`](crate::Layout). A back end whose files hold rows as they are in memory
//! may write a [`RowShape`] beside them: whoever looks into a snapshot then sees the same columns. Jobs never read by it.
//!
//! Invariant: [`Shaped::encode`] answers what [`Layout::encode`](crate::Layout::encode) does for the same rows.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use arrow::{
    array::{ArrayRef, BinaryArray, Decimal128Array, Float64Array, Int64Array, StringArray, new_null_array},
    compute::cast,
    datatypes::{DataType, FieldRef, SchemaRef},
    error::ArrowError,
    record_batch::{RecordBatch, RecordBatchOptions},
    row::{RowConverter, SortField},
};
use floodmark_snapshot::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::table::{Column, ColumnType, Rows};

/// What the columns of a layout's schema are made of, from the first to the last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RowShape {
    /// Whether the first column is the namespace: a number, or a time in milliseconds.
    pub namespace: bool,
    /// Columns of the key. It is encoded as an Arrow row of them, ascending, nulls first.
    pub keys: usize,
    /// What each column of the table becomes, in order.
    pub values: Vec<ValueShape>,
}

/// What a column of a table becomes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum ValueShape {
    /// One column of the same values.
    Value,
    /// One column of numbers, 0 where there is none.
    Count,
    /// The columns of an Arrow row.
    Row {
        /// How many.
        columns: usize,
        /// The row where there is none; without it, nulls.
        absent: Option<Vec<u8>>,
    },
}

impl ValueShape {
    fn columns(&self) -> usize {
        match self {
            Self::Value | Self::Count => 1,
            Self::Row { columns, .. } => *columns,
        }
    }
}

/// Makes columns of rows.
pub struct Shaped {
    schema: SchemaRef,
    shape: RowShape,
    /// Of the key, and of each table column that is a row.
    key: Packed,
    packed: Vec<Option<Packed>>,
}

/// Arrow rows of some columns.
struct Packed {
    /// `None` of no columns.
    converter: Option<RowConverter>,
    /// A row of nulls.
    nulls: Option<Vec<u8>>,
}

impl Shaped {
    /// Rows of this shape become columns of this schema.
    ///
    /// # Errors
    /// `Corrupt` if the two don't fit.
    pub fn new(schema: SchemaRef, shape: RowShape) -> Result<Self> {
        let values: usize = shape.values.iter().map(ValueShape::columns).sum();
        if usize::from(shape.namespace) + shape.keys + values != schema.fields().len() {
            return Err(Error::corrupt("the columns of a state's rows are not those of its shape"));
        }
        let mut at = usize::from(shape.namespace);
        let mut take = |columns: usize| {
            at += columns;
            &schema.fields()[at - columns..at]
        };
        let key = Packed::new(take(shape.keys))?;
        let packed = shape.values.iter().map(|value| {
            let fields = take(value.columns());
            matches!(value, ValueShape::Row { .. }).then(|| Packed::new(fields)).transpose()
        });
        let packed = packed.collect::<Result<_>>()?;
        Ok(Self { schema, shape, key, packed })
    }

    /// Rows of one namespace, in the order of `slots`.
    ///
    /// # Errors
    /// `Corrupt` if they are not of the shape.
    pub fn encode(&self, namespace: i64, rows: &Rows, slots: &[u32]) -> Result<RecordBatch> {
        // Arrow's decoder of rows panics on bytes that it has not written.
        match catch_unwind(AssertUnwindSafe(|| self.columns(namespace, rows, slots))) {
            Ok(Ok(columns)) => {
                let options = RecordBatchOptions::new().with_row_count(Some(slots.len()));
                RecordBatch::try_new_with_options(self.schema.clone(), columns, &options).map_err(not_of_shape)
            }
            Ok(Err(error)) => Err(not_of_shape(error)),
            Err(_) => Err(Error::corrupt("rows of a state can't be decoded")),
        }
    }

    fn columns(&self, namespace: i64, rows: &Rows, slots: &[u32]) -> Result<Vec<ArrayRef>, ArrowError> {
        let mut columns: Vec<ArrayRef> = Vec::with_capacity(self.schema.fields().len());
        if self.shape.namespace {
            let namespaces = Int64Array::from_value(namespace, slots.len());
            columns.push(cast(&namespaces, self.schema.field(0).data_type())?);
        }
        columns.extend(self.key.unpack(slots.iter().map(|slot| rows.key(*slot)))?);
        for (at, (shape, packed)) in self.shape.values.iter().zip(&self.packed).enumerate() {
            match (shape, packed) {
                (ValueShape::Row { absent, .. }, Some(packed)) => {
                    let absent = absent.as_deref().or(packed.nulls.as_deref()).unwrap_or_default();
                    let bytes = slots.iter().map(|slot| rows.bytes(*slot as usize, at).unwrap_or(absent));
                    columns.extend(packed.unpack(bytes)?);
                }
                (ValueShape::Count, _) => {
                    let count = |slot: &u32| rows.long(*slot as usize, at).unwrap_or(0);
                    columns.push(Arc::new(slots.iter().map(count).collect::<Int64Array>()));
                }
                (ValueShape::Value | ValueShape::Row { .. }, _) => {
                    let data_type = self.schema.field(columns.len()).data_type();
                    columns.push(values(rows, at, slots, data_type)?);
                }
            }
        }
        Ok(columns)
    }
}

impl Packed {
    fn new(fields: &[FieldRef]) -> Result<Self> {
        if fields.is_empty() {
            return Ok(Self { converter: None, nulls: None });
        }
        let make = || {
            let converter = RowConverter::new(fields.iter().map(|f| SortField::new(f.data_type().clone())).collect())?;
            let nulls: Vec<ArrayRef> = fields.iter().map(|f| new_null_array(f.data_type(), 1)).collect();
            let nulls = converter.convert_columns(&nulls)?.row(0).data().to_vec();
            Ok(Self { converter: Some(converter), nulls: Some(nulls) })
        };
        make().map_err(not_of_shape)
    }

    fn unpack<'a>(&self, rows: impl Iterator<Item = &'a [u8]>) -> Result<Vec<ArrayRef>, ArrowError> {
        let Some(converter) = &self.converter else { return Ok(Vec::new()) };
        let parser = converter.parser();
        converter.convert_rows(rows.map(|row| parser.parse(row)))
    }
}

/// The column type that holds values of a type as they are, if there is one.
#[must_use]
pub fn storage_of(data_type: &DataType) -> Option<ColumnType> {
    match data_type {
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => Some(ColumnType::Long),
        DataType::UInt8 | DataType::UInt16 | DataType::UInt32 => Some(ColumnType::Long),
        DataType::Date32 | DataType::Timestamp(..) => Some(ColumnType::Long),
        DataType::Float32 | DataType::Float64 => Some(ColumnType::Double),
        DataType::Decimal128(..) => Some(ColumnType::Wide),
        DataType::Utf8 => Some(ColumnType::Bytes),
        _ => None,
    }
}

/// A column of a table as one of this type; what is not of its [`storage_of`] is null.
///
/// # Errors
/// When no column holds values of this type, or one is none of them.
pub fn values(rows: &Rows, at: usize, slots: &[u32], data_type: &DataType) -> Result<ArrayRef, ArrowError> {
    macro_rules! gather {
        ($variant:ident, $array:ty, |$v:ident| $map:expr) => {
            slots
                .iter()
                .map(|slot| {
                    let (chunk, row) = rows.read(*slot as usize);
                    match &chunk.columns[at] {
                        Column::$variant(values) => values[row].as_ref().map(|$v| $map),
                        _ => None,
                    }
                })
                .collect::<$array>()
        };
    }
    let bytes = || gather!(Bytes, BinaryArray, |v| v.as_ref());
    Ok(match (data_type, storage_of(data_type)) {
        // There is no cast from 64 bits.
        (DataType::Date32, _) => cast(&cast(&gather!(Long, Int64Array, |v| *v), &DataType::Int32)?, data_type)?,
        (_, Some(ColumnType::Long)) => cast(&gather!(Long, Int64Array, |v| *v), data_type)?,
        (_, Some(ColumnType::Double)) => cast(&gather!(Double, Float64Array, |v| *v), data_type)?,
        (_, Some(ColumnType::Wide)) => {
            Arc::new(gather!(Wide, Decimal128Array, |v| *v).with_data_type(data_type.clone()))
        }
        // All texts are looked at together.
        (_, Some(ColumnType::Bytes)) => Arc::new(StringArray::try_from_binary(bytes())?),
        // Encoded rows.
        (DataType::Binary, None) => Arc::new(bytes()),
        (_, None) => {
            return Err(ArrowError::InvalidArgumentError(format!("no column for values of type {data_type}")));
        }
    })
}

fn not_of_shape(error: ArrowError) -> Error {
    Error::corrupt(format!("rows of a state are not of its shape: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Table;

    #[test]
    fn values_that_no_column_holds_are_refused() {
        let mut table = Table::new(vec![ColumnType::Bytes]);
        let slots: Vec<u32> = (0..2).map(|key: u8| table.slot(u64::from(key), &[key]).0).collect();
        let mut set = |text: &[u8]| {
            table.write_runs(&slots[..1], 0, |column, rows, _| {
                if let Column::Bytes(values) = column {
                    values[rows[0] as usize] = Some(text.into());
                }
            });
            values(table.rows(), 0, &slots, &DataType::Utf8)
        };
        let texts: ArrayRef = Arc::new(StringArray::from(vec![Some("höher"), None]));
        assert_eq!(&set("höher".as_bytes()).unwrap(), &texts);
        assert!(set(b"\xff").is_err(), "no text");
        let error = values(table.rows(), 0, &slots, &DataType::Boolean).unwrap_err().to_string();
        assert_eq!(error, "Invalid argument error: no column for values of type Boolean");
    }
}
