//! The target `server_stream` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("server_stream");
