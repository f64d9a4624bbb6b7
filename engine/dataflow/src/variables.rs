//! Variables in the values of a table's options: `${NAME}` stands for a variable of the process that connects, `$${` for `${`
//! itself. Pure: whoever resolves a text says where values come from.
//!
//! Invariant: a text shows as it was written; what its variables stand for is only in what [`Template::resolve`] answers.

use std::fmt;

/// A text with variables in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Variable(String),
}

impl Template {
    /// Reads a text.
    ///
    /// # Errors
    /// Says what is wrong with a `${` that begins no variable, and how to write what was meant.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find("${") {
            let (before, from) = rest.split_at(at);
            if let Some(before) = before.strip_suffix('$') {
                plain += before;
                plain += "${";
                rest = &from[2..];
                continue;
            }
            plain += before;
            let wrong = || "'${' begins no variable; write ${NAME}, or $${ for a literal ${".to_owned();
            let (name, behind) = from[2..].split_once('}').ok_or_else(wrong)?;
            if !is_name(name) {
                return Err(wrong());
            }
            if !plain.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut plain)));
            }
            parts.push(Part::Variable(name.to_owned()));
            rest = behind;
        }
        plain += rest;
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        Ok(Self(parts))
    }

    /// The text that it is; `None` if that depends on variables.
    #[must_use]
    pub fn literal(&self) -> Option<&str> {
        match &self.0[..] {
            [] => Some(""),
            [Part::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// Names of its variables, in their order; one that stands twice is named twice.
    pub fn variables(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| match part {
            Part::Text(_) => None,
            Part::Variable(name) => Some(name.as_str()),
        })
    }

    /// The text with the values of its variables.
    ///
    /// # Errors
    /// Names the first variable that has none.
    pub fn resolve(&self, value_of: impl Fn(&str) -> Option<String>) -> Result<String, Unset> {
        let part = |part: &Part| match part {
            Part::Text(text) => Ok(text.clone()),
            Part::Variable(name) => value_of(name).ok_or_else(|| Unset(name.clone())),
        };
        self.0.iter().map(part).collect()
    }
}

/// A variable that has no value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unset(pub String);

impl fmt::Display for Unset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "variable {} is not set in the environment of this process", self.0)
    }
}

fn is_name(name: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    name.starts_with(|c: char| word(c) && !c.is_ascii_digit()) && name.chars().all(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_found_and_dollars_stay_what_they_are() {
        let value = |name: &str| (name != "GONE").then(|| format!("<{name}>"));
        let cases = [
            ("", Ok("")),
            ("plain", Ok("plain")),
            ("${A}", Ok("<A>")),
            ("a ${A_1}:${_b} z", Ok("a <A_1>:<_b> z")),
            ("$${A}", Ok("${A}")),
            ("$${A} ${A}", Ok("${A} <A>")),
            ("$$${A}", Ok("$${A}")),
            ("$5 {A} $A $", Ok("$5 {A} $A $")),
            ("${A}}", Ok("<A>}")),
            ("ü${A}ü", Ok("ü<A>ü")),
            ("${GONE}", Err("GONE")),
        ];
        for (text, expected) in cases {
            let template = Template::parse(text).unwrap();
            let resolved = template.resolve(value);
            let resolved = resolved.as_ref().map(String::as_str).map_err(|unset| unset.0.as_str());
            assert_eq!(resolved, expected, "{text}");
            assert_eq!(template.literal().is_some(), template.variables().next().is_none(), "{text}");
        }
        let names = Template::parse("${A}${B}-${A}").unwrap();
        assert_eq!(names.variables().collect::<Vec<_>>(), ["A", "B", "A"]);
    }

    #[test]
    fn what_begins_no_variable_is_refused() {
        for text in ["${", "a ${A", "${}", "${1A}", "${A B}", "${A-B}", "${${A}}", "${ä}"] {
            let error = Template::parse(text).unwrap_err();
            assert!(error.starts_with("'${' begins no variable"), "{text}: {error}");
        }
    }
}
