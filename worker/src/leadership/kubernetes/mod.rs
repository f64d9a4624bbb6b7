//! Leadership by a Lease of a Kubernetes cluster, in which the leader also tells how its job is.
//!
//! A controller makes the Lease, and says in it which run of the job may lead; [`decision`] has what follows from what it
//! says, [`report`] what is told in it and when. Each change names the version that it is based on: if somebody else has changed
//! the Lease, it is read again, and decided anew.
//!
//! An API server that can't be reached changes nothing: who waits waits on, who leads goes on, and tries again. All of it
//! happens beside the loop that runs the job, which never waits for it.
//!
//! Invariant: what a run has come to is in the Lease before the Lease is given back.

mod decision;
mod report;
#[cfg(test)]
mod server;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use floodmark_crds::{REPORT_ANNOTATION, Report, ReportPhase};
use floodmark_link::transport::Endpoint;
use floodmark_snapshot::{Env, Error, Result};
use futures::{
    StreamExt,
    future::{Either, select},
    stream::BoxStream,
};
use k8s_openapi::{
    api::coordination::v1::Lease as Object,
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
    serde_json::{Value, json},
};
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams, WatchEvent, WatchParams},
};

use self::decision::{Asker, At, Seen, Verdict, decide};
use super::{Ending, Leadership, Lease};
use crate::Progress;

/// Whoever waits reads the Lease anew after so long, should nothing be heard of it.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// From a request that has failed to the next, at least and at most: a part of what is left of the lease.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// How long the API server may take for a request, at least and at most: a part of the lease's duration.
const ANSWER_WITHIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// How long a connection to the API server may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// Changes in a row that others may get ahead of, before there is a pause.
const CONFLICTS_MAX: usize = 5;
/// As whose fields the API server notes what this changes.
const FIELD_OWNER: &str = "floodmark-coordinator";
/// Where a pod finds the namespace that it is in.
const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// How often a lease is renewed, and how long it lasts without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rhythm {
    /// From one renewal to the next.
    pub renew_every: Duration,
    /// Without a renewal for so long, another may take the lease: whole seconds.
    pub duration: Duration,
}

impl Rhythm {
    /// If nobody stands by: a leader that is gone is replaced under the same name.
    pub const ALONE: Self = Self { renew_every: Duration::from_secs(10), duration: Duration::from_secs(30) };
    /// If another stands by to take over.
    pub const STANDBY: Self = Self { renew_every: Duration::from_secs(1), duration: Duration::from_secs(3) };
}

/// Which Lease it is, and in what namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseName {
    /// The Lease's own and its pods'. Default: the one that this process's pod is in.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

/// Who stands for election, and what it tells of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The name by which it holds the Lease: its pod's. If it is started again, it has the same.
    pub identity: String,
    /// The run of the job that it would lead.
    pub run: u64,
    /// Where it answers HTTP: `host:port`, or nothing.
    pub http: String,
    /// Subtasks per task before the first attempt.
    pub parallelism: u32,
}

/// See the header of this file.
#[derive(Clone)]
pub struct KubernetesLease {
    api: Api<Object>,
    name: String,
    candidate: Arc<Candidate>,
    rhythm: Rhythm,
    progress: Arc<Progress>,
    env: Env,
}

impl KubernetesLease {
    /// Finds the API server as `kubectl` does (`KUBECONFIG`), or as a pod. `progress` is the job's, which it tells of. Within
    /// a tokio runtime.
    ///
    /// # Errors
    /// When there is no telling where the API server is, or which namespace is meant.
    pub async fn connect(
        lease: LeaseName,
        candidate: Candidate,
        rhythm: Rhythm,
        progress: Arc<Progress>,
        env: Env,
    ) -> Result<Self> {
        let nowhere = |e: &dyn std::fmt::Display| {
            let remedy = "run it in a pod with a service account, or set KUBECONFIG";
            Error::abort(format!("find the cluster's API server for Lease {}: {e}; {remedy}", lease.name))
        };
        let mut config = Config::infer().await.map_err(|e| nowhere(&e))?;
        config.connect_timeout = Some(CONNECT_WITHIN);
        // What follows from a failure is decided here.
        config.default_retry = false;
        let in_pod = || std::fs::read_to_string(NAMESPACE_FILE).ok().map(|text| text.trim().to_owned());
        let namespace = lease.namespace.or_else(in_pod).unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|e| nowhere(&e))?;
        Ok(Self::new(client, &namespace, lease.name, candidate, rhythm, (progress, env)))
    }

    fn new(
        client: Client,
        namespace: &str,
        name: String,
        candidate: Candidate,
        rhythm: Rhythm,
        (progress, env): (Arc<Progress>, Env),
    ) -> Self {
        Self { api: Api::namespaced(client, namespace), name, candidate: Arc::new(candidate), rhythm, progress, env }
    }

    fn now(&self) -> Duration {
        self.env.clock.monotonic()
    }

    /// When a request that is made now counts as failed.
    fn answer_within(&self) -> Duration {
        (self.rhythm.duration / 4).clamp(ANSWER_WITHIN.0, ANSWER_WITHIN.1)
    }

    fn retry_after(&self) -> Duration {
        (self.rhythm.duration / 8).clamp(RETRY_AFTER.0, RETRY_AFTER.1)
    }

    async fn in_time<T>(&self, what: &str, request: impl Future<Output = kube::Result<T>>) -> Result<T, Trouble> {
        let within = self.answer_within();
        let mut request = std::pin::pin!(request);
        let answer = select(request.as_mut(), self.env.runtime.sleep(within)).await;
        let trouble = |why: String| Trouble::Unreachable(format!("{what} Lease {}: {why}", self.name));
        match answer {
            Either::Left((Ok(answer), _)) => Ok(answer),
            Either::Left((Err(kube::Error::Api(status)), _)) if status.code == 409 => Err(Trouble::Conflict),
            Either::Left((Err(kube::Error::Api(status)), _)) => {
                Err(trouble(format!("the API server answers {}: {}", status.code, status.message)))
            }
            Either::Left((Err(error), _)) => Err(trouble(with_causes(&error))),
            Either::Right(_) => Err(trouble(format!("no answer within {within:?}"))),
        }
    }

    async fn read(&self) -> Result<Object, Trouble> {
        self.in_time("read", self.api.get(&self.name)).await
    }

    /// What becomes of the Lease from now on.
    async fn watch(&self, from: &Object) -> Result<Changes, Trouble> {
        let params = WatchParams::default().fields(&format!("metadata.name={}", self.name));
        let version = from.metadata.resource_version.as_deref().unwrap_or("0");
        Ok(self.in_time("watch", self.api.watch(&params, version)).await?.boxed())
    }

    /// Changes a Lease, unless somebody else has.
    async fn change(&self, from: &Object, spec: Value, report: Option<&Report>) -> Result<Object, Trouble> {
        let mut metadata = json!({ "resourceVersion": from.metadata.resource_version });
        if let Some(report) = report {
            let text =
                serde_json::to_string(report).map_err(|e| Trouble::Unreachable(format!("write a report: {e}")))?;
            metadata["annotations"] = json!({ REPORT_ANNOTATION: text });
        }
        let patch = Patch::Merge(json!({ "metadata": metadata, "spec": spec }));
        let params = PatchParams { field_manager: Some(FIELD_OWNER.to_owned()), ..PatchParams::default() };
        self.in_time("change", self.api.patch(&self.name, &params, &patch)).await
    }

    /// The wall clock, as a Lease has it.
    fn time(&self) -> MicroTime {
        MicroTime(Timestamp::from_millisecond(self.env.clock.wall_ms()).unwrap_or_default())
    }

    fn report(&self, before: Option<&Report>) -> Report {
        report::report(&self.candidate, &self.progress.view(), before)
    }

    /// Makes this process the leader.
    async fn take(&self, from: &Object, seen: &Seen, led_before: bool) -> Result<Held, Trouble> {
        let anew = seen.holder != self.candidate.identity;
        let transitions = seen.transitions.saturating_add(i32::from(anew));
        let mut spec = json!({
            "holderIdentity": self.candidate.identity,
            "leaseDurationSeconds": self.rhythm.duration.as_secs(),
            "leaseTransitions": transitions,
            "renewTime": self.time(),
        });
        if anew {
            spec["acquireTime"] = json!(self.time());
        }
        let before = seen.report_of(self.candidate.run).cloned();
        let told = Report { phase: ReportPhase::Waiting, ..self.report(before.as_ref()) };
        let known = self.change(from, spec, Some(&told)).await?;
        let now = self.now();
        Ok(Held {
            of: self.clone(),
            known: Some(known),
            transitions,
            led_before,
            before,
            told,
            told_at: now,
            renewed_at: now,
            pause_until: Duration::ZERO,
            troubled: false,
        })
    }
}

type Changes = BoxStream<'static, kube::Result<WatchEvent<Object>>>;

/// Why a request has come to nothing.
#[derive(Debug)]
enum Trouble {
    /// Somebody else was faster.
    Conflict,
    /// No answer, or one that says that it can't be: what, and why. If it was a change, it may have been made all the same.
    Unreachable(String),
}

/// An error with what is behind it: the outermost often says little.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// What somebody who waits has said last: each thing is said once.
#[derive(Default)]
struct Said(String);

impl Said {
    fn say(&mut self, what: String) {
        if self.0 != what {
            tracing::info!("standing by: {what}");
            self.0 = what;
        }
    }
}

/// Since when a Lease has not been renewed, as this process has seen it: clocks of others are not relied on.
#[derive(Default)]
struct Observed {
    renewal: Option<(String, Option<i64>, i32)>,
    since: Duration,
}

impl Observed {
    fn unchanged_for(&mut self, seen: &Seen, now: Duration) -> Duration {
        let renewal = (seen.holder.clone(), seen.renewed_ms, seen.transitions);
        if self.renewal.as_ref() != Some(&renewal) {
            (self.renewal, self.since) = (Some(renewal), now);
        }
        now.saturating_sub(self.since)
    }
}

#[async_trait]
impl Leadership for KubernetesLease {
    async fn acquire(&self) -> Result<Box<dyn Lease>> {
        let (mut said, mut trouble, mut observed) = (Said::default(), Said::default(), Observed::default());
        loop {
            match self.stand(&mut said, &mut observed).await {
                Ok(Some(held)) => return Ok(Box::new(held)),
                Ok(None) | Err(Trouble::Conflict) => {}
                Err(Trouble::Unreachable(why)) => {
                    trouble.say(why);
                    self.env.runtime.sleep(self.retry_after()).await;
                }
            }
        }
    }
}

impl KubernetesLease {
    /// Reads the Lease, and follows it until this process leads, or it has to be read anew.
    async fn stand(&self, said: &mut Said, observed: &mut Observed) -> Result<Option<Held>, Trouble> {
        let mut object = self.read().await?;
        let mut changes: Option<Changes> = None;
        loop {
            let seen = Seen::of(&object);
            let time =
                At { unchanged_for: observed.unchanged_for(&seen, self.now()), wall_ms: self.env.clock.wall_ms() };
            let asker = Asker { identity: &self.candidate.identity, run: self.candidate.run, leads: None };
            let patience = match decide(&seen, asker, time) {
                Verdict::Take { led_before } => return self.take(&object, &seen, led_before).await.map(Some),
                Verdict::Wait { why, at_most } => {
                    said.say(why);
                    at_most.unwrap_or(LOOK_EVERY).min(LOOK_EVERY)
                }
                Verdict::Ended(phase) => {
                    let run = self.candidate.run;
                    said.say(format!("run {run} has ended ({phase:?}), and is not started again"));
                    LOOK_EVERY
                }
                // Said to leaders only.
                Verdict::Hold { .. } | Verdict::Lost(_) => LOOK_EVERY,
            };
            let following = match &mut changes {
                Some(changes) => changes,
                None => changes.insert(self.watch(&object).await?),
            };
            let event = select(following.next(), self.env.runtime.sleep(patience)).await;
            object = match event {
                Either::Left((Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object))), _)) => object,
                Either::Left((Some(Ok(WatchEvent::Bookmark(_))), _)) => continue,
                Either::Left((Some(Ok(WatchEvent::Deleted(_))), _)) => {
                    return Err(Trouble::Unreachable(format!("Lease {} is deleted", self.name)));
                }
                Either::Left((Some(Ok(WatchEvent::Error(status))), _)) => {
                    return Err(Trouble::Unreachable(format!("watch Lease {}: {}", self.name, status.message)));
                }
                Either::Left((Some(Err(error)), _)) => {
                    return Err(Trouble::Unreachable(format!("watch Lease {}: {}", self.name, with_causes(&error))));
                }
                // Whatever has been missed is there to be read.
                Either::Left((None, _)) | Either::Right(_) => return Ok(None),
            };
        }
    }
}

/// A Lease that this process holds, as far as it knows.
struct Held {
    of: KubernetesLease,
    /// As it was when it was last read or changed; `None` if it has to be read anew.
    known: Option<Object>,
    transitions: i32,
    led_before: bool,
    /// What was told of the run before this process led.
    before: Option<Report>,
    /// What it says now.
    told: Report,
    told_at: Duration,
    renewed_at: Duration,
    /// After a failure: no other request before.
    pause_until: Duration,
    /// Whether the last request has failed.
    troubled: bool,
}

/// What is to be done about a lease.
enum Due {
    /// Nothing for so long.
    Nothing(Duration),
    /// A change: a renewal, or a report, or both.
    Change(Option<Report>),
}

impl Held {
    fn due(&self) -> Due {
        let now = self.of.now();
        let report = self.of.report(self.before.as_ref());
        let renew_in = (self.renewed_at + self.of.rhythm.renew_every).saturating_sub(now);
        let report_in = report::due_in(&report, &self.told, now.saturating_sub(self.told_at));
        let pause = self.pause_until.saturating_sub(now);
        let rest = report_in.map_or(renew_in, |due| due.min(renew_in)).max(pause);
        if !rest.is_zero() {
            return Due::Nothing(rest);
        }
        Due::Change(report_in.filter(Duration::is_zero).map(|_| report))
    }

    /// The Lease as it is now; the reason if it is lost.
    async fn look(&mut self) -> Result<Result<(Object, bool), String>, Trouble> {
        let object = match self.known.take() {
            Some(object) => object,
            None => self.of.read().await?,
        };
        let Candidate { identity, run, .. } = &*self.of.candidate;
        let asker = Asker { identity, run: *run, leads: Some(self.transitions) };
        Ok(match decide(&Seen::of(&object), asker, At::default()) {
            Verdict::Lost(why) => Err(why),
            Verdict::Hold { renew } => Ok((object, renew)),
            // Said to those who wait only.
            Verdict::Wait { .. } | Verdict::Ended(_) | Verdict::Take { .. } => Ok((object, false)),
        })
    }

    /// Renews the lease if it may, and tells this. The reason if it is lost.
    async fn change(&mut self, report: Option<&Report>) -> Result<Result<(), String>, Trouble> {
        let (object, renew) = match self.look().await? {
            Ok(held) => held,
            Err(lost) => return Ok(Err(lost)),
        };
        let mut spec = json!({});
        if renew {
            // All of it: it may have been cleared, or deleted and made anew.
            spec = json!({
                "holderIdentity": self.of.candidate.identity,
                "leaseDurationSeconds": self.of.rhythm.duration.as_secs(),
                "leaseTransitions": self.transitions,
                "renewTime": self.of.time(),
            });
        }
        // What is not known to have been made is read anew.
        let changed = self.of.change(&object, spec, report).await?;
        self.known = Some(changed);
        Ok(Ok(()))
    }

    /// The same, again if others get ahead. False if it has failed: then there is a pause.
    async fn try_change(&mut self, report: Option<&Report>) -> Result<bool, String> {
        for _ in 0..CONFLICTS_MAX {
            match self.change(report).await {
                Ok(changed) => {
                    changed?;
                    if std::mem::take(&mut self.troubled) {
                        tracing::info!("the API server is there again");
                    }
                    let now = self.of.now();
                    self.renewed_at = now;
                    if let Some(report) = report {
                        (self.told, self.told_at) = (report.clone(), now);
                    }
                    return Ok(true);
                }
                Err(Trouble::Conflict) => {}
                Err(Trouble::Unreachable(why)) => {
                    self.in_trouble(&why);
                    return Ok(false);
                }
            }
        }
        self.in_trouble("others change the Lease all the time");
        Ok(false)
    }

    fn in_trouble(&mut self, why: &str) {
        if !std::mem::replace(&mut self.troubled, true) {
            tracing::warn!("{why}; the job goes on, and it is tried again");
        }
        self.pause_until = self.of.now() + self.of.retry_after();
    }

    /// Tells how the run has ended, and gives the lease back.
    async fn give_back(&mut self, last: &Report) -> Result<(), Trouble> {
        let (object, _) = match self.look().await? {
            Ok(held) => held,
            Err(lost) => {
                tracing::info!("{lost}: what became of the run is for others to tell");
                return Ok(());
            }
        };
        let spec = json!({ "holderIdentity": "", "renewTime": self.of.time() });
        self.of.change(&object, spec, Some(last)).await.map(|_| ())
    }
}

#[async_trait]
impl Lease for Held {
    fn waited(&self) -> bool {
        self.led_before
    }

    /// Workers find it by the run's Service.
    async fn announce(&mut self, _: &Endpoint) -> Result<()> {
        Ok(())
    }

    async fn lost(&mut self) -> String {
        let mut news = self.of.progress.news();
        loop {
            // What is new from here on is not missed.
            news.mark_unchanged();
            match self.due() {
                Due::Nothing(rest) => {
                    let pause = self.of.env.runtime.sleep(rest);
                    // Where they come from is there as long as this is.
                    select(std::pin::pin!(news.changed()), pause).await;
                }
                Due::Change(report) => {
                    if let Err(lost) = self.try_change(report.as_ref()).await {
                        return lost;
                    }
                }
            }
        }
    }

    async fn end(&mut self, ending: &Ending) -> bool {
        let last = report::last(self.of.report(self.before.as_ref()), ending, self.of.env.clock.wall_ms());
        let mut in_a_row = 0;
        loop {
            match self.give_back(&last).await {
                Ok(()) => return ending.is_for_good(),
                Err(Trouble::Conflict) if in_a_row < CONFLICTS_MAX => in_a_row += 1,
                Err(Trouble::Conflict) => {
                    in_a_row = 0;
                    self.of.env.runtime.sleep(self.of.retry_after()).await;
                }
                Err(Trouble::Unreachable(why)) => {
                    if !std::mem::replace(&mut self.troubled, true) {
                        tracing::warn!("{why}; how the run has ended is told later");
                    }
                    self.of.env.runtime.sleep(self.of.retry_after()).await;
                }
            }
        }
    }
}
