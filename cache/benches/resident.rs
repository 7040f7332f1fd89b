//! Memory of a table for ten million entries, and the share of ten million keys that stay in it, on
//! Linux: `cargo bench -p afterimage-cache --bench resident`.
//!
//! The bytes are the growth of the process's resident memory.

use afterimage_cache::{Capacity, Table};
use afterimage_testkit::memory::resident_bytes;

fn main() {
    // `cargo test --all-targets` runs this without `--bench`, to see that it works.
    let measured = std::env::args().any(|arg| arg == "--bench");
    if !cfg!(target_os = "linux") {
        return eprintln!("SKIPPED: resident memory is read from /proc");
    }
    let entries = if measured { 10_000_000 } else { 10_000 };
    let before = resident_bytes();
    let table = Table::new(Capacity::Entries(entries)).expect("enough memory");
    println!("{} slots in {} bytes", table.capacity(), table.memory_bytes());
    println!("| keys written | entries | of the first {entries} | resident bytes | per entry |");
    println!("|---|---|---|---|---|");
    for round in 0..4 {
        for key in round * entries..(round + 1) * entries {
            table.insert(key, !key);
        }
        // Before the lookups, which could touch further memory.
        let (held, bytes) = (table.len(), resident_bytes() - before);
        let stay = (0..entries).filter(|&key| table.get(key) == Some(!key)).count();
        println!(
            "| {} | {held} | {:.2} % | {bytes} | {:.2} |",
            (round + 1) * entries,
            100.0 * stay as f64 / entries as f64,
            bytes as f64 / held as f64,
        );
    }
}
