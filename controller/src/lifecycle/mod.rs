//! What becomes of a job, step by step: from what is seen of it to what is to be done. Pure: no I/O, no clock.
//!
//! The status holds what is meant to happen: the run in force, and the operation that is under way. [`decide`] first finds out
//! what the status should say (`begin`: what the spec wants; `advance`: how far the operation is; `describe`: what people are
//! told). If it says that already, the actions follow from it (`actions`); if not, the status is written and nothing else.
//!
//! Invariants:
//! - Nothing is done that the written status does not say: whoever finds it can go on with it.
//! - A job that runs is not touched before its next revision was found to fit, and has its pods.
//! - No operation goes on with less state than was asked for: it waits, or is given up and the old run goes on.
//! - With nothing changed, a second pass plans nothing.

mod actions;
mod advance;
mod begin;
mod describe;
mod plan;
mod seen;
#[cfg(test)]
mod tests;

use std::time::Duration;

use floodmark_crds::{
    CheckpointMode, DeletionPolicy, JobState, Operation, Report, ReportPhase, RunStatus, StreamJobStatus, Timestamp,
};
use kube::ResourceExt as _;

pub use self::{
    actions::awaited,
    plan::{Action, Note, Plan},
    seen::{Answer, Asked, LeaseSeen, PodsSeen, Question, RunSeen, Seen, Trouble, TroubleKind},
};

/// Keeps a StreamJob from going before its pods are gone, and its checkpoints if they shall be.
pub const FINALIZER: &str = "floodmark.io/job";
/// After so long a job that is deleted goes although its checkpoints could not be removed.
const DELETE_PATIENCE: Duration = Duration::from_secs(600);
/// From an answer that nobody knew to the next try.
const ASK_AGAIN: Duration = Duration::from_secs(3);
/// The same where nothing waits but a start: it is asked when it has been unknown for twice as long, but no later than this.
const ASK_AGAIN_MAX: Duration = Duration::from_secs(60);

/// What is to be done for a job. See the header of this file.
#[must_use]
pub fn decide(seen: &Seen) -> Plan {
    if seen.job.metadata.deletion_timestamp.is_some() {
        return leave(seen);
    }
    if !seen.job.finalizers().iter().any(|f| f == FINALIZER) {
        return Plan { actions: vec![Action::AddFinalizer], ..Plan::default() };
    }
    let present = seen.job.status.clone().unwrap_or_default();
    let mut next = Next { status: known_again(present.clone(), seen), notes: Vec::new(), wake: None };
    next.status.observed_generation = seen.generation();
    if let Some(operation) = next.status.operation.take() {
        next.advance(operation, seen);
    }
    if next.status.operation.is_none() {
        next.begin(seen);
    }
    describe::describe(&mut next.status, seen);
    let fallback = |status: &StreamJobStatus| status.restored_from.as_ref().and_then(|r| r.fallback.clone());
    if let Some(why) = fallback(&next.status).filter(|why| fallback(&present).as_ref() != Some(why)) {
        next.warn("OlderCheckpoint", why);
    }
    let status = (next.status != present || seen.job.status.is_none()).then(|| Box::new(next.status.clone()));
    let actions = if status.is_some() { Vec::new() } else { actions::actions(&next.status, seen, &mut next.wake) };
    Plan { status, notes: next.notes, actions, wake: next.wake }
}

/// What the status is to say, and what people are to be told.
struct Next {
    status: StreamJobStatus,
    notes: Vec<Note>,
    wake: Option<Timestamp>,
}

impl Next {
    fn note(&mut self, reason: &'static str, message: impl Into<String>) {
        self.notes.push(Note { warning: false, reason, message: message.into() });
    }

    fn warn(&mut self, reason: &'static str, message: impl Into<String>) {
        self.notes.push(Note { warning: true, reason, message: message.into() });
    }

    /// Looks again at this time at the latest.
    fn wake_at(&mut self, at: Timestamp) {
        earlier(&mut self.wake, at);
    }
}

fn earlier(wake: &mut Option<Timestamp>, at: Timestamp) {
    *wake = Some(wake.map_or(at, |w| w.min(at)));
}

/// The status of a job whose status was lost: its run is known by the objects that are there. Without any it begins like a new
/// one, and finds its state in storage.
fn known_again(mut status: StreamJobStatus, seen: &Seen) -> StreamJobStatus {
    if status.last_run > 0 {
        return status;
    }
    let allowed = seen.lease.as_ref().map_or(0, |l| l.run);
    let reported = seen.lease.as_ref().and_then(|l| l.report.as_ref()).map_or(0, |r| r.run);
    let newest = seen.runs.keys().copied().max().unwrap_or(0);
    let number = if seen.runs.contains_key(&allowed) { allowed } else { newest };
    if let Some(run) = seen.runs.get(&number).filter(|r| !r.leaving) {
        let report = seen.report_of(number);
        let run = RunStatus {
            number,
            revision: run.revision.clone(),
            parallelism: run.parallelism,
            restore: run.restore.clone(),
            stable: report.is_some_and(|r| r.completed > 0),
        };
        status.stable_run = run.stable.then(|| run.clone());
        status.run = Some(run);
        // What it was told before is not told again.
        status.restart_nonce = seen.job.spec.restart_nonce;
        status.restore_nonce = seen.job.spec.restore.nonce;
    }
    status.last_run = newest.max(allowed).max(reported);
    status
}

/// What is to be done for a job that is deleted: its pods go, then its checkpoints if they shall, then it.
fn leave(seen: &Seen) -> Plan {
    let mut plan = Plan::default();
    if !seen.job.finalizers().iter().any(|f| f == FINALIZER) {
        return plan;
    }
    let mut status = seen.job.status.clone().unwrap_or_default();
    status.observed_generation = seen.generation();
    status.operation = None;
    status.state = JobState::Deleting;
    describe::leaving(&mut status, seen);
    if Some(&status) != seen.job.status.as_ref() {
        plan.status = Some(Box::new(status));
        return plan;
    }
    if seen.lease.as_ref().is_some_and(|l| l.run != 0) {
        plan.actions.push(Action::Allow { run: 0 });
    }
    plan.actions.extend(seen.runs.iter().filter(|(_, r)| !r.leaving).map(|(&run, _)| Action::RemoveRun { run }));
    if !seen.runs.is_empty() || !plan.actions.is_empty() {
        return plan;
    }
    if seen.job.spec.checkpoints.on_delete == DeletionPolicy::Delete {
        let deleted = seen.job.metadata.deletion_timestamp.as_ref().map(Timestamp::from).unwrap_or_default();
        let give_up = deleted.plus(DELETE_PATIENCE);
        match seen.ask(Question::DeleteState, &mut plan.wake) {
            Reply::Yes => {}
            Reply::Ask(question) if seen.now < give_up => plan.actions.push(Action::Ask(question)),
            Reply::Wait(_) | Reply::UnderWay if seen.now < give_up => earlier(&mut plan.wake, give_up),
            Reply::No(why) | Reply::Wait(why) => plan.notes.push(state_left(seen, &why)),
            Reply::Ask(_) | Reply::UnderWay => plan.notes.push(state_left(seen, "nobody could say whether they were")),
        }
        if !plan.actions.is_empty() || plan.wake.is_some() {
            return plan;
        }
    }
    plan.actions.push(Action::RemoveFinalizer);
    plan
}

/// What is said of checkpoints that could not be removed.
fn state_left(seen: &Seen, why: &str) -> Note {
    let place = match &seen.job.spec.checkpoints.storage {
        Some(storage) => format!("{storage}, folder {}", floodmark_admission::job_id(&seen.job)),
        None => "its pods".to_owned(),
    };
    let message = format!("the job's checkpoints are left in {place}: they could not be removed: {why}");
    Note { warning: true, reason: "StateLeft", message }
}

/// What is to be made of a question.
enum Reply {
    /// Ask it.
    Ask(Question),
    /// Wait for the answer.
    UnderWay,
    /// Wait a while before it is asked again: why.
    Wait(String),
    Yes,
    No(String),
}

impl Seen {
    fn generation(&self) -> i64 {
        self.job.metadata.generation.unwrap_or(0)
    }

    /// What the leader of this run last told.
    fn report_of(&self, run: u64) -> Option<&Report> {
        self.lease.as_ref().and_then(|l| l.report.as_ref()).filter(|r| r.run == run && run > 0)
    }

    /// The phase of a run; `Waiting` if nobody has told one.
    fn phase_of(&self, run: u64) -> ReportPhase {
        self.report_of(run).map_or(ReportPhase::Waiting, |r| r.phase)
    }

    /// How long ago this step was begun.
    fn in_step(&self, operation: &Operation) -> Duration {
        self.now.since(operation.since)
    }

    /// How long a step may take.
    fn timeout(&self) -> Duration {
        self.job.spec.upgrade.timeout.get()
    }

    fn ask(&self, question: Question, wake: &mut Option<Timestamp>) -> Reply {
        match self.answers.get(&question) {
            None => Reply::Ask(question),
            Some(Asked::UnderWay) => Reply::UnderWay,
            Some(Asked::Answered(Answer::Yes, _)) => Reply::Yes,
            Some(Asked::Answered(Answer::No(why), _)) => Reply::No(why.clone()),
            Some(Asked::Answered(Answer::Unknown(why), at)) => {
                let again = at.plus(self.patience(&question, *at));
                if self.now >= again {
                    return Reply::Ask(question);
                }
                earlier(wake, again);
                Reply::Wait(why.clone())
            }
        }
    }

    /// How long after an answer at this time, which nobody knew, a question is asked again.
    fn patience(&self, question: &Question, at: Timestamp) -> Duration {
        match question {
            Question::Fits { .. } => {
                let operation = self.job.status.as_ref().and_then(|s| s.operation.as_ref());
                let unknown = operation.map_or(Duration::ZERO, |o| at.since(o.since));
                unknown.clamp(ASK_AGAIN, ASK_AGAIN_MAX)
            }
            Question::StopWithSavepoint { .. } | Question::Rescale { .. } | Question::DeleteState => ASK_AGAIN,
        }
    }

    /// Whether a run takes no checkpoints. Of another revision than the spec's its Deployments say so, if this version has made them.
    fn takes_no_checkpoints(&self, run: &RunStatus) -> bool {
        let account = self.runs.get(&run.number).and_then(|there| there.checkpoints);
        let mode = account.filter(|_| run.revision != self.revision).unwrap_or(self.job.spec.checkpoints.mode);
        mode == CheckpointMode::Disabled
    }
}
