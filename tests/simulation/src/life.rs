//! A job's life from its first start to its last check: starts processes, carries out the plan's actions, starts anew what
//! has failed, and judges in the end.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use floodmark_snapshot::{coordination::BarrierKind, restore::Reference};
use floodmark_worker::{
    CheckpointMode, Controls, Outcome, Progress, Requests, RescaleRequest, RunError, SavepointRequest, Summary,
    coordinate, link::tls::Role, run,
};
use tokio::sync::{oneshot, watch};

use crate::{
    Options, Report,
    crew::{Crew, Links},
    executor::{Executor, Pid, Stopped},
    jobs::{self, ELSEWHERE, STORAGE, Start},
    monitor::Notes,
    oracle,
    plan::{Action, Plan},
    process::Process,
    random::Random,
    world::{Crash, World},
};

/// Once the faults have ceased, the job must finish within this (virtual) time.
const FINISH_MAX: Duration = Duration::from_secs(600);
/// Once the job is finished, whatever process is left must end within this time.
const END_MAX: Duration = Duration::from_secs(300);
/// How often somebody goes on from what a process that died has left otherwise than by starting it again.
const ADOPTED_FROM_THE_DEAD: f64 = 0.15;
/// Processes of one life before it counts as going round in circles.
const STARTS_MAX: usize = 20_000;

type Slot = Arc<Mutex<Option<Result<Summary, RunError>>>>;

/// A process that was started and has not been heard to end.
struct Running {
    pid: Pid,
    stop: watch::Sender<bool>,
    requests: Requests,
    ended: Slot,
    /// Its workers, if they are other processes.
    crew: Option<Crew>,
}

/// Stopping savepoints that were made: by which process, and their names.
type Made = Arc<Mutex<Vec<(Pid, String)>>>;

/// See the header of this file.
pub(crate) struct Life {
    world: Arc<World>,
    executor: Executor,
    links: Links,
    /// The newest last: it is who the job counts on.
    running: Vec<Running>,
    starts: usize,
    next_start: Option<Duration>,
    /// The process that has said that the job is finished.
    finished: Option<Pid>,
    /// See [`Options::calm`].
    calm: bool,
    made: Made,
    /// Workers that will be gone.
    dismissed: Vec<Pid>,
    /// The number of the job: one that has stopped may be taken over by the next.
    job: u32,
    /// What the next process is told to start from.
    from: Start,
    /// Savepoints that were moved.
    moves: u32,
}

impl Life {
    pub(crate) fn new(plan: Plan, options: Options, crash: Option<Crash>) -> Self {
        let (seed, task_pauses) = (plan.seed, plan.faults.task_pauses);
        let world = World::new(plan, options.trace, options.mutation, crash);
        let executor = Executor::new(world.core.clone(), Random::new(seed, 4), task_pauses);
        // A job without a past begins with nothing either way. But one that is told to does so once, whatever dies.
        let first = if world.plan.seed.is_multiple_of(5) { Reference::Nothing } else { Reference::Latest };
        Self {
            links: Links::new(&world),
            world,
            executor,
            running: Vec::new(),
            starts: 0,
            next_start: Some(Duration::ZERO),
            finished: None,
            calm: options.calm,
            made: Made::default(),
            dismissed: Vec::new(),
            job: 1,
            from: Start { restore: first, initial: None },
            moves: 0,
        }
    }

    pub(crate) fn run(mut self) -> Report {
        let plan = self.world.plan.clone();
        self.world.trace.line(0, || format!("{plan}"));
        let mut actions = plan.actions.iter().copied().filter(|(at, _)| *at < plan.faults_until).peekable();
        let mut worker_actions =
            plan.worker_actions.iter().copied().filter(|(at, ..)| *at < plan.faults_until).peekable();
        let mut calm = false;
        while self.finished.is_none() && self.fine() {
            let now = self.world.core.now();
            if !calm && now >= plan.faults_until {
                calm = true;
                self.calm();
            }
            if self.next_start.is_some_and(|at| at <= now) {
                self.start();
            }
            while let Some((_, action)) = actions.next_if(|(at, _)| *at <= now) {
                if let Some(newest) = self.running.last().map(|r| r.pid) {
                    self.act(newest, action);
                }
            }
            while let Some((_, which, action)) = worker_actions.next_if(|(at, ..)| *at <= now) {
                if let Some(crew) = self.running.last().and_then(|r| r.crew.as_ref()) {
                    crew.act(which, action, &self.links);
                }
            }
            for (pid, action) in self.world.take_due() {
                self.act(pid, action);
            }
            if calm && now >= plan.faults_until + FINISH_MAX {
                self.world.violation(format!("not finished {FINISH_MAX:?} after the faults have ceased"));
                break;
            }
            let end = if calm { plan.faults_until + FINISH_MAX } else { plan.faults_until };
            let due = actions.peek().map(|(at, _)| *at).into_iter().chain(self.next_start);
            let due = due.chain(worker_actions.peek().map(|(at, ..)| *at)).min();
            self.go(due.unwrap_or(end).min(end));
            self.listen();
        }
        if self.finished.is_some() && self.fine() {
            self.outlive();
            self.judge();
        }
        self.report()
    }

    fn fine(&self) -> bool {
        self.world.monitor().notes.violations.is_empty()
    }

    fn go(&mut self, until: Duration) {
        for crew in self.running.iter_mut().filter_map(|r| r.crew.as_mut()) {
            if let Err(error) = crew.start_due(&mut self.links, &mut self.executor) {
                self.world.violation(format!("a job that can't be made: {error}"));
            }
        }
        let workers = self.running.iter().filter_map(|r| r.crew.as_ref()?.next_start());
        let stopped = self.executor.run(workers.chain([until]).min().unwrap_or(until));
        for pid in std::mem::take(&mut self.executor.panics) {
            self.world.violation(format!("process {pid}: a future panicked"));
        }
        if stopped == Stopped::Livelock {
            self.world.violation("livelock: too many steps".to_owned());
        }
    }

    /// Faults cease: everybody runs, everything is within reach.
    fn calm(&mut self) {
        self.world.trace.line(0, || "faults cease".to_owned());
        self.executor.calm();
        self.world.core.resume_all();
        self.world.heal_all();
        self.links.heal_all();
    }

    fn start(&mut self) {
        self.next_start = None;
        if self.starts >= STARTS_MAX {
            return self.world.violation(format!("{STARTS_MAX} starts, and no end"));
        }
        let pid = self.starts as Pid + 1;
        let process = Process::new(&self.world, pid, self.job);
        let spec = match jobs::spec(&process, self.starts, self.from.clone()) {
            Ok(spec) => spec,
            Err(error) => return self.world.violation(format!("a job that can't be made: {error}")),
        };
        self.starts += 1;
        self.world.trace.line(pid, || format!("starts from {} at parallelism {}", spec.restore, spec.parallelism));
        self.world.monitor().count("starts");
        let (stop, stopping) = watch::channel(false);
        let (controls, requests) = Controls::new(stopping);
        let ended = Slot::default();
        let (slot, core, env) = (ended.clone(), self.world.core.clone(), process.env());
        let alone = self.world.plan.workers == 0;
        let network = (!alone).then(|| self.links.join(pid, Role::Coordinator));
        let crew = (!alone).then(|| Crew::of(&process, self.starts - 1, self.from.clone()));
        self.executor.add(
            pid,
            Box::pin(async move {
                let progress = Arc::new(Progress::default());
                let outcome = match network {
                    None => run(spec, env, controls, progress).await,
                    Some(network) => coordinate(spec, env, controls, progress, network, |_| {}).await,
                };
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
                core.interrupt();
            }),
        );
        self.running.push(Running { pid, stop, requests, ended, crew });
    }

    fn start_later(&mut self) {
        let delay = self.world.plan.restart_delay;
        self.next_start = Some(self.world.core.now() + delay);
    }

    fn act(&mut self, pid: Pid, action: Action) {
        let now = self.world.core.now();
        self.world.trace.line(pid, || action.to_string());
        // Who is asked for something is the coordinator.
        let asked = self.running.iter().find_map(|r| r.crew.as_ref()?.coordinator_of(pid)).unwrap_or(pid);
        match action {
            Action::Crash => self.world.kill(pid, "as planned"),
            Action::Pause(d) => {
                self.world.monitor().count("pauses");
                self.world.core.pause(pid, now + d);
            }
            Action::CutOff(d) => {
                self.world.monitor().count("partitions");
                self.cut_off(pid, d);
            }
            Action::TakeOver => {
                self.world.monitor().count("takeovers");
                self.start();
            }
            Action::Zombie(d) => {
                self.world.monitor().count("takeovers of a paused process");
                self.world.core.pause(pid, now + d);
                self.start();
            }
            Action::CutOffZombie(d) => {
                self.world.monitor().count("takeovers of a process cut off");
                self.cut_off(pid, d);
                self.start();
            }
            Action::Stop => {
                self.world.monitor().count("stops asked for");
                for process in self.running.iter().filter(|r| r.pid == asked) {
                    // A receiver that is gone belongs to a process that is ending anyway.
                    let _ = process.stop.send(true);
                }
            }
            Action::Savepoint(number, then) => self.savepoint(asked, number, then),
            Action::Rescale(parallelism) => self.rescale(asked, parallelism),
        }
    }

    fn cut_off(&self, pid: Pid, duration: Duration) {
        self.world.cut_off(pid, self.world.core.now() + duration);
        self.links.part(pid, duration);
    }

    /// Asks a process for another parallelism, and holds it to its answer.
    fn rescale(&mut self, pid: Pid, parallelism: u32) {
        let Some(process) = self.running.iter().find(|r| r.pid == pid) else { return };
        let (reply, answer) = oneshot::channel();
        if process.requests.rescales.try_send(RescaleRequest { parallelism, reply }).is_err() {
            return self.world.monitor().count("rescales not heard");
        }
        let (world, job) = (self.world.clone(), self.job);
        let listen = async move {
            match answer.await {
                Ok(Ok(rescaled)) => {
                    world.trace.line(pid, || format!("rescaled: {rescaled:?}"));
                    let Some(epoch) = rescaled.epoch else { return };
                    world.monitor().count("rescales");
                    if rescaled.to != parallelism || !world.monitor().ledger(job).was_completed(epoch) {
                        world.violation(format!("process {pid} was asked for {parallelism}, and says {rescaled:?}"));
                    }
                }
                Ok(Err(why)) => {
                    world.trace.line(pid, || format!("not rescaled: {why}"));
                    world.monitor().count("rescales refused");
                }
                Err(_) => world.monitor().count("rescales without an answer"),
            }
        };
        self.executor.add(0, Box::pin(listen));
    }

    /// Asks a process for a savepoint, and holds it to its answer.
    fn savepoint(&mut self, pid: Pid, number: u64, then: BarrierKind) {
        let Some(process) = self.running.iter().find(|r| r.pid == pid) else { return };
        let name = format!("sp-{number}");
        let (reply, answer) = oneshot::channel();
        if process.requests.savepoints.try_send(SavepointRequest { name: name.clone(), then, reply }).is_err() {
            return self.world.monitor().count("savepoints not heard");
        }
        let (world, made, job) = (self.world.clone(), self.made.clone(), self.job);
        let listen = async move {
            match answer.await {
                Ok(Ok(savepoint)) => {
                    world.trace.line(pid, || format!("made {name}: {savepoint:?}"));
                    let objects = world.objects();
                    world.monitor().savepoint(job, &name, &objects);
                    if then != BarrierKind::Checkpoint {
                        made.lock().unwrap_or_else(PoisonError::into_inner).push((pid, name));
                    }
                }
                Ok(Err(why)) => {
                    world.trace.line(pid, || format!("made no {name}: {why}"));
                    world.monitor().count("savepoints refused");
                }
                Err(_) => world.monitor().count("savepoints without an answer"),
            }
        };
        self.executor.add(0, Box::pin(listen));
    }

    /// A process has stopped, died or given up, and nobody else runs. What it has left is gone on from in one of many ways: by the
    /// same job or by the next, from its newest checkpoint or its savepoint, which may have been moved.
    fn go_on_from(&mut self, pid: Pid) {
        let made = std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner));
        if self.world.plan.checkpoints.mode == CheckpointMode::Disabled {
            return;
        }
        let savepoint = made.into_iter().rev().find(|(by, _)| *by == pid).map(|(_, name)| name);
        let folder = jobs::folder(self.job);
        let (way, another, initial) = self.world.random(|r| (r.below(10), r.chance(0.5), r.chance(0.5)));
        let snapshot = match (savepoint, way) {
            (_, 0..=2) => return,
            (Some(name), 3..=5) if !another => Reference::Savepoint(name),
            (Some(name), 3..=5) => self.location(&format!("{folder}/savepoints/{name}")),
            (Some(name), _) => self.elsewhere(&name),
            (None, _) => {
                let entry = self.world.monitor().ledger(self.job).newest_entry(&self.world.objects());
                // A job that has none of its own since it was started from another snapshot: that is where it is.
                let Some(entry) = entry else { return };
                self.location(if way <= 6 { &folder } else { &entry })
            }
        };
        self.world.monitor().count("starts from a snapshot");
        if another {
            self.world.monitor().count("jobs taken over by another");
            self.job += 1;
            // Who starts another job with what one has left sees to it that nobody of that one is left: no log fences them.
            for pid in self.dismissed.drain(..) {
                self.world.bury(pid);
            }
        }
        // The same job has a past, so that it would not look at its first snapshot.
        self.from = if another && initial {
            Start { restore: Reference::Latest, initial: Some(snapshot) }
        } else {
            Start { restore: snapshot, initial: None }
        };
    }

    fn location(&self, path: &str) -> Reference {
        Reference::Location(format!("{STORAGE}/{path}"))
    }

    /// Somebody moves a savepoint.
    fn elsewhere(&mut self, name: &str) -> Reference {
        self.moves += 1;
        let from = format!("{}/savepoints/{name}/", jobs::folder(self.job));
        let to = format!("{ELSEWHERE}{}", self.moves);
        let mut objects = self.world.objects();
        let files: Vec<String> = objects.keys().filter(|path| path.starts_with(&from)).cloned().collect();
        for path in files {
            let moved = format!("{to}/{}", path.trim_start_matches(&from));
            let Some(bytes) = objects.remove(&path) else { continue };
            objects.insert(moved.clone(), bytes);
            self.world.monitor().moved(&path, &moved);
        }
        drop(objects);
        self.world.monitor().count("savepoints moved");
        self.location(&to)
    }

    /// Takes note of processes that have ended or died.
    fn listen(&mut self) {
        let newest = self.running.last().map(|r| r.pid);
        let mut left = Vec::new();
        for mut process in std::mem::take(&mut self.running) {
            if let Some(crew) = &mut process.crew {
                crew.listen(&self.world);
            }
            let outcome = process.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
            let dead = self.world.core.is_dead(process.pid);
            let left_over = match &outcome {
                Some(Ok(summary)) => summary.outcome == Outcome::Stopped,
                Some(Err(RunError::Fenced(_))) => false,
                // It was in the middle of something.
                Some(Err(_)) | None => self.world.random(|r| r.chance(ADOPTED_FROM_THE_DEAD)),
            };
            match outcome {
                None if !dead => {
                    left.push(process);
                    continue;
                }
                None => {}
                Some(outcome) => {
                    self.ended(process.pid, &outcome);
                    // Whatever it leaves running (deletes, mostly) is gone with the process.
                    self.world.bury(process.pid);
                }
            }
            if let Some(crew) = process.crew {
                self.dismissed.extend(crew.dismiss(&self.world));
            }
            // What one that has been taken over has left is not where the job is.
            if left_over && self.finished.is_none() && left.is_empty() && process.pid == self.starts as Pid {
                self.go_on_from(process.pid);
            }
            if newest == Some(process.pid) && self.finished.is_none() && self.next_start.is_none() {
                self.start_later();
            }
        }
        self.running = left;
    }

    fn ended(&mut self, pid: Pid, outcome: &Result<Summary, RunError>) {
        let words = match outcome {
            Ok(summary) => format!("{:?}", summary.outcome),
            Err(error) => format!("{error:?}"),
        };
        self.world.trace.line(pid, || format!("ends: {words}"));
        if self.calm {
            // Of several at a time one may be overtaken by the next; the progress does not tell that from a failure.
            let several = self.world.plan.checkpoints.max_concurrent > 1;
            match outcome {
                Ok(summary) if several || summary.progress.checkpoints.failed == 0 => {}
                Ok(_) => self.world.violation(format!("process {pid}: a checkpoint failed, and nothing was wrong")),
                Err(_) => self.world.violation(format!("process {pid}: {words}, and nothing was wrong")),
            }
        }
        let kind = match outcome {
            Ok(Summary { outcome: Outcome::Finished | Outcome::AlreadyFinished, .. }) => {
                let logged = self.world.monitor().ledger(self.job).finished;
                if !logged && self.world.plan.checkpoints.mode != CheckpointMode::Disabled {
                    self.world.violation(format!("process {pid} says finished, and the log does not"));
                }
                self.finished.get_or_insert(pid);
                "runs that finished"
            }
            Ok(Summary { outcome: Outcome::Stopped, .. }) => "runs that stopped",
            Err(RunError::Fenced(_)) => "runs that were fenced",
            Err(RunError::Connector(_) | RunError::Storage(_) | RunError::Failed(_)) => "runs that failed",
        };
        self.world.monitor().count(kind);
        // With the faults gone, nothing but a newer process is a reason to fail.
        if let (Err(error), false) = (outcome, self.world.rough()) {
            self.world.trace.line(pid, || format!("failed after the faults have ceased: {error}"));
        }
    }

    /// The job is finished. Whoever is left wakes up and ends, and has done no harm.
    fn outlive(&mut self) {
        self.calm();
        let end = self.world.core.now() + END_MAX;
        while !self.running.is_empty() && self.world.core.now() < end && self.fine() {
            self.go(end);
            self.listen();
        }
        if let Some(left) = self.running.first() {
            return self.world.violation(format!("process {} did not end {END_MAX:?} after the job", left.pid));
        }
        // Requests that are still on their way arrive.
        self.go(self.world.core.now() + Duration::from_secs(30));
        if self.world.plan.checkpoints.mode == CheckpointMode::Disabled {
            return;
        }
        let finished = self.finished.take();
        self.start();
        let end = self.world.core.now() + END_MAX;
        while !self.running.is_empty() && self.world.core.now() < end && self.fine() {
            self.go(end);
            self.listen();
        }
        if self.finished.is_none() {
            self.world
                .violation("started once more after its end, the job does not say that it is finished".to_owned());
        }
        self.finished = finished;
    }

    fn judge(&self) {
        let plan = &self.world.plan;
        let due = oracle::Due { topology: plan.topology, inputs: &self.world.inputs, delay_ms: plan.delay_ms };
        let faults = match plan.checkpoints.mode {
            CheckpointMode::ExactlyOnce => due.faults(&self.world.broker().committed()),
            CheckpointMode::AtLeastOnce => due.lost(&self.world.broker().committed()),
            // Each process began anew.
            CheckpointMode::Disabled => due.faults(&self.world.broker().written_by(self.finished.unwrap_or_default())),
        };
        faults.into_iter().for_each(|fault| self.world.violation(format!("output: {fault}")));
        let named = self.world.monitor().named();
        let objects = self.world.objects();
        let missing: Vec<&String> = named.iter().filter(|path| !objects.contains_key(*path)).collect();
        if !missing.is_empty() {
            self.world.violation(format!("files of kept checkpoints are gone: {missing:?}"));
        }
        let lost = self.world.monitor().lost_savepoints(&objects);
        if !lost.is_empty() {
            self.world.violation(format!("files of savepoints are gone: {lost:?}"));
        }
    }

    fn report(self) -> Report {
        self.world.close();
        let broker = self.world.broker();
        let mut monitor = self.world.monitor();
        let orphans = monitor.orphans(&self.world.objects());
        let Notes { violations, mut counts } = std::mem::take(&mut monitor.notes);
        *counts.entry("orphans left at the end").or_default() += orphans as u64;
        *counts.entry("records never visible").or_default() += broker.hidden() as u64;
        *counts.entry("broker requests fenced").or_default() += broker.fenced;
        Report {
            seed: self.world.plan.seed,
            plan: self.world.plan.to_string(),
            violations,
            counts,
            polls: self.executor.polls,
            lasted: self.world.core.now(),
            digest: self.executor.digest,
            effects: self.world.effects(),
            output: broker.committed(),
        }
    }
}
