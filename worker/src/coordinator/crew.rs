//! The workers of a job, as its coordinator sees them: who is there, who runs what, and what they say.
//!
//! Invariant: what an attempt is told reaches all its workers or the attempt fails; a worker that is lost is never told
//! anything again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use floodmark_link::transport::Endpoint;
use floodmark_snapshot::{Env, Error, Result};
use tokio::sync::mpsc;

use super::assignment::{Placement, even_out, place};
use crate::{
    RunSpec,
    progress::Counters,
    words::{Built, Deployment, FromWorker, NotBuilt, ToWorker, WorkerId},
    worker,
};

/// A worker that can be told something.
pub(crate) struct Member {
    /// Slices that it runs side by side, if not crowded.
    pub(crate) slots: u32,
    /// Where it listens for channels.
    pub(crate) endpoint: Option<Endpoint>,
    /// Passes an order on. Says nothing if it can't: then the worker is lost, and that is told as [`News::Lost`].
    pub(crate) orders: Box<dyn Fn(ToWorker) + Send + Sync>,
}

/// What comes from workers, and of them.
pub(crate) enum News {
    /// There is another worker.
    Joined(WorkerId, Member),
    /// A worker says something.
    Report(WorkerId, FromWorker),
    /// A worker is gone, and why that is thought.
    Lost(WorkerId, String),
}

/// See the header of this file. Dropped, it leaves the workers without a coordinator, and what they run ends.
pub(crate) struct Crew {
    env: Env,
    members: BTreeMap<WorkerId, Member>,
    news: mpsc::UnboundedReceiver<News>,
    placement: Placement,
    /// Since when slices could be spread better, by the monotonic clock.
    uneven_since: Option<Duration>,
    /// Where what workers have counted is told.
    counters: Arc<Counters>,
}

impl Crew {
    /// Workers that come and go, as the news say.
    pub(crate) fn new(env: &Env, counters: Arc<Counters>, news: mpsc::UnboundedReceiver<News>) -> Self {
        let (members, placement) = (BTreeMap::new(), Placement::default());
        Self { env: env.clone(), members, news, placement, uneven_since: None, counters }
    }

    /// One worker, in this process, with room for everything.
    pub(crate) fn local(spec: &Arc<RunSpec>, env: &Env, counters: Arc<Counters>) -> Self {
        const HERE: WorkerId = WorkerId(0);
        let (to_worker, orders) = mpsc::unbounded_channel();
        let (news, ours) = mpsc::unbounded_channel();
        let to_us = news.clone();
        let report = Box::new(move |report| drop(to_us.send(News::Report(HERE, report))));
        let run = worker::run(spec.clone(), env.clone(), counters.clone(), None, orders, report);
        let gone = news.clone();
        env.runtime.spawn(Box::pin(async move {
            run.await;
            let _ = gone.send(News::Lost(HERE, "it has ended".to_owned()));
        }));
        let orders = Box::new(move |order| drop(to_worker.send(order)));
        // The receiver is still here.
        let _ = news.send(News::Joined(HERE, Member { slots: u32::MAX, endpoint: None, orders }));
        Self::new(env, counters, ours)
    }

    /// Decides where subtasks run, once there are workers enough. Those that are there share out what is left over if for so
    /// long no other has come.
    ///
    /// # Errors
    /// When there never will be.
    pub(crate) async fn assemble(&mut self, parallelism: u32, crowd_after: Option<Duration>) -> Result<()> {
        while let Ok(news) = self.news.try_recv() {
            self.take(news);
        }
        let mut crowd = crowd_after == Some(Duration::ZERO);
        let runtime = self.env.runtime.clone();
        let patience = || match crowd_after {
            Some(patience) => runtime.sleep(patience),
            None => Box::pin(std::future::pending()),
        };
        let mut quiet = patience();
        loop {
            let slots = self.slots();
            if let Some(placement) = place(parallelism, &slots, &self.placement, crowd) {
                let workers: Vec<String> = placement.0.iter().map(ToString::to_string).collect();
                tracing::info!("slices run on {}", workers.join(", "));
                self.placement = placement;
                self.uneven_since = None;
                self.look_at_the_spread();
                return Ok(());
            }
            let free: u64 = slots.values().map(|s| u64::from(*s)).sum();
            tracing::info!("waiting for workers: {free} of {parallelism} slots are there");
            tokio::select! {
                biased;
                news = self.news.recv() => {
                    let news = news.ok_or_else(no_more)?;
                    if matches!(news, News::Joined(..)) {
                        (crowd, quiet) = (false, patience());
                    }
                    // What comes from attempts that are over is of no interest.
                    self.take(news);
                }
                () = &mut quiet, if !crowd => crowd = true,
            }
        }
    }

    fn slots(&self) -> BTreeMap<WorkerId, u32> {
        self.members.iter().map(|(id, m)| (*id, m.slots)).collect()
    }

    /// Subtasks per task where [`Crew::assemble`] has placed them.
    pub(crate) fn parallelism(&self) -> u32 {
        self.placement.0.len() as u32
    }

    /// Whether so many subtasks per task can only run if some share a slot.
    pub(crate) fn crowds(&self, parallelism: u32) -> bool {
        place(parallelism, &self.slots(), &Placement::default(), false).is_none()
    }

    /// For how long slices could have been spread better over the workers that are there.
    pub(crate) fn uneven_for(&self) -> Duration {
        self.uneven_since.map_or(Duration::ZERO, |since| self.env.clock.monotonic().saturating_sub(since))
    }

    /// Has the next attempt begin with its slices spread as well as can be.
    pub(crate) fn even_out(&mut self) {
        if let Some(placement) = even_out(&self.slots(), &self.placement) {
            self.placement = placement;
        }
        self.uneven_since = None;
    }

    fn look_at_the_spread(&mut self) {
        let better = even_out(&self.slots(), &self.placement);
        self.uneven_since = better.map(|_| self.uneven_since.unwrap_or_else(|| self.env.clock.monotonic()));
    }

    /// Tells all workers.
    pub(crate) fn tell(&self, order: ToWorker) {
        self.members.values().for_each(|m| (m.orders)(order.clone()));
    }

    /// The next report of the present attempt. That one of its workers is lost is a failure.
    ///
    /// # Errors
    /// When there will be no workers any more.
    pub(crate) async fn next(&mut self) -> Result<FromWorker> {
        loop {
            let news = self.news.recv().await.ok_or_else(no_more)?;
            if let Some((_, report)) = self.take(news) {
                return Ok(report);
            }
        }
    }

    /// Takes note of who is there. Answers with what the present attempt is to know.
    fn take(&mut self, news: News) -> Option<(WorkerId, FromWorker)> {
        match news {
            News::Joined(id, member) => {
                tracing::debug!("{id} is there");
                self.members.insert(id, member);
                self.look_at_the_spread();
                None
            }
            News::Report(id, FromWorker::Counted(counted)) => {
                self.counters.told(id, counted);
                None
            }
            News::Report(id, report) => self.members.contains_key(&id).then_some((id, report)),
            News::Lost(id, reason) => {
                self.counters.lost(id);
                self.members.remove(&id)?;
                let error = Error::retry(format!("{id} is lost: {reason}"));
                tracing::warn!("{error}");
                self.look_at_the_spread();
                self.placement.0.contains(&id).then_some((id, FromWorker::Failed { error, damaged: false }))
            }
        }
    }

    /// Has an attempt built where [`Crew::assemble`] has placed it.
    pub(crate) async fn deploy(&mut self, deployment: Deployment) -> Result<Built, NotBuilt> {
        let mut building: BTreeSet<WorkerId> = self.placement.0.iter().copied().collect();
        for id in &building {
            let placement = self.placement.0.clone();
            let endpoints = self.members.iter().filter_map(|(id, m)| Some((*id, m.endpoint.clone()?))).collect();
            let theirs = Deployment { placement, endpoints, worker: *id, ..deployment.clone() };
            match self.members.get(id) {
                Some(member) => (member.orders)(ToWorker::Deploy(Box::new(theirs))),
                None => return Err(NotBuilt::Task(Error::retry(format!("{id} is lost")))),
            }
        }
        let mut all = Built::default();
        while !building.is_empty() {
            let news = self.news.recv().await.ok_or_else(|| NotBuilt::Task(no_more()))?;
            match self.take(news) {
                Some((id, FromWorker::Built(built))) => {
                    building.remove(&id);
                    all.committers.extend(built.committers);
                    all.arriving.extend(built.arriving);
                }
                Some((_, FromWorker::NotBuilt(why))) => return Err(why),
                Some((_, FromWorker::Failed { error, .. })) => return Err(NotBuilt::Task(error)),
                // Left over from what was before.
                Some(_) | None => {}
            }
        }
        Ok(all)
    }

    /// Ends the attempt, and waits until nothing of it is left.
    ///
    /// # Errors
    /// When something may be left.
    pub(crate) async fn end(&mut self, cancel: bool) -> Result<()> {
        self.tell(ToWorker::End { cancel });
        let mut there: BTreeSet<WorkerId> = self.members.keys().copied().collect();
        let mut left = Ok(());
        while !there.is_empty() {
            let news = self.news.recv().await.ok_or_else(no_more)?;
            if let News::Lost(id, _) = &news {
                there.remove(id);
            }
            if let Some((id, FromWorker::Gone(error))) = self.take(news) {
                there.remove(&id);
                left = left.and(error.map_or(Ok(()), Err));
            }
        }
        left
    }
}

fn no_more() -> Error {
    Error::abort("internal error: the job's workers are gone")
}
