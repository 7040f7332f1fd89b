//! Snapshots of a byte store through the public interface: damage, ownership, processes that are
//! killed, and a writer of two stores.

// Miri has no files.
#![cfg(not(miri))]
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use afterimage_cache::snapshot::{LoadError, OpenError, SnapshotReport, load};
use afterimage_cache::{ByteStore, Capacity, SnapshotFile, SnapshotWriter, Table};
use afterimage_testkit::killed;
use bytes::Bytes;

/// Bytes of a snapshot's header, and of a record beside its value.
const HEADER: usize = 36;
const RECORD: usize = 44;

/// A value that names its key and generation, of 16 bytes to a few hundred.
fn value(key: u128, generation: u64) -> Bytes {
    let mut value = generation.to_le_bytes().to_vec();
    value.extend((key as u64).to_le_bytes());
    value.resize(16 + (key * 7 % 300) as usize, key as u8);
    value.into()
}

fn empty() -> ByteStore {
    ByteStore::new(64 << 20, 1 << 20)
}

fn filled(entries: u128, generation: u64) -> ByteStore {
    let (store, now) = (empty(), Instant::now());
    for key in 0..entries {
        store.insert(key, value(key, generation), None, now);
    }
    store
}

/// Writes one snapshot and releases the file.
fn write(store: &ByteStore, path: &Path) -> SnapshotReport {
    SnapshotFile::open_bytes(path).unwrap().write(store).unwrap()
}

fn holds(store: &ByteStore, key: u128, generation: u64) -> bool {
    store.get(key, Instant::now()).is_some_and(|stored| stored.value == value(key, generation))
}

#[test]
fn written_values_are_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bytes");
    for entries in [0, 1, 5000] {
        let report = write(&filled(entries, 1), &path);
        assert_eq!(u128::from(report.entries), entries);
        assert_eq!(report.bytes, fs::metadata(&path).unwrap().len());
        let store = empty();
        let loaded = load(&store, &path).unwrap();
        assert_eq!((loaded.entries, loaded.restored), (report.entries, report.entries));
        assert_eq!((loaded.expired, loaded.evicted), (0, 0));
        assert!((0..entries).all(|key| holds(&store, key, 1)));
        assert_eq!(store.stats().entries, report.entries);
    }
}

#[test]
fn empty_and_large_values_survive() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bytes");
    let (store, now) = (empty(), Instant::now());
    let large = Bytes::from((0..1 << 20).map(|i| (i / 7) as u8).collect::<Vec<u8>>());
    store.insert(u128::MAX, large.clone(), None, now);
    store.insert(0, Bytes::new(), None, now);
    write(&store, &path);
    let restored = empty();
    load(&restored, &path).unwrap();
    assert_eq!(restored.get(u128::MAX, now).unwrap().value, large);
    assert_eq!(restored.get(0, now).unwrap().value, "");
}

#[test]
fn a_smaller_store_loads_what_fits() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bytes");
    let (store, now) = (filled(2000, 1), Instant::now());
    store.insert(1 << 64, vec![1; 1 << 19].into(), None, now);
    write(&store, &path);
    let small = ByteStore::new(64 << 10, 1 << 10);
    let report = load(&small, &path).unwrap();
    assert_eq!((report.entries, report.restored), (2001, 2000), "one value is too large");
    let stats = small.stats();
    assert_eq!(report.restored - report.evicted, stats.entries);
    assert!(stats.bytes <= stats.capacity_bytes, "{stats:?}");
}

#[test]
fn expired_values_are_skipped() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bytes");
    let (store, now) = (empty(), Instant::now());
    store.insert(1, value(1, 1), Some(Duration::from_secs(1)), now);
    store.insert(2, value(2, 1), Some(Duration::from_secs(3600)), now);
    assert_eq!(write(&store, &path).entries, 2);
    // The file counts whole seconds: the first value has one left, or two.
    thread::sleep(Duration::from_millis(2100));
    let restored = empty();
    let report = load(&restored, &path).unwrap();
    assert_eq!((report.restored, report.expired), (1, 1));
    assert!(holds(&restored, 2, 1));
    let hour_later = Instant::now() + Duration::from_secs(3600);
    assert!(restored.get(2, hour_later).is_none(), "the time to live began before the restart");
}

#[test]
fn every_truncation_and_flipped_bit_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bytes");
    write(&filled(3, 1), &path);
    let whole = fs::read(&path).unwrap();
    let store = empty();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let error = load(&store, &path).unwrap_err();
        let LoadError::Damaged { offset, .. } = error else { panic!("{length} bytes: {error}") };
        assert!(offset <= length as u64, "{length} bytes: {error}");
    }
    for bit in 0..8 * whole.len() {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, damaged).unwrap();
        let error = load(&store, &path).unwrap_err();
        let is_expected =
            matches!(error, LoadError::Damaged { .. } | LoadError::NotASnapshot { .. });
        assert!(is_expected, "bit {bit}: {error}");
    }
    assert_eq!(store.stats().entries, 0, "a refused snapshot changes nothing");
}

#[test]
fn damage_is_reported_with_file_and_place() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bytes");
    let store = empty();
    store.insert(1, "hello".into(), None, Instant::now());
    write(&store, &path);
    let whole = fs::read(&path).unwrap();
    assert_eq!(whole.len(), HEADER + RECORD + 5);
    let damaged_at = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
        load(&empty(), &path).unwrap_err().to_string()
    };
    let text = damaged_at(HEADER + 40);
    assert!(text.contains("bytes\" is damaged at byte 36: a value's checksum"), "{text}");
    let text = damaged_at(HEADER + 33);
    assert!(text.contains("damaged at byte 36: the checksum in front of a value"), "{text}");
    let text = damaged_at(9);
    assert!(text.contains("damaged at byte 0: the header's checksum"), "{text}");
    fs::write(&path, [&whole[..], &whole[HEADER..]].concat()).unwrap();
    let text = load(&empty(), &path).unwrap_err().to_string();
    assert!(text.contains("damaged at byte 85: bytes follow"), "{text}");
}

#[test]
fn a_record_of_another_snapshot_or_position_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bytes");
    let (store, now) = (empty(), Instant::now());
    for key in [1, 2] {
        store.insert(key, "equally long".into(), None, now);
    }
    write(&store, &path);
    let old = fs::read(&path).unwrap();
    write(&store, &path);
    let new = fs::read(&path).unwrap();
    let second = HEADER + (new.len() - HEADER) / 2;
    let swapped = [&new[..HEADER], &new[second..], &new[HEADER..second]].concat();
    let mixed = [&new[..second], &old[second..]].concat();
    for damaged in [swapped, mixed] {
        fs::write(&path, damaged).unwrap();
        let error = load(&empty(), &path).unwrap_err();
        assert!(matches!(error, LoadError::Damaged { .. }), "{error}");
    }
    fs::write(&path, &new).unwrap();
    load(&empty(), &path).unwrap();
}

#[test]
fn a_label_snapshot_is_not_a_byte_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = Table::new(Capacity::Entries(1000)).unwrap();
    table.insert(1, 2);
    SnapshotFile::open(&path).unwrap().write(&table).unwrap();
    let before = fs::read(&path).unwrap();
    let error = SnapshotFile::open_bytes(&path).unwrap_err();
    assert!(matches!(error, OpenError::NotASnapshot { .. }), "{error}");
    assert!(error.to_string().contains("is not a snapshot of a byte store"), "{error}");
    let error = load(&empty(), &path).unwrap_err();
    assert!(matches!(error, LoadError::NotASnapshot { .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);

    write(&filled(1, 1), &directory.path().join("bytes"));
    let error = SnapshotFile::open(directory.path().join("bytes")).unwrap_err();
    assert!(error.to_string().contains("is not a snapshot of a label table"), "{error}");
}

#[test]
fn a_snapshot_has_every_value_that_stays_during_the_write() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bytes");
    let store = filled(3000, 7);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for key in (10_000u128..).take_while(|_| !done.load(Ordering::Relaxed)) {
                let key = 10_000 + key % 1000;
                store.insert(key, value(key, 0), None, Instant::now());
                store.remove(10_000 + key * 31 % 1000);
            }
        });
        for _ in 0..5 {
            write(&store, &path);
            let restored = empty();
            load(&restored, &path).unwrap();
            let missing = (0..3000).find(|&key| !holds(&restored, key, 7));
            done.store(missing.is_some(), Ordering::Relaxed);
            assert_eq!(missing, None);
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// Not a test of its own: the process that `a_killed_writer_leaves_a_whole_snapshot` kills.
#[test]
fn writes_byte_snapshots_until_it_is_killed() {
    let Some(path) = killed::path() else { return };
    let file = SnapshotFile::open_bytes(path).unwrap();
    for generation in 0.. {
        file.write(&filled(5000, generation)).unwrap();
    }
}

#[test]
fn a_killed_writer_leaves_a_whole_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bytes");
    let moments = [30_000, 3131].map(Duration::from_micros);
    let mut is_first = true;
    let started = |writer: &Child| {
        if std::mem::replace(&mut is_first, false) {
            // A second process may not use the file. The error names the process that uses it.
            let error = SnapshotFile::open_bytes(&path).unwrap_err();
            let owner = writer.id();
            assert!(matches!(error, OpenError::InUse { pid: Some(pid), .. } if pid == owner));
            assert!(error.to_string().contains(&format!("in use by process {owner}")), "{error}");
        }
    };
    killed::in_rounds(
        "writes_byte_snapshots_until_it_is_killed",
        &path,
        20,
        moments,
        started,
        || {
            let store = empty();
            assert_eq!(load(&store, &path).unwrap().restored, 5000);
            let mut generations = HashMap::new();
            for key in 0..5000 {
                let stored = store.get(key, Instant::now()).unwrap().value;
                let generation = u64::from_le_bytes(stored[..8].try_into().unwrap());
                assert_eq!(stored, value(key, generation));
                *generations.entry(generation).or_insert(0) += 1;
            }
            assert_eq!(generations.len(), 1, "two snapshots in one");
        },
    );
    drop(SnapshotFile::open_bytes(&path).unwrap());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "only the snapshot is left");
}

#[test]
fn one_writer_keeps_both_stores() {
    let directory = tempfile::tempdir().unwrap();
    let (labels_path, bytes_path) =
        (directory.path().join("snapshot"), directory.path().join("snapshot.bytes"));
    let start = || {
        let labels = Arc::new(Table::new(Capacity::Entries(1000)).unwrap());
        let bytes = Arc::new(empty());
        let parts = vec![
            SnapshotFile::open(&labels_path).unwrap().of(Arc::clone(&labels)),
            SnapshotFile::open_bytes(&bytes_path).unwrap().of(Arc::clone(&bytes)),
        ];
        (labels, bytes, SnapshotWriter::start_all(parts, None))
    };
    let (labels, bytes, writer) = start();
    labels.insert(1, 10);
    bytes.insert(1, value(1, 1), None, Instant::now());
    bytes.insert(2, value(2, 1), None, Instant::now());
    let (sender, receiver) = mpsc::channel();
    writer.handle().request(move |outcome| sender.send(outcome).unwrap());
    let report = receiver.recv_timeout(Duration::from_secs(60)).unwrap().unwrap().report;
    assert_eq!(report.entries, 3);
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    assert_eq!(report.bytes, size(&labels_path) + size(&bytes_path));
    bytes.insert(3, value(3, 1), None, Instant::now());
    assert_eq!(writer.finish().unwrap().entries, 4);

    let (labels, bytes, writer) = start();
    assert_eq!(labels.get(1), Some(10));
    assert!([1, 2, 3].into_iter().all(|key| holds(&bytes, key, 1)));
    drop(writer);

    // Damage to one file is a cold start of its store only.
    fs::write(&bytes_path, b"\x89AFTBYT\n and more").unwrap();
    let (labels, bytes, _writer) = start();
    assert_eq!(labels.get(1), Some(10));
    assert_eq!(bytes.stats().entries, 0);
}
