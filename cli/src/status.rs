//! `floodmark status`: asks the process that runs a job where it stands, and shows it in a few lines or as JSON.

use floodmark_snapshot::Env;
use floodmark_worker::api::{
    CheckpointHistory, CheckpointOutcome, GraphView, JobView, OperatorView, SharesView, TaskView,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{
    args::StatusArgs,
    control::{Answer, Place, ask, nobody_listens},
    display::{bytes, count, duration},
    exit::{Exit, Failure},
    job,
    screen::print,
};

/// Checkpoints that failed or are under way that are shown; the others are just counted.
const CHECKPOINTS_SHOWN: usize = 3;

/// Characters of a cause that are shown.
const CAUSE_SHOWN: usize = 200;

/// Prints where the job stands.
pub(crate) fn status(args: &StatusArgs) -> Result<Exit, Failure> {
    let (job, manifest) = job::identify(&args.of.job)?;
    let storage = job::storage(args.of.storage.as_deref(), &manifest)?;
    let place = Place::of(&job, &storage);
    let answers = job::runtime()?.block_on(async {
        let (job, graph) = (read(&place, "/job").await?, read(&place, "/job/graph").await?);
        Ok(job.zip(graph).zip(read(&place, "/checkpoints").await?))
    });
    let Some(((job, graph), checkpoints)) = answers? else {
        let then = "see what it has left with floodmark checkpoints list, or run it: floodmark run";
        return Err(nobody_listens(&job, &storage, then));
    };
    if args.json {
        print(&format!("{:#}\n", json!({ "job": job, "graph": graph, "checkpoints": checkpoints })));
        return Ok(Exit::Done);
    }
    let now_ms = Env::system().clock.wall_ms();
    print(&text(&parsed(job)?, &parsed(graph)?, &parsed(checkpoints)?, now_ms));
    Ok(Exit::Done)
}

/// `None` if nobody listens.
async fn read(place: &Place, path: &str) -> Result<Option<Value>, Failure> {
    match ask(place, "GET", path, None::<&()>).await? {
        Answer::Is(value) => Ok(Some(value)),
        Answer::Refused(reason) => Err(Failure::new(Exit::JobFailed, format!("ask the job for {path}: {reason}"))),
        Answer::NobodyListens => Ok(None),
    }
}

fn parsed<T: DeserializeOwned>(value: Value) -> Result<T, Failure> {
    serde_json::from_value(value).map_err(|e| {
        let message =
            format!("understand the job's process: {e}; is it of another version? --json prints what it says");
        Failure::new(Exit::JobFailed, message)
    })
}

fn text(job: &JobView, graph: &GraphView, checkpoints: &CheckpointHistory, now_ms: i64) -> String {
    let mut lines = Vec::new();
    let restoring = if job.phase == "running" && !job.ready { ", not all state is there yet" } else { "" };
    lines.push(format!("job {}: {}{restoring}; run by {}", job.job, job.phase, job.holder));
    let attempt = job.attempt.map_or_else(String::new, |n| format!("; attempt {n}"));
    let restarts = match job.restarts {
        0 => String::new(),
        1 => ", 1 restart".to_owned(),
        n => format!(", {n} restarts"),
    };
    lines.push(format!("parallelism {} of at most {}{attempt}{restarts}", job.parallelism, job.max_parallelism));
    if let Some(failure) = &job.last_failure {
        lines.push(format!("last failure {} ago: {}", duration(now_ms - failure.at_ms), short(&failure.cause)));
    }
    lines.push(counted(job, now_ms));
    let noteworthy = |o: CheckpointOutcome| matches!(o, CheckpointOutcome::Failed | CheckpointOutcome::UnderWay);
    for c in checkpoints.checkpoints.iter().filter(|c| noteworthy(c.state)).take(CHECKPOINTS_SHOWN) {
        let ago = duration(now_ms - c.triggered_at_ms);
        let became = match &c.reason {
            Some(reason) => format!("failed: {}", short(reason)),
            None => "is under way".to_owned(),
        };
        lines.push(format!("  checkpoint {}, triggered {ago} ago, {became}", c.epoch));
    }
    lines.push(String::new());
    lines.extend(table(graph, now_ms));
    lines.join("\n") + "\n"
}

/// A text in one line that is not too long.
fn short(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(CAUSE_SHOWN) {
        Some((end, _)) => format!("{}… (--json prints all of it)", &line[..end]),
        None => line,
    }
}

fn counted(job: &JobView, now_ms: i64) -> String {
    let counts = &job.checkpoints;
    let some = |n: u64, what: &str| if n > 0 { format!(", {n} {what}") } else { String::new() };
    let others = some(counts.failed, "failed") + &some(counts.overtaken, "overtaken by later ones");
    let last = counts.last.as_ref().map_or_else(String::new, |last| {
        let ago = duration(now_ms - last.triggered_at_ms - last.duration_ms.cast_signed());
        let took = duration(last.duration_ms.cast_signed());
        format!("; the last is {}: {ago} ago, took {took}, {}", last.epoch, bytes(last.size))
    });
    format!("checkpoints {} completed{others}{last}", counts.completed)
}

/// A line per operator, and on the first of each task what its time goes to.
fn table(graph: &GraphView, now_ms: i64) -> Vec<String> {
    const HEAD: [&str; 9] =
        ["TASK", "OPERATOR", "ROWS IN", "ROWS OUT", "KEYS", "STATE", "WATERMARK LAG", "BUSY / IDLE / WAITS", "NOTES"];
    let mut rows = vec![HEAD.map(str::to_owned)];
    for task in &graph.tasks {
        for (n, operator) in task.operators.iter().enumerate() {
            let first = n == 0;
            let name = if first { format!("{} x{}", task.id, task.parallelism) } else { String::new() };
            rows.push(row(name, operator, if first { shares(task) } else { String::new() }, now_ms));
        }
    }
    let widths: Vec<usize> =
        (0..HEAD.len()).map(|c| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0)).collect();
    let line = |row: &[String; 9]| {
        let cells = row.iter().zip(&widths).enumerate().map(|(c, (cell, width))| {
            // Numbers to the right.
            if (2..6).contains(&c) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

fn row(task: String, operator: &OperatorView, shares: String, now_ms: i64) -> [String; 9] {
    let some = |n: u64, text: String| if n > 0 { text } else { "-".to_owned() };
    let lag = match operator.watermark_ms {
        _ if operator.input_ended => "input ended".to_owned(),
        Some(watermark) => duration(now_ms.saturating_sub(watermark)),
        None => "-".to_owned(),
    };
    let notes = [(operator.late, "late"), (operator.bad, "bad")];
    let notes: Vec<_> =
        notes.into_iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{} {what}", count(n as f64))).collect();
    [
        task,
        operator.uid.0.clone(),
        some(operator.rows_in, count(operator.rows_in as f64)),
        some(operator.rows_out, count(operator.rows_out as f64)),
        some(operator.state_rows, count(operator.state_rows as f64)),
        some(operator.state_bytes, bytes(operator.state_bytes)),
        lag,
        shares,
        notes.join(", "),
    ]
}

fn shares(task: &TaskView) -> String {
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    task.shares.map_or_else(
        || "does not run".to_owned(),
        |SharesView { busy, idle, back_pressured }| {
            format!("{} / {} / {}", percent(busy), percent(idle), percent(back_pressured))
        },
    )
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn operator(uid: &str, rows_in: u64, rows_out: u64) -> Value {
        json!({
            "uid": uid, "kind": "x", "description": "x", "rowsIn": rows_in, "rowsOut": rows_out, "bytes": 0, "late": 0,
            "bad": 0, "stateRows": 0, "stateBytes": 0, "watermarkMs": null, "inputEnded": false,
        })
    }

    #[test]
    fn where_a_job_stands_is_shown_in_a_few_lines() {
        let mut window = operator("hot/window-aggregate-1", 2_400, 20);
        window["stateRows"] = json!(12_345);
        window["stateBytes"] = json!(3_000_000);
        window["watermarkMs"] = json!(98_800);
        window["late"] = json!(2);
        let mut sink = operator("sink:hot", 20, 20);
        sink["inputEnded"] = json!(true);
        let graph = json!({
            "tasks": [
                {
                    "id": 0, "parallelism": 2, "operators": [operator("source:bid", 0, 2_401_000), operator("calc", 1, 2)],
                    "shares": { "busy": 0.504, "idle": 0.246, "backPressured": 0.25 },
                },
                { "id": 1, "parallelism": 2, "operators": [window, sink], "shares": null },
            ],
            "edges": [{ "from": 0, "to": 1, "input": 0, "exchange": "hash" }],
        });
        let entry = |epoch, state, reason: Value| {
            json!({
                "epoch": epoch, "kind": "checkpoint", "state": state, "triggeredAtMs": 90_000 + epoch, "durationMs": null,
                "size": null, "unaligned": false, "reason": reason,
            })
        };
        let checkpoints = json!({ "checkpoints": [
            entry(13, "underWay", json!(null)),
            entry(12, "completed", json!(null)),
            entry(11, "failed", json!("timed out")),
            entry(10, "overtaken", json!("later")),
        ] });
        let last = json!({ "epoch": 12, "triggeredAtMs": 90_012, "durationMs": 120, "size": 1_500_000 });
        let job = json!({
            "job": "default/hot/local", "phase": "running", "ready": false, "holder": "here:1", "parallelism": 2,
            "maxParallelism": 128, "attempt": 3, "restarts": 2, "lastFailure": { "cause": "worker 1 is lost", "atMs": 40_000 },
            "restoredFrom": 9, "checkpoints": { "completed": 5, "failed": 1, "overtaken": 1, "last": last },
        });
        let text = text(&parsed(job).unwrap(), &parsed(graph).unwrap(), &parsed(checkpoints).unwrap(), 100_000);
        expect![[r#"
            job default/hot/local: running, not all state is there yet; run by here:1
            parallelism 2 of at most 128; attempt 3, 2 restarts
            last failure 1 min ago: worker 1 is lost
            checkpoints 5 completed, 1 failed, 1 overtaken by later ones; the last is 12: 9.9 s ago, took 120 ms, 1.4 MiB
              checkpoint 13, triggered 10.0 s ago, is under way
              checkpoint 11, triggered 10.0 s ago, failed: timed out

            TASK  OPERATOR                ROWS IN  ROWS OUT    KEYS    STATE  WATERMARK LAG  BUSY / IDLE / WAITS  NOTES
            0 x2  source:bid                    -    2.40 M       -        -  -              50 % / 25 % / 25 %
                  calc                          1         2       -        -  -
            1 x2  hot/window-aggregate-1   2.40 k        20  12.3 k  2.9 MiB  1.2 s          does not run         2 late
                  sink:hot                     20        20       -        -  input ended
        "#]].assert_eq(&text);
    }

    #[test]
    fn a_long_cause_is_cut_and_stays_on_its_line() {
        assert_eq!(short("a\n  b"), "a b");
        assert_eq!(short(&"ü".repeat(CAUSE_SHOWN)), "ü".repeat(CAUSE_SHOWN));
        let cut = short(&"ü".repeat(CAUSE_SHOWN + 1));
        assert_eq!(cut, "ü".repeat(CAUSE_SHOWN) + "… (--json prints all of it)");
    }

    #[test]
    fn what_another_version_says_is_refused_with_what_to_do() {
        let error = parsed::<JobView>(json!({ "job": 1 })).unwrap_err();
        assert!(error.message.contains("--json prints what it says"), "{}", error.message);
    }
}
