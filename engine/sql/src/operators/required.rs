//! Lets no row pass into a table that lacks a value which the table requires.

use arrow::array::Array;
use floodmark_dataflow::{Batch, Operator, OperatorFactory, Output, Port, SubtaskContext, connector::TableDef};
use floodmark_snapshot::{Error, Result};

/// The columns of a table that are `NOT NULL`.
#[derive(Clone, Debug)]
pub(crate) struct Required {
    table: String,
    columns: Vec<(usize, String)>,
}

impl Required {
    /// What a table requires.
    pub(crate) fn of(table: &TableDef) -> Self {
        let columns = table.schema.fields().iter().enumerate();
        let columns = columns.filter(|(_, f)| !f.is_nullable()).map(|(i, f)| (i, f.name().clone())).collect();
        Self { table: table.name.clone(), columns }
    }

    /// Whether nothing is required.
    pub(crate) fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// The columns, for people.
    pub(crate) fn names(&self) -> String {
        self.columns.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

impl OperatorFactory for Required {
    fn create(&self, _: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok(Box::new(self.clone()))
    }
}

impl Operator for Required {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        for (column, name) in &self.columns {
            if batch.rows.column(*column).null_count() > 0 {
                return Err(Error::abort(format!(
                    "column '{name}' of table '{}' is NOT NULL, and the query gives a row without a value for it; \
                     filter such rows, or use COALESCE",
                    self.table
                )));
            }
        }
        out.emit(batch);
        Ok(())
    }
}
