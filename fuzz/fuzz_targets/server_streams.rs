//! The target `server_streams` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("server_streams");
