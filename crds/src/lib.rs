//! The API types of Floodmark, and the reading of manifests that hold them. No I/O.
//!
//! [`StreamJob`] is the one type so far. Its custom resource definition is generated from the Rust types
//! (`cargo run -p floodmark-crds --bin crdgen`), so that the two can't differ; [`StreamJob::from_yaml`] reads a manifest as
//! strictly as an API server would, and says where and what is wrong.
//!
//! Invariant: a manifest that [`StreamJob::from_yaml`] accepts has no field that is not known, and passes
//! [`StreamJob::problems`].

mod duration;
mod manifest;
mod streamjob;

pub use duration::HumanDuration;
pub use manifest::{ManifestError, Problem};
pub use streamjob::{
    API_VERSION, CheckpointMode, CheckpointSpec, RestartSpec, RestartStrategy, RestoreSpec, StateBackend, StateSpec,
    StreamJob, StreamJobSpec, UnalignedSpec, crd,
};
