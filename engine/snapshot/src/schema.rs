//! The types of an operator's state, and which changes of them a restore can take. Pure data.
//!
//! What a state *is* (its form) and its key never change. Columns may come: they begin empty for the rows that are there.
//! Columns may go if the user gives their state up. A column of another type is another column, and refused.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One column of state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StateColumn {
    /// Its name, unique in its schema.
    pub name: String,
    /// Its type, in Arrow's words: `Int64`, `Decimal128(38, 2)`.
    pub data_type: String,
    /// Whether rows without a value for it are valid, so that a state without the column can be taken over.
    pub optional: bool,
}

impl fmt::Display for StateColumn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.data_type)
    }
}

/// The types of an operator's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StateSchema {
    /// What the state is, with all that must stay as it is: `partial aggregates of HOP(2 s, 10 s)`.
    pub form: String,
    /// The key. Must stay as it is: it decides where rows live.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<StateColumn>,
    /// What is kept for each key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<StateColumn>,
}

impl fmt::Display for StateSchema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |columns: &[StateColumn]| columns.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        f.write_str(&self.form)?;
        if !self.keys.is_empty() {
            write!(f, " by ({})", list(&self.keys))?;
        }
        if !self.values.is_empty() {
            write!(f, ": {}", list(&self.values))?;
        }
        Ok(())
    }
}

/// State without columns of its own.
impl From<&str> for StateSchema {
    fn from(form: &str) -> Self {
        Self { form: form.to_owned(), keys: Vec::new(), values: Vec::new() }
    }
}

/// What becomes of a state whose types have changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evolution {
    /// Columns that begin empty.
    pub added: Vec<String>,
    /// Columns whose state is lost.
    pub dropped: Vec<String>,
    /// Why it can't be taken over at all. Empty if it can.
    pub refused: Vec<String>,
}

impl StateSchema {
    /// What becomes of state of these types if an operator of `new` takes it over.
    #[must_use]
    pub fn evolve(&self, new: &Self) -> Evolution {
        let mut evolution = Evolution::default();
        if self.form != new.form {
            evolution.refused.push(format!("it was [{}] and is now [{}]", self.form, new.form));
        }
        if self.keys != new.keys {
            let list = |columns: &[StateColumn]| columns.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let (old, new) = (list(&self.keys), list(&new.keys));
            evolution.refused.push(format!("its key was ({old}) and is now ({new})"));
        }
        for old in &self.values {
            match new.values.iter().find(|c| c.name == old.name) {
                Some(same) if same.data_type == old.data_type => {}
                Some(other) => evolution
                    .refused
                    .push(format!("column {} was {} and is now {}", old.name, old.data_type, other.data_type)),
                None => evolution.dropped.push(old.name.clone()),
            }
        }
        for column in new.values.iter().filter(|c| self.values.iter().all(|old| old.name != c.name)) {
            if column.optional {
                evolution.added.push(column.name.clone());
            } else {
                evolution.refused.push(format!("column {column} is new and can't begin empty"));
            }
        }
        evolution
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    /// `form | key columns | value columns`, each `name type`; a value with `!` must not be missing.
    fn schema(text: &str) -> StateSchema {
        let mut parts = text.split('|').map(str::trim);
        let form = parts.next().unwrap().to_owned();
        let mut columns = || {
            let list = parts.next().unwrap_or_default();
            let column = |c: &str| {
                let (name, data_type) = c.trim().split_once(' ').unwrap();
                let optional = !data_type.ends_with('!');
                StateColumn { name: name.to_owned(), data_type: data_type.trim_end_matches('!').to_owned(), optional }
            };
            list.split(',').filter(|c| !c.trim().is_empty()).map(column).collect()
        };
        StateSchema { form, keys: columns(), values: columns() }
    }

    fn check(old: &str, new: &str, expected: Expect) {
        let Evolution { added, dropped, refused } = schema(old).evolve(&schema(new));
        expected.assert_eq(&format!("added {added:?}, dropped {dropped:?}, refused {refused:?}"));
    }

    #[test]
    fn equal_types_change_nothing() {
        check("agg | k Int64 | n Int64", "agg | k Int64 | n Int64", expect!["added [], dropped [], refused []"]);
    }

    #[test]
    fn columns_come_empty_and_go_with_their_state() {
        check(
            "agg | k Int64 | n Int64",
            "agg | k Int64 | s Int64, n Int64",
            expect![[r#"added ["s"], dropped [], refused []"#]],
        );
        check(
            "agg | k Int64 | n Int64, s Int64",
            "agg | k Int64 | n Int64",
            expect![[r#"added [], dropped ["s"], refused []"#]],
        );
    }

    #[test]
    fn another_form_key_or_type_is_refused_with_its_reason() {
        check(
            "agg | k Int64 | n Int64",
            "window | k Utf8 | n Int32, m Int64!",
            expect![[
                r#"added [], dropped [], refused ["it was [agg] and is now [window]", "its key was (k Int64) and is now (k Utf8)", "column n was Int64 and is now Int32", "column m Int64 is new and can't begin empty"]"#
            ]],
        );
    }
}
