//! What is known of the jobs of the cluster: what watches tell, and what this process has written. Pure.
//!
//! Read your own writes: what a write answers goes in here at once, and of two states of an object the newer one stays, by its
//! resource version. So no pass decides on less than this process has done, and none waits for a watch to catch up. What has been
//! deleted here counts as leaving from then on; an object of which a watch has told that it is gone does not come back by the late
//! answer to a write.
//!
//! Invariant: an object that only changes its resource version is no news.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use floodmark_crds::{CheckpointMode, DeletionPolicy, RunStatus, Savepoint, StreamJob, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt as _;

use super::{
    access::{SecretKey, secret_of},
    pods::PodSeen,
};
use crate::{
    lifecycle::LeaseSeen,
    objects::{self, PodCounts},
    savepoints,
};

/// Objects that are remembered to be gone, the last ones. Answers to writes are later than watches by milliseconds.
const GONE_MAX: usize = 4_096;

/// A job, by its namespace and its [base](objects::base).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobKey {
    /// The namespace.
    pub namespace: String,
    /// What its objects are called by.
    pub base: String,
}

impl JobKey {
    /// That of a job.
    #[must_use]
    pub fn of(job: &StreamJob) -> Self {
        Self { namespace: job.namespace().unwrap_or_default(), base: objects::base(&job.name_any()) }
    }
}

/// A Savepoint, by its namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SavepointKey {
    /// The namespace.
    pub namespace: String,
    /// The object's name.
    pub name: String,
}

/// Kinds of objects that jobs have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    ControllerRevision,
    Deployment,
    Lease,
    NetworkPolicy,
    Pod,
    PodDisruptionBudget,
    Role,
    RoleBinding,
    Service,
    ServiceAccount,
}

/// An object of a job: no more of it than is looked at.
#[derive(Clone, Debug)]
pub(super) struct Thing {
    pub(super) uid: String,
    /// Its resource version.
    pub(super) version: u64,
    /// The uid of the object that it belongs to.
    pub(super) owner: Option<String>,
    /// The run that it belongs to.
    pub(super) run: Option<u64>,
    /// What it was rendered as.
    pub(super) applied: Option<String>,
    /// It is being removed.
    pub(super) leaving: bool,
    pub(super) holds: Holds,
}

/// What is in an object. Most hold nothing, so what some hold is elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Holds {
    /// Nothing that is looked at.
    Nothing,
    Lease(Box<LeaseSeen>),
    Deployment(Box<DeploymentSeen>),
    Pod(Box<PodSeen>),
}

/// What is looked at of a Deployment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct DeploymentSeen {
    /// Pods that are asked for.
    pub(super) replicas: u32,
    /// The run that it belongs to, by its own account.
    pub(super) account: Option<RunStatus>,
    /// How many pods that run asks for, by its own account.
    pub(super) counts: Option<PodCounts>,
    /// How that run takes checkpoints, by its own account.
    pub(super) checkpoints: Option<CheckpointMode>,
    /// Why its pods are refused, if they are.
    pub(super) refused: Option<String>,
}

/// What is looked at of a run's Secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SecretSeen {
    /// When its certificates are to be renewed; `None`: they can't be.
    pub(super) renew_at: Option<Timestamp>,
}

impl SecretSeen {
    pub(super) fn of(metadata: &ObjectMeta) -> Self {
        Self { renew_at: objects::renew_at(metadata) }
    }
}

impl Thing {
    fn is_news_to(&self, known: &Self) -> bool {
        self.uid != known.uid
            || self.owner != known.owner
            || self.run != known.run
            || self.applied != known.applied
            || self.leaving != known.leaving
            || self.holds != known.holds
    }
}

/// A job, and the objects that there are of it.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) job: Option<Arc<StreamJob>>,
    /// In boxes: nodes of a map are half empty.
    things: BTreeMap<(Kind, String), Box<Thing>>,
    /// Runs of which it is known whether their Secret is there, and what is looked at of it. Secrets are not watched: whoever may list them may read them all.
    pub(super) secrets: BTreeMap<u64, Option<SecretSeen>>,
}

impl Known {
    pub(super) fn thing(&self, kind: Kind, name: &str) -> Option<&Thing> {
        self.things.get(&(kind, name.to_owned())).map(|thing| &**thing)
    }

    pub(super) fn of_kind(&self, kind: Kind) -> impl Iterator<Item = (&str, &Thing)> {
        let all = self.things.range((kind, String::new())..);
        all.take_while(move |((k, _), _)| *k == kind).map(|((_, name), thing)| (name.as_str(), &**thing))
    }

    /// Runs that there are objects of, but for Secrets.
    pub(super) fn runs(&self) -> BTreeSet<u64> {
        self.things.values().filter_map(|t| t.run).collect()
    }

    pub(super) fn of_run(&self, run: u64) -> impl Iterator<Item = (Kind, &str, &Thing)> {
        let all = self.things.iter().filter(move |(_, t)| t.run == Some(run));
        all.map(|((kind, name), thing)| (*kind, name.as_str(), &**thing))
    }

    fn is_empty(&self) -> bool {
        self.job.is_none() && self.things.is_empty()
    }
}

/// Objects that a listing has brought so far; what it does not bring is gone.
#[derive(Debug)]
pub(super) struct Listing<K> {
    /// One namespace, or all of them.
    pub(super) namespace: Option<String>,
    pub(super) found: HashSet<K>,
}

impl<K> Listing<K> {
    pub(super) fn new(namespace: Option<String>) -> Self {
        Self { namespace, found: HashSet::new() }
    }

    fn covers(&self, namespace: &str) -> bool {
        self.namespace.as_deref().is_none_or(|n| n == namespace)
    }
}

/// See the header of this file.
#[derive(Debug, Default)]
pub(super) struct Cache {
    jobs: HashMap<JobKey, Known>,
    savepoints: HashMap<SavepointKey, Arc<Savepoint>>,
    /// Savepoints that are not there yet, by their jobs: what becomes of a job concerns them.
    awaited: HashMap<JobKey, BTreeSet<SavepointKey>>,
    gone: Gone,
}

/// Uids of objects that are gone.
#[derive(Debug, Default)]
struct Gone {
    uids: HashSet<String>,
    order: VecDeque<String>,
}

impl Gone {
    fn insert(&mut self, uid: &str) {
        if self.uids.insert(uid.to_owned()) {
            self.order.push_back(uid.to_owned());
        }
        if self.order.len() > GONE_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.uids.remove(&oldest);
        }
    }
}

/// An object's resource version. One that is no number is newer than any that this process has written.
pub(super) fn version(text: Option<&str>) -> u64 {
    text.and_then(|t| t.parse().ok()).unwrap_or(u64::MAX)
}

impl Cache {
    pub(super) fn known(&self, key: &JobKey) -> Option<&Known> {
        self.jobs.get(key)
    }

    pub(super) fn job(&self, key: &JobKey) -> Option<Arc<StreamJob>> {
        self.jobs.get(key)?.job.clone()
    }

    pub(super) fn savepoint(&self, key: &SavepointKey) -> Option<Arc<Savepoint>> {
        self.savepoints.get(key).cloned()
    }

    pub(super) fn jobs(&self) -> impl Iterator<Item = &Arc<StreamJob>> {
        self.jobs.values().filter_map(|known| known.job.as_ref())
    }

    /// The Secrets that are needed to remove what jobs and Savepoints take with them, by namespace and name.
    pub(super) fn secrets_to_keep(&self) -> HashSet<SecretKey> {
        let jobs = self.jobs().filter(|job| job.spec.checkpoints.on_delete == DeletionPolicy::Delete);
        let jobs = jobs.filter_map(|job| Some((job.namespace()?, secret_of(job)?.to_owned())));
        let savepoints = self.savepoints.values().filter(|s| s.spec.on_delete == DeletionPolicy::Delete);
        let savepoints = savepoints
            .filter_map(|s| Some((s.namespace()?, s.status.as_ref()?.storage.as_ref()?.secret_name.clone()?)));
        jobs.chain(savepoints).collect()
    }

    /// Takes in a state of a job; answers whether it is news.
    pub(super) fn put_job(&mut self, job: StreamJob) -> bool {
        let (uid, new) = (job.uid().unwrap_or_default(), version(job.resource_version().as_deref()));
        let known = self.jobs.entry(JobKey::of(&job)).or_default();
        let old = known.job.as_ref().map_or(0, |old| version(old.resource_version().as_deref()));
        if new <= old || self.gone.uids.contains(&uid) {
            return false;
        }
        known.job = Some(Arc::new(job));
        true
    }

    /// Forgets a job that is gone; answers whether it was known.
    pub(super) fn drop_job(&mut self, key: &JobKey, uid: &str) -> bool {
        self.gone.insert(uid);
        let Some(known) = self.jobs.get_mut(key) else { return false };
        let dropped = known.job.take_if(|job| job.uid().as_deref() == Some(uid)).is_some();
        self.tidy(key);
        dropped
    }

    /// Takes in a state of a Savepoint; answers whether it is news.
    pub(super) fn put_savepoint(&mut self, savepoint: Savepoint) -> bool {
        let key = SavepointKey { namespace: savepoint.namespace().unwrap_or_default(), name: savepoint.name_any() };
        let new = version(savepoint.resource_version().as_deref());
        let old = self.savepoints.get(&key).map_or(0, |old| version(old.resource_version().as_deref()));
        if new <= old || savepoint.uid().is_some_and(|uid| self.gone.uids.contains(&uid)) {
            return false;
        }
        self.note_awaited(&key, Some(&savepoint));
        self.savepoints.insert(key, Arc::new(savepoint));
        true
    }

    fn note_awaited(&mut self, key: &SavepointKey, savepoint: Option<&Savepoint>) {
        let job = |of: &Savepoint| JobKey { namespace: key.namespace.clone(), base: objects::base(&of.spec.job) };
        if let Some(before) = self.savepoints.get(key).map(|before| job(before))
            && let Some(awaited) = self.awaited.get_mut(&before)
        {
            awaited.remove(key);
            if awaited.is_empty() {
                self.awaited.remove(&before);
            }
        }
        if let Some(savepoint) = savepoint.filter(|of| savepoints::is_open(of)) {
            self.awaited.entry(job(savepoint)).or_default().insert(key.clone());
        }
    }

    /// Savepoints that wait for something of this job.
    pub(super) fn awaited_of(&self, key: &JobKey) -> impl Iterator<Item = &SavepointKey> {
        self.awaited.get(key).into_iter().flatten()
    }

    /// Savepoints that this one has made.
    pub(super) fn children_of(&self, savepoint: &Savepoint) -> Vec<Savepoint> {
        let (uid, namespace) = (savepoint.uid(), savepoint.namespace());
        let here = self.savepoints.iter().filter(|(key, _)| Some(&key.namespace) == namespace.as_ref());
        let owned = |of: &Savepoint| of.owner_references().iter().any(|o| Some(&o.uid) == uid.as_ref());
        here.filter(|(_, s)| owned(s)).map(|(_, s)| (**s).clone()).collect()
    }

    /// Forgets a Savepoint that is gone; answers whether it was known.
    pub(super) fn drop_savepoint(&mut self, key: &SavepointKey, uid: &str) -> bool {
        self.gone.insert(uid);
        let known = self.savepoints.get(key).is_some_and(|s| s.uid().as_deref() == Some(uid));
        if known {
            self.note_awaited(key, None);
            self.savepoints.remove(key);
        }
        known
    }

    /// Takes in a state of an object of a job; answers whether it is news.
    pub(super) fn put(&mut self, key: &JobKey, kind: Kind, name: &str, mut thing: Thing) -> bool {
        if self.gone.uids.contains(&thing.uid) {
            return false;
        }
        let known = self.jobs.entry(key.clone()).or_default();
        let place = (kind, name.to_owned());
        let news = match known.things.get(&place) {
            Some(old) if thing.version < old.version => return false,
            Some(old) => {
                thing.leaving |= old.leaving && old.uid == thing.uid;
                thing.is_news_to(old)
            }
            None => true,
        };
        // A pod that is new needs its run's Secret.
        if let (Kind::Pod, Some(run), true) =
            (kind, thing.run, known.things.get(&place).is_none_or(|p| p.uid != thing.uid))
        {
            known.secrets.remove(&run);
        }
        known.things.insert(place, Box::new(thing));
        news
    }

    /// Forgets an object that is gone; answers whether it was known.
    pub(super) fn drop_thing(&mut self, key: &JobKey, kind: Kind, name: &str, uid: &str) -> bool {
        self.gone.insert(uid);
        let Some(known) = self.jobs.get_mut(key) else { return false };
        let place = (kind, name.to_owned());
        let dropped = known.things.get(&place).is_some_and(|t| t.uid == uid) && known.things.remove(&place).is_some();
        self.tidy(key);
        dropped
    }

    /// An object has been deleted here, and is perhaps there for a while.
    pub(super) fn leaves(&mut self, key: &JobKey, kind: Kind, name: &str, uid: &str) {
        let thing = self.jobs.get_mut(key).and_then(|known| known.things.get_mut(&(kind, name.to_owned())));
        if let Some(thing) = thing.filter(|t| t.uid == uid) {
            thing.leaving = true;
        }
    }

    /// What there is of the Secret of a run.
    pub(super) fn put_secret(&mut self, key: &JobKey, run: u64, seen: Option<SecretSeen>) {
        if let Some(known) = self.jobs.get_mut(key) {
            known.secrets.insert(run, seen);
        }
    }

    /// Forgets objects of a kind that a complete listing has not brought; answers with their jobs.
    pub(super) fn listed(&mut self, kind: Kind, listing: &Listing<(JobKey, String)>) -> Vec<JobKey> {
        let mut lost = Vec::new();
        for (key, known) in self.jobs.iter_mut().filter(|(key, _)| listing.covers(&key.namespace)) {
            let before = known.things.len();
            known.things.retain(|(k, name), _| *k != kind || listing.found.contains(&(key.clone(), name.clone())));
            if known.things.len() != before {
                lost.push(key.clone());
            }
        }
        lost.iter().for_each(|key| self.tidy(key));
        lost
    }

    /// The same for jobs.
    pub(super) fn jobs_listed(&mut self, listing: &Listing<JobKey>) -> Vec<JobKey> {
        let mut lost = Vec::new();
        for (key, known) in self.jobs.iter_mut().filter(|(key, _)| listing.covers(&key.namespace)) {
            if known.job.is_some() && !listing.found.contains(key) {
                known.job = None;
                lost.push(key.clone());
            }
        }
        lost.iter().for_each(|key| self.tidy(key));
        lost
    }

    /// The same for Savepoints.
    pub(super) fn savepoints_listed(&mut self, listing: &Listing<SavepointKey>) -> Vec<SavepointKey> {
        let lost = self.savepoints.keys().filter(|k| listing.covers(&k.namespace) && !listing.found.contains(*k));
        let lost: Vec<_> = lost.cloned().collect();
        for key in &lost {
            self.note_awaited(key, None);
            self.savepoints.remove(key);
        }
        lost
    }

    fn tidy(&mut self, key: &JobKey) {
        if self.jobs.get(key).is_some_and(Known::is_empty) {
            self.jobs.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> JobKey {
        JobKey { namespace: "shop".into(), base: "a".into() }
    }

    fn thing(uid: &str, version: u64, applied: &str) -> Thing {
        let applied = Some(applied.to_owned());
        Thing { uid: uid.into(), version, owner: None, run: Some(1), applied, leaving: false, holds: Holds::Nothing }
    }

    fn applied(cache: &Cache, kind: Kind) -> Option<String> {
        cache.known(&key())?.thing(kind, "a")?.applied.clone()
    }

    #[test]
    fn what_was_written_is_not_undone_by_a_watch_that_is_behind() {
        let mut cache = Cache::default();
        assert!(cache.put(&key(), Kind::Service, "a", thing("1", 5, "old")));
        assert!(cache.put(&key(), Kind::Service, "a", thing("1", 7, "new")), "written here");
        assert!(!cache.put(&key(), Kind::Service, "a", thing("1", 6, "theirs")));
        assert!(!cache.put(&key(), Kind::Service, "a", thing("1", 7, "new")), "the watch catches up: no news");
        assert_eq!(applied(&cache, Kind::Service).as_deref(), Some("new"));
        assert!(!cache.put(&key(), Kind::Service, "a", thing("1", 9, "new")), "another version alone is no news");
    }

    #[test]
    fn what_is_deleted_here_leaves_whatever_is_told_of_it_and_never_comes_back() {
        let mut cache = Cache::default();
        cache.put(&key(), Kind::Service, "a", thing("1", 5, "x"));
        cache.leaves(&key(), Kind::Service, "a", "1");
        cache.put(&key(), Kind::Service, "a", thing("1", 6, "x"));
        assert!(cache.known(&key()).unwrap().thing(Kind::Service, "a").unwrap().leaving);
        assert!(!cache.drop_thing(&key(), Kind::Service, "a", "0"), "that was another");
        assert!(cache.drop_thing(&key(), Kind::Service, "a", "1"));
        assert!(cache.known(&key()).is_none());
        assert!(!cache.put(&key(), Kind::Service, "a", thing("1", 8, "late answer")));
        assert!(cache.put(&key(), Kind::Service, "a", thing("2", 9, "another of that name")));
    }

    #[test]
    fn what_a_listing_does_not_bring_is_gone() {
        let mut cache = Cache::default();
        for kind in [Kind::Service, Kind::Role] {
            cache.put(&key(), kind, "a", thing("1", 5, "x"));
            cache.put(&key(), kind, "b", thing("2", 5, "x"));
        }
        let mut listing = Listing::new(Some("other".to_owned()));
        assert_eq!(cache.listed(Kind::Role, &listing), []);
        listing.namespace = None;
        listing.found.insert((key(), "b".to_owned()));
        assert_eq!(cache.listed(Kind::Role, &listing), [key()]);
        let names = |kind| cache.known(&key()).unwrap().of_kind(kind).map(|(n, _)| n.to_owned()).collect::<Vec<_>>();
        assert_eq!(
            (names(Kind::Role), names(Kind::Service)),
            (vec!["b".to_owned()], vec!["a".to_owned(), "b".to_owned()])
        );
    }

    #[test]
    fn an_object_takes_little_room() {
        // There are more than a dozen of each job.
        assert!(size_of::<Thing>() <= 128, "{}", size_of::<Thing>());
    }

    #[test]
    fn a_new_pod_makes_nobody_sure_any_more_that_its_secret_is_there() {
        let mut cache = Cache::default();
        cache.put(&key(), Kind::Pod, "p", thing("1", 5, ""));
        let seen = Some(SecretSeen { renew_at: None });
        cache.put_secret(&key(), 1, seen);
        cache.put(&key(), Kind::Pod, "p", thing("1", 6, ""));
        assert_eq!(cache.known(&key()).unwrap().secrets.get(&1), Some(&seen));
        cache.put(&key(), Kind::Pod, "q", thing("2", 6, ""));
        assert_eq!(cache.known(&key()).unwrap().secrets.get(&1), None);
    }
}
