//! Reading and unpacking with a limit, so that no file, however crafted, decides how much memory we
//! take.

use std::io::{ErrorKind, Read};

use flate2::read::MultiGzDecoder;

use crate::error::DataError;

/// The first two bytes of a gzip file (RFC 1952, section 2.3.1).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Reads to the end, but no more than `limit` bytes. The buffer grows with what arrives.
pub fn read_at_most(
    source: impl Read,
    limit: u64,
    what: &'static str,
) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    source.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|error| {
        match error.kind() {
            ErrorKind::UnexpectedEof => DataError::Truncated {
                what,
                needed: bytes.len() as u64 + 1,
                have: bytes.len() as u64,
            },
            _ => DataError::malformed(what, error.to_string()),
        }
    })?;
    if bytes.len() as u64 > limit {
        return Err(DataError::OutOfRange { what, min: 0, max: limit, value: bytes.len() as u64 });
    }
    Ok(bytes)
}

/// Whether these bytes are gzip.
pub fn is_gzip(bytes: &[u8]) -> bool {
    bytes.starts_with(&GZIP_MAGIC)
}

/// Gunzips bytes that are gzip, up to `limit` unpacked bytes; hands back others unchanged.
pub fn unpack(bytes: Vec<u8>, limit: u64, what: &'static str) -> Result<Vec<u8>, DataError> {
    if is_gzip(&bytes) {
        read_at_most(MultiGzDecoder::new(bytes.as_slice()), limit, what)
    } else {
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn unpacks_gzip_and_leaves_the_rest_alone() {
        assert_eq!(unpack(gzip(b"hello"), 5, "test").unwrap(), b"hello");
        assert_eq!(unpack(b"hello".to_vec(), 5, "test").unwrap(), b"hello");
    }

    #[test]
    fn a_gzip_bomb_stops_at_the_limit() {
        let bomb = gzip(&vec![0; 10_000_000]);
        assert!(bomb.len() < 20_000);
        let error = unpack(bomb, 1000, "test file").unwrap_err().to_string();
        assert_eq!(error, "test file is 1001; the range is 0 to 1000");
    }

    #[test]
    fn a_cut_gzip_file_is_an_error() {
        let whole = gzip(&[7; 1000]);
        for len in 2..whole.len() {
            assert!(unpack(whole[..len].to_vec(), 2000, "test").is_err(), "{len} bytes");
        }
    }
}
