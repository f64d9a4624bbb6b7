//! What the leader of a job tells of it in its Lease, and when. Pure.

use std::time::Duration;

use floodmark_crds::{CheckpointReport, FailureReport, Report, ReportPhase};

use super::Candidate;
use crate::{JobPhase, ProgressView, leadership::Ending};

/// From one report to the next, if nothing special has happened.
pub(super) const REPORT_EVERY: Duration = Duration::from_secs(10);
/// The same if something has.
pub(super) const NEWS_EVERY: Duration = Duration::from_millis(200);

/// A report on a run. What it has not been told in this process it takes from `before`, an earlier one on the same run.
pub(super) fn report(candidate: &Candidate, view: &ProgressView, before: Option<&Report>) -> Report {
    let before = before.cloned().unwrap_or_default();
    let last = view.checkpoints.last.map(|c| CheckpointReport {
        epoch: c.epoch.0,
        triggered_at_ms: c.triggered_at_ms,
        duration_ms: c.duration_ms,
        size: c.size,
    });
    let failure = view.attempt.last_failure.clone().map(|f| FailureReport { cause: f.cause, at_ms: f.at_ms });
    let started = view.attempt.parallelism.is_some();
    let (restored_from, fallback) = match view.restored_from {
        Some(epoch) => (Some(epoch.0), view.fallback.clone()),
        None if started => (None, None),
        None => (before.restored_from, before.fallback),
    };
    Report {
        run: candidate.run,
        holder: candidate.identity.clone(),
        http: candidate.http.clone(),
        phase: phase(view),
        parallelism: view.attempt.parallelism.unwrap_or(candidate.parallelism),
        attempt: view.attempt.attempt.map(|a| a.0).or(before.attempt),
        restarts: view.attempt.restarts,
        restored_from,
        fallback,
        completed: view.checkpoints.completed,
        last_checkpoint: last.or(before.last_checkpoint),
        failure: failure.or(before.failure),
    }
}

fn phase(view: &ProgressView) -> ReportPhase {
    match view.phase {
        JobPhase::Restoring if view.attempt.waiting => ReportPhase::Waiting,
        JobPhase::Running if view.attempt.restoring == 0 => ReportPhase::Running,
        JobPhase::Restoring | JobPhase::Running => ReportPhase::Restoring,
        // How it has ended is known a moment later.
        JobPhase::Stopping | JobPhase::Done => ReportPhase::Stopping,
    }
}

/// The last report of a process.
pub(super) fn last(report: Report, ending: &Ending, now_ms: i64) -> Report {
    let failure = |cause: &str| Some(FailureReport { cause: cause.to_owned(), at_ms: now_ms });
    match ending {
        Ending::Stopped => Report { phase: ReportPhase::Stopped, ..report },
        Ending::Finished => Report { phase: ReportPhase::Finished, ..report },
        Ending::Failed(cause) => Report { phase: ReportPhase::Failed, failure: failure(cause), ..report },
        Ending::Broken(cause) => Report { phase: ReportPhase::Waiting, failure: failure(cause), ..report },
        Ending::HandedOver => Report { phase: ReportPhase::Waiting, ..report },
    }
}

/// In how long this is to be told, when something was told so long ago. `None` if there is nothing new.
pub(super) fn due_in(report: &Report, told: &Report, told_ago: Duration) -> Option<Duration> {
    if report == told {
        return None;
    }
    let every = if is_news(report, told) { NEWS_EVERY } else { REPORT_EVERY };
    Some(every.saturating_sub(told_ago))
}

/// Whether somebody may wait for this.
fn is_news(report: &Report, told: &Report) -> bool {
    let of = |r: &Report| (r.phase, r.parallelism, r.completed > 0, r.failure.clone(), r.fallback.clone());
    of(report) != of(told)
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::{Attempt, Epoch};

    use super::*;
    use crate::{AttemptStatus, CheckpointCounts, CheckpointStatus, FailureStatus};

    fn candidate() -> Candidate {
        Candidate { identity: "pod".into(), run: 4, http: "10.0.0.1:8080".into(), parallelism: 2 }
    }

    fn view(phase: JobPhase, waiting: bool, restoring: usize) -> ProgressView {
        let attempt = AttemptStatus { waiting, restoring, ..AttemptStatus::default() };
        ProgressView { phase, attempt, ..ProgressView::default() }
    }

    #[test]
    fn a_job_runs_when_all_its_state_is_there() {
        for (view, expected) in [
            (view(JobPhase::Restoring, true, 0), ReportPhase::Waiting),
            (view(JobPhase::Restoring, false, 0), ReportPhase::Restoring),
            (view(JobPhase::Running, false, 1), ReportPhase::Restoring),
            (view(JobPhase::Running, false, 0), ReportPhase::Running),
            (view(JobPhase::Stopping, false, 0), ReportPhase::Stopping),
        ] {
            assert_eq!(report(&candidate(), &view, None).phase, expected, "{view:?}");
        }
    }

    #[test]
    fn what_this_process_does_not_know_is_as_it_was_told() {
        let before = Report {
            run: 4,
            holder: "another".into(),
            phase: ReportPhase::Running,
            parallelism: 9,
            attempt: Some(3),
            restarts: 5,
            restored_from: Some(70),
            fallback: Some("damaged".into()),
            completed: 12,
            last_checkpoint: Some(CheckpointReport { epoch: 82, ..CheckpointReport::default() }),
            failure: Some(FailureReport { cause: "lost".into(), at_ms: 1 }),
            ..Report::default()
        };
        let anew = report(&candidate(), &view(JobPhase::Restoring, true, 0), Some(&before));
        let expected = Report {
            holder: "pod".into(),
            http: "10.0.0.1:8080".into(),
            phase: ReportPhase::Waiting,
            parallelism: 2,
            restarts: 0,
            completed: 0,
            ..before.clone()
        };
        assert_eq!(anew, expected);
        let last = CheckpointStatus { epoch: Epoch(83), triggered_at_ms: 5, duration_ms: 6, size: 7 };
        let running = ProgressView {
            phase: JobPhase::Running,
            restored_from: Some(Epoch(82)),
            checkpoints: CheckpointCounts { completed: 1, last: Some(last), ..CheckpointCounts::default() },
            attempt: AttemptStatus {
                attempt: Some(Attempt(4)),
                parallelism: Some(3),
                restarts: 1,
                last_failure: Some(FailureStatus { cause: "worker 1 is lost".into(), at_ms: 8 }),
                ..AttemptStatus::default()
            },
            ..ProgressView::default()
        };
        let expected = Report {
            phase: ReportPhase::Running,
            parallelism: 3,
            attempt: Some(4),
            restarts: 1,
            restored_from: Some(82),
            fallback: None,
            completed: 1,
            last_checkpoint: Some(CheckpointReport { epoch: 83, triggered_at_ms: 5, duration_ms: 6, size: 7 }),
            failure: Some(FailureReport { cause: "worker 1 is lost".into(), at_ms: 8 }),
            ..expected
        };
        assert_eq!(report(&candidate(), &running, Some(&before)), expected);
    }

    #[test]
    fn what_somebody_may_wait_for_is_told_at_once() {
        let told = report(&candidate(), &view(JobPhase::Running, false, 0), None);
        let second = Duration::from_secs(1);
        assert_eq!(due_in(&told, &told, second), None);
        for news in [
            Report { phase: ReportPhase::Stopping, ..told.clone() },
            Report { parallelism: 3, ..told.clone() },
            Report { completed: 1, ..told.clone() },
            Report { failure: Some(FailureReport::default()), ..told.clone() },
            Report { fallback: Some("damaged".into()), ..told.clone() },
        ] {
            assert_eq!(due_in(&news, &told, second), Some(Duration::ZERO), "{news:?}");
            assert_eq!(due_in(&news, &told, Duration::ZERO), Some(NEWS_EVERY), "{news:?}");
        }
        let told = Report { completed: 1, ..told };
        for later in [
            Report { completed: 2, ..told.clone() },
            Report { last_checkpoint: Some(CheckpointReport::default()), ..told.clone() },
            Report { attempt: Some(3), ..told.clone() },
            Report { restarts: 3, ..told.clone() },
        ] {
            assert_eq!(due_in(&later, &told, second), Some(second * 9), "{later:?}");
        }
    }

    #[test]
    fn the_last_report_says_how_it_ended() {
        let running = Report { attempt: Some(3), ..report(&candidate(), &view(JobPhase::Running, false, 0), None) };
        let failure = Some(FailureReport { cause: "no".into(), at_ms: 5 });
        for (ending, phase, ended, failure) in [
            (Ending::Stopped, ReportPhase::Stopped, true, None),
            (Ending::Finished, ReportPhase::Finished, true, None),
            (Ending::Failed("no".into()), ReportPhase::Failed, true, failure.clone()),
            (Ending::Broken("no".into()), ReportPhase::Waiting, false, failure),
            (Ending::HandedOver, ReportPhase::Waiting, false, None),
        ] {
            let last = last(running.clone(), &ending, 5);
            assert_eq!((last.phase, last.ended(), &last.failure), (phase, ended, &failure));
            assert_eq!(last.attempt, Some(3));
            assert_eq!(ending.is_for_good(), ended);
        }
    }
}
