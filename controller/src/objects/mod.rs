//! The objects of a job in the cluster: what a StreamJob and its run come to. Pure: no I/O, clock or randomness.
//!
//! [`job_objects`] and the [`lease`] are there as long as the job, and may be applied again at any time; [`run_objects`] and
//! [`run_secret`] belong to one run. A run is immutable: they are *created*, never applied again (a controller of another
//! version would render them otherwise, and so restart the job), and only [`scale_patch`] and a [`renewal`] of its certificates change
//! one later.
//!
//! Invariants: objects of two jobs of a namespace never share a kind and a name; a pod that its job says nothing else about meets
//! the *restricted* profile of Pod Security; a worker's pod holds no key but its own.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use floodmark_crds::StreamJob;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};

mod job;
mod names;
mod pods;
pub mod restricted;
mod revisions;
mod run;
mod secret;
mod storage;
mod template;
#[cfg(test)]
mod tests;

pub use job::{JobObjects, job_objects, lease};
pub use names::{BASE_LENGTH_MAX, base, coordinator_name, revision_name, secret_name, worker_name};
pub use revisions::{revision_object, revision_spec};
pub use run::{PodCounts, RunObjects, checkpoints_of, counts_of, run_objects, run_of, scale_patch, worker_selector};
pub use secret::{
    Generation, IDENTITY_LIFETIME, RunIdentity, next_generation, renew_at, renewal, run_identity, run_secret,
};
pub use storage::check_storage;

/// Who writes the objects: their `app.kubernetes.io/managed-by`, and the field manager.
pub const MANAGER: &str = "floodmark-controller";
/// Label of every object of a job: its [`base`].
pub const JOB_LABEL: &str = "floodmark.io/job";
/// Label of every object of a run: its number.
pub const RUN_LABEL: &str = "floodmark.io/run";
/// Label of pods: `coordinator` or `worker`.
pub const ROLE_LABEL: &str = "floodmark.io/role";
/// Annotation of a run's Deployments: the name of its revision.
pub const REVISION_ANNOTATION: &str = "floodmark.io/revision";
/// Annotation of a run's Deployments: subtasks per task that it was started with.
pub const PARALLELISM_ANNOTATION: &str = "floodmark.io/parallelism";
/// Annotation of a run's Deployments: what the run is told to restore.
pub const RESTORE_ANNOTATION: &str = "floodmark.io/restore";
/// Annotation of a run's Deployments: how many pods its revision asks for, [`PodCounts`] as JSON.
pub const PODS_ANNOTATION: &str = "floodmark.io/pods";
/// Annotation of a run's Deployments: how its revision takes checkpoints, `spec.checkpoints.mode`.
pub const CHECKPOINTS_ANNOTATION: &str = "floodmark.io/checkpoints";
/// Annotation of a run's Secret: when its certificates are to be renewed, as JSON.
pub const CERTIFICATES_ANNOTATION: &str = "floodmark.io/certificates";
/// The label by which the controller's own pods are known, and its value; the chart gives it to them.
pub const CONTROLLER_LABEL: (&str, &str) = ("app.kubernetes.io/name", "floodmark-controller");
/// Where pods answer HTTP.
pub const HTTP_PORT: u16 = 8080;

/// Longest value of a label.
const LABEL_LENGTH_MAX: usize = 63;
/// Where the coordinator listens for workers.
const COORDINATOR_PORT: u16 = 7000;
/// Where a worker listens for others.
const WORKER_PORT: u16 = 7001;

/// What all jobs have in common, as the controller was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Defaults {
    /// The image of jobs that name none.
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`; none: as Kubernetes chooses by the image's tag.
    pub image_pull_policy: Option<String>,
    /// The namespace of the controller's own pods, which may ask a job's pods over HTTP.
    pub controller_namespace: String,
    /// Labels of the controller's own pods: [`CONTROLLER_LABEL`].
    pub controller_labels: BTreeMap<String, String>,
    /// The cluster's DNS domain; none: names of Services are completed as pods of the cluster do it.
    pub cluster_domain: Option<String>,
    /// Whether pods have IPv6 addresses: then they listen on all of them, and on those of IPv4 that they have.
    pub ipv6: bool,
}

impl Defaults {
    /// The address by which a pod listens on all of its own.
    #[must_use]
    pub fn all_addresses(&self) -> IpAddr {
        if self.ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
    }
}

/// A field of a StreamJob of which no object can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct Unrenderable {
    /// Which: `spec.worker.podTemplate.spec.containers[1].image`.
    pub path: String,
    /// What is wrong with it, and what to do.
    pub message: String,
}

impl Unrenderable {
    fn new(path: impl Into<String>, message: impl fmt::Display) -> Self {
        Self { path: path.into(), message: message.to_string() }
    }
}

/// Whether an object of this metadata is the job's. Ask before changing or deleting one that is found under a name of the job's:
/// users have objects, too.
#[must_use]
pub fn is_of(job: &StreamJob, meta: &ObjectMeta) -> bool {
    let uid = job.uid();
    let owners = meta.owner_references.iter().flatten();
    uid.is_some_and(|uid| owners.filter(|owner| owner.controller == Some(true)).any(|owner| owner.uid == uid))
}

/// Labels, by which objects of a job are found: `floodmark.io/job=…`.
#[must_use]
pub fn job_selector(job: &StreamJob) -> String {
    format!("{JOB_LABEL}={}", base(&job.name_any()))
}

fn namespace(job: &StreamJob) -> String {
    job.namespace().unwrap_or_else(|| "default".to_owned())
}

fn labels(job: &StreamJob) -> BTreeMap<String, String> {
    let (name, base) = (job.name_any(), base(&job.name_any()));
    let instance = if name.len() <= LABEL_LENGTH_MAX { name } else { base.clone() };
    strings([
        ("app.kubernetes.io/name", "floodmark"),
        ("app.kubernetes.io/instance", &instance),
        ("app.kubernetes.io/managed-by", MANAGER),
        (JOB_LABEL, &base),
    ])
}

fn meta(job: &StreamJob, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(namespace(job)),
        labels: Some(labels),
        owner_references: job.controller_owner_ref(&()).map(|owner| {
            // The job's Secrets and pods are there until it is gone, also if somebody deletes it in the foreground.
            vec![OwnerReference { block_owner_deletion: Some(true), ..owner }]
        }),
        ..ObjectMeta::default()
    }
}

fn selecting(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector { match_labels: Some(labels), match_expressions: None }
}

fn strings<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}
