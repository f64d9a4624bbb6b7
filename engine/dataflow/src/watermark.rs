//! How far event time has come: over the splits of a source, and over the input channels of a task. Pure.
//!
//! Invariant: a combined watermark only grows, and is never past the watermark of an input that is active.

use std::time::Duration;

use floodmark_snapshot::TimestampMs;

use crate::{WATERMARK_MAX, WATERMARK_MIN};

/// What the inputs come to together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combined {
    /// Nothing new.
    Unchanged,
    /// Event time has reached this.
    Advanced(TimestampMs),
    /// No input is active any more: whoever is downstream must not wait for this one.
    BecameIdle,
}

/// What downstream has been told.
#[derive(Clone, Copy, Debug)]
struct Sent {
    watermark: TimestampMs,
    idle: bool,
}

impl Default for Sent {
    fn default() -> Self {
        Self { watermark: WATERMARK_MIN, idle: false }
    }
}

impl Sent {
    /// What to tell, now that the least watermark of the active inputs is this; `None` if none is active.
    fn combine(&mut self, least: Option<TimestampMs>) -> Combined {
        match least {
            Some(watermark) if watermark > self.watermark => {
                *self = Self { watermark, idle: false };
                Combined::Advanced(watermark)
            }
            // Who was idle is active again: what is downstream must wait for it again.
            Some(_) if self.idle && self.watermark > WATERMARK_MIN => {
                self.idle = false;
                Combined::Advanced(self.watermark)
            }
            Some(_) => Combined::Unchanged,
            None if self.idle => Combined::Unchanged,
            None => {
                self.idle = true;
                Combined::BecameIdle
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Split {
    watermark: Option<TimestampMs>,
    last_row: Duration,
    finished: bool,
}

/// Watermarks of a source subtask's splits.
#[derive(Debug)]
pub struct SplitWatermarks {
    splits: Vec<Split>,
    idle_timeout: Option<Duration>,
    sent: Sent,
}

impl SplitWatermarks {
    /// Splits with the watermarks (and ends) that a snapshot holds of them. Idleness counts from `now`, by the monotonic clock.
    #[must_use]
    pub fn new(
        restored: impl IntoIterator<Item = (Option<TimestampMs>, bool)>,
        idle_timeout: Option<Duration>,
        now: Duration,
    ) -> Self {
        let split = |(watermark, finished)| Split { watermark, last_row: now, finished };
        Self { splits: restored.into_iter().map(split).collect(), idle_timeout, sent: Sent::default() }
    }

    /// Rows of `split` have come; `watermark` is the greatest that they stand for.
    ///
    /// A split that is past those known so far was found while the job ran.
    pub fn rows(&mut self, split: usize, watermark: Option<TimestampMs>, now: Duration) {
        while self.splits.len() <= split {
            self.splits.push(Split { watermark: None, last_row: now, finished: false });
        }
        if let Some(state) = self.splits.get_mut(split) {
            state.last_row = now;
            // Data can't end the stream, however far in the future it claims to be.
            state.watermark = state.watermark.max(watermark.map(|w| w.min(WATERMARK_MAX - 1)));
        }
    }

    /// `split` has been read to its end.
    pub fn finished(&mut self, split: usize) {
        if let Some(state) = self.splits.get_mut(split) {
            state.finished = true;
        }
    }

    /// The watermark of one split; `None` before its first row.
    #[must_use]
    pub fn of(&self, split: usize) -> Option<TimestampMs> {
        self.splits.get(split).and_then(|s| s.watermark)
    }

    /// What the splits come to now: the least watermark of those that are neither finished nor idle.
    ///
    /// Finished splits make nobody idle: the end of the input follows, and with it the last watermark. Idle in between, a
    /// subtask downstream could be passed by its siblings, and what it has still to emit would come too late.
    pub fn combine(&mut self, now: Duration) -> Combined {
        if !self.splits.is_empty() && self.splits.iter().all(|s| s.finished) {
            return Combined::Unchanged;
        }
        let idle = |s: &Split| self.idle_timeout.is_some_and(|t| now.saturating_sub(s.last_row) >= t);
        let least =
            self.splits.iter().filter(|s| !s.finished && !idle(s)).map(|s| s.watermark.unwrap_or(WATERMARK_MIN)).min();
        self.sent.combine(least)
    }
}

#[derive(Clone, Copy, Debug)]
struct Channel {
    watermark: TimestampMs,
    idle: bool,
}

/// Watermarks of a task's input channels.
#[derive(Debug)]
pub struct InputWatermarks {
    channels: Vec<Channel>,
    sent: Sent,
}

impl InputWatermarks {
    /// Channels that have sent nothing yet.
    #[must_use]
    pub fn new(channels: usize) -> Self {
        Self { channels: vec![Channel { watermark: WATERMARK_MIN, idle: false }; channels], sent: Sent::default() }
    }

    /// A watermark has come on `channel`: it is active.
    pub fn watermark(&mut self, channel: usize, watermark: TimestampMs) -> Combined {
        if let Some(state) = self.channels.get_mut(channel) {
            *state = Channel { watermark: watermark.max(state.watermark), idle: false };
        }
        self.combine()
    }

    /// `channel` holds no watermark back until it sends something again.
    pub fn idle(&mut self, channel: usize) -> Combined {
        if let Some(state) = self.channels.get_mut(channel) {
            state.idle = true;
        }
        self.combine()
    }

    fn combine(&mut self) -> Combined {
        // An input that is silent may speak again: the others' end is not the end of time.
        let all_over = self.channels.iter().all(|c| c.watermark >= WATERMARK_MAX);
        match self.channels.iter().filter(|c| !c.idle).map(|c| c.watermark).min() {
            Some(WATERMARK_MAX..) if !all_over => Combined::Unchanged,
            least => self.sent.combine(least.map(|w| w.min(WATERMARK_MAX))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn the_slowest_active_split_holds_the_watermark() {
        let mut splits = SplitWatermarks::new([(None, false), (None, false)], None, seconds(0));
        splits.rows(0, Some(100), seconds(1));
        assert_eq!(splits.combine(seconds(1)), Combined::Unchanged);
        splits.rows(1, Some(70), seconds(1));
        assert_eq!(splits.combine(seconds(1)), Combined::Advanced(70));
        splits.rows(1, Some(60), seconds(2));
        assert_eq!(splits.combine(seconds(2)), Combined::Unchanged);
        splits.finished(1);
        assert_eq!(splits.combine(seconds(2)), Combined::Advanced(100));
        splits.finished(0);
        assert_eq!(splits.combine(seconds(2)), Combined::Unchanged, "the end of the input follows");
    }

    #[test]
    fn a_silent_split_stops_counting_after_the_timeout_and_counts_again_with_its_next_row() {
        let mut splits = SplitWatermarks::new([(None, false), (None, false)], Some(seconds(5)), seconds(0));
        splits.rows(0, Some(100), seconds(4));
        assert_eq!(splits.combine(seconds(4)), Combined::Unchanged);
        assert_eq!(splits.combine(seconds(5)), Combined::Advanced(100));
        assert_eq!(splits.combine(seconds(9)), Combined::BecameIdle);
        splits.rows(1, Some(40), seconds(10));
        assert_eq!(splits.combine(seconds(10)), Combined::Advanced(100), "active again, and never back");
        splits.rows(1, Some(170), seconds(11));
        assert_eq!(splits.combine(seconds(11)), Combined::Advanced(170));
    }

    #[test]
    fn restored_splits_go_on_from_their_watermarks() {
        let mut splits = SplitWatermarks::new([(Some(50), false), (Some(80), true)], None, seconds(0));
        assert_eq!(splits.combine(seconds(0)), Combined::Advanced(50));
        assert_eq!(splits.of(1), Some(80));
    }

    #[test]
    fn the_slowest_active_channel_holds_the_watermark() {
        let mut inputs = InputWatermarks::new(2);
        assert_eq!(inputs.watermark(0, 10), Combined::Unchanged);
        assert_eq!(inputs.watermark(1, 5), Combined::Advanced(5));
        assert_eq!(inputs.idle(1), Combined::Advanced(10));
        assert_eq!(inputs.idle(0), Combined::BecameIdle);
        assert_eq!(inputs.watermark(1, 7), Combined::Advanced(10), "active again, and never back");
        assert_eq!(inputs.watermark(1, 30), Combined::Advanced(30));
        assert_eq!(inputs.watermark(0, 20), Combined::Unchanged);
        assert_eq!(inputs.watermark(0, 40), Combined::Unchanged);
        assert_eq!(inputs.idle(1), Combined::Advanced(40));
        assert_eq!(inputs.watermark(0, WATERMARK_MAX), Combined::Unchanged, "the silent one may speak again");
        assert_eq!(inputs.watermark(1, WATERMARK_MAX), Combined::Advanced(WATERMARK_MAX));
    }
}
