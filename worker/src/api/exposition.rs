//! Prometheus' text format, version 0.0.4: families of samples, each with its help and type before them. No I/O.
//!
//! Invariant: whatever a label's value or a help text holds, it stays on its line and within its quotes.

use std::fmt::{Display, Write};

/// Of what is written here.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a family's samples are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// They only grow, but for a new process.
    Counter,
    /// They are of the moment.
    Gauge,
}

/// A text that grows by families.
#[derive(Default)]
pub(super) struct Exposition(String);

/// Takes the samples of one family.
pub(super) struct Family<'a> {
    text: &'a mut String,
    name: String,
}

impl Exposition {
    /// Begins a family. Its name comes of us, is no other's, and ends in its unit (and `_total` if it counts).
    pub(super) fn family(&mut self, name: impl Into<String>, kind: Kind, help: &str) -> Family<'_> {
        let name = name.into();
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        // Writing to a string can't fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        Family { text: &mut self.0, name }
    }

    /// A family of one sample without labels.
    pub(super) fn single(&mut self, name: &str, kind: Kind, help: &str, value: impl Value) {
        self.family(name, kind, help).sample(&[], value);
    }

    /// All of it.
    pub(super) fn finish(self) -> String {
        self.0
    }
}

impl Family<'_> {
    /// Adds a sample. No two of a family have the same labels.
    pub(super) fn sample(&mut self, labels: &[(&str, &dyn Display)], value: impl Value) {
        self.text.push_str(&self.name);
        for (at, (name, value)) in labels.iter().enumerate() {
            let before = if at == 0 { '{' } else { ',' };
            let value = value.to_string().replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.text, "{before}{name}=\"{value}\"");
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        self.text.push(' ');
        value.write(self.text);
        self.text.push('\n');
    }
}

/// What a sample can be.
pub(super) trait Value {
    /// Adds it to the text.
    fn write(&self, text: &mut String);
}

impl Value for u64 {
    fn write(&self, text: &mut String) {
        let _ = write!(text, "{self}");
    }
}

impl Value for bool {
    fn write(&self, text: &mut String) {
        u64::from(*self).write(text);
    }
}

impl Value for f64 {
    fn write(&self, text: &mut String) {
        if self.is_infinite() {
            text.push_str(if *self > 0.0 { "+Inf" } else { "-Inf" });
        } else {
            let _ = write!(text, "{self}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_written_as_the_format_says() {
        let mut all = Exposition::default();
        all.single("a_total", Kind::Counter, "One \\ or\ntwo.", 3);
        let mut family = all.family("b_seconds", Kind::Gauge, "Some.");
        family.sample(&[("x", &"a\"b\\c\nd"), ("y", &7)], 1.5);
        family.sample(&[("x", &""), ("y", &8)], f64::INFINITY);
        family.sample(&[("x", &"ü{}"), ("y", &9)], -0.25e-7);
        all.single("c", Kind::Gauge, "", true);
        assert_eq!(
            all.finish(),
            concat!(
                "# HELP a_total One \\\\ or\\ntwo.\n# TYPE a_total counter\na_total 3\n",
                "# HELP b_seconds Some.\n# TYPE b_seconds gauge\n",
                "b_seconds{x=\"a\\\"b\\\\c\\nd\",y=\"7\"} 1.5\n",
                "b_seconds{x=\"\",y=\"8\"} +Inf\n",
                "b_seconds{x=\"ü{}\",y=\"9\"} -0.000000025\n",
                "# HELP c \n# TYPE c gauge\nc 1\n",
            )
        );
    }
}
