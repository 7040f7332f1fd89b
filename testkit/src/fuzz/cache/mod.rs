//! Fuzz targets of the table and its snapshots: functions that take any bytes and panic when
//! something that must hold does not.
//!
//! `fuzz/` runs them under libFuzzer, the tests here run them on a stable toolchain, on seeds,
//! regressions and seeded mutations of both. `fuzz/README.md` tells what each of them asserts.

mod snapshot_load;
mod table_model;

use super::Target;

/// Every target of this crate.
pub const TARGETS: &[Target] = &[
    Target {
        name: "table_model",
        body: table_model,
        seeds: table_model::seeds,
        // Two bytes write an entry of the model, whose map may be half empty; 32 look up 31 keys at
        // once.
        memory_per_byte: 128,
    },
    Target {
        name: "snapshot_load",
        body: snapshot_load,
        seeds: snapshot_load::seeds,
        // The file, what a model reads from it, and the buffers of fixed size that are within the
        // base.
        memory_per_byte: 64,
    },
];

/// The table against a map, through any operations: what one has the other has, but for what the
/// table says that it evicted, and the table's own checks hold after each.
pub fn table_model(data: &[u8]) {
    table_model::table_model(data);
}

/// Any file as a snapshot: it is taken or refused as an independent reading of `SNAPSHOT.md` says,
/// a refused one changes nothing, and after one that was taken no key has a value that neither it
/// nor the table had.
pub fn snapshot_load(data: &[u8]) {
    snapshot_load::snapshot_load(data);
}
