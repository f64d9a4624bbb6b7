//! How far the operation that is under way has come: its next step, or its end.

use std::time::Duration;

use floodmark_crds::{
    DesiredState, Operation, OperationKind, Refused, Report, ReportPhase, RestoredFrom, RunStatus, Step, UpgradeMode,
};

use super::{
    ASK_AGAIN, Asked, Next, Question, Reply, RunSeen, Seen, TroubleKind,
    begin::{LATEST, NONE, parallelism_revision, savepoint_name},
};

/// Savepoints that are tried before an upgrade is given up.
const SAVEPOINTS_MAX: u32 = 3;
/// Attempts of a new revision that fail without a checkpoint before it is rolled back.
const FAILED_ATTEMPTS_MAX: u64 = 3;
/// How long a pod may have a trouble that often goes by itself: a registry that is slow, a Secret that comes later.
const TROUBLE_PATIENCE: Duration = Duration::from_secs(20);
/// How long a pod may say that its storage can't be used, if nobody who has led says so: on a node that was cut off for a while the
/// next start tells.
const STORAGE_PATIENCE: Duration = Duration::from_secs(5);
/// What is told of a check before anything has come of it.
const CHECKED: &str = "it is checked whether it fits";
/// How long coordinators of a run that may not lead any more are waited for: on a lost node they never go, and the log fences them.
const LEAVE_PATIENCE: Duration = Duration::from_secs(20);

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
        let timeout = seen.timeout();
        if seen.in_step(&operation) < timeout {
            self.wake_at(operation.since.plus(timeout));
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
        let order = question_of(operation).filter(|q| !matches!(q, Question::Fits { .. }));
        order.is_some_and(|q| matches!(seen.answers.get(&q), Some(Asked::UnderWay)))
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
        let Some(question) = fits_question(&operation) else { return self.step(operation, Step::Stopping, seen) };
        match seen.ask(question, &mut self.wake) {
            Reply::Yes if operation.from.is_some() => self.step(operation, Step::Preparing, seen),
            Reply::Yes => self.launch_to(operation, seen),
            Reply::No(why) if operation.to.as_ref().is_some_and(|to| to.revision != seen.revision) => {
                // There is nothing else to go back to. To forget that the spec's was refused would be to try both in turn.
                let refused = self.status.refused.as_ref().map_or_else(String::new, |r| format!("{}; ", r.message));
                let message = format!("{refused}what ran before does not fit either: {why}");
                self.wait(Operation { failures: 1, ..operation }, message, seen);
            }
            Reply::No(why) => self.give_up(&operation, "DoesNotFit", why, seen),
            Reply::Wait(why) => self.not_known(operation, &why, seen),
            Reply::Ask(_) | Reply::UnderWay => self.wait_for_answer(operation, CHECKED, seen),
        }
    }

    /// Waits for an answer that nobody has. The first time people are told, then the status says the latest.
    fn not_known(&mut self, operation: Operation, why: &str, seen: &Seen) {
        let message = format!("since {} it is not known whether it fits: {why}", operation.since);
        if operation.message.is_empty() || operation.message == CHECKED {
            self.warn("NotChecked", format!("{message}; it is asked again, slower and slower"));
        }
        self.wait(operation, message, seen);
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
        let Some(Troubled { kind, message, patience }) = run.and_then(|run| troubled(run, None, seen)) else {
            if in_step >= seen.timeout() {
                let message = format!("its pods were not ready within {}", seen.job.spec.upgrade.timeout);
                return self.give_up(&operation, "PodsNotReady", message, seen);
            }
            return self.wait(operation, "its pods start", seen);
        };
        if in_step >= patience {
            return self.give_up(&operation, reason_of(kind), message, seen);
        }
        self.wake_at(operation.since.plus(patience));
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
            if left || report.is_some_and(Report::ended) || in_step >= LEAVE_PATIENCE {
                return self.stopped(operation, seen);
            }
            self.wake_at(operation.since.plus(LEAVE_PATIENCE));
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
        let late = seen.in_step(&operation) >= seen.timeout();
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
            Some(Asked::Answered(_, at)) => at.plus(ASK_AGAIN),
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

    /// Ends an operation whose savepoint can't be made: the old run stays, however it is. A stop has nothing to go back to, and is
    /// tried for as long as the spec wants it.
    fn no_savepoint(&mut self, operation: Operation, why: String, seen: &Seen) {
        let left = operation.from.as_ref().map_or(ReportPhase::Waiting, |from| seen.phase_of(from.number));
        let left = match left {
            ReportPhase::Running | ReportPhase::Stopping => "The job goes on as it was",
            ReportPhase::Waiting | ReportPhase::Restoring => "The job is left as it was, and does not run for now",
            ReportPhase::Failed | ReportPhase::Stopped | ReportPhase::Finished => {
                "The job is left as it was, and does not run"
            }
        };
        let instead = match &operation.from {
            Some(from) if seen.takes_no_checkpoints(from) => {
                "it takes no checkpoints: to start without its state, set spec.upgrade.mode to Stateless"
            }
            _ => "to go on from its newest checkpoint instead, set spec.upgrade.mode to LastCheckpoint",
        };
        let message = format!("there is no savepoint: {why}. {left}; {instead}");
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
        let disabled = seen.takes_no_checkpoints(&to);
        let stable = report.is_some_and(|r| match r.phase {
            ReportPhase::Finished | ReportPhase::Stopped => true,
            ReportPhase::Running => r.completed > 0 || disabled,
            _ => false,
        });
        if stable {
            return self.stable(&operation, to, seen);
        }
        let in_step = seen.in_step(&operation);
        let late = in_step >= seen.timeout();
        let pods = seen.runs.get(&to.number).and_then(|run| troubled(run, report, seen));
        let failure = report.and_then(|r| r.failure.as_ref()).map(|f| f.cause.clone());
        let failed = report
            .is_some_and(|r| r.phase == ReportPhase::Failed || r.restarts >= FAILED_ATTEMPTS_MAX && r.completed == 0);
        let verdict = match (&pods, failure) {
            (_, Some(cause)) if failed => Some(("Failed", cause)),
            (_, None) if failed => Some(("Failed", "the job has failed".to_owned())),
            (Some(pods), _) if in_step >= pods.patience => Some((reason_of(pods.kind), pods.message.clone())),
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
                if let Some(pods) = &pods {
                    self.wake_at(operation.since.plus(pods.patience));
                }
                let message = pods.map_or_else(|| waiting_for(report), |pods| pods.message);
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
                seen.now.since(operation.started_at).as_millis()
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
        let late = seen.in_step(&operation) >= seen.timeout();
        let running = seen.phase_of(to.number) == ReportPhase::Running;
        if operation.step < Step::Starting {
            let workers = seen.runs.get(&to.number).map_or(0, |r| r.workers.ready);
            if workers >= seen.job.spec.worker.pods(to.parallelism) && running {
                return self.step(operation, Step::Starting, seen);
            }
            let trouble = seen.runs.get(&to.number).and_then(|r| r.workers.trouble.as_ref());
            let message = trouble.map_or_else(|| "its pods start".to_owned(), |trouble| trouble.message.clone());
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

/// What an operation has to know or have done in its present step.
pub(super) fn question_of(operation: &Operation) -> Option<Question> {
    match (operation.kind, operation.step) {
        (OperationKind::Rescale, Step::Starting) => rescale_question(operation),
        (_, Step::Checking) => fits_question(operation),
        (_, Step::Stopping) => stop_question(operation),
        _ => None,
    }
}

/// What tells whether the new run of an operation can start.
fn fits_question(operation: &Operation) -> Option<Question> {
    let to = operation.to.as_ref()?;
    Some(Question::Fits { revision: to.revision.clone(), restore: to.restore.clone() })
}

/// What stops the old run of an operation.
fn stop_question(operation: &Operation) -> Option<Question> {
    let (run, name) = (operation.from.as_ref()?.number, operation.savepoint.clone()?);
    Some(Question::StopWithSavepoint { run, name })
}

/// What rescales the run of an operation.
fn rescale_question(operation: &Operation) -> Option<Question> {
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

/// Why a run that may lead will not come to run whoever waits for it: its pods say so themselves.
pub(super) fn hopeless(operation: &Operation, seen: &Seen) -> Option<(&'static str, String)> {
    let to = operation.to.as_ref().filter(|_| operation.step == Step::Starting)?;
    let Troubled { kind, message, patience } = troubled(seen.runs.get(&to.number)?, seen.report_of(to.number), seen)?;
    let permanent = matches!(kind, TroubleKind::Storage | TroubleKind::BadInput) && patience < seen.timeout();
    (permanent && seen.in_step(operation) >= patience).then(|| (reason_of(kind), message))
}

/// The worst trouble of a run's pods, and how long it is looked at before it counts.
struct Troubled {
    kind: TroubleKind,
    message: String,
    patience: Duration,
}

/// `report` is what the run's leader has told, if it may lead.
fn troubled(run: &RunSeen, report: Option<&Report>, seen: &Seen) -> Option<Troubled> {
    // Whoever has led has said why it ended, and that it may go by itself: else it would have said that the run has failed.
    let may_pass = report.is_some_and(|r| r.failure.is_some() && !r.ended());
    let troubles = [(&run.coordinators, may_pass), (&run.workers, false)].into_iter();
    let troubles = troubles.filter_map(|(pods, may_pass)| Some((pods.trouble.as_ref()?, may_pass)));
    let (trouble, may_pass) = troubles.max_by_key(|(trouble, _)| trouble.kind)?;
    let patience = match trouble.kind {
        // A node may come, or room on one.
        TroubleKind::Unschedulable => seen.timeout(),
        TroubleKind::Ended | TroubleKind::Storage if may_pass => seen.timeout(),
        TroubleKind::Ended | TroubleKind::Crash | TroubleKind::Image | TroubleKind::Config => TROUBLE_PATIENCE,
        TroubleKind::Storage => STORAGE_PATIENCE,
        TroubleKind::BadInput => Duration::ZERO,
    };
    let patience = patience.min(seen.timeout());
    Some(Troubled { kind: trouble.kind, message: trouble.message.clone(), patience })
}

fn reason_of(kind: TroubleKind) -> &'static str {
    match kind {
        TroubleKind::Unschedulable => "Unschedulable",
        TroubleKind::Ended | TroubleKind::Crash => "CrashLoop",
        TroubleKind::Image => "ImageNotPulled",
        TroubleKind::Config => "ConfigError",
        TroubleKind::Storage => "StorageUnusable",
        TroubleKind::BadInput => "BadInput",
    }
}
