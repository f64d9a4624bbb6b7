//! Old specs, kept so that a job can go back to them. Pure.

use floodmark_crds::{StreamJob, StreamJobSpec};
use k8s_openapi::{api::apps::v1::ControllerRevision, apimachinery::pkg::runtime::RawExtension};
use kube::ResourceExt;
use serde_json::json;

use super::{REVISION_ANNOTATION, Unrenderable, labels, meta, revision_name};
use crate::revision;

/// The field of a ControllerRevision's data that is the spec.
const SPEC: &str = "spec";

/// Keeps that part of a spec which its revision is about. Its name and data are those of the revision; `revision` is the
/// generation of the job that it was made for, so that the newest is the one with the greatest.
///
/// # Errors
/// When the spec can't be written down.
pub fn revision_object(job: &StreamJob, spec: &StreamJobSpec) -> Result<ControllerRevision, Unrenderable> {
    let name = revision::name(spec);
    let kept = serde_json::to_value(revision::kept(spec)).map_err(|e| Unrenderable::new(SPEC, e))?;
    let mut metadata = meta(job, revision_name(&job.name_any(), &name), labels(job));
    metadata.annotations = Some([(REVISION_ANNOTATION.to_owned(), name)].into());
    Ok(ControllerRevision {
        metadata,
        revision: job.metadata.generation.unwrap_or(1),
        data: Some(RawExtension(json!({ SPEC: kept }))),
    })
}

/// The spec that [`revision_object`] has kept: with a parallelism of 1, and nothing said of what is acted upon while a job runs.
///
/// # Errors
/// When there is none in it, or one that this version does not understand.
pub fn revision_spec(object: &ControllerRevision) -> Result<StreamJobSpec, Unrenderable> {
    let path = || format!("ControllerRevision {}: data.{SPEC}", object.name_any());
    let spec = object.data.as_ref().and_then(|data| data.0.get(SPEC));
    let Some(spec) = spec else { return Err(Unrenderable::new(path(), "is missing")) };
    serde_path_to_error::deserialize(spec).map_err(|e| {
        let at = e.path().to_string();
        let path = if at == "." { path() } else { format!("{}.{at}", path()) };
        Unrenderable::new(path, e.into_inner())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::tests::job;

    #[test]
    fn a_spec_comes_back_as_the_same_revision() {
        let job = job(
            "{sql: a, parallelism: 4, maxParallelism: 64, worker: {slots: 2, podTemplate: {spec: {a: b}}}, restartNonce: 2}",
        );
        let object = revision_object(&job, &job.spec).unwrap();
        let spec = revision_spec(&object).unwrap();
        assert_eq!(spec, revision::kept(&job.spec));
        assert_eq!(revision::name(&spec), revision::name(&job.spec));
        assert_eq!(object.name_any(), format!("hot-items-{}", revision::name(&job.spec)));
        assert_eq!(revision_object(&job, &spec).unwrap(), object, "it can be made of what was kept");
    }

    #[test]
    fn what_is_no_revision_of_ours_is_an_error() {
        let read = |data| {
            let mut object = ControllerRevision { data, ..ControllerRevision::default() };
            object.metadata.name = Some("a-1".into());
            revision_spec(&object).unwrap_err().to_string()
        };
        assert_eq!(read(None), "ControllerRevision a-1: data.spec: is missing");
        assert_eq!(
            read(Some(RawExtension(json!({"spec": {"sql": "a", "worker": {"slots": "two"}}})))),
            "ControllerRevision a-1: data.spec.worker.slots: invalid type: string \"two\", expected u32"
        );
    }
}
