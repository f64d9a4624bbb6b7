//! Apache Flink, the peer: a real JobManager, TaskManager and SQL gateway, driven by `bench/peers/flink/run.py`, on the same
//! topic and the same SQL.
//!
//! What is counted is the TaskManager's time alone; the JobManager's comes on top.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Mutex,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::{measure::Measured, queries::Query};
use crate::report::load_average;

const NAME: &str = "flink";

/// A cluster on this machine. Ends when dropped.
pub(crate) struct Flink {
    child: Child,
    pipes: Mutex<(Option<ChildStdin>, BufReader<ChildStdout>)>,
}

impl Flink {
    /// Starts it; a query runs with `parallelism` slots.
    pub(crate) fn start(parallelism: u32) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/flink/run.py");
        let home = cache()?.join("flink");
        ensure!(home.exists(), "{} is not there: run bench/peers/flink/setup.sh", home.display());
        let mut child = Command::new("python3")
            .arg(&script)
            .arg(&home)
            .arg(parallelism.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", script.display()))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("no standard output")?);
        let flink = Self { child, pipes: Mutex::new((stdin, BufReader::new(stdout))) };
        flink.answer().context("start Flink")?;
        Ok(flink)
    }

    /// Runs a query once.
    pub(crate) fn run(
        &self,
        bootstrap: &str,
        topic: &str,
        query: Query,
        events: u64,
        interval: &str,
    ) -> Result<Measured> {
        let load = load_average();
        let request = json!({ "statements": query.statements(bootstrap, topic), "interval": interval });
        {
            let mut pipes = self.pipes.lock().map_err(|_| anyhow!("an earlier run panicked"))?;
            writeln!(pipes.0.as_mut().context("Flink has ended")?, "{request}")?;
        }
        let answer = self.answer().with_context(|| format!("run {} with Flink", query.name()))?;
        let number = |field: &str| answer[field].as_f64().with_context(|| format!("no {field} in {answer}"));
        Ok(Measured {
            system: NAME,
            query,
            setting: format!("heap, {interval}"),
            events,
            cpu_seconds: number("cpuSeconds")?,
            cpu_seconds_of_system: None,
            wall_seconds: number("wallSeconds")?,
            checkpoints: number("checkpoints")? as u64,
            load,
        })
    }

    fn answer(&self) -> Result<Value> {
        let mut pipes = self.pipes.lock().map_err(|_| anyhow!("an earlier run panicked"))?;
        let mut line = String::new();
        ensure!(pipes.1.read_line(&mut line)? > 0, "run.py has ended");
        let answer: Value = serde_json::from_str(&line)?;
        match answer["error"].as_str() {
            Some(error) => bail!("{error}"),
            None => Ok(answer),
        }
    }
}

impl Drop for Flink {
    fn drop(&mut self) {
        // The end of its input tells the script to end the cluster.
        if let Ok(mut pipes) = self.pipes.lock() {
            pipes.0 = None;
        }
        let _ = self.child.wait();
    }
}

fn cache() -> Result<PathBuf> {
    match (std::env::var_os("FLOODMARK_CACHE"), std::env::var_os("HOME")) {
        (Some(cache), _) => Ok(PathBuf::from(cache)),
        (None, Some(home)) => Ok(Path::new(&home).join(".cache/floodmark")),
        (None, None) => bail!("neither FLOODMARK_CACHE nor HOME is set"),
    }
}
