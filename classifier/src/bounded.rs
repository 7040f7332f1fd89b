//! Reading of files with a limit: a crafted file must not choose how much memory we allocate.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use crate::error::DataError;

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
