//! Messages: every kind of frame, decoded in place.
//!
//! The messages of the hot path have their own functions ([`put_cache_read`] and others), which
//! write a whole frame as one array. [`Message::encode`] uses them, too.

use std::time::Duration;

pub use afterimage_core::Origin;
use afterimage_core::{RowAnswer, Status};
use bytes::BufMut;

pub use super::body::MAX_TEXT_LEN;
use super::body::{BodyError, Reader, put_built, put_frame, reject_flags, text, truncate, within};
use super::handshake::{Hello, Welcome};
use super::header::{Frame, HEADER_LEN, Header, Kind, MAX_VALUE, flags};
use super::infer::{InferReq, InferResp, name, put_name};
use super::snapshot::Snapshot;
use super::stats::Stats;
use super::stream::{StreamFrame, StreamOpen};

/// Bytes in the largest `Ping`: enough for two clock readings.
pub const MAX_PING_LEN: usize = 64;

/// Bytes of the key of a value of bytes: a hash that has no collisions.
pub const BYTES_KEY_LEN: usize = 16;

/// The key of a value of bytes.
pub type BytesKey = [u8; BYTES_KEY_LEN];

/// A message with every field of its frame except the request id.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Message<'a> {
    /// Opens a connection.
    Hello(Hello<'a>),
    /// Accepts a connection.
    Welcome(Welcome),
    /// Asks for a [`Message::Pong`] with the same bytes, at most [`MAX_PING_LEN`].
    Ping(&'a [u8]),
    /// Answers a [`Message::Ping`].
    Pong(&'a [u8]),
    /// Asks for a [`Message::StatsResp`].
    StatsReq,
    /// The server's statistics.
    StatsResp(Stats),
    /// Asks for a snapshot of the stored answers, at the path that the server was started with.
    SnapshotReq,
    /// A snapshot is written.
    SnapshotResp(Snapshot),
    /// A request, or the whole connection, has failed.
    Error {
        /// What went wrong.
        status: Status,
        /// The explanation for people, with the thing, the limit and the value. At most
        /// [`MAX_TEXT_LEN`].
        text: &'a str,
        /// The error concerns the whole connection, which the sender closes.
        connection: bool,
    },
    /// Asks the client to reconnect. Requests in flight are still answered.
    GoAway {
        /// The reason, for people. At most [`MAX_TEXT_LEN`].
        text: &'a str,
    },
    /// Asks for the value of a key.
    CacheRead {
        /// The key; every value is a valid one.
        key: u64,
        /// The client's time budget in milliseconds, 0 for none.
        budget_ms: u16,
    },
    /// Stores a value. Has no reply.
    CacheWrite {
        /// The key; every value is a valid one.
        key: u64,
        /// The value; every value is a valid one.
        value: i64,
    },
    /// Answers a [`Message::CacheRead`].
    CacheResp {
        /// The key's value; `None` if the cache service has none.
        value: Option<i64>,
    },
    /// Asks for the label of an image.
    ClassifyReq {
        /// The image: as many bytes as the `Welcome`'s shape has.
        image: &'a [u8],
        /// The client's time budget in milliseconds, 0 for none.
        budget_ms: u16,
    },
    /// Answers a [`Message::ClassifyReq`].
    ClassifyResp(Classification),
    /// Asks for the bytes of a key. Version 2.
    BytesRead {
        /// The key; every value is a valid one.
        key: BytesKey,
        /// The client's time budget in milliseconds, 0 for none.
        budget_ms: u16,
    },
    /// Stores bytes under a key. Version 2.
    BytesWrite(BytesWrite<'a>),
    /// Answers a [`Message::BytesRead`] or a [`Message::BytesWrite`]. Version 2.
    BytesResp {
        /// The key's bytes; `None` if the cache service has none, and for a write.
        value: Option<&'a [u8]>,
    },
    /// Asks for a model's answers to rows of bytes. Version 2.
    InferReq(InferReq<'a>),
    /// Answers a [`Message::InferReq`]. Version 2.
    InferResp(InferResp<'a>),
    /// Deletes the stored answer of one row. Version 2.
    ForgetReq(Forget<'a>),
    /// Answers a [`Message::ForgetReq`]. Version 2.
    ForgetResp {
        /// How many stored answers were deleted, as far as the store knows.
        count: u64,
    },
    /// Deletes all stored answers of a model. Version 2.
    FlushReq {
        /// The model's name; empty for all models.
        model: &'a str,
    },
    /// Answers a [`Message::FlushReq`]. Version 2.
    FlushResp,
    /// Opens a stream. Version 2.
    StreamOpen(StreamOpen<'a>),
    /// A frame of an open stream. Version 2.
    Stream(StreamFrame<'a>),
    /// A kind of a newer version. Its length is known, so it can be skipped.
    Unknown {
        /// The number on the wire.
        kind: u8,
    },
}

/// A write of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BytesWrite<'a> {
    /// The key; every value is a valid one.
    pub key: BytesKey,
    /// How long the value is kept, in seconds; 0 for no limit.
    pub ttl_s: u32,
    /// The value, at most [`MAX_VALUE`] bytes.
    pub value: &'a [u8],
}

impl BytesWrite<'_> {
    /// How long the value is kept, if that is limited.
    pub fn ttl(&self) -> Option<Duration> {
        (self.ttl_s != 0).then(|| Duration::from_secs(self.ttl_s.into()))
    }
}

/// The row whose stored answer is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forget<'a> {
    /// The model's name; empty for the model of the Welcome.
    pub model: &'a str,
    /// The model's version; empty for the present one.
    pub version: &'a str,
    /// The row.
    pub row: &'a [u8],
}

/// The answer to a classification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Classification {
    /// The label, below the `Welcome`'s number of classes.
    pub label: u16,
    /// How the answer came about.
    pub origin: Origin,
}

impl From<Classification> for RowAnswer {
    fn from(Classification { label, origin }: Classification) -> Self {
        RowAnswer::label(label, origin)
    }
}

/// The flags of a `ClassifyResp` with this origin.
fn origin_flags(origin: Origin) -> u8 {
    match origin {
        Origin::Miss => 0,
        Origin::Coalesced => flags::COALESCED,
        Origin::Hit => flags::HIT,
    }
}

/// The origin that the flags state. If both are set, it is a hit.
fn origin_of(bits: u8) -> Origin {
    if bits & flags::HIT != 0 {
        Origin::Hit
    } else if bits & flags::COALESCED != 0 {
        Origin::Coalesced
    } else {
        Origin::Miss
    }
}

impl<'a> Message<'a> {
    /// Decodes the message of `frame`.
    ///
    /// # Errors
    /// [`BodyError`] if the body does not decode as a message of the header's kind.
    // Always inlined: a call that returns its result through memory took half the time of a small
    // frame.
    #[inline(always)]
    pub fn decode(frame: Frame<'a>) -> Result<Self, BodyError> {
        let Frame { header, body } = frame;
        match header.kind {
            Kind::CacheReq => decode_cache_req(frame),
            Kind::ClassifyReq => {
                reject_flags(header, 0)?;
                Ok(Message::ClassifyReq { image: body, budget_ms: header.status })
            }
            Kind::CacheResp => {
                let mut reader = Reader::new(body);
                let exists = header.flags & flags::EXISTS != 0;
                let value = if exists { Some(reader.i64("value")?) } else { None };
                reader.finish()?;
                Ok(Message::CacheResp { value })
            }
            Kind::ClassifyResp => {
                let mut reader = Reader::new(body);
                let class = reader.u16("label")?;
                reader.finish()?;
                let origin = origin_of(header.flags);
                Ok(Message::ClassifyResp(Classification { label: class, origin }))
            }
            _ => Self::decode_rare(frame),
        }
    }

    /// Decodes the rare kinds: once a connection or once a second, not once a request.
    #[cold]
    #[inline(never)]
    fn decode_rare(frame: Frame<'a>) -> Result<Self, BodyError> {
        let Frame { header, body } = frame;
        match header.kind {
            Kind::Hello => {
                reject_flags(header, 0)?;
                Hello::decode(body).map(Message::Hello)
            }
            Kind::Welcome => Welcome::decode(body).map(Message::Welcome),
            Kind::Ping => {
                reject_flags(header, 0)?;
                within(body, MAX_PING_LEN, "ping").map(Message::Ping)
            }
            Kind::Pong => within(body, MAX_PING_LEN, "pong").map(Message::Pong),
            Kind::StatsReq => {
                reject_flags(header, 0)?;
                Reader::new(body).finish()?;
                Ok(Message::StatsReq)
            }
            Kind::StatsResp => Stats::decode(body).map(Message::StatsResp),
            Kind::SnapshotReq => {
                reject_flags(header, 0)?;
                Reader::new(body).finish()?;
                Ok(Message::SnapshotReq)
            }
            Kind::SnapshotResp => Snapshot::decode(header, body).map(Message::SnapshotResp),
            Kind::Error => {
                let connection = header.flags & flags::CONNECTION != 0;
                let status = Status::from_code(header.status);
                Ok(Message::Error { status, text: text(body)?, connection })
            }
            Kind::GoAway => Ok(Message::GoAway { text: text(body)? }),
            Kind::BytesReq => decode_bytes_req(frame),
            Kind::BytesResp => {
                let exists = header.flags & flags::EXISTS != 0;
                if !exists {
                    Reader::new(body).finish()?;
                }
                let value = exists.then_some(body);
                Ok(Message::BytesResp { value })
            }
            Kind::InferReq => InferReq::decode(frame).map(Message::InferReq),
            Kind::InferResp => InferResp::decode(body).map(Message::InferResp),
            Kind::ForgetReq => {
                reject_flags(header, 0)?;
                let mut reader = Reader::new(body);
                let model = name(&mut reader, "model length", "model")?;
                let version = name(&mut reader, "version length", "version")?;
                Ok(Message::ForgetReq(Forget { model, version, row: reader.rest() }))
            }
            Kind::ForgetResp => {
                let mut reader = Reader::new(body);
                let count = reader.u64("count")?;
                reader.finish()?;
                Ok(Message::ForgetResp { count })
            }
            Kind::FlushReq => {
                reject_flags(header, 0)?;
                let mut reader = Reader::new(body);
                let model = name(&mut reader, "model length", "model")?;
                reader.finish()?;
                Ok(Message::FlushReq { model })
            }
            Kind::FlushResp => {
                Reader::new(body).finish()?;
                Ok(Message::FlushResp)
            }
            Kind::StreamOpen => StreamOpen::decode(frame).map(Message::StreamOpen),
            kind => Ok(match StreamFrame::decode(frame)? {
                Some(frame) => Message::Stream(frame),
                None => Message::Unknown { kind: kind.code() },
            }),
        }
    }

    /// Appends the whole frame to `out`. Texts, tokens and pings are cut at their limits.
    ///
    /// # Panics
    /// If the body has 4 GiB or more.
    pub fn encode(&self, id: u64, out: &mut impl BufMut) {
        match self {
            Message::CacheRead { key, budget_ms } => put_cache_read(out, id, *key, *budget_ms),
            Message::CacheWrite { key, value } => put_cache_write(out, id, *key, *value),
            Message::CacheResp { value } => put_cache_resp(out, id, *value),
            Message::ClassifyReq { image, budget_ms } => {
                put_classify_req(out, id, image, *budget_ms);
            }
            Message::ClassifyResp(label) => put_classify_resp(out, id, *label),
            Message::Error { status, text, connection } => {
                let bits = if *connection { flags::CONNECTION } else { 0 };
                let body = truncate(text, MAX_TEXT_LEN).as_bytes();
                put_frame(out, Kind::Error, bits, status.code(), id, body);
            }
            Message::GoAway { text } => {
                let (status, body) = (Status::ShuttingDown, truncate(text, MAX_TEXT_LEN));
                put_frame(out, Kind::GoAway, 0, status.code(), id, body.as_bytes());
            }
            Message::Hello(hello) => put_built(out, Kind::Hello, 0, id, |body| hello.encode(body)),
            Message::Welcome(welcome) => {
                put_built(out, Kind::Welcome, 0, id, |body| welcome.encode(body));
            }
            Message::Ping(bytes) => {
                put_frame(out, Kind::Ping, 0, 0, id, &bytes[..bytes.len().min(MAX_PING_LEN)]);
            }
            Message::Pong(bytes) => {
                put_frame(out, Kind::Pong, 0, 0, id, &bytes[..bytes.len().min(MAX_PING_LEN)]);
            }
            Message::StatsReq => put_frame(out, Kind::StatsReq, 0, 0, id, &[]),
            Message::StatsResp(stats) => {
                put_built(out, Kind::StatsResp, 0, id, |body| stats.encode(body));
            }
            Message::SnapshotReq => put_frame(out, Kind::SnapshotReq, 0, 0, id, &[]),
            Message::SnapshotResp(snapshot) => {
                let flags = snapshot.flags();
                put_built(out, Kind::SnapshotResp, flags, id, |body| snapshot.encode(body));
            }
            Message::BytesRead { key, budget_ms } => {
                put_frame(out, Kind::BytesReq, 0, *budget_ms, id, key);
            }
            Message::BytesWrite(BytesWrite { key, ttl_s, value }) => {
                put_built(out, Kind::BytesReq, flags::WRITE, id, |body| {
                    body.put_slice(key);
                    body.put_u32_le(*ttl_s);
                    body.put_slice(value);
                });
            }
            Message::BytesResp { value } => put_bytes_resp(out, id, *value),
            Message::InferReq(request) => {
                let flags = request.flags();
                put_built(out, Kind::InferReq, flags, id, |body| request.encode(body));
            }
            Message::InferResp(response) => {
                put_built(out, Kind::InferResp, 0, id, |body| response.encode(body));
            }
            Message::ForgetReq(Forget { model, version, row }) => {
                put_built(out, Kind::ForgetReq, 0, id, |body| {
                    put_name(body, model);
                    put_name(body, version);
                    body.put_slice(row);
                });
            }
            Message::ForgetResp { count } => {
                put_frame(out, Kind::ForgetResp, 0, 0, id, &count.to_le_bytes());
            }
            Message::FlushReq { model } => {
                put_built(out, Kind::FlushReq, 0, id, |body| put_name(body, model));
            }
            Message::FlushResp => put_frame(out, Kind::FlushResp, 0, 0, id, &[]),
            Message::StreamOpen(open) => {
                put_built(out, Kind::StreamOpen, 0, id, |body| open.encode(body));
            }
            Message::Stream(frame) => frame.encode(id, out),
            Message::Unknown { kind } => put_frame(out, Kind::from_code(*kind), 0, 0, id, &[]),
        }
    }
}

/// Decodes a `CacheReq`: a read or a write, by its flag.
#[inline(always)]
pub(crate) fn decode_cache_req<'a>(frame: Frame<'_>) -> Result<Message<'a>, BodyError> {
    let Frame { header, body } = frame;
    reject_flags(header, flags::WRITE)?;
    let mut reader = Reader::new(body);
    let key = reader.u64("key")?;
    if header.flags & flags::WRITE != 0 {
        let value = reader.i64("value")?;
        reader.finish()?;
        Ok(Message::CacheWrite { key, value })
    } else {
        reader.finish()?;
        Ok(Message::CacheRead { key, budget_ms: header.status })
    }
}

/// Decodes a `BytesReq`: a read or a write, by its flag.
fn decode_bytes_req<'a>(frame: Frame<'a>) -> Result<Message<'a>, BodyError> {
    let Frame { header, body } = frame;
    reject_flags(header, flags::WRITE)?;
    let mut reader = Reader::new(body);
    let key = reader.array("key")?;
    if header.flags & flags::WRITE == 0 {
        reader.finish()?;
        return Ok(Message::BytesRead { key, budget_ms: header.status });
    }
    let ttl_s = reader.u32("time to live")?;
    let value = within(reader.rest(), MAX_VALUE, "value")?;
    Ok(Message::BytesWrite(BytesWrite { key, ttl_s, value }))
}

/// Bytes of a `BytesReq` that writes, without the value: a key and a time to live.
pub(crate) const BYTES_WRITE_HEAD: usize = BYTES_KEY_LEN + size_of::<u32>();

/// Appends a `BytesResp`.
///
/// # Panics
/// If the value has 4 GiB or more.
pub fn put_bytes_resp(out: &mut impl BufMut, id: u64, value: Option<&[u8]>) {
    let bits = if value.is_some() { flags::EXISTS } else { 0 };
    put_frame(out, Kind::BytesResp, bits, 0, id, value.unwrap_or_default());
}

/// Bytes of the longest `CacheReq`: a key and a value.
pub(crate) const MAX_CACHE_REQ: usize = 16;

/// Appends a `CacheReq` that reads.
#[inline]
pub fn put_cache_read(out: &mut impl BufMut, id: u64, key: u64, budget_ms: u16) {
    let header =
        Header { body_len: 8, kind: Kind::CacheReq, flags: 0, status: budget_ms, id }.encode();
    let mut frame = [0; HEADER_LEN + 8];
    frame[..HEADER_LEN].copy_from_slice(&header);
    frame[HEADER_LEN..].copy_from_slice(&key.to_le_bytes());
    out.put_slice(&frame);
}

/// Appends a `CacheReq` that writes.
#[inline]
pub fn put_cache_write(out: &mut impl BufMut, id: u64, key: u64, value: i64) {
    let header =
        Header { body_len: 16, kind: Kind::CacheReq, flags: flags::WRITE, status: 0, id }.encode();
    let mut frame = [0; HEADER_LEN + 16];
    frame[..HEADER_LEN].copy_from_slice(&header);
    frame[HEADER_LEN..HEADER_LEN + 8].copy_from_slice(&key.to_le_bytes());
    frame[HEADER_LEN + 8..].copy_from_slice(&value.to_le_bytes());
    out.put_slice(&frame);
}

/// Appends a `CacheResp`.
#[inline]
pub fn put_cache_resp(out: &mut impl BufMut, id: u64, value: Option<i64>) {
    let header =
        |body_len, flags| Header { body_len, kind: Kind::CacheResp, flags, status: 0, id }.encode();
    // Each case writes a length that the compiler knows: a copy in registers, not a call.
    match value {
        Some(value) => {
            let mut frame = [0; HEADER_LEN + 8];
            frame[..HEADER_LEN].copy_from_slice(&header(8, flags::EXISTS));
            frame[HEADER_LEN..].copy_from_slice(&value.to_le_bytes());
            out.put_slice(&frame);
        }
        None => out.put_slice(&header(0, 0)),
    }
}

/// Appends a `ClassifyReq`.
///
/// # Panics
/// If the image has 4 GiB or more.
#[inline]
pub fn put_classify_req(out: &mut impl BufMut, id: u64, image: &[u8], budget_ms: u16) {
    put_frame(out, Kind::ClassifyReq, 0, budget_ms, id, image);
}

/// Appends a `ClassifyResp`.
#[inline]
pub fn put_classify_resp(out: &mut impl BufMut, id: u64, label: Classification) {
    let bits = origin_flags(label.origin);
    let header =
        Header { body_len: 2, kind: Kind::ClassifyResp, flags: bits, status: 0, id }.encode();
    let mut frame = [0; HEADER_LEN + 2];
    frame[..HEADER_LEN].copy_from_slice(&header);
    frame[HEADER_LEN..].copy_from_slice(&label.label.to_le_bytes());
    out.put_slice(&frame);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::infer::{Answers, Rows};
    use crate::proto::{Role, Shape};

    fn round_trip(message: &Message<'_>) {
        let mut bytes = Vec::new();
        message.encode(u64::MAX, &mut bytes);
        let frame = Frame::decode(&bytes, u32::MAX).unwrap().unwrap();
        assert_eq!(frame.header.frame_len(), bytes.len());
        assert_eq!(frame.header.id, u64::MAX);
        assert_eq!(&Message::decode(frame).unwrap(), message);
    }

    #[test]
    fn every_message_survives_the_way_there_and_back() {
        let welcome = Welcome {
            version: 2,
            service: Role::Memo,
            features: 0,
            max_body: 1 << 20,
            window: 4096,
            classes: 10,
            digest: [7; 32],
            shape: Shape::new(&[28, 28]).unwrap(),
            name: "afterimage".into(),
        };
        for message in [
            Message::Hello(Hello::new(b"secret")),
            Message::Welcome(welcome),
            Message::Ping(b"12345678"),
            Message::Pong(b""),
            Message::StatsReq,
            Message::SnapshotReq,
            Message::SnapshotResp(Snapshot {
                entries: u64::MAX,
                bytes: 36,
                elapsed: Duration::from_micros(1),
                joined: true,
            }),
            Message::Error { status: Status::Overloaded, text: "wait", connection: true },
            Message::GoAway { text: "restarting" },
            Message::CacheRead { key: 0, budget_ms: u16::MAX },
            Message::CacheWrite { key: u64::MAX, value: i64::MIN },
            Message::CacheResp { value: None },
            Message::CacheResp { value: Some(-1) },
            Message::ClassifyReq { image: &[0; 784], budget_ms: 3 },
            Message::ClassifyResp(Classification { label: 9, origin: Origin::Hit }),
            Message::ClassifyResp(Classification { label: u16::MAX, origin: Origin::Coalesced }),
            Message::BytesRead { key: [9; BYTES_KEY_LEN], budget_ms: 7 },
            Message::BytesWrite(BytesWrite { key: [0; BYTES_KEY_LEN], ttl_s: 1, value: b"v" }),
            Message::BytesResp { value: None },
            Message::BytesResp { value: Some(b"") },
            Message::InferReq(InferReq {
                model: "m",
                version: "",
                refresh: true,
                no_store: false,
                ttl_s: 3,
                budget_ms: u32::MAX,
                rows: Rows::new(2, b"\0\0\0\0\x02\0\0\0ab").unwrap(),
            }),
            Message::InferResp(InferResp {
                digest: [1; 32],
                answers: Answers::new(1, b"\x01\x05\0\0\0\0\x07\0").unwrap(),
            }),
            Message::ForgetReq(Forget { model: "m", version: "2", row: b"row" }),
            Message::ForgetResp { count: 1 },
            Message::FlushReq { model: "" },
            Message::FlushResp,
            Message::StreamOpen(StreamOpen { credit: u64::MAX, name: "fold", header: b"{}" }),
            Message::Stream(StreamFrame::Data { bytes: b"bytes", end: false }),
            Message::Stream(StreamFrame::Data { bytes: b"", end: true }),
            Message::Stream(StreamFrame::Credit { credit: 1 << 40 }),
            Message::Stream(StreamFrame::Progress(b"half")),
            Message::Stream(StreamFrame::Reset { status: Status::Internal, text: "bug" }),
            Message::Unknown { kind: 0xF0 },
        ] {
            round_trip(&message);
        }
    }

    #[test]
    fn cuts_a_text_that_is_too_long_between_two_characters() {
        let text = "é".repeat(MAX_TEXT_LEN);
        let mut bytes = Vec::new();
        Message::GoAway { text: &text }.encode(0, &mut bytes);
        let frame = Frame::decode(&bytes, u32::MAX).unwrap().unwrap();
        assert_eq!(frame.body.len(), MAX_TEXT_LEN);
        assert!(Message::decode(frame).is_ok());
    }

    #[test]
    fn debug_output_of_a_hello_leaves_the_token_out() {
        let text = format!("{:?}", Message::Hello(Hello::new(b"hunter2")));
        assert!(!text.contains("hunter2") && text.contains("token_len: 7"), "{text}");
    }
}
