//! Messages of gRPC: the prefix before each, and their compression. Public for tests.

use std::io::{Read as _, Write as _};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::Compression;
use flate2::read::{GzDecoder, ZlibDecoder};
use flate2::write::{GzEncoder, ZlibEncoder};
use hyper::HeaderMap;
use hyper::header::HeaderValue;

use crate::policy::Bypass;

/// Bytes before each message: whether it is compressed, and its length.
pub const PREFIX: usize = 5;

/// A message with its prefix, as it is on the wire.
pub fn framed(message: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(PREFIX + message.len());
    out.put_u8(0);
    // The length is the one number in network order.
    out.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    out.put_slice(message);
    out.freeze()
}

/// The only message of a body; `None` unless the body is exactly one message.
fn only(body: &Bytes) -> Option<(u8, Bytes)> {
    let mut prefix = body.get(..PREFIX)?;
    let (flag, len) = (prefix.get_u8(), prefix.get_u32() as usize);
    (body.len() - PREFIX == len).then(|| (flag, body.slice(PREFIX..)))
}

/// The message of a unary call, without its compression. `limit` is for the message after it.
///
/// # Errors
/// The reason to forward the call without the memo.
pub fn of_request(headers: &HeaderMap, body: &Bytes, limit: usize) -> Result<Bytes, Bypass> {
    let (flag, message) = only(body).ok_or(Bypass::NotUnderstood)?;
    match flag {
        0 => Ok(message),
        1 => inflate(encoding(headers)?, &message, limit),
        _ => Err(Bypass::NotUnderstood),
    }
}

/// The message of a reply; `None` unless there is exactly one, and it is not compressed.
pub fn of_reply(body: &Bytes) -> Option<Bytes> {
    only(body).and_then(|(flag, message)| (flag == 0).then_some(message))
}

/// A compression of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    Gzip,
    /// It is zlib, as in HTTP.
    Deflate,
}

impl Encoding {
    fn named(name: &[u8]) -> Option<Encoding> {
        match name {
            b"gzip" => Some(Encoding::Gzip),
            b"deflate" => Some(Encoding::Deflate),
            _ => None,
        }
    }
}

/// The encoding of compressed messages.
fn encoding(headers: &HeaderMap) -> Result<Encoding, Bypass> {
    let mut values = headers.get_all("grpc-encoding").iter();
    match (values.next(), values.next()) {
        (Some(value), None) => Encoding::named(value.as_bytes()).ok_or(Bypass::Encoding),
        _ => Err(Bypass::NotUnderstood),
    }
}

fn inflate(encoding: Encoding, message: &[u8], limit: usize) -> Result<Bytes, Bypass> {
    let mut plain = Vec::new();
    let most = limit as u64 + 1;
    let read = match encoding {
        Encoding::Gzip => GzDecoder::new(message).take(most).read_to_end(&mut plain),
        Encoding::Deflate => ZlibDecoder::new(message).take(most).read_to_end(&mut plain),
    };
    match read {
        Ok(len) if len <= limit => Ok(plain.into()),
        Ok(_) => Err(Bypass::TooLarge),
        Err(_) => Err(Bypass::NotUnderstood),
    }
}

/// A message with its prefix, compressed. `None` for another encoding than gzip and deflate.
pub fn deflated(name: &str, message: &[u8]) -> Option<Bytes> {
    let packed = match Encoding::named(name.as_bytes())? {
        Encoding::Gzip => {
            let mut out = GzEncoder::new(Vec::new(), Compression::fast());
            out.write_all(message).ok()?;
            out.finish().ok()?
        }
        Encoding::Deflate => {
            let mut out = ZlibEncoder::new(Vec::new(), Compression::fast());
            out.write_all(message).ok()?;
            out.finish().ok()?
        }
    };
    let framed = framed(&packed);
    let mut framed = BytesMut::from(framed);
    framed[0] = 1;
    Some(framed.freeze())
}

/// `grpc-encoding` of messages without compression.
pub(crate) const IDENTITY: HeaderValue = HeaderValue::from_static("identity");

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(encoding: Option<&'static str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if let Some(encoding) = encoding {
            headers.insert("grpc-encoding", HeaderValue::from_static(encoding));
        }
        headers
    }

    #[test]
    fn a_body_is_exactly_one_message() {
        let body = framed(b"abc");
        assert_eq!(&body[..], b"\0\0\0\0\x03abc");
        assert_eq!(of_request(&headers(None), &body, 9).unwrap(), "abc");
        assert_eq!(of_reply(&body).unwrap(), "abc");
        assert_eq!(of_reply(&framed(b"")).unwrap(), "");
        for len in 0..body.len() {
            assert_eq!(of_reply(&body.slice(..len)), None, "{len} bytes");
        }
        let two = Bytes::from([&body[..], &body[..]].concat());
        assert_eq!(of_request(&headers(None), &two, 9), Err(Bypass::NotUnderstood));
        assert_eq!(of_reply(&Bytes::from_static(b"\x02\0\0\0\0")), None);
    }

    #[test]
    fn compressed_messages_are_read_within_the_limit() {
        let message = vec![7; 10_000];
        for name in ["gzip", "deflate"] {
            let body = deflated(name, &message).unwrap();
            assert!(body.len() < 200);
            assert_eq!(of_request(&headers(Some(name)), &body, 10_000).unwrap(), message);
            assert_eq!(of_request(&headers(Some(name)), &body, 9_999), Err(Bypass::TooLarge));
            assert_eq!(of_request(&headers(None), &body, 9), Err(Bypass::NotUnderstood));
            assert_eq!(of_request(&headers(Some("snappy")), &body, 9), Err(Bypass::Encoding));
            assert_eq!(of_reply(&body), None);
            let plain = framed(&message);
            assert_eq!(of_request(&headers(Some(name)), &plain, 10_000).unwrap(), message);
        }
    }
}
