//! `floodmark checkpoints`: what a job can be started from. `list`, `show` and `verify` only read: a job that runs meanwhile
//! does not notice. [`delete`] is the one command that takes a reign.

mod delete;

use floodmark_snapshot::{
    Env, Epoch,
    log::{LogState, Retained},
    restore::{Reference, Snapshot, candidates},
    savepoint,
};

use crate::{
    args::{CheckpointArgs, CheckpointsArgs, CheckpointsCommand},
    display::{bytes, duration},
    exit::{Exit, Failure},
    history::{History, find_at, is_location, unusable},
    job,
    screen::print,
};

/// Carries the command out.
pub(crate) fn checkpoints(command: &CheckpointsCommand) -> Result<Exit, Failure> {
    job::runtime()?.block_on(async {
        match command {
            CheckpointsCommand::List(args) => list(args).await,
            CheckpointsCommand::Show(args) => show(args).await,
            CheckpointsCommand::Verify(args) => verify(args).await,
            CheckpointsCommand::Delete(args) => delete::delete(args).await,
        }
    })
}

async fn list(args: &CheckpointsArgs) -> Result<Exit, Failure> {
    let history = History::read(&args.job, args.storage.as_deref()).await?;
    let savepoints = savepoints(&history).await?;
    if history.state.next_seq == 0 && savepoints.is_empty() {
        return Err(history.nothing());
    }
    let now_ms = Env::system().clock.wall_ms();
    print(&table(&history.state, |seq| history.locate_entry(seq), now_ms));
    print(&savepoint_table(&savepoints, now_ms));
    Ok(Exit::Done)
}

/// A line per checkpoint, oldest first. `locate` tells where the checkpoint of a log entry is.
fn table(state: &LogState, locate: impl Fn(u64) -> String, now_ms: i64) -> String {
    let mut text = format!(
        "{:>8}  {:>10}  {:>10}  {:>7}  {:>10}  {:<18}  {}\n",
        "epoch", "age", "took", "shards", "size", "", "location"
    );
    let mut all: Vec<(&Retained, bool)> =
        state.retained.iter().map(|r| (r, true)).chain(state.abandoned.iter().map(|r| (r, false))).collect();
    all.sort_by_key(|(r, _)| r.seq);
    for (retained, candidate) in all {
        let manifest = &retained.manifest;
        let mut notes = Vec::new();
        match &retained.from {
            Some(_) => notes.push("adopted"),
            None if manifest.epoch <= state.committed => notes.push("output committed"),
            None => {}
        }
        if manifest.end_of_input {
            notes.push("end of input");
        }
        if !candidate {
            notes.push("given up");
        }
        text += &format!(
            "{:>8}  {:>10}  {:>10}  {:>7}  {:>10}  {:<18}  {}\n",
            manifest.epoch,
            duration(now_ms - manifest.triggered_at_ms),
            duration(manifest.duration_ms as i64),
            manifest.shards().count(),
            bytes(manifest.size()),
            notes.join(", "),
            retained.from.clone().unwrap_or_else(|| locate(retained.seq)),
        );
    }
    for damaged in &state.damaged {
        text += &format!("log entry {} is damaged: {}\n", damaged.seq, damaged.reason);
    }
    text
}

/// A savepoint of a job.
struct Listed {
    name: String,
    location: String,
    /// When it was made, its size in bytes and the epoch it is a copy of; or what is wrong with it.
    made: Result<(i64, u64, Epoch), String>,
}

async fn savepoints(history: &History) -> Result<Vec<Listed>, Failure> {
    let mut listed = Vec::new();
    for name in savepoint::list(&*history.storage, &history.folder).await.map_err(unusable)? {
        let folder = savepoint::folder(&history.folder, &name);
        let made = match savepoint::read(&*history.storage, &folder).await {
            Ok(Some(s)) => Ok((s.created_at_ms, s.manifest.size(), s.manifest.epoch)),
            // It was deleted meanwhile.
            Ok(None) => continue,
            Err(error) => Err(error.to_string()),
        };
        listed.push(Listed { location: history.locate(&format!("savepoints/{name}")), name, made });
    }
    Ok(listed)
}

/// A line per savepoint; nothing if there is none.
fn savepoint_table(savepoints: &[Listed], now_ms: i64) -> String {
    if savepoints.is_empty() {
        return String::new();
    }
    let width = savepoints.iter().map(|s| s.name.len()).max().unwrap_or(0).max("savepoint".len());
    let mut text =
        format!("\n{:<width$}  {:>10}  {:>8}  {:>10}  {}\n", "savepoint", "age", "of epoch", "size", "location");
    for Listed { name, location, made } in savepoints {
        text += &match made {
            Ok((at, size, epoch)) => {
                let (age, size) = (duration(now_ms - at), bytes(*size));
                format!("{name:<width$}  {age:>10}  {epoch:>8}  {size:>10}  {location}\n")
            }
            Err(reason) => format!("{name:<width$}  {reason}\n"),
        };
    }
    text
}

/// What a command is about, and how to call it.
type Named = (String, Snapshot);

/// The snapshot that the arguments name; `None` if they name a job and leave the choice open.
async fn chosen(args: &CheckpointArgs) -> Result<(Option<History>, Option<Named>), Failure> {
    let of = &args.of;
    if is_location(&of.job) {
        if args.epoch.is_some() || args.savepoint.is_some() || of.storage.is_some() {
            let message = format!(
                "{} is a snapshot already: --epoch, --savepoint and --storage go with a manifest",
                of.job.display()
            );
            return Err(Failure::input(message));
        }
        let found = find_at(&of.job.to_string_lossy()).await?;
        return Ok((None, Some((format!("snapshot {}", of.job.display()), found.snapshot))));
    }
    let history = History::read(&of.job, of.storage.as_deref()).await?;
    let reference = match (args.epoch, &args.savepoint) {
        (Some(epoch), _) => Some((format!("checkpoint {epoch}"), Reference::Checkpoint(Epoch(epoch)))),
        (None, Some(name)) => Some((format!("savepoint {name}"), Reference::Savepoint(name.clone()))),
        (None, None) => None,
    };
    let Some((name, reference)) = reference else { return Ok((Some(history), None)) };
    let found = history.find(&reference).await?;
    Ok((Some(history), Some((name, found.snapshot))))
}

async fn show(args: &CheckpointArgs) -> Result<Exit, Failure> {
    let snapshot = match chosen(args).await? {
        (_, Some((_, snapshot))) => snapshot,
        (Some(history), None) => history.find(&Reference::Latest).await?.snapshot,
        (None, None) => return Ok(Exit::Done),
    };
    let json = serde_json::to_string_pretty(&*snapshot.manifest);
    let json = json.map_err(|e| unusable(format!("print the manifest: {e}")))?;
    print(&format!("{json}\n"));
    Ok(Exit::Done)
}

async fn verify(args: &CheckpointArgs) -> Result<Exit, Failure> {
    let (history, named) = chosen(args).await?;
    let mut damaged = 0;
    let mut snapshots: Vec<Named> = named.into_iter().collect();
    if let (Some(history), true) = (&history, snapshots.is_empty()) {
        if history.state.next_seq == 0 {
            return Err(history.nothing());
        }
        for entry in &history.state.damaged {
            print(&format!("log entry {} is damaged: {}\n", entry.seq, entry.reason));
        }
        damaged += history.state.damaged.len();
        let all = candidates(&history.storage, &history.job, &history.state).map_err(unusable)?;
        snapshots
            .extend(all.into_iter().rev().map(|c| (format!("checkpoint {}", c.snapshot.manifest.epoch), c.snapshot)));
    }
    for (name, snapshot) in snapshots {
        let manifest = &snapshot.manifest;
        let damage = snapshot.verify().await.map_err(|e| unusable(e.context(format!("verify {name}"))))?;
        let size = bytes(manifest.size());
        if damage.is_empty() {
            print(&format!("{name}: {} shards, {size}: intact\n", manifest.shards().count()));
        } else {
            print(&format!("{name}: damaged\n"));
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
    use floodmark_snapshot::{JobId, Manifest, log::Damaged};

    use super::*;

    fn retained(seq: u64, epoch: u64) -> Retained {
        let job = JobId { namespace: "n".into(), name: "j".into(), uid: "u".into() };
        let manifest = Manifest {
            triggered_at_ms: 1_000 * epoch as i64,
            duration_ms: 25,
            end_of_input: epoch == 3,
            ..Manifest::new(job, Epoch(epoch))
        };
        Retained { seq, manifest, from: None }
    }

    fn trimmed(text: &str) -> String {
        text.lines().map(|l| format!("{}\n", l.trim_end())).collect()
    }

    #[test]
    fn checkpoints_are_listed_with_what_became_of_them() {
        let mut adopted = retained(0, 0);
        adopted.from = Some("/elsewhere/savepoints/a".into());
        let state = LogState {
            retained: vec![adopted, retained(1, 1), retained(5, 3)],
            abandoned: vec![retained(3, 2)],
            committed: Epoch(2),
            damaged: vec![Damaged { seq: 4, reason: "checksum mismatch".into() }],
            ..LogState::default()
        };
        expect![[r#"
               epoch         age        took   shards        size                      location
                   0       5.0 s       25 ms        0         0 B  adopted             /elsewhere/savepoints/a
                   1       4.0 s       25 ms        0         0 B  output committed    /s/log/1.json
                   2       3.0 s       25 ms        0         0 B  output committed, given up  /s/log/3.json
                   3       2.0 s       25 ms        0         0 B  end of input        /s/log/5.json
            log entry 4 is damaged: checksum mismatch
        "#]]
        .assert_eq(&trimmed(&table(&state, |seq| format!("/s/log/{seq}.json"), 5_000)));
    }

    #[test]
    fn savepoints_are_listed_with_what_is_wrong_with_them() {
        let listed = |name: &str, made| Listed { name: name.into(), location: format!("/s/{name}"), made };
        let savepoints =
            [listed("a", Ok((3_000, 2_048, Epoch(7)))), listed("before-upgrade", Err("it is damaged".into()))];
        expect![[r#"

            savepoint              age  of epoch        size  location
            a                    2.0 s         7     2.0 KiB  /s/a
            before-upgrade  it is damaged
        "#]]
        .assert_eq(&trimmed(&savepoint_table(&savepoints, 5_000)));
        assert_eq!(savepoint_table(&[], 0), "");
    }
}
