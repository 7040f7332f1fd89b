//! The target `oip_encodings` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("oip_encodings");
