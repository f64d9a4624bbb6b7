//! The numbers and names of the protocol, each with a type of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The number after this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// The number that a barrier carries, and the checkpoint that comes of it. Starts at 1; 0 stands for "before the first".
    Epoch
}
counter! {
    /// One reign of a coordinator. Only ever grows; fences whatever is older.
    Generation
}
counter! {
    /// One run of a job's tasks. Only ever grows; names the folder of the blobs that it uploads.
    Attempt
}

/// Event time in milliseconds since the Unix epoch (UTC).
pub type TimestampMs = i64;

/// The stable identity of an operator, by which its state finds it again after an upgrade.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OperatorUid(pub String);

impl fmt::Display for OperatorUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for OperatorUid {
    fn from(uid: &str) -> Self {
        Self(uid.to_owned())
    }
}

/// Which job a snapshot belongs to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobId {
    /// Namespace of the `StreamJob`; `default` when the manifest names none.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`; `local` for a job that runs without a cluster.
    pub uid: String,
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.namespace, self.name, self.uid)
    }
}

/// The unit in which keyed state moves: `hash(key) mod maxParallelism`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyGroup(pub u16);

impl KeyGroup {
    /// The key group of a key with this hash.
    #[inline]
    #[must_use]
    pub fn of(hash: u64, max_parallelism: u16) -> Self {
        Self((hash % u64::from(max_parallelism)) as u16)
    }

    /// The subtask that owns this key group, of `parallelism` subtasks.
    #[inline]
    #[must_use]
    pub fn subtask(self, parallelism: u32, max_parallelism: u16) -> u32 {
        u32::from(self.0) * parallelism / u32::from(max_parallelism)
    }
}

/// Key groups `first..=last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KeyGroupRange {
    /// First key group of the range.
    pub first: KeyGroup,
    /// Last key group of the range, included.
    pub last: KeyGroup,
}

impl KeyGroupRange {
    /// The key groups that subtask `index` of `parallelism` owns. Together the subtasks own each key group once.
    ///
    /// Needs `index < parallelism <= max_parallelism`.
    #[must_use]
    pub fn of_subtask(index: u32, parallelism: u32, max_parallelism: u16) -> Self {
        let max = u32::from(max_parallelism);
        // The inverse of `KeyGroup::subtask`: the smallest group g with g * parallelism / max == index.
        let start = |i: u32| (i * max).div_ceil(parallelism);
        Self { first: KeyGroup(start(index) as u16), last: KeyGroup((start(index + 1) - 1) as u16) }
    }

    /// Whether the group is in the range.
    #[inline]
    #[must_use]
    pub fn contains(&self, group: KeyGroup) -> bool {
        self.first <= group && group <= self.last
    }

    /// Number of key groups in it.
    #[must_use]
    pub fn width(&self) -> u64 {
        u64::from(self.last.0.saturating_sub(self.first.0)) + 1
    }

    /// Whether the two ranges share a key group.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// The key groups that both ranges have.
    #[must_use]
    pub fn common(&self, other: &Self) -> Option<Self> {
        self.overlaps(other).then(|| Self { first: self.first.max(other.first), last: self.last.min(other.last) })
    }
}

impl fmt::Display for KeyGroupRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first.0, self.last.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_group_has_exactly_one_owner_at_any_parallelism() {
        for max in [1_u16, 2, 7, 128, 1000] {
            for parallelism in 1..=u32::from(max).min(130) {
                for group in (0..max).map(KeyGroup) {
                    let owner = group.subtask(parallelism, max);
                    let owners: Vec<u32> = (0..parallelism)
                        .filter(|i| KeyGroupRange::of_subtask(*i, parallelism, max).contains(group))
                        .collect();
                    assert_eq!(owners, vec![owner], "group {} of {max} at parallelism {parallelism}", group.0);
                }
            }
        }
    }
}
