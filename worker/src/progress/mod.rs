//! What a running job shows of itself: counters per operator, where its time goes, its checkpoints and its failures. Written
//! by the coordinator's shell and the tasks, read by whoever displays it; no decision rests on it.

mod counters;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use floodmark_snapshot::{
    Attempt, Epoch,
    coordination::{Barrier, Time},
};
use tokio::sync::watch;

pub(crate) use self::counters::{Counted, Counters, Metrics};
pub use self::counters::{OperatorStatus, Shares, TaskIndex, TaskStatus};

/// Checkpoints that are remembered, the oldest are forgotten first.
pub const CHECKPOINTS_REMEMBERED_MAX: usize = 32;
/// Bytes of an error's text that are remembered.
const CAUSE_MAX: usize = 4096;

/// Where a job's life stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JobPhase {
    /// Reading the checkpoint log and the newest intact checkpoint.
    #[default]
    Restoring,
    /// Tasks run.
    Running,
    /// The last checkpoint is under way; sources have stopped.
    Stopping,
    /// All done.
    Done,
}

impl JobPhase {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Restoring, Self::Running, Self::Stopping, Self::Done];

    /// In one word, as programs read it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Restoring => "restoring",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Done => "done",
        }
    }
}

/// How far a process is as a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkerPhase {
    /// It looks for its coordinator.
    #[default]
    Looking,
    /// It runs nothing, and waits to be told what.
    Waiting,
    /// It builds what it is to run, or waits for the others to have built theirs.
    Building,
    /// Tasks run.
    Running {
        /// Subtasks whose state is not all there yet.
        restoring: usize,
    },
}

/// A completed checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointStatus {
    /// Its number.
    pub epoch: Epoch,
    /// Wall-clock time of its trigger, milliseconds.
    pub triggered_at_ms: i64,
    /// From the trigger to the last acknowledgement.
    pub duration_ms: u64,
    /// Bytes of all its shards.
    pub size: u64,
}

/// Checkpoints of this run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointCounts {
    /// Completed.
    pub completed: u64,
    /// Failed or timed out.
    pub failed: u64,
    /// Given up because a later one was complete before them: nothing is wrong with that.
    pub overtaken: u64,
    /// The newest completed one.
    pub last: Option<CheckpointStatus>,
}

/// A checkpoint that was triggered, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointRecord {
    /// Its number and kind.
    pub barrier: Barrier,
    /// Wall-clock time of its trigger, milliseconds.
    pub triggered_at_ms: i64,
    /// Whether its barriers have overtaken rows in flight.
    pub unaligned: bool,
    /// See above.
    pub state: CheckpointState,
    /// By the monotonic clock.
    triggered: Duration,
}

/// What became of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckpointState {
    /// Nothing yet.
    UnderWay,
    /// It is durable.
    Completed {
        /// From the trigger to the last acknowledgement.
        duration_ms: u64,
        /// Bytes of all its shards.
        size: u64,
    },
    /// It failed or timed out.
    Failed {
        /// From the trigger to then.
        duration_ms: u64,
        /// Why.
        reason: String,
    },
    /// A later one was complete before it.
    Overtaken {
        /// From the trigger to then.
        duration_ms: u64,
        /// In words.
        reason: String,
    },
}

/// The attempts of a job, as far as this process has made them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttemptStatus {
    /// The present one, or the last; `None` before the first, and for jobs without snapshots.
    pub attempt: Option<Attempt>,
    /// Subtasks per task; `None` before the first attempt.
    pub parallelism: Option<u32>,
    /// Whether workers are waited for, or the time of the next attempt.
    pub waiting: bool,
    /// Subtasks whose state is not all there yet.
    pub restoring: usize,
    /// Attempts that have failed, and were followed by another.
    pub restarts: u64,
    /// Why the last attempt that failed did so.
    pub last_failure: Option<FailureStatus>,
}

/// How an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailureStatus {
    /// Why.
    pub cause: String,
    /// Wall-clock time, milliseconds.
    pub at_ms: i64,
}

/// A moment's view of a job.
#[derive(Clone, Debug, Default)]
pub struct ProgressView {
    /// Where its life stands.
    pub phase: JobPhase,
    /// The checkpoint that it started from.
    pub restored_from: Option<Epoch>,
    /// Why that is not the newest one, if it is not.
    pub fallback: Option<String>,
    /// Its checkpoints.
    pub checkpoints: CheckpointCounts,
    /// Its operators, in the order of the graph.
    pub operators: Vec<OperatorStatus>,
    /// Its tasks.
    pub tasks: Vec<TaskStatus>,
    /// Its attempts.
    pub attempt: AttemptStatus,
}

impl ProgressView {
    /// Whether the job runs, and all its state is there.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.phase == JobPhase::Running && self.attempt.restoring == 0
    }
}

#[derive(Default)]
struct State {
    phase: JobPhase,
    restored_from: Option<Epoch>,
    fallback: Option<String>,
    checkpoints: CheckpointCounts,
    /// Oldest first.
    records: VecDeque<CheckpointRecord>,
    attempt: AttemptStatus,
}

/// The job's progress, shared between who runs it and a display.
#[derive(Default)]
pub struct Progress {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    /// Of the subtasks in this process.
    pub(crate) counters: Arc<Counters>,
}

impl Progress {
    /// The job as it is now.
    #[must_use]
    pub fn view(&self) -> ProgressView {
        let Counted { operators, tasks } = self.counters.view();
        let state = self.lock();
        ProgressView {
            phase: state.phase,
            restored_from: state.restored_from,
            fallback: state.fallback.clone(),
            checkpoints: state.checkpoints,
            operators,
            tasks,
            attempt: state.attempt.clone(),
        }
    }

    /// The last checkpoints that were triggered, oldest first: at most [`CHECKPOINTS_REMEMBERED_MAX`].
    #[must_use]
    pub fn checkpoints(&self) -> Vec<CheckpointRecord> {
        self.lock().records.iter().cloned().collect()
    }

    /// How far this process is as a worker of another's job.
    #[must_use]
    pub fn worker_phase(&self) -> WorkerPhase {
        self.counters.phase()
    }

    /// Changes whenever the view has, but for what is counted.
    pub(crate) fn news(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub(crate) fn phase(&self, phase: JobPhase) {
        self.change(|state| state.phase = phase);
    }

    /// Workers are waited for, or the time of the next attempt; or not any more.
    pub(crate) fn waiting(&self, waiting: bool) {
        self.change(|state| state.attempt.waiting = waiting);
    }

    /// The job starts from this checkpoint; `fallback` says why not from the newest, if so.
    pub(crate) fn restored_from(&self, epoch: Epoch, mut fallback: Option<String>) {
        if let Some(why) = &mut fallback {
            why.truncate(why.floor_char_boundary(CAUSE_MAX));
        }
        self.change(|state| (state.restored_from, state.fallback) = (Some(epoch), fallback));
    }

    /// An attempt is built, and runs next. `restoring` of its subtasks have not all their state.
    pub(crate) fn begins(&self, attempt: Option<Attempt>, parallelism: u32, restoring: usize) {
        self.change(|State { attempt: status, .. }| {
            (status.attempt, status.parallelism, status.restoring) = (attempt, Some(parallelism), restoring);
        });
    }

    /// So many subtasks have not all their state yet.
    pub(crate) fn restoring(&self, subtasks: usize) {
        self.change(|state| state.attempt.restoring = subtasks);
    }

    /// An attempt has failed. `again`: another follows.
    pub(crate) fn attempt_failed(&self, mut cause: String, at_ms: i64, again: bool) {
        cause.truncate(cause.floor_char_boundary(CAUSE_MAX));
        self.change(|state| {
            for record in &mut state.records {
                if record.state == CheckpointState::UnderWay {
                    let duration_ms = (at_ms - record.triggered_at_ms).max(0).cast_unsigned();
                    let reason = "the attempt failed before it was complete".to_owned();
                    record.state = CheckpointState::Failed { duration_ms, reason };
                }
            }
            state.attempt.last_failure = Some(FailureStatus { cause, at_ms });
            if again {
                state.attempt.restarts += 1;
                state.attempt.waiting = true;
                state.phase = JobPhase::Restoring;
            }
        });
    }

    pub(crate) fn triggered(&self, barrier: Barrier, at: Time) {
        let records = &mut self.lock().records;
        if records.len() == CHECKPOINTS_REMEMBERED_MAX {
            records.pop_front();
        }
        records.push_back(CheckpointRecord {
            barrier,
            triggered_at_ms: at.wall_ms,
            unaligned: false,
            state: CheckpointState::UnderWay,
            triggered: at.monotonic,
        });
    }

    pub(crate) fn unaligned(&self, epoch: Epoch) {
        if let Some(record) = self.lock().of(epoch) {
            record.unaligned = true;
        }
    }

    pub(crate) fn completed(&self, checkpoint: CheckpointStatus) {
        self.change(|state| {
            state.checkpoints.completed += 1;
            state.checkpoints.last = Some(checkpoint);
            if let Some(record) = state.of(checkpoint.epoch) {
                let CheckpointStatus { duration_ms, size, .. } = checkpoint;
                record.state = CheckpointState::Completed { duration_ms, size };
            }
        });
    }

    /// A checkpoint has been given up.
    pub(crate) fn aborted(&self, epoch: Epoch, mut reason: String, overtaken: bool, at: Time) {
        reason.truncate(reason.floor_char_boundary(CAUSE_MAX));
        let state = &mut *self.lock();
        if overtaken {
            state.checkpoints.overtaken += 1;
        } else {
            state.checkpoints.failed += 1;
        }
        if let Some(record) = state.of(epoch) {
            let duration_ms = at.monotonic.saturating_sub(record.triggered).as_millis() as u64;
            record.state = if overtaken {
                CheckpointState::Overtaken { duration_ms, reason }
            } else {
                CheckpointState::Failed { duration_ms, reason }
            };
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.send_replace(());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The record of a checkpoint that is under way. Its number may have been another's in an earlier attempt that failed.
    fn of(&mut self, epoch: Epoch) -> Option<&mut CheckpointRecord> {
        self.records.iter_mut().rfind(|r| r.barrier.epoch == epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time { monotonic: Duration::from_millis(ms), wall_ms: 1_000_000 + ms as i64 }
    }

    fn states(progress: &Progress) -> Vec<(u64, CheckpointState)> {
        progress.checkpoints().into_iter().map(|r| (r.barrier.epoch.0, r.state)).collect()
    }

    #[test]
    fn what_becomes_of_checkpoints_is_remembered() {
        let progress = Progress::default();
        let trigger = |epoch: u64, ms| progress.triggered(Barrier::checkpoint(Epoch(epoch)), at(ms));
        (1..=5).for_each(|epoch| trigger(epoch, epoch * 10));
        progress.unaligned(Epoch(4));
        let completed = CheckpointStatus { epoch: Epoch(2), triggered_at_ms: 20, duration_ms: 7, size: 9 };
        progress.completed(completed);
        progress.aborted(Epoch(1), "later".into(), true, at(30));
        progress.aborted(Epoch(3), "timed out".into(), false, at(90));
        progress.aborted(Epoch(77), "unknown".into(), false, at(90));
        progress.attempt_failed("broken".into(), 1_000_100, true);
        let failed = |duration_ms, reason: &str| CheckpointState::Failed { duration_ms, reason: reason.to_owned() };
        let over = "the attempt failed before it was complete";
        assert_eq!(
            states(&progress),
            [
                (1, CheckpointState::Overtaken { duration_ms: 20, reason: "later".into() }),
                (2, CheckpointState::Completed { duration_ms: 7, size: 9 }),
                (3, failed(60, "timed out")),
                (4, failed(60, over)),
                (5, failed(50, over)),
            ]
        );
        assert_eq!(
            progress.checkpoints().iter().map(|r| r.unaligned).collect::<Vec<_>>(),
            [false, false, false, true, false]
        );
        let counts = progress.view().checkpoints;
        assert_eq!((counts.completed, counts.failed, counts.overtaken), (1, 2, 1));
        assert_eq!(counts.last, Some(completed));
    }

    #[test]
    fn no_more_checkpoints_are_remembered_than_the_bound() {
        let progress = Progress::default();
        let all = CHECKPOINTS_REMEMBERED_MAX as u64 + 5;
        (1..=all).for_each(|epoch| progress.triggered(Barrier::checkpoint(Epoch(epoch)), at(epoch)));
        let states = states(&progress);
        assert_eq!((states.len(), states[0].0, states[31].0), (32, 6, 37));
    }

    #[test]
    fn a_job_is_ready_when_it_runs_and_all_its_state_is_there() {
        let progress = Progress::default();
        assert!(!progress.view().is_ready());
        progress.begins(None, 2, 1);
        progress.phase(JobPhase::Running);
        assert!(!progress.view().is_ready());
        progress.restoring(0);
        assert!(progress.view().is_ready());
        progress.attempt_failed("ü".repeat(CAUSE_MAX), 5, true);
        let view = progress.view();
        assert!(!view.is_ready());
        assert_eq!((view.attempt.restarts, view.attempt.parallelism), (1, Some(2)));
        assert_eq!(view.attempt.last_failure.unwrap().cause, "ü".repeat(CAUSE_MAX / 2));
        progress.attempt_failed("for good".into(), 6, false);
        assert_eq!(progress.view().attempt.restarts, 1);
    }
}
