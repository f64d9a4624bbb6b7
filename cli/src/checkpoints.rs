//! `floodmark checkpoints`: what the log of a job holds. Reads only: a job that runs meanwhile does not notice.

use std::sync::Arc;

use floodmark_snapshot::{
    Env, Error,
    log::{self, JobFolder, LogState, Retained},
    restore::Snapshot,
    storage::{self, Storage},
};

use crate::{
    args::{CheckpointArgs, CheckpointsArgs, CheckpointsCommand},
    display::{bytes, duration},
    exit::{Exit, Failure},
    job,
    screen::print,
};

/// Carries the command out.
pub(crate) fn checkpoints(command: &CheckpointsCommand) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Exit::JobFailed, format!("start the runtime: {e}")))?;
    runtime.block_on(async {
        match command {
            CheckpointsCommand::List(args) => {
                let log = Log::read(args).await?;
                print(&list(&log.state, Env::system().clock.wall_ms()));
                Ok(Exit::Done)
            }
            CheckpointsCommand::Show(args) => show(args).await,
            CheckpointsCommand::Verify(args) => verify(args).await,
        }
    })
}

/// A job's log, read.
struct Log {
    storage: Arc<dyn Storage>,
    folder: JobFolder,
    state: LogState,
}

impl Log {
    async fn read(args: &CheckpointsArgs) -> Result<Self, Failure> {
        let failed = |e: Error| Failure::new(Exit::Storage, e);
        let (job, manifest) = job::identify(&args.job)?;
        let storage = storage::open_existing(job::storage(args.storage.as_deref(), &manifest)).map_err(failed)?;
        let folder = JobFolder::of(&job);
        let state = log::read(&*storage, &folder).await.map_err(failed)?;
        if state.next_seq == 0 {
            let message = format!("job {job} has no checkpoints in {}", storage.describe());
            return Err(Failure::new(Exit::Storage, message));
        }
        Ok(Self { storage, folder, state })
    }

    fn snapshot(&self, retained: &Retained) -> Result<Snapshot, Error> {
        let manifest = Arc::new(retained.manifest.clone());
        Ok(match &retained.from {
            Some(from) => Snapshot::new(manifest, storage::open_existing(from)?, ""),
            None => Snapshot::new(manifest, self.storage.clone(), self.folder.root()),
        })
    }

    /// The checkpoints asked for: one, or `otherwise` if none is named.
    fn chosen(
        &self,
        epoch: Option<u64>,
        otherwise: impl Fn(&[Retained]) -> &[Retained],
    ) -> Result<Vec<&Retained>, Failure> {
        let Some(epoch) = epoch else {
            let chosen = otherwise(&self.state.retained);
            if chosen.is_empty() {
                return Err(Failure::new(Exit::Storage, "the log holds no checkpoint that a job could start from"));
            }
            return Ok(chosen.iter().collect());
        };
        let all = self.state.retained.iter().chain(&self.state.abandoned);
        match all.clone().find(|r| r.manifest.epoch.0 == epoch) {
            Some(found) => Ok(vec![found]),
            None => {
                let known: Vec<String> = all.map(|r| r.manifest.epoch.to_string()).collect();
                let message = format!("there is no checkpoint {epoch}; there is: {}", known.join(", "));
                Err(Failure::new(Exit::BadInput, message))
            }
        }
    }
}

/// A line per checkpoint, oldest first.
fn list(state: &LogState, now_ms: i64) -> String {
    let mut text = format!("{:>8}  {:>10}  {:>10}  {:>9}  {:>10}  \n", "epoch", "age", "took", "shards", "size");
    let mut all: Vec<(&Retained, bool)> =
        state.retained.iter().map(|r| (r, true)).chain(state.abandoned.iter().map(|r| (r, false))).collect();
    all.sort_by_key(|(r, _)| r.seq);
    for (retained, candidate) in all {
        let manifest = &retained.manifest;
        let mut notes = Vec::new();
        if manifest.epoch <= state.committed {
            notes.push("output committed");
        }
        if manifest.end_of_input {
            notes.push("end of input");
        }
        if !candidate {
            notes.push("given up");
        }
        text += &format!(
            "{:>8}  {:>10}  {:>10}  {:>9}  {:>10}  {}\n",
            manifest.epoch,
            duration(now_ms - manifest.triggered_at_ms),
            duration(manifest.duration_ms as i64),
            manifest.shards().count(),
            bytes(manifest.size()),
            notes.join(", ")
        );
    }
    for damaged in &state.damaged {
        text += &format!("log entry {} is damaged: {}\n", damaged.seq, damaged.reason);
    }
    text
}

async fn show(args: &CheckpointArgs) -> Result<Exit, Failure> {
    let log = Log::read(&args.of).await?;
    let newest = |all: &[Retained]| -> usize { all.len().saturating_sub(1) };
    for retained in log.chosen(args.epoch, |all| &all[newest(all)..])? {
        let json = serde_json::to_string_pretty(&retained.manifest)
            .map_err(|e| Failure::new(Exit::Storage, format!("print the manifest: {e}")))?;
        print(&format!("{json}\n"));
    }
    Ok(Exit::Done)
}

async fn verify(args: &CheckpointArgs) -> Result<Exit, Failure> {
    let log = Log::read(&args.of).await?;
    let mut damaged = log.state.damaged.len();
    for entry in &log.state.damaged {
        print(&format!("log entry {} is damaged: {}\n", entry.seq, entry.reason));
    }
    for retained in log.chosen(args.epoch, |all| all)? {
        let manifest = &retained.manifest;
        let damage = log
            .snapshot(retained)
            .map_err(|e| Failure::new(Exit::Storage, e))?
            .verify()
            .await
            .map_err(|e| Failure::new(Exit::Storage, e.context(format!("verify checkpoint {}", manifest.epoch))))?;
        let size = bytes(manifest.size());
        if damage.is_empty() {
            print(&format!("checkpoint {}: {} shards, {size}: intact\n", manifest.epoch, manifest.shards().count()));
        } else {
            print(&format!("checkpoint {}: damaged\n", manifest.epoch));
        }
        for error in &damage {
            print(&format!("  {error}\n"));
        }
        damaged += damage.len();
    }
    if damaged > 0 {
        let files = if damaged == 1 { "1 file is".to_owned() } else { format!("{damaged} files are") };
        return Err(Failure::new(Exit::Storage, format!("{files} damaged")));
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use floodmark_snapshot::{Epoch, JobId, Manifest, log::Damaged};

    use super::*;

    fn retained(seq: u64, epoch: u64) -> Retained {
        let job = JobId { namespace: "n".into(), name: "j".into(), uid: "u".into() };
        let manifest = Manifest {
            format: 1,
            job,
            epoch: Epoch(epoch),
            generation: Default::default(),
            attempt: Default::default(),
            triggered_at_ms: 1_000 * epoch as i64,
            duration_ms: 25,
            max_parallelism: 128,
            plan: String::new(),
            origin: None,
            end_of_input: epoch == 3,
            operators: Default::default(),
        };
        Retained { seq, manifest, from: None }
    }

    #[test]
    fn checkpoints_are_listed_with_what_became_of_them() {
        let state = LogState {
            retained: vec![retained(1, 1), retained(5, 3)],
            abandoned: vec![retained(3, 2)],
            committed: Epoch(2),
            damaged: vec![Damaged { seq: 4, reason: "checksum mismatch".into() }],
            ..LogState::default()
        };
        let text: String = list(&state, 5_000).lines().map(|l| format!("{}\n", l.trim_end())).collect();
        expect![[r#"
               epoch         age        took     shards        size
                   1       4.0 s       25 ms          0         0 B  output committed
                   2       3.0 s       25 ms          0         0 B  output committed, given up
                   3       2.0 s       25 ms          0         0 B  end of input
            log entry 4 is damaged: checksum mismatch
        "#]]
        .assert_eq(&text);
    }
}
