//! Figures, each beside its goal: told when they are known, and at the end as a table or as JSON. Plain data and text.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// One measured number.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    /// The command that measures it.
    pub(crate) of: &'static str,
    /// Under which circumstances.
    pub(crate) setting: String,
    /// What is measured.
    pub(crate) what: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// The least and the greatest of several measurements, of which `value` is the middle one.
    range: Option<(f64, f64)>,
    /// What it may be at most.
    goal: Option<f64>,
}

impl Figure {
    pub(crate) fn new(
        of: &'static str,
        setting: impl Into<String>,
        what: impl Into<String>,
        value: f64,
        unit: &'static str,
    ) -> Self {
        Self { of, setting: setting.into(), what: what.into(), value, unit, range: None, goal: None }
    }

    /// The middle one of several measurements.
    pub(crate) fn median(
        of: &'static str,
        setting: impl Into<String>,
        what: impl Into<String>,
        values: &Spread,
        unit: &'static str,
    ) -> Self {
        let range = Some((values.at(0.0), values.at(1.0)));
        Self { range, ..Self::new(of, setting, what, values.at(0.5), unit) }
    }

    /// The same with a goal: the value shall be at most this.
    pub(crate) fn at_most(self, goal: impl Into<Option<f64>>) -> Self {
        Self { goal: goal.into(), ..self }
    }

    /// Whether it meets its goal; `None` without one.
    pub(crate) fn met(&self) -> Option<bool> {
        self.goal.map(|goal| self.value <= goal)
    }

    fn verdict(&self) -> &'static str {
        match self.met() {
            Some(true) => "met",
            Some(false) => "missed",
            None => "",
        }
    }

    /// Range, goal and verdict as the table has them.
    fn range_and_goal(&self) -> (String, String) {
        let range = self.range.map_or_else(String::new, |(least, most)| format!("{}-{}", short(least), short(most)));
        let goal = self.goal.map_or_else(String::new, |goal| format!("<= {}", short(goal)));
        (range, goal)
    }
}

/// Three digits that count: enough for a measurement, and short.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// Measurements in ascending order; at least one.
#[derive(Clone, Debug)]
pub(crate) struct Spread(Vec<f64>);

impl Spread {
    /// `None` of no measurements.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        (!values.is_empty()).then_some(Self(values))
    }

    /// The value that this share of the measurements does not surpass: 0 the least, 0.5 the middle, 1 the greatest.
    pub(crate) fn at(&self, share: f64) -> f64 {
        self.0[((self.0.len() - 1) as f64 * share).ceil() as usize]
    }
}

/// What has been measured so far.
#[derive(Debug, Default)]
pub(crate) struct Report {
    figures: Vec<Figure>,
    runs: Vec<Value>,
}

impl Report {
    /// Says what is being done now, and how busy the machine is.
    pub(crate) fn doing(&self, what: &str) {
        eprintln!("[load {:.1}] {what}", load_average());
    }

    /// Adds a figure, and tells it.
    pub(crate) fn add(&mut self, figure: Figure) {
        let (range, goal) = figure.range_and_goal();
        let more: Vec<String> =
            [range, goal, figure.verdict().to_owned()].into_iter().filter(|m| !m.is_empty()).collect();
        let more = if more.is_empty() { String::new() } else { format!(" ({})", more.join(", ")) };
        let Figure { of, setting, what, value, unit, .. } = &figure;
        eprintln!("  {of}: {setting}: {what}: {} {unit}{more}", short(*value));
        self.figures.push(figure);
    }

    /// Keeps what a single run came to, for the JSON.
    pub(crate) fn run(&mut self, run: Value) {
        eprintln!("  {run}");
        self.runs.push(run);
    }

    /// Whether every figure with a goal meets it.
    pub(crate) fn kept(&self) -> bool {
        self.figures.iter().all(|f| f.met() != Some(false))
    }

    /// All figures, a line each.
    pub(crate) fn table(&self) -> String {
        let header = ["figure", "setting", "what", "value", "unit", "(range)", "goal", ""].map(str::to_owned);
        let rows = self.figures.iter().map(|figure| {
            let (range, goal) = figure.range_and_goal();
            let Figure { of, setting, what, value, unit, .. } = figure;
            let (of, unit, verdict) = ((*of).to_owned(), (*unit).to_owned(), figure.verdict().to_owned());
            [of, setting.clone(), what.clone(), short(*value), unit, range, goal, verdict]
        });
        let rows: Vec<[String; 8]> = std::iter::once(header).chain(rows).collect();
        let mut widths = [0; 8];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in &rows {
            let mut line = String::new();
            for (n, (cell, width)) in row.iter().zip(widths).enumerate() {
                // Numbers stand below each other by their ends.
                let _ = if n == 3 { write!(line, "{cell:>width$}  ") } else { write!(line, "{cell:<width$}  ") };
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }

    /// All figures and runs.
    pub(crate) fn json(&self) -> Value {
        let figures = self.figures.iter().map(|figure| {
            let Figure { of, setting, what, value, unit, range, goal } = figure;
            json!({
                "figure": of, "setting": setting, "what": what, "value": rounded(*value), "unit": unit,
                "least": range.map(|r| rounded(r.0)), "greatest": range.map(|r| rounded(r.1)),
                "goal": goal, "met": figure.met(),
            })
        });
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        json!({
            "machine": { "cores": cores, "load": load_average() },
            "figures": figures.collect::<Vec<_>>(), "runs": self.runs,
        })
    }
}

/// To the sixth decimal: below that there is only noise.
pub(crate) fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// The load average of the last minute; 0 where the system has none.
pub(crate) fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_measurements_is_not_surpassed() {
        let spread = Spread::of([5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        assert_eq!([0.0, 0.5, 0.75, 0.99, 1.0].map(|share| spread.at(share)), [1.0, 3.0, 4.0, 5.0, 5.0]);
        assert!(Spread::of([]).is_none());
    }

    #[test]
    fn a_goal_is_met_or_missed_and_one_that_is_missed_is_not_kept() {
        let figure = |value: f64| Figure::new("pause", "Heap", "barrier", value, "ms");
        let mut report = Report::default();
        report.add(figure(5.0).at_most(5.0));
        report.add(figure(7.0));
        assert!(report.kept());
        let values = Spread::of([0.25, 1234.0, 5.25]).unwrap();
        report.add(Figure::median("pause", "RocksDB", "barrier", &values, "ms").at_most(5.0));
        assert!(!report.kept());
        let expected = "\
figure  setting  what     value  unit  (range)     goal
pause   Heap     barrier   5.00  ms                <= 5.00  met
pause   Heap     barrier   7.00  ms
pause   RocksDB  barrier   5.25  ms    0.250-1234  <= 5.00  missed
";
        assert_eq!(report.table(), expected);
        let json = report.json();
        assert_eq!((&json["figures"][2]["met"], &json["figures"][2]["greatest"]), (&json!(false), &json!(1234.0)));
        assert_eq!(json["figures"][1]["met"], Value::Null);
    }
}
