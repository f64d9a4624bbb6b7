//! From the cluster's objects to what is looked at of them. Pure.

use floodmark_crds::{REPORT_ANNOTATION, RUN_ANNOTATION};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{ControllerRevision, Deployment},
        coordination::v1::Lease,
        core::v1::{Pod, Service, ServiceAccount},
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
        rbac::v1::{Role, RoleBinding},
    },
};
use kube::{Resource, ResourceExt as _, core::PartialObjectMeta};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value as Json;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    cache::{DeploymentSeen, Holds, JobKey, Kind, Thing, version},
    pods::PodSeen,
};
use crate::{
    lifecycle::LeaseSeen,
    objects::{JOB_LABEL, RUN_LABEL, checkpoints_of, counts_of, run_of},
};

/// Annotation of objects that may be applied again: a hash of what was applied last.
pub(super) const APPLIED_ANNOTATION: &str = "floodmark.io/applied";

/// A kind of object that jobs have.
pub(super) trait Watched:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + std::fmt::Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    const KIND: Kind;

    /// What is in it.
    fn holds(&self) -> Holds {
        Holds::Nothing
    }
}

impl Watched for ControllerRevision {
    const KIND: Kind = Kind::ControllerRevision;
}

impl Watched for NetworkPolicy {
    const KIND: Kind = Kind::NetworkPolicy;
}

impl Watched for PodDisruptionBudget {
    const KIND: Kind = Kind::PodDisruptionBudget;
}

impl Watched for Role {
    const KIND: Kind = Kind::Role;
}

impl Watched for RoleBinding {
    const KIND: Kind = Kind::RoleBinding;
}

impl Watched for Service {
    const KIND: Kind = Kind::Service;
}

impl Watched for ServiceAccount {
    const KIND: Kind = Kind::ServiceAccount;
}

impl Watched for Lease {
    const KIND: Kind = Kind::Lease;

    fn holds(&self) -> Holds {
        let annotation = |name| self.annotations().get(name);
        Holds::Lease(Box::new(LeaseSeen {
            run: annotation(RUN_ANNOTATION).and_then(|run| run.trim().parse().ok()).unwrap_or(0),
            report: annotation(REPORT_ANNOTATION).and_then(|text| serde_json::from_str(text).ok()),
        }))
    }
}

impl Watched for Deployment {
    const KIND: Kind = Kind::Deployment;

    fn holds(&self) -> Holds {
        let replicas = self.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
        let mut conditions = self.status.iter().flat_map(|s| s.conditions.iter().flatten());
        let refused = conditions.find(|c| c.type_ == "ReplicaFailure" && c.status == "True");
        Holds::Deployment(Box::new(DeploymentSeen {
            replicas: u32::try_from(replicas).unwrap_or(0),
            account: run_of(self),
            counts: counts_of(self),
            checkpoints: checkpoints_of(self),
            refused: refused.map(|c| c.message.clone().unwrap_or_else(|| "no reason is given".to_owned())),
        }))
    }
}

impl Watched for Pod {
    const KIND: Kind = Kind::Pod;

    fn holds(&self) -> Holds {
        Holds::Pod(Box::new(PodSeen::of(self)))
    }
}

/// An object of a job, with the job and its own name.
pub(super) type Told = (JobKey, String, Thing);

/// What is looked at of an object; `None` if it is no job's.
pub(super) fn told<K: Watched>(object: &K) -> Option<Told> {
    with(object, object.holds())
}

/// The same of an object whose content is not looked at.
pub(super) fn told_by_metadata<K: Resource<DynamicType = ()>>(object: &PartialObjectMeta<K>) -> Option<Told> {
    with(object, Holds::Nothing)
}

fn with<K: Resource<DynamicType = ()>>(object: &K, holds: Holds) -> Option<Told> {
    let labels = object.labels();
    let key = JobKey { namespace: object.namespace()?, base: labels.get(JOB_LABEL)?.clone() };
    let owner = object.owner_references().iter().find(|o| o.controller == Some(true));
    let thing = Thing {
        uid: object.uid()?,
        version: version(object.resource_version().as_deref()),
        owner: owner.map(|o| o.uid.clone()),
        run: labels.get(RUN_LABEL).and_then(|run| run.parse().ok()).filter(|run| *run > 0),
        applied: object.annotations().get(APPLIED_ANNOTATION).cloned(),
        leaving: object.meta().deletion_timestamp.is_some(),
        holds,
    };
    Some((key, object.name_any(), thing))
}

/// Notes on an object what it was rendered as, for the next time; answers with that. Whoever has rendered it may have done so.
pub(super) fn mark<K: Watched>(object: &mut K) -> String {
    if let Some(hash) = object.annotations().get(APPLIED_ANNOTATION) {
        return hash.clone();
    }
    // Maps of typed objects are sorted: the same object is always the same text.
    let json = serde_json::to_value(&*object).unwrap_or(Json::Null);
    let hash = format!("{:016x}", xxh3_64(json.to_string().as_bytes()));
    object.annotations_mut().insert(APPLIED_ANNOTATION.to_owned(), hash.clone());
    hash
}
