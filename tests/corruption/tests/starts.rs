//! How a job starts from a log that is whole, damaged, or just being written by somebody else: what it goes on from, what it
//! says of that, and that a finished job is not run again.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use floodmark_corruption::{
    damage::Damage,
    run::{End, Left, Start, job_id, run, run_on},
    specimen::{Role, Specimen},
    world::{MapStorage, Objects, Topic},
};
use floodmark_snapshot::{
    log::{self, Event, JobFolder, LogState},
    restore::Reference,
};
use floodmark_state::{Heap, StateBackend};
use floodmark_worker::Outcome;
use futures::executor::block_on;

fn heap() -> Arc<dyn StateBackend> {
    Arc::new(Heap)
}

fn again() -> Start {
    Start::again(&heap())
}

fn log_of(objects: &Objects) -> LogState {
    block_on(log::read(&*MapStorage::of(objects.clone()), &JobFolder::of(&job_id()))).unwrap()
}

/// The path of a log entry.
fn entry(seq: u64) -> String {
    JobFolder::of(&job_id()).path(&format!("log/{seq:020}.json"))
}

fn outcome(left: &Left) -> Outcome {
    match &left.end {
        End::Ended(Ok(summary)) => summary.outcome,
        other => panic!("{other:?}; {:?}", left.warnings),
    }
}

/// A job that has run to its end.
fn finished() -> Left {
    let left = run(&again(), Objects::new(), Topic::default(), |_| false);
    assert_eq!(outcome(&left), Outcome::Finished);
    left
}

#[test]
fn a_job_that_finishes_while_the_next_process_opens_its_log_is_not_run_again() {
    let done = finished();
    let state = log_of(&done.objects);
    let last = entry(state.next_seq - 1);
    let mut running = done.objects.clone();
    let end = running.remove(&last).unwrap();
    assert!(matches!(log::decode(&end).unwrap().event, Event::Finished { .. }));
    assert_eq!(log_of(&running).finished, None);

    let storage = MapStorage::with_late(running, Objects::from([(last, end)]));
    let left = run_on(&again(), storage, done.topic.clone(), |_| false);
    assert_eq!(outcome(&left), Outcome::AlreadyFinished);
    assert_eq!(left.topic.records, done.topic.records);
    let after = log_of(&left.objects);
    assert_eq!((after.next_seq, after.finished), (state.next_seq + 1, state.finished), "it had begun its reign");

    // Nor is it run again by whoever comes next, and sees that reign.
    let next = run(&again(), left.objects.clone(), left.topic.clone(), |_| false);
    assert_eq!((outcome(&next), &next.objects), (Outcome::AlreadyFinished, &left.objects));
}

#[test]
fn a_finished_job_runs_again_only_if_it_is_asked_to_begin_somewhere_and_only_once_for_the_same_words() {
    let done = finished();
    let newest = log_of(&done.objects).retained.last().unwrap().manifest.epoch;
    let start = Start { restore: Reference::Checkpoint(newest), ..again() };
    let once = run(&start, done.objects, done.topic.clone(), |_| false);
    assert_eq!(outcome(&once), Outcome::Finished);
    assert_eq!(once.topic.records, done.topic.records, "there was no more input");
    let twice = run(&start, once.objects.clone(), once.topic, |_| false);
    assert_eq!((outcome(&twice), &twice.objects), (Outcome::AlreadyFinished, &once.objects));
    let anew = run(&Start { restore: Reference::Nothing, ..again() }, twice.objects, twice.topic, |_| false);
    assert_eq!((outcome(&anew), anew.topic.records.len()), (Outcome::Finished, 2 * done.topic.records.len()));
}

/// Starts the job with a byte of a file changed; answers with what it says of what it goes on from.
fn said(specimen: &Specimen, path: &str) -> Vec<String> {
    let damage = Damage::Flipped { at: specimen.objects[path].len() / 2, mask: 1 };
    let left = run(&again(), damage.to(path, &specimen.objects), specimen.topic.clone(), |_| false);
    assert_eq!(outcome(&left), Outcome::Finished, "{path}");
    left.warnings.into_iter().filter(|w| w.starts_with("restored")).collect()
}

#[test]
fn what_a_job_says_of_its_start_is_true_whichever_entry_of_its_log_is_damaged() {
    let mut specimen = Specimen::make(&heap());
    // One more process has come, and gone before it did anything.
    let opened = log_of(&specimen.objects).next_seq;
    let left =
        run(&again(), specimen.objects, specimen.topic, |reins| reins.storage.objects().contains_key(&entry(opened)));
    assert!(matches!(left.end, End::CutOff));
    assert_eq!(log_of(&left.objects).next_seq, opened + 1);
    specimen = Specimen::of(left.objects, left.topic, specimen.savepoint_topic);
    let newest = specimen.retained.last().unwrap().epoch;
    let completed = |seq: u64| {
        let found = specimen.entries.iter().find(|e| e.seq == seq);
        matches!(found.map(|e| &e.event), Some(Event::Completed { manifest }) if manifest.epoch == newest)
    };
    let at = specimen.entries.iter().find(|e| completed(e.seq)).unwrap().seq;
    let mut cases = [0; 2];
    for (path, role) in specimen.roles() {
        let Role::Entry(seq) = role else { continue };
        let said = said(&specimen, &path);
        if seq < at {
            cases[0] += 1;
            assert_eq!(said, Vec::<String>::new(), "{path}: it goes on from its newest checkpoint");
        } else {
            cases[1] += 1;
            let known = "restored the newest checkpoint that is known; what is damaged behind it in the log may have been a \
                         newer one";
            assert!(said.len() == 1 && said[0].starts_with(known), "{path}: {said:?}");
        }
    }
    assert!(cases[0] >= 4 && cases[1] == 2, "{cases:?}");
    let shards = |epoch: usize| {
        let manifest = &specimen.retained[specimen.retained.len() - epoch];
        manifest.shards().map(|s| s.path.clone()).collect::<std::collections::BTreeSet<_>>()
    };
    let shard = shards(1).difference(&shards(2)).next().cloned().unwrap();
    let said = said(&specimen, &JobFolder::of(&job_id()).path(&shard));
    let older = "restored an older checkpoint, because a newer one is damaged";
    assert!(said.len() == 1 && said[0].starts_with(older), "{shard}: {said:?}");
}
