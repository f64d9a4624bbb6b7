//! Bad input: each mistake ends with its own exit code and a message that says what, where and what to do; nothing panics,
//! nothing is lost. Needs no server; see `bad_input_servers.rs` for what does.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use floodmark_testkit::scratch;
use floodmark_tests::{
    chaos::finish,
    events::NEXMARK_COLUMNS,
    job::{Ended, Job, PATIENCE, lines_of, run_with},
};

const BAD_INPUT: i32 = 2;
const JOB_FAILED: i32 = 1;
const FENCED: i32 = 3;
const STORAGE: i32 = 4;

const BID: &str = "CREATE TABLE bid (auction BIGINT, price BIGINT, at TIMESTAMP(3),
  WATERMARK FOR at AS at - INTERVAL '1' SECOND
) WITH ('connector' = 'files', 'path' = 'bids', 'format' = 'json');
CREATE TABLE nothing (auction BIGINT, price BIGINT) WITH ('connector' = 'blackhole');
";

/// Runs a manifest as it stands, with storage of its own.
fn run_manifest(manifest: &str) -> Result<Ended> {
    let folder = scratch::folder("job-")?;
    fs::write(folder.path().join("job.yaml"), manifest)?;
    fs::create_dir(folder.path().join("bids"))?;
    fs::write(folder.path().join("bids/1.ndjson"), "{\"auction\":1,\"price\":2,\"at\":\"2026-01-01 00:00:00\"}\n")?;
    run_with(folder.path(), &["run", "job.yaml", "--output", "json"])
}

fn run_sql(sql: &str) -> Result<Ended> {
    let folder = Path::new("/unused");
    run_manifest(&Job::new(folder, "job", sql).manifest())
}

/// Checks what is said about SQL that follows [`BID`]: the mistake's line and column, which `»` marks, the message in full, and
/// the line with a mark under the place.
fn refused_sql(sql: &str, message: &str) -> Result<()> {
    let ended = run_sql(&format!("{BID}{}", sql.replace('»', "")))?;
    ended.refused(BAD_INPUT, &[&told(sql, message)?])
}

fn told(sql: &str, message: &str) -> Result<String> {
    let (before, _) = sql.split_once('»').context("no place is marked")?;
    let start = before.rfind('\n').map_or(0, |end| end + 1);
    let line = BID.lines().count() + before.matches('\n').count() + 1;
    let column = before[start..].chars().count() + 1;
    let quoted = sql[start..].lines().next().unwrap_or_default().replace('»', "");
    let margin = " ".repeat(line.to_string().len());
    Ok(format!(
        "error: job.yaml: spec.sql: line {line}, column {column}: {message}\n  {line} | {quoted}\n  {margin} | {:>column$}\n",
        '^'
    ))
}

/// Checks that SQL which follows [`BID`] runs, and inserts a row.
fn accepted_sql(sql: &str) -> Result<()> {
    let ended = run_sql(&format!("{BID}{sql}"))?;
    assert_eq!(ended.ok("finished")?.rows_out.get("nothing"), Some(&1));
    Ok(())
}

#[test]
fn the_sql_of_these_tests_is_right_but_for_the_mistakes() -> Result<()> {
    accepted_sql("INSERT INTO nothing SELECT auction, price FROM bid;")
}

#[test]
fn an_unknown_field_is_named_with_its_path_and_its_likely_name() -> Result<()> {
    let manifest = Job::new(Path::new("/unused"), "job", "INSERT INTO a SELECT 1").manifest();
    let misspelt = manifest.replace("parallelism:", "paralellism:");
    run_manifest(&misspelt)?
        .refused(BAD_INPUT, &["job.yaml:6: spec.paralellism: unknown field, did you mean 'parallelism'?"])?;
    let misspelt = manifest.replace("interval:", "intervall:");
    run_manifest(&misspelt)?
        .refused(BAD_INPUT, &["job.yaml:8: spec.checkpoints.intervall: unknown field, did you mean 'interval'?"])
}

#[test]
fn a_manifest_that_is_missing_or_no_yaml_is_refused() -> Result<()> {
    let folder = scratch::folder("job-")?;
    run_with(folder.path(), &["run", "nowhere.yaml"])?.refused(BAD_INPUT, &["nowhere.yaml", "No such file"])?;
    run_manifest("spec: [")?.refused(BAD_INPUT, &["job.yaml:2: is not valid YAML"])?;
    run_manifest("apiVersion: v1\nkind: Pod\n")?
        .refused(BAD_INPUT, &["job.yaml: kind: 'Pod' is not known here; it must be 'StreamJob'"])
}

#[test]
fn a_syntax_error_is_shown_with_its_line_and_column_and_the_line_itself() -> Result<()> {
    refused_sql(
        "INSERT INTO nothing SELECT auction, price FROM» ;",
        "syntax error: expected identifier, found the end of the statement",
    )?;
    refused_sql(
        "INSERT INTO nothing\n  SELECT auction, price FORM »bid;",
        "syntax error: expected ; or the end, found bid",
    )?;
    refused_sql("CREATE TABLE x (a BIGINT) WITH ('connector' = »);", "syntax error: expected literal string, found )")
}

#[test]
fn an_unknown_table_is_shown_with_the_nearest_name() -> Result<()> {
    refused_sql("INSERT INTO nothing SELECT auction, price FROM »bidd;", "unknown table 'bidd'; did you mean 'bid'?")?;
    refused_sql(
        "INSERT INTO »nothin SELECT auction, price FROM bid;",
        "unknown table 'nothin'; did you mean 'nothing'?",
    )
}

#[test]
fn an_unknown_column_is_shown_with_the_nearest_name() -> Result<()> {
    refused_sql(
        "INSERT INTO nothing SELECT auction, »prise FROM bid;",
        "unknown column 'prise'; did you mean 'price'?",
    )?;
    refused_sql(
        "INSERT INTO nothing SELECT auction, price FROM bid WHERE »bid.auctoin = 1;",
        "unknown column 'auctoin' in 'bid'; did you mean 'auction'?",
    )
}

#[test]
fn an_unknown_function_is_shown_with_the_nearest_name() -> Result<()> {
    refused_sql(
        "INSERT INTO nothing SELECT auction, »rouund(price) FROM bid;",
        "unknown function 'rouund'; did you mean 'round'?",
    )?;
    // Nothing is near this one.
    refused_sql("INSERT INTO nothing SELECT auction, »absolute(price) FROM bid;", "unknown function 'absolute'")?;
    // 'row' is like this one too, but further off.
    refused_sql(
        "INSERT INTO nothing SELECT auction, »rownd(price) FROM bid;",
        "unknown function 'rownd'; did you mean 'round'?",
    )
}

#[test]
fn what_is_not_supported_is_refused_by_name_and_place() -> Result<()> {
    refused_sql(
        "INSERT INTO nothing SELECT auction, price FROM bid\nORDER BY »price;",
        "ORDER BY is not supported; a stream has no end to sort by",
    )?;
    refused_sql(
        "INSERT INTO nothing SELECT auction, price FROM bid\nLIMIT »5;",
        "LIMIT or OFFSET is not supported; a stream has no first rows",
    )?;
    refused_sql(
        "INSERT INTO nothing SELECT a.auction, b.price FROM bid a\n  JOIN »bid b ON a.auction = b.auction;",
        "a JOIN of streams that are not joined on their windows is not supported; join two windowed queries on the equality \
         of their window_start and window_end",
    )?;
    refused_sql(
        "INSERT INTO nothing SELECT auction, »now() FROM bid;",
        "NOW gives another value each time it is called; after a crash the job would compute other rows than before; use a \
         column of the data",
    )
}

#[test]
fn a_column_may_be_selected_twice_but_declared_only_once() -> Result<()> {
    accepted_sql("INSERT INTO nothing SELECT auction, auction FROM bid;")?;
    accepted_sql("CREATE VIEW v AS SELECT price AS p, price AS q FROM bid;\nINSERT INTO nothing SELECT q, p FROM v;")?;
    refused_sql(
        "»CREATE TABLE x (a BIGINT, a INT) WITH ('connector' = 'datagen', 'rows' = '10');
INSERT INTO nothing SELECT a, a FROM x;",
        "table 'x' has two columns 'a'",
    )?;
    refused_sql(
        "INSERT INTO nothing (auction, »auction) SELECT auction, price FROM bid;",
        "column 'auction' is named twice",
    )
}

#[test]
fn a_query_that_does_not_fit_its_table_is_refused() -> Result<()> {
    refused_sql(
        "»INSERT INTO nothing SELECT auction FROM bid;",
        "the query has 1 column, table 'nothing' takes 2 (auction, price)",
    )?;
    refused_sql(
        "»INSERT INTO nothing SELECT auction, 'x' FROM bid;",
        "column 'price' of table 'nothing' is BIGINT, the query gives STRING; write CAST(… AS BIGINT)",
    )
}

#[test]
fn an_unknown_connector_or_option_is_shown_with_the_nearest_name() -> Result<()> {
    refused_sql(
        "CREATE TABLE x (a BIGINT) WITH (»'connector' = 'nexmrk');\nINSERT INTO nothing SELECT a, a FROM x;",
        "unknown connector 'nexmrk'; did you mean 'nexmark'?",
    )?;
    refused_sql(
        "CREATE TABLE x (a BIGINT) WITH ('connector' = 'files', »'paht' = 'y');\nINSERT INTO nothing SELECT a, a FROM x;",
        "table 'x': unknown option 'paht'; did you mean 'path'?",
    )
}

#[test]
fn a_changelog_into_an_append_only_sink_is_refused() -> Result<()> {
    let ended = run_sql(&format!(
        "{BID}CREATE TABLE out (auction BIGINT, n BIGINT) WITH ('connector' = 'files', 'path' = 'out');
INSERT INTO out SELECT auction, count(*) FROM bid GROUP BY auction;"
    ))?;
    let message = "insertions only, and the query updates rows it has written; use connector 'upsert-kafka', or a windowed \
                   aggregate";
    ended.refused(BAD_INPUT, &["job.yaml: spec.sql: line 6, column 1: table 'out': ", message])
}

#[test]
fn a_folder_to_read_that_is_not_there_is_refused() -> Result<()> {
    let ended = run_sql(&format!(
        "{BID}CREATE TABLE x (a BIGINT) WITH ('connector' = 'files', 'path' = '/nowhere/at/all');
INSERT INTO nothing SELECT a, a FROM x;"
    ))?;
    ended.refused(BAD_INPUT, &["source:x: there is no file or folder /nowhere/at/all; check option 'path'"])
}

/// Six records, two of them malformed.
fn job_with_bad_records(folder: &Path, policy: &str) -> Result<Job> {
    fs::create_dir(folder.join("in"))?;
    let records = "{\"a\":1}\n{\"a\":\"x\"}\n{\"a\":3}\n{\"a\":4}\nnonsense\n{\"a\":6}\n";
    fs::write(folder.join("in/records.ndjson"), records)?;
    let sql = format!(
        "CREATE TABLE x (a BIGINT) WITH ('connector' = 'files', 'path' = '{0}/in', 'format' = 'json'{policy});
CREATE TABLE y (a BIGINT) WITH ('connector' = 'files', 'path' = '{0}/out', 'format' = 'json');
INSERT INTO y SELECT a FROM x;",
        folder.display()
    );
    Ok(Job::new(folder, "bad-records", sql))
}

#[test]
fn a_malformed_record_fails_the_job_and_is_shown_with_its_place() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let job = job_with_bad_records(folder.path(), "")?;
    job.run()?.refused(
        JOB_FAILED,
        &[
            "source:x: malformed record at records.ndjson@8: ",
            "(record: {\"a\":\"x\"}); set 'bad-records' to 'skip' or 'dead-letter' to go on",
        ],
    )?;
    // Nothing is lost: once the record is mended, the job goes on and all rows are there.
    let mended = "{\"a\":1}\n{\"a\":222}\n{\"a\":3}\n{\"a\":4}\n{\"a\":55}\n{\"a\":6}\n";
    fs::write(folder.path().join("in/records.ndjson"), mended)?;
    finish(&job)?;
    assert_eq!(lines_of(&folder.path().join("out"))?.len(), 6);
    Ok(())
}

#[test]
fn malformed_records_are_skipped_and_counted_if_the_table_says_so() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let ended = finish(&job_with_bad_records(folder.path(), ", 'bad-records' = 'skip'")?)?;
    assert_eq!(ended.ok("finished")?.bad, 2);
    assert_eq!(lines_of(&folder.path().join("out"))?, ["{\"a\":1}", "{\"a\":3}", "{\"a\":4}", "{\"a\":6}"]);
    Ok(())
}

#[test]
fn malformed_records_are_kept_aside_and_counted_if_the_table_says_so() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let letters = folder.path().join("letters");
    let policy = format!(", 'bad-records' = 'dead-letter', 'bad-records.path' = '{}'", letters.display());
    let ended = finish(&job_with_bad_records(folder.path(), &policy)?)?;
    assert_eq!(ended.ok("finished")?.bad, 2);
    assert_eq!(lines_of(&folder.path().join("out"))?.len(), 4);
    let letters = lines_of(&letters)?.join("\n");
    ensure!(letters.lines().count() == 2, "{letters}");
    for word in ["records.ndjson", "nonsense", "{\\\"a\\\":\\\"x\\\"}", "\"reason\""] {
        ensure!(letters.contains(word), "no {word} in {letters}");
    }
    Ok(())
}

#[test]
fn storage_that_cannot_be_written_is_refused() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let mut job = small_job(folder.path(), "job");
    fs::write(folder.path().join("file"), "")?;
    let inside_a_file = folder.path().join("file/storage").display().to_string();
    for location in [inside_a_file.as_str(), "/proc/floodmark"] {
        job.storage = location.to_owned();
        job.run()?.refused(STORAGE, &[location])?;
    }
    job.storage = "gs://bucket/folder".to_owned();
    job.run()?.refused(STORAGE, &["gs://bucket/folder", "unknown scheme 'gs'; use s3://"])
}

/// A job with windowed state that runs for a few seconds.
fn small_job(folder: &Path, name: &str) -> Job {
    let sql = format!(
        "CREATE TABLE nexmark ({NEXMARK_COLUMNS}) WITH ('connector' = 'nexmark', 'events' = '90000', 'rate' = '30000', 'event-rate' = '1000');
CREATE TABLE busy (window_end TIMESTAMP(3), auction BIGINT, bids BIGINT)
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json');
INSERT INTO busy SELECT window_end, bid.auction, count(*)
  FROM TABLE(TUMBLE(TABLE nexmark, DESCRIPTOR(`dateTime`), INTERVAL '10' SECOND))
  WHERE event_type = 2 GROUP BY window_start, window_end, bid.auction;",
        folder.join("busy").display()
    );
    let mut job = Job::new(folder, name, sql);
    job.interval = "200ms".to_owned();
    job
}

/// Runs a job until it has a few checkpoints, and kills it.
fn with_checkpoints(job: &Job) -> Result<()> {
    let mut run = job.start()?;
    run.until("it had checkpoints", PATIENCE, || Ok(job.log()?.last_epoch() >= 3))?;
    run.kill()?;
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let (from, to) = (entry.as_ref().map(|e| e.path()), entry.as_ref().map(|e| to.join(e.file_name())));
        let (Ok(from), Ok(to)) = (from, to) else { continue };
        if from.is_dir() {
            copy_folder(&from, &to)?;
        } else {
            fs::copy(from, to)?;
        }
    }
    Ok(())
}

#[test]
fn a_checkpoint_of_another_job_is_refused() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let job = small_job(folder.path(), "first");
    with_checkpoints(&job)?;
    let other = small_job(folder.path(), "second");
    copy_folder(&job.checkpoint_folder(), &other.checkpoint_folder())?;
    other.run()?.refused(STORAGE, &["default/first/local", "not to default/second/local"])
}

#[test]
fn a_checkpoint_of_the_same_name_but_other_sql_is_refused_unless_state_may_be_dropped() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let job = small_job(folder.path(), "job");
    with_checkpoints(&job)?;
    let mut other = small_job(folder.path(), "job");
    let path = folder.path().join("bids").display().to_string();
    other.sql = other.sql[..other.sql.find("CREATE TABLE busy").unwrap_or(0)].to_owned()
        + &format!(
            "CREATE TABLE bids (auction BIGINT) WITH ('connector' = 'files', 'path' = '{path}', 'format' = 'json');
INSERT INTO bids SELECT bid.auction FROM nexmark WHERE event_type = 2;"
        );
    other.run()?.refused(STORAGE, &["busy/", "allowDroppedState"])?;
    // The checkpoint is still there for the job that it belongs to.
    let ended = finish(&job)?;
    ensure!(ended.ok("finished")?.restored_from >= Some(3), "{ended}");
    Ok(())
}

#[test]
fn of_two_processes_on_the_same_storage_the_older_is_fenced_and_says_so() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let job = small_job(folder.path(), "job");
    let mut older = job.start()?;
    older.until("it had a checkpoint", PATIENCE, || Ok(job.log()?.last_epoch() >= 1))?;
    let newer = job.start()?;
    older.wait(PATIENCE)?.refused(FENCED, &["fenced", "has taken the job over"])?;
    newer.wait(PATIENCE)?.ok("finished")?;
    Ok(())
}

#[test]
fn checking_a_job_says_the_same_without_running_it() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let sql = format!("{BID}INSERT INTO nothing SELECT auction, prise FROM bid;");
    fs::write(folder.path().join("job.yaml"), Job::new(folder.path(), "job", sql).manifest())?;
    let start = Instant::now();
    let message =
        told("INSERT INTO nothing SELECT auction, »prise FROM bid;", "unknown column 'prise'; did you mean 'price'?")?;
    run_with(folder.path(), &["check", "job.yaml"])?.refused(BAD_INPUT, &[&message])?;
    ensure!(start.elapsed() < Duration::from_secs(10));
    ensure!(!folder.path().join("floodmark-data").exists(), "checking wrote something");
    Ok(())
}
