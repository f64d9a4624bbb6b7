//! The logical node of a window table function: the input's rows, with the columns of the windows that hold them.

use std::{cmp::Ordering, collections::HashSet, fmt, hash::Hash, sync::Arc};

use arrow::datatypes::Field;
use datafusion_common::{Column, DFSchema, DFSchemaRef, Result, plan_datafusion_err};
use datafusion_expr::{Expr, LogicalPlan, UserDefinedLogicalNodeCore};
use floodmark_dataflow::connector::Location;

use crate::operators::{partial::time_type, window::Windows};

/// Names of the columns that a window table function adds, in their order.
pub(crate) const WINDOW_COLUMNS: [&str; 3] = ["window_start", "window_end", "window_time"];

/// See the header of this file.
#[derive(Clone, Debug)]
pub(crate) struct WindowNode {
    pub(crate) input: LogicalPlan,
    /// The time column.
    pub(crate) time: Column,
    pub(crate) windows: Windows,
    /// `TUMBLE(10 s)`.
    pub(crate) label: String,
    /// Where the call stands.
    pub(crate) location: Location,
    schema: DFSchemaRef,
}

impl WindowNode {
    pub(crate) fn new(
        input: LogicalPlan,
        time: Column,
        windows: Windows,
        label: String,
        location: Location,
    ) -> Result<Self> {
        let mut fields: Vec<_> =
            input.schema().iter().map(|(qualifier, field)| (qualifier.cloned(), field.clone())).collect();
        let added = WINDOW_COLUMNS.map(|name| (None, Arc::new(Field::new(name, time_type(), true))));
        fields.extend(added);
        let schema = Arc::new(DFSchema::new_with_metadata(fields, input.schema().metadata().clone())?);
        Ok(Self { input, time, windows, label, location, schema })
    }

    fn identity(&self) -> (&LogicalPlan, &Column, &Windows) {
        (&self.input, &self.time, &self.windows)
    }
}

impl PartialEq for WindowNode {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for WindowNode {}

impl PartialOrd for WindowNode {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        self.identity().partial_cmp(&other.identity())
    }
}

impl Hash for WindowNode {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.identity().hash(state);
    }
}

impl UserDefinedLogicalNodeCore for WindowNode {
    fn name(&self) -> &str {
        "Window"
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.input]
    }

    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }

    fn expressions(&self) -> Vec<Expr> {
        Vec::new()
    }

    fn prevent_predicate_push_down_columns(&self) -> HashSet<String> {
        WINDOW_COLUMNS.iter().map(|c| (*c).to_owned()).collect()
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Window: {} by {}", self.label, self.time)
    }

    fn with_exprs_and_inputs(&self, _: Vec<Expr>, inputs: Vec<LogicalPlan>) -> Result<Self> {
        let input = inputs.into_iter().next().ok_or_else(|| plan_datafusion_err!("a window has one input"))?;
        Self::new(input, self.time.clone(), self.windows, self.label.clone(), self.location)
    }

    fn necessary_children_exprs(&self, output_columns: &[usize]) -> Option<Vec<Vec<usize>>> {
        let inputs = self.input.schema().fields().len();
        let time = self.input.schema().index_of_column(&self.time).ok()?;
        let mut needed: Vec<usize> = output_columns.iter().copied().filter(|c| *c < inputs).chain([time]).collect();
        needed.sort_unstable();
        needed.dedup();
        Some(vec![needed])
    }
}
