//! What [`decide`](super::decide) sees of a job and its objects. Data only.

use std::collections::BTreeMap;

use floodmark_crds::{CheckpointMode, Report, StreamJob, Timestamp};

use crate::objects::PodCounts;

/// A job, and all that is there of it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The object, with the status that was last written.
    pub job: StreamJob,
    /// The name of its spec's [revision](crate::revision).
    pub revision: String,
    /// `spec.restore.from`, with the name of a Savepoint object replaced by where that is.
    pub restore_from: Option<String>,
    /// Whether the objects of the job as a whole are as they shall be, and the spec's revision is kept.
    pub job_intact: bool,
    /// Its Lease, if there is one.
    pub lease: Option<LeaseSeen>,
    /// The runs that there are objects of.
    pub runs: BTreeMap<u64, RunSeen>,
    /// What has been asked for, and what came of it.
    pub answers: BTreeMap<Question, Asked>,
    /// The time.
    pub now: Timestamp,
}

/// A job's Lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaseSeen {
    /// The run that may lead; 0 if none may.
    pub run: u64,
    /// What the leader last told.
    pub report: Option<Report>,
}

/// The objects of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunSeen {
    /// Whether all that are needed are there, as they shall be.
    pub complete: bool,
    /// Whether they are being removed.
    pub leaving: bool,
    /// What it runs, by its own account.
    pub revision: String,
    /// Subtasks per task that it was started with, by its own account.
    pub parallelism: u32,
    /// What it was told to restore, by its own account.
    pub restore: String,
    /// How many pods its revision asks for, by its own account.
    pub counts: Option<PodCounts>,
    /// How its revision takes checkpoints, by its own account.
    pub checkpoints: Option<CheckpointMode>,
    /// When its certificates are to be renewed, if they can be.
    pub renew_at: Option<Timestamp>,
    /// Pods of workers that are asked for.
    pub workers_wanted: u32,
    /// Pods of coordinators that are asked for.
    pub coordinators_wanted: u32,
    /// Pods of workers that there are.
    pub workers: PodsSeen,
    /// Pods of coordinators that there are.
    pub coordinators: PodsSeen,
}

/// Pods of one role.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodsSeen {
    /// There are so many, in whatever shape.
    pub count: u32,
    /// Ready.
    pub ready: u32,
    /// What is the matter with the worst of them.
    pub trouble: Option<Trouble>,
}

/// What is the matter with a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Of which kind.
    pub kind: TroubleKind,
    /// For people, with the pod's name.
    pub message: String,
}

/// Kinds of trouble, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TroubleKind {
    /// There is no node for it.
    Unschedulable,
    /// Its process ends again and again, and says why: something that it needs is not there, for now perhaps.
    Ended,
    /// Its process is ended again and again, or has a defect.
    Crash,
    /// Its image can't be had.
    Image,
    /// It names something that is not there, or asks for what it may not.
    Config,
    /// Its process says that the storage can't be used, or holds nothing that it may start from.
    Storage,
    /// Its process says that what it was given can't be run, and would say so again.
    BadInput,
}

/// Something that takes a while to find out or do, outside of the cluster's API. Asking again is always allowed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Question {
    /// Can this revision of the spec be planned, and does this snapshot's state fit it?
    Fits {
        /// Of the spec.
        revision: String,
        /// `latest`, `none`, the name of a savepoint, the number of a checkpoint, or a location.
        restore: String,
    },
    /// Stop the job with a savepoint.
    StopWithSavepoint {
        /// Of the run that leads.
        run: u64,
        /// The savepoint's name.
        name: String,
    },
    /// Go on at another parallelism, with the processes kept.
    Rescale {
        /// The run that leads.
        run: u64,
        /// Subtasks per task.
        parallelism: u32,
    },
    /// Remove the job's checkpoints from storage.
    DeleteState,
}

/// What has come of a question that is answered like this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked<A = Answer> {
    /// Nothing yet.
    UnderWay,
    /// This, at that time.
    Answered(A, Timestamp),
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Yes; or it is done.
    Yes,
    /// No, and asked again it is the same: why.
    No(String),
    /// Nobody knows, for now: why.
    Unknown(String),
}
