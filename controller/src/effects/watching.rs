//! Watches on all that the controller looks at. What they tell goes into the cache; answers with whose turn it is because of it.
//!
//! Nothing is decided before every watch has told all there is: until then a job would seem to have lost its pods.
//!
//! Invariant: of objects no more is kept than [`super::watched`] takes.

use std::{
    collections::HashSet,
    fmt::Debug,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use floodmark_crds::{Savepoint, StreamJob};
use futures::{
    StreamExt as _,
    stream::{BoxStream, SelectAll},
};
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
use kube::{
    Api, Client, Resource, ResourceExt as _,
    core::{DeserializeGuard, ObjectMeta, PartialObjectMeta, error_boundary::InvalidObject},
    runtime::{
        WatchStreamExt as _,
        utils::Backoff,
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;

use super::{
    Turn,
    cache::{Cache, JobKey, Kind, Listing, SavepointKey},
    watched::{Told, Watched, told, told_by_metadata},
};
use crate::{
    metrics::Metrics,
    objects::{self, JOB_LABEL},
};

/// Objects per page of a listing: what is decoded at the same time.
const PAGE: u32 = 100;
/// From a watch that has failed to the next try, at least and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// What `kubectl apply` leaves on an object: all of it once more.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// When a watch that fails over and over is tried again.
struct Retry(Duration);

impl Iterator for Retry {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let wait = self.0;
        self.0 = wait.saturating_mul(2).min(RETRY.1);
        Some(wait)
    }
}

impl Backoff for Retry {
    fn reset(&mut self) {
        self.0 = RETRY.0;
    }
}

/// What a watch has told.
#[derive(Debug, Default)]
pub(super) struct News {
    /// Whose turn it is.
    pub(super) turns: Vec<Turn>,
    /// A watch has told all there is, for the first time.
    pub(super) listed: bool,
}

/// All watches, and how many there are.
pub(super) type Watches = (SelectAll<BoxStream<'static, News>>, usize);

/// Watches these namespaces, or all if none is named.
pub(super) fn watches(
    client: &Client,
    namespaces: &[String],
    cache: &Arc<Mutex<Cache>>,
    metrics: &Arc<Metrics>,
) -> Watches {
    let scopes: Vec<Option<&str>> =
        if namespaces.is_empty() { vec![None] } else { namespaces.iter().map(|n| Some(n.as_str())).collect() };
    let mut all: Vec<BoxStream<'static, News>> = Vec::new();
    for scope in scopes {
        let with = Scope { client, namespace: scope, cache, metrics };
        all.push(with.roots::<StreamJob>());
        all.push(with.roots::<Savepoint>());
        all.push(with.whole::<Deployment>());
        all.push(with.whole::<Lease>());
        all.push(with.whole::<Pod>());
        all.push(with.metadata::<ControllerRevision>());
        all.push(with.metadata::<NetworkPolicy>());
        all.push(with.metadata::<PodDisruptionBudget>());
        all.push(with.metadata::<Role>());
        all.push(with.metadata::<RoleBinding>());
        all.push(with.metadata::<Service>());
        all.push(with.metadata::<ServiceAccount>());
    }
    let count = all.len();
    (futures::stream::select_all(all), count)
}

struct Scope<'a> {
    client: &'a Client,
    namespace: Option<&'a str>,
    cache: &'a Arc<Mutex<Cache>>,
    metrics: &'a Arc<Metrics>,
}

impl Scope<'_> {
    fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self) -> Api<K> {
        match self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    fn whole<K: Watched>(&self) -> BoxStream<'static, News> {
        let events = watcher::watcher(self.api::<K>(), of_jobs());
        self.things(K::KIND, events, |object: &K| told(object))
    }

    fn metadata<K: Watched>(&self) -> BoxStream<'static, News> {
        let events = watcher::watcher(self.api::<PartialObjectMeta<K>>(), of_jobs());
        self.things(K::KIND, events, told_by_metadata)
    }

    fn things<K: Send + 'static>(
        &self,
        kind: Kind,
        events: impl futures::Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
        told: impl Fn(&K) -> Option<Told> + Send + 'static,
    ) -> BoxStream<'static, News> {
        let cache = self.cache.clone();
        let mut listing = Listing::new(self.namespace.map(str::to_owned));
        self.news(format!("{kind:?}"), events, move |event| {
            let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
            let turn = match event {
                Event::Init => {
                    listing.found.clear();
                    None
                }
                Event::InitApply(object) => told(&object).and_then(|(key, name, thing)| {
                    listing.found.insert((key.clone(), name.clone()));
                    cache.put(&key, kind, &name, thing).then_some(key)
                }),
                Event::Apply(object) => {
                    told(&object).and_then(|(key, name, thing)| cache.put(&key, kind, &name, thing).then_some(key))
                }
                Event::Delete(object) => told(&object)
                    .and_then(|(key, name, thing)| cache.drop_thing(&key, kind, &name, &thing.uid).then_some(key)),
                Event::InitDone => {
                    let lost = cache.listed(kind, &listing);
                    listing.found = HashSet::new();
                    return lost.into_iter().map(Turn::Job).collect();
                }
            };
            turn.map(Turn::Job).into_iter().collect()
        })
    }

    /// Watches objects that people make.
    fn roots<K: Root>(&self) -> BoxStream<'static, News> {
        let cache = self.cache.clone();
        let mut listing = Listing::new(self.namespace.map(str::to_owned));
        // An object that this version can't read must not hide the others.
        let api: Api<DeserializeGuard<K>> = self.api();
        let events = watcher::watcher(api, watcher::Config::default().page_size(PAGE));
        self.news(K::kind(&()).into_owned(), events, move |event| {
            let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
            let turn = match event {
                Event::Init => {
                    listing.found.clear();
                    None
                }
                Event::InitApply(DeserializeGuard(object)) => {
                    let meta = object.as_ref().map_or_else(|invalid| &invalid.metadata, |object| object.meta());
                    listing.found.insert(K::key(meta));
                    put(&mut cache, object)
                }
                Event::Apply(DeserializeGuard(object)) => put(&mut cache, object),
                Event::Delete(object) => {
                    let key = K::key(object.meta());
                    K::dropped(&mut cache, &key, &object.uid().unwrap_or_default());
                    // Also if it was not known: something may wait for its name.
                    Some(key)
                }
                Event::InitDone => {
                    let lost = K::listed(&mut cache, &listing);
                    listing.found = HashSet::new();
                    return lost.into_iter().map(K::turn).collect();
                }
            };
            turn.map(K::turn).into_iter().collect()
        })
    }

    /// What follows from each event; a watch that fails is tried again.
    fn news<K: Send + 'static>(
        &self,
        what: String,
        events: impl futures::Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
        mut take: impl FnMut(Event<K>) -> Vec<Turn> + Send + 'static,
    ) -> BoxStream<'static, News> {
        let metrics = self.metrics.clone();
        let mut first = true;
        let news = events.backoff(Retry(RETRY.0)).map(move |event| match event {
            Ok(event) => {
                let listed = matches!(event, Event::InitDone) && std::mem::take(&mut first);
                News { turns: take(event), listed }
            }
            Err(error) => {
                metrics.watch_failed(&what);
                tracing::warn!(%what, error = %with_causes(&error), "a watch failed; it is tried again");
                News::default()
            }
        });
        news.boxed()
    }
}

fn of_jobs() -> watcher::Config {
    watcher::Config::default().page_size(PAGE).labels(JOB_LABEL)
}

/// Takes in an object, if it can be read; answers with its key if it is news.
fn put<K: Root>(cache: &mut Cache, object: Result<K, InvalidObject>) -> Option<K::Key> {
    match object {
        Ok(object) => {
            let key = K::key(object.meta());
            K::put(cache, lean(object)).then_some(key)
        }
        Err(InvalidObject { metadata, error }) => {
            let kind = K::kind(&());
            let (namespace, name) = (metadata.namespace.unwrap_or_default(), metadata.name.unwrap_or_default());
            tracing::warn!(%namespace, %name, %error, "a {kind} can't be read by this version; it is left as it is");
            None
        }
    }
}

/// An object that people make, which others belong to.
pub(super) trait Root:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + DeserializeOwned + Clone + Debug + Send + 'static
{
    type Key: Clone + Eq + Hash + Send + 'static;

    fn key(meta: &ObjectMeta) -> Self::Key;
    fn turn(key: Self::Key) -> Turn;
    fn put(cache: &mut Cache, object: Self) -> bool;
    fn dropped(cache: &mut Cache, key: &Self::Key, uid: &str);
    fn listed(cache: &mut Cache, listing: &Listing<Self::Key>) -> Vec<Self::Key>;
}

impl Root for StreamJob {
    type Key = JobKey;

    fn key(meta: &ObjectMeta) -> JobKey {
        let base = objects::base(meta.name.as_deref().unwrap_or_default());
        JobKey { namespace: meta.namespace.clone().unwrap_or_default(), base }
    }

    fn turn(key: JobKey) -> Turn {
        Turn::Job(key)
    }

    fn put(cache: &mut Cache, object: Self) -> bool {
        cache.put_job(object)
    }

    fn dropped(cache: &mut Cache, key: &JobKey, uid: &str) {
        cache.drop_job(key, uid);
    }

    fn listed(cache: &mut Cache, listing: &Listing<JobKey>) -> Vec<JobKey> {
        cache.jobs_listed(listing)
    }
}

impl Root for Savepoint {
    type Key = SavepointKey;

    fn key(meta: &ObjectMeta) -> SavepointKey {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        SavepointKey { namespace: text(&meta.namespace), name: text(&meta.name) }
    }

    fn turn(key: SavepointKey) -> Turn {
        Turn::Savepoint(key)
    }

    fn put(cache: &mut Cache, object: Self) -> bool {
        cache.put_savepoint(object)
    }

    fn dropped(cache: &mut Cache, key: &SavepointKey, uid: &str) {
        cache.drop_savepoint(key, uid);
    }

    fn listed(cache: &mut Cache, listing: &Listing<SavepointKey>) -> Vec<SavepointKey> {
        cache.savepoints_listed(listing)
    }
}

/// Without what is not looked at.
pub(super) fn lean<K: Resource>(mut object: K) -> K {
    object.meta_mut().managed_fields = None;
    if let Some(annotations) = &mut object.meta_mut().annotations {
        annotations.remove(LAST_APPLIED);
    }
    object
}

/// An error, and what it comes from.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
