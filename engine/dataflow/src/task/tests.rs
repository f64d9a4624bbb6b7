//! Drives small graphs from a seeded schedule and checks that every snapshot is a consistent cut.

use std::collections::BTreeMap;

use arrow::{
    array::{AsArray, Int64Array},
    datatypes::Int64Type,
    record_batch::RecordBatch,
};
use bytes::Bytes;
use floodmark_snapshot::ShardKind;
use serde_json::json;

use super::*;
use crate::{
    BarrierKind, Exchange, Operator, Output, StateSnapshot,
    metrics::{Times, tests::ByHand},
};

/// Brings the numbers `0..end`, a few at a time.
struct Numbers {
    next: i64,
    end: i64,
}

impl Source for Numbers {
    fn poll(&mut self, _: Duration) -> Result<Polled> {
        if self.next == self.end {
            return Ok(Polled::Exhausted);
        }
        let to = (self.next + 3).min(self.end);
        let column = Arc::new((self.next..to).collect::<Int64Array>());
        self.next = to;
        Ok(Polled::Batch { split: 0, rows: RecordBatch::try_from_iter([("n", column as _)]).unwrap() })
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        Ok(vec![SplitState { split: "0".into(), position: json!(self.next), watermark: None, finished: false }])
    }
}

/// Adds up what comes and passes it on; its state is the sum.
struct Sum(i64);

impl Operator for Sum {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        self.0 += batch.rows.column(0).as_primitive::<Int64Type>().values().iter().sum::<i64>();
        out.emit(Batch::new(batch.rows));
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let sum = Bytes::from(self.0.to_string());
        Ok(StateSnapshot::of(vec![PendingShard::new(ShardKind::Keyed, None, 1, Box::new(|| Ok(sum)))]))
    }
}

fn sum(name: &str) -> ChainedOperator {
    ChainedOperator {
        uid: name.into(),
        kind: "sum".into(),
        state_schema: Some(StateSchema::default()),
        operator: Box::new(Sum(0)),
        metrics: Arc::default(),
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }
}

/// Two sources (one much longer), both dealt out by hash to two middle subtasks, both joined in one last task.
fn diamond(mode: AlignmentMode) -> Vec<Task> {
    let env = Env::system();
    let signal = Arc::new(Signal::default());
    let mut last = Inbox::new(signal.clone());
    let mut middle: Vec<Inbox> = (0..2).map(|_| Inbox::new(signal.clone())).collect();
    let mut tasks = Vec::new();
    let spec = |input, chain, outputs| SubtaskSpec {
        index: 0,
        parallelism: 1,
        input,
        replay: Vec::new(),
        arrivals: None,
        chain,
        outputs,
        snapshots: Some(mode),
        signal: signal.clone(),
    };
    for (name, end) in [("short", 30), ("long", 200)] {
        let senders = middle.iter_mut().map(|i| i.channel(signal.clone())).collect();
        let source = SourceInput {
            uid: name.into(),
            kind: "numbers".into(),
            source: Box::new(Numbers { next: 0, end }),
            compute: None,
            watermark: None,
            splits: vec![SplitState { split: "0".into(), position: json!(0), watermark: None, finished: false }],
            metrics: Arc::default(),
        };
        let router = Router::new(Exchange::Hash(vec![0]), 128, senders);
        tasks.push(Task::new(spec(TaskInput::Source(source), Vec::new(), vec![router]), env.clone()));
    }
    for (i, inbox) in middle.into_iter().enumerate() {
        let router = Router::new(Exchange::Forward, 128, vec![last.channel(signal.clone())]);
        let chain = vec![sum(&format!("middle{i}"))];
        tasks.push(Task::new(
            spec(TaskInput::Channels(inbox, vec![InputChannel::to_port(0); 2]), chain, vec![router]),
            env.clone(),
        ));
    }
    tasks.push(Task::new(
        spec(TaskInput::Channels(last, vec![InputChannel::to_port(0); 2]), vec![sum("last")], Vec::new()),
        env,
    ));
    tasks
}

/// What a snapshot says: the sum of all numbers before the sources' positions, of the middle tasks, of the last task.
fn check_cuts(seed: u64, mode: AlignmentMode, check: impl Fn(u64, i64, i64, i64)) {
    let mut tasks = diamond(mode);
    let commands: Vec<Commands> = tasks.iter().map(Task::commands).collect();
    let mut random = Random(seed);
    let mut snapshots: BTreeMap<Epoch, (i64, i64, i64, usize)> = BTreeMap::new();
    let mut done = vec![false; tasks.len()];
    let (mut exhausted, mut epoch) = (0, Epoch(0));
    while done.iter().any(|d| !d) {
        let due = exhausted == 2 || (exhausted < 2 && random.below(20) == 0);
        if due && epoch.0 < 20 && snapshots.get(&epoch).is_none_or(|s| s.3 == tasks.len()) {
            epoch = epoch.next();
            let kind = if exhausted == 2 { BarrierKind::Stop } else { BarrierKind::Checkpoint };
            snapshots.insert(epoch, (0, 0, 0, 0));
            let barrier = Barrier { kind, ..Barrier::checkpoint(epoch) };
            commands[..2].iter().for_each(|c| c.send(Command::Trigger(barrier)));
            if mode == AlignmentMode::AtLeastOnce {
                // Has no effect: nothing overtakes where nothing is kept apart.
                commands.iter().for_each(|c| c.send(Command::Unalign(epoch)));
            }
            if kind == BarrierKind::Stop {
                exhausted = 3;
            }
        }
        let i = random.below(tasks.len());
        if done[i] {
            continue;
        }
        let mut events = Vec::new();
        done[i] = tasks[i].step(&mut events).unwrap() == Progress::Done;
        for event in events {
            match event {
                TaskEvent::Exhausted => exhausted += 1,
                TaskEvent::Restored | TaskEvent::Ended | TaskEvent::Declined { .. } => {}
                TaskEvent::Snapshot { barrier, parts } => {
                    let snapshot = snapshots.get_mut(&barrier.epoch).unwrap();
                    snapshot.3 += 1;
                    for part in parts {
                        for split in &part.splits {
                            let n = split.position.as_i64().unwrap();
                            snapshot.0 += n * (n - 1) / 2;
                        }
                        for shard in part.shards {
                            assert_eq!(shard.kind, ShardKind::Keyed, "rows in flight");
                            let text = (shard.encode)().unwrap();
                            let sum: i64 = std::str::from_utf8(&text).unwrap().parse().unwrap();
                            *if part.uid.0 == "last" { &mut snapshot.2 } else { &mut snapshot.1 } += sum;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(exhausted, 3, "ended by a stop barrier");
    for (epoch, (read, middle, last, parts)) in snapshots {
        assert_eq!(parts, tasks.len(), "epoch {epoch}");
        check(epoch.0, read, middle, last);
    }
}

#[test]
fn every_snapshot_is_a_consistent_cut_whatever_the_schedule() {
    for seed in 0..200 {
        check_cuts(seed, AlignmentMode::ExactlyOnce, |epoch, read, middle, last| {
            assert_eq!((read, read), (middle, last), "seed {seed} epoch {epoch}");
        });
    }
}

#[test]
fn without_alignment_a_snapshot_misses_nothing_but_may_hold_more() {
    let more = std::cell::Cell::new(0);
    for seed in 0..200 {
        check_cuts(seed, AlignmentMode::AtLeastOnce, |epoch, read, middle, last| {
            assert!(middle >= read && last >= read, "seed {seed} epoch {epoch}");
            more.set(more.get() + i32::from(middle > read || last > middle));
        });
    }
    assert!(more.get() > 0, "alignment makes a difference");
}

/// A task of one channel, `up to 0`, whose chain is a sum, and the sending end of the channel.
fn one_input(replay: Vec<InFlight>, outputs: Vec<Router>) -> (Task, crate::channel::Sender) {
    let signal = Arc::new(Signal::default());
    let mut inbox = Inbox::new(signal.clone());
    let sender = inbox.channel(signal.clone());
    let spec = SubtaskSpec {
        index: 0,
        parallelism: 1,
        input: TaskInput::Channels(inbox, vec![up()]),
        replay,
        arrivals: None,
        chain: vec![sum("sum")],
        outputs,
        snapshots: Some(AlignmentMode::ExactlyOnce),
        signal,
    };
    (Task::new(spec, Env::system()), sender)
}

fn up() -> InputChannel {
    InputChannel { input: "up to 0".into(), ..InputChannel::to_port(0) }
}

fn number(n: i64) -> Batch {
    Batch::new(RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(vec![n])) as _)]).unwrap())
}

/// Steps until the task waits, and answers with its events.
fn settle(task: &mut Task) -> Vec<TaskEvent> {
    let mut events = Vec::new();
    while task.step(&mut events).unwrap() == Progress::Ready {}
    events
}

/// The sum and the rows in flight of a snapshot.
fn parts_of(event: TaskEvent) -> (Epoch, i64, Vec<i64>) {
    let TaskEvent::Snapshot { barrier, parts } = event else { panic!("{event:?}") };
    let (mut sum, mut in_flight) = (0, Vec::new());
    for pending in parts.into_iter().flat_map(|p| p.shards) {
        let PendingShard { kind, name, rows, encode, .. } = pending;
        let bytes = encode().unwrap();
        if kind == ShardKind::Keyed {
            sum = std::str::from_utf8(&bytes).unwrap().parse().unwrap();
        } else {
            let shard = Shard { name, rows, ..Shard::new("", kind) };
            let shards = [crate::RestoredShard::new(shard, bytes)];
            let replay = crate::inflight::share(&shards, &[up()], 0, 1, 128).unwrap();
            in_flight.extend(
                replay.iter().flat_map(|r| r.batch.rows.column(0).as_primitive::<Int64Type>().values().to_vec()),
            );
        }
    }
    (barrier.epoch, sum, in_flight)
}

#[test]
fn an_unaligned_barrier_during_a_replay_keeps_what_is_left_of_it_and_then_what_is_in_the_channel() {
    let in_flight = |n| InFlight { input: "up to 0".into(), port: 0, batch: number(n) };
    let (mut task, sender) = one_input((1..=3).map(in_flight).collect(), Vec::new());
    let mut events = Vec::new();
    task.step(&mut events).unwrap();
    sender.try_send(Frame::Batch(number(10))).unwrap();
    sender.try_send(Frame::Overtaking(Barrier::checkpoint(Epoch(1)))).unwrap();
    sender.try_send(Frame::Batch(number(100))).unwrap();
    task.step(&mut events).unwrap();
    assert_eq!(parts_of(events.pop().unwrap()), (Epoch(1), 1, vec![2, 3, 10]));
    assert!(settle(&mut task).is_empty());
    sender.try_send(Frame::Barrier(Barrier::checkpoint(Epoch(2)))).unwrap();
    assert_eq!(settle(&mut task).into_iter().map(parts_of).collect::<Vec<_>>(), [(Epoch(2), 116, vec![])]);
}

#[test]
fn a_barrier_overtakes_though_the_task_waits_for_room() {
    let signal = Arc::new(Signal::default());
    let mut next = Inbox::bounded(signal.clone(), 1);
    let router = Router::new(Exchange::Rebalance, 128, vec![next.channel(signal)]);
    let (mut task, sender) = one_input(Vec::new(), vec![router]);
    for n in 1..=3 {
        sender.try_send(Frame::Batch(number(n))).unwrap();
    }
    assert!(settle(&mut task).is_empty());
    sender.try_send(Frame::Barrier(Barrier::checkpoint(Epoch(1)))).unwrap();
    assert!(settle(&mut task).is_empty(), "aligned, it waits behind row 3");
    task.commands().send(Command::Unalign(Epoch(1)));
    let snapshots: Vec<_> = settle(&mut task).into_iter().map(parts_of).collect();
    assert_eq!(snapshots, [(Epoch(1), 3, vec![3])]);
    assert_eq!(next.waiting_barriers()[0].overtaking, Epoch(1));
    assert_eq!(next.take_barrier(0, Epoch(1)).len(), 2, "rows 1 and 2 are the next task's to keep");
}

/// A source of numbers behind one router, and the inbox that it leads to.
fn one_source(completed: Arc<Mutex<Vec<(Epoch, serde_json::Value)>>>) -> (Task, Inbox) {
    struct Watched(Numbers, Arc<Mutex<Vec<(Epoch, serde_json::Value)>>>);

    impl Source for Watched {
        fn poll(&mut self, wait: Duration) -> Result<Polled> {
            self.0.poll(wait)
        }

        fn positions(&self) -> Result<Vec<SplitState>> {
            self.0.positions()
        }

        fn on_completed(&mut self, epoch: Epoch, positions: &[SplitState]) -> Result<()> {
            self.1.lock().unwrap().push((epoch, positions[0].position.clone()));
            Ok(())
        }
    }

    let signal = Arc::new(Signal::default());
    let mut next = Inbox::new(signal.clone());
    let source = SourceInput {
        uid: "numbers".into(),
        kind: "numbers".into(),
        source: Box::new(Watched(Numbers { next: 0, end: 100 }, completed)),
        compute: None,
        watermark: None,
        splits: vec![SplitState { split: "0".into(), position: json!(0), watermark: None, finished: false }],
        metrics: Arc::default(),
    };
    let spec = SubtaskSpec {
        index: 0,
        parallelism: 1,
        input: TaskInput::Source(source),
        replay: Vec::new(),
        arrivals: None,
        chain: Vec::new(),
        outputs: vec![Router::new(Exchange::Rebalance, 128, vec![next.channel(signal.clone())])],
        snapshots: Some(AlignmentMode::ExactlyOnce),
        signal,
    };
    (Task::new(spec, Env::system()), next)
}

#[test]
fn a_source_remembers_the_positions_of_all_checkpoints_under_way() {
    let completed = Arc::default();
    let (mut task, _next) = one_source(Arc::clone(&completed));
    let commands = task.commands();
    let mut events = Vec::new();
    for epoch in 1..=4 {
        task.step(&mut events).unwrap();
        commands.send(Command::Trigger(Barrier::checkpoint(Epoch(epoch))));
        task.step(&mut events).unwrap();
    }
    for command in [
        Command::Completed(Epoch(1)),
        Command::Abort(Epoch(2)),
        Command::Completed(Epoch(2)),
        Command::Completed(Epoch(4)),
        Command::Completed(Epoch(3)),
    ] {
        commands.send(command);
        task.step(&mut events).unwrap();
    }
    assert_eq!(*completed.lock().unwrap(), [(Epoch(1), json!(3)), (Epoch(4), json!(12))]);
}

#[test]
fn a_drain_brings_event_time_to_its_end_before_the_last_barrier() {
    let (mut task, mut next) = one_source(Arc::default());
    let barrier = Barrier { kind: BarrierKind::Drain, ..Barrier::checkpoint(Epoch(1)) };
    task.commands().send(Command::Trigger(barrier));
    let mut events = Vec::new();
    while task.step(&mut events).unwrap() != Progress::Done {}
    let frames: Vec<_> = std::iter::from_fn(|| next.try_recv(|_| false)).map(|(_, frame)| frame).collect();
    let [Frame::Watermark(WATERMARK_MAX), Frame::Barrier(last), Frame::End] = &frames[..] else {
        panic!("{frames:?}");
    };
    assert_eq!(*last, barrier);
}

/// A source and an operator that take their time.
struct Slow {
    clock: Arc<ByHand>,
    /// What the next polls bring; `None` is nothing for now.
    polls: VecDeque<Option<i64>>,
}

impl Slow {
    fn takes(&self, time: Duration) {
        *self.clock.0.lock().unwrap() += time;
    }
}

impl Source for Slow {
    fn poll(&mut self, wait: Duration) -> Result<Polled> {
        let Some(number) = self.polls.pop_front().flatten() else {
            self.takes(wait);
            return Ok(Polled::Pending);
        };
        self.takes(Duration::from_millis(3));
        let column = Arc::new(Int64Array::from(vec![number]));
        Ok(Polled::Batch { split: 0, rows: RecordBatch::try_from_iter([("n", column as _)]).unwrap() })
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        Ok(vec![SplitState { split: "0".into(), position: json!(0), watermark: None, finished: false }])
    }
}

impl Operator for Slow {
    fn process(&mut self, _: Port, batch: Batch, out: &mut Output) -> Result<()> {
        self.takes(Duration::from_millis(7));
        out.emit(batch);
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        Ok(StateSnapshot::default())
    }
}

#[test]
fn all_of_a_tasks_time_is_work_or_waiting_for_input_or_for_room() {
    let clock = Arc::new(ByHand::default());
    let slow = |polls: &[Option<i64>]| Slow { clock: clock.clone(), polls: polls.iter().copied().collect() };
    let signal = Arc::new(Signal::default());
    let mut next = Inbox::bounded(signal.clone(), 1);
    let source = SourceInput {
        uid: "slow".into(),
        kind: "slow".into(),
        source: Box::new(slow(&[None, None, Some(1), Some(2), None])),
        compute: None,
        watermark: None,
        splits: vec![SplitState { split: "0".into(), position: json!(0), watermark: None, finished: false }],
        metrics: Arc::default(),
    };
    let work = ChainedOperator {
        uid: "work".into(),
        kind: "work".into(),
        state_schema: None,
        operator: Box::new(slow(&[])),
        metrics: Arc::default(),
    };
    let spec = SubtaskSpec {
        index: 0,
        parallelism: 1,
        input: TaskInput::Source(source),
        replay: Vec::new(),
        arrivals: None,
        chain: vec![work],
        outputs: vec![Router::new(Exchange::Rebalance, 128, vec![next.channel(signal.clone())])],
        snapshots: Some(AlignmentMode::ExactlyOnce),
        signal,
    };
    let mut task = Task::new(spec, Env { clock: clock.clone(), ..Env::system() });
    let pass = |ms| *clock.0.lock().unwrap() += Duration::from_millis(ms);
    let (mut events, waiting) = (Vec::new(), Progress::Waiting { until: None });
    let mut step = || task.step(&mut events).unwrap();
    pass(4);
    // Nothing at once, nothing for as long as it may wait, and then, waited for, two batches.
    assert_eq!([(); 4].map(|()| step()), [Progress::Ready; 4]);
    assert_eq!(step(), waiting, "the second has no room");
    pass(20);
    assert_eq!(step(), waiting);
    next.try_recv(|_| false).unwrap();
    assert_eq!(step(), Progress::Ready);
    let ms = Duration::from_millis;
    let expected = Times { busy: ms(7 + 3 + 7), idle: ms(4 + 10 + 3), back_pressured: ms(20) };
    assert_eq!(task.metrics().read(), (expected, expected));
    assert_eq!(expected.total(), *clock.0.lock().unwrap());
}
