//! Errors of connections, and violations of the protocol by a server.

use std::fmt;
use std::io;
use std::time::Duration;

#[cfg(feature = "tls")]
use tokio_rustls::rustls::{self, AlertDescription, CertificateError};

use super::options::Expect;
use crate::Status;
use crate::proto::{BodyError, FrameError, Kind, Role};
use crate::text::{Report, escape_text};

/// Why a connection could not be opened, or was lost.
///
/// The messages do not name the server: [`CallError`](super::CallError) and log lines do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The server cannot be reached. Check its address, whether it runs, and the network.
    #[error(transparent)]
    Connect(io::Error),
    /// The address did not answer in time. Check as above, or allow more time.
    #[error("no TCP connection within {after:?}")]
    ConnectTimeout {
        /// How long the attempt took.
        after: Duration,
    },
    /// The server sent no `Welcome` in time. It may not be an Afterimage server.
    #[error(
        "the TCP connection was accepted, but no Welcome came within {after:?}; \
         is it an Afterimage server?"
    )]
    HandshakeTimeout {
        /// How long the client waited for it.
        after: Duration,
    },
    /// The transport failed.
    #[error(transparent)]
    Io(io::Error),
    /// One end does not trust the other, or does not speak TLS. Check certificates, names and the
    /// port.
    #[error("TLS: {reason}")]
    Tls {
        /// The problem.
        reason: Box<str>,
    },
    /// The server closed the connection.
    #[error("the server closed the connection")]
    ClosedByPeer,
    /// The server sent nothing for a while, not even a reply to a `Ping`.
    #[error("the server sent nothing for {silence:?}, not even a Pong")]
    Silent {
        /// For how long.
        silence: Duration,
    },
    /// The server answered the handshake, or ended the connection, with an error.
    #[error("{} ({status})", escape_text(text))]
    Rejected {
        /// What went wrong.
        status: Status,
        /// The server's explanation.
        text: Box<str>,
    },
    /// Another kind of service answers at that address. Correct the address.
    #[error("expected {expected} but found {found} (\"{}\")", escape_text(name))]
    WrongService {
        /// What the client expects.
        expected: Expect,
        /// What answers there.
        found: Role,
        /// The name in the server's `Welcome`.
        name: Box<str>,
    },
    /// The server chose a protocol version that this client did not offer. Update one of them.
    #[error("the server speaks version {theirs} of the protocol; this client speaks 1 to {ours}")]
    WrongVersion {
        /// The newest version that this client speaks.
        ours: u16,
        /// The version in the server's `Welcome`.
        theirs: u16,
    },
    /// The token does not fit into a `Hello`. Use a shorter one.
    #[error("the token is {bytes} bytes; the limit is {limit}")]
    TokenTooLong {
        /// Bytes of the token.
        bytes: usize,
        /// Bytes that it may have.
        limit: usize,
    },
    /// The server broke the protocol in a way that ends the connection.
    #[error(transparent)]
    Violation(Violation),
}

impl ConnectionError {
    /// The error of a transport, with TLS errors distinguished.
    ///
    /// It applies to reads after the handshake, too: a server's refusal of the client's certificate
    /// arrives with the first of them.
    pub(super) fn of_transport(error: io::Error) -> Self {
        #[cfg(feature = "tls")]
        if let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
            return ConnectionError::Tls { reason: explain(error).into() };
        }
        match error.kind() {
            // The TLS stream ended without a close_notify. Frames carry their length, so no
            // truncation goes unnoticed.
            io::ErrorKind::UnexpectedEof => ConnectionError::ClosedByPeer,
            _ => ConnectionError::Io(error),
        }
    }

    /// The error without names and addresses, for the clients of a service that calls the server.
    /// System errors and TLS errors can contain the name that was connected to.
    pub fn without_address(&self) -> String {
        match self {
            ConnectionError::Connect(error) | ConnectionError::Io(error) => {
                error.kind().to_string()
            }
            ConnectionError::Tls { .. } => "TLS failed".to_owned(),
            error => Report(error).to_string(),
        }
    }

    /// Whether the next attempt will most likely fail in the same way.
    pub(super) fn is_permanent(&self) -> bool {
        match self {
            ConnectionError::Rejected { status, .. } => !status.is_retryable(),
            ConnectionError::WrongService { .. }
            | ConnectionError::WrongVersion { .. }
            | ConnectionError::TokenTooLong { .. }
            | ConnectionError::Tls { .. }
            | ConnectionError::Violation(_) => true,
            _ => false,
        }
    }
}

/// A TLS error with the remedy, where rustls' own text has none.
#[cfg(feature = "tls")]
fn explain(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidMessage(_) => {
            "the server does not speak TLS on this port; connect without TLS, or to another port"
                .into()
        }
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "no trusted authority has signed the server's certificate (UnknownIssuer); trust its \
             authority, and let the server send the certificates between them"
                .into()
        }
        rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "the server's certificate has expired; renew it".into(),
        rustls::Error::InvalidCertificate(CertificateError::Other(cause))
            if cause.to_string().contains("CaUsedAsEndEntity") =>
        {
            "the server's certificate is an authority's; issue one for the server with it".into()
        }
        rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "the server asks for a client's certificate, and none was given".into()
        }
        rustls::Error::AlertReceived(alert) => {
            format!("the server refused the handshake: {alert:?}")
        }
        error => error.to_string(),
    }
}

/// Bytes from a server that no server may send.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The server speaks another protocol.
    #[error("{}first bytes \"{}\"", Spoken(first_bytes), first_bytes.escape_ascii())]
    AnotherProtocol {
        /// The first bytes that it sent.
        first_bytes: Box<[u8]>,
    },
    /// A frame above [`max_body`](super::ClientOptions::max_body).
    #[error(transparent)]
    Frame(FrameError),
    /// A reply whose body does not decode.
    #[error("malformed {}", kind.name())]
    Body {
        /// The kind of the reply.
        kind: Kind,
        /// The problem with the body.
        #[source]
        error: BodyError,
    },
    /// A reply of the wrong kind for its request.
    #[error("{} came in reply to {request}", kind.name())]
    WrongReply {
        /// The kind of the request.
        request: &'static str,
        /// The kind of the reply.
        kind: Kind,
    },
    /// A reply to a request that was never sent on this connection. The replies after it may be
    /// for the wrong requests, too.
    #[error("a reply to request {id:#x}, which was never sent on this connection")]
    UnknownId {
        /// The reply's id.
        id: u64,
    },
    /// A label that the model cannot give.
    #[error("the label is {class}; the model has {classes} classes")]
    ClassOutOfRange {
        /// The label.
        class: u16,
        /// How many classes the `Welcome` named.
        classes: u32,
    },
    /// A reply with more or fewer answers than the request has rows.
    #[error("the reply has {answers} answers; the request has {rows} rows")]
    WrongAnswers {
        /// Answers in the reply.
        answers: usize,
        /// Rows in the request.
        rows: usize,
    },
}

/// The protocol that begins with these bytes, where it is a well-known one.
struct Spoken<'a>(&'a [u8]);

impl fmt::Display for Spoken<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            [b'H', b'T', b'T', b'P', b'/', ..] => "HTTP",
            [b'S', b'S', b'H', b'-', ..] => "SSH",
            [b'-', b'E' | b'N' | b'W', ..] | [b'+', b'O' | b'P', ..] => "the Redis protocol",
            [0x15, 3, 0..=4, ..] => "TLS",
            _ => return Ok(()),
        };
        write!(f, "it speaks {name}; ")
    }
}

#[cfg(all(test, feature = "tls"))]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_that_is_not_accepted_is_explained() {
        let expired = CertificateError::Expired;
        let unknown = CertificateError::UnknownIssuer;
        for (error, part) in [(expired, "has expired; renew it"), (unknown, "trust its authority")]
        {
            let text = explain(&rustls::Error::InvalidCertificate(error));
            assert!(text.contains("the server's certificate") && text.contains(part), "{text}");
        }
    }
}
