//! What all bodies share: how one can be wrong, and how a text is cut to its limit.

use afterimage_core::Status;

/// Why a frame's body is not a message of its kind. The frame's length is known, so the stream
/// stays in step.
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
    /// A `Hello` or `Welcome` that does not begin as they do.
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
        /// What it says.
        value: u64,
        /// What it may be.
        limit: u64,
    },
    /// A flag in a request that this version does not know. It may change what is asked for, so it
    /// is not ignored. (In a reply it is.)
    #[error("flags {flags:#04x} are not known for this kind of request")]
    UnknownFlags {
        /// The unknown bits.
        flags: u8,
    },
}

impl BodyError {
    /// The status that tells a client of it.
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
