//! The objects of a small and of a full job, word for word, and what holds of all of them.

use std::collections::BTreeMap;

use expect_test::{Expect, ExpectFile, expect, expect_file};
use floodmark_crds::{CheckpointMode, RunStatus, StreamJob, Timestamp};
use floodmark_link::tls::Issued;
use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{PodTemplateSpec, Service},
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};
use kube::ResourceExt;
use serde::Serialize;

use super::*;

const SMALL: &str = "
sql: INSERT INTO hot SELECT * FROM bids
checkpoints: {storage: s3://bucket/jobs}";

const FULL: &str = "
sql: |
  CREATE TABLE bids (auction BIGINT) WITH ('connector' = 'kafka', 'password' = '${KAFKA_PASSWORD}');
  INSERT INTO hot SELECT * FROM bids
parallelism: 5
maxParallelism: 64
state: {backend: RocksDB, ttl: 24h}
checkpoints: {storage: s3://bucket/jobs, interval: 1s, credentials: {secretName: s3}, onDelete: Delete}
restore: {from: s3://bucket/old, nonce: 4}
upgrade: {mode: LastCheckpoint}
restartNonce: 2
image: example.com/floodmark:1.2.3
env:
- {name: REGION, value: north}
- {name: KAFKA_PASSWORD, valueFrom: {secretKeyRef: {name: kafka, key: password}}}
- {name: TOPIC, valueFrom: {configMapKeyRef: {name: topics, key: bids}}}
coordinator:
  standby: true
  resources: {requests: {cpu: 100m, memory: 64Mi}, limits: {memory: 256Mi}}
  podTemplate:
    metadata: {annotations: {example.com/team: shop}, labels: {floodmark.io/role: none, team: shop}}
    spec: {priorityClassName: high, serviceAccountName: shop}
worker:
  slots: 2
  spares: 1
  resources: {requests: {cpu: 2, memory: 4Gi}, limits: {memory: 4Gi}}
  podTemplate:
    spec:
      nodeSelector: {disk: nvme}
      tolerations: [{key: dedicated, operator: Equal, value: streams, effect: NoSchedule}]
      terminationGracePeriodSeconds: 60
      containers:
      - name: floodmark
        envFrom: [{configMapRef: {name: proxy}}]
        env: [{name: MALLOC_ARENA_MAX, value: '2'}]
      - {name: log, image: example.com/log:1}
      volumes:
      - name: work
        ephemeral: {volumeClaimTemplate: {spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 50Gi}}}}}";

pub(super) fn job(spec: &str) -> StreamJob {
    let mut job = StreamJob::new("hot-items", serde_yaml::from_str(spec).unwrap());
    job.metadata =
        ObjectMeta { namespace: Some("shop".into()), uid: Some("1-2-3".into()), generation: Some(3), ..job.metadata };
    job
}

pub(super) fn run(number: u64, parallelism: u32) -> RunStatus {
    let (revision, restore) = ("0123456789".to_owned(), "latest".to_owned());
    RunStatus { number, revision, parallelism, restore, stable: false }
}

pub(super) fn defaults() -> Defaults {
    Defaults {
        image: "floodmark:0.1.0".into(),
        image_pull_policy: None,
        controller_namespace: "floodmark-system".into(),
        controller_labels: strings([CONTROLLER_LABEL]),
        cluster_domain: None,
        ipv6: false,
    }
}

fn identity() -> RunIdentity {
    let issued = |of: &str| Issued {
        certificate: format!("certificate of {of}\n"),
        key: format!("key of {of}\n"),
        authority: "certificate of the authority\n".into(),
    };
    let generation = |of: &str| Generation {
        until: Timestamp::from_millis(90_000),
        coordinator: issued(&format!("{of} coordinator")),
        worker: issued(&format!("{of} workers")),
    };
    RunIdentity { present: generation("the"), next: generation("the next"), token: "0123abcd".into() }
}

fn documents(job: &StreamJob, run: &RunStatus, defaults: &Defaults) -> String {
    let mut text = String::new();
    fn add(text: &mut String, object: &impl Serialize) {
        text.push_str("---\n");
        text.push_str(&serde_yaml::to_string(object).unwrap());
    }
    let of_job = job_objects(job, Some(run.number), defaults);
    add(&mut text, &of_job.service_account);
    add(&mut text, &of_job.role);
    add(&mut text, &of_job.role_binding);
    add(&mut text, &lease(job, run.number));
    add(&mut text, &of_job.service);
    add(&mut text, &of_job.pod_disruption_budget);
    add(&mut text, &of_job.network_policy);
    add(&mut text, &revision_object(job, &job.spec).unwrap());
    let of_run = run_objects(job, &job.spec, run, defaults).unwrap();
    add(&mut text, &run_secret(job, &job.spec, run, None, &identity(), Timestamp::default()).unwrap());
    add(&mut text, &of_run.service);
    add(&mut text, &of_run.coordinator);
    add(&mut text, &of_run.worker);
    text
}

fn check(spec: &str, run: &RunStatus, defaults: &Defaults, expected: ExpectFile) {
    expected.assert_eq(&documents(&job(spec), run, defaults));
}

#[test]
fn a_job_that_says_little() {
    check(SMALL, &run(1, 1), &defaults(), expect_file!["golden/small.yaml"]);
}

#[test]
fn a_job_that_says_all() {
    let restored = RunStatus { restore: "s3://bucket/$(POD_IP)/savepoints/a".into(), ..run(12, 5) };
    let (policy, domain) = (Some("Always".into()), Some("cluster.local".into()));
    let defaults = Defaults { image_pull_policy: policy, cluster_domain: domain, ..defaults() };
    check(FULL, &restored, &defaults, expect_file!["golden/full.yaml"]);
}

#[test]
fn a_second_look_comes_to_the_same() {
    let (job, run) = (job(FULL), run(2, 3));
    assert_eq!(documents(&job, &run, &defaults()), documents(&job, &run, &defaults()));
}

/// Pods and how they are found.
fn pods_of(job: &StreamJob, run: &RunStatus) -> (RunObjects, [PodTemplateSpec; 2]) {
    let objects = run_objects(job, &job.spec, run, &defaults()).unwrap();
    let template = |deployment: &Deployment| deployment.spec.as_ref().unwrap().template.clone();
    let pods = [template(&objects.coordinator), template(&objects.worker)];
    (objects, pods)
}

fn found(selector: &BTreeMap<String, String>, pods: &[PodTemplateSpec]) -> Vec<String> {
    let labels = |pod: &PodTemplateSpec| pod.metadata.clone().unwrap().labels.unwrap();
    let fits = |pod: &&PodTemplateSpec| selector.iter().all(|(name, value)| labels(pod).get(name) == Some(value));
    let who = |pod: &PodTemplateSpec| format!("{} {}", labels(pod)[RUN_LABEL], labels(pod)[ROLE_LABEL]);
    pods.iter().filter(fits).map(who).collect()
}

#[test]
fn each_finds_its_own_pods_and_no_others() {
    for spec in [SMALL, FULL] {
        let job = job(spec);
        let ((one, pods_one), (two, pods_two)) = (pods_of(&job, &run(1, 1)), pods_of(&job, &run(2, 1)));
        let pods: Vec<_> = pods_one.into_iter().chain(pods_two).collect();
        let by =
            |selector: &Option<LabelSelector>| found(selector.as_ref().unwrap().match_labels.as_ref().unwrap(), &pods);
        let of_deployment = |d: &Deployment| by(&d.spec.as_ref().map(|s| s.selector.clone()));
        let of_service = |s: &Service| found(s.spec.as_ref().unwrap().selector.as_ref().unwrap(), &pods);
        assert_eq!(of_deployment(&one.coordinator), ["1 coordinator"]);
        assert_eq!(of_deployment(&two.worker), ["2 worker"]);
        assert_eq!(of_service(&one.service), ["1 coordinator"]);
        let in_force = job_objects(&job, Some(2), &defaults());
        assert_eq!(of_service(&in_force.service), ["2 coordinator"]);
        let of_job = job_objects(&job, None, &defaults());
        assert_eq!(of_service(&of_job.service), Vec::<String>::new());
        assert_eq!(by(&of_job.pod_disruption_budget.spec.unwrap().selector).len(), 4);
        assert_eq!(by(&of_job.network_policy.spec.unwrap().pod_selector).len(), 4);
        assert_eq!(lease(&job, 0).annotations()["floodmark.io/run"], "0");
    }
}

#[test]
fn every_pod_is_restricted() {
    for spec in [SMALL, &FULL.replace("- {name: log, image: example.com/log:1}", "")] {
        for pod in pods_of(&job(spec), &run(1, 1)).1 {
            assert_eq!(restricted::violations(&serde_json::to_value(pod.spec).unwrap()), Vec::<String>::new());
        }
    }
    let privileged = "{sql: a, worker: {podTemplate: {spec: {hostNetwork: true}}}}";
    let pods = pods_of(&job(privileged), &run(1, 1)).1;
    let of_worker = restricted::violations(&serde_json::to_value(&pods[1].spec).unwrap());
    assert_eq!(of_worker, ["hostNetwork is forbidden"], "a job may ask for it; the cluster says no");
}

#[test]
fn the_template_in_the_documentation_is_one() {
    let page = include_str!("../../../docs/kubernetes.md");
    let example = page.split("```yaml\nspec:\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let worker = pods_of(&job(&format!("  sql: a\n{example}")), &run(1, 1)).1[1].clone().spec.unwrap();
    assert_eq!(restricted::violations(&serde_json::to_value(&worker).unwrap()), Vec::<String>::new());
    let work = worker.volumes.unwrap().into_iter().find(|volume| volume.name == "work").unwrap();
    assert!(work.ephemeral.is_some() && work.empty_dir.is_none());
    assert_eq!(worker.tolerations.unwrap().len(), 3);
}

#[test]
fn a_worker_has_no_key_but_its_own_and_nobody_the_authoritys() {
    let [coordinator, worker] = pods_of(&job(SMALL), &run(1, 1)).1;
    let keys = |pod: PodTemplateSpec| {
        let volumes = pod.spec.unwrap().volumes.unwrap_or_default();
        let items = volumes.into_iter().filter_map(|v| v.secret?.items).flatten();
        items.map(|item| item.key).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(worker.spec.as_ref().unwrap().automount_service_account_token, Some(false));
    assert_eq!(keys(worker), "job.yaml worker.crt worker.key ca.crt");
    assert_eq!(keys(coordinator), "job.yaml coordinator.crt coordinator.key ca.crt token");
    let secret =
        run_secret(&job(SMALL), &job(SMALL).spec, &run(1, 1), None, &identity(), Timestamp::default()).unwrap();
    assert!(secret.string_data.unwrap().values().all(|text| text != "key of the authority"));
}

#[test]
fn names_and_labels_of_any_job_are_such_as_a_cluster_takes() {
    let name = "a.very-long.name-of-a.job-that-is.still-one-that-a.cluster-take";
    assert_eq!(name.len(), 63);
    for name in [name, "2.b", "a"] {
        let mut job = job(FULL);
        job.metadata.name = Some(name.to_owned());
        let text = documents(&job, &run(9_999_999_999, 5), &defaults());
        let mut objects = 0;
        for document in serde_yaml::Deserializer::from_str(&text) {
            let object = <serde_json::Value as serde::Deserialize>::deserialize(document).unwrap();
            let called = object["metadata"]["name"].as_str().unwrap();
            assert!(called.len() <= 63 && !called.contains('.'), "{called}");
            for (label, value) in object["metadata"]["labels"].as_object().unwrap() {
                assert!(value.as_str().unwrap().len() <= 63, "{label}");
            }
            objects += 1;
        }
        assert_eq!(objects, 12);
    }
}

#[test]
fn a_run_is_known_by_its_deployments() {
    let run = RunStatus { restore: "before-upgrade".into(), ..run(7, 4) };
    let objects = pods_of(&job(FULL), &run).0;
    for mut deployment in [objects.coordinator, objects.worker] {
        assert_eq!(run_of(&deployment), Some(run.clone()));
        let counts = counts_of(&deployment).unwrap();
        assert_eq!(counts, PodCounts::of(&job(FULL).spec));
        assert_eq!(checkpoints_of(&deployment), Some(job(FULL).spec.checkpoints.mode));
        assert_eq!(counts.workers(run.parallelism), job(FULL).spec.worker.pods(run.parallelism));
        deployment.annotations_mut().insert(PARALLELISM_ANNOTATION.into(), "0".into());
        assert_eq!(run_of(&deployment), None);
    }
    let none = Deployment::default();
    assert_eq!((run_of(&none), counts_of(&none), checkpoints_of(&none)), (None, None, None));
    for mode in [CheckpointMode::ExactlyOnce, CheckpointMode::AtLeastOnce, CheckpointMode::Disabled] {
        let mut job = job(SMALL);
        job.spec.checkpoints.mode = mode;
        let objects = pods_of(&job, &run).0;
        assert_eq!([&objects.coordinator, &objects.worker].map(checkpoints_of), [Some(mode); 2]);
    }
}

#[test]
fn pods_listen_where_they_can_be_reached() {
    let job = job(SMALL);
    let listens = |ipv6| {
        let objects = run_objects(&job, &job.spec, &run(1, 1), &Defaults { ipv6, ..defaults() }).unwrap();
        let pods = [objects.coordinator, objects.worker].map(|d| d.spec.unwrap().template.spec.unwrap());
        let args: Vec<String> = pods.into_iter().flat_map(|p| p.containers[0].args.clone().unwrap()).collect();
        let after = |option: &str| -> Vec<String> {
            args.windows(2).filter(|words| words[0] == option).map(|words| words[1].clone()).collect()
        };
        [after("--listen"), after("--listen-http")].concat().join(" ")
    };
    assert_eq!(listens(false), "0.0.0.0:7000 $(POD_IP):7001 0.0.0.0:8080 0.0.0.0:8080");
    assert_eq!(listens(true), "[::]:7000 $(POD_IP):7001 [::]:8080 [::]:8080");
    // What becomes of the worker's: the process takes it for what it is.
    for (ip, address) in [("10.0.0.7", "10.0.0.7:7001"), ("fd00::7", "[fd00::7]:7001")] {
        let mut found = std::net::ToSocketAddrs::to_socket_addrs(&format!("{ip}:7001")).unwrap();
        assert_eq!(found.next().unwrap().to_string(), address);
    }
}

#[test]
fn more_workers_are_the_same_pods() {
    let job = job(FULL);
    let (before, after) = (run(7, 5), run(7, 9));
    let (mut objects, _) = pods_of(&job, &before);
    let scaled = pods_of(&job, &after).0;
    assert_eq!(objects.coordinator.spec, scaled.coordinator.spec);
    assert_eq!(scale_patch(6).to_string(), r#"{"spec":{"replicas":6}}"#);
    objects = objects.with_workers(6);
    objects.worker.annotations_mut().insert(PARALLELISM_ANNOTATION.into(), "9".into());
    assert_eq!(objects.worker, scaled.worker, "the number of pods is all that has changed");
}

#[test]
fn what_no_pod_comes_of_is_named() {
    let refused = |spec: &str, expected: Expect| {
        let job = job(spec);
        expected.assert_eq(&run_objects(&job, &job.spec, &run(1, 1), &defaults()).unwrap_err().to_string());
    };
    refused(
        "{sql: a, env: [{name: A, value: b}, {name: POD_IP, value: c}]}",
        expect!["spec.env[1].name: POD_IP is set by Floodmark itself; choose another name"],
    );
    refused(
        "{sql: a, coordinator: {podTemplate: {metadata: {labels: [a]}}}}",
        expect!["spec.coordinator.podTemplate.metadata.labels: invalid type: sequence, expected a map"],
    );
}

#[test]
fn only_what_the_job_controls_is_its_own() {
    let job = job(SMALL);
    let service = job_objects(&job, None, &defaults()).service;
    assert!(is_of(&job, &service.metadata));
    let mut other = job.clone();
    other.metadata.uid = Some("4".into());
    assert!(!is_of(&other, &service.metadata));
    assert!(!is_of(&job, &ObjectMeta::default()));
}
