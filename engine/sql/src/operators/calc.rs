//! Filter and projection in one: rows that pass the predicate, as the expressions see them.
//!
//! Only the columns that the expressions need are filtered.

use std::sync::Arc;

use arrow::{
    array::{AsArray, BooleanArray},
    compute::filter_record_batch,
    datatypes::SchemaRef,
    record_batch::RecordBatch,
};
use datafusion_common::tree_node::{Transformed, TreeNode};
use datafusion_physical_expr::{PhysicalExpr, expressions::Column, utils::collect_columns};
use floodmark_dataflow::{Batch, Operator, OperatorFactory, Output, Port, SubtaskContext};
use floodmark_snapshot::Result;

use super::{arrow_failed, evaluate, failed, partial::batch};

/// Filter and projection of a stream.
#[derive(Clone)]
pub(crate) struct Calc {
    predicate: Option<Arc<dyn PhysicalExpr>>,
    /// The input's columns that `exprs` see, in order.
    used: Vec<usize>,
    /// Over the columns `used`; `None` passes them on as they are.
    exprs: Option<Vec<Arc<dyn PhysicalExpr>>>,
    output: SchemaRef,
}

impl Calc {
    /// Rows for which `predicate` is true, as they are.
    pub(crate) fn filter(predicate: Arc<dyn PhysicalExpr>, schema: SchemaRef) -> Self {
        Self { predicate: Some(predicate), used: (0..schema.fields().len()).collect(), exprs: None, output: schema }
    }

    /// The values of `exprs` (over the input's columns), of rows for which `predicate` is true.
    pub(crate) fn project(
        predicate: Option<Arc<dyn PhysicalExpr>>,
        exprs: Vec<Arc<dyn PhysicalExpr>>,
        output: SchemaRef,
    ) -> Result<Self> {
        let mut used: Vec<usize> = exprs.iter().flat_map(collect_columns).map(|c| c.index()).collect();
        used.sort_unstable();
        used.dedup();
        let moved = |expr: Arc<dyn PhysicalExpr>| {
            expr.transform(|node| {
                Ok(match node.downcast_ref::<Column>() {
                    Some(column) => match used.binary_search(&column.index()) {
                        Ok(index) => {
                            Transformed::yes(Arc::new(Column::new(column.name(), index)) as Arc<dyn PhysicalExpr>)
                        }
                        Err(_) => Transformed::no(node),
                    },
                    None => Transformed::no(node),
                })
            })
            .map(|t| t.data)
            .map_err(|e| failed(&e))
        };
        let exprs = exprs.into_iter().map(moved).collect::<Result<Vec<_>>>()?;
        let plain = exprs.len() == used.len()
            && exprs.iter().enumerate().all(|(i, e)| e.downcast_ref::<Column>().is_some_and(|c| c.index() == i));
        Ok(Self { predicate, used, exprs: (!plain).then_some(exprs), output })
    }

    /// The rows that pass, as the expressions see them.
    pub(crate) fn apply(&self, rows: &RecordBatch) -> Result<Option<RecordBatch>> {
        let mask = match &self.predicate {
            None => None,
            Some(predicate) => {
                let mask = evaluate(predicate, rows)?;
                let mask = mask.as_boolean();
                match mask.true_count() {
                    0 => return Ok(None),
                    n if n == rows.num_rows() => None,
                    _ => Some(mask.clone()),
                }
            }
        };
        let used = self.input(rows, mask.as_ref())?;
        let columns = match &self.exprs {
            None => used.columns().to_vec(),
            Some(exprs) => exprs.iter().map(|e| evaluate(e, &used)).collect::<Result<_>>()?,
        };
        batch(&self.output, columns, used.num_rows()).map(Some)
    }

    fn input(&self, rows: &RecordBatch, mask: Option<&BooleanArray>) -> Result<RecordBatch> {
        let used = rows.project(&self.used).map_err(arrow_failed)?;
        match mask {
            None => Ok(used),
            Some(mask) => filter_record_batch(&used, mask).map_err(arrow_failed),
        }
    }
}

impl OperatorFactory for Calc {
    fn create(&self, _: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok(Box::new(self.clone()))
    }
}

impl Operator for Calc {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        if let Some(rows) = self.apply(&batch.rows)? {
            out.emit(Batch::new(rows));
        }
        Ok(())
    }
}
