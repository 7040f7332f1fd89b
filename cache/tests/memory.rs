//! The memory of a table: reserved at first, allocated when it is written or populated. In a
//! process of their own, whose resident memory these tests measure.

#![cfg(all(target_os = "linux", not(miri)))]

use std::fs;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use afterimage_cache::{Capacity, Insert, Table, populate_in_background};
use afterimage_testkit::memory::resident_bytes;

const BYTES: u64 = 64 << 20;

const HUGE_PAGE: u64 = 2 << 20;

/// The tests read the memory of the process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn a_new_table_takes_address_space_but_no_memory() {
    let _only = ONE_AT_A_TIME.lock().unwrap();
    let before = resident_bytes();
    let table = Table::new(Capacity::Bytes(1 << 30)).unwrap();
    let after = resident_bytes();
    assert!(after.saturating_sub(before) < BYTES, "{before} bytes became {after}");
    drop(table);
}

#[test]
fn populate_allocates_memory_and_keeps_its_contents() {
    let _only = ONE_AT_A_TIME.lock().unwrap();
    let table = Arc::new(Table::new(Capacity::Bytes(BYTES)).expect("memory"));
    table.insert(7, 8);
    let before = resident_bytes();
    table.populate(|| false);
    assert!(resident_bytes() < before + BYTES / 2, "it was stopped at once");
    let mut once = [true, false].into_iter();
    table.populate(|| once.next() == Some(true));
    populate_in_background(&table);
    let deadline = Instant::now() + Duration::from_secs(60);
    while Arc::strong_count(&table) > 1 {
        assert!(Instant::now() < deadline, "it does not end");
        thread::sleep(Duration::from_millis(1));
    }
    // The page of the entry was allocated before.
    assert!(resident_bytes() > before + BYTES / 4 * 3);
    assert_eq!(table.get(7), Some(8));
}

/// A burst of writes in the first second must not wait until the system has cleared a huge page for
/// each.
#[test]
fn writes_during_population_allocate_small_pages_only() {
    let _only = ONE_AT_A_TIME.lock().unwrap();
    const WRITES: u64 = 200;
    let table = Table::new(Capacity::Bytes(BYTES)).expect("memory");
    let mut grown = None;
    let mut chunks = 0;
    table.populate(|| {
        chunks += 1;
        if grown.is_none() {
            let before = resident_bytes();
            (0..WRITES).for_each(|key| assert_eq!(table.insert(key, key), Insert::Inserted));
            grown = Some(resident_bytes().saturating_sub(before));
        }
        true
    });
    assert_eq!(chunks, BYTES / HUGE_PAGE);
    let grown = grown.expect("it was called");
    assert!(grown < WRITES * 16 * 1024, "{WRITES} writes took {grown} bytes");
    (0..WRITES).for_each(|key| assert_eq!(table.get(key), Some(key)));
    if let Some(huge) = huge_bytes() {
        assert!(huge >= BYTES / 4 * 3, "only {huge} bytes are in huge pages in the end");
    }
}

/// Bytes of this process in huge pages. `None` if the system has none, or cannot merge pages.
fn huge_bytes() -> Option<u64> {
    let modes = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next()?, numbers.next()?);
    if modes.contains("[never]") || version < (6, 1) {
        return None;
    }
    let sums = fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = sums.lines().find_map(|line| line.strip_prefix("AnonHugePages:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}
