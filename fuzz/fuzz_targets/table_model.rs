//! See `afterimage_cache::fuzzing::table_model`.
#![no_main]
afterimage_fuzz::target!(afterimage_cache, "table_model");
