//! What the spec wants of a job with nothing under way: the next operation, or none.

use floodmark_crds::{
    CheckpointMode, DesiredState, Operation, OperationKind, Report, ReportPhase, RunStatus, Step, UpgradeMode,
};

use super::{Next, Seen};

/// The words by which a run goes on from the newest checkpoint of the job's log. Behind a stop with a savepoint that is the one
/// which the savepoint is a copy of; and whatever happens meanwhile, it is never older than what the sinks have made visible.
pub(super) const LATEST: &str = "latest";
/// The words by which a run begins with nothing.
pub(super) const NONE: &str = "none";

impl Next {
    /// Begins the operation that the spec asks for, if it asks for any.
    pub(super) fn begin(&mut self, seen: &Seen) {
        let spec = &seen.job.spec;
        let running = spec.desired_state == DesiredState::Running;
        let Some(mut run) = self.status.run.clone() else {
            if running {
                self.start(seen);
            }
            return;
        };
        if !run.stable && seen.report_of(run.number).is_some_and(|r| r.completed > 0) {
            run.stable = true;
            self.status.run = Some(run.clone());
            self.status.stable_run = Some(run.clone());
        }
        if !running {
            return self.suspend(seen, run);
        }
        let phase = seen.phase_of(run.number);
        let restore_again = spec.restore.nonce.is_some() && spec.restore.nonce != self.status.restore_nonce;
        let restart_again = spec.restart_nonce.is_some() && spec.restart_nonce != self.status.restart_nonce;
        let other_revision = run.revision != seen.revision;
        if !other_revision {
            // What was refused is not wanted any more; a parallelism may still be.
            self.status.refused.take_if(|r| r.revision != parallelism_revision(spec.parallelism));
        }
        if restore_again && let Some(from) = &seen.restore_from {
            self.replace(seen, run, OperationKind::Restore, UpgradeMode::LastCheckpoint, from.clone());
        } else if other_revision && (restart_again || !self.is_refused(seen, &seen.revision)) {
            self.upgrade(seen, run, OperationKind::Upgrade);
        } else if restart_again {
            self.upgrade(seen, run, OperationKind::Restart);
        } else if phase == ReportPhase::Stopped {
            // Somebody has stopped it, who was not the spec; or what was to take its place was refused by then.
            let revision = if other_revision { run.revision.clone() } else { seen.revision.clone() };
            self.replace(seen, run, OperationKind::Resume, UpgradeMode::LastCheckpoint, LATEST.to_owned());
            if let Some(to) = self.status.operation.as_mut().and_then(|o| o.to.as_mut()) {
                to.revision = revision;
            }
        } else if !run.stable && !seen.report_of(run.number).is_some_and(Report::ended) {
            // It is watched until it has shown that it works.
            let watched = operation(seen, OperationKind::Resume, UpgradeMode::LastCheckpoint, Step::Starting);
            self.status.operation = Some(Operation { from: Some(run.clone()), to: Some(run), ..watched });
        } else {
            self.rescale(seen, run, phase);
        }
    }

    pub(super) fn is_refused(&self, seen: &Seen, revision: &str) -> bool {
        let refused = self.status.refused.as_ref();
        refused.is_some_and(|r| r.revision == revision && r.mode == seen.job.spec.upgrade.mode)
    }

    /// Starts a job of which nothing runs.
    fn start(&mut self, seen: &Seen) {
        let spec = &seen.job.spec;
        let restart_again = spec.restart_nonce != self.status.restart_nonce;
        if self.is_refused(seen, &seen.revision) && !restart_again {
            return;
        }
        let restore_again = spec.restore.nonce.is_some() && spec.restore.nonce != self.status.restore_nonce;
        let kind = if self.status.last_run > 0 { OperationKind::Resume } else { OperationKind::Deploy };
        let restore = match (&seen.restore_from, restore_again && kind == OperationKind::Resume) {
            (Some(from), true) => from.clone(),
            _ => LATEST.to_owned(),
        };
        let mode = if spec.checkpoints.mode == CheckpointMode::Disabled {
            UpgradeMode::Stateless
        } else {
            UpgradeMode::LastCheckpoint
        };
        self.launch(seen, None, kind, mode, restore, None);
    }

    /// Another revision, or the same again.
    fn upgrade(&mut self, seen: &Seen, run: RunStatus, kind: OperationKind) {
        let spec = &seen.job.spec;
        let disabled = spec.checkpoints.mode == CheckpointMode::Disabled;
        let mode = if disabled { UpgradeMode::Stateless } else { spec.upgrade.mode };
        let ended = matches!(seen.phase_of(run.number), ReportPhase::Stopped | ReportPhase::Finished);
        match mode {
            UpgradeMode::Stateless => self.replace(seen, run, kind, mode, NONE.to_owned()),
            UpgradeMode::LastCheckpoint => self.replace(seen, run, kind, mode, LATEST.to_owned()),
            // It has ended in order, or has done nothing yet that counts.
            UpgradeMode::Savepoint if ended || !run.stable => self.replace(seen, run, kind, mode, LATEST.to_owned()),
            UpgradeMode::Savepoint => {
                let name = savepoint_name("upgrade", seen, self.status.last_run + 1);
                self.launch(seen, Some(run), kind, mode, LATEST.to_owned(), Some(name));
            }
        }
    }

    /// Another run that does not wait for a savepoint of this one.
    fn replace(&mut self, seen: &Seen, run: RunStatus, kind: OperationKind, mode: UpgradeMode, restore: String) {
        self.launch(seen, Some(run), kind, mode, restore, None);
    }

    fn launch(
        &mut self,
        seen: &Seen,
        from: Option<RunStatus>,
        kind: OperationKind,
        mode: UpgradeMode,
        restore: String,
        savepoint: Option<String>,
    ) {
        let spec = &seen.job.spec;
        let number = self.status.last_run + 1;
        let to = RunStatus {
            number,
            revision: seen.revision.clone(),
            parallelism: spec.parallelism,
            restore,
            stable: false,
        };
        self.note(reason(kind), format!("run {number} of revision {} from {}", to.revision, to.restore));
        self.status.last_run = number;
        self.status.restart_nonce = spec.restart_nonce;
        self.status.restore_nonce = spec.restore.nonce;
        let operation = Operation { savepoint, to: Some(to), from, ..operation(seen, kind, mode, Step::Checking) };
        self.status.operation = Some(operation);
    }

    fn suspend(&mut self, seen: &Seen, run: RunStatus) {
        let spec = &seen.job.spec;
        let disabled = seen.takes_no_checkpoints(&run);
        let ended = seen.report_of(run.number).is_some_and(Report::ended);
        // One that has ended has nothing to save, and one of which nothing has come neither.
        let without = spec.upgrade.mode == UpgradeMode::LastCheckpoint || disabled || ended || !run.stable;
        let mode = if without { UpgradeMode::LastCheckpoint } else { UpgradeMode::Savepoint };
        let savepoint = (!without).then(|| savepoint_name("suspend", seen, run.number));
        self.note("Suspending", format!("run {} stops", run.number));
        let operation = operation(seen, OperationKind::Suspend, mode, Step::Stopping);
        self.status.operation = Some(Operation { from: Some(run), savepoint, ..operation });
    }

    fn rescale(&mut self, seen: &Seen, mut run: RunStatus, phase: ReportPhase) {
        let parallelism = seen.job.spec.parallelism;
        if let Some(report) = seen.report_of(run.number)
            && report.parallelism > 0
            && report.parallelism != run.parallelism
            && matches!(phase, ReportPhase::Running | ReportPhase::Restoring)
        {
            // What runs is what counts: somebody has asked the job itself.
            run.parallelism = report.parallelism;
            self.status.run = Some(run.clone());
        }
        let revision = parallelism_revision(parallelism);
        let can = phase == ReportPhase::Running && run.stable && run.revision == seen.revision;
        if parallelism == run.parallelism || !can || self.is_refused(seen, &revision) {
            return;
        }
        self.note("Rescaling", format!("from parallelism {} to {parallelism}", run.parallelism));
        let to = RunStatus { parallelism, ..run.clone() };
        let mode = UpgradeMode::LastCheckpoint;
        let operation = operation(seen, OperationKind::Rescale, mode, Step::Preparing);
        self.status.operation = Some(Operation { from: Some(run), to: Some(to), ..operation });
    }
}

/// How a parallelism that could not be had is remembered.
pub(super) fn parallelism_revision(parallelism: u32) -> String {
    format!("parallelism={parallelism}")
}

pub(super) fn operation(seen: &Seen, kind: OperationKind, mode: UpgradeMode, step: Step) -> Operation {
    Operation {
        kind,
        step,
        started_at: seen.now,
        since: seen.now,
        generation: seen.generation(),
        from: None,
        to: None,
        mode,
        savepoint: None,
        failures: 0,
        message: String::new(),
    }
}

/// A name that no savepoint of the job has: runs and time only grow.
pub(super) fn savepoint_name(what: &str, seen: &Seen, run: u64) -> String {
    let digits = |c: char| if c.is_ascii_digit() { Some(c) } else { None };
    let time: String = seen.now.to_string().chars().take(19).filter_map(digits).collect();
    format!("{what}-{run}-{time}")
}

fn reason(kind: OperationKind) -> &'static str {
    match kind {
        OperationKind::Deploy => "Deploying",
        OperationKind::Upgrade => "Upgrading",
        OperationKind::Restart => "Restarting",
        OperationKind::Restore => "Restoring",
        OperationKind::Rescale => "Rescaling",
        OperationKind::Suspend => "Suspending",
        OperationKind::Resume => "Resuming",
        OperationKind::Rollback => "RollingBack",
    }
}
