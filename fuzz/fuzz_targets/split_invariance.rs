//! The target `split_invariance` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("split_invariance");
