//! A table as a source: what its connector must bring, the columns computed from that, and its watermarks.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray},
    compute::{cast, max},
    datatypes::{FieldRef, Schema, SchemaRef, TimestampMillisecondType},
};
use datafusion_common::{
    DFSchema, DataFusionError,
    tree_node::{Transformed, TreeNode},
};
use datafusion_expr::{Expr, Operator};
use datafusion_physical_expr::{
    PhysicalExpr,
    expressions::{BinaryExpr, Column, Literal},
};
use floodmark_dataflow::{
    graph::NodeKind,
    source::{Compute, EventTime, SourceNode, WatermarkSpec},
};
use floodmark_snapshot::{Error, Result};

use super::{Lowering, Made, Op, Rel, Role, physical};
use crate::{
    error::SqlError,
    operators::{
        evaluate,
        partial::{batch, time_type},
    },
    plan::{
        Table,
        needs::{Need, Needs, add_expr},
        show,
    },
};

impl Lowering<'_> {
    /// The source of a table; made once.
    pub(super) fn source(&mut self, table: &Arc<Table>) -> Result<Rel, SqlError> {
        if let Some(rel) = self.sources.get(&table.def.name) {
            return Ok(rel.clone());
        }
        let watermark = table.watermark.as_ref().filter(|_| self.timed);
        let mut wanted = self.needs.get(&table.def.name).cloned().unwrap_or_default();
        if let Some((_, expr)) = watermark {
            add_expr(&mut wanted, expr);
        }
        let projection = physical_needs(table, &wanted);
        let columns: Vec<&FieldRef> = table.schema.fields().iter().filter(|f| wanted.contains_key(f.name())).collect();
        let mut values: Vec<Arc<dyn PhysicalExpr>> = Vec::with_capacity(columns.len());
        let mut fields = Vec::with_capacity(columns.len());
        let physical = DFSchema::try_from(projection.clone()).map_err(|e| self.failed(&e))?;
        for field in columns {
            let value: Arc<dyn PhysicalExpr> = match table.computed.get(field.name()) {
                Some(expr) => self.computed(expr, &physical)?,
                None => {
                    let at = projection.index_of(field.name()).map_err(|e| self.refused(e.to_string()))?;
                    Arc::new(Column::new(field.name(), at))
                }
            };
            let data_type = value.data_type(&projection).map_err(|e| self.failed(&e))?;
            fields.push(Arc::new(field.as_ref().clone().with_data_type(data_type)));
            values.push(value);
        }
        let schema = Arc::new(Schema::new(fields.clone()));
        let plain = schema == projection && table.computed.keys().all(|c| !wanted.contains_key(c));
        let compute = (!plain).then(|| compute(values, schema.clone()));
        let watermark = watermark
            .map(|(_, expr)| {
                let rows = DFSchema::try_from(schema.clone()).map_err(|e| self.failed(&e))?;
                let expr = self.computed(expr, &rows)?;
                Ok(WatermarkSpec { event_time: event_time(expr, schema.clone()), idle_timeout: table.idle_timeout })
            })
            .transpose()?;
        let factory =
            table.connector.source(&table.def, &projection, self.context).map_err(|e| self.table_error(e, table))?;
        let kind = factory.kind();
        let decoded: Vec<String> = projection.fields().iter().map(describe).collect();
        let time = table.watermark.as_ref().map(|(column, _)| column);
        let shown = match (&watermark, &table.watermark) {
            (Some(_), Some((column, expr))) => format!(", watermark for {column} as {}", show(expr)),
            _ => String::new(),
        };
        let id = self.ops.push(Op {
            uid: format!("source:{}", table.def.name),
            description: format!("{kind} {}({}){shown}", table.def.name, decoded.join(", ")),
            kind,
            state_schema: None,
            made: Made::By(NodeKind::Source(SourceNode { factory, compute, watermark })),
            inputs: Vec::new(),
        });
        let role = |field: &FieldRef| if time == Some(field.name()) { Role::Time } else { Role::Plain };
        let rel = Rel {
            from: vec![id],
            roles: fields.iter().map(role).collect(),
            fields: fields.into_iter().map(|f| (None, f)).collect(),
            changelog: None,
            pending: None,
            windows: None,
        };
        self.sources.insert(table.def.name.clone(), rel.clone());
        Ok(rel)
    }

    fn computed(&self, expr: &Expr, schema: &DFSchema) -> Result<Arc<dyn PhysicalExpr>, SqlError> {
        // The declaration's expressions are qualified with the table's name, these schemas are not.
        unqualified(expr.clone()).and_then(|expr| physical(&expr, schema)).map_err(|e| self.failed(&e))
    }
}

fn unqualified(expr: Expr) -> Result<Expr, DataFusionError> {
    let strip = |node: Expr| {
        Ok(match node {
            Expr::Column(column) => Transformed::yes(Expr::Column(datafusion_common::Column::from_name(column.name))),
            other => Transformed::no(other),
        })
    };
    expr.transform(strip).map(|t| t.data)
}

fn describe(field: &FieldRef) -> String {
    match field.data_type() {
        arrow::datatypes::DataType::Struct(fields) => {
            let fields: Vec<String> = fields.iter().map(describe).collect();
            format!("{}<{}>", field.name(), fields.join(", "))
        }
        _ => field.name().clone(),
    }
}

/// What the connector must bring, for the wanted columns of the table.
fn physical_needs(table: &Table, wanted: &Needs) -> SchemaRef {
    let mut physical: Needs = BTreeMap::new();
    for (name, need) in wanted {
        match table.computed.get(name) {
            Some(expr) => add_expr(&mut physical, expr),
            None => physical.entry(name.clone()).or_insert_with(Need::nothing).union(need),
        }
    }
    let fields = table.def.schema.fields().iter();
    Arc::new(Schema::new(fields.filter_map(|f| physical.get(f.name()).map(|need| need.narrow(f))).collect::<Vec<_>>()))
}

fn compute(values: Vec<Arc<dyn PhysicalExpr>>, schema: SchemaRef) -> Compute {
    Arc::new(move |rows| {
        let columns = values.iter().map(|v| evaluate(v, &rows)).collect::<Result<_>>()?;
        batch(&schema, columns, rows.num_rows())
    })
}

/// The greatest watermark of a batch. Of a column shifted by a constant it is that of the greatest value: just one row is
/// computed.
fn event_time(expr: Arc<dyn PhysicalExpr>, schema: SchemaRef) -> EventTime {
    let shifted = shifted_column(&expr);
    Arc::new(move |rows| {
        let Some(column) = shifted else {
            return greatest(&evaluate(&expr, rows)?);
        };
        let times = milliseconds(rows.column(column))?;
        let times = times.as_primitive::<TimestampMillisecondType>();
        let known = (0..times.len()).filter(|row| times.is_valid(*row));
        let Some(row) = known.max_by_key(|row| times.value(*row)) else { return Ok(None) };
        let columns = rows.columns().iter().map(|c| c.slice(row, 1)).collect();
        greatest(&evaluate(&expr, &batch(&schema, columns, 1)?)?)
    })
}

/// `column`, `column - constant` or `column + constant`.
fn shifted_column(expr: &Arc<dyn PhysicalExpr>) -> Option<usize> {
    if let Some(column) = expr.downcast_ref::<Column>() {
        return Some(column.index());
    }
    let binary = expr.downcast_ref::<BinaryExpr>()?;
    let shift =
        matches!(binary.op(), Operator::Minus | Operator::Plus) && binary.right().downcast_ref::<Literal>().is_some();
    let column = binary.left().downcast_ref::<Column>()?;
    shift.then_some(column.index())
}

fn milliseconds(times: &ArrayRef) -> Result<ArrayRef> {
    cast(times, &time_type()).map_err(|e| Error::abort(e.to_string()))
}

fn greatest(times: &ArrayRef) -> Result<Option<i64>> {
    let times = milliseconds(times)?;
    Ok(max(times.as_primitive::<TimestampMillisecondType>()))
}
