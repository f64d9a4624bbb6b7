//! Expressions as people write them, for the descriptions of operators.

use datafusion_common::ScalarValue;
use datafusion_expr::{BinaryExpr, Cast, Expr};

use super::assign;

/// Shows an expression. Not SQL that could be parsed again: generated qualifiers are left out, and what the optimiser made
/// of an expression is shown as it is.
pub(crate) fn show(expr: &Expr) -> String {
    match expr {
        Expr::Alias(alias) => {
            let inner = show(inmost(&alias.expr));
            if inner == alias.name || inner.ends_with(&format!(".{}", alias.name)) {
                inner
            } else {
                format!("{inner} AS {}", alias.name)
            }
        }
        Expr::Column(column) => match &column.relation {
            Some(relation) if !relation.table().starts_with('$') => {
                format!("{}.{}", relation.table(), show_name(&column.name))
            }
            _ => show_name(&column.name),
        },
        Expr::Literal(value, _) => literal(value),
        Expr::BinaryExpr(BinaryExpr { left, op, right }) => format!("{} {op} {}", operand(left), operand(right)),
        Expr::Cast(Cast { expr, field, .. }) => {
            format!("CAST({} AS {})", show(expr), assign::describe(field.data_type()))
        }
        Expr::IsNull(expr) => format!("{} IS NULL", operand(expr)),
        Expr::IsNotNull(expr) => format!("{} IS NOT NULL", operand(expr)),
        Expr::Not(expr) => format!("NOT {}", operand(expr)),
        Expr::ScalarFunction(call) if call.name() == "get_field" => {
            let mut parts = call.args.iter();
            let base = parts.next().map(show).unwrap_or_default();
            let names = parts.map(|name| match name {
                Expr::Literal(ScalarValue::Utf8(Some(name)) | ScalarValue::Utf8View(Some(name)), _) => name.clone(),
                other => show(other),
            });
            std::iter::once(base).chain(names).collect::<Vec<_>>().join(".")
        }
        Expr::ScalarFunction(call) => {
            format!("{}({})", call.name(), call.args.iter().map(show).collect::<Vec<_>>().join(", "))
        }
        Expr::Case(case) => {
            let mut text = "CASE".to_owned();
            if let Some(operand) = &case.expr {
                text += &format!(" {}", show(operand));
            }
            for (when, then) in &case.when_then_expr {
                text += &format!(" WHEN {} THEN {}", show(when), show(then));
            }
            if let Some(otherwise) = &case.else_expr {
                text += &format!(" ELSE {}", show(otherwise));
            }
            text + " END"
        }
        Expr::AggregateFunction(call) => {
            let params = &call.params;
            let args: Vec<String> = params.args.iter().map(show).collect();
            let args = if call.func.name() == "count" && args == ["1"] { "*".to_owned() } else { args.join(", ") };
            let distinct = if params.distinct { "DISTINCT " } else { "" };
            let filter = params.filter.as_ref().map_or(String::new(), |f| format!(" FILTER (WHERE {})", show(f)));
            format!("{}({distinct}{args}){filter}", call.func.name())
        }
        other => other.human_display().to_string(),
    }
}

/// The names that the optimiser gives to results of aggregates hold generated qualifiers.
fn show_name(name: &str) -> String {
    let mut text = name.to_owned();
    while let Some(at) = text.find("$window") {
        let end = text[at..].find('.').map_or(text.len(), |dot| at + dot + 1);
        text.replace_range(at..end, "");
    }
    if text == "count(Int64(1))" { "count(*)".to_owned() } else { text }
}

fn inmost(expr: &Expr) -> &Expr {
    match expr {
        Expr::Alias(alias) => inmost(&alias.expr),
        other => other,
    }
}

fn operand(expr: &Expr) -> String {
    match expr {
        Expr::BinaryExpr(_) | Expr::Case(_) => format!("({})", show(expr)),
        _ => show(expr),
    }
}

fn literal(value: &ScalarValue) -> String {
    match value {
        ScalarValue::Utf8(Some(text)) | ScalarValue::Utf8View(Some(text)) | ScalarValue::LargeUtf8(Some(text)) => {
            format!("'{text}'")
        }
        ScalarValue::IntervalMonthDayNano(Some(interval))
            if interval.months == 0 && interval.nanoseconds % 1_000_000 == 0 =>
        {
            let ms = i64::from(interval.days) * 86_400_000 + interval.nanoseconds / 1_000_000;
            format!("INTERVAL {}", assign::show(ms))
        }
        value if value.is_null() => "NULL".to_owned(),
        value => value.to_string(),
    }
}
