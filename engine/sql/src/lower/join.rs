//! Joins of two windowed streams on the same window.

use std::sync::Arc;

use arrow::datatypes::Field;
use datafusion_common::Column;
use datafusion_expr::{Expr, Join, JoinType};
use datafusion_physical_expr::expressions;
use floodmark_dataflow::graph::NodeKind;

use super::{Input, Lowering, Made, Rel, Role, WINDOW_ROLES, as_column};
use crate::{
    error::SqlError,
    operators::{
        calc::Calc,
        join::{JoinSide, WindowJoin},
        key::check_key,
    },
    plan::show,
};

const NEEDED: &str = "join two windowed queries on the equality of their window_start and window_end";

impl Lowering<'_> {
    pub(super) fn join(&mut self, join: &Join) -> Result<Rel, SqlError> {
        if join.join_type != JoinType::Inner {
            return Err(self.refused_join(format!("{} JOIN is not supported", join.join_type)).help(NEEDED));
        }
        let mut sides = Vec::with_capacity(2);
        for input in [&join.left, &join.right] {
            let rel = self.plan(input)?;
            if rel.changelog.is_some() {
                return Err(self
                    .refused_join("a JOIN with a query that updates its rows is not supported")
                    .help(NEEDED));
            }
            sides.push(self.materialised(rel)?);
        }
        let (Some(right), Some(left)) = (sides.pop(), sides.pop()) else {
            return Err(self.refused("a join of one input"));
        };
        let size = match (left.windows, right.windows) {
            (Some(a), Some(b)) if a == b && same_window(&left, &right, join) => a,
            _ => {
                return Err(self
                    .refused_join("a JOIN of streams that are not joined on their windows is not supported")
                    .help(NEEDED));
            }
        };
        let (lefts, rights): (Vec<Expr>, Vec<Expr>) = join.on.iter().cloned().unzip();
        let (left, left_side) = self.side(left, &lefts, size)?;
        let (right, right_side) = self.side(right, &rights, size)?;
        let mut rel = Rel {
            from: Vec::new(),
            fields: left.fields.iter().chain(&right.fields).cloned().collect(),
            roles: left.roles.iter().chain(&right.roles).copied().collect(),
            changelog: None,
            pending: None,
            windows: Some(size),
        };
        let residual = join.filter.as_ref().map(|filter| self.physical(&rel, filter)).transpose()?;
        let on: Vec<String> = join
            .on
            .iter()
            .map(|(a, b)| format!("{} = {}", show(a), show(b)))
            .chain(join.filter.iter().map(show))
            .collect();
        let inputs =
            vec![Input::hash(&left.from, left_side.keys.clone()), Input::hash(&right.from, right_side.keys.clone())];
        let identity = format!("{:?}", residual.as_ref().map(ToString::to_string));
        let operator = WindowJoin { sides: [left_side, right_side], residual, schema: rel.schema() };
        let id = self.ops.add(
            &self.target,
            "window join",
            (&identity, format!("window join on {}", on.join(", "))),
            inputs,
            Some(operator.state_schema().as_str().into()),
            Made::By(NodeKind::Operator(Arc::new(operator))),
        );
        rel.from = vec![id];
        Ok(rel)
    }

    fn refused_join(&self, what: impl Into<String>) -> SqlError {
        SqlError::at(self.join, what)
    }

    /// One input: with a column for each key and for the window's end.
    fn side(&mut self, rel: Rel, keys: &[Expr], size: i64) -> Result<(Rel, JoinSide), SqlError> {
        let end = self.window_end(&rel, size)?;
        let found = |expr: &Expr| as_column(expr).and_then(|c| rel.find(c));
        let wanted: Vec<&Expr> = keys.iter().chain([&end]).collect();
        let mut positions = Vec::with_capacity(wanted.len());
        let mut added = Vec::new();
        for expr in &wanted {
            positions.push(found(expr).unwrap_or_else(|| {
                added.push((*expr).clone());
                rel.fields.len() + added.len() - 1
            }));
        }
        let rel = if added.is_empty() { rel } else { self.with_columns(rel, &added)? };
        let window_end = positions.pop().unwrap_or_default();
        for key in &positions {
            let (_, field) = &rel.fields[*key];
            check_key(field.name(), field.data_type()).map_err(|e| self.refused(e.to_string()))?;
        }
        let side = JoinSide { schema: rel.schema(), keys: positions, window_end };
        Ok((rel, side))
    }

    /// The stream with more columns behind its own.
    fn with_columns(&mut self, mut rel: Rel, added: &[Expr]) -> Result<Rel, SqlError> {
        let input = rel.schema();
        let mut values: Vec<Arc<dyn datafusion_physical_expr::PhysicalExpr>> = input
            .fields()
            .iter()
            .enumerate()
            .map(|(i, f)| Arc::new(expressions::Column::new(f.name(), i)) as _)
            .collect();
        for (i, expr) in added.iter().enumerate() {
            let value = self.physical(&rel, expr)?;
            let data_type = value.data_type(&input).map_err(|e| self.failed(&e))?;
            values.push(value);
            rel.fields.push((None, Arc::new(Field::new(format!("$key{i}"), data_type, true))));
            rel.roles.push(Role::Plain);
        }
        let shown: Vec<String> = values.iter().map(ToString::to_string).collect();
        let calc = Calc::project(None, values, rel.schema()).map_err(|e| self.refused(e.to_string()))?;
        let id = self.ops.add(
            &self.target,
            "project",
            (&format!("{shown:?}"), format!("project {}", shown.join(", "))),
            vec![Input::forward(&rel.from)],
            None,
            Made::By(NodeKind::Operator(Arc::new(calc))),
        );
        rel.from = vec![id];
        Ok(rel)
    }
}

/// Whether the join's equalities say that both rows are of the same window.
fn same_window(left: &Rel, right: &Rel, join: &Join) -> bool {
    let role = |rel: &Rel, expr: &Expr| {
        let column: Option<&Column> = as_column(expr);
        column.and_then(|c| rel.find(c)).map(|c| rel.roles[c])
    };
    join.on.iter().any(|(a, b)| {
        let (a, b) = (role(left, a), role(right, b));
        a == b && a.is_some_and(|r| WINDOW_ROLES.contains(&r))
    })
}
