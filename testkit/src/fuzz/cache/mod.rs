//! Fuzz targets of the label table and its snapshots.
//!
//! Each target is a function that takes any bytes and panics if a property does not hold. `fuzz/`
//! runs them under libFuzzer; the tests run them on a stable toolchain, on seeds, regressions and
//! seeded mutations of both. `fuzz/README.md` lists the properties.

mod snapshot_load;
mod table_model;

use super::Target;

/// Every target of this crate.
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
        // The file and the model's copy of it. The buffers of fixed size are within the base.
        memory_per_byte: 64,
    },
];

/// The table against a map, under any operations: both hold the same entries, except those that the
/// table reports as evicted, and the table's own checks hold after each operation.
pub fn table_model(data: &[u8]) {
    table_model::table_model(data);
}

/// Any file as a snapshot. It is accepted or refused as an independent reading of `SNAPSHOT.md`
/// demands. A refused file changes nothing. After an accepted one, every value comes from the file
/// or from the table before.
pub fn snapshot_load(data: &[u8]) {
    snapshot_load::snapshot_load(data);
}
