//! The target `shipped_model` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("shipped_model");
