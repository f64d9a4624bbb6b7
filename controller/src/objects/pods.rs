//! The pods of a run. Pure.
//!
//! Invariants: nothing in a pod depends on the run's parallelism, which changes while pods stay; the key of the job's authority is
//! in none; only a coordinator has a token for the API server.

use std::{collections::BTreeMap, net::SocketAddr};

use floodmark_crds::{EnvSource, Quantity as Amount, Resources, RunStatus, StreamJob, StreamJobSpec};
use floodmark_link::tls::Role;
use k8s_openapi::{
    api::core::v1::{
        Capabilities, ConfigMapKeySelector, Container, ContainerPort, EmptyDirVolumeSource, EnvFromSource, EnvVar,
        EnvVarSource, HTTPGetAction, KeyToPath, ObjectFieldSelector, PodSecurityContext, PodSpec, PodTemplateSpec,
        Probe, ResourceRequirements, SeccompProfile, SecretEnvSource, SecretKeySelector, SecretVolumeSource,
        SecurityContext, Toleration, TopologySpreadConstraint, Volume, VolumeMount,
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use kube::ResourceExt;

use super::{
    COORDINATOR_PORT, Defaults, HTTP_PORT, ROLE_LABEL, Unrenderable, WORKER_PORT, base, coordinator_name, namespace,
    run::{pod_selector, run_labels},
    secret, secret_name, selecting, template,
};

/// The container of our process.
pub(super) const CONTAINER: &str = "floodmark";
/// Who it runs as: nobody that the image or a node knows.
const USER: i64 = 65_532;
/// Seconds from the loss of a node's heartbeats to the replacement of its pods. Kubernetes' own default is 300.
const NODE_LOSS_SECONDS: i64 = 10;
/// Seconds that a process has to leave in order.
const GRACE_SECONDS: i64 = 30;
/// Owner and group of a mounted Secret may read it.
const SECRET_MODE: i32 = 0o440;
/// Variables that each process has.
const OWN_VARIABLES: [(&str, &str); 3] =
    [("POD_NAME", "metadata.name"), ("POD_NAMESPACE", "metadata.namespace"), ("POD_IP", "status.podIP")];

const JOB_DIR: &str = "/etc/floodmark/job";
const IDENTITY_DIR: &str = "/etc/floodmark/tls";
const TOKEN_DIR: &str = "/etc/floodmark/token";
const WORK_DIR: &str = "/var/lib/floodmark";

/// The pods of a run that have this role: ours, with the job's own template over them.
pub(super) fn template(
    job: &StreamJob,
    spec: &StreamJobSpec,
    run: &RunStatus,
    role: Role,
    defaults: &Defaults,
) -> Result<PodTemplateSpec, Unrenderable> {
    let mut labels = run_labels(job, run);
    labels.insert(ROLE_LABEL.to_owned(), role.to_string());
    let ours = PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels.clone()), ..ObjectMeta::default() }),
        spec: Some(pod(job, spec, run, role, defaults)?),
    };
    let (path, theirs) = match role {
        Role::Coordinator => ("spec.coordinator.podTemplate", spec.coordinator.pod_template.as_ref()),
        Role::Worker => ("spec.worker.podTemplate", spec.worker.pod_template.as_ref()),
    };
    let Some(theirs) = theirs else { return Ok(ours) };
    let mut merged = template::merged(&ours, theirs, path)?;
    // By these the pods are found.
    merged.metadata.get_or_insert_default().labels.get_or_insert_default().extend(labels);
    Ok(merged)
}

fn pod(
    job: &StreamJob,
    spec: &StreamJobSpec,
    run: &RunStatus,
    role: Role,
    defaults: &Defaults,
) -> Result<PodSpec, Unrenderable> {
    Ok(PodSpec {
        service_account_name: Some(base(&job.name_any())),
        automount_service_account_token: Some(role == Role::Coordinator),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(GRACE_SECONDS),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            seccomp_profile: Some(runtime_default()),
            ..PodSecurityContext::default()
        }),
        tolerations: Some(["not-ready", "unreachable"].map(tolerated_for_a_moment).to_vec()),
        topology_spread_constraints: Some(vec![TopologySpreadConstraint {
            max_skew: 1,
            topology_key: "kubernetes.io/hostname".to_owned(),
            when_unsatisfiable: "ScheduleAnyway".to_owned(),
            label_selector: Some(selecting(pod_selector(job, run, role))),
            ..TopologySpreadConstraint::default()
        }]),
        containers: vec![container(job, spec, run, role, defaults)?],
        volumes: Some(volumes(job, run, role)),
        ..PodSpec::default()
    })
}

fn container(
    job: &StreamJob,
    spec: &StreamJobSpec,
    run: &RunStatus,
    role: Role,
    defaults: &Defaults,
) -> Result<Container, Unrenderable> {
    let (port, resources) = match role {
        Role::Coordinator => (COORDINATOR_PORT, &spec.coordinator.resources),
        Role::Worker => (WORKER_PORT, &spec.worker.resources),
    };
    let credentials = spec.checkpoints.credentials.as_ref().map(|credentials| EnvFromSource {
        secret_ref: Some(SecretEnvSource { name: credentials.secret_name.clone(), optional: None }),
        ..EnvFromSource::default()
    });
    Ok(Container {
        name: CONTAINER.to_owned(),
        image: Some(spec.image.clone().unwrap_or_else(|| defaults.image.clone())),
        image_pull_policy: defaults.image_pull_policy.clone(),
        command: Some(vec!["floodmark".to_owned()]),
        args: Some(match role {
            Role::Coordinator => coordinator_args(job, spec, run, defaults),
            Role::Worker => worker_args(job, spec, run, defaults),
        }),
        env: Some(environment(spec)?),
        env_from: credentials.map(|source| vec![source]),
        ports: Some(vec![container_port(&role.to_string(), port), container_port("http", HTTP_PORT)]),
        resources: requirements(resources),
        // Until it answers for the first time it is asked often, so that nothing waits for it longer than it takes.
        startup_probe: Some(asked(1, 1, 300)),
        readiness_probe: Some(asked(5, 5, 3)),
        // A process that has lost its node's CPU for a while is not dead.
        liveness_probe: Some(asked(10, 5, 6)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            privileged: Some(false),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            seccomp_profile: Some(runtime_default()),
            ..SecurityContext::default()
        }),
        // The process writes why it ends; one that could not has perhaps said it on standard error.
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(mounts(role)),
        ..Container::default()
    })
}

/// All addresses of a pod, with this port.
fn any(port: u16, defaults: &Defaults) -> String {
    SocketAddr::new(defaults.all_addresses(), port).to_string()
}

fn coordinator_args(job: &StreamJob, spec: &StreamJobSpec, run: &RunStatus, defaults: &Defaults) -> Vec<String> {
    let base = base(&job.name_any());
    let (manifest, listen) = (format!("{JOB_DIR}/{}", secret::MANIFEST), any(COORDINATOR_PORT, defaults));
    let (http, token) = (any(HTTP_PORT, defaults), format!("{TOKEN_DIR}/{}", secret::TOKEN));
    let number = run.number.to_string();
    let mut args = words(&["coordinator", &manifest, "--listen", &listen, "--identity", IDENTITY_DIR]);
    args.extend(words(&["--listen-http", &http, "--http-token-file", &token, "--lease", &base, "--run", &number]));
    if !run.restore.is_empty() {
        // In one word, so that what begins with `-` is no option.
        args.push(format!("--restore={}", literal(&run.restore)));
    }
    if spec.coordinator.standby {
        // A lease that another waits for is given up sooner.
        args.push("--standby".to_owned());
    }
    args.extend(words(&["--work-dir", WORK_DIR]));
    args
}

fn worker_args(job: &StreamJob, spec: &StreamJobSpec, run: &RunStatus, defaults: &Defaults) -> Vec<String> {
    let service = coordinator_name(&job.name_any(), run.number);
    let domain = defaults.cluster_domain.as_deref().map(|domain| format!(".{domain}")).unwrap_or_default();
    let coordinator = format!("{service}.{}.svc{domain}:{COORDINATOR_PORT}", namespace(job));
    let manifest = format!("{JOB_DIR}/{}", secret::MANIFEST);
    // Of which family it is only the pod knows. An address of IPv6 without brackets is understood, too: the port is what comes last.
    let (listen, http) = (format!("$(POD_IP):{WORKER_PORT}"), any(HTTP_PORT, defaults));
    let slots = spec.worker.slots.to_string();
    let mut args = words(&["worker", &manifest, "--coordinator", &coordinator, "--listen", &listen]);
    args.extend(words(&["--identity", IDENTITY_DIR, "--slots", &slots, "--listen-http", &http]));
    args.extend(words(&["--work-dir", WORK_DIR]));
    args
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// As an argument that the kubelet hands on as it is: it takes `$(NAME)` for a variable, and `$$` for `$`.
fn literal(text: &str) -> String {
    text.replace('$', "$$")
}

fn environment(spec: &StreamJobSpec) -> Result<Vec<EnvVar>, Unrenderable> {
    let own = OWN_VARIABLES.map(|(name, field)| EnvVar {
        name: name.to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { field_path: field.to_owned(), api_version: None }),
            ..EnvVarSource::default()
        }),
    });
    let mut variables = own.to_vec();
    for (i, variable) in spec.env.iter().enumerate() {
        if OWN_VARIABLES.iter().any(|(name, _)| *name == variable.name) {
            let message = format!("{} is set by Floodmark itself; choose another name", variable.name);
            return Err(Unrenderable::new(format!("spec.env[{i}].name"), message));
        }
        variables.push(EnvVar {
            name: variable.name.clone(),
            value: variable.value.clone(),
            value_from: variable.value_from.as_ref().map(source),
        });
    }
    Ok(variables)
}

fn source(source: &EnvSource) -> EnvVarSource {
    EnvVarSource {
        secret_key_ref: source.secret_key_ref.as_ref().map(|of| SecretKeySelector {
            name: of.name.clone(),
            key: of.key.clone(),
            optional: None,
        }),
        config_map_key_ref: source.config_map_key_ref.as_ref().map(|of| ConfigMapKeySelector {
            name: of.name.clone(),
            key: of.key.clone(),
            optional: None,
        }),
        ..EnvVarSource::default()
    }
}

fn requirements(resources: &Resources) -> Option<ResourceRequirements> {
    let amounts = |amounts: &BTreeMap<String, Amount>| {
        let amounts = amounts.iter().map(|(name, amount)| (name.clone(), Quantity(amount.0.clone())));
        Some(amounts.collect::<BTreeMap<_, _>>()).filter(|amounts| !amounts.is_empty())
    };
    let (requests, limits) = (amounts(&resources.requests), amounts(&resources.limits));
    let any = requests.is_some() || limits.is_some();
    any.then_some(ResourceRequirements { requests, limits, claims: None })
}

fn asked(period_seconds: i32, timeout_seconds: i32, failure_threshold: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some("/healthz".to_owned()),
            port: IntOrString::String("http".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(timeout_seconds),
        failure_threshold: Some(failure_threshold),
        ..Probe::default()
    }
}

fn container_port(name: &str, port: u16) -> ContainerPort {
    ContainerPort {
        name: Some(name.to_owned()),
        container_port: port.into(),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

fn runtime_default() -> SeccompProfile {
    SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }
}

fn tolerated_for_a_moment(what: &str) -> Toleration {
    Toleration {
        key: Some(format!("node.kubernetes.io/{what}")),
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        toleration_seconds: Some(NODE_LOSS_SECONDS),
        value: None,
    }
}

/// Only what the role needs of the run's Secret is in its pods.
fn volumes(job: &StreamJob, run: &RunStatus, role: Role) -> Vec<Volume> {
    let secret = |name: &str, items: &[(&str, &str)]| Volume {
        name: name.to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret_name(job, run.number)),
            default_mode: Some(SECRET_MODE),
            items: Some(
                items
                    .iter()
                    .map(|(key, path)| KeyToPath { key: (*key).to_owned(), path: (*path).to_owned(), mode: None })
                    .collect(),
            ),
            optional: None,
        }),
        ..Volume::default()
    };
    let empty = |name: &str| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Volume::default()
    };
    let (certificate, key) = secret::keys_of(role);
    let identity = [(certificate, "tls.crt"), (key, "tls.key"), (secret::AUTHORITY, secret::AUTHORITY)];
    let mut volumes = vec![
        empty("work"),
        empty("tmp"),
        secret("job", &[(secret::MANIFEST, secret::MANIFEST)]),
        secret("identity", &identity),
    ];
    if role == Role::Coordinator {
        volumes.push(secret("token", &[(secret::TOKEN, secret::TOKEN)]));
    }
    volumes
}

fn mounts(role: Role) -> Vec<VolumeMount> {
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    };
    let mut mounts = vec![
        mount("work", WORK_DIR, false),
        mount("tmp", "/tmp", false),
        mount("job", JOB_DIR, true),
        mount("identity", IDENTITY_DIR, true),
    ];
    if role == Role::Coordinator {
        mounts.push(mount("token", TOKEN_DIR, true));
    }
    mounts
}
