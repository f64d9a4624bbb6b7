//! Processes that run a job's subtasks: `floodmark worker`, and those that `floodmark run --workers` starts on this machine.
//!
//! Invariant: a worker that was started here ends with who has started it.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use floodmark_snapshot::{Env, JobId};
use floodmark_worker::{
    Network, Progress,
    api::{self, Outline, WorkerApi},
    link::{
        control::Heartbeat,
        tls::{Authority, Folder, IdentitySource, Role, Subject},
        transport::{
            Endpoint,
            grpc::{GrpcTransport, Settings},
        },
    },
};
use nix::{
    sys::{
        prctl::set_pdeathsig,
        signal::{Signal, kill},
    },
    unistd::{Pid, getppid},
};
use tokio::sync::watch;

use crate::{
    args::{HttpArgs, RunArgs, WorkerArgs},
    control,
    exit::{Exit, Failure},
    job::{self, Job},
    run::{self, Places},
    screen::Screen,
    signals,
};

/// How long certificates of local processes are in force: longer than any of these runs.
const LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// From one look at the processes to the next.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long processes may take to end once they are told to.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// Where local processes listen.
const LOCAL: &str = "127.0.0.1:0";

/// `floodmark worker`: serves a coordinator until it is told to stop.
pub(crate) fn worker(args: &WorkerArgs, screen: &Screen) -> Result<Exit, Failure> {
    if let Some(parent) = args.parent {
        let failed = |e: nix::Error| Failure::new(Exit::JobFailed, format!("watch the process that started this: {e}"));
        set_pdeathsig(Signal::SIGTERM).map_err(failed)?;
        // It may have died before that.
        if getppid() != Pid::from_raw(parent) {
            return Ok(Exit::Done);
        }
    }
    let env = crate::crash::arm(Env::system())?;
    floodmark_footprint::keep_small();
    let job = job::load(&args.job, None)?;
    let places = Places {
        storage: args.storage.as_deref(),
        work_dir: args.work_dir.as_deref(),
        local_dir: args.local_dir.as_deref(),
    };
    let mut spec = run::spec(job, &places, &env)?.0;
    spec.copies = run::local_copies(&spec, &places, &env)?;
    let network = network(&env, Folder(args.identity.clone()), &args.listen);
    let (stop, stopped) = watch::channel(false);
    signals::listen(stop, screen.clone(), "leaving the job")?;
    let runtime = run::runtime()?;
    let coordinator = args.coordinator.clone();
    let http = HttpArgs { listen_http: args.listen_http.clone(), http_token_file: None };
    let listener = runtime.block_on(control::listen(&http))?;
    let progress = Arc::<Progress>::default();
    let (graph, slots) = (Outline::of(&spec.graph), args.slots);
    let router = api::worker_router(WorkerApi { graph, slots, progress: progress.clone() });
    let (end, ended) = watch::channel(false);
    let served = runtime.block_on(async {
        let serve = async {
            let served =
                floodmark_worker::serve(spec, env.clone(), network, coordinator, slots, stopped, progress).await;
            end.send_replace(true);
            served
        };
        let over_tcp = control::serve_tcp(router, listener, &env, ended);
        tokio::join!(serve, over_tcp).0
    });
    runtime.shutdown_timeout(run::SHUTDOWN_TIMEOUT);
    served.map(|()| Exit::Done).map_err(|e| Failure::new(Exit::JobFailed, e))
}

/// The way to the other processes of a job.
pub(crate) fn network(env: &Env, identities: impl IdentitySource + 'static, listen: &str) -> Network {
    let transport = GrpcTransport::new(env.clone(), Arc::new(identities), Settings::default());
    Network { transport: Arc::new(transport), listen: Endpoint(listen.to_owned()), heartbeat: Heartbeat::default() }
}

/// What the processes of a job on this machine share.
pub(crate) struct LocalWorkers {
    count: u32,
    /// Holds their identities and the manifest; removed at the end.
    folder: PathBuf,
    arguments: Vec<String>,
    coordinator: Network,
}

impl LocalWorkers {
    /// Makes identities for `count` workers and a coordinator of this job, for nobody else to read.
    ///
    /// # Errors
    /// When they can't be made or written.
    pub(crate) fn prepare(args: &RunArgs, count: u32, job: &Job, env: &Env) -> Result<Self, Failure> {
        let failed = |e: &dyn std::fmt::Display| Failure::new(Exit::JobFailed, format!("prepare local workers: {e}"));
        let folder = std::env::temp_dir().join(format!("floodmark-{}-{}", std::process::id(), env.ids.ulid()));
        let authority = Authority::new(env.clock.clone()).map_err(|e| failed(&e))?;
        let subject = |role| Subject { job: JobId { ..job.id.clone() }, role };
        private_folder(&folder).map_err(|e| failed(&e))?;
        let issued = authority.issue(&subject(Role::Worker), LIFETIME).map_err(|e| failed(&e))?;
        issued.write(&folder).map_err(|e| failed(&e))?;
        let manifest = folder.join("job.yaml");
        let text = serde_json::to_string(&job.manifest).map_err(|e| failed(&e))?;
        std::fs::write(&manifest, text).map_err(|e| failed(&e))?;
        let identity = authority.identity(&subject(Role::Coordinator), LIFETIME).map_err(|e| failed(&e))?;
        let coordinator = network(env, Arc::new(identity), LOCAL);
        let slots = job.manifest.spec.parallelism.div_ceil(count.max(1));
        let mut arguments = vec!["worker".to_owned(), manifest.display().to_string()];
        let mut option = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
        option("identity", folder.display().to_string());
        option("listen", LOCAL.to_owned());
        option("slots", slots.to_string());
        option("parent", std::process::id().to_string());
        if let Some(storage) = &args.storage {
            option("storage", job::absolute(storage)?);
        }
        if let Some(work_dir) = &args.work_dir {
            option("work-dir", work_dir.display().to_string());
        }
        if let Some(local_dir) = &args.local_dir {
            option("local-dir", local_dir.display().to_string());
        }
        Ok(Self { count, folder, arguments, coordinator })
    }

    /// How the coordinator listens for them.
    pub(crate) fn network(&self) -> Network {
        self.coordinator.clone()
    }

    /// Starts the workers, and another for each that ends, until `ended`. Then all are gone.
    pub(crate) async fn run(self, coordinator: Endpoint, env: &Env, ended: &mut watch::Receiver<bool>) {
        let mut children: Vec<Option<Child>> = (0..self.count).map(|_| None).collect();
        while !*ended.borrow() {
            for child in &mut children {
                if let Some(Ok(Some(status))) = child.as_mut().map(Child::try_wait) {
                    tracing::warn!("a worker process has ended ({status}); starting another");
                    *child = None;
                }
                if child.is_none() {
                    match self.start(&coordinator) {
                        Ok(started) => *child = Some(started),
                        Err(error) => tracing::warn!(%error, "could not start a worker process"),
                    }
                }
            }
            tokio::select! {
                biased;
                _ = ended.changed() => {}
                () = env.runtime.sleep(LOOK_EVERY) => {}
            }
        }
        self.end(children.into_iter().flatten().collect(), env).await;
    }

    fn start(&self, coordinator: &Endpoint) -> std::io::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(&self.arguments).arg("--coordinator").arg(&coordinator.0);
        // Ctrl-C at the terminal is for the coordinator, which decides what becomes of workers.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command.stdin(Stdio::null()).spawn()
    }

    async fn end(&self, mut children: Vec<Child>, env: &Env) {
        let pid = |child: &Child| Pid::from_raw(child.id().cast_signed());
        for child in &children {
            // One that is gone already is gone.
            let _ = kill(pid(child), Signal::SIGTERM);
        }
        let end = env.clock.monotonic() + END_PATIENCE;
        while !children.is_empty() && env.clock.monotonic() < end {
            children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
            env.runtime.sleep(LOOK_EVERY).await;
        }
        for child in &mut children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for LocalWorkers {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.folder) {
            tracing::warn!(%error, "could not remove {}", self.folder.display());
        }
    }
}

/// A new folder that nobody else can look into.
fn private_folder(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().mode(0o700).create(path)
}
