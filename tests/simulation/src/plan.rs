//! What a seed means: the job, its settings, its inputs, and which faults strike how often (swarm testing: most seeds have
//! only some kinds of faults, so that one kind does not hide what another would show).

use std::{fmt, time::Duration};

use floodmark_dataflow::channel::CHANNEL_BYTES_MAX;
use floodmark_snapshot::{Step, coordination::BarrierKind};
use floodmark_worker::{CheckpointMode, RestartStrategy, SLICE_BYTES};

use crate::{inputs::DISORDER_MS, random::Random, topology::Topology, world::LATE_MAX};

/// Faults cease at the latest by then, in virtual time.
const FAULTS_UNTIL_MAX: Duration = Duration::from_secs(60);

/// Checkpoints in a row, undisturbed, that a file which none of them names may outlast.
pub(crate) const CHECKPOINTS_TO_CLEAN_UP: u32 = 36;

/// See [`Plan::delay_ms`]. With the first no row is late.
const DELAYS_MS: [i64; 4] = [DISORDER_MS, 400, 150, 0];

/// How often each kind of fault strikes: probabilities per request, poll or step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// A storage request is refused before it does anything (503).
    pub(crate) storage_refused: f64,
    /// A storage request does what it should, and its reply is lost.
    pub(crate) storage_reply_lost: f64,
    /// A storage request is lost before it does anything; the client waits for nothing.
    pub(crate) storage_lost: f64,
    /// A storage request takes long: it may take effect after its client has given up, or died.
    pub(crate) storage_slow: f64,
    /// A broker request fails before it does anything.
    pub(crate) broker_refused: f64,
    /// A commit is done, and its reply lost.
    pub(crate) broker_reply_lost: f64,
    /// Records are written, and the transaction stays open.
    pub(crate) transaction_left_open: f64,
    /// The request to commit arrives late, when others may have taken over.
    pub(crate) commit_late: f64,
    /// A source's poll fails.
    pub(crate) source_fails: f64,
    /// A task that is ready is left aside for up to half a second.
    pub(crate) task_pauses: f64,
    /// The wall clock jumps, at a reading.
    pub(crate) clock_jumps: f64,
}

impl Faults {
    fn draw(random: &mut Random) -> Self {
        let mut some = |most: f64| {
            if random.chance(0.5) {
                return 0.0;
            }
            // From a hundredth of the most to the most, each order of magnitude alike.
            most * 10_f64.powf(-2.0 * random.below(1000) as f64 / 1000.0)
        };
        Self {
            storage_refused: some(0.25),
            storage_reply_lost: some(0.2),
            storage_lost: some(0.1),
            storage_slow: some(0.2),
            broker_refused: some(0.5),
            broker_reply_lost: some(0.5),
            transaction_left_open: some(0.5),
            commit_late: some(0.4),
            source_fails: some(0.003),
            task_pauses: some(0.02),
            clock_jumps: some(0.1),
        }
    }
}

/// What happens to the job from outside.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Action {
    /// The newest process dies.
    Crash,
    /// It stops running for a while, then goes on as if nothing had been.
    Pause(Duration),
    /// It reaches neither storage nor broker for a while.
    CutOff(Duration),
    /// A new process takes over while the old one still runs.
    TakeOver,
    /// The old process is paused, a new one takes over, the old one wakes up.
    Zombie(Duration),
    /// The old process is cut off, a new one takes over, the old one's requests get through again.
    CutOffZombie(Duration),
    /// It is asked to stop with a last checkpoint.
    Stop,
    /// It is asked for a savepoint of this number, and to go on, stop, or drain.
    Savepoint(u64, BarrierKind),
    /// It is asked for so many subtasks per task.
    Rescale(u32),
}

impl Action {
    fn draw(random: &mut Random, topology: Topology) -> Self {
        let long = random.spread(Duration::from_millis(20), Duration::from_secs(30));
        match random.below(12) {
            0..=2 => Self::Crash,
            3 => Self::Pause(long),
            4 => Self::CutOff(long),
            5 => Self::TakeOver,
            6 => Self::Zombie(long),
            7 => Self::CutOffZombie(long),
            8 => Self::Stop,
            _ => {
                // Few names, so that some are asked for twice.
                let number = random.below(3);
                let then = match random.below(4) {
                    0 | 1 => BarrierKind::Checkpoint,
                    // What is drained has fired its windows early: the oracle of windows would not know.
                    2 if !topology.has_windows() => BarrierKind::Drain,
                    _ => BarrierKind::Stop,
                };
                Self::Savepoint(number, then)
            }
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Crash => f.write_str("the process dies"),
            Self::Pause(d) => write!(f, "the process stands still for {d:?}"),
            Self::CutOff(d) => write!(f, "the process is cut off for {d:?}"),
            Self::TakeOver => f.write_str("a new process takes over"),
            Self::Zombie(d) => write!(f, "the process stands still for {d:?}, and a new one takes over"),
            Self::CutOffZombie(d) => write!(f, "the process is cut off for {d:?}, and a new one takes over"),
            Self::Stop => f.write_str("the process is asked to stop"),
            Self::Savepoint(number, then) => write!(f, "the process is asked for savepoint {number}, then {then:?}"),
            Self::Rescale(to) => write!(f, "the process is asked for parallelism {to}"),
        }
    }
}

/// What happens to one of the newest coordinator's workers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum WorkerAction {
    /// It dies.
    Crash,
    /// It stops running for a while, then goes on as if nothing had been.
    Pause(Duration),
    /// It reaches nobody and nothing for a while.
    CutOff(Duration),
    /// Nothing passes between it and the coordinator for a while.
    Unheard(Duration),
    /// Nothing passes between it and another worker for a while.
    Apart(Duration),
    /// Its connections to the coordinator break.
    Sever,
    /// Its connections to another worker break.
    SeverChannels,
}

impl WorkerAction {
    fn draw(random: &mut Random) -> Self {
        let long = random.spread(Duration::from_millis(20), Duration::from_secs(30));
        match random.below(9) {
            0..=2 => Self::Crash,
            3 => Self::Pause(long),
            4 => Self::CutOff(long),
            5 => Self::Unheard(long),
            6 => Self::Apart(long),
            7 => Self::Sever,
            _ => Self::SeverChannels,
        }
    }
}

impl fmt::Display for WorkerAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Crash => f.write_str("the worker dies"),
            Self::Pause(d) => write!(f, "the worker stands still for {d:?}"),
            Self::CutOff(d) => write!(f, "the worker is cut off for {d:?}"),
            Self::Unheard(d) => write!(f, "the worker is not heard of by its coordinator for {d:?}"),
            Self::Apart(d) => write!(f, "the worker and another don't reach each other for {d:?}"),
            Self::Sever => f.write_str("the worker's connections to the coordinator break"),
            Self::SeverChannels => f.write_str("the worker's connections to another one break"),
        }
    }
}

/// What keeps the operators' keyed state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keeper {
    /// The simulator's operators by themselves.
    Own,
    /// The engine, on the heap.
    Heap,
    /// The engine, in RocksDB.
    RocksDb,
}

/// Checkpoint settings of the whole run.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoints {
    pub(crate) interval: Duration,
    pub(crate) timeout: Duration,
    pub(crate) min_pause: Duration,
    pub(crate) tolerable_failures: u32,
    pub(crate) retain: usize,
    pub(crate) max_concurrent: usize,
    pub(crate) unaligned_after: Option<Duration>,
    pub(crate) mode: CheckpointMode,
}

/// See the header of this file.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) topology: Topology,
    pub(crate) partitions: usize,
    /// Records per partition.
    pub(crate) records: usize,
    pub(crate) keys: i64,
    /// From the first record's arrival to the last's.
    pub(crate) arrival: Duration,
    pub(crate) max_parallelism: u16,
    /// Of the first process, the second, …; the last one's holds from then on.
    pub(crate) parallelism: Vec<u32>,
    pub(crate) checkpoints: Checkpoints,
    /// Whether operators write only what has changed, and name earlier shards again.
    pub(crate) incremental: bool,
    pub(crate) keeper: Keeper,
    /// How far rows may be behind the greatest time that was seen before they are late, where a job takes late rows at all.
    pub(crate) delay_ms: i64,
    /// Bytes of state that a subtask takes over at a time.
    pub(crate) slice_bytes: u64,
    /// What a channel holds, bytes.
    pub(crate) channel_bytes: usize,
    pub(crate) faults: Faults,
    pub(crate) faults_until: Duration,
    /// In order.
    pub(crate) actions: Vec<(Duration, Action)>,
    /// Worker processes beside that of the coordinator; 0: one process is both.
    pub(crate) workers: u32,
    /// Slices that each of them runs.
    pub(crate) slots: u32,
    /// What a packet takes from process to process.
    pub(crate) link_delay: Duration,
    /// In order, each to one of the workers that are there.
    pub(crate) worker_actions: Vec<(Duration, u64, WorkerAction)>,
    /// What happens when the protocol comes to a step for the nth time (counted from 0, over all processes).
    pub(crate) at_steps: Vec<(Step, u64, Action)>,
    /// What a process does by itself when its job fails.
    pub(crate) restarts: RestartStrategy,
    /// From a process's end to the next one's start.
    pub(crate) restart_delay: Duration,
    /// How long the broker lets a transaction stand open.
    pub(crate) transaction_timeout: Duration,
}

impl Plan {
    /// What this seed means; for a given topology, if there is one.
    pub(crate) fn draw(seed: u64, topology: Option<Topology>) -> Self {
        let random = &mut Random::new(seed, 1);
        let ms = Duration::from_millis;
        let drawn = *random.pick(&Topology::ALL);
        let topology = topology.unwrap_or(drawn);
        let arrival = random.spread(ms(50), ms(6000));
        let faults = Faults::draw(random);
        let mut actions = Vec::new();
        let span = (arrival * 2).max(ms(1500));
        // An eighth of all seeds have no actions, and so an undisturbed life but for faults.
        for _ in 0..random.below(8) {
            actions.push((Duration::from_nanos(random.below(span.as_nanos() as u64)), Action::draw(random, topology)));
        }
        // Moments that chance would rarely meet.
        let at_steps = (0..random.below(4))
            .map(|_| (*random.pick(&Step::ALL), random.below(12), Action::draw(random, topology)))
            .collect();
        actions.sort_by_key(|(at, _)| *at);
        let max_parallelism = *random.pick(&[4_u16, 5, 16, 128]);
        let change = random.chance(0.6);
        let first = random.between(1, 4) as u32;
        let parallelism = (0..8).map(|i| if i > 0 && change { random.between(1, 4) as u32 } else { first }).collect();
        let checkpoints = Checkpoints {
            interval: random.spread(ms(10), ms(1000)),
            timeout: random.spread(ms(200), ms(20_000)),
            min_pause: if random.chance(0.5) { Duration::ZERO } else { random.spread(ms(1), ms(300)) },
            tolerable_failures: *random.pick(&[0, 1, 3, 1000]),
            retain: random.between(1, 4) as usize,
            max_concurrent: if random.chance(0.5) { 1 } else { random.between(2, 4) as usize },
            unaligned_after: random.chance(0.5).then(|| random.spread(ms(1), ms(500))),
            mode: match random.below(20) {
                0..=16 => CheckpointMode::ExactlyOnce,
                17..=18 => CheckpointMode::AtLeastOnce,
                _ => CheckpointMode::Disabled,
            },
        };
        let mut plan = Self {
            seed,
            topology,
            partitions: random.between(1, 5) as usize,
            records: random.between(1, 150) as usize,
            keys: random.between(1, 12) as i64,
            arrival,
            max_parallelism,
            parallelism,
            checkpoints,
            incremental: random.chance(0.6),
            keeper: if topology.is_sql() || random.chance(0.6) { Keeper::Heap } else { Keeper::Own },
            delay_ms: *random.pick(if topology.takes_late_rows() { &DELAYS_MS } else { &DELAYS_MS[..1] }),
            slice_bytes: if random.chance(0.5) { SLICE_BYTES } else { random.between(1, 2000) },
            channel_bytes: if random.chance(0.4) { random.between(1, 2000) as usize } else { CHANNEL_BYTES_MAX },
            faults,
            faults_until: (span + random.spread(ms(100), ms(20_000))).min(FAULTS_UNTIL_MAX),
            actions,
            at_steps,
            restarts: match random.below(4) {
                0 => RestartStrategy::default(),
                1 => RestartStrategy::FixedDelay { attempts: 3, delay: random.spread(ms(1), ms(2000)) },
                _ => RestartStrategy::None,
            },
            restart_delay: random.spread(ms(5), ms(3000)),
            transaction_timeout: random.spread(ms(1000), ms(60_000)),
            workers: 0,
            slots: 0,
            link_delay: Duration::ZERO,
            worker_actions: Vec::new(),
        };
        if random.chance(0.08) {
            plan.outlast_faults();
        }
        // Without snapshots the output is that of one process, which then does everything.
        if plan.checkpoints.mode != CheckpointMode::Disabled && random.chance(0.4) {
            plan.spread_out(random, span);
        }
        plan.rescale(span);
        plan
    }

    /// Runs the subtasks in processes of their own.
    fn spread_out(&mut self, random: &mut Random, span: Duration) {
        self.workers = random.between(1, 3) as u32;
        let most = self.parallelism.iter().copied().max().unwrap_or(1);
        // Some have room for the slices of one that is lost.
        self.slots = most.div_ceil(self.workers) + random.below(2) as u32;
        self.link_delay = if random.chance(0.5) {
            Duration::ZERO
        } else {
            random.spread(Duration::from_micros(50), Duration::from_millis(20))
        };
        // A last checkpoint comes behind all records that wait for room in their channels, and a job that never has the time for
        // it would never end.
        self.checkpoints.timeout = self.checkpoints.timeout.max(self.link_delay * 2 * self.records as u32);
        for _ in 0..random.below(6) {
            let at = Duration::from_nanos(random.below(span.as_nanos() as u64));
            self.worker_actions.push((at, random.below(12), WorkerAction::draw(random)));
        }
        self.worker_actions.sort_by_key(|(at, ..)| *at);
    }

    /// Asks in half of all seeds for other parallelisms on the way, some of which can't be.
    fn rescale(&mut self, span: Duration) {
        let random = &mut Random::new(self.seed, 5);
        if random.chance(0.5) {
            return;
        }
        for _ in 0..random.between(1, 4) {
            let at = Duration::from_nanos(random.below(span.as_nanos() as u64));
            self.actions.push((at, Action::Rescale(random.between(1, 6) as u32)));
        }
        self.actions.sort_by_key(|(at, _)| *at);
        if random.chance(0.5) {
            let action = Action::Rescale(random.between(1, 4) as u32);
            self.at_steps.push((*random.pick(&Step::ALL), random.below(12), action));
        }
    }

    /// Lets the input go on for many checkpoints after the faults, and after what they have left on its way: time to clean up.
    fn outlast_faults(&mut self) {
        let settings = &mut self.checkpoints;
        settings.interval = settings.interval.min(Duration::from_millis(60));
        settings.min_pause = Duration::ZERO;
        let late = if self.faults.storage_slow > 0.0 { LATE_MAX } else { Duration::ZERO };
        self.arrival =
            self.faults_until + late + (settings.interval + Duration::from_millis(60)) * CHECKPOINTS_TO_CLEAN_UP * 2;
    }

    /// The same job without faults, and with no other actions than savepoints, rescales and stops.
    pub(crate) fn calm(mut self) -> Self {
        let harmless = |action: &Action| matches!(action, Action::Savepoint(..) | Action::Stop | Action::Rescale(_));
        self.faults = Faults::default();
        self.actions.retain(|(_, action)| harmless(action));
        self.at_steps.retain(|(_, _, action)| harmless(action));
        self.worker_actions.clear();
        // Short timeouts are for times of trouble.
        self.checkpoints.timeout = Duration::from_secs(20);
        self
    }

    /// A run of this topology without a single fault, with some ten checkpoints: what crash sweeps go through.
    pub(crate) fn for_sweep(topology: Topology, workers: u32, seed: u64) -> Self {
        let ms = Duration::from_millis;
        let mut plan = Self::draw(seed, Some(topology));
        plan.faults = Faults::default();
        plan.faults_until = Duration::ZERO;
        plan.actions.clear();
        plan.at_steps.clear();
        plan.worker_actions.clear();
        (plan.workers, plan.slots, plan.link_delay) = (workers, 1, Duration::ZERO);
        plan.partitions = 3;
        plan.records = 60;
        plan.keys = 5;
        plan.arrival = ms(400);
        plan.max_parallelism = 16;
        plan.parallelism = vec![2; 8];
        plan.checkpoints = Checkpoints {
            interval: ms(50),
            timeout: ms(10_000),
            min_pause: ms(0),
            tolerable_failures: 0,
            retain: 2,
            max_concurrent: 1,
            unaligned_after: None,
            mode: CheckpointMode::ExactlyOnce,
        };
        plan.restart_delay = ms(10);
        plan.incremental = true;
        plan.keeper = if topology.is_sql() { Keeper::Heap } else { Keeper::Own };
        plan.delay_ms = DISORDER_MS;
        plan.channel_bytes = CHANNEL_BYTES_MAX;
        plan.slice_bytes = 1;
        plan.restarts = RestartStrategy::None;
        plan
    }

    /// The same, from parallelism 2 to 3 and on to 1 while it runs.
    pub(crate) fn rescaled(mut self) -> Self {
        let ms = Duration::from_millis;
        self.actions = vec![(ms(120), Action::Rescale(3)), (ms(280), Action::Rescale(1))];
        self.faults_until = ms(400);
        self
    }

    /// The same job with its state in RocksDB.
    pub(crate) fn in_rocksdb(mut self) -> Self {
        self.keeper = Keeper::RocksDb;
        self
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = &self.checkpoints;
        writeln!(
            f,
            "seed {}: {:?}, {} partitions of {} records over {:?}, {} keys, {} key groups, parallelism {:?}",
            self.seed,
            self.topology,
            self.partitions,
            self.records,
            self.arrival,
            self.keys,
            self.max_parallelism,
            self.parallelism
        )?;
        writeln!(
            f,
            "checkpoints every {:?} (timeout {:?}, pause {:?}, {} failures tolerated, {} kept, {} at a time, unaligned after {:?}{}{})",
            c.interval,
            c.timeout,
            c.min_pause,
            c.tolerable_failures,
            c.retain,
            c.max_concurrent,
            c.unaligned_after,
            match c.mode {
                CheckpointMode::ExactlyOnce => "",
                CheckpointMode::AtLeastOnce => ", at least once",
                CheckpointMode::Disabled => ", disabled",
            },
            if self.incremental { ", incremental" } else { "" }
        )?;
        write!(
            f,
            "state kept by {:?} and restored by {} bytes, channels of {} bytes",
            self.keeper, self.slice_bytes, self.channel_bytes
        )?;
        let late = self.topology.takes_late_rows();
        writeln!(f, "{}", if late { format!(", rows late after {} ms", self.delay_ms) } else { String::new() })?;
        writeln!(f, "after a failure: {:?}", self.restarts)?;
        writeln!(f, "until {:?}: {:?}", self.faults_until, self.faults)?;
        for (at, action) in &self.actions {
            writeln!(f, "at {at:?}: {action}")?;
        }
        for (step, nth, action) in &self.at_steps {
            writeln!(f, "at {step}, number {nth}: {action}")?;
        }
        if self.workers > 0 {
            writeln!(
                f,
                "{} worker processes of {} slots, {:?} from each to each",
                self.workers, self.slots, self.link_delay
            )?;
        }
        for (at, which, action) in &self.worker_actions {
            writeln!(f, "at {at:?}: {action} (number {which}, in turn)")?;
        }
        Ok(())
    }
}
