//! A worker in a process of its own: it looks for the coordinator, does what that one says, and looks for it again when it is
//! lost. What ran for a coordinator that is lost has ended by then.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use floodmark_link::{
    control::{ControlClient, ControlReceiver, ControlSender},
    exchange::{self, Exchange, LostChannel},
    transport::Acceptors,
};
use floodmark_snapshot::{Disposition, Env, Error, Result};
use tokio::sync::{mpsc, watch};

use crate::{
    Network, Progress, RunSpec, WorkerPhase,
    leadership::Whereabouts,
    progress::Counters,
    words::{FromWorker, Hello, ToWorker},
};

/// From one look for the coordinator to the next, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(250));
/// Looks in vain before it is said, and before looks become rarer: a coordinator that ends takes its workers with it.
const SAY_AFTER: u32 = 10;
/// From one word on what has been counted to the next.
const COUNT_EVERY: Duration = Duration::from_secs(1);

type Up = ControlSender<FromWorker>;

/// Serves a job until `stop`.
///
/// # Errors
/// When it can't listen, or the coordinator will never take it.
pub(crate) async fn serve(
    spec: Arc<RunSpec>,
    env: Env,
    network: Network,
    coordinator: Whereabouts,
    slots: u32,
    mut stop: watch::Receiver<bool>,
    progress: Arc<Progress>,
) -> Result<()> {
    let current: Arc<Mutex<Option<Up>>> = Arc::default();
    let told = current.clone();
    let on_lost = Arc::new(move |LostChannel { channel, reason }: LostChannel| {
        let error = Error::retry(format!("a channel to subtask {} is lost: {reason}", channel.to));
        if let Some(up) = &*told.lock().unwrap_or_else(PoisonError::into_inner) {
            // If the coordinator is lost too, nobody has to know.
            let _ = up.send(&FromWorker::Failed { error, damaged: false });
        }
    });
    let exchange = Exchange::new(env.clone(), network.transport.clone(), on_lost);
    let acceptors = Acceptors::default().with(exchange::PURPOSE, Arc::new(exchange.clone()));
    let listening = network.transport.listen(&network.listen, Arc::new(acceptors)).await?;
    let hello = Hello { plan: spec.graph.fingerprint.clone(), slots, endpoint: listening.endpoint() };
    let client = ControlClient::new(env.clone(), network.transport.clone(), network.heartbeat);
    let counters = progress.counters.clone();
    let (mut in_vain, mut looks) = (0_u32, 0_usize);
    let serve = async {
        loop {
            let whereabouts = coordinator.clone();
            let place = env.blocking("the coordinator's whereabouts", move || whereabouts.endpoint(looks)).await?;
            looks = looks.wrapping_add(1);
            let connected = match place {
                Ok(place) => client.connect::<_, FromWorker, ToWorker>(&place, &hello).await.map(|c| (place, c)),
                Err(nobody) => Err(nobody),
            };
            let (place, (up, down)) = match connected {
                Ok(connected) => connected,
                Err(error) if error.disposition() == Disposition::Retry => {
                    in_vain = in_vain.saturating_add(1);
                    if in_vain == SAY_AFTER {
                        tracing::warn!(%error, "the coordinator can't be reached; looking for it again and again");
                    }
                    env.runtime.sleep(if in_vain < SAY_AFTER { RETRY.0 } else { RETRY.1 }).await;
                    continue;
                }
                Err(error) => return Err(error.context("serve the coordinator")),
            };
            in_vain = 0;
            tracing::info!("serving the coordinator at {place} with {slots} slots");
            *current.lock().unwrap_or_else(PoisonError::into_inner) = Some(up.clone());
            counters.reset();
            let reason = follow(&spec, &env, &counters, &exchange, up, down).await;
            current.lock().unwrap_or_else(PoisonError::into_inner).take();
            counters.enter(WorkerPhase::Looking);
            tracing::info!("the coordinator is lost: {reason}");
        }
    };
    let served = tokio::select! {
        biased;
        () = crate::coordinator::stopped(&mut stop) => Ok(()),
        served = serve => served,
    };
    if let Some(up) = current.lock().unwrap_or_else(PoisonError::into_inner).take() {
        up.close("the worker has been told to stop");
    }
    listening.close().await;
    served
}

/// Does what a coordinator says, until it is lost: the reason.
async fn follow(
    spec: &Arc<RunSpec>,
    env: &Env,
    counters: &Arc<Counters>,
    exchange: &Arc<Exchange>,
    up: Up,
    mut down: ControlReceiver<ToWorker>,
) -> String {
    let (to_worker, orders) = mpsc::unbounded_channel();
    let reports = up.clone();
    // What can't be sent is lost with the connection.
    let report = Box::new(move |report: FromWorker| drop(reports.send(&report)));
    let run = super::run(spec.clone(), env.clone(), counters.clone(), Some(exchange.clone()), orders, report);
    let listen = async {
        let mut tick = env.runtime.sleep(COUNT_EVERY);
        loop {
            tokio::select! {
                biased;
                order = down.recv() => match order {
                    Ok(order) => drop(to_worker.send(order)),
                    Err(lost) => return lost.reason,
                },
                () = &mut tick => {
                    let _ = up.send(&FromWorker::Counted(counters.here()));
                    tick = env.runtime.sleep(COUNT_EVERY);
                }
            }
        }
    };
    tokio::select! {
        biased;
        reason = listen => reason,
        () = run => "the worker's loop has ended".to_owned(),
    }
}
