//! Damaged checkpoints: one turned bit is found, the checkpoint before is used, and the log says so. Needs no server.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use floodmark_connectors::nexmark::Generator;
use floodmark_testkit::scratch;
use floodmark_tests::{
    chaos::finish,
    compare::{Column, Difference, multiset, row_of_json},
    events::NEXMARK_COLUMNS,
    job::{Ended, Job, PATIENCE, flip_a_byte, lines_of},
    oracle::bids_per_auction,
};

const EVENTS: u64 = 150_000;
const COLUMNS: [Column; 4] =
    [Column::Time("window_end"), Column::Plain("auction"), Column::Plain("bids"), Column::Plain("highest")];

/// A job that died right after its fourth checkpoint became durable: its sinks have not committed it yet.
fn crashed_job(folder: &Path) -> Result<Job> {
    crashed_at(folder, "after-log-entry:+4", "ExactlyOnce")
}

/// `mode`, and whatever else follows it in the checkpoints' settings.
fn crashed_at(folder: &Path, step: &str, mode: &str) -> Result<Job> {
    let sql = format!(
        "CREATE TABLE nexmark ({NEXMARK_COLUMNS}) WITH ('connector' = 'nexmark', 'events' = '{EVENTS}', 'event-rate' = '1000', 'rate' = '50000');
CREATE TABLE busy (window_end TIMESTAMP(3), auction BIGINT, bids BIGINT, highest BIGINT)
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json');
INSERT INTO busy SELECT window_end, bid.auction, count(*), max(bid.price)
  FROM TABLE(TUMBLE(TABLE nexmark, DESCRIPTOR(`dateTime`), INTERVAL '10' SECOND))
  WHERE event_type = 2 GROUP BY window_start, window_end, bid.auction;",
        folder.join("busy").display()
    );
    let mut job = Job::new(folder, "busy", sql);
    job.interval = "300ms".to_owned();
    mode.clone_into(&mut job.mode);
    let ended = job.start_with(Some(step))?.wait(Duration::from_secs(60))?;
    ensure!(ended.killed(), "it was not killed: {ended}");
    Ok(job)
}

/// The difference between what should be there and what is.
fn compare_output(folder: &Path) -> Result<Result<u64, Difference>> {
    let generator = Generator { events_per_second: 1_000, ..Generator::default() };
    let lines = lines_of(&folder.join("busy"))?;
    let rows = lines.iter().map(|line| row_of_json(line.as_bytes(), &COLUMNS)).collect::<Result<Vec<_>>>()?;
    Ok(multiset(bids_per_auction(generator, EVENTS, 10_000)?, rows))
}

fn check_output(folder: &Path) -> Result<()> {
    compare_output(folder)??;
    Ok(())
}

/// Epochs of the newest checkpoint and the one before.
fn newest_two(job: &Job) -> Result<(u64, u64)> {
    let log = job.log()?;
    let mut epochs = log.completed().rev().filter_map(|(_, manifest)| manifest["epoch"].as_u64());
    Ok((epochs.next().context("no checkpoint")?, epochs.next().context("just one checkpoint")?))
}

fn says_so(ended: &Ended, from: u64) -> Result<()> {
    says(ended, from, "restored an older checkpoint")
}

fn says(ended: &Ended, from: u64, what: &str) -> Result<()> {
    assert_eq!(ended.ok("finished")?.restored_from, Some(from));
    ensure!(ended.log.contains("damaged"), "it doesn't say that something is damaged: {ended}");
    ensure!(ended.log.contains(what), "it doesn't say what it starts from: {ended}");
    Ok(())
}

#[test]
fn a_turned_bit_in_a_shard_is_found_and_the_checkpoint_before_is_used() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let job = crashed_job(folder.path())?;
    let (newest, before) = newest_two(&job)?;
    let shards = job.log()?.shards_of_newest_alone();
    let shard = shards.first().context("the checkpoint has no shard of its own")?;
    flip_a_byte(&job.checkpoint_folder().join(shard))?;
    let ended = finish(&job)?;
    says_so(&ended, before)?;
    ensure!(ended.log.contains(&format!("checkpoint={newest}")), "it doesn't name checkpoint {newest}: {ended}");
    ensure!(ended.log.contains(shard), "it doesn't name shard {shard}: {ended}");
    check_output(folder.path())
}

#[test]
fn a_missing_shard_is_found_and_the_checkpoint_before_is_used() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let job = crashed_job(folder.path())?;
    let (_, before) = newest_two(&job)?;
    let shards = job.log()?.shards_of_newest_alone();
    fs::remove_file(job.checkpoint_folder().join(shards.first().context("the checkpoint has no shard of its own")?))?;
    let ended = finish(&job)?;
    says_so(&ended, before)?;
    check_output(folder.path())
}

#[test]
fn a_turned_bit_in_a_log_entry_is_found_and_the_checkpoint_before_is_used() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let job = crashed_job(folder.path())?;
    let (_, before) = newest_two(&job)?;
    let entry = job.log()?.completed().next_back().context("no checkpoint")?.0.to_owned();
    flip_a_byte(&entry)?;
    let ended = finish(&job)?;
    // What the entry was, nobody can tell.
    says(&ended, before, "restored the newest checkpoint that is known")?;
    check_output(folder.path())
}

/// What a sink has published can't be taken back: it comes again, but never silently, and nothing is lost.
#[test]
fn a_damaged_checkpoint_that_was_committed_loses_nothing_and_the_log_warns_of_repeats() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let job = crashed_at(folder.path(), "after-committed-entry:+4", "ExactlyOnce")?;
    let (_, before) = newest_two(&job)?;
    let shards = job.log()?.shards_of_newest_alone();
    flip_a_byte(&job.checkpoint_folder().join(shards.first().context("the checkpoint has no shard of its own")?))?;
    let ended = finish(&job)?;
    says_so(&ended, before)?;
    let warning = format!("output after checkpoint {before} may have been committed already");
    ensure!(ended.log.contains(&warning), "it doesn't warn of repeats: {ended}");
    if let Err(difference) = compare_output(folder.path())? {
        assert_eq!(difference.missing(), 0, "{difference}");
    }
    Ok(())
}

/// Incremental checkpoints name files of each other. Without `incremental` each has its own.
#[test]
fn damage_in_a_file_that_all_checkpoints_share_is_said_and_harms_no_whole_ones() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let job = crashed_job(folder.path())?;
    let shared = job.log()?.shared_shards();
    let shard = shared.first().context("no file is shared")?;
    flip_a_byte(&job.checkpoint_folder().join(shard))?;
    job.start()?.wait(PATIENCE)?.refused(4, &["no checkpoint of default/busy/local", "is intact", shard])?;

    let folder = scratch::folder("job-")?;
    let job = crashed_at(folder.path(), "after-log-entry:+4", "ExactlyOnce\n    incremental: false")?;
    assert_eq!(job.log()?.shared_shards(), Vec::<String>::new());
    let ended = finish(&job)?;
    ended.ok("finished")?;
    check_output(folder.path())
}

#[test]
fn a_job_whose_checkpoints_are_all_damaged_starts_from_nothing_only_if_told_to() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let mut job = crashed_job(folder.path())?;
    let blobs = job.checkpoint_folder().join("blobs");
    let mut damaged = 0;
    for attempt in fs::read_dir(&blobs)? {
        for shard in fs::read_dir(attempt?.path())? {
            flip_a_byte(&shard?.path())?;
            damaged += 1;
        }
    }
    ensure!(damaged > 0, "no shard to damage in {}", blobs.display());
    let output_before = lines_of(&folder.path().join("busy"))?;
    job.start()?.wait(PATIENCE)?.refused(4, &["no checkpoint of default/busy/local", "is intact", "--restore none"])?;
    assert_eq!(lines_of(&folder.path().join("busy"))?, output_before, "a job that is refused writes nothing");
    fs::remove_dir_all(folder.path().join("busy"))?;
    job.from_nothing = true;
    let ended = finish(&job)?;
    assert_eq!(ended.ok("finished")?.restored_from, None);
    ensure!(ended.log.contains("starting from nothing, as told to"), "it doesn't say so: {ended}");
    check_output(folder.path())
}
