//! The API types of Floodmark, and the reading of manifests that hold them. No I/O.
//!
//! [`StreamJob`] is what a user writes. Its custom resource definition is generated from the Rust types
//! (`cargo run -p floodmark-crds --bin crdgen`), so that the two can't differ; [`StreamJob::from_yaml`] reads a manifest as
//! strictly as an API server would, and says where and what is wrong. [`Report`] is what the leader of a job tells of it.
//!
//! Invariant: a manifest that [`StreamJob::from_yaml`] accepts has no field that is not known, and passes
//! [`StreamJob::problems`].

mod duration;
mod manifest;
mod pods;
mod report;
mod savepoint;
mod status;
mod streamjob;
mod timestamp;

pub use duration::HumanDuration;
pub use manifest::{ManifestError, Problem};
pub use pods::{CoordinatorSpec, EnvSource, EnvVar, KeyRef, PodTemplate, Quantity, Resources, WorkerSpec};
pub use report::{CheckpointReport, FailureReport, REPORT_ANNOTATION, RUN_ANNOTATION, Report, ReportPhase};
pub use savepoint::{DeletionPolicy, Savepoint, SavepointSpec, SavepointState, SavepointStatus, StorageStatus};
pub use status::{
    Condition, ConditionStatus, JobState, LastCheckpoint, LastFailure, Operation, OperationKind, Refused, RestoredFrom,
    RunStatus, Step, StreamJobStatus,
};
pub use streamjob::{
    API_VERSION, CheckpointMode, CheckpointSpec, CredentialsSpec, DesiredState, RestartSpec, RestartStrategy,
    RestoreSpec, StateBackend, StateSpec, StreamJob, StreamJobSpec, UnalignedSpec, UpgradeMode, UpgradeSpec, crd,
    savepoint_crd,
};
pub use timestamp::Timestamp;
