//! Reads a table's `WITH (…)` list: typed, with the place of what is wrong.

use std::{str::FromStr, time::Duration};

use floodmark_dataflow::connector::{OptionValue, TableDef, TableError};

/// Prefix of options in which variables may stand: their values are looked at only by whoever connects.
pub(crate) const WITH_VARIABLES: &str = "properties.";

/// The options of one table, checked against what its connector knows.
pub(crate) struct Options<'a> {
    table: &'a TableDef,
}

impl<'a> Options<'a> {
    /// Refuses options that are neither in `known` nor begin with one of `prefixes`, and variables where they would show.
    pub(crate) fn new(table: &'a TableDef, known: &[&str], prefixes: &[&str]) -> Result<Self, TableError> {
        for (name, value) in &table.options {
            if known.contains(&name.as_str()) || prefixes.iter().any(|p| name.starts_with(p)) {
                if value.variables.is_some() && !name.starts_with(WITH_VARIABLES) {
                    return Err(TableError::option(
                        value,
                        format!(
                            "option '{name}': a variable can't stand here, because the value shows in plans, checkpoints and \
                             errors; variables are for options '{WITH_VARIABLES}*' (for a literal ${{ write $${{)"
                        ),
                    ));
                }
                continue;
            }
            let near = known.iter().max_by(|a, b| strsim::jaro(a, name).total_cmp(&strsim::jaro(b, name)));
            let hint = near
                .filter(|n| strsim::jaro(n, name) > 0.7)
                .map_or_else(|| format!("; known are {}", known.join(", ")), |n| format!("; did you mean '{n}'?"));
            return Err(TableError::option(value, format!("unknown option '{name}'{hint}")));
        }
        Ok(Self { table })
    }

    pub(crate) fn get(&self, name: &str) -> Option<&'a OptionValue> {
        self.table.options.get(name)
    }

    pub(crate) fn text(&self, name: &str) -> Option<&'a str> {
        self.get(name).map(|o| o.value.as_str())
    }

    pub(crate) fn required(&self, name: &str) -> Result<&'a str, TableError> {
        self.text(name).ok_or_else(|| TableError::table(format!("option '{name}' is missing")))
    }

    /// A number, or anything else with a parser.
    pub(crate) fn parsed<T: FromStr>(&self, name: &str, what: &str) -> Result<Option<T>, TableError> {
        let Some(option) = self.get(name) else { return Ok(None) };
        let parsed = option.value.trim().parse().map(Some);
        parsed.map_err(|_| TableError::option(option, format!("option '{name}': '{}' is not {what}", option.value)))
    }

    /// Rows or events a second.
    pub(crate) fn rate(&self, name: &str) -> Result<Option<f64>, TableError> {
        let rate: Option<f64> = self.parsed(name, "a number")?;
        match (rate.filter(|r| !r.is_finite() || *r <= 0.0), self.get(name)) {
            (Some(rate), Some(option)) => {
                Err(TableError::option(option, format!("option '{name}': '{rate}' is not a number above 0")))
            }
            _ => Ok(rate),
        }
    }

    pub(crate) fn flag(&self, name: &str) -> Result<bool, TableError> {
        Ok(self.parsed(name, "true or false")?.unwrap_or(false))
    }

    /// One of a few words; the first is the default.
    pub(crate) fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> Result<T, TableError> {
        let Some(option) = self.get(name) else { return Ok(choices[0].1) };
        let found = choices.iter().find(|c| c.0 == option.value);
        found.map(|c| c.1).ok_or_else(|| {
            let all: Vec<_> = choices.iter().map(|c| format!("'{}'", c.0)).collect();
            TableError::option(option, format!("option '{name}': '{}' is none of {}", option.value, all.join(", ")))
        })
    }

    pub(crate) fn duration(&self, name: &str) -> Result<Option<Duration>, TableError> {
        let Some(option) = self.get(name) else { return Ok(None) };
        parse_duration(&option.value).map(Some).ok_or_else(|| {
            let message = format!("option '{name}': '{}' is not a duration such as '500 ms' or '10 s'", option.value);
            TableError::option(option, message)
        })
    }
}

fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let unit = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..unit].parse().ok()?;
    match text[unit..].trim() {
        "ms" => Some(Duration::from_millis(number)),
        "s" | "sec" => Some(Duration::from_secs(number)),
        "min" | "m" => Some(Duration::from_secs(number.checked_mul(60)?)),
        "h" => Some(Duration::from_secs(number.checked_mul(3600)?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::datatypes::Schema;
    use floodmark_dataflow::connector::Location;

    use super::*;

    fn table(options: &[(&str, &str)]) -> TableDef {
        let value = |v: &str| OptionValue::parse(v, Location { line: 3, column: 5 }).unwrap();
        TableDef {
            name: "t".into(),
            schema: Arc::new(Schema::empty()),
            primary_key: Vec::new(),
            options: options.iter().map(|(k, v)| ((*k).to_owned(), value(v))).collect(),
            location: Location::default(),
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let unknown = table(&[("topik", "x")]);
        let error = Options::new(&unknown, &["topic", "format"], &["properties."]).err().unwrap();
        assert_eq!(error.message, "unknown option 'topik'; did you mean 'topic'?");
        assert_eq!(error.location, Some(Location { line: 3, column: 5 }));
        let wrong = table(&[("rate", "fast"), ("pause", "7"), ("mode", "never"), ("properties.x", "1")]);
        let options = Options::new(&wrong, &["rate", "pause", "mode"], &["properties."]).unwrap();
        let messages = [
            options.parsed::<u64>("rate", "a number").unwrap_err().message,
            options.duration("pause").unwrap_err().message,
            options.choice("mode", &[("bounded", 0), ("following", 1)]).unwrap_err().message,
            options.required("topic").unwrap_err().message,
        ];
        expect_test::expect![[r#"
            option 'rate': 'fast' is not a number
            option 'pause': '7' is not a duration such as '500 ms' or '10 s'
            option 'mode': 'never' is none of 'bounded', 'following'
            option 'topic' is missing"#]]
        .assert_eq(&messages.join("\n"));
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(parse_duration("500 ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_duration("10s"), Some(Duration::from_secs(10)));
        assert_eq!(parse_duration("2 min"), Some(Duration::from_secs(120)));
        assert_eq!(parse_duration("10"), None);
        assert_eq!(parse_duration("s"), None);
    }
}
