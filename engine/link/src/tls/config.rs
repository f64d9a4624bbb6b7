//! What TLS checks on either side, before a byte of ours is read.
//!
//! TLS 1.3 only, certificates at both ends. The host name is not checked: a process is who its certificate says, wherever it
//! runs. The time comes from the process's clock.

use std::{fmt, sync::Arc, time::Duration};

use floodmark_snapshot::{Error, JobId, Result, env::Clock};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig,
    SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, ring::default_provider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::SingleCertAndKey,
    time_provider::TimeProvider,
    version::TLS13,
};
use webpki::EndEntityCert;

use super::{Identity, Role, SCHEME, Subject};

/// What both ends must speak inside TLS.
const PROTOCOL: &[u8] = b"h2";

/// What a process uses to accept connections: from any process of its own job.
///
/// # Errors
/// `Abort` when TLS can't be set up.
pub fn server_config(identity: &Identity, clock: Arc<dyn Clock>) -> Result<ServerConfig> {
    let verifier = Arc::new(PeerVerifier::new(identity, None)?);
    let mut config = ServerConfig::builder_with_details(verifier.provider.clone(), Arc::new(ClockTime(clock)))
        .with_protocol_versions(&[&TLS13])
        .map_err(set_up)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.key().clone())));
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    // A resumed session would rest on what was checked back then.
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// What a process uses to connect to one of its own job that has this role.
///
/// # Errors
/// `Abort` when TLS can't be set up.
pub fn client_config(identity: &Identity, role: Role, clock: Arc<dyn Clock>) -> Result<ClientConfig> {
    let verifier = Arc::new(PeerVerifier::new(identity, Some(role))?);
    let mut config = ClientConfig::builder_with_details(verifier.provider.clone(), Arc::new(ClockTime(clock)))
        .with_protocol_versions(&[&TLS13])
        .map_err(set_up)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.key().clone())));
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// Whom the peer's certificate, which TLS has verified, is made out to.
///
/// # Errors
/// `Abort` when there is none: TLS was not set up by this module.
pub fn peer_subject(certificates: Option<&[CertificateDer<'_>]>) -> Result<Subject> {
    let own = certificates.and_then(<[_]>::first).ok_or_else(|| Error::abort("the peer shows no certificate"))?;
    subject_of(own).map_err(Error::abort)
}

/// Whom a certificate is made out to; else why nobody.
pub(super) fn subject_of(certificate: &CertificateDer<'_>) -> Result<Subject, String> {
    let parsed = EndEntityCert::try_from(certificate).map_err(|e| format!("the certificate can't be read: {e}"))?;
    let mut subjects = parsed.valid_uri_names().filter(|uri| uri.starts_with(SCHEME));
    match (subjects.next(), subjects.next()) {
        (Some(uri), None) => Subject::from_uri(uri).ok_or_else(|| format!("the certificate names no process: {uri}")),
        (None, _) => Err(format!("the certificate has no name that begins with {SCHEME}")),
        (Some(_), Some(_)) => Err("the certificate names several processes".into()),
    }
}

fn set_up(error: rustls::Error) -> Error {
    Error::abort(format!("set TLS up: {error}"))
}

struct ClockTime(Arc<dyn Clock>);

impl fmt::Debug for ClockTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClockTime")
    }
}

impl TimeProvider for ClockTime {
    fn current_time(&self) -> Option<UnixTime> {
        let since_epoch = Duration::from_millis(u64::try_from(self.0.wall_ms()).ok()?);
        Some(UnixTime::since_unix_epoch(since_epoch))
    }
}

/// Why a peer is refused whose certificate is good, but not for this.
#[derive(Debug)]
struct Unfit(String);

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unfit {}

#[derive(Debug)]
struct PeerVerifier {
    job: JobId,
    /// The role that the peer must have; `None` if any will do.
    role: Option<Role>,
    roots: Arc<rustls::RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
}

impl PeerVerifier {
    fn new(identity: &Identity, role: Option<Role>) -> Result<Self> {
        let provider = Arc::new(default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(identity.roots().clone(), provider.clone())
            .build()
            .map_err(|e| Error::abort(format!("set TLS up: {e}")))?;
        Ok(Self { job: identity.subject().job.clone(), role, roots: identity.roots().clone(), clients, provider })
    }

    fn fits(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let why = match subject_of(certificate) {
            Ok(peer) if peer.job != self.job => {
                format!("the peer is a {peer}, this process belongs to job {}", self.job)
            }
            Ok(peer) => match self.role {
                Some(role) if role != peer.role => format!("the peer is a {peer}, but must be a {role} here"),
                _ => return Ok(()),
            },
            Err(why) => why,
        };
        Err(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Unfit(why))))))
    }

    fn signed(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        self.fits(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.clients.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.clients.verify_client_cert(end_entity, intermediates, now)?;
        self.fits(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
