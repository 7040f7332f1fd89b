//! The entries of a byte store in a snapshot, as `cache/SNAPSHOT.md` describes them.
//!
//! ```text
//!  0  key       16
//! 16  inserted   8   seconds since 1970
//! 24  expires    8   seconds since 1970; 2^64 - 1 for never
//! 32  length     4   n
//! 36  checksum   4   CRC-32 of the id, the record's number from 0 (8 bytes), and the above
//! 40  value      n
//! 40 + n         4   CRC-32 of all of these
//! ```
//!
//! All numbers are little-endian. The times are of the wall clock, so that they hold in another
//! process.

use std::io::{self, BufWriter, Read, Write};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use crc32fast::Hasher;

use super::header::{self, Header, u32_at, u64_at};
use super::sealed::{Content, Restored, Size};
use super::{Fault, read_exact};
use crate::byte_store::{ByteStore, Timed};

const INSERTED_AT: usize = size_of::<u128>();
const EXPIRES_AT: usize = INSERTED_AT + size_of::<u64>();
const LEN_AT: usize = EXPIRES_AT + size_of::<u64>();
const CHECKSUM_AT: usize = LEN_AT + size_of::<u32>();
const CHECKSUM_BYTES: usize = size_of::<u32>();
/// Bytes in front of a value.
const FIXED_BYTES: usize = CHECKSUM_AT + CHECKSUM_BYTES;
const _: () = assert!(FIXED_BYTES == 40);

/// The time at which a value without a time to live expires.
const NEVER: u64 = u64::MAX;

/// The buffer between records and file, so that small values do not cost a system call each.
const BUFFER_BYTES: usize = 1 << 18;

/// A value is read in pieces of this size where only its checksum counts. So a check takes this
/// much memory, independent of the sizes in a file.
const PIECE_BYTES: usize = 1 << 16;

impl Content for ByteStore {
    const MAGIC: [u8; 8] = header::BYTES;
    const NAME: &'static str = "a byte store";

    fn write_entries(&self, id: u64, file: &mut impl Write) -> io::Result<Size> {
        write_entries(self, Clock::now(), id, file)
    }

    fn check_entries(header: Header, file: &mut impl Read) -> Result<u64, Fault> {
        let mut records = Records::new(header);
        while let Some(record) = records.next(file)? {
            records.skip_value(record, file)?;
        }
        Ok(records.offset)
    }

    fn restore_entries(&self, header: Header, file: &mut impl Read) -> Result<Restored, Fault> {
        restore_entries(self, Clock::now(), header, file)
    }
}

/// The same moment on the two clocks: that of the file and that of the store.
#[derive(Clone, Copy)]
struct Clock {
    unix_s: u64,
    instant: Instant,
}

impl Clock {
    fn now() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Clock { unix_s: unix.as_secs(), instant: Instant::now() }
    }
}

fn write_entries(
    store: &ByteStore,
    now: Clock,
    id: u64,
    file: &mut impl Write,
) -> io::Result<Size> {
    let mut file = BufWriter::with_capacity(BUFFER_BYTES, file);
    let mut size = Size::default();
    for (key, value, Timed { age_s, left_s }) in store.entries(now.instant) {
        let record = Record {
            key,
            inserted: now.unix_s.saturating_sub(age_s),
            expires: left_s.map_or(NEVER, |left| now.unix_s.saturating_add(left)),
            len: value.len() as u32,
        };
        let (fixed, mut hasher) = record.encode(id, size.entries);
        hasher.update(&value);
        file.write_all(&fixed)?;
        file.write_all(&value)?;
        file.write_all(&hasher.finalize().to_le_bytes())?;
        size.entries += 1;
        size.bytes += (FIXED_BYTES + value.len() + CHECKSUM_BYTES) as u64;
    }
    file.flush()?;
    Ok(size)
}

fn restore_entries(
    store: &ByteStore,
    now: Clock,
    header: Header,
    file: &mut impl Read,
) -> Result<Restored, Fault> {
    let evicted_before = store.stats().evicted;
    let mut counts = Restored::default();
    let mut records = Records::new(header);
    while let Some(record) = records.next(file)? {
        let Some(times) = record.times(now.unix_s) else {
            counts.expired += 1;
            records.skip_value(record, file)?;
            continue;
        };
        if record.len as usize > store.max_value_bytes() {
            records.skip_value(record, file)?;
            continue;
        }
        let value = records.value(record, file)?;
        counts.restored += u64::from(store.restore(record.key, value, times, now.instant));
    }
    counts.evicted = store.stats().evicted - evicted_before;
    Ok(counts)
}

/// The fixed part of a record.
#[derive(Clone, Copy)]
struct Record {
    key: u128,
    inserted: u64,
    expires: u64,
    len: u32,
}

impl Record {
    /// The bytes in front of the value, and the checksum so far.
    fn encode(self, id: u64, number: u64) -> ([u8; FIXED_BYTES], Hasher) {
        let mut bytes = [0; FIXED_BYTES];
        bytes[..INSERTED_AT].copy_from_slice(&self.key.to_le_bytes());
        bytes[INSERTED_AT..EXPIRES_AT].copy_from_slice(&self.inserted.to_le_bytes());
        bytes[EXPIRES_AT..LEN_AT].copy_from_slice(&self.expires.to_le_bytes());
        bytes[LEN_AT..CHECKSUM_AT].copy_from_slice(&self.len.to_le_bytes());
        let mut hasher = hasher(id, number);
        hasher.update(&bytes[..CHECKSUM_AT]);
        let checksum = hasher.clone().finalize();
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        hasher.update(&bytes[CHECKSUM_AT..]);
        (bytes, hasher)
    }

    /// Age and remaining time to live; `None` if the value is expired.
    fn times(self, now: u64) -> Option<Timed> {
        let age_s = now.saturating_sub(self.inserted);
        if self.expires == NEVER {
            return Some(Timed { age_s, left_s: None });
        }
        // If the wall clock was set back, a value does not live longer than it was to at first.
        let left = self.expires.saturating_sub(now.max(self.inserted));
        (left > 0).then_some(Timed { age_s, left_s: Some(left) })
    }
}

/// A checksum that a record of another snapshot, or at another position, does not match.
fn hasher(id: u64, number: u64) -> Hasher {
    let mut hasher = Hasher::new();
    hasher.update(&id.to_le_bytes());
    hasher.update(&number.to_le_bytes());
    hasher
}

/// Reads and checks consecutive records.
struct Records {
    header: Header,
    number: u64,
    offset: u64,
    hasher: Hasher,
    piece: Vec<u8>,
}

impl Records {
    fn new(header: Header) -> Self {
        let offset = Header::BYTES as u64;
        Records { header, number: 0, offset, hasher: Hasher::new(), piece: Vec::new() }
    }

    /// The next record. Its value must be read or skipped before the next one.
    fn next(&mut self, file: &mut impl Read) -> Result<Option<Record>, Fault> {
        if self.number == self.header.entries {
            return Ok(None);
        }
        let mut bytes = [0; FIXED_BYTES];
        read_exact(file, &mut bytes, self.offset)?;
        let mut key = [0; INSERTED_AT];
        key.copy_from_slice(&bytes[..INSERTED_AT]);
        let record = Record {
            key: u128::from_le_bytes(key),
            inserted: u64_at(&bytes, INSERTED_AT),
            expires: u64_at(&bytes, EXPIRES_AT),
            len: u32_at(&bytes, LEN_AT),
        };
        let (expected, hasher) = record.encode(self.header.id, self.number);
        if bytes != expected {
            return Err(self.damaged("the checksum in front of a value is wrong"));
        }
        self.hasher = hasher;
        Ok(Some(record))
    }

    /// Reads a value. Takes memory for its length.
    fn value(&mut self, record: Record, file: &mut impl Read) -> Result<Bytes, Fault> {
        let mut value = vec![0; record.len as usize];
        read_exact(file, &mut value, self.offset)?;
        self.hasher.update(&value);
        self.end(record, file)?;
        Ok(value.into())
    }

    /// Checks a value without keeping it.
    fn skip_value(&mut self, record: Record, file: &mut impl Read) -> Result<(), Fault> {
        self.piece.resize(PIECE_BYTES, 0);
        let mut left = record.len as usize;
        while left > 0 {
            let piece = &mut self.piece[..left.min(PIECE_BYTES)];
            read_exact(file, piece, self.offset)?;
            self.hasher.update(piece);
            left -= piece.len();
        }
        self.end(record, file)
    }

    fn end(&mut self, record: Record, file: &mut impl Read) -> Result<(), Fault> {
        let mut checksum = [0; CHECKSUM_BYTES];
        read_exact(file, &mut checksum, self.offset)?;
        if u32::from_le_bytes(checksum) != self.hasher.clone().finalize() {
            return Err(self.damaged("a value's checksum is wrong"));
        }
        self.number += 1;
        self.offset += (FIXED_BYTES + CHECKSUM_BYTES) as u64 + u64::from(record.len);
        Ok(())
    }

    /// The record at this offset breaks a rule.
    fn damaged(&self, what: &'static str) -> Fault {
        Fault::Damaged { offset: self.offset, what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn store() -> ByteStore {
        ByteStore::new(1 << 20, 1 << 16)
    }

    fn written(store: &ByteStore, now: Clock) -> (Header, Vec<u8>) {
        let mut file = Vec::new();
        let size = write_entries(store, now, 9, &mut file).unwrap();
        assert_eq!(size.bytes, file.len() as u64);
        (Header { id: 9, entries: size.entries }, file)
    }

    #[test]
    fn the_bytes_match_the_example_of_the_description() {
        let record = Record { key: 0x1111, inserted: 0x6000_0000, expires: NEVER, len: 2 };
        let (fixed, mut hasher) = record.encode(0x0102_0304_0506_0708, 0);
        hasher.update(b"hi");
        let bytes = [&fixed[..], b"hi", &hasher.finalize().to_le_bytes()].concat();
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = "\
            11 11 00 00 00 00 00 00 00 00 00 00 00 00 00 00 \
            00 00 00 60 00 00 00 00 ff ff ff ff ff ff ff ff \
            02 00 00 00 24 20 6d 7c 68 69 f0 99 88 28";
        assert_eq!(hex.join(" "), expected);
    }

    #[test]
    fn the_rest_of_a_time_to_live_survives() {
        let before = store();
        let start = Clock::now();
        let at = |seconds| Clock {
            unix_s: start.unix_s + seconds,
            instant: start.instant + Duration::from_secs(seconds),
        };
        before.insert(1, "short".into(), Some(Duration::from_secs(100)), at(0).instant);
        before.insert(2, "long".into(), Some(Duration::from_secs(1000)), at(0).instant);
        before.insert(3, "ever".into(), None, at(0).instant);
        before.insert(4, "over".into(), Some(Duration::from_secs(10)), at(0).instant);
        let (header, file) = written(&before, at(50));
        assert_eq!(header.entries, 3, "an expired value is not written");

        // Ten minutes later, in a process that has just started.
        let after = store();
        let later = Clock { unix_s: start.unix_s + 600, instant: Instant::now() };
        let counts = restore_entries(&after, later, header, &mut &file[..]).unwrap();
        assert_eq!((counts.restored, counts.expired, counts.evicted), (2, 1, 0));
        let get = |key, seconds| after.get(key, later.instant + Duration::from_secs(seconds));
        assert!(get(1, 0).is_none());
        assert_eq!(get(2, 0).unwrap().age, Duration::from_secs(600));
        assert_eq!(get(2, 399).unwrap().value, "long");
        assert!(get(2, 401).is_none());
        assert_eq!(get(3, 1 << 30).unwrap().value, "ever");
        assert_eq!(after.stats().inserted, 0, "a restored value is not a write");
    }

    #[test]
    fn a_clock_that_was_set_back_extends_no_time_to_live() {
        let before = store();
        let start = Clock::now();
        before.insert(1, "x".into(), Some(Duration::from_secs(10)), start.instant);
        let (header, file) = written(&before, start);
        let after = store();
        let earlier = Clock { unix_s: start.unix_s - 5000, instant: Instant::now() };
        restore_entries(&after, earlier, header, &mut &file[..]).unwrap();
        assert_eq!(after.get(1, earlier.instant).unwrap().age, Duration::ZERO);
        assert!(after.get(1, earlier.instant + Duration::from_secs(12)).is_none());
    }

    #[test]
    fn the_later_of_two_values_wins() {
        let before = store();
        let start = Clock::now();
        before.insert(1, "old".into(), None, start.instant);
        before.insert(2, "old".into(), None, start.instant);
        let (header, file) = written(&before, start);
        let after = store();
        let later = Clock { unix_s: start.unix_s + 60, instant: Instant::now() };
        after.insert(1, "new".into(), None, later.instant);
        let counts = restore_entries(&after, later, header, &mut &file[..]).unwrap();
        assert_eq!(counts.restored, 1);
        assert_eq!(after.get(1, later.instant).unwrap().value, "new");
        assert_eq!(after.get(2, later.instant).unwrap().value, "old");
    }
}
