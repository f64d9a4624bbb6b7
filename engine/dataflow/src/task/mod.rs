//! One subtask as a state machine with a [`Task::step`]: production drives it from a thread, a simulator from a schedule.
//!
//! A step does a bounded amount of work and never blocks, but for a source's poll of at most [`SOURCE_POLL_MAX`]. No input
//! is taken while output waits for room, so a task holds at most what one frame of input gave rise to.
//!
//! Invariants: everything that a chain emits before it snapshots travels ahead of the barrier; nothing that came behind a
//! barrier is processed before the snapshot (exactly-once mode; the [`Aligner`] sees to it).
//!
//! No deadlock: the graph has no cycle, so the tasks furthest downstream can always go on; a channel blocked by alignment
//! is freed by barriers that are ahead of everything that its full neighbours hold, because each channel has its own bound.

mod chain;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use arrow::record_batch::RecordBatch;
use floodmark_snapshot::{
    Env, Epoch, Error, OperatorUid, Result, Shard, SplitState, StateSchema, TimestampMs,
    alignment::{Aligner, AlignmentMode},
};

use self::chain::Chain;
use crate::{
    Barrier, Batch, Frame, OperatorMetrics, PendingShard, Port, WATERMARK_MAX,
    channel::{Inbox, Signal},
    exchange::Router,
    inflight::{InFlight, InputChannel},
    metrics::add,
    source::{Compute, Polled, Source, WatermarkSpec},
    watermark::{Combined, InputWatermarks, SplitWatermarks},
};

pub use self::chain::ChainedOperator;

/// How long a source waits for rows before its task looks for commands, at most.
pub const SOURCE_POLL_MAX: Duration = Duration::from_millis(10);
/// Checkpoints whose positions a source remembers until they are complete.
const POSITIONS_REMEMBERED_MAX: usize = 8;

/// What a task is made of.
pub struct SubtaskSpec {
    /// Index of the subtask.
    pub index: u32,
    /// Number of subtasks of its task.
    pub parallelism: u32,
    /// Where rows come from.
    pub input: TaskInput,
    /// Rows that were in flight at the restored snapshot: processed before anything that the channels bring. See
    /// [`crate::inflight::share`].
    pub replay: Vec<InFlight>,
    /// The operators behind the source, or all.
    pub chain: Vec<ChainedOperator>,
    /// Where rows go.
    pub outputs: Vec<Router>,
    /// How barriers are aligned; `None` if there are no snapshots.
    pub snapshots: Option<AlignmentMode>,
    /// Wakes the thread that drives the task.
    pub signal: Arc<Signal>,
}

/// Where a task's rows come from.
pub enum TaskInput {
    /// A source.
    Source(SourceInput),
    /// Other tasks, and what each channel of the inbox is.
    Channels(Inbox, Vec<InputChannel>),
}

/// A source at the head of a task.
pub struct SourceInput {
    /// Its identity.
    pub uid: OperatorUid,
    /// What it is, in words.
    pub kind: String,
    /// Reads the splits.
    pub source: Box<dyn Source>,
    /// Computed columns.
    pub compute: Option<Compute>,
    /// Watermarks.
    pub watermark: Option<WatermarkSpec>,
    /// The splits as they were given to the source.
    pub splits: Vec<SplitState>,
    /// Its counters.
    pub metrics: Arc<OperatorMetrics>,
}

/// What a task is told from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Send this barrier (sources only).
    Trigger(Barrier),
    /// The barrier of this checkpoint overtakes the rows in flight: the task snapshots as soon as it can. To all tasks, after
    /// the trigger; only for barriers that [may](Barrier::may_overtake).
    Unalign(Epoch),
    /// The checkpoint is given up.
    Abort(Epoch),
    /// The checkpoint is complete and durable.
    Completed(Epoch),
    /// End: with snapshots at once, dropping what is under way; without, in order, behind the rows already read.
    Cancel,
}

/// One operator's part of a snapshot.
#[derive(Debug)]
pub struct OperatorPart {
    /// Whose it is.
    pub uid: OperatorUid,
    /// What it is, in words.
    pub kind: String,
    /// The types of its state.
    pub schema: StateSchema,
    /// Number of subtasks of its task.
    pub parallelism: u32,
    /// A source's positions.
    pub splits: Vec<SplitState>,
    /// State that earlier checkpoints have written already.
    pub reused: Vec<Shard>,
    /// State that is fixed but not yet written.
    pub shards: Vec<PendingShard>,
}

/// What a task says to the outside.
#[derive(Debug)]
pub enum TaskEvent {
    /// The synchronous part of a snapshot is done, and all rows that were in flight to the task are in it. Comes once for each
    /// barrier that the task has let pass, in their order. Also for one that has been aborted or declined meanwhile: what the
    /// sinks have staged is in no later one, so it must be kept.
    Snapshot {
        /// Its barrier.
        barrier: Barrier,
        /// The state of the operators that have any.
        parts: Vec<OperatorPart>,
    },
    /// The task can't take part in a checkpoint.
    Declined {
        /// Which.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// The source has read all its input. It goes on answering triggers.
    Exhausted,
    /// The task has sent its last frame.
    Ended,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There may be more to do at once.
    Ready,
    /// Nothing can be done until the signal is notified, or for this long.
    Waiting {
        /// See above.
        until: Option<Duration>,
    },
    /// The task has ended.
    Done,
}

/// Sends commands to a task and wakes it.
#[derive(Clone)]
pub struct Commands {
    queue: Arc<Mutex<VecDeque<Command>>>,
    signal: Arc<Signal>,
}

impl Commands {
    /// Queues a command. Bounded by the coordinator: it has one checkpoint under way.
    pub fn send(&self, command: Command) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(command);
        self.signal.notify();
    }

    fn next(&self) -> Option<Command> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

enum Input {
    Source(Box<SourceHead>),
    Channels {
        inbox: Inbox,
        ports: Vec<InputChannel>,
        aligner: Aligner,
        watermarks: InputWatermarks,
        pending: Option<Barrier>,
    },
}

struct SourceHead {
    spec: SourceInput,
    watermarks: SplitWatermarks,
    exhausted: bool,
    positions: VecDeque<(Epoch, Vec<SplitState>)>,
}

/// One subtask. See the header of this file.
pub struct Task {
    input: Input,
    chain: Chain,
    outputs: Vec<Router>,
    snapshots: bool,
    parallelism: u32,
    commands: Commands,
    env: Env,
    replay: VecDeque<InFlight>,
    /// `End` has been routed: once it has left, the task is done.
    ended: bool,
}

impl Task {
    /// A task that has done nothing yet.
    #[must_use]
    pub fn new(spec: SubtaskSpec, env: Env) -> Self {
        let SubtaskSpec { index: _, parallelism, input, replay, chain, outputs, snapshots, signal } = spec;
        let input = match input {
            TaskInput::Source(spec) => {
                let restored = spec.splits.iter().map(|s| (s.watermark, s.finished));
                let idle_timeout = spec.watermark.as_ref().and_then(|w| w.idle_timeout);
                let watermarks = SplitWatermarks::new(restored, idle_timeout, env.clock.monotonic());
                Input::Source(Box::new(SourceHead { spec, watermarks, exhausted: false, positions: VecDeque::new() }))
            }
            TaskInput::Channels(inbox, ports) => {
                let channels = inbox.channels();
                let aligner = Aligner::new(channels, snapshots.unwrap_or(AlignmentMode::AtLeastOnce));
                Input::Channels { inbox, ports, aligner, watermarks: InputWatermarks::new(channels), pending: None }
            }
        };
        let commands = Commands { queue: Arc::default(), signal };
        Self {
            input,
            chain: Chain::new(chain),
            outputs,
            snapshots: snapshots.is_some(),
            parallelism,
            commands,
            env,
            replay: replay.into(),
            ended: false,
        }
    }

    /// A handle that sends the task commands.
    #[must_use]
    pub fn commands(&self) -> Commands {
        self.commands.clone()
    }

    /// Does a bounded amount of work; adds to `events` what the outside must know.
    ///
    /// # Errors
    /// Whatever an operator, the source or an exchange reports: the attempt is over.
    pub fn step(&mut self, events: &mut Vec<TaskEvent>) -> Result<Progress> {
        let mut flushed = true;
        for router in &mut self.outputs {
            flushed &= router.flush()?;
        }
        if self.ended {
            if flushed {
                events.push(TaskEvent::Ended);
                return Ok(Progress::Done);
            }
            return Ok(Progress::Waiting { until: None });
        }
        if let Some(command) = self.commands.next() {
            return self.command(command, events);
        }
        if !flushed {
            return Ok(Progress::Waiting { until: None });
        }
        if let Some(InFlight { port, batch, .. }) = self.replay.pop_front() {
            self.emit(port, batch)?;
            return Ok(Progress::Ready);
        }
        match &mut self.input {
            Input::Source(_) => self.poll(events),
            Input::Channels { inbox, aligner, .. } => match inbox.try_recv(|c| aligner.is_blocked(c)) {
                Some((channel, frame)) => self.receive(channel, frame, events),
                None => Ok(Progress::Waiting { until: None }),
            },
        }
    }

    fn command(&mut self, command: Command, events: &mut Vec<TaskEvent>) -> Result<Progress> {
        match command {
            Command::Trigger(barrier) => {
                if matches!(self.input, Input::Source(_)) {
                    self.snapshot(barrier, events)?;
                }
            }
            Command::Unalign(_) => {}
            Command::Abort(epoch) => {
                if let Input::Channels { aligner, .. } = &mut self.input {
                    aligner.abort(epoch);
                }
                self.chain.aborted(epoch)?;
            }
            Command::Completed(epoch) => self.completed(epoch)?,
            Command::Cancel if self.snapshots => {
                events.push(TaskEvent::Ended);
                return Ok(Progress::Done);
            }
            Command::Cancel => {
                // Without snapshots a source ends in order; the others follow when its `End` reaches them.
                if matches!(self.input, Input::Source(_)) {
                    self.end()?;
                }
            }
        }
        Ok(Progress::Ready)
    }

    fn completed(&mut self, epoch: Epoch) -> Result<()> {
        if let Input::Source(head) = &mut self.input {
            while let Some((of, positions)) = head.positions.front() {
                if *of > epoch {
                    break;
                }
                if *of == epoch {
                    head.spec.source.on_completed(epoch, positions)?;
                }
                head.positions.pop_front();
            }
        }
        self.chain.completed(epoch)
    }

    fn poll(&mut self, events: &mut Vec<TaskEvent>) -> Result<Progress> {
        let Input::Source(head) = &mut self.input else { return Ok(Progress::Ready) };
        if head.exhausted {
            return Ok(Progress::Waiting { until: None });
        }
        match head.spec.source.poll(SOURCE_POLL_MAX).map_err(|e| e.context(&head.spec.uid))? {
            Polled::Batch { split, rows } => {
                let now = self.env.clock.monotonic();
                let rows = head.take(split, rows, now)?;
                self.emit(0, Batch::new(rows))?;
                self.source_watermark(now)?;
            }
            Polled::SplitFinished { split } => {
                head.watermarks.finished(split);
                let now = self.env.clock.monotonic();
                self.source_watermark(now)?;
            }
            Polled::Pending => {
                let now = self.env.clock.monotonic();
                self.source_watermark(now)?;
            }
            Polled::Exhausted => {
                head.exhausted = true;
                self.watermark(WATERMARK_MAX)?;
                if self.snapshots {
                    events.push(TaskEvent::Exhausted);
                } else {
                    self.end()?;
                }
            }
        }
        Ok(Progress::Ready)
    }

    fn source_watermark(&mut self, now: Duration) -> Result<()> {
        let Input::Source(head) = &mut self.input else { return Ok(()) };
        if head.spec.watermark.is_none() {
            return Ok(());
        }
        match head.watermarks.combine(now) {
            Combined::Unchanged => Ok(()),
            Combined::Advanced(watermark) => {
                head.spec.metrics.watermark.store(watermark, Ordering::Relaxed);
                self.watermark(watermark)
            }
            Combined::BecameIdle => self.idle(),
        }
    }

    fn receive(&mut self, channel: usize, frame: Frame, events: &mut Vec<TaskEvent>) -> Result<Progress> {
        let Input::Channels { ports, aligner, watermarks, pending, .. } = &mut self.input else {
            return Ok(Progress::Ready);
        };
        let combined = match frame {
            Frame::Batch(batch) => {
                let port = ports[channel].port;
                self.emit(port, batch)?;
                return Ok(Progress::Ready);
            }
            Frame::Barrier(barrier) => {
                *pending = Some(barrier);
                if aligner.barrier(channel, barrier.epoch).is_some() {
                    self.snapshot(barrier, events)?;
                }
                return Ok(Progress::Ready);
            }
            Frame::Watermark(watermark) => watermarks.watermark(channel, watermark),
            Frame::Idle => watermarks.idle(channel),
            Frame::End => {
                let aligned = aligner.ended(channel);
                let barrier = pending.filter(|b| Some(b.epoch) == aligned);
                let over = aligner.all_ended();
                if let Some(barrier) = barrier {
                    self.snapshot(barrier, events)?;
                }
                if over {
                    self.end()?;
                }
                // Its watermark stays where it was: an input that ends by itself has sent the last one.
                return Ok(Progress::Ready);
            }
        };
        match combined {
            Combined::Unchanged => {}
            Combined::Advanced(watermark) => self.watermark(watermark)?,
            Combined::BecameIdle => self.idle()?,
        }
        Ok(Progress::Ready)
    }

    /// Rows of the first operator's `port` go through the chain and out.
    fn emit(&mut self, port: Port, batch: Batch) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let outputs = &mut self.outputs;
        self.chain.process(port, batch, &mut |batch| route(outputs, batch))
    }

    fn watermark(&mut self, watermark: TimestampMs) -> Result<()> {
        let outputs = &mut self.outputs;
        self.chain.watermark(watermark, &mut |batch| route(outputs, batch))?;
        self.broadcast(&Frame::Watermark(watermark));
        Ok(())
    }

    /// Nobody waits for this task any more: what it still holds must go out first, or it would come too late.
    fn idle(&mut self) -> Result<()> {
        let outputs = &mut self.outputs;
        self.chain.flush(&mut |batch| route(outputs, batch))?;
        self.broadcast(&Frame::Idle);
        Ok(())
    }

    fn snapshot(&mut self, barrier: Barrier, events: &mut Vec<TaskEvent>) -> Result<()> {
        let outputs = &mut self.outputs;
        self.chain.flush(&mut |batch| route(outputs, batch))?;
        let mut parts = Vec::new();
        if let Input::Source(head) = &mut self.input {
            parts.push(head.snapshot(barrier.epoch, self.parallelism)?);
        }
        self.chain.snapshot(&barrier, self.parallelism, &mut parts)?;
        events.push(TaskEvent::Snapshot { barrier, parts });
        self.broadcast(&Frame::Barrier(barrier));
        if barrier.stops() && matches!(self.input, Input::Source(_)) {
            self.end()?;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let outputs = &mut self.outputs;
        self.chain.flush(&mut |batch| route(outputs, batch))?;
        self.broadcast(&Frame::End);
        self.ended = true;
        Ok(())
    }

    fn broadcast(&mut self, frame: &Frame) {
        for router in &mut self.outputs {
            router.broadcast(frame);
        }
    }
}

fn route(outputs: &mut [Router], batch: Batch) -> Result<()> {
    if let Some((last, others)) = outputs.split_last_mut() {
        for router in others {
            router.batch(batch.clone())?;
        }
        last.batch(batch)?;
    }
    Ok(())
}

impl SourceHead {
    /// Computed columns, counters and event time of a batch of `split`.
    fn take(&mut self, split: usize, rows: RecordBatch, now: Duration) -> Result<RecordBatch> {
        let spec = &self.spec;
        let rows = match &spec.compute {
            Some(compute) if rows.num_rows() > 0 => compute(rows)?,
            Some(_) | None => rows,
        };
        if rows.num_rows() > 0 {
            add(&spec.metrics.rows_out, rows.num_rows() as u64);
            if let Some(watermark) = &spec.watermark {
                self.watermarks.rows(split, (watermark.event_time)(&rows)?, now);
            }
        }
        Ok(rows)
    }

    fn snapshot(&mut self, epoch: Epoch, parallelism: u32) -> Result<OperatorPart> {
        self.spec.source.flush().map_err(|e| e.context(&self.spec.uid))?;
        let mut splits = self.spec.source.positions().map_err(|e| e.context(&self.spec.uid))?;
        if splits.len() < self.spec.splits.len() {
            return Err(Error::abort(format!(
                "internal error: {} told {} positions of {} splits",
                self.spec.uid,
                splits.len(),
                self.spec.splits.len()
            )));
        }
        for (i, split) in splits.iter_mut().enumerate() {
            split.watermark = self.watermarks.of(i);
        }
        self.positions.push_back((epoch, splits.clone()));
        if self.positions.len() > POSITIONS_REMEMBERED_MAX {
            self.positions.pop_front();
        }
        Ok(OperatorPart {
            uid: self.spec.uid.clone(),
            kind: self.spec.kind.clone(),
            schema: StateSchema::default(),
            parallelism,
            splits,
            reused: Vec::new(),
            shards: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests;
