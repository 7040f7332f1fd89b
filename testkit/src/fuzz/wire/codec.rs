//! The codec: frames, messages, and streams cut at any place.

use std::time::Duration;

use bytes::BytesMut;
use tokio_util::codec::Decoder;

use crate::fuzz::{Rng, Source};
use afterimage_core::Shape;
use afterimage_core::model::DIGEST_LEN;
use afterimage_core::model::MAX_DIMS;
use afterimage_wire::proto::codec::{CodecError, FrameCodec, OwnedFrame};
use afterimage_wire::proto::handshake::{Hello, MAX_TOKEN_LEN, Role, Welcome};
use afterimage_wire::proto::infer::{AnswerRef, Answers, Content, MAX_NAME_LEN, Rows};
use afterimage_wire::proto::message::{
    BytesWrite, Classification, Forget, MAX_PING_LEN, MAX_TEXT_LEN, Origin,
};
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::proto::{
    Frame, FrameError, HEADER_LEN, Header, InferReq, InferResp, Kind, Message, Snapshot, Status,
    StreamFrame, StreamOpen,
};

/// Longer than any frame of these tests.
const NO_LIMIT: u32 = u32::MAX;

/// Input: `u16` largest body, then the stream.
pub(super) fn decode_raw(data: &[u8]) {
    let mut source = Source::new(data);
    let max_body = u32::from(source.u16());
    let mut rest = source.rest();
    loop {
        let frame = match Frame::decode(rest, max_body) {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                let header = Header::decode(rest);
                assert_eq!(header.is_none(), rest.len() < HEADER_LEN, "a header is 16 bytes");
                assert!(header.is_none_or(|header| rest.len() < header.frame_len()));
                return;
            }
            Err(FrameError::TooLarge { header, limit }) => {
                assert_eq!(limit, max_body);
                assert!(header.body_len > max_body, "{} bytes are allowed", header.body_len);
                return;
            }
            Err(error) => panic!("an error that no test knows: {error}"),
        };
        let (head, behind) = rest.split_at(frame.header.frame_len());
        rest = behind;
        assert_eq!(frame.header.encode()[..], head[..HEADER_LEN], "no bit of a header is lost");
        assert_eq!(frame.body, &head[HEADER_LEN..]);
        match Message::decode(frame) {
            Ok(message) => decoded(frame, &message),
            // Every error has a text and a status.
            Err(error) => {
                assert!(!error.to_string().is_empty());
                assert!(matches!(error.status(), Status::BadArgument | Status::Unsupported));
            }
        }
    }
}

/// A decoded message can be encoded again, in no more bytes, with the same meaning.
fn decoded(frame: Frame<'_>, message: &Message<'_>) {
    let id = frame.header.id;
    let mut again = Vec::new();
    message.encode(id, &mut again);
    assert!(again.len() <= frame.header.frame_len(), "extensions and the unknown are left out");
    let second = whole(&again);
    assert_eq!((second.header.id, second.header.kind), (id, frame.header.kind));
    assert_eq!(Message::decode(second).as_ref(), Ok(message));
}

/// Input: a message's fields, as [`arbitrary_message`] reads them.
pub(super) fn round_trip(data: &[u8]) {
    let mut source = Source::new(data);
    let id = source.u64();
    let parts = Parts::new(&mut source);
    let message = arbitrary_message(&mut source, &parts);
    let mut bytes = vec![0xAA; 3];
    message.encode(id, &mut bytes);
    assert_eq!(bytes[..3], [0xAA; 3], "a frame is appended");
    let bytes = &bytes[3..];
    let frame = whole(bytes);
    assert_eq!(frame.header.id, id);
    assert_eq!(Message::decode(frame), Ok(cut_to_limits(message)));
    // Every prefix of a short frame, some of a long one.
    for len in (0..bytes.len()).step_by(1 + bytes.len() / 64) {
        assert_eq!(Frame::decode(&bytes[..len], NO_LIMIT), Ok(None), "{len} of {}", bytes.len());
    }
    if let Some(less) = frame.header.body_len.checked_sub(1) {
        let limit = less;
        let header = frame.header;
        assert_eq!(Frame::decode(bytes, limit), Err(FrameError::TooLarge { header, limit }));
        // A body without its last byte is another message or an error, and never a panic.
        let header = Header { body_len: less, ..header };
        let _ = Message::decode(Frame { header, body: &frame.body[..less as usize] });
    }
}

/// Input: `u16` largest body in KiB, `u16` seed of the cuts, then the stream.
pub(super) fn split_invariance(data: &[u8]) {
    let mut source = Source::new(data);
    // Up to 64 MiB, to check that an announced body allocates nothing.
    let max_body = u32::from(source.u16()) << 10;
    let mut rng = Rng(source.u16().into());
    let stream = source.rest();

    let (mut in_place, mut rest) = (Vec::new(), stream);
    let in_place_end = loop {
        match Frame::decode(rest, max_body) {
            Ok(Some(frame)) => {
                in_place.push((frame.header, frame.body));
                rest = &rest[frame.header.frame_len()..];
            }
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
    };
    let whole = decode_pieces(max_body, [stream].into_iter());
    assert_eq!(whole.error, in_place_end);
    assert_eq!(whole.left, rest.len());
    assert!(whole.frames.iter().map(|f| (f.header, &f.body[..])).eq(in_place));

    // Byte by byte, and in pieces of a random size.
    assert_eq!(decode_pieces(max_body, stream.chunks(1)), whole);
    let longest = 1 + rng.index(stream.len().max(1));
    let mut pieces = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at(rng.index(longest + 1).min(rest.len()));
        pieces.push(piece);
        rest = behind;
    }
    assert_eq!(decode_pieces(max_body, pieces.into_iter()), whole);
}

/// The result of decoding a stream.
#[derive(Debug, PartialEq)]
struct Decoded {
    frames: Vec<OwnedFrame>,
    error: Option<FrameError>,
    /// Bytes after the last whole frame.
    left: usize,
}

fn decode_pieces<'a>(max_body: u32, pieces: impl Iterator<Item = &'a [u8]>) -> Decoded {
    let (mut codec, mut input) = (FrameCodec::new(max_body), BytesMut::new());
    let (mut frames, mut error) = (Vec::new(), None);
    for piece in pieces {
        input.extend_from_slice(piece);
        // After an error the rest is only counted.
        while error.is_none() {
            match codec.decode(&mut input) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(CodecError::Frame(frame_error)) => error = Some(frame_error),
                Err(error) => panic!("there is no transport: {error}"),
            }
        }
    }
    Decoded { frames, error, left: input.len() }
}

/// The frame that `bytes` consist of.
fn whole(bytes: &[u8]) -> Frame<'_> {
    let frame = Frame::decode(bytes, NO_LIMIT).expect("there is no limit").expect("a whole frame");
    assert_eq!(frame.header.frame_len(), bytes.len(), "the frame is all there is");
    frame
}

/// Texts and bytes that messages borrow.
pub(super) struct Parts {
    text: String,
    bytes: Vec<u8>,
    /// The bytes cut into rows and into answers of an inference, encoded.
    rows: Vec<u8>,
    answers: Vec<u8>,
    count: u32,
}

impl Parts {
    pub(super) fn new(source: &mut Source<'_>) -> Self {
        let text = text(source, 3 * MAX_TEXT_LEN / 2);
        let len = source.below(2 * MAX_TOKEN_LEN);
        let bytes = source.bytes(len).to_vec();
        let (mut rows, mut answers, mut count) = (Vec::new(), Vec::new(), 0);
        // The last row is empty.
        for row in bytes.chunks(7).chain([&[][..]]) {
            Rows::put(&mut rows, row);
            let seed = row.first().copied().unwrap_or(0);
            let origin = [Origin::Miss, Origin::Hit, Origin::Coalesced][usize::from(seed % 3)];
            let content =
                if seed < 128 { Content::Bytes(row) } else { Content::Label(seed.into()) };
            AnswerRef { origin, age_s: seed.into(), content }.put(&mut answers);
            count += 1;
        }
        Parts { text, bytes, rows, answers, count }
    }
}

/// Any message that can be encoded, and some that are too long and must be cut.
pub(super) fn arbitrary_message<'a>(source: &mut Source<'_>, parts: &'a Parts) -> Message<'a> {
    let (text, bytes) = (parts.text.as_str(), parts.bytes.as_slice());
    match source.u8() % 31 {
        0 => Message::Hello(Hello {
            version_min: source.u16(),
            version_max: source.u16(),
            features: source.u32(),
            token: bytes,
        }),
        1 => Message::Welcome(welcome(source)),
        2 => Message::Ping(bytes),
        3 => Message::Pong(bytes),
        4 => Message::StatsReq,
        5 => Message::StatsResp(stats(source)),
        6 => {
            let status = Status::from_code(source.u16());
            Message::Error { status, text, connection: source.flag() }
        }
        7 => Message::GoAway { text },
        8 => Message::CacheRead { key: source.u64(), budget_ms: source.u16() },
        9 => Message::CacheWrite { key: source.u64(), value: source.u64().cast_signed() },
        10 => Message::CacheResp { value: None },
        11 => Message::CacheResp { value: Some(source.u64().cast_signed()) },
        12 => Message::ClassifyReq { image: bytes, budget_ms: source.u16() },
        13 => Message::ClassifyResp(label(source)),
        14 => Message::SnapshotReq,
        15 => Message::SnapshotResp(snapshot(source)),
        16 => Message::BytesRead { key: source.array(), budget_ms: source.u16() },
        17 => Message::BytesWrite(BytesWrite {
            key: source.array(),
            ttl_s: source.u32(),
            value: bytes,
        }),
        18 => Message::BytesResp { value: source.flag().then_some(bytes) },
        19 => Message::InferReq(InferReq {
            model: text,
            version: text,
            refresh: source.flag(),
            no_store: source.flag(),
            ttl_s: source.u32(),
            budget_ms: source.u32(),
            rows: Rows::new(parts.count, &parts.rows).expect("the rows are well-formed"),
        }),
        20 => Message::InferResp(InferResp {
            digest: source.array(),
            answers: Answers::new(parts.count, &parts.answers)
                .expect("the answers are well-formed"),
        }),
        21 => Message::ForgetReq(Forget { model: text, version: text, row: bytes }),
        22 => Message::ForgetResp { count: source.u64() },
        23 => Message::FlushReq { model: text },
        24 => Message::FlushResp,
        25 => Message::StreamOpen(StreamOpen { credit: source.u64(), name: text, header: bytes }),
        26 => Message::Stream(StreamFrame::Data { bytes, end: source.flag() }),
        27 => Message::Stream(StreamFrame::Credit { credit: source.u64() }),
        28 => Message::Stream(StreamFrame::Progress(bytes)),
        29 => {
            let status = Status::from_code(source.u16());
            Message::Stream(StreamFrame::Reset { status, text })
        }
        // An assigned number would be another message.
        _ => match source.u8() {
            kind if matches!(Kind::from_code(kind), Kind::Unknown(_)) => Message::Unknown { kind },
            _ => Message::Unknown { kind: 0xF0 },
        },
    }
}

pub(super) fn label(source: &mut Source<'_>) -> Classification {
    let class = source.u16();
    let origin = match source.u8() % 3 {
        0 => Origin::Miss,
        1 => Origin::Coalesced,
        _ => Origin::Hit,
    };
    Classification { label: class, origin }
}

fn welcome(source: &mut Source<'_>) -> Welcome {
    let dims: Vec<u32> = (0..source.below(MAX_DIMS + 1)).map(|_| source.u32()).collect();
    Welcome {
        version: source.u16(),
        service: Role::from_code(source.u8()),
        features: source.u32(),
        max_body: source.u32(),
        window: source.u32(),
        classes: source.u32(),
        digest: source.array::<DIGEST_LEN>(),
        shape: Shape::new(&dims).expect("no more dimensions than there may be"),
        name: text(source, 400),
    }
}

pub(super) fn snapshot(source: &mut Source<'_>) -> Snapshot {
    Snapshot {
        entries: source.u64(),
        bytes: source.u64(),
        elapsed: Duration::from_micros(source.u64()),
        joined: source.flag(),
    }
}

fn stats(source: &mut Source<'_>) -> Stats {
    let entries = (0..source.below(20))
        .map(|_| {
            let name = text(source, 400);
            let value = match source.u8() {
                1 => Value::Counter(source.u64()),
                2 => Value::Gauge(source.u64().cast_signed()),
                3 => Value::Text(text(source, 400)),
                4 => {
                    let buckets = source.below(20);
                    Value::Histogram((0..buckets).map(|_| (source.u64(), source.u64())).collect())
                }
                other => Value::Unknown(other),
            };
            (name, value)
        })
        .collect();
    Stats { entries }
}

/// A text of less than `limit` bytes, or a few more where invalid bytes were replaced.
fn text(source: &mut Source<'_>, limit: usize) -> String {
    let len = source.below(limit);
    String::from_utf8_lossy(source.bytes(len)).into_owned()
}

/// The message as it arrives: texts, tokens, pings and names have limits.
fn cut_to_limits(message: Message<'_>) -> Message<'_> {
    match message {
        Message::Hello(hello) => {
            let token = &hello.token[..hello.token.len().min(MAX_TOKEN_LEN)];
            Message::Hello(Hello { token, ..hello })
        }
        Message::Welcome(welcome) => {
            let name = cut(&welcome.name, u8::MAX.into()).to_owned();
            Message::Welcome(Welcome { name, ..welcome })
        }
        Message::Ping(bytes) => Message::Ping(&bytes[..bytes.len().min(MAX_PING_LEN)]),
        Message::Pong(bytes) => Message::Pong(&bytes[..bytes.len().min(MAX_PING_LEN)]),
        Message::Error { status, text, connection } => {
            Message::Error { status, text: cut(text, MAX_TEXT_LEN), connection }
        }
        Message::GoAway { text } => Message::GoAway { text: cut(text, MAX_TEXT_LEN) },
        Message::InferReq(request) => {
            let (model, version) = (name(request.model), name(request.version));
            Message::InferReq(InferReq { model, version, ..request })
        }
        Message::ForgetReq(Forget { model, version, row }) => {
            Message::ForgetReq(Forget { model: name(model), version: name(version), row })
        }
        Message::FlushReq { model } => Message::FlushReq { model: name(model) },
        Message::StreamOpen(open) => {
            Message::StreamOpen(StreamOpen { name: name(open.name), ..open })
        }
        Message::Stream(StreamFrame::Reset { status, text }) => {
            Message::Stream(StreamFrame::Reset { status, text: cut(text, MAX_TEXT_LEN) })
        }
        Message::StatsResp(mut stats) => {
            for (name, _) in &mut stats.entries {
                *name = cut(name, u8::MAX.into()).to_owned();
            }
            Message::StatsResp(stats)
        }
        other => other,
    }
}

/// The name of a model as it arrives.
fn name(text: &str) -> &str {
    cut(text, MAX_NAME_LEN)
}

/// The longest prefix of `text` with at most `limit` bytes that ends between two characters.
fn cut(text: &str, limit: usize) -> &str {
    let ends = text.char_indices().map(|(at, character)| at + character.len_utf8());
    &text[..ends.take_while(|&end| end <= limit).last().unwrap_or(0)]
}
