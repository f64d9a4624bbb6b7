//! What a snapshot consists of: a list, per operator uid, of its shards and its source positions. Pure data.
//!
//! A manifest is the body of a `Completed` log entry, and `_manifest.json` of a savepoint. People read it with `jq`.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{Attempt, Epoch, Generation, JobId, KeyGroupRange, OperatorUid, StateSchema, TimestampMs};

/// The newest shape of manifests that this code reads: some shards are parts of their files.
pub const MANIFEST_FORMAT: u32 = 2;
/// The shape of manifests all of whose shards are whole files: earlier programs read them, too.
const WHOLE_FILES: u32 = 1;

/// The lowest format that can say what these shards are.
#[must_use]
pub fn format_of<'a>(mut shards: impl Iterator<Item = &'a Shard>) -> u32 {
    if shards.any(|shard| shard.cut_from.is_some()) { MANIFEST_FORMAT } else { WHOLE_FILES }
}

/// The hash by which a shard's bytes are known: xxh3-128, 32 hex digits.
#[must_use]
pub fn hash_hex(bytes: &[u8]) -> String {
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(bytes))
}

/// Bytes at the end of a file that [`tail_hash`] covers.
pub const TAIL_HASHED: usize = 64;

/// The hash of the last [`TAIL_HASHED`] bytes of a file (or of all, if it has fewer): xxh3-128, 32 hex digits.
#[must_use]
pub fn tail_hash(bytes: &[u8]) -> String {
    hash_hex(&bytes[bytes.len().saturating_sub(TAIL_HASHED)..])
}

/// A complete snapshot of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifest {
    /// What [`format_of`] says of its shards.
    pub format: u32,
    /// Whose snapshot it is.
    pub job: JobId,
    /// The epoch of its barrier.
    pub epoch: Epoch,
    /// The generation of the coordinator that completed it.
    pub generation: Generation,
    /// The attempt whose tasks took it.
    pub attempt: Attempt,
    /// Wall-clock time of the trigger, milliseconds since the Unix epoch.
    pub triggered_at_ms: i64,
    /// From the trigger to the last acknowledgement, milliseconds.
    pub duration_ms: u64,
    /// Number of key groups. Fixed for the job's life.
    pub max_parallelism: u16,
    /// Fingerprint of the plan that ran.
    pub plan: String,
    /// What somebody last asked the job to start from, as it was named; `None` if nobody ever did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// The parallelism that somebody has chosen for the running job; `None` if it is the spec's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rescaled: Option<Rescaled>,
    /// True if the job's inputs had all ended before the barrier: nothing comes after this snapshot.
    #[serde(default)]
    pub end_of_input: bool,
    /// The state of each operator that has any.
    pub operators: BTreeMap<OperatorUid, OperatorSnapshot>,
}

/// A parallelism that was chosen for a running job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rescaled {
    /// What the job's spec said then. The choice holds for as long as the spec says so.
    pub spec: u32,
    /// Subtasks per task since then.
    pub to: u32,
}

impl Manifest {
    /// A snapshot of this job and epoch with nothing in it: of the first generation and attempt, with one key group; the rest
    /// is empty.
    #[must_use]
    pub fn new(job: JobId, epoch: Epoch) -> Self {
        Self {
            format: WHOLE_FILES,
            job,
            epoch,
            generation: Generation(1),
            attempt: Attempt(1),
            triggered_at_ms: 0,
            duration_ms: 0,
            max_parallelism: 1,
            plan: String::new(),
            origin: None,
            rescaled: None,
            end_of_input: false,
            operators: BTreeMap::new(),
        }
    }

    /// Bytes of all shards; of one that is cut, its share of the file.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.shards().map(Shard::own_size).sum()
    }

    /// Each file once, by one of the shards that name it.
    pub fn files(&self) -> impl Iterator<Item = &Shard> {
        let mut named = BTreeSet::new();
        self.shards().filter(move |shard| named.insert(shard.path.as_str()))
    }

    /// All shards of all operators.
    pub fn shards(&self) -> impl Iterator<Item = &Shard> {
        self.operators.values().flat_map(|o| o.shards.iter())
    }
}

/// The state of one operator, over all its subtasks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OperatorSnapshot {
    /// What the operator is, in words: `kafka source`, `window aggregate`.
    pub kind: String,
    /// The types of its state.
    pub schema: StateSchema,
    /// Number of subtasks that the shards came from.
    pub parallelism: u32,
    /// Source positions, in plain words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub splits: Vec<SplitState>,
    /// The state itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shards: Vec<Shard>,
}

/// How far one split of a source (a Kafka partition, a file, a generator's stripe) has been read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SplitState {
    /// The split's name, unique within its source: `bids-3`, `2026/11/bids.ndjson`.
    pub split: String,
    /// Where to go on reading, as the connector writes it: `{"offset": 1200}`. Resolved, never "latest".
    pub position: serde_json::Value,
    /// The split's own watermark when the barrier passed; `None` before its first row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watermark: Option<TimestampMs>,
    /// True once a bounded split has been read to its end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub finished: bool,
}

/// What a shard holds, and so how it is dealt out at a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ShardKind {
    /// Keyed state, neutral to back ends (a state file of `floodmark_state::shard`): goes to every subtask whose key groups it
    /// overlaps.
    Keyed,
    /// Keyed state as a file of a RocksDB database: goes, like [`ShardKind::Keyed`], to whom its key groups overlap.
    RocksDb,
    /// A list whose elements are dealt out anew to the subtasks at a restore.
    Split,
    /// A list all of whose elements, of all subtasks, go to every subtask at a restore.
    Union,
    /// State that is the same in all subtasks: each gets one copy at a restore.
    Broadcast,
    /// Rows that were on their way to the operator when an unaligned barrier overtook them.
    Channel,
    /// Records that a sink has staged and not yet committed: goes to the committer of the subtask that staged them.
    Staged,
}

/// Where the bytes of a shard stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ShardStatus {
    /// Uploaded by this checkpoint, and durable.
    Uploaded,
    /// Uploaded by an earlier checkpoint and named again.
    Reused,
}

/// One file of one subtask's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Shard {
    /// Relative to the job's folder: `blobs/3/01J….state`.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// xxh3-128 of the whole file, 32 hex digits.
    pub hash: String,
    /// [`tail_hash`] of the file: for who reads just a part of it, by an index at its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<String>,
    /// Index of the subtask that wrote it.
    pub subtask: u32,
    /// What it holds.
    pub kind: ShardKind,
    /// The key groups of a keyed shard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_groups: Option<KeyGroupRange>,
    /// The key groups of its file, if those are more than `key_groups`: then the others' rows in it are not this shard's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_from: Option<KeyGroupRange>,
    /// Rows (keys or records) in it; if it is cut, about.
    pub rows: u64,
    /// Where its bytes stand.
    pub status: ShardStatus,
    /// In which order the keyed shards of one subtask apply: 0 is whole, a later layer changes those before it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub layer: u32,
    /// The barrier up to which the records of a staged shard came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
    /// Tells the shards of an operator apart where it has several of a kind: the name of a RocksDB file, of a list, of an input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// What these key groups have of what `all` have, about.
fn share(of: u64, own: KeyGroupRange, all: KeyGroupRange) -> u64 {
    (u128::from(of) * u128::from(own.width()) / u128::from(all.width())) as u64
}

impl Shard {
    /// The part of it in these key groups; `None` if it has none there, or does not tell its key groups.
    #[must_use]
    pub fn cut_to(&self, key_groups: KeyGroupRange) -> Option<Self> {
        let all = self.key_groups?;
        let own = all.common(&key_groups)?;
        if own == all {
            return Some(self.clone());
        }
        let rows = share(self.rows, own, all);
        Some(Self { key_groups: Some(own), cut_from: Some(self.cut_from.unwrap_or(all)), rows, ..self.clone() })
    }

    /// This part of a file and one behind it as one; `None` if they are not next to each other in one file.
    #[must_use]
    pub fn joined(&self, next: &Self) -> Option<Self> {
        let (own, theirs) = (self.key_groups?, next.key_groups?);
        let of = |shard: &Self| (shard.cut_from, shard.layer);
        if self.path != next.path || of(self) != of(next) || u32::from(own.last.0) + 1 != u32::from(theirs.first.0) {
            return None;
        }
        let both = KeyGroupRange { first: own.first, last: theirs.last };
        let cut_from = self.cut_from.filter(|all| *all != both);
        Some(Self { key_groups: Some(both), cut_from, rows: self.rows.saturating_add(next.rows), ..self.clone() })
    }

    /// Bytes of its file; if it is cut, its share of them, about.
    #[must_use]
    pub fn own_size(&self) -> u64 {
        match (self.key_groups, self.cut_from) {
            (Some(own), Some(all)) => share(self.size, own, all),
            (Some(_) | None, _) => self.size,
        }
    }

    /// A shard of this kind at this path, of subtask 0, freshly uploaded and of layer 0; the rest is empty.
    #[must_use]
    pub fn new(path: impl Into<String>, kind: ShardKind) -> Self {
        Self {
            path: path.into(),
            size: 0,
            hash: String::new(),
            tail: None,
            subtask: 0,
            kind,
            key_groups: None,
            cut_from: None,
            rows: 0,
            status: ShardStatus::Uploaded,
            layer: 0,
            epoch: None,
            name: None,
        }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KeyGroup;

    #[test]
    fn a_part_of_a_file_knows_its_key_groups_and_its_share() {
        let range = |first, last| KeyGroupRange { first: KeyGroup(first), last: KeyGroup(last) };
        let whole =
            Shard { size: 1_000, rows: 100, key_groups: Some(range(0, 9)), ..Shard::new("a", ShardKind::Keyed) };
        assert_eq!(whole.cut_to(range(0, 63)), Some(whole.clone()), "all of it");
        assert_eq!(whole.cut_to(range(10, 63)), None);
        let part = whole.cut_to(range(5, 63)).unwrap();
        assert_eq!((part.key_groups, part.cut_from, part.rows), (Some(range(5, 9)), whole.key_groups, 50));
        assert_eq!((part.size, part.own_size()), (1_000, 500));
        let less = part.cut_to(range(0, 5)).unwrap();
        assert_eq!((less.key_groups, less.cut_from, less.own_size()), (Some(range(5, 5)), whole.key_groups, 100));
        let rest = whole.cut_to(range(0, 4)).unwrap();
        assert_eq!(rest.joined(&part), Some(whole.clone()));
        assert_eq!((part.joined(&rest), rest.joined(&less).unwrap().own_size()), (None, 600));
        assert_eq!(rest.joined(&whole.cut_to(range(6, 9)).unwrap()), None, "key group 5 is between them");
        assert_eq!(rest.joined(&Shard { path: "b".into(), ..part.clone() }), None, "another file");
        let json = serde_json::to_string(&less).unwrap();
        assert_eq!(serde_json::from_str::<Shard>(&json).unwrap(), less);
        assert!(!serde_json::to_string(&whole).unwrap().contains("cutFrom"));
        assert_eq!([&whole, &less].map(|shard| format_of([shard].into_iter())), [1, 2]);
    }
}
