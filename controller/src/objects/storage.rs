//! Whether all pods of a run reach what the job keeps. Pure: looks at what a location and the pods' volumes say, not at what is there.
//!
//! Invariant: what can't be known from here (whether a claim may be mounted twice, what a driver does) is let pass.

use std::path::{Path, PathBuf};

use floodmark_crds::{CheckpointMode, StreamJobSpec};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{PodSpec, Volume},
};

use super::{RunObjects, Unrenderable, pods::CONTAINER};

/// The field that says where it is.
const FIELD: &str = "spec.checkpoints.storage";
/// What helps in every case.
const BUCKET: &str = "name a bucket, as in s3://bucket/folder";

/// Looks at the storage of a run with these objects. `spec` is that of the run's revision.
///
/// # Errors
/// When its pods could not start with it, or would lose what they have written to it.
pub fn check_storage(spec: &StreamJobSpec, objects: &RunObjects) -> Result<(), Unrenderable> {
    if spec.checkpoints.mode == CheckpointMode::Disabled {
        return Ok(());
    }
    let Some(location) = &spec.checkpoints.storage else {
        let what = "is needed in a cluster, where what a pod keeps for itself is lost with it";
        let or = "or set spec.checkpoints.mode to Disabled";
        return Err(Unrenderable::new(FIELD, format!("{what}; {BUCKET}, {or}")));
    };
    let refused = |why: &str, help: &str| Err(Unrenderable::new(FIELD, format!("'{location}': {why}; {help}")));
    if location.starts_with("memory:") {
        return refused("each pod has a memory of its own, and loses it when it ends", BUCKET);
    }
    let path = location.strip_prefix("file://").unwrap_or(location);
    if path.contains("://") {
        return Ok(());
    }
    let folder = Path::new(path);
    if !folder.is_absolute() {
        return refused(
            "the path is relative, and pods have no folder that it could begin in",
            &format!("begin it with /, or {BUCKET}"),
        );
    }
    let theirs = [("coordinator", &objects.coordinator), ("worker", &objects.worker)];
    let mut shared: Option<&Volume> = None;
    for (role, deployment) in theirs {
        let template = format!("spec.{role}.podTemplate");
        let help = format!("with {template} mount a volume there that all pods share, or {BUCKET}");
        let Some((volume, read_only)) = pod_of(deployment).and_then(|pod| volume_of(pod, folder)) else {
            return refused(&format!("{role} pods have no such folder that they can write to"), &help);
        };
        let name = &volume.name;
        if read_only {
            return refused(&format!("{role} pods have volume '{name}' there, and may only read it"), &help);
        }
        if let Some(what) = own(volume) {
            return refused(&format!("{role} pods have volume '{name}' there, each its own ({what})"), &help);
        }
        // Volumes may be called differently; what they are must be the same.
        let source = |volume: &Volume| Volume { name: String::new(), ..volume.clone() };
        if shared.is_some_and(|other| source(other) != source(volume)) {
            return refused(&format!("{role} pods have another volume there than the coordinator's"), &help);
        }
        shared = Some(volume);
    }
    Ok(())
}

fn pod_of(deployment: &Deployment) -> Option<&PodSpec> {
    deployment.spec.as_ref()?.template.spec.as_ref()
}

/// The volume that a folder of our container is in, and whether it can only be read.
fn volume_of<'a>(pod: &'a PodSpec, folder: &Path) -> Option<(&'a Volume, bool)> {
    let container = pod.containers.iter().find(|c| c.name == CONTAINER)?;
    let mounts = container.volume_mounts.iter().flatten();
    // Of mounts within each other the innermost counts.
    let mount = mounts
        .filter(|m| folder.starts_with(&m.mount_path))
        .max_by_key(|m| PathBuf::from(&m.mount_path).components().count())?;
    let volume = pod.volumes.iter().flatten().find(|v| v.name == mount.name)?;
    Some((volume, mount.read_only == Some(true)))
}

/// Of which kind a volume is, if each pod has one of its own.
fn own(volume: &Volume) -> Option<&'static str> {
    let kinds = [
        (volume.empty_dir.is_some(), "emptyDir"),
        (volume.ephemeral.is_some(), "ephemeral"),
        (volume.secret.is_some(), "secret"),
        (volume.config_map.is_some(), "configMap"),
        (volume.projected.is_some(), "projected"),
        (volume.downward_api.is_some(), "downwardAPI"),
    ];
    kinds.into_iter().find_map(|(is, what)| is.then_some(what))
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;
    use crate::objects::{
        run_objects,
        tests::{defaults, job, run},
    };

    fn check(spec: &str, expected: Expect) {
        let job = job(spec);
        let objects = run_objects(&job, &job.spec, &run(1, 1), &defaults()).unwrap();
        let checked = check_storage(&job.spec, &objects);
        expected.assert_eq(&checked.map_or_else(|why| why.to_string(), |()| "shared".to_owned()));
    }

    /// A job with this volume mounted at /data, in the coordinator's pods and in the workers'.
    fn mounted(storage: &str, coordinator: &str, worker: &str) -> String {
        let template = |volume: &str| {
            format!(
                "{{podTemplate: {{spec: {{volumes: [{{name: data, {volume}}}], containers: [{{name: floodmark, \
                 volumeMounts: [{{name: data, mountPath: /data}}]}}]}}}}}}"
            )
        };
        let (coordinator, worker) = (template(coordinator), template(worker));
        format!("{{sql: a, checkpoints: {{storage: {storage}}}, coordinator: {coordinator}, worker: {worker}}}")
    }

    #[test]
    fn a_bucket_is_shared_and_a_pod_s_own_folder_is_not() {
        check("{sql: a, checkpoints: {storage: s3://b/c}}", expect!["shared"]);
        check("{sql: a, checkpoints: {mode: Disabled}}", expect!["shared"]);
        check(
            "{sql: a}",
            expect![[
                r#"spec.checkpoints.storage: is needed in a cluster, where what a pod keeps for itself is lost with it; name a bucket, as in s3://bucket/folder, or set spec.checkpoints.mode to Disabled"#
            ]],
        );
        check(
            "{sql: a, checkpoints: {storage: 'memory://?limit=1GiB'}}",
            expect![
                "spec.checkpoints.storage: 'memory://?limit=1GiB': each pod has a memory of its own, and loses it when it ends; name a bucket, as in s3://bucket/folder"
            ],
        );
        check(
            "{sql: a, checkpoints: {storage: data}}",
            expect![
                "spec.checkpoints.storage: 'data': the path is relative, and pods have no folder that it could begin in; begin it with /, or name a bucket, as in s3://bucket/folder"
            ],
        );
        check(
            "{sql: a, checkpoints: {storage: 'file:///data/x'}}",
            expect![
                "spec.checkpoints.storage: 'file:///data/x': coordinator pods have no such folder that they can write to; with spec.coordinator.podTemplate mount a volume there that all pods share, or name a bucket, as in s3://bucket/folder"
            ],
        );
        check(
            "{sql: a, checkpoints: {storage: /var/lib/floodmark}}",
            expect![
                "spec.checkpoints.storage: '/var/lib/floodmark': coordinator pods have volume 'work' there, each its own (emptyDir); with spec.coordinator.podTemplate mount a volume there that all pods share, or name a bucket, as in s3://bucket/folder"
            ],
        );
    }

    #[test]
    fn a_folder_is_shared_if_the_same_volume_is_mounted_in_all_pods() {
        let claim = "persistentVolumeClaim: {claimName: jobs}";
        check(&mounted("file:///data/jobs", claim, claim), expect!["shared"]);
        check(&mounted("/data", "nfs: {server: n, path: /}", "nfs: {server: n, path: /}"), expect!["shared"]);
        check(
            &mounted("/database", claim, claim),
            expect![
                "spec.checkpoints.storage: '/database': coordinator pods have no such folder that they can write to; with spec.coordinator.podTemplate mount a volume there that all pods share, or name a bucket, as in s3://bucket/folder"
            ],
        );
        check(
            &mounted("/data", claim, "persistentVolumeClaim: {claimName: other}"),
            expect![
                "spec.checkpoints.storage: '/data': worker pods have another volume there than the coordinator's; with spec.worker.podTemplate mount a volume there that all pods share, or name a bucket, as in s3://bucket/folder"
            ],
        );
        check(
            &mounted("/data", claim, "emptyDir: {}"),
            expect![
                "spec.checkpoints.storage: '/data': worker pods have volume 'data' there, each its own (emptyDir); with spec.worker.podTemplate mount a volume there that all pods share, or name a bucket, as in s3://bucket/folder"
            ],
        );
        let read_only =
            mounted("/data", claim, claim).replace("mountPath: /data}", "mountPath: /data, readOnly: true}");
        check(
            &read_only,
            expect![
                "spec.checkpoints.storage: '/data': coordinator pods have volume 'data' there, and may only read it; with spec.coordinator.podTemplate mount a volume there that all pods share, or name a bucket, as in s3://bucket/folder"
            ],
        );
        let only_workers = "{sql: a, checkpoints: {storage: /data}, worker: {podTemplate: {spec: {volumes: [{name: d, hostPath: {path: /d}}], \
             containers: [{name: floodmark, volumeMounts: [{name: d, mountPath: /data}]}]}}}}";
        check(
            only_workers,
            expect![
                "spec.checkpoints.storage: '/data': coordinator pods have no such folder that they can write to; with spec.coordinator.podTemplate mount a volume there that all pods share, or name a bucket, as in s3://bucket/folder"
            ],
        );
    }
}
