//! How the controller is started.

use std::net::SocketAddr;

use clap::Parser;

/// Looks after the StreamJobs and Savepoints of a Kubernetes cluster.
#[derive(Clone, Debug, Parser)]
#[command(name = "floodmark-controller", version, about)]
pub struct Args {
    /// The container image of jobs that name none
    #[arg(long, value_name = "IMAGE")]
    pub image: String,

    /// When nodes pull the images of jobs: Always, IfNotPresent or Never. Left out, Kubernetes chooses by the image's tag
    #[arg(long, value_name = "POLICY", value_parser = ["Always", "IfNotPresent", "Never"])]
    pub image_pull_policy: Option<String>,

    /// Look after the jobs of this namespace; may be given several times. Left out: of all
    #[arg(long = "watch-namespace", value_name = "NAMESPACE")]
    pub watch_namespaces: Vec<String>,

    /// The controller's own namespace
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAMESPACE", default_value = "default")]
    pub namespace: String,

    /// The controller's own name, by which it is told from others that stand by
    #[arg(long, env = "POD_NAME", value_name = "NAME", default_value = "floodmark-controller")]
    pub identity: String,

    /// A label of the controller's own pods, by which jobs let it in; may be given several times
    #[arg(long = "pod-label", value_name = "KEY=VALUE", value_parser = label)]
    pub pod_labels: Vec<(String, String)>,

    /// The cluster's DNS domain, if names of Services are not completed with it
    #[arg(long, value_name = "DOMAIN")]
    pub cluster_domain: Option<String>,

    /// Answer GET /healthz, /readyz and /metrics here
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub listen_http: SocketAddr,

    /// Answer the API server's questions about what people apply here, over HTTPS
    #[arg(long, value_name = "ADDRESS", requires = "webhook_service", requires = "webhook_configuration")]
    pub listen_webhook: Option<SocketAddr>,

    /// The Service by which the API server reaches that address
    #[arg(long, value_name = "NAME", requires = "listen_webhook")]
    pub webhook_service: Option<String>,

    /// The ValidatingWebhookConfiguration that says so
    #[arg(long, value_name = "NAME", requires = "listen_webhook")]
    pub webhook_configuration: Option<String>,

    /// The Lease by which one of several controllers leads, in the controller's own namespace. Left out, it leads at once
    #[arg(long, value_name = "NAME")]
    pub lease: Option<String>,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("'{text}' is no label: write key=value")),
    }
}
