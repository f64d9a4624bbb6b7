//! The controller against an API server in memory, with the lifecycle's own decisions: what is wanted comes about, nothing is written at
//! rest, and a process that dies between any two requests leaves nothing that the next can't go on with.

mod server;
mod time;
mod world;

use std::{collections::BTreeSet, time::Duration};

use floodmark_crds::{ConditionStatus, JobState, SavepointState};
use serde_json::json;

use self::{
    server::Crash,
    world::{JOB, World},
};

/// How long anything may take, in virtual time.
const PATIENCE: Duration = Duration::from_secs(120);
/// At rest for so long.
const REST: Duration = Duration::from_secs(90);

/// Runs a controller, and others after it if it dies, until this holds.
async fn until(world: &World, what: &str, holds: impl Fn(&World) -> bool) {
    let life = async {
        loop {
            let operator = world.operator();
            tokio::select! {
                () = operator.run() => {}
                () = world.server.crashed.notified() => world.server.crash_at(None),
            }
        }
    };
    let seen = async {
        while !holds(world) {
            world.sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        () = seen => {}
        () = life => {}
        () = world.live() => {}
        () = world.time.pass() => {}
        () = world.sleep(PATIENCE) => {
            let status = serde_yaml::to_string(&world.job()).unwrap();
            panic!("never {what}; the last writes: {:#?}\n{status}", world.server.state().writes.iter().rev().take(20).collect::<Vec<_>>());
        }
    }
}

/// Ready, at this generation of the spec.
fn ready(world: &World) -> bool {
    let Some(job) = world.job() else { return false };
    let status = job.status.unwrap_or_default();
    let ready = status.condition("Ready").is_some_and(|c| c.status == ConditionStatus::True);
    ready && Some(status.observed_generation) == job.metadata.generation
}

fn running(world: &World) -> bool {
    ready(world) && world.status().state == JobState::Running
}

fn suspended(world: &World) -> bool {
    ready(world) && world.status().state == JobState::Suspended
}

/// Lets the controller rest; answers with what it has written meanwhile.
async fn at_rest(world: &World) -> Vec<String> {
    at_rest_for(world, REST).await
}

async fn at_rest_for(world: &World, rest: Duration) -> Vec<String> {
    // What it is still at.
    let operator = world.operator();
    tokio::select! {
        () = operator.run() => {}
        () = world.live() => {}
        () = world.time.pass() => {}
        () = async {
            world.sleep(Duration::from_secs(5)).await;
            world.server.state().writes.clear();
            world.sleep(rest).await;
        } => {}
    }
    world.server.state().writes.clone()
}

fn objects(world: &World) -> Vec<String> {
    let state = world.server.state();
    let kept = state.objects.keys().filter(|(resource, _, _)| resource != "events");
    kept.map(|(resource, _, name)| format!("{resource} {name}")).collect()
}

#[tokio::test]
async fn a_job_comes_to_run_and_then_nothing_is_written() {
    let world = World::default();
    world.apply(json!({"sql": "a", "parallelism": 2}));
    until(&world, "running", running).await;
    let mut writes: Vec<String> = world.server.state().writes.clone();
    writes.retain(|w| !w.starts_with("post events"));
    writes.sort();
    // Each step of the status once, the Lease for nobody and for the run, the Service for none and for the run, all else once.
    expect_test::expect![[r#"
        patch leases sums
        patch leases sums
        patch networkpolicies sums
        patch poddisruptionbudgets sums
        patch rolebindings sums
        patch roles sums
        patch serviceaccounts sums
        patch services sums
        patch services sums
        patch streamjobs sums
        post controllerrevisions sums-b406877cd2
        post deployments sums-1-coordinator
        post deployments sums-1-worker
        post secrets sums-1-uid-1
        post services sums-1-coordinator
        put streamjobs/status sums
        put streamjobs/status sums
        put streamjobs/status sums
        put streamjobs/status sums
        put streamjobs/status sums"#]]
    .assert_eq(&writes.join("\n"));
    assert_eq!(at_rest(&world).await, [""; 0]);
    expect_test::expect![[r#"
        controllerrevisions sums-b406877cd2
        deployments sums-1-coordinator
        deployments sums-1-worker
        leases sums
        networkpolicies sums
        poddisruptionbudgets sums
        pods sums-1-coordinator-0
        pods sums-1-worker-0
        pods sums-1-worker-1
        rolebindings sums
        roles sums
        secrets sums-1-uid-1
        serviceaccounts sums
        services sums
        services sums-1-coordinator
        streamjobs sums"#]]
    .assert_eq(&objects(&world).join("\n"));
}

#[tokio::test]
async fn a_job_whose_pods_would_not_share_what_they_keep_is_not_started() {
    let world = World::default();
    world.apply(json!({"sql": "a", "checkpoints": {"storage": "file:///var/lib/floodmark"}}));
    let stalled = |w: &World| w.status().condition("Stalled").cloned().filter(|c| c.status == ConditionStatus::True);
    until(&world, "stalled", |w| stalled(w).is_some()).await;
    let message = stalled(&world).unwrap().message;
    assert!(message.starts_with("spec.checkpoints.storage: 'file:///var/lib/floodmark': "), "{message}");
    assert!(world.server.state().names("deployments").is_empty());
    world.apply(json!({"sql": "a"}));
    until(&world, "running", running).await;
}

#[tokio::test]
async fn certificates_are_renewed_in_place() {
    let world = World { certificate_lifetime: Some(Duration::from_secs(60)), ..World::default() };
    world.apply(json!({"sql": "a", "parallelism": 2}));
    until(&world, "running", running).await;
    let secret = || world.server.state().objects[&server::place("secrets", "sums-1-uid-1")].clone();
    let first = secret();
    let mut writes = at_rest_for(&world, Duration::from_secs(100)).await;
    writes.retain(|w| !w.contains(" events "));
    assert_eq!(writes, ["patch secrets sums-1-uid-1"; 2]);
    let second = secret();
    assert_ne!(first["data"]["worker.crt"], second["data"]["worker.crt"]);
    assert_eq!(first["data"]["job.yaml"], second["data"]["job.yaml"]);
    assert_eq!(first["metadata"]["uid"], second["metadata"]["uid"]);
    // One from before that was possible is left alone.
    let (present, mut older) = (secret(), secret());
    older["data"].as_object_mut().unwrap().remove("next-worker.key");
    world.server.state().put(&server::place("secrets", "sums-1-uid-1"), Some(present), older);
    assert_eq!(at_rest_for(&world, Duration::from_secs(100)).await, [""; 0]);
}

#[tokio::test]
async fn what_somebody_takes_away_comes_back() {
    let world = World::default();
    world.apply(json!({"sql": "a"}));
    until(&world, "running", running).await;
    let all = objects(&world);
    for (resource, name) in [
        ("services", "sums"),
        ("roles", "sums"),
        ("leases", "sums"),
        ("deployments", "sums-1-worker"),
        ("services", "sums-1-coordinator"),
        ("controllerrevisions", "sums-b406877cd2"),
    ] {
        world.server.state().delete(&server::place(resource, name));
        until(&world, "complete again", |world| running(world) && objects(world) == all).await;
    }
    assert_eq!(world.status().last_run, 1, "it is the same run all along");
}

#[tokio::test]
async fn a_status_that_is_lost_is_found_again_by_the_objects() {
    let world = World::default();
    world.apply(json!({"sql": "a"}));
    until(&world, "running", running).await;
    {
        let mut state = world.server.state();
        let at = server::place("streamjobs", JOB);
        let before = state.objects[&at].clone();
        let mut next = before.clone();
        next.as_object_mut().unwrap().remove("status");
        state.put(&at, Some(before), next);
    }
    until(&world, "running", running).await;
    assert_eq!(world.status().run.map(|r| r.number), Some(1));
    assert_eq!(at_rest(&world).await, [""; 0]);
}

#[tokio::test]
async fn an_answer_that_is_lost_is_found_in_storage() {
    let world = World::default();
    world.apply(json!({"sql": "a"}));
    until(&world, "running", running).await;
    world.outer.lock().unwrap().answers_lost = 1;
    world.apply(json!({"sql": "b"}));
    until(&world, "running", |w| running(w) && w.status().last_run == 2).await;
    let outer = world.outer.lock().unwrap();
    assert_eq!((outer.orders.len(), outer.savepoints.len()), (1, 1), "{outer:?}");
}

#[tokio::test]
async fn a_rescale_keeps_the_pods() {
    let world = World::default();
    world.apply(json!({"sql": "a", "parallelism": 2}));
    until(&world, "running", running).await;
    let uid = |name: &str| world.server.state().get("pods", name).map(|pod| pod["metadata"]["uid"].clone());
    let before = uid("sums-1-worker-0");
    world.apply(json!({"sql": "a", "parallelism": 4}));
    until(&world, "at 4", |w| running(w) && w.status().parallelism == 4).await;
    world.apply(json!({"sql": "a", "parallelism": 1}));
    until(&world, "at 1", |w| running(w) && w.status().parallelism == 1).await;
    assert_eq!(at_rest(&world).await, [""; 0]);
    assert_eq!((uid("sums-1-worker-0"), uid("sums-1-worker-1")), (before, None));
}

/// Runs that anything is left of.
fn runs(world: &World) -> BTreeSet<u64> {
    let state = world.server.state();
    let of_runs = state.objects.iter().filter(|((resource, _, _), _)| resource != "events");
    let run = |name: &str| name.strip_prefix("sums-")?.split('-').next()?.parse().ok();
    of_runs.filter(|((r, _, _), _)| r != "controllerrevisions").filter_map(|((_, _, name), _)| run(name)).collect()
}

/// Nothing is left but what is in force.
async fn tidy(world: &World) {
    until(world, "tidy", |w| runs(w) == w.status().run.map(|r| r.number).into_iter().collect()).await;
}

/// The whole life of a job.
async fn life(world: &World) {
    world.apply(json!({"sql": "a", "parallelism": 2}));
    until(world, "running", running).await;
    tidy(world).await;
    world.apply(json!({"sql": "b", "parallelism": 2}));
    until(world, "upgraded", |w| running(w) && w.status().run.is_some_and(|r| r.revision != "b406877cd2")).await;
    tidy(world).await;
    world.apply(json!({"sql": "b", "parallelism": 3}));
    until(world, "rescaled", |w| running(w) && w.status().parallelism == 3).await;
    tidy(world).await;
    world.apply(json!({"sql": "b", "parallelism": 3, "desiredState": "Suspended"}));
    until(world, "suspended", suspended).await;
    tidy(world).await;
    world.apply(json!({"sql": "b", "parallelism": 3, "checkpoints": {"onDelete": "Delete"}}));
    until(world, "running again", running).await;
    tidy(world).await;
    world.server.state().delete(&server::place("streamjobs", JOB));
    until(world, "gone", |w| w.job().is_none()).await;
}

#[tokio::test]
async fn a_controller_that_dies_between_any_two_requests_leaves_nothing_that_the_next_can_not_go_on_with() {
    let world = World::default();
    life(&world).await;
    let writes = world.server.state().writes.clone();
    assert!(writes.len() > 40, "{writes:#?}");
    for (n, write) in writes.iter().enumerate() {
        for crash in [Crash::Before(n), Crash::After(n)] {
            let world = World::default();
            world.server.crash_at(Some(crash));
            life(&world).await;
            assert_eq!(objects(&world), [""; 0], "{crash:?}: {write}");
            assert!(world.outer.lock().unwrap().state_removed, "{crash:?}");
        }
    }
}

#[tokio::test]
async fn a_run_that_fails_is_taken_back() {
    let world = World::default();
    world.apply(json!({"sql": "a"}));
    until(&world, "running", running).await;
    world.outer.lock().unwrap().fails = Some(2);
    world.apply(json!({"sql": "b"}));
    until(&world, "back", |w| w.status().last_run == 3 && w.status().operation.is_none()).await;
    let status = world.status();
    assert_eq!(status.run.map(|r| (r.number, r.revision)), Some((3, "b406877cd2".to_owned())));
    assert_eq!(at_rest(&world).await, [""; 0]);
}

fn state_of(world: &World, savepoint: &str) -> Option<SavepointState> {
    world.savepoint(savepoint).map(|s| s.status.map_or(SavepointState::Pending, |status| status.state))
}

#[tokio::test]
async fn a_savepoint_is_taken_once_and_disposed_of_without_the_job() {
    let world = World::default();
    world.ask_for_savepoint("before-that", json!({"onDelete": "Delete"}));
    world.apply(json!({"sql": "a"}));
    world.outer.lock().unwrap().answers_lost = 1;
    until(&world, "complete", |w| state_of(w, "before-that") == Some(SavepointState::Completed)).await;
    let status = world.savepoint("before-that").unwrap().status.unwrap();
    let name = status.name.unwrap();
    assert!(name.starts_with("before-that-uid-"), "{name}");
    assert_eq!(status.location.unwrap(), format!("s3://b/c/shop/sums/savepoints/{name}"));
    assert_eq!(world.outer.lock().unwrap().orders.len(), 1, "what the lost answer was about is found in storage");
    assert_eq!(at_rest(&world).await, [""; 0]);
    world.server.state().delete(&server::place("streamjobs", JOB));
    until(&world, "without a job", |w| w.job().is_none()).await;
    world.server.state().delete(&server::place("savepoints", "before-that"));
    until(&world, "gone", |w| state_of(w, "before-that").is_none()).await;
    assert_eq!(world.outer.lock().unwrap().savepoints.len(), 0);
}

#[tokio::test]
async fn a_schedule_takes_savepoints_and_keeps_the_newest_and_what_is_needed() {
    let world = World::default();
    world.apply(json!({"sql": "a"}));
    world.ask_for_savepoint("often", json!({"schedule": "* * * * *", "retain": 2, "onDelete": "Delete"}));
    until(&world, "first", |w| w.outer.lock().unwrap().savepoints.len() == 1).await;
    let first = world.server.state().names("savepoints").into_iter().find(|n| n.starts_with("often-")).unwrap();
    until(&world, "complete", |w| state_of(w, &first) == Some(SavepointState::Completed)).await;
    assert_eq!(first, "often-202611211001");
    world.apply(json!({"sql": "a", "restore": {"from": first}}));
    // Each is more than a minute's wait.
    for n in 2..=4 {
        let taken = |w: &World| w.outer.lock().unwrap().orders.len();
        until(&world, "next", |w| taken(w) >= n).await;
    }
    at_rest_for(&world, Duration::from_secs(5)).await;
    assert_eq!(
        world.server.state().names("savepoints"),
        ["often", "often-202611211001", "often-202611211003", "often-202611211004"]
    );
    assert_eq!(world.outer.lock().unwrap().savepoints.len(), 3);
}

#[tokio::test]
async fn a_controller_that_dies_over_a_savepoint_asks_for_one_only() {
    async fn life(world: &World) {
        world.apply(json!({"sql": "a"}));
        world.ask_for_savepoint("one", json!({"onDelete": "Delete"}));
        until(world, "complete", |w| state_of(w, "one") == Some(SavepointState::Completed)).await;
        assert_eq!(world.outer.lock().unwrap().savepoints.len(), 1);
        world.server.state().delete(&server::place("savepoints", "one"));
        until(world, "gone", |w| state_of(w, "one").is_none()).await;
    }
    let world = World::default();
    life(&world).await;
    let writes = world.server.state().writes.clone();
    for (n, write) in writes.iter().enumerate() {
        for crash in [Crash::Before(n), Crash::After(n)] {
            let world = World::default();
            world.server.crash_at(Some(crash));
            life(&world).await;
            assert_eq!(world.outer.lock().unwrap().savepoints.len(), 0, "{crash:?}: {write}");
        }
    }
}

fn put_keys(world: &World) {
    world.outer.lock().unwrap().keyed = true;
    let encoded = |text: &str| serde_json::to_value(k8s_openapi::ByteString(text.into())).unwrap();
    let data = json!({"AWS_ACCESS_KEY_ID": encoded("a"), "AWS_SECRET_ACCESS_KEY": encoded("b")});
    world.server.state().put(&server::place("secrets", "keys"), None, json!({"metadata": {}, "data": data}));
}

/// A job whose checkpoints go with it, and are reached with a Secret.
fn with_keys() -> serde_json::Value {
    json!({"sql": "a", "checkpoints": {
        "onDelete": "Delete", "credentials": {"secretName": "keys"},
    }})
}

/// Deletes all that is in the namespace, Secrets first. The controller learns of it when it is done.
fn delete_namespace(world: &World) {
    let mut state = world.server.state();
    state.terminating = true;
    let mut all: Vec<_> =
        state.objects.keys().filter(|(_, namespace, _)| namespace == server::NAMESPACE).cloned().collect();
    all.sort_by_key(|(resource, _, _)| resource != "secrets");
    all.iter().for_each(|place| state.delete(place));
}

fn is_empty(world: &World) -> bool {
    let state = world.server.state();
    let mut left = state.objects.keys().filter(|(r, n, _)| n == server::NAMESPACE && r != "events");
    left.next().is_none()
}

/// Warnings that were written outside of the namespace.
fn told_elsewhere(world: &World) -> Vec<String> {
    let state = world.server.state();
    let events = state.objects.iter().filter(|((r, n, _), _)| r == "events" && n == "system");
    events.map(|(_, event)| format!("{}: {}", event["reason"], event["note"])).collect()
}

#[tokio::test]
async fn files_go_with_their_namespace_although_the_secret_goes_first() {
    let world = World::default();
    put_keys(&world);
    world.apply(with_keys());
    world.ask_for_savepoint("one", json!({"onDelete": "Delete"}));
    until(&world, "complete", |w| running(w) && state_of(w, "one") == Some(SavepointState::Completed)).await;
    let operator = world.operator();
    let deleted = async {
        // It has seen them, and rests.
        world.sleep(Duration::from_secs(5)).await;
        delete_namespace(&world);
        while !is_empty(&world) {
            world.sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        () = operator.clone().run() => {}
        () = world.live() => {}
        () = world.time.pass() => {}
        () = deleted => {}
        () = world.sleep(PATIENCE) => panic!("never gone: {:#?}", objects(&world)),
    }
    let outer = world.outer.lock().unwrap();
    assert!(outer.state_removed && outer.savepoints.is_empty(), "{outer:?}");
    assert_eq!(told_elsewhere(&world), [""; 0]);
    assert_eq!(operator.secrets_kept(), 0, "nothing needs them any more");
}

#[tokio::test]
async fn files_that_nobody_can_reach_hold_no_namespace_and_are_told_of() {
    let world = World::default();
    put_keys(&world);
    world.apply(with_keys());
    world.ask_for_savepoint("one", json!({"onDelete": "Delete"}));
    until(&world, "complete", |w| running(w) && state_of(w, "one") == Some(SavepointState::Completed)).await;
    delete_namespace(&world);
    // This one comes too late to read the Secret.
    until(&world, "gone", is_empty).await;
    assert!(world.time.env().clock.monotonic() < Duration::from_secs(60), "nobody waits for what will not be");
    let outer = world.outer.lock().unwrap();
    assert!(!outer.state_removed && outer.savepoints.len() == 1, "{outer:?}");
    let name = outer.savepoints.first().unwrap();
    let why = "Secret keys, which spec.checkpoints.credentials names, is not there";
    assert_eq!(
        told_elsewhere(&world).iter().map(|told| told.replace(name, "NAME")).collect::<BTreeSet<_>>(),
        [
            format!(
                "\"StateLeft\": \"Savepoint shop/one: files of savepoint NAME are left in \
                 s3://b/c/shop/sums/savepoints/NAME: they could not be removed: {why}\""
            ),
            format!(
                "\"StateLeft\": \"StreamJob shop/sums: the job's checkpoints are left in s3://b/c, folder \
                 shop/sums/uid-2: they could not be removed: {why}\""
            ),
        ]
        .into()
    );
}

#[tokio::test]
async fn a_storage_that_refuses_is_waited_for_as_long_as_somebody_can_put_it_right() {
    let world = World::default();
    put_keys(&world);
    world.apply(with_keys());
    until(&world, "running", running).await;
    world.outer.lock().unwrap().locked = true;
    world.server.state().delete(&server::place("streamjobs", JOB));
    at_rest_for(&world, Duration::from_secs(60)).await;
    assert!(world.job().is_some(), "the Secret may be corrected");
    world.outer.lock().unwrap().locked = false;
    until(&world, "gone", |w| w.job().is_none()).await;
    assert!(world.outer.lock().unwrap().state_removed);
}
