//! From what is known of a job's objects to what the lifecycle sees. Pure.

use std::collections::BTreeMap;

use floodmark_crds::{RunStatus, Savepoint, SavepointState, StreamJob, Timestamp};
use kube::ResourceExt as _;

use super::{
    cache::{DeploymentSeen, Holds, Kind, Known, Thing},
    pods::{PodSeen, pods_seen},
    watched::mark,
};
use crate::{
    lifecycle::{Asked, LeaseSeen, PodsSeen, Question, RunSeen, Seen},
    objects::{self, Defaults, coordinator_name, job_objects, worker_name},
    revision,
};

/// What a job is seen as, and when that changes although nothing is told of it.
pub(super) fn seen(
    known: &Known,
    job: &StreamJob,
    restore_from: Option<String>,
    answers: BTreeMap<Question, Asked>,
    defaults: &Defaults,
    now: Timestamp,
) -> (Seen, Option<Timestamp>) {
    let revision = revision::name(&job.spec);
    let mut look_again: Option<Timestamp> = None;
    let runs = known.runs().into_iter().filter_map(|run| {
        let seen = run_seen(known, job, run, now, &mut look_again)?;
        Some((run, seen))
    });
    let runs = runs.collect();
    let seen = Seen {
        job_intact: job_intact(known, job, &revision, defaults),
        lease: lease_seen(known, job),
        job: job.clone(),
        revision,
        restore_from,
        runs,
        answers,
        now,
    };
    (seen, look_again)
}

/// Where `spec.restore.from` leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RestoreFrom {
    /// Nowhere: it is not given.
    Nothing,
    /// Here.
    At(String),
    /// To a Savepoint that is not complete: why.
    NotYet(String),
    /// To a Savepoint that never will be: why.
    Never(String),
}

impl RestoreFrom {
    /// `savepoint` is the object of that name, if there is one.
    pub(super) fn of(job: &StreamJob, savepoint: Option<&Savepoint>) -> Self {
        let Some(from) = &job.spec.restore.from else { return Self::Nothing };
        let Some(savepoint) = savepoint else { return Self::At(from.clone()) };
        let status = savepoint.status.clone().unwrap_or_default();
        match (status.location, status.state) {
            (Some(location), _) => Self::At(location),
            (None, SavepointState::Failed) => Self::Never(format!("Savepoint {from} has failed")),
            (None, SavepointState::Scheduled) => {
                Self::Never(format!("Savepoint {from} is a schedule: name one of the savepoints that were taken by it"))
            }
            (None, _) => Self::NotYet(format!("Savepoint {from} is not complete")),
        }
    }

    pub(super) fn location(self) -> Option<String> {
        match self {
            Self::At(location) => Some(location),
            Self::Nothing | Self::NotYet(_) | Self::Never(_) => None,
        }
    }
}

fn is_own(job: &StreamJob, thing: &Thing) -> bool {
    thing.owner.is_some() && thing.owner == job.uid()
}

fn lease_seen(known: &Known, job: &StreamJob) -> Option<LeaseSeen> {
    let lease = known.thing(Kind::Lease, &objects::base(&job.name_any()))?;
    match &lease.holds {
        Holds::Lease(seen) if is_own(job, lease) && !lease.leaving => Some((**seen).clone()),
        _ => None,
    }
}

/// Whether each object of the job as a whole is what it would be rendered as.
fn job_intact(known: &Known, job: &StreamJob, revision: &str, defaults: &Defaults) -> bool {
    let run = job.status.as_ref().and_then(|s| s.run.as_ref()).map(|r| r.number);
    let base = objects::base(&job.name_any());
    let mut rendered = job_objects(job, run, defaults);
    let is = |kind, name: &str, hash: Option<String>| {
        let thing = known.thing(kind, name).filter(|t| is_own(job, t) && !t.leaving);
        thing.is_some_and(|t| hash.is_none() || t.applied == hash)
    };
    let kept = objects::revision_name(&job.name_any(), revision);
    is(Kind::ServiceAccount, &base, Some(mark(&mut rendered.service_account)))
        && is(Kind::Role, &base, Some(mark(&mut rendered.role)))
        && is(Kind::RoleBinding, &base, Some(mark(&mut rendered.role_binding)))
        && is(Kind::Service, &base, Some(mark(&mut rendered.service)))
        && is(Kind::PodDisruptionBudget, &base, Some(mark(&mut rendered.pod_disruption_budget)))
        && is(Kind::NetworkPolicy, &base, Some(mark(&mut rendered.network_policy)))
        && is(Kind::ControllerRevision, &kept, None)
}

fn run_seen(
    known: &Known,
    job: &StreamJob,
    run: u64,
    now: Timestamp,
    look_again: &mut Option<Timestamp>,
) -> Option<RunSeen> {
    let name = job.name_any();
    let own = |kind, name: &str| known.thing(kind, name).filter(|t| is_own(job, t));
    let deployment = |name: &str| match own(Kind::Deployment, name).map(|t| (t, &t.holds)) {
        Some((thing, Holds::Deployment(seen))) => Some((thing, &**seen)),
        _ => None,
    };
    let coordinator = deployment(&coordinator_name(&name, run));
    let worker = deployment(&worker_name(&name, run));
    let service = own(Kind::Service, &coordinator_name(&name, run));
    let things = [coordinator.map(|(t, _)| t), worker.map(|(t, _)| t), service];
    let stays = things.iter().flatten().any(|t| !t.leaving);
    let is_there = |thing: &Option<&Thing>| thing.is_some_and(|t| !t.leaving);
    let (coordinators, workers): (Vec<&PodSeen>, Vec<&PodSeen>) = known
        .of_run(run)
        .filter_map(|(_, _, thing)| match &thing.holds {
            Holds::Pod(pod) => Some(&**pod),
            _ => None,
        })
        .filter(|pod| pod.counts(now))
        .partition(|pod| pod.coordinator);
    for by in coordinators.iter().chain(&workers).filter_map(|p| p.lost_by()) {
        *look_again = Some(look_again.map_or(by, |l| l.min(by)));
    }
    if things.iter().all(Option::is_none) && coordinators.is_empty() && workers.is_empty() {
        return None;
    }
    let account = |of: &Option<(&Thing, &DeploymentSeen)>| of.and_then(|(_, d)| d.account.clone());
    let both = account(&coordinator).is_some() && account(&worker).is_some();
    let accounts: RunStatus = account(&coordinator).or_else(|| account(&worker)).unwrap_or_default();
    let secret = known.secrets.get(&run).copied().flatten();
    let pods = |pods: Vec<&PodSeen>, of: &Option<(&Thing, &DeploymentSeen)>| -> PodsSeen {
        pods_seen(pods.into_iter(), of.and_then(|(_, d)| d.refused.as_deref()), now)
    };
    Some(RunSeen {
        complete: things.iter().all(is_there) && both && secret.is_some(),
        leaving: !stays,
        revision: accounts.revision,
        parallelism: accounts.parallelism,
        restore: accounts.restore,
        counts: [&coordinator, &worker].into_iter().flatten().find_map(|(_, d)| d.counts),
        checkpoints: [&coordinator, &worker].into_iter().flatten().find_map(|(_, d)| d.checkpoints),
        renew_at: secret.and_then(|s| s.renew_at),
        workers_wanted: worker.map_or(0, |(_, d)| d.replicas),
        coordinators_wanted: coordinator.map_or(0, |(_, d)| d.replicas),
        workers: pods(workers, &worker),
        coordinators: pods(coordinators, &coordinator),
    })
}
