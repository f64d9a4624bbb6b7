//! `floodmark plan`: what a snapshot's state would become in a job. Starts nothing and writes nothing: it is known before
//! anything stops.

use std::path::Path;

use floodmark_crds::CheckpointMode;
use floodmark_dataflow::{JobGraph, graph::NodeKind};
use floodmark_snapshot::{
    Epoch, Manifest,
    log::LogState,
    restore::{self, Fate, Found, Line, Origin, Reference, StatePlan, Taker},
};
use floodmark_worker::takers;
use serde::Serialize;

use crate::{
    args::{Output, PlanArgs},
    exit::{Exit, Failure},
    history::{History, find_at, unusable},
    job::{self, Job},
    screen::print,
};

/// Plans; exit code 4 if the state does not fit.
pub(crate) fn plan(args: &PlanArgs) -> Result<Exit, Failure> {
    let job = Job::load(&args.job, args.parallelism)?;
    let spec = &job.manifest.spec;
    if spec.checkpoints.mode == CheckpointMode::Disabled {
        return Err(Failure::input(
            "the job takes no snapshots and starts from none: spec.checkpoints.mode is Disabled",
        ));
    }
    let wanted = match (&args.from, spec.restore.from.as_deref()) {
        (Some(reference), _) => Wanted::Asked(job::absolute_reference(reference.clone())?),
        (None, Some(initial)) => {
            let initial = initial.parse().map_err(|e| Failure::input(format!("spec.restore.from: {e}")))?;
            Wanted::LatestOr(job::absolute_reference(initial)?)
        }
        (None, None) => Wanted::Asked(Reference::Latest),
    };
    let location = job::storage(args.storage.as_deref(), &job.manifest)?;
    let start = job::runtime()?.block_on(find(&job, location, wanted))?;
    let mut report = Report::new(&job, &start);
    if args.online {
        report.sources = ask_sources(&job.graph, start.manifest.as_ref());
    }
    let admitted = start.plan.admit(spec.restore.allow_dropped_state);
    report.problem = admitted.err().map(|e| e.to_string());
    match args.output {
        Output::Json => print(&format!("{}\n", report.json()?)),
        Output::Text => print(&report.text(&start.plan)),
    }
    match report.problem {
        None => Ok(Exit::Done),
        Some(problem) => Err(unusable(problem)),
    }
}

/// Refuses a start whose state does not fit, before the start fences whoever runs the job now. `initial` is what a job
/// without a past starts from. What can't be read is left to the start itself, which says so.
pub(crate) async fn admit(
    job: &Job,
    location: &str,
    restore: &Reference,
    initial: Option<&Reference>,
) -> Result<(), Failure> {
    if job.manifest.spec.checkpoints.mode == CheckpointMode::Disabled {
        return Ok(());
    }
    let Ok(history) = History::of(job.id.clone(), location.to_owned()).await else { return Ok(()) };
    let state = &history.state;
    let found = match Origin::of_start(restore, initial, state) {
        Origin::Nothing => return Ok(()),
        Origin::Own if state.retained.is_empty() || state.finished.is_some() => return Ok(()),
        Origin::Own => history.find(&Reference::Latest).await?,
        Origin::From(reference) => history.find(reference).await?,
    };
    let start = Start::of(&found, job, &takers(&job.graph), state.committed, state.last_epoch.next())?;
    start.plan.admit(job.manifest.spec.restore.allow_dropped_state).map_err(unusable)
}

/// What the job shall start from.
enum Wanted {
    /// This.
    Asked(Reference),
    /// Its newest checkpoint; if it has no past, this.
    LatestOr(Reference),
}

/// What the job would start from.
struct Start {
    /// Where the snapshot is; `None` if there is none.
    location: Option<String>,
    /// As the job would take it over.
    manifest: Option<Manifest>,
    plan: StatePlan,
    /// The job has finished: a start would do nothing.
    finished: bool,
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

    fn of(found: &Found, job: &Job, takers: &[Taker], committed: Epoch, next: Epoch) -> Result<Self, Failure> {
        let original = &found.snapshot.manifest;
        restore::check_format(original).map_err(unusable)?;
        let manifest = if found.own { (**original).clone() } else { found.adopted_as(next) };
        let (fingerprint, max_parallelism) = (&job.graph.fingerprint, job.manifest.spec.max_parallelism);
        let mut plan = StatePlan::new(&manifest, takers, fingerprint, max_parallelism, committed);
        plan.snapshot = format!("checkpoint {} of {}", original.epoch, original.job);
        Ok(Self { location: Some(found.snapshot.location()), manifest: Some(manifest), plan, finished: false })
    }
}

impl Wanted {
    /// What it comes to in a job with this past. A snapshot that is asked for is meant whatever the job was started from before.
    fn origin(&self, state: &LogState) -> Origin<'_> {
        match self {
            Self::Asked(reference) => Origin::of(reference),
            Self::LatestOr(initial) => Origin::of_start(&Reference::Latest, Some(initial), state),
        }
    }
}

async fn find(job: &Job, location: String, wanted: Wanted) -> Result<Start, Failure> {
    let takers = takers(&job.graph);
    let never_ran = !location.contains("://") && !Path::new(&location).exists();
    if never_ran {
        return match wanted.origin(&LogState::default()) {
            Origin::From(Reference::Location(at)) => Start::of(&find_at(at).await?, job, &takers, Epoch(0), Epoch(1)),
            Origin::From(named) => {
                Err(unusable(format!("there is no snapshot '{named}': job {} never ran in {location}", job.id)))
            }
            Origin::Own | Origin::Nothing => Ok(Start::from_nothing("no snapshot: the job never ran", &takers)),
        };
    }
    let history = History::of(job.id.clone(), location).await?;
    let state = &history.state;
    let origin = wanted.origin(state);
    let found = match origin {
        Origin::Nothing => return Ok(Start::from_nothing("no snapshot, as told to", &takers)),
        Origin::Own if state.retained.is_empty() => {
            return match restore::nothing_intact(&*history.storage, &job.id, state, &[]) {
                Some(nothing) => Err(unusable(nothing)),
                None => Ok(Start::from_nothing("no snapshot: the job has completed no checkpoint", &takers)),
            };
        }
        Origin::Own => history.find(&Reference::Latest).await?,
        Origin::From(reference) => history.find(reference).await?,
    };
    let mut start = Start::of(&found, job, &takers, state.committed, state.last_epoch.next())?;
    let mut own = state.retained.iter().chain(&state.abandoned).filter(|r| found.own && r.from.is_none());
    let entry = own.rfind(|r| Some(&r.manifest) == start.manifest.as_ref());
    start.location = entry.map(|r| history.locate_entry(r.seq)).or(start.location);
    start.finished = origin == Origin::Own && state.finished.is_some();
    Ok(start)
}

/// What a plan says, for programs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    job: String,
    parallelism: u32,
    key_groups: u16,
    /// Which snapshot, in words.
    snapshot: String,
    /// Where it is; null for a start from nothing.
    location: Option<String>,
    /// Why it can't be restored, and what would make it possible; null if it can.
    problem: Option<String>,
    /// The job has finished: a start would do nothing.
    finished: bool,
    operators: Vec<OperatorReport>,
    /// With --online.
    sources: Vec<SourceReport>,
}

/// One operator of a plan.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct OperatorReport {
    uid: String,
    kind: String,
    /// How much state there is, in words.
    amount: String,
    /// `kept`, `changed`, `new`, `lost` or `refused`.
    fate: &'static str,
    /// Columns that begin empty.
    added: Vec<String>,
    /// Columns whose state is lost.
    lost: Vec<String>,
    /// Why it is lost or refused.
    reasons: Vec<String>,
    /// Number of subtasks in the snapshot, and in the job; null where there is none.
    parallelism_before: Option<u32>,
    parallelism: Option<u32>,
}

/// What has become of a source's splits since the snapshot.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct SourceReport {
    uid: String,
    /// In the snapshot.
    splits: usize,
    new: Vec<String>,
    gone: Vec<String>,
    /// Why the source can't be read from where the snapshot left it.
    error: Option<String>,
}

impl Report {
    fn new(job: &Job, start: &Start) -> Self {
        let parallelism = job.manifest.spec.parallelism;
        let operator = |line: &Line| {
            let (fate, added, lost, reasons) = match line.fate.clone() {
                Fate::Kept => ("kept", vec![], vec![], vec![]),
                Fate::Changed { added, lost } => ("changed", added, lost, vec![]),
                Fate::New => ("new", vec![], vec![], vec![]),
                Fate::Lost(reason) => ("lost", vec![], vec![], vec![reason]),
                Fate::Refused(reasons) => ("refused", vec![], vec![], reasons),
            };
            let before = start.manifest.as_ref().and_then(|m| m.operators.get(&line.uid)).map(|o| o.parallelism);
            OperatorReport {
                uid: line.uid.to_string(),
                kind: line.kind.clone(),
                amount: line.amount.clone(),
                fate,
                added,
                lost,
                reasons,
                parallelism_before: before,
                parallelism: (fate != "lost").then_some(parallelism),
            }
        };
        Self {
            job: job.id.to_string(),
            parallelism,
            key_groups: job.manifest.spec.max_parallelism,
            snapshot: start.plan.snapshot.clone(),
            location: start.location.clone(),
            problem: None,
            finished: start.finished,
            operators: start.plan.lines.iter().map(operator).collect(),
            sources: Vec::new(),
        }
    }

    fn json(&self) -> Result<String, Failure> {
        serde_json::to_string_pretty(self).map_err(|e| unusable(format!("print the plan: {e}")))
    }

    fn text(&self, plan: &StatePlan) -> String {
        let mut text = format!("job {}: parallelism {}, {} key groups\n", self.job, self.parallelism, self.key_groups);
        text += &match &self.location {
            Some(location) => format!("from {location}\n{plan}\n"),
            None => format!("from {plan}\n"),
        };
        for operator in &self.operators {
            if let (Some(before), Some(now)) = (operator.parallelism_before, operator.parallelism)
                && before != now
            {
                text += &format!("  {}: {before} -> {now} subtasks\n", operator.uid);
            }
        }
        for source in &self.sources {
            text += &source.text();
        }
        if self.finished {
            text += "the job has finished: a start would do nothing (--restore none runs it anew)\n";
        }
        if self.problem.is_none() {
            text += "it can be restored as it stands\n";
        }
        text
    }
}

impl SourceReport {
    fn text(&self) -> String {
        let Self { uid, splits, new, gone, error } = self;
        if let Some(error) = error {
            return format!("  {uid}: {error}\n");
        }
        let mut text = format!("  {uid}: {splits} splits in the snapshot");
        for (what, names) in [("new", new), ("gone", gone)] {
            if !names.is_empty() {
                text += &format!("; {what}: {}", names.join(", "));
            }
        }
        text + "\n"
    }
}

/// Asks every source for its splits of today. What can't be read is told in the answer.
fn ask_sources(graph: &JobGraph, manifest: Option<&Manifest>) -> Vec<SourceReport> {
    let mut reports = Vec::new();
    for (_, node) in graph.nodes() {
        let NodeKind::Source(source) = &node.node else { continue };
        let restored = manifest.and_then(|m| m.operators.get(&node.uid)).map_or(&[][..], |o| o.splits.as_slice());
        let mut report =
            SourceReport { uid: node.uid.to_string(), splits: restored.len(), new: vec![], gone: vec![], error: None };
        match source.factory.splits(restored) {
            Ok(now) => {
                let missing = |s: &str, from: &[floodmark_snapshot::SplitState]| from.iter().all(|o| o.split != s);
                report.new = now.iter().map(|s| s.split.clone()).filter(|s| missing(s, restored)).collect();
                report.gone = restored.iter().map(|s| s.split.clone()).filter(|s| missing(s, &now)).collect();
            }
            Err(error) => report.error = Some(error.to_string()),
        }
        reports.push(report);
    }
    reports
}
