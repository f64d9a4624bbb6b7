//! The functions that a query may call: all of DataFusion's, and a few of Flink's by their own names.

use std::{collections::HashMap, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, StringBuilder},
    compute::cast,
    datatypes::{DataType, TimeUnit, TimestampMillisecondType},
};
use datafusion_common::{Result, ScalarValue, exec_err, plan_err};
use datafusion_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, ColumnarValue, HigherOrderUDF, ReversedUDAF, ScalarFunctionArgs,
    ScalarUDF, ScalarUDFImpl, Signature, Volatility,
    function::{AccumulatorArgs, StateFieldsArgs},
    planner::ExprPlanner,
};
use datafusion_sql::sqlparser::ast::{
    BinaryOperator, CaseWhen, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, Ident, ObjectNamePart,
    Select, SelectItem, VisitMut, VisitorMut, helpers::attached_token::AttachedToken,
};

use super::row_number;
use crate::{dialect::refuse::Functions, error::start};

/// Names that are rewritten into other expressions before planning.
const REWRITTEN: &[&str] = &["mod", "if"];

/// Scalar and aggregate functions by lower-case name.
pub(crate) struct Registry {
    pub(crate) scalars: HashMap<String, Arc<ScalarUDF>>,
    pub(crate) higher_order: HashMap<String, Arc<HigherOrderUDF>>,
    pub(crate) aggregates: HashMap<String, Arc<AggregateUDF>>,
    pub(crate) planners: Vec<Arc<dyn ExprPlanner>>,
}

impl Registry {
    pub(crate) fn new() -> Self {
        let mut scalars = HashMap::new();
        let own = [Arc::new(ScalarUDF::from(DateFormat::new()))];
        let all = datafusion_functions::all_default_functions()
            .into_iter()
            .chain(datafusion_functions_nested::all_default_nested_functions())
            .chain(own);
        for function in all {
            for name in std::iter::once(function.name()).chain(function.aliases().iter().map(String::as_str)) {
                scalars.insert(name.to_lowercase(), function.clone());
            }
        }
        let mut aggregates = HashMap::new();
        let own = [Arc::new(AggregateUDF::from(Average::new()))];
        for function in datafusion_functions_aggregate::all_default_aggregate_functions().into_iter().chain(own) {
            let function =
                if function.name() == "avg" { Arc::new(AggregateUDF::from(Average::new())) } else { function };
            for name in std::iter::once(function.name()).chain(function.aliases().iter().map(String::as_str)) {
                aggregates.insert(name.to_lowercase(), function.clone());
            }
        }
        let mut higher_order = HashMap::new();
        for function in datafusion_functions_nested::all_default_higher_order_functions() {
            higher_order.insert(function.name().to_lowercase(), function);
        }
        let planners: Vec<Arc<dyn ExprPlanner>> = vec![
            Arc::new(datafusion_functions::core::planner::CoreFunctionPlanner::default()),
            Arc::new(datafusion_functions_nested::planner::NestedFunctionPlanner),
            Arc::new(datafusion_functions_nested::planner::FieldAccessPlanner),
            Arc::new(datafusion_functions::datetime::planner::DatetimeFunctionPlanner),
            Arc::new(datafusion_functions::unicode::planner::UnicodeFunctionPlanner),
            Arc::new(datafusion_functions_aggregate::planner::AggregateFunctionPlanner),
        ];
        Self { scalars, higher_order, aggregates, planners }
    }
}

impl Functions for Registry {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.scalars.keys().chain(self.aggregates.keys()).cloned().collect();
        names.extend(REWRITTEN.iter().map(|n| (*n).to_owned()));
        names.sort();
        names
    }

    fn has(&self, name: &str) -> bool {
        self.scalars.contains_key(name)
            || self.aggregates.contains_key(name)
            || self.higher_order.contains_key(name)
            || REWRITTEN.contains(&name)
    }
}

/// Gives the columns of a `SELECT` list names that differ, where it gives none: `EXPR$0`, and `a0` for a second `a`.
fn name_columns(select: &mut Select) {
    let mut taken: Vec<String> = Vec::new();
    for (at, item) in select.projection.iter_mut().enumerate() {
        let SelectItem::UnnamedExpr(expr) = item else {
            if let SelectItem::ExprWithAlias { alias, .. } = item {
                taken.push(alias.value.clone());
            }
            continue;
        };
        let own = match expr {
            Expr::Identifier(ident) => Some(ident.value.clone()),
            Expr::CompoundIdentifier(idents) => idents.last().map(|i| i.value.clone()),
            _ => None,
        };
        let name = match &own {
            Some(name) if !taken.contains(name) => {
                taken.push(name.clone());
                if matches!(expr, Expr::Identifier(_)) {
                    continue;
                }
                name.clone()
            }
            Some(name) => (0..).map(|n| format!("{name}{n}")).find(|n| !taken.contains(n)).unwrap_or_default(),
            None => format!("EXPR${at}"),
        };
        if !taken.contains(&name) {
            taken.push(name.clone());
        }
        *item = SelectItem::ExprWithAlias { expr: expr.clone(), alias: Ident::with_quote('`', name) };
    }
}

/// Rewrites Flink's names that are operators with us (`MOD(a, b)`, `IF(c, a, b)`), names columns as Flink does, and tells
/// calls of `ROW_NUMBER` apart.
pub(crate) fn rewrite(node: &mut impl VisitMut) {
    struct Rewrite;
    impl VisitorMut for Rewrite {
        type Break = ();
        fn post_visit_expr(&mut self, expr: &mut Expr) -> std::ops::ControlFlow<()> {
            let replaced = match expr {
                Expr::Function(function) => {
                    place_row_number(function);
                    replacement(function)
                }
                _ => None,
            };
            if let Some(replaced) = replaced {
                *expr = replaced;
            }
            std::ops::ControlFlow::Continue(())
        }
        fn post_visit_select(&mut self, select: &mut Select) -> std::ops::ControlFlow<()> {
            name_columns(select);
            std::ops::ControlFlow::Continue(())
        }
    }
    let _ = node.visit(&mut Rewrite);
}

fn replacement(function: &Function) -> Option<Expr> {
    let FunctionArguments::List(list) = &function.args else { return None };
    let args: Vec<&Expr> = list
        .args
        .iter()
        .map(|arg| match arg {
            FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) => Some(expr),
            _ => None,
        })
        .collect::<Option<_>>()?;
    match (function.name.to_string().to_lowercase().as_str(), args.as_slice()) {
        ("mod", [a, b]) => Some(Expr::Nested(Box::new(Expr::BinaryOp {
            left: Box::new(Expr::Nested(Box::new((*a).clone()))),
            op: BinaryOperator::Modulo,
            right: Box::new(Expr::Nested(Box::new((*b).clone()))),
        }))),
        ("if", [condition, yes, no]) => Some(Expr::Case {
            case_token: AttachedToken::empty(),
            end_token: AttachedToken::empty(),
            operand: None,
            conditions: vec![CaseWhen { condition: (*condition).clone(), result: (*yes).clone() }],
            else_result: Some(Box::new((*no).clone())),
        }),
        _ => None,
    }
}

/// Puts the place of a call of `ROW_NUMBER` into its name.
fn place_row_number(function: &mut Function) {
    let [ObjectNamePart::Identifier(name)] = function.name.0.as_mut_slice() else { return };
    if function.over.is_some() && name.value.eq_ignore_ascii_case(row_number::NAME) {
        *name = Ident::with_span(name.span, row_number::name_at(start(name.span)));
    }
}

/// `AVG`, which of integers is an integer, cut towards zero, and exact: as in Flink. Otherwise DataFusion's.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Average {
    signature: Signature,
}

impl Average {
    fn new() -> Self {
        Self { signature: Signature::user_defined(Volatility::Immutable) }
    }
}

impl AggregateUDFImpl for Average {
    fn name(&self) -> &str {
        "avg"
    }

    fn aliases(&self) -> &[String] {
        static ALIASES: std::sync::LazyLock<Vec<String>> = std::sync::LazyLock::new(|| vec!["mean".to_owned()]);
        &ALIASES
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> Result<Vec<DataType>> {
        match types {
            [t] if t.is_integer() && *t != DataType::UInt64 => Ok(vec![DataType::Int64]),
            [t] if t.is_floating() || *t == DataType::Null => Ok(vec![DataType::Float64]),
            [t] if t.is_decimal() => Ok(vec![t.clone()]),
            [t] => plan_err!("avg of a {t} is not a number; cast it"),
            _ => plan_err!("avg takes one argument"),
        }
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        match types {
            [DataType::Int64] => Ok(DataType::Int64),
            types => datafusion_functions_aggregate::average::avg_udaf().return_type(types),
        }
    }

    fn accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        if *args.return_type() == DataType::Int64 {
            return plan_err!("AVG(DISTINCT) of integers is not supported; cast the argument to DOUBLE");
        }
        datafusion_functions_aggregate::average::avg_udaf().accumulator(args)
    }

    fn state_fields(&self, args: StateFieldsArgs) -> Result<Vec<arrow::datatypes::FieldRef>> {
        datafusion_functions_aggregate::average::avg_udaf().state_fields(args)
    }

    fn reverse_expr(&self) -> ReversedUDAF {
        ReversedUDAF::Identical
    }
}

/// `DATE_FORMAT(timestamp, 'yyyy-MM-dd')` with a pattern as in Java's `DateTimeFormatter`.
#[derive(Debug, PartialEq, Eq, Hash)]
struct DateFormat {
    signature: Signature,
}

impl DateFormat {
    fn new() -> Self {
        Self { signature: Signature::user_defined(Volatility::Immutable) }
    }
}

impl ScalarUDFImpl for DateFormat {
    fn name(&self) -> &str {
        "date_format"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> Result<Vec<DataType>> {
        match types {
            [DataType::Timestamp(unit, zone), _] => Ok(vec![DataType::Timestamp(*unit, zone.clone()), DataType::Utf8]),
            [DataType::Date32, _] => Ok(vec![DataType::Timestamp(TimeUnit::Millisecond, None), DataType::Utf8]),
            _ => plan_err!("DATE_FORMAT takes a TIMESTAMP and a pattern such as 'yyyy-MM-dd'"),
        }
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [times, pattern] = args.args.as_slice() else { return exec_err!("DATE_FORMAT takes two arguments") };
        let pattern = match pattern {
            ColumnarValue::Scalar(ScalarValue::Utf8(Some(pattern))) => pattern.clone(),
            ColumnarValue::Scalar(_) => return Ok(ColumnarValue::Scalar(ScalarValue::Utf8(None))),
            ColumnarValue::Array(_) => return exec_err!("the pattern of DATE_FORMAT must be a literal"),
        };
        let parts = parse_pattern(&pattern)?;
        let scalar = matches!(times, ColumnarValue::Scalar(_));
        let times = times.to_array(if scalar { 1 } else { args.number_rows })?;
        let texts = format_times(&times, &parts)?;
        Ok(if scalar {
            ColumnarValue::Scalar(ScalarValue::try_from_array(&texts, 0)?)
        } else {
            ColumnarValue::Array(texts)
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Year,
    YearOfCentury,
    Month(usize),
    Day(usize),
    Hour(usize),
    Minute(usize),
    Second(usize),
    /// Digits of the second's fraction.
    Fraction(usize),
}

/// Whether `DATE_FORMAT` knows a pattern.
pub(crate) fn check_pattern(pattern: &str) -> Result<()> {
    parse_pattern(pattern).map(drop)
}

fn parse_pattern(pattern: &str) -> Result<Vec<Part>> {
    let mut parts: Vec<Part> = Vec::new();
    let mut rest = pattern.chars().peekable();
    let mut text = String::new();
    while let Some(c) = rest.next() {
        if c == '\'' {
            let mut quoted = String::new();
            while let Some(c) = rest.next_if(|c| *c != '\'') {
                quoted.push(c);
            }
            rest.next();
            text += if quoted.is_empty() { "'" } else { &quoted };
            continue;
        }
        if !c.is_ascii_alphabetic() {
            text.push(c);
            continue;
        }
        let mut width = 1;
        while rest.next_if_eq(&c).is_some() {
            width += 1;
        }
        let part = match (c, width) {
            ('y' | 'u', 4 | 1) => Part::Year,
            ('y' | 'u', 2) => Part::YearOfCentury,
            ('M', 1 | 2) => Part::Month(width),
            ('d', 1 | 2) => Part::Day(width),
            ('H', 1 | 2) => Part::Hour(width),
            ('m', 1 | 2) => Part::Minute(width),
            ('s', 1 | 2) => Part::Second(width),
            ('S', 1..=9) => Part::Fraction(width),
            _ => {
                let letters = c.to_string().repeat(width);
                return plan_err!("DATE_FORMAT does not know '{letters}' (it knows yyyy yy MM dd HH mm ss SSS)");
            }
        };
        if !text.is_empty() {
            parts.push(Part::Text(std::mem::take(&mut text)));
        }
        parts.push(part);
    }
    if !text.is_empty() {
        parts.push(Part::Text(text));
    }
    Ok(parts)
}

fn format_times(times: &ArrayRef, parts: &[Part]) -> Result<ArrayRef> {
    use std::fmt::Write;
    let nanos = match times.data_type() {
        DataType::Timestamp(TimeUnit::Nanosecond, _) => 1_000_000,
        DataType::Timestamp(TimeUnit::Microsecond, _) => 1_000,
        _ => 1,
    };
    let whole = cast(times, &DataType::Int64)?;
    let whole = whole.as_primitive::<arrow::datatypes::Int64Type>();
    let millis = if nanos == 1 {
        cast(times, &DataType::Timestamp(TimeUnit::Millisecond, None))?
    } else {
        Arc::new(arrow::compute::unary::<_, _, TimestampMillisecondType>(whole, |v| v.div_euclid(nanos))) as ArrayRef
    };
    let millis = millis.as_primitive::<TimestampMillisecondType>();
    let mut out = StringBuilder::with_capacity(times.len(), times.len() * 20);
    for row in 0..times.len() {
        if times.is_null(row) {
            out.append_null();
            continue;
        }
        let ms = millis.value(row);
        let (days, of_day) = (ms.div_euclid(86_400_000), ms.rem_euclid(86_400_000));
        let (year, month, day) = civil(days);
        for part in parts {
            let written = match part {
                Part::Text(text) => out.write_str(text),
                Part::Year => write!(out, "{year:04}"),
                Part::YearOfCentury => write!(out, "{:02}", year.rem_euclid(100)),
                Part::Month(width) => write!(out, "{month:0width$}"),
                Part::Day(width) => write!(out, "{day:0width$}"),
                Part::Hour(width) => write!(out, "{:0width$}", of_day / 3_600_000),
                Part::Minute(width) => write!(out, "{:0width$}", of_day / 60_000 % 60),
                Part::Second(width) => write!(out, "{:0width$}", of_day / 1000 % 60),
                Part::Fraction(width) => {
                    let fraction = match times.data_type() {
                        DataType::Timestamp(TimeUnit::Nanosecond, _) => whole.value(row).rem_euclid(1_000_000_000),
                        DataType::Timestamp(TimeUnit::Microsecond, _) => whole.value(row).rem_euclid(1_000_000) * 1000,
                        _ => ms.rem_euclid(1000) * 1_000_000,
                    };
                    let digits = format!("{fraction:09}");
                    out.write_str(&digits[..*width])
                }
            };
            debug_assert!(written.is_ok(), "writing to memory");
        }
        out.append_value("");
    }
    Ok(Arc::new(out.finish()))
}

/// Year, month and day of a number of days since 1970-01-01 (proleptic Gregorian calendar).
fn civil(days: i64) -> (i64, i64, i64) {
    // Count in eras of 400 years that begin on the 1st of March of year 0: leap days come last.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use arrow::array::TimestampMillisecondArray;

    use super::*;

    fn check(ms: i64, pattern: &str, expected: &str) {
        let times: ArrayRef = Arc::new(TimestampMillisecondArray::from(vec![ms]));
        let texts = format_times(&times, &parse_pattern(pattern).unwrap()).unwrap();
        assert_eq!(texts.as_string::<i32>().value(0), expected);
    }

    #[test]
    fn times_are_formatted_as_in_java() {
        check(0, "yyyy-MM-dd HH:mm:ss", "1970-01-01 00:00:00");
        check(1_709_210_096_789, "yyyy-MM-dd'T'HH:mm:ss.SSS", "2024-02-29T12:34:56.789");
        check(-1, "yy/M/d H", "69/12/31 23");
        assert!(parse_pattern("EEE").is_err());
    }
}
