//! The certificate by which API servers know the webhook: made here, renewed here. Pure but for the making of keys.
//!
//! An authority signs one certificate and is forgotten. When the certificate is renewed, API servers are told of the old authority and
//! the new one, so that a controller which has not noticed yet is still believed.

use std::{fmt, time::Duration};

use floodmark_crds::Timestamp;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::ResourceExt as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::OffsetDateTime;

/// How long a certificate is in force.
const LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// So long before its end it is renewed.
const RENEW_BEFORE: Duration = Duration::from_secs(90 * 24 * 3600);
/// How much the clocks of two machines may differ.
const CLOCK_SKEW_MAX: Duration = Duration::from_secs(300);
/// Annotation of the Secret: until when the certificate is in force.
const UNTIL: &str = "floodmark.io/until";
/// Annotation of the Secret: whom the certificate is made out to.
const NAME: &str = "floodmark.io/made-out-to";

/// Keys of the Secret.
const AUTHORITIES: &str = "ca.crt";
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
/// Authorities that API servers are told of: the present one, and the one before.
const AUTHORITIES_MAX: usize = 2;
const BEGIN: &str = "-----BEGIN CERTIFICATE-----";

/// A certificate with its key, as PEM. Does not show the key.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Certificate {
    /// Those by which it is known, newest first.
    pub(super) authorities: String,
    pub(super) certificate: String,
    pub(super) key: String,
    /// When it is to be renewed.
    pub(super) renew_at: Timestamp,
    until: Timestamp,
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("until", &self.until).finish_non_exhaustive()
    }
}

impl Certificate {
    /// A new one for the server of this name. Of the one before, the authority is told as well.
    ///
    /// # Errors
    /// When no key can be made.
    pub(super) fn make(name: &str, now: Timestamp, before: Option<&Secret>) -> Result<Self, String> {
        let failed = |what: &str, error: &dyn fmt::Display| format!("{what}: {error}");
        let until = now.plus(LIFETIME);
        let at = |t: Timestamp| {
            OffsetDateTime::from_unix_timestamp(t.millis() / 1000).map_err(|e| failed("tell a certificate's time", &e))
        };
        let in_force = |called: &str| -> Result<CertificateParams, String> {
            let mut params = CertificateParams::default();
            params.not_before = at(now.minus(CLOCK_SKEW_MAX))?;
            params.not_after = at(until)?;
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, called);
            Ok(params)
        };
        let key = || KeyPair::generate().map_err(|e| failed("make a key", &e));
        let mut authority = in_force("Floodmark webhook authority")?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let authority_key = key()?;
        let authority_certificate =
            authority.self_signed(&authority_key).map_err(|e| failed("make an authority", &e))?;
        let issuer = Issuer::new(authority, authority_key);
        let mut params = in_force("Floodmark webhook")?;
        let san = name.try_into().map_err(|e| failed("name a certificate's server", &e))?;
        params.subject_alt_names = vec![rcgen::SanType::DnsName(san)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = key()?;
        let certificate = params.signed_by(&key, &issuer).map_err(|e| failed("sign a certificate", &e))?;
        let old = before.and_then(|secret| text(secret, AUTHORITIES)).unwrap_or_default();
        let authorities = [authority_certificate.pem()].into_iter().chain(separate(&old));
        Ok(Self {
            authorities: authorities.take(AUTHORITIES_MAX).collect(),
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            renew_at: until.minus(RENEW_BEFORE),
            until,
        })
    }

    /// The one that a Secret holds; `None` if it holds none, one for another name, or one that is to be renewed by now.
    pub(super) fn of(secret: &Secret, name: &str, now: Timestamp) -> Option<Self> {
        let until: Timestamp = serde_json::from_value(secret.annotations().get(UNTIL)?.clone().into()).ok()?;
        let renew_at = until.minus(RENEW_BEFORE);
        if secret.annotations().get(NAME)? != name || now >= renew_at {
            return None;
        }
        let (authorities, certificate) = (text(secret, AUTHORITIES)?, text(secret, CERTIFICATE)?);
        Some(Self { authorities, certificate, key: text(secret, KEY)?, renew_at, until })
    }

    /// Writes it into a Secret.
    pub(super) fn into_secret(self, name: &str, mut secret: Secret) -> Secret {
        let annotations = secret.annotations_mut();
        annotations.insert(UNTIL.to_owned(), self.until.to_string());
        annotations.insert(NAME.to_owned(), name.to_owned());
        let data = [(AUTHORITIES, self.authorities), (CERTIFICATE, self.certificate), (KEY, self.key)];
        let data = data.into_iter().map(|(key, pem)| (key.to_owned(), ByteString(pem.into_bytes())));
        secret.data = Some(data.collect());
        secret.metadata.managed_fields = None;
        secret
    }
}

fn text(secret: &Secret, key: &str) -> Option<String> {
    String::from_utf8(secret.data.as_ref()?.get(key)?.0.clone()).ok()
}

/// The certificates of a text, each for itself.
fn separate(pem: &str) -> Vec<String> {
    pem.split(BEGIN).skip(1).map(|rest| format!("{BEGIN}{}\n", rest.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "hook.system.svc";

    #[test]
    fn it_is_kept_until_it_is_to_be_renewed_and_then_both_authorities_are_told() {
        let now = Timestamp::from_millis(1_795_255_200_000);
        let made = Certificate::make(NAME, now, None).unwrap();
        let secret = made.clone().into_secret(NAME, Secret::default());
        assert_eq!(Certificate::of(&secret, NAME, now), Some(made.clone()));
        assert_eq!(Certificate::of(&secret, "other.system.svc", now), None);
        assert_eq!(Certificate::of(&secret, NAME, made.renew_at), None);
        assert_eq!(Certificate::of(&Secret::default(), NAME, now), None);
        let again = Certificate::make(NAME, made.renew_at, Some(&secret)).unwrap();
        assert_ne!(again.key, made.key);
        assert!(again.authorities.ends_with(&made.authorities), "the old one is told, too");
        assert_eq!(again.authorities.matches(BEGIN).count(), 2);
        let secret = again.clone().into_secret(NAME, secret);
        let third = Certificate::make(NAME, again.renew_at, Some(&secret)).unwrap();
        assert_eq!(third.authorities.matches(BEGIN).count(), 2, "and no more than one old");
        assert!(!format!("{made:?}").contains("KEY"));
    }
}
