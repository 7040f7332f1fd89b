//! The target `idx` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("idx");
