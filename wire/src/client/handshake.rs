//! Opening a connection: a TLS handshake if TLS is set, then `Hello` and `Welcome`.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
#[cfg(feature = "tls")]
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::connection_error::{ConnectionError, Violation};
use super::options::ClientOptions;
use crate::Status;
use crate::proto::handshake::{MAX_TOKEN_LEN, OLDEST_VERSION, VERSION};
use crate::proto::header::MAX_HANDSHAKE_BODY;
use crate::proto::{Frame, FrameError, HEADER_LEN, Header, Hello, Kind, Message, Welcome};
#[cfg(feature = "tls")]
use crate::tls::{ClientTls, TlsError};

/// Bytes of one read below TLS, which reads 4 KiB by itself: the longest record.
#[cfg(feature = "tls")]
const READ_LEN: usize = 16 << 10;

/// A layer between the transport and the protocol.
pub(super) trait Security: Send + Sync + 'static {
    /// The stream above the layer.
    type Secured<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>: AsyncRead
        + AsyncWrite
        + Send
        + Unpin
        + 'static;

    /// Performs the layer's handshake with a peer whose certificate is for `host`.
    fn secure<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        transport: T,
        host: Option<&str>,
    ) -> impl Future<Output = Result<Self::Secured<T>, ConnectionError>> + Send;
}

/// No layer: the transport itself.
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

#[cfg(feature = "tls")]
impl Security for ClientTls {
    type Secured<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> =
        TlsStream<tokio::io::BufReader<T>>;

    async fn secure<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        transport: T,
        host: Option<&str>,
    ) -> Result<Self::Secured<T>, ConnectionError> {
        let host = host.unwrap_or_default();
        let name = self.name_for(host).map_err(|error: TlsError| ConnectionError::Tls {
            reason: format!("{error}; set the name that the server's certificate is for").into(),
        })?;
        let transport = tokio::io::BufReader::with_capacity(READ_LEN, transport);
        let connecting = TlsConnector::from(self.config()).connect(name, transport);
        connecting.await.map_err(ConnectionError::of_transport)
    }
}

/// Bytes of another protocol's greeting that an error quotes.
const QUOTED_LEN: usize = 32;

/// Sends a `Hello`. Returns the server's `Welcome` and the bytes that followed it.
pub(super) async fn shake_hands<T: AsyncRead + AsyncWrite + Unpin>(
    transport: &mut T,
    options: &ClientOptions,
) -> Result<(Welcome, Vec<u8>), ConnectionError> {
    let bytes = options.token.len();
    if bytes > MAX_TOKEN_LEN {
        let limit = MAX_TOKEN_LEN;
        return Err(ConnectionError::TokenTooLong { bytes, limit });
    }
    let mut hello = Vec::new();
    Message::Hello(Hello::new(&options.token)).encode(0, &mut hello);
    // A server that refuses clients may close before it has read the whole Hello. Its error is
    // still there to read, and is clearer than a broken pipe.
    let written = match transport.write_all(&hello).await {
        Ok(()) => transport.flush().await,
        error => error,
    };
    let mut input = Vec::with_capacity(512);
    loop {
        if let Some(welcome) = first_frame(&input)? {
            check(&welcome, options)?;
            let frame_len = Header::decode(&input).map_or(0, |header| header.frame_len());
            return Ok((welcome, input.split_off(frame_len)));
        }
        let read = match transport.read_buf(&mut input).await {
            Ok(read) => read,
            Err(error) => {
                return Err(ConnectionError::of_transport(written.err().unwrap_or(error)));
            }
        };
        if read == 0 {
            return Err(match written {
                Err(error) => ConnectionError::Io(error),
                Ok(()) if input.is_empty() => ConnectionError::ClosedByPeer,
                Ok(()) if input.len() >= HEADER_LEN => ConnectionError::ClosedByPeer,
                Ok(()) => another_protocol(&input),
            });
        }
    }
}

/// The `Welcome` at the start of `input`; `None` while it is incomplete.
fn first_frame(input: &[u8]) -> Result<Option<Welcome>, ConnectionError> {
    let Some(header) = Header::decode(input) else {
        return Ok(None);
    };
    if !matches!(header.kind, Kind::Welcome | Kind::Error | Kind::GoAway) {
        return Err(another_protocol(input));
    }
    let frame = match Frame::decode(input, MAX_HANDSHAKE_BODY) {
        Ok(None) => return Ok(None),
        Ok(Some(frame)) => frame,
        Err(error @ FrameError::TooLarge { .. }) => {
            return Err(ConnectionError::Violation(Violation::Frame(error)));
        }
    };
    match Message::decode(frame) {
        Ok(Message::Welcome(welcome)) => Ok(Some(welcome)),
        Ok(Message::Error { status, text, .. }) => {
            let text = text.into();
            Err(ConnectionError::Rejected { status, text })
        }
        Ok(Message::GoAway { text }) => {
            Err(ConnectionError::Rejected { status: Status::ShuttingDown, text: text.into() })
        }
        Ok(_) => Err(another_protocol(input)),
        Err(error) => Err(ConnectionError::Violation(Violation::Body { kind: header.kind, error })),
    }
}

fn check(welcome: &Welcome, options: &ClientOptions) -> Result<(), ConnectionError> {
    if !(OLDEST_VERSION..=VERSION).contains(&welcome.version) {
        return Err(ConnectionError::WrongVersion { ours: VERSION, theirs: welcome.version });
    }
    match options.expect {
        Some(expected) if !expected.is_met_by(welcome.service) => {
            Err(ConnectionError::WrongService {
                expected,
                found: welcome.service,
                name: welcome.name.as_str().into(),
            })
        }
        _ => Ok(()),
    }
}

fn another_protocol(input: &[u8]) -> ConnectionError {
    let first_bytes = input[..input.len().min(QUOTED_LEN)].into();
    ConnectionError::Violation(Violation::AnotherProtocol { first_bytes })
}
