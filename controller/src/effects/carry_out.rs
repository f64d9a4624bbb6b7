//! Carries out what a plan says, one action after the other. Each may be done again at any time, also by another controller.

use std::{sync::Arc, time::Duration};

use floodmark_crds::{RunStatus, StreamJob, StreamJobSpec};
use floodmark_snapshot::env::Clock;
use futures::future::try_join_all;
use k8s_openapi::api::{
    apps::v1::{ControllerRevision, Deployment},
    core::v1::{Pod, Service},
    rbac::v1::{Role, RoleBinding},
};
use kube::ResourceExt as _;

use super::{
    Operator,
    answering::Ask,
    cache::{Holds, JobKey, Kind, SecretSeen},
    cluster::EffectError,
    observe::RestoreFrom,
};
use crate::{
    lifecycle::{Action, FINALIZER, Note, Question},
    objects::{
        self, coordinator_name, is_of, job_objects, next_generation, renew_at, renewal, revision_name, revision_object,
        revision_spec, run_identity, run_objects, run_secret, scale_patch, secret_name, worker_name,
    },
    revision,
};

/// Old specs that are kept of a job, besides those that are in use.
const REVISIONS_MAX: usize = 10;
/// From one try to bind a Role that is not known yet to the next.
const ROLE_PAUSES: [Duration; 3] = [Duration::from_millis(50), Duration::from_millis(200), Duration::from_millis(500)];

impl Operator {
    pub(super) async fn carry_out(&self, job: &StreamJob, action: &Action) -> Result<(), EffectError> {
        let key = JobKey::of(job);
        match action {
            Action::AddFinalizer => {
                let finalizers: Vec<_> = job.finalizers().iter().cloned().chain([FINALIZER.to_owned()]).collect();
                self.cluster.write_finalizers(job, &finalizers).await
            }
            Action::RemoveFinalizer => {
                let finalizers: Vec<_> = job.finalizers().iter().filter(|f| *f != FINALIZER).cloned().collect();
                self.cluster.write_finalizers(job, &finalizers).await?;
                let uid = job.uid().unwrap_or_default();
                self.questions().forget(&uid);
                self.drop_access();
                Ok(())
            }
            Action::ApplyJob { run } => self.apply_job(job, *run).await,
            Action::ApplyRun { run, workers } => self.apply_run(job, run, *workers).await,
            Action::ScaleWorkers { run, pods } => self.scale(&key, &worker_name(&job.name_any(), *run), *pods).await,
            Action::ScaleCoordinators { run, pods } => {
                self.scale(&key, &coordinator_name(&job.name_any(), *run), *pods).await
            }
            Action::RenewCertificates { run } => self.renew_certificates(job, *run).await,
            Action::RemoveRun { run } => self.remove_run(job, *run).await,
            Action::Allow { run } => self.cluster.force(job, &objects::lease(job, *run)).await,
            Action::Ask(question) => {
                self.ask(job, key, question).await;
                Ok(())
            }
        }
    }

    async fn ask(&self, job: &StreamJob, key: JobKey, question: &Question) {
        let Some(uid) = job.uid() else { return };
        if self.questions().begin(&uid, question) {
            // Whoever asks them ends with this process only.
            let _ = self.asks.send(Ask::Job { key, uid, question: question.clone() }).await;
        }
    }

    async fn apply_job(&self, job: &StreamJob, run: Option<u64>) -> Result<(), EffectError> {
        let objects = job_objects(job, run, &self.defaults);
        let cluster = &self.cluster;
        // Each to its end, whatever becomes of the others: one that is cut off would be done again.
        let (account, rights, service, budget, policy, revision) = futures::join!(
            cluster.apply(job, objects.service_account),
            self.apply_rights(job, objects.role, &objects.role_binding),
            cluster.apply(job, objects.service),
            cluster.apply(job, objects.pod_disruption_budget),
            cluster.apply(job, objects.network_policy),
            self.keep_revision(job),
        );
        account.and(rights).and(service).and(budget).and(policy).and(revision)
    }

    /// Lets the job's coordinators do what the Role says. API servers may not know it yet in the moment after it was made.
    async fn apply_rights(&self, job: &StreamJob, role: Role, binding: &RoleBinding) -> Result<(), EffectError> {
        self.cluster.apply(job, role).await?;
        for pause in ROLE_PAUSES {
            match self.cluster.apply(job, binding.clone()).await {
                Err(EffectError::NotFound(_)) => self.cluster.env.runtime.sleep(pause).await,
                other => return other,
            }
        }
        self.cluster.apply(job, binding.clone()).await
    }

    /// Keeps the spec's revision, and of old ones no more than the newest and those that are in use.
    async fn keep_revision(&self, job: &StreamJob) -> Result<(), EffectError> {
        let (key, name) = (JobKey::of(job), job.name_any());
        let present = revision_name(&name, &revision::name(&job.spec));
        let is_kept = {
            let cache = self.cluster.cache();
            let thing = cache.known(&key).and_then(|k| k.thing(Kind::ControllerRevision, &present));
            thing.is_some_and(|t| t.owner == job.uid() && !t.leaving)
        };
        if is_kept {
            return Ok(());
        }
        self.cluster.create(job, &revision_object(job, &job.spec)?).await?;
        let status = job.status.clone().unwrap_or_default();
        let operation = status.operation.iter().flat_map(|o| o.from.iter().chain(&o.to));
        let in_use = status.run.iter().chain(&status.stable_run).chain(operation);
        let in_use: Vec<String> = in_use.map(|run| revision_name(&name, &run.revision)).chain([present]).collect();
        let mut old: Vec<(u64, String, String)> = {
            let cache = self.cluster.cache();
            let all = cache.known(&key).into_iter().flat_map(|k| k.of_kind(Kind::ControllerRevision));
            let old =
                all.filter(|(name, t)| t.owner == job.uid() && !t.leaving && !in_use.contains(&(*name).to_owned()));
            old.map(|(name, t)| (t.version, name.to_owned(), t.uid.clone())).collect()
        };
        // They are not changed: what was made later has a greater version.
        old.sort();
        let excess = old.len().saturating_sub(REVISIONS_MAX - 1);
        for (_, name, uid) in &old[..excess] {
            self.cluster.delete::<ControllerRevision>(&key, name, uid).await?;
        }
        Ok(())
    }

    /// The spec of a revision of the job.
    pub(super) async fn spec_of(&self, job: &StreamJob, revision: &str) -> Result<StreamJobSpec, EffectError> {
        if revision::name(&job.spec) == revision {
            return Ok(job.spec.clone());
        }
        let name = revision_name(&job.name_any(), revision);
        let api = self.cluster.api::<ControllerRevision>(&job.namespace().unwrap_or_default());
        let object = self.cluster.request(|| format!("read ControllerRevision {name}"), api.get(&name)).await?;
        Ok(revision_spec(&object)?)
    }

    /// Makes those objects of a run that are missing. The Service comes first: by it the run is known to be there.
    async fn apply_run(&self, job: &StreamJob, run: &RunStatus, workers: Option<u32>) -> Result<(), EffectError> {
        let spec = self.spec_of(job, &run.revision).await?;
        let mut rendered = run_objects(job, &spec, run, &self.defaults)?;
        if let Some(pods) = workers {
            rendered = rendered.with_workers(pods);
        }
        let (key, name) = (JobKey::of(job), job.name_any());
        let (is_there, secret, began) = {
            let cache = self.cluster.cache();
            let known = cache.known(&key);
            let own = |kind, name: &str| {
                let thing = known.and_then(|k| k.thing(kind, name));
                thing.filter(|t| t.owner == job.uid() && !t.leaving)
            };
            let deployment = |name: &str| {
                own(Kind::Deployment, name)
                    .is_some_and(|t| matches!(&t.holds, Holds::Deployment(d) if d.account.is_some()))
            };
            let (coordinator, worker) = (coordinator_name(&name, run.number), worker_name(&name, run.number));
            let is_there = [own(Kind::Service, &coordinator).is_some(), deployment(&coordinator), deployment(&worker)];
            let secret = known.and_then(|k| k.secrets.get(&run.number)).is_some_and(Option::is_some);
            (is_there, secret, is_there[1] || is_there[2])
        };
        if !is_there[0] {
            self.cluster.create::<Service>(job, &rendered.service).await?;
        }
        if !secret {
            let (created, seen) = self.make_secret(job, &spec, run).await?;
            self.cluster.cache().put_secret(&key, run.number, Some(seen));
            if created && began {
                self.restart_pods(&key, run.number).await?;
            }
        }
        if !is_there[1] {
            self.cluster.create::<Deployment>(job, &rendered.coordinator).await?;
        }
        if !is_there[2] {
            self.cluster.create::<Deployment>(job, &rendered.worker).await?;
        }
        Ok(())
    }

    async fn make_secret(
        &self,
        job: &StreamJob,
        spec: &StreamJobSpec,
        run: &RunStatus,
    ) -> Result<(bool, SecretSeen), EffectError> {
        let identity = self.make_keys(job, run.number, run_identity).await?;
        let restore_from = self.restore_from(job).location();
        let secret = run_secret(job, spec, run, restore_from.as_deref(), &identity, self.now())?;
        self.cluster.create_secret(job, &secret).await
    }

    /// Makes keys, which takes a moment, beside the passes of other jobs.
    async fn make_keys<K: Send + 'static>(
        &self,
        job: &StreamJob,
        run: u64,
        make: fn(&StreamJob, Duration, Arc<dyn Clock>) -> floodmark_snapshot::Result<K>,
    ) -> Result<K, EffectError> {
        let (of, clock, lifetime) = (job.clone(), self.cluster.env.clock.clone(), self.certificate_lifetime);
        let made = self.cluster.env.blocking("making keys", move || make(&of, lifetime, clock)).await;
        let failed = |e: &dyn std::fmt::Display| EffectError::Failed {
            what: format!("make keys for run {run}"),
            why: e.to_string(),
        };
        made.map_err(|e| failed(&e))?.map_err(|e| failed(&e))
    }

    /// The certificates that a run's processes show are replaced by the next, in the Secret that they read for each new connection.
    async fn renew_certificates(&self, job: &StreamJob, run: u64) -> Result<(), EffectError> {
        let (key, name, now) = (JobKey::of(job), secret_name(job, run), self.now());
        let secret = self.cluster.secret(&key.namespace, &name).await?.filter(|s| is_of(job, &s.metadata));
        // Not if another controller has just done it: those who have not read that yet would not know the one after.
        let due = secret.filter(|s| renew_at(&s.metadata).is_some_and(|at| now >= at));
        let mut can_be = true;
        if let Some(secret) = due {
            let fresh = self.make_keys(job, run, next_generation).await?;
            if let Some(patch) = renewal(&secret, &fresh, now) {
                self.cluster.patch_secret(&key.namespace, &name, &patch).await?;
                let message = format!("run {run} shows others from now on; the next are there");
                self.note(job, Note { warning: false, reason: "CertificatesRenewed", message });
            } else {
                can_be = false;
            }
        }
        // What can't be renewed is not tried over and over.
        let seen = self.cluster.look_for_secret(job, &name).await?;
        let seen = seen.map(|seen| if can_be { seen } else { SecretSeen { renew_at: None } });
        self.cluster.cache().put_secret(&key, run, seen);
        Ok(())
    }

    /// Where `spec.restore.from` leads.
    pub(super) fn restore_from(&self, job: &StreamJob) -> RestoreFrom {
        let savepoint = job.spec.restore.from.clone().and_then(|name| {
            let namespace = job.namespace().unwrap_or_default();
            self.cluster.cache().savepoint(&super::cache::SavepointKey { namespace, name })
        });
        RestoreFrom::of(job, savepoint.as_deref())
    }

    /// Pods that were started with keys which nobody has any more can't talk to those that come.
    async fn restart_pods(&self, key: &JobKey, run: u64) -> Result<(), EffectError> {
        let pods = self.things_of(key, run, Kind::Pod);
        let deletions = pods.iter().map(|(name, uid)| self.cluster.delete::<Pod>(key, name, uid));
        try_join_all(deletions).await.map(drop)
    }

    fn things_of(&self, key: &JobKey, run: u64, kind: Kind) -> Vec<(String, String)> {
        let cache = self.cluster.cache();
        let all = cache.known(key).into_iter().flat_map(|k| k.of_run(run));
        let all = all.filter(|(k, _, thing)| *k == kind && !thing.leaving);
        all.map(|(_, name, thing)| (name.to_owned(), thing.uid.clone())).collect()
    }

    async fn scale(&self, key: &JobKey, deployment: &str, pods: u32) -> Result<(), EffectError> {
        self.cluster.merge::<Deployment>(&key.namespace, deployment, &scale_patch(pods)).await
    }

    /// Removes the objects of a run. The Service goes last: as long as it is there, there is a run to remove.
    async fn remove_run(&self, job: &StreamJob, run: u64) -> Result<(), EffectError> {
        let key = JobKey::of(job);
        self.cluster.delete_secret(&key.namespace, &secret_name(job, run)).await?;
        self.cluster.cache().put_secret(&key, run, None);
        let deployments = self.things_of(&key, run, Kind::Deployment);
        let deletions = deployments.iter().map(|(name, uid)| self.cluster.delete::<Deployment>(&key, name, uid));
        try_join_all(deletions).await?;
        for (name, uid) in self.things_of(&key, run, Kind::Service) {
            self.cluster.delete::<Service>(&key, &name, &uid).await?;
        }
        Ok(())
    }
}
