//! Prints the description of a job's HTTP interface, or with `--check FILE` compares the file with what it would print.

use std::process::ExitCode;

use floodmark_worker::api::openapi;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => print!("{}", openapi()),
        ["--check", path] => match std::fs::read_to_string(path) {
            Ok(found) if found == openapi() => {}
            Ok(_) => {
                eprintln!("{path} is not what the Rust types say: run `make generate` and commit the result");
                return ExitCode::FAILURE;
            }
            Err(error) => {
                eprintln!("read {path}: {error}; run `make generate` and commit the result");
                return ExitCode::FAILURE;
            }
        },
        _ => {
            eprintln!("usage: apigen [--check FILE]");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
