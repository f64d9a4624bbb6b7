//! The sink of the simulated jobs: stages lines and commits them to the broker, or writes them as they come.

use std::sync::Arc;
use std::time::Duration;

use arrow::{
    array::{Array, AsArray, Int64Array},
    compute::cast,
    datatypes::{DataType, Int64Type},
};
use bytes::Bytes;
use floodmark_dataflow::{
    Barrier, Batch, Operator, Output, PendingShard, Port, StateSnapshot, SubtaskContext,
    sink::{Committer, SinkFactory},
};
use floodmark_snapshot::{Epoch, Error, Result, ShardKind, Step};
use floodmark_worker::CheckpointMode;

use crate::{
    Mutation,
    broker::{ProducerId, Refusal, Writer},
    process::Process,
    world::Strike,
};

/// From one look at an open transaction to the next.
const OPEN_PAUSE: Duration = Duration::from_secs(1);

/// Lines of numbers, one per row.
pub(crate) struct Sink {
    pub(crate) process: Arc<Process>,
    /// The uid of its node: the identity of its producers.
    pub(crate) uid: String,
}

impl SinkFactory for Sink {
    fn kind(&self) -> String {
        "simulated sink".to_owned()
    }

    fn check(&self) -> Result<()> {
        self.process.attempts_anew();
        self.process.look_up()
    }

    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        let process = self.process.clone();
        Ok(match process.world.plan.checkpoints.mode {
            CheckpointMode::ExactlyOnce => Box::new(Stage { process, index: context.index, lines: String::new() }),
            CheckpointMode::AtLeastOnce | CheckpointMode::Disabled => {
                Box::new(Write { writer: process.writer(), process, lines: String::new() })
            }
        })
    }

    fn committer(&self, index: u32, history: &str) -> Result<Option<Box<dyn Committer>>> {
        match self.process.world.plan.checkpoints.mode {
            CheckpointMode::ExactlyOnce => {
                let process = self.process.clone();
                let id = ProducerId { job: process.job, uid: self.uid.clone(), index };
                Ok(Some(Box::new(Producer { process, id, history: history.to_owned(), epoch: 0 })))
            }
            CheckpointMode::AtLeastOnce | CheckpointMode::Disabled => Ok(None),
        }
    }

    fn visible(&self, index: u32, history: &str) -> Result<Option<Epoch>> {
        self.process.look_up()?;
        let world = &self.process.world;
        if world.mutation == Some(Mutation::VisibleUnasked) {
            return Ok(None);
        }
        if world.broker().is_open(&self.uid, index) {
            // Who left it open may have asked for its commit.
            self.process.block(OPEN_PAUSE);
            return Err(Error::retry(format!("a transaction of {}[{index}] is still open", self.uid)));
        }
        Ok(world.broker().marker_in(&self.uid, index, history))
    }
}

/// A line per row: its columns as numbers, times as milliseconds.
fn add_lines(to: &mut String, batch: &Batch) -> Result<()> {
    let number = |column: &Arc<dyn Array>| -> Result<Int64Array> {
        let cast = cast(column, &DataType::Int64).map_err(|e| Error::abort(format!("a line of numbers: {e}")))?;
        Ok(cast.as_primitive::<Int64Type>().clone())
    };
    let columns: Vec<Int64Array> = batch.rows.columns().iter().map(number).collect::<Result<_>>()?;
    for row in 0..batch.len() {
        let field = |c: &Int64Array| if c.is_null(row) { "null".to_owned() } else { c.value(row).to_string() };
        *to += &columns.iter().map(field).collect::<Vec<_>>().join(" ");
        to.push('\n');
    }
    Ok(())
}

/// Writes what comes, at the latest when a barrier passes: at least once.
struct Write {
    process: Arc<Process>,
    writer: Writer,
    lines: String,
}

impl Operator for Write {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        add_lines(&mut self.lines, &batch)
    }

    fn flush(&mut self, _: &mut Output) -> Result<()> {
        if self.lines.is_empty() {
            return Ok(());
        }
        self.process.look_up()?;
        let lines = std::mem::take(&mut self.lines);
        self.process.world.broker().append(self.writer, lines.lines().map(str::to_owned).collect());
        Ok(())
    }
}

/// Stages what comes.
struct Stage {
    process: Arc<Process>,
    index: u32,
    lines: String,
}

impl Operator for Stage {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        add_lines(&mut self.lines, &batch)
    }

    fn snapshot(&mut self, barrier: &Barrier) -> Result<StateSnapshot> {
        let staged = Bytes::from(std::mem::take(&mut self.lines));
        let world = &self.process.world;
        world
            .trace
            .line(self.process.pid, || format!("sink[{}] stages at {barrier}: {:?}", self.index, lines(&staged)));
        let rows = staged.iter().filter(|b| **b == b'\n').count() as u64;
        Ok(StateSnapshot::of(vec![PendingShard::new(ShardKind::Staged, None, rows, Box::new(|| Ok(staged)))]))
    }
}

/// Writes to the broker under the identity of one subtask.
struct Producer {
    process: Arc<Process>,
    id: ProducerId,
    history: String,
    /// The producer's epoch at the broker, by which it fences.
    epoch: u64,
}

impl Producer {
    fn lost<T>(&self, what: &str) -> Result<T> {
        Err(Error::retry(format!("{what}: no reply")))
    }

    fn refused(&self, refusal: Refusal) -> Error {
        match refusal {
            Refusal::Fenced => {
                Error::fenced(format!("{}[{}]: a newer producer has this identity", self.id.uid, self.id.index))
            }
            Refusal::NoTransaction => Error::retry("the transaction is over"),
        }
    }
}

impl Committer for Producer {
    fn open(&mut self) -> Result<Option<Epoch>> {
        let world = self.process.world.clone();
        self.process.reach("open")?;
        self.process.block(world.random(|r| r.spread(Duration::from_micros(200), Duration::from_millis(20))));
        let strike = world.strike(self.process.pid);
        if strike == Strike::Before {
            return self.lost("open");
        }
        self.epoch = world.broker().init(&self.id);
        world.trace.line(self.process.pid, || format!("{:?} takes the producer over as {}", self.id, self.epoch));
        if strike == Strike::After || world.strikes("broker replies lost", |f| f.broker_reply_lost) {
            return self.lost("open");
        }
        let marker = world.broker().marker_of(&self.id, &self.history);
        Ok(if world.mutation == Some(Mutation::MarkerIgnored) { None } else { marker })
    }

    fn commit(&mut self, epoch: Epoch, staged: &[Bytes], step: &dyn Fn(Step)) -> Result<()> {
        let world = self.process.world.clone();
        step(Step::BeforeTransaction);
        self.process.reach("commit")?;
        self.process.block(world.random(|r| r.spread(Duration::from_micros(300), Duration::from_millis(40))));
        if world.strike(self.process.pid) == Strike::Before {
            return self.lost("write");
        }
        if world.mutation == Some(Mutation::FencingOff) {
            self.epoch = world.broker().init(&self.id);
        }
        let records: Vec<String> = staged.iter().flat_map(lines).collect();
        world.trace.line(self.process.pid, || format!("{:?} writes for {epoch}: {records:?}", self.id));
        let written = world.broker().write(&self.id, self.epoch, records);
        let transaction = written.map_err(|r| self.refused(r))?;
        let (at, id) = (world.clone(), self.id.clone());
        world.core.after(world.plan.transaction_timeout, move || at.broker().time_out(&id, transaction));
        step(Step::InTransaction);
        if self.process.is_dead() || world.strikes("transactions left open", |f| f.transaction_left_open) {
            return self.lost("commit");
        }
        if world.strikes("commits late", |f| f.commit_late) {
            let delay = world.random(|r| r.spread(Duration::from_millis(10), Duration::from_secs(10)));
            let (at, process, id, own, history) =
                (world.clone(), self.process.clone(), self.id.clone(), self.epoch, self.history.clone());
            world.core.after(delay, move || {
                let done = at.broker().commit(&id, own, transaction, (history, epoch));
                at.trace.line(process.pid, || format!("{id:?} commits {epoch} late: {done:?}"));
                check(&process, epoch, done);
            });
            return self.lost("commit");
        }
        let strike = world.strike(self.process.pid);
        if strike == Strike::Before {
            return self.lost("commit");
        }
        let done = world.broker().commit(&self.id, self.epoch, transaction, (self.history.clone(), epoch));
        world.trace.line(self.process.pid, || format!("{:?} commits {epoch}: {done:?}", self.id));
        check(&self.process, epoch, done);
        done.map_err(|r| self.refused(r))?;
        step(Step::AfterTransaction);
        if strike == Strike::After || world.strikes("broker replies lost", |f| f.broker_reply_lost) {
            return self.lost("commit");
        }
        Ok(())
    }
}

/// What is visible must be in a checkpoint that exists.
fn check(process: &Process, epoch: Epoch, done: Result<(), Refusal>) {
    let world = &process.world;
    if done.is_ok() {
        let completed = {
            let mut monitor = world.monitor();
            monitor.count("transactions committed");
            monitor.was_completed(process.job, epoch)
        };
        if !completed {
            world.violation(format!("records of checkpoint {epoch} are visible, and it is not completed"));
        }
    }
}

fn lines(bytes: &Bytes) -> Vec<String> {
    String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect()
}
