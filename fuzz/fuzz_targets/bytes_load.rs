//! The target `bytes_load` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("bytes_load");
