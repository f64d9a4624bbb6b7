//! What the coordination machine is told and what it answers: events, decisions, and the words in them. Pure data.

use std::{collections::BTreeSet, fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    Attempt, Epoch, Generation, JobId, OperatorSnapshot, OperatorUid, log::Event as LogEvent, manifest::Rescaled,
};

/// A subtask, by the index of its task in the graph and its own index in the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subtask {
    /// Index of the task.
    pub task: usize,
    /// Index of the subtask.
    pub index: u32,
}

impl fmt::Display for Subtask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.task, self.index)
    }
}

/// When checkpoints are taken, and how often they may fail.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// From one trigger to the next.
    pub interval: Duration,
    /// A checkpoint that has not completed after this long is aborted.
    pub timeout: Duration,
    /// Least time from the end of one checkpoint to the next trigger.
    pub min_pause: Duration,
    /// Failed checkpoints in a row that the job survives.
    pub tolerable_failures: u32,
    /// Checkpoints that may be under way or uncommitted at the same time; at least 1.
    pub max_concurrent: usize,
    /// A checkpoint that is not complete after this long goes on unaligned; `None` if it never does.
    pub unaligned_after: Option<Duration>,
}

/// Who takes part, and what every manifest says.
#[derive(Clone, Debug)]
pub struct Participants {
    /// Every subtask: all must acknowledge.
    pub subtasks: BTreeSet<Subtask>,
    /// Those of them that head a source; barriers start there.
    pub sources: BTreeSet<Subtask>,
    /// Committers by number: all must confirm.
    pub committers: BTreeSet<usize>,
    /// The job.
    pub job: JobId,
    /// This reign.
    pub generation: Generation,
    /// This attempt.
    pub attempt: Attempt,
    /// Number of key groups.
    pub max_parallelism: u16,
    /// Fingerprint of the plan.
    pub plan: String,
    /// What somebody last asked the job to start from.
    pub origin: Option<String>,
    /// The parallelism that somebody has chosen for the running job.
    pub rescaled: Option<Rescaled>,
}

/// What an attempt starts from.
#[derive(Clone, Copy, Debug, Default)]
pub struct StartingPoint {
    /// The restored checkpoint, if any: its staged records must be committed before anything is triggered.
    pub restored: Option<Epoch>,
    /// The greatest epoch that was ever used.
    pub last_epoch: Epoch,
}

/// What follows behind a barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BarrierKind {
    /// The job goes on.
    Checkpoint,
    /// The job stops: all its inputs have ended, or somebody asked; or it goes on as another attempt. Sources emit nothing more, and tasks end once their sinks
    /// have committed.
    Stop,
    /// As [`BarrierKind::Stop`], but event time first goes to its end: windows fire, nothing is left over.
    Drain,
}

/// Separates the records of one snapshot from those of the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Barrier {
    /// The snapshot's number.
    pub epoch: Epoch,
    /// What follows behind it.
    pub kind: BarrierKind,
    /// True if the snapshot must be complete in itself and neutral to state back ends, as a savepoint is.
    pub whole: bool,
}

impl Barrier {
    /// The barrier of an ordinary checkpoint.
    #[must_use]
    pub fn checkpoint(epoch: Epoch) -> Self {
        Self { epoch, kind: BarrierKind::Checkpoint, whole: false }
    }

    /// Whether the job ends behind it.
    #[must_use]
    pub fn stops(&self) -> bool {
        self.kind != BarrierKind::Checkpoint
    }

    /// Whether it may overtake records: only where the job goes on, with state of its own back end.
    #[must_use]
    pub fn may_overtake(&self) -> bool {
        !self.stops() && !self.whole
    }
}

impl fmt::Display for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.epoch)?;
        if self.whole {
            f.write_str(" for a savepoint")?;
        }
        match self.kind {
            BarrierKind::Checkpoint => Ok(()),
            BarrierKind::Stop => f.write_str(" and stop"),
            BarrierKind::Drain => f.write_str(", drain and stop"),
        }
    }
}

/// A request for a savepoint, by the number that its asker is answered under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SavepointId(pub u64);

/// Now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Time {
    /// Of [`crate::Clock::monotonic`].
    pub monotonic: Duration,
    /// Of [`crate::Clock::wall_ms`]; goes into manifests only.
    pub wall_ms: i64,
}

/// What the machine is told.
#[derive(Debug)]
pub enum Event {
    /// Nothing but the time.
    Tick,
    /// A subtask's part of a checkpoint is durable.
    Acknowledged {
        /// The checkpoint.
        epoch: Epoch,
        /// Who.
        subtask: Subtask,
        /// What the manifest shall say of it.
        parts: Vec<(OperatorUid, OperatorSnapshot)>,
    },
    /// A subtask can't take part in a checkpoint (an upload failed).
    Declined {
        /// The checkpoint.
        epoch: Epoch,
        /// Who.
        subtask: Subtask,
        /// Why.
        reason: String,
    },
    /// A source has read its input to the end, and goes on answering triggers.
    Exhausted(Subtask),
    /// All the state that the attempt started with is there.
    Restored,
    /// The entry of the last `Append` is durable.
    Appended,
    /// A committer has made everything staged up to `epoch` visible.
    Committed {
        /// Which.
        committer: usize,
        /// The epoch.
        epoch: Epoch,
    },
    /// Somebody wants the job to stop with a last checkpoint.
    StopRequested,
    /// Somebody wants a savepoint.
    SavepointRequested {
        /// Whom to answer.
        id: SavepointId,
        /// What follows it.
        then: BarrierKind,
    },
    /// The job is to go on as another attempt, whose subtasks are others or elsewhere. Not while this is under way.
    RescaleRequested {
        /// What manifests say from the last one of this attempt on.
        rescaled: Option<Rescaled>,
        /// True if a checkpoint has just been settled: then none goes before the last one.
        prepared: bool,
    },
    /// An export has ended, well or not: the shell has told the asker.
    Exported(Epoch),
}

/// How a job ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All inputs have ended.
    Finished,
    /// It was asked to stop.
    Stopped,
    /// The attempt, not the job: another goes on from its last checkpoint, as that says.
    Rescaled,
}

/// What the machine wants done. `Append` is answered by [`Event::Appended`] before any other event.
#[derive(Debug)]
pub enum Decision {
    /// Tell all sources to send this barrier.
    Trigger(Barrier),
    /// Tell all tasks to let the barrier of this checkpoint overtake records.
    Unalign(Epoch),
    /// Append this to the log.
    Append(LogEvent),
    /// Tell tasks and committers that the checkpoint is complete and durable.
    Announce(Epoch),
    /// Tell tasks and committers to forget the checkpoint; delete what it has uploaded.
    Abort {
        /// The checkpoint.
        epoch: Epoch,
        /// Why.
        reason: String,
        /// True if it has not failed: a later one was complete before it.
        overtaken: bool,
        /// Paths, relative to the job's folder, that nothing names.
        orphans: Vec<String>,
    },
    /// Delete these files: they came late, for a checkpoint that was aborted.
    Discard(Vec<String>),
    /// Everything staged up to here is visible, and the log says so (if any sink stages at all).
    Settled(Epoch),
    /// Copy this settled checkpoint to the savepoints that were asked for, and answer with [`Event::Exported`].
    Export {
        /// The checkpoint. Its files must not be deleted before the answer.
        epoch: Epoch,
        /// Who asked.
        savepoints: Vec<SavepointId>,
    },
    /// Tell who asked that there will be no savepoint.
    Refuse {
        /// Who asked.
        savepoints: Vec<SavepointId>,
        /// Why.
        reason: String,
    },
    /// The subtasks stay as and where they are: why. The attempt goes on.
    Stay(String),
    /// The sources have ended behind a barrier whose checkpoint has failed: the attempt can't go on, and the job can.
    Restart(String),
    /// The attempt can't go on: why. The restart strategy says whether there is another.
    Fail(String),
    /// The job has ended; tasks end by themselves.
    Done(End),
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = |ids: &[SavepointId]| ids.iter().map(|id| id.0.to_string()).collect::<Vec<_>>().join(", ");
        match self {
            Self::Trigger(barrier) => write!(f, "trigger {barrier}"),
            Self::Unalign(epoch) => write!(f, "unalign {epoch}"),
            Self::Append(LogEvent::Completed { manifest }) => write!(f, "append completed {}", manifest.epoch),
            Self::Append(LogEvent::Committed { epoch }) => write!(f, "append committed {epoch}"),
            Self::Append(LogEvent::Finished { epoch }) => write!(f, "append finished {epoch}"),
            Self::Append(LogEvent::Stopped { epoch }) => write!(f, "append stopped {epoch}"),
            Self::Append(LogEvent::Opened) => f.write_str("append opened"),
            Self::Append(LogEvent::Restored { epoch, .. }) => write!(f, "append restored {epoch:?}"),
            Self::Append(LogEvent::Adopted { manifest, .. }) => write!(f, "append adopted {}", manifest.epoch),
            Self::Append(LogEvent::Released { epochs, .. }) => write!(f, "append released {epochs:?}"),
            Self::Announce(epoch) => write!(f, "announce {epoch}"),
            Self::Abort { epoch, reason, overtaken, orphans } => {
                let what = if *overtaken { "give up" } else { "abort" };
                write!(f, "{what} {epoch} ({reason}), delete {orphans:?}")
            }
            Self::Discard(orphans) => write!(f, "delete {orphans:?}"),
            Self::Settled(epoch) => write!(f, "settled {epoch}"),
            Self::Export { epoch, savepoints } => write!(f, "export {epoch} for savepoint {}", ids(savepoints)),
            Self::Refuse { savepoints, reason } => write!(f, "refuse savepoint {}: {reason}", ids(savepoints)),
            Self::Stay(reason) => write!(f, "no rescale: {reason}"),
            Self::Restart(reason) => write!(f, "restart: {reason}"),
            Self::Fail(cause) => write!(f, "fail: {cause}"),
            Self::Done(End::Finished) => f.write_str("done: finished"),
            Self::Done(End::Stopped) => f.write_str("done: stopped"),
            Self::Done(End::Rescaled) => f.write_str("done: rescaled"),
        }
    }
}
