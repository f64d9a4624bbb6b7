//! What has been removed since the checkpoints that later ones build on. Pure.

use std::sync::Arc;

use crate::keyed::RowKeys;

/// What was removed in one interval.
#[derive(Debug, Default)]
pub(super) struct Removed {
    pub(super) interval: u32,
    /// Whole namespaces.
    pub(super) namespaces: Vec<i64>,
    pub(super) keys: RowKeys,
}

impl Removed {
    fn len(&self) -> usize {
        self.namespaces.len() + self.keys.len()
    }
}

/// Removals by interval.
#[derive(Debug, Default)]
pub(super) struct Removals {
    ended: Vec<Arc<Removed>>,
    present: Removed,
}

impl Removals {
    pub(super) fn key(&mut self, namespace: i64, hash: u64, key: &[u8]) {
        self.present.keys.push(namespace, hash, key);
    }

    pub(super) fn namespace(&mut self, namespace: i64) {
        self.present.namespaces.push(namespace);
    }

    /// Puts those of earlier intervals before these.
    pub(super) fn follow(&mut self, mut earlier: Self) {
        earlier.ended.append(&mut self.ended);
        self.ended = earlier.ended;
    }

    /// Those remembered.
    pub(super) fn len(&self) -> usize {
        self.present.len() + self.ended.iter().map(|r| r.len()).sum::<usize>()
    }

    /// Ends an interval. Answers how many removals there were in it.
    pub(super) fn end(&mut self, interval: u32) -> u64 {
        let mut ended = std::mem::take(&mut self.present);
        let removed = ended.len() as u64;
        if removed > 0 {
            ended.interval = interval;
            self.ended.push(Arc::new(ended));
        }
        removed
    }

    /// Those of intervals after this one.
    pub(super) fn since(&self, interval: u32) -> Vec<Arc<Removed>> {
        self.ended.iter().filter(|r| r.interval > interval).cloned().collect()
    }

    /// Forgets those up to an interval.
    pub(super) fn forget(&mut self, interval: u32) {
        self.ended.retain(|r| r.interval > interval);
    }
}
