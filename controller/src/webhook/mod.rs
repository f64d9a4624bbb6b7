//! Tells people at once what is wrong with what they apply: API servers ask here before they store a StreamJob or Savepoint.
//!
//! `review` judges; `certificate` is what API servers know this server by. It is kept in a Secret, which all controllers share, and told
//! to API servers in the ValidatingWebhookConfiguration. Whoever notices first that it is missing or old makes another; each reads it
//! again when the configuration changes.
//!
//! Invariant: this server is a courtesy. Nothing waits for it, and what it can't judge it lets through.

mod certificate;
mod review;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    routing::post,
};
use floodmark_crds::Timestamp;
use floodmark_snapshot::Env;
use futures::{
    StreamExt as _,
    future::{Either, select},
    stream::FuturesUnordered,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use k8s_openapi::{
    ByteString,
    api::{admissionregistration::v1::ValidatingWebhookConfiguration, core::v1::Secret},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt as _, watcher},
};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;

use self::{
    certificate::Certificate,
    review::{Review, Reviewed, refusal},
};
use crate::objects::{Defaults, MANAGER};

/// Connections at the same time. API servers keep some open.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may take until it is secure, and until a request's head is there.
const BEGIN_WITHIN: Duration = Duration::from_secs(5);
/// Objects are judged this many at the same time.
const REVIEWS_MAX: usize = 4;
/// What takes longer is let through. API servers wait for five seconds.
const REVIEW_WITHIN: Duration = Duration::from_secs(4);
/// Longest request, bytes: two objects of the size that etcd takes.
const BODY_MAX: usize = 4 << 20;
/// How often is looked whether the certificate is to be renewed, if nothing is told before.
const LOOK_EVERY: Duration = Duration::from_secs(3_600);
/// From a failure to the next try.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// From a connection that could not be accepted to the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where the webhook is, and who says so.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The namespace of its Service, and of the Secret of the same name.
    pub namespace: String,
    /// The Service by which API servers reach it.
    pub service: String,
    /// The ValidatingWebhookConfiguration.
    pub configuration: String,
}

impl Place {
    /// The name that its certificate is made out to.
    fn name(&self) -> String {
        format!("{}.{}.svc", self.service, self.namespace)
    }
}

/// See the header of this file.
pub struct Webhook {
    client: Client,
    place: Place,
    judge: Arc<Judge>,
    env: Env,
    /// What new connections are made secure with.
    tls: Mutex<Option<Arc<ServerConfig>>>,
}

struct Judge {
    defaults: Defaults,
    env: Env,
    at_a_time: Semaphore,
}

impl Webhook {
    /// A webhook that answers once it is [served](Webhook::serve).
    #[must_use]
    pub fn new(client: Client, place: Place, defaults: Defaults, env: Env) -> Self {
        let judge = Judge { defaults, env: env.clone(), at_a_time: Semaphore::new(REVIEWS_MAX) };
        Self { client, place, judge: Arc::new(judge), env, tls: Mutex::default() }
    }

    /// Answers, and sees to the certificate, until it is dropped.
    ///
    /// # Errors
    /// When the address can't be had.
    pub async fn serve(&self) -> std::io::Result<()> {
        let listener = TcpListener::bind(self.place.listen).await?;
        let answers = std::pin::pin!(self.answer_all(listener));
        let looks = std::pin::pin!(self.look_after_certificate());
        select(answers, looks).await;
        Ok(())
    }

    async fn look_after_certificate(&self) {
        let api: Api<ValidatingWebhookConfiguration> = Api::all(self.client.clone());
        let only = watcher::Config::default().fields(&format!("metadata.name={}", self.place.configuration));
        let mut changes = watcher::watcher(api, only).default_backoff().boxed();
        loop {
            let wait = match self.refresh().await {
                Ok(()) => LOOK_EVERY,
                Err(why) => {
                    tracing::warn!(%why, "the webhook's certificate could not be seen to; it is tried again");
                    RETRY_AFTER
                }
            };
            // Several changes are one reason to look.
            let _ = select(self.env.runtime.sleep(wait), changes.next()).await;
        }
    }

    /// Makes sure that there is a certificate, that this server has it, and that API servers know it.
    async fn refresh(&self) -> Result<(), String> {
        let certificate = self.certificate().await?;
        let config = server_config(&certificate)?;
        *self.tls.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(config));
        self.tell(&certificate.authorities).await
    }

    async fn certificate(&self) -> Result<Certificate, String> {
        let (api, name): (Api<Secret>, _) =
            (Api::namespaced(self.client.clone(), &self.place.namespace), self.place.name());
        let failed =
            |what: &str, error: &dyn std::fmt::Display| format!("{what} Secret {}: {error}", self.place.service);
        let found = api.get_opt(&self.place.service).await.map_err(|e| failed("read", &e))?;
        let now = Timestamp::from_millis(self.env.clock.wall_ms());
        if let Some(certificate) = found.as_ref().and_then(|secret| Certificate::of(secret, &name, now)) {
            return Ok(certificate);
        }
        let made = Certificate::make(&name, now, found.as_ref())?;
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), dry_run: false };
        // If another controller was faster, the next look finds what it has made.
        match found {
            Some(secret) => {
                let secret = made.clone().into_secret(&name, secret);
                api.replace(&self.place.service, &params, &secret).await.map_err(|e| failed("renew", &e))?;
            }
            None => {
                let metadata = ObjectMeta { name: Some(self.place.service.clone()), ..ObjectMeta::default() };
                let empty = Secret { metadata, type_: Some("kubernetes.io/tls".to_owned()), ..Secret::default() };
                api.create(&params, &made.clone().into_secret(&name, empty)).await.map_err(|e| failed("create", &e))?;
            }
        }
        tracing::info!(server = name, "made a certificate for the webhook");
        Ok(made)
    }

    /// Tells API servers by which authorities they know this server.
    async fn tell(&self, authorities: &str) -> Result<(), String> {
        let api: Api<ValidatingWebhookConfiguration> = Api::all(self.client.clone());
        let name = &self.place.configuration;
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            format!("{what} ValidatingWebhookConfiguration {name}: {error}")
        };
        let configuration = api.get(name).await.map_err(|e| failed("read", &e))?;
        let bundle = ByteString(authorities.as_bytes().to_vec());
        let ours = configuration.webhooks.iter().flatten().filter(|hook| {
            let service = hook.client_config.service.as_ref();
            let ours = service.is_some_and(|s| s.name == self.place.service && s.namespace == self.place.namespace);
            ours && hook.client_config.ca_bundle.as_ref() != Some(&bundle)
        });
        let hooks: Vec<_> = ours.map(|hook| json!({"name": hook.name, "clientConfig": {"caBundle": bundle}})).collect();
        if hooks.is_empty() {
            return Ok(());
        }
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let body = Patch::Strategic(json!({ "webhooks": hooks }));
        api.patch(name, &params, &body).await.map_err(|e| failed("patch", &e))?;
        tracing::info!(configuration = %configuration.name_any(), "API servers know the webhook's certificate");
        Ok(())
    }

    async fn answer_all(&self, listener: TcpListener) {
        let router = router(self.judge.clone());
        let mut connections = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(()) = connections.next(), if !connections.is_empty() => {}
                accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                    Ok((stream, _)) => connections.push(self.answer(stream, router.clone())),
                    Err(error) => {
                        tracing::warn!(%error, "accept a connection of an API server");
                        self.env.runtime.sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
    }

    async fn answer(&self, stream: TcpStream, router: Router) {
        let Some(config) = self.tls.lock().unwrap_or_else(PoisonError::into_inner).clone() else { return };
        let secure = std::pin::pin!(TlsAcceptor::from(config).accept(stream));
        let stream = match select(secure, self.env.runtime.sleep(BEGIN_WITHIN)).await {
            Either::Left((Ok(stream), _)) => stream,
            Either::Left((Err(error), _)) => return tracing::debug!(%error, "a connection did not become secure"),
            Either::Right(_) => return tracing::debug!("a connection did not become secure in time"),
        };
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(BEGIN_WITHIN);
        let served = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await;
        if let Err(error) = served {
            tracing::debug!(%error, "a connection of an API server broke off");
        }
    }
}

fn router(judge: Arc<Judge>) -> Router {
    Router::new().route("/validate", post(validate)).layer(DefaultBodyLimit::max(BODY_MAX)).with_state(judge)
}

async fn validate(State(judge): State<Arc<Judge>>, Json(review): Json<Review>) -> Json<Reviewed> {
    let uid = review.request.uid.clone();
    let refused = judge.refusal(review).await;
    Json(Reviewed::new(&uid, refused.as_deref()))
}

impl Judge {
    async fn refusal(&self, review: Review) -> Option<String> {
        let _permit = self.at_a_time.acquire().await.ok()?;
        let (defaults, now) = (self.defaults.clone(), Timestamp::from_millis(self.env.clock.wall_ms()));
        let kind = review.request.kind.kind.clone();
        let judged = self.env.blocking("judging an object", move || refusal(&review.request, &defaults, now));
        match select(std::pin::pin!(judged), self.env.runtime.sleep(REVIEW_WITHIN)).await {
            Either::Left((Ok(refused), _)) => refused,
            Either::Left((Err(error), _)) => {
                tracing::error!(%error, "a {kind} is let through");
                None
            }
            Either::Right(_) => {
                tracing::warn!("a {kind} is let through: it was not judged within {REVIEW_WITHIN:?}");
                None
            }
        }
    }
}

fn server_config(certificate: &Certificate) -> Result<ServerConfig, String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("{what} of the webhook: {error}");
    let chain: Result<Vec<CertificateDer<'static>>, _> =
        CertificateDer::pem_slice_iter(certificate.certificate.as_bytes()).collect();
    let chain = chain.map_err(|e| failed("the certificate", &e))?;
    let key = PrivateKeyDer::from_pem_slice(certificate.key.as_bytes()).map_err(|e| failed("the key", &e))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(rustls::DEFAULT_VERSIONS)
        .map_err(|e| failed("the TLS settings", &e))?;
    config.with_no_client_auth().with_single_cert(chain, key).map_err(|e| failed("the certificate", &e))
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use rustls::{ClientConfig, RootCertStore};
    use tokio_rustls::TlsConnector;
    use tower::ServiceExt as _;

    use super::*;

    const NAME: &str = "hook.system.svc";

    #[tokio::test]
    async fn who_knows_the_authority_can_connect_and_nobody_by_another_name() {
        let made = Certificate::make(NAME, Timestamp::from_millis(Env::system().clock.wall_ms()), None).unwrap();
        let server = Arc::new(server_config(&made).unwrap());
        let mut roots = RootCertStore::empty();
        let authorities = CertificateDer::pem_slice_iter(made.authorities.as_bytes());
        authorities.for_each(|authority| roots.add(authority.unwrap()).unwrap());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let client = Arc::new(client.with_root_certificates(roots).with_no_client_auth());
        for (name, connects) in [(NAME, true), ("other.system.svc", false)] {
            let (near, far) = tokio::io::duplex(1 << 16);
            let connected = TlsConnector::from(client.clone()).connect(name.try_into().unwrap(), near);
            let (client, _server) = tokio::join!(connected, TlsAcceptor::from(server.clone()).accept(far));
            assert_eq!(client.is_ok(), connects, "{name}");
        }
    }

    #[tokio::test]
    async fn reviews_are_answered_as_api_servers_expect() {
        let judge = Judge { defaults: Defaults::default(), env: Env::system(), at_a_time: Semaphore::new(1) };
        let router = router(Arc::new(judge));
        let ask = async |sql: &str| {
            let object =
                json!({"metadata": {"name": "a"}, "spec": {"sql": sql, "checkpoints": {"storage": "s3://b/c"}}});
            let body = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
                "uid": "u-7", "kind": {"group": "floodmark.io", "version": "v1alpha1", "kind": "StreamJob"},
                "operation": "CREATE", "object": object, "oldObject": null,
            }});
            let request = http::Request::post("/validate").header("content-type", "application/json");
            let request = request.body(axum::body::Body::from(body.to_string())).unwrap();
            let bytes = router.clone().oneshot(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
            serde_json::from_slice::<serde_json::Value>(&bytes).unwrap()
        };
        let refused = ask("SELECT 1").await;
        assert_eq!(
            (&refused["kind"], &refused["apiVersion"]),
            (&json!("AdmissionReview"), &json!("admission.k8s.io/v1"))
        );
        assert_eq!((&refused["response"]["uid"], &refused["response"]["allowed"]), (&json!("u-7"), &json!(false)));
        let status = &refused["response"]["status"];
        assert_eq!(status["code"], json!(422));
        assert!(status["message"].as_str().unwrap().starts_with("spec.sql: line 1"), "{status}");
        let fine = ask("CREATE TABLE n (i BIGINT) WITH ('connector' = 'datagen'); CREATE TABLE o (i BIGINT) WITH ('connector' = 'blackhole'); INSERT INTO o SELECT i FROM n").await;
        assert_eq!(fine["response"], json!({"uid": "u-7", "allowed": true}));
    }
}
