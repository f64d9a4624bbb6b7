//! What may be deleted, and when. Pure decisions, and the shell that carries them out.
//!
//! Invariant: a file is deleted only when no retained checkpoint names it, and only after the `Released` entry that gives
//! up its last owner is durable. Deleting is idempotent, and what a crash leaves behind is found at the next open.

use std::collections::BTreeSet;

use futures::{StreamExt, stream};

use crate::{
    Attempt, Epoch, Error,
    log::{Event, JobFolder, LogState, Retained},
    storage::Storage,
};

/// Files deleted at the same time.
const DELETES_IN_FLIGHT_MAX: usize = 16;

/// What a release gives up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Release {
    /// The checkpoints, oldest first.
    pub epochs: Vec<Epoch>,
    /// Log entries before this number count no more.
    pub oldest_seq: u64,
    /// Blobs that no retained checkpoint names, relative to the job's folder.
    pub blobs: Vec<String>,
}

impl Release {
    /// The entry that must be durable before anything is deleted.
    #[must_use]
    pub fn event(&self) -> Event {
        Event::Released { epochs: self.epochs.clone(), oldest_seq: self.oldest_seq }
    }
}

/// Decides what to release so that the newest `retain` checkpoints (at least one) are left; `None` if there is nothing.
#[must_use]
pub fn release(state: &LogState, retain: usize) -> Option<Release> {
    let cut = state.retained.len().saturating_sub(retain.max(1));
    let (released, kept) = state.retained.split_at(cut);
    // Checkpoints behind which a restore went back are kept as long as that restore's own line has less than `retain`.
    let abandoned: &[Retained] = if cut > 0 || state.retained.len() >= retain.max(1) { &state.abandoned } else { &[] };
    if released.is_empty() && abandoned.is_empty() {
        return None;
    }
    let named: BTreeSet<&str> = kept.iter().flat_map(|r| r.manifest.shards()).map(|s| s.path.as_str()).collect();
    let given_up = released.iter().chain(abandoned);
    let blobs: BTreeSet<String> = given_up
        .clone()
        .flat_map(|r| r.manifest.shards())
        .filter(|s| !named.contains(s.path.as_str()))
        .map(|s| s.path.clone())
        .collect();
    let mut epochs: Vec<Epoch> = given_up.map(|r| r.manifest.epoch).collect();
    epochs.sort_unstable();
    let oldest_seq = kept.iter().map(|r| r.seq).min().unwrap_or(0);
    Some(Release { epochs, oldest_seq, blobs: blobs.into_iter().collect() })
}

/// Of the blobs listed (relative to the job's folder), those that earlier attempts left behind and that no checkpoint names.
/// The attempt's own `Opened` entry must be durable: no earlier attempt can complete a checkpoint any more.
#[must_use]
pub fn orphans(listed: &[String], state: &LogState, current: Attempt) -> Vec<String> {
    let known = state.retained.iter().chain(&state.abandoned);
    let named: BTreeSet<&str> = known.flat_map(|r| r.manifest.shards()).map(|s| s.path.as_str()).collect();
    let of_earlier_attempt = |path: &str| {
        let attempt = path.strip_prefix("blobs/").and_then(|p| p.split('/').next()).and_then(|a| a.parse().ok());
        attempt.is_some_and(|a: u64| a < current.0)
    };
    listed.iter().filter(|p| of_earlier_attempt(p) && !named.contains(p.as_str())).cloned().collect()
}

/// Deletes files of a job. One that can't be deleted now is logged, and left for the next open to find.
pub async fn delete(storage: &dyn Storage, folder: &JobFolder, paths: Vec<String>) {
    let deletes = stream::iter(paths).map(|path| async move { (storage.delete(&folder.path(&path)).await, path) });
    deletes
        .buffer_unordered(DELETES_IN_FLIGHT_MAX)
        .for_each(|(outcome, path): (Result<(), Error>, String)| async move {
            if let Err(error) = outcome {
                tracing::warn!(%path, %error, "could not delete; left for the next start");
            }
        })
        .await;
}

/// Deletes log entries that a durable `Released` entry has given up.
///
/// # Errors
/// When the log can't be listed.
pub async fn trim(storage: &dyn Storage, folder: &JobFolder, oldest_seq: u64) -> Result<(), Error> {
    let listed = storage.list(&folder.path("log"), None).await?;
    let cut = format!("log/{oldest_seq:020}.json");
    let old = listed.iter().filter_map(|o| folder.relative(&o.path)).filter(|p| *p < cut.as_str()).map(str::to_owned);
    delete(storage, folder, old.collect()).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{Generation, JobId, Manifest, OperatorSnapshot, Shard, ShardKind, manifest::MANIFEST_FORMAT};

    fn checkpoint(seq: u64, epoch: u64, paths: &[&str]) -> Retained {
        let shard = |path: &&str| Shard { size: 1, ..Shard::new(*path, ShardKind::Keyed) };
        let operator = OperatorSnapshot { shards: paths.iter().map(shard).collect(), ..OperatorSnapshot::default() };
        Retained {
            seq,
            manifest: Manifest {
                format: MANIFEST_FORMAT,
                job: JobId { namespace: "n".into(), name: "j".into(), uid: "u".into() },
                epoch: Epoch(epoch),
                generation: Generation(1),
                attempt: Attempt(1),
                triggered_at_ms: 0,
                duration_ms: 0,
                max_parallelism: 128,
                plan: String::new(),
                end_of_input: false,
                operators: BTreeMap::from([("op".into(), operator)]),
            },
        }
    }

    #[test]
    fn a_blob_that_a_retained_checkpoint_names_is_never_released() {
        let state = LogState {
            retained: vec![
                checkpoint(3, 1, &["blobs/1/a", "blobs/1/b"]),
                checkpoint(5, 2, &["blobs/1/b", "blobs/1/c"]),
                checkpoint(8, 3, &["blobs/1/c", "blobs/1/b", "blobs/1/d"]),
            ],
            ..LogState::default()
        };
        assert_eq!(release(&state, 3), None);
        assert_eq!(
            release(&state, 2),
            Some(Release { epochs: vec![Epoch(1)], oldest_seq: 5, blobs: vec!["blobs/1/a".into()] })
        );
        assert_eq!(
            release(&state, 0),
            Some(Release { epochs: vec![Epoch(1), Epoch(2)], oldest_seq: 8, blobs: vec!["blobs/1/a".into()] }),
            "one is always left"
        );
    }

    #[test]
    fn abandoned_checkpoints_go_once_the_new_line_is_long_enough() {
        let mut state = LogState {
            retained: vec![checkpoint(3, 1, &["blobs/1/a"])],
            abandoned: vec![checkpoint(4, 2, &["blobs/1/a", "blobs/1/x"])],
            ..LogState::default()
        };
        assert_eq!(release(&state, 2), None);
        state.retained.push(checkpoint(9, 3, &["blobs/2/c"]));
        assert_eq!(
            release(&state, 2),
            Some(Release { epochs: vec![Epoch(2)], oldest_seq: 3, blobs: vec!["blobs/1/x".into()] })
        );
    }

    #[test]
    fn orphans_are_unnamed_blobs_of_earlier_attempts_only() {
        let state = LogState { retained: vec![checkpoint(3, 1, &["blobs/1/a"])], ..LogState::default() };
        let listed = ["blobs/1/a", "blobs/1/b", "blobs/2/c", "blobs/3/d", "blobs/odd"].map(str::to_owned);
        assert_eq!(orphans(&listed, &state, Attempt(3)), ["blobs/1/b", "blobs/2/c"]);
    }
}
