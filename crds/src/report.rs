//! What the leader of a job tells of it in the cluster: an annotation of the job's Lease, in JSON. Pure.
//!
//! Invariant: a reader takes fields that it does not know as absent, and a writer never drops one that it knows: leader and
//! controller may be of different versions.

use serde::{Deserialize, Serialize};

/// Annotation of a job's Lease: the number of the run that may lead. The controller writes it; absent or 0, none may.
pub const RUN_ANNOTATION: &str = "floodmark.io/run";
/// Annotation of a job's Lease: a [`Report`]. The leader writes it.
pub const REPORT_ANNOTATION: &str = "floodmark.io/report";

/// See the header of this file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Report {
    /// The run that it is about.
    pub run: u64,
    /// The pod that leads.
    pub holder: String,
    /// Where it answers HTTP: `host:port`.
    pub http: String,
    /// Where the job stands.
    pub phase: ReportPhase,
    /// Subtasks per task.
    pub parallelism: u32,
    /// The number of the attempt that runs, or ran last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u64>,
    /// Attempts of this process that have failed and were followed by another.
    pub restarts: u64,
    /// The checkpoint that the attempt has started from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restored_from: Option<u64>,
    /// Why that is not the newest checkpoint, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// Checkpoints that this process has completed.
    pub completed: u64,
    /// The newest completed one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_checkpoint: Option<CheckpointReport>,
    /// How the last attempt that failed did so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureReport>,
}

impl Report {
    /// Whether its run has come to an end of its own: it is never started again.
    #[must_use]
    pub fn ended(&self) -> bool {
        match self.phase {
            ReportPhase::Waiting | ReportPhase::Restoring | ReportPhase::Running | ReportPhase::Stopping => false,
            ReportPhase::Stopped | ReportPhase::Finished | ReportPhase::Failed => true,
        }
    }
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReportPhase {
    /// Tasks are built, or their state is not all there.
    Restoring,
    /// Tasks run with all their state.
    Running,
    /// A last checkpoint is taken.
    Stopping,
    /// Stopped when asked to.
    Stopped,
    /// All inputs have ended, everything is committed.
    Finished,
    /// It failed, and would do so again.
    Failed,
    /// Nothing runs yet: workers are waited for, or the next attempt. Also what a phase of another version is taken for.
    #[default]
    #[serde(other)]
    Waiting,
}

/// A completed checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CheckpointReport {
    /// Its number.
    pub epoch: u64,
    /// When it was triggered, milliseconds since the Unix epoch.
    pub triggered_at_ms: i64,
    /// From then to the last acknowledgement, milliseconds.
    pub duration_ms: u64,
    /// Bytes of all its shards.
    pub size: u64,
}

/// How an attempt failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FailureReport {
    /// Why.
    pub cause: String,
    /// When, milliseconds since the Unix epoch.
    pub at_ms: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_other_versions_are_read() {
        let report: Report = serde_json::from_str(r#"{"run": 3, "phase": "Napping", "color": "red"}"#).unwrap();
        assert_eq!(report, Report { run: 3, ..Report::default() });
        assert!(!report.ended());
    }

    #[test]
    fn a_report_says_what_it_knows() {
        let report = Report { run: 1, phase: ReportPhase::Failed, ..Report::default() };
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(
            text,
            r#"{"run":1,"holder":"","http":"","phase":"Failed","parallelism":0,"restarts":0,"completed":0}"#
        );
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
        assert!(report.ended());
    }
}
