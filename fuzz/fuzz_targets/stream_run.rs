//! The target `stream_run` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("stream_run");
