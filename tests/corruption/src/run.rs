//! Starts the job from a storage and runs it to its end, or until it is cut off, and listens to what it says.

use std::{
    fmt::{Debug, Write as _},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use floodmark_dataflow::{JobGraph, channel::CHANNEL_BYTES_MAX};
use floodmark_snapshot::{
    JobId,
    coordination::BarrierKind,
    restore::{Reference, StartId},
};
use floodmark_state::{StateBackend, StateSettings};
use floodmark_worker::{
    CheckpointMode, CheckpointSettings, Controls, Progress, RunError, RunSpec, SavepointRequest, Summary,
};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use crate::{
    job,
    runtime::{self, Stopped},
    world::{MapStorage, Objects, SharedTopic, Topic},
};

/// Key groups of the job.
pub const MAX_PARALLELISM: u16 = 16;

/// What to start.
#[derive(Clone)]
pub struct Start {
    /// Whose state it is.
    pub job: JobId,
    /// Subtasks of each task.
    pub parallelism: u32,
    /// From one checkpoint to the next.
    pub interval: Duration,
    /// How often the source says that there is nothing before each batch.
    pub pauses: u32,
    /// How many turns the tasks behind the source wait after each step.
    pub lag: u32,
    /// What to start from.
    pub restore: Reference,
    /// Keeps keyed state.
    pub backend: Arc<dyn StateBackend>,
    /// Tells the names that processes make apart.
    pub process: u64,
}

impl Start {
    /// The job's next process, which goes on from its newest checkpoint and takes one more at its end.
    #[must_use]
    pub fn again(backend: &Arc<dyn StateBackend>) -> Self {
        Self {
            job: job_id(),
            parallelism: 2,
            interval: Duration::from_secs(3600),
            pauses: 0,
            lag: 0,
            restore: Reference::Latest,
            backend: backend.clone(),
            process: 2,
        }
    }
}

/// The job that writes the specimen.
#[must_use]
pub fn job_id() -> JobId {
    JobId { namespace: "t".into(), name: "job".into(), uid: "1".into() }
}

/// What became of a process.
#[derive(Debug)]
pub enum End {
    /// It ended.
    Ended(Result<Summary, RunError>),
    /// It was cut off.
    CutOff,
    /// It would never have ended.
    Hangs,
    /// It panicked, with these words.
    Panicked(String),
}

/// What a process has left behind.
#[derive(Debug)]
pub struct Left {
    /// What became of it.
    pub end: End,
    /// The storage.
    pub objects: Objects,
    /// The topic.
    pub topic: Topic,
    /// What it warned of, a line each.
    pub warnings: Vec<String>,
}

/// What a process can be told while it runs.
pub struct Reins {
    /// The storage as it is.
    pub storage: Arc<MapStorage>,
    /// The topic as it is.
    pub topic: SharedTopic,
    savepoints: mpsc::Sender<SavepointRequest>,
    answers: Vec<oneshot::Receiver<Result<floodmark_worker::SavepointMade, String>>>,
}

impl Reins {
    /// Asks for a savepoint; the job goes on behind it.
    pub fn savepoint(&mut self, name: &str) {
        let (reply, answer) = oneshot::channel();
        let request = SavepointRequest { name: name.to_owned(), then: BarrierKind::Checkpoint, reply };
        // A process that is gone has no use for it.
        drop(self.savepoints.try_send(request));
        self.answers.push(answer);
    }
}

/// Runs a process from this storage and topic. `watch` is called before each of its steps, and true cuts it off.
pub fn run(start: &Start, objects: Objects, topic: Topic, watch: impl FnMut(&mut Reins) -> bool) -> Left {
    run_on(start, MapStorage::of(objects), topic, watch)
}

/// The same from a storage that is already there.
pub fn run_on(start: &Start, storage: Arc<MapStorage>, topic: Topic, watch: impl FnMut(&mut Reins) -> bool) -> Left {
    let topic = SharedTopic::of(topic);
    run_graph(start, job::graph(&topic, start.pauses), storage, topic, watch)
}

/// The same of another job than that of this crate; what it writes to `topic` is its own affair.
pub fn run_graph(
    start: &Start,
    graph: JobGraph,
    storage: Arc<MapStorage>,
    topic: SharedTopic,
    mut watch: impl FnMut(&mut Reins) -> bool,
) -> Left {
    let (_stop, stop) = watch::channel(false);
    let (controls, requests) = Controls::new(stop);
    let mut reins =
        Reins { storage: storage.clone(), topic: topic.clone(), savepoints: requests.savepoints, answers: Vec::new() };
    let spec = RunSpec {
        job: start.job.clone(),
        graph,
        parallelism: start.parallelism,
        max_parallelism: MAX_PARALLELISM,
        checkpoints: CheckpointSettings {
            mode: CheckpointMode::ExactlyOnce,
            interval: start.interval,
            timeout: Duration::from_secs(600),
            min_pause: Duration::ZERO,
            tolerable_failures: 0,
            retain: 3,
            max_concurrent: 3,
            unaligned_after: Some(Duration::ZERO),
        },
        storage: storage.clone(),
        restore: start.restore.clone(),
        initial: None,
        start: StartId::Process(format!("process:{}", start.process)),
        slice_bytes: 512,
        channel_bytes: CHANNEL_BYTES_MAX,
        restarts: floodmark_worker::RestartStrategy::None,
        allow_dropped_state: false,
        state: StateSettings { backend: start.backend.clone(), ..StateSettings::default() },
        holder: format!("process:{}", start.process),
        copies: None,
    };
    let heard = Heard::default();
    let run = || {
        let body = |env| Box::pin(floodmark_worker::run(spec, env, controls, Arc::new(Progress::default()))) as _;
        runtime::run(start.process, start.lag, body, || watch(&mut reins))
    };
    let stopped = tracing::subscriber::with_default(heard.clone(), || catch_unwind(AssertUnwindSafe(run)));
    let end = match stopped {
        Ok(Stopped::Ended(ended)) => End::Ended(ended),
        Ok(Stopped::CutOff) => End::CutOff,
        Ok(Stopped::Hangs) => End::Hangs,
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            End::Panicked(words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?").to_owned())
        }
    };
    let warnings = std::mem::take(&mut *heard.0.lock().unwrap_or_else(PoisonError::into_inner));
    let topic = topic.lock().clone();
    Left { end, objects: storage.objects(), topic, warnings }
}

/// Keeps warnings and errors.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<String>>>);

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a string can't fail.
        let _ =
            if field.name() == "message" { write!(self.0, "{value:?} ") } else { write!(self.0, "{field}={value:?} ") };
    }
}

impl Subscriber for Heard {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line.0.trim_end().to_owned());
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}
