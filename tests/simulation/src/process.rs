//! One process of the job: its clock, its names, its probe, and the runtime that puts all it does into the executor's hands.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use floodmark_snapshot::{
    Clock, Env, Epoch, Error, Ids, Probe, Result, Step,
    runtime::{Machine, Runtime, Turn, guarded},
};
use futures::future::{BoxFuture, select};

use crate::{
    broker::Writer,
    executor::{Pid, yield_now},
    world::World,
};

/// Furthest that the wall clock jumps, milliseconds.
const CLOCK_JUMP_MS_MAX: u64 = 86_400_000;

/// See the header of this file.
pub(crate) struct Process {
    pub(crate) world: Arc<World>,
    pub(crate) pid: Pid,
    /// The job that it runs.
    pub(crate) job: u32,
    /// Virtual time of its start, from which its monotonic clock counts.
    started: Duration,
    wall_offset_ms: AtomicI64,
    names: AtomicU64,
    attempts: AtomicU64,
}

impl Process {
    pub(crate) fn new(world: &Arc<World>, pid: Pid, job: u32) -> Arc<Self> {
        Arc::new(Self {
            world: world.clone(),
            pid,
            job,
            started: world.core.now(),
            wall_offset_ms: AtomicI64::new(1_800_000_000_000),
            names: AtomicU64::new(0),
            attempts: AtomicU64::new(0),
        })
    }

    pub(crate) fn env(self: &Arc<Self>) -> Env {
        Env { clock: self.clone(), ids: self.clone(), probe: self.clone(), runtime: self.clone() }
    }

    /// Another attempt begins: each looks at its sink first.
    pub(crate) fn attempts_anew(&self) {
        self.attempts.fetch_add(1, Ordering::Relaxed);
    }

    /// Who writes: the process, and which of its attempts.
    pub(crate) fn writer(&self) -> Writer {
        (self.pid, self.attempts.load(Ordering::Relaxed))
    }

    /// The present step blocks for this long.
    pub(crate) fn block(&self, duration: Duration) {
        self.world.core.block(duration);
    }

    /// A blocking look-up at the broker.
    pub(crate) fn look_up(&self) -> Result<()> {
        self.connected("look up")?;
        // A start has many look-ups, none of which is tried again: if each failed as often as a commit, no job would start.
        if self.world.strikes("look-ups failed", |f| f.broker_refused / 20.0) {
            return Err(Error::retry("look up: broker says no"));
        }
        Ok(())
    }

    fn connected(&self, what: &str) -> Result<()> {
        if self.is_dead() {
            return Err(Error::retry(format!("{what}: the process is dead")));
        }
        if self.world.is_cut_off(self.pid) {
            self.block(Duration::from_secs(1));
            return Err(Error::retry(format!("{what}: broker out of reach")));
        }
        Ok(())
    }

    /// Fails if the broker can't be reached just now.
    pub(crate) fn reach(&self, what: &str) -> Result<()> {
        self.connected(what)?;
        if self.world.strikes("broker requests refused", |f| f.broker_refused) {
            return Err(Error::retry(format!("{what}: broker says no")));
        }
        Ok(())
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.world.core.is_dead(self.pid)
    }
}

impl Clock for Process {
    fn wall_ms(&self) -> i64 {
        if self.world.strikes("clock jumps", |f| f.clock_jumps) {
            let jump = self.world.random(|r| r.below(2 * CLOCK_JUMP_MS_MAX)) as i64 - CLOCK_JUMP_MS_MAX as i64;
            self.wall_offset_ms.fetch_add(jump, Ordering::Relaxed);
        }
        self.wall_offset_ms.load(Ordering::Relaxed) + self.world.core.now().as_millis() as i64
    }

    fn monotonic(&self) -> Duration {
        self.world.core.now().saturating_sub(self.started)
    }
}

impl Ids for Process {
    fn ulid(&self) -> String {
        // As long as a ULID, and unique over all processes.
        format!("01SIM{:06}{:015}", self.pid, self.names.fetch_add(1, Ordering::Relaxed))
    }
}

impl Probe for Process {
    fn reached(&self, step: Step, epoch: Epoch) {
        self.world.trace.line(self.pid, || format!("{step} {epoch}"));
        self.world.reached(self.pid, step);
        if matches!(step, Step::AfterLogEntry) && !self.world.monitor().was_completed(self.job, epoch) {
            self.world.violation(format!("process {} takes checkpoint {epoch} for completed, and it is not", self.pid));
        }
    }
}

impl Runtime for Process {
    fn spawn(&self, work: BoxFuture<'static, ()>) {
        self.world.core.spawn(self.pid, work);
    }

    fn blocking(&self, work: Box<dyn FnOnce() + Send>) {
        let core = self.world.core.clone();
        self.world.core.spawn(
            self.pid,
            Box::pin(async move {
                work();
                let busy = core.take_busy();
                core.sleep(busy).await;
            }),
        );
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(self.world.core.sleep(duration))
    }

    fn drive(&self, _: String, machine: Box<dyn Machine>) -> Result<()> {
        self.world.core.spawn(self.pid, Box::pin(drive(self.world.clone(), self.pid, machine)));
        Ok(())
    }
}

/// One step per scheduling.
async fn drive(world: Arc<World>, pid: Pid, mut machine: Box<dyn Machine>) {
    let core = world.core.clone();
    loop {
        let turn = guarded(&mut *machine, |m| m.step());
        let busy = core.take_busy();
        if !busy.is_zero() {
            core.sleep(busy).await;
        }
        match turn {
            None => return world.violation(format!("process {pid}: a task or committer panicked")),
            Some(Turn::Done) => return,
            Some(Turn::Ready) => yield_now().await,
            Some(Turn::Waiting { until }) => {
                let signal = machine.signal().clone();
                let notified = std::future::poll_fn(move |context| signal.poll_wait(context));
                match until {
                    None => notified.await,
                    Some(until) => drop(select(notified, core.sleep(until)).await),
                }
            }
        }
    }
}
