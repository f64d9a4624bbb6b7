//! Writes the custom resource definitions into a folder, or with `--check` compares them with what is there.

use std::{path::Path, process::ExitCode};

use anyhow::{Context, Result, bail};

const HEADER: &str = "# Generated from crds/src by `make generate`: edit the Rust types, not this file.\n";

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (folder, check) = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [folder] => (folder, false),
        ["--check", folder] => (folder, true),
        _ => bail!("usage: crdgen [--check] FOLDER"),
    };
    let definitions = [("streamjob", floodmark_crds::crd()), ("savepoint", floodmark_crds::savepoint_crd())];
    let mut differ = false;
    for (name, definition) in definitions {
        let yaml = format!("{HEADER}{}", serde_yaml::to_string(&definition).context("write the definition as YAML")?);
        let path = Path::new(folder).join(format!("{name}.yaml"));
        if !check {
            std::fs::write(&path, yaml).with_context(|| format!("write {}", path.display()))?;
        } else if std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))? != yaml {
            eprintln!("{} is not what the Rust types say: run `make generate` and commit the result", path.display());
            differ = true;
        }
    }
    Ok(if differ { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
