//! Reading and unpacking of files with a limit: a crafted file must not choose how much memory we
//! allocate.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use flate2::bufread::GzDecoder;

use crate::error::DataError;

/// The first two bytes of a gzip file (RFC 1952, section 2.3.1).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Opens a file for reading. A folder is an error here: on some systems only reading it fails, with
/// a message that does not help.
pub fn open(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(io::Error::new(ErrorKind::IsADirectory, "it is a folder; give a file"));
    }
    Ok(file)
}

/// Reads to the end, but at most `limit` bytes. The buffer grows with the bytes that arrive.
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

/// Unpacks gzip, up to `limit` unpacked bytes; returns other bytes unchanged.
///
/// As `gunzip` does: a file may have several members, and zero bytes may follow the last one (tapes
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
            // The limit is for the members together.
            DataError::OutOfRange { .. } => {
                DataError::OutOfRange { what, min: 0, max: limit, value: limit + 1 }
            }
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
