//! What people are told of a job: its state in a word, its conditions, what it last did.

use std::time::Duration;

use floodmark_crds::{
    Condition, DesiredState, JobState, LastCheckpoint, LastFailure, OperationKind, Report, ReportPhase, Step,
    StreamJobStatus, Timestamp,
};

use super::{Seen, advance::hopeless, begin::parallelism_revision};

/// The newest checkpoint is told no more often than this, if nothing else is new.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(30);
/// Longest text of a cause.
const MESSAGE_MAX: usize = 1_024;

/// What is told of a job.
pub(super) fn describe(status: &mut StreamJobStatus, seen: &Seen) {
    let number = status.run.as_ref().map_or(0, |r| r.number);
    let report = seen.report_of(number).cloned();
    let report = report.as_ref();
    status.selector = format!("floodmark.io/job={},floodmark.io/role=worker", crate::objects::base(&name(seen)));
    status.parallelism = match (report, &status.run) {
        (Some(report), Some(run)) if !report.ended() => {
            if report.parallelism > 0 {
                report.parallelism
            } else {
                run.parallelism
            }
        }
        (None, Some(run)) => run.parallelism,
        _ => 0,
    };
    status.state = state(status, seen, report);
    if let Some(report) = report {
        tell_progress(status, report);
        tell_restored(status, report);
    }
    if let Some(trouble) = trouble(status, seen, report) {
        let cause = shortened(&trouble);
        if status.failure.as_ref().is_none_or(|f| f.cause != cause) {
            status.failure = Some(LastFailure { cause, time: seen.now });
        }
    }
    for (kind, holds, reason, message) in conditions(status, seen, report) {
        condition(seen, kind, holds, &reason, &message).put(&mut status.conditions);
    }
}

/// What is told of a job that is being deleted.
pub(super) fn leaving(status: &mut StreamJobStatus, seen: &Seen) {
    for (kind, holds) in [("Ready", false), ("Reconciling", true), ("Stalled", false), ("Running", false)] {
        condition(seen, kind, holds, "Deleting", "the job is being deleted").put(&mut status.conditions);
    }
}

fn name(seen: &Seen) -> String {
    seen.job.metadata.name.clone().unwrap_or_default()
}

fn condition(seen: &Seen, kind: &str, holds: bool, reason: &str, message: &str) -> Condition {
    Condition {
        kind: kind.to_owned(),
        status: holds.into(),
        reason: reason.to_owned(),
        message: shortened(message),
        last_transition_time: seen.now,
        observed_generation: seen.generation(),
    }
}

fn shortened(text: &str) -> String {
    let end = text.char_indices().nth(MESSAGE_MAX).map_or(text.len(), |(at, _)| at);
    text[..end].to_owned()
}

/// The newest checkpoint. Alone it is no reason to write often.
fn tell_progress(status: &mut StreamJobStatus, report: &Report) {
    let Some(last) = &report.last_checkpoint else { return };
    let time = Timestamp::from_millis(last.triggered_at_ms);
    let told = status.last_checkpoint.as_ref();
    if told.is_some_and(|t| t.epoch <= last.epoch && time.since(t.time) < CHECKPOINT_EVERY) {
        return;
    }
    let (epoch, duration_ms, size) = (last.epoch, last.duration_ms, last.size);
    status.last_checkpoint = Some(LastCheckpoint { epoch, time, duration_ms, size });
}

/// The checkpoint that the run goes on from is known a moment after it begins. It is another one, and people want to know why, if the
/// newest turns out to be damaged later.
fn tell_restored(status: &mut StreamJobStatus, report: &Report) {
    let Some(told) = &mut status.restored_from else { return };
    let another = report.fallback.is_some() && report.fallback != told.fallback;
    if another || (told.epoch.is_none() && report.restarts == 0) {
        told.epoch = report.restored_from;
        told.fallback.clone_from(&report.fallback);
    }
}

/// How the run that is in force fails, if it does.
fn trouble(status: &StreamJobStatus, seen: &Seen, report: Option<&Report>) -> Option<String> {
    let told = report.and_then(|r| r.failure.as_ref()).map(|f| f.cause.clone());
    let run = status.run.as_ref().and_then(|r| seen.runs.get(&r.number));
    let pods = run.into_iter().flat_map(|r| [&r.coordinators, &r.workers]);
    told.or_else(|| pods.filter_map(|p| p.trouble.as_ref()).map(|t| t.message.clone()).next())
}

fn state(status: &StreamJobStatus, seen: &Seen, report: Option<&Report>) -> JobState {
    let phase = report.map(|r| r.phase);
    if let Some(operation) = &status.operation {
        return match operation.kind {
            _ if phase == Some(ReportPhase::Failed) && operation.step == Step::Starting => JobState::Failed,
            OperationKind::Upgrade => JobState::Upgrading,
            OperationKind::Rescale => JobState::Rescaling,
            OperationKind::Rollback => JobState::RollingBack,
            OperationKind::Suspend => JobState::Suspending,
            _ if trouble(status, seen, report).is_some() => JobState::Failing,
            OperationKind::Deploy | OperationKind::Restart | OperationKind::Restore | OperationKind::Resume => {
                JobState::Starting
            }
        };
    }
    match (&status.run, phase) {
        (None, _) if seen.job.spec.desired_state == DesiredState::Suspended => JobState::Suspended,
        (None, _) if status.refused.is_some() => JobState::Failed,
        (None, _) => JobState::Pending,
        (Some(_), Some(ReportPhase::Running | ReportPhase::Stopping)) => JobState::Running,
        (Some(_), Some(ReportPhase::Finished)) => JobState::Finished,
        (Some(_), Some(ReportPhase::Failed)) => JobState::Failed,
        (Some(_), _) if trouble(status, seen, report).is_some() => JobState::Failing,
        (Some(_), _) => JobState::Starting,
    }
}

/// Type, whether it holds, reason, message.
type Told = (&'static str, bool, String, String);

fn conditions(status: &StreamJobStatus, seen: &Seen, report: Option<&Report>) -> Vec<Told> {
    let state = format!("{:?}", status.state);
    let running = report.is_some_and(|r| matches!(r.phase, ReportPhase::Running | ReportPhase::Stopping));
    let stalled = stalled(status, seen, report);
    let wanted = as_wanted(status, seen);
    let (operation, cause) = (status.operation.as_ref(), trouble(status, seen, report));
    let under_way = operation.map(|o| match o.message.as_str() {
        "" => format!("{:?}: {:?}", o.kind, o.step),
        message => format!("{:?}: {:?}: {message}", o.kind, o.step),
    });
    let ready = match status.state {
        JobState::Running => wanted && stalled.is_none(),
        JobState::Suspended | JobState::Finished => stalled.is_none(),
        _ => false,
    };
    let why = if ready {
        match status.state {
            JobState::Suspended => status.suspended_with.as_ref().map_or_else(
                || "it does not run, as the spec says".to_owned(),
                |with| format!("it does not run, as the spec says; its state is in {with}"),
            ),
            JobState::Finished => "all its inputs have ended".to_owned(),
            _ => "this generation of the spec runs".to_owned(),
        }
    } else {
        let stalled = stalled.as_ref().map(|(_, message)| message.clone());
        stalled.or_else(|| under_way.clone()).or(cause).unwrap_or_else(|| "it does not run yet".to_owned())
    };
    let reason = stalled.as_ref().map_or_else(|| state.clone(), |(reason, _)| reason.clone());
    let reconciling = stalled.is_none() && !ready;
    let (stalled, stalled_reason, stalled_message) = match stalled {
        Some((reason, message)) => (true, reason, message),
        None => (false, "Progressing".to_owned(), String::new()),
    };
    vec![
        ("Ready", ready, reason, why.clone()),
        ("Reconciling", reconciling, state.clone(), if reconciling { under_way.unwrap_or(why) } else { String::new() }),
        ("Stalled", stalled, stalled_reason, stalled_message),
        ("Running", running, state, String::new()),
    ]
}

/// Whether what is in force is what the spec says.
fn as_wanted(status: &StreamJobStatus, seen: &Seen) -> bool {
    let spec = &seen.job.spec;
    status.operation.is_none()
        && status
            .run
            .as_ref()
            .is_some_and(|r| r.stable && r.revision == seen.revision && r.parallelism == spec.parallelism)
}

/// Why the controller can't bring about what the spec says, if it can't.
fn stalled(status: &StreamJobStatus, seen: &Seen, report: Option<&Report>) -> Option<(String, String)> {
    let spec = &seen.job.spec;
    let operation = status.operation.as_ref();
    let refused = status
        .refused
        .as_ref()
        .filter(|r| r.revision == seen.revision || r.revision == parallelism_revision(spec.parallelism));
    if let Some(refused) = refused
        && operation.is_none()
    {
        return Some((refused.reason.clone(), refused.message.clone()));
    }
    if let Some(operation) = operation.filter(|o| o.step == Step::Checking && o.failures > 0) {
        return Some(("DoesNotFit".to_owned(), operation.message.clone()));
    }
    if report.is_some_and(|r| r.phase == ReportPhase::Failed) {
        let cause = report.and_then(|r| r.failure.as_ref()).map_or("", |f| f.cause.as_str());
        // The next revision may be on its way to take its place.
        let replaced = operation.is_some_and(|o| o.to.is_some() && o.step < Step::Starting);
        return (!replaced).then(|| ("Failed".to_owned(), cause.to_owned()));
    }
    let operation = operation?;
    if let Some((reason, message)) = hopeless(operation, seen) {
        return Some((reason.to_owned(), message));
    }
    // It is still tried, but nobody should wait for it.
    let late = seen.in_step(operation) >= seen.timeout();
    late.then(|| ("Timeout".to_owned(), operation.message.clone()))
}
