//! The workers of a job, as its coordinator sees them.

use std::sync::Arc;

use floodmark_snapshot::{Env, Error, Result};
use tokio::sync::mpsc;

use crate::{
    RunSpec,
    words::{Built, Deployment, FromWorker, NotBuilt, ToWorker},
    worker::{self, Metrics},
};

/// See the header of this file. Dropped, it leaves the workers without a coordinator, and what they run ends.
pub(crate) struct Crew {
    orders: mpsc::UnboundedSender<ToWorker>,
    reports: mpsc::UnboundedReceiver<FromWorker>,
}

impl Crew {
    /// A worker in this process.
    pub(crate) fn local(spec: &Arc<RunSpec>, env: &Env, metrics: Metrics) -> Self {
        let (orders, theirs) = mpsc::unbounded_channel();
        let (to_us, reports) = mpsc::unbounded_channel();
        env.runtime.spawn(Box::pin(worker::run(spec.clone(), env.clone(), Arc::new(metrics), theirs, to_us)));
        Self { orders, reports }
    }

    /// Says something. A worker that is gone is met at the next report.
    pub(crate) fn tell(&self, order: ToWorker) {
        let _ = self.orders.send(order);
    }

    /// The next report.
    ///
    /// # Errors
    /// When there is no worker any more.
    pub(crate) async fn next(&mut self) -> Result<FromWorker> {
        let report = self.reports.recv().await;
        report.ok_or_else(|| Error::abort("internal error: the job's worker is gone"))
    }

    /// Has an attempt built.
    pub(crate) async fn deploy(&mut self, deployment: Deployment) -> Result<Built, NotBuilt> {
        self.tell(ToWorker::Deploy(Box::new(deployment)));
        loop {
            match self.next().await.map_err(NotBuilt::Task)? {
                FromWorker::Built(built) => return Ok(built),
                FromWorker::NotBuilt(why) => return Err(why),
                // Left over from what was before.
                _ => {}
            }
        }
    }

    /// Ends the attempt, and waits until nothing of it is left.
    ///
    /// # Errors
    /// When something may be left.
    pub(crate) async fn end(&mut self, cancel: bool) -> Result<()> {
        self.tell(ToWorker::End { cancel });
        loop {
            if let FromWorker::Gone(error) = self.next().await? {
                return error.map_or(Ok(()), Err);
            }
        }
    }
}
