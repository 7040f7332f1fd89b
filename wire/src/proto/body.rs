//! Errors of bodies, and the cut of a text at its limit.

use afterimage_core::Status;

/// Why a frame's body does not decode. The frame's length is known, so the stream stays in step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BodyError {
    /// The body ends inside a field.
    #[error("the body ends inside the {field}")]
    Truncated {
        /// Which field.
        field: &'static str,
    },
    /// The body goes on after its last field.
    #[error("{bytes} bytes too many at the end of the body")]
    Trailing {
        /// How many bytes.
        bytes: usize,
    },
    /// A `Hello` or `Welcome` without the magic bytes.
    #[error("the body does not begin with the magic \"AFTERIMG\"")]
    WrongMagic,
    /// A text that is not UTF-8.
    #[error("the {field} is not UTF-8")]
    NotUtf8 {
        /// Which field.
        field: &'static str,
    },
    /// A number above its limit.
    #[error("the {field} is {value}; the limit is {limit}")]
    OutOfRange {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The largest value allowed.
        limit: u64,
    },
    /// A list that must have at least one entry.
    #[error("the {field} is 0; at least 1 is needed")]
    Empty {
        /// Which field.
        field: &'static str,
    },
    /// An unknown flag in a request. It may change the meaning of the request, so it is not
    /// ignored. In a reply, unknown flags are ignored.
    #[error("flags {flags:#04x} are not known for this kind of request")]
    UnknownFlags {
        /// The unknown bits.
        flags: u8,
    },
}

impl BodyError {
    /// The status with which a server reports this error.
    pub fn status(&self) -> Status {
        match self {
            BodyError::UnknownFlags { .. } => Status::Unsupported,
            _ => Status::BadArgument,
        }
    }
}

/// Cuts `text` to at most `limit` bytes, between two characters.
pub(super) fn truncate(text: &str, limit: usize) -> &str {
    let mut end = limit.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
