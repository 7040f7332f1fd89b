//! How much memory a table for ten million entries takes, and how many of ten million keys stay in
//! it: `cargo run --release -p afterimage-cache --example resident`, on Linux.
//!
//! The bytes are what the process has in physical memory more than before, as the system counts it.

#[path = "../tests/resident/mod.rs"]
mod resident;

use afterimage_cache::{Capacity, Table};
use resident::resident_bytes;
use std::error::Error;

const ENTRIES: u64 = 10_000_000;

fn main() -> Result<(), Box<dyn Error>> {
    let before = resident_bytes()?;
    let table = Table::new(Capacity::Entries(ENTRIES))?;
    println!("{} slots in {} bytes", table.capacity(), table.memory_bytes());
    println!("| keys written | entries | of the first {ENTRIES} | resident bytes | an entry |");
    println!("|---|---|---|---|---|");
    for round in 0..4 {
        for key in round * ENTRIES..(round + 1) * ENTRIES {
            table.insert(key, !key);
        }
        // Counted before the keys are looked for, which may bring nothing into memory either.
        let (entries, bytes) = (table.len(), resident_bytes()? - before);
        let stay = (0..ENTRIES).filter(|&key| table.get(key) == Some(!key)).count();
        println!(
            "| {} | {entries} | {:.2} % | {bytes} | {:.2} |",
            (round + 1) * ENTRIES,
            100.0 * stay as f64 / ENTRIES as f64,
            bytes as f64 / entries as f64,
        );
    }
    Ok(())
}
