//! The target `decode_raw` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("decode_raw");
