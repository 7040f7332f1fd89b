//! The target `model_file` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("model_file");
