//! What storage is reached with: the content of the Secrets that jobs name.
//!
//! Who deletes a namespace deletes its Secrets and its jobs at once, in any order. So of those whose files go with them the
//! credentials are kept as they were last read, in memory only, from when they are first seen until nothing needs them any more.
//!
//! Invariant: of what is not to be removed no credentials are kept.

use std::{
    collections::HashMap,
    sync::{MutexGuard, PoisonError},
};

use floodmark_crds::StreamJob;
use floodmark_snapshot::storage::Credentials;
use kube::ResourceExt as _;

use super::{Operator, cluster::EffectError, outside::Access};

/// A Secret: namespace and name.
pub(super) type SecretKey = (String, String);

/// Credentials that are kept. See the header of this file.
pub(super) type Kept = HashMap<SecretKey, Credentials>;

/// What something is to be removed with.
pub(super) struct Removing {
    pub(super) access: Access,
    /// The Secret is gone: nobody can put right what is wrong with it.
    pub(super) remembered: bool,
}

impl Operator {
    /// What the storage of a job is reached with; why not, if the Secret is not there.
    pub(super) async fn access(&self, job: &StreamJob) -> Result<Result<Access, String>, EffectError> {
        let location = job.spec.checkpoints.storage.clone();
        self.access_to(&job.namespace().unwrap_or_default(), location, secret_of(job)).await
    }

    /// The same of any storage.
    pub(super) async fn access_to(
        &self,
        namespace: &str,
        location: Option<String>,
        secret: Option<&str>,
    ) -> Result<Result<Access, String>, EffectError> {
        let Some(name) = secret else { return Ok(Ok(Access { location, credentials: None })) };
        let read = self.credentials(namespace, name).await?;
        Ok(read.map(|credentials| Access { location, credentials: Some(credentials) }))
    }

    /// The same for a removal: if the Secret can't be read any more, what was in it serves.
    pub(super) async fn access_to_remove(
        &self,
        namespace: &str,
        location: Option<String>,
        secret: Option<&str>,
    ) -> Result<Result<Removing, String>, EffectError> {
        let read = self.access_to(namespace, location.clone(), secret).await;
        if let Ok(Ok(access)) = read {
            return Ok(Ok(Removing { access, remembered: false }));
        }
        let key = (namespace.to_owned(), secret.unwrap_or_default().to_owned());
        let kept = self.kept().get(&key).cloned();
        match kept {
            Some(credentials) => {
                let access = Access { location, credentials: Some(credentials) };
                Ok(Ok(Removing { access, remembered: true }))
            }
            None => read.map(|read| read.map(|access| Removing { access, remembered: false })),
        }
    }

    async fn credentials(&self, namespace: &str, name: &str) -> Result<Result<Credentials, String>, EffectError> {
        let Some(secret) = self.cluster.secret(namespace, name).await? else {
            return Ok(Err(format!("Secret {name}, which spec.checkpoints.credentials names, is not there")));
        };
        let data = secret.data.unwrap_or_default();
        let pairs = data.iter().filter_map(|(key, value)| Some((key.as_str(), std::str::from_utf8(&value.0).ok()?)));
        Ok(Credentials::of(pairs).map_err(|error| format!("Secret {name}: {error}")))
    }

    /// Keeps what a Secret holds, for something whose files go with it. Of what is leaving it is read again with each pass: there
    /// are few, and it may have been changed.
    pub(super) async fn keep_access(&self, namespace: &str, secret: Option<&str>, leaving: bool) {
        let Some(name) = secret else { return };
        let key = (namespace.to_owned(), name.to_owned());
        if !leaving && self.kept().contains_key(&key) {
            return;
        }
        // That it can't be read is told where it is needed.
        if let Ok(Ok(credentials)) = self.credentials(namespace, name).await {
            self.kept().insert(key, credentials);
        }
    }

    /// Forgets what nothing needs any more.
    pub(super) fn drop_access(&self) {
        let needed = self.cluster.cache().secrets_to_keep();
        self.kept().retain(|key, _| needed.contains(key));
    }

    #[cfg(test)]
    pub(super) fn secrets_kept(&self) -> usize {
        self.kept().len()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The Secret that a job names for its storage.
pub(super) fn secret_of(job: &StreamJob) -> Option<&str> {
    job.spec.checkpoints.credentials.as_ref().map(|c| c.secret_name.as_str())
}
