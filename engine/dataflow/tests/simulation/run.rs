//! Runs a job from one seed: the tasks in any order, a coordinator with an eye on nothing but its rules, commands that reach
//! the tasks late, crashes, and restores from any completed checkpoint at another parallelism. One thread, no clock.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use floodmark_dataflow::{
    Barrier, BarrierKind, Exchange, RestoredShard,
    channel::{Inbox, Signal},
    exchange::Router,
    inflight::{InputChannel, concerns, share},
    source::WatermarkSpec,
    task::{
        ChainedOperator, Command, Commands, OperatorPart, Progress, SourceInput, SubtaskSpec, Task, TaskEvent,
        TaskInput,
    },
};
use floodmark_snapshot::{
    Clock, Env, Epoch, KeyGroupRange, Shard, ShardKind, SplitState, StateSchema, alignment::AlignmentMode,
};
use serde_json::json;

use crate::{
    job::{Head, Job, MAX_PARALLELISM, Random, Row},
    operators::{AllNotices, Buffer, Counter, CounterSplit, Keyed, Place, Stage, Window, rows},
};

/// Steps after which a run that has not ended hangs.
const STEPS_MAX: usize = 2_000_000;

/// Aborts after which a run is left alone, so that it ends.
const ABORTS_MAX: usize = 50;

/// Checkpoints after which only the last one follows, so that barriers don't crowd out rows.
const CHECKPOINTS_MAX: u64 = 50;

/// When the barriers of a checkpoint overtake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unalign {
    Never,
    /// Together with the trigger.
    AtOnce,
    /// Some time after it, or never.
    Later,
}

/// What happens to a run.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) unalign: Unalign,
    /// Bytes that a channel holds.
    pub(crate) bound: usize,
    /// Bytes of rows in flight that a task keeps.
    pub(crate) channel_state_max: usize,
    /// Checkpoints under way.
    pub(crate) concurrent: usize,
    /// One of so many scheduling decisions triggers a checkpoint.
    pub(crate) trigger_one_in: usize,
    /// One of so many checkpoints is aborted; 0 for none.
    pub(crate) abort_one_in: usize,
    /// One of so many checkpoints is a savepoint; 0 for none.
    pub(crate) whole_one_in: usize,
    /// Crashes at most.
    pub(crate) crashes: usize,
    /// Whether a restore may be at another parallelism, and from an older checkpoint.
    pub(crate) rescale: bool,
    pub(crate) parallelism: usize,
    /// How much slower than the others one task is.
    pub(crate) slow: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            unalign: Unalign::Later,
            bound: 300,
            channel_state_max: 1 << 30,
            concurrent: 1,
            trigger_one_in: 100,
            abort_one_in: 0,
            whole_one_in: 0,
            crashes: 2,
            rescale: true,
            parallelism: 3,
            slow: 8,
        }
    }
}

/// What a run went through.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Story {
    pub(crate) completed: usize,
    pub(crate) aborted: usize,
    pub(crate) declined: usize,
    pub(crate) restored: usize,
    /// Rows in flight in completed checkpoints, and those processed again after a restore.
    pub(crate) in_flight: u64,
    pub(crate) replayed: u64,
    /// Checkpoints that completed while a source had ended already.
    pub(crate) behind_the_end: usize,
    /// Most checkpoints under way at once.
    pub(crate) under_way: usize,
    /// Splits finished at a restore.
    pub(crate) finished_splits: usize,
}

impl Story {
    pub(crate) fn add(&mut self, other: Self) {
        self.completed += other.completed;
        self.aborted += other.aborted;
        self.declined += other.declined;
        self.restored += other.restored;
        self.in_flight += other.in_flight;
        self.replayed += other.replayed;
        self.behind_the_end += other.behind_the_end;
        self.under_way = self.under_way.max(other.under_way);
        self.finished_splits += other.finished_splits;
    }
}

/// A completed checkpoint, or one under way.
#[derive(Clone, Default)]
struct Snapshot {
    shards: BTreeMap<String, Vec<RestoredShard>>,
    splits: BTreeMap<String, Vec<SplitState>>,
    /// How much each sink had written when it was complete.
    written: Vec<usize>,
}

struct Flight {
    barrier: Barrier,
    missing: BTreeSet<usize>,
    snapshot: Snapshot,
    unaligned: bool,
}

struct Running {
    task: usize,
    index: u32,
    machine: Task,
    commands: Commands,
    /// Commands that are on their way to it.
    sent: VecDeque<Command>,
    reported: Epoch,
    done: bool,
}

/// What a barrier cut off at a sink.
type Staged = (Epoch, Vec<Row>);

struct NoTime;

impl Clock for NoTime {
    fn wall_ms(&self) -> i64 {
        0
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}

pub(crate) struct Run {
    job: Job,
    settings: Settings,
    random: Random,
    story: Story,
    tasks: Vec<Running>,
    slow: usize,
    epoch: Epoch,
    flights: BTreeMap<Epoch, Flight>,
    completed: BTreeMap<Epoch, Snapshot>,
    exhausted: usize,
    stopping: bool,
    /// No checkpoint has completed since the last restore.
    fresh: bool,
    /// What each sink's subtasks have staged and not written, in the order of epochs.
    staged: BTreeMap<(usize, u32), Vec<Staged>>,
    written: Vec<Vec<Row>>,
    notices: AllNotices,
    aborts_sent: BTreeMap<(usize, u32), usize>,
}

/// Runs a job to its end and checks what came of it.
pub(crate) fn run(job: &Job, settings: &Settings, seed: u64) -> Story {
    let mut random = Random(seed ^ 0x9E37_79B9_7F4A_7C15);
    random.below(2);
    let tasks = job.heads.len();
    let mut run = Run {
        job: job.clone(),
        settings: settings.clone(),
        random,
        story: Story::default(),
        tasks: Vec::new(),
        slow: 0,
        epoch: Epoch(0),
        flights: BTreeMap::new(),
        completed: BTreeMap::new(),
        exhausted: 0,
        stopping: false,
        fresh: true,
        staged: BTreeMap::new(),
        written: vec![Vec::new(); tasks],
        notices: AllNotices::default(),
        aborts_sent: BTreeMap::new(),
    };
    let parallelism = run.job.parallelism(&mut run.random, settings.parallelism);
    run.build(&parallelism, None);
    run.drive(parallelism);
    for sink in (0..tasks).filter(|t| job.is_sink(*t)) {
        job.check(sink, &run.written[sink]);
    }
    run.story
}

impl Run {
    fn drive(&mut self, mut parallelism: Vec<u32>) {
        let mut crashes = 0;
        for _ in 0..STEPS_MAX {
            if self.tasks.iter().all(|t| t.done) && self.stopping && self.flights.is_empty() {
                self.check_notices();
                return;
            }
            // Mostly there is something new to restore; sometimes not even the last restore is over.
            let crash_one_in = if self.fresh { 1500 } else { 300 };
            if crashes < self.settings.crashes && self.random.one_in(crash_one_in) {
                crashes += 1;
                self.crash(&mut parallelism);
            }
            self.coordinate();
            let i = self.random.below(self.tasks.len());
            if let Some(command) = self.tasks[i].sent.pop_front() {
                self.tasks[i].commands.send(command);
                continue;
            }
            let slow = self.tasks[i].task == self.slow && !self.random.one_in(self.settings.slow);
            if !slow && !self.tasks[i].done {
                self.step(i);
            }
        }
        panic!("the run hangs: {:?}, under way {:?}", self.story, self.flights.keys());
    }

    fn step(&mut self, i: usize) {
        let mut events = Vec::new();
        let progress = self.tasks[i].machine.step(&mut events).unwrap();
        self.tasks[i].done = progress == Progress::Done;
        for event in events {
            match event {
                TaskEvent::Snapshot { barrier, parts } => self.reported(i, barrier, parts),
                TaskEvent::Declined { epoch, .. } => {
                    if self.flights.contains_key(&epoch) {
                        self.story.declined += 1;
                        self.abort(epoch);
                    }
                }
                TaskEvent::Exhausted => self.exhausted += 1,
                TaskEvent::Restored | TaskEvent::Ended => {}
            }
        }
    }

    /// What a coordinator may do at any moment.
    fn coordinate(&mut self) {
        let sources = self.tasks.iter().filter(|t| self.job.heads[t.task] == Head::Source).count();
        let over = self.exhausted == sources;
        let told = self.tasks.iter().all(|t| t.sent.is_empty());
        if over && told && !self.stopping && self.flights.is_empty() && self.random.one_in(5) {
            self.stopping = true;
            self.trigger(Barrier { kind: BarrierKind::Stop, ..Barrier::checkpoint(self.epoch.next()) });
        } else if !self.stopping
            && self.epoch.0 < CHECKPOINTS_MAX
            && self.flights.len() < if over { 1 } else { self.settings.concurrent }
            && self.random.one_in(self.settings.trigger_one_in)
        {
            let whole = self.settings.whole_one_in > 0 && self.random.one_in(self.settings.whole_one_in);
            self.trigger(Barrier { whole, ..Barrier::checkpoint(self.epoch.next()) });
        }
        let later = self.settings.unalign == Unalign::Later && self.random.one_in(60);
        let due = |f: &&Flight| !f.unaligned && f.barrier.may_overtake();
        if later && let Some(epoch) = self.flights.values().find(due).map(|f| f.barrier.epoch) {
            self.unalign(epoch);
        }
        if !self.flights.is_empty() && self.settings.abort_one_in > 0 && self.story.aborted < ABORTS_MAX {
            let epochs: Vec<Epoch> = self.flights.keys().copied().collect();
            let epoch = self.random.pick(&epochs);
            if !self.flights[&epoch].barrier.stops() && self.random.one_in(150 * self.settings.abort_one_in) {
                self.abort(epoch);
            }
        }
    }

    fn trigger(&mut self, barrier: Barrier) {
        self.epoch = barrier.epoch;
        let missing = (0..self.tasks.len()).collect();
        self.flights.insert(self.epoch, Flight { barrier, missing, snapshot: Snapshot::default(), unaligned: false });
        self.story.under_way = self.story.under_way.max(self.flights.len());
        for task in self.tasks.iter_mut().filter(|t| self.job.heads[t.task] == Head::Source) {
            task.sent.push_back(Command::Trigger(barrier));
        }
        if self.settings.unalign == Unalign::AtOnce && barrier.may_overtake() {
            self.unalign(barrier.epoch);
        }
    }

    fn unalign(&mut self, epoch: Epoch) {
        self.flights.get_mut(&epoch).unwrap().unaligned = true;
        self.tasks.iter_mut().for_each(|t| t.sent.push_back(Command::Unalign(epoch)));
    }

    fn abort(&mut self, epoch: Epoch) {
        self.flights.remove(&epoch).unwrap();
        self.story.aborted += 1;
        for task in &mut self.tasks {
            task.sent.push_back(Command::Abort(epoch));
            *self.aborts_sent.entry((task.task, task.index)).or_default() += 1;
        }
    }

    fn reported(&mut self, i: usize, barrier: Barrier, parts: Vec<OperatorPart>) {
        let (task, index) = (self.tasks[i].task, self.tasks[i].index);
        let epoch = barrier.epoch;
        assert!(self.tasks[i].reported < epoch, "{task}.{index} reported {epoch} after {}", self.tasks[i].reported);
        self.tasks[i].reported = epoch;
        let mut snapshot = Snapshot::default();
        for part in parts {
            let uid = part.uid.0;
            snapshot.splits.entry(uid.clone()).or_default().extend(part.splits);
            for (n, pending) in part.shards.into_iter().enumerate() {
                let bytes = (pending.encode)().unwrap();
                if pending.kind == ShardKind::Staged {
                    let rows = serde_json::from_slice(&bytes).unwrap();
                    self.staged.entry((task, index)).or_default().push((epoch, rows));
                    continue;
                }
                if pending.kind == ShardKind::Channel {
                    assert!(barrier.may_overtake() && pending.rows > 0, "{barrier} has rows in flight");
                }
                let shard = Shard {
                    subtask: index,
                    rows: pending.rows,
                    name: pending.name,
                    key_groups: pending.key_groups,
                    ..Shard::new(format!("{epoch}/{uid}/{index}/{n}"), pending.kind)
                };
                snapshot.shards.entry(uid.clone()).or_default().push(RestoredShard::new(shard, bytes));
            }
        }
        let Some(flight) = self.flights.get_mut(&epoch) else { return };
        assert!(flight.missing.remove(&i), "{task}.{index} reported {epoch} twice");
        for (uid, shards) in snapshot.shards {
            flight.snapshot.shards.entry(uid).or_default().extend(shards);
        }
        for (uid, splits) in snapshot.splits {
            flight.snapshot.splits.entry(uid).or_default().extend(splits);
        }
        if flight.missing.is_empty() {
            self.complete(epoch);
        }
    }

    fn complete(&mut self, epoch: Epoch) {
        let Flight { snapshot, barrier, .. } = self.flights.remove(&epoch).unwrap();
        // As the coordinator does: what is older has lost its use.
        for older in self.flights.range(..epoch).map(|(e, _)| *e).collect::<Vec<_>>() {
            self.abort(older);
        }
        for ((task, _), staged) in &mut self.staged {
            for (_, rows) in staged.extract_if(.., |(of, _)| *of <= epoch) {
                self.written[*task].extend(rows);
            }
        }
        self.story.completed += 1;
        self.fresh = false;
        self.story.behind_the_end += usize::from(self.exhausted > 0 && !barrier.stops());
        let channel = |s: &&RestoredShard| s.shard.kind == ShardKind::Channel;
        self.story.in_flight += snapshot.shards.values().flatten().filter(channel).map(|s| s.shard.rows).sum::<u64>();
        let written = self.written.iter().map(Vec::len).collect();
        self.completed.insert(epoch, Snapshot { written, ..snapshot });
        self.tasks.iter_mut().for_each(|t| t.sent.push_back(Command::Completed(epoch)));
    }

    /// Everything but what is durable is gone.
    fn crash(&mut self, parallelism: &mut Vec<u32>) {
        let epochs: Vec<Epoch> = self.completed.keys().copied().collect();
        let from = if self.settings.rescale && !epochs.is_empty() {
            Some(self.random.pick(&epochs))
        } else {
            epochs.last().copied()
        };
        if self.settings.rescale {
            *parallelism = self.job.parallelism(&mut self.random, self.settings.parallelism);
        }
        self.tasks.clear();
        self.flights.clear();
        self.staged.clear();
        self.notices.lock().unwrap().clear();
        self.aborts_sent.clear();
        (self.exhausted, self.stopping, self.fresh) = (0, false, true);
        let snapshot = from.map(|epoch| self.completed[&epoch].clone());
        for (task, written) in self.written.iter_mut().enumerate() {
            written.truncate(snapshot.as_ref().map_or(0, |s| s.written[task]));
        }
        self.completed.retain(|epoch, _| Some(*epoch) <= from);
        self.story.restored += usize::from(snapshot.is_some());
        self.build(&parallelism.clone(), snapshot.as_ref());
    }

    /// Makes all tasks, with the state that `snapshot` holds of them.
    fn build(&mut self, parallelism: &[u32], snapshot: Option<&Snapshot>) {
        let tasks = parallelism.len();
        self.slow = self.random.below(tasks);
        let signal = Arc::new(Signal::default());
        let subtasks = |t: usize| 0..parallelism[t] as usize;
        let mut inboxes: Vec<Vec<(Inbox, Vec<InputChannel>)>> = (0..tasks)
            .map(|t| subtasks(t).map(|_| (Inbox::bounded(signal.clone(), self.settings.bound), Vec::new())).collect())
            .collect();
        let mut outputs: Vec<Vec<Vec<Router>>> =
            (0..tasks).map(|t| subtasks(t).map(|_| Vec::new()).collect()).collect();
        for edge in &self.job.edges {
            for from in subtasks(edge.from) {
                let forward = edge.exchange == Exchange::Forward;
                let mut senders = Vec::new();
                for to in subtasks(edge.to).filter(|to| !forward || *to == from) {
                    let owned = KeyGroupRange::of_subtask(to as u32, parallelism[edge.to], MAX_PARALLELISM);
                    let (inbox, channels) = &mut inboxes[edge.to][to];
                    channels.push(InputChannel {
                        port: edge.port,
                        input: format!("{} to {}", edge.from, edge.port).into(),
                        key_groups: matches!(edge.exchange, Exchange::Hash(_)).then_some(owned),
                        in_order: forward,
                    });
                    senders.push(inbox.channel(signal.clone()));
                }
                outputs[edge.from][from].push(Router::new(edge.exchange.clone(), MAX_PARALLELISM, senders));
            }
        }
        let (ways, empty) = (self.job.ways(), Snapshot::default());
        let snapshot = snapshot.unwrap_or(&empty);
        for (task, ways) in ways.into_iter().enumerate() {
            let ways = Arc::new(ways);
            let ends = inboxes[task].drain(..).zip(outputs[task].drain(..)).collect::<Vec<_>>();
            for (index, ((inbox, channels), outputs)) in ends.into_iter().enumerate() {
                let index = index as u32;
                let place = Place {
                    task,
                    index,
                    owned: KeyGroupRange::of_subtask(index, parallelism[task], MAX_PARALLELISM),
                    ways: ways.clone(),
                    notices: self.notices.clone(),
                };
                let machine = self.task(place, parallelism[task], (inbox, channels), outputs, snapshot, &signal);
                let commands = machine.commands();
                let sent = VecDeque::new();
                self.tasks.push(Running { task, index, machine, commands, sent, reported: Epoch(0), done: false });
            }
        }
    }

    fn task(
        &mut self,
        place: Place,
        parallelism: u32,
        (inbox, channels): (Inbox, Vec<InputChannel>),
        outputs: Vec<Router>,
        snapshot: &Snapshot,
        signal: &Arc<Signal>,
    ) -> Task {
        let Place { task, index, .. } = place;
        let uid = format!("task{task}");
        let shards = snapshot.shards.get(&uid).map_or(&[][..], Vec::as_slice);
        let mut replay = Vec::new();
        let mut chain = Vec::new();
        let (mut input, head) = (None, self.job.heads[task]);
        if head == Head::Source {
            input = Some(TaskInput::Source(self.source(&place, parallelism, snapshot.splits.get(&uid))));
        } else {
            let mut operator: Box<dyn floodmark_dataflow::Operator> = match head {
                Head::Source | Head::Buffer => Box::new(Buffer { place, held: Vec::new() }),
                Head::Keyed => Box::new(Keyed { place, seen: BTreeMap::new() }),
                Head::Window => Box::new(Window::new(place)),
            };
            operator.restore(shards.to_vec()).unwrap();
            chain.push((uid.clone(), head != Head::Buffer, operator));
            let concerned = |s: &&RestoredShard| concerns(&s.shard, index, parallelism, MAX_PARALLELISM);
            let mine: Vec<_> = shards.iter().filter(concerned).cloned().collect();
            replay = share(&mine, &channels, index, parallelism, MAX_PARALLELISM).unwrap();
            self.story.replayed += replay.iter().map(|r| r.batch.len() as u64).sum::<u64>();
        }
        if self.job.is_sink(task) {
            chain.push((format!("sink{task}"), true, Box::<Stage>::default()));
        }
        let chained = |(uid, state, operator): (String, bool, Box<dyn floodmark_dataflow::Operator>)| ChainedOperator {
            uid: uid.as_str().into(),
            kind: "simulated".into(),
            state_schema: state.then(StateSchema::default),
            operator,
            metrics: Arc::default(),
        };
        let spec = SubtaskSpec {
            index,
            parallelism,
            input: input.unwrap_or(TaskInput::Channels(inbox, channels)),
            replay,
            arrivals: None,
            chain: chain.into_iter().map(chained).collect(),
            outputs,
            snapshots: Some(AlignmentMode::ExactlyOnce),
            signal: signal.clone(),
        };
        let env = Env { clock: Arc::new(NoTime), ..Env::system() };
        Task::new(spec, env).with_channel_state_max(self.settings.channel_state_max)
    }

    fn source(&mut self, place: &Place, parallelism: u32, restored: Option<&Vec<SplitState>>) -> SourceInput {
        let task = place.task;
        let fresh = |split: usize| SplitState {
            split: split.to_string(),
            position: json!(0),
            watermark: None,
            finished: false,
        };
        let state = |split: usize| {
            let known = restored.and_then(|r| r.iter().find(|s| s.split == split.to_string()));
            known.cloned().unwrap_or_else(|| fresh(split))
        };
        let mine = (0..self.job.splits[task].len()).skip(place.index as usize).step_by(parallelism as usize);
        let mine: Vec<SplitState> = mine.map(state).collect();
        self.story.finished_splits += mine.iter().filter(|s| s.finished).count();
        let splits = mine.iter().map(|s| {
            let number = s.split.parse().unwrap();
            let (next, end) = (s.position.as_i64().unwrap(), self.job.splits[task][number]);
            CounterSplit { number, next, end, finished: s.finished }
        });
        let splits = splits.collect();
        let random = Random(self.random.below(1 << 30) as u64);
        SourceInput {
            uid: format!("task{task}").as_str().into(),
            kind: "counter".into(),
            source: Box::new(Counter { task, splits, random, completed: Epoch(0) }),
            compute: None,
            watermark: Some(WatermarkSpec {
                event_time: Arc::new(|batch| Ok(rows(batch).iter().map(|r| r[2]).max())),
                idle_timeout: None,
            }),
            splits: mine,
            metrics: Arc::default(),
        }
    }

    /// Every operator has been told of each abort once. (Twice would have failed at once.)
    fn check_notices(&self) {
        let notices = self.notices.lock().unwrap();
        for Running { task, index, .. } in self.tasks.iter().filter(|t| self.job.heads[t.task] != Head::Source) {
            let told = notices.get(&(*task, *index)).map_or(0, |n| n.aborted);
            let sent = self.aborts_sent.get(&(*task, *index)).copied().unwrap_or_default();
            assert_eq!(told, sent, "aborts that the operator in {task}.{index} was told");
        }
    }
}
