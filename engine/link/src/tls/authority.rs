//! An authority of our own, for jobs on one machine and for tests: in a cluster somebody else issues certificates.
//!
//! Its key never leaves the process, and neither it nor an issued key is ever printed.

use std::{fmt, path::Path, sync::Arc, time::Duration};

use floodmark_snapshot::{Error, Result, env::Clock};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;

use super::{Identity, Subject};

/// How long an authority is in force.
pub const AUTHORITY_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long a certificate is in force, unless something else is asked for.
pub const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// How much the clocks of two machines may differ.
const CLOCK_SKEW_MAX: Duration = Duration::from_secs(300);

/// Makes certificates.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

/// A certificate with its key, as PEM.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
    /// The authority's certificate.
    pub authority: String,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued")
            .field("certificate", &self.certificate)
            .field("key", &"(hidden)")
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// A new authority with a key of its own. `clock` says from when on what it issues is in force.
    ///
    /// # Errors
    /// `Abort` when no key can be made.
    pub fn new(clock: Arc<dyn Clock>) -> Result<Self> {
        let key = KeyPair::generate().map_err(|e| failed("make the authority's key", &e))?;
        let mut params = in_force(&*clock, AUTHORITY_LIFETIME)?;
        params.distinguished_name = named("Floodmark job authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).map_err(|e| failed("make the authority's certificate", &e))?.pem();
        Ok(Self { certificate, issuer: Issuer::new(params, key), clock })
    }

    /// The authority's certificate, PEM.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Makes a certificate with a fresh key.
    ///
    /// # Errors
    /// `Abort` when the job's identity can't stand in a certificate, or no key can be made.
    pub fn issue(&self, subject: &Subject, lifetime: Duration) -> Result<Issued> {
        let uri = subject.to_uri()?;
        let mut params = in_force(&*self.clock, lifetime)?;
        params.distinguished_name = named(&format!("Floodmark {}", subject.role));
        let name = uri.try_into().map_err(|e| failed("name the subject of a certificate", &e))?;
        params.subject_alt_names = vec![SanType::URI(name)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().map_err(|e| failed("make a key", &e))?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(|e| failed("sign a certificate", &e))?;
        Ok(Issued { certificate: certificate.pem(), key: key.serialize_pem(), authority: self.certificate.clone() })
    }

    /// As [`Authority::issue`], ready for use in this process.
    ///
    /// # Errors
    /// See there.
    pub fn identity(&self, subject: &Subject, lifetime: Duration) -> Result<Identity> {
        let issued = self.issue(subject, lifetime)?;
        Identity::from_pem(&issued.certificate, &issued.key, &issued.authority)
    }
}

impl Issued {
    /// Writes the files that [`Folder`](super::Folder) reads. Nobody but the owner may read the key.
    ///
    /// # Errors
    /// `Abort` when a file can't be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        super::identity::write_files(folder, self)
    }
}

fn in_force(clock: &dyn Clock, lifetime: Duration) -> Result<CertificateParams> {
    let at = |ms: i64| {
        OffsetDateTime::from_unix_timestamp(ms / 1000)
            .map_err(|e| failed("tell until when a certificate is in force", &e))
    };
    let now = clock.wall_ms();
    let mut params = CertificateParams::default();
    params.not_before = at(now.saturating_sub(CLOCK_SKEW_MAX.as_millis() as i64))?;
    params.not_after = at(now.saturating_add(lifetime.as_millis() as i64))?;
    Ok(params)
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn failed(what: &str, error: &dyn fmt::Display) -> Error {
    Error::abort(format!("{what}: {error}"))
}
