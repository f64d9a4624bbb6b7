//! Prints the custom resource definitions, or with `--check FILE` compares the file with what it would print.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

const HEADER: &str = "# Generated from crds/src by `make generate`: edit the Rust types, not this file.\n";

fn main() -> Result<ExitCode> {
    let yaml =
        format!("{HEADER}{}", serde_yaml::to_string(&floodmark_crds::crd()).context("write the definition as YAML")?);
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => print!("{yaml}"),
        ["--check", path] => {
            let found = std::fs::read_to_string(path).with_context(|| format!("read {path}"))?;
            if found != yaml {
                eprintln!("{path} is not what the Rust types say: run `make generate` and commit the result");
                return Ok(ExitCode::FAILURE);
            }
        }
        _ => bail!("usage: crdgen [--check FILE]"),
    }
    Ok(ExitCode::SUCCESS)
}
