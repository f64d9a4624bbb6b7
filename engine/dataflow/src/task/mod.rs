//! One subtask as a state machine with a [`Task::step`]: production drives it from a thread, a simulator from a schedule.
//!
//! A step does a bounded amount of work and never blocks, but for a source's poll of at most [`SOURCE_POLL_MAX`]. No input
//! is taken while output waits for room, so a task holds at most what one frame of input gave rise to.
//!
//! Invariants: everything that a chain emits before it snapshots travels ahead of the barrier, or is kept by the receiver as
//! rows in flight when the barrier overtakes it; nothing that came behind a barrier is processed before the snapshot
//! (exactly-once mode; [`floodmark_snapshot::alignment`] sees to it).
//!
//! No deadlock: the graph has no cycle, so the tasks furthest downstream can always go on; a channel blocked by alignment
//! is freed by barriers that are ahead of everything that its full neighbours hold, because each channel has its own bound.
//! A barrier that overtakes may come before barriers that must stay in order behind rows; these rows are then processed
//! though output waits for room.

mod arriving;
mod chain;
mod channels;
mod source;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use floodmark_snapshot::{
    Env, Epoch, Error, OperatorUid, Result, Shard, SplitState, StateSchema, TimestampMs,
    alignment::{Alignment, AlignmentMode, GiveUp},
};
use serde::{Deserialize, Serialize};

use self::{
    arriving::Arriving,
    chain::Chain,
    channels::{ChannelHead, Early, Report},
    source::SourceHead,
};
use crate::{
    Barrier, BarrierKind, Batch, Frame, OperatorMetrics, PendingShard, Port, WATERMARK_MAX,
    arrival::Arrivals,
    channel::{Inbox, Signal},
    exchange::Router,
    inflight::{InFlight, InputChannel},
    metrics::{Spent, TaskMetrics},
    source::{Compute, Polled, Source, WatermarkSpec},
    watermark::Combined,
};

pub use self::{arriving::HELD_BYTES_MAX, chain::ChainedOperator, channels::CHANNEL_STATE_BYTES_MAX};

/// How long a source waits for rows before its task looks for commands, at most.
pub const SOURCE_POLL_MAX: Duration = Duration::from_millis(10);
/// Aborted checkpoints that a task remembers, so that operators hear of each once.
const ABORTS_REMEMBERED_MAX: usize = 64;

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
    /// State of the first operator that comes while the task runs, if any does ([`crate::Operator::restores_by_key_group`]).
    pub arrivals: Option<Arrivals>,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
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
    /// All state that was on its way ([`SubtaskSpec::arrivals`]) is there.
    Restored,
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

    fn cancelled(&self) -> bool {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).contains(&Command::Cancel)
    }
}

enum Input {
    Source(Box<SourceHead>),
    Channels(Box<ChannelHead>),
}

/// One subtask. See the header of this file.
pub struct Task {
    input: Input,
    chain: Chain,
    outputs: Vec<Router>,
    snapshots: Option<AlignmentMode>,
    parallelism: u32,
    commands: Commands,
    env: Env,
    metrics: Arc<TaskMetrics>,
    /// While state is on its way.
    arriving: Option<Arriving>,
    /// Checkpoints whose end the operators have been told, newest last.
    aborted: VecDeque<Epoch>,
    /// `End` has been routed: once it has left, the task is done.
    ended: bool,
}

impl Task {
    /// A task that has done nothing yet.
    #[must_use]
    pub fn new(spec: SubtaskSpec, env: Env) -> Self {
        let SubtaskSpec { index: _, parallelism, input, replay, arrivals, chain, outputs, snapshots, signal } = spec;
        let input = match input {
            TaskInput::Source(spec) => Input::Source(Box::new(SourceHead::new(spec, env.clock.monotonic()))),
            TaskInput::Channels(inbox, inputs) => {
                let mode = snapshots.unwrap_or(AlignmentMode::AtLeastOnce);
                Input::Channels(Box::new(ChannelHead::new(inbox, inputs, mode, replay)))
            }
        };
        let commands = Commands { queue: Arc::default(), signal };
        Self {
            input,
            chain: Chain::new(chain),
            outputs,
            snapshots,
            parallelism,
            commands,
            metrics: Arc::new(TaskMetrics::new(env.clock.clone())),
            env,
            arriving: arrivals.map(Arriving::new),
            aborted: VecDeque::new(),
            ended: false,
        }
    }

    /// A handle that sends the task commands.
    #[must_use]
    pub fn commands(&self) -> Commands {
        self.commands.clone()
    }

    /// What the task spends its time on.
    #[must_use]
    pub fn metrics(&self) -> Arc<TaskMetrics> {
        self.metrics.clone()
    }

    /// The same task with another bound than [`CHANNEL_STATE_BYTES_MAX`].
    #[must_use]
    pub fn with_channel_state_max(mut self, bytes: usize) -> Self {
        if let Input::Channels(head) = &mut self.input {
            head.state_bytes_max = bytes;
        }
        self
    }

    /// Does a bounded amount of work; adds to `events` what the outside must know.
    ///
    /// # Errors
    /// Whatever an operator, the source or an exchange reports: the attempt is over.
    pub fn step(&mut self, events: &mut Vec<TaskEvent>) -> Result<Progress> {
        // The only reading of the clock, but for a source's: what has passed since the last step is that step, and the wait
        // after it if it came to one.
        self.metrics.turn(self.env.clock.monotonic(), Spent::Busy);
        let mut flushed = true;
        for router in &mut self.outputs {
            flushed &= router.flush()?;
        }
        let progress = self.advance(flushed, events)?;
        if matches!(progress, Progress::Waiting { .. }) {
            self.metrics.call_it(if flushed { Spent::Idle } else { Spent::BackPressured });
        }
        Ok(progress)
    }

    /// The step, once what waits has been sent. `flushed`: no output waits for room.
    fn advance(&mut self, flushed: bool, events: &mut Vec<TaskEvent>) -> Result<Progress> {
        if self.ended {
            if flushed {
                events.push(TaskEvent::Ended);
                return Ok(Progress::Done);
            }
            return Ok(Progress::Waiting { until: None });
        }
        if self.arriving.is_some() {
            return self.step_arriving(flushed, events);
        }
        if let Some(command) = self.commands.next() {
            return self.command(command, events);
        }
        // Barriers that overtake are let pass also while output waits for room: that is what they are for.
        if self.overtaken(events)? {
            return Ok(Progress::Ready);
        }
        let Input::Channels(head) = &mut self.input else {
            return if flushed { self.poll(events) } else { Ok(Progress::Waiting { until: None }) };
        };
        if !flushed && !head.hurries() {
            return Ok(Progress::Waiting { until: None });
        }
        if let Some(InFlight { port, batch, .. }) = head.replay() {
            self.emit(port, batch)?;
            return Ok(Progress::Ready);
        }
        match if flushed { head.next() } else { head.next_hurried() } {
            Some((channel, frame)) => self.receive(channel, frame, events),
            None => Ok(Progress::Waiting { until: None }),
        }
    }

    fn command(&mut self, command: Command, events: &mut Vec<TaskEvent>) -> Result<Progress> {
        match command {
            Command::Trigger(barrier) => {
                if matches!(self.input, Input::Source(_)) {
                    if barrier.kind == BarrierKind::Drain {
                        self.watermark(WATERMARK_MAX)?;
                    }
                    self.snapshot(barrier, false, events)?;
                }
            }
            Command::Unalign(epoch) => self.unalign(epoch, events)?,
            Command::Abort(epoch) => self.abort(epoch, events)?,
            Command::Completed(epoch) => self.completed(epoch)?,
            Command::Cancel if self.snapshots.is_some() => {
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
            head.completed(epoch)?;
        }
        self.chain.completed(epoch)
    }

    fn abort(&mut self, epoch: Epoch, events: &mut Vec<TaskEvent>) -> Result<()> {
        if self.aborted.contains(&epoch) {
            return Ok(());
        }
        self.aborted.push_back(epoch);
        if self.aborted.len() > ABORTS_REMEMBERED_MAX {
            self.aborted.pop_front();
        }
        let steps = match &mut self.input {
            Input::Source(head) => {
                head.aborted(epoch);
                Vec::new()
            }
            Input::Channels(head) => head.aligner.abort(epoch),
        };
        self.align(steps, None, events)?;
        self.chain.aborted(epoch)
    }

    /// The barrier of `epoch` overtakes: what waits for room if it has left the chain, else what comes before it.
    fn unalign(&mut self, epoch: Epoch, events: &mut Vec<TaskEvent>) -> Result<()> {
        if self.snapshots != Some(AlignmentMode::ExactlyOnce) {
            return Ok(());
        }
        self.outputs.iter_mut().try_for_each(|router| router.overtake(epoch))?;
        match &mut self.input {
            Input::Source(_) => Ok(()),
            Input::Channels(head) => {
                let steps = head.aligner.unalign(epoch);
                self.align(steps, None, events)
            }
        }
    }

    /// Receives one barrier ahead of the rows before it, if there is one that overtakes. Tells whether it did anything.
    fn overtaken(&mut self, events: &mut Vec<TaskEvent>) -> Result<bool> {
        let Input::Channels(head) = &mut self.input else { return Ok(false) };
        let steps = head.notice();
        if !steps.is_empty() {
            self.align(steps, None, events)?;
            return Ok(true);
        }
        let Some(early) = head.early() else { return Ok(false) };
        let steps = head.aligner.barrier(early.channel, early.barrier);
        self.align(steps, Some(early), events)?;
        Ok(true)
    }

    /// Carries out what the aligner says, after a barrier was received early, if one was.
    fn align(&mut self, steps: Vec<Alignment>, mut early: Option<Early>, events: &mut Vec<TaskEvent>) -> Result<()> {
        self.collect_early(early.as_mut());
        for step in steps {
            match step {
                Alignment::Snapshot { barrier, overtakes } => {
                    self.snapshot(barrier, overtakes, events)?;
                    self.collect_early(early.as_mut());
                }
                Alignment::Complete(epoch) => self.report(epoch, true, events)?,
                Alignment::GivenUp { epoch, cause } => {
                    let reason = match cause {
                        GiveUp::Aborted => None,
                        GiveUp::Skipped => Some("a later barrier came without it"),
                        GiveUp::Crowded => Some("too many checkpoints are under way"),
                    };
                    if let Some(reason) = reason {
                        events.push(TaskEvent::Declined { epoch, reason: reason.into() });
                    }
                    self.report(epoch, false, events)?;
                }
            }
        }
        self.decline_overfull(events)
    }

    fn collect_early(&mut self, early: Option<&mut Early>) {
        if let (Input::Channels(head), Some(early)) = (&mut self.input, early) {
            head.collect_early(early);
        }
    }

    /// Declines the checkpoints that have collected more rows in flight than they may.
    fn decline_overfull(&mut self, events: &mut Vec<TaskEvent>) -> Result<()> {
        while let Input::Channels(head) = &mut self.input
            && let Some(epoch) = head.overfull()
        {
            let reason = format!("more than {} bytes of rows are in flight to one subtask", head.state_bytes_max);
            events.push(TaskEvent::Declined { epoch, reason });
            // Waits for nothing any more: the coordinator's notice will find it settled.
            let steps = head.aligner.abort(epoch);
            self.report(epoch, false, events)?;
            self.align(steps, None, events)?;
        }
        Ok(())
    }

    /// Ends the snapshot of `epoch`, if it was taken, and hands over what can be: with the rows in flight, if it is complete.
    fn report(&mut self, epoch: Epoch, complete: bool, events: &mut Vec<TaskEvent>) -> Result<()> {
        let Input::Channels(head) = &mut self.input else { return Ok(()) };
        head.finish(epoch, complete);
        while let Some(Report { barrier, mut parts, in_flight }) = head.report() {
            if !in_flight.is_empty() {
                let first = self.chain.first();
                let first = first.ok_or_else(|| Error::abort("internal error: a task without operators"))?;
                match parts.iter_mut().find(|p| p.uid == first.uid) {
                    Some(part) => part.shards.extend(in_flight),
                    None => parts.push(OperatorPart {
                        uid: first.uid.clone(),
                        kind: first.kind.clone(),
                        schema: first.state_schema.clone().unwrap_or_default(),
                        parallelism: self.parallelism,
                        splits: Vec::new(),
                        reused: Vec::new(),
                        shards: in_flight,
                    }),
                }
            }
            events.push(TaskEvent::Snapshot { barrier, parts });
        }
        Ok(())
    }

    fn poll(&mut self, events: &mut Vec<TaskEvent>) -> Result<Progress> {
        let Input::Source(head) = &mut self.input else { return Ok(Progress::Ready) };
        if head.exhausted {
            return Ok(Progress::Waiting { until: None });
        }
        // A source that had something may have more at once; only if it has not, it is waited for: so a wait can be told from
        // work, but for the decoding of what it ends with.
        let wait = if head.waits { SOURCE_POLL_MAX } else { Duration::ZERO };
        if head.waits {
            self.metrics.call_it(Spent::Idle);
        }
        let polled = head.spec.source.poll(wait).map_err(|e| e.context(&head.spec.uid))?;
        head.waits = matches!(polled, Polled::Pending);
        let now = self.env.clock.monotonic();
        if !wait.is_zero() {
            self.metrics.turn(now, Spent::Busy);
        }
        match polled {
            Polled::Batch { split, rows } => {
                let rows = head.take(split, rows, now)?;
                self.emit(0, Batch::new(rows))?;
                self.source_watermark(now)?;
            }
            Polled::SplitFinished { split } => {
                head.watermarks.finished(split);
                self.source_watermark(now)?;
            }
            Polled::Pending => self.source_watermark(now)?,
            Polled::Exhausted => {
                head.exhausted = true;
                self.watermark(WATERMARK_MAX)?;
                if self.snapshots.is_some() {
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
        let Input::Channels(head) = &mut self.input else { return Ok(Progress::Ready) };
        let combined = match frame {
            Frame::Batch(batch) => {
                head.collect(channel, &batch);
                let port = head.port(channel);
                self.decline_overfull(events)?;
                self.emit(port, batch)?;
                return Ok(Progress::Ready);
            }
            // One that overtakes and is received in order comes on a channel that keeps order.
            Frame::Barrier(barrier) | Frame::Overtaking(barrier) => {
                let steps = head.aligner.barrier(channel, barrier);
                self.align(steps, None, events)?;
                return Ok(Progress::Ready);
            }
            Frame::Watermark(watermark) => head.watermarks.watermark(channel, watermark),
            Frame::Idle => head.watermarks.idle(channel),
            Frame::End => {
                let steps = head.aligner.ended(channel);
                let over = head.aligner.all_ended();
                self.align(steps, None, events)?;
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

    /// Takes the snapshot of everything in this task, and sends the barrier on.
    fn snapshot(&mut self, barrier: Barrier, overtakes: bool, events: &mut Vec<TaskEvent>) -> Result<()> {
        let outputs = &mut self.outputs;
        self.chain.flush(&mut |batch| route(outputs, batch))?;
        let mut parts = Vec::new();
        if let Input::Source(head) = &mut self.input {
            parts.push(head.snapshot(barrier.epoch, self.parallelism)?);
        }
        self.chain.snapshot(&barrier, self.parallelism, &mut parts)?;
        self.broadcast(&Frame::Barrier(barrier));
        if overtakes {
            self.outputs.iter_mut().try_for_each(|router| router.overtake(barrier.epoch))?;
        }
        match &mut self.input {
            Input::Channels(head) => head.taken(barrier, parts),
            Input::Source(_) => {
                events.push(TaskEvent::Snapshot { barrier, parts });
                if barrier.stops() {
                    self.end()?;
                }
            }
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

#[cfg(test)]
mod tests;
