//! Streams: bytes of any length in both directions of one connection. Version 2 of the protocol.
//!
//! Byte tables in `PROTOCOL.md`, section "Streams".

use afterimage_core::Status;
use bytes::BufMut;

use super::body::{
    BodyError, MAX_TEXT_LEN, Reader, put_frame, reject_flags, text, truncate, within,
};
use super::header::{DEFAULT_MAX_BODY, Frame, Header, Kind, flags};
use super::infer::{MAX_NAME_LEN, name, put_name};

/// Bytes in the largest `StreamData`. A longer frame would delay the replies behind it; a shorter
/// one costs more system calls.
pub const MAX_STREAM_DATA: usize = 64 << 10;

/// Bytes in the longest header of a stream: parameters, not contents.
pub const MAX_STREAM_HEADER: usize = 64 << 10;

/// Bytes in the longest `StreamProgress`: a few counters and a partial result.
pub const MAX_STREAM_PROGRESS: usize = 1 << 10;

/// Bytes that a client may send on a new stream before the first `StreamCredit`. Each open stream
/// reserves memory for them at the server: ten thousand fit a server's default memory.
pub const INITIAL_STREAM_CREDIT: u64 = 4 << 10;

/// Bytes of the longest body of a `StreamOpen`.
pub(crate) const LONGEST_OPEN: usize = 8 + 1 + MAX_NAME_LEN + MAX_STREAM_HEADER;

/// Bytes of the body of a `StreamCredit`.
pub(crate) const CREDIT_LEN: usize = size_of::<u64>();

/// The longest text of a `StreamReset`.
pub(crate) const LONGEST_RESET: usize = MAX_TEXT_LEN;

/// Body of a `StreamOpen`: the service that the client wants, and its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOpen<'a> {
    /// Bytes that the server may send before it gets a `StreamCredit`.
    pub credit: u64,
    /// The name of the stream's service or method. At most [`MAX_NAME_LEN`] bytes.
    pub name: &'a str,
    /// The parameters, as the service defines them. At most [`MAX_STREAM_HEADER`] bytes.
    pub header: &'a [u8],
}

impl<'a> StreamOpen<'a> {
    /// Bytes of its body.
    pub(crate) fn body_len(&self) -> usize {
        8 + 1 + self.name.len() + self.header.len()
    }

    pub(super) fn encode(&self, out: &mut impl BufMut) {
        out.put_u64_le(self.credit);
        put_name(out, self.name);
        out.put_slice(self.header);
    }

    pub(crate) fn decode(frame: Frame<'a>) -> Result<Self, BodyError> {
        reject_flags(frame.header, 0)?;
        let mut reader = Reader::new(frame.body);
        let credit = reader.u64("credit")?;
        let name = name(&mut reader, "name length", "name")?;
        let header = within(reader.rest(), MAX_STREAM_HEADER, "header")?;
        Ok(StreamOpen { credit, name, header })
    }
}

/// A frame of an open stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamFrame<'a> {
    /// Bytes of the sender's direction.
    Data {
        /// At most [`MAX_STREAM_DATA`] bytes.
        bytes: &'a [u8],
        /// The sender's direction ends after these bytes.
        end: bool,
    },
    /// Permission to send.
    Credit {
        /// How many bytes the receiver may send in total, from the start of the stream.
        credit: u64,
    },
    /// The state of the work. A newer one replaces an older one that was not read.
    Progress(&'a [u8]),
    /// The stream has ended in both directions.
    Reset {
        /// The reason; [`Status::None`] if the sender no longer needs the stream.
        status: Status,
        /// The explanation for people. At most [`MAX_TEXT_LEN`] bytes.
        text: &'a str,
    },
}

impl<'a> StreamFrame<'a> {
    /// Decodes a frame whose kind is that of an open stream; `None` for every other kind.
    pub(crate) fn decode(frame: Frame<'a>) -> Result<Option<Self>, BodyError> {
        let Frame { header, body } = frame;
        Ok(Some(match header.kind {
            Kind::StreamData => {
                reject_flags(header, flags::END)?;
                let bytes = within(body, MAX_STREAM_DATA, "data")?;
                StreamFrame::Data { bytes, end: header.flags & flags::END != 0 }
            }
            Kind::StreamCredit => {
                reject_flags(header, 0)?;
                let mut reader = Reader::new(body);
                let credit = reader.u64("credit")?;
                reader.finish()?;
                StreamFrame::Credit { credit }
            }
            Kind::StreamProgress => {
                reject_flags(header, 0)?;
                StreamFrame::Progress(within(body, MAX_STREAM_PROGRESS, "progress")?)
            }
            Kind::StreamReset => {
                reject_flags(header, 0)?;
                StreamFrame::Reset { status: Status::from_code(header.status), text: text(body)? }
            }
            _ => return Ok(None),
        }))
    }

    pub(super) fn encode(&self, id: u64, out: &mut impl BufMut) {
        match self {
            StreamFrame::Data { bytes, end } => {
                put_frame(out, Kind::StreamData, end_flag(*end), 0, id, bytes);
            }
            StreamFrame::Credit { credit } => {
                put_frame(out, Kind::StreamCredit, 0, 0, id, &credit.to_le_bytes());
            }
            StreamFrame::Progress(bytes) => {
                let bytes = &bytes[..bytes.len().min(MAX_STREAM_PROGRESS)];
                put_frame(out, Kind::StreamProgress, 0, 0, id, bytes);
            }
            StreamFrame::Reset { status, text } => {
                let body = truncate(text, MAX_TEXT_LEN).as_bytes();
                put_frame(out, Kind::StreamReset, 0, status.code(), id, body);
            }
        }
    }
}

fn end_flag(end: bool) -> u8 {
    if end { flags::END } else { 0 }
}

/// Appends the header of a `StreamData` whose `len` bytes follow.
pub(crate) fn put_data_header(out: &mut impl BufMut, id: u64, len: usize, end: bool) {
    debug_assert!(len <= MAX_STREAM_DATA, "a frame of {len} bytes");
    let (kind, flags) = (Kind::StreamData, end_flag(end));
    let header = Header { body_len: len as u32, kind, flags, status: 0, id };
    out.put_slice(&header.encode());
}

const _: () = assert!(MAX_STREAM_DATA <= DEFAULT_MAX_BODY as usize);
const _: () = assert!(LONGEST_OPEN <= DEFAULT_MAX_BODY as usize);
