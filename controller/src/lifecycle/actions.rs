//! What follows from a status that is written: what the cluster shall hold, who may lead, what is to be asked.

use std::collections::BTreeMap;

use floodmark_crds::{Operation, OperationKind, Report, ReportPhase, RunStatus, Step, StreamJobStatus, Timestamp};

use crate::objects::PodCounts;

use super::{Action, Question, Reply, Seen, advance::question_of, earlier};

pub(super) fn actions(status: &StreamJobStatus, seen: &Seen, wake: &mut Option<Timestamp>) -> Vec<Action> {
    let operation = status.operation.as_ref();
    let mut actions = Vec::new();
    let runs = kept(status);
    let allowed = allowed(status);
    if !seen.job_intact {
        actions.push(Action::ApplyJob { run: status.run.as_ref().map(|r| r.number) });
    }
    // Whoever may not lead any more is told before whoever may.
    if seen.lease.as_ref().is_none_or(|l| l.run != allowed) {
        actions.push(Action::Allow { run: allowed });
    }
    for (&number, run) in &runs {
        let counts = counts(run, seen);
        let workers = workers(operation, run, counts, seen);
        match seen.runs.get(&number) {
            // What leaves has to be gone first.
            Some(there) if there.leaving => {}
            Some(there) if there.complete => {
                match there.renew_at {
                    Some(at) if seen.now >= at => actions.push(Action::RenewCertificates { run: number }),
                    Some(at) => earlier(wake, at),
                    None => {}
                }
                if let Some(pods) = workers.filter(|pods| there.workers_wanted != *pods) {
                    actions.push(Action::ScaleWorkers { run: number, pods });
                }
                let coordinators = coordinators(operation, number, counts, seen);
                if let Some(pods) = coordinators.filter(|pods| there.coordinators_wanted != *pods) {
                    actions.push(Action::ScaleCoordinators { run: number, pods });
                }
            }
            // Of a run that ends nothing is made anew.
            _ if stops_coordinators(operation, number) => {}
            Some(_) | None => actions.push(Action::ApplyRun { run: run.clone(), workers }),
        }
    }
    for (&run, there) in &seen.runs {
        if !runs.contains_key(&run) && !there.leaving {
            actions.push(Action::RemoveRun { run });
        }
    }
    let ended = |run: &RunStatus| seen.report_of(run.number).is_some_and(Report::ended);
    let stopped = operation.is_some_and(|o| o.step == Step::Stopping && o.from.as_ref().is_some_and(ended));
    if let Some(question) = awaited(status)
        && !stopped
        && let Reply::Ask(question) = seen.ask(question, wake)
    {
        actions.push(Action::Ask(question));
    }
    actions
}

/// The runs whose objects are to be there.
fn kept(status: &StreamJobStatus) -> BTreeMap<u64, RunStatus> {
    let operation = status.operation.as_ref();
    let to = operation.filter(|o| o.step >= Step::Preparing).and_then(|o| o.to.clone());
    let from = operation.and_then(|o| o.from.clone());
    // Once the new run leads the old one's pods only take room; its Secret and all else is made anew for a rollback.
    let from = from.filter(|_| operation.is_some_and(|o| o.step < Step::Starting || o.kind == OperationKind::Rescale));
    let mut kept = BTreeMap::new();
    for run in status.run.iter().cloned().chain(from).chain(to) {
        kept.entry(run.number).or_insert(run);
    }
    kept
}

/// The run that may lead; 0 if none may.
fn allowed(status: &StreamJobStatus) -> u64 {
    let run = status.run.as_ref().map_or(0, |r| r.number);
    let Some(operation) = &status.operation else { return run };
    match operation.step {
        // A run that is not to be stopped with a savepoint is just not let lead any more.
        Step::Stopping if operation.savepoint.is_none() => 0,
        Step::Checking | Step::Preparing | Step::Stopping | Step::Starting => run,
    }
}

/// Whether the coordinators of a run are to be taken away.
fn stops_coordinators(operation: Option<&Operation>, run: u64) -> bool {
    operation.is_some_and(|o| {
        o.step == Step::Stopping && o.savepoint.is_none() && o.from.as_ref().is_some_and(|f| f.number == run)
    })
}

/// How many pods a run's revision asks for. Of another revision than the spec's its Deployments say so; without any nobody does
/// before they are made.
fn counts(run: &RunStatus, seen: &Seen) -> Option<PodCounts> {
    if run.revision == seen.revision {
        return Some(PodCounts::of(&seen.job.spec));
    }
    seen.runs.get(&run.number).and_then(|there| there.counts)
}

/// How many pods of coordinators a run shall have, if that is known.
fn coordinators(operation: Option<&Operation>, run: u64, counts: Option<PodCounts>, seen: &Seen) -> Option<u32> {
    let finished = operation.is_none() && seen.phase_of(run) == ReportPhase::Finished;
    if finished || stops_coordinators(operation, run) {
        return Some(0);
    }
    counts.map(PodCounts::coordinators)
}

/// How many pods of workers a run shall have, if that is known.
fn workers(operation: Option<&Operation>, run: &RunStatus, counts: Option<PodCounts>, seen: &Seen) -> Option<u32> {
    // What is finished or has failed needs none.
    if seen.report_of(run.number).is_some_and(Report::ended) {
        return Some(0);
    }
    let rescaled = operation.filter(|o| o.kind == OperationKind::Rescale).and_then(|o| o.to.as_ref());
    let most = rescaled.map_or(run.parallelism, |to| to.parallelism.max(run.parallelism));
    counts.map(|counts| counts.workers(most))
}

/// What the operation that is under way has to know or have done in its present step. Answers to all else are to be forgotten:
/// the same question may be asked again for another reason.
#[must_use]
pub fn awaited(status: &StreamJobStatus) -> Option<Question> {
    status.operation.as_ref().and_then(question_of)
}
