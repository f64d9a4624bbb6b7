//! Workers of other processes, as they come to the coordinator.

use std::sync::Arc;

use floodmark_link::{
    control::{self, Accepted, ControlServer},
    transport::{Acceptors, Listening},
};
use floodmark_snapshot::{Env, Result};
use tokio::sync::mpsc;

use super::crew::{Member, News};
use crate::{
    Network,
    words::{FromWorker, Hello, ToWorker, WorkerId},
};

/// Listens for workers that have planned the job as this process has, and passes on what comes of them.
///
/// # Errors
/// When the process can't listen there.
pub(crate) async fn listen(
    network: &Network,
    env: &Env,
    plan: String,
    news: mpsc::UnboundedSender<News>,
) -> Result<Box<dyn Listening>> {
    let (server, accepted) = ControlServer::<Hello, FromWorker, ToWorker>::new(env.clone(), network.heartbeat);
    let acceptors = Acceptors::default().with(control::PURPOSE, server);
    let listening = network.transport.listen(&network.listen, Arc::new(acceptors)).await?;
    env.runtime.spawn(Box::pin(welcome(accepted, plan, news, env.clone())));
    Ok(listening)
}

async fn welcome(
    mut accepted: mpsc::Receiver<Accepted<Hello, FromWorker, ToWorker>>,
    plan: String,
    news: mpsc::UnboundedSender<News>,
    env: Env,
) {
    let mut next = 1;
    while let Some(Accepted { peer, hello, sender, mut receiver }) = accepted.recv().await {
        if hello.plan != plan {
            tracing::warn!(%peer, "turned a worker away: it has planned another job");
            sender.close("this worker has planned the job otherwise than its coordinator: give both the same manifest");
            continue;
        }
        let id = WorkerId(next);
        next += 1;
        tracing::info!("{id} has come: {peer}, {} slots", hello.slots);
        // What can't be sent is lost with the connection, and of that the receiver tells.
        let orders = Box::new(move |order: ToWorker| drop(sender.send(&order)));
        let member = Member { slots: hello.slots, endpoint: Some(hello.endpoint), orders };
        let to_crew = news.clone();
        if to_crew.send(News::Joined(id, member)).is_err() {
            return;
        }
        env.runtime.spawn(Box::pin(async move {
            let reason = loop {
                match receiver.recv().await {
                    Ok(report) => {
                        if to_crew.send(News::Report(id, report)).is_err() {
                            return;
                        }
                    }
                    Err(lost) => break lost.reason,
                }
            };
            let _ = to_crew.send(News::Lost(id, reason));
        }));
    }
}
