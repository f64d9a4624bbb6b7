//! `floodmark checkpoints delete`: gives checkpoints up as a coordinator would, and removes savepoints and whole histories.
//!
//! Invariants: files go only after the log entry that gives them up is durable; a job that runs is never fenced by a deletion
//! that knows of it; the last checkpoint goes only with all the rest.

use std::io::{IsTerminal, Write};

use floodmark_snapshot::{
    Env, Epoch, Error,
    log::{self, CheckpointLog, Entry, Event},
    retention::{self, Release},
    savepoint,
    storage::ObjectInfo,
};
use floodmark_worker::api::JobView;
use nix::{errno::Errno, sys::signal::kill, unistd::Pid};

use crate::{
    args::DeleteArgs,
    control::{Answer, Place, ask},
    display::{bytes, duration},
    exit::{Exit, Failure},
    history::{History, entry_path, unusable},
    run::{holder, host},
};

/// Deletes what the arguments name.
pub(super) async fn delete(args: &DeleteArgs) -> Result<Exit, Failure> {
    let history = History::read(&args.of.job, args.of.storage.as_deref()).await?;
    match (&args.what.savepoint, args.what.epoch) {
        (Some(name), _) => delete_savepoint(&history, name, args.yes).await,
        (None, Some(epoch)) => delete_checkpoint(&history, Epoch(epoch), args.yes).await,
        (None, None) => delete_all(&history, args.savepoints, args.yes).await,
    }
}

async fn delete_savepoint(history: &History, name: &str, yes: bool) -> Result<Exit, Failure> {
    savepoint::check_name(name).map_err(Failure::input)?;
    let location = history.locate(&format!("savepoints/{name}"));
    if !savepoint::exists(&*history.storage, &history.folder, name).await.map_err(unusable)? {
        let known = savepoint::list(&*history.storage, &history.folder).await.map_err(unusable)?;
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(unusable(format!("job {} has no savepoint '{name}'; there is: {known}", history.job)));
    }
    if let Some(user) = history.state.retained.iter().find(|r| r.from.as_deref() == Some(location.as_str())) {
        let (job, epoch) = (&history.job, user.manifest.epoch);
        return Err(unusable(format!(
            "job {job} started from savepoint '{name}' and still needs its files (as checkpoint {epoch}); delete it once the \
             job has completed checkpoints of its own and released that one"
        )));
    }
    confirm(&format!("savepoint {name} at {location}"), yes)?;
    savepoint::delete(&*history.storage, &history.folder, name).await.map_err(unusable)?;
    eprintln!("deleted savepoint {name}");
    Ok(Exit::Done)
}

async fn delete_checkpoint(history: &History, epoch: Epoch, yes: bool) -> Result<Exit, Failure> {
    let state = &history.state;
    let all = || state.retained.iter().chain(&state.abandoned);
    let Some(retained) = all().find(|r| r.manifest.epoch == epoch) else {
        let known: Vec<String> = all().map(|r| r.manifest.epoch.to_string()).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(unusable(format!("job {} has no checkpoint {epoch}; there is: {known}", history.job)));
    };
    let Some(release) = retention::release_these(state, &[epoch]) else {
        return Err(unusable(format!(
            "checkpoint {epoch} is the last one that job {} can start from: --all deletes it with everything else",
            history.job
        )));
    };
    let size: u64 = retained.manifest.files().filter(|s| release.blobs.contains(&s.path)).map(|s| s.size).sum();
    let mut what = format!("checkpoint {epoch} of {}: {} files, {}", history.job, release.blobs.len(), bytes(size));
    let newest = state.retained.last().is_some_and(|r| r.manifest.epoch == epoch);
    if let Some(next) = state.retained.iter().rev().nth(1).filter(|_| newest) {
        let next = next.manifest.epoch;
        what += &format!("\n  it is the newest: the job will start from checkpoint {next}");
        if state.committed > next {
            what += ", and write output a second time that it has committed since";
        }
    }
    what += &still_running(history).await?;
    confirm(&what, yes)?;
    let mut reign = Reign::begin(history).await?;
    reign.give_up(&release).await?;
    reign.end(&release).await?;
    retention::delete(&*history.storage, &history.folder, release.blobs).await;
    retention::trim(&*history.storage, &history.folder, release.oldest_seq).await.map_err(unusable)?;
    eprintln!("deleted checkpoint {epoch}");
    Ok(Exit::Done)
}

async fn delete_all(history: &History, savepoints: bool, yes: bool) -> Result<Exit, Failure> {
    let listed = history.storage.list(history.folder.root(), None).await.map_err(unusable)?;
    let inside = |o: &ObjectInfo, folder: &str| history.folder.relative(&o.path).is_some_and(|p| p.starts_with(folder));
    let (kept, gone): (Vec<_>, Vec<_>) = listed.into_iter().partition(|o| !savepoints && inside(o, "savepoints/"));
    if gone.is_empty() {
        return Err(history.nothing());
    }
    let size: u64 = gone.iter().map(|o| o.size).sum();
    let state = &history.state;
    let checkpoints = state.retained.len() + state.abandoned.len();
    let mut what = format!(
        "the whole history of job {} in {}: {checkpoints} checkpoints, {} files, {}",
        history.job,
        history.storage.describe(),
        gone.len(),
        bytes(size)
    );
    if savepoints {
        what += ", savepoints included";
    } else if !kept.is_empty() {
        what += "; savepoints stay (--savepoints deletes them too)";
    }
    what += &still_running(history).await?;
    confirm(&what, yes)?;
    let (log, others): (Vec<_>, Vec<_>) = gone.into_iter().partition(|o| inside(o, "log/"));
    let mut last = None;
    if !log.is_empty() {
        let mut reign = Reign::begin(history).await?;
        let epochs = state.retained.iter().chain(&state.abandoned).map(|r| r.manifest.epoch).collect();
        // From its own entry on: a deletion that breaks off leaves a job without a past, not a damaged one.
        let release = Release { epochs, oldest_seq: state.next_seq + 1, blobs: Vec::new() };
        last = Some(reign.give_up(&release).await?);
    }
    let relative = |o: &ObjectInfo| history.folder.relative(&o.path).map(str::to_owned);
    retention::delete(&*history.storage, &history.folder, others.iter().filter_map(relative).collect()).await;
    if let Some(last) = last {
        retention::trim(&*history.storage, &history.folder, last).await.map_err(unusable)?;
        retention::delete(&*history.storage, &history.folder, vec![entry_path(last)]).await;
    }
    eprintln!("deleted the history of job {}", history.job);
    Ok(Exit::Done)
}

/// A coordinator's reign that only gives checkpoints up.
struct Reign<'a> {
    history: &'a History,
    log: CheckpointLog,
}

impl<'a> Reign<'a> {
    async fn begin(history: &'a History) -> Result<Self, Failure> {
        let env = Env::system();
        let opened = CheckpointLog::open(history.storage.clone(), env, &history.job, &holder()).await;
        let (log, state) = opened.map_err(unusable)?;
        if state.next_seq != history.state.next_seq {
            return Err(unusable(format!(
                "the log of job {} has changed meanwhile: nothing was deleted; if the job runs, it was just fenced and must be \
                 started again",
                history.job
            )));
        }
        Ok(Self { history, log })
    }

    /// Makes the release durable; answers with the number of its entry.
    async fn give_up(&mut self, release: &Release) -> Result<u64, Failure> {
        self.log.append(release.event()).await.map_err(unusable)
    }

    /// Leaves a job that has finished finished.
    async fn end(&mut self, release: &Release) -> Result<(), Failure> {
        match self.history.state.finished.filter(|epoch| !release.epochs.contains(epoch)) {
            Some(epoch) => self.log.append(Event::Finished { epoch }).await.map(|_| ()).map_err(unusable),
            None => Ok(()),
        }
    }
}

/// Refuses if the job is known to run; otherwise answers with a warning (or nothing) for whoever decides.
async fn still_running(history: &History) -> Result<String, Failure> {
    let refuse = |who: &str| {
        let job = &history.job;
        Err(Failure::new(
            Exit::JobFailed,
            format!(
                "job {job} is run by {who}: deleting would take the job away from it. Stop it first; a running job deletes \
                 checkpoints by itself (spec.checkpoints.retain)"
            ),
        ))
    };
    let place = Place::of(&history.job, &history.location);
    if let Answer::Is(JobView { holder, .. }) = ask::<(), JobView>(&place, "GET", "/job", None).await? {
        return refuse(&holder);
    }
    let Some(last) = last_entry(history).await.map_err(unusable)? else { return Ok(String::new()) };
    // A job that has ended writes nothing more.
    if matches!(last.event, Event::Finished { .. } | Event::Stopped { .. }) {
        return Ok(String::new());
    }
    match last.holder.rsplit_once(':') {
        Some((at, pid)) if at == host() => match pid.parse() {
            Ok(pid) if is_floodmark(pid) => refuse(&last.holder),
            Ok(_) | Err(_) => Ok(String::new()),
        },
        _ => {
            let ago = duration(Env::system().clock.wall_ms() - last.written_at_ms);
            Ok(format!(
                "\n  {} wrote to its log {ago} ago and has not stopped it: if that process still runs, it is fenced",
                last.holder
            ))
        }
    }
}

async fn last_entry(history: &History) -> Result<Option<Entry>, Error> {
    let Some(seq) = history.state.next_seq.checked_sub(1) else { return Ok(None) };
    let bytes = history.storage.get(&history.folder.path(&entry_path(seq))).await?;
    // One that is damaged tells nothing.
    Ok(bytes.and_then(|b| log::decode(&b).ok()))
}

/// Whether a process of this number runs here, and may be one of ours.
fn is_floodmark(pid: i32) -> bool {
    let alive = pid > 0 && matches!(kill(Pid::from_raw(pid), None), Ok(()) | Err(Errno::EPERM));
    // Numbers are used again. Where the system doesn't tell the name, it is taken for ours.
    alive && std::fs::read_to_string(format!("/proc/{pid}/comm")).map_or(true, |name| name.starts_with("floodmark"))
}

/// Says what will be deleted, and asks, unless the answer was given beforehand.
fn confirm(what: &str, yes: bool) -> Result<(), Failure> {
    eprintln!("to delete: {what}");
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Failure::input("nothing was deleted: there is nobody to ask; to delete it, add --yes"));
    }
    eprint!("delete it for good? [y/N] ");
    // A terminal that is gone answers nothing, and that is no.
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    let _ = std::io::stdin().read_line(&mut answer);
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Failure::input("nothing was deleted")),
    }
}
