//! The controller's process: reads its arguments, stands for election, and looks after jobs until it is told to stop.

use std::{process::ExitCode, sync::Arc};

use anyhow::Context as _;
use clap::Parser as _;
use floodmark_controller::{
    args::Args,
    effects::{Operator, Reach, Settings},
    election::{Candidate, Election},
    metrics::{Counting, Metrics},
    objects::Defaults,
    serving::{self, Told},
    webhook::{Place, Webhook},
};
use floodmark_snapshot::Env;
use kube::{Client, Config, client::ClientBuilder};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// How long a connection to the API server may take.
const CONNECT_WITHIN: std::time::Duration = std::time::Duration::from_secs(5);

/// Jobs that are planned, and keys that are made, at the same time.
const BLOCKING_MAX: usize = 2;

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_target(false).init();
    floodmark_footprint::keep_small();
    // One that passes run in, one for connections, and few to plan in: each thread keeps memory of its own.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(1).max_blocking_threads(BLOCKING_MAX).enable_all().build();
    let ended = runtime.context("start").and_then(|runtime| {
        let ended = runtime.block_on(run(args));
        // What is under way may be done again by whoever comes next.
        runtime.shutdown_background();
        ended
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    let env = Env::system();
    let metrics = Arc::new(Metrics::default());
    let client = connect(&metrics).await?;
    let settings = Settings {
        namespaces: args.watch_namespaces.clone(),
        defaults: Defaults {
            image: args.image.clone(),
            image_pull_policy: args.image_pull_policy.clone(),
            controller_namespace: args.namespace.clone(),
            controller_labels: args.pod_labels.iter().cloned().collect(),
            cluster_domain: args.cluster_domain.clone(),
            ipv6: args.ipv6(std::env::var("KUBERNETES_SERVICE_HOST").ok().as_deref()),
        },
        instance: args.identity.clone(),
        certificate_lifetime: args.certificate_lifetime.get(),
    };
    let listen_http = args.listen_http.at(settings.defaults.all_addresses());
    let webhook = webhook(&args, &client, &settings.defaults, &env);
    let operator =
        Operator::new(client.clone(), Arc::new(Reach::new(env.clone())), settings, metrics.clone(), env.clone());
    let election = args.lease.clone().map(|name| {
        let candidate = Candidate { namespace: args.namespace.clone(), name, identity: args.identity.clone() };
        Election::new(client, candidate, env)
    });
    let told = {
        let (operator, counted, leads) = (operator.clone(), operator.clone(), metrics.clone());
        Told {
            // Who stands by is ready to take over.
            is_ready: Arc::new(move || operator.is_ready() || !leads.is_leader()),
            before_metrics: Arc::new(move || counted.count_jobs()),
            metrics: metrics.clone(),
        }
    };
    let hooked = async {
        match &webhook {
            Some(webhook) => webhook.serve().await,
            None => std::future::pending().await,
        }
    };
    let served = serving::serve(listen_http, told);
    let works = async {
        if let Some(election) = &election {
            election.won().await;
        }
        metrics.leads(true);
        tracing::info!(identity = args.identity, "leads");
        tokio::select! {
            () = operator.run() => anyhow::Ok(()),
            lost = async { match &election { Some(election) => election.lost().await, None => std::future::pending().await } } => {
                anyhow::bail!("leads no longer: {lost}")
            }
        }
    };
    let (mut terminated, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        ended = works => ended?,
        hooked = hooked => hooked.context("answer API servers")?,
        served = served => served.with_context(|| format!("answer HTTP at {listen_http}"))?,
        _ = terminated.recv() => {}
        _ = interrupted.recv() => {}
    }
    tracing::info!("stops");
    if let Some(election) = &election {
        election.give_back().await;
    }
    Ok(())
}

/// What answers API servers, if it shall.
fn webhook(args: &Args, client: &Client, defaults: &Defaults, env: &Env) -> Option<Webhook> {
    let place = Place {
        listen: args.listen_webhook?.at(defaults.all_addresses()),
        namespace: args.namespace.clone(),
        service: args.webhook_service.clone()?,
        configuration: args.webhook_configuration.clone()?,
    };
    Some(Webhook::new(client.clone(), place, defaults.clone(), env.clone()))
}

/// Finds the API server as a pod, or as `kubectl` does.
async fn connect(metrics: &Arc<Metrics>) -> anyhow::Result<Client> {
    let mut config = Config::infer().await.context("find the cluster's API server: set KUBECONFIG, or run as a pod")?;
    config.connect_timeout = Some(CONNECT_WITHIN);
    // What follows from a failure is decided in one place.
    config.default_retry = false;
    let builder = ClientBuilder::try_from(config).context("set up the connection to the API server")?;
    Ok(builder.with_layer(&Counting(metrics.clone())).build())
}
