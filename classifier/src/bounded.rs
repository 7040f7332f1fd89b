//! Reading of files with a limit: a crafted file must not choose how much memory we allocate.

use std::io::{self, ErrorKind, Read};
use std::path::Path;

use afterimage_core::file::Source;

use crate::error::DataError;

/// Opens a file for reading. A folder is an error, and a pipe that stays silent is one, too.
pub fn open(path: &Path) -> io::Result<Source> {
    Source::open(path)
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
            ErrorKind::InvalidData | ErrorKind::InvalidInput => {
                DataError::malformed(what, error.to_string())
            }
            _ => DataError::Read { what, source: error },
        }
    })?;
    if bytes.len() as u64 > limit {
        return Err(DataError::TooLarge { what, limit });
    }
    Ok(bytes)
}
