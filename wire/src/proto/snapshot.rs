//! The body of `SnapshotResp`: the size of a written snapshot.

use std::time::Duration;

use bytes::BufMut;

use super::BodyError;
use super::body::Reader;
use super::header::{Header, flags};

/// A snapshot that is safely on the server's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Entries in the file.
    pub entries: u64,
    /// Size of the file.
    pub bytes: u64,
    /// Time that it took, in whole microseconds; a `u64` of them on the wire.
    pub elapsed: Duration,
    /// The snapshot had begun before this request: it may lack newer entries.
    pub joined: bool,
}

impl Snapshot {
    pub(super) fn flags(&self) -> u8 {
        if self.joined { flags::JOINED } else { 0 }
    }

    pub(super) fn encode(&self, out: &mut impl BufMut) {
        out.put_u64_le(self.entries);
        out.put_u64_le(self.bytes);
        out.put_u64_le(u64::try_from(self.elapsed.as_micros()).unwrap_or(u64::MAX));
    }

    pub(super) fn decode(header: Header, body: &[u8]) -> Result<Self, BodyError> {
        let mut reader = Reader::new(body);
        let snapshot = Snapshot {
            entries: reader.u64("entries")?,
            bytes: reader.u64("bytes")?,
            elapsed: Duration::from_micros(reader.u64("elapsed")?),
            joined: header.flags & flags::JOINED != 0,
        };
        reader.finish()?;
        Ok(snapshot)
    }
}
