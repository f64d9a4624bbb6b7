//! Aggregate calls over table columns: update with rows, merge with partial states, read results without ending them.
//!
//! Counts, sums, extremes and averages of the usual types have columns of their own. Every other function goes through
//! DataFusion's `Accumulator`, whose state is kept encoded and revived for each touched key of a batch: slower, and right.
//!
//! Sums of integers that overflow are errors: a wrong number in a ledger is worse than a job that stops.

use std::{cmp::Ordering, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, UInt32Array, new_empty_array},
    buffer::BooleanBuffer,
    compute::{cast, take},
    datatypes::{DataType, Decimal128Type, Field, FieldRef, Float64Type, Int64Type, Schema},
};
use datafusion_common::ScalarValue;
use datafusion_physical_expr::{PhysicalExpr, aggregate::AggregateFunctionExpr};
use floodmark_snapshot::{Error, Result};
use floodmark_state::{Column, ColumnType, Table, ValueShape, shape, table::Rows};

use super::{
    arrow_failed, failed,
    key::{KeyCodec, Keys},
};

/// One aggregate of a `SELECT` list.
#[derive(Clone)]
pub(crate) struct Call {
    expr: Arc<AggregateFunctionExpr>,
    /// Over the input's rows.
    pub(crate) args: Vec<Arc<dyn PhysicalExpr>>,
    /// `FILTER (WHERE …)`.
    pub(crate) filter: Option<Arc<dyn PhysicalExpr>>,
    method: Method,
    /// Partial state, as columns of a batch.
    state: Vec<FieldRef>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Count,
    SumLong,
    SumDouble,
    SumWide,
    /// Extremes; `Ordering` is what a better value compares as.
    BestLong(Ordering),
    BestDouble(Ordering),
    BestWide(Ordering),
    BestText(Ordering),
    /// Average of integers: sum and count, exact.
    AvgLong,
    AvgDouble,
    /// Anything else.
    Revived,
}

impl Method {
    fn of(expr: &AggregateFunctionExpr, args: &[DataType]) -> Self {
        let [arg] = args else { return Self::Revived };
        if expr.is_distinct() && !matches!(expr.fun().name(), "min" | "max") || !expr.order_bys().is_empty() {
            return Self::Revived;
        }
        match (expr.fun().name(), shape::storage_of(arg)) {
            ("count", _) => Self::Count,
            ("sum", _) if *arg == DataType::Int64 => Self::SumLong,
            ("sum", _) if *arg == DataType::Float64 => Self::SumDouble,
            ("sum", _) if matches!(arg, DataType::Decimal128(..)) => Self::SumWide,
            ("avg", _) if *arg == DataType::Int64 => Self::AvgLong,
            ("avg", _) if *arg == DataType::Float64 => Self::AvgDouble,
            (name @ ("min" | "max"), Some(storage)) => {
                let better = if name == "min" { Ordering::Less } else { Ordering::Greater };
                match storage {
                    ColumnType::Long => Self::BestLong(better),
                    ColumnType::Double => Self::BestDouble(better),
                    ColumnType::Wide => Self::BestWide(better),
                    ColumnType::Bytes => Self::BestText(better),
                }
            }
            _ => Self::Revived,
        }
    }
}

impl Call {
    /// A call over rows of `input`.
    pub(crate) fn new(
        expr: Arc<AggregateFunctionExpr>,
        filter: Option<Arc<dyn PhysicalExpr>>,
        input: &Schema,
    ) -> Result<Self> {
        let args = expr.expressions();
        let field = |name: &str, t: DataType| Arc::new(Field::new(format!("{}[{name}]", expr.name()), t, true));
        let types: Vec<DataType> =
            args.iter().map(|a| a.data_type(input)).collect::<Result<_, _>>().map_err(|e| failed(&e))?;
        let method = Method::of(&expr, &types);
        let state = match method {
            Method::Count => vec![field("count", DataType::Int64)],
            Method::AvgLong => vec![field("sum", DataType::Int64), field("count", DataType::Int64)],
            Method::AvgDouble => vec![field("sum", DataType::Float64), field("count", DataType::Int64)],
            Method::SumLong | Method::SumDouble | Method::SumWide => {
                vec![field("sum", expr.field().data_type().clone())]
            }
            Method::BestLong(_) | Method::BestDouble(_) | Method::BestWide(_) | Method::BestText(_) => {
                vec![field(expr.fun().name(), expr.field().data_type().clone())]
            }
            Method::Revived => {
                let fields = expr.state_fields().map_err(|e| failed(&e))?;
                let state: Vec<_> = fields.iter().map(|f| field(f.name(), f.data_type().clone())).collect();
                KeyCodec::new(&state).map_err(|_| Error::abort(format!("aggregate {} can't be kept", expr.name())))?;
                // What it can't do it says now, not when the first row comes.
                expr.create_accumulator().map_err(|e| failed(&e))?;
                state
            }
        };
        Ok(Self { expr, args, filter, method, state })
    }

    /// The result's column.
    pub(crate) fn field(&self) -> FieldRef {
        self.expr.field()
    }

    /// The partial state's columns.
    pub(crate) fn state_fields(&self) -> &[FieldRef] {
        &self.state
    }

    /// How many table columns the state takes, and their types.
    pub(crate) fn columns(&self) -> &'static [ColumnType] {
        match self.method {
            Method::Count | Method::SumLong | Method::BestLong(_) => &[ColumnType::Long],
            Method::SumDouble | Method::BestDouble(_) => &[ColumnType::Double],
            Method::SumWide | Method::BestWide(_) => &[ColumnType::Wide],
            Method::BestText(_) | Method::Revived => &[ColumnType::Bytes],
            Method::AvgLong => &[ColumnType::Long, ColumnType::Long],
            Method::AvgDouble => &[ColumnType::Double, ColumnType::Long],
        }
    }

    /// What [`Call::states`] makes of the table columns.
    pub(crate) fn shape(&self) -> Result<Vec<ValueShape>> {
        Ok(match self.method {
            Method::Count => vec![ValueShape::Count],
            Method::AvgLong | Method::AvgDouble => vec![ValueShape::Value, ValueShape::Count],
            Method::Revived => {
                let fresh = self.fresh()?;
                let absent = match self.codec()?.encode(&fresh)? {
                    Keys::None => None,
                    Keys::Rows(rows) => Some(rows.row(0).data().to_vec()),
                };
                vec![ValueShape::Row { columns: self.state.len(), absent }]
            }
            _ => vec![ValueShape::Value],
        })
    }

    /// The state of an accumulator that no value has reached: a row of [`Call::state_fields`].
    fn fresh(&self) -> Result<Vec<ArrayRef>> {
        let fresh = self.expr.create_accumulator().and_then(|mut a| a.state()).map_err(|e| failed(&e))?;
        let of_field = |(value, field): (ScalarValue, &FieldRef)| {
            let column = value.to_array().map_err(|e| failed(&e))?;
            cast(&column, field.data_type()).map_err(arrow_failed)
        };
        fresh.into_iter().zip(&self.state).map(of_field).collect()
    }

    /// Takes rows in: row `i` of `args` (evaluated) counts towards `slots[i]` if `mask` (evaluated filter) says so.
    pub(crate) fn update(
        &self,
        table: &mut Table,
        at: usize,
        slots: &[u32],
        args: &[ArrayRef],
        mask: Option<&BooleanArray>,
    ) -> Result<()> {
        if self.method == Method::Revived {
            return self.revive(table, at, slots, mask.map(passing).as_ref(), args, Revival::Rows);
        }
        let [values] = args else { return Ok(()) };
        let nulls = values.nulls().filter(|n| n.null_count() > 0).map(|n| n.inner().clone());
        let included = match (nulls, mask.map(passing)) {
            (Some(a), Some(b)) => Some(&a & &b),
            (a, b) => a.or(b),
        };
        let included = included.as_ref();
        match self.method {
            Method::Count => count(table, at, slots, included, |_| 1)?,
            Method::AvgLong | Method::AvgDouble => {
                self.fold(table, at, slots, values, included)?;
                count(table, at + 1, slots, included, |_| 1)?;
            }
            _ => self.fold(table, at, slots, values, included)?,
        }
        Ok(())
    }

    /// Takes partial states in: row `i` of `states` (columns as [`Call::state_fields`]) is merged into `slots[i]`.
    pub(crate) fn merge(&self, table: &mut Table, at: usize, slots: &[u32], states: &[ArrayRef]) -> Result<()> {
        let valid = |i: usize| states[i].nulls().map(|n| n.inner().clone());
        match self.method {
            Method::Revived => self.revive(table, at, slots, None, states, Revival::States),
            Method::Count => {
                let counts = states[0].as_primitive::<Int64Type>();
                count(table, at, slots, valid(0).as_ref(), |i| counts.value(i))
            }
            Method::AvgLong | Method::AvgDouble => {
                self.fold(table, at, slots, &states[0], valid(0).as_ref())?;
                let counts = states[1].as_primitive::<Int64Type>();
                count(table, at + 1, slots, valid(1).as_ref(), |i| counts.value(i))
            }
            _ => self.fold(table, at, slots, &states[0], valid(0).as_ref()),
        }
    }

    /// Folds values into the column `at`: the same for rows and for partial states.
    fn fold(
        &self,
        table: &mut Table,
        at: usize,
        slots: &[u32],
        values: &ArrayRef,
        included: Option<&BooleanBuffer>,
    ) -> Result<()> {
        match self.method {
            Method::SumLong | Method::AvgLong => {
                let values = values.as_primitive::<Int64Type>().values();
                let mut overflow = false;
                each(table, at, slots, included, longs, |slot, i| match slot.unwrap_or(0).checked_add(values[i]) {
                    Some(sum) => *slot = Some(sum),
                    None => overflow = true,
                });
                self.overflowed(overflow)
            }
            Method::SumDouble | Method::AvgDouble => {
                let values = values.as_primitive::<Float64Type>().values();
                each(table, at, slots, included, doubles, |slot, i| *slot = Some(slot.unwrap_or(0.0) + values[i]));
                Ok(())
            }
            Method::SumWide => {
                let values = values.as_primitive::<Decimal128Type>().values();
                let mut overflow = false;
                each(table, at, slots, included, wides, |slot, i| match slot.unwrap_or(0).checked_add(values[i]) {
                    Some(sum) => *slot = Some(sum),
                    None => overflow = true,
                });
                self.overflowed(overflow)
            }
            Method::BestLong(better) => {
                let values = to_longs(values)?;
                let values = values.as_primitive::<Int64Type>().values();
                each(table, at, slots, included, longs, |slot, i| {
                    if slot.is_none_or(|best| values[i].cmp(&best) == better) {
                        *slot = Some(values[i]);
                    }
                });
                Ok(())
            }
            Method::BestDouble(better) => {
                let values = cast(values, &DataType::Float64).map_err(arrow_failed)?;
                let values = values.as_primitive::<Float64Type>().values();
                each(table, at, slots, included, doubles, |slot, i| {
                    if slot.is_none_or(|best| values[i].total_cmp(&best) == better) {
                        *slot = Some(values[i]);
                    }
                });
                Ok(())
            }
            Method::BestWide(better) => {
                let values = values.as_primitive::<Decimal128Type>().values();
                each(table, at, slots, included, wides, |slot, i| {
                    if slot.is_none_or(|best| values[i].cmp(&best) == better) {
                        *slot = Some(values[i]);
                    }
                });
                Ok(())
            }
            Method::BestText(better) => {
                let values = values.as_string::<i32>();
                each(table, at, slots, included, texts, |slot, i| {
                    let value = values.value(i).as_bytes();
                    if slot.as_deref().is_none_or(|best| value.cmp(best) == better) {
                        *slot = Some(value.into());
                    }
                });
                Ok(())
            }
            Method::Count | Method::Revived => Ok(()),
        }
    }

    fn overflowed(&self, overflow: bool) -> Result<()> {
        if overflow {
            return Err(Error::abort(format!(
                "{} is too great for its type {}; cast the argument to a wider one, such as DECIMAL(38, 0)",
                self.expr.name(),
                self.expr.field().data_type()
            )));
        }
        Ok(())
    }

    /// The partial states of `slots`.
    pub(crate) fn states(&self, rows: &Rows, at: usize, slots: &[u32]) -> Result<Vec<ArrayRef>> {
        match self.method {
            Method::Revived => {
                let (states, known) = self.stored(&self.codec()?, rows, at, slots)?;
                if known.iter().all(|k| *k) {
                    return Ok(states);
                }
                // Rows that no value has reached have the state of a fresh accumulator.
                let fresh = self.fresh()?;
                let mut next = 0;
                let rows: Vec<u32> = known
                    .iter()
                    .map(|k| {
                        if *k {
                            let row = next;
                            next += 1;
                            row
                        } else {
                            u32::MAX
                        }
                    })
                    .collect();
                let count = next;
                let indices: UInt32Array = rows.iter().map(|r| if *r == u32::MAX { count } else { *r }).collect();
                states
                    .iter()
                    .zip(fresh)
                    .map(|(column, fresh)| {
                        let all = arrow::compute::concat(&[column, &fresh]).map_err(arrow_failed)?;
                        take(&all, &indices, None).map_err(arrow_failed)
                    })
                    .collect()
            }
            Method::Count => Ok(vec![counts(rows, at, slots)]),
            Method::AvgLong | Method::AvgDouble => {
                Ok(vec![values(rows, at, slots, self.state[0].data_type())?, counts(rows, at + 1, slots)])
            }
            _ => Ok(vec![values(rows, at, slots, self.state[0].data_type())?]),
        }
    }

    /// The results of `slots`, as they are by now.
    pub(crate) fn results(&self, rows: &Rows, at: usize, slots: &[u32]) -> Result<ArrayRef> {
        let field = self.expr.field();
        if slots.is_empty() {
            return Ok(new_empty_array(field.data_type()));
        }
        match self.method {
            Method::Count => Ok(counts(rows, at, slots)),
            Method::AvgLong => {
                let sums = values(rows, at, slots, &DataType::Int64)?;
                let counts = counts(rows, at + 1, slots);
                let pairs = sums.as_primitive::<Int64Type>().iter().zip(counts.as_primitive::<Int64Type>().values());
                Ok(Arc::new(pairs.map(|(sum, n)| sum.and_then(|s| s.checked_div(*n))).collect::<Int64Array>()))
            }
            Method::AvgDouble => {
                let sums = values(rows, at, slots, &DataType::Float64)?;
                let counts = counts(rows, at + 1, slots);
                let pairs = sums.as_primitive::<Float64Type>().iter().zip(counts.as_primitive::<Int64Type>().values());
                Ok(Arc::new(pairs.map(|(sum, n)| sum.map(|s| s / *n as f64)).collect::<Float64Array>()))
            }
            Method::Revived => {
                let (states, known) = self.stored(&self.codec()?, rows, at, slots)?;
                let mut results = Vec::with_capacity(slots.len());
                let mut next = 0;
                for known in known {
                    let mut accumulator = self.expr.create_accumulator().map_err(|e| failed(&e))?;
                    if known {
                        let state: Vec<_> = states.iter().map(|s| s.slice(next, 1)).collect();
                        accumulator.merge_batch(&state).map_err(|e| failed(&e))?;
                        next += 1;
                    }
                    results.push(accumulator.evaluate().map_err(|e| failed(&e))?);
                }
                let results = ScalarValue::iter_to_array(results).map_err(|e| failed(&e))?;
                cast(&results, field.data_type()).map_err(arrow_failed)
            }
            _ => values(rows, at, slots, field.data_type()),
        }
    }

    /// Encodes stored states.
    fn codec(&self) -> Result<KeyCodec> {
        KeyCodec::new(&self.state)
    }

    /// The stored states of those of `slots` that have one, and which those are.
    fn stored(&self, codec: &KeyCodec, rows: &Rows, at: usize, slots: &[u32]) -> Result<(Vec<ArrayRef>, Vec<bool>)> {
        let of = |slot: &u32| rows.bytes(*slot as usize, at);
        let known = slots.iter().map(|s| of(s).is_some()).collect();
        Ok((codec.decode(slots.iter().filter_map(of))?, known))
    }

    /// Revives the accumulators of the touched slots, feeds them, and puts their states back.
    fn revive(
        &self,
        table: &mut Table,
        at: usize,
        slots: &[u32],
        included: Option<&BooleanBuffer>,
        input: &[ArrayRef],
        revival: Revival,
    ) -> Result<()> {
        let mut order: Vec<u32> =
            (0..slots.len() as u32).filter(|i| included.is_none_or(|b| b.value(*i as usize))).collect();
        if order.is_empty() {
            return Ok(());
        }
        order.sort_by_key(|i| slots[*i as usize]);
        let indices = UInt32Array::from(order.clone());
        let input: Vec<ArrayRef> =
            input.iter().map(|a| take(a, &indices, None)).collect::<Result<_, _>>().map_err(arrow_failed)?;
        let runs: Vec<&[u32]> = order.chunk_by(|a, b| slots[*a as usize] == slots[*b as usize]).collect();
        let touched: Vec<u32> = runs.iter().map(|run| slots[run[0] as usize]).collect();
        let codec = self.codec()?;
        let (stored, known) = self.stored(&codec, table.rows(), at, &touched)?;
        let mut states: Vec<Vec<ScalarValue>> = vec![Vec::with_capacity(runs.len()); self.state.len()];
        let (mut start, mut next) = (0, 0);
        for (run, known) in runs.iter().zip(known) {
            let mut accumulator = self.expr.create_accumulator().map_err(|e| failed(&e))?;
            if known {
                let state: Vec<_> = stored.iter().map(|s| s.slice(next, 1)).collect();
                accumulator.merge_batch(&state).map_err(|e| failed(&e))?;
                next += 1;
            }
            let rows: Vec<_> = input.iter().map(|a| a.slice(start, run.len())).collect();
            match revival {
                Revival::Rows => accumulator.update_batch(&rows),
                Revival::States => accumulator.merge_batch(&rows),
            }
            .map_err(|e| failed(&e))?;
            start += run.len();
            let state = accumulator.state().map_err(|e| failed(&e))?;
            states.iter_mut().zip(state).for_each(|(column, value)| column.push(value));
        }
        let columns: Vec<ArrayRef> = states
            .into_iter()
            .zip(&self.state)
            .map(|(values, field)| {
                let column = ScalarValue::iter_to_array(values).map_err(|e| failed(&e))?;
                cast(&column, field.data_type()).map_err(arrow_failed)
            })
            .collect::<Result<_>>()?;
        let encoded = codec.encode(&columns)?;
        table.write_runs(&touched, at, |column, rows, at| {
            if let Column::Bytes(values) = column {
                for (n, row) in rows.iter().enumerate() {
                    values[*row as usize] = Some(encoded.get(at + n).into());
                }
            }
        });
        Ok(())
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.expr.name().fmt(f)
    }
}

#[derive(Clone, Copy)]
enum Revival {
    Rows,
    States,
}

/// Where a filter is true: null counts as false.
fn passing(mask: &BooleanArray) -> BooleanBuffer {
    match mask.nulls() {
        Some(nulls) => mask.values() & nulls.inner(),
        None => mask.values().clone(),
    }
}

fn longs(column: &mut Column) -> &mut [Option<i64>] {
    match column {
        Column::Long(values) => values,
        Column::Double(_) | Column::Wide(_) | Column::Bytes(_) => &mut [],
    }
}

fn doubles(column: &mut Column) -> &mut [Option<f64>] {
    match column {
        Column::Double(values) => values,
        Column::Long(_) | Column::Wide(_) | Column::Bytes(_) => &mut [],
    }
}

fn wides(column: &mut Column) -> &mut [Option<i128>] {
    match column {
        Column::Wide(values) => values,
        Column::Long(_) | Column::Double(_) | Column::Bytes(_) => &mut [],
    }
}

fn texts(column: &mut Column) -> &mut [Option<Box<[u8]>>] {
    match column {
        Column::Bytes(values) => values,
        Column::Long(_) | Column::Double(_) | Column::Wide(_) => &mut [],
    }
}

/// Calls `fold(value of slots[i], i)` for each included `i`.
#[inline]
fn each<T>(
    table: &mut Table,
    column: usize,
    slots: &[u32],
    included: Option<&BooleanBuffer>,
    view: fn(&mut Column) -> &mut [T],
    mut fold: impl FnMut(&mut T, usize),
) {
    table.write_runs(slots, column, |column, rows, at| {
        let values = view(column);
        match included {
            None => rows.iter().enumerate().for_each(|(n, row)| fold(&mut values[*row as usize], at + n)),
            Some(included) => {
                for (n, row) in rows.iter().enumerate() {
                    if included.value(at + n) {
                        fold(&mut values[*row as usize], at + n);
                    }
                }
            }
        }
    });
}

fn count(
    table: &mut Table,
    column: usize,
    slots: &[u32],
    included: Option<&BooleanBuffer>,
    by: impl Fn(usize) -> i64,
) -> Result<()> {
    each(table, column, slots, included, longs, |slot, i| *slot = Some(slot.unwrap_or(0).saturating_add(by(i))));
    Ok(())
}

fn counts(rows: &Rows, at: usize, slots: &[u32]) -> ArrayRef {
    let count = |slot: &u32| rows.long(*slot as usize, at).unwrap_or(0);
    Arc::new(slots.iter().map(count).collect::<Int64Array>())
}

/// The values of a native column, as an array of `data_type`.
fn values(rows: &Rows, at: usize, slots: &[u32], data_type: &DataType) -> Result<ArrayRef> {
    shape::values(rows, at, slots, data_type).map_err(arrow_failed)
}

/// Dates go by way of 32 bits: there is no direct cast.
fn to_longs(values: &ArrayRef) -> Result<ArrayRef> {
    let values = match values.data_type() {
        DataType::Date32 => cast(values, &DataType::Int32).map_err(arrow_failed)?,
        _ => values.clone(),
    };
    cast(&values, &DataType::Int64).map_err(arrow_failed)
}
