//! Deduplication: `ROW_NUMBER()` by event time and the filter that keeps number 1 of each key.
//!
//! The row number never becomes a column: the filter and it are one operator, and whatever else reads it is refused.

use std::sync::Arc;

use datafusion_common::Column;
use datafusion_expr::{
    BinaryExpr, Expr, LogicalPlan, Operator, Window,
    expr::{Sort, WindowFunctionParams},
    lit,
    utils::{conjunction, split_conjunction},
};
use floodmark_dataflow::{connector::Location, graph::NodeKind};

use super::{Changelog, Input, Lowering, Made, Rel, Role, WINDOW_ROLES, as_column, bare};
use crate::{
    error::SqlError,
    operators::{
        dedup::{Deduplicate, Keep, LocalDeduplicate},
        key::check_key,
    },
    plan::row_number::{self, DEDUPLICATION},
};

/// What a condition says of a row number.
enum Condition {
    /// It is 1.
    First,
    /// It is at most something greater, or something else than 1.
    Others,
    /// Nothing that is understood.
    Unknown,
}

impl Lowering<'_> {
    /// The rows that a filter keeps of numbered ones.
    pub(super) fn deduplicated(&mut self, window: &Window, predicate: Option<&Expr>) -> Result<Rel, SqlError> {
        let Some((number, params, location)) = row_number_of(window) else {
            return Err(self
                .refused("several calls of ROW_NUMBER in one SELECT are not supported")
                .help(DEDUPLICATION));
        };
        let at = |message: &str| SqlError::at(location, message);
        let (conditions, rest): (Vec<&Expr>, Vec<&Expr>) = predicate
            .into_iter()
            .flat_map(split_conjunction)
            .partition(|p| p.column_refs().into_iter().any(|c| c.name == number));
        match conditions.as_slice() {
            [] => return Err(at("ROW_NUMBER that no condition compares with 1 is not supported").help(DEDUPLICATION)),
            [condition] => match read(condition, &number) {
                Condition::First => {}
                Condition::Others => {
                    return Err(at("only the first row of each key can be kept; more (top-n) is not supported")
                        .help("compare the row number with 1"));
                }
                Condition::Unknown => {
                    return Err(at("ROW_NUMBER is compared with something else than 1").help(DEDUPLICATION));
                }
            },
            _ => return Err(at("ROW_NUMBER is compared more than once").help(DEDUPLICATION)),
        }
        let rel = self.plan(&window.input)?;
        if rel.changelog.is_some() {
            return Err(at("deduplication of a query that updates its rows is not supported")
                .help("deduplicate the rows of a table first"));
        }
        let rel = self.aligned(rel, window.input.schema())?;
        let (keys, time, keep) = self.order_of(&rel, params, location)?;
        let rest = conjunction(rest.into_iter().cloned());
        let rel = self.kept(rel, keys, time, keep);
        self.row_numbers.insert(number, location);
        match rest {
            Some(predicate) => self.filter(rel, &predicate),
            None => Ok(rel),
        }
    }

    /// The columns of the key and of time, and which of a key's rows to keep.
    fn order_of(
        &self,
        rel: &Rel,
        params: &WindowFunctionParams,
        location: Location,
    ) -> Result<(Vec<usize>, usize, Keep), SqlError> {
        let at = |message: String| SqlError::at(location, message);
        let mut keys = Vec::with_capacity(params.partition_by.len());
        for expr in &params.partition_by {
            let Some(key) = as_column(expr).and_then(|c| rel.find(c)) else {
                return Err(at("PARTITION BY of an expression is not supported".to_owned())
                    .help("name its value in the inner query, and PARTITION BY that column"));
            };
            let (_, field) = &rel.fields[key];
            check_key(field.name(), field.data_type()).map_err(|e| at(e.to_string()))?;
            if WINDOW_ROLES.contains(&rel.roles[key]) {
                return Err(at("deduplication within windows is not supported".to_owned())
                    .help("deduplicate the rows of a table, by columns of its own"));
            }
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let [Sort { expr, asc, .. }] = params.order_by.as_slice() else {
            return Err(at("ROW_NUMBER by more than one column is not supported".to_owned()).help(DEDUPLICATION));
        };
        let time = as_column(expr).and_then(|c| rel.find(c));
        let Some(time) = time.filter(|t| matches!(rel.roles[*t], Role::Time | Role::WindowTime)) else {
            let name = as_column(expr).map_or_else(|| "an expression".to_owned(), |c| format!("'{}'", c.name));
            return Err(at(format!("ROW_NUMBER needs event time to order by: {name} is not")).help(
                "declare WATERMARK FOR the column in its table, pass it on as it is, and write ORDER BY column or ORDER BY column DESC",
            ));
        };
        Ok((keys, time, if *asc { Keep::First } else { Keep::Last }))
    }

    fn kept(&mut self, mut rel: Rel, keys: Vec<usize>, time: usize, keep: Keep) -> Rel {
        let name = |c: &usize| rel.fields[*c].1.name().as_str();
        let label = format!("by [{}]: {keep} by {}", keys.iter().map(name).collect::<Vec<_>>().join(", "), name(&time));
        let identity = format!("{keys:?} {keep} {time}");
        let operator = Deduplicate { input: rel.schema(), keys: keys.clone(), time, keep, emit_before: false };
        let local = self.ops.add(
            &self.target,
            "local deduplicate",
            (&identity, format!("local deduplicate {label}")),
            vec![Input::forward(&rel.from)],
            None,
            Made::By(NodeKind::Operator(Arc::new(LocalDeduplicate(operator.clone())))),
        );
        let state_schema = Some(operator.state_schema());
        let id = self.ops.add(
            &self.target,
            "deduplicate",
            (&identity, format!("deduplicate {label}")),
            vec![Input::hash(&[local], keys.clone())],
            state_schema,
            Made::updating(move |emit_before| Deduplicate { emit_before, ..operator }),
        );
        rel.from = vec![id];
        rel.changelog = Some(Changelog { key: Some(keys), origins: vec![id] });
        rel.windows = None;
        rel.roles.fill(Role::Plain);
        rel
    }

    /// A row number that told which rows to keep is no column.
    pub(super) fn check_row_numbers(&self, expr: &Expr) -> Result<(), SqlError> {
        match expr.column_refs().into_iter().find_map(|c| self.row_numbers.get(&c.name)) {
            None => Ok(()),
            Some(location) => {
                Err(SqlError::at(*location, "the row number itself can't be selected: of the rows kept it is 1")
                    .help("name the columns that you want instead of *"))
            }
        }
    }
}

/// The rows that a plan numbers. It may then leave columns out: rows here may have more than are asked for.
pub(super) fn numbered(plan: &LogicalPlan) -> Option<&Window> {
    match plan {
        LogicalPlan::Window(window) => Some(window),
        LogicalPlan::Projection(projection) if projection.expr.iter().all(|e| matches!(e, Expr::Column(_))) => {
            numbered(&projection.input)
        }
        _ => None,
    }
}

/// The one row number of a plan node: the column's name, what it is of, and where it stands.
fn row_number_of(window: &Window) -> Option<(String, &WindowFunctionParams, Location)> {
    let [expr] = window.window_expr.as_slice() else { return None };
    let Expr::WindowFunction(function) = bare(expr) else { return None };
    let (_, field) = window.schema.qualified_field(window.schema.fields().len().checked_sub(1)?);
    Some((field.name().clone(), &function.params, row_number::location(&function.fun)?))
}

fn read(condition: &Expr, number: &str) -> Condition {
    let Expr::BinaryExpr(BinaryExpr { left, op, right }) = condition else { return Condition::Unknown };
    let is_number = |e: &Expr| matches!(e, Expr::Column(Column { name, .. }) if name == number);
    let (op, value) = match (is_number(left), is_number(right), op.swap()) {
        (true, false, _) => (*op, &**right),
        (false, true, Some(op)) => (op, &**left),
        _ => return Condition::Unknown,
    };
    match op {
        Operator::Eq | Operator::LtEq if *value == lit(1_i64) => Condition::First,
        Operator::Lt if *value == lit(2_i64) => Condition::First,
        Operator::Eq | Operator::LtEq | Operator::Lt | Operator::Gt | Operator::GtEq | Operator::NotEq
            if matches!(value, Expr::Literal(..)) =>
        {
            Condition::Others
        }
        _ => Condition::Unknown,
    }
}
