//! A job of several processes, asked and ordered about over HTTP as an operator does it: what it tells while it runs, who may change
//! it, and that two rescales and a stop neither lose nor repeat a row. Needs no server.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use floodmark_connectors::nexmark::Generator;
use floodmark_testkit::scratch;
use floodmark_tests::{
    chaos::finish,
    compare::{Column, multiset, row_of_json},
    events::NEXMARK_COLUMNS,
    job::{Job, PATIENCE, Run, lines_of},
    oracle::bids_per_auction,
};
use serde_json::{Value, json};

const EVENTS: u64 = 400_000;
/// Events a second: they last for longer than anything that is asked here takes.
const RATE: u64 = 10_000;
const WINDOW_MS: i64 = 10_000;
const TOKEN: &str = "correct-horse-battery-staple";
/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// What the program says of where it answers.
const ANSWERS: &str = "answering HTTP at http://";
/// How far the shares of a task's time may be from adding up to 1: they are rounded.
const SHARES_OFF_MAX: f64 = 0.01;

/// Bids per auction and window, into files.
fn job(folder: &Path, rate: Option<u64>) -> Job {
    let rate = rate.map_or_else(String::new, |rate| format!(", 'rate' = '{rate}'"));
    let sql = format!(
        "CREATE TABLE nexmark ({NEXMARK_COLUMNS}) WITH ('connector' = 'nexmark', 'events' = '{EVENTS}', 'event-rate' = '1000'{rate});
CREATE VIEW bid AS SELECT bid.auction, bid.price, `dateTime` FROM nexmark WHERE event_type = 2;
CREATE TABLE busy (window_end TIMESTAMP(3), auction BIGINT, bids BIGINT, highest BIGINT)
  WITH ('connector' = 'files', 'path' = '{}', 'format' = 'json');
INSERT INTO busy SELECT window_end, auction, count(*), max(price)
  FROM TABLE(TUMBLE(TABLE bid, DESCRIPTOR(`dateTime`), INTERVAL '10' SECOND)) GROUP BY window_start, window_end, auction;",
        folder.join("busy").display()
    );
    let mut job = Job::new(folder, "asked", sql);
    job.interval = "300ms".to_owned();
    job
}

/// Every window's rows are there once, whatever the job has gone through.
fn check_output(folder: &Path) -> Result<()> {
    const BUSY: [Column; 4] =
        [Column::Time("window_end"), Column::Plain("auction"), Column::Plain("bids"), Column::Plain("highest")];
    let generator = Generator { events_per_second: 1_000, ..Generator::default() };
    let lines = lines_of(&folder.join("busy"))?;
    let rows = lines.iter().map(|line| row_of_json(line.as_bytes(), &BUSY)).collect::<Result<Vec<_>>>()?;
    let rows = multiset(bids_per_auction(generator, EVENTS, WINDOW_MS)?, rows)?;
    ensure!(rows > 1_000, "only {rows} rows: too few to prove anything");
    Ok(())
}

/// The job's interface.
#[derive(Clone, Copy)]
struct Api(SocketAddr);

/// A status and a body.
type Answer = (u16, String);

impl Api {
    fn get(self, path: &str) -> Result<Answer> {
        self.ask("GET", path, None, None)
    }

    /// What is told at `path`, which must be there.
    fn view(self, path: &str) -> Result<Value> {
        let (status, body) = self.get(path)?;
        ensure!(status == 200, "GET {path}: {status} {body}");
        serde_json::from_str(&body).with_context(|| format!("GET {path}: {body}"))
    }

    fn post(self, path: &str, order: &Value, token: Option<&str>) -> Result<Answer> {
        self.ask("POST", path, Some(order), token)
    }

    /// A connection carries one request.
    fn ask(self, method: &str, path: &str, body: Option<&Value>, token: Option<&str>) -> Result<Answer> {
        let mut stream = TcpStream::connect(self.0)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let token = token.map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{token}Content-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n",
            self.0,
            body.len()
        );
        stream.write_all((head + &body).as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).with_context(|| format!("{method} {path}"))?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer: {answer}"))?;
        ensure!(!head.to_lowercase().contains("transfer-encoding"), "in pieces, which this client can't read: {head}");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok((status.with_context(|| format!("no status: {head}"))?, body.to_owned()))
    }

    /// Waits until the job says it is ready; before that it must say that it is not.
    fn ready(self, run: &mut Run) -> Result<()> {
        run.until("it was ready", PATIENCE, || match self.get("/readyz") {
            Ok((200, body)) => {
                ensure!(serde_json::from_str::<Value>(&body)?["ready"] == true, "200, but: {body}");
                Ok(true)
            }
            Ok((503, body)) => {
                ensure!(serde_json::from_str::<Value>(&body)?["ready"] == false, "503, but: {body}");
                Ok(false)
            }
            Ok(other) => bail!("GET /readyz: {other:?}"),
            // Its process has only just begun.
            Err(_) => Ok(false),
        })
    }
}

/// Starts the job with two workers, and answers over TCP.
fn start(job: &Job, folder: &Path) -> Result<(Run, Api)> {
    let token = folder.join("token");
    fs::write(&token, format!("{TOKEN}\n"))?;
    let words = ["run", "JOB", "--workers", "2", "--storage", "STORAGE", "--output", "json"];
    let http = ["--listen-http", "127.0.0.1:0", "--http-token-file", &token.display().to_string()];
    let mut run = job.start_under(&[], "run", &[&words[..], &http].concat())?;
    let begin = Instant::now();
    loop {
        let said = run.log();
        if let Some(address) = said.lines().find_map(|line| line.split_once(ANSWERS)?.1.trim().parse().ok()) {
            return Ok((run, Api(address)));
        }
        ensure!(run.is_running()? && begin.elapsed() < PATIENCE, "it answers nowhere; its log:\n{said}");
        sleep(POLL);
    }
}

/// A sample's name with its labels, and its value.
type Samples = BTreeMap<String, f64>;

/// Reads Prometheus' text format strictly: help and type first, each family once, each sample once, values that are numbers.
fn samples(text: &str) -> Result<Samples> {
    let (mut families, mut family, mut samples) = (BTreeSet::new(), String::new(), Samples::new());
    ensure!(text.ends_with('\n'), "its last line does not end");
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split_once(' ').with_context(|| format!("no help: {line}"))?.0.to_owned();
            ensure!(families.insert(family.clone()), "{family} comes twice");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let kinds = [format!("{family} counter"), format!("{family} gauge")];
            ensure!(kinds.iter().any(|k| k == kind), "of {family}: {line}");
        } else {
            let (name, value) = line.rsplit_once(' ').with_context(|| format!("no sample: {line}"))?;
            let bare = name.split_once('{').map_or(name, |(bare, _)| bare);
            ensure!(bare == family, "{line} is not of {family}");
            ensure!(name.contains('{') == name.ends_with('}'), "labels without an end: {line}");
            let value = value.parse().with_context(|| format!("no number: {line}"))?;
            ensure!(samples.insert(name.to_owned(), value).is_none(), "{name} comes twice");
        }
    }
    Ok(samples)
}

/// Rows that the source has read, by `/job/graph`; everything else that this tells must fit.
fn look_at_the_graph(api: Api, parallelism: u64) -> Result<u64> {
    let graph = api.view("/job/graph")?;
    let tasks = graph["tasks"].as_array().context("no tasks")?;
    ensure!(tasks.len() >= 2, "{graph:#}");
    for task in tasks {
        ensure!(task["parallelism"] == parallelism, "a task is at another parallelism than {parallelism}: {task:#}");
        let share = |of: &str| task["shares"][of].as_f64().with_context(|| format!("no share {of}: {task:#}"));
        let shares = [share("busy")?, share("idle")?, share("backPressured")?];
        ensure!(shares.iter().all(|s| (0.0..=1.0).contains(s)), "{shares:?}");
        ensure!((shares.iter().sum::<f64>() - 1.0).abs() < SHARES_OFF_MAX, "{shares:?}");
    }
    let operators: Vec<&Value> = tasks.iter().filter_map(|t| t["operators"].as_array()).flatten().collect();
    let count = |uid: &str, what: &str| {
        let operator = operators.iter().find(|o| o["uid"] == uid);
        operator.and_then(|o| o[what].as_u64()).with_context(|| format!("no {what} of {uid}: {graph:#}"))
    };
    let (read, written) = (count("source:nexmark", "rowsOut")?, count("sink:busy", "rowsIn")?);
    ensure!(read > 0 && read <= EVENTS, "{read} rows read");
    ensure!(written < read, "{written} rows written of {read}");
    let edges = graph["edges"].as_array().context("no edges")?;
    let of_tasks = |e: &Value| e["from"].as_u64() < e["to"].as_u64() && e["to"].as_u64() < Some(tasks.len() as u64);
    ensure!(!edges.is_empty() && edges.iter().all(of_tasks), "{edges:?}");
    ensure!(edges.iter().any(|e| e["exchange"] == "hash"), "{edges:?}");
    Ok(read)
}

/// What the job says of itself, once it is at this parallelism.
fn look_at_the_job(api: Api, parallelism: u64) -> Result<()> {
    let view = api.view("/job")?;
    ensure!(view["job"] == "default/asked/local" && view["phase"] == "running", "{view:#}");
    ensure!(view["parallelism"] == parallelism && view["restarts"] == 0, "{view:#}");
    let (status, text) = api.get("/metrics")?;
    ensure!(status == 200, "GET /metrics: {status} {text}");
    let samples = samples(&text)?;
    let sample = |name: &str| samples.get(name).copied().with_context(|| format!("no {name} in:\n{text}"));
    assert_eq!(sample("floodmark_job_parallelism")?, parallelism as f64);
    assert_eq!(sample("floodmark_job_restarts_total")?, 0.0);
    assert_eq!(sample("floodmark_job_ready")?, 1.0);
    let rows = samples.iter().filter(|(name, _)| name.starts_with("floodmark_operator_rows_out_total{"));
    ensure!(rows.clone().count() >= 2 && rows.into_iter().any(|(_, rows)| *rows > 0.0), "no rows in:\n{text}");
    Ok(())
}

/// Waits until the graph fits: time has its shares, and rows have come, only some seconds after tasks have begun.
fn graph(api: Api, parallelism: u64) -> Result<u64> {
    let start = Instant::now();
    loop {
        match look_at_the_graph(api, parallelism) {
            Ok(read) => return Ok(read),
            Err(error) if start.elapsed() > ANSWER_TIMEOUT => return Err(error),
            Err(_) => sleep(POLL),
        }
    }
}

#[test]
fn a_job_tells_of_itself_over_http_and_is_rescaled_and_stopped_by_whoever_has_the_token() -> Result<()> {
    let folder = scratch::folder("api-")?;
    let mut asked = job(folder.path(), Some(RATE));
    let (mut run, api) = start(&asked, folder.path())?;
    api.ready(&mut run)?;
    assert_eq!(api.get("/healthz")?.0, 200);
    let mut read = graph(api, 2)?;
    look_at_the_job(api, 2)?;

    for (from, to) in [(2, 4), (4, 3)] {
        let order = json!({ "parallelism": to });
        for token in [None, Some("another")] {
            let (status, body) = api.post("/rescale", &order, token)?;
            ensure!(status == 401 && !body.contains(TOKEN), "with token {token:?}: {status} {body}");
        }
        let (status, body) = api.post("/rescale", &order, Some(TOKEN))?;
        ensure!(status == 200, "rescale to {to}: {status} {body}; its log:\n{}", run.log());
        let done: Value = serde_json::from_str(&body)?;
        // Those without the token have changed nothing: it comes from where it was.
        ensure!(done["from"] == from && done["to"] == to && done["epoch"].as_u64().is_some(), "{body}");
        api.ready(&mut run)?;
        look_at_the_job(api, to)?;
        let now = graph(api, to)?;
        ensure!(now > read, "{now} rows read, {read} before the rescale");
        read = now;
    }

    assert_eq!(api.post("/stop", &json!({ "savepoint": "last" }), None)?.0, 401);
    let (status, body) = api.post("/stop", &json!({ "savepoint": "last" }), Some(TOKEN))?;
    ensure!(status == 200, "stop: {status} {body}; its log:\n{}", run.log());
    let stopped: Value = serde_json::from_str(&body)?;
    let location = stopped["savepoint"]["location"].as_str().with_context(|| format!("no savepoint: {body}"))?;
    ensure!(Path::new(location).join("_manifest.json").exists(), "{location} is no savepoint");
    let ended = run.wait(PATIENCE)?;
    let before = ended.ok("stopped")?.rows_in["nexmark"];
    ensure!(before >= read && before < EVENTS, "{before} rows read of {EVENTS}, {read} of them a while ago");

    // The rest flat out: the rate only made it last. No row has been read twice, not even to be dropped.
    asked.sql = job(folder.path(), None).sql;
    asked.workers = Some(2);
    let ended = finish(&asked)?;
    let summary = ended.ok("finished")?;
    assert_eq!(summary.rows_in["nexmark"], EVENTS - before);
    assert_eq!(summary.restored_from, stopped["savepoint"]["epoch"].as_u64());
    check_output(folder.path())
}

#[test]
fn metrics_that_are_not_well_formed_are_not_taken() -> Result<()> {
    let good = "# HELP a of it\n# TYPE a gauge\na 1\na{b=\"c d\"} +Inf\n";
    assert_eq!(samples(good)?.len(), 2);
    let bad = ["a 1\n", "# HELP a of it\n# TYPE a gauge\na x\n", "# HELP a of it\n# TYPE a gauge\na 1\na 2\n"];
    for text in bad {
        ensure!(samples(text).is_err(), "{text}");
    }
    ensure!(samples(&format!("{good}{good}")).is_err());
    Ok(())
}
