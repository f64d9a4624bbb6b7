//! `Savepoint`: asks for a savepoint of a job, now or on a schedule, and owns what comes of it. Pure.

#![allow(unreachable_pub, reason = "the schema's derive repeats each struct, with its `pub`, inside a function")]
#![allow(clippy::duplicated_attributes, reason = "each column is an attribute with the same words")]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Condition, Timestamp};

/// A savepoint of a stream job, or with a schedule one after the other.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "floodmark.io",
    version = "v1alpha1",
    kind = "Savepoint",
    shortname = "fsp",
    namespaced,
    derive = "PartialEq",
    status = "SavepointStatus",
    doc = "A savepoint of a stream job: complete in itself, and kept until somebody deletes it.",
    printcolumn(name = "Job", type_ = "string", json_path = ".spec.job"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Size", type_ = "integer", json_path = ".status.size"),
    printcolumn(name = "Location", type_ = "string", json_path = ".status.location", priority = 1),
    printcolumn(name = "Schedule", type_ = "string", json_path = ".spec.schedule", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(validation = Rule::new("self.job == oldSelf.job").message("job can't be changed: make another Savepoint"))]
#[x_kube(validation = Rule::new("has(self.schedule) == has(oldSelf.schedule)")
    .message("a schedule can't be added or taken away: make another Savepoint"))]
#[serde(rename_all = "camelCase")]
pub struct SavepointSpec {
    /// The job's name, in the same namespace.
    #[schemars(length(min = 1, max = 63))]
    pub job: String,

    /// When to take one, over and over: five fields as in cron (minute, hour, day of month, month, day of week), in UTC. Each
    /// is a Savepoint of its own. Left out, one is taken, now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 9, max = 100))]
    pub schedule: Option<String>,

    /// With a schedule: how many of its savepoints are kept, the newest. What a job starts from, or may have to go back to, is
    /// kept beyond that.
    #[serde(default = "default_retain")]
    #[schemars(range(min = 1, max = 1_000))]
    pub retain: u32,

    /// What becomes of the savepoint in storage when this object is deleted: `Retain` or `Delete`. It needs no job that runs.
    #[serde(default)]
    pub on_delete: DeletionPolicy,
}

/// What becomes of something in storage when the object that owns it is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// It stays.
    #[default]
    Retain,
    /// It goes.
    Delete,
}

/// What has become of a savepoint.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SavepointStatus {
    /// The generation of the spec that this is about.
    pub observed_generation: i64,

    /// Where it stands, in a word.
    pub state: SavepointState,

    /// `Ready`: it is complete (with a schedule: in force). `Reconciling`: it is being taken. `Stalled`: there is none.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,

    /// Its name among those of the job, in storage. Recorded before it is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,

    /// Where it is, for `spec.restore.from`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,

    /// The storage that it is in, and the Secret to reach it with: that of the job when it was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageStatus>,

    /// The checkpoint that it is a copy of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,

    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,

    /// When it was complete; with a schedule, when the last one was due.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Timestamp>,

    /// With a schedule: when the next one is due.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<Timestamp>,

    /// How often it could not be taken.
    #[serde(skip_serializing_if = "is_zero")]
    pub failures: u32,
}

/// Where a savepoint's files are, without the job.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StorageStatus {
    /// The job's `spec.checkpoints.storage`.
    pub location: String,
    /// The uid of the job, by which its folder is called.
    pub job_uid: String,
    /// Its `spec.checkpoints.credentials.secretName`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_name: Option<String>,
}

/// Where a savepoint stands, in a word.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavepointState {
    /// Nothing has been done yet.
    #[default]
    Pending,
    /// The job has been asked for it.
    InProgress,
    /// It is complete.
    Completed,
    /// There is none, and there will be none.
    Failed,
    /// It has a schedule, which is in force.
    Scheduled,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn default_retain() -> u32 {
    7
}
