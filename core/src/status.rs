//! What can go wrong with a request, as a number on the wire.

use std::fmt;

/// One table makes the number, the name, the text and the advice of every status.
macro_rules! statuses {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $name:literal, $text:literal, retry: $retry:literal;)*) => {
        /// The outcome of a request, as its reply's header carries it.
        ///
        /// A status that this version does not know survives decoding as [`Status::Unknown`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Status {
            $($(#[$doc])* $variant,)*
            /// A number that a newer peer knows and this version does not.
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

            /// What it means, in a few words.
            pub const fn text(self) -> &'static str {
                match self {
                    $(Status::$variant => $text,)*
                    Status::Unknown(_) => "a status that this version does not know",
                }
            }

            /// Whether the same request may well succeed later or elsewhere.
            pub const fn is_retryable(self) -> bool {
                match self { $(Status::$variant => $retry,)* Status::Unknown(_) => false }
            }
        }
    };
}

statuses! {
    /// All is well. A reply that is not an `Error` carries this.
    None = 0, "none", "no error", retry: false;
    /// The service behind this one answered with an error of its own.
    UpstreamError = 1, "upstream_error", "the service behind this one reported an error", retry: true;
    /// The service behind this one cannot be reached, or went away before it answered.
    UpstreamCrashed = 2, "upstream_crashed", "the service behind this one is not there", retry: true;
    /// The service behind this one answered with something that cannot be an answer.
    UpstreamCorrupt = 3, "upstream_corrupt", "the service behind this one gave a senseless answer", retry: true;
    /// The request is not one that this service can ever answer: mend it before you send it again.
    BadArgument = 4, "bad_argument", "the request is malformed", retry: false;
    /// A queue or a table is full. Come back later, after a pause.
    Overloaded = 5, "overloaded", "too much work is waiting already", retry: true;
    /// The request's time budget ran out before it was answered.
    DeadlineExceeded = 6, "deadline_exceeded", "the time budget ran out", retry: false;
    /// The token in the `Hello` is missing or wrong.
    Unauthenticated = 7, "unauthenticated", "the token is missing or wrong", retry: false;
    /// A frame is longer than the limit that the `Welcome` named.
    TooLarge = 8, "too_large", "the frame is too large", retry: false;
    /// A kind, a flag or a version that this peer does not speak.
    Unsupported = 9, "unsupported", "this peer does not do that", retry: false;
    /// The server is going away and has not begun this request: send it elsewhere.
    ShuttingDown = 10, "shutting_down", "the server is shutting down", retry: true;
    /// The server failed in a way that it did not foresee.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_survives_the_way_there_and_back() {
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
