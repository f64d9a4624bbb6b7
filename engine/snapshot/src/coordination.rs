//! Coordinates checkpoints: when one begins, when it is complete, when it is given up, and how a job ends. A pure state
//! machine: events and the time come in, decisions go out.
//!
//! A checkpoint's life: `Trigger` (barriers go out) -> acknowledgements of all subtasks -> `Append(Completed)` -> the shell
//! says it is durable -> `Announce` (tasks and committers learn of it) -> all committers confirm -> `Append(Committed)`.
//! Invariants: at most one checkpoint is under way; epoch n+1 is not triggered before everything staged up to n is
//! committed, so at most one completed epoch is uncommitted; an epoch's number is never used twice; a checkpoint is aborted
//! at most once.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use crate::{
    Attempt, Epoch, Generation, JobId, Manifest, OperatorSnapshot, OperatorUid, Shard,
    log::Event as LogEvent,
    manifest::{MANIFEST_FORMAT, ShardStatus},
};

/// A subtask, by the index of its task in the graph and its own index in the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subtask {
    /// Index of the task.
    pub task: usize,
    /// Index of the subtask.
    pub index: u32,
}

impl fmt::Display for Subtask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.task, self.index)
    }
}

/// When checkpoints are taken, and how often they may fail.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// From one trigger to the next.
    pub interval: Duration,
    /// A checkpoint that has not completed after this long is aborted.
    pub timeout: Duration,
    /// Least time from the end of one checkpoint to the next trigger.
    pub min_pause: Duration,
    /// Failed checkpoints in a row that the job survives.
    pub tolerable_failures: u32,
}

/// Who takes part, and what every manifest says.
#[derive(Clone, Debug)]
pub struct Participants {
    /// Every subtask: all must acknowledge.
    pub subtasks: BTreeSet<Subtask>,
    /// Those of them that head a source; barriers start there.
    pub sources: BTreeSet<Subtask>,
    /// Committers by number: all must confirm.
    pub committers: BTreeSet<usize>,
    /// The job.
    pub job: JobId,
    /// This reign.
    pub generation: Generation,
    /// This attempt.
    pub attempt: Attempt,
    /// Number of key groups.
    pub max_parallelism: u16,
    /// Fingerprint of the plan.
    pub plan: String,
}

/// What an attempt starts from.
#[derive(Clone, Copy, Debug, Default)]
pub struct StartingPoint {
    /// The restored checkpoint, if any: its staged records must be committed before anything is triggered.
    pub restored: Option<Epoch>,
    /// The greatest epoch that was ever used.
    pub last_epoch: Epoch,
}

/// What follows behind a barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarrierKind {
    /// The job goes on.
    Checkpoint,
    /// The job stops: all its inputs have ended, or somebody asked. Sources emit nothing more, and tasks end once their sinks
    /// have committed.
    Stop,
    /// As [`BarrierKind::Stop`], but event time first goes to its end: windows fire, nothing is left over.
    Drain,
}

/// Separates the records of one snapshot from those of the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Barrier {
    /// The snapshot's number.
    pub epoch: Epoch,
    /// What follows behind it.
    pub kind: BarrierKind,
    /// True if the snapshot must be complete in itself and neutral to state back ends, as a savepoint is.
    pub whole: bool,
}

impl Barrier {
    /// The barrier of an ordinary checkpoint.
    #[must_use]
    pub fn checkpoint(epoch: Epoch) -> Self {
        Self { epoch, kind: BarrierKind::Checkpoint, whole: false }
    }

    /// Whether the job ends behind it.
    #[must_use]
    pub fn stops(&self) -> bool {
        self.kind != BarrierKind::Checkpoint
    }
}

impl fmt::Display for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.epoch)?;
        if self.whole {
            f.write_str(" for a savepoint")?;
        }
        match self.kind {
            BarrierKind::Checkpoint => Ok(()),
            BarrierKind::Stop => f.write_str(" and stop"),
            BarrierKind::Drain => f.write_str(", drain and stop"),
        }
    }
}

/// Now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Time {
    /// Of [`crate::Clock::monotonic`].
    pub monotonic: Duration,
    /// Of [`crate::Clock::wall_ms`]; goes into manifests only.
    pub wall_ms: i64,
}

/// What the machine is told.
#[derive(Debug)]
pub enum Event {
    /// Nothing but the time.
    Tick,
    /// A subtask's part of a checkpoint is durable.
    Acknowledged {
        /// The checkpoint.
        epoch: Epoch,
        /// Who.
        subtask: Subtask,
        /// What the manifest shall say of it.
        parts: Vec<(OperatorUid, OperatorSnapshot)>,
    },
    /// A subtask can't take part in a checkpoint (an upload failed).
    Declined {
        /// The checkpoint.
        epoch: Epoch,
        /// Who.
        subtask: Subtask,
        /// Why.
        reason: String,
    },
    /// A source has read its input to the end, and goes on answering triggers.
    Exhausted(Subtask),
    /// The entry of the last `Append` is durable.
    Appended,
    /// A committer has made everything staged up to `epoch` visible.
    Committed {
        /// Which.
        committer: usize,
        /// The epoch.
        epoch: Epoch,
    },
    /// Somebody wants the job to stop with a last checkpoint.
    StopRequested,
}

/// How a job ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All inputs have ended.
    Finished,
    /// It was asked to stop.
    Stopped,
}

/// What the machine wants done. `Append` is answered by [`Event::Appended`] before any other event.
#[derive(Debug)]
pub enum Decision {
    /// Tell all sources to send this barrier.
    Trigger(Barrier),
    /// Append this to the log.
    Append(LogEvent),
    /// Tell tasks and committers that the checkpoint is complete and durable.
    Announce(Epoch),
    /// Tell tasks and committers to forget the checkpoint; delete what it has uploaded.
    Abort {
        /// The checkpoint.
        epoch: Epoch,
        /// Why.
        reason: String,
        /// Paths, relative to the job's folder, that nothing names.
        orphans: Vec<String>,
    },
    /// Everything staged up to here is visible, and the log says so (if any sink stages at all).
    Settled(Epoch),
    /// The job can't go on.
    Fail(String),
    /// The job has ended; tasks end by themselves.
    Done(End),
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Trigger(barrier) => write!(f, "trigger {barrier}"),
            Self::Append(LogEvent::Completed { manifest }) => write!(f, "append completed {}", manifest.epoch),
            Self::Append(LogEvent::Committed { epoch }) => write!(f, "append committed {epoch}"),
            Self::Append(LogEvent::Finished { epoch }) => write!(f, "append finished {epoch}"),
            Self::Append(LogEvent::Stopped { epoch }) => write!(f, "append stopped {epoch}"),
            Self::Append(LogEvent::Opened) => f.write_str("append opened"),
            Self::Append(LogEvent::Restored { epoch }) => write!(f, "append restored {epoch:?}"),
            Self::Append(LogEvent::Released { epochs, .. }) => write!(f, "append released {epochs:?}"),
            Self::Announce(epoch) => write!(f, "announce {epoch}"),
            Self::Abort { epoch, reason, orphans } => write!(f, "abort {epoch} ({reason}), delete {orphans:?}"),
            Self::Settled(epoch) => write!(f, "settled {epoch}"),
            Self::Fail(cause) => write!(f, "fail: {cause}"),
            Self::Done(End::Finished) => f.write_str("done: finished"),
            Self::Done(End::Stopped) => f.write_str("done: stopped"),
        }
    }
}

#[derive(Debug)]
struct InFlight {
    epoch: Epoch,
    kind: BarrierKind,
    end_of_input: bool,
    triggered: Time,
    missing: BTreeSet<Subtask>,
    operators: BTreeMap<OperatorUid, OperatorSnapshot>,
}

/// What follows once an epoch is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    GoOn,
    End(End),
}

#[derive(Debug)]
enum Phase {
    /// No checkpoint is under way.
    Idle { ended: Duration },
    /// Barriers are out.
    InFlight(InFlight),
    /// The `Completed` entry is being written.
    Completing { epoch: Epoch, after: After },
    /// Committers are at work.
    Committing { epoch: Epoch, waiting: BTreeSet<usize>, after: After },
    /// The `Committed` entry is being written.
    Confirming { epoch: Epoch, after: After },
    /// The `Finished` or `Stopped` entry is being written.
    Ending(End),
    /// Nothing follows.
    Over,
}

/// The machine.
#[derive(Debug)]
pub struct Coordinator {
    schedule: Schedule,
    who: Participants,
    phase: Phase,
    last_epoch: Epoch,
    last_trigger: Duration,
    failures: u32,
    exhausted: BTreeSet<Subtask>,
    stop_requested: bool,
}

impl Coordinator {
    /// A machine for one attempt, which begins now.
    #[must_use]
    pub fn new(schedule: Schedule, who: Participants, start: StartingPoint, now: Time) -> Self {
        let phase = match start.restored {
            // What the restored checkpoint staged must be visible before the records of a later epoch.
            Some(epoch) if !who.committers.is_empty() => {
                Phase::Committing { epoch, waiting: who.committers.clone(), after: After::GoOn }
            }
            Some(_) | None => Phase::Idle { ended: now.monotonic },
        };
        let last_epoch = start.last_epoch.max(start.restored.unwrap_or_default());
        Self {
            schedule,
            who,
            phase,
            last_epoch,
            last_trigger: now.monotonic,
            failures: 0,
            exhausted: BTreeSet::new(),
            stop_requested: false,
        }
    }

    /// When a [`Event::Tick`] will next matter, by the monotonic clock; `None` if it won't.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        match &self.phase {
            Phase::Idle { ended } => Some(self.next_trigger(*ended)),
            Phase::InFlight(flight) => Some(flight.triggered.monotonic + self.schedule.timeout),
            Phase::Completing { .. }
            | Phase::Committing { .. }
            | Phase::Confirming { .. }
            | Phase::Ending(_)
            | Phase::Over => None,
        }
    }

    /// The checkpoint whose barriers are out, if any.
    #[must_use]
    pub fn in_flight(&self) -> Option<Epoch> {
        match &self.phase {
            Phase::InFlight(flight) => Some(flight.epoch),
            Phase::Idle { .. }
            | Phase::Completing { .. }
            | Phase::Committing { .. }
            | Phase::Confirming { .. }
            | Phase::Ending(_)
            | Phase::Over => None,
        }
    }

    /// Takes an event, and answers with what follows from it, in order.
    pub fn step(&mut self, event: Event, now: Time) -> Vec<Decision> {
        let mut decisions = Vec::new();
        match event {
            Event::Tick => self.time_out(now, &mut decisions),
            Event::Acknowledged { epoch, subtask, parts } => {
                self.acknowledge(epoch, subtask, parts, now, &mut decisions)
            }
            Event::Declined { epoch, subtask, reason } => {
                if self.in_flight() == Some(epoch) {
                    self.abort(format!("declined by {subtask}: {reason}"), now, &mut decisions);
                }
            }
            Event::Exhausted(subtask) => {
                if self.who.sources.contains(&subtask) {
                    self.exhausted.insert(subtask);
                }
            }
            Event::Appended => self.appended(now, &mut decisions),
            Event::Committed { committer, epoch } => self.committed(committer, epoch, &mut decisions),
            Event::StopRequested => self.stop_requested = true,
        }
        self.trigger_if_due(now, &mut decisions);
        decisions
    }

    fn next_trigger(&self, ended: Duration) -> Duration {
        if self.must_stop() {
            return ended;
        }
        (self.last_trigger + self.schedule.interval).max(ended + self.schedule.min_pause)
    }

    fn end_of_input(&self) -> bool {
        self.exhausted.len() == self.who.sources.len()
    }

    fn must_stop(&self) -> bool {
        self.stop_requested || self.end_of_input()
    }

    fn trigger_if_due(&mut self, now: Time, decisions: &mut Vec<Decision>) {
        let Phase::Idle { ended } = self.phase else { return };
        if now.monotonic < self.next_trigger(ended) {
            return;
        }
        let kind = if self.must_stop() { BarrierKind::Stop } else { BarrierKind::Checkpoint };
        self.last_epoch = self.last_epoch.next();
        self.last_trigger = now.monotonic;
        decisions.push(Decision::Trigger(Barrier { epoch: self.last_epoch, kind, whole: false }));
        self.phase = Phase::InFlight(InFlight {
            epoch: self.last_epoch,
            kind,
            end_of_input: self.end_of_input(),
            triggered: now,
            missing: self.who.subtasks.clone(),
            operators: BTreeMap::new(),
        });
    }

    fn time_out(&mut self, now: Time, decisions: &mut Vec<Decision>) {
        let Phase::InFlight(flight) = &self.phase else { return };
        if now.monotonic >= flight.triggered.monotonic + self.schedule.timeout {
            let (missing, seconds) = (flight.missing.len(), self.schedule.timeout.as_secs_f64());
            self.abort(format!("timed out after {seconds} s, {missing} subtasks missing"), now, decisions);
        }
    }

    fn acknowledge(
        &mut self,
        epoch: Epoch,
        subtask: Subtask,
        parts: Vec<(OperatorUid, OperatorSnapshot)>,
        now: Time,
        decisions: &mut Vec<Decision>,
    ) {
        let Phase::InFlight(flight) = &mut self.phase else { return };
        if flight.epoch != epoch || !flight.missing.remove(&subtask) {
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
            self.complete(now, decisions);
        }
    }

    fn complete(&mut self, now: Time, decisions: &mut Vec<Decision>) {
        let Phase::InFlight(flight) = std::mem::replace(&mut self.phase, Phase::Over) else { return };
        let after = match (flight.kind, flight.end_of_input) {
            (BarrierKind::Checkpoint, _) => After::GoOn,
            (BarrierKind::Stop | BarrierKind::Drain, true) => After::End(End::Finished),
            (BarrierKind::Stop | BarrierKind::Drain, false) => After::End(End::Stopped),
        };
        let mut operators = flight.operators;
        for operator in operators.values_mut() {
            // Acknowledgements come in any order; a manifest does not.
            operator.splits.sort_by(|a, b| a.split.cmp(&b.split));
            operator.shards.sort_by(|a, b| (a.subtask, &a.path).cmp(&(b.subtask, &b.path)));
        }
        let manifest = Manifest {
            format: MANIFEST_FORMAT,
            job: self.who.job.clone(),
            epoch: flight.epoch,
            generation: self.who.generation,
            attempt: self.who.attempt,
            triggered_at_ms: flight.triggered.wall_ms,
            duration_ms: (now.monotonic - flight.triggered.monotonic).as_millis() as u64,
            max_parallelism: self.who.max_parallelism,
            plan: self.who.plan.clone(),
            end_of_input: flight.end_of_input && flight.kind == BarrierKind::Stop,
            operators,
        };
        self.phase = Phase::Completing { epoch: flight.epoch, after };
        decisions.push(Decision::Append(LogEvent::Completed { manifest: Box::new(manifest) }));
    }

    fn appended(&mut self, now: Time, decisions: &mut Vec<Decision>) {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Completing { epoch, after } => {
                self.failures = 0;
                decisions.push(Decision::Announce(epoch));
                if self.who.committers.is_empty() {
                    self.settle(epoch, after, now, decisions);
                } else {
                    self.phase = Phase::Committing { epoch, waiting: self.who.committers.clone(), after };
                }
            }
            Phase::Confirming { epoch, after } => self.settle(epoch, after, now, decisions),
            Phase::Ending(end) => decisions.push(Decision::Done(end)),
            // An answer to nothing that was asked: the shell's defect, and harmless.
            other @ (Phase::Idle { .. } | Phase::InFlight(_) | Phase::Committing { .. } | Phase::Over) => {
                self.phase = other
            }
        }
    }

    fn committed(&mut self, committer: usize, at: Epoch, decisions: &mut Vec<Decision>) {
        let Phase::Committing { epoch, waiting, after } = &mut self.phase else { return };
        if at < *epoch {
            return;
        }
        waiting.remove(&committer);
        if waiting.is_empty() {
            let (epoch, after) = (*epoch, *after);
            self.phase = Phase::Confirming { epoch, after };
            decisions.push(Decision::Append(LogEvent::Committed { epoch }));
        }
    }

    fn settle(&mut self, epoch: Epoch, after: After, now: Time, decisions: &mut Vec<Decision>) {
        decisions.push(Decision::Settled(epoch));
        match after {
            After::GoOn => self.phase = Phase::Idle { ended: now.monotonic },
            After::End(end) => {
                self.phase = Phase::Ending(end);
                decisions.push(Decision::Append(match end {
                    End::Finished => LogEvent::Finished { epoch },
                    End::Stopped => LogEvent::Stopped { epoch },
                }));
            }
        }
    }

    fn abort(&mut self, reason: String, now: Time, decisions: &mut Vec<Decision>) {
        let Phase::InFlight(flight) = std::mem::replace(&mut self.phase, Phase::Idle { ended: now.monotonic }) else {
            return;
        };
        // What an earlier checkpoint has uploaded is that one's.
        let own = |s: &&Shard| s.status == ShardStatus::Uploaded;
        let orphans =
            flight.operators.values().flat_map(|o| o.shards.iter().filter(own).map(|s| s.path.clone())).collect();
        self.failures += 1;
        let (epoch, failures) = (flight.epoch, self.failures);
        decisions.push(Decision::Abort { epoch, reason: reason.clone(), orphans });
        if flight.kind == BarrierKind::Stop {
            // The sources have ended behind that barrier: there is nobody left to send another.
            self.phase = Phase::Over;
            decisions.push(Decision::Fail(format!("the last checkpoint ({epoch}) failed: {reason}")));
        } else if failures > self.schedule.tolerable_failures {
            self.phase = Phase::Over;
            decisions.push(Decision::Fail(format!(
                "checkpoint {epoch} failed, the {failures}. in a row (tolerable: {}): {reason}",
                self.schedule.tolerable_failures
            )));
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;
    use crate::ShardKind;

    const A: Subtask = Subtask { task: 0, index: 0 };
    const B: Subtask = Subtask { task: 1, index: 0 };

    fn machine(committers: &[usize], start: StartingPoint) -> Coordinator {
        let second = Duration::from_secs(1);
        let schedule =
            Schedule { interval: 10 * second, timeout: 60 * second, min_pause: 2 * second, tolerable_failures: 1 };
        let who = Participants {
            subtasks: [A, B].into(),
            sources: [A].into(),
            committers: committers.iter().copied().collect(),
            job: JobId { namespace: "n".into(), name: "j".into(), uid: "u".into() },
            generation: Generation(1),
            attempt: Attempt(1),
            max_parallelism: 128,
            plan: "p".into(),
        };
        Coordinator::new(schedule, who, start, Time::default())
    }

    fn parts(epoch: u64, subtask: Subtask) -> Vec<(OperatorUid, OperatorSnapshot)> {
        let shard = Shard { subtask: subtask.index, ..Shard::new(format!("{epoch}-{subtask}"), ShardKind::Keyed) };
        vec![("op".into(), OperatorSnapshot { shards: vec![shard], ..OperatorSnapshot::default() })]
    }

    /// Events: `tick`, `ack a 1`, `decline b 1`, `exhausted`, `appended`, `committed <committer> <epoch>`, `stop`; `@12 tick`
    /// sets the clock to 12 s first.
    fn check(mut machine: Coordinator, events: &[&str], expected: Expect) {
        let mut now = Time::default();
        let mut lines = String::new();
        for line in events {
            let mut words: Vec<&str> = line.split(' ').collect();
            if let Some(seconds) = words[0].strip_prefix('@') {
                now.monotonic = Duration::from_secs(seconds.parse().unwrap());
                words.remove(0);
            }
            let subtask = |name: &str| if name == "a" { A } else { B };
            let epoch = |number: &str| Epoch(number.parse().unwrap());
            let event = match words[..] {
                ["tick"] => Event::Tick,
                ["ack", who, n] => Event::Acknowledged {
                    epoch: epoch(n),
                    subtask: subtask(who),
                    parts: parts(epoch(n).0, subtask(who)),
                },
                ["decline", who, n] => {
                    Event::Declined { epoch: epoch(n), subtask: subtask(who), reason: "disk full".into() }
                }
                ["exhausted"] => Event::Exhausted(A),
                ["appended"] => Event::Appended,
                ["committed", who, n] => Event::Committed { committer: who.parse().unwrap(), epoch: epoch(n) },
                ["stop"] => Event::StopRequested,
                _ => panic!("{line}"),
            };
            let decisions: Vec<_> = machine.step(event, now).iter().map(ToString::to_string).collect();
            lines += &format!("{line} -> {}\n", decisions.join("; "));
        }
        expected.assert_eq(&lines);
    }

    #[test]
    fn a_checkpoint_completes_once_all_have_acknowledged_and_is_then_announced() {
        check(
            machine(&[], StartingPoint::default()),
            &["@9 tick", "@10 tick", "ack a 1", "ack a 1", "@11 ack b 1", "appended", "@19 tick", "@20 tick"],
            expect![[r#"
                @9 tick -> 
                @10 tick -> trigger 1
                ack a 1 -> 
                ack a 1 -> 
                @11 ack b 1 -> append completed 1
                appended -> announce 1; settled 1
                @19 tick -> 
                @20 tick -> trigger 2
            "#]],
        );
    }

    #[test]
    fn the_next_epoch_waits_until_every_sink_has_committed() {
        check(
            machine(&[7, 8], StartingPoint::default()),
            &[
                "@10 tick",
                "ack a 1",
                "ack b 1",
                "appended",
                "committed 7 1",
                "@30 tick",
                "committed 8 1",
                "appended",
                "@32 tick",
            ],
            expect![[r#"
                @10 tick -> trigger 1
                ack a 1 -> 
                ack b 1 -> append completed 1
                appended -> announce 1
                committed 7 1 -> 
                @30 tick -> 
                committed 8 1 -> append committed 1
                appended -> settled 1
                @32 tick -> trigger 2
            "#]],
        );
    }

    #[test]
    fn what_a_restored_checkpoint_staged_is_committed_before_anything_is_triggered() {
        let start = StartingPoint { restored: Some(Epoch(5)), last_epoch: Epoch(9) };
        check(
            machine(&[7], start),
            &["@50 tick", "committed 7 4", "committed 7 5", "appended", "@52 tick"],
            expect![[r#"
                @50 tick -> 
                committed 7 4 -> 
                committed 7 5 -> append committed 5
                appended -> settled 5
                @52 tick -> trigger 10
            "#]],
        );
    }

    #[test]
    fn the_end_of_all_input_brings_a_last_checkpoint_and_then_the_end() {
        check(
            machine(&[7], StartingPoint::default()),
            &["@3 exhausted", "ack a 1", "ack b 1", "appended", "committed 7 1", "appended", "appended"],
            expect![[r#"
                @3 exhausted -> trigger 1 and stop
                ack a 1 -> 
                ack b 1 -> append completed 1
                appended -> announce 1
                committed 7 1 -> append committed 1
                appended -> settled 1; append finished 1
                appended -> done: finished
            "#]],
        );
    }

    #[test]
    fn a_stop_waits_for_the_checkpoint_under_way() {
        check(
            machine(&[], StartingPoint::default()),
            &["@10 tick", "stop", "ack a 1", "ack b 1", "appended", "ack a 2", "ack b 2", "appended", "appended"],
            expect![[r#"
                @10 tick -> trigger 1
                stop -> 
                ack a 1 -> 
                ack b 1 -> append completed 1
                appended -> announce 1; settled 1; trigger 2 and stop
                ack a 2 -> 
                ack b 2 -> append completed 2
                appended -> announce 2; settled 2; append stopped 2
                appended -> done: stopped
            "#]],
        );
    }

    #[test]
    fn an_aborted_epoch_is_never_used_again_and_its_late_acknowledgements_are_ignored() {
        check(
            machine(&[], StartingPoint::default()),
            &["@10 tick", "ack a 1", "decline b 1", "decline a 1", "ack b 1", "@20 tick", "ack b 1", "@80 tick"],
            expect![[r#"
                @10 tick -> trigger 1
                ack a 1 -> 
                decline b 1 -> abort 1 (declined by 1.0: disk full), delete ["1-0.0"]
                decline a 1 -> 
                ack b 1 -> 
                @20 tick -> trigger 2
                ack b 1 -> 
                @80 tick -> abort 2 (timed out after 60 s, 2 subtasks missing), delete []; fail: checkpoint 2 failed, the 2. in a row (tolerable: 1): timed out after 60 s, 2 subtasks missing
            "#]],
        );
    }

    #[test]
    fn a_failed_last_checkpoint_fails_the_job() {
        check(
            machine(&[], StartingPoint::default()),
            &["stop", "decline a 1"],
            expect![[r#"
            stop -> trigger 1 and stop
            decline a 1 -> abort 1 (declined by 0.0: disk full), delete []; fail: the last checkpoint (1) failed: declined by 0.0: disk full
        "#]],
        );
    }
}
