//! Makes room in memory: which rows leave it, and when they may. Also removes rows whose time is over.
//!
//! A clock's hand goes over all cached rows. One that was wanted since it last came by is spared once; a clean one leaves at
//! once; a dirty one is handed over to be written, and leaves when that is done, unless it was wanted again meanwhile. The task
//! waits for its writer only when a quarter more than its share is in memory. So hot rows stay, however many cold ones pass by.
//!
//! Room is made ahead of need and a little in each call, in proportion to the rows that the call may bring in: no batch pays for
//! those before it.

use std::{collections::VecDeque, ops::Bound};

use floodmark_snapshot::Result;

use crate::{database::Strings, key, state::State};

/// Slots that the hand looks at before the bytes are counted anew.
const STRIDE: u32 = 256;
/// Times that the hand comes round at once: the first may be a part of a round, the second finds what was spared.
const ROUNDS_MAX: u32 = 3;
/// Room begins to be made at this share of the bytes (as a fraction of 8), a little in each call.
const GOAL_EIGHTHS: usize = 7;
/// Slots that the hand passes in a call, and rows that leave in it, at most, as long as the bytes are within the share: so many,
const SLOTS_PER_CALL: usize = 256;
/// and so many for each key that the call is about. More than one because the hand spares what is wanted.
const SLOTS_PER_KEY: usize = 4;
/// Cached rows that are looked at for their time in each call.
const SWEPT_ROWS: u32 = 64;
/// Calls from one look at the database for rows whose time is over to the next.
const CALLS_PER_DATABASE_SWEEP: u32 = 64;
/// Rows that such a look takes in.
const SWEPT_STORED_ROWS: u32 = 1024;

/// Where the hands stand.
#[derive(Default)]
pub(crate) struct Clock {
    hand: Place,
    /// Rows that are being written in order to leave.
    leaving: VecDeque<Leaving>,
    /// About how many bytes those take.
    leaving_bytes: usize,
    sweep: Place,
    calls: u32,
    /// The key behind which the next look at the database begins.
    stored: Vec<u8>,
}

/// A slot of a namespace.
#[derive(Clone, Copy)]
struct Place {
    namespace: i64,
    slot: u32,
}

impl Default for Place {
    fn default() -> Self {
        Self { namespace: i64::MIN, slot: 0 }
    }
}

struct Leaving {
    job: u64,
    place: Place,
    bytes: usize,
}

impl State {
    /// Makes room for a call that is about so many keys.
    pub(crate) fn make_room(&mut self, keys: usize) -> Result<()> {
        let share = self.share.bytes();
        let goal = share / 8 * GOAL_EIGHTHS;
        if self.cached_bytes <= goal {
            return Ok(());
        }
        let slots = SLOTS_PER_CALL + SLOTS_PER_KEY * keys;
        self.let_go(slots);
        self.turn_hand(goal, slots)?;
        // That does not do if the share has become less, or nearly all rows are wanted.
        self.turn_hand(share, usize::MAX)?;
        while self.cached_bytes > share + share / 4 {
            // The oldest that is under way; the newest of all if what keeps the room are rows of a checkpoint.
            let job = self.clock.leaving.front().map_or(self.frozen, |l| l.job);
            if job > self.outgoing.done() {
                self.outgoing.wait(&self.database, job)?;
            } else if self.clock.leaving.is_empty() {
                // Nothing is on its way out: what is left is in use.
                return Ok(());
            }
            self.let_go(usize::MAX);
            self.turn_hand(share, usize::MAX)?;
        }
        Ok(())
    }

    /// Lets go of rows that have been written by now, of so many at most.
    fn let_go(&mut self, rows: usize) {
        let done = self.outgoing.done();
        let mut last = None;
        for _ in 0..rows {
            let Some(Leaving { place, bytes, .. }) = self.clock.leaving.pop_front_if(|l| l.job <= done) else { break };
            self.clock.leaving_bytes -= bytes;
            if last.is_some_and(|l| l != place.namespace) {
                last.into_iter().for_each(|l| self.account(l));
            }
            last = Some(place.namespace);
            let Some(space) = self.spaces.get_mut(&place.namespace) else { continue };
            let Some(cache) = space.cache.as_mut() else { continue };
            // The slot may be somebody else's by now: any row that is clean and unwanted may leave.
            if cache.has(place.slot) && cache.is_clean(place.slot, done) && !cache.is_wanted(place.slot) {
                cache.remove(place.slot);
            }
        }
        last.into_iter().for_each(|l| self.account(l));
    }

    /// Turns the hand until enough rows have left or are on their way, by so many slots at most.
    fn turn_hand(&mut self, goal: usize, slots: usize) -> Result<()> {
        let (mut rounds, mut left) = (0, slots);
        while left > 0 && rounds < ROUNDS_MAX && self.cached_bytes.saturating_sub(self.clock.leaving_bytes) > goal {
            let Place { namespace, slot } = self.clock.hand;
            let slots = self.spaces.get(&namespace).and_then(|s| s.cache.as_ref()).map_or(0, |c| c.slots());
            if slot < slots {
                let end = slots.min(slot + STRIDE);
                self.pass(namespace, slot, end)?;
                self.clock.hand.slot = end;
                self.account(namespace);
                left = left.saturating_sub((end - slot) as usize);
                continue;
            }
            let next = self.spaces.range((Bound::Excluded(namespace), Bound::Unbounded)).next();
            match next.or_else(|| self.spaces.first_key_value()).map(|(n, _)| *n) {
                Some(next) => {
                    rounds += u32::from(next <= namespace);
                    self.clock.hand = Place { namespace: next, slot: 0 };
                    left -= 1;
                }
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// The hand passes over slots of a namespace.
    fn pass(&mut self, namespace: i64, from: u32, to: u32) -> Result<()> {
        let (now, done) = (self.now(), self.outgoing.done());
        let (mut key, mut value) = (Vec::new(), Vec::new());
        for slot in from..to {
            let Some(space) = self.spaces.get_mut(&namespace) else { return Ok(()) };
            let Some(cache) = space.cache.as_mut() else { return Ok(()) };
            if !cache.has(slot) {
                continue;
            }
            let written = cache.written(slot);
            if self.spec.ttl.is_some_and(|ttl| now.saturating_sub(written) > ttl.as_millis() as i64) {
                self.remove_row(namespace, slot);
            } else if cache.spare(slot) {
                // Next time, then.
            } else if cache.is_dirty(slot) {
                let job = self.outgoing.next();
                let new = cache.handed_over(slot, job);
                let (chunk, row) = cache.table.rows().read(slot as usize);
                key.clear();
                value.clear();
                let group = floodmark_snapshot::KeyGroup::of(chunk.hash(row), self.spec.max_parallelism);
                space.stored.add(group, u64::from(new));
                key::write(&mut key, group, namespace, chunk.key(row));
                self.form.write(chunk, row, written, &mut value);
                self.outgoing.put(&key, &value);
                let bytes = cache.row_bytes();
                self.clock.leaving_bytes += bytes;
                self.clock.leaving.push_back(Leaving { job, place: Place { namespace, slot }, bytes });
            } else if cache.is_clean(slot, done) {
                cache.remove(slot);
            }
        }
        self.outgoing.send_full(&self.database)
    }

    /// Looks at a few rows for whether their time is over, and removes them then.
    pub(crate) fn sweep(&mut self) -> Result<()> {
        if !self.form.timed || self.spaces.is_empty() {
            return Ok(());
        }
        self.sweep_cached();
        self.clock.calls += 1;
        if self.clock.calls >= CALLS_PER_DATABASE_SWEEP {
            self.clock.calls = 0;
            self.sweep_stored()?;
        }
        self.outgoing.send_full(&self.database)
    }

    fn sweep_cached(&mut self) {
        let Place { namespace, slot } = self.clock.sweep;
        let now = self.now();
        let cache = self.spaces.get(&namespace).and_then(|s| s.cache.as_ref());
        let (slots, over): (u32, Vec<u32>) = cache.map_or((0, Vec::new()), |c| {
            let end = c.slots().min(slot + SWEPT_ROWS);
            (c.slots(), (slot..end).filter(|s| c.has(*s) && self.expired(c.written(*s), now)).collect())
        });
        for slot in &over {
            self.remove_row(namespace, *slot);
        }
        if !over.is_empty() {
            self.account(namespace);
        }
        self.clock.sweep.slot = slot + SWEPT_ROWS;
        if self.clock.sweep.slot >= slots {
            let next = self.spaces.range((Bound::Excluded(namespace), Bound::Unbounded)).next();
            let next = next.or_else(|| self.spaces.first_key_value()).map_or(i64::MIN, |(n, _)| *n);
            self.clock.sweep = Place { namespace: next, slot: 0 };
        }
    }

    fn sweep_stored(&mut self) -> Result<()> {
        if self.spaces.values().take(1).all(|s| s.complete()) && self.spaces.len() == 1 {
            return Ok(());
        }
        let (now, mut left) = (self.now(), SWEPT_STORED_ROWS);
        let (mut over, mut keys) = (Vec::new(), Strings::default());
        let mut last = Vec::new();
        // Files of an earlier subtask may have rows of others' key groups.
        let start = std::mem::take(&mut self.clock.stored).max(key::group_start(self.spec.key_groups.first));
        let end = key::group_end(self.spec.key_groups.last);
        self.database.scan(&start, end, |key, value| {
            if left == 0 {
                last = key.to_vec();
                return Ok(false);
            }
            left -= 1;
            if let Some((group, namespace, row_key)) = key::parse(key)
                && self.expired(self.form.written(value)?, now)
                && !self.outgoing.is_gone(key)
                && self.outgoing.dropping(namespace).is_none()
            {
                keys.push(|out| out.extend_from_slice(row_key));
                over.push((namespace, group, key.to_vec()));
            }
            Ok(true)
        })?;
        self.clock.stored = last;
        let hashes = self.hashes(&keys)?;
        for (at, (namespace, group, key)) in over.into_iter().enumerate() {
            let Some(space) = self.spaces.get_mut(&namespace) else { continue };
            // One that is in memory is judged by what is there.
            if space.cache.as_ref().is_some_and(|c| c.holds(hashes[at], keys.get(at))) {
                continue;
            }
            space.stored.remove(group);
            self.outgoing.delete(&key);
            self.account(namespace);
        }
        Ok(())
    }
}
