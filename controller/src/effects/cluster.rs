//! Requests to the API server that change something. What a write answers is in the cache before it returns.
//!
//! Each may be done again: objects that may change are applied (server-side, as one manager, by force), those that may not are
//! created, and what is there already, or gone already, is as it shall be. A name that an object of somebody else has is left to it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use floodmark_crds::{Savepoint, StreamJob};
use floodmark_snapshot::Env;
use futures::future::{Either, select};
use k8s_openapi::{NamespaceResourceScope, api::core::v1::Secret};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value as Json, json};
use tokio::sync::Semaphore;

use super::{
    cache::{Cache, JobKey, Kind, SavepointKey, SecretSeen},
    watched::{Watched, mark, told},
    watching::{Root, lean, with_causes},
};
use crate::objects::{MANAGER, Unrenderable, is_of};

/// Requests at the same time, but for watches: each takes a connection, which takes memory.
const REQUESTS_MAX: usize = 32;
/// How long the API server may take for a request.
const ANSWER_WITHIN: std::time::Duration = std::time::Duration::from_secs(15);

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum EffectError {
    /// Somebody else has changed the object meanwhile.
    #[error("{0}: somebody else has changed it meanwhile")]
    Overtaken(String),
    /// There is no such object.
    #[error("{0}: there is no such object")]
    NotFound(String),
    /// The name is taken by an object of somebody else.
    #[error("{kind} {name} belongs to somebody else: delete or rename it, or choose another name")]
    Taken {
        /// The object's kind.
        kind: String,
        /// Its name.
        name: String,
    },
    /// No object can be made of what the job says.
    #[error(transparent)]
    Unrenderable(#[from] Unrenderable),
    /// The API server refuses, or can't be reached.
    #[error("{what}: {why}")]
    Failed {
        /// What was to be done.
        what: String,
        /// What is said about it.
        why: String,
    },
}

/// See the header of this file.
#[derive(Clone)]
pub(super) struct Cluster {
    pub(super) client: Client,
    pub(super) env: Env,
    cache: Arc<Mutex<Cache>>,
    requests: Arc<Semaphore>,
}

impl Cluster {
    pub(super) fn new(client: Client, env: Env, cache: Arc<Mutex<Cache>>) -> Self {
        Self { client, env, cache, requests: Arc::new(Semaphore::new(REQUESTS_MAX)) }
    }

    /// The cache, for those who fill it.
    pub(super) fn shared_cache(&self) -> Arc<Mutex<Cache>> {
        self.cache.clone()
    }

    pub(super) fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// A request, for a bounded time.
    pub(super) async fn request<T>(
        &self,
        what: impl Fn() -> String,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, EffectError> {
        let Ok(_permit) = self.requests.acquire().await else {
            return Err(EffectError::Failed { what: what(), why: "the controller stops".to_owned() });
        };
        let request = std::pin::pin!(request);
        let why = match select(request, self.env.runtime.sleep(ANSWER_WITHIN)).await {
            Either::Left((Ok(answer), _)) => return Ok(answer),
            Either::Left((Err(kube::Error::Api(status)), _)) => {
                if status.is_not_found() {
                    return Err(EffectError::NotFound(what()));
                }
                if status.is_conflict() && !status.is_already_exists() {
                    return Err(EffectError::Overtaken(what()));
                }
                format!("the API server answers {}: {}", status.code, status.message)
            }
            Either::Left((Err(error), _)) => with_causes(&error),
            Either::Right(_) => format!("no answer within {ANSWER_WITHIN:?}"),
        };
        Err(EffectError::Failed { what: what(), why })
    }

    fn wrote<K: Watched>(&self, object: &K) {
        if let Some((key, name, thing)) = told(object) {
            self.cache().put(&key, K::KIND, &name, thing);
        }
    }

    /// Makes sure that what is there under a name is the job's, if anything is.
    async fn check_own<K: Watched>(&self, job: &StreamJob, name: &str) -> Result<(), EffectError> {
        let known = self.cache().known(&JobKey::of(job)).and_then(|k| k.thing(K::KIND, name).cloned());
        if known.is_some_and(|thing| thing.owner == job.uid() && !thing.leaving) {
            return Ok(());
        }
        let api = self.api::<K>(&job.namespace().unwrap_or_default());
        let found = self.request(|| format!("read {} {name}", kind::<K>()), api.get_metadata_opt(name)).await?;
        match found {
            Some(found) => check(job, &kind::<K>(), name, &found.metadata),
            None => Ok(()),
        }
    }

    /// Brings an object into shape, unless it is by all that is known of it.
    pub(super) async fn apply<K: Watched>(&self, job: &StreamJob, mut object: K) -> Result<(), EffectError> {
        let hash = mark(&mut object);
        let name = object.name_any();
        if self.is_applied(job, K::KIND, &name, &hash) {
            return Ok(());
        }
        self.force(job, &object).await
    }

    /// Brings an object into shape.
    pub(super) async fn force<K: Watched>(&self, job: &StreamJob, object: &K) -> Result<(), EffectError> {
        let name = object.name_any();
        self.check_own::<K>(job, &name).await?;
        let api = self.api::<K>(&job.namespace().unwrap_or_default());
        let params = PatchParams::apply(MANAGER).force();
        let body = Patch::Apply(typed(object)?);
        let what = || format!("apply {} {name}", kind::<K>());
        let applied = self.request(what, api.patch(&name, &params, &body)).await?;
        self.wrote::<K>(&applied);
        Ok(())
    }

    fn is_applied(&self, job: &StreamJob, kind: Kind, name: &str, hash: &str) -> bool {
        let cache = self.cache();
        let thing = cache.known(&JobKey::of(job)).and_then(|k| k.thing(kind, name));
        thing.is_some_and(|t| !t.leaving && t.owner == job.uid() && t.applied.as_deref() == Some(hash))
    }

    /// Creates an object that is never changed; one that is there is left as it is. Answers whether it was created.
    pub(super) async fn create<K: Watched>(&self, job: &StreamJob, object: &K) -> Result<bool, EffectError> {
        let name = object.name_any();
        let api = self.api::<K>(&job.namespace().unwrap_or_default());
        let what = || format!("create {} {name}", kind::<K>());
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), dry_run: false };
        let create = async {
            match api.create(&params, object).await {
                Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(None),
                other => other.map(Some),
            }
        };
        if let Some(created) = self.request(what, create).await? {
            self.wrote::<K>(&created);
            return Ok(true);
        }
        self.check_own::<K>(job, &name).await?;
        // By its labels it is known again; what it does is not touched.
        let meta = object.meta();
        let body = json!({"metadata": {
            "labels": meta.labels,
            "annotations": meta.annotations,
        }});
        self.merge::<K>(&job.namespace().unwrap_or_default(), &name, &body).await?;
        Ok(false)
    }

    /// Creates a Secret, unless it is there. Answers whether it was created, and what there is now.
    pub(super) async fn create_secret(
        &self,
        job: &StreamJob,
        secret: &Secret,
    ) -> Result<(bool, SecretSeen), EffectError> {
        let name = secret.name_any();
        let api = self.api::<Secret>(&job.namespace().unwrap_or_default());
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), dry_run: false };
        let create = async {
            match api.create(&params, secret).await {
                Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(false),
                other => other.map(|_| true),
            }
        };
        if self.request(|| format!("create Secret {name}"), create).await? {
            return Ok((true, SecretSeen::of(&secret.metadata)));
        }
        let found = self.request(|| format!("read Secret {name}"), api.get_metadata_opt(&name)).await?;
        match found {
            Some(found) => {
                check(job, "Secret", &name, &found.metadata)?;
                Ok((false, SecretSeen::of(&found.metadata)))
            }
            // It has gone in between.
            None => Err(EffectError::Overtaken(format!("create Secret {name}"))),
        }
    }

    /// The Secret of this name, if there is one that is the job's.
    pub(super) async fn look_for_secret(&self, job: &StreamJob, name: &str) -> Result<Option<SecretSeen>, EffectError> {
        let api = self.api::<Secret>(&job.namespace().unwrap_or_default());
        let found = self.request(|| format!("read Secret {name}"), api.get_metadata_opt(name)).await?;
        let found = found.filter(|f| is_of(job, &f.metadata) && f.metadata.deletion_timestamp.is_none());
        Ok(found.map(|f| SecretSeen::of(&f.metadata)))
    }

    /// Changes some fields of a Secret.
    pub(super) async fn patch_secret(&self, namespace: &str, name: &str, body: &Json) -> Result<(), EffectError> {
        let api = self.api::<Secret>(namespace);
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        self.request(|| format!("patch Secret {name}"), api.patch_metadata(name, &params, &Patch::Merge(body))).await?;
        Ok(())
    }

    /// The content of a Secret, if it is there.
    pub(super) async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Secret>, EffectError> {
        let api = self.api::<Secret>(namespace);
        self.request(|| format!("read Secret {name}"), api.get_opt(name)).await
    }

    /// Changes some fields of an object.
    pub(super) async fn merge<K: Watched>(&self, namespace: &str, name: &str, body: &Json) -> Result<(), EffectError> {
        let api = self.api::<K>(namespace);
        let what = || format!("patch {} {name}", kind::<K>());
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let patched = self.request(what, api.patch(name, &params, &Patch::Merge(body))).await?;
        self.wrote::<K>(&patched);
        Ok(())
    }

    /// Deletes an object of this uid. What belongs to it goes after it.
    pub(super) async fn delete<K: Watched>(&self, key: &JobKey, name: &str, uid: &str) -> Result<(), EffectError> {
        let deleted = self.delete_named::<K>(&key.namespace, name, Some(uid)).await;
        match deleted {
            Ok(()) => self.cache().leaves(key, K::KIND, name, uid),
            Err(EffectError::NotFound(_) | EffectError::Overtaken(_)) => {
                // The one that was meant is gone.
                self.cache().drop_thing(key, K::KIND, name, uid);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    pub(super) async fn delete_secret(&self, namespace: &str, name: &str) -> Result<(), EffectError> {
        match self.delete_named::<Secret>(namespace, name, None).await {
            Ok(()) | Err(EffectError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn delete_named<K>(&self, namespace: &str, name: &str, uid: Option<&str>) -> Result<(), EffectError>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + DeserializeOwned,
    {
        let preconditions = uid.map(|uid| Preconditions { uid: Some(uid.to_owned()), resource_version: None });
        let params = DeleteParams { preconditions, ..DeleteParams::background() };
        let api = self.api::<K>(namespace);
        self.request(|| format!("delete {} {name}", kind::<K>()), api.delete(name, &params)).await.map(drop)
    }

    /// Writes the status of what people have made, unless somebody has changed it meanwhile.
    pub(super) async fn write_status<K: Root + Serialize>(&self, object: &K) -> Result<(), EffectError> {
        let api = self.api::<K>(&object.namespace().unwrap_or_default());
        let name = object.name_any();
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), dry_run: false };
        let what = || format!("write the status of {} {name}", kind::<K>());
        let written = self.request(what, api.replace_status(&name, &params, object)).await?;
        K::put(&mut self.cache(), lean(written));
        Ok(())
    }

    /// Sets the finalizers of what people have made, unless somebody has changed it meanwhile.
    pub(super) async fn write_finalizers<K: Root>(&self, object: &K, finalizers: &[String]) -> Result<(), EffectError> {
        let api = self.api::<K>(&object.namespace().unwrap_or_default());
        let name = object.name_any();
        let body = Patch::Merge(json!({"metadata": {
            "finalizers": finalizers,
            "resourceVersion": object.resource_version(),
        }}));
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let what = || format!("write the finalizers of {} {name}", kind::<K>());
        let written = self.request(what, api.patch(&name, &params, &body)).await?;
        if written.meta().deletion_timestamp.is_some() && finalizers.is_empty() {
            // It is gone by that.
            K::dropped(&mut self.cache(), &K::key(written.meta()), &written.uid().unwrap_or_default());
        } else {
            K::put(&mut self.cache(), lean(written));
        }
        Ok(())
    }

    /// Makes a Savepoint, unless there is one of that name.
    pub(super) async fn create_savepoint(&self, savepoint: &Savepoint) -> Result<(), EffectError> {
        let name = savepoint.name_any();
        let api = self.api::<Savepoint>(&savepoint.namespace().unwrap_or_default());
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), dry_run: false };
        let create = async {
            match api.create(&params, savepoint).await {
                Err(kube::Error::Api(status)) if status.is_already_exists() => api.get(&name).await,
                other => other,
            }
        };
        let there = self.request(|| format!("create Savepoint {name}"), create).await?;
        if there.owner_references() != savepoint.owner_references() {
            return Err(EffectError::Taken { kind: kind::<Savepoint>(), name });
        }
        self.cache().put_savepoint(lean(there));
        Ok(())
    }

    /// Deletes a Savepoint of this uid.
    pub(super) async fn delete_savepoint(&self, key: &SavepointKey, uid: &str) -> Result<(), EffectError> {
        let api = self.api::<Savepoint>(&key.namespace);
        let preconditions = Some(Preconditions { uid: Some(uid.to_owned()), resource_version: None });
        let params = DeleteParams { preconditions, ..DeleteParams::background() };
        let what = || format!("delete Savepoint {}", key.name);
        match self.request(what, api.delete(&key.name, &params)).await.map(|gone| gone.left()) {
            Ok(Some(leaving)) => drop(self.cache().put_savepoint(lean(leaving))),
            Ok(None) | Err(EffectError::NotFound(_) | EffectError::Overtaken(_)) => {
                self.cache().drop_savepoint(key, uid);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Whether an object that is there is the job's, and stays.
fn check(job: &StreamJob, kind: &str, name: &str, found: &ObjectMeta) -> Result<(), EffectError> {
    match found.deletion_timestamp {
        _ if !is_of(job, found) => Err(EffectError::Taken { kind: kind.to_owned(), name: name.to_owned() }),
        // Once it is gone, another can be made.
        Some(_) => Err(EffectError::Overtaken(format!("{kind} {name} is being removed"))),
        None => Ok(()),
    }
}

fn kind<K: Resource<DynamicType = ()>>() -> String {
    K::kind(&()).into_owned()
}

/// An object as server-side apply takes it: with its kind.
fn typed<K: Watched>(object: &K) -> Result<Json, EffectError> {
    let failed = |why: String| EffectError::Failed { what: format!("write down {}", kind::<K>()), why };
    let mut json = serde_json::to_value(object).map_err(|e| failed(e.to_string()))?;
    let Some(fields) = json.as_object_mut() else { return Err(failed("it is no object".to_owned())) };
    fields.insert("apiVersion".to_owned(), K::api_version(&()).into_owned().into());
    fields.insert("kind".to_owned(), kind::<K>().into());
    Ok(json)
}
