//! Runs everything that a simulation consists of on one thread: a seeded choice among what is ready, and a clock that jumps
//! to the next moment at which something happens.
//!
//! A *process* is a set of futures that dies, pauses and is cut off as one; process 0 is the world and never dies.
//! Invariant: the order of events depends on the seed and on nothing else: no thread, no real time, no address.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use futures::future::{BoxFuture, LocalBoxFuture};

use crate::random::Random;

/// A process; 0 is the world.
pub(crate) type Pid = u32;
/// One poll takes up to this much virtual time, nanoseconds.
const POLL_NS_MAX: u64 = 40_000;
/// Polls of one run before it counts as a livelock.
const POLLS_MAX: u64 = 20_000_000;

enum Timer {
    Wake(Waker),
    Run(Box<dyn FnOnce() + Send>),
}

struct NewTask {
    pid: Pid,
    future: BoxFuture<'static, ()>,
}

#[derive(Default)]
struct State {
    now: Duration,
    timers: BTreeMap<(Duration, u64), Timer>,
    next_timer: u64,
    spawned: Vec<NewTask>,
    killed: BTreeSet<Pid>,
    /// Killed, and not yet dropped.
    to_bury: Vec<Pid>,
    paused: BTreeMap<Pid, Duration>,
    /// What the present step takes beyond a poll's time: a call that blocked.
    busy: Duration,
    /// Somebody wants [`Executor::run`] to return.
    interrupted: bool,
}

/// What futures and the world see of the executor.
#[derive(Clone, Default)]
pub(crate) struct Core(Arc<Mutex<State>>);

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn now(&self) -> Duration {
        self.lock().now
    }

    pub(crate) fn spawn(&self, pid: Pid, future: BoxFuture<'static, ()>) {
        self.lock().spawned.push(NewTask { pid, future });
    }

    /// Calls `effect` after `delay`, whatever becomes of the process that asked for it.
    pub(crate) fn after(&self, delay: Duration, effect: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        let at = state.now + delay;
        state.add_timer(at, Timer::Run(Box::new(effect)));
    }

    pub(crate) fn sleep(&self, duration: Duration) -> Sleep {
        let at = self.now() + duration;
        Sleep { core: self.clone(), at, timer: None }
    }

    /// From here on nothing of this process runs.
    pub(crate) fn kill(&self, pid: Pid) {
        let mut state = self.lock();
        state.killed.insert(pid);
        state.to_bury.push(pid);
        state.paused.remove(&pid);
    }

    pub(crate) fn is_dead(&self, pid: Pid) -> bool {
        self.lock().killed.contains(&pid)
    }

    /// Nothing of this process runs until then.
    pub(crate) fn pause(&self, pid: Pid, until: Duration) {
        self.lock().paused.insert(pid, until);
    }

    pub(crate) fn resume_all(&self) {
        self.lock().paused.clear();
    }

    /// The present step blocks its machine for this long.
    pub(crate) fn block(&self, duration: Duration) {
        self.lock().busy += duration;
    }

    pub(crate) fn take_busy(&self) -> Duration {
        std::mem::take(&mut self.lock().busy)
    }

    /// Makes [`Executor::run`] return after the present poll.
    pub(crate) fn interrupt(&self) {
        self.lock().interrupted = true;
    }
}

impl State {
    fn add_timer(&mut self, at: Duration, timer: Timer) -> (Duration, u64) {
        let key = (at, self.next_timer);
        self.next_timer += 1;
        self.timers.insert(key, timer);
        key
    }
}

/// Completes at a moment of virtual time.
pub(crate) struct Sleep {
    core: Core,
    at: Duration,
    timer: Option<(Duration, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.core.lock();
        if state.now >= self.at {
            return Poll::Ready(());
        }
        if let Some(old) = self.timer {
            state.timers.remove(&old);
        }
        let timer = state.add_timer(self.at, Timer::Wake(context.waker().clone()));
        drop(state);
        self.timer = Some(timer);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            self.core.lock().timers.remove(&timer);
        }
    }
}

/// Lets everything else that is ready go first, if the seed wants it so.
pub(crate) async fn yield_now() {
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

struct TaskWaker {
    id: u64,
    ready: Arc<Mutex<Vec<u64>>>,
    queued: AtomicBool,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::SeqCst) {
            self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(self.id);
        }
    }
}

struct Task {
    pid: Pid,
    future: LocalBoxFuture<'static, ()>,
    flag: Arc<TaskWaker>,
    waker: Waker,
}

/// Why [`Executor::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// The time that was given has come.
    Time,
    /// See [`Core::interrupt`].
    Interrupted,
    /// [`POLLS_MAX`] polls: something goes round in circles.
    Livelock,
}

/// See the header of this file.
pub(crate) struct Executor {
    core: Core,
    random: Random,
    tasks: BTreeMap<u64, Task>,
    woken: Arc<Mutex<Vec<u64>>>,
    ready: Vec<u64>,
    /// Ready, but their process is paused.
    held: Vec<u64>,
    next_task: u64,
    /// How often a task that is ready is left aside for a while.
    task_pauses: f64,
    pub(crate) polls: u64,
    pub(crate) digest: u64,
    pub(crate) panics: Vec<Pid>,
}

impl Executor {
    pub(crate) fn new(core: Core, random: Random, task_pauses: f64) -> Self {
        Self {
            core,
            random,
            tasks: BTreeMap::new(),
            woken: Arc::default(),
            ready: Vec::new(),
            held: Vec::new(),
            next_task: 0,
            task_pauses,
            polls: 0,
            digest: 0xCBF2_9CE4_8422_2325,
            panics: Vec::new(),
        }
    }

    /// Stops leaving tasks aside.
    pub(crate) fn calm(&mut self) {
        self.task_pauses = 0.0;
    }

    /// Takes in a future that need not leave this thread.
    pub(crate) fn add(&mut self, pid: Pid, future: LocalBoxFuture<'static, ()>) {
        let id = self.next_task;
        self.next_task += 1;
        let flag = Arc::new(TaskWaker { id, ready: self.woken.clone(), queued: AtomicBool::new(true) });
        self.tasks.insert(id, Task { pid, future, waker: Waker::from(flag.clone()), flag });
        self.ready.push(id);
    }

    /// Runs until this moment of virtual time, or an interruption.
    pub(crate) fn run(&mut self, until: Duration) -> Stopped {
        loop {
            if std::mem::take(&mut self.core.lock().interrupted) {
                return Stopped::Interrupted;
            }
            if self.polls >= POLLS_MAX {
                return Stopped::Livelock;
            }
            self.bury();
            self.take_in();
            if self.fire_timers() {
                continue;
            }
            if self.ready.is_empty() {
                if !self.jump(until) {
                    return Stopped::Time;
                }
                continue;
            }
            if self.core.now() >= until {
                return Stopped::Time;
            }
            self.poll_one();
        }
    }

    /// Drops what killed processes consist of.
    fn bury(&mut self) {
        let killed = std::mem::take(&mut self.core.lock().to_bury);
        if killed.is_empty() {
            return;
        }
        let dead: Vec<u64> = self.tasks.iter().filter(|(_, t)| killed.contains(&t.pid)).map(|(id, _)| *id).collect();
        for id in dead {
            // Dropped without the core's lock: destructors may wake others.
            drop(self.tasks.remove(&id));
        }
    }

    fn take_in(&mut self) {
        let spawned = std::mem::take(&mut self.core.lock().spawned);
        for NewTask { pid, future } in spawned {
            if self.core.is_dead(pid) {
                continue;
            }
            self.add(pid, future);
        }
        let woken = std::mem::take(&mut *self.woken.lock().unwrap_or_else(PoisonError::into_inner));
        self.ready.extend(woken);
        let paused = {
            let mut state = self.core.lock();
            let now = state.now;
            state.paused.retain(|_, until| *until > now);
            state.paused.clone()
        };
        if paused.is_empty() {
            self.ready.append(&mut self.held);
            return;
        }
        let mut all = std::mem::take(&mut self.held);
        all.append(&mut self.ready);
        for id in all {
            let held = self.tasks.get(&id).is_some_and(|t| paused.contains_key(&t.pid));
            if held { self.held.push(id) } else { self.ready.push(id) }
        }
    }

    /// True if there was one.
    fn fire_timers(&mut self) -> bool {
        let mut fired = false;
        loop {
            let timer = {
                let mut state = self.core.lock();
                let now = state.now;
                match state.timers.first_key_value() {
                    Some(((at, _), _)) if *at <= now => state.timers.pop_first(),
                    Some(_) | None => None,
                }
            };
            match timer {
                Some((_, Timer::Wake(waker))) => waker.wake(),
                Some((_, Timer::Run(effect))) => effect(),
                None => return fired,
            }
            fired = true;
        }
    }

    /// Goes to the next moment at which something happens. False if that is past `until`.
    fn jump(&mut self, until: Duration) -> bool {
        let mut state = self.core.lock();
        let timer = state.timers.first_key_value().map(|((at, _), _)| *at);
        let resumed = if self.held.is_empty() { None } else { state.paused.values().min().copied() };
        let next = timer.into_iter().chain(resumed).min();
        match next.filter(|at| *at < until) {
            Some(at) => {
                state.now = at.max(state.now);
                true
            }
            None => {
                state.now = until.max(state.now);
                false
            }
        }
    }

    fn poll_one(&mut self) {
        let at = self.random.below(self.ready.len() as u64) as usize;
        let id = self.ready.swap_remove(at);
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if self.random.chance(self.task_pauses) {
            let delay = self.random.spread(Duration::from_micros(100), Duration::from_millis(500));
            let waker = task.waker.clone();
            task.flag.queued.store(false, Ordering::SeqCst);
            self.core.after(delay, move || waker.wake());
            return;
        }
        task.flag.queued.store(false, Ordering::SeqCst);
        let pid = task.pid;
        let mut context = Context::from_waker(&task.waker);
        let future = &mut task.future;
        match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut context))) {
            Ok(Poll::Pending) => {}
            Ok(Poll::Ready(())) => drop(self.tasks.remove(&id)),
            Err(_) => {
                drop(self.tasks.remove(&id));
                self.panics.push(pid);
            }
        }
        self.polls += 1;
        let mut state = self.core.lock();
        state.now += Duration::from_nanos(1000 + self.random.below(POLL_NS_MAX));
        let seen = id ^ state.now.as_nanos() as u64;
        self.digest = (self.digest ^ seen).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(17);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(seed: u64) -> (Vec<u32>, Duration) {
        let core = Core::default();
        let mut executor = Executor::new(core.clone(), Random::new(seed, 1), 0.0);
        let seen = Arc::new(Mutex::new(Vec::new()));
        for i in 0..8_u32 {
            let (seen, core2) = (seen.clone(), core.clone());
            core.spawn(
                i % 2 + 1,
                Box::pin(async move {
                    yield_now().await;
                    core2.sleep(Duration::from_secs(u64::from(i % 3))).await;
                    seen.lock().unwrap().push(i);
                }),
            );
        }
        assert_eq!(executor.run(Duration::from_secs(60)), Stopped::Time);
        let seen = seen.lock().unwrap().clone();
        (seen, core.now())
    }

    #[test]
    fn the_same_seed_gives_the_same_order_and_another_one_another() {
        assert_eq!(order(7), order(7));
        assert_ne!(order(7).0, order(8).0);
        assert_eq!(order(7).1, Duration::from_secs(60));
    }

    #[test]
    fn a_paused_process_sleeps_past_its_timers_and_a_dead_one_for_ever() {
        let core = Core::default();
        let mut executor = Executor::new(core.clone(), Random::new(1, 1), 0.0);
        let seen: Arc<Mutex<Vec<(u32, u64)>>> = Arc::default();
        for pid in 1..=3 {
            let (seen, core2) = (seen.clone(), core.clone());
            core.spawn(
                pid,
                Box::pin(async move {
                    core2.sleep(Duration::from_secs(1)).await;
                    seen.lock().unwrap().push((pid, core2.now().as_secs()));
                }),
            );
        }
        executor.run(Duration::from_millis(500));
        core.pause(1, Duration::from_secs(5));
        core.kill(2);
        executor.run(Duration::from_secs(10));
        assert_eq!(*seen.lock().unwrap(), [(3, 1), (1, 5)]);
        assert!(executor.tasks.is_empty());
    }
}
