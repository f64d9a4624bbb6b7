//! Storage in this process's memory, up to a limit: for tests, and for jobs whose state may be lost with the process.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use url::Url;

use super::{ObjectInfo, PutNew, Storage};
use crate::{Error, Result};

/// Bytes that are held at most if nobody says otherwise.
const LIMIT_DEFAULT: usize = 256 << 20;
const UNITS: [(&str, usize); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("", 1)];

/// See the header of this file.
pub(super) struct LimitedMemory {
    location: String,
    limit: usize,
    objects: Mutex<Objects>,
}

#[derive(Default)]
struct Objects {
    by_path: BTreeMap<String, Bytes>,
    bytes: usize,
}

impl LimitedMemory {
    /// The storage that `memory://` or `memory://?limit=64MiB` names.
    pub(super) fn new(location: &str, url: &Url) -> Result<Self> {
        let mut limit = LIMIT_DEFAULT;
        for (option, value) in url.query_pairs() {
            let wrong = |what: &str| Error::abort(format!("storage '{location}': {what}; write memory://?limit=64MiB"));
            if option != "limit" {
                return Err(wrong(&format!("unknown option '{option}'")));
            }
            let unit = UNITS.iter().find_map(|(unit, n)| value.strip_suffix(unit).map(|v| (v, n)));
            let (count, unit) = unit.ok_or_else(|| wrong("bad limit"))?;
            let count: usize = count.trim().parse().map_err(|_| wrong(&format!("'{value}' is no number of bytes")))?;
            limit = count.checked_mul(*unit).ok_or_else(|| wrong(&format!("'{value}' is too much")))?;
        }
        Ok(Self { location: location.to_owned(), limit, objects: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, objects: &mut Objects, path: &str, bytes: Bytes) -> Result<()> {
        let replaced = objects.by_path.get(path).map_or(0, Bytes::len);
        let held = objects.bytes - replaced + bytes.len();
        if held > self.limit {
            return Err(Error::abort(format!(
                "write {}/{path}: {} bytes more than the {} that are held would exceed the limit of {}; keep checkpoints in \
                 file:// or s3://, or raise it: memory://?limit=…MiB",
                self.location,
                bytes.len(),
                objects.bytes,
                self.limit
            )));
        }
        objects.bytes = held;
        objects.by_path.insert(path.to_owned(), bytes);
        Ok(())
    }
}

#[async_trait]
impl Storage for LimitedMemory {
    async fn put_new(&self, path: &str, bytes: Bytes) -> Result<PutNew> {
        let mut objects = self.lock();
        match objects.by_path.get(path) {
            Some(found) if *found == bytes => Ok(PutNew::Created),
            Some(_) => Ok(PutNew::Exists),
            None => self.write(&mut objects, path, bytes).map(|()| PutNew::Created),
        }
    }

    async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        self.write(&mut self.lock(), path, bytes)
    }

    async fn get(&self, path: &str) -> Result<Option<Bytes>> {
        Ok(self.lock().by_path.get(path).cloned())
    }

    async fn get_range(&self, path: &str, from: u64, to: u64) -> Result<Option<Bytes>> {
        let objects = self.lock();
        let Some(bytes) = objects.by_path.get(path) else { return Ok(None) };
        let end = (to as usize).min(bytes.len());
        Ok(Some(bytes.slice((from as usize).min(end)..end)))
    }

    async fn size(&self, path: &str) -> Result<Option<u64>> {
        Ok(self.lock().by_path.get(path).map(|b| b.len() as u64))
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>> {
        let folder = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        let start = start_after.map_or(Bound::Included(folder.as_str()), Bound::Excluded);
        let objects = self.lock();
        let found = objects.by_path.range::<str, _>((start, Bound::Unbounded));
        let inside = found.skip_while(|(path, _)| path.as_str() < folder.as_str());
        let info = |(path, bytes): (&String, &Bytes)| ObjectInfo { path: path.clone(), size: bytes.len() as u64 };
        Ok(inside.take_while(|(path, _)| path.starts_with(&folder)).map(info).collect())
    }

    async fn delete(&self, path: &str) -> Result<()> {
        let mut objects = self.lock();
        if let Some(bytes) = objects.by_path.remove(path) {
            objects.bytes -= bytes.len();
        }
        Ok(())
    }

    fn describe(&self) -> String {
        self.location.clone()
    }

    fn is_local(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use crate::storage::open;

    #[tokio::test]
    async fn what_would_exceed_the_limit_is_refused_and_room_is_given_back() {
        let storage = open("memory://?limit=1KiB").unwrap();
        storage.put("a", vec![0; 1000].into()).await.unwrap();
        let error = storage.put("b", vec![0; 100].into()).await.unwrap_err().to_string();
        assert_eq!(
            error,
            "write memory://?limit=1KiB/b: 100 bytes more than the 1000 that are held would exceed the limit of 1024; keep \
             checkpoints in file:// or s3://, or raise it: memory://?limit=…MiB"
        );
        storage.put("a", vec![0; 1024].into()).await.unwrap();
        storage.delete("a").await.unwrap();
        storage.put("b", vec![0; 100].into()).await.unwrap();
    }

    #[test]
    fn limits_that_are_none_are_refused() {
        let message = |location| open(location).err().unwrap().to_string();
        assert_eq!(
            message("memory://?limit=lots"),
            "storage 'memory://?limit=lots': 'lots' is no number of bytes; write memory://?limit=64MiB"
        );
        assert!(message("memory://?size=1").contains("unknown option 'size'"));
    }
}
