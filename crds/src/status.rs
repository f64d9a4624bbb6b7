//! What the cluster says of a job: where it stands, what runs, and what the controller is doing about it. Pure.
//!
//! Invariant: [`Operation`] is written before anything is done for it, so that whoever reads it can go on with it.

#![allow(unreachable_pub, reason = "the schema's derive repeats each struct, with its `pub`, inside a function")]

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Timestamp, UpgradeMode};

/// Where a job stands.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StreamJobStatus {
    /// The generation of the spec that this is about.
    pub observed_generation: i64,

    /// Where the job stands, in a word.
    pub state: JobState,

    /// `Ready`: this generation of the spec runs, and has completed a checkpoint. `Reconciling`: the controller is at work to
    /// bring that about. `Stalled`: it can't, and says why. `Running`: rows are processed.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,

    /// Subtasks per task of what runs; 0 if nothing does.
    pub parallelism: u32,

    /// Selects the job's worker pods.
    pub selector: String,

    /// The run that is in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<RunStatus>,

    /// The last run that has completed a checkpoint: what a failed upgrade goes back to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stable_run: Option<RunStatus>,

    /// The greatest number of a run so far.
    pub last_run: u64,

    /// What the controller is doing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation: Option<Operation>,

    /// What a suspended job goes on from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suspended_with: Option<String>,

    /// A revision that is not tried again: its state did not fit, or it failed and was rolled back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,

    /// The newest completed checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_checkpoint: Option<LastCheckpoint>,

    /// What the run has started from, or had to go back to later, when its newest checkpoint turned out to be damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restored_from: Option<RestoredFrom>,

    /// How the job last failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<LastFailure>,

    /// `spec.restartNonce` as it was last acted upon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart_nonce: Option<i64>,

    /// `spec.restore.nonce` as it was last acted upon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore_nonce: Option<i64>,
}

/// Where a job stands, in a word.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobState {
    /// Nothing has been done yet.
    #[default]
    Pending,
    /// It starts.
    Starting,
    /// It runs.
    Running,
    /// Another revision takes over.
    Upgrading,
    /// Its parallelism changes.
    Rescaling,
    /// The revision before takes over again.
    RollingBack,
    /// A savepoint is taken, then it stops.
    Suspending,
    /// It does not run, as the spec says.
    Suspended,
    /// It fails, and is tried again.
    Failing,
    /// It has failed, and would do so again.
    Failed,
    /// All its inputs have ended.
    Finished,
    /// It is being deleted.
    Deleting,
}

/// One aspect of an object, as Kubernetes writes them.
#[derive(JsonSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Which aspect.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it holds: `True`, `False` or `Unknown`.
    pub status: ConditionStatus,
    /// Why, in a word.
    pub reason: String,
    /// Why, for people.
    pub message: String,
    /// When `status` last changed.
    pub last_transition_time: Timestamp,
    /// The generation of the spec that this is about.
    pub observed_generation: i64,
}

/// Whether a condition holds.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Nobody knows.
    Unknown,
}

/// One start of a job.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunStatus {
    /// Its number, which only grows.
    pub number: u64,
    /// What it runs: the hash of that part of the spec that is not acted upon while a job runs.
    pub revision: String,
    /// Subtasks per task.
    pub parallelism: u32,
    /// What it is told to restore: `latest`, `none`, the name of a savepoint, or a location.
    pub restore: String,
    /// Whether it has completed a checkpoint.
    #[serde(default)]
    pub stable: bool,
}

/// Something that takes several steps. Each is taken again if nobody knows how far it went.
#[derive(JsonSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Operation {
    /// What for.
    pub kind: OperationKind,
    /// How far it is.
    pub step: Step,
    /// When it was begun.
    pub started_at: Timestamp,
    /// When this step was begun.
    pub since: Timestamp,
    /// The generation of the spec that it was begun for.
    pub generation: i64,
    /// The run that it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<RunStatus>,
    /// The run that it starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<RunStatus>,
    /// How the state gets from the one to the other.
    pub mode: UpgradeMode,
    /// The savepoint that the run before is stopped with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub savepoint: Option<String>,
    /// How often this step has failed.
    #[serde(default)]
    pub failures: u32,
    /// What it waits for, or why it is done.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// What an operation is for.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperationKind {
    /// The first start.
    Deploy,
    /// Another revision.
    Upgrade,
    /// The same revision again.
    Restart,
    /// The state that the spec names.
    Restore,
    /// Another parallelism, with the processes kept.
    Rescale,
    /// A stop.
    Suspend,
    /// A start after a stop.
    Resume,
    /// Back to the revision before.
    Rollback,
}

/// How far an operation is.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Step {
    /// Does it fit? Nothing has been touched.
    Checking,
    /// The new run's pods start; the old one goes on.
    Preparing,
    /// The old run is stopped.
    Stopping,
    /// The new run may lead; it has not completed a checkpoint yet.
    Starting,
}

/// A revision that is not tried again until the spec changes.
#[derive(JsonSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Refused {
    /// Which.
    pub revision: String,
    /// The upgrade mode in which it was tried.
    pub mode: UpgradeMode,
    /// Why, in a word.
    pub reason: String,
    /// Why.
    pub message: String,
}

/// A completed checkpoint.
#[derive(JsonSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastCheckpoint {
    /// Its number.
    pub epoch: u64,
    /// When it was triggered.
    pub time: Timestamp,
    /// From then until all of it was durable, milliseconds.
    pub duration_ms: u64,
    /// Bytes.
    pub size: u64,
}

/// What a run has started from.
#[derive(JsonSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RestoredFrom {
    /// The mode that was asked for.
    pub mode: UpgradeMode,
    /// What the run was told to restore.
    pub source: String,
    /// The checkpoint that it goes on from; none if it began with nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// Why that is not the newest one, if it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
}

/// How a job failed.
#[derive(JsonSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastFailure {
    /// Why.
    pub cause: String,
    /// When.
    pub time: Timestamp,
}

impl StreamJobStatus {
    /// The condition of this type.
    #[must_use]
    pub fn condition(&self, kind: &str) -> Option<&Condition> {
        self.conditions.iter().find(|c| c.kind == kind)
    }
}

impl Condition {
    /// Puts it in the place of the one of its type among an object's conditions; its time is that one's if its status is.
    pub fn put(mut self, among: &mut Vec<Self>) {
        match among.iter_mut().find(|c| c.kind == self.kind) {
            Some(present) => {
                if present.status == self.status {
                    self.last_transition_time = present.last_transition_time;
                }
                *present = self;
            }
            None => among.push(self),
        }
    }
}

impl From<bool> for ConditionStatus {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}
