//! What docs/state.md tells users, done: savepoints with and without a stop, restores elsewhere and of other shapes, plans,
//! queries, deletions, and what each refuses. Needs no server.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use floodmark_connectors::nexmark::{Event, Generator};
use floodmark_testkit::scratch;
use floodmark_tests::{
    chaos::finish,
    compare::{Column, Row, multiset, row_of_json},
    events::NEXMARK_COLUMNS,
    job::{CheckpointLog, Job, PATIENCE, Run, lines_of},
    oracle::bids_per_auction,
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Events at 20 000 a second: a job that nobody ends runs for 15 seconds, more than any test needs it.
const EVENTS: u64 = 300_000;
const RATE: &str = ", 'rate' = '20000'";
const WINDOW_MS: i64 = 10_000;
const COLUMNS: [Column; 4] =
    [Column::Time("window_end"), Column::Plain("auction"), Column::Plain("bids"), Column::Plain("highest")];
/// The job's query: what the walk-through changes.
const QUERY: &str = "SELECT window_end, auction, count(*), max(price)
  FROM TABLE(TUMBLE(TABLE bid, DESCRIPTOR(`dateTime`), INTERVAL '10' SECOND)) GROUP BY window_start, window_end, auction";

fn sql(folder: &Path, rate: &str, query: &str) -> String {
    format!(
        "CREATE TABLE nexmark ({NEXMARK_COLUMNS}) WITH ('connector' = 'nexmark', 'events' = '{EVENTS}', 'event-rate' = '1000'{rate});
CREATE VIEW bid AS SELECT bid.auction, bid.bidder, bid.price, `dateTime` FROM nexmark WHERE event_type = 2;
CREATE TABLE busy (window_end TIMESTAMP(3), auction BIGINT, bids BIGINT, highest BIGINT)
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json');
INSERT INTO busy {query};",
        folder.join("busy").display()
    )
}

/// A job that lasts, with a control socket of its own folder.
fn job(folder: &Path, name: &str) -> Result<Job> {
    let mut job = Job::new(folder, name, sql(folder, RATE, QUERY));
    job.interval = "300ms".to_owned();
    let sockets = folder.join("run");
    fs::create_dir_all(&sockets)?;
    job.env.insert("XDG_RUNTIME_DIR".to_owned(), sockets.display().to_string());
    Ok(job)
}

/// Another job over the same storage, that goes as fast as it can.
fn other(folder: &Path, name: &str, restore: &str) -> Result<Job> {
    let mut job = job(folder, name)?;
    job.sql = sql(folder, "", QUERY);
    job.restore = Some(restore.to_owned());
    Ok(job)
}

fn generator() -> Generator {
    Generator { events_per_second: 1_000, ..Generator::default() }
}

fn rows(lines: &[String]) -> Result<Vec<Row>> {
    lines.iter().map(|line| row_of_json(line.as_bytes(), &COLUMNS)).collect()
}

/// Compares all that jobs have written with an independent count.
fn check_all(folder: &Path) -> Result<()> {
    let written = rows(&lines_of(&folder.join("busy"))?)?;
    multiset(bids_per_auction(generator(), EVENTS, WINDOW_MS)?, written)?;
    Ok(())
}

/// Waits until a job has completed so many checkpoints.
fn until_checkpoints(job: &Job, run: &mut Run, count: u64) -> Result<()> {
    run.until(&format!("{count} checkpoints"), PATIENCE, || Ok(job.log()?.last_epoch() >= count))
}

fn manifest(savepoint: &str) -> Result<Value> {
    let text = fs::read_to_string(Path::new(savepoint).join("_manifest.json"))?;
    let file: Value = serde_json::from_str(&text)?;
    Ok(file["savepoint"]["manifest"].clone())
}

#[test]
fn a_savepoint_without_a_stop_holds_exactly_what_had_been_processed() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let first = job(folder.path(), "first")?;
    let mut run = first.start()?;
    until_checkpoints(&first, &mut run, 2)?;
    let location = first.command(&["savepoint", "JOB", "before", "--storage", "STORAGE"])?.said()?.to_owned();
    assert_eq!(Path::new(&location), first.checkpoint_folder().join("savepoints/before"));
    let again = first.command(&["savepoint", "JOB", "before", "--storage", "STORAGE"])?;
    again.refused(1, &["there is a savepoint 'before' already", "choose another name"])?;
    let epoch = manifest(&location)?["epoch"].as_u64().context("no epoch")?;
    // It goes on, past the savepoint, and dies.
    until_checkpoints(&first, &mut run, epoch + 2)?;
    run.kill()?;
    // Output that the job committed behind the savepoint is not the savepoint's.
    let later = |path: &Path| {
        let name = path.file_stem().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        name.rsplit('-').next().and_then(|e| e.parse::<u64>().ok()).is_some_and(|e| e > epoch)
    };
    let mut removed = 0;
    for file in fs::read_dir(folder.path().join("busy"))? {
        let path = file?.path();
        if later(&path) {
            fs::remove_file(path)?;
            removed += 1;
        }
    }
    ensure!(removed > 0, "the job wrote nothing behind the savepoint: it proves little");
    // Moved elsewhere, under another job's name and at another parallelism, with all that it came from gone.
    let moved = folder.path().join("moved/savepoint");
    fs::create_dir_all(moved.parent().context("no parent")?)?;
    fs::rename(&location, &moved)?;
    fs::remove_dir_all(first.checkpoint_folder())?;
    let mut second = other(folder.path(), "second", &moved.display().to_string())?;
    second.parallelism = 3;
    finish(&second)?;
    check_all(folder.path())
}

#[test]
fn a_savepoint_is_taken_although_its_asker_no_longer_waits() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let first = job(folder.path(), "first")?;
    let mut run = first.start()?;
    until_checkpoints(&first, &mut run, 1)?;
    // While the job's process stands still, the savepoint can't be taken.
    run.signal(Signal::SIGSTOP)?;
    let mut asked = first.start_command(&["savepoint", "JOB", "slow", "--storage", "STORAGE"])?;
    sleep(Duration::from_millis(1_500));
    ensure!(asked.is_running()?, "it does not wait: {}", asked.log());
    asked.signal(Signal::SIGINT)?;
    asked.wait(PATIENCE)?.refused(130, &["no longer waiting", "goes on taking savepoint slow"])?;
    run.signal(Signal::SIGCONT)?;
    let manifest = first.checkpoint_folder().join("savepoints/slow/_manifest.json");
    run.until("the savepoint was complete", PATIENCE, || Ok(manifest.exists()))?;
    run.signal(Signal::SIGTERM)?;
    run.wait(PATIENCE)?.ok("stopped")?;
    Ok(())
}

#[test]
fn a_job_stopped_with_a_savepoint_goes_on_elsewhere_without_a_gap() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let first = job(folder.path(), "first")?;
    let mut run = first.start()?;
    until_checkpoints(&first, &mut run, 2)?;
    let location = first.command(&["savepoint", "JOB", "--stop", "--storage", "STORAGE"])?.said()?.to_owned();
    run.wait(PATIENCE)?.ok("stopped")?;
    let gone = first.command(&["savepoint", "JOB", "late", "--storage", "STORAGE"])?;
    gone.refused(1, &["no process of yours", "default/first/local", "floodmark run", "floodmark checkpoints list"])?;
    let mut second = other(folder.path(), "second", &location)?;
    second.parallelism = 4;
    second.sql = sql(folder.path(), RATE, QUERY);
    // Started again with the same words, it goes on from where it was.
    let mut run = second.start()?;
    until_checkpoints(&second, &mut run, manifest(&location)?["epoch"].as_u64().context("no epoch")? + 3)?;
    run.kill()?;
    second.sql = sql(folder.path(), "", QUERY);
    let ended = finish(&second)?;
    ensure!(ended.log.contains("goes on from where it is"), "it went back to the savepoint: {ended}");
    check_all(folder.path())
}

#[test]
fn a_drained_job_has_fired_every_window_of_what_it_read() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let first = job(folder.path(), "first")?;
    let mut run = first.start()?;
    until_checkpoints(&first, &mut run, 2)?;
    let location = first.command(&["savepoint", "JOB", "end", "--drain", "--storage", "STORAGE"])?.said()?.to_owned();
    run.wait(PATIENCE)?.ok("stopped")?;
    // Stripe by stripe, events up to the savepoint's positions; counted without the engine.
    let manifest = manifest(&location)?;
    let splits = manifest["operators"]["source:nexmark"]["splits"].as_array().context("no splits")?;
    let stripes = splits.len() as u64;
    let generator = generator();
    let mut windows: HashMap<(i64, i64), (u64, i64)> = HashMap::new();
    for split in splits {
        let next = split["position"]["next"].as_u64().context("no position")?;
        for n in (next % stripes..next).step_by(stripes as usize).filter(|n| generator.kind(*n) == Event::Bid) {
            let field = |name: &str| generator.integer(n, name).context("a bid without a field");
            let end = (generator.time_ms(n) / WINDOW_MS + 1) * WINDOW_MS;
            let window = windows.entry((end, field("auction")?)).or_insert((0, i64::MIN));
            *window = (window.0 + 1, window.1.max(field("price")?));
        }
    }
    ensure!(windows.len() > 100, "only {} windows: too few to prove anything", windows.len());
    let expected = windows.into_iter().map(|((end, auction), (bids, highest))| {
        vec![end.to_string(), auction.to_string(), bids.to_string(), highest.to_string()]
    });
    multiset(expected, rows(&lines_of(&folder.path().join("busy"))?)?)?;
    Ok(())
}

/// A job that was stopped, with a savepoint `base`; answers with the savepoint's location as well.
fn stopped(folder: &Path) -> Result<(Job, String)> {
    let first = job(folder, "first")?;
    let mut run = first.start()?;
    until_checkpoints(&first, &mut run, 3)?;
    let location = first.command(&["savepoint", "JOB", "base", "--stop", "--storage", "STORAGE"])?.said()?.to_owned();
    run.wait(PATIENCE)?.ok("stopped")?;
    Ok((first, location))
}

#[test]
fn a_restore_names_a_checkpoint_by_number_or_location_or_says_what_there_is() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let (mut first, _) = stopped(folder.path())?;
    let log = first.log()?;
    let (entry, newest) = log.completed().next_back().context("no checkpoint")?;
    let epoch = newest["epoch"].as_u64().context("no epoch")?;
    let entry = entry.display().to_string();
    let plan = |job: &Job, from: &str| job.command(&["plan", "JOB", "--storage", "STORAGE", "--from", from]);
    for (from, words) in [
        ("999999", &["no checkpoint 999999; there is: "][..]),
        ("nowhere", &["no savepoint 'nowhere'; there is: base"]),
        ("/nowhere/at/all", &["there is no folder /nowhere/at/all"]),
    ] {
        plan(&first, from)?.refused(4, words)?;
        first.restore = Some(from.to_owned());
        first.start()?.wait(PATIENCE)?.refused(4, words)?;
    }
    plan(&first, "no name!")?.refused(2, &["'no name!' names no snapshot"])?;
    plan(&first, &folder.path().display().to_string())?.refused(4, &["there is no snapshot at", "_manifest.json"])?;
    for from in [epoch.to_string(), entry.clone(), "base".to_owned(), "latest".to_owned()] {
        let planned = plan(&first, &from)?;
        let said = planned.said()?;
        ensure!(said.contains("it can be restored as it stands"), "{from}: {said}");
    }
    first.restore = Some(epoch.to_string());
    first.sql = sql(folder.path(), RATE, QUERY);
    let mut run = first.start()?;
    until_checkpoints(&first, &mut run, epoch + 1)?;
    // Retention removes the entry with the checkpoint that it names.
    ensure!(first.log()?.entries.iter().any(|(_, e)| e["event"]["type"] == "restored" && e["event"]["epoch"] == epoch));
    until_checkpoints(&first, &mut run, epoch + 2)?;
    run.kill()?;
    // The rest under another name, from the location of a checkpoint.
    let newest = first.log()?;
    let (entry, _) = newest.completed().next_back().context("no checkpoint")?;
    let second = other(folder.path(), "second", &entry.display().to_string())?;
    finish(&second)?;
    check_all(folder.path())
}

#[test]
fn what_a_killed_job_has_made_visible_is_not_written_again_by_the_one_that_takes_over() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let first = job(folder.path(), "first")?;
    let run = first.start_with(Some("after-transaction:+2"))?;
    let ended = run.wait(PATIENCE)?;
    ensure!(ended.signal == Some(Signal::SIGKILL as i32), "the job did not die: {:?}", ended.signal);
    let log = first.log()?;
    ensure!(log.last_committed() < log.last_epoch(), "its log knows of all output: the test proves nothing");
    let written = lines_of(&folder.path().join("busy"))?.len();
    let second = other(folder.path(), "second", &first.checkpoint_folder().display().to_string())?;
    finish(&second)?;
    ensure!(lines_of(&folder.path().join("busy"))?.len() > written);
    check_all(folder.path())
}

#[test]
fn sql_that_fits_no_more_is_refused_while_the_old_job_still_runs() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let first = job(folder.path(), "first")?;
    let mut run = first.start()?;
    until_checkpoints(&first, &mut run, 2)?;
    let by_bidder = QUERY.replace("auction", "bidder");
    let mut changed = job(folder.path(), "first")?;
    changed.sql = sql(folder.path(), RATE, &by_bidder);
    let words = ["busy/window-aggregate-1", "its key was (auction Int64) and is now (bidder Int64)", "--restore none"];
    // From a folder of its own: the manifest and the logs of the job that runs stay as they are.
    let elsewhere = folder.path().join("changed");
    fs::create_dir_all(&elsewhere)?;
    fs::write(elsewhere.join("changed.yaml"), changed.manifest())?;
    let path = elsewhere.join("changed.yaml").display().to_string();
    changed.command(&["plan", &path, "--storage", "STORAGE"])?.refused(4, &words)?;
    changed.command(&["run", &path, "--storage", "STORAGE"])?.refused(4, &words)?;
    let now = first.log()?.last_epoch();
    until_checkpoints(&first, &mut run, now + 2)?;
    run.kill()?;
    // As it was, it runs to its end.
    let mut first = first;
    first.sql = sql(folder.path(), "", QUERY);
    finish(&first)?;
    check_all(folder.path())
}

#[test]
fn an_added_aggregate_begins_empty_and_state_is_dropped_only_with_leave() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let (first, location) = stopped(folder.path())?;
    // One more aggregate over the same keys.
    let lowest =
        "CREATE TABLE lowest (window_end TIMESTAMP(3), auction BIGINT, bids BIGINT, highest BIGINT, lowest BIGINT)";
    let added = |folder: &Path| {
        sql(folder, "", QUERY)
            .replace(
                "CREATE TABLE busy (window_end TIMESTAMP(3), auction BIGINT, bids BIGINT, highest BIGINT)",
                &lowest.replace("lowest (", "busy ("),
            )
            .replace("count(*), max(price)", "count(*), max(price), min(price)")
    };
    let mut second = other(folder.path(), "second", &location)?;
    second.sql = added(folder.path());
    let plan = second.command(&["plan", "JOB", "--storage", "STORAGE", "--from", &location, "--output", "json"])?;
    let plan: Value = serde_json::from_str(plan.said()?)?;
    let aggregate = plan["operators"].as_array().context("no operators")?.iter().find(|o| o["fate"] == "changed");
    let aggregate = aggregate.with_context(|| format!("nothing has changed: {plan}"))?;
    assert_eq!((aggregate["added"].as_array().map(Vec::len), &aggregate["lost"]), (Some(1), &serde_json::json!([])));
    finish(&second)?;
    check_all(folder.path())?;

    // Without the aggregate its state has no taker.
    let mut third = other(folder.path(), "third", &location)?;
    third.sql = sql(folder.path(), "", "SELECT `dateTime`, auction, price, price FROM bid WHERE price < 0");
    let words = ["busy/window-aggregate-1", "spec.restore.allowDroppedState: true"];
    third.command(&["plan", "JOB", "--storage", "STORAGE", "--from", &location])?.refused(4, &words)?;
    third.start()?.wait(PATIENCE)?.refused(4, &words)?;
    third.spec = "  restore:\n    allowDroppedState: true\n".to_owned();
    third.command(&["plan", "JOB", "--storage", "STORAGE", "--from", &location])?.said()?;
    finish(&third)?;
    drop(first);
    Ok(())
}

/// The number of splits, and of the bids that had been read.
fn bids_read(manifest: &Value) -> Result<(usize, u64)> {
    let generator = generator();
    let splits = manifest["operators"]["source:nexmark"]["splits"].as_array().context("no splits")?;
    let stripes = splits.len() as u64;
    let next: BTreeMap<u64, u64> =
        splits.iter().filter_map(|s| s["position"]["next"].as_u64()).map(|next| (next % stripes, next)).collect();
    let read = (0..EVENTS).filter(|n| *n < next[&(n % stripes)] && generator.kind(*n) == Event::Bid).count() as u64;
    Ok((splits.len(), read))
}

/// What `state tables` says of a table, and the name of its column that counts.
fn count_column(job: &Job, location: &str, table: &str) -> Result<(String, String)> {
    let tables = job.command(&["state", "tables", location])?;
    let of = tables.said()?.lines().find(|l| l.starts_with(table)).context("no table of the aggregate")?.to_owned();
    let column = of.split('"').find(|w| w.contains("count")).context("no column of the count")?.to_owned();
    Ok((of, column))
}

#[test]
fn a_job_whose_parallelism_has_changed_is_looked_into_and_saved_like_any_other() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let mut first = job(folder.path(), "first")?;
    // No window: rows stay, and checkpoints go on from files that were there before the rescale.
    first.sql +=
        "\nCREATE TABLE totals (auction BIGINT, bids BIGINT, highest BIGINT, PRIMARY KEY (auction) NOT ENFORCED)
  WITH ('connector' = 'blackhole');
INSERT INTO totals SELECT auction, count(*), max(price) FROM bid GROUP BY auction;";
    let table = r#""totals/group-aggregate-1""#;
    let mut run = first.start()?;
    until_checkpoints(&first, &mut run, 4)?;
    let parts_of = |manifest: &Value| -> usize {
        let shards = manifest["operators"][table.trim_matches('"')]["shards"].as_array();
        shards.into_iter().flatten().filter(|s| s["cutFrom"].is_object()).count()
    };
    // All bids that were read, each row once.
    let check = |location: &str, manifest: &Value| -> Result<()> {
        let (_, column) = count_column(&first, location, table)?;
        let sql = format!(
            r#"SELECT sum("{column}") AS bids, count(*) AS n, count(DISTINCT auction) AS auctions,
                 count(DISTINCT "$subtask") AS subtasks FROM {table}"#
        );
        let answer = first.command(&["state", "query", location, &sql, "--output", "json"])?;
        let answer: Value = serde_json::from_str(answer.said()?)?;
        let number = |name: &str| answer[0][name].as_u64().with_context(|| format!("no {name}: {answer}"));
        assert_eq!(number("bids")?, bids_read(manifest)?.1, "{answer}");
        assert_eq!((number("n")?, number("subtasks")?), (number("auctions")?, 3), "{answer}");
        ensure!(number("n")? > 1_000, "only {answer}: too few to prove anything");
        Ok(())
    };
    first.command(&["rescale", "JOB", "3", "--storage", "STORAGE"])?.said()?;
    let cut = |log: &CheckpointLog| log.completed().next_back().is_some_and(|(_, m)| parts_of(m) > 0);
    run.until("a checkpoint that names parts of files", PATIENCE, || Ok(cut(&first.log()?)))?;
    run.kill()?;
    let log = first.log()?;
    let (entry, newest) = log.completed().next_back().context("no checkpoint")?;
    assert_eq!((&newest["format"], parts_of(newest) > 0), (&2.into(), true), "{newest}");
    check(&entry.display().to_string(), newest)?;
    let verified = first.command(&["checkpoints", "verify", "JOB", "--storage", "STORAGE"])?;
    ensure!(verified.said()?.lines().all(|line| line.ends_with("intact")), "{verified}");

    // It goes on from there; its savepoint is of whole files, all its own.
    let mut run = first.start()?;
    let epoch = newest["epoch"].as_u64().context("no epoch")?;
    until_checkpoints(&first, &mut run, epoch + 2)?;
    let location = first.command(&["savepoint", "JOB", "base", "--stop", "--storage", "STORAGE"])?.said()?.to_owned();
    run.wait(PATIENCE)?.ok("stopped")?;
    let saved = manifest(&location)?;
    assert_eq!((&saved["format"], parts_of(&saved)), (&1.into(), 0), "{saved}");
    fs::remove_dir_all(first.checkpoint_folder().join("blobs"))?;
    check(&location, &saved)?;
    let mut second = other(folder.path(), "second", &location)?;
    second.sql = first.sql.replace(RATE, "");
    finish(&second)?;
    check_all(folder.path())
}

#[test]
fn a_snapshot_answers_sql() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let (first, location) = stopped(folder.path())?;
    let ask = |snapshot: &[&str], sql: &str| -> Result<Value> {
        let words: Vec<&str> =
            ["state", "query"].iter().chain(snapshot).chain(&[sql, "--output", "json"]).copied().collect();
        Ok(serde_json::from_str(first.command(&words)?.said()?)?)
    };
    // All bids that were read and are in no window yet that was written.
    let manifest = manifest(&location)?;
    let table = r#""busy/window-aggregate-1""#;
    let (tables, count_column) = count_column(&first, &location, table)?;
    ensure!(tables.contains(r#""auction" Int64"#) && tables.contains("slice_end"), "{tables}");
    let answer = ask(&[&location], &format!("SELECT sum(\"{count_column}\") AS bids FROM {table}"))?;
    let in_state = answer[0]["bids"].as_u64().with_context(|| format!("no number: {answer}"))?;
    let (splits, read) = bids_read(&manifest)?;
    let written: u64 =
        rows(&lines_of(&folder.path().join("busy"))?)?.iter().filter_map(|r| r[2].parse::<u64>().ok()).sum();
    assert_eq!(in_state, read - written);
    let sources = ask(&["base", "--job", "JOB", "--storage", "STORAGE"], "SELECT split, position FROM sources")?;
    assert_eq!(sources.as_array().map(Vec::len), Some(splits));
    let wrong = first.command(&["state", "query", &location, "SELECT * FROM elsewhere"])?;
    wrong.refused(2, &["no such table: elsewhere", table])?;
    first.command(&["state", "query", &location, "DELETE FROM sources"])?.refused(2, &["can only be read"])?;
    first.command(&["state", "query", "base", "SELECT 1"])?.refused(2, &["--job JOB.yaml"])
}

#[test]
fn only_what_nobody_needs_is_deleted() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let first = job(folder.path(), "first")?;
    let mut run = first.start()?;
    until_checkpoints(&first, &mut run, 3)?;
    let delete = |words: &[&str]| {
        let all: Vec<&str> =
            ["checkpoints", "delete", "JOB", "--storage", "STORAGE"].iter().chain(words).copied().collect();
        first.command(&all)
    };
    delete(&["--all", "--yes"])?.refused(1, &["is run by", "Stop it first"])?;
    first.command(&["savepoint", "JOB", "base", "--stop", "--storage", "STORAGE"])?.said()?;
    run.wait(PATIENCE)?.ok("stopped")?;
    let list = first.command(&["checkpoints", "list", "JOB", "--storage", "STORAGE"])?;
    let list = list.said()?.to_owned();
    let epochs: Vec<u64> = list.lines().filter_map(|l| l.split_whitespace().next()?.parse().ok()).collect();
    ensure!(epochs.len() == 3 && list.contains("savepoints/base"), "{list}");
    let oldest = epochs[0].to_string();
    delete(&["--epoch", &oldest])?.refused(2, &["to delete: checkpoint", "--yes"])?;
    delete(&["--epoch", "0", "--yes"])?.refused(4, &["no checkpoint 0; there is:"])?;
    delete(&["--epoch", &oldest, "--yes"])?.said()?;
    first.command(&["checkpoints", "verify", "JOB", "--storage", "STORAGE"])?.said()?;
    delete(&["--epoch", &epochs[1].to_string(), "--yes"])?.said()?;
    delete(&["--epoch", &epochs[2].to_string(), "--yes"])?.refused(4, &["is the last one", "--all"])?;
    first.command(&["checkpoints", "verify", "JOB", "--storage", "STORAGE"])?.said()?;
    // The savepoint outlives the history, and starts it anew.
    delete(&["--all", "--yes"])?.said()?;
    ensure!(lines_of(&first.checkpoint_folder().join("blobs"))?.is_empty(), "blobs are left");
    ensure!(first.log()?.entries.is_empty(), "log entries are left");
    let mut again = first;
    again.sql = sql(folder.path(), "", QUERY);
    again.restore = Some("base".to_owned());
    finish(&again)?;
    check_all(folder.path())?;
    again
        .command(&["checkpoints", "delete", "JOB", "--storage", "STORAGE", "--savepoint", "none-such"])?
        .refused(4, &["there is: base"])?;
    Ok(())
}

#[test]
fn a_job_without_a_socket_runs_on() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let mut first = job(folder.path(), "first")?;
    // Others may enter it, so no socket is put there.
    let sockets = folder.path().join("run/floodmark");
    fs::create_dir_all(&sockets)?;
    fs::set_permissions(&sockets, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    first.sql = sql(folder.path(), "", QUERY);
    let ended = first.start()?.wait(Duration::from_secs(120))?;
    ended.ok("finished")?;
    ensure!(ended.log.contains("can't reach this job") && ended.log.contains("mode 0700"), "{ended}");
    check_all(folder.path())
}
