//! A job in several processes, each in a network of its own, from Kafka to Kafka with checkpoints on S3: exactly once under
//! `kill -9`, processes that stand still, and networks that are cut, of workers as of the coordinator.
//!
//! `FLOODMARK_FAULTS` sets how many faults there are, `FLOODMARK_SEED` draws others. Faults come at moments of real time, so a
//! seed gives the same faults, not the same run.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

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

mod servers;

use servers::orders::Scenario;

const WORKERS: usize = 3;
const SLOTS: u32 = 2;
const PARALLELISM: u32 = 4;
/// Faults that begin before all are undone and the job must get on.
const FAULTS_A_ROUND: usize = 9;
/// How long the job may take, once nothing is wrong any more, until output of a new checkpoint is visible.
const RECOVERY_MAX: Duration = Duration::from_secs(60);
/// A worker or coordinator that is silent for so long is given up by the others.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(20);
const COORDINATOR: usize = 0;
const FENCED: i32 = 3;

/// A number from the environment.
fn setting(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(value) => value.parse().with_context(|| format!("{name}={value}: not a number")),
        Err(_) => Ok(default),
    }
}

/// Whom a process does not reach any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peers {
    All,
    Broker,
    Storage,
    Coordinator,
    Workers,
}

/// What is done to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// SIGKILL, and a new process after a while.
    Kill,
    /// SIGSTOP, and SIGCONT after a while.
    Stop,
    Cut(Cut, Peers),
}

#[derive(Clone, Copy, Debug)]
struct Fault {
    member: usize,
    what: What,
    lasts: Duration,
    /// From its beginning to that of the next.
    then: Duration,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, ms) = (name(self.member), self.lasts.as_millis());
        match self.what {
            What::Kill => write!(f, "kill {name}, back after {ms} ms"),
            What::Stop => write!(f, "stop {name} for {ms} ms"),
            What::Cut(cut, peers) => write!(f, "cut {name} off from {peers:?} for {ms} ms: {cut}"),
        }
    }
}

fn name(member: usize) -> String {
    if member == COORDINATOR { "coordinator".to_owned() } else { format!("worker-{member}") }
}

/// Draws the next fault of a process that has none at the moment.
fn draw_fault(draw: &mut Draw, member: usize) -> Fault {
    let cut = [Cut::Cable, Cut::Both, Cut::Both, Cut::In, Cut::Out][draw.below(5) as usize];
    let others = if member == COORDINATOR { Peers::Workers } else { Peers::Coordinator };
    let peers = [Peers::All, Peers::All, Peers::Broker, Peers::Storage, others, Peers::Workers][draw.below(6) as usize];
    // A cable leads to everybody.
    let peers = if cut == Cut::Cable { Peers::All } else { peers };
    let what = [What::Kill, What::Stop, What::Cut(cut, peers), What::Cut(cut, peers)][draw.below(4) as usize];
    let timeout = HEARTBEAT_TIMEOUT.as_millis() as u64;
    // Half of them go unnoticed by heartbeats.
    let lasts = match (what, draw.below(2)) {
        (What::Kill, _) => draw.below(1_000),
        (_, 0) => 200 + draw.below(timeout / 2),
        (..) => timeout + 400 + draw.below(2_500),
    };
    Fault { member, what, lasts: Duration::from_millis(lasts), then: Duration::from_millis(draw.below(700)) }
}

/// A process of the job, which comes back whenever it has ended.
struct Member {
    number: usize,
    place: Place,
    run: Option<Run>,
    /// What is wrong with it, and until when.
    ill: Option<(Fault, Instant)>,
}

/// A job, its processes, and the network between them and the servers.
struct World {
    scenario: Scenario,
    store: S3,
    job: Job,
    identities: Identities,
    members: Vec<Member>,
    /// The last to go: places hang on it.
    network: Network,
    /// How processes have ended by themselves, and how often.
    ends: BTreeMap<String, u32>,
    begun: Instant,
}

impl World {
    fn new(name: &'static str) -> Result<Self> {
        let network = Network::lay()?;
        let broker = Arc::new(Kafka::start_at(network.server(0).into())?);
        let store = S3::start_at(network.server(1).into())?;
        let scenario = Scenario::on(broker, name)?;
        let mut job = scenario.job(scenario.both(false));
        job.parallelism = PARALLELISM;
        job.interval = "300ms".to_owned();
        // However often it fails, it is to go on at once.
        job.spec = "  restarts:\n    strategy: FixedDelay\n    attempts: 100000\n    delay: 100ms\n".to_owned();
        job.storage = servers::location(&store, "faults");
        job.env = store.env().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let identities = Identities::issue(&job, scenario.folder.path().join("identities"))?;
        let member = |number| Ok(Member { number, place: network.place()?, run: None, ill: None });
        let members = (0..=WORKERS).map(member).collect::<Result<_>>()?;
        Ok(Self { scenario, store, job, identities, members, network, ends: BTreeMap::new(), begun: Instant::now() })
    }

    fn site(&self, member: usize) -> Site {
        let place = &self.members[member].place;
        let site = if member == COORDINATOR { Site::coordinator } else { Site::worker };
        site(place.prefix(), place.address())
    }

    fn start(&mut self, member: usize) -> Result<()> {
        let (at, of, name) = (self.site(member), self.site(COORDINATOR), format!("{}-{}", self.job.name, name(member)));
        let run = if member == COORDINATOR {
            self.identities.start_coordinator(&self.job, &name, &at)?
        } else {
            self.identities.start_worker(&self.job, &name, &at, &of, SLOTS)?
        };
        self.members[member].run = Some(run);
        Ok(())
    }

    fn addresses(&self, peers: Peers) -> Vec<Ipv4Addr> {
        match peers {
            Peers::All => Vec::new(),
            Peers::Broker => vec![self.network.server(0)],
            Peers::Storage => vec![self.network.server(1)],
            Peers::Coordinator => vec![self.members[COORDINATOR].place.address()],
            Peers::Workers => self.members[COORDINATOR + 1..].iter().map(|m| m.place.address()).collect(),
        }
    }

    /// The checkpoint log, as the server keeps it.
    fn log(&self) -> Result<CheckpointLog> {
        let job: PathBuf = ["faults", "default", &self.job.name, "local", "log"].iter().collect();
        CheckpointLog::read(&self.store.objects().join(job))
    }

    fn begin(&mut self, fault: Fault) -> Result<()> {
        println!("{:7.1} s: {fault}", self.age());
        let cut_from = match fault.what {
            What::Cut(_, peers) => self.addresses(peers),
            What::Kill | What::Stop => Vec::new(),
        };
        let member = &mut self.members[fault.member];
        match fault.what {
            What::Kill => {
                if let Some(run) = member.run.take() {
                    run.kill()?;
                }
            }
            What::Stop => member.run.as_ref().context("it does not run")?.signal(Signal::SIGSTOP)?,
            What::Cut(cut, _) => member.place.cut(cut, &cut_from)?,
        }
        member.ill = Some((fault, Instant::now() + fault.lasts));
        Ok(())
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
            if member.run.as_mut().map_or(Ok(member.ill.is_some()), Run::is_running)? {
                continue;
            }
            let ended = member.run.take();
            if let Some(run) = ended {
                self.ended(number, run)?;
            }
            self.start(number)?;
        }
        Ok(())
    }

    /// A process has ended by itself: whoever keeps it running starts it again, unless it says that it must not be.
    fn ended(&mut self, number: usize, run: Run) -> Result<()> {
        let ended = run.wait(PATIENCE)?;
        ensure!(!ended.log.contains("panicked"), "something panicked: {ended}");
        let error = ended.log.lines().rfind(|l| l.starts_with("error:")).unwrap_or("it says nothing").to_owned();
        println!("{:7.1} s: {} ended by itself with code {:?}: {error}", self.age(), name(number), ended.code);
        // Nobody but the processes of this job writes to its log, and there is never more than one coordinator.
        ensure!(ended.code != Some(FENCED), "nobody has taken the job over, and yet: {ended}");
        *self
            .ends
            .entry(format!("{} {:?}", if number == COORDINATOR { "coordinator" } else { "worker" }, ended.code))
            .or_default() += 1;
        Ok(())
    }

    fn age(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    fn tend_for(&mut self, time: Duration) -> Result<()> {
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

    /// Waits until the job has made output of a new checkpoint visible: how long that took.
    fn gets_on(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        // A commit that is known may have been noted only now: what counts is a checkpoint from here on.
        let newest = self.log()?.last_epoch();
        while self.log()?.last_committed() <= newest {
            if begun.elapsed() > RECOVERY_MAX {
                let logs = self.members.iter().map(|m| {
                    let log = m.run.as_ref().map_or_else(String::new, Run::log);
                    let from = log.char_indices().rev().nth(4_000).map_or(0, |(i, _)| i);
                    format!("--- {}\n{}\n", name(m.number), &log[from..])
                });
                bail!("no new output {RECOVERY_MAX:?} after the last fault\n{}", logs.collect::<String>());
            }
            self.tend_for(POLL)?;
        }
        Ok(begun.elapsed())
    }

    /// Ends everything, and has the same processes read the input to its end.
    fn finish(&mut self, orders: Orders, count: u64) -> Result<()> {
        for member in &mut self.members {
            member.place.heal()?;
            member.run.take();
        }
        self.job.sql = self.scenario.both(true);
        for member in 0..self.members.len() {
            self.start(member)?;
        }
        let coordinator = self.members[COORDINATOR].run.take().context("it was started")?;
        let ended = coordinator.wait(PATIENCE)?;
        let summary = ended.ok("finished")?;
        assert_eq!((summary.late, summary.bad), (0, 0));
        self.scenario.check_both(orders, count)
    }
}

#[test]
fn a_hundred_faults_of_processes_and_networks_neither_lose_nor_repeat_a_row() -> Result<()> {
    let (faults, seed) = (setting("FLOODMARK_FAULTS", 100)?, setting("FLOODMARK_SEED", 21)?);
    println!("FLOODMARK_FAULTS={faults} FLOODMARK_SEED={seed}");
    let mut world = World::new("faults")?;
    let (orders, count) = (Orders { seed, ..Orders::default() }, 3_000 * faults);
    let feeder = world.scenario.feeder(orders, count, 2_500)?;
    let mut draw = Draw::new(seed);
    let (mut done, mut recoveries) = (0, Vec::new());
    world.gets_on()?;
    while done < faults {
        for _ in 0..FAULTS_A_ROUND {
            let well: Vec<usize> = world.members.iter().filter(|m| m.ill.is_none()).map(|m| m.number).collect();
            let mut pause = Duration::from_millis(300);
            if !well.is_empty() {
                let member = well[draw.below(well.len() as u64) as usize];
                let fault = draw_fault(&mut draw, member);
                world.begin(fault)?;
                (pause, done) = (fault.then, done + 1);
            }
            world.tend_for(pause)?;
        }
        while world.members.iter().any(|m| m.ill.is_some()) {
            world.tend_for(POLL)?;
        }
        let took = world.gets_on()?;
        println!("{:7.1} s: new output {} ms after the last of {done} faults was over", world.age(), took.as_millis());
        recoveries.push(took.as_millis());
    }
    recoveries.sort_unstable();
    println!(
        "faults: {done} faults, {} orders by then; from the end of a round of faults to new output: median {:?} ms, worst {:?} ms; \
         ended by themselves: {:?}",
        feeder.sent(),
        recoveries[recoveries.len() / 2],
        recoveries[recoveries.len() - 1],
        world.ends
    );
    feeder.finish()?;
    world.finish(orders, count)
}
