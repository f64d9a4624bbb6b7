//! `ROW_NUMBER()` as the planner knows it: a window function that is never computed. What it means is read off the plan
//! (`lower::dedup`).
//!
//! Later passes see no places, so the place of a call is made part of its name before planning.

use arrow::datatypes::{DataType, Field, FieldRef};
use datafusion_common::{Result, not_impl_err};
use datafusion_expr::{
    PartitionEvaluator, Signature, Volatility, WindowFunctionDefinition, WindowUDF, WindowUDFImpl,
    function::{PartitionEvaluatorArgs, WindowUDFFieldArgs},
};
use floodmark_dataflow::connector::Location;

/// The function, as people write it in lower case.
pub(crate) const NAME: &str = "row_number";

/// What it is for.
pub(crate) const DEDUPLICATION: &str = "to keep the last row of each key (or the first), write \
    SELECT … FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY key ORDER BY time DESC) AS n FROM t) WHERE n = 1";

/// The name of a call at a place.
pub(crate) fn name_at(location: Location) -> String {
    format!("{NAME}${}${}", location.line, location.column)
}

/// The function of a call, by its name.
pub(crate) fn function(name: &str) -> Option<WindowUDF> {
    place(name)?;
    Some(WindowUDF::from(RowNumber { name: name.to_owned(), signature: Signature::nullary(Volatility::Immutable) }))
}

fn place(name: &str) -> Option<Location> {
    let (line, column) = name.strip_prefix(NAME)?.strip_prefix('$')?.split_once('$')?;
    Some(Location { line: line.parse().ok()?, column: column.parse().ok()? })
}

/// Where a call stands, if it is one of this function.
pub(crate) fn location(function: &WindowFunctionDefinition) -> Option<Location> {
    let WindowFunctionDefinition::WindowUDF(function) = function else { return None };
    place(function.name())
}

/// See the header of this file.
#[derive(Debug, PartialEq, Eq, Hash)]
struct RowNumber {
    name: String,
    signature: Signature,
}

impl WindowUDFImpl for RowNumber {
    fn name(&self) -> &str {
        &self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn partition_evaluator(&self, _: PartitionEvaluatorArgs) -> Result<Box<dyn PartitionEvaluator>> {
        not_impl_err!("rows of a stream are not numbered")
    }

    fn field(&self, args: WindowUDFFieldArgs) -> Result<FieldRef> {
        Ok(Field::new(args.name(), DataType::Int64, false).into())
    }
}
