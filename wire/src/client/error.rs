//! Errors of calls.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::connection_error::{ConnectionError, Violation};
use crate::Status;
use crate::proto::Shape;
use crate::text::{Report, escape_text};

/// Why a call has no answer.
///
/// The message of a variant does not repeat its cause, which [`source`](Error::source) gives.
/// [`Report`] prints an error and all its causes in one line.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CallError {
    /// The server answered with an error. Its status says whether to try again later.
    Server {
        /// The server's address.
        server: Arc<str>,
        /// What went wrong.
        status: Status,
        /// The server's explanation.
        text: Box<str>,
    },
    /// Time ran out. Try again, or allow more time; the stage says where the time was spent.
    DeadlineExceeded {
        /// The server's address; all addresses while there is no connection.
        server: Arc<str>,
        /// Where the call was when its time ran out.
        stage: Stage,
        /// How long the call was allowed to take.
        timeout: Duration,
        /// Why there was no connection, when that is known.
        last_error: Option<Arc<ConnectionError>>,
    },
    /// The connection was lost with the request in flight: the server may have processed it. The
    /// client sends reads again by itself, at most twice; try again later.
    ConnectionLost {
        /// The server's address.
        server: Arc<str>,
        /// Why the connection was lost.
        cause: Arc<ConnectionError>,
    },
    /// There is no connection, and the client does not wait for one
    /// ([`fail_fast`](super::ClientOptions::fail_fast)). The request was not sent; try another
    /// server, or try later.
    Unavailable {
        /// The server's address.
        server: Arc<str>,
        /// Why the last connection or attempt failed.
        last_error: Arc<ConnectionError>,
    },
    /// The server refuses this client, or is not the server that the client expects. Correct the
    /// token, the address or the version. The client tries again every few seconds.
    Refused {
        /// The server's address.
        server: Arc<str>,
        /// The problem.
        reason: Arc<ConnectionError>,
    },
    /// The image, or the body of another request, is larger than the server accepts.
    TooLarge {
        /// Bytes of the body.
        bytes: usize,
        /// The largest body that the server accepts.
        limit: u32,
    },
    /// The image does not have the length that the server's model takes.
    BadArgument {
        /// Bytes of the image.
        bytes: usize,
        /// Bytes that it should have.
        expected: usize,
        /// The input that the model takes.
        shape: Shape,
    },
    /// The request cannot be sent as it is: a name is too long, or it has no rows.
    Invalid {
        /// The problem.
        reason: Box<str>,
    },
    /// The server speaks an older version of the protocol. Update the server.
    OldServer {
        /// The version that has this request.
        needed: u16,
        /// The version of the connection.
        version: u16,
    },
    /// The server sent bytes that the protocol does not allow. It is broken, or it is not an
    /// Afterimage server: check the address, then report a bug in the server.
    Protocol {
        /// The server's address.
        server: Arc<str>,
        /// What it did.
        violation: Violation,
    },
    /// Too many bytes wait to be sent. Send fewer requests, or try later.
    QueueFull {
        /// Bytes that wait.
        queued_bytes: usize,
        /// Bytes that may wait: [`max_queued_bytes`](super::ClientOptions::max_queued_bytes).
        limit_bytes: usize,
    },
    /// The client was closed or dropped, or its runtime was. Create a new client.
    Closed,
}

/// Groups of errors, by what the caller can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request can never be answered. Correct it.
    Invalid,
    /// Time ran out, at the client or at the server. Allow more time.
    Timeout,
    /// A queue is full, at the client or at the server. Retry after a pause.
    Overloaded,
    /// The server cannot be reached, was lost, or shuts down. Retry later, or at another server.
    Unavailable,
    /// The server refuses this client. Correct its token, its certificate or its rights.
    Denied,
    /// The server does not support the request. Update it, or use another server.
    Unsupported,
    /// The server failed, or a server behind it.
    Server,
    /// The server broke the protocol.
    Protocol,
    /// The client is closed. Create a new one.
    Closed,
}

impl CallError {
    /// The group of the error.
    ///
    /// ```
    /// use afterimage_wire::CallError;
    /// use afterimage_wire::client::ErrorKind;
    ///
    /// let error = CallError::QueueFull { queued_bytes: 4097, limit_bytes: 4096 };
    /// assert_eq!(error.kind(), ErrorKind::Overloaded);
    /// assert!(error.is_retryable());
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            CallError::Server { status, .. } => match status {
                Status::BadArgument | Status::TooLarge => ErrorKind::Invalid,
                Status::DeadlineExceeded => ErrorKind::Timeout,
                Status::Overloaded => ErrorKind::Overloaded,
                Status::ShuttingDown | Status::UpstreamCrashed => ErrorKind::Unavailable,
                Status::Unauthenticated | Status::Unauthorized => ErrorKind::Denied,
                Status::Unsupported => ErrorKind::Unsupported,
                _ => ErrorKind::Server,
            },
            CallError::DeadlineExceeded { .. } => ErrorKind::Timeout,
            CallError::ConnectionLost { .. } | CallError::Unavailable { .. } => {
                ErrorKind::Unavailable
            }
            CallError::Refused { reason, .. } => match **reason {
                ConnectionError::WrongService { .. } | ConnectionError::WrongVersion { .. } => {
                    ErrorKind::Unsupported
                }
                _ => ErrorKind::Denied,
            },
            CallError::TooLarge { .. }
            | CallError::BadArgument { .. }
            | CallError::Invalid { .. } => ErrorKind::Invalid,
            CallError::OldServer { .. } => ErrorKind::Unsupported,
            CallError::Protocol { .. } => ErrorKind::Protocol,
            CallError::QueueFull { .. } => ErrorKind::Overloaded,
            CallError::Closed => ErrorKind::Closed,
        }
    }

    /// The status with which a service reports this error to its own client.
    ///
    /// Errors that concern that client (a wrong image, too much work, too little time) keep their
    /// status. Errors between the service and its upstream become one of the three upstream
    /// statuses.
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
            CallError::ConnectionLost { cause, .. }
            | CallError::Unavailable { last_error: cause, .. } => match **cause {
                ConnectionError::Violation(_) => Status::UpstreamCorrupt,
                _ => Status::UpstreamCrashed,
            },
            CallError::Refused { .. } => Status::UpstreamError,
            CallError::TooLarge { .. } => Status::TooLarge,
            CallError::BadArgument { .. } | CallError::Invalid { .. } => Status::BadArgument,
            CallError::OldServer { .. } => Status::Unsupported,
            CallError::Protocol { .. } => Status::UpstreamCorrupt,
            CallError::QueueFull { .. } => Status::Overloaded,
            CallError::Closed => Status::ShuttingDown,
        }
    }

    /// The error and its cause without the server's address, for the clients of a service that
    /// calls the server. `name` is its role, for example "the classifier".
    pub fn without_address(&self, name: &str) -> String {
        let mut error = self.clone();
        if let CallError::Server { server, .. }
        | CallError::DeadlineExceeded { server, .. }
        | CallError::ConnectionLost { server, .. }
        | CallError::Unavailable { server, .. }
        | CallError::Refused { server, .. }
        | CallError::Protocol { server, .. } = &mut error
        {
            *server = name.into();
        }
        let cause = match &error {
            CallError::ConnectionLost { cause, .. }
            | CallError::DeadlineExceeded { last_error: Some(cause), .. }
            | CallError::Unavailable { last_error: cause, .. }
            | CallError::Refused { reason: cause, .. } => cause,
            _ => return Report(&error).to_string(),
        };
        format!("{error}: {}", cause.without_address())
    }

    /// Whether the same call may succeed later, without a change to the request, the client or the
    /// server's configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            CallError::Server { status, .. } => status.is_retryable(),
            CallError::DeadlineExceeded { .. }
            | CallError::ConnectionLost { .. }
            | CallError::Unavailable { .. }
            | CallError::QueueFull { .. } => true,
            CallError::Refused { .. }
            | CallError::TooLarge { .. }
            | CallError::BadArgument { .. }
            | CallError::Invalid { .. }
            | CallError::OldServer { .. }
            | CallError::Protocol { .. }
            | CallError::Closed => false,
        }
    }

    /// Whether time ran out, at the client or at the server.
    pub fn is_timeout(&self) -> bool {
        self.kind() == ErrorKind::Timeout
    }

    /// Whether a request that may be sent twice should be sent again at once.
    pub(super) fn is_worth_another_try(&self) -> bool {
        matches!(
            self,
            CallError::ConnectionLost { .. }
                | CallError::Server { status: Status::ShuttingDown, .. }
        )
    }

    /// The error of a call to `server` that cannot be sent for this reason, permanently or for a
    /// while.
    pub(super) fn of_connection(
        cause: &Arc<ConnectionError>,
        server: &Arc<str>,
        permanent: bool,
    ) -> Self {
        let server = Arc::clone(server);
        match &**cause {
            ConnectionError::Violation(violation) if permanent => {
                CallError::Protocol { server, violation: violation.clone() }
            }
            _ if permanent => CallError::Refused { server, reason: Arc::clone(cause) },
            _ => CallError::Unavailable { server, last_error: Arc::clone(cause) },
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Server { server, status, text } => {
                write!(f, "{server} answered {status}: {}", escape_text(text))
            }
            CallError::DeadlineExceeded { server, stage, timeout, .. } => {
                write!(f, "no answer from {server} within {timeout:?}: {stage}")
            }
            CallError::ConnectionLost { server, .. } => {
                write!(f, "the connection to {server} was lost while the request was in flight")
            }
            CallError::Unavailable { server, last_error } => match **last_error {
                ConnectionError::Connect(_)
                | ConnectionError::ConnectTimeout { .. }
                | ConnectionError::HandshakeTimeout { .. } => {
                    write!(f, "cannot connect to {server}")
                }
                _ => write!(f, "not connected to {server}"),
            },
            CallError::Refused { server, reason } => match **reason {
                ConnectionError::Rejected { .. } => write!(f, "{server} refused the connection"),
                _ => write!(f, "cannot use {server}"),
            },
            CallError::TooLarge { bytes, limit } => {
                write!(f, "the request is {bytes} bytes; the server accepts at most {limit}")
            }
            CallError::BadArgument { bytes, expected, shape } => {
                write!(f, "the image is {bytes} bytes; the model takes {shape} = {expected}")
            }
            CallError::Invalid { reason } => write!(f, "invalid request: {reason}"),
            CallError::OldServer { needed, version } => {
                write!(f, "the server speaks protocol version {version}; this call needs {needed}")
            }
            CallError::Protocol { server, violation: Violation::AnotherProtocol { .. } } => {
                write!(f, "{server} is not an Afterimage server")
            }
            CallError::Protocol { server, .. } => write!(f, "{server} broke the protocol"),
            CallError::QueueFull { queued_bytes, limit_bytes } => {
                write!(f, "{queued_bytes} bytes wait to be sent; the limit is {limit_bytes}")
            }
            CallError::Closed => f.write_str("the client is closed"),
        }
    }
}

impl Error for CallError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            CallError::ConnectionLost { cause, .. }
            | CallError::DeadlineExceeded { last_error: Some(cause), .. }
            | CallError::Unavailable { last_error: cause, .. }
            | CallError::Refused { reason: cause, .. } => Some(&**cause),
            CallError::Protocol { violation, .. } => Some(violation),
            _ => None,
        }
    }
}

/// Where a call was when its time ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// There was no connection. The request was not sent.
    Connecting,
    /// The server's window was full of other requests. The request was not sent.
    Queued,
    /// The request was sent, or was about to be.
    AwaitingReply,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Connecting => "still connecting",
            Stage::Queued => "still queued behind other requests",
            Stage::AwaitingReply => "still waiting for the reply",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::Expect;
    use super::*;
    use crate::proto::Role;
    use std::io;

    fn server() -> Arc<str> {
        "127.0.0.1:7400".into()
    }

    #[test]
    fn a_report_names_server_and_cause_once() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let rejected = |status, text: &str| ConnectionError::Rejected { status, text: text.into() };
        let http = Violation::AnotherProtocol { first_bytes: b"HTTP/1.1 400".as_slice().into() };
        for (cause, permanent, line) in [
            (
                ConnectionError::Connect(refused),
                false,
                "cannot connect to 127.0.0.1:7400: connection refused",
            ),
            (
                ConnectionError::HandshakeTimeout { after: Duration::from_secs(2) },
                false,
                "cannot connect to 127.0.0.1:7400: the TCP connection was accepted, but no Welcome \
                 came within 2s; is it an Afterimage server?",
            ),
            (
                rejected(Status::Unauthenticated, "the token is wrong"),
                true,
                "127.0.0.1:7400 refused the connection: the token is wrong (unauthenticated)",
            ),
            (
                ConnectionError::Violation(http),
                true,
                "127.0.0.1:7400 is not an Afterimage server: it speaks HTTP; \
                 first bytes \"HTTP/1.1 400\"",
            ),
        ] {
            let error = CallError::of_connection(&Arc::new(cause), &server(), permanent);
            assert_eq!(Report(&error).to_string(), line);
            assert!(error.source().is_some(), "{error}");
        }
    }

    #[test]
    fn an_error_without_address_keeps_its_cause() {
        let named = "invalid certificate for db7.internal";
        let tls = ConnectionError::Tls { reason: named.into() };
        let lookup = ConnectionError::Connect(io::Error::other("no db7.internal in 10.0.0.7"));
        let refused = ConnectionError::Connect(io::ErrorKind::ConnectionRefused.into());
        for (cause, permanent, line) in [
            (tls, true, "cannot use the classifier: TLS failed"),
            (lookup, false, "cannot connect to the classifier: other error"),
            (refused, false, "cannot connect to the classifier: connection refused"),
            (
                ConnectionError::ClosedByPeer,
                false,
                "not connected to the classifier: the server closed the connection",
            ),
        ] {
            let error = CallError::of_connection(&Arc::new(cause), &server(), permanent);
            assert_eq!(error.without_address("the classifier"), line);
        }
        let error = CallError::DeadlineExceeded {
            server: server(),
            stage: Stage::AwaitingReply,
            timeout: Duration::from_secs(1),
            last_error: None,
        };
        let line = "no answer from the classifier within 1s: still waiting for the reply";
        assert_eq!(error.without_address("the classifier"), line);
    }

    #[test]
    fn texts_of_a_server_are_displayed_escaped() {
        let hostile = "full\n2026-01-01 INFO forged \u{1b}[2J\u{202e}";
        let shown = r"full\n2026-01-01 INFO forged \u{1b}[2J\u{202e}";
        let status = Status::Overloaded;
        let call = CallError::Server { server: server(), status, text: hostile.into() };
        assert_eq!(call.to_string(), format!("127.0.0.1:7400 answered overloaded: {shown}"));
        let rejected = ConnectionError::Rejected { status, text: hostile.into() };
        assert_eq!(rejected.to_string(), format!("{shown} (overloaded)"));
        let (expected, found) = (Expect::Cache, Role::Memo);
        let wrong = ConnectionError::WrongService { expected, found, name: hostile.into() };
        assert_eq!(wrong.to_string(), format!("expected a cache but found memo (\"{shown}\")"));
    }

    #[test]
    fn a_source_is_the_error_that_caused_it() {
        let cause = Arc::new(ConnectionError::ClosedByPeer);
        let error = CallError::ConnectionLost { server: server(), cause };
        let cause = error.source().and_then(|source| source.downcast_ref());
        assert!(matches!(cause, Some(ConnectionError::ClosedByPeer)));
        assert!(error.is_retryable() && !error.is_timeout());
    }
}
