//! Fuzz targets of the table and its snapshots: functions that take any bytes and panic when an
//! invariant is broken.
//!
//! `fuzz/` runs them under libFuzzer. The tests of this crate run them on a stable toolchain, with
//! seeds, regressions and seeded mutations of both. `fuzz/README.md` lists their assertions.

mod bytes_load;
mod snapshot_load;
mod table_model;

use super::Target;

/// All targets of the cache.
pub const TARGETS: &[Target] = &[
    Target {
        name: "table_model",
        body: table_model,
        seeds: table_model::seeds,
        // Two bytes write an entry of the model, whose map may be half empty; 32 bytes look up 31
        // keys at once.
        memory_per_byte: 128,
    },
    Target {
        name: "snapshot_load",
        body: snapshot_load,
        seeds: snapshot_load::seeds,
        // The file, and the entries that the model reads from it. The base covers the buffers of
        // fixed size.
        memory_per_byte: 64,
    },
    Target {
        name: "bytes_load",
        body: bytes_load,
        seeds: bytes_load::seeds,
        // As above.
        memory_per_byte: 64,
    },
];

/// Random operations on a table and on a map. Both have the same entries except those that the
/// table reports as evicted, and the table is valid after each operation.
pub fn table_model(data: &[u8]) {
    table_model::table_model(data);
}

/// Any file as a snapshot of a byte store, as [`snapshot_load`].
pub fn bytes_load(data: &[u8]) {
    bytes_load::bytes_load(data);
}

/// Any file as a snapshot. It is loaded or refused as an independent parser of `SNAPSHOT.md` does.
/// A refused file changes nothing; after a load, each value comes from the file or from the table.
pub fn snapshot_load(data: &[u8]) {
    snapshot_load::snapshot_load(data);
}
