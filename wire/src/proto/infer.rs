//! Inference: rows of bytes for a named model, and its answers. Version 2 of the protocol.
//!
//! Rows and answers stay encoded: [`Rows`] and [`Answers`] are checked once and then iterated in
//! place. Byte tables in `PROTOCOL.md`, section "Messages of the classifier and the memo".

use std::num::NonZeroU16;
use std::time::Duration;

use afterimage_core::model::DIGEST_LEN;
use afterimage_core::{Answer, Origin, Response, RowAnswer};
use bytes::{BufMut, Bytes};

use super::BodyError;
use super::body::Reader;
use super::header::{Frame, HEADER_LEN, Header, Kind, flags};

/// Rows in the largest request. A larger batch is a mistake, or an attack.
pub const MAX_ROWS: u32 = 1 << 16;

/// Bytes in the longest name or version of a model: their length is one byte.
pub const MAX_NAME_LEN: usize = u8::MAX as usize;

/// Body of an `InferReq`: rows to answer with one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InferReq<'a> {
    /// The model's name; empty for the model of the Welcome. At most [`MAX_NAME_LEN`] bytes.
    pub model: &'a str,
    /// The model's version; empty for the present one. At most [`MAX_NAME_LEN`] bytes.
    pub version: &'a str,
    /// Compute the answers, also when the store has them.
    pub refresh: bool,
    /// Store nothing.
    pub no_store: bool,
    /// How long the answers are kept, in seconds; 0 for the server's choice.
    pub ttl_s: u32,
    /// The client's time budget in milliseconds, 0 for none.
    pub budget_ms: u32,
    /// The rows.
    pub rows: Rows<'a>,
}

impl<'a> InferReq<'a> {
    /// How long the client waits, if it is stated.
    pub fn budget(&self) -> Option<Duration> {
        (self.budget_ms != 0).then(|| Duration::from_millis(self.budget_ms.into()))
    }

    /// How long the answers are kept, if the client states it.
    pub fn ttl(&self) -> Option<Duration> {
        (self.ttl_s != 0).then(|| Duration::from_secs(self.ttl_s.into()))
    }

    pub(crate) fn flags(&self) -> u8 {
        let bit = |set, bit| if set { bit } else { 0 };
        bit(self.refresh, flags::REFRESH) | bit(self.no_store, flags::NO_STORE)
    }

    /// Bytes of the body.
    pub(crate) fn body_len(&self) -> usize {
        2 + name_len(self.model)
            + name_len(self.version)
            + 3 * size_of::<u32>()
            + self.rows.encoded.len()
    }

    /// Appends the body.
    pub(crate) fn encode(&self, out: &mut impl BufMut) {
        put_name(out, self.model);
        put_name(out, self.version);
        out.put_u32_le(self.ttl_s);
        out.put_u32_le(self.budget_ms);
        out.put_u32_le(self.rows.count);
        out.put_slice(self.rows.encoded);
    }

    /// Where the budget is in an encoded body.
    pub(crate) fn budget_at(&self) -> NonZeroU16 {
        let at = 2 + name_len(self.model) + name_len(self.version) + size_of::<u32>();
        u16::try_from(at).ok().and_then(NonZeroU16::new).expect("two names are below 64 KiB")
    }

    /// Decodes the body of an `InferReq`.
    ///
    /// # Errors
    /// [`BodyError`] if the body is malformed, or the header has unknown flags.
    pub fn decode(frame: Frame<'a>) -> Result<Self, BodyError> {
        let bits = frame.header.flags;
        let unknown = bits & !(flags::REFRESH | flags::NO_STORE);
        if unknown != 0 {
            return Err(BodyError::UnknownFlags { flags: unknown });
        }
        let mut reader = Reader::new(frame.body);
        let model = name(&mut reader, "model length", "model")?;
        let version = name(&mut reader, "version length", "version")?;
        let ttl_s = reader.u32("time to live")?;
        let budget_ms = reader.u32("budget")?;
        let count = reader.u32("number of rows")?;
        let rows = Rows::new(count, reader.rest())?;
        let (refresh, no_store) = (bits & flags::REFRESH != 0, bits & flags::NO_STORE != 0);
        Ok(InferReq { model, version, refresh, no_store, ttl_s, budget_ms, rows })
    }
}

/// Encoded rows, checked: each a `u32` length and as many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows<'a> {
    count: u32,
    encoded: &'a [u8],
}

impl<'a> Rows<'a> {
    /// Appends one encoded row to `out`.
    ///
    /// # Panics
    /// If the row has 4 GiB or more.
    pub fn put(out: &mut impl BufMut, row: &[u8]) {
        out.put_u32_le(u32::try_from(row.len()).expect("a row is shorter than 4 GiB"));
        out.put_slice(row);
    }

    /// Checks `count` encoded rows that fill `encoded`.
    ///
    /// # Errors
    /// [`BodyError`] if there are none, more than [`MAX_ROWS`], or not exactly `count`.
    pub fn new(count: u32, encoded: &'a [u8]) -> Result<Self, BodyError> {
        in_range(count, MAX_ROWS, "number of rows")?;
        let mut reader = Reader::new(encoded);
        for _ in 0..count {
            let len = reader.u32("row length")?;
            reader.bytes(len as usize, "row")?;
        }
        reader.finish()?;
        Ok(Rows { count, encoded })
    }

    /// The number of rows, at least 1.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// The rows in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a [u8]> + use<'a> {
        let mut reader = Reader::new(self.encoded);
        (0..self.count as usize).map(move |_| {
            let len = reader.u32("row length").expect("`new` has checked all rows");
            reader.bytes(len as usize, "row").expect("`new` has checked all rows")
        })
    }
}

/// Body of an `InferResp`: the answers of a request, in the order of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InferResp<'a> {
    /// The digest of the model that computed the answers.
    pub digest: [u8; DIGEST_LEN],
    /// One for each row.
    pub answers: Answers<'a>,
}

impl<'a> InferResp<'a> {
    pub(super) fn encode(&self, out: &mut impl BufMut) {
        out.put_slice(&self.digest);
        out.put_u32_le(self.answers.count);
        out.put_slice(self.answers.encoded);
    }

    pub(super) fn decode(body: &'a [u8]) -> Result<Self, BodyError> {
        let mut reader = Reader::new(body);
        let digest = reader.array("digest")?;
        let count = reader.u32("number of answers")?;
        Ok(InferResp { digest, answers: Answers::new(count, reader.rest())? })
    }
}

/// Encoded answers, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answers<'a> {
    count: u32,
    encoded: &'a [u8],
}

/// One answer, in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnswerRef<'a> {
    /// How it came about.
    pub origin: Origin,
    /// Seconds since the model computed it.
    pub age_s: u32,
    /// The answer itself.
    pub content: Content<'a>,
}

/// The content of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// A label.
    Label(u16),
    /// Bytes.
    Bytes(&'a [u8]),
}

/// The number of each kind of content on the wire.
const LABEL: u8 = 0;
const BYTES: u8 = 1;

/// The number of each origin on the wire.
const ORIGINS: [Origin; 3] = [Origin::Miss, Origin::Hit, Origin::Coalesced];

impl<'a> AnswerRef<'a> {
    /// Appends the encoded answer to `out`.
    ///
    /// # Panics
    /// If the answer has 4 GiB or more.
    pub fn put(&self, out: &mut impl BufMut) {
        out.put_u8(ORIGINS.iter().position(|origin| *origin == self.origin).unwrap_or(0) as u8);
        out.put_u32_le(self.age_s);
        match self.content {
            Content::Label(label) => {
                out.put_u8(LABEL);
                out.put_u16_le(label);
            }
            Content::Bytes(bytes) => {
                out.put_u8(BYTES);
                out.put_u32_le(u32::try_from(bytes.len()).expect("an answer is below 4 GiB"));
                out.put_slice(bytes);
            }
        }
    }

    fn read(reader: &mut Reader<'a>) -> Result<Self, BodyError> {
        let limited = |value: u8, limit: u8, field| match value <= limit {
            true => Ok(value),
            false => Err(BodyError::OutOfRange { field, value: value.into(), limit: limit.into() }),
        };
        let origin = limited(reader.u8("origin")?, ORIGINS.len() as u8 - 1, "origin")?;
        let age_s = reader.u32("age")?;
        let content = match limited(reader.u8("answer kind")?, BYTES, "answer kind")? {
            LABEL => Content::Label(reader.u16("label")?),
            _ => {
                let len = reader.u32("answer length")?;
                Content::Bytes(reader.bytes(len as usize, "answer")?)
            }
        };
        Ok(AnswerRef { origin: ORIGINS[usize::from(origin)], age_s, content })
    }
}

impl<'a> From<&'a RowAnswer> for AnswerRef<'a> {
    fn from(RowAnswer { answer, origin, age }: &'a RowAnswer) -> Self {
        let content = match answer {
            Answer::Label(label) => Content::Label(*label),
            Answer::Bytes(bytes) => Content::Bytes(bytes),
        };
        let age_s = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        AnswerRef { origin: *origin, age_s, content }
    }
}

impl<'a> Answers<'a> {
    /// Checks `count` encoded answers that fill `encoded`.
    ///
    /// # Errors
    /// [`BodyError`] if there are none, more than [`MAX_ROWS`], or not exactly `count`.
    pub fn new(count: u32, encoded: &'a [u8]) -> Result<Self, BodyError> {
        in_range(count, MAX_ROWS, "number of answers")?;
        let mut reader = Reader::new(encoded);
        for _ in 0..count {
            AnswerRef::read(&mut reader)?;
        }
        reader.finish()?;
        Ok(Answers { count, encoded })
    }

    /// The number of answers, at least 1.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// The answers in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = AnswerRef<'a>> + use<'a> {
        let mut reader = Reader::new(self.encoded);
        (0..self.count as usize)
            .map(move |_| AnswerRef::read(&mut reader).expect("`new` has checked all answers"))
    }

    /// The answers as values of their own. Answers of bytes share one copy of the reply.
    pub fn to_rows(&self) -> Vec<RowAnswer> {
        let copy = Bytes::copy_from_slice(self.encoded);
        Answers { count: self.count, encoded: &copy }.slices_of(&copy)
    }

    /// The answers as values that share `reply`, which has their bytes.
    ///
    /// # Panics
    /// If these answers were not decoded from `reply`.
    pub(crate) fn slices_of(&self, reply: &Bytes) -> Vec<RowAnswer> {
        let own = |answer: AnswerRef<'_>| {
            let content = match answer.content {
                Content::Label(label) => Answer::Label(label),
                Content::Bytes(bytes) => Answer::Bytes(reply.slice_ref(bytes)),
            };
            let age = Duration::from_secs(answer.age_s.into());
            RowAnswer { answer: content, origin: answer.origin, age }
        };
        self.iter().map(own).collect()
    }
}

/// Bytes in the body of an `InferResp` with these answers.
pub(crate) fn infer_resp_len(response: &Response) -> usize {
    let one = |row: &RowAnswer| match &row.answer {
        Answer::Label(_) => 8,
        Answer::Bytes(bytes) => 10 + bytes.len(),
    };
    DIGEST_LEN + size_of::<u32>() + response.rows.iter().map(one).sum::<usize>()
}

/// Appends an `InferResp`. The caller has checked the length of the body.
pub(crate) fn put_infer_resp(out: &mut Vec<u8>, id: u64, response: &Response) {
    let body_len = infer_resp_len(response);
    out.reserve(HEADER_LEN + body_len);
    let body_len = u32::try_from(body_len).expect("the caller has checked the length");
    let header = Header { body_len, kind: Kind::InferResp, flags: 0, status: 0, id };
    out.put_slice(&header.encode());
    out.put_slice(&response.model.digest);
    out.put_u32_le(response.rows.len() as u32);
    for row in &response.rows {
        AnswerRef::from(row).put(out);
    }
}

pub(super) fn name<'a>(
    reader: &mut Reader<'a>,
    length: &'static str,
    field: &'static str,
) -> Result<&'a str, BodyError> {
    let len = reader.u8(length)?;
    reader.text(len.into(), field)
}

/// Appends a name, cut at [`MAX_NAME_LEN`].
pub(crate) fn put_name(out: &mut impl BufMut, name: &str) {
    let name = super::body::truncate(name, MAX_NAME_LEN);
    out.put_u8(name.len() as u8);
    out.put_slice(name.as_bytes());
}

fn name_len(name: &str) -> usize {
    super::body::truncate(name, MAX_NAME_LEN).len()
}

/// Checks a number of rows or answers: at least 1, at most `limit`.
fn in_range(count: u32, limit: u32, field: &'static str) -> Result<(), BodyError> {
    match count {
        0 => Err(BodyError::Empty { field }),
        _ if count > limit => {
            Err(BodyError::OutOfRange { field, value: count.into(), limit: limit.into() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_encodes_to_the_announced_length() {
        let model = std::sync::Arc::new(afterimage_core::ModelId::bytes("m", [7; DIGEST_LEN]));
        let bytes = RowAnswer {
            answer: Answer::Bytes(Bytes::from_static(b"four")),
            origin: Origin::Hit,
            age: Duration::from_secs(u64::MAX),
        };
        let rows = [RowAnswer::label(3, Origin::Coalesced), bytes.clone()].into_iter().collect();
        let mut out = Vec::new();
        put_infer_resp(&mut out, 9, &Response { model, rows });
        let frame = Frame::decode(&out, u32::MAX).unwrap().unwrap();
        assert_eq!(frame.header.frame_len(), out.len());
        let resp = InferResp::decode(frame.body).unwrap();
        let aged = RowAnswer { age: Duration::from_secs(u32::MAX.into()), ..bytes };
        assert_eq!(resp.answers.to_rows(), [RowAnswer::label(3, Origin::Coalesced), aged]);
        assert_eq!((resp.digest, frame.header.id), ([7; DIGEST_LEN], 9));
    }
}
