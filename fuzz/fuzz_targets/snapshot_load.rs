//! See `afterimage_cache::fuzzing::snapshot_load`.
#![no_main]
afterimage_fuzz::target!(afterimage_cache, "snapshot_load");
