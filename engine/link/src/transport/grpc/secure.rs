//! What happens on a fresh TCP connection before gRPC: mutual TLS.
//!
//! Invariant: nothing is read from or written to a connection before both ends have shown a certificate of the same job.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use async_trait::async_trait;
use floodmark_snapshot::{Error, Result, env::Clock};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::server::Connected;

use crate::tls::{IdentitySource, Role, Subject, client_config, peer_subject, server_config};

/// Both directions of a connection.
pub trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// Makes sure who is at the other end of a connection.
#[async_trait]
pub trait Handshake: Send + Sync {
    /// At the end that connects: the peer must have this role.
    ///
    /// # Errors
    /// `Abort` when the ends refuse each other, `Retry` when the connection breaks.
    async fn connect(&self, stream: TcpStream, role: Role) -> Result<(Box<dyn Duplex>, Subject)>;

    /// At the end that listens.
    ///
    /// # Errors
    /// See [`Handshake::connect`].
    async fn accept(&self, stream: TcpStream) -> Result<(Box<dyn Duplex>, Subject)>;
}

/// Mutual TLS between processes of one job.
pub struct MutualTls {
    /// Asked for each connection.
    pub identities: Arc<dyn IdentitySource>,
    /// Tells whether certificates are in force.
    pub clock: Arc<dyn Clock>,
}

#[async_trait]
impl Handshake for MutualTls {
    async fn connect(&self, stream: TcpStream, role: Role) -> Result<(Box<dyn Duplex>, Subject)> {
        let identity = self.identities.identity()?;
        let config = client_config(&identity, role, self.clock.clone())?;
        // Stands for nothing: see `tls::config`.
        let name = ServerName::try_from("floodmark").map_err(|e| Error::abort(format!("set TLS up: {e}")))?;
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|e| refused(&e))?;
        let subject = peer_subject(stream.get_ref().1.peer_certificates())?;
        Ok((Box::new(stream), subject))
    }

    async fn accept(&self, stream: TcpStream) -> Result<(Box<dyn Duplex>, Subject)> {
        let identity = self.identities.identity()?;
        let config = server_config(&identity, self.clock.clone())?;
        let stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await.map_err(|e| refused(&e))?;
        let subject = peer_subject(stream.get_ref().1.peer_certificates())?;
        Ok((Box::new(stream), subject))
    }
}

/// Says what a failed handshake means.
fn refused(error: &io::Error) -> Error {
    let Some(tls) = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) else {
        return Error::retry(format!("the connection broke during the TLS handshake: {error}"));
    };
    Error::abort(match tls {
        rustls::Error::InvalidMessage(_) => {
            format!("the peer does not speak TLS ({tls}): every connection between the processes of a job must")
        }
        rustls::Error::InvalidCertificate(why) => format!("the peer's certificate is refused: {why}"),
        rustls::Error::NoCertificatesPresented => "the peer shows no certificate".into(),
        rustls::Error::AlertReceived(alert) => {
            format!("the peer refuses this process's certificate ({alert:?}): its log says why")
        }
        other => format!("TLS handshake: {other}"),
    })
}

/// A connection that others made, for tonic.
pub(super) struct Accepted {
    pub(super) io: Box<dyn Duplex>,
    pub(super) from: Origin,
}

/// Where a stream comes from: goes along with each request.
#[derive(Clone)]
pub(super) struct Origin {
    pub(super) subject: Subject,
    pub(super) address: SocketAddr,
}

impl Connected for Accepted {
    type ConnectInfo = Origin;

    fn connect_info(&self) -> Origin {
        self.from.clone()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
