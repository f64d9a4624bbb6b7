//! Bad input that takes a server to show: topics that are missing, brokers that can't be reached, secrets that are wrong.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

use std::{
    net::TcpListener,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use floodmark_testkit::scratch;
use floodmark_tests::job::{CheckpointLog, Ended, Job, PATIENCE};
use nix::sys::signal::Signal;

mod servers;

use servers::{kafka, location, s3};

const JOB_FAILED: i32 = 1;
const BAD_INPUT: i32 = 2;
const FENCED: i32 = 3;
const STORAGE: i32 = 4;

/// A source that can't be reached is given up within this time.
const BROKER_PATIENCE: Duration = Duration::from_secs(30);

fn from_kafka(folder: &Path, bootstrap: &str, topic: &str, options: &str) -> Job {
    let sql = format!(
        "CREATE TABLE x (a BIGINT) WITH ('connector' = 'kafka', 'topic' = '{topic}',
  'properties.bootstrap.servers' = '{bootstrap}', 'format' = 'json'{options});
CREATE TABLE y (a BIGINT) WITH ('connector' = 'blackhole');
INSERT INTO y SELECT a FROM x;"
    );
    Job::new(folder, "reader", sql)
}

#[test]
fn a_topic_that_is_missing_is_named_with_the_nearest_that_is_there() -> Result<()> {
    let (broker, folder) = (kafka()?, scratch::folder("job-")?);
    broker.create_topic("orders", 1, &[])?;
    let job = from_kafka(folder.path(), &broker.bootstrap(), "ordres", "");
    job.run()?.refused(BAD_INPUT, &["'ordres'", "'orders'", &broker.bootstrap()])
}

#[test]
fn a_topic_to_write_that_is_missing_is_named() -> Result<()> {
    let (broker, folder) = (kafka()?, scratch::folder("job-")?);
    let sql = format!(
        "CREATE TABLE x (a BIGINT) WITH ('connector' = 'datagen', 'rows' = '10');
CREATE TABLE y (a BIGINT) WITH ('connector' = 'kafka', 'topic' = 'nowhere',
  'properties.bootstrap.servers' = '{}', 'format' = 'json');
INSERT INTO y SELECT a FROM x;",
        broker.bootstrap()
    );
    Job::new(folder.path(), "writer", sql).run()?.refused(BAD_INPUT, &["'nowhere'"])
}

#[test]
fn a_broker_that_cannot_be_reached_is_given_up_within_a_bounded_time() -> Result<()> {
    let folder = scratch::folder("job-")?;
    // A port that nobody listens on.
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let start = Instant::now();
    let ended = from_kafka(folder.path(), &address, "orders", "").run()?;
    ended.refused(JOB_FAILED, &[&address])?;
    ensure!(start.elapsed() < BROKER_PATIENCE, "it took {:?}", start.elapsed());
    Ok(())
}

#[test]
fn an_unknown_kafka_property_is_shown_with_its_place() -> Result<()> {
    let (broker, folder) = (kafka()?, scratch::folder("job-")?);
    broker.create_topic("property", 1, &[])?;
    let job = from_kafka(folder.path(), &broker.bootstrap(), "property", ", 'properties.fetch.mn.bytes' = '1'");
    job.run()?.refused(BAD_INPUT, &["fetch.mn.bytes", "line"])
}

#[test]
fn a_password_is_never_shown() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let options = ", 'properties.security.protocol' = 'SASL_PLAINTEXT', 'properties.sasl.mechanism' = 'PLAIN',
  'properties.sasl.username' = 'me', 'properties.sasl.password' = 'hunter2hunter2'";
    let ended = from_kafka(folder.path(), &address, "orders", options).run()?;
    ended.refused(JOB_FAILED, &[])?;
    ensure!(!ended.log.contains("hunter2"), "it shows the password: {ended}");
    Ok(())
}

/// A job that runs for seconds, with checkpoints on S3.
fn on_s3(folder: &Path, storage: String, env: Vec<(&'static str, String)>) -> Job {
    let sql =
        "CREATE TABLE nexmark (event_type INT) WITH ('connector' = 'nexmark', 'events' = '200000', 'rate' = '50000');
CREATE TABLE nothing (n BIGINT, event_type INT, PRIMARY KEY (event_type) NOT ENFORCED) WITH ('connector' = 'blackhole');
INSERT INTO nothing SELECT count(*), event_type FROM nexmark GROUP BY event_type;";
    let mut job = Job::new(folder, "on-s3", sql);
    job.interval = "300ms".to_owned();
    job.storage = storage;
    job.env = env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    job
}

fn refused_quickly(job: &Job, words: &[&str]) -> Result<Ended> {
    let start = Instant::now();
    let ended = job.run()?;
    ended.refused(STORAGE, words)?;
    ensure!(start.elapsed() < BROKER_PATIENCE, "it took {:?}", start.elapsed());
    Ok(ended)
}

#[test]
fn a_wrong_s3_secret_is_refused_and_not_shown() -> Result<()> {
    let (store, folder) = (s3()?, scratch::folder("job-")?);
    let storage = location(&store, "wrong-secret");
    let mut job = on_s3(folder.path(), storage.clone(), store.env());
    job.env.insert("AWS_SECRET_ACCESS_KEY".to_owned(), "not-the-secret".to_owned());
    let ended = refused_quickly(&job, &[&storage, "is not writable"])?;
    ensure!(!ended.log.contains("not-the-secret"), "it shows the secret: {ended}");
    job.env.insert("AWS_ACCESS_KEY_ID".to_owned(), "nobody".to_owned());
    refused_quickly(&job, &[&storage, "is not writable"])?;
    Ok(())
}

#[test]
fn a_bucket_that_is_missing_is_refused() -> Result<()> {
    let (store, folder) = (s3()?, scratch::folder("job-")?);
    let job = on_s3(folder.path(), "s3://no-such-bucket/x".to_owned(), store.env());
    refused_quickly(&job, &["s3://no-such-bucket/x", "is not writable"])?;
    Ok(())
}

#[test]
fn an_s3_server_that_cannot_be_reached_is_given_up_within_a_bounded_time() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let env = vec![
        ("AWS_ENDPOINT_URL", format!("http://{address}")),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_ACCESS_KEY_ID", "a".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "b".to_owned()),
    ];
    refused_quickly(&on_s3(folder.path(), "s3://bucket/x".to_owned(), env), &["s3://bucket/x"])?;
    Ok(())
}

#[test]
fn of_two_processes_on_the_same_bucket_the_older_is_fenced_and_says_so() -> Result<()> {
    let (store, folder) = (s3()?, scratch::folder("job-")?);
    let job = on_s3(folder.path(), location(&store, "two"), store.env());
    let log = store.objects().join("two/default/on-s3/local/log");
    let epoch = || Ok(CheckpointLog::read(&log)?.last_epoch() >= 1);
    let mut older = job.start()?;
    older.until("it had a checkpoint", PATIENCE, epoch)?;
    older.signal(Signal::SIGSTOP)?;
    let newer = job.start()?;
    newer.wait(PATIENCE)?.ok("finished")?;
    older.signal(Signal::SIGCONT)?;
    older.wait(PATIENCE)?.refused(FENCED, &["fenced", "has taken the job over"])
}
