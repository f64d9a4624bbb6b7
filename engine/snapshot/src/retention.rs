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
    fn of(given_up: &[&Retained], kept: &[&Retained]) -> Self {
        let named: BTreeSet<&str> = kept.iter().flat_map(|r| r.manifest.shards()).map(|s| s.path.as_str()).collect();
        // What was adopted belongs to somebody else.
        let owned = given_up.iter().filter(|r| r.from.is_none()).flat_map(|r| r.manifest.shards());
        let blobs: BTreeSet<&str> = owned.map(|s| s.path.as_str()).filter(|path| !named.contains(path)).collect();
        let mut epochs: Vec<Epoch> = given_up.iter().map(|r| r.manifest.epoch).collect();
        epochs.sort_unstable();
        let oldest_seq = kept.iter().map(|r| r.seq).min().unwrap_or(0);
        Self { epochs, oldest_seq, blobs: blobs.into_iter().map(str::to_owned).collect() }
    }

    /// The entry that must be durable before anything is deleted.
    #[must_use]
    pub fn event(&self) -> Event {
        Event::Released { epochs: self.epochs.clone(), oldest_seq: self.oldest_seq }
    }
}

/// Decides what to release so that the newest `retain` checkpoints (at least one) are left, and all from the oldest of the
/// `pinned` on; `None` if there is nothing.
#[must_use]
pub fn release(state: &LogState, retain: usize, pinned: impl Iterator<Item = Epoch>) -> Option<Release> {
    let newest = state.retained.len().saturating_sub(retain.max(1));
    let oldest_pinned = pinned.min();
    let pinned_at = oldest_pinned.and_then(|e| state.retained.iter().position(|r| r.manifest.epoch >= e));
    let cut = newest.min(pinned_at.unwrap_or(newest));
    let (released, kept) = state.retained.split_at(cut);
    // Checkpoints behind which a restore went back are kept as long as that restore's own line has less than `retain`.
    let abandoned: &[Retained] = if cut > 0 || state.retained.len() >= retain.max(1) { &state.abandoned } else { &[] };
    if released.is_empty() && abandoned.is_empty() {
        return None;
    }
    let given_up: Vec<&Retained> = released.iter().chain(abandoned).collect();
    Some(Release::of(&given_up, &kept.iter().collect::<Vec<_>>()))
}

/// What giving up these checkpoints, and no others, comes to; epochs that the log does not hold are passed over. `None` if
/// there is nothing to give up, or if no checkpoint would be left that the job can start from.
#[must_use]
pub fn release_these(state: &LogState, epochs: &[Epoch]) -> Option<Release> {
    let named = |r: &&Retained| epochs.contains(&r.manifest.epoch);
    let (given_up, kept): (Vec<&Retained>, Vec<&Retained>) =
        state.retained.iter().chain(&state.abandoned).partition(named);
    let left = state.retained.iter().any(|r| !named(&r));
    (left && !given_up.is_empty()).then(|| Release::of(&given_up, &kept))
}

/// The path of a blob, relative to the job's folder: `blobs/<attempt>/<epoch>-<ulid>.<ending>`.
#[must_use]
pub fn blob_path(attempt: Attempt, epoch: Epoch, ulid: &str, ending: &str) -> String {
    format!("blobs/{attempt}/{epoch}-{ulid}.{ending}")
}

/// Of the blobs listed (relative to the job's folder), those that no checkpoint names and none can name any more: of earlier
/// attempts, and of the current one's epochs before `oldest_open`, which are complete or given up. The attempt's own `Opened`
/// entry must be durable: no earlier attempt can complete a checkpoint any more.
#[must_use]
pub fn orphans(listed: &[String], state: &LogState, current: Attempt, oldest_open: Epoch) -> Vec<String> {
    let known = state.retained.iter().chain(&state.abandoned).filter(|r| r.from.is_none());
    let named: BTreeSet<&str> = known.flat_map(|r| r.manifest.shards()).map(|s| s.path.as_str()).collect();
    let over = |path: &str| {
        let (attempt, file) = path.strip_prefix("blobs/")?.split_once('/')?;
        let (attempt, epoch) = (attempt.parse::<u64>().ok()?, file.split_once('-')?.0.parse::<u64>().ok()?);
        Some((attempt, epoch) < (current.0, oldest_open.0))
    };
    listed.iter().filter(|p| over(p) == Some(true) && !named.contains(p.as_str())).cloned().collect()
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
    use super::*;
    use crate::{JobId, Manifest, OperatorSnapshot, Shard, ShardKind};

    fn checkpoint(seq: u64, epoch: u64, paths: &[&str]) -> Retained {
        let shard = |path: &&str| Shard { size: 1, ..Shard::new(*path, ShardKind::Keyed) };
        let operator = OperatorSnapshot { shards: paths.iter().map(shard).collect(), ..OperatorSnapshot::default() };
        let job = JobId { namespace: "n".into(), name: "j".into(), uid: "u".into() };
        let mut manifest = Manifest::new(job, Epoch(epoch));
        manifest.operators.insert("op".into(), operator);
        Retained { seq, manifest, from: None }
    }

    fn unpinned() -> impl Iterator<Item = Epoch> {
        std::iter::empty()
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
        assert_eq!(release(&state, 3, unpinned()), None);
        assert_eq!(
            release(&state, 2, unpinned()),
            Some(Release { epochs: vec![Epoch(1)], oldest_seq: 5, blobs: vec!["blobs/1/a".into()] })
        );
        assert_eq!(
            release(&state, 0, unpinned()),
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
        assert_eq!(release(&state, 2, unpinned()), None);
        state.retained.push(checkpoint(9, 3, &["blobs/2/c"]));
        assert_eq!(
            release(&state, 2, unpinned()),
            Some(Release { epochs: vec![Epoch(2)], oldest_seq: 3, blobs: vec!["blobs/1/x".into()] })
        );
    }

    #[test]
    fn a_pinned_checkpoint_and_all_after_it_stay() {
        let mut state = LogState::default();
        state.retained.extend((1..=4).map(|n| checkpoint(n, n, &[])));
        let released = |pinned: &[u64]| {
            let release = release(&state, 1, pinned.iter().map(|e| Epoch(*e)));
            release.map_or(Vec::new(), |r| r.epochs.iter().map(|e| e.0).collect())
        };
        assert_eq!(released(&[]), [1, 2, 3]);
        assert_eq!(released(&[3, 2]), [1]);
        assert_eq!(released(&[9]), [1, 2, 3], "one that is not complete yet");
        assert!(released(&[1]).is_empty());
    }

    #[test]
    fn files_of_an_adopted_snapshot_are_not_this_jobs_to_delete() {
        let mut adopted = checkpoint(3, 1, &["blobs/1/1-a"]);
        adopted.from = Some("/elsewhere".into());
        let state = LogState { retained: vec![adopted, checkpoint(5, 2, &["blobs/2/2-a"])], ..LogState::default() };
        let release = release(&state, 1, unpinned()).unwrap();
        assert_eq!((release.epochs, release.blobs), (vec![Epoch(1)], Vec::new()));
    }

    #[test]
    fn checkpoints_are_given_up_one_by_one_but_never_the_last() {
        let mut adopted = checkpoint(2, 1, &["blobs/9/9-z"]);
        adopted.from = Some("/elsewhere".into());
        let state = LogState {
            retained: vec![
                adopted,
                checkpoint(5, 2, &["blobs/1/a", "blobs/1/b"]),
                checkpoint(8, 4, &["blobs/1/b", "blobs/1/c"]),
            ],
            abandoned: vec![checkpoint(6, 3, &["blobs/1/a", "blobs/1/d"])],
            ..LogState::default()
        };
        let these = |epochs: &[u64]| {
            let release = release_these(&state, &epochs.iter().map(|e| Epoch(*e)).collect::<Vec<_>>())?;
            Some((release.epochs.iter().map(|e| e.0).collect::<Vec<_>>(), release.oldest_seq, release.blobs.join(" ")))
        };
        assert_eq!(these(&[2]), Some((vec![2], 2, String::new())), "all its files are named by others");
        assert_eq!(these(&[3]), Some((vec![3], 2, "blobs/1/d".into())));
        assert_eq!(these(&[3, 2, 1]), Some((vec![1, 2, 3], 8, "blobs/1/a blobs/1/d".into())));
        assert_eq!(these(&[4]), Some((vec![4], 2, "blobs/1/c".into())), "also the newest, if an older one is left");
        assert_eq!(these(&[1]), Some((vec![1], 5, String::new())), "adopted files are somebody else's");
        assert_eq!(these(&[1, 2, 4]), None, "a given-up one is none to start from");
        assert_eq!((these(&[]), these(&[7])), (None, None));
    }

    #[test]
    fn orphans_are_what_nobody_names_and_nobody_will() {
        let state = LogState { retained: vec![checkpoint(3, 1, &["blobs/1/1-a"])], ..LogState::default() };
        let listed = ["1/1-a", "1/1-b", "1/9-c", "2/4-d", "3/5-e", "3/6-f", "3/7-g", "4/1-h", "odd", "3/odd"];
        let listed = listed.map(|file| format!("blobs/{file}"));
        let found = orphans(&listed, &state, Attempt(3), Epoch(7));
        assert_eq!(found, ["blobs/1/1-b", "blobs/1/9-c", "blobs/2/4-d", "blobs/3/5-e", "blobs/3/6-f"]);
    }
}
