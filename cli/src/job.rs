//! The manifests and places that a command line names: reads the file, and has it planned. Touches no source, sink or storage.

use std::{io::Read, path::Path};

use floodmark_admission::{PlanError, job_id};
use floodmark_crds::{ManifestError, StreamJob};
use floodmark_snapshot::{JobId, restore::Reference};

use crate::exit::{Exit, Failure};

/// A job that is ready to run.
pub(crate) use floodmark_admission::Planned as Job;

/// A manifest above this is taken for a mistake, bytes.
const MANIFEST_SIZE_MAX: u64 = 16 << 20;

/// Reads and plans a manifest; `-` is standard input. `parallelism` goes before the manifest's.
pub(crate) fn load(path: &Path, parallelism: Option<u32>) -> Result<Job, Failure> {
    let (mut file, mut manifest) = manifest(path)?;
    let named = file.clone();
    if let Some(parallelism) = parallelism {
        manifest.spec.parallelism = parallelism;
        // The file's own fields are in order.
        file = "--parallelism".to_owned();
    }
    Job::of(&manifest).map_err(|error| match error {
        PlanError::Fields(problems) => Failure::input(ManifestError { file, problems }),
        PlanError::Sql(_) => Failure::input(format!("{named}: {error}")),
    })
}

/// Where checkpoints go if nobody says where.
const DEFAULT_STORAGE: &str = "floodmark-data";

/// Where a job's checkpoints are: as the command line says, else the manifest, else beside where it runs.
pub(crate) fn storage(option: Option<&str>, manifest: &StreamJob) -> Result<String, Failure> {
    absolute(option.or(manifest.spec.checkpoints.storage.as_deref()).unwrap_or(DEFAULT_STORAGE))
}

/// A location that means the same wherever it is read: paths are made absolute, URLs are left alone.
pub(crate) fn absolute(location: &str) -> Result<String, Failure> {
    if location.contains("://") {
        return Ok(location.to_owned());
    }
    match std::path::absolute(location) {
        Ok(path) => Ok(path.display().to_string()),
        Err(e) => Err(Failure::input(format!("location '{location}': {e}"))),
    }
}

/// What a reference stands for wherever it is read: see [`absolute`].
pub(crate) fn absolute_reference(reference: Reference) -> Result<Reference, Failure> {
    match reference {
        Reference::Location(location) => absolute(&location).map(Reference::Location),
        named => Ok(named),
    }
}

/// A runtime for a command that waits for little.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| Failure::new(Exit::JobFailed, format!("start the runtime: {e}")))
}

/// Reads a manifest without looking at its SQL; answers with whose state it is as well.
pub(crate) fn identify(path: &Path) -> Result<(JobId, StreamJob), Failure> {
    let (_, manifest) = manifest(path)?;
    Ok((job_id(&manifest), manifest))
}

/// A manifest, and what to call its file.
fn manifest(path: &Path) -> Result<(String, StreamJob), Failure> {
    let file = if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() };
    let text = read(path).map_err(|e| Failure::input(format!("read {file}: {e}")))?;
    let manifest = StreamJob::from_yaml(&text, &file).map_err(Failure::input)?;
    Ok((file, manifest))
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(MANIFEST_SIZE_MAX + 1).read_to_string(&mut text)?
    } else {
        std::fs::File::open(path)?.take(MANIFEST_SIZE_MAX + 1).read_to_string(&mut text)?
    };
    if read as u64 > MANIFEST_SIZE_MAX {
        return Err(std::io::Error::other(format!("longer than {MANIFEST_SIZE_MAX} bytes")));
    }
    Ok(text)
}
