//! Values of any size in files of one folder, bounded by bytes.
//!
//! [`DiskLog`] appends each value to a segment, a file of an eighth of the bound. When the bound is
//! reached, the oldest segment is deleted, so values leave in the order of their writes. A table in
//! memory, about 80 bytes for each value, knows where a value is. The table is read back from the
//! records' heads when the folder is opened again.
//!
//! A record is whole or missing: its head and its value have a checksum each, and a truncated or
//! changed record is a miss. A new process begins a new segment, so it never appends to a torn one.
//! Writes are not synced to the device one by one: a power cut may lose the last of them.
//!
//! ```text
//!  0  magic     4   "AfD1"
//!  4  flags     4   1: the value outlives its segment
//!  8  key      16
//! 24  length    4   of the value
//! 28  checksum  4   CRC-32 of the above
//! 32  checksum  4   CRC-32 of the value
//! 36  value
//! ```

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// Bytes of a record before its value.
const HEAD: usize = 36;
const MAGIC: [u8; 4] = *b"AfD1";
const KEPT: u32 = 1;

/// Segments that share the bound. The oldest one is deleted whole.
const SEGMENTS: u64 = 8;

/// Values by 128-bit keys, in files.
#[derive(Debug)]
pub struct DiskLog {
    folder: PathBuf,
    segment_bytes: u64,
    state: Mutex<State>,
    writer: Mutex<Writer>,
    /// Locked, so that two processes do not share a folder.
    _lock: File,
}

#[derive(Debug, Default)]
struct State {
    places: HashMap<u128, RecordPlace>,
    /// Oldest first.
    segments: VecDeque<Segment>,
}

#[derive(Debug)]
struct Segment {
    number: u64,
    file: Arc<File>,
    bytes: u64,
    /// The keys of its records.
    keys: Vec<u128>,
}

/// Where the latest value of a key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordPlace {
    segment: u64,
    offset: u64,
    len: u32,
    kept: bool,
}

/// The end of the segment that is written now.
#[derive(Debug, Default)]
struct Writer {
    number: u64,
    file: Option<Arc<File>>,
    bytes: u64,
}

impl DiskLog {
    /// The values in `folder`, which is created if it does not exist. Files have at most
    /// `capacity_bytes` together, and a value at most an eighth of that.
    ///
    /// # Errors
    /// When the folder cannot be used, or another process uses it.
    pub fn open(folder: impl Into<PathBuf>, capacity_bytes: u64) -> io::Result<Self> {
        let folder = folder.into();
        std::fs::create_dir_all(&folder)?;
        let lock = File::create(folder.join("lock"))?;
        lock.try_lock().map_err(|_| {
            let text = "another process uses the folder; choose another one";
            io::Error::new(io::ErrorKind::ResourceBusy, text)
        })?;
        let mut numbers: Vec<u64> = std::fs::read_dir(&folder)?
            .filter_map(|entry| number_of(&entry.ok()?.path()))
            .collect();
        numbers.sort_unstable();
        let mut state = State::default();
        for &number in &numbers {
            // A file that cannot be read has no values.
            if let Ok(file) = File::open(path(&folder, number)) {
                state.read(number, file)?;
            }
        }
        let writer = Writer { number: numbers.last().copied().unwrap_or(0), ..Writer::default() };
        let segment_bytes = (capacity_bytes / SEGMENTS).max(HEAD as u64 + 1);
        let (state, writer) = (Mutex::new(state), Mutex::new(writer));
        let log = DiskLog { folder, segment_bytes, state, writer, _lock: lock };
        // The bound may be smaller than before.
        log.make_room(&mut lock_of(&log.writer))?;
        Ok(log)
    }

    /// The largest value in bytes.
    pub fn max_value_bytes(&self) -> usize {
        usize::try_from(self.segment_bytes).unwrap_or(usize::MAX).saturating_sub(HEAD)
    }

    /// Where the value of a key is; `None` if there is none. Reads no file.
    pub fn find(&self, key: u128) -> Option<RecordPlace> {
        lock_of(&self.state).places.get(&key).copied()
    }

    /// The value at a place that [`find`](Self::find) gave. `None` if it was deleted, or if the
    /// record is damaged. Waits for the device.
    pub fn read(&self, key: u128, place: RecordPlace) -> Option<Bytes> {
        let file = {
            let state = lock_of(&self.state);
            let segment = state.segments.iter().find(|segment| segment.number == place.segment)?;
            Arc::clone(&segment.file)
        };
        let value = read_record(&file, key, place);
        if value.is_none() {
            let mut state = lock_of(&self.state);
            if state.places.get(&key) == Some(&place) {
                state.places.remove(&key);
            }
        }
        value
    }

    /// Appends a value, in place of an earlier one of its key. A value that is `kept` is written
    /// again when its segment is deleted. Waits for the device.
    ///
    /// # Errors
    /// When the file cannot be written, for example because the disk is full. The log then has no
    /// value of this key until the folder is opened again.
    pub fn write(&self, key: u128, value: &[u8], kept: bool) -> io::Result<()> {
        if value.len() > self.max_value_bytes() {
            lock_of(&self.state).places.remove(&key);
            return Ok(());
        }
        let mut writer = lock_of(&self.writer);
        let written = self.append(&mut writer, key, value, kept);
        if written.is_err() {
            lock_of(&self.state).places.remove(&key);
        }
        written
    }

    /// The number of values, and the bytes of all files.
    pub fn size(&self) -> (u64, u64) {
        let state = lock_of(&self.state);
        (state.places.len() as u64, state.segments.iter().map(|segment| segment.bytes).sum())
    }

    fn append(&self, writer: &mut Writer, key: u128, value: &[u8], kept: bool) -> io::Result<()> {
        let bytes = (HEAD + value.len()) as u64;
        if writer.file.is_none() || writer.bytes + bytes > self.segment_bytes {
            self.begin_segment(writer)?;
        }
        let Some(file) = &writer.file else { return Err(io::ErrorKind::NotFound.into()) };
        let mut record = Vec::with_capacity(HEAD + value.len());
        record.extend_from_slice(&MAGIC);
        record.extend_from_slice(&if kept { KEPT } else { 0 }.to_le_bytes());
        record.extend_from_slice(&key.to_le_bytes());
        record.extend_from_slice(&(value.len() as u32).to_le_bytes());
        record.extend_from_slice(&crc32fast::hash(&record).to_le_bytes());
        record.extend_from_slice(&crc32fast::hash(value).to_le_bytes());
        record.extend_from_slice(value);
        let offset = writer.bytes;
        if let Err(error) = write_all_at(file, &record, offset) {
            // A part of the record may be there. The next one overwrites it.
            let _ = file.set_len(offset);
            return Err(error);
        }
        writer.bytes += bytes;
        let mut state = lock_of(&self.state);
        let place = RecordPlace { segment: writer.number, offset, len: value.len() as u32, kept };
        state.places.insert(key, place);
        if let Some(segment) = state.segments.back_mut() {
            segment.bytes = writer.bytes;
            segment.keys.push(key);
        }
        Ok(())
    }

    fn begin_segment(&self, writer: &mut Writer) -> io::Result<()> {
        let number = writer.number + 1;
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create_new(true).open(path(&self.folder, number))?;
        let file = Arc::new(file);
        *writer = Writer { number, file: Some(Arc::clone(&file)), bytes: 0 };
        let segment = Segment { number, file, bytes: 0, keys: Vec::new() };
        lock_of(&self.state).segments.push_back(segment);
        self.make_room(writer)
    }

    /// Deletes the oldest segments until the next one fits in the bound.
    fn make_room(&self, writer: &mut Writer) -> io::Result<()> {
        loop {
            let mut state = lock_of(&self.state);
            let bytes: u64 = state.segments.iter().map(|segment| segment.bytes).sum();
            let is_last = state.segments.front().is_none_or(|first| first.number == writer.number);
            if bytes <= self.segment_bytes * (SEGMENTS - 1) || is_last && writer.file.is_some() {
                return Ok(());
            }
            let Some(oldest) = state.segments.pop_front() else { return Ok(()) };
            let mut kept = Vec::new();
            for key in oldest.keys {
                if let Some(place) = state.places.get(&key).copied()
                    && place.segment == oldest.number
                {
                    state.places.remove(&key);
                    kept.extend(place.kept.then_some((key, place)));
                }
            }
            drop(state);
            for (key, place) in kept {
                if let Some(value) = read_record(&oldest.file, key, place) {
                    self.append(writer, key, &value, true)?;
                }
            }
            std::fs::remove_file(path(&self.folder, oldest.number))?;
        }
    }
}

impl State {
    /// Adds the records of a segment, up to the first one whose head is damaged or truncated.
    fn read(&mut self, number: u64, file: File) -> io::Result<()> {
        let end = file.metadata()?.len();
        let (mut offset, mut keys, mut head) = (0, Vec::new(), [0; HEAD]);
        while offset + HEAD as u64 <= end && read_exact_at(&file, &mut head, offset).is_ok() {
            let Some((key, len, kept)) = parse(&head) else { break };
            let next = offset + HEAD as u64 + u64::from(len);
            if next > end {
                break;
            }
            self.places.insert(key, RecordPlace { segment: number, offset, len, kept });
            keys.push(key);
            offset = next;
        }
        self.segments.push_back(Segment { number, file: Arc::new(file), bytes: end, keys });
        Ok(())
    }
}

/// Key, length of the value, and whether it is kept.
fn parse(head: &[u8; HEAD]) -> Option<(u128, u32, bool)> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?));
    let key = u128::from_le_bytes(head[8..24].try_into().ok()?);
    let is_whole = head[..4] == MAGIC && u32_at(28)? == crc32fast::hash(&head[..28]);
    let (flags, len) = (u32_at(4)?, u32_at(24)?);
    is_whole.then_some((key, len, flags & KEPT != 0))
}

fn read_record(file: &File, key: u128, place: RecordPlace) -> Option<Bytes> {
    let mut record = vec![0; HEAD + place.len as usize];
    read_exact_at(file, &mut record, place.offset).ok()?;
    let head: &[u8; HEAD] = record.first_chunk()?;
    let value = &record[HEAD..];
    let is_whole = parse(head)? == (key, place.len, place.kept)
        && head[32..] == crc32fast::hash(value).to_le_bytes();
    is_whole.then(|| Bytes::from(record).slice(HEAD..))
}

fn path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number:016x}.log"))
}

fn number_of(path: &Path) -> Option<u64> {
    let is_log = path.extension().is_some_and(|extension| extension == "log");
    u64::from_str_radix(path.file_stem()?.to_str()?, 16).ok().filter(|_| is_log)
}

fn lock_of<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under a lock is whole before code that could panic runs.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(unix)]
use std::os::unix::fs::FileExt;

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    file.read_exact_at(bytes, offset)
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    file.write_all_at(bytes, offset)
}

#[cfg(not(unix))]
fn read_exact_at(mut file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    use std::io::{Read, Seek};
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = lock_of(&TURN);
    file.seek(io::SeekFrom::Start(offset))?;
    file.read_exact(bytes)
}

#[cfg(not(unix))]
fn write_all_at(mut file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    use std::io::{Seek, Write};
    file.seek(io::SeekFrom::Start(offset))?;
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(log: &DiskLog, key: u128) -> Option<Bytes> {
        log.read(key, log.find(key)?)
    }

    fn value(key: u128) -> Vec<u8> {
        vec![key as u8; 100 + key as usize % 50]
    }

    fn filled(folder: &Path) -> DiskLog {
        let log = DiskLog::open(folder, 1 << 20).unwrap();
        (0..100).for_each(|key| log.write(key, &value(key), false).unwrap());
        log
    }

    #[test]
    fn values_outlive_a_restart_and_the_latest_counts() {
        let folder = tempfile::tempdir().unwrap();
        let log = filled(folder.path());
        log.write(7, b"new", false).unwrap();
        log.write(8, b"", false).unwrap();
        let busy = DiskLog::open(folder.path(), 1 << 20).unwrap_err();
        assert!(busy.to_string().contains("another process"), "{busy}");
        drop(log);
        let log = DiskLog::open(folder.path(), 1 << 20).unwrap();
        assert_eq!(get(&log, 7).unwrap(), "new");
        assert_eq!(get(&log, 8).unwrap(), "");
        assert_eq!(get(&log, 9).unwrap(), value(9));
        assert_eq!((get(&log, 1000), log.size().0), (None, 100));
    }

    #[test]
    fn bytes_stay_within_the_bound_and_kept_values_outlive_it() {
        let folder = tempfile::tempdir().unwrap();
        let log = DiskLog::open(folder.path(), 80_000).unwrap();
        log.write(u128::MAX, b"epoch", true).unwrap();
        for key in 0..5000 {
            log.write(key, &value(key), false).unwrap();
            assert!(log.size().1 <= 80_000, "{:?}", log.size());
        }
        let files = std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap());
        let bytes: u64 = files.map(|file| file.metadata().unwrap().len()).sum();
        assert!((50_000..=80_000).contains(&bytes), "{bytes}");
        assert_eq!((get(&log, 0), get(&log, 4999).unwrap()), (None, value(4999).into()));
        assert_eq!(get(&log, u128::MAX).unwrap(), "epoch");
        drop(log);
        let log = DiskLog::open(folder.path(), 20_000).unwrap();
        assert!(log.size().1 <= 20_000, "a smaller bound counts at once");
        assert_eq!(get(&log, u128::MAX).unwrap(), "epoch");
        assert_eq!(log.write(1, &[0; 80_000], false).ok().and_then(|()| get(&log, 1)), None);
    }

    #[test]
    fn no_truncated_or_changed_file_gives_a_wrong_value() {
        let folder = tempfile::tempdir().unwrap();
        drop(filled(folder.path()));
        let file = path(folder.path(), 1);
        let whole = std::fs::read(&file).unwrap();
        let check = |bytes: &[u8], at: usize| {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(path(folder.path(), 1), bytes).unwrap();
            let log = DiskLog::open(folder.path(), 1 << 20).unwrap();
            let found = (0..100).filter(|&key| {
                let found = get(&log, key);
                assert!(found.as_ref().is_none_or(|found| *found == value(key)), "{at}");
                found.is_some()
            });
            let found = found.count();
            assert!(found < 100, "the damage at {at} is not noticed");
            // The log works on.
            log.write(5000, b"new", false).unwrap();
            assert_eq!(get(&log, 5000).unwrap(), "new");
            found
        };
        for at in (0..whole.len()).step_by(97) {
            check(&whole[..at], at);
            let mut changed = whole.clone();
            changed[at] ^= 1 << (at % 8);
            check(&changed, at);
        }
        let last = whole.len() - 1;
        assert_eq!(check(&whole[..last], last), 99, "all others are found");
    }

    #[cfg(unix)]
    #[test]
    fn a_failed_write_is_a_miss_and_later_writes_succeed() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("log");
        let log = DiskLog::open(&inside, 8_000).unwrap();
        log.write(1, &value(1), false).unwrap();
        // The next segment cannot be created.
        std::fs::remove_dir_all(&inside).unwrap();
        let failed = (2..20).filter(|&key| log.write(key, &value(key), false).is_err()).count();
        assert!(failed > 0);
        assert_eq!(get(&log, 19), None);
        std::fs::create_dir(&inside).unwrap();
        log.write(19, &value(19), false).unwrap();
        assert_eq!(get(&log, 19).unwrap(), value(19));
    }
}
