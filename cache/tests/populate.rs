//! A table's memory, taken before it is written to. Alone in its process, whose memory is looked
//! at.

#![cfg(all(target_os = "linux", not(miri)))]

mod resident;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use afterimage_cache::{Capacity, Table, populate_in_background};
use resident::resident_bytes;

const BYTES: u64 = 64 << 20;

#[test]
fn memory_is_there_before_it_is_written_to_and_what_was_written_stays() {
    let table = Arc::new(Table::new(Capacity::Bytes(BYTES)).expect("memory"));
    table.insert(7, 8);
    let before = resident_bytes().expect("Linux says it");
    table.populate(|| false).expect("nothing to do");
    assert!(resident_bytes().expect("Linux says it") < before + BYTES / 2, "told not to");
    let mut once = [true, false].into_iter();
    if let Err(error) = table.populate(|| once.next() == Some(true)) {
        return eprintln!("SKIPPED: this system cannot: {error}");
    }
    populate_in_background(&table);
    let deadline = Instant::now() + Duration::from_secs(60);
    while Arc::strong_count(&table) > 1 {
        assert!(Instant::now() < deadline, "it ends");
        thread::sleep(Duration::from_millis(1));
    }
    // Not all of it is new: the entry's page was there.
    assert!(resident_bytes().expect("Linux says it") > before + BYTES / 4 * 3);
    assert_eq!(table.get(7), Some(8));
}
