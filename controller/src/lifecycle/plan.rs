//! What [`decide`](super::decide) wants done. Data only; it prints.

use std::fmt;

use floodmark_crds::{RunStatus, StreamJobStatus, Timestamp};

use super::Question;

/// What to do now. If there is a status, it is written, and nothing else is done until it has been seen again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The status, if it is to be another than it is.
    pub status: Option<Box<StreamJobStatus>>,
    /// What to tell people once that is written.
    pub notes: Vec<Note>,
    /// What to do, in this order. Each may be done again, and one that fails is: the next pass plans it anew.
    pub actions: Vec<Action>,
    /// When to look again, if nothing happens before.
    pub wake: Option<Timestamp>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Keep the object from going before its state is taken care of.
    AddFinalizer,
    /// Let the object go.
    RemoveFinalizer,
    /// Bring the objects of the job as a whole into shape, and keep the spec's revision.
    ApplyJob {
        /// The run that its Service leads to.
        run: Option<u64>,
    },
    /// Bring the objects of a run into shape.
    ApplyRun {
        /// Which.
        run: RunStatus,
        /// Pods of workers; none: as many as its revision says.
        workers: Option<u32>,
    },
    /// Ask for another number of a run's workers.
    ScaleWorkers {
        /// The run.
        run: u64,
        /// How many.
        pods: u32,
    },
    /// Ask for another number of a run's coordinators.
    ScaleCoordinators {
        /// The run.
        run: u64,
        /// How many.
        pods: u32,
    },
    /// Have a run's processes show the next certificates.
    RenewCertificates {
        /// The run.
        run: u64,
    },
    /// Remove the objects of a run.
    RemoveRun {
        /// Which.
        run: u64,
    },
    /// Say in the Lease which run may lead; 0: none.
    Allow {
        /// Which.
        run: u64,
    },
    /// Find out, or have done.
    Ask(Question),
}

/// Something to tell people: an event of the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Whether it is about something that went wrong.
    pub warning: bool,
    /// In a word.
    pub reason: &'static str,
    /// In a sentence.
    pub message: String,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddFinalizer => f.write_str("add the finalizer"),
            Self::RemoveFinalizer => f.write_str("remove the finalizer"),
            Self::ApplyJob { run: Some(run) } => write!(f, "apply the job's objects, for run {run}"),
            Self::ApplyJob { run: None } => f.write_str("apply the job's objects"),
            Self::ApplyRun { run, workers } => {
                let RunStatus { number, revision, restore, .. } = run;
                write!(f, "apply run {number} of revision {revision} from {restore}")?;
                workers.map_or(Ok(()), |workers| write!(f, ", {workers} workers"))
            }
            Self::ScaleWorkers { run, pods } => write!(f, "scale the workers of run {run} to {pods}"),
            Self::ScaleCoordinators { run, pods } => write!(f, "scale the coordinators of run {run} to {pods}"),
            Self::RenewCertificates { run } => write!(f, "renew the certificates of run {run}"),
            Self::RemoveRun { run } => write!(f, "remove run {run}"),
            Self::Allow { run: 0 } => f.write_str("allow no run to lead"),
            Self::Allow { run } => write!(f, "allow run {run} to lead"),
            Self::Ask(question) => write!(f, "ask: {question}"),
        }
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fits { revision, restore } => write!(f, "does {restore} fit revision {revision}?"),
            Self::StopWithSavepoint { run, name } => write!(f, "stop run {run} with savepoint {name}"),
            Self::Rescale { run, parallelism } => write!(f, "rescale run {run} to {parallelism}"),
            Self::DeleteState => f.write_str("delete the job's checkpoints"),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(status) = &self.status {
            write!(f, "status {:?}", status.state)?;
            if let Some(operation) = &status.operation {
                write!(f, ", {:?} {:?}", operation.kind, operation.step)?;
            }
            f.write_str("\n")?;
        }
        for note in &self.notes {
            writeln!(f, "{}: {}", note.reason, note.message)?;
        }
        for action in &self.actions {
            writeln!(f, "{action}")?;
        }
        Ok(())
    }
}
