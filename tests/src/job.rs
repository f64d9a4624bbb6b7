//! A job as a child process: its manifest in a folder, the program started on it, ended and restarted, its log and summary.
//!
//! Invariant: no child outlives its [`Run`]; dropping one kills it and waits for it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;
use serde_json::Value;

/// Names the program to test.
const BIN_VARIABLE: &str = "FLOODMARK_BIN";
/// Makes the kernel kill a child when the thread that started it dies, on systems that have it.
const LEASH: &str = "/usr/bin/setpriv";
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);
/// Characters of a log that an error shows, from its end.
const LOG_SHOWN_MAX: usize = 6_000;
/// A run that must end by itself gets this long: far more than any needs.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// The program: what `FLOODMARK_BIN` names, else `release/floodmark` in the target folder that holds this executable.
///
/// # Errors
/// When there is none.
pub fn floodmark() -> Result<PathBuf> {
    let named = std::env::var_os(BIN_VARIABLE).map(PathBuf::from);
    let beside = || {
        let own = std::env::current_exe().ok()?;
        own.ancestors().skip(1).map(|folder| folder.join("release/floodmark")).find(|program| program.exists())
    };
    let program = named.or_else(beside);
    let program = program.context("there is no floodmark program: run 'make build', or set FLOODMARK_BIN")?;
    ensure!(program.exists(), "{} does not exist: run 'make build', or set FLOODMARK_BIN", program.display());
    Ok(program)
}

/// A manifest and how to run it.
pub struct Job {
    folder: PathBuf,
    /// `metadata.name`.
    pub name: String,
    /// `spec.sql`.
    pub sql: String,
    /// `spec.parallelism`.
    pub parallelism: u32,
    /// `spec.checkpoints.interval`.
    pub interval: String,
    /// `spec.checkpoints.mode`.
    pub mode: String,
    /// `--storage`.
    pub storage: String,
    /// `--restore none` instead of the default.
    pub from_nothing: bool,
    /// `--restore`, unless `from_nothing`.
    pub restore: Option<String>,
    /// `--workers`.
    pub workers: Option<u32>,
    /// Further lines of `spec`, indented by two.
    pub spec: String,
    /// Variables of the child.
    pub env: BTreeMap<String, String>,
    runs: AtomicU32,
}

impl Job {
    /// An exactly-once job with a checkpoint each second. Manifest, logs and storage are in `folder`.
    #[must_use]
    pub fn new(folder: &Path, name: &str, sql: impl Into<String>) -> Self {
        Self {
            folder: folder.to_owned(),
            name: name.to_owned(),
            sql: sql.into(),
            parallelism: 2,
            interval: "1s".to_owned(),
            mode: "ExactlyOnce".to_owned(),
            storage: folder.join("storage").display().to_string(),
            from_nothing: false,
            restore: None,
            workers: None,
            spec: String::new(),
            env: BTreeMap::new(),
            runs: AtomicU32::new(0),
        }
    }

    /// The manifest's text.
    #[must_use]
    pub fn manifest(&self) -> String {
        let sql = self.sql.lines().map(|line| format!("    {line}\n")).collect::<String>();
        format!(
            "apiVersion: floodmark.io/v1alpha1\nkind: StreamJob\nmetadata:\n  name: {}\nspec:\n  parallelism: {}\n{}  \
             checkpoints:\n    interval: {}\n    mode: {}\n  sql: |\n{sql}",
            self.name, self.parallelism, self.spec, self.interval, self.mode
        )
    }

    /// Starts the job. `crash` is a value of `FLOODMARK_CRASH`.
    ///
    /// # Errors
    /// When the process can't be started.
    pub fn start_with(&self, crash: Option<&str>) -> Result<Run> {
        let path = self.write_manifest()?;
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        let run = Paths::of(&self.folder, &self.name, number);
        let mut arguments = vec!["run".into(), path.into_os_string(), "--output".into(), "json".into()];
        arguments.extend(["--storage".into(), self.storage.clone().into()]);
        if self.from_nothing {
            arguments.extend(["--restore".into(), "none".into()]);
        } else if let Some(snapshot) = &self.restore {
            arguments.extend(["--restore".into(), snapshot.into()]);
        }
        if let Some(workers) = self.workers {
            arguments.extend(["--workers".into(), workers.to_string().into()]);
        }
        let mut command = leashed(&floodmark()?);
        command.args(arguments).envs(&self.env);
        match crash {
            Some(point) => command.env("FLOODMARK_CRASH", point),
            None => command.env_remove("FLOODMARK_CRASH"),
        };
        run.start(command)
    }

    fn write_manifest(&self) -> Result<PathBuf> {
        let path = self.folder.join(format!("{}.yaml", self.name));
        let manifest = self.manifest();
        // Left alone as long as it is right: another process of the job may just be reading it.
        if fs::read_to_string(&path).ok().as_ref() != Some(&manifest) {
            fs::write(&path, manifest).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(path)
    }

    /// Runs `floodmark` with these words, in which `JOB` stands for the job's manifest and `STORAGE` for its storage.
    ///
    /// # Errors
    /// When it can't be started, or doesn't end within [`PATIENCE`].
    pub fn command(&self, words: &[&str]) -> Result<Ended> {
        self.start_command(words)?.wait(PATIENCE)
    }

    /// As [`Job::command`], without waiting for its end.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start_command(&self, words: &[&str]) -> Result<Run> {
        self.start_under(&[], &format!("{}-command", self.name), words)
    }

    /// As [`Job::start_command`], behind the words of another program that runs it, and with a name for its log.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start_under(&self, prefix: &[String], name: &str, words: &[&str]) -> Result<Run> {
        let manifest = self.write_manifest()?.display().to_string();
        let floodmark = floodmark()?;
        let mut command = leashed(prefix.first().map_or(floodmark.as_path(), Path::new));
        if let Some((_, others)) = prefix.split_first() {
            command.args(others).arg(&floodmark);
        }
        let words = words.iter().map(|word| match *word {
            "JOB" => manifest.as_str(),
            "STORAGE" => self.storage.as_str(),
            word => word,
        });
        command.args(words).current_dir(&self.folder).envs(&self.env).env_remove("FLOODMARK_CRASH");
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        Paths::of(&self.folder, name, number).start(command)
    }

    /// Starts the job.
    ///
    /// # Errors
    /// When the process can't be started.
    pub fn start(&self) -> Result<Run> {
        self.start_with(None)
    }

    /// Runs the job until it ends by itself.
    ///
    /// # Errors
    /// When it doesn't within [`PATIENCE`].
    pub fn run(&self) -> Result<Ended> {
        self.start()?.wait(PATIENCE)
    }

    /// The folder of the job's checkpoints, for storage on local disk.
    #[must_use]
    pub fn checkpoint_folder(&self) -> PathBuf {
        Path::new(&self.storage).join("default").join(&self.name).join("local")
    }

    /// The checkpoint log as it stands now, for storage on local disk.
    ///
    /// # Errors
    /// When an entry can't be read.
    pub fn log(&self) -> Result<CheckpointLog> {
        CheckpointLog::read(&self.checkpoint_folder().join("log"))
    }
}

/// Runs `floodmark` with arguments of one's own, in `folder`.
///
/// # Errors
/// When it can't be started, or doesn't end within [`PATIENCE`].
pub fn run_with(folder: &Path, arguments: &[&str]) -> Result<Ended> {
    let mut command = leashed(&floodmark()?);
    command.args(arguments).current_dir(folder).env_remove("FLOODMARK_CRASH");
    Paths::of(folder, "command", 0).start(command)?.wait(PATIENCE)
}

fn leashed(program: &Path) -> Command {
    if !Path::new(LEASH).exists() {
        return Command::new(program);
    }
    let mut command = Command::new(LEASH);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Where a run's output goes.
struct Paths {
    log: PathBuf,
    stdout: PathBuf,
}

impl Paths {
    fn of(folder: &Path, name: &str, number: u32) -> Self {
        let path = |ending: &str| folder.join(format!("{name}-{number:03}.{ending}"));
        Self { log: path("log"), stdout: path("out") }
    }

    fn start(self, mut command: Command) -> Result<Run> {
        let create = |path: &Path| File::create(path).with_context(|| format!("create {}", path.display()));
        command.stdin(Stdio::null()).stdout(create(&self.stdout)?).stderr(create(&self.log)?);
        let child = command.spawn().context("start floodmark")?;
        Ok(Run { child, paths: self, started: Instant::now(), ended: None })
    }
}

/// A process that runs, or has run, a job.
pub struct Run {
    child: Child,
    paths: Paths,
    started: Instant,
    ended: Option<ExitStatus>,
}

impl Run {
    /// Since its start.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// The process's id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processes that run its subtasks at this moment, if it has any of their own.
    ///
    /// # Errors
    /// When the system doesn't tell.
    pub fn worker_pids(&self) -> Result<Vec<Pid>> {
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc").context("list processes")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            // One that has ended meanwhile has no files any more.
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
            if parent == Some(self.child.id()) {
                pids.push(Pid::from_raw(pid));
            }
        }
        Ok(pids)
    }

    /// Sends a signal; a process that has ended already is no error.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.ended.is_some() {
            return Ok(());
        }
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, signal).with_context(|| format!("send {signal} to process {pid}"))
    }

    /// Ends it with SIGKILL, wherever it is.
    ///
    /// # Errors
    /// When it had ended before, by itself.
    pub fn kill(mut self) -> Result<Ended> {
        self.signal(Signal::SIGKILL)?;
        let ended = self.wait_for_end(Duration::from_secs(10))?;
        ensure!(ended.killed(), "it ended before it could be killed: {ended}");
        Ok(ended)
    }

    /// Its log so far.
    #[must_use]
    pub fn log(&self) -> String {
        read_lossy(&self.paths.log)
    }

    /// The worker of each slice, by name, as this coordinator has said last; empty if it has not.
    #[must_use]
    pub fn placement(&self) -> Vec<String> {
        let log = self.log();
        let last = log.lines().rev().find_map(|line| line.split_once("slices run on "));
        last.into_iter().flat_map(|(_, workers)| workers.split(", ")).map(str::to_owned).collect()
    }

    /// Whether it has not ended yet.
    ///
    /// # Errors
    /// When the system can't tell.
    pub fn is_running(&mut self) -> Result<bool> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().context("wait for floodmark")?;
        }
        Ok(self.ended.is_none())
    }

    /// Waits until `condition` holds while it runs.
    ///
    /// # Errors
    /// When it ends before, or after `patience`.
    pub fn until(&mut self, what: &str, patience: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        loop {
            let running = self.is_running()?;
            if condition()? {
                return Ok(());
            }
            if !running {
                bail!("it ended before {what}: {}", self.ended_now()?);
            }
            ensure!(start.elapsed() < patience, "not {what} within {patience:?}; its log:\n{}", tail(&self.log()));
            sleep(POLL);
        }
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When it doesn't within `patience`.
    pub fn wait(mut self, patience: Duration) -> Result<Ended> {
        self.wait_for_end(patience)
    }

    fn wait_for_end(&mut self, patience: Duration) -> Result<Ended> {
        let start = Instant::now();
        while self.is_running()? {
            ensure!(start.elapsed() < patience, "it did not end within {patience:?}; its log:\n{}", tail(&self.log()));
            sleep(POLL);
        }
        self.ended_now()
    }

    fn ended_now(&self) -> Result<Ended> {
        let status = self.ended.context("it has not ended")?;
        let stdout = read_lossy(&self.paths.stdout);
        let summary = stdout.lines().last().and_then(|line| serde_json::from_str(line).ok());
        Ok(Ended { code: status.code(), signal: status.signal(), summary, stdout, log: self.log() })
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // A child that has been waited for is not there to be killed.
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn read_lossy(path: &Path) -> String {
    fs::read(path).map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn tail(log: &str) -> &str {
    let from = (log.len().saturating_sub(LOG_SHOWN_MAX)..log.len()).find(|i| log.is_char_boundary(*i));
    &log[from.unwrap_or(0)..]
}

/// What `--output json` says. Counts are of one run.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// `finished`, `stopped`, `alreadyFinished`, `failed`, `fenced` or `refused`.
    pub outcome: String,
    /// Epoch of the checkpoint that it started from.
    pub restored_from: Option<u64>,
    /// Rows read, by table.
    pub rows_in: BTreeMap<String, u64>,
    /// Rows written, by table.
    pub rows_out: BTreeMap<String, u64>,
    /// Rows that came too late for their window.
    pub late: u64,
    /// Records that could not be decoded.
    pub bad: u64,
    /// Its checkpoints.
    pub checkpoints: Checkpoints,
    /// User and system time.
    pub cpu_seconds: f64,
    /// Time from start to end.
    pub wall_seconds: f64,
}

/// See [`Summary::checkpoints`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Checkpoints {
    /// Completed by this run.
    pub completed: u64,
    /// Given up.
    pub failed: u64,
    /// Epoch of the newest.
    pub last_epoch: Option<u64>,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its exit code, if it ended by itself.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Its summary, if it came to that.
    pub summary: Option<Summary>,
    /// Its standard output.
    pub stdout: String,
    /// All that it logged.
    pub log: String,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exit code {code}")?,
            (None, Some(signal)) => write!(f, "signal {signal}")?,
            (None, None) => write!(f, "unknown end")?,
        }
        write!(f, "; its log:\n{}", tail(&self.log))
    }
}

impl Ended {
    /// Whether SIGKILL ended it.
    #[must_use]
    pub fn killed(&self) -> bool {
        self.signal == Some(Signal::SIGKILL as i32)
    }

    /// The summary of a run that ended well, with this outcome.
    ///
    /// # Errors
    /// When it didn't.
    pub fn ok(&self, outcome: &str) -> Result<&Summary> {
        ensure!(self.code == Some(0), "the job failed: {self}");
        ensure!(!self.log.contains("panicked"), "something panicked: {self}");
        let summary = self.summary.as_ref().with_context(|| format!("no summary: {self}"))?;
        ensure!(summary.outcome == outcome, "outcome {} instead of {outcome}: {self}", summary.outcome);
        Ok(summary)
    }

    /// The standard output of a command that succeeded, without the last line's end.
    ///
    /// # Errors
    /// When it failed.
    pub fn said(&self) -> Result<&str> {
        ensure!(self.code == Some(0), "the command failed: {self}");
        Ok(self.stdout.trim_end())
    }

    /// Checks that it failed with this exit code, and that it said all of `words` and did not panic.
    ///
    /// # Errors
    /// When it didn't.
    pub fn refused(&self, code: i32, words: &[&str]) -> Result<()> {
        ensure!(self.code == Some(code), "expected exit code {code}: {self}");
        ensure!(!self.log.contains("panicked"), "something panicked: {self}");
        for word in words {
            ensure!(self.log.contains(word), "expected it to say '{word}': {self}");
        }
        Ok(())
    }

    /// Epoch of the checkpoint that it said it started from.
    #[must_use]
    pub fn restored_from(&self) -> Option<u64> {
        let line =
            self.log.lines().find(|line| line.contains("restored the newest") || line.contains("restored an older"))?;
        let digits = line.rsplit_once("checkpoint=")?.1;
        digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    }
}

/// The checkpoint log as its files have it, read as plain JSON.
#[derive(Debug, Default)]
pub struct CheckpointLog {
    /// Files and their entries, oldest first.
    pub entries: Vec<(PathBuf, Value)>,
}

impl CheckpointLog {
    /// Reads a folder; one that is not there is an empty log.
    ///
    /// # Errors
    /// When a file is no entry.
    pub fn read(folder: &Path) -> Result<Self> {
        let Ok(files) = fs::read_dir(folder) else { return Ok(Self::default()) };
        let mut paths: Vec<_> = files.filter_map(|f| Some(f.ok()?.path())).collect();
        paths.retain(|p| p.extension().is_some_and(|e| e == "json"));
        paths.sort();
        let mut entries = Vec::new();
        for path in paths {
            // An entry may be trimmed away between the listing and here.
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let file: Value = serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))?;
            entries.push((path, file["entry"].clone()));
        }
        Ok(Self { entries })
    }

    /// Files and manifests of the completed checkpoints, oldest first.
    pub fn completed(&self) -> impl DoubleEndedIterator<Item = (&Path, &Value)> {
        let completed = self.entries.iter().filter(|(_, entry)| entry["event"]["type"] == "completed");
        completed.map(|(path, entry)| (path.as_path(), &entry["event"]["manifest"]))
    }

    /// Epoch of the newest checkpoint whose output is known to be visible; 0 if there is none.
    #[must_use]
    pub fn last_committed(&self) -> u64 {
        let committed = self.entries.iter().filter(|(_, entry)| entry["event"]["type"] == "committed");
        committed.filter_map(|(_, entry)| entry["event"]["epoch"].as_u64()).max().unwrap_or(0)
    }

    /// Epoch of the newest completed checkpoint; 0 if there is none.
    #[must_use]
    pub fn last_epoch(&self) -> u64 {
        self.completed().next_back().and_then(|(_, manifest)| manifest["epoch"].as_u64()).unwrap_or(0)
    }

    /// Positions of the splits of source table `table` in the newest completed checkpoint, by split.
    #[must_use]
    pub fn positions(&self, table: &str) -> BTreeMap<String, Value> {
        let Some((_, manifest)) = self.completed().next_back() else { return BTreeMap::new() };
        let splits = manifest["operators"][format!("source:{table}")]["splits"].as_array();
        let named = |split: &Value| Some((split["split"].as_str()?.to_owned(), split["position"].clone()));
        splits.into_iter().flatten().filter_map(named).collect()
    }

    /// Paths, relative to the job's folder, of the shards of the newest completed checkpoint that the one before does not name.
    #[must_use]
    pub fn shards_of_newest_alone(&self) -> Vec<String> {
        let mut manifests = self.completed().rev().map(|(_, manifest)| manifest);
        let Some(newest) = manifests.next() else { return Vec::new() };
        let before = manifests.next().map_or_else(Vec::new, shards_of);
        shards_of(newest).into_iter().filter(|path| !before.contains(path)).collect()
    }

    /// Paths, relative to the job's folder, of the shards that all completed checkpoints name.
    #[must_use]
    pub fn shared_shards(&self) -> Vec<String> {
        let all: Vec<Vec<String>> = self.completed().map(|(_, manifest)| shards_of(manifest)).collect();
        let Some((first, others)) = all.split_first() else { return Vec::new() };
        first.iter().filter(|path| others.iter().all(|o| o.contains(path))).cloned().collect()
    }
}

fn shards_of(manifest: &Value) -> Vec<String> {
    let operators = manifest["operators"].as_object();
    let shards = operators.into_iter().flat_map(|o| o.values()).filter_map(|o| o["shards"].as_array()).flatten();
    shards.filter_map(|s| s["path"].as_str().map(str::to_owned)).collect()
}

/// Turns over one bit in the middle of a file.
///
/// # Errors
/// When the file can't be read or written, or is empty.
pub fn flip_a_byte(path: &Path) -> Result<()> {
    let mut bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let middle = bytes.len() / 2;
    let byte = bytes.get_mut(middle).with_context(|| format!("{} is empty", path.display()))?;
    *byte ^= 1;
    fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
}

/// The lines of all published files in a folder and the folders in it, file by file in the order of their names.
///
/// # Errors
/// When they can't be read.
pub fn lines_of(folder: &Path) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut paths: Vec<_> = match fs::read_dir(folder) {
        Ok(files) => files.map(|f| Ok(f?.path())).collect::<Result<_>>()?,
        Err(_) => return Ok(lines),
    };
    paths.sort();
    for path in paths {
        // A process that is killed while it publishes leaves `name.json#1` behind: what has another ending is not published.
        let unpublished = |n: &str| n.starts_with('.') || n.rsplit_once('#').is_some();
        let hidden = path.file_name().is_some_and(|n| unpublished(&n.to_string_lossy()));
        if path.is_dir() {
            lines.extend(lines_of(&path)?);
        } else if !hidden {
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            lines.extend(text.lines().map(str::to_owned));
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_holds_the_sql_indented() {
        let mut job = Job::new(Path::new("/tmp/x"), "hot", "SELECT 1;\nSELECT 2;");
        job.parallelism = 4;
        assert_eq!(
            job.manifest(),
            "apiVersion: floodmark.io/v1alpha1\nkind: StreamJob\nmetadata:\n  name: hot\nspec:\n  parallelism: 4\n  \
             checkpoints:\n    interval: 1s\n    mode: ExactlyOnce\n  sql: |\n    SELECT 1;\n    SELECT 2;\n"
        );
    }

    #[test]
    fn the_log_is_read_as_json() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let entry = |seq: u64, event: Value| {
            let file = serde_json::json!({ "format": 1, "crc32c": "0", "entry": { "seq": seq, "event": event } });
            fs::write(folder.path().join(format!("{seq:020}.json")), file.to_string())
        };
        let splits = serde_json::json!([{ "split": "orders-0", "position": { "offset": 5 } }]);
        let operators = serde_json::json!({
            "source:orders": { "splits": splits },
            "totals/group-aggregate-1": { "shards": [{ "path": "blobs/1/x.state" }] },
        });
        entry(0, serde_json::json!({ "type": "opened" }))?;
        entry(1, serde_json::json!({ "type": "completed", "manifest": { "epoch": 3, "operators": {} } }))?;
        entry(2, serde_json::json!({ "type": "completed", "manifest": { "epoch": 4, "operators": operators } }))?;
        let log = CheckpointLog::read(folder.path())?;
        assert_eq!((log.entries.len(), log.last_epoch()), (3, 4));
        assert_eq!(log.shards_of_newest_alone(), ["blobs/1/x.state"]);
        assert_eq!(log.positions("orders")["orders-0"]["offset"], 5);
        assert_eq!(CheckpointLog::read(Path::new("/nowhere"))?.last_epoch(), 0);
        Ok(())
    }

    #[test]
    fn where_a_run_started_from_is_in_its_log() {
        let log =
            "INFO job default/x: checkpoints in y\nINFO restored the newest checkpoint checkpoint=17\n".to_owned();
        let ended = Ended { code: None, signal: Some(9), summary: None, stdout: String::new(), log };
        assert!(ended.killed());
        assert_eq!(ended.restored_from(), Some(17));
    }
}
