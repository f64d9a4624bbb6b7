//! The command line. Declarations only.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use floodmark_snapshot::restore::Reference;

const EXIT_CODES: &str = "\
Exit codes:
    0  done: all input processed, or stopped when asked to
    1  the job failed
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
    /// Check a job and show its dataflow, without running it
    Check(CheckArgs),
    /// Look at a job's checkpoints; changes nothing, also while the job runs
    #[command(subcommand, after_help = EXIT_CODES)]
    Checkpoints(CheckpointsCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointsCommand {
    /// List what the log holds: checkpoints, oldest first, and entries that can't be read
    List(CheckpointsArgs),
    /// Print a checkpoint's manifest, as JSON
    Show(CheckpointArgs),
    /// Read every byte of a checkpoint back and compare it with what was written; exit code 4 if any differs
    Verify(CheckpointArgs),
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
    pub(crate) of: CheckpointsArgs,

    /// Which checkpoint; default: the newest (verify: all)
    #[arg(long, value_name = "N")]
    pub(crate) epoch: Option<u64>,
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

    /// What to print at the end: `json` is one JSON object, the last line of standard output
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub(crate) output: Output,

    /// Number of parallel subtasks; overrides the manifest
    #[arg(long, value_name = "N")]
    pub(crate) parallelism: Option<u32>,
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

fn snapshot(text: &str) -> Result<Reference, String> {
    text.parse().map_err(|e: floodmark_snapshot::Error| e.to_string())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// A few lines on standard error
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
