//! The target `settings` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("settings");
