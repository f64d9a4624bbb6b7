//! The worker processes of a job whose coordinator is a process of its own, and the network between all of them.
//!
//! Workers belong to the coordinator that they were started for: one that dies is replaced as long as that one lives, and some
//! time after its end the last of them are gone.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use floodmark_snapshot::{Error, Result};
use floodmark_worker::{
    Network, RunSpec,
    link::{
        control::Heartbeat,
        tls::Role,
        transport::{Endpoint, memory},
    },
    serve,
};
use tokio::sync::watch;

use crate::{
    executor::{Executor, Pid},
    jobs::{self, Start},
    plan::WorkerAction,
    process::Process,
    world::World,
};

/// The number of the first worker; the next ones follow. Coordinators have those that they have without workers.
pub const FIRST_WORKER: Pid = 1_000_000;
/// A worker outlives its coordinator by so much at most.
const OUTLIVES_MAX: Duration = Duration::from_secs(8);

/// All hosts of a life.
pub(crate) struct Links {
    world: Arc<World>,
    network: Arc<memory::Network>,
    names: Vec<String>,
    workers: Pid,
}

/// The workers of one coordinator.
pub(crate) struct Crew {
    coordinator: Pid,
    /// The number of the job.
    job: u32,
    /// The number of its start.
    start: usize,
    from: Start,
    workers: Vec<Worker>,
    /// When those that are missing are started.
    replacements: Vec<Duration>,
}

struct Worker {
    pid: Pid,
    ended: Arc<Mutex<Option<Result<()>>>>,
    /// Never told: workers end with their coordinator.
    _stop: watch::Sender<bool>,
}

fn name(pid: Pid) -> String {
    match pid.checked_sub(FIRST_WORKER) {
        Some(number) => format!("worker-{number}"),
        None => format!("coordinator-{pid}"),
    }
}

impl Links {
    pub(crate) fn new(world: &Arc<World>) -> Self {
        let env = Process::new(world, 0, 1).env();
        Self { world: world.clone(), network: memory::Network::new(env, jobs::job(1)), names: Vec::new(), workers: 0 }
    }

    /// A new host's way to the others.
    pub(crate) fn join(&mut self, pid: Pid, role: Role) -> Network {
        let name = name(pid);
        let host = self.network.host(&name, role);
        for other in &self.names {
            self.network.delay(&name, other, self.world.plan.link_delay);
        }
        self.names.push(name.clone());
        self.world.has_host(pid, &host);
        Network { transport: host, listen: Endpoint(name), heartbeat: Heartbeat::default() }
    }

    /// Nothing passes between a process and all others for a while.
    pub(crate) fn part(&self, pid: Pid, duration: Duration) {
        let all: Vec<String> = self.names.iter().filter(|other| **other != name(pid)).cloned().collect();
        all.iter().for_each(|other| self.cut(&name(pid), other, duration));
    }

    fn cut(&self, a: &str, b: &str, duration: Duration) {
        self.network.cut(a, b);
        let (network, a, b) = (Arc::downgrade(&self.network), a.to_owned(), b.to_owned());
        self.world.core.after(duration, move || {
            if let Some(network) = network.upgrade() {
                network.heal(&a, &b);
            }
        });
    }

    /// Everybody reaches everybody.
    pub(crate) fn heal_all(&self) {
        for (at, a) in self.names.iter().enumerate() {
            self.names[..at].iter().for_each(|b| self.network.heal(a, b));
        }
    }
}

impl Crew {
    /// As many workers as the plan says, to be started at once.
    pub(crate) fn of(coordinator: &Process, start: usize, from: Start) -> Self {
        let world = &coordinator.world;
        let replacements = (0..world.plan.workers).map(|_| world.core.now()).collect();
        Self { coordinator: coordinator.pid, job: coordinator.job, start, from, workers: Vec::new(), replacements }
    }

    /// The coordinator of a worker that is in here.
    pub(crate) fn coordinator_of(&self, pid: Pid) -> Option<Pid> {
        self.workers.iter().any(|w| w.pid == pid).then_some(self.coordinator)
    }

    /// When the next worker is started.
    pub(crate) fn next_start(&self) -> Option<Duration> {
        self.replacements.iter().min().copied()
    }

    /// Starts workers whose time has come.
    pub(crate) fn start_due(&mut self, links: &mut Links, executor: &mut Executor) -> Result<()> {
        let now = links.world.core.now();
        let due = self.replacements.extract_if(.., |at| *at <= now).count();
        (0..due).try_for_each(|_| self.start(links, executor))
    }

    fn start(&mut self, links: &mut Links, executor: &mut Executor) -> Result<()> {
        let world = links.world.clone();
        let pid = FIRST_WORKER + links.workers;
        links.workers += 1;
        let process = Process::new(&world, pid, self.job);
        let spec: RunSpec = jobs::spec(&process, self.start, self.from.clone())?;
        world.trace.line(pid, || format!("starts for process {}", self.coordinator));
        world.monitor().count("workers started");
        let network = links.join(pid, Role::Worker);
        let (stop, stopped) = watch::channel(false);
        let ended: Arc<Mutex<Option<Result<()>>>> = Arc::default();
        let (slot, coordinator) = (ended.clone(), Endpoint(name(self.coordinator)));
        let slots = world.plan.slots;
        executor.add(
            pid,
            Box::pin(async move {
                let served = serve(spec, process.env(), network, coordinator, slots, stopped, Arc::default()).await;
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(served);
                process.world.core.interrupt();
            }),
        );
        self.workers.push(Worker { pid, ended, _stop: stop });
        Ok(())
    }

    /// Does something to one of the workers.
    pub(crate) fn act(&self, which: u64, action: WorkerAction, links: &Links) {
        let world = &links.world;
        let Some(last) = self.workers.len().checked_sub(1) else { return };
        let at = (which % (last as u64 + 1)) as usize;
        let pid = self.workers[at].pid;
        world.trace.line(pid, || action.to_string());
        let (here, coordinator) = (name(pid), name(self.coordinator));
        // The next, if there is another.
        let other = (last > 0).then(|| name(self.workers[(at + 1) % (last + 1)].pid));
        let kind = match (action, other) {
            // That is counted with all other deaths.
            (WorkerAction::Crash, _) => return world.kill(pid, "as planned"),
            (WorkerAction::Pause(d), _) => {
                world.core.pause(pid, world.core.now() + d);
                "workers paused"
            }
            (WorkerAction::CutOff(d), _) => {
                world.cut_off(pid, world.core.now() + d);
                links.part(pid, d);
                "workers cut off"
            }
            (WorkerAction::Unheard(d), _) => {
                links.cut(&here, &coordinator, d);
                "workers unheard of by their coordinator"
            }
            (WorkerAction::Apart(d), Some(other)) => {
                links.cut(&here, &other, d);
                "workers apart"
            }
            (WorkerAction::Sever, _) => {
                links.network.sever(&here, &coordinator);
                "connections severed"
            }
            (WorkerAction::SeverChannels, Some(other)) => {
                links.network.sever(&here, &other);
                "connections severed"
            }
            (WorkerAction::Apart(_) | WorkerAction::SeverChannels, None) => return,
        };
        world.monitor().count(kind);
    }

    /// Takes note of workers that are gone; others take their places later.
    pub(crate) fn listen(&mut self, world: &World) {
        let gone = self.workers.extract_if(.., |worker| {
            let ended = worker.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(ended) = &ended {
                let why = ended.as_ref().err().map_or_else(String::new, Error::to_string);
                world.violation(format!("process {}: a worker has left, and nobody has told it to: {why}", worker.pid));
            }
            ended.is_some() || world.core.is_dead(worker.pid)
        });
        let next = world.core.now() + world.plan.restart_delay;
        self.replacements.extend(gone.map(|_| next));
    }

    /// The coordinator is gone: so are its workers, sooner or later. Answers who they are.
    pub(crate) fn dismiss(self, world: &Arc<World>) -> Vec<Pid> {
        let pids: Vec<Pid> = self.workers.iter().map(|w| w.pid).collect();
        for pid in pids.iter().copied() {
            let delay = world.random(|r| r.spread(Duration::from_millis(1), OUTLIVES_MAX));
            let at = world.clone();
            world.core.after(delay, move || at.bury(pid));
        }
        pids
    }
}
