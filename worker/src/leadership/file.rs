//! Leadership by a lock on a file, for coordinators of one machine.
//!
//! The system gives the lock back however its holder dies, so that another takes over at once. A holder that only stands
//! still keeps it: so it also writes a beat into the file, and if none has come for [`LAPSE`], whoever waits puts a file of
//! its own, already locked, in the place of that one. A holder whose file is not the one at the path any more has lost the
//! lease.
//!
//! The file says where the leader listens: a line with the endpoint, then a line with the beat.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use floodmark_link::transport::Endpoint;
use floodmark_snapshot::{Env, Error, Result};

use super::{Leadership, Lease};

/// From one look at the lock to the next.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// From one beat of a holder to the next.
const BEAT_EVERY: Duration = Duration::from_millis(500);
/// A holder without a beat for so long has lost the lease, if anybody wants it.
const LAPSE: Duration = Duration::from_secs(3);
/// Whoever has not looked for so long stood still itself, and knows nothing of the holder's beats.
const LOOKS_MISSED: Duration = Duration::from_secs(1);
/// Bytes of the file that are read.
const CONTENT_MAX: usize = 4096;

/// See the header of this file.
#[derive(Clone)]
pub struct FileLock {
    path: PathBuf,
    env: Env,
}

impl FileLock {
    /// Candidates are those with the same path.
    #[must_use]
    pub fn new(path: PathBuf, env: Env) -> Self {
        Self { path, env }
    }

    /// Tries once. `lapsed`: the holder has lost the lease.
    fn try_acquire(&self, lapsed: bool) -> io::Result<Option<File>> {
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&self.path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if lapsed => return self.replace(),
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        if !is_at(&file, &self.path) {
            return Ok(None);
        }
        // What the last holder said is true no more.
        file.set_len(0)?;
        Ok(Some(file))
    }

    /// Puts a locked file in the place of the one that is there.
    fn replace(&self) -> io::Result<Option<File>> {
        let mut name = self.path.as_os_str().to_owned();
        name.push(format!(".{}", self.env.ids.ulid()));
        let mine = PathBuf::from(name);
        let file = OpenOptions::new().create_new(true).read(true).write(true).open(&mine)?;
        let replaced = file.lock().and_then(|()| fs::rename(&mine, &self.path));
        if let Err(error) = replaced {
            let _ = fs::remove_file(&mine);
            return Err(error);
        }
        // Another may have done the same a moment later.
        Ok(is_at(&file, &self.path).then_some(file))
    }
}

/// Whether the file is the one at this path.
fn is_at(file: &File, path: &Path) -> bool {
    let of = |m: &fs::Metadata| (m.dev(), m.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(file), Ok(there)) if of(&file) == of(&there))
}

fn read(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    let mut bytes = vec![0; CONTENT_MAX];
    let length = file.read_at(&mut bytes, 0)?;
    bytes.truncate(length);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Where the holder of the lock says that it listens.
pub(super) fn leader(path: &Path) -> Result<Endpoint> {
    let text = read(path).map_err(|e| Error::retry(format!("look into {}: {e}", path.display())))?;
    // Without the end of its line it is not all there yet.
    match text.split_once('\n') {
        Some((endpoint, _)) if !endpoint.is_empty() => Ok(Endpoint::from(endpoint)),
        Some(_) | None => Err(Error::retry(format!("nobody leads yet, by {}", path.display()))),
    }
}

#[async_trait]
impl Leadership for FileLock {
    async fn acquire(&self) -> Result<Box<dyn Lease>> {
        let now = || self.env.clock.monotonic();
        let (mut seen, mut since, mut looked, mut waited) = (None, now(), now(), false);
        loop {
            if now().saturating_sub(looked) >= LOOKS_MISSED {
                since = now();
            }
            looked = now();
            let (this, lapsed) = (self.clone(), now().saturating_sub(since) >= LAPSE);
            let look = move || {
                let said = read(&this.path).ok();
                this.try_acquire(lapsed).map(|acquired| (acquired, said))
            };
            let looked_at = self.env.blocking("a lock file", look).await?;
            match looked_at {
                Ok((Some(file), _)) => {
                    let (path, env) = (self.path.clone(), self.env.clone());
                    return Ok(Box::new(Held { file: Arc::new(file), path, env, endpoint: None, beat: 0, waited }));
                }
                Ok((None, said)) => {
                    if !waited {
                        tracing::info!("standing by: another process holds {}", self.path.display());
                        waited = true;
                    }
                    if said != seen {
                        (seen, since) = (said, now());
                    }
                }
                Err(error) => return Err(Error::abort(format!("lock {}: {error}", self.path.display()))),
            }
            self.env.runtime.sleep(LOOK_EVERY).await;
        }
    }
}

struct Held {
    file: Arc<File>,
    path: PathBuf,
    env: Env,
    endpoint: Option<Endpoint>,
    beat: u64,
    waited: bool,
}

impl Held {
    /// Writes the next beat. False if the lease is lost.
    async fn beat(&mut self) -> Result<bool> {
        self.beat += 1;
        let endpoint = self.endpoint.as_ref().map_or("", |e| e.0.as_str());
        let content = format!("{endpoint}\n{}\n", self.beat);
        let (file, path) = (self.file.clone(), self.path.clone());
        let write = move || {
            if !is_at(&file, &path) {
                return Ok(false);
            }
            file.write_all_at(content.as_bytes(), 0)?;
            (&*file).flush().map(|()| true)
        };
        let written = self.env.blocking("a lock file", write).await?;
        written.map_err(|e| Error::retry(format!("write into {}: {e}", self.path.display())))
    }
}

#[async_trait]
impl Lease for Held {
    fn waited(&self) -> bool {
        self.waited
    }

    async fn announce(&mut self, endpoint: &Endpoint) -> Result<()> {
        self.endpoint = Some(endpoint.clone());
        // Whoever has taken the file over says so by itself.
        self.beat().await.map(|_| ())
    }

    async fn lost(&mut self) -> String {
        loop {
            match self.beat().await {
                Ok(true) => {}
                Ok(false) => return format!("{} is not this process's any more", self.path.display()),
                // As long as nobody takes the file over, no harm is done.
                Err(error) => tracing::warn!(%error, "could not renew the lease; trying again"),
            }
            self.env.runtime.sleep(BEAT_EVERY).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_holds_the_lock_and_stands_still_loses_the_lease_and_learns_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let candidate = FileLock::new(path.clone(), Env::system());
        let mut still = candidate.acquire().await.unwrap();
        still.announce(&Endpoint::from("a:1")).await.unwrap();
        // It beats no more, and is not dropped either.
        let begun = candidate.env.clock.monotonic();
        let mut next = candidate.acquire().await.unwrap();
        let took = candidate.env.clock.monotonic() - begun;
        assert!(took >= LAPSE && took < LAPSE * 4, "{took:?}");
        next.announce(&Endpoint::from("b:2")).await.unwrap();
        let reason = still.lost().await;
        assert!(reason.contains("is not this process's any more"), "{reason}");
        drop(still);
        assert_eq!(leader(&path).unwrap(), Endpoint::from("b:2"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "it leaves files behind");
    }

    #[test]
    fn what_is_not_all_there_names_no_leader() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        leader(&path).unwrap_err();
        for (content, expected) in
            [("", None), ("\n1\n", None), ("127.0", None), ("127.0.0.1:7\n", Some("127.0.0.1:7"))]
        {
            fs::write(&path, content).unwrap();
            assert_eq!(leader(&path).ok(), expected.map(Endpoint::from), "{content:?}");
        }
    }
}
