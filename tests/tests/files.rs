//! Exactly once from generators and files into files, under kills. Needs no server.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

use std::{collections::BTreeMap, fs, path::Path, thread::sleep, time::Duration};

use anyhow::{Result, ensure};
use floodmark_connectors::nexmark::{Event, Generator};
use floodmark_testkit::scratch;
use floodmark_tests::{
    chaos::{Kill, at_every_step, at_random_moments, finish, kill_again_and_again, shuffled},
    compare::{Column, Row, multiset, row_of_json},
    events::{NEXMARK_COLUMNS, Orders, TABLE_COLUMNS, timestamp},
    job::{Job, PATIENCE, lines_of},
    oracle::{TURNOVER, bids_per_auction, turnover},
};
use nix::sys::signal::{Signal, kill};

const BUSY: [Column; 4] =
    [Column::Time("window_end"), Column::Plain("auction"), Column::Plain("bids"), Column::Plain("highest")];
const WINDOW_MS: i64 = 10_000;

fn output(folder: &Path, columns: &[Column]) -> Result<Vec<Row>> {
    lines_of(folder)?.iter().map(|line| row_of_json(line.as_bytes(), columns)).collect()
}

/// Two inserts over one Nexmark source: every bid above a price as it is, and bids per auction and window.
fn nexmark_job(folder: &Path, events: u64, rate: Option<u64>) -> Job {
    let rate = rate.map_or_else(String::new, |rate| format!(", 'rate' = '{rate}'"));
    let path = |table: &str| folder.join(table).display().to_string();
    let sql = format!(
        "CREATE TABLE nexmark ({NEXMARK_COLUMNS}) WITH ('connector' = 'nexmark', 'events' = '{events}', 'event-rate' = '1000'{rate});
CREATE VIEW bid AS
  SELECT bid.auction, bid.bidder, bid.price, bid.channel, `dateTime` FROM nexmark WHERE event_type = 2;
CREATE TABLE busy (window_end TIMESTAMP(3), auction BIGINT, bids BIGINT, highest BIGINT)
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json');
CREATE TABLE large (auction BIGINT, bidder BIGINT, price BIGINT, channel STRING, at TIMESTAMP(3))
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json');
INSERT INTO busy SELECT window_end, auction, count(*), max(price)
  FROM TABLE(TUMBLE(TABLE bid, DESCRIPTOR(`dateTime`), INTERVAL '10' SECOND)) GROUP BY window_start, window_end, auction;
INSERT INTO large SELECT auction, bidder, price, channel, `dateTime` FROM bid WHERE price > 10000000;",
        path("busy"),
        path("large")
    );
    let mut job = Job::new(folder, "bids", sql);
    job.interval = "300ms".to_owned();
    job
}

fn check_nexmark(folder: &Path, events: u64) -> Result<()> {
    let generator = Generator { events_per_second: 1_000, ..Generator::default() };
    let expected = bids_per_auction(generator, events, WINDOW_MS)?;
    multiset(expected, output(&folder.join("busy"), &BUSY)?)?;
    let large = |n: u64| -> Option<Row> {
        let price = generator.integer(n, "price").filter(|_| generator.kind(n) == Event::Bid)?;
        let mut channel = String::new();
        generator.text(n, "channel", &mut channel);
        let (auction, bidder) = (generator.integer(n, "auction")?, generator.integer(n, "bidder")?);
        let row =
            [auction.to_string(), bidder.to_string(), price.to_string(), channel, generator.time_ms(n).to_string()];
        (price > 10_000_000).then(|| row.to_vec())
    };
    let columns = [
        Column::Plain("auction"),
        Column::Plain("bidder"),
        Column::Plain("price"),
        Column::Plain("channel"),
        Column::Time("at"),
    ];
    let rows = multiset((0..events).filter_map(large), output(&folder.join("large"), &columns)?)?;
    ensure!(rows > 100, "only {rows} rows: too few to prove anything");
    Ok(())
}

#[test]
fn a_job_that_nobody_disturbs_is_exact_at_any_parallelism() -> Result<()> {
    for parallelism in [1, 2, 4] {
        let folder = scratch::folder("job-")?;
        let mut job = nexmark_job(folder.path(), 200_000, None);
        job.parallelism = parallelism;
        let ended = finish(&job)?;
        let summary = ended.ok("finished")?;
        assert_eq!((summary.late, summary.bad, summary.restored_from), (0, 0, None));
        assert_eq!(summary.rows_in.get("nexmark"), Some(&200_000));
        check_nexmark(folder.path(), 200_000)?;
    }
    Ok(())
}

#[test]
fn kills_at_every_step_and_at_random_moments_neither_lose_nor_repeat_a_row() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let (events, rate) = (2_000_000, 40_000);
    let mut job = nexmark_job(folder.path(), events, Some(rate));
    let kills = at_every_step(1).into_iter().chain(at_every_step(3));
    let kills = shuffled(kills.chain(at_random_moments(8, Duration::from_millis(1_200), 5)).collect(), 11);
    let parallelisms = [2, 1, 4, 3];
    let deaths = kill_again_and_again(&mut job, &kills, |start, job| {
        job.parallelism = parallelisms[start / 6 % parallelisms.len()];
        Ok(())
    })?;
    ensure!(deaths.count() >= 20);
    let restored = deaths.restored_from();
    ensure!(restored.is_sorted() && restored.len() > 10, "it resumed from checkpoints {restored:?}");
    // The rest flat out: the rate only made it last.
    job.sql = nexmark_job(folder.path(), events, None).sql;
    finish(&job)?;
    check_nexmark(folder.path(), events)
}

#[test]
fn a_job_gives_the_same_in_one_process_and_in_several() -> Result<()> {
    for (workers, parallelism) in [(2, 4), (3, 6)] {
        let folder = scratch::folder("job-")?;
        let mut job = nexmark_job(folder.path(), 200_000, None);
        (job.workers, job.parallelism) = (Some(workers), parallelism);
        let ended = finish(&job)?;
        assert_eq!(ended.ok("finished")?.restored_from, None, "{workers} workers");
        check_nexmark(folder.path(), 200_000)?;
    }
    Ok(())
}

#[test]
fn workers_that_die_or_stand_still_and_a_coordinator_that_dies_neither_lose_nor_repeat_a_row() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let (events, rate) = (2_000_000, 25_000);
    let mut job = nexmark_job(folder.path(), events, Some(rate));
    (job.workers, job.parallelism) = (Some(3), 3);
    let mut faults = 0;
    for start in 0..3 {
        let mut run = job.start()?;
        for round in 0..6_usize {
            let newest = || -> Result<Option<u64>> {
                Ok(job.log()?.completed().next_back().and_then(|(_, manifest)| manifest["epoch"].as_u64()))
            };
            let before = newest()?;
            run.until("a checkpoint", PATIENCE, || Ok(newest()? > before))?;
            let workers = run.worker_pids()?;
            let Some(victim) = workers.get((start + round) % workers.len().max(1)) else { continue };
            // One that stands still for longer than heartbeats allow is taken for dead; it wakes up to find itself replaced.
            let signal = if round % 3 == 2 { Signal::SIGSTOP } else { Signal::SIGKILL };
            if kill(*victim, signal).is_ok() {
                faults += 1;
            }
            if signal == Signal::SIGSTOP {
                sleep(Duration::from_millis(4_500));
                // It may have been replaced and killed meanwhile.
                let _ = kill(*victim, Signal::SIGCONT);
            }
        }
        run.kill()?;
        faults += 1;
    }
    ensure!(faults >= 15, "only {faults} faults");
    // The rest flat out: the rate only made it last.
    job.sql = nexmark_job(folder.path(), events, None).sql;
    finish(&job)?;
    check_nexmark(folder.path(), events)
}

/// Orders in files, and their turnover per shop and window.
fn orders_job(folder: &Path, source_options: &str) -> Result<Job> {
    fs::create_dir_all(folder.join("orders"))?;
    let sql = format!(
        "CREATE TABLE orders ({TABLE_COLUMNS})
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json'{source_options});
CREATE TABLE turnover (window_start TIMESTAMP(3), shop STRING, orders BIGINT, amount BIGINT, largest BIGINT)
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json');
INSERT INTO turnover SELECT window_start, shop, count(*), sum(amount), max(amount)
  FROM TABLE(TUMBLE(TABLE orders, DESCRIPTOR(placed_at), INTERVAL '10' SECOND)) GROUP BY window_start, window_end, shop;",
        folder.join("orders").display(),
        folder.join("turnover").display()
    );
    let mut job = Job::new(folder, "turnover", sql);
    job.interval = "200ms".to_owned();
    Ok(job)
}

/// Writes orders `from..to` into one file.
fn write_orders(folder: &Path, orders: Orders, name: &str, numbers: std::ops::Range<u64>) -> Result<()> {
    let lines: String = numbers.map(|n| orders.order(n).json() + "\n").collect();
    // Under a hidden name first: a reader must not see half of it.
    let hidden = folder.join("orders").join(format!(".{name}"));
    fs::write(&hidden, lines)?;
    Ok(fs::rename(&hidden, folder.join("orders").join(name))?)
}

#[test]
fn files_are_read_exactly_once_under_kills() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let (orders, count) = (Orders::default(), 600_000);
    let mut job = orders_job(folder.path(), "")?;
    // By shop, as in the partitions of a topic: within a file, times go forward.
    let mut files: BTreeMap<i32, String> = BTreeMap::new();
    for order in orders.first(count) {
        files.entry(order.partition(4)).or_default().push_str(&(order.json() + "\n"));
    }
    for (partition, lines) in files {
        fs::write(folder.path().join(format!("orders/part-{partition}.ndjson")), lines)?;
    }
    // The steps before the first checkpoint's end are reached by any job, however fast.
    let steps = [
        "before-upload",
        "after-upload",
        "before-log-entry",
        "after-log-entry",
        "before-transaction",
        "in-transaction",
    ];
    let kills: Vec<Kill> = steps.iter().map(|step| Kill::At(format!("{step}:+1"))).collect();
    let deaths = kill_again_and_again(&mut job, &kills, |start, job| {
        job.parallelism = [1, 4, 2][start % 3];
        Ok(())
    })?;
    assert_eq!(deaths.count(), kills.len());
    let ended = finish(&job)?;
    assert_eq!(ended.ok("finished")?.late, 0);
    multiset(turnover(orders.first(count), WINDOW_MS)?, output(&folder.path().join("turnover"), &TURNOVER)?)?;
    Ok(())
}

#[test]
fn a_job_that_is_stopped_takes_a_last_checkpoint_and_goes_on_from_there() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let events = 200_000;
    let mut job = nexmark_job(folder.path(), events, Some(60_000));
    // No checkpoint of its own comes in time.
    job.interval = "1h".to_owned();
    let mut stopped_at = Vec::new();
    for _ in 0..2 {
        let run = job.start()?;
        sleep(Duration::from_millis(1_000));
        run.signal(Signal::SIGTERM)?;
        let ended = run.wait(PATIENCE)?;
        let summary = ended.ok("stopped")?;
        stopped_at.push(summary.checkpoints.last_epoch);
    }
    ensure!(stopped_at[0] < stopped_at[1], "{stopped_at:?}");
    let ended = finish(&job)?;
    assert_eq!(ended.ok("finished")?.restored_from, stopped_at[1]);
    check_nexmark(folder.path(), events)
}

#[test]
fn a_job_that_has_finished_does_nothing_more() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let job = nexmark_job(folder.path(), 50_000, None);
    finish(&job)?;
    let again = job.run()?;
    assert_eq!(again.ok("alreadyFinished")?.rows_in.values().sum::<u64>(), 0);
    check_nexmark(folder.path(), 50_000)
}

#[test]
fn a_followed_folder_is_read_as_files_come_and_grow() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let orders = Orders::default();
    let mut job = orders_job(
        folder.path(),
        ", 'mode' = 'following', 'poll-interval' = '100 ms', 'scan.watermark.idle-timeout' = '300 ms'",
    )?;
    job.parallelism = 1;
    write_orders(folder.path(), orders, "0.ndjson", 0..100_000)?;
    let written = |at_least: usize| {
        let path = folder.path().join("turnover");
        move || Ok(lines_of(&path)?.len() >= at_least)
    };
    let mut run = job.start()?;
    run.until("the first windows were written", PATIENCE, written(1_000))?;
    run.kill()?;
    write_orders(folder.path(), orders, "1.ndjson", 100_000..200_000)?;
    let before = lines_of(&folder.path().join("turnover"))?.len();
    let mut run = job.start()?;
    run.until("further windows were written", PATIENCE, written(before + 1_000))?;
    run.signal(Signal::SIGTERM)?;
    run.wait(PATIENCE)?.ok("stopped")?;
    // The last windows are still open; those that are closed are right, and each is there once.
    let rows = output(&folder.path().join("turnover"), &TURNOVER)?;
    let newest = rows.iter().map(|r| r[0].clone()).max().unwrap_or_default();
    let expected = turnover(orders.first(200_000), WINDOW_MS)?;
    multiset(expected.into_iter().filter(|row| row[0] <= newest), rows)?;
    Ok(())
}

#[test]
fn without_checkpoints_a_restart_begins_at_the_start() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let events = 60_000;
    let mut job = nexmark_job(folder.path(), events, Some(30_000));
    job.mode = "Disabled".to_owned();
    let run = job.start()?;
    sleep(Duration::from_millis(1_000));
    run.kill()?;
    let ended = finish(&job)?;
    let summary = ended.ok("finished")?;
    assert_eq!((summary.restored_from, summary.checkpoints.completed), (None, 0));
    assert_eq!(summary.rows_in.get("nexmark"), Some(&events));
    ensure!(!job.checkpoint_folder().exists(), "it wrote checkpoints");
    Ok(())
}

#[test]
fn csv_is_read_and_written_with_its_header() -> Result<()> {
    let folder = scratch::folder("job-")?;
    let input: String = Orders::default()
        .first(1_000)
        .map(|o| format!("{},{},{}\n", o.shop_name(), o.amount, timestamp(o.time_ms)))
        .collect();
    fs::write(folder.path().join("orders.csv"), format!("shop,amount,placed_at\n{input}"))?;
    let sql = format!(
        "CREATE TABLE orders (shop STRING, amount BIGINT, placed_at TIMESTAMP(3))
  WITH ('connector' = 'files', 'path' = '{0}/orders.csv', 'format' = 'csv', 'csv.header' = 'true');
CREATE TABLE large (shop STRING, amount BIGINT)
  WITH ('connector' = 'files', 'path' = '{0}/large', 'format' = 'csv', 'csv.header' = 'true');
INSERT INTO large SELECT shop, amount FROM orders WHERE amount > 5000;",
        folder.path().display()
    );
    finish(&Job::new(folder.path(), "csv", sql))?;
    let rows = lines_of(&folder.path().join("large"))?;
    let rows = rows.iter().filter(|line| *line != "shop,amount").map(|line| vec![line.clone()]);
    let large = Orders::default().first(1_000).filter(|o| o.amount > 5_000);
    multiset(large.map(|o| vec![format!("{},{}", o.shop_name(), o.amount)]), rows)?;
    Ok(())
}
