//! The target `client_stream` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("client_stream");
