//! What a query yields, as the columns of the table that it is inserted into.

use std::{sync::Arc, time::Duration};

use arrow::datatypes::{DataType, TimeUnit};
use datafusion_common::ScalarValue;
use datafusion_expr::{Expr, LogicalPlan, LogicalPlanBuilder, cast};

use super::Table;
use crate::{dialect::Insert, error::SqlError};

/// Projects a query onto the columns of its sink.
pub(super) fn to_sink(plan: LogicalPlan, table: &Arc<Table>, insert: &Insert) -> Result<LogicalPlan, SqlError> {
    let name = &table.def.name;
    if let Some(computed) = insert.columns.iter().find(|(c, _)| table.computed.contains_key(c)) {
        return Err(SqlError::at(computed.1, format!("column '{}' is computed: it can't be written", computed.0)));
    }
    let fields = table.def.schema.fields();
    let mut targets = Vec::new();
    if insert.columns.is_empty() {
        targets.extend(0..fields.len());
    } else {
        for (column, location) in &insert.columns {
            let Some(at) = fields.iter().position(|f| f.name() == column) else {
                let error = SqlError::at(*location, format!("unknown column '{column}' in table '{name}'"));
                return Err(error.suggest(column, fields.iter().map(|f| f.name().as_str())));
            };
            if targets.contains(&at) {
                return Err(SqlError::at(*location, format!("column '{column}' is named twice")));
            }
            targets.push(at);
        }
    }
    let columns = plan.schema().columns();
    if columns.len() != targets.len() {
        let wanted: Vec<&str> = targets.iter().map(|t| fields[*t].name().as_str()).collect();
        let message = format!(
            "the query has {}, table '{name}' takes {} ({})",
            counted(columns.len()),
            wanted.len(),
            wanted.join(", ")
        );
        return Err(SqlError::at(insert.location, message));
    }
    let mut exprs = Vec::with_capacity(fields.len());
    for (at, field) in fields.iter().enumerate() {
        let Some(from) = targets.iter().position(|t| *t == at) else {
            if !field.is_nullable() {
                return Err(SqlError::at(
                    insert.location,
                    format!("column '{}' of table '{name}' needs a value", field.name()),
                ));
            }
            let null = ScalarValue::try_from(field.data_type()).map_err(|e| SqlError::of_planner(&e))?;
            exprs.push(Expr::Literal(null, None).alias(field.name()));
            continue;
        };
        let column = Expr::Column(columns[from].clone());
        let (have, want) = (plan.schema().field(from).data_type(), field.data_type());
        let expr = if have == want {
            column
        } else if fits(have, want) || literal_fits(&plan, from, want) {
            cast(column, want.clone())
        } else {
            let message = format!(
                "column '{}' of table '{name}' is {}, the query gives {}",
                field.name(),
                describe(want),
                describe(have)
            );
            return Err(SqlError::at(insert.location, message).help(format!("write CAST(… AS {})", describe(want))));
        };
        exprs.push(expr.alias(field.name()));
    }
    LogicalPlanBuilder::from(plan)
        .project(exprs)
        .and_then(LogicalPlanBuilder::build)
        .map_err(|e| SqlError::of_planner(&e).or_at(insert.location))
}

fn counted(columns: usize) -> String {
    if columns == 1 { "1 column".to_owned() } else { format!("{columns} columns") }
}

/// Whether every value (or, of decimals, every value in range) goes over without being asked for.
fn fits(from: &DataType, to: &DataType) -> bool {
    let width = |t: &DataType| match t {
        DataType::Int8 => Some(1),
        DataType::Int16 => Some(2),
        DataType::Int32 => Some(3),
        DataType::Int64 => Some(4),
        _ => None,
    };
    let unsigned = |t: &DataType| match t {
        DataType::UInt8 => Some(2),
        DataType::UInt16 => Some(3),
        DataType::UInt32 => Some(4),
        DataType::UInt64 => Some(4), // counts and lengths: beyond 2^63 the cast fails, and says so
        _ => None,
    };
    let text = |t: &DataType| matches!(t, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View);
    let bytes = |t: &DataType| matches!(t, DataType::Binary | DataType::LargeBinary | DataType::BinaryView);
    if *from == DataType::Null || (text(from) && text(to)) || (bytes(from) && bytes(to)) {
        return true;
    }
    match (from, to) {
        (DataType::Dictionary(_, value), _) => value.as_ref() == to || fits(value, to),
        (DataType::Decimal128(_, from), DataType::Decimal128(_, to)) => to >= from,
        (_, DataType::Float64) => from.is_integer() || *from == DataType::Float32 || from.is_decimal(),
        (_, DataType::Float32) => from.is_integer(),
        (_, DataType::Decimal128(..)) => from.is_integer(),
        (DataType::Timestamp(from, _), DataType::Timestamp(to, _)) => unit(from) <= unit(to),
        (DataType::Date32, DataType::Timestamp(..)) => true,
        (DataType::Struct(from), DataType::Struct(to)) => {
            from.len() == to.len()
                && from
                    .iter()
                    .zip(to)
                    .all(|(a, b)| a.data_type() == b.data_type() || fits(a.data_type(), b.data_type()))
        }
        _ => width(from).or_else(|| unsigned(from)).zip(width(to)).is_some_and(|(a, b)| a <= b),
    }
}

/// Whether a column is an integer literal (which has the widest type) in range of `to`.
fn literal_fits(plan: &LogicalPlan, column: usize, to: &DataType) -> bool {
    match plan {
        LogicalPlan::Projection(projection) => match projection.expr.get(column).map(|e| e.clone().unalias()) {
            Some(Expr::Literal(value, _)) => {
                value.data_type().is_integer() && to.is_integer() && value.cast_to(to).is_ok()
            }
            _ => false,
        },
        LogicalPlan::Union(union) => union.inputs.iter().all(|input| literal_fits(input, column, to)),
        LogicalPlan::SubqueryAlias(alias) => literal_fits(&alias.input, column, to),
        _ => false,
    }
}

fn unit(unit: &TimeUnit) -> u8 {
    match unit {
        TimeUnit::Second => 0,
        TimeUnit::Millisecond => 1,
        TimeUnit::Microsecond => 2,
        TimeUnit::Nanosecond => 3,
    }
}

/// A type by its name in SQL.
pub(crate) fn describe(data_type: &DataType) -> String {
    match data_type {
        DataType::Boolean => "BOOLEAN".to_owned(),
        DataType::Int8 => "TINYINT".to_owned(),
        DataType::Int16 => "SMALLINT".to_owned(),
        DataType::Int32 => "INT".to_owned(),
        DataType::Int64 => "BIGINT".to_owned(),
        DataType::Float32 => "FLOAT".to_owned(),
        DataType::Float64 => "DOUBLE".to_owned(),
        DataType::Decimal128(p, s) => format!("DECIMAL({p}, {s})"),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "STRING".to_owned(),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => "BYTES".to_owned(),
        DataType::Date32 => "DATE".to_owned(),
        DataType::Timestamp(unit, zone) => {
            let name = if zone.is_some() { "TIMESTAMP_LTZ" } else { "TIMESTAMP" };
            let digits = match unit {
                TimeUnit::Second => 0,
                TimeUnit::Millisecond => 3,
                TimeUnit::Microsecond => 6,
                TimeUnit::Nanosecond => 9,
            };
            format!("{name}({digits})")
        }
        other => other.to_string(),
    }
}

/// `5 s`, `500 ms`, `1 min`, `2h`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..digits].parse().ok()?;
    let scale = match text[digits..].trim() {
        "ms" | "milli" | "millis" => 1,
        "s" | "sec" | "second" | "seconds" => 1000,
        "m" | "min" | "minute" | "minutes" => 60_000,
        "h" | "hour" | "hours" => 3_600_000,
        "d" | "day" | "days" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(scale).map(Duration::from_millis)
}

/// Milliseconds, for people.
pub(super) fn show(ms: i64) -> String {
    match ms {
        _ if ms % 3_600_000 == 0 => format!("{} h", ms / 3_600_000),
        _ if ms % 60_000 == 0 => format!("{} min", ms / 60_000),
        _ if ms % 1000 == 0 => format!("{} s", ms / 1000),
        _ => format!("{ms} ms"),
    }
}
