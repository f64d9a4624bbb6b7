//! `floodmark plan`: what a snapshot's state would become in a job. Starts nothing and writes nothing: it is known before
//! anything stops.

use floodmark_admission::{Start, Verdict, Wanted, check_state_at};
use floodmark_dataflow::{JobGraph, graph::NodeKind};
use floodmark_snapshot::{
    Manifest,
    restore::{Fate, Line, Origin, Reference, StatePlan},
};
use serde::Serialize;

use crate::{
    args::{Output, PlanArgs},
    exit::{Exit, Failure},
    history::{History, unusable},
    job::{self, Job},
    screen::print,
};

/// Plans; exit code 4 if the state does not fit.
pub(crate) fn plan(args: &PlanArgs) -> Result<Exit, Failure> {
    let job = job::load(&args.job, args.parallelism)?;
    if job.keeps_nothing() {
        return Err(Failure::input(
            "the job takes no snapshots and starts from none: spec.checkpoints.mode is Disabled",
        ));
    }
    let wanted = match &args.from {
        Some(reference) => Wanted::Exactly(job::absolute_reference(reference.clone())?),
        None => Wanted::Start { restore: Reference::Latest, initial: initial(&job)? },
    };
    let location = job::storage(args.storage.as_deref(), &job.manifest)?;
    let verdict = job::runtime()?.block_on(check_state_at(&job, &location, &wanted)).map_err(unusable)?;
    let (start, problem) = match verdict {
        Verdict::Admitted(start) => (start, None),
        Verdict::Refused(refusal) => match refusal.start {
            Some(start) => (start, Some(refusal.reason)),
            None => return Err(unusable(refusal.reason)),
        },
    };
    let mut report = Report::new(&job, &start);
    if args.online {
        report.sources = ask_sources(&job.graph, start.manifest.as_ref());
    }
    report.problem = problem;
    match args.output {
        Output::Json => print(&format!("{}\n", report.json()?)),
        Output::Text => print(&report.text(&start.plan)),
    }
    match report.problem {
        None => Ok(Exit::Done),
        Some(problem) => Err(unusable(problem)),
    }
}

/// What a job without a past starts from, as its manifest has it.
pub(crate) fn initial(job: &Job) -> Result<Option<Reference>, Failure> {
    job.initial().map_err(Failure::input)?.map(job::absolute_reference).transpose()
}

/// Refuses a start whose state does not fit, before the start fences whoever runs the job now. `initial` is what a job
/// without a past starts from. What can't be read is left to the start itself, which says so.
pub(crate) async fn admit(
    job: &Job,
    location: &str,
    restore: &Reference,
    initial: Option<&Reference>,
) -> Result<(), Failure> {
    if job.keeps_nothing() {
        return Ok(());
    }
    let Ok(history) = History::of(job.id.clone(), location.to_owned()).await else { return Ok(()) };
    let wanted = Wanted::Start { restore: restore.clone(), initial: initial.cloned() };
    if wanted.origin(&history.state) == Origin::Own && history.state.finished.is_some() {
        return Ok(());
    }
    match history.check(job, &wanted).await.map_err(unusable)? {
        Verdict::Admitted(_) => Ok(()),
        Verdict::Refused(refusal) => Err(unusable(refusal.reason)),
    }
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
