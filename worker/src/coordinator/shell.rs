//! Carries out what the coordination machine decides: triggers, the log, retention, savepoints.
//!
//! Invariant: nothing is announced, committed or deleted before the log entry that allows it is durable.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use floodmark_dataflow::task::Command;
use floodmark_snapshot::{
    Env, Epoch, Error, OperatorSnapshot, OperatorUid, Result, Shard, Step,
    coordination::{
        self, BarrierKind, Coordinator, Decision, End, Participants, SavepointId, Schedule, StartingPoint, Subtask,
        Time,
    },
    log::{CheckpointLog, Event as LogEvent, LogState},
    manifest::{Rescaled, ShardStatus},
    restore::Snapshot,
    retention, savepoint,
};
use tokio::sync::mpsc;

use super::{Ended, Running, heads_source, rescaling::Rescaling, starting, stopped};
use crate::{
    CheckpointStatus, Controls, JobPhase, Outcome, RescaleRequest, SavepointMade, SavepointRequest,
    words::{CommitterId, FromWorker, SubtaskId},
};

/// Settled checkpoints from one look for orphaned files to the next.
const SWEEP_EVERY: u64 = 16;

/// How long a better place for subtasks must have been there before they move to it: workers that come often come together.
const MOVE_PATIENCE: Duration = Duration::from_secs(10);
/// A checkpoint that has taken no longer lets expect that the last before a move holds up nobody for long.
const MOVE_QUICKLY: Duration = Duration::from_secs(1);
/// After so long they move all the same.
const MOVE_PATIENCE_MAX: Duration = Duration::from_secs(120);

/// The I/O around the coordination machine.
pub(super) struct Shell {
    machine: Coordinator,
    log: CheckpointLog,
    state: LogState,
    /// What the log is to say of this start once all state is there; `state` knows it already.
    note: Option<LogEvent>,
    numbers: HashMap<CommitterId, usize>,
    /// Who waits for a savepoint.
    asked: BTreeMap<SavepointId, SavepointRequest>,
    next_asked: u64,
    /// Checkpoints whose savepoints are copied, or have failed.
    exported: (mpsc::UnboundedSender<Exported>, mpsc::UnboundedReceiver<Exported>),
    settled: u64,
    /// The checkpoint that the tasks have started from.
    restored: Option<Epoch>,
    /// The rescale that is under way.
    rescaling: Option<Rescaling>,
    /// When the machine has last stepped.
    stepped: Time,
}

impl Shell {
    /// `restored` is the checkpoint that the tasks have started from, `rescaling` what they have started anew for.
    pub(super) fn new(
        running: &Running<'_>,
        log: CheckpointLog,
        state: LogState,
        note: Option<LogEvent>,
        restored: Option<Epoch>,
        rescaling: Option<Rescaling>,
    ) -> Self {
        let spec = &running.spec;
        let numbers: HashMap<_, _> = running.committers.iter().cloned().zip(0..).collect();
        let who = Participants {
            subtasks: running.unended.iter().map(|id| subtask(*id)).collect(),
            sources: running.unended.iter().filter(|id| heads_source(spec, id.task)).map(|id| subtask(*id)).collect(),
            committers: numbers.values().copied().collect::<BTreeSet<usize>>(),
            job: spec.job.clone(),
            generation: log.generation(),
            attempt: log.attempt(),
            max_parallelism: spec.max_parallelism,
            plan: spec.graph.fingerprint.clone(),
            origin: state.asked.clone(),
            rescaled: starting::rescaled(spec, &state),
        };
        let settings = &spec.checkpoints;
        let schedule = Schedule {
            interval: settings.interval,
            timeout: settings.timeout,
            min_pause: settings.min_pause,
            tolerable_failures: settings.tolerable_failures,
            max_concurrent: settings.max_concurrent,
            unaligned_after: settings.unaligned_after,
        };
        let start = StartingPoint { restored, last_epoch: state.last_epoch };
        let stepped = now(&running.env);
        let machine = Coordinator::new(schedule, who, start, stepped);
        Self {
            machine,
            log,
            state,
            note,
            numbers,
            asked: BTreeMap::new(),
            next_asked: 0,
            exported: mpsc::unbounded_channel(),
            settled: 0,
            restored,
            rescaling,
            stepped,
        }
    }

    /// Where the job stands, and the rescale that the next attempt is for. Whoever waits for a savepoint still is told that it
    /// has come to nothing.
    pub(super) fn left(self, ended: &Result<Ended>) -> (LogState, Option<Rescaling>) {
        let why = match ended {
            Ok(Ended::Job(..)) => "the job has ended before it was complete".to_owned(),
            Ok(Ended::Rescaled | Ended::Unfinished) => "the job goes on without it; ask again".to_owned(),
            Err(error) => format!("the attempt has failed before it was complete: {error}"),
        };
        for request in self.asked.into_values() {
            tracing::warn!(savepoint = %request.name, reason = %why, "no savepoint");
            // One that no longer listens has no need of the answer.
            let _ = request.reply.send(Err(why.clone()));
        }
        (self.state, self.rescaling)
    }

    /// Runs the attempt to its end.
    ///
    /// # Errors
    /// Whatever fails it.
    pub(super) async fn run(&mut self, running: &mut Running<'_>, controls: &mut Controls) -> Result<Ended> {
        let mut restored = running.arriving.is_empty();
        if restored {
            self.note().await?;
        }
        running.run();
        if let Some(rescaling) = self.rescaling.take() {
            rescaling.runs(running.crew.parallelism(), self.restored);
        }
        let mut stopping = false;
        let mut pending = vec![coordination::Event::Tick];
        if restored {
            pending.push(self.state_is_there(running));
        }
        loop {
            if !restored && running.arriving.is_empty() {
                restored = true;
                self.note().await?;
                pending.push(self.state_is_there(running));
            }
            while let Some(event) = pending.pop() {
                self.stepped = now(&running.env);
                let decisions = self.machine.step(event, self.stepped);
                for decision in decisions {
                    match self.carry_out(decision, running).await? {
                        After::GoOn => {}
                        After::Tell(event) => pending.push(event),
                        After::End(ended) => return Ok(ended),
                    }
                }
            }
            let deadline = self.machine.deadline().map(|d| d.saturating_sub(running.env.clock.monotonic()));
            // Rare things first: a stream of events holds up neither a deadline nor a request.
            tokio::select! {
                biased;
                () = pause(deadline, &running.env) => pending.push(coordination::Event::Tick),
                () = stopped(&mut controls.stop), if !stopping => {
                    stopping = true;
                    tracing::info!("stopping with a last checkpoint");
                    pending.push(coordination::Event::StopRequested);
                }
                // While a rescale is under way, others wait.
                Some(request) = controls.rescales.recv(), if self.rescaling.is_none() => {
                    pending.extend(self.ask_rescale(request, running));
                }
                Some(request) = controls.savepoints.recv(), if self.rescaling.is_none() => pending.extend(self.ask(request)),
                Some(Exported { epoch, unmade }) = self.exported.1.recv() => match unmade {
                    Some(why) if !stopping => {
                        tracing::warn!("the job does not stop, without the savepoint that it was to stop with: {why}");
                        return Ok(Ended::Unfinished);
                    }
                    Some(_) | None => pending.push(coordination::Event::Exported(epoch)),
                },
                report = running.crew.next() => pending.extend(self.report(report?, running)?),
            }
        }
    }

    /// Says in the log where the job goes on from.
    async fn note(&mut self) -> Result<()> {
        if let Some(event) = self.note.take() {
            self.log.append(event).await?;
        }
        Ok(())
    }

    /// All state is there, and the log says from where: now what it holds staged may be committed, and what nobody names deleted.
    fn state_is_there(&self, running: &Running<'_>) -> coordination::Event {
        running.commit();
        self.sweep_orphans(running);
        coordination::Event::Restored
    }

    /// Takes a request for a savepoint in.
    fn ask(&mut self, request: SavepointRequest) -> Option<coordination::Event> {
        if let Err(error) = savepoint::check_name(&request.name) {
            let _ = request.reply.send(Err(error.to_string()));
            return None;
        }
        let id = SavepointId(self.next_asked);
        self.next_asked += 1;
        tracing::info!(savepoint = %request.name, "savepoint asked for");
        let then = request.then;
        self.asked.insert(id, request);
        Some(coordination::Event::SavepointRequested { id, then })
    }

    /// Takes a request for another parallelism in.
    fn ask_rescale(&mut self, request: RescaleRequest, running: &Running<'_>) -> Option<coordination::Event> {
        let (spec, from) = (&running.spec, running.crew.parallelism());
        let crowds = |parallelism| running.crew.crowds(parallelism);
        let rescaling = Rescaling::asked(request, from, spec.max_parallelism, crowds)?;
        let to = rescaling.to();
        self.rescaling = Some(rescaling);
        let rescaled = (to != spec.parallelism).then_some(Rescaled { spec: spec.parallelism, to });
        Some(coordination::Event::RescaleRequested { rescaled, prepared: false })
    }

    /// A checkpoint is settled: now is the time to move subtasks, if others have had free slots for them for long enough.
    fn move_to_free_slots(&mut self, running: &Running<'_>) -> Option<coordination::Event> {
        let uneven = running.crew.uneven_for();
        if self.rescaling.is_some() || uneven < MOVE_PATIENCE {
            return None;
        }
        let newest = self.state.retained.last().map_or(0, |r| r.manifest.duration_ms);
        if Duration::from_millis(newest) > MOVE_QUICKLY && uneven < MOVE_PATIENCE_MAX {
            return None;
        }
        tracing::info!("moving subtasks to workers with free slots");
        self.rescaling = Some(Rescaling::to_free_slots(running.crew.parallelism()));
        let rescaled = starting::rescaled(&running.spec, &self.state);
        Some(coordination::Event::RescaleRequested { rescaled, prepared: true })
    }

    /// What a report means to the machine.
    fn report(&mut self, report: FromWorker, running: &mut Running<'_>) -> Result<Option<coordination::Event>> {
        Ok(match report {
            FromWorker::Acknowledged { epoch, subtask: id, parts } => {
                Some(self.acknowledged(epoch, subtask(id), parts))
            }
            FromWorker::Declined { epoch, subtask: id, reason } => {
                Some(coordination::Event::Declined { epoch, subtask: subtask(id), reason })
            }
            FromWorker::Exhausted(id) => Some(coordination::Event::Exhausted(subtask(id))),
            FromWorker::Committed(id, epoch) => {
                self.numbers.get(&id).map(|n| coordination::Event::Committed { committer: *n, epoch })
            }
            other => {
                running.plain_event(other)?;
                None
            }
        })
    }

    /// A subtask's part of a checkpoint is durable.
    fn acknowledged(
        &self,
        epoch: Epoch,
        subtask: Subtask,
        parts: Vec<(OperatorUid, OperatorSnapshot)>,
    ) -> coordination::Event {
        match self.gone(epoch, &parts) {
            Some(path) => {
                let reason = format!("it names {path}, which an earlier checkpoint has given up");
                coordination::Event::Declined { epoch, subtask, reason }
            }
            None => coordination::Event::Acknowledged { epoch, subtask, parts },
        }
    }

    /// A file that a checkpoint names again, and that is not sure to be there when it completes.
    fn gone<'a>(&self, epoch: Epoch, parts: &'a [(OperatorUid, OperatorSnapshot)]) -> Option<&'a str> {
        let again = |s: &&Shard| s.status == ShardStatus::Reused;
        let mut named = parts.iter().flat_map(|(_, part)| &part.shards).filter(again).peekable();
        named.peek()?;
        // Of a checkpoint that is not under way any more nothing will be named.
        let base = self.machine.base(epoch)?;
        let kept = self.state.retained.iter().filter(|r| r.from.is_none() && r.manifest.epoch >= base);
        let standing: BTreeSet<&str> = kept.flat_map(|r| r.manifest.shards()).map(|s| s.path.as_str()).collect();
        named.find(|s| !standing.contains(s.path.as_str())).map(|s| s.path.as_str())
    }

    async fn carry_out(&mut self, decision: Decision, running: &mut Running<'_>) -> Result<After> {
        tracing::debug!("{decision}");
        match decision {
            Decision::Trigger(barrier) => {
                running.progress.triggered(barrier, self.stepped);
                if barrier.stops() && self.rescaling.is_none() {
                    running.progress.phase(JobPhase::Stopping);
                }
                running.tell(Command::Trigger(barrier));
            }
            Decision::Unalign(epoch) => {
                running.progress.unaligned(epoch);
                running.tell(Command::Unalign(epoch));
            }
            Decision::Append(event) => {
                self.append(event, running).await?;
                return Ok(After::Tell(coordination::Event::Appended));
            }
            Decision::Announce(epoch) => running.tell(Command::Completed(epoch)),
            Decision::Abort { epoch, reason, overtaken, orphans } => {
                if overtaken {
                    tracing::info!(checkpoint = %epoch, %reason, "checkpoint given up");
                } else {
                    tracing::warn!(checkpoint = %epoch, %reason, "checkpoint aborted");
                }
                running.progress.aborted(epoch, reason, overtaken, self.stepped);
                running.tell(Command::Abort(epoch));
                self.delete(orphans, running);
            }
            Decision::Discard(orphans) => self.delete(orphans, running),
            Decision::Settled(_) => {
                self.settled(running).await?;
                if let Some(event) = self.move_to_free_slots(running) {
                    return Ok(After::Tell(event));
                }
            }
            Decision::Export { epoch, savepoints } => self.export(epoch, savepoints, running),
            Decision::Refuse { savepoints, reason } => {
                for request in savepoints.iter().filter_map(|id| self.asked.remove(id)) {
                    tracing::warn!(savepoint = %request.name, %reason, "no savepoint");
                    let _ = request.reply.send(Err(reason.clone()));
                }
            }
            Decision::Stay(reason) => {
                if let Some(rescaling) = self.rescaling.take() {
                    rescaling.stays(reason);
                }
            }
            Decision::Restart(reason) => {
                tracing::warn!("{reason}; the job goes on from the checkpoint before");
                if let Some(rescaling) = &mut self.rescaling {
                    rescaling.failed(reason);
                }
                return Ok(After::End(Ended::Unfinished));
            }
            // A storage that can't be written to may be back by the next attempt.
            Decision::Fail(cause) => return Err(Error::retry(cause)),
            Decision::Done(end) => {
                let newest = Some(self.state.last_epoch);
                return Ok(After::End(match end {
                    End::Finished => Ended::Job(Outcome::Finished, newest),
                    End::Stopped => Ended::Job(Outcome::Stopped, newest),
                    End::Rescaled => Ended::Rescaled,
                }));
            }
        }
        Ok(After::GoOn)
    }

    async fn append(&mut self, event: LogEvent, running: &Running<'_>) -> Result<()> {
        let probe = &running.env.probe;
        if let LogEvent::Completed { manifest } = &event {
            probe.reached(Step::BeforeLogEntry, manifest.epoch);
        }
        let seq = self.log.append(event.clone()).await?;
        match &event {
            LogEvent::Completed { manifest } => {
                probe.reached(Step::AfterLogEntry, manifest.epoch);
                let status = CheckpointStatus {
                    epoch: manifest.epoch,
                    triggered_at_ms: manifest.triggered_at_ms,
                    duration_ms: manifest.duration_ms,
                    size: manifest.size(),
                };
                tracing::debug!(checkpoint = %status.epoch, ms = status.duration_ms, bytes = status.size, "checkpoint completed");
                running.progress.completed(status);
            }
            LogEvent::Committed { epoch } => probe.reached(Step::AfterCommittedEntry, *epoch),
            LogEvent::Opened
            | LogEvent::Restored { .. }
            | LogEvent::Adopted { .. }
            | LogEvent::Released { .. }
            | LogEvent::Finished { .. }
            | LogEvent::Stopped { .. } => {}
        }
        self.state.take(seq, event);
        Ok(())
    }

    /// Gives up checkpoints past the newest few, and deletes what nothing names any more, off this loop.
    async fn settled(&mut self, running: &Running<'_>) -> Result<()> {
        self.settled += 1;
        if self.settled.is_multiple_of(SWEEP_EVERY) {
            self.sweep_orphans(running);
        }
        let retain = running.spec.checkpoints.retain;
        let Some(release) = retention::release(&self.state, retain, self.machine.pinned()) else { return Ok(()) };
        self.append(release.event(), running).await?;
        let (storage, folder) = (running.spec.storage.clone(), self.log.folder().clone());
        running.env.runtime.spawn(Box::pin(async move {
            retention::delete(&*storage, &folder, release.blobs).await;
            if let Err(error) = retention::trim(&*storage, &folder, release.oldest_seq).await {
                tracing::warn!(%error, "could not trim the checkpoint log; left for the next release");
            }
        }));
        Ok(())
    }

    fn delete(&self, paths: Vec<String>, running: &Running<'_>) {
        let (storage, folder) = (running.spec.storage.clone(), self.log.folder().clone());
        running.env.runtime.spawn(Box::pin(async move { retention::delete(&*storage, &folder, paths).await }));
    }

    /// Deletes what was uploaded and no checkpoint names or can name any more.
    fn sweep_orphans(&self, running: &Running<'_>) {
        let (storage, folder) = (running.spec.storage.clone(), self.log.folder().clone());
        let (state, attempt, oldest_open) = (self.state.clone(), self.log.attempt(), self.machine.oldest_open());
        running.env.runtime.spawn(Box::pin(async move {
            match storage.list(&folder.path("blobs"), None).await {
                Ok(listed) => {
                    let listed: Vec<_> =
                        listed.iter().filter_map(|o| folder.relative(&o.path)).map(str::to_owned).collect();
                    let orphans = retention::orphans(&listed, &state, attempt, oldest_open);
                    retention::delete(&*storage, &folder, orphans).await;
                }
                Err(error) => tracing::warn!(%error, "could not look for orphaned files; left for the next look"),
            }
        }));
    }

    /// Copies a settled checkpoint to the savepoints that were asked for, off this loop.
    fn export(&mut self, epoch: Epoch, savepoints: Vec<SavepointId>, running: &Running<'_>) {
        let requests: Vec<SavepointRequest> = savepoints.iter().filter_map(|id| self.asked.remove(id)).collect();
        let manifest = self.state.retained.iter().find(|r| r.manifest.epoch == epoch).map(|r| r.manifest.clone());
        let (storage, folder, env) = (running.spec.storage.clone(), self.log.folder().clone(), running.env.clone());
        let exported = self.exported.0.clone();
        running.env.runtime.spawn(Box::pin(async move {
            let (mut stops, mut unmade) = (false, None);
            for SavepointRequest { name, then, reply } in requests {
                let made = match manifest.clone() {
                    Some(manifest) => {
                        let size = manifest.size();
                        let snapshot = Snapshot::new(manifest.into(), storage.clone(), folder.root());
                        let made = savepoint::export(&snapshot, &storage, &folder, &name, env.clock.wall_ms()).await;
                        made.map(|location| SavepointMade { location, epoch, size })
                    }
                    None => Err(Error::abort("internal error: the checkpoint is not there any more")),
                };
                match &made {
                    Ok(made) => tracing::info!(savepoint = %name, location = %made.location, "savepoint complete"),
                    Err(error) => tracing::warn!(savepoint = %name, %error, "no savepoint"),
                }
                match (then, &made) {
                    (BarrierKind::Checkpoint, _) => {}
                    (BarrierKind::Stop, Err(error)) => unmade = Some(error.to_string()),
                    // Behind a drain there is no way back: event time is at its end.
                    (BarrierKind::Stop, Ok(_)) | (BarrierKind::Drain, _) => stops = true,
                }
                let _ = reply.send(made.map_err(|e| e.to_string()));
            }
            let unmade = unmade.filter(|_| !stops);
            let _ = exported.send(Exported { epoch, unmade });
        }));
    }
}

/// A checkpoint whose savepoints are copied, or have failed.
struct Exported {
    epoch: Epoch,
    /// Why there is no savepoint to stop with, if the job was to stop with one.
    unmade: Option<String>,
}

/// What follows from a decision that was carried out.
enum After {
    GoOn,
    Tell(coordination::Event),
    End(Ended),
}

fn subtask(id: SubtaskId) -> Subtask {
    Subtask { task: id.task.0, index: id.index }
}

fn now(env: &Env) -> Time {
    Time { monotonic: env.clock.monotonic(), wall_ms: env.clock.wall_ms() }
}

async fn pause(duration: Option<Duration>, env: &Env) {
    match duration {
        Some(duration) => env.runtime.sleep(duration).await,
        None => std::future::pending().await,
    }
}
