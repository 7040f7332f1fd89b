//! The target `model_text` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("model_text");
