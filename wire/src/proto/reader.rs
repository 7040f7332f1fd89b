//! The bounds-checked reader of all bodies: nom's number parsers, with errors that name the field.

use nom::Parser;
use nom::bytes::complete::take;
use nom::number::complete::{le_i64, le_u8, le_u16, le_u32, le_u64};

use super::BodyError;

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
