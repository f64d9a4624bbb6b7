//! Candidates before an API server in memory, by the real clock.

use std::time::Duration;

use floodmark_snapshot::{Attempt, Epoch};
use serde_json::json;

use super::{
    server::{ApiServer, Fault, Line, NAME, NAMESPACE},
    *,
};
use crate::{CheckpointStatus, JobPhase, leadership::tests::one_leads_at_a_time};

/// As short as it can be: seconds are what a Lease counts in.
const SHORT: Rhythm = Rhythm { renew_every: Duration::from_millis(100), duration: Duration::from_secs(1) };
/// Longer than any of it takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for something to happen that must not.
const A_WHILE: Duration = Duration::from_millis(400);

/// A process that would lead.
struct Process {
    lease: KubernetesLease,
    line: Line,
    progress: Arc<Progress>,
}

fn process(server: &ApiServer, identity: &str, run: u64) -> Process {
    let (line, progress) = (Line::default(), Arc::<Progress>::default());
    let http = format!("{identity}:8080");
    let candidate = Candidate { identity: identity.to_owned(), run, http, parallelism: 2 };
    let surroundings = (progress.clone(), Env::system());
    let lease = KubernetesLease::new(server.client(&line), NAMESPACE, NAME.to_owned(), candidate, SHORT, surroundings);
    Process { lease, line, progress }
}

impl Process {
    async fn leads(&self) -> Box<dyn Lease> {
        tokio::time::timeout(PATIENCE, self.lease.acquire()).await.expect("it does not lead").unwrap()
    }

    async fn waits(&self) {
        tokio::time::timeout(A_WHILE, self.lease.acquire()).await.err().expect("it leads");
    }
}

/// Holds the lease for a while.
async fn holds(lease: &mut Box<dyn Lease>, time: Duration) {
    if let Ok(lost) = tokio::time::timeout(time, lease.lost()).await {
        panic!("it is lost: {lost}");
    }
}

async fn loses(lease: &mut Box<dyn Lease>) -> String {
    tokio::time::timeout(PATIENCE, lease.lost()).await.expect("it is not lost")
}

/// Holds the lease until this is so.
async fn until(lease: &mut Box<dyn Lease>, what: &str, so: impl Fn() -> bool) {
    let soon = async {
        while !so() {
            Env::system().runtime.sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        lost = lease.lost() => panic!("it is lost: {lost}"),
        waited = tokio::time::timeout(PATIENCE, soon) => waited.unwrap_or_else(|_| panic!("not {what}")),
    }
}

#[tokio::test]
async fn one_leads_at_a_time_by_a_kubernetes_lease() {
    let server = ApiServer::with_run(4);
    let [one, other] = ["one", "other"].map(|identity| {
        let process = process(&server, identity, 4);
        // It knows of an attempt: so what it takes over later has been led before.
        process.progress.begins(Some(Attempt(1)), 2, 0);
        Arc::new(process.lease) as Arc<dyn Leadership>
    });
    // Somebody takes it who does not renew it.
    let depose = async || {
        let stolen = json!({ "holderIdentity": "thief", "leaseTransitions": server.transitions() + 1 });
        server.change(json!({ "spec": stolen }));
    };
    one_leads_at_a_time([one, other], depose).await;
}

#[tokio::test]
async fn a_disturbed_line_delays_and_changes_nothing() {
    let server = ApiServer::with_run(4);
    let process = process(&server, "one", 4);
    let faults = [
        // Reading.
        Fault::Status(500),
        Fault::Hang,
        Fault::LoseReply,
        Fault::Status(403),
    ];
    process.line.disturb(faults);
    let mut lease = process.leads().await;
    assert!(process.line.undisturbed());
    let mut faults = vec![Fault::Status(409), Fault::Status(503), Fault::Hang, Fault::LoseReply, Fault::Status(404)];
    faults.extend([Fault::Status(409); 2 * CONFLICTS_MAX]);
    process.line.disturb(faults);
    until(&mut lease, "through", || process.line.undisturbed()).await;
    let version = server.version();
    until(&mut lease, "renewed", || server.version() > version).await;
    assert_eq!((server.holder().as_str(), server.transitions()), ("one", 1));
}

#[tokio::test]
async fn a_lease_that_was_taken_without_an_answer_is_taken_once() {
    let server = ApiServer::with_run(4);
    let process = process(&server, "one", 4);
    let object = process.lease.read().await.unwrap();
    process.line.disturb([Fault::LoseReply]);
    let taken = process.lease.take(&object, &Seen::of(&object), false).await;
    assert!(matches!(taken, Err(Trouble::Unreachable(_))));
    assert_eq!(server.holder(), "one");
    let mut lease = process.leads().await;
    holds(&mut lease, A_WHILE).await;
    assert_eq!((server.holder().as_str(), server.transitions()), ("one", 1));
}

#[tokio::test]
async fn a_leader_goes_on_without_an_api_server() {
    let server = ApiServer::with_run(4);
    let process = process(&server, "one", 4);
    let mut lease = process.leads().await;
    process.line.down(true);
    holds(&mut lease, SHORT.duration * 2).await;
    let version = server.version();
    process.line.down(false);
    until(&mut lease, "renewed", || server.version() > version).await;
    // Nor does it mind that the Lease is gone for a while, or that somebody clears it.
    server.delete();
    holds(&mut lease, A_WHILE).await;
    server.create(4);
    until(&mut lease, "claimed", || server.holder() == "one").await;
    assert_eq!(server.transitions(), 1);
    server.change(json!({ "spec": null }));
    until(&mut lease, "claimed", || server.holder() == "one").await;
}

#[tokio::test]
async fn who_was_away_for_too_long_learns_that_another_has_led() {
    for lets_go in [false, true] {
        let server = ApiServer::with_run(4);
        let [one, other] = ["one", "other"].map(|identity| process(&server, identity, 4));
        let mut first = one.leads().await;
        one.line.down(true);
        let mut second = tokio::select! {
            lost = first.lost() => panic!("it is lost: {lost}"),
            second = other.leads() => second,
        };
        assert_eq!((server.holder().as_str(), server.transitions()), ("other", 2));
        if lets_go {
            assert!(!second.end(&Ending::HandedOver).await);
            assert_eq!(server.holder(), "");
        }
        one.line.down(false);
        let reason = loses(&mut first).await;
        let expected = if lets_go { "another process has led meanwhile" } else { "other holds the Lease" };
        assert_eq!(reason, expected);
        // What it says of its end is of no interest any more.
        let version = server.version();
        assert!(first.end(&Ending::Stopped).await);
        assert_eq!(server.version(), version);
    }
}

#[tokio::test]
async fn a_run_that_may_not_lead_any_more_goes_on_until_another_leads() {
    let server = ApiServer::with_run(4);
    let (old, new) = (process(&server, "old", 4), process(&server, "new", 5));
    let mut lease = old.leads().await;
    server.allow(0);
    holds(&mut lease, A_WHILE).await;
    old.progress.phase(JobPhase::Running);
    until(&mut lease, "told", || server.report().phase == ReportPhase::Running).await;
    let renewed = server.lease().spec.unwrap().renew_time;
    holds(&mut lease, A_WHILE).await;
    assert_eq!(server.lease().spec.unwrap().renew_time, renewed, "it keeps others off");
    old.waits().await;
    server.allow(5);
    let next = tokio::select! {
        lost = lease.lost() => panic!("it is lost: {lost}"),
        next = new.leads() => next,
    };
    assert!(!next.waited());
    assert_eq!(loses(&mut lease).await, "new holds the Lease");
}

#[tokio::test]
async fn a_run_that_has_ended_is_not_led_again() {
    for (ending, phase) in [
        (Ending::Stopped, ReportPhase::Stopped),
        (Ending::Finished, ReportPhase::Finished),
        (Ending::Failed("no such topic".into()), ReportPhase::Failed),
    ] {
        let server = ApiServer::with_run(4);
        let [one, other] = ["one", "other"].map(|identity| process(&server, identity, 4));
        let mut lease = one.leads().await;
        // It takes as long as it takes.
        one.line.disturb([Fault::Hang, Fault::Status(500), Fault::Status(409)]);
        assert!(lease.end(&ending).await);
        assert_eq!((server.holder().as_str(), server.report().phase), ("", phase));
        tokio::join!(one.waits(), other.waits());
        // The next run begins at once, whatever the one before has come to.
        server.allow(5);
        let next = process(&server, "one", 5).leads().await;
        assert!(!next.waited());
        assert_eq!(server.report().run, 5);
    }
}

#[tokio::test]
async fn who_is_started_again_leads_again_at_once() {
    let server = ApiServer::with_run(4);
    let first = process(&server, "one", 4);
    let mut lease = first.leads().await;
    first.progress.begins(Some(Attempt(6)), 3, 0);
    first.progress.phase(JobPhase::Running);
    until(&mut lease, "told", || server.report().attempt == Some(6)).await;
    drop(lease);
    let again = process(&server, "one", 4);
    let lease = tokio::time::timeout(SHORT.duration / 2, again.leads()).await.expect("it waits for itself");
    assert!(lease.waited(), "the run has been led before");
    assert_eq!((server.transitions(), server.report().attempt), (1, Some(6)));
    drop(lease);
    // Nor does anybody wait for one that has handed over.
    let mut lease = process(&server, "one", 4).leads().await;
    let broken = lease.end(&Ending::Broken("no broker".into())).await;
    assert!(!broken);
    let report = server.report();
    assert_eq!((report.phase, report.failure.unwrap().cause), (ReportPhase::Waiting, "no broker".to_owned()));
    let other = process(&server, "other", 4);
    tokio::time::timeout(SHORT.duration / 2, other.leads()).await.expect("it waits for nobody");
}

#[tokio::test]
async fn who_waits_learns_at_once_that_it_may_lead() {
    let server = ApiServer::with_run(0);
    let process = process(&server, "one", 4);
    let mut leads = process.lease.acquire();
    tokio::time::timeout(A_WHILE, &mut leads).await.err().expect("it leads");
    let version = server.version();
    server.allow(4);
    tokio::time::timeout(A_WHILE / 2, leads).await.expect("it looks too seldom").unwrap();
    assert_eq!(server.version(), version + 2);
}

#[tokio::test]
async fn what_somebody_may_wait_for_is_told_at_once_and_the_rest_now_and_then() {
    let server = ApiServer::with_run(4);
    let process = process(&server, "one", 4);
    let mut lease = process.leads().await;
    let told = server.report();
    assert_eq!((told.run, told.http.as_str(), told.phase), (4, "one:8080", ReportPhase::Waiting));
    let completed = |epoch| {
        let epoch = Epoch(epoch);
        process.progress.completed(CheckpointStatus { epoch, triggered_at_ms: 1, duration_ms: 2, size: 3 });
    };
    process.progress.begins(Some(Attempt(6)), 3, 1);
    process.progress.restored_from(Epoch(8), Some("checkpoint 9 is damaged: no".into()));
    process.progress.phase(JobPhase::Running);
    until(&mut lease, "told", || server.report().phase == ReportPhase::Restoring).await;
    process.progress.restoring(0);
    until(&mut lease, "told", || server.report().phase == ReportPhase::Running).await;
    completed(10);
    until(&mut lease, "told", || server.report().completed == 1).await;
    let reports = server.reports().len();
    (11..20).for_each(completed);
    holds(&mut lease, A_WHILE * 2).await;
    assert_eq!(server.reports().len(), reports);
    process.progress.attempt_failed("worker 1 is lost".into(), 5, true);
    until(&mut lease, "told", || server.report().failure.is_some()).await;
    let report = server.report();
    assert_eq!((report.phase, report.completed, report.restarts), (ReportPhase::Waiting, 10, 1));
    assert_eq!((report.attempt, report.parallelism, report.restored_from), (Some(6), 3, Some(8)));
    assert_eq!(report.fallback.as_deref(), Some("checkpoint 9 is damaged: no"));
    assert_eq!(report.last_checkpoint.map(|c| c.epoch), Some(19));
}
