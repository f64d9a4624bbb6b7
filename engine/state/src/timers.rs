//! Timers: keys that want to be called at a time. Pure.
//!
//! A timer is a row without columns in the namespace of its time, so that timers are snapshotted, restored and moved with
//! their keys like any state. What time is (event time or the clock) is the owner's business, who has a set of timers for
//! each.
//!
//! Invariant: a timer that is set and not cancelled comes due once, in the order of times, also across restores.

use floodmark_snapshot::Result;

use crate::keyed::{KeyedState, NO_SLOT, RowKeys};

/// Timers of one kind of time.
pub struct Timers {
    state: Box<dyn KeyedState>,
}

impl Timers {
    /// Timers kept in a state, whose layout has no columns to keep.
    #[must_use]
    pub fn new(state: Box<dyn KeyedState>) -> Self {
        Self { state }
    }

    /// Sets a timer for each key. One that is set already stays as it is.
    ///
    /// # Errors
    /// Those of the state.
    pub fn set(&mut self, time: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<()> {
        self.state.slots(time, hashes, keys).map(drop)
    }

    /// Takes the timers of these keys back, if they are set.
    ///
    /// # Errors
    /// Those of the state.
    pub fn cancel(&mut self, time: i64, hashes: &[u64], keys: &[&[u8]]) -> Result<()> {
        let mut slots = self.state.find(time, hashes, keys)?;
        slots.sort_unstable();
        slots.dedup();
        slots.retain(|slot| *slot != NO_SLOT);
        if slots.is_empty() { Ok(()) } else { self.state.remove(time, &slots) }
    }

    /// The time of the next timer.
    #[must_use]
    pub fn next(&self) -> Option<i64> {
        self.state.first_namespace()
    }

    /// Takes the timers of the least time at or before `now` out: that time, and their keys. To be called until there is none:
    /// those set meanwhile come too.
    ///
    /// # Errors
    /// Those of the state.
    pub fn due(&mut self, now: i64) -> Result<Option<(i64, RowKeys)>> {
        let Some(time) = self.next().filter(|time| *time <= now) else { return Ok(None) };
        let mut keys = RowKeys::default();
        self.state.scan(time, &mut |rows, slots| {
            slots.iter().for_each(|slot| keys.push(time, rows.hash(*slot), rows.key(*slot)));
            Ok(())
        })?;
        self.state.drop_namespace(time)?;
        Ok(Some((time, keys)))
    }

    /// The state, to be snapshotted and restored.
    pub fn state(&mut self) -> &mut dyn KeyedState {
        &mut *self.state
    }
}
