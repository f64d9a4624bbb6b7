//! What a running job shows of itself: a few live lines on a terminal, else a log line now and then.
//!
//! The text is made by pure functions of two views and the time between them; [`Display`] is the thread that draws it.
//! Invariant: the display only reads counters, so it can neither slow the job down nor fail it.

use std::{
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use floodmark_dataflow::WATERMARK_MAX;
use floodmark_snapshot::{Env, Error, env::spawn_thread};
use floodmark_worker::{JobPhase, OperatorStatus, Progress, ProgressView};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::{screen::Screen, summary::Table};

/// From one drawing to the next on a terminal.
const REDRAW: Duration = Duration::from_millis(500);
/// From one log line to the next without a terminal.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The thread that shows progress.
pub(crate) struct Display {
    finish: mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

impl Display {
    /// Starts showing `progress` until [`Display::finish`].
    pub(crate) fn start(progress: Arc<Progress>, env: Env, screen: Screen) -> Result<Self, Error> {
        let (finish, finished) = mpsc::channel();
        let thread = spawn_thread("progress".to_owned(), move || {
            let every = if screen.bars().is_some() { REDRAW } else { LOG_EVERY };
            let mut live = screen.bars().map(LiveLines::new);
            let mut before = Moment::now(&progress, &env);
            while let Err(mpsc::RecvTimeoutError::Timeout) = finished.recv_timeout(every) {
                let now = Moment::now(&progress, &env);
                match &mut live {
                    Some(live) => live.draw(&live_lines(&before, &now)),
                    None if now.view.phase != JobPhase::Done => tracing::info!("{}", log_line(&before, &now)),
                    None => {}
                }
                before = now;
            }
            screen.clear();
        })?;
        Ok(Self { finish, thread })
    }

    /// Removes the live lines and ends the thread.
    pub(crate) fn finish(self) {
        // The thread ends only through this message or with the sender's end; either way it can be joined.
        let _ = self.finish.send(());
        let _ = self.thread.join();
    }
}

/// Lines at the bottom of a terminal, each cut to its width.
struct LiveLines {
    bars: MultiProgress,
    lines: Vec<ProgressBar>,
}

impl LiveLines {
    fn new(bars: &MultiProgress) -> Self {
        Self { bars: bars.clone(), lines: Vec::new() }
    }

    fn draw(&mut self, texts: &[String]) {
        while self.lines.len() < texts.len() {
            let style = ProgressStyle::with_template("{wide_msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
            self.lines.push(self.bars.add(ProgressBar::new_spinner().with_style(style)));
        }
        for (line, text) in self.lines.iter().zip(texts) {
            line.set_message(text.clone());
            line.tick();
        }
    }
}

/// A job at a time.
struct Moment {
    view: ProgressView,
    at: Duration,
    wall_ms: i64,
}

impl Moment {
    fn now(progress: &Progress, env: &Env) -> Self {
        Self { view: progress.view(), at: env.clock.monotonic(), wall_ms: env.clock.wall_ms() }
    }

    /// Rows per second of an operator since `before`: what it took in, or gave out if it takes nothing (a source).
    fn rate(&self, before: &Self, operator: &OperatorStatus) -> f64 {
        let handled = |o: &OperatorStatus| o.rows_in.max(o.rows_out);
        let earlier = before.view.operators.iter().find(|o| o.uid == operator.uid).map_or(0, handled);
        let seconds = (self.at - before.at).as_secs_f64();
        if seconds > 0.0 { handled(operator).saturating_sub(earlier) as f64 / seconds } else { 0.0 }
    }

    fn checkpoint(&self) -> String {
        let counts = &self.view.checkpoints;
        let some = |n: u64, what: &str| if n > 0 { format!(", {n} {what}") } else { String::new() };
        let failed = some(counts.failed, "failed") + &some(counts.overtaken, "overtaken");
        match counts.last {
            None => format!("no checkpoint yet{failed}"),
            Some(last) => format!(
                "checkpoint {} {} ago, took {}, {}{failed}",
                last.epoch,
                duration(self.wall_ms - last.triggered_at_ms - last.duration_ms as i64),
                duration(last.duration_ms as i64),
                bytes(last.size)
            ),
        }
    }

    fn watermark(&self, operator: &OperatorStatus) -> String {
        match operator.watermark {
            None => String::new(),
            Some(watermark) if watermark >= WATERMARK_MAX => "  input ended".to_owned(),
            Some(watermark) => format!("  watermark lag {}", duration(self.wall_ms.saturating_sub(watermark))),
        }
    }
}

/// A line for the job, and one for each operator.
fn live_lines(before: &Moment, now: &Moment) -> Vec<String> {
    let mut lines = vec![format!("{}  {}", phase(&now.view), now.checkpoint())];
    let width = now.view.operators.iter().map(|o| o.uid.0.chars().count()).max().unwrap_or(0);
    for operator in &now.view.operators {
        let mut line = format!(
            "  {:<width$}  {:>14}  {:>12} rows",
            operator.uid.0,
            format!("{} rows/s", count(now.rate(before, operator))),
            count(operator.rows_in.max(operator.rows_out) as f64)
        );
        line.push_str(&now.watermark(operator));
        for (n, what) in [(operator.state_rows, "keys"), (operator.late, "late"), (operator.bad, "bad")] {
            if n > 0 {
                line.push_str(&format!("  {} {what}", count(n as f64)));
            }
        }
        lines.push(line);
    }
    lines
}

/// The job in one line: sources and sinks only.
fn log_line(before: &Moment, now: &Moment) -> String {
    let mut parts = vec![phase(&now.view).to_owned()];
    for operator in &now.view.operators {
        let table = match Table::of(&operator.uid) {
            Some(Table::Source(table)) => format!("from {table}"),
            Some(Table::Sink(table)) => format!("to {table}"),
            None => continue,
        };
        let rate = count(now.rate(before, operator));
        let total = count(operator.rows_in.max(operator.rows_out) as f64);
        let lag = now.watermark(operator).trim_start().to_owned();
        let lag = if lag.is_empty() || table.starts_with("to ") { String::new() } else { format!(", {lag}") };
        parts.push(format!("{rate} rows/s {table} ({total} so far{lag})"));
    }
    parts.push(now.checkpoint());
    parts.join("; ")
}

fn phase(view: &ProgressView) -> &'static str {
    match view.phase {
        JobPhase::Restoring if view.attempt.waiting => "waiting",
        JobPhase::Restoring => "restoring",
        JobPhase::Running => "running",
        JobPhase::Stopping => "stopping",
        JobPhase::Done => "done",
    }
}

/// A number in at most four digits: `950`, `12.3 k`, `1.20 M`.
pub(crate) fn count(n: f64) -> String {
    for (unit, size) in [("G", 1e9), ("M", 1e6), ("k", 1e3)] {
        if n >= size {
            let scaled = n / size;
            let digits = if scaled >= 100.0 {
                0
            } else if scaled >= 10.0 {
                1
            } else {
                2
            };
            return format!("{scaled:.digits$} {unit}");
        }
    }
    format!("{n:.0}")
}

/// A size: `512 B`, `1.2 MiB`.
pub(crate) fn bytes(n: u64) -> String {
    for (unit, shift) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if n >> shift > 0 {
            return format!("{:.1} {unit}", n as f64 / (1_u64 << shift) as f64);
        }
    }
    format!("{n} B")
}

/// Milliseconds in one unit: `250 ms`, `3.2 s`, `5 min`, `7 h`, `12 d`; nothing is less than 0.
pub(crate) fn duration(ms: i64) -> String {
    let ms = ms.max(0);
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1e3),
        60_000..7_200_000 => format!("{} min", ms / 60_000),
        7_200_000..172_800_000 => format!("{} h", ms / 3_600_000),
        _ => format!("{} d", ms / 86_400_000),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use floodmark_snapshot::Epoch;
    use floodmark_worker::{CheckpointCounts, CheckpointStatus};

    use super::*;

    fn operator(uid: &str, rows_in: u64, rows_out: u64, watermark: Option<i64>) -> OperatorStatus {
        OperatorStatus { rows_in, rows_out, watermark, ..OperatorStatus::new(&uid.into(), "operator") }
    }

    fn moment(seconds: u64, operators: Vec<OperatorStatus>) -> Moment {
        let last = CheckpointStatus { epoch: Epoch(12), triggered_at_ms: 4_000, duration_ms: 120, size: 1_500_000 };
        let checkpoints = CheckpointCounts { completed: 3, failed: 1, overtaken: 2, last: Some(last) };
        Moment {
            view: ProgressView { phase: JobPhase::Running, checkpoints, operators, ..ProgressView::default() },
            at: Duration::from_secs(seconds),
            wall_ms: 10_000,
        }
    }

    #[test]
    fn rates_lag_and_the_last_checkpoint_are_shown() {
        let before = moment(1, vec![operator("source:bid", 0, 1_000, None), operator("sink:hot", 10, 0, None)]);
        let mut counted = operator("hot/window-aggregate-1", 500, 20, Some(WATERMARK_MAX));
        counted.late = 2;
        counted.state_rows = 12_345;
        let source = operator("source:bid", 0, 2_401_000, Some(8_800));
        let now = moment(3, vec![source, counted, operator("sink:hot", 30, 0, Some(1))]);
        expect![[r#"
            running  checkpoint 12 5.9 s ago, took 120 ms, 1.4 MiB, 1 failed, 2 overtaken
              source:bid               1.20 M rows/s        2.40 M rows  watermark lag 1.2 s
              hot/window-aggregate-1      250 rows/s           500 rows  input ended  12.3 k keys  2 late
              sink:hot                     10 rows/s            30 rows  watermark lag 10.0 s"#]]
        .assert_eq(&live_lines(&before, &now).join("\n"));
        expect!["running; 1.20 M rows/s from bid (2.40 M so far, watermark lag 1.2 s); 10 rows/s to hot (30 so far); checkpoint 12 5.9 s ago, took 120 ms, 1.4 MiB, 1 failed, 2 overtaken"]
            .assert_eq(&log_line(&before, &now));
    }

    #[test]
    fn numbers_are_short_at_every_size() {
        let counts = [0.0, 999.0, 1_000.0, 12_345.0, 999_000.0, 1.2e6, 3.4e10].map(count);
        assert_eq!(counts, ["0", "999", "1.00 k", "12.3 k", "999 k", "1.20 M", "34.0 G"]);
        assert_eq!([0, 1_023, 1_024, 5 << 20, 3 << 30].map(bytes), ["0 B", "1023 B", "1.0 KiB", "5.0 MiB", "3.0 GiB"]);
        let durations = [-5, 999, 1_500, 61_000, 7_200_000, 200_000_000].map(duration);
        assert_eq!(durations, ["0 ms", "999 ms", "1.5 s", "1 min", "2 h", "2 d"]);
    }
}
