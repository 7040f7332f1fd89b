//! The target `oip_http` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("oip_http");
