//! What comes between connecting and the Hello: nothing, or a TLS handshake.

use std::io;

use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::{self, AlertDescription};

use super::error::ConnectionError;
use crate::tls::{ClientTls, TlsError};

/// Bytes read at once beneath TLS, which by itself reads 4 KiB: the longest record.
const READ_LEN: usize = 16 << 10;

/// What is made of a transport before it is used.
pub(super) trait Security: Send + Sync + 'static {
    /// What a transport becomes.
    type Secured<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>: AsyncRead
        + AsyncWrite
        + Send
        + Unpin
        + 'static;

    /// Makes it so, with a peer that has a certificate for `host`.
    fn secure<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        transport: T,
        host: Option<&str>,
    ) -> impl Future<Output = Result<Self::Secured<T>, ConnectionError>> + Send;
}

/// The transport as it is.
pub(super) struct Plain;

impl Security for Plain {
    type Secured<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> = T;

    async fn secure<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        transport: T,
        _host: Option<&str>,
    ) -> Result<T, ConnectionError> {
        Ok(transport)
    }
}

impl Security for ClientTls {
    type Secured<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> = TlsStream<BufReader<T>>;

    async fn secure<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        transport: T,
        host: Option<&str>,
    ) -> Result<Self::Secured<T>, ConnectionError> {
        let host = host.unwrap_or_default();
        let name = self.name_for(host).map_err(|error: TlsError| ConnectionError::Tls {
            reason: format!("{error}: name the server that its certificate is for").into(),
        })?;
        let transport = BufReader::with_capacity(READ_LEN, transport);
        let connecting = TlsConnector::from(self.config()).connect(name, transport);
        connecting.await.map_err(ConnectionError::of_transport)
    }
}

impl ConnectionError {
    /// What became of a transport. A server's objections to a client's certificate come only with
    /// the first read after the handshake, so this is not for handshakes alone.
    pub(super) fn of_transport(error: io::Error) -> Self {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match tls {
            // The stream of TLS ended without the word that ends it. No frame is cut short
            // unnoticed.
            None if error.kind() == io::ErrorKind::UnexpectedEof => ConnectionError::ClosedByPeer,
            None => ConnectionError::Io(error),
            Some(error) => ConnectionError::Tls { reason: explain(error).into() },
        }
    }
}

/// The error in words that say what to do, where the protocol's own do not.
fn explain(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidMessage(_) => {
            "what answers there does not speak TLS: connect without it, or mend the port".into()
        }
        rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "the server asks for a client's certificate, and none was given".into()
        }
        rustls::Error::AlertReceived(alert) => format!("the server refuses: {alert:?}"),
        error => error.to_string(),
    }
}
