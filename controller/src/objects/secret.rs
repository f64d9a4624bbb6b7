//! What only a run's own processes may know: their keys, and the token that changes the job. Rendering is pure; keys come from
//! [`run_identity`].
//!
//! Invariant: the key of a run's authority is dropped once its two certificates are made, so nobody can ever make a third.

use std::{fmt, sync::Arc, time::Duration};

use floodmark_crds::{RunStatus, StreamJob, StreamJobSpec};
use floodmark_link::tls::{Authority, Issued, Role, Subject};
use floodmark_snapshot::{Error, JobId, Result, env::Clock};
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;

use super::{Unrenderable, meta, namespace, run::run_labels, run_name};
use crate::revision;

/// How long the certificates of a run are in force. A run that lasts longer has to be restarted by then (`spec.restartNonce`).
pub const IDENTITY_LIFETIME: Duration = Duration::from_secs(2 * 365 * 24 * 3600);

/// Bytes of chance in a token.
const TOKEN_BYTES: usize = 32;

/// Keys of the Secret.
pub(super) const MANIFEST: &str = "job.yaml";
pub(super) const TOKEN: &str = "token";
pub(super) const AUTHORITY: &str = "ca.crt";

/// The keys of the Secret with the certificate of a role, and with its private key.
pub(super) fn keys_of(role: Role) -> (&'static str, &'static str) {
    match role {
        Role::Coordinator => ("coordinator.crt", "coordinator.key"),
        Role::Worker => ("worker.crt", "worker.key"),
    }
}

/// Who the processes of a run are to each other, and the word by which the controller is known to them.
#[derive(Clone)]
pub struct RunIdentity {
    /// The coordinator's certificate, with its key and that of the authority.
    pub coordinator: Issued,
    /// The same for workers.
    pub worker: Issued,
    /// What a change over HTTP needs: hexadecimal digits.
    pub token: String,
}

impl fmt::Debug for RunIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunIdentity").finish_non_exhaustive()
    }
}

/// Makes keys, certificates and a token for a run of this job, with an authority of its own.
///
/// # Errors
/// `Abort` when the job's identity can't stand in a certificate (it has no uid), or the machine gives no random bytes.
pub fn run_identity(job: &StreamJob, clock: Arc<dyn Clock>) -> Result<RunIdentity> {
    let id = JobId { namespace: namespace(job), name: job.name_any(), uid: job.uid().unwrap_or_default() };
    let authority = Authority::new(clock)?;
    let issue = |role| authority.issue(&Subject { job: id.clone(), role }, IDENTITY_LIFETIME);
    let mut chance = [0; TOKEN_BYTES];
    getrandom::fill(&mut chance).map_err(|e| Error::abort(format!("make a token: no random bytes: {e}")))?;
    let token = chance.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(RunIdentity { coordinator: issue(Role::Coordinator)?, worker: issue(Role::Worker)?, token })
}

/// The Secret of a run, to be created once: it is immutable. Its `job.yaml` is the job as the run's processes read it: what is
/// acted upon while the job runs has no place in it, nor what the run restores, which stands on the command line. `restore_from` is
/// what a job without checkpoints of its own starts from, resolved to words that its processes understand.
///
/// # Errors
/// When the spec can't be written down.
pub fn run_secret(
    job: &StreamJob,
    spec: &StreamJobSpec,
    run: &RunStatus,
    restore_from: Option<&str>,
    identity: &RunIdentity,
) -> std::result::Result<Secret, Unrenderable> {
    let manifest = manifest(job, spec, run, restore_from)?;
    let (coordinator, worker) = (keys_of(Role::Coordinator), keys_of(Role::Worker));
    let data = [
        (MANIFEST, manifest),
        (AUTHORITY, identity.coordinator.authority.clone()),
        (coordinator.0, identity.coordinator.certificate.clone()),
        (coordinator.1, identity.coordinator.key.clone()),
        (worker.0, identity.worker.certificate.clone()),
        (worker.1, identity.worker.key.clone()),
        (TOKEN, identity.token.clone()),
    ];
    Ok(Secret {
        metadata: meta(job, run_name(&job.name_any(), run.number), run_labels(job, run)),
        type_: Some("Opaque".to_owned()),
        immutable: Some(true),
        string_data: Some(data.into_iter().map(|(key, text)| (key.to_owned(), text)).collect()),
        data: None,
    })
}

fn manifest(
    job: &StreamJob,
    spec: &StreamJobSpec,
    run: &RunStatus,
    restore_from: Option<&str>,
) -> std::result::Result<String, Unrenderable> {
    let mut manifest = StreamJob::new(&job.name_any(), revision::kept(spec));
    manifest.metadata.namespace = Some(namespace(job));
    manifest.metadata.uid = job.uid();
    manifest.spec.parallelism = run.parallelism;
    manifest.spec.restore.from = restore_from.map(str::to_owned);
    serde_yaml::to_string(&manifest).map_err(|e| Unrenderable::new("spec", format!("can't be written as YAML: {e}")))
}

#[cfg(test)]
mod tests {
    use floodmark_link::tls::Identity;
    use floodmark_snapshot::Env;

    use super::*;
    use crate::objects::tests::{job, run};

    #[test]
    fn each_process_can_show_what_it_is_in_its_job() {
        let job = job("sql: a");
        let made = run_identity(&job, Env::system().clock).unwrap();
        for (issued, role) in [(&made.coordinator, Role::Coordinator), (&made.worker, Role::Worker)] {
            let identity = Identity::from_pem(&issued.certificate, &issued.key, &issued.authority).unwrap();
            let id = JobId { namespace: "shop".into(), name: "hot-items".into(), uid: "1-2-3".into() };
            assert_eq!(identity.subject(), &Subject { job: id, role });
        }
        assert_eq!(made.coordinator.authority, made.worker.authority);
    }

    #[test]
    fn no_two_runs_share_a_secret_and_none_is_ever_shown() {
        let job = job("sql: a");
        let [one, two] = [0; 2].map(|_| run_identity(&job, Env::system().clock).unwrap());
        assert_eq!(one.token.len(), 2 * TOKEN_BYTES);
        assert_ne!(one.token, two.token);
        assert_ne!(one.worker.key, two.worker.key);
        assert_ne!(one.worker.authority, two.worker.authority);
        let shown = format!("{one:?}");
        assert!(!shown.contains(&one.token) && !shown.contains("PRIVATE"), "{shown}");
        let nameless = StreamJob::new("hot-items", job.spec);
        assert!(run_identity(&nameless, Env::system().clock).is_err(), "a job without a uid is not in a cluster yet");
    }

    #[test]
    fn its_processes_can_read_the_manifest() {
        let job = job(
            "{sql: 'a; b', parallelism: 3, restore: {from: s3://b/c, nonce: 3}, restartNonce: 3, desiredState: Suspended, \
             checkpoints: {storage: s3://b/c, onDelete: Delete}, worker: {slots: 2}}",
        );
        let identity = run_identity(&job, Env::system().clock).unwrap();
        let secret = run_secret(&job, &job.spec, &run(7, 5), Some("s3://b/d"), &identity).unwrap();
        let read = StreamJob::from_yaml(&secret.string_data.unwrap()[MANIFEST], "job.yaml").unwrap();
        assert_eq!((read.spec.parallelism, read.spec.worker.slots, &*read.spec.sql), (5, 2, "a; b"));
        assert_eq!(read.spec.checkpoints.storage.as_deref(), Some("s3://b/c"));
        assert_eq!((read.spec.restore.from.as_deref(), read.spec.restore.nonce), (Some("s3://b/d"), None));
        assert_eq!(read.metadata.uid.as_deref(), Some("1-2-3"));
        assert_eq!(revision::name(&job.spec), revision::name(&StreamJobSpec { parallelism: 9, ..job.spec }));
    }
}
