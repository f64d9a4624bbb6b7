//! Drives each task on a thread of its own: step, forward its events, park on its signal.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use floodmark_dataflow::{
    TaskId,
    channel::Signal,
    task::{Progress, Task, TaskEvent},
};
use floodmark_snapshot::{Error, Result, env::spawn_thread};

/// Which subtask of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SubtaskId {
    /// Its task.
    pub(crate) task: TaskId,
    /// Its index in the task.
    pub(crate) index: u32,
}

/// What a task's thread tells the coordinator.
#[derive(Debug)]
pub(crate) enum TaskReport {
    /// An event of the task.
    Event(SubtaskId, TaskEvent),
    /// The task failed; its thread has ended.
    Failed(SubtaskId, Error),
}

/// Starts the thread of a task. It ends when the task is done, has failed, or nobody listens any more.
pub(crate) fn start(
    id: SubtaskId,
    name: String,
    task: Task,
    signal: Arc<Signal>,
    report: impl Fn(TaskReport) + Send + 'static,
) -> Result<std::thread::JoinHandle<()>> {
    spawn_thread(name, move || {
        // A panic is a defect of ours; it must still end the job with a message rather than leave it hanging.
        let outcome =
            catch_unwind(AssertUnwindSafe(|| drive(task, &signal, |event| report(TaskReport::Event(id, event)))));
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => report(TaskReport::Failed(id, error)),
            Err(panic) => {
                let what = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied())
                    .unwrap_or("unknown cause");
                report(TaskReport::Failed(id, Error::abort(format!("internal error: task panicked: {what}"))));
            }
        }
    })
}

fn drive(mut task: Task, signal: &Signal, report: impl Fn(TaskEvent)) -> Result<()> {
    let mut events = Vec::new();
    loop {
        let progress = task.step(&mut events)?;
        events.drain(..).for_each(&report);
        match progress {
            Progress::Ready => {}
            Progress::Waiting { until } => signal.wait(until),
            Progress::Done => return Ok(()),
        }
    }
}
