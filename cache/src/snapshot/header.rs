//! The header of a snapshot, as `cache/SNAPSHOT.md` describes it.
//!
//! ```text
//!  0  magic      8   89 "AFTIMG" 0A for labels, 89 "AFTBYT" 0A for bytes
//!  8  version    4   1
//! 12  zero       4
//! 16  id         8   different in every snapshot
//! 24  entries    8
//! 32  checksum   4   CRC-32 of bytes 0 to 31
//! ```
//!
//! All numbers are little-endian.

use super::Fault;

/// The only version so far.
pub(super) const VERSION: u32 = 1;

/// A byte above 127 and a line feed, as in PNG: a transfer in text mode damages them.
pub(crate) const LABELS: [u8; 8] = *b"\x89AFTIMG\n";

/// As [`LABELS`].
pub(crate) const BYTES: [u8; 8] = *b"\x89AFTBYT\n";

const VERSION_AT: usize = LABELS.len();
const ZERO_AT: usize = VERSION_AT + size_of::<u32>();
const ID_AT: usize = ZERO_AT + size_of::<u32>();
const ENTRIES_AT: usize = ID_AT + size_of::<u64>();
const HEADER_CHECKSUM_AT: usize = ENTRIES_AT + size_of::<u64>();
const HEADER_BYTES: usize = HEADER_CHECKSUM_AT + size_of::<u32>();
const _: () = assert!(HEADER_BYTES == 36);

/// The first bytes of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub id: u64,
    pub entries: u64,
}

impl Header {
    pub(super) const BYTES: usize = HEADER_BYTES;

    pub(super) fn encode(self, magic: [u8; 8]) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..VERSION_AT].copy_from_slice(&magic);
        bytes[VERSION_AT..ZERO_AT].copy_from_slice(&VERSION.to_le_bytes());
        bytes[ID_AT..ENTRIES_AT].copy_from_slice(&self.id.to_le_bytes());
        bytes[ENTRIES_AT..HEADER_CHECKSUM_AT].copy_from_slice(&self.entries.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..HEADER_CHECKSUM_AT]);
        bytes[HEADER_CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES], magic: [u8; 8]) -> Result<Self, Fault> {
        if !bytes.starts_with(&magic) {
            return Err(Fault::NotASnapshot);
        }
        let (checked, checksum) = bytes.split_at(HEADER_CHECKSUM_AT);
        if u32_at(checksum, 0) != crc32fast::hash(checked) {
            return Err(Fault::Damaged { offset: 0, what: "the header's checksum is wrong" });
        }
        // After the checksum, so that a damaged version is reported as damage. Every version has
        // this header.
        let version = u32_at(bytes, VERSION_AT);
        if version != VERSION {
            return Err(Fault::UnsupportedVersion(version));
        }
        if u32_at(bytes, ZERO_AT) != 0 {
            return Err(Fault::Damaged { offset: ZERO_AT as u64, what: "a field must be zero" });
        }
        Ok(Self { id: u64_at(bytes, ID_AT), entries: u64_at(bytes, ENTRIES_AT) })
    }
}

/// The number at `at`. The constants of the callers guarantee that the slice is long enough.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

/// As [`u32_at`].
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}
