//! What a job's objects are called. Pure.
//!
//! Invariant: two jobs never have objects of one kind and name. Objects of a job are called by its base, those of a run
//! `<base>-<n>` or `<base>-<n>-<role>`; so no base looks like the name of a run's Service, and one that is made with a hash looks
//! like no job's name that is taken as it is.

use floodmark_crds::StreamJob;
use kube::ResourceExt as _;
use xxhash_rust::xxh3::xxh3_64;

/// Longest base: with the number of a run (ten digits) and `-coordinator` behind it, it is still a DNS label.
pub const BASE_LENGTH_MAX: usize = 40;
/// Hexadecimal digits of a hash.
const HASH_DIGITS: usize = 12;

/// Characters of a job's uid in the names of its Secrets.
const UID_SHOWN: usize = 8;

const COORDINATOR: &str = "-coordinator";

/// What the objects of a job are called by: its name where that is a DNS label of at most [`BASE_LENGTH_MAX`] characters, else
/// what it begins with and a hash. Always a DNS label that begins with a letter, the same in all versions.
#[must_use]
pub fn base(job: &str) -> String {
    if is_plain(job) && job.len() <= BASE_LENGTH_MAX && !ends_as_a_run(job) && !ends_as_a_hash(job) {
        return job.to_owned();
    }
    let mut begin: String = job.chars().map(|c| if is_inner(c) { c } else { '-' }).collect();
    begin = begin.trim_start_matches('-').to_owned();
    if !begin.starts_with(|c: char| c.is_ascii_lowercase()) {
        begin.insert(0, 'j');
    }
    begin.truncate(BASE_LENGTH_MAX - HASH_DIGITS - 2);
    format!("{}-x{:012x}", begin.trim_end_matches('-'), xxh3_64(job.as_bytes()) >> (64 - 4 * HASH_DIGITS))
}

/// What the objects of a run are called by.
fn run_name(job: &str, run: u64) -> String {
    format!("{}-{run}", base(job))
}

/// The Secret of a run. A later job of the same name has another: a node may for a while hand what it has of a Secret to all who mount
/// one of that name.
#[must_use]
pub fn secret_name(job: &StreamJob, run: u64) -> String {
    let uid: String = job.uid().unwrap_or_default().chars().take(UID_SHOWN).collect();
    format!("{}-{uid}", run_name(&job.name_any(), run))
}

/// The Deployment of a run's coordinator, and the Service by which workers find it.
///
/// That Service has no shorter name, or it would be that of the job `a-1` if the job `a` has a run 1.
#[must_use]
pub fn coordinator_name(job: &str, run: u64) -> String {
    format!("{}{COORDINATOR}", run_name(job, run))
}

/// The Deployment of a run's workers.
#[must_use]
pub fn worker_name(job: &str, run: u64) -> String {
    format!("{}-worker", run_name(job, run))
}

/// The ControllerRevision that keeps the spec of a revision of this name.
#[must_use]
pub fn revision_name(job: &str, revision: &str) -> String {
    format!("{}-{revision}", base(job))
}

fn is_inner(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'
}

/// Services need a letter in front.
fn is_plain(name: &str) -> bool {
    name.chars().all(is_inner) && name.starts_with(|c: char| c.is_ascii_lowercase()) && !name.ends_with('-')
}

fn ends_as_a_run(name: &str) -> bool {
    let number = name.strip_suffix(COORDINATOR).and_then(|run| run.rsplit_once('-'));
    number.is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

fn ends_as_a_hash(name: &str) -> bool {
    let hash = name.rsplit_once("-x").map(|(_, hash)| hash);
    hash.is_some_and(|hash| hash.len() == HASH_DIGITS && hash.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use expect_test::expect;

    use super::*;

    #[test]
    fn names_that_can_be_are_kept() {
        let longest = "a".repeat(BASE_LENGTH_MAX);
        for name in ["a", "hot-items", "nexmark-5", "q1-coordinator", "x-worker", &longest] {
            assert_eq!(base(name), name);
        }
    }

    #[test]
    fn others_become_labels_that_stay() {
        // They are in clusters: a change here would leave objects behind.
        let long = format!("{}.c", "a".repeat(61));
        let bases = ["a.b", "2nd", "9", "a-1-coordinator", "a-x0123456789ab", &long].map(base).join("\n");
        expect![[r#"
            a-b-x390c9ebbbb74
            j2nd-x733a7168e35b
            j9-x28353a066812
            a-1-coordinator-x6417928caeef
            a-x0123456789ab-x464fd80960c6
            aaaaaaaaaaaaaaaaaaaaaaaaaa-x010d559d8d89"#]]
        .assert_eq(&bases);
    }

    #[test]
    fn every_base_is_a_label_that_leaves_room_for_a_run() {
        let long = ["a.b-c.9"; 9].join(".");
        let names = ["a", "a.b", "9", "9.9", "a-.b", "-", "", "Ä.Ö", "0-0", &long, &long[..63], &"x".repeat(63)];
        for name in names {
            let base = base(name);
            assert!(is_plain(&base) && base.len() <= BASE_LENGTH_MAX, "{name}: {base}");
            for object in [coordinator_name(name, 9_999_999_999), revision_name(name, "0123456789")] {
                assert!(object.len() <= 63, "{object}");
            }
        }
    }

    #[test]
    fn two_jobs_never_collide() {
        let a_dot_b = base("a.b");
        let jobs = [
            "a",
            "a-1",
            "a-1-1",
            "a-1-coordinator",
            "a-1-worker",
            "a-1-coordinator-1-coordinator",
            "a-coordinator",
            "a.1",
            "a.b",
            "a-b",
            &a_dot_b,
            &base(&a_dot_b),
            &format!("{}.c", "a".repeat(61)),
            &format!("{}.d", "a".repeat(61)),
            "a-0123456789",
        ];
        let mut names: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        let mut add =
            |kind, name: String| assert!(names.entry(kind).or_default().insert(name.clone()), "{kind} {name}");
        for job in jobs {
            add("job", base(job));
            add("Service", base(job));
            for run in [1, 11] {
                add("Secret", run_name(job, run));
                add("Service", coordinator_name(job, run));
                add("Deployment", coordinator_name(job, run));
                add("Deployment", worker_name(job, run));
            }
            for revision in ["0123456789", "abcdef0123"] {
                add("ControllerRevision", revision_name(job, revision));
            }
        }
    }
}
