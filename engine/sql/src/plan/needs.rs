//! Which columns, and which fields of nested columns, a plan reads of each table: what a connector must decode.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use arrow::datatypes::{DataType, Field, FieldRef, Fields};
use datafusion_common::{Column, ScalarValue};
use datafusion_expr::{Expr, LogicalPlan};

use super::{StreamTable, window::WindowNode};

/// A need for a column: all of it, or some fields of a struct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    All,
    Fields(BTreeMap<String, Need>),
}

impl Need {
    pub(crate) fn nothing() -> Self {
        Self::Fields(BTreeMap::new())
    }

    fn add(&mut self, path: &[String]) {
        match (&mut *self, path) {
            (Self::All, _) => {}
            (_, []) => *self = Self::All,
            (Self::Fields(fields), [first, rest @ ..]) => {
                fields.entry(first.clone()).or_insert_with(Self::nothing).add(rest);
            }
        }
    }

    /// Needs what the other does, too.
    pub(crate) fn union(&mut self, other: &Self) {
        match (&mut *self, other) {
            (Self::All, _) => {}
            (_, Self::All) => *self = Self::All,
            (Self::Fields(known), Self::Fields(more)) => {
                for (name, need) in more {
                    known.entry(name.clone()).or_insert_with(Self::nothing).union(need);
                }
            }
        }
    }

    /// The part of a field that is needed.
    pub(crate) fn narrow(&self, field: &FieldRef) -> FieldRef {
        match (self, field.data_type()) {
            (Self::Fields(needs), DataType::Struct(fields)) if !needs.is_empty() => {
                let fields: Fields =
                    fields.iter().filter_map(|f| needs.get(f.name()).map(|need| need.narrow(f))).collect();
                Arc::new(Field::new(field.name(), DataType::Struct(fields), field.is_nullable()))
            }
            _ => field.clone(),
        }
    }
}

/// Needs by column name.
pub(crate) type Needs = BTreeMap<String, Need>;

/// Adds what an expression reads.
pub(crate) fn add_expr(needs: &mut Needs, expr: &Expr) {
    walk(expr, &mut |column, path| {
        needs.entry(column.name.clone()).or_insert_with(Need::nothing).add(path);
    });
}

/// Calls `found` for each column in an expression, with the fields that are taken from it.
fn walk(expr: &Expr, found: &mut dyn FnMut(&Column, &[String])) {
    if let Some((column, path)) = path_of(expr) {
        found(column, &path);
        return;
    }
    let _ = datafusion_common::tree_node::TreeNode::apply_children(expr, |child| {
        walk(child, found);
        Ok(datafusion_common::tree_node::TreeNodeRecursion::Continue)
    });
}

/// `column` or `get_field(…, 'name')` of one.
fn path_of(expr: &Expr) -> Option<(&Column, Vec<String>)> {
    match expr {
        Expr::Column(column) => Some((column, Vec::new())),
        Expr::ScalarFunction(call) if call.name() == "get_field" => {
            let (base, names) = call.args.split_first()?;
            let (column, mut path) = path_of(base)?;
            for name in names {
                match name {
                    Expr::Literal(ScalarValue::Utf8(Some(name)) | ScalarValue::Utf8View(Some(name)), _) => {
                        path.push(name.clone());
                    }
                    _ => return None,
                }
            }
            Some((column, path))
        }
        _ => None,
    }
}

/// What is needed of a plan's output, by column.
type Wanted = HashMap<Column, Vec<Vec<String>>>;

/// Adds the needs of a plan, all of whose output is wanted, by table.
pub(crate) fn of_plan(plan: &LogicalPlan, tables: &mut BTreeMap<String, Needs>) {
    descend(plan, &all_of(plan), tables);
}

fn all_of(plan: &LogicalPlan) -> Wanted {
    plan.schema().columns().into_iter().map(|c| (c, vec![Vec::new()])).collect()
}

fn want(wanted: &mut Wanted, expr: &Expr) {
    walk(expr, &mut |column, path| wanted.entry(column.clone()).or_default().push(path.to_vec()));
}

fn descend(plan: &LogicalPlan, wanted: &Wanted, tables: &mut BTreeMap<String, Needs>) {
    match plan {
        LogicalPlan::TableScan(scan) => {
            let Some(StreamTable(table)) = scan.source.downcast_ref::<StreamTable>() else { return };
            let needs = tables.entry(table.def.name.clone()).or_default();
            let mut seen = HashSet::new();
            for (column, paths) in wanted {
                // An alias in between may have another qualifier: names are unique within a table.
                if scan.projected_schema.fields().iter().any(|f| *f.name() == column.name) && seen.insert(&column.name)
                {
                    let need = needs.entry(column.name.clone()).or_insert_with(Need::nothing);
                    paths.iter().for_each(|path| need.add(path));
                }
            }
        }
        LogicalPlan::Projection(projection) => {
            let mut inner = Wanted::new();
            projection.expr.iter().for_each(|e| want(&mut inner, e));
            descend(&projection.input, &inner, tables);
        }
        LogicalPlan::Filter(filter) => {
            let mut inner = wanted.clone();
            want(&mut inner, &filter.predicate);
            descend(&filter.input, &inner, tables);
        }
        LogicalPlan::SubqueryAlias(alias) => {
            // Position by position: the alias only changes qualifiers.
            let inner = alias
                .schema
                .columns()
                .into_iter()
                .zip(alias.input.schema().columns())
                .filter_map(|(outer, inner)| Some((inner, wanted.get(&outer)?.clone())))
                .collect();
            descend(&alias.input, &inner, tables);
        }
        LogicalPlan::Aggregate(aggregate) => {
            let mut inner = Wanted::new();
            aggregate.group_expr.iter().chain(&aggregate.aggr_expr).for_each(|e| want(&mut inner, e));
            descend(&aggregate.input, &inner, tables);
        }
        LogicalPlan::Extension(extension) => {
            if let Some(node) = extension.node.as_any().downcast_ref::<WindowNode>() {
                let mut inner = wanted.clone();
                inner.entry(node.time.clone()).or_default().push(Vec::new());
                descend(&node.input, &inner, tables);
            }
        }
        other => other.inputs().into_iter().for_each(|input| descend(input, &all_of(input), tables)),
    }
}
