//! The target `grpc_framing` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("grpc_framing");
