//! Variables in table options: what they stand for reaches the broker, and nothing else: no error, log line, answer or byte of a
//! checkpoint.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

use std::{fs, path::Path};

use anyhow::{Result, ensure};
use floodmark_testkit::scratch;
use floodmark_tests::job::{Ended, Job};

mod servers;

use servers::kafka;

const JOB_FAILED: i32 = 1;
const BAD_INPUT: i32 = 2;
const ID: &str = "canary-client-7c1e";
const PASSWORD: &str = "canary-password-9d4b";

/// From a topic to a topic, with the client's name, its password and the brokers' address from variables.
fn job(folder: &Path, bootstrap: &str, topics: [&str; 2], options: &str) -> Job {
    let table = |name: &str, topic: &str, options: &str| {
        format!(
            "CREATE TABLE {name} (a BIGINT) WITH ('connector' = 'kafka', 'topic' = '{topic}', 'format' = 'json',
  'properties.bootstrap.servers' = '${{BROKERS}}', 'properties.client.id' = '${{CLIENT_ID}}',
  'properties.sasl.username' = 'me', 'properties.sasl.password' = '${{KAFKA_PASSWORD}}'{options});\n"
        )
    };
    let bounded = format!(", 'scan.bounded.mode' = 'latest-offset'{options}");
    let sql = table("x", topics[0], &bounded) + &table("y", topics[1], options) + "INSERT INTO y SELECT a FROM x;";
    let mut job = Job::new(folder, "copy", sql);
    job.interval = "200ms".to_owned();
    let variables = [("BROKERS", bootstrap), ("CLIENT_ID", ID), ("KAFKA_PASSWORD", PASSWORD), ("RUST_LOG", "debug")];
    job.env = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    job
}

/// Looks for the values in whatever is in a folder, and in what a process has said.
fn shows_nothing(folder: &Path, ended: &Ended) -> Result<()> {
    let said = format!("{ended}\n{}", ended.log);
    let mut files = 0;
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            files += 1;
            let bytes = fs::read(&path)?;
            for value in [ID, PASSWORD] {
                let found = bytes.windows(value.len()).any(|window| window == value.as_bytes());
                ensure!(!found, "{} shows {value}", path.display());
            }
        }
    }
    ensure!(files > 0, "there is nothing in {}", folder.display());
    ensure!(!said.contains("canary-"), "it is shown: {said}");
    Ok(())
}

#[test]
fn a_job_connects_with_what_its_variables_stand_for_and_shows_it_nowhere() -> Result<()> {
    let (broker, folder) = (kafka()?, scratch::folder("job-")?);
    broker.create_topic("secret-in", 2, &[])?;
    broker.create_topic("secret-out", 2, &[])?;
    broker.produce_values("secret-in", 0, (0..1_000).map(|n| format!("{{\"a\":{n}}}")))?;
    let mut job = job(folder.path(), &broker.bootstrap(), ["secret-in", "secret-out"], "");
    job.workers = Some(1);
    let ended = job.run()?;
    ended.ok("finished")?;
    ensure!(ended.log.contains("checkpoints in"), "there is no log to look at: {ended}");
    ensure!(broker.read_committed("secret-out")?.len() == 1_000, "rows are missing");
    ensure!(job.log()?.last_epoch() >= 1, "there is no checkpoint to look at");
    shows_nothing(folder.path(), &ended)?;
    // Another value is another way to the same topics: neither the plan nor the state changes.
    job.env.insert("KAFKA_PASSWORD".to_owned(), "canary-password-changed".to_owned());
    for words in
        [&["check", "JOB"][..], &["check", "JOB", "--online"], &["plan", "JOB", "--storage", "STORAGE", "--online"]]
    {
        let ended = job.command(words)?;
        ended.said()?;
        shows_nothing(folder.path(), &ended)?;
    }
    // Without the process that connects nobody needs to know them.
    job.env.retain(|name, _| name == "RUST_LOG");
    job.command(&["check", "JOB"])?.said()?;
    job.command(&["plan", "JOB", "--storage", "STORAGE"])?.said()?;
    Ok(())
}

#[test]
fn a_variable_that_is_not_set_is_refused_at_the_start_with_its_place() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let mut job = job(folder.path(), "127.0.0.1:1", ["a", "b"], "");
    job.env.remove("KAFKA_PASSWORD");
    let ended = job.run()?;
    let words = ["line 3, column 38", "table 'x'", "'properties.sasl.password'", "variable KAFKA_PASSWORD is not set"];
    ended.refused(BAD_INPUT, &words)?;
    shows_nothing(folder.path(), &ended)
}

#[test]
fn a_broker_that_does_not_answer_or_refuses_is_told_without_them() -> Result<()> {
    let (broker, folder) = (kafka()?, scratch::folder("job-")?);
    let (plain, nobody) = (broker.bootstrap(), "127.0.0.1:1".to_owned());
    let sasl = ", 'properties.security.protocol' = 'sasl_plaintext', 'properties.sasl.mechanism' = 'PLAIN'";
    for (bootstrap, options, expected) in [(&nobody, "", JOB_FAILED), (&plain, sasl, BAD_INPUT)] {
        let ended = job(folder.path(), bootstrap, ["a", "b"], options).run()?;
        ended.refused(expected, &["the Kafka broker at ${BROKERS}"])?;
        shows_nothing(folder.path(), &ended)?;
        ensure!(!ended.log.contains(bootstrap.as_str()), "it shows the address: {ended}");
    }
    let garbled = ", 'properties.security.protocol' = '${KAFKA_PASSWORD}'";
    let ended = job(folder.path(), &plain, ["a", "b"], garbled).run()?;
    ended.refused(BAD_INPUT, &["'properties.security.protocol'", "${KAFKA_PASSWORD}"])?;
    shows_nothing(folder.path(), &ended)
}

#[test]
fn a_variable_where_its_value_would_show_is_refused() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let job = job(folder.path(), "127.0.0.1:1", ["${KAFKA_PASSWORD}", "b"], "");
    let ended = job.run()?;
    ended.refused(BAD_INPUT, &["line 1, column 56", "option 'topic': a variable can't stand here"])?;
    shows_nothing(folder.path(), &ended)
}
