//! What there is outside of processes: a storage whose every byte a test can change, and a topic with transactions.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use floodmark_dataflow::sink::Committer;
use floodmark_snapshot::{
    Epoch, Error, Result, Step,
    block::read_blocks,
    storage::{ObjectInfo, PutNew, Storage},
};

/// The kind of a file of staged lines.
pub const STAGED: &str = "staged-lines";

/// The files of a storage by their paths.
pub type Objects = BTreeMap<String, Bytes>;

/// A storage in memory.
#[derive(Debug, Default)]
pub struct MapStorage {
    objects: Mutex<Objects>,
    late: Mutex<Objects>,
}

impl MapStorage {
    /// A storage with these files.
    #[must_use]
    pub fn of(objects: Objects) -> Arc<Self> {
        Self::with_late(objects, Objects::new())
    }

    /// A storage in which somebody else writes the `late` files at the last moment: just before the first create.
    #[must_use]
    pub fn with_late(objects: Objects, late: Objects) -> Arc<Self> {
        Arc::new(Self { objects: Mutex::new(objects), late: Mutex::new(late) })
    }

    /// All files as they are now.
    #[must_use]
    pub fn objects(&self) -> Objects {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Storage for MapStorage {
    async fn put_new(&self, path: &str, bytes: Bytes) -> Result<PutNew> {
        let mut objects = self.lock();
        objects.append(&mut self.late.lock().unwrap_or_else(PoisonError::into_inner));
        match objects.get(path) {
            Some(found) if *found == bytes => Ok(PutNew::Created),
            Some(_) => Ok(PutNew::Exists),
            None => {
                objects.insert(path.to_owned(), bytes);
                Ok(PutNew::Created)
            }
        }
    }

    async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        self.lock().insert(path.to_owned(), bytes);
        Ok(())
    }

    async fn get(&self, path: &str) -> Result<Option<Bytes>> {
        Ok(self.lock().get(path).cloned())
    }

    async fn get_range(&self, path: &str, from: u64, to: u64) -> Result<Option<Bytes>> {
        let part = |bytes: &Bytes| {
            let to = (to as usize).min(bytes.len());
            bytes.slice((from as usize).min(to)..to)
        };
        Ok(self.lock().get(path).map(part))
    }

    async fn size(&self, path: &str) -> Result<Option<u64>> {
        Ok(self.lock().get(path).map(|b| b.len() as u64))
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>> {
        let folder = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        let wanted = |path: &str| path.starts_with(&folder) && start_after.is_none_or(|after| path > after);
        let objects = self.lock();
        let found = objects.iter().filter(|(path, _)| wanted(path));
        Ok(found.map(|(path, bytes)| ObjectInfo { path: path.clone(), size: bytes.len() as u64 }).collect())
    }

    async fn delete(&self, path: &str) -> Result<()> {
        self.lock().remove(path);
        Ok(())
    }

    fn describe(&self) -> String {
        "map://test".to_owned()
    }
}

/// What a committed reader of the topic sees, and what its writers have left there.
#[derive(Clone, Debug, Default)]
pub struct Topic {
    /// The records, each with the epoch of its commit, in order.
    pub records: Vec<(Epoch, String)>,
    /// The newest epoch committed, by log and writer.
    pub markers: BTreeMap<(String, u32), Epoch>,
    /// Whether writes fail, as if it could not be reached.
    pub out_of_reach: bool,
}

impl Topic {
    /// As JSON: records and markers.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let markers: Vec<_> = self.markers.iter().map(|((history, index), epoch)| (history, index, epoch)).collect();
        serde_json::json!({ "records": self.records, "markers": markers })
    }

    /// What [`Topic::to_json`] wrote.
    ///
    /// # Errors
    /// When it did not.
    pub fn from_json(json: &serde_json::Value) -> serde_json::Result<Self> {
        let records = serde_json::from_value(json["records"].clone())?;
        let markers: Vec<(String, u32, Epoch)> = serde_json::from_value(json["markers"].clone())?;
        let markers = markers.into_iter().map(|(history, index, epoch)| ((history, index), epoch)).collect();
        Ok(Self { records, markers, out_of_reach: false })
    }
}

/// A topic that several hold on to.
#[derive(Clone, Debug, Default)]
pub struct SharedTopic(Arc<Mutex<Topic>>);

impl SharedTopic {
    /// A topic with what this one holds.
    #[must_use]
    pub fn of(topic: Topic) -> Self {
        Self(Arc::new(Mutex::new(topic)))
    }

    /// Whoever holds it has it alone.
    pub fn lock(&self) -> MutexGuard<'_, Topic> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes under the identity of one subtask.
pub struct Writer {
    /// Where to.
    pub topic: SharedTopic,
    /// The subtask.
    pub index: u32,
    /// The log whose markers count.
    pub history: String,
}

impl Committer for Writer {
    fn open(&mut self) -> Result<Option<Epoch>> {
        Ok(self.topic.lock().markers.get(&(self.history.clone(), self.index)).copied())
    }

    fn commit(&mut self, epoch: Epoch, staged: &[Bytes], _: &dyn Fn(Step)) -> Result<()> {
        let mut topic = self.topic.lock();
        if topic.out_of_reach {
            return Err(Error::retry("the topic is out of reach"));
        }
        let mut records = Vec::new();
        for shard in staged {
            for block in read_blocks(STAGED, shard)? {
                let lines = std::str::from_utf8(&block).map_err(|e| Error::corrupt(format!("staged lines: {e}")))?;
                records.extend(lines.lines().map(|line| (epoch, line.to_owned())));
            }
        }
        topic.records.extend(records);
        topic.markers.insert((self.history.clone(), self.index), epoch);
        Ok(())
    }
}
