//! A cluster, a storage and a job's processes, as far as the machine can tell them from real ones; with faults.

use std::collections::BTreeMap;

use floodmark_crds::{
    CheckpointMode, CheckpointReport, ConditionStatus, FailureReport, Report, ReportPhase, RunStatus, StreamJob,
    StreamJobSpec, StreamJobStatus, Timestamp,
};

use super::super::*;
use crate::{objects::PodCounts, revision};

/// From one tick to the next.
const TICK_MS: i64 = 700;
/// How long a run's certificates are shown.
pub(super) const RENEWED_EVERY_MS: i64 = 300_000;
/// Ticks until a job with nothing going wrong any more has to be at rest.
pub(super) const PATIENCE: u32 = 2_000;

/// Numbers that only look random.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }

    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The objects of a run, and its pods.
#[derive(Clone, Debug)]
struct Run {
    status: RunStatus,
    /// What its revision is like: the first word of its SQL.
    kind: String,
    workers_wanted: u32,
    workers_ready: u32,
    coordinators_wanted: u32,
    coordinators: u32,
    leaving: bool,
    /// What the job was last asked to go on at.
    chosen: u32,
    /// Its coordinator has ended because of the storage.
    broken: bool,
    renew_at: Option<i64>,
}

/// See the header of this file.
pub(super) struct World {
    pub(super) job: StreamJob,
    pub(super) gone: bool,
    lease: Option<(u64, Option<Report>)>,
    /// The run whose coordinator holds the lease.
    pub(super) holder: Option<u64>,
    runs: BTreeMap<u64, Run>,
    /// The name of the spec's.
    revision: String,
    /// Every revision that there was.
    revisions: BTreeMap<String, StreamJobSpec>,
    /// In the controller's memory.
    answers: BTreeMap<Question, Asked>,
    job_intact_for: Option<(u64, String)>,
    pub(super) epoch: u64,
    savepoints: Vec<String>,
    pub(super) state_deleted: bool,
    pub(super) random: Random,
    /// One in so many things goes wrong; 0: none.
    pub(super) faults: u64,
    /// The storage answers nobody: whoever leads ends, and says so.
    pub(super) outage: bool,
    /// The storage does not answer the controller.
    pub(super) hidden: bool,
    /// How often certificates were renewed.
    pub(super) renewed: u64,
    /// What was asked, and when.
    pub(super) asked: Vec<(i64, Question)>,
    /// When the last pass wanted to look again.
    pub(super) wake: Option<Timestamp>,
    pub(super) now: i64,
    pub(super) trace: Vec<String>,
    /// Statuses written, and things done.
    pub(super) writes: u64,
    done: u64,
    /// What has started from what: run, words, epoch.
    pub(super) starts: Vec<(u64, String, u64)>,
}

impl World {
    pub(super) fn new(seed: u64, sql: &str) -> Self {
        let mut job: StreamJob = serde_json::from_value(serde_json::json!({
            "apiVersion": "floodmark.io/v1alpha1", "kind": "StreamJob",
            "metadata": {"name": "hot", "namespace": "shop", "uid": "u", "generation": 1},
            "spec": {"sql": sql, "parallelism": 2},
        }))
        .unwrap();
        job.metadata.generation = Some(1);
        let mut world = Self {
            job,
            gone: false,
            lease: None,
            holder: None,
            runs: BTreeMap::new(),
            revision: String::new(),
            revisions: BTreeMap::new(),
            answers: BTreeMap::new(),
            job_intact_for: None,
            epoch: 0,
            savepoints: Vec::new(),
            state_deleted: false,
            random: Random::new(seed),
            faults: 0,
            outage: false,
            hidden: false,
            renewed: 0,
            asked: Vec::new(),
            wake: None,
            now: 1_795_000_000_000,
            trace: Vec::new(),
            writes: 0,
            done: 0,
            starts: Vec::new(),
        };
        world.learn();
        world
    }

    fn learn(&mut self) {
        self.revision = revision::name(&self.job.spec);
        self.revisions.insert(self.revision.clone(), self.job.spec.clone());
    }

    /// Somebody changes the spec.
    pub(super) fn edit(&mut self, change: impl FnOnce(&mut StreamJobSpec)) {
        let before = self.job.spec.clone();
        change(&mut self.job.spec);
        if before != self.job.spec {
            self.job.metadata.generation = self.job.metadata.generation.map(|g| g + 1);
            self.learn();
            let spec = &self.job.spec;
            let line =
                format!("EDIT {:?} p{} {:?} {:?}", spec.sql, spec.parallelism, spec.desired_state, spec.upgrade.mode);
            self.trace.push(line);
        }
    }

    pub(super) fn delete(&mut self) {
        let at = k8s_openapi::jiff::Timestamp::from_millisecond(self.now).unwrap();
        self.job.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at));
        self.gone = self.job.finalizers().is_empty();
        self.trace.push("DELETE".to_owned());
    }

    pub(super) fn lose_status(&mut self) {
        self.job.status = None;
        self.trace.push("LOSE STATUS".to_owned());
    }

    pub(super) fn lose_lease(&mut self) {
        self.lease = None;
        self.trace.push("LOSE LEASE".to_owned());
    }

    /// The process of whoever leads dies; its pod comes back.
    pub(super) fn kill_leader(&mut self) {
        self.holder = None;
        self.trace.push("KILL LEADER".to_owned());
    }

    /// The job fails for good.
    pub(super) fn fail(&mut self) {
        if let Some((_, Some(report))) = &mut self.lease {
            report.phase = ReportPhase::Failed;
            report.failure = Some(FailureReport { cause: "bad value".to_owned(), at_ms: self.now });
        }
        self.holder = None;
        self.trace.push("FAIL".to_owned());
    }

    /// Somebody stops the job itself.
    pub(super) fn stop(&mut self) {
        if let Some((_, Some(report))) = &mut self.lease {
            report.phase = ReportPhase::Stopped;
        }
        self.holder = None;
        self.trace.push("STOP".to_owned());
    }

    /// The controller's process dies, and with it what it remembers.
    pub(super) fn kill_controller(&mut self) {
        self.answers.clear();
        self.trace.push("KILL CONTROLLER".to_owned());
    }

    /// Whether an answer is still to come.
    pub(super) fn is_asking(&self) -> bool {
        self.answers.values().any(|asked| *asked == Asked::UnderWay)
    }

    pub(super) fn status(&self) -> StreamJobStatus {
        self.job.status.clone().unwrap_or_default()
    }

    pub(super) fn is(&self, condition: &str) -> bool {
        let status = self.status();
        status.observed_generation == self.job.metadata.generation.unwrap()
            && status.condition(condition).is_some_and(|c| c.status == ConditionStatus::True)
    }

    pub(super) fn report(&self) -> Option<&Report> {
        self.lease.as_ref().and_then(|(_, report)| report.as_ref())
    }

    /// The SQL of whoever leads and processes rows.
    pub(super) fn leads(&self) -> Option<&str> {
        let run = self.runs.get(&self.holder?)?;
        let running = self.report().is_some_and(|r| r.phase == ReportPhase::Running);
        running.then(|| self.revisions[&run.status.revision].sql.as_str())
    }

    pub(super) fn run_numbers(&self) -> Vec<u64> {
        self.runs.keys().copied().collect()
    }

    fn seen(&self) -> Seen {
        let runs = self.runs.iter().map(|(&number, run)| {
            let trouble = |kind| Some(Trouble { kind, message: format!("pod of run {number}: {kind:?}") });
            let troubled = match run.kind.as_str() {
                "noimage" => trouble(TroubleKind::Image),
                "badinput" => trouble(TroubleKind::BadInput),
                "nobucket" => trouble(TroubleKind::Storage),
                _ => None,
            };
            let ended = trouble(TroubleKind::Storage).filter(|_| run.broken && run.coordinators == 0);
            let pods = |count, ready, trouble: &Option<Trouble>| PodsSeen { count, ready, trouble: trouble.clone() };
            let seen = RunSeen {
                complete: !run.leaving,
                leaving: run.leaving,
                revision: run.status.revision.clone(),
                parallelism: run.status.parallelism,
                restore: run.status.restore.clone(),
                counts: Some(self.counts(&run.status)),
                checkpoints: Some(self.mode_of(&run.status)),
                renew_at: run.renew_at.map(Timestamp::from_millis),
                workers_wanted: run.workers_wanted,
                coordinators_wanted: run.coordinators_wanted,
                workers: pods(run.workers_wanted, run.workers_ready, &troubled),
                coordinators: pods(run.coordinators, run.coordinators, &ended.or(troubled.clone())),
            };
            (number, seen)
        });
        let service = self.status().run.map_or(0, |r| r.number);
        let revision = self.revision.clone();
        Seen {
            job: self.job.clone(),
            restore_from: self.job.spec.restore.from.clone(),
            job_intact: self.job_intact_for == Some((service, revision.clone())),
            revision,
            lease: self.lease.as_ref().map(|(run, report)| LeaseSeen { run: *run, report: report.clone() }),
            runs: runs.collect(),
            answers: self.answers.clone(),
            now: Timestamp::from_millis(self.now),
        }
    }

    /// What the revision of a run asks for.
    fn counts(&self, run: &RunStatus) -> PodCounts {
        PodCounts::of(&self.revisions[&run.revision])
    }

    fn mode_of(&self, run: &RunStatus) -> CheckpointMode {
        self.revisions[&run.revision].checkpoints.mode
    }

    fn takes_checkpoints(&self, run: u64) -> bool {
        self.mode_of(&self.runs[&run].status) != CheckpointMode::Disabled
    }

    /// Pods that are asked for of a run: coordinators and workers.
    pub(super) fn pods_of(&self, run: u64) -> (u32, u32) {
        let run = &self.runs[&run];
        (run.coordinators_wanted, run.workers_wanted)
    }

    fn fault(&mut self) -> bool {
        self.faults > 0 && self.random.one_in(self.faults)
    }

    /// One pass of the controller. Answers whether it found anything to do.
    pub(super) fn pass(&mut self) -> bool {
        if self.gone {
            return false;
        }
        let seen = self.seen();
        let needed = awaited(&self.status());
        let deleted = self.job.metadata.deletion_timestamp.is_some();
        self.answers.retain(|q, _| Some(q) == needed.as_ref() || deleted && *q == Question::DeleteState);
        let seen = Seen { answers: self.answers.clone(), ..seen };
        let plan = decide(&seen);
        let again = decide(&seen);
        assert_eq!(plan, again, "decisions are pure");
        self.wake = plan.wake;
        for line in plan.to_string().lines() {
            self.trace.push(format!("  {line}"));
        }
        if let Some(status) = plan.status {
            assert!(plan.actions.is_empty(), "nothing is done before the status is written");
            if self.fault() {
                // A conflict.
                return true;
            }
            self.check(&status);
            self.writes += 1;
            self.job.status = Some(*status);
            if self.fault() {
                self.kill_controller();
            }
            return true;
        }
        let busy = !plan.actions.is_empty();
        for action in plan.actions {
            if self.fault() {
                self.kill_controller();
                break;
            }
            self.carry_out(action);
            if self.fault() {
                self.kill_controller();
                break;
            }
        }
        busy
    }

    /// What must hold of each status that is written.
    fn check(&self, status: &StreamJobStatus) {
        let ready = status.condition("Ready").is_some_and(|c| c.status == ConditionStatus::True);
        let stalled = status.condition("Stalled").is_some_and(|c| c.status == ConditionStatus::True);
        let reconciling = status.condition("Reconciling").is_some_and(|c| c.status == ConditionStatus::True);
        assert_eq!([ready, stalled, reconciling].iter().filter(|b| **b).count(), 1, "{:?}", status.conditions);
        let running = self.job.spec.desired_state == floodmark_crds::DesiredState::Running;
        if let Some(run) = status.run.as_ref().filter(|_| ready && running) {
            assert_eq!(status.operation, None);
            assert_eq!(run.revision, self.revision);
            let report = self.report().unwrap();
            assert_eq!(report.run, run.number);
            assert_eq!((report.phase, report.parallelism), (ReportPhase::Running, self.job.spec.parallelism));
        }
        let numbers = [status.run.as_ref(), status.operation.as_ref().and_then(|o| o.to.as_ref())];
        for run in numbers.into_iter().flatten() {
            assert!(run.number <= status.last_run, "{status:?}");
        }
    }

    fn carry_out(&mut self, action: Action) {
        self.writes += 1;
        self.done += 1;
        match action {
            Action::AddFinalizer => self.job.metadata.finalizers = Some(vec![FINALIZER.to_owned()]),
            Action::RemoveFinalizer => {
                self.job.metadata.finalizers = None;
                self.gone = true;
            }
            Action::ApplyJob { run } => {
                self.job_intact_for = Some((run.unwrap_or(0), self.revision.clone()));
                self.lease.get_or_insert((0, None));
            }
            Action::ApplyRun { run, workers } => {
                let kind = self.revisions[&run.revision].sql.split(' ').next().unwrap().to_owned();
                let counts = self.counts(&run);
                let workers = workers.unwrap_or_else(|| counts.workers(run.parallelism));
                let made = Run {
                    kind,
                    workers_wanted: workers,
                    workers_ready: 0,
                    coordinators_wanted: counts.coordinators(),
                    coordinators: 0,
                    leaving: false,
                    chosen: run.parallelism,
                    broken: false,
                    renew_at: Some(self.now + RENEWED_EVERY_MS),
                    status: run.clone(),
                };
                let there = self.runs.entry(run.number).or_insert(made);
                assert!(!there.leaving, "what leaves is not made again before it is gone");
                there.workers_wanted = workers;
            }
            Action::ScaleWorkers { run, pods } => {
                if let Some(run) = self.runs.get(&run) {
                    let counts = self.counts(&run.status);
                    assert!(pods == 0 || (1..10).any(|p| counts.workers(p) == pods), "{pods} of {counts:?}");
                }
                if let Some(run) = self.runs.get_mut(&run) {
                    run.workers_wanted = pods;
                    run.workers_ready = run.workers_ready.min(pods);
                }
            }
            Action::ScaleCoordinators { run, pods } => {
                if let Some(run) = self.runs.get(&run) {
                    let counts = self.counts(&run.status);
                    assert!(pods == 0 || pods == counts.coordinators(), "{pods} of {counts:?}");
                }
                if let Some(run) = self.runs.get_mut(&run) {
                    run.coordinators_wanted = pods;
                }
            }
            Action::RenewCertificates { run } => {
                let run = self.runs.get_mut(&run).unwrap();
                assert!(!run.leaving && run.renew_at.is_some_and(|at| self.now >= at));
                run.renew_at = Some(self.now + RENEWED_EVERY_MS);
                self.renewed += 1;
            }
            Action::RemoveRun { run } => {
                if let Some(run) = self.runs.get_mut(&run) {
                    run.leaving = true;
                }
            }
            Action::Allow { run } => match &mut self.lease {
                Some((allowed, _)) => *allowed = run,
                none => *none = Some((run, None)),
            },
            Action::Ask(question) => {
                self.asked.push((self.now, question.clone()));
                self.answers.insert(question, Asked::UnderWay);
            }
        }
    }

    /// Time passes: pods come and go, the job works, questions are answered.
    pub(super) fn tick(&mut self) {
        self.now += TICK_MS;
        let Self { runs, holder, random, .. } = self;
        runs.retain(|number, run| {
            let goes = run.leaving && random.one_in(2);
            if goes && *holder == Some(*number) {
                *holder = None;
            }
            !goes
        });
        for (number, run) in runs.iter_mut() {
            let starts = !["noimage", "badinput", "nobucket"].contains(&run.kind.as_str());
            if starts && random.one_in(2) {
                run.workers_ready = run.workers_wanted;
            }
            if random.one_in(2) {
                run.coordinators = if starts { run.coordinators_wanted } else { 0 };
            }
            if run.coordinators == 0 && *holder == Some(*number) {
                *holder = None;
            }
        }
        self.work();
        let questions: Vec<_> = self.answers.keys().cloned().collect();
        for question in questions {
            if self.answers[&question] == Asked::UnderWay && self.random.one_in(2) {
                let answer = self.answer(&question);
                self.answers.insert(question, Asked::Answered(answer, Timestamp::from_millis(self.now)));
            }
        }
    }

    /// The job's processes.
    fn work(&mut self) {
        let Some((allowed, report)) = &mut self.lease else {
            return;
        };
        if self.holder.is_none() {
            let ended = report.as_ref().is_some_and(|r| r.run == *allowed && r.ended());
            let can = self.runs.get(allowed).filter(|r| r.coordinators > 0 && !r.leaving);
            if let Some(run) = can
                && !ended
            {
                self.holder = Some(*allowed);
                let words = run.status.restore.clone();
                let again = self.starts.iter().any(|(number, ..)| number == allowed);
                if !again {
                    self.starts.push((*allowed, words, self.epoch));
                }
                // How the run has failed before is told until it fails again.
                let failure = report.take().filter(|r| r.run == *allowed).and_then(|r| r.failure);
                *report = Some(Report {
                    run: *allowed,
                    failure,
                    phase: ReportPhase::Waiting,
                    parallelism: run.chosen,
                    restarts: 0,
                    ..Report::default()
                });
            }
            return;
        }
        let (Some(holder), Some(report)) = (self.holder, report.as_mut()) else {
            // The lease was lost and made anew: the leader writes its report again.
            if let Some(number) = self.holder
                && let Some(run) = self.runs.get(&number)
            {
                let (run, parallelism) = (number, run.chosen);
                *report = Some(Report { run, parallelism, phase: ReportPhase::Running, ..Report::default() });
            }
            return;
        };
        let Some(run) = self.runs.get_mut(&holder) else { return };
        if self.outage {
            report.phase = ReportPhase::Waiting;
            report.failure = Some(FailureReport { cause: "no answer".to_owned(), at_ms: self.now });
            (run.coordinators, run.broken) = (0, true);
            self.holder = None;
            return;
        }
        match report.phase {
            ReportPhase::Waiting if run.workers_ready > 0 => report.phase = ReportPhase::Restoring,
            ReportPhase::Restoring if run.kind == "crash" => {
                report.restarts += 1;
                report.phase = ReportPhase::Waiting;
                report.failure = Some(FailureReport { cause: "overflow".to_owned(), at_ms: self.now });
            }
            ReportPhase::Restoring if run.kind == "fatal" => {
                report.phase = ReportPhase::Failed;
                report.failure = Some(FailureReport { cause: "bad value".to_owned(), at_ms: self.now });
            }
            ReportPhase::Restoring => report.phase = ReportPhase::Running,
            // Without checkpoints.
            ReportPhase::Running
                if self.revisions[&run.status.revision].checkpoints.mode == CheckpointMode::Disabled => {}
            ReportPhase::Running if self.random.one_in(4) => {
                self.epoch += 1;
                report.completed += 1;
                let last =
                    CheckpointReport { epoch: self.epoch, triggered_at_ms: self.now, duration_ms: 10, size: 100 };
                report.last_checkpoint = Some(last);
            }
            _ => {}
        }
    }

    fn answer(&mut self, question: &Question) -> Answer {
        if self.fault() {
            return Answer::Unknown("nobody answers".to_owned());
        }
        let leads = |world: &Self, run: u64| {
            world.holder == Some(run) && world.report().is_some_and(|r| r.run == run && r.phase == ReportPhase::Running)
        };
        match question {
            Question::Fits { .. } if self.hidden => Answer::Unknown("no answer".to_owned()),
            Question::Fits { revision, .. } => {
                let sql = &self.revisions[revision].sql;
                match sql.split(' ').next().unwrap() {
                    "unfit" if self.epoch > 0 => Answer::No("the key of the aggregate has changed".to_owned()),
                    "badsql" => Answer::No("line 1, column 1: expected SELECT".to_owned()),
                    _ => Answer::Yes,
                }
            }
            Question::StopWithSavepoint { run, name } => {
                if !leads(self, *run) {
                    return Answer::Unknown("the job does not run".to_owned());
                }
                if !self.takes_checkpoints(*run) {
                    return Answer::No("the job takes no snapshots".to_owned());
                }
                if self.savepoints.contains(name) {
                    return Answer::No("there is a savepoint of this name".to_owned());
                }
                if self.fault() {
                    return Answer::No("the storage does not answer".to_owned());
                }
                self.epoch += 1;
                self.savepoints.push(name.clone());
                if let Some((_, Some(report))) = &mut self.lease {
                    report.phase = ReportPhase::Stopped;
                }
                self.holder = None;
                if self.fault() { Answer::Unknown("the reply is lost".to_owned()) } else { Answer::Yes }
            }
            Question::Rescale { run, parallelism } => {
                if !leads(self, *run) {
                    return Answer::Unknown("the job does not run".to_owned());
                }
                if !self.takes_checkpoints(*run) {
                    return Answer::No("the job takes no snapshots".to_owned());
                }
                if let Some((_, Some(report))) = &mut self.lease {
                    report.parallelism = *parallelism;
                }
                // It is in the manifests of its checkpoints.
                if let Some(run) = self.runs.get_mut(run) {
                    run.chosen = *parallelism;
                }
                if self.fault() { Answer::Unknown("the reply is lost".to_owned()) } else { Answer::Yes }
            }
            Question::DeleteState => {
                self.state_deleted = true;
                Answer::Yes
            }
        }
    }

    /// Lets time pass until nothing is left to do. Panics if that takes too long.
    pub(super) fn settle(&mut self) {
        let mut quiet = 0;
        for _ in 0..PATIENCE {
            let (before, done) = (self.status(), self.done);
            for _ in 0..20 {
                if !self.pass() {
                    break;
                }
            }
            self.tick();
            let mut after = self.status();
            // A checkpoint is told now and then for as long as the job runs.
            after.last_checkpoint.clone_from(&before.last_checkpoint);
            quiet = if before == after && self.done == done { quiet + 1 } else { 0 };
            let settled = self.gone || self.is("Ready") || self.is("Stalled");
            if quiet > 60 && settled {
                return;
            }
        }
        panic!("it does not come to rest: {:#?}\n{}", self.status(), self.tail());
    }

    pub(super) fn tail(&self) -> String {
        let mut trace = self.trace.clone();
        // What is asked over and over is of no interest.
        trace.dedup();
        let from = trace.len().saturating_sub(if std::env::var_os("LIFE").is_some() { 10_000 } else { 60 });
        trace[from..].join("\n")
    }
}
