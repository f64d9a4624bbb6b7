//! The seam to object storage: the few operations that the protocol needs, over local files, S3 or memory.
//!
//! The protocol rests on two properties: [`Storage::put_new`] lets exactly one of several writers win, and a `put` that has
//! returned is durable and listed. Local files are synchronised (file and folder) before a write returns.

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::{
    BackoffConfig, ClientOptions, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, RetryConfig,
    WriteMultipart, aws::AmazonS3Builder, local::LocalFileSystem, path::Path as ObjectPath, prefix::PrefixStore,
};
use url::Url;

pub use self::credentials::Credentials;
use self::credentials::{REGION_DEFAULT, Secrets};
use crate::{Disposition, Env, Error, Result};

/// How long a storage that does not answer, or not well, is tried.
struct Patience {
    connect: Duration,
    /// For one answer, all of it.
    answer: Duration,
    /// Requests of one operation are repeated for at most this long before it fails.
    retry: Duration,
    backoff_max: Duration,
}

/// A job's: state is large, and waiting costs less than a failure.
const JOB: Patience = Patience {
    connect: Duration::from_secs(5),
    answer: Duration::from_secs(60),
    retry: Duration::from_secs(10),
    backoff_max: Duration::from_secs(2),
};
/// Of somebody who looks after many jobs, and comes back later: an error within ten seconds at worst.
const VISITOR: Patience = Patience {
    connect: Duration::from_secs(2),
    answer: Duration::from_secs(4),
    retry: Duration::from_secs(4),
    backoff_max: Duration::from_secs(1),
};
/// Codes of S3 for what it has understood and refused: waiting won't change it.
const REFUSALS: [&str; 5] =
    ["AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"];
/// Requests of one operation after the first.
const RETRIES_MAX: usize = 8;
/// Objects above this size are uploaded in parts, bytes.
const MULTIPART_THRESHOLD: usize = 16 << 20;

mod credentials;
mod memory;

/// What became of a create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutNew {
    /// The object did not exist, and now does.
    Created,
    /// Somebody had created it before.
    Exists,
}

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Relative to the storage's root.
    pub path: String,
    /// Bytes.
    pub size: u64,
}

/// Objects under one root. Paths are relative to it and separated by `/`.
#[async_trait]
pub trait Storage: Send + Sync {
    /// Creates an object; exactly one of several concurrent callers is told `Created`.
    ///
    /// A caller whose reply was lost and who tries again with the same bytes is told `Created`: the object is its own.
    async fn put_new(&self, path: &str, bytes: Bytes) -> Result<PutNew>;

    /// Writes an object, over an older one of that name if there is one.
    async fn put(&self, path: &str, bytes: Bytes) -> Result<()>;

    /// Reads a whole object; `None` if there is none.
    async fn get(&self, path: &str) -> Result<Option<Bytes>>;

    /// Reads bytes `from..to` of an object; `None` if there is none.
    async fn get_range(&self, path: &str, from: u64, to: u64) -> Result<Option<Bytes>>;

    /// Bytes of an object; `None` if there is none.
    async fn size(&self, path: &str) -> Result<Option<u64>>;

    /// Lists the objects whose path begins with the folder `prefix` and sorts after `start_after`, sorted by path.
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>>;

    /// At most `limit` of those that [`Storage::list`] answers with: which of them is not said, but they are sorted.
    async fn list_some(&self, prefix: &str, limit: usize) -> Result<Vec<ObjectInfo>> {
        let mut listed = self.list(prefix, None).await?;
        listed.truncate(limit);
        Ok(listed)
    }

    /// Deletes an object; one that is not there is no error.
    async fn delete(&self, path: &str) -> Result<()>;

    /// Copies an object within the storage, over an older one of that name if there is one. False if there is none to copy.
    async fn copy(&self, from: &str, to: &str) -> Result<bool> {
        match self.get(from).await? {
            Some(bytes) => self.put(to, bytes).await.map(|()| true),
            None => Ok(false),
        }
    }

    /// Opens another location to read what is there, with what this one was opened with.
    ///
    /// # Errors
    /// `Abort` if the location can't be used, or is none for whoever opened this one; the network is not touched.
    fn open_other(&self, location: &str) -> Result<Arc<dyn Storage>> {
        open_existing(location)
    }

    /// Where it is, for people: `s3://bucket/prefix`. Holds no secret.
    fn describe(&self) -> String;

    /// Whether it is on this machine: a copy of an object beside it would be read no faster.
    fn is_local(&self) -> bool {
        false
    }
}

/// Opens the storage that a URL names: `file:///dir`, a plain path, `s3://bucket/prefix`, or `memory://` (with
/// `?limit=64MiB` or so: bytes that it holds at most).
///
/// S3 takes its endpoint and credentials from the usual `AWS_*` environment variables.
///
/// # Errors
/// `Abort` if the URL can't be used; the network is not touched.
pub fn open(location: &str) -> Result<Arc<dyn Storage>> {
    open_as(location, true, None)
}

/// Opens a storage to read what is there: as [`open`], but makes no folder.
///
/// # Errors
/// As [`open`]; also if a local folder does not exist.
pub fn open_existing(location: &str) -> Result<Arc<dyn Storage>> {
    open_as(location, false, None)
}

/// Opens a job's storage as [`open_existing`], but for somebody who looks after many jobs: S3 is reached with the job's
/// credentials and nothing of this process's environment, and one that is down is an error within ten seconds.
///
/// # Errors
/// As [`open_existing`]; also if the location is memory, which is in the process that runs the job.
pub fn open_with(location: &str, credentials: &Credentials) -> Result<Arc<dyn Storage>> {
    open_as(location, false, Some(credentials))
}

fn open_as(location: &str, create: bool, credentials: Option<&Credentials>) -> Result<Arc<dyn Storage>> {
    let (store, root, local_root): (Arc<dyn ObjectStore>, ObjectPath, Option<PathBuf>) = match Url::parse(location) {
        Ok(url) if url.scheme() == "s3" => {
            let bucket = url.host_str().unwrap_or_default();
            if bucket.is_empty() {
                return Err(Error::abort(format!("storage '{location}': name a bucket, as in s3://bucket/folder")));
            }
            (s3(bucket, credentials)?, object_path(location, url.path())?, None)
        }
        Ok(url) if url.scheme() == "memory" && credentials.is_some() => {
            return Err(Error::abort(format!(
                "storage '{location}': memory is in the process that runs the job, and out of reach for others; use \
                 s3://bucket/folder"
            )));
        }
        Ok(url) if url.scheme() == "memory" => return Ok(Arc::new(memory::LimitedMemory::new(location, &url)?)),
        Ok(url) if url.scheme() == "file" => {
            let path = url
                .to_file_path()
                .map_err(|()| Error::abort(format!("storage '{location}': not a path, as in file:///folder")))?;
            local(location, path, create)?
        }
        Ok(url) if location.contains("://") => {
            let scheme = url.scheme();
            return Err(Error::abort(format!(
                "storage '{location}': unknown scheme '{scheme}'; use s3://bucket/folder, file:///folder or a path"
            )));
        }
        Ok(_) | Err(_) => local(location, PathBuf::from(location), create)?,
    };
    let store: Arc<dyn ObjectStore> = Arc::new(PrefixStore::new(store, root));
    let secrets = match (credentials, &local_root) {
        (Some(credentials), _) => credentials.secrets(),
        (None, Some(_)) => Secrets::none(),
        (None, None) => Secrets::of_environment(),
    };
    let (location, credentials) = (location.trim_end_matches('/').to_owned(), credentials.cloned());
    Ok(Arc::new(ObjectStorage { store, location, local_root, credentials, secrets }))
}

/// Checks that the storage can be written, read and listed, with an object that is removed again.
///
/// # Errors
/// Says what is wrong with the location or the credentials.
pub async fn check_writable(storage: &dyn Storage, env: &Env) -> Result<()> {
    let path = format!(".writable-{}", env.ids.ulid());
    let describe = storage.describe();
    let context = |e: Error| e.context(format!("storage {describe} is not writable"));
    storage.put(&path, Bytes::from_static(b"floodmark")).await.map_err(context)?;
    storage.delete(&path).await.map_err(context)
}

fn s3(bucket: &str, credentials: Option<&Credentials>) -> Result<Arc<dyn ObjectStore>> {
    let Patience { connect, answer, retry, backoff_max } = if credentials.is_some() { VISITOR } else { JOB };
    let backoff = BackoffConfig { init_backoff: Duration::from_millis(50), max_backoff: backoff_max, base: 2.0 };
    let retry = RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: retry };
    let options = ClientOptions::new().with_connect_timeout(connect).with_timeout(answer);
    let builder = match credentials {
        Some(credentials) => credentials.builder(options),
        None => {
            let allow_http = std::env::var("AWS_ALLOW_HTTP").is_ok_and(|v| v == "true" || v == "1");
            let builder = AmazonS3Builder::from_env().with_client_options(options.with_allow_http(allow_http));
            match ["AWS_REGION", "AWS_DEFAULT_REGION"].iter().all(|name| std::env::var_os(name).is_none()) {
                true => builder.with_region(REGION_DEFAULT),
                false => builder,
            }
        }
    };
    let store = builder.with_bucket_name(bucket).with_retry(retry).build();
    let store = store.map_err(|e| {
        let secrets = credentials.map_or_else(Secrets::of_environment, Credentials::secrets);
        Error::abort(secrets.hide(&format!("open bucket '{bucket}': {e}")))
    })?;
    Ok(Arc::new(store))
}

fn local(location: &str, path: PathBuf, create: bool) -> Result<(Arc<dyn ObjectStore>, ObjectPath, Option<PathBuf>)> {
    let path = std::path::absolute(&path).map_err(|e| Error::abort(format!("storage '{location}': {e}")))?;
    if create {
        std::fs::create_dir_all(&path)
            .map_err(|e| Error::abort(format!("storage '{location}': create folder {}: {e}", path.display())))?;
    } else if !path.is_dir() {
        return Err(Error::abort(format!("storage '{location}': there is no folder {}", path.display())));
    }
    let store = LocalFileSystem::new_with_prefix(&path)
        .map_err(|e| Error::abort(format!("storage '{location}': {e}")))?
        .with_automatic_cleanup(false);
    Ok((Arc::new(store), ObjectPath::default(), Some(path)))
}

fn object_path(location: &str, path: &str) -> Result<ObjectPath> {
    ObjectPath::parse(path.trim_matches('/')).map_err(|e| Error::abort(format!("storage '{location}': {e}")))
}

struct ObjectStorage {
    store: Arc<dyn ObjectStore>,
    location: String,
    /// The folder of local storage: its writes are synchronised before they count.
    local_root: Option<PathBuf>,
    /// What it was opened with; `None` stands for this process's environment.
    credentials: Option<Credentials>,
    /// What none of its errors may show.
    secrets: Secrets,
}

impl ObjectStorage {
    fn error(&self, action: &str, path: &str, error: object_store::Error) -> Error {
        use object_store::Error as E;
        let text = error.to_string();
        let place = format!("{action} {}/{path}", self.location);
        let code = credentials::code(&text);
        let refused = matches!(&error, E::PermissionDenied { .. } | E::Unauthenticated { .. })
            || code.is_some_and(|code| REFUSALS.contains(&code));
        let disposition = match &error {
            E::NotSupported { .. } | E::InvalidPath { .. } => Disposition::Abort,
            _ if refused => Disposition::Abort,
            _ => Disposition::Retry,
        };
        let hint = match &error {
            _ if self.local_root.is_some() => "",
            _ if refused => " (check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy)",
            E::NotFound { .. } => " (does the bucket exist?)",
            _ if code == Some("NoSuchBucket") => " (does the bucket exist?)",
            _ => " (check AWS_ENDPOINT_URL, and AWS_ALLOW_HTTP=true for plain http)",
        };
        let text = self.secrets.hide(&text);
        Error::new(disposition, format!("{place}{hint}: {text}"))
    }

    async fn sorted(
        &self,
        prefix: &str,
        found: impl Stream<Item = object_store::Result<ObjectMeta>> + Send,
    ) -> Result<Vec<ObjectInfo>> {
        let found: Vec<_> = found.try_collect().await.map_err(|e| self.error("list", prefix, e))?;
        let mut objects: Vec<_> =
            found.into_iter().map(|o| ObjectInfo { path: o.location.to_string(), size: o.size }).collect();
        objects.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(objects)
    }

    async fn sync(&self, path: &str) -> Result<()> {
        let Some(root) = &self.local_root else { return Ok(()) };
        let file = root.join(path);
        let sync = move || -> std::io::Result<()> {
            std::fs::File::open(&file)?.sync_all()?;
            match file.parent() {
                Some(folder) => std::fs::File::open(folder)?.sync_all(),
                None => Ok(()),
            }
        };
        let outcome = tokio::task::spawn_blocking(sync)
            .await
            .map_err(|e| Error::abort(format!("synchronise {}/{path}: {e}", self.location)))?;
        outcome.map_err(|e| Error::retry(format!("synchronise {}/{path}: {e}", self.location)))
    }
}

#[async_trait]
impl Storage for ObjectStorage {
    async fn put_new(&self, path: &str, bytes: Bytes) -> Result<PutNew> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.store.put_opts(&ObjectPath::from(path), bytes.clone().into(), options).await {
            Ok(_) => {}
            // A retried request whose first reply was lost meets its own object.
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                return Ok(match self.get(path).await? {
                    Some(found) if found == bytes => PutNew::Created,
                    Some(_) | None => PutNew::Exists,
                });
            }
            Err(e) => return Err(self.error("create", path, e)),
        }
        self.sync(path).await?;
        Ok(PutNew::Created)
    }

    async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        let location = ObjectPath::from(path);
        if bytes.len() > MULTIPART_THRESHOLD && self.local_root.is_none() {
            let upload = self
                .store
                .put_multipart_opts(&location, Default::default())
                .await
                .map_err(|e| self.error("write", path, e))?;
            let mut parts = WriteMultipart::new_with_chunk_size(upload, MULTIPART_THRESHOLD / 2);
            parts.put(bytes);
            parts.finish().await.map_err(|e| self.error("write", path, e))?;
        } else {
            self.store.put(&location, bytes.into()).await.map_err(|e| self.error("write", path, e))?;
        }
        self.sync(path).await
    }

    async fn get(&self, path: &str) -> Result<Option<Bytes>> {
        match self.store.get(&ObjectPath::from(path)).await {
            Ok(found) => found.bytes().await.map(Some).map_err(|e| self.error("read", path, e)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.error("read", path, e)),
        }
    }

    async fn get_range(&self, path: &str, from: u64, to: u64) -> Result<Option<Bytes>> {
        match self.store.get_range(&ObjectPath::from(path), from..to).await {
            Ok(found) => Ok(Some(found)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.error("read", path, e)),
        }
    }

    async fn size(&self, path: &str) -> Result<Option<u64>> {
        match self.store.head(&ObjectPath::from(path)).await {
            Ok(found) => Ok(Some(found.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.error("look up", path, e)),
        }
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>> {
        let folder = ObjectPath::from(prefix);
        let found = match start_after {
            Some(after) => self.store.list_with_offset(Some(&folder), &ObjectPath::from(after)),
            None => self.store.list(Some(&folder)),
        };
        self.sorted(prefix, found).await
    }

    async fn list_some(&self, prefix: &str, limit: usize) -> Result<Vec<ObjectInfo>> {
        // Pages that are not wanted are not fetched.
        self.sorted(prefix, self.store.list(Some(&ObjectPath::from(prefix))).take(limit)).await
    }

    async fn delete(&self, path: &str) -> Result<()> {
        match self.store.delete(&ObjectPath::from(path)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(self.error("delete", path, e)),
        }
    }

    async fn copy(&self, from: &str, to: &str) -> Result<bool> {
        match self.store.copy(&ObjectPath::from(from), &ObjectPath::from(to)).await {
            Ok(()) => self.sync(to).await.map(|()| true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(self.error("copy", from, e)),
        }
    }

    fn open_other(&self, location: &str) -> Result<Arc<dyn Storage>> {
        let Some(credentials) = &self.credentials else { return open_existing(location) };
        let other = open_with(location, credentials)?;
        // A job in a bucket has no business in the folders of whoever looks after it.
        if other.is_local() && !self.is_local() {
            return Err(Error::abort(format!("{location} can't be reached from {}: name a bucket", self.location)));
        }
        Ok(other)
    }

    fn describe(&self) -> String {
        self.location.clone()
    }

    fn is_local(&self) -> bool {
        self.local_root.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn behaves(storage: &dyn Storage) {
        check_writable(storage, &Env::system()).await.unwrap();
        let put = |path: &'static str, text: &'static str| storage.put_new(path, Bytes::from_static(text.as_bytes()));
        assert_eq!(put("a/1", "one").await.unwrap(), PutNew::Created);
        assert_eq!(put("a/1", "other").await.unwrap(), PutNew::Exists);
        assert_eq!(put("a/1", "one").await.unwrap(), PutNew::Created, "its own object");
        assert_eq!(put("a/2", "two").await.unwrap(), PutNew::Created);
        storage.put("b/1", Bytes::from_static(b"old")).await.unwrap();
        storage.put("b/1", Bytes::from_static(b"newer")).await.unwrap();
        assert_eq!(storage.get("b/1").await.unwrap().unwrap(), "newer");
        assert_eq!(storage.get_range("b/1", 1, 3).await.unwrap().unwrap(), "ew");
        assert_eq!(storage.get("b/2").await.unwrap(), None);
        let paths = |listed: Vec<ObjectInfo>| listed.into_iter().map(|o| o.path).collect::<Vec<_>>();
        assert_eq!(paths(storage.list("a", None).await.unwrap()), ["a/1", "a/2"]);
        assert_eq!(paths(storage.list("a", Some("a/1")).await.unwrap()), ["a/2"]);
        assert_eq!(storage.list_some("a", 1).await.unwrap().len(), 1);
        assert_eq!(paths(storage.list_some("a", 3).await.unwrap()), ["a/1", "a/2"]);
        assert!(storage.copy("a/2", "c/2").await.unwrap());
        assert!(!storage.copy("a/3", "c/3").await.unwrap());
        assert_eq!(storage.get("c/2").await.unwrap().unwrap(), "two");
        storage.delete("a/1").await.unwrap();
        storage.delete("a/1").await.unwrap();
        assert_eq!(paths(storage.list("a", None).await.unwrap()), ["a/2"]);
    }

    #[tokio::test]
    async fn memory_and_local_files_behave_alike() {
        behaves(&*open("memory://").unwrap()).await;
        let folder = tempfile::tempdir().unwrap();
        behaves(&*open(folder.path().to_str().unwrap()).unwrap()).await;
        let url = Url::from_directory_path(folder.path().join("nested")).unwrap();
        behaves(&*open(url.as_str()).unwrap()).await;
        assert!(open("memory://").unwrap().is_local() && open(url.as_str()).unwrap().is_local());
    }

    #[tokio::test]
    async fn of_many_creators_exactly_one_wins() {
        let folder = tempfile::tempdir().unwrap();
        for location in ["memory://", folder.path().to_str().unwrap()] {
            let storage = open(location).unwrap();
            let creates = (0..32).map(|i| storage.put_new("log/1", Bytes::from(format!("writer {i}"))));
            let outcomes = futures::future::try_join_all(creates).await.unwrap();
            assert_eq!(outcomes.iter().filter(|o| **o == PutNew::Created).count(), 1, "{location}");
        }
    }

    #[test]
    fn a_location_that_cannot_be_used_says_why() {
        let message = |location| open(location).err().unwrap().to_string();
        assert_eq!(
            message("gs://bucket"),
            "storage 'gs://bucket': unknown scheme 'gs'; use s3://bucket/folder, file:///folder or a path"
        );
        assert!(message("/dev/null/x").starts_with("storage '/dev/null/x': create folder /dev/null/x:"));
    }
}
