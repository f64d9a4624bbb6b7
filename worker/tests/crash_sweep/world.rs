//! What outlives a process (storage and a topic), and the process's connection to it, which a test can cut at any effect.
//!
//! An effect is anything that changes the outside: an object written or deleted, a producer's take-over, a transaction.
//! Cut *before* it, it does not happen; cut *after* it, it happens and the reply is lost. From then on the process reaches
//! nothing any more: for everybody else it is dead.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use floodmark_dataflow::sink::Committer;
use floodmark_snapshot::{
    Epoch, Error, Result, Step,
    storage::{self, ObjectInfo, PutNew, Storage},
};

/// At which effect a process dies, and on which side of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Crash {
    pub(crate) effect: u64,
    pub(crate) after: bool,
}

/// What there is outside of processes.
#[derive(Clone)]
pub(crate) struct World {
    storage: Arc<dyn Storage>,
    pub(crate) topic: Topic,
}

impl World {
    pub(crate) fn new() -> Self {
        Self { storage: storage::open("memory://").unwrap(), topic: Topic::default() }
    }

    /// A new process's connection.
    pub(crate) fn connect(&self, crash: Option<Crash>) -> Arc<Connection> {
        Arc::new(Connection { world: self.clone(), crash, effects: AtomicU64::new(0), cut: AtomicBool::new(false) })
    }
}

/// A process's connection to the world.
pub(crate) struct Connection {
    world: World,
    crash: Option<Crash>,
    effects: AtomicU64,
    cut: AtomicBool,
}

impl Connection {
    /// How many effects there have been.
    pub(crate) fn effects(&self) -> u64 {
        self.effects.load(Ordering::SeqCst)
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }

    /// Returns when the connection has been cut.
    pub(crate) async fn cut(&self) {
        while !self.is_cut() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    fn alive(&self) -> Result<()> {
        if self.is_cut() { Err(Error::retry("connection cut by the test")) } else { Ok(()) }
    }

    /// Counts an effect; true if the process dies after it.
    fn begin(&self) -> Result<bool> {
        self.alive()?;
        let effect = self.effects.fetch_add(1, Ordering::SeqCst);
        match self.crash {
            Some(crash) if crash.effect == effect && !crash.after => {
                self.cut.store(true, Ordering::SeqCst);
                Err(Error::retry("connection cut by the test, before the effect"))
            }
            Some(crash) => Ok(crash.effect == effect),
            None => Ok(false),
        }
    }

    fn end<T>(&self, dies: bool, done: Result<T>) -> Result<T> {
        if dies {
            self.cut.store(true, Ordering::SeqCst);
            return Err(Error::retry("connection cut by the test, after the effect"));
        }
        done
    }
}

#[async_trait]
impl Storage for Connection {
    async fn put_new(&self, path: &str, bytes: Bytes) -> Result<PutNew> {
        let dies = self.begin()?;
        self.end(dies, self.world.storage.put_new(path, bytes).await)
    }

    async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        let dies = self.begin()?;
        self.end(dies, self.world.storage.put(path, bytes).await)
    }

    async fn get(&self, path: &str) -> Result<Option<Bytes>> {
        self.alive()?;
        self.world.storage.get(path).await
    }

    async fn get_range(&self, path: &str, from: u64, to: u64) -> Result<Option<Bytes>> {
        self.alive()?;
        self.world.storage.get_range(path, from, to).await
    }

    async fn size(&self, path: &str) -> Result<Option<u64>> {
        self.alive()?;
        self.world.storage.size(path).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>> {
        self.alive()?;
        self.world.storage.list(prefix, start_after).await
    }

    async fn delete(&self, path: &str) -> Result<()> {
        let dies = self.begin()?;
        self.end(dies, self.world.storage.delete(path).await)
    }

    fn describe(&self) -> String {
        "the test's world".to_owned()
    }
}

/// A log with transactions: what a committed reader sees, and for each producer its present holder and its marker.
#[derive(Clone, Default)]
pub(crate) struct Topic(Arc<Mutex<Partition>>);

#[derive(Default)]
struct Partition {
    records: Vec<String>,
    producers: BTreeMap<u32, Producer>,
}

#[derive(Default)]
struct Producer {
    holder: u64,
    marker: Option<Epoch>,
}

impl Topic {
    fn lock(&self) -> MutexGuard<'_, Partition> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All committed records, in order.
    pub(crate) fn records(&self) -> Vec<String> {
        self.lock().records.clone()
    }
}

/// Writes to the topic under the identity of one subtask.
pub(crate) struct TopicCommitter {
    pub(crate) connection: Arc<Connection>,
    pub(crate) index: u32,
    holder: u64,
}

impl TopicCommitter {
    pub(crate) fn new(connection: Arc<Connection>, index: u32) -> Self {
        Self { connection, index, holder: 0 }
    }
}

impl Committer for TopicCommitter {
    fn open(&mut self) -> Result<Option<Epoch>> {
        let dies = self.connection.begin()?;
        let opened = {
            let mut partition = self.connection.world.topic.lock();
            let producer = partition.producers.entry(self.index).or_default();
            producer.holder += 1;
            self.holder = producer.holder;
            producer.marker
        };
        self.connection.end(dies, Ok(opened))
    }

    fn commit(&mut self, epoch: Epoch, staged: &[Bytes], step: &dyn Fn(Step)) -> Result<()> {
        step(Step::BeforeTransaction);
        let dies = self.connection.begin()?;
        let committed = {
            let mut partition = self.connection.world.topic.lock();
            let producer = partition.producers.entry(self.index).or_default();
            if producer.holder == self.holder {
                producer.marker = Some(epoch);
                let records = staged.iter().flat_map(records_of);
                partition.records.extend(records);
                Ok(())
            } else {
                Err(Error::fenced("another producer has this identity"))
            }
        };
        step(Step::AfterTransaction);
        self.connection.end(dies, committed)
    }
}

fn records_of(bytes: &Bytes) -> Vec<String> {
    String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect()
}
