//! What can go wrong with a call, with a connection, and with what a server says.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::rustls::{self, AlertDescription};

use super::options::Expect;
use crate::Status;
use crate::proto::{BodyError, FrameError, Kind, Role, Shape};

/// Why a call has no answer.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The server answered with an error. Its status says whether to try again later.
    #[error("the server answered {status}: {text}")]
    Server {
        /// What went wrong.
        status: Status,
        /// The same in the server's words.
        text: Box<str>,
    },
    /// Time ran out. Try again, allow more time, or look at where it was spent.
    #[error("no answer within {timeout:?}: {stage}{}", Last(last_error))]
    DeadlineExceeded {
        /// Where the call was by then.
        stage: Stage,
        /// How long it was allowed to take.
        timeout: Duration,
        /// Why there was no connection, when that is known.
        last_error: Option<Arc<ConnectionError>>,
    },
    /// The connection went away with the request in flight: nobody knows whether the server worked
    /// on it. Reads are sent again by the client itself, twice at most; try again later.
    #[error("the connection was lost while the request was in flight: {cause}")]
    ConnectionLost {
        /// What became of the connection.
        cause: Arc<ConnectionError>,
    },
    /// There is no connection and the client was told not to wait for one. The request was not
    /// sent; ask elsewhere, or later.
    #[error("not connected: {last_error}")]
    Unavailable {
        /// Why the last connection or attempt failed.
        last_error: Arc<ConnectionError>,
    },
    /// The server does not want this client, or is not what it expects. Mend the token, the address
    /// or the versions; the client looks again every few seconds.
    #[error("the server was reached but will not do: {reason}")]
    Refused {
        /// What stands in the way.
        reason: Arc<ConnectionError>,
    },
    /// The image is larger than the server takes. Send less.
    #[error("the image is {bytes} bytes; the server takes {limit}")]
    TooLarge {
        /// Bytes of the image.
        bytes: usize,
        /// The largest body that the server takes.
        limit: u32,
    },
    /// The image has not the length that the server's model takes. Mend the caller.
    #[error("the image is {bytes} bytes; the model takes {shape} = {expected}")]
    BadArgument {
        /// Bytes of the image.
        bytes: usize,
        /// Bytes that it should have.
        expected: usize,
        /// The input that the model takes.
        shape: Shape,
    },
    /// The server's answer is not one. It is broken, or speaks another protocol: tell its keeper.
    #[error("the server broke the protocol: {violation}")]
    Protocol {
        /// What it did.
        violation: Violation,
    },
    /// Too much waits to be sent already. Send less, or come back later.
    #[error("{queued_bytes} bytes wait to be sent; the limit is {limit_bytes}")]
    QueueFull {
        /// Bytes that wait.
        queued_bytes: usize,
        /// Bytes that may wait: [`max_queued_bytes`](super::ClientOptions::max_queued_bytes).
        limit_bytes: usize,
    },
    /// The client was closed or dropped, or its runtime was. Make a new one.
    #[error("the client is closed")]
    Closed,
}

impl CallError {
    /// The status that tells a service's own client of it.
    ///
    /// What is that client's business (a bad image, too much work, too little time) keeps its
    /// status; what lies between the service and its upstream becomes one of the three upstream
    /// errors.
    pub fn status(&self) -> Status {
        match self {
            CallError::Server { status, .. } => match status {
                Status::Overloaded
                | Status::DeadlineExceeded
                | Status::BadArgument
                | Status::TooLarge
                | Status::UpstreamError
                | Status::UpstreamCrashed
                | Status::UpstreamCorrupt => *status,
                _ => Status::UpstreamError,
            },
            CallError::DeadlineExceeded { .. } => Status::DeadlineExceeded,
            CallError::ConnectionLost { cause } | CallError::Unavailable { last_error: cause } => {
                match **cause {
                    ConnectionError::Violation(_) => Status::UpstreamCorrupt,
                    _ => Status::UpstreamCrashed,
                }
            }
            CallError::Refused { .. } => Status::UpstreamError,
            CallError::TooLarge { .. } => Status::TooLarge,
            CallError::BadArgument { .. } => Status::BadArgument,
            CallError::Protocol { .. } => Status::UpstreamCorrupt,
            CallError::QueueFull { .. } => Status::Overloaded,
            CallError::Closed => Status::ShuttingDown,
        }
    }

    /// There is no thread or no event queue for a client.
    pub(crate) fn no_resources(error: io::Error) -> Self {
        CallError::Unavailable { last_error: Arc::new(ConnectionError::Connect(error)) }
    }

    /// Whether a request that may be sent twice should be sent again right now.
    pub(super) fn is_worth_another_try(&self) -> bool {
        matches!(
            self,
            CallError::ConnectionLost { .. }
                | CallError::Server { status: Status::ShuttingDown, .. }
        )
    }
}

struct Last<'a>(&'a Option<Arc<ConnectionError>>);

impl fmt::Display for Last<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(error) => write!(f, " (last error: {error})"),
            None => Ok(()),
        }
    }
}

/// Where a call was when its time ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// There was no connection. The request was not sent.
    Connecting,
    /// As many requests as the server wants were in flight. The request was not sent.
    Queued,
    /// It was sent, or about to be.
    AwaitingReply,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Connecting => "still connecting",
            Stage::Queued => "still queued behind other requests",
            Stage::AwaitingReply => "still awaiting the reply",
        })
    }
}

/// Why a connection could not be made, or is no more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The server cannot be reached. Look at its address, whether it runs, and what lies between.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// Nobody answered at that address in time. Look as above, or allow more time.
    #[error("cannot connect within {after:?}")]
    ConnectTimeout {
        /// How long the attempt took.
        after: Duration,
    },
    /// Whoever answered did not say `Welcome` in time. It may not be an Afterimage server.
    #[error("connected, but no Welcome came within {after:?}")]
    HandshakeTimeout {
        /// How long it was waited for.
        after: Duration,
    },
    /// The transport failed.
    #[error("{0}")]
    Io(io::Error),
    /// One end does not trust the other, or does not speak TLS. Mend certificates, names or the
    /// port.
    #[error("TLS: {reason}")]
    Tls {
        /// What is wrong.
        reason: Box<str>,
    },
    /// The server closed the connection.
    #[error("the server closed the connection")]
    ClosedByPeer,
    /// Nothing came for so long, not even a reply to a `Ping`, that nobody can be there.
    #[error("nothing came from the server for {silence:?}")]
    Silent {
        /// For how long.
        silence: Duration,
    },
    /// The server answered the handshake, or ended the connection, with an error.
    #[error("the server ended the connection with {status}: {text}")]
    Rejected {
        /// What went wrong.
        status: Status,
        /// The same in the server's words.
        text: Box<str>,
    },
    /// Another service answers at that address. Mend the address.
    #[error("expected {expected} but found {found} ({name:?})")]
    WrongService {
        /// What the client was told to expect.
        expected: Expect,
        /// What answers there.
        found: Role,
        /// The name that it gives itself.
        name: Box<str>,
    },
    /// The server wants to speak a version that this client did not offer. Update one of them.
    #[error("the server speaks version {theirs} of the protocol; this client speaks {ours}")]
    WrongVersion {
        /// The version that this client speaks.
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
    #[error("the server broke the protocol: {0}")]
    Violation(Violation),
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

    /// Whether the next attempt would most likely end the same way.
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

    /// The error of a call that finds the client in this trouble, for good or for a while.
    pub(super) fn of_a_call(self: &Arc<Self>, permanent: bool) -> CallError {
        match &**self {
            ConnectionError::Violation(violation) if permanent => {
                CallError::Protocol { violation: violation.clone() }
            }
            _ if permanent => CallError::Refused { reason: Arc::clone(self) },
            _ => CallError::Unavailable { last_error: Arc::clone(self) },
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

/// What a server said that no server may say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// It does not speak this protocol at all.
    #[error("it does not speak it; its first bytes are \"{}\"", first_bytes.escape_ascii())]
    AnotherProtocol {
        /// How it began.
        first_bytes: Box<[u8]>,
    },
    /// A frame above [`max_body`](super::ClientOptions::max_body).
    #[error(transparent)]
    Frame(FrameError),
    /// A body that is not one of its kind.
    #[error("{} of a reply: {error}", kind.name())]
    Body {
        /// The kind.
        kind: Kind,
        /// What is wrong with the body.
        error: BodyError,
    },
    /// A reply that does not answer the request.
    #[error("{} came in reply to {request}", kind.name())]
    WrongReply {
        /// What was asked for.
        request: &'static str,
        /// What came.
        kind: Kind,
    },
    /// A reply to a request that was not made on its connection. Which request is meant cannot be
    /// known, nor whether the replies that follow are meant for those whose ids they carry.
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
}
