//! What one run has: its Service and its Deployments. Pure. See the invariant of [`super`]: made once.

use std::collections::BTreeMap;

use floodmark_crds::{CheckpointMode, RunStatus, StreamJob, StreamJobSpec, WorkerSpec};
use floodmark_link::tls::Role;
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        core::v1::{Service, ServiceSpec},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use kube::ResourceExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use super::{
    CHECKPOINTS_ANNOTATION, COORDINATOR_PORT, Defaults, JOB_LABEL, PARALLELISM_ANNOTATION, PODS_ANNOTATION,
    RESTORE_ANNOTATION, REVISION_ANNOTATION, ROLE_LABEL, RUN_LABEL, Unrenderable, base, coordinator_name,
    job::service_port, labels, meta, pods, selecting, strings, worker_name,
};

/// See the header of this file.
#[derive(Clone, Debug, PartialEq)]
pub struct RunObjects {
    /// Where workers find the coordinator.
    pub service: Service,
    /// The pod that coordinates, and one that stands by if the job wants it.
    pub coordinator: Deployment,
    /// The pods that run subtasks.
    pub worker: Deployment,
}

/// The objects of a run, but for its Secret. `spec` is that of the run's revision.
///
/// # Errors
/// When a pod template, or a variable, is such that no pod comes of it: with the field at fault.
pub fn run_objects(
    job: &StreamJob,
    spec: &StreamJobSpec,
    run: &RunStatus,
    defaults: &Defaults,
) -> Result<RunObjects, Unrenderable> {
    let name = job.name_any();
    let coordinator = coordinator_name(&name, run.number);
    let counts = PodCounts::of(spec);
    let (coordinators, workers) = (replicas(counts.coordinators()), replicas(counts.workers(run.parallelism)));
    let at_once = RollingUpdateDeployment {
        max_unavailable: Some(IntOrString::String("100%".to_owned())),
        max_surge: Some(IntOrString::Int(0)),
    };
    let recreate = DeploymentStrategy { type_: Some("Recreate".to_owned()), rolling_update: None };
    let replace = DeploymentStrategy { type_: Some("RollingUpdate".to_owned()), rolling_update: Some(at_once) };
    let deployment = |role, name, replicas, strategy| -> Result<Deployment, Unrenderable> {
        let template = pods::template(job, spec, run, role, defaults)?;
        Ok(Deployment {
            metadata: ObjectMeta {
                annotations: Some(annotations(run, counts, spec.checkpoints.mode)),
                ..meta(job, name, run_labels(job, run))
            },
            spec: Some(DeploymentSpec {
                replicas: Some(replicas),
                selector: selecting(pod_selector(job, run, role)),
                strategy: Some(strategy),
                // There is nothing to go back to: another revision is another run.
                revision_history_limit: Some(0),
                template,
                ..DeploymentSpec::default()
            }),
            status: None,
        })
    };
    Ok(RunObjects {
        service: Service {
            metadata: meta(job, coordinator.clone(), run_labels(job, run)),
            spec: Some(ServiceSpec {
                selector: Some(pod_selector(job, run, Role::Coordinator)),
                ports: Some(vec![service_port("coordinator", COORDINATOR_PORT)]),
                // Workers are needed before anything is ready.
                publish_not_ready_addresses: Some(true),
                ..ServiceSpec::default()
            }),
            status: None,
        },
        coordinator: deployment(Role::Coordinator, coordinator, coordinators, recreate)?,
        worker: deployment(Role::Worker, worker_name(&name, run.number), workers, replace)?,
    })
}

impl RunObjects {
    /// With so many pods of workers in place of those that the run's parallelism needs.
    #[must_use]
    pub fn with_workers(mut self, pods: u32) -> Self {
        if let Some(spec) = &mut self.worker.spec {
            spec.replicas = Some(replicas(pods));
        }
        self
    }
}

/// The one change of a run's Deployments while they are there, as a JSON merge patch: another number of pods.
#[must_use]
pub fn scale_patch(pods: u32) -> Json {
    json!({"spec": {"replicas": replicas(pods)}})
}

/// How many pods a run has, as its revision says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodCounts {
    /// `spec.worker.slots`.
    pub slots: u32,
    /// `spec.worker.spares`.
    pub spares: u32,
    /// `spec.coordinator.standby`.
    pub standby: bool,
}

impl PodCounts {
    /// What a spec says.
    #[must_use]
    pub fn of(spec: &StreamJobSpec) -> Self {
        Self { slots: spec.worker.slots, spares: spec.worker.spares, standby: spec.coordinator.standby }
    }

    /// Pods of workers at this parallelism.
    #[must_use]
    pub fn workers(self, parallelism: u32) -> u32 {
        let Self { slots, spares, .. } = self;
        WorkerSpec { slots, spares, ..WorkerSpec::default() }.pods(parallelism)
    }

    /// Pods of coordinators.
    #[must_use]
    pub fn coordinators(self) -> u32 {
        1 + u32::from(self.standby)
    }
}

/// How many pods the run that a Deployment belongs to asks for, by what [`run_objects`] has written on it.
#[must_use]
pub fn counts_of(deployment: &Deployment) -> Option<PodCounts> {
    serde_json::from_str(deployment.annotations().get(PODS_ANNOTATION)?).ok()
}

/// How the run that a Deployment belongs to takes checkpoints, by what [`run_objects`] has written on it.
#[must_use]
pub fn checkpoints_of(deployment: &Deployment) -> Option<CheckpointMode> {
    let mode = deployment.annotations().get(CHECKPOINTS_ANNOTATION)?;
    serde_json::from_value(Json::String(mode.clone())).ok()
}

/// The run that a Deployment belongs to, by what [`run_objects`] has written on it: with the parallelism that it was started
/// with, which a rescale may have changed since. Whether it is stable nobody knows.
#[must_use]
pub fn run_of(deployment: &Deployment) -> Option<RunStatus> {
    let annotation = |name| deployment.annotations().get(name);
    Some(RunStatus {
        number: deployment.labels().get(RUN_LABEL)?.parse().ok().filter(|n| *n > 0)?,
        revision: annotation(REVISION_ANNOTATION)?.clone(),
        parallelism: annotation(PARALLELISM_ANNOTATION)?.parse().ok().filter(|n| *n > 0)?,
        restore: annotation(RESTORE_ANNOTATION)?.clone(),
        stable: false,
    })
}

/// Selects the worker pods of a job: `status.selector`, for autoscalers. Of all its runs: a selector that changes with each
/// upgrade would not be known in time.
#[must_use]
pub fn worker_selector(job: &StreamJob) -> String {
    format!("{JOB_LABEL}={},{ROLE_LABEL}={}", base(&job.name_any()), Role::Worker)
}

fn replicas(pods: u32) -> i32 {
    i32::try_from(pods).unwrap_or(i32::MAX)
}

fn annotations(run: &RunStatus, counts: PodCounts, checkpoints: CheckpointMode) -> BTreeMap<String, String> {
    strings([
        (PODS_ANNOTATION, &json!(counts).to_string()),
        (CHECKPOINTS_ANNOTATION, &format!("{checkpoints:?}")),
        (REVISION_ANNOTATION, &run.revision),
        (PARALLELISM_ANNOTATION, &run.parallelism.to_string()),
        (RESTORE_ANNOTATION, &run.restore),
    ])
}

pub(super) fn run_labels(job: &StreamJob, run: &RunStatus) -> BTreeMap<String, String> {
    let mut labels = labels(job);
    labels.insert(RUN_LABEL.to_owned(), run.number.to_string());
    labels
}

/// Labels by which a Deployment or Service knows its pods.
pub(super) fn pod_selector(job: &StreamJob, run: &RunStatus, role: Role) -> BTreeMap<String, String> {
    let base = base(&job.name_any());
    strings([(JOB_LABEL, &base), (RUN_LABEL, &run.number.to_string()), (ROLE_LABEL, &role.to_string())])
}
