//! Who may lead a job, by what its Lease says. Pure: the Lease, the time, and who asks come in, a verdict goes out.
//!
//! Invariants: nobody leads a run that may not lead, or that has come to its end; who leads goes on until another has led.

use std::time::Duration;

use floodmark_crds::{REPORT_ANNOTATION, RUN_ANNOTATION, Report, ReportPhase};
use k8s_openapi::api::coordination::v1::Lease;

/// How long a Lease is in force that does not say it.
const DURATION: Duration = Duration::from_secs(30);
/// Clocks of the nodes of a cluster are not further apart than this. If they are, somebody leads who should not yet: the log tells him
/// from the one before, who ends, and whose clock never lets him take it back.
const CLOCKS_APART_MAX: Duration = Duration::from_secs(10);

/// What a Lease says, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Seen {
    /// The run that may lead; 0 if none may.
    pub(super) run: u64,
    /// Who leads; empty if nobody does.
    pub(super) holder: String,
    /// Without a renewal for so long, the holder has lost it.
    pub(super) duration: Duration,
    /// How often it has changed hands.
    pub(super) transitions: i32,
    /// When the holder has renewed it, by the holder's wall clock, milliseconds.
    pub(super) renewed_ms: Option<i64>,
    /// What the last leader has told.
    pub(super) report: Option<Report>,
}

impl Seen {
    /// What can't be read counts as not there.
    pub(super) fn of(lease: &Lease) -> Self {
        let annotation = |name| lease.metadata.annotations.as_ref().and_then(|all| all.get(name));
        let spec = lease.spec.clone().unwrap_or_default();
        let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).filter(|s| *s > 0);
        Self {
            run: annotation(RUN_ANNOTATION).and_then(|run| run.trim().parse().ok()).unwrap_or(0),
            holder: spec.holder_identity.unwrap_or_default(),
            duration: seconds.map_or(DURATION, Duration::from_secs),
            transitions: spec.lease_transitions.unwrap_or(0),
            renewed_ms: spec.renew_time.map(|t| t.0.as_millisecond()),
            report: annotation(REPORT_ANNOTATION).and_then(|text| serde_json::from_str(text).ok()),
        }
    }

    /// What the last leader has told of this run.
    pub(super) fn report_of(&self, run: u64) -> Option<&Report> {
        self.report.as_ref().filter(|r| r.run == run)
    }

    /// In how long the holder has lost the lease if it does not renew it.
    fn expires_in(&self, time: At) -> Duration {
        let watched = self.duration.saturating_sub(time.unchanged_for);
        // Who comes long after the last renewal need not watch for as long again.
        let told = self.renewed_ms.map(|renewed| {
            let age = Duration::from_millis(time.wall_ms.saturating_sub(renewed).max(0).cast_unsigned());
            (self.duration + CLOCKS_APART_MAX).saturating_sub(age)
        });
        told.map_or(watched, |told| watched.min(told))
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker<'a> {
    /// The name by which it holds the Lease.
    pub(super) identity: &'a str,
    /// The run that it would lead.
    pub(super) run: u64,
    /// If it leads: how often the Lease had changed hands when it took it.
    pub(super) leads: Option<i32>,
}

/// When it asks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct At {
    /// For how long it has seen no renewal.
    pub(super) unchanged_for: Duration,
    /// The wall clock, milliseconds.
    pub(super) wall_ms: i64,
}

/// What follows.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// It is another's turn.
    Wait {
        /// Whose.
        why: String,
        /// It may be this one's turn after so long, although the Lease does not change.
        at_most: Option<Duration>,
    },
    /// The run has ended: there is nothing to lead any more.
    Ended(ReportPhase),
    /// It may lead now.
    Take {
        /// Whether the run has been led before, and has begun an attempt then.
        led_before: bool,
    },
    /// It still leads.
    Hold {
        /// Whether it may go on to do so when another wants to.
        renew: bool,
    },
    /// It does not lead any more.
    Lost(String),
}

/// See the header of this file.
pub(super) fn decide(seen: &Seen, asker: Asker<'_>, time: At) -> Verdict {
    match asker.leads {
        Some(transitions) => still(seen, asker, transitions),
        None => turn(seen, asker, time),
    }
}

/// For who leads.
fn still(seen: &Seen, asker: Asker<'_>, transitions: i32) -> Verdict {
    if seen.holder != asker.identity && !seen.holder.is_empty() {
        return Verdict::Lost(format!("{} holds the Lease", seen.holder));
    }
    if seen.transitions > transitions {
        return Verdict::Lost("another process has led meanwhile".to_owned());
    }
    // A run that may not lead any more is not deposed, but it does not keep off the one that may.
    Verdict::Hold { renew: seen.run == asker.run }
}

/// For who would like to lead.
fn turn(seen: &Seen, asker: Asker<'_>, time: At) -> Verdict {
    let Asker { identity, run, .. } = asker;
    if seen.run != run {
        let allowed = if seen.run == 0 { "no run".to_owned() } else { format!("run {}", seen.run) };
        return Verdict::Wait { why: format!("{allowed} may lead, and this process is of run {run}"), at_most: None };
    }
    let told = seen.report_of(run);
    if let Some(told) = told.filter(|r| r.ended()) {
        return Verdict::Ended(told.phase);
    }
    let free = seen.holder.is_empty() || seen.holder == identity;
    let expires_in = seen.expires_in(time);
    if !free && !expires_in.is_zero() {
        return Verdict::Wait { why: format!("{} leads", seen.holder), at_most: Some(expires_in) };
    }
    Verdict::Take { led_before: told.is_some_and(|r| r.attempt.is_some()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: u64 = 4;

    fn lease(run: u64, holder: &str) -> Seen {
        let duration = Duration::from_secs(3);
        Seen { run, holder: holder.to_owned(), duration, transitions: 7, renewed_ms: Some(1_000_000), report: None }
    }

    fn told(seen: Seen, run: u64, phase: ReportPhase, attempt: Option<u64>) -> Seen {
        Seen { report: Some(Report { run, phase, attempt, ..Report::default() }), ..seen }
    }

    /// What process `me` of run 4 is told that has seen no renewal for so many seconds; `leads` since 7 changes of hands.
    fn ask(seen: &Seen, leads: bool, unchanged_s: u64, wall_ms: i64) -> Verdict {
        let asker = Asker { identity: "me", run: RUN, leads: leads.then_some(7) };
        decide(seen, asker, At { unchanged_for: Duration::from_secs(unchanged_s), wall_ms })
    }

    fn wait(why: &str, at_most_s: Option<u64>) -> Verdict {
        Verdict::Wait { why: why.to_owned(), at_most: at_most_s.map(Duration::from_secs) }
    }

    #[test]
    fn whose_turn_it_is() {
        let anew = Verdict::Take { led_before: false };
        let again = Verdict::Take { led_before: true };
        let now = 1_001_000;
        for (what, seen, unchanged_s, wall_ms, expected) in [
            ("nobody may", lease(0, ""), 99, now, wait("no run may lead, and this process is of run 4", None)),
            ("another may", lease(5, ""), 99, now, wait("run 5 may lead, and this process is of run 4", None)),
            ("not mine any more", lease(5, "me"), 99, now, wait("run 5 may lead, and this process is of run 4", None)),
            ("free", lease(RUN, ""), 0, now, anew),
            ("my own", lease(RUN, "me"), 0, now, Verdict::Take { led_before: false }),
            ("another's", lease(RUN, "you"), 0, now, wait("you leads", Some(3))),
            ("another's for a while", lease(RUN, "you"), 2, now, wait("you leads", Some(1))),
            ("expired", lease(RUN, "you"), 3, now, Verdict::Take { led_before: false }),
            ("a clock that is ahead", lease(RUN, "you"), 0, 1_010_000, wait("you leads", Some(3))),
            ("renewed a while ago", lease(RUN, "you"), 0, 1_012_000, wait("you leads", Some(1))),
            ("expired long ago", lease(RUN, "you"), 0, 1_013_000, Verdict::Take { led_before: false }),
            ("a clock that is behind", lease(RUN, "you"), 0, 0, wait("you leads", Some(3))),
            (
                "the run before has ended",
                told(lease(RUN, ""), 3, ReportPhase::Stopped, Some(9)),
                0,
                now,
                Verdict::Take { led_before: false },
            ),
            ("led before", told(lease(RUN, "me"), RUN, ReportPhase::Running, Some(9)), 0, now, again),
            (
                "taken before, and nothing begun",
                told(lease(RUN, "me"), RUN, ReportPhase::Waiting, None),
                0,
                now,
                Verdict::Take { led_before: false },
            ),
            (
                "ended",
                told(lease(RUN, ""), RUN, ReportPhase::Stopped, Some(9)),
                99,
                now,
                Verdict::Ended(ReportPhase::Stopped),
            ),
            (
                "failed before anything had begun",
                told(lease(RUN, "me"), RUN, ReportPhase::Failed, None),
                99,
                now,
                Verdict::Ended(ReportPhase::Failed),
            ),
        ] {
            assert_eq!(ask(&seen, false, unchanged_s, wall_ms), expected, "{what}");
        }
    }

    #[test]
    fn who_leads_goes_on_until_another_has_led() {
        let hold = |renew| Verdict::Hold { renew };
        let lost = |why: &str| Verdict::Lost(why.to_owned());
        let transitions = |seen: Seen, transitions| Seen { transitions, ..seen };
        for (what, seen, expected) in [
            ("mine", lease(RUN, "me"), hold(true)),
            ("withdrawn", lease(0, "me"), hold(false)),
            ("another run may", lease(5, "me"), hold(false)),
            ("another leads", lease(RUN, "you"), lost("you holds the Lease")),
            ("another run leads", lease(5, "you"), lost("you holds the Lease")),
            ("another has led, and let go", transitions(lease(RUN, ""), 8), lost("another process has led meanwhile")),
            ("somebody has cleared it", lease(RUN, ""), hold(true)),
            ("it was deleted and is there anew", transitions(lease(RUN, ""), 0), hold(true)),
        ] {
            // However long ago the last renewal was: nobody wants it.
            assert_eq!(ask(&seen, true, 99, i64::MAX), expected, "{what}");
        }
    }

    #[test]
    fn a_lease_is_read_whatever_is_in_it() {
        assert_eq!(Seen::of(&Lease::default()), Seen { duration: DURATION, ..Seen::default() });
        let text = r#"{"metadata": {"annotations": {"floodmark.io/run": " 12 ", "floodmark.io/report": "{\"run\": 11}"}},
            "spec": {"holderIdentity": "a", "leaseDurationSeconds": 3, "leaseTransitions": 2, "renewTime": "2026-11-21T10:00:00.123456Z"}}"#;
        let seen = Seen::of(&serde_json::from_str(text).unwrap());
        let expected = Seen {
            run: 12,
            holder: "a".to_owned(),
            duration: Duration::from_secs(3),
            transitions: 2,
            renewed_ms: Some(1_795_255_200_123),
            report: Some(Report { run: 11, ..Report::default() }),
        };
        assert_eq!(seen, expected);
        for damaged in [
            r#"{"metadata": {"annotations": {"floodmark.io/run": "-1", "floodmark.io/report": "{"}}, "spec": {"leaseDurationSeconds": -3}}"#,
            r#"{"metadata": {"annotations": {"floodmark.io/run": "x"}}}"#,
        ] {
            let seen = Seen::of(&serde_json::from_str(damaged).unwrap());
            assert_eq!(seen, Seen { duration: DURATION, ..Seen::default() });
        }
    }
}
