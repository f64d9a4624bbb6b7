//! Aggregates: windowed by a table function, windowed by windows that rows carry already, or a changelog.

use std::sync::Arc;

use arrow::datatypes::{Field, FieldRef};
use datafusion_common::ScalarValue;
use datafusion_expr::{
    Aggregate, Expr, execution_props::ExecutionProps, physical_planning_context::PhysicalPlanningContext,
};
use datafusion_physical_expr::{PhysicalExpr, aggregate::LoweredAggregateBuilder};
use floodmark_dataflow::graph::NodeKind;

use super::{Changelog, Input, Lowering, Made, Rel, Role, WINDOW_ROLES, as_column};
use crate::{
    error::SqlError,
    operators::{
        aggregate::Call,
        group::GroupAggregate,
        key::check_key,
        local::{LocalAggregate, Sliced},
        partial::{Grouping, time_type},
        window::{OutputColumn, Slicing, WindowAggregate},
    },
    plan::show,
};

/// A `GROUP BY` column: one of the window, or a key.
enum Grouped {
    Window(Role),
    Key(Arc<dyn PhysicalExpr>, FieldRef),
}

impl Lowering<'_> {
    pub(super) fn aggregate(&mut self, rel: Rel, aggregate: &Aggregate) -> Result<Rel, SqlError> {
        if rel.changelog.is_some() {
            return Err(self
                .refused("an aggregate (GROUP BY or DISTINCT) over a query that updates its rows is not supported")
                .help("aggregate windows instead, or write the inner result to a table of its own"));
        }
        let by_window = |rel: &Rel, expr: &Expr| {
            let column = as_column(expr)?;
            let role = rel.find_pending(column).or_else(|| rel.find(column).map(|c| rel.roles[c]))?;
            WINDOW_ROLES.contains(&role).then_some(role)
        };
        let windowed = aggregate.group_expr.iter().any(|e| by_window(&rel, e).is_some());
        let reads = |e: &Expr| rel.reads_pending(e) && by_window(&rel, e).is_none();
        let all = || aggregate.group_expr.iter().chain(&aggregate.aggr_expr);
        let rel = if rel.pending.is_some() && (!windowed || all().any(reads)) { self.materialised(rel)? } else { rel };
        let mut grouped = Vec::new();
        for (expr, field) in aggregate.group_expr.iter().zip(aggregate.schema.fields()) {
            grouped.push(match by_window(&rel, expr).filter(|_| rel.pending.is_some() || rel.windows.is_some()) {
                Some(role) => Grouped::Window(role),
                None => {
                    let value = self.physical(&rel, expr)?;
                    let data_type = value.data_type(&rel.schema()).map_err(|e| self.failed(&e))?;
                    check_key(field.name(), &data_type).map_err(|e| self.refused(e.to_string()))?;
                    Grouped::Key(value, Arc::new(Field::new(field.name(), data_type, true)))
                }
            });
        }
        let slicing = if grouped.iter().any(|g| matches!(g, Grouped::Window(_))) { self.slicing(&rel)? } else { None };
        let calls = aggregate.aggr_expr.iter().map(|e| self.call(&rel, e)).collect::<Result<Vec<_>, _>>()?;
        let keys: Vec<(Arc<dyn PhysicalExpr>, FieldRef)> = grouped
            .iter()
            .filter_map(|g| match g {
                Grouped::Key(value, field) => Some((value.clone(), field.clone())),
                Grouped::Window(_) => None,
            })
            .collect();
        let grouping =
            Grouping { keys: keys.iter().map(|(_, f)| f.clone()).collect(), calls, windowed: slicing.is_some() };
        let shown: Vec<String> = aggregate.aggr_expr.iter().map(show).collect();
        let label = label(&rel, &grouping, slicing.as_ref(), &shown);
        let filters: Vec<_> = grouping.calls.iter().map(|c| format!("{c} {:?} {:?}", c.args, c.filter)).collect();
        let identity = format!(
            "{:?} {filters:?} {:?}",
            keys.iter().map(|(k, f)| format!("{k} as {}", f.name())).collect::<Vec<_>>(),
            slicing.as_ref().map(|(time, slicing)| format!("{time} {slicing:?}"))
        );
        let local = LocalAggregate {
            grouping: grouping.clone(),
            keys: keys.into_iter().map(|(value, _)| value).collect(),
            slicing: slicing.clone(),
        };
        let local = self.ops.add(
            &self.target,
            "local aggregate",
            (&identity, format!("local aggregate {label}")),
            vec![Input::forward(&rel.from)],
            None,
            Made::By(NodeKind::Operator(Arc::new(local))),
        );
        match slicing {
            Some((_, slicing)) => Ok(self.windowed(local, grouping, slicing, &grouped, aggregate, &label)),
            None => Ok(self.unwindowed(local, grouping, aggregate, &label)),
        }
    }

    /// Time (or window end) of a row, and how rows are sliced.
    fn slicing(&self, rel: &Rel) -> Result<Option<Sliced>, SqlError> {
        if let Some(pending) = &rel.pending {
            let (qualifier, field) = &rel.fields[pending.time];
            let column = Expr::Column(datafusion_common::Column::new(qualifier.clone(), field.name()));
            return Ok(Some((self.physical(rel, &column)?, Slicing::Windows(pending.windows))));
        }
        let Some(size) = rel.windows else { return Ok(None) };
        let end = self.window_end(rel, size)?;
        Ok(Some((self.physical(rel, &end)?, Slicing::Attached(size))))
    }

    /// The end of the window that a row carries, from whichever of its columns is there.
    pub(super) fn window_end(&self, rel: &Rel, size: i64) -> Result<Expr, SqlError> {
        let shifted = |at: usize, by: i64| {
            let (qualifier, field) = &rel.fields[at];
            let column = Expr::Column(datafusion_common::Column::new(qualifier.clone(), field.name()));
            if by == 0 { column } else { column + Expr::Literal(milliseconds(by), None) }
        };
        let at = |role: Role, by: i64| rel.with_role(role).map(|column| shifted(column, by));
        at(Role::WindowEnd, 0).or_else(|| at(Role::WindowStart, size)).or_else(|| at(Role::WindowTime, 1)).ok_or_else(
            || self.refused("the columns of the window are gone").help("select window_end in the inner query"),
        )
    }

    fn call(&self, rel: &Rel, expr: &Expr) -> Result<Call, SqlError> {
        let logical = rel.df_schema().map_err(|e| self.failed(&e))?;
        let schema = rel.schema();
        let lowered = LoweredAggregateBuilder::new(
            expr,
            &logical,
            &schema,
            &ExecutionProps::new(),
            &PhysicalPlanningContext::default(),
        )
        .build()
        .map_err(|e| self.failed(&e))?;
        Call::new(lowered.aggregate, lowered.filter, &schema).map_err(|e| self.refused(e.to_string()))
    }

    fn windowed(
        &mut self,
        local: usize,
        grouping: Grouping,
        slicing: Slicing,
        grouped: &[Grouped],
        aggregate: &Aggregate,
        label: &str,
    ) -> Rel {
        let size = match slicing {
            Slicing::Windows(windows) => windows.size,
            Slicing::Attached(size) => size,
        };
        let mut output = Vec::new();
        let mut rel = Rel {
            from: Vec::new(),
            fields: Vec::new(),
            roles: Vec::new(),
            changelog: None,
            pending: None,
            windows: Some(size),
        };
        let mut key = 0;
        let results = grouping.calls.iter().map(|c| c.field().data_type().clone()).collect::<Vec<_>>();
        for (at, (qualifier, field)) in aggregate.schema.iter().enumerate() {
            let (column, data_type, role) = match grouped.get(at) {
                Some(Grouped::Window(role)) => (role.window_column(), time_type(), *role),
                Some(Grouped::Key(_, field)) => {
                    key += 1;
                    (OutputColumn::Key(key - 1), field.data_type().clone(), Role::Plain)
                }
                None => {
                    let call = at - grouped.len();
                    (OutputColumn::Call(call), results[call].clone(), Role::Plain)
                }
            };
            output.push(column);
            rel.roles.push(role);
            rel.fields.push((qualifier.cloned(), Arc::new(Field::new(field.name(), data_type, true))));
        }
        let keys = grouping.key_columns();
        let state_schema = Some(grouping.state_schema(&format!("partial aggregates of {slicing:?}")));
        let identity = format!("{output:?}");
        let operator = WindowAggregate { grouping, slicing, output, schema: rel.schema() };
        let id = self.ops.add(
            &self.target,
            "window aggregate",
            (&identity, format!("window aggregate {label}")),
            vec![Input::hash(&[local], keys)],
            state_schema,
            Made::By(NodeKind::Operator(Arc::new(operator))),
        );
        rel.from = vec![id];
        rel
    }

    fn unwindowed(&mut self, local: usize, grouping: Grouping, aggregate: &Aggregate, label: &str) -> Rel {
        let types = grouping
            .keys
            .iter()
            .map(|k| k.data_type().clone())
            .chain(grouping.calls.iter().map(|c| c.field().data_type().clone()));
        let fields: Vec<_> = aggregate
            .schema
            .iter()
            .zip(types)
            .map(|((qualifier, field), t)| (qualifier.cloned(), Arc::new(Field::new(field.name(), t, true))))
            .collect();
        // Without aggregates (SELECT DISTINCT) a row never changes.
        let changelog = (!grouping.calls.is_empty())
            .then(|| Changelog { key: Some((0..grouping.keys.len()).collect()), origins: Vec::new() });
        let roles = vec![Role::Plain; fields.len()];
        let mut rel = Rel { from: Vec::new(), fields, roles, changelog, pending: None, windows: None };
        let keys = grouping.key_columns();
        let state_schema = Some(grouping.state_schema("partial aggregates"));
        let schema = rel.schema();
        let id = self.ops.add(
            &self.target,
            "group aggregate",
            ("", format!("group aggregate {label}")),
            vec![Input::hash(&[local], keys)],
            state_schema,
            Made::updating(move |emit_before| GroupAggregate { grouping, schema, emit_before }),
        );
        rel.from = vec![id];
        if let Some(changelog) = &mut rel.changelog {
            changelog.origins = vec![id];
        }
        rel
    }
}

fn label(rel: &Rel, grouping: &Grouping, slicing: Option<&Sliced>, calls: &[String]) -> String {
    let window = match (slicing, &rel.pending) {
        (None, _) => String::new(),
        (Some(_), Some(pending)) => format!("{} ", pending.label),
        (Some(_), None) => "of the same window ".to_owned(),
    };
    let keys: Vec<&str> = grouping.keys.iter().map(|k| k.name().as_str()).collect();
    format!("{window}by [{}]: {}", keys.join(", "), calls.join(", "))
}

fn milliseconds(ms: i64) -> ScalarValue {
    ScalarValue::new_interval_mdn(0, 0, ms.saturating_mul(1_000_000))
}
