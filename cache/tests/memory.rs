//! The memory of a table: reserved at first, allocated when it is written or populated. In a
//! process of their own, whose resident memory these tests measure.

#![cfg(all(target_os = "linux", not(miri)))]

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use afterimage_cache::{Capacity, Table, populate_in_background};
use afterimage_testkit::memory::resident_bytes;

const BYTES: u64 = 64 << 20;

#[test]
fn a_new_table_takes_address_space_but_no_memory() {
    let before = resident_bytes();
    let table = Table::new(Capacity::Bytes(1 << 30)).unwrap();
    let after = resident_bytes();
    // The other test allocates BYTES.
    assert!(after.saturating_sub(before) < 2 * BYTES, "{before} bytes became {after}");
    drop(table);
}

#[test]
fn populate_allocates_memory_and_keeps_its_contents() {
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
