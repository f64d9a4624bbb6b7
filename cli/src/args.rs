//! The command line. Declarations only.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use floodmark_snapshot::restore::Reference;
use floodmark_worker::leadership::Whereabouts;

const EXIT_CODES: &str = "\
Exit codes:
    0  done: all input processed, or stopped when asked to
    1  the job failed, or can't do what it was asked
    2  bad input: usage, manifest, SQL, or a table that can't be read or written as declared
    3  fenced: a newer process has taken the job over
    4  the storage can't be used, or its checkpoints don't allow a start
  130  ended at once by a second Ctrl-C";

/// Stateful stream processing in SQL, exactly once.
#[derive(Debug, Parser)]
#[command(name = "floodmark", version, about, after_help = EXIT_CODES)]
pub(crate) struct Args {
    /// What to log, such as `debug` or `warn,floodmark_worker=trace`; default: the variable RUST_LOG, else `info`
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log_level: Option<String>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a job in this process, from its newest checkpoint if it has one
    #[command(after_help = EXIT_CODES)]
    Run(RunArgs),
    /// Coordinate a job whose subtasks run in other processes, `floodmark worker`
    #[command(after_help = EXIT_CODES)]
    Coordinator(CoordinatorArgs),
    /// Run subtasks of a job for its coordinator, until told to stop
    #[command(after_help = EXIT_CODES)]
    Worker(WorkerArgs),
    /// Check a job and show its dataflow, without running it
    Check(CheckArgs),
    /// Ask the process that runs a job for a savepoint; prints its location
    #[command(after_help = EXIT_CODES)]
    Savepoint(SavepointArgs),
    /// Show where a job that runs stands: its tasks and what they do, its checkpoints, its last failure
    #[command(after_help = EXIT_CODES)]
    Status(StatusArgs),
    /// Ask a job that runs to go on at another parallelism, with its processes kept
    #[command(after_help = EXIT_CODES)]
    Rescale(RescaleArgs),
    /// Show what a snapshot's state would become in a job, without starting it; exit code 4 if it does not fit
    #[command(after_help = EXIT_CODES)]
    Plan(PlanArgs),
    /// Query the state inside a snapshot with SQL
    #[command(subcommand, after_help = EXIT_CODES)]
    State(StateCommand),
    /// List, show, verify and delete a job's checkpoints and savepoints
    #[command(subcommand, after_help = EXIT_CODES)]
    Checkpoints(CheckpointsCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum StateCommand {
    /// Run one SELECT (in SQLite's dialect) over a snapshot: a table per operator with keyed state, named by its uid in double
    /// quotes, and the tables operators, sources and shards
    Query(StateQueryArgs),
    /// List the tables of a snapshot with their columns
    Tables(SnapshotNamed),
}

#[derive(Debug, clap::Args)]
pub(crate) struct SnapshotNamed {
    /// The location of a snapshot; with --job also `latest`, the number of a checkpoint, or the name of a savepoint
    #[arg(value_name = "SNAPSHOT")]
    pub(crate) snapshot: String,

    /// The manifest of the job whose snapshot it is
    #[arg(long, value_name = "JOB.yaml")]
    pub(crate) job: Option<PathBuf>,

    /// Where the job keeps its snapshots; overrides the manifest
    #[arg(long, value_name = "URL", requires = "job")]
    pub(crate) storage: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct StateQueryArgs {
    #[command(flatten)]
    pub(crate) of: SnapshotNamed,

    /// What to ask
    #[arg(value_name = "SQL")]
    pub(crate) sql: String,

    /// How to print the answer
    #[arg(long, value_enum, default_value_t = QueryOutput::Table)]
    pub(crate) output: QueryOutput,
}

/// How the answer to a query is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum QueryOutput {
    /// Aligned columns
    Table,
    /// An array of objects
    Json,
    /// A header and a line per row
    Csv,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    /// The manifest of the job as it shall run: a file with one StreamJob, or `-` for standard input
    #[arg(value_name = "JOB.yaml")]
    pub(crate) job: PathBuf,

    /// The snapshot to start from, as `run --restore` takes it. Default: what `run` would start from
    #[arg(long, value_name = "SNAPSHOT", value_parser = snapshot)]
    pub(crate) from: Option<Reference>,

    /// Where the job keeps its snapshots; overrides the manifest, as for `run`
    #[arg(long, value_name = "URL")]
    pub(crate) storage: Option<String>,

    /// Number of parallel subtasks; overrides the manifest
    #[arg(long, value_name = "N")]
    pub(crate) parallelism: Option<u32>,

    /// Also ask the sources which partitions or files are new, or gone
    #[arg(long)]
    pub(crate) online: bool,

    /// How to print the plan
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub(crate) output: Output,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SavepointArgs {
    /// The manifest of the job: a file with one StreamJob, or `-` for standard input
    #[arg(value_name = "JOB.yaml")]
    pub(crate) job: PathBuf,

    /// The savepoint's name, unique in the job. Default: the time, such as 2026-11-21T10-33-12
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,

    /// Stop the job with the savepoint: nothing is processed after it
    #[arg(long)]
    pub(crate) stop: bool,

    /// Stop the job with the savepoint, after event time has gone to its end: all open windows fire
    #[arg(long, conflicts_with = "stop")]
    pub(crate) drain: bool,

    /// Where the job keeps its snapshots; overrides the manifest, as for `run`
    #[arg(long, value_name = "URL")]
    pub(crate) storage: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) of: CheckpointsArgs,

    /// Print one JSON object: the answers of the job's HTTP interface to /job, /job/graph and /checkpoints
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RescaleArgs {
    /// The manifest of the job: a file with one StreamJob, or `-` for standard input
    #[arg(value_name = "JOB.yaml")]
    pub(crate) job: PathBuf,

    /// Subtasks per task from then on
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) parallelism: u32,

    /// Where the job keeps its snapshots; overrides the manifest, as for `run`
    #[arg(long, value_name = "URL")]
    pub(crate) storage: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointsCommand {
    /// List what a job can start from: its checkpoints, oldest first, and its savepoints, with their locations
    List(CheckpointsArgs),
    /// Print a checkpoint's manifest, as JSON
    Show(CheckpointArgs),
    /// Read every byte of a checkpoint back and compare it with what was written; exit code 4 if any differs
    Verify(CheckpointArgs),
    /// Delete a checkpoint, a savepoint, or all that a job that doesn't run has left; says what, and asks
    Delete(DeleteArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct CheckpointsArgs {
    /// The manifest of the job: a file with one StreamJob, or `-` for standard input
    #[arg(value_name = "JOB.yaml")]
    pub(crate) job: PathBuf,

    /// Where the checkpoints are; overrides the manifest
    #[arg(long, value_name = "URL")]
    pub(crate) storage: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CheckpointArgs {
    #[command(flatten)]
    pub(crate) of: SnapshotArgs,

    /// Which checkpoint; default: the newest (verify: all)
    #[arg(long, value_name = "N")]
    pub(crate) epoch: Option<u64>,

    /// Which savepoint
    #[arg(long, value_name = "NAME", conflicts_with = "epoch")]
    pub(crate) savepoint: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SnapshotArgs {
    /// The manifest of the job, or in its place the location of a snapshot: a URL, a folder, or an entry of a log
    #[arg(value_name = "JOB.yaml|LOCATION")]
    pub(crate) job: PathBuf,

    /// Where the checkpoints are; overrides the manifest
    #[arg(long, value_name = "URL")]
    pub(crate) storage: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DeleteArgs {
    #[command(flatten)]
    pub(crate) of: CheckpointsArgs,

    #[command(flatten)]
    pub(crate) what: DeleteWhat,

    /// With --all: savepoints too
    #[arg(long, requires = "all")]
    pub(crate) savepoints: bool,

    /// Don't ask
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct DeleteWhat {
    /// This checkpoint
    #[arg(long, value_name = "N")]
    pub(crate) epoch: Option<u64>,

    /// This savepoint
    #[arg(long, value_name = "NAME")]
    pub(crate) savepoint: Option<String>,

    /// Everything but savepoints: the job begins anew
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// The manifest: a file with one StreamJob, or `-` for standard input
    #[arg(value_name = "JOB.yaml")]
    pub(crate) job: PathBuf,

    /// Where checkpoints are kept: s3://bucket/folder, file:///folder, a path, or memory://; overrides the manifest.
    /// Default: the folder floodmark-data in the current directory
    #[arg(long, value_name = "URL")]
    pub(crate) storage: Option<String>,

    /// What to start from: `latest` (the newest intact checkpoint, or nothing if there never was one), `none` (nothing, even
    /// if there are checkpoints), the number of a checkpoint, the name of a savepoint, or the location of a savepoint or of
    /// another job's checkpoints. Started again with the same words, the job goes on from its newest checkpoint.
    /// Default: as the manifest says, else `latest`
    #[arg(long, value_name = "SNAPSHOT", value_parser = snapshot)]
    pub(crate) restore: Option<Reference>,

    /// Where state back end RocksDB works: on a local disk with room for twice the state. Nothing in it outlives the process.
    /// Default: the folder floodmark-work in the system's folder for temporary files
    #[arg(long, value_name = "DIR")]
    pub(crate) work_dir: Option<PathBuf>,

    /// Where copies of uploaded state are kept, up to 8 GiB, so that a restart of the job need not read them from a storage that is
    /// elsewhere: on a local disk, the same as the one of --work-dir if state is kept in RocksDB. Nothing in it outlives the process.
    /// Default: as --work-dir
    #[arg(long, value_name = "DIR")]
    pub(crate) local_dir: Option<PathBuf>,

    /// What to print at the end: `json` is one JSON object, the last line of standard output
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub(crate) output: Output,

    /// Number of parallel subtasks; overrides the manifest
    #[arg(long, value_name = "N")]
    pub(crate) parallelism: Option<u32>,

    /// Run the subtasks in so many processes of their own on this machine; one that dies is replaced, and the job goes on from
    /// its newest checkpoint. Default: all in this process
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) workers: Option<u32>,

    #[command(flatten)]
    pub(crate) http: HttpArgs,
}

#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct HttpArgs {
    /// Where to answer HTTP over TCP: host:port, such as 0.0.0.0:8080. Whoever reaches it may read; see docs/api.md.
    /// Default: only the job's Unix socket
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen_http: Option<String>,

    /// A file with the token that changes over TCP need: one word, read anew for each, so that it can be replaced. Default:
    /// nothing can be changed over TCP
    #[arg(long, value_name = "FILE", requires = "listen_http")]
    pub(crate) http_token_file: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CoordinatorArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,

    /// Where to listen for workers: host:port
    #[arg(long, value_name = "ADDRESS", conflicts_with = "workers")]
    pub(crate) listen: String,

    /// Share the job with other coordinators on this machine: whoever locks this file runs it, the others stand by and take
    /// over when that one dies or stands still. The file says where the leader listens; workers read it: `--coordinator @FILE`
    #[arg(long, value_name = "FILE")]
    pub(crate) standby_lock: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) lease: LeaseArgs,

    /// The folder with this process's certificate (tls.crt), its key (tls.key) and the job's authority (ca.crt)
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct LeaseArgs {
    /// Run the job only while this process holds the Lease of this name in its pod's namespace of a Kubernetes cluster, which also
    /// says what becomes of the run. When the run has ended, the process stays; SIGTERM hands the job over as it is, without a
    /// last checkpoint. Reads POD_NAME (or HOSTNAME), POD_NAMESPACE and POD_IP
    #[arg(long, value_name = "NAME", requires = "run_number", conflicts_with = "standby_lock")]
    pub(crate) lease: Option<String>,

    /// The number of the run: it leads when the Lease's annotation floodmark.io/run is the same
    #[arg(long = "run", value_name = "N", requires = "lease", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) run_number: Option<u64>,

    /// Another coordinator of the run stands by, or this one does: renew the Lease each second, so that it is taken over after
    /// 3 s, not 30 s
    #[arg(long, requires = "lease")]
    pub(crate) standby: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct WorkerArgs {
    /// The manifest of the job, the same that its coordinator has
    #[arg(value_name = "JOB.yaml")]
    pub(crate) job: PathBuf,

    /// Where the job's coordinator listens: host:port; several with commas between, of which one coordinates at a time; or
    /// `@FILE`, the coordinators' --standby-lock, which says it
    #[arg(long, value_name = "ADDRESS", value_parser = whereabouts)]
    pub(crate) coordinator: Whereabouts,

    /// Where to listen for other workers: host:port, of a host that they can reach; port 0 is any that is free
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: String,

    /// The folder with this process's certificate (tls.crt), its key (tls.key) and the job's authority (ca.crt)
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: PathBuf,

    /// How many subtasks of each task to run side by side
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) slots: u32,

    /// Where checkpoints are kept; overrides the manifest, as for the coordinator
    #[arg(long, value_name = "URL")]
    pub(crate) storage: Option<String>,

    /// Where state back end RocksDB works, as for `run`
    #[arg(long, value_name = "DIR")]
    pub(crate) work_dir: Option<PathBuf>,

    /// Where copies of uploaded state are kept, as for `run`
    #[arg(long, value_name = "DIR")]
    pub(crate) local_dir: Option<PathBuf>,

    /// Where to answer HTTP over TCP: host:port. It has metrics and health, and nothing that changes anything; see docs/api.md
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen_http: Option<String>,

    /// End with this process, which has started it
    #[arg(long, value_name = "PID", hide = true)]
    pub(crate) parent: Option<i32>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CheckArgs {
    /// The manifest: a file with one StreamJob, or `-` for standard input
    #[arg(value_name = "JOB.yaml")]
    pub(crate) job: PathBuf,

    /// Also check that sources can be read, sinks and storage written
    #[arg(long)]
    pub(crate) online: bool,
}

fn whereabouts(text: &str) -> Result<Whereabouts, String> {
    text.parse().map_err(|e: floodmark_snapshot::Error| e.to_string())
}

fn snapshot(text: &str) -> Result<Reference, String> {
    text.parse().map_err(|e: floodmark_snapshot::Error| e.to_string())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Lines for people
    Text,
    /// One JSON object on standard output
    Json,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_declarations_are_consistent() {
        Args::command().debug_assert();
    }
}
