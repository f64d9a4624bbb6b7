//! A process's certificate, key and the authority that it trusts, and where they come from.
//!
//! An [`IdentitySource`] is asked for each new connection, so rotated files count from the next connection on. Invariant: an
//! identity is whole; a certificate that its key does not fit, or that names no subject, makes none.

use std::{
    fmt, fs,
    io::{ErrorKind, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use floodmark_snapshot::{Error, Result, error::Context};
use rustls::{
    RootCertStore,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};

use super::{Issued, Subject, config::subject_of};

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const AUTHORITY: &str = "ca.crt";
/// How often files are read again that do not fit each other: they may just be being replaced.
const READS_MAX: usize = 3;

/// What a process shows, and what it trusts.
pub struct Identity {
    subject: Subject,
    key: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("subject", &self.subject).finish_non_exhaustive()
    }
}

impl Identity {
    /// From PEM: the certificate, followed by those between it and the authority's; its key; the authority's certificates
    /// (several while one takes over from another).
    ///
    /// # Errors
    /// `Abort` when something can't be read, the key is another certificate's, or the certificate names no job and role.
    pub fn from_pem(certificate: &str, key: &str, authority: &str) -> Result<Self> {
        let chain = certificates(certificate).context_with(|| "read the certificate")?;
        let Some(own) = chain.first() else { return Err(Error::abort("read the certificate: the PEM holds none")) };
        let subject = subject_of(own).map_err(|why| Error::abort(format!("read the certificate: {why}")))?;
        // What the parser says may quote its input: not here.
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|_| Error::abort("read the certificate's key: no private key in the PEM"))?;
        let key = CertifiedKey::from_der(chain, key, &default_provider())
            .map_err(|e| Error::abort(format!("use the certificate with its key: {e}")))?;
        let mut roots = RootCertStore::empty();
        for root in certificates(authority).context_with(|| "read the authority's certificate")? {
            roots.add(root).map_err(|e| Error::abort(format!("trust the authority: {e}")))?;
        }
        if roots.is_empty() {
            return Err(Error::abort("read the authority's certificate: the PEM holds none"));
        }
        Ok(Self { subject, key: Arc::new(key), roots: Arc::new(roots) })
    }

    /// Whom the certificate is made out to.
    #[must_use]
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    pub(super) fn key(&self) -> &Arc<CertifiedKey> {
        &self.key
    }

    pub(super) fn roots(&self) -> &Arc<RootCertStore> {
        &self.roots
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| Error::abort(format!("bad PEM: {e}")))
}

/// Where a process's identity comes from. Asked for each new connection, so it must not take long.
pub trait IdentitySource: Send + Sync {
    /// The identity to use from now on.
    ///
    /// # Errors
    /// Why there is none: the connection is not made.
    fn identity(&self) -> Result<Arc<Identity>>;
}

/// One that never changes.
impl IdentitySource for Arc<Identity> {
    fn identity(&self) -> Result<Arc<Identity>> {
        Ok(self.clone())
    }
}

/// A folder with `tls.crt`, `tls.key` and `ca.crt`, as Kubernetes mounts a secret.
#[derive(Clone, Debug)]
pub struct Folder(pub PathBuf);

impl IdentitySource for Folder {
    fn identity(&self) -> Result<Arc<Identity>> {
        let mut reads = 1;
        loop {
            match self.read() {
                Ok(identity) => return Ok(Arc::new(identity)),
                Err(_) if reads < READS_MAX => reads += 1,
                Err(e) => return Err(e.context(format!("take the identity from {}", self.0.display()))),
            }
        }
    }
}

impl Folder {
    fn read(&self) -> Result<Identity> {
        let read =
            |name: &str| fs::read_to_string(self.0.join(name)).map_err(|e| Error::abort(format!("read {name}: {e}")));
        Identity::from_pem(&read(CERTIFICATE)?, &read(KEY)?, &read(AUTHORITY)?)
    }
}

pub(super) fn write_files(folder: &Path, issued: &Issued) -> Result<()> {
    let failed = |name: &str, e: std::io::Error| Error::abort(format!("write {}: {e}", folder.join(name).display()));
    fs::create_dir_all(folder).map_err(|e| failed("", e))?;
    for (name, text, mode) in
        [(AUTHORITY, &issued.authority, 0o644), (KEY, &issued.key, 0o600), (CERTIFICATE, &issued.certificate, 0o644)]
    {
        // Each file is replaced as a whole, so no reader finds half of one.
        let whole = folder.join(format!(".{name}.new"));
        let write = || {
            match fs::remove_file(&whole) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&whole)?;
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.write_all(text.as_bytes())?;
            fs::rename(&whole, folder.join(name))
        };
        write().map_err(|e| failed(name, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::{Env, JobId};

    use super::*;
    use crate::tls::{Authority, CERTIFICATE_LIFETIME, Role};

    fn subject(name: &str) -> Subject {
        let job = JobId { namespace: "default".into(), name: name.into(), uid: "local".into() };
        Subject { job, role: Role::Worker }
    }

    #[tokio::test]
    async fn files_are_read_again_for_each_connection_and_only_their_owner_may_read_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new(Env::system().clock).unwrap();
        let source = Folder(folder.path().to_owned());
        let missing = source.identity().unwrap_err().to_string();
        assert!(missing.contains("read tls.crt") && missing.contains(folder.path().to_str().unwrap()), "{missing}");
        for name in ["a", "b"] {
            authority.issue(&subject(name), CERTIFICATE_LIFETIME).unwrap().write(folder.path()).unwrap();
            assert_eq!(source.identity().unwrap().subject(), &subject(name));
        }
        let mode = fs::metadata(folder.path().join(KEY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[tokio::test]
    async fn a_key_of_another_certificate_is_refused_and_none_is_ever_shown() {
        let authority = Authority::new(Env::system().clock).unwrap();
        let [one, two] = [0; 2].map(|_| authority.issue(&subject("a"), CERTIFICATE_LIFETIME).unwrap());
        let refused = Identity::from_pem(&one.certificate, &two.key, &one.authority).unwrap_err().to_string();
        assert!(refused.contains("with its key"), "{refused}");
        let identity = Identity::from_pem(&one.certificate, &one.key, &one.authority).unwrap();
        let secret = one.key.lines().nth(1).unwrap();
        for shown in [format!("{one:?}"), format!("{identity:?}"), format!("{authority:?}"), refused] {
            assert!(!shown.contains(secret) && !shown.contains("PRIVATE"), "{shown}");
        }
        let garbage = Identity::from_pem(&one.certificate, "-----BEGIN PRIVATE KEY-----\nx7x7", &one.authority);
        assert!(!garbage.unwrap_err().to_string().contains("x7x7"));
    }
}
