//! How SQL finds its connectors: a registry of factories that turn a table's declaration into sources and sinks.

use std::{collections::BTreeMap, fmt, sync::Arc};

use arrow::datatypes::{Schema, SchemaRef};
use floodmark_snapshot::JobId;

use crate::{sink::SinkNode, source::SourceFactory, variables::Template};

/// A place in the SQL text, both counted from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    /// Line.
    pub line: u64,
    /// Column.
    pub column: u64,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// A value of a table's `WITH (…)` list, and where it stands.
#[derive(Clone, Debug)]
pub struct OptionValue {
    /// The text between the quotes. If it has variables it is as it was written; else `$${` stands in it as `${`.
    pub value: String,
    /// Where the option's name stands.
    pub location: Location,
    /// The value, if it has variables: known only to the process that connects, and only then.
    pub variables: Option<Template>,
}

impl OptionValue {
    /// Reads the text between the quotes.
    ///
    /// # Errors
    /// When a `${` in it begins no variable.
    pub fn parse(text: &str, location: Location) -> Result<Self, TableError> {
        let template = Template::parse(text).map_err(|message| TableError { message, location: Some(location) })?;
        match template.literal() {
            Some(literal) => Ok(Self { value: literal.to_owned(), location, variables: None }),
            None => Ok(Self { value: text.to_owned(), location, variables: Some(template) }),
        }
    }
}

/// A `CREATE TABLE`, as a connector sees it.
#[derive(Clone, Debug)]
pub struct TableDef {
    /// The table's name.
    pub name: String,
    /// Physical columns only (computed ones are the planner's), in the order of the declaration.
    pub schema: SchemaRef,
    /// Columns of `PRIMARY KEY (…) NOT ENFORCED`; empty if there is none.
    pub primary_key: Vec<String>,
    /// The `WITH (…)` list without `connector` and without `scan.watermark.*`.
    pub options: BTreeMap<String, OptionValue>,
    /// Where the statement begins.
    pub location: Location,
}

/// What is wrong with a table's declaration.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct TableError {
    /// What is wrong, and what to do: `option 'topic' is missing`, `unknown option 'topik', did you mean 'topic'?`.
    pub message: String,
    /// The option at fault; `None` blames the whole table.
    pub location: Option<Location>,
}

impl TableError {
    /// An error of the table as a whole.
    pub fn table(message: impl Into<String>) -> Self {
        Self { message: message.into(), location: None }
    }

    /// An error of one option.
    pub fn option(option: &OptionValue, message: impl Into<String>) -> Self {
        Self { message: message.into(), location: Some(option.location) }
    }
}

/// What the job as a whole asks of its snapshots, as far as sinks must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guarantee {
    /// Aligned snapshots: a sink may stage and commit.
    ExactlyOnce,
    /// Unaligned-in-time snapshots: sinks write as they go.
    AtLeastOnce,
    /// No snapshots: sinks write as they go.
    None,
}

/// What a connector knows of the job while it plans.
#[derive(Clone, Debug)]
pub struct PlanContext {
    /// The job: part of transactional ids, group ids and file names.
    pub job: JobId,
    /// What its snapshots guarantee.
    pub guarantee: Guarantee,
}

/// What a sink is asked to take.
#[derive(Clone, Debug)]
pub struct SinkInput {
    /// The rows' schema: the table's columns, in its order, then [`crate::ROW_KIND`] if it is a changelog.
    pub schema: SchemaRef,
    /// Whether rows are updates as well as insertions.
    pub changelog: bool,
}

/// A connector: what `'connector' = '…'` names.
pub trait Connector: Send + Sync {
    /// `kafka`, `files`, …
    fn name(&self) -> &'static str;

    /// A source of the table that brings just the columns of `projection`: a subset of the table's columns, in the
    /// table's order, in which a struct may have fewer fields than declared. Decoding skips the rest. May be empty of
    /// columns (`SELECT count(*)`): then rows have a count only.
    fn source(
        &self,
        table: &TableDef,
        projection: &SchemaRef,
        context: &PlanContext,
    ) -> Result<Arc<dyn SourceFactory>, TableError>;

    /// A sink into the table.
    fn sink(&self, table: &TableDef, input: &SinkInput, context: &PlanContext) -> Result<SinkNode, TableError>;

    /// The schema that a table must have if this connector fixes it (a generator); `None` if the declaration is free.
    fn fixed_schema(&self) -> Option<Schema> {
        None
    }
}

/// The connectors that a job may name.
#[derive(Clone, Default)]
pub struct Connectors {
    by_name: BTreeMap<&'static str, Arc<dyn Connector>>,
}

impl Connectors {
    /// Adds a connector under its name.
    #[must_use]
    pub fn with(mut self, connector: Arc<dyn Connector>) -> Self {
        self.by_name.insert(connector.name(), connector);
        self
    }

    /// The connector of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<dyn Connector>> {
        self.by_name.get(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.by_name.keys().copied()
    }
}
