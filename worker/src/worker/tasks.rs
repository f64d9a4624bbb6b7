//! A task as a machine: it steps, and forwards what it says.

use std::sync::Arc;

use floodmark_dataflow::{
    channel::Signal,
    task::{Progress, Task, TaskEvent},
};
use floodmark_snapshot::{
    Env, Error, Result,
    runtime::{Machine, Turn},
};
use tokio::sync::oneshot;

use crate::words::SubtaskId;

/// What a task's thread tells its worker.
#[derive(Debug)]
pub(super) enum TaskReport {
    /// An event of the task.
    Event(SubtaskId, TaskEvent),
    /// The task failed; its thread has ended.
    Failed(SubtaskId, Error),
}

/// Completes when a task is gone, however it ended.
pub(super) type Ended = oneshot::Receiver<()>;

/// Starts a task. It ends when it is done or has failed.
pub(super) fn start(
    id: SubtaskId,
    task: Task,
    signal: Arc<Signal>,
    env: &Env,
    report: impl Fn(TaskReport) + Send + 'static,
) -> Result<Ended> {
    let (alive, ended) = oneshot::channel();
    env.runtime.drive(
        format!("task {id}"),
        Box::new(Driven { id, task, events: Vec::new(), signal, report, _alive: alive }),
    )?;
    Ok(ended)
}

struct Driven<R> {
    id: SubtaskId,
    task: Task,
    /// Empty between steps; kept for its allocation.
    events: Vec<TaskEvent>,
    signal: Arc<Signal>,
    report: R,
    /// Dropped with the task.
    _alive: oneshot::Sender<()>,
}

impl<R: Fn(TaskReport) + Send> Machine for Driven<R> {
    fn step(&mut self) -> Turn {
        let progress = match self.task.step(&mut self.events) {
            Ok(progress) => progress,
            Err(error) => {
                (self.report)(TaskReport::Failed(self.id, error));
                return Turn::Done;
            }
        };
        for event in self.events.drain(..) {
            (self.report)(TaskReport::Event(self.id, event));
        }
        match progress {
            Progress::Ready => Turn::Ready,
            Progress::Waiting { until } => Turn::Waiting { until },
            Progress::Done => Turn::Done,
        }
    }

    fn signal(&self) -> &Arc<Signal> {
        &self.signal
    }

    fn panicked(&mut self, what: &str) {
        (self.report)(TaskReport::Failed(self.id, Error::abort(format!("internal error: task panicked: {what}"))));
    }
}
