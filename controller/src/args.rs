//! How the controller is started.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use clap::Parser;
use floodmark_crds::HumanDuration;
use floodmark_link::tls::AUTHORITY_LIFETIME;

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

    /// By which address pods listen on all of theirs, jobs' and the controller's own: 0.0.0.0, or :: where they have IPv6. Left out,
    /// that of the family of the API server's address
    #[arg(long, value_name = "ADDRESS")]
    pub pod_listen: Option<IpAddr>,

    /// How long the certificates are in force by which the pods of a run know each other; they are renewed with a third of it left
    #[arg(long, value_name = "DURATION", default_value = "17520h", value_parser = lifetime)]
    pub certificate_lifetime: HumanDuration,

    /// Answer GET /healthz, /readyz and /metrics here; :PORT is on all addresses
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", value_parser = listen)]
    pub listen_http: Listen,

    /// Answer the API server's questions about what people apply here, over HTTPS; :PORT is on all addresses
    #[arg(
        long,
        value_name = "ADDRESS",
        requires = "webhook_service",
        requires = "webhook_configuration",
        value_parser = listen
    )]
    pub listen_webhook: Option<Listen>,

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

/// Where the controller listens.
#[derive(Clone, Copy, Debug)]
pub struct Listen {
    /// `None` for all addresses.
    address: Option<IpAddr>,
    port: u16,
}

impl Listen {
    /// The address to listen at; `all` is the one for all addresses of the pod.
    #[must_use]
    pub fn at(self, all: IpAddr) -> SocketAddr {
        SocketAddr::new(self.address.unwrap_or(all), self.port)
    }
}

impl Args {
    /// Whether pods have IPv6 addresses. `api_server` is where pods find the API server, as Kubernetes tells them: Services and
    /// pods have the same primary family.
    #[must_use]
    pub fn ipv6(&self, api_server: Option<&str>) -> bool {
        let told = api_server.and_then(|host| host.parse().ok());
        self.pod_listen.or(told).is_some_and(|address| address.is_ipv6())
    }
}

/// Pods see a change of their Secret after a minute or two.
const CERTIFICATE_LIFETIME_MIN: Duration = Duration::from_secs(360);

fn lifetime(text: &str) -> Result<HumanDuration, String> {
    let lifetime: HumanDuration = text.parse().map_err(|e| format!("{e}"))?;
    if lifetime.get() < CERTIFICATE_LIFETIME_MIN {
        return Err("pods would not see new certificates in time: give 6m or more".to_owned());
    }
    // Those that come next are made for twice as long.
    if lifetime.get() > AUTHORITY_LIFETIME / 2 {
        return Err("who signs them is in force for ten years, and they must be for less than five".to_owned());
    }
    Ok(lifetime)
}

fn listen(text: &str) -> Result<Listen, String> {
    let told = match text.strip_prefix(':') {
        Some(port) => port.parse().map(|port| Listen { address: None, port }).ok(),
        None => text.parse().map(|at: SocketAddr| Listen { address: Some(at.ip()), port: at.port() }).ok(),
    };
    told.ok_or_else(|| "write ADDRESS:PORT, such as 127.0.0.1:8080 or [::1]:8080, or :PORT".to_owned())
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("'{text}' is no label: write key=value")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::Defaults;

    #[test]
    fn certificates_live_long_enough_to_be_renewed_and_not_too_long() {
        let lifetime = |words: &[&str]| {
            let args = Args::try_parse_from(["floodmark-controller", "--image", "a"].iter().chain(words));
            args.ok().map(|args| args.certificate_lifetime.get())
        };
        assert_eq!(lifetime(&[]), Some(crate::objects::IDENTITY_LIFETIME));
        for (given, taken) in
            [("6m", true), ("5m", false), ("720h", true), ("43800h", true), ("43801h", false), ("-1h", false)]
        {
            assert_eq!(lifetime(&[&format!("--certificate-lifetime={given}")]).is_some(), taken, "{given}");
        }
    }

    #[test]
    fn pods_listen_by_the_family_of_the_cluster_unless_told_otherwise() {
        let ipv6 = |words: &[&str], api_server| {
            let args = Args::parse_from(["floodmark-controller", "--image", "a"].iter().chain(words));
            args.ipv6(api_server)
        };
        for (api_server, is) in
            [(None, false), (Some("10.96.0.1"), false), (Some("fd00:10:96::1"), true), (Some("api.example.com"), false)]
        {
            assert_eq!(ipv6(&[], api_server), is, "{api_server:?}");
        }
        assert!(ipv6(&["--pod-listen", "::"], Some("10.96.0.1")));
        assert!(!ipv6(&["--pod-listen", "0.0.0.0"], Some("fd00:10:96::1")));
    }

    #[test]
    fn a_port_alone_is_listened_at_on_all_addresses() {
        let at = |text: &str, ipv6| {
            let all = Defaults { ipv6, ..Defaults::default() }.all_addresses();
            listen(text).map(|listen| listen.at(all).to_string()).ok()
        };
        for (text, ipv4, ipv6) in [
            (":8080", Some("0.0.0.0:8080"), Some("[::]:8080")),
            ("127.0.0.1:80", Some("127.0.0.1:80"), Some("127.0.0.1:80")),
            ("[::1]:80", Some("[::1]:80"), Some("[::1]:80")),
            ("8080", None, None),
            (":", None, None),
            ("::1", None, None),
            (":70000", None, None),
            ("example.com:80", None, None),
        ] {
            assert_eq!((at(text, false).as_deref(), at(text, true).as_deref()), (ipv4, ipv6), "{text}");
        }
    }
}
