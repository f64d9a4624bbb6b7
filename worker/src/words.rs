//! What the coordinator of a job and its workers tell each other. Pure data: the same within one process and between several.
//!
//! An attempt goes `Deploy` -> `Built` of every worker -> `Run` -> reports and commands -> `End` -> `Gone`. Whatever comes of an
//! attempt that has ended is dropped by who receives it: both sides number attempts.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

use floodmark_dataflow::{TaskId, task::Command};
use floodmark_link::transport::Endpoint;
use floodmark_snapshot::{Attempt, Disposition, Epoch, Error, Manifest, OperatorSnapshot, OperatorUid, SplitState};
use serde::{Deserialize, Serialize};

use crate::progress::Counted as Counts;

/// Which worker of a job; a process that comes back is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct WorkerId(pub(crate) u32);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker {}", self.0)
    }
}

/// Which subtask of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct SubtaskId {
    /// Its task.
    pub(crate) task: TaskId,
    /// Its index in the task.
    pub(crate) index: u32,
}

impl fmt::Display for SubtaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.task, self.index)
    }
}

/// Which committer: a sink, and the subtask whose identity it writes under.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct CommitterId {
    /// The sink.
    pub(crate) uid: OperatorUid,
    /// The subtask.
    pub(crate) index: u32,
}

impl fmt::Display for CommitterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.uid, self.index)
    }
}

/// What the coordinator tells a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum ToWorker {
    /// Build these subtasks, with their state, and don't run them yet.
    Deploy(Box<Deployment>),
    /// Run what is built: the log says where the job goes on from.
    Run,
    /// All state is there, on all workers: committers begin.
    Commit,
    /// To every task that it concerns, and to the committers.
    Tell(Command),
    /// The attempt is over: all tasks and committers end. `cancel` tells the tasks to; else they do by themselves.
    End {
        /// See above.
        cancel: bool,
    },
}

/// A worker's share of an attempt.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Deployment {
    /// Names the folder of what it uploads.
    pub(crate) attempt: Attempt,
    /// Which history of the job the output belongs to: part of committers' identities.
    pub(crate) history: String,
    /// The greatest epoch that was ever used, as far as the log knows.
    pub(crate) last_epoch: Epoch,
    /// The snapshot to start from.
    pub(crate) restored: Option<Restored>,
    /// The splits of each source.
    pub(crate) splits: HashMap<OperatorUid, Vec<SplitState>>,
    /// Where the subtasks of each index run: the job's parallelism is its length.
    pub(crate) placement: Vec<WorkerId>,
    /// Where workers listen for each other's channels; of one process alone there is none.
    pub(crate) endpoints: BTreeMap<WorkerId, Endpoint>,
    /// Whom this is for.
    pub(crate) worker: WorkerId,
}

impl Deployment {
    /// Number of subtasks per task.
    pub(crate) fn parallelism(&self) -> u32 {
        self.placement.len() as u32
    }

    /// Whether a subtask is to run on the worker that this is for.
    pub(crate) fn is_here(&self, subtask: SubtaskId) -> bool {
        self.placement.get(subtask.index as usize) == Some(&self.worker)
    }
}

/// The snapshot that an attempt starts from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Restored {
    pub(crate) manifest: Arc<Manifest>,
    /// The folder that its shards' paths are relative to.
    pub(crate) location: String,
    /// Whether its files are the job's own.
    pub(crate) owned: bool,
    /// Everything staged up to here is visible, by the job's log.
    pub(crate) committed: Epoch,
}

/// How a worker introduces itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// The fingerprint of the job's graph as the worker has planned it.
    pub(crate) plan: String,
    /// Slices that it runs side by side.
    pub(crate) slots: u32,
    /// Where it listens for channels.
    pub(crate) endpoint: Endpoint,
}

/// What a worker tells the coordinator.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromWorker {
    /// Everything is built.
    Built(Built),
    /// Something can't be built.
    NotBuilt(NotBuilt),
    /// All state of a subtask is there.
    Restored(SubtaskId),
    /// A subtask's part of a checkpoint is durable.
    Acknowledged {
        /// Which.
        epoch: Epoch,
        /// Whose.
        subtask: SubtaskId,
        /// What the manifest will say of it.
        parts: Vec<(OperatorUid, OperatorSnapshot)>,
    },
    /// A subtask can't take part in a checkpoint.
    Declined {
        /// Which.
        epoch: Epoch,
        /// Whose.
        subtask: SubtaskId,
        /// Why.
        reason: String,
    },
    /// A source's subtask has read all its input.
    Exhausted(SubtaskId),
    /// A subtask has sent its last frame.
    Ended(SubtaskId),
    /// What has been counted on this worker; now and then.
    Counted(Counts),
    /// Everything that a committer has staged up to this epoch is visible.
    Committed(CommitterId, Epoch),
    /// Something has failed, and the attempt with it.
    Failed {
        /// Why.
        error: Error,
        /// Whether it is that the snapshot is damaged that the attempt has started from.
        damaged: bool,
    },
    /// All tasks have ended, or are given up: the error says so.
    Gone(Option<Error>),
}

/// What a worker has built.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Built {
    /// The committers that it runs.
    pub(crate) committers: BTreeSet<CommitterId>,
    /// The subtasks whose state comes while they run.
    pub(crate) arriving: BTreeSet<SubtaskId>,
}

/// Why something can't be built.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum NotBuilt {
    /// The snapshot does not fit, can't be read, or is damaged.
    Snapshot(Error),
    /// A source or sink can't be used as declared.
    Connector(Error),
    /// Something else.
    Task(Error),
}

impl NotBuilt {
    /// Damage is the snapshot's, wherever it is met.
    pub(crate) fn of_snapshot_or(otherwise: fn(Error) -> Self) -> impl Fn(Error) -> Self {
        move |error| match error.disposition() {
            Disposition::Corrupt => Self::Snapshot(error),
            Disposition::Retry | Disposition::Abort | Disposition::Fenced => otherwise(error),
        }
    }
}
