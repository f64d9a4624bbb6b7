//! What becomes of a Savepoint object: from what is seen of it to what is to be done. Pure, in the manner of
//! [`lifecycle`](crate::lifecycle): what is meant to be done is in the status first.
//!
//! One without a schedule is taken once, under a name that no other object has; asked for again, it is found. One with a schedule
//! makes others, each named after the time that it was due, and removes the oldest of them.
//!
//! Invariants:
//! - A savepoint that a job names, or that is being taken, is not removed to keep their number.
//! - An object that is deleted goes in the end, whatever becomes of its files; then it says that they are left.

mod schedule;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use floodmark_crds::{Condition, DeletionPolicy, Savepoint, SavepointState, SavepointStatus, StorageStatus, Timestamp};
use kube::ResourceExt as _;

pub use self::schedule::due;
use crate::lifecycle::{Asked, Note};

/// Keeps a Savepoint from going before its files are gone, if they shall be.
pub const FINALIZER: &str = "floodmark.io/savepoint";
/// After so long an object that is deleted goes although its files could not be removed.
const DELETE_PATIENCE: Duration = Duration::from_secs(600);
/// From a failure to the next try.
const AGAIN: Duration = Duration::from_secs(5);
/// From a look at what is kept only because a job names it to the next: nobody tells when it has ceased to.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// Failures after which there will be none.
const FAILURES_MAX: u32 = 3;
/// Characters of an object's uid that make its savepoint's name its own.
const UID_SHOWN: usize = 8;

/// A Savepoint, and what there is of it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The object, with the status that was last written.
    pub savepoint: Savepoint,
    /// Its job, if there is one.
    pub job: Option<JobSeen>,
    /// With a schedule: the first time that is due after the one before, or why the schedule can't be read.
    pub due: Option<Result<Timestamp, String>>,
    /// With a schedule: the savepoints that it has made.
    pub children: Vec<Savepoint>,
    /// Names and locations of savepoints that some job starts from, or may have to go back to.
    pub needed: BTreeSet<String>,
    /// What has been asked for, and what came of it.
    pub answers: BTreeMap<Question, Asked<Answer>>,
    /// The time.
    pub now: Timestamp,
}

/// A job, as far as its savepoints go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobSeen {
    /// The run that processes rows; `None` if none does.
    pub running: Option<u64>,
    /// Where its snapshots are.
    pub storage: StorageStatus,
}

/// Something that takes a while to have done. Asking again is always allowed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Question {
    /// Have the run that leads take a savepoint of this name; one that is there already is the answer.
    Take {
        /// The run.
        run: u64,
        /// The name.
        name: String,
        /// How often it has failed: an answer to an earlier attempt is none to this one.
        attempt: u32,
    },
    /// Remove the files of the savepoint of this name. That there are none is no failure.
    Remove {
        /// The name.
        name: String,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The savepoint is complete.
    Taken {
        /// Where it is.
        location: String,
        /// The checkpoint that it is a copy of.
        epoch: u64,
        /// Bytes.
        size: u64,
    },
    /// Its files are gone.
    Removed,
    /// It was tried, and failed: why.
    Failed(String),
    /// Its files can't be reached, and asked again it is the same: why.
    OutOfReach(String),
    /// Nobody knows, for now: why.
    Unknown(String),
}

/// What to do now. If there is a status, it is written, and nothing else is done until it has been seen again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The status, if it is to be another than it is.
    pub status: Option<Box<SavepointStatus>>,
    /// What to tell people once that is written.
    pub notes: Vec<Note>,
    /// What to do, in this order. Each may be done again.
    pub actions: Vec<Action>,
    /// When to look again, if nothing happens before.
    pub wake: Option<Timestamp>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Keep the object from going before its files are taken care of.
    AddFinalizer,
    /// Let the object go.
    RemoveFinalizer,
    /// Make a Savepoint of this name, without a schedule, owned by this one. One that is there already is fine.
    Create {
        /// The object's name.
        name: String,
    },
    /// Delete the Savepoint of this name.
    Delete {
        /// The object's name.
        name: String,
    },
    /// Have done.
    Ask(Question),
}

/// What is to be done for a Savepoint. See the header of this file.
#[must_use]
pub fn decide(seen: &Seen) -> Plan {
    if seen.savepoint.metadata.deletion_timestamp.is_some() {
        return leave(seen);
    }
    if !has_finalizer(seen) {
        return Plan { actions: vec![Action::AddFinalizer], ..Plan::default() };
    }
    let present = seen.savepoint.status.clone().unwrap_or_default();
    let mut plan = Plan::default();
    let mut status = present.clone();
    status.observed_generation = seen.savepoint.metadata.generation.unwrap_or(0);
    let told = match &seen.due {
        Some(due) => scheduled(seen, due, &mut status, &mut plan),
        None => once(seen, &mut status, &mut plan),
    };
    tell(seen, &mut status, &told);
    if status != present || seen.savepoint.status.is_none() {
        plan.actions.clear();
        plan.status = Some(Box::new(status));
    }
    plan
}

/// Whether something is still to come of a Savepoint.
pub(crate) fn is_open(savepoint: &Savepoint) -> bool {
    let state = savepoint.status.as_ref().map_or(SavepointState::Pending, |s| s.state);
    matches!(state, SavepointState::Pending | SavepointState::InProgress)
}

fn has_finalizer(seen: &Seen) -> bool {
    seen.savepoint.finalizers().iter().any(|f| f == FINALIZER)
}

/// What is told of it: reason and message.
type Told = (&'static str, String);

/// One that is taken once.
fn once(seen: &Seen, status: &mut SavepointStatus, plan: &mut Plan) -> Told {
    match status.state {
        SavepointState::Completed => return ("Completed", String::new()),
        SavepointState::Failed => {
            let present = status.conditions.iter().find(|c| c.kind == "Stalled");
            return ("Failed", present.map_or_else(String::new, |c| c.message.clone()));
        }
        SavepointState::Pending | SavepointState::InProgress | SavepointState::Scheduled => {}
    }
    let spec = &seen.savepoint.spec;
    let Some(job) = &seen.job else {
        return ("NoJob", format!("there is no StreamJob '{}' in this namespace", spec.job));
    };
    let Some(name) = status.name.clone() else {
        let Some(_) = job.running else { return ("NotRunning", "the job does not run: it is waited for".to_owned()) };
        let uid: String = seen.savepoint.uid().unwrap_or_default().chars().take(UID_SHOWN).collect();
        status.name = Some(format!("{}-{uid}", seen.savepoint.name_any()));
        status.storage = Some(job.storage.clone());
        status.state = SavepointState::InProgress;
        return ("InProgress", "the job is asked for it".to_owned());
    };
    // Also of a job that has stopped by now it may be there.
    let question = Question::Take { run: job.running.unwrap_or(0), name, attempt: status.failures };
    match seen.answers.get(&question) {
        None => {
            plan.actions.push(Action::Ask(question));
            ("InProgress", "the job is asked for it".to_owned())
        }
        Some(Asked::UnderWay) => ("InProgress", "the job is asked for it".to_owned()),
        Some(Asked::Answered(Answer::Taken { location, epoch, size }, at)) => {
            status.state = SavepointState::Completed;
            (status.location, status.epoch, status.size) = (Some(location.clone()), Some(*epoch), Some(*size));
            status.time = Some(*at);
            plan.notes.push(Note {
                warning: false,
                reason: "Completed",
                message: format!("checkpoint {epoch}: {location}"),
            });
            ("Completed", String::new())
        }
        Some(Asked::Answered(answer, at)) => {
            let (failed, why) = match answer {
                Answer::Failed(why) => (true, why.clone()),
                Answer::Unknown(why) | Answer::OutOfReach(why) => (false, why.clone()),
                Answer::Removed | Answer::Taken { .. } => (false, "another question was answered".to_owned()),
            };
            if failed && status.failures + 1 >= FAILURES_MAX {
                status.failures += 1;
                status.state = SavepointState::Failed;
                plan.notes.push(Note { warning: true, reason: "Failed", message: why.clone() });
                return ("Failed", why);
            }
            let again = at.plus(AGAIN);
            match (seen.now >= again, failed) {
                // Written before it is asked again, so that it is not asked for ever.
                (true, true) => status.failures += 1,
                (true, false) => plan.actions.push(Action::Ask(question)),
                (false, _) => plan.wake = Some(again),
            }
            ("InProgress", why)
        }
    }
}

/// One with a schedule.
fn scheduled(seen: &Seen, due: &Result<Timestamp, String>, status: &mut SavepointStatus, plan: &mut Plan) -> Told {
    status.state = SavepointState::Scheduled;
    let due = match due {
        Ok(due) => *due,
        Err(why) => {
            status.state = SavepointState::Failed;
            status.next = None;
            return ("BadSchedule", format!("spec.schedule: {why}"));
        }
    };
    let (surplus, held) = surplus(seen);
    plan.actions.extend(surplus.into_iter().map(|name| Action::Delete { name }));
    if seen.now < due {
        status.next = Some(due);
        plan.wake = Some(if held { due.min(seen.now.plus(LOOK_AGAIN)) } else { due });
        return ("Scheduled", String::new());
    }
    let name = child_name(&seen.savepoint.name_any(), due);
    if seen.children.iter().any(|c| c.name_any() == name) {
        // What was missed meanwhile is not made up for.
        status.time = Some(seen.now);
        status.next = None;
    } else {
        plan.actions.push(Action::Create { name });
    }
    ("Scheduled", String::new())
}

/// What the savepoint that was due at this time is called.
fn child_name(of: &str, due: Timestamp) -> String {
    let digits: String = due.to_string().chars().take(16).filter(char::is_ascii_digit).collect();
    format!("{of}-{digits}")
}

/// Savepoints of a schedule that are too many: the oldest of those that are complete, and those that came to nothing. And whether
/// there are others, which a job names.
fn surplus(seen: &Seen) -> (Vec<String>, bool) {
    let retain = usize::try_from(seen.savepoint.spec.retain).unwrap_or(usize::MAX);
    let there = seen.children.iter().filter(|c| c.metadata.deletion_timestamp.is_none());
    let state = |c: &Savepoint| c.status.as_ref().map_or(SavepointState::Pending, |s| s.state);
    let is_needed = |c: &Savepoint| {
        let status = c.status.as_ref();
        let words = [Some(c.name_any()), status.and_then(|s| s.name.clone()), status.and_then(|s| s.location.clone())];
        words.into_iter().flatten().any(|w| seen.needed.contains(&w))
    };
    let (mut complete, mut failed): (Vec<_>, Vec<_>) = (Vec::new(), Vec::new());
    for child in there {
        match state(child) {
            SavepointState::Completed => complete.push(child),
            SavepointState::Failed => failed.push(child),
            SavepointState::Pending | SavepointState::InProgress | SavepointState::Scheduled => {}
        }
    }
    // Names end with the time that they were due.
    complete.sort_by_key(|c| std::cmp::Reverse(c.name_any()));
    failed.sort_by_key(|c| std::cmp::Reverse(c.name_any()));
    let (held, old): (Vec<_>, Vec<_>) = complete.into_iter().skip(retain).partition(|c| is_needed(c));
    // One that failed is kept for a look.
    let old = old.into_iter().chain(failed.into_iter().skip(1));
    (old.map(kube::ResourceExt::name_any).collect(), !held.is_empty())
}

/// What is to be done for one that is deleted.
fn leave(seen: &Seen) -> Plan {
    let mut plan = Plan::default();
    if !has_finalizer(seen) {
        return plan;
    }
    let status = seen.savepoint.status.as_ref();
    let name = status.and_then(|s| s.name.clone()).filter(|_| seen.savepoint.spec.on_delete == DeletionPolicy::Delete);
    let Some(name) = name else {
        plan.actions.push(Action::RemoveFinalizer);
        return plan;
    };
    let deleted = seen.savepoint.metadata.deletion_timestamp.as_ref().map(Timestamp::from).unwrap_or_default();
    let give_up = deleted.plus(DELETE_PATIENCE);
    let question = Question::Remove { name: name.clone() };
    let why = match seen.answers.get(&question) {
        Some(Asked::Answered(Answer::Removed, _)) => {
            plan.actions.push(Action::RemoveFinalizer);
            return plan;
        }
        None if seen.now < give_up => {
            plan.actions.push(Action::Ask(question));
            return plan;
        }
        Some(Asked::UnderWay) if seen.now < give_up => {
            plan.wake = Some(give_up);
            return plan;
        }
        Some(Asked::Answered(Answer::OutOfReach(why), _)) => why.clone(),
        Some(Asked::Answered(Answer::Failed(why) | Answer::Unknown(why), at)) => {
            let again = at.plus(AGAIN);
            if seen.now < give_up {
                if seen.now >= again {
                    plan.actions.push(Action::Ask(question));
                } else {
                    plan.wake = Some(again);
                }
                return plan;
            }
            why.clone()
        }
        None | Some(Asked::UnderWay | Asked::Answered(Answer::Taken { .. }, _)) => "nobody answers".to_owned(),
    };
    let place = status.and_then(|s| {
        let storage = s.storage.as_ref().map(|s| &s.location).filter(|location| !location.is_empty());
        s.location.as_ref().or(storage)
    });
    let place = place.map_or_else(|| "the pods of its job".to_owned(), Clone::clone);
    let message = format!("files of savepoint {name} are left in {place}: they could not be removed: {why}");
    plan.notes.push(Note { warning: true, reason: "StateLeft", message });
    plan.actions.push(Action::RemoveFinalizer);
    plan
}

fn tell(seen: &Seen, status: &mut SavepointStatus, told: &Told) {
    let (reason, message) = told;
    let ready = match status.state {
        SavepointState::Completed | SavepointState::Scheduled => true,
        SavepointState::Pending | SavepointState::InProgress | SavepointState::Failed => false,
    };
    let stalled = status.state == SavepointState::Failed;
    for (kind, holds) in [("Ready", ready), ("Reconciling", !ready && !stalled), ("Stalled", stalled)] {
        let condition = Condition {
            kind: kind.to_owned(),
            status: holds.into(),
            reason: (*reason).to_owned(),
            message: message.clone(),
            last_transition_time: seen.now,
            observed_generation: status.observed_generation,
        };
        condition.put(&mut status.conditions);
    }
}
