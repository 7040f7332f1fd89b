//! Snapshots through the public interface: files, damage, ownership, and the writer's thread.

// Miri has no files.
#![cfg(not(miri))]
#![allow(clippy::unwrap_used)]

use afterimage_cache::metrics::METRICS;
use afterimage_cache::snapshot::{LoadError, OpenError, SnapshotFile, WriteError, load};
use afterimage_cache::snapshot::{SnapshotReport, SnapshotWriter};
use afterimage_cache::{ByteStore, CacheService, Capacity, Table};
use afterimage_testkit::killed;
use afterimage_wire::proto::stats::{Stats, Value};
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// Bytes of a snapshot's header.
const HEADER: usize = 36;

/// Writes one snapshot and releases the file.
fn write(table: &Table, path: &Path) -> Result<SnapshotReport, WriteError> {
    SnapshotFile::open(path).unwrap().write(table)
}

/// A table with this many slots, if they are fewer than 2^19.
fn with_slots(slots: u64) -> Table {
    Table::new(Capacity::Bytes(slots.div_ceil(8) * 144)).unwrap()
}

/// A table with `entries` keys, each with a value of this `generation`.
fn filled(entries: u64, generation: u64) -> Table {
    // With this number of slots no bucket overflows.
    let table = with_slots(16 * entries + 500);
    for key in 0..entries {
        table.insert(key, sealed(key, generation));
    }
    assert_eq!(table.len(), entries);
    table
}

fn sealed(key: u64, generation: u64) -> u64 {
    (key << 32 | generation).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn contents(table: &Table) -> HashMap<u64, u64> {
    table.entries().map(|entry| (entry.key, entry.value)).collect()
}

/// The names of all files in a directory.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_written_snapshot_is_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    // No entry, one, a full block, a block and one more, several blocks.
    for entries in [0, 1, 100, 4096, 4097, 20_000] {
        let table = filled(entries, 1);
        let report = write(&table, &path).unwrap();
        assert_eq!(report.entries, entries);
        assert_eq!(report.bytes, fs::metadata(&path).unwrap().len());
        let restored = filled(0, 0);
        let bigger = with_slots(12 * entries + 900);
        for other in [&restored, &bigger] {
            let loaded = load(other, &path);
            if other.capacity() > entries {
                let loaded = loaded.unwrap();
                assert_eq!((loaded.entries, loaded.restored), (entries, entries));
            }
            other.validate().unwrap();
        }
        assert_eq!(contents(&bigger), contents(&table));
        assert_eq!(bigger.stats().writes, 0);
    }
    assert_eq!(names(directory.path()), ["snapshot"]);
}

#[test]
fn extreme_keys_values_and_heats_survive() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = with_slots(1000);
    for key in [0, 1, u64::MAX, 1 << 63] {
        table.insert(key, !key);
    }
    for _ in 0..5 {
        table.get(u64::MAX);
    }
    write(&table, &path).unwrap();
    let restored = with_slots(500);
    load(&restored, &path).unwrap();
    let sorted = |table: &Table| {
        let mut entries: Vec<_> =
            table.entries().map(|entry| (entry.key, entry.value, entry.heat)).collect();
        entries.sort();
        entries
    };
    assert_eq!(sorted(&restored), sorted(&table));
}

#[test]
fn every_truncation_is_refused_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    write(&filled(5000, 1), &path).unwrap();
    let whole = fs::read(&path).unwrap();
    let table = with_slots(100);
    // Every length near the ends of the parts, and every seventh between.
    for length in (0..whole.len()).filter(|n| n % 7 == 0 || *n < 500 || n + 500 > whole.len()) {
        fs::write(&path, &whole[..length]).unwrap();
        let error = load(&table, &path).unwrap_err();
        assert!(matches!(error, LoadError::Damaged { .. }), "{length} bytes: {error}");
    }
    // For a small snapshot, every length.
    write(&filled(9, 1), &path).unwrap();
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        load(&table, &path).unwrap_err();
    }
    assert_eq!(table.len(), 0);
}

#[test]
fn every_flipped_bit_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    write(&filled(60, 1), &path).unwrap();
    let whole = fs::read(&path).unwrap();
    let table = with_slots(1000);
    for bit in 0..8 * whole.len() {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, damaged).unwrap();
        let error = load(&table, &path).unwrap_err();
        assert!(
            matches!(error, LoadError::Damaged { .. } | LoadError::NotASnapshot { .. }),
            "bit {bit}: {error}"
        );
    }
    assert_eq!(table.len(), 0);
}

#[test]
fn a_block_of_another_snapshot_or_position_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = filled(8192, 1);
    write(&table, &path).unwrap();
    let old = fs::read(&path).unwrap();
    write(&table, &path).unwrap();
    let new = fs::read(&path).unwrap();
    let (first, second) = (HEADER, (HEADER + new.len()) / 2);
    let swapped = [&new[..first], &new[second..], &new[first..second]].concat();
    let mixed = [&new[..second], &old[second..]].concat();
    let long = [&new[..], &[0]].concat();
    let doubled = [&new[..], &new[first..]].concat();
    for damaged in [swapped, mixed, long, doubled] {
        fs::write(&path, damaged).unwrap();
        let error = load(&with_slots(200_000), &path).unwrap_err();
        assert!(matches!(error, LoadError::Damaged { .. }), "{error}");
    }
    fs::write(&path, &new).unwrap();
    load(&with_slots(200_000), &path).unwrap();
}

/// A header with a valid checksum.
fn header(version: u8, entries: u64) -> Vec<u8> {
    let mut bytes = b"\x89AFTIMG\n".to_vec();
    bytes.extend([version, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(entries.to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    assert_eq!(bytes.len(), HEADER);
    bytes
}

#[test]
fn a_header_that_promises_too_much_takes_no_memory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    for bytes in [header(1, u64::MAX), [header(1, 9), vec![0xff; 100]].concat()] {
        fs::write(&path, bytes).unwrap();
        let error = load(&with_slots(7), &path).unwrap_err();
        assert!(matches!(error, LoadError::Damaged { offset: 36, .. }), "{error}");
    }
}

#[test]
fn a_load_error_names_the_kind_of_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = with_slots(7);
    assert!(matches!(load(&table, &path), Err(LoadError::Missing { .. })));
    fs::write(&path, [b'x'; 100]).unwrap();
    assert!(matches!(load(&table, &path), Err(LoadError::NotASnapshot { .. })));
    fs::write(&path, header(2, 0)).unwrap();
    let error = load(&table, &path).unwrap_err();
    assert!(matches!(error, LoadError::UnsupportedVersion { version: 2, .. }), "{error}");
    let error = load(&table, directory.path()).unwrap_err();
    assert!(matches!(error, LoadError::NotRegular { kind: "a directory", .. }), "{error}");
}

#[test]
fn a_smaller_table_keeps_the_most_valuable_entries() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = with_slots(70_000);
    for key in 0..50_000 {
        table.insert(key, sealed(key, 1));
    }
    let hot = 0..5_000;
    for key in hot.clone() {
        table.get(key);
        table.get(key);
    }
    write(&table, &path).unwrap();
    let hot = hot.filter(|&key| table.get(key).is_some()).collect::<Vec<_>>();
    let small = with_slots(14_000);
    let report = load(&small, &path).unwrap();
    small.validate().unwrap();
    assert_eq!(report.entries, table.len());
    assert_eq!(report.restored - report.evicted, small.len());
    for entry in small.entries() {
        assert_eq!(entry.value, sealed(entry.key, 1));
    }
    let kept = hot.iter().filter(|&&key| small.get(key).is_some()).count();
    assert!(kept as f64 > 0.95 * hot.len() as f64, "{kept} of {} hot ones", hot.len());
}

#[test]
fn keys_in_the_table_keep_their_newer_values() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    write(&filled(10, 1), &path).unwrap();
    let table = with_slots(100);
    table.insert(3, 33);
    let report = load(&table, &path).unwrap();
    assert_eq!((report.entries, report.restored), (10, 9));
    assert_eq!(table.get(3), Some(33));
    assert_eq!(table.get(4), Some(sealed(4, 1)));
}

#[test]
fn a_missing_directory_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let error = SnapshotFile::open(directory.path().join("none/snapshot")).unwrap_err();
    assert!(matches!(error, OpenError::Io { action: "find", .. }), "{error}");
    // Also when it disappears later.
    let inside = directory.path().join("inside");
    fs::create_dir(&inside).unwrap();
    let file = SnapshotFile::open(inside.join("snapshot")).unwrap();
    fs::remove_dir_all(&inside).unwrap();
    assert_eq!(file.write(&with_slots(7)).unwrap_err().action, "create");
}

#[test]
fn a_file_that_is_not_a_snapshot_is_refused_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    for content in [&b"token"[..], b"not a snapshot", &[0; 100]] {
        fs::write(&path, content).unwrap();
        let error = SnapshotFile::open(&path).unwrap_err();
        assert!(matches!(error, OpenError::NotASnapshot { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), content);
        assert_eq!(names(directory.path()), ["snapshot"]);
    }
}

#[cfg(unix)]
#[test]
fn only_regular_files_are_accepted_also_behind_links() {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    make_fifo(&at("fifo"));
    let _listener = UnixListener::bind(at("socket")).unwrap();
    symlink("/dev/null", at("null")).unwrap();
    symlink(at("fifo"), at("to_fifo")).unwrap();
    symlink(at("to_fifo"), at("to_to_fifo")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    let before = names(directory.path());
    for (name, expected) in [
        ("fifo", "a FIFO"),
        ("to_fifo", "a FIFO"),
        ("to_to_fifo", "a FIFO"),
        ("socket", "a socket"),
        ("null", "a device"),
        ("folder", "a directory"),
    ] {
        let error = SnapshotFile::open(at(name)).unwrap_err();
        assert!(matches!(error, OpenError::NotRegular { kind, .. } if kind == expected), "{error}");
        let error = load(&with_slots(7), at(name)).unwrap_err();
        assert!(matches!(error, LoadError::NotRegular { kind, .. } if kind == expected), "{error}");
    }
    symlink(at("loop"), at("loop")).unwrap();
    SnapshotFile::open(at("loop")).unwrap_err();
    fs::remove_file(at("loop")).unwrap();
    assert_eq!(names(directory.path()), before);
    // A FIFO in the place of the lock or of a temporary file does not block either.
    make_fifo(&at("snapshot.lock"));
    SnapshotFile::open(at("snapshot")).unwrap_err();
    make_fifo(&at("other.tmp-1"));
    assert_eq!(SnapshotFile::open(at("other")).unwrap().removed(), 0);
}

#[cfg(unix)]
fn make_fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_their_target_is_replaced() {
    use std::os::unix::fs::symlink;
    let directory = tempfile::tempdir().unwrap();
    let (links, files) = (directory.path().join("links"), directory.path().join("files"));
    fs::create_dir(&links).unwrap();
    fs::create_dir(&files).unwrap();
    symlink("../files/snapshot", links.join("relative")).unwrap();
    symlink(links.join("relative"), links.join("absolute")).unwrap();
    symlink(&files, links.join("folder")).unwrap();
    // At first the target does not exist.
    for (round, link) in ["absolute", "relative", "folder/snapshot"].into_iter().enumerate() {
        let file = SnapshotFile::open(links.join(link)).unwrap();
        assert_eq!(file.path(), files.canonicalize().unwrap().join("snapshot"));
        file.write(&filled(5, round as u64)).unwrap();
        drop(file);
        assert_eq!(names(&files), ["snapshot"]);
        assert_eq!(names(&links), ["absolute", "folder", "relative"]);
        assert!(links.join("absolute").symlink_metadata().unwrap().is_symlink());
        let restored = with_slots(100);
        load(&restored, files.join("snapshot")).unwrap();
        assert_eq!(contents(&restored), contents(&filled(5, round as u64)));
    }
}

#[cfg(unix)]
#[test]
fn only_the_owner_can_read_a_snapshot() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let file = SnapshotFile::open(&path).unwrap();
    file.write(&filled(5, 1)).unwrap();
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(&directory.path().join("snapshot.lock")), 0o600);
    // A snapshot of an older version, which left that to the umask.
    fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
    file.write(&filled(5, 1)).unwrap();
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn a_file_has_one_owner_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let owner = SnapshotFile::open(&path).unwrap();
    owner.write(&filled(5, 1)).unwrap();
    let error = SnapshotFile::open(&path).unwrap_err();
    let own_id = std::process::id();
    assert!(matches!(error, OpenError::InUse { pid: Some(pid), .. } if pid == own_id), "{error}");
    assert!(error.to_string().contains(&format!("in use by process {own_id}")), "{error}");
    #[cfg(unix)]
    {
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let error = SnapshotFile::open(&link).unwrap_err();
        assert!(matches!(error, OpenError::InUse { .. }), "{error}");
        fs::remove_file(link).unwrap();
        // A hard link has another lock file.
        fs::create_dir(directory.path().join("other")).unwrap();
        let link = directory.path().join("other/snapshot");
        fs::hard_link(&path, &link).unwrap();
        let error = SnapshotFile::open(&link).unwrap_err();
        assert!(matches!(error, OpenError::InUse { .. }), "{error}");
        // After the next write it is the old snapshot, which is a file of its own.
        owner.write(&filled(6, 1)).unwrap();
        drop(SnapshotFile::open(&link).unwrap());
        let link = directory.path().join("other/new");
        fs::hard_link(&path, &link).unwrap();
        let error = SnapshotFile::open(&link).unwrap_err();
        assert!(matches!(error, OpenError::InUse { .. }), "{error}");
        fs::remove_dir_all(directory.path().join("other")).unwrap();
    }
    drop(owner);
    assert_eq!(names(directory.path()), ["snapshot"], "the lock file is removed");
    // A crash leaves a lock file behind, which nothing locks.
    fs::write(directory.path().join("snapshot.lock"), "12345678901234567890\n").unwrap();
    drop(SnapshotFile::open(&path).unwrap());
    assert_eq!(names(directory.path()), ["snapshot"]);
}

#[test]
fn many_threads_that_open_one_file_get_it_in_turn() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = filled(10, 1);
    let owners = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut written = 0;
                while written < 5 {
                    let Ok(file) = SnapshotFile::open(&path) else {
                        thread::yield_now();
                        continue;
                    };
                    assert_eq!(owners.fetch_add(1, Ordering::SeqCst), 0);
                    file.write(&table).unwrap();
                    owners.fetch_sub(1, Ordering::SeqCst);
                    written += 1;
                }
            });
        }
    });
    assert_eq!(names(directory.path()), ["snapshot"]);
}

#[test]
fn temporary_files_of_dead_owners_are_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let put = |name: &str| fs::write(directory.path().join(name), b"x").unwrap();
    let others = ["other", "other.tmp-1", "snapshot.tmp", "snapshot.tmp-", "snapshot.tmp-a1"];
    others.into_iter().for_each(put);
    ["snapshot.tmp-1", "snapshot.tmp-99999"].into_iter().for_each(put);
    // A container in which the service always is process 1 leaves its own id behind.
    put(&format!("snapshot.tmp-{}", std::process::id()));
    let file = SnapshotFile::open(&path).unwrap();
    assert_eq!(file.removed(), 3);
    file.write(&filled(5, 1)).unwrap();
    drop(file);
    let mut expected: Vec<&str> = others.into_iter().chain(["snapshot"]).collect();
    expected.sort();
    assert_eq!(names(directory.path()), expected);
}

#[test]
fn a_temporary_file_of_a_live_owner_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let live = File::create(directory.path().join("snapshot.tmp-1")).unwrap();
    live.try_lock().unwrap();
    // The lock beside the snapshot was deleted by hand.
    let file = SnapshotFile::open(&path).unwrap();
    assert_eq!(file.removed(), 0);
    drop(file);
    assert_eq!(names(directory.path()), ["snapshot.tmp-1"]);
    drop(live);
    assert_eq!(SnapshotFile::open(&path).unwrap().removed(), 1);
}

#[test]
fn a_snapshot_has_every_entry_that_stays_during_the_write() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = with_slots(400_000);
    let stable = 1000..51_000u64;
    for key in stable.clone() {
        table.insert(key, sealed(key, 0));
    }
    let present: Vec<u64> = stable.filter(|&key| table.get(key).is_some()).collect();
    let done = AtomicBool::new(false);
    let served = AtomicU64::new(0);
    thread::scope(|scope| {
        let _ending = Ending(&done);
        scope.spawn(|| {
            // Only keys below 1000 change. No bucket is nearly full, so nothing is evicted.
            let mut round = 0;
            while !done.load(Ordering::Relaxed) {
                let key = round % 1000;
                table.insert(key, sealed(key, round & 0xffff));
                if round % 3 == 0 {
                    table.remove(key);
                }
                round += 1;
                served.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut served_meanwhile = 0;
        for _ in 0..5 {
            let before = served.load(Ordering::Relaxed);
            let report = write(&table, &path).unwrap();
            served_meanwhile += served.load(Ordering::Relaxed) - before;
            let restored = with_slots(800_000);
            assert_eq!(load(&restored, &path).unwrap().restored, report.entries);
            for &key in &present {
                assert_eq!(restored.get(key), Some(sealed(key, 0)), "{key}");
            }
        }
        assert!(served_meanwhile > 0, "nothing was served meanwhile");
    });
}

/// Ends a test's threads when the test ends, also by a failure.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn threads_that_write_one_file_take_turns() {
    let directory = tempfile::tempdir().unwrap();
    let file = SnapshotFile::open(directory.path().join("snapshot")).unwrap();
    let table = filled(1000, 1);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    file.write(&table).unwrap();
                }
            });
        }
    });
    drop(file);
    assert_eq!(names(directory.path()), ["snapshot"]);
}

/// Not a test of its own: the process that `a_killed_writer_leaves_a_whole_snapshot` kills.
#[test]
fn writes_snapshots_until_it_is_killed() {
    let Some(path) = killed::path() else { return };
    let file = SnapshotFile::open(path).unwrap();
    let table = with_slots(400_000);
    for generation in 0.. {
        for key in 0..20_000 {
            table.insert(key, sealed(key, generation));
        }
        file.write(&table).unwrap();
    }
}

#[test]
fn a_killed_writer_leaves_a_whole_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    // Different moments of a write, which takes some milliseconds.
    let moments = [20_000, 1731].map(Duration::from_micros);
    let test = "writes_snapshots_until_it_is_killed";
    killed::in_rounds(
        test,
        &path,
        25,
        moments,
        |_| {},
        || {
            let left = names(directory.path());
            let lock = "snapshot.lock".to_owned();
            assert!(left.contains(&lock), "a crash leaves the lock file: {left:?}");
            let restored = with_slots(300_000);
            load(&restored, &path).unwrap();
            assert_eq!(restored.len(), 20_000);
            let generations: Vec<u64> = (0..20_000u64)
                .map(|key| (0..).find(|&g| restored.get(key) == Some(sealed(key, g))).unwrap())
                .collect();
            assert!(generations.iter().all(|&g| g == generations[0]), "two snapshots in one");
        },
    );
    drop(SnapshotFile::open(&path).unwrap());
    assert_eq!(names(directory.path()), ["snapshot"]);
}

fn start(table: &Arc<Table>, path: &Path, every: Option<Duration>) -> SnapshotWriter {
    SnapshotWriter::start(Arc::clone(table), SnapshotFile::open(path).unwrap(), every)
}

fn small() -> Arc<Table> {
    Arc::new(Table::new(Capacity::Entries(1000)).unwrap())
}

fn temporary_path() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("table.snapshot");
    (directory, path)
}

fn stats(writer: &SnapshotWriter) -> Stats {
    let mut stats = Stats::default();
    writer.handle().stats(&mut stats);
    stats
}

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn the_last_snapshot_of_a_writer_is_loaded_by_the_next() {
    let (_directory, path) = temporary_path();
    let before = small();
    let writer = start(&before, &path, None);
    before.insert(1, 10);
    assert_eq!(writer.finish().unwrap().entries, 1);
    let after = small();
    let _writer = start(&after, &path, None);
    assert_eq!(after.get(1), Some(10));
}

#[test]
fn a_writer_writes_at_its_interval_until_it_is_dropped() {
    let (_directory, path) = temporary_path();
    let table = small();
    table.insert(1, 10);
    let writer = start(&table, &path, Some(Duration::from_millis(5)));
    let handle = writer.handle();
    let written = || {
        let mut stats = Stats::default();
        handle.stats(&mut stats);
        stats.counter_value("snapshots_written")
    };
    let deadline = Instant::now() + PATIENCE;
    while written() < 2 {
        assert!(Instant::now() < deadline, "no snapshot was written");
        thread::sleep(Duration::from_millis(1));
    }
    drop(writer);
    let last = written();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(written(), last, "a dropped writer writes nothing");
}

#[test]
fn a_damaged_file_is_a_cold_start_and_failed_writes_count() {
    let (directory, path) = temporary_path();
    fs::write(&path, b"\x89AFTIMG\n").unwrap();
    let table = small();
    let writer = start(&table, &path, None);
    assert_eq!(table.len(), 0);
    drop(directory);
    assert!(writer.write().is_err());
    assert_eq!(stats(&writer).counter_value("snapshots_failed"), 1);
}

#[test]
fn a_requested_snapshot_is_written_and_its_age_reported() {
    let (_directory, path) = temporary_path();
    let before = small();
    let writer = start(&before, &path, None);
    before.insert(1, 10);
    let (sender, receiver) = mpsc::channel();
    writer.handle().request(move |outcome| sender.send(outcome).unwrap());
    let written = receiver.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!((written.report.entries, written.joined), (1, false));
    assert_eq!(written.report.bytes, fs::metadata(&path).unwrap().len());
    drop(writer);

    let hour = Duration::from_secs(3600);
    File::open(&path).unwrap().set_modified(SystemTime::now() - hour).unwrap();
    let after = small();
    let writer = start(&after, &path, None);
    assert_eq!(after.get(1), Some(10));
    let stats = stats(&writer);
    let Some(&Value::Gauge(age_ms)) = stats.get("snapshot_age_ms") else { panic!("no age") };
    assert!((3_600_000..2 * 3_600_000).contains(&age_ms), "{age_ms} ms");
    assert_eq!(stats.get("snapshot_entries"), Some(&Value::Gauge(1)));
}

#[test]
fn a_cache_with_snapshots_reports_every_described_metric() {
    use afterimage_wire::server::Service;

    let (_directory, path) = temporary_path();
    let table = small();
    let writer = start(&table, &path, None);
    // The time that a snapshot took is known after the first one.
    let bytes = Some(Arc::new(ByteStore::new(1 << 20, 1 << 16)));
    let service = CacheService::new(table).with_bytes(bytes).with_snapshots(Some(writer.handle()));
    writer.write().unwrap();
    let mut stats = Stats::default();
    service.stats(&mut stats);
    let mut reported: Vec<&str> = stats.entries.iter().map(|(name, _)| name.as_str()).collect();
    let mut described: Vec<&str> = METRICS.iter().map(|metric| metric.name).collect();
    reported.sort_unstable();
    described.sort_unstable();
    assert_eq!(reported, described);
}
