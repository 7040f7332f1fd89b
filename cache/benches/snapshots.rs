//! Time to write and load a snapshot: `cargo bench -p afterimage-cache --bench snapshots --
//! [MILLIONS_OF_KEYS]`.

use afterimage_cache::snapshot::{SnapshotFile, load};
use afterimage_cache::{Capacity, Table};

fn main() {
    let millions = std::env::args().find_map(|arg| arg.parse::<u64>().ok());
    // `cargo test --all-targets` runs this without `--bench`, to see that it works.
    let measured = std::env::args().any(|arg| arg == "--bench");
    let keys = millions.map_or(if measured { 10_000_000 } else { 10_000 }, |n| n * 1_000_000);
    let new = || Table::new(Capacity::Bytes((keys + keys / 4) * 16)).expect("enough memory");
    let table = new();
    for key in 0..keys {
        table.insert(key, !key);
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = SnapshotFile::open(directory.path().join("snapshot")).expect("a new file");
    for _ in 0..3 {
        let written = file.write(&table).expect("enough disk");
        let restored = new();
        let loaded = load(&restored, file.path()).expect("a whole snapshot");
        assert_eq!(loaded.restored, table.len());
        assert!(restored.entries().all(|entry| entry.value == !entry.key));
        println!(
            "{} entries, {} MB: written in {:.2?}, loaded in {:.2?}",
            written.entries,
            written.bytes / 1_000_000,
            written.elapsed,
            loaded.elapsed
        );
    }
}
