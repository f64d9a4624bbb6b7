//! From statements to optimised logical plans. DataFusion resolves names and types; we add tables, views and windows.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema, SchemaRef};
use datafusion_common::{Column, DataFusionError, TableReference, config::ConfigOptions, plan_err};
use datafusion_expr::{
    AggregateUDF, Expr, Extension, HigherOrderUDF, LogicalPlan, LogicalPlanBuilder, ScalarUDF, TableSource, WindowUDF,
    planner::{ContextProvider, ExprPlanner},
};
use datafusion_optimizer::{
    Analyzer, Optimizer, OptimizerContext, OptimizerRule, common_subexpr_eliminate::CommonSubexprEliminate,
    eliminate_cross_join::EliminateCrossJoin, extract_equijoin_predicate::ExtractEquijoinPredicate,
    optimize_projections::OptimizeProjections, push_down_filter::PushDownFilter,
    replace_distinct_aggregate::ReplaceDistinctWithAggregate, simplify_expressions::SimplifyExpressions,
};
use datafusion_sql::{
    planner::{ParserOptions, PlannerContext, SqlToRel},
    sqlparser::ast::{self, Spanned, Statement as SqlStatement, Visit, Visitor},
};
use floodmark_dataflow::connector::{Connector, Connectors, Location, TableDef};

pub(crate) use self::show::show;
use self::{functions::Registry, window::WindowNode};
use crate::{
    dialect::{
        CreateTable, CreateView, Insert, WindowCall, WindowKind,
        ddl::TableColumn,
        refuse::{Functions, first_join, refuse},
    },
    error::{SqlError, nearest, start},
    operators::window::Windows,
};

pub(crate) mod assign;
pub(crate) mod functions;
pub(crate) mod needs;
pub(crate) mod row_number;
mod show;
pub(crate) mod window;

/// A declared table, resolved.
pub(crate) struct Table {
    /// What its connector sees.
    pub(crate) def: TableDef,
    /// Its connector.
    pub(crate) connector: Arc<dyn Connector>,
    /// All columns, computed ones included, in the order of the declaration.
    pub(crate) schema: SchemaRef,
    /// Computed columns: over the physical ones.
    pub(crate) computed: BTreeMap<String, Expr>,
    /// Time column and the watermark, over the columns of `schema`.
    pub(crate) watermark: Option<(String, Expr)>,
    /// `scan.watermark.idle-timeout`.
    pub(crate) idle_timeout: Option<Duration>,
    /// Where `CREATE TABLE` stands.
    pub(crate) location: Location,
}

/// An insert, planned.
pub(crate) struct Planned {
    pub(crate) table: Arc<Table>,
    pub(crate) plan: LogicalPlan,
    /// Where the statement stands.
    pub(crate) location: Location,
    /// Where its first join stands, if it has one.
    pub(crate) join: Location,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {}", self.def.name)
    }
}

/// A table as DataFusion sees it.
#[derive(Debug)]
pub(crate) struct StreamTable(pub(crate) Arc<Table>);

impl TableSource for StreamTable {
    fn schema(&self) -> SchemaRef {
        self.0.schema.clone()
    }
}

/// A view or a window table function: a plan by a name.
#[derive(Debug)]
struct NamedPlan {
    plan: LogicalPlan,
    schema: SchemaRef,
}

impl TableSource for NamedPlan {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn get_logical_plan(&self) -> Option<Cow<'_, LogicalPlan>> {
        Some(Cow::Borrowed(&self.plan))
    }
}

impl NamedPlan {
    fn new(plan: LogicalPlan) -> Arc<Self> {
        let schema = Arc::new(plan.schema().as_arrow().clone());
        Arc::new(Self { plan, schema })
    }
}

/// The names of a job, as far as it has been read.
pub(crate) struct Catalog<'a> {
    connectors: &'a Connectors,
    registry: Registry,
    tables: BTreeMap<String, Arc<Table>>,
    views: BTreeMap<String, Arc<NamedPlan>>,
    windows: BTreeMap<String, Arc<NamedPlan>>,
    /// Where the last query's first join stands: later passes see no places.
    join: Option<Location>,
    config: ConfigOptions,
}

impl<'a> Catalog<'a> {
    pub(crate) fn new(connectors: &'a Connectors) -> Self {
        Self {
            connectors,
            registry: Registry::new(),
            tables: BTreeMap::new(),
            views: BTreeMap::new(),
            windows: BTreeMap::new(),
            join: None,
            config: ConfigOptions::new(),
        }
    }

    fn is_taken(&self, name: &str, location: Location) -> Result<(), SqlError> {
        if self.tables.contains_key(name) || self.views.contains_key(name) {
            return Err(SqlError::at(location, format!("there is a table or view '{name}' already")));
        }
        Ok(())
    }

    /// Adds a table.
    pub(crate) fn create_table(&mut self, mut create: CreateTable) -> Result<(), SqlError> {
        let location = create.location;
        if create.if_not_exists && self.tables.contains_key(&create.name) {
            return Ok(());
        }
        self.is_taken(&create.name, location)?;
        let Some(name) = create.options.remove("connector") else {
            return Err(SqlError::at(location, format!("table '{}' has no option 'connector'", create.name))
                .help(format!("there is: {}", self.connectors.names().collect::<Vec<_>>().join(", "))));
        };
        let Some(connector) = self.connectors.get(&name.value).cloned() else {
            return Err(SqlError::at(name.location, format!("unknown connector '{}'", name.value))
                .suggest(&name.value, self.connectors.names()));
        };
        let idle_timeout = match create.options.remove("scan.watermark.idle-timeout") {
            None => None,
            Some(option) => Some(assign::duration(&option.value).ok_or_else(|| {
                let message = format!("'scan.watermark.idle-timeout' is not a duration: '{}'", option.value);
                SqlError::at(option.location, message).help("write '5 s', '500 ms' or '1 min'")
            })?),
        };
        let physical: Vec<FieldRef> = create
            .columns
            .iter()
            .filter_map(|c| match c {
                TableColumn::Physical(field) => Some(field.clone()),
                TableColumn::Computed { .. } => None,
            })
            .collect();
        let physical = Arc::new(Schema::new(physical));
        if let Some(fixed) = connector.fixed_schema() {
            check_fixed(&create, &physical, &fixed)?;
        }
        let (schema, computed, watermark) = self.columns(&mut create, &physical)?;
        let def = TableDef {
            name: create.name.clone(),
            schema: physical,
            primary_key: create.primary_key.into_iter().map(|(name, _)| name).collect(),
            options: create.options,
            location,
        };
        let table = Table { def, connector, schema, computed, watermark, idle_timeout, location };
        self.tables.insert(create.name, Arc::new(table));
        Ok(())
    }

    /// Types the computed columns and the watermark.
    #[allow(clippy::type_complexity, reason = "the parts of a table, used once")]
    fn columns(
        &self,
        create: &mut CreateTable,
        physical: &SchemaRef,
    ) -> Result<(SchemaRef, BTreeMap<String, Expr>, Option<(String, Expr)>), SqlError> {
        let mut computed = BTreeMap::new();
        let mut fields = Vec::new();
        for column in &mut create.columns {
            match column {
                TableColumn::Physical(field) => fields.push(field.clone()),
                TableColumn::Computed { name, expr, location } => {
                    let (expr, data_type) = self.expression(&create.name, physical, expr, *location)?;
                    fields.push(Arc::new(Field::new(name.clone(), data_type, true)));
                    computed.insert(name.clone(), expr);
                }
            }
        }
        let schema = Arc::new(Schema::new(fields));
        let Some(watermark) = &mut create.watermark else { return Ok((schema, computed, None)) };
        let time = schema.field_with_name(&watermark.column).map(|f| f.data_type().clone());
        if !matches!(time, Ok(DataType::Timestamp(..))) {
            let message = format!("a watermark needs a TIMESTAMP column; '{}' is not", watermark.column);
            return Err(SqlError::at(watermark.location, message));
        }
        let (expr, data_type) = self.expression(&create.name, &schema, &mut watermark.expr, watermark.location)?;
        if !matches!(data_type, DataType::Timestamp(..)) {
            return Err(SqlError::at(watermark.location, format!("a watermark is a TIMESTAMP, not {data_type}"))
                .help("write column - INTERVAL '5' SECOND"));
        }
        Ok((schema, computed, Some((watermark.column.clone(), expr))))
    }

    /// Resolves an expression of a table's declaration over some of its columns.
    fn expression(
        &self,
        table: &str,
        schema: &SchemaRef,
        expr: &mut ast::Expr,
        location: Location,
    ) -> Result<(Expr, DataType), SqlError> {
        refuse(expr, &self.registry)?;
        functions::rewrite(expr);
        let planned = || -> Result<(Expr, DataType), DataFusionError> {
            let source = Arc::new(Columns(schema.clone()));
            let scan = LogicalPlanBuilder::scan(TableReference::bare(table), source, None)?.build()?;
            let resolved = self.planner().sql_to_expr(expr.clone(), scan.schema(), &mut PlannerContext::new())?;
            let plan = LogicalPlanBuilder::from(scan).project(vec![resolved.alias("$value")])?.build()?;
            match self.analyse(plan)? {
                LogicalPlan::Projection(projection) if projection.expr.len() == 1 => {
                    let data_type = projection.schema.field(0).data_type().clone();
                    Ok((projection.expr[0].clone().unalias(), data_type))
                }
                other => plan_err!("not an expression over a row: {other}"),
            }
        };
        planned().map_err(|e| located(self.with_fields(SqlError::of_planner(&e)), expr).or_at(location))
    }

    fn planner(&self) -> SqlToRel<'_, Self> {
        let options = ParserOptions::new()
            .with_parse_float_as_decimal(true)
            .with_enable_ident_normalization(false)
            .with_map_string_types_to_utf8view(false)
            .with_collect_spans(true);
        SqlToRel::new_with_options(self, options)
    }

    fn analyse(&self, plan: LogicalPlan) -> Result<LogicalPlan, DataFusionError> {
        Analyzer::new().execute_and_check(plan, &self.config, |_, _| {})
    }

    /// Adds a view.
    pub(crate) fn create_view(&mut self, view: CreateView) -> Result<(), SqlError> {
        self.is_taken(&view.name, view.location)?;
        let plan = self.query(&view.query, &view.windows, view.location)?;
        let plan = if view.columns.is_empty() {
            plan
        } else {
            if view.columns.len() != plan.schema().fields().len() {
                let message = format!(
                    "view '{}' names {} columns, its query has {}",
                    view.name,
                    view.columns.len(),
                    plan.schema().fields().len()
                );
                return Err(SqlError::at(view.location, message));
            }
            let columns = plan.schema().columns();
            let renamed = columns.into_iter().zip(view.columns).map(|(c, name)| Expr::Column(c).alias(name));
            LogicalPlanBuilder::from(plan)
                .project(renamed)
                .and_then(LogicalPlanBuilder::build)
                .map_err(|e| SqlError::of_planner(&e).or_at(view.location))?
        };
        let names: Vec<&str> = plan.schema().fields().iter().map(|f| f.name().as_str()).collect();
        if let Some((_, twice)) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(*name)) {
            return Err(SqlError::at(view.location, format!("view '{}' has two columns '{twice}'", view.name))
                .help("rename one of them with AS"));
        }
        self.views.insert(view.name, NamedPlan::new(plan));
        Ok(())
    }

    /// Plans an insert: its rows in the order of the table's columns, optimised.
    pub(crate) fn insert(&mut self, insert: &Insert) -> Result<Planned, SqlError> {
        let Some(table) = self.tables.get(&insert.table).cloned() else {
            if self.views.contains_key(&insert.table) {
                return Err(SqlError::at(
                    insert.table_location,
                    format!("'{}' is a view: nothing can be written to it", insert.table),
                ));
            }
            return Err(SqlError::at(insert.table_location, format!("unknown table '{}'", insert.table))
                .suggest(&insert.table, self.tables.keys().map(String::as_str)));
        };
        let plan = self.query(&insert.query, &insert.windows, insert.location)?;
        let plan = self.analyse(plan).map_err(|e| self.planner_error(&e, &insert.query, insert.location))?;
        let plan = assign::to_sink(plan, &table, insert)?;
        let optimised = self.optimise(plan).map_err(|e| self.planner_error(&e, &insert.query, insert.location))?;
        let join = self.join.unwrap_or(insert.location);
        Ok(Planned { table, plan: optimised, location: insert.location, join })
    }

    fn planner_error(&self, error: &DataFusionError, query: &ast::Query, location: Location) -> SqlError {
        located(self.with_fields(SqlError::of_planner(error)), query).or_at(location)
    }

    /// Suggests a field for one that a struct does not have.
    fn with_fields(&self, error: SqlError) -> SqlError {
        let Some(name) = error.message.strip_prefix("unknown field '").and_then(|m| m.strip_suffix('\'')) else {
            return error;
        };
        fn nested<'t>(fields: &'t Fields, names: &mut Vec<&'t str>) {
            for field in fields {
                if let DataType::Struct(inner) = field.data_type() {
                    names.extend(inner.iter().map(|f| f.name().as_str()));
                    nested(inner, names);
                }
            }
        }
        let mut names = Vec::new();
        self.tables.values().for_each(|t| nested(t.schema.fields(), &mut names));
        let name = name.to_owned();
        match nearest(&name, names) {
            Some(near) => error.help(format!("did you mean '{near}'?")),
            None => error,
        }
    }

    fn optimise(&self, plan: LogicalPlan) -> Result<LogicalPlan, DataFusionError> {
        let optimise = |rules: Vec<Arc<dyn OptimizerRule + Send + Sync>>, plan| {
            Optimizer::with_rules(rules).optimize(plan, &OptimizerContext::new(), |_, _| {})
        };
        let plan = optimise(
            vec![
                Arc::new(ReplaceDistinctWithAggregate::new()),
                Arc::new(SimplifyExpressions::new()),
                Arc::new(EliminateCrossJoin::new()),
                Arc::new(PushDownFilter::new()),
                Arc::new(CommonSubexprEliminate::new()),
                Arc::new(OptimizeProjections::new()),
            ],
            plan,
        )?;
        // By itself and last: filters that are pushed into a join take its equalities along.
        optimise(vec![Arc::new(ExtractEquijoinPredicate::new())], plan)
    }

    fn query(
        &mut self,
        query: &ast::Query,
        windows: &[WindowCall],
        location: Location,
    ) -> Result<LogicalPlan, SqlError> {
        refuse(query, &self.registry)?;
        self.join = first_join(query).or(self.join);
        for call in windows {
            let node = self.window(call)?;
            self.windows.insert(call.placeholder.clone(), node);
        }
        self.check_relations(query)?;
        let mut rewritten = query.clone();
        functions::rewrite(&mut rewritten);
        self.planner()
            .sql_statement_to_plan(SqlStatement::Query(Box::new(rewritten)))
            .map_err(|e| self.planner_error(&e, query, location))
    }

    fn window(&self, call: &WindowCall) -> Result<Arc<NamedPlan>, SqlError> {
        let source = self.source(&call.table).ok_or_else(|| {
            SqlError::at(call.table_location, format!("unknown table '{}'", call.table))
                .suggest(&call.table, self.relation_names())
        })?;
        let plan = || -> Result<LogicalPlan, DataFusionError> {
            LogicalPlanBuilder::scan(TableReference::bare(call.table.as_str()), source, None)?.build()
        };
        let input = plan().map_err(|e| SqlError::of_planner(&e).or_at(call.location))?;
        let names: Vec<&str> = input.schema().fields().iter().map(|f| f.name().as_str()).collect();
        let Ok(field) = input.schema().field_with_unqualified_name(&call.time_column) else {
            let message = format!("unknown column '{}' in '{}'", call.time_column, call.table);
            return Err(SqlError::at(call.time_location, message).suggest(&call.time_column, names));
        };
        if !matches!(field.data_type(), DataType::Timestamp(..)) {
            let message = format!("windows need a TIMESTAMP column; '{}' is {}", call.time_column, field.data_type());
            return Err(SqlError::at(call.time_location, message));
        }
        if let Some(taken) = window::WINDOW_COLUMNS.iter().find(|c| names.contains(c)) {
            let message = format!("'{}' has a column '{taken}' already", call.table);
            return Err(SqlError::at(call.location, message).help("rename it in a view first"));
        }
        let time = Column::new(Some(TableReference::bare(call.table.as_str())), call.time_column.clone());
        let windows = Windows { size: call.size, slide: call.slide, offset: call.offset };
        let label = match call.kind {
            WindowKind::Tumble => format!("TUMBLE({})", assign::show(call.size)),
            WindowKind::Hop => format!("HOP({}, {})", assign::show(call.slide), assign::show(call.size)),
        };
        let node = WindowNode::new(input, time, windows, label, call.location)
            .map_err(|e| SqlError::of_planner(&e).or_at(call.location))?;
        Ok(NamedPlan::new(LogicalPlan::Extension(Extension { node: Arc::new(node) })))
    }

    fn relation_names(&self) -> impl Iterator<Item = &str> {
        self.tables.keys().chain(self.views.keys()).map(String::as_str)
    }

    fn source(&self, name: &str) -> Option<Arc<dyn TableSource>> {
        if let Some(plan) = self.views.get(name).or_else(|| self.windows.get(name)) {
            return Some(plan.clone());
        }
        self.tables.get(name).map(|t| Arc::new(StreamTable(t.clone())) as Arc<dyn TableSource>)
    }

    /// Finds names that are no table, with their place: DataFusion's error has none.
    fn check_relations(&self, query: &ast::Query) -> Result<(), SqlError> {
        #[derive(Default)]
        struct Names {
            relations: Vec<(String, Location)>,
            ctes: HashSet<String>,
        }
        impl Visitor for Names {
            type Break = ();
            fn pre_visit_query(&mut self, query: &ast::Query) -> std::ops::ControlFlow<()> {
                let ctes = query.with.iter().flat_map(|w| &w.cte_tables);
                self.ctes.extend(ctes.map(|c| c.alias.name.value.clone()));
                std::ops::ControlFlow::Continue(())
            }
            fn pre_visit_relation(&mut self, relation: &ast::ObjectName) -> std::ops::ControlFlow<()> {
                let names: Vec<String> = relation
                    .0
                    .iter()
                    .map(|p| p.as_ident().map_or_else(|| p.to_string(), |i| i.value.clone()))
                    .collect();
                self.relations.push((names.join("."), start(relation.span())));
                std::ops::ControlFlow::Continue(())
            }
        }
        let mut names = Names::default();
        let _ = query.visit(&mut names);
        for (name, location) in names.relations {
            if self.source(&name).is_none() && !names.ctes.contains(&name) {
                return Err(
                    SqlError::at(location, format!("unknown table '{name}'")).suggest(&name, self.relation_names())
                );
            }
        }
        Ok(())
    }
}

/// A schema under a name, while expressions over it are resolved.
#[derive(Debug)]
struct Columns(SchemaRef);

impl TableSource for Columns {
    fn schema(&self) -> SchemaRef {
        self.0.clone()
    }
}

/// Gives an error about a column the place where the column is named, if the planner has told none.
fn located(error: SqlError, node: &impl Visit) -> SqlError {
    struct Find<'a> {
        quoted: Vec<&'a str>,
    }
    impl Visitor for Find<'_> {
        type Break = Location;
        fn pre_visit_expr(&mut self, expr: &ast::Expr) -> std::ops::ControlFlow<Location> {
            let ident = match expr {
                ast::Expr::Identifier(ident) => Some(ident),
                ast::Expr::CompoundIdentifier(idents) => idents.last(),
                ast::Expr::Function(function) => function.name.0.last().and_then(|p| p.as_ident()),
                _ => None,
            };
            match ident.filter(|i| self.quoted.iter().any(|q| q.eq_ignore_ascii_case(&i.value))) {
                Some(ident) => std::ops::ControlFlow::Break(start(ident.span)),
                None => std::ops::ControlFlow::Continue(()),
            }
        }
    }
    if error.location.is_some() {
        return error;
    }
    let message = error.message.clone();
    let quoted = message.split('\'').skip(1).step_by(2).collect();
    match node.visit(&mut Find { quoted }) {
        std::ops::ControlFlow::Break(location) => error.or_at(location),
        std::ops::ControlFlow::Continue(()) => error,
    }
}

/// A generator's table must be declared as what it generates.
fn check_fixed(create: &CreateTable, declared: &Schema, fixed: &Schema) -> Result<(), SqlError> {
    let name = &create.name;
    for field in declared.fields() {
        let known = fixed.fields().iter().find(|f| f.name() == field.name());
        let Some(known) = known else {
            let error = SqlError::at(
                create.location,
                format!("table '{name}': the connector brings no column '{}'", field.name()),
            );
            return Err(error.suggest(field.name(), fixed.fields().iter().map(|f| f.name().as_str())));
        };
        if !is_part(field.data_type(), known.data_type()) {
            let message = format!(
                "table '{name}': the connector brings column '{}' as {}, not {}",
                field.name(),
                known.data_type(),
                field.data_type()
            );
            return Err(SqlError::at(create.location, message));
        }
    }
    Ok(())
}

/// Whether a type is another, or a struct with some of its fields.
fn is_part(part: &DataType, whole: &DataType) -> bool {
    match (part, whole) {
        (DataType::Struct(part), DataType::Struct(whole)) => {
            part.iter().all(|p| whole.iter().any(|w| w.name() == p.name() && is_part(p.data_type(), w.data_type())))
        }
        _ => part == whole,
    }
}

impl ContextProvider for Catalog<'_> {
    fn get_table_source(&self, name: TableReference) -> Result<Arc<dyn TableSource>, DataFusionError> {
        match self.source(name.table()) {
            Some(source) => Ok(source),
            None => plan_err!("unknown table '{name}'"),
        }
    }

    fn get_expr_planners(&self) -> &[Arc<dyn ExprPlanner>] {
        &self.registry.planners
    }

    fn get_function_meta(&self, name: &str) -> Option<Arc<ScalarUDF>> {
        self.registry.scalars.get(&name.to_lowercase()).cloned()
    }

    fn get_higher_order_meta(&self, name: &str) -> Option<Arc<HigherOrderUDF>> {
        self.registry.higher_order.get(&name.to_lowercase()).cloned()
    }

    fn get_aggregate_meta(&self, name: &str) -> Option<Arc<AggregateUDF>> {
        self.registry.aggregates.get(&name.to_lowercase()).cloned()
    }

    fn get_window_meta(&self, name: &str) -> Option<Arc<WindowUDF>> {
        row_number::function(name).map(Arc::new)
    }

    fn get_variable_type(&self, _: &[String]) -> Option<DataType> {
        None
    }

    fn options(&self) -> &ConfigOptions {
        &self.config
    }

    fn udf_names(&self) -> Vec<String> {
        self.registry.names()
    }

    fn higher_order_function_names(&self) -> Vec<String> {
        self.registry.higher_order.keys().cloned().collect()
    }

    fn udaf_names(&self) -> Vec<String> {
        self.registry.aggregates.keys().cloned().collect()
    }

    fn udwf_names(&self) -> Vec<String> {
        Vec::new()
    }
}
