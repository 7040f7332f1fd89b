//! The protocol as a `tokio-util` codec, for programs that use [`tokio_util::codec::Framed`].
//!
//! The client and the server of this crate decode all frames of one read in place instead
//! ([`Frame::decode`]), without a buffer for each frame.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use tokio_util::codec::{Decoder, Encoder};

use super::header::{DEFAULT_MAX_BODY, FrameError, HEADER_LEN, Header};
use super::message::Message;
use super::{BodyError, Frame};

/// Cuts a byte stream into [`OwnedFrame`]s and encodes `(id, Message)` pairs.
#[derive(Clone, Debug)]
pub struct FrameCodec {
    max_body: u32,
}

impl FrameCodec {
    /// A codec that refuses bodies above `max_body` bytes.
    pub fn new(max_body: u32) -> Self {
        FrameCodec { max_body }
    }
}

impl Default for FrameCodec {
    /// With [`DEFAULT_MAX_BODY`], which fits every message of version 1.
    fn default() -> Self {
        FrameCodec::new(DEFAULT_MAX_BODY)
    }
}

/// A frame that owns its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedFrame {
    /// The header.
    pub header: Header,
    /// The body: `header.body_len` bytes.
    pub body: Bytes,
}

impl OwnedFrame {
    /// Decodes the message of the frame.
    ///
    /// # Errors
    /// [`BodyError`] if the body does not decode as a message of the header's kind.
    pub fn message(&self) -> Result<Message<'_>, BodyError> {
        Message::decode(Frame { header: self.header, body: &self.body })
    }
}

/// Why a stream of frames cannot continue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// A frame is too large, so that the next one cannot be found.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The transport failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Decoder for FrameCodec {
    type Item = OwnedFrame;
    type Error = CodecError;

    fn decode(&mut self, input: &mut BytesMut) -> Result<Option<OwnedFrame>, CodecError> {
        if Frame::decode(input, self.max_body)?.is_none() {
            if let Some(header) = Header::decode(input) {
                // At most as much again as has arrived: a header that announces a large body
                // allocates nothing by itself.
                let missing = header.frame_len() - input.len();
                input.reserve(missing.min(input.len()));
            }
            return Ok(None);
        }
        let header = Header::decode(input).expect("a whole frame begins with a header");
        input.advance(HEADER_LEN);
        let body = input.split_to(header.body_len as usize).freeze();
        Ok(Some(OwnedFrame { header, body }))
    }
}

impl Encoder<(u64, Message<'_>)> for FrameCodec {
    type Error = CodecError;

    fn encode(
        &mut self,
        (id, message): (u64, Message<'_>),
        out: &mut BytesMut,
    ) -> Result<(), CodecError> {
        message.encode(id, out);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream() -> Vec<u8> {
        let mut bytes = Vec::new();
        Message::Ping(b"one").encode(1, &mut bytes);
        Message::ClassifyReq { image: &[9; 784], budget_ms: 0 }.encode(2, &mut bytes);
        Message::CacheResp { value: Some(3) }.encode(u64::MAX, &mut bytes);
        Message::StatsReq.encode(0, &mut bytes);
        bytes
    }

    fn decode_all(codec: &mut FrameCodec, input: &mut BytesMut, out: &mut Vec<OwnedFrame>) {
        while let Some(frame) = codec.decode(input).unwrap() {
            out.push(frame);
        }
    }

    #[test]
    fn a_stream_split_at_every_byte_decodes_to_the_same_frames() {
        let bytes = stream();
        let mut whole = Vec::new();
        decode_all(&mut FrameCodec::default(), &mut BytesMut::from(&bytes[..]), &mut whole);
        assert_eq!(whole.len(), 4);
        for cut in 0..=bytes.len() {
            let (mut codec, mut input) = (FrameCodec::default(), BytesMut::new());
            let mut frames = Vec::new();
            for part in [&bytes[..cut], &bytes[cut..]] {
                input.extend_from_slice(part);
                decode_all(&mut codec, &mut input, &mut frames);
            }
            assert_eq!(frames, whole, "cut at {cut}");
            assert!(input.is_empty());
        }
    }

    proptest! {
        #[test]
        fn random_splits_decode_to_the_same_frames(mut cuts in prop::collection::vec(0usize..900, 0..40)) {
            let bytes = stream();
            let mut whole = Vec::new();
            decode_all(&mut FrameCodec::default(), &mut BytesMut::from(&bytes[..]), &mut whole);
            cuts.retain(|&cut| cut < bytes.len());
            cuts.sort_unstable();
            cuts.push(bytes.len());
            let (mut codec, mut input) = (FrameCodec::default(), BytesMut::new());
            let (mut frames, mut from) = (Vec::new(), 0);
            for cut in cuts {
                input.extend_from_slice(&bytes[from..cut]);
                decode_all(&mut codec, &mut input, &mut frames);
                from = cut;
            }
            prop_assert_eq!(frames, whole);
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let (mut codec, mut input) = (FrameCodec::default(), BytesMut::from(&bytes[..]));
            while let Ok(Some(frame)) = codec.decode(&mut input) {
                let _ = frame.message();
            }
        }
    }
}
