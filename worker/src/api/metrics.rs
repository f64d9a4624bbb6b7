//! The metrics of a job and of a worker: which there are, and what they are called. The format is `exposition`'s.
//!
//! A coordinator tells of the whole job, as `floodmark_…`; a worker of its share, as `floodmark_worker_…`: so that what several
//! processes of a job say can be added up without counting anything twice.

use floodmark_dataflow::WATERMARK_MAX;

use super::{
    JobApi, Outline, WorkerApi,
    exposition::{Exposition, Kind},
    views::HealthView,
};
use crate::{CheckpointState, JobPhase, OperatorStatus, Progress, ProgressView};

/// What a coordinator tells of its job.
pub(super) fn of_job(api: &JobApi) -> String {
    let view = api.progress.view();
    let mut all = Exposition::default();
    let mut info = all.family("floodmark_job_info", Kind::Gauge, "Which job it is, and who runs it.");
    let job = &api.job;
    let labels: [(&str, &dyn std::fmt::Display); 4] =
        [("namespace", &job.namespace), ("name", &job.name), ("uid", &job.uid), ("holder", &api.holder)];
    info.sample(&labels, 1);
    let mut phase = all.family("floodmark_job_phase", Kind::Gauge, "1 for the phase that the job is in.");
    for name in JobPhase::ALL {
        phase.sample(&[("phase", &name.name())], name == view.phase);
    }
    all.single("floodmark_job_ready", Kind::Gauge, "1 if the job runs and all its state is there.", view.is_ready());
    all.single(
        "floodmark_job_restoring_subtasks",
        Kind::Gauge,
        "Subtasks whose state is not all there yet.",
        view.attempt.restoring as u64,
    );
    all.single("floodmark_job_parallelism", Kind::Gauge, "Subtasks per task.", u64::from(api.parallelism(&view)));
    all.single(
        "floodmark_job_max_parallelism",
        Kind::Gauge,
        "Number of key groups: the greatest parallelism.",
        u64::from(api.max_parallelism),
    );
    if let Some(attempt) = view.attempt.attempt {
        all.single("floodmark_job_attempt", Kind::Gauge, "Number of the attempt that runs, or ran last.", attempt.0);
    }
    all.single(
        "floodmark_job_restarts_total",
        Kind::Counter,
        "Attempts that have failed and were followed by another.",
        view.attempt.restarts,
    );
    checkpoints(&mut all, &view, &api.progress);
    tasks(&mut all, "floodmark", &api.graph, &view);
    operators(&mut all, "floodmark", &api.graph, &view);
    all.finish()
}

/// What a worker tells of its share.
pub(super) fn of_worker(api: &WorkerApi) -> String {
    let view = api.progress.view();
    let HealthView { phase, ready, restoring } = api.progress.worker_phase().into();
    let mut all = Exposition::default();
    let mut is = all.family("floodmark_worker_phase", Kind::Gauge, "1 for the phase that the worker is in.");
    for name in ["looking", "waiting", "building", "running"] {
        is.sample(&[("phase", &name)], name == phase);
    }
    all.single("floodmark_worker_ready", Kind::Gauge, "1 if the worker does what its coordinator says.", ready);
    all.single(
        "floodmark_worker_restoring_subtasks",
        Kind::Gauge,
        "Subtasks here whose state is not all there yet.",
        restoring as u64,
    );
    all.single("floodmark_worker_slots", Kind::Gauge, "Slices that it runs side by side.", u64::from(api.slots));
    tasks(&mut all, "floodmark_worker", &api.graph, &view);
    operators(&mut all, "floodmark_worker", &api.graph, &view);
    all.finish()
}

fn checkpoints(all: &mut Exposition, view: &ProgressView, progress: &Progress) {
    let counts = &view.checkpoints;
    let mut ended = all.family(
        "floodmark_checkpoints_total",
        Kind::Counter,
        "Checkpoints that were completed, that failed, or that a later one was complete before.",
    );
    for (state, n) in [("completed", counts.completed), ("failed", counts.failed), ("overtaken", counts.overtaken)] {
        ended.sample(&[("state", &state)], n);
    }
    let under_way = progress.checkpoints().iter().filter(|r| r.state == CheckpointState::UnderWay).count();
    all.single("floodmark_checkpoints_under_way", Kind::Gauge, "Checkpoints whose barriers are out.", under_way as u64);
    let Some(last) = counts.last else { return };
    let mut gauge = |name: &str, help, value: f64| {
        all.single(&format!("floodmark_last_checkpoint_{name}"), Kind::Gauge, help, value);
    };
    gauge("epoch", "Number of the newest completed checkpoint.", last.epoch.0 as f64);
    gauge("trigger_timestamp_seconds", "When it was triggered, since the Unix epoch.", seconds(last.triggered_at_ms));
    gauge("duration_seconds", "From its trigger to the last acknowledgement.", last.duration_ms as f64 / 1e3);
    gauge("size_bytes", "Bytes of all its shards.", last.size as f64);
}

fn tasks(all: &mut Exposition, prefix: &str, graph: &Outline, view: &ProgressView) {
    let tasks = graph.tasks(view);
    let help = "Subtasks that run.";
    let mut subtasks = all.family(format!("{prefix}_task_subtasks"), Kind::Gauge, help);
    tasks.iter().for_each(|t| subtasks.sample(&[("task", &t.task)], u64::from(t.subtasks)));
    let help = "Time of all subtasks of a task, by what it went to: work, waiting for input, or for room in an output.";
    let mut spent = all.family(format!("{prefix}_task_time_seconds_total"), Kind::Counter, help);
    for t in &tasks {
        for (state, time) in [("busy", t.spent.busy), ("idle", t.spent.idle), ("backPressured", t.spent.back_pressured)]
        {
            spent.sample(&[("task", &t.task), ("state", &state)], time.as_secs_f64());
        }
    }
}

/// A family of a sample per operator.
type Counter = (&'static str, Kind, &'static str, fn(&OperatorStatus) -> u64);

const OPERATORS: [Counter; 7] = [
    ("rows_in_total", Kind::Counter, "Rows that came into an operator.", |o| o.rows_in),
    ("rows_out_total", Kind::Counter, "Rows that left an operator; of a sink, rows written.", |o| o.rows_out),
    ("bytes_total", Kind::Counter, "Encoded bytes read by a source or written by a sink.", |o| o.bytes),
    ("late_rows_total", Kind::Counter, "Rows that came after their window had closed.", |o| o.late),
    ("bad_records_total", Kind::Counter, "Records that could not be decoded.", |o| o.bad),
    ("state_rows", Kind::Gauge, "Keys in state at the last checkpoint.", |o| o.state_rows),
    ("state_bytes", Kind::Gauge, "Bytes of state at the last checkpoint.", |o| o.state_bytes),
];

fn operators(all: &mut Exposition, prefix: &str, graph: &Outline, view: &ProgressView) {
    for (name, kind, help, of) in OPERATORS {
        let mut family = all.family(format!("{prefix}_operator_{name}"), kind, help);
        for (task, operator, _) in graph.operators(view) {
            family.sample(&[("task", &task), ("operator", &operator.uid)], of(operator));
        }
    }
    let help = "The least watermark of an operator's subtasks, since the Unix epoch; +Inf once its input has ended.";
    let mut watermarks = all.family(format!("{prefix}_operator_watermark_seconds"), Kind::Gauge, help);
    for (task, operator, _) in graph.operators(view) {
        if let Some(watermark) = operator.watermark {
            let at = if watermark >= WATERMARK_MAX { f64::INFINITY } else { seconds(watermark) };
            watermarks.sample(&[("task", &task), ("operator", &operator.uid)], at);
        }
    }
}

fn seconds(ms: i64) -> f64 {
    ms as f64 / 1e3
}
