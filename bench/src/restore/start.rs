//! One start of a job as a process of its own, watched from outside: what it writes, its log, its storage.
//!
//! Invariant: the process does not outlive the measurement.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use floodmark_tests::job::{CheckpointLog, Job, floodmark};

use crate::rows::{cpu_seconds_of, memory_of};

/// Makes the kernel end a child when the thread that started it dies, on systems that have it.
const LEASH: &str = "/usr/bin/setpriv";
/// What the program says when tasks run from a checkpoint of the job's own.
const TASKS_RUN: &str = "restored the newest checkpoint";
/// A start that has not come to its first row and checkpoint by then hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often the storage is looked at.
const POLL: Duration = Duration::from_millis(20);
/// Lines of a log that are kept: a process that says more says nothing new.
const LINES_MAX: usize = 1_000;

/// What is started.
pub(super) struct Start<'a> {
    pub(super) job: &'a Job,
    /// The job's folder.
    pub(super) folder: &'a Path,
    /// `--restore`.
    pub(super) restore: Option<&'a str>,
    /// Whether its first row must show state from before.
    pub(super) restores: bool,
}

/// Seconds from the start of the process; memory in bytes.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    /// The checkpoint log has been opened.
    pub(super) log_open: f64,
    /// The snapshot has been found fit, and tasks begin; `None` if the process does not say.
    pub(super) tasks_run: Option<f64>,
    /// The first row is on standard output.
    pub(super) first_row: f64,
    /// The first checkpoint of this process is complete.
    pub(super) first_checkpoint: f64,
    /// User and system time until the first row.
    pub(super) cpu_seconds: f64,
    /// Memory at the first row.
    pub(super) resident: u64,
    /// The most memory until the first checkpoint.
    pub(super) resident_most: u64,
}

/// Ends with its owner.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already can't be killed, and need not be.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

type Line = (Instant, String);

impl Start<'_> {
    /// Starts the process, waits for its first row and checkpoint, and ends it.
    pub(super) fn measure(&self) -> Result<Measured> {
        let mut command = self.command()?;
        let before = self.job.log()?.last_epoch();
        let (wall, start) = (SystemTime::now(), Instant::now());
        let mut process = Process(command.spawn().context("start floodmark")?);
        let since = |at: Instant| at.saturating_duration_since(start).as_secs_f64();
        let (rows, row) = sync_channel(1);
        let (lines, line) = sync_channel(LINES_MAX);
        let stdout = process.0.stdout.take().context("no standard output")?;
        let stderr = process.0.stderr.take().context("no standard error")?;
        thread::spawn(move || first_line(stdout, &rows));
        thread::spawn(move || all_lines(stderr, &lines));
        let pid = process.0.id().to_string();

        let first = row.recv_timeout(PATIENCE);
        let (cpu, memory) = (cpu_seconds_of(&pid), memory_of(&pid));
        let (first_row, text) = match first {
            Ok((at, text)) => (since(at), text),
            Err(RecvTimeoutError::Disconnected) => bail!("it ended before its first row; its log:\n{}", log(&line)),
            Err(RecvTimeoutError::Timeout) => bail!("no row within {PATIENCE:?}; its log:\n{}", log(&line)),
        };
        ensure!(rows_so_far(&text).is_some_and(|n| (n > 1) == self.restores), "its first row is {text}");
        while self.job.log()?.last_epoch() <= before {
            ensure!(process.0.try_wait()?.is_none(), "it ended before its first checkpoint; its log:\n{}", log(&line));
            ensure!(start.elapsed() < PATIENCE, "no checkpoint within {PATIENCE:?}; its log:\n{}", log(&line));
            thread::sleep(POLL);
        }
        let most = memory_of(&pid);
        drop(process);

        let entries = self.job.log()?;
        let written = |event: &str| -> Result<Option<f64>> {
            let at = written_at(&entries, event, wall)?;
            Ok(at.map(|at| at.duration_since(wall).unwrap_or_default().as_secs_f64()))
        };
        let said = line.try_iter().find(|(_, text)| text.contains(TASKS_RUN)).map(|(at, _)| since(at));
        let ((resident, _), (_, resident_most)) = memory.zip(most).context("read the process's memory")?;
        Ok(Measured {
            log_open: written("opened")?.context("the log has not been opened")?,
            tasks_run: match said {
                Some(said) => Some(said),
                None => written("adopted")?,
            },
            first_row,
            first_checkpoint: written("completed")?.context("no checkpoint is complete")?,
            cpu_seconds: cpu.context("read the process's time")?,
            resident,
            resident_most,
        })
    }

    fn command(&self) -> Result<Command> {
        let manifest = self.folder.join("job.yaml");
        fs::write(&manifest, self.job.manifest()).with_context(|| format!("write {}", manifest.display()))?;
        let program = floodmark()?;
        let mut command = if Path::new(LEASH).exists() {
            let mut command = Command::new(LEASH);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        command.arg("run").arg(manifest).args(["--storage", &self.job.storage]);
        if let Some(snapshot) = self.restore {
            command.args(["--restore", snapshot]);
        }
        command.envs(&self.job.env).env_remove("FLOODMARK_CRASH").env_remove("RUST_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }
}

/// Passes the first line on, and reads the rest so that the process is never held up.
fn first_line(stdout: impl Read, rows: &SyncSender<Line>) {
    let mut stdout = BufReader::with_capacity(1 << 20, stdout);
    let mut text = String::new();
    if stdout.read_line(&mut text).is_ok_and(|read| read > 0) {
        // Who does not wait any more has given up.
        let _ = rows.send((Instant::now(), text));
        let _ = std::io::copy(&mut stdout, &mut std::io::sink());
    }
}

fn all_lines(stderr: impl Read, lines: &SyncSender<Line>) {
    for text in BufReader::new(stderr).lines().map_while(Result::ok) {
        let _ = lines.try_send((Instant::now(), text));
    }
}

fn log(lines: &Receiver<Line>) -> String {
    lines.try_iter().map(|(_, text)| text + "\n").collect()
}

/// The second column of a printed row: `+U[7, 2, …]` has 2 there.
fn rows_so_far(text: &str) -> Option<u64> {
    text.split_once('[')?.1.split(", ").nth(1)?.trim_end_matches([']', '\n']).parse().ok()
}

/// When the first entry of this kind was written after the process was started.
fn written_at(log: &CheckpointLog, event: &str, start: SystemTime) -> Result<Option<SystemTime>> {
    /// Times of files may be as coarse as this.
    const TICK: Duration = Duration::from_millis(10);
    for (path, entry) in &log.entries {
        if entry["event"]["type"] != event {
            continue;
        }
        let at =
            fs::metadata(path).and_then(|m| m.modified()).with_context(|| format!("look at {}", path.display()))?;
        if at + TICK > start {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_printed_row_tells_how_many_rows_its_key_has_had() {
        assert_eq!(rows_so_far("+U[4437989, 2, 1068326, 485211, 583115, 534163]\n"), Some(2));
        assert_eq!(rows_so_far("+I[32, 1]\n"), Some(1));
        assert_eq!(rows_so_far("no row\n"), None);
    }

    #[test]
    fn entries_from_before_the_start_do_not_count() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut log = CheckpointLog::default();
        let start = SystemTime::now();
        for (n, (event, from_start)) in
            [("opened", -60), ("completed", -50), ("opened", 1), ("opened", 2)].into_iter().enumerate()
        {
            let path: PathBuf = folder.path().join(n.to_string());
            let file = fs::File::create(&path)?;
            let by = Duration::from_secs(i64::unsigned_abs(from_start));
            file.set_modified(if from_start < 0 { start - by } else { start + by })?;
            log.entries.push((path, json!({ "event": { "type": event } })));
        }
        assert_eq!(written_at(&log, "opened", start)?, Some(start + Duration::from_secs(1)));
        assert_eq!(written_at(&log, "completed", start)?, None);
        Ok(())
    }

    #[test]
    fn the_first_line_is_passed_on_and_the_rest_read() -> Result<()> {
        let (rows, row) = sync_channel(1);
        first_line("one\ntwo\n".as_bytes(), &rows);
        assert_eq!(row.recv()?.1, "one\n");
        let (rows, row) = sync_channel::<Line>(1);
        first_line("".as_bytes(), &rows);
        drop(rows);
        assert!(row.recv().is_err());
        Ok(())
    }
}
