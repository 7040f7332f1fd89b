//! Bodies of frames: their errors, the bounds-checked reader, and the writing of a frame.
//!
//! The reader uses nom's number parsers, with errors that name the field.

use afterimage_core::Status;
use bytes::BufMut;
use nom::Parser;
use nom::bytes::complete::take;
use nom::number::complete::{le_i64, le_u8, le_u16, le_u32, le_u64};

use super::header::{Header, Kind};

/// Bytes in the longest text of an `Error` or `GoAway`: a paragraph, not a page.
pub const MAX_TEXT_LEN: usize = 1024;

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
    /// The body continues after its last field.
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

pub(super) fn put_frame(
    out: &mut impl BufMut,
    kind: Kind,
    flags: u8,
    status: u16,
    id: u64,
    body: &[u8],
) {
    let body_len = u32::try_from(body.len()).expect("a body is shorter than 4 GiB");
    out.put_slice(&Header { body_len, kind, flags, status, id }.encode());
    out.put_slice(body);
}

pub(super) fn put_built(
    out: &mut impl BufMut,
    kind: Kind,
    flags: u8,
    id: u64,
    build: impl FnOnce(&mut Vec<u8>),
) {
    let mut body = Vec::with_capacity(256);
    build(&mut body);
    put_frame(out, kind, flags, 0, id, &body);
}

#[inline]
pub(super) fn reject_flags(header: Header, known: u8) -> Result<(), BodyError> {
    match header.flags & !known {
        0 => Ok(()),
        flags => Err(BodyError::UnknownFlags { flags }),
    }
}

pub(super) fn within<'a>(
    body: &'a [u8],
    limit: usize,
    field: &'static str,
) -> Result<&'a [u8], BodyError> {
    if body.len() > limit {
        let (value, limit) = (body.len() as u64, limit as u64);
        return Err(BodyError::OutOfRange { field, value, limit });
    }
    Ok(body)
}

pub(super) fn text(body: &[u8]) -> Result<&str, BodyError> {
    Reader::new(within(body, MAX_TEXT_LEN, "text")?).text(body.len(), "text")
}

/// Takes fields from the front of a body, in place.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

macro_rules! integers {
    ($($name:ident: $type:ty = $parser:ident;)*) => {
        $(
            #[inline]
            pub(super) fn $name(&mut self, field: &'static str) -> Result<$type, BodyError> {
                let parsed: nom::IResult<&[u8], $type, ()> = $parser.parse_complete(self.rest);
                let (rest, value) = parsed.map_err(|_| BodyError::Truncated { field })?;
                self.rest = rest;
                Ok(value)
            }
        )*
    };
}

impl<'a> Reader<'a> {
    #[inline]
    pub(super) fn new(body: &'a [u8]) -> Self {
        Reader { rest: body }
    }

    integers! {
        u8: u8 = le_u8;
        u16: u16 = le_u16;
        u32: u32 = le_u32;
        u64: u64 = le_u64;
        i64: i64 = le_i64;
    }

    #[inline]
    pub(super) fn bytes(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], BodyError> {
        let parsed: nom::IResult<&[u8], &[u8], ()> = take(len)(self.rest);
        let (rest, bytes) = parsed.map_err(|_| BodyError::Truncated { field })?;
        self.rest = rest;
        Ok(bytes)
    }

    pub(super) fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], BodyError> {
        let bytes = self.bytes(N, field)?;
        Ok(bytes.try_into().expect("`bytes` gave exactly N bytes"))
    }

    pub(super) fn text(&mut self, len: usize, field: &'static str) -> Result<&'a str, BodyError> {
        str::from_utf8(self.bytes(len, field)?).map_err(|_| BodyError::NotUtf8 { field })
    }

    /// The bytes that are not taken yet.
    pub(super) fn rest(self) -> &'a [u8] {
        self.rest
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Ends the body: trailing bytes are an error.
    #[inline]
    pub(super) fn finish(self) -> Result<(), BodyError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(BodyError::Trailing { bytes: self.rest.len() })
        }
    }

    /// Skips a list of extensions (`u16 tag · u16 length · bytes`) to the end of the body. Version
    /// 1 assigns none; those of a newer peer are skipped.
    pub(super) fn skip_extensions(mut self) -> Result<(), BodyError> {
        while !self.is_empty() {
            self.u16("extension tag")?;
            let len = self.u16("extension length")?;
            self.bytes(len.into(), "extension")?;
        }
        Ok(())
    }
}
