//! State of an operator that belongs to no key: lists of elements, dealt out anew at a restore. Pure.
//!
//! Elements are bytes; what they mean is the operator's business. Every subtask is given the shards of all earlier ones, and
//! takes what is its own.

use std::collections::BTreeMap;

use bytes::Bytes;
use floodmark_snapshot::{
    Error, Result, Shard, ShardKind,
    block::{BlockWriter, read_blocks},
};

use crate::snapshot::{PendingShard, RestoredShard, StateSnapshot};

const KIND: &str = "list";

/// Who gets which elements at a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dealing {
    /// Each element goes to one subtask, in turn.
    Split,
    /// All elements of all subtasks go to every subtask.
    Union,
    /// All subtasks have the same list, and each gets it.
    Broadcast,
}

impl Dealing {
    fn kind(self) -> ShardKind {
        match self {
            Self::Split => ShardKind::Split,
            Self::Union => ShardKind::Union,
            Self::Broadcast => ShardKind::Broadcast,
        }
    }
}

/// A list of one subtask.
#[derive(Debug)]
pub struct OperatorState {
    dealing: Dealing,
    name: String,
    subtask: u32,
    parallelism: u32,
    /// The elements, in order.
    pub elements: Vec<Bytes>,
    /// Elements of earlier subtasks.
    restoring: BTreeMap<u32, Vec<Bytes>>,
}

impl OperatorState {
    /// An empty list of this name, which tells the lists of one operator apart, for subtask `subtask` of `parallelism`.
    #[must_use]
    pub fn new(dealing: Dealing, name: &str, subtask: u32, parallelism: u32) -> Self {
        let name = name.to_owned();
        Self { dealing, name, subtask, parallelism, elements: Vec::new(), restoring: BTreeMap::new() }
    }

    /// Whether a shard of the operator is of this list.
    #[must_use]
    pub fn holds(&self, shard: &Shard) -> bool {
        shard.kind == self.dealing.kind() && shard.name.as_deref() == Some(&*self.name)
    }

    /// The elements as they are. Of lists that are the same everywhere, subtask 0 writes one.
    #[must_use]
    pub fn snapshot(&self) -> StateSnapshot {
        if self.dealing == Dealing::Broadcast && self.subtask > 0 {
            return StateSnapshot::default();
        }
        let elements = self.elements.clone();
        let encode = move || {
            let mut blocks = BlockWriter::new(KIND);
            elements.iter().try_for_each(|element| blocks.push(element))?;
            Ok(blocks.finish())
        };
        let rows = self.elements.len() as u64;
        let shard = PendingShard::new(self.dealing.kind(), None, rows, Box::new(encode));
        StateSnapshot::of(vec![PendingShard { name: Some(self.name.clone()), ..shard }])
    }

    /// Takes in a shard of this list ([`OperatorState::holds`]), from any earlier subtask.
    ///
    /// # Errors
    /// `Corrupt` if it is damaged.
    pub fn restore(&mut self, shard: &RestoredShard) -> Result<()> {
        if !self.holds(&shard.shard) {
            return Err(Error::abort(format!("shard {} is not of list '{}'", shard.shard.path, self.name)));
        }
        let elements = read_blocks(KIND, shard.file()?)?;
        self.restoring.entry(shard.shard.subtask).or_default().extend(elements);
        Ok(())
    }

    /// All shards have been taken in: deals the elements out.
    pub fn restored(&mut self) {
        let mut lists = std::mem::take(&mut self.restoring).into_values();
        self.elements = match self.dealing {
            Dealing::Split => {
                let (first, step) = (self.subtask as usize, self.parallelism.max(1) as usize);
                lists.flatten().skip(first).step_by(step).collect()
            }
            Dealing::Union => lists.flatten().collect(),
            Dealing::Broadcast => lists.next().unwrap_or_default(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lists of `to` subtasks, restored from those of several.
    fn dealt(dealing: Dealing, lists: &[&[&'static str]], to: u32) -> Vec<Vec<String>> {
        let mut shards = Vec::new();
        for (subtask, list) in (0..).zip(lists) {
            let mut state = OperatorState::new(dealing, "offsets", subtask, lists.len() as u32);
            state.elements = list.iter().map(|e| Bytes::from_static(e.as_bytes())).collect();
            for pending in state.snapshot().pending {
                let PendingShard { kind, name, rows, encode, .. } = pending;
                let shard = Shard { subtask, name, rows, ..Shard::new("list", kind) };
                shards.push(RestoredShard::new(shard, encode().unwrap()));
            }
        }
        let one = |subtask| {
            let mut state = OperatorState::new(dealing, "offsets", subtask, to);
            shards.iter().for_each(|shard| state.restore(shard).unwrap());
            state.restored();
            state.elements.iter().map(|e| String::from_utf8(e.to_vec()).unwrap()).collect()
        };
        (0..to).map(one).collect()
    }

    #[test]
    fn elements_are_dealt_out_anew() {
        let lists: &[&[&str]] = &[&["a", "b", "c"], &[], &["d", "e"]];
        assert_eq!(dealt(Dealing::Split, lists, 2), [vec!["a", "c", "e"], vec!["b", "d"]]);
        assert_eq!(dealt(Dealing::Split, lists, 7).concat(), ["a", "b", "c", "d", "e"]);
        assert_eq!(dealt(Dealing::Union, lists, 2), vec![vec!["a", "b", "c", "d", "e"]; 2]);
        let same: &[&[&str]] = &[&["x", "y"], &["x", "y"]];
        assert_eq!(dealt(Dealing::Broadcast, same, 3), vec![vec!["x", "y"]; 3]);
    }

    #[test]
    fn a_damaged_or_foreign_list_is_told() {
        let mut state = OperatorState::new(Dealing::Union, "offsets", 0, 1);
        state.elements = vec![Bytes::from_static(b"element")];
        let bytes = (state.snapshot().pending.remove(0).encode)().unwrap();
        let shard = Shard { name: Some("offsets".into()), ..Shard::new("list", ShardKind::Union) };
        for at in 0..bytes.len() {
            let mut bad = bytes.to_vec();
            bad[at] ^= 1;
            let bad = RestoredShard::new(shard.clone(), bad.into());
            assert_eq!(state.restore(&bad).unwrap_err().disposition(), floodmark_snapshot::Disposition::Corrupt);
        }
        let other = Shard { name: Some("others".into()), ..shard };
        assert!(state.restore(&RestoredShard::new(other, bytes)).is_err());
    }
}
