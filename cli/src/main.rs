//! `floodmark`: runs stream jobs from their manifests, and checks them.
//!
//! Reads arguments and hands over: [`job`] reads manifests and plans them, [`run`] runs them in this process, [`check`] shows
//! what would run, [`checkpoints`] what there is to start from, [`plan`] what would become of it, [`state`] what is in it; [`savepoint`],
//! [`rescale`] and [`status`] ask a running job through [`control`]; [`workers`] are the processes that run a job's subtasks for another. Results go to standard output; logs and progress to standard error.
//!
//! Invariant: every way out ends with one of the codes of [`exit::Exit`], and every failure with a message.

mod args;
mod check;
mod checkpoints;
mod control;
mod crash;
mod display;
mod exit;
mod history;
mod job;
mod last_words;
mod lease;
mod logs;
mod plan;
mod rescale;
mod run;
mod savepoint;
mod screen;
mod signals;
mod state;
mod status;
mod summary;
mod waiting;
mod workers;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
};

use clap::Parser;
use mimalloc::MiMalloc;

use crate::{
    args::{Args, Command},
    exit::{Exit, Failure},
    screen::Screen,
};

/// Batches are made on one thread and freed on another, and a restore takes as much memory as the attempt before it has just freed:
/// libc's allocator gives that back and asks for it again, page by page.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    let args = Args::parse();
    let screen = Screen::new();
    let done = logs::start(args.log_level.as_deref(), &screen).and_then(|()| {
        let command = || match &args.command {
            Command::Run(args) => run::run(args, &screen),
            Command::Coordinator(args) => run::coordinate(args, &screen),
            Command::Worker(args) => workers::worker(args, &screen),
            Command::Check(check) => check::check(check),
            Command::Plan(args) => plan::plan(args),
            Command::Savepoint(args) => savepoint::savepoint(args, &screen),
            Command::Status(args) => status::status(args),
            Command::Rescale(args) => rescale::rescale(args, &screen),
            Command::State(command) => state::state(command),
            Command::Checkpoints(command) => checkpoints::checkpoints(command),
        };
        // The default hook has printed the panic's own message and place by then.
        catch_unwind(AssertUnwindSafe(command)).unwrap_or_else(|_| {
            Err(Failure::new(Exit::JobFailed, "floodmark has a bug: please report the message above with your job"))
        })
    });
    screen.clear();
    match done {
        Ok(exit) => exit.into(),
        Err(failure) => {
            eprintln!("error: {}", failure.message);
            last_words::leave(&failure.message);
            failure.exit.into()
        }
    }
}
