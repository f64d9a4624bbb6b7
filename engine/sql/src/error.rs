//! What is wrong with the SQL: where, and what to do about it.

use std::fmt;

use datafusion_common::{DataFusionError, SchemaError};
use datafusion_sql::sqlparser::{parser::ParserError, tokenizer::Span};
use floodmark_dataflow::connector::Location;

/// Names further from what was written than this are not suggested.
const SIMILARITY_MIN: f64 = 0.6;

/// An error in the SQL of a job.
#[derive(Clone, Debug, thiserror::Error)]
pub struct SqlError {
    /// Where; `None` if it can't be told.
    pub location: Option<Location>,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub help: Option<String>,
    /// The line at fault, once [`SqlError::quoting`] has been called.
    line: Option<String>,
}

impl SqlError {
    pub(crate) fn at(location: Location, message: impl Into<String>) -> Self {
        Self { location: Some(location), message: message.into(), help: None, line: None }
    }

    pub(crate) fn nowhere(message: impl Into<String>) -> Self {
        Self { location: None, message: message.into(), help: None, line: None }
    }

    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Puts the error here unless it knows better.
    pub(crate) fn or_at(mut self, location: Location) -> Self {
        self.location = self.location.or(Some(location));
        self
    }

    /// Suggests the known name that is nearest to `name`, or lists them if they are few.
    pub(crate) fn suggest<'a>(self, name: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        let known: Vec<&str> = known.into_iter().collect();
        match nearest(name, known.iter().copied()) {
            Some(near) => self.help(format!("did you mean '{near}'?")),
            None if known.is_empty() || known.len() > 20 => self,
            None => self.help(format!("there is: {}", known.join(", "))),
        }
    }

    /// Quotes the line at fault.
    pub(crate) fn quoting(mut self, sql: &str) -> Self {
        let line = self.location.and_then(|l| sql.lines().nth(l.line.checked_sub(1)? as usize));
        self.line = line.map(str::to_owned);
        self
    }

    /// An error of sqlparser, whose text ends in the place.
    pub(crate) fn of_parser(error: &ParserError, end: Location) -> Self {
        let text = match error {
            ParserError::TokenizerError(text) | ParserError::ParserError(text) => text.clone(),
            ParserError::RecursionLimitExceeded => "expressions are nested too deeply".to_owned(),
        };
        let (message, location) = match text.rsplit_once(" at Line: ") {
            Some((message, place)) => (message.to_owned(), parse_place(place)),
            None => (text, None),
        };
        let message =
            message.replace("Expected", "expected").replace("expected: ", "expected ").replace(", found: ", ", found ");
        let message = message.replace("found EOF", "found the end of the statement");
        Self::at(location.filter(|l| l.line > 0).unwrap_or(end), format!("syntax error: {message}"))
    }

    /// An error of DataFusion's planner.
    pub(crate) fn of_planner(error: &DataFusionError) -> Self {
        let location =
            error.diagnostic().and_then(|d| d.span).map(|s| Location { line: s.start.line, column: s.start.column });
        let root = error.find_root();
        let mut planned = match root {
            DataFusionError::SchemaError(schema, _) => match &**schema {
                SchemaError::FieldNotFound { field, valid_fields } => {
                    let place = field.relation.as_ref().map_or(String::new(), |r| format!(" in '{r}'"));
                    let valid = valid_fields.iter().map(|f| f.name.as_str());
                    Self::nowhere(format!("unknown column '{}'{place}", field.name)).suggest(&field.name, valid)
                }
                SchemaError::AmbiguousReference { field } => {
                    Self::nowhere(format!("column '{}' is ambiguous", field.name))
                        .help("qualify it with the name of its table")
                }
                SchemaError::DuplicateQualifiedField { name, .. } | SchemaError::DuplicateUnqualifiedField { name } => {
                    Self::nowhere(format!("two columns are called '{name}'")).help("rename one of them with AS")
                }
            },
            other => {
                let text = other.strip_backtrace();
                let text = ["Error during planning: ", "This feature is not implemented: ", "Execution error: "]
                    .iter()
                    .find_map(|prefix| text.strip_prefix(prefix))
                    .unwrap_or(&text)
                    .to_owned();
                match text.strip_prefix("Field ").and_then(|t| t.strip_suffix(" not found in struct")) {
                    Some(field) => Self::nowhere(format!("unknown field '{field}'")),
                    None => Self::nowhere(text),
                }
            }
        };
        planned.location = location;
        planned
    }
}

impl fmt::Display for SqlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(location) = self.location {
            write!(f, "{location}: ")?;
        }
        f.write_str(&self.message)?;
        if let Some(help) = &self.help {
            write!(f, "; {help}")?;
        }
        if let (Some(line), Some(location)) = (&self.line, self.location) {
            let number = location.line.to_string();
            let margin = " ".repeat(number.len());
            let before: String = line
                .chars()
                .take(location.column.saturating_sub(1) as usize)
                .map(|c| if c == '\t' { '\t' } else { ' ' })
                .collect();
            write!(f, "\n  {number} | {line}\n  {margin} | {before}^")?;
        }
        Ok(())
    }
}

/// The known name most like `name`, if one is like it at all.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = name.to_lowercase();
    let distance = |known: &str| strsim::damerau_levenshtein(&lower, &known.to_lowercase());
    let similarity = |known: &str| strsim::jaro_winkler(&lower, &known.to_lowercase());
    known
        .into_iter()
        .map(|k| (distance(k), similarity(k), k))
        .filter(|(distance, similarity, _)| *distance <= 1 + lower.chars().count() / 3 && *similarity >= SIMILARITY_MIN)
        .min_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)))
        .map(|(_, _, k)| k)
}

/// `3, Column: 14`
fn parse_place(place: &str) -> Option<Location> {
    let (line, column) = place.split_once(", Column: ")?;
    Some(Location { line: line.trim().parse().ok()?, column: column.trim().parse().ok()? })
}

/// Where a span of sqlparser begins.
pub(crate) fn start(span: Span) -> Location {
    Location { line: span.start.line, column: span.start.column }
}
