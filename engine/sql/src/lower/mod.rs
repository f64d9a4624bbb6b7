//! From optimised logical plans to a job's graph.
//!
//! A [`Rel`] is a stream as the plan has it at one point: which operators bring it, its columns, and what streaming needs
//! to know of them: which are event time or a window's bounds, whether rows are updates, by what key. Columns are found by
//! qualified name, so a stream may carry more of them than the plan asks for; where positions count (a union, a sink) it is
//! projected first.

use std::{collections::BTreeMap, sync::Arc};

use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use datafusion_common::{Column, DFSchema, DFSchemaRef, DataFusionError, TableReference};
use datafusion_expr::{
    Expr, LogicalPlan, execution_props::ExecutionProps, physical_planning_context::PhysicalPlanningContext,
};
use datafusion_physical_expr::{PhysicalExpr, create_physical_expr, expressions};
use floodmark_dataflow::{
    JobGraph, ROW_KIND,
    connector::{Location, PlanContext, SinkInput, TableError},
    graph::NodeKind,
};

use self::graph::{Input, Made, Op, OpId, Ops};
use crate::{
    error::SqlError,
    operators::{
        assign::WindowAssign,
        calc::Calc,
        partial::time_type,
        required::Required,
        window::{OutputColumn, Windows},
    },
    plan::{
        Planned, StreamTable, Table,
        needs::{self, Needs},
        show,
        window::{WINDOW_COLUMNS, WindowNode},
    },
};

mod aggregate;
mod dedup;
mod graph;
mod join;
mod source;

/// What streaming knows of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Plain,
    /// Event time, which watermarks follow.
    Time,
    WindowStart,
    WindowEnd,
    /// The last millisecond of a window: event time of the rows that it yields.
    WindowTime,
}

impl Role {
    /// The window's column of that role.
    fn window_column(self) -> OutputColumn {
        match self {
            Self::WindowStart => OutputColumn::WindowStart,
            Self::WindowTime => OutputColumn::WindowTime,
            Self::WindowEnd | Self::Plain | Self::Time => OutputColumn::WindowEnd,
        }
    }
}

const WINDOW_ROLES: [Role; 3] = [Role::WindowStart, Role::WindowEnd, Role::WindowTime];

type Qualified = (Option<TableReference>, FieldRef);

/// Windows that a table function has named, but no row carries yet.
#[derive(Clone)]
struct Pending {
    /// The time column.
    time: usize,
    windows: Windows,
    label: String,
    /// The window columns by the names that they go by.
    columns: Vec<(Option<TableReference>, String, Role)>,
}

/// A stream at one point of a plan. See the header of this file.
#[derive(Clone)]
struct Rel {
    from: Vec<OpId>,
    fields: Vec<Qualified>,
    roles: Vec<Role>,
    /// Rows are updates.
    changelog: Option<Changelog>,
    pending: Option<Pending>,
    /// Rows carry windows of this size, milliseconds.
    windows: Option<i64>,
}

#[derive(Clone)]
struct Changelog {
    /// The columns by which rows replace each other; `None` once one of them is gone.
    key: Option<Vec<usize>>,
    /// The operators that the updates come from.
    origins: Vec<OpId>,
}

impl Rel {
    /// The rows' schema, the row kind last if there is one.
    fn schema(&self) -> SchemaRef {
        let kind = self.changelog.is_some().then(|| Arc::new(Field::new(ROW_KIND, DataType::Int8, false)));
        Arc::new(Schema::new(self.fields.iter().map(|(_, f)| f.clone()).chain(kind).collect::<Vec<_>>()))
    }

    fn df_schema(&self) -> Result<DFSchema, DataFusionError> {
        DFSchema::new_with_metadata(self.fields.clone(), Default::default())
    }

    /// The position of a column.
    fn find(&self, column: &Column) -> Option<usize> {
        let named = |(qualifier, field): &Qualified| {
            *field.name() == column.name && (column.relation.is_none() || column.relation == *qualifier)
        };
        self.fields.iter().position(named)
    }

    /// The role of a column that only a table function has named.
    fn find_pending(&self, column: &Column) -> Option<Role> {
        let named = |(qualifier, name, _): &&(Option<TableReference>, String, Role)| {
            *name == column.name && (column.relation.is_none() || column.relation == *qualifier)
        };
        self.pending.as_ref()?.columns.iter().find(named).map(|(_, _, role)| *role)
    }

    /// Whether an expression reads a column that only a table function has named.
    fn reads_pending(&self, expr: &Expr) -> bool {
        self.pending.is_some() && expr.column_refs().into_iter().any(|c| self.find_pending(c).is_some())
    }

    fn with_role(&self, role: Role) -> Option<usize> {
        self.roles.iter().position(|r| *r == role)
    }
}

/// Takes aliases off.
fn bare(expr: &Expr) -> &Expr {
    match expr {
        Expr::Alias(alias) => bare(&alias.expr),
        other => other,
    }
}

fn as_column(expr: &Expr) -> Option<&Column> {
    match bare(expr) {
        Expr::Column(column) => Some(column),
        _ => None,
    }
}

/// An expression over rows of a schema, ready to be evaluated.
fn physical(expr: &Expr, schema: &DFSchema) -> Result<Arc<dyn PhysicalExpr>, DataFusionError> {
    create_physical_expr(expr, schema, &ExecutionProps::new(), &PhysicalPlanningContext::default())
}

/// Lowers the inserts of a job.
pub(crate) fn lower(inserts: &[Planned], context: &PlanContext) -> Result<JobGraph, SqlError> {
    let mut needs = BTreeMap::new();
    inserts.iter().for_each(|insert| needs::of_plan(&insert.plan, &mut needs));
    let timed = inserts.iter().any(|insert| has_windows(&insert.plan));
    let mut lowering = Lowering {
        ops: Ops::default(),
        sources: BTreeMap::new(),
        needs,
        timed,
        context,
        target: String::new(),
        location: Location::default(),
        join: Location::default(),
        row_numbers: BTreeMap::new(),
    };
    // All inserts into a table are one sink: two of them would write under one identity, and fence each other off.
    let mut sinks: Vec<Written> = Vec::new();
    for insert in inserts {
        lowering.target.clone_from(&insert.table.def.name);
        lowering.location = insert.location;
        lowering.join = insert.join;
        let rel = lowering.plan(&insert.plan)?;
        let rel = lowering.aligned(rel, insert.plan.schema())?;
        match sinks.iter_mut().find(|w| w.table.def.name == insert.table.def.name) {
            Some(written) => written.inputs.push((rel, insert.location)),
            None => sinks.push(Written { table: insert.table.clone(), inputs: vec![(rel, insert.location)] }),
        }
    }
    for Written { table, inputs } in sinks {
        lowering.sink(&table, inputs)?;
    }
    Ok(lowering.ops.into_graph())
}

/// A table that is written to, with the streams and the statements that write it.
struct Written {
    table: Arc<Table>,
    inputs: Vec<(Rel, Location)>,
}

fn has_windows(plan: &LogicalPlan) -> bool {
    matches!(plan, LogicalPlan::Extension(_)) || plan.inputs().into_iter().any(has_windows)
}

struct Lowering<'a> {
    ops: Ops,
    /// One source per table, whoever reads it.
    sources: BTreeMap<String, Rel>,
    needs: BTreeMap<String, Needs>,
    /// Whether anything waits for event time.
    timed: bool,
    context: &'a PlanContext,
    /// Table of the present insert.
    target: String,
    /// Where it stands.
    location: Location,
    /// Where its first join stands.
    join: Location,
    /// Row numbers that told which rows to keep, and are no columns: by name, where they stand.
    row_numbers: BTreeMap<String, Location>,
}

impl Lowering<'_> {
    fn refused(&self, what: impl Into<String>) -> SqlError {
        SqlError::at(self.location, what)
    }

    fn failed(&self, error: &DataFusionError) -> SqlError {
        SqlError::of_planner(error).or_at(self.location)
    }

    fn table_error(&self, error: TableError, table: &Table) -> SqlError {
        SqlError::at(error.location.unwrap_or(table.location), format!("table '{}': {}", table.def.name, error.message))
    }

    fn physical(&self, rel: &Rel, expr: &Expr) -> Result<Arc<dyn PhysicalExpr>, SqlError> {
        self.check_row_numbers(expr)?;
        rel.df_schema().and_then(|schema| physical(expr, &schema)).map_err(|e| self.failed(&e))
    }

    fn sink(&mut self, table: &Table, rels: Vec<(Rel, Location)>) -> Result<(), SqlError> {
        let columns: Vec<&str> = table.def.schema.fields().iter().map(|f| f.name().as_str()).collect();
        let primary_key: Vec<usize> =
            table.def.primary_key.iter().filter_map(|k| columns.iter().position(|c| c == k)).collect();
        let several = rels.len() > 1;
        let mut from = Vec::new();
        let mut input: Option<SinkInput> = None;
        for (rel, location) in rels {
            self.location = location;
            if let Some(changelog) = &rel.changelog {
                if several {
                    return Err(self
                        .refused(format!(
                            "the query updates rows of table '{}', which other inserts write too",
                            table.def.name
                        ))
                        .help("give each updating query a table of its own"));
                }
                self.check_key(table, &columns, &primary_key, changelog)?;
                if primary_key.is_empty() {
                    self.ops.need_before(&changelog.origins);
                }
            }
            input = Some(SinkInput { schema: rel.schema(), changelog: rel.changelog.is_some() });
            from.extend(rel.from);
        }
        let Some(input) = input else { return Ok(()) };
        let required = Required::of(&table.def);
        if !required.is_empty() {
            let description = format!("check that {} have values", required.names());
            let made = Made::By(NodeKind::Operator(Arc::new(required)));
            from = vec![self.ops.add(
                &table.def.name,
                "not-null check",
                ("", description),
                vec![Input::forward(&from)],
                None,
                made,
            )];
        }
        // Rows of one key go through one subtask, so that the last one wins for good. Updates come by their key already.
        let exchange = if input.changelog || primary_key.is_empty() {
            Input::forward(&from)
        } else {
            Input::hash(&from, primary_key)
        };
        let sink = table.connector.sink(&table.def, &input, self.context).map_err(|mut e| {
            // What is wrong with the rows is the query's fault.
            e.location = e.location.or(input.changelog.then_some(self.location));
            self.table_error(e, table)
        })?;
        let kind = sink.kind();
        let updates = if input.changelog { " (updates)" } else { "" };
        self.ops.push(Op {
            uid: format!("sink:{}", table.def.name),
            description: format!("{kind} {}({}){updates}", table.def.name, columns.join(", ")),
            kind,
            state_schema: None,
            made: Made::By(NodeKind::Sink(sink)),
            inputs: vec![exchange],
        });
        Ok(())
    }

    /// An updating query needs a sink that is keyed as its rows are.
    fn check_key(
        &self,
        table: &Table,
        columns: &[&str],
        primary_key: &[usize],
        changelog: &Changelog,
    ) -> Result<(), SqlError> {
        if primary_key.is_empty() {
            return Ok(()); // the connector decides
        }
        let name = &table.def.name;
        let list = |key: &[usize]| key.iter().map(|c| columns[*c]).collect::<Vec<_>>().join(", ");
        let Some(key) = &changelog.key else {
            return Err(self
                .refused(format!("the query updates rows, but not all of their key goes into table '{name}'"))
                .help("insert all columns of the GROUP BY (or PARTITION BY), and make them the PRIMARY KEY"));
        };
        if key.is_empty() {
            return Err(self
                .refused(format!("the query updates its one row, but table '{name}' has a primary key"))
                .help("group by a column and make it the PRIMARY KEY, or leave the key out"));
        }
        let sorted = |key: &[usize]| {
            let mut key = key.to_vec();
            key.sort_unstable();
            key
        };
        if sorted(key) != sorted(primary_key) {
            return Err(self
                .refused(format!(
                    "the query updates rows by ({}), but the primary key of table '{name}' is ({})",
                    list(key),
                    list(primary_key)
                ))
                .help(format!("declare PRIMARY KEY ({}) NOT ENFORCED", list(key))));
        }
        Ok(())
    }

    fn plan(&mut self, plan: &LogicalPlan) -> Result<Rel, SqlError> {
        match plan {
            LogicalPlan::TableScan(scan) => match scan.source.downcast_ref::<StreamTable>() {
                Some(StreamTable(table)) => {
                    let mut rel = self.source(table)?;
                    for (qualifier, _) in &mut rel.fields {
                        *qualifier = Some(scan.table_name.clone());
                    }
                    Ok(rel)
                }
                None => Err(self.refused(format!("'{}' is no table", scan.table_name))),
            },
            LogicalPlan::SubqueryAlias(alias) => {
                let mut rel = self.plan(&alias.input)?;
                for (qualifier, _) in &mut rel.fields {
                    *qualifier = Some(alias.alias.clone());
                }
                for (qualifier, _, _) in rel.pending.iter_mut().flat_map(|p| &mut p.columns) {
                    *qualifier = Some(alias.alias.clone());
                }
                Ok(rel)
            }
            LogicalPlan::Window(window) => self.deduplicated(window, None),
            LogicalPlan::Filter(filter) => match dedup::numbered(&filter.input) {
                Some(window) => self.deduplicated(window, Some(&filter.predicate)),
                None => {
                    let rel = self.plan(&filter.input)?;
                    self.filter(rel, &filter.predicate)
                }
            },
            LogicalPlan::Projection(projection) => {
                let (input, predicate) = match &*projection.input {
                    LogicalPlan::Filter(filter) if dedup::numbered(&filter.input).is_none() => {
                        (&filter.input, Some(&filter.predicate))
                    }
                    _ => (&projection.input, None),
                };
                let rel = self.plan(input)?;
                self.project(rel, predicate, &projection.expr, &projection.schema)
            }
            LogicalPlan::Aggregate(aggregate) => {
                let rel = self.plan(&aggregate.input)?;
                self.aggregate(rel, aggregate)
            }
            LogicalPlan::Join(join) => self.join(join),
            LogicalPlan::Union(union) => {
                let mut all: Option<Rel> = None;
                for input in &union.inputs {
                    let rel = self.plan(input)?;
                    if rel.changelog.is_some() {
                        return Err(self.refused("UNION ALL of a query that updates its rows is not supported"));
                    }
                    let rel = self.aligned(rel, input.schema())?;
                    match &mut all {
                        None => all = Some(rel),
                        Some(all) => {
                            all.from.extend(rel.from);
                            let same =
                                all.roles.iter().zip(&rel.roles).map(|(a, b)| if a == b { *a } else { Role::Plain });
                            all.roles = same.collect();
                            all.windows = all.windows.filter(|w| rel.windows == Some(*w));
                        }
                    }
                }
                let mut all = all.ok_or_else(|| self.refused("an empty union"))?;
                for (field, (qualifier, named)) in all.fields.iter_mut().zip(union.schema.iter()) {
                    *field = (qualifier.cloned(), Arc::new(field.1.as_ref().clone().with_name(named.name())));
                }
                Ok(all)
            }
            LogicalPlan::Extension(extension) => match extension.node.as_any().downcast_ref::<WindowNode>() {
                Some(node) => self.window(node),
                None => Err(self.refused(format!("{} is not supported", extension.node.name()))),
            },
            other => {
                let text = other.display().to_string();
                let what = text.split([':', ' ']).next().unwrap_or("this query").to_owned();
                Err(self.refused(format!("{what} is not supported in a streaming query")))
            }
        }
    }

    fn window(&mut self, node: &WindowNode) -> Result<Rel, SqlError> {
        let mut rel = self.plan(&node.input)?;
        let at = |message: String| SqlError::at(node.location, message);
        if rel.changelog.is_some() {
            return Err(at("windows of a query that updates its rows are not supported".to_owned()));
        }
        rel = self.materialised(rel)?;
        let time = rel.find(&node.time).ok_or_else(|| at(format!("unknown column '{}'", node.time.name)))?;
        if !matches!(rel.roles[time], Role::Time | Role::WindowTime) {
            let name = &node.time.name;
            return Err(at(format!("windows need event time: nothing tells how late '{name}' can be"))
                .help(format!("declare WATERMARK FOR `{name}` AS `{name}` - INTERVAL '5' SECOND in its table, and pass the column on as it is")));
        }
        let columns =
            WINDOW_COLUMNS.iter().zip(WINDOW_ROLES).map(|(name, role)| (None, (*name).to_owned(), role)).collect();
        rel.pending = Some(Pending { time, windows: node.windows, label: node.label.clone(), columns });
        Ok(rel)
    }

    /// Makes rows carry the windows that a table function has named.
    fn materialised(&mut self, mut rel: Rel) -> Result<Rel, SqlError> {
        let Some(Pending { time, windows, label, columns }) = rel.pending.take() else { return Ok(rel) };
        let mut added = Vec::with_capacity(columns.len());
        for (qualifier, name, role) in columns {
            rel.fields.push((qualifier, Arc::new(Field::new(name, time_type(), true))));
            rel.roles.push(role);
            added.push(role.window_column());
        }
        rel.windows = Some(windows.size);
        let assign = WindowAssign { time, windows, columns: added, schema: rel.schema() };
        let identity = format!("{windows:?} by {time}: {:?}", assign.columns);
        let id = self.ops.add(
            &self.target,
            "window assigner",
            (&identity, format!("window assigner {label}")),
            vec![Input::forward(&rel.from)],
            None,
            Made::By(NodeKind::Operator(Arc::new(assign))),
        );
        rel.from = vec![id];
        Ok(rel)
    }

    fn filter(&mut self, rel: Rel, predicate: &Expr) -> Result<Rel, SqlError> {
        let mut rel = if rel.reads_pending(predicate) { self.materialised(rel)? } else { rel };
        let physical = self.physical(&rel, predicate)?;
        if let Some(changelog) = &rel.changelog {
            self.ops.need_before(&changelog.origins);
        }
        let id = self.ops.add(
            &self.target,
            "filter",
            (&physical.to_string(), format!("filter {}", show(predicate))),
            vec![Input::forward(&rel.from)],
            None,
            Made::By(NodeKind::Operator(Arc::new(Calc::filter(physical, rel.schema())))),
        );
        rel.from = vec![id];
        Ok(rel)
    }

    fn project(
        &mut self,
        mut rel: Rel,
        predicate: Option<&Expr>,
        exprs: &[Expr],
        schema: &DFSchemaRef,
    ) -> Result<Rel, SqlError> {
        let carried = |expr: &Expr| as_column(expr).is_some_and(|c| rel.find_pending(c).is_some());
        if predicate.is_some_and(|p| rel.reads_pending(p)) || exprs.iter().any(|e| rel.reads_pending(e) && !carried(e))
        {
            rel = self.materialised(rel)?;
        }
        let mut projected = Rel {
            from: rel.from.clone(),
            fields: Vec::new(),
            roles: Vec::new(),
            changelog: None,
            pending: None,
            windows: rel.windows,
        };
        let mut physical = Vec::new();
        let mut pending = Vec::new();
        // Where each column of the input is now.
        let mut moved: BTreeMap<usize, usize> = BTreeMap::new();
        let input = rel.schema();
        for (expr, (qualifier, field)) in exprs.iter().zip(schema.iter()) {
            let column = as_column(expr);
            if let Some(role) = column.and_then(|c| rel.find_pending(c)) {
                pending.push((qualifier.cloned(), field.name().clone(), role));
                continue;
            }
            let value = self.physical(&rel, expr)?;
            let data_type = value.data_type(&input).map_err(|e| self.failed(&e))?;
            let from = column.and_then(|c| rel.find(c));
            if let Some(from) = from {
                moved.entry(from).or_insert(physical.len());
            }
            projected.roles.push(from.map_or(Role::Plain, |f| rel.roles[f]));
            projected.fields.push((qualifier.cloned(), Arc::new(Field::new(field.name(), data_type, true))));
            physical.push(value);
        }
        if let Some(mut waiting) = rel.pending.clone() {
            // The time goes along, whether asked for or not.
            waiting.time = *moved.entry(waiting.time).or_insert_with(|| {
                let (qualifier, field) = &rel.fields[waiting.time];
                let hidden = if projected.fields.iter().any(|(_, f)| f.name() == field.name()) {
                    (None, Arc::new(field.as_ref().clone().with_name(format!("$time:{}", field.name()))))
                } else {
                    (qualifier.clone(), field.clone())
                };
                projected.fields.push(hidden);
                projected.roles.push(rel.roles[waiting.time]);
                physical.push(Arc::new(expressions::Column::new(field.name(), waiting.time)));
                physical.len() - 1
            });
            waiting.columns = pending;
            projected.pending = Some(waiting);
        }
        if let Some(changelog) = &rel.changelog {
            let key = changelog.key.as_ref().and_then(|k| k.iter().map(|c| moved.get(c).copied()).collect());
            projected.changelog = Some(Changelog { key, origins: changelog.origins.clone() });
            physical.push(Arc::new(expressions::Column::new(ROW_KIND, rel.fields.len())));
            if predicate.is_some() {
                self.ops.need_before(&changelog.origins);
            }
        }
        let filter = predicate.map(|p| self.physical(&rel, p)).transpose()?;
        let shown: Vec<String> = exprs.iter().map(show).collect();
        let description = match predicate {
            None => format!("project {}", shown.join(", ")),
            Some(predicate) => format!("filter {}, project {}", show(predicate), shown.join(", ")),
        };
        let names: Vec<&str> = projected.fields.iter().map(|(_, f)| f.name().as_str()).collect();
        let values: Vec<String> = physical.iter().map(ToString::to_string).collect();
        let identity = format!("{values:?} as {names:?} where {:?}", filter.as_ref().map(ToString::to_string));
        let at =
            |expr: &Arc<dyn PhysicalExpr>| expr.downcast_ref::<expressions::Column>().map(expressions::Column::index);
        let unchanged = filter.is_none()
            && physical.len() == input.fields().len()
            && physical.iter().enumerate().all(|(i, expr)| at(expr) == Some(i))
            && projected.schema().fields().iter().zip(input.fields()).all(|(a, b)| a.name() == b.name());
        if unchanged {
            return Ok(projected);
        }
        let calc = Calc::project(filter, physical, projected.schema()).map_err(|e| self.refused(e.to_string()))?;
        let id = self.ops.add(
            &self.target,
            "project",
            (&identity, description),
            vec![Input::forward(&rel.from)],
            None,
            Made::By(NodeKind::Operator(Arc::new(calc))),
        );
        projected.from = vec![id];
        Ok(projected)
    }

    /// The stream with just the columns of a plan, in its order.
    fn aligned(&mut self, rel: Rel, schema: &DFSchemaRef) -> Result<Rel, SqlError> {
        let rel = self.materialised(rel)?;
        let same = rel.fields.len() == schema.fields().len()
            && rel.fields.iter().zip(schema.iter()).all(|((_, a), (_, b))| a.name() == b.name());
        if same {
            return Ok(rel);
        }
        let exprs: Vec<Expr> = schema.columns().into_iter().map(Expr::Column).collect();
        self.project(rel, None, &exprs, schema)
    }
}
