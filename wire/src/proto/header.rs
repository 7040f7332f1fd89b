//! The 16-byte header before every body, and the frame that both form.
//!
//! | offset | size | field | meaning |
//! | --- | --- | --- | --- |
//! | 0 | 4 | body length | bytes after the header |
//! | 4 | 1 | kind | the message's [`Kind`] |
//! | 5 | 1 | flags | bits whose meaning depends on the kind |
//! | 6 | 2 | status | reply: [`Status`](super::Status); request: time budget in ms, or 0 |
//! | 8 | 8 | request id | chosen by the client and returned in the reply |
//!
//! All integers are little-endian.

use nom::Parser;
use nom::number::complete::{le_u8, le_u16, le_u32, le_u64};

const BODY_LEN_AT: usize = 0;
const KIND_AT: usize = BODY_LEN_AT + size_of::<u32>();
const FLAGS_AT: usize = KIND_AT + size_of::<u8>();
const STATUS_AT: usize = FLAGS_AT + size_of::<u8>();
const ID_AT: usize = STATUS_AT + size_of::<u16>();

/// Bytes in a header.
pub const HEADER_LEN: usize = ID_AT + size_of::<u64>();

const _: () = assert!(HEADER_LEN == 16, "PROTOCOL.md promises 16 bytes");

/// Bytes in the largest reply of version 1, and the default limit of a
/// [`FrameCodec`](super::codec::FrameCodec). A server's default is [`MAX_LARGE_BODY`].
pub const DEFAULT_MAX_BODY: u32 = 1 << 20;

/// Limit of a body before the handshake is complete. A `Hello` with the longest token and a few
/// extensions fits, and no other message is allowed that early.
pub const MAX_HANDSHAKE_BODY: u32 = 4096;

/// Bytes of the largest value of a key, and of the largest stored answer.
pub const MAX_VALUE: usize = 16 << 20;

/// Bytes in the largest body of the messages of version 2, requests and replies: a value of
/// [`MAX_VALUE`], and 1 MiB for everything around it, such as the lengths of 65,536 rows.
pub const MAX_LARGE_BODY: u32 = (MAX_VALUE + (1 << 20)) as u32;

/// Upper bound of every limit on bodies: header and body always fit a `u32`.
pub const MAX_MAX_BODY: u32 = 1 << 30;

const _: () = assert!(MAX_HANDSHAKE_BODY <= DEFAULT_MAX_BODY && DEFAULT_MAX_BODY <= MAX_MAX_BODY);

/// One table defines the number, the name and the sender of every kind.
macro_rules! kinds {
    ($($(#[$doc:meta])* $variant:ident = $code:literal;)*) => {
        /// The kind of a frame's message. Numbers are grouped by service, with space between them:
        /// `0x00` connection, `0x10` cache, `0x20` models, `0x30` stored answers, `0x40` streams,
        /// `0xF0` private experiments.
        ///
        /// An unknown kind survives decoding as [`Kind::Unknown`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Kind {
            $($(#[$doc])* $variant,)*
            /// A number that a newer peer knows and this version does not.
            Unknown(u8),
        }

        impl Kind {
            /// Every kind that this version knows.
            pub const ALL: &[Kind] = &[$(Kind::$variant,)*];

            /// The number on the wire.
            #[inline]
            pub const fn code(self) -> u8 {
                match self { $(Kind::$variant => $code,)* Kind::Unknown(code) => code }
            }

            /// The kind of a number on the wire.
            #[inline]
            pub const fn from_code(code: u8) -> Kind {
                // One load. The compiler makes a jump table of a match with so many arms.
                const KINDS: [Kind; 1 << u8::BITS] = {
                    let mut kinds = [Kind::Unknown(0); 1 << u8::BITS];
                    let mut code = 0;
                    while code < kinds.len() {
                        kinds[code] = match code as u8 {
                            $($code => Kind::$variant,)*
                            other => Kind::Unknown(other),
                        };
                        code += 1;
                    }
                    kinds
                };
                KINDS[code as usize]
            }

            /// The name that `PROTOCOL.md` uses.
            pub const fn name(self) -> &'static str {
                match self { $(Kind::$variant => stringify!($variant),)* Kind::Unknown(_) => "Unknown" }
            }
        }
    };
}

kinds! {
    /// Client: opens the connection.
    Hello = 0x01;
    /// Server: accepts it and describes the service.
    Welcome = 0x02;
    /// Client: asks for a [`Kind::Pong`].
    Ping = 0x03;
    /// Server: returns the bytes of the `Ping`.
    Pong = 0x04;
    /// Client: asks for statistics.
    StatsReq = 0x05;
    /// Server: counters, gauges, texts and histograms by name.
    StatsResp = 0x06;
    /// Server: a request, or the whole connection, has failed.
    Error = 0x07;
    /// Server: it closes after the requests in flight; send further ones on a new connection.
    GoAway = 0x08;
    /// Client: asks for a snapshot on the server's disk.
    SnapshotReq = 0x09;
    /// Server: the snapshot is written.
    SnapshotResp = 0x0A;
    /// Client: read or write one key.
    CacheReq = 0x10;
    /// Server: the value of a key, if it has one.
    CacheResp = 0x11;
    /// Client, version 2: read or write the bytes of one key.
    BytesReq = 0x12;
    /// Server, version 2: the bytes of a key, if it has some.
    BytesResp = 0x13;
    /// Client: asks for the label of an image.
    ClassifyReq = 0x20;
    /// Server: the label.
    ClassifyResp = 0x21;
    /// Client, version 2: asks for a model's answers to rows of bytes.
    InferReq = 0x22;
    /// Server, version 2: the answers.
    InferResp = 0x23;
    /// Client, version 2: deletes the stored answer of one row.
    ForgetReq = 0x30;
    /// Server, version 2: how many answers were stored.
    ForgetResp = 0x31;
    /// Client, version 2: deletes all stored answers of a model, or of all models.
    FlushReq = 0x32;
    /// Server, version 2: it is done.
    FlushResp = 0x33;
    /// Client, version 2: opens a stream.
    StreamOpen = 0x40;
    /// Both, version 2: bytes of a stream.
    StreamData = 0x41;
    /// Both, version 2: how many bytes the receiver may send.
    StreamCredit = 0x42;
    /// Both, version 2: the state of a stream's work.
    StreamProgress = 0x43;
    /// Both, version 2: ends a stream in both directions.
    StreamReset = 0x44;
}

impl Kind {
    /// The first version of the protocol that has this kind. On a connection of an older version
    /// it is an unknown kind.
    pub const fn since(self) -> u16 {
        match self {
            Kind::BytesReq
            | Kind::BytesResp
            | Kind::InferReq
            | Kind::InferResp
            | Kind::ForgetReq
            | Kind::ForgetResp
            | Kind::FlushReq
            | Kind::FlushResp => 2,
            kind if kind.is_stream() => 2,
            _ => 1,
        }
    }

    /// Whether frames of this kind belong to a stream. Client and server send them.
    #[inline]
    pub const fn is_stream(self) -> bool {
        use Kind::{StreamCredit, StreamData, StreamOpen, StreamProgress, StreamReset};
        matches!(self, StreamOpen | StreamData | StreamCredit | StreamProgress | StreamReset)
    }
}

/// The bits of a header's flags field.
pub mod flags {
    /// `CacheReq` and `BytesReq`: store the value. A `CacheReq` has no reply then.
    pub const WRITE: u8 = 0x01;
    /// `CacheResp` and `BytesResp`: the key is there and its value follows.
    pub const EXISTS: u8 = 0x01;
    /// `InferReq`: compute the answers, also when the store has them.
    pub const REFRESH: u8 = 0x01;
    /// `InferReq`: store nothing.
    pub const NO_STORE: u8 = 0x02;
    /// `ClassifyResp`: a hit; the answer was in the store.
    pub const HIT: u8 = 0x01;
    /// `ClassifyResp`: coalesced; an identical request in flight brought the answer.
    pub const COALESCED: u8 = 0x02;
    /// `Error`: it concerns the whole connection, which the sender closes.
    pub const CONNECTION: u8 = 0x01;
    /// `SnapshotResp`: the snapshot had begun before this request.
    pub const JOINED: u8 = 0x01;
    /// `StreamData`: the last bytes of this direction.
    pub const END: u8 = 0x01;
}

/// A decoded header. See the module's byte table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of body that follow.
    pub body_len: u32,
    /// The message's kind.
    pub kind: Kind,
    /// Bits whose meaning depends on the kind: [`flags`].
    pub flags: u8,
    /// In a reply a [`Status`](super::Status) code; in a request the time budget in milliseconds.
    pub status: u16,
    /// Chosen by the client; any value.
    pub id: u64,
}

impl Header {
    /// Decodes the first [`HEADER_LEN`] bytes of `input`; `None` when there are fewer.
    #[inline(always)]
    pub fn decode(input: &[u8]) -> Option<Header> {
        let parsed: nom::IResult<&[u8], _, ()> =
            (le_u32, le_u8, le_u8, le_u16, le_u64).parse_complete(input);
        let (_, (body_len, kind, flags, status, id)) = parsed.ok()?;
        Some(Header { body_len, kind: Kind::from_code(kind), flags, status, id })
    }

    /// The header's bytes.
    #[inline]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[BODY_LEN_AT..KIND_AT].copy_from_slice(&self.body_len.to_le_bytes());
        out[KIND_AT] = self.kind.code();
        out[FLAGS_AT] = self.flags;
        out[STATUS_AT..ID_AT].copy_from_slice(&self.status.to_le_bytes());
        out[ID_AT..].copy_from_slice(&self.id.to_le_bytes());
        out
    }

    /// Bytes of the whole frame, header and body.
    #[inline]
    pub fn frame_len(&self) -> usize {
        HEADER_LEN + self.body_len as usize
    }
}

/// A header and its body, in the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The header.
    pub header: Header,
    /// The body: `header.body_len` bytes.
    pub body: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Decodes the frame at the start of `input` in place. `Ok(None)` means that it is incomplete.
    /// Otherwise the frame ends [`Header::frame_len`] bytes into `input`.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] if the header announces more than `max_body` bytes. It is returned
    /// before the body arrives.
    // Always inlined, for the reason given at [`Message::decode`](super::Message::decode).
    #[inline(always)]
    pub fn decode(input: &'a [u8], max_body: u32) -> Result<Option<Frame<'a>>, FrameError> {
        let Some(header) = Header::decode(input) else {
            return Ok(None);
        };
        if header.body_len > max_body {
            return Err(FrameError::TooLarge { header, limit: max_body });
        }
        let body: nom::IResult<&[u8], &[u8], ()> =
            nom::bytes::complete::take(header.body_len)(&input[HEADER_LEN..]);
        Ok(body.ok().map(|(_, body)| Frame { header, body }))
    }
}

/// Why no frame can be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The header announces a body above the limit. Send less, or raise the limit on both ends.
    #[error("frame body is {} bytes; the limit is {limit}", header.body_len)]
    TooLarge {
        /// The header that announces it.
        header: Header,
        /// The largest body allowed here, in bytes.
        limit: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_kind_number_survives_the_way_there_and_back() {
        for code in 0..=u8::MAX {
            assert_eq!(Kind::from_code(code).code(), code);
        }
        for kind in Kind::ALL {
            assert!(!matches!(Kind::from_code(kind.code()), Kind::Unknown(_)));
        }
    }

    #[test]
    fn needs_more_bytes_for_every_truncated_frame() {
        let header = Header { body_len: 3, kind: Kind::Ping, flags: 0, status: 0, id: u64::MAX };
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(b"abc");
        for cut in 0..bytes.len() {
            assert_eq!(Frame::decode(&bytes[..cut], 3), Ok(None), "cut at {cut}");
        }
        assert_eq!(Frame::decode(&bytes, 3), Ok(Some(Frame { header, body: b"abc" })));
    }

    #[test]
    fn rejects_a_body_above_the_limit_before_it_arrives() {
        let header = Header { body_len: 9_000_000, kind: Kind::Ping, flags: 0, status: 0, id: 7 };
        let error = Frame::decode(&header.encode(), DEFAULT_MAX_BODY).unwrap_err();
        assert_eq!(error.to_string(), "frame body is 9000000 bytes; the limit is 1048576");
    }

    proptest! {
        #[test]
        fn a_header_survives_the_way_there_and_back(
            body_len: u32, kind: u8, flags: u8, status: u16, id: u64,
        ) {
            let header = Header { body_len, kind: Kind::from_code(kind), flags, status, id };
            prop_assert_eq!(Header::decode(&header.encode()), Some(header));
        }
    }
}
