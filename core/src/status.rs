//! Why a request has no answer: a [`Status`] for programs, a [`Failure`] with a text for people.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;

use crate::reply::Outcome;

/// One table makes the number, the name, the text and the advice of every status.
macro_rules! statuses {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $name:literal, $text:literal, retry: $retry:literal;)*) => {
        /// The outcome of a request, as a number in the header of its reply.
        ///
        /// A status that this version does not know survives decoding as [`Status::Unknown`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Status {
            $($(#[$doc])* $variant,)*
            /// A number that only a newer version knows.
            Unknown(u16),
        }

        impl Status {
            /// Every status that this version knows, in the order of their numbers.
            pub const ALL: &[Status] = &[$(Status::$variant,)*];

            /// The number on the wire.
            pub const fn code(self) -> u16 {
                match self { $(Status::$variant => $code,)* Status::Unknown(code) => code }
            }

            /// The status of a number on the wire.
            pub const fn from_code(code: u16) -> Status {
                match code { $($code => Status::$variant,)* other => Status::Unknown(other) }
            }

            /// The short name, as logs and other languages' clients spell it.
            pub const fn name(self) -> &'static str {
                match self { $(Status::$variant => $name,)* Status::Unknown(_) => "unknown" }
            }

            /// Its meaning, in a few words.
            pub const fn text(self) -> &'static str {
                match self {
                    $(Status::$variant => $text,)*
                    Status::Unknown(_) => "a status that this version does not know",
                }
            }

            /// Whether the same request can succeed later or elsewhere.
            pub const fn is_retryable(self) -> bool {
                match self { $(Status::$variant => $retry,)* Status::Unknown(_) => false }
            }
        }
    };
}

statuses! {
    /// No error: the status of every reply that is not an `Error`.
    None = 0, "none", "no error", retry: false;
    /// The upstream answered with an error of its own.
    UpstreamError = 1, "upstream_error", "the upstream reported an error", retry: true;
    /// The upstream cannot be reached, or its connection closed before it answered.
    UpstreamCrashed = 2, "upstream_crashed", "the upstream cannot be reached", retry: true;
    /// The upstream sent an invalid answer.
    UpstreamCorrupt = 3, "upstream_corrupt", "the upstream sent an invalid answer", retry: true;
    /// The service can never answer this request. Correct it before you send it again.
    BadArgument = 4, "bad_argument", "the request is malformed", retry: false;
    /// A queue or a table is full. Retry after a pause.
    Overloaded = 5, "overloaded", "too many requests are waiting", retry: true;
    /// The deadline of the request passed before it was answered.
    DeadlineExceeded = 6, "deadline_exceeded", "the deadline passed", retry: false;
    /// The token in the `Hello` is missing or wrong.
    Unauthenticated = 7, "unauthenticated", "the token is missing or wrong", retry: false;
    /// A frame is longer than the limit in the `Welcome`.
    TooLarge = 8, "too_large", "the frame is too large", retry: false;
    /// A kind, a flag or a version that this peer does not support.
    Unsupported = 9, "unsupported", "this peer does not support the request", retry: false;
    /// The server is shutting down and has not started this request. Send it to another server.
    ShuttingDown = 10, "shutting_down", "the server is shutting down", retry: true;
    /// An unexpected failure of the server, which is a bug.
    Internal = 11, "internal", "the server failed unexpectedly", retry: true;
    /// The server cannot write its file, for example because the disk is full. The old file stays.
    StorageFailed = 12, "storage_failed", "the server cannot write its file", retry: true;
    /// The token of this connection does not allow this request. It needs the admin token.
    Unauthorized = 13, "unauthorized", "this connection has no admin rights", retry: false;
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Status::Unknown(code) => write!(f, "unknown status {code}"),
            known => f.write_str(known.name()),
        }
    }
}

/// A request that failed: a status for programs, a text for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status}: {text}")]
pub struct Failure {
    /// The kind of failure. It also decides whether a retry can succeed.
    pub status: Status,
    /// The failure, its cause and the remedy, for people. It names the thing, the limit and the
    /// value.
    pub text: Cow<'static, str>,
    /// The upstream's own reply, in a form that its endpoint and the front end share. Each waiter
    /// of a failed call gets it, and no store.
    pub payload: Option<Bytes>,
}

impl Failure {
    /// A failure of this status.
    pub fn new(status: Status, text: impl Into<Cow<'static, str>>) -> Self {
        Failure { status, text: text.into(), payload: None }
    }

    /// The same with the upstream's own reply.
    #[must_use]
    pub fn with_payload(mut self, payload: impl Into<Option<Bytes>>) -> Self {
        self.payload = payload.into();
        self
    }

    /// The failure of a request that was dropped without an answer, by a bug or a panic.
    pub fn abandoned() -> Self {
        Failure::new(Status::Internal, "the service dropped the request without an answer")
    }

    /// The failure of a request whose model was replaced. The Welcome of a new connection has the
    /// new model.
    pub fn model_changed() -> Self {
        Failure::new(Status::ShuttingDown, "the model has changed; send the request again")
    }

    /// Whether the same request can succeed later or elsewhere.
    pub fn is_retryable(&self) -> bool {
        self.status.is_retryable()
    }
}

impl Outcome for Failure {
    fn abandoned() -> Self {
        Failure::abandoned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_survives_a_round_trip() {
        for code in 0..=u16::MAX {
            assert_eq!(Status::from_code(code).code(), code);
        }
    }

    #[test]
    fn the_known_numbers_are_consecutive_and_named_apart() {
        for (i, status) in Status::ALL.iter().enumerate() {
            assert_eq!(usize::from(status.code()), i);
        }
        let mut names: Vec<_> = Status::ALL.iter().map(|s| s.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Status::ALL.len());
    }
}
