//! What else is in a cluster: pods that come and go with their Deployments, coordinators that lead if they may, storage that holds what
//! they save. One small step at a time.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use floodmark_crds::{REPORT_ANNOTATION, RUN_ANNOTATION, Report, ReportPhase, Savepoint, StreamJob, StreamJobStatus};
use floodmark_snapshot::Env;
use kube::Client;
use serde_json::{Value as Json, json};

use super::{
    server::{Server, place},
    time::Time,
};
use crate::{
    effects::{Access, Operator, Order, Outside, Removed, Reply, SavepointFound, Settings},
    lifecycle::Answer,
    metrics::Metrics,
    objects::{Defaults, IDENTITY_LIFETIME},
};

/// The name of the job that tests are about.
pub(super) const JOB: &str = "sums";
/// From one step of the world to the next.
const STEP: Duration = Duration::from_millis(50);

/// Storage, and what jobs are asked.
#[derive(Debug, Default)]
pub(super) struct Outer {
    /// What does not fit.
    pub(super) refuses: Option<String>,
    pub(super) savepoints: BTreeSet<String>,
    /// Orders that were given: `/stop {"savepoint":"x"}`.
    pub(super) orders: Vec<String>,
    pub(super) state_removed: bool,
    /// The run whose tasks fail.
    pub(super) fails: Option<u64>,
    /// Storage is reached with a Secret.
    pub(super) keyed: bool,
    /// Storage answers nobody any more, and refuses what it is asked.
    pub(super) locked: bool,
    /// The next answers of a coordinator are lost, though it obeys.
    pub(super) answers_lost: usize,
}

/// See the header of this file.
#[derive(Clone, Default)]
pub(super) struct World {
    pub(super) server: Server,
    pub(super) outer: Arc<Mutex<Outer>>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) time: Time,
    /// Where it is not the usual one.
    pub(super) certificate_lifetime: Option<Duration>,
}

impl World {
    pub(super) fn env(&self) -> Env {
        self.time.env()
    }

    pub(super) async fn sleep(&self, duration: Duration) {
        self.env().runtime.sleep(duration).await;
    }

    pub(super) fn operator(&self) -> Arc<Operator> {
        let client = Client::new(self.server.clone(), "shop");
        let settings = Settings {
            certificate_lifetime: self.certificate_lifetime.unwrap_or(IDENTITY_LIFETIME),
            namespaces: vec!["shop".into()],
            defaults: Defaults {
                image: "floodmark:1".into(),
                controller_namespace: "system".into(),
                ..Defaults::default()
            },
            instance: "controller-1".into(),
        };
        Operator::new(client, Arc::new(self.clone()), settings, self.metrics.clone(), self.env())
    }

    /// Applies a job, as a user does. It has a storage.
    pub(super) fn apply(&self, mut spec: Json) {
        let mut state = self.server.state();
        let at = place("streamjobs", JOB);
        let before = state.objects.get(&at).cloned();
        let mut next = before.clone().unwrap_or_else(
            || json!({"apiVersion": "floodmark.io/v1alpha1", "kind": "StreamJob", "metadata": {"name": JOB}}),
        );
        if spec["checkpoints"]["storage"].is_null() {
            spec["checkpoints"]["storage"] = "s3://b/c".into();
        }
        next["spec"] = spec;
        state.put(&at, before, next);
    }

    /// Makes a Savepoint of the job, as a user does.
    pub(super) fn ask_for_savepoint(&self, name: &str, mut spec: Json) {
        spec["job"] = JOB.into();
        let savepoint = json!({"apiVersion": "floodmark.io/v1alpha1", "kind": "Savepoint", "metadata": {"name": name}, "spec": spec});
        self.server.state().put(&place("savepoints", name), None, savepoint);
    }

    pub(super) fn savepoint(&self, name: &str) -> Option<Savepoint> {
        let state = self.server.state();
        state.get("savepoints", name).map(|json| serde_json::from_value(json.clone()).unwrap())
    }

    pub(super) fn job(&self) -> Option<StreamJob> {
        self.server.state().get("streamjobs", JOB).map(|json| serde_json::from_value(json.clone()).unwrap())
    }

    pub(super) fn status(&self) -> StreamJobStatus {
        self.job().and_then(|job| job.status).unwrap_or_default()
    }

    /// Lets the world go on, for ever.
    pub(super) async fn live(&self) {
        loop {
            self.step();
            self.sleep(STEP).await;
        }
    }

    fn step(&self) {
        let mut state = self.server.state();
        let deployments: Vec<Json> =
            state.objects.iter().filter(|((r, _, _), _)| r == "deployments").map(|(_, o)| o.clone()).collect();
        for deployment in &deployments {
            let (name, replicas) = (deployment["metadata"]["name"].as_str().unwrap(), &deployment["spec"]["replicas"]);
            for n in 0..8 {
                let at = place("pods", &format!("{name}-{n}"));
                let wanted = n < replicas.as_u64().unwrap_or(1);
                match (wanted, state.objects.contains_key(&at)) {
                    (true, false) => {
                        let mut pod = deployment["spec"]["template"].clone();
                        pod["metadata"]["ownerReferences"] = json!([{
                            "apiVersion": "apps/v1", "kind": "Deployment", "name": name, "controller": true,
                            "uid": deployment["metadata"]["uid"],
                        }]);
                        let ready = json!([{"type": "Ready", "status": "True"}]);
                        pod["status"] = json!({"phase": "Running", "conditions": ready});
                        state.put(&at, None, pod);
                    }
                    (false, true) => state.delete(&at),
                    _ => {}
                }
            }
        }
        let at = place("leases", JOB);
        let Some(lease) = state.objects.get(&at).cloned() else { return };
        let annotation = |name: &str| lease["metadata"]["annotations"][name].as_str().unwrap_or_default().to_owned();
        let run: u64 = annotation(RUN_ANNOTATION).parse().unwrap_or(0);
        let report: Report = serde_json::from_str(&annotation(REPORT_ANNOTATION)).unwrap_or_default();
        let pods = state.objects.keys().filter(|(r, _, _)| r == "pods");
        let of_run = |role: &str| format!("{JOB}-{run}-{role}-");
        let (coordinators, workers) = (of_run("coordinator"), of_run("worker"));
        let names: Vec<&String> = pods.map(|(_, _, name)| name).collect();
        let there = names.iter().any(|n| n.starts_with(&coordinators)) && names.iter().any(|n| n.starts_with(&workers));
        let of_run = format!("{JOB}-{run}-");
        let secret = state.objects.iter().find(|((r, _, name), _)| r == "secrets" && name.starts_with(&of_run));
        let secret = secret.map(|(_, secret)| secret.clone());
        let Some(secret) = secret.filter(|_| there && run > 0 && report.run < run) else { return };
        let manifest: k8s_openapi::ByteString = serde_json::from_value(secret["data"]["job.yaml"].clone()).unwrap();
        let manifest: StreamJob = serde_yaml::from_slice(&manifest.0).unwrap();
        let fails = self.outer.lock().unwrap().fails == Some(run);
        let report = Report {
            run,
            holder: format!("{coordinators}0"),
            http: format!("run-{run}:8080"),
            phase: if fails { ReportPhase::Failed } else { ReportPhase::Running },
            parallelism: manifest.spec.parallelism,
            completed: u64::from(!fails),
            ..Report::default()
        };
        let mut next = lease.clone();
        next["metadata"]["annotations"][REPORT_ANNOTATION] = serde_json::to_string(&report).unwrap().into();
        state.put(&at, Some(lease), next);
    }

    /// Changes what the leader of a run tells, if that run leads.
    pub(super) fn tell(&self, run: u64, change: impl FnOnce(&mut Report)) -> bool {
        let mut state = self.server.state();
        let at = place("leases", JOB);
        let Some(lease) = state.objects.get(&at).cloned() else { return false };
        let text = lease["metadata"]["annotations"][REPORT_ANNOTATION].as_str().unwrap_or_default();
        let Ok(mut report) = serde_json::from_str::<Report>(text) else { return false };
        if report.run != run {
            return false;
        }
        change(&mut report);
        let mut next = lease.clone();
        next["metadata"]["annotations"][REPORT_ANNOTATION] = serde_json::to_string(&report).unwrap().into();
        state.put(&at, Some(lease), next);
        true
    }
}

#[async_trait]
impl Outside for World {
    async fn fits(&self, _: &StreamJob, _: &str, _: &Access) -> Answer {
        self.sleep(STEP).await;
        self.outer.lock().unwrap().refuses.clone().map_or(Answer::Yes, Answer::No)
    }

    async fn savepoint(&self, _: &StreamJob, name: &str, _: &Access) -> Result<Option<SavepointFound>, String> {
        let found = self.outer.lock().unwrap().savepoints.contains(name);
        let found = found.then(|| SavepointFound {
            location: format!("s3://b/c/shop/{JOB}/savepoints/{name}"),
            epoch: 7,
            size: 99,
            created_at_ms: 1_795_255_200_000,
        });
        Ok(found)
    }

    async fn remove_state(&self, job: &StreamJob, access: &Access) -> Removed {
        assert_eq!(access.credentials.is_some(), job.spec.checkpoints.credentials.is_some());
        let mut outer = self.outer.lock().unwrap();
        if outer.locked {
            return Removed::Refused("no such bucket".into());
        }
        outer.state_removed = true;
        Removed::All
    }

    async fn remove_savepoint(&self, _: &StreamJob, name: &str, access: &Access) -> Removed {
        let mut outer = self.outer.lock().unwrap();
        assert_eq!(access.credentials.is_some(), outer.keyed);
        outer.savepoints.remove(name);
        Removed::All
    }

    async fn order(&self, order: Order) -> Reply {
        self.sleep(STEP).await;
        let run: u64 = order.to.trim_start_matches("run-").trim_end_matches(":8080").parse().unwrap();
        assert_eq!(order.token.len(), 64, "the run's own token");
        let lost = {
            let mut outer = self.outer.lock().unwrap();
            outer.orders.push(format!("{} {}", order.path, order.body));
            let lost = outer.answers_lost > 0;
            outer.answers_lost = outer.answers_lost.saturating_sub(1);
            lost
        };
        let reply = match order.path {
            "/stop" | "/savepoints" => {
                let field = if order.path == "/stop" { "savepoint" } else { "name" };
                let name = order.body[field].as_str().unwrap().to_owned();
                if !self.outer.lock().unwrap().savepoints.insert(name.clone()) {
                    return Reply::Refused(format!("there is a savepoint '{name}' already; choose another name"));
                }
                if order.path == "/stop" {
                    self.tell(run, |r| r.phase = ReportPhase::Stopped);
                }
                Reply::Done(
                    json!({"location": format!("s3://b/c/shop/{JOB}/savepoints/{name}"), "epoch": 7, "size": 99}),
                )
            }
            "/rescale" => {
                let parallelism = order.body["parallelism"].as_u64().unwrap();
                self.tell(run, |r| r.parallelism = u32::try_from(parallelism).unwrap());
                Reply::Done(json!({}))
            }
            other => panic!("{other}"),
        };
        if lost { Reply::Lost("the connection broke".into()) } else { reply }
    }
}
