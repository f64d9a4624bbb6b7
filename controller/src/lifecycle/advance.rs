//! How far the operation that is under way has come: its next step, or its end.

use floodmark_crds::{
    CheckpointMode, DesiredState, Operation, OperationKind, Refused, Report, ReportPhase, RestoredFrom, RunStatus,
    Step, Timestamp, UpgradeMode,
};

use super::{
    ASK_AGAIN_MS, Asked, Next, PodsSeen, Question, Reply, Seen, TroubleKind,
    begin::{LATEST, NONE, parallelism_revision, savepoint_name},
};

/// Savepoints that are tried before an upgrade is given up.
const SAVEPOINTS_MAX: u32 = 3;
/// Attempts of a new revision that fail without a checkpoint before it is rolled back.
const FAILED_ATTEMPTS_MAX: u64 = 3;
/// How long a pod may have a trouble that often goes by itself, milliseconds: a registry that is slow, a Secret that comes later.
const TROUBLE_PATIENCE_MS: u64 = 20_000;
/// How long coordinators of a run that may not lead any more are waited for, milliseconds: on a lost node they never go, and the
/// log fences them.
const LEAVE_PATIENCE_MS: u64 = 20_000;

impl Next {
    /// Takes an operation as far as it comes. It is put back into the status unless it has ended.
    pub(super) fn advance(&mut self, operation: Operation, seen: &Seen) {
        if self.is_overtaken(&operation, seen) {
            self.note(
                "Overtaken",
                "the spec has changed again: what it says now is begun in place of what was under way",
            );
            return;
        }
        if operation.kind == OperationKind::Rescale {
            return self.rescaling(operation, seen);
        }
        match operation.step {
            Step::Checking => self.checking(operation, seen),
            Step::Preparing => self.preparing(operation, seen),
            Step::Stopping => self.stopping(operation, seen),
            Step::Starting => self.starting(operation, seen),
        }
    }

    fn keep(&mut self, operation: Operation) {
        self.status.operation = Some(operation);
    }

    fn step(&mut self, mut operation: Operation, step: Step, seen: &Seen) {
        (operation.step, operation.since, operation.failures) = (step, seen.now, 0);
        operation.message.clear();
        self.keep(operation);
    }

    /// Waits in this step for an answer; what it was that kept it so far stays told.
    fn wait_for_answer(&mut self, operation: Operation, message: &str, seen: &Seen) {
        let message = if operation.message.is_empty() { message.to_owned() } else { operation.message.clone() };
        self.wait(operation, message, seen);
    }

    /// Waits in this step, and says for what.
    fn wait(&mut self, mut operation: Operation, message: impl Into<String>, seen: &Seen) {
        operation.message = message.into();
        let timeout = timeout_ms(seen);
        if seen.in_step(&operation) < timeout {
            self.wake_at(after(operation.since, timeout));
        }
        self.keep(operation);
    }

    /// Whether the spec wants something else by now. An operation that has stopped nothing is dropped at once; one that has asked
    /// for a stop waits for the answer; a run without a checkpoint can always be replaced.
    fn is_overtaken(&self, operation: &Operation, seen: &Seen) -> bool {
        let spec = &seen.job.spec;
        let suspended = spec.desired_state == DesiredState::Suspended;
        let wanted = match (&operation.to, operation.kind) {
            (None, _) => suspended,
            (Some(to), OperationKind::Rescale) => {
                !suspended && to.parallelism == spec.parallelism && to.revision == seen.revision
            }
            // It serves as long as the revision that it takes the place of is the one that the spec names.
            (Some(_), OperationKind::Rollback) => {
                let refused = self.status.refused.as_ref();
                let nonces = spec.restart_nonce == self.status.restart_nonce && self.same_restore(seen);
                !suspended && nonces && refused.is_some_and(|r| r.revision == seen.revision)
            }
            (Some(to), _) => {
                let nonces = spec.restart_nonce == self.status.restart_nonce && self.same_restore(seen);
                let old = operation.from.as_ref().is_some_and(|f| f.revision == to.revision);
                // What ran before serves as long as what the spec names is refused.
                let serves = old && self.is_refused(seen, &seen.revision);
                !suspended && nonces && (to.revision == seen.revision || serves)
            }
        };
        let other_mode = operation.savepoint.is_some()
            && operation.kind != OperationKind::Suspend
            && operation.step < Step::Starting
            && spec.upgrade.mode != operation.mode;
        let other_mode = other_mode
            || operation.kind == OperationKind::Suspend
                && operation.mode == UpgradeMode::Savepoint
                && spec.upgrade.mode == UpgradeMode::LastCheckpoint;
        (!wanted || other_mode) && !self.is_asked(operation, seen)
    }

    fn same_restore(&self, seen: &Seen) -> bool {
        let nonce = seen.job.spec.restore.nonce;
        nonce.is_none() || nonce == self.status.restore_nonce
    }

    /// Whether the job has been asked for something that it may be doing now.
    fn is_asked(&self, operation: &Operation, seen: &Seen) -> bool {
        let question = match (operation.kind, operation.step) {
            (OperationKind::Rescale, Step::Starting) => rescale_question(operation),
            (_, Step::Stopping) => stop_question(operation),
            _ => None,
        };
        question.is_some_and(|q| matches!(seen.answers.get(&q), Some(Asked::UnderWay)))
    }

    fn refuse(&mut self, seen: &Seen, revision: &str, reason: &'static str, message: String) {
        self.warn(reason, message.clone());
        let (revision, reason) = (revision.to_owned(), reason.to_owned());
        self.status.refused = Some(Refused { revision, mode: seen.job.spec.upgrade.mode, reason, message });
    }

    /// Ends an operation that has stopped nothing: the old run goes on.
    fn give_up(&mut self, operation: &Operation, reason: &'static str, message: String, seen: &Seen) {
        if let Some(to) = &operation.to {
            self.refuse(seen, &to.revision, reason, message);
        }
    }

    fn checking(&mut self, operation: Operation, seen: &Seen) {
        let Some(to) = &operation.to else { return self.step(operation, Step::Stopping, seen) };
        let question = Question::Fits { revision: to.revision.clone(), restore: to.restore.clone() };
        match seen.ask(question, &mut self.wake) {
            Reply::Yes if operation.from.is_some() => self.step(operation, Step::Preparing, seen),
            Reply::Yes => self.launch_to(operation, seen),
            Reply::No(why) => self.give_up(&operation, "DoesNotFit", why, seen),
            Reply::Wait(why) => self.wait(operation, format!("whether it fits is not known yet: {why}"), seen),
            Reply::Ask(_) | Reply::UnderWay => self.wait_for_answer(operation, "it is checked whether it fits", seen),
        }
    }

    fn preparing(&mut self, operation: Operation, seen: &Seen) {
        let (Some(to), Some(from)) = (&operation.to, &operation.from) else {
            return self.step(operation, Step::Stopping, seen);
        };
        // Nobody waits for pods of a job that does not run anyway.
        let idle = seen.report_of(from.number).is_some_and(Report::ended);
        let run = seen.runs.get(&to.number).filter(|r| !r.leaving && r.complete);
        if idle || run.is_some_and(|r| r.coordinators.ready > 0 && r.workers.ready >= r.workers_wanted) {
            return self.step(operation, Step::Stopping, seen);
        }
        let in_step = seen.in_step(&operation);
        let trouble = run.and_then(|r| worst(&[&r.coordinators, &r.workers]));
        let Some((kind, message)) = trouble else {
            if in_step >= timeout_ms(seen) {
                let message = format!("its pods were not ready within {}", seen.job.spec.upgrade.timeout);
                return self.give_up(&operation, "PodsNotReady", message, seen);
            }
            return self.wait(operation, "its pods start", seen);
        };
        let patience = trouble_patience(kind, seen);
        if in_step >= patience {
            return self.give_up(&operation, reason_of(kind), message, seen);
        }
        self.wake_at(after(operation.since, patience));
        self.wait(operation, message, seen);
    }

    fn stopping(&mut self, operation: Operation, seen: &Seen) {
        let Some(from) = operation.from.clone() else { return self.stopped(operation, seen) };
        let report = seen.report_of(from.number);
        let phase = report.map_or(ReportPhase::Waiting, |r| r.phase);
        let Some(name) = operation.savepoint.clone() else {
            let left =
                seen.runs.get(&from.number).is_none_or(|r| r.coordinators.count == 0 && r.coordinators_wanted == 0);
            let in_step = seen.in_step(&operation);
            if left || report.is_some_and(Report::ended) || in_step >= LEAVE_PATIENCE_MS {
                return self.stopped(operation, seen);
            }
            self.wake_at(after(operation.since, LEAVE_PATIENCE_MS));
            return self.wait(operation, "its coordinator ends", seen);
        };
        match phase {
            ReportPhase::Stopped | ReportPhase::Finished => return self.stopped(operation, seen),
            ReportPhase::Failed => {
                let cause = report.and_then(|r| r.failure.as_ref()).map_or("", |f| f.cause.as_str());
                return self.no_savepoint(operation, format!("the job has failed: {cause}"), seen);
            }
            ReportPhase::Waiting | ReportPhase::Restoring | ReportPhase::Running | ReportPhase::Stopping => {}
        }
        let late = seen.in_step(&operation) >= timeout_ms(seen);
        match seen.ask(Question::StopWithSavepoint { run: from.number, name }, &mut self.wake) {
            Reply::Yes => self.wait(operation, "the job stops", seen),
            Reply::No(why) => self.savepoint_failed(operation, why, seen),
            Reply::Wait(why) if late => self.no_savepoint(operation, why, seen),
            Reply::Ask(question) if late && seen.answers.contains_key(&question) => {
                self.no_savepoint(operation, "the job does not answer".to_owned(), seen);
            }
            Reply::Wait(why) => self.wait(operation, why, seen),
            Reply::UnderWay if late => self.no_savepoint(operation, "the job does not answer".to_owned(), seen),
            Reply::Ask(_) | Reply::UnderWay => self.wait_for_answer(operation, "a savepoint is taken", seen),
        }
    }

    /// Tries another savepoint, a while later.
    fn savepoint_failed(&mut self, operation: Operation, why: String, seen: &Seen) {
        let Some(question) = stop_question(&operation) else { return self.keep(operation) };
        let again = match seen.answers.get(&question) {
            Some(Asked::Answered(_, at)) => Timestamp::from_millis(at.millis().saturating_add(ASK_AGAIN_MS)),
            Some(Asked::UnderWay) | None => seen.now,
        };
        if seen.now < again {
            self.wake_at(again);
            return self.wait(operation, why, seen);
        }
        let failures = operation.failures.saturating_add(1);
        if failures >= SAVEPOINTS_MAX && operation.to.is_some() {
            return self.no_savepoint(operation, why, seen);
        }
        let Some(from) = &operation.from else { return self.keep(operation) };
        let what = if operation.to.is_some() { "upgrade" } else { "suspend" };
        let savepoint = Some(format!("{}-{failures}", savepoint_name(what, seen, from.number)));
        if failures <= SAVEPOINTS_MAX {
            self.warn("SavepointFailed", format!("{why}; it is tried again"));
        }
        self.wait(Operation { savepoint, failures, ..operation }, why, seen);
    }

    /// Ends an operation whose savepoint can't be made: the old run goes on. A stop has nothing to go back to, and is tried for as
    /// long as the spec wants it.
    fn no_savepoint(&mut self, operation: Operation, why: String, seen: &Seen) {
        let message = format!(
            "there is no savepoint: {why}. The job goes on as it was; to go on from its newest checkpoint instead, set \
             spec.upgrade.mode to LastCheckpoint"
        );
        match &operation.to {
            Some(_) => self.give_up(&operation, "SavepointFailed", message, seen),
            None => self.wait(operation, message, seen),
        }
    }

    /// The old run has ended, or may not lead any more.
    fn stopped(&mut self, operation: Operation, seen: &Seen) {
        if operation.to.is_some() {
            return self.launch_to(operation, seen);
        }
        let savepoint = operation.savepoint.clone();
        self.note("Suspended", savepoint.as_ref().map_or_else(String::new, |s| format!("with savepoint {s}")));
        self.status.run = None;
        self.status.suspended_with = Some(savepoint.unwrap_or_else(|| LATEST.to_owned()));
    }

    /// From here on the new run is the one in force.
    fn launch_to(&mut self, operation: Operation, seen: &Seen) {
        self.status.run.clone_from(&operation.to);
        self.status.suspended_with = None;
        self.status.restored_from = None;
        self.step(operation, Step::Starting, seen);
    }

    fn starting(&mut self, operation: Operation, seen: &Seen) {
        let Some(to) = operation.to.clone() else { return };
        let report = seen.report_of(to.number);
        if let Some(report) = report
            && matches!(report.phase, ReportPhase::Restoring | ReportPhase::Running | ReportPhase::Finished)
            && self.status.restored_from.is_none()
        {
            self.status.restored_from = Some(restored_from(&operation, &to, report));
        }
        let disabled = seen.job.spec.checkpoints.mode == CheckpointMode::Disabled;
        let stable = report.is_some_and(|r| match r.phase {
            ReportPhase::Finished | ReportPhase::Stopped => true,
            ReportPhase::Running => r.completed > 0 || disabled,
            _ => false,
        });
        if stable {
            return self.stable(&operation, to, seen);
        }
        let in_step = seen.in_step(&operation);
        let late = in_step >= timeout_ms(seen);
        let pods = seen.runs.get(&to.number).and_then(|r| worst(&[&r.coordinators, &r.workers]));
        let failure = report.and_then(|r| r.failure.as_ref()).map(|f| f.cause.clone());
        let failed = report
            .is_some_and(|r| r.phase == ReportPhase::Failed || r.restarts >= FAILED_ATTEMPTS_MAX && r.completed == 0);
        let verdict = match (&pods, failure) {
            (_, Some(cause)) if failed => Some(("Failed", cause)),
            (_, None) if failed => Some(("Failed", "the job has failed".to_owned())),
            (Some((kind, message)), _) if in_step >= trouble_patience(*kind, seen) => {
                Some((reason_of(*kind), message.clone()))
            }
            (_, cause) if late => {
                let timeout = seen.job.spec.upgrade.timeout;
                let cause = cause.map_or_else(String::new, |c| format!("; the last failure: {c}"));
                Some(("Timeout", format!("no checkpoint was completed within {timeout}{cause}")))
            }
            _ => None,
        };
        match verdict {
            Some((reason, why)) => self.failed_to_start(operation, &to, reason, why, seen),
            None => {
                if let Some((kind, _)) = pods {
                    self.wake_at(after(operation.since, trouble_patience(kind, seen)));
                }
                let message = pods.map_or_else(|| waiting_for(report), |(_, message)| message);
                self.wait(operation, message, seen);
            }
        }
    }

    /// The new run has shown that it works: the operation has ended.
    fn stable(&mut self, operation: &Operation, mut to: RunStatus, seen: &Seen) {
        to.stable = true;
        if operation.kind != OperationKind::Rollback {
            self.status.refused = None;
        }
        self.note(
            if operation.kind == OperationKind::Rollback { "RolledBack" } else { "Stable" },
            format!("run {} of revision {} runs, {} ms after it was begun", to.number, to.revision, {
                seen.now.millis_since(operation.started_at)
            }),
        );
        self.status.stable_run = Some(to.clone());
        self.status.run = Some(to);
    }

    /// Goes back to the last run that was stable, if there is one and it was another.
    fn failed_to_start(
        &mut self,
        operation: Operation,
        to: &RunStatus,
        reason: &'static str,
        why: String,
        seen: &Seen,
    ) {
        let back = self.status.stable_run.clone().filter(|s| {
            operation.kind != OperationKind::Rollback
                && (s.revision != to.revision || operation.kind == OperationKind::Restore)
        });
        let Some(back) = back else {
            let message = format!("{reason}: {why}");
            return self.wait(operation, message, seen);
        };
        self.refuse(seen, &to.revision, "RolledBack", format!("{reason}: {why}"));
        let restore = match operation.mode {
            _ if operation.kind == OperationKind::Restore => self.last_epoch(),
            UpgradeMode::Stateless => self.last_epoch(),
            UpgradeMode::Savepoint | UpgradeMode::LastCheckpoint => LATEST.to_owned(),
        };
        let number = self.status.last_run + 1;
        self.status.last_run = number;
        let again = RunStatus { number, stable: false, restore, ..back };
        self.warn("RollingBack", format!("run {number} of revision {} from {}", again.revision, again.restore));
        let rollback = super::begin::operation(seen, OperationKind::Rollback, operation.mode, Step::Starting);
        let rollback = Operation { from: Some(to.clone()), to: Some(again), message: why, ..rollback };
        self.launch_to(rollback, seen);
    }

    /// The newest checkpoint of the run before this one.
    fn last_epoch(&self) -> String {
        self.status.last_checkpoint.as_ref().map_or_else(|| NONE.to_owned(), |c| c.epoch.to_string())
    }

    fn rescaling(&mut self, operation: Operation, seen: &Seen) {
        let Some(to) = operation.to.clone() else { return };
        let wanted = parallelism_revision(to.parallelism);
        let late = seen.in_step(&operation) >= timeout_ms(seen);
        let running = seen.phase_of(to.number) == ReportPhase::Running;
        if operation.step < Step::Starting {
            let workers = seen.runs.get(&to.number).map_or(0, |r| r.workers.ready);
            if workers >= seen.job.spec.worker.pods(to.parallelism) && running {
                return self.step(operation, Step::Starting, seen);
            }
            let trouble = seen.runs.get(&to.number).and_then(|r| worst(&[&r.workers]));
            let message = trouble.map_or_else(|| "its pods start".to_owned(), |(_, message)| message);
            if late {
                return self.refuse(seen, &wanted, "PodsNotReady", message);
            }
            return self.wait(operation, message, seen);
        }
        let Some(question) = rescale_question(&operation) else { return };
        match seen.ask(question, &mut self.wake) {
            // Until its report says so too, it would look as if somebody had changed it back.
            Reply::Yes if !late && seen.report_of(to.number).is_none_or(|r| r.parallelism != to.parallelism) => {
                self.wait(operation, "the job goes on", seen);
            }
            Reply::Yes => {
                self.note("Rescaled", format!("to parallelism {}", to.parallelism));
                self.status.stable_run = Some(to.clone());
                self.status.run = Some(to);
            }
            Reply::No(why) => self.refuse(seen, &wanted, "RescaleFailed", why),
            Reply::Wait(why) if late => self.refuse(seen, &wanted, "RescaleFailed", why),
            Reply::Wait(why) => self.wait(operation, why, seen),
            Reply::UnderWay if late => self.refuse(seen, &wanted, "RescaleFailed", "it takes too long".to_owned()),
            Reply::Ask(_) | Reply::UnderWay => self.wait_for_answer(operation, "the job rescales", seen),
        }
    }
}

/// What stops the old run of an operation.
pub(super) fn stop_question(operation: &Operation) -> Option<Question> {
    let (run, name) = (operation.from.as_ref()?.number, operation.savepoint.clone()?);
    Some(Question::StopWithSavepoint { run, name })
}

/// What rescales the run of an operation.
pub(super) fn rescale_question(operation: &Operation) -> Option<Question> {
    operation.to.as_ref().map(|to| Question::Rescale { run: to.number, parallelism: to.parallelism })
}

fn restored_from(operation: &Operation, to: &RunStatus, report: &Report) -> RestoredFrom {
    let source = match (&operation.savepoint, to.restore.as_str()) {
        (Some(savepoint), LATEST) => format!("savepoint {savepoint}"),
        (None, LATEST) => "checkpoint".to_owned(),
        (_, words) => words.to_owned(),
    };
    RestoredFrom { mode: operation.mode, source, epoch: report.restored_from, fallback: report.fallback.clone() }
}

fn waiting_for(report: Option<&Report>) -> String {
    let Some(report) = report else { return "its coordinator starts".to_owned() };
    let what = match report.phase {
        ReportPhase::Waiting => "its workers come",
        ReportPhase::Restoring => "its state comes",
        _ => "its first checkpoint is taken",
    };
    match &report.failure {
        Some(failure) => format!("{what}; the last failure: {}", failure.cause),
        None => what.to_owned(),
    }
}

fn worst(of: &[&PodsSeen]) -> Option<(TroubleKind, String)> {
    let troubles = of.iter().filter_map(|p| p.trouble.as_ref());
    troubles.max_by_key(|t| t.kind).map(|t| (t.kind, t.message.clone()))
}

fn reason_of(kind: TroubleKind) -> &'static str {
    match kind {
        TroubleKind::Unschedulable => "Unschedulable",
        TroubleKind::Crash => "CrashLoop",
        TroubleKind::Image => "ImageNotPulled",
        TroubleKind::Config => "ConfigError",
        TroubleKind::BadInput => "BadInput",
    }
}

/// How long a trouble is looked at before it counts, milliseconds.
fn trouble_patience(kind: TroubleKind, seen: &Seen) -> u64 {
    match kind {
        // A node may come, or room on one.
        TroubleKind::Unschedulable => timeout_ms(seen),
        TroubleKind::Crash | TroubleKind::Image | TroubleKind::Config => TROUBLE_PATIENCE_MS.min(timeout_ms(seen)),
        TroubleKind::BadInput => 0,
    }
}

fn timeout_ms(seen: &Seen) -> u64 {
    u64::try_from(seen.job.spec.upgrade.timeout.get().as_millis()).unwrap_or(u64::MAX)
}

fn after(since: Timestamp, millis: u64) -> Timestamp {
    Timestamp::from_millis(since.millis().saturating_add(i64::try_from(millis).unwrap_or(i64::MAX)))
}
