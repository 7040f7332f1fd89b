//! The target `round_trip` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("round_trip");
