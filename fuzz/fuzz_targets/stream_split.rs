//! The target `stream_split` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("stream_split");
