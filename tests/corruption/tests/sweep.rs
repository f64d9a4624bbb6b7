//! The corruption sweep: every damage to every file of a small job's storage comes to a right end.
//!
//! Every byte of every file is changed in several ways, and read as whoever needs the file reads it: 100 % must be found. What
//! a job makes of a file that is found to be damaged does not depend on which byte it is, so whole runs of the job (from the
//! damaged storage to the end of its input) are made for some bytes of every file, and for everything that happens to files as
//! a whole. `--ignored` runs the job for every byte, too.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use floodmark_corruption::{
    damage::{self, Damage},
    reading::damage_of,
    run::{End, Start, run},
    specimen::{Role, SAVEPOINT, Specimen},
    verdict::{self, Tally},
    world::Topic,
};
use floodmark_rocksdb::{RocksDb, Settings};
use floodmark_snapshot::{Env, JobId, restore::Reference, savepoint::MANIFEST_FILE};
use floodmark_state::{Heap, StateBackend};
use floodmark_worker::RunError;

/// Faults that are shown when there are many.
const SHOWN_MAX: usize = 20;

fn heap() -> Arc<dyn StateBackend> {
    Arc::new(Heap)
}

fn specimen(backend: &Arc<dyn StateBackend>) -> Specimen {
    let specimen = Specimen::make(backend);
    assert_eq!(specimen.lacks(), Vec::<&str>::new(), "the specimen has everything that can be damaged");
    specimen
}

/// Other files that a file's place may be taken by: all of its kind, and one of each other kind.
fn others(specimen: &Specimen, path: &str, role: &Role) -> Vec<Damage> {
    let roles = specimen.roles();
    let mut of_kinds: Vec<(String, &String)> = roles.iter().map(|(p, r)| (r.kind(), p)).collect();
    of_kinds.sort();
    of_kinds.dedup_by(|a, b| a.0 == b.0);
    let alike = roles.iter().filter(|(p, r)| *p != path && r.kind() == role.kind()).map(|(p, _)| p);
    let others = of_kinds.into_iter().filter(|(kind, _)| *kind != role.kind()).map(|(_, p)| p);
    // A file that has the same bytes is no damage.
    let differs = |p: &&String| specimen.objects[*p] != specimen.objects[path];
    alike.chain(others).filter(differs).cloned().map(Damage::Replaced).collect()
}

/// Runs the job from the damaged storage. Answers what is wrong with the outcome.
fn sweep(
    specimen: &Specimen,
    start: &Start,
    path: &str,
    role: &Role,
    damage: &Damage,
    tally: &mut Tally,
) -> Option<String> {
    let expected = verdict::expected(specimen, path, role, damage);
    tally.count(expected.class());
    let left = run(start, damage.to(path, &specimen.objects), specimen.topic.clone(), |_| false);
    let faults = verdict::faults(specimen, &expected, &left);
    (!faults.is_empty()).then(|| format!("{path} ({}): {damage}: {faults}", role.kind()))
}

fn conclude(what: &str, tally: &Tally, faults: &[String]) {
    eprintln!("{what}: {} cases\n{tally}", tally.cases());
    let shown = faults.iter().take(SHOWN_MAX).map(|f| format!("\n{f}")).collect::<String>();
    assert!(faults.is_empty(), "{} of {} cases came to a wrong end:{shown}", faults.len(), tally.cases());
}

/// Every byte of every file, changed in every way, is found by whoever reads the file.
fn every_byte(name: &str, backend: &Arc<dyn StateBackend>) {
    let specimen = specimen(backend);
    let (mut tally, mut faults, mut bytes) = (Tally::default(), Vec::new(), 0);
    for (path, role) in specimen.roles() {
        let intact = &specimen.objects[&path];
        bytes += intact.len();
        assert!(damage_of(&specimen, &path, &role, intact, false).is_none(), "{path} is intact");
        let whole = damage::to_the_whole().into_iter().chain(others(&specimen, &path, &role));
        let all = (0..intact.len()).flat_map(|at| damage::at_byte(intact, at)).chain(whole);
        for damage in all.filter(|d| *d != Damage::Removed) {
            let damaged = damage.of(intact, &specimen.objects).unwrap();
            // An entry in another's place is intact, and found out by its number.
            let entry = matches!((&role, &damage), (Role::Entry(_), Damage::Replaced(by)) if by.contains("/log/"));
            let replaced = matches!(damage, Damage::Replaced(_));
            match damage_of(&specimen, &path, &role, &damaged, replaced) {
                Some(_) => tally.count(&format!("found in a {}", role.kind())),
                None if role == Role::Orphan => tally.count(verdict::ORPHAN),
                None if entry => tally.count("an entry in the place of another: left to whole runs"),
                None => faults.push(format!("{path} ({}): {damage}: not found", role.kind())),
            }
        }
    }
    conclude(
        &format!("{name}: {} files, {bytes} bytes, read with every byte changed", specimen.objects.len()),
        &tally,
        &faults,
    );
}

#[test]
fn every_changed_byte_is_found_by_whoever_reads_the_file() {
    every_byte("heap", &heap());
}

/// Whole runs: for some bytes of every file whose number has this remainder, and for everything that happens to files.
fn runs(share: usize, shares: usize, places: usize) {
    let backend = heap();
    let (specimen, start) = (specimen(&backend), Start::again(&backend));
    let (mut tally, mut faults) = (Tally::default(), Vec::new());
    for (path, role) in specimen.roles().into_iter().skip(share).step_by(shares) {
        let bytes = &specimen.objects[&path];
        let mut damages = damage::to_the_whole();
        let places = damage::places(bytes.len(), places);
        damages.extend(
            places
                .into_iter()
                .zip([0, 3, 4, 1].into_iter().cycle())
                .filter_map(|(at, which)| damage::at_byte(bytes, at).nth(which)),
        );
        damages.push(Damage::Cut { len: 0 });
        damages.extend(others(&specimen, &path, &role));
        for damage in damages {
            faults.extend(sweep(&specimen, &start, &path, &role, &damage, &mut tally));
        }
    }
    conclude(&format!("whole runs, part {share} of {shares}"), &tally, &faults);
}

#[test]
fn there_are_cases_of_every_class() {
    let specimen = specimen(&heap());
    let classes: std::collections::BTreeSet<&str> = specimen
        .roles()
        .iter()
        .map(|(path, role)| verdict::expected(&specimen, path, role, &Damage::Removed).class())
        .collect();
    for class in [
        verdict::FELL_BACK,
        verdict::PASSED_OVER,
        verdict::REFUSED,
        verdict::OLDER,
        verdict::ORPHAN,
        verdict::SAVEPOINTS,
        verdict::LAST_ENTRY,
    ] {
        assert!(classes.contains(class), "no case of: {class}");
    }
}

#[test]
fn damaged_storage_comes_to_a_right_end_first_half() {
    runs(0, 2, 1);
}

#[test]
fn damaged_storage_comes_to_a_right_end_second_half() {
    runs(1, 2, 1);
}

/// Minutes to hours: a run of the job for every byte of every file, changed in every way.
#[test]
#[ignore = "takes an hour; run it in release"]
fn damaged_storage_comes_to_a_right_end_for_every_byte() {
    let backend = heap();
    let (specimen, start) = (specimen(&backend), Start::again(&backend));
    let (mut tally, mut faults) = (Tally::default(), Vec::new());
    for (path, role) in specimen.roles() {
        let bytes = &specimen.objects[&path];
        for damage in (0..bytes.len()).flat_map(|at| damage::at_byte(bytes, at)) {
            faults.extend(sweep(&specimen, &start, &path, &role, &damage, &mut tally));
        }
    }
    conclude("whole runs for every byte", &tally, &faults);
}

#[test]
fn rocksdb_files_are_verified_byte_by_byte_and_come_to_a_right_end() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { memtable_bytes: 4 << 20, block_cache_bytes: 1 << 20, ..Settings::new(folder.path()) };
    let backend: Arc<dyn StateBackend> = Arc::new(RocksDb::open(&settings, &Env::system()).unwrap());
    let (specimen, start) = (specimen(&backend), Start::again(&backend));
    let (mut tally, mut faults) = (Tally::default(), Vec::new());
    for (path, role) in specimen.roles().into_iter().filter(|(_, role)| *role == Role::Shard("RocksDb".to_owned())) {
        let bytes = &specimen.objects[&path];
        for at in 0..bytes.len() {
            for damage in damage::at_byte(bytes, at) {
                let damaged = damage.of(bytes, &specimen.objects).unwrap();
                let found = damage_of(&specimen, &path, &role, &damaged, false);
                assert!(found.is_some(), "{path}: {damage}: not found");
                tally.count("found in a RocksDb shard");
            }
        }
        let other = others(&specimen, &path, &role).into_iter().take(1);
        for damage in [Damage::Removed, Damage::Flipped { at: bytes.len() / 2, mask: 1 }].into_iter().chain(other) {
            faults.extend(sweep(&specimen, &start, &path, &role, &damage, &mut tally));
        }
    }
    conclude("RocksDB", &tally, &faults);
}

#[test]
fn a_log_that_has_lost_what_sinks_have_committed_never_costs_output_silently() {
    let backend = heap();
    let specimen = Specimen::visible_and_not_said(&backend);
    let (path, role) = specimen.roles().into_iter().rfind(|(_, r)| matches!(r, Role::Entry(_))).unwrap();
    let left =
        run(&Start::again(&backend), Damage::Removed.to(&path, &specimen.objects), specimen.topic.clone(), |_| false);
    match &left.end {
        End::Ended(Err(RunError::Failed(error))) if error.to_string().contains("newest entries are lost") => {}
        other => panic!("{path} ({role:?}) is gone: {other:?}"),
    }
    assert_eq!(left.topic.records, specimen.topic.records, "failed, and wrote");
    // With its log as it was, the job goes on.
    let left = run(&Start::again(&backend), specimen.objects.clone(), specimen.topic.clone(), |_| false);
    let expected =
        verdict::Expected::From { epoch: specimen.retained.last().unwrap().epoch, says: None, class: "intact" };
    assert_eq!(verdict::faults(&specimen, &expected, &left), "");
}

/// Writes the savepoint's folder to a disk, with one of its files damaged.
fn moved(specimen: &Specimen, damaged: Option<(&str, &Damage)>, to: &std::path::Path) {
    let objects = match damaged {
        Some((path, damage)) => damage.to(path, &specimen.objects),
        None => specimen.objects.clone(),
    };
    std::fs::create_dir_all(to).unwrap();
    for (path, bytes) in &objects {
        if let Some((_, name)) = path.split_once(&format!("/savepoints/{SAVEPOINT}/")) {
            std::fs::write(to.join(name), bytes).unwrap();
        }
    }
}

#[test]
fn a_damaged_savepoint_is_refused_by_another_job_wherever_it_was_moved() {
    let backend = heap();
    let specimen = specimen(&backend);
    let folder = tempfile::tempdir().unwrap();
    let location = |n: usize| folder.path().join(format!("{n}/{SAVEPOINT}"));
    let other = JobId { namespace: "t".into(), name: "other".into(), uid: "2".into() };
    let start = |n: usize| {
        let restore = Reference::Location(location(n).to_str().unwrap().to_owned());
        Start { job: other.clone(), restore, ..Start::again(&backend) }
    };
    moved(&specimen, None, &location(0));
    let left = run(&start(0), Default::default(), Topic::default(), |_| false);
    assert!(matches!(&left.end, End::Ended(Ok(_))), "{:?}", left.end);
    let from = Specimen { topic: specimen.savepoint_topic.clone(), ..specimen.clone() };
    let epoch = specimen.savepoint.epoch;
    assert_eq!(verdict::output_faults(&from, &left.topic.records, epoch, false), "");

    let mut cases = 0;
    for (path, role) in specimen.roles() {
        let says = match &role {
            Role::SavepointManifest => MANIFEST_FILE,
            Role::SavepointShard(_) => path.rsplit('/').next().unwrap(),
            Role::Entry(_) | Role::Shard(_) | Role::Orphan => continue,
        };
        let bytes = &specimen.objects[&path];
        let mut damages = damage::to_the_whole();
        damages.extend(damage::places(bytes.len(), 8).into_iter().flat_map(|at| damage::at_byte(bytes, at)));
        damages.extend(others(&specimen, &path, &role));
        for damage in damages {
            cases += 1;
            moved(&specimen, Some((&path, &damage)), &location(cases));
            let left = run(&start(cases), Default::default(), Topic::default(), |_| false);
            match &left.end {
                End::Ended(Err(RunError::Storage(error))) if error.to_string().contains(says) => {}
                other => panic!("{path}: {damage}: {other:?}, and should have been refused with '{says}'"),
            }
            assert!(left.topic.records.is_empty(), "{path}: {damage}: refused, and wrote");
        }
    }
    eprintln!("a savepoint in another job: {cases} cases, all refused");
}
