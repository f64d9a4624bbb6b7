//! Golden files: what earlier versions wrote must be restored by this one, and lead to the right output.
//!
//! `tests/golden/<set>/` is the whole storage of a job that was cut off, with what it had made visible by then; see the README
//! beside the sets. Each is taken up at several parallelisms, and its savepoint in another job.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{fs, path::Path, sync::Arc};

use floodmark_corruption::{
    run::{End, Left, Start, run},
    set::{self, STORAGE},
    specimen::{SAVEPOINT, Specimen},
    verdict::{self, Expected},
    world::{Objects, Topic},
};
use floodmark_snapshot::{JobId, restore::Reference};
use floodmark_state::{Heap, StateBackend};
use serde_json::json;

const SETS: &str = "golden";
const TOPIC: &str = "topic.json";
/// What to do if a set can't be read any more.
const ADVICE: &str = "This version can't take up what an earlier one wrote, so an upgrade would lose jobs' state. If the format \
                      was not meant to change, undo that; if it was, read the old one too (raise the version of the format, \
                      and decide by it), and write a new set: see tests/golden/README.md.";

fn read(folder: &Path) -> Specimen {
    let topics: serde_json::Value = serde_json::from_slice(&fs::read(folder.join(TOPIC)).unwrap()).unwrap();
    let topic = |name: &str| Topic::from_json(&topics[name]).unwrap();
    Specimen::of(set::read(folder).unwrap(), topic("atTheEnd"), topic("atTheSavepoint"))
}

fn heap() -> Arc<dyn StateBackend> {
    Arc::new(Heap)
}

fn newest(specimen: &Specimen) -> Expected {
    Expected::From { epoch: specimen.retained.last().unwrap().epoch, says: None, class: "intact" }
}

#[test]
fn checkpoints_of_earlier_versions_are_taken_up_at_any_parallelism() {
    let sets = set::all(SETS).unwrap();
    assert!(!sets.is_empty(), "there is no set");
    for (set, folder) in sets {
        let specimen = read(&folder);
        assert_eq!(specimen.lacks(), Vec::<&str>::new(), "{set}");
        for parallelism in 1..=4 {
            let start = Start { parallelism, ..Start::again(&heap()) };
            let left = run(&start, specimen.objects.clone(), specimen.topic.clone(), |_| false);
            let faults = verdict::faults(&specimen, &newest(&specimen), &left);
            assert!(faults.is_empty(), "{set} at parallelism {parallelism}: {faults}\n{ADVICE}");
        }
    }
}

#[test]
fn older_checkpoints_of_earlier_versions_are_taken_up_when_they_are_named() {
    for (set, folder) in set::all(SETS).unwrap() {
        let specimen = read(&folder);
        for manifest in specimen.retained.iter().filter(|m| m.epoch >= specimen.committed) {
            let start = Start { restore: Reference::Checkpoint(manifest.epoch), ..Start::again(&heap()) };
            let left = run(&start, specimen.objects.clone(), specimen.topic.clone(), |_| false);
            let faults = verdict::output_faults(&specimen, &left.topic.records, manifest.epoch, true);
            let ended = matches!(left.end, End::Ended(Ok(_)));
            assert!(ended && faults.is_empty(), "{set}, {}: {:?}: {faults}\n{ADVICE}", manifest.epoch, left.end);
        }
    }
}

#[test]
fn savepoints_of_earlier_versions_are_taken_up_by_other_jobs() {
    for (set, folder) in set::all(SETS).unwrap() {
        let specimen = read(&folder);
        let location = folder.join(STORAGE).join("t/job/1/savepoints").join(SAVEPOINT);
        let from = Specimen { topic: specimen.savepoint_topic.clone(), ..specimen.clone() };
        for parallelism in 1..=4 {
            let job = JobId { namespace: "t".into(), name: "other".into(), uid: "2".into() };
            let restore = Reference::Location(location.to_str().unwrap().to_owned());
            let start = Start { job, parallelism, restore, ..Start::again(&heap()) };
            let Left { end, topic, .. } = run(&start, Objects::new(), Topic::default(), |_| false);
            let faults = verdict::output_faults(&from, &topic.records, specimen.savepoint.epoch, false);
            let ended = matches!(end, End::Ended(Ok(_)));
            assert!(ended && faults.is_empty(), "{set} at parallelism {parallelism}: {end:?}: {faults}\n{ADVICE}");
        }
    }
}

#[test]
#[ignore = "writes a new set, named by FLOODMARK_GOLDEN, when a format has changed on purpose"]
fn write_a_golden_set() {
    let name = std::env::var("FLOODMARK_GOLDEN").expect("FLOODMARK_GOLDEN names the set");
    let folder = set::new(SETS, &name).unwrap();
    let specimen = Specimen::make(&heap());
    assert_eq!(specimen.lacks(), Vec::<&str>::new());
    set::write(&folder, &specimen.objects).unwrap();
    let topics = json!({ "atTheEnd": specimen.topic.to_json(), "atTheSavepoint": specimen.savepoint_topic.to_json() });
    fs::write(folder.join(TOPIC), serde_json::to_vec(&topics).unwrap()).unwrap();
}
