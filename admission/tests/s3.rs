//! What a controller does with jobs' storage, against real S3 servers: each job is reached with credentials of its own, and none
//! of this process.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    missing_docs,
    reason = "a test waits for a real server in real time"
)]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use floodmark_admission::{
    Extent, History, Planned, Removal, RequestError, Verdict, Wanted, check_state, remove_job, remove_savepoint,
    savepoint,
};
use floodmark_crds::StreamJob;
use floodmark_dataflow::takers;
use floodmark_snapshot::{
    Env, Epoch, JobId, Manifest, OperatorSnapshot, Shard, ShardKind,
    log::{CheckpointLog, Event, JobFolder},
    manifest::hash_hex,
    restore::{Reference, Snapshot},
    savepoint::export,
    storage::{self, Credentials, Storage},
};
use floodmark_testkit::{S3, Stop};

const JOB: &str = "apiVersion: floodmark.io/v1alpha1
kind: StreamJob
metadata: {name: sums, namespace: shop, uid: 7f3a}
spec:
  sql: |
    CREATE TABLE t (k BIGINT, x BIGINT) WITH ('connector' = 'datagen', 'rate' = '1');
    CREATE TABLE sums (k BIGINT, s BIGINT, PRIMARY KEY (k) NOT ENFORCED) WITH ('connector' = 'blackhole');
    INSERT INTO sums SELECT k, sum(x) FROM t GROUP BY k;
";

fn planned() -> Planned {
    Planned::of(&StreamJob::from_yaml(JOB, "job.yaml").unwrap()).unwrap()
}

fn credentials(server: &S3, secret: &str) -> Credentials {
    let mut env = server.env();
    env.iter_mut().find(|(name, _)| *name == "AWS_SECRET_ACCESS_KEY").unwrap().1 = secret.to_owned();
    Credentials::of(env.iter().map(|(name, value)| (*name, value.as_str()))).unwrap()
}

fn open(server: &S3, folder: &str) -> Arc<dyn Storage> {
    let location = format!("s3://{}/{folder}", server.bucket());
    storage::open_with(&location, &credentials(server, server.secret())).unwrap()
}

/// A checkpoint of the job with its files, and a savepoint of it.
async fn fill(storage: &Arc<dyn Storage>, job: &JobId, epoch: u64) -> String {
    let (planned, folder) = (planned(), JobFolder::of(job));
    let mut manifest = Manifest::new(job.clone(), Epoch(epoch));
    manifest.max_parallelism = planned.manifest.spec.max_parallelism;
    manifest.plan = planned.graph.fingerprint.clone();
    for (at, taker) in takers(&planned.graph).into_iter().enumerate() {
        let Some(schema) = taker.schema else { continue };
        let (path, bytes) = (format!("blobs/1/{epoch}-{at}.state"), format!("{epoch}-{at}"));
        storage.put(&folder.path(&path), bytes.clone().into()).await.unwrap();
        let (size, hash) = (bytes.len() as u64, hash_hex(bytes.as_bytes()));
        let shards = vec![Shard { size, hash, rows: 1, ..Shard::new(path, ShardKind::Keyed) }];
        let operator = OperatorSnapshot { kind: taker.kind, schema, parallelism: 1, splits: Vec::new(), shards };
        manifest.operators.insert(taker.uid, operator);
    }
    let snapshot = Snapshot::new(manifest.clone().into(), storage.clone(), folder.root());
    let (mut log, _) = CheckpointLog::open(storage.clone(), Env::system(), job, "test:1").await.unwrap();
    log.append(Event::Completed { manifest: Box::new(manifest) }).await.unwrap();
    export(&snapshot, storage, &folder, "base", 1).await.unwrap()
}

#[tokio::test]
async fn jobs_of_different_servers_are_judged_and_removed_each_with_its_own_credentials() {
    let servers = [S3::start().unwrap(), S3::start().unwrap()];
    let (planned, latest) = (planned(), Wanted::Start { restore: Reference::Latest, initial: None });
    for (server, epoch) in servers.iter().zip([3, 4]) {
        let storage = open(server, "jobs");
        let location = fill(&storage, &planned.id, epoch).await;
        let verdict = check_state(&planned, &storage, &latest).await.unwrap();
        assert_eq!(verdict.start().unwrap().plan.snapshot, format!("checkpoint {epoch} of shop/sums/7f3a"));
        assert!(verdict.refusal().is_none());
        let base = savepoint(&planned.id, &storage, "base").await.unwrap().unwrap();
        assert_eq!((base.epoch, &base.location), (Epoch(epoch), &location));
        // Of another storage, in the same server.
        let elsewhere = open(server, "new");
        let begin = Wanted::Start { restore: Reference::Latest, initial: Some(location.parse().unwrap()) };
        let verdict = check_state(&planned, &elsewhere, &begin).await.unwrap();
        assert!(
            matches!(verdict, Verdict::Admitted(ref start) if start.location.as_ref() == Some(&location)),
            "{verdict:?}"
        );
    }
    let storage = open(&servers[0], "jobs");
    for file in 0..510 {
        storage.put(&format!("shop/sums/7f3a/blobs/9/{file}"), "x".into()).await.unwrap();
    }
    let mut steps = 0;
    while steps < 10 {
        steps += 1;
        let step = remove_job(&planned.id, &storage, &Env::system(), "test:2", Extent::AllButSavepoints).await.unwrap();
        if matches!(step, Removal::Done { .. }) {
            break;
        }
    }
    assert_eq!(steps, 2);
    assert!(savepoint(&planned.id, &storage, "base").await.unwrap().is_some());
    let left = storage.list("", None).await.unwrap();
    assert!(left.iter().all(|o| o.path.starts_with("shop/sums/7f3a/savepoints/base/")), "{left:?}");
    assert!(matches!(remove_savepoint(&planned.id, &storage, "base").await.unwrap(), Removal::Done { files: 2.. }));
    assert_eq!(storage.list("", None).await.unwrap(), []);
    let other = History::read(planned.id.clone(), open(&servers[1], "jobs")).await.unwrap();
    assert_eq!(other.newest().unwrap().epoch, Epoch(4));
}

#[tokio::test]
async fn a_wrong_secret_and_a_server_that_is_down_are_told_apart_and_no_secret_is_shown() {
    let mut server = S3::start().unwrap();
    let id = planned().id;
    let location = format!("s3://{}/jobs", server.bucket());
    let wrong = storage::open_with(&location, &credentials(&server, "canary-that-is-wrong")).unwrap();
    let error = History::read(id.clone(), wrong.clone()).await.err().unwrap();
    assert!(!error.may_pass() && error.to_string().contains("SignatureDoesNotMatch"), "{error}");
    assert!(!error.to_string().contains("canary") && !error.to_string().contains(server.access_key()), "{error}");
    let refused = savepoint(&id, &wrong, "base").await.unwrap_err();
    assert!(matches!(refused, RequestError::Storage(ref e) if !e.may_pass()), "{refused}");
    let missing = storage::open_with("s3://no-such-bucket/x", &credentials(&server, server.secret())).unwrap();
    let error = History::read(id.clone(), missing).await.err().unwrap();
    assert!(error.to_string().contains("does the bucket exist?"), "{error}");
    let storage = open(&server, "jobs");
    server.restart(Stop::Kill).unwrap();
    assert!(History::read(id.clone(), storage.clone()).await.unwrap().newest().is_none());
    drop(server);
    let start = Instant::now();
    let error = History::read(id, storage).await.err().unwrap();
    assert!(error.may_pass() && start.elapsed() < Duration::from_secs(10), "{:?}: {error}", start.elapsed());
}
