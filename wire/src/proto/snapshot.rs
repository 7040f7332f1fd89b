//! The body of `SnapshotResp`: what a snapshot came to.

use std::time::Duration;

use bytes::BufMut;

use super::BodyError;
use super::header::{Header, flags};
use super::reader::Reader;

/// A snapshot that is safe on the server's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Entries in it.
    pub entries: u64,
    /// The file's size.
    pub bytes: u64,
    /// How long it took, in whole microseconds; on the wire a `u64` of them.
    pub elapsed: Duration,
    /// It was being written already when it was asked for: what was stored since it began need not
    /// be in it.
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
