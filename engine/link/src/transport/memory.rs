//! A network in memory, whose links can be slow, cut, broken, and deliver twice.
//!
//! For the simulator and for tests: nothing runs but the futures of the [`Env`] that it is made with, and time is the [`Env`]'s.
//! A *cut* link delivers nothing and says nothing, as a network does that loses everything; what was sent waits and arrives
//! when the link is *healed*. A cut that lasts longer than pings may take breaks the streams, as [`super::grpc`] does. A
//! *severed* stream breaks at both ends at once. Each host belongs to one job, which nobody checks here.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use async_trait::async_trait;
use floodmark_snapshot::{Env, Error, JobId, Result, error::Context as _};
use futures::{
    FutureExt, StreamExt,
    future::BoxFuture,
    stream::{self},
};

use super::{Acceptor, Endpoint, Listening, Opening, Outgoing, Packet, Peer, Pipe, Transport};
use crate::tls::{Role, Subject};

/// Packets that one direction of a stream holds before its sender must wait.
const LANE_PACKETS_MAX: usize = 4;
/// How long a cut may last before streams over it break: an interval and a timeout of the real network's pings.
const CUT_NOTICED: Duration = Duration::from_secs(4);
/// How often somebody who connects over a cut link tries, and how many times.
const CONNECT_RETRY: Duration = Duration::from_millis(50);
const CONNECT_TRIES_MAX: usize = 60;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All hosts of a job, and the links between them.
pub struct Network {
    env: Env,
    job: JobId,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    listeners: HashMap<String, Listener>,
    /// By the names of both ends, the lesser first.
    links: HashMap<(String, String), Link>,
    lanes: Vec<Weak<Lane>>,
    cuts: u64,
}

struct Listener {
    role: Role,
    acceptor: Arc<dyn Acceptor>,
}

#[derive(Clone, Copy, Default)]
struct Link {
    /// The number of the cut, if it is cut.
    cut: Option<u64>,
    delay: Duration,
    duplicates: bool,
}

/// One direction of a stream.
struct Lane {
    from: String,
    to: String,
    /// Who has accepted the stream.
    acceptor: String,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    /// With the time at which each arrives.
    packets: VecDeque<(Duration, Packet)>,
    sender_gone: bool,
    receiver_gone: bool,
    /// Why it broke, and whether that is known though the link is cut.
    broken: Option<(String, bool)>,
    sender: Option<Waker>,
    receiver: Option<Waker>,
}

impl Queue {
    fn wake(&mut self) {
        [self.sender.take(), self.receiver.take()].into_iter().flatten().for_each(Waker::wake);
    }
}

impl Lane {
    fn is_between(&self, a: &str, b: &str) -> bool {
        (self.from == a && self.to == b) || (self.from == b && self.to == a)
    }

    fn break_off(&self, why: &str, known: bool) {
        let mut queue = lock(&self.queue);
        if queue.broken.as_ref().is_none_or(|(_, was_known)| known && !was_known) {
            queue.broken = Some((why.to_owned(), known));
        }
        queue.wake();
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("job", &self.job).finish_non_exhaustive()
    }
}

impl Network {
    /// A network without hosts.
    #[must_use]
    pub fn new(env: Env, job: JobId) -> Arc<Self> {
        Arc::new(Self { env, job, state: Mutex::default() })
    }

    /// A process of this name, which is also the endpoint at which it listens.
    #[must_use]
    pub fn host(self: &Arc<Self>, name: &str, role: Role) -> Arc<Host> {
        Arc::new(Host { network: self.clone(), name: name.to_owned(), role, killed: Mutex::new(false) })
    }

    /// From now on nothing passes between the two.
    pub fn cut(self: &Arc<Self>, a: &str, b: &str) {
        let number = {
            let mut state = lock(&self.state);
            state.cuts += 1;
            let number = state.cuts;
            state.link(a, b).cut = Some(number);
            number
        };
        let (network, a, b) = (Arc::downgrade(self), a.to_owned(), b.to_owned());
        let sleep = self.env.runtime.sleep(CUT_NOTICED);
        self.env.runtime.spawn(
            async move {
                sleep.await;
                let Some(network) = network.upgrade() else { return };
                let lasts = lock(&network.state).link(&a, &b).cut == Some(number);
                if lasts {
                    network.sever(&a, &b);
                }
            }
            .boxed(),
        );
    }

    /// What passed between the two before passes again, and what waited arrives.
    pub fn heal(&self, a: &str, b: &str) {
        lock(&self.state).link(a, b).cut = None;
        self.for_lanes(|lane| lane.is_between(a, b), |lane| lock(&lane.queue).wake());
    }

    /// Breaks all streams between the two. New ones can be opened.
    pub fn sever(&self, a: &str, b: &str) {
        self.for_lanes(|lane| lane.is_between(a, b), |lane| lane.break_off("connection reset", true));
    }

    /// Each packet that is sent between the two from now on takes so long.
    pub fn delay(&self, a: &str, b: &str, delay: Duration) {
        lock(&self.state).link(a, b).delay = delay;
    }

    /// The next packet between the two arrives twice.
    pub fn duplicate_next(&self, a: &str, b: &str) {
        lock(&self.state).link(a, b).duplicates = true;
    }

    fn for_lanes(&self, which: impl Fn(&Lane) -> bool, each: impl Fn(&Lane)) {
        let lanes: Vec<_> = {
            let mut state = lock(&self.state);
            state.lanes.retain(|lane| lane.strong_count() > 0);
            state.lanes.iter().filter_map(Weak::upgrade).collect()
        };
        lanes.iter().filter(|lane| which(lane)).for_each(|lane| each(lane));
    }

    fn link(&self, a: &str, b: &str) -> Link {
        *lock(&self.state).link(a, b)
    }

    fn lane(self: &Arc<Self>, from: &str, to: &str, acceptor: &str) -> (LaneIn, LaneOut) {
        let queue = Mutex::default();
        let lane = Arc::new(Lane { from: from.into(), to: to.into(), acceptor: acceptor.into(), queue });
        let mut state = lock(&self.state);
        state.lanes.retain(|lane| lane.strong_count() > 0);
        state.lanes.push(Arc::downgrade(&lane));
        drop(state);
        let ends = (self.clone(), lane);
        (LaneIn(ends.0.clone(), ends.1.clone()), LaneOut { network: ends.0, lane: ends.1, arrives: None, over: false })
    }
}

impl State {
    fn link(&mut self, a: &str, b: &str) -> &mut Link {
        let (first, second) = if a <= b { (a, b) } else { (b, a) };
        self.links.entry((first.to_owned(), second.to_owned())).or_default()
    }
}

/// One process of the network.
pub struct Host {
    network: Arc<Network>,
    name: String,
    role: Role,
    killed: Mutex<bool>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("name", &self.name).field("role", &self.role).finish_non_exhaustive()
    }
}

impl Host {
    /// The process is gone: its streams break, and it reaches nobody any more. Another may take its name.
    pub fn kill(&self) {
        *lock(&self.killed) = true;
        lock(&self.network.state).listeners.remove(&self.name);
        let mine = |lane: &Lane| lane.from == self.name || lane.to == self.name;
        self.network.for_lanes(mine, |lane| lane.break_off("connection reset: the process is gone", false));
    }

    fn is_killed(&self) -> bool {
        *lock(&self.killed)
    }

    async fn connect(&self, to: &str, role: Role, opening: Opening) -> Result<Pipe> {
        let network = &self.network;
        let mut tries = 1;
        while network.link(&self.name, to).cut.is_some() {
            if tries == CONNECT_TRIES_MAX {
                return Err(Error::retry("connection timed out"));
            }
            tries += 1;
            network.env.runtime.sleep(CONNECT_RETRY).await;
        }
        let delay = network.link(&self.name, to).delay;
        if delay > Duration::ZERO {
            // There and back.
            network.env.runtime.sleep(delay * 2).await;
        }
        let acceptor = {
            let state = lock(&network.state);
            match state.listeners.get(to) {
                Some(listener) if listener.role == role => listener.acceptor.clone(),
                Some(listener) => {
                    return Err(Error::abort(format!("the peer is a {}, but must be a {role}", listener.role)));
                }
                None => return Err(Error::retry("connection refused")),
            }
        };
        if self.is_killed() {
            return Err(Error::retry("the process is gone"));
        }
        let (there, arriving) = network.lane(&self.name, to, to);
        let (back, answers) = network.lane(to, &self.name, to);
        let peer = Peer { subject: Subject { job: network.job.clone(), role: self.role }, address: self.name.clone() };
        acceptor.accept(peer, opening, Pipe { outgoing: Box::new(back), incoming: arriving.into_stream() })?;
        Ok(Pipe { outgoing: Box::new(there), incoming: answers.into_stream() })
    }
}

#[async_trait]
impl Transport for Host {
    async fn open(&self, to: &Endpoint, role: Role, opening: Opening) -> Result<Pipe> {
        let purpose = opening.purpose.clone();
        let opened = self.connect(&to.0, role, opening).await;
        opened.context_with(|| format!("open a stream for {purpose} to the {role} at {to}"))
    }

    async fn listen(&self, _: &Endpoint, acceptor: Arc<dyn Acceptor>) -> Result<Box<dyn Listening>> {
        let listener = Listener { role: self.role, acceptor };
        if lock(&self.network.state).listeners.insert(self.name.clone(), listener).is_some() {
            return Err(Error::abort(format!("listen at {}: address in use", self.name)));
        }
        Ok(Box::new(Open { network: self.network.clone(), name: self.name.clone() }))
    }
}

struct Open {
    network: Arc<Network>,
    name: String,
}

#[async_trait]
impl Listening for Open {
    fn endpoint(&self) -> Endpoint {
        Endpoint(self.name.clone())
    }

    async fn close(&self) {
        lock(&self.network.state).listeners.remove(&self.name);
        let accepted = |lane: &Lane| lane.acceptor == self.name;
        self.network.for_lanes(accepted, |lane| lane.break_off("the process is shutting down", false));
    }
}

/// Where packets go into a lane.
struct LaneIn(Arc<Network>, Arc<Lane>);

impl Outgoing for LaneIn {
    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let mut queue = lock(&self.1.queue);
        // Before the link is looked at: whoever heals it wakes us after.
        queue.sender = Some(context.waker().clone());
        let cut = self.0.link(&self.1.from, &self.1.to).cut.is_some();
        match &queue.broken {
            Some((why, known)) if *known || !cut => return Poll::Ready(Err(Error::retry(why.clone()))),
            _ => {}
        }
        if queue.receiver_gone && !cut {
            return Poll::Ready(Err(Error::retry("the stream has ended")));
        }
        if queue.packets.len() < LANE_PACKETS_MAX {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    fn send(&mut self, packet: Packet) -> Result<()> {
        let (delay, twice) = {
            let mut state = lock(&self.0.state);
            let link = state.link(&self.1.from, &self.1.to);
            (link.delay, std::mem::take(&mut link.duplicates))
        };
        let arrives = self.0.env.clock.monotonic() + delay;
        let mut queue = lock(&self.1.queue);
        if twice {
            queue.packets.push_back((arrives, packet.clone()));
        }
        queue.packets.push_back((arrives, packet));
        if let Some(receiver) = queue.receiver.take() {
            receiver.wake();
        }
        Ok(())
    }
}

impl Drop for LaneIn {
    fn drop(&mut self) {
        let mut queue = lock(&self.1.queue);
        queue.sender_gone = true;
        queue.wake();
    }
}

/// Where packets come out of a lane.
struct LaneOut {
    network: Arc<Network>,
    lane: Arc<Lane>,
    /// Completes when the next packet is here.
    arrives: Option<BoxFuture<'static, ()>>,
    over: bool,
}

impl LaneOut {
    fn into_stream(mut self) -> super::Incoming {
        stream::poll_fn(move |context| self.poll(context)).boxed()
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Packet>>> {
        if self.over {
            return Poll::Ready(None);
        }
        loop {
            let mut queue = lock(&self.lane.queue);
            // Before the link is looked at: whoever heals it wakes us after.
            queue.receiver = Some(context.waker().clone());
            let cut = self.network.link(&self.lane.from, &self.lane.to).cut.is_some();
            match &queue.broken {
                Some((why, known)) if *known || !cut => {
                    self.over = true;
                    return Poll::Ready(Some(Err(Error::retry(why.clone()))));
                }
                _ if cut => return Poll::Pending,
                _ => {}
            }
            let Some((due, _)) = queue.packets.front() else {
                self.over = queue.sender_gone;
                return if self.over { Poll::Ready(None) } else { Poll::Pending };
            };
            let now = self.network.env.clock.monotonic();
            if *due <= now {
                self.arrives = None;
                if let Some(sender) = queue.sender.take() {
                    sender.wake();
                }
                return Poll::Ready(queue.packets.pop_front().map(|(_, packet)| Ok(packet)));
            }
            let wait = *due - now;
            drop(queue);
            let arrives = self.arrives.get_or_insert_with(|| self.network.env.runtime.sleep(wait));
            if arrives.poll_unpin(context).is_pending() {
                return Poll::Pending;
            }
            self.arrives = None;
        }
    }
}

impl Drop for LaneOut {
    fn drop(&mut self) {
        let mut queue = lock(&self.lane.queue);
        queue.receiver_gone = true;
        queue.packets.clear();
        queue.wake();
    }
}
