//! The target `snapshot_load` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("snapshot_load");
