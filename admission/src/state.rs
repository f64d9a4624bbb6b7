//! Whether a job can start from what it is to start from: finds the snapshot, and says what its state becomes. Starts nothing and
//! writes nothing: it is known before anything stops. Reads no shard.

use std::{path::Path, sync::Arc};

use floodmark_dataflow::takers;
use floodmark_snapshot::{
    Disposition, Epoch, Error, Manifest,
    log::LogState,
    restore::{self, Fate, Found, Line, Origin, Reference, StartId, StatePlan, Taker, Visible},
    storage::{self, Storage},
};

use crate::{History, Planned, StorageError};

/// What a job is to start from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// This, whatever the job was started from before.
    Exactly(Reference),
    /// What a start with these words comes to: see [`Origin::of_start`].
    Start {
        /// What `--restore` says.
        restore: Reference,
        /// What a job without a past begins from.
        initial: Option<Reference>,
    },
}

impl Wanted {
    /// What it comes to in a job with this past.
    #[must_use]
    pub fn origin(&self, state: &LogState) -> Origin<'_> {
        match self {
            Self::Exactly(reference) => Origin::of(reference),
            Self::Start { restore, initial } => {
                // No start has said these words yet.
                let start = StartId::Process(String::new());
                Origin::of_start(restore, initial.as_ref(), &start, state)
            }
        }
    }
}

/// Whether a job can start.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// As it stands.
    Admitted(Start),
    /// Not before somebody changes the job, or what it starts from.
    Refused(Refusal),
}

/// Why a job can't start.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// All reasons, and what to do.
    pub reason: String,
    /// What the job would start from, if that is there and can be read: its plan says of each operator what is wrong.
    pub start: Option<Start>,
}

/// What a job would start from.
#[derive(Clone, Debug)]
pub struct Start {
    /// Where the snapshot is; `None` for a start from nothing.
    pub location: Option<String>,
    /// As the job would take it over.
    pub manifest: Option<Manifest>,
    /// What its state becomes.
    pub plan: StatePlan,
    /// The job has finished: a start would do nothing.
    pub finished: bool,
}

/// Judges what a job would start from, in the storage that it keeps its snapshots in.
///
/// # Errors
/// When the storage can't be read: nothing is known then.
pub async fn check_state(
    planned: &Planned,
    storage: &Arc<dyn Storage>,
    wanted: &Wanted,
) -> Result<Verdict, StorageError> {
    if planned.keeps_nothing() {
        let why = "no snapshot: the job takes none (spec.checkpoints.mode is Disabled)";
        return Ok(Verdict::Admitted(Start::from_nothing(why, &takers(&planned.graph))));
    }
    History::read(planned.id.clone(), storage.clone()).await?.check(planned, wanted).await
}

/// As [`check_state`], of a storage that is named and need not be there yet: a folder in which nothing ever ran. It is opened
/// with what this process's environment says, and not made.
///
/// # Errors
/// As [`check_state`].
pub async fn check_state_at(planned: &Planned, location: &str, wanted: &Wanted) -> Result<Verdict, StorageError> {
    if location.contains("://") || Path::new(location).exists() {
        let storage = storage::open_existing(location).map_err(StorageError)?;
        return check_state(planned, &storage, wanted).await;
    }
    let takers = takers(&planned.graph);
    match wanted.origin(&LogState::default()) {
        Origin::From(Reference::Location(at)) => match judged(restore::at(at).await)? {
            Ok(found) => Ok(Start::of(&found, planned, &takers, Epoch(0), Epoch(1))),
            Err(refused) => Ok(refused),
        },
        Origin::From(named) => {
            Ok(Verdict::refused(format!("there is no snapshot '{named}': job {} never ran in {location}", planned.id)))
        }
        Origin::Own | Origin::Nothing => {
            Ok(Verdict::Admitted(Start::from_nothing("no snapshot: the job never ran", &takers)))
        }
    }
}

impl History {
    /// Judges what a job with this past would start from.
    ///
    /// # Errors
    /// When the storage can't be read.
    pub async fn check(&self, planned: &Planned, wanted: &Wanted) -> Result<Verdict, StorageError> {
        let takers = takers(&planned.graph);
        let state = &self.state;
        let origin = wanted.origin(state);
        let nothing = |why| Ok(Verdict::Admitted(Start::from_nothing(why, &takers)));
        let reference = match origin {
            Origin::Nothing => return nothing("no snapshot, as told to"),
            Origin::Own if state.retained.is_empty() => {
                return match restore::nothing_intact(&*self.storage, &self.job, state, &[]) {
                    Some(error) => Ok(Verdict::refused(error.to_string())),
                    None => nothing("no snapshot: the job has completed no checkpoint"),
                };
            }
            Origin::Own => &Reference::Latest,
            Origin::From(reference) => reference,
        };
        let found = match judged(self.find(reference).await)? {
            Ok(found) => found,
            Err(refused) => return Ok(refused),
        };
        let mut verdict = Start::of(&found, planned, &takers, state.committed, state.last_epoch.next());
        if let Some(start) = verdict.start_mut() {
            let mut own = state.retained.iter().chain(&state.abandoned).filter(|r| found.own && r.from.is_none());
            let entry = own.rfind(|r| Some(&r.manifest) == start.manifest.as_ref());
            start.location = entry.map(|r| self.locate_entry(r.seq)).or(start.location.take());
            start.finished = origin == Origin::Own && state.finished.is_some();
        }
        Ok(verdict)
    }
}

/// What can't be read for now is an error; what is not there, or not as it was written, is a refusal.
fn judged(found: Result<Found, Error>) -> Result<Result<Found, Verdict>, StorageError> {
    match found {
        Ok(found) => Ok(Ok(found)),
        Err(error) if error.disposition() == Disposition::Retry => Err(StorageError(error)),
        Err(error) => Ok(Err(Verdict::refused(error.to_string()))),
    }
}

impl Verdict {
    fn refused(reason: String) -> Self {
        Self::Refused(Refusal { reason, start: None })
    }

    /// What the job would start from, if that is known.
    #[must_use]
    pub fn start(&self) -> Option<&Start> {
        match self {
            Self::Admitted(start) => Some(start),
            Self::Refused(refusal) => refusal.start.as_ref(),
        }
    }

    fn start_mut(&mut self) -> Option<&mut Start> {
        match self {
            Self::Admitted(start) => Some(start),
            Self::Refused(refusal) => refusal.start.as_mut(),
        }
    }

    /// Why the job can't start; `None` if it can.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Admitted(_) => None,
            Self::Refused(refusal) => Some(&refusal.reason),
        }
    }
}

impl Start {
    fn from_nothing(why: &str, takers: &[Taker]) -> Self {
        let new = |t: &Taker| {
            let (uid, kind, fate) = (t.uid.clone(), t.kind.clone(), Fate::New);
            t.schema.is_some().then_some(Line { uid, kind, amount: String::new(), fate })
        };
        let lines = takers.iter().filter_map(new).collect();
        let plan = StatePlan { snapshot: why.to_owned(), refused: Vec::new(), lines };
        Self { location: None, manifest: None, plan, finished: false }
    }

    /// What a snapshot would become. `next` is the epoch under which a job takes over one that is not its own.
    fn of(found: &Found, planned: &Planned, takers: &[Taker], committed: Epoch, next: Epoch) -> Verdict {
        let original = &found.snapshot.manifest;
        if let Err(error) = restore::check_format(original) {
            return Verdict::refused(error.to_string());
        }
        let spec = &planned.manifest.spec;
        let manifest = if found.own { (**original).clone() } else { found.adopted_as(next, &Visible::new()) };
        let (fingerprint, max_parallelism) = (&planned.graph.fingerprint, spec.max_parallelism);
        let mut plan = StatePlan::new(&manifest, takers, fingerprint, max_parallelism, committed);
        plan.snapshot = format!("checkpoint {} of {}", original.epoch, original.job);
        let admitted = plan.admit(spec.restore.allow_dropped_state);
        let location = Some(found.snapshot.location());
        let start = Self { location, manifest: Some(manifest), plan, finished: false };
        match admitted {
            Ok(()) => Verdict::Admitted(start),
            Err(error) => Verdict::Refused(Refusal { reason: error.to_string(), start: Some(start) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use floodmark_crds::StreamJob;
    use floodmark_snapshot::{
        log::{Event, JobFolder},
        restore::Snapshot,
        savepoint,
    };

    use super::*;
    use crate::testing::{Flaky, SQL, append, manifest, planned, snapshot};

    fn latest() -> Wanted {
        Wanted::Start { restore: Reference::Latest, initial: None }
    }

    fn exactly(words: &str) -> Wanted {
        Wanted::Exactly(words.parse().unwrap())
    }

    async fn with_checkpoint(location: &str) -> Arc<dyn Storage> {
        let storage = storage::open(location).unwrap();
        let manifest = Box::new(snapshot(&planned(), 4));
        append(&storage, &planned().id, vec![Event::Completed { manifest }]).await;
        storage
    }

    #[tokio::test]
    async fn state_that_fits_is_admitted_and_what_becomes_of_it_is_told() {
        let folder = tempfile::tempdir().unwrap();
        for location in ["memory://", folder.path().to_str().unwrap()] {
            let storage = with_checkpoint(location).await;
            let verdict = check_state(&planned(), &storage, &latest()).await.unwrap();
            let start = verdict.start().unwrap();
            assert_eq!((verdict.refusal(), start.finished), (None, false));
            assert_eq!(start.plan.snapshot, "checkpoint 4 of default/sums/local");
            assert!(start.plan.lines.iter().all(|l| l.fate == Fate::Kept), "{}", start.plan);
            let entry = start.location.as_ref().unwrap();
            assert!(entry.ends_with("/default/sums/local/log/00000000000000000001.json"), "{entry}");
        }
    }

    #[tokio::test]
    async fn state_that_does_not_fit_is_refused_with_its_reasons_until_the_loss_is_allowed() {
        let storage = with_checkpoint("memory://").await;
        let mut job =
            manifest(&SQL.replace("GROUP BY k", "GROUP BY x").replace("SELECT k, sum(x)", "SELECT x, sum(x)"));
        let changed = |job: &StreamJob| Planned::of(job).unwrap();
        let verdict = check_state(&changed(&job), &storage, &latest()).await.unwrap();
        let refusal = verdict.refusal().unwrap();
        assert!(refusal.starts_with("checkpoint 4 of default/sums/local does not fit this job"), "{refusal}");
        assert!(verdict.start().unwrap().plan.lines.iter().any(|l| matches!(l.fate, Fate::Refused(_))));
        // Another key is no loss that can be allowed; another number of key groups is none either.
        job.spec.restore.allow_dropped_state = true;
        assert!(check_state(&changed(&job), &storage, &latest()).await.unwrap().refusal().is_some());
        job = manifest(SQL);
        job.spec.max_parallelism = 64;
        let refused = check_state(&changed(&job), &storage, &latest()).await.unwrap();
        assert!(refused.refusal().unwrap().contains("maxParallelism is 64"), "{:?}", refused.refusal());
        // An operator that is gone is.
        let mut job = manifest(
            "CREATE TABLE t (x BIGINT) WITH ('connector' = 'datagen', 'rate' = '1');
            CREATE TABLE s (x BIGINT) WITH ('connector' = 'blackhole'); INSERT INTO s SELECT x FROM t;",
        );
        let refused = check_state(&changed(&job), &storage, &latest()).await.unwrap();
        assert!(refused.refusal().unwrap().contains("allowDroppedState"), "{:?}", refused.refusal());
        job.spec.restore.allow_dropped_state = true;
        let allowed = check_state(&changed(&job), &storage, &latest()).await.unwrap();
        assert_eq!(allowed.refusal(), None);
        assert!(allowed.start().unwrap().plan.loses());
    }

    #[tokio::test]
    async fn what_is_not_there_is_a_refusal_and_what_cannot_be_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let storage = with_checkpoint(folder.path().to_str().unwrap()).await;
        let cases = [
            ("5", "job default/sums/local has no checkpoint 5; there is: 4"),
            ("base", "job default/sums/local has no savepoint 'base'; there is: none"),
            ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ];
        for (words, reason) in cases {
            let verdict = check_state(&planned(), &storage, &exactly(words)).await.unwrap();
            let refusal = verdict.refusal().unwrap();
            assert!(refusal.contains(reason), "{words}: {refusal}");
            assert!(verdict.start().is_none());
        }
        let down = Flaky::down(storage.clone());
        let error = check_state(&planned(), &down, &latest()).await.unwrap_err();
        assert!(error.may_pass() && error.to_string().contains("read checkpoint log"), "{error}");
        // It goes down behind the log, while the savepoint is looked for.
        let history = History::read(planned().id, storage.clone()).await.unwrap();
        let history = History { storage: Flaky::down(storage), ..history };
        assert!(history.check(&planned(), &exactly("base")).await.unwrap_err().may_pass());
    }

    #[tokio::test]
    async fn a_log_of_which_nothing_is_intact_is_a_refusal_and_no_start_from_nothing() {
        let storage = with_checkpoint("memory://").await;
        for seq in 0..2 {
            let path = JobFolder::of(&planned().id).path(&crate::history::entry_path(seq));
            storage.put(&path, "cut".into()).await.unwrap();
        }
        let refused = check_state(&planned(), &storage, &latest()).await.unwrap();
        assert!(refused.refusal().unwrap().contains("is intact, and the job does not start from nothing"));
        let none = check_state(&planned(), &storage, &exactly("none")).await.unwrap();
        assert_eq!(none.refusal(), None);
    }

    #[tokio::test]
    async fn a_savepoint_elsewhere_is_what_a_job_without_a_past_begins_from_and_no_other_does() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let elsewhere = storage::open(there.path().to_str().unwrap()).unwrap();
        let folder = JobFolder::of(&planned().id);
        let mut manifest = snapshot(&planned(), 9);
        manifest.operators.values_mut().for_each(|o| o.shards.clear());
        let other = Snapshot::new(manifest.into(), elsewhere.clone(), folder.root());
        let location = savepoint::export(&other, &elsewhere, &folder, "kept", 1).await.unwrap();
        let wanted = Wanted::Start { restore: Reference::Latest, initial: Some(location.parse().unwrap()) };
        // Nothing ever ran here: not even the folder is there.
        let at = here.path().join("new").display().to_string();
        let verdict = check_state_at(&planned(), &at, &wanted).await.unwrap();
        let manifest = verdict.start().unwrap().manifest.as_ref().unwrap();
        assert_eq!((verdict.refusal(), manifest.epoch), (None, Epoch(1)), "adopted under an epoch of its own");
        let named = check_state_at(&planned(), &at, &exactly("kept")).await.unwrap();
        let reason = format!("there is no snapshot 'kept': job default/sums/local never ran in {at}");
        assert_eq!(named.refusal(), Some(reason.as_str()));
        assert!(!Path::new(&at).exists(), "asking makes no folder");
        // A job with a past goes on from that.
        with_checkpoint(here.path().to_str().unwrap()).await;
        let verdict = check_state_at(&planned(), here.path().to_str().unwrap(), &wanted).await.unwrap();
        assert_eq!(verdict.start().unwrap().plan.snapshot, "checkpoint 4 of default/sums/local");
    }

    #[tokio::test]
    async fn a_job_that_keeps_nothing_starts_from_nothing_whatever_the_storage() {
        let mut job = manifest(SQL);
        job.spec.checkpoints.mode = floodmark_crds::CheckpointMode::Disabled;
        let down = Flaky::down(storage::open("memory://").unwrap());
        let verdict = check_state(&Planned::of(&job).unwrap(), &down, &latest()).await.unwrap();
        assert!(verdict.refusal().is_none() && verdict.start().unwrap().location.is_none());
    }

    #[tokio::test]
    async fn a_job_that_has_finished_is_told_so() {
        let storage = with_checkpoint("memory://").await;
        append(&storage, &planned().id, vec![Event::Finished { epoch: Epoch(4) }]).await;
        let finished =
            async |wanted: &Wanted| check_state(&planned(), &storage, wanted).await.unwrap().start().unwrap().finished;
        assert!(finished(&latest()).await);
        assert!(!finished(&exactly("4")).await);
    }
}
