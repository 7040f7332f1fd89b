//! Decompression of gzip, up to a limit.

use afterimage_classifier::DataError;
use afterimage_classifier::bounded::read_at_most;
use flate2::bufread::GzDecoder;

/// The first two bytes of a gzip file (RFC 1952, section 2.3.1).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Whether these bytes are gzipped.
fn is_gzip(bytes: &[u8]) -> bool {
    bytes.starts_with(&GZIP_MAGIC)
}

/// Decompresses gzip, up to `limit` decompressed bytes. Returns other bytes unchanged.
///
/// As with `gunzip`, a file may have several members, and zero bytes may follow the last one (tapes
/// and block devices pad with them). Other bytes after the last member are an error.
pub fn unpack(bytes: Vec<u8>, limit: u64, what: &'static str) -> Result<Vec<u8>, DataError> {
    if !is_gzip(&bytes) {
        return Ok(bytes);
    }
    let mut rest = bytes.as_slice();
    let mut unpacked = Vec::new();
    while is_gzip(rest) {
        let mut decoder = GzDecoder::new(rest);
        let left = limit - unpacked.len() as u64;
        let member = read_at_most(&mut decoder, left, what).map_err(|error| match error {
            // The limit applies to all members together.
            DataError::TooLarge { .. } => DataError::TooLarge { what, limit },
            error => error,
        })?;
        unpacked.extend(member);
        rest = decoder.into_inner();
    }
    match rest.iter().position(|&byte| byte != 0) {
        None => Ok(unpacked),
        Some(padding) => Err(DataError::Trailing { what, extra: (rest.len() - padding) as u64 }),
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
    fn unpacks_gzip_and_returns_other_bytes_unchanged() {
        assert_eq!(unpack(gzip(b"hello"), 5, "test").unwrap(), b"hello");
        assert_eq!(unpack(b"hello".to_vec(), 5, "test").unwrap(), b"hello");
    }

    #[test]
    fn several_members_and_zero_padding_are_accepted() {
        let two = [gzip(b"hel"), gzip(b"lo")].concat();
        assert_eq!(unpack(two.clone(), 5, "test").unwrap(), b"hello");
        assert!(unpack(two.clone(), 4, "test").is_err());
        let padded = [&two[..], &[0; 512]].concat();
        assert_eq!(unpack(padded.clone(), 5, "test").unwrap(), b"hello");
        for garbage in [&b"x"[..], b"\0\0x", &gzip(b"x")[..3]] {
            let file = [&padded[..], garbage].concat();
            let error = unpack(file, 100, "test").unwrap_err();
            assert!(matches!(error, DataError::Trailing { .. }), "{error}");
        }
    }

    #[test]
    fn a_gzip_bomb_stops_at_the_limit() {
        let bomb = gzip(&vec![0; 10_000_000]);
        assert!(bomb.len() < 20_000);
        let error = unpack(bomb, 1000, "test file").unwrap_err().to_string();
        assert_eq!(error, "test file has more than 1000 bytes, the limit");
    }

    #[test]
    fn a_cut_gzip_file_is_an_error() {
        let whole = gzip(&[7; 1000]);
        for len in 2..whole.len() {
            assert!(unpack(whole[..len].to_vec(), 2000, "test").is_err(), "{len} bytes");
        }
    }
}
