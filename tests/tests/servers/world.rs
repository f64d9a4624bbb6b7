//! A job in several processes on a network of its own, whose processes and network can be made to fail: from Kafka to Kafka,
//! with checkpoints on S3.
//!
//! Processes that end are started again, as whoever runs them in earnest would, unless they say that they must not be.

use std::{
    collections::BTreeMap,
    fmt,
    net::Ipv4Addr,
    path::PathBuf,
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use floodmark_testkit::{Cut, Kafka, Network, Place, S3};
use floodmark_tests::{
    cluster::{Identities, Site},
    events::{Draw, Orders},
    job::{CheckpointLog, Job, PATIENCE, Run},
};
use nix::sys::signal::Signal;

use super::{location, orders::Scenario};

/// Workers of a crew.
pub const WORKERS: usize = 3;
const SLOTS: u32 = 2;
/// With one worker lost, the others have just slots enough.
const PARALLELISM: u32 = 4;
/// How long the job may take, once nothing is wrong any more, until output of a new checkpoint is visible.
const RECOVERY_MAX: Duration = Duration::from_secs(60);
/// A worker or coordinator that is silent for so long is given up by the others.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3);
/// From one look to the next.
pub const POLL: Duration = Duration::from_millis(20);
/// Of a process that says that another has taken the job over.
pub const FENCED: i32 = 3;
/// Characters of a process's log that a failure shows, from its end.
const LOG_SHOWN_MAX: usize = 4_000;

/// A number from the environment.
pub fn setting(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(value) => value.parse().with_context(|| format!("{name}={value}: not a number")),
        Err(_) => Ok(default),
    }
}

/// Whom a process does not reach any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peers {
    All,
    Broker,
    Storage,
    Coordinators,
    Workers,
}

/// What is done to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// SIGKILL, and a new process after a while.
    Kill,
    /// SIGSTOP, and SIGCONT after a while.
    Stop,
    Cut(Cut, Peers),
}

/// What is done to a process, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub what: What,
    pub lasts: Duration,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.lasts.as_millis();
        match self.what {
            What::Kill => write!(f, "killed, back after {ms} ms"),
            What::Stop => write!(f, "stopped for {ms} ms"),
            What::Cut(cut, peers) => write!(f, "cut off from {peers:?} for {ms} ms: {cut}"),
        }
    }
}

impl Fault {
    /// Draws one.
    pub fn draw(draw: &mut Draw, of: Role) -> Self {
        let cut = [Cut::Cable, Cut::Both, Cut::Both, Cut::In, Cut::Out][draw.below(5) as usize];
        let others = if of == Role::Coordinator { Peers::Workers } else { Peers::Coordinators };
        let peers =
            [Peers::All, Peers::All, Peers::Broker, Peers::Storage, others, Peers::Workers][draw.below(6) as usize];
        // A cable leads to everybody.
        let cut = What::Cut(cut, if cut == Cut::Cable { Peers::All } else { peers });
        let what = [What::Kill, What::Stop, cut, cut][draw.below(4) as usize];
        let timeout = HEARTBEAT_TIMEOUT.as_millis() as u64;
        // Half of them go unnoticed by heartbeats.
        let lasts = match (what, draw.below(2)) {
            (What::Kill, _) => draw.below(1_000),
            (_, 0) => 200 + draw.below(timeout / 2),
            (..) => timeout + 400 + draw.below(2_500),
        };
        Self { what, lasts: Duration::from_millis(lasts) }
    }
}

/// What a process is in its crew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Coordinator,
    Worker,
}

/// A coordinator and its workers. Only one crew runs the job; another may think that it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crew(usize);

impl Crew {
    /// The number of its coordinator.
    pub fn coordinator(self) -> usize {
        self.0 * (1 + WORKERS)
    }

    /// The numbers of its workers.
    pub fn workers(self) -> std::ops::Range<usize> {
        self.coordinator() + 1..self.coordinator() + 1 + WORKERS
    }

    /// The numbers of all.
    pub fn members(self) -> std::ops::Range<usize> {
        self.coordinator()..self.workers().end
    }
}

/// A process of the job, which comes back whenever it has ended.
pub struct Member {
    pub name: String,
    pub role: Role,
    pub place: Place,
    pub run: Option<Run>,
    crew: Crew,
    /// Nobody starts it again.
    retired: bool,
    /// What is wrong with it, and until when.
    ill: Option<(Fault, Instant)>,
}

/// A job, its processes, and the network between them and the servers.
pub struct World {
    pub scenario: Scenario,
    pub members: Vec<Member>,
    /// How processes have ended by themselves, and how often.
    pub ends: BTreeMap<String, u32>,
    store: S3,
    job: Job,
    identities: Identities,
    network: Network,
    begun: Instant,
}

impl World {
    /// With servers, and nobody who runs the job.
    pub fn new(name: &'static str) -> Result<Self> {
        let network = Network::lay()?;
        let broker = Arc::new(Kafka::start_to_crash(network.server(0).into())?);
        let store = S3::start_at(network.server(1).into())?;
        let scenario = Scenario::on(broker, name)?;
        let mut job = scenario.job(scenario.both(false));
        job.parallelism = PARALLELISM;
        job.interval = "300ms".to_owned();
        // However often it fails, it is to go on at once.
        job.spec = "  restarts:\n    strategy: FixedDelay\n    attempts: 100000\n    delay: 100ms\n".to_owned();
        job.storage = location(&store, "faults");
        job.env = store.env().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let identities = Identities::issue(&job, scenario.folder.path().join("identities"))?;
        let (members, ends, begun) = (Vec::new(), BTreeMap::new(), Instant::now());
        Ok(Self { scenario, members, ends, store, job, identities, network, begun })
    }

    /// Makes places for a coordinator and its workers, and starts them.
    pub fn crew(&mut self) -> Result<Crew> {
        let crew = Crew(self.members.len() / (1 + WORKERS));
        for number in crew.members() {
            let (role, kind) = match number == crew.coordinator() {
                true => (Role::Coordinator, "coordinator"),
                false => (Role::Worker, "worker"),
            };
            let (name, place) = (format!("{kind}-{number}"), self.network.place()?);
            self.members.push(Member { name, role, place, run: None, crew, retired: false, ill: None });
        }
        for number in crew.members() {
            self.start(number)?;
        }
        Ok(crew)
    }

    fn site(&self, number: usize) -> Site {
        let Member { place, role, .. } = &self.members[number];
        match role {
            Role::Coordinator => Site::coordinator(place.prefix(), place.address()),
            Role::Worker => Site::worker(place.prefix(), place.address()),
        }
    }

    fn start(&mut self, number: usize) -> Result<()> {
        let (at, member) = (self.site(number), &self.members[number]);
        let name = format!("{}-{}", self.job.name, member.name);
        let run = match member.role {
            Role::Coordinator => self.identities.start_coordinator(&self.job, &name, &at)?,
            Role::Worker => {
                let of = self.site(member.crew.coordinator());
                self.identities.start_worker(&self.job, &name, &at, &of, SLOTS)?
            }
        };
        self.members[number].run = Some(run);
        Ok(())
    }

    fn addresses(&self, peers: Peers) -> Vec<Ipv4Addr> {
        let of = |role| self.members.iter().filter(|m| m.role == role).map(|m| m.place.address()).collect();
        match peers {
            Peers::All => Vec::new(),
            Peers::Broker => vec![self.network.server(0)],
            Peers::Storage => vec![self.network.server(1)],
            Peers::Coordinators => of(Role::Coordinator),
            Peers::Workers => of(Role::Worker),
        }
    }

    /// The checkpoint log, as the server keeps it.
    pub fn log(&self) -> Result<CheckpointLog> {
        let job: PathBuf = ["faults", "default", &self.job.name, "local", "log"].iter().collect();
        CheckpointLog::read(&self.store.objects().join(job))
    }

    /// Since its beginning, for who reads along.
    pub fn says(&self, what: impl fmt::Display) {
        println!("{:7.1} s: {what}", self.begun.elapsed().as_secs_f64());
    }

    /// The members with nothing wrong.
    pub fn well(&self) -> Vec<usize> {
        (0..self.members.len()).filter(|n| self.members[*n].ill.is_none()).collect()
    }

    /// Begins a fault of a process that has none.
    pub fn begin(&mut self, number: usize, fault: Fault) -> Result<()> {
        self.says(format!("{} is {fault}", self.members[number].name));
        if let What::Cut(cut, peers) = fault.what {
            self.cut(number, cut, peers)?;
        }
        let member = &mut self.members[number];
        match fault.what {
            What::Kill => drop(member.run.take().map(Run::kill).transpose()?),
            What::Stop => member.run.as_ref().map_or(Ok(()), |run| run.signal(Signal::SIGSTOP))?,
            What::Cut(..) => {}
        }
        member.ill = Some((fault, Instant::now() + fault.lasts));
        Ok(())
    }

    /// Cuts a process off until it is healed.
    pub fn cut(&self, number: usize, cut: Cut, peers: Peers) -> Result<()> {
        self.members[number].place.cut(cut, &self.addresses(peers))
    }

    /// Ends what is over, and starts again what has ended by itself.
    fn tend(&mut self) -> Result<()> {
        for number in 0..self.members.len() {
            let member = &mut self.members[number];
            if let Some((fault, _)) = member.ill.take_if(|(_, until)| *until <= Instant::now()) {
                match fault.what {
                    What::Kill => {}
                    What::Stop => member.run.as_ref().map_or(Ok(()), |run| run.signal(Signal::SIGCONT))?,
                    What::Cut(..) => member.place.heal()?,
                }
            }
            // One that was killed stays dead for a while.
            let stays = member.retired || member.run.is_none() && member.ill.is_some();
            if stays || member.run.as_mut().map_or(Ok(false), Run::is_running)? {
                continue;
            }
            if let Some(run) = member.run.take() {
                self.ended(number, run)?;
            }
            self.start(number)?;
        }
        Ok(())
    }

    /// Notes that a process has ended by itself.
    fn ended(&mut self, number: usize, run: Run) -> Result<()> {
        let (ended, name) = (run.wait(PATIENCE)?, &self.members[number].name);
        ensure!(!ended.log.contains("panicked"), "something panicked: {ended}");
        let error = ended.log.lines().rfind(|l| l.starts_with("error:")).unwrap_or("it says nothing");
        self.says(format!("{name} has ended by itself with code {:?}: {error}", ended.code));
        // Whoever is fenced has been retired before.
        ensure!(ended.code != Some(FENCED), "nobody has taken the job over, and yet {name} ends: {ended}");
        *self.ends.entry(format!("{:?}, code {:?}", self.members[number].role, ended.code)).or_default() += 1;
        Ok(())
    }

    /// Lets time pass.
    pub fn tend_for(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            self.tend()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            sleep(left.min(POLL));
        }
    }

    /// Waits until a condition holds; shows all logs if it doesn't for too long.
    pub fn until(
        &mut self,
        what: &str,
        patience: Duration,
        mut condition: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<Duration> {
        let begun = Instant::now();
        while !condition(self)? {
            if begun.elapsed() > patience {
                bail!("not {what} within {patience:?}\n{}", self.logs());
            }
            self.tend_for(POLL)?;
        }
        Ok(begun.elapsed())
    }

    /// Waits until the job has made output of a checkpoint visible that was complete only after this call: how long that took.
    pub fn gets_on(&mut self) -> Result<Duration> {
        let newest = self.log()?.last_epoch();
        self.until("new output", RECOVERY_MAX, |world| Ok(world.log()?.last_committed() > newest))
    }

    /// A worker of a crew that has slices of the job to run, by what the coordinator has said last: one that came when there were
    /// slots enough has none.
    pub fn busy_worker(&self, crew: Crew) -> Result<usize> {
        let coordinator = self.members[crew.coordinator()].run.as_ref();
        let (log, placed) = coordinator.map(|run| (run.log(), run.placement())).unwrap_or_default();
        let last = |words: &str| log.lines().rev().find_map(|line| line.split_once(words));
        let busy = |number: &usize| {
            let come = last(&format!(" has come: worker at {}:", self.members[*number].place.address()));
            come.and_then(|(line, _)| line.split_once("INFO "))
                .is_some_and(|(_, name)| placed.iter().any(|worker| worker == name))
        };
        crew.workers().find(busy).with_context(|| format!("no worker has anything to run: {log}"))
    }

    fn logs(&self) -> String {
        let ends = self.members.iter().map(|m| {
            let log = m.run.as_ref().map_or_else(String::new, Run::log);
            let from = log.char_indices().rev().nth(LOG_SHOWN_MAX).map_or(0, |(i, _)| i);
            format!("--- {}\n{}\n", m.name, &log[from..])
        });
        ends.collect()
    }

    /// Nobody starts these again once they have ended.
    pub fn retire(&mut self, members: std::ops::Range<usize>) {
        self.members[members].iter_mut().for_each(|m| m.retired = true);
    }

    /// Ends everything, and has processes in the same places, those of one crew, read the input to its end.
    pub fn finish(&mut self, crew: Crew, orders: Orders, count: u64) -> Result<()> {
        for member in &mut self.members {
            member.place.heal()?;
            member.run.take();
        }
        self.job.sql = self.scenario.both(true);
        for member in crew.members() {
            self.start(member)?;
        }
        let coordinator = self.members[crew.coordinator()].run.take().context("it was started")?;
        let ended = coordinator.wait(PATIENCE)?;
        let summary = ended.ok("finished")?;
        assert_eq!((summary.late, summary.bad), (0, 0));
        self.scenario.check_both(orders, count)
    }
}
