use super::*;
use crate::table::Capacity;
use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

fn table(entries: u64) -> Table {
    // So many slots, while they are less than 2^19.
    Table::new(Capacity::Bytes(entries.div_ceil(8) * 144)).unwrap()
}

/// A table with `entries` keys, each with a value of this `generation`.
fn filled(entries: u64, generation: u64) -> Table {
    // With so much room no bucket overflows.
    let table = table(16 * entries + 500);
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
fn what_was_written_is_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    // None, one, some, a full block, a block and one, several blocks.
    for entries in [0, 1, 100, 4096, 4097, 20_000] {
        let table = filled(entries, 1);
        let report = write(&table, &path).unwrap();
        assert_eq!(report.entries, entries);
        assert_eq!(report.bytes, fs::metadata(&path).unwrap().len());
        let restored = filled(0, 0);
        let bigger = self::table(12 * entries + 900);
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
    let table = table(1000);
    for key in [0, 1, u64::MAX, 1 << 63] {
        table.insert(key, !key);
    }
    for _ in 0..5 {
        table.get(u64::MAX);
    }
    write(&table, &path).unwrap();
    let restored = self::table(500);
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
fn the_bytes_are_those_that_the_description_shows() {
    let mut file = io::Cursor::new(Vec::new());
    file.write_all(&Header { id: 0x0102_0304_0506_0708, entries: 2 }.encode()).unwrap();
    let mut block = Block::new(0x0102_0304_0506_0708);
    block.push(Entry { key: 0x1111, value: 0x2222, heat: 0 });
    block.push(Entry { key: u64::MAX, value: 1, heat: 5 });
    block.write(&mut file).unwrap();
    let hex: Vec<String> = file.get_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let expected = "\
        89 41 46 54 49 4d 47 0a 01 00 00 00 00 00 00 00 \
        08 07 06 05 04 03 02 01 02 00 00 00 00 00 00 00 \
        19 cb 0c 3f \
        02 00 00 00 \
        11 11 00 00 00 00 00 00 ff ff ff ff ff ff ff ff \
        22 22 00 00 00 00 00 00 01 00 00 00 00 00 00 00 \
        00 05 \
        eb 07 d1 51";
    assert_eq!(hex.join(" "), expected);
    assert!(matches!(read_all(&mut &file.get_ref()[..], |_| {}), Ok(2)));
}

#[test]
fn every_truncation_is_refused_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    write(&filled(5000, 1), &path).unwrap();
    let whole = fs::read(&path).unwrap();
    let table = table(100);
    // Every length around the parts' ends, and every seventh between.
    for length in (0..whole.len()).filter(|n| n % 7 == 0 || *n < 500 || n + 500 > whole.len()) {
        fs::write(&path, &whole[..length]).unwrap();
        let error = load(&table, &path).unwrap_err();
        assert!(matches!(error, LoadError::Damaged { .. }), "{length} bytes: {error}");
    }
    // In a small one, every length.
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
    let table = table(1000);
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
fn a_block_of_another_snapshot_or_place_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = filled(8192, 1);
    write(&table, &path).unwrap();
    let old = fs::read(&path).unwrap();
    write(&table, &path).unwrap();
    let new = fs::read(&path).unwrap();
    let (first, second) = (Header::BYTES, (Header::BYTES + new.len()) / 2);
    let swapped = [&new[..first], &new[second..], &new[first..second]].concat();
    let mixed = [&new[..second], &old[second..]].concat();
    let long = [&new[..], &[0]].concat();
    let doubled = [&new[..], &new[first..]].concat();
    for damaged in [swapped, mixed, long, doubled] {
        fs::write(&path, damaged).unwrap();
        let error = load(&self::table(200_000), &path).unwrap_err();
        assert!(matches!(error, LoadError::Damaged { .. }), "{error}");
    }
    fs::write(&path, &new).unwrap();
    load(&self::table(200_000), &path).unwrap();
}

#[test]
fn a_boastful_header_takes_no_memory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    // Right checksum, wrong promise.
    fs::write(&path, Header { id: 1, entries: u64::MAX }.encode()).unwrap();
    let error = load(&table(7), &path).unwrap_err();
    assert!(matches!(error, LoadError::Damaged { offset: 36, .. }), "{error}");
    fs::write(&path, [&Header { id: 1, entries: 9 }.encode()[..], &[0xff; 100]].concat()).unwrap();
    let error = load(&table(7), &path).unwrap_err();
    assert!(matches!(error, LoadError::Damaged { offset: 36, .. }), "{error}");
}

#[test]
fn says_what_else_a_file_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = table(7);
    assert!(matches!(load(&table, &path), Err(LoadError::Missing { .. })));
    fs::write(&path, [b'x'; 100]).unwrap();
    assert!(matches!(load(&table, &path), Err(LoadError::NotASnapshot { .. })));
    let mut header = Header { id: 1, entries: 0 }.encode();
    header[8] = 2;
    let checksum = crc32fast::hash(&header[..32]);
    header[32..].copy_from_slice(&checksum.to_le_bytes());
    fs::write(&path, header).unwrap();
    let error = load(&table, &path).unwrap_err();
    assert!(matches!(error, LoadError::UnsupportedVersion { version: 2, .. }), "{error}");
    assert!(matches!(load(&table, directory.path()), Err(LoadError::Io { .. })));
}

#[test]
fn a_smaller_table_keeps_what_was_worth_most() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = table(70_000);
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
    let small = self::table(14_000);
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
fn what_is_in_the_table_is_newer_than_the_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    write(&filled(10, 1), &path).unwrap();
    let table = table(100);
    table.insert(3, 33);
    let report = load(&table, &path).unwrap();
    assert_eq!((report.entries, report.restored), (10, 9));
    assert_eq!(table.get(3), Some(33));
    assert_eq!(table.get(4), Some(sealed(4, 1)));
}

/// A disk with room for so many bytes; and one that takes them all but cannot keep them.
struct Disk {
    file: File,
    room: u64,
    keeps: bool,
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fits = bytes.len().min(self.room as usize);
        if fits == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.room -= fits as u64;
        self.file.write(&bytes[..fits])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Disk {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl SnapshotFile for Disk {
    fn sync(&self) -> io::Result<()> {
        if self.keeps { Ok(()) } else { Err(io::Error::other("the disk is broken")) }
    }
}

#[test]
fn a_full_or_broken_disk_leaves_the_previous_snapshot_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let old = filled(100, 1);
    let bytes = write(&old, &path).unwrap().bytes;
    let new = filled(100, 2);
    for (room, keeps) in (0..bytes).map(|room| (room, true)).chain([(u64::MAX, false)]) {
        let error = write_through(&new, &path, |file| Disk { file, room, keeps }).unwrap_err();
        assert_eq!(error.action, if keeps { "write" } else { "flush" });
        assert_eq!(names(directory.path()), ["snapshot"], "room for {room}");
        let restored = table(1000);
        load(&restored, &path).unwrap();
        assert_eq!(contents(&restored), contents(&old), "room for {room}");
    }
    write_through(&new, &path, |file| Disk { file, room: bytes, keeps: true }).unwrap();
    let restored = table(1000);
    load(&restored, &path).unwrap();
    assert_eq!(contents(&restored), contents(&new));
}

#[test]
fn a_directory_that_is_not_there_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let error = write(&table(7), directory.path().join("none/snapshot")).unwrap_err();
    assert_eq!(error.action, "create");
    // The name is taken by something that a file cannot replace.
    fs::create_dir_all(directory.path().join("taken/full")).unwrap();
    let error = write(&table(7), directory.path().join("taken")).unwrap_err();
    assert_eq!(error.action, "rename the new snapshot to");
    assert_eq!(names(directory.path()), ["taken"]);
}

#[test]
fn leftovers_of_dead_writers_are_removed_and_nothing_else_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let put = |name: &str| fs::write(directory.path().join(name), b"x").unwrap();
    let others = ["other", "other.tmp-1", "snapshot.tmp", "snapshot.tmp-", "snapshot.tmp-a1"];
    others.into_iter().for_each(put);
    ["snapshot.tmp-1", "snapshot.tmp-99999"].into_iter().for_each(put);
    // Also one with our own id, as a container that always is process 1 leaves it behind.
    put(&format!("snapshot.tmp-{}", std::process::id()));
    write(&filled(5, 1), &path).unwrap();
    let mut expected: Vec<&str> = others.into_iter().chain(["snapshot"]).collect();
    expected.sort();
    assert_eq!(names(directory.path()), expected);
    put("snapshot.tmp-1");
    assert_eq!(remove_leftovers(&path), 1);
    assert_eq!(names(directory.path()), expected);
}

#[test]
fn a_bare_file_name_means_the_working_directory() {
    assert_eq!(directory(Path::new("snapshot")), Path::new("."));
    assert_eq!(aside_prefix(Path::new("a/b.snap")), "b.snap.tmp-");
}

#[test]
fn serving_goes_on_while_a_snapshot_is_written_and_what_stays_is_in_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = table(400_000);
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
            // The few keys below 1000 come, change and go; no bucket is near to full, so none is
            // evicted.
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
            let restored = self::table(800_000);
            assert_eq!(load(&restored, &path).unwrap().restored, report.entries);
            for &key in &present {
                assert_eq!(restored.get(key), Some(sealed(key, 0)), "{key}");
            }
        }
        assert!(served_meanwhile > 0, "nothing was served meanwhile");
    });
}

/// Lets a test's threads end when the test does, also when it fails.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn two_threads_that_write_to_one_path_take_turns() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let table = filled(1000, 1);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    write(&table, &path).unwrap();
                }
            });
        }
    });
    assert_eq!(names(directory.path()), ["snapshot"]);
}

const KILLED_WRITES_TO: &str = "AFTERIMAGE_TEST_KILLED_WRITES_TO";

/// Not a test of its own: what `a_killed_writer_leaves_a_whole_snapshot` starts and kills.
#[test]
fn writes_snapshots_until_it_is_killed() {
    let Some(path) = std::env::var_os(KILLED_WRITES_TO) else { return };
    let table = table(400_000);
    for generation in 0.. {
        for key in 0..20_000 {
            table.insert(key, sealed(key, generation));
        }
        write(&table, &path).unwrap();
    }
}

#[test]
fn a_killed_writer_leaves_a_whole_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let mut in_the_middle = 0;
    for round in 0..25u64 {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "snapshot::tests::writes_snapshots_until_it_is_killed"])
            .env(KILLED_WRITES_TO, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while !path.exists() {
            assert_eq!(writer.try_wait().unwrap(), None, "the writer ended by itself");
            thread::sleep(Duration::from_millis(1));
        }
        // Different moments of a write, which takes some milliseconds.
        thread::sleep(Duration::from_micros(20_000 + 1_731 * round));
        writer.kill().unwrap();
        writer.wait().unwrap();
        in_the_middle += names(directory.path()).len() - 1;

        let restored = table(300_000);
        load(&restored, &path).unwrap();
        assert_eq!(restored.len(), 20_000);
        let generations: Vec<u64> = (0..20_000u64)
            .map(|key| (0..).find(|&g| restored.get(key) == Some(sealed(key, g))).unwrap())
            .collect();
        assert!(generations.iter().all(|&g| g == generations[0]), "two snapshots in one");
    }
    println!("{in_the_middle} of 25 were killed in the middle of a write");
    assert!(in_the_middle > 0, "no writer was killed in the middle");
    remove_leftovers(&path);
    assert_eq!(names(directory.path()), ["snapshot"]);
}
