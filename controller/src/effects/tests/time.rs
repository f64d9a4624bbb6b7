//! Time that passes only when nobody has anything else to do.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use floodmark_snapshot::{
    Clock, Env, Result,
    runtime::{Machine, Runtime},
};
use futures::{FutureExt as _, future::BoxFuture};
use tokio::sync::oneshot;

/// How often whoever is awake gets a turn before time passes.
const TURNS: usize = 10;

#[derive(Default)]
struct State {
    now: Duration,
    sleepers: BTreeMap<(Duration, u64), oneshot::Sender<()>>,
    next: u64,
}

/// See the header of this file.
#[derive(Clone, Default)]
pub(super) struct Time(Arc<Mutex<State>>);

impl Time {
    pub(super) fn env(&self) -> Env {
        Env { clock: Arc::new(self.clone()), runtime: Arc::new(self.clone()), ..Env::system() }
    }

    /// Lets time pass, for ever.
    pub(super) async fn pass(&self) {
        loop {
            for _ in 0..TURNS {
                tokio::task::yield_now().await;
            }
            let mut state = self.0.lock().unwrap();
            while let Some(((at, _), sleeper)) = state.sleepers.pop_first() {
                state.now = state.now.max(at);
                if sleeper.send(()).is_ok() {
                    break;
                }
            }
        }
    }
}

impl Clock for Time {
    fn wall_ms(&self) -> i64 {
        1_795_255_200_000 + i64::try_from(self.monotonic().as_millis()).unwrap()
    }

    fn monotonic(&self) -> Duration {
        self.0.lock().unwrap().now
    }
}

impl Runtime for Time {
    fn spawn(&self, _: BoxFuture<'static, ()>) {
        unreachable!("all of a controller is one future");
    }

    fn blocking(&self, work: Box<dyn FnOnce() + Send>) {
        work();
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let mut state = self.0.lock().unwrap();
        let (sender, woken) = oneshot::channel();
        let place = (state.now + duration, state.next);
        state.next += 1;
        state.sleepers.insert(place, sender);
        woken.map(drop).boxed()
    }

    fn drive(&self, _: String, _: Box<dyn Machine>) -> Result<()> {
        unreachable!("a controller has no machines");
    }
}
