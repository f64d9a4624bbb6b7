//! From SQL to a dataflow, and the streaming operators that it runs on.
//!
//! Three steps: [`dialect`] turns text into statements, [`mod@plan`] gives their names and types a meaning (DataFusion's
//! planner and optimiser), [`lower`] makes a job's graph of it. Every refusal comes from one of the three, with its place.
//! Reads and writes nothing: connectors are asked for factories, not opened.

mod dialect;
mod error;
mod lower;
pub(crate) mod operators;
mod plan;
#[cfg(test)]
mod tests;

use floodmark_dataflow::{
    JobGraph,
    connector::{Connectors, PlanContext},
};

pub use self::error::SqlError;
use self::{dialect::Statement, plan::Catalog};

/// What planning depends on besides the SQL.
pub struct PlanOptions<'a> {
    /// The job, and what its snapshots guarantee.
    pub context: PlanContext,
    /// What tables may name.
    pub connectors: &'a Connectors,
}

/// Plans the SQL of a job.
///
/// # Errors
/// The first mistake, or construct that is not supported, with its place and its line quoted.
pub fn plan(sql: &str, options: &PlanOptions<'_>) -> Result<JobGraph, SqlError> {
    plan_statements(sql, options).map_err(|e| e.quoting(sql))
}

fn plan_statements(sql: &str, options: &PlanOptions<'_>) -> Result<JobGraph, SqlError> {
    let mut catalog = Catalog::new(options.connectors);
    let mut inserts = Vec::new();
    for statement in dialect::parse(sql)? {
        match statement {
            Statement::CreateTable(create) => catalog.create_table(create)?,
            Statement::CreateView(view) => catalog.create_view(view)?,
            Statement::Insert(insert) => {
                inserts.push(catalog.insert(&insert)?);
            }
        }
    }
    if inserts.is_empty() {
        return Err(SqlError::nowhere("nothing is inserted anywhere: the job would do nothing")
            .help("write INSERT INTO … SELECT …"));
    }
    lower::lower(&inserts, &options.context)
}
