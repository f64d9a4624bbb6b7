//! What the tests of this crate are made of: a job, snapshots of it, and a storage that fails.

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicUsize, Ordering},
};

use async_trait::async_trait;
use bytes::Bytes;
use floodmark_crds::StreamJob;
use floodmark_dataflow::takers;
use floodmark_snapshot::{
    Env, Epoch, Error, JobId, Manifest, OperatorSnapshot, Result, Shard, ShardKind,
    log::{CheckpointLog, Event},
    manifest::hash_hex,
    storage::{ObjectInfo, PutNew, Storage},
};

use crate::Planned;

/// A job that keeps state.
pub(crate) const SQL: &str = "CREATE TABLE t (k BIGINT, x BIGINT) WITH ('connector' = 'datagen', 'rate' = '1');
CREATE TABLE sums (k BIGINT, s BIGINT, PRIMARY KEY (k) NOT ENFORCED) WITH ('connector' = 'blackhole');
INSERT INTO sums SELECT k, sum(x) FROM t GROUP BY k;
";

pub(crate) fn manifest(sql: &str) -> StreamJob {
    let head = "apiVersion: floodmark.io/v1alpha1\nkind: StreamJob\nmetadata: {name: sums}\nspec: {sql: SELECT}\n";
    let mut job = StreamJob::from_yaml(head, "job.yaml").unwrap();
    job.spec.sql = sql.to_owned();
    job
}

pub(crate) fn planned() -> Planned {
    static ONCE: LazyLock<Planned> = LazyLock::new(|| Planned::of(&manifest(SQL)).unwrap());
    ONCE.clone()
}

/// A snapshot of a job as it is planned: a shard with a name of its own for each operator that keeps state.
pub(crate) fn snapshot(planned: &Planned, epoch: u64) -> Manifest {
    let mut manifest = Manifest::new(planned.id.clone(), Epoch(epoch));
    manifest.max_parallelism = planned.manifest.spec.max_parallelism;
    manifest.plan = planned.graph.fingerprint.clone();
    for (at, taker) in takers(&planned.graph).into_iter().enumerate() {
        let Some(schema) = taker.schema else { continue };
        let bytes = content(epoch, at);
        let path = format!("blobs/1/{epoch}-{at}.state");
        let shard =
            Shard { size: bytes.len() as u64, hash: hash_hex(&bytes), rows: 1, ..Shard::new(path, ShardKind::Keyed) };
        let (kind, shards) = (taker.kind, vec![shard]);
        let operator = OperatorSnapshot { kind, schema, parallelism: 1, splits: Vec::new(), shards };
        manifest.operators.insert(taker.uid, operator);
    }
    manifest
}

fn content(epoch: u64, at: usize) -> Bytes {
    format!("{epoch:03}-{at:02}").into()
}

/// The same with its files, in the folder `root`.
pub(crate) async fn with_files(storage: &Arc<dyn Storage>, root: &str, manifest: Manifest) -> Manifest {
    for shard in manifest.shards() {
        let at = shard.path.rsplit_once('-').unwrap().1.strip_suffix(".state").unwrap().parse().unwrap();
        storage.put(&format!("{root}/{}", shard.path), content(manifest.epoch.0, at)).await.unwrap();
    }
    manifest
}

/// Writes a reign with these events into a job's log.
pub(crate) async fn append(storage: &Arc<dyn Storage>, job: &JobId, events: Vec<Event>) {
    let (mut log, _) = CheckpointLog::open(storage.clone(), Env::system(), job, "test:1").await.unwrap();
    for event in events {
        log.append(event).await.unwrap();
    }
}

/// A storage of which calls fail.
pub(crate) struct Flaky {
    storage: Arc<dyn Storage>,
    /// Calls that still succeed.
    left: AtomicUsize,
}

impl Flaky {
    pub(crate) fn down(storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Self::after(storage, 0)
    }

    /// Goes down after so many calls.
    pub(crate) fn after(storage: Arc<dyn Storage>, calls: usize) -> Arc<dyn Storage> {
        Arc::new(Self { storage, left: AtomicUsize::new(calls) })
    }

    fn call(&self) -> Result<&dyn Storage> {
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        left.map(|_| &*self.storage).map_err(|_| Error::retry("the storage is down"))
    }
}

#[async_trait]
impl Storage for Flaky {
    async fn put_new(&self, path: &str, bytes: Bytes) -> Result<PutNew> {
        self.call()?.put_new(path, bytes).await
    }

    async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        self.call()?.put(path, bytes).await
    }

    async fn get(&self, path: &str) -> Result<Option<Bytes>> {
        self.call()?.get(path).await
    }

    async fn get_range(&self, path: &str, from: u64, to: u64) -> Result<Option<Bytes>> {
        self.call()?.get_range(path, from, to).await
    }

    async fn size(&self, path: &str) -> Result<Option<u64>> {
        self.call()?.size(path).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>> {
        self.call()?.list(prefix, start_after).await
    }

    async fn delete(&self, path: &str) -> Result<()> {
        self.call()?.delete(path).await
    }

    fn describe(&self) -> String {
        self.storage.describe()
    }
}
