//! Errors of streams.

use std::sync::Arc;

use crate::Status;
use crate::client::ConnectionError;
use crate::text::Escaped;

/// Why a stream has ended before its regular end.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The peer has ended the stream. With [`Status::None`] it no longer needs the stream.
    #[error("the peer ended the stream: {}", reason(*status, text))]
    Reset {
        /// The reason.
        status: Status,
        /// The explanation of the peer.
        text: Arc<str>,
    },
    /// The connection ended, and all its streams with it. Open the stream again.
    #[error("the connection of the stream was lost")]
    Lost {
        /// The cause, if this side knows it.
        #[source]
        cause: Option<Arc<ConnectionError>>,
    },
    /// The peer broke the protocol; this side has ended the stream.
    #[error("the peer broke the protocol of streams: {reason}")]
    Violation {
        /// The rule that was broken.
        reason: Arc<str>,
    },
    /// A progress message that is too long.
    #[error("the progress message has {bytes} bytes; the limit is {limit}")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The longest one allowed.
        limit: usize,
    },
    /// This side has ended the stream or the direction already.
    #[error("the stream was ended on this side already")]
    Ended,
}

impl StreamError {
    /// The status of the peer's reset, or the one that describes this error to other clients.
    pub fn status(&self) -> Status {
        match self {
            StreamError::Reset { status, .. } => *status,
            StreamError::Lost { .. } => Status::UpstreamCrashed,
            StreamError::Violation { .. } => Status::UpstreamCorrupt,
            StreamError::Ended | StreamError::TooLong { .. } => Status::BadArgument,
        }
    }

    /// Whether the same stream may succeed if it is opened again.
    pub fn is_retryable(&self) -> bool {
        match self {
            StreamError::Reset { status, .. } => status.is_retryable(),
            StreamError::Lost { .. } => true,
            StreamError::Violation { .. } | StreamError::TooLong { .. } | StreamError::Ended => {
                false
            }
        }
    }
}

fn reason(status: Status, text: &str) -> String {
    match (status, text) {
        (Status::None, "") => "no longer needed".to_owned(),
        (Status::None, text) => Escaped(text).to_string(),
        (status, text) => format!("{} ({})", Escaped(text), status.name()),
    }
}
