//! Refuses what a query may not hold, by name and place, before anything is planned.

use std::ops::ControlFlow;

use datafusion_sql::sqlparser::ast::{
    Distinct, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, GroupByExpr, JoinConstraint,
    JoinOperator, Query, Select, SelectItem, SetExpr, SetOperator, SetQuantifier, Spanned, TableFactor, Value,
    ValueWithSpan, Visit, Visitor, WindowType,
};
use floodmark_dataflow::connector::Location;

use crate::{
    error::{SqlError, start},
    plan::{functions, row_number},
};

/// Functions whose value depends on when they are called: a replay after a crash would give other results.
const UNREPEATABLE: &[&str] = &[
    "now",
    "current_timestamp",
    "current_date",
    "current_time",
    "localtime",
    "localtimestamp",
    "current_row_timestamp",
    "proctime",
    "random",
    "rand",
    "rand_integer",
    "uuid",
    "unix_timestamp",
    "today",
];

/// Checks a query, or an expression that stands in a table's declaration.
pub(crate) fn refuse(node: &impl Visit, functions: &dyn Functions) -> Result<(), SqlError> {
    match node.visit(&mut Walk { functions }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(error) => Err(error),
    }
}

/// Where a query's first join stands.
pub(crate) fn first_join(query: &Query) -> Option<Location> {
    struct Joins;
    impl Visitor for Joins {
        type Break = Location;
        fn pre_visit_select(&mut self, select: &Select) -> ControlFlow<Location> {
            match select.from.iter().flat_map(|f| &f.joins).next() {
                Some(join) => ControlFlow::Break(place(&join.relation)),
                None => ControlFlow::Continue(()),
            }
        }
    }
    match query.visit(&mut Joins) {
        ControlFlow::Break(location) => Some(location),
        ControlFlow::Continue(()) => None,
    }
}

/// The functions that a query may call.
pub(crate) trait Functions {
    /// All names, lower-case.
    fn names(&self) -> Vec<String>;
    /// Whether there is one of that lower-case name.
    fn has(&self, name: &str) -> bool;
}

struct Walk<'a> {
    functions: &'a dyn Functions,
}

type Flow = ControlFlow<SqlError>;

fn stop(location: Location, what: &str, help: &str) -> Flow {
    let error = SqlError::at(location, format!("{what} is not supported"));
    ControlFlow::Break(if help.is_empty() { error } else { error.help(help) })
}

fn place(node: &impl Spanned) -> Location {
    start(node.span())
}

impl Visitor for Walk<'_> {
    type Break = SqlError;

    fn pre_visit_query(&mut self, query: &Query) -> Flow {
        let here = place(&*query.body);
        if let Some(order_by) = &query.order_by {
            return stop(place(order_by), "ORDER BY", "a stream has no end to sort by");
        }
        if let Some(limit) = &query.limit_clause {
            return stop(place(limit), "LIMIT or OFFSET", "a stream has no first rows");
        }
        if let Some(fetch) = &query.fetch {
            let at = fetch.quantity.as_ref().map_or(here, place);
            return stop(at, "FETCH", "a stream has no first rows");
        }
        if let Some(with) = query.with.as_ref().filter(|w| w.recursive) {
            return stop(place(with), "WITH RECURSIVE", "");
        }
        if !query.locks.is_empty() || query.for_clause.is_some() {
            return stop(here, "FOR UPDATE", "");
        }
        if !query.pipe_operators.is_empty() || query.settings.is_some() || query.format_clause.is_some() {
            return stop(here, "SETTINGS, FORMAT or |>", "");
        }
        set_expr(&query.body)
    }

    fn pre_visit_select(&mut self, select: &Select) -> Flow {
        let here = place(select);
        if let Some(Distinct::On(columns)) = &select.distinct {
            return stop(columns.first().map_or(here, place), "DISTINCT ON", "");
        }
        let clauses = [
            (select.top.is_some(), "TOP"),
            (select.into.is_some(), "SELECT INTO"),
            (select.exclude.is_some(), "EXCLUDE"),
            (!select.lateral_views.is_empty(), "LATERAL VIEW"),
            (select.prewhere.is_some(), "PREWHERE"),
            (!select.connect_by.is_empty(), "CONNECT BY"),
            (!select.cluster_by.is_empty(), "CLUSTER BY"),
            (!select.distribute_by.is_empty(), "DISTRIBUTE BY"),
            (!select.sort_by.is_empty(), "SORT BY"),
        ];
        if let Some((_, what)) = clauses.iter().find(|(there, _)| *there) {
            return stop(here, what, "");
        }
        let mut names: Vec<&str> = Vec::new();
        for item in &select.projection {
            match item {
                SelectItem::ExprWithAlias { alias, .. } if names.contains(&alias.value.as_str()) => {
                    let error = SqlError::at(start(alias.span), format!("there is a column '{}' already", alias.value));
                    return ControlFlow::Break(error.help("choose another name for this one"));
                }
                SelectItem::ExprWithAlias { alias, .. } => names.push(&alias.value),
                SelectItem::UnnamedExpr(Expr::Identifier(ident)) => names.push(&ident.value),
                _ => {}
            }
        }
        if let Some(qualify) = &select.qualify {
            return stop(place(qualify), "QUALIFY", row_number::DEDUPLICATION);
        }
        if let Some(window) = select.named_window.first() {
            return stop(start(window.0.span), "WINDOW", row_number::DEDUPLICATION);
        }
        match &select.group_by {
            GroupByExpr::All(_) => return stop(here, "GROUP BY ALL", "name the columns"),
            GroupByExpr::Expressions(exprs, modifiers) => {
                if !modifiers.is_empty() {
                    return stop(exprs.first().map_or(here, place), "GROUP BY … WITH", "");
                }
                for expr in exprs {
                    let what = match expr {
                        Expr::GroupingSets(_) => "GROUPING SETS",
                        Expr::Cube(_) => "CUBE",
                        Expr::Rollup(_) => "ROLLUP",
                        _ => continue,
                    };
                    return stop(place(expr), what, "write one INSERT per grouping");
                }
            }
        }
        if select.from.is_empty() {
            return stop(here, "SELECT without FROM", "a job reads from a table");
        }
        for join in select.from.iter().flat_map(|f| &f.joins) {
            let at = place(&join.relation);
            let what = match &join.join_operator {
                JoinOperator::Join(c) | JoinOperator::Inner(c) => match c {
                    JoinConstraint::Natural => "NATURAL JOIN",
                    JoinConstraint::On(_) | JoinConstraint::Using(_) | JoinConstraint::None => continue,
                },
                JoinOperator::Left(_) | JoinOperator::LeftOuter(_) => "LEFT JOIN",
                JoinOperator::Right(_) | JoinOperator::RightOuter(_) => "RIGHT JOIN",
                JoinOperator::FullOuter(_) => "FULL JOIN",
                JoinOperator::CrossJoin(_) => "CROSS JOIN",
                JoinOperator::Semi(_) | JoinOperator::LeftSemi(_) | JoinOperator::RightSemi(_) => "SEMI JOIN",
                JoinOperator::Anti(_) | JoinOperator::LeftAnti(_) | JoinOperator::RightAnti(_) => "ANTI JOIN",
                _ => "this kind of join",
            };
            return stop(at, what, "inner joins of windowed inputs are");
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> Flow {
        let here = place(factor);
        match factor {
            TableFactor::Table {
                args: None, with_hints, version: None, partitions, sample: None, index_hints, ..
            } if with_hints.is_empty() && partitions.is_empty() && index_hints.is_empty() => ControlFlow::Continue(()),
            TableFactor::Table { version: Some(_), .. } => stop(here, "FOR SYSTEM_TIME AS OF", ""),
            TableFactor::Table { args: Some(_), name, .. } => {
                stop(here, &format!("table function {name}"), "TUMBLE and HOP are")
            }
            TableFactor::Table { .. } => stop(here, "TABLESAMPLE, PARTITION or a hint", ""),
            TableFactor::Derived { lateral: false, .. } | TableFactor::NestedJoin { .. } => ControlFlow::Continue(()),
            TableFactor::Derived { .. } => stop(here, "LATERAL", ""),
            TableFactor::Pivot { .. } => stop(here, "PIVOT", ""),
            TableFactor::Unpivot { .. } => stop(here, "UNPIVOT", ""),
            TableFactor::MatchRecognize { .. } => stop(here, "MATCH_RECOGNIZE", ""),
            TableFactor::UNNEST { .. } => stop(here, "UNNEST", ""),
            _ => stop(here, "this table function", "TUMBLE and HOP are"),
        }
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> Flow {
        let here = place(expr);
        match expr {
            Expr::Subquery(_) => stop(here, "a subquery in an expression", "join instead"),
            Expr::Exists { .. } => stop(here, "EXISTS", "join instead"),
            Expr::InSubquery { .. } => stop(here, "IN (subquery)", "join instead"),
            Expr::AnyOp { .. } | Expr::AllOp { .. } => stop(here, "ANY, SOME or ALL", ""),
            Expr::Function(function) => self.function(function),
            Expr::Identifier(ident)
                if ident.quote_style.is_none() && unrepeatable(&ident.value) && is_keyword(&ident.value) =>
            {
                repeatable_only(here, &ident.value)
            }
            _ => ControlFlow::Continue(()),
        }
    }
}

/// Written without parentheses, these are functions all the same.
fn is_keyword(name: &str) -> bool {
    let name = name.to_lowercase();
    name.starts_with("current_") || name.starts_with("local")
}

fn unrepeatable(name: &str) -> bool {
    UNREPEATABLE.contains(&name.to_lowercase().as_str())
}

fn repeatable_only(here: Location, name: &str) -> Flow {
    let message = format!("{} gives another value each time it is called", name.to_uppercase());
    ControlFlow::Break(
        SqlError::at(here, message)
            .help("after a crash the job would compute other rows than before; use a column of the data"),
    )
}

impl Walk<'_> {
    fn function(&self, function: &Function) -> Flow {
        let here = place(&function.name);
        let name = function.name.to_string();
        let lower = name.trim_matches('`').to_lowercase();
        if unrepeatable(&lower) {
            return repeatable_only(here, &name);
        }
        if lower == row_number::NAME {
            return numbered(function);
        }
        if function.over.is_some() {
            return stop(here, "OVER", "use TUMBLE or HOP windows with GROUP BY");
        }
        if matches!(lower.as_str(), "tumble" | "hop" | "session" | "cumulate") {
            let help = "use the table function: FROM TABLE(TUMBLE(TABLE t, DESCRIPTOR(time), INTERVAL '10' SECOND))";
            return stop(here, &format!("{} in an expression", name.to_uppercase()), help);
        }
        if !function.within_group.is_empty() {
            return stop(here, "WITHIN GROUP", "");
        }
        if let FunctionArguments::List(list) = &function.args
            && let Some(clause) = list.clauses.first()
        {
            return stop(here, &format!("{clause} in a function call"), "");
        }
        if lower == "date_format" {
            date_pattern(function)
                .map_or_else(|e| ControlFlow::Break(e.or_at(here)), |()| ControlFlow::Continue(()))?;
        }
        if !self.functions.has(&lower) {
            let names = self.functions.names();
            let error = SqlError::at(here, format!("unknown function '{name}'"));
            return ControlFlow::Break(error.suggest(&lower, names.iter().map(String::as_str)));
        }
        ControlFlow::Continue(())
    }
}

/// Numbers of rows are there to tell the first or last row of a key. Whether they are used so shows in the plan.
fn numbered(function: &Function) -> Flow {
    let here = place(&function.name);
    let spec = match &function.over {
        None => return stop(here, "ROW_NUMBER without OVER", row_number::DEDUPLICATION),
        Some(WindowType::NamedWindow(name)) => {
            return stop(start(name.span), "OVER with a name", row_number::DEDUPLICATION);
        }
        Some(WindowType::WindowSpec(spec)) => spec,
    };
    if !matches!(&function.args, FunctionArguments::List(list) if list.args.is_empty()) {
        return stop(here, "ROW_NUMBER of a value", row_number::DEDUPLICATION);
    }
    if let Some(name) = &spec.window_name {
        return stop(start(name.span), "a name in OVER", row_number::DEDUPLICATION);
    }
    match spec.order_by.as_slice() {
        [] => return stop(here, "ROW_NUMBER without ORDER BY", row_number::DEDUPLICATION),
        [_] => {}
        [_, more, ..] => {
            return stop(place(&more.expr), "ROW_NUMBER by more than one column", row_number::DEDUPLICATION);
        }
    }
    if spec.window_frame.is_some() {
        return stop(here, "ROW_NUMBER with a frame", row_number::DEDUPLICATION);
    }
    ControlFlow::Continue(())
}

/// The pattern must be there to be read while planning.
fn date_pattern(function: &Function) -> Result<(), SqlError> {
    let FunctionArguments::List(list) = &function.args else { return Ok(()) };
    let Some(FunctionArg::Unnamed(FunctionArgExpr::Expr(pattern))) = list.args.get(1) else { return Ok(()) };
    match pattern {
        Expr::Value(ValueWithSpan { value: Value::SingleQuotedString(text), .. }) => {
            functions::check_pattern(text).map_err(|e| SqlError::of_planner(&e).or_at(place(pattern)))
        }
        _ => Err(SqlError::at(place(pattern), "the pattern of DATE_FORMAT must be a literal")),
    }
}

fn set_expr(body: &SetExpr) -> Flow {
    match body {
        SetExpr::Select(_) | SetExpr::Query(_) => ControlFlow::Continue(()),
        SetExpr::SetOperation { op, set_quantifier, left, right } => {
            let at = place(&**right);
            match (op, set_quantifier) {
                (SetOperator::Union, SetQuantifier::All) => {}
                (SetOperator::Union, _) => return stop(at, "UNION without ALL", "write UNION ALL"),
                (op, _) => return stop(at, &op.to_string(), ""),
            }
            set_expr(left)?;
            set_expr(right)
        }
        SetExpr::Values(_) => stop(place(body), "VALUES", "read the rows from a 'files' table"),
        SetExpr::Table(_) => stop(place(body), "TABLE", "write SELECT * FROM …"),
        SetExpr::Insert(_) | SetExpr::Update(_) | SetExpr::Delete(_) | SetExpr::Merge(_) => {
            stop(place(body), "a statement inside of a query", "")
        }
    }
}
