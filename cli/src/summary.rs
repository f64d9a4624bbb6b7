//! What a run prints at its end: a few lines for people, or one JSON object for programs. Its field names are stable.

use std::collections::BTreeMap;

use floodmark_snapshot::OperatorUid;
use floodmark_worker::{OperatorStatus, ProgressView};
use serde::Serialize;

use crate::display::{bytes, duration};

/// The outside of the job that an operator stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table<'a> {
    /// It reads this table.
    Source(&'a str),
    /// It writes this table.
    Sink(&'a str),
}

impl<'a> Table<'a> {
    /// The table of an operator uid: `source:bid`, `sink:hot` or, for a further insert into it, `sink:hot#2`.
    pub(crate) fn of(uid: &'a OperatorUid) -> Option<Self> {
        match uid.0.split_once(':')? {
            ("source", table) => Some(Self::Source(table)),
            ("sink", table) => Some(Self::Sink(table.rsplit_once('#').map_or(table, |(table, _)| table))),
            _ => None,
        }
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum RunOutcome {
    /// All input is processed.
    Finished,
    /// Stopped when asked to.
    Stopped,
    /// An earlier run had processed all input; nothing was done.
    AlreadyFinished,
    /// Others go on with it.
    HandedOver,
    /// It failed while it ran.
    Failed,
    /// A newer process has taken over.
    Fenced,
    /// It never started.
    Refused,
}

/// The summary of a run.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RunReport {
    /// `namespace/name/uid`; empty if the manifest could not be read.
    pub(crate) job: String,
    pub(crate) outcome: RunOutcome,
    /// Why, if it didn't end well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    pub(crate) exit_code: u8,
    /// Epoch of the checkpoint that it started from.
    pub(crate) restored_from: Option<u64>,
    /// Rows read, by table.
    pub(crate) rows_in: BTreeMap<String, u64>,
    /// Rows written, by table.
    pub(crate) rows_out: BTreeMap<String, u64>,
    /// Rows that came after their window had closed.
    pub(crate) late: u64,
    /// Records that could not be decoded, by table.
    pub(crate) bad_records: BTreeMap<String, u64>,
    /// The sum of them.
    pub(crate) bad: u64,
    pub(crate) checkpoints: CheckpointReport,
    /// User and system time of this process.
    pub(crate) cpu_seconds: f64,
    pub(crate) wall_seconds: f64,
}

/// The checkpoints of a run.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CheckpointReport {
    /// Completed by this run.
    pub(crate) completed: u64,
    /// Failed or timed out.
    pub(crate) failed: u64,
    /// Given up because a later one was complete before them.
    pub(crate) overtaken: u64,
    /// Epoch of the newest durable one, of this run or an earlier one.
    pub(crate) last_epoch: Option<u64>,
    /// Bytes of this run's newest.
    pub(crate) last_size: Option<u64>,
    /// From its trigger to its last acknowledgement.
    pub(crate) last_duration_ms: Option<u64>,
}

impl RunReport {
    /// A report of a run that processed nothing.
    pub(crate) fn empty(job: String, outcome: RunOutcome) -> Self {
        Self {
            job,
            outcome,
            error: None,
            exit_code: 0,
            restored_from: None,
            rows_in: BTreeMap::new(),
            rows_out: BTreeMap::new(),
            late: 0,
            bad_records: BTreeMap::new(),
            bad: 0,
            checkpoints: CheckpointReport::default(),
            cpu_seconds: 0.0,
            wall_seconds: 0.0,
        }
    }

    /// Takes the counters of a job over.
    pub(crate) fn with_progress(mut self, view: &ProgressView, last_epoch: Option<u64>) -> Self {
        self.restored_from = view.restored_from.map(|e| e.0);
        for operator in &view.operators {
            self.late += operator.late;
            self.bad += operator.bad;
            self.count_table(operator);
        }
        let counts = &view.checkpoints;
        self.checkpoints = CheckpointReport {
            completed: counts.completed,
            failed: counts.failed,
            overtaken: counts.overtaken,
            last_epoch: last_epoch.or(counts.last.map(|c| c.epoch.0)).or(self.restored_from),
            last_size: counts.last.map(|c| c.size),
            last_duration_ms: counts.last.map(|c| c.duration_ms),
        };
        self
    }

    fn count_table(&mut self, operator: &OperatorStatus) {
        let add = |map: &mut BTreeMap<String, u64>, table: &str, n| *map.entry(table.to_owned()).or_default() += n;
        match Table::of(&operator.uid) {
            Some(Table::Source(table)) => {
                add(&mut self.rows_in, table, operator.rows_out);
                add(&mut self.bad_records, table, operator.bad);
            }
            Some(Table::Sink(table)) => add(&mut self.rows_out, table, operator.rows_out),
            None => {}
        }
    }

    /// The JSON object, in one line.
    pub(crate) fn json(&self) -> String {
        serde_json::to_string(self)
            .unwrap_or_else(|e| format!("{{\"outcome\":\"failed\",\"error\":\"write summary: {e}\"}}"))
    }

    /// The lines for people.
    pub(crate) fn text(&self) -> String {
        let how = match self.outcome {
            RunOutcome::Finished => "finished: all input is processed",
            RunOutcome::Stopped => "stopped; the next run goes on from here",
            RunOutcome::AlreadyFinished => {
                "had finished in an earlier run; nothing to do (--restore none runs it anew)"
            }
            RunOutcome::HandedOver => "was handed over; whoever leads next goes on from its newest checkpoint",
            RunOutcome::Failed => "failed",
            RunOutcome::Fenced => "was taken over by a newer process",
            RunOutcome::Refused => "did not start",
        };
        let tables =
            |tables: &BTreeMap<String, u64>| match tables.iter().map(|(t, n)| format!("{t} {n}")).collect::<Vec<_>>() {
                none if none.is_empty() => "none".to_owned(),
                some => some.join(", "),
            };
        let mut lines = vec![format!("job {} {how}", self.job)];
        lines.push(format!("  rows in      {}", tables(&self.rows_in)));
        lines.push(format!("  rows out     {}", tables(&self.rows_out)));
        if self.late + self.bad > 0 {
            lines.push(format!("  left out     {} late rows, {} bad records", self.late, self.bad));
        }
        if let Some(epoch) = self.restored_from {
            lines.push(format!("  started from checkpoint {epoch}"));
        }
        lines.push(format!("  checkpoints  {}", self.checkpoints.text()));
        lines.push(format!("  time         {:.1} s, {:.1} s of CPU", self.wall_seconds, self.cpu_seconds));
        lines.join("\n")
    }
}

impl CheckpointReport {
    fn text(&self) -> String {
        let mut text = format!("{} completed, {} failed", self.completed, self.failed);
        if self.overtaken > 0 {
            text.push_str(&format!(", {} overtaken by later ones", self.overtaken));
        }
        if let Some(epoch) = self.last_epoch {
            text.push_str(&format!("; the last is {epoch}"));
        }
        if let (Some(size), Some(ms)) = (self.last_size, self.last_duration_ms) {
            text.push_str(&format!(" ({}, {})", bytes(size), duration(i64::try_from(ms).unwrap_or(i64::MAX))));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use floodmark_snapshot::Epoch;
    use floodmark_worker::{CheckpointCounts, CheckpointStatus, JobPhase};

    use super::*;

    fn operator(uid: &str, rows_in: u64, rows_out: u64, bad: u64, late: u64) -> OperatorStatus {
        OperatorStatus { rows_in, rows_out, late, bad, ..OperatorStatus::new(&uid.into(), "") }
    }

    fn report() -> RunReport {
        let last = CheckpointStatus { epoch: Epoch(9), triggered_at_ms: 0, duration_ms: 40, size: 2_048 };
        let view = ProgressView {
            phase: JobPhase::Done,
            restored_from: Some(Epoch(4)),
            checkpoints: CheckpointCounts { completed: 5, failed: 1, overtaken: 2, last: Some(last) },
            operators: vec![
                operator("source:bid", 0, 1_000, 3, 0),
                operator("hot/window-aggregate-1", 1_000, 12, 0, 7),
                operator("sink:hot", 12, 12, 0, 0),
                operator("sink:hot#2", 6, 5, 0, 0),
            ],
            ..ProgressView::default()
        };
        let mut report =
            RunReport::empty("default/hot/local".to_owned(), RunOutcome::Finished).with_progress(&view, None);
        (report.cpu_seconds, report.wall_seconds) = (1.5, 2.25);
        report
    }

    #[test]
    fn the_json_has_rows_by_table_and_the_last_checkpoint() {
        let json: serde_json::Value = serde_json::from_str(&report().json()).unwrap();
        expect![[r#"
            {
              "job": "default/hot/local",
              "outcome": "finished",
              "exitCode": 0,
              "restoredFrom": 4,
              "rowsIn": {
                "bid": 1000
              },
              "rowsOut": {
                "hot": 17
              },
              "late": 7,
              "badRecords": {
                "bid": 3
              },
              "bad": 3,
              "checkpoints": {
                "completed": 5,
                "failed": 1,
                "overtaken": 2,
                "lastEpoch": 9,
                "lastSize": 2048,
                "lastDurationMs": 40
              },
              "cpuSeconds": 1.5,
              "wallSeconds": 2.25
            }"#]]
        .assert_eq(&serde_json::to_string_pretty(&json).unwrap());
    }

    #[test]
    fn the_text_says_the_same_in_lines() {
        expect![[r#"
            job default/hot/local finished: all input is processed
              rows in      bid 1000
              rows out     hot 17
              left out     7 late rows, 3 bad records
              started from checkpoint 4
              checkpoints  5 completed, 1 failed, 2 overtaken by later ones; the last is 9 (2.0 KiB, 40 ms)
              time         2.2 s, 1.5 s of CPU"#]]
        .assert_eq(&report().text());
    }
}
