//! What there is outside of processes: storage, broker, inputs; and the faults between a process and them.
//!
//! A request to the storage travels there, takes effect at one moment, and its reply travels back. Any leg may be slow or
//! fail, and what is on its way arrives although its sender has died. Listings are consistent, as S3's are: whatever has
//! taken effect is listed. The protocol rests on that.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use floodmark_snapshot::{
    Error, Result, Step,
    storage::{ObjectInfo, PutNew, Storage},
};
use floodmark_worker::link::transport::memory::Host;
use futures::future::{Either, select};
use tempfile::TempDir;
use tokio::sync::oneshot;

use crate::{
    Mutation,
    broker::Broker,
    executor::{Core, Pid},
    inputs::Inputs,
    jobs::STORAGE,
    monitor::Monitor,
    plan::{Action, Faults, Keeper, Plan},
    process::Process,
    random::Random,
    trace::Trace,
};

/// A client gives a request up after this long.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// A slow request takes effect at the latest after this long, whether or not somebody still waits for it.
pub(crate) const LATE_MAX: Duration = Duration::from_secs(8);
/// How often a client tries.
const ATTEMPTS_MAX: u32 = 4;
const BACKOFF: Duration = Duration::from_millis(50);

const MEMORY_DISK: &str = "/dev/shm";

/// At which effect of which process the process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crash {
    /// 1 for the first process, [`crate::FIRST_WORKER`] for the first worker.
    pub process: u32,
    /// Counted from 0: each change of the storage or the broker is one.
    pub effect: u64,
    /// Whether the effect still happens.
    pub after: bool,
}

/// Which side of a crash an effect is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strike {
    /// No crash.
    None,
    /// The process is dead, and the effect does not happen.
    Before,
    /// The effect happens; the process is dead.
    After,
}

/// See the header of this file.
pub(crate) struct World {
    pub(crate) core: Core,
    pub(crate) plan: Plan,
    pub(crate) inputs: Inputs,
    pub(crate) trace: Trace,
    pub(crate) mutation: Option<Mutation>,
    pub(crate) crash: Option<Crash>,
    objects: Mutex<BTreeMap<String, Bytes>>,
    broker: Mutex<Broker>,
    monitor: Mutex<Monitor>,
    random: Mutex<Random>,
    cut_off: Mutex<BTreeMap<Pid, Duration>>,
    effects: Mutex<BTreeMap<Pid, u64>>,
    steps: Mutex<BTreeMap<&'static str, u64>>,
    /// What the plan wants done at a step that has come.
    due: Mutex<Vec<(Pid, Action)>>,
    /// For back ends that need one.
    work_folder: Option<TempDir>,
    /// The network's ends of processes.
    hosts: Mutex<BTreeMap<Pid, Arc<Host>>>,
}

/// In memory, where there is such a disk: nothing in it needs to outlive this process, and databases wait for their disk.
fn work_folder() -> std::io::Result<TempDir> {
    tempfile::tempdir_in(MEMORY_DISK).or_else(|_| tempfile::tempdir())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    pub(crate) fn new(plan: Plan, trace: bool, mutation: Option<Mutation>, crash: Option<Crash>) -> Arc<Self> {
        let core = Core::default();
        let work_folder = (plan.keeper == Keeper::RocksDb).then(work_folder).and_then(Result::ok);
        Arc::new(Self {
            trace: Trace::new(core.clone(), trace),
            core,
            inputs: Inputs::draw(&plan),
            random: Mutex::new(Random::new(plan.seed, 2)),
            plan,
            mutation,
            crash,
            objects: Mutex::default(),
            broker: Mutex::default(),
            monitor: Mutex::default(),
            cut_off: Mutex::default(),
            effects: Mutex::default(),
            steps: Mutex::default(),
            due: Mutex::default(),
            work_folder,
            hosts: Mutex::default(),
        })
    }

    /// A folder on the real disk, if the plan needs one.
    pub(crate) fn work_folder(&self) -> Option<&Path> {
        self.work_folder.as_ref().map(TempDir::path)
    }

    pub(crate) fn monitor(&self) -> MutexGuard<'_, Monitor> {
        lock(&self.monitor)
    }

    pub(crate) fn broker(&self) -> MutexGuard<'_, Broker> {
        lock(&self.broker)
    }

    pub(crate) fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Bytes>> {
        lock(&self.objects)
    }

    pub(crate) fn random<T>(&self, draw: impl FnOnce(&mut Random) -> T) -> T {
        draw(&mut lock(&self.random))
    }

    pub(crate) fn effects(&self) -> BTreeMap<Pid, u64> {
        lock(&self.effects).clone()
    }

    /// Whether faults still strike.
    pub(crate) fn rough(&self) -> bool {
        self.core.now() < self.plan.faults_until
    }

    /// Whether this fault strikes now; it is counted.
    pub(crate) fn strikes(&self, kind: &'static str, probability: impl Fn(&Faults) -> f64) -> bool {
        let struck = self.rough() && self.random(|r| r.chance(probability(&self.plan.faults)));
        if struck {
            self.monitor().count(kind);
        }
        struck
    }

    pub(crate) fn cut_off(&self, pid: Pid, until: Duration) {
        lock(&self.cut_off).insert(pid, until);
    }

    pub(crate) fn is_cut_off(&self, pid: Pid) -> bool {
        lock(&self.cut_off).get(&pid).is_some_and(|until| *until > self.core.now())
    }

    pub(crate) fn heal_all(&self) {
        lock(&self.cut_off).clear();
    }

    pub(crate) fn violation(&self, what: String) {
        self.trace.line(0, || format!("VIOLATION: {what}"));
        self.monitor().violation(what);
        self.core.interrupt();
    }

    pub(crate) fn kill(&self, pid: Pid, why: &str) {
        self.trace.line(pid, || format!("dies: {why}"));
        self.monitor().count("crashes");
        self.bury(pid);
        self.core.interrupt();
    }

    /// A process is gone, and its connections with it.
    pub(crate) fn bury(&self, pid: Pid) {
        self.core.kill(pid);
        let host = lock(&self.hosts).remove(&pid);
        if let Some(host) = host {
            host.kill();
        }
    }

    /// A process is on the network.
    pub(crate) fn has_host(&self, pid: Pid, host: &Arc<Host>) {
        lock(&self.hosts).insert(pid, host.clone());
    }

    /// Nobody is on the network any more.
    pub(crate) fn close(&self) {
        lock(&self.hosts).clear();
    }

    /// An effect of this process is about to happen.
    pub(crate) fn strike(&self, pid: Pid) -> Strike {
        let number = {
            let mut effects = lock(&self.effects);
            let count = effects.entry(pid).or_default();
            *count += 1;
            *count - 1
        };
        match self.crash.filter(|c| (c.process, c.effect) == (pid, number)) {
            None => Strike::None,
            Some(crash) => {
                let side = if crash.after { Strike::After } else { Strike::Before };
                self.kill(pid, &format!("at effect {number}, {side:?}"));
                side
            }
        }
    }

    /// A process has come to a step of the protocol.
    pub(crate) fn reached(&self, pid: Pid, step: Step) {
        let number = {
            let mut steps = lock(&self.steps);
            let count = steps.entry(step.name()).or_default();
            *count += 1;
            *count - 1
        };
        if !self.rough() {
            return;
        }
        for (_, _, action) in self.plan.at_steps.iter().filter(|(s, n, _)| (*s, *n) == (step, number)) {
            match action {
                Action::Crash => self.kill(pid, &format!("at {step}")),
                action => lock(&self.due).push((pid, *action)),
            }
            self.core.interrupt();
        }
    }

    pub(crate) fn take_due(&self) -> Vec<(Pid, Action)> {
        std::mem::take(&mut *lock(&self.due))
    }

    fn interrupt_if_violated(&self) {
        if !self.monitor().notes.violations.is_empty() {
            self.core.interrupt();
        }
    }
}

/// What a request does at the storage.
#[derive(Clone)]
enum Request {
    PutNew(Bytes),
    Put(Bytes),
    Get,
    Range(u64, u64),
    Size,
    List(Option<String>),
    Delete,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PutNew(_) => "create",
            Self::Put(_) => "put",
            Self::Get | Self::Range(..) => "get",
            Self::Size => "size",
            Self::List(_) => "list",
            Self::Delete => "delete",
        })
    }
}

/// What the storage answers.
enum Answer {
    Created,
    Exists,
    Done,
    Object(Option<Bytes>),
    Size(Option<u64>),
    Listed(Vec<ObjectInfo>),
}

/// A process's client of the storage.
pub(crate) struct Client {
    world: Arc<World>,
    pid: Pid,
    /// The job of the process.
    job: u32,
    /// Whether it has looked for orphans.
    swept: AtomicBool,
}

impl Client {
    pub(crate) fn of(process: &Process) -> Self {
        Self { world: process.world.clone(), pid: process.pid, job: process.job, swept: AtomicBool::new(false) }
    }

    /// Sends a request until it is answered, a few times at most, as production's client does.
    async fn ask(&self, path: &str, request: Request) -> Result<Answer> {
        let mut why = "";
        for attempt in 0..ATTEMPTS_MAX {
            if attempt > 0 {
                self.world.core.sleep(BACKOFF * 2_u32.pow(attempt)).await;
            }
            match self.send(path.to_owned(), request.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(reason) => why = reason,
            }
            self.world.trace.line(self.pid, || format!("{request} {path}: {why}"));
        }
        Err(Error::retry(format!("{request} {path}: {why}")))
    }

    async fn send(&self, path: String, request: Request) -> Result<Answer, &'static str> {
        let (world, pid, job) = (self.world.clone(), self.pid, self.job);
        let leg = |slow: bool| {
            let most = if slow { LATE_MAX } else { Duration::from_millis(6) };
            let least = Duration::from_micros(if slow { 50_000 } else { 300 });
            world.random(|r| r.spread(least, most))
        };
        let (there, back) = (leg(world.strikes("storage requests slow", |f| f.storage_slow)), leg(false));
        if world.strikes("storage requests refused", |f| f.storage_refused) {
            world.core.sleep(there).await;
            return Err("503 slow down");
        }
        let lost = world.is_cut_off(pid) || world.strikes("storage requests lost", |f| f.storage_lost);
        let reply_lost = world.strikes("storage replies lost", |f| f.storage_reply_lost);
        let (reply, answer) = oneshot::channel();
        if !lost {
            let at = world.clone();
            world.core.after(there, move || {
                let Some(answer) = at.take_effect((pid, job), &path, request) else { return };
                if !reply_lost && !at.is_cut_off(pid) {
                    let core = at.core.clone();
                    core.after(back, move || drop(reply.send(answer)));
                } else {
                    let core = at.core.clone();
                    core.after(back, move || drop(reply));
                }
            });
        } else {
            world.core.after(REQUEST_TIMEOUT, move || drop(reply));
        }
        match select(answer, world.core.sleep(REQUEST_TIMEOUT)).await {
            Either::Left((Ok(answer), _)) => Ok(answer),
            Either::Left((Err(_), _)) => Err("connection reset"),
            Either::Right(_) => Err("timed out"),
        }
    }
}

impl World {
    /// The moment at which a request arrives.
    fn take_effect(&self, by: (Pid, u32), path: &str, request: Request) -> Option<Answer> {
        let (pid, _) = by;
        let changes = matches!(request, Request::PutNew(_) | Request::Put(_) | Request::Delete);
        if changes && self.strike(pid) == Strike::Before {
            return None;
        }
        if changes {
            self.trace.line(pid, || format!("{request} {path}"));
        }
        let mut objects = self.objects();
        let answer = match request {
            Request::PutNew(_) if objects.contains_key(path) => {
                self.monitor().count("log races");
                if self.mutation == Some(Mutation::ZombieAccepted) { Answer::Created } else { Answer::Exists }
            }
            Request::PutNew(bytes) | Request::Put(bytes) => {
                self.put(by, path, bytes, &mut objects);
                Answer::Created
            }
            Request::Get => Answer::Object(objects.get(path).cloned()),
            Request::Range(from, to) => {
                let range = |b: &Bytes| b.slice((from as usize).min(b.len())..(to as usize).min(b.len()));
                Answer::Object(objects.get(path).map(range))
            }
            Request::Size => Answer::Size(objects.get(path).map(|b| b.len() as u64)),
            Request::List(after) => Answer::Listed(list(&objects, path, after.as_deref())),
            Request::Delete => {
                self.monitor().deleting(path, by);
                objects.remove(path);
                Answer::Done
            }
        };
        drop(objects);
        self.interrupt_if_violated();
        Some(answer)
    }

    fn put(&self, by: (Pid, u32), path: &str, bytes: Bytes, objects: &mut BTreeMap<String, Bytes>) {
        let (pid, _) = by;
        self.monitor().writing(path, by, self.plan.checkpoints.mode);
        if path.contains("/log/") {
            self.trace.line(pid, || format!("log entry: {}", String::from_utf8_lossy(&bytes).trim_end()));
        }
        let old = objects.insert(path.to_owned(), bytes.clone());
        match old {
            Some(old) => self.monitor().overwriting(path, old == bytes, pid),
            None => {
                let rough = self.rough();
                self.monitor().created(path, &bytes, objects, &self.broker(), rough);
            }
        }
    }
}

fn list(objects: &BTreeMap<String, Bytes>, folder: &str, after: Option<&str>) -> Vec<ObjectInfo> {
    let inside = |path: &str| path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
    objects
        .range(folder.to_owned()..)
        .take_while(|(path, _)| path.starts_with(folder))
        .filter(|(path, _)| inside(path) && after.is_none_or(|a| path.as_str() > a))
        .map(|(path, bytes)| ObjectInfo { path: path.clone(), size: bytes.len() as u64 })
        .collect()
}

fn misfit<T>() -> Result<T> {
    Err(Error::abort("the simulated storage answered another question"))
}

#[async_trait]
impl Storage for Client {
    async fn put_new(&self, path: &str, bytes: Bytes) -> Result<PutNew> {
        match self.ask(path, Request::PutNew(bytes.clone())).await? {
            Answer::Created => Ok(PutNew::Created),
            // Its own object, if the first reply was lost.
            Answer::Exists => Ok(match self.get(path).await? {
                Some(found) if found == bytes => PutNew::Created,
                Some(_) | None => PutNew::Exists,
            }),
            _ => misfit(),
        }
    }

    async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        self.ask(path, Request::Put(bytes)).await.map(drop)
    }

    async fn get(&self, path: &str) -> Result<Option<Bytes>> {
        match self.ask(path, Request::Get).await? {
            Answer::Object(found) => Ok(found),
            _ => misfit(),
        }
    }

    async fn get_range(&self, path: &str, from: u64, to: u64) -> Result<Option<Bytes>> {
        match self.ask(path, Request::Range(from, to)).await? {
            Answer::Object(found) => Ok(found),
            _ => misfit(),
        }
    }

    async fn size(&self, path: &str) -> Result<Option<u64>> {
        match self.ask(path, Request::Size).await? {
            Answer::Size(found) => Ok(found),
            _ => misfit(),
        }
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>> {
        let sweeps = prefix.ends_with("/blobs");
        if sweeps && self.world.mutation == Some(Mutation::NeverSwept) {
            return Ok(Vec::new());
        }
        let again = sweeps && self.swept.swap(true, Ordering::Relaxed);
        if again && self.world.mutation == Some(Mutation::SweptOnce) {
            return Ok(Vec::new());
        }
        match self.ask(prefix, Request::List(start_after.map(str::to_owned))).await? {
            Answer::Listed(found) => Ok(found),
            _ => misfit(),
        }
    }

    async fn delete(&self, path: &str) -> Result<()> {
        if self.world.mutation == Some(Mutation::DeletedEarly) && path.contains("/blobs/") {
            // The file that sorts first goes with it, whoever needs it.
            let first = self.list(path.split("/blobs/").next().unwrap_or_default(), None).await?.into_iter().next();
            if let Some(first) = first.filter(|f| f.path.contains("/blobs/")) {
                self.ask(&first.path, Request::Delete).await?;
            }
        }
        self.ask(path, Request::Delete).await.map(drop)
    }

    fn describe(&self) -> String {
        STORAGE.to_owned()
    }
}
