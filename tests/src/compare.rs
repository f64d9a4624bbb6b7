//! Compares what a job wrote with what it should have written, and shows the first rows that differ. Pure.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::events::parse_timestamp;

/// Rows that a difference shows of each kind.
const SHOWN_MAX: usize = 10;

/// A row as plain text, a field per column; timestamps are milliseconds since the Unix epoch.
pub type Row = Vec<String>;

/// How a column of JSON output becomes a field of a [`Row`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// A number or a text, as it stands.
    Plain(&'static str),
    /// A timestamp.
    Time(&'static str),
}

/// Reads one JSON object.
///
/// # Errors
/// When it is no object or lacks a column.
pub fn row_of_json(json: &[u8], columns: &[Column]) -> Result<Row> {
    let shown = || String::from_utf8_lossy(json).into_owned();
    let value: Value = serde_json::from_slice(json).with_context(|| format!("output row {}", shown()))?;
    let field = |column: &Column| {
        let (Column::Plain(name) | Column::Time(name)) = column;
        let value = value.get(name).with_context(|| format!("no column '{name}' in output row {}", shown()))?;
        match (column, value) {
            (Column::Time(_), Value::String(text)) => Ok(parse_timestamp(text)?.to_string()),
            (Column::Time(_), other) => bail!("column '{name}' is no timestamp but {other}"),
            (Column::Plain(_), Value::String(text)) => Ok(text.clone()),
            (Column::Plain(_), other) => Ok(other.to_string()),
        }
    };
    columns.iter().map(field).collect()
}

/// How two multisets of rows differ.
#[derive(Debug)]
pub struct Difference {
    expected: u64,
    actual: u64,
    /// Rows that should be there and how many of them are not.
    missing: BTreeMap<Row, u64>,
    /// Rows that are there and how many of them should not.
    unexpected: BTreeMap<Row, u64>,
}

impl Difference {
    /// Rows that should be there and are not.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.missing.values().sum()
    }

    /// Rows that are there and should not, repeated ones among them.
    #[must_use]
    pub fn unexpected(&self) -> u64 {
        self.unexpected.values().sum()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rows expected, {} found: {} missing, {} unexpected",
            self.expected,
            self.actual,
            self.missing(),
            self.unexpected()
        )?;
        for (sign, rows) in [('-', &self.missing), ('+', &self.unexpected)] {
            for (row, count) in rows.iter().take(SHOWN_MAX) {
                write!(f, "\n  {sign} {}", row.join(" | "))?;
                if *count > 1 {
                    write!(f, "   ({count} times)")?;
                }
            }
            if rows.len() > SHOWN_MAX {
                write!(f, "\n  {sign} … {} more", rows.len() - SHOWN_MAX)?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Difference {}

/// Whether both hold the same rows equally often, in whatever order. Answers with the number of rows.
///
/// # Errors
/// How they differ.
pub fn multiset(
    expected: impl IntoIterator<Item = Row>,
    actual: impl IntoIterator<Item = Row>,
) -> Result<u64, Difference> {
    let (mut counts, mut found, mut wanted) = (BTreeMap::<Row, i64>::new(), 0, 0);
    for row in expected {
        *counts.entry(row).or_default() += 1;
        wanted += 1;
    }
    for row in actual {
        *counts.entry(row).or_default() -= 1;
        found += 1;
    }
    counts.retain(|_, count| *count != 0);
    if counts.is_empty() {
        return Ok(found);
    }
    let (missing, unexpected): (BTreeMap<_, _>, BTreeMap<_, _>) = counts.into_iter().partition(|(_, c)| *c > 0);
    let sizes = |rows: BTreeMap<Row, i64>| rows.into_iter().map(|(row, c)| (row, c.unsigned_abs())).collect();
    Err(Difference { expected: wanted, actual: found, missing: sizes(missing), unexpected: sizes(unexpected) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str) -> Vec<Row> {
        text.split_whitespace().map(|row| row.split(',').map(str::to_owned).collect()).collect()
    }

    #[test]
    fn equal_multisets_are_equal_in_any_order() {
        assert_eq!(multiset(rows("a,1 b,2 a,1"), rows("a,1 a,1 b,2")).unwrap(), 3);
        assert_eq!(multiset(rows(""), rows("")).unwrap(), 0);
    }

    #[test]
    fn a_row_too_few_or_too_many_is_shown() {
        let difference = multiset(rows("a,1 b,2 c,3"), rows("a,1 a,1 a,1 c,3 d,4")).unwrap_err();
        assert_eq!((difference.missing(), difference.unexpected()), (1, 3));
        assert_eq!(
            difference.to_string(),
            "3 rows expected, 5 found: 1 missing, 3 unexpected\n  - b | 2\n  + a | 1   (2 times)\n  + d | 4"
        );
    }

    #[test]
    fn json_becomes_fields_in_the_order_asked_for() {
        let columns = [Column::Plain("n"), Column::Time("at"), Column::Plain("shop")];
        let row = row_of_json(br#"{"shop":"a","at":"1970-01-01 00:00:01","n":5,"x":null}"#, &columns).unwrap();
        assert_eq!(row, ["5", "1000", "a"]);
        let error = row_of_json(br#"{"shop":"a"}"#, &columns).unwrap_err().to_string();
        assert!(error.starts_with("no column 'n' in output row"), "{error}");
    }
}
