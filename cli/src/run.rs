//! `floodmark run`: coordinates one job, and runs its subtasks in this process or in others on this machine.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use floodmark_crds::{
    CheckpointMode as Mode, CheckpointSpec, HumanDuration, RestartSpec, RestartStrategy as Restarting,
    StateBackend as Backend, StreamJobSpec,
};
use floodmark_dataflow::{JobGraph, channel::CHANNEL_BYTES_MAX, graph::NodeKind};
use floodmark_rocksdb::{RocksDb, Settings};
use floodmark_snapshot::{
    Disposition, Env,
    restore::{Reference, StartId},
    storage,
};
use floodmark_state::{Heap, StateBackend, StateSettings, Whole};
use floodmark_worker::{
    Candidacy, CheckpointMode, CheckpointSettings, Controls, LOCAL_COPIES_BYTES_MAX, LocalCopies, Network, Outcome,
    Progress, RestartStrategy, RunError, RunSpec, SLICE_BYTES, Summary,
    api::{self, JobApi, Outline},
    leadership::{FileLock, KubernetesLease, Leadership},
    link::{tls::Folder, transport::Endpoint},
};
use nix::sys::resource::{UsageWho, getrusage};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    args::{CoordinatorArgs, HttpArgs, Output, RunArgs},
    control::{self, Place},
    crash,
    display::Display,
    exit::{Exit, Failure},
    job::{self, Job},
    lease::LeaseWanted,
    plan,
    screen::{Screen, print},
    signals,
    summary::{RunOutcome, RunReport},
    workers::{LocalWorkers, network},
};

/// Where RocksDB works if nobody says where: in the system's folder for temporary files.
const WORK_FOLDER: &str = "floodmark-work";

/// Where the job's subtasks run.
enum Workers {
    /// In this process.
    Here,
    /// In processes that this one starts.
    Local(LocalWorkers),
    /// In processes that come by themselves; once this one leads.
    Others(Network, Election),
}

/// What makes a process lead.
enum Election {
    /// Nothing: it is the only one.
    None,
    /// A lock file, which it shares with others on this machine.
    Lock(FileLock),
    /// A Lease in its cluster.
    Lease(LeaseWanted),
}

/// `floodmark run`: runs the job to its end and prints the summary.
pub(crate) fn run(args: &RunArgs, screen: &Screen) -> Result<Exit, Failure> {
    run_on(args, screen, |job, env| match args.workers {
        Some(count) => LocalWorkers::prepare(args, count, job, env).map(Workers::Local),
        None => Ok(Workers::Here),
    })
}

/// `floodmark coordinator`: the same with workers that come by themselves.
pub(crate) fn coordinate(args: &CoordinatorArgs, screen: &Screen) -> Result<Exit, Failure> {
    run_on(&args.run, screen, |_, env| {
        let network = network(env, Folder(args.identity.clone()), &args.listen);
        let election = match (&args.standby_lock, LeaseWanted::of(&args.lease)?) {
            (_, Some(wanted)) => Election::Lease(wanted),
            (Some(path), None) => Election::Lock(FileLock::new(path.clone(), env.clone())),
            (None, None) => Election::None,
        };
        Ok(Workers::Others(network, election))
    })
}

fn run_on(
    args: &RunArgs,
    screen: &Screen,
    workers: impl FnOnce(&Job, &Env) -> Result<Workers, Failure>,
) -> Result<Exit, Failure> {
    let env = crash::arm(Env::system())?;
    floodmark_footprint::keep_small();
    let started = env.clock.monotonic();
    let progress = Arc::new(Progress::default());
    let mut job = String::new();
    let ran = job::load(&args.job, args.parallelism).and_then(|loaded| {
        job = loaded.id.to_string();
        let workers = workers(&loaded, &env)?;
        // What a run starts from may not be there yet while another leads: then its start says whether it fits.
        let leads = !matches!(workers, Workers::Others(_, Election::Lease(_)));
        let restore = restore(args, &loaded, leads)?;
        let places = Places {
            storage: args.storage.as_deref(),
            work_dir: args.work_dir.as_deref(),
            local_dir: args.local_dir.as_deref(),
        };
        let (mut spec, location) = spec(loaded, &places, &env)?;
        if matches!(workers, Workers::Here) {
            spec.copies = local_copies(&spec, &places, &env)?;
        }
        tracing::info!("job {}: checkpoints in {}", spec.job, spec.storage.describe());
        let place = Place::of(&spec.job, &location);
        (spec.restore, spec.initial) = restore;
        if let Workers::Others(_, Election::Lease(wanted)) = &workers {
            spec.start = StartId::Run(wanted.run);
        }
        drive(spec, &place, &args.http, workers, &env, &progress, screen)
    });
    screen.clear();
    let (mut report, failure) = match ran {
        Ok(Some(summary)) => {
            let last_epoch = summary.last_epoch.map(|e| e.0);
            (RunReport::empty(job, outcome(summary.outcome)).with_progress(&summary.progress, last_epoch), None)
        }
        Ok(None) => (RunReport::empty(job, RunOutcome::HandedOver).with_progress(&progress.view(), None), None),
        Err(failure) => {
            let outcome = match failure.exit {
                Exit::JobFailed | Exit::Done | Exit::Interrupted => RunOutcome::Failed,
                Exit::Fenced => RunOutcome::Fenced,
                Exit::BadInput | Exit::Storage => RunOutcome::Refused,
            };
            (RunReport::empty(job, outcome).with_progress(&progress.view(), None), Some(failure))
        }
    };
    report.error = failure.as_ref().map(|f| f.message.clone());
    report.exit_code = failure.as_ref().map_or(Exit::Done, |f| f.exit).code();
    report.cpu_seconds = cpu_seconds();
    report.wall_seconds = (env.clock.monotonic() - started).as_secs_f64();
    match args.output {
        Output::Json => print(&format!("{}\n", report.json())),
        // A job that never started has nothing to sum up.
        Output::Text if report.outcome != RunOutcome::Refused => eprintln!("{}", report.text()),
        Output::Text => {}
    }
    failure.map_or(Ok(Exit::Done), Err)
}

/// What the command line says of a job's places, before the manifest does.
pub(crate) struct Places<'a> {
    pub(crate) storage: Option<&'a str>,
    pub(crate) work_dir: Option<&'a Path>,
    pub(crate) local_dir: Option<&'a Path>,
}

impl Places<'_> {
    /// Where RocksDB works.
    fn work_dir(&self) -> PathBuf {
        self.work_dir.map_or_else(|| std::env::temp_dir().join(WORK_FOLDER), Path::to_owned)
    }
}

/// What the job starts from, and what if it has no past; refused here if that does not fit, unless that is not to be known yet.
fn restore(args: &RunArgs, job: &Job, known: bool) -> Result<(Reference, Option<Reference>), Failure> {
    let location = job::storage(args.storage.as_deref(), &job.manifest)?;
    let initial = plan::initial(job)?;
    let restore = job::absolute_reference(args.restore.clone().unwrap_or(Reference::Latest))?;
    if known {
        job::runtime()?.block_on(plan::admit(job, &location, &restore, initial.as_ref()))?;
    }
    Ok((restore, initial))
}

/// How to run a job, and where its snapshots are. It starts from its newest checkpoint.
pub(crate) fn spec(job: Job, places: &Places<'_>, env: &Env) -> Result<(RunSpec, String), Failure> {
    let location = job::storage(places.storage, &job.manifest)?;
    let storage = storage::open(&location).map_err(|e| Failure::new(Exit::Storage, e))?;
    let spec = job.manifest.spec;
    let state = state_settings(places, &spec, env)?;
    let spec = RunSpec {
        job: job.id,
        graph: job.graph,
        parallelism: spec.parallelism,
        max_parallelism: spec.max_parallelism,
        state,
        checkpoints: checkpoint_settings(&spec.checkpoints),
        storage,
        restore: Reference::Latest,
        initial: None,
        start: StartId::Process(env.ids.ulid()),
        slice_bytes: SLICE_BYTES,
        channel_bytes: CHANNEL_BYTES_MAX,
        restarts: restarts(&spec.restarts),
        allow_dropped_state: spec.restore.allow_dropped_state,
        holder: holder(),
        copies: None,
    };
    Ok((spec, location))
}

/// Where a process that runs subtasks keeps copies of what they upload. There is no place if they would be read no faster than the
/// storage.
pub(crate) fn local_copies(
    spec: &RunSpec,
    places: &Places<'_>,
    env: &Env,
) -> Result<Option<Arc<LocalCopies>>, Failure> {
    if spec.storage.is_local() || spec.checkpoints.mode == CheckpointMode::Disabled {
        return Ok(None);
    }
    let folder = places.local_dir.map_or_else(|| places.work_dir(), Path::to_owned);
    let copies = LocalCopies::open(&folder, LOCAL_COPIES_BYTES_MAX, env);
    copies.map(|copies| Some(Arc::new(copies))).map_err(|e| Failure::new(Exit::Storage, e))
}

fn state_settings(places: &Places<'_>, spec: &StreamJobSpec, env: &Env) -> Result<StateSettings, Failure> {
    let backend: Arc<dyn StateBackend> = match spec.state.backend {
        Backend::Heap => Arc::new(Heap),
        Backend::RocksDb => {
            Arc::new(RocksDb::open(&Settings::new(places.work_dir()), env).map_err(|e| Failure::new(Exit::Storage, e))?)
        }
    };
    let backend = if spec.checkpoints.incremental { backend } else { Arc::new(Whole(backend)) };
    Ok(StateSettings { backend, ttl: spec.state.ttl.map(HumanDuration::get), ..StateSettings::default() })
}

fn restarts(spec: &RestartSpec) -> RestartStrategy {
    let delay = spec.delay.get();
    match spec.strategy {
        Restarting::ExponentialDelay => RestartStrategy::ExponentialDelay {
            initial: delay,
            max: spec.max_delay.get(),
            reset_after: spec.reset_after.get(),
        },
        Restarting::FixedDelay => RestartStrategy::FixedDelay { attempts: spec.attempts, delay },
        Restarting::FailureRate => {
            RestartStrategy::FailureRate { max: spec.attempts, interval: spec.interval.get(), delay }
        }
        Restarting::None => RestartStrategy::None,
    }
}

fn checkpoint_settings(spec: &CheckpointSpec) -> CheckpointSettings {
    CheckpointSettings {
        mode: match spec.mode {
            Mode::ExactlyOnce => CheckpointMode::ExactlyOnce,
            Mode::AtLeastOnce => CheckpointMode::AtLeastOnce,
            Mode::Disabled => CheckpointMode::Disabled,
        },
        interval: spec.interval.get(),
        timeout: spec.timeout.get(),
        min_pause: spec.min_pause.get(),
        tolerable_failures: spec.tolerable_failures,
        retain: spec.retain as usize,
        max_concurrent: spec.max_concurrent as usize,
        unaligned_after: spec.unaligned.as_ref().map(|u| u.after_alignment.get()),
    }
}

/// Runs the worker under a display, with signals and the control interface listened to.
fn drive(
    spec: RunSpec,
    place: &Place,
    http: &HttpArgs,
    workers: Workers,
    env: &Env,
    progress: &Arc<Progress>,
    screen: &Screen,
) -> Result<Option<Summary>, Failure> {
    let failed = |what: &str, e: &dyn std::fmt::Display| Failure::new(Exit::JobFailed, format!("{what}: {e}"));
    let runtime = runtime()?;
    let listener = runtime.block_on(control::listen(http))?;
    let (stop, stopped) = watch::channel(false);
    let (hand_over, handed_over) = watch::channel(false);
    let screen = if prints_rows(&spec.graph) { screen.shared_with_rows() } else { screen.clone() };
    match &workers {
        Workers::Others(_, Election::Lease(_)) => signals::listen(hand_over, screen.clone(), "handing the job over")?,
        Workers::Here | Workers::Local(_) | Workers::Others(..) => {
            signals::listen(stop.clone(), screen.clone(), "taking a last checkpoint, then stopping")?;
        }
    }
    let display = Display::start(progress.clone(), env.clone(), screen).map_err(|e| failed("start the display", &e))?;
    let workers = runtime.block_on(workers.elected(listener.as_ref(), spec.parallelism, progress, env))?;
    let (controls, requests) = Controls::new(stopped);
    let router = api::router(JobApi {
        job: spec.job.clone(),
        holder: spec.holder.clone(),
        graph: Outline::of(&spec.graph),
        parallelism: spec.parallelism,
        max_parallelism: spec.max_parallelism,
        progress: progress.clone(),
        requests,
        stop,
        storage: spec.storage.clone(),
    });
    let (end, ended) = watch::channel(false);
    // Whoever stands by answers nobody.
    let (lead, mut leads) = watch::channel(!matches!(workers, Ready::Others(_, Some(_))));
    let ran = runtime.block_on(async {
        let job = async {
            let env = env.clone();
            let listening = |endpoint: &Endpoint| {
                tracing::info!("listening for workers at {endpoint}");
                lead.send_replace(true);
            };
            let progress = progress.clone();
            let ran = match workers {
                Ready::Here => floodmark_worker::run(spec, env, controls, progress).await.map(Some),
                Ready::Local(workers) => on_workers(spec, workers, &env, controls, &progress).await.map(Some),
                Ready::Others(network, None) => {
                    let ran = floodmark_worker::coordinate(spec, env, controls, progress, network, listening);
                    ran.await.map(Some)
                }
                Ready::Others(network, Some(leadership)) => {
                    let candidacy = Candidacy { leadership: &*leadership, hand_over: handed_over };
                    floodmark_worker::stand_by(spec, env, controls, progress, network, candidacy, listening).await
                }
            };
            end.send_replace(true);
            lead.send_replace(true);
            ran
        };
        let guarded = control::guarded(router.clone(), http, env);
        let over_tcp = control::while_leading(guarded, leads.clone());
        let over_tcp = control::serve_tcp(over_tcp, listener, env, ended.clone());
        let answers = async {
            // The sender is there until the job has ended.
            let _ = leads.wait_for(|l| *l).await;
            control::serve(router, place, env, ended).await;
        };
        tokio::join!(job, answers, over_tcp).0
    });
    display.finish();
    // Whatever still blocks in the background (a library's thread, an upload of a fenced run) must not keep the process.
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    ran.map_err(|error| {
        let exit = exit_of(&error);
        Failure::new(exit, error)
    })
}

/// Where the job's subtasks run, and what makes this process lead.
enum Ready {
    Here,
    Local(LocalWorkers),
    Others(Network, Option<Box<dyn Leadership>>),
}

impl Workers {
    /// Finds the way to whoever elects, within a runtime. `listener` is where this process answers HTTP.
    async fn elected(
        self,
        listener: Option<&TcpListener>,
        parallelism: u32,
        progress: &Arc<Progress>,
        env: &Env,
    ) -> Result<Ready, Failure> {
        Ok(match self {
            Self::Here => Ready::Here,
            Self::Local(workers) => Ready::Local(workers),
            Self::Others(network, Election::None) => Ready::Others(network, None),
            Self::Others(network, Election::Lock(lock)) => Ready::Others(network, Some(Box::new(lock))),
            Self::Others(network, Election::Lease(wanted)) => {
                let LeaseWanted { name, rhythm, .. } = &wanted;
                let port = listener.and_then(|l| l.local_addr().ok()).map(|at| at.port());
                let candidate = wanted.candidate(port, parallelism);
                let lease = KubernetesLease::connect(name.clone(), candidate, *rhythm, progress.clone(), env.clone());
                let lease = lease.await.map_err(|e| Failure::new(Exit::JobFailed, e))?;
                Ready::Others(network, Some(Box::new(lease)))
            }
        })
    }
}

/// Coordinates a job whose subtasks run in other processes on this machine.
async fn on_workers(
    spec: RunSpec,
    workers: LocalWorkers,
    env: &Env,
    controls: Controls,
    progress: &Arc<Progress>,
) -> Result<Summary, RunError> {
    let (told, place) = tokio::sync::oneshot::channel();
    let (end, mut ended) = watch::channel(false);
    let network = workers.network();
    let coordinate = async {
        // The processes are waited for as long as the job is.
        let listening = |endpoint: &Endpoint| drop(told.send(endpoint.clone()));
        let ran = floodmark_worker::coordinate(spec, env.clone(), controls, progress.clone(), network, listening).await;
        end.send_replace(true);
        ran
    };
    let processes = async {
        if let Ok(endpoint) = place.await {
            workers.run(endpoint, env, &mut ended).await;
        }
    };
    tokio::join!(coordinate, processes).0
}

/// The runtime of a process that runs a job or part of it.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|e| Failure::new(Exit::JobFailed, format!("start the runtime: {e}")))
}

/// Whether a sink writes to standard output. Only the display depends on it.
fn prints_rows(graph: &JobGraph) -> bool {
    graph.nodes().any(|(_, node)| matches!(&node.node, NodeKind::Sink(sink) if sink.kind() == "print sink"))
}

/// How long the runtime's blocking calls may take to end after the job has.
pub(crate) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

fn exit_of(error: &RunError) -> Exit {
    match error {
        // What may go away by itself (a broker that can't be reached) is no fault of the declaration.
        RunError::Connector(e) if e.disposition() == Disposition::Retry => Exit::JobFailed,
        RunError::Connector(_) => Exit::BadInput,
        RunError::Storage(e) if e.disposition() == Disposition::Fenced => Exit::Fenced,
        RunError::Storage(_) => Exit::Storage,
        RunError::Failed(_) => Exit::JobFailed,
        RunError::Fenced(_) => Exit::Fenced,
    }
}

fn outcome(outcome: Outcome) -> RunOutcome {
    match outcome {
        Outcome::Finished => RunOutcome::Finished,
        Outcome::Stopped => RunOutcome::Stopped,
        Outcome::AlreadyFinished => RunOutcome::AlreadyFinished,
    }
}

/// Who this process is, for readers of the checkpoint log.
pub(crate) fn holder() -> String {
    format!("{}:{}", host(), std::process::id())
}

/// The name of this machine.
pub(crate) fn host() -> String {
    nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok()).unwrap_or_else(|| "unknown".to_owned())
}

/// User and system time of this process so far, and of those that it has started and that have ended.
fn cpu_seconds() -> f64 {
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    let of = |who| getrusage(who).map_or(0.0, |usage| seconds(usage.user_time()) + seconds(usage.system_time()));
    of(UsageWho::RUSAGE_SELF) + of(UsageWho::RUSAGE_CHILDREN)
}
