//! What a job has as long as it is there, whichever run is in force. Pure.

use std::collections::BTreeMap;

use floodmark_crds::{RUN_ANNOTATION, StreamJob};
use k8s_openapi::{
    api::{
        coordination::v1::Lease,
        core::v1::{Service, ServiceAccount, ServicePort, ServiceSpec},
        networking::v1::{
            NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
        },
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
        rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use kube::ResourceExt;

use super::{
    COORDINATOR_PORT, Defaults, HTTP_PORT, JOB_LABEL, ROLE_LABEL, RUN_LABEL, WORKER_PORT, base, labels, meta,
    namespace, selecting, strings,
};

const LEASES: &str = "coordination.k8s.io";
const RBAC: &str = "rbac.authorization.k8s.io";
/// Label that every namespace has: its name.
const NAMESPACE_LABEL: &str = "kubernetes.io/metadata.name";
/// How many pods of a job a drain may take at the same time.
const UNAVAILABLE_MAX: i32 = 1;

/// See the header of this file; and [`lease`]. All are for server-side apply: what is not in them belongs to others.
#[derive(Clone, Debug, PartialEq)]
pub struct JobObjects {
    /// Whom the job's pods run as.
    pub service_account: ServiceAccount,
    /// What coordinators may do: read and write the job's Lease, nothing else.
    pub role: Role,
    /// Gives them that.
    pub role_binding: RoleBinding,
    /// HTTP of the coordinator of the run in force.
    pub service: Service,
    /// Keeps drains from taking several pods at a time.
    pub pod_disruption_budget: PodDisruptionBudget,
    /// Who may reach the job's pods: each other, and the controller over HTTP.
    pub network_policy: NetworkPolicy,
}

/// The objects of a job of which this run is in force; none: its Service leads nowhere.
#[must_use]
pub fn job_objects(job: &StreamJob, run: Option<u64>, defaults: &Defaults) -> JobObjects {
    let base = base(&job.name_any());
    let run = run.unwrap_or(0).to_string();
    let meta = || meta(job, base.clone(), labels(job));
    let pods = strings([(JOB_LABEL, &base)]);
    JobObjects {
        service_account: ServiceAccount {
            metadata: meta(),
            automount_service_account_token: Some(false),
            ..ServiceAccount::default()
        },
        role: role(meta(), &base),
        role_binding: role_binding(meta(), &base, namespace(job)),
        service: Service {
            metadata: meta(),
            spec: Some(ServiceSpec {
                selector: Some(strings([(JOB_LABEL, &base), (RUN_LABEL, &run), (ROLE_LABEL, "coordinator")])),
                ports: Some(vec![service_port("http", HTTP_PORT)]),
                ..ServiceSpec::default()
            }),
            status: None,
        },
        pod_disruption_budget: PodDisruptionBudget {
            metadata: meta(),
            spec: Some(PodDisruptionBudgetSpec {
                max_unavailable: Some(IntOrString::Int(UNAVAILABLE_MAX)),
                selector: Some(selecting(pods.clone())),
                // A pod that can't start must not keep its node from being drained.
                unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
                ..PodDisruptionBudgetSpec::default()
            }),
            status: None,
        },
        network_policy: network_policy(meta(), pods, defaults),
    }
}

/// The Lease of a job, for server-side apply: this run may lead; 0: none may. Its spec, and the report, are the leader's.
#[must_use]
pub fn lease(job: &StreamJob, run: u64) -> Lease {
    let annotations = strings([(RUN_ANNOTATION, &run.to_string())]);
    let metadata = meta(job, base(&job.name_any()), labels(job));
    Lease { metadata: ObjectMeta { annotations: Some(annotations), ..metadata }, spec: None }
}

fn role(metadata: ObjectMeta, base: &str) -> Role {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let lease = PolicyRule {
        api_groups: Some(words(&[LEASES])),
        resources: Some(words(&["leases"])),
        resource_names: Some(words(&[base])),
        verbs: words(&["get", "watch", "patch", "update"]),
        non_resource_urls: None,
    };
    Role { metadata, rules: Some(vec![lease]) }
}

fn role_binding(metadata: ObjectMeta, base: &str, namespace: String) -> RoleBinding {
    let subject = Subject {
        kind: "ServiceAccount".to_owned(),
        name: base.to_owned(),
        namespace: Some(namespace),
        api_group: None,
    };
    RoleBinding {
        metadata,
        role_ref: RoleRef { api_group: RBAC.to_owned(), kind: "Role".to_owned(), name: base.to_owned() },
        subjects: Some(vec![subject]),
    }
}

/// Egress is free: sources, sinks and storage may be anywhere.
fn network_policy(metadata: ObjectMeta, pods: BTreeMap<String, String>, defaults: &Defaults) -> NetworkPolicy {
    let same_job = NetworkPolicyPeer { pod_selector: Some(selecting(pods.clone())), ..NetworkPolicyPeer::default() };
    let controller = NetworkPolicyPeer {
        namespace_selector: Some(selecting(strings([(NAMESPACE_LABEL, &defaults.controller_namespace)]))),
        pod_selector: Some(selecting(defaults.controller_labels.clone())),
        ip_block: None,
    };
    let allow = |from, ports: &[u16]| NetworkPolicyIngressRule {
        from: Some(vec![from]),
        ports: Some(ports.iter().map(|port| policy_port(*port)).collect()),
    };
    NetworkPolicy {
        metadata,
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(selecting(pods)),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(vec![allow(same_job, &[COORDINATOR_PORT, WORKER_PORT]), allow(controller, &[HTTP_PORT])]),
            egress: None,
        }),
    }
}

fn policy_port(port: u16) -> NetworkPolicyPort {
    NetworkPolicyPort { port: Some(IntOrString::Int(port.into())), protocol: Some("TCP".to_owned()), end_port: None }
}

pub(super) fn service_port(name: &str, port: u16) -> ServicePort {
    ServicePort {
        name: Some(name.to_owned()),
        port: port.into(),
        target_port: Some(IntOrString::String(name.to_owned())),
        protocol: Some("TCP".to_owned()),
        ..ServicePort::default()
    }
}
