//! The rows of the suite, and how they are written and read.

use std::{collections::BTreeSet, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, Int64Array, StringArray},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
    record_batch::RecordBatch,
};
use floodmark_snapshot::{Error, Result};

use super::Model;
use crate::{Column, ColumnType, KeyedState, Layout, RowKeys, Rows, Table};

/// What the suite keeps for a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Value {
    /// A number.
    pub n: Option<i64>,
    /// A text.
    pub t: Option<String>,
}

/// Rows with some of the columns `n` (a number) and `t` (a text), by a number `k`.
#[derive(Clone, Debug)]
pub struct SuiteLayout(Vec<&'static str>);

impl SuiteLayout {
    /// With these columns, in this order.
    #[must_use]
    pub fn new(columns: &[&'static str]) -> Self {
        Self(columns.to_vec())
    }

    fn at(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|c| *c == name)
    }
}

/// The hash of a key.
pub(super) fn hash(k: i64) -> u64 {
    let mixed = (k as u64 ^ 0x243F_6A88_85A3_08D3).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed ^ (mixed >> 31)).wrapping_mul(0xE703_7ED1_A0B4_28DB) >> 3
}

/// A key as bytes, of different lengths.
pub(super) fn key(k: i64) -> Vec<u8> {
    format!("key {k}").into_bytes()
}

/// The number of a key.
pub(super) fn number(key: &[u8]) -> Option<i64> {
    std::str::from_utf8(key).ok()?.strip_prefix("key ")?.parse().ok()
}

impl Layout for SuiteLayout {
    fn types(&self) -> Vec<ColumnType> {
        self.0.iter().map(|c| if *c == "n" { ColumnType::Long } else { ColumnType::Bytes }).collect()
    }

    fn schema(&self) -> SchemaRef {
        let field = |c: &&str| Field::new(*c, if *c == "n" { DataType::Int64 } else { DataType::Utf8 }, true);
        let fixed = ["$namespace", "k"].map(|name| Field::new(name, DataType::Int64, false));
        Arc::new(Schema::new(fixed.into_iter().chain(self.0.iter().map(field)).collect::<Vec<_>>()))
    }

    fn encode(&self, namespace: i64, rows: &Rows, slots: &[u32]) -> Result<RecordBatch> {
        let keys: Option<Vec<i64>> = slots.iter().map(|slot| number(rows.key(*slot))).collect();
        let keys = keys.ok_or_else(|| Error::abort("a key that is no number"))?;
        let mut columns: Vec<ArrayRef> =
            vec![Arc::new(Int64Array::from_value(namespace, slots.len())), Arc::new(Int64Array::from(keys))];
        for (at, name) in self.0.iter().enumerate() {
            columns.push(if *name == "n" {
                Arc::new(slots.iter().map(|s| rows.long(*s as usize, at)).collect::<Int64Array>())
            } else {
                let text = |s: &u32| rows.bytes(*s as usize, at).map(|b| String::from_utf8_lossy(b).into_owned());
                Arc::new(slots.iter().map(text).collect::<StringArray>())
            });
        }
        RecordBatch::try_new(self.schema(), columns).map_err(|e| Error::abort(e.to_string()))
    }

    fn decode(&self, batch: &RecordBatch) -> Result<RowKeys> {
        let longs = |name: &str| {
            let column = batch.column_by_name(name).and_then(|c| c.as_primitive_opt::<Int64Type>());
            column.ok_or_else(|| Error::abort(format!("no column {name}")))
        };
        let (namespaces, numbers) = (longs("$namespace")?, longs("k")?);
        let mut keys = RowKeys::default();
        for row in 0..batch.num_rows() {
            keys.push(namespaces.value(row), hash(numbers.value(row)), &key(numbers.value(row)));
        }
        Ok(keys)
    }

    fn hashes(&self, keys: &[&[u8]]) -> Result<Vec<u64>> {
        let hashes = keys.iter().map(|key| number(key).map(hash));
        hashes.collect::<Option<_>>().ok_or_else(|| Error::abort("a key that is no number"))
    }

    fn fill(&self, batch: &RecordBatch, table: &mut Table, slots: &[u32]) -> Result<()> {
        for (at, name) in self.0.iter().enumerate() {
            let Some(column) = batch.column_by_name(name) else { continue };
            table.write_runs(slots, at, |to, rows, first| match to {
                Column::Long(values) => {
                    let from = column.as_primitive::<Int64Type>();
                    for (i, row) in rows.iter().enumerate() {
                        values[*row as usize] = from.is_valid(first + i).then(|| from.value(first + i));
                    }
                }
                Column::Bytes(values) => {
                    let from = column.as_string::<i32>();
                    for (i, row) in rows.iter().enumerate() {
                        values[*row as usize] =
                            from.is_valid(first + i).then(|| from.value(first + i).as_bytes().into());
                    }
                }
                Column::Double(_) | Column::Wide(_) => {}
            });
        }
        Ok(())
    }
}

/// Writes values of keys that are the state's own; answers which keys were new. New rows must be empty.
pub(super) fn write(
    state: &mut dyn KeyedState,
    layout: &SuiteLayout,
    namespace: i64,
    values: &[(i64, Value)],
) -> BTreeSet<i64> {
    let keys: Vec<Vec<u8>> = values.iter().map(|(k, _)| key(*k)).collect();
    let key_refs: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
    let hashes: Vec<u64> = values.iter().map(|(k, _)| hash(*k)).collect();
    let slots = state.slots(namespace, &hashes, &key_refs).unwrap();
    assert_eq!(slots.at.len(), values.len());
    let table = state.table(namespace);
    let mut new = BTreeSet::new();
    for slot in &slots.new {
        for (at, name) in layout.0.iter().enumerate() {
            let empty = if *name == "n" {
                table.rows().long(*slot as usize, at).is_none()
            } else {
                table.rows().bytes(*slot as usize, at).is_none()
            };
            assert!(empty, "a new row is not empty");
        }
        assert!(new.insert(number(table.rows().key(*slot)).unwrap()), "a row is new twice");
    }
    for (slot, (k, value)) in slots.at.iter().zip(values) {
        assert_eq!(number(table.rows().key(*slot)), Some(*k));
        if let Some(at) = layout.at("n") {
            table.write_runs(&[*slot], at, |column, rows, _| {
                if let Column::Long(values) = column {
                    values[rows[0] as usize] = value.n;
                }
            });
        }
        if let Some(at) = layout.at("t") {
            table.write_runs(&[*slot], at, |column, rows, _| {
                if let Column::Bytes(values) = column {
                    values[rows[0] as usize] = value.t.as_ref().map(|t| t.as_bytes().into());
                }
            });
        }
    }
    new
}

/// All rows of a state.
pub(super) fn read(state: &mut dyn KeyedState, layout: &SuiteLayout) -> Model {
    let mut all = Model::new();
    for namespace in state.namespaces(i64::MIN..=i64::MAX) {
        state
            .scan(namespace, &mut |rows, slots| {
                for slot in slots {
                    let n = layout.at("n").and_then(|at| rows.long(*slot as usize, at));
                    let t = layout.at("t").and_then(|at| rows.bytes(*slot as usize, at));
                    let t = t.map(|t| String::from_utf8(t.to_vec()).unwrap());
                    let at = (namespace, number(rows.key(*slot)).unwrap());
                    assert!(all.insert(at, Value { n, t }).is_none(), "key {at:?} is shown twice");
                }
                Ok(())
            })
            .unwrap();
    }
    all
}
