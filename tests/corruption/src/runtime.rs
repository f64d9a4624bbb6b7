//! Runs a process on one thread: futures and machines in turn, on a clock that jumps to whatever comes next.
//!
//! Invariant: the order of events depends on nothing but what runs. A panic is not caught: whoever drives the executor sees it.

use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use floodmark_snapshot::{
    Clock, Env, Epoch, Ids, Probe, Result, Step,
    runtime::{Machine, Runtime, Turn},
};
use futures::future::{BoxFuture, LocalBoxFuture, select};

/// What one turn takes of virtual time.
const TURN: Duration = Duration::from_micros(20);
/// Tasks, and of them the one that begins with a source.
const TASKS: &str = "task ";
const SOURCE: &str = "task 0.";
/// Turns of one run before it counts as a livelock.
const TURNS_MAX: u64 = 2_000_000;
/// The wall clock at the start, milliseconds since the Unix epoch.
const WALL_MS: i64 = 1_800_000_000_000;

#[derive(Default)]
struct State {
    now: Duration,
    timers: BTreeMap<(Duration, u64), Waker>,
    timers_made: u64,
    spawned: Vec<BoxFuture<'static, ()>>,
}

/// What a process takes from its surroundings: its clock, its names, its turns.
struct Surroundings {
    state: Mutex<State>,
    /// Tells the names of different processes apart.
    process: u64,
    names: AtomicU64,
}

impl Surroundings {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for Surroundings {
    fn wall_ms(&self) -> i64 {
        WALL_MS + self.lock().now.as_millis() as i64
    }

    fn monotonic(&self) -> Duration {
        self.lock().now
    }
}

impl Ids for Surroundings {
    fn ulid(&self) -> String {
        // As long as a ULID.
        format!("01TEST{:05}{:015}", self.process, self.names.fetch_add(1, Ordering::Relaxed))
    }
}

impl Probe for Surroundings {
    fn reached(&self, _: Step, _: Epoch) {}
}

/// The runtime of a process.
struct Turns {
    surroundings: Arc<Surroundings>,
    lag: u32,
}

impl Runtime for Turns {
    fn spawn(&self, work: BoxFuture<'static, ()>) {
        self.surroundings.lock().spawned.push(work);
    }

    fn blocking(&self, work: Box<dyn FnOnce() + Send>) {
        work();
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let at = self.surroundings.monotonic() + duration;
        Box::pin(Sleep { surroundings: self.surroundings.clone(), at })
    }

    fn drive(&self, name: String, machine: Box<dyn Machine>) -> Result<()> {
        let lag = if name.starts_with(TASKS) && !name.starts_with(SOURCE) { self.lag } else { 0 };
        let machine = drive(self.surroundings.clone(), machine, lag);
        self.surroundings.lock().spawned.push(Box::pin(machine));
        Ok(())
    }
}

struct Sleep {
    surroundings: Arc<Surroundings>,
    at: Duration,
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.surroundings.lock();
        if state.now >= self.at {
            return Poll::Ready(());
        }
        let number = state.timers_made;
        state.timers_made += 1;
        // One that nobody waits for any more wakes somebody for nothing.
        state.timers.insert((self.at, number), context.waker().clone());
        Poll::Pending
    }
}

async fn drive(surroundings: Arc<Surroundings>, mut machine: Box<dyn Machine>, lag: u32) {
    loop {
        match machine.step() {
            Turn::Done => return,
            Turn::Ready => {
                for _ in 0..=lag {
                    next_turn().await;
                }
            }
            Turn::Waiting { until } => {
                let signal = machine.signal().clone();
                let notified = std::future::poll_fn(move |context| signal.poll_wait(context));
                match until {
                    None => notified.await,
                    Some(until) => {
                        let at = surroundings.monotonic() + until;
                        drop(select(notified, Sleep { surroundings: surroundings.clone(), at }).await);
                    }
                }
            }
        }
    }
}

async fn next_turn() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

struct Woken {
    id: usize,
    ready: Arc<Mutex<VecDeque<usize>>>,
    queued: AtomicBool,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::SeqCst) {
            self.ready.lock().unwrap_or_else(PoisonError::into_inner).push_back(self.id);
        }
    }
}

/// Why [`run`] returned.
#[derive(Debug)]
pub enum Stopped<T> {
    /// The process has ended, with this.
    Ended(T),
    /// It was cut off.
    CutOff,
    /// It waits for what never comes, or goes round in circles.
    Hangs,
}

/// Runs a process until it ends, or until `cut_off` says that it is gone, whatever it was about to do. What it leaves running
/// when it ends (deletes of files) is run to its end too. The tasks behind the source wait `lag` turns after each step, so that
/// rows are in flight.
pub fn run<'a, T: 'a>(
    process: u64,
    lag: u32,
    body: impl FnOnce(Env) -> LocalBoxFuture<'a, T>,
    mut cut_off: impl FnMut() -> bool,
) -> Stopped<T> {
    let surroundings = Arc::new(Surroundings { state: Mutex::default(), process, names: AtomicU64::new(0) });
    let env = Env {
        clock: surroundings.clone(),
        ids: surroundings.clone(),
        probe: surroundings.clone(),
        runtime: Arc::new(Turns { surroundings: surroundings.clone(), lag }),
    };
    let ready: Arc<Mutex<VecDeque<usize>>> = Arc::default();
    let outcome = Arc::new(Mutex::new(None));
    let mut turns: Vec<Option<(LocalBoxFuture<'a, ()>, Arc<Woken>)>> = Vec::new();
    let add = |turns: &mut Vec<_>, future: LocalBoxFuture<'a, ()>| {
        let woken = Arc::new(Woken { id: turns.len(), ready: ready.clone(), queued: AtomicBool::new(false) });
        woken.clone().wake();
        turns.push(Some((future, woken)));
    };
    let main = body(env);
    let slot = outcome.clone();
    let main = Box::pin(async move { *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(main.await) });
    add(&mut turns, main);
    let take = || outcome.lock().unwrap_or_else(PoisonError::into_inner).take();
    for _ in 0..TURNS_MAX {
        if cut_off() {
            return Stopped::CutOff;
        }
        let spawned = std::mem::take(&mut surroundings.lock().spawned);
        spawned.into_iter().for_each(|future| add(&mut turns, future));
        let next = ready.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(id) = next else {
            // Nothing is ready: the clock goes to the next timer, unless all that matters is done.
            let ended = take();
            if let Some(ended) = ended {
                return Stopped::Ended(ended);
            }
            let timer = surroundings.lock().timers.pop_first();
            let Some(((at, _), waker)) = timer else { return Stopped::Hangs };
            let mut state = surroundings.lock();
            state.now = state.now.max(at);
            drop(state);
            waker.wake();
            continue;
        };
        surroundings.lock().now += TURN;
        let due = {
            let mut state = surroundings.lock();
            let now = state.now;
            let later = state.timers.split_off(&(now, u64::MAX));
            std::mem::replace(&mut state.timers, later)
        };
        due.into_values().for_each(Waker::wake);
        let Some((future, woken)) = &mut turns[id] else { continue };
        woken.queued.store(false, Ordering::SeqCst);
        let waker = Waker::from(woken.clone());
        if future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
            turns[id] = None;
        }
    }
    Stopped::Hangs
}
