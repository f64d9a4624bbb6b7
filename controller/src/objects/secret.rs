//! What only a run's own processes may know: their keys, and the token that changes the job. Rendering is pure; keys come from
//! [`run_identity`] and [`next_generation`].
//!
//! A run's processes show the certificates of one generation, and trust those of the one before and of the one after, too, which is
//! in the Secret already. So a [`renewal`] is one change: whoever has not read it yet knows those who have.
//!
//! Invariant: the key of a generation's authority is dropped once its two certificates are made, so nobody can ever make a third.

use std::{fmt, sync::Arc, time::Duration};

use floodmark_crds::{CheckpointMode, RunStatus, StreamJob, StreamJobSpec, Timestamp};
use floodmark_link::tls::{Authority, Issued, Role, Subject};
use floodmark_snapshot::{Error, JobId, Result, env::Clock};
use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::ResourceExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use super::{CERTIFICATES_ANNOTATION, Unrenderable, meta, namespace, run::run_labels, secret_name, strings};
use crate::revision;

/// How long the certificates of a run are in force, unless the controller is told otherwise.
pub const IDENTITY_LIFETIME: Duration = Duration::from_secs(2 * 365 * 24 * 3600);

/// Generations of which a run's processes trust the authority.
const GENERATIONS_TRUSTED: usize = 3;
/// With what a certificate ends in PEM.
const PEM_END: &str = "-----END CERTIFICATE-----\n";

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

/// The same of the generation that comes after.
fn next_keys_of(role: Role) -> (&'static str, &'static str) {
    match role {
        Role::Coordinator => ("next-coordinator.crt", "next-coordinator.key"),
        Role::Worker => ("next-worker.crt", "next-worker.key"),
    }
}

/// What is noted of a Secret's certificates, for who can't look into them. Not how long they were made for: the controller may be
/// told another lifetime later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Times {
    renew_at: Timestamp,
    /// Until when the next generation is in force.
    next_until: Timestamp,
}

impl Times {
    /// Of certificates that are shown from `now` until `until`: a third of that is left for the renewal.
    fn new(now: Timestamp, until: Timestamp, next_until: Timestamp) -> Self {
        Self { renew_at: now.plus(until.since(now) / 3 * 2), next_until }
    }

    fn of(metadata: &ObjectMeta) -> Option<Self> {
        serde_json::from_str(metadata.annotations.as_ref()?.get(CERTIFICATES_ANNOTATION)?).ok()
    }

    fn text(self) -> String {
        json!(self).to_string()
    }
}

/// The certificates of one authority.
#[derive(Clone)]
pub struct Generation {
    /// Until when they are in force.
    pub until: Timestamp,
    /// The coordinator's certificate, with its key and that of the authority.
    pub coordinator: Issued,
    /// The same for workers.
    pub worker: Issued,
}

/// Who the processes of a run are to each other, and the word by which the controller is known to them.
#[derive(Clone)]
pub struct RunIdentity {
    /// What they show.
    pub present: Generation,
    /// What they will show once it is renewed.
    pub next: Generation,
    /// What a change over HTTP needs: hexadecimal digits.
    pub token: String,
}

impl fmt::Debug for RunIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunIdentity").finish_non_exhaustive()
    }
}

/// Makes keys, certificates and a token for a run of this job, with authorities of its own.
///
/// # Errors
/// `Abort` when the job's identity can't stand in a certificate (it has no uid), or the machine gives no random bytes.
pub fn run_identity(job: &StreamJob, lifetime: Duration, clock: Arc<dyn Clock>) -> Result<RunIdentity> {
    let present = generation(job, lifetime, clock.clone())?;
    let next = next_generation(job, lifetime, clock)?;
    let mut chance = [0; TOKEN_BYTES];
    getrandom::fill(&mut chance).map_err(|e| Error::abort(format!("make a token: no random bytes: {e}")))?;
    let token = chance.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(RunIdentity { present, next, token })
}

/// Makes keys and certificates that are shown one `lifetime` from now at the latest, and for one `lifetime`.
///
/// # Errors
/// See [`run_identity`].
pub fn next_generation(job: &StreamJob, lifetime: Duration, clock: Arc<dyn Clock>) -> Result<Generation> {
    generation(job, lifetime * 2, clock)
}

fn generation(job: &StreamJob, lifetime: Duration, clock: Arc<dyn Clock>) -> Result<Generation> {
    let id = JobId { namespace: namespace(job), name: job.name_any(), uid: job.uid().unwrap_or_default() };
    let until = Timestamp::from_millis(clock.wall_ms()).plus(lifetime);
    let authority = Authority::new(clock)?;
    let issue = |role| authority.issue(&Subject { job: id.clone(), role }, lifetime);
    Ok(Generation { until, coordinator: issue(Role::Coordinator)?, worker: issue(Role::Worker)? })
}

/// The Secret of a run, to be created once; a [`renewal`] is all that may change it. Its `job.yaml` is the job as the run's processes
/// read it: what is acted upon while the job runs has no place in it, nor what the run restores, which stands on the command line.
/// `restore_from` is what a job without checkpoints of its own starts from, resolved to words that its processes understand.
///
/// # Errors
/// When the spec can't be written down.
pub fn run_secret(
    job: &StreamJob,
    spec: &StreamJobSpec,
    run: &RunStatus,
    restore_from: Option<&str>,
    identity: &RunIdentity,
    now: Timestamp,
) -> std::result::Result<Secret, Unrenderable> {
    let manifest = manifest(job, spec, run, restore_from)?;
    let RunIdentity { present, next, token } = identity;
    let times = Times::new(now, present.until, next.until);
    let authorities = [&present.coordinator.authority, &next.coordinator.authority].map(String::as_str).concat();
    let mut data = vec![(MANIFEST, manifest), (AUTHORITY, authorities), (TOKEN, token.clone())];
    data.extend(texts(present, keys_of));
    data.extend(texts(next, next_keys_of));
    Ok(Secret {
        metadata: ObjectMeta {
            annotations: Some(strings([(CERTIFICATES_ANNOTATION, &times.text())])),
            ..meta(job, secret_name(job, run.number), run_labels(job, run))
        },
        type_: Some("Opaque".to_owned()),
        string_data: Some(data.into_iter().map(|(key, text)| (key.to_owned(), text)).collect()),
        ..Secret::default()
    })
}

type Keys = fn(Role) -> (&'static str, &'static str);

/// What a generation has in the Secret, under these keys.
fn texts(generation: &Generation, keys: Keys) -> [(&'static str, String); 4] {
    let (coordinator, worker) = (keys(Role::Coordinator), keys(Role::Worker));
    [
        (coordinator.0, generation.coordinator.certificate.clone()),
        (coordinator.1, generation.coordinator.key.clone()),
        (worker.0, generation.worker.certificate.clone()),
        (worker.1, generation.worker.key.clone()),
    ]
}

/// When the certificates of a run's Secret are to be renewed, by its annotations; `None`: it is not one that can be.
#[must_use]
pub fn renew_at(metadata: &ObjectMeta) -> Option<Timestamp> {
    Times::of(metadata).map(|times| times.renew_at)
}

/// The next generation takes the place of the one that is shown, and `fresh` its own: what is to be merged into the Secret, if nobody
/// has changed it meanwhile. `None` if the Secret has no next generation.
#[must_use]
pub fn renewal(secret: &Secret, fresh: &Generation, now: Timestamp) -> Option<Json> {
    let there = |key: &str| secret.data.as_ref()?.get(key);
    let times = Times::new(now, Times::of(&secret.metadata)?.next_until, fresh.until);
    let mut data = serde_json::Map::new();
    for role in [Role::Coordinator, Role::Worker] {
        let (shown, next) = (keys_of(role), next_keys_of(role));
        for (shown, next) in [(shown.0, next.0), (shown.1, next.1)] {
            data.insert(shown.to_owned(), json!(there(next)?));
        }
    }
    let authorities = std::str::from_utf8(&there(AUTHORITY)?.0).ok()?;
    let mut authorities: Vec<_> = authorities.split_inclusive(PEM_END).collect();
    authorities.push(&fresh.coordinator.authority);
    let trusted = authorities.split_off(authorities.len().saturating_sub(GENERATIONS_TRUSTED)).concat();
    let new = texts(fresh, next_keys_of).into_iter().chain([(AUTHORITY, trusted)]);
    data.extend(new.map(|(key, text)| (key.to_owned(), json!(ByteString(text.into_bytes())))));
    Some(json!({
        "metadata": {
            "resourceVersion": secret.metadata.resource_version,
            "annotations": {CERTIFICATES_ANNOTATION: times.text()},
        },
        "data": data,
    }))
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
    if spec.checkpoints.mode == CheckpointMode::Disabled && spec.checkpoints.storage.is_none() {
        // Nothing is kept, but the processes open what is named, and can make no folder where they are.
        manifest.spec.checkpoints.storage = Some("memory://".to_owned());
    }
    serde_yaml::to_string(&manifest).map_err(|e| Unrenderable::new("spec", format!("can't be written as YAML: {e}")))
}

#[cfg(test)]
mod tests {
    use floodmark_link::tls::Identity;
    use floodmark_snapshot::Env;

    use super::*;
    use crate::objects::tests::{job, run};

    #[test]
    fn a_job_that_keeps_nothing_needs_no_folder() {
        let storage = |spec: &str| {
            let job = job(spec);
            let text = manifest(&job, &job.spec, &run(1, 1), None).unwrap();
            StreamJob::from_yaml(&text, "job.yaml").unwrap().spec.checkpoints.storage
        };
        assert_eq!(storage("{sql: a, checkpoints: {mode: Disabled}}").as_deref(), Some("memory://"));
        assert_eq!(storage("{sql: a, checkpoints: {mode: Disabled, storage: s3://b/c}}").as_deref(), Some("s3://b/c"));
    }

    #[test]
    fn each_process_can_show_what_it_is_in_its_job() {
        let job = job("sql: a");
        let made = run_identity(&job, IDENTITY_LIFETIME, Env::system().clock).unwrap();
        for generation in [&made.present, &made.next] {
            for (issued, role) in [(&generation.coordinator, Role::Coordinator), (&generation.worker, Role::Worker)] {
                let identity = Identity::from_pem(&issued.certificate, &issued.key, &issued.authority).unwrap();
                let id = JobId { namespace: "shop".into(), name: "hot-items".into(), uid: "1-2-3".into() };
                assert_eq!(identity.subject(), &Subject { job: id, role });
            }
            assert_eq!(generation.coordinator.authority, generation.worker.authority);
        }
        assert_ne!(made.present.worker.authority, made.next.worker.authority);
    }

    #[test]
    fn no_two_runs_share_a_secret_and_none_is_ever_shown() {
        let job = job("sql: a");
        let [one, two] = [0; 2].map(|_| run_identity(&job, IDENTITY_LIFETIME, Env::system().clock).unwrap());
        assert_eq!(one.token.len(), 2 * TOKEN_BYTES);
        assert_ne!(one.token, two.token);
        assert_ne!(one.present.worker.key, two.present.worker.key);
        assert_ne!(one.present.worker.authority, two.present.worker.authority);
        let shown = format!("{one:?}");
        assert!(!shown.contains(&one.token) && !shown.contains("PRIVATE"), "{shown}");
        let nameless = StreamJob::new("hot-items", job.spec);
        let nobody = run_identity(&nameless, IDENTITY_LIFETIME, Env::system().clock);
        assert!(nobody.is_err(), "a job without a uid is not in a cluster yet");
    }

    #[test]
    fn its_processes_can_read_the_manifest() {
        let job = job(
            "{sql: 'a; b', parallelism: 3, restore: {from: s3://b/c, nonce: 3}, restartNonce: 3, desiredState: Suspended, \
             checkpoints: {storage: s3://b/c, onDelete: Delete}, worker: {slots: 2}}",
        );
        let identity = run_identity(&job, IDENTITY_LIFETIME, Env::system().clock).unwrap();
        let now = Timestamp::from_millis(0);
        let secret = run_secret(&job, &job.spec, &run(7, 5), Some("s3://b/d"), &identity, now).unwrap();
        let read = StreamJob::from_yaml(&secret.string_data.unwrap()[MANIFEST], "job.yaml").unwrap();
        assert_eq!((read.spec.parallelism, read.spec.worker.slots, &*read.spec.sql), (5, 2, "a; b"));
        assert_eq!(read.spec.checkpoints.storage.as_deref(), Some("s3://b/c"));
        assert_eq!((read.spec.restore.from.as_deref(), read.spec.restore.nonce), (Some("s3://b/d"), None));
        assert_eq!(read.metadata.uid.as_deref(), Some("1-2-3"));
        assert_eq!(revision::name(&job.spec), revision::name(&StreamJobSpec { parallelism: 9, ..job.spec }));
    }

    /// What a process of this role reads out of the Secret.
    fn read(secret: &Secret, role: Role) -> (String, String, String) {
        let text = |key: &str| String::from_utf8(secret.data.as_ref().unwrap()[key].0.clone()).unwrap();
        let (certificate, key) = keys_of(role);
        (text(certificate), text(key), text(AUTHORITY))
    }

    /// Whether who has read `one` and who has read `other` know each other, as authorities go.
    fn know_each_other(one: &Secret, other: &Secret, trusted: &dyn Fn(&Secret) -> Vec<String>) -> bool {
        let signed_by = |secret: &Secret| trusted(secret).iter().rev().nth(1).cloned().unwrap();
        trusted(one).contains(&signed_by(other)) && trusted(other).contains(&signed_by(one))
    }

    #[test]
    fn a_renewal_is_understood_by_who_has_not_read_it_yet() {
        let (job, clock) = (job("sql: a"), Env::system().clock);
        let lifetime = Duration::from_secs(90);
        let at = |s: i64| Timestamp::from_millis(s * 1_000);
        let mut identity = run_identity(&job, lifetime, clock.clone()).unwrap();
        (identity.present.until, identity.next.until) = (at(90), at(180));
        let mut secret = run_secret(&job, &job.spec, &run(1, 1), None, &identity, at(0)).unwrap();
        // As the API server keeps it.
        let data = secret.string_data.take().unwrap();
        secret.data = Some(data.into_iter().map(|(key, text)| (key, ByteString(text.into_bytes()))).collect());
        secret.metadata.resource_version = Some("8".into());
        let manifest = secret.data.as_ref().unwrap()[MANIFEST].clone();
        let trusted = |secret: &Secret| -> Vec<String> {
            read(secret, Role::Worker).2.split_inclusive(PEM_END).map(str::to_owned).collect()
        };
        assert_eq!(renew_at(&secret.metadata), Some(at(60)));
        // When; until when those after the next are in force; when the next are due. In time twice, late, and later than they are in force.
        for (now, until, due) in [(60, 260, 140), (140, 490, 220), (400, 460, 460), (470, 650, 470)] {
            let fresh = Generation { until: at(until), ..next_generation(&job, lifetime, clock.clone()).unwrap() };
            let patch = renewal(&secret, &fresh, at(now)).unwrap();
            assert_eq!(patch["metadata"]["resourceVersion"], "8", "not over somebody else's");
            let mut renewed = secret.clone();
            let data: std::collections::BTreeMap<String, ByteString> =
                serde_json::from_value(patch["data"].clone()).unwrap();
            renewed.data.as_mut().unwrap().extend(data);
            renewed.metadata.annotations = serde_json::from_value(patch["metadata"]["annotations"].clone()).unwrap();
            assert_eq!(renew_at(&renewed.metadata), Some(at(due)), "{now}");
            for role in [Role::Coordinator, Role::Worker] {
                let (before, after) = (read(&secret, role), read(&renewed, role));
                assert!(before.0 != after.0 && before.1 != after.1, "they are others");
                let identity = Identity::from_pem(&after.0, &after.1, &after.2).unwrap();
                assert_eq!(identity.subject().role, role);
            }
            assert!(know_each_other(&secret, &renewed, &trusted) && trusted(&renewed).len() == GENERATIONS_TRUSTED);
            assert_eq!(trusted(&renewed).last(), Some(&fresh.worker.authority));
            assert_eq!(renewed.data.as_ref().unwrap()[MANIFEST], manifest);
            secret = renewed;
        }
        // One that an earlier version has made.
        secret.data.as_mut().unwrap().remove("next-worker.key");
        assert_eq!(renewal(&secret, &identity.next, at(0)), None);
        assert_eq!(renew_at(&ObjectMeta::default()), None);
    }
}
