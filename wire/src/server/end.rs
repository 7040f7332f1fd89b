//! Reasons for which a connection ends.

use std::fmt;
use std::io;

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum End {
    /// The client closed it and has all its answers.
    Closed,
    /// The transport failed.
    Io(io::Error),
    /// The server sent the reason and closed.
    Refused(Refusal),
    /// The client read no replies for too long.
    NotReading,
    /// The server is shutting down, or its model has changed.
    Drained,
    /// The TLS handshake failed.
    #[cfg(feature = "tls")]
    Tls(io::Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Closed => f.write_str("closed by the client"),
            End::Io(error) => write!(f, "{error}"),
            End::Refused(refusal) => write!(f, "{refusal}"),
            End::NotReading => f.write_str("the client does not read its replies"),
            End::Drained => f.write_str("drained"),
            #[cfg(feature = "tls")]
            End::Tls(error) => write!(f, "TLS: {error}"),
        }
    }
}

/// Why the server closed a connection that the client would have kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The first bytes are an HTTP request.
    Http,
    /// The first bytes are TLS, and the port has none.
    TlsToPlainPort,
    /// The first bytes are not TLS, and the port demands it.
    PlainToTlsPort,
    /// The TLS handshake took too long.
    #[cfg(feature = "tls")]
    TlsTimeout,
    /// The first frame is not a `Hello`.
    NotHello,
    /// The first frame is a `Hello` that breaks the protocol.
    MalformedHello,
    /// No `Hello` came in time.
    HelloTimeout,
    /// The client speaks no protocol version that the server speaks.
    NoCommonVersion,
    /// The token is missing or wrong.
    WrongToken,
    /// A frame was not complete in time.
    FrameTimeout,
    /// A frame is so large that the server does not skip it.
    FrameTooLarge,
    /// The client sent nothing for too long.
    Idle,
    /// It was the longest idle connection of a full server.
    Evicted,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Http => "the client speaks HTTP",
            Refusal::TlsToPlainPort => "the client speaks TLS, and this port does not",
            Refusal::PlainToTlsPort => "the client does not speak TLS, and this port does",
            #[cfg(feature = "tls")]
            Refusal::TlsTimeout => "no TLS handshake in time",
            Refusal::NotHello => "the first frame is not a Hello",
            Refusal::MalformedHello => "malformed Hello",
            Refusal::HelloTimeout => "no Hello in time",
            Refusal::NoCommonVersion => "no protocol version in common",
            Refusal::WrongToken => "missing or wrong token",
            Refusal::FrameTimeout => "a frame was not complete in time",
            Refusal::FrameTooLarge => "a frame is far too large",
            Refusal::Idle => "idle",
            Refusal::Evicted => "idle, and the server is full",
        })
    }
}
