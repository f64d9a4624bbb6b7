//! Keys as bytes that compare equal exactly if the keys do. Never on a disk or a wire: what leaves a subtask is columns.

use arrow::{
    array::{Array, ArrayRef},
    datatypes::{DataType, FieldRef},
    row::{RowConverter, Rows, SortField},
};
use floodmark_snapshot::{Error, Result};

use super::arrow_failed;

/// Encodes and decodes rows of some columns.
pub(crate) struct KeyCodec(Option<RowConverter>);

/// Encoded keys, one per row.
pub(crate) enum Keys {
    /// Without key columns all rows have the same key.
    None,
    Rows(Rows),
}

impl Keys {
    #[inline]
    pub(crate) fn get(&self, row: usize) -> &[u8] {
        match self {
            Self::None => &[],
            Self::Rows(rows) => rows.row(row).data(),
        }
    }

    /// The keys of `rows` rows.
    pub(crate) fn all(&self, rows: usize) -> Vec<&[u8]> {
        (0..rows).map(|row| self.get(row)).collect()
    }
}

impl KeyCodec {
    pub(crate) fn new(fields: &[FieldRef]) -> Result<Self> {
        Self::of_types(fields.iter().map(|f| f.data_type().clone()))
    }

    pub(crate) fn of_types(types: impl IntoIterator<Item = DataType>) -> Result<Self> {
        let fields: Vec<_> = types.into_iter().map(SortField::new).collect();
        if fields.is_empty() {
            return Ok(Self(None));
        }
        RowConverter::new(fields).map(|c| Self(Some(c))).map_err(arrow_failed)
    }

    pub(crate) fn encode(&self, columns: &[ArrayRef]) -> Result<Keys> {
        match &self.0 {
            None => Ok(Keys::None),
            Some(converter) => converter.convert_columns(columns).map(Keys::Rows).map_err(arrow_failed),
        }
    }

    pub(crate) fn decode<'a>(&self, keys: impl Iterator<Item = &'a [u8]>) -> Result<Vec<ArrayRef>> {
        let Some(converter) = &self.0 else { return Ok(Vec::new()) };
        let parser = converter.parser();
        converter.convert_rows(keys.map(|key| parser.parse(key))).map_err(arrow_failed)
    }
}

/// Whether columns of this type can be keys: hashed and compared.
pub(crate) fn check_key(name: &str, data_type: &DataType) -> Result<()> {
    let empty = arrow::array::new_empty_array(data_type);
    debug_assert_eq!(empty.len(), 0);
    floodmark_dataflow::hash::hash_keys(&[empty], 0)
        .map(drop)
        .map_err(|_| Error::abort(format!("column '{name}' of type {data_type} can't be a key of a grouping or join")))
}
