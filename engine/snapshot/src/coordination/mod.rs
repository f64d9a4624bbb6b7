//! Coordinates checkpoints: when one begins, when it is complete, when it is given up, and how a job ends. A pure state
//! machine: events and the time come in, decisions go out.
//!
//! A checkpoint's life: `Trigger` (barriers go out) -> acknowledgements of all subtasks -> `Append(Completed)` -> the shell
//! says it is durable -> `Announce` (tasks and committers learn of it) -> all committers confirm -> `Append(Committed)` ->
//! `Settled`. One that somebody wants as a savepoint is then exported: copied to where no job deletes it. By then nothing in
//! it waits for a commit, so a savepoint never holds output.
//!
//! A rescale ends the attempt: an ordinary checkpoint first, so that state is uploaded while the job runs, then one behind which
//! the sources stop. That one says at which parallelism the next attempt goes on: before it is complete the old one holds, and
//! from then on the new one.
//!
//! Invariants: no more than `max_concurrent` checkpoints are under way or uncommitted; they complete in the order of their
//! epochs (one that is overtaken by a later is given up); an epoch's number is never used twice; a checkpoint is aborted at
//! most once; barriers that stop the job or make a savepoint go out alone.

mod vocabulary;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

pub use self::vocabulary::{
    Barrier, BarrierKind, Decision, End, Event, Participants, SavepointId, Schedule, StartingPoint, Subtask, Time,
};
use crate::{
    Epoch, Manifest, OperatorSnapshot, OperatorUid, Shard,
    log::Event as LogEvent,
    manifest::{self, Rescaled, ShardStatus},
};

/// Aborted checkpoints whose late acknowledgements are still told apart; those of older ones are left for a sweep.
const ABORTED_REMEMBERED_MAX: usize = 64;

/// A checkpoint whose barriers are out.
#[derive(Debug)]
struct Flight {
    barrier: Barrier,
    /// The newest checkpoint that was complete when the barrier went out, 0 if none was: its files, and later ones, may be
    /// named again.
    base: Epoch,
    end_of_input: bool,
    savepoints: Vec<SavepointId>,
    triggered: Time,
    unaligned: bool,
    missing: BTreeSet<Subtask>,
    operators: BTreeMap<OperatorUid, OperatorSnapshot>,
}

/// A completed checkpoint whose staged records are not all visible yet.
#[derive(Debug)]
struct Completed {
    epoch: Epoch,
    savepoints: Vec<SavepointId>,
    end: Option<End>,
}

/// How far a rescale is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rescaling {
    /// The checkpoint before the last is to go out.
    Asked,
    /// It is under way.
    Preparing(Epoch),
    /// The last is to go out.
    Prepared,
    /// It is under way.
    Last(Epoch),
}

/// The log entry that is being written.
#[derive(Debug)]
enum Writing {
    Completed(Completed),
    Committed(Epoch),
    End(End),
}

/// How far a job is towards its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Running,
    /// The last checkpoint is settled; its export, if any, is under way.
    Ending {
        end: End,
        epoch: Epoch,
    },
    Over,
}

/// The machine.
#[derive(Debug)]
pub struct Coordinator {
    schedule: Schedule,
    who: Participants,
    life: Life,
    /// Barriers are out, oldest first.
    flights: BTreeMap<Epoch, Flight>,
    /// Completed, and not yet settled, oldest first.
    uncommitted: Vec<Completed>,
    /// Up to where each committer has made everything visible.
    visible: BTreeMap<usize, Epoch>,
    writing: Option<Writing>,
    exporting: BTreeSet<Epoch>,
    /// Who has not acknowledged an aborted checkpoint, and may still do so.
    aborted: BTreeMap<Epoch, BTreeSet<Subtask>>,
    /// The checkpoint that the attempt started from.
    restored: Option<Epoch>,
    last_epoch: Epoch,
    /// The newest completed checkpoint whose files later ones may name again: one that was not whole.
    newest_base: Epoch,
    last_trigger: Duration,
    last_end: Duration,
    /// The next barrier does not wait for the interval: output has waited since before the restore.
    overdue: bool,
    failures: u32,
    exhausted: BTreeSet<Subtask>,
    stop: Option<BarrierKind>,
    wanted: Vec<SavepointId>,
    /// A rescale, and what it is to.
    rescale: Option<(Rescaling, Option<Rescaled>)>,
}

impl Coordinator {
    /// A machine for one attempt, which begins now.
    #[must_use]
    pub fn new(schedule: Schedule, who: Participants, start: StartingPoint, now: Time) -> Self {
        // What the restored checkpoint staged must be visible before the records of a later epoch.
        let restored = start.restored.filter(|_| !who.committers.is_empty());
        let uncommitted = restored.map(|epoch| Completed { epoch, savepoints: Vec::new(), end: None });
        Self {
            schedule,
            visible: who.committers.iter().map(|c| (*c, Epoch::default())).collect(),
            who,
            life: Life::Running,
            flights: BTreeMap::new(),
            uncommitted: uncommitted.into_iter().collect(),
            writing: None,
            exporting: BTreeSet::new(),
            aborted: BTreeMap::new(),
            last_epoch: start.last_epoch.max(start.restored.unwrap_or_default()),
            restored,
            newest_base: start.restored.unwrap_or_default(),
            last_trigger: now.monotonic,
            last_end: now.monotonic,
            overdue: false,
            failures: 0,
            exhausted: BTreeSet::new(),
            stop: None,
            wanted: Vec::new(),
            rescale: None,
        }
    }

    /// When a [`Event::Tick`] will next matter, by the monotonic clock; `None` if it won't.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let of_flight = |f: &Flight| {
            let timeout = f.triggered.monotonic + self.schedule.timeout;
            self.unaligns_at(f).map_or(timeout, |at| at.min(timeout))
        };
        self.flights.values().map(of_flight).chain(self.triggers_at()).min()
    }

    /// The checkpoints whose barriers are out.
    pub fn in_flight(&self) -> impl Iterator<Item = Epoch> {
        self.flights.keys().copied()
    }

    /// Checkpoints whose files must not be deleted, although they may be past the newest few: one under way, or the next, may
    /// name them again.
    pub fn pinned(&self) -> impl Iterator<Item = Epoch> {
        let bases = self.flights.values().map(|f| f.base);
        let uncommitted = self.uncommitted.iter().map(|c| c.epoch);
        let next = (self.newest_base > Epoch(0)).then_some(self.newest_base);
        self.exporting.iter().copied().chain(uncommitted).chain(bases).chain(next)
    }

    /// The oldest checkpoint whose files the checkpoint `epoch` may name again; `None` if it may name none.
    #[must_use]
    pub fn base(&self, epoch: Epoch) -> Option<Epoch> {
        self.flights.get(&epoch).map(|f| f.base)
    }

    /// The oldest checkpoint that is not complete yet, or the next: files of it and of later ones may wait to be named.
    #[must_use]
    pub fn oldest_open(&self) -> Epoch {
        self.in_flight().next().unwrap_or_else(|| self.last_epoch.next())
    }

    /// Takes an event, and answers with what follows from it, in order.
    pub fn step(&mut self, event: Event, now: Time) -> Vec<Decision> {
        let mut decisions = Vec::new();
        let out = &mut decisions;
        match event {
            Event::Tick => {}
            Event::Acknowledged { epoch, subtask, parts } => self.acknowledge(epoch, subtask, parts, now, out),
            Event::Declined { epoch, subtask, reason } => {
                if let Some(missing) = self.aborted.get_mut(&epoch) {
                    missing.remove(&subtask);
                }
                self.abort(epoch, format!("declined by {subtask}: {reason}"), now, out);
            }
            Event::Exhausted(subtask) => {
                if self.who.sources.contains(&subtask) {
                    self.exhausted.insert(subtask);
                }
            }
            // Without committers there is none: what is not staged is visible at once.
            Event::Restored => self.overdue = self.restored.is_some(),
            Event::Appended => self.appended(now, out),
            Event::Committed { committer, epoch } => {
                if let Some(visible) = self.visible.get_mut(&committer) {
                    *visible = epoch.max(*visible);
                }
            }
            Event::StopRequested => self.ask_to_stop(BarrierKind::Stop),
            Event::SavepointRequested { id, then } => self.want_savepoint(id, then, out),
            Event::Exported(epoch) => {
                self.exporting.remove(&epoch);
            }
            Event::RescaleRequested { rescaled, prepared } => {
                let step = if prepared { Rescaling::Prepared } else { Rescaling::Asked };
                self.rescale.get_or_insert((step, rescaled));
            }
        }
        self.end_before_rescale(out);
        self.confirm(out);
        self.end_if_due(out);
        self.watch_the_time(now, out);
        self.trigger_if_due(now, out);
        decisions
    }

    fn ask_to_stop(&mut self, kind: BarrierKind) {
        // A wish to drain stands above a plain one, which may have come before it.
        if kind != BarrierKind::Checkpoint && self.stop != Some(BarrierKind::Drain) {
            self.stop = Some(kind);
        }
    }

    fn want_savepoint(&mut self, id: SavepointId, then: BarrierKind, out: &mut Vec<Decision>) {
        let stopping = self.flights.values().any(|f| f.barrier.stops())
            || self.uncommitted.iter().any(|c| c.end.is_some())
            || self.life != Life::Running
            || matches!(&self.writing, Some(Writing::Completed(Completed { end: Some(_), .. }) | Writing::End(_)));
        if stopping {
            let reason = "the job is ending already".to_owned();
            out.push(Decision::Refuse { savepoints: vec![id], reason });
            return;
        }
        self.wanted.push(id);
        self.ask_to_stop(then);
    }

    /// A job that ends has no use for another parallelism.
    fn end_before_rescale(&mut self, out: &mut Vec<Decision>) {
        let ending = self.stop.is_some() || self.end_of_input() || self.life != Life::Running;
        if ending && !matches!(self.rescale, None | Some((Rescaling::Last(_), _))) {
            self.rescale = None;
            out.push(Decision::Stay("it is ending".to_owned()));
        }
    }

    fn end_of_input(&self) -> bool {
        self.exhausted.len() == self.who.sources.len()
    }

    /// Whether the next barrier goes out alone and at once: the last one, or one for a savepoint or a rescale.
    fn urgent(&self) -> bool {
        self.stop.is_some() || self.end_of_input() || !self.wanted.is_empty() || self.rescale.is_some()
    }

    /// When the next barrier goes out, if nothing else must happen first.
    fn triggers_at(&self) -> Option<Duration> {
        let open = self.flights.len() + self.uncommitted.len();
        // What the restored checkpoint staged may be a subtask's that is no more: no later checkpoint would hold it.
        let restoring = self.uncommitted.iter().any(|c| Some(c.epoch) == self.restored);
        // The next attempt would not know which files are still being copied.
        let held_up = match self.rescale {
            Some((Rescaling::Preparing(_) | Rescaling::Last(_), _)) => true,
            Some((Rescaling::Prepared, _)) => !self.exporting.is_empty(),
            Some((Rescaling::Asked, _)) | None => false,
        };
        if self.life != Life::Running || self.writing.is_some() || restoring || held_up {
            return None;
        }
        if self.urgent() {
            return (open == 0).then_some(self.last_end);
        }
        let alone = self.flights.values().any(|f| f.barrier.whole || f.barrier.stops());
        let free = !alone && open < self.schedule.max_concurrent.max(1);
        let due = if self.overdue { self.last_trigger } else { self.last_trigger + self.schedule.interval };
        free.then(|| due.max(self.last_end + self.schedule.min_pause))
    }

    fn trigger_if_due(&mut self, now: Time, out: &mut Vec<Decision>) {
        if self.triggers_at().is_none_or(|at| now.monotonic < at) {
            return;
        }
        let savepoints = std::mem::take(&mut self.wanted);
        self.last_epoch = self.last_epoch.next();
        let end_of_input = self.end_of_input();
        let kind = match (self.stop, &mut self.rescale) {
            (Some(kind), _) => kind,
            (None, _) if end_of_input => BarrierKind::Stop,
            (None, Some((step @ Rescaling::Asked, _))) if savepoints.is_empty() => {
                *step = Rescaling::Preparing(self.last_epoch);
                BarrierKind::Checkpoint
            }
            (None, Some((step @ Rescaling::Prepared, _))) if savepoints.is_empty() => {
                *step = Rescaling::Last(self.last_epoch);
                BarrierKind::Stop
            }
            (None, _) => BarrierKind::Checkpoint,
        };
        self.last_trigger = now.monotonic;
        self.overdue = false;
        let barrier = Barrier { epoch: self.last_epoch, kind, whole: !savepoints.is_empty() };
        out.push(Decision::Trigger(barrier));
        self.flights.insert(
            barrier.epoch,
            Flight {
                barrier,
                base: self.newest_base,
                end_of_input,
                savepoints,
                triggered: now,
                unaligned: false,
                missing: self.who.subtasks.clone(),
                operators: BTreeMap::new(),
            },
        );
        self.watch_the_time(now, out);
    }

    /// When the barrier of a flight is to overtake records, unless it does already or must not.
    fn unaligns_at(&self, flight: &Flight) -> Option<Duration> {
        let after = self.schedule.unaligned_after.filter(|_| !flight.unaligned && flight.barrier.may_overtake());
        after.map(|after| flight.triggered.monotonic + after)
    }

    fn watch_the_time(&mut self, now: Time, out: &mut Vec<Decision>) {
        let timeout = self.schedule.timeout;
        let late = |f: &&Flight| now.monotonic >= f.triggered.monotonic + timeout;
        let late: Vec<_> = self.flights.values().filter(late).map(|f| (f.barrier.epoch, f.missing.len())).collect();
        for (epoch, missing) in late {
            let (seconds, all) = (timeout.as_secs_f64(), self.who.subtasks.len());
            self.abort(epoch, format!("timed out after {seconds} s, {missing} of {all} subtasks missing"), now, out);
        }
        let due = |f: &&Flight| self.unaligns_at(f).is_some_and(|at| now.monotonic >= at);
        let due: Vec<Epoch> = self.flights.values().filter(due).map(|f| f.barrier.epoch).collect();
        for epoch in due {
            if let Some(flight) = self.flights.get_mut(&epoch) {
                flight.unaligned = true;
                out.push(Decision::Unalign(epoch));
            }
        }
    }

    fn acknowledge(
        &mut self,
        epoch: Epoch,
        subtask: Subtask,
        parts: Vec<(OperatorUid, OperatorSnapshot)>,
        now: Time,
        out: &mut Vec<Decision>,
    ) {
        let Some(flight) = self.flights.get_mut(&epoch) else {
            // Only for somebody who had not answered when it was aborted is this the first answer.
            if self.aborted.get_mut(&epoch).is_some_and(|missing| missing.remove(&subtask)) {
                let orphans: Vec<String> = parts.iter().flat_map(|(_, part)| own_paths(part)).collect();
                if !orphans.is_empty() {
                    out.push(Decision::Discard(orphans));
                }
            }
            return;
        };
        if !flight.missing.remove(&subtask) {
            return;
        }
        for (uid, part) in parts {
            let whole = flight.operators.entry(uid).or_insert_with(|| OperatorSnapshot {
                kind: part.kind,
                schema: part.schema,
                parallelism: part.parallelism,
                ..OperatorSnapshot::default()
            });
            whole.splits.extend(part.splits);
            whole.shards.extend(part.shards);
        }
        if flight.missing.is_empty() {
            self.complete(epoch, now, out);
        }
    }

    fn complete(&mut self, epoch: Epoch, now: Time, out: &mut Vec<Decision>) {
        let overtaken: Vec<Epoch> = self.flights.range(..epoch).map(|(e, _)| *e).collect();
        for earlier in overtaken {
            self.give_up(earlier, format!("overtaken by checkpoint {epoch}"), true, out);
        }
        let Some(flight) = self.flights.remove(&epoch) else { return };
        let rescale = self.rescale.filter(|(step, _)| *step == Rescaling::Last(epoch));
        let end = match (flight.barrier.stops(), flight.end_of_input) {
            (false, _) => None,
            (true, _) if rescale.is_some() => Some(End::Rescaled),
            (true, true) => Some(End::Finished),
            (true, false) => Some(End::Stopped),
        };
        let mut operators = flight.operators;
        for operator in operators.values_mut() {
            // Acknowledgements come in any order; a manifest does not.
            operator.splits.sort_by(|a, b| a.split.cmp(&b.split));
            operator.shards.sort_by(|a, b| (a.subtask, a.layer, &a.path).cmp(&(b.subtask, b.layer, &b.path)));
        }
        let manifest = Manifest {
            format: manifest::format_of(operators.values().flat_map(|o| &o.shards)),
            job: self.who.job.clone(),
            epoch,
            generation: self.who.generation,
            attempt: self.who.attempt,
            triggered_at_ms: flight.triggered.wall_ms,
            duration_ms: (now.monotonic - flight.triggered.monotonic).as_millis() as u64,
            max_parallelism: self.who.max_parallelism,
            plan: self.who.plan.clone(),
            origin: self.who.origin.clone(),
            rescaled: rescale.map_or(self.who.rescaled, |(_, rescaled)| rescaled),
            end_of_input: flight.end_of_input && flight.barrier.stops(),
            operators,
        };
        self.writing = Some(Writing::Completed(Completed { epoch, savepoints: flight.savepoints, end }));
        out.push(Decision::Append(LogEvent::Completed { manifest: Box::new(manifest) }));
    }

    fn appended(&mut self, now: Time, out: &mut Vec<Decision>) {
        match self.writing.take() {
            Some(Writing::Completed(completed)) => {
                self.failures = 0;
                // What was made whole for a savepoint is named by nobody again: they go on from what was before.
                if completed.savepoints.is_empty() {
                    self.newest_base = completed.epoch;
                }
                out.push(Decision::Announce(completed.epoch));
                self.uncommitted.push(completed);
                if self.who.committers.is_empty() {
                    self.settle(self.last_epoch, now, out);
                }
            }
            Some(Writing::Committed(epoch)) => self.settle(epoch, now, out),
            Some(Writing::End(end)) => {
                self.life = Life::Over;
                out.push(Decision::Done(end));
            }
            // An answer to nothing that was asked: the shell's defect, and harmless.
            None => {}
        }
    }

    /// Says in the log what all committers have made visible.
    fn confirm(&mut self, out: &mut Vec<Decision>) {
        if self.writing.is_some() {
            return;
        }
        let Some(visible) = self.visible.values().min().copied() else { return };
        if let Some(newest) = self.uncommitted.iter().map(|c| c.epoch).filter(|e| *e <= visible).max() {
            self.writing = Some(Writing::Committed(newest));
            out.push(Decision::Append(LogEvent::Committed { epoch: newest }));
        }
    }

    /// Everything staged up to `epoch` is visible, and the log says so.
    fn settle(&mut self, epoch: Epoch, now: Time, out: &mut Vec<Decision>) {
        self.last_end = now.monotonic;
        let (settled, left) = std::mem::take(&mut self.uncommitted).into_iter().partition(|c| c.epoch <= epoch);
        self.uncommitted = left;
        if let Some((step @ Rescaling::Preparing(_), _)) = &mut self.rescale {
            // Nothing else was under way.
            *step = Rescaling::Prepared;
        }
        let settled: Vec<Completed> = settled;
        for Completed { epoch, savepoints, end } in settled {
            if !savepoints.is_empty() {
                self.exporting.insert(epoch);
                out.push(Decision::Export { epoch, savepoints });
            }
            if let Some(end) = end {
                self.life = Life::Ending { end, epoch };
            }
            out.push(Decision::Settled(epoch));
        }
    }

    /// Writes the last entry once nothing is left to do.
    fn end_if_due(&mut self, out: &mut Vec<Decision>) {
        let Life::Ending { end, epoch } = self.life else { return };
        if self.writing.is_some() || !self.exporting.is_empty() {
            return;
        }
        let entry = match end {
            End::Finished => LogEvent::Finished { epoch },
            End::Stopped => LogEvent::Stopped { epoch },
            // The checkpoint has said it.
            End::Rescaled => {
                self.life = Life::Over;
                out.push(Decision::Done(end));
                return;
            }
        };
        self.writing = Some(Writing::End(end));
        out.push(Decision::Append(entry));
    }

    /// Takes a flight back: everybody forgets it, and who wanted a savepoint of it is told.
    fn give_up(&mut self, epoch: Epoch, reason: String, overtaken: bool, out: &mut Vec<Decision>) -> Option<Barrier> {
        let flight = self.flights.remove(&epoch)?;
        let orphans = flight.operators.values().flat_map(own_paths).collect();
        if !flight.missing.is_empty() {
            self.aborted.insert(epoch, flight.missing);
            if self.aborted.len() > ABORTED_REMEMBERED_MAX {
                self.aborted.pop_first();
            }
        }
        out.push(Decision::Abort { epoch, reason: reason.clone(), overtaken, orphans });
        if !flight.savepoints.is_empty() {
            out.push(Decision::Refuse { savepoints: flight.savepoints, reason });
        }
        Some(flight.barrier)
    }

    fn abort(&mut self, epoch: Epoch, reason: String, now: Time, out: &mut Vec<Decision>) {
        let Some(barrier) = self.give_up(epoch, reason.clone(), false, out) else { return };
        self.last_end = now.monotonic;
        match self.rescale {
            Some((Rescaling::Last(last), _)) if last == epoch => {
                self.life = Life::Over;
                out.push(Decision::Restart(format!("the last checkpoint before a rescale ({epoch}) failed: {reason}")));
                return;
            }
            Some((Rescaling::Preparing(first), _)) if first == epoch => {
                self.rescale = None;
                // Who asked for it knows; the job's own checkpoints have not failed.
                out.push(Decision::Stay(format!("the checkpoint before a rescale ({epoch}) failed: {reason}")));
                return;
            }
            Some(_) | None => {}
        }
        if barrier.stops() {
            // The sources have ended behind that barrier: there is nobody left to send another.
            self.life = Life::Over;
            let failed = format!("the last checkpoint ({epoch}) failed: {reason}");
            // Without the savepoint that it was to stop with, the job does not stop. Who asked for it knows.
            out.push(if barrier.whole { Decision::Restart(failed) } else { Decision::Fail(failed) });
            return;
        }
        if barrier.whole {
            // Who asked for the savepoint knows; the job's own checkpoints have not failed.
            return;
        }
        self.failures += 1;
        if self.failures > self.schedule.tolerable_failures {
            self.life = Life::Over;
            out.push(Decision::Fail(format!(
                "checkpoint {epoch} failed, the {}. in a row (tolerable: {}): {reason}",
                self.failures, self.schedule.tolerable_failures
            )));
        }
    }
}

/// The files that this checkpoint itself has uploaded: what an earlier one has is that one's.
fn own_paths(part: &OperatorSnapshot) -> impl Iterator<Item = String> {
    let own = |s: &&Shard| s.status == ShardStatus::Uploaded;
    part.shards.iter().filter(own).map(|s| s.path.clone())
}
