//! `StreamJob`: the one object that a user writes. Types, defaults and the rules that types can't express. Pure.
//!
//! The doc comment of each field becomes its description in the cluster (`kubectl explain streamjob.spec`). Only fields that
//! work are here.

#![allow(unreachable_pub, reason = "the schema's derive repeats each struct, with its `pub`, inside a function")]
#![allow(clippy::duplicated_attributes, reason = "each column is an attribute with the same words")]

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray,
};
use kube::{CustomResource, CustomResourceExt, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    CoordinatorSpec, DeletionPolicy, EnvVar, HumanDuration, Savepoint, StreamJobStatus, WorkerSpec, manifest::Problem,
};

/// `apiVersion` of a manifest.
pub const API_VERSION: &str = "floodmark.io/v1alpha1";
/// Greatest `maxParallelism`.
const KEY_GROUPS_MAX: u16 = 32_768;
/// Longest `metadata.name`: it is part of folders, transactional ids and labels.
const NAME_LENGTH_MAX: usize = 63;

/// A stream job: SQL that reads streams, and how to keep its state.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "floodmark.io",
    version = "v1alpha1",
    kind = "StreamJob",
    shortname = "sj",
    namespaced,
    derive = "PartialEq",
    status = "StreamJobStatus",
    scale(
        spec_replicas_path = ".spec.parallelism",
        status_replicas_path = ".status.parallelism",
        label_selector_path = ".status.selector"
    ),
    doc = "A stream job: SQL that reads streams, and how to keep its state.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Parallelism", type_ = "integer", json_path = ".status.parallelism"),
    printcolumn(name = "Checkpoint", type_ = "date", json_path = ".status.lastCheckpoint.time"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.checkpoints.mode"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(validation = Rule::new("self.parallelism <= self.maxParallelism")
    .message("parallelism must not exceed maxParallelism"))]
#[serde(rename_all = "camelCase")]
pub struct StreamJobSpec {
    /// The job: statements separated by `;`. `CREATE TABLE ... WITH (...)` declares sources and sinks, `INSERT INTO` starts
    /// the dataflow.
    #[schemars(regex(pattern = r"\S"))]
    pub sql: String,

    /// Number of parallel subtasks of each task. At most maxParallelism.
    #[serde(default = "default_parallelism")]
    #[schemars(range(min = 1))]
    pub parallelism: u32,

    /// Number of key groups, the units in which keyed state moves when parallelism changes. Fixed for the life of the job's
    /// state. From 1 to 32768.
    #[serde(default = "default_max_parallelism")]
    #[schemars(range(min = 1, max = 32_768))]
    pub max_parallelism: u16,

    /// How operators keep their state while the job runs.
    #[serde(default)]
    pub state: StateSpec,

    /// When and where the job's state is snapshotted.
    #[serde(default)]
    pub checkpoints: CheckpointSpec,

    /// What the job may start from.
    #[serde(default)]
    pub restore: RestoreSpec,

    /// When the job runs again after a failure, from its newest checkpoint.
    #[serde(default)]
    pub restarts: RestartSpec,

    /// In a cluster: whether the job runs. `Suspended` stops it with a savepoint, from which it goes on when it is `Running`
    /// again.
    #[serde(default)]
    pub desired_state: DesiredState,

    /// In a cluster: how a change of this spec is brought about.
    #[serde(default)]
    pub upgrade: UpgradeSpec,

    /// In a cluster: a change of this number restarts the job as an upgrade would, also if nothing else has changed or the
    /// revision has been refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_nonce: Option<i64>,

    /// In a cluster: the container image of the job's pods. Default: the controller's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub image: Option<String>,

    /// In a cluster: variables of the job's processes, which the options of tables may name as `${NAME}`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100))]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub env: Vec<EnvVar>,

    /// In a cluster: the pod that coordinates the job.
    #[serde(default)]
    pub coordinator: CoordinatorSpec,

    /// In a cluster: the pods that run its subtasks.
    #[serde(default)]
    pub worker: WorkerSpec,
}

/// Whether a job runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DesiredState {
    /// It does.
    #[default]
    Running,
    /// It does not; its state is kept.
    Suspended,
}

/// How a change of a job's spec is brought about.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("duration(self.timeout) > duration('0s')").message("timeout must be longer than 0s"))]
#[serde(rename_all = "camelCase")]
pub struct UpgradeSpec {
    /// How the state gets from the old revision to the new one: `Savepoint` (the old one stops with a savepoint),
    /// `LastCheckpoint` (the new one goes on from the newest checkpoint: for jobs that can't take a savepoint, and what came
    /// after the checkpoint is processed again) or `Stateless` (state is dropped).
    #[serde(default)]
    pub mode: UpgradeMode,

    /// How long each step may take: pods that start, a savepoint, the first checkpoint of the new revision. After that the
    /// job goes back to the old one.
    #[serde(default = "default_upgrade_timeout")]
    pub timeout: HumanDuration,
}

/// How the state gets from one revision of a job to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UpgradeMode {
    /// In a savepoint that the old one stops with.
    #[default]
    Savepoint,
    /// In the newest checkpoint.
    LastCheckpoint,
    /// Not at all.
    Stateless,
}

impl Default for UpgradeSpec {
    fn default() -> Self {
        Self { mode: UpgradeMode::default(), timeout: default_upgrade_timeout() }
    }
}

/// When and where a job's state is snapshotted.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("self.mode == 'Disabled' || duration(self.interval) > duration('0s')")
    .message("interval must be longer than 0s"))]
#[x_kube(validation = Rule::new("duration(self.timeout) > duration('0s')").message("timeout must be longer than 0s"))]
#[x_kube(validation = Rule::new("self.maxConcurrent <= 1 || duration(self.minPause) == duration('0s')")
    .message("maxConcurrent must be 1 if there is a minPause, which keeps checkpoints apart"))]
#[x_kube(validation = Rule::new("!has(self.unaligned) || self.mode == 'ExactlyOnce'")
    .message("unaligned is for mode ExactlyOnce only; leave it out"))]
#[serde(rename_all = "camelCase")]
pub struct CheckpointSpec {
    /// Where checkpoints are kept: `s3://bucket/folder`, `file:///folder` or `memory://` (lost with the process). Without it
    /// `floodmark run` uses the folder `floodmark-data` in the directory where it is started. In a cluster it is needed, and is a bucket or
    /// a folder on a volume that all pods mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub storage: Option<String>,

    /// From the start of one checkpoint to the start of the next, such as `10s`. Exactly-once output becomes visible at this
    /// rhythm.
    #[serde(default = "default_interval")]
    pub interval: HumanDuration,

    /// What a failure may do to the results: `ExactlyOnce` (nothing is lost or repeated), `AtLeastOnce` (nothing is lost) or
    /// `Disabled` (no checkpoints: a restart begins at the sources' start positions).
    #[serde(default)]
    pub mode: CheckpointMode,

    /// A checkpoint that takes longer is given up, and counts as failed.
    #[serde(default = "default_timeout")]
    pub timeout: HumanDuration,

    /// Least time from the end of one checkpoint to the start of the next.
    #[serde(default)]
    pub min_pause: HumanDuration,

    /// How many checkpoints in a row may fail before the attempt does; the restart strategy says what follows.
    #[serde(default = "default_tolerable_failures")]
    #[schemars(range(max = 1_000_000))]
    pub tolerable_failures: u32,

    /// How many of the newest completed checkpoints are kept.
    #[serde(default = "default_retain")]
    #[schemars(range(min = 1, max = 1_000))]
    pub retain: u32,

    /// How many checkpoints may be under way, or wait for their output to be committed, at the same time. More than one only
    /// without `minPause`.
    #[serde(default = "default_max_concurrent")]
    #[schemars(range(min = 1, max = 100))]
    pub max_concurrent: u32,

    /// Lets barriers overtake records that are on their way, so that checkpoints complete under back-pressure. Only in mode
    /// `ExactlyOnce`; left out, barriers never overtake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unaligned: Option<UnalignedSpec>,

    /// Whether a checkpoint writes only what has changed since the last, and names the files of earlier ones for the rest.
    #[serde(default = "default_incremental")]
    pub incremental: bool,

    /// In a cluster: what reaches the storage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<CredentialsSpec>,

    /// In a cluster: what becomes of the job's checkpoints when the job is deleted: `Retain` (another job can start from them)
    /// or `Delete`. Savepoints stay in any case.
    #[serde(default)]
    pub on_delete: DeletionPolicy,
}

/// What reaches a storage.
#[derive(JsonSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CredentialsSpec {
    /// A Secret in the job's namespace with `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, and where they are needed `AWS_REGION`,
    /// `AWS_ENDPOINT` and `AWS_ALLOW_HTTP`.
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: String,
}

/// When barriers overtake records.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UnalignedSpec {
    /// How long a checkpoint waits for barriers to come in order before they overtake, such as `1s`; `0s` overtakes at once.
    #[serde(default)]
    pub after_alignment: HumanDuration,
}

/// How operators keep their state while the job runs.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StateSpec {
    /// `Heap` (in memory: fastest) or `RocksDB` (on local disk, with hot keys in memory: for state larger than memory). A
    /// savepoint of either can be restored in the other.
    #[serde(default)]
    pub backend: StateBackend,

    /// How long the state of a key is kept after it was last changed, such as `24h`, where nothing else bounds it (aggregates
    /// without a window). Left out, it is kept for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<HumanDuration>,
}

/// What keeps operators' state while a job runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StateBackend {
    /// In memory.
    #[default]
    Heap,
    /// On local disk.
    #[serde(rename = "RocksDB")]
    RocksDb,
}

/// What a failure may do to a job's results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CheckpointMode {
    /// Nothing is lost, nothing is repeated: aligned barriers, and sinks that commit with the checkpoint.
    #[default]
    ExactlyOnce,
    /// Nothing is lost; what came after the last checkpoint may be repeated.
    AtLeastOnce,
    /// No checkpoints: a restart begins at the sources' start positions.
    Disabled,
}

/// What a job may start from.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("!has(self.nonce) || has(self.from)").message("nonce says when to start from from: give both"))]
#[serde(rename_all = "camelCase")]
pub struct RestoreSpec {
    /// What the job starts from if it has no checkpoint of its own yet: the number of a checkpoint, the name of one of its
    /// savepoints, or the location of a savepoint or of another job's checkpoints (`s3://…`, `file:///…` or a path).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub from: Option<String>,

    /// In a cluster: a change of this number makes a job that has checkpoints of its own start from `from` all the same. What it
    /// processed since is dropped, and processed again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nonce: Option<i64>,

    /// Start even if the checkpoint holds state that no operator of the present SQL takes; that state is dropped.
    #[serde(default)]
    pub allow_dropped_state: bool,
}

/// When a job runs again after a failure. One that would come again (an overflow, a value that can't be cast) fails the job at
/// once.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("duration(self.delay) <= duration(self.maxDelay) || self.strategy != 'ExponentialDelay'")
    .message("delay must not exceed maxDelay"))]
#[serde(rename_all = "camelCase")]
pub struct RestartSpec {
    /// `ExponentialDelay` (for ever, slower and slower), `FixedDelay` (so many failures in a row), `FailureRate` (so many
    /// failures in a time) or `None`.
    #[serde(default)]
    pub strategy: RestartStrategy,

    /// From a failure to the next attempt. With `ExponentialDelay` that is at once behind the first failure, after this delay behind
    /// the second, and twice as long with each that follows.
    #[serde(default = "default_restart_delay")]
    pub delay: HumanDuration,

    /// With `ExponentialDelay`: no delay is longer.
    #[serde(default = "default_restart_max_delay")]
    pub max_delay: HumanDuration,

    /// With `ExponentialDelay`: after so long without a failure, and after a completed checkpoint, a failure counts as the first.
    #[serde(default = "default_restart_reset_after")]
    pub reset_after: HumanDuration,

    /// With `FixedDelay`: failures without a completed checkpoint in between that are answered by another attempt. With
    /// `FailureRate`: failures within `interval` that are.
    #[serde(default = "default_restart_attempts")]
    #[schemars(range(max = 1_000_000))]
    pub attempts: u32,

    /// With `FailureRate`: see `attempts`.
    #[serde(default = "default_restart_interval")]
    pub interval: HumanDuration,
}

/// How a job answers failures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RestartStrategy {
    /// Another attempt, at once and then after delays that grow.
    #[default]
    ExponentialDelay,
    /// Another attempt after the same delay, a number of times.
    FixedDelay,
    /// Another attempt after the same delay, unless failures come too close.
    FailureRate,
    /// None: the first failure is the job's.
    None,
}

impl Default for RestartSpec {
    fn default() -> Self {
        Self {
            strategy: RestartStrategy::default(),
            delay: default_restart_delay(),
            max_delay: default_restart_max_delay(),
            reset_after: default_restart_reset_after(),
            attempts: default_restart_attempts(),
            interval: default_restart_interval(),
        }
    }
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self {
            storage: None,
            interval: default_interval(),
            mode: CheckpointMode::default(),
            timeout: default_timeout(),
            min_pause: HumanDuration::default(),
            tolerable_failures: default_tolerable_failures(),
            retain: default_retain(),
            max_concurrent: default_max_concurrent(),
            unaligned: None,
            incremental: default_incremental(),
            credentials: None,
            on_delete: DeletionPolicy::default(),
        }
    }
}

fn default_parallelism() -> u32 {
    1
}

fn default_max_parallelism() -> u16 {
    128
}

fn default_interval() -> HumanDuration {
    HumanDuration::from_millis(10_000)
}

fn default_timeout() -> HumanDuration {
    HumanDuration::from_millis(600_000)
}

fn default_tolerable_failures() -> u32 {
    3
}

fn default_retain() -> u32 {
    3
}

fn default_max_concurrent() -> u32 {
    1
}

fn default_incremental() -> bool {
    true
}

fn default_restart_delay() -> HumanDuration {
    HumanDuration::from_millis(100)
}

fn default_restart_max_delay() -> HumanDuration {
    HumanDuration::from_millis(60_000)
}

fn default_restart_reset_after() -> HumanDuration {
    HumanDuration::from_millis(600_000)
}

fn default_restart_attempts() -> u32 {
    3
}

fn default_restart_interval() -> HumanDuration {
    HumanDuration::from_millis(300_000)
}

fn default_upgrade_timeout() -> HumanDuration {
    HumanDuration::from_millis(300_000)
}

/// The custom resource definition of [`StreamJob`].
#[must_use]
pub fn crd() -> CustomResourceDefinition {
    understood(StreamJob::crd())
}

/// The custom resource definition of [`Savepoint`].
#[must_use]
pub fn savepoint_crd() -> CustomResourceDefinition {
    understood(Savepoint::crd())
}

/// The definition without what API servers don't know.
fn understood(mut definition: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut definition.spec.versions {
        if let Some(schema) = version.schema.as_mut().and_then(|s| s.open_api_v3_schema.as_mut()) {
            drop_unsigned_formats(schema);
        }
    }
    definition
}

/// Takes out formats such as `uint32`: API servers don't know them and warn at each apply. The bounds say the same.
fn drop_unsigned_formats(schema: &mut JSONSchemaProps) {
    schema.format.take_if(|format| format.starts_with("uint"));
    schema.properties.iter_mut().flat_map(|p| p.values_mut()).for_each(drop_unsigned_formats);
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        drop_unsigned_formats(items);
    }
}

impl StreamJob {
    /// What is wrong with the object beyond its types; the same rules stand in the custom resource definition. Empty if
    /// nothing is.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut require = |ok: bool, path: &str, message: String| {
            if !ok {
                problems.push(Problem::new(path, message));
            }
        };
        let spec = &self.spec;
        match self.metadata.name.as_deref() {
            None | Some("") => {
                require(false, "metadata.name", "is missing; the job's state is kept under it".to_owned())
            }
            Some(name) => require(is_dns_name(name), "metadata.name", format!("'{name}' {DNS_NAME_RULE}")),
        }
        if let Some(namespace) = self.metadata.namespace.as_deref() {
            require(is_dns_name(namespace), "metadata.namespace", format!("'{namespace}' {DNS_NAME_RULE}"));
        }
        if let Some(uid) = self.metadata.uid.as_deref() {
            require(is_dns_name(uid), "metadata.uid", format!("'{uid}' {DNS_NAME_RULE}"));
        }
        require(!spec.sql.trim().is_empty(), "spec.sql", "is empty; write at least one INSERT INTO".to_owned());
        require(spec.parallelism >= 1, "spec.parallelism", "must be at least 1".to_owned());
        let key_groups = 1..=KEY_GROUPS_MAX;
        require(
            key_groups.contains(&spec.max_parallelism),
            "spec.maxParallelism",
            format!("{} is not between 1 and {KEY_GROUPS_MAX}", spec.max_parallelism),
        );
        require(
            !key_groups.contains(&spec.max_parallelism) || spec.parallelism <= u32::from(spec.max_parallelism),
            "spec.parallelism",
            format!("{} exceeds maxParallelism, which is {}", spec.parallelism, spec.max_parallelism),
        );
        require(
            spec.state.ttl.as_ref().is_none_or(|ttl| !ttl.is_zero()),
            "spec.state.ttl",
            "must be longer than 0s; leave it out to keep state for ever".to_owned(),
        );
        require(
            spec.restore.from.as_deref().is_none_or(|from| !from.trim().is_empty()),
            "spec.restore.from",
            "is empty; name a savepoint or a location, or leave it out".to_owned(),
        );
        require(
            spec.restarts.strategy != RestartStrategy::ExponentialDelay
                || spec.restarts.delay.get() <= spec.restarts.max_delay.get(),
            "spec.restarts.delay",
            format!("{} exceeds maxDelay, which is {}", spec.restarts.delay, spec.restarts.max_delay),
        );
        require(spec.restarts.attempts <= 1_000_000, "spec.restarts.attempts", "must be at most 1000000".to_owned());
        require(!spec.upgrade.timeout.is_zero(), "spec.upgrade.timeout", "must be longer than 0s".to_owned());
        require(
            spec.restore.nonce.is_none() || spec.restore.from.is_some(),
            "spec.restore.from",
            "is missing; nonce says when to start from it".to_owned(),
        );
        require((1..=1_024).contains(&spec.worker.slots), "spec.worker.slots", "must be between 1 and 1024".to_owned());
        require(spec.worker.spares <= 1_024, "spec.worker.spares", "must be at most 1024".to_owned());
        for (i, variable) in spec.env.iter().enumerate() {
            let path = format!("spec.env[{i}]");
            require(!variable.name.is_empty(), &path, "has no name".to_owned());
            let one = variable.value.is_some() != variable.value_from.is_some();
            require(one, &path, "give either value or valueFrom".to_owned());
        }
        problems.extend(spec.checkpoints.problems());
        problems
    }
}

impl CheckpointSpec {
    fn problems(&self) -> Vec<Problem> {
        let storage_named = self.storage.as_deref().is_none_or(|s| !s.trim().is_empty());
        let rules = [
            (storage_named, "storage", "is empty; name a location such as s3://bucket/folder, or leave it out"),
            (self.mode == CheckpointMode::Disabled || !self.interval.is_zero(), "interval", "must be longer than 0s"),
            (!self.timeout.is_zero(), "timeout", "must be longer than 0s"),
            (self.tolerable_failures <= 1_000_000, "tolerableFailures", "must be at most 1000000"),
            ((1..=1_000).contains(&self.retain), "retain", "must be between 1 and 1000"),
            ((1..=100).contains(&self.max_concurrent), "maxConcurrent", "must be between 1 and 100"),
            (
                self.max_concurrent <= 1 || self.min_pause.is_zero(),
                "maxConcurrent",
                "must be 1 if there is a minPause, which keeps checkpoints apart",
            ),
            (
                self.unaligned.is_none() || self.mode == CheckpointMode::ExactlyOnce,
                "unaligned",
                "is for mode ExactlyOnce only; leave it out",
            ),
        ];
        let broken = rules.into_iter().filter(|(ok, ..)| !ok);
        broken.map(|(_, field, message)| Problem::new(format!("spec.checkpoints.{field}"), message)).collect()
    }
}

const DNS_NAME_RULE: &str = "is not a valid name: use at most 63 lower-case letters, digits, '-' and '.', beginning and ending \
                             with a letter or digit";

fn is_dns_name(name: &str) -> bool {
    let edge = |c: Option<u8>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let bytes = name.as_bytes();
    bytes.len() <= NAME_LENGTH_MAX
        && edge(bytes.first().copied())
        && edge(bytes.last().copied())
        && bytes.iter().all(|c| edge(Some(*c)) || *c == b'-' || *c == b'.')
        && !name.contains("..")
}
