//! The target `oip_grpc` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("oip_grpc");
