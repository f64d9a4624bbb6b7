//! What workers read of their state from the storage after another has died: nothing of what they have copies of; all of it if the
//! copies are damaged. Each worker reaches a real S3 server through a proxy that counts.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use floodmark_testkit::{S3, scratch};
use floodmark_tests::{
    cluster::{Identities, Site},
    job::{CheckpointLog, Job, PATIENCE, Run},
};
use nix::sys::signal::Signal;

const WORKERS: u32 = 3;
const KEYS: u64 = 200_000;
/// The end of a read that is looked at again with the next: a request line may be cut.
const LINE_MAX: usize = 2_048;

/// Passes on what comes, and counts the requests that read a checkpoint's files.
struct Proxy {
    endpoint: String,
    reads: Arc<AtomicU64>,
}

impl Proxy {
    fn start(server: &str) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let server = server.strip_prefix("http://").context("the server's address")?.to_owned();
        let reads = Arc::new(AtomicU64::new(0));
        let counter = reads.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(&server) else { continue };
                let (Ok(from_server), Ok(to_client)) = (server.try_clone(), client.try_clone()) else { continue };
                let counter = counter.clone();
                thread::spawn(move || {
                    pass(client, server, |request| {
                        counter.fetch_add(reads_of_files(request), Ordering::Relaxed);
                    })
                });
                thread::spawn(move || pass(from_server, to_client, |_| {}));
            }
        });
        Ok(Self { endpoint, reads })
    }

    /// Requests so far that read a checkpoint's files.
    fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }
}

/// Passes bytes on until one side has ended. `look` sees them, each request line once as a whole.
fn pass(mut from: TcpStream, mut to: TcpStream, mut look: impl FnMut(&[u8])) {
    let (mut bytes, mut held) = (vec![0; 64 << 10], Vec::new());
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        held.extend_from_slice(&bytes[..n]);
        let whole = held.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        look(&held[..whole]);
        held.drain(..whole);
        let excess = held.len().saturating_sub(LINE_MAX);
        held.drain(..excess);
        if to.write_all(&bytes[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

fn reads_of_files(bytes: &[u8]) -> u64 {
    let is_read = |line: &&[u8]| line.starts_with(b"GET /") && line.windows(7).any(|w| w == b"/blobs/");
    bytes.split(|b| *b == b'\n').filter(is_read).count() as u64
}

/// A job on S3 whose workers are counted.
struct World {
    workers: Vec<(Run, Proxy)>,
    coordinator: Run,
    identities: Identities,
    listen: Site,
    job: Job,
    store: S3,
    folder: tempfile::TempDir,
}

impl World {
    fn start(backend: &str) -> Result<Self> {
        let (store, folder) = (S3::start()?, scratch::folder("job-")?);
        let sql = format!(
            "CREATE TABLE numbers (n BIGINT, price BIGINT)
  WITH ('connector' = 'datagen', 'fields.n.kind' = 'sequence', 'rate' = '50000');
CREATE TABLE totals (item BIGINT, rows_so_far BIGINT, total BIGINT, PRIMARY KEY (item) NOT ENFORCED)
  WITH ('connector' = 'blackhole');
INSERT INTO totals SELECT MOD(n, {KEYS}), count(*), sum(price) FROM numbers GROUP BY MOD(n, {KEYS});"
        );
        let mut job = Job::new(folder.path(), "copied", sql);
        (job.parallelism, job.interval) = (WORKERS, "300ms".to_owned());
        job.spec = format!("  state:\n    backend: {backend}\n");
        job.storage = format!("s3://{}/jobs", store.bucket());
        job.env.extend(store.env().into_iter().map(|(name, value)| (name.to_owned(), value)));
        for variable in ["TMPDIR", "XDG_RUNTIME_DIR"] {
            job.env.insert(variable.to_owned(), folder.path().display().to_string());
        }
        let identities = Identities::issue(&job, folder.path().join("identities"))?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let listen = Site { prefix: Vec::new(), host: Ipv4Addr::LOCALHOST, port };
        let coordinator = identities.start_coordinator(&job, "coordinator", &listen)?;
        let mut world = Self { workers: Vec::new(), coordinator, identities, listen, job, store, folder };
        for _ in 0..WORKERS {
            world.another()?;
        }
        world.until("it has every key", |log| positions(log).is_some_and(|n| n > KEYS))?;
        world.spare()?;
        Ok(world)
    }

    /// Starts a worker.
    fn another(&mut self) -> Result<()> {
        let proxy = Proxy::start(&self.store.endpoint())?;
        self.job.env.insert("AWS_ENDPOINT_URL".to_owned(), proxy.endpoint.clone());
        let at = Site { prefix: Vec::new(), host: Ipv4Addr::LOCALHOST, port: 0 };
        let name = format!("worker-{}", self.workers.len());
        let run = self.identities.start_worker(&self.job, &name, &at, &self.listen, 1)?;
        self.workers.push((run, proxy));
        Ok(())
    }

    /// Starts a worker that takes over from the next that dies, and waits until it is there.
    fn spare(&mut self) -> Result<()> {
        let come = |run: &Run| run.log().matches(" has come: ").count();
        let before = come(&self.coordinator);
        self.another()?;
        let start = Instant::now();
        while come(&self.coordinator) == before {
            ensure!(self.coordinator.is_running()? && start.elapsed() < PATIENCE, "the spare worker has not come");
            thread::sleep(Duration::from_millis(20));
        }
        self.calm()
    }

    /// Waits for a few checkpoints more.
    fn calm(&mut self) -> Result<()> {
        let epoch = self.log()?.last_epoch();
        self.until("further checkpoints are complete", |log| log.last_epoch() >= epoch + 3)
    }

    fn log(&self) -> Result<CheckpointLog> {
        CheckpointLog::read(&log_folder(&self.store))
    }

    fn until(&mut self, what: &str, holds: impl Fn(&CheckpointLog) -> bool) -> Result<()> {
        let folder = log_folder(&self.store);
        // It may be read in the middle of a change.
        self.coordinator.until(what, PATIENCE, || Ok(CheckpointLog::read(&folder).is_ok_and(|log| holds(&log))))
    }

    /// Kills a worker, and waits until the job has gone on for a while. Answers how often each worker has read files meanwhile.
    fn kill(&mut self, victim: usize) -> Result<Vec<u64>> {
        let before: Vec<u64> = self.workers.iter().map(|(_, proxy)| proxy.reads()).collect();
        let attempt = attempt(&self.log()?);
        self.workers[victim].0.signal(Signal::SIGKILL)?;
        self.until("the next attempt has a checkpoint", |log| self::attempt(log) > attempt)?;
        self.calm()?;
        Ok(self.workers.iter().zip(before).map(|((_, proxy), before)| proxy.reads() - before).collect())
    }

    /// Cuts all copies of all workers to nothing, but for RocksDB's own files.
    fn damage_copies(&self) -> Result<usize> {
        let mut damaged = 0;
        for folder in files_in(&self.folder.path().join("floodmark-work"))? {
            let copies = files_in(&folder)?;
            for copy in copies.iter().filter(|c| c.is_file() && c.file_name().is_some_and(|n| n != "lock")) {
                // By another name it may be the file of a database, which is to stay.
                if fs::remove_file(copy).is_ok() {
                    fs::write(copy, "nothing")?;
                    damaged += 1;
                }
            }
        }
        Ok(damaged)
    }
}

fn log_folder(store: &S3) -> PathBuf {
    store.objects().join("jobs/default/copied/local/log")
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    entries.map(|e| Ok(e?.path())).filter(|p| !p.as_ref().is_ok_and(|p| p.ends_with(".gate"))).collect()
}

fn attempt(log: &CheckpointLog) -> u64 {
    log.completed().next_back().and_then(|(_, manifest)| manifest["attempt"].as_u64()).unwrap_or(0)
}

/// The next number of the sequence that the newest checkpoint holds, of the split that is furthest behind.
fn positions(log: &CheckpointLog) -> Option<u64> {
    log.positions("numbers").values().filter_map(|p| p["next"].as_u64()).min()
}

fn survivors_read_their_copies(backend: &str) -> Result<()> {
    let mut world = World::start(backend)?;
    let reads = world.kill(0)?;
    assert_eq!(reads[1..3], [0, 0], "{backend}: survivors read files from the storage");
    assert!(reads[3] > 0, "{backend}: the worker that took over has read none");
    world.spare()?;
    let damaged = world.damage_copies()?;
    ensure!(damaged > 2, "only {damaged} copies");
    let reads = world.kill(1)?;
    assert!(reads[2] > 0 && reads[4] > 0, "{backend}: damaged copies are passed over: {reads:?}");
    let ended = world.coordinator.kill()?;
    ensure!(!ended.log.contains("damaged"), "a copy's damage was taken for the checkpoint's: {ended}");
    Ok(())
}

#[test]
fn survivors_read_their_copies_of_the_heap_and_the_storage_if_those_are_damaged() -> Result<()> {
    survivors_read_their_copies("Heap")
}

#[test]
fn survivors_read_their_copies_of_rocksdb_and_the_storage_if_those_are_damaged() -> Result<()> {
    survivors_read_their_copies("RocksDB")
}

#[test]
fn a_proxy_counts_the_requests_that_read_files() {
    let requests = b"GET /b/jobs/x/blobs/1/1-a.state HTTP/1.1\r\nHost: x\r\n\r\nPUT /b/jobs/x/blobs/1/2-a.state HTTP/1.1\r\n\r\nGET /b/log/1.json HTTP/1.1\r\n";
    assert_eq!(reads_of_files(requests), 1);
}
